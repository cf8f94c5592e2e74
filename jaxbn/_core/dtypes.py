"""The dtypes in which batches are computed: at least float32, real or complex."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


def wide_dtype(dtype: DTypeLike) -> Any:
    """Returns the dtype for arithmetic on arrays of ``dtype``: float32 in place of bfloat16 and float16."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def widen(x: jax.Array) -> jax.Array:
    """Casts ``x`` to at least float32.

    XLA fuses the cast into the reduction or elementwise loop that reads it, so the wide copy never reaches memory.
    """
    return x.astype(wide_dtype(x.dtype))


def cast(x: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """Casts ``x`` to ``dtype``; None leaves it as it is."""
    return x if dtype is None else x.astype(dtype)


def is_narrow(x: jax.Array) -> bool:
    """Tells whether arithmetic on ``x`` needs a wider dtype than its own."""
    return x.dtype != wide_dtype(x.dtype)


def in_float64(value: ArrayLike) -> Any:
    """Converts ``value`` to a NumPy array of float64 or complex128."""
    return np.asarray(value, np.complex128 if jnp.iscomplexobj(value) else np.float64)


def abs2(x: jax.Array) -> jax.Array:
    """Computes |x|^2, which is real even if x is complex."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)
