"""`Config` describes a training run; two presets size it for a small and a large machine.

Convention: a field exists because some study varies it. What no study varies (SGD's momentum of 0.9, the factor 0.1 of
a learning-rate decay) is a constant where it is used.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass, fields
from types import UnionType
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

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


@dataclass(frozen=True)
class Config:
    """One training run. The defaults are the published protocol, which needs a GPU."""

    data: Data = "cifar10"
    """Data set: CIFAR-10, or the handwritten digits that come with scikit-learn."""
    image_size: int = 32
    """Pixels per side: 8, 16 or 32. Blocks are averaged to make images smaller; pixels are repeated to enlarge them."""
    train_images: int | None = None
    """Train on this many images, the first of a fixed shuffle. None: on all."""
    classes: tuple[int, ...] | None = None
    """Train on these classes only, renumbered in this order. None: all."""
    sampling: Sampling = "shuffled"
    """Images of a batch: of any class, of a random half of the classes, or of a single class."""
    augment: bool = True
    """Mirror (CIFAR-10 only), shear and zoom each training image at random."""
    net: Net = "inception"
    """Network architecture."""
    width: float = 1.0
    """Multiplies the number of channels of every convolution."""
    norm: Norm = "batch"
    """Normalization: batch norm, none, group norm, ghost batch norm, or batch renormalization."""
    group_size: int | None = None
    """Images per group of ghost batch norm, or of noise='matched'."""
    norm_layers: NormLayers = "hidden"
    """Where to normalize: after every convolution, or only the logits."""
    placement: Placement = "before"
    """Normalize before the activation, as published, or after it."""
    affine: bool = True
    """Learn scale and bias (Inception: only the bias); otherwise they stay 1 and 0."""
    momentum: float | None = None
    """Weight of the old running statistics in an update. None: as published, see nets/{blocks,linen}.py."""
    debias: bool = False
    """Correct the running statistics for their start at 0 and 1."""
    epsilon: float | None = None
    """Added to the variance when normalizing. None: as published, see nets/{blocks,linen}.py."""
    noise: Noise = "none"
    """After each batch norm: none, noise like that of ghost groups, or noise whose distribution changes every step."""
    tuning: Annotated[Tuning, Suppress] = "trained"
    """Batch norms in fine-tuning: trained as usual, frozen, or replaced by trainable affine maps."""
    start: Annotated["Config | None", Suppress] = None
    """The run whose trained network this one fine-tunes, with a new last layer. None: start from random weights."""
    activation: Activation = "relu"
    """Activation function after each convolution."""
    dropout: float = 0.0
    """Probability of dropping a feature before the last layer."""
    deep_supervision: bool = False
    """Add the losses of two more classifiers, after the second and fourth convolution, in training."""
    init_scale: float | None = None
    """Draw initial weights uniformly between plus and minus this. None: as published, see nets/{blocks,linen}.py."""
    learning_rate: float = 0.01
    """Initial learning rate."""
    lr_decay_epochs: int = 10
    """The learning rate is multiplied by 0.1 ** floor((1 + epoch) / this), epochs counted from 0, as published."""
    batch_size: int = 250
    """Images per step."""
    epochs: int = 30
    """Passes over the training images."""
    evaluations: int = 1
    """Evaluations on the test set per epoch, evenly spaced; each becomes a row of the results."""
    seed: int = 0
    """Random seed for the initial weights, the order of the images and the augmentation."""

    def __post_init__(self):
        """Refuses values that no run could use.

        Raises:
          ValueError: names the field, what it must be, and its value.
        """
        # tyro checks the types of the command line; studies build configs in Python.
        for name, annotation in _annotations().items():
            value = getattr(self, name)
            if not _is_a(value, annotation):
                shown = annotation.__name__ if isinstance(annotation, type) else str(annotation).removeprefix("typing.")
                raise ValueError(f"{name} must be {shown}, got {value!r}.")
            if value is not None and name in _FIELD_RULES:
                accepts, description = _FIELD_RULES[name]
                if not accepts(value):
                    raise ValueError(f"{name} must be {description}, got {value!r}.")
        for breaks, message in _RULES:
            if breaks(self):
                raise ValueError(message.format(**vars(self)))
        for applies, cause, names in _WITHOUT_EFFECT:
            for name in names if applies(self) else ():
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name}={getattr(self, name)!r} has no effect with {cause}; leave it out.")
        if self.start is not None:
            self._check_start(self.start)

    def _check_start(self, start: Self) -> None:
        """Refuses a start whose weights do not fit this run."""
        alike = ["net", "width", "norm", "norm_layers", "placement", "activation", "deep_supervision"]
        if self.tuning == "trained":  # otherwise, any batch norm is frozen or becomes an affine map
            alike += ["affine", "debias", "noise"]
        if different := [name for name in alike if getattr(self, name) != getattr(start, name)]:
            raise ValueError(f"start must be a run with the same {' and '.join(different)}.")
        if start.data == "digits" and self.data != "digits":
            raise ValueError(f"start must be a run on color images for data={self.data!r}, got one on gray digits.")

    def with_seed(self, seed: int) -> Self:
        """Returns a copy with another seed, also in the run it starts from."""
        return self.replace(seed=seed, start=self.start and self.start.with_seed(seed))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Builds a config from the JSON form of `dataclasses.asdict`; missing fields get their defaults."""
        values = dict(values)
        if values.get("classes") is not None:
            values["classes"] = tuple(values["classes"])
        if values.get("start") is not None:
            values["start"] = cls.from_json(values["start"])
        return cls(**values)

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed; it is checked like a new config."""
        return dataclasses.replace(self, **changes)

    def differences(self, other: Self) -> str:
        """Describes the fields that differ from those of `other`; empty if none do."""
        pairs = [(field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return ", ".join(
            f"`{name}` {_in_words(name, mine)} instead of {_in_words(name, theirs)}"
            for name, mine, theirs in pairs
            if mine != theirs
        )


@functools.cache
def _annotations() -> dict[str, Any]:
    return get_type_hints(Config)


def _is_a(value: Any, annotation: Any) -> bool:
    """Returns whether a value has the annotated type: one of those that the fields of `Config` have."""
    if isinstance(annotation, UnionType):
        return any(_is_a(value, option) for option in get_args(annotation))
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, int) for item in value)
    if annotation is float:
        annotation = int | float
    return isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))


_POSITIVE = (lambda x: 0 < x < math.inf, "positive and finite")
_AT_LEAST_1 = (lambda n: n >= 1, "at least 1")

# field: (whether a value is accepted, what is accepted); None is always accepted where the type allows it.
_FIELD_RULES = {
    "image_size": (lambda n: n in (8, 16, 32), "8, 16 or 32"),
    "train_images": _AT_LEAST_1,
    "classes": (lambda c: len(set(c)) == len(c) >= 2 and min(c) >= 0, "at least two different integers from 0"),
    "width": _POSITIVE,
    "group_size": _AT_LEAST_1,
    "momentum": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "epsilon": _POSITIVE,
    "dropout": (lambda x: 0 <= x < 1, "at least 0 and less than 1"),
    "init_scale": _POSITIVE,
    "learning_rate": _POSITIVE,
    "lr_decay_epochs": _AT_LEAST_1,
    "batch_size": _AT_LEAST_1,
    "epochs": _AT_LEAST_1,
    "evaluations": _AT_LEAST_1,
    "seed": (lambda n: 0 <= n < 2**32, "from 0 to 2**32 - 1"),
}

# (whether a config breaks the rule, the message, in which the fields are filled in)
_RULES = (
    (
        lambda c: c.train_images is not None and c.train_images < c.batch_size,
        "batch_size must be at most train_images, got {batch_size} and {train_images}; a step needs a whole batch.",
    ),
    (
        lambda c: c.noise != "none" and (c.norm, c.tuning) != ("batch", "trained"),
        "noise={noise!r} must have norm='batch' and tuning='trained', got norm={norm!r} and tuning={tuning!r}.",
    ),
    (
        lambda c: _has_groups(c) and c.group_size is None,
        "group_size must be set for norm='ghost' and noise='matched', got None.",
    ),
    (
        lambda c: not _has_groups(c) and c.group_size is not None,
        "group_size must be None unless norm='ghost' or noise='matched', got {group_size}.",
    ),
    (
        lambda c: c.group_size is not None and c.batch_size % c.group_size,
        "group_size must divide batch_size, got {group_size} and {batch_size}.",
    ),
    (
        lambda c: c.noise == "matched" and c.group_size == c.batch_size,
        "group_size must be less than batch_size for noise='matched', got {group_size} for both; "
        "the statistics of a single group have no noise.",
    ),
    (
        lambda c: c.deep_supervision and c.net != "cnn7",
        "net must be 'cnn7' for deep_supervision, got {net!r}.",
    ),
    (
        lambda c: c.placement == "after" and c.net == "resnet20",
        "placement must be 'before' for net='resnet20', which adds before it activates, got 'after'.",
    ),
    (
        lambda c: c.tuning != "trained" and (c.start is None or c.norm in ("none", "group")),
        "tuning must be 'trained' unless the run has a start and its norm is a batch norm, got {tuning!r}.",
    ),
    (
        lambda c: c.start is not None and c.start.start is not None,
        "start must be a run from random weights, got one that has a start itself.",
    ),
    (
        lambda c: c.start is not None and (c.norm_layers == "logits" or c.deep_supervision),
        "A run with a start gets one new layer, the last. It must have norm_layers='hidden' and no deep_supervision, "
        "got norm_layers={norm_layers!r} and deep_supervision={deep_supervision}.",
    ),
)

# (whether it applies to a config, its cause, the fields that then must keep their defaults)
_WITHOUT_EFFECT = (
    (
        lambda c: c.norm == "none",
        "norm='none'",
        ("norm_layers", "placement", "affine", "momentum", "debias", "epsilon"),
    ),
    (lambda c: c.norm == "group", "norm='group'", ("norm_layers", "momentum", "debias")),
    (lambda c: c.tuning != "trained", "batch norms that are not trained", ("affine", "momentum", "debias", "epsilon")),
    (lambda c: c.norm_layers == "logits", "norm_layers='logits'", ("placement",)),
)


def _has_groups(config: Config) -> bool:
    return config.norm == "ghost" or config.noise == "matched"


def _in_words(name: str, value: Any) -> str:
    """Returns the value of a field as a reader expects it in a sentence."""
    if value is None:
        return "all" if name in ("train_images", "classes") else "none" if name == "start" else "the published value"
    if name == "start":
        return "another run"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


PRESETS: dict[str, Config] = {
    # Two CPU cores: a small network on a fifth of CIFAR-10, reduced to 16x16 pixels, for a fifth of the epochs.
    "small": Config(image_size=16, train_images=10_000, net="cnn7", batch_size=100, epochs=6, lr_decay_epochs=4),
    # One GPU: the defaults are the published protocol.
    "full": Config(),
}
