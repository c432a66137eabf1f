"""Merging the statistics of several shards of a dataset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_whiten.estimation.options import decisive_fields
from sae_whiten.statistics import ActivationStatistics

__all__ = ["merge_files"]


def merge_files(paths: Sequence[Path]) -> ActivationStatistics:
    """The statistics of all files together: exactly those of one pass over all shards.

    Provenance entries that are equal in all shards are kept. Shards may be of different texts, but
    must agree in everything that determines the activations of a text (`decisive_fields`).

    Args:
        paths: Files of statistics, at least one.

    Raises:
        FileNotFoundError: A file is missing.
        CorruptFileError: A file is truncated, foreign or was changed.
        ValueError: Two files are of other models, hooks, widths..., or hold the same statistics,
            whose activations would count twice.
    """
    whole: ActivationStatistics | None = None
    paths_by_digest: dict[str, Path] = {}
    first_with: dict[str, tuple[Path, Any]] = {}
    for path in paths:
        shard = ActivationStatistics.load(path)
        # compared by content, not by name; empty shards may be equal
        twin = paths_by_digest.setdefault(shard.digest, path) if shard.n_samples else path
        if twin is not path:
            raise ValueError(
                f"{twin} and {path} hold the same statistics, whose activations would count "
                "twice: leave one out"
            )
        for name in decisive_fields():
            if name not in shard.provenance:
                continue
            value = shard.provenance[name]
            first, expected = first_with.setdefault(name, (path, value))
            if value != expected:
                raise ValueError(
                    f"{first} and {path} do not belong together: {name} is {expected!r} in one and "
                    f"{value!r} in the other"
                )
        whole = shard if whole is None else whole.merge(shard)
    assert whole is not None
    return whole
