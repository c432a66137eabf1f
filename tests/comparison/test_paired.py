"""Paired comparisons against independent references, and interpolation by hand."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sae_whiten.comparison.paired import (
    bootstrap_difference,
    compare_metrics,
    holm,
    interpolate_at,
    measurement_noise,
    paired_difference,
)

# --- differences


def test_the_t_test_by_hand() -> None:
    # differences 1, 2, 3: mean 2, standard error 1 / sqrt 3, t = 2 sqrt 3 with 2 degrees of freedom
    result = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    t = 2 * 3**0.5
    assert (result.n_pairs, result.mean, result.test) == (3, 2.0, "t")
    # two degrees of freedom have a closed form: 1 - t / sqrt(2 + t^2)
    assert result.p_value == pytest.approx(1 - t / (2 + t**2) ** 0.5)
    # 97.5% quantile of the same: (2 p - 1) sqrt(2 / (1 - (2 p - 1)^2))
    quantile = 0.95 * (2 / (1 - 0.95**2)) ** 0.5
    assert result.low == pytest.approx(2 - quantile / 3**0.5)
    assert result.high == pytest.approx(2 + quantile / 3**0.5)
    assert result.p_adjusted == result.p_value
    assert not result.significant


def test_pairing_removes_what_seeds_have_in_common() -> None:
    rng = np.random.default_rng(0)
    seeds = 10 * rng.normal(size=5)
    better = seeds + 0.1 + 0.01 * rng.normal(size=5)
    assert paired_difference(better, seeds).significant
    unpaired: Any = stats.ttest_ind(better, seeds)
    assert unpaired.pvalue > 0.9


def wilcoxon_by_enumeration(difference: np.ndarray) -> Fraction:
    """Share of all signs under which the rank sum is at least as far from its mean."""
    ranks = stats.rankdata(np.abs(difference))
    observed = abs((np.sign(difference) * ranks).sum())
    sums = [
        abs(sum(s * r for s, r in zip(signs, ranks, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(ranks))
    ]
    return Fraction(sum(s >= observed - 1e-9 for s in sums), len(sums))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(-6, 6).filter(bool), min_size=6, max_size=9).filter(
        lambda values: len(set(values)) > 1
    )
)
def test_wilcoxon_is_exact_with_ties(values: list[int]) -> None:
    difference = np.array(values, float)
    result = paired_difference(difference, 0 * difference)
    assert result.test == "wilcoxon"
    assert result.p_value == pytest.approx(float(wilcoxon_by_enumeration(difference)))


@pytest.mark.parametrize(("n", "test"), [(3, "t"), (5, "t"), (6, "wilcoxon"), (9, "wilcoxon")])
def test_wilcoxon_where_it_can_reach_significance(n: int, test: str) -> None:
    values = np.arange(1.0, n + 1)
    result = paired_difference(values, np.zeros(n))
    assert result.test == test
    if test == "wilcoxon":  # all signs the same
        assert result.p_value == pytest.approx(2.0 ** (1 - n))
        assert result.significant


def test_more_comparisons_ask_more_of_wilcoxon() -> None:
    values = np.arange(1.0, 9.0)
    # 8 pairs reach 2^-7 = 0.0078, which is below 0.05 / 6 but not below 0.05 / 7
    assert paired_difference(values, 0 * values, n_comparisons=6).test == "wilcoxon"
    assert paired_difference(values, 0 * values, n_comparisons=7).test == "t"
    # pairs without a difference have no rank: 5 are left
    values[:3] = 0
    assert paired_difference(values, 0 * values).test == "t"


def test_incomplete_pairs_are_left_out() -> None:
    nan = math.nan
    result = paired_difference([1.0, nan, 3.0, 4.0, 9.0], [0.0, 1.0, 1.0, 1.0, nan])
    # as text, for NaN differs from NaN
    assert str(result) == str(paired_difference([1.0, 3.0, 4.0], [0.0, 1.0, 1.0]))
    assert result.n_pairs == 3


def test_what_no_test_can_be_made_of() -> None:
    single = paired_difference([0.5], [0.25])
    assert (single.n_pairs, single.mean, single.test) == (1, 0.25, "none")
    assert math.isnan(single.p_value)
    assert math.isnan(single.low)
    assert not single.significant
    assert math.isnan(paired_difference([0.5], [0.5]).p_value)
    equal = paired_difference([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert (equal.mean, equal.low, equal.high, equal.p_value) == (0, 0, 0, 1)
    # the same difference thrice, but for rounding: a t of 1e15 is no evidence
    a = np.array([0.1, 0.7, 1.3])
    constant = paired_difference(a + 0.1, a)
    assert np.ptp(a + 0.1 - a) > 0
    assert math.isnan(constant.p_value)
    assert constant.mean == pytest.approx(0.1)
    assert not constant.significant


def test_two_seeds_are_never_significant() -> None:
    two = paired_difference([1.0, 1.0001], [0.0, 0.0])
    assert two.test == "none"
    assert math.isnan(two.p_value)
    assert not two.significant
    # but how uncertain the mean is can be said
    assert two.low == pytest.approx(1.00005 - 0.00005 * stats.t.ppf(0.975, 1))
    rng = np.random.default_rng(0)
    a = rng.normal(1, 0.01, (2, 30))
    by_task = bootstrap_difference(a, np.zeros((2, 30)))
    assert math.isnan(by_task.p_value)
    assert by_task.low > 0
    assert not by_task.significant


# --- over seeds and tasks


def test_a_bootstrap_over_seeds_alone_is_the_t_test() -> None:
    seeds = np.array([0.3, 0.1, 0.5, 0.2])
    a = np.repeat(seeds[:, None], 10, axis=1)
    result = bootstrap_difference(a, 0 * a)
    expected = paired_difference(seeds, 0 * seeds)
    assert (result.n_pairs, result.test) == (4, "bootstrap")
    assert result.mean == pytest.approx(expected.mean)
    # the rest is that of 4000 resamples
    assert result.low == pytest.approx(expected.low, abs=0.03 * (expected.high - expected.low))
    assert result.p_value == pytest.approx(expected.p_value, rel=0.1)


def test_a_bootstrap_over_tasks_alone_is_the_t_test_over_them() -> None:
    tasks = np.random.default_rng(0).normal(0.5, 1, 12)
    a = np.tile(tasks, (5, 1))
    result = bootstrap_difference(a, 0 * a)
    expected = paired_difference(tasks, 0 * tasks)
    assert result.n_pairs == 5
    assert result.high == pytest.approx(expected.high, abs=0.03 * (expected.high - expected.low))


@pytest.mark.parametrize("sds", [(1, 0.2, 0.5), (0.5, 0.5, 1)])
def test_intervals_over_seeds_and_tasks_hold_the_truth_as_often_as_they_say(
    sds: tuple[float, float, float],
) -> None:
    rng = np.random.default_rng(0)
    n, covered, significant = 150, 0, 0
    for _ in range(n):
        a = sds[0] * rng.normal(size=(3, 1)) + sds[1] * rng.normal(size=(1, 20))
        a = a + sds[2] * rng.normal(size=(3, 20))
        result = bootstrap_difference(a, 0 * a)
        covered += result.low <= 0 <= result.high
        significant += result.significant
    # 95% or more: where the rest dominates, drawing both counts it thrice (Owen 2007)
    assert covered / n >= 0.92
    assert significant == n - covered


def test_pairing_over_tasks_finds_what_their_spread_hides() -> None:
    rng = np.random.default_rng(0)
    tasks = rng.normal(0.8, 0.1, (1, 30))  # some are hard
    b = tasks + 0.002 * rng.normal(size=(3, 30))
    a = tasks + 0.01 + 0.002 * rng.normal(size=(3, 30))
    result = bootstrap_difference(a, b)
    assert result.significant
    assert result.smallest == (result.high - result.low) / 2 < 0.01


def test_what_a_bootstrap_cannot_judge() -> None:
    ones = np.ones((3, 4))
    assert bootstrap_difference(ones, ones).p_value == 1
    assert bootstrap_difference(2 * ones, ones).test == "none"
    single = bootstrap_difference(np.array([[1.0, 2.0]]), np.zeros((1, 2)))
    assert (single.mean, single.n_pairs) == (1.5, 1)
    assert math.isnan(single.low)
    hole = np.array([[1.0, 2.0], [math.nan, 1.0], [3.0, 1.0]])
    assert bootstrap_difference(hole, np.zeros((3, 2))).n_pairs == 2
    with pytest.raises(ValueError, match="at least two tasks"):
        bootstrap_difference(ones[:, :1], ones[:, :1])
    with pytest.raises(ValueError, match="infinite"):
        bootstrap_difference(math.inf * ones, ones)


def test_noise_is_the_interval_of_a_mean_over_repeats_pooled() -> None:
    # variances 1 and 4 with two degrees of freedom each
    noise = measurement_noise([[1.0, 2.0, 3.0], [10.0, 12.0, 14.0]])
    assert noise == pytest.approx(stats.t.ppf(0.975, 4) * (2.5 / 3) ** 0.5)
    assert math.isnan(measurement_noise([[1.0], []]))
    # of the same rows every time
    assert math.isnan(measurement_noise([[1.0, 1.0], [0.5, 0.5]]))


def test_nothing_below_the_noise_of_the_measurement_is_a_difference() -> None:
    clear = paired_difference([1.0, 1.1, 0.9, 1.0], [0.0, 0.0, 0.0, 0.0])
    assert clear.significant
    assert replace(clear, noise=0.99).significant
    assert not replace(clear, noise=1.0).significant
    assert replace(clear, noise=2.0).smallest == 2


def test_values_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="for every seed"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="2 pairs"):
        paired_difference([1.0, math.nan], [math.nan, 1.0])
    with pytest.raises(ValueError, match="infinite"):
        paired_difference([1.0, math.inf], [0.0, 1.0])
    with pytest.raises(ValueError, match="l0: 0 pairs"):
        compare_metrics({"ev": ([1.0], [2.0]), "l0": ([], [])})


# --- several metrics


def test_holm_equals_r() -> None:
    # p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") and of c(0.04, 0.001, 0.6, 0.012)
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.04, 0.001, 0.6, 0.012]) == pytest.approx([0.08, 0.004, 0.6, 0.036])
    assert holm([]) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closure_of_bonferroni(p_values: list[float]) -> None:
    # a hypothesis is rejected if every set of hypotheses that it is in is, by Bonferroni
    indices = range(len(p_values))
    expected = [
        max(
            min(1.0, len(subset) * min(p_values[j] for j in subset))
            for size in range(1, len(p_values) + 1)
            for subset in itertools.combinations(indices, size)
            if i in subset
        )
        for i in indices
    ]
    assert holm(p_values) == pytest.approx(expected)


def test_holm_does_not_count_tests_that_were_not_made() -> None:
    adjusted = holm([math.nan, 0.02, math.nan, 0.01])
    assert math.isnan(adjusted[0])
    assert math.isnan(adjusted[2])
    assert [adjusted[1], adjusted[3]] == [0.02, 0.02]
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, 1.1])


def test_metrics_are_compared_with_correction() -> None:
    noise = np.array([-1.3, -0.4, 0.1, 0.5, 1.1])
    values = {
        "better": (1 + 0.1 * noise, np.zeros(5)),
        "perhaps": (1.25 + noise, np.zeros(5)),
        "same": (0.1 + noise, np.zeros(5)),
    }
    results = compare_metrics(values)
    assert list(results) == ["better", "perhaps", "same"]
    p = [stats.ttest_rel(*pair)[1] for pair in values.values()]
    assert [result.p_value for result in results.values()] == pytest.approx(p)
    assert p[1] < 0.05 < 2 * p[1]
    assert [result.p_adjusted for result in results.values()] == pytest.approx(
        [3 * p[0], 2 * p[1], p[2]]
    )
    assert [result.significant for result in results.values()] == [True, False, False]


# --- equal sparsity


def test_interpolation_is_linear_in_the_logarithm() -> None:
    l0, metric = [64.0, 4.0, 16.0], [0.9, 0.5, 0.6]
    assert [interpolate_at(l0, metric, x) for x in l0] == pytest.approx(metric)
    assert interpolate_at(l0, metric, 8) == pytest.approx(0.55)
    assert interpolate_at(l0, metric, 32.0) == pytest.approx(0.75)
    assert interpolate_at([4.0, 4.0, 16.0], [0.2, 0.4, 0.5], 4.0) == pytest.approx(0.3)


@pytest.mark.parametrize("target", [3.99, 64.01])
def test_nothing_is_extrapolated(target: float) -> None:
    assert math.isnan(interpolate_at([64.0, 4.0], [0.9, 0.5], target))


def test_points_that_cannot_be_used_are_left_out() -> None:
    assert interpolate_at([0.0, 4.0, 8.0, 16.0], [0.0, 0.5, math.nan, 0.6], 8.0) == pytest.approx(
        0.55
    )
    assert math.isnan(interpolate_at([0.0, 4.0], [0.0, 0.5], 2.0))
    assert math.isnan(interpolate_at([0.0, 0.0], [0.0, 0.5], 2.0))


def test_interpolation_refuses_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        interpolate_at([-1.0, 2.0], [0.0, 0.0], 1.0)
    with pytest.raises(ValueError, match=r"not 0\.0"):
        interpolate_at([1.0, 2.0], [0.0, 0.0], 0.0)
    with pytest.raises(ValueError, match=r"\(2,\) L0 values and \(1,\) values"):
        interpolate_at([1.0, 2.0], [0.0], 1.0)
