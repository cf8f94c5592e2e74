"""One training step on every parallel API of JAX: how to differentiate, which axes to name, and what it returns.

``share(params, ...)`` returns a device's share of the loss of the whole batch, and what else is wanted of the forward
pass.  The share is the sum of the losses of the device's examples, over the number of examples on all devices: shares
add up to the mean loss, however many valid examples each device has.
"""

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn.parallel import psum_of_value_and_grad, value_and_grad_of_psum

# Adapters.  Each makes a step(params, x, rest) on whole arrays, examples first, which returns loss, y, statistics and
# gradients, of a share whose aux is (y, statistics).  `axes` maps the names of the device axes to their sizes;
# `varying` has those over which the statistics differ, which get a new first axis with a row for each place there.


def under_jit(loss, axes, varying=(), *, axis_type):
    """Only the batch is spread; the program, and so the gradient, is that of one device."""
    del varying
    return _placed(_with_rows(jax.value_and_grad(loss, has_aux=True)), _mesh(axes, axis_type))


def under_shard_map(share, axes, varying=(), *, axis_type="Auto", check_vma):
    """Where JAX checks that they are the same everywhere, statistics leave by P(); unchecked, every device's leave."""
    mesh, names = _mesh(axes, axis_type), tuple(axes)
    differentiate = value_and_grad_of_psum if check_vma else psum_of_value_and_grad
    step = jax.shard_map(
        _with_rows(differentiate(share, names, has_aux=True)),
        mesh=mesh,
        in_specs=(P(), P(names), P(names)),
        out_specs=(P(), P(names), P(varying if check_vma else names), P()),
        check_vma=check_vma,
    )
    return _placed(step, mesh)


def under_pmap(share, axes, varying=()):
    """The first axis is one of devices and the others of vmap; unchecked as it is, every device's statistics leave."""
    outer, *inner = axes
    return _split(_mapped(share, axes, {outer, *varying}, {outer: jax.pmap} | dict.fromkeys(inner, jax.vmap)), axes)


def under_vmap(share, axes, varying=()):
    """The devices are parts of one array; JAX checks that what leaves by None is the same for all."""
    return _split(jax.jit(_mapped(share, axes, varying, dict.fromkeys(axes, jax.vmap))), axes)


def _with_rows(value_and_grad):
    def step(params, x, rest):
        (loss, (y, stats)), grads = value_and_grad(params, x, rest)
        return loss, y, jax.tree.map(lambda s: s[None], stats), grads

    return step


def _mesh(axes, axis_type):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType[axis_type],) * len(axes))


def _placed(step, mesh):
    """Returns ``step`` compiled, for arrays that it spreads over the mesh itself."""
    step = jax.jit(step)
    whole, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names))

    def call(params, x, rest):
        return step(jax.device_put(params, whole), *jax.device_put((x, rest), spread))

    return call


def _mapped(share, axes, varying, maps):
    step = _with_rows(psum_of_value_and_grad(share, tuple(axes), has_aux=True))
    for name in reversed(axes):
        row = 0 if name in varying else None
        step = maps[name](step, in_axes=(None, 0, 0), out_axes=(None, 0, row, None), axis_name=name)
    return step


def _split(step, axes):
    """Returns the mapped ``step`` for arrays that it splits and joins itself."""

    def call(params, x, rest):
        split = jax.tree.map(lambda v: v.reshape(*axes.values(), -1, *v.shape[1:]), (x, rest))
        loss, y, stats, grads = jax.device_get(step(params, *split))
        return loss, y.reshape(x.shape), jax.tree.map(lambda s: s.reshape(-1, s.shape[-1]), stats), grads

    return call
