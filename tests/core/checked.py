"""Functions that check their arguments, as tables to parametrize tests with."""

import functools
import re

import numpy as np
import pytest

import jaxbn

X = np.random.default_rng(0).normal(size=(8, 5, 3)).astype(np.float32)
THREE, FOUR = np.ones(3, np.float32), np.ones(4, np.float32)
STATS = jaxbn.init_stats(3)

train = functools.partial(jaxbn.batch_norm, X, STATS, use_running_average=False)
evaluate = functools.partial(jaxbn.batch_norm, X, STATS, use_running_average=True)
ghost = functools.partial(jaxbn.ghost_normalize, X)
renorm = functools.partial(jaxbn.batch_renormalize, X, stats=STATS)
normalize = functools.partial(jaxbn.normalize, X, THREE, THREE)

# Every function takes x, axis and the parameters.
FUNCTIONS = {
    "normalize": lambda x, **options: jaxbn.normalize(x, THREE, THREE, **options),
    "batch_normalize": jaxbn.batch_normalize,
    "train": lambda x, **options: jaxbn.batch_norm(x, STATS, use_running_average=False, **options),
    "evaluate": lambda x, **options: jaxbn.batch_norm(x, STATS, use_running_average=True, **options),
    "ghost_normalize": lambda x, **options: jaxbn.ghost_normalize(x, group_size=2, **options),
    "batch_renormalize": lambda x, **options: jaxbn.batch_renormalize(x, stats=STATS, **options),
    "shifted_normalize": lambda x, **options: jaxbn.shifted_normalize(x, stats=STATS, **options),
}
MEASURING = {"moments": jaxbn.moments}
MASKING = {name: f for name, f in (FUNCTIONS | MEASURING).items() if name != "normalize"}
COLLECTIVE = {name: f for name, f in MASKING.items() if name != "evaluate"}


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))
