"""Examples that are masked out do not count, and a batch that is spread over devices counts as a whole."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import calibrate
from tests import reference
from tests.calibrate.models import (
    CHAIN,
    CHAIN_VARIABLES,
    LAYER,
    X,
    assert_close,
    expected_of_chain,
    layer_variables,
    stats_of,
)


def evaluate(module, batch):
    return module(batch["x"])


def evaluate_with_mask(module, batch):
    return module(batch["x"], batch["valid"][:, None])


def valid(batch):
    return batch["valid"]


def padded(*sizes):
    """Returns batches of these sizes, padded with NaN to the size of the data."""
    ends = np.cumsum(sizes)
    batches = [jaxbn.pad_batch(X[end - size : end], len(X)) for size, end in zip(sizes, ends, strict=True)]
    return [{"x": np.where(mask[:, None], x, np.nan), "valid": mask} for x, mask in batches]


def test_padding_does_not_count_with_the_mask_of_the_data():
    result = calibrate.one_pass(CHAIN, CHAIN_VARIABLES, padded(100, 28), call=evaluate, mask=valid)
    assert_close(stats_of(result), expected_of_chain([slice(0, 100), slice(100, 128)]))


def test_padding_does_not_count_with_the_mask_of_the_model():
    result = calibrate.layer_by_layer(CHAIN, CHAIN_VARIABLES, padded(100, 28), call=evaluate_with_mask)
    assert_close(stats_of(result), expected_of_chain())


def test_examples_count_if_both_masks_are_true():
    counted, own = np.arange(len(X)) % 2 == 0, np.arange(len(X)) % 3 == 0
    masks = {"call": lambda module, x: module(x, mask=own[:, None]), "mask": lambda x: counted}
    measured = jax.jit(functools.partial(calibrate.measure, LAYER, **masks))(layer_variables(), X)[""]
    mean, var, count = reference.moments(X, mask=(counted & own)[:, None])
    assert_close({"": measured[:2]}, {"": (mean, var)})
    np.testing.assert_array_equal(measured.count, count)


def mesh():
    return Mesh(jax.devices()[:2], ("batch",))


def test_a_sharded_batch_has_the_statistics_of_the_whole():
    sharded = jax.device_put(X, NamedSharding(mesh(), P("batch")))
    assert_close(stats_of(calibrate.layer_by_layer(CHAIN, CHAIN_VARIABLES, [sharded])), expected_of_chain())


def test_devices_with_a_named_axis_measure_the_whole_batch():
    options = {"call": evaluate, "mask": valid, "axis_name": "batch", "use_running_average": False}
    measure = functools.partial(calibrate.measure, CHAIN, **options)
    spread = jax.jit(jax.shard_map(measure, mesh=mesh(), in_specs=(P(), P("batch")), out_specs=P()))
    (batch,) = padded(100)
    measured = spread(CHAIN_VARIABLES, batch)
    stats = {path.removesuffix("/norm"): moments[:2] for path, moments in measured.items()}
    assert_close(stats, expected_of_chain([slice(100)]))
    assert {float(count) for moments in measured.values() for count in moments.count} == {100.0}
