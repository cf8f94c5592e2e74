"""Mutants that compute wrong numbers: of values, of invariances and of precision."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.testing.plain import BatchNorm, Debiased, Unbiased

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
    """The gradient with respect to the inputs is divided by its norm."""

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
    """Sums over all axes but the last in this dtype; once the sum is large, it loses the next terms."""
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
    """Adds up the means of examples, rounded to the dtype of the inputs."""

    def total(self, x):
        positions = tuple(range(1, x.ndim - 1))
        return BatchNorm.total(self, x.mean(positions).astype(self.narrow)).astype(x.dtype) * x[0, ..., 0].size


class GradientsAddedInBfloat16(BatchNorm):
    """The gradients of moments and parameters, which are sums over the values of a feature, are summed in bfloat16."""

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
