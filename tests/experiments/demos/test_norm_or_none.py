"""The demo: it runs offline from start to end, and names its data."""

import pytest
from PIL import Image

from experiments.data.cifar10 import cache_folder, find_cifar10
from experiments.demos import norm_or_none
from experiments.training import small_run


@pytest.fixture
def no_cifar10(monkeypatch, tmp_path):
    """An environment without CIFAR-10."""
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def arms():
    return norm_or_none.configs("digits")


@pytest.fixture
def runs(arms, make_run):
    """Made-up results: batch norm reaches the target in its second row, no norm never."""
    return {
        name: make_run(config, accuracies=(0.3, 0.95) if config.norm == "batch" else (0.1, 0.2))
        for name, config in arms.items()
    }


def cells(table):
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_without_cifar10_it_learns_digits_and_says_why(no_cifar10):
    if cache_folder().is_dir():
        pytest.skip("CIFAR-10 is in this user's cache")
    dataset, why = small_run.choose_data(None)
    assert dataset.name == "digits" and "CIFAR-10 was not found" in why


def test_with_cifar10_it_learns_that_and_says_so():
    if find_cifar10() is None:
        pytest.skip("CIFAR-10 was not found; set CIFAR10_DIR")
    dataset, why = small_run.choose_data(None)
    assert dataset.name == "cifar10" and "16x16" in why


@pytest.mark.parametrize("name", small_run.CONFIGS)
def test_arms_are_two_norms_at_three_learning_rates(name):
    arms = norm_or_none.configs(name).values()
    assert len({(config.norm, config.learning_rate) for config in arms}) == 6
    assert len({config.replace(norm="none", learning_rate=1.0) for config in arms}) == 1


def test_table_counts_steps_to_the_target_or_says_never(arms, runs):
    lines = cells(norm_or_none.table(arms, runs, target=90))
    assert lines[0] == ("batch norm", "0.01", "95.0 %", "20", "4.0 s")
    assert lines[-1] == ("no norm", "1", "20.0 %", "never", "4.0 s")


def test_table_says_which_run_diverged(arms, make_run):
    runs = {name: make_run(config, diverged=True) for name, config in arms.items()}
    assert all("(diverged)" in line[2] for line in cells(norm_or_none.table(arms, runs, target=90)))


def test_figure_has_a_line_for_each_arm(arms, runs):
    assert {text.get_text() for text in norm_or_none.plot(arms, runs).axes[0].texts} == set(arms)


@pytest.mark.slow
def test_demo_runs_from_start_to_end(no_cifar10, monkeypatch, tmp_path, capsys, tiny, blobs):
    monkeypatch.setattr(small_run, "choose_data", lambda _: (blobs._replace(name="digits"), "Made up."))
    monkeypatch.setitem(small_run.CONFIGS, "digits", tiny)
    norm_or_none.run(data_dir=None, out=tmp_path / "out")
    printed = capsys.readouterr().out
    assert "Figure: " in printed and "made up for tests. Made up." in printed
    assert Image.open(tmp_path / "out" / "accuracy.png").size > (300, 300)
