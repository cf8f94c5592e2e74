"""The compiled functions of a run: make the initial state, order an epoch, take a step, evaluate a batch.

Conventions: images stay on the device as uint8 and become float32 in [0, 1] inside the compiled functions, which gather
their own batches. What a run varies without changing the computation (seed, rates, length) is an argument, so that runs
share their programs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import data, models
from experiments.config import Config

MOMENTUM = 0.9
EVALUATION_BATCH = 500  # images
# The initial state is computed once: with optimization, compiling it takes longer than compiling the training step.
INIT_OPTIONS = {"xla_backend_optimization_level": 0}


class State(NamedTuple):
    """All that training changes. `loss` and `correct` are sums since the last row of results."""

    step: jax.Array
    params: Any
    batch_stats: Any
    optimizer: optax.OptState
    loss: jax.Array
    correct: jax.Array


class Programs(NamedTuple):
    """The compiled functions. A set is the pair (images, labels).

    Attributes:
      init: key -> State.
      order: key, epoch -> permutation of the training images.
      train: State, training set, order, key, rate -> State, loss of the batch; the given State's buffers are reused.
      evaluate: params, batch_stats, test set, first, (loss, correct) -> (loss, correct), a batch added to the sums.
    """

    init: Callable
    order: Callable
    train: Callable
    evaluate: Callable


def optimizer() -> optax.GradientTransformation:
    """Returns SGD with momentum at rate 1; the training step multiplies its update by the rate of the epoch.

    That is what SGD at that rate does (its momentum accumulates gradients, not updates), and one program serves all
    rates.
    """
    return optax.sgd(1.0, MOMENTUM)


def compile_programs(
    config: Config, num_classes: int, train_shape: tuple[int, ...], test_shape: tuple[int, ...]
) -> Programs:
    """Returns the programs of a run, compiled now or for an earlier run that shares them.

    Args:
      config: the run.
      num_classes: number of labels.
      train_shape: of the training images, [n, height, width, channels].
      test_shape: of the test images.
    """
    same = config.replace(seed=0, learning_rate=1.0, lr_decay_epochs=1, epochs=1, evaluations=1, train_images=None)
    return _compile(same, num_classes, train_shape, test_shape)


@functools.lru_cache(maxsize=16)
def _compile(config, num_classes, train_shape, test_shape):
    net = models.build(config, num_classes)
    sgd = optimizer()

    def init(key):
        variables = net.init(key, jnp.zeros((1, *train_shape[1:])), train=False)
        params, zero = variables["params"], jnp.zeros((), jnp.int32)
        return State(zero, params, variables.get("batch_stats", {}), sgd.init(params), jnp.zeros(()), zero)

    def order(key, epoch):
        return data.epoch_order(key, epoch, train_shape[0])

    def train(state, train_set, order, key, rate):
        first = state.step % (train_shape[0] // config.batch_size) * config.batch_size
        x, targets = _gather(train_set, jax.lax.dynamic_slice_in_dim(order, first, config.batch_size))
        if config.augment:
            x = data.augment(jax.random.fold_in(key, state.step), x, flip=config.data == "cifar10")

        def loss_of(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = net.apply(variables, x, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
            return loss, (logits, updated.get("batch_stats", {}))

        (loss, (logits, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, momenta = sgd.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda u: rate * u, updates))
        correct = jnp.sum(logits.argmax(-1) == targets, dtype=jnp.int32)
        return State(state.step + 1, params, batch_stats, momenta, state.loss + loss, state.correct + correct), loss

    def evaluate(params, batch_stats, test_set, first, totals):
        n = test_shape[0]
        position = first + jnp.arange(min(EVALUATION_BATCH, n))
        counted = position < n  # the last batch is filled up with copies of the last image, which do not count
        x, targets = _gather(test_set, jnp.minimum(position, n - 1))
        logits = net.apply({"params": params, "batch_stats": batch_stats}, x, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        correct = counted & (logits.argmax(-1) == targets)
        return totals[0] + jnp.sum(losses, where=counted), totals[1] + jnp.sum(correct, dtype=jnp.int32)

    number, integer = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)
    state, permutation = jax.eval_shape(init, key), jax.eval_shape(order, key, integer)
    train_set, test_set = (
        (jax.ShapeDtypeStruct(shape, jnp.uint8), jax.ShapeDtypeStruct(shape[:1], jnp.int32))
        for shape in (train_shape, test_shape)
    )
    return Programs(
        init=jax.jit(init).lower(key).compile(INIT_OPTIONS),
        order=jax.jit(order).lower(key, integer).compile(),
        train=jax.jit(train, donate_argnums=0).lower(state, train_set, permutation, key, number).compile(),
        evaluate=jax.jit(evaluate)
        .lower(state.params, state.batch_stats, test_set, integer, (number, integer))
        .compile(),
    )


def evaluate(programs: Programs, state: State, test_set: tuple[jax.Array, jax.Array]) -> tuple[float, float]:
    """Returns mean loss and accuracy of the whole test set in evaluation mode, every image counted once."""
    n = len(test_set[0])
    totals = (np.float32(0), np.int32(0))
    for first in range(0, n, EVALUATION_BATCH):
        totals = programs.evaluate(state.params, state.batch_stats, test_set, np.int32(first), totals)
    return float(totals[0]) / n, int(totals[1]) / n


def _gather(images_and_labels, batch):
    """The images at the positions `batch`, as float32 in [0, 1], and their labels."""
    images, labels = images_and_labels
    return images[batch].astype(jnp.float32) / 255, labels[batch]
