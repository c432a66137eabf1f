import math

import pytest
import torch

from sae_whiten import WhiteningConfig
from sae_whiten.estimation.split_half import SplitHalfStatistics, samples_for_inflation
from sae_whiten.training.scaler import CovarianceWhiteningScaler
from tests.support import nasty

D = 32


def split(n: int, seed: int = 0) -> SplitHalfStatistics:
    halves = SplitHalfStatistics(D)
    for batch in nasty(n, D, seed, torch.float64).split(16):
        halves.update(batch)
    return halves


def held_out_excess(halves: SplitHalfStatistics, covariance: torch.Tensor) -> float:
    """tr(W^T C W) / d - 1 for the whitener of all samples and the true covariance C."""
    inverse = torch.linalg.inv(halves.merged().covariance)
    return float((inverse * covariance).sum() / D) - 1


@pytest.mark.parametrize("per_dimension", [10, 30, 100])
def test_the_inflation_is_what_held_out_gaussian_data_shows(per_dimension):
    n = per_dimension * D
    g = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0]
    mix = torch.logspace(-1, 1, D, dtype=torch.float64)[:, None] * mix
    estimated, true = [], []
    for _ in range(20):
        halves = SplitHalfStatistics(D)
        for batch in (torch.randn(n, D, generator=g, dtype=torch.float64) @ mix).split(n // 10):
            halves.update(batch)
        estimated.append(halves.inflation())
        true.append(held_out_excess(halves, mix.T @ mix))
    difference = torch.tensor(estimated).mean() - torch.tensor(true).mean()
    spread = (torch.tensor(estimated).std() + torch.tensor(true).std()) / 20**0.5
    # the correction from a half to the whole holds for d << n; 10% of it at 10 per dimension
    assert abs(float(difference)) < 3 * float(spread) + 1 / per_dimension**2 * 10
    assert torch.tensor(true).mean() == pytest.approx(1 / (per_dimension - 1), rel=0.15)


@pytest.mark.parametrize("texts", [1, 2, 4])
def test_halves_of_few_texts_do_not_agree_if_texts_differ(texts):
    g = torch.Generator().manual_seed(0)
    estimated, true = [], []
    for _ in range(40):
        halves = SplitHalfStatistics(D)
        for _ in range(2 * texts):
            x = torch.randn(1000, D, generator=g, dtype=torch.float64)
            # a tenth of the variance is between texts
            text = torch.randn(D, generator=g, dtype=torch.float64)
            halves.update(0.9**0.5 * x + 0.1**0.5 * text)
        estimated.append(halves.inflation())
        true.append(held_out_excess(halves, torch.eye(D, dtype=torch.float64)))
    # without the difference of the means it would be 0.15 to 0.5 of the true excess
    ratio = float(torch.tensor(estimated).mean() / torch.tensor(true).mean())
    assert 0.6 < ratio < 1


def test_the_halves_together_are_all_samples():
    halves, x = split(1000), nasty(1000, D, 0, torch.float64)
    covariance = torch.cov(x.T)
    assert halves.n_samples == 1000
    assert {half.n_samples for half in halves.halves} == {496, 504}
    error = (halves.merged().covariance - covariance).norm() / covariance.norm()
    assert error < 1e-12


def test_too_few_samples_have_infinite_inflation_and_singular_ones_do_not():
    assert split(2 * D).inflation() == math.inf
    halves = SplitHalfStatistics(D)
    for batch in nasty(5000, D).split(50):
        batch[:, 3] = 1.0
        halves.update(batch)
    assert 0 < halves.inflation() < 0.05


def test_samples_for_inflation_inverts_the_gaussian_formula():
    n, d = 3000, 100
    assert samples_for_inflation(d / (n - d), n, 0.01) == pytest.approx(101 * d, rel=1e-9, abs=1)


@pytest.mark.parametrize("tolerance", [0.2, 0.05])
def test_estimation_ends_when_the_tolerance_is_reached(tolerance):
    x = nasty(40000, D)
    scaler = CovarianceWhiteningScaler(WhiteningConfig(tolerance=tolerance))
    scaler.estimate_whitening(D, iter(x.split(32)))
    assert scaler.statistics is not None
    n = scaler.statistics.n_samples
    # at the first look, 20 per dimension, Gaussian data have 5%
    assert n >= 20 * D
    assert n <= 20 * D + 32 if tolerance == 0.2 else n <= 1.5 * D * (1 + 1 / tolerance)


def test_giving_up_says_how_many_samples_would_do(caplog, monkeypatch):
    monkeypatch.setattr("sae_whiten.estimation.stopping.LIMIT_PER_DIMENSION", 25)
    scaler = CovarianceWhiteningScaler(WhiteningConfig(tolerance=0.001))
    scaler.estimate_whitening(D, iter(nasty(40000, D).split(32)))
    assert "more than the tolerance of 0.1%" in caplog.text
    (about,) = [int(w) for w in caplog.text.split() if w.isdigit() and int(w) > 25 * D]
    assert about == pytest.approx(1000 * D, rel=0.5)
