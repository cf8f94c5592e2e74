"""Writes keras.npz: the state of a Keras model after 5 and 10 training steps, and outputs of single layers.

KERAS_BACKEND=jax python tests/golden/make_keras.py    # needs keras==3.15.1 and jax==0.12.0.1

The file is reproducible with the same versions on the same processor.  Keras's batch norm always computes in float32,
so everything here is float32.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("keras.npz")
STEPS = 5  # in Keras before the conversion, and again after it
LEARNING_RATE, MOMENTUM = 0.05, 0.9
BATCH, CLASSES, IMAGE = 16, 5, (8, 6, 3)  # height, width, channels
# Name of a case -> kind of layer, options, shapes of the weights, shape of the input.
LAYERS = {
    "conv-1d": (
        "Conv1D",
        {"filters": 4, "kernel_size": 3, "strides": 2, "padding": "same"},
        [(3, 3, 4), (4,)],
        (2, 8, 3),
    ),
    "conv-2d-grouped": (
        "Conv2D",
        {"filters": 6, "kernel_size": (3, 2), "groups": 2, "use_bias": False},
        [(3, 2, 2, 6)],
        (2, 6, 5, 4),
    ),
    "conv-3d": ("Conv3D", {"filters": 4, "kernel_size": (2, 3, 1)}, [(2, 3, 1, 3, 4), (4,)], (2, 4, 5, 3, 3)),
    "depthwise-1d": ("DepthwiseConv1D", {"kernel_size": 3, "depth_multiplier": 2}, [(3, 3, 2), (6,)], (2, 6, 3)),
    "depthwise-2d": (
        "DepthwiseConv2D",
        {"kernel_size": (3, 2), "depth_multiplier": 3, "strides": 2, "padding": "same"},
        [(3, 2, 4, 3), (12,)],
        (2, 7, 6, 4),
    ),
    "conv-transpose-1d": (
        "Conv1DTranspose",
        {"filters": 4, "kernel_size": 5, "strides": 2},
        [(5, 4, 3), (4,)],
        (2, 6, 3),
    ),
    "conv-transpose-2d": (
        "Conv2DTranspose",
        {"filters": 4, "kernel_size": (3, 2), "strides": (2, 3), "padding": "same"},
        [(3, 2, 4, 3), (4,)],
        (2, 5, 4, 3),
    ),
    "conv-transpose-3d": (
        "Conv3DTranspose",
        {"filters": 3, "kernel_size": (2, 3, 1), "strides": 2, "use_bias": False},
        [(2, 3, 1, 3, 2)],
        (2, 3, 4, 2, 2),
    ),
    "dense": ("Dense", {"units": 3}, [(7, 3), (3,)], (2, 7)),
    "batch-norm": ("BatchNormalization", {}, [(4,)] * 4, (2, 3, 4)),
    "batch-norm-without-scale": ("BatchNormalization", {"scale": False}, [(4,)] * 3, (2, 3, 4)),
    "batch-norm-without-bias": ("BatchNormalization", {"center": False}, [(4,)] * 3, (2, 3, 4)),
    "batch-norm-without-either": ("BatchNormalization", {"scale": False, "center": False}, [(4,)] * 2, (2, 3, 4)),
}


def batches():
    """Returns images [N, H, W, C] and labels for each of the ten steps."""
    rng = np.random.default_rng(1)
    images = rng.normal(loc=0.5, size=(2 * STEPS, BATCH, *IMAGE)).astype(np.float32)
    return list(zip(images, rng.integers(CLASSES, size=(2 * STEPS, BATCH)), strict=True))


def layer_inputs(case):
    """Returns the weights of a layer, all positive because some are variances, and its input."""
    _, _, shapes, input_shape = LAYERS[case]
    rng = np.random.default_rng(2)
    weights = [rng.uniform(0.5, 2, size=shape).astype(np.float32) for shape in shapes]
    return weights, rng.normal(size=input_shape).astype(np.float32)


def run_layer(case):
    """Returns the output of a layer in evaluation."""
    import keras

    kind, options, _, _ = LAYERS[case]
    weights, x = layer_inputs(case)
    layer = getattr(keras.layers, kind)(**options)
    layer.build(x.shape)
    layer.set_weights(weights)
    return np.asarray(layer(x, training=False))


def make_model():
    """Returns the model; every layer with weights has a name."""
    from keras import Sequential, layers

    return Sequential(
        [
            layers.Input(IMAGE),
            layers.Conv2D(6, (3, 5), padding="same", use_bias=False, name="conv"),
            layers.BatchNormalization(momentum=0.9, name="norm"),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", name="depthwise"),
            layers.BatchNormalization(scale=False, name="norm_without_scale"),
            layers.ReLU(),
            layers.Conv2D(8, 3, strides=2, padding="same", groups=2, name="grouped"),
            layers.BatchNormalization(center=False, name="norm_without_bias"),
            layers.ReLU(),
            layers.Conv2DTranspose(6, (3, 2), strides=2, padding="same", name="transposed"),
            layers.BatchNormalization(scale=False, center=False, name="norm_without_either"),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(CLASSES, name="dense"),
        ]
    )


def state_of(model):
    """Returns the weights and SGD's velocities; keys are the name of the layer and the position of the weight in it."""
    positions = {id(weight): (layer.name, str(i)) for layer in model.layers for i, weight in enumerate(layer.weights)}
    weights = {layer.name: layer.get_weights() for layer in model.layers if layer.weights}
    velocities = {}
    for weight, velocity in zip(model.trainable_variables, model.optimizer.momentums, strict=True):
        name, position = positions[id(weight)]
        velocities[f"{name}/{position}"] = np.asarray(velocity)
    return {f"{name}/{i}": value for name, values in weights.items() for i, value in enumerate(values)}, velocities


def run():
    """Trains for ten steps; returns losses, weights and velocities of each half, and the logits of an evaluation."""
    import keras

    keras.utils.set_random_seed(0)
    model = make_model()
    model.compile(
        keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    halves = []
    for steps in (batches()[:STEPS], batches()[STEPS:]):
        losses = []
        for x, labels in steps:
            model.reset_metrics()  # otherwise Keras returns the average loss of all steps
            losses.append(model.train_on_batch(x, labels))
        weights, velocities = state_of(model)
        halves.append({"losses": np.array(losses, np.float32), "weights": weights, "velocities": velocities})
    return halves, np.asarray(model(batches()[0][0], training=False))


def main():
    """Writes the file."""
    import keras

    arrays = {f"layers/{case}": run_layer(case) for case in LAYERS} | {"keras": np.array(keras.__version__)}
    halves, arrays["evaluated"] = run()
    for half, state in enumerate(halves):
        arrays[f"{half}/losses"] = state["losses"]
        for tree in ("weights", "velocities"):
            arrays |= {f"{half}/{tree}/{name}": value for name, value in state[tree].items()}
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
