"""The conclusions of the study bn_vs_none, on made-up runs."""

import pytest

from experiments.config import Config
from experiments.studies.bn_vs_none import SETUP, runs, summary


@pytest.fixture
def made_up(make_run):
    """Returns a function of the arms' accuracies by epoch that gives results with two seeds."""

    def make(batch, none):
        configs = runs("small")
        by_norm = {"batch": batch, "none": none}
        return {
            norm: [
                make_run(configs[norm].replace(seed=seed), [a + 0.01 * seed for a in by_norm[norm]]) for seed in (0, 1)
            ]
            for norm in configs
        }

    return make


def test_better_and_faster_shows_the_claim(made_up):
    assert summary(made_up((0.3, 0.6), (0.1, 0.2)))["verdict"] == "holds"


def test_worse_does_not_show_the_claim(made_up):
    assert summary(made_up((0.3, 0.1), (0.1, 0.2)))["verdict"] == "fails"


def test_better_but_slower_does_not_show_the_claim(made_up):
    assert summary(made_up((0.1, 0.6), (0.3, 0.2)))["verdict"] == "fails"


def test_difference_is_quoted_with_its_spread(made_up):
    assert summary(made_up((0.3, 0.6), (0.1, 0.2)))["gain"] == "40.0 ± 0.0"


def test_epochs_and_time_to_the_other_net_s_best_are_quoted(made_up):
    passes = summary(made_up((0.3, 0.6), (0.1, 0.2)))["passes"]
    assert "after 1.0 ± 0.0 of 6 epochs, in 50.0 ± 0.0 % of the time" in passes


def test_accuracy_never_reached_is_said(made_up):
    assert "Not with every seed" in summary(made_up((0.1, 0.1), (0.1, 0.2)))["passes"]


def test_single_seed_gives_no_verdict(made_up):
    first = {norm: group[:1] for norm, group in made_up((0.3, 0.6), (0.1, 0.2)).items()}
    assert summary(first)["verdict"] == "unknown"


def test_differences_are_taken_between_runs_of_the_same_seed(make_run):
    accuracies = {"batch": {0: 0.6, 1: 0.8}, "none": {1: 0.6, 0: 0.4}}
    configs = runs("small")
    results = {
        norm: [make_run(configs[norm].replace(seed=seed), (accuracy,)) for seed, accuracy in by_seed.items()]
        for norm, by_seed in accuracies.items()
    }
    assert summary(results)["gain"] == "20.0 ± 0.0"


def test_missing_middle_seed_is_refused(make_run):
    configs = runs("small")
    seeds = {"batch": (0, 1, 2), "none": (0, 2)}
    results = {norm: [make_run(configs[norm].replace(seed=seed)) for seed in seeds[norm]] for norm in configs}
    with pytest.raises(ValueError, match=r"seeds=\[0, 1, 2\] beside \[0, 2\]; pairs need the same seeds"):
        summary(results)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_setup_of_small_names_all_that_differs_from_full(norm):
    small, full = (vars(runs(preset)[norm]) for preset in ("small", "full"))
    assert small["norm"] == full["norm"] == norm
    for name in vars(Config()):
        assert (f"`{name}` {small[name]} instead of" in SETUP["small"]) == (small[name] != full[name])
