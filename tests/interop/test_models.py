"""Whole models move between PyTorch, Keras and Flax, with their layers by name; and the settings of batch norm do."""

import ast
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxbn import interop
from tests.golden import make_keras
from tests.golden import make_pytorch_training as make_pytorch
from tests.interop.comparisons import assert_same_bits, golden_tree, random, refused, without
from tests.interop.nets import KERAS_LAYOUTS, LAYOUTS, NAMES, SMALL, KerasNet, NNXNet, Small, small

FOLDER = Path(interop.__file__).parent


def test_models_to_pytorch_and_to_keras_and_back_are_the_same_bits():
    x = jnp.ones((2, *make_keras.IMAGE))
    shapes = jax.eval_shape(functools.partial(KerasNet().init, train=False), jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: random(leaf.shape, leaf.dtype, 0), shapes)
    names = {f"net.{name}": name for name in variables["params"] | variables["batch_stats"]}
    layouts = {f"net.{name}": layout for name, layout in KERAS_LAYOUTS.items()}
    entries = interop.to_torch(variables, names, layouts=layouts)
    assert_same_bits(interop.from_torch(entries, variables, names, layouts=layouts), variables)
    weights = interop.to_keras(variables, names, layouts=layouts)
    assert_same_bits(interop.from_keras(weights, variables, names, layouts=layouts), variables)


def test_bfloat16_becomes_float32_and_a_model_keeps_its_dtype():
    variables = {"params": {"kernel": jnp.ones((3, 2), jnp.bfloat16) / 3}}
    entries = interop.to_torch(variables, {"fc": ""})
    assert entries["fc.weight"].dtype == np.float32
    assert_same_bits(interop.from_torch(entries, variables, {"fc": ""}), variables)


def test_a_model_takes_shapes_for_variables_and_gives_arrays():
    variables, entries = small()
    shapes = jax.eval_shape(Small().init, jax.random.key(0), jnp.ones((1, 5, 3)))
    assert_same_bits(interop.from_torch(entries, shapes, SMALL), variables)


def test_a_model_has_the_dtype_of_its_variables():
    variables, entries = small()
    halves = {name: array.astype(np.float16) for name, array in entries.items()}
    converted = interop.from_torch(halves, variables, SMALL)
    assert {leaf.dtype for leaf in jax.tree.leaves(converted)} == {np.dtype(np.float32)}


def test_an_nnx_model_takes_and_gives_its_states():
    model = nnx.eval_shape(NNXNet)
    states = {"params": nnx.state(model, nnx.Param), "batch_stats": nnx.state(model, nnx.BatchStat)}
    entries = golden_tree(make_pytorch.FILE, "float32/0/entries/")
    nnx.update(model, *interop.from_torch(entries, states, NAMES["nnx"], layouts=LAYOUTS).values())
    states = {"params": nnx.state(model, nnx.Param), "batch_stats": nnx.state(model, nnx.BatchStat)}
    found = interop.to_torch(states, NAMES["nnx"], layouts=LAYOUTS)
    found["bn1.num_batches_tracked"] = entries["bn1.num_batches_tracked"]  # a layer with a momentum counts none
    assert_same_bits(found, entries)


@pytest.mark.parametrize("norm", [nn.LayerNorm(), nn.GroupNorm(2)], ids=["layer", "group"])
def test_other_norms_have_a_scale_and_a_bias_alone(norm):
    shapes = jax.eval_shape(norm.init, jax.random.key(0), jnp.ones((1, 4)))
    entries = {"norm.weight": np.arange(4, dtype=np.float32), "norm.bias": np.ones(4, np.float32)}
    variables = interop.from_torch(entries, shapes, {"norm": ""})
    assert_same_bits(variables, {"params": {"scale": entries["norm.weight"], "bias": entries["norm.bias"]}})
    assert_same_bits(interop.to_torch(variables, {"norm": ""}), entries)
    weights = {"norm": list(entries.values())}
    assert_same_bits(interop.from_keras(weights, shapes, {"norm": ""}), variables)
    assert_same_bits(interop.to_keras(variables, {"norm": ""}), weights)


def test_a_model_that_is_one_layer_has_names_without_a_dot():
    entries = {"weight": np.ones((3, 2), np.float32), "bias": np.ones(3, np.float32)}
    variables = {"params": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}}
    assert_same_bits(interop.to_torch(variables, {"": ""}), entries)
    assert_same_bits(interop.from_torch(entries, variables, {"": ""}), variables)


def test_a_layer_is_left_out_by_taking_it_out_of_both():
    variables, entries = small()
    names = without(SMALL, "fc")
    backbone = variables | {"params": without(variables["params"], "Dense_0")}
    converted = interop.from_torch(without(entries, "fc.weight", "fc.bias"), backbone, names)
    assert_same_bits(converted, backbone)


@settings(max_examples=100, deadline=None)
@given(st.decimals("0", "1", places=9).map(float) | st.none(), st.floats(1e-9, 1))
def test_options_to_pytorch_and_back_are_the_same(momentum, epsilon):
    options = interop.batch_norm_options_to_torch(momentum=momentum, epsilon=epsilon)
    expected = {"momentum": momentum, "epsilon": epsilon, "unbiased": True}
    assert interop.batch_norm_options_from_torch(**options) == expected
    assert interop.batch_norm_options_to_torch(**expected) == options


@pytest.mark.parametrize("convert", [interop.batch_norm_options_from_torch, interop.batch_norm_options_to_torch])
@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan")])
def test_options_refuse_a_momentum_that_is_no_weight(convert, momentum):
    with refused(f"momentum must be from 0 to 1, or None, got {momentum}; it is the weight of a value in an average."):
        convert(momentum=momentum)


def test_options_refuse_a_biased_variance_for_pytorch():
    with refused("unbiased must be True, because PyTorch's running variance always is, got False; multiply the"):
        interop.batch_norm_options_to_torch(unbiased=False)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_it_imports_numpy_and_neither_jax_nor_flax(path):
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name for name in names if not name.startswith("jaxbn.interop.")}
    assert others <= {"numpy", *sys.stdlib_module_names, "collections.abc"}
