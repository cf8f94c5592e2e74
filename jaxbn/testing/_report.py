"""The laws put to an implementation, and the report of it."""

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
HOLDS, BROKEN, NOT_DECLARED = "holds", "broken", "not declared"
WIDTH = 200  # of an exception, in a report


class Finding(NamedTuple):
    """What was found of a law.

    Attributes:
      law: its name.
      outcome: "holds", "broken" or "not declared".
      detail: where it is broken, what was seen: quantity, case, error and tolerance, or an exception; else empty.
    """

    law: str
    outcome: str
    detail: str


class Report(NamedTuple):
    """What was found of an implementation; ``print`` shows a line for each law.

    Attributes:
      name: of the adapter.
      findings: one for each law, in the order of the laws.
    """

    name: str
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        """Findings of the laws that are broken."""
        return tuple(finding for finding in self.findings if finding.outcome == BROKEN)

    def __str__(self) -> str:
        """Returns a line for each law, and their number."""
        outcomes = [finding.outcome for finding in self.findings]
        counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in (HOLDS, BROKEN, NOT_DECLARED))
        return "\n".join([f"{self.name}: {_number_of_laws(outcomes)}: {counts}", *_lines(self.findings)])


def laws_for(adapter: Adapter) -> tuple[Law, ...]:
    """Returns the laws that apply to an implementation, for a test case each.

    With pytest, ``@pytest.mark.parametrize("law", laws_for(adapter), ids=lambda law: law.name)`` makes the cases, and
    ``check_batch_norm(adapter, [law])`` is the test.

    >>> from jaxbn.testing import Adapter, laws_for
    >>> functions = 5 * [lambda *arguments: None]  # what they do does not matter here
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
      Laws about what the adapter declares, such as masks only where it takes masks.
    """
    return tuple(law for law in LAWS if law.applies(adapter))


def judge(adapter: Adapter, laws: Sequence[Law | str] | Law | str = LAWS) -> Report:
    """Puts an implementation to the laws, and reports; whatever it does is a finding, not an error.

    >>> from jaxbn.testing import Adapter, judge
    >>> affine = Adapter(  # y = scale * x + bias is no batch norm, but obeys some laws of one
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
      laws: laws, or their names; a single one may stand alone.

    Returns:
      A finding for each law.

    Raises:
      ValueError: for a name that no law has; the message lists those that are close.
    """
    several = [laws] if isinstance(laws, (Law, str)) else laws  # a law is a tuple, and a name has letters
    chosen = [_named(law) if isinstance(law, str) else law for law in several]
    return Report(adapter.name, tuple(_judge(adapter, law) for law in chosen))


def check_batch_norm(adapter: Adapter, laws: Sequence[Law | str] | Law | str = LAWS) -> Report:
    """Puts an implementation to the laws, and fails where one is broken: the whole test of a batch norm.

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
      laws: laws, or their names; a single one may stand alone.

    Returns:
      A finding for each law; none is broken.

    Raises:
      AssertionError: if a law is broken; the message has a line for each that is.
      ValueError: for a name that no law has; the message lists those that are close.
    """
    report = judge(adapter, laws)
    if report.broken:
        asked = [finding for finding in report.findings if finding.outcome != NOT_DECLARED]
        said = f"{adapter.name} breaks {len(report.broken)} of {_number_of_laws(asked)} of batch norm:"
        raise AssertionError("\n".join([said, *_lines(report.broken)]))
    return report


def _judge(adapter, law):
    if not law.applies(adapter):
        return Finding(law.name, NOT_DECLARED, "")
    try:
        law.check(adapter)
    except AssertionError as error:
        return Finding(law.name, BROKEN, _first_line(error))
    except Exception as error:  # of the implementation: whatever it raises, the law does not hold
        return Finding(law.name, BROKEN, f"{type(error).__name__}: {_first_line(error)}".removesuffix(": "))
    return Finding(law.name, HOLDS, "")


def _named(name):
    names = [law.name for law in LAWS]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise ValueError(f"{name!r} is not a law; did you mean {' or '.join(close)}? LAWS has them all.")
    return LAWS[names.index(name)]


def _number_of_laws(laws):
    return f"{len(laws)} law{'s' * (len(laws) != 1)}"


def _first_line(error):
    return textwrap.shorten(next(iter(str(error).strip().splitlines()), ""), WIDTH, placeholder=" ...")


def _lines(findings):
    names, outcomes = ([finding[i] for finding in findings] for i in range(2))
    wide, less_wide = (max(map(len, column), default=0) for column in (names, outcomes))
    return [f"{law:{wide}}  {outcome:{less_wide}}  {detail}".rstrip() for law, outcome, detail in findings]
