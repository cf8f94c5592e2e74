"""The conclusions of the study batch_sizes, on made-up runs."""

import pytest

from experiments.studies.batch_sizes import AVERAGED, SIZES, plot, runs, summary, table

GOOD_AT_MEDIUM = (0.5, 0.5, 0.6, 0.59, 0.5)
EPOCHS = (4.0, 2.0, 1.0, 0.9, 0.8)  # the time of each, as a part of what `make_run` says


@pytest.fixture
def made_up(make_run):
    """Returns a function of accuracies by batch size, and of what batch norm adds, that gives results over seeds."""

    def make(batch=GOOD_AT_MEDIUM, gains=(0.1,) * 5, costs=(1.5,) * 5, epochs=EPOCHS, seeds=2):
        results = {}
        for (label, config), i in zip(runs("small").items(), sorted([*range(5)] * 2), strict=True):
            normed = config.norm == "batch"
            accuracy = batch[i] - (0 if normed else gains[i])
            results[label] = [
                make_run(config.replace(seed=seed), [0.1, accuracy + 0.01 * seed, 0.1]) for seed in range(seeds)
            ]
            for run in results[label]:
                for row in run["rows"]:
                    row["seconds"] *= epochs[i] * (costs[i] if normed else 1.0)
        return results

    return make


NO_GAIN = (0.1, 0.1, 0.1, 0.1, 0.0)
NO_COST = (1.5, 1.0, 1.5, 1.5, 1.5)
PEAK_AT_10 = (0.5, 0.6, 0.5, 0.5, 0.5)
LEVEL = (0.59, 0.6, 0.59, 0.59, 0.5)


@pytest.mark.parametrize(
    ("changes", "verdict", "claims"),
    [
        ({}, "holds", ""),
        ({"batch": LEVEL}, "holds", ""),  # nearly as good as at the best size
        ({"gains": NO_GAIN}, "partly", "(2) and (3) hold, (1) is not shown"),
        ({"costs": NO_COST}, "partly", "(1) and (3) hold, (2) is not shown"),
        ({"batch": PEAK_AT_10}, "partly", "(1) and (2) hold, (3) is not shown"),
        ({"epochs": (1.0,) * 5}, "partly", "(1) and (2) hold, (3) is not shown"),
        ({"batch": PEAK_AT_10, "gains": NO_GAIN, "costs": NO_COST}, "fails", ""),
    ],
)
def test_claims_are_better_and_slower_at_every_size_and_nearly_the_best_at_medium_ones(
    made_up, changes, verdict, claims
):
    fields = summary(made_up(**changes))
    assert (fields["verdict"], fields["claims"]) == (verdict, claims)


def test_medium_sizes_are_quoted_with_the_best_and_the_smallest(made_up):
    fields = summary(made_up())
    assert (fields["lost_50"], fields["lost_100"]) == ("0.0 ± 0.0", "1.0 ± 0.0")
    assert (fields["epoch_50"], fields["epoch_100"]) == ("25.0 ± 0.0", "22.5 ± 0.0")


def test_running_statistics_are_averages_of_as_many_images_at_every_size():
    for config in runs("small").values():
        if config.norm == "batch":
            assert config.batch_size / (1 - config.momentum) == pytest.approx(AVERAGED)
    assert all(config.momentum is None for config in runs("full").values())


def test_single_seed_gives_no_verdict_and_no_spread(made_up):
    fields = summary(made_up(seeds=1))
    assert fields["verdict"] == "unknown"
    assert not any("nan" in text or "±" in text for text in fields.values())


def test_single_seed_counts_the_sizes_by_their_sign(made_up):
    fields = summary(made_up(gains=NO_GAIN, costs=NO_COST, seeds=1))
    assert (fields["better"], fields["slower"]) == ("4", "4")


def test_smallest_and_largest_gains_and_costs_are_quoted(made_up):
    fields = summary(made_up(gains=(0.1, 0.2, 0.3, 0.2, 0.1), costs=(2.0, 1.5, 1.5, 1.5, 1.25)))
    assert (fields["least"], fields["most"]) == ("10.0 ± 0.0", "30.0 ± 0.0")
    assert (fields["shortest"], fields["longest"]) == ("1.25 ± 0.00", "2.00 ± 0.00")


def test_best_size_is_that_of_batch_norm(made_up):
    fields = summary(made_up(batch=PEAK_AT_10, gains=(0.1, 0.5, 0.1, 0.1, 0.1)))
    assert (fields["best_size"], fields["best"]) == ("10", "60.5 ± 0.7")


def test_table_has_accuracy_and_time_of_each_size_with_the_published_ones_next_to_them(made_up):
    lines = table(made_up(), "small")
    assert [line["batch size"] for line in lines] == [str(size) for size in SIZES]
    assert lines[0]["published (full protocol), with / without batch norm, %"] == "~92 / ~85"
    assert lines[0]["published (full protocol), with / without batch norm, min"] == "~223 / ~124"
    assert (lines[0]["training time, no norm, s"], lines[0]["ratio of step times"]) == ("24.0 ± 0.0", "1.50 ± 0.00")


def test_time_of_an_epoch_is_drawn_and_not_that_of_a_run_that_ended_early(made_up):
    results = made_up(costs=(1.0,) * 5, epochs=(1.0,) * 5)
    results["none-250"][0]["rows"] = results["none-250"][0]["rows"][:1]
    _, without, *_ = plot(results).axes[1].lines
    assert without.get_ydata().tolist() == [2.0] * 5
