"""Calls that the tools evaluate: models that draw random numbers, attention, and training on purpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxbn.linen
from jaxbn import calibrate, surgery
from jaxbn.diagnose import diagnose

X = jax.random.normal(jax.random.key(0), (16, 5, 6)) + 2


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=False):
        x = nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(3)(x))
        return nn.BatchNorm(use_running_average=True)(x)


@pytest.mark.parametrize(
    "tool",
    [
        lambda *model: surgery.freeze(*model, X),
        lambda *model: calibrate.one_pass(*model, [X]),
        lambda *model: diagnose(*model, [X] * 8),
    ],
    ids=["surgery", "calibrate", "diagnose"],
)
def test_random_numbers_in_evaluation_are_refused_with_the_remedy(tool):
    variables = Dropping().init(jax.random.key(1), X, deterministic=True)
    with pytest.raises(ValueError, match='draws random numbers in evaluation: Dropout_0 needs PRNG for "dropout"; let'):
        tool(Dropping(), variables)


@pytest.mark.slow
def test_attention_takes_in_the_batch_norm_behind_it():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(nn.MultiHeadDotProductAttention(2)(x, x))

    variables = Net().init(jax.random.key(1), X)
    variables = calibrate.one_pass(Net(), variables, [X])
    done = surgery.fold(Net(), variables, X)
    assert done.kept == {}
    found, expected = done.model.apply(done.variables, X), Net().apply(variables, X)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())


class BatchStatistics(nn.Module):
    """Normalizes with the batch on purpose, also in evaluation."""

    @nn.compact
    def __call__(self, x):
        return jaxbn.linen.BatchNorm(use_running_average=False, update_stats=False)(x)


def test_a_layer_that_leaves_its_statistics_alone_is_no_finding():
    variables = BatchStatistics().init(jax.random.key(1), X)
    batches = jax.random.normal(jax.random.key(2), (8, 64, 6)) * jnp.arange(1, 7) + 3
    assert diagnose(BatchStatistics(), variables, list(batches)).findings == []
