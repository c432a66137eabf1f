"""Two SAEs: match their latents, and choose those to show."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool
from scipy.sparse import csr_array, vstack
from torch import Tensor

from sae_whiten.evaluation.features.matching import (
    Nearest,
    chance_cosine,
    most_overlapping,
    nearest,
    overlaps,
)
from sae_whiten.evaluation.features.options import FeatureOptions
from sae_whiten.evaluation.features.result import Counterpart, Latent, Matching
from sae_whiten.evaluation.features.subject import Subject

__all__ = ["Matches", "choose_pairs", "draw"]


class Matches:
    """For every latent of two SAEs, the most similar latent of the other.

    Attributes:
        same_as: For each SAE, shape (d_sae,): index of the matching latent of the other SAE, -1 if
            there is none.
        chance: As in `Matching`.
        n_tokens: Number of tokens over which overlaps are counted.
    """

    def __init__(self, first: Subject, second: Subject, options: FeatureOptions) -> None:
        self.saes = (first, second)
        self.same_as: list[Tensor] = []
        self.chance: tuple[float, float] | None = None
        by_token = [csr_array(vstack(sae.firing)) for sae in self.saes]
        self.n_tokens = min(len(firing.indptr) - 1 for firing in by_token)
        self._firing = [csr_array(firing[: self.n_tokens].T) for firing in by_token]
        self._by_direction: list[Nearest] = []
        self._by_firing: list[tuple[np.ndarray, np.ndarray]] = []
        same_space = first.space is second.space
        for i, (sae, other) in enumerate((self.saes, self.saes[::-1])):
            indices, overlap = most_overlapping(
                self._firing[i], self._firing[1 - i], f"Matching {sae.name} by firing"
            )
            alike = (overlap >= options.match_overlap) & (overlap > 0)
            same = torch.from_numpy(np.where(alike, indices, -1))
            if same_space:
                near = nearest(
                    sae.whitened,
                    other.whitened,
                    1,
                    among=other.live,
                    task=f"Matching {sae.name} by direction",
                )
                parallel = near.values[:, 0] >= options.match_cosine
                same = torch.where(parallel, near.indices[:, 0], same)
                self._by_direction.append(near)
            self.same_as.append(torch.where(sae.live, same, -1))
            self._by_firing.append((indices, overlap))
        if same_space:
            a, b = (chance_cosine(sae.whitened, sae.live, options.seed) for sae in self.saes)
            self.chance = a, b

    def add_to(self, latents: Mapping[int, Latent], side: int) -> None:
        """Set the counterparts of latents of one SAE, the first (side 0) or the second (1)."""
        ours = list(latents)
        fires = self._by_firing[side][0][ours]
        points = self._by_direction[side].indices[ours, 0].numpy() if self._by_direction else None
        by_firing = self._counterparts(side, ours, fires)
        by_direction = None if points is None else self._counterparts(side, ours, points)
        for row, (i, latent) in enumerate(latents.items()):
            if not self.saes[side].live[i]:
                continue
            # with overlap 0 the index is arbitrary
            latent.by_firing = by_firing[row] if by_firing[row].overlap > 0 else None
            latent.by_direction = None if by_direction is None else by_direction[row]
            same = int(self.same_as[side][i])
            latent.same_as = None if same < 0 else same

    def _counterparts(self, side: int, ours: list[int], theirs: np.ndarray) -> list[Counterpart]:
        shares = overlaps(self._firing[side][ours], self._firing[1 - side][theirs])
        counterparts = [Counterpart(int(j), float(s)) for j, s in zip(theirs, shares, strict=True)]
        if not self._by_direction:
            return counterparts
        a, b = self.saes[side], self.saes[1 - side]
        raw = (a.raw[ours] * b.raw[theirs]).sum(1).tolist()
        whitened = (a.whitened[ours] * b.whitened[theirs]).sum(1).tolist()
        return [
            replace(one, cosine=cosine, whitened=white)
            for one, cosine, white in zip(counterparts, raw, whitened, strict=True)
        ]


def choose_pairs(
    matches: Matches, options: FeatureOptions, ranked: Sequence[Sequence[int]] | None
) -> tuple[list[list[int]], Matching]:
    """The latents of each SAE to show, and the list that each is in."""
    (first, second), (same_first, same_second) = matches.saes, matches.same_as
    shared = [same >= 0 for same in matches.same_as]
    part = max(1, options.n_latents // 4)  # pairs are two latents each
    if options.latents is not None:
        ours, theirs = list(dict.fromkeys(options.latents)), []
    elif ranked is not None:
        ours, theirs = (list(found[: max(1, options.n_latents // 2)]) for found in ranked)
    else:
        drawn = draw(shared[0], part, options.seed)
        ours = sorted(drawn) + sorted(draw(first.live & ~shared[0], part, options.seed))
        theirs = sorted(draw(second.live & ~shared[1], part, options.seed))
    both = [(i, int(same_first[i])) for i in ours if shared[0][i]]
    paired = {j for _, j in both}
    both += [(int(same_second[j]), j) for j in theirs if shared[1][j] and j not in paired]
    only_first = [i for i in ours if not shared[0][i]]
    only_second = [j for j in theirs if not shared[1][j]]
    shown = [
        list(dict.fromkeys([*(i for i, _ in both), *only_first])),
        list(dict.fromkeys([*(j for _, j in both), *only_second])),
    ]
    return shown, Matching(
        n_live=(int(first.live.sum()), int(second.live.sum())),
        n_matched=(int(shared[0].sum()), int(shared[1].sum())),
        both=both,
        only_first=only_first,
        only_second=only_second,
        chance=matches.chance,
        n_overlap_tokens=matches.n_tokens,
    )


def draw(among: Bool[Tensor, "d_sae"], n: int, seed: int) -> list[int]:
    """`n` of these latents, drawn at random, or all of them if there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    candidates = among.nonzero()[:, 0]
    return candidates[torch.randperm(len(candidates), generator=generator)][:n].tolist()
