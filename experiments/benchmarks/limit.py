"""Lower bound on the time of a pass of batch norm: the bytes it must move, at the bandwidth of a copy.

Conventions: we count each read and each write of an array as large as the inputs, and neglect the statistics of the
features. An activation adds nothing: whether ReLU passed a value follows from x, which is read in any case.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.evidence import timing

LARGE = (64, 1024, 1024)  # 256 MiB in float32
# Forward: x is read for the statistics and again to be normalized, and y is written. Backward: x and dy are read for
# the sums over the batch and again for dx, which is written. Evaluation reads x and writes y.
ARRAYS_MOVED = {"forward": 2 + 1, "forward+backward": (2 + 1) + (2 * 2 + 1), "eval": 1 + 1}
ARRAYS_COPIED = 2  # one read and one written


def bytes_moved(name: str, shape: tuple[int, ...], dtype: str) -> int:
    """Returns the bytes that a pass must read and write."""
    return ARRAYS_MOVED[name] * int(np.prod(shape)) * jnp.dtype(dtype).itemsize


def copy(shape: tuple[int, ...], dtype: str) -> Callable[[], jax.Array]:
    """Returns a call that copies an array of this shape, with as many bytes per value as this dtype.

    It adds 1 to unsigned integers. The compiler cannot remove that, and it needs no conversion, unlike bfloat16 on a
    CPU.
    """
    words = jnp.zeros(shape, f"uint{8 * jnp.dtype(dtype).itemsize}")
    increment = jax.jit(lambda words: words + 1).lower(words).compile()
    return lambda: increment(words)


def bandwidth(seconds: float, shape: tuple[int, ...], dtype: str) -> float:
    """Returns the bytes per second that a copy reads and writes if it takes this time."""
    return ARRAYS_COPIED * int(np.prod(shape)) * jnp.dtype(dtype).itemsize / seconds


def memory_bandwidth(shape: tuple[int, ...] = LARGE, *, rounds: int = 15) -> float:
    """Measures the bytes per second that a copy beyond the caches reads and writes, the median of these rounds."""
    seconds = timing.time_calls({"copy": copy(shape, "float32")}, rounds)["copy"]
    return bandwidth(timing.quartiles(seconds)["median"], shape, "float32")
