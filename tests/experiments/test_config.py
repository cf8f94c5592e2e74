"""Config refuses what no run could use, and its presets are what they are said to be."""

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


def test_a_seed_holds_for_the_run_that_another_starts_from_as_well():
    assert Config(start=Config()).with_seed(3) == Config(seed=3, start=Config(seed=3))


def test_replace_changes_only_what_it_is_told():
    assert Config().replace(seed=3, norm="none") == Config(seed=3, norm="none")


def test_replace_checks_values_like_a_new_config():
    with pytest.raises(ValueError, match="epochs=0"):
        Config().replace(epochs=0)


def test_differences_name_the_fields_and_both_values():
    assert Config().differences(Config()) == ""
    small = Config(train_images=1000, epochs=2)
    assert small.differences(Config()) == "`train_images` 1000 instead of all, `epochs` 2 instead of 30"
    started = Config(momentum=1 / 3, start=Config())
    assert (
        started.differences(Config())
        == "`momentum` 0.3333 instead of as published, `start` another run instead of none"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data="mnist"), r"data='mnist'; accepted are 'cifar10', 'digits'; choose one"),
        (dict(image_size=24), r"image_size=24; accepted are 8, 16, 32; choose one"),
        (dict(image_size=16.0), r"image_size=16.0; accepted are 8, 16, 32; choose one"),
        (dict(width=True), r"width=True; a finite number above 0 is accepted; choose one"),
        (dict(net="vgg"), r"net='vgg'; accepted are 'cnn7', 'resnet20', 'inception'; choose one"),
        (dict(norm="layer"), r"norm='layer'; accepted are 'batch', 'none', 'group', 'ghost', 'renorm'; choose one"),
        (dict(width=0.0), r"width=0.0; a finite number above 0 is accepted; choose one"),
        (dict(learning_rate=-0.1), r"learning_rate=-0.1; a finite number above 0 is accepted; choose one"),
        (dict(learning_rate=float("nan")), r"learning_rate=nan; a finite number above 0 is accepted; choose one"),
        (dict(lr_decay_epochs=0), r"lr_decay_epochs=0; a whole number of at least 1 is accepted; choose one"),
        (dict(batch_size=0), r"batch_size=0; a whole number of at least 1 is accepted; choose one"),
        (dict(batch_size=2.5), r"batch_size=2.5; a whole number of at least 1 is accepted; choose one"),
        (dict(epochs=-1), r"epochs=-1; a whole number of at least 1 is accepted; choose one"),
        (dict(evaluations=0), r"evaluations=0; a whole number of at least 1 is accepted; choose one"),
        (dict(train_images=0), r"train_images=0; a whole number of at least 1 is accepted; choose one"),
        (dict(seed=-1), r"seed=-1; a whole number from 0 to 2\*\*32 - 1 is accepted; choose one"),
        (dict(sampling="sorted"), r"sampling='sorted'; accepted are 'shuffled', 'half_the_classes', 'one_class'"),
        (dict(classes=(1, 1)), r"classes=\(1, 1\); at least two different classes are accepted"),
        (dict(dropout=1.0), r"dropout=1.0; a number from 0 up to, not including, 1 is accepted"),
        (dict(momentum=1.5), r"momentum=1.5; a number from 0 to 1 is accepted, or None"),
        (dict(epsilon=0.0), r"epsilon=0.0; a finite number above 0 is accepted"),
        (dict(init_scale=0.0), r"init_scale=0.0; a finite number above 0 is accepted"),
        (dict(noise="matched", norm="group"), r"noise='matched' with norm='group' .*; set norm to 'batch'"),
        (dict(norm="ghost"), r"group_size=None, but ghost batch norm and matched noise have groups; set it"),
        (dict(norm="ghost", group_size=24), r"group_size=24 with .* batch_size=250; .* and divides the batch"),
        (dict(group_size=50), r"group_size=50 with norm='batch', noise='none'"),
        (dict(deep_supervision=True), r"deep_supervision=True with net='inception'; only 'cnn7' has it"),
        (dict(placement="after", net="resnet20"), r"placement='after' with net='resnet20', which adds before"),
        (dict(tuning="frozen"), r"tuning='frozen' with norm='batch' and start=None; .*, or name such a start"),
        (dict(norm="none", momentum=0.9), r"momentum=0.9 with norm='none', .*, where that has no effect; leave it out"),
        (dict(norm="none", norm_layers="logits"), r"norm_layers='logits' with norm='none'"),
        (dict(norm="group", debias=True), r"debias=True with norm='group'"),
        (dict(norm_layers="logits", placement="after"), r"placement='after' with norm='batch'"),
        (dict(tuning="frozen", start=Config(), epsilon=1e-3), r"epsilon=0.001 with norm='batch', tuning='frozen'"),
        (
            dict(noise="matched", group_size=250),
            r"group_size=250 with noise='matched' .*; a single group has no spread",
        ),
        (dict(start=Config(start=Config())), r"start='?a run that has a start itself"),
        (dict(start=Config(data="digits")), r"start is a run on grey images"),
        (dict(affine="no"), r"affine='no'; accepted are True, False"),
        (dict(classes=[0, 1]), r"classes=\[0, 1\]; at least two different classes"),
        (dict(start=Config(net="cnn7", norm="none")), r"start is a run with another net, norm; .*; change either"),
        (dict(train_images=100), r"batch_size=250 is larger than train_images=100; .*; lower batch_size"),
    ],
)
def test_a_value_that_no_run_could_use_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)
