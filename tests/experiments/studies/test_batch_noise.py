"""The conclusions of the study batch_noise, on made-up runs."""

import math

import numpy as np
import pytest

from experiments.studies import batch_noise
from experiments.studies.batch_noise import ARMS, BATCH, fit, plot, runs, summary, table
from experiments.training import loop


@pytest.fixture
def made_up(make_run):
    """Returns a function of the arms' accuracies at the end that gives results with two seeds.

    All other arms learn everything by heart, and get half of the test images right; the spread falls as a power.
    """

    def make(power=-0.5, seeds=(0, 1), training=None, test=None):
        def run(label, config):
            accuracies = {"training": (training or {}).get(label, 1.0), "test": (test or {}).get(label, 0.5)}
            made = make_run(config)
            made["measured"] = [{"images": k, "loss": 1.0, "accuracy": v} for k, v in accuracies.items()]
            if label == "batch":
                powers = [{"group_size": g, "mean": 0.4 * g**power, "std": 0.3 * g**power} for g in (2, 16, 256)]
                made["measured"] += powers
            return made

        return {label: [run(label, c.replace(seed=s)) for s in seeds] for label, c in runs("small").items()}

    return make


SMALLER = {"ghost-16": 0.9, "noise-16": 0.8}


def test_both_smaller_gaps_show_the_claim(made_up):
    fields = summary(made_up(training=SMALLER))
    assert (fields["verdict"], fields["claims"]) == ("holds", "")
    assert fields["batch_gap"] == "50.0 ± 0.0"
    assert [fields[f"{name}_training"] for name in ("batch", "ghost", "noise")] == [
        "100.0 ± 0.0",
        "90.0 ± 0.0",
        "80.0 ± 0.0",
    ]
    assert (fields["ghost"], fields["noise"]) == ("10.0 ± 0.0 points smaller", "20.0 ± 0.0 points smaller")


@pytest.mark.parametrize(
    ("changes", "claims"),
    [
        ({"training": {"ghost-16": 0.9}}, "(1) holds, (2) is not shown"),
        ({"training": {"noise-16": 0.9}}, "(2) holds, (1) is not shown"),
        ({"test": {"ghost-16": 0.48}}, "(2) holds, (1) is not shown"),  # smaller, since less is learned
    ],
    ids=str,
)
def test_a_part_that_is_missing_leaves_the_claim_in_part(made_up, changes, claims):
    fields = summary(made_up(**{"training": SMALLER} | changes))
    assert (fields["verdict"], fields["claims"]) == ("partly", claims)


def test_test_accuracy_may_be_lower_by_less_than_a_point(made_up):
    assert summary(made_up(training=SMALLER, test=dict.fromkeys(SMALLER, 0.495)))["verdict"] == "holds"


def test_a_larger_gap_does_not_show_the_claim(made_up):
    fields = summary(made_up(test=dict.fromkeys(SMALLER, 0.4)))
    assert fields["verdict"] == "fails" and fields["ghost"] == "10.0 ± 0.0 points larger"


@pytest.mark.parametrize("power", [-0.2, -1.0])
def test_law_of_the_spread_decides_no_claim(made_up, power):
    assert summary(made_up(power=power, training=SMALLER))["verdict"] == "holds"


def test_single_seed_gives_no_verdict_and_no_spread(made_up):
    fields = summary(made_up(seeds=(0,), training=SMALLER))
    assert fields["verdict"] == "unknown"
    assert not any("±" in text or "nan" in text for text in fields.values())


def test_law_is_quoted_with_both_ends_and_the_power(made_up):
    law = summary(made_up())["law"]
    assert "From 2 to 256 images" in law and "from 0.283 ± 0.000 to 0.025 ± 0.000" in law
    assert "to the power -0.50 ± 0.00 (independent draws give -0.5)" in law


def test_diverged_run_is_reported_without_a_law(made_up):
    results = made_up(training=SMALLER)
    for entry in results["batch"][0]["measured"]:
        entry |= {key: math.nan for key in ("loss", "mean", "std") if key in entry}
    fields = summary(results)
    assert "could not be measured" in fields["law"] and fields["verdict"] == "holds"
    assert not any("nan" in text for line in [fields, *table(results, "small")] for text in line.values())
    assert plot(results)


def test_lines_of_both_kinds_end_in_the_whole_batch(made_up):
    axes = plot(made_up(training=SMALLER | {"batch": 0.7})).axes[1]
    lines = {line.get_color(): line for line in axes.lines if len(line.get_xdata()) == 4}
    assert [list(line.get_xdata()) for line in lines.values()] == [[4, 16, 64, 256]] * 2
    assert [line.get_ydata()[-1] for line in lines.values()] == pytest.approx([20, 20])


def test_table_has_a_line_for_each_arm(made_up):
    lines = table(made_up(training=SMALLER), "small")
    assert [line["statistics"] for line in lines] == list(ARMS.values())
    assert [line["gap closed vs whole batch, points"] for line in lines][2] == "10.0 ± 0.0"


@pytest.mark.parametrize("preset", ["small", "full"])
def test_all_arms_take_the_same_steps_at_a_constant_rate(preset):
    configs = runs(preset)
    assert {config.batch_size for config in configs.values()} == {BATCH}
    assert all(config.train_images % BATCH == 0 for config in configs.values())
    assert {loop.learning_rate(config, e) for config in configs.values() for e in range(config.epochs)} == {0.1}


@pytest.mark.slow
def test_net_is_tested_on_all_images_and_rows_on_the_first(blobs, tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(batch_noise, "ROW_IMAGES", 100)
    monkeypatch.setattr(loop, "fit", lambda _, few: seen.append(len(few.test_images)) or loop.Trained([], {}, 1.0))
    monkeypatch.setattr(
        batch_noise.evaluation,
        "predict",
        lambda net, variables, images: seen.append(len(images)) or np.zeros((len(images), 4), np.float32),
    )
    trained = fit(tiny.replace(norm="ghost", group_size=4), blobs)
    assert seen == [100, 64, 620]
    assert [entry["images"] for entry in trained.measured] == ["training", "test"]
    assert trained.measured[1]["loss"] == pytest.approx(math.log(4))
