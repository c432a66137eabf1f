"""Checks that statistics were estimated from the activations that an SAE is trained on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens.saes.sae import SAEConfig

from sae_whiten._redaction import redacted
from sae_whiten.estimation.dataset import canonical_source
from sae_whiten.estimation.folders import find_statistics
from sae_whiten.estimation.options import decisive_fields
from sae_whiten.statistics import ActivationStatistics

__all__ = ["contradictions", "load_statistics", "provenance_of"]


def provenance_of(cfg: SAEConfig) -> dict[str, Any]:
    """The origin of an SAE's activations, as SAELens' runner wrote it to the metadata."""
    names = (*decisive_fields(), "dataset_path")
    fields = {name: cfg.metadata[name] for name in names if name in cfg.metadata}
    return redacted(fields)


def load_statistics(
    source: str | Path, cfg: SAEConfig, allow_other: bool = False
) -> ActivationStatistics:
    """Read the statistics to whiten an SAE with, and check their provenance.

    Args:
        source: A file of statistics, a folder with one for each hook, the folder that a training
            run wrote, or a repo of the Hugging Face hub, "user/name" or "user/name@revision"; a
            path that exists is preferred to the hub.
        cfg: Config of the SAE.
        allow_other: Accept statistics whose provenance contradicts the SAE's metadata.

    Raises:
        FileNotFoundError: There are no statistics, or none for this hook.
        CorruptFileError: The file is truncated, was changed, or is of another kind.
        ConnectionError: The hub cannot be reached, and they were not downloaded before.
        ValueError: They are of another width, or of another model, hook, dataset...
    """
    path = find_statistics(source, cfg.metadata.hook_name)
    statistics = ActivationStatistics.load(path)
    if statistics.d_in != cfg.d_in:
        raise ValueError(f"{source} is of width {statistics.d_in}, the SAE of width {cfg.d_in}")
    if not allow_other and (different := contradictions(statistics, cfg)):
        listed = ", ".join(
            f"{name}={recorded!r} (training has {expected!r})"
            for name, (recorded, expected) in different.items()
        )
        raise ValueError(
            f"{source} was estimated with {listed}. Estimate others, or set "
            "WhiteningConfig(allow_other_statistics=True)."
        )
    return statistics


def contradictions(statistics: ActivationStatistics, cfg: SAEConfig) -> dict[str, tuple[Any, Any]]:
    """Fields in which the provenance of statistics and the metadata of an SAE differ, with the
    values of both. Fields that one of them lacks are not compared."""
    expected, recorded = provenance_of(cfg), redacted(statistics.provenance)
    if "dataset_path" in expected:
        expected["split"] = "train"  # SAELens trains on this split
    return {
        name: (recorded[name], expected[name])
        for name in expected
        if name in recorded and not _is_same(name, recorded, expected)
    }


def _is_same(name: str, recorded: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether a field has the same meaning in both: positions may be written in several ways."""
    as_written = json.dumps(recorded[name], default=str) == json.dumps(expected[name], default=str)
    return as_written or _canonical(name, recorded) == _canonical(name, expected)


def _canonical(name: str, fields: Mapping[str, Any]) -> str:
    """A field as JSON, in a form that is equal for equivalent values."""
    value, context_size = fields[name], fields.get("context_size")
    if name == "seqpos_slice" and value and context_size and context_size > 0:
        value = list(range(context_size)[slice(*value)])
    elif name == "exclude_special_tokens" and not isinstance(value, bool):
        value = sorted(set(value or ())) or False
    elif name == "dataset_path" and isinstance(value, str):
        value = canonical_source(value)
    elif name == "split":
        value = str(value).partition("[")[0]  # statistics of a part are accepted
    return json.dumps(value, sort_keys=True, default=str)
