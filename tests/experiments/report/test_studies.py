"""The report: what is committed is what the committed results give."""

import types

import pytest
from PIL import Image

from experiments.__main__ import FIGURES, README, RESULTS
from experiments.config import PRESETS
from experiments.evidence import files
from experiments.report import studies
from experiments.studies import protocol
from tests.experiments.conftest import write_study

PROJECT = README.parents[1] / "README.md"


@pytest.fixture(scope="module")
def committed():
    """The report on the committed results."""
    return studies.readme(RESULTS)


def test_committed_readme_is_the_one_the_results_give(committed):
    hint = "run `python -m experiments table` and commit the file"
    assert README.is_file() and README.read_text(encoding="utf-8") == committed, hint


@pytest.mark.parametrize("name", protocol.names())
def test_readme_of_the_project_says_what_the_results_say(name):
    module = protocol.load(name)
    question = f"[{studies.text(module, RESULTS, 'Question')}](experiments/README.md#{name})"
    assert f"| {question} | {studies.claim(module, 'small', RESULTS)} |" in PROJECT.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", protocol.names())
def test_agreement_was_written_for_the_committed_results(name, committed):
    module = protocol.load(name)
    said = studies.agreement(module, module.summary(protocol.collect(module, studies.COMPARED, RESULTS)))
    assert said, "the verdict has changed: rewrite the Agreement of the study"
    assert f"Compared with the published results: {said}" in committed


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"verdict": "partly", "claims": "(1) holds, (2) is not shown"}, True),
        ({"verdict": "partly", "claims": "(2) holds, (1) is not shown"}, False),
        ({"verdict": "holds", "claims": ""}, False),
        ({"verdict": "unknown", "claims": ""}, False),
    ],
)
def test_agreement_is_left_out_where_it_was_written_for_other_results(fields, shown):
    module = types.ModuleType("toy")
    said = "Agrees in part ((1) holds, (2) is not shown): as far as it goes."
    module.__doc__ = "What? " + " ".join(f"{section}: {said}" for section in protocol.SECTIONS)
    assert studies.agreement(module, fields) == (said if shown else None)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", protocol.names())
def test_committed_figure_was_drawn_from_the_committed_results(name, preset):
    found = protocol.collect(protocol.load(name), preset, RESULTS)
    if found is None:
        pytest.skip(f"{name} with preset {preset} has not all its results yet")
    text = Image.open(FIGURES / f"{name}-{preset}.png").text
    assert text["Description"] == f"results {files.digest(found)}", "run `python -m experiments plot`"


def test_study_without_results_says_so(tmp_path):
    module = protocol.load("bn_vs_none")
    assert studies.state(module, tmp_path) == "small: not run yet; full: not run yet"
    assert "Not run yet." in studies.readme(tmp_path)


def write_all(module, preset, folder, make_run, seeds=3):
    """Writes made-up results of a study, all that it takes."""
    results = {
        label: [make_run(config.with_seed(seed)) for seed in range(seeds)]
        for label, config in module.runs(preset).items()
    }
    write_study(folder, protocol.short_name(module), preset, results)


def test_study_with_some_of_its_results_is_unfinished(tmp_path, make_run):
    module = protocol.load("bn_vs_none")
    run = make_run(module.runs("small")["batch"])
    files.save(files.place_in_study(tmp_path, "bn_vs_none", "small", "batch", 0), run["header"], run["rows"])
    assert studies.state(module, tmp_path) == "small: 1 run, unfinished; full: not run yet"


def test_study_with_too_few_seeds_is_unfinished(tmp_path, make_run):
    module = protocol.load("bn_vs_none")
    write_all(module, "small", tmp_path, make_run, seeds=2)
    assert studies.state(module, tmp_path) == "small: 4 runs, unfinished; full: not run yet"
    assert "4 runs, unfinished." in studies.readme(tmp_path)


def test_single_seed_is_reported_without_spread_and_without_a_verdict(tmp_path, make_run):
    write_all(protocol.load("bn_vs_none"), "full", tmp_path, make_run, seeds=1)
    chapter = studies.readme(tmp_path).partition("### bn_vs_none, full")[2]
    assert "40.0 (1 seed) % test accuracy" in chapter and "neither shows nor refutes" in chapter
    assert "±" not in chapter and "nan" not in chapter


def test_report_names_images_hardware_versions_and_commit(tmp_path, make_run):
    module = protocol.load("bn_vs_none")
    write_all(module, "full", tmp_path, make_run, seeds=1)
    assert (
        "Images: made up. Measured on 2 cores of Z80, with python 3.11, jax 0.10, at commit c0ffee."
        in studies.readme(tmp_path)
    )


def test_result_that_does_not_name_its_images_is_not_taken_for_the_official_files(make_run):
    run = make_run(PRESETS["full"])
    del run["header"]["images"]
    origin = studies._origin({"batch": [run]})
    assert "images of unknown origin" in origin and "official" not in origin


def test_published_numbers_stand_next_to_ours_under_the_published_protocol_only(make_run):
    module = protocol.load("bn_vs_none")
    for preset in PRESETS:
        found = {label: [make_run(config)] for label, config in module.runs(preset).items()}
        assert ("published best, %" in module.table(found, preset)[0]) == (preset == "full")


def test_report_links_to_the_figures_that_plot_writes(tmp_path, make_run):
    module = protocol.load("bn_vs_none")
    write_all(module, "small", tmp_path, make_run)
    (figure,) = studies.figures(module, tmp_path, tmp_path)
    assert f"({FIGURES.name}/{figure.name})" in studies.readme(tmp_path)


@pytest.mark.parametrize(
    ("accuracies", "said"), [(((0.5, 0.6), (0.1, 0.2)), "holds"), (((0.1, 0.2), (0.5, 0.6)), "not shown")]
)
def test_overview_says_whether_a_claim_held(tmp_path, make_run, accuracies, said):
    module = protocol.load("bn_vs_none")
    for (label, config), accuracy in zip(module.runs("small").items(), accuracies, strict=True):
        for seed in range(3):
            run = make_run(config.with_seed(seed), accuracy)
            files.save(files.place_in_study(tmp_path, "bn_vs_none", "small", label, seed), run["header"], run["rows"])
    (line,) = [line for line in studies.readme(tmp_path).splitlines() if line.startswith("| [bn_vs_none](#bn_vs_none)")]
    assert line.endswith(f"| {said} | no results yet |")


def test_published_numbers_are_told(tmp_path):
    assert "Published: On CIFAR-10 at 32x32" in studies.readme(tmp_path)
