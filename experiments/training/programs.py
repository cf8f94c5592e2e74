"""The compiled functions of a run: make the initial state, order an epoch, take a step, evaluate a batch.

Conventions: images stay on the device as uint8 and become float32 in [0, 1] inside the compiled functions, which gather
their own batches. What a run varies without changing the computation (seed, rates, length) is an argument, so that runs
share their programs. All arguments and results are whole on every device of a mesh; the batch alone is split, and XLA
adds what follows from that: the sums of batch norm, of the loss and of the gradients go over all devices. Where the
devices do not divide a batch, it is filled up with copies of its last image, which are masked and count nowhere.
"""

import functools
import gc
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.config import Config
from experiments.data import augmentation
from experiments.nets import linen as linen_nets
from experiments.processes import distributed
from experiments.training import orders

MOMENTUM = 0.9
AUXILIARY_WEIGHT = 0.3  # of each early classifier's loss, as in GoogLeNet (Szegedy et al. 2015)
NOISE = 2**32 - 1  # sets the keys of dropout and noise apart from those of the augmentation, which are numbered by step
EVALUATION_BATCH = 500  # images
# The initial state is computed once: with optimization, compiling it takes longer than compiling the training step.
INIT_OPTIONS = {"xla_backend_optimization_level": 0}


class State(NamedTuple):
    """All that training changes.

    `loss` and `correct` are sums since the last row of results: of the mean losses of the batches, each with the weight
    of its images (1 for a whole batch), and of the images classified correctly.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    optimizer: optax.OptState
    loss: jax.Array
    correct: jax.Array


class Programs(NamedTuple):
    """The compiled functions. A set is the pair (images, labels).

    Attributes:
      init: seed -> State, key of the orders, key of the augmentation.
      order: labels of the training set, key, epoch -> permutation of the training images.
      train: State, training set, order, key, rate -> State, loss of the batch; the given State's buffers are reused.
      train_last: the same for the last batch of an epoch, which may be smaller.
      evaluate: params, batch_stats, test set, first, (loss, correct) -> (loss, correct), a batch added to the sums.
    """

    init: Callable
    order: Callable
    train: Callable
    train_last: Callable
    evaluate: Callable


def optimizer() -> optax.GradientTransformation:
    """Returns SGD with momentum at rate 1; the training step multiplies its update by the rate of the epoch.

    That is what SGD at that rate does (its momentum accumulates gradients, not updates), and one program serves all
    rates.
    """
    return optax.sgd(1.0, MOMENTUM)


def compile_programs(
    config: Config, num_classes: int, train_shape: tuple[int, ...], test_shape: tuple[int, ...], mesh: Mesh
) -> Programs:
    """Returns the programs of a run, compiled now or for an earlier run that shares them.

    Args:
      config: the run.
      num_classes: number of labels.
      train_shape: of the training images, [n, height, width, channels].
      test_shape: of the test images.
      mesh: the devices.

    Raises:
      ValueError: another process would compile another program; or the run draws noise, and the devices do not divide
        its batches.
    """
    sizes = {config.batch_size, train_shape[0] % config.batch_size}
    if (config.noise != "none" or config.dropout) and any(size % mesh.size for size in sizes):
        # A batch that is filled up draws other random numbers, and its copies would take part in the groups.
        raise ValueError(
            f"noise={config.noise!r} and dropout={config.dropout} with batches of {config.batch_size} (the last of an "
            f"epoch: {train_shape[0] % config.batch_size or config.batch_size}) on {mesh.size} devices, which do not "
            "divide them; choose a batch_size and train_images that they divide."
        )
    same = config.replace(
        seed=0, learning_rate=1.0, lr_decay_epochs=1, epochs=1, evaluations=1, train_images=None, classes=None
    )
    if same.start is not None:
        same = same.replace(start=same.replace(start=None, tuning="trained"))  # whatever it was, it is not compiled
    return _compile(same, num_classes, train_shape, test_shape, mesh)


@functools.lru_cache(maxsize=32)  # what a study has, whose seeds go round in the outer loop
def _compile(config, num_classes, train_shape, test_shape, mesh):
    net = linen_nets.build(config, num_classes)
    whole = NamedSharding(mesh, PartitionSpec())

    def shaped(tree):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), tree)

    def lower(function, *arguments, **options):
        return jax.jit(function, out_shardings=whole, **options).lower(*map(shaped, arguments))

    init = functools.partial(_init, net, train_shape)
    number, integer = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    state, key, _ = jax.eval_shape(init, seed)
    train_set, test_set = (
        (jax.ShapeDtypeStruct(shape, jnp.uint8), jax.ShapeDtypeStruct(shape[:1], jnp.int32))
        for shape in (train_shape, test_shape)
    )
    order = functools.partial(orders.ORDERS[config.sampling], num_classes=num_classes, batch_size=config.batch_size)
    permutation = jax.eval_shape(order, train_set[1], key, integer)

    def lower_train(size):
        step = functools.partial(_train, net, config, mesh, size)
        return lower(step, state, train_set, permutation, key, number, donate_argnums=0)

    train, rest = lower_train(config.batch_size), train_shape[0] % config.batch_size
    program = hashlib.sha256(train.as_text().encode()).hexdigest()[:16]
    distributed.agree({"program": program}, remedy="start all processes from the same sources.")
    train = train.compile()
    return Programs(
        init=lower(init, seed).compile(INIT_OPTIONS),
        order=lower(order, train_set[1], key, integer).compile(),
        train=train,
        train_last=lower_train(rest).compile() if rest else train,
        evaluate=lower(
            functools.partial(_evaluate, net, mesh),
            state.params,
            state.batch_stats,
            test_set,
            integer,
            (number, integer),
        ).compile(),
    )


def release() -> None:
    """Forgets all compiled programs, here and in JAX, when others are to follow.

    On a CPU, the programs of a run take about 900 of the 65,530 memory maps that Linux allows a process by default;
    with those of seventy runs alive, the compiler crashes.
    """
    _compile.cache_clear()
    jax.clear_caches()
    gc.collect()


def _init(net, train_shape, seed):
    init_key, order_key, augment_key = jax.random.split(jax.random.key(seed), 3)
    variables = net.init(init_key, jnp.zeros((1, *train_shape[1:])), train=False)
    params, zero = variables["params"], jnp.zeros((), jnp.int32)
    state = State(zero, params, variables.get("batch_stats", {}), optimizer().init(params), jnp.zeros(()), zero)
    return state, order_key, augment_key


def _train(net, config, mesh, size, state, train_set, order, key, rate):
    """A step with the next `size` images of the epoch."""
    steps_per_epoch = -(-len(order) // config.batch_size)
    first = state.step % steps_per_epoch * config.batch_size
    batch = jax.lax.dynamic_slice_in_dim(order, first, size)
    batch, mask = _fill_up(batch, mesh)
    x, targets = _gather(train_set, batch, mesh)
    if config.augment:
        x = augmentation.augment(jax.random.fold_in(key, state.step), x, flip=config.data == "cifar10")
    return update(net, config, size, state, (x, targets, mask), key, rate)


def update(
    net: nn.Module,
    config: Config,
    size: int,
    state: State,
    batch: tuple[jax.Array, jax.Array, jax.Array | None],
    key: jax.Array,
    rate: jax.Array,
) -> tuple[State, jax.Array]:
    """Returns the state after a step with a batch that is at hand, and the loss of the batch.

    Args:
      net: as `nets.linen.build` returns it.
      config: the run.
      size: images that count in the batch.
      state: before the step.
      batch: images, float32 in [0, 1], labels, and which of them count; None: all.
      key: of the augmentation; the noise of the step comes from it too.
      rate: learning rate.
    """
    x, targets, mask = batch
    noise = jax.random.fold_in(jax.random.fold_in(key, NOISE), state.step)

    def loss_of(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = net.apply(
            variables, x, train=True, mask=mask, mutable=["batch_stats", linen_nets.AUXILIARY], rngs={"noise": noise}
        )
        early = [
            AUXILIARY_WEIGHT * cross_entropy(each) for each in jax.tree.leaves(updated.get(linen_nets.AUXILIARY, {}))
        ]
        loss = cross_entropy(logits)
        return loss + sum(early), (loss, logits, updated.get("batch_stats", {}))

    def cross_entropy(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(where=mask)

    gradients, (loss, logits, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
    updates, momenta = optimizer().update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: rate * u, updates))
    correct = jnp.sum(logits.argmax(-1) == targets, dtype=jnp.int32, where=mask)
    losses = state.loss + loss * (size / config.batch_size)
    return State(state.step + 1, params, batch_stats, momenta, losses, state.correct + correct), loss


def _evaluate(net, mesh, params, batch_stats, test_set, first, totals):
    n = len(test_set[0])
    position, mask = _fill_up(first + jnp.arange(min(EVALUATION_BATCH, n)), mesh)
    counted = position < n  # the last batch is filled up with copies of the last image, which do not count
    if mask is not None:
        counted &= mask
    x, targets = _gather(test_set, jnp.minimum(position, n - 1), mesh)
    logits = net.apply({"params": params, "batch_stats": batch_stats}, x, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    correct = counted & (logits.argmax(-1) == targets)
    return totals[0] + jnp.sum(losses, where=counted), totals[1] + jnp.sum(correct, dtype=jnp.int32)


def evaluate(
    programs: Programs, state: State, test_set: tuple[jax.Array, jax.Array], mesh: Mesh
) -> tuple[float, float]:
    """Returns mean loss and accuracy of the whole test set in evaluation mode, every image counted once."""
    n = len(test_set[0])
    totals = distributed.replicate((np.float32(0), np.int32(0)), mesh)
    for first in range(0, n, EVALUATION_BATCH):
        first = distributed.replicate(np.int32(first), mesh)
        totals = programs.evaluate(state.params, state.batch_stats, test_set, first, totals)
        totals = distributed.one_at_a_time(totals, mesh)
    return float(totals[0]) / n, int(totals[1]) / n


def _fill_up(batch, mesh):
    """Repeats the last of the positions until the devices divide them; the mask leaves these out, None: all count."""
    missing = -len(batch) % mesh.size
    if not missing:
        return batch, None
    return jnp.pad(batch, (0, missing), mode="edge"), jnp.arange(len(batch) + missing) < len(batch)


def _gather(images_and_labels, batch, mesh):
    """The images at the positions `batch`, as float32 in [0, 1], and their labels, split over the devices."""
    images, labels = images_and_labels
    batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec(distributed.AXIS)))
    return images[batch].astype(jnp.float32) / 255, labels[batch]
