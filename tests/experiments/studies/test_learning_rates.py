"""The conclusions of the study learning_rates, on made-up runs."""

import pytest

from experiments.studies.learning_rates import RATES, plot, runs, summary, table

WORKING = 0.5
CHANCE = 0.1


@pytest.fixture
def made_up(make_run):
    """Returns a function of the rates that work, by arm, that gives results over seeds."""

    def make(batch, none, seeds=2, diverged=()):
        works = {"batch": batch, "none": none}
        return {
            label: [
                make_run(
                    config.replace(seed=seed),
                    [CHANCE, (WORKING if config.learning_rate in works[config.norm] else CHANCE) + 0.01 * seed, CHANCE],
                    diverged=label in diverged,
                )
                for seed in range(seeds)
            ]
            for label, config in runs("small").items()
        }

    return make


@pytest.mark.parametrize(
    ("batch", "none", "verdict"),
    [
        ((1e-3, 0.01, 0.1), (0.01,), "holds"),
        ((0.01, 0.1), (0.01,), "partly"),
        ((1e-3, 0.01), (0.01,), "partly"),
        ((0.01,), (0.01,), "fails"),
        ((0.01,), (1e-3, 0.1), "fails"),
        ((1e-3,), (), "holds"),
        ((), (0.01,), "fails"),
        ((), (), "fails"),
    ],
)
def test_claim_is_that_larger_and_smaller_rates_work(made_up, batch, none, verdict):
    assert summary(made_up(batch, none))["verdict"] == verdict


def test_single_seed_gives_no_verdict_and_no_spread(made_up):
    fields = summary(made_up((1e-3, 0.1), (0.01,), seeds=1))
    assert fields["verdict"] == "unknown"
    assert not any("nan" in text or "±" in text for text in fields.values())


def test_rate_works_by_the_best_accuracy_of_all_epochs_and_not_the_last(made_up):
    assert summary(made_up((0.01,), ()))["batch_range"] == "1 of 7 works (0.01)"


@pytest.mark.parametrize(("accuracies", "text"), [((0.5, 0.19), "none of them works"), ((0.5, 0.2), "7 of 7 work")])
def test_rate_works_only_where_it_does_with_every_seed(make_run, accuracies, text):
    results = {
        label: [make_run(config.replace(seed=seed), [accuracy]) for seed, accuracy in enumerate(accuracies)]
        for label, config in runs("small").items()
    }
    assert summary(results)["batch_range"].startswith(text)


@pytest.mark.parametrize(
    ("batch", "claims"),
    [((0.01, 0.1), "(1) holds, (2) is not shown"), ((1e-3, 0.01), "(2) holds, (1) is not shown")],
)
def test_claims_are_larger_and_smaller_in_this_order(made_up, batch, claims):
    assert summary(made_up(batch, (0.01,)))["claims"] == claims


@pytest.mark.parametrize(
    ("batch", "none", "text"),
    [
        (
            (1e-3, 0.01, 1.0),
            (0.01,),
            "With batch norm, the largest rate that works is 100 times larger, and the smallest 10 times smaller",
        ),
        (
            (0.01,),
            (0.01, 0.1),
            "With batch norm, the largest rate that works is 10 times smaller, and the smallest the same",
        ),
        ((0.01,), (), "There are thus no largest and no smallest rates to compare"),
    ],
)
def test_extremes_are_compared_in_words(made_up, batch, none, text):
    assert summary(made_up(batch, none))["extremes"] == text


def test_best_rate_of_each_arm_is_quoted_with_its_accuracy(made_up):
    fields = summary(made_up((0.1,), (0.01,)))
    assert (fields["batch_best"], fields["none_best"]) == ("50.5 ± 0.7 % at 0.1", "50.5 ± 0.7 % at 0.01")


def test_table_has_a_line_for_each_rate_with_the_published_numbers_next_to_ours(made_up):
    lines = table(made_up((0.1,), (0.01,)), "small")
    assert [line["learning rate"] for line in lines] == [f"{rate:g}" for rate in RATES]
    line = lines[RATES.index(0.1)]
    assert line["best accuracy, batch norm, %"] == "50.5 ± 0.7" and line["difference, points"] == "40.0 ± 0.0"
    assert line["published (full protocol), batch norm, %"] == "~92"


def test_published_protocol_is_named_only_where_ours_is_another(made_up):
    assert table(made_up((0.1,), (0.01,)), "full")[0]["published, no norm, %"] == "~10"


def test_diverged_runs_are_counted_for_each_arm(made_up):
    lines = table(made_up((0.1,), (0.01,), diverged=("none-10",)), "small")
    assert [line["diverged runs, batch norm + no norm"] for line in lines] == ["0 + 0"] * 6 + ["0 + 2"]


def test_figure_shows_ours_and_the_published_accuracies_by_rate(made_up):
    by_rate, courses = plot(made_up((0.1,), (0.01,))).axes
    names = {text.get_text() for text in by_rate.texts}
    assert names == {"batch norm", "batch norm, published", "no norm", "no norm, published"}
    assert len(courses.texts) == 4
