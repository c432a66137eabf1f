"""Metrics on cases whose answer is known by hand."""

import itertools
import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_whiten import WhiteningConfig
from sae_whiten.evaluation.metrics import (
    ExplainedVariance,
    LatentActivity,
    dead_latents,
    dense_latents,
    directions_for_share,
    explained_variance,
    firing_rates,
    l0,
    null_tolerance,
    regularisation_summary,
    spectrum_summary,
    whitened_spectrum,
    whiteness_summary,
)
from tests.support import nasty, whitening_of

X = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0], [2.0, -3.0]])  # mean (2, 0), scatter 20


# --- explained variance


def test_explained_variance_of_perfect_mean_and_worse_than_mean() -> None:
    assert explained_variance(X, X) == 1
    assert explained_variance(X, X.mean(0).expand_as(X)) == 0
    # each reconstruction is off by (0, 3): 4 * 9 / 20
    assert explained_variance(X, X + torch.tensor([0.0, 3.0])) == pytest.approx(1 - 36 / 20)


def test_explained_variance_weights_dimensions_by_their_variance() -> None:
    only_first = X * torch.tensor([1.0, 0.0])
    only_second = torch.tensor([2.0, 0.0]) + X * torch.tensor([0.0, 1.0])
    assert explained_variance(X, only_first) == pytest.approx(2 / 20)
    assert explained_variance(X, only_second) == pytest.approx(18 / 20)


@pytest.mark.parametrize("offset", [5.0, 1e6, 1e10])
def test_explained_variance_does_not_depend_on_the_mean(offset: float) -> None:
    # with |x|^2 as denominator, as some packages have it, an offset of 5 makes 0.91 of 0.1
    x, x_hat = X.double() + offset, X.double() * torch.tensor([1.0, 0.0]).double() + offset
    assert explained_variance(x, x_hat) == pytest.approx(2 / 20, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 50), max_size=6), offset=st.sampled_from([0.0, 3000.0]))
def test_batches_do_not_change_explained_variance(cuts: list[int], offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    # batches of very different means: the mean has to be that of all
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64).cumsum(0) + offset
    x_hat = x + torch.randn(50, 3, generator=generator, dtype=torch.float64)
    metric = ExplainedVariance()
    edges = [0, *sorted(cuts), 50]
    for start, end in itertools.pairwise(edges):
        metric.update(x[start:end], x_hat[start:end])
    expected = 1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert metric.n_samples == 50
    assert metric.compute() == pytest.approx(float(expected), rel=1e-12)


def test_explained_variance_takes_sequences_and_half_precision() -> None:
    x = torch.randn(4, 5, 8)
    x_hat = x + 0.1 * torch.randn_like(x)
    flat = explained_variance(x.flatten(0, 1), x_hat.flatten(0, 1))
    assert explained_variance(x, x_hat) == flat
    # sums of 10^5 squares in bfloat16 would stop growing at 256
    wide = torch.ones(1000, 100, dtype=torch.bfloat16)
    wide[::2] = -1
    assert explained_variance(wide, wide * 0.5) == pytest.approx(0.75)


def test_explained_variance_refuses_what_it_cannot_answer() -> None:
    with pytest.raises(ValueError, match=r"0 activations without any variance"):
        ExplainedVariance().compute()
    with pytest.raises(ValueError, match="3 activations without any variance"):
        explained_variance(torch.ones(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="NaN or an infinity"):
        explained_variance(X, X / 0)
    metric = ExplainedVariance()
    metric.update(X, X)
    with pytest.raises(ValueError, match="width 3 .*width 2"):
        metric.update(torch.ones(4, 3), torch.ones(4, 3))


def test_a_refused_batch_leaves_the_figure_as_it_was() -> None:
    metric = ExplainedVariance()
    metric.update(X, X * torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="NaN"):
        metric.update(X * math.nan, X)
    assert metric.n_samples == 4
    assert metric.compute() == pytest.approx(2 / 20)


# --- latents

LATENTS = torch.tensor(
    [
        [0.5, 0.0, -2.0, 0.0],
        [0.1, 0.0, 0.0, 0.0],
        [3.0, 0.0, 1e-30, 0.0],
        [1.0, 0.0, 0.0, 7.0],
    ]
)


def test_activity_of_latents() -> None:
    rates = firing_rates(LATENTS)
    assert rates.tolist() == [1.0, 0.0, 0.5, 0.25]
    assert rates.dtype == torch.float64
    assert l0(LATENTS) == 7 / 4
    assert dead_latents(rates) == 1
    assert dense_latents(rates) == 3
    assert dense_latents(rates, threshold=0.25) == 2
    assert dense_latents(rates, threshold=1.0) == 0


def test_activity_in_batches_sequences_and_sparse_is_the_same() -> None:
    activity = LatentActivity()
    activity.update(LATENTS[:1])
    activity.update(LATENTS[1:1])
    activity.update(LATENTS[1:].to_sparse())
    assert activity.n_samples == 4
    assert torch.equal(activity.firing_rates, firing_rates(LATENTS))
    assert activity.l0 == l0(LATENTS)
    assert torch.equal(firing_rates(LATENTS.reshape(2, 2, 4)), firing_rates(LATENTS))


def test_a_latent_is_dead_only_if_no_batch_has_it() -> None:
    activity = LatentActivity()
    activity.update(LATENTS[:3])
    assert dead_latents(activity.firing_rates) == 2
    activity.update(LATENTS[3:])
    assert dead_latents(activity.firing_rates) == 1


def test_activity_refuses_what_it_cannot_answer() -> None:
    with pytest.raises(ValueError, match="no rows"):
        _ = LatentActivity().l0
    with pytest.raises(ValueError, match="no rows"):
        l0(LATENTS[:0])
    activity = LatentActivity()
    activity.update(LATENTS)
    with pytest.raises(ValueError, match="3 latents .*4"):
        activity.update(LATENTS[:, :3])


# --- spectra


def test_spectrum_of_isotropic_activations() -> None:
    summary = spectrum_summary(torch.full((8,), 3.0))
    assert summary.condition_number == summary.condition_number_nonnull == 1
    assert summary.n_null == 0
    assert summary.top_share == pytest.approx(1 / 8)
    assert summary.participation_ratio == pytest.approx(8)


def test_spectrum_in_any_order() -> None:
    summary = spectrum_summary(torch.tensor([1.0, 4.0, 2.0, 1.0]))
    assert summary.condition_number == 4
    assert summary.top_share == pytest.approx(0.5)
    assert summary.participation_ratio == pytest.approx(64 / 22)


@pytest.mark.parametrize("smallest", [0.0, -1e-15, 1e-14])
def test_numerically_null_directions_are_counted_and_left_out(smallest: float) -> None:
    summary = spectrum_summary(torch.tensor([smallest, 0.5, 2.0, 8.0], dtype=torch.float64))
    assert summary.n_null == 1
    assert summary.condition_number_nonnull == 16
    expected = 8 / smallest if smallest > 0 else math.inf
    assert summary.condition_number == pytest.approx(expected)


def test_the_tolerance_of_null_directions() -> None:
    eigenvalues = torch.tensor([1.0, 1e-3, 1e-8], dtype=torch.float64)
    assert spectrum_summary(eigenvalues).n_null == 0
    assert spectrum_summary(eigenvalues, null_rtol=1e-7).n_null == 1
    assert spectrum_summary(eigenvalues, null_rtol=1e-2).n_null == 2


def test_rounding_of_float32_activations_is_null_and_little_variance_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 64, generator=generator, dtype=torch.float64)
    x[:, 1] *= 1e-3
    # what the layer norm of a post-LN model does: exactly zero mean, up to rounding
    rounded = (x - x.mean(1, keepdim=True)).float().double()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(rounded.T))
    # of either sign: the eigensolver's own rounding is as large
    assert abs(eigenvalues[0]) < null_tolerance(64) * eigenvalues[-1]
    summary = spectrum_summary(eigenvalues)
    assert summary.n_null == 1
    assert summary.condition_number_nonnull < 1e4


def test_spectrum_refuses_what_it_cannot_answer() -> None:
    for eigenvalues in ([], [0.0, 0.0], [1.0, math.nan], [math.inf, 1.0]):
        with pytest.raises(ValueError, match="finite eigenvalues"):
            spectrum_summary(torch.tensor(eigenvalues))


def test_directions_that_hold_a_share_of_the_variance() -> None:
    eigenvalues = torch.tensor([1.0, 6.0, -1e-9, 2.0, 1.0])
    found = [directions_for_share(eigenvalues, share) for share in (0.5, 0.61, 0.79, 0.85, 0.95)]
    assert found == [1, 2, 2, 3, 4]


# --- what whitening does to spectra


def test_what_regularisation_does() -> None:
    eigenvalues = torch.tensor([16.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    # eps of 0.5 of the mean, 5; the null direction is given the variance of an average one
    summary = regularisation_summary(eigenvalues, torch.tensor([18.5, 5.5, 3.5, 5.0]).double())
    assert summary.condition_number == pytest.approx(18.5 / 3.5)
    assert summary.largest_gain == pytest.approx((5 / 3.5) ** 0.5)
    assert summary.n_damped == 1  # 1 / 3.5; but 3 / 5.5 is more than half, and 0 is null
    assert regularisation_summary(eigenvalues[:3], eigenvalues[:3]).n_damped == 0


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_whitened_spectrum_is_that_of_the_whitened_activations(
    kind: Literal["pca", "zca"],
) -> None:
    x = nasty(3000, 16).double()
    whitening = whitening_of(x[:2000], WhiteningConfig(kind=kind))
    expected = torch.linalg.eigvalsh(torch.cov(whitening.whiten(x[2000:]).T))
    found = whitened_spectrum(whitening.W, torch.cov(x[2000:].T))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # of some directions
    some = whitened_spectrum(whitening.W[:, 3:7], torch.cov(x[2000:].T))
    z = whitening.whiten(x[2000:])[:, 3:7]
    torch.testing.assert_close(some, torch.linalg.eigvalsh(torch.cov(z.T)), rtol=1e-9, atol=1e-9)


def test_whiteness() -> None:
    z = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = torch.cov(z.T)
    summary = whiteness_summary(torch.linalg.eigvalsh(covariance))
    assert summary.distance == pytest.approx(float((covariance - torch.eye(6)).norm()) / 6**0.5)
    assert summary.mean == pytest.approx(float(covariance.diagonal().mean()))
    assert summary.largest == pytest.approx(float(torch.linalg.matrix_norm(covariance, 2)))
    assert summary.smallest == pytest.approx(float(torch.linalg.matrix_norm(covariance, -2)))
