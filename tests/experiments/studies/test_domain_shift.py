"""The conclusions of the study domain_shift, on made-up runs; and what it measures."""

import numpy as np
import pytest

from experiments.data.corruptions import CORRUPTIONS, STRENGTHS
from experiments.evidence.verdicts import entries as entries_of
from experiments.studies import domain_shift
from experiments.studies.domain_shift import CELLS, IMAGES, plot, runs, summary, table

CLEAN = 0.5


@pytest.fixture
def made_up(make_run):
    """Returns a function of accuracies at the largest strength that gives results with two seeds."""

    def entries(running, of_100, of_1000, seed):
        for corruption, strength in CELLS:
            part = strength / STRENGTHS[-1]
            at_most = {("running", 0): running, ("batch", 100): of_100, ("recalibrated", 10): running}
            at_most |= {("recalibrated", 100): of_100, ("recalibrated", 1000): of_1000}
            for (statistics, images), least in at_most.items():
                accuracy = CLEAN + part * (least - CLEAN) + 0.01 * seed
                which = {"corruption": corruption, "strength": strength, "statistics": statistics, "images": images}
                yield which | {"accuracy": accuracy}

    def make(running=0.3, of_100=0.45, of_1000=0.46, seeds=(0, 1), clean_running=CLEAN):
        results = {norm: [make_run(config.replace(seed=s)) for s in seeds] for norm, config in runs("small").items()}
        for norm, group in results.items():
            for seed, run in zip(seeds, group, strict=True):
                found = list(entries(running, of_100, of_1000, seed))
                run["measured"] = found if norm == "batch" else [e for e in found if e["statistics"] == "running"]
                if norm == "batch":
                    entries_of(run, strength=0, statistics="running")[0]["accuracy"] = clean_running + 0.01 * seed
        return results

    return make


def test_all_three_parts_show_the_claim(made_up):
    fields = summary(made_up())
    assert fields["verdict"] == "holds"
    assert fields["clean"] == "50.5 ± 0.7" and fields["shifted"] == "30.5 ± 0.7"
    assert fields["lost"] == fields["group_lost"] == "20.0 ± 0.0 points less"
    assert fields["won"] == "16.0 ± 0.0 points more"
    assert fields["back"] == "80 ± 0 %" and fields["enough"] == "94 ± 0 %"


def test_loss_is_counted_from_statistics_of_clean_images(made_up):
    """Running statistics have seen augmented images: what the new ones gain by that is no recovery."""
    fields = summary(made_up(clean_running=0.4))
    assert fields["clean"] == "40.5 ± 0.7" and fields["reference"] == "50.5 ± 0.7"
    assert fields["lost"] == "20.0 ± 0.0 points less" and fields["back"] == "80 ± 0 %"


def test_share_that_one_seed_does_not_have_is_told_with_the_reason(made_up):
    results = made_up()
    for entry in entries_of(results["batch"][1], statistics="recalibrated", images=1000, strength=5):
        entry["accuracy"] = 0.2
    fields = summary(results)
    assert fields["enough"] == "an undefined part (nothing is won back in 1 of 2 runs)"
    assert fields["claims"].endswith("are not shown")


SMALL_LOSS = {"running": 0.46, "of_100": 0.489, "of_1000": 0.49}
SMALL_GAIN = {"of_100": 0.38, "of_1000": 0.39}
MOST_IMAGES_NEEDED = {"of_100": 0.4}


@pytest.mark.parametrize(("number", "other"), [(1, SMALL_LOSS), (2, SMALL_GAIN), (3, MOST_IMAGES_NEEDED)], ids=str)
def test_one_part_that_is_not_found_leaves_the_claim_in_part(made_up, number, other):
    fields = summary(made_up(**other))
    assert fields["verdict"] == "partly" and fields["claims"].endswith(f", ({number}) is not shown")


def test_new_statistics_that_harm_are_said_to(made_up):
    assert summary(made_up(of_100=0.24, of_1000=0.25))["won"] == "5.0 ± 0.0 points less"


def test_nothing_lost_and_nothing_won_does_not_show_the_claim(made_up):
    fields = summary(made_up(running=0.5, of_100=0.5, of_1000=0.5))
    assert fields["verdict"] == "fails"
    assert fields["back"] == "an undefined part (nothing is lost in 2 of 2 runs)"


def test_single_seed_gives_no_verdict_and_no_spread(made_up):
    fields = summary(made_up(seeds=(0,)))
    assert fields["verdict"] == "unknown"
    assert not any("±" in text or "nan" in text for text in fields.values())


def test_result_without_a_new_corruption_is_refused(made_up, monkeypatch):
    monkeypatch.setattr(domain_shift, "CELLS", (*CELLS, ("fog", STRENGTHS[-1])))
    with pytest.raises(
        ValueError, match="measurement of 'accuracy' with corruption='fog', strength=5.*delete its result"
    ):
        summary(made_up())


def test_run_with_too_few_images_is_reported_without_the_numbers_that_it_has_not(made_up):
    results = made_up()
    for run in results["batch"]:
        run["measured"] = [entry for entry in run["measured"] if entry["images"] < IMAGES[-1]]
    fields = summary(results)
    assert fields["adapted"] == "(not measured)" and fields["shifted"] == "30.5 ± 0.7"


def test_diverged_run_is_reported_without_the_numbers_that_it_has_not(made_up, make_run):
    results = made_up()
    results["batch"][1] = make_run(runs("small")["batch"].replace(seed=1), (0.1,), diverged=True)
    fields = summary(results)
    assert fields["verdict"] == "fails" and fields["lost"] == "(not measured)"
    assert not any("nan" in text for line in table(results, "small") for text in line.values())
    assert len(plot(results).axes) == len(CORRUPTIONS) + 1


def test_table_has_a_line_for_each_corruption_and_for_their_mean(made_up):
    lines = table(made_up(), "small")
    names = [line["corruption, strength"] for line in lines]
    assert names == ["none", *(f"{name}, {s}" for name in (*CORRUPTIONS, "mean") for s in (3, 5))]
    assert lines[-1]["1,000 unlabeled images, %"] == "46.5 ± 0.7"


def test_no_image_serves_both_for_statistics_and_for_testing(tiny, blobs, monkeypatch):
    seen = []

    def answers(net, variables, images, others, counts):
        seen.append((images, others, counts))
        return iter(())

    monkeypatch.setattr(domain_shift, "answers", answers)
    numbered = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1) * np.ones((1, 8, 8, 1), np.uint8)
    domain_shift.scores_on_corruptions(
        tiny, blobs._replace(test_images=numbered, test_labels=blobs.test_labels[:40]), {}
    )
    assert len(seen) == len(CELLS)
    images, others, counts = seen[0]
    assert sorted([*images[:, 0, 0, 0], *others[:, 0, 0, 0]]) == list(range(40))
    assert counts == IMAGES and seen[1][2] == IMAGES[-1:]


def test_a_net_without_statistics_has_one_answer(monkeypatch):
    monkeypatch.setattr(domain_shift, "predict", lambda *_, **__: np.zeros((3, 2)))
    found = list(domain_shift.answers(None, {"params": {}, "batch_stats": {}}, None, np.zeros(20), IMAGES))
    assert [(statistics, images) for statistics, images, _ in found] == [("running", 0)]
