"""Paired comparisons over seeds and tasks, and metrics at equal sparsity.

Two conditions trained with the same seed share data, order and initialisation. Effects of the seed
on both cancel in the difference, so the differences are tested. The same holds for the difficulty
of the tasks of a benchmark.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

__all__ = [
    "FEWEST_SEEDS",
    "PairedDifference",
    "bootstrap_difference",
    "compare_metrics",
    "holm",
    "interpolate_at",
    "measurement_noise",
    "paired_difference",
]

FEWEST_SEEDS = 3
"""With fewer seeds nothing is tested: two differences that are close by chance would make a t-test
significant."""

_LEVEL = 0.05
_RESAMPLES = 4000

_Values: TypeAlias = Sequence[float] | Float[ndarray, "_"]
_ByTask: TypeAlias = Float[ndarray, "seeds tasks"]


@dataclass(frozen=True)
class PairedDifference:
    """Result of `paired_difference` or `bootstrap_difference`.

    Attributes:
        n_pairs: Seeds in which both values are finite.
        mean: Mean of `a - b`.
        low: Lower end of the 95% confidence interval of the mean, by Student's t whatever the test.
        high: Upper end.
        p_value: Two-sided, for the hypothesis of no difference.
        p_adjusted: The same after Holm's correction over the metrics of `compare_metrics`; equal to
            `p_value` for a single comparison.
        test: The test that gave `p_value`.
        noise: Possible change of the difference if the same SAEs are measured again: half the width
            of the 95% interval over the seeds of the probes. NaN: unknown, or no such noise.
    """

    n_pairs: int
    mean: float
    low: float
    high: float
    p_value: float
    p_adjusted: float
    test: Literal["t", "wilcoxon", "bootstrap", "none"]
    noise: float = math.nan

    @property
    def significant(self) -> bool:
        """Whether `p_adjusted` is below 0.05 (NaN is not) and |mean| exceeds `noise`, if known."""
        return self.p_adjusted < _LEVEL and not abs(self.mean) <= self.noise

    @property
    def smallest(self) -> float:
        """The smallest mean that could have been distinguished from 0, before any correction.

        Half the width of the confidence interval, or `noise` if that is larger.
        """
        known = [v for v in ((self.high - self.low) / 2, self.noise) if not math.isnan(v)]
        return max(known, default=math.nan)


def paired_difference(a: _Values, b: _Values, n_comparisons: int = 1) -> PairedDifference:
    """Compare one metric of two conditions over seeds.

    The test is Wilcoxon's signed-rank test where it could reach 0.05 at all, else the paired
    t-test. With n pairs the smallest p-value of Wilcoxon's exact test is 2^(1 - n): with fewer than
    6 pairs it is above 0.05 whatever the data, and with m comparisons Holm's correction needs the
    smallest to be below 0.05 / m. The t-test assumes normal differences, which so few pairs cannot
    show.

    Args:
        a: Values of one condition, one per seed.
        b: Values of the other, of the same seeds in the same order. Pairs with a NaN are left out.
        n_comparisons: Number m of comparisons that the p-value will be corrected for.

    Returns:
        The difference. With one or two pairs nothing is tested: p is NaN, and with one pair the
        interval too. Both are NaN if all differences are equal up to rounding and not 0: the seed
        then had no effect, and nothing tells how large chance is. If all are 0, p is 1.

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
    if n >= FEWEST_SEEDS and not difference.any():
        return PairedDifference(n, 0.0, 0.0, 0.0, 1.0, 1.0, "none")
    if np.ptp(difference) <= _rounding(first, second):
        return PairedDifference(n, mean, math.nan, math.nan, math.nan, math.nan, "none")
    t_test: Any = stats.ttest_1samp(difference, 0)
    interval = t_test.confidence_interval(0.95)
    ranked = difference[difference != 0]  # Wilcoxon's test drops zeros
    if n < FEWEST_SEEDS:
        test, p_value = "none", math.nan
    elif 2.0 ** (1 - len(ranked)) <= _LEVEL / n_comparisons:
        test, p_value = "wilcoxon", _wilcoxon(ranked)
    else:
        test, p_value = "t", float(t_test.pvalue)
    return PairedDifference(
        n, mean, float(interval.low), float(interval.high), p_value, p_value, test
    )


def bootstrap_difference(a: _ByTask, b: _ByTask) -> PairedDifference:
    """Compare one metric of two conditions over seeds and tasks: a hierarchical bootstrap.

    Seeds and tasks are crossed: every seed has every task. So both are drawn with replacement,
    independently (Owen 2007, "The pigeonhole bootstrap"), and the interval holds for other seeds
    and other tasks. With few seeds a bootstrap is too narrow. So the deviations of the S seeds are
    multiplied by sqrt(S / (S - 1)), those of the T tasks likewise, and the interval is the mean
    +- t standard deviations of the resampled means, with Satterthwaite's degrees of freedom: S - 1
    if only seeds matter, T - 1 if only tasks do.

    Args:
        a: Values of one condition, shape (S, T), T at least 2.
        b: Values of the other, of the same seeds and tasks. Seeds with a NaN are left out.

    Returns:
        The difference. With one or two seeds p is NaN, and with one the interval too. `test` is
        "none" if all differences are equal up to rounding.

    Raises:
        ValueError: The shapes differ, no seed is complete, or a value is infinite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 2 or a.shape[1] < 2:
        raise ValueError(
            f"values of shapes {a.shape} and {b.shape}: both must be (seeds, tasks), with at least "
            "two tasks"
        )
    complete = ~(np.isnan(a) | np.isnan(b)).any(axis=1)
    a, b = a[complete], b[complete]
    n_seeds, n_tasks = a.shape
    if np.isinf(a).any() or np.isinf(b).any():
        raise ValueError("an infinite value has no difference from another")
    if n_seeds < 2 or np.ptp(a - b) <= _rounding(a, b):
        return paired_difference(a.mean(1), b.mean(1))
    difference = a - b
    mean = float(difference.mean())
    seed_effects = difference.mean(1, keepdims=True) - mean
    task_effects = difference.mean(0, keepdims=True) - mean
    interactions = difference - mean - seed_effects - task_effects
    seed_effects = seed_effects * math.sqrt(n_seeds / (n_seeds - 1))
    task_effects = task_effects * math.sqrt(n_tasks / (n_tasks - 1))
    rng = np.random.default_rng(0)
    seeds, tasks = (
        rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) / n for n in (n_seeds, n_tasks)
    )
    means = ((seeds @ (seed_effects + task_effects + interactions)) * tasks).sum(1)
    error = float(np.sqrt(np.square(means).mean()))
    # variances of the means over seeds and over tasks
    v_seeds, v_tasks = (float(np.square(x).mean()) / x.size for x in (seed_effects, task_effects))
    df = (v_seeds + v_tasks) ** 2 / (v_seeds**2 / (n_seeds - 1) + v_tasks**2 / (n_tasks - 1))
    width = float(stats.t.ppf(1 - _LEVEL / 2, df)) * error
    tested = n_seeds >= FEWEST_SEEDS
    p = float(2 * stats.t.sf(abs(mean) / error, df)) if tested else math.nan
    test = "bootstrap" if tested else "none"
    return PairedDifference(n_seeds, mean, mean - width, mean + width, p, p, test)


def measurement_noise(repeats: Sequence[_Values]) -> float:
    """Measurement noise of a difference, from repeated measurements.

    Each pair of condition and baseline gives one row: the difference over all SAEs and tasks, for
    each seed of the probes. The variance over these seeds is pooled over the rows.

    Args:
        repeats: Rows of R differences. R may differ between rows.

    Returns:
        Half the width of the 95% interval of the mean over R seeds, for the smallest R there is.
        NaN if nothing was repeated, or all repetitions are equal: of a label with two values every
        seed draws all rows, and this is no sign that other rows would give the same.
    """
    rows = [np.asarray(row, np.float64) for row in repeats if len(row) > 1]
    if not rows:
        return math.nan
    df = sum(len(row) - 1 for row in rows)
    variance = sum(float(np.square(row - row.mean()).sum()) for row in rows) / df
    if variance == 0:
        return math.nan
    fewest = min(len(row) for row in rows)
    return float(stats.t.ppf(1 - _LEVEL / 2, df)) * math.sqrt(variance / fewest)


def _rounding(a: ndarray, b: ndarray) -> float:
    """The largest spread of equal differences that rounding of the values can cause."""
    return 4 * float(np.finfo(np.float64).eps) * max(np.abs(a).max(), np.abs(b).max())


def _wilcoxon(difference: Float[ndarray, "n"]) -> float:
    """Two-sided p-value of differences without zeros."""
    ranks = stats.rankdata(np.abs(difference))
    if len(difference) > 13 or len(np.unique(ranks)) == len(ranks):
        result: Any = stats.wilcoxon(difference)
        return float(result.pvalue)
    # Ties are common: accuracies are multiples of 1 / n. Older versions of scipy approximate their
    # p-value by a normal distribution; with up to 2^13 signs it can be exact.
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
    values: Mapping[str, tuple[_Values | _ByTask, _Values | _ByTask]],
) -> dict[str, PairedDifference]:
    """Compare several metrics of two conditions over seeds, with Holm's correction.

    Args:
        values: For every metric the values of both conditions, as `paired_difference` takes them,
            or by seed and task, as `bootstrap_difference` does.

    Returns:
        `a - b` for every metric, in the same order, with `p_adjusted` over all of them.

    Raises:
        ValueError: As `paired_difference`, with the metric's name.
    """
    results = {}
    for metric, (a, b) in values.items():
        try:
            if np.ndim(a) == 2:
                results[metric] = bootstrap_difference(np.asarray(a), np.asarray(b))
            else:
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
    before it, and at most 1. The tests may depend on each other in any way.

    Args:
        p_values: In [0, 1]. NaN, for a test that was not possible, stays NaN and is not counted.

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
        l0_values: Measured L0 of every point, in any order. Points whose L0 is 0 (dead SAEs, no
            logarithm) or where a value is NaN are left out; the metric is averaged over points
            with the same L0.
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
        raise ValueError(
            f"L0 cannot be negative ({l0.tolist()}), and the target must be positive and finite, "
            f"not {l0_target}"
        )
    usable = (l0 > 0) & np.isfinite(l0) & ~np.isnan(metric)
    if not usable.any():
        return math.nan
    points, inverse = np.unique(l0[usable], return_inverse=True)
    means = np.bincount(inverse, metric[usable]) / np.bincount(inverse)
    if not points[0] <= l0_target <= points[-1]:
        return math.nan
    return float(np.interp(math.log(l0_target), np.log(points), means))
