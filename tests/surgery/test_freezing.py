"""Frozen batch norms stay as they are in training."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxbn import surgery
from tests.surgery.nets import NETS, PATHS, X, assert_equal, operated, output


@pytest.mark.parametrize("framework", NETS)
def test_frozen_statistics_stay_in_training_and_others_move(framework):
    net, variables = NETS[framework]()
    before = nnx.state(net, nnx.BatchStat) if variables is None else variables["batch_stats"]
    done = surgery.freeze(net, variables, X, layers=PATHS[framework][0])

    def stays(net, variables):
        _, after = output(net, variables, train=True)
        return [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]

    assert stays(net, variables) == [False, False, False, False]
    assert stays(done.model, done.variables) == [True, True, False, False]


@pytest.mark.parametrize("framework", NETS)
def test_a_frozen_model_computes_the_same_in_training_and_evaluation(framework):
    *_, frozen = operated(framework, "freeze")
    training, evaluation = (output(frozen.model, frozen.variables, train)[0] for train in (True, False))
    np.testing.assert_array_equal(training, evaluation)


@pytest.mark.slow
@pytest.mark.parametrize("framework", NETS)
def test_freezing_is_undone(framework):
    net, variables = NETS[framework]()
    frozen = surgery.freeze(net, variables, X)
    free = surgery.replace(frozen.model, frozen.variables, X, frozen=False)
    ours = surgery.replace(net, variables, X)
    for train in (True, False):
        assert_equal(output(free.model, free.variables, train), output(ours.model, ours.variables, train))
