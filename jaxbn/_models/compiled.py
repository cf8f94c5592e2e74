"""Compiles programs once, however often an equal one is traced."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxbn._models.marks import Site
from jaxbn._models.program import Program

_KEPT = 64
# Parameters that hold derivatives: functions that are new in each trace, and play no part in an evaluation.
_DERIVATIVES = {"jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "fwd", "bwd", "jvp", "out_trees"}
_compiled: collections.OrderedDict[Any, Callable] = collections.OrderedDict()


def compiled(function: Callable, program: Program, **options: Any) -> Callable:
    """Returns ``partial(function, program, **options)``, compiled; equal programs share it, and the last 64 are kept.

    The constants of a program are arguments, so that models may hold arrays, and these are freed with the model.
    """
    key = (function, _content(options), _content(program.jaxpr.jaxpr), _content(program.calls), program.structure)
    found = _compiled.pop(key, None)
    if found is None:
        jaxpr = program.jaxpr.jaxpr
        without = program._replace(jaxpr=ClosedJaxpr(jaxpr, [None] * len(jaxpr.constvars)))

        def run(consts, *arguments):
            whole = without._replace(jaxpr=ClosedJaxpr(jaxpr, consts))
            return function(whole, *arguments, **options)

        found = jax.jit(run)
    _compiled[key] = found
    while len(_compiled) > _KEPT:
        _compiled.popitem(last=False)
    return lambda *arguments: found(program.jaxpr.consts, *arguments)


def _content(value: Any, known: dict | None = None) -> Any:
    """Returns something hashable that is equal for equal contents; what cannot be compared is equal only to itself."""
    known = {} if known is None else known
    if isinstance(value, Jaxpr):
        if id(value) not in known:
            known[id(value)] = _content_of_jaxpr(value, known)
        return known[id(value)]
    if isinstance(value, ClosedJaxpr):
        return _content(value.jaxpr, known), _content(tuple(value.consts), known)
    if isinstance(value, Site):
        return value.role, value.path, value.names, value.use_running_average, _content(value.options, known)
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        return array.shape, array.dtype, array.tobytes()
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.is_fully_addressable:
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
            return object()
        return "array", _content(np.asarray(value), known)
    if isinstance(value, dict):
        return type(value), tuple((_content(k, known), _content(v, known)) for k, v in value.items())
    if isinstance(value, tuple | list):
        return type(value), tuple(_content(item, known) for item in value)
    try:
        hash(value)
    except TypeError:
        return object()
    return type(value), value, repr(value) if isinstance(value, float) else None  # 0.0 equals -0.0


def _content_of_jaxpr(jaxpr: Jaxpr, known: dict) -> Any:
    numbers: dict[Any, int] = {}

    def atom(item):
        if isinstance(item, Literal):
            return "literal", _content(item.val, known), item.aval
        return numbers.setdefault(item, len(numbers)), item.aval

    arguments = tuple(map(atom, [*jaxpr.constvars, *jaxpr.invars]))
    equations = []
    for eqn in jaxpr.eqns:
        parameters = {name: value for name, value in eqn.params.items() if name not in _DERIVATIVES}
        inputs, outputs = tuple(map(atom, eqn.invars)), tuple(map(atom, eqn.outvars))
        equations.append((eqn.primitive, inputs, outputs, _content(parameters, known), eqn.ctx))
    return arguments, tuple(equations), tuple(map(atom, jaxpr.outvars))
