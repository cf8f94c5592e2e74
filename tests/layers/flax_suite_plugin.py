"""A pytest plugin for Flax's own tests: puts our layers in place of Flax's, and keeps the tests that build one."""

import ast
import inspect

import flax.linen.normalization
import flax.nnx.nn.normalization

import jaxbn.linen
import jaxbn.nnx

for module in (flax.linen, flax.linen.normalization):
    module.BatchNorm = jaxbn.linen.BatchNorm
for module in (flax.nnx, flax.nnx.nn.normalization):
    module.BatchNorm = jaxbn.nnx.BatchNorm


def pytest_collection_modifyitems(config, items):
    """Deselects what never names BatchNorm, itself or through a class or function of its module."""
    found = {module: _building_tests(module) for module in {item.module for item in items}}
    kept = [item for item in items if _builds(item, found[item.module])]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _builds(item, tests):
    # A parametrized test is named after the function that made it, and describes its parameters.
    parameters = getattr(item.function, "__x_params_repr__", "") or ""
    name = item.originalname
    test = max((test for test in tests if name.startswith(test)), key=len, default=None)
    return test is not None and (tests[test] == "body" or "BatchNorm" in parameters)


def _building_tests(module):
    """Returns the tests of a module by name, and whether they name BatchNorm in their body or in their parameters."""
    tree = ast.parse(inspect.getsource(module))
    definitions = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    names = {node.name: _names(node) for node in definitions if "Test" not in node.name}
    building = {"BatchNorm"}
    while more := {name for name, used in names.items() if used & building} - building:
        building |= more
    tests = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            if any(_names(statement) & building for statement in node.body):
                tests[node.name] = "body"
            elif any(_names(decorator) & building for decorator in node.decorator_list):
                tests[node.name] = "parameters"
    return tests


def _names(tree):
    return {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute)
    }
