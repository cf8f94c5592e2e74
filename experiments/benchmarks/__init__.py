"""The parts of `python -m experiments bench`, each in a process of its own.

Convention: a part is a module with NAME, and with `pieces(settings)`: the name of each piece of work and a function
that does it and returns records, dicts of plain values. `experiments.benchmarks.parts` keeps what they return.
"""

import dataclasses
import json
from dataclasses import dataclass

# Small to large; the first three are those of ResNet-20.
CONVOLUTIONAL = ((128, 32, 32, 16), (128, 16, 16, 32), (128, 8, 8, 64), (64, 14, 14, 256), (32, 56, 56, 64))
COMPILED = ((256, 56, 56, 64), (256, 14, 14, 256), (128, 32, 32, 16), (4096, 1024))
DENSE = ((128, 1024), (1024, 256), (8192, 512))
DTYPES = ("float32", "bfloat16")
# Of the part `accelerators`, which compiles for machines that are not there.
TARGETS = ("v5e", "v5p", "v6e", "tpu7x", "h100", "a100", "b200")
KINDS = ("layer", "block", "inference", "step", "parallel")
NETS = ("ResNet-20", "ResNet-50", "Inception")
ARMS = ("jaxbn", "jaxbn, shifted", "Flax", "Flax, stable", "affine only", "none")


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int = 25
    """Timings of each layer in each row."""
    step_processes: int = 4
    """Processes that compile and time the same training steps."""
    step_rounds: int = 15
    """Timings of each training step in each process."""
    shapes: tuple[tuple[int, ...], ...] = (*CONVOLUTIONAL, *DENSE)
    """Of a layer's inputs, features last."""
    dtypes: tuple[str, ...] = DTYPES
    """Of inputs, outputs and gradients."""
    batch_size: int = 128
    """Images in a training step of ResNet-20."""
    inception_batch_size: int = 16
    """Images in a training step of the Inception net."""
    image_size: int = 32
    """Pixels per side."""
    width: float = 1.0
    """Multiplies the channels of ResNet-20."""
    inception_width: float = 0.25
    """Multiplies the channels of the Inception net."""
    targets: tuple[str, ...] = TARGETS
    """That programs are compiled for."""
    kinds: tuple[str, ...] = KINDS
    """Of compiled programs; "parallel" are steps on several chips."""
    nets: tuple[str, ...] = NETS
    """Of compiled steps."""
    arms: tuple[str, ...] = ARMS
    """Of compiled programs."""
    compiled_shapes: tuple[tuple[int, ...], ...] = COMPILED
    """Of a compiled layer's inputs, features last."""
    large_image_size: int = 224
    """Pixels per side for ResNet-50."""
    jobs: int = 2
    """Programs that are compiled at once."""

    def __post_init__(self):
        """Refuses what leaves nothing to measure.

        Raises:
          ValueError: names the value.
        """
        for name in ("rounds", "step_processes", "step_rounds", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; at least 1 is accepted; choose more.")
        choices = {"targets": TARGETS, "kinds": KINDS, "nets": NETS, "arms": ARMS, "dtypes": DTYPES}
        for name, known in choices.items():
            if not getattr(self, name) or set(getattr(self, name)) - set(known):
                given = ",".join(getattr(self, name))
                raise ValueError(f"{name}={given!r}; choose some of {'; '.join(known)}.")

    @classmethod
    def from_json(cls, values: dict) -> "Settings":
        """Returns the settings that `to_json` has made plain."""
        return cls(**{name: _tuples(value) for name, value in values.items()})

    def to_json(self) -> dict:
        """Returns the settings as a dict of what JSON knows."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _tuples(value):
    """A value with tuples for lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
