"""Statistics of many hooks of a language model in one pass over a dataset.

Statistics are updated inside the forward pass, so no activations are kept. If there are several
processes, each takes its shard of the dataset, and they decide together when to stop.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens.config import HfDataset
from torch import Tensor
from tqdm.auto import tqdm

from sae_whiten._files import CorruptFileError, check_writable
from sae_whiten._redaction import redacted
from sae_whiten.estimation.distributed import Processes
from sae_whiten.estimation.folders import hooks_beside, statistics_file
from sae_whiten.estimation.options import FitConfig, decisive_fields
from sae_whiten.estimation.progress import PROGRESS_DIR, Progress, SavedProgress
from sae_whiten.estimation.sources import (
    ActivationSource,
    CachedActivations,
    Model,
    ModelActivations,
)
from sae_whiten.estimation.split_half import SplitHalfStatistics
from sae_whiten.estimation.stopping import (
    MAX_EMPTY_BATCHES,
    Requirement,
    StoppingRule,
    excess_so_far,
    naming,
    too_inaccurate,
)
from sae_whiten.statistics import ActivationStatistics, NonFiniteActivationsError, saved_fields

__all__ = ["fit_statistics"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def fit_statistics(
    model: Model | None,
    dataset: HfDataset | str | None,
    hook_names: str | Sequence[str],
    config: FitConfig | None = None,
    *,
    out: str | Path | None = None,
    cached_activations: str | Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, ActivationStatistics]:
    """Mean and covariance at every hook that matches, from one pass over the dataset.

    Ends when the split-half inflation of every hook is below `tolerance`. Ends also at
    `max_samples` or the end of the dataset, with a warning that estimates how many samples are
    needed.

    If torch.distributed is initialised, every process takes its shard of the dataset, and all
    return the statistics of all shards. (Documents are packed into sequences within a shard. So the
    sequences are the same as in one process only if the dataset holds tokens.)

    Examples:
        >>> from datasets import Dataset
        >>> from transformer_lens import HookedTransformer, HookedTransformerConfig
        >>> size = {"n_layers": 1, "d_model": 8, "n_heads": 1, "d_head": 8, "n_ctx": 16}
        >>> model = HookedTransformer(HookedTransformerConfig(**size, d_vocab=50, act_fn="relu"))
        >>> dataset = Dataset.from_dict({"input_ids": torch.randint(0, 50, (100, 16)).tolist()})
        >>> statistics = fit_statistics(
        ...     model, dataset, "blocks.*.hook_resid_*", context_size=16, n_samples=1000
        ... )
        >>> sorted(statistics)
        ['blocks.0.hook_resid_mid', 'blocks.0.hook_resid_post', 'blocks.0.hook_resid_pre']
        >>> statistics["blocks.0.hook_resid_mid"].covariance.shape
        torch.Size([8, 8])

    Args:
        model: As SAELens loads it: a HookedTransformer, a TransformerBridge, or its wrapper of
            Hugging Face models. None with `cached_activations`.
        dataset: A dataset of tokens or text, or its file, folder or name on the hub, as for
            `open_dataset`. None with `cached_activations`.
        hook_names: Hook names or glob patterns, such as "blocks.*.hook_resid_pre"; `*` stops at a
            dot, `**` does not.
        config: How much is read, and how; the default configuration if None.
        out: Folder to write one file per hook to, and until then the progress. To continue after an
            interruption, repeat the call; the statistics are the same. Finished statistics of these
            hooks are replaced, with a warning if they were estimated under other settings.
        cached_activations: Directory of SAELens' `CacheActivationsRunner` to read instead of
            running a model. The fields of `ReadingConfig` then have no effect, because it is not
            known how the activations were made. Nor is the dtype of the model: `resolution` is that
            of the cache.
        provenance: Further entries for the provenance of the statistics. Give model_name,
            model_class_name and model_from_pretrained_kwargs as in training, so that training can
            check them: they cannot be read from a model.
        options: Fields of `FitConfig`, which replace those of `config`: tolerance, n_samples,
            context_size, exclude_special_tokens...

    Returns:
        Statistics by hook name, with `provenance["inflation"]`.

    Raises:
        ValueError: Options contradict each other, a pattern matches no hook, the dataset has no
            tokens, a hook has no activations, or the progress in `out` is that of another
            estimation.
        NonFiniteActivationsError: An activation is NaN or infinite; names hook and position.
        DistributedError: Another process failed or is gone.
    """
    config = dataclasses.replace(config or FitConfig(), **options)
    processes = Processes()
    open_source, record = _source_and_record(model, dataset, cached_activations, hook_names, config)
    source: ActivationSource = processes.together(
        lambda: open_source(
            exclude_special_tokens=config.exclude_special_tokens,
            batch_size_prompts=config.batch_size_prompts,
            shard=(processes.rank, processes.world_size),
        )
    )
    is_first = processes.rank == 0
    if is_first:
        logger.info("%d hooks: %s", len(source.hook_names), _listed(source.hook_names))
    if out is not None:
        _check_folder(out, source.hook_names, warn=is_first)
    record |= {"exclude_special_tokens": config.exclude_special_tokens, **(provenance or {})}
    # as it will be saved: without secrets, tuples as lists; values that JSON cannot hold fail here,
    # not after hours of work
    record = json.loads(json.dumps(redacted(record)))
    if out is not None and is_first:
        _warn_of_what_is_replaced(out, source.hook_names, record)
    fit = _Fit(source, processes, config)
    progress = None
    if out is not None:
        identity = _identity(record, source, config, model, dataset)
        progress = Progress(Path(out) / PROGRESS_DIR, identity, processes)
        saved = progress.restore(config.on_nonfinite)
        if saved is not None:
            fit.restore(saved)
    by_hook = _finished(fit, fit.run(progress), record)
    for name, hook_statistics in by_hook.items():
        hook_statistics.resolution = max(hook_statistics.resolution, source.resolution[name])
    if out is not None:
        # all results are on disk before the progress is deleted
        processes.together(lambda: _save(by_hook, out) if is_first else None)
        shutil.rmtree(Path(out) / PROGRESS_DIR, ignore_errors=True)
    return by_hook


def _save(by_hook: Mapping[str, ActivationStatistics], out: str | Path) -> None:
    for name, statistics in by_hook.items():
        statistics.save(statistics_file(out, name))


def _identity(
    record: Mapping[str, Any],
    source: ActivationSource,
    config: FitConfig,
    model: Model | None,
    dataset: HfDataset | str | None,
) -> dict[str, Any]:
    """What progress on disk must have been made with, for this estimation to continue it."""
    return {
        **record,
        "hooks": source.hook_names,
        "batch_size_prompts": config.batch_size_prompts,
        "on_nonfinite": config.on_nonfinite,
        # names may be equal or missing, so content identifies models and datasets
        "weights": None if model is None else _weights(model),
        "dataset": getattr(dataset, "_fingerprint", None),
        "beginning": source.beginning,
    }


def _source_and_record(
    model: Model | None,
    dataset: HfDataset | str | None,
    cached_activations: str | Path | None,
    hook_names: str | Sequence[str],
    config: FitConfig,
) -> tuple[Callable[..., ActivationSource], dict[str, Any]]:
    """Where activations come from, and the entries of the provenance that say so."""
    reading = config.reading()
    if cached_activations is not None:
        if model is not None or dataset is not None:
            raise ValueError("give a model and a dataset, or cached_activations, not both")
        for name in ("hook_head_index", "seqpos_slice"):
            if reading[name] != getattr(FitConfig, name):
                raise ValueError(
                    f"{name} cannot be applied to cached_activations, which are taken as they are: "
                    "leave it out"
                )
        record = {"cached_activations": str(cached_activations)}
        return partial(CachedActivations, cached_activations, hook_names), record
    if model is None or dataset is None:
        raise ValueError("give a model and a dataset, or cached_activations")
    record = {name: reading[name] for name in decisive_fields() if name in reading}
    record |= _describe(model)
    if isinstance(dataset, str):
        record |= {"dataset_path": dataset, "split": config.split}
    return partial(ModelActivations, model, dataset, hook_names, **reading), record


def _check_folder(out: str | Path, hook_names: Sequence[str], warn: bool) -> None:
    """Fail now, not after hours, if the statistics could not be written."""
    check_writable(out)
    for name in hook_names:
        statistics_file(out, name)  # fails if the name cannot be that of a file
    beside = hooks_beside(out, hook_names)
    if beside and warn:
        logger.warning(
            "%s already holds statistics of %d other hooks, which are not changed: %s",
            out,
            len(beside),
            _listed(beside),
        )


def _warn_of_what_is_replaced(
    out: str | Path, hook_names: Sequence[str], record: Mapping[str, Any]
) -> None:
    """Warn of finished statistics in the folder that were estimated under other settings."""
    settings = (*decisive_fields(), "dataset_path", "split", "cached_activations")
    replaced: dict[str, list[str]] = {}
    for name in hook_names:
        path = statistics_file(out, name)
        if not path.is_file():
            continue
        with contextlib.suppress(CorruptFileError, KeyError):
            fields = saved_fields(path)
            before = fields["provenance"]
            different = ", ".join(
                f"{setting}={before.get(setting)!r} (now {record.get(setting)!r})"
                for setting in settings
                if setting != "hook_name" and before.get(setting) != record.get(setting)
            )
            if different:
                what = f"{fields['n_samples']} activations with {different}"
                replaced.setdefault(what, []).append(name)
    for what, names in replaced.items():
        logger.warning(
            "%s already holds statistics of %s, which will be replaced at the end; to keep them, "
            "stop now and choose another folder: %s",
            out,
            what,
            _listed(names),
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"


class _Fit:
    """An estimation in progress: the statistics of this process's shard, and when to stop.

    Attributes:
        source: Where activations come from.
        processes: The processes that estimate together.
        config: How much is read.
        statistics: Statistics of this process's shard, by hook name.
        rules: When the statistics of a hook are enough, by hook name.
        inflation: Inflation over all shards when it was last measured, by hook name.
        n_rounds: Batches so far, the same for all processes.
    """

    def __init__(self, source: ActivationSource, processes: Processes, config: FitConfig) -> None:
        self.source = source
        self.processes = processes
        self.config = config
        self.statistics: dict[str, SplitHalfStatistics] = {}
        self.rules: dict[str, StoppingRule] = {}
        self.inflation: dict[str, float] = {}
        self.n_rounds = 0

    @property
    def tolerance(self) -> float | None:
        """The tolerance to reach, or None if a number of samples is set."""
        return None if self.config.n_samples is not None else self.config.tolerance

    def restore(self, saved: SavedProgress) -> None:
        """Continue from the state of an earlier call."""
        for name, statistics in saved.statistics.items():
            self._add_hook(name, statistics)
            rule = self.rules[name]
            rule.next_look = saved.next_looks.get(name, rule.next_look)
            rule.is_enough = name in saved.enough
        self.n_rounds = saved.n_rounds
        self.source.skip(saved.n_sequences)

    def run(self, progress: Progress | None) -> dict[str, SplitHalfStatistics]:
        """Read until all hooks have enough activations, or every shard is at its end.

        Returns:
            The statistics of all shards.
        """
        is_first = self.processes.rank == 0
        title = f"Fitting {len(self.source.hook_names)} hooks"
        with tqdm(desc=title, unit=" tokens", disable=not is_first) as bar:
            while True:
                more, n = self._round()
                bar.update(n - bar.n)
                if not more:
                    if is_first:
                        logger.warning("the dataset ended after %d activations per hook", n)
                    return self._look(self.source.hook_names)
                # in the same order in all processes
                names = self.source.hook_names
                waiting = [name for name in names if not self.rules[name].is_enough]
                due = [name for name in waiting if self.rules[name].must_look(n)]
                union = self._look(due)
                if due:
                    worst = max(self.inflation[name] for name in due)
                    assert self.tolerance is not None  # or no hook would be due
                    bar.set_postfix_str(excess_so_far(worst, self.tolerance))
                for name in waiting:
                    self.rules[name].decide(n, self.inflation[name] if name in due else None)
                if all(rule.is_enough for rule in self.rules.values()):
                    others = [name for name in names if name not in due]
                    return union | self._look(others)
                if progress is not None:
                    progress.save_if_due(self._to_save)

    def _to_save(self) -> SavedProgress:
        return SavedProgress(
            statistics=self.statistics,
            next_looks={name: rule.next_look for name, rule in self.rules.items()},
            enough=[name for name, rule in self.rules.items() if rule.is_enough],
            n_rounds=self.n_rounds,
            n_sequences=self.source.n_sequences,
        )

    def _look(self, names: Sequence[str]) -> dict[str, SplitHalfStatistics]:
        """Statistics of hooks over all shards; sets `inflation`, computed by one process each."""
        if not names:
            return {}
        union: dict[str, SplitHalfStatistics] = {}
        for name in names:
            first, second = map(self.processes.union, self.statistics[name].halves)
            union[name] = SplitHalfStatistics.of(first, second)
        names_here = names[self.processes.rank :: self.processes.world_size]

        def inflations() -> dict[str, float]:
            here = {}
            for name in names_here:
                with naming(name):
                    here[name] = union[name].inflation()
            return here

        here = self.processes.together(inflations)
        for part in self.processes.gather(here):
            self.inflation.update(part)
        return union

    def _add_hook(self, name: str, statistics: SplitHalfStatistics) -> None:
        config = self.config
        required = Requirement(
            statistics.d_in,
            config.n_samples,
            self.tolerance,
            config.on_nonfinite,
            max_samples=config.max_samples,
        )
        self.statistics[name], self.rules[name] = statistics, StoppingRule(required)

    def _round(self) -> tuple[bool, int]:
        """Read one batch.

        Returns:
            Whether any process had a batch, and the samples per hook over all processes.
        """
        more = self.processes.together(lambda: self.source.read(self._update))
        n_own = min((halves.n_samples for halves in self.statistics.values()), default=0)
        n_active, n = self.processes.total(more, n_own)
        if self.n_rounds == 0:
            if not n_active:
                raise ValueError("the dataset is shorter than one sequence of the context size")
            self._agree_on_widths()
        self.n_rounds += 1
        if n == 0 and (not n_active or self.n_rounds >= MAX_EMPTY_BATCHES):
            raise ValueError(
                "a hook has no activations: every token is excluded, seqpos_slice takes no "
                "position, or no activation is finite"
            )
        return n_active > 0, int(n)

    def _update(
        self,
        name: str,
        acts: Float[Tensor, "batch seq d_in"],
        mask: Bool[Tensor, "batch seq"] | None,
    ) -> None:
        if name not in self.statistics:
            self._add_hook(name, SplitHalfStatistics(acts.shape[-1], self.config.on_nonfinite))
        rows = acts.flatten(0, 1) if mask is None else acts[mask]
        try:
            self.statistics[name].update(rows)
        except NonFiniteActivationsError as error:
            bad = ~torch.isfinite(acts).all(-1)
            if mask is not None:
                bad &= mask
            sequence, column = bad.nonzero()[0].tolist()
            length = max(self.config.context_size, acts.shape[1])  # of a cache its own
            position = range(length)[slice(*self.config.seqpos_slice)][column]
            number = self.source.n_sequences - len(acts) + sequence
            raise NonFiniteActivationsError(
                f"hook {name}, batch {self.n_rounds}, sequence {number}, position {position}: a "
                f"NaN or an infinity, as in {int(bad.sum())} activations of this batch. Find out "
                "where they come from, or set on_nonfinite='skip' to leave them out."
            ) from error

    def _agree_on_widths(self) -> None:
        widths_here = {name: halves.d_in for name, halves in self.statistics.items()}
        widths: dict[str, int] = {}
        for part in self.processes.gather(widths_here):
            widths.update(part)
        if silent := [name for name in self.source.hook_names if name not in widths]:
            raise ValueError(
                f"no activations pass through {', '.join(silent)}: with its current settings the "
                "model does not compute them"
            )
        for name in self.source.hook_names:
            if name not in self.statistics:  # of a process whose shard is empty
                halves = SplitHalfStatistics(widths[name], self.config.on_nonfinite)
                self._add_hook(name, halves)


def _weights(model: Model) -> str:
    """A checksum of the first numbers of every parameter, to identify a model."""
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sha.update(name.encode())
        sha.update(parameter.detach().reshape(-1)[:64].cpu().double().numpy().data)
    return sha.hexdigest()


def _describe(model: Model) -> dict[str, Any]:
    """The dtype of the weights and, if known, their commit on the hub."""
    config = getattr(getattr(model, "model", None), "config", None)
    return {
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "model_commit": getattr(config, "_commit_hash", None),
    }


def _finished(
    fit: _Fit, union: Mapping[str, SplitHalfStatistics], record: dict[str, Any]
) -> dict[str, ActivationStatistics]:
    """Merge halves, warn about hooks with too few samples, and record the provenance."""
    record.setdefault("date", datetime.datetime.now(datetime.timezone.utc).isoformat())
    for package in ("sae-whiten", "sae-lens", "transformer-lens", "torch"):
        try:
            record.setdefault(f"{package}_version", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
    by_hook = {}
    tolerance = fit.tolerance
    for name in fit.source.hook_names:
        halves, inflation = union[name], fit.inflation[name]
        if tolerance is not None and inflation > tolerance and fit.processes.rank == 0:
            message = too_inaccurate(inflation, halves.n_samples, tolerance)
            logger.warning("%s: %s", name, message)
        if halves.n_skipped and fit.processes.rank == 0:
            logger.warning("%s: left out %d activations, not finite", name, halves.n_skipped)
        by_hook[name] = halves.merged()
        known = inflation if math.isfinite(inflation) else None
        by_hook[name].provenance = {**record, "hook_name": name, "inflation": known}
    return by_hook
