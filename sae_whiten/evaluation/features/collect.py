"""What is kept of latents while activations stream by: memory does not grow with the tokens.

Nothing here knows models or texts, only tensors of token ids and activations.
"""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

__all__ = ["Collector", "TopSequences"]

N_BINS = 40


class TopSequences:
    """The sequences with the highest scores, for each of some latents, cut to a window.

    Of equal scores the earlier sequence goes first.

    Attributes:
        scores: In descending order, -inf where there are fewer sequences; shape (n_latents, k).
        tokens: Their token ids; shape (n_latents, k, window).
        activations: The latent's activations at these tokens; of the same shape.
        peaks: Position in the window that it was laid around; shape (n_latents, k).
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
        """Add sequences, of at least as many tokens as the window has.

        Args:
            scores: -inf leaves a sequence out.
            tokens: Token ids.
            activations: Of the latents.
            peaks: Position in each sequence that is to be within the window, with two thirds of
                the window before it where the sequence allows.
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
        counts: Tokens at which each latent is active, by the size of its activation: equal parts of
            the range from 0 to its largest; shape (n_latents, N_BINS).
        sums: Sums of the sizes of activations; shape (n_latents,), float64.
        top: Sequences with the largest activations.
        drawn: Sequences in which a latent fires, drawn at random.
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
            activations: Of the latents, 0 at tokens that do not count.
        """
        sizes = activations.abs()
        parts = sizes.flatten(1) / self._largest[:, None] * N_BINS
        # the largest itself belongs to the last part, and activations of a second pass of the model
        # may exceed it by rounding
        bins = parts.floor().clamp(max=N_BINS - 1).long()
        self.counts.scatter_add_(1, bins, (parts > 0).long())
        self.sums += sizes.flatten(1).double().sum(1)

        scores, peaks = sizes.max(dim=2)
        silent = scores == 0
        self.top.update(scores.masked_fill(silent, -torch.inf), tokens, activations, peaks)
        # by sequences first, so that the draw does not depend on how they are batched
        draw = torch.rand(scores.T.shape, generator=self._generator).T
        self.drawn.update(draw.masked_fill(silent, -torch.inf), tokens, activations, peaks)
