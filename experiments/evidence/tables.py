"""Measurements as tables in Markdown, for the README, the guides and docs/bench.

Convention: a function takes what `results.read_records` returns, and gives the text of a block. The shapes of README
tables stay small: geometric means, with the worst row in brackets; every row is in docs/bench.
"""

import math
from collections.abc import Sequence

from experiments.benchmarks import calibration, collectives, layers, limit, steps, throughput
from experiments.evidence import timing
from experiments.evidence.verdicts import spread
from experiments.report.studies import markdown

STABLE = "Flax, stable: `use_fast_variance=False`."
LARGE_ARRAY = 4 * 2**20  # bytes; a copy of a smaller one times mostly the call


def numerics_table(run: dict) -> str:
    """Returns the errors by mean: a table for float32, and one for bfloat16 if that was measured."""
    parts = []
    for dtype in ("float32", "bfloat16"):
        records = [record for record in run["records"] if record.get("dtype", "float32") == dtype]
        names = list(dict.fromkeys(record["implementation"] for record in records))
        names.sort(key=lambda name: not name.startswith("jaxbn"))
        found = {(record["mean"], record["implementation"]): record for record in records}
        lines = []
        for mean in dict.fromkeys(record["mean"] for record in records):
            of = {name: found[mean, name] for name in names}
            errors = {name: _short(f"{one['output']:.0e} / {one['gradient']:.0e}") for name, one in of.items()}
            lines.append({"mean/std": _mean(mean)} | errors)
        if lines and parts:
            parts.append("With inputs in bfloat16, to which the gradient with respect to them is rounded:")
        if lines:
            parts.append(markdown(lines))
    return "\n\n".join([*parts, STABLE])


def layers_table(run: dict) -> str:
    """Returns the geometric means of the ratios by arm, pass and dtype, and the part of the limit that is reached."""
    records = run["records"]
    columns = {(record["dtype"], record["pass"]): None for record in records}
    lines = []
    for arm in arms_of(records):
        line = {"time of jaxbn over that of": arm}
        for dtype, name in columns:
            line[f"{name}, {dtype}"] = _mean_and_worst(_select(records, arm=arm, dtype=dtype, **{"pass": name}))
        lines.append(line)
    reached = {"time of jaxbn over that of": "*part of the limit that jaxbn reaches*"}
    for dtype, name in columns:
        ours = _select(records, arm=layers.OURS, dtype=dtype, **{"pass": name})
        parts = [record["limit"]["median"] for record in ours if array_bytes(record) >= LARGE_ARRAY]
        reached[f"{name}, {dtype}"] = f"{timing.geometric_mean(parts):.2f}" if parts else "-"
    shapes = len({tuple(record["shape"]) for record in records})
    return (
        f"{markdown([*lines, reached])}\n\nGeometric means over batch norm alone and with ReLU on {shapes} shapes (in "
        f"brackets the worst of these rows). {STABLE} PyTorch: channels last. Limit: the bytes that must move, at the "
        f"bandwidth of a copy, for arrays of {LARGE_ARRAY // 2**20} MiB and more."
    )


def layers_pages(run: dict) -> str:
    """Returns all rows, one table for each pass and dtype, with quartiles."""
    parts, records = [], run["records"]
    for dtype, name in {(record["dtype"], record["pass"]): None for record in records}:
        chosen = _select(records, dtype=dtype, **{"pass": name})
        lines = []
        for ours in _select(chosen, arm=layers.OURS):
            row = {key: ours[key] for key in ("shape", "activation")}
            line = {"shape": "x".join(map(str, row["shape"])), "activation": row["activation"]}
            line["jaxbn, ms"] = f"{1e3 * ours['seconds']['median']:.3f}"
            line["of the limit"] = f"{ours['limit']['median']:.2f}"
            (copy,) = _select(chosen, arm=layers.COPY, **row)
            line["copy, GB/s"] = f"{copy['bandwidth'] / 1e9:.1f}"
            for arm in arms_of(chosen):
                found = _select(chosen, arm=arm, **row)
                line[arm] = _with_quartiles(found[0]["ratio"]) if found else "-"
            lines.append(line)
        parts.append(f"## {name}, {dtype}\n\n{markdown(lines)}")
    return "\n\n".join(parts)


def steps_table(run: dict) -> str:
    """Returns what each norm adds to a step, by net and dtype."""
    lines, settings = [], run["header"]["settings"]
    for net, dtype in {(record["net"], record["dtype"]): None for record in run["records"]}:
        for found in steps.summarize(_select(run["records"], net=net, dtype=dtype)):
            if found["arm"] != steps.NONE:
                lines.append(
                    {
                        "net": f"{net}, {dtype}",
                        "norm": found["arm"],
                        "time added": _interval(found["added"], 100, " %", decimals=0),
                        "over Flax's": _interval(found["share"]),
                        "temporaries, over no norm": f"{found['temporaries']:.2f}",
                        "compile / trace, over Flax's": " / ".join(
                            f"{found[name]['median']:.2f}" for name in ("compile", "trace")
                        ),
                    }
                )
    nets = {f"{r['net']} at width {r['width']:g} and batch {r['batch_size']}": None for r in run["records"]}
    return (
        f"{markdown(lines)}\n\n{', '.join(nets)}, on images of {settings['image_size']} x {settings['image_size']}; "
        "time added to the net without a norm, median of the rounds. In brackets, an interval of 95 % (bootstrap over "
        f"{settings['step_processes']} processes, and {settings['step_rounds']} rounds in each); a dash where Flax's "
        f"norm may add no time. Compile: XLA; trace: Python, before that. {STABLE}"
    )


def collectives_table(run: dict) -> str:
    """Returns the collectives and errors by layer, APIs that do the same together, and the bytes by devices."""
    records = [record for record in run["records"] if "growth" not in record]
    sent = {record["layer"]: record for record in records if record["api"] == "jit"}
    grouped = {}
    for record in records:
        # Under vmap there is one device, which sends nothing; only its errors count.
        cost = sent[record["layer"]] if record["api"] == "vmap" else record
        cells = {
            "collectives, forward": collectives.count(cost["forward"]),
            "forward and backward": collectives.count(cost["forward+backward"]),
            **{f"error, {valid}": collectives.percent(error) for valid, error in record["errors"].items()},
        }
        _, apis = grouped.setdefault((record["layer"], *cells.values()), (cells, []))
        apis.append(record["api"])
    every = {record["api"] for record in records}
    lines = [{"": f"{layer}, {_apis(apis, every)}", **cells} for (layer, *_), (cells, apis) in grouped.items()]
    return f"{markdown(lines)}\n\n{_growth_sentence(run)} {STABLE}"


def throughput_sentence(run: dict) -> str:
    """Returns how the training loop compares with a plain one."""
    fit = {record["timed"]: record for record in run["records"] if record["arm"] == throughput.FIT}
    faster = fit["run"]["images_over_plain"]["median"]
    return (
        f"The training loop trains {faster:.2f} times as many images per second as a plain loop in Flax and Optax over "
        "the same net, and gathering and augmenting the images adds "
        f"{throughput.augmentation(run['records']):.1f} % to a step."
    )


def folding_table(run: dict) -> str:
    """Returns what folding changes in each net."""
    settings = run["header"]["settings"]
    lines = [
        {
            "net": f"{record['net']} at width {record['width']:g}, {record['api']}",
            "batch norms": f"{record['norms']}",
            "folded": f"{record['folded']}",
            "difference": _short(f"{record['difference']:.0e}"),
            "time of an evaluation, after / before": _with_quartiles(record["ratio"]),
        }
        for record in run["records"]
    ]
    size = settings["image_size"]
    return (
        f"{markdown(lines)}\n\nRandom weights, and batches of {settings['batch_size']} images of {size} x {size}, "
        "float32. Difference: the largest of a logit, over the largest logit in magnitude. Times: median and quartiles "
        f"of {settings['rounds']} rounds; in linen and nnx the net is the same: what their times differ by is noise."
    )


def calibration_table(run: dict) -> str:
    """Returns the test accuracies by number of images and method, and those without calibration."""
    lines, uncalibrated, settings = {}, {}, run["header"]["settings"]
    for record in run["records"]:
        found = spread(record["accuracies"])
        if "images" in record:
            line = lines.setdefault(record["images"], {"images": f"{record['images']:,}"})
            line[record["statistics"]] = found.text()
        else:
            uncalibrated[record["statistics"]] = f"{found.mean:.1f} %"
    config = settings["config"]
    return (
        f"{markdown(list(lines.values()))}\n\nTest accuracy in %, mean ± std over {settings['draws']} draws of the "
        f"images. The net, `{config['net']}`, was trained for {config['epochs']} epochs on "
        f"{settings['train_images']:,} images at {config['image_size']} x {config['image_size']} pixels "
        f"({settings['data']}). Of {settings['test_images']:,} test images it classifies "
        f"{uncalibrated[calibration.TRAINED]} correctly with the running averages of its training, and "
        f"{uncalibrated[calibration.WRECKED]} with wrecked ones (means {settings['added_to_means']} too large, "
        f"variances {settings['times_variances']} times too large)."
    )


def arms_of(records: Sequence[dict]) -> list[str]:
    """Returns the layers that jaxbn is compared with, in their order."""
    return list(dict.fromkeys(r["arm"] for r in records if r["arm"] not in (layers.OURS, layers.COPY)))


def array_bytes(record: dict) -> float:
    """Returns the size of the inputs of a row."""
    return limit.bytes_moved("eval", tuple(record["shape"]), record["dtype"]) / limit.ARRAYS_MOVED["eval"]


def _mean(mean):
    return _short(f"{mean:.0e}") if mean >= 1000 else f"{mean:g}"


def _short(text):
    """Numbers without the zeros that Python writes into exponents."""
    return text.replace("e+0", "e").replace("e-0", "e-")


def _select(records, **fields):
    return [record for record in records if all(record.get(key) == value for key, value in fields.items())]


def _mean_and_worst(records):
    if not records:
        return "-"
    ratios = [record["ratio"]["median"] for record in records]
    return f"{timing.geometric_mean(ratios):.2f} ({max(ratios):.2f})"


def _with_quartiles(ratio):
    return f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})"


def _interval(found, scale=1, unit="", decimals=2):
    """A value with its interval, or a dash where that is open."""
    if any(map(math.isnan, found.values())):
        return "-"
    # A rounded zero has no sign.
    value, lower, upper = (f"{round(scale * found[name], decimals) + 0:.{decimals}f}" for name in found)
    return f"{value}{unit} ({lower} to {upper})"


def _apis(apis, every):
    """APIs in words; both ways of checking in shard_map are one."""
    if set(apis) == every:
        return "every API"
    return ", ".join(f"`{api}`" for api in dict.fromkeys(api.split(",")[0] for api in apis))


def _growth_sentence(run):
    """How the bytes change with the devices, in words that hold for any outcome."""
    counts = run["header"]["settings"]["growth"]
    sentences = []
    for layer in collectives.LAYERS:
        records = [r for r in run["records"] if r.get("growth") in counts and r["layer"] == layer]
        sent = list(dict.fromkeys(f"{record['forward+backward']['bytes']:,}" for record in records))
        sentences.append(f"{layer} {', '.join(sent)}")
    devices = ", ".join(map(str, counts))
    return (
        f"Bytes that a device hands over forward and backward, {run['header']['settings']['features']} features, on "
        f"{devices} devices (one number: the same on all): {'; '.join(sentences)}."
    )
