"""Memory of a compiled training step: the model needs no more with batch norm than without."""

import jax
import jax.numpy as jnp
import optax
import pytest

from experiments.config import Config
from experiments.nets import linen as linen_nets

BATCH = 128


def temporaries(norm):
    """Returns the bytes of the temporaries of a compiled training step of ResNet-20 in float32; nothing is executed."""
    net = linen_nets.build(Config(net="resnet20", norm=norm), 10)
    images = jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    variables = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, True), images)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(params, batch_stats, momenta, images, labels):
        def loss(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updates = net.apply(variables, images, True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        (value, updates), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        changes, momenta = optimizer.update(gradients, momenta, params)
        return optax.apply_updates(params, changes), updates.get("batch_stats", {}), momenta, value

    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    arguments = params, batch_stats, jax.eval_shape(optimizer.init, params), images, labels
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other compilers lay out memory in other ways")
@pytest.mark.slow
def test_a_training_step_of_resnet20_needs_no_more_memory_than_without_a_norm():
    assert temporaries("batch") <= 1.02 * temporaries("none")
