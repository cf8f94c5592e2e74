"""Models as others write them pass through every operation on trained models, and train on afterward."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import calibrate, surgery
from tests.models.third_party import NETS

pytestmark = pytest.mark.slow

PLATFORMS = ("cpu", "cuda", "tpu")
OPERATIONS = {
    "freeze": surgery.freeze,
    "replace": surgery.replace,
    "alone": functools.partial(surgery.replace, axis_name=None),
    "synchronized": functools.partial(surgery.replace, axis_name="batch"),
    "ghost": functools.partial(surgery.replace, method=functools.partial(jaxbn.ghost_normalize, group_size=3)),
    "renorm": functools.partial(
        surgery.replace, method=functools.partial(jaxbn.batch_renormalize, r_max=1e3, d_max=1e3)
    ),
    "to_affine": surgery.to_affine,
    "group norm": functools.partial(surgery.replace_by_group_norm, num_groups=2),
    "fold": surgery.fold,
}


def each(*operations):
    """Parametrizes a test by model and operation."""
    return pytest.mark.parametrize(("name", "operation"), [*itertools.product(NETS, operations)])


@functools.cache
def net_named(name):
    return NETS[name]()


@functools.cache
def operated(name, operation):
    """Returns a model, its description and arrays before an operation, and the result of the operation."""
    net = net_named(name)
    before = described(net), arrays(net.model, net.variables)
    done = OPERATIONS[operation](net.model, net.variables, net.x, call=net.evaluate)
    return SimpleNamespace(net=net, before=before, done=done)


def described(net):
    return nnx.graphdef(net.model) if net.variables is None else repr(net.model)


def arrays(model, variables):
    def array(leaf):
        return np.array(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    return jax.tree.map(array, nnx.state(model) if variables is None else variables)


def parameters(model, variables):
    """Returns the parameters, the other arrays, and ``apply(params, rest, x, call)``: outputs and new statistics."""
    if variables is None:
        definition, params, rest = nnx.split(model, nnx.Param, ...)

        def apply(params, rest, x, call):
            merged = nnx.merge(definition, params, rest, copy=True)
            y = call(merged, x)
            return y, nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat))

        return params, rest, apply

    def apply(params, rest, x, call):
        y, updates = model.apply({"params": params, **rest}, x, method=call, mutable=["batch_stats"])
        return y, updates.get("batch_stats", {})

    return variables["params"], {name: tree for name, tree in variables.items() if name != "params"}, apply


def run(model, variables, x, call, parts=1):
    """Returns outputs and new statistics for a batch that is split into parts on an axis named "batch"."""
    params, rest, apply = parameters(model, variables)

    @jax.jit
    def over_parts(params, rest, x):
        x = x.reshape(parts, -1, *x.shape[1:])
        y, stats = jax.vmap(lambda x: apply(params, rest, x, call), axis_name="batch")(x)
        return y.reshape(-1, *y.shape[2:]), jax.tree.map(lambda leaf: leaf.mean(0), stats)

    return over_parts(params, rest, x)


@functools.cache
def evaluated(name):
    """Returns the outputs of a model in evaluation."""
    net = net_named(name)
    return np.asarray(run(net.model, net.variables, net.x, net.evaluate)[0])


@functools.cache
def trained(name, operation, parts):
    """Returns outputs and new statistics in training after an operation, or of the original model for None."""
    net = net_named(name)
    model, variables = net[:2] if operation is None else operated(name, operation).done[:2]
    return run(model, variables, net.x, net.train, parts)


def assert_close(actual, desired, tolerance=1e-5):
    # float32 in another order: some roundings in each of ten layers, relative to the largest value.
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

    jax.tree.map(close, actual, desired)


@pytest.mark.parametrize("name", NETS)
def test_outputs_depend_on_the_batch(name):
    assert np.ptp(evaluated(name), axis=0).min() > 0.01


@each(*OPERATIONS)
def test_the_original_model_stays_as_it_is(name, operation):
    net = operated(name, operation).net
    description, before = operated(name, operation).before
    assert described(net) == description
    after = arrays(net.model, net.variables)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert jax.tree.all(jax.tree.map(np.array_equal, after, before))


@each(*OPERATIONS)
def test_every_batch_norm_is_operated_on_or_listed_with_the_reason(name, operation):
    net, done = operated(name, operation).net, operated(name, operation).done
    assert done.kept == (net.kept if operation == "fold" else {})
    assert len({*done.layers, *done.kept}) == len(done.layers) + len(done.kept) == net.batch_norms


@each(*OPERATIONS)
def test_outputs_in_evaluation_stay_except_with_group_norm(name, operation):
    net, done = operated(name, operation).net, operated(name, operation).done
    outputs, before = run(*done[:2], net.x, net.evaluate)[0], evaluated(name)
    if operation == "group norm":
        assert np.isfinite(outputs).all() and abs(outputs - before).max() > 0.01 * abs(before).max()
        assert done.difference > 0.01 * done.scale
    else:
        assert_close(outputs, before)
        assert done.difference <= 1e-5 * done.scale


@each("replace")
def test_replaced_layers_train_as_the_original_ones(name, operation):
    assert_close(trained(name, operation, 2), trained(name, None, 2))


@each("freeze")
def test_a_frozen_model_trains_on_its_outputs_in_evaluation_and_keeps_its_statistics(name, operation):
    outputs, stats = trained(name, operation, 1)
    assert_close(outputs, evaluated(name))
    model, variables = operated(name, operation).done[:2]
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)) if variables is None else variables["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, stats, before)


@each("synchronized")
def test_synchronized_halves_train_as_the_whole_batch(name, operation):
    assert_close(trained(name, operation, 2), trained(name, "alone", 1))


@each("ghost")
def test_ghost_groups_train_as_parts_alone(name, operation):
    assert_close(trained(name, operation, 1)[0], trained(name, "alone", 2)[0])


@each("renorm")
def test_renorm_within_its_limits_trains_on_the_outputs_in_evaluation(name, operation):
    assert_close(trained(name, operation, 1)[0], evaluated(name))


@each("freeze", "replace", "to_affine")
def test_a_step_of_training_moves_every_kernel_and_scale_and_lowers_the_loss(name, operation):
    net, done = operated(name, operation).net, operated(name, operation).done
    params, rest, apply = parameters(*done[:2])

    def loss_of(params):
        y, _ = jax.vmap(lambda x: apply(params, rest, x, net.train), axis_name="batch")(net.x[None])
        return jnp.square(y - 1).mean()

    @jax.jit
    def step(params):
        loss, gradients = jax.value_and_grad(loss_of)(params)
        return loss, jax.tree.map(lambda value, gradient: value - 1e-3 * gradient, params, gradients)

    loss, moved = step(params)
    assert step(moved)[0] < loss
    leaves = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(moved), strict=True)
    # A bias before a batch norm is subtracted with the mean, and so has no gradient.
    still = {jax.tree_util.keystr(path) for (path, old), new in leaves if jnp.array_equal(new, old)}
    assert all("bias" in path for path in still)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("way", ["layer by layer", "one pass"])
def test_a_calibrated_model_evaluates_as_it_trains_on_all_the_data(name, way):
    net = net_named(name)
    if way == "one pass":
        calibrated = calibrate.one_pass(net.model, net.variables, [net.x], call=net.evaluate)
    else:
        calibrated = calibrate.layer_by_layer(net.model, net.variables, [net.x[:4], net.x[4:]], call=net.evaluate)
    model, variables = (calibrated, None) if net.variables is None else (net.model, calibrated)
    assert_close(run(model, variables, net.x, net.evaluate)[0], trained(name, None, 1)[0])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="compares on the CPU")
@each("fold")
def test_a_folded_model_survives_an_export_for_every_platform(name, operation):
    net, done = operated(name, operation).net, operated(name, operation).done
    params, rest, apply = parameters(*done[:2])
    function = jax.jit(lambda x: apply(params, rest, x, net.evaluate)[0])
    exported = jax.export.export(function, platforms=PLATFORMS)(net.x)
    try:
        copy = jax.export.deserialize(exported.serialize())
    except ImportError as error:
        pytest.skip(f"newer versions of JAX need a package for this: {error}")
    assert copy.platforms == PLATFORMS
    assert_close(copy.call(net.x), function(net.x))
    assert_close(copy.call(net.x), evaluated(name))
