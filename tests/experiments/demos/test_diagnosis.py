"""The command that diagnoses a checkpoint: how runs keep one, what is printed, and what is refused."""

import io

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.config import Config
from experiments.data import datasets
from experiments.demos import diagnosis
from experiments.evidence import files
from experiments.nets import linen as linen_nets
from experiments.processes import distributed
from experiments.training import checkpoints, evaluation, loop, programs, runs
from jaxbn.diagnose import diagnose
from tests.experiments.conftest import mesh_of
from tests.experiments.test_cli import call
from tests.experiments.training.conftest import Small, compile_small

# The settings of the Config `tiny`.
SETTINGS = (
    "--data digits --image-size 8 --net cnn7 --width 0.25 --batch-size 16 --epochs 2 --learning-rate 0.05".split()
)


def save(folder, config, devices=1):
    """Saves a checkpoint of made-up arrays."""
    state = {name: {"layer": np.arange(3.0)} for name in ("params", "batch_stats", "optimizer")}
    with checkpoints.Checkpoints(folder, config) as kept:
        kept.save(1, distributed.replicate(state, mesh_of(devices)), {"rows": []})


@pytest.fixture(autouse=True)
def small_net(monkeypatch):
    """Replaces the network by one with a single convolution, which compiles quickly."""
    monkeypatch.setattr(linen_nets, "build", lambda config, num_classes: Small(num_classes, config.norm))
    monkeypatch.setattr(programs, "_compile", compile_small)


@pytest.fixture
def checkpoint(tmp_path, tiny, blobs, monkeypatch):
    """The folder of checkpoints that a finished run leaves."""
    monkeypatch.setattr(runs, "_load", lambda *_: blobs)
    runs.train_missing([("run", files.Place(tmp_path / "r.jsonl"), tiny)], data_dir=None, keep_checkpoints=True)
    return runs.kept_checkpoints(files.Place(tmp_path / "r.jsonl"))


@pytest.fixture
def printed(checkpoint, blobs, monkeypatch):
    """A function that diagnoses the run on a console and returns the printed text."""
    monkeypatch.setattr(datasets, "load", lambda *_, **__: blobs)

    def on(**options):
        console = Console(file=io.StringIO(), width=100, **options)
        diagnosis.run(checkpoint, console=console)
        return console.file.getvalue()

    return on


def test_kept_checkpoint_holds_the_config_and_the_trained_net(checkpoint, tiny, blobs):
    config, variables = checkpoints.load(checkpoint)
    assert config == tiny
    jax.tree.map(np.testing.assert_array_equal, variables, dict(loop.fit(tiny, blobs).variables))


def test_checkpoint_of_several_devices_is_loaded_on_one(tmp_path, tiny):
    save(tmp_path, tiny, devices=2)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(checkpoints.load(tmp_path)[1]))


def test_diagnosis_shows_training_and_test_images_in_batches_of_the_run(printed):
    text = printed()
    assert "cnn7 on 4 batches of 16 training images of blobs" in text
    assert "cnn7 on 20 batches of 16 test images of blobs" in text
    assert text.count("ConvNorm_0/BatchNorm_0") >= 2 and "averages not converged" in text  # after eight steps


def test_on_a_terminal_the_table_is_drawn_and_the_findings_are_the_same(printed):
    plain, drawn = printed(), printed(force_terminal=True, color_system=None)
    assert "┃" in drawn and "┃" not in plain
    assert max(map(len, drawn.splitlines())) <= 100
    findings = [line for line in plain.splitlines() if "Evidence" in line]
    assert len(findings) == drawn.count("Evidence: ") > 0


def test_command_trains_keeps_the_checkpoint_and_diagnoses_it(monkeypatch, capsys, tmp_path, blobs):
    monkeypatch.setattr(runs, "_load", lambda *_: blobs)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: blobs)
    assert call(monkeypatch, "train", *SETTINGS, "--out", tmp_path, "--keep-checkpoint") == 0
    assert f"Checkpoint: {tmp_path / 'result.checkpoint'}" in capsys.readouterr().out
    assert call(monkeypatch, "diagnose", tmp_path / "result.checkpoint") == 0
    assert "cnn7 on 20 batches of 16 test images of blobs" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.checkpoint", "result.jsonl"]


def test_command_has_help(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, "diagnose", "--help")
    assert exit.value.code == 0 and "train --keep-checkpoint" in capsys.readouterr().out


def test_run_that_finished_without_keeping_its_checkpoint_is_told_so(monkeypatch, capsys, tmp_path, tiny, make_run):
    run = make_run(tiny)
    files.write(tmp_path / "result.jsonl", run["header"], run["rows"])
    assert call(monkeypatch, "train", *SETTINGS, "--out", tmp_path, "--keep-checkpoint") == 0
    assert "Checkpoint: none; the run finished without --keep-checkpoint" in capsys.readouterr().out


def test_checkpoint_of_a_run_that_was_killed_before_it_was_put_away_is_kept(checkpoint, tiny):
    path = checkpoint.with_suffix(".jsonl")
    checkpoint.rename(path.with_suffix(".unfinished"))
    runs.train_missing([("r", files.Place(path), tiny)], data_dir=None, keep_checkpoints=True)
    assert checkpoints.load(checkpoint)[0] == tiny


def test_folder_without_a_checkpoint_is_refused_with_how_to_get_one(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "nowhere", ".", "/"):
        assert call(monkeypatch, "diagnose", folder) == 2
        assert f"{folder} holds no checkpoint; pass the folder that `train --keep-checkpoint`" in (
            capsys.readouterr().err
        )


def test_paths_next_to_a_checkpoint_are_refused_with_its_path(checkpoint):
    step = next(path for path in checkpoint.iterdir() if path.name.isdigit())
    for wrong_path in (step, checkpoint.with_suffix(".jsonl")):
        with pytest.raises(ValueError, match=f"{wrong_path} holds no checkpoint; .*; there is one in {checkpoint}.$"):
            checkpoints.load(wrong_path)


def test_net_without_batch_norm_is_refused(tmp_path, tiny):
    save(tmp_path, tiny.replace(norm="none"))
    with pytest.raises(ValueError, match="was trained with norm='none' and has no batch norm"):
        diagnosis.run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["cnn7", "resnet20"])
def test_nets_of_the_studies_have_no_findings(net, monkeypatch):
    monkeypatch.undo()  # of `small_net`: the real networks
    config = Config(data="digits", image_size=8, net=net, width=0.5, batch_size=32, epochs=4, lr_decay_epochs=20)
    digits = datasets.load("digits", image_size=8)
    variables = loop.fit(config, digits, mesh=mesh_of(1)).variables
    for images in (digits.train_images, digits.test_images):
        batches = diagnosis.first_batches(images, config.batch_size)
        network = linen_nets.build(config, len(digits.class_names))
        assert diagnose(network, variables, batches, call=evaluation.call).findings == []
