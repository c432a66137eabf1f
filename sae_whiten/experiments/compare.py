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
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from sae_lens import SAE, LoggingConfig, MultiSAETrainingRunnerConfig
from sae_lens.config import HfDataset
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE
from transformer_lens import HookedRootModule

from sae_whiten._files import atomic_path
from sae_whiten.config import WhiteningConfig
from sae_whiten.experiments.evaluate import evaluate_saes
from sae_whiten.experiments.labels import LabelledTexts
from sae_whiten.saelens.collect import fit_statistics
from sae_whiten.saelens.multi_runner import WhiteningMultiSAETrainingRunner
from sae_whiten.saelens.provenance import statistics_file, without_secrets
from sae_whiten.statistics import ActivationStatistics

__all__ = ["CONDITIONS", "Comparison", "compare"]

logger = logging.getLogger(__name__)

CONDITIONS: dict[str, WhiteningConfig | None] = {
    "none": None,
    # the identity matrix: what is left of whitening is the mean
    "centred": WhiteningConfig(kind="zca", strength=0.0),
    "expected_average_only_in": None,
    "whitened": WhiteningConfig(loss_space="whitened"),
    "original": WhiteningConfig(loss_space="original"),
    "original_norms": WhiteningConfig(loss_space="original", sparsity_norms="original"),
    "half": WhiteningConfig(strength=0.5, loss_space="whitened"),
    "original_zca": WhiteningConfig(kind="zca", loss_space="original"),
}
"""How each condition whitens; those without a `WhiteningConfig` are SAELens' own
`normalize_activations`."""

_RESULTS, _SETTINGS = "results.jsonl", "settings.json"
_ESTIMATION_BATCHES = 25  # of expected_average_only_in, which no SAE is trained on


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared, and how the SAEs are trained.

    Attributes:
        hook_name: The hook.
        conditions: Names in `CONDITIONS`.
        architectures: Names of SAELens' training architectures.
        sparsity: k of each SAE, where the architecture has one; else the L0 at which metrics are
            interpolated between SAEs of different `coefficients`.
        coefficients: Sparsity coefficients of architectures without k (l1_coefficient of standard
            and gated, l0_coefficient of jumprelu), as for activations of variance 1: they are
            multiplied by the root mean variance of the coordinates that the SAE sees, and divided
            by that of its loss, so that one sweep covers similar L0 under all conditions.
        seeds: Of the data order and the initial weights.
        d_sae: Number of latents; None: 8 times the width.
        training_tokens: Activations that every SAE is trained on.
        train_batch_size_tokens, lr: As in SAELens. none and centred leave activations in the
            model's own unit, and half does in part, to which the learning rate is not adapted:
            where the variance is far from 1, some of a difference to other conditions is of scale.
        context_size, prepend_bos, exclude_special_tokens, store_batch_size_prompts: As in SAELens.
        held_out_sequences: Rows, from the beginning of the dataset, that the SAEs are evaluated
            on instead of being trained on; as many sequences of the context size are read from
            them, and of a long text only the beginning.
        tolerance: Of the statistics, as in `WhiteningConfig`.
        device: Where everything runs.
    """

    hook_name: str
    conditions: Sequence[str] = ("none", "centred", "whitened", "original", "half")
    architectures: Sequence[str] = ("topk", "standard")
    sparsity: Sequence[int] = (16, 32, 64)
    coefficients: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0)
    seeds: Sequence[int] = (0, 1, 2)
    d_sae: int | None = None
    training_tokens: int = 2_000_000
    train_batch_size_tokens: int = 4096
    lr: float = 3e-4
    context_size: int = 128
    prepend_bos: bool = True
    exclude_special_tokens: bool | list[int] = True
    store_batch_size_prompts: int = 16
    held_out_sequences: int = 256
    tolerance: float = 0.02
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("conditions", "architectures", "sparsity", "coefficients", "seeds"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values}: at least one, and none twice")
            # as JSON gives them back
            object.__setattr__(self, name, values)
        if unknown := set(self.conditions) - set(CONDITIONS):
            raise ValueError(
                f"no condition {', '.join(sorted(unknown))}; there are {', '.join(CONDITIONS)}"
            )
        if not any(CONDITIONS[name] is not None for name in self.conditions):
            raise ValueError(
                f"conditions={', '.join(self.conditions)}: nothing is whitened; add one of "
                + ", ".join(name for name, config in CONDITIONS.items() if config is not None)
            )
        for architecture in self.architectures:
            _sparsity_field(architecture)
            if architecture == "matryoshka_batchtopk":
                raise ValueError("matryoshka_batchtopk needs widths, which a comparison has not")

    @property
    def n_steps(self) -> int:
        """Training steps of every SAE."""
        return self.training_tokens // self.train_batch_size_tokens


@dataclasses.dataclass(frozen=True)
class _Arm:
    """One SAE of a comparison, but for its seed."""

    architecture: str
    condition: str
    sparsity: int | None
    coefficient: float | None

    @property
    def name(self) -> str:
        """Of its folder."""
        amount = f"{self.coefficient:g}" if self.sparsity is None else f"k{self.sparsity}"
        return f"{self.architecture}-{self.condition}-{amount}"


def compare(
    comparison: Comparison,
    model: HookedRootModule,
    dataset: HfDataset,
    out: str | Path,
    *,
    model_name: str,
    model_class_name: str = "HookedTransformer",
    model_from_pretrained_kwargs: Mapping[str, Any] | None = None,
    dataset_path: str = "local",
    labels: LabelledTexts | None = None,
) -> list[dict[str, Any]]:
    """Train and evaluate all SAEs of a comparison; what `out` holds already is not done again.

    `out` receives `results.jsonl`, `settings.json`, the SAEs and the statistics. A comparison that
    was killed goes on from its last checkpoint when it is repeated.

    Args:
        comparison: What is compared.
        model: As SAELens loads it, on the device of the comparison.
        dataset: With tokens or with text.
        out: Folder to write to.
        model_name, model_class_name, model_from_pretrained_kwargs, dataset_path: What the model
            and the dataset are called in the metadata of the SAEs.
        labels: Texts to probe with; None leaves probing out.

    Returns:
        A record per SAE: what `evaluate_saes` says of it, and architecture, condition, sparsity or
        coefficient, and seed.

    Raises:
        ValueError: `out` holds a comparison with other settings; or as training and evaluation do.
    """
    out = Path(out)
    names: dict[str, Any] = {
        "model_name": model_name,
        "model_class_name": model_class_name,
        "model_from_pretrained_kwargs": dict(model_from_pretrained_kwargs or {}),
    }
    settings = {
        **dataclasses.asdict(comparison),
        **without_secrets(names),
        "dataset_path": dataset_path,
        "labels": None if labels is None else dict(labels.source),
        "conditions": {
            name: None if (config := CONDITIONS[name]) is None else config.to_dict()
            for name in comparison.conditions
        },
    }
    _claim(out, settings)
    held_out, rest = _divided(dataset, comparison)
    statistics = _statistics(comparison, model, rest, out, names)
    arms = _arms(comparison)
    records = _read(out / _RESULTS)
    for seed in comparison.seeds:
        done = {record["name"] for record in records if record["seed"] == seed}
        if all(arm.name in done for arm in arms):
            continue
        folder = out / "saes" / f"seed-{seed}"
        if not all((folder / arm.name / "cfg.json").is_file() for arm in arms):
            logger.info("training %d SAEs with seed %d", len(arms), seed)
            _train(
                comparison,
                arms,
                seed,
                statistics,
                model,
                _shuffled(rest, seed),
                out,
                {**names, "dataset_path": dataset_path},
            )
        logger.info("evaluating the SAEs of seed %d", seed)
        missing = {arm.name: arm for arm in arms if arm.name not in done}
        saes = {
            name: SAE.load_from_disk(folder / name, device=comparison.device) for name in missing
        }
        for found in evaluate_saes(
            saes,
            model,
            held_out,
            labels,
            n_tokens=comparison.held_out_sequences * comparison.context_size,
            context_size=comparison.context_size,
            batch_size_prompts=comparison.store_batch_size_prompts,
        ):
            arm = missing[found["name"]]
            records.append({**found, **dataclasses.asdict(arm), "seed": seed})
        _write(out / _RESULTS, records)
    return [record for record in records if record["seed"] in comparison.seeds]


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or check that they are those that are there."""
    path = out / _SETTINGS
    settings = json.loads(json.dumps(settings, default=str))
    if path.is_file():
        before = json.loads(path.read_text())
        # whichever have been asked for so far
        settings["seeds"] = sorted({*before.get("seeds", []), *settings["seeds"]})
        different = [
            f"{name}={before.get(name)!r} (now {settings.get(name)!r})"
            for name in {**before, **settings}
            # more seeds may be added to those that are done
            if name not in ("seeds", "device") and before.get(name) != settings.get(name)
        ]
        if different:
            raise ValueError(
                f"{out} holds a comparison with {', '.join(different)}. Choose another folder, or "
                "repeat that one."
            )
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(settings, indent=1))


def _divided(dataset: Any, comparison: Comparison) -> tuple[Any, Any]:
    """The first rows, to evaluate on, and the rest, to train on."""
    n_held_out = comparison.held_out_sequences
    if isinstance(dataset, datasets.IterableDataset):
        held_out, rest = dataset.take(n_held_out), dataset.skip(n_held_out)
    elif len(dataset) < 2 * n_held_out:
        raise ValueError(
            f"the dataset has {len(dataset)} rows, too few to hold {n_held_out} of them out"
        )
    else:
        held_out = dataset.select(range(n_held_out))
        rest = dataset.select(range(n_held_out, len(dataset)))
    return held_out.map(partial(_beginning, 8 * comparison.context_size)), rest


def _beginning(n_characters: int, row: dict[str, Any]) -> dict[str, Any]:
    """The beginning of a document, so that all of them are evaluated on and not the first few."""
    return {
        name: value[:n_characters] if isinstance(value, str) else value
        for name, value in row.items()
    }


def _shuffled(dataset: Any, seed: int) -> Any:
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.shuffle(seed=seed, buffer_size=10_000)
    return dataset.shuffle(seed=seed)


def _statistics(
    comparison: Comparison,
    model: HookedRootModule,
    dataset: Any,
    out: Path,
    names: Mapping[str, Any],
) -> ActivationStatistics:
    path = statistics_file(out / "statistics", comparison.hook_name)
    if path.is_file():
        return ActivationStatistics.load(path)
    found = fit_statistics(
        model,
        # texts of one source follow each other
        _shuffled(dataset, 0),
        comparison.hook_name,
        out=out / "statistics",
        tolerance=comparison.tolerance,
        context_size=comparison.context_size,
        batch_size_prompts=comparison.store_batch_size_prompts,
        prepend_bos=comparison.prepend_bos,
        exclude_special_tokens=comparison.exclude_special_tokens,
        provenance=names,
    )
    return found[comparison.hook_name]


def _arms(comparison: Comparison) -> list[_Arm]:
    arms = []
    for architecture in comparison.architectures:
        with_k = _sparsity_field(architecture) == "k"
        for condition in comparison.conditions:
            if with_k:
                arms += [_Arm(architecture, condition, k, None) for k in comparison.sparsity]
            else:
                arms += [_Arm(architecture, condition, None, c) for c in comparison.coefficients]
    return arms


def _sparsity_field(architecture: str) -> str:
    """What sets the sparsity of an architecture."""
    _, config_class = get_sae_training_class(architecture)
    names = {field.name for field in dataclasses.fields(config_class)}
    for name in ("k", "l1_coefficient", "l0_coefficient"):
        if name in names:
            return name
    raise ValueError(f"{architecture} has neither k nor an L1 or L0 coefficient to compare at")


def _train(
    comparison: Comparison,
    arms: Sequence[_Arm],
    seed: int,
    statistics: ActivationStatistics,
    model: HookedRootModule,
    dataset: Any,
    out: Path,
    names: Mapping[str, Any],
) -> None:
    saes: dict[str, TrainingSAE[Any]] = {}
    whitening: dict[str, WhiteningConfig] = {}
    path = str(statistics_file(out / "statistics", comparison.hook_name))
    for arm in arms:
        sae_class, config_class = get_sae_training_class(arm.architecture)
        # equal for all conditions of an architecture
        torch.manual_seed(seed)
        saes[arm.name] = sae_class(config_class(**_sae_options(comparison, arm, statistics)))
        config = CONDITIONS[arm.condition]
        if config is not None:
            whitening[arm.name] = dataclasses.replace(config, statistics=path)
    checkpoints = out / "checkpoints" / f"seed-{seed}"
    cfg = MultiSAETrainingRunnerConfig(
        saes={name: sae.cfg for name, sae in saes.items()},
        hook_names=comparison.hook_name,
        **names,
        streaming=isinstance(dataset, datasets.IterableDataset),
        context_size=comparison.context_size,
        prepend_bos=comparison.prepend_bos,
        exclude_special_tokens=comparison.exclude_special_tokens,
        store_batch_size_prompts=comparison.store_batch_size_prompts,
        # four batches to mix
        n_batches_in_buffer=math.ceil(
            4 * comparison.train_batch_size_tokens / comparison.context_size
        ),
        training_tokens=comparison.training_tokens,
        train_batch_size_tokens=comparison.train_batch_size_tokens,
        lr=comparison.lr,
        lr_warm_up_steps=comparison.n_steps // 20,
        lr_decay_steps=comparison.n_steps // 5,
        # SAELens' 1000 steps are more than a short run has, and no latent would count as dead
        dead_feature_window=min(1000, max(1, comparison.n_steps // 3)),
        n_batches_for_norm_estimate=_ESTIMATION_BATCHES,
        device=comparison.device,
        seed=seed,
        logger=LoggingConfig(log_to_wandb=False, wandb_id=f"seed-{seed}"),
        n_checkpoints=2,
        checkpoint_path=str(checkpoints.parent),
        output_path=str(out / "saes" / f"seed-{seed}"),
    )
    found = [int(p.name) for p in checkpoints.glob("*") if p.name.isdigit()]
    if found:
        cfg.resume_from_checkpoint = str(checkpoints / str(max(found)))
    # the order in which SAELens mixes activations comes from torch's generator
    torch.manual_seed(seed)
    WhiteningMultiSAETrainingRunner(
        cfg, whitening, override_dataset=dataset, override_model=model, override_saes=saes
    ).run()
    shutil.rmtree(checkpoints, ignore_errors=True)  # of many SAEs, which are saved now


def _sae_options(
    comparison: Comparison, arm: _Arm, statistics: ActivationStatistics
) -> dict[str, Any]:
    config = CONDITIONS[arm.condition]
    stock = arm.condition if config is None else "covariance_whitening"
    options: dict[str, Any] = {
        "d_in": statistics.d_in,
        "d_sae": comparison.d_sae or 8 * statistics.d_in,
        "normalize_activations": stock,
        "device": comparison.device,
    }
    name = _sparsity_field(arm.architecture)
    if name == "k":
        options["k"] = arm.sparsity
    else:
        assert arm.coefficient is not None
        options[name] = arm.coefficient * _unit(arm.condition, statistics, name)
    if arm.architecture == "jumprelu":
        seen, loss = _scales(arm.condition, statistics)
        # SAELens' defaults are for latents of about 1, and reach the threshold alone, which a
        # short training hardly moves
        options |= {
            "jumprelu_sparsity_loss_mode": "tanh",
            "jumprelu_ste_to_input": True,
            "jumprelu_bandwidth": 2.0 * seen,
            "jumprelu_init_threshold": 0.1 * seen,
            "jumprelu_tanh_scale": 4.0 / seen,
            "pre_act_loss_coefficient": 3e-6 * loss**2 / seen,
        }
    _, config_class = get_sae_training_class(arm.architecture)
    if "topk_threshold_lr" in {field.name for field in dataclasses.fields(config_class)}:
        # 0.01, SAELens' default, has not converged after a few hundred steps
        options["topk_threshold_lr"] = max(0.01, min(0.05, 20 / max(comparison.n_steps, 1)))
    return options


def _unit(condition: str, statistics: ActivationStatistics, coefficient: str) -> float:
    """What a coefficient for activations of variance 1 is multiplied by.

    With s the root mean variance of what the SAE sees and S that of what its loss is taken of, an
    L1 penalty grows like s, an L0 penalty not at all, and the loss like S^2.
    """
    seen, loss = _scales(condition, statistics)
    return loss**2 if coefficient == "l0_coefficient" else loss**2 / seen


def _scales(condition: str, statistics: ActivationStatistics) -> tuple[float, float]:
    """s and S of `_unit`."""
    eigenvalues = torch.linalg.eigvalsh(statistics.covariance).clamp(min=0)
    rms = float(eigenvalues.mean().sqrt())
    config = CONDITIONS[condition]
    if condition == "expected_average_only_in":
        # scaled such that the norm is about the root of the width, the mean included
        norm = math.sqrt(float(statistics.mean.square().sum() + eigenvalues.sum()))
        seen = loss = rms * math.sqrt(statistics.d_in) / norm
    elif config is None:
        seen = loss = rms
    else:
        kept = float(eigenvalues.pow(1 - config.strength).mean().sqrt())
        seen = 1.0 if config.strength == 1 else kept
        # `ReconstructionMetric`: d for the mean's prediction, whatever the space
        loss = 1.0
    return seen, loss


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with atomic_path(path) as partial:
        partial.write_text("".join(json.dumps(record, default=str) + "\n" for record in records))
