"""Keras: with a mask, inputs with one feature raise an error, because all axes of size 1 are squeezed, features too."""

import os

os.environ["KERAS_BACKEND"] = "jax"
import keras
import numpy as np

mask = np.array([True, True, False])
for features in (2, 1):
    x = np.repeat([[1.0], [2.0], [300.0]], features, axis=1)
    try:
        print(f"x {x.shape}: y {keras.layers.BatchNormalization()(x, training=True, mask=mask)[:2, 0]}")
    except IndexError as error:
        print(f"x {x.shape}: {type(error).__name__}")
