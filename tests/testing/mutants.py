"""Mutants of a plain batch norm, each with one mistake that occurs in practice, and the laws that they break.

This file has the mutants that fail under transformations, with masks and over devices; mutants_of_numbers.py has those
that compute wrong numbers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import io_callback

from tests.testing.mutants_of_numbers import (
    AverageOfDeviations,
    BiasedThoughDeclared,
    BiasLearnsTwiceAsFast,
    DebiasedOneTooMany,
    EpsilonOutsideTheRoot,
    EvaluationHalvesTheVariance,
    EvaluationInBfloat16,
    EvaluationWithoutEpsilon,
    EvaluationWithTheBatch,
    FastVariance,
    FastVarianceInTheAverage,
    FastVarianceUnclipped,
    GradientOfUnitLength,
    GradientsAddedInBfloat16,
    HalvesOfTheBatch,
    MeanInOneFloat,
    MeanIsConstant,
    MomentumOfTheNewValue,
    NotDebiasedThoughDeclared,
    ScaleAroundOne,
    SecondMomentInsteadOfVariance,
    SquaresInHalfPrecision,
    SumsInHalfPrecision,
    TakesAnyBatch,
    TotalsInHalfPrecision,
    UnbiasedUndeclared,
    VarianceHasACap,
    VarianceHasAFloor,
    VarianceIsConstant,
)
from tests.testing.plain import BatchNorm, Debiased

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
    """The derivative of 1/sqrt is right, but its own derivative is 0."""

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
    """Averages the moments of devices, no matter how many examples they have."""

    def moments(self, x, admitted):
        if self.axis_name is None:
            return super().moments(x, admitted)
        mean, rest, var, count = BatchNorm().moments(x, admitted)
        own = mean + rest
        mean = lax.pmean(own, self.axis_name)
        var = lax.pmean(var + (own - mean) ** 2, self.axis_name)
        return mean, jnp.zeros_like(mean), var, lax.psum(count, self.axis_name)


# From a law to the mutants that break it; they may break other laws too.
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
