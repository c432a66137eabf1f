"""Statistics of many hooks of a language model in one pass over a dataset.

Statistics are updated as soon as a hook has activations; none outlives the batch that it belongs
to. Several processes each take their shard of the dataset and decide together when it is enough.
"""

import datetime
import hashlib
import importlib.metadata
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens.config import HfDataset
from torch import Tensor
from tqdm.auto import tqdm

from sae_whiten._files import (
    check_writable,
    count_field,
    load_tensors,
    reading_content,
    save_tensors,
)
from sae_whiten._redaction import redacted
from sae_whiten.estimation.distributed import Processes
from sae_whiten.estimation.folders import statistics_file
from sae_whiten.estimation.sources import (
    ActivationSource,
    CachedActivations,
    Model,
    ModelActivations,
    resolution_of,
)
from sae_whiten.estimation.split_half import SplitHalfStatistics
from sae_whiten.estimation.stopping import (
    FIRST_LOOK_PER_DIMENSION,
    LIMIT_PER_DIMENSION,
    MAX_EMPTY_BATCHES,
    naming,
    too_inaccurate,
)
from sae_whiten.statistics import ActivationStatistics, NonFiniteActivationsError

__all__ = ["fit_statistics"]

logger = logging.getLogger(__name__)

_SAVE_EVERY_SECONDS = 60.0
_PROGRESS_DIR = ".fit_progress"
_PROGRESS_KIND = "fit_progress"


@torch.no_grad()
def fit_statistics(
    model: Model | None,
    dataset: HfDataset | str | None,
    hook_names: str | Sequence[str],
    *,
    out: str | Path | None = None,
    cached_activations: str | Path | None = None,
    tolerance: float = 0.02,
    n_samples: int | None = None,
    max_samples: int | None = None,
    split: str = "train",
    context_size: int = 128,
    batch_size_prompts: int = 32,
    prepend_bos: bool = True,
    seqpos_slice: tuple[int | None, ...] = (None,),
    exclude_special_tokens: bool | list[int] = False,
    hook_head_index: int | None = None,
    disable_concat_sequences: bool = False,
    sequence_separator_token: int | Literal["bos", "eos", "sep"] | None = "bos",
    use_chat_formatting: bool = False,
    streaming: bool = True,
    autocast_lm: bool = False,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, ActivationStatistics]:
    """Mean and covariance at every hook that matches, from one pass over the dataset.

    Ends when the split-half inflation of every hook is under `tolerance`, or at `max_samples` or
    the end of the dataset, then with a warning that says about how many samples would do.

    Where torch.distributed is initialised, every process takes its shard of the dataset, and all
    return the statistics of all shards. (Documents are packed into sequences within a shard: only
    for a dataset of tokens are the sequences the same as in one process.)

    Args:
        model: As SAELens loads it: a HookedTransformer, a TransformerBridge, or its wrapper of
            Hugging Face models. None with `cached_activations`.
        dataset: A dataset, or a path for `datasets.load_dataset`, with tokens or with text. None
            with `cached_activations`.
        hook_names: Hook names or glob patterns, such as "blocks.*.hook_resid_pre".
        out: Folder to write one file per hook to, and meanwhile the progress: a call that was
            killed goes on from there when it is repeated, and ends with the same statistics.
        cached_activations: Directory of SAELens' `CacheActivationsRunner` to read instead of
            running a model. How they were made is not known: of the options of reading, all but
            exclude_special_tokens (ids) are without meaning then.
        tolerance: Relative excess variance of held-out activations to be reached at every hook.
        n_samples: Take this many activations per hook instead, and the rest of the last batch.
        max_samples: Take at most this many; None: 1000 per dimension of the widest hook.
        split: Split of the dataset, if it is a path. Training takes "train", and refuses statistics
            of another split, but not of a part of it such as "train[:50%]".
        context_size, prepend_bos, seqpos_slice, exclude_special_tokens, hook_head_index,
            disable_concat_sequences, sequence_separator_token, use_chat_formatting, streaming,
            autocast_lm: As in SAELens' `LanguageModelSAERunnerConfig`; use the values that
            training will use, which refuses statistics made with others.
        batch_size_prompts: Sequences per forward pass.
        on_nonfinite: As for `ActivationStatistics`.
        provenance: Further entries for the provenance of the statistics. Give model_name,
            model_class_name and model_from_pretrained_kwargs as training will have them, for it
            to check them too: a model does not tell what it was loaded by.

    Returns:
        Statistics by hook name, with `provenance["inflation"]`.

    Raises:
        ValueError: Options contradict each other, a pattern matches no hook, the dataset has no
            tokens, there is not one activation, or the progress in `out` is that of another
            estimation.
        NonFiniteActivationsError: An activation is NaN or infinite; names hook and position.
        DistributedError: Another process failed or is gone.
    """
    if not 0 < tolerance < math.inf:
        raise ValueError(
            f"tolerance={tolerance}: must be above 0; to take all there is, set n_samples"
        )
    processes = Processes()
    reading: dict[str, Any] = {
        "context_size": context_size,
        "prepend_bos": prepend_bos,
        "seqpos_slice": list(seqpos_slice),
        "disable_concat_sequences": disable_concat_sequences,
        "sequence_separator_token": sequence_separator_token,
        "use_chat_formatting": use_chat_formatting,
        "autocast_lm": autocast_lm,
        "hook_head_index": hook_head_index,
    }
    if cached_activations is not None:
        if model is not None or dataset is not None:
            raise ValueError("give a model and a dataset, or cached_activations, not both")
        if hook_head_index is not None or tuple(seqpos_slice) != (None,):
            raise ValueError(
                "hook_head_index and seqpos_slice cannot be applied to cached_activations, which "
                "are taken as they are: leave them out"
            )
        reading = {"cached_activations": str(cached_activations)}
        open_source = partial(CachedActivations, cached_activations, hook_names)
    elif model is None or dataset is None:
        raise ValueError("give a model and a dataset, or cached_activations")
    else:
        reading |= _describe(model)
        if isinstance(dataset, str):
            reading |= {"dataset_path": dataset, "split": split}
        open_source = partial(
            ModelActivations,
            model,
            dataset,
            hook_names,
            hook_head_index=hook_head_index,
            autocast_lm=autocast_lm,
            split=split,
            context_size=context_size,
            prepend_bos=prepend_bos,
            seqpos_slice=seqpos_slice,
            disable_concat_sequences=disable_concat_sequences,
            sequence_separator_token=sequence_separator_token,
            use_chat_formatting=use_chat_formatting,
            streaming=streaming,
        )
    source: ActivationSource = processes.together(
        lambda: open_source(
            exclude_special_tokens=exclude_special_tokens,
            batch_size_prompts=batch_size_prompts,
            shard=(processes.rank, processes.world_size),
        )
    )
    if out is not None:
        check_writable(out)
        for name in source.hook_names:
            statistics_file(out, name)  # refuses a name that no file can have, before hours of work
    record: dict[str, Any] = {
        **reading,
        "exclude_special_tokens": exclude_special_tokens,
        **(provenance or {}),
    }
    # as a file has it: without secrets, tuples are lists, and what JSON cannot hold is refused now,
    # not at the end
    record = json.loads(json.dumps(redacted(record)))
    fit = _Fit(source, processes, on_nonfinite)
    progress = None
    if out is not None:
        identity = {
            **record,
            "hooks": source.hook_names,
            "batch_size_prompts": batch_size_prompts,
            "on_nonfinite": on_nonfinite,
            # whatever has the same name, or none, is told apart by its content
            "weights": None if model is None else _weights(model),
            "dataset": getattr(dataset, "_fingerprint", None),
            "beginning": source.beginning,
        }
        progress = _Progress(Path(out) / _PROGRESS_DIR, identity, processes)
        progress.restore(fit)
    union = fit.run(n_samples, max_samples, tolerance, progress)
    found = _finished(fit, union, tolerance if n_samples is None else None, record)
    if model is not None:
        for statistics in found.values():
            computed_in = resolution_of(model, autocast_lm)
            statistics.resolution = max(statistics.resolution, computed_in)
    if out is not None:

        def save() -> None:
            if processes.rank == 0:
                for name, statistics in found.items():
                    statistics.save(statistics_file(out, name))

        processes.together(save)  # nobody forgets how far it was before the result is on disk
        shutil.rmtree(Path(out) / _PROGRESS_DIR, ignore_errors=True)
    return found


class _Fit:
    """Statistics in the making: of this process's shard, with what all shards decide together.

    Attributes:
        source: Where activations come from.
        processes: Who estimates together.
        statistics: By hook name, of this process's shard.
        inflation: By hook name, when it was last looked at, of all shards.
        n_rounds: Batches so far, the same for all processes.
        next_look: Number of samples at which the inflation is looked at next.
    """

    def __init__(
        self,
        source: ActivationSource,
        processes: Processes,
        on_nonfinite: Literal["raise", "skip"],
    ) -> None:
        self.source = source
        self.processes = processes
        self.on_nonfinite: Literal["raise", "skip"] = on_nonfinite
        self.statistics: dict[str, SplitHalfStatistics] = {}
        self.inflation: dict[str, float] = {}
        self.n_rounds = 0
        self.next_look = 0

    def run(
        self,
        n_samples: int | None,
        max_samples: int | None,
        tolerance: float,
        progress: "_Progress | None",
    ) -> dict[str, SplitHalfStatistics]:
        """Read until it is enough, or every shard is at its end; the statistics of all shards."""
        first = self.processes.rank == 0
        with tqdm(
            desc=f"Fitting {len(self.source.hook_names)} hooks", unit=" tokens", disable=not first
        ) as bar:
            while True:
                (more, n), union = self._round(), None
                bar.update(n - bar.n)
                widest = max(halves.d_in for halves in self.statistics.values())
                if not more:
                    if first:
                        logger.warning("the dataset ended after %d activations per hook", n)
                    return self.look()
                if n_samples is not None:
                    if n >= n_samples:
                        return self.look()
                elif n >= max(self.next_look, FIRST_LOOK_PER_DIMENSION * widest):
                    union = self.look()
                    worst = max(self.inflation.values())
                    bar.set_postfix_str(f"held-out excess {worst:.1%}, wanted {tolerance:.1%}")
                    # an inversion per hook costs as much as many updates
                    self.next_look = math.ceil(1.2 * n)
                    if worst <= tolerance:
                        return union
                if n_samples is None and n >= (max_samples or LIMIT_PER_DIMENSION * widest):
                    return union or self.look()
                if progress is not None:
                    progress.save_if_due(self)

    def look(self) -> dict[str, SplitHalfStatistics]:
        """Statistics of all shards; sets `inflation`, each hook's computed by one process."""
        union: dict[str, SplitHalfStatistics] = {}
        for name in self.source.hook_names:
            halves = self.statistics[name]
            union[name] = SplitHalfStatistics(halves.d_in, self.on_nonfinite)
            first, second = map(self.processes.union, halves.halves)
            union[name].halves = (first, second)
        own = self.source.hook_names[self.processes.rank :: self.processes.world_size]

        def inflations() -> dict[str, float]:
            found = {}
            for name in own:
                with naming(name):
                    found[name] = union[name].inflation()
            return found

        found = self.processes.together(inflations)
        self.inflation = {}
        for part in self.processes.gather(found):
            self.inflation.update(part)
        return union

    def _round(self) -> tuple[bool, int]:
        """Read one batch; whether any process had one, and how many samples all have per hook."""
        more = self.processes.together(lambda: self.source.read(self._update))
        n_own = min((halves.n_samples for halves in self.statistics.values()), default=0)
        n_active, n = self.processes.total(more, n_own)
        if self.n_rounds == 0:
            if not n_active:
                raise ValueError("the dataset holds not one sequence of the context size")
            self._agree_on_widths()
        self.n_rounds += 1
        if n == 0 and (not n_active or self.n_rounds >= MAX_EMPTY_BATCHES):
            raise ValueError(
                "there is not one activation at some hook: every token is excluded, seqpos_slice "
                "takes no position, or none is finite"
            )
        return n_active > 0, int(n)

    def _update(self, name: str, acts: Tensor, mask: Tensor | None) -> None:
        if name not in self.statistics:
            self.statistics[name] = SplitHalfStatistics(acts.shape[-1], self.on_nonfinite)
        rows = acts.flatten(0, 1) if mask is None else acts[mask]
        try:
            self.statistics[name].update(rows)
        except NonFiniteActivationsError as error:
            bad = ~torch.isfinite(acts).all(-1)
            if mask is not None:
                bad &= mask
            sequence, position = bad.nonzero()[0].tolist()
            number = self.source.n_sequences - len(acts) + sequence
            raise NonFiniteActivationsError(
                f"hook {name}, batch {self.n_rounds}, sequence {number}, position {position}: a "
                f"NaN or an infinity, as in {int(bad.sum())} activations of this batch. Find out "
                "where they come from, or set on_nonfinite='skip' to leave them out."
            ) from error

    def _agree_on_widths(self) -> None:
        own = {name: halves.d_in for name, halves in self.statistics.items()}
        widths: dict[str, int] = {}
        for found in self.processes.gather(own):
            widths.update(found)
        if silent := [name for name in self.source.hook_names if name not in widths]:
            raise ValueError(
                f"no activations pass through {', '.join(silent)}: the model as it is set does not "
                "compute what these hooks are for"
            )
        for name, d_in in widths.items():
            # of a process whose shard is empty
            self.statistics.setdefault(name, SplitHalfStatistics(d_in, self.on_nonfinite))


class _Progress:
    """State of an unfinished estimation on disk, one file per process.

    A file belongs to one round. It is deleted only when every process has written the next one, so
    that all can go on from the same round, whenever they are killed.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], processes: Processes) -> None:
        self._directory = directory
        self._identity = identity
        self._processes = processes
        self._name = f"rank-{processes.rank}-of-{processes.world_size}"
        self._next_save = time.monotonic() + _SAVE_EVERY_SECONDS

    def restore(self, fit: _Fit) -> None:
        """Continue from the last round that every process has saved, if there is one.

        Raises:
            ValueError: It is the progress of another estimation, or of more or fewer processes.
            CorruptFileError: The file is truncated, foreign or was changed.
        """
        own = self._processes.together(self._rounds)
        common = set.intersection(*map(set, self._processes.gather(set(own))))
        if not common:
            return
        path = own[max(common)]
        self._processes.together(lambda: self._load(path, fit))
        if self._processes.rank == 0:
            logger.info("continuing after %d batches, from %s", fit.n_rounds, self._directory)

    def _rounds(self) -> dict[int, Path]:
        """This process's files, by round."""
        files = {path: path.name.split(".") for path in self._directory.glob("rank-*-of-*")}
        own = {int(name[1].split("-")[1]): p for p, name in files.items() if name[0] == self._name}
        counts = {int(name[0].rsplit("-", 1)[1]) for name in files.values()}
        if others := counts - {self._processes.world_size}:
            raise ValueError(
                f"{self._directory} holds the progress of {others.pop()} processes, and now there "
                f"are {self._processes.world_size}. Continue with as many, or delete the folder to "
                "begin anew."
            )
        return own

    def _load(self, path: Path, fit: _Fit) -> None:
        tensors, fields = load_tensors(path, _PROGRESS_KIND)
        with reading_content(path):
            identity = dict(fields["identity"])
            statistics = {
                name: _halves(tensors, name, halves, fit.on_nonfinite)
                for name, halves in fields["statistics"].items()
            }
            n_rounds = count_field(fields, "n_rounds")
            next_look = count_field(fields, "next_look")
            n_sequences = count_field(fields, "n_sequences")
        different = [
            f"{name}={identity.get(name)!r} (now {self._identity.get(name)!r})"
            for name in {**identity, **self._identity}
            if identity.get(name) != self._identity.get(name)
        ]
        if different:
            raise ValueError(
                f"{self._directory} holds the progress of an estimation with "
                f"{', '.join(different)}. Repeat that one, or delete the folder to begin anew."
            )
        fit.statistics.update(statistics)
        fit.n_rounds, fit.next_look = n_rounds, next_look
        fit.source.skip(n_sequences)

    def save_if_due(self, fit: _Fit) -> None:
        """Save, unless that was done not long ago; the first process's clock decides."""
        now = time.monotonic()
        due = self._processes.rank == 0 and now >= self._next_save
        if not self._processes.total(due)[0]:
            return
        tensors, halves = {}, {}
        for name, statistics in fit.statistics.items():
            halves[name] = []
            for i, half in enumerate(statistics.halves):
                own, fields = half.to_tensors()
                tensors.update({f"{name}/{i}/{key}": tensor for key, tensor in own.items()})
                halves[name].append(fields)
        path = self._directory / f"{self._name}.round-{fit.n_rounds}.safetensors"
        fields = {
            "identity": self._identity,
            "statistics": halves,
            "n_rounds": fit.n_rounds,
            "next_look": fit.next_look,
            "n_sequences": fit.source.n_sequences,
        }
        # until all have
        self._processes.together(lambda: save_tensors(path, _PROGRESS_KIND, tensors, fields))
        for old in self._directory.glob(f"{self._name}.*"):
            if old != path:
                old.unlink()
        seconds = time.monotonic() - now
        self._next_save = now + max(_SAVE_EVERY_SECONDS, 20 * seconds)


def _weights(model: Model) -> str:
    """A checksum of the first numbers of every parameter, to tell one model from another."""
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sha.update(name.encode())
        sha.update(parameter.detach().reshape(-1)[:64].cpu().double().numpy().data)
    return sha.hexdigest()


def _describe(model: Model) -> dict[str, Any]:
    """What is known of the weights beyond the name they were loaded by."""
    config = getattr(getattr(model, "model", None), "config", None)
    return {
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "model_commit": getattr(config, "_commit_hash", None),
    }


def _halves(
    tensors: dict[str, Tensor],
    name: str,
    halves: list[dict[str, Any]],
    on_nonfinite: Literal["raise", "skip"],
) -> SplitHalfStatistics:
    """The statistics of a hook, from what `_Progress.save_if_due` wrote."""
    first, second = (
        ActivationStatistics.from_tensors(
            {key: tensors[f"{name}/{i}/{key}"] for key in ("mean", "scatter")}, fields
        )
        for i, fields in enumerate(halves)
    )
    first.on_nonfinite = second.on_nonfinite = on_nonfinite
    statistics = SplitHalfStatistics(first.d_in, on_nonfinite)
    statistics.halves = (first, second)
    return statistics


def _finished(
    fit: _Fit,
    union: Mapping[str, SplitHalfStatistics],
    tolerance: float | None,
    record: dict[str, Any],
) -> dict[str, ActivationStatistics]:
    """Merge halves, warn where they are too few, record where they came from."""
    record.setdefault("date", datetime.datetime.now(datetime.timezone.utc).isoformat())
    for package in ("sae-whiten", "sae-lens", "transformer-lens", "torch"):
        try:
            record.setdefault(f"{package}_version", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
    found = {}
    for name, halves in union.items():
        inflation = fit.inflation[name]
        if tolerance is not None and inflation > tolerance and fit.processes.rank == 0:
            message = too_inaccurate(inflation, halves.n_samples, tolerance)
            logger.warning("%s: %s", name, message)
        if halves.n_skipped and fit.processes.rank == 0:
            logger.warning("%s: %d activations not finite, left out", name, halves.n_skipped)
        found[name] = halves.merged()
        known = inflation if math.isfinite(inflation) else None
        found[name].provenance = {**record, "hook_name": name, "inflation": known}
    return found
