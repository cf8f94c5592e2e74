"""The benchmark of throughput: `fit` and the plain loop take the same steps, and every arm is timed."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.benchmarks import Settings, throughput
from experiments.benchmarks.__main__ import main
from experiments.config import PRESETS
from experiments.evidence import files
from experiments.nets import linen as linen_nets
from experiments.training import programs

SMALL = PRESETS["small"].replace(image_size=8, train_images=20, batch_size=10, learning_rate=0.1)


def test_plain_epoch_holds_every_image_once():
    images, labels = np.arange(12.0).reshape(12, 1, 1, 1), np.arange(12)
    batches = list(throughput.batches(images, labels, 4, np.random.default_rng(0)))
    assert [len(x) for x, _ in batches] == [4, 4, 4]
    assert sorted(np.concatenate([y for _, y in batches])) == list(range(12))
    for x, y in batches:
        np.testing.assert_array_equal(x.ravel(), y)


def test_plain_augmentation_is_given_every_batch():
    images = np.ones((4, 1, 1, 1))
    batches = throughput.batches(images, np.zeros(4), 2, np.random.default_rng(0), lambda _, x: 3 * x)
    assert all((x == 3).all() for x, _ in batches)


def test_crops_are_the_image_moved_by_up_to_an_eighth_and_half_of_them_mirrored():
    image = 1 + np.arange(16 * 16 * 3, dtype=np.float32).reshape(16, 16, 3)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    crops = [padded[row : row + 16, column : column + 16] for row in range(5) for column in range(5)]
    possible = np.stack(crops + [crop[:, ::-1] for crop in crops])
    augmented = throughput.flip_and_crop(np.random.default_rng(0), np.stack([image] * 1000))
    # Two pixels identify the crop.
    which = (augmented[:, None, 8, 8:10] == possible[None, :, 8, 8:10]).all((-1, -2)).argmax(1)
    np.testing.assert_array_equal(augmented, possible[which])
    assert set(which) == set(range(50)) and 0.45 < np.mean(which >= 25) < 0.55


def test_batch_that_leaves_images_over_is_refused():
    with pytest.raises(ValueError, match="batch_size=8 does not divide the 20 training images.*choose a divisor"):
        throughput.measure(SMALL.replace(batch_size=8), rounds=1)


def record(timed, arm, seconds, over_plain=1.0, images=100):
    spread = {"median": over_plain, "lower": over_plain, "upper": over_plain}
    fields = {"timed": timed, "arm": arm, "images": images, "seconds": seconds, "images_over_plain": spread}
    return fields | {"seconds_over_at_hand": {"median": seconds / 0.0100}}


def test_table_compares_images_per_second_with_the_plain_loop():
    console = Console(width=120, record=True)
    records = [record("step", throughput.FIT, 0.010, 2.0), record("step", throughput.PLAIN, 0.020, 1.0)]
    console.print(throughput.table("", records))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    assert [row for row in rows if row] == [
        [throughput.FIT, "10.0", "10,000", "2.00"],
        [throughput.PLAIN, "20.0", "5,000", "1.00"],
    ]


def test_both_tables_and_the_cost_of_augmentation_are_printed(monkeypatch, capsys, tmp_path):
    def measure(config, rounds):
        assert (config, rounds) == (PRESETS["small"].replace(batch_size=50), 3)
        steps = {throughput.FIT: 0.0103, throughput.FIXED: 0.0100, throughput.PLAIN: 0.0110}
        runs = {throughput.FIT: 1.0, throughput.PLAIN: 1.5}
        return [record("step", *arm) for arm in steps.items()] + [record("run", *arm) for arm in runs.items()]

    monkeypatch.setattr(throughput, "measure", measure)
    settings = Settings(throughput_batch_size=50, rounds=3)
    main("throughput", str(tmp_path), json.dumps(settings.to_json()))
    printed = capsys.readouterr().out
    assert printed.count("images/s / plain") == 2 and "10,000 images" in printed
    assert "Gathering and augmenting the images adds 3.0 % to a step." in printed
    assert len(files.read_records(tmp_path / "throughput.jsonl")["records"]) == 5


def plainly_named(tree):
    """Renames variables of the studies' network to the names of the plain one."""
    renamed = {
        f"{layer[:-2]}_{name[-1]}": leaves
        for name, block in tree.items()
        if name.startswith("ConvNorm_")
        for layer, leaves in block.items()
    }
    return renamed | ({"Dense_0": tree["Dense_0"]} if "Dense_0" in tree else {})


@pytest.mark.slow
def test_plain_loop_takes_the_steps_that_fit_takes():
    net, rng = linen_nets.build(SMALL, throughput.CLASSES), np.random.default_rng(0)
    images = jnp.asarray(rng.random((10, 8, 8, 3)), jnp.float32)
    labels = jnp.arange(10)
    variables = jax.jit(functools.partial(net.init, train=False))(jax.random.key(0), images)
    update = jax.jit(functools.partial(programs.update, net, SMALL, 10))
    plain = throughput.plain_state(SMALL).replace(
        params=plainly_named(variables["params"]), batch_stats=plainly_named(variables["batch_stats"])
    )
    momenta, zero = programs.optimizer().init(variables["params"]), jnp.zeros((), jnp.int32)
    state = programs.State(zero, variables["params"], variables["batch_stats"], momenta, jnp.zeros(()), zero)
    for _ in range(2):
        rate = jnp.float32(SMALL.learning_rate)
        state, _ = update(state, (images, labels, None), jax.random.key(0), rate)
        plain = throughput.plain_step(plain, images, labels)
    ours = (plainly_named(state.params), plainly_named(state.batch_stats))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, (plain.params, plain.batch_stats)
    )


@pytest.mark.slow
def test_every_arm_is_timed(monkeypatch):
    monkeypatch.setattr(throughput, "STEPS", 3)  # more than an epoch has
    records = throughput.measure(SMALL, rounds=1)
    assert [record["timed"] for record in records] == 5 * ["step"] + 2 * ["run"]
    assert all(record["seconds"] > 0 for record in records)
