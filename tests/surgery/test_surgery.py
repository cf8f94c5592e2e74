"""Surgery on whole models, linen and nnx: what changes, what stays, and what is refused."""

import functools
import pickle
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn import surgery
from tests.surgery.test_folding import randomized, variables_of

X = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4, 4, 3)), jnp.float32)
GHOST = functools.partial(jaxbn.ghost_normalize, group_size=4)
ZEROS = nn.initializers.zeros  # random values are put in later


class LinenNet(nn.Module):
    """The train flag goes to the constructor of one batch norm, and to the call of the other."""

    def setup(self):
        self.conv = nn.Conv(4, (3, 3))
        self.dense = nn.Dense(6)
        self.second = nn.BatchNorm(momentum=0.9, epsilon=1e-3)

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="first")(self.conv(x)))
        return self.head(self.second(self.dense(x), not train))

    def head(self, x):
        return x.mean((1, 2))


class NnxNet(nnx.Module):
    def __init__(self):
        options = {"kernel_init": ZEROS, "rngs": nnx.Rngs(0)}
        self.conv = nnx.Conv(3, 4, (3, 3), **options)
        self.first = nnx.BatchNorm(4, rngs=options["rngs"])
        self.rest = nnx.Sequential(
            nnx.Linear(4, 6, **options), nnx.BatchNorm(6, momentum=0.9, epsilon=1e-3, rngs=options["rngs"])
        )
        self.again = nnx.Dict(first=self.first)  # the same object, kept in another place

    def __call__(self, x):
        return self.rest(nnx.relu(self.again["first"](self.conv(x)))).mean((1, 2))


def linen_net():
    return LinenNet(), variables_of(LinenNet(), X)


def nnx_net():
    net = NnxNet()
    nnx.update(net, randomized(nnx.state(net)))
    return net, None


NETS = {"linen": linen_net, "nnx": nnx_net}
PATHS = {"linen": ("first", "second"), "nnx": ("again/first", "rest/layers/1")}
OPERATIONS = {
    "replace": surgery.replace,
    "synchronised": functools.partial(surgery.replace, axis_name="data"),
    "ghost": functools.partial(surgery.replace, method=GHOST),
    "renorm": functools.partial(surgery.replace, method=jaxbn.batch_renormalize),
    "debias": functools.partial(surgery.replace, debias=True, steps=100),
    "freeze": surgery.freeze,
    "to_affine": surgery.to_affine,
    "to_affine, fixed": functools.partial(surgery.to_affine, learnable=False),
    "fold": surgery.fold,
    "group norm": functools.partial(surgery.replace_by_group_norm, num_groups=2),
}


def output(net, variables, train=False):
    """Returns the output and the statistics after it."""
    if variables is None:
        net = nnx.clone(net)
        net.train() if train else net.eval()
        return net(X), nnx.state(net, nnx.BatchStat)
    y, updates = net.apply(variables, X, train, mutable=["batch_stats"])
    return y, updates.get("batch_stats", {})


def arrays(net, variables):
    return jax.tree.map(np.array, nnx.state(net) if variables is None else variables)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


FAST = {"replace", "freeze", "to_affine", "fold"}  # the others go the same ways
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in OPERATIONS]


@functools.cache
def operated(framework, operation):
    """Returns a net, its variables, a description and a copy of both from before an operation, and what it returned."""
    net, variables = NETS[framework]()
    description, copy = describe(net, variables), arrays(net, variables)
    return net, variables, description, copy, OPERATIONS[operation](net, variables, X)


def describe(net, variables):
    return nnx.graphdef(net) if variables is None else repr(net)


@pytest.mark.parametrize("operation", EACH)
@pytest.mark.parametrize("framework", NETS)
def test_the_model_that_is_given_stays_as_it_is(framework, operation):
    net, variables, description, copy, done = operated(framework, operation)
    assert_equal(arrays(net, variables), copy)
    assert describe(net, variables) == description
    assert sorted(done.layers) == sorted(PATHS[framework]) and done.kept == {}


@pytest.mark.parametrize("operation", EACH)
@pytest.mark.parametrize("framework", NETS)
def test_the_difference_is_that_of_the_outputs_in_evaluation(framework, operation):
    net, variables, _, _, done = operated(framework, operation)
    before, after = output(net, variables)[0], output(done.model, done.variables)[0]
    assert done.scale == pytest.approx(float(abs(before).max()), rel=1e-5)
    assert done.difference == pytest.approx(float(abs(before - after).max()), abs=1e-5 * done.scale)
    if operation == "group norm":
        assert done.difference > 0.1 * done.scale
    else:
        assert done.difference <= 1e-5 * done.scale


@pytest.mark.parametrize("framework", NETS)
def test_frozen_statistics_stay_in_training_and_others_move(framework):
    net, variables = NETS[framework]()
    _, moved = output(net, variables, train=True)
    done = surgery.freeze(net, variables, X, layers=PATHS[framework][0])
    y, after = output(done.model, done.variables, train=True)
    first, second = (jax.tree.leaves(tree) for tree in (after, moved))
    start = jax.tree.leaves(nnx.state(net, nnx.BatchStat) if variables is None else variables["batch_stats"])
    stayed = [np.array_equal(a, b) for a, b in zip(first, start, strict=True)]
    assert stayed == [True, True, False, False]
    assert not any(np.array_equal(a, b) for a, b in zip(second, start, strict=True))
    frozen = surgery.freeze(net, variables, X)
    np.testing.assert_array_equal(
        output(frozen.model, frozen.variables, train=True)[0], output(frozen.model, frozen.variables)[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("framework", NETS)
def test_freezing_is_undone(framework):
    net, variables = NETS[framework]()
    frozen = surgery.freeze(net, variables, X)
    free = surgery.replace(frozen.model, frozen.variables, X, frozen=False)
    ours = surgery.replace(net, variables, X)
    for train in (True, False):
        assert_equal(output(free.model, free.variables, train), output(ours.model, ours.variables, train))


@pytest.mark.slow
@pytest.mark.parametrize("framework", NETS)
def test_ghost_groups_normalise_separately_in_training(framework):
    net, variables = NETS[framework]()
    done = surgery.replace(net, variables, X, method=GHOST)
    parts = [X[:4], X[4:]]
    whole, _ = output(done.model, done.variables, train=True)
    if variables is None:
        net.train()
        alone = jnp.concatenate([nnx.clone(net)(part) for part in parts])
    else:
        alone = jnp.concatenate([net.apply(variables, part, True, mutable=["batch_stats"])[0] for part in parts])
    np.testing.assert_allclose(whole, alone, rtol=0, atol=2e-5 * abs(alone).max())


def test_replaced_layers_keep_their_settings():
    net, _ = nnx_net()
    done = surgery.replace(net, None, X, axis_name="data", unbiased=True)
    layer = done.model.rest.layers[1]
    assert isinstance(layer, jaxbn.nnx.BatchNorm)
    assert (layer.momentum, layer.epsilon, layer.axis_name, layer.unbiased) == (0.9, 1e-3, "data", True)
    assert done.model.again["first"] is done.model.first


@pytest.mark.parametrize("operation", ["replace", "to_affine", "fold"])
def test_what_a_variable_knows_besides_its_value_survives(operation):
    class Fixed(nnx.Param):
        pass

    net, _ = nnx_net()
    net.first.scale = Fixed(net.first.scale[...], note="kept")
    net.conv.kernel = Fixed(net.conv.kernel[...], note="kept")
    done = OPERATIONS[operation](net, None, X)
    assert done.difference <= 1e-5 * done.scale
    variables = [done.model.conv.kernel] + ([done.model.first.scale] if operation != "fold" else [])
    assert all(type(v) is Fixed and v.get_metadata()["note"] == "kept" for v in variables)


@pytest.mark.parametrize("operation", ["replace", "to_affine", "fold"])
def test_sharding_of_linen_variables_survives(operation):
    kernel_init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    scale_init = nn.with_partitioning(nn.initializers.ones, ("model",))
    net = nn.Sequential([nn.Dense(4, kernel_init=kernel_init), nn.BatchNorm(True, scale_init=scale_init)])
    variables = net.init(jax.random.key(0), X)
    done = OPERATIONS[operation](net, variables, X)
    before, after = (nn.get_partition_spec(v["params"]) for v in (variables, done.variables))
    assert after["layers_0"]["kernel"] == before["layers_0"]["kernel"] == jax.P(None, "model")
    assert operation == "fold" or after["layers_1"]["scale"] == jax.P("model")


def test_an_nnx_model_is_looked_at_in_evaluation():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.dense, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dropout(self.dense(x)))

    net = Net()
    done = surgery.fold(net, None, X)
    assert done.layers == ("norm",) and done.difference <= 1e-5 * done.scale
    assert not net.dropout.deterministic and not net.norm.use_running_average


def test_the_difference_is_that_of_the_layers_themselves():
    net = nnx.BatchNorm(3, use_running_average=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    net.mean[...] = jnp.full(3, 100.3)
    done = surgery.replace(net, None, X + 100)  # Flax's rounds mean and inputs to bfloat16 first
    assert done.difference == float(abs(net(X + 100) - done.model(X + 100)).astype(jnp.float32).max()) > 0.1


def test_an_edited_linen_model_has_the_variables_and_methods_of_the_model():
    net, variables = linen_net()
    done = surgery.replace(net, variables, X)
    assert_equal(done.model.init(jax.random.key(0), X), net.init(jax.random.key(0), X))
    y = jnp.ones((2, 4, 4, 6))
    np.testing.assert_array_equal(done.model.apply(variables, y, method="head"), y.mean((1, 2)))


def test_an_edited_linen_model_is_applied_as_the_model():
    net, variables = linen_net()
    done = surgery.replace(net, variables, X, call=lambda module, x: module.second(module.dense(module.conv(x)), True))
    assert done.layers == ("second",)
    for method in (LinenNet.head, lambda module, x: module.head(x)):
        np.testing.assert_array_equal(done.model.apply(variables, X, method=method), X.mean((1, 2)))
    again = pickle.loads(pickle.dumps(done.model))
    np.testing.assert_array_equal(again.apply(variables, X), done.model.apply(done.variables, X))


class Twins(nn.Module):
    one: nn.Module

    @nn.compact
    def __call__(self, x, train=False):
        return self.one(x, train) - self.one(2 * x, train)


@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(name, marks=() if name == "freeze" else pytest.mark.slow)
        for name in OPERATIONS
        if name not in ("fold", "group norm")
    ],
)
def test_an_edited_linen_model_is_a_part_of_another_that_is_operated_on(operation):
    net, variables = linen_net()
    frozen = surgery.freeze(net, variables, X)
    nested = {collection: {"one": tree} for collection, tree in frozen.variables.items()}
    expected = net.apply(variables, X, False) - net.apply(variables, 2 * X, False)
    done = OPERATIONS[operation](Twins(frozen.model), nested, X)
    assert done.layers == ("one/first", "one/second")
    for model, arrays in ((Twins(frozen.model), nested), (done.model, done.variables)):
        found = model.apply(arrays, X)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())
    thawed = surgery.replace(Twins(frozen.model), nested, X, frozen=False)
    _, after = thawed.model.apply(thawed.variables, X, True, mutable=["batch_stats"])
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), after["batch_stats"], nested["batch_stats"])
    assert all(jax.tree.leaves(moved))


def test_another_thread_sees_nothing_of_an_edited_model_that_is_called():
    net, variables = linen_net()
    frozen = surgery.freeze(net, variables, X)
    alone = surgery.replace(net, variables, X).layers
    inside, finish = threading.Event(), threading.Event()

    def wait(module, x):
        inside.set()
        finish.wait(60)
        return module(x)

    def serve():
        with frozen.model._exchanging(()):
            wait(lambda x: x, X)

    thread = threading.Thread(target=serve)
    thread.start()
    inside.wait(60)
    try:
        assert surgery.replace(net, variables, X).layers == alone
    finally:
        finish.set()
        thread.join()


def test_a_module_in_the_scope_of_its_batch_norm_is_not_taken_for_it():
    class Loud(nn.Module):
        def setup(self):
            self.norm = nn.BatchNorm(use_running_average=True)
            nn.share_scope(self, self.norm)

        def __call__(self, x):
            return 2 * self.norm(x)

    done = surgery.freeze(Loud(), variables_of(Loud(), X), X)
    assert done.layers == ("",) and done.difference == 0


@pytest.mark.parametrize("framework", NETS)
def test_operations_follow_one_another(framework):
    net, variables = NETS[framework]()
    first, second = PATHS[framework]
    done = surgery.freeze(net, variables, X)
    done = surgery.to_affine(done.model, done.variables, X, layers=second)
    done = surgery.fold(done.model, done.variables, X)
    assert done.layers == (first,)
    before, after = output(net, variables)[0], output(done.model, done.variables)[0]
    assert abs(before - after).max() <= 1e-5 * abs(before).max()


@pytest.mark.parametrize("framework", NETS)
def test_fixed_affine_layers_have_no_parameters(framework):
    net, variables = NETS[framework]()
    done = surgery.to_affine(net, variables, X, learnable=False)
    if variables is None:
        assert isinstance(done.model.first.scale, nnx.BatchStat) and not hasattr(done.model.first, "mean")
    else:
        assert set(done.variables["params"]) == {"conv", "dense"}
        assert set(done.variables["batch_stats"]["first"]) == {"scale", "bias"}


@pytest.mark.slow
@pytest.mark.parametrize("scale_and_bias", [True, False])
def test_masked_leaves_are_neither_updated_nor_decayed(scale_and_bias):
    net, variables = linen_net()
    done = surgery.freeze(net, variables, X, layers="first")
    mask = surgery.frozen_mask(done.variables, done.layers, scale_and_bias=scale_and_bias)
    optimizer = optax.transforms.selective_transform(optax.adamw(0.1, weight_decay=0.1), freeze_mask=mask)

    def loss(variables):
        return jnp.square(done.model.apply(variables, X, False) - 1).sum()

    updates, _ = optimizer.update(jax.grad(loss)(done.variables), optimizer.init(done.variables), done.variables)
    moved = jax.tree.map(lambda update: bool((update != 0).any()), updates)
    assert not any(jax.tree.leaves(moved["batch_stats"]))
    assert moved["params"].pop("first") == {"scale": not scale_and_bias, "bias": not scale_and_bias}
    assert all(jax.tree.leaves(moved["params"]["conv"])) and all(jax.tree.leaves(moved["params"]["second"]))


@pytest.mark.slow
def test_the_mask_fits_an_nnx_optimizer():
    net, _ = nnx_net()
    done = surgery.freeze(net, None, X, layers="again/first")
    kinds = nnx.Any(nnx.Param, nnx.BatchStat)
    mask = surgery.frozen_mask(nnx.state(done.model, kinds), done.layers)
    transformation = optax.transforms.selective_transform(optax.adamw(0.1, weight_decay=0.1), freeze_mask=mask)
    optimizer = nnx.Optimizer(done.model, transformation, wrt=kinds)
    before = jax.tree.map(np.array, nnx.state(done.model))

    def loss(model):
        return jnp.square(model(X) - 1).sum()

    done.model.eval()
    gradients = nnx.grad(loss, argnums=nnx.DiffState(0, kinds))(done.model)
    optimizer.update(done.model, gradients)
    after = nnx.state(done.model)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), before, after)
    assert all(jax.tree.leaves(same["again"]))
    assert not any(jax.tree.leaves(same["conv"]))
    norm = same["rest"]["layers"][1]
    assert [norm[name].get_value() for name in ("mean", "var", "scale", "bias")] == [True, True, False, False]


def test_added_statistics_start_as_they_would():
    net, variables = linen_net()
    done = surgery.replace(net, variables, X, debias=True, steps=7, accumulate=2)
    statistics = done.variables["batch_stats"]["first"]
    assert statistics["steps"].tolist() == [7] * 4 and statistics["pending_count"].tolist() == [0.0] * 4
    np.testing.assert_array_equal(statistics["mean"], variables["batch_stats"]["first"]["mean"])
    plain = surgery.replace(done.model, done.variables, X, debias=False, accumulate=1)
    assert set(plain.variables["batch_stats"]["first"]) == {"mean", "var"}


def test_a_mask_of_paths_that_the_tree_does_not_have_is_refused():
    with pytest.raises(ValueError, match="the tree has no leaves at 'b'; it has some at 'a'; pass paths such as"):
        surgery.frozen_mask({"params": {"a": {"scale": X}}}, ["b"])


class Identity(nn.Module):
    """A module that Flax does not know of."""

    def __init__(self):
        pass

    def __call__(self, x):
        return x


def test_a_module_without_a_scope_is_called_as_it_is():
    net = nn.Sequential([nn.Dense(3), lambda x: Identity()(x), nn.BatchNorm(use_running_average=True)])
    assert surgery.freeze(net, variables_of(net, X), X).layers == ("layers_2",)


class Renamed(nn.BatchNorm):
    pass


class Louder(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        return 2 * super().__call__(x, use_running_average, mask=mask)


def test_a_subclass_is_a_batch_norm_unless_it_computes_something_else():
    x = X[:, 0, 0]
    net = nn.Sequential([Renamed(use_running_average=True), Louder(use_running_average=True)])
    assert surgery.freeze(net, variables_of(net, x), x).layers == ("layers_0",)


def refused(message, operation, net, variables, x=X, **options):
    before = arrays(net, variables)
    with pytest.raises(ValueError, match=message):
        operation(net, variables, x, **options)
    assert_equal(arrays(net, variables), before)


@pytest.mark.parametrize("operation", sorted(FAST | {"group norm"}))
@pytest.mark.parametrize("framework", NETS)
def test_a_path_that_does_not_exist_is_refused(framework, operation):
    net, variables = NETS[framework]()
    message = f"the model has no batch norm at 'third'; it has {', '.join(map(repr, PATHS[framework]))}; give one"
    refused(message, OPERATIONS[operation], net, variables, layers=["third"])


def test_a_model_without_batch_norm_is_refused():
    net = nn.Sequential([nn.Dense(3)])
    variables = net.init(jax.random.key(0), X) | {"batch_stats": {}}
    refused(
        "no batch norm was called, so that there is nothing to change; accepted are", surgery.freeze, net, variables
    )


def test_variables_without_statistics_are_refused():
    net, variables = linen_net()
    refused(
        r"have the collection 'batch_stats', but \['params'\] was given; pass what model.init returns",
        surgery.freeze,
        net,
        {"params": variables["params"]},
    )


def test_variables_beside_an_nnx_model_are_refused():
    with pytest.raises(ValueError, match="variables are given beside an nnx model, which holds its own; pass None"):
        surgery.freeze(nnx_net()[0], {}, X)


def test_what_is_not_a_module_is_refused():
    with pytest.raises(ValueError, match="the model is a method; accepted are a flax.linen.Module and an nnx.Module"):
        surgery.freeze(LinenNet().apply, {}, X)


def test_variables_that_lack_a_layer_are_refused():
    net, variables = linen_net()
    for collection, names in (("params", "'scale', 'bias'"), ("batch_stats", "'mean', 'var'")):
        lacking = variables | {collection: {n: v for n, v in variables[collection].items() if n != "first"}}
        refused(f"variables have no {names} of first; accepted are those of this model,", surgery.freeze, net, lacking)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("steps=5 is given, but first does not count its batches", {"steps": 5}),
        ("steps must be at least 0, got -3", {"steps": -3, "debias": True}),
        (r"momentum must be between 0 and 1, got 2.0", {"momentum": 2.0}),
        ("layers is empty; it names batch norms to change: 'first', 'second'; None is all", {"layers": []}),
    ],
)
def test_options_that_make_no_sense_are_refused(message, options):
    refused(message, surgery.replace, *linen_net(), **options)


def test_an_option_that_would_change_the_arrays_is_refused():
    refused("axis=1 cannot change in a trained model; accepted are acc", surgery.replace, *linen_net(), axis=1)


def test_counting_needs_to_be_told_the_number_of_batches():
    message = r"first is to count its batches .* say so with steps=, 0 to start anew"
    refused(message, surgery.replace, *linen_net(), momentum=None)


def test_groups_that_do_not_divide_are_refused():
    message = "num_groups=4 does not divide the 6 features of second; choose a divisor"
    refused(message, surgery.replace_by_group_norm, *linen_net(), num_groups=4)


def test_group_norm_of_features_on_another_axis_is_refused():
    net = nn.BatchNorm(use_running_average=True, axis=1)
    refused("has its features on axis 1 of 4", surgery.replace_by_group_norm, net, variables_of(net, X), num_groups=2)


def test_a_block_that_nn_jit_has_compiled_is_refused():
    jitted = nn.jit(LinenNet)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jitted()(x)

    variables = variables_of(Net(), X)
    message = r"JitLinenNet_0\S* runs inside of nn.jit, which keeps what it compiled before; take nn.jit off"
    refused(message, surgery.freeze, Net(), variables)


class Layers(nn.Module):
    """Two blocks in a loop, their arrays stacked."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.relu(nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(3)(x))), None

        lifted = {"params": 0, "batch_stats": 0}
        loop = nn.scan(Block, lifted, length=2, split_rngs={"params": True}, in_axes=nn.broadcast)
        return loop(name="blocks")(x, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["freeze", "replace", "to_affine"])
def test_layers_in_a_loop_are_exchanged_as_any_other(operation):
    done = OPERATIONS[operation](Layers(), Layers().init(jax.random.key(0), X), X)
    assert done.layers == ("blocks/norm",) and done.difference <= 1e-5 * done.scale
    if operation == "freeze":
        _, after = done.model.apply(done.variables, X, mutable=["batch_stats"])
        assert_equal(after["batch_stats"], done.variables["batch_stats"])


def test_new_variables_in_a_loop_are_refused():
    message = r"blocks/norm is inside of a scan or vmap, which knows nothing of new variables \(steps\)"
    refused(message, surgery.replace, Layers(), Layers().init(jax.random.key(0), X), debias=True, steps=3)
