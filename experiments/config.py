"""One frozen dataclass describes a training run; two presets size it for a small and a large machine.

Convention: a field exists because some study varies it. What no study varies (SGD's momentum of 0.9, the factor 0.1 of
a learning-rate decay) is a constant where it is used.
"""

import dataclasses
import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Self, get_args

from tyro.conf import Suppress

Data = Literal["cifar10", "digits"]
Net = Literal["cnn7", "resnet20", "inception"]
Norm = Literal["batch", "none", "group", "ghost", "renorm"]
NormLayers = Literal["hidden", "logits"]
Placement = Literal["before", "after"]
Activation = Literal["relu", "sigmoid"]
Noise = Literal["none", "matched", "shifting"]
Sampling = Literal["shuffled", "half_the_classes", "one_class"]
Tuning = Literal["trained", "frozen", "affine"]

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
    classes: tuple[int, ...] | None = None
    """Learn these classes alone, numbered anew in this order. None: all."""
    sampling: Sampling = "shuffled"
    """What shares a batch: any images, images of a random half of the classes, or those of one class."""
    augment: bool = True
    """Mirror (CIFAR-10 only), shear and zoom every training image at random."""
    net: Net = "inception"
    """Architecture."""
    width: float = 1.0
    """Multiplies the number of channels of every convolution."""
    norm: Norm = "batch"
    """Normalization: batch norm, none, group norm, ghost batch norm, or batch renormalization."""
    group_size: int | None = None
    """Images per group of ghost batch norm, or of the noise that is matched to it."""
    norm_layers: NormLayers = "hidden"
    """Where the norm is: after every convolution, or after the last layer alone, before the softmax."""
    placement: Placement = "before"
    """Norm before the activation, as published, or after it."""
    affine: bool = True
    """Whether norms learn scale and bias (the Inception net: the bias); otherwise they stay 1 and 0."""
    momentum: float | None = None
    """Weight of the old running statistics of batch norm. None: what the net was published with."""
    debias: bool = False
    """Correct the running statistics for their start at 0 and 1."""
    epsilon: float | None = None
    """What the norms add to the variance. None: as the net was published."""
    noise: Noise = "none"
    """After each batch norm: none, noise like that of ghost groups, or noise whose distribution changes each step."""
    tuning: Annotated[Tuning, Suppress] = "trained"
    """Batch norms in fine-tuning: as ever, frozen altogether, or affine maps that learn."""
    start: Annotated["Config | None", Suppress] = None
    """The run whose trained net this one starts from, with a new last layer. None: from random weights."""
    activation: Activation = "relu"
    """After each convolution."""
    dropout: float = 0.0
    """Probability that a feature is dropped before the last layer."""
    deep_supervision: bool = False
    """Whether two more classifiers, after the second and the fourth convolution, add to the loss in training."""
    init_scale: float | None = None
    """Weights start uniform between plus and minus this. None: as the net was published."""
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
        for name, accepted in _CHOICES.items():
            _one_of(name, getattr(self, name), get_args(accepted))
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
        self._check_classes()
        self._check_layers()
        self._check_start()

    def _check_classes(self):
        """Refuses classes that are no choice of classes."""
        if self.classes is not None:
            whole = isinstance(self.classes, tuple) and all(
                isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in self.classes
            )
            if not whole or len(set(self.classes)) < max(2, len(self.classes)):
                raise ValueError(
                    f"classes={self.classes}; at least two different classes are accepted, counted from 0; name such."
                )

    def _check_layers(self):
        """Refuses what no net can be built of."""
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            raise ValueError(
                f"dropout={self.dropout!r}; a number from 0 up to, not including, 1 is accepted; choose one."
            )
        for name in ("augment", "affine", "debias", "deep_supervision"):
            _one_of(name, getattr(self, name), (True, False))
        if self.momentum is not None and not (isinstance(self.momentum, int | float) and 0 <= self.momentum <= 1):
            raise ValueError(f"momentum={self.momentum!r}; a number from 0 to 1 is accepted, or None; choose one.")
        for name in ("epsilon", "init_scale"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        self._check_effects()
        if self.noise != "none" and (self.norm != "batch" or self.tuning != "trained"):
            raise ValueError(
                f"noise={self.noise!r} with norm={self.norm!r} and tuning={self.tuning!r}; it is added to plain batch "
                "norm alone; set norm to 'batch' and tuning to 'trained', or noise to 'none'."
            )
        if grouped := self.norm == "ghost" or self.noise == "matched":
            if self.group_size is None:
                raise ValueError("group_size=None, but ghost batch norm and matched noise have groups; set it.")
            _at_least_one("group_size", self.group_size)
        if self.noise == "matched" and self.group_size == self.batch_size:
            raise ValueError(
                f"group_size={self.group_size} with noise='matched' and batch_size={self.batch_size}; a single group "
                "has no spread, and so no noise; choose a smaller divisor of the batch."
            )
        if self.group_size is not None and (not grouped or self.batch_size % self.group_size):
            raise ValueError(
                f"group_size={self.group_size} with norm={self.norm!r}, noise={self.noise!r} and "
                f"batch_size={self.batch_size}; it is for ghost batch norm and matched noise, and divides the batch."
            )
        if self.deep_supervision and self.net != "cnn7":
            raise ValueError(f"deep_supervision=True with net={self.net!r}; only 'cnn7' has it; choose that net.")
        if self.placement == "after" and self.net == "resnet20":
            raise ValueError(
                "placement='after' with net='resnet20', which adds before it activates; choose another net."
            )

    def _check_effects(self):
        """Refuses settings that the net of this run would not heed."""
        without = []
        if self.norm == "none":
            without = ["norm_layers", "placement", "affine", "momentum", "debias", "epsilon"]
        elif self.norm == "group":
            without = ["norm_layers", "momentum", "debias"]
        elif self.tuning != "trained":
            without = ["affine", "momentum", "debias", "epsilon"]
        elif self.norm_layers == "logits":
            without = ["placement"]
        defaults = {field.name: field.default for field in fields(self)}
        if ignored := [name for name in without if getattr(self, name) != defaults[name]]:
            raise ValueError(
                f"{', '.join(f'{name}={getattr(self, name)!r}' for name in ignored)} with norm={self.norm!r}, "
                f"tuning={self.tuning!r} and norm_layers={self.norm_layers!r}, where that has no effect; leave it out."
            )

    def _check_start(self):
        """Refuses a start that does not fit."""
        if self.tuning != "trained" and (self.start is None or self.norm in ("none", "group")):
            raise ValueError(
                f"tuning={self.tuning!r} with norm={self.norm!r} and start={self.start and 'a run'}; "
                "it is for the batch norms of a trained net; set tuning to 'trained', or name such a start."
            )
        if self.start is None:
            return
        if self.start.start is not None or self.norm_layers == "logits" or self.deep_supervision:
            raise ValueError(
                f"start={'a run that has a start itself' if self.start.start else 'a run'} with "
                f"norm_layers={self.norm_layers!r} and deep_supervision={self.deep_supervision}; a run starts from one "
                "that started from random weights, and takes over all but a last layer alone; change that."
            )
        alike = ["net", "width", "norm", "norm_layers", "placement", "activation", "deep_supervision"]
        if self.tuning == "trained":
            alike += ["affine", "debias", "noise"]
        if different := [name for name in alike if getattr(self, name) != getattr(self.start, name)]:
            raise ValueError(
                f"start is a run with another {', '.join(different)}; its net must be of the same kind; change either."
            )
        if self.start.data == "digits" and self.data != "digits":
            raise ValueError(
                f"start is a run on grey images (digits), but data={self.data!r} has colours; start from another run."
            )

    def with_seed(self, seed: int) -> Self:
        """Returns a copy with another seed, in the run it starts from as well."""
        return self.replace(seed=seed, start=self.start and self.start.with_seed(seed))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Returns the config that `dataclasses.asdict` and JSON have made plain; fields may be missing."""
        values = dict(values)
        if values.get("classes") is not None:
            values["classes"] = tuple(values["classes"])
        if values.get("start") is not None:
            values["start"] = cls.from_json(values["start"])
        return cls(**values)

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed, checked like a new one."""
        return dataclasses.replace(self, **changes)

    def differences(self, other: Self) -> str:
        """Returns the fields that differ from those of `other`, in words; empty where none does."""
        pairs = [(field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return ", ".join(
            f"`{name}` {_in_words(name, mine)} instead of {_in_words(name, theirs)}"
            for name, mine, theirs in pairs
            if mine != theirs
        )


_CHOICES = {
    "norm": Norm,
    "norm_layers": NormLayers,
    "placement": Placement,
    "activation": Activation,
    "noise": Noise,
    "sampling": Sampling,
    "tuning": Tuning,
}


def _in_words(name, value):
    """A value as a reader takes it."""
    if value is None:
        return "all" if name in ("train_images", "classes") else "none" if name == "start" else "as published"
    if name == "start":
        return "another run"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
