"""Paired comparisons over seeds, and metrics at equal sparsity.

Two conditions that were trained with the same seed share data, order and initialisation: what the
seed does to both cancels in the difference, and the differences are what is tested.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

__all__ = ["PairedDifference", "compare_metrics", "holm", "interpolate_at", "paired_difference"]

_LEVEL = 0.05

_Values: TypeAlias = Sequence[float] | Float[ndarray, "_"]


@dataclass(frozen=True)
class PairedDifference:
    """Result of `paired_difference`.

    Attributes:
        n_pairs: Pairs in which both values are finite.
        mean: Mean of `a - b`.
        low: Lower end of the 95% confidence interval of the mean, by Student's t whatever the test.
        high: Upper end.
        p_value: Two-sided, of no difference.
        p_adjusted: The same after Holm's correction over the metrics of `compare_metrics`; equal to
            `p_value` for a single comparison.
        test: What `p_value` comes from.
    """

    n_pairs: int
    mean: float
    low: float
    high: float
    p_value: float
    p_adjusted: float
    test: Literal["t", "wilcoxon", "none"]

    @property
    def significant(self) -> bool:
        """Whether `p_adjusted` is below 0.05; a NaN is not."""
        return self.p_adjusted < _LEVEL


def paired_difference(a: _Values, b: _Values, n_comparisons: int = 1) -> PairedDifference:
    """Compare one metric of two conditions over seeds.

    The test is Wilcoxon's signed-rank test where it could reach 0.05 at all, else the paired
    t-test. With n pairs the smallest p-value of Wilcoxon's exact test is 2^(1 - n): with fewer than
    6 pairs it is above 0.05 whatever the data, and with m comparisons Holm's correction asks the
    smallest to be below 0.05 / m. The t-test takes the differences to be normal, which a handful of
    them cannot show.

    Args:
        a: Values of one condition, one per seed.
        b: Values of the other, of the same seeds in the same order. Pairs with a NaN are left out.
        n_comparisons: Number m of comparisons that the p-value will be corrected for.

    Returns:
        The difference. With a single pair the interval and p-value are NaN and the test "none";
        likewise if all differences are the same up to rounding and not 0, because then the seed had
        no effect on the difference and says nothing about chance. If all are 0, p is 1.

    Raises:
        ValueError: The numbers of values differ, no pair is complete, or a value is infinite.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"values of shapes {first.shape} and {second.shape}: a paired comparison needs one of "
            "each condition for every seed"
        )
    complete = ~(np.isnan(first) | np.isnan(second))
    first, second = first[complete], second[complete]
    if np.isinf(first).any() or np.isinf(second).any():
        raise ValueError("an infinite value has no difference from another")
    n = len(first)
    if n == 0:
        raise ValueError(f"{len(complete)} pairs, none of them with both values")
    difference = first - second
    mean = float(difference.mean())
    if n > 1 and not difference.any():
        return PairedDifference(n, 0.0, 0.0, 0.0, 1.0, 1.0, "none")
    # what rounding of the values themselves can make of equal differences
    rounding = 4 * np.finfo(np.float64).eps * max(np.abs(first).max(), np.abs(second).max())
    if np.ptp(difference) <= rounding:
        return PairedDifference(n, mean, math.nan, math.nan, math.nan, math.nan, "none")
    t_test: Any = stats.ttest_1samp(difference, 0)
    interval = t_test.confidence_interval(0.95)
    ranked = difference[difference != 0]  # as Wilcoxon did
    if 2.0 ** (1 - len(ranked)) <= _LEVEL / n_comparisons:
        test, p_value = "wilcoxon", _wilcoxon(ranked)
    else:
        test, p_value = "t", float(t_test.pvalue)
    return PairedDifference(
        n, mean, float(interval.low), float(interval.high), p_value, p_value, test
    )


def _wilcoxon(difference: Float[ndarray, "n"]) -> float:
    """Two-sided p-value of differences without zeros."""
    ranks = stats.rankdata(np.abs(difference))
    if len(difference) > 13 or len(np.unique(ranks)) == len(ranks):
        result: Any = stats.wilcoxon(difference)
        return float(result.pvalue)
    # accuracies are multiples of 1 / n, and ties common among them; for these older versions of
    # scipy approximate by a normal distribution, which 2^13 signs at most do not ask for
    return float(
        stats.permutation_test(
            (np.sign(difference) * ranks,),
            lambda signed, axis: signed.sum(axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=2 ** len(difference),
        ).pvalue
    )


def compare_metrics(
    values: Mapping[str, tuple[_Values, _Values]],
) -> dict[str, PairedDifference]:
    """Compare several metrics of two conditions over seeds, with Holm's correction.

    Args:
        values: For every metric the values of both conditions, as `paired_difference` takes them.

    Returns:
        `a - b` for every metric, in the same order, with `p_adjusted` over all of them.

    Raises:
        ValueError: As `paired_difference`, with the metric's name.
    """
    results = {}
    for metric, (a, b) in values.items():
        try:
            results[metric] = paired_difference(a, b, n_comparisons=len(values))
        except ValueError as error:
            raise ValueError(f"{metric}: {error}") from error
    adjusted = holm([result.p_value for result in results.values()])
    return {
        metric: replace(result, p_adjusted=p)
        for (metric, result), p in zip(results.items(), adjusted, strict=True)
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): the chance of any false positive stays below the level.

    Of m p-values the i-th smallest (from 0) is multiplied by m - i, made no smaller than those
    before it, and at most 1. It takes no assumption about how the tests depend on each other.

    Args:
        p_values: In [0, 1]. NaNs, tests that could not be made, stay NaN and are not counted.

    Returns:
        Adjusted p-values in the same order, to be compared with the level itself.

    Raises:
        ValueError: A value is outside [0, 1].
    """
    p = np.asarray(p_values, np.float64)
    if (p < 0).any() or (p > 1).any():
        raise ValueError(f"p-values are between 0 and 1, not {list(p_values)}")
    order = np.argsort(p, kind="stable")  # NaNs come last
    m = int(np.count_nonzero(~np.isnan(p)))
    adjusted = np.full(len(p), math.nan)
    steps = p[order[:m]] * np.arange(m, 0, -1)
    adjusted[order[:m]] = np.maximum.accumulate(steps).clip(max=1)
    return adjusted.tolist()


def interpolate_at(l0_values: _Values, metric_values: _Values, l0_target: float | int) -> float:
    """A metric at a given L0, between the two nearest points of a sweep, linear in log L0.

    Args:
        l0_values: Measured L0 of every point, in any order. Points whose L0 is 0 (dead SAEs, which
            a logarithm has no place for) or where a value is NaN are left out; of points with the
            same L0 the metric is averaged.
        metric_values: The metric of every point.
        l0_target: The L0 that conditions are compared at.

    Returns:
        The metric; NaN if the target lies outside the measured L0: nothing is extrapolated.

    Raises:
        ValueError: The numbers of values differ, an L0 is negative, or the target is not positive.
    """
    l0, metric = np.asarray(l0_values, np.float64), np.asarray(metric_values, np.float64)
    if l0.shape != metric.shape or l0.ndim != 1:
        raise ValueError(f"{l0.shape} L0 values and {metric.shape} values of the metric")
    if (l0 < 0).any() or not 0 < l0_target < math.inf:
        raise ValueError(f"L0 cannot be negative or, to compare at, {l0_target}: {l0.tolist()}")
    usable = (l0 > 0) & np.isfinite(l0) & ~np.isnan(metric)
    if not usable.any():
        return math.nan
    points, inverse = np.unique(l0[usable], return_inverse=True)
    means = np.bincount(inverse, metric[usable]) / np.bincount(inverse)
    if not points[0] <= l0_target <= points[-1]:
        return math.nan
    return float(np.interp(math.log(l0_target), np.log(points), means))
