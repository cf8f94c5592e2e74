"""The conclusions of the study population, on made-up runs; and what it measures."""

import jax
import numpy as np
import pytest

from experiments.studies import population
from experiments.studies.population import AVERAGES, plot, runs, summary, table
from experiments.training import loop

AS_CLAIMED = {"short-0.99": 0.2, "short-0.999": 0.1, "short-0.999-debiased": 0.3}


@pytest.fixture
def made_up(make_run):
    """Returns a function of the final accuracies that gives results with two seeds; precise statistics give 50 %."""

    def make(accuracies=AS_CLAIMED, precise=0.5, seeds=(0, 1)):
        results = {
            label: [make_run(config.replace(seed=seed), (accuracies.get(label, 0.5) + 0.01 * seed,)) for seed in seeds]
            for label, config in runs("small").items()
        }
        for length in population.LENGTHS:
            for run in results[f"{length}-{population.MEASURED}"]:
                accuracy = precise + 0.01 * run["header"]["config"]["seed"]
                run["measured"] = [{"statistics": "batch", "images": n, "accuracy": 0.4} for n in (100, 10)]
                run["measured"] += [
                    {"statistics": "precise", "images": n, "accuracy": accuracy} for n in population.IMAGES
                ]
        return results

    return make


def test_all_three_parts_show_the_claim(made_up):
    fields = summary(made_up())
    assert fields["verdict"] == "holds"
    assert [fields[name] for name in ("short_gain", "debias_gain", "long_gain")] == [
        "30.0 ± 0.0 points more",
        "20.0 ± 0.0 points more",
        "0.0 ± 0.0 points more",
    ]


@pytest.mark.parametrize("running", [0.48, 0.52])
def test_a_difference_to_either_side_after_long_training_speaks_against_the_claim(made_up, running):
    fields = summary(made_up(AS_CLAIMED | {"long-0.99": running}))
    assert fields["claims"] == "(1) and (2) hold, (3) is not shown"
    assert fields["long_gain"] == f"2.0 ± 0.0 points {'more' if running < 0.5 else 'less'}"


@pytest.mark.parametrize(("changed", "lost"), [({"short-0.99": 0.51}, 1), ({"short-0.999-debiased": 0.09}, 2)])
def test_a_loss_in_short_training_refutes_a_gain(made_up, changed, lost):
    fields = summary(made_up(AS_CLAIMED | changed))
    assert fields["claims"].endswith(f", ({lost}) is not shown")
    assert fields["short_gain" if lost == 1 else "debias_gain"] == "1.0 ± 0.0 points less"


def test_momentum_of_0_9_is_told_and_not_judged(made_up):
    fields = summary(made_up(AS_CLAIMED | {"long-0.9": 0.1, "short-0.9": 0.1}))
    assert fields["verdict"] == "holds" and fields["long_fast"] == fields["short_fast"] == "10.5 ± 0.7"


def test_nothing_of_it_does_not_show_the_claim(made_up):
    assert summary(made_up({"long-0.99": 0.4}))["verdict"] == "fails"


def test_single_seed_gives_no_verdict_and_no_spread(made_up):
    fields = summary(made_up(seeds=(0,)))
    assert fields["verdict"] == "unknown"
    assert not any("±" in text or "nan" in text for text in fields.values())


def test_what_few_images_could_not_tell_is_said_and_not_drawn(made_up):
    results = made_up()
    for run in results["short-0.99"] + results["long-0.99"]:
        run["measured"] = [entry for entry in run["measured"] if entry["images"] == 10]
    fields = summary(results)
    assert fields["short_precise"] == fields["long_gain"] == "(not measured)" and fields["verdict"] == "partly"
    assert not any("nan" in text for line in table(results, "small") for text in line.values())
    assert plot(results).axes


def test_diverged_run_is_reported_without_the_numbers_that_it_has_not(made_up, make_run):
    results = made_up()
    config = runs("small")["short-0.99"].replace(seed=1)
    results["short-0.99"][1] = make_run(config, (0.1,), diverged=True)
    fields = summary(results)
    assert fields["short_precise"] == "(not measured)"
    assert table(results, "small") and len(plot(results).axes) == 3


def test_table_has_a_line_for_each_kind_of_statistics(made_up):
    lines = table(made_up(), "small")
    assert len(lines) == len(AVERAGES) + len(population.TEST_BATCHES) + len(population.IMAGES)
    assert lines[0] == {
        "statistics at test time": "running average 0.9",
        "short training, %": "50.5 ± 0.7",
        "long training, %": "50.5 ± 0.7",
        "seeds": "2",
    }


def test_arms_of_one_length_differ_in_their_running_statistics_alone():
    for preset in ("small", "full"):
        for length in population.LENGTHS:
            configs = [runs(preset)[f"{length}-{name}"] for name in AVERAGES]
            assert len({config.replace(momentum=None, debias=False) for config in configs}) == 1
            assert len(set(configs)) == len(AVERAGES)


def test_precise_statistics_come_from_augmented_images_drawn_again_for_each_seed(tiny, blobs):
    draws = [population.augmented(tiny.replace(seed=seed), blobs, 12) for seed in (0, 0, 1)]
    assert [len(draw) for draw in draws] == [1, 1, 1] and draws[0][0].shape == (12, 8, 8, 1)
    np.testing.assert_array_equal(draws[0][0], draws[1][0])
    assert not np.array_equal(draws[0][0], draws[2][0])
    plain = blobs.train_images / np.float32(255)
    assert not any(np.array_equal(draws[0][0][0], image) for image in plain)


@pytest.mark.slow
def test_running_statistics_have_no_part_in_training(tiny, blobs):
    config = tiny.replace(width=0.25, epochs=1)
    first, *others = (loop.fit(config.replace(momentum=m), blobs).variables for m in (0.9, 0.999))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first["params"], other["params"])
        assert not np.array_equal(*(jax.tree.leaves(v["batch_stats"])[0] for v in (first, other)))
