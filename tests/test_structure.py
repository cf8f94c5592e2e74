"""Structure of the repository: imports point one way, layers contain no arithmetic, the package metadata is right."""

import ast
import graphlib
import json
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
# A room is a folder or a file at the top of a package. It imports only rooms of a lower rank.
LIBRARY_RANKS = {
    "_core": 0,
    "interop": 0,
    "_layers": 1,
    "parallel": 1,
    "linen": 2,
    "nnx": 2,
    "testing": 2,
    "_models": 3,
    "calibrate": 4,
    "surgery": 4,
    "diagnose": 4,
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
# The functions of jax.numpy and jax.lax that the layers may call: they create and inspect arrays, and compute nothing.
NO_ARITHMETIC = {"asarray", "full_like", "iscomplexobj", "ones", "promote_types", "shape", "stop_gradient", "zeros"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def module_name(path, package):
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def files(package):
    """The source files of a package by dotted name."""
    return {module_name(path, package): path for path in sorted(package.rglob("*.py"))}


def imported(path):
    """The dotted names that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def internal(package, name):
    """The modules of the same package that a module imports."""
    modules = files(package)
    own = [n.removeprefix(f"{package.name}.") for n in imported(modules[name]) if n.startswith(f"{package.name}.")]
    # In `from a import b`, a.b is a module or a name in the module a: take the longest prefix that is a module.
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
    assert room in ranks, f"give {room} a rank in tests/test_structure.py"
    rooms = {module.split(".")[0] for module in internal(package, name)} - {room}
    assert not {imported_room for imported_room in rooms if ranks[imported_room] >= ranks[room]}


@pytest.mark.parametrize("package", [LIBRARY, EXPERIMENTS], ids=lambda package: package.name)
def test_imports_have_no_cycles(package):
    graph = {name: internal(package, name) for name in files(package)}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(files(package))


@pytest.mark.parametrize("name", files(LIBRARY))
def test_library_imports_nothing_but_jax_flax_numpy_and_chex(name):
    packages = {module.split(".")[0] for module in imported(files(LIBRARY)[name])}
    assert packages <= {"jax", "flax", "numpy", "chex", "jaxbn"} | set(sys.stdlib_module_names)


def test_linen_and_nnx_do_not_import_each_other():
    assert "nnx" not in internal(LIBRARY, "linen") and "linen" not in internal(LIBRARY, "nnx")
    assert not any(name.startswith("flax.nnx") for name in imported(LIBRARY / "linen.py"))
    assert not any(name.startswith("flax.linen") for name in imported(LIBRARY / "nnx.py"))


def test_no_module_has_the_name_of_a_public_function():
    assert not set(files(LIBRARY)) & set(jaxbn.__all__)


@pytest.mark.parametrize("name", ["linen", "nnx", "_layers/linen_domains", "_layers/nnx_domains"])
def test_layers_contain_no_arithmetic(name):
    tree = ast.parse((LIBRARY / f"{name}.py").read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.AugAssign), ast.unparse(node)
        if isinstance(node, ast.BinOp):  # only unions of types
            assert isinstance(node.op, ast.BitOr), ast.unparse(node)
        if isinstance(node, ast.UnaryOp):  # only `not`, and numbers such as -1
            assert isinstance(node.op, ast.Not) or isinstance(node.operand, ast.Constant), ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if ast.unparse(node.func.value) in ("jnp", "lax", "jax.numpy", "jax.lax"):
                assert node.func.attr in NO_ARITHMETIC, ast.unparse(node)


def test_public_names_are_sorted_and_exist():
    assert jaxbn.__all__ == sorted(jaxbn.__all__)
    assert all(hasattr(jaxbn, name) for name in jaxbn.__all__)


PUBLIC_MODULES = [module.name for module in pkgutil.iter_modules(jaxbn.__path__) if not module.name.startswith("_")]


@pytest.fixture(scope="module")
def fresh_interpreter():
    """The modules that `import jaxbn` loads in a new interpreter, and those that are its attributes."""
    program = f"""if True:
        import json, sys, jaxbn
        loaded = sorted({{name.split(".")[0] for name in sys.modules}})
        modules = [getattr(jaxbn, name).__name__ for name in {PUBLIC_MODULES}]
        print(json.dumps({{"loaded": loaded, "modules": modules}}))
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_public_modules_are_attributes_of_the_package(fresh_interpreter):
    assert fresh_interpreter["modules"] == [f"jaxbn.{name}" for name in PUBLIC_MODULES]


def test_importing_the_package_loads_neither_flax_nor_the_experiments(fresh_interpreter):
    assert not {"experiments", "flax", "optax", "orbax", "matplotlib"} & set(fresh_interpreter["loaded"])


def test_error_for_a_missing_attribute_names_the_layers():
    with pytest.raises(AttributeError, match="no attribute 'BatchNorm'; the layers are jaxbn.linen.BatchNorm and"):
        jaxbn.BatchNorm  # noqa: B018
    with pytest.raises(AttributeError, match="^module 'jaxbn' has no attribute 'nothing'$"):
        jaxbn.nothing  # noqa: B018


def test_version_is_that_of_the_project():
    assert jaxbn.__version__ == PYPROJECT["project"]["version"]


def test_package_is_marked_as_typed():
    assert (LIBRARY / "py.typed").is_file()


def test_dependencies_have_lower_bounds_only():
    project = PYPROJECT["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    for requirement in project["dependencies"] + [entry for entry in extras if not entry.startswith("jaxbn[")]:
        assert re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?>=[\d.]+", requirement), requirement
    assert re.fullmatch(r">=[\d.]+", project["requires-python"])


def test_the_library_imports_declared_dependencies_only():
    packages = {name.split(".")[0] for path in files(LIBRARY).values() for name in imported(path)}
    declared = {re.match(r"[\w-]+", entry)[0] for entry in PYPROJECT["project"]["dependencies"]}
    assert packages - set(sys.stdlib_module_names) - {"jaxbn"} <= declared
