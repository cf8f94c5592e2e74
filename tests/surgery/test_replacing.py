"""Layers that come in place of batch norms: jaxbn's with other options, affine ones, group norms."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.nnx
from jaxbn import surgery
from tests.surgery.nets import GHOST, NETS, LayersInALoop, X, linen_net, nnx_net, output, refused, variables_of


@pytest.mark.slow
@pytest.mark.parametrize("framework", NETS)
def test_ghost_groups_are_normalized_separately_in_training(framework):
    net, variables = NETS[framework]()
    done = surgery.replace(net, variables, X, method=GHOST)
    parts = [X[:4], X[4:]]
    whole, _ = output(done.model, done.variables, train=True)
    if variables is None:
        net.train()
        alone = jnp.concatenate([nnx.clone(net)(part) for part in parts])
    else:
        alone = jnp.concatenate([net.apply(variables, part, True, mutable=["batch_stats"])[0] for part in parts])
    np.testing.assert_allclose(whole, alone, rtol=0, atol=2e-5 * abs(alone).max())


def test_replaced_layers_keep_their_settings():
    net, _ = nnx_net()
    done = surgery.replace(net, None, X, axis_name="data", unbiased=True)
    layer = done.model.rest.layers[1]
    assert isinstance(layer, jaxbn.nnx.BatchNorm)
    assert (layer.momentum, layer.epsilon, layer.axis_name, layer.unbiased) == (0.9, 1e-3, "data", True)
    assert done.model.again["first"] is done.model.first


@pytest.mark.parametrize("framework", NETS)
def test_fixed_affine_layers_have_no_parameters(framework):
    net, variables = NETS[framework]()
    done = surgery.to_affine(net, variables, X, learnable=False)
    if variables is None:
        assert isinstance(done.model.first.scale, nnx.BatchStat) and not hasattr(done.model.first, "mean")
    else:
        assert set(done.variables["params"]) == {"conv", "dense"}
        assert set(done.variables["batch_stats"]["first"]) == {"scale", "bias"}


def test_added_statistics_start_as_they_would():
    net, variables = linen_net()
    done = surgery.replace(net, variables, X, debias=True, steps=7, accumulate=2)
    statistics = done.variables["batch_stats"]["first"]
    assert statistics["steps"].tolist() == [7] * 4 and statistics["pending_count"].tolist() == [0.0] * 4
    np.testing.assert_array_equal(statistics["mean"], variables["batch_stats"]["first"]["mean"])
    plain = surgery.replace(done.model, done.variables, X, debias=False, accumulate=1)
    assert set(plain.variables["batch_stats"]["first"]) == {"mean", "var"}


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("steps=5 has no use, because first does not count batches", {"steps": 5}),
        (r"steps.*-3", {"steps": -3, "debias": True}),
        (r"momentum.*2\.0", {"momentum": 2.0}),
        ("layers must name at least one batch norm of 'first', 'second'; pass None for all of them", {"layers": []}),
    ],
)
def test_options_that_do_not_fit_are_refused(message, options):
    refused(message, surgery.replace, *linen_net(), **options)


def test_an_option_that_would_change_the_arrays_is_refused():
    refused("axis=1 cannot change in a trained model, unlike acc", surgery.replace, *linen_net(), axis=1)


def test_counting_needs_the_number_of_batches_so_far():
    message = r"first will count batches .* pass their number as steps=, or 0 to restart"
    refused(message, surgery.replace, *linen_net(), momentum=None)


def test_groups_that_do_not_divide_are_refused():
    message = "num_groups=4 does not divide the 6 features of second; choose a divisor"
    refused(message, surgery.replace_by_group_norm, *linen_net(), num_groups=4)


def test_group_norm_of_features_on_another_axis_is_refused():
    net = nn.BatchNorm(use_running_average=True, axis=1)
    refused("has its features on axis 1 of 4", surgery.replace_by_group_norm, net, variables_of(net, X), num_groups=2)


def test_new_variables_in_a_loop_are_refused():
    message = r"blocks/norm is inside of a scan or vmap, which does not know the new variables \(steps\)"
    refused(message, surgery.replace, LayersInALoop(), variables_of(LayersInALoop(), X), debias=True, steps=3)
