"""Tokens as text, and the tokens that a direction of the residual stream raises and lowers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_whiten.estimation.sources import Model

__all__ = ["TokenTexts", "Unembedding", "logit_effects"]

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_ROWS_AT_ONCE = 64


class TokenTexts:
    """The text of each token.

    A token decoded alone may lose the space before it, or get marks such as ##. So each token is
    decoded behind an ordinary one, whose text is then cut off.

    Args:
        tokenizer: Tokenizer of the model. None: show ids.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._anchor: list[int] = []
        if tokenizer is not None:
            self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]

    def __call__(self, token: int) -> str:
        """The text of one token."""
        if token not in self._known:
            self._known[token] = self._decode([token])
        return self._known[token]

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token of a sequence.

        If a character takes several tokens, the first token has it and the others are empty.
        """
        pieces = [self(token) for token in tokens]
        start = 0
        while start < len(pieces):
            stop = start
            while stop < len(pieces) and _UNKNOWN in pieces[stop]:
                stop += 1
                joint = self._decode(tokens[start:stop])
                if _UNKNOWN not in joint:
                    pieces[start:stop] = [joint] + [""] * (stop - start - 1)
                    break
            start = max(stop, start + 1)
        return pieces

    def _decode(self, tokens: Sequence[int]) -> str:
        if self._tokenizer is None:
            return "".join(f" {token}" for token in tokens)
        before = self._tokenizer.decode(self._anchor)
        return self._tokenizer.decode([*self._anchor, *tokens]).removeprefix(before)


@dataclass(frozen=True)
class Unembedding:
    """The map from directions of the residual stream after the last layer to changes in logits.

    Logits are `norm(x) @ W_U`. The norm may centre, multiplies by a gain, and divides by a scale
    that depends on x. The scale is left out, because it is the same for all tokens.

    Attributes:
        W_U: Shape (d_model, d_vocab), the unembedding.
        gain: Shape (d_model,), float32, gain of the norm before the unembedding.
        centres: Whether this norm subtracts the mean over dimensions.
    """

    W_U: Float[Tensor, "d_model d_vocab"]
    gain: Float[Tensor, "d_model"]
    centres: bool

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model) -> "Unembedding | None":
        """The unembedding of a model, or None if it has none."""
        W_U, norm = getattr(model, "W_U", None), getattr(model, "ln_final", None)
        if not isinstance(W_U, Tensor):  # SAELens' wrapper of a model of transformers
            wrapped: Any = getattr(model, "model", None)
            head = getattr(wrapped, "get_output_embeddings", lambda: None)()
            if head is None:
                return None
            W_U, norm = head.weight.T, _last_norm(wrapped)
        gain, centres = _gain_and_centring(norm, W_U)
        return cls(W_U.detach(), gain, centres)

    def logits(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """The change in logits per direction, up to the scale of the norm; float32."""
        x = directions.to(self.gain)
        if self.centres:
            x = x - x.mean(1, keepdim=True)
        return (x * self.gain) @ self.W_U.float()


def logit_effects(
    unembedding: Unembedding, directions: Float[Tensor, "n d_model"], k: int
) -> list[tuple[list[tuple[int, float]], list[tuple[int, float]]]]:
    """The tokens whose logits each direction raises and lowers most, and the changes.

    Args:
        unembedding: The unembedding of the model.
        directions: Directions in the residual stream.
        k: Number of tokens raised, and of tokens lowered.
    """
    by_direction = []
    for rows in directions.split(_ROWS_AT_ONCE):
        effects = unembedding.logits(rows).cpu()
        k = min(k, effects.shape[1])
        raised, lowered = effects.topk(k, dim=1), effects.topk(k, dim=1, largest=False)
        by_direction += [
            (_pairs(*up), _pairs(*down))
            for up, down in zip(zip(*raised, strict=True), zip(*lowered, strict=True), strict=True)
        ]
    return by_direction


def _pairs(values: Tensor, tokens: Tensor) -> list[tuple[int, float]]:
    return list(zip(tokens.tolist(), values.tolist(), strict=True))


def _last_norm(model: Any) -> nn.Module | None:
    """The norm before the head of a Hugging Face model: the last norm outside of all layers."""
    base = getattr(model, model.base_model_prefix, model)
    norms: Iterable[nn.Module] = (
        module
        for name, module in base.named_modules()
        if "norm" in type(module).__name__.lower()
        and not any(part.isdigit() for part in name.split("."))
    )
    return next(iter(reversed(list(norms))), None)


def _gain_and_centring(
    norm: nn.Module | None, W_U: Float[Tensor, "d_model d_vocab"]
) -> tuple[Float[Tensor, "d_model"], bool]:
    """The gain of a norm and whether it centres, measured by applying it.

    Weights have different names in different models, and Gemma adds 1 to them. The norm maps v of
    mean 0 and variance 1 to gain * v + bias, and -v to -gain * v + bias. If it centres, it maps
    v + 1 to the same vector as v.
    """
    d = W_U.shape[0]
    gain = torch.ones(d, device=W_U.device)
    if norm is None or isinstance(norm, nn.Identity):
        return gain, False
    v = torch.ones(d, device=W_U.device)
    v[1::2] = -1
    v = (v - v.mean()) / v.std(unbiased=False)

    def apply(x: Tensor) -> Tensor:
        return norm(x.to(W_U.dtype)[None, None])[0, 0].float()

    plus, minus = apply(v), apply(-v)
    centres = bool((apply(v + 1) - plus).norm() < 0.1 * (plus - minus).norm())
    return (plus - minus) / (2 * v), centres
