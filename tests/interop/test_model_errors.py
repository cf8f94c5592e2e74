"""Models that do not fit are refused with one error that lists all misfits."""

import numpy as np
import pytest

from jaxbn import interop
from tests.interop.comparisons import refused, without
from tests.interop.nets import SMALL, Small, small


def convert(state_dict=None, variables=None, names=None, **options):
    ours, entries = small()
    return interop.from_torch(
        entries if state_dict is None else state_dict,
        ours if variables is None else variables,
        SMALL if names is None else names,
        **options,
    )


MISFITS = {
    "an entry is missing": (
        lambda: convert(without(small()[1], "norm.running_var")),
        "'norm': a batch norm in PyTorch must have running_mean, running_var and may have weight, bias, "
        "num_batches_tracked, got weight, bias, running_mean, num_batches_tracked; "
        "pass only what belongs to this layer, by these names.",
    ),
    "an entry is left over": (
        lambda: convert(small()[1] | {"fc.weight_g": np.ones(2)}),
        "'fc': a dense layer in PyTorch must have weight and may have bias, got weight, bias, weight_g;",
    ),
    "a layer is left over": (
        lambda: convert(small()[1] | {"head.weight": np.ones((2, 2))}),
        "'head' with head.weight: it is not in names; add it with its path in Flax, or remove it from the weights if "
        "it is, for example, a buffer that the Flax model does not have.",
    ),
    "buffers are left over": (
        lambda: convert(small()[1] | {"mean": np.ones(3), "std": np.ones(3)}),
        "'' with mean, std: it is not in names; add it with its path in Flax, or remove it from the weights",
    ),
    "the entries have a prefix": (
        lambda: convert({f"module.{name}": array for name, array in small()[1].items()}),
        "'module.': DistributedDataParallel and torch.compile add this prefix; remove it from the entries.",
    ),
    "a layer is transposed": (
        lambda: convert(
            {"weight": np.ones((2, 2, 3))},
            {"params": {"ConvTranspose_0": {"kernel": np.ones((3, 2, 2))}}},
            {"": "ConvTranspose_0"},
        ),
        "'': its path 'ConvTranspose_0' is that of a transposed convolution, which its weights do not show; "
        "pass layouts={'': conv_transpose_layout()}.",
    ),
    "a layer in a block is transposed": (
        lambda: interop.to_keras(
            {"params": {"Block_0": {"ConvTranspose_1": {"kernel": np.ones((3, 2, 2))}}}},
            {"up": "Block_0/ConvTranspose_1"},
        ),
        "'up': its path 'Block_0/ConvTranspose_1' is that of a transposed convolution",
    ),
    "a layout is a function": (
        lambda: convert(layouts={"fc": interop.dense_layout}),
        "'fc': layouts must have a Layout for it, got a function; call the function, as in dense_layout().",
    ),
    "running statistics are not tracked": (
        lambda: convert(without(small()[1], "norm.running_mean", "norm.running_var", "norm.num_batches_tracked")),
        "'norm': its weights are {'params/bias': (4,), 'params/scale': (4,)} in Flax, but the layer there has "
        "{'batch_stats/mean': (4,), 'batch_stats/var': (4,), 'params/bias': (4,), 'params/scale': (4,)}; these weights "
        "have no statistics, as with track_running_stats=False: remove those of this layer from variables, and use",
    ),
    "a model is no state_dict": (
        lambda: interop.from_torch(Small(), *small()),
        "state_dict must be a mapping, got a Small; pass model.state_dict().",
    ),
    "a checkpoint is no state_dict": (
        lambda: convert({"state_dict": small()[1], "epoch": 3}),
        "state_dict['state_dict'] is itself a mapping; of a checkpoint, pass the state_dict in it.",
    ),
    "weights of Keras are no mapping": (
        lambda: interop.from_keras([np.ones((4, 2))], small()[0], SMALL),
        "weights must be a mapping, got a list; pass {layer.name: layer.weights for layer in model.layers if layer.we",
    ),
    "names are a list": (
        lambda: convert(names=["conv"]),
        "names must be a mapping, got a list; pass names and paths, such as {'layer1.0.conv1': 'Block_0/Conv_0'}.",
    ),
    "a layer of Flax is left over": (
        lambda: convert(without(small()[1], "fc.weight", "fc.bias"), names=without(SMALL, "fc")),
        "'Dense_0' in Flax: no name has this path; add it to names.",
    ),
    "a name has no entries": (
        lambda: convert(without(small()[1], "fc.weight", "fc.bias")),
        "'fc': it is in names, but has no weights; remove it, or add them.",
    ),
    "a path leads nowhere": (
        lambda: convert(names=SMALL | {"fc": "Dense_1"}),
        "'fc': names has the path 'Dense_1', but the Flax model has no layer there; correct it.",
    ),
    "a path is named twice": (
        lambda: convert(names=SMALL | {"again": "Dense_0"}),
        "'Dense_0' in Flax: several names have this path; keep one.",
    ),
    "a layout has no name": (
        lambda: convert(layouts={"fd": interop.dense_layout()}),
        "'fd': it is in layouts, but not in names.",
    ),
    "a bias is missing": (
        lambda: convert(without(small()[1], "fc.bias")),
        "'fc': its weights are {'params/kernel': (4, 2)} in Flax, but the layer there has {'params/bias': (2,), "
        "'params/kernel': (4, 2)}; give both layers the same settings, or pass the layout of this one in layouts.",
    ),
    "a shape is another": (
        lambda: convert(small()[1] | {"conv.weight": np.ones((4, 3, 5))}),
        "'conv': its weights are {'params/bias': (4,), 'params/kernel': (5, 3, 4)} in Flax, but the layer there has "
        "{'params/bias': (4,), 'params/kernel': (3, 3, 4)}; give both layers the same settings, or pass the layout of",
    ),
    "a layer is of no known kind": (
        lambda: convert(variables={"params": {"Embed_0": {"embedding": np.ones((2, 3))}}}, names={"conv": "Embed_0"}),
        "'conv': its variables in Flax, params/embedding, are not those of a norm, convolution or dense layer; "
        "pass its layout in layouts, or remove it from both models.",
    ),
    "the collections are missing": (
        lambda: convert(variables=small()[0]["params"]),
        "variables must have only the collections 'params' and 'batch_stats', got ['BatchNorm_0', 'Conv_0', 'Dense_0'] "
        "too; pass {'params': ..., 'batch_stats': ...}.",
    ),
    "a layer of Flax is not of its layout": (
        lambda: interop.to_torch(small()[0], SMALL, layouts={"fc": interop.conv_layout()}),
        "'fc': the kernel of a convolution must have 3 or 4 or 5 axes, got the shape (4, 2); "
        "use the layout of the layer that it comes from.",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_models_that_do_not_fit_are_refused_if(case):
    call, message = MISFITS[case]
    with refused(message):
        call()


def test_everything_that_does_not_fit_is_said_at_once():
    with pytest.raises(ValueError) as error:
        convert(
            without(small()[1], "norm.running_var") | {"head.weight": np.ones((2, 2)), "fc.weight": np.ones((3, 4))}
        )
    first, *problems = str(error.value).splitlines()
    assert first == "the models do not fit, so nothing is converted:"
    assert [problem.split(":")[0] for problem in problems] == ["  'head' with head.weight", "  'norm'", "  'fc'"]
