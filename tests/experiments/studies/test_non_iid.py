"""The conclusions of the study non_iid, on made-up runs; and the test batches whose statistics it uses."""

import numpy as np
import pytest

from experiments.studies import non_iid
from experiments.studies.non_iid import NAMES, NORMS, plot, runs, summary, table

AS_CLAIMED = {"batch-half_the_classes": 0.4, "batch-one_class": 0.1}


@pytest.fixture
def made_up(make_run):
    """Returns a function of final accuracies, and of those with test batches as in training; two seeds."""

    def make(accuracies=AS_CLAIMED, read=0.5, seeds=(0, 1)):
        results = {
            label: [make_run(config.replace(seed=seed), (accuracies.get(label, 0.5) + 0.01 * seed,)) for seed in seeds]
            for label, config in runs("small").items()
        }
        for label, group in results.items():
            for seed, run in zip(seeds, group, strict=True):
                sampling = run["header"]["config"]["sampling"]
                found = {"shuffled": 0.3, sampling: read}
                if not label.startswith("group"):
                    run["measured"] = [{"sampling": s, "accuracy": a + 0.01 * seed} for s, a in found.items()]
        return results

    return make


def test_all_four_parts_show_the_claim(made_up):
    fields = summary(made_up())
    assert fields["verdict"] == "holds"
    expected = {
        "half_beyond": "10.0 ± 0.0 points more",
        "one_beyond": "40.0 ± 0.0 points more",
        "renorm": "10.0 ± 0.0 points higher",
        "batch_statistics": "make batch norm 10.0 ± 0.0 points more accurate",
    }
    assert {name: fields[name] for name in expected} == expected
    assert [fields[f"group_{name}"] for name in ("shuffled", "half", "one")] == ["50.5 ± 0.7"] * 3


@pytest.mark.parametrize(
    ("other", "missing"),
    [
        ({"accuracies": AS_CLAIMED | {"group-half_the_classes": 0.4}}, "(1)"),
        ({"accuracies": AS_CLAIMED | {"group-one_class": 0.19}}, "(2)"),
        ({"accuracies": AS_CLAIMED | {"renorm-half_the_classes": 0.4}}, "(3)"),
        ({"read": 0.4}, "(4)"),
    ],
    ids=["group norm loses as much", "and nearly as much", "renorm no better", "batch not read"],
)
def test_one_part_that_is_not_found_leaves_the_claim_in_part(made_up, other, missing):
    fields = summary(made_up(**other))
    assert fields["verdict"] == "partly" and fields["claims"].endswith(f"{missing} is not shown")


def test_differences_the_other_way_are_told_as_such(made_up):
    fields = summary(made_up({"batch-half_the_classes": 0.6}))
    assert fields["half_beyond"] == "10.0 ± 0.0 points less" and fields["renorm"] == "10.0 ± 0.0 points lower"
    assert fields["batch_statistics"] == "make batch norm 10.0 ± 0.0 points less accurate"


def test_no_difference_does_not_show_the_claim(made_up):
    assert summary(made_up({}))["verdict"] == "fails"


def test_single_seed_gives_no_verdict_and_no_spread(made_up):
    fields = summary(made_up(seeds=(0,)))
    assert fields["verdict"] == "unknown"
    assert not any("±" in text or "nan" in text for text in fields.values())


def test_diverged_run_is_reported_without_the_numbers_that_it_has_not(made_up, make_run):
    results = made_up()
    label = "batch-half_the_classes"
    results[label][1] = make_run(runs("small")[label].replace(seed=1), (0.1,), diverged=True)
    fields = summary(results)
    assert fields["verdict"] == "partly" and fields["batch_statistics"] == "were not measured with every seed"
    assert not any("nan" in text for line in table(results, "small") for text in line.values())
    assert len(plot(results).axes) == 2


def test_table_has_a_line_for_each_norm_and_sampling(made_up):
    lines = table(made_up(), "small")
    assert len(lines) == len(NORMS) * len(NAMES)
    line = next(line for line in lines if (line["norm"], line["batches in training"]) == ("batch norm", "one class"))
    assert line["running statistics, %"] == "10.5 ± 0.7"
    assert line["test batches as in training, %"] == "50.5 ± 0.7"
    assert line["shuffled test batches, %"] == "30.5 ± 0.7"


def test_figure_shows_all_arms_and_the_statistics_of_batch_norm(made_up):
    ends, statistics = plot(made_up()).axes
    assert len(ends.patches) == 9
    assert [bar.get_width() for bar in statistics.patches] == pytest.approx(
        [50.5, 50.5, 40.5, 50.5, 30.5, 10.5, 50.5, 30.5]
    )


@pytest.mark.parametrize("preset", ["small", "full"])
def test_arms_differ_in_norm_and_sampling_alone(preset):
    configs = runs(preset)
    alike = {config.replace(norm="batch", sampling="shuffled", momentum=0.99) for config in configs.values()}
    assert len(alike) == 1
    assert all(config.momentum == (None if config.norm == "group" else 0.99) for config in configs.values())
    assert {(config.norm, config.sampling) for config in configs.values()} == {(n, s) for n in NORMS for s in NAMES}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampling", "classes"), [pytest.param("half_the_classes", 2, marks=pytest.mark.slow), ("one_class", 1)]
)
def test_test_batches_are_put_together_as_in_training(tiny, blobs, monkeypatch, sampling, classes):
    batches = {}

    def predict(net, variables, images, *, statistics, batch_size):
        batches[len(batches)] = images.reshape(-1, batch_size)
        assert statistics == "batch"
        return np.eye(4)[images.ravel() // 10]

    monkeypatch.setattr(non_iid, "predict", predict)
    labels = np.arange(80, dtype=np.int32) % 4
    config = tiny.replace(batch_size=4, sampling=sampling)
    made = blobs._replace(test_images=(10 * labels).astype(np.uint8), test_labels=labels)
    same, shuffled = non_iid.scores_on_test_batches(config, made, {})
    assert (same["sampling"], shuffled["sampling"]) == (sampling, "shuffled")
    assert same["accuracy"] == shuffled["accuracy"] == 1  # images and labels keep together
    assert all(len(set(batch)) == classes for batch in batches[0])
    assert np.mean([len(set(batch)) for batch in batches[1]]) > 2.2


def test_shuffled_batches_are_measured_once(tiny, blobs, monkeypatch):
    monkeypatch.setattr(non_iid, "predict", lambda net, variables, images, **_: np.zeros((len(images), 4)))
    assert [entry["sampling"] for entry in non_iid.scores_on_test_batches(tiny, blobs, {})] == ["shuffled"]
