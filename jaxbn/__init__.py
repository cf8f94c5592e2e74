"""Batch normalisation for JAX and Flax: pure functions over explicit statistics, and two thin layers."""

from jaxbn.functional import affine, batch_norm, batch_normalize, normalize
from jaxbn.padding import pad_batch
from jaxbn.stats import AccumulatedStats, BatchStats, CountedStats, Moments, combine, init_stats, moments, update_stats
from jaxbn.variants import batch_renormalize, ghost_normalize

__all__ = [
    "AccumulatedStats",
    "BatchStats",
    "CountedStats",
    "Moments",
    "affine",
    "batch_norm",
    "batch_normalize",
    "batch_renormalize",
    "combine",
    "ghost_normalize",
    "init_stats",
    "moments",
    "normalize",
    "pad_batch",
    "update_stats",
]
