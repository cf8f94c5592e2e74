"""Models and data with known faults: a network trained on handwritten digits, single layers, and inputs far from 0."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from sklearn.datasets import load_digits

import jaxbn.nnx
from jaxbn.diagnose import diagnose

MOMENTUM = 0.9
BATCH = 32


class Net(nn.Module):
    """Two convolutions with batch norms, whose names sort in the opposite order, and a dense layer."""

    @nn.compact
    def __call__(self, x, train):
        for features, name in ((8, "second"), (16, "first")):
            x = nn.Conv(features, (3, 3), strides=features // 8, use_bias=False, name=f"conv_{name}")(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=MOMENTUM, name=name)(x))
        return nn.Dense(10, name="dense")(x.mean((1, 2)))


class NnxNet(nnx.Module):
    """`Net` in nnx."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        for features, inputs, name in ((8, 1, "second"), (16, 8, "first")):
            conv = nnx.Conv(inputs, features, (3, 3), strides=features // 8, use_bias=False, rngs=rngs)
            setattr(self, f"conv_{name}", conv)
            setattr(self, name, jaxbn.nnx.BatchNorm(features, momentum=MOMENTUM, rngs=rngs))
        self.dense = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x, train):
        for name in ("second", "first"):
            x = nnx.relu(getattr(self, name)(getattr(self, f"conv_{name}")(x), use_running_average=not train))
        return self.dense(x.mean((1, 2)))


def evaluate(model, images):
    return model(images, train=False)


def forget(model, images):
    """Evaluates with the train flag left on."""
    return model(images, train=True)


def in_batches(images, size):
    return [images[i : i + size] for i in range(0, len(images) - size + 1, size)]


@functools.cache
def digits():
    """Images and labels for training, and for testing, in an order that is independent of writers and classes."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    images, labels = (data.images[order, ..., None] / 16).astype(np.float32), data.target[order]
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def held_out():
    """Batches of test images."""
    return in_batches(digits()[2], BATCH)


def initial(net, x, generator):
    """Returns initial variables, made by NumPy: to compile `net.init` would take seconds."""
    shapes = jax.eval_shape(functools.partial(net.init, train=True), jax.random.key(0), x)

    def make(path, shape):
        if path[-1] == "kernel":
            fan_in = np.prod(shape.shape[:-1])
            return generator.normal(size=shape.shape, scale=fan_in**-0.5).astype(np.float32)
        return np.full(shape.shape, path[-1] in ("scale", "var"), np.float32)

    return unflatten_dict({path: make(path, shape) for path, shape in flatten_dict(shapes).items()})


@functools.cache
def trained(seed=0, epochs=4):
    """Returns variables of the network, which is right about nine times in ten."""
    images, labels, _, _ = digits()
    net, optimizer = Net(), optax.sgd(optax.cosine_decay_schedule(0.2, epochs * (len(images) // BATCH)), 0.9)
    generator = np.random.default_rng(seed)
    variables = initial(net, images[:1], generator)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(variables, state, x, y):
        def loss(params):
            logits, updates = net.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates

        gradients, updates = jax.grad(loss, has_aux=True)(variables["params"])
        changes, state = optimizer.update(gradients, state)
        return {"params": optax.apply_updates(variables["params"], changes), **updates}, state

    state = jax.jit(optimizer.init)(variables["params"])
    for _ in range(epochs):
        order = generator.permutation(len(images))
        for chosen in in_batches(order, BATCH):
            variables, state = step(variables, state, images[chosen], labels[chosen])
    return variables


def model_of(front_end, variables):
    """Returns the network with these variables, as the first two arguments of `diagnose`."""
    if front_end == "linen":
        return Net(), variables
    graph, state = nnx.split(nnx.eval_shape(NnxNet))  # to initialize it would take seconds
    arrays = {}
    for collection in variables.values():
        for name, of_layer in collection.items():
            arrays[name] = arrays.get(name, {}) | of_layer
    nnx.replace_by_pure_dict(state, arrays)
    return nnx.merge(graph, state), None


def names(diagnosis):
    return [finding.name for finding in diagnosis.findings]


def changed(variables, change):
    """Returns variables with ``change(path, array)`` in place of each array."""
    flat = {path: np.array(value) for path, value in flatten_dict(variables).items()}
    return unflatten_dict({path: change(path, value) for path, value in flat.items()})


def never_updated(variables):
    start = {"mean": 0, "var": 1}
    return changed(variables, lambda path, value: np.full_like(value, start[path[-1]]) if path[-1] in start else value)


def with_dead_features(variables):
    def change(path, value):
        if path[-2:] == ("first", "scale"):
            value[[3, 7]] = 0
        if path[-2:] == ("conv_first", "kernel"):
            value[..., 5] = 0
        return value

    return changed(variables, change)


@functools.cache
def planted(fault, front_end="linen", seed=0, on_training_images=False):
    """Diagnoses the network with a fault that is planted in it, in its data, or in how it is called."""
    images, labels = digits()[:2] if on_training_images else digits()[2:]
    variables, batches, call = trained(seed), in_batches(images, BATCH), evaluate
    if fault == "train flag left on":
        call = forget
    elif fault == "never updated":
        variables = never_updated(variables)
    elif fault == "batches of two":
        batches = in_batches(images, 2)[:60]
    elif fault == "sorted by class":
        batches = in_batches(images[np.argsort(labels, kind="stable")], BATCH)
    elif fault == "less contrast":
        batches = [0.5 * x + 0.2 for x in batches]
    elif fault == "inverted":
        batches = [1 - x for x in batches]
    elif fault == "dead features":
        variables = with_dead_features(variables)
    return diagnose(*model_of(front_end, variables), batches, call=call)


def updated(steps):
    """Returns variables of the trained network whose averages have been reset, and have seen some batches since."""
    variables = never_updated(trained())
    for x in in_batches(digits()[0], BATCH)[:steps]:
        variables = variables | _update(variables, x)
    return variables


@jax.jit
def _update(variables, x):
    return Net().apply(variables, x, train=True, mutable=["batch_stats"])[1]


LAYER = nn.BatchNorm(use_running_average=True)


def state_of(mean, var, **params):
    """Variables of a single layer."""
    stats = {"mean": jnp.asarray(mean, float), "var": jnp.asarray(var, float)}
    ones = {"scale": jnp.ones(len(mean)), "bias": jnp.zeros(len(mean))}
    return {"params": ones | params, "batch_stats": stats}


STANDARD = state_of([0.1, -0.1, 0], [1, 1, 0.9])  # close to what `normal` draws, but not exactly 0 and 1


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Far(nn.Module):
    """Batch norms, each after a dense layer or a convolution."""

    conv: bool = False
    momentum: float = 0.99

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.Conv(8, (3, 3), use_bias=False)(x) if self.conv else nn.Dense(16)(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=self.momentum)(x))
        return x


@functools.cache
def far(inputs):
    """Returns a healthy network, its variables, and batches of inputs far from 0."""
    if images := inputs == "0..255":
        patches = normal(9, 64, 3, 3, 3).repeat(3, axis=2).repeat(3, axis=3)  # neighboring pixels are alike
        batches = list(255 * np.clip(0.45 + 0.06 * patches, 0, 1))
    else:
        batches = [5 + normal(64, 10, seed=k) for k in range(9)]
    x = np.concatenate(batches)
    variables = initial(Far(conv=images), x, np.random.default_rng(0))
    # With momentum 0, the statistics after a step are those of its batch, which here holds all the data.
    step = functools.partial(Far(conv=images, momentum=0.0).apply, train=True, mutable=["batch_stats"])
    return Far(conv=images), variables | jax.jit(step)(variables, x)[1], batches


def holding_start(variables, start):
    """Returns variables whose averages hold that weight of their start, as if with momentum 0.99."""

    def average(path, value):
        return (1 - start) * value + (start if path[-1] == "var" else 0)

    return variables | {"batch_stats": changed(variables["batch_stats"], average)}
