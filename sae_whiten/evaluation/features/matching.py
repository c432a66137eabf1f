"""Which latents are alike: by the cosine of decoder directions, and by the tokens they fire at."""

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
    """The latents most alike to each of some latents.

    Attributes:
        indices: Of the others, the most alike first; shape (n, k).
        values: How alike; of the same shape. -inf where there are fewer than k.
    """

    indices: Integer[Tensor, "n k"]
    values: Float[Tensor, "n k"]


def unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows scaled to norm 1, float32; rows of zeros stay so."""
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
    """The `k` others of largest cosine with each row, never the whole matrix of cosines at once.

    Args:
        rows: Of norm 1.
        others: Of norm 1.
        k: How many.
        among: Which of the others may be found; None: all.
        itself: For each row, which of the others it is, to be left out.
        task: Name of a progress bar; None shows none.
    """
    k = min(k, len(others))
    step = max(1, _AT_ONCE // max(1, len(others)))
    indices, values = [], []
    for start in tqdm(range(0, len(rows), step), desc=task, disable=task is None, leave=False):
        cosines = rows[start : start + step] @ others.T
        if among is not None:
            cosines[:, ~among] = -torch.inf
        if itself is not None:
            own = itself[start : start + step, None]
            cosines.scatter_(1, own, -torch.inf)
        best = cosines.topk(k, dim=1)
        indices.append(best.indices)
        values.append(best.values)
    if not indices:
        return Nearest(torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k))
    return Nearest(torch.cat(indices), torch.cat(values))


def chance_cosine(
    others: Float[Tensor, "m d"], among: Bool[Tensor, "m"], seed: int, n_draws: int = 256
) -> float:
    """Median of the largest cosine that a random direction has with any of the others.

    Args:
        others: Of norm 1, in coordinates in which activations are white: there random directions
            are those that have nothing to do with the data.
        among: Which of the others count.
        seed: Of the directions.
        n_draws: How many directions.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = unit_rows(torch.randn(n_draws, others.shape[1], generator=generator))
    return float(nearest(directions, others, 1, among=among).values[:, 0].median())


def most_overlapping(
    firing: csr_array, others: csr_array, task: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The latent of others that fires most at the same tokens as each latent.

    Args:
        firing: 1 where a latent fires, shape (n_latents, n_tokens).
        others: The same of other latents, at the same tokens.
        task: Name of a progress bar; None shows none.

    Returns:
        Which latent, and the overlap: of the tokens at which either fires, the share at which both
        do (Jaccard's index), 0 if they share none.
    """
    n_each, n_others = firing.sum(1), others.sum(1)
    by_token = others.T.tocsr()
    step = max(1, _AT_ONCE // max(1, len(n_others)))
    found = np.zeros(len(n_each), dtype=np.int64)
    overlap = np.zeros(len(n_each))
    starts = range(0, len(n_each), step)
    for start in tqdm(starts, desc=task, disable=task is None, leave=False):
        both = (firing[start : start + step] @ by_token).tocoo()
        row, column = both.coords
        shares = np.zeros(both.shape)
        shares[row, column] = both.data / (n_each[start + row] + n_others[column] - both.data)
        found[start : start + step] = shares.argmax(1)
        overlap[start : start + step] = shares.max(1)
    return found, overlap


def overlaps(firing: csr_array, others: csr_array) -> np.ndarray:
    """Overlap of each row with the row of the same number, as `most_overlapping` has it."""
    both = firing.multiply(others).sum(1)
    either = firing.sum(1) + others.sum(1) - both
    return np.divide(both, either, out=np.zeros(len(both)), where=either > 0)
