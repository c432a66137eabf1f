"""What SAEs see of a model, what they give back to it, and texts as the model reads them."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from sae_lens.saes.sae import SAE
from sae_lens.util import get_special_token_ids
from torch import Tensor

from sae_whiten.estimation.sources import Model, stopping_after
from sae_whiten.evaluation.metrics import _as_float64

__all__ = [
    "View",
    "batches_of_equal_length",
    "decoder_norms",
    "encode_decode",
    "encode_in_parts",
    "latent_scale",
    "run",
    "text_tokens",
    "why_no_next_token_loss",
    "worse_than_guessing",
]

_LATENTS_AT_ONCE = 2**25  # 128 MB in float32


@dataclass(frozen=True)
class View:
    """What an SAE sees of a model: SAEs with the same view see the same.

    Attributes:
        hook_name: Name of the hook.
        head: One head of a hook with a head dimension; None takes all.
        seqpos_slice: Positions of a sequence that count, as in SAELens' config.
        special: Tokens at which activations neither count nor are replaced.
    """

    hook_name: str
    head: int | None = None
    seqpos_slice: tuple[int | None, ...] = (None,)
    special: tuple[int, ...] = ()

    @classmethod
    def of(cls, sae: SAE[Any], tokenizer: Any) -> "View":
        """The view that the metadata of an SAE tell of.

        Where they do not say whether it was trained on special tokens, these do not count.
        """
        metadata = sae.cfg.metadata
        exclude = metadata.exclude_special_tokens
        if exclude is None or exclude is True:
            exclude = get_special_token_ids(tokenizer)
        return cls(
            hook_name=metadata.hook_name,  # pyright: ignore[reportArgumentType]
            head=metadata.hook_head_index,
            seqpos_slice=tuple(metadata.seqpos_slice or (None,)),
            special=tuple(sorted(exclude or ())),
        )

    def kept(self, tokens: Integer[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
        """Which positions count."""
        in_slice = torch.zeros_like(tokens, dtype=torch.bool)
        in_slice[:, slice(*self.seqpos_slice)] = True
        special = torch.tensor(self.special, dtype=tokens.dtype, device=tokens.device)
        return in_slice & ~torch.isin(tokens, special)

    def seen(self, activations: Float[Tensor, "batch seq *heads"]) -> Float[Tensor, "batch seq d"]:
        """What the SAE takes of the activations at the hook."""
        if self.head is not None:
            return activations[:, :, self.head]
        return activations.flatten(2)

    def check_width(self, name: str, sae: SAE[Any], x: Float[Tensor, "batch seq d"]) -> None:
        """Raise ValueError if the SAE, called `name`, takes activations of another width."""
        if x.shape[-1] != sae.cfg.d_in:
            raise ValueError(
                f"{name} takes activations of width {sae.cfg.d_in}, but {self.hook_name} has "
                f"{x.shape[-1]}: is it of another model?"
            )

    def with_replaced(
        self,
        activations: Float[Tensor, "batch seq *heads"],
        x_hat: Float[Tensor, "batch seq d"],
        kept: Bool[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq *heads"]:
        """Activations at the hook with reconstructions in the place of those that count."""
        new = activations.clone()
        part = new if self.head is None else new[:, :, self.head]
        part[kept] = x_hat[kept].reshape(-1, *part.shape[2:]).to(part)
        return new

    def ablated(
        self, activations: Float[Tensor, "batch seq *heads"]
    ) -> Float[Tensor, "batch seq *heads"]:
        """Activations at the hook with zeros, at every token, for what the SAE takes."""
        if self.head is None:
            return torch.zeros_like(activations)
        new = activations.clone()
        new[:, :, self.head] = 0
        return new


def run(
    model: Model, tokens: Integer[Tensor, "batch seq"], hook_names: Iterable[str], *, logits: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """One pass of the model.

    Args:
        model: As SAELens loads it.
        tokens: Token ids.
        hook_names: Hooks whose activations are wanted.
        logits: Whether these are wanted too; without, the pass ends after the last hook.

    Returns:
        Logits (empty if not wanted), and activations by the name of the hook.
    """
    names = list(dict.fromkeys(hook_names))
    activations: dict[str, Tensor] = {}

    def keep(name: str, acts: Tensor, hook: Any) -> None:
        activations[name] = acts

    # by the name it was asked for: hooks of a TransformerBridge call themselves something else
    hooks: list[Any] = [(name, partial(keep, name)) for name in names]
    options = {} if logits else stopping_after(model, names)
    output = model.run_with_hooks(tokens, fwd_hooks=hooks, **options)
    return output if logits else tokens.new_empty(0), activations


def encode_decode(
    sae: SAE[Any], x: Float[Tensor, "batch seq d"]
) -> Iterator[tuple[slice, Tensor, Float[Tensor, "some seq d"]]]:
    """Latents and reconstructions of some sequences at a time, as memory allows.

    Yields:
        Which sequences, their latents (dense, shape (some, seq, d_sae)), and their reconstructions.
    """
    for rows in _parts(sae, x):
        latents = sae.encode(x[rows].to(sae.device, sae.dtype))
        x_hat = sae.decode(latents)
        yield rows, latents.to_dense() if latents.is_sparse else latents, x_hat


def encode_in_parts(
    sae: SAE[Any], x: Float[Tensor, "batch seq d"]
) -> Iterator[tuple[slice, Float[Tensor, "some seq d_sae"]]]:
    """Latents of some sequences at a time, dense, as memory allows; and which sequences."""
    for rows in _parts(sae, x):
        latents = sae.encode(x[rows].to(sae.device, sae.dtype))
        yield rows, latents.to_dense() if latents.is_sparse else latents


def _parts(sae: SAE[Any], x: Float[Tensor, "batch seq d"]) -> list[slice]:
    step = max(1, _LATENTS_AT_ONCE // (x.shape[1] * sae.cfg.d_sae))
    return [slice(start, start + step) for start in range(0, len(x), step)]


@torch.no_grad()
def decoder_norms(sae: SAE[Any]) -> Float[Tensor, "d_sae"]:
    """Norms of the decoder's rows, float64."""
    return torch.linalg.vector_norm(_as_float64(sae.W_dec), dim=1)


def latent_scale(sae: SAE[Any]) -> Float[Tensor, "d_sae"]:
    """What latents have to be multiplied by to be coefficients of unit-norm decoder rows, float64.

    That is the norms of the rows, except for SAEs which decode by unit rows: TopK's family with
    rescale_acts_by_decoder_norm.
    """
    norms = decoder_norms(sae)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        return torch.ones_like(norms)
    return norms


def text_tokens(
    tokenizer: Any,
    texts: Sequence[str],
    context_size: int,
    prepend_bos: bool,
    *,
    keep_end: bool = False,
) -> list[list[int]]:
    """Token ids of each text, cut to the context: its beginning, or with `keep_end` its end.

    Encoders get them between [CLS] and [SEP], other models behind BOS if `prepend_bos`.

    Raises:
        ValueError: There is no tokenizer.
    """
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: texts cannot be given to it")
    start, end = [], []
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        start, end = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    elif prepend_bos and tokenizer.bos_token_id is not None:
        start = [tokenizer.bos_token_id]
    n = context_size - len(start) - len(end)
    # not verbose about long ones: they are cut
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    kept = slice(-n, None) if keep_end else slice(n)
    return [[*start, *text[kept], *end] for text in ids]


def batches_of_equal_length(tokens: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of sequences to be given to a model together.

    SAELens' wrapper of Hugging Face models takes no attention mask, without which padding would
    change what an encoder makes of the other tokens; so there is none.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, ids in enumerate(tokens):
        by_length[len(ids)].append(i)
    return [
        indices[start : start + batch_size]
        for _, indices in sorted(by_length.items())
        for start in range(0, len(indices), batch_size)
    ]


@torch.no_grad()
def why_no_next_token_loss(model: Model, tokens: Integer[Tensor, "batch seq"]) -> str | None:
    """Why a model's loss on the next token would mean nothing, or None if it means something.

    Encoders see the token that is to be predicted; and transformers gives a model whose checkpoint
    has no language-modelling head one with random weights. The former is tried out, the latter
    told from the classes that the checkpoint's config names. See also `worse_than_guessing`.

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
        return "the model is no causal one: what it predicts of a token depends on later tokens"
    # where SAELens' wrapper of Hugging Face models and TransformerBridge have the model
    wrapped = getattr(model, "model", None) or getattr(model, "original_model", None)
    return _why_head_untrained(wrapped)


def _why_head_untrained(model: Any) -> str | None:
    """What the classes that the checkpoint's config names tell of a Hugging Face model's head."""
    names = getattr(getattr(model, "config", None), "architectures", None)
    if not names or any("LM" in name or "ConditionalGeneration" in name for name in names):
        return None
    base = {id(p) for p in getattr(model, model.base_model_prefix, model).parameters()}
    # a head that consists of the embeddings alone is not missing
    if all(id(p) in base for p in model.parameters()):
        return None
    return (
        "the model's language-modelling head has random weights, for its checkpoint is of a "
        f"{names[0]}, which has none"
    )


def worse_than_guessing(ce_loss: float, d_vocab: int) -> str | None:
    """Why a loss means nothing if it is above that of guessing evenly, or None if it is below."""
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
