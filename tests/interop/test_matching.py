"""Layers of two models are matched without their names, or refused if they could be matched in two ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxbn import interop

RNG = np.random.default_rng(0)


class Block(nn.Module):
    """A basic block of a ResNet, with the shortcut called last."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), self.strides, padding=1, use_bias=False)(x)))
        y = norm()(nn.Conv(self.features, (3, 3), padding=1, use_bias=False)(y))
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), self.strides, use_bias=False, name="conv_proj")(x)
            x = norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A narrow ResNet-18, or its first stages, with the names of Flax's ImageNet example."""

    stages: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (7, 7), 2, padding=3, use_bias=False, name="conv_init")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage in range(self.stages):
            for block in range(2):
                x = Block(8 * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def torchvision_names(stages):
    """From the names of torchvision's ResNet-18 to those of ResNet above, written out by their pattern."""
    names = {"conv1": "conv_init", "bn1": "bn_init", "fc": "Dense_0"}
    for stage in range(stages):
        for block in range(2):
            source, target = f"layer{stage + 1}.{block}", f"Block_{2 * stage + block}"
            for number in range(2):
                names[f"{source}.conv{number + 1}"] = f"{target}/Conv_{number}"
                names[f"{source}.bn{number + 1}"] = f"{target}/BatchNorm_{number}"
            if stage and not block:
                names |= {f"{source}.downsample.0": f"{target}/conv_proj"}
                names |= {f"{source}.downsample.1": f"{target}/norm_proj"}
    return names


@functools.cache
def resnet(stages=2):
    """Returns a model, its variables, random ones, and these as a state dict in torchvision's order."""
    net, names = ResNet(stages), torchvision_names(stages)
    variables = net.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    random = jax.tree.map(lambda leaf: RNG.uniform(0.5, 1.5, leaf.shape).astype(np.float32), variables)
    order = list(names)
    order.remove("fc")
    sides = interop.to_torch(random, names)
    # PyTorch registers the shortcut last in a block, and the classifier last.
    state_dict = {key: sides[key] for name in [*order, "fc"] for key in sides if key.rpartition(".")[0] == name}
    return net, variables, random, state_dict


def test_a_resnet_of_torchvision_is_converted_without_naming_its_layers():
    net, variables, random, state_dict = resnet()
    matches = interop.match_torch(state_dict, variables)
    assert matches.names == torchvision_names(2)
    converted = interop.from_torch(state_dict, variables)
    jax.tree.map(np.testing.assert_array_equal, converted, {**random})
    table = str(matches).splitlines()
    assert table[0].split() == ["layer", "path", "in", "Flax", "matched", "by", "arrays"]
    assert len(table) == 1 + len(torchvision_names(2))
    assert any(line.split()[:3] == ["fc", "Dense_0", "only"] for line in table)


def test_variables_in_the_order_of_the_alphabet_are_no_evidence():
    _, variables, _, state_dict = resnet()
    shapes = jax.eval_shape(lambda: variables)
    with pytest.raises(
        ValueError, match="leave more than one reading, so nothing is matched; pass the right pairs as na"
    ):
        interop.match_torch(state_dict, shapes)


def test_given_pairs_settle_what_is_open():
    state_dict = {f"{name}.weight": np.full((4, 4), value) for value, name in enumerate(["query", "key"])}
    variables = {"params": {name: {"kernel": np.ones((4, 4))} for name in ("first", "second")}}
    variables = jax.tree.map(lambda leaf: leaf, variables)
    with pytest.raises(ValueError, match="more than one reading"):
        interop.match_torch(state_dict, variables)
    matches = interop.match_torch(state_dict, variables, names={"query": "second"})
    assert matches.names == {"query": "second", "key": "first"}
    assert [layer.how for layer in matches.layers] == ["given", "only one"]
    converted = interop.from_torch(state_dict, variables, matches.names)
    np.testing.assert_array_equal(converted["params"]["second"]["kernel"], 0)


@pytest.mark.parametrize("names", [{"nothing": "first"}, {"query": "nothing"}])
def test_given_pairs_must_exist(names):
    state_dict = {"query.weight": np.ones((4, 4))}
    with pytest.raises(ValueError, match="no layer 'nothing'"):
        interop.match_torch(state_dict, {"params": {"first": {"kernel": np.ones((4, 4))}}}, names=names)


def test_a_layer_without_a_counterpart_is_named_with_its_arrays():
    _, variables, _, state_dict = resnet()
    with pytest.raises(ValueError, match=r"1 more in Flax than in the other model, with arrays .*\(16, 10\).*Dense_0"):
        interop.from_torch({key: value for key, value in state_dict.items() if not key.startswith("fc.")}, variables)
    with pytest.raises(ValueError, match="1 more in the weights than in the other model, with arrays .*'extra'"):
        interop.from_torch(state_dict | {"extra.weight": np.ones((5, 7))}, variables)


def test_numbers_in_names_come_before_order():
    state_dict = {f"conv{number}.weight": np.full((4, 4, 3, 3), number) for number in (1, 2)}
    variables = {"params": {f"conv_{number}": {"kernel": np.ones((3, 3, 4, 4))} for number in (2, 1)}}
    assert interop.match_torch(state_dict, variables).names == {"conv1": "conv_1", "conv2": "conv_2"}


def test_an_order_that_the_numbers_contradict_is_refused():
    state_dict = {f"conv{number}.weight": np.full((4, 4, 3, 3), number) for number in (1, 2)}
    variables = {"params": {f"Conv_{number}": {"kernel": np.ones((3, 3, 4, 4))} for number in (1, 0)}}
    with pytest.raises(ValueError, match="'conv1', 'conv2' could each be any of"):
        interop.match_torch(state_dict, variables)


def test_equal_names_but_for_separators_come_before_order():
    state_dict = {"a.conv1.weight": np.ones((4, 4, 3, 3)), "b.conv1.weight": np.ones((4, 4, 3, 3))}
    variables = {"params": {"b_conv1": {"kernel": np.ones((3, 3, 4, 4))}, "a_conv1": {"kernel": np.ones((3, 3, 4, 4))}}}
    matches = interop.match_torch(state_dict, variables)
    assert matches.names == {"a.conv1": "a_conv1", "b.conv1": "b_conv1"}
    assert {layer.how for layer in matches.layers} == {"same name"}


def test_a_keras_model_is_converted_without_naming_its_layers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
            x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
            return nn.Dense(2)(x.mean((1, 2)))

    variables = Net().init(jax.random.key(0), jnp.ones((1, 8, 8, 4)))
    random = jax.tree.map(lambda leaf: RNG.uniform(0.5, 1.5, leaf.shape).astype(np.float32), variables)
    names = {"conv2d": "Conv_0", "batch_normalization": "BatchNorm_0", "conv2d_1": "Conv_1"}
    names |= {"batch_normalization_1": "BatchNorm_1", "dense": "Dense_0"}
    arrays = interop.to_keras(random, names)
    fields = {"conv2d": ("kernel", "bias"), "dense": ("kernel", "bias")}
    norm = ("gamma", "beta", "moving_mean", "moving_variance")
    weights = {name: dict(zip(fields.get(name.removesuffix("_1"), norm), arrays[name], strict=True)) for name in names}
    assert interop.match_keras(weights, variables).names == names
    jax.tree.map(np.testing.assert_array_equal, interop.from_keras(weights, variables), {**random})


class Twins(nn.Module):
    """A norm, and two layers with the same arrays, which the alphabet puts in another order."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="a_norm")(x)
        return nn.Dense(4, name="down")(nn.Dense(4, name="up")(x))


def twins(*names):
    """Their entries in PyTorch."""
    norm = {f"bn.{name}": np.ones(4) for name in ("weight", "bias", "running_mean", "running_var")}
    return norm | {f"{name}.{part}": np.ones((4,) * n) for name in names for part, n in (("weight", 2), ("bias", 1))}


def test_order_is_that_of_the_calls_also_if_a_norm_comes_first():
    variables = Twins().init(jax.random.key(0), jnp.ones((2, 4)))
    assert [*variables] == ["batch_stats", "params"]  # statistics are made before the parameters
    names = {"bn": "a_norm", "fc1": "up", "fc2": "down"}
    assert interop.match_torch(twins("fc1", "fc2"), variables).names == names


def test_sorted_variables_are_no_evidence_also_if_nothing_crosses():
    variables = Twins().init(jax.random.key(0), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="variables are sorted by name, .*: pass those of model.init itself"):
        interop.match_torch(twins("fc1", "fc2"), jax.tree.map(jnp.asarray, variables))


def test_a_sorted_state_dict_is_no_evidence():
    variables = Twins().init(jax.random.key(0), jnp.ones((2, 4)))
    in_file = dict(sorted(twins("second", "first").items()))
    with pytest.raises(ValueError, match="weights are sorted by name, .*: pass those of state_dict.. itself"):
        interop.match_torch(in_file, variables)


def test_a_layer_that_is_called_earlier_than_it_is_registered_has_all_its_readings():
    # The shortcut last in PyTorch, and first in Flax, where nothing but its place says which layer it is.
    shapes = {"conv1": (8, 8, 1, 1), "conv2": (8, 8, 3, 3), "conv3": (16, 8, 1, 1), "down.0": (16, 8, 1, 1)}
    state_dict = {f"{name}.weight": np.ones(shape) for name, shape in shapes.items()}
    order = ["down.0", "conv1", "conv2", "conv3"]
    kernels = {f"Conv_{i}": {"kernel": np.ones((*shapes[n][2:], *shapes[n][1::-1]))} for i, n in enumerate(order)}
    with pytest.raises(ValueError, match="\n  'conv3', 'down.0' could each be any of 'Conv_0', 'Conv_3'"):
        interop.match_torch(state_dict, {"params": kernels})
    matches = interop.match_torch(state_dict, {"params": kernels}, names={"down.0": "Conv_0"})
    assert matches.names == {name: f"Conv_{i}" for i, name in enumerate(order)}


@pytest.mark.parametrize("blocks", [2, 12])  # the alphabet puts 10 before 2; nnx does not
def test_states_of_nnx_are_sorted_with_any_number_of_blocks(blocks):
    class Net(nnx.Module):
        def __init__(self, rngs):
            pairs = [{name: nnx.Linear(4, 4, rngs=rngs) for name in ("up", "down")} for _ in range(blocks)]
            self.layers = nnx.List([nnx.Dict(**pair) for pair in pairs])

    states = {"params": nnx.state(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param)}
    state_dict = {}
    for number in range(blocks):
        for name in ("fc1", "fc2"):
            state_dict |= {f"{number}.{name}.weight": np.ones((4, 4)), f"{number}.{name}.bias": np.ones(4)}
    with pytest.raises(ValueError, match="more than one reading"):
        interop.match_torch(state_dict, states)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: interop.match_torch(twins("a"), Twins()), "variables must be a mapping, got a Twins"),
        (lambda v: interop.from_torch(twins("a"), v["params"]), "only the collections 'params' and 'batch_stats'"),
        (lambda v: interop.match_keras([np.ones(4)], v), "weights must be a mapping, got a list"),
        (lambda v: interop.match_torch(twins("a") | {"a.weight_g": np.ones(4)}, v), "because of 'a': a dense layer in"),
        (
            lambda v: interop.match_torch(twins("a"), v, layouts={"a": interop.dense_layout}),
            "because of 'a': layouts must have a Layout for it, got a function",
        ),
    ],
)
def test_arguments_of_other_kinds_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call({"params": {"fc": {"kernel": np.ones((4, 4)), "bias": np.ones(4)}}})


@pytest.mark.slow
def test_a_converted_resnet_has_the_outputs_of_pytorchs():
    torch = pytest.importorskip("torch")
    from torch.nn import functional

    net, variables, _, state_dict = resnet(4)
    x = RNG.normal(size=(2, 32, 32, 3)).astype(np.float32)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()}

    def norm(x, name):
        mean, var = (tensors[f"{name}.{part}"] for part in ("running_mean", "running_var"))
        return functional.batch_norm(x, mean, var, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def conv(x, name, **options):
        return functional.conv2d(x, tensors[f"{name}.weight"], **options)

    y = torch.relu(norm(conv(torch.from_numpy(x).permute(0, 3, 1, 2), "conv1", stride=2, padding=3), "bn1"))
    y = functional.max_pool2d(y, 3, 2, 1)
    for stage in range(1, 5):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and not block else 1
            z = torch.relu(norm(conv(y, f"{name}.conv1", stride=stride, padding=1), f"{name}.bn1"))
            z = norm(conv(z, f"{name}.conv2", padding=1), f"{name}.bn2")
            if stride == 2:
                y = norm(conv(y, f"{name}.downsample.0", stride=2), f"{name}.downsample.1")
            y = torch.relu(y + z)
    expected = functional.linear(y.mean((2, 3)), tensors["fc.weight"], tensors["fc.bias"]).numpy()
    found = net.apply(interop.from_torch(state_dict, variables), x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())
