"""The conclusions of the study fine_tuning, on made-up runs."""

import pytest

from experiments.studies.fine_tuning import AVERAGED, RATES, plot, runs, summary, table


@pytest.fixture
def made_up(make_run):
    """Returns a function that gives results with two seeds: all accuracies are 0.5, but those of the labels given."""

    def make(seeds=(0, 1), **accuracies):
        accuracies = {label.replace("_", "-"): value for label, value in accuracies.items()}
        assert accuracies.keys() <= runs("small").keys()
        return {
            label: [make_run(config.with_seed(seed), (0.1, accuracies.get(label, 0.5) + 0.01 * seed)) for seed in seeds]
            for label, config in runs("small").items()
        }

    return make


BETTER_AT_SMALL_BATCH = {f"{size}_{target}_4_frozen": 0.6 for size in ("small", "large") for target in ("near", "far")}
BETTER_ON_SMALL_FAR = {"small_far_64_frozen": 0.6}
WORSE_ON_LARGE = {f"large_{target}_64_trained": 0.4 for target in ("near", "far")}


def test_all_three_parts_show_the_claim(made_up):
    assert summary(made_up(**BETTER_AT_SMALL_BATCH, **BETTER_ON_SMALL_FAR))["verdict"] == "holds"


@pytest.mark.parametrize(
    ("accuracies", "claims"),
    [
        (BETTER_AT_SMALL_BATCH, "(1) and (3) hold, (2) is not shown"),
        (BETTER_ON_SMALL_FAR, "(2) and (3) hold, (1) is not shown"),
        (BETTER_AT_SMALL_BATCH | BETTER_ON_SMALL_FAR | WORSE_ON_LARGE, "(1) and (2) hold, (3) is not shown"),
        ({}, "(3) holds, (1) and (2) are not shown"),
        ({"large_far_64_trained": 0.481}, "(3) holds, (1) and (2) are not shown"),  # 0.95 points less on average
    ],
)
def test_a_part_that_fails_leaves_a_claim_in_part(made_up, accuracies, claims):
    found = summary(made_up(**accuracies))
    assert (found["verdict"], found["claims"]) == ("partly", claims)


def test_gain_where_none_is_claimed_and_none_elsewhere_does_not_show_the_claim(made_up):
    assert summary(made_up(**WORSE_ON_LARGE))["verdict"] == "fails"


def test_affine_maps_alone_are_not_the_claim(made_up):
    affine = {label.replace("frozen", "affine"): value for label, value in BETTER_AT_SMALL_BATCH.items()}
    found = summary(made_up(**affine, **WORSE_ON_LARGE))
    assert found["affine_small_batch"] == "10.0 ± 0.0 points higher" and found["verdict"] == "fails"


def test_gain_at_batch_4_is_the_mean_over_four_targets(made_up):
    assert (
        summary(made_up(small_near_4_frozen=0.6, large_far_4_frozen=0.8))["small_batch"] == "10.0 ± 0.0 points higher"
    )


def test_gain_on_large_targets_is_the_mean_over_two(made_up):
    assert summary(made_up(large_near_64_trained=0.6))["large"] == "5.0 ± 0.0 points higher"
    assert summary(made_up(large_near_64_trained=0.4))["large"] == "5.0 ± 0.0 points lower"


def test_large_spread_does_not_speak_against_freezing(made_up):
    found = made_up()
    run = found["large-near-64-trained"][1]
    run["rows"][-1]["test_accuracy"] -= 0.2
    assert summary(found)["verdict"] == "fails"


def test_single_seed_gives_no_verdict(made_up):
    found = summary(made_up(seeds=(0,), **BETTER_AT_SMALL_BATCH))
    assert found["verdict"] == "unknown" and not any("nan" in text or "±" in text for text in found.values())


def test_table_shows_the_three_tunings_side_by_side(made_up):
    lines = table(made_up(small_far_64_affine=0.6, small_far_64_frozen=0.4), "small")
    assert len(lines) == 8
    (line,) = [line for line in lines if (line["target"], line["images"], line["batch size"]) == ("far", "100", "64")]
    assert [line[f"{tuning}, %"] for tuning in ("trained", "frozen", "affine")] == [
        "50.5 ± 0.7",
        "40.5 ± 0.7",
        "60.5 ± 0.7",
    ]


def test_figure_shows_each_batch_with_every_target(made_up):
    left, right = plot(made_up()).axes
    assert (left.get_title(), right.get_title()) == ("batch size 4", "batch size 64")
    assert len(left.get_yticks()) == len(right.get_yticks()) == 8


@pytest.mark.parametrize("preset", ["small", "full"])
def test_targets_hold_none_of_the_classes_that_the_net_has_learned(preset):
    configs = runs(preset).values()
    for config in configs:
        assert config.data == "digits" or not set(config.classes) & set(config.start.classes)
        assert config.start.start is None and config.start.data == "cifar10"
    assert len({config.start for config in configs}) == 1


def test_tunings_differ_in_their_rates_and_nothing_else():
    configs = runs("small")
    for label, config in configs.items():
        other = configs[label.rpartition("-")[0] + "-trained"]
        same = {"momentum": other.momentum, "learning_rate": other.learning_rate}
        assert config.replace(tuning="trained", **same) == other


def test_running_statistics_are_averages_of_as_many_images_at_either_batch():
    for config in runs("small").values():
        if config.tuning == "trained":
            assert config.batch_size / (1 - config.momentum) == pytest.approx(AVERAGED)


def test_rate_is_in_proportion_to_the_batch():
    for config in runs("small").values():
        assert config.learning_rate == pytest.approx(RATES[config.tuning] * config.batch_size / 64)
