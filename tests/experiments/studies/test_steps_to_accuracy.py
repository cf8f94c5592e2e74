"""The conclusions of the study steps_to_accuracy, on made-up runs."""

import math

import pytest

from experiments.studies import protocol, steps_to_accuracy
from experiments.studies.steps_to_accuracy import ARMS, best, fit, part, plot, runs, steps_until, summary, table
from experiments.training import loop

AS_CLAIMED = {
    "none": (0.1, 0.2, 0.3, 0.4, 0.4),
    "bn-x1": (0.2, 0.4, 0.5, 0.5, 0.5),
    "bn-x5": (0.4, 0.5, 0.6, 0.6, 0.6),
    "bn-x30": (0.2, 0.5, 0.6, 0.7, 0.7),
    "sigmoid-none": (0.1, 0.1, 0.1, 0.1, 0.1),
    "sigmoid-bn": (0.1, 0.2, 0.3, 0.4, 0.4),
    "deep-supervision": (0.1, 0.3, 0.4, 0.4, 0.4),
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
        "x1": "takes 50.0 ± 0.0 % of these steps",
        "x5": "takes 25.0 ± 0.0 % of these steps",
        "x30": "takes 50.0 ± 0.0 % of these steps",
        "deep": "takes 75.0 ± 0.0 % of these steps",
    }


@pytest.mark.parametrize(
    ("label", "accuracies", "missing"),
    [
        ("bn-x1", (0.1, 0.2, 0.3, 0.4, 0.4), 1),  # as slow as the net without
        ("bn-x1", (0.4, 0.4, 0.5, 0.5, 0.5), 2),  # as fast as at 5 times the rate
        ("bn-x30", (0.4, 0.4, 0.4, 0.4, 0.4), 3),
        ("sigmoid-bn", (0.1, 0.1, 0.1, 0.1, 0.1), 4),
    ],
)
def test_claim_that_is_missing_is_named(made_up, label, accuracies, missing):
    fields = summary(made_up({label: accuracies}))
    assert fields["verdict"] == "partly" and fields["claims"].endswith(f", ({missing}) is not shown")


def test_no_part_does_not_show_the_claim(made_up):
    same = dict.fromkeys(AS_CLAIMED, AS_CLAIMED["none"])
    assert summary(made_up(same))["verdict"] == "fails"


def test_accuracy_never_reached_is_said_and_counts_against_the_claim(made_up, make_run):
    results = made_up()
    results["bn-x1"][1] = make_run(runs("small")["bn-x1"].replace(seed=1), (0.1, 0.1), diverged=True)
    fields = summary(results)
    assert fields["x1"] == "is not reached with every seed (1 of 2)" and fields["verdict"] == "partly"
    line = table(results, "small")[1]
    assert line["steps to the best accuracy without norm"] == "-"
    assert line["relative to no norm"] == "1 of 2 seeds get there"


def test_accuracy_that_neither_arm_reaches_is_no_ratio(made_up):
    never = {"bn-x1": (0.1, 0.1), "bn-x5": (0.1, 0.1)}
    fields = summary(made_up(never))
    assert fields["verdict"] == "partly" and fields["x5"] == "is not reached"


def test_single_seed_gives_no_verdict(made_up):
    fields = summary(made_up(seeds=(0,)))
    assert fields["verdict"] == "unknown" and "nan" not in " ".join(fields.values())


def test_steps_count_to_the_best_of_the_same_seed(made_up, make_run):
    results = made_up()
    results["none"][1] = make_run(runs("small")["none"].replace(seed=1), (0.1, 0.2, 0.2))
    assert part(results, "bn-x1") == "50.0 ± 0.0 %"  # 20 of 40 steps, and 10 of 20


@pytest.mark.parametrize("preset", ["small", "full"])
def test_arms_differ_in_what_they_are_named_after(preset):
    configs = runs(preset)
    rates = {label: config.learning_rate / configs["none"].learning_rate for label, config in configs.items()}
    assert rates == pytest.approx({label: factor for label, (*_, factor) in ARMS.items()})
    assert {label for label, config in configs.items() if config.norm == "batch"} == {
        "bn-x1", "bn-x5", "bn-x30", "sigmoid-bn"
    }  # fmt: skip


def test_accuracy_of_one_row_alone_does_not_count(make_run):
    run = make_run(runs("small")["none"], (0.1, 0.6, 0.2, 0.3, 0.4))
    assert best(run) == pytest.approx(30)
    assert steps_until(run, best(run)) == 40 and steps_until(run, 40) == math.inf


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_single_row_counts_as_it_is(made_up, seeds):
    results = made_up({label: (0.2,) for label in ARMS}, seeds)
    assert part(results, "bn-x1").startswith("100.0") and summary(results) and plot(results)
    assert len(table(results, "small")) == len(ARMS)


@pytest.mark.parametrize(
    ("label", "field", "text"),
    [("bn-x30", "gain", "30.0 ± 0.0 points less"), ("sigmoid-none", "sigmoid_gain", "30.0 ± 0.0 points more")],
)
def test_differences_are_said_in_words_that_fit(made_up, label, field, text):
    assert summary(made_up({label: (0.1, 0.1)}))[field] == text


def test_finding_fills_every_field(made_up):
    assert "{" not in protocol.sections(steps_to_accuracy)["Finding"].format(**summary(made_up()))


def test_runs_are_evaluated_on_a_part_of_the_test_images(tiny, blobs, monkeypatch):
    monkeypatch.setattr(steps_to_accuracy, "WATCHED", 100)
    monkeypatch.setattr(loop, "fit", lambda config, dataset, **_: dataset)
    watched = fit(tiny, blobs)
    assert len(watched.test_images) == len(watched.test_labels) == 100
    assert len(watched.train_images) == len(blobs.train_images)
