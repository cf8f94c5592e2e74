"""The documentation: every page is listed, public names are in the reference, and links and commands work."""

import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import nbformat
import pytest
import tyro

import jaxbn
from experiments import __main__ as cli
from experiments.studies import protocol

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
INDEX = DOCS / "index.md"
MODULES = [f"jaxbn.{module.name}" for module in pkgutil.iter_modules(jaxbn.__path__) if module.name[0] != "_"]
PUBLIC = ["jaxbn", *MODULES]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
    ROOT / "experiments" / "README.md",
]
pytestmark = pytest.mark.skipif(not INDEX.is_file(), reason="the pages are not in this distribution")


def text_of(page):
    """The text of a page without its code blocks."""
    if page.suffix == ".ipynb":
        cells = nbformat.read(page, as_version=4).cells
        return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def listed():
    """The pages in the table of contents."""
    contents = re.search(r"```{toctree}\n(.*?)```", INDEX.read_text(encoding="utf-8"), re.DOTALL)[1]
    names = [line for line in contents.splitlines() if line and not line.startswith(":")]
    return {path.resolve() for name in names for kind in ("md", "ipynb") for path in _matching(f"{name}.{kind}")}


def _matching(name):
    """The existing files that an entry of the contents stands for; it may be a pattern, such as bench/*."""
    return DOCS.glob(name) if "*" in name else [path for path in [DOCS / name] if path.exists()]


def anchors(page):
    """The anchors of a page: its headings in lower case, with hyphens."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != INDEX], ids=lambda page: str(page.relative_to(ROOT))
)
def test_page_is_in_the_index(page):
    assert page.resolve() in listed()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_have_targets(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not re.match(r"https?:|mailto:", link):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{link}: no such file"
            if anchor and target.suffix in (".md", ".ipynb"):
                assert anchor in anchors(target), f"{link}: no such heading"


def mentioned(pattern):
    """The distinct matches of a pattern on all pages, with each paragraph joined into one line."""
    pages = [page.read_text(encoding="utf-8") if page.suffix == ".md" else text_of(page) for page in PAGES]
    text = "\n".join(re.sub(r"(?<=\w)\n(?!python)(?=[\w-])", " ", page) for page in pages)
    return sorted({" ".join(match.split()) for match in re.findall(pattern, text, re.MULTILINE)})


@pytest.mark.parametrize("command", mentioned(r"-m experiments ([\w\-./ =,]+)"))
def test_command_on_a_page_is_valid(command):
    def parse_only(function):  # tyro would follow __wrapped__ and call the function itself
        parsed = functools.wraps(function)(lambda *_, **options: options)
        del parsed.__wrapped__
        parsed.__signature__ = inspect.signature(function)
        return parsed

    functions = {name: value for name, value in vars(cli).items() if name.endswith("_command")}
    parsers = {name.removesuffix("_command").replace("_", "-"): parse_only(f) for name, f in functions.items()}
    options = tyro.extras.subcommand_cli_from_dict(parsers, args=command.split())
    study = options.get("study", "all")
    assert study.isupper() or study in ["all", *protocol.names()]  # upper case is a placeholder, such as STUDY


@pytest.mark.parametrize("target", mentioned(r"(?:`|^)make (\w+)"))
def test_target_on_a_page_is_in_the_makefile(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", mentioned(r"`(?!docs/_build)((?:jaxbn|experiments|tests|docs|notebooks)/[\w./]*)`"))
def test_path_on_a_page_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_module_is_in_the_reference(name):
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md")]
    assert sum(f".. automodule:: {name}\n   :members:\n" in page for page in pages) == 1


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    lines = "\n".join(path.read_text(encoding="utf-8") for path in Path(jaxbn.__file__).parent.rglob("*.py"))
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__ and value.__module__.startswith("jaxbn."), public
        else:  # a constant is documented by a comment that starts with `#:`
            assert re.search(rf"^#: .+\n(?:#:.*\n)*{public}\b.* = ", lines, re.MULTILINE), public


@pytest.mark.parametrize("name", MODULES)
def test_a_module_defines_private_or_documented_names_only(name):
    module = importlib.import_module(name)
    defined = {key for key, value in vars(module).items() if getattr(value, "__module__", None) == name}
    documented = {*jaxbn.__all__, *getattr(module, "__all__", ())}
    assert not {key for key in defined if not key.startswith("_")} - documented
