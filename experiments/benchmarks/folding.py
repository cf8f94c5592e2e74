"""Batch norms folded into the convolutions before them: what it changes in the outputs, and in the time of inference.

The command of this name measures it on nets with random weights, linen and nnx; the study of this name, in
`studies/folding.py`, folds trained nets with the functions below, and asks for their accuracy too.

Convention: images are noise, uniform in [0, 1]; parameters are random, scale and bias around 1 and 0, and statistics
are those of a training-mode pass over the images. A net before and after is timed in one run, in shuffled order, each
once just before it is timed; the numbers to quote are ratios, since the machine's speed cancels in them.
"""

import functools
import math
import statistics
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.evidence import files, provenance, timing
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
    """What became of a net.

    Attributes:
      norms: number of batch norms before.
      folded: how many of them are folded.
      difference: largest difference of a logit, over the largest logit in magnitude.
      before: median seconds of an evaluation before.
      after: median seconds of an evaluation after.
      ratio: of the seconds after and before, within the rounds, as `timing.quartiles` returns it.
    """

    norms: int
    folded: int
    difference: float
    before: float
    after: float
    ratio: dict[str, float]


def measure(net: str, api: Api, *, width: float, images: jax.Array, rounds: int) -> Folded:
    """Folds a net, and compares its logits and its time with those before.

    Args:
      net: one of `NETS`.
      api: flax.linen or flax.nnx.
      width: multiplies the number of channels.
      images: shape [n, height, width, channels].
      rounds: timings of each.

    Returns:
      The comparison.
    """
    pair = fold_net(*_net(net, api, width, images), images)
    changed = difference(pair.before(images), pair.after(images))
    before, after = timings(pair, images, rounds)
    medians = statistics.median(before), statistics.median(after)
    return Folded(pair.norms, pair.folded, changed, *medians, timing.ratio(after, before))


def run(*, batch_size: int, inception_width: float, rounds: int, out: Path) -> None:
    """Measures every net on both APIs, and writes the file.

    Args:
      batch_size: images per evaluation.
      inception_width: width of the Inception net; ResNet-20 has width 1.
      rounds: timings of each net.
      out: folder of the file.
    """
    widths = {"ResNet-20": 1.0, "Inception": inception_width}
    images = jax.random.uniform(jax.random.key(0), (batch_size, IMAGE_SIZE, IMAGE_SIZE, 3))

    def records(net, api):
        found = measure(net, api, width=widths[net], images=images, rounds=rounds)
        return [{"net": net, "api": api, "width": widths[net], **found._asdict()}]

    settings = {"batch_size": batch_size, "image_size": IMAGE_SIZE, "widths": widths, "rounds": rounds}
    pieces = {f"{net}, {api}": functools.partial(records, net, api) for net in widths for api in get_args(Api)}
    files.measure_in_pieces(out / f"{NAME}.jsonl", provenance.measurement_header(settings), pieces)


def _net(net, api, width, images):
    """Returns a net as if it had been trained, and its variables if it is a linen one."""
    linen, twin = NETS[net]
    if api == "linen":
        model = linen(num_classes=CLASSES, width=width)
        variables = _random(jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images))
        return model, calibrate.one_pass(model, variables, [images], call=evaluate)
    options = {"num_classes": CLASSES, "width": width, "channels": images.shape[-1]}
    model = nnx.eval_shape(lambda: twin(**options, rngs=nnx.Rngs(0)))
    nnx.update(model, _random(nnx.to_pure_dict(nnx.state(model))))
    return calibrate.one_pass(model, None, [images], call=evaluate), None


def _random(shapes):
    """Returns variables of these shapes; initializers would take longer to compile than all else together."""
    rng = np.random.default_rng(0)

    def variable(path, leaf):
        values = {
            "kernel": lambda: rng.normal(0, math.sqrt(2 / math.prod(leaf.shape[:-1])), leaf.shape),
            "scale": lambda: rng.uniform(0.5, 1.5, leaf.shape),
            "bias": lambda: rng.uniform(-0.5, 0.5, leaf.shape),
            "mean": lambda: np.zeros(leaf.shape),
            "var": lambda: np.ones(leaf.shape),
        }
        return jnp.asarray(values[path[-1].key](), leaf.dtype)

    return jax.tree.map_with_path(variable, shapes)


def block(run: dict) -> str:
    """Returns what folding changes in each net."""
    settings = run["header"]["settings"]
    lines = [
        {
            "net": f"{record['net']} at width {record['width']:g}, {record['api']}",
            "batch norms": f"{record['norms']}",
            "folded": f"{record['folded']}",
            "difference": short(f"{record['difference']:.0e}"),
            "time of an evaluation, after / before": with_quartiles(record["ratio"]),
        }
        for record in run["records"]
    ]
    size = settings["image_size"]
    return (
        f"{markdown(lines)}\n\nRandom weights, and batches of {settings['batch_size']} images of {size} x {size}, "
        "float32. Difference: the largest of a logit, over the largest logit in magnitude. Times: median and quartiles "
        f"of {settings['rounds']} rounds; in linen and nnx the net is the same: what their times differ by is noise."
    )
