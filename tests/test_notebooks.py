"""Notebooks: short, committed with their outputs, and run from end to end."""

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


def test_there_are_five():
    assert len(NOTEBOOKS) == 5


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_is_short(path):
    assert len(cells(path, "code")) <= 15 and path.stat().st_size < 500_000


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_begins_with_its_title_and_installs_in_colab_alone(path):
    assert read(path).cells[0].source.startswith("# ")
    first, second, *commands = cells(path, "code")[0].source.replace("\n\n", "\n").splitlines()
    assert (first, second) == ("import sys", 'if "google.colab" in sys.modules:')
    assert commands and all(line.startswith(("    %", "    !")) for line in commands)


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_outputs_are_those_of_one_run_from_top_to_bottom(path):
    numbers = [cell.execution_count for cell in cells(path, "code")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert not [output for output in outputs(path) if output.output_type == "error" or output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_what_a_cell_prints_is_in_one_piece(path):
    printed = [[output for output in cell.outputs if output.output_type == "stream"] for cell in cells(path, "code")]
    assert max(map(len, printed)) <= 1


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_every_figure_is_followed_by_how_to_read_it(path):
    found = read(path).cells
    drawn = [i for i, cell in enumerate(found) if "image/png" in str(cell.get("outputs", ""))]
    assert drawn and all("*How to read it.*" in found[i + 1].source for i in drawn)


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_names_no_folder_of_the_machine_it_ran_on(path):
    text = str([cell.get("outputs") for cell in read(path).cells])
    assert str(Path.home()) not in text and "/tmp/" not in text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
