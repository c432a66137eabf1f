"""On which tokens latents fire, and how well SAEs of several seeds agree on it.

Dictionaries can agree while their latents fire on other tokens: biases and thresholds decide that
too. So latents are also compared by their firing on held-out tokens. The measure is the mean
correlation coefficient of the firing: latents are matched one to one such that the sum of their
correlations over tokens is largest (Hungarian algorithm), and the matched correlations are
averaged. Correlations of latents' activations have been used since Bricken et al. (2023, "Towards
Monosemanticity") to match features of two SAEs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from sae_lens.config import HfDataset
from sae_lens.saes.sae import SAE
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array, vstack

from sae_whiten.estimation.sources import Model
from sae_whiten.evaluation.model_view import View, encode_in_parts, run
from sae_whiten.evaluation.saes import flat_heads
from sae_whiten.evaluation.tokens import Reading, token_batches

__all__ = ["FiringAgreement", "FiringMatrix", "firing_agreement", "held_out_firing"]

FiringMatrix: TypeAlias = Any
"""A `scipy.sparse.csr_array`, shape (n, d_sae), bool: on which of n tokens each latent fires. Any,
because scipy has no annotations."""


class FiringAgreement(NamedTuple):
    """Mean agreement of an SAE's firing with that of the other seeds.

    Attributes:
        value: Mean matched correlation, at most 1. Latents that fire on no token count as 0.
        null: The same after the tokens of one SAE were permuted, which leaves the firing rates as
            they are. It grows with the number of latents and shrinks with the number of tokens.
    """

    value: float
    null: float


@torch.no_grad()
def held_out_firing(
    saes: Mapping[str, SAE[Any]], model: Model, dataset: HfDataset, n_tokens: int, reading: Reading
) -> dict[str, FiringMatrix]:
    """On which tokens each latent fires. A latent fires where it is not zero.

    Args:
        saes: SAEs of one hook, with the same tokens left out.
        model: As SAELens loads it.
        dataset: Tokens or text that the SAEs were not trained on.
        n_tokens: Number of tokens to read.
        reading: How the model reads.

    Returns:
        By SAE: whether a latent fires, shape (n, d_sae), bool; n: tokens that are not left out.
    """
    views = {name: View.of(sae, model.tokenizer) for name, sae in saes.items()}
    hooks = {view.hook_name for view in views.values()}
    parts: dict[str, list[FiringMatrix]] = {name: [] for name in saes}
    with flat_heads(saes.values()):
        for tokens in token_batches(
            saes, model, dataset, n_tokens, reading, "Comparing the firing of seeds"
        ):
            _, activations = run(model, tokens, hooks, logits=False)
            for name, sae in saes.items():
                view = views[name]
                kept, x = view.kept(tokens), view.seen(activations[view.hook_name])
                for rows, latents in encode_in_parts(sae, x):
                    active = latents[kept[rows].to(latents.device)] != 0
                    parts[name].append(csr_array(active.cpu().numpy()))
    return {name: csr_array(vstack(some)) for name, some in parts.items()}


def firing_agreement(firing: Sequence[FiringMatrix]) -> list[FiringAgreement]:
    """Agreement of the firing of each SAE with that of all others.

    Args:
        firing: Whether a latent fires, shape (n, d_sae), bool, on the same tokens; one per seed.

    Returns:
        One result per SAE, in the same order. All have the null of the first two.

    Raises:
        ValueError: There are fewer than two SAEs, or their shapes differ.
    """
    shapes = {matrix.shape for matrix in firing}
    if len(firing) < 2 or len(shapes) > 1:
        raise ValueError(
            f"firing of {len(firing)} SAEs of shapes {sorted(shapes)}: agreement is one of two or "
            "more on the same tokens, with as many latents"
        )
    n = len(firing)
    agreement = np.zeros((n, n))
    for i in range(n):
        for j in range(i):
            agreement[i, j] = agreement[j, i] = _matched(firing[i], firing[j])
    order = np.random.default_rng(0).permutation(firing[0].shape[0])
    null = _matched(firing[0], firing[1][order])
    return [FiringAgreement(float(total / (n - 1)), null) for total in agreement.sum(1)]


def _matched(a: FiringMatrix, b: FiringMatrix) -> float:
    """Mean correlation of latents that are matched one to one such that its sum is largest."""
    correlations = _correlations(a, b)
    return float(correlations[linear_sum_assignment(correlations, maximize=True)].mean())


def _correlations(a: FiringMatrix, b: FiringMatrix) -> Float[ndarray, "d_sae d_sae"]:
    """Correlation over tokens of each latent of a with each of b; 0 if one of them never varies.

    In float32, as matrices of wide SAEs fill the memory; computed in float64, some rows at a time.
    """
    n = a.shape[0]
    rates = [matrix.sum(0) / n for matrix in (a, b)]
    deviations = [np.sqrt(rate * (1 - rate)) for rate in rates]
    factors = [np.divide(1, sd, out=np.zeros_like(sd), where=sd > 0) for sd in deviations]
    # numbers of tokens at which both fire
    found = (a.T.astype(np.float32) @ b.astype(np.float32)).toarray()
    for start in range(0, len(found), 1024):
        rows = slice(start, start + 1024)
        covariance = found[rows] / n - np.outer(rates[0][rows], rates[1])
        found[rows] = covariance * np.outer(factors[0][rows], factors[1])
    return found
