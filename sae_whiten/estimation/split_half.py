"""How many samples are enough: statistics that estimate their own error.

A whitener W estimated from n samples of Gaussian data inflates the variance of held-out data by
d / (n - d). Two independent halves A and B of the samples measure this for any distribution:
r = tr(W_A^T (C_B + D) W_A) / tr(W_A^T C_A W_A) - 1, averaged over both directions, is the inflation
of a half, and r / (2 + r) that of the whole, which has twice the samples. Heavy tails need several
times more samples, and raise r accordingly.

D = (m_A - m_B)(m_A - m_B)^T / 2, of the means of the halves. The covariance of a half that holds
few texts is taken about its own mean, and lacks the covariance of that mean over texts. D estimates
it without bias. Without D, halves of one text each agree, however different the texts are. With
fewer texts than dimensions the excess of the whole is more than r / (2 + r), but at most about r.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sae_whiten.statistics import ActivationStatistics

__all__ = ["SplitHalfStatistics", "samples_for_inflation"]


class SplitHalfStatistics:
    """Streaming statistics in two halves, to which batches are added in turn.

    Args:
        d_in: Width of the activations.
        on_nonfinite: As for `ActivationStatistics`.

    Attributes:
        d_in: Width of the activations.
        halves: The statistics of either half.
    """

    def __init__(self, d_in: int, on_nonfinite: Literal["raise", "skip"] = "raise") -> None:
        self.d_in = d_in
        self.halves = (
            ActivationStatistics(d_in, on_nonfinite),
            ActivationStatistics(d_in, on_nonfinite),
        )

    @classmethod
    def of(cls, first: ActivationStatistics, second: ActivationStatistics) -> "SplitHalfStatistics":
        """The statistics whose halves are these two objects; both are changed by `update`."""
        statistics = cls.__new__(cls)
        statistics.d_in, statistics.halves = first.d_in, (first, second)
        return statistics

    @property
    def n_samples(self) -> int:
        """Activations seen so far."""
        return sum(half.n_samples for half in self.halves)

    @property
    def n_skipped(self) -> int:
        """Activations left out because they were not finite."""
        return sum(half.n_skipped for half in self.halves)

    def update(self, batch: Float[Tensor, "*samples d"]) -> None:
        """Add a batch to the half with fewer samples; see `ActivationStatistics.update`."""
        first, second = self.halves
        half = first if first.n_samples <= second.n_samples else second
        half.update(batch, number=first.n_batches + second.n_batches)

    def merged(self) -> ActivationStatistics:
        """The statistics of all samples."""
        return self.halves[0].merge(self.halves[1])

    def inflation(self) -> float:
        """Relative excess variance of held-out activations whitened by the merged statistics.

        Infinite while a half has no more samples than dimensions.

        Raises:
            ValueError: All activations of a half are the same.
        """
        if min(half.n_samples for half in self.halves) <= self.d_in:
            return math.inf
        difference = self.halves[0].mean - self.halves[1].mean
        D = torch.outer(difference, difference) / 2
        a, b = (half.covariance for half in self.halves)
        # D has 1 / n of the variance within texts too
        whole_a, whole_b = (
            half.covariance * (1 - 1 / half.n_samples) + D.to(half.covariance)
            for half in self.halves
        )
        r = (_excess(a, whole_b) + _excess(b, whole_a)) / 2
        return r / (2 + r)


def samples_for_inflation(inflation: float, n_samples: int, tolerance: float) -> int:
    """Number of samples that would bring the inflation down to `tolerance`.

    From d / (n - d), with the effective number of dimensions d that explains `inflation`.
    """
    effective = n_samples / (1 + 1 / inflation)  # n_samples if the inflation is infinite
    return math.ceil(effective * (1 + 1 / tolerance))


def _excess(covariance: Float[Tensor, "d d"], other: Float[Tensor, "d d"]) -> float:
    """tr(W^T C_other W) / tr(W^T C W) - 1 for the whitener W of the covariance C.

    W W^T is the inverse of the covariance, so that no eigenvectors are needed.
    """
    d = covariance.shape[0]
    if not covariance.diagonal().mean() > 0:
        raise ValueError(
            "all activations are the same: it is the wrong hook, or the data provider is broken"
        )
    # avoids division by zero in directions without variance
    ridge = (
        1e-6
        * covariance.diagonal().mean()
        * torch.eye(d, dtype=covariance.dtype, device=covariance.device)
    )
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance + ridge))
    return float((inverse * other.to(covariance.device)).sum() / (inverse * covariance).sum()) - 1
