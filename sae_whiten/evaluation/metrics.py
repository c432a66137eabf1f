"""Metrics of sparse autoencoders and of covariance spectra, as functions of tensors.

Sums are float64. Every metric of an SAE exists as a function of one batch and as an accumulator for
evaluations that do not fit into memory; the two agree up to the rounding of float64.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "ExplainedVariance",
    "LatentActivity",
    "RegularisationSummary",
    "SpectrumSummary",
    "WhitenessSummary",
    "dead_latents",
    "dense_latents",
    "directions_for_share",
    "explained_variance",
    "firing_rates",
    "l0",
    "regularisation_summary",
    "spectrum_summary",
    "whitened_spectrum",
    "whiteness_summary",
]


class ExplainedVariance:
    """Explained variance, 1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2, batch by batch.

    The mean is that of all activations, not of each batch, and the denominator is updated by Chan's
    pairwise formula: a mean far from the origin neither inflates the figure nor cancels digits.

    Attributes:
        n_samples: Activations seen so far.

    Examples:
        >>> metric = ExplainedVariance()
        >>> metric.update(torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [4.0]]))
        >>> metric.compute()
        0.875
    """

    def __init__(self) -> None:
        self.n_samples = 0
        self._mean: Tensor | None = None
        self._scatter = 0.0
        self._residual = 0.0

    @torch.no_grad()
    def update(self, x: Float[Tensor, "*samples d"], x_hat: Float[Tensor, "*samples d"]) -> None:
        """Add a batch.

        Args:
            x: Activations, shape (n, d) or (batch, seq, d), any floating dtype, any device.
            x_hat: Their reconstructions, of the same shape.

        Raises:
            ValueError: The shapes differ, or differ from those before, or a value is not finite.
        """
        if x.shape != x_hat.shape:
            raise ValueError(
                f"activations of shape {tuple(x.shape)} and reconstructions of shape "
                f"{tuple(x_hat.shape)}: they must be the same"
            )
        rows, reconstructions = _rows(x), _rows(x_hat)
        if self._mean is not None and self._mean.shape != rows.shape[1:]:
            raise ValueError(f"width {rows.shape[1]} after batches of width {len(self._mean)}")
        n = len(rows)
        if n == 0:
            return
        mean = rows.mean(0).cpu()
        residual = float((rows - reconstructions).square().sum())
        scatter = float((rows - mean.to(rows.device)).square().sum())
        if not residual + scatter < float("inf"):
            raise ValueError("the activations or their reconstructions hold a NaN or an infinity")
        delta = mean if self._mean is None else mean - self._mean
        total = self.n_samples + n
        self._residual += residual
        self._scatter += scatter + float(delta.square().sum()) * (self.n_samples * n / total)
        self._mean = mean if self._mean is None else self._mean + delta * (n / total)
        self.n_samples = total

    def compute(self) -> float:
        """Explained variance so far: 1 is perfect, 0 is as good as predicting the mean.

        Raises:
            ValueError: All activations are the same, or there are none: no variance to explain.
        """
        if not self._scatter > 0:
            raise ValueError(f"{self.n_samples} activations without any variance: none to explain")
        return 1 - self._residual / self._scatter


class LatentActivity:
    """How many latents are active at once, and how often each of them is, batch by batch.

    A latent is active where it is not zero.

    Attributes:
        n_samples: Rows of latents seen so far.
    """

    def __init__(self) -> None:
        self.n_samples = 0
        self._counts: Tensor | None = None

    @torch.no_grad()
    def update(self, latents: Tensor) -> None:
        """Add a batch.

        Args:
            latents: Shape (n, d_sae) or (batch, seq, d_sae), dense or sparse COO, any dtype.

        Raises:
            ValueError: d_sae differs from that of the batches before.
        """
        if latents.is_sparse:
            latents = latents.to_dense()
        active = latents.reshape(-1, latents.shape[-1]) != 0
        counts = active.sum(0).cpu()
        if self._counts is not None and self._counts.shape != counts.shape:
            raise ValueError(f"{len(counts)} latents after batches of {len(self._counts)}")
        self._counts = counts if self._counts is None else self._counts + counts
        self.n_samples += len(active)

    @property
    def firing_rates(self) -> Float[Tensor, "d_sae"]:
        """Share of rows in which each latent is active, shape (d_sae,), float64, in [0, 1].

        Raises:
            ValueError: There are no rows.
        """
        if self._counts is None or self.n_samples == 0:
            raise ValueError("firing rates over no rows of latents")
        return self._counts.double() / self.n_samples

    @property
    def l0(self) -> float:
        """Mean number of active latents in a row.

        Raises:
            ValueError: There are no rows.
        """
        return float(self.firing_rates.sum())


def explained_variance(x: Float[Tensor, "*samples d"], x_hat: Float[Tensor, "*samples d"]) -> float:
    """Explained variance of one batch; shapes and errors as for `ExplainedVariance`."""
    metric = ExplainedVariance()
    metric.update(x, x_hat)
    return metric.compute()


def firing_rates(latents: Tensor) -> Float[Tensor, "d_sae"]:
    """Share of rows in which each latent is active; shapes and errors as for `LatentActivity`."""
    activity = LatentActivity()
    activity.update(latents)
    return activity.firing_rates


def l0(latents: Tensor) -> float:
    """Mean number of active latents in a row; shapes and errors as for `LatentActivity`."""
    return float(firing_rates(latents).sum())


def dead_latents(firing_rates: Float[Tensor, "d_sae"]) -> int:
    """Number of latents that were active in no row.

    It falls as the number of rows grows: compare SAEs on the same rows.
    """
    return int((firing_rates == 0).sum())


def dense_latents(firing_rates: Float[Tensor, "d_sae"], threshold: float = 0.1) -> int:
    """Number of latents that were active in more than a share `threshold` of the rows."""
    return int((firing_rates > threshold).sum())


@dataclass(frozen=True)
class SpectrumSummary:
    """How anisotropic activations are, from the eigenvalues of their covariance.

    Attributes:
        condition_number: Largest eigenvalue over the smallest; infinite if that is zero.
        condition_number_nonnull: The same over the directions that are not numerically null.
        n_null: Number of numerically null directions.
        top_share: Share of the largest eigenvalue in the total variance, in [1 / d, 1].
        participation_ratio: (sum l)^2 / sum l^2: the number of directions, in [1, d], among which
            the variance would have to be spread evenly to be as concentrated as it is.
    """

    condition_number: float
    condition_number_nonnull: float
    n_null: int
    top_share: float
    participation_ratio: float


def spectrum_summary(
    eigenvalues: Float[Tensor, "d"], null_rtol: float | None = None
) -> SpectrumSummary:
    """Summarise the eigenvalues of a covariance.

    Args:
        eigenvalues: Shape (d,), in any order. Negative ones, which eigensolvers return for singular
            matrices, count as zero.
        null_rtol: A direction is null if its eigenvalue is at most `null_rtol` times the largest.
            None takes `null_tolerance(d)`.

    Raises:
        ValueError: There is no positive eigenvalue, or one is not finite.
    """
    values = _as_float64(eigenvalues).cpu().clamp(min=0)
    if values.numel() == 0 or not values.isfinite().all() or not values.max() > 0:
        raise ValueError("a spectrum needs finite eigenvalues, at least one of them positive")
    null = null_directions(eigenvalues, null_rtol).cpu()
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
    values = _as_float64(eigenvalues).clamp(min=0).sort(descending=True).values
    return int((values.cumsum(0) < share * values.sum()).sum()) + 1


@dataclass(frozen=True)
class RegularisationSummary:
    """What eps and shrinkage make of the spectrum of a covariance.

    Attributes:
        condition_number: Largest regularised eigenvalue over the smallest.
        largest_gain: Largest factor by which whitening multiplies a direction, over that of a
            direction of average variance.
        n_damped: Number of directions that whitening leaves with less than half of unit variance,
            because their eigenvalue is smaller than what was added to it; null directions aside.
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
        W: Shape (d, k): the columns of a whitening matrix that are to be looked at.
        covariance: Shape (d, d): of activations that the whitening was not estimated from. (Those
            that it was estimated from are white by construction, however few they are.)
    """
    W = _as_float64(W)
    return torch.linalg.eigvalsh(W.T @ _as_float64(covariance) @ W)


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
    values = _as_float64(eigenvalues)
    return WhitenessSummary(
        mean=float(values.mean()),
        smallest=float(values.min()),
        largest=float(values.max()),
        distance=float((values - 1).square().mean().sqrt()),
    )


def null_tolerance(d: int) -> float:
    """Share of the largest eigenvalue below which a covariance eigenvalue is numerically null.

    The usual definition of the numerical rank of a float32 matrix of width d, for singular values,
    squared, because the eigenvalues of the covariance are squares of those: models compute
    activations in float32 or less, so what lies below is their rounding error.
    """
    return (d * torch.finfo(torch.float32).eps) ** 2


def null_directions(eigenvalues: Float[Tensor, "d"], null_rtol: float | None = None) -> Tensor:
    """Which directions are numerically null, shape (d,), bool; see `spectrum_summary`."""
    rtol = null_tolerance(eigenvalues.numel()) if null_rtol is None else null_rtol
    return eigenvalues <= rtol * eigenvalues.max()


def _rows(x: Tensor) -> Tensor:
    return _as_float64(x.reshape(-1, x.shape[-1]))


def _as_float64(x: Tensor) -> Tensor:
    # MPS has no float64
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)
