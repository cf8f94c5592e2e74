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
    for config in PRESETS.values():
        assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_replace_changes_only_what_it_is_told():
    assert Config().replace(seed=3, norm="none") == Config(seed=3, norm="none")


def test_replace_checks_values_like_a_new_config():
    with pytest.raises(ValueError, match="epochs=0"):
        Config().replace(epochs=0)


def test_differences_name_the_fields_and_both_values():
    assert Config().differences(Config()) == ""
    small = Config(train_images=1000, epochs=2)
    assert small.differences(Config()) == "`train_images` 1000 instead of all, `epochs` 2 instead of 30"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data="mnist"), r"data='mnist'; accepted are 'cifar10', 'digits'; choose one"),
        (dict(image_size=24), r"image_size=24; accepted are 8, 16, 32; choose one"),
        (dict(image_size=16.0), r"image_size=16.0; accepted are 8, 16, 32; choose one"),
        (dict(width=True), r"width=True; a finite number above 0 is accepted; choose one"),
        (dict(net="vgg"), r"net='vgg'; accepted are 'cnn7', 'resnet20', 'inception'; choose one"),
        (dict(norm="layer"), r"norm='layer'; accepted are 'batch', 'none', 'group'; choose one"),
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
        (dict(train_images=100), r"batch_size=250 is larger than train_images=100; .*; lower batch_size"),
    ],
)
def test_a_value_that_no_run_could_use_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)
