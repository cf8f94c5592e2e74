"""The conclusions of the study bn_vs_none, on made-up runs."""

import pytest

from experiments.studies.bn_vs_none import runs, summary


@pytest.fixture
def made_up(make_run):
    """Returns a function of the arms' accuracies by epoch that gives results with two seeds."""

    def make(batch, none):
        configs = runs("small")
        by_norm = {"batch": batch, "none": none}
        return {
            norm: [make_run(configs[norm], [a + 0.01 * seed for a in by_norm[norm]]) for seed in (0, 1)]
            for norm in configs
        }

    return make


def test_better_and_faster_shows_the_claim(made_up):
    assert summary(made_up((0.3, 0.6), (0.1, 0.2)))["verdict"] == "The claim holds here"


def test_worse_does_not_show_the_claim(made_up):
    assert summary(made_up((0.3, 0.1), (0.1, 0.2)))["verdict"] == "This does not show the claim"


def test_better_but_slower_does_not_show_the_claim(made_up):
    assert summary(made_up((0.1, 0.6), (0.3, 0.2)))["verdict"] == "This does not show the claim"


def test_difference_is_quoted_with_its_spread(made_up):
    assert summary(made_up((0.3, 0.6), (0.1, 0.2)))["gain"] == "40.0 ± 0.0"


def test_epochs_and_time_to_the_other_net_s_best_are_quoted(made_up):
    passes = summary(made_up((0.3, 0.6), (0.1, 0.2)))["passes"]
    assert "after 1.0 ± 0.0 of 6 epochs, in 50.0 ± 0.0 % of the time" in passes


def test_accuracy_never_reached_is_said(made_up):
    assert "Not with every seed" in summary(made_up((0.1, 0.1), (0.1, 0.2)))["passes"]
