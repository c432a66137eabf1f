"""Train SAEs with and without whitening, all else being equal, and evaluate them.

For every seed, all SAEs of a comparison are trained in lockstep on one stream of activations; the
seed decides the order of the data and the initial weights, which SAEs of one architecture share.
The statistics are estimated once, for all seeds.
"""

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.config import HfDataset

from sae_whiten._checks import require_context
from sae_whiten._files import read_json, read_json_lines, write_json, write_json_lines
from sae_whiten._redaction import redacted
from sae_whiten.comparison.conditions import CONDITIONS
from sae_whiten.comparison.data import (
    describe_activations,
    describe_rows,
    divide_rows,
    same_activations,
    shuffled,
)
from sae_whiten.comparison.files import (
    RESULTS_FILE,
    SCORES_FILE,
    SETTINGS_FILE,
    brief_trainings,
    checkpoints_folder,
    saes_folder,
    statistics_folder,
)
from sae_whiten.comparison.learning_rates import best_learning_rates, loss_spaces
from sae_whiten.comparison.lockstep import train_arms
from sae_whiten.comparison.plan import Arm, Comparison, arms
from sae_whiten.comparison.setting import Setting
from sae_whiten.comparison.stability import add_stability
from sae_whiten.comparison.sweeps import adapted_arms
from sae_whiten.estimation.fit import fit_statistics
from sae_whiten.estimation.folders import statistics_file
from sae_whiten.estimation.sources import Model, check_hook
from sae_whiten.evaluation.evaluate import evaluate_saes
from sae_whiten.evaluation.labels import LabelledTexts
from sae_whiten.evaluation.sae_probes import ProbingTasks
from sae_whiten.training.checkpoint import is_complete_sae

__all__ = ["Comparison", "compare"]

logger = logging.getLogger(__name__)

# settings that may change between calls; left_out follows from the others
_MAY_DIFFER = ("device", "left_out", "sweep_rounds")


def compare(
    comparison: Comparison,
    model: Model,
    dataset: HfDataset,
    out: str | Path,
    *,
    model_name: str,
    model_class_name: str = "HookedTransformer",
    model_from_pretrained_kwargs: Mapping[str, Any] | None = None,
    dataset_path: str = "local",
    labels: LabelledTexts | ProbingTasks | None = None,
) -> list[dict[str, Any]]:
    """Train and evaluate all SAEs of a comparison. Finished parts in `out` are kept.

    `out` receives `results.jsonl`, `settings.json`, the SAEs and the statistics. To continue after
    an interruption, repeat the call: it starts from the last checkpoint.

    Args:
        comparison: What is compared.
        model: As SAELens loads it, on the device of the comparison.
        dataset: With tokens or with text.
        out: Folder to write to.
        model_name: For the metadata of the SAEs, like the next three.
        model_class_name: As SAELens calls it.
        model_from_pretrained_kwargs: What the model was loaded with.
        dataset_path: Name of the dataset.
        labels: Texts to probe with, or tasks of `sae-probes`. None: no probing.

    Returns:
        A record per SAE: that of `evaluate_saes`, with architecture, condition, sparsity or
        coefficient, seed and learning rate. With several seeds also `across_seeds`, the agreement
        of their dictionaries and of their firing.

    Raises:
        ValueError: `out` holds a comparison with other settings; the model has no such hook; or
            one of those that `WhiteningMultiSAETrainingRunner` and `evaluate_saes` raise.
        CorruptFileError: A file in `out` is damaged; the message says what to do.
    """
    out = Path(out)
    n_held_out, context_size = comparison.held_out_sequences, comparison.context_size
    check_hook(model, comparison.hook_name)
    require_context(context_size, model)
    rows = describe_rows(dataset, n_held_out)
    held_out, training_rows = divide_rows(dataset, n_held_out, context_size)
    setting = Setting(
        comparison=comparison,
        model=model,
        training_rows=training_rows,
        held_out=held_out,
        labels=labels,
        model_names={
            "model_name": model_name,
            "model_class_name": model_class_name,
            "model_from_pretrained_kwargs": dict(model_from_pretrained_kwargs or {}),
        },
        dataset_path=dataset_path,
        out=out,
        statistics=statistics_file(statistics_folder(out), comparison.hook_name),
    )
    _write_settings(out, _settings(setting, rows))
    _warn_of_left_out(comparison)
    _estimate_statistics(setting)
    rates = best_learning_rates(setting) if comparison.learning_rates else {}
    records = _read(out / RESULTS_FILE)
    save = partial(write_json_lines, out / RESULTS_FILE, records)
    planned = arms(comparison)
    # coefficients that an earlier call added to the sweeps, for all seeds
    planned += [arm for arm in map(_arm, records) if arm not in planned]
    _train_and_evaluate(setting, planned, rates, records, save)
    for _ in range(comparison.sweep_rounds):
        added = adapted_arms(comparison, _of_seeds(records, comparison))
        _train_and_evaluate(setting, added, rates, records, save)
    add_stability(records, setting, save)
    records = _of_seeds(records, comparison)
    _warn_of_unmatched_l0(comparison, records)
    return records


def _train_and_evaluate(
    setting: Setting,
    planned: Sequence[Arm],
    rates: Mapping[tuple[str, str], float],
    records: list[dict[str, Any]],
    save: Callable[[], None],
) -> None:
    """Append the records of planned SAEs that have none, and save after every seed.

    Args:
        setting: The comparison, its model and its folder.
        planned: SAEs to train with every seed.
        rates: Learning rates other than that of the comparison, by architecture and condition.
        records: Of the SAEs evaluated so far.
        save: Writes the records.
    """
    by_name = {arm.name: arm for arm in planned}
    for seed in setting.comparison.seeds:
        done = {record["name"] for record in records if record["seed"] == seed}
        missing = [arm for name, arm in by_name.items() if name not in done]
        if missing:
            _train(setting, missing, seed, rates)
            records += _evaluate(setting, missing, seed, rates)
            save()


def _train(
    setting: Setting, missing: Sequence[Arm], seed: int, rates: Mapping[tuple[str, str], float]
) -> None:
    """Train the SAEs of one seed that are not on disk. SAEs of one rate are trained together."""
    by_rate: dict[float, list[Arm]] = {}
    for arm in missing:
        if not is_complete_sae(setting.saes(seed) / arm.name):
            by_rate.setdefault(_rate(setting, arm, rates), []).append(arm)
    for lr, together in by_rate.items():
        logger.info("training %d SAEs with seed %d", len(together), seed)
        comparison = dataclasses.replace(setting.comparison, lr=lr)
        train_arms(dataclasses.replace(setting, comparison=comparison), together, seed)


def _evaluate(
    setting: Setting, missing: Sequence[Arm], seed: int, rates: Mapping[tuple[str, str], float]
) -> list[dict[str, Any]]:
    """Records of trained SAEs of one seed."""
    logger.info("evaluating the SAEs of seed %d", seed)
    comparison, folder = setting.comparison, setting.saes(seed)
    saes = {
        arm.name: SAE.load_from_disk(folder / arm.name, device=comparison.device) for arm in missing
    }
    measured = evaluate_saes(
        saes,
        setting.model,
        setting.held_out,
        setting.labels,
        n_tokens=comparison.held_out_sequences * comparison.context_size,
        context_size=comparison.context_size,
        batch_size_prompts=comparison.store_batch_size_prompts,
        probe_seeds=comparison.probe_seeds,
        tpp_and_scr=comparison.tpp_and_scr,
        spaces=loss_spaces(missing, setting.statistics),
    )
    return [
        {**record, **dataclasses.asdict(arm), "seed": seed, "lr": _rate(setting, arm, rates)}
        for arm, record in zip(missing, measured, strict=True)
    ]


def _rate(setting: Setting, arm: Arm, rates: Mapping[tuple[str, str], float]) -> float:
    return rates.get((arm.architecture, arm.condition), setting.comparison.lr)


def _arm(record: Mapping[str, Any]) -> Arm:
    return Arm(**{field.name: record[field.name] for field in dataclasses.fields(Arm)})


def _of_seeds(records: Sequence[dict[str, Any]], comparison: Comparison) -> list[dict[str, Any]]:
    return [record for record in records if record["seed"] in comparison.seeds]


def _warn_of_left_out(comparison: Comparison) -> None:
    """Say which architectures cannot be trained under which conditions, and why."""
    for architecture, reasons in comparison.left_out.items():
        for reason in dict.fromkeys(reasons.values()):
            under = ", ".join(name for name, other in reasons.items() if other == reason)
            logger.warning("%s is left out under %s: %s", architecture, under, reason)


def _warn_of_unmatched_l0(comparison: Comparison, records: Sequence[Mapping[str, Any]]) -> None:
    """Warn if SAEs without a set sparsity have an L0 outside that of the SAEs with a k."""
    k = sorted(r["metrics"]["l0"] for r in records if r["sparsity"] is not None)
    for name in comparison.architectures:
        l0s = [
            r["metrics"]["l0"]
            for r in records
            if r["architecture"] == name and r["sparsity"] is None and r["coefficient"] is None
        ]
        if l0s and k and not k[0] <= min(l0s) <= max(l0s) <= k[-1]:
            suggested = {max(1, int(min(l0s) / 1.2)), math.ceil(max(l0s) * 1.2)}
            logger.warning(
                "%s reached L0 of %.4g to %.4g, but the SAEs with a k have L0 of %.4g to %.4g: to "
                "compare them, repeat this in the same folder with k of %s too (sparsity)",
                name,
                min(l0s),
                max(l0s),
                k[0],
                k[-1],
                " and ".join(map(str, sorted(suggested))),
            )


def _settings(setting: Setting, rows: str) -> dict[str, Any]:
    """What `settings.json` holds.

    Args:
        setting: The comparison, its model and its rows.
        rows: Fingerprint of the dataset.
    """
    comparison = setting.comparison
    return {
        **dataclasses.asdict(comparison),
        **setting.model_names,
        "dataset_path": setting.dataset_path,
        "labels": None if setting.labels is None else dict(setting.labels.source),
        "conditions": {
            name: None if (config := CONDITIONS[name].whitening) is None else config.to_dict()
            for name in comparison.conditions
        },
        "left_out": comparison.left_out,
        "rows": rows,
        "activations": describe_activations(
            setting.model,
            setting.held_out,
            comparison.hook_name,
            context_size=comparison.context_size,
            prepend_bos=comparison.prepend_bos,
        ),
    }


def _write_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or check that they equal those on disk."""
    path = out / SETTINGS_FILE
    settings = json.loads(json.dumps(redacted(settings), default=str))
    if path.is_file():
        # of fields that earlier versions did not write
        defaults = {
            "sae_options": {},
            "learning_rates": [],
            "probe_seeds": 1,
            "tpp_and_scr": True,
            "rows": settings["rows"],
            "activations": settings["activations"],
        }
        remedy = "restore it from a copy, or delete it if the options are still those of before"
        before = {**defaults, **redacted(read_json(path, remedy))}
        if same_activations(before["activations"], settings["activations"]):
            settings["activations"] = before["activations"]
        in_training = any(checkpoints_folder(out).glob("*/*")) or brief_trainings(out).is_dir()
        # these may grow, except that sparsity must not change while SAEs are being trained
        growing = ("seeds",) if in_training else ("seeds", "sparsity")
        for name in growing:
            settings[name] = sorted({*before.get(name, []), *settings[name]})
        different = [
            f"{name}={before.get(name)!r} (now {settings.get(name)!r})"
            for name in {**before, **settings}
            if name not in (*_MAY_DIFFER, *growing) and before.get(name) != settings.get(name)
        ]
        results = (out / RESULTS_FILE, out / SCORES_FILE)
        trained = in_training or saes_folder(out).is_dir() or any(r.is_file() for r in results)
        if different and not trained:
            # the statistics may belong to other settings
            shutil.rmtree(statistics_folder(out), ignore_errors=True)
        elif different:
            raise ValueError(
                f"{out} holds a comparison with {', '.join(different)}. Choose another folder, or "
                "keep those settings."
            )
    write_json(path, settings, indent=1)


def _estimate_statistics(setting: Setting) -> None:
    """Write the statistics for the whitening of all SAEs, unless they exist."""
    comparison = setting.comparison
    if setting.statistics.is_file():
        return
    fit_statistics(
        setting.model,
        # shuffled, because texts of one source follow each other
        shuffled(setting.training_rows, 0),
        comparison.hook_name,
        out=statistics_folder(setting.out),
        tolerance=comparison.tolerance,
        context_size=comparison.context_size,
        batch_size_prompts=comparison.store_batch_size_prompts,
        prepend_bos=comparison.prepend_bos,
        exclude_special_tokens=comparison.exclude_special_tokens,
        provenance=setting.model_names,
    )


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    remedy = "restore the file from a copy, or delete the line: its SAE is then evaluated again"
    return read_json_lines(path, remedy)
