"""The dtypes in which batches are computed: at least float32, real or complex."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


def wide_dtype(dtype: DTypeLike) -> Any:
    """Returns the dtype that arithmetic on arrays of a dtype is done in."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def widen(x: jax.Array) -> jax.Array:
    """Returns ``x`` in at least float32; inside a reduction or a fused loop the wide copy is never in memory."""
    return x.astype(wide_dtype(x.dtype))


def is_narrow(x: jax.Array) -> bool:
    """Returns whether the arithmetic on ``x`` is in a wider dtype than its own."""
    return x.dtype != wide_dtype(x.dtype)


def in_float64(value: ArrayLike) -> Any:
    """Returns ``value`` as a NumPy array of float64 or complex128."""
    return np.asarray(value, np.complex128 if jnp.iscomplexobj(value) else np.float64)


def abs2(x: jax.Array) -> jax.Array:
    """Returns |x|^2, real also where x is complex."""
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)
