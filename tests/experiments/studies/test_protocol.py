"""Studies: every one is complete and says what it must; running one trains what is missing and nothing else."""

import types

import pytest

from experiments.config import PRESETS, Config
from experiments.evidence import files, provenance
from experiments.report import studies
from experiments.studies import protocol
from experiments.training import loop, runs
from tests.experiments.conftest import write_study

STUDIES = [protocol.load(name) for name in protocol.names()]
every_study = pytest.mark.parametrize("module", STUDIES, ids=protocol.short_name)
# Those that measure nothing besides the rows; made-up runs of the others are in their own tests.
of_rows = pytest.mark.parametrize("module", [m for m in STUDIES if not hasattr(m, "fit")], ids=protocol.short_name)


@pytest.fixture
def toy(tiny):
    """A study of two arms on `blobs`."""
    module = types.ModuleType(
        "experiments.studies.toy",
        "What? Command: c. Time: {time} Published: p. Finding: {f}. Agreement: Agrees. Refuted if: r.",
    )
    module.runs = lambda preset: {label: tiny.replace(norm=label) for label in ("batch", "none")}
    return module


@pytest.fixture
def trained(monkeypatch, make_run):
    """Replaces training by made-up results; the list of configs trained."""
    configs = []

    def train_to_file(config, place, **_):
        configs.append(config)
        run = make_run(config)
        files.save(place, run["header"], run["rows"])

    monkeypatch.setattr(runs, "train_to_file", train_to_file)
    monkeypatch.setattr(protocol.programs, "release", lambda: None)  # nothing was compiled, but by other tests
    return configs


def run_toy(toy, folder, seeds=3, preset="small"):
    protocol.train_study(toy, preset=preset, seeds=seeds, data_dir=None, folder=folder)


@every_study
def test_docstring_holds_question_command_time_finding_and_refutation(module):
    parts = protocol.sections(module)
    assert parts["Question"].endswith("?")
    assert f"python -m experiments run {protocol.short_name(module)}" in parts["Command"]


@every_study
@pytest.mark.parametrize("preset", PRESETS)
def test_runs_are_configs_whose_labels_name_files(module, preset, tmp_path):
    runs = module.runs(preset)
    assert runs and all(isinstance(config, Config) and config.seed == 0 for config in runs.values())
    for label in runs:
        files.place_in_study(tmp_path, protocol.short_name(module), preset, label, 0)


@of_rows
@pytest.mark.parametrize(("preset", "seeds"), [("small", 3), ("full", 1)])
def test_finding_table_and_figure_come_from_results_alone(module, preset, seeds, tmp_path, make_run, monkeypatch):
    monkeypatch.setattr(protocol, "names", lambda: [protocol.short_name(module)])  # the page of this study alone
    results = {
        label: [make_run(config.with_seed(seed), accuracies=(0.1 + 0.01 * seed, 0.5)) for seed in range(seeds)]
        for label, config in module.runs(preset).items()
    }
    write_study(tmp_path, protocol.short_name(module), preset, results)
    assert "{" not in studies.readme(tmp_path)
    assert len(studies.figures(module, tmp_path, tmp_path)) == 1


@of_rows
def test_diverged_runs_are_reported_too(module, make_run):
    results = {
        label: [make_run(config, accuracies=(0.1,), diverged=True)] for label, config in module.runs("small").items()
    }
    assert module.table(results, "small") and module.summary(results) and module.plot(results)


def test_unknown_study_is_refused_with_the_names_of_all():
    with pytest.raises(
        ValueError, match="study must be one of .*bn_vs_none.*, got 'bn_vs_nome'; did you mean 'bn_vs_none'"
    ):
        protocol.load("bn_vs_nome")


def test_docstring_without_a_section_is_refused():
    module = types.ModuleType("toy", "What? Command: c. Published: p. Finding: f. Agreement: a. Refuted if: r.")
    with pytest.raises(ValueError, match="study toy has no Time"):
        protocol.sections(module)


def test_all_stands_for_every_study():
    assert protocol.select("all") == STUDIES


def test_every_arm_is_trained_with_every_seed_arms_side_by_side(toy, trained, tmp_path):
    run_toy(toy, tmp_path, seeds=2)
    assert [(c.norm, c.seed) for c in trained] == [("batch", 0), ("none", 0), ("batch", 1), ("none", 1)]


def test_finished_runs_are_not_repeated(toy, trained, tmp_path):
    run_toy(toy, tmp_path, seeds=1)
    run_toy(toy, tmp_path, seeds=2)
    assert [config.seed for config in trained] == [0, 0, 1, 1]


def test_stale_result_is_refused_before_any_training(toy, trained, tmp_path, make_run, tiny):
    stale = make_run(tiny.replace(norm="none", seed=1, epochs=99))
    files.save(files.place_in_study(tmp_path, "toy", "small", "none", 1), stale["header"], stale["rows"])
    with pytest.raises(ValueError, match="epochs was 99 and is now 2"):
        run_toy(toy, tmp_path)
    assert trained == []


def test_unknown_preset_is_refused(toy, tmp_path):
    with pytest.raises(ValueError, match="preset must be one of small, full, got 'huge'"):
        run_toy(toy, tmp_path, preset="huge")


def test_no_seeds_are_refused(toy, tmp_path):
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        run_toy(toy, tmp_path, seeds=0)


@pytest.mark.parametrize("seeds", [range(4), range(1), range(1, 2), range(3, 4)], ids="missing {}".format)
def test_results_count_only_when_every_arm_has_the_same_seeds(toy, trained, tmp_path, seeds):
    run_toy(toy, tmp_path, seeds=4)
    assert protocol.collect(toy, "small", tmp_path)
    results = files.read_study(tmp_path, "toy", "small")
    results["none"] = [run for seed, run in enumerate(results["none"]) if seed not in seeds]
    write_study(tmp_path, "toy", "small", results)
    assert protocol.collect(toy, "small", tmp_path) is None


@pytest.mark.parametrize(("preset", "seeds"), protocol.MIN_SEEDS.items())
def test_results_count_only_from_the_smallest_number_of_seeds(toy, trained, tmp_path, preset, seeds):
    for n in range(1, seeds + 1):
        assert protocol.collect(toy, preset, tmp_path) is None
        run_toy(toy, tmp_path, seeds=n, preset=preset)
    assert protocol.collect(toy, preset, tmp_path)


def test_every_preset_has_its_smallest_number_of_seeds():
    assert protocol.MIN_SEEDS.keys() == PRESETS.keys()


def test_results_come_in_the_order_of_the_arms(toy, trained, tmp_path):
    run_toy(toy, tmp_path)
    assert list(protocol.collect(toy, "small", tmp_path)) == ["batch", "none"]


def test_results_of_another_config_are_not_reported(toy, trained, tmp_path, tiny):
    run_toy(toy, tmp_path)
    toy.runs = lambda preset: {"batch": tiny.replace(epochs=3), "none": tiny.replace(norm="none")}
    with pytest.raises(ValueError, match="epochs was 2 and is now 3"):
        protocol.collect(toy, "small", tmp_path)


def test_result_named_after_another_arm_is_not_reported(toy, trained, tmp_path):
    run_toy(toy, tmp_path)
    run = files.read_study(tmp_path, "toy", "small")["none"][1]
    files.save(files.place_in_study(tmp_path, "toy", "small", "batch", 1), run["header"], run["rows"])
    with pytest.raises(ValueError, match=r"batch-seed1 in .* is the result of another run: norm was 'none'"):
        protocol.collect(toy, "small", tmp_path)


def test_commit_is_looked_up_before_the_first_run(toy, trained, tmp_path, monkeypatch):
    trained_by_then = []
    monkeypatch.setattr(provenance, "commit", lambda: trained_by_then.append(len(trained)))
    run_toy(toy, tmp_path)
    assert trained_by_then[0] == 0 and len(trained) == 6


@pytest.mark.slow
def test_net_that_runs_start_from_is_trained_once_and_is_a_result_too(tmp_path, tiny, blobs, monkeypatch):
    monkeypatch.setattr(runs, "_load", lambda *_: blobs)
    runs._pretrained.cache_clear()
    trained_configs, fit = [], loop.fit
    monkeypatch.setattr(loop, "fit", lambda config, *a, **k: (trained_configs.append(config), fit(config, *a, **k))[1])
    module = types.ModuleType("experiments.studies.tuned", "What? Command: c. Time: {time}")
    module.runs = lambda preset: {
        tuning: tiny.replace(start=tiny, tuning=tuning, epochs=1) for tuning in ("frozen", "affine")
    }
    module.fit = lambda config, dataset, **options: loop.fit(config, dataset, **options)
    run_toy(module, tmp_path, seeds=1)
    assert [config.start for config in trained_configs] == [None, tiny, tiny]
    assert [path.name for path in sorted((tmp_path / "tuned").iterdir())] == ["small.jsonl", "small.lock"]
    stored = files.read_study(tmp_path, "tuned", "small")
    affine, frozen, start = sorted(stored)
    assert (affine, frozen) == ("affine", "frozen") and start.startswith(runs.START)
    assert len(stored[start][0]["rows"]) == 2 and stored[start][0]["header"]["seconds"] > 0
