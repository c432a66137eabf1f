"""Agreement of the SAEs of a comparison over its seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sae_whiten.config import WhiteningConfig
from sae_whiten.estimation.folders import statistics_file
from sae_whiten.evaluation.catalogue import (
    STABILITY,
    STABILITY_NULL,
    STABILITY_RAW,
    STABILITY_RAW_NULL,
)
from sae_whiten.evaluation.stability import stability
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.whitening import Whitening

__all__ = ["add_stability"]


def add_stability(records: Sequence[dict[str, Any]], out: Path, hook_name: str) -> None:
    """Write `across_seeds` into the records of SAEs that were trained with several seeds.

    Existing results are kept. SAEs that are no longer on disk for all seeds are skipped.

    Args:
        records: Records of all seeds of a comparison.
        out: Folder of the comparison, with the SAEs and the statistics.
        hook_name: Hook of the comparison.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_name.setdefault(record["name"], []).append(record)
    whitening: Whitening | None = None
    for name, group in by_name.items():
        seeds = [record["seed"] for record in group]
        known = all(record.get("compared_seeds") == seeds for record in group)
        paths = [out / "saes" / f"seed-{s}" / name / "sae_weights.safetensors" for s in seeds]
        if len(seeds) < 2 or known or not all(path.is_file() for path in paths):
            continue
        if whitening is None:
            statistics = ActivationStatistics.load(statistics_file(out / "statistics", hook_name))
            whitening = Whitening.from_statistics(statistics, WhiteningConfig())
        agreements = stability([_decoder(path) for path in paths], whitening)
        for record, agreement in zip(group, agreements, strict=True):
            record["compared_seeds"] = seeds
            record["across_seeds"] = {
                STABILITY.key: agreement.whitened,
                STABILITY_NULL.key: agreement.whitened_null,
                STABILITY_RAW.key: agreement.raw,
                STABILITY_RAW_NULL.key: agreement.raw_null,
            }


def _decoder(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("W_dec")
