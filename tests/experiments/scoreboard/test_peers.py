"""The peers: an adapter behaves like its library, and names the package to install if the library is missing."""

import functools
import importlib.util
import sys
import types

import pytest

from experiments.scoreboard import peers
from experiments.scoreboard.peers import LIBRARIES, OURS, PEERS
from jaxbn.testing import LAWS, check_batch_norm, judge

# Laws that every batch norm satisfies; an adapter that transposes, masks or converts wrongly breaks one of them.
SATISFIED = (
    "output_equals_oracle",
    "evaluation_equals_oracle",
    "gradients_equal_oracle",
    "running_statistics_equal_oracle",
    "low_precision",
    "statistics_of_masked_data",
    "split_over_devices",
)
BROKEN = {("equinox", "running_statistics_equal_oracle"), ("equinox", "low_precision")}


@functools.cache
def adapter_of(peer):
    if peer in LIBRARIES and not importlib.util.find_spec(
        peer
    ):  # only the adapter may import Keras, since it sets the backend
        pytest.skip(f"{peer} is not installed")
    return PEERS[peer]()


def forgotten(monkeypatch, peer):
    """Makes the next call import the module of an adapter again; the end of the test restores the present module."""
    monkeypatch.setitem(sys.modules, f"{peers.__name__}.{peer}", None)
    del sys.modules[f"{peers.__name__}.{peer}"]


@pytest.mark.slow
@pytest.mark.parametrize("law", SATISFIED)
@pytest.mark.parametrize("peer", PEERS)
def test_adapter_satisfies_the_laws_of_every_batch_norm(peer, law):
    adapter = adapter_of(peer)
    if (peer, law) in BROKEN:
        assert judge(adapter, [law]).broken
    else:
        check_batch_norm(adapter, [law])


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize("peer", OURS)
def test_this_library_satisfies_every_law(peer, law):
    check_batch_norm(adapter_of(peer), [law])


def test_variance_of_equinox_is_off_by_what_its_average_started_from():
    finding = judge(adapter_of("equinox"), ["running_statistics_equal_oracle"]).findings[0]
    # After one batch: momentum / (1 - momentum) times 1.
    assert finding.detail.startswith("running var after 1 batch") and "error 9," in finding.detail


@pytest.mark.slow
def test_equinox_sums_half_precision_in_half_precision():
    finding = judge(adapter_of("equinox"), ["low_precision"]).findings[0]
    # The gradient in the mean adds up 16,384 values. The quantities that are checked before it are precise enough.
    assert finding.detail.startswith("dx of shape (64, 16, 16, 4) in bfloat16: error ")


def test_keras_takes_no_mask_of_a_single_feature():
    finding = judge(adapter_of("keras"), ["mask_of_one_feature"]).findings[0]
    assert finding.detail.startswith("IndexError: tuple index out of range")


@pytest.mark.parametrize("peer", LIBRARIES)
def test_missing_library_is_an_error_that_names_the_package(monkeypatch, peer):
    forgotten(monkeypatch, peer)
    monkeypatch.setitem(sys.modules, peer, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"{peer} is not installed; install it with pip install 'jaxbn\[peers\]'"
    ):
        PEERS[peer]()


def test_keras_on_another_backend_is_refused(monkeypatch):
    forgotten(monkeypatch, "keras")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    backend = types.SimpleNamespace(backend=lambda: "torch")
    monkeypatch.setitem(sys.modules, "keras", types.SimpleNamespace(backend=backend))
    with pytest.raises(ValueError, match="set KERAS_BACKEND=jax before Keras is first imported"):
        PEERS["keras"]()


def test_an_adapter_is_imported_with_its_library_alone():
    sources = {peer: importlib.util.find_spec(f"{peers.__name__}.{peer}").origin for peer in LIBRARIES}
    for peer, source in sources.items():
        with open(source, encoding="utf-8") as file:
            imported = {line.split()[1].split(".")[0] for line in file if line.startswith(("import ", "from "))}
        assert peer in imported and not imported & set(LIBRARIES) - {peer}
