"""Agreement of dictionaries that were trained with different seeds.

The measure is the mean correlation coefficient: directions are matched one to one such that the sum
of absolute cosines is largest (Hungarian algorithm), and the matched cosines are averaged (Paulo &
Belrose 2025, arXiv 2501.16615; Song et al. 2025, arXiv 2505.20254). The value of random
dictionaries is reported too; it grows with the number of directions.

Raw cosines mislead on anisotropic activations: all directions lie near the few of large variance,
and random ones agree almost as well as trained ones. So directions are compared after whitening.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_whiten._dtypes import as_float64
from sae_whiten.whitening import Whitening

__all__ = ["Stability", "mean_max_cosine", "stability"]


@dataclass(frozen=True)
class Stability:
    """Mean agreement of a dictionary with those of the other seeds.

    Attributes:
        whitened: Mean matched absolute cosine of directions in whitened coordinates, in [0, 1].
        whitened_null: The same for two random dictionaries of equal size, isotropic in whitened
            coordinates.
        raw: The same as `whitened`, in the space of the activations.
        raw_null: The same for the random dictionaries, mapped to the space of the activations.
    """

    whitened: float
    whitened_null: float
    raw: float
    raw_null: float


@torch.no_grad()
def stability(
    dictionaries: Sequence[Float[Tensor, "d_sae d"]], whitening: Whitening
) -> list[Stability]:
    """Agreement of each dictionary with all others.

    Args:
        dictionaries: Decoders, shape (d_sae, d), in the space of the activations; one per seed.
        whitening: The whitening of the activations, the same for all.

    Returns:
        One result per dictionary, in the same order.

    Raises:
        ValueError: There are fewer than two dictionaries, or their shapes differ.
    """
    shapes = {tuple(W_dec.shape) for W_dec in dictionaries}
    if len(dictionaries) < 2 or len(shapes) > 1:
        raise ValueError(
            f"{len(dictionaries)} dictionaries of shapes {sorted(shapes)}: agreement is one of two "
            "or more of the same shape"
        )
    generator = torch.Generator().manual_seed(0)
    size = next(iter(shapes))
    a, b = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    W_inv = whitening.W_inv.cpu()
    nulls = mean_max_cosine(a, b), mean_max_cosine(a @ W_inv, b @ W_inv)
    n = len(dictionaries)
    agreement = torch.zeros(2, n, n)
    for i in range(n):
        for j in range(i):
            pair = dictionaries[i], dictionaries[j]
            values = mean_max_cosine(*pair, whitening.W), mean_max_cosine(*pair)
            agreement[:, i, j] = agreement[:, j, i] = torch.tensor(values)
    means = (agreement.sum(2) / (n - 1)).T.tolist()
    return [Stability(whitened, nulls[0], raw, nulls[1]) for whitened, raw in means]


def mean_max_cosine(
    W_dec: Float[Tensor, "d_sae d_in"],
    features: Float[Tensor, "n_features d"],
    W: Float[Tensor, "d d"] | None = None,
) -> float:
    """Mean correlation coefficient (MCC): mean absolute cosine of features and decoder rows,
    matched one to one such that the sum is largest (Hungarian algorithm).

    With fewer latents than features, unmatched features count as 0.

    Args:
        W_dec: Shape (d_sae, d), decoder rows. Rows of zeros have cosine 0 with all features.
        features: Shape (n_features, d), directions in the same space.
        W: Shape (d, d), for example a whitening matrix of the activations. Both arguments are
            multiplied by it from the right before comparison. (All kinds of whitening give the same
            result: rotations cancel.)

    Returns:
        The MCC, in [0, 1].

    Raises:
        ValueError: The widths differ or there are no features.
    """
    if len(features) == 0 or W_dec.shape[1:] != features.shape[1:]:
        raise ValueError(
            f"decoder of shape {tuple(W_dec.shape)} against features of shape "
            f"{tuple(features.shape)}: there must be features, of the decoder's width"
        )
    rows, columns = _unit_rows(W_dec, W), _unit_rows(features, W)
    cosines = (columns @ rows.T).abs().cpu()
    matched = linear_sum_assignment(cosines.numpy(), maximize=True)
    return float(cosines[matched].sum()) / len(features)


def _unit_rows(vectors: Tensor, W: Tensor | None) -> Tensor:
    rows = as_float64(vectors.detach())
    if W is not None:
        rows = rows @ W.to(rows)
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)
