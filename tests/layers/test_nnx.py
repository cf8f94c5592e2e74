"""The nnx layer in place of ``flax.nnx.BatchNorm``: same arguments, variables and behaviour."""

import copy
import functools
import inspect
import pickle

import chex
import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

import jaxbn
import jaxbn.linen
from jaxbn.nnx import BatchNorm

RNG = np.random.default_rng(0)
X = (2 * RNG.normal(size=(8, 4, 3)) + [0.0, 1.0, -3.0]).astype(np.float32)
MASK = RNG.random((8, 4, 1)) < 0.6
AFFINE = [(True, True), (True, False), (False, True), (False, False)]
# Flax takes the variance from raw sums: with mean^2 <= 3 var it loses two bits, and each side rounds some tens of
# times, at values of at most 10.
CLOSE = {"rtol": 0, "atol": 64 * 10 * np.finfo(np.float32).eps}

SIGNATURES = {cls: inspect.signature(cls.__init__).parameters for cls in (BatchNorm, nnx.BatchNorm)}


def layer_of(cls=BatchNorm, **options):
    """Returns a layer whose parameters and statistics are not the initial ones."""
    layer = cls(3, momentum=0.9, **options, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    random = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype), nnx.state(layer))
    nnx.update(layer, random)
    return layer


@nnx.jit
def call(layer, x, **options):
    return layer(x, **options)


def values(layer):
    return nnx.to_pure_dict(nnx.state(layer))


class Net(nnx.Module):
    """Linear, batch norm, Linear."""

    def __init__(self, norm, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.norm = norm(3, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(self.first(x)))


# Constructor


def test_arguments_are_flaxs_then_ours():
    own = ["method", "unbiased", "debias", "frozen", "accumulate"]
    assert list(SIGNATURES[BatchNorm]) == [*SIGNATURES[nnx.BatchNorm], *own]


@pytest.mark.parametrize("name", SIGNATURES[nnx.BatchNorm])
def test_argument_has_flaxs_kind_and_default(name):
    found, expected = (SIGNATURES[cls][name] for cls in (BatchNorm, nnx.BatchNorm))
    assert found.kind == expected.kind
    if not name.endswith("_init"):  # initializers are made anew by each call of zeros_init; compared below
        assert found.default == expected.default


def test_call_has_flaxs_arguments():
    found, expected = (inspect.signature(cls.__call__).parameters for cls in (BatchNorm, nnx.BatchNorm))
    assert [(p.name, p.kind, p.default) for p in found.values()] == [
        (p.name, p.kind, p.default) for p in expected.values()
    ]


def test_use_running_average_given_nowhere_is_refused():
    layer = BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"use_running_average must be True to evaluate or False to train, got None.*nnx\.view"
    ):
        layer(X)


def test_the_call_goes_before_the_constructor():
    layer = layer_of(use_running_average=True)
    before = values(layer)
    layer(X, use_running_average=False)
    assert not np.array_equal(values(layer)["mean"], before["mean"])


# Variables


@pytest.mark.parametrize(("use_scale", "use_bias"), AFFINE)
def test_state_is_flaxs(use_scale, use_bias):
    found, expected = (
        nnx.state(cls(3, use_scale=use_scale, use_bias=use_bias, rngs=nnx.Rngs(0)))
        for cls in (BatchNorm, nnx.BatchNorm)
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


def test_initialized_state_is_flaxs_for_custom_initializers_and_dtypes():
    options = {
        "scale_init": nnx.initializers.normal(1.0),
        "bias_init": nnx.initializers.uniform(1.0),
        "param_dtype": jnp.bfloat16,
    }
    found, expected = (nnx.state(cls(3, **options, rngs=nnx.Rngs(0))) for cls in (BatchNorm, nnx.BatchNorm))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


def test_variables_have_flaxs_types():
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    kinds = {name: type(getattr(layer, name)) for name in ("mean", "var", "scale", "bias")}
    assert kinds == {"mean": nnx.BatchStat, "var": nnx.BatchStat, "scale": nnx.Param, "bias": nnx.Param}


@pytest.mark.parametrize(("use_scale", "use_bias"), AFFINE)
def test_attributes_are_flaxs_then_ours(use_scale, use_bias):
    options = {"use_scale": use_scale, "use_bias": use_bias}
    found, expected = ({*vars(cls(3, **options, rngs=nnx.Rngs(0)))} for cls in (BatchNorm, nnx.BatchNorm))
    assert found - expected == {"method", "unbiased", "debias", "frozen", "accumulate"} and not expected - found


@pytest.mark.parametrize("option", [{"momentum": None}, {"debias": True}])
def test_averages_that_count_batches_add_steps(option):
    state = nnx.state(BatchNorm(3, **option, rngs=nnx.Rngs(0)), nnx.BatchStat)
    assert set(state) == {"mean", "var", "steps"}


# Values


@pytest.mark.parametrize("options", [{}, {"mask": MASK}, {"use_running_average": True}], ids=["train", "mask", "eval"])
def test_calls_are_close_to_flaxs(options):
    found, expected = layer_of(), layer_of(nnx.BatchNorm)
    step = nnx.jit(functools.partial(lambda layer, x, **options: layer(x, **options), **options))
    chex.assert_trees_all_close(step(found, X), step(expected, X), **CLOSE)
    chex.assert_trees_all_close(values(found), values(expected), **CLOSE)


def test_a_feature_axis_in_the_middle_is_close_to_flaxs():
    x = jnp.moveaxis(X, -1, 1)
    found, expected = layer_of(axis=1), layer_of(nnx.BatchNorm, axis=1)
    chex.assert_trees_all_close(call(found, x), call(expected, x), **CLOSE)
    chex.assert_trees_all_close(values(found), values(expected), **CLOSE)


def test_complex_inputs_have_a_complex_mean_and_a_real_variance():
    x = jnp.asarray(X + 1j * X[::-1])
    found, expected = layer_of(), jaxbn.linen.BatchNorm(momentum=0.9)
    variables = {
        "params": {name: getattr(found, name)[...] for name in ("scale", "bias")},
        "batch_stats": {name: getattr(found, name)[...] for name in ("mean", "var")},
    }
    y, updates = expected.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    chex.assert_trees_all_equal(found(x), y)
    assert (found.mean.dtype, found.var.dtype) == (jnp.complex64, jnp.float32)
    chex.assert_trees_all_equal({name: getattr(found, name)[...] for name in ("mean", "var")}, updates["batch_stats"])


def test_gradients_are_close_to_flaxs():
    def gradients(layer):
        @nnx.jit
        def of(layer, x):
            return nnx.grad(lambda layer, x: jnp.vdot(layer(x), X[::-1]), argnums=(0, 1))(layer, x)

        return jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.state(of(layer, X))))

    # The gradient of the scale sums 32 products of up to 10 * 10.
    chex.assert_trees_all_close(
        gradients(layer_of()), gradients(layer_of(nnx.BatchNorm)), rtol=0, atol=32 * CLOSE["atol"]
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_is_that_of_the_result(dtype):
    layer = layer_of(dtype=dtype)
    assert jax.eval_shape(lambda x: layer(x, use_running_average=True), X).dtype == dtype


def test_custom_promotion_is_called_on_all_arrays():
    given = []

    def promote(arrays, *, dtype):
        given.append(([None if array is None else array.shape for array in arrays], dtype))
        return arrays

    layer = layer_of(promote_dtype=promote, dtype=jnp.bfloat16, use_bias=False)
    layer(X, use_running_average=True)
    assert given == [([X.shape, (3,), (3,), (3,), None], jnp.bfloat16)]


def test_cumulative_average_is_the_mean_of_the_batches():
    layer = BatchNorm(3, momentum=None, rngs=nnx.Rngs(0))
    batches = [X, 2 * X + 1, X[::-1] - 4]
    for x in batches:
        call(layer, x)
    expected = np.mean([x.mean((0, 1), dtype=np.float64) for x in batches], axis=0)
    np.testing.assert_allclose(layer.mean[...], expected, **CLOSE)


def test_debiased_average_forgets_its_start():
    layer = BatchNorm(3, momentum=0.9, debias=True, rngs=nnx.Rngs(0))
    call(layer, X)
    np.testing.assert_allclose(layer.var[...], X.var((0, 1), dtype=np.float64), **CLOSE)


# Modes


def mode_by_method(layer, train):
    (layer.train if train else layer.eval)()
    return layer


def mode_by_view(layer, train):
    return nnx.view(layer, use_running_average=not train)


@pytest.mark.parametrize("mode", [mode_by_method, mode_by_view])
def test_evaluation_mode_leaves_the_statistics(mode):
    layer = mode(layer_of(), False)
    before = values(layer)
    layer(X)
    chex.assert_trees_all_equal(values(layer), before)


@pytest.mark.parametrize("mode", [mode_by_method, mode_by_view])
def test_training_mode_updates_the_statistics(mode):
    layer = mode(mode(layer_of(), False), True)
    before = values(layer)
    layer(X)
    assert not np.array_equal(values(layer)["mean"], before["mean"])


def test_a_view_shares_the_statistics():
    layer = layer_of(use_running_average=True)
    nnx.view(layer, use_running_average=False)(X)
    assert not np.array_equal(values(layer)["mean"], values(layer_of())["mean"])


def test_train_and_eval_reach_the_layers_of_a_model():
    net = Net(BatchNorm, nnx.Rngs(0))
    net.eval()
    assert net.norm.use_running_average
    net.train()
    assert not net.norm.use_running_average


def test_frozen_survives_train():
    layer = layer_of(frozen=True)
    before = values(layer)
    layer.train()
    y = layer(X, use_running_average=False)
    chex.assert_trees_all_equal(values(layer), before)
    chex.assert_trees_all_equal(y, layer(X, use_running_average=True))


def test_a_frozen_layer_need_not_be_told_to_evaluate():
    layer = layer_of(frozen=True, use_running_average=None)
    chex.assert_trees_all_equal(layer(X), layer(X, use_running_average=True))


# Checkpoints and copies


def test_a_state_from_flaxs_layer_loads():
    written = layer_of(nnx.BatchNorm)
    loaded = BatchNorm(3, rngs=nnx.Rngs(0))
    nnx.update(loaded, nnx.state(written))
    chex.assert_trees_all_equal(values(loaded), values(written))


def test_a_state_of_flaxs_model_merges_into_ours():
    written = Net(nnx.BatchNorm, nnx.Rngs(1))
    written(X)
    graph, _ = nnx.split(Net(BatchNorm, nnx.Rngs(0)))
    loaded = nnx.merge(graph, nnx.state(written))
    chex.assert_trees_all_equal(values(loaded), values(written))


def test_a_loaded_model_evaluates_as_in_flax():
    written, loaded = Net(nnx.BatchNorm, nnx.Rngs(1)), Net(BatchNorm, nnx.Rngs(0))
    call(written, X)
    nnx.update(loaded, nnx.state(written))
    written.eval()
    loaded.eval()
    chex.assert_trees_all_close(call(loaded, X), call(written, X), **CLOSE)


def test_a_deep_copy_has_its_own_statistics():
    layer = layer_of()
    before = values(layer)
    copy.deepcopy(layer)(X)
    chex.assert_trees_all_equal(values(layer), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, nnx.clone])
def test_a_copy_evaluates_alike(copied):
    layer = layer_of(use_running_average=True)
    chex.assert_trees_all_equal(call(copied(layer), X), call(layer, X))


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_pickling_keeps_the_layer(pickler):
    layer = layer_of(method=functools.partial(jaxbn.ghost_normalize, group_size=4), frozen=True)
    loaded = pickler.loads(pickler.dumps(layer))
    chex.assert_trees_all_equal(values(loaded), values(layer))
    chex.assert_trees_all_equal(call(loaded, X), call(layer, X))


# Transformations


def test_a_jitted_step_updates_the_layer_outside():
    layer, expected = layer_of(), layer_of()
    call(layer, X)
    expected(X)
    chex.assert_trees_all_close(values(layer), values(expected), **CLOSE)


def test_value_and_grad_updates_the_statistics_too():
    layer, expected = layer_of(), layer_of()

    @nnx.jit
    def step(layer, x):
        return nnx.value_and_grad(lambda layer: (layer(x) ** 2).mean())(layer)

    loss, gradients = step(layer, X)
    y = call(expected, X)
    np.testing.assert_allclose(loss, (y**2).mean(), **CLOSE)
    assert set(gradients) == {"scale", "bias"}
    chex.assert_trees_all_close(values(layer), values(expected), **CLOSE)


@nnx.split_rngs(splits=2)
@nnx.vmap(in_axes=(0,))
def stacked(rngs):
    return BatchNorm(3, momentum=0.9, scale_init=nnx.initializers.uniform(2.0), rngs=rngs)


def unstack(layers, i):
    graph, state = nnx.split(layers)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[i], state))


def test_scan_over_layers_gives_the_layers_in_turn():
    layers = stacked(nnx.Rngs(0))
    alone = [unstack(layers, i) for i in range(2)]

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def apply(layer, x):
        return x + layer(x)

    y, expected = apply(layers, X), X
    for layer in alone:
        expected = expected + call(layer, expected)
    chex.assert_trees_all_close(y, expected, **CLOSE)
    chex.assert_trees_all_close([values(unstack(layers, i)) for i in range(2)], [*map(values, alone)], **CLOSE)


def test_vmap_over_models_gives_each_model():
    layers, batches = stacked(nnx.Rngs(0)), jnp.stack([X, 2 * X - 1])
    alone = [unstack(layers, i) for i in range(2)]
    y = nnx.jit(nnx.vmap(lambda layer, x: layer(x)))(layers, batches)
    expected = jnp.stack([call(layer, x) for layer, x in zip(alone, batches, strict=True)])
    chex.assert_trees_all_close(y, expected, **CLOSE)
    chex.assert_trees_all_close([values(unstack(layers, i)) for i in range(2)], [*map(values, alone)], **CLOSE)


def test_remat_changes_neither_gradients_nor_statistics():
    def gradients(layer, wrap):
        @nnx.jit
        def of(layer):
            return nnx.grad(lambda layer: (wrap(lambda layer, x: layer(x))(layer, X) ** 2 * X[::-1]).sum())(layer)

        return nnx.to_pure_dict(nnx.state(of(layer)))

    rematted, plain = layer_of(), layer_of()
    found, expected = gradients(rematted, nnx.remat), gradients(plain, lambda f: f)
    chex.assert_trees_all_close(found, expected, rtol=0, atol=32 * CLOSE["atol"])
    chex.assert_trees_all_close(values(rematted), values(plain), **CLOSE)


def test_a_linen_layer_behind_the_bridge_gives_the_nnx_layers_bits():
    layer = BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))
    bridged = bridge.ToNNX(jaxbn.linen.BatchNorm(momentum=0.9), rngs=nnx.Rngs(0))
    bridged.lazy_init(X, use_running_average=False)
    y = bridged(X, use_running_average=False, mutable=["batch_stats"])
    chex.assert_trees_all_equal(y, layer(X))
    chex.assert_trees_all_equal(bridged.mean[...], layer.mean[...])


# Inspection and sharding


def test_tabulate_shows_the_layer_and_both_kinds_of_variable():
    table = nnx.tabulate(Net(BatchNorm, nnx.Rngs(0)), X, console_kwargs={"width": 200, "force_terminal": False})
    assert "BatchNorm" in table and "BatchStat" in table and "Param" in table


@pytest.mark.parametrize("show", [repr, str])
def test_the_text_of_a_layer_shows_its_options(show):
    text = show(BatchNorm(3, frozen=True, rngs=nnx.Rngs(0)))
    assert text.startswith("BatchNorm(") and "frozen=True" in text and "momentum=0.99" in text


def test_metadata_of_parameters_is_kept():
    layer = BatchNorm(3, scale_metadata={"of": "scale"}, bias_metadata={"of": "bias"}, rngs=nnx.Rngs(0))
    assert (layer.scale.of, layer.bias.of) == ("scale", "bias")


def test_partitioning_of_initializers_is_flaxs():
    options = {
        "scale_init": nnx.with_partitioning(nnx.initializers.ones_init(), ("model",)),
        "bias_init": nnx.with_partitioning(nnx.initializers.zeros_init(), ("model",)),
    }

    def specs(cls):
        with jax.set_mesh(jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))):
            return nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(cls(3, **options, rngs=nnx.Rngs(0)))))

    found = specs(BatchNorm)
    assert found == specs(nnx.BatchNorm)
    assert found["scale"] == jax.sharding.PartitionSpec("model")


def test_a_subclass_may_have_statistics_of_its_own():
    class Counting(BatchNorm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.calls = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.calls[...] += 1
            return super().__call__(x)

    layer = Counting(X.shape[-1], rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(layer(X), BatchNorm(X.shape[-1], rngs=nnx.Rngs(0))(X))
    assert layer.calls[...] == 1
