"""The command line: `python -m experiments --help`.

Convention: a command imports what it needs when it runs, so that `--help` is fast.
"""

import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import tyro
except ModuleNotFoundError:
    sys.exit("The experiments need more than the library: run make demo, which sets up .venv, or pip install '.[dev]'.")
from tyro.conf import OmitArgPrefixes, Positional, arg

from experiments.config import Config

HERE = Path(__file__).parent
RESULTS, FIGURES, README = HERE / "results", HERE / "figures", HERE / "README.md"
MEASUREMENTS, PROJECT = HERE / "measurements", HERE.parent

DataDir = Annotated[
    Path | None,
    arg(metavar="DIR", help="Folder with cifar-10-batches-py. If left out: CIFAR10_DIR, then the user's cache."),
]
Devices = Annotated[
    int | None,
    arg(metavar="N", help="Number of CPU devices over all processes. If left out: as many as the machine has."),
]
Launch = Annotated[
    int, arg(metavar="N", help="Number of processes to start on this machine's CPU, to try out multi-process runs.")
]
ResultsDir = Annotated[Path, arg(metavar="DIR", help="Folder of the result files.")]
FiguresDir = Annotated[Path, arg(metavar="DIR", help="Folder of the figures.")]
MeasurementsDir = Annotated[Path, arg(metavar="DIR", help="Folder of the measurements.")]
Study = Positional[Annotated[str, arg(metavar="STUDY", help="Name of a study from `list`, or `all`.")]]

app = tyro.extras.SubcommandApp()


@app.command(name="demo")
def demo_command(*, data_dir: DataDir = None, out: FiguresDir = Path("runs/demo")) -> None:
    """Train a small network with and without batch norm: offline, in under two minutes on two cores."""
    from experiments.demos import norm_or_none

    norm_or_none.run(data_dir=data_dir, out=out)


@app.command(name="list")
def list_command(*, results_dir: ResultsDir = RESULTS) -> None:
    """List the studies: question, command, time, and which results exist."""
    from experiments.report import studies
    from experiments.studies import protocol

    for module in protocol.select("all"):
        print(f"{protocol.short_name(module)}: {studies.text(module, results_dir, 'Question')}")
        for section in ("Command", "Time"):
            print(f"    {section.lower():8} {studies.text(module, results_dir, section)}")
        print(f"    results  {studies.state(module, results_dir)}")


@app.command(name="run")
def run_command(
    study: Study,
    *,
    preset: Annotated[Literal["small", "full"], arg(help="Size: `small` for 2 CPU cores, `full` for a GPU.")] = "small",
    seeds: Annotated[int, arg(help="Number of runs of each arm.")] = 3,
    data_dir: DataDir = None,
    results_dir: ResultsDir = RESULTS,
    devices: Devices = None,
    launch: Launch = 1,
) -> None:
    """Train the runs of a study that have no result yet. After an interruption the same command continues."""
    _take_part(devices, launch)
    from experiments.studies import protocol

    for module in protocol.select(study):
        protocol.train_study(module, preset=preset, seeds=seeds, data_dir=data_dir, folder=results_dir)


@app.command(name="train")
def train_command(
    config: OmitArgPrefixes[Config],
    *,
    data_dir: DataDir = None,
    out: Annotated[Path, arg(metavar="DIR", help="Folder of the result.")] = Path("runs/train"),
    keep_checkpoint: Annotated[bool, arg(help="Keep the trained network next to the result, for `diagnose`.")] = False,
    devices: Devices = None,
    launch: Launch = 1,
) -> None:
    """Train a single network of your choice. After an interruption the same command continues."""
    _take_part(devices, launch)
    from experiments.evidence import files
    from experiments.processes import distributed
    from experiments.training import runs

    place = files.Place(out / "result.jsonl")
    plan = [(f"{config.net} {config.norm}", place, config)]
    runs.train_missing(plan, data_dir=data_dir, keep_checkpoints=keep_checkpoint)
    if distributed.is_primary():
        print(f"Result: {place}")
        kept = runs.kept_checkpoints(place)
        if keep_checkpoint and kept.exists():
            print(f"Checkpoint: {kept}")
        elif keep_checkpoint:
            print("Checkpoint: none; the run finished without --keep-checkpoint. Delete its result to train it again.")


@app.command(name="diagnose")
def diagnose_command(
    checkpoint: Positional[
        Annotated[Path, arg(metavar="CHECKPOINT", help="Folder that `train --keep-checkpoint` printed.")]
    ],
    *,
    data_dir: DataDir = None,
) -> None:
    """Diagnose the batch norms of a trained network on its training images and on the test images.

    CHECKPOINT is the folder that `train --keep-checkpoint` prints at the end, or the one of an interrupted run.
    """
    from experiments.demos import diagnosis

    diagnosis.run(checkpoint, data_dir=data_dir)


@app.command(name="journey")
def journey_command(
    *,
    weights: Annotated[
        Path | None, arg(metavar="FILE", help="State dict of a ResNet-18, saved by torch.save. If left out: random.")
    ] = None,
) -> None:
    """Bring torchvision's ResNet-18 to JAX, fine-tune, calibrate, fold, save and export it; compare the outputs."""
    from experiments.demos import journey

    journey.main(weights=weights)


@app.command(name="sync-demo")
def sync_demo_command(
    *, data_dir: DataDir = None, out: FiguresDir = Path("runs/sync-demo"), devices: Devices = 8, launch: Launch = 1
) -> None:
    """Compare per-device with synchronized statistics, on any number of CPU devices."""
    _take_part(devices, launch)
    from experiments.demos import synchronised

    synchronised.run(data_dir=data_dir, out=out)


@app.command(name="scoreboard")
def scoreboard_command(
    *,
    peers: Annotated[str | None, arg(metavar="A,B", help="Names of peers. If left out: all.")] = None,
    laws: Annotated[str | None, arg(metavar="X,Y", help="Names of laws. If left out: all.")] = None,
    out: Annotated[
        Path | None,
        arg(metavar="DIR", help="Folder to write to. If left out: docs/scoreboard, or none for chosen peers or laws."),
    ] = None,
) -> None:
    """Test this library and its peers against the laws of batch norm: about three minutes on two cores.

    The exit status is 1 if this library breaks a law.
    """
    from experiments.scoreboard import board

    if not board.run(peers=peers, laws=laws, out=out):
        sys.exit(1)


@app.command(name="bench")
def bench_command(
    names: Positional[Annotated[tuple[str, ...], arg(metavar="NAME")]] = (),
    *,
    only: str = "layers,steps,collectives",
    rounds: int = 25,
    step_processes: int = 4,
    step_rounds: int = 15,
    dtypes: str | None = None,
    targets: str | None = None,
    kinds: str | None = None,
    nets: str | None = None,
    arms: str | None = None,
    jobs: int = 2,
    data_dir: DataDir = None,
    out: MeasurementsDir = MEASUREMENTS,
) -> None:
    """Measure batch norm and compare it with Flax, Haiku, Equinox and PyTorch. An interrupted command continues.

    layers: time of the layer alone. steps: what a norm adds to a training step. (Together an hour on two cores.)
    collectives: communication between devices, counted in compiled programs. numerics: errors against float64.
    throughput: images per second of `fit`. folding: outputs and time of networks with folded batch norms.
    calibration: images needed to restore the statistics of a trained network, in under two minutes.
    accelerators: bytes that programs for TPUs and GPUs move, compiled without having one; takes hours for all targets,
    and needs pip install 'jaxbn[aot]'. `table` writes the measurements into README.md and docs.

    Args:
        names: Benchmarks; see above. If left out: those of `--only`.
        only: Benchmarks, separated by commas.
        rounds: Timings of each arm in `layers` and `throughput`.
        step_processes: Processes that compile and time the same training steps.
        step_rounds: Timings of each training step in each process.
        dtypes: Some of `float32` and `bfloat16`. If left out: both.
        targets: Accelerators, some of `v5e`, `v5p`, `v6e`, `tpu7x`, `h100`, `a100` and `b200`. If left out: all.
        kinds: Programs for accelerators, some of `layer`, `block`, `inference`, `step` and `parallel`. If left out:
            all.
        nets: Networks for accelerators, some of `ResNet-20`, `ResNet-50` and `Inception`. If left out: all.
        arms: Norms for accelerators, some of `jaxbn`, `jaxbn, shifted`, `Flax`, `Flax, stable`, `affine only` and
            `none`; the comma with a space belongs to the name. If left out: all.
        jobs: Number of programs for accelerators that are compiled at the same time.
        data_dir: Folder of CIFAR-10 for `calibration`.
        out: Folder of the files.
    """
    lists = {"dtypes": dtypes, "targets": targets, "kinds": kinds, "nets": nets, "arms": arms}
    chosen = {name: tuple(re.split(r",(?! )", text)) for name, text in lists.items() if text is not None}
    numbers = {"rounds": rounds, "step_processes": step_processes, "step_rounds": step_rounds, "jobs": jobs}
    _bench(list(names) or only.split(","), out, data_dir=data_dir and str(data_dir), **numbers, **chosen)


@app.command(name="collectives")
def collectives_command(*, out: MeasurementsDir = MEASUREMENTS) -> None:
    """Same as `bench collectives`."""
    _bench(["collectives"], out)


@app.command(name="numerics")
def numerics_command(*, out: MeasurementsDir = MEASUREMENTS) -> None:
    """Same as `bench numerics`."""
    _bench(["numerics"], out)


@app.command(name="throughput")
def throughput_command(*, batch_size: int = 100, rounds: int = 25, out: MeasurementsDir = MEASUREMENTS) -> None:
    """Same as `bench throughput`."""
    _bench(["throughput"], out, throughput_batch_size=batch_size, rounds=rounds)


@app.command(name="folding")
def folding_command(
    *, batch_size: int = 50, inception_width: float = 0.25, rounds: int = 15, out: MeasurementsDir = MEASUREMENTS
) -> None:
    """Same as `bench folding`."""
    _bench(["folding"], out, folding_batch_size=batch_size, inception_width=inception_width, folding_rounds=rounds)


@app.command(name="calibration")
def calibration_command(*, data_dir: DataDir = None, out: MeasurementsDir = MEASUREMENTS) -> None:
    """Same as `bench calibration`."""
    _bench(["calibration"], out, data_dir=data_dir and str(data_dir))


@app.command(name="plot")
def plot_command(study: Study = "all", *, results_dir: ResultsDir = RESULTS, out: FiguresDir = FIGURES) -> None:
    """Draw the figures of the studies whose results are complete."""
    from experiments.report import studies
    from experiments.studies import protocol

    for module in protocol.select(study):
        written = "\n".join(map(str, studies.figures(module, results_dir, out)))
        print(written or f"{protocol.short_name(module)}: nothing to draw; {studies.state(module, results_dir)}")


@app.command(name="table")
def table_command(
    *,
    results_dir: ResultsDir = RESULTS,
    out: Annotated[Path, arg(metavar="FILE", help="The file to write.")] = README,
    measurements_dir: MeasurementsDir = MEASUREMENTS,
    project: Annotated[Path, arg(metavar="DIR", help="Folder of README.md and docs.")] = PROJECT,
) -> None:
    """Write the studies into experiments/README.md, and the measurements into README.md and docs."""
    from rich.console import Console
    from rich.markdown import Markdown

    from experiments.report import pages, studies

    text = studies.readme(results_dir)
    out.write_text(text, encoding="utf-8")
    Console().print(Markdown(text))
    for path in (out, *pages.write(measurements_dir, project)):
        print(f"Written to {path}")


def _bench(names: list[str], out: Path, **settings: Any) -> None:
    """Runs benchmarks and prints their results."""
    from experiments.benchmarks import Settings, parts

    if status := parts.run(names, out=out, settings=Settings(**settings)):
        sys.exit(status)
    _show([name for name in names if name not in parts.SHOWN_AS_TABLES], out)


def _show(names: list[str], folder: Path) -> None:
    """Prints measurements the way README.md or a guide shows them."""
    from rich.console import Console
    from rich.markdown import Markdown

    from experiments.report import pages

    for name in names:
        Console(width=120).print(Markdown(pages.block(name, folder)))


def _take_part(devices: int | None, processes: int) -> None:
    """Joins the other processes of this run, if any; with --launch, starts them and exits with their status."""
    from experiments.processes import launch

    if launch.WORKER in os.environ:
        launch.exit_with_launcher()
    elif processes != 1:
        sys.exit(launch.run(processes))
    from experiments.processes import distributed

    distributed.initialize(devices)


def main() -> int:
    """Runs the command line; returns the exit status."""
    status, message = _run()
    if message:
        print(message, file=sys.stderr)
    # Only the commands that several processes can share import it.
    if distributed := sys.modules.get("experiments.processes.distributed"):
        distributed.leave(status)
    return status


def _run() -> tuple[int, str]:
    """Runs the command line; returns the exit status, and the message to end with."""
    try:
        app.cli(prog="python -m experiments", description="Experiments that show what batch norm does.")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe; drop the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE, ""
    except KeyboardInterrupt:
        continues = sys.argv[1:2] in (["run"], ["train"])
        return 130, "Interrupted; the same command continues from the last checkpoint." if continues else "Interrupted."
    except (ValueError, OSError) as error:
        # Errors of our own checks and of the file system are the user's to read. All others are bugs.
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if isinstance(error, ValueError) and HERE not in raised_in.parents:
            return _bug(error)
        return 2, f"Error: {error}"
    except Exception as error:
        return _bug(error)
    return 0, ""


def _bug(error: Exception) -> tuple[int, str]:
    """Raises the error. In a run of several processes, returns its traceback: `main` must go on to leave the run."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        raise error
    hint = "If another process was lost, the same command continues from the last checkpoint."
    return 1, "".join([*traceback.format_exception(error), hint])


if __name__ == "__main__":
    sys.exit(main())
