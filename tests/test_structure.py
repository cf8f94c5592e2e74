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
# A room, which is a folder or a file of a package, imports only rooms of a lower rank.
LIBRARY_RANKS = {
    "_core": 0,
    "interop": 0,
    "linen": 1,
    "nnx": 1,
    "testing": 1,
    "_models": 2,
    "calibrate": 3,
    "surgery": 3,
    "diagnose": 3,
}
EXPERIMENT_RANKS = {
    "config": 0,
    "processes": 0,
    "data": 1,
    "evidence": 1,
    "nets": 1,
    "training": 2,
    "scoreboard": 2,
    "probes": 3,
    "benchmarks": 4,
    "studies": 5,
    "demos": 5,
    "report": 6,
    "__main__": 7,
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


@pytest.mark.parametrize(
    ("package", "name", "ranks"),
    [
        pytest.param(package, name, ranks, id=f"{package.name}.{name}")
        for package, ranks in ((LIBRARY, LIBRARY_RANKS), (EXPERIMENTS, EXPERIMENT_RANKS))
        for name in filter(None, files(package))
    ],
)
def test_a_room_imports_only_rooms_of_a_lower_rank(package, name, ranks):
    room = name.split(".")[0]
    assert room in ranks, f"give {room} its rank in tests/test_structure.py"
    others = {other for other in internal(package, name) if other.split(".")[0] != room}
    assert all(ranks[other.split(".")[0]] < ranks[room] for other in others), others


@pytest.mark.parametrize("package", [LIBRARY, EXPERIMENTS], ids=lambda package: package.name)
def test_modules_import_each_other_without_a_cycle(package):
    # A package's own __init__ gathers what its modules offer; it comes after them.
    graph = {name: internal(package, name) for name in files(package)}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(files(package))


@pytest.mark.parametrize("name", files(LIBRARY))
def test_library_imports_nothing_but_jax_flax_numpy_and_chex(name):
    roots = {other.split(".")[0] for other in imported(files(LIBRARY)[name])}
    assert roots <= {"jax", "flax", "numpy", "chex", "jaxbn"} | set(sys.stdlib_module_names)


def test_linen_and_nnx_do_not_import_each_other():
    assert "nnx" not in internal(LIBRARY, "linen") and "linen" not in internal(LIBRARY, "nnx")
    assert not any(name.startswith("flax.nnx") for name in imported(LIBRARY / "linen.py"))
    assert not any(name.startswith("flax.linen") for name in imported(LIBRARY / "nnx.py"))


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
