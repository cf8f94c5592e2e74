"""Models move between PyTorch, Keras and Flax, and training goes on as before; what does not fit is refused."""

import ast
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import interop
from tests import test_docstrings
from tests.golden import make_keras
from tests.golden import make_pytorch_training as make_pytorch
from tests.interop.test_layouts import (
    assert_same_bits,
    assert_within_rounding,
    golden,
    golden_tree,
    random,
    refused,
    without,
)

OPTIONS = interop.batch_norm_options_from_torch(momentum=0.1, eps=1e-5)
COUNTED = interop.batch_norm_options_from_torch(momentum=None)


# Training


class LinenNet(nn.Module):
    """PyTorch's net of the golden file."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(6, (3, 5), padding=(1, 2), use_bias=False)(x)
        x = nn.relu(jaxbn.linen.BatchNorm(not train, **OPTIONS)(x))
        x = nn.Conv(8, (3, 3), strides=2, padding=1, feature_group_count=2)(x)
        x = nn.relu(jaxbn.linen.BatchNorm(not train, **COUNTED)(x))
        return nn.Dense(make_pytorch.CLASSES)(x.reshape(len(x), -1))


class NNXNet(nnx.Module):
    """The same."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Dict(
            conv=nnx.Conv(3, 6, (3, 5), padding=(1, 2), use_bias=False, rngs=rngs),
            norm=jaxbn.nnx.BatchNorm(6, **OPTIONS, rngs=rngs),
        )
        self.blocks = nnx.List([nnx.Conv(6, 8, (3, 3), strides=2, padding=1, feature_group_count=2, rngs=rngs)])
        self.norm = jaxbn.nnx.BatchNorm(8, **COUNTED, rngs=rngs)
        self.head = nnx.Linear(96, make_pytorch.CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem["norm"](self.stem["conv"](x)))
        x = nnx.relu(self.norm(self.blocks[0](x)))
        return self.head(x.reshape(len(x), -1))


NAMES = {
    "linen": {"conv1": "Conv_0", "bn1": "BatchNorm_0", "conv2": "Conv_1", "bn2": "BatchNorm_1", "fc": "Dense_0"},
    "nnx": {"conv1": "stem/conv", "bn1": "stem/norm", "conv2": "blocks/0", "bn2": "norm", "fc": "head"},
}
LAYOUTS = {"fc": interop.dense_layout(flattened=make_pytorch.FLATTENED)}


def linen_net(dtype):
    """Returns shapes of the variables, and what maps them and a batch to logits and statistics."""
    net = LinenNet()
    shapes = jax.eval_shape(functools.partial(net.init, train=False), jax.random.key(0), jnp.ones((2, 8, 6, 3)))

    def apply(variables, x):
        logits, updates = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, updates["batch_stats"]

    return in_dtype(shapes, dtype), apply


def nnx_net(dtype):
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    graph, *states = nnx.split(nnx.eval_shape(NNXNet), *kinds.values())

    def apply(variables, x):
        net = nnx.merge(graph, *states, copy=True)
        nnx.update(net, variables["params"], variables["batch_stats"])
        logits = net(x)
        return logits, nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))

    shapes = {name: nnx.to_pure_dict(state) for name, state in zip(kinds, states, strict=True)}
    return in_dtype(shapes, dtype), apply


def in_dtype(shapes, dtype):
    def convert(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, dtype if leaf.dtype == jnp.float32 else leaf.dtype)

    return jax.tree.map(convert, shapes)


def train(apply, variables, trace, steps, learning_rate, momentum):
    """Returns losses, variables and momenta after training with SGD."""
    optimizer = optax.sgd(learning_rate, momentum=momentum)
    first, *rest = optimizer.init(variables["params"])
    state = (first._replace(trace=trace), *rest)

    @jax.jit
    def step(variables, state, x, labels):
        def loss(params):
            logits, stats = apply(variables | {"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats

        (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, state)
        return {"params": optax.apply_updates(variables["params"], updates), "batch_stats": stats}, state, value

    losses = []
    for x, labels in steps:
        variables, state, value = step(variables, state, x, labels)
        losses.append(value)
    return {"losses": np.stack(losses), "variables": variables, "trace": state[0].trace}


def train_as_pytorch(api, dtype, entries, momenta, steps):
    """Converts state of PyTorch, trains here, and returns losses and state of PyTorch."""
    with jax.enable_x64(dtype == "float64"):
        shapes, apply = {"linen": linen_net, "nnx": nnx_net}[api](dtype)
        names = NAMES[api]
        variables = interop.from_torch(entries, shapes, names, layouts=LAYOUTS)
        trace = interop.from_torch(momenta, {"params": shapes["params"]}, names, layouts=LAYOUTS)["params"]
        steps = [(np.moveaxis(x, 1, -1), labels) for x, labels in steps]
        found = train(apply, variables, trace, steps, make_pytorch.LEARNING_RATE, make_pytorch.MOMENTUM)
        after = interop.to_torch(found["variables"], names, layouts=LAYOUTS)
        # A layer with a momentum does not count its batches.
        after["bn1.num_batches_tracked"] = np.array(entries["bn1.num_batches_tracked"] + len(steps))
        momenta = interop.to_torch({"params": found["trace"]}, names, layouts=LAYOUTS)
        return {"losses": found["losses"], "entries": after, "momenta": momenta}


def golden_halves(dtype):
    return [
        {
            "losses": golden(make_pytorch.FILE)[f"{dtype}/{half}/losses"],
            "entries": golden_tree(make_pytorch.FILE, f"{dtype}/{half}/entries/"),
            "momenta": golden_tree(make_pytorch.FILE, f"{dtype}/{half}/momenta/"),
        }
        for half in range(2)
    ]


@functools.cache
def live_halves(dtype):
    pytest.importorskip("torch", reason="PyTorch is not installed; the golden file stands for it")
    return make_pytorch.run(dtype)


@functools.cache
def continued(api, dtype, halves):
    before, _ = halves(dtype)
    steps = make_pytorch.batches(dtype)[make_pytorch.STEPS :]
    return train_as_pytorch(api, dtype, before["entries"], before["momenta"], steps)


@pytest.mark.parametrize("what", ["losses", "entries", "momenta"])
@pytest.mark.parametrize("halves", [golden_halves, live_halves], ids=["golden", "live"])
@pytest.mark.parametrize(
    ("api", "dtype"), [("linen", "float32"), pytest.param("nnx", "float64", marks=pytest.mark.slow)]
)
def test_five_steps_in_pytorch_and_five_here_equal_ten_in_pytorch(api, dtype, halves, what):
    _, after = halves(dtype)
    assert_within_rounding(continued(api, dtype, halves)[what], after[what], steps=make_pytorch.STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", make_pytorch.DTYPES)
def test_five_steps_here_and_five_in_pytorch_equal_ten_in_pytorch(dtype):
    _, after = live_halves(dtype)
    model, optimizer = make_pytorch.make_model(dtype)
    entries = {name: tensor.numpy() for name, tensor in model.state_dict().items()} | make_pytorch.start(dtype)
    momenta = {name: np.zeros_like(entries[name]) for name, _ in model.named_parameters()}
    first, second = make_pytorch.batches(dtype)[: make_pytorch.STEPS], make_pytorch.batches(dtype)[make_pytorch.STEPS :]
    here = train_as_pytorch("linen", dtype, entries, momenta, first)
    make_pytorch.set_state(model, optimizer, here["entries"], here["momenta"])
    losses = np.array(make_pytorch.train(model, optimizer, second), dtype)
    entries, momenta = make_pytorch.state_of(model, optimizer)
    for found, what in ((losses, "losses"), (entries, "entries"), (momenta, "momenta")):
        assert_within_rounding(found, after[what], steps=2 * make_pytorch.STEPS)


class KerasNet(nn.Module):
    """Keras's net of the golden file."""

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(jaxbn.linen.BatchNorm, not train, epsilon=1e-3)
        x = nn.relu(norm(momentum=0.9, name="norm")(nn.Conv(6, (3, 5), use_bias=False, name="conv")(x)))
        x = nn.Conv(12, (3, 3), feature_group_count=6, name="depthwise")(x)
        x = nn.relu(norm(use_scale=False, name="norm_without_scale")(x))
        x = nn.Conv(8, (3, 3), strides=2, feature_group_count=2, name="grouped")(x)
        x = nn.relu(norm(use_bias=False, name="norm_without_bias")(x))
        x = nn.ConvTranspose(6, (3, 2), strides=(2, 2), name="transposed")(x)
        x = nn.relu(norm(use_scale=False, use_bias=False, name="norm_without_either")(x))
        return nn.Dense(make_keras.CLASSES, name="dense")(x.reshape(len(x), -1))


KERAS_LAYOUTS = {
    "depthwise": interop.depthwise_conv_layout(multiplier=2),
    "transposed": interop.conv_transpose_layout(),
}


def keras_lists(flat):
    """Returns the arrays by layer and place as lists by layer."""
    layers = {}
    for name in sorted(flat):
        layers.setdefault(name.split("/")[0], []).append(flat[name])
    return layers


@functools.cache
def continued_from_keras():
    net = KerasNet()
    shapes = jax.eval_shape(
        functools.partial(net.init, train=False), jax.random.key(0), jnp.ones((2, *make_keras.IMAGE))
    )
    weights = golden_tree(make_keras.FILE, "0/weights/")
    names = {name: name for name in keras_lists(weights)}
    variables = interop.from_keras(keras_lists(weights), shapes, names, layouts=KERAS_LAYOUTS)
    # Keras's velocity is -learning_rate times Optax's trace; running averages have none.
    velocities = golden_tree(make_keras.FILE, "0/velocities/")
    momenta = {name: velocities.get(name, 0 * array) / -make_keras.LEARNING_RATE for name, array in weights.items()}
    trace = interop.from_keras(keras_lists(momenta), shapes, names, layouts=KERAS_LAYOUTS)["params"]

    def apply(variables, x):
        logits, updates = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, updates["batch_stats"]

    steps = make_keras.batches()[make_keras.STEPS :]
    found = train(apply, variables, trace, steps, make_keras.LEARNING_RATE, make_keras.MOMENTUM)
    trained = found["variables"]
    momenta = interop.to_keras(
        {"params": found["trace"], "batch_stats": trained["batch_stats"]}, names, layouts=KERAS_LAYOUTS
    )
    flat_momenta = {f"{name}/{i}": array for name, arrays in momenta.items() for i, array in enumerate(arrays)}
    return {
        "losses": found["losses"],
        "weights": interop.to_keras(trained, names, layouts=KERAS_LAYOUTS),
        "velocities": {name: -make_keras.LEARNING_RATE * flat_momenta[name] for name in velocities},
        "evaluated": net.apply(trained, make_keras.batches()[0][0], train=False),
    }


@pytest.mark.slow
@pytest.mark.parametrize("what", ["losses", "weights", "velocities", "evaluated"])
def test_five_steps_in_keras_and_five_here_equal_ten_in_keras(what):
    expected = {
        "losses": lambda: golden(make_keras.FILE)["1/losses"],
        "weights": lambda: keras_lists(golden_tree(make_keras.FILE, "1/weights/")),
        "velocities": lambda: golden_tree(make_keras.FILE, "1/velocities/"),
        "evaluated": lambda: golden(make_keras.FILE)["evaluated"],
    }[what]()
    assert_within_rounding(continued_from_keras()[what], expected, steps=make_keras.STEPS)


# Settings


@settings(max_examples=100, deadline=None)
@given(st.decimals("0", "1", places=9).map(float) | st.none(), st.floats(1e-9, 1))
def test_options_to_pytorch_and_back_are_the_same(momentum, epsilon):
    options = interop.batch_norm_options_to_torch(momentum=momentum, epsilon=epsilon)
    expected = {"momentum": momentum, "epsilon": epsilon, "unbiased": True}
    assert interop.batch_norm_options_from_torch(**options) == expected
    assert interop.batch_norm_options_to_torch(**expected) == options


@pytest.mark.parametrize("convert", [interop.batch_norm_options_from_torch, interop.batch_norm_options_to_torch])
@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan")])
def test_options_refuse_a_momentum_that_is_no_weight(convert, momentum):
    with refused(
        f"momentum={momentum} is outside [0, 1]; it is the weight of a value in an average; pass such, or None."
    ):
        convert(momentum=momentum)


def test_options_refuse_a_biased_variance_for_pytorch():
    with refused("unbiased=False: PyTorch's running variance is always unbiased; multiply that of the weights by m/(m"):
        interop.batch_norm_options_to_torch(unbiased=False)


def test_an_average_of_biased_variances_times_m_over_m_minus_1_is_that_of_unbiased_ones():
    @functools.partial(jax.jit, static_argnums=1)
    def var(batches, unbiased):
        stats = jaxbn.init_stats(2, counted=True)
        for batch in batches:
            stats = jaxbn.update_stats(stats, jaxbn.moments(batch), momentum=None, unbiased=unbiased)
        return stats.var

    batches = np.random.default_rng(0).normal(size=(3, 5, 4, 2))  # m = 5 * 4
    assert_within_rounding(var(batches, False) * 20 / 19, var(batches, True))


# Models


def test_models_to_pytorch_and_to_keras_and_back_are_the_same_bits():
    x = jnp.ones((2, *make_keras.IMAGE))
    shapes = jax.eval_shape(functools.partial(KerasNet().init, train=False), jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: random(leaf.shape, leaf.dtype, 0), shapes)
    names = {f"net.{name}": name for name in variables["params"] | variables["batch_stats"]}
    layouts = {f"net.{name}": layout for name, layout in KERAS_LAYOUTS.items()}
    entries = interop.to_torch(variables, names, layouts=layouts)
    assert_same_bits(interop.from_torch(entries, variables, names, layouts=layouts), variables)
    weights = interop.to_keras(variables, names, layouts=layouts)
    assert_same_bits(interop.from_keras(weights, variables, names, layouts=layouts), variables)


def test_bfloat16_becomes_float32_and_a_model_keeps_its_dtype():
    variables = {"params": {"kernel": jnp.ones((3, 2), jnp.bfloat16) / 3}}
    entries = interop.to_torch(variables, {"fc": ""})
    assert entries["fc.weight"].dtype == np.float32
    assert_same_bits(interop.from_torch(entries, variables, {"fc": ""}), variables)


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(2)(jaxbn.linen.BatchNorm(not train)(nn.Conv(4, (3,))(x)))


SMALL = {"conv": "Conv_0", "norm": "BatchNorm_0", "fc": "Dense_0"}


@functools.cache
def small():
    shapes = jax.eval_shape(Small().init, jax.random.key(0), jnp.ones((1, 5, 3)))
    variables = jax.tree.map(lambda leaf: random(leaf.shape, leaf.dtype, 0), shapes)
    return variables, interop.to_torch(variables, SMALL)


def test_a_model_takes_shapes_for_variables_and_gives_arrays():
    variables, entries = small()
    shapes = jax.eval_shape(Small().init, jax.random.key(0), jnp.ones((1, 5, 3)))
    assert_same_bits(interop.from_torch(entries, shapes, SMALL), variables)


def test_a_model_has_the_dtype_of_its_variables():
    variables, entries = small()
    halves = {name: array.astype(np.float16) for name, array in entries.items()}
    converted = interop.from_torch(halves, variables, SMALL)
    assert {leaf.dtype for leaf in jax.tree.leaves(converted)} == {np.dtype(np.float32)}


def test_an_nnx_model_takes_and_gives_its_states():
    model = nnx.eval_shape(NNXNet)
    states = {"params": nnx.state(model, nnx.Param), "batch_stats": nnx.state(model, nnx.BatchStat)}
    entries = golden_halves("float32")[0]["entries"]
    nnx.update(model, *interop.from_torch(entries, states, NAMES["nnx"], layouts=LAYOUTS).values())
    states = {"params": nnx.state(model, nnx.Param), "batch_stats": nnx.state(model, nnx.BatchStat)}
    found = interop.to_torch(states, NAMES["nnx"], layouts=LAYOUTS)
    found["bn1.num_batches_tracked"] = entries["bn1.num_batches_tracked"]  # a layer with a momentum counts none
    assert_same_bits(found, entries)


def convert(state_dict=None, variables=None, names=None, **options):
    ours, entries = small()
    return interop.from_torch(
        entries if state_dict is None else state_dict,
        ours if variables is None else variables,
        SMALL if names is None else names,
        **options,
    )


MISFITS = {
    "an entry is missing": (
        lambda: convert(without(small()[1], "norm.running_var")),
        "'norm': a batch norm in PyTorch has running_mean, running_var and may have weight, bias, "
        "num_batches_tracked, but weight, bias, running_mean, num_batches_tracked is given; "
        "pass what belongs to this layer alone, by these names.",
    ),
    "an entry is left over": (
        lambda: convert(small()[1] | {"fc.weight_g": np.ones(2)}),
        "'fc': a dense layer in PyTorch has weight and may have bias, but weight, bias, weight_g is given",
    ),
    "a layer is left over": (
        lambda: convert(small()[1] | {"head.weight": np.ones((2, 2))}),
        "'head' with head.weight: it is not in names; add it with its path in Flax, or take it out of what is "
        "converted, as a buffer that Flax's model has not.",
    ),
    "buffers are left over": (
        lambda: convert(small()[1] | {"mean": np.ones(3), "std": np.ones(3)}),
        "'' with mean, std: it is not in names; add it with its path in Flax, or take it out of what is converted",
    ),
    "the entries have a prefix": (
        lambda: convert({f"module.{name}": array for name, array in small()[1].items()}),
        "'module.': DistributedDataParallel and torch.compile put such a prefix; take it off the entries.",
    ),
    "a layer is transposed": (
        lambda: convert(
            {"weight": np.ones((2, 2, 3))},
            {"params": {"ConvTranspose_0": {"kernel": np.ones((3, 2, 2))}}},
            {"": "ConvTranspose_0"},
        ),
        "'': its path 'ConvTranspose_0' is that of a transposed convolution, which its weights do not show; "
        "pass layouts={'': conv_transpose_layout()}.",
    ),
    "a layer in a block is transposed": (
        lambda: interop.to_keras(
            {"params": {"Block_0": {"ConvTranspose_1": {"kernel": np.ones((3, 2, 2))}}}},
            {"up": "Block_0/ConvTranspose_1"},
        ),
        "'up': its path 'Block_0/ConvTranspose_1' is that of a transposed convolution",
    ),
    "a layout is a function": (
        lambda: convert(layouts={"fc": interop.dense_layout}),
        "'fc': layouts has a function for it and not a Layout; call the function, as in dense_layout().",
    ),
    "running statistics are not tracked": (
        lambda: convert(without(small()[1], "norm.running_mean", "norm.running_var", "norm.num_batches_tracked")),
        "'norm': its weights make {'params/bias': (4,), 'params/scale': (4,)} in Flax, but the layer there has "
        "{'batch_stats/mean': (4,), 'batch_stats/var': (4,), 'params/bias': (4,), 'params/scale': (4,)}; these weights "
        "have no statistics, as with track_running_stats=False: take those of this layer out of variables, and keep",
    ),
    "a model is no state_dict": (
        lambda: interop.from_torch(Small(), *small()),
        "state_dict is a Small and not a mapping; pass model.state_dict().",
    ),
    "a checkpoint is no state_dict": (
        lambda: convert({"state_dict": small()[1], "epoch": 3}),
        "state_dict['state_dict'] is itself a mapping; of a checkpoint, pass the state_dict in it.",
    ),
    "weights of Keras are no mapping": (
        lambda: interop.from_keras([np.ones((4, 2))], small()[0], SMALL),
        "weights is a list and not a mapping; pass {layer.name: layer.weights for layer in model.layers if layer.we",
    ),
    "names are a list": (
        lambda: convert(names=["conv"]),
        "names is a list and not a mapping; pass names and paths, such as {'layer1.0.conv1': 'Block_0/Conv_0'}.",
    ),
    "a layer of Flax is left over": (
        lambda: convert(without(small()[1], "fc.weight", "fc.bias"), names=without(SMALL, "fc")),
        "'Dense_0' in Flax: no name has this path; add it to names.",
    ),
    "a name has no entries": (
        lambda: convert(without(small()[1], "fc.weight", "fc.bias")),
        "'fc': it is in names, but no weights are given for it; take it out, or add them.",
    ),
    "a path leads nowhere": (
        lambda: convert(names=SMALL | {"fc": "Dense_1"}),
        "'fc': names has the path 'Dense_1', but Flax's model has no layer there; correct it.",
    ),
    "a path is named twice": (
        lambda: convert(names=SMALL | {"again": "Dense_0"}),
        "'Dense_0' in Flax: several names have this path; keep one.",
    ),
    "a layout has no name": (
        lambda: convert(layouts={"fd": interop.dense_layout()}),
        "'fd': it is in layouts and not in names.",
    ),
    "a bias is missing": (
        lambda: convert(without(small()[1], "fc.bias")),
        "'fc': its weights make {'params/kernel': (4, 2)} in Flax, but the layer there has {'params/bias': (2,), "
        "'params/kernel': (4, 2)}; give both layers the same settings, or pass the layout of this one in layouts.",
    ),
    "a shape is another": (
        lambda: convert(small()[1] | {"conv.weight": np.ones((4, 3, 5))}),
        "'conv': its weights make {'params/bias': (4,), 'params/kernel': (5, 3, 4)} in Flax, but the layer there has "
        "{'params/bias': (4,), 'params/kernel': (3, 3, 4)}; give both layers the same settings, or pass the layout of",
    ),
    "a layer is of no known kind": (
        lambda: convert(variables={"params": {"Embed_0": {"embedding": np.ones((2, 3))}}}, names={"conv": "Embed_0"}),
        "'conv': its variables in Flax, params/embedding, are not those of a norm, convolution or dense layer; "
        "pass its layout in layouts, or take it out of both models.",
    ),
    "the collections are missing": (
        lambda: convert(variables=small()[0]["params"]),
        "variables has ['BatchNorm_0', 'Conv_0', 'Dense_0'], but what is converted are the collections 'params' and "
        "'batch_stats'; pass {'params': ..., 'batch_stats': ...} without others.",
    ),
    "a layer of Flax is not of its layout": (
        lambda: interop.to_torch(small()[0], SMALL, layouts={"fc": interop.conv_layout()}),
        "'fc': the kernel of a convolution has 3 or 4 or 5 axes, but the shape (4, 2) is given; "
        "use the layout of the layer that it comes from.",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_models_that_do_not_fit_are_refused_if(case):
    call, message = MISFITS[case]
    with refused(message):
        call()


def test_everything_that_does_not_fit_is_said_at_once():
    with pytest.raises(ValueError) as error:
        convert(
            without(small()[1], "norm.running_var") | {"head.weight": np.ones((2, 2)), "fc.weight": np.ones((3, 4))}
        )
    first, *problems = str(error.value).splitlines()
    assert first == "the models do not fit, so nothing is converted:"
    assert [problem.split(":")[0] for problem in problems] == ["  'head' with head.weight", "  'norm'", "  'fc'"]


@pytest.mark.parametrize("norm", [nn.LayerNorm(), nn.GroupNorm(2)], ids=["layer", "group"])
def test_other_norms_have_a_scale_and_a_bias_alone(norm):
    shapes = jax.eval_shape(norm.init, jax.random.key(0), jnp.ones((1, 4)))
    entries = {"norm.weight": np.arange(4, dtype=np.float32), "norm.bias": np.ones(4, np.float32)}
    variables = interop.from_torch(entries, shapes, {"norm": ""})
    assert_same_bits(variables, {"params": {"scale": entries["norm.weight"], "bias": entries["norm.bias"]}})
    assert_same_bits(interop.to_torch(variables, {"norm": ""}), entries)
    weights = {"norm": list(entries.values())}
    assert_same_bits(interop.from_keras(weights, shapes, {"norm": ""}), variables)
    assert_same_bits(interop.to_keras(variables, {"norm": ""}), weights)


def test_a_model_that_is_one_layer_has_names_without_a_dot():
    entries = {"weight": np.ones((3, 2), np.float32), "bias": np.ones(3, np.float32)}
    variables = {"params": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}}
    assert_same_bits(interop.to_torch(variables, {"": ""}), entries)
    assert_same_bits(interop.from_torch(entries, variables, {"": ""}), variables)


def test_a_layer_is_left_out_by_taking_it_out_of_both():
    variables, entries = small()
    names = without(SMALL, "fc")
    backbone = variables | {"params": without(variables["params"], "Dense_0")}
    converted = interop.from_torch(without(entries, "fc.weight", "fc.bias"), backbone, names)
    assert_same_bits(converted, backbone)


@pytest.mark.parametrize("name", [name for name in interop.__all__ if name != "Layout"])
def test_a_function_documents_its_arguments_and_result_and_has_an_example(name):
    function = getattr(interop, name)
    assert test_docstrings.entries(function, "Args") == test_docstrings.parameters(function)
    assert test_docstrings.section(function, "Returns") and ">>> " in function.__doc__


@pytest.mark.parametrize("module", ["__init__", "_conversion", "_layouts", "_models", "_weights"])
def test_it_needs_numpy_alone(module):
    tree = ast.parse((Path(interop.__file__).parent / f"{module}.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    own = {f"jaxbn.interop.{name}" for name in ("_conversion", "_layouts", "_models", "_weights")}
    assert names <= {"collections", "collections.abc", "functools", "math", "numpy", "typing"} | own
