"""Is batch norm better before or after the activation, and does it need scale and bias?

Command: python -m experiments run placement --preset small

Time: planned for 4 minutes on 2 CPU cores (small); measured: {time}

Published: No numbers. Ioffe and Szegedy (2015) put batch norm before the activation; others put it after, and it is a
common view that it is better there. Fixing scale and bias at 1 and 0 is commonly said not to affect the network very
much.

Finding: The network ends at {before_learned} % test accuracy with batch norm before the activation and at
{after_learned} % with batch norm after it, {after}. With scale and bias fixed, it ends at {before_fixed} % with batch
norm before the activation, {fixed_before} than with both learned, and at {after_fixed} % with batch norm after it,
{fixed_after}. {verdict}.

Agreement: Agrees: with batch norm after the activation, the network ends a little higher, as many say; fixing scale and
bias changes next to nothing, as is commonly said.

Refuted if: (1) the network does not end with a higher test accuracy if batch norm comes after the activation; (2) with
batch norm before the activation, fixing scale and bias may change the accuracy by one or more points; (3) with batch
norm after it, it may.
"""

from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.evidence import plots
from experiments.evidence.verdicts import column, compared, exceeds, final_accuracy, gains, judge, spread, within

PLACES = ("before", "after")
KINDS = {"learned": True, "fixed": False}  # of scale and bias: name and `affine`
ARMS = {  # label: name, color, dashes
    "before-learned": ("before", plots.PALETTE["blue"], "-"),
    "before-fixed": ("before, fixed", plots.PALETTE["sky"], "--"),
    "after-learned": ("after", plots.PALETTE["vermilion"], "-"),
    "after-fixed": ("after, fixed", plots.PALETTE["orange"], "--"),
}
LITTLE = 1.0  # points; our reading of "not very much"


def runs(preset: str) -> dict[str, Config]:
    """Returns the four arms; `SETUP` says how `small` differs."""
    return {
        f"{place}-{kind}": PRESETS[preset].replace(placement=place, affine=affine)
        for place in PLACES
        for kind, affine in KINDS.items()
    }


_SHARED = (
    "Convolutions have a bias only if batch norm comes after the activation; if it comes before, it would subtract the "
    "bias."
)
SETUP = {
    "small": "The network and protocol of the published comparisons, except for "
    f"{runs('small')['before-learned'].differences(runs('full')['before-learned'])}. {_SHARED} Nothing was tuned.",
    "full": "The network and protocol of the published comparisons; its norms never have a scale, so that only the "
    f"bias is learned or fixed at 0. {_SHARED}",
}


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding."""
    after = spread(gains(results, "after-learned", "before-learned"))
    fixed = {place: spread(gains(results, f"{place}-fixed", f"{place}-learned")) for place in PLACES}
    return {
        **{label.replace("-", "_"): spread(map(final_accuracy, results[label])).text() for label in ARMS},
        "after": compared(after, "more", "less"),
        **{f"fixed_{place}": compared(gained, "more", "less") for place, gained in fixed.items()},
        **judge(exceeds(after), *(within(fixed[place], LITTLE) for place in PLACES), seeds=after.n),
    }


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per place: accuracies with scale and bias learned and fixed, and the differences."""
    lines = []
    for place in PLACES:
        learned, fixed = (f"{place}-{kind}" for kind in KINDS)
        above = spread(gains(results, learned, "before-learned")).text()
        lines.append(
            {
                "batch norm": f"{place} the activation",
                "scale and bias learned, %": spread(map(final_accuracy, results[learned])).text(),
                "scale and bias fixed, %": spread(map(final_accuracy, results[fixed])).text(),
                "fixed - learned, points": spread(gains(results, fixed, learned)).text(),
                "after - before, both learned, points": "" if place == "before" else above,
                "seeds": str(len(results[learned])),
            }
        )
    return lines


def plot(results: dict[str, list[dict]]) -> Figure:
    """Draws accuracy against the epoch, final accuracy, and the differences that the claims are about."""
    lines = []
    for label, (name, color, dashes) in ARMS.items():
        accuracy = 100 * column(results[label], "test_accuracy")
        lines.append(plots.Line(name, column(results[label], "epoch").max(axis=0), accuracy, color, dashes))
    finals = [
        plots.Bar(name.replace(", ", ",\n"), [final_accuracy(run) for run in results[label]], color)
        for label, (name, color, _) in ARMS.items()
    ]
    differences = [
        plots.Bar("after -\nbefore", gains(results, "after-learned", "before-learned"), ARMS["after-learned"][1]),
        *(
            plots.Bar(
                f"{place}:\nfixed -\nlearned",
                gains(results, f"{place}-fixed", f"{place}-learned"),
                ARMS[f"{place}-fixed"][1],
            )
            for place in PLACES
        ),
    ]
    return plots.draw(
        [
            plots.Lines("epoch", "test accuracy (%)", lines),
            plots.Bars("final test accuracy (%)", finals),
            plots.Bars("difference in accuracy (points)", differences),
        ]
    )
