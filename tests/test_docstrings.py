"""Public names are documented in full, and every example in docstrings and pages runs."""

import dataclasses
import doctest
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.testing

ROOT = Path(__file__).parent.parent
README, TESTING = ROOT / "README.md", ROOT / "docs" / "testing.md"
PAGES = [README, *(page for page in sorted((ROOT / "docs").glob("*.md")) if "```python" in page.read_text())]
MODULES = ["jaxbn", *(module.name for module in pkgutil.walk_packages(jaxbn.__path__, "jaxbn."))]
TOOLS = ["calibrate", "diagnose", "interop", "parallel", "surgery", "testing"]
PUBLIC = {name: getattr(jaxbn, name) for name in jaxbn.__all__}
for tool in TOOLS:
    module = importlib.import_module(f"jaxbn.{tool}")
    PUBLIC |= {f"{tool}.{name}": getattr(module, name) for name in module.__all__}
FUNCTIONS = [name for name, value in PUBLIC.items() if inspect.isfunction(value)]
TUPLES = [name for name, value in PUBLIC.items() if isinstance(value, type) and hasattr(value, "_fields")]
LAYERS = {"linen": jaxbn.linen.BatchNorm, "nnx": jaxbn.nnx.BatchNorm}
GLOBS = {"jax": jax, "jnp": jnp, "jaxbn": jaxbn, "nn": nn, "nnx": nnx, "functools": functools}


def section(documented, title):
    """The text of a section of a docstring, such as Args; empty if there is none."""
    match = re.search(rf"^{title}:\n((?:  .*\n?|\n)*)", inspect.getdoc(documented), re.MULTILINE)
    return match[1] if match else ""


def entries(documented, title):
    """The names that a section of a docstring documents."""
    return re.findall(r"^  (?:\*\*)?(\w+): ", section(documented, title), re.MULTILINE)


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def text_blocks(page):
    return re.findall(r"^```text\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_give_the_shown_results(name):
    module = importlib.import_module(name)
    assert module.__doc__
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs=dict(GLOBS)):
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_an_example(name):
    assert ">>> " in PUBLIC[name].__doc__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_documents_its_arguments_in_their_order(name):
    assert entries(PUBLIC[name], "Args") == parameters(PUBLIC[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_documents_its_result(name):
    assert section(PUBLIC[name], "Returns")


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if {"axis", "momentum", "model"} & {*parameters(PUBLIC[n])}])
def test_a_function_that_checks_its_arguments_documents_its_errors(name):
    assert "ValueError: " in section(PUBLIC[name], "Raises")


@pytest.mark.parametrize("name", TUPLES)
def test_a_tuple_documents_its_fields_in_their_order(name):
    assert entries(PUBLIC[name], "Attributes") == list(PUBLIC[name]._fields)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_layer_has_an_example_and_lists_differences_from_flax(layer):
    assert ">>> " in layer.__doc__
    assert re.search(r"Differs from flax\.\w+\.BatchNorm in:\n +1\. ", layer.__doc__)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_layer_documents_its_call(layer):
    assert entries(layer.__call__, "Args") == parameters(layer.__call__)
    assert section(layer.__call__, "Returns") and "ValueError: " in section(layer.__call__, "Raises")


def test_the_linen_layer_documents_its_fields_in_their_order():
    fields = [field.name for field in dataclasses.fields(jaxbn.linen.BatchNorm)]
    assert entries(jaxbn.linen.BatchNorm, "Attributes") == [name for name in fields if name not in ("parent", "name")]


def test_the_adapter_documents_its_fields_in_their_order():
    adapter = jaxbn.testing.Adapter
    assert entries(adapter, "Attributes") == [field.name for field in dataclasses.fields(adapter)]


def test_the_nnx_layer_documents_its_arguments_in_their_order():
    assert entries(jaxbn.nnx.BatchNorm, "Args") == parameters(jaxbn.nnx.BatchNorm.__init__)


@pytest.mark.skipif(not README.is_file(), reason="the README is not in this distribution")
@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.name, marks=() if page == README else pytest.mark.slow) for page in PAGES]
)
def test_examples_of_a_page_run_and_print_the_shown_text(page, capsys):
    assert python_blocks(page)
    scope = {"__name__": page.stem}
    for block in python_blocks(page):  # one scope, because later blocks use names of earlier ones
        exec(compile(block, page.name, "exec"), scope)
    printed = capsys.readouterr().out
    assert all(shown in printed for shown in text_blocks(page)), printed


@pytest.mark.skipif(not README.is_file(), reason="the README is not in this distribution")
def test_the_error_in_the_readme_is_the_one_that_is_raised():
    (shown,) = re.findall(r"\*\*Errors say what to do\*\*: `(.*?)`", README.read_text(), re.DOTALL)
    with pytest.raises(ValueError, match=re.escape(" ".join(shown.split())) + "$"):
        jaxbn.moments(jnp.ones((8, 8)), mask=jnp.ones(8, bool))


@pytest.mark.skipif(not README.is_file(), reason="the README is not in this distribution")
@pytest.mark.parametrize(
    "cases", [pytest.param(slice(1), id="one law"), pytest.param(slice(None), id="every law", marks=pytest.mark.slow)]
)
def test_the_pytest_example_of_the_guide_passes(cases):
    (block,) = (block for block in python_blocks(TESTING) if "check_batch_norm" in block)
    exec(compile(block, TESTING.name, "exec"), scope := {"__name__": TESTING.stem})
    test = scope["test_batch_norm_keeps_the_law"]
    (parametrized,) = test.pytestmark
    for law in parametrized.args[1][cases]:
        test(law)
