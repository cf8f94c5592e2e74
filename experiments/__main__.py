"""The command line: `python -m experiments --help`.

Convention: a command imports what it needs when it runs, so that help comes at once.
"""

import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

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
    arg(metavar="DIR", help="Folder that holds cifar-10-batches-py. If left out: CIFAR10_DIR, then the user's cache."),
]
Devices = Annotated[
    int | None,
    arg(metavar="N", help="Number of CPU devices in all processes together. If left out: what the machine has."),
]
Launch = Annotated[
    int, arg(metavar="N", help="Start so many processes on this machine's CPU, for a look at what runs on several.")
]
ResultsDir = Annotated[Path, arg(metavar="DIR", help="Folder of the result files.")]
MeasurementsDir = Annotated[Path, arg(metavar="DIR", help="Folder of the files of measurements.")]
Study = Positional[Annotated[str, arg(metavar="STUDY", help="Name of a study, as `list` shows it, or `all`.")]]

app = tyro.extras.SubcommandApp()


@app.command(name="demo")
def demo_command(
    *,
    data_dir: DataDir = None,
    out: Annotated[Path, arg(metavar="DIR", help="Folder of the figure.")] = Path("runs/demo"),
) -> None:
    """Train a small net with and without batch norm: offline, in under two minutes on two cores."""
    from experiments.demos import norm_or_none

    norm_or_none.run(data_dir=data_dir, out=out)


@app.command(name="list")
def list_command(*, results_dir: ResultsDir = RESULTS) -> None:
    """Show the studies: question, command, time, and how far each one is."""
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
    preset: Literal["small", "full"] = "small",
    seeds: int = 3,
    data_dir: DataDir = None,
    results_dir: ResultsDir = RESULTS,
    devices: Devices = None,
    launch: Launch = 1,
) -> None:
    """Train whatever a study has no result of yet. Stopped at any moment, the same command continues.

    Args:
        study: Which study.
        preset: Size of the runs: `small` for 2 CPU cores, `full` for a GPU.
        seeds: Number of runs of each arm.
        data_dir: Where CIFAR-10 is.
        results_dir: Where the results go.
        devices: CPU devices.
        launch: Local processes.
    """
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
    keep_checkpoint: Annotated[bool, arg(help="Keep the trained net beside the result, for `diagnose`.")] = False,
    devices: Devices = None,
    launch: Launch = 1,
) -> None:
    """Train a single net of your choice. Stopped at any moment, the same command continues."""
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
            print("Checkpoint: none; the run had finished without --keep-checkpoint. Delete its result to train anew.")


@app.command(name="diagnose")
def diagnose_command(
    checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT", help="What `train --keep-checkpoint` left.")]],
    *,
    data_dir: DataDir = None,
) -> None:
    """Say what is wrong with the batch norms of a trained net: on its training images, and on the test images.

    CHECKPOINT is the folder that `train --keep-checkpoint` names in the end, or that of a run that was interrupted.
    """
    from experiments.demos import diagnosis

    diagnosis.run(checkpoint, data_dir=data_dir)


@app.command(name="sync-demo")
def sync_demo_command(
    *,
    data_dir: DataDir = None,
    out: Annotated[Path, arg(metavar="DIR", help="Folder of the figure.")] = Path("runs/sync-demo"),
    devices: Devices = 8,
    launch: Launch = 1,
) -> None:
    """Compare statistics per device with those of all devices together, on as many CPU devices as you like."""
    _take_part(devices, launch)
    from experiments.demos import synchronised

    synchronised.run(data_dir=data_dir, out=out)


@app.command(name="collectives")
def collectives_command(*, out: MeasurementsDir = MEASUREMENTS) -> None:
    """Count what batch norm sends between devices on each parallel API, beside Flax's layer, in compiled programs."""
    from experiments.benchmarks import collectives

    collectives.run(out=out)


@app.command(name="numerics")
def numerics_command(*, out: MeasurementsDir = MEASUREMENTS) -> None:
    """Measure the errors of batch norm against float64 as the mean of the inputs grows, beside Flax's layer."""
    from experiments.benchmarks import numerics

    numerics.run(out=out)
    _show(["numerics"], out)


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
    """Put this library and its peers to the laws of batch norm: about three minutes on two cores.

    The exit status is 1 if this library breaks one.
    """
    from experiments.scoreboard import board

    if not board.run(peers=peers, laws=laws, out=out):
        sys.exit(1)


@app.command(name="calibration")
def calibration_command(*, data_dir: DataDir = None, out: MeasurementsDir = MEASUREMENTS) -> None:
    """Show how many images bring back the statistics of a trained net: offline, in under two minutes on two cores."""
    from experiments.benchmarks import calibration

    calibration.run(data_dir=data_dir, out=out)
    _show(["calibration"], out)


@app.command(name="bench")
def bench_command(
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
    out: MeasurementsDir = MEASUREMENTS,
) -> None:
    """Measure speed, memory and collectives beside Flax, Haiku, Equinox and PyTorch: an hour on two cores.

    Stopped at any moment, the same command continues. `table` shows what was measured in the README.

    The part `accelerators` runs only where it is named: it compiles programs for TPUs and GPUs without having one, and
    counts the bytes that they move. It needs pip install 'jaxbn[aot]', and hours for all targets; the options choose.

    Args:
        only: Some of `layers`, `steps`, `collectives` and `accelerators`, with commas between.
        rounds: Timings of each layer in each row.
        step_processes: Processes that compile and time the same training steps.
        step_rounds: Timings of each training step in each process.
        dtypes: Some of `float32` and `bfloat16`. If left out: both.
        targets: Accelerators, some of `v5e`, `v5p`, `v6e`, `tpu7x`, `h100`, `a100` and `b200`. If left out: all.
        kinds: Accelerators' programs, some of `layer`, `block`, `inference`, `step` and `parallel`. If left out: all.
        nets: Nets of accelerators' steps, some of `ResNet-20`, `ResNet-50` and `Inception`. If left out: all.
        arms: Norms of accelerators' programs, some of `jaxbn`, `jaxbn, shifted`, `Flax`, `Flax, stable`, `affine only`
            and `none`; the comma with a space belongs to the name. If left out: all.
        jobs: Programs that are compiled at once for accelerators.
        out: Where the files go.
    """
    from experiments.benchmarks import Settings, parts

    lists = {"dtypes": dtypes, "targets": targets, "kinds": kinds, "nets": nets, "arms": arms}
    chosen = {name: tuple(re.split(r",(?! )", text)) for name, text in lists.items() if text is not None}
    settings = Settings(rounds=rounds, step_processes=step_processes, step_rounds=step_rounds, jobs=jobs, **chosen)
    names = only.split(",")
    if status := parts.run(only=names, out=out, settings=settings):
        sys.exit(status)
    _show([name for name in names if name != "collectives"], out)  # which has shown them itself


@app.command(name="throughput")
def throughput_command(*, batch_size: int = 100, rounds: int = 25, out: MeasurementsDir = MEASUREMENTS) -> None:
    """Measure images per second of `fit` beside a plain loop in Flax and Optax, and what augmentation adds to a step.

    Args:
        batch_size: Images per step; divides 10,000.
        rounds: Timings of each arm.
        out: Where the file goes.
    """
    from experiments.benchmarks import throughput

    throughput.run(batch_size=batch_size, rounds=rounds, out=out)


@app.command(name="folding")
def folding_command(
    *, batch_size: int = 50, inception_width: float = 0.25, rounds: int = 15, out: MeasurementsDir = MEASUREMENTS
) -> None:
    """Fold the batch norms of ResNet-20 and the Inception net: change of the outputs, and time of an evaluation.

    The weights are random; `run folding` is the study of trained nets.

    Args:
        batch_size: Images per evaluation.
        inception_width: Multiplies the channels of the Inception net; at 1, the command takes sixteen times as long.
        rounds: Timings of each net.
        out: Where the file goes.
    """
    from experiments.benchmarks import folding

    folding.run(batch_size=batch_size, inception_width=inception_width, rounds=rounds, out=out)
    _show(["folding"], out)


@app.command(name="plot")
def plot_command(
    study: Study = "all",
    *,
    results_dir: ResultsDir = RESULTS,
    out: Annotated[Path, arg(metavar="DIR", help="Folder of the figures.")] = FIGURES,
) -> None:
    """Draw the figures of the studies that have their results."""
    from experiments.report import studies
    from experiments.studies import protocol

    for module in protocol.select(study):
        written = studies.figures(module, results_dir, out)
        for path in written:
            print(path)
        if not written:
            print(f"{protocol.short_name(module)}: nothing to draw; {studies.state(module, results_dir)}")


@app.command(name="table")
def table_command(
    *,
    results_dir: ResultsDir = RESULTS,
    out: Annotated[Path, arg(metavar="FILE", help="The file to write.")] = README,
    measurements_dir: MeasurementsDir = MEASUREMENTS,
    project: Annotated[Path, arg(metavar="DIR", help="Folder of README.md and docs, where measurements go.")] = PROJECT,
) -> None:
    """Write what was asked, measured and found into experiments/README.md, and measurements into README.md and docs."""
    from rich.console import Console
    from rich.markdown import Markdown

    from experiments.report import pages, studies

    text = studies.readme(results_dir)
    out.write_text(text, encoding="utf-8")
    Console().print(Markdown(text))
    for path in (out, *pages.write(measurements_dir, project)):
        print(f"Written to {path}")


def _show(names: list[str], folder: Path) -> None:
    """Prints what has been measured, as README.md or a guide shows it."""
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
