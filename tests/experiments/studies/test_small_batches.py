"""The conclusions of the study small_batches, on made-up runs; and what the guide says of the committed ones."""

import pytest

from experiments.__main__ import PROJECT, RESULTS
from experiments.evidence import files
from experiments.evidence.verdicts import gains
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


def test_all_three_differences_show_the_claim(made_up):
    fields = summary(made_up(**AS_CLAIMED))
    assert fields["verdict"] == "holds"
    assert (fields["batch_change"], fields["beyond"]) == ("20.0 ± 0.0 points lower", "20.0 ± 0.0 points more")
    assert (fields["sync"], fields["renorm"]) == ("20.0 ± 0.0 points higher",) * 2


def test_no_difference_does_not_show_the_claim(made_up):
    assert summary(made_up())["verdict"] == "fails"


@pytest.mark.parametrize(
    ("other", "missing"), [({"group_2": 0.3}, "(1)"), ({"ghost_2": 0.5}, "(2)"), ({"renorm_2": 0.3}, "(3)")], ids=str
)
def test_a_difference_that_is_not_found_leaves_the_claim_in_part(made_up, other, missing):
    fields = summary(made_up(**AS_CLAIMED | other))
    assert fields["verdict"] == "partly" and fields["claims"].endswith(f"{missing} is not shown")


def test_differences_the_other_way_are_told_as_such(made_up):
    fields = summary(made_up(batch_2=0.6, ghost_2=0.6))
    assert (fields["batch_change"], fields["beyond"]) == ("10.0 ± 0.0 points higher", "10.0 ± 0.0 points less")
    assert (fields["sync"], fields["renorm"]) == ("10.0 ± 0.0 points lower",) * 2


def test_single_seed_gives_no_verdict_and_no_spread(made_up):
    fields = summary(made_up(seeds=(0,), **AS_CLAIMED))
    assert fields["verdict"] == "unknown"
    assert not any("±" in text or "nan" in text for text in fields.values())


def test_table_has_a_line_for_each_norm_with_what_it_loses(made_up):
    lines = table(made_up(**AS_CLAIMED), "small")
    assert [line["loss from 32 to 2, points"][:4] for line in lines] == ["20.0", "0.0 ", "0.0 ", "20.0", "0.0 "]


def test_figure_shows_the_differences_that_the_claims_are_about(made_up):
    bars = plot(made_up(**AS_CLAIMED)).axes[1].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([20] * 3)


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
    memories = {round(c.batch_size / (1 - c.momentum)) for c in configs if c.norm != "renorm"}
    assert memories == {configs[0].train_images // 2}


@pytest.mark.parametrize("preset", ["small", "full"])
def test_batch_renorm_has_the_published_momentum(preset):
    assert {config.momentum for config in runs(preset).values() if config.norm == "renorm"} == {0.99}


def test_every_arm_has_every_size():
    assert len(runs("small")) == len(ARMS) * len(SIZES) == 30


@pytest.fixture(scope="module")
def committed():
    return files.read_study(RESULTS, "small_batches", "small")


@pytest.mark.parametrize("field", ["sync", "renorm", "batch_change"])
def test_guide_quotes_the_committed_results(committed, field):
    guide = " ".join((PROJECT / "docs" / "small_batches.md").read_text(encoding="utf-8").split())
    assert guide.count(summary(committed)[field]) == 1


def test_sizes_at_which_the_guide_says_who_is_behind_are_those_of_the_committed_results(committed):
    for arm in ("renorm", "group"):
        behind = [size for size in SIZES if gains(committed, f"{arm}-{size}", f"batch-{size}").mean() < 0]
        assert behind == [size for size in SIZES if size >= 4], arm
    assert gains(committed, "group-2", "group-32").mean() > 0
