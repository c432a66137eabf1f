"""The page of features of a comparison: an SAE with whitening beside one without."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.config import HfDataset

from sae_whiten.comparison.data import divide_rows
from sae_whiten.comparison.files import saes_folder, statistics_folder
from sae_whiten.comparison.plan import Comparison
from sae_whiten.comparison.report.page import FEATURE_PAGE
from sae_whiten.comparison.report.paper import WHITENED
from sae_whiten.comparison.summary import BASELINES
from sae_whiten.estimation.folders import statistics_file
from sae_whiten.estimation.sources import Model
from sae_whiten.evaluation.features.measure import measure_features
from sae_whiten.evaluation.features.options import FeatureOptions
from sae_whiten.evaluation.features.page import write_page
from sae_whiten.statistics import ActivationStatistics

__all__ = ["choose_pair", "write_feature_page"]

logger = logging.getLogger(__name__)


def write_feature_page(
    comparison: Comparison,
    records: Sequence[Mapping[str, Any]],
    model: Model,
    dataset: HfDataset,
    out: str | Path,
    dataset_path: str,
) -> Path | None:
    """Write the page into the folder of a comparison, unless it is there.

    Args:
        comparison: What was compared.
        records: What `compare` returned.
        model: As for `compare`.
        dataset: As for `compare`. The page shows its held-out rows.
        out: The folder, with the SAEs and the statistics.
        dataset_path: Name of the dataset.

    Returns:
        The page. None if no two SAEs of one architecture and seed have different conditions, or
        if their features cannot be shown; a warning then says why.
    """
    page, pair = Path(out) / FEATURE_PAGE, choose_pair(records)
    if page.is_file():
        return page
    if pair is None:
        return None
    folder = saes_folder(out, pair[0]["seed"])
    names = [str(record["name"]) for record in pair]
    saes = {name: SAE.load_from_disk(folder / name, device=comparison.device) for name in names}
    n_rows, context_size = comparison.held_out_sequences, comparison.context_size
    held_out, _ = divide_rows(dataset, n_rows, context_size)
    hook_name = comparison.hook_name
    statistics = ActivationStatistics.load(statistics_file(statistics_folder(out), hook_name))
    try:
        features = measure_features(
            saes,
            model,
            held_out,
            FeatureOptions(n_tokens=n_rows * context_size),
            statistics={hook_name: statistics},
            context_size=context_size,
            batch_size_prompts=comparison.store_batch_size_prompts,
        )
    except ValueError as error:  # the report is worth writing all the same
        logger.warning("no page of features: %s", error)
        return None
    write_page(features, page, {"dataset": f"{dataset_path} (held out)"})
    return page


def choose_pair(
    records: Sequence[Mapping[str, Any]],
) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """A run without whitening and one with it, of those pairs the one with the closest L0.

    Both have the first architecture and seed for which such a pair exists.
    """
    for first in records:
        of_family = [r for r in records if all(r[k] == first[k] for k in ("architecture", "seed"))]
        plain = _under(of_family, BASELINES)
        whitened = _under([r for r in of_family if r not in plain], WHITENED)
        if plain and whitened:
            pairs = [(a, b) for a in plain for b in whitened]
            return min(pairs, key=lambda pair: abs(_log_l0(pair[0]) - _log_l0(pair[1])))
    return None


def _under(
    records: Sequence[Mapping[str, Any]], conditions: Sequence[str]
) -> list[Mapping[str, Any]]:
    """The records of the first of `conditions` that occurs; if none does, of the first record's."""
    present = [str(record["condition"]) for record in records]
    chosen = next((name for name in (*conditions, *present) if name in present), None)
    return [record for record in records if record["condition"] == chosen]


def _log_l0(record: Mapping[str, Any]) -> float:
    return math.log(max(float(record["metrics"]["l0"]), 1e-3))
