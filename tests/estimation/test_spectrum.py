"""Figures of covariance spectra, on cases whose answer is known by hand."""

import math
from typing import Literal

import pytest
import torch

from sae_whiten import WhiteningConfig
from sae_whiten.estimation.spectrum import (
    directions_for_share,
    null_tolerance,
    regularisation_summary,
    spectrum_summary,
    whitened_spectrum,
    whiteness_summary,
)
from tests.support import nasty, whitening_of


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
    least = 4 * null_tolerance(3)
    eigenvalues = torch.tensor([4.0, 2 * least, least / 2], dtype=torch.float64)
    assert spectrum_summary(eigenvalues).n_null == 1


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
