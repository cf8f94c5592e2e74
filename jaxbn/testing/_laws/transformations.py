"""Laws of JAX's transformations: jit, scan, vmap, remat and every mode of differentiation give the same batch norm."""

import functools

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
    at,
    magnitudes,
    require_close,
    require_statistics,
    sample,
)

STEP = 1e-4  # of the differences of the oracle's gradients, in standard deviations: 1e-8 of truncation and of rounding


def traceable(adapter: Adapter) -> bool:
    """Returns whether JAX can transform the implementation."""
    return adapter.traceable


@law()
def dtypes_are_stable(adapter: Adapter) -> None:
    """A step leaves the shapes and dtypes of the state as they were, so that lax.scan can go over steps."""
    for dtype in ("float32", *adapter.half_precision):
        _require_stable(adapter, dtype)
    if adapter.traceable:
        _require_scan(adapter)
    if adapter.float64:
        with jax.enable_x64(True):
            _require_stable(adapter, "float64")


@law(traceable)
def jit_equals_eager(adapter: Adapter) -> None:
    """Compiled, training, evaluation and statistics are what they are without jit."""
    data = sample(SHAPES[1])
    state, x, magnitude = start(adapter, *data[:3]), arrays(adapter, data.x), magnitudes(adapter, data)
    y, after = train_eagerly(adapter, state, x)
    eager = y, *statistics(adapter, after), wide(adapter.evaluate(after, x), x.shape, "y of evaluate")
    y, jitted = train(adapter, state, data.x)
    compiled = y, *statistics(adapter, jitted), evaluate(adapter, after, data.x)
    names = "y", "running mean", "running var", "y of evaluation"
    sizes = magnitude["y"], magnitude["mean"], magnitude["var"], abs(eager[3]).max() + magnitude["y"]
    for name, found, expected, size in zip(names, compiled, eager, sizes, strict=True):
        require_close(f"{name} {at(data.x, 'under jit')}", found, expected, ROUNDINGS * EPS * size)


@law(traceable)
def forward_mode(adapter: Adapter) -> None:
    """Derivatives in a direction, by jax.jvp, are those of the oracle."""
    for shape in SHAPES:
        data = sample(shape)
        state, std = start(adapter, *data[:3]), data.x.std(tuple(range(len(shape) - 1)))
        for seed in (1, 2, 3):
            direction = sample(shape, mean=0, std=1, seed=seed)
            v = (direction.x * std).astype(np.float32), direction.scale, direction.bias
            expected = _oracle.gradients(*data[:3], direction.dy, epsilon=adapter.epsilon)
            terms = np.concatenate([np.ravel(gradient * along) for gradient, along in zip(expected, v, strict=True)])
            found = (np.float64(_derivative(adapter, state, data[:3], v)) * direction.dy).sum()
            require_close(f"<dy, jvp(v)> {at(data.x)}", found, terms.sum(), ROUNDINGS * EPS * abs(terms).sum())


@law(traceable)
def hessian_vector_products(adapter: Adapter) -> None:
    """Second derivatives, forward over reverse and reverse over reverse, are those of the oracle."""
    for shape in SHAPES:
        data, v = sample(shape, std=ALIKE), sample(shape, mean=0, std=1, seed=1)[:3]
        state = start(adapter, *data[:3])
        x, scale, bias = (p.astype(np.float64) for p in data[:3])
        ahead, behind = (
            _oracle.gradients(x + h * v[0], scale + h * v[1], bias + h * v[2], data.dy, epsilon=adapter.epsilon)
            for h in (STEP, -STEP)
        )
        expected = [(a - b) / (2 * STEP) for a, b in zip(ahead, behind, strict=True)]
        largest = max(abs(part).max() for part in expected)
        for mode, product in (("forward", _forward_over_reverse), ("reverse", _reverse_over_reverse)):
            products = product(adapter, state, data[:3], data.dy, v)
            for name, found, part in zip(("x", "scale", "bias"), products, expected, strict=True):
                case = f"Hessian times v in {name} {at(data.x, f'by {mode} over reverse')}"
                require_close(case, found, part, 4 * ROUNDINGS * EPS * largest)


@law(traceable)
def vmap_over_models(adapter: Adapter) -> None:
    """Models side by side, by jax.vmap over states and inputs, are what each is alone."""
    samples = [sample(SHAPES[1], mean=seed, std=ALIKE, seed=seed) for seed in range(3)]
    states = [start(adapter, *data[:3]) for data in samples]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together = jax.jit(jax.vmap(lambda state, x: adapter.train(state, x, None)))
    ys, afters = together(stacked, jnp.stack([data.x for data in samples]))
    for i, (data, state) in enumerate(zip(samples, states, strict=True)):
        magnitude = magnitudes(adapter, data)
        y, alone = train(adapter, state, data.x)
        after = jax.tree.map(lambda leaf, i=i: leaf[i], afters)
        case, rounding = at(data.x, "under vmap"), ROUNDINGS * EPS
        require_close(f"y {case}", ys[i], y, rounding * magnitude["y"])
        found, expected = statistics(adapter, after), statistics(adapter, alone)
        require_statistics(case, found, expected, magnitude, rounding=rounding)


@law(traceable)
def remat_changes_nothing(adapter: Adapter) -> None:
    """Under jax.checkpoint, which computes the forward pass twice, gradients are what they are without."""
    for shape in SHAPES:
        data = sample(shape)
        state, magnitude = start(adapter, *data[:3]), magnitudes(adapter, data)
        remat, plain = _gradients_of_remat(adapter, state, data[:3], data.dy), gradients(adapter, state, *data)
        for found, (name, expected) in zip(remat, plain.items(), strict=True):
            case = f"{name} {at(data.x, 'under remat')}"
            require_close(case, found, expected, ROUNDINGS * EPS * magnitude[name])


def _output(adapter, state, primals):
    """The output of training as a function of x, scale and bias."""
    x, scale, bias = primals
    return adapter.train(adapter.with_parameters(state, scale, bias), x, None)[0]


def _gradient(adapter, state, primals, dy):
    return jax.grad(lambda p: jnp.vdot(_output(adapter, state, p), dy))(primals)


@functools.partial(jax.jit, static_argnums=0)
def _derivative(adapter, state, primals, v):
    return jax.jvp(lambda p: _output(adapter, state, p), (primals,), (v,))[1]


@functools.partial(jax.jit, static_argnums=0)
def _forward_over_reverse(adapter, state, primals, dy, v):
    return jax.jvp(lambda p: _gradient(adapter, state, p, dy), (primals,), (v,))[1]


@functools.partial(jax.jit, static_argnums=0)
def _reverse_over_reverse(adapter, state, primals, dy, v):
    return jax.grad(lambda p: sum(map(jnp.vdot, _gradient(adapter, state, p, dy), v)))(primals)


@functools.partial(jax.jit, static_argnums=0)
def _gradients_of_remat(adapter, state, primals, dy):
    y, vjp = jax.vjp(jax.checkpoint(lambda p: _output(adapter, state, p)), primals)
    return vjp(dy.astype(y.dtype))[0]


@functools.partial(jax.jit, static_argnums=0)
def _scan(adapter, state, xs):
    return jax.lax.scan(lambda state, x: adapter.train(state, x, None)[::-1], state, xs)


def _require_stable(adapter, dtype):
    """Refuses a step on inputs of a dtype that leaves the state otherwise than it was at the start."""
    data = sample(SHAPES[0], std=ALIKE, dtype=dtype)
    state = start(adapter, *data[:3])
    _require_same(adapter, state, _after_a_step(adapter, state, data), dtype)


def _after_a_step(adapter, state, data):
    """Returns the state after a step; of a traceable implementation, its shapes and dtypes."""
    x = arrays(adapter, data.x)
    if not adapter.traceable:
        return adapter.train(state, x, None)[1]
    return jax.eval_shape(lambda state, x: adapter.train(state, x, None)[1], state, x)


def _require_same(adapter, old, new, dtype):
    """Refuses a state that a step has changed in structure, shape or dtype; of an opaque one, its statistics."""
    if not adapter.traceable:
        old, new = (dict(zip(("mean", "var"), adapter.statistics(state), strict=True)) for state in (old, new))
    (old_leaves, old_tree), (new_leaves, new_tree) = (jax.tree.flatten_with_path(tree) for tree in (old, new))
    if old_tree != new_tree:
        raise AssertionError(f"a step on {dtype} inputs changes the tree of the state: {old_tree} becomes {new_tree}")
    for (path, one), (_, other) in zip(old_leaves, new_leaves, strict=True):
        (shape, kind), (new_shape, new_kind) = ((jnp.shape(v), jnp.result_type(v)) for v in (one, other))
        if (shape, kind) != (new_shape, new_kind):
            raise AssertionError(
                f"a step on {dtype} inputs changes state{jax.tree_util.keystr(path)} "
                f"from {kind}{list(shape)} to {new_kind}{list(new_shape)}"
            )


def _require_scan(adapter):
    """Refuses a scan over steps that is not what the steps are one by one."""
    data = sample(SHAPES[0], std=ALIKE)
    state, xs = start(adapter, *data[:3]), np.stack([data.x, 2 * data.x, -data.x])
    last, ys = _scan(adapter, state, xs)
    for x, found in zip(xs, ys, strict=True):
        y, state = train(adapter, state, x)
        allowed = ROUNDINGS * EPS * magnitudes(adapter, data._replace(x=x))["y"]
        require_close("y of steps by lax.scan", found, y, allowed)
    magnitude = magnitudes(adapter, data._replace(x=xs[1]))
    found, expected = statistics(adapter, last), statistics(adapter, state)
    require_statistics("after steps by lax.scan", found, expected, magnitude, rounding=ROUNDINGS * EPS)
