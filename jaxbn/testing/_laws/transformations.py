"""Laws of JAX's transformations: jit, scan, vmap, remat and every mode of differentiation give the same results."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.testing import _oracle
from jaxbn.testing._adapter import (
    Adapter,
    arrays,
    evaluate,
    gradients,
    law,
    start,
    statistics,
    train,
    train_eagerly,
    wide,
)
from jaxbn.testing._samples import (
    ALIKE,
    EPS,
    ROUNDINGS,
    SHAPES,
    Sample,
    at,
    magnitudes,
    require_close,
    require_statistics,
    rows_of,
    sample,
)

# Step of the central differences of the oracle's gradients, in standard deviations.  In float64, the
# truncation error, about STEP^2, and the rounding error are both about 1e-8 or less.
STEP = 1e-4


def traceable(adapter: Adapter) -> bool:
    """Whether JAX can trace the implementation."""
    return adapter.traceable


@law()
def dtypes_are_stable(adapter: Adapter) -> None:
    """A step does not change the shapes and dtypes of the state, so lax.scan over steps works."""
    for dtype in ("float32", *adapter.half_precision):
        _require_stable(adapter, dtype)
    if adapter.traceable:
        _require_scan(adapter)
    if adapter.float64:
        with jax.enable_x64(True):
            _require_stable(adapter, "float64")


@law(traceable)
def jit_equals_eager(adapter: Adapter) -> None:
    """Under jit, training, evaluation and statistics give the same results as without."""
    data = sample(SHAPES[1])
    before = start(adapter, *data[:3])
    x = arrays(adapter, data.x)
    y, after = train_eagerly(adapter, before, x)
    mean, var = statistics(adapter, after)
    y_of_evaluation = wide(adapter.evaluate(after, x), x.shape, "y of evaluate")

    y_under_jit, after_under_jit = train(adapter, before, data.x)
    mean_under_jit, var_under_jit = statistics(adapter, after_under_jit)
    y_of_evaluation_under_jit = evaluate(adapter, after, data.x)

    magnitude = magnitudes(adapter, data)
    size_of_evaluation = abs(y_of_evaluation).max() + magnitude["y"]
    for name, actual, expected, size in (
        ("y", y_under_jit, y, magnitude["y"]),
        ("running mean", mean_under_jit, mean, magnitude["mean"]),
        ("running var", var_under_jit, var, magnitude["var"]),
        ("y of evaluation", y_of_evaluation_under_jit, y_of_evaluation, size_of_evaluation),
    ):
        require_close(f"{name} {at(data.x, 'under jit')}", actual, expected, ROUNDINGS * EPS * size)


@law(traceable)
def forward_mode(adapter: Adapter) -> None:
    """Directional derivatives (jax.jvp) equal those of the oracle."""
    for shape in SHAPES:
        data = sample(shape)
        state = start(adapter, *data[:3])
        std = data.x.std(rows_of(data.x))
        for seed in (1, 2, 3):
            direction = sample(shape, mean=0, std=1, seed=seed)
            # In units of standard deviations, so that all features have the same weight.
            v = (direction.x * std).astype(np.float32), direction.scale, direction.bias
            # By the chain rule, <dy, jvp(v)> = <vjp(dy), v>, and the oracle has the right-hand side.
            vjp = _oracle.gradients(*data[:3], direction.dy, epsilon=adapter.epsilon)
            terms = np.concatenate([np.ravel(gradient * along) for gradient, along in zip(vjp, v, strict=True)])
            derivative = np.float64(_derivative(adapter, state, data[:3], v))
            actual = (derivative * direction.dy).sum()
            require_close(f"<dy, jvp(v)> {at(data.x)}", actual, terms.sum(), ROUNDINGS * EPS * abs(terms).sum())


@law(traceable)
def hessian_vector_products(adapter: Adapter) -> None:
    """Hessian-vector products, forward over reverse and reverse over reverse, equal those of the oracle."""
    for shape in SHAPES:
        data = sample(shape, std=ALIKE)
        state = start(adapter, *data[:3])
        v = sample(shape, mean=0, std=1, seed=1)[:3]
        x, scale, bias = (primal.astype(np.float64) for primal in data[:3])

        def gradient_at(h, x=x, scale=scale, bias=bias, v=v, dy=data.dy):
            """Returns the oracle's gradients at a distance h along v."""
            return _oracle.gradients(x + h * v[0], scale + h * v[1], bias + h * v[2], dy, epsilon=adapter.epsilon)

        ahead = gradient_at(STEP)
        behind = gradient_at(-STEP)
        expected = [(a - b) / (2 * STEP) for a, b in zip(ahead, behind, strict=True)]
        largest = max(abs(part).max() for part in expected)
        for mode, product in (("forward", _forward_over_reverse), ("reverse", _reverse_over_reverse)):
            actual = product(adapter, state, data[:3], data.dy, v)
            for name, actual_part, part in zip(("x", "scale", "bias"), actual, expected, strict=True):
                case = f"Hessian times v in {name} {at(data.x, f'by {mode} over reverse')}"
                require_close(case, actual_part, part, 4 * ROUNDINGS * EPS * largest)


@law(traceable)
def vmap_over_models(adapter: Adapter) -> None:
    """Under jax.vmap over states and inputs, each model gives the same results as alone."""
    # Each model sees a different mean, to detect statistics that are shared between models.
    samples = [sample(SHAPES[1], mean=seed, std=ALIKE, seed=seed) for seed in range(3)]
    states = [start(adapter, *data[:3]) for data in samples]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together = jax.jit(jax.vmap(lambda state, x: adapter.train(state, x, None)))
    ys, afters = together(stacked, jnp.stack([data.x for data in samples]))
    rounding = ROUNDINGS * EPS
    for i, (data, state) in enumerate(zip(samples, states, strict=True)):
        y, alone = train(adapter, state, data.x)
        after = jax.tree.map(lambda leaf, i=i: leaf[i], afters)
        actual = statistics(adapter, after)
        expected = statistics(adapter, alone)
        magnitude = magnitudes(adapter, data)
        case = at(data.x, "under vmap")
        require_close(f"y {case}", ys[i], y, rounding * magnitude["y"])
        require_statistics(case, actual, expected, magnitude, rounding=rounding)


@law(traceable)
def remat_changes_nothing(adapter: Adapter) -> None:
    """jax.checkpoint, which repeats the forward pass, does not change the gradients."""
    for shape in SHAPES:
        data = sample(shape)
        state = start(adapter, *data[:3])
        remat = _gradients_of_remat(adapter, state, data[:3], data.dy)
        plain = gradients(adapter, state, *data)
        magnitude = magnitudes(adapter, data)
        for actual, (name, expected) in zip(remat, plain.items(), strict=True):
            case = f"{name} {at(data.x, 'under remat')}"
            require_close(case, actual, expected, ROUNDINGS * EPS * magnitude[name])


Primals = tuple[jax.Array, jax.Array, jax.Array]  # x, scale and bias


def _output(adapter: Adapter, state: Any, primals: Primals) -> jax.Array:
    """Computes the output of training as a function of x, scale and bias."""
    x, scale, bias = primals
    with_parameters = adapter.with_parameters(state, scale, bias)
    return adapter.train(with_parameters, x, None)[0]


def _gradient(adapter: Adapter, state: Any, primals: Primals, dy: jax.Array) -> Primals:
    return jax.grad(lambda p: jnp.vdot(_output(adapter, state, p), dy))(primals)


@functools.partial(jax.jit, static_argnums=0)
def _derivative(adapter: Adapter, state: Any, primals: Any, v: Any) -> jax.Array:
    return jax.jvp(lambda p: _output(adapter, state, p), (primals,), (v,))[1]


@functools.partial(jax.jit, static_argnums=0)
def _forward_over_reverse(adapter: Adapter, state: Any, primals: Any, dy: Any, v: Any) -> Primals:
    return jax.jvp(lambda p: _gradient(adapter, state, p, dy), (primals,), (v,))[1]


@functools.partial(jax.jit, static_argnums=0)
def _reverse_over_reverse(adapter: Adapter, state: Any, primals: Any, dy: Any, v: Any) -> Primals:
    def along_v(p):
        gradient = _gradient(adapter, state, p, dy)
        return sum(map(jnp.vdot, gradient, v))

    return jax.grad(along_v)(primals)


@functools.partial(jax.jit, static_argnums=0)
def _gradients_of_remat(adapter: Adapter, state: Any, primals: Any, dy: Any) -> Primals:
    y, vjp = jax.vjp(jax.checkpoint(lambda p: _output(adapter, state, p)), primals)
    return vjp(dy.astype(y.dtype))[0]


@functools.partial(jax.jit, static_argnums=0)
def _scan(adapter: Adapter, state: Any, xs: Any) -> tuple[Any, jax.Array]:
    def step(state, x):
        y, state = adapter.train(state, x, None)
        return state, y

    return jax.lax.scan(step, state, xs)


def _require_stable(adapter: Adapter, dtype: str) -> None:
    """Asserts that a step on inputs of this dtype does not change the structure, shapes and dtypes of the state."""
    data = sample(SHAPES[0], std=ALIKE, dtype=dtype)
    before = start(adapter, *data[:3])
    after = _after_a_step(adapter, before, data)
    if not adapter.traceable:
        # The state may be any object, so compare its statistics instead.
        before, after = _statistics_by_name(adapter, before), _statistics_by_name(adapter, after)
    _require_same(before, after, dtype)


def _after_a_step(adapter: Adapter, state: Any, data: Sample) -> Any:
    """Returns the state after a step; for a traceable implementation, only its shapes and dtypes."""
    x = arrays(adapter, data.x)
    if not adapter.traceable:
        return adapter.train(state, x, None)[1]
    # This compiles nothing.
    return jax.eval_shape(lambda state, x: adapter.train(state, x, None)[1], state, x)


def _statistics_by_name(adapter: Adapter, state: Any) -> dict[str, Any]:
    return dict(zip(("mean", "var"), adapter.statistics(state), strict=True))


def _require_same(old: Any, new: Any, dtype: str) -> None:
    """Asserts that two trees have the same structure, shapes and dtypes."""
    old_leaves, old_tree = jax.tree.flatten_with_path(old)
    new_leaves, new_tree = jax.tree.flatten_with_path(new)
    if old_tree != new_tree:
        raise AssertionError(f"a step on {dtype} inputs changes the tree of the state: {old_tree} becomes {new_tree}")
    for (path, old_leaf), (_, new_leaf) in zip(old_leaves, new_leaves, strict=True):
        old_type = _type_in_words(old_leaf)
        new_type = _type_in_words(new_leaf)
        if old_type != new_type:
            raise AssertionError(
                f"a step on {dtype} inputs changes state{jax.tree_util.keystr(path)} from {old_type} to {new_type}"
            )


def _type_in_words(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _require_scan(adapter: Adapter) -> None:
    """Asserts that lax.scan over steps gives the same results as the steps one by one."""
    data = sample(SHAPES[0], std=ALIKE)
    state = start(adapter, *data[:3])
    # Batches with different statistics, to detect a scan that loses the state of the previous step.
    xs = np.stack([data.x, 2 * data.x, -data.x])
    last, ys = _scan(adapter, state, xs)
    rounding = ROUNDINGS * EPS
    for x, y_of_scan in zip(xs, ys, strict=True):
        y, state = train(adapter, state, x)
        allowed = rounding * magnitudes(adapter, data._replace(x=x))["y"]
        require_close("y of steps by lax.scan", y_of_scan, y, allowed)
    magnitude = magnitudes(adapter, data._replace(x=xs[1]))
    actual = statistics(adapter, last)
    expected = statistics(adapter, state)
    require_statistics("after steps by lax.scan", actual, expected, magnitude, rounding=rounding)
