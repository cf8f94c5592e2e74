"""Folds the batch norms of whole networks into their convolutions, and measures what that changes.

Measured are the outputs and the time of an evaluation, for random weights, in linen and in nnx. The study of the same
name, `experiments/studies/folding.py`, folds trained networks.

Conventions: images are noise, uniform in [0, 1]. Parameters are random, scale and bias around 1 and 0, and statistics
are those of a training-mode pass over the images. The network before and after folding is timed in one run, in shuffled
order, with one warm-up call right before each timing. Quote ratios: the machine's speed cancels in them.
"""

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks import Settings
from experiments.evidence import provenance, timing
from experiments.evidence.text import markdown, short, with_quartiles
from experiments.nets import linen as linen_nets
from experiments.nets import nnx as nnx_nets
from experiments.probes.folding import difference, fold_net, timings
from experiments.training.evaluation import evaluate
from jaxbn import calibrate

NAME = "folding"
Api = Literal["linen", "nnx"]
CLASSES = 10
IMAGE_SIZE = 32
NETS = {
    "ResNet-20": (linen_nets.ResNet20, nnx_nets.ResNet20),
    "Inception": (linen_nets.Inception, nnx_nets.Inception),
}


class Folded(NamedTuple):
    """A network before and after folding.

    Attributes:
      norms: number of batch norms before.
      folded: how many of them were folded.
      difference: largest difference of a logit, divided by the largest magnitude of a logit.
      before: median seconds of an evaluation before.
      after: median seconds of an evaluation after.
      ratio: seconds after over seconds before, within the rounds, from `timing.quartiles`.
    """

    norms: int
    folded: int
    difference: float
    before: float
    after: float
    ratio: dict[str, float]


def header(settings: Settings) -> dict:
    """Returns the first line of the file."""
    sizes = {"batch_size": settings.folding_batch_size, "image_size": IMAGE_SIZE, "widths": _widths(settings)}
    return provenance.measurement_header(sizes | {"rounds": settings.folding_rounds})


def pieces(settings: Settings) -> dict[str, Callable[[], list[dict]]]:
    """Returns one piece for each network and API."""
    shape = (settings.folding_batch_size, IMAGE_SIZE, IMAGE_SIZE, 3)
    images = jax.random.uniform(jax.random.key(0), shape)
    return {
        f"{net}, {api}": functools.partial(
            measure, net, api, width=width, images=images, rounds=settings.folding_rounds
        )
        for net, width in _widths(settings).items()
        for api in get_args(Api)
    }


def measure(net: str, api: Api, *, width: float, images: jax.Array, rounds: int) -> list[dict]:
    """Returns the record of a network; for the arguments, see `compare`."""
    folded = compare(net, api, width=width, images=images, rounds=rounds)
    return [{"net": net, "api": api, "width": width, **folded._asdict()}]


def compare(net: str, api: Api, *, width: float, images: jax.Array, rounds: int) -> Folded:
    """Folds a network, and compares its logits and its time with those before.

    Args:
      net: key of `NETS`.
      api: flax.linen or flax.nnx.
      width: multiplies the number of channels.
      images: shape [n, height, width, channels].
      rounds: timings of each.
    """
    networks = fold_net(*_random_net(net, api, width, images), images)
    changed = difference(networks.before(images), networks.after(images))
    before, after = timings(networks, images, rounds)
    medians = statistics.median(before), statistics.median(after)
    return Folded(networks.norms, networks.folded, changed, *medians, timing.ratio(after, before))


def block(run: dict) -> str:
    """Returns the table of all networks, with a caption."""
    settings = run["header"]["settings"]
    rows = [
        {
            "network": f"{record['net']} at width {record['width']:g}, {record['api']}",
            "batch norms": f"{record['norms']}",
            "folded": f"{record['folded']}",
            "relative difference": short(f"{record['difference']:.0e}"),
            "time of an evaluation, after / before": with_quartiles(record["ratio"]),
        }
        for record in run["records"]
    ]
    size = settings["image_size"]
    return (
        f"{markdown(rows)}\n\nRandom weights, and batches of {settings['batch_size']} images of {size} x {size}, "
        "float32. Relative difference: the largest difference of a logit, divided by the largest magnitude of a logit. "
        f"Times: median and quartiles of {settings['rounds']} rounds. The linen and nnx networks are the same, so the "
        "difference between their times is noise."
    )


def _widths(settings: Settings) -> dict[str, float]:
    """Returns the width of each network; Inception at width 1 takes sixteen times as long as at 0.25."""
    return {"ResNet-20": 1.0, "Inception": settings.inception_width}


def _random_net(net: str, api: Api, width: float, images: jax.Array) -> tuple[nn.Module | nnx.Module, Any]:
    """Makes a network with random parameters and the statistics of these images.

    Returns:
      The network, and its variables in linen or None in nnx.
    """
    linen_net, nnx_net = NETS[net]
    if api == "linen":
        model = linen_net(num_classes=CLASSES, width=width)
        shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
        return model, calibrate.one_pass(model, _random(shapes), [images], call=evaluate)
    options = {"num_classes": CLASSES, "width": width, "channels": images.shape[-1]}
    model = nnx.eval_shape(lambda: nnx_net(**options, rngs=nnx.Rngs(0)))
    nnx.update(model, _random(nnx.to_pure_dict(nnx.state(model))))
    return calibrate.one_pass(model, None, [images], call=evaluate), None


def _random(shapes: Any) -> Any:
    """Draws variables of these shapes in NumPy, since compiling the initializers takes longer than everything else."""
    rng = np.random.default_rng(0)

    def variable(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = math.prod(leaf.shape[:-1])
        draws = {
            "kernel": lambda: rng.normal(0, math.sqrt(2 / fan_in), leaf.shape),
            "scale": lambda: rng.uniform(0.5, 1.5, leaf.shape),
            "bias": lambda: rng.uniform(-0.5, 0.5, leaf.shape),
            "mean": lambda: np.zeros(leaf.shape),
            "var": lambda: np.ones(leaf.shape),
        }
        return jnp.asarray(draws[path[-1].key](), leaf.dtype)

    return jax.tree.map_with_path(variable, shapes)
