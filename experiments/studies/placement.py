"""Is batch norm better before or after the activation, and does it need scale and bias?

Command: python -m experiments run placement --preset small

Time: sized for 4 minutes on 2 CPU cores (small); measured: {time}

Published: No number published. Ioffe and Szegedy (2015) put batch norm before the activation; others put it after, and
it is a common view that it is better there. Scale and bias fixed at 1 and 0 are commonly said not to affect the net
very much.

Finding: The net ends at {before_learned} % test accuracy with batch norm before the activation and at {after_learned} %
with batch norm after it, {after}. With scale and bias fixed it ends at {before_fixed} % before the activation,
{fixed_before} than with both learned, and at {after_fixed} % after it, {fixed_after}. {verdict}.

Agreement: Agrees: batch norm after the activation ends a little higher, as many say; fixed scale and bias change next
to nothing, as said.

Refuted if: (1) the net does not end with a higher test accuracy where batch norm comes after the activation; (2) before
the activation, fixing scale and bias may change the accuracy by a point or more; (3) after it, it may.
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
LITTLE = 1.0  # points; what "not very much" is taken to mean


def runs(preset: str) -> dict[str, Config]:
    """Returns the four arms; what `small` makes smaller is said in `SETUP`."""
    return {
        f"{place}-{kind}": PRESETS[preset].replace(placement=place, affine=affine)
        for place in PLACES
        for kind, affine in KINDS.items()
    }


_SHARED = (
    "Convolutions have a bias of their own where batch norm comes after the activation; where it comes before, it "
    "would take the bias away."
)
SETUP = {
    "small": "Not the net and protocol of the published comparisons, but "
    f"{runs('small')['before-learned'].differences(runs('full')['before-learned'])}. {_SHARED} Nothing was tuned.",
    "full": "The net and protocol of the published comparisons; its norms never have a scale, so that what is learned "
    f"or fixed at 0 is the bias. {_SHARED}",
}


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding."""
    after = spread(gains(results, "after-learned", "before-learned"))
    fixed = {place: spread(gains(results, f"{place}-fixed", f"{place}-learned")) for place in PLACES}
    return {
        **{label.replace("-", "_"): spread(map(final_accuracy, results[label])).text() for label in ARMS},
        "after": compared(after, "more", "less"),
        **{f"fixed_{place}": compared(each, "more", "less") for place, each in fixed.items()},
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
                "fixed less learned, points": spread(gains(results, fixed, learned)).text(),
                "learned: after less before, points": "" if place == "before" else above,
                "seeds": str(len(results[learned])),
            }
        )
    return lines


def plot(results: dict[str, list[dict]]) -> Figure:
    """Returns accuracy against the epoch, accuracy at the end, and the differences that the claims are about."""
    lines = []
    for label, (name, color, dashes) in ARMS.items():
        accuracy = 100 * column(results[label], "test_accuracy")
        lines.append(plots.Line(name, column(results[label], "epoch").max(axis=0), accuracy, color, dashes))
    finals = [
        plots.Bar(name.replace(", ", ",\n"), [final_accuracy(run) for run in results[label]], color)
        for label, (name, color, _) in ARMS.items()
    ]
    differences = [
        plots.Bar("after\nless\nbefore", gains(results, "after-learned", "before-learned"), ARMS["after-learned"][1]),
        *(
            plots.Bar(
                f"{place}:\nfixed less\nlearned",
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
