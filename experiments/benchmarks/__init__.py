"""Benchmarks of `python -m experiments bench NAME...`: their names and settings.

Conventions: every benchmark is a module of this package and has the same four names.

- `NAME`: stem of the file of its measurements.
- `header(settings)`: first line of that file, i.e. versions, hardware and everything else the numbers depend on.
- `pieces(settings)`: name of each piece of work -> a function that does it and returns records, dicts of plain values.
- `block(run)`: Markdown for README.md or a guide, made from the file alone.

`experiments.benchmarks.parts` runs each benchmark in its own process, where `experiments.benchmarks.__main__` measures.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

# Small to large; the first three are the activations of ResNet-20.
CONVOLUTIONAL = ((128, 32, 32, 16), (128, 16, 16, 32), (128, 8, 8, 64), (64, 14, 14, 256), (32, 56, 56, 64))
COMPILED = ((256, 56, 56, 64), (256, 14, 14, 256), (128, 32, 32, 16), (4096, 1024))
DENSE = ((128, 1024), (1024, 256), (8192, 512))
DTYPES = ("float32", "bfloat16")

# Choices of the benchmark `accelerators`, which compiles for hardware that this machine does not have.
TARGETS = ("v5e", "v5p", "v6e", "tpu7x", "h100", "a100", "b200")
KINDS = ("layer", "block", "inference", "step", "parallel")
NETS = ("ResNet-20", "ResNet-50", "Inception")
ARMS = ("jaxbn", "jaxbn, shifted", "Flax", "Flax, stable", "affine only", "none")


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int = 25
    """Timings of each arm in `layers` and `throughput`."""
    step_processes: int = 4
    """Processes that compile and time the same training steps."""
    step_rounds: int = 15
    """Timings of each training step in each process."""
    shapes: tuple[tuple[int, ...], ...] = (*CONVOLUTIONAL, *DENSE)
    """Shapes of a layer's inputs, features last."""
    dtypes: tuple[str, ...] = DTYPES
    """Dtypes of inputs, outputs and gradients."""
    batch_size: int = 128
    """Images in a training step of ResNet-20."""
    inception_batch_size: int = 16
    """Images in a training step of Inception."""
    image_size: int = 32
    """Pixels per side."""
    width: float = 1.0
    """Multiplies the channels of ResNet-20."""
    inception_width: float = 0.25
    """Multiplies the channels of Inception."""
    throughput_batch_size: int = 100
    """Images in a training step of `throughput`."""
    folding_batch_size: int = 50
    """Images in an evaluation of `folding`."""
    folding_rounds: int = 15
    """Timings of each network in `folding`."""
    data_dir: str | None = None
    """Folder of CIFAR-10 for `calibration`."""
    targets: tuple[str, ...] = TARGETS
    """Accelerators that programs are compiled for."""
    kinds: tuple[str, ...] = KINDS
    """Kinds of compiled programs; "parallel" means training steps on several chips."""
    nets: tuple[str, ...] = NETS
    """Networks whose training steps are compiled."""
    arms: tuple[str, ...] = ARMS
    """Norms of compiled programs."""
    compiled_shapes: tuple[tuple[int, ...], ...] = COMPILED
    """Shapes of a compiled layer's inputs, features last."""
    large_image_size: int = 224
    """Pixels per side for ResNet-50."""
    jobs: int = 2
    """Number of programs compiled at the same time."""

    def __post_init__(self):
        """Refuses settings that leave nothing to measure.

        Raises:
          ValueError: a number is below 1, or a choice is empty or unknown.
        """
        for name in ("rounds", "step_processes", "step_rounds", "folding_rounds", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        choices = {"targets": TARGETS, "kinds": KINDS, "nets": NETS, "arms": ARMS, "dtypes": DTYPES}
        for name, known in choices.items():
            chosen = getattr(self, name)
            if not chosen or set(chosen) - set(known):
                raise ValueError(f"{name} must be some of {'; '.join(known)}, got {','.join(chosen)!r}.")

    @classmethod
    def from_json(cls, values: dict) -> "Settings":
        """Rebuilds the settings from `to_json`."""
        return cls(**{name: _tuples(value) for name, value in values.items()})

    def to_json(self, *names: str) -> dict[str, Any]:
        """Returns the settings with these names, or all of them, as plain values.

        Args:
          *names: the settings that a benchmark's numbers depend on, for the header of its file.
        """
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: values[name] for name in names or values}


def _tuples(value: Any) -> Any:
    """Turns lists back into tuples, at every depth."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
