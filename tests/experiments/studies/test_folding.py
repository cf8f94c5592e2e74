"""The study folding: conclusions from made-up measurements, and the measurement of a network before and after."""

import jax
import numpy as np
import pytest

from experiments.config import Config
from experiments.nets import linen as linen_nets
from experiments.studies import folding
from experiments.studies.folding import compare_folded, plot, runs, summary, table


@pytest.fixture
def made_up(make_run):
    """Returns a function that gives results with two seeds: time, difference and accuracy after folding, by seed."""

    def make(ratios=(0.8, 0.8), difference=1e-7, change=0.0, diverged=()):
        def measured(ratio):
            outputs = {"what": "outputs", "norms": 6, "folded": 6, "difference": difference}
            outputs |= {"accuracy_before": 0.5, "accuracy_after": 0.5 + change}
            times = [
                {"what": "time", "batch": batch, "seconds_before": 0.010, "seconds_after": 0.010 * ratio}
                for batch in (1, 100)
            ]
            return [outputs, *times]

        return {
            net: [
                make_run(config.with_seed(seed), (0.5,), diverged=net in diverged)
                | {"measured": [] if net in diverged else measured(ratio)}
                for seed, ratio in enumerate(ratios)
            ]
            for net, config in runs("small").items()
        }

    return make


def test_faster_with_the_same_outputs_shows_the_claim(made_up):
    assert summary(made_up())["verdict"] == "holds"


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"ratios": (1.0, 1.0)}, "(3)"),
        ({"ratios": (0.8, 0.99)}, "(3)"),
        ({"difference": 2e-5}, "(1)"),
        ({"change": 0.001}, "(2)"),
        ({"change": -0.001}, "(2)"),
    ],
)
def test_part_that_fails_leaves_a_claim_in_part(made_up, changes, lost):
    found = summary(made_up(**changes))
    assert found["verdict"] == "partly" and found["claims"].endswith(f"{lost} is not shown")


def test_slower_with_other_outputs_does_not_show_the_claim(made_up):
    assert summary(made_up(ratios=(1.1, 1.1), difference=1e-3, change=0.01))["verdict"] == "fails"


def test_accuracy_may_change_by_five_images_of_ten_thousand(made_up):
    assert summary(made_up(change=0.0005))["verdict"] == "holds"
    assert summary(made_up(change=0.0006))["verdict"] == "partly"


def test_one_net_that_is_not_faster_fails_the_part(made_up):
    found = made_up()
    found["inception"] = made_up(ratios=(1.0, 1.0))["inception"]
    assert summary(found)["verdict"] == "partly"


def test_finding_quotes_what_was_measured(made_up):
    found = summary(made_up(ratios=(0.7, 0.8), difference=3e-7, change=0.0001))
    assert (found["difference"], found["accuracy"]) == ("3.0e-07", "0.01")
    assert found["counts"].startswith("all 6 (7-layer CNN)")
    assert "ResNet-20 0.75 ± 0.07 (batch 1) and 0.75 ± 0.07 (batch 100)" in found["ratios"]


def test_single_seed_gives_no_verdict(made_up):
    found = summary(made_up(ratios=(0.8,)))
    assert found["verdict"] == "unknown" and not any("±" in text or "nan" in text for text in found.values())


@pytest.mark.parametrize("diverged", [("cnn7",), ("cnn7", "resnet20", "inception")])
def test_nets_that_diverged_are_said_to_be_unmeasured(made_up, diverged):
    found = made_up(diverged=diverged)
    texts = [*summary(found).values(), *(text for line in table(found, "small") for text in line.values())]
    assert any("(not measured)" in text for text in texts) and not any("nan" in text for text in texts)
    assert summary(found)["verdict"] == ("partly" if len(diverged) == 1 else "fails")
    assert plot(found)


def test_table_has_a_line_for_each_net_and_batch(made_up):
    lines = table(made_up(), "small")
    assert [(line["network"], line["batch size"]) for line in lines] == [
        (net, batch) for net in ("7-layer CNN", "ResNet-20", "Inception") for batch in ("1", "100")
    ]
    assert all(
        line["time before, ms"] == "10.00 ± 0.00" and line["time after / before"] == "0.80 ± 0.00" for line in lines
    )


@pytest.mark.slow
def test_net_is_measured_before_and_after(blobs, monkeypatch):
    monkeypatch.setattr(folding, "ROUNDS", 2)
    net = linen_nets.build(Config(net="cnn7", width=0.25), num_classes=4)
    variables = net.init(jax.random.key(0), blobs.test_images[:2] / np.float32(255), train=False)
    # Statistics and biases of a net that has learned nothing would leave nothing to fold.
    variables = jax.tree.map(lambda a: a + np.linspace(0.1, 0.5, a.size).reshape(a.shape), variables)
    outputs, one, hundred = compare_folded(net, variables, blobs)
    assert outputs["norms"] == outputs["folded"] == 6
    assert 0 < outputs["difference"] < 1e-5 and outputs["accuracy_before"] == outputs["accuracy_after"]
    assert (one["batch"], hundred["batch"]) == (1, 100)
    assert min(each[f"seconds_{when}"] for each in (one, hundred) for when in ("before", "after")) > 0


@pytest.mark.slow
def test_diverged_run_is_not_folded(tiny, blobs):
    trained = folding.fit(tiny.replace(norm="none", learning_rate=1e30), blobs)
    assert trained.rows[-1]["diverged"] and not trained.measured
