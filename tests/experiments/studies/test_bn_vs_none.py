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


@pytest.mark.parametrize(
    ("batch", "none", "claims"),
    [
        ((0.1, 0.6), (0.3, 0.2), "(1) holds, (2) is not shown"),  # better, and slower
        ((0.3, 0.1), (0.1, 0.2), "(2) holds, (1) is not shown"),  # faster, and worse in the end
    ],
)
def test_one_of_the_two_shows_the_claim_in_part(made_up, batch, none, claims):
    fields = summary(made_up(batch, none))
    assert (fields["verdict"], fields["claims"]) == ("partly", claims)


def test_worse_and_never_as_good_does_not_show_the_claim(made_up):
    assert summary(made_up((0.1, 0.1), (0.1, 0.2)))["verdict"] == "fails"


def test_time_that_varies_over_seeds_is_not_called_shorter(made_up):
    results = made_up((0.3, 0.6), (0.2, 0.2))
    for run, seconds in zip(results["batch"], (1.8, 0.2), strict=True):
        run["rows"][0]["seconds"] = seconds
    assert summary(results)["claims"] == "(1) holds, (2) is not shown"


@pytest.mark.parametrize(
    ("batch", "text"), [((0.3, 0.6), "40.0 ± 0.0 points more"), ((0.3, 0.1), "10.0 ± 0.0 points less")]
)
def test_difference_is_quoted_with_its_spread_in_words_that_fit(made_up, batch, text):
    assert summary(made_up(batch, (0.1, 0.2)))["gain"] == text


def test_epochs_and_time_to_the_other_net_s_best_are_quoted(made_up):
    passes = summary(made_up((0.3, 0.6), (0.1, 0.2)))["passes"]
    assert "after 1.0 ± 0.0 of 6 epochs, at a resolution of one epoch, in 50.0 ± 0.0 % of the time" in passes


def test_accuracy_never_reached_is_said(made_up):
    assert "does not reach the best accuracy" in summary(made_up((0.1, 0.1), (0.1, 0.2)))["passes"]


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
    assert summary(results)["gain"] == "20.0 ± 0.0 points more"


def test_missing_middle_seed_is_refused(make_run):
    configs = runs("small")
    seeds = {"batch": (0, 1, 2), "none": (0, 2)}
    results = {norm: [make_run(configs[norm].replace(seed=seed)) for seed in seeds[norm]] for norm in configs}
    with pytest.raises(ValueError, match=r"the same seeds, got \[0, 1, 2\] and \[0, 2\]"):
        summary(results)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_setup_of_small_names_all_that_differs_from_full(norm):
    small, full = (vars(runs(preset)[norm]) for preset in ("small", "full"))
    assert small["norm"] == full["norm"] == norm
    for name in vars(Config()):
        assert (f"`{name}` {small[name]} instead of" in SETUP["small"]) == (small[name] != full[name])
