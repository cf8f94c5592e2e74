"""The compiled functions of a run: make the initial state, order an epoch, take a step, evaluate a batch.

Conventions: images stay on the device as uint8. The compiled functions gather their own batches and convert them to
float32 in [0, 1]. Settings that do not change the computation (seed, rates, length) are arguments, so that runs share
their programs. All arguments and results are replicated on the devices of a mesh, and only the batch is split; so XLA
sums the statistics of batch norm, the loss and the gradients over all devices. If the devices do not divide a batch, it
is padded with copies of its last image, and a mask leaves these out everywhere.
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
NOISE = 2**32 - 1  # separates the keys of dropout and noise from those of the augmentation, which are numbered by step
EVALUATION_BATCH = 500  # images
# The initial state is computed only once. With optimization, compiling it would take longer than the training step.
INIT_OPTIONS = {"xla_backend_optimization_level": 0}


class State(NamedTuple):
    """Everything that training changes.

    `loss` and `correct` are sums since the last row of results. `loss` sums the mean losses of the batches, with weight
    1 for a whole batch and its fraction of the images for a smaller one; `correct` counts correctly classified images.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    optimizer: optax.OptState
    loss: jax.Array
    correct: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """The `params` and `batch_stats` of the network, for `module.apply`."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class Programs(NamedTuple):
    """The compiled functions. A set is the pair (images, labels).

    Attributes:
      init: seed -> State, key of the orders, key of the augmentation.
      order: labels of the training set, key, epoch -> permutation of the training images.
      train: State, training set, order, key, rate -> State, loss of the batch; overwrites the buffers of its State.
      train_last: the same for the last batch of an epoch, which may be smaller.
      evaluate: params, batch_stats, test set, first, (loss, correct) -> (loss, correct), sums with one more batch.
    """

    init: Callable
    order: Callable
    train: Callable
    train_last: Callable
    evaluate: Callable


def optimizer() -> optax.GradientTransformation:
    """Returns SGD with momentum at rate 1; the training step multiplies its update by the rate of the epoch.

    This equals SGD at that rate, since momentum accumulates gradients and not updates, and one program serves all
    rates.
    """
    return optax.sgd(1.0, MOMENTUM)


def steps_per_epoch(config: Config, images: int) -> int:
    """Returns the number of batches in this many training images; the last one may be smaller."""
    return -(-images // config.batch_size)


def compile_programs(
    config: Config, num_classes: int, train_shape: tuple[int, ...], test_shape: tuple[int, ...], mesh: Mesh
) -> Programs:
    """Compiles the programs of a run, or returns those of an earlier run that shares them.

    Args:
      config: the run.
      num_classes: number of labels.
      train_shape: shape of the training images, [n, height, width, channels].
      test_shape: shape of the test images.
      mesh: the devices.

    Raises:
      ValueError: another process would compile a different program; or the run draws noise, and the devices do not
        divide its batches.
    """
    sizes = {config.batch_size, train_shape[0] % config.batch_size}
    if (config.noise != "none" or config.dropout) and any(size % mesh.size for size in sizes):
        # Padding would change the random numbers of a batch, and the copies would take part in the groups.
        raise ValueError(
            f"noise={config.noise!r} and dropout={config.dropout} with batches of {config.batch_size} (the last of an "
            f"epoch: {train_shape[0] % config.batch_size or config.batch_size}) on {mesh.size} devices, which do not "
            "divide them; choose a batch_size and train_images that they divide."
        )
    # The key of the cache: settings that do not affect the programs get fixed values, so that runs share programs.
    shared = config.replace(
        seed=0, learning_rate=1.0, lr_decay_epochs=1, epochs=1, evaluations=1, train_images=None, classes=None
    )
    if shared.start is not None:
        # The programs depend on whether there is a start and on `tuning`, not on the run that trained the start. Any
        # valid start serves as the key; a copy of the config always is one.
        shared = shared.replace(start=shared.replace(start=None, tuning="trained"))
    return _compile(shared, num_classes, train_shape, test_shape, mesh)


@functools.lru_cache(maxsize=32)  # enough for the arms of a study, which all run for one seed before the next
def _compile(
    config: Config, num_classes: int, train_shape: tuple[int, ...], test_shape: tuple[int, ...], mesh: Mesh
) -> Programs:
    net = linen_nets.build(config, num_classes)
    replicated = NamedSharding(mesh, PartitionSpec())

    def shapes_of(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), tree)

    def lower(function: Callable, *arguments: Any, **options: Any) -> jax.stages.Lowered:
        return jax.jit(function, out_shardings=replicated, **options).lower(*map(shapes_of, arguments))

    # Shapes of all arguments.
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

    def lower_train(size: int) -> jax.stages.Lowered:
        step = functools.partial(_train, net, config, mesh, size)
        return lower(step, state, train_set, permutation, key, number, donate_argnums=0)

    # Processes that compile different programs would wait for each other's collectives until they time out.
    train = lower_train(config.batch_size)
    program = hashlib.sha256(train.as_text().encode()).hexdigest()[:16]
    distributed.agree({"program": program}, remedy="start all processes from the same sources.")
    train = train.compile()
    rest = train_shape[0] % config.batch_size
    evaluate = functools.partial(_evaluate, net, mesh)
    return Programs(
        init=lower(init, seed).compile(INIT_OPTIONS),
        order=lower(order, train_set[1], key, integer).compile(),
        train=train,
        train_last=lower_train(rest).compile() if rest else train,
        evaluate=lower(evaluate, state.params, state.batch_stats, test_set, integer, (number, integer)).compile(),
    )


def release() -> None:
    """Releases all compiled programs, here and in JAX.

    On a CPU, the programs of a run take about 900 of the 65,530 memory maps that Linux allows a process by default, so
    the compiler crashes with the programs of seventy runs alive.
    """
    _compile.cache_clear()
    jax.clear_caches()
    gc.collect()


def _init(net: nn.Module, train_shape: tuple[int, ...], seed: jax.Array) -> tuple[State, jax.Array, jax.Array]:
    """Makes the initial state, the key of the orders, and the key of the augmentation."""
    init_key, order_key, augment_key = jax.random.split(jax.random.key(seed), 3)
    variables = net.init(init_key, jnp.zeros((1, *train_shape[1:])), train=False)
    params, zero = variables["params"], jnp.zeros((), jnp.int32)
    state = State(zero, params, variables.get("batch_stats", {}), optimizer().init(params), jnp.zeros(()), zero)
    return state, order_key, augment_key


def _train(
    net: nn.Module,
    config: Config,
    mesh: Mesh,
    size: int,
    state: State,
    train_set: tuple[jax.Array, jax.Array],
    order: jax.Array,
    key: jax.Array,
    rate: jax.Array,
) -> tuple[State, jax.Array]:
    """Takes a step with the next `size` images of the epoch."""
    first = state.step % steps_per_epoch(config, len(order)) * config.batch_size
    positions, mask = _pad(jax.lax.dynamic_slice_in_dim(order, first, size), mesh)
    x, targets = _gather(train_set, positions, mesh)
    if config.augment:
        # Mirrored digits would be other characters.
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
    """Takes a step with this batch; returns the new state and the loss of the batch.

    Args:
      net: from `nets.linen.build`.
      config: the run.
      size: number of images in the batch without padding.
      state: before the step.
      batch: images, float32 in [0, 1], labels, and a mask that is False for padding; None without padding.
      key: key of the augmentation; the noise of the step derives from it too.
      rate: learning rate.
    """
    x, targets, mask = batch
    noise = jax.random.fold_in(jax.random.fold_in(key, NOISE), state.step)

    def loss_of(params: Any) -> tuple[jax.Array, tuple]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = net.apply(
            variables, x, train=True, mask=mask, mutable=["batch_stats", linen_nets.AUXILIARY], rngs={"noise": noise}
        )
        early_logits = jax.tree.leaves(updated.get(linen_nets.AUXILIARY, {}))
        early_losses = [AUXILIARY_WEIGHT * cross_entropy(early) for early in early_logits]
        # The early classifiers shape the gradient. The reported loss is that of the last one alone.
        loss = cross_entropy(logits)
        return loss + sum(early_losses), (loss, logits, updated.get("batch_stats", {}))

    def cross_entropy(logits: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(where=mask)

    gradients, (loss, logits, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
    updates, momenta = optimizer().update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: rate * u, updates))
    correct = jnp.sum(logits.argmax(-1) == targets, dtype=jnp.int32, where=mask)
    losses = state.loss + loss * (size / config.batch_size)
    return State(state.step + 1, params, batch_stats, momenta, losses, state.correct + correct), loss


def _evaluate(
    net: nn.Module,
    mesh: Mesh,
    params: Any,
    batch_stats: Any,
    test_set: tuple[jax.Array, jax.Array],
    first: jax.Array,
    totals: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Adds the loss and the correct images of the batch that begins at `first`."""
    n = len(test_set[0])
    positions, mask = _pad(first + jnp.arange(min(EVALUATION_BATCH, n)), mesh)
    # One program serves all batches: the last one repeats the last image, and does not count it again.
    counted = positions < n
    if mask is not None:
        counted &= mask
    x, targets = _gather(test_set, jnp.minimum(positions, n - 1), mesh)
    logits = net.apply({"params": params, "batch_stats": batch_stats}, x, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    correct = counted & (logits.argmax(-1) == targets)
    return totals[0] + jnp.sum(losses, where=counted), totals[1] + jnp.sum(correct, dtype=jnp.int32)


def evaluate(
    programs: Programs, state: State, test_set: tuple[jax.Array, jax.Array], mesh: Mesh
) -> tuple[float, float]:
    """Computes mean loss and accuracy of the whole test set in evaluation mode, counting every image once."""
    n = len(test_set[0])
    totals = distributed.replicate((np.float32(0), np.int32(0)), mesh)
    for first in range(0, n, EVALUATION_BATCH):
        first = distributed.replicate(np.int32(first), mesh)
        totals = programs.evaluate(state.params, state.batch_stats, test_set, first, totals)
        totals = distributed.one_at_a_time(totals, mesh)
    return float(totals[0]) / n, int(totals[1]) / n


def _pad(positions: jax.Array, mesh: Mesh) -> tuple[jax.Array, jax.Array | None]:
    """Repeats the last position until the devices divide their number; the mask is None if that is not needed."""
    missing = -len(positions) % mesh.size
    if not missing:
        return positions, None
    mask = jnp.arange(len(positions) + missing) < len(positions)
    return jnp.pad(positions, (0, missing), mode="edge"), mask


def _gather(dataset: tuple[jax.Array, jax.Array], positions: jax.Array, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Gathers images, as float32 in [0, 1], and labels at these positions, split over the devices."""
    images, labels = dataset
    split = NamedSharding(mesh, PartitionSpec(distributed.AXIS))
    positions = jax.lax.with_sharding_constraint(positions, split)
    return images[positions].astype(jnp.float32) / 255, labels[positions]
