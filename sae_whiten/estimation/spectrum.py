"""Summaries of covariance eigenvalues: anisotropy, null directions, regularisation, whiteness.

Everything is computed in float64.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_whiten._dtypes import as_float64

__all__ = [
    "RegularisationSummary",
    "SpectrumSummary",
    "WhitenessSummary",
    "directions_for_share",
    "null_directions",
    "null_tolerance",
    "regularisation_summary",
    "spectrum_summary",
    "whitened_spectrum",
    "whiteness_summary",
]


@dataclass(frozen=True)
class SpectrumSummary:
    """How anisotropic activations are, from the eigenvalues of their covariance.

    Attributes:
        condition_number: Largest eigenvalue over the smallest; infinite if that is zero.
        condition_number_nonnull: The same over the directions that are not numerically null.
        n_null: Number of numerically null directions.
        top_share: Share of the largest eigenvalue in the total variance, in [1 / d, 1].
        participation_ratio: (sum l)^2 / sum l^2, in [1, d]: the effective number of directions; n
            if the variance is spread evenly over n of them.
    """

    condition_number: float
    condition_number_nonnull: float
    n_null: int
    top_share: float
    participation_ratio: float


def spectrum_summary(eigenvalues: Float[Tensor, "d"]) -> SpectrumSummary:
    """Summarise the eigenvalues of a covariance.

    Args:
        eigenvalues: Shape (d,), in any order. Negative ones, which eigensolvers return for singular
            matrices, count as zero.

    Raises:
        ValueError: There is no positive eigenvalue, or one is not finite.
    """
    values = as_float64(eigenvalues).cpu().clamp(min=0)
    if values.numel() == 0 or not values.isfinite().all() or not values.max() > 0:
        raise ValueError("a spectrum needs finite eigenvalues, at least one of them positive")
    null = null_directions(eigenvalues).cpu()
    largest, smallest = float(values.max()), float(values.min())
    return SpectrumSummary(
        condition_number=largest / smallest if smallest > 0 else float("inf"),
        condition_number_nonnull=largest / float(values[~null].min()),
        n_null=int(null.sum()),
        top_share=largest / float(values.sum()),
        participation_ratio=float(values.sum().square() / values.square().sum()),
    )


def directions_for_share(eigenvalues: Float[Tensor, "d"], share: float) -> int:
    """Number of directions, the largest first, that hold a share of the variance.

    Args:
        eigenvalues: Shape (d,), in any order; negative ones count as zero.
        share: In (0, 1).
    """
    values = as_float64(eigenvalues).clamp(min=0).sort(descending=True).values
    return int((values.cumsum(0) < share * values.sum()).sum()) + 1


@dataclass(frozen=True)
class RegularisationSummary:
    """How eps and shrinkage change the spectrum of a covariance.

    Attributes:
        condition_number: Largest regularised eigenvalue over the smallest.
        largest_gain: Largest factor by which whitening multiplies a direction, over that of a
            direction of average variance.
        n_damped: Number of non-null directions that have less than half of unit variance after
            whitening, because their eigenvalue is smaller than what was added to it.
    """

    condition_number: float
    largest_gain: float
    n_damped: int


def regularisation_summary(
    eigenvalues: Float[Tensor, "d"], regularised: Float[Tensor, "d"]
) -> RegularisationSummary:
    """Compare the eigenvalues of a covariance with those that whitening divides by.

    Args:
        eigenvalues: Shape (d,), in any order; `Whitening.covariance_eigenvalues`.
        regularised: Shape (d,), in the same order, positive; `Whitening.eigenvalues`.
    """
    variances = eigenvalues / regularised
    return RegularisationSummary(
        condition_number=float(regularised.max() / regularised.min()),
        largest_gain=float((eigenvalues.mean() / regularised.min()).sqrt()),
        n_damped=int(((variances < 0.5) & ~null_directions(eigenvalues)).sum()),
    )


def whitened_spectrum(
    W: Float[Tensor, "d k"], covariance: Float[Tensor, "d d"]
) -> Float[Tensor, "k"]:
    """Eigenvalues of the covariance W^T C W of whitened activations, ascending, float64.

    Args:
        W: Shape (d, k): columns of a whitening matrix.
        covariance: Shape (d, d): of activations that the whitening was not estimated from. (Those
            that it was estimated from are white by construction, however few they are.)
    """
    W = as_float64(W)
    return torch.linalg.eigvalsh(W.T @ as_float64(covariance) @ W)


@dataclass(frozen=True)
class WhitenessSummary:
    """How far whitened activations are from white, from the eigenvalues of their covariance.

    Attributes:
        mean: Mean eigenvalue, the variance of an average direction.
        smallest: Smallest eigenvalue.
        largest: Largest eigenvalue.
        distance: |C_z - I|_F / sqrt(k), the root mean square of the eigenvalues minus 1.
    """

    mean: float
    smallest: float
    largest: float
    distance: float


def whiteness_summary(eigenvalues: Float[Tensor, "k"]) -> WhitenessSummary:
    """Summarise the eigenvalues of a whitened covariance; see `whitened_spectrum`."""
    values = as_float64(eigenvalues)
    return WhitenessSummary(
        mean=float(values.mean()),
        smallest=float(values.min()),
        largest=float(values.max()),
        distance=float((values - 1).square().mean().sqrt()),
    )


def null_tolerance(d: int) -> float:
    """Share of the largest eigenvalue below which a covariance eigenvalue is numerically null.

    The usual tolerance for singular values in the numerical rank of a float32 matrix of width d,
    squared, because the eigenvalues of the covariance are their squares. Models compute activations
    in float32 or less, so smaller eigenvalues are rounding errors.
    """
    return (d * torch.finfo(torch.float32).eps) ** 2


def null_directions(eigenvalues: Float[Tensor, "d"]) -> Bool[Tensor, "d"]:
    """Which directions are numerically null: `null_tolerance` of the largest eigenvalue or less."""
    return eigenvalues <= null_tolerance(eigenvalues.numel()) * eigenvalues.max()
