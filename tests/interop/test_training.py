"""Training that moves from PyTorch or Keras to Flax, or to PyTorch, goes on as it would have there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxbn import interop
from tests.golden import make_keras
from tests.golden import make_pytorch_training as make_pytorch
from tests.interop.comparisons import assert_within_rounding, golden, golden_tree
from tests.interop.nets import KERAS_LAYOUTS, LAYOUTS, NAMES, KerasNet, LinenNet, NNXNet


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
