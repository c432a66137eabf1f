"""Train SAEs with and without whitening, all else being equal, and evaluate them.

For every seed, all SAEs of a comparison are trained in lockstep on one stream of activations; the
seed decides the order of the data and the initial weights, which SAEs of one architecture share.
The statistics are estimated once, for all seeds.
"""

import copy
import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from sae_lens import SAE, LoggingConfig, MultiSAETrainingRunnerConfig
from sae_lens.config import HfDataset
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from transformer_lens import HookedRootModule

from sae_whiten._files import atomic_path, write_json
from sae_whiten._redaction import redacted
from sae_whiten.architectures import TopKVSAETrainingConfig, describe
from sae_whiten.architectures.folding import why_not_foldable
from sae_whiten.comparison.data import (
    describe_activations,
    describe_rows,
    divide_rows,
    same_activations,
    shuffled,
)
from sae_whiten.config import WhiteningConfig
from sae_whiten.estimation.fit import fit_statistics
from sae_whiten.estimation.folders import statistics_file
from sae_whiten.evaluation.evaluate import evaluate_saes
from sae_whiten.evaluation.labels import LabelledTexts
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.training.checkpoint import is_complete_sae
from sae_whiten.training.multi_runner import WhiteningMultiSAETrainingRunner

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
# in one folder; left_out follows from the rest
_MAY_DIFFER = ("device", "left_out")
_ESTIMATION_BATCHES = 25  # of expected_average_only_in, which no SAE is trained on
# fields of training configs that set the sparsity
_SPARSITY_FIELDS = ("k", "l1_coefficient", "l0_coefficient")
_OWN_FIELDS = ("d_in", "d_sae", "device", "normalize_activations", "metadata", *_SPARSITY_FIELDS)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared, and how the SAEs are trained.

    Attributes:
        hook_name: The hook.
        conditions: Names in `CONDITIONS`. Those that an architecture cannot be trained under are
            left out for it, see `left_out`.
        architectures: Names of SAELens' training architectures, this package's among them.
        sparsity: k of each SAE, where the architecture has one; where it has a sparsity coefficient
            the L0 at which metrics are interpolated between SAEs of different `coefficients`. SAEs
            that have neither, such as top_afa, are compared at the L0 that they come to.
        coefficients: Sparsity coefficients of architectures without k (l1_coefficient of standard
            and gated, l0_coefficient of jumprelu), as for activations of variance 1: they are
            multiplied by the root mean variance of the coordinates that the SAE sees, and divided
            by that of its loss, so that one sweep covers similar L0 under all conditions.
        sae_options: Fields of the training configs, by architecture, for all its SAEs:
            `{"topk_vsae": {"variance": "fixed"}}`. What is given replaces what the comparison would
            choose and is, but for kl_coefficient, not adapted to the unit of the activations.
            The kl_coefficient of topk_vsae is, like `coefficients`, as for activations of variance
            1, and its initial_logvar, unless it is given, keeps the noise in proportion to the
            latents; its prior keeps the variance 1 in the unit of the activations that the SAE
            sees, so that where this is far from 1 the KL divergence weighs noise otherwise.
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
    sae_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
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
        for architecture in self.architectures:
            if architecture not in SAE_TRAINING_CLASS_REGISTRY:
                raise ValueError(
                    f"no architecture {architecture}; there are "
                    + ", ".join(SAE_TRAINING_CLASS_REGISTRY)
                )
        object.__setattr__(self, "sae_options", _checked_options(self))
        # architectures may be compared without any whitening
        alone = len(self.architectures) == 1
        if alone and not any(CONDITIONS[name] is not None for name in self.conditions):
            raise ValueError(
                f"conditions={', '.join(self.conditions)}: nothing is whitened; add one of "
                + ", ".join(name for name, config in CONDITIONS.items() if config is not None)
                + ", or another architecture"
            )
        if self.d_sae is not None and max(self.sparsity) > self.d_sae:
            raise ValueError(f"sparsity={max(self.sparsity)} of d_sae={self.d_sae} latents")
        if self.training_tokens < self.train_batch_size_tokens:
            raise ValueError(
                f"training_tokens={self.training_tokens}: fewer than those of one training step, "
                f"train_batch_size_tokens={self.train_batch_size_tokens}"
            )
        left_out = self.left_out
        for architecture, reasons in left_out.items():
            if len(reasons) == len(self.conditions):
                raise ValueError(
                    f"{architecture} goes with none of the conditions "
                    f"{', '.join(self.conditions)}: {'; '.join(dict.fromkeys(reasons.values()))}"
                )
        arms = _arms(self)
        if alone and not any(CONDITIONS[arm.condition] is not None for arm in arms):
            said = dict.fromkeys(r for reasons in left_out.values() for r in reasons.values())
            raise ValueError(
                f"architectures={', '.join(self.architectures)}: nothing is whitened "
                f"({'; '.join(said)}); add another architecture"
            )
        for arm in arms:
            if arm.architecture == "matryoshka_batchtopk" and not (
                self.sae_options.get(arm.architecture, {}).get("matryoshka_widths")
            ):
                raise ValueError("matryoshka_batchtopk needs matryoshka_widths in sae_options")
            try:  # what a config refuses, it refuses before anything is trained
                _sae_config(self, arm)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{arm.name}: {error}") from error

    @property
    def left_out(self) -> dict[str, dict[str, str]]:
        """`left_out[architecture][condition]`: why the one cannot be trained under the other."""
        found: dict[str, dict[str, str]] = {}
        for architecture in self.architectures:
            for condition in self.conditions:
                reason = self._why_not(architecture, condition)
                if reason is not None:
                    found.setdefault(architecture, {})[condition] = reason
        return found

    def _why_not(self, architecture: str, condition: str) -> str | None:
        config = CONDITIONS[condition]
        if config is None:
            return None
        sae_class, _ = get_sae_training_class(architecture)
        reason = why_not_foldable(sae_class)
        if reason is None and config.sparsity_norms == "original":
            first = _of_every_sparsity(self, architecture, condition)[0]
            reason = describe(sae_class).why_not_original_norms(_sae_config(self, first))
        return reason

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
        name = f"{self.architecture}-{self.condition}"
        if self.sparsity is not None:
            return f"{name}-k{self.sparsity}"
        return name if self.coefficient is None else f"{name}-{self.coefficient:g}"


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
        **names,
        "dataset_path": dataset_path,
        "labels": None if labels is None else dict(labels.source),
        "conditions": {
            name: None if (config := CONDITIONS[name]) is None else config.to_dict()
            for name in comparison.conditions
        },
        "left_out": comparison.left_out,
    }
    n_held_out, context_size = comparison.held_out_sequences, comparison.context_size
    settings["rows"] = describe_rows(dataset, n_held_out)
    held_out, rest = divide_rows(dataset, n_held_out, context_size)
    settings["activations"] = describe_activations(
        model,
        held_out,
        comparison.hook_name,
        context_size=context_size,
        prepend_bos=comparison.prepend_bos,
    )
    _claim(out, settings)
    for architecture, reasons in comparison.left_out.items():
        for reason in dict.fromkeys(reasons.values()):
            under = ", ".join(name for name, other in reasons.items() if other == reason)
            logger.warning("%s is left out under %s: %s", architecture, under, reason)
    statistics = _statistics(comparison, model, rest, out, names)
    arms = _arms(comparison)
    records = _read(out / _RESULTS)
    for seed in comparison.seeds:
        done = {record["name"] for record in records if record["seed"] == seed}
        if all(arm.name in done for arm in arms):
            continue
        folder = out / "saes" / f"seed-{seed}"
        missing = {arm.name: arm for arm in arms if arm.name not in done}
        untrained = [arm for arm in missing.values() if not is_complete_sae(folder / arm.name)]
        if untrained:
            logger.info("training %d SAEs with seed %d", len(untrained), seed)
            _train(
                comparison,
                _with_the_same_data(untrained, arms),
                seed,
                statistics,
                model,
                shuffled(rest, seed),
                out,
                {**names, "dataset_path": dataset_path},
            )
        logger.info("evaluating the SAEs of seed %d", seed)
        saes = {
            name: SAE.load_from_disk(folder / name, device=comparison.device) for name in missing
        }
        for found in evaluate_saes(
            saes,
            model,
            held_out,
            labels,
            n_tokens=n_held_out * context_size,
            context_size=context_size,
            batch_size_prompts=comparison.store_batch_size_prompts,
        ):
            arm = missing[found["name"]]
            records.append({**found, **dataclasses.asdict(arm), "seed": seed})
        _write(out / _RESULTS, records)
    records = [record for record in records if record["seed"] in comparison.seeds]
    _say_what_is_beside(comparison, records)
    return records


def _say_what_is_beside(comparison: Comparison, records: Sequence[Mapping[str, Any]]) -> None:
    """Warn where SAEs that choose their L0 have no others at it to be compared with."""
    k = sorted(r["metrics"]["l0"] for r in records if r["sparsity"] is not None)
    for name in comparison.architectures:
        found = [
            r["metrics"]["l0"]
            for r in records
            if r["architecture"] == name and r["sparsity"] is None and r["coefficient"] is None
        ]
        if found and k and not k[0] <= min(found) <= max(found) <= k[-1]:
            wanted = {max(1, int(min(found) / 1.2)), math.ceil(max(found) * 1.2)}
            logger.warning(
                "%s came to L0 of %.4g to %.4g, and there are SAEs with k at %.4g to %.4g: repeat "
                "this with k of %s too (sparsity), in the same folder, to see them side by side",
                name,
                min(found),
                max(found),
                k[0],
                k[-1],
                " and ".join(map(str, sorted(wanted))),
            )


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or check that they are those that are there."""
    path = out / _SETTINGS
    settings = json.loads(json.dumps(redacted(settings), default=str))
    if path.is_file():
        # what earlier versions did not write
        unknown = {
            "sae_options": {},
            "rows": settings["rows"],
            "activations": settings["activations"],
        }
        before = {**unknown, **redacted(json.loads(path.read_text()))}
        if same_activations(before["activations"], settings["activations"]):
            settings["activations"] = before["activations"]
        in_training = any((out / "checkpoints").glob("*/*"))
        # whichever have been asked for so far; what is being trained has to be trained to its end
        growing = ("seeds",) if in_training else ("seeds", "sparsity")
        for name in growing:
            settings[name] = sorted({*before.get(name, []), *settings[name]})
        different = [
            f"{name}={before.get(name)!r} (now {settings.get(name)!r})"
            for name in {**before, **settings}
            if name not in (*_MAY_DIFFER, *growing) and before.get(name) != settings.get(name)
        ]
        trained = in_training or (out / "saes").is_dir() or (out / _RESULTS).is_file()
        if different and not trained:
            # whatever statistics there are may be of something else
            shutil.rmtree(out / "statistics", ignore_errors=True)
        elif different:
            raise ValueError(
                f"{out} holds a comparison with {', '.join(different)}. Choose another folder, or "
                "repeat that one."
            )
    write_json(path, settings, indent=1)


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
        shuffled(dataset, 0),
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
    left_out = comparison.left_out
    return [
        arm
        for architecture in comparison.architectures
        for condition in comparison.conditions
        if condition not in left_out.get(architecture, {})
        for arm in _of_every_sparsity(comparison, architecture, condition)
    ]


def _of_every_sparsity(comparison: Comparison, architecture: str, condition: str) -> list[_Arm]:
    match _sparsity_field(architecture):
        case None:
            return [_Arm(architecture, condition, None, None)]
        case "k":
            return [_Arm(architecture, condition, k, None) for k in comparison.sparsity]
        case _:
            return [_Arm(architecture, condition, None, c) for c in comparison.coefficients]


def _sparsity_field(architecture: str) -> str | None:
    """What sets the sparsity of an architecture; None if nothing does."""
    names = _fields(architecture)
    return next((name for name in _SPARSITY_FIELDS if name in names), None)


def _fields(architecture: str) -> list[str]:
    """Of its training config."""
    _, config_class = get_sae_training_class(architecture)
    return [field.name for field in dataclasses.fields(config_class)]


def _checked_options(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """`sae_options` as JSON gives them back."""
    options = comparison.sae_options
    if not isinstance(options, Mapping) or not all(
        isinstance(fields, Mapping) for fields in options.values()
    ):
        raise ValueError(
            f"sae_options={options!r}: fields of the training configs by architecture, such as "
            "{'topk': {'aux_loss_coefficient': 0}}"
        )
    for architecture, given in options.items():
        if architecture not in comparison.architectures:
            raise ValueError(
                f"sae_options for {architecture}, which is not compared; the architectures are "
                + ", ".join(comparison.architectures)
            )
        fields = _fields(architecture)
        free = ", ".join(name for name in fields if name not in _OWN_FIELDS)
        for name in given:
            if name not in fields:
                said = f"{architecture} has no field {name}"
            elif name in _OWN_FIELDS:
                said = f"{name} is set by the comparison itself"
            else:
                continue
            raise ValueError(f"sae_options for {architecture}: {said}; there are {free}")
    return json.loads(json.dumps({name: dict(given) for name, given in options.items()}))


def _with_the_same_data(untrained: Sequence[_Arm], arms: Sequence[_Arm]) -> list[_Arm]:
    """These SAEs, and what they have to be trained beside to get the data that all others had.

    SAELens takes the scaling factor of expected_average_only_in from batches that no SAE is then
    trained on, so one SAE of that condition shifts the data of all.
    """
    shifting = [arm for arm in arms if arm.condition == "expected_average_only_in"]
    return [*untrained, *(shifting[:1] if not set(shifting) & set(untrained) else [])]


class _LockstepRunner(WhiteningMultiSAETrainingRunner):
    """Trains any SAEs of a comparison, for what is left after a kill may hold no whitened one."""

    _needs_whitening = False


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
        sae_class, _ = get_sae_training_class(arm.architecture)
        # equal for all conditions of an architecture
        torch.manual_seed(seed)
        saes[arm.name] = sae_class(_sae_config(comparison, arm, statistics))
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
    _LockstepRunner(
        cfg, whitening, override_dataset=dataset, override_model=model, override_saes=saes
    ).run()
    shutil.rmtree(checkpoints, ignore_errors=True)  # of many SAEs, which are saved now


def _sae_config(
    comparison: Comparison, arm: _Arm, statistics: ActivationStatistics | None = None
) -> TrainingSAEConfig:
    """The training config of an SAE; without statistics, as for activations of width and variance
    1, to see what it refuses."""
    config = CONDITIONS[arm.condition]
    d_in = 1 if statistics is None else statistics.d_in
    seen, loss = (1.0, 1.0) if statistics is None else _scales(arm.condition, statistics)
    _, config_class = get_sae_training_class(arm.architecture)
    given = comparison.sae_options.get(arm.architecture, {})
    options: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": comparison.d_sae or 8 * d_in,
        "normalize_activations": arm.condition if config is None else "covariance_whitening",
        "device": comparison.device,
    }
    name = _sparsity_field(arm.architecture)
    if arm.sparsity is not None:
        options["k"] = arm.sparsity
    elif name is not None and arm.coefficient is not None:
        options[name] = arm.coefficient * _unit(name, seen, loss)
    if arm.architecture == "jumprelu":
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
    if issubclass(config_class, TopKVSAETrainingConfig):
        options |= {
            "kl_warm_up_steps": comparison.n_steps // 10,  # as in the paper
            # latents are in the unit of the activations
            "initial_logvar": config_class.initial_logvar + 2 * math.log(seen),
        }
    if "topk_threshold_lr" in _fields(arm.architecture):
        # 0.01, SAELens' default, has not converged after a few hundred steps
        options["topk_threshold_lr"] = max(0.01, min(0.05, 20 / max(comparison.n_steps, 1)))
    options |= copy.deepcopy(dict(given))
    config = config_class(**options)
    if isinstance(config, TopKVSAETrainingConfig):
        coefficient = config.kl_coefficient * _unit("kl_coefficient", seen, loss)
        config = dataclasses.replace(config, kl_coefficient=coefficient)
    return config


def _unit(coefficient: str, seen: float, loss: float) -> float:
    """What a coefficient for activations of variance 1 is multiplied by.

    With s the root mean variance of what the SAE sees and S that of what its loss is taken of, an
    L1 penalty grows like s, an L0 penalty not at all, a KL divergence, but for the noise in it,
    like s^2, and the loss like S^2.
    """
    power = {"l1_coefficient": 1, "l0_coefficient": 0, "kl_coefficient": 2}[coefficient]
    return loss**2 / seen**power


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
        partial.write_text(
            "".join(json.dumps(redacted(record), default=str) + "\n" for record in records)
        )
