"""A plain batch norm that keeps every law, and mutants of it: each has one part that is wrong, as found in the wild.

`BatchNorm` is written for clarity; it shares no code with jaxbn.  A mutant is a subclass that replaces a part.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import io_callback

from jaxbn.testing import AXIS, Adapter


class BatchNorm:
    """Statistics over all axes but the last, and over the axis of devices if it has a name."""

    epsilon, momentum, unbiased, debiased = 1e-5, 0.9, False, False

    def __init__(self, axis_name=None):
        self.axis_name = axis_name

    def total(self, x):
        """The sum over examples, positions and devices."""
        x = x.sum(tuple(range(x.ndim - 1)))
        return x if self.axis_name is None else lax.psum(x, self.axis_name)

    def count(self, x, admitted):
        return self.total(jnp.broadcast_to(admitted, x.shape).astype(x.dtype))

    def admit(self, x, mask):
        """Admitted positions, and the inputs with zeros elsewhere."""
        admitted = jnp.ones(x.shape, bool) if mask is None else mask
        return admitted, jnp.where(admitted, x, 0)

    def moments(self, x, admitted):
        """The mean in two parts, since one float is too few for large ones, variance and count."""
        count = self.count(x, admitted)
        m = jnp.maximum(count, 1)
        mean = self.total(x) / m
        rest = self.total(jnp.where(admitted, x - mean, 0)) / m
        var = self.total(jnp.where(admitted, x - mean - rest, 0) ** 2) / m
        return mean, rest, var, count

    def rsqrt(self, var):
        return lax.rsqrt(var + self.epsilon)

    def normalize(self, x, mean, rest, var, scale, bias):
        return (x - mean - rest) * self.rsqrt(var) * scale + bias

    def update(self, state, mean, var, count):
        """The state after a batch of these moments."""
        accepted = (count > 0) & jnp.isfinite(mean) & jnp.isfinite(var)
        return state | {
            "mean": self.move(state["mean"], mean, accepted),
            "var": self.move(state["var"], var, accepted),
        }

    def move(self, old, new, accepted):
        return jnp.where(accepted, self.momentum * old + (1 - self.momentum) * new, old).astype(old.dtype)

    # What an adapter asks for

    def init(self, x):
        features = x.shape[-1]
        return {"mean": jnp.zeros(features), "var": jnp.ones(features)} | {
            "scale": jnp.ones(features),
            "bias": jnp.zeros(features),
        }

    def train(self, state, x, mask):
        dtype = x.dtype
        admitted, x = self.admit(self.widen(x), mask)
        mean, rest, var, count = self.moments(x, admitted)
        y = self.normalize(x, mean, rest, var, state["scale"], state["bias"])
        return y.astype(dtype), self.update(state, mean + rest, var, count)

    def widen(self, x):
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def evaluate(self, state, x):
        mean, var = self.statistics(state)
        return self.normalize(self.widen(x), mean, 0, var, state["scale"], state["bias"]).astype(x.dtype)

    def statistics(self, state):
        return state["mean"], state["var"]

    @classmethod
    def adapter(cls):
        return cls()._adapter(over_devices=cls(AXIS)._adapter())

    def _adapter(self, over_devices=None):
        return Adapter(
            name=type(self).__name__,
            init=self.init,
            train=self.train,
            evaluate=self.evaluate,
            statistics=self.statistics,
            with_parameters=lambda state, scale, bias: state | {"scale": scale, "bias": bias},
            epsilon=self.epsilon,
            momentum=self.momentum,
            unbiased=self.unbiased,
            debiased=self.debiased,
            masks=True,
            over_devices=over_devices,
        )


class Unbiased(BatchNorm):
    """The running variance has the factor m/(m - 1)."""

    unbiased = True

    def update(self, state, mean, var, count):
        return super().update(state, mean, var * count / jnp.maximum(count - 1, 1), count)


class Debiased(BatchNorm):
    """Running statistics without their start, by the number of batches."""

    debiased = True

    def init(self, x):
        state = super().init(x)
        return state | {"var": jnp.zeros(x.shape[-1]), "batches": jnp.zeros(x.shape[-1], jnp.int32)}

    def update(self, state, mean, var, count):
        accepted = (count > 0) & jnp.isfinite(mean) & jnp.isfinite(var)
        return super().update(state, mean, var, count) | {"batches": state["batches"] + accepted}

    def statistics(self, state):
        seen = state["batches"]
        correction = jnp.where(seen > 0, 1 - self.momentum**seen, 1)
        return state["mean"] / correction, jnp.where(seen > 0, state["var"] / correction, 1)


# Mutants of the values


class EpsilonOutsideTheRoot(BatchNorm):
    def rsqrt(self, var):
        return 1 / (jnp.sqrt(jnp.maximum(var, 1e-12)) + self.epsilon)


class ScaleAroundOne(BatchNorm):
    def normalize(self, x, mean, rest, var, scale, bias):
        return super().normalize(x, mean, rest, var, 1 + scale, bias)


class VarianceIsConstant(BatchNorm):
    def rsqrt(self, var):
        return super().rsqrt(lax.stop_gradient(var))


class MeanIsConstant(BatchNorm):
    def normalize(self, x, mean, rest, var, scale, bias):
        return super().normalize(x, *lax.stop_gradient((mean, rest)), var, scale, bias)


class BiasLearnsTwiceAsFast(BatchNorm):
    def normalize(self, x, mean, rest, var, scale, bias):
        return super().normalize(x, mean, rest, var, scale, 2 * bias - lax.stop_gradient(bias))


class MomentumOfTheNewValue(BatchNorm):
    def move(self, old, new, accepted):
        return super().move(new, old, accepted)


class UnbiasedUndeclared(Unbiased):
    unbiased = False


class BiasedThoughDeclared(BatchNorm):
    unbiased = True


class DebiasedOneTooMany(Debiased):
    def statistics(self, state):
        return super().statistics(state | {"batches": state["batches"] + 1})


class NotDebiasedThoughDeclared(BatchNorm):
    debiased = True


class AverageOfDeviations(BatchNorm):
    def update(self, state, mean, var, count):
        root = state | {"var": jnp.sqrt(state["var"])}
        after = super().update(root, mean, jnp.sqrt(var), count)
        return after | {"var": after["var"] ** 2}


class EvaluationWithTheBatch(BatchNorm):
    def evaluate(self, state, x):
        return self.train(state, x, None)[0]


class EvaluationWithoutEpsilon(BatchNorm):
    def evaluate(self, state, x):
        return super().evaluate(state | {"var": state["var"] - self.epsilon}, x)


class EvaluationHalvesTheVariance(BatchNorm):
    def evaluate(self, state, x):
        return super().evaluate(state | {"var": state["var"] / 2}, x)


# Mutants of the invariances


class SecondMomentInsteadOfVariance(BatchNorm):
    def moments(self, x, admitted):
        mean, rest, var, count = super().moments(x, admitted)
        return mean, rest, var + (mean + rest) ** 2, count


class VarianceHasAFloor(BatchNorm):
    def rsqrt(self, var):
        return super().rsqrt(jnp.maximum(var, 1e-2))


class VarianceHasACap(BatchNorm):
    def rsqrt(self, var):
        return super().rsqrt(jnp.minimum(var, 1e4))


class GradientOfUnitLength(BatchNorm):
    """The gradient in the inputs is divided by its length, as some optimizers want it."""

    def train(self, state, x, mask):
        @jax.custom_vjp
        def same(x):
            return x

        same.defvjp(lambda x: (x, None), lambda _, dx: (dx / jnp.linalg.norm(dx.ravel()),))
        return super().train(state, same(x), mask)


class HalvesOfTheBatch(BatchNorm):
    def train(self, state, x, mask):
        if mask is not None or len(x) % 2:
            return super().train(state, x, mask)
        first, _ = super().train(state, x[: len(x) // 2], None)
        second, _ = super().train(state, x[len(x) // 2 :], None)
        return jnp.concatenate([first, second]), super().train(state, x, None)[1]


# Mutants of the precision


class FastVariance(BatchNorm):
    clip = staticmethod(lambda var: jnp.maximum(var, 0))

    def moments(self, x, admitted):
        mean, rest, _, count = super().moments(x, admitted)
        var = self.total(x * x) / jnp.maximum(count, 1) - (mean + rest) ** 2
        return mean, rest, self.clip(var), count


class FastVarianceUnclipped(FastVariance):
    clip = staticmethod(lambda var: var)


class FastVarianceInTheAverage(FastVariance):
    def train(self, state, x, mask):
        return BatchNorm(self.axis_name).train(state, x, mask)[0], super().train(state, x, mask)[1]


class MeanInOneFloat(BatchNorm):
    def moments(self, x, admitted):
        mean, rest, var, count = super().moments(x, admitted)
        mean = mean + rest
        var = self.total(jnp.where(admitted, x - mean, 0) ** 2) / jnp.maximum(count, 1)
        return mean, jnp.zeros_like(rest), var, count


def added_one_by_one(x, dtype):
    """The sum over all axes but the last, in a dtype: too large, soon, for the next term to count."""
    rows = x.astype(dtype).reshape(-1, x.shape[-1])
    return lax.scan(lambda total, row: (total + row, None), jnp.zeros_like(rows[0]), rows)[0].astype(x.dtype)


class SumsInHalfPrecision(BatchNorm):
    def train(self, state, x, mask):
        self.narrow = x.dtype
        return super().train(state, x, mask)

    def total(self, x):
        return super().total(x if self.narrow.itemsize >= 4 else added_one_by_one(x, self.narrow)[None])


class SquaresInHalfPrecision(FastVariance):
    def train(self, state, x, mask):
        self.narrow = x.dtype
        return super().train(state, x, mask)

    def moments(self, x, admitted):
        mean, rest, _, count = BatchNorm.moments(self, x, admitted)
        squares = (x.astype(self.narrow) ** 2).astype(x.dtype)
        return mean, rest, self.total(squares) / jnp.maximum(count, 1) - (mean + rest) ** 2, count


class TotalsInHalfPrecision(SumsInHalfPrecision):
    """Adds up the examples' means, rounded to the dtype of the inputs."""

    def total(self, x):
        positions = tuple(range(1, x.ndim - 1))
        return BatchNorm.total(self, x.mean(positions).astype(self.narrow)).astype(x.dtype) * x[0, ..., 0].size


class GradientsAddedInBfloat16(BatchNorm):
    """What is the same for all values of a feature has a gradient that adds up those of the values, in bfloat16."""

    def train(self, state, x, mask):
        self.narrow = x.dtype.itemsize < 4
        return super().train(state, x, mask)

    def normalize(self, x, *of_features):
        return super().normalize(x, *(self.spread(value, x) for value in of_features))

    def spread(self, value, x):
        @jax.custom_vjp
        def f(value):
            return jnp.broadcast_to(value, x.shape)

        dtype = jnp.bfloat16 if self.narrow else x.dtype
        f.defvjp(lambda value: (f(value), None), lambda _, dy: (added_one_by_one(dy, dtype),))
        return f(value)

    def evaluate(self, state, x):
        return BatchNorm().evaluate(state, x)


class EvaluationInBfloat16(BatchNorm):
    def evaluate(self, state, x):
        if x.dtype.itemsize >= 4:
            return super().evaluate(state, x)
        narrow = {name: value.astype(jnp.bfloat16) for name, value in state.items()}
        return self.normalize(x.astype(jnp.bfloat16), narrow["mean"], 0, narrow["var"], narrow["scale"], narrow["bias"])


class TakesAnyBatch(BatchNorm):
    def move(self, old, new, accepted):
        return super().move(old, new, True)


# Mutants under transformations


class StatisticsTakeTheDtypeOfTheInputs(BatchNorm):
    def train(self, state, x, mask):
        y, after = super().train(state, x, mask)
        return y, after | {name: after[name].astype(x.dtype) for name in ("mean", "var")}


class StatisticsDriftInFloat64(BatchNorm):
    def init(self, x):
        return {name: value.astype(jnp.float32) for name, value in super().init(x).items()}

    def move(self, old, new, accepted):
        return jnp.where(accepted, self.momentum * old + (1 - self.momentum) * new, old)


class TakesNoFloat64(BatchNorm):
    def widen(self, x):
        if x.dtype == jnp.float64:
            raise TypeError("float64 is too wide")
        return super().widen(x)


class LooksAtTheValues(BatchNorm):
    def train(self, state, x, mask):
        assert bool(jnp.isfinite(x).all())
        return super().train(state, x, mask)


class OtherwiseUnderJit(BatchNorm):
    def rsqrt(self, var):
        return super().rsqrt(var + (1e-3 if isinstance(var, jax.core.Tracer) else 0))


class ReverseModeOnly(BatchNorm):
    def normalize(self, *arguments):
        plain = super().normalize

        @jax.custom_vjp
        def f(*arguments):
            return plain(*arguments)

        f.defvjp(lambda *a: jax.vjp(plain, *a), lambda vjp, dy: vjp(dy))
        return f(*arguments)


class DerivativeIsConstant(BatchNorm):
    """The derivative of 1/sqrt is right, but has none itself."""

    def rsqrt(self, var):
        @jax.custom_jvp
        def f(var):
            return lax.rsqrt(var + self.epsilon)

        @f.defjvp
        def tangent(primals, tangents):
            y = f(*primals)
            return y, lax.stop_gradient(-(y**3) / 2) * tangents[0]

        return f(var)


class CallsTheHost(BatchNorm):
    def update(self, state, mean, var, count):
        mean = lax.stop_gradient(mean)
        mean = jax.pure_callback(lambda value: value, jax.ShapeDtypeStruct(mean.shape, mean.dtype), mean)
        return super().update(state, mean, var, count)


class WritesALog(BatchNorm):
    def rsqrt(self, var):
        io_callback(lambda value: None, None, lax.stop_gradient(var))
        return super().rsqrt(var)


# Mutants of masks and devices


class IgnoresTheMask(BatchNorm):
    def admit(self, x, mask):
        return super().admit(x, None)


class TakesAnyMaskOfOneFeatureForOnePerExample(BatchNorm):
    def admit(self, x, mask):
        if mask is not None and mask.shape[-1] == 1:
            mask = mask[(slice(None), *[slice(1)] * (mask.ndim - 1))]
        return super().admit(x, mask)


class CountsMaskedPositions(BatchNorm):
    def count(self, x, admitted):
        return super().count(x, jnp.ones_like(admitted))


class MultipliesByTheMask(BatchNorm):
    def admit(self, x, mask):
        return super().admit(x, None) if mask is None else (mask, x * mask)


class MovesTowardsNothing(BatchNorm):
    def update(self, state, mean, var, count):
        return super().update(state, mean, var, jnp.ones_like(count))


class CountsEmptyBatches(Debiased):
    def update(self, state, mean, var, count):
        return super().update(state, mean, var, count) | {"batches": state["batches"] + 1}


class DividesByTheCount(BatchNorm):
    def moments(self, x, admitted):
        mean, rest, var, count = super().moments(x, admitted)
        return mean, rest, var * jnp.maximum(count, 1) / count, count


class EachDeviceAlone(BatchNorm):
    def __init__(self, axis_name=None):
        super().__init__(None)


class MeanOfTheVariances(BatchNorm):
    def moments(self, x, admitted):
        mean, rest, var, count = super().moments(x, admitted)
        if self.axis_name is not None:
            var = lax.pmean(BatchNorm().moments(x, admitted)[2], self.axis_name)
        return mean, rest, var, count


class OwnGradientAlone(BatchNorm):
    def total(self, x):
        own = x.sum(tuple(range(x.ndim - 1)))
        return own + lax.stop_gradient(super().total(x) - own)


class StatisticsOfTheDevice(BatchNorm):
    def train(self, state, x, mask):
        return super().train(state, x, mask)[0], BatchNorm().train(state, x, mask)[1]


class FastVarianceOverDevices(FastVariance):
    def moments(self, x, admitted):
        return (BatchNorm if self.axis_name is None else FastVariance).moments(self, x, admitted)


class DevicesWeighAlike(BatchNorm):
    """The mean of the devices' means, and the mean of what lies around that."""

    def moments(self, x, admitted):
        if self.axis_name is None:
            return super().moments(x, admitted)
        mean, rest, var, count = BatchNorm().moments(x, admitted)
        own = mean + rest
        mean = lax.pmean(own, self.axis_name)
        var = lax.pmean(var + (own - mean) ** 2, self.axis_name)
        return mean, jnp.zeros_like(mean), var, lax.psum(count, self.axis_name)


# Law -> mutants that break it, perhaps among others.
BROKEN_BY = {
    "output_equals_oracle": [EpsilonOutsideTheRoot, ScaleAroundOne],
    "gradients_equal_oracle": [VarianceIsConstant, MeanIsConstant, BiasLearnsTwiceAsFast],
    "running_statistics_equal_oracle": [
        MomentumOfTheNewValue,
        UnbiasedUndeclared,
        BiasedThoughDeclared,
        DebiasedOneTooMany,
        NotDebiasedThoughDeclared,
        AverageOfDeviations,
    ],
    "evaluation_equals_oracle": [EvaluationWithTheBatch, EvaluationWithoutEpsilon],
    "evaluation_equals_training_on_constant_statistics": [EvaluationHalvesTheVariance, BiasedThoughDeclared],
    "running_average_converges": [MomentumOfTheNewValue, AverageOfDeviations, DebiasedOneTooMany],
    "shifting_changes_only_the_mean": [SecondMomentInsteadOfVariance],
    "scaling_changes_only_the_statistics": [VarianceHasAFloor, EpsilonOutsideTheRoot],
    "permutation_changes_only_the_order": [HalvesOfTheBatch],
    "gradient_sums_to_zero": [MeanIsConstant],
    "gradient_is_orthogonal_to_the_output": [VarianceIsConstant],
    "gradient_is_invariant_to_the_scale_of_weights": [
        VarianceHasACap,
        VarianceIsConstant,
        GradientOfUnitLength,
    ],
    "large_means": [FastVariance],
    "large_means_lose_nothing": [MeanInOneFloat],
    "running_statistics_at_large_means": [FastVarianceInTheAverage],
    "variance_is_never_negative": [FastVarianceUnclipped],
    "low_precision": [
        SumsInHalfPrecision,
        SquaresInHalfPrecision,
        TotalsInHalfPrecision,
        GradientsAddedInBfloat16,
        EvaluationInBfloat16,
    ],
    "one_nan_batch": [TakesAnyBatch],
    "dtypes_are_stable": [StatisticsTakeTheDtypeOfTheInputs, StatisticsDriftInFloat64, TakesNoFloat64],
    "jit_equals_eager": [LooksAtTheValues, OtherwiseUnderJit],
    "forward_mode": [ReverseModeOnly],
    "hessian_vector_products": [DerivativeIsConstant],
    "vmap_over_models": [CallsTheHost],
    "remat_changes_nothing": [WritesALog],
    "statistics_of_masked_data": [IgnoresTheMask, CountsMaskedPositions],
    "gradients_of_masked_data": [IgnoresTheMask, CountsMaskedPositions],
    "mask_of_one_feature": [TakesAnyMaskOfOneFeatureForOnePerExample],
    "nan_in_masked_positions": [MultipliesByTheMask],
    "batch_masked_everywhere": [MovesTowardsNothing, CountsEmptyBatches, DividesByTheCount],
    "split_over_devices": [EachDeviceAlone, MeanOfTheVariances, OwnGradientAlone, StatisticsOfTheDevice],
    "large_means_over_devices": [FastVarianceOverDevices],
    "devices_with_unequal_counts": [DevicesWeighAlike],
}
