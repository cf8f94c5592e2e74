"""Augments training images: mirrors, shears and zooms them, by bilinear resampling."""

import jax
import jax.numpy as jnp

MAX_SHEAR = 0.2  # degrees
MAX_ZOOM = 0.2


def augment(key: jax.Array, images: jax.Array, *, flip: bool = True) -> jax.Array:
    """Mirrors half of the images, shears each by up to 0.2 degrees and zooms its rows and columns by 0.8 to 1.2.

    Each image gets its own shear and zooms, drawn uniformly, as in Keras's ImageDataGenerator(horizontal_flip=True,
    shear_range=0.2, zoom_range=0.2).

    Args:
      key: random key.
      images: floats, shape [n, height, width, channels].
      flip: whether to mirror; do not if a mirrored image may belong to another class, as with digits.

    Returns:
      The augmented images, of the same shape and dtype, within the range of the originals.

    Raises:
      ValueError: the images are not floats.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floats, got {images.dtype}. Divide uint8 images by 255.")
    n = len(images)
    mirror_key, shear_key, zoom_key = jax.random.split(key, 3)
    mirrored = jax.random.bernoulli(mirror_key, 0.5, (n,)) if flip else jnp.zeros(n, bool)
    shear = jnp.deg2rad(jax.random.uniform(shear_key, (n,), minval=-MAX_SHEAR, maxval=MAX_SHEAR))
    zoom = jax.random.uniform(zoom_key, (n, 2), minval=1 - MAX_ZOOM, maxval=1 + MAX_ZOOM)
    return affine_resample(images, mirrored, shear, zoom)


def affine_resample(images: jax.Array, mirrored: jax.Array, shear: jax.Array, zoom: jax.Array) -> jax.Array:
    """Resamples images bilinearly under an affine map of their pixel positions; beyond an edge, the edge is repeated.

    With positions relative to the center, the output at (r, c) is the input at
    (zoom_r · r - sin(shear) · zoom_c · c, cos(shear) · zoom_c · c), where c changes its sign in mirrored images.

    Args:
      images: floats, shape [n, height, width, channels].
      mirrored: booleans, shape [n].
      shear: radians, shape [n].
      zoom: of rows and columns, shape [n, 2]; below 1 magnifies.

    Returns:
      The resampled images, of the same shape and dtype.
    """
    _, height, width, _ = images.shape
    last_row, last_column = height - 1, width - 1
    sign = jnp.where(mirrored, -1.0, 1.0)[:, None]
    zoom_r, zoom_c = zoom[:, :1], zoom[:, 1:]
    shear = shear[:, None]

    # Where each output pixel comes from, relative to the center.
    r = jnp.arange(height) - last_row / 2
    c = sign * (jnp.arange(width) - last_column / 2)
    zoomed = zoom_r * r
    sheared = jnp.sin(shear) * zoom_c * c
    row = zoomed[:, :, None] - sheared[:, None, :]
    # The shear matrix has no entry from r to column: row is [n, height, width], but column only [n, width].
    column = jnp.cos(shear) * zoom_c * c

    # Clipping the positions repeats the pixels at the edges.
    row = jnp.clip(row + last_row / 2, 0, last_row)
    column = jnp.clip(column + last_column / 2, 0, last_column)

    # The upper left of the four neighbors. It stops one short of the last row and column, so that the other neighbors
    # exist; at the last one itself, `down` or `right` is then 1.
    top = jnp.minimum(row.astype(jnp.int32), last_row - 1)
    left = jnp.minimum(column.astype(jnp.int32), last_column - 1)
    down = (row - top)[..., None]
    right = (column - left)[:, None, :, None]

    # On a CPU, gathering the neighbors is faster than products with matrices of interpolation weights.
    gather = jax.vmap(lambda image, rows, columns: image[rows, columns[None, :]])
    upper_left = gather(images, top, left)
    upper_right = gather(images, top, left + 1)
    lower_left = gather(images, top + 1, left)
    lower_right = gather(images, top + 1, left + 1)
    upper = (1 - right) * upper_left + right * upper_right
    lower = (1 - right) * lower_left + right * lower_right
    result = (1 - down) * upper + down * lower
    # The weights are float32: bfloat16 images are rounded only once, here.
    return result.astype(images.dtype)
