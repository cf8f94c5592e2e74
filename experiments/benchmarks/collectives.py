"""Communication of one synchronized batch norm in training on each parallel API: collectives, bytes and errors.

Conventions: collectives are counted in compiled programs. Those in a branch that runs only where features cancel (a
mean beyond two standard deviations) are counted apart from those that every step executes. Bytes are what one device
contributes.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

import jaxbn.linen
from experiments.benchmarks import Settings
from experiments.benchmarks.hlo import collectives, executed, executed_bytes
from experiments.evidence import provenance
from experiments.evidence.text import STABLE, markdown

NAME = "collectives"
DEVICES = 8
FEATURES = 64
SHAPE = (4, 2, 2, FEATURES)  # inputs of one device
GROWTH = (8, 64, 512)  # numbers of devices; `parts.ENVIRONMENTS` simulates the largest
GROUP = 8  # devices that normalize together, for the layer with `axis_index_groups`
AXIS = "data"
LAYERS = {
    "jaxbn": jaxbn.linen.BatchNorm,
    "Flax": nn.BatchNorm,
    "Flax, stable": lambda **options: nn.BatchNorm(use_fast_variance=False, **options),
}
# How to differentiate a mean over the whole batch. Under jit there is nothing to do, since the program is that of one
# device. Under shard_map with check_vma=True, the derivative with respect to a replicated parameter is already summed
# over the devices; on the other APIs it is that of the device's own loss.
RECIPES = {
    "jit": "grad(loss)",
    "shard_map": "grad(pmean(loss))",
    "shard_map, check_vma=False": "pmean(grad(loss))",
    "pmap": "pmean(grad(loss))",
    "vmap": "pmean(grad(loss))",
}
VALID = ((4, 4, 4, 1), (4, 4, 4, 0))  # numbers of valid examples on four neighboring devices


@functools.cache
def compile_layer(
    layer: Callable[..., nn.Module], api: str, *, devices: int, backward: bool = False, masked: bool = False
) -> jax.stages.Compiled:
    """Compiles a training pass of one layer, with the batch split over devices.

    Args:
      layer: makes a linen layer from the arguments of ``flax.linen.BatchNorm``.
      api: key of `RECIPES`.
      devices: number of devices of this process, at most ``jax.local_device_count()``; under vmap, number of parts.
      backward: also computes the gradient with respect to the inputs. The gradients of scale and bias are left out: a
        training step sums them over the devices once, together with those of all other parameters.
      masked: passes a mask of the examples.

    Returns:
      A program that maps inputs, cotangents of the outputs and perhaps a mask, all from `split`, to outputs or
      gradients, and the moments of the batch in the form of the layer's running statistics.
    """
    norm = layer(use_running_average=False, momentum=0.0, axis_name=None if api == "jit" else AXIS)
    variables = {
        "params": {"scale": jnp.ones(FEATURES), "bias": jnp.zeros(FEATURES)},
        "batch_stats": {"mean": jnp.zeros(FEATURES), "var": jnp.ones(FEATURES)},
    }

    def run(x: jax.Array, dy: jax.Array, *mask: jax.Array) -> tuple:
        def loss_of(x: jax.Array) -> tuple:
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
        if api != "jit":
            # Statistics of groups differ from device to device, so all outputs are concatenated over the devices.
            run = jax.shard_map(run, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=api == "shard_map")
        program = jax.jit(run)
    shape = split(np.empty((devices * SHAPE[0], *SHAPE[1:])), api, devices).shape
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    mask = jax.ShapeDtypeStruct((*shape[:-3], 1, 1, 1), jnp.bool_, sharding=sharding)
    return program.lower(x, x, *[mask] * masked).compile()


def split(batch: np.ndarray, api: str, devices: int) -> np.ndarray:
    """Reshapes a batch for an API: pmap and vmap need a leading axis for the devices."""
    return batch.reshape(devices, -1, *batch.shape[1:]) if api in ("pmap", "vmap") else batch


def error_of_variance(layer: Callable[..., nn.Module], api: str, valid: tuple[int, ...], devices: int) -> float:
    """Returns the largest relative error of the batch variance against float64, in %.

    Args:
      layer: as in `compile_layer`.
      api: key of `RECIPES`.
      valid: numbers of valid examples on neighboring devices, repeated over all devices.
      devices: number of devices, a multiple of ``len(valid)``.

    Raises:
      ValueError: the number of devices is not such a multiple.
    """
    if devices % len(valid):
        raise ValueError(f"devices must be a multiple of {len(valid)}, got {devices}.")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(devices * SHAPE[0], *SHAPE[1:])).astype(np.float32)
    mask = np.arange(SHAPE[0]) < np.resize(valid, devices)[:, None]
    exact = x[mask.ravel()].var((0, 1, 2), dtype=np.float64)
    arguments = [split(array, api, devices) for array in (x, x, mask.reshape(-1, 1, 1, 1))]
    _, moments = compile_layer(layer, api, devices=devices, masked=True)(*arguments)
    # NumPy's maximum propagates NaN. XLA's reduction over devices may drop it.
    var = np.asarray(moments["var"]).reshape(-1, FEATURES)
    return float(100 * abs(var / exact - 1).max())


def header(settings: Settings) -> dict:
    """Returns the first line of the file."""
    del settings
    sizes = {"features": FEATURES, "devices": DEVICES, "growth": list(GROWTH), "group": GROUP}
    return provenance.measurement_header(sizes)


def pieces(settings: Settings) -> dict[str, Callable[[], list[dict]]]:
    """Returns one piece for the APIs, and one for the number of devices."""
    del settings
    return {"collectives and errors by API": measure_apis, "collectives by number of devices": measure_growth}


def measure_apis(devices: int = DEVICES) -> list[dict]:
    """Returns one record for each API and layer: collectives and bytes of both passes, errors of the variance in %."""
    return [
        {
            "api": api,
            "gradient": recipe,
            "layer": name,
            "devices": devices,
            "forward": cost(compile_layer(layer, api, devices=devices)),
            "forward+backward": cost(compile_layer(layer, api, devices=devices, backward=True)),
            "errors": {_join(valid): error_of_variance(layer, api, valid, devices) for valid in VALID},
        }
        for api, recipe in RECIPES.items()
        for name, layer in LAYERS.items()
    ]


def measure_growth(counts: Sequence[int] = GROWTH) -> list[dict]:
    """Returns one record for each layer and number of devices: collectives and bytes of both passes under shard_map."""
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
    """Counts the collectives of every step with their bytes, and the conditional collectives."""
    all_of_them = collectives(program.as_text())
    always = executed(all_of_them)
    return {
        "collectives": len(always),
        "conditional": len(all_of_them) - len(always),
        "bytes": executed_bytes(all_of_them),
    }


def tables(run: dict) -> list[Table]:
    """Returns what the terminal shows: every API and layer, and the bytes by number of devices."""
    by_api = [record for record in run["records"] if "growth" not in record]
    by_devices = [record for record in run["records"] if "growth" in record]
    return [table_of_apis(by_api), table_of_growth(by_devices)]


def table_of_apis(records: list[dict]) -> Table:
    """Returns the table of collectives and errors by API and layer."""
    table = Table(
        title=f"Collectives and errors of one layer on {records[0]['devices']} devices, jax {jax.__version__}",
        caption="axis_name='data', except under jit, which needs none. Collectives of the forward pass, and of forward "
        "and backward; (+1): one more in steps where features cancel. Error of the batch variance for these numbers of "
        "valid examples on neighboring devices. Flax, stable: use_fast_variance=False.",
    )
    for column in ("API", "gradient", "layer"):
        table.add_column(column)
    for column in ("collectives", *(f"error, {valid}" for valid in records[0]["errors"])):
        table.add_column(column, justify="right")
    previous_api = None
    for record in records:
        new_section = record["api"] != previous_api
        if new_section and previous_api is not None:
            table.add_section()
        table.add_row(
            *((record["api"], record["gradient"]) if new_section else ("", "")),
            record["layer"],
            ", ".join(count(record[name]) for name in ("forward", "forward+backward")),
            *map(percent, record["errors"].values()),
        )
        previous_api = record["api"]
    return table


def table_of_growth(records: list[dict]) -> Table:
    """Returns the table of collectives and bytes by number of devices."""
    table = Table("layer", title=f"Collectives: bytes per device, {FEATURES} features, shard_map, forward and backward")
    for devices in sorted({record["growth"] for record in records}):
        table.add_column(f"{devices} devices", justify="right")
    cells_by_layer = {}
    for record in sorted(records, key=lambda record: record["growth"]):
        record_cost = record["forward+backward"]
        cells = cells_by_layer.setdefault(record["layer"], [])
        cells.append(f"{count(record_cost)}: {record_cost['bytes']:,}")
    for layer, cells in cells_by_layer.items():
        table.add_row(layer, *cells)
    return table


def count(cost: dict[str, int]) -> str:
    """Formats a number of collectives, such as "2 (+1)"."""
    return f"{cost['collectives']}" + (f" (+{cost['conditional']})" if cost["conditional"] else "")


def percent(error: float) -> str:
    """Formats an error."""
    return "NaN" if math.isnan(error) else f"{error:.0f} %" if error >= 1 else "0"


def block(run: dict) -> str:
    """Returns collectives and errors by layer, with equal APIs in one row, and the bytes by number of devices."""
    records = [record for record in run["records"] if "growth" not in record]
    under_jit = {record["layer"]: record for record in records if record["api"] == "jit"}
    grouped = {}
    for record in records:
        # A vmapped program runs on one device and communicates nothing. Only its errors tell it from other APIs.
        costs = under_jit[record["layer"]] if record["api"] == "vmap" else record
        cells = {
            "forward": count(costs["forward"]),
            "forward and backward": count(costs["forward+backward"]),
            **{f"error, {valid}": percent(error) for valid, error in record["errors"].items()},
        }
        _, apis = grouped.setdefault((record["layer"], *cells.values()), (cells, []))
        apis.append(record["api"])
    every_api = {record["api"] for record in records}
    rows = [
        {"collectives of": f"{layer}, {_list_apis(apis, every_api)}", **cells}
        for (layer, *_), (cells, apis) in grouped.items()
    ]
    return f"{markdown(rows)}\n\n{_growth_sentence(run)} {STABLE}"


def _in_groups(devices: int) -> Callable[..., nn.Module]:
    """Makes the layer that normalizes in groups of neighboring devices."""
    groups = [list(range(first, first + GROUP)) for first in range(0, devices, GROUP)]
    return lambda **options: jaxbn.linen.BatchNorm(axis_index_groups=groups, **options)


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _list_apis(apis: list[str], every_api: set[str]) -> str:
    """Names APIs; shard_map appears once, with and without `check_vma`."""
    if set(apis) == every_api:
        return "every API"
    return ", ".join(f"`{api}`" for api in dict.fromkeys(api.split(",")[0] for api in apis))


def _growth_sentence(run: dict) -> str:
    """Says how the bytes change with the number of devices, in words that fit any outcome."""
    settings = run["header"]["settings"]
    by_layer = []
    for layer in LAYERS:
        records = [
            record
            for record in run["records"]
            if record.get("growth") in settings["growth"] and record["layer"] == layer
        ]
        sizes = dict.fromkeys(f"{record['forward+backward']['bytes']:,}" for record in records)
        by_layer.append(f"{layer} {', '.join(sizes)}")
    return (
        f"Bytes per device, forward and backward, {settings['features']} features, on {_join(settings['growth'])} "
        f"devices (a single number: the same on all): {'; '.join(by_layer)}."
    )
