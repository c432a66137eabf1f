"""Collect histograms and top sequences of latents in one pass, in constant memory.

Inputs are tensors of token ids and activations; models and texts are not needed.
"""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

__all__ = ["Collector", "TopSequences"]

N_BINS = 40


class TopSequences:
    """The k sequences with the highest scores for each latent, cut to a window.

    Ties go to the earlier sequence.

    Attributes:
        scores: Shape (n_latents, k), descending; -inf if there are fewer than k sequences.
        tokens: Shape (n_latents, k, window), token ids of the sequences.
        activations: Shape (n_latents, k, window), the latent's activations at these tokens.
        peaks: Shape (n_latents, k), position of the peak within the window.
    """

    def __init__(self, n_latents: int, k: int, window: int) -> None:
        self.scores = torch.full((n_latents, k), -torch.inf)
        self.tokens = torch.zeros(n_latents, k, window, dtype=torch.long)
        self.activations = torch.zeros(n_latents, k, window)
        self.peaks = torch.zeros(n_latents, k, dtype=torch.long)

    def update(
        self,
        scores: Float[Tensor, "n_latents batch"],
        tokens: Integer[Tensor, "batch seq"],
        activations: Float[Tensor, "n_latents batch seq"],
        peaks: Integer[Tensor, "n_latents batch"],
    ) -> None:
        """Add sequences. They need at least as many tokens as the window.

        Args:
            scores: Score of each sequence; -inf leaves it out.
            tokens: Token ids.
            activations: Activations of the latents.
            peaks: Position in each sequence around which the window is cut. If the sequence allows,
                two thirds of the window lie before it.
        """
        k, window = self.tokens.shape[1:]
        start = (peaks - 2 * window // 3).clamp(0, tokens.shape[1] - window)
        positions = start[..., None] + torch.arange(window)
        new_tokens = tokens.expand(len(scores), -1, -1).gather(2, positions)
        new_activations = activations.gather(2, positions)

        merged = torch.cat([self.scores, scores], dim=1)
        best = merged.sort(dim=1, descending=True, stable=True).indices[:, :k]
        rows = torch.arange(len(scores))[:, None]
        self.scores = merged[rows, best]
        self.tokens = torch.cat([self.tokens, new_tokens], dim=1)[rows, best]
        self.activations = torch.cat([self.activations, new_activations], dim=1)[rows, best]
        self.peaks = torch.cat([self.peaks, peaks - start], dim=1)[rows, best]


class Collector:
    """Histograms and texts of some latents of an SAE.

    Attributes:
        counts: Shape (n_latents, N_BINS), histogram of |activation| over active tokens, with equal
            bins from 0 to the largest.
        sums: Shape (n_latents,), float64, sums of |activation|.
        top: Sequences with the largest activations.
        drawn: Random sequences in which the latent fires.
    """

    def __init__(
        self, largest: Float[Tensor, "n_latents"], n_top: int, n_drawn: int, window: int, seed: int
    ) -> None:
        n = len(largest)
        self.counts = torch.zeros(n, N_BINS, dtype=torch.long)
        self.sums = torch.zeros(n, dtype=torch.float64)
        self.top = TopSequences(n, n_top, window)
        self.drawn = TopSequences(n, n_drawn, window)
        self._largest = largest.clamp(min=torch.finfo(torch.float32).tiny)
        self._generator = torch.Generator().manual_seed(seed)

    def update(
        self,
        tokens: Integer[Tensor, "batch seq"],
        activations: Float[Tensor, "n_latents batch seq"],
    ) -> None:
        """Add sequences.

        Args:
            tokens: Token ids.
            activations: Activations of the latents, 0 at tokens that are left out.
        """
        sizes = activations.abs()
        parts = sizes.flatten(1) / self._largest[:, None] * N_BINS
        # the last bin includes the largest activation, which a second pass of the model may exceed
        # by rounding
        bins = parts.floor().clamp(max=N_BINS - 1).long()
        self.counts.scatter_add_(1, bins, (parts > 0).long())
        self.sums += sizes.flatten(1).double().sum(1)

        scores, peaks = sizes.max(dim=2)
        silent = scores == 0
        self.top.update(scores.masked_fill(silent, -torch.inf), tokens, activations, peaks)
        # drawn sequence by sequence, so that the result does not depend on the batch size
        draw = torch.rand(scores.T.shape, generator=self._generator).T
        self.drawn.update(draw.masked_fill(silent, -torch.inf), tokens, activations, peaks)
