"""The measurements of one SAE during both passes over the tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from sae_lens.saes.sae import SAE
from scipy.sparse import csr_array
from torch import Tensor

from sae_whiten.evaluation.features.collect import Collector, TopSequences
from sae_whiten.evaluation.features.matching import nearest, unit_rows
from sae_whiten.evaluation.features.options import FeatureOptions
from sae_whiten.evaluation.features.result import Latent, Neighbour, SAEFeatures, TextPiece
from sae_whiten.evaluation.features.vocabulary import TokenTexts, Unembedding, logit_effects
from sae_whiten.evaluation.model_view import View, encode_in_parts
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.whitening import Whitening

__all__ = ["Space", "Subject"]

_N_LOGITS = 10  # tokens raised, and as many lowered
_N_NEIGHBOURS = 5
_MOST_FIRINGS = 2**25  # whose tokens are kept: 128 MB per SAE


class Space:
    """The statistics of the activations at one hook, and their whitening.

    Args:
        statistics: Statistics of the activations. None: estimate them from the activations read.
        d_in: Width of the activations.
    """

    def __init__(self, statistics: ActivationStatistics | None, d_in: int) -> None:
        self._estimating = statistics is None
        self._statistics = statistics or ActivationStatistics(d_in)

    def update(self, x: Float[Tensor, "n d"]) -> None:
        """Add activations to the estimate, unless statistics were given."""
        if self._estimating:
            self._statistics.update(x)

    def whitening(self) -> Whitening:
        """The whitening from the statistics, with the default config."""
        return Whitening.from_statistics(self._statistics)

    @property
    def source(self) -> str:
        n = f"{self._statistics.n_samples:,} activations"
        return f"estimated from the {n} read" if self._estimating else f"from statistics of {n}"


class Subject:
    """One SAE, and the measurements of its latents so far.

    Attributes:
        name: Name of the SAE.
        sae: The SAE.
        view: The activations that it reads.
        space: Their statistics.
        n_tokens: Number of tokens surveyed, those left out not counted.
        counts: Shape (d_sae,), number of these tokens at which each latent is active.
        largest: Shape (d_sae,), the largest |activation| of each latent, float32.
        firing: By batch, shape (n, d_sae): 1 where a latent is active, if that is kept.
        raw: Shape (d_sae, d), decoder directions of norm 1, once `find_directions` has set them.
        whitened: The same in whitened coordinates.
        shown: Indices of the latents for the second pass, once `choose` has set them.
        collector: Their texts and histograms, one row each, in this order.
    """

    def __init__(self, name: str, sae: SAE[Any], view: View, space: Space) -> None:
        self.name, self.sae, self.view, self.space = name, sae, view, space
        d_sae = sae.cfg.d_sae
        self.n_tokens = 0
        self.counts = torch.zeros(d_sae, dtype=torch.long)
        self.largest = torch.zeros(d_sae)
        self.firing: list[csr_array] = []
        self._n_firings = 0

    @property
    def live(self) -> Bool[Tensor, "d_sae"]:
        """Which latents are active at a token or more."""
        return self.counts > 0

    def facts(self) -> dict[str, Any]:
        """Facts about the SAE, by their names on the page."""
        cfg, metadata = self.sae.cfg, self.sae.cfg.metadata
        return {
            "architecture": cfg.architecture(),
            "model": metadata.model_name,
            "hook": self.view.hook_name
            + ("" if self.view.head is None else f", head {self.view.head}"),
            "width": cfg.d_in,
        }

    def survey(
        self, x: Float[Tensor, "batch seq d"], kept: Bool[Tensor, "batch seq"], keep_firing: bool
    ) -> None:
        """First pass: which latents fire, and how strongly."""
        for rows, latents in encode_in_parts(self.sae, x):
            counted = latents[kept[rows].to(latents.device)]
            if len(counted) == 0:
                continue
            self.counts += (counted != 0).sum(0).cpu()
            self.largest = self.largest.maximum(counted.abs().amax(0).float().cpu())
            self.n_tokens += len(counted)
            if keep_firing and self._n_firings < _MOST_FIRINGS:
                firing = csr_array((counted != 0).cpu().numpy(), dtype=np.int32)
                self.firing.append(firing)
                self._n_firings += firing.nnz

    def find_directions(self) -> None:
        """Set the decoder directions of norm 1, in raw and in whitened coordinates."""
        W_dec = self.sae.W_dec.detach().double().cpu()
        self.raw, self.whitened = unit_rows(W_dec), unit_rows(W_dec @ self.space.whitening().W)

    def choose(self, latents: Sequence[int], options: FeatureOptions, window: int) -> None:
        """Set the latents for the second pass."""
        self.shown = torch.tensor(list(latents), dtype=torch.long)
        self.collector = Collector(
            self.largest[self.shown],
            # more than needed, because texts may repeat
            2 * options.n_texts,
            2 * options.n_random_texts + options.n_texts,
            window,
            options.seed,
        )
        self._options = options

    def collect(
        self,
        tokens: Integer[Tensor, "batch seq"],
        x: Float[Tensor, "batch seq d"],
        kept: Bool[Tensor, "batch seq"],
    ) -> None:
        """Second pass: texts and histograms."""
        if len(self.shown) == 0:
            return
        tokens, kept = tokens.cpu(), kept.cpu()
        for rows, latents in encode_in_parts(self.sae, x):
            activations = latents[..., self.shown.to(latents.device)].float().cpu()
            activations = activations.masked_fill(~kept[rows][..., None], 0).movedim(2, 0)
            self.collector.update(tokens[rows], activations)

    def features(self, latents: Mapping[int, Latent]) -> SAEFeatures:
        """The results of the first pass over all latents, and these latents by number."""
        return SAEFeatures(
            self.name,
            self.facts(),
            self.n_tokens,
            self.counts.double() / self.n_tokens,
            dict(latents),
            self.space.source,
        )

    def described(self, texts: TokenTexts, unembedding: Unembedding | None) -> dict[int, Latent]:
        """The latents that are shown, by number."""
        collector, n_texts = self.collector, self._options.n_texts
        near = nearest(self.whitened[self.shown], self.whitened, _N_NEIGHBOURS, itself=self.shown)
        effects = None
        if unembedding is not None:
            device = unembedding.W_U.device
            effects = logit_effects(unembedding, self.raw[self.shown].to(device), _N_LOGITS)
        latents = {}
        for row, i in enumerate(self.shown.tolist()):
            n_firing = int(self.counts[i])
            top = _texts(collector.top, row, texts, n_texts)
            drawn = _texts(collector.drawn, row, texts)
            others = [text for text in drawn if text not in top]
            raised, lowered = ((), ()) if effects is None else effects[row]
            latents[i] = Latent(
                index=i,
                n_firing=n_firing,
                largest=float(self.largest[i]),
                mean=float(collector.sums[row]) / max(n_firing, 1),
                histogram=collector.counts[row].tolist(),
                texts=top,
                random_texts=others[: self._options.n_random_texts],
                raised=[(texts(token), effect) for token, effect in raised],
                lowered=[(texts(token), effect) for token, effect in lowered],
                neighbours=[
                    Neighbour(j, float(self.raw[i] @ self.raw[j]), cosine)
                    for j, cosine in zip(
                        near.indices[row].tolist(), near.values[row].tolist(), strict=True
                    )
                    if cosine > -torch.inf
                ],
            )
        return latents


def _texts(
    sequences: TopSequences, row: int, texts: TokenTexts, most: int | None = None
) -> list[TextPiece]:
    """Texts of one latent, without repetitions."""
    n = int((sequences.scores[row] > -torch.inf).sum())
    by_tokens: dict[tuple[int, ...], TextPiece] = {}
    for tokens, activations, peak in zip(
        sequences.tokens[row, :n].tolist(),
        sequences.activations[row, :n].tolist(),
        sequences.peaks[row, :n].tolist(),
        strict=True,
    ):
        ids = tuple(tokens)
        if ids not in by_tokens:
            by_tokens[ids] = TextPiece(ids, tuple(texts.pieces(ids)), tuple(activations), peak)
    return list(by_tokens.values())[:most]
