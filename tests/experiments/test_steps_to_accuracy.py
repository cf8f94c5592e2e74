"""The conclusions of the study steps_to_accuracy, on made-up runs."""

import pytest

from experiments.studies.steps_to_accuracy import ARMS, runs, summary, table

AS_CLAIMED = {
    "none": (0.1, 0.2, 0.3, 0.4),
    "bn-x1": (0.2, 0.4, 0.5, 0.5),
    "bn-x5": (0.4, 0.5, 0.6, 0.6),
    "bn-x30": (0.2, 0.5, 0.6, 0.7),
    "sigmoid-none": (0.1, 0.1, 0.1, 0.1),
    "sigmoid-bn": (0.1, 0.2, 0.3, 0.4),
    "deep-supervision": (0.1, 0.3, 0.4, 0.4),
}


@pytest.fixture
def made_up(make_run):
    """Returns a function of the arms' accuracies, every 10 steps, that gives results with two seeds."""

    def make(changes=None, seeds=(0, 1)):
        accuracies = AS_CLAIMED | (changes or {})
        return {
            label: [make_run(config.replace(seed=seed), accuracies[label]) for seed in seeds]
            for label, config in runs("small").items()
        }

    return make


def test_all_four_parts_show_the_claim(made_up):
    assert summary(made_up())["verdict"] == "holds"


def test_steps_are_quoted_as_part_of_those_of_the_net_without_norm(made_up):
    fields = summary(made_up())
    quoted = {name: fields[name] for name in ("none_steps", "x1", "x5", "x30", "deep")}
    assert quoted == {
        "none_steps": "40 ± 0",
        "x1": "50.0 ± 0.0 %",
        "x5": "25.0 ± 0.0 %",
        "x30": "50.0 ± 0.0 %",
        "deep": "75.0 ± 0.0 %",
    }


@pytest.mark.parametrize(
    ("label", "accuracies"),
    [
        ("bn-x1", (0.1, 0.2, 0.3, 0.4)),  # as slow as the net without
        ("bn-x1", (0.4, 0.4, 0.5, 0.5)),  # as fast as at 5 times the rate
        ("bn-x30", (0.4, 0.4, 0.4, 0.4)),
        ("sigmoid-bn", (0.1, 0.1, 0.1, 0.1)),
    ],
)
def test_a_part_that_is_missing_leaves_the_claim_in_part(made_up, label, accuracies):
    assert summary(made_up({label: accuracies}))["verdict"] == "partly"


def test_no_part_does_not_show_the_claim(made_up):
    same = dict.fromkeys(AS_CLAIMED, AS_CLAIMED["none"])
    assert summary(made_up(same))["verdict"] == "fails"


def test_accuracy_never_reached_is_said_and_counts_against_the_claim(made_up, make_run):
    results = made_up()
    results["bn-x1"][1] = make_run(runs("small")["bn-x1"].replace(seed=1), (0.1, 0.1), diverged=True)
    fields = summary(results)
    assert fields["x1"] == "more than all (1 of 2 seeds get there)" and fields["verdict"] == "partly"
    assert [line["steps to the best without norm"] for line in table(results, "small")][1] == "-"


def test_accuracy_that_neither_arm_reaches_is_no_ratio(made_up):
    never = {"bn-x1": (0.1, 0.1), "bn-x5": (0.1, 0.1)}
    assert summary(made_up(never))["verdict"] == "partly"


def test_single_seed_gives_no_verdict(made_up):
    fields = summary(made_up(seeds=(0,)))
    assert fields["verdict"] == "unknown" and fields["x1"] == "50.0 (1 seed) %"


def test_steps_count_to_the_best_of_the_same_seed(made_up, make_run):
    results = made_up()
    results["none"][1] = make_run(runs("small")["none"].replace(seed=1), (0.1, 0.2))
    assert summary(results)["x1"] == "50.0 ± 0.0 %"  # 20 of 40 steps, and 10 of 20


@pytest.mark.parametrize("preset", ["small", "full"])
def test_arms_differ_in_what_they_are_named_after(preset):
    configs = runs(preset)
    rates = {label: config.learning_rate / configs["none"].learning_rate for label, config in configs.items()}
    assert rates == pytest.approx({label: factor for label, (*_, factor) in ARMS.items()})
    assert {label for label, config in configs.items() if config.norm == "batch"} == {
        "bn-x1", "bn-x5", "bn-x30", "sigmoid-bn"
    }  # fmt: skip
