"""Agreement of the SAEs of a comparison over its seeds."""

from collections.abc import Callable, Sequence
from typing import Any

from sae_lens import SAE

from sae_whiten.comparison.setting import Setting
from sae_whiten.config import WhiteningConfig
from sae_whiten.evaluation.catalogue import (
    FIRING_AGREEMENT,
    FIRING_AGREEMENT_NULL,
    STABILITY,
    STABILITY_NULL,
    STABILITY_RAW,
    STABILITY_RAW_NULL,
)
from sae_whiten.evaluation.firing import firing_agreement, held_out_firing
from sae_whiten.evaluation.options import SequenceOptions
from sae_whiten.evaluation.stability import stability
from sae_whiten.evaluation.tokens import Reading
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.training.checkpoint import is_complete_sae
from sae_whiten.whitening import Whitening

__all__ = ["add_stability"]


def add_stability(
    records: Sequence[dict[str, Any]], setting: Setting, save: Callable[[], None]
) -> None:
    """Write `across_seeds` into the records of SAEs that were trained with several seeds.

    Existing results are kept. SAEs that are no longer on disk for all seeds are skipped.

    Args:
        records: Records of all seeds of a comparison.
        setting: The comparison, its model and its folder with the SAEs and the statistics.
        save: Writes the records. Called after the SAEs of each name: wide ones take minutes.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_name.setdefault(record["name"], []).append(record)
    comparison = setting.comparison
    whitening: Whitening | None = None
    for name, group in by_name.items():
        seeds = [record["seed"] for record in group]
        folders = [setting.saes(seed) / name for seed in seeds]
        known = all(
            record.get("compared_seeds") == seeds
            # earlier versions compared the dictionaries alone
            and FIRING_AGREEMENT.key in record["across_seeds"]
            for record in group
        )
        if len(seeds) < 2 or known or not all(map(is_complete_sae, folders)):
            continue
        if whitening is None:
            statistics = ActivationStatistics.load(setting.statistics)
            whitening = Whitening.from_statistics(statistics, WhiteningConfig())
        saes = {
            str(seed): SAE.load_from_disk(folder, device=comparison.device)
            for seed, folder in zip(seeds, folders, strict=True)
        }
        options = SequenceOptions(
            context_size=comparison.context_size,
            batch_size_prompts=comparison.store_batch_size_prompts,
        )
        firing = held_out_firing(
            saes,
            setting.model,
            setting.held_out,
            comparison.held_out_sequences * comparison.context_size,
            Reading.of(saes, setting.model, options),
        )
        for record, dictionary, on_tokens in zip(
            group,
            stability([sae.W_dec for sae in saes.values()], whitening),
            firing_agreement(list(firing.values())),
            strict=True,
        ):
            record["compared_seeds"] = seeds
            record["across_seeds"] = {
                STABILITY.key: dictionary.whitened,
                STABILITY_NULL.key: dictionary.whitened_null,
                STABILITY_RAW.key: dictionary.raw,
                STABILITY_RAW_NULL.key: dictionary.raw_null,
                FIRING_AGREEMENT.key: on_tokens.value,
                FIRING_AGREEMENT_NULL.key: on_tokens.null,
            }
        save()
