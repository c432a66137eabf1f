"""What a language model loses when an SAE's reconstruction takes the place of its activations.

These mean something only for models with a trained language-modelling head.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_whiten.evaluation.metrics import _as_float64

__all__ = ["ModelLoss", "ce_loss_score", "kl_divergence"]

_BLOCK = 256  # tokens


@dataclass(frozen=True)
class ModelLoss:
    """Mean cross-entropy of the next token, and mean KL divergence, in nats per token.

    Attributes:
        clean: Of the unchanged model.
        with_sae: With reconstructions in the place of activations.
        ablated: With zeros in the place of activations.
        kl: Of the model with reconstructions from the unchanged one.
    """

    clean: float
    with_sae: float
    ablated: float
    kl: float

    @property
    def score(self) -> float:
        """See `ce_loss_score`."""
        return ce_loss_score(self.clean, self.with_sae, self.ablated)


def ce_loss_score(ce_clean: float, ce_sae: float, ce_ablated: float) -> float:
    """Share of the loss that the activations save the model which their reconstruction saves too.

    `(ce_ablated - ce_sae) / (ce_ablated - ce_clean)`: 1 if the SAE costs nothing, 0 if it is as bad
    as no activations at all, negative if it is worse.

    Args:
        ce_clean: Mean cross-entropy of the unchanged model, in nats or bits per token, as long as
            all three are the same.
        ce_sae: The same with the reconstruction in place of the activations.
        ce_ablated: The same with zeros in place of the activations.

    Raises:
        ValueError: A value is negative or not finite, or ablation does not raise the loss, as with
            a model whose head is untrained or whose activations at that hook do not matter.
    """
    losses = {"ce_clean": ce_clean, "ce_sae": ce_sae, "ce_ablated": ce_ablated}
    for name, loss in losses.items():
        if not 0 <= loss < math.inf:
            raise ValueError(f"{name}={loss}: a cross-entropy is finite and not negative")
    if not ce_ablated > ce_clean:
        raise ValueError(
            f"zero ablation leaves a loss of {ce_ablated} where the unchanged model has "
            f"{ce_clean}: no loss to recover; is the language-modelling head trained?"
        )
    return (ce_ablated - ce_sae) / (ce_ablated - ce_clean)


@torch.no_grad()
def kl_divergence(
    logits: Float[Tensor, "*tokens vocab"], sae_logits: Float[Tensor, "*tokens vocab"]
) -> Float[Tensor, "*tokens"]:
    """KL divergence of the model with the SAE from the unchanged model, for every token, in nats.

    `sum_v p_v (log p_v - log q_v)` with p of the unchanged model. The metric is the mean over all
    tokens that are not masked.

    Args:
        logits: Of the unchanged model, shape (..., vocab), any floating dtype. -inf is a token that
            cannot occur.
        sae_logits: With the reconstruction in place of the activations, of the same shape.

    Returns:
        Shape (...), float64; at least 0 up to rounding, infinite where a token that can occur has
        become impossible.

    Raises:
        ValueError: The shapes differ.
    """
    if logits.shape != sae_logits.shape:
        raise ValueError(
            f"logits of shapes {tuple(logits.shape)} and {tuple(sae_logits.shape)}: they must be "
            "of the same tokens"
        )
    rows, sae_rows = (x.reshape(-1, x.shape[-1]) for x in (logits, sae_logits))
    # float64, as small divergences are differences of large terms; in blocks, as a float64 copy of
    # all logits of a large vocabulary is several times the size of the model's own
    divergences = [
        _kl_divergence(_as_float64(p), _as_float64(q))
        for p, q in zip(rows.split(_BLOCK), sae_rows.split(_BLOCK), strict=True)
    ]
    return torch.cat(divergences).reshape(logits.shape[:-1])


def _kl_divergence(
    logits: Float[Tensor, "n vocab"], sae_logits: Float[Tensor, "n vocab"]
) -> Float[Tensor, "n"]:
    log_p, log_q = logits.log_softmax(-1), sae_logits.log_softmax(-1)
    # impossible tokens add nothing, not 0 * (-inf + inf)
    return torch.where(log_p == -math.inf, 0, log_p.exp() * (log_p - log_q)).sum(-1)
