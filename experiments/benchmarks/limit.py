"""How fast a pass of batch norm could be: the bytes that must move, at the bandwidth of a copy.

Convention: counted are the arrays as large as the inputs, and each time one is read or written; a feature's statistics
are nothing beside them. An activation adds none: whether ReLU let a value through follows from x, which is read anyway.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.evidence import timing

LARGE = (64, 1024, 1024)  # 256 MiB in float32
# Forward, x is read for the statistics and again to be normalized, and y is written. Backward, x and dy are read for
# the sums over the batch, and again for dx, which is written. Evaluation reads x and writes y.
ARRAYS_MOVED = {"forward": 2 + 1, "forward+backward": (2 + 1) + (2 * 2 + 1), "eval": 1 + 1}
ARRAYS_COPIED = 2  # one read, one written


def bytes_moved(name: str, shape: tuple[int, ...], dtype: str) -> int:
    """Returns the bytes that a pass must read and write."""
    return ARRAYS_MOVED[name] * int(np.prod(shape)) * jnp.dtype(dtype).itemsize


def copy(shape: tuple[int, ...], dtype: str) -> Callable[[], jax.Array]:
    """Returns a call that copies an array of this shape and of so many bytes a value.

    It adds 1 to unsigned integers, which the compiler cannot leave out, and which needs no conversion, as bfloat16 does
    on a CPU.
    """
    words = jnp.zeros(shape, f"uint{8 * jnp.dtype(dtype).itemsize}")
    added = jax.jit(lambda words: words + 1).lower(words).compile()
    return lambda: added(words)


def bandwidth(seconds: float, shape: tuple[int, ...], dtype: str) -> float:
    """Returns the bytes per second that a copy of so many seconds reads and writes."""
    return ARRAYS_COPIED * int(np.prod(shape)) * jnp.dtype(dtype).itemsize / seconds


def memory_bandwidth(shape: tuple[int, ...] = LARGE, *, rounds: int = 15) -> float:
    """Returns the bytes per second that a copy reads and writes, the median of so many; beyond what caches hold."""
    seconds = timing.time_calls({"copy": copy(shape, "float32")}, rounds)["copy"]
    return bandwidth(timing.quartiles(seconds)["median"], shape, "float32")
