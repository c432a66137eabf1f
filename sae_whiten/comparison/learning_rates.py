"""The best learning rate of every architecture and condition, by a short training at each rate."""

import dataclasses
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens import SAE

from sae_whiten._files import read_json, write_json
from sae_whiten.comparison.conditions import CONDITIONS
from sae_whiten.comparison.files import SCORES_FILE, brief_trainings
from sae_whiten.comparison.lockstep import train_arms
from sae_whiten.comparison.paired import interpolate_at
from sae_whiten.comparison.plan import Arm, Comparison, arms
from sae_whiten.comparison.setting import Setting
from sae_whiten.evaluation.catalogue import EXPLAINED_VARIANCE, EXPLAINED_VARIANCE_OF_LOSS
from sae_whiten.evaluation.evaluate import evaluate_saes
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.training.checkpoint import is_complete_sae
from sae_whiten.whitening import Whitening

__all__ = ["best_learning_rates", "loss_spaces"]

logger = logging.getLogger(__name__)

_SHORTENING = 8  # each rate is tried with this fraction of the training tokens, 1 / 8


def best_learning_rates(setting: Setting) -> dict[tuple[str, str], float]:
    """Train every architecture and condition briefly at each rate, and return the best rates.

    Each rate is tried with the first seed, an eighth of the training and the middle sparsity, on
    the same data. The best has the largest explained variance of held-out activations in the space
    of the loss. Sweeps of coefficients are compared at the same L0.

    Args:
        setting: A comparison with `learning_rates`. Its folder receives `learning_rates.json`; if
            that exists, nothing is trained.

    Returns:
        The rate by architecture and condition.
    """
    comparison, path = setting.comparison, setting.out / SCORES_FILE
    if not path.is_file():
        write_json(path, _scores(setting), indent=1)
        shutil.rmtree(brief_trainings(setting.out), ignore_errors=True)
    scores = read_json(path, "restore it from a copy, or delete it: the rates are then tried again")
    return {
        (architecture, condition): _best_rate(
            comparison, f"{architecture} under {condition}", scores[architecture][condition]
        )
        for architecture, condition in _pairs(comparison)
    }


def _scores(setting: Setting) -> dict[str, dict[str, dict[str, float | None]]]:
    """Scores by architecture, condition and rate; None where no SAE is near the wanted L0."""
    comparison = setting.comparison
    scores: dict[str, dict[str, dict[str, float | None]]] = {}
    for lr in comparison.learning_rates:
        records = _train_briefly(setting, lr)
        target = _middle(comparison.sparsity)
        for architecture, condition in _pairs(comparison):
            of_pair = [
                r
                for r in records
                if (r["architecture"], r["condition"]) == (architecture, condition)
            ]
            score = _score(of_pair, target)
            of_rates = scores.setdefault(architecture, {}).setdefault(condition, {})
            of_rates[f"{lr:g}"] = None if math.isnan(score) else score
    return scores


def _best_rate(comparison: Comparison, name: str, scores: Mapping[str, float | None]) -> float:
    """The rate with the largest score, with a warning if a better one may not have been tried.

    Args:
        comparison: Its `lr` is taken if there is no score.
        name: Architecture and condition, for the warning.
        scores: By rate.
    """
    known = {float(lr): score for lr, score in scores.items() if score is not None}
    best = max(known, key=known.__getitem__, default=comparison.lr)
    ends = min(comparison.learning_rates), max(comparison.learning_rates)
    if not known:
        logger.warning(
            "%s did not reach an L0 near %d at any learning rate: %g is used",
            name,
            _middle(comparison.sparsity),
            best,
        )
    elif best in ends and len(comparison.learning_rates) > 1:
        logger.warning(
            "%s is best at the %s learning rate that was tried, %g: try a wider range",
            name,
            "smallest" if best == ends[0] else "largest",
            best,
        )
    return best


def loss_spaces(arms: Sequence[Arm], statistics: Path) -> dict[str, Whitening]:
    """The whitening of each SAE whose loss is measured in whitened space, by name of the SAE.

    Args:
        arms: SAEs.
        statistics: File of the statistics.
    """
    spaces: dict[str, Whitening] = {}
    for condition in dict.fromkeys(arm.condition for arm in arms):
        config = CONDITIONS[condition].whitening
        if config is not None and config.loss_space == "whitened":
            whitening = Whitening.from_statistics(ActivationStatistics.load(statistics), config)
            spaces |= {arm.name: whitening for arm in arms if arm.condition == condition}
    return spaces


def _train_briefly(setting: Setting, lr: float) -> list[dict[str, Any]]:
    """Train all architectures and conditions briefly at one rate, and return their records."""
    comparison, folder = setting.comparison, brief_trainings(setting.out) / f"{lr:g}"
    path = folder / "results.json"
    if path.is_file():
        return read_json(path, "delete it: its SAEs are then evaluated again")
    seed = comparison.seeds[0]
    shortened = dataclasses.replace(
        comparison,
        lr=lr,
        learning_rates=(),
        sparsity=(_middle(comparison.sparsity),),
        training_tokens=max(
            comparison.train_batch_size_tokens, comparison.training_tokens // _SHORTENING
        ),
    )
    brief = dataclasses.replace(setting, comparison=shortened, out=folder)
    planned = {arm.name: arm for arm in arms(shortened)}
    saes = brief.saes(seed)
    untrained = [arm for name, arm in planned.items() if not is_complete_sae(saes / name)]
    if untrained:
        logger.info("trying learning rate %g", lr)
        train_arms(brief, untrained, seed)
    records = evaluate_saes(
        {name: SAE.load_from_disk(saes / name, device=comparison.device) for name in planned},
        setting.model,
        setting.held_out,
        n_tokens=comparison.held_out_sequences * comparison.context_size,
        context_size=comparison.context_size,
        batch_size_prompts=comparison.store_batch_size_prompts,
        spaces=loss_spaces(list(planned.values()), setting.statistics),
    )
    kept = [{**dataclasses.asdict(planned[r["name"]]), "metrics": r["metrics"]} for r in records]
    write_json(path, kept)
    return kept


def _pairs(comparison: Comparison) -> list[tuple[str, str]]:
    return list(dict.fromkeys((arm.architecture, arm.condition) for arm in arms(comparison)))


def _middle(sparsity: Sequence[int]) -> int:
    return sorted(sparsity)[len(sparsity) // 2]


def _score(records: Sequence[Mapping[str, Any]], target: int) -> float:
    """Explained variance in the space of the loss; of a sweep, at the target L0 (NaN outside)."""
    values = [
        r["metrics"].get(EXPLAINED_VARIANCE_OF_LOSS.key, r["metrics"][EXPLAINED_VARIANCE.key])
        for r in records
    ]
    if records[0]["coefficient"] is None:
        return values[0]
    return interpolate_at([r["metrics"]["l0"] for r in records], values, target)
