"""Writes public.json: the public names of the library with their signatures, and the commands with their options.

Run `python -m tests.golden.make_public` after an intended change of a public name, and check the diff.
"""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from flax import nnx

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("public.json")
MODULES = ("", "calibrate", "diagnose", "interop", "linen", "nnx", "parallel", "surgery", "testing")


def public() -> dict[str, dict[str, Any]]:
    """Collects {"names": {dotted name: signature}, "commands": {name: {option: default}}}."""
    names = {}
    for name in MODULES:
        module = importlib.import_module(f"jaxbn.{name}".rstrip("."))
        for public_name in module.__all__:
            names |= _entries(f"{module.__name__}.{public_name}", getattr(module, public_name))
    return {"names": names, "commands": _commands()}


def _entries(name: str, value: Any) -> dict[str, str]:
    """Describes a function by its signature, a class by those of itself and its methods, a constant by its type."""
    if inspect.isfunction(value):
        return {name: _signature(value)}
    if not inspect.isclass(value):
        return {name: type(value).__name__}
    entries = {name: _signature(value)}
    for attribute, defined in vars(value).items():
        if not attribute.startswith("_") and isinstance(defined, property):
            entries[f"{name}.{attribute}"] = "property"
        # Flax adds its own methods to a module class when the class is first used.
        if inspect.isfunction(defined) and not attribute.startswith("_") and defined.__module__.startswith("jaxbn"):
            entries[f"{name}.{attribute}"] = _signature(defined)
    return entries


def _signature(value: Any) -> str:
    """Describes parameters by kind and default, without annotations, which contain the names of private modules."""
    if isinstance(value, type(nnx.Module)):  # the metaclass of nnx hides the signature of the class
        value = value.__init__
    signature = inspect.signature(value)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty, default=_Shown.of(parameter.default))
        for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


class _Shown(str):
    """A default value as text: functions by name, paths relative to the repository."""

    __repr__ = str.__str__

    @classmethod
    def of(cls, value: Any) -> Any:
        """Converts a default; leaves the marker of a parameter without default as it is."""
        if value is inspect.Parameter.empty:
            return value
        if isinstance(value, Path):
            return cls("/".join(value.relative_to(ROOT).parts) if value.is_absolute() else value)
        if callable(value):
            return cls(getattr(value, "__qualname__", type(value).__name__))
        return cls(type(value).__name__ if " at 0x" in repr(value) else repr(value))


def _commands() -> dict[str, dict[str, str]]:
    cli = importlib.import_module("experiments.__main__")
    return {
        name.removesuffix("_command").replace("_", "-"): {
            parameter.name: str(
                parameter.replace(annotation=inspect.Parameter.empty, default=_Shown.of(parameter.default))
            )
            for parameter in inspect.signature(function).parameters.values()
        }
        for name, function in vars(cli).items()
        if name.endswith("_command")
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(public(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
