"""The conclusions of the study placement, on made-up runs."""

import pytest

from experiments.studies.placement import plot, runs, summary, table

BETTER_AFTER = {"before-learned": 0.4, "before-fixed": 0.4, "after-learned": 0.5, "after-fixed": 0.5}


@pytest.fixture
def made_up(make_run):
    """Returns a function of the final accuracies of some arms that gives results over seeds."""

    def make(seeds=2, **changes):
        accuracies = BETTER_AFTER | {label.replace("_", "-"): accuracy for label, accuracy in changes.items()}
        return {
            label: [
                make_run(config.replace(seed=seed), (0.7, accuracies[label] + 0.01 * seed)) for seed in range(seeds)
            ]
            for label, config in runs("small").items()
        }

    return make


@pytest.mark.parametrize(
    ("changes", "verdict", "claims"),
    [
        ({}, "holds", ""),
        ({"before_fixed": 0.409, "after_fixed": 0.491}, "holds", ""),
        ({"after_learned": 0.4, "after_fixed": 0.4}, "partly", "(2) and (3) hold, (1) is not shown"),
        ({"before_fixed": 0.42}, "partly", "(1) and (3) hold, (2) is not shown"),
        ({"after_fixed": 0.48}, "partly", "(1) and (2) hold, (3) is not shown"),
        ({"before_fixed": 0.5, "after_learned": 0.3, "after_fixed": 0.4}, "fails", ""),
    ],
)
def test_claims_are_better_after_the_activation_and_little_change_by_fixing(made_up, changes, verdict, claims):
    fields = summary(made_up(**changes))
    assert (fields["verdict"], fields["claims"]) == (verdict, claims)


def test_large_spread_does_not_speak_for_little_change(made_up):
    results = made_up()
    for run, change in zip(results["before-fixed"], (0.05, -0.05), strict=True):
        run["rows"][-1]["test_accuracy"] += change
    assert summary(results)["claims"] == "(1) and (3) hold, (2) is not shown"


def test_single_seed_gives_no_verdict_and_no_spread(made_up):
    fields = summary(made_up(seeds=1))
    assert fields["verdict"] == "unknown"
    assert not any("nan" in text or "±" in text for text in fields.values())


def test_accuracies_and_differences_are_those_at_the_end(made_up):
    fields = summary(made_up(before_fixed=0.35))
    assert (fields["before_learned"], fields["after_learned"]) == ("40.5 ± 0.7", "50.5 ± 0.7")
    quoted = [fields[name] for name in ("after", "fixed_before", "fixed_after")]
    assert quoted == ["10.0 ± 0.0 points more", "5.0 ± 0.0 points less", "0.0 ± 0.0 points more"]


def test_table_has_a_line_for_each_place(made_up):
    before, after = table(made_up(after_fixed=0.52), "small")
    assert after["fixed - learned, points"] == "2.0 ± 0.0"
    assert (before["after - before, both learned, points"], after["after - before, both learned, points"]) == (
        "",
        "10.0 ± 0.0",
    )


def test_figure_shows_the_accuracy_of_every_arm_and_three_differences(made_up):
    courses, finals, differences = plot(made_up()).axes
    assert [len(axes.get_xticklabels()) for axes in (finals, differences)] == [4, 3]
    assert {text.get_text() for text in courses.texts} == {"before", "before, fixed", "after", "after, fixed"}
