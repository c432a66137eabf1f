"""Evaluate SAEs on a model: one pass over tokens and one over labelled texts for all of them.

Takes any SAEs for raw activations that SAELens loads, however they were trained.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from sae_lens.config import HfDataset
from sae_lens.saes.sae import SAE
from torch import Tensor
from torch.nn.functional import cross_entropy

from sae_whiten._checks import require_context
from sae_whiten.estimation.sources import Model
from sae_whiten.evaluation.catalogue import METRICS, Measured, attribute_metrics
from sae_whiten.evaluation.labels import LabelledTexts
from sae_whiten.evaluation.metrics import ExplainedVariance, LatentActivity
from sae_whiten.evaluation.model_loss import (
    ModelLoss,
    kl_divergence,
    why_no_next_token_loss,
    worse_than_guessing,
)
from sae_whiten.evaluation.model_view import (
    View,
    encode_decode,
    run,
)
from sae_whiten.evaluation.options import EvaluationOptions
from sae_whiten.evaluation.probe_saes import probe_saes
from sae_whiten.evaluation.sae_probes import ProbingTasks, probe_tasks
from sae_whiten.evaluation.saes import flat_heads
from sae_whiten.evaluation.setup import Setup
from sae_whiten.evaluation.tokens import token_batches
from sae_whiten.whitening import Whitening

__all__ = ["evaluate_saes"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate_saes(
    saes: Mapping[str, SAE[Any]],
    model: Model,
    dataset: HfDataset | str,
    labels: LabelledTexts | ProbingTasks | None = None,
    options: EvaluationOptions | None = None,
    *,
    spaces: Mapping[str, Whitening] | None = None,
    **changed: Any,
) -> list[dict[str, Any]]:
    """Core metrics, loss of the model and probing of SAEs on one model.

    The model reads the same sequences and texts for every SAE. An SAE's metadata decide the hook,
    and at which positions and special tokens it is not evaluated. Where this differs between the
    SAEs, a warning says so. A record has the SAE's `name`, `architecture`, `d_in`, `d_sae`,
    `model_name`, `hook_name` and whole `config`. It also has `n_tokens` (number of tokens evaluated
    on), `evaluated_on` (which tokens of a sequence, in words), `context_size`, `prepend_bos`,
    `excluded_tokens`, `labels` (source of the texts), `probing_seeds`, and `metrics`, numbers by
    name:

    - `explained_variance`, `l0`, `dead_latents`, `dense_latents` in the space of the activations.
      The last two are numbers of latents. Dense: active in more than a tenth of the tokens.
    - `ce_loss_score` and `kl`, with activations replaced by reconstructions. The score is computed
      from `ce_loss`, `ce_loss_with_sae` and `ce_loss_ablated` (all activations at the hook zero, as
      in SAELens and SAEBench). Losses and KL divergence are in nats per token.
    - `sparse_probing_top_K`, the mean over the attributes of the texts, and
      `sparse_probing_NAME_top_K` for each attribute. `residual_sparse_probing_...` uses channels of
      the activations instead of latents, and `full_probe_accuracy` all channels.
    - `sae_probes_auc_top_K` instead, for the tasks of `sae-probes`: test AUC, the mean over tasks.
    - `tpp_top_N` and `tpp_probe_accuracy`, on the first attribute if it has three values or more.
    - `scr_top_N`, `scr_denominator`, `scr_base_accuracy`, `scr_clean_accuracy`: means over disjoint
      pairs of values of the first attribute, with the second as the other attribute.
      `scr_min_denominator` is the smallest over the pairs.

    Probing metrics are means over `probe_seeds` seeds, each of which draws other rows, except for
    labels with two values, of which all rows are used every time. `repeats` has the single values,
    by metric and task.

    Metrics that would be meaningless are left out. `absent` then has the reason, under `ce_loss`
    (also for the KL divergence), `tpp` or `scr`.

    Args:
        saes: SAEs for raw activations, by their names in the records.
        model: As SAELens loads it: a HookedTransformer, a TransformerBridge, or its wrapper of
            Hugging Face models.
        dataset: Tokens or text that the SAEs were not trained on, in a form that SAELens reads.
        labels: Texts to probe with, or tasks of `sae-probes`. None: no probing.
        options: What to evaluate on, and how to probe; the defaults if None.
        spaces: Whitenings by the name of the SAE, for `explained_variance_of_loss`: explained
            variance in the space of the training loss.
        changed: Fields of `EvaluationOptions`, which replace those of `options`: n_tokens,
            context_size, prepend_bos, probe_seeds...

    Returns:
        A record for each SAE, in the order of `saes`.

    Raises:
        ValueError: An SAE belongs to another model or hook, or is not for raw activations. The
            SAEs' metadata contradict each other. A number is out of range. The dataset is shorter
            than one sequence. Or the last tokens of texts are to be probed, and an SAE is temporal.
    """
    if not saes:
        raise ValueError("no SAEs to evaluate")
    options = replace(options or EvaluationOptions(), **changed)
    seeds = range(options.seed, options.seed + options.probe_seeds)
    setup = Setup.of(saes, model, options)
    reading, views = setup.reading, setup.views
    require_context(reading.context_size, model)
    if isinstance(labels, ProbingTasks):
        labels.check(saes)
    evaluated_on = {name: v.kept_in_words(reading.context_size) for name, v in views.items()}
    _warn_of_different_tokens(evaluated_on)
    records: dict[str, dict[str, Any]] = {
        name: {
            "name": name,
            "architecture": sae.cfg.architecture(),
            "d_in": sae.cfg.d_in,
            "d_sae": sae.cfg.d_sae,
            "model_name": sae.cfg.metadata.model_name,
            "hook_name": views[name].hook_name,
            "context_size": reading.context_size,
            "prepend_bos": reading.prepend_bos,
            "evaluated_on": evaluated_on[name],
            "excluded_tokens": list(views[name].special),
            "probing_seeds": list(seeds),
        }
        for name, sae in saes.items()
    }
    with flat_heads(saes.values()):
        tokens = token_batches(
            saes, model, dataset, options.n_tokens, reading, "Evaluating on tokens"
        )
        measured = _measure_tokens(setup, tokens, spaces or {})
        metrics = list(METRICS)
        if isinstance(labels, ProbingTasks):
            probe_tasks(setup, measured, labels, seeds)
        elif labels is not None:
            metrics += attribute_metrics(labels.train.labels)
            probe_saes(setup, measured, labels, seeds, options.tpp_and_scr)
    for name, sae in saes.items():
        by_key = {metric.key: metric.compute(measured[name]) for metric in metrics}
        records[name] |= {
            "n_tokens": measured[name].variance.n_samples,
            "metrics": {key: value for key, value in by_key.items() if value is not None},
            "repeats": {
                metric.key: values
                for metric in metrics
                if metric.better and metric.repeats and (values := metric.repeats(measured[name]))
            },
            "absent": measured[name].absent,
            "config": sae.cfg.to_dict(),
        }
        if labels is not None:
            records[name]["labels"] = dict(labels.source)
    return list(records.values())


def _warn_of_different_tokens(evaluated_on: Mapping[str, str]) -> None:
    if len(set(evaluated_on.values())) > 1:
        logger.warning(
            "the SAEs are evaluated on different tokens, so their figures cannot be compared: %s. "
            "Their metadata decide: set exclude_special_tokens and seqpos_slice alike to compare",
            "; ".join(f"{name}: {words}" for name, words in evaluated_on.items()),
        )


# --- tokens: core metrics and the loss of the model


class _Loss:
    """Mean cross-entropy of the next token, and mean KL divergence from clean logits, in nats."""

    def __init__(self) -> None:
        self._ce, self._kl, self._n_ce, self._n_kl = 0.0, 0.0, 0, 0

    def update(
        self,
        tokens: Integer[Tensor, "batch seq"],
        kept: Bool[Tensor, "batch seq"],
        logits: Float[Tensor, "batch seq vocab"],
        clean: Float[Tensor, "batch seq vocab"] | None = None,
    ) -> None:
        """Add the kept tokens. A token's loss is the loss of predicting the next token from it."""
        # one sequence at a time, because logits take memory
        for i in range(len(tokens)):
            rows = logits[i, :-1][kept[i, :-1]].float()
            self._ce += float(cross_entropy(rows, tokens[i, 1:][kept[i, :-1]], reduction="sum"))
            self._n_ce += len(rows)
            if clean is not None:
                self._kl += float(kl_divergence(clean[i][kept[i]], logits[i][kept[i]]).sum())
                self._n_kl += int(kept[i].sum())

    @property
    def ce(self) -> float:
        return self._ce / max(self._n_ce, 1)

    @property
    def kl(self) -> float:
        return self._kl / max(self._n_kl, 1)


def _measure_tokens(
    setup: Setup,
    batches: Iterator[Integer[Tensor, "batch seq"]],
    spaces: Mapping[str, Whitening],
) -> dict[str, Measured]:
    """Explained variance, activity of the latents and loss of the model, in one pass."""
    saes, views, model = setup.saes, setup.views, setup.model
    variance = {name: ExplainedVariance() for name in saes}
    variance_of_loss = {name: ExplainedVariance() for name in spaces}
    activity = {name: LatentActivity() for name in saes}
    spliced = {name: _Loss() for name in saes}
    clean = {view: _Loss() for view in views.values()}
    ablated = {view: _Loss() for view in views.values()}
    d_vocab = 0
    absent: str | None = None
    for i, tokens in enumerate(batches):
        if i == 0:
            absent = why_no_next_token_loss(model, tokens)
        logits, activations = run(model, tokens, setup.hook_names, logits=absent is None)
        for name, sae in saes.items():
            view = views[name]
            kept, x = view.kept(tokens), setup.seen(name, activations)
            x_hat = torch.empty_like(x, dtype=torch.promote_types(x.dtype, sae.dtype))
            for rows, latents, output in encode_decode(sae, x):
                x_hat[rows] = output.to(x_hat.device)
                activity[name].update(latents[kept[rows].to(latents.device)])
            variance[name].update(x[kept], x_hat[kept])
            if name in spaces:
                both = (spaces[name].whiten(part[kept]) for part in (x, x_hat))
                variance_of_loss[name].update(*both)
            if absent is None:
                replace = partial(view.with_replaced, x_hat=x_hat, kept=kept)
                new = _logits_with(model, tokens, view, replace)
                spliced[name].update(tokens, kept, new, logits)
        if absent is None:
            for view in ablated:
                kept = view.kept(tokens)
                clean[view].update(tokens, kept, logits)
                ablated[view].update(tokens, kept, _logits_with(model, tokens, view, view.ablated))
            d_vocab = logits.shape[-1]

    measured = {
        name: Measured(variance[name], activity[name], variance_of_loss.get(name)) for name in saes
    }
    for name, view in views.items():
        why = absent or worse_than_guessing(clean[view].ce, d_vocab)
        if why is None and not ablated[view].ce > clean[view].ce:
            why = "zeros at the hook do not raise the model's loss: there is no loss to recover"
        if why is None:
            new = spliced[name]
            measured[name].loss = ModelLoss(clean[view].ce, new.ce, ablated[view].ce, new.kl)
        else:
            measured[name].absent["ce_loss"] = why
    return measured


def _logits_with(
    model: Model, tokens: Tensor, view: View, change: Callable[[Tensor], Tensor]
) -> Tensor:
    def hook(activations: Tensor, hook: Any) -> Tensor:
        return change(activations)

    return model.run_with_hooks(tokens, fwd_hooks=[(view.hook_name, hook)])
