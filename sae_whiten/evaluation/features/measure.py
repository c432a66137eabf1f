"""Measure latents for a page of features, in two passes over the tokens.

The first pass finds which latents fire and how strongly, and for two SAEs at which tokens. The
latents to show are chosen from this. The second pass collects their texts and histograms.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from sae_lens.config import HfDataset
from sae_lens.saes.sae import SAE
from torch import Tensor
from torch.nn.functional import cross_entropy

from sae_whiten._checks import FieldError, require_context, require_number
from sae_whiten.estimation.sources import Model
from sae_whiten.evaluation.features.options import FeatureOptions
from sae_whiten.evaluation.features.pairs import Matches, choose_pairs, draw
from sae_whiten.evaluation.features.result import Features, Latent, SAEFeatures, TextPiece
from sae_whiten.evaluation.features.subject import Space, Subject
from sae_whiten.evaluation.features.vocabulary import TokenTexts, Unembedding
from sae_whiten.evaluation.model_loss import why_no_next_token_loss, worse_than_guessing
from sae_whiten.evaluation.model_view import (
    View,
    encode_in_parts,
    latent_scale,
    run,
    text_tokens,
)
from sae_whiten.evaluation.saes import flat_heads
from sae_whiten.evaluation.tokens import Reading, token_batches
from sae_whiten.statistics import ActivationStatistics

__all__ = ["measure_features"]

logger = logging.getLogger(__name__)

# together, attention heads are often as wide as the residual stream
_OF_HEADS = re.compile(r"(^|\.)(hook_(rot_)?[qkvz]|[qkv]\.hook_out|o\.hook_in|[qkv]_proj)$")


@torch.no_grad()
def measure_features(
    saes: Mapping[str, SAE[Any]],
    model: Model,
    dataset: HfDataset | str,
    options: FeatureOptions | None = None,
    *,
    statistics: Mapping[str, ActivationStatistics] | None = None,
    **changed: Any,
) -> Features:
    """Top texts, histograms, logit effects, neighbours and matches of latents of one or two SAEs.

    For one SAE, memory does not grow with the number of tokens. For two SAEs, the tokens at which
    latents fire are kept: at most 2^25 firings each (2 million tokens at an L0 of 16).

    Args:
        saes: One or two SAEs for raw activations that SAELens loads, by name.
        model: As SAELens loads it.
        dataset: Tokens or text in a form that SAELens reads. It is read twice from its beginning.
        options: What to show; the defaults if None.
        statistics: Statistics of the activations by the name of the hook, for whitened coordinates.
            Missing ones are estimated from the activations read.
        changed: Fields of `FeatureOptions`, which replace those of `options`.

    Raises:
        FieldError: An option does not fit: the SAE lacks a latent, the model has no tokenizer for a
            text, or the context is longer than the model's.
        ValueError: There are not one or two SAEs. An SAE belongs to another model or hook, or is
            not for raw activations. The SAEs' metadata contradict each other. The dataset is
            shorter than one sequence, all its tokens are left out, or an activation is not finite.
    """
    options = replace(options or FeatureOptions(), **changed)
    if not 1 <= len(saes) <= 2:
        raise ValueError(f"{len(saes)} SAEs: features are shown of one or of two")
    reading = Reading.of(saes, model, options)
    require_number("context_size", reading.context_size)
    require_context(reading.context_size, model)
    options.check_latents(next(iter(saes.values())).cfg.d_sae)

    subjects = _subjects(saes, model, statistics or {})

    def batches(task: str) -> Iterator[_Batch]:
        for tokens in token_batches(saes, model, dataset, options.n_tokens, reading, task):
            yield _Batch(tokens, _kept(subjects, tokens), _seen(subjects, model, tokens))

    with flat_heads(saes.values()):
        texts = TokenTexts(model.tokenizer)
        asked = None
        if options.text is not None:
            asked = _AskedText(options.text, subjects, model, reading)
        n_read, why_no_logits = _survey(subjects, model, batches("Which latents fire"))
        if len(subjects) == 1:
            matches, matching = None, None
            shown = [_choose(subjects[0], options, asked and asked.ranked[0])]
        else:
            matches = Matches(subjects[0], subjects[1], options)
            shown, matching = choose_pairs(matches, options, asked and asked.ranked)
        for subject, indices in zip(subjects, shown, strict=True):
            subject.choose(indices, options, min(options.window, reading.context_size))
        for batch in batches("Reading texts"):
            for subject, x in zip(subjects, batch.x, strict=True):
                subject.collect(batch.tokens, x, batch.kept)

    unembedding = None if why_no_logits else Unembedding.of(model)
    results: list[SAEFeatures] = []
    for i, subject in enumerate(subjects):
        latents = subject.described(texts, unembedding)
        if asked is not None:
            asked.add_to(latents, i, texts)
        if matches is not None:
            matches.add_to(latents, i)
        results.append(subject.features(latents))
    return Features(results, options, why_no_logits, matching, n_read, reading.context_size)


@dataclass(frozen=True)
class _Batch:
    """Sequences, the mask of kept tokens, and the activations that each SAE reads."""

    tokens: Integer[Tensor, "batch seq"]
    kept: Bool[Tensor, "batch seq"]
    x: Sequence[Float[Tensor, "batch seq d"]]


def _subjects(
    saes: Mapping[str, SAE[Any]], model: Model, statistics: Mapping[str, ActivationStatistics]
) -> list[Subject]:
    subjects: list[Subject] = []
    spaces: dict[tuple[str, int | None], Space] = {}  # by hook and head
    for name, sae in saes.items():
        view = View.of(sae, model.tokenizer)
        given, d_in = statistics.get(view.hook_name), sae.cfg.d_in
        if given is not None and given.d_in != d_in:
            raise ValueError(
                f"the statistics of {view.hook_name} are of width {given.d_in}, but {name} takes "
                f"activations of width {d_in}"
            )
        space = spaces.setdefault((view.hook_name, view.head), Space(given, d_in))
        subjects.append(Subject(name, sae, view, space))
    return subjects


def _survey(
    subjects: Sequence[Subject], model: Model, batches: Iterator[_Batch]
) -> tuple[int, str | None]:
    """First pass: which latents fire, and the directions of all in whitened coordinates.

    Returns:
        The number of tokens read, and why logit effects are meaningless, if they are.

    Raises:
        ValueError: An activation is not finite, or no token of an SAE counts.
    """
    n_read, why_no_logits = 0, None
    for i, batch in enumerate(batches):
        if i == 0:
            why_no_logits = _why_no_logits(subjects, model, batch)
        by_space = {s.space: (s, x) for s, x in zip(subjects, batch.x, strict=True)}
        for space, (subject, x) in by_space.items():
            _check_finite(subject, x[batch.kept])
            space.update(x[batch.kept])
        for subject, x in zip(subjects, batch.x, strict=True):
            subject.survey(x, batch.kept, keep_firing=len(subjects) == 2)
        n_read += batch.tokens.numel()
    for subject in subjects:
        if subject.n_tokens == 0:
            raise ValueError(
                f"{subject.name}: no token counts; all are special or outside seqpos_slice"
            )
    for subject in subjects:
        subject.find_directions()
    return n_read, why_no_logits


def _check_finite(subject: Subject, x: Float[Tensor, "n d"]) -> None:
    if not x.isfinite().all():
        raise ValueError(
            f"the model's activations at {subject.view.hook_name} hold a NaN or an infinity"
        )


def _kept(
    subjects: Sequence[Subject], tokens: Integer[Tensor, "batch seq"]
) -> Bool[Tensor, "batch seq"]:
    """Mask of the tokens that all SAEs keep, so that firing can be compared."""
    return torch.stack([subject.view.kept(tokens) for subject in subjects]).all(0)


def _seen(
    subjects: Sequence[Subject], model: Model, tokens: Integer[Tensor, "batch seq"]
) -> list[Float[Tensor, "batch seq d"]]:
    hooks = [subject.view.hook_name for subject in subjects]
    _, activations = run(model, tokens, hooks, logits=False)
    inputs = []
    for subject in subjects:
        x = subject.view.seen(activations[subject.view.hook_name])
        subject.view.check_width(subject.name, subject.sae, x)
        inputs.append(x)
    return inputs


def _why_no_logits(subjects: Sequence[Subject], model: Model, batch: _Batch) -> str | None:
    """The reason why logit effects would be meaningless, or None if they are meaningful."""
    why = why_no_next_token_loss(model, batch.tokens)
    if why is not None:
        return why
    tokens = batch.tokens[:4]  # logits are many
    logits = model(tokens)
    loss = float(cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()))
    why = worse_than_guessing(loss, logits.shape[-1])
    if why is not None:
        return why
    unembedding = Unembedding.of(model)
    if unembedding is None:
        return "the model's unembedding could not be located"
    d_model = unembedding.W_U.shape[0]
    for subject in subjects:
        if subject.sae.cfg.d_in != d_model:
            return (
                f"{subject.view.hook_name} has activations of width {subject.sae.cfg.d_in}: it is "
                f"not in the residual stream, of width {d_model}, that logits are computed from"
            )
        if _OF_HEADS.search(subject.view.hook_name):
            return (
                f"{subject.view.hook_name} is inside the attention heads, not in the residual "
                "stream that logits are computed from"
            )
    return None


# --- which latents


def _choose(subject: Subject, options: FeatureOptions, ranked: Sequence[int] | None) -> list[int]:
    if options.latents is not None:
        return list(dict.fromkeys(options.latents))
    if ranked is not None:
        return list(ranked[: options.n_latents])
    return sorted(draw(subject.live, options.n_latents, options.seed))


class _AskedText:
    """A text, and the latents that fire in it.

    Attributes:
        ranked: For each SAE, the latents that fire, largest share in the reconstruction first.
    """

    def __init__(
        self, text: str, subjects: Sequence[Subject], model: Model, reading: Reading
    ) -> None:
        if model.tokenizer is None:
            raise FieldError("text", text, "the model has no tokenizer to read it with")
        (whole,), (self._ids,) = (
            text_tokens(model.tokenizer, [text], n, reading.prepend_bos)
            for n in (len(text.encode()) + 8, reading.context_size)
        )
        if len(whole) > len(self._ids):
            logger.warning("the text is cut to %d of its %d tokens", len(self._ids), len(whole))
        tokens = torch.tensor([self._ids], device=next(model.parameters()).device)
        kept = _kept(subjects, tokens)
        self._activations: list[Float[Tensor, "seq d_sae"]] = []
        self.ranked: list[list[int]] = []
        for subject, x in zip(subjects, _seen(subjects, model, tokens), strict=True):
            ((_, latents),) = encode_in_parts(subject.sae, x)
            activations = (latents[0] * kept[0, :, None].to(latents)).float().cpu()
            share = activations.abs().amax(0) * latent_scale(subject.sae).cpu()
            order = share.argsort(descending=True, stable=True)
            self.ranked.append(order[: int((share > 0).sum())].tolist())
            self._activations.append(activations)
        if not any(self.ranked):
            raise FieldError("text", text, "no latent fires in it")

    def add_to(self, latents: Mapping[int, Latent], side: int, texts: TokenTexts) -> None:
        pieces = tuple(texts.pieces(self._ids))
        for i, latent in latents.items():
            activations = self._activations[side][:, i]
            peak = int(activations.abs().argmax())
            latent.in_text = TextPiece(tuple(self._ids), pieces, tuple(activations.tolist()), peak)
