"""Notebooks: short, committed with their outputs, and executable from top to bottom."""

import functools
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = [pytest.param(path, id=path.stem) for path in sorted(FOLDER.glob("*.ipynb"))]
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the notebooks are not in this distribution")


@functools.cache
def read(path):
    return nbformat.read(path, as_version=4)


def cells(path, kind):
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def outputs(path):
    return [output for cell in cells(path, "code") for output in cell.outputs]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_is_short(path):
    assert len(cells(path, "code")) <= 15 and path.stat().st_size < 500_000


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_starts_with_a_title_and_installs_only_in_colab(path):
    assert read(path).cells[0].source.startswith("# ")
    first, second, *commands = cells(path, "code")[0].source.replace("\n\n", "\n").splitlines()
    assert (first, second) == ("import sys", 'if "google.colab" in sys.modules:')
    assert commands and all(line.startswith(("    %", "    !")) for line in commands)


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_outputs_come_from_one_run_without_errors_or_warnings(path):
    numbers = [cell.execution_count for cell in cells(path, "code")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert not [output for output in outputs(path) if output.output_type == "error" or output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_printed_output_of_a_cell_is_one_stream(path):
    printed = [[output for output in cell.outputs if output.output_type == "stream"] for cell in cells(path, "code")]
    assert max(map(len, printed)) <= 1


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_every_figure_is_followed_by_an_explanation(path):
    all_cells = read(path).cells
    figures = [i for i, cell in enumerate(all_cells) if "image/png" in str(cell.get("outputs", ""))]
    assert figures and all("*How to read it.*" in all_cells[i + 1].source for i in figures)


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_outputs_contain_no_local_paths(path):
    text = str([cell.get("outputs") for cell in read(path).cells])
    assert str(Path.home()) not in text and "/tmp/" not in text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
