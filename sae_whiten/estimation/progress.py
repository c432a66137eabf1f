"""Progress of an estimation on disk, so that it can continue after an interruption."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sae_whiten._files import count_field, load_tensors, reading_content, save_tensors
from sae_whiten._redaction import redacted
from sae_whiten.estimation.distributed import Processes
from sae_whiten.estimation.split_half import SplitHalfStatistics
from sae_whiten.statistics import ActivationStatistics

__all__ = ["PROGRESS_DIR", "Progress", "SavedProgress"]

logger = logging.getLogger(__name__)

PROGRESS_DIR = ".fit_progress"
"""Name of the folder, inside that of the statistics."""

_SAVE_EVERY_SECONDS = 60.0
_KIND = "fit_progress"


@dataclasses.dataclass(frozen=True)
class SavedProgress:
    """The state that an estimation continues from.

    Attributes:
        statistics: Statistics of this process's shard, by hook name.
        next_looks: `next_look` of each hook's `StoppingRule`, by hook name.
        enough: Names of the hooks that have enough samples.
        n_rounds: Batches so far.
        n_sequences: Sequences read by this process.
    """

    statistics: Mapping[str, SplitHalfStatistics]
    next_looks: Mapping[str, int]
    enough: list[str]
    n_rounds: int
    n_sequences: int


class Progress:
    """State of an unfinished estimation on disk, one file per process.

    A file belongs to one round. It is deleted only after every process has written the next one, so
    that all can continue from the same round, whenever they are killed.

    Args:
        directory: Where the files are.
        identity: Settings and data of the estimation. Only progress with the same is continued.
        processes: The processes that estimate together.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], processes: Processes) -> None:
        self._directory = directory
        self._identity = redacted(identity)  # as it is saved
        self._processes = processes
        self._name = f"rank-{processes.rank}-of-{processes.world_size}"
        self._next_save = time.monotonic() + _SAVE_EVERY_SECONDS

    def restore(self, on_nonfinite: Literal["raise", "skip"]) -> SavedProgress | None:
        """The state of the last round that every process has saved, if there is one.

        Args:
            on_nonfinite: As for `ActivationStatistics`.

        Raises:
            ValueError: It is the progress of another estimation, or of more or fewer processes.
            CorruptFileError: The file is truncated, was changed, or is of another kind.
        """
        rounds = self._processes.together(self._rounds)
        common = set.intersection(*map(set, self._processes.gather(set(rounds))))
        if not common:
            return None
        path = rounds[max(common)]
        saved = self._processes.together(lambda: self._load(path, on_nonfinite))
        if self._processes.rank == 0:
            logger.info("continuing after %d batches, from %s", saved.n_rounds, self._directory)
        return saved

    def save_if_due(self, state: Callable[[], SavedProgress]) -> None:
        """Save, unless the last save is recent; the first process's clock decides."""
        now = time.monotonic()
        due = self._processes.rank == 0 and now >= self._next_save
        if not self._processes.total(due)[0]:
            return
        saved = state()
        tensors: dict[str, Tensor] = {}
        halves: dict[str, list[dict[str, Any]]] = {}
        for name, statistics in saved.statistics.items():
            halves[name] = []
            for i, half in enumerate(statistics.halves):
                half_tensors, fields = half.to_tensors()
                tensors.update(
                    {f"{name}/{i}/{key}": tensor for key, tensor in half_tensors.items()}
                )
                halves[name].append(fields)
        fields = {
            "identity": self._identity,
            "statistics": halves,
            "rules": {
                name: {"next_look": saved.next_looks[name], "is_enough": name in saved.enough}
                for name in halves
            },
            "n_rounds": saved.n_rounds,
            "n_sequences": saved.n_sequences,
        }
        path = self._directory / f"{self._name}.round-{saved.n_rounds}.safetensors"
        # waits until all processes have saved
        self._processes.together(lambda: save_tensors(path, _KIND, tensors, fields))
        for old in self._directory.glob(f"{self._name}.*"):
            if old != path:
                old.unlink()
        seconds = time.monotonic() - now
        self._next_save = now + max(_SAVE_EVERY_SECONDS, 20 * seconds)

    def _rounds(self) -> dict[int, Path]:
        """This process's files, by round."""
        files = {path: path.name.split(".") for path in self._directory.glob("rank-*-of-*")}
        rounds = {
            int(name[1].split("-")[1]): p for p, name in files.items() if name[0] == self._name
        }
        counts = {int(name[0].rsplit("-", 1)[1]) for name in files.values()}
        if others := counts - {self._processes.world_size}:
            raise ValueError(
                f"{self._directory} holds the progress of {others.pop()} processes, and now there "
                f"are {self._processes.world_size}. Continue with as many, or delete the folder to "
                "start again."
            )
        return rounds

    def _load(self, path: Path, on_nonfinite: Literal["raise", "skip"]) -> SavedProgress:
        tensors, fields = load_tensors(path, _KIND)
        with reading_content(path):
            identity = dict(fields["identity"])
            saved = SavedProgress(
                statistics={
                    name: _halves(tensors, name, halves, on_nonfinite)
                    for name, halves in fields["statistics"].items()
                },
                next_looks=_next_looks(fields),
                enough=[n for n, rule in fields.get("rules", {}).items() if rule["is_enough"]],
                n_rounds=count_field(fields, "n_rounds"),
                n_sequences=count_field(fields, "n_sequences"),
            )
        different = [
            f"{name}={identity.get(name)!r} (now {self._identity.get(name)!r})"
            for name in {**identity, **self._identity}
            if identity.get(name) != self._identity.get(name)
        ]
        if different:
            raise ValueError(
                f"{self._directory} holds the progress of an estimation with "
                f"{', '.join(different)}. Keep those settings, or delete the folder to start again."
            )
        return saved


def _next_looks(fields: Mapping[str, Any]) -> dict[str, int]:
    if "rules" not in fields:  # earlier versions looked at all hooks at once
        return dict.fromkeys(fields["statistics"], count_field(fields, "next_look"))
    return {name: count_field(rule, "next_look") for name, rule in fields["rules"].items()}


def _halves(
    tensors: Mapping[str, Tensor],
    name: str,
    halves: list[dict[str, Any]],
    on_nonfinite: Literal["raise", "skip"],
) -> SplitHalfStatistics:
    """The statistics of a hook, from what `save_if_due` wrote."""
    first, second = (
        ActivationStatistics.from_tensors(
            {key: tensors[f"{name}/{i}/{key}"] for key in ("mean", "scatter")}, fields
        )
        for i, fields in enumerate(halves)
    )
    first.on_nonfinite = second.on_nonfinite = on_nonfinite
    return SplitHalfStatistics.of(first, second)
