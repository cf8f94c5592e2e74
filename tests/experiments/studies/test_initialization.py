"""The conclusions of the study initialization, on made-up runs."""

import math

import pytest

from experiments.config import Config
from experiments.evidence.verdicts import entries
from experiments.studies.initialization import FACTORS, SCALED, SETUP, plot, runs, scientific, summary, table

REPRODUCED = {"none": 0.1, "batch": 0.4, "logits": 0.3, "tiny_epsilon": 0.3, "usual": 0.25}


@pytest.fixture
def made_up(make_run):
    """Returns a function of the arms' final accuracies, and of what scaling changes, that gives results."""

    def make(accuracies=REPRODUCED, change=1e-5, seeds=2, **options):
        return {
            arm: [run_of(arm, a, change, seed, **options) for seed in range(seeds)] for arm, a in accuracies.items()
        }

    def run_of(arm, accuracy, change, seed, diverged=False):
        run = make_run(runs("small")[arm].replace(seed=seed), (0.1, accuracy + 0.001 * seed), diverged)
        end = math.nan if diverged else 2.0
        run["measured"] = [
            {"when": "start", "layers": [1e-3, 1e-8, 0.0], "logits": 4e-13},
            {"when": "end", "layers": [1.0, end, end], "logits": end},
        ]
        if arm == "batch":
            run["measured"] += [
                {"start": start, "epsilon": epsilon, "factor": factor}
                | {"output": c, "input_gradient": 2 * c, "weight_gradient": 3 * c}
                for start, epsilon in SCALED.values()
                for c in [change if epsilon == "negligible" else 0.5]
                for factor in FACTORS
            ]
        return run

    return make


def test_all_that_was_published_shows_the_claim(made_up):
    assert summary(made_up())["verdict"] == "holds"


@pytest.mark.parametrize(
    "changed",
    [
        {"accuracies": REPRODUCED | {"none": 0.16}},
        {"accuracies": REPRODUCED | {"batch": 0.19}},
        {"accuracies": REPRODUCED | {"logits": 0.19}},
        {"change": 2e-4},
    ],
    ids=["none learns", "batch norm gains little", "the last norm gains little", "scaling changes the output"],
)
def test_what_is_not_reproduced_leaves_the_claim_in_part(made_up, changed):
    assert summary(made_up(**changed))["verdict"] == "partly"


def test_claims_are_judged_in_the_order_of_their_numbers(made_up):
    refuted = [
        {"accuracies": REPRODUCED | {"none": 0.16}},
        {"accuracies": REPRODUCED | {"logits": 0.19}},
        {"change": 2e-4},
    ]
    for number, changed in enumerate(refuted, start=1):
        assert summary(made_up(**changed))["claims"].endswith(f", ({number}) is not shown")


def test_runs_that_diverge_are_counted(made_up):
    results = made_up()
    results["tiny_epsilon"][0]["rows"][-1]["diverged"] = True
    assert summary(results)["tiny_epsilon"] == "1 of 2 runs diverge"


def test_nothing_reproduced_does_not_show_the_claim(made_up):
    accuracies = dict.fromkeys(REPRODUCED, 0.3)
    assert summary(made_up(accuracies, change=0.1))["verdict"] == "fails"


def test_one_factor_that_changes_the_output_refutes_the_invariance(made_up):
    results = made_up()
    (entry,) = entries(results["batch"][1], start="usual", epsilon="negligible", factor=0.01)
    entry["output"] = 0.5
    assert summary(results)["claims"] == "(1) and (2) hold, (3) is not shown"


def test_what_the_own_epsilon_does_is_told_and_not_judged(made_up):
    fields = summary(made_up())
    assert fields["own_large"] == fields["own_small"] == "0.500 ± 0.000" and fields["verdict"] == "holds"


def test_output_that_is_not_finite_refutes_the_invariance(made_up):
    assert summary(made_up(change=math.nan))["claims"] == "(1) and (2) hold, (3) is not shown"


def test_gains_are_taken_between_runs_of_the_same_seed(made_up):
    assert summary(made_up())["gain"] == "30.0 ± 0.0 points more"


def test_loss_of_accuracy_is_told_as_one(made_up):
    assert summary(made_up(REPRODUCED | {"logits": 0.05}))["logits_gain"] == "5.0 ± 0.0 points less"


def test_sizes_and_changes_are_quoted_with_their_spread(made_up):
    fields = summary(made_up())
    assert (fields["first"], fields["last"]) == ("1.0e-03 ± 0e+00", "0.0e+00 ± 0e+00")
    assert (fields["output"], fields["weight_gradient"]) == ("1.0e-05 ± 0e+00", "3.0e-05 ± 0e+00")
    assert fields["tiny_large"] == "0.500 ± 0.000"


def test_single_seed_gives_no_verdict_and_no_spread(made_up):
    fields = summary(made_up(seeds=1))
    assert fields["verdict"] == "unknown"
    assert not any("±" in text or "nan" in text for text in fields.values())


def test_diverged_runs_are_reported_too(made_up):
    results = made_up(diverged=True)
    text = str(summary(results)) + str(table(results, "small"))
    assert "nan" not in text and "(not finite)" in text
    assert len(plot(results).axes) == 3


def test_outputs_that_do_not_change_at_all_are_drawn_too(made_up):
    assert len(plot(made_up(change=0.0)).axes) == 3


def test_table_has_a_line_for_each_arm_and_both_ends(made_up):
    lines = table(made_up(), "small")
    assert len(lines) == 5
    assert lines[0]["rms of pre-activations, first layer, start"] == "1.0e-03 ± 0e+00"
    assert lines[0]["rms of pre-activations, last layer, end"] == "2.000 ± 0.000"


def test_small_numbers_are_quoted_by_their_order():
    assert scientific([1e-17, 3e-17]) == "2.0e-17 ± 1e-17"
    assert scientific([2e-17]) == "2.0e-17 (1 seed)"
    assert scientific([0.5, 0.7]) == "0.600 ± 0.141"


@pytest.mark.parametrize("arm", REPRODUCED)
def test_setup_of_small_names_all_that_differs_from_full(arm):
    small, full = (vars(runs(preset)[arm]) for preset in ("small", "full"))
    for name in vars(Config()):
        assert (f"`{name}` {small[name]} instead of" in SETUP["small"]) == (small[name] != full[name])
