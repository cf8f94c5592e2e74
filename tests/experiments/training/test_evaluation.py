"""Testing a trained network in other ways: with its running statistics or those of its batches, and by known logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training import evaluation
from experiments.training.evaluation import predict, score

IMAGES = np.random.RandomState(0).randint(0, 256, (7, 2, 2, 1)).astype(np.uint8)


class Norm(nn.Module):
    """A net of one batch norm: its logits are the normalized pixels, noisy in training where it is asked for."""

    noisy: bool = False

    @nn.compact
    def __call__(self, x, train):
        y = nn.BatchNorm(use_running_average=not train, epsilon=1e-6)(x.reshape(len(x), -1))
        return y + jax.random.normal(self.make_rng("noise"), y.shape) if self.noisy and train else y


@pytest.fixture
def variables():
    stats = {"mean": jnp.full(4, 0.5), "var": jnp.full(4, 0.25)}
    learned = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    return {"params": {"BatchNorm_0": learned}, "batch_stats": {"BatchNorm_0": stats}}


def pixels(images=IMAGES):
    return images.reshape(len(images), -1) / np.float32(255)


def test_running_statistics_treat_every_image_by_itself(variables):
    logits = predict(Norm(), variables, IMAGES, batch_size=3)
    np.testing.assert_allclose(logits, (pixels() - 0.5) / 0.5, atol=1e-5)


def test_batch_statistics_are_those_of_each_batch(variables):
    logits = predict(Norm(), variables, IMAGES, statistics="batch", batch_size=4)
    for part in (slice(0, 4), slice(4, 7)):  # the last one is smaller
        x = pixels()[part]
        np.testing.assert_allclose(logits[part], (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6), atol=1e-4)


def test_running_statistics_stay_as_they_are(variables):
    before = jax.tree.map(np.array, variables)
    predict(Norm(), variables, IMAGES, statistics="batch")
    jax.tree.map(np.testing.assert_array_equal, before, variables)


def test_noise_of_training_is_there_with_batch_statistics_alone(variables):
    noise = [
        predict(Norm(True), variables, IMAGES, statistics=s) - predict(Norm(), variables, IMAGES, statistics=s)
        for s in ("running", "batch")
    ]
    assert not noise[0].any() and noise[1].std() > 0.5


def test_score_counts_images_and_takes_the_mean_loss():
    logits = np.log([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).astype(np.float32)
    actual = score(logits, np.array([0, 1], np.int32))
    assert actual.accuracy == 0.5
    assert actual.loss == pytest.approx((np.log(2) + np.log(4)) / 2, rel=1e-6)


def test_loss_of_a_diverged_net_is_no_number():
    assert np.isnan(score(np.full((2, 3), np.nan, np.float32), np.array([0, 1])).loss)


def test_batches_hold_every_image_once_in_their_order():
    batches = evaluation.split(IMAGES, 3)
    assert list(map(len, batches)) == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES)
