"""The report: what is committed is what the committed results give."""

import pytest
from PIL import Image

from experiments import report, results, study
from experiments.__main__ import FIGURES, README, RESULTS
from experiments.config import PRESETS

DONE = [
    pytest.param(name, preset, id=f"{name}-{preset}")
    for name in study.names()
    for preset in PRESETS
    if study.collect(study.load(name), preset, RESULTS)
]


def test_committed_readme_is_the_one_the_results_give():
    hint = "run `python -m experiments table` and commit the file"
    assert README.is_file() and README.read_text(encoding="utf-8") == report.readme(RESULTS), hint


@pytest.mark.parametrize(("name", "preset"), DONE)
def test_committed_figure_was_drawn_from_the_committed_results(name, preset):
    found = study.collect(study.load(name), preset, RESULTS)
    text = Image.open(FIGURES / f"{name}-{preset}.png").text
    assert text["Description"] == f"results {results.digest(found)}", "run `python -m experiments plot`"


def test_study_without_results_says_so(tmp_path):
    module = study.load("bn_vs_none")
    assert report.state(module, tmp_path) == "small: not run yet; full: not run yet"
    assert "Not run yet." in report.readme(tmp_path)


def test_study_with_some_of_its_results_is_unfinished(tmp_path, make_run):
    module = study.load("bn_vs_none")
    run = make_run(module.runs("small")["batch"])
    results.write(results.run_path(tmp_path, "bn_vs_none", "small", "batch", 0), run["header"], run["rows"])
    assert report.state(module, tmp_path) == "small: 1 run, unfinished; full: not run yet"


def test_report_names_hardware_versions_and_commit(tmp_path, make_run):
    module = study.load("bn_vs_none")
    for label, config in module.runs("full").items():
        run = make_run(config)
        results.write(results.run_path(tmp_path, "bn_vs_none", "full", label, 0), run["header"], run["rows"])
    assert "Measured on 2 cores of Z80, with python 3.11, jax 0.10, at commit c0ffee." in report.readme(tmp_path)


def test_published_numbers_stand_beside_ours_under_the_published_protocol_only(make_run):
    module = study.load("bn_vs_none")
    for preset in PRESETS:
        found = {label: [make_run(config)] for label, config in module.runs(preset).items()}
        assert ("published best, %" in module.table(found, preset)[0]) == (preset == "full")


def test_report_links_to_the_figures_that_plot_writes(tmp_path, make_run):
    module = study.load("bn_vs_none")
    for label, config in module.runs("small").items():
        run = make_run(config)
        results.write(results.run_path(tmp_path, "bn_vs_none", "small", label, 0), run["header"], run["rows"])
    (figure,) = report.figures(module, tmp_path, tmp_path)
    assert f"({FIGURES.name}/{figure.name})" in report.readme(tmp_path)
