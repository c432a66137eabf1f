"""The effect on a language model's loss of replacing its activations by an SAE's reconstructions.

Meaningful only for models with a trained language-modelling head: `why_no_next_token_loss` and
`worse_than_guessing` say why it is not.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from sae_whiten._dtypes import as_float64
from sae_whiten.estimation.sources import Model

__all__ = [
    "ModelLoss",
    "ce_loss_score",
    "kl_divergence",
    "why_no_next_token_loss",
    "worse_than_guessing",
]

_BLOCK = 256  # tokens


@dataclass(frozen=True)
class ModelLoss:
    """Mean cross-entropy of the next token, and mean KL divergence, in nats per token.

    Attributes:
        clean: Cross-entropy of the unchanged model.
        with_sae: Cross-entropy with activations replaced by reconstructions.
        ablated: Cross-entropy with activations replaced by zeros.
        kl: Divergence of the model with reconstructions from the unchanged one.
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
    """CE loss score (loss recovered): how much of the loss due to ablation the SAE recovers.

    `(ce_ablated - ce_sae) / (ce_ablated - ce_clean)`: 1 if the SAE costs nothing, 0 if it is as bad
    as zero ablation, negative if it is worse.

    Args:
        ce_clean: Mean cross-entropy of the unchanged model, per token. All three values need the
            same unit, nats or bits.
        ce_sae: Mean cross-entropy with activations replaced by reconstructions.
        ce_ablated: Mean cross-entropy with activations replaced by zeros.

    Raises:
        ValueError: A value is negative or not finite, or ablation does not raise the loss. The
            latter happens if the head is untrained or the activations at the hook have no effect.
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

    `sum_v p_v (log p_v - log q_v)`, where p is of the unchanged model and q of the model with the
    SAE. The metric is the mean over all tokens that are not masked.

    Args:
        logits: Logits of the unchanged model, shape (..., vocab), any floating dtype. -inf marks an
            impossible token.
        sae_logits: Logits with activations replaced by reconstructions, same shape.

    Returns:
        Shape (...), float64; at least 0 up to rounding. Infinite where a possible token has become
        impossible.

    Raises:
        ValueError: The shapes differ.
    """
    if logits.shape != sae_logits.shape:
        raise ValueError(
            f"logits of shapes {tuple(logits.shape)} and {tuple(sae_logits.shape)}: they must be "
            "of the same tokens"
        )
    rows, sae_rows = (x.reshape(-1, x.shape[-1]) for x in (logits, sae_logits))
    # float64, because small divergences are differences of large terms; in blocks, because a
    # float64 copy of all logits would take several times their memory
    divergences = [
        _kl_divergence(as_float64(p), as_float64(q))
        for p, q in zip(rows.split(_BLOCK), sae_rows.split(_BLOCK), strict=True)
    ]
    return torch.cat(divergences).reshape(logits.shape[:-1])


def _kl_divergence(
    logits: Float[Tensor, "n vocab"], sae_logits: Float[Tensor, "n vocab"]
) -> Float[Tensor, "n"]:
    log_p, log_q = logits.log_softmax(-1), sae_logits.log_softmax(-1)
    # impossible tokens add 0, where the formula gives 0 * (-inf + inf)
    return torch.where(log_p == -math.inf, 0, log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def why_no_next_token_loss(model: Model, tokens: Integer[Tensor, "batch seq"]) -> str | None:
    """The reason why a model's next-token loss is meaningless, or None if it is meaningful.

    There are two reasons. Encoders see the token that they have to predict; this is tested on the
    tokens. Or transformers has initialised the language-modelling head at random because the
    checkpoint has none; the classes in the checkpoint's config show this. See also
    `worse_than_guessing`.

    Args:
        model: As SAELens loads it.
        tokens: Any text.
    """
    logits = _logits(model, tokens[:1])
    if logits is None:
        return "the model returns no logits"
    changed = tokens[:1].clone()
    changed[:, -1] = (changed[:, -1] + 1) % logits.shape[-1]
    others = _logits(model, changed)
    assert others is not None
    difference = (others - logits)[:, :-1].float().abs().max()
    if difference > 1e-2 * logits.float().std():
        return "the model is not causal: its predictions for a token depend on later tokens"
    # the attributes in which SAELens' wrapper and TransformerBridge hold the Hugging Face model
    wrapped = getattr(model, "model", None) or getattr(model, "original_model", None)
    return _why_head_untrained(wrapped)


def _why_head_untrained(model: Any) -> str | None:
    """The reason why a Hugging Face model's head is untrained, or None, from its config."""
    names = getattr(getattr(model, "config", None), "architectures", None)
    if not names or any("LM" in name or "ConditionalGeneration" in name for name in names):
        return None
    base = {id(p) for p in getattr(model, model.base_model_prefix, model).parameters()}
    # a head that is tied to the embeddings is not missing
    if all(id(p) in base for p in model.parameters()):
        return None
    return (
        "the model's language-modelling head has random weights, because its checkpoint is of a "
        f"{names[0]}, which has none"
    )


def worse_than_guessing(ce_loss: float, d_vocab: int) -> str | None:
    """The reason why a loss is meaningless, if uniform guessing is as good; otherwise None."""
    if ce_loss < math.log(d_vocab):
        return None
    return (
        f"the model's loss, {ce_loss:.2f}, is no less than that of guessing among {d_vocab} "
        f"tokens, {math.log(d_vocab):.2f}: its language-modelling head is not trained, or not for "
        "this text"
    )


def _logits(model: Model, tokens: Tensor) -> Tensor | None:
    logits = model(tokens)
    return logits if isinstance(logits, Tensor) else None
