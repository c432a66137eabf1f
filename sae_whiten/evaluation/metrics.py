"""Metrics of sparse autoencoders, as functions of tensors.

Sums are float64. Each metric exists as a function of one batch and as an accumulator over batches.
The two agree up to the rounding of float64.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_whiten._dtypes import as_float64

__all__ = [
    "ExplainedVariance",
    "LatentActivity",
    "dead_latents",
    "dense_latents",
    "explained_variance",
    "firing_rates",
    "l0",
]


class ExplainedVariance:
    """Explained variance, 1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2, batch by batch.

    The mean is over all activations, not per batch. The denominator is updated by Chan's pairwise
    formula, so a mean far from the origin neither inflates the result nor costs digits.

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
            ValueError: The two shapes differ, the width differs from earlier batches, or a value is
                not finite.
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
            ValueError: There is no variance to explain: no activations, or all are the same.
        """
        if not self._scatter > 0:
            raise ValueError(f"{self.n_samples} activations have no variance to explain")
        return 1 - self._residual / self._scatter


class LatentActivity:
    """The number of active latents per row and the firing rate of each latent, batch by batch.

    A latent is active if it is not zero.

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
            ValueError: d_sae differs from earlier batches.
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

    The number falls as rows are added. Compare SAEs on the same rows.
    """
    return int((firing_rates == 0).sum())


def dense_latents(firing_rates: Float[Tensor, "d_sae"], threshold: float = 0.1) -> int:
    """Number of latents that were active in more than a share `threshold` of the rows."""
    return int((firing_rates > threshold).sum())


def _rows(x: Tensor) -> Tensor:
    return as_float64(x.reshape(-1, x.shape[-1]))
