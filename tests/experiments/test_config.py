"""Config refuses values that no run could use, and its default is the published protocol."""

import dataclasses
import json

import pytest

from experiments.config import PRESETS, Config


def test_the_defaults_are_the_published_protocol():
    assert Config() == PRESETS["full"]
    published = dict(net="inception", learning_rate=0.01, lr_decay_epochs=10, batch_size=250, epochs=30, image_size=32)
    assert dataclasses.asdict(Config()).items() >= published.items()


def test_a_config_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1
    assert hash(Config()) == hash(Config())


def test_a_config_is_plain_json():
    nested = Config(classes=(1, 2), start=Config(classes=(3, 4)), tuning="frozen")
    for config in (*PRESETS.values(), nested):
        assert Config.from_json(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_with_seed_also_changes_the_run_that_this_one_starts_from():
    assert Config(start=Config()).with_seed(3) == Config(seed=3, start=Config(seed=3))


def test_replace_changes_only_the_named_fields():
    assert Config().replace(seed=3, norm="none") == Config(seed=3, norm="none")


def test_replace_checks_values_like_a_new_config():
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        Config().replace(epochs=0)


def test_differences_name_the_fields_and_both_values():
    assert Config().differences(Config()) == ""
    small = Config(train_images=1000, epochs=2)
    assert small.differences(Config()) == "`train_images` 1000 instead of all, `epochs` 2 instead of 30"
    started = Config(momentum=1 / 3, start=Config())
    assert (
        started.differences(Config())
        == "`momentum` 0.3333 instead of the published value, `start` another run instead of none"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data="mnist"), "data must be Literal['cifar10', 'digits'], got 'mnist'."),
        (dict(net="vgg"), "net must be Literal['cnn7', 'resnet20', 'inception'], got 'vgg'."),
        (dict(norm="layer"), "norm must be Literal['batch', 'none', 'group', 'ghost', 'renorm'], got 'layer'."),
        (
            dict(sampling="sorted"),
            "sampling must be Literal['shuffled', 'half_the_classes', 'one_class'], got 'sorted'.",
        ),
        (dict(image_size=16.0), "image_size must be int, got 16.0."),
        (dict(batch_size=2.5), "batch_size must be int, got 2.5."),
        (dict(width=True), "width must be float, got True."),
        (dict(width="1"), "width must be float, got '1'."),
        (dict(affine="no"), "affine must be bool, got 'no'."),
        (dict(train_images=1e4), "train_images must be int | None, got 10000.0."),
        (dict(classes=[0, 1]), "classes must be tuple[int, ...] | None, got [0, 1]."),
        (dict(classes=(0, 1.0)), "classes must be tuple[int, ...] | None, got (0, 1.0)."),
        (dict(start="resnet20"), "start must be experiments.config.Config | None, got 'resnet20'."),
        (dict(image_size=24), "image_size must be 8, 16 or 32, got 24."),
        (dict(width=0.0), "width must be positive and finite, got 0.0."),
        (dict(learning_rate=-0.1), "learning_rate must be positive and finite, got -0.1."),
        (dict(learning_rate=float("nan")), "learning_rate must be positive and finite, got nan."),
        (dict(learning_rate=float("inf")), "learning_rate must be positive and finite, got inf."),
        (dict(epsilon=0.0), "epsilon must be positive and finite, got 0.0."),
        (dict(init_scale=0.0), "init_scale must be positive and finite, got 0.0."),
        (dict(lr_decay_epochs=0), "lr_decay_epochs must be at least 1, got 0."),
        (dict(batch_size=0), "batch_size must be at least 1, got 0."),
        (dict(epochs=-1), "epochs must be at least 1, got -1."),
        (dict(evaluations=0), "evaluations must be at least 1, got 0."),
        (dict(train_images=0), "train_images must be at least 1, got 0."),
        (dict(norm="ghost", group_size=0), "group_size must be at least 1, got 0."),
        (dict(seed=-1), "seed must be from 0 to 2**32 - 1, got -1."),
        (dict(classes=(1, 1)), "classes must be at least two different integers from 0, got (1, 1)."),
        (dict(classes=(0, -1)), "classes must be at least two different integers from 0, got (0, -1)."),
        (dict(dropout=1.0), "dropout must be at least 0 and less than 1, got 1.0."),
        (dict(momentum=1.5), "momentum must be from 0 to 1, got 1.5."),
        (
            dict(train_images=100),
            "batch_size must be at most train_images, got 250 and 100; a step needs a whole batch.",
        ),
        (
            dict(noise="matched", norm="group"),
            "noise='matched' must have norm='batch' and tuning='trained', got norm='group' and tuning='trained'.",
        ),
        (dict(norm="ghost"), "group_size must be set for norm='ghost' and noise='matched', got None."),
        (dict(group_size=50), "group_size must be None unless norm='ghost' or noise='matched', got 50."),
        (dict(norm="ghost", group_size=24), "group_size must divide batch_size, got 24 and 250."),
        (
            dict(noise="matched", group_size=250),
            "group_size must be less than batch_size for noise='matched', got 250 for both; "
            "the statistics of a single group have no noise.",
        ),
        (dict(deep_supervision=True), "net must be 'cnn7' for deep_supervision, got 'inception'."),
        (
            dict(placement="after", net="resnet20"),
            "placement must be 'before' for net='resnet20', which adds before it activates, got 'after'.",
        ),
        (
            dict(tuning="frozen"),
            "tuning must be 'trained' unless the run has a start and its norm is a batch norm, got 'frozen'.",
        ),
        (
            dict(start=Config(start=Config())),
            "start must be a run from random weights, got one that has a start itself.",
        ),
        (
            dict(start=Config(), norm_layers="logits"),
            "A run with a start gets one new layer, the last. It must have norm_layers='hidden' and no "
            "deep_supervision, got norm_layers='logits' and deep_supervision=False.",
        ),
        (dict(start=Config(net="cnn7", norm="none")), "start must be a run with the same net and norm."),
        (dict(start=Config(affine=False)), "start must be a run with the same affine."),
        (
            dict(start=Config(data="digits")),
            "start must be a run on color images for data='cifar10', got one on gray digits.",
        ),
        (dict(norm="none", momentum=0.9), "momentum=0.9 has no effect with norm='none'; leave it out."),
        (dict(norm="none", norm_layers="logits"), "norm_layers='logits' has no effect with norm='none'; leave it out."),
        (dict(norm="group", debias=True), "debias=True has no effect with norm='group'; leave it out."),
        (
            dict(norm_layers="logits", placement="after"),
            "placement='after' has no effect with norm_layers='logits'; leave it out.",
        ),
        (
            dict(tuning="frozen", start=Config(), epsilon=1e-3),
            "epsilon=0.001 has no effect with batch norms that are not trained; leave it out.",
        ),
    ],
)
def test_a_value_that_no_run_could_use_is_refused_by_name(changes, message):
    with pytest.raises(ValueError) as error:
        Config(**changes)
    assert str(error.value) == message
