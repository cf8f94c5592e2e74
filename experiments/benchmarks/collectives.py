"""What synchronised batch norm does on each parallel API: collectives, bytes and errors of one layer in training.

Conventions: collectives are counted in compiled programs; those inside a branch that runs only where features cancel (a
mean beyond two standard deviations) are counted apart from those that every step executes. Bytes are what one device
hands over.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import jaxbn.linen
from experiments.benchmarks.hlo import collectives, executed, executed_bytes
from experiments.evidence import files, provenance
from experiments.evidence.text import STABLE, markdown

NAME = "collectives"
DEVICES = 8
FEATURES = 64
SHAPE = (4, 2, 2, FEATURES)  # of one device's inputs
GROWTH = (8, 64, 512)  # numbers of devices
GROUP = 8  # devices that normalise together in the last line of the growth
AXIS = "data"
LAYERS = {
    "jaxbn": jaxbn.linen.BatchNorm,
    "Flax": nn.BatchNorm,
    "Flax, stable": lambda **options: nn.BatchNorm(use_fast_variance=False, **options),
}
# How the gradient of a mean over the whole batch is taken. Under jit there is nothing to do: the program is that of one
# device. Under shard_map with check_vma=True the derivative of a parameter that is the same everywhere is already a sum
# over the devices; elsewhere it is that of the device's own loss.
RECIPES = {
    "jit": "grad(loss)",
    "shard_map": "grad(pmean(loss))",
    "shard_map, check_vma=False": "pmean(grad(loss))",
    "pmap": "pmean(grad(loss))",
    "vmap": "pmean(grad(loss))",
}
VALID = ((4, 4, 4, 1), (4, 4, 4, 0))  # numbers of valid examples on four neighbouring devices


@functools.cache
def compile_layer(
    layer: Callable[..., nn.Module], api: str, *, devices: int, backward: bool = False, masked: bool = False
) -> jax.stages.Compiled:
    """Compiles a training pass of one layer, the batch spread over devices.

    Args:
      layer: makes a linen layer with the arguments of ``flax.linen.BatchNorm``.
      api: one of `RECIPES`.
      devices: number of devices of this process, at most ``jax.local_device_count()``; under vmap, of parts.
      backward: also the gradient in the inputs. Those of scale and bias are left out: they are added over the devices
        with the gradients of all other parameters, once in a step.
      masked: give the layer a mask of the examples.

    Returns:
      The program: inputs, cotangents of the outputs and perhaps a mask, as `split` makes them -> outputs or gradients,
      and the moments of the batch as the layer's running statistics.
    """
    norm = layer(use_running_average=False, momentum=0.0, axis_name=None if api == "jit" else AXIS)
    variables = {
        "params": {"scale": jnp.ones(FEATURES), "bias": jnp.zeros(FEATURES)},
        "batch_stats": {"mean": jnp.zeros(FEATURES), "var": jnp.ones(FEATURES)},
    }

    def run(x, dy, *mask):
        def loss_of(x):
            y, updates = norm.apply(variables, x, mask=mask[0] if mask else None, mutable=["batch_stats"])
            return jnp.vdot(y, dy), (y, updates["batch_stats"])

        if not backward:
            return loss_of(x)[1]
        dx, (_, batch_stats) = jax.grad(loss_of, has_aux=True)(x)
        return dx, batch_stats

    sharding = None
    if api == "pmap":
        program = jax.pmap(run, axis_name=AXIS, devices=jax.local_devices()[:devices])
    elif api == "vmap":
        program = jax.jit(jax.vmap(run, axis_name=AXIS))
    else:
        mesh = Mesh(jax.local_devices()[:devices], AXIS, axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, P(AXIS))
        if api != "jit":  # statistics of groups differ from device to device, so they come out side by side
            run = jax.shard_map(run, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=api == "shard_map")
        program = jax.jit(run)
    shape = split(np.empty((devices * SHAPE[0], *SHAPE[1:])), api, devices).shape
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    mask = jax.ShapeDtypeStruct((*shape[:-3], 1, 1, 1), jnp.bool_, sharding=sharding)
    return program.lower(x, x, *[mask] * masked).compile()


def split(batch: np.ndarray, api: str, devices: int) -> np.ndarray:
    """Returns a batch as the API takes it: with an axis for the devices under pmap and vmap."""
    return batch.reshape(devices, -1, *batch.shape[1:]) if api in ("pmap", "vmap") else batch


def error_of_variance(layer: Callable[..., nn.Module], api: str, valid: tuple[int, ...], devices: int) -> float:
    """Returns the largest relative error of the variance over all devices, in %, against float64.

    Args:
      layer: as in `compile_layer`.
      api: one of `RECIPES`.
      valid: numbers of valid examples on neighbouring devices, repeated over all of them.
      devices: number of devices, a multiple of that of the numbers.

    Raises:
      ValueError: for another number of devices.
    """
    if devices % len(valid):
        raise ValueError(f"devices={devices}; a multiple of {len(valid)} is accepted; choose one of those.")
    generator = np.random.default_rng(0)
    x = generator.normal(size=(devices * SHAPE[0], *SHAPE[1:])).astype(np.float32)
    examples = np.arange(SHAPE[0]) < np.resize(valid, devices)[:, None]
    exact = x[examples.ravel()].var((0, 1, 2), dtype=np.float64)
    arguments = [split(a, api, devices) for a in (x, x, examples.reshape(-1, 1, 1, 1))]
    _, moments = compile_layer(layer, api, devices=devices, masked=True)(*arguments)
    # In NumPy, whose maximum is NaN where one value is; over devices XLA's may not be.
    var = np.asarray(moments["var"]).reshape(-1, FEATURES)
    return float(100 * abs(var / exact - 1).max())


def run(*, out: Path) -> None:
    """Measures what each API does and how the bytes grow with the devices, which are simulated; writes and prints it.

    Args:
      out: folder of the file.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(GROWTH))
    path = out / f"{NAME}.jsonl"
    settings = {"features": FEATURES, "devices": DEVICES, "growth": list(GROWTH), "group": GROUP}
    header = provenance.measurement_header(settings)
    files.measure_in_pieces(path, header, {"what each API does": what_each_api_does, "growth": growth})
    records = files.read_records(path)["records"]
    console = Console(width=120)
    console.print(table_of_apis([record for record in records if "growth" not in record]))
    console.print(table_of_growth([record for record in records if "growth" in record]))


def what_each_api_does(devices: int = DEVICES) -> list[dict]:
    """Returns a record for each API and layer: collectives and bytes of both passes, errors of the variance in %."""
    return [
        {
            "api": api,
            "gradient": recipe,
            "layer": name,
            "devices": devices,
            "forward": cost(compile_layer(layer, api, devices=devices)),
            "forward+backward": cost(compile_layer(layer, api, devices=devices, backward=True)),
            "errors": {_examples(valid): error_of_variance(layer, api, valid, devices) for valid in VALID},
        }
        for api, recipe in RECIPES.items()
        for name, layer in LAYERS.items()
    ]


def growth(counts: Sequence[int] = GROWTH) -> list[dict]:
    """Returns a record for each layer and number of devices: collectives and bytes of both passes under shard_map."""
    return [
        {
            "layer": name,
            "growth": devices,
            "forward+backward": cost(compile_layer(layer, "shard_map", devices=devices, backward=True)),
        }
        for devices in counts
        for name, layer in (LAYERS | {f"jaxbn, groups of {GROUP}": _in_groups(devices)}).items()
    ]


def cost(program: jax.stages.Compiled) -> dict[str, int]:
    """Returns the collectives of a program, those that run only where features cancel, and the bytes of the others."""
    found = collectives(program.as_text())
    always = executed(found)
    return {"collectives": len(always), "conditional": len(found) - len(always), "bytes": executed_bytes(found)}


def table_of_apis(records: list[dict]) -> Table:
    """Returns the table of collectives and errors by API and layer."""
    table = Table(
        title=f"What each API does with a batch on {records[0]['devices']} devices, jax {jax.__version__}",
        caption="axis_name='data' but under jit, which needs none. Collectives of a layer forward, and forward and "
        "backward; (+1): one more in a step where features cancel. Error of the batch's variance, with so many valid "
        "examples on neighbouring devices. Flax, stable: use_fast_variance=False.",
    )
    for column in ("API", "gradient", "layer"):
        table.add_column(column)
    for column in ("collectives", *(f"error, {valid}" for valid in records[0]["errors"])):
        table.add_column(column, justify="right")
    last = None
    for record in records:
        if last is not None and record["api"] != last:
            table.add_section()
        table.add_row(
            *(("", "") if record["api"] == last else (record["api"], record["gradient"])),
            record["layer"],
            ", ".join(count(record[name]) for name in ("forward", "forward+backward")),
            *map(percent, record["errors"].values()),
        )
        last = record["api"]
    return table


def table_of_growth(records: list[dict]) -> Table:
    """Returns the table of collectives and bytes by number of devices."""
    table = Table(
        "layer", title=f"Bytes that a device hands over, {FEATURES} features, shard_map, forward and backward"
    )
    sizes = {record["growth"] for record in records}
    for devices in sorted(sizes):
        table.add_column(f"{devices} devices", justify="right")
    by_layer = {}
    for record in sorted(records, key=lambda record: record["growth"]):
        sent = record["forward+backward"]
        by_layer.setdefault(record["layer"], []).append(f"{count(sent)}: {sent['bytes']:,}")
    for layer, cells in by_layer.items():
        table.add_row(layer, *cells)
    return table


def count(cost: dict[str, int]) -> str:
    """Returns the number of collectives in words, such as "2 (+1)"."""
    return f"{cost['collectives']}" + (f" (+{cost['conditional']})" if cost["conditional"] else "")


def percent(error: float) -> str:
    """Returns an error in words."""
    return "NaN" if math.isnan(error) else f"{error:.0f} %" if error >= 1 else "0"


def _in_groups(devices):
    """The layer that normalises in groups of neighbouring devices."""
    groups = [list(range(first, first + GROUP)) for first in range(0, devices, GROUP)]
    return lambda **options: jaxbn.linen.BatchNorm(axis_index_groups=groups, **options)


def _examples(valid):
    return ", ".join(map(str, valid))


def block(run: dict) -> str:
    """Returns the collectives and errors by layer, APIs that do the same together, and the bytes by devices."""
    records = [record for record in run["records"] if "growth" not in record]
    sent = {record["layer"]: record for record in records if record["api"] == "jit"}
    grouped = {}
    for record in records:
        # Under vmap there is one device, which sends nothing; only its errors count.
        cost = sent[record["layer"]] if record["api"] == "vmap" else record
        cells = {
            "collectives, forward": count(cost["forward"]),
            "forward and backward": count(cost["forward+backward"]),
            **{f"error, {valid}": percent(error) for valid, error in record["errors"].items()},
        }
        _, apis = grouped.setdefault((record["layer"], *cells.values()), (cells, []))
        apis.append(record["api"])
    every = {record["api"] for record in records}
    lines = [{"": f"{layer}, {_apis(apis, every)}", **cells} for (layer, *_), (cells, apis) in grouped.items()]
    return f"{markdown(lines)}\n\n{_growth_sentence(run)} {STABLE}"


def _apis(apis, every):
    """APIs in words; both ways of checking in shard_map are one."""
    if set(apis) == every:
        return "every API"
    return ", ".join(f"`{api}`" for api in dict.fromkeys(api.split(",")[0] for api in apis))


def _growth_sentence(run):
    """How the bytes change with the devices, in words that hold for any outcome."""
    counts = run["header"]["settings"]["growth"]
    sentences = []
    for layer in LAYERS:
        records = [r for r in run["records"] if r.get("growth") in counts and r["layer"] == layer]
        sent = list(dict.fromkeys(f"{record['forward+backward']['bytes']:,}" for record in records))
        sentences.append(f"{layer} {', '.join(sent)}")
    devices = ", ".join(map(str, counts))
    return (
        f"Bytes that a device hands over forward and backward, {run['header']['settings']['features']} features, on "
        f"{devices} devices (one number: the same on all): {'; '.join(sentences)}."
    )
