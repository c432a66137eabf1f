"""Similarity of latents: the cosine of decoder directions, and the overlap of firing tokens."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from scipy.sparse import csr_array
from torch import Tensor
from tqdm.auto import tqdm

__all__ = ["Nearest", "chance_cosine", "most_overlapping", "nearest", "overlaps", "unit_rows"]

_AT_ONCE = 2**24  # cosines, 64 MB in float32


@dataclass(frozen=True)
class Nearest:
    """The k nearest latents of each latent.

    Attributes:
        indices: Shape (n, k), the nearest first.
        values: Shape (n, k), cosines; -inf if there are fewer than k.
    """

    indices: Integer[Tensor, "n k"]
    values: Float[Tensor, "n k"]


def unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows scaled to norm 1, float32. Rows of zeros stay zero."""
    x = x.double()
    largest = x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.nn.functional.normalize(x / largest, dim=1, eps=1e-30).float()


def nearest(
    rows: Float[Tensor, "n d"],
    others: Float[Tensor, "m d"],
    k: int,
    *,
    among: Bool[Tensor, "m"] | None = None,
    itself: Integer[Tensor, "n"] | None = None,
    task: str | None = None,
) -> Nearest:
    """The `k` others with the largest cosine with each row. Cosines are computed in blocks.

    Args:
        rows: Rows of norm 1.
        others: Rows of norm 1.
        k: Number of others to find.
        among: Mask of candidates among the others. None: all.
        itself: For each row, its own index among the others, which is left out.
        task: Name of a progress bar. None: no bar.
    """
    k = min(k, len(others))
    step = max(1, _AT_ONCE // max(1, len(others)))
    indices, values = [], []
    for start in tqdm(range(0, len(rows), step), desc=task, disable=task is None, leave=False):
        cosines = rows[start : start + step] @ others.T
        if among is not None:
            cosines[:, ~among] = -torch.inf
        if itself is not None:
            own_indices = itself[start : start + step, None]
            cosines.scatter_(1, own_indices, -torch.inf)
        best = cosines.topk(k, dim=1)
        indices.append(best.indices)
        values.append(best.values)
    if not indices:
        return Nearest(torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k))
    return Nearest(torch.cat(indices), torch.cat(values))


def chance_cosine(
    others: Float[Tensor, "m d"], among: Bool[Tensor, "m"], seed: int, n_draws: int = 256
) -> float:
    """Median, over random directions, of the largest cosine with any of the others.

    Args:
        others: Rows of norm 1, in whitened coordinates. Only there are isotropic random directions
            unrelated to the data.
        among: Mask of candidates among the others.
        seed: Seed of the directions.
        n_draws: Number of directions.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = unit_rows(torch.randn(n_draws, others.shape[1], generator=generator))
    return float(nearest(directions, others, 1, among=among).values[:, 0].median())


def most_overlapping(
    firing: csr_array, others: csr_array, task: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """For each latent, the one of the others with the largest overlap of firing tokens.

    Args:
        firing: Shape (n_latents, n_tokens), 1 where a latent fires.
        others: Shape (n_others, n_tokens), the same for the other latents.
        task: Name of a progress bar. None: no bar.

    Returns:
        Index of the other latent, and the overlap (Jaccard index): tokens at which both fire over
        tokens at which either fires. Where the overlap is 0, the index means nothing.
    """
    n_each, n_others = firing.sum(1), others.sum(1)
    by_token = others.T.tocsr()
    step = max(1, _AT_ONCE // max(1, len(n_others)))
    indices = np.zeros(len(n_each), dtype=np.int64)
    overlap = np.zeros(len(n_each))
    starts = range(0, len(n_each), step)
    for start in tqdm(starts, desc=task, disable=task is None, leave=False):
        both = (firing[start : start + step] @ by_token).tocoo()
        row, column = both.coords
        shares = np.zeros(both.shape)
        shares[row, column] = both.data / (n_each[start + row] + n_others[column] - both.data)
        indices[start : start + step] = shares.argmax(1)
        overlap[start : start + step] = shares.max(1)
    return indices, overlap


def overlaps(firing: csr_array, others: csr_array) -> np.ndarray:
    """Overlap, as in `most_overlapping`, of each row with the row of the same index."""
    both = firing.multiply(others).sum(1)
    either = firing.sum(1) + others.sum(1) - both
    return np.divide(both, either, out=np.zeros(len(both)), where=either > 0)
