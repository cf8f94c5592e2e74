"""The training loop: its rows, its schedule, and that an interruption leaves no trace."""

import functools
import math
import time

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from experiments.data import augmentation
from experiments.nets import linen as linen_nets
from experiments.nets.blocks import Block, ConvNorm
from experiments.processes import distributed
from experiments.training import loop, orders, programs
from experiments.training.checkpoints import Checkpoints
from experiments.training.loop import fit
from tests.experiments.conftest import mesh_of


class Small(nn.Module):
    """One convolution: what the loop does is the same for all nets, and this one compiles quickly.

    It is smooth: where sums are rounded otherwise, a ReLU at 0 may open or close, and runs part by more than rounding.
    """

    num_classes: int
    norm: str

    @nn.compact
    def __call__(self, x, train, mask=None):
        x = nn.silu(ConvNorm(4, 3, Block(self.norm), activate=False)(x, train, mask))
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


compile_small = functools.lru_cache(programs._compile.__wrapped__)  # kept apart from the programs of the true nets


@pytest.fixture
def small_net(monkeypatch):
    """Trains `Small` instead of the net of the config."""
    monkeypatch.setattr(linen_nets, "build", lambda config, num_classes: Small(num_classes, config.norm))
    monkeypatch.setattr(programs, "_compile", compile_small)


class Stop(Exception):
    """Ends a run as an interruption would."""


def without_seconds(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def stop_at(step):
    def on_progress(progress):
        if progress.step >= step:
            raise Stop

    return on_progress


def test_learning_rate_follows_the_published_schedule(tiny):
    config = tiny.replace(learning_rate=0.01, lr_decay_epochs=10, epochs=30)
    rates = [loop.learning_rate(config, epoch) for epoch in range(30)]
    np.testing.assert_allclose(rates, [0.01] * 9 + [1e-3] * 10 + [1e-4] * 10 + [1e-5], rtol=1e-12)


def test_update_scaled_by_the_rate_is_that_of_sgd_at_the_rate():
    rates = (0.1, 0.1, 0.01, 0.01)
    gradients = jax.random.normal(jax.random.key(0), (len(rates), 5))
    ours, theirs = programs.optimizer(), optax.sgd(lambda step: np.take(rates, step), 0.9)
    x = y = np.ones(5, np.float32)
    our_state, their_state = ours.init(x), theirs.init(y)
    for rate, gradient in zip(rates, gradients, strict=True):
        update, our_state = ours.update(gradient, our_state)
        x = x + rate * update
        update, their_state = theirs.update(gradient, their_state)
        y = y + update
    np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.slow
def test_training_is_sgd_at_the_scheduled_rate_over_the_order_of_each_epoch(tiny, blobs, small_net):
    config = tiny.replace(augment=False, lr_decay_epochs=2, batch_size=18)
    net, n = linen_nets.build(config, 4), config.batch_size
    init_key, order_key, _ = jax.random.split(jax.random.key(config.seed), 3)
    quickly = functools.partial(jax.jit, compiler_options=programs.INIT_OPTIONS)
    variables = quickly(functools.partial(net.init, train=False))(init_key, blobs.train_images[:1] / np.float32(255))
    params, batch_stats = variables["params"], variables["batch_stats"]
    sgd = optax.sgd(optax.piecewise_constant_schedule(0.05, {4: 0.1}), 0.9)
    optimizer = sgd.init(params)

    @quickly
    def step(params, batch_stats, optimizer, x, labels):
        def loss_of(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = net.apply(variables, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated["batch_stats"]

        gradients, batch_stats_new = jax.grad(loss_of, has_aux=True)(params)
        updates, optimizer = sgd.update(gradients, optimizer)
        return optax.apply_updates(params, updates), batch_stats_new, optimizer

    for epoch in range(2):
        order = np.array(orders.shuffled(blobs.train_labels, order_key, epoch))
        for batch in np.split(order, range(n, len(order), n)):  # the last one is smaller
            x, labels = blobs.train_images[batch] / np.float32(255), blobs.train_labels[batch]
            params, batch_stats, optimizer = step(params, batch_stats, optimizer, x, labels)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, fit(config, blobs).variables, {"params": params, "batch_stats": batch_stats})


@pytest.mark.parametrize(("name", "flip"), [("cifar10", True), ("digits", False)])
def test_images_are_mirrored_in_training_where_that_keeps_their_class(tiny, monkeypatch, name, flip):
    flips = []

    def augment(key, images, *, flip):
        flips.append(flip)
        raise Stop

    monkeypatch.setattr(augmentation, "augment", augment)
    with pytest.raises(Stop):
        programs.compile_programs(tiny.replace(data=name), 4, (71, 8, 8, 1), (9, 8, 8, 1), distributed.mesh())
    assert flips == [flip]


@pytest.mark.slow
def test_there_is_a_row_at_every_evaluation(tiny, blobs):
    rows = fit(tiny.replace(evaluations=2), blobs).rows
    assert [(row["step"], row["epoch"]) for row in rows] == [(2, 0.5), (4, 1.0), (6, 1.5), (8, 2.0)]


def test_training_learns(tiny, blobs):
    rows = fit(tiny.replace(epochs=6), blobs).rows
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 2


@pytest.mark.slow
def test_every_test_image_counts_once(tiny, blobs):
    trained = fit(tiny, blobs)
    logits = linen_nets.build(tiny, 4).apply(trained.variables, blobs.test_images / np.float32(255), train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, blobs.test_labels)
    correct = np.sum(logits.argmax(-1) == blobs.test_labels)
    measured = trained.rows[-1]["test_loss"], trained.rows[-1]["test_accuracy"]
    np.testing.assert_allclose(measured, (losses.mean(), correct / len(blobs.test_labels)), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "images"), [(16, [16, 16, 16, 16]), (18, [18, 18, 18, 10])])
def test_training_metrics_are_means_over_the_images_since_the_last_row(tiny, blobs, small_net, batch_size, images):
    coarse, fine = (fit(tiny.replace(batch_size=batch_size, evaluations=n), blobs).rows for n in (1, 4))
    for name in ("train_loss", "train_accuracy"):
        means = np.average(np.reshape([row[name] for row in fine], (2, 4)), axis=1, weights=images)
        np.testing.assert_allclose([row[name] for row in coarse], means, rtol=1e-6)


@pytest.mark.slow
def test_every_training_image_counts_once_per_epoch(tiny, blobs, small_net, monkeypatch):
    monkeypatch.setattr(loop, "learning_rate", lambda *_: 0.0)
    config = tiny.replace(norm="none", augment=False, batch_size=18, epochs=1)
    (row,), variables = fit(config, blobs)[:2]
    logits = linen_nets.build(config, 4).apply(variables, blobs.train_images / np.float32(255), train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, blobs.train_labels)
    expected = losses.mean(), np.mean(logits.argmax(-1) == blobs.train_labels)
    np.testing.assert_allclose((row["train_loss"], row["train_accuracy"]), expected, rtol=1e-5)


def test_evaluating_more_often_does_not_change_the_training(tiny, blobs):
    assert_same_bits(fit(tiny, blobs).variables, fit(tiny.replace(evaluations=4), blobs).variables)


def test_same_seed_gives_same_bits(tiny, blobs):
    assert_same_bits(fit(tiny, blobs).variables, fit(tiny, blobs).variables)


def test_other_seed_gives_another_run(tiny, blobs):
    assert fit(tiny, blobs).rows[-1]["train_loss"] != fit(tiny.replace(seed=1), blobs).rows[-1]["train_loss"]


def test_runs_with_other_rates_and_seeds_share_their_programs(tiny):
    shapes = (4, (64, 8, 8, 1), (620, 8, 8, 1), distributed.mesh())
    first = programs.compile_programs(tiny, *shapes)
    assert programs.compile_programs(tiny.replace(seed=3, learning_rate=1.0, epochs=9), *shapes) is first


def assert_same_curve(rows, others):
    # Sums of float32 are rounded otherwise, by 1e-7, and that adds up; an image between two classes may change sides.
    tolerances = {"train_loss": (1e-5, 0), "test_loss": (1e-5, 0), "train_accuracy": (0, 1 / 64)}
    for name, (rtol, atol) in tolerances.items():
        pair = ([row[name] for row in each] for each in (rows, others))
        np.testing.assert_allclose(*pair, rtol=rtol, atol=atol)


@pytest.mark.slow
def test_number_of_devices_does_not_change_the_learning_curve(tiny, blobs, small_net):
    config = tiny.replace(batch_size=18)  # 8 divides neither 18, nor the 10 of the last batch, nor 500
    one, eight = (fit(config, blobs, mesh=mesh_of(n)) for n in (1, 8))
    assert_same_curve(eight.rows, one.rows)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, eight.variables, one.variables)


@pytest.mark.slow
def test_batch_is_split_over_the_devices_and_all_else_is_whole(tiny, blobs, small_net):
    trained = fit(tiny.replace(epochs=1), blobs, mesh=mesh_of(8))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(trained.variables))
    shapes = (4, blobs.train_images.shape, blobs.test_images.shape, mesh_of(8))
    text = programs.compile_programs(tiny, *shapes).train.as_text()
    assert "f32[2,8,8,1]" in text and "f32[16,8,8,1]" not in text
    assert "all-reduce(" in text and "all-gather(" not in text


@pytest.mark.slow
def test_run_continues_on_another_number_of_devices(tmp_path, tiny, blobs, small_net):
    straight = fit(tiny, blobs)
    with pytest.raises(Stop):
        fit(tiny, blobs, checkpoint_dir=tmp_path, on_progress=stop_at(8), mesh=mesh_of(8))
    resumed = fit(tiny, blobs, checkpoint_dir=tmp_path)
    assert_same_curve(resumed.rows, straight.rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stops", "checkpoint_steps"),
    [pytest.param((4,), 500, id="at a row"), pytest.param((2, 6), 1, id="twice"), pytest.param((7,), 3, id="later")],
)
def test_interruption_leaves_no_trace_in_rows_and_variables(tmp_path, tiny, blobs, stops, checkpoint_steps):
    config = tiny.replace(evaluations=2)
    straight = fit(config, blobs)
    keep = {"checkpoint_dir": tmp_path, "checkpoint_steps": checkpoint_steps}
    for stop in stops:
        with pytest.raises(Stop):
            fit(config, blobs, on_progress=stop_at(stop), **keep)
    resumed = fit(config, blobs, **keep)
    assert without_seconds(resumed.rows) == without_seconds(straight.rows)
    assert_same_bits(resumed.variables, straight.variables)


def test_continued_run_does_not_repeat_finished_steps(tmp_path, tiny, blobs, monkeypatch):
    compile_programs, taken = loop.compile_programs, []

    def counting(*args):
        compiled = compile_programs(*args)

        def train(state, *rest):
            taken.append(state.step)
            return compiled.train(state, *rest)

        return compiled._replace(train=train, train_last=train)

    monkeypatch.setattr(loop, "compile_programs", counting)
    with pytest.raises(Stop):
        fit(tiny, blobs, checkpoint_dir=tmp_path, checkpoint_steps=3, on_progress=stop_at(8))
    assert len(taken) == 8
    taken.clear()
    fit(tiny, blobs, checkpoint_dir=tmp_path)
    assert len(taken) == 2  # the newest checkpoint is that of step 6


def test_continued_run_reports_the_rows_it_already_has(tmp_path, tiny, blobs):
    rows, again = fit(tiny, blobs, checkpoint_dir=tmp_path).rows, []
    fit(tiny, blobs, checkpoint_dir=tmp_path, on_progress=again.append)
    assert [(progress.step, progress.row) for progress in again] == [(8, rows[-1])]


@pytest.mark.slow
def test_half_written_checkpoint_is_passed_over(tmp_path, tiny, blobs):
    straight = fit(tiny, blobs)
    with pytest.raises(Stop):
        fit(tiny, blobs, checkpoint_dir=tmp_path, on_progress=stop_at(8))
    (tmp_path / "6.orbax-checkpoint-tmp").mkdir()
    resumed = fit(tiny, blobs, checkpoint_dir=tmp_path)
    assert without_seconds(resumed.rows) == without_seconds(straight.rows)


def test_checkpoint_holds_the_rows_of_its_step_though_it_is_written_while_the_run_goes_on(tmp_path, tiny, monkeypatch):
    written, rows = [], [{"step": 1}]
    with Checkpoints(tmp_path, tiny) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", lambda step, args: written.append(args.progress.item))
        checkpoints.save(1, {"x": np.zeros(2)}, {"rows": rows})
    rows.append({"step": 2})
    assert written[0]["progress"] == {"rows": [{"step": 1}]}


def test_checkpoint_of_another_config_is_refused(tmp_path, tiny, blobs):
    fit(tiny, blobs, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"another run: learning_rate was 0\.05 and is now 0\.5.*delete that folder"):
        fit(tiny.replace(learning_rate=0.5), blobs, checkpoint_dir=tmp_path)


def test_divergence_ends_the_run_with_a_row_that_says_so(tiny, blobs):
    rows = fit(tiny.replace(learning_rate=1e38, epochs=4), blobs).rows
    assert [row["diverged"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert rows[-1]["epoch"] < 4


def test_test_loss_that_is_not_finite_ends_the_run_too(tiny, blobs, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda *_: (math.inf, 0.25))
    (row,) = fit(tiny, blobs).rows
    assert row["diverged"] and math.isfinite(row["train_loss"])


def test_diverged_run_is_not_continued(tmp_path, tiny, blobs):
    config = tiny.replace(learning_rate=1e38, epochs=4)
    first, again = (fit(config, blobs, checkpoint_dir=tmp_path).rows for _ in range(2))
    assert len(again) == len(first)


def test_only_the_first_row_holds_compilation(tiny, blobs):
    first, second = fit(tiny, blobs).rows
    assert first["compile_seconds"] > 0 and second["compile_seconds"] == 0


def test_batch_larger_than_the_data_set_is_refused(tiny, blobs):
    with pytest.raises(ValueError, match="batch_size=65 is larger than the 64 training images of blobs.*lower it"):
        fit(tiny.replace(batch_size=65), blobs)


def test_more_evaluations_than_steps_are_refused(tiny, blobs):
    with pytest.raises(ValueError, match="evaluations=5 per epoch, but an epoch has only 4 steps"):
        fit(tiny.replace(evaluations=5), blobs)


def test_last_batch_that_groups_do_not_divide_is_refused(tiny, blobs):
    config = tiny.replace(norm="ghost", group_size=8, batch_size=24)
    fewer = blobs._replace(train_images=blobs.train_images[:60], train_labels=blobs.train_labels[:60])
    with pytest.raises(ValueError, match="group_size=8 does not divide the last batch .* of 12 images; .* to 48"):
        fit(config, fewer)


def test_noise_on_devices_that_do_not_divide_the_batch_is_refused(tiny, blobs):
    with pytest.raises(ValueError, match=r"dropout=0.5 with batches of 16 .* on 3 devices, which do not divide"):
        fit(tiny.replace(dropout=0.5), blobs, mesh=mesh_of(3))


def test_start_is_wanted_where_the_config_names_one_and_nowhere_else(tiny, blobs):
    for config, start in ((tiny, {}), (tiny.replace(start=tiny), None)):
        with pytest.raises(ValueError, match="a run that starts from another one wants the variables"):
            fit(config, blobs, start=start)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"noise": "matched", "group_size": 8, "dropout": 0.5},
        {"noise": "shifting"},
        {"sampling": "half_the_classes"},
        {"norm": "none", "deep_supervision": True},
    ],
    ids=str,
)
def test_interruption_leaves_no_trace_in_runs_of_the_studies(tmp_path, tiny, blobs, changes):
    config = tiny.replace(**changes)

    def probe(state, learning_rate):
        return {"step_of_state": int(state.step), "rate": learning_rate}

    straight = fit(config, blobs, probe=probe)
    with pytest.raises(Stop):
        fit(config, blobs, probe=probe, checkpoint_dir=tmp_path, checkpoint_steps=3, on_progress=stop_at(5))
    resumed = fit(config, blobs, probe=probe, checkpoint_dir=tmp_path)
    assert without_seconds(resumed.rows) == without_seconds(straight.rows)
    assert [row["step_of_state"] for row in resumed.rows] == [4, 8]
    assert_same_bits(resumed.variables, straight.variables)


@pytest.mark.slow
def test_run_that_starts_from_another_continues_with_the_same_bits(tmp_path, tiny, blobs):
    start = fit(tiny, blobs).variables
    config = tiny.replace(start=tiny, tuning="affine", seed=1)
    straight = fit(config, blobs, start=start)
    with pytest.raises(Stop):
        fit(config, blobs, start=start, checkpoint_dir=tmp_path, checkpoint_steps=3, on_progress=stop_at(5))
    assert_same_bits(fit(config, blobs, start=start, checkpoint_dir=tmp_path).variables, straight.variables)


def test_measuring_is_added_to_the_seconds_of_a_run():
    run = loop.Trained([], {"params": {"w": jax.numpy.ones(3)}}, seconds=10.0)
    measured = run.measure(lambda variables: time.sleep(0.01) or [{"sum": variables["params"]["w"].sum()}])
    assert measured.measured == [{"sum": 3.0}]
    assert 10.01 <= measured.seconds < 11
