"""Activations that SAEs read from a model and replace in it, and tokens of texts."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from sae_lens.saes.sae import SAE
from sae_lens.util import get_special_token_ids
from torch import Tensor

from sae_whiten._dtypes import as_float64
from sae_whiten.estimation.sources import Model, stopping_after

__all__ = [
    "View",
    "activations_of_texts",
    "batches_of_equal_length",
    "decoder_norms",
    "encode_decode",
    "encode_in_parts",
    "latent_scale",
    "mean_over_tokens",
    "require_kept_tokens",
    "run",
    "text_tokens",
]

_LATENTS_AT_ONCE = 2**25  # 128 MB in float32


@dataclass(frozen=True)
class View:
    """The activations that an SAE reads. SAEs with equal views read the same activations.

    Attributes:
        hook_name: Name of the hook.
        head: One head of a hook with a head dimension. None: all heads.
        seqpos_slice: Positions of a sequence to keep, as in SAELens' config.
        special: Tokens whose activations are neither evaluated nor replaced.
    """

    hook_name: str
    head: int | None = None
    seqpos_slice: tuple[int | None, ...] = (None,)
    special: tuple[int, ...] = ()

    @classmethod
    def of(cls, sae: SAE[Any], tokenizer: Any) -> "View":
        """The view in the metadata of an SAE.

        Special tokens are left out if the metadata do not say whether it was trained on them.
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
        """The positions to evaluate and to replace."""
        in_slice = torch.zeros_like(tokens, dtype=torch.bool)
        in_slice[:, slice(*self.seqpos_slice)] = True
        special = torch.tensor(self.special, dtype=tokens.dtype, device=tokens.device)
        return in_slice & ~torch.isin(tokens, special)

    def kept_in_words(self, context_size: int) -> str:
        """Which tokens of a sequence are kept. Equal words for views that keep equal tokens."""
        positions = range(context_size)[slice(*self.seqpos_slice)]
        words = "all positions"
        if len(positions) < context_size:
            words = f"positions {positions[0]} to {positions[-1]}" if positions else "no position"
            if len(positions) > 1 and positions.step != 1:
                words += f" in steps of {positions.step}"
        without = ", ".join(map(str, self.special))
        return words + (f", without tokens {without}" if without else "")

    def seen(self, activations: Float[Tensor, "batch seq *heads"]) -> Float[Tensor, "batch seq d"]:
        """The part of the activations at the hook that the SAE reads, with heads flattened."""
        if self.head is not None:
            return activations[:, :, self.head]
        return activations.flatten(2)

    def check_width(self, name: str, sae: SAE[Any], x: Float[Tensor, "batch seq d"]) -> None:
        """Raise ValueError if the SAE, called `name`, has another input width."""
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
        """Activations at the hook, with reconstructions at the kept positions."""
        new = activations.clone()
        part = new if self.head is None else new[:, :, self.head]
        part[kept] = x_hat[kept].reshape(-1, *part.shape[2:]).to(part)
        return new

    def ablated(
        self, activations: Float[Tensor, "batch seq *heads"]
    ) -> Float[Tensor, "batch seq *heads"]:
        """Activations at the hook, with zeros at every token for the part that the SAE reads."""
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
        hook_names: Hooks whose activations to return.
        logits: Whether to return logits. If not, the pass stops after the last hook.

    Returns:
        Logits (empty if not requested), and activations by the name of the hook.
    """
    names = list(dict.fromkeys(hook_names))
    activations: dict[str, Tensor] = {}

    def keep(name: str, acts: Tensor, hook: Any) -> None:
        activations[name] = acts

    # keyed by the requested name: in a TransformerBridge, `hook.name` differs from it
    hooks: list[Any] = [(name, partial(keep, name)) for name in names]
    options = {} if logits else stopping_after(model, names)
    output = model.run_with_hooks(tokens, fwd_hooks=hooks, **options)
    return output if logits else tokens.new_empty(0), activations


def encode_decode(
    sae: SAE[Any], x: Float[Tensor, "batch seq d"]
) -> Iterator[tuple[slice, Tensor, Float[Tensor, "some seq d"]]]:
    """Latents and reconstructions of a few sequences at a time, to bound memory.

    Yields:
        Indices of the sequences, their latents (dense, shape (some, seq, d_sae)), and their
        reconstructions.
    """
    # a temporal SAE adds what it predicts from earlier tokens, which its decoder leaves out
    is_decoded = type(sae).forward is SAE.forward
    for rows in _parts(sae, x):
        x_in = x[rows].to(sae.device, sae.dtype)
        latents = sae.encode(x_in)
        x_hat = sae.decode(latents) if is_decoded else sae(x_in)
        yield rows, latents.to_dense() if latents.is_sparse else latents, x_hat


def encode_in_parts(
    sae: SAE[Any], x: Float[Tensor, "batch seq d"]
) -> Iterator[tuple[slice, Float[Tensor, "some seq d_sae"]]]:
    """Indices and dense latents of a few sequences at a time, to bound memory."""
    for rows in _parts(sae, x):
        latents = sae.encode(x[rows].to(sae.device, sae.dtype))
        yield rows, latents.to_dense() if latents.is_sparse else latents


def _parts(sae: SAE[Any], x: Float[Tensor, "batch seq d"]) -> list[slice]:
    step = max(1, _LATENTS_AT_ONCE // (x.shape[1] * sae.cfg.d_sae))
    return [slice(start, start + step) for start in range(0, len(x), step)]


@torch.no_grad()
def decoder_norms(sae: SAE[Any]) -> Float[Tensor, "d_sae"]:
    """Norms of the decoder rows, float64."""
    return torch.linalg.vector_norm(as_float64(sae.W_dec), dim=1)


def latent_scale(sae: SAE[Any]) -> Float[Tensor, "d_sae"]:
    """Factors that turn latents into coefficients of unit-norm decoder rows, float64.

    The factors are the norms of the rows. They are 1 for SAEs that already decode with unit rows:
    the TopK family with rescale_acts_by_decoder_norm.
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
    """Token ids of each text, cut to the context. Keeps the beginning, or the end if `keep_end`.

    For encoders, [CLS] and [SEP] are put around them. For other models, BOS is put in front if
    `prepend_bos`.

    Raises:
        ValueError: There is no tokenizer.
    """
    if tokenizer is None:
        raise ValueError("the model has no tokenizer, so it cannot read texts")
    start, end = [], []
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        start, end = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    elif prepend_bos and tokenizer.bos_token_id is not None:
        start = [tokenizer.bos_token_id]
    n = context_size - len(start) - len(end)
    # verbose=False: no warnings about long texts, which are cut below
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    kept = slice(-n, None) if keep_end else slice(n)
    return [[*start, *text[kept], *end] for text in ids]


def require_kept_tokens(
    views: Mapping[str, View],
    texts: Sequence[str],
    tokens: Sequence[Sequence[int]],
    context_size: int,
    unit: str,
) -> None:
    """Refuse texts to probe of which an SAE keeps no token.

    Args:
        views: The view of each SAE, by its name.
        texts: The texts.
        tokens: Their token ids.
        context_size: What they are cut to.
        unit: What can be left out if a text is refused: "such texts", or the name of a task.

    Raises:
        ValueError: There are such texts; says which, and of which SAE.
    """
    for name, view in views.items():
        special, kept = set(view.special), slice(*view.seqpos_slice)
        refused = [t for t, ids in zip(texts, tokens, strict=True) if special.issuperset(ids[kept])]
        if refused:
            raise ValueError(
                f"{len(refused)} of {len(texts)} texts to probe, such as {refused[0][:60]!r}, have "
                f"no token that {name} is evaluated on: at {view.hook_name}, "
                f"{view.kept_in_words(context_size)}. Leave out {unit} or this SAE"
            )


def batches_of_equal_length(tokens: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of sequences of equal length, in batches for the model.

    Equal lengths need no padding. SAELens' wrapper of Hugging Face models takes no attention mask,
    and without one, padding would change an encoder's activations at the other tokens.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, ids in enumerate(tokens):
        by_length[len(ids)].append(i)
    return [
        indices[start : start + batch_size]
        for _, indices in sorted(by_length.items())
        for start in range(0, len(indices), batch_size)
    ]


def activations_of_texts(
    model: Model,
    tokens: Sequence[Sequence[int]],
    hook_names: Iterable[str],
    batch_size: int,
) -> Iterator[tuple[list[int], Integer[Tensor, "batch seq"], dict[str, Tensor]]]:
    """Indices of texts, their tokens, and activations by the name of the hook, batch by batch."""
    device = next(model.parameters()).device
    for indices in batches_of_equal_length(tokens, batch_size):
        ids = torch.tensor([tokens[i] for i in indices], device=device)
        yield indices, ids, run(model, ids, hook_names, logits=False)[1]


def mean_over_tokens(
    values: Float[Tensor, "batch seq d"], kept: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch d"]:
    """Mean over the kept tokens of each text, float32, on the CPU."""
    weights = (kept / kept.sum(1, keepdim=True)).to(values.device, torch.float32)
    return torch.einsum("bsd,bs->bd", values.float(), weights).cpu()
