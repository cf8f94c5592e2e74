"""The conclusions of the study ensemble, on made-up runs; and the networks of a run as an ensemble."""

import math
import types
from pathlib import Path

import numpy as np
import pytest

from experiments.config import Config
from experiments.studies import ensemble
from experiments.studies.ensemble import NETS, fit, plot, runs, score_together, summary, table
from experiments.training import loop
from experiments.training.progress import Display


@pytest.fixture
def made_up(make_run):
    """Returns a function of the gains of six nets over one, which are right in 40 %, that gives results."""

    def make(seeds=(0, 1), **gains):
        def run(config):
            made = make_run(config)
            made["measured"] = [{"net": k, "loss": 1.0, "accuracy": 0.35 + 0.02 * k} for k in range(NETS)]
            final = 0.4 + gains[config.norm]
            made["measured"] += [{"nets": k, "loss": 0.9, "accuracy": final} for k in range(1, NETS + 1)]
            return made

        return {label: [run(c.replace(seed=seed)) for seed in seeds] for label, c in runs("small").items()}

    return make


@pytest.mark.parametrize("none", [0.03, 0.06, 0.065])
def test_share_of_errors_that_is_not_a_point_smaller_with_batch_norm_shows_the_claim(made_up, none):
    fields = summary(made_up(batch=0.06, none=none))
    assert fields["verdict"] == "holds"
    assert (fields["batch"], fields["batch_single"]) == ("46.0 ± 0.0", "40.0 ± 0.0")
    assert fields["batch_share"] == "10.0 ± 0.0 % fewer"


def test_share_a_point_smaller_than_without_shows_the_claim_in_part(made_up):
    fields = summary(made_up(batch=0.06, none=0.12))
    assert (fields["verdict"], fields["claims"]) == ("partly", "(1) holds, (2) is not shown")
    assert fields["more"] == "10.0 ± 0.0 points smaller"


def test_less_than_a_twentieth_of_the_errors_shows_the_claim_in_part(made_up):
    assert summary(made_up(batch=0.02, none=0.0))["claims"] == "(2) holds, (1) is not shown"


def test_more_errors_together_do_not_show_the_claim(made_up):
    fields = summary(made_up(batch=-0.03, none=0.06))
    assert fields["verdict"] == "fails" and fields["batch_share"] == "5.0 ± 0.0 % more"


def test_nets_without_errors_have_none_removed(made_up):
    (run, *_) = made_up(batch=0.6, none=0.0)["batch"]
    for entry in run["measured"]:
        entry["accuracy"] = 1.0
    assert ensemble.share(run) == 0


def test_single_seed_gives_no_verdict_and_no_spread(made_up):
    fields = summary(made_up(seeds=(0,), batch=0.05, none=0.0))
    assert fields["verdict"] == "unknown"
    assert not any("±" in text or "nan" in text for text in fields.values())


def test_table_and_figure_survive_nets_that_diverged(made_up):
    results = made_up(batch=0.05, none=0.0)
    for entry in results["none"][0]["measured"]:
        entry["loss"] = math.nan
    assert not any("nan" in text for line in table(results, "small") for text in line.values())
    assert plot(results)


@pytest.mark.slow
def test_nets_together_average_their_probabilities():
    probabilities = np.array([[[0.6, 0.4, 0.0001]], [[0.1, 0.5, 0.4001]]], np.float32)
    found = score_together(np.log(probabilities) + 3, np.array([1]))
    assert [entry.get("net", entry.get("nets")) for entry in found] == [0, 1, 1, 2]
    assert [entry["accuracy"] for entry in found] == [0, 1, 0, 1]
    assert found[-1]["loss"] == pytest.approx(-math.log(0.45), abs=1e-3)


@pytest.fixture
def six(monkeypatch, tiny, blobs, make_run):
    """Returns a function that fits six made-up nets, of which some diverge; the configs and folders they came with."""
    nets = []

    def one(config, dataset, *, checkpoint_dir, on_progress, diverging=()):
        nets.append((config, checkpoint_dir))
        diverged = len(nets) - 1 in diverging
        run = make_run(config, accuracies=(0.1,) if diverged else (0.2, 0.4), diverged=diverged)
        for row in run["rows"]:
            if on_progress:
                on_progress(loop.Progress(row["step"], 20, 1.0, row))
        return loop.Trained(run["rows"], {"params": len(nets)}, float(len(nets)))

    def run(config: Config = tiny, checkpoint_dir=None, on_progress=None, **options):
        monkeypatch.setattr(loop, "fit", one)
        logits = np.zeros((620, 4), np.float32)
        monkeypatch.setattr(ensemble.evaluation, "predict", lambda net, variables, images: logits)
        return fit(config, blobs, checkpoint_dir=checkpoint_dir, on_progress=on_progress, **options), nets

    return run


@pytest.mark.slow
def test_nets_of_all_seeds_are_different(six, tiny):
    for seed in range(3):
        _, nets = six(tiny.replace(seed=seed))
    assert len({config.seed for config, _ in nets}) == 3 * NETS


@pytest.mark.slow
def test_every_net_has_checkpoints_of_its_own(six):
    assert [folder for _, folder in six()[1]] == [None] * NETS
    _, nets = six(checkpoint_dir=Path("run"))
    assert [folder for _, folder in nets[NETS:]] == [Path("run") / f"net{k}" for k in range(NETS)]


@pytest.mark.slow
def test_rows_are_those_of_the_first_net_and_seconds_those_of_all(six, monkeypatch):
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: 0.0))  # measuring takes no time
    trained, _ = six()
    assert trained.variables == {"params": 1} and len(trained.rows) == 2
    assert trained.seconds == sum(range(1, NETS + 1))
    assert [entry["nets"] for entry in trained.measured if "nets" in entry] == list(range(1, NETS + 1))


@pytest.mark.parametrize("diverging", [(), (1,), (5,)], ids="diverging {}".format)
def test_six_nets_are_shown_as_one_run_that_ends_once(six, diverging, capsys, monkeypatch):
    monkeypatch.setattr(ensemble, "score_together", lambda *_: [])
    told = []
    with Display(1) as display:
        shown = display.run("six nets")
        six(on_progress=lambda progress: told.append(progress) or shown(progress), diverging=diverging)
        assert display._done == 1
    assert {progress.steps for progress in told} == {20 * NETS}
    assert [progress.step for progress in told] == sorted({progress.step for progress in told})
    assert [p.row["epoch"] for p in told][-1] == (2 * NETS if 5 not in diverging else 2 * NETS - 1)
    assert ("DIVERGED" in capsys.readouterr().out) == (5 in diverging)


@pytest.mark.slow
def test_interrupted_run_continues_with_the_net_it_was_at(tiny, blobs, tmp_path, monkeypatch):
    monkeypatch.setattr(ensemble, "NETS", 2)
    whole = fit(tiny, blobs)
    seen = []

    def interrupt(progress):
        seen.append(progress.step)
        if progress.row is not None and progress.step == 12:  # of the second net's first epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tiny, blobs, checkpoint_dir=tmp_path / "run", on_progress=interrupt)
    trained = fit(tiny, blobs, checkpoint_dir=tmp_path / "run", on_progress=lambda progress: seen.append(progress.step))
    assert trained.measured == whole.measured
    assert seen.count(4) == 1 and seen[-1] == 16
