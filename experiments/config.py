"""One frozen dataclass describes a training run; two presets size it for a small and a large machine.

Convention: a field exists because some study varies it. What no study varies (SGD's momentum of 0.9, the factor 0.1 of
a learning-rate decay) is a constant where it is used.
"""

import dataclasses
import math
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

Data = Literal["cifar10", "digits"]
Net = Literal["cnn7", "resnet20", "inception"]
Norm = Literal["batch", "none", "group"]

IMAGE_SIZES = (8, 16, 32)


@dataclass(frozen=True)
class Config:
    """One training run. The defaults are the published protocol, which needs a GPU."""

    data: Data = "cifar10"
    """What to learn: CIFAR-10, or the handwritten digits that scikit-learn carries."""
    image_size: int = 32
    """Pixels per side: 8, 16 or 32. Smaller than the original: means over blocks; larger: pixels repeated."""
    train_images: int | None = None
    """Train on the first so many images of a fixed shuffle. None: on all of them."""
    augment: bool = True
    """Mirror (CIFAR-10 only), shear and zoom every training image at random."""
    net: Net = "inception"
    """Architecture."""
    width: float = 1.0
    """Multiplies the number of channels of every convolution."""
    norm: Norm = "batch"
    """Normalization after each convolution: batch norm, none, or group norm."""
    learning_rate: float = 0.01
    """Initial learning rate."""
    lr_decay_epochs: int = 10
    """The learning rate is multiplied by 0.1 ** floor((1 + epoch) / this), epochs counted from 0, as published."""
    batch_size: int = 250
    """Images per step."""
    epochs: int = 30
    """Passes over the training images."""
    evaluations: int = 1
    """Evaluations on the test set per epoch, evenly spaced; each is a row of the results."""
    seed: int = 0
    """Random seed of the initial weights, the order of the images and the augmentation."""

    def __post_init__(self):
        """Refuses values that no run could use.

        Raises:
          ValueError: names the value, what is accepted, and what to do.
        """
        _one_of("data", self.data, get_args(Data))
        _one_of("image_size", self.image_size, IMAGE_SIZES)
        _one_of("net", self.net, get_args(Net))
        _one_of("norm", self.norm, get_args(Norm))
        _positive("width", self.width)
        _positive("learning_rate", self.learning_rate)
        _at_least_one("lr_decay_epochs", self.lr_decay_epochs)
        _at_least_one("batch_size", self.batch_size)
        _at_least_one("epochs", self.epochs)
        _at_least_one("evaluations", self.evaluations)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(
                f"seed={self.seed!r}; a whole number from 0 to 2**32 - 1 is accepted; choose one of those."
            )
        if self.train_images is not None:
            _at_least_one("train_images", self.train_images)
            if self.train_images < self.batch_size:
                raise ValueError(
                    f"batch_size={self.batch_size} is larger than train_images={self.train_images}; "
                    "a step needs a whole batch; lower batch_size or raise train_images."
                )

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed, checked like a new one."""
        return dataclasses.replace(self, **changes)

    def differences(self, other: Self) -> str:
        """Returns the fields that differ from those of `other`, in words; empty where none does."""
        pairs = [(field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return ", ".join(
            f"`{name}` {'all' if mine is None else mine} instead of {'all' if theirs is None else theirs}"
            for name, mine, theirs in pairs
            if mine != theirs
        )


def _one_of(name, value, accepted):
    if value not in accepted or type(value) is not type(accepted[0]):
        listed = ", ".join(repr(a) for a in accepted)
        raise ValueError(f"{name}={value!r}; accepted are {listed}; choose one of those.")


def _positive(name, value):
    if isinstance(value, bool) or not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r}; a finite number above 0 is accepted; choose one.")


def _at_least_one(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}; a whole number of at least 1 is accepted; choose one.")


PRESETS: dict[str, Config] = {
    # Two CPU cores: the small net on a fifth of CIFAR-10, halved to 16x16, for a fifth of the epochs.
    "small": Config(image_size=16, train_images=10_000, net="cnn7", batch_size=100, epochs=6, lr_decay_epochs=4),
    # One GPU: the published protocol, which is what the defaults say.
    "full": Config(),
}
