"""One right answer on every parallel API: a batch spread over eight devices is normalized as if it were in one piece.

The matrix: on every API, in every case, the loss, the output, the running statistics and the gradients are those of
the float64 oracle for the whole batch, or for each group of devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.parallel import psum_of_value_and_grad, value_and_grad_of_psum
from tests import reference
from tests.core import parallel

# Sums run over 12 values on a device and over 8 devices, 20 roundings of half a unit in the last place each.  The
# variance from raw sums may multiply those by 1 + mean^2/var, at most 5; the rest is what follows the sums.
TOLERANCE = (20 * 5 + 28) * 2**-24  # of the largest value of an array

DEVICES, PER_DEVICE, SHAPE = 8, 4, (32, 3, 4)
MOMENTUM = 0.9
RNG = np.random.default_rng(0)


def normal(mean, std, shape):
    return RNG.normal(mean, std, shape).astype(np.float32)


def rows(*valid):
    """Returns a mask whose devices have these numbers of valid examples."""
    return np.concatenate([np.arange(PER_DEVICE) < n for n in valid])[:, None, None]


# The means of the devices differ, as if each read another file.
SHIFT = np.repeat(normal(0, 1, (DEVICES, 1, 4)), PER_DEVICE, 0)
X = SHIFT + normal(1, 1, SHAPE)
WEIGHTS = normal(1, 1, SHAPE)
SCALE, BIAS = normal(1, 0.3, 4), normal(0, 1, 4)
STATS = jaxbn.BatchStats(np.array([1, -1, 0, 2], np.float32), np.array([4, 0.5, 2, 1], np.float32))
UNEQUAL = rows(4, 4, 4, 1, 2, 3, 4, 1)
EXAMPLES = np.arange(len(X)).reshape(DEVICES, PER_DEVICE)
FAR = (1e3 + X / X.std()).astype(np.float32)
HALF_FAR = np.concatenate([FAR[:16], X[16:]])
SPOILED = np.where(UNEQUAL | (np.arange(len(X)) // PER_DEVICE != 5)[:, None, None], X, np.float32(np.nan))
LIMITS = {"r_max": 1.2, "d_max": 0.3}  # of renorm; they bind for some features


def normalized(x, dy, mask):
    """Returns y and the gradients in x, scale and bias."""
    return reference.batch_norm(x, SCALE, BIAS, mask=mask)[0], reference.gradients(x, SCALE, BIAS, dy, mask=mask)


def renormalized(x, dy, mask):
    gradients = reference.renorm_gradients(x, *STATS, SCALE, BIAS, dy, **LIMITS, mask=mask)
    return reference.renorm(x, *STATS, SCALE, BIAS, **LIMITS, mask=mask)[0], gradients


@dataclasses.dataclass(frozen=True, eq=False)
class Way:
    """Who is normalized together, and how that is asked for.

    Attributes:
      options: for :func:`jaxbn.batch_norm` on a device; axis_name is that of all axes if they do not say.
      under_jit: options under jit, which knows of no devices; None if it cannot be asked for.
      axes: names of the device axes, and their sizes.
      together: numbers of the devices that are normalized together, row by row over ``axes``.
      group_size: number of a device's examples that are normalized together; None for all.
      varying: axes over which the running statistics differ.
      oracle: returns y and the gradients in x, scale and bias.
    """

    options: dict
    under_jit: dict | None
    axes: dict[str, int] = dataclasses.field(default_factory=lambda: {"d": DEVICES})
    together: Sequence[Sequence[int]] = (range(DEVICES),)
    group_size: int | None = None
    varying: tuple[str, ...] = ()
    oracle: Callable = normalized


def groups(*together, under_jit=None):
    return Way({"axis_index_groups": together}, under_jit, together=together, varying=("d",))


def ghost(group_size):
    return {"method": functools.partial(jaxbn.ghost_normalize, group_size=group_size)}


GRID, PAIRS = {"a": 4, "b": 2}, [(0, 1), (2, 3), (4, 5), (6, 7)]
RENORM = {"method": functools.partial(jaxbn.batch_renormalize, **LIMITS)}
ALL = Way({}, {})
ALONE = Way({"axis_name": None}, None, together=[(d,) for d in range(DEVICES)], varying=("d",))
INNER = Way({"axis_name": "b"}, ghost(8), axes=GRID, together=PAIRS, varying=("a",))
HALVES = groups((4, 5, 6, 7), (0, 1, 2, 3), under_jit=ghost(16))
GHOST_IN_HALVES = dataclasses.replace(HALVES, options=HALVES.options | ghost(2), under_jit=None, group_size=2)
UNEQUAL_GROUPS = groups((0, 3, 5), (1,), (2, 4, 6, 7))
CASES = {  # name: who is normalized together, x, mask
    "plain": (ALL, X, None),
    "large mean": (ALL, FAR, None),
    "mask with unequal counts": (ALL, X, UNEQUAL),
    "a device without a valid example": (ALL, X, rows(4, 4, 4, 1, 2, 0, 4, 1)),
    "masked NaN on a device": (ALL, SPOILED, UNEQUAL),
    "groups of equal size": (HALVES, X, None),
    "a group with a large mean": (HALVES, HALF_FAR, None),
    "groups of unequal size": (UNEQUAL_GROUPS, X, None),
    "a group without a valid example": (UNEQUAL_GROUPS, X, rows(4, 0, 4, 1, 2, 0, 4, 1)),
    "two axes, and a mask": (Way({}, {}, axes=GRID), X, UNEQUAL),
    "groups by the inner of two axes": (INNER, X, None),
    "no axis name": (ALONE, X, None),
    "ghost, and a mask": (Way(ghost(2), ghost(2), group_size=2), X, UNEQUAL),
    "ghost, and groups for the statistics": (GHOST_IN_HALVES, X, UNEQUAL),
    "renorm, and a mask": (Way(RENORM, RENORM, oracle=renormalized), X, UNEQUAL),
}
WITHOUT_DEVICES = {
    "jit, Auto": functools.partial(parallel.under_jit, axis_type="Auto"),
    "jit, Explicit": functools.partial(parallel.under_jit, axis_type="Explicit"),
}
WITH_DEVICES = {
    "shard_map, checked": functools.partial(parallel.under_shard_map, check_vma=True),
    "shard_map, unchecked": functools.partial(parallel.under_shard_map, check_vma=False),
    "shard_map, Explicit": functools.partial(parallel.under_shard_map, check_vma=True, axis_type="Explicit"),
    "pmap": parallel.under_pmap,
    "vmap": parallel.under_vmap,
}
# The fast rows take every way through the library once, and a compilation each; the others combine the same ways.
ALWAYS = "plain", "large mean", "mask with unequal counts"
FAST = {
    "jit, Auto": {*ALWAYS, "ghost, and a mask"},
    "jit, Explicit": {*ALWAYS, "groups of equal size"},
    "shard_map, checked": {*CASES} - {"no axis name", "groups by the inner of two axes", "groups of unequal size"},
    # Unlike in the other rows, JAX adds within groups here.
    "shard_map, unchecked": {"groups of equal size", "a group with a large mean"},
    "vmap": {"mask with unequal counts", "groups of equal size"},
}


def row(api, case):
    return pytest.param(api, case, marks=[] if case in FAST.get(api, ()) else pytest.mark.slow)


MATRIX = [row(api, case) for case in CASES for api in WITHOUT_DEVICES if CASES[case][0].under_jit is not None]
MATRIX += [row(api, case) for case in CASES for api in WITH_DEVICES]


def share_of_the_loss(params, x, rest, *, names, apply):
    """A device's share of the mean over the valid examples of sum(weights * y); and y and the statistics."""
    (scale, bias, offset), (mask, weights) = params, rest
    # The gradient in x is that of an offset that the devices hold in common, as they do the weights of layers below.
    if names:
        offset = offset.reshape(-1, *x.shape)[lax.axis_index(names)]
    y, stats = apply(x + offset, scale, bias, mask)
    losses = (weights * y).sum((1, 2))
    valid = np.ones(len(x), bool) if mask is None else mask[:, 0, 0]
    count = lax.psum(valid.sum(), names) if names else valid.sum()
    return jnp.where(valid, losses, 0).sum() / count, (y, stats)


def function(x, scale, bias, mask, **options):
    options |= {"use_running_average": False, "momentum": MOMENTUM, "mask": mask}
    return jaxbn.batch_norm(x, STATS, scale, bias, **options)


@functools.cache
def step(api, way, front_end=function):
    """Returns the training step, compiled once for all batches."""
    if api in WITHOUT_DEVICES:
        share = functools.partial(share_of_the_loss, names=(), apply=functools.partial(front_end, **way.under_jit))
        return WITHOUT_DEVICES[api](share, way.axes)
    names = tuple(way.axes)
    options = {"axis_name": names if len(names) > 1 else names[0]} | way.options
    share = functools.partial(share_of_the_loss, names=names, apply=functools.partial(front_end, **options))
    return WITH_DEVICES[api](share, way.axes, way.varying)


def computed(api, case, front_end=function):
    """Returns loss, y, statistics (a row for each place where they may differ) and gradients in scale, bias and x."""
    way, x, mask = CASES[case]
    params = SCALE, BIAS, np.zeros(SHAPE, np.float32)
    return jax.device_get(step(api, way, front_end)(params, x, (mask, WEIGHTS)))


def expected(api, case):
    """Returns the same from the oracle, with a row of statistics for each device."""
    way, x, mask = CASES[case]
    mask = np.broadcast_to(True if mask is None else mask, (len(x), 1, 1))
    dy = np.where(mask, WEIGHTS, 0) / mask.sum()
    y, dx, dscale, dbias = np.empty(SHAPE), np.empty(SHAPE), np.zeros(4), np.zeros(4)
    for devices in way.together:
        for part in EXAMPLES[list(devices)].reshape(-1, way.group_size or len(devices) * PER_DEVICE):
            y[part], (dx[part], *parameters) = way.oracle(x[part], dy[part], mask[part])
            dscale, dbias = dscale + parameters[0], dbias + parameters[1]
    mean, var = np.empty((2, DEVICES, 4))
    # jit knows of no devices: there the statistics are those of all groups together.
    for devices in [range(DEVICES)] if api in WITHOUT_DEVICES else way.together:
        part = EXAMPLES[list(devices)].ravel()
        moments = reference.moments(x[part], mask=mask[part])
        mean[list(devices)], var[list(devices)] = reference.update(*STATS, *moments, momentum=MOMENTUM)
    return (dy * y).sum(), y, (mean, var), (dscale, dbias, dx)


def errors(api, case):
    """Returns the largest error of each quantity, over the largest value of the expected array."""
    loss, y, stats, grads = computed(api, case)
    got = loss, y, *(np.repeat(s, DEVICES // len(s), 0) for s in stats), *grads
    loss, y, stats, grads = expected(api, case)
    want = loss, y, *stats, *grads
    chex.assert_trees_all_equal_shapes(got, want)
    relative = (np.abs(g - w).max() / np.abs(w).max() for g, w in zip(got, want, strict=True))
    return dict(zip(("loss", "y", "mean", "var", "dscale", "dbias", "dx"), relative, strict=True))


@pytest.mark.parametrize(("api", "case"), MATRIX)
def test_on_every_api_a_batch_over_devices_is_normalized_as_if_in_one_piece(api, case):
    found = errors(api, case)
    wrong = {name: f"{error:.1e}" for name, error in found.items() if not error <= TOLERANCE}
    assert not wrong, f"relative errors above {TOLERANCE:.1e}: {wrong}"


PAIRED = [[0, 1], [2, 3]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [tuple(map(tuple, PAIRED)), np.array(PAIRED), [range(2), range(2, 4)], "iterators"],
    ids=lambda given: type(given).__name__,
)
@pytest.mark.parametrize("method", [jaxbn.batch_normalize, functools.partial(jaxbn.ghost_normalize, group_size=2)])
def test_groups_may_be_any_sequences_or_iterators(given, method):
    def moments_of(groups):
        normalize = functools.partial(method, axis_name="d")
        return jax.vmap(lambda x: normalize(x, axis_index_groups=groups)[1], axis_name="d")(X.reshape(4, 8, 3, 4))

    given = zip(*[iter(range(4))] * 2, strict=True) if isinstance(given, str) else given
    chex.assert_trees_all_equal(moments_of(given), moments_of(PAIRED))


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [False, True])
def test_second_derivatives_with_groups_are_those_of_the_groups_alone(check_vma):
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    groups = [[0, 3, 5], [1, 2, 4, 6, 7]]

    def loss(x, options):
        y, _ = jaxbn.batch_normalize(x, SCALE, BIAS, **options)
        return (jnp.sin(y) * np.arange(1, 5, dtype=np.float32)).sum()

    def product(x, v, **options):
        return jax.jvp(jax.grad(lambda x: loss(x, options)), (x,), (v,))[1]

    over_devices = jax.shard_map(
        functools.partial(product, axis_name="d", axis_index_groups=groups),
        mesh=mesh,
        in_specs=P("d"),
        out_specs=P("d"),
        check_vma=check_vma,
    )
    found = jax.jit(over_devices)(X, WEIGHTS)
    for group in groups:
        part = EXAMPLES[group].ravel()
        expected = jax.jit(product)(X[part], WEIGHTS[part])
        np.testing.assert_allclose(found[part], expected, rtol=0, atol=TOLERANCE * abs(expected).max())


# Other claims of the page on parallel APIs


def linen(x, scale, bias, mask, **options):
    layer = jaxbn.linen.BatchNorm(use_running_average=False, momentum=MOMENTUM, **options)
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": STATS._asdict()}
    y, updates = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, jaxbn.BatchStats(**updates["batch_stats"])


def nnx_layer(x, scale, bias, mask, **options):
    layer = jaxbn.nnx.BatchNorm(len(scale), momentum=MOMENTUM, rngs=nnx.Rngs(0), **options)
    for variable, value in ((layer.scale, scale), (layer.bias, bias), (layer.mean, STATS.mean), (layer.var, STATS.var)):
        variable.set_value(jnp.asarray(value))
    return layer(x, mask=mask), jaxbn.BatchStats(layer.mean[...], layer.var[...])


@pytest.mark.parametrize("front_end", [linen, pytest.param(nnx_layer, marks=pytest.mark.slow)])
def test_the_layers_give_the_bits_of_the_function_on_devices_too(front_end):
    cell = "shard_map, checked", "mask with unequal counts"
    chex.assert_trees_all_equal(computed(*cell, front_end), computed(*cell))


def with_averages(x, scale, bias, mask, **options):
    y, stats = function(x, scale, bias, mask, **options)
    return y, (stats, lax.pmean(stats, options["axis_name"]))


@pytest.mark.parametrize("api", ["shard_map, checked", pytest.param("pmap", marks=pytest.mark.slow)])
def test_averaging_the_running_statistics_over_devices_changes_no_more_than_the_sum_rounds(api):
    _, _, (stats, averages), _ = computed(api, "mask with unequal counts", with_averages)
    chex.assert_trees_all_close(averages, stats, rtol=DEVICES * 2**-24, atol=0)


@pytest.mark.parametrize("check_vma", [pytest.param(True, marks=pytest.mark.slow), False])
def test_with_a_psum_too_many_the_gradient_is_as_many_times_too_large_as_there_are_devices(check_vma):
    share = functools.partial(share_of_the_loss, names=("d",), apply=functools.partial(function, axis_name="d"))

    def part(*arguments):
        if check_vma:  # JAX has added the gradients already
            return lax.psum(value_and_grad_of_psum(share, "d", has_aux=True)(*arguments)[1], "d")
        # Unchecked, the derivative of a psum is a psum, of which each device has the same cotangent.
        return psum_of_value_and_grad(lambda *a: lax.psum(share(*a)[0], "d"), "d")(*arguments)[1]

    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    part = jax.shard_map(part, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P(), check_vma=check_vma)
    grads = jax.jit(part)((SCALE, BIAS, np.zeros(SHAPE, np.float32)), X, (None, WEIGHTS))
    for wrong, right in zip(grads, expected("shard_map, checked", "plain")[-1], strict=True):
        np.testing.assert_allclose(wrong, DEVICES * right, rtol=0, atol=TOLERANCE * DEVICES * abs(right).max())
