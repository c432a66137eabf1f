"""Statistics of many hooks of a language model in one pass.

Tokens come from SAELens' `ActivationsStore`, so that they are the tokens that training will see;
statistics are updated inside the model's hooks, and the model stops after the last one. No
activation outlives the batch that it belongs to.
"""

import datetime
import fnmatch
import importlib.metadata
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from sae_lens.config import HfDataset
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name, get_special_token_ids
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedRootModule

from sae_whiten.split_half import SplitHalfStatistics, samples_for_inflation
from sae_whiten.statistics import ActivationStatistics, NonFiniteActivationsError

__all__ = ["fit_statistics", "match_hooks"]

logger = logging.getLogger(__name__)


def match_hooks(model: HookedRootModule, patterns: str | Sequence[str]) -> list[str]:
    """Hook names of a model that match glob patterns, in the order in which the model has them.

    Raises:
        ValueError: A pattern matches nothing; the message names hooks that resemble it.
    """
    names = list(model.hook_dict)
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            tail = pattern.rsplit(".", 1)[-1]
            similar = [name for name in names if name.endswith(tail)] or names
            raise ValueError(
                f"no hook matches {pattern!r}; this model has, for example, "
                f"{', '.join(similar[:5])}"
            )
        found.update(matches)
    return [name for name in names if name in found]


@torch.no_grad()
def fit_statistics(
    model: HookedRootModule,
    dataset: HfDataset | str,
    hook_names: str | Sequence[str],
    *,
    tolerance: float = 0.01,
    n_samples: int | None = None,
    max_samples: int | None = None,
    context_size: int = 128,
    batch_size_prompts: int = 32,
    prepend_bos: bool = True,
    seqpos_slice: tuple[int | None, ...] = (None,),
    exclude_special_tokens: bool | list[int] = False,
    hook_head_index: int | None = None,
    disable_concat_sequences: bool = False,
    sequence_separator_token: int | Literal["bos", "eos", "sep"] | None = "bos",
    streaming: bool = True,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, ActivationStatistics]:
    """Mean and covariance at every hook that matches, from one pass over the dataset.

    Ends when the split-half inflation of every hook is under `tolerance`, or at `max_samples` or
    the end of the dataset, then with a warning that says about how many samples would do.

    Args:
        model: As SAELens loads it: a HookedTransformer, a TransformerBridge, or its wrapper of
            Hugging Face models.
        dataset: A dataset, or a path for `datasets.load_dataset`, with tokens or with text.
        hook_names: Hook names or glob patterns, such as "blocks.*.hook_resid_pre".
        tolerance: Relative excess variance of held-out activations to be reached at every hook.
        n_samples: Take this many activations per hook instead.
        max_samples: Take at most this many; None: 2000 per dimension of the widest hook.
        context_size, prepend_bos, seqpos_slice, exclude_special_tokens, hook_head_index,
            disable_concat_sequences, sequence_separator_token, streaming: As in SAELens'
            `LanguageModelSAERunnerConfig`; use the values that training will use.
        batch_size_prompts: Sequences per forward pass.
        on_nonfinite: As for `ActivationStatistics`.
        provenance: Further entries for the provenance of the statistics, such as model_name.

    Returns:
        Statistics by hook name, with `provenance["inflation"]`.

    Raises:
        ValueError: A pattern matches no hook, or the dataset has no tokens.
        NonFiniteActivationsError: An activation is NaN or infinite; names the hook.
    """
    names = match_hooks(model, hook_names)
    store = _token_store(
        model,
        dataset,
        names[0],
        streaming=streaming,
        context_size=context_size,
        store_batch_size_prompts=batch_size_prompts,
        prepend_bos=prepend_bos,
        seqpos_slice=seqpos_slice,
        disable_concat_sequences=disable_concat_sequences,
        sequence_separator_token=sequence_separator_token,
    )
    special = _special_tokens(model, exclude_special_tokens)
    statistics: dict[str, SplitHalfStatistics] = {}
    keep: Tensor | None = None

    def update(acts: Tensor, hook: Any) -> None:
        rows = acts[:, slice(*seqpos_slice)]
        if hook_head_index is not None:
            rows = rows[:, :, hook_head_index]
        rows = rows.flatten(2).flatten(0, 1)
        if keep is not None:
            rows = rows[keep.to(rows.device)]
        name = hook.name
        if name not in statistics:
            statistics[name] = SplitHalfStatistics(rows.shape[-1], on_nonfinite)
        try:
            statistics[name].update(rows)
        except NonFiniteActivationsError as error:
            raise NonFiniteActivationsError(f"hook {name}: {error}") from error

    hooks: list[Any] = [(name, update) for name in names]
    options = _stopping_after(model, names)
    inflation: dict[str, float] = {}
    next_check = 0
    with tqdm(desc=f"Fitting {len(names)} hooks", unit=" tokens") as bar:
        while True:
            try:
                tokens = store.get_batch_tokens(raise_at_epoch_end=True)
            except StopIteration:
                logger.warning("the dataset ended after %d activations per hook", bar.n)
                break
            sliced = tokens[:, slice(*seqpos_slice)].flatten()
            keep = None if special is None else ~torch.isin(sliced, special.to(sliced.device))
            model.run_with_hooks(tokens, fwd_hooks=hooks, **options)
            n = min(half.n_samples for half in statistics.values())
            bar.update(n - bar.n)
            if n_samples is not None:
                if n >= n_samples:
                    break
                continue
            if n >= next_check:
                inflation = {name: half.inflation() for name, half in statistics.items()}
                worst = max(inflation.values())
                bar.set_postfix(inflation=f"{worst:.2%}", wanted=f"{tolerance:.2%}")
                # an eigendecomposition per hook costs as much as many updates
                next_check = math.ceil(1.2 * n)
                if worst <= tolerance:
                    break
            widest = max(half.d_in for half in statistics.values())
            if n >= (max_samples or 2000 * widest):
                break
    return _finished(
        statistics,
        tolerance if n_samples is None else None,
        {
            "context_size": context_size,
            "prepend_bos": prepend_bos,
            "seqpos_slice": list(seqpos_slice),
            "exclude_special_tokens": exclude_special_tokens,
            "hook_head_index": hook_head_index,
            "disable_concat_sequences": disable_concat_sequences,
            "sequence_separator_token": sequence_separator_token,
            **(provenance or {}),
        },
    )


def _finished(
    statistics: Mapping[str, SplitHalfStatistics],
    tolerance: float | None,
    provenance: dict[str, Any],
) -> dict[str, ActivationStatistics]:
    """Merge the halves, warn where they are too few, and record where they came from."""
    provenance.setdefault("date", datetime.datetime.now(datetime.timezone.utc).isoformat())
    for package in ("sae-whiten", "sae-lens", "transformer-lens", "torch"):
        try:
            provenance.setdefault(f"{package}_version", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
    merged = {}
    for name, halves in statistics.items():
        inflation = halves.inflation()
        if tolerance is not None and inflation > tolerance:
            needed = samples_for_inflation(inflation, halves.n_samples, tolerance)
            logger.warning(
                "%s: inflation %.2f%% after %d activations, above the tolerance of %.2f%%; about "
                "%d activations would do",
                name,
                100 * inflation,
                halves.n_samples,
                100 * tolerance,
                needed,
            )
        merged[name] = halves.merged()
        merged[name].provenance = {**provenance, "hook_name": name, "inflation": inflation}
    return merged


def _token_store(
    model: HookedRootModule, dataset: HfDataset | str, hook_name: str, **options: Any
) -> ActivationsStore:
    """A store of which only the tokens are used."""
    return ActivationsStore(
        model=model,
        dataset=dataset,
        hook_name=hook_name,
        hook_head_index=None,
        d_in=1,
        n_batches_in_buffer=1,
        total_training_tokens=0,
        train_batch_size_tokens=1,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        **options,
    )


def _special_tokens(model: HookedRootModule, exclude: bool | list[int]) -> Tensor | None:
    if exclude is False:
        return None
    ids = get_special_token_ids(model.tokenizer) if exclude is True else exclude  # pyright: ignore[reportArgumentType]
    return torch.tensor(ids, dtype=torch.long)


def _stopping_after(model: HookedRootModule, names: Sequence[str]) -> dict[str, Any]:
    """Arguments that end the forward pass after the last hook, as SAELens' store has it."""
    layers = [extract_stop_at_layer_from_tlens_hook_name(name) for name in names]
    known = [layer for layer in layers if layer is not None]
    stop = max(known) if len(known) == len(layers) else None
    options: dict[str, Any] = {"stop_at_layer": stop}
    if isinstance(model, HookedProxyLM):
        options["_names_filter"] = list(names)
    return options
