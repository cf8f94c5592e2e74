"""Adapters that make batch norm of this library and of its peers accessible to the laws.

Conventions: all layers have the same epsilon and momentum. Their other options have the defaults, or the values that
the library recommends for the dtype. Adapters declare what a library documents, not what its code happens to do. Each
module of this package imports its library at its top, and is imported when one of its adapters is made.

``equinox.nn.BatchNorm(mode="ema")`` is not included: it also normalizes with the running average in training, which is
a different algorithm, and the laws do not apply to it.
"""

import importlib
from collections.abc import Callable

from jaxbn.testing import Adapter

EPSILON = 1e-5
MOMENTUM = 0.9
EXTRA = "install it with pip install 'jaxbn[peers]', or in a checkout with pip install -e '.[peers]'"


def _peer(module: str, function: str, library: str) -> Callable[[], Adapter]:
    """Returns a function that imports a module of this package and makes one of its adapters."""

    def adapter() -> Adapter:
        try:
            imported = importlib.import_module(f"{__name__}.{module}")
        except ModuleNotFoundError as error:
            if error.name != library:
                raise
            raise ModuleNotFoundError(f"{library} is not installed; {EXTRA}.", name=library) from None
        return getattr(imported, function)()

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
LIBRARIES = {"haiku": "dm-haiku", "equinox": "equinox", "keras": "keras", "torch": "torch"}  # module: package
