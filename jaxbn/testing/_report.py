"""Runs laws on an implementation, and reports the results."""

import difflib
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from jaxbn.testing._adapter import Adapter, Law
from jaxbn.testing._laws import devices, invariance, masks, precision, transformations, values

#: All laws, those of values first.
#:
#: :meta hide-value:
LAWS: tuple[Law, ...] = (
    values.output_equals_oracle,
    values.gradients_equal_oracle,
    values.running_statistics_equal_oracle,
    values.evaluation_equals_oracle,
    values.evaluation_equals_training_on_constant_statistics,
    values.running_average_converges,
    invariance.shifting_changes_only_the_mean,
    invariance.scaling_changes_only_the_statistics,
    invariance.permutation_changes_only_the_order,
    invariance.gradient_sums_to_zero,
    invariance.gradient_is_orthogonal_to_the_output,
    invariance.gradient_is_invariant_to_the_scale_of_weights,
    precision.large_means,
    precision.large_means_lose_nothing,
    precision.running_statistics_at_large_means,
    precision.variance_is_never_negative,
    precision.low_precision,
    precision.one_nan_batch,
    transformations.dtypes_are_stable,
    transformations.jit_equals_eager,
    transformations.forward_mode,
    transformations.hessian_vector_products,
    transformations.vmap_over_models,
    transformations.remat_changes_nothing,
    masks.statistics_of_masked_data,
    masks.gradients_of_masked_data,
    masks.mask_of_one_feature,
    masks.nan_in_masked_positions,
    masks.batch_masked_everywhere,
    devices.split_over_devices,
    devices.large_means_over_devices,
    devices.devices_with_unequal_counts,
)
HOLDS = "holds"
BROKEN = "broken"
NOT_DECLARED = "not declared"
WIDTH = 200  # characters of an exception that a report shows


class Outcome(NamedTuple):
    """The outcome of a law.

    Attributes:
      law: name of the law.
      outcome: "holds", "broken" or "not declared".
      detail: how the law is broken: quantity, case, error and tolerance, or an exception; otherwise empty.
    """

    law: str
    outcome: str
    detail: str


class Report(NamedTuple):
    """The outcomes of all laws for an implementation; ``print`` shows one line per law.

    Attributes:
      name: name of the adapter.
      findings: the outcome of each law, in the order of the laws.
    """

    name: str
    findings: tuple[Outcome, ...]

    @property
    def broken(self) -> tuple[Outcome, ...]:
        """The outcomes of the broken laws."""
        return tuple(finding for finding in self.findings if finding.outcome == BROKEN)

    def __str__(self) -> str:
        """Formats a line with the number of laws, and a line for each law."""
        outcomes = [finding.outcome for finding in self.findings]
        counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in (HOLDS, BROKEN, NOT_DECLARED))
        head = f"{self.name}: {_number_of_laws(self.findings)}: {counts}"
        return "\n".join([head, *_lines(self.findings)])


def laws_for(adapter: Adapter) -> tuple[Law, ...]:
    """Returns the laws that apply to an implementation, for example to run each of them as a test case.

    With pytest, ``@pytest.mark.parametrize("law", laws_for(adapter), ids=lambda law: law.name)`` makes the cases, and
    ``check_batch_norm(adapter, law)`` is the test.

    >>> from jaxbn.testing import Adapter, laws_for
    >>> functions = 5 * [lambda *arguments: None]  # never called here
    >>> without, masked = Adapter("mine", *functions), Adapter("mine", *functions, masks=True)
    >>> for law in laws_for(masked)[len(laws_for(without)):]:
    ...     print(law.name)
    statistics_of_masked_data
    gradients_of_masked_data
    mask_of_one_feature
    nan_in_masked_positions
    batch_masked_everywhere

    Args:
      adapter: the implementation.

    Returns:
      The laws about features that the adapter declares; those about masks, for example, only if it takes masks.
    """
    return tuple(law for law in LAWS if law.applies(adapter))


def judge(adapter: Adapter, laws: Sequence[Law | str] | Law | str = LAWS) -> Report:
    """Tests an implementation and returns a report; an exception that it raises counts as a broken law.

    >>> from jaxbn.testing import Adapter, judge
    >>> affine = Adapter(  # y = scale * x + bias, which satisfies some of the laws
    ...     "affine",
    ...     init=lambda x: (jnp.ones(x.shape[-1]), jnp.zeros(x.shape[-1])),
    ...     train=lambda state, x, mask: (jaxbn.affine(x, *state), state),
    ...     evaluate=lambda state, x: jaxbn.affine(x, *state),
    ...     statistics=lambda state: (jnp.zeros_like(state[0]), jnp.ones_like(state[0])),
    ...     with_parameters=lambda state, scale, bias: (scale, bias),
    ... )
    >>> print(judge(affine, ["permutation_changes_only_the_order", "gradient_sums_to_zero"]))
    affine: 2 laws: 1 holds, 1 broken, 0 not declared
    permutation_changes_only_the_order  holds
    gradient_sums_to_zero               broken  sum of dx of shape (48, 4): error ..., allowed ...

    Args:
      adapter: the implementation.
      laws: laws or their names; a sequence or a single one.

    Returns:
      The outcome of each law.

    Raises:
      ValueError: for an unknown name; the message suggests similar ones.
    """
    # A law is a tuple and a name is a string, so both are sequences themselves.
    several = [laws] if isinstance(laws, (Law, str)) else laws
    chosen = [_named(law) if isinstance(law, str) else law for law in several]
    outcomes = tuple(_judge(adapter, law) for law in chosen)
    return Report(adapter.name, outcomes)


def check_batch_norm(adapter: Adapter, laws: Sequence[Law | str] | Law | str = LAWS) -> Report:
    """Tests an implementation, and raises an AssertionError if it breaks a law.

    >>> from jaxbn.testing import Adapter, check_batch_norm
    >>> def init(x):
    ...     features = x.shape[-1]
    ...     return jaxbn.init_stats(features), jnp.ones(features), jnp.zeros(features)
    >>> def train(state, x, mask):
    ...     y, stats = jaxbn.batch_norm(x, *state, use_running_average=False, momentum=0.9, mask=mask)
    ...     return y, (stats, *state[1:])
    >>> adapter = Adapter(
    ...     "jaxbn",
    ...     init,
    ...     train,
    ...     evaluate=lambda state, x: jaxbn.batch_norm(x, *state, use_running_average=True)[0],
    ...     statistics=lambda state: (state[0].mean, state[0].var),
    ...     with_parameters=lambda state, scale, bias: (state[0], scale, bias),
    ...     momentum=0.9,
    ...     masks=True,
    ... )
    >>> print(check_batch_norm(adapter, "running_average_converges"))
    jaxbn: 1 law: 1 holds, 0 broken, 0 not declared
    running_average_converges  holds

    Args:
      adapter: the implementation.
      laws: laws or their names; a sequence or a single one.

    Returns:
      The outcome of each law, none of them broken.

    Raises:
      AssertionError: if a law is broken; the message has a line for each broken law.
      ValueError: for an unknown name; the message suggests similar ones.
    """
    report = judge(adapter, laws)
    if report.broken:
        tested = [outcome for outcome in report.findings if outcome.outcome != NOT_DECLARED]
        head = f"{adapter.name} breaks {len(report.broken)} of {_number_of_laws(tested)} of batch norm:"
        raise AssertionError("\n".join([head, *_lines(report.broken)]))
    return report


def _judge(adapter: Adapter, law: Law) -> Outcome:
    if not law.applies(adapter):
        return Outcome(law.name, NOT_DECLARED, "")
    try:
        law.check(adapter)
    except AssertionError as error:
        return Outcome(law.name, BROKEN, _first_line(error))
    except Exception as error:  # raised by the implementation, which breaks the law
        return Outcome(law.name, BROKEN, f"{type(error).__name__}: {_first_line(error)}".removesuffix(": "))
    return Outcome(law.name, HOLDS, "")


def _named(name: str) -> Law:
    names = [law.name for law in LAWS]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise ValueError(f"{name!r} is not a law; did you mean {' or '.join(close)}? LAWS lists them all.")
    return LAWS[names.index(name)]


def _number_of_laws(laws: Sequence) -> str:
    return f"{len(laws)} law{'s' * (len(laws) != 1)}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], WIDTH, placeholder=" ...") if lines else ""


def _lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Formats outcomes as lines with aligned columns."""
    width_of_law = max((len(outcome.law) for outcome in outcomes), default=0)
    width_of_outcome = max((len(outcome.outcome) for outcome in outcomes), default=0)
    return [
        f"{law:{width_of_law}}  {outcome:{width_of_outcome}}  {detail}".rstrip() for law, outcome, detail in outcomes
    ]
