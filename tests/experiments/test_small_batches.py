"""The conclusions of the study small_batches, on made-up runs."""

import pytest

from experiments.studies import small_batches
from experiments.studies.small_batches import ARMS, SIZES, plot, runs, summary, table


@pytest.fixture
def made_up(make_run):
    """Returns a function of the final accuracies that differ from 50 % that gives results with two seeds."""

    def make(seeds=(0, 1), **accuracies):
        return {
            label: [
                make_run(config.replace(seed=seed), (accuracies.get(label.replace("-", "_"), 0.5) + 0.01 * seed,))
                for seed in seeds
            ]
            for label, config in runs("small").items()
        }

    return make


AS_CLAIMED = {"batch_2": 0.3, "ghost_2": 0.3}


def test_all_four_differences_show_the_claim(made_up):
    fields = summary(made_up(**AS_CLAIMED))
    assert fields["verdict"] == "holds"
    assert [fields[name] for name in ("lost", "sync", "group", "renorm")] == ["20.0 ± 0.0"] * 4


def test_no_difference_does_not_show_the_claim(made_up):
    assert summary(made_up())["verdict"] == "fails"


@pytest.mark.parametrize("other", [{"ghost_2": 0.5}, {"group_2": 0.3}, {"renorm_2": 0.3}], ids=str)
def test_a_remedy_that_does_not_help_leaves_the_claim_in_part(made_up, other):
    assert summary(made_up(**AS_CLAIMED | other))["verdict"] == "partly"


def test_single_seed_gives_no_verdict(made_up):
    assert summary(made_up(seeds=(0,), **AS_CLAIMED))["verdict"] == "unknown"


def test_table_has_a_line_for_each_norm_with_what_it_loses(made_up):
    lines = table(made_up(**AS_CLAIMED), "small")
    assert [line["32 less 2, points"][:4] for line in lines] == ["20.0", "0.0 ", "0.0 ", "20.0", "0.0 "]


def test_figure_shows_the_differences_that_the_claims_are_about(made_up):
    bars = plot(made_up(**AS_CLAIMED)).axes[1].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([20] * 4)


@pytest.mark.parametrize("preset", ["small", "full"])
def test_steps_of_all_sizes_fill_an_epoch_and_groups_fill_the_steps(preset):
    for label, config in runs(preset).items():
        images = int(label.rpartition("-")[2])
        assert config.train_images % config.batch_size == 0
        assert config.batch_size == images * (small_batches.DEVICES if label.startswith(("ghost", "sync")) else 1)
        assert config.group_size == (images if config.norm == "ghost" else None)


@pytest.mark.parametrize("preset", ["small", "full"])
def test_rates_and_memories_are_the_same_for_each_image(preset):
    configs = [config for config in runs(preset).values() if config.norm != "group"]
    assert {round(c.learning_rate / c.batch_size, 9) for c in configs} == {round(small_batches.RATE, 9)}
    assert {round(c.batch_size / (1 - c.momentum)) for c in configs} == {configs[0].train_images // 2}


def test_every_arm_has_every_size():
    assert len(runs("small")) == len(ARMS) * len(SIZES) == 30
