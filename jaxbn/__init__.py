"""Batch normalization for JAX and Flax: pure functions over explicit statistics, and two thin layers.

The layers and tools are modules: jaxbn.linen, jaxbn.nnx, jaxbn.calibrate, jaxbn.surgery, jaxbn.diagnose, jaxbn.interop
and jaxbn.testing.  Each is imported on first use.
"""

import importlib
import importlib.metadata
import importlib.util
from typing import Any

from jaxbn._core.domains import domain, domain_batch_norm
from jaxbn._core.functional import Method, affine, batch_norm, batch_normalize, normalize
from jaxbn._core.padding import pad_batch
from jaxbn._core.running import update_stats
from jaxbn._core.stats import (
    AccumulatedStats,
    BatchStats,
    CountedStats,
    Moments,
    combine,
    init_stats,
    moments,
)
from jaxbn._core.variants import batch_renormalize, ghost_normalize, shifted_normalize

__all__ = [
    "AccumulatedStats",
    "BatchStats",
    "CountedStats",
    "Method",
    "Moments",
    "affine",
    "batch_norm",
    "batch_normalize",
    "batch_renormalize",
    "combine",
    "domain",
    "domain_batch_norm",
    "ghost_normalize",
    "init_stats",
    "moments",
    "normalize",
    "pad_batch",
    "shifted_normalize",
    "update_stats",
]


def __getattr__(name: str) -> Any:
    """Imports a module of the library on first use, so that ``import jaxbn`` does not load Flax."""
    if not name.startswith("_") and importlib.util.find_spec(f"jaxbn.{name}"):
        return importlib.import_module(f"jaxbn.{name}")
    if name == "__version__":
        return importlib.metadata.version("jaxbn")
    hint = "; the layers are jaxbn.linen.BatchNorm and jaxbn.nnx.BatchNorm" if name == "BatchNorm" else ""
    raise AttributeError(f"module 'jaxbn' has no attribute {name!r}{hint}")
