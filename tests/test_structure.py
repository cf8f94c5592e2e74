"""The house in order: imports point one way, layers hold no arithmetic, and the package carries what it promises."""

import ast
import graphlib
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxbn

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "jaxbn"
EXPERIMENTS = ROOT / "experiments"
# A module imports only modules of a lower rank.
RANKS = {
    "_checks": 0,
    "_dtypes": 0,
    "_graph": 0,
    "_groups": 0,
    "_oracle": 0,
    "_platforms": 0,
    "_weights": 0,
    "padding": 1,
    "_adapter": 1,
    "_layouts": 1,
    "_pairs": 1,
    "_local": 2,
    "_measure": 3,
    "_conversion": 4,
    "interop": 5,
    "stats": 4,
    "functional": 5,
    "variants": 6,
    "linen": 6,
    "nnx": 6,
    "_models": 7,
    "_calls": 8,
    "_norms": 9,
    "_exchange": 10,
    "_passes": 10,
    "_folding": 11,
    "_operating": 11,
    "_records": 11,
    "calibrate": 11,
    "surgery": 12,
    "_figures": 12,
    "_findings": 13,
    "diagnose": 14,
    "_samples": 4,
    "_laws_values": 5,
    "_laws_invariance": 5,
    "_laws_precision": 5,
    "_laws_transformations": 5,
    "_laws_masks": 5,
    "_laws_devices": 5,
    "testing": 6,
}
# What the layers may call of jax.numpy and jax.lax: making arrays and asking about them.
NO_ARITHMETIC = {"asarray", "iscomplexobj", "ones", "promote_types", "shape", "stop_gradient", "zeros"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def module_name(path, package):
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def files(package):
    return {module_name(path, package): path for path in sorted(package.rglob("*.py"))}


def imported(path):
    """Returns the dotted names that a file imports, at its top or in its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def internal(package, name):
    """Returns the modules of its own package that a module imports."""
    modules = files(package)
    own = [n.removeprefix(f"{package.name}.") for n in imported(modules[name]) if n.startswith(f"{package.name}.")]
    # `a.b` is the module a.b, or the name b of the module a; both may be asked for.
    return {max((m for m in modules if m and f"{n}.".startswith(f"{m}.")), key=len, default="") for n in own} - {""}


@pytest.mark.parametrize("name", [name for name in files(LIBRARY) if name])
def test_library_module_imports_only_modules_below_it(name):
    assert name in RANKS, f"give {name} its place in RANKS"
    assert all(RANKS[other] < RANKS[name] for other in internal(LIBRARY, name)), internal(LIBRARY, name)


@pytest.mark.parametrize("name", files(LIBRARY))
def test_library_imports_nothing_but_jax_flax_numpy_and_chex(name):
    roots = {other.split(".")[0] for other in imported(files(LIBRARY)[name])}
    assert roots <= {"jax", "flax", "numpy", "chex", "jaxbn"} | set(sys.stdlib_module_names)


def test_linen_and_nnx_do_not_import_each_other():
    assert "nnx" not in internal(LIBRARY, "linen") and "linen" not in internal(LIBRARY, "nnx")
    assert not any(name.startswith("flax.nnx") for name in imported(LIBRARY / "linen.py"))
    assert not any(name.startswith("flax.linen") for name in imported(LIBRARY / "nnx.py"))


@pytest.mark.skipif(not EXPERIMENTS.is_dir(), reason="the experiments are not in this distribution")
def test_experiments_import_each_other_without_a_cycle():
    graph = {name: internal(EXPERIMENTS, name) for name in files(EXPERIMENTS)}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(graph)


@pytest.mark.skipif(not EXPERIMENTS.is_dir(), reason="the experiments are not in this distribution")
@pytest.mark.parametrize(
    ("name", "later"),
    [
        ("config", {"data", "models", "train", "study", "__main__"}),
        ("data", {"models", "train", "study", "__main__"}),
        ("models", {"data", "train", "study", "__main__"}),
        ("train", {"study", "__main__"}),
        ("study", {"__main__"}),
    ],
)
def test_experiment_module_reaches_none_that_comes_later(name, later):
    graph = {module: internal(EXPERIMENTS, module) for module in files(EXPERIMENTS)}
    reached = {name}
    while more := set().union(*(graph[module] for module in reached)) - reached:
        reached |= more
    assert not reached & later


def test_no_module_bears_the_name_of_a_public_function():
    assert not set(files(LIBRARY)) & set(jaxbn.__all__)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_layers_hold_no_arithmetic(name):
    tree = ast.parse((LIBRARY / f"{name}.py").read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.AugAssign), ast.unparse(node)
        if isinstance(node, ast.BinOp):  # a union of types
            assert isinstance(node.op, ast.BitOr), ast.unparse(node)
        if isinstance(node, ast.UnaryOp):  # `not`, and the number -1
            assert isinstance(node.op, ast.Not) or isinstance(node.operand, ast.Constant), ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = ast.unparse(node.func.value)
            assert of not in ("jnp", "lax", "jax.numpy", "jax.lax") or node.func.attr in NO_ARITHMETIC, ast.unparse(
                node
            )


def test_public_names_are_sorted_and_exist():
    assert jaxbn.__all__ == sorted(jaxbn.__all__)
    assert all(hasattr(jaxbn, name) for name in jaxbn.__all__)


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(jaxbn.__path__)])
def test_modules_import(name):
    importlib.import_module(f"jaxbn.{name}")


PUBLIC_MODULES = [module.name for module in pkgutil.iter_modules(jaxbn.__path__) if not module.name.startswith("_")]


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_a_public_module_is_there_without_an_import_of_its_own(name, monkeypatch):
    monkeypatch.delattr(jaxbn, name, raising=False)  # which an import elsewhere may have set
    assert getattr(jaxbn, name).__name__ == f"jaxbn.{name}"


def test_public_modules_are_there_in_a_fresh_interpreter():
    program = f"import jaxbn; print(*(getattr(jaxbn, name).__name__ for name in {PUBLIC_MODULES}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"jaxbn.{name}" for name in PUBLIC_MODULES]


def test_what_the_package_lacks_is_an_attribute_error_that_names_the_layers():
    with pytest.raises(AttributeError, match="no attribute 'BatchNorm'; the layers are jaxbn.linen.BatchNorm and"):
        jaxbn.BatchNorm  # noqa: B018
    with pytest.raises(AttributeError, match="^module 'jaxbn' has no attribute 'nothing'$"):
        jaxbn.nothing  # noqa: B018


def test_the_version_is_that_of_the_project():
    assert jaxbn.__version__ == PYPROJECT["project"]["version"]


def test_importing_the_library_imports_no_experiment_and_nothing_it_needs():
    program = "import sys, jaxbn; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"experiments", "flax", "optax", "orbax", "matplotlib"} & set(done.stdout.split())


def test_types_are_announced():
    assert (LIBRARY / "py.typed").is_file()


def test_dependencies_have_floors_and_no_caps():
    project = PYPROJECT["project"]
    extras = [needed for extra in project["optional-dependencies"].values() for needed in extra]
    for needed in project["dependencies"] + [needed for needed in extras if not needed.startswith("jaxbn[")]:
        assert re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?>=[\d.]+", needed), needed
    assert re.fullmatch(r">=[\d.]+", project["requires-python"])


def test_dependencies_are_what_the_library_imports():
    roots = set().union(*({name.split(".")[0] for name in imported(path)} for path in files(LIBRARY).values()))
    needed = {re.match(r"[\w-]+", entry)[0] for entry in PYPROJECT["project"]["dependencies"]}
    assert roots - set(sys.stdlib_module_names) - {"jaxbn"} <= needed
