"""Which whitening recovers known features? SAEs trained on `SyntheticActivations` and scored.

A run is one SAE. Runs of one seed share features, activations and their order, statistics and
initial weights, so that differences between conditions are paired. If sparsity is set by a
coefficient, several are tried, and the scores are interpolated at the target L0.
"""

import functools
import itertools
import json
import logging
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import temporary_seed

from sae_whiten.architectures import describe
from sae_whiten.architectures.folding import fold_whitening_into_weights
from sae_whiten.comparison.conditions import Condition
from sae_whiten.comparison.paired import interpolate_at
from sae_whiten.evaluation.metrics import dead_latents, explained_variance, firing_rates
from sae_whiten.lenses.synthetic import _workers
from sae_whiten.lenses.synthetic.data import SyntheticActivations
from sae_whiten.lenses.synthetic.ground_truth import ground_truth_scores
from sae_whiten.lenses.synthetic.options import (
    CHANCE,
    COEFFICIENTS,
    SyntheticDataConfig,
    SyntheticRun,
    parse_condition,
)
from sae_whiten.training.trainer import WhiteningTrainer
from sae_whiten.whitening import Whitening

__all__ = [
    "SyntheticSummary",
    "at_l0",
    "grid",
    "markdown_table",
    "next_coefficient",
    "read_rows",
    "run_all",
    "run_one",
    "summarise_runs",
]

logger = logging.getLogger(__name__)

_N_HELD_OUT = 20_000
# finer than comparison/sweeps.py: here a coefficient costs one small training, and each is chosen
# after the one before
_FACTOR = 3.0  # between coefficients, until two of them enclose the target L0
_CLOSE = 1.5  # ratio of two L0 between which scores may be interpolated
_MAX_TRIES = 8


def run_one(
    run: SyntheticRun, device: str = "cpu", data: SyntheticActivations | None = None
) -> dict[str, Any]:
    """Train one SAE, fold it, reload it as SAELens does, and score it on held-out activations.

    Args:
        run: What is trained.
        device: Device to train on.
        data: Activations to use instead of those that `run.data` describes.

    Returns:
        `{"run": ..., "scores": ...}`, for JSON. Scores: mcc, f1 and raw_mcc as in
        `GroundTruthScores`; explained_variance, l0, and dead (latents that never fire in 20000
        held-out activations), all in the space of the activations.
    """
    data = _data(run.data) if data is None else data
    condition = parse_condition(run.condition)
    with temporary_seed(run.data.seed):
        sae = _trained(run, condition, data, device)
    with tempfile.TemporaryDirectory() as directory:
        sae.save_inference_model(directory)
        plain = SAE.load_from_disk(directory, device="cpu")
    x, features = data.held_out(_N_HELD_OUT)
    with torch.no_grad():
        latents = plain.encode(x)
        reconstruction = plain.decode(latents)
    rates = firing_rates(latents)
    truth = ground_truth_scores(
        plain.W_dec, data.features, latents, features, data.whitening_matrix
    )
    scores = {
        **asdict(truth),
        "explained_variance": explained_variance(x, reconstruction),
        "l0": float(rates.sum()),
        "dead": dead_latents(rates),
    }
    return {"run": run.to_dict(), "scores": scores}


@functools.lru_cache(maxsize=2)
def _data(config: SyntheticDataConfig) -> SyntheticActivations:
    return SyntheticActivations(config)


def _new_sae(run: SyntheticRun, condition: Condition, d_in: int, device: str) -> TrainingSAE[Any]:
    """An SAE with initial weights."""
    options: dict[str, Any] = {}
    if run.has_coefficient:
        name, _ = COEFFICIENTS[run.architecture]
        if run.coefficient is None:
            raise ValueError(f"a run with {run.architecture} needs a coefficient ({name})")
        options = {
            name: run.coefficient,
            name.replace("coefficient", "warm_up_steps"): run.steps // 5,
        }
    elif describe(run.architecture).sparsity_is_exact:
        options = {"k": run.k}
    if run.architecture == "jumprelu":
        # as `compare` for activations of variance 1; the others keep SAELens' defaults
        options |= describe("jumprelu").compare_defaults(seen=1.0, loss=1.0, n_steps=run.steps)
    return TrainingSAE.from_dict(
        {
            "architecture": run.architecture,
            "d_in": d_in,
            "d_sae": run.d_sae,
            "device": device,
            "normalize_activations": (
                "covariance_whitening" if condition.whitening else run.condition
            ),
            **options,
        }
    )


def _trained(
    run: SyntheticRun, condition: Condition, data: SyntheticActivations, device: str
) -> TrainingSAE[Any]:
    """An SAE of the run; under the condition of chance it is only folded."""
    sae = _new_sae(run, condition, data.d_in, device)
    whitening = None
    if condition.whitening is not None:
        whitening = Whitening.from_statistics(data.statistics, condition.whitening)
    if run.condition == CHANCE:
        assert whitening is not None
        fold_whitening_into_weights(sae, whitening)
        return sae
    cfg = SAETrainerConfig(
        total_training_samples=run.steps * run.batch_size,
        train_batch_size_samples=run.batch_size,
        lr=run.lr,
        lr_end=run.lr / 10,
        lr_decay_steps=run.steps // 5,
        device=device,
        dead_feature_window=max(min(1000, run.steps // 5), 1),
        n_batches_for_norm_estimate=100,
    )
    batches = data.batches(run.batch_size)
    if whitening is None:
        trainer = SAETrainer(cfg, sae, batches)
        if run.condition == "expected_average_only_in":
            # from a separate stream: fit() would take batches that the other SAEs train on
            trainer.activation_scaler.estimate_scaling_factor(
                data.d_in, data.batches(run.batch_size), cfg.n_batches_for_norm_estimate
            )
        return trainer.fit()
    trainer = WhiteningTrainer(cfg, sae, batches, condition.whitening)
    trainer.scaler.whitening = whitening
    return trainer.fit()


def grid(
    architectures: Sequence[str],
    conditions: Sequence[str],
    seeds: Sequence[int],
    template: SyntheticRun,
) -> list[SyntheticRun]:
    """Every combination, and chance for every seed; runs of one seed, which share data, adjoin."""
    runs = []
    for seed in seeds:
        data = replace(template.data, seed=seed)
        runs.append(replace(template, architecture="topk", condition=CHANCE, data=data, steps=0))
        runs += [
            replace(template, architecture=architecture, condition=condition, data=data)
            for architecture, condition in itertools.product(architectures, conditions)
        ]
    return runs


def next_coefficient(tried: Mapping[float, float], target: float, start: float) -> float | None:
    """The coefficient to try next to reach the L0 `target`, or None when enough were tried.

    Enough is two whose L0 enclose `target` and differ by a factor of at most 1.5, or one within 2%
    of it, or 8 altogether. L0 is assumed to fall as the coefficient rises.

    Args:
        tried: L0 by coefficient.
        target: The target L0.
        start: The first coefficient.
    """
    if not tried:
        return start
    if len(tried) >= _MAX_TRIES or any(_hits(l0, target) for l0 in tried.values()):
        return None
    excess_of = {math.log(c): math.log(max(l0, 0.01) / target) for c, l0 in tried.items()}
    too_small = sorted(c for c, excess in excess_of.items() if excess > 0)
    too_large = sorted(c for c, excess in excess_of.items() if excess <= 0)
    if not too_small:
        return math.exp(too_large[0] - _step(excess_of, too_large[:2]))
    if not too_large:
        return math.exp(too_small[-1] + _step(excess_of, too_small[-2:]))
    low, high = too_small[-1], too_large[0]
    if excess_of[low] - excess_of[high] <= math.log(_CLOSE):
        return None
    # where the line between them crosses zero, but so that either side shrinks
    share = min(max(excess_of[low] / (excess_of[low] - excess_of[high]), 0.2), 0.8)
    return math.exp(low + share * (high - low))


def _step(excess_of: Mapping[float, float], nearest: Sequence[float]) -> float:
    """How far to go on, in log coefficient, while all L0 are too large, or all too small."""
    if len(nearest) < 2:
        return math.log(_FACTOR)
    one, two = nearest
    slope = max((excess_of[one] - excess_of[two]) / (two - one), 1e-6)
    distance = min(abs(excess_of[one]), abs(excess_of[two])) / slope
    # slightly beyond the target, to have a run on its other side
    return min(max(1.2 * distance, math.log(_FACTOR) / 2), 2 * math.log(_FACTOR))


def _hits(l0: float, target: float) -> bool:
    return abs(l0 / target - 1) < 0.02


def at_l0(rows: Sequence[Mapping[str, float]], target: float) -> tuple[dict[str, float], bool]:
    """Scores at the target L0: of a run within 2% of it, or else interpolated, linear in log L0,
    between the nearest runs on either side.

    Args:
        rows: Scores of runs that differ in their coefficient, with "l0" among them.
        target: The target L0.

    Returns:
        The scores, and whether the target was matched, by a run within 2% or by runs on both
        sides. If not, the scores are those of the nearest run. A run within 2% is not interpolated:
        the nearest run on the other side may be far.
    """

    def distance(row: Mapping[str, float]) -> float:
        return abs(math.log(max(row["l0"], 1e-6) / target))

    nearest = min(rows, key=distance)
    if _hits(nearest["l0"], target):
        return dict(nearest), True
    l0s = [float(row["l0"]) for row in rows]
    scores = {key: interpolate_at(l0s, [float(r[key]) for r in rows], target) for key in nearest}
    if math.isnan(scores["l0"]):  # the target is outside
        return dict(nearest), False
    return {**scores, "l0": target}, True


def run_all(
    runs: Sequence[SyntheticRun],
    results: Path,
    device: str = "cpu",
    jobs: int = 1,
    progress: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Do the runs that are not in `results` yet, in worker processes, and append each when done.

    Args:
        runs: Without coefficients; if one is needed, several are tried, see `next_coefficient`.
        results: File with one JSON object for each training.
        device: Where to train.
        jobs: Worker processes, of one thread each.
        progress: Called when a run is done, all its coefficients included.

    Returns:
        The rows of all trainings that belong to `runs`.
    """
    finished = {_key(SyntheticRun.from_dict(row["run"])): row for row in read_rows(results)}
    rows_of: dict[SyntheticRun, list[dict[str, Any]]] = {run: [] for run in runs}
    executor = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_workers.start)
    pending: dict[Future[dict[str, Any]], SyntheticRun] = {}
    results.parent.mkdir(parents=True, exist_ok=True)
    with executor, results.open("a") as file:
        if results.stat().st_size and not results.read_bytes().endswith(b"\n"):
            file.write("\n")  # end a line that was cut off

        def go_on(run: SyntheticRun) -> None:
            """Submit the next training of a run, if it needs one that was not done before."""
            while True:
                training = _next_training(run, rows_of[run])
                if training is None:
                    progress()
                    return
                row = finished.get(_key(training))
                if row is None:
                    pending[executor.submit(run_one, training, device)] = run
                    return
                rows_of[run].append(row)

        waiting = iter(rows_of)
        try:
            while True:
                # not all at once: submitted runs cannot be cancelled when one fails
                while len(pending) < jobs and (run := next(waiting, None)) is not None:
                    go_on(run)
                if not pending:
                    break
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    run, row = pending.pop(future), future.result()
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    rows_of[run].append(row)
                    go_on(run)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
    return [row for rows in rows_of.values() for row in rows]


def _next_training(run: SyntheticRun, rows: Sequence[Mapping[str, Any]]) -> SyntheticRun | None:
    if not run.has_coefficient:
        return None if rows else run
    _, start = COEFFICIENTS[run.architecture]
    tried = {row["run"]["coefficient"]: row["scores"]["l0"] for row in rows}
    coefficient = next_coefficient(tried, run.k, start)
    return None if coefficient is None else replace(run, coefficient=coefficient)


def _key(run: SyntheticRun) -> str:
    return json.dumps(run.to_dict(), sort_keys=True)


def read_rows(results: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none if there is no file.

    A line that is not a result, such as one cut off by a crash, is left out with a warning.
    """
    if not results.exists():
        return []
    rows, lines = [], results.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"run": row["run"], "scores": row["scores"]})
        except (json.JSONDecodeError, KeyError, TypeError):
            logger.warning("%s, line %d: not a result, left out", results, number)
    return rows


@dataclass(frozen=True)
class SyntheticSummary:
    """The scores of one architecture under one condition.

    Attributes:
        architecture: The architecture.
        condition: The condition.
        scores: By name of the score, one for each seed.
        matched: Whether all seeds reached the target L0.
    """

    architecture: str
    condition: str
    scores: dict[str, list[float]]
    matched: bool

    def mean(self, score: str) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.scores[score])

    def sd(self, score: str) -> float | None:
        """Standard deviation over seeds; None for a single one."""
        values = self.scores[score]
        return statistics.stdev(values) if len(values) > 1 else None


def summarise_runs(rows: Sequence[Mapping[str, Any]]) -> list[SyntheticSummary]:
    """Rows of trainings as one summary for each architecture and condition, in their order."""
    groups: dict[tuple[str, str], dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        run = row["run"]
        by_seed = groups.setdefault((run["architecture"], run["condition"]), {})
        by_seed.setdefault(run["data"]["seed"], []).append(row)
    summaries = []
    for (architecture, condition), by_seed in groups.items():
        matched = [
            at_l0([row["scores"] for row in same], same[0]["run"]["k"])
            if same[0]["run"]["coefficient"] is not None
            else (dict(same[0]["scores"]), True)
            for _, same in sorted(by_seed.items())
        ]
        names = matched[0][0]
        scores = {name: [float(row[name]) for row, _ in matched] for name in names}
        summaries.append(
            SyntheticSummary(architecture, condition, scores, all(m for _, m in matched))
        )
    return summaries


_COLUMNS = {
    "f1": ("F1", ".3f"),
    "mcc": ("MCC whitened", ".3f"),
    "explained_variance": ("explained variance", ".3f"),
    "l0": ("L0", ".1f"),
    "dead": ("dead", ".0f"),
    "raw_mcc": ("MCC raw (misleads)", ".3f"),
}


def markdown_table(summaries: Sequence[SyntheticSummary]) -> str:
    """Mean ± standard deviation over seeds, a table for each architecture, chance at the end."""
    chance = [s for s in summaries if s.condition == CHANCE]
    architectures = dict.fromkeys(s.architecture for s in summaries if s.condition != CHANCE)
    blocks = []
    for architecture in architectures:
        of_architecture = [
            s for s in summaries if s.architecture == architecture and s.condition != CHANCE
        ]
        lines = [
            f"| {architecture} | " + " | ".join(title for title, _ in _COLUMNS.values()) + " |",
            "|---" * (len(_COLUMNS) + 1) + "|",
        ]
        for summary in [*of_architecture, *chance]:
            cells = [
                _cell(summary.mean(name), summary.sd(name), form)
                for name, (_, form) in _COLUMNS.items()
            ]
            note = "" if summary.matched else " (L0 not reached)"
            lines.append(f"| {summary.condition}{note} | " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _cell(mean: float, sd: float | None, form: str) -> str:
    return f"{mean:{form}}" if sd is None else f"{mean:{form}} ± {sd:{form}}"
