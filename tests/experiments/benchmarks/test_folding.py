"""The benchmark of folding: every batch norm is folded, and the logits stay the same."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import Settings, folding
from experiments.benchmarks.__main__ import main
from experiments.evidence import files

BATCH_NORMS = {"ResNet-20": 19, "Inception": 9 * 6}
APIS = ("linen", "nnx")


@pytest.fixture(scope="module", params=APIS)
def narrow(request):
    """The comparison of a narrow residual network on images of 8x8."""
    images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3))
    jax.config.update("jax_disable_most_optimizations", True)  # compiles several times faster
    try:
        return folding.compare("ResNet-20", request.param, width=1 / 8, images=images, rounds=1)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
def test_every_batch_norm_is_folded(narrow):
    assert (narrow.norms, narrow.folded) == (BATCH_NORMS["ResNet-20"],) * 2


@pytest.mark.slow
def test_folding_changes_logits_by_rounding_alone(narrow):
    assert 0 < narrow.difference <= 1e-5


@pytest.mark.slow
def test_times_before_and_after_are_measured(narrow):
    assert min(narrow.before, narrow.after) > 0
    assert narrow.ratio["median"] == narrow.after / narrow.before  # of a single round


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("net", BATCH_NORMS)
def test_folding_a_network_of_full_width_changes_its_logits_by_rounding_alone(net, api):
    images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3))
    folded = folding.compare(net, api, width=1.0, images=images, rounds=1)
    assert folded.norms == folded.folded == BATCH_NORMS[net]
    assert 0 < folded.difference <= 1e-5


def test_parameters_of_the_networks_are_not_those_of_a_new_network():
    shapes = {name: jax.ShapeDtypeStruct((8,), jnp.float32) for name in ("scale", "bias")}
    params = folding._random({"norm": shapes})["norm"]
    assert np.std(params["scale"]) > 0.1 and np.std(params["bias"]) > 0.1


def test_file_has_a_record_for_each_network_and_api(monkeypatch, tmp_path):
    calls = []
    folded = {"norms": 19, "folded": 18, "difference": 1.23e-7, "before": 0.5, "after": 0.4}
    folded |= {"ratio": {"median": 0.8, "lower": 0.7, "upper": 0.9}}

    def compare(net, api, *, width, images, rounds):
        calls.append((net, api, width, images.shape, rounds))
        return folding.Folded(**folded)

    monkeypatch.setattr(folding, "compare", compare)
    settings = Settings(folding_batch_size=2, inception_width=0.125, folding_rounds=3)
    main("folding", str(tmp_path), json.dumps(settings.to_json()))
    widths = {"ResNet-20": 1.0, "Inception": 0.125}
    assert calls == [(net, api, widths[net], (2, 32, 32, 3), 3) for net in BATCH_NORMS for api in APIS]
    run = files.read_records(tmp_path / "folding.jsonl")
    assert run["header"]["settings"] == {"batch_size": 2, "image_size": 32, "widths": widths, "rounds": 3}
    assert run["records"] == [
        {"net": net, "api": api, "width": widths[net], **folded} for net in BATCH_NORMS for api in APIS
    ]
    assert folding.block(run).count("| 19 | 18 | 1e-7 | 0.80 (0.70 to 0.90) |") == 4
