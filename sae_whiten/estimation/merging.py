"""Merging the statistics of several shards of a dataset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_whiten.estimation.dataset import canonical_source
from sae_whiten.estimation.options import decisive_fields
from sae_whiten.statistics import ActivationStatistics, saved_fields

__all__ = ["from_one_beginning", "merge_files"]


def from_one_beginning(paths: Sequence[Path]) -> tuple[Path, Path, str] | None:
    """Two files that were estimated from the beginning of one dataset, as far as its name tells.

    Args:
        paths: Files of statistics, all of them whole.

    Returns:
        The files and the dataset; None if all are of different ones or do not name any.
    """
    first_of: dict[tuple[str, str], Path] = {}
    for path in paths:
        provenance = saved_fields(path)["provenance"]
        source = provenance.get("cached_activations") or provenance.get("dataset_path")
        # "local" is the usual name of a dataset that was given as an object
        if not source or source == "local":
            continue
        # training reads this split, and does not record it
        key = canonical_source(source), str(provenance.get("split", "train"))
        first = first_of.setdefault(key, path)
        if first is not path:
            return first, path, f"{source} ({key[1]})"
    return None


def merge_files(paths: Sequence[Path]) -> ActivationStatistics:
    """The statistics of all files together: exactly those of one pass over all shards.

    Provenance entries that are equal in all shards are kept. Shards may be of different texts, but
    must agree in everything that determines the activations of a text (`decisive_fields`).

    Args:
        paths: Files of statistics, at least one.

    Raises:
        FileNotFoundError: A file is missing.
        CorruptFileError: A file is truncated, was changed, or is of another kind.
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
