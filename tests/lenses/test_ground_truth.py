"""Scores against known features, on cases whose answer is known by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.synthetic.evals import mean_correlation_coefficient
from sklearn.metrics import f1_score

from sae_whiten.evaluation.stability import mean_max_cosine
from sae_whiten.lenses.synthetic.ground_truth import best_firing_f1, ground_truth_scores
from tests.support import nasty, whitening_of


def test_the_features_themselves_score_one_in_any_order_length_and_sign():
    features = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    decoder = features[order] * torch.linspace(-3, 5, 20)[:, None]
    assert mean_max_cosine(decoder, features) == pytest.approx(1, abs=1e-12)
    x = nasty(2000, 8)
    assert mean_max_cosine(decoder, features, whitening_of(x).W) == pytest.approx(1, abs=1e-12)


def test_a_latent_is_matched_once_and_features_without_a_partner_count_zero():
    e = torch.eye(3)
    assert mean_max_cosine(e[:2], e) == pytest.approx(2 / 3)
    assert mean_max_cosine(torch.stack([e[0], e[0], e[0]]), e) == pytest.approx(1 / 3)
    assert mean_max_cosine(torch.zeros(3, 3), e) == 0
    # greedy matching would take 0.9 first and be left with 0
    decoder = torch.tensor([[0.9, (1 - 0.81) ** 0.5, 0.0], [0.8, 0.0, 0.6]])
    features = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert mean_max_cosine(decoder, features) == pytest.approx((0.8 + (1 - 0.81) ** 0.5) / 2)


@given(st.integers(0, 10_000), st.integers(5, 30))
@settings(max_examples=20, deadline=None)
def test_without_whitening_it_is_the_mcc_of_sae_lens(seed, d_sae):
    g = torch.Generator().manual_seed(seed)
    decoder = torch.randn(d_sae, 6, generator=g, dtype=torch.float64)
    features = torch.randn(5, 6, generator=g, dtype=torch.float64)
    assert mean_max_cosine(decoder, features) == pytest.approx(
        mean_correlation_coefficient(decoder, features), abs=1e-12
    )


def test_only_the_covariance_decides_what_whitened_cosines_are():
    x = nasty(4000, 16)
    g = torch.Generator().manual_seed(0)
    decoder, features = torch.randn(2, 24, 16, generator=g, dtype=torch.float64)
    W = whitening_of(x).W
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64))[0]
    expected = mean_max_cosine(decoder, features, W)
    assert mean_max_cosine(decoder, features, W @ rotation) == pytest.approx(expected, abs=1e-9)
    # by hand: <a, b> = a C^-1 b, here with C^-1 = W W^T
    inverse = W @ W.T
    assert mean_max_cosine(decoder @ W, features @ W) == pytest.approx(expected, abs=1e-9)
    products = features @ inverse @ decoder.T
    lengths = [((v @ inverse) * v).sum(1).sqrt() for v in (features, decoder)]
    cosines = products.abs() / lengths[0][:, None] / lengths[1]
    assert expected <= float(cosines.amax(1).mean()) + 1e-9


def test_directions_drawn_at_random_score_high_in_the_raw_space_only():
    x = nasty(4000, 32)
    whitening = whitening_of(x)
    g = torch.Generator().manual_seed(0)
    decoder, features = torch.randn(2, 128, 32, generator=g, dtype=torch.float64) @ whitening.W_inv
    raw = mean_max_cosine(decoder, features)
    whitened = mean_max_cosine(decoder, features, whitening.W)
    isotropic = mean_max_cosine(*torch.randn(2, 128, 32, generator=g))
    assert raw > isotropic + 0.2
    assert whitened == pytest.approx(isotropic, abs=0.03)


def test_f1_by_hand():
    features = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    latents = torch.tensor([[0.1, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    f1 = best_firing_f1(latents, features)
    # latent 0: TP 1, FN 1: 2/3; latent 1: TP 2, FP 1: 4/5
    assert float(f1[0]) == pytest.approx(4 / 5)
    assert f1[1].isnan()


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_f1_is_scikit_learns_of_the_best_latent(seed):
    g = torch.Generator().manual_seed(seed)
    features = (torch.rand(200, 3, generator=g) < 0.3).float()
    latents = torch.randn(200, 5, generator=g).relu() * (torch.rand(5, generator=g) < 0.8)
    found = best_firing_f1(latents, features)
    for j in range(3):
        best = max(f1_score(features[:, j] > 0, latents[:, i] > 0) for i in range(5))
        assert float(found[j]) == pytest.approx(best)


def test_the_scores_together_leave_features_that_never_fire_out_of_f1():
    directions = torch.eye(3)
    fires = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    W = torch.eye(3, dtype=torch.float64)
    scores = ground_truth_scores(directions, directions, fires, fires, W)
    assert (scores.mcc, scores.f1, scores.raw_mcc) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="no feature fires"):
        ground_truth_scores(directions, directions, fires, 0 * fires, W)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5\)"):
        mean_max_cosine(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(ValueError, match="3 rows of latents against 4"):
        best_firing_f1(torch.ones(3, 4), torch.ones(4, 4))
