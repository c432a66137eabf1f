"""Metrics on cases whose answer is known by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_whiten.evaluation.metrics import (
    ExplainedVariance,
    LatentActivity,
    dead_latents,
    dense_latents,
    explained_variance,
    firing_rates,
    l0,
)

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
    with pytest.raises(ValueError, match=r"0 activations have no variance"):
        ExplainedVariance().compute()
    with pytest.raises(ValueError, match="3 activations have no variance"):
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
