"""The command that folds whole nets: every batch norm goes, the logits stay, and the file says so."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import __main__ as cli
from experiments.benchmarks import folding
from experiments.evidence import files

pytestmark = pytest.mark.slow

BATCH_NORMS = {"ResNet-20": 19, "Inception": 9 * 6}
APIS = ("linen", "nnx")


@pytest.fixture(scope="module", params=APIS)
def narrow(request):
    """What became of a narrow residual net, for images of 8x8."""
    images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3))
    jax.config.update("jax_disable_most_optimizations", True)  # compiles several times faster
    try:
        return folding.measure("ResNet-20", request.param, width=1 / 8, images=images, rounds=1)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def test_every_batch_norm_is_folded(narrow):
    assert (narrow.norms, narrow.folded) == (BATCH_NORMS["ResNet-20"],) * 2


def test_folding_changes_logits_by_rounding_alone(narrow):
    assert 0 < narrow.difference <= 1e-5


def test_times_before_and_after_are_measured(narrow):
    assert min(narrow.before, narrow.after) > 0
    assert narrow.ratio["median"] == narrow.after / narrow.before  # of a single round


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("net", BATCH_NORMS)
def test_folding_a_net_of_full_width_changes_its_logits_by_rounding_alone(net, api):
    images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3))
    found = folding.measure(net, api, width=1.0, images=images, rounds=1)
    assert found.norms == found.folded == BATCH_NORMS[net]
    assert 0 < found.difference <= 1e-5


def test_parameters_of_the_nets_are_not_those_of_a_new_net():
    shapes = {name: jax.ShapeDtypeStruct((8,), jnp.float32) for name in ("scale", "bias")}
    found = folding._random({"norm": shapes})["norm"]
    assert np.std(found["scale"]) > 0.1 and np.std(found["bias"]) > 0.1


def test_command_writes_a_record_for_each_net_and_api_and_prints_them(monkeypatch, capsys, tmp_path):
    asked = []
    same = {"norms": 19, "folded": 18, "difference": 1.23e-7, "before": 0.5, "after": 0.4}
    same |= {"ratio": {"median": 0.8, "lower": 0.7, "upper": 0.9}}

    def measure(net, api, *, width, images, rounds):
        asked.append((net, api, width, images.shape, rounds))
        return folding.Folded(**same)

    monkeypatch.setattr(folding, "measure", measure)
    command = f"experiments folding --batch-size 2 --inception-width 0.125 --rounds 3 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", command.split())
    assert cli.main() == 0
    widths = {"ResNet-20": 1.0, "Inception": 0.125}
    assert asked == [(net, api, widths[net], (2, 32, 32, 3), 3) for net in BATCH_NORMS for api in APIS]
    found = files.read_records(tmp_path / "folding.jsonl")
    assert found["header"]["settings"] == {"batch_size": 2, "image_size": 32, "widths": widths, "rounds": 3}
    assert found["records"] == [
        {"net": net, "api": api, "width": widths[net], **same} for net in BATCH_NORMS for api in APIS
    ]
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " at width " in line]
    assert [line[-7:] for line in lines] == 4 * ["19 18 1e-7 0.80 (0.70 to 0.90)".split()]
