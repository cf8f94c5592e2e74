"""Batch norm of this library and of its peers, as the laws see them: a table of adapters.

Conventions: every layer has the same epsilon and momentum, and is otherwise left at its defaults, or set as its library
advises for the dtype at hand; what a library documents is declared, not what its code turns out to do.  A module of
this package imports its library at its top, and is itself imported when one of its adapters is asked for.

Not here: ``equinox.nn.BatchNorm(mode="ema")``, which normalises with the running average in training too.  That is
another algorithm, to which the laws do not apply.
"""

import importlib
from collections.abc import Callable

from jaxbn.testing import Adapter

EPSILON = 1e-5
MOMENTUM = 0.9
EXTRA = "pip install 'jaxbn[peers]' brings it, and in a checkout pip install -e '.[peers]'"


def _peer(module: str, function: str, library: str) -> Callable[[], Adapter]:
    """Returns what imports a module of this package, and makes one of its adapters."""

    def adapter() -> Adapter:
        try:
            found = importlib.import_module(f"{__name__}.{module}")
        except ModuleNotFoundError as error:
            if error.name != library:
                raise
            raise ModuleNotFoundError(f"{library} is not installed; {EXTRA}.", name=library) from None
        return getattr(found, function)()

    return adapter


PEERS = {
    "jaxbn": _peer("ours", "functional", "jaxbn"),
    "jaxbn-linen": _peer("ours", "linen", "jaxbn"),
    "jaxbn-nnx": _peer("ours", "nnx", "jaxbn"),
    "flax-linen": _peer("flax", "linen", "flax"),
    "flax-linen-stable": _peer("flax", "linen_stable", "flax"),
    "flax-nnx": _peer("flax", "nnx", "flax"),
    "haiku": _peer("haiku", "layer", "haiku"),
    "equinox": _peer("equinox", "layer", "equinox"),
    "keras": _peer("keras", "layer", "keras"),
    "torch": _peer("torch", "layer", "torch"),
}
OURS = tuple(name for name in PEERS if name.startswith("jaxbn"))
LIBRARIES = {"haiku": "dm-haiku", "equinox": "equinox", "keras": "keras", "torch": "torch"}  # and what brings them
