"""What a report shows, and the errors for broken laws and unknown names."""

import pytest

from jaxbn.testing import LAWS, Law, check_batch_norm, judge
from tests.testing.adapters import FLAX, FUNCTION

NAMES = [law.name for law in LAWS]


def holds(adapter):
    del adapter


def broken(adapter):
    raise AssertionError(f"y of {adapter.name}: error 2, allowed 1\nand more")


def crashes(adapter):
    raise TypeError("no such thing")


THREE = [
    Law("first", "It holds.", lambda adapter: True, holds),
    Law("the_second", "It is broken.", lambda adapter: True, broken),
    Law("third", "It does not apply.", lambda adapter: False, broken),
    Law("fourth", "It raises.", lambda adapter: True, crashes),
]


def test_a_report_has_a_line_for_each_law():
    assert str(judge(FUNCTION, THREE)).splitlines() == [
        "function: 4 laws: 1 holds, 2 broken, 1 not declared",
        "first       holds",
        "the_second  broken        y of function: error 2, allowed 1",
        "third       not declared",
        "fourth      broken        TypeError: no such thing",
    ]


def test_a_report_of_no_laws_has_only_its_first_line():
    assert str(judge(FUNCTION, [])) == "function: 0 laws: 0 holds, 0 broken, 0 not declared"


def test_a_broken_law_fails_the_check_with_a_line_for_it():
    with pytest.raises(AssertionError) as raised:
        check_batch_norm(FUNCTION, THREE)
    assert str(raised.value).splitlines() == [
        "function breaks 2 of 3 laws of batch norm:",
        "the_second  broken  y of function: error 2, allowed 1",
        "fourth      broken  TypeError: no such thing",
    ]


@pytest.mark.parametrize("law", ["running_average_converges", LAWS[NAMES.index("running_average_converges")]], ids=type)
def test_a_single_law_is_accepted_without_a_sequence(law):
    report = check_batch_norm(FUNCTION, law)
    assert str(report).splitlines() == [
        "function: 1 law: 1 holds, 0 broken, 0 not declared",
        "running_average_converges  holds",
    ]


def test_a_single_broken_law_is_counted_in_the_singular():
    with pytest.raises(AssertionError, match="function breaks 1 of 1 law of batch norm:"):
        check_batch_norm(FUNCTION, THREE[1])


def test_a_check_that_passes_returns_its_report():
    report = check_batch_norm(FUNCTION, [THREE[0], THREE[2]])
    assert report.broken == ()
    assert [finding.law for finding in report.findings] == ["first", "third"]


def test_a_broken_law_says_quantity_case_error_and_tolerance():
    (finding,) = judge(FLAX, ["large_means"]).findings
    assert finding.detail.startswith("y of shape (48, 4) at mean/std 1000: error 0.")
    assert "allowed 0.02 (got " in finding.detail


def test_an_unknown_name_is_an_error_that_suggests_similar_ones():
    with pytest.raises(ValueError, match="'large_mean' is not a law; did you mean large_means"):
        judge(FUNCTION, ["large_mean"])


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_a_law_is_one_sentence(law):
    assert law.name.isidentifier()
    assert law.statement.endswith(".") and "\n" not in law.statement
