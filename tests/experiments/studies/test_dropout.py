"""The measures and the conclusions of the study dropout, on made-up runs."""

import math

import numpy as np
import pytest

from experiments.evidence.verdicts import generalization_gap
from experiments.studies import dropout, protocol
from experiments.studies.dropout import PUBLISHED, fit, noise, plot, runs, summary, table
from experiments.training import evaluation, loop

OVERFITS = {"none": (0.9, 0.3), "dropout": (0.8, 0.4), "batch": (0.8, 0.5), "both": (0.7, 0.5)}  # training, test


@pytest.fixture
def made_up(make_run):
    """Returns a function of the accuracies at the end, (training, test) by arm, that gives results over seeds."""

    def make(seeds=2, measured=True, diverged=(), **changes):
        results = {}
        for label, config in runs("small").items():
            accuracies = (OVERFITS | changes)[label]
            results[label] = [make_run(config.replace(seed=seed), (0.2, 0.3, 0.4, 0.4)) for seed in range(seeds)]
            for seed, run in enumerate(results[label]):
                if measured:
                    for images, accuracy in zip(("training", "test"), accuracies, strict=True):
                        run["measured"].append({"images": images, "loss": 1.0, "accuracy": accuracy + 0.01 * seed})
                if label in diverged:
                    run["rows"] = run["rows"][:1]
                    run["rows"][0] |= {"diverged": True, "test_loss": math.nan}
        return results

    return make


@pytest.mark.parametrize(
    ("changes", "verdict", "claims"),
    [
        ({}, "holds", ""),
        ({"batch": (0.8, 0.395), "both": (0.7, 0.4)}, "holds", ""),  # hardly below dropout
        ({"both": (0.7, 0.3)}, "holds", ""),  # dropout does harm
        ({"batch": (0.7, 0.3), "both": (0.7, 0.3)}, "partly", "(2) and (3) hold, (1) is not shown"),
        ({"batch": (1.0, 0.4), "both": (0.7, 0.4)}, "partly", "(1) and (3) hold, (2) is not shown"),  # wider gap
        ({"both": (0.7, 0.53)}, "partly", "(1) and (2) hold, (3) is not shown"),  # dropout helps batch norm
        ({"batch": (1.0, 0.3), "both": (0.7, 0.4)}, "fails", ""),
    ],
)
def test_claims_are_that_batch_norm_regularizes_and_needs_no_dropout(made_up, changes, verdict, claims):
    fields = summary(made_up(**changes))
    assert (fields["verdict"], fields["claims"]) == (verdict, claims)


def test_narrower_gap_of_a_net_that_learns_less_is_no_regularization(made_up):
    fields = summary(made_up(batch=(0.3, 0.25), dropout=(0.8, 0.2), both=(0.3, 0.25)))
    assert fields["claims"] == "(1) and (3) hold, (2) is not shown"


@pytest.mark.parametrize(
    ("label", "claims"),
    [("dropout", "(2) and (3) hold, (1) is not shown"), ("both", "(1) and (2) hold, (3) is not shown")],
)
def test_large_spread_does_not_speak_for_no_difference(made_up, label, claims):
    results = made_up(dropout=(0.8, 0.5))
    for run, change in zip(results[label], (0.1, -0.1), strict=True):
        run["measured"][1]["accuracy"] += change
    assert summary(results)["claims"] == claims


def test_single_seed_gives_no_verdict_and_no_spread(made_up):
    fields = summary(made_up(seeds=1))
    assert fields["verdict"] == "unknown"
    assert not any("nan" in text or "±" in text for text in fields.values())


def test_gap_is_training_less_test_accuracy_in_evaluation_mode(made_up):
    assert generalization_gap(made_up()["none"][0]) == pytest.approx(60)


@pytest.mark.parametrize(
    ("batch", "text"), [((0.8, 0.5), "30.0 ± 0.0 points smaller"), ((1.0, 0.3), "10.0 ± 0.0 points larger")]
)
def test_change_of_the_gap_is_said_in_words(made_up, batch, text):
    assert summary(made_up(batch=batch))["narrower"] == text


def test_differences_in_test_accuracy_are_said_in_words_that_fit(made_up):
    fields = summary(made_up(both=(0.7, 0.45)))
    quoted = [fields[name] for name in ("vs_neither", "vs_dropout", "added")]
    assert quoted == ["20.0 ± 0.0 points better", "10.0 ± 0.0 points better", "5.0 ± 0.0 points worse"]


def test_training_accuracies_are_quoted_with_the_gap(made_up):
    fields = summary(made_up())
    assert (fields["training_none"], fields["training_both"]) == ("90.5 ± 0.7", "70.5 ± 0.7")


def test_noise_is_the_spread_of_the_changes_in_the_second_half(make_run):
    run = make_run(runs("small")["none"], [0.5] * 8)
    for row, loss in zip(run["rows"], (9.0, 0.0, 9.0, 0.0, 1.0, 2.0, 3.0, 6.0), strict=True):
        row["test_loss"] = loss
    assert noise(run) == pytest.approx(np.std((1, 1, 3), ddof=1))


def test_steadily_rising_loss_is_no_noise(make_run):
    run = make_run(runs("small")["none"], [0.5] * 8)
    for i, row in enumerate(run["rows"]):
        row["test_loss"] = i / 4
    assert noise(run) == 0


@pytest.mark.parametrize("seeds", [1, 2])
def test_what_was_not_measured_is_said_and_the_rest_is_shown(made_up, seeds):
    results = made_up(seeds=seeds, diverged=("none", "both"))
    texts = [*summary(results).values(), *(text for line in table(results, "small") for text in line.values())]
    assert "(not measured)" in texts and not any("nan" in text for text in texts)
    assert plot(results)


def test_results_without_their_measurements_are_refused(made_up):
    with pytest.raises(ValueError, match="must have a measurement of 'accuracy' with images='training'"):
        summary(made_up(measured=False))


def test_table_has_the_published_accuracy_of_every_arm_beside_ours(made_up):
    lines = table(made_up(), "small")
    assert [line["published test accuracy (simpler network), %"] for line in lines] == list(PUBLISHED.values())
    assert lines[0]["test accuracy, %"] == "30.5 ± 0.7" and lines[0]["gap, points"] == "60.0 ± 0.0"


def test_finding_fills_every_field(made_up):
    finding = protocol.sections(dropout)["Finding"]
    assert "{" not in finding.format(**summary(made_up()))


def test_rate_stays_constant_so_that_the_nets_overfit():
    for preset in ("small", "full"):
        for config in runs(preset).values():
            assert loop.learning_rate(config, config.epochs - 1) == config.learning_rate


@pytest.mark.slow
def test_training_is_watched_on_a_part_of_the_test_images_and_ends_with_all(tiny, blobs, monkeypatch):
    seen = []

    def trained(config, dataset, **_):
        seen.append(len(dataset.test_images))
        return loop.Trained([], {}, 1.0)

    monkeypatch.setattr(dropout, "WATCHED", 100)
    monkeypatch.setattr(loop, "fit", trained)
    monkeypatch.setattr(evaluation, "predict", lambda net, variables, images: np.eye(4)[np.zeros(len(images), int)])
    measured = fit(tiny, blobs).measured
    assert seen == [100]
    labels = {"training": blobs.train_labels, "test": blobs.test_labels}
    assert {each["images"]: each["accuracy"] for each in measured} == {k: np.mean(v == 0) for k, v in labels.items()}
