"""What a comparison trains: which SAEs, under which conditions, with which configs."""

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig

from sae_whiten._checks import require_device, require_number
from sae_whiten.architectures import describe
from sae_whiten.architectures.folding import why_not_foldable
from sae_whiten.comparison.conditions import CONDITIONS
from sae_whiten.comparison.options import ComparisonOptions
from sae_whiten.statistics import ActivationStatistics

__all__ = ["Arm", "Comparison", "arms", "sae_config", "scales"]

# fields of training configs that a comparison sets itself, beside the sparsity
_OWN_FIELDS = ("d_in", "d_sae", "device", "normalize_activations", "metadata")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One SAE of a comparison, without its seed.

    Attributes:
        architecture: Its training architecture.
        condition: A name in `CONDITIONS`.
        sparsity: k, where the architecture has one.
        coefficient: Sparsity coefficient for activations of variance 1, where it has one.
    """

    architecture: str
    condition: str
    sparsity: int | None = None
    coefficient: float | None = None

    @property
    def name(self) -> str:
        """Name of its folder."""
        name = f"{self.architecture}-{self.condition}"
        if self.sparsity is not None:
            return f"{name}-k{self.sparsity}"
        return name if self.coefficient is None else f"{name}-{self.coefficient:g}"

    @property
    def is_whitened(self) -> bool:
        """Whether it is trained under a whitening."""
        return CONDITIONS[self.condition].whitening is not None


@dataclasses.dataclass(frozen=True)
class Comparison(ComparisonOptions):
    """What is compared, and how the SAEs are trained; fields as in `ComparisonOptions`.

    Raises:
        ValueError: An option is out of range, there is no such architecture or condition, nothing
            can be compared, or a training config rejects its options.
    """

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in ("conditions", "architectures", "sparsity", "coefficients", "seeds"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values}: at least one, and none twice")
            # lists, as JSON reads them back
            object.__setattr__(self, name, values)
        object.__setattr__(self, "learning_rates", list(self.learning_rates))
        if self.learning_rates and "expected_average_only_in" in self.conditions:
            raise ValueError(
                "expected_average_only_in estimates its scaling on batches that no SAE is then "
                "trained on. So it cannot be trained at a learning rate of its own: leave out this "
                "condition, or learning_rates"
            )
        for name, known in (
            ("condition", CONDITIONS),
            ("architecture", SAE_TRAINING_CLASS_REGISTRY),
        ):
            for given in getattr(self, f"{name}s"):
                if given not in known:
                    raise ValueError(f"no {name} {given}; there are {', '.join(known)}")
        object.__setattr__(self, "sae_options", self._checked_sae_options())
        self._check_arms()

    @property
    def left_out(self) -> dict[str, dict[str, str]]:
        """`left_out[architecture][condition]`: why this architecture is not trained under it."""
        reasons: dict[str, dict[str, str]] = {}
        for architecture in self.architectures:
            for condition in self.conditions:
                reason = self._why_not(architecture, condition)
                if reason is not None:
                    reasons.setdefault(architecture, {})[condition] = reason
        return reasons

    @property
    def n_steps(self) -> int:
        """Training steps of every SAE."""
        return self.training_tokens // self.train_batch_size_tokens

    def _check_numbers(self) -> None:
        for name in (
            "train_batch_size_tokens",
            "context_size",
            "store_batch_size_prompts",
            "held_out_sequences",
            "probe_seeds",
        ):
            require_number(name, getattr(self, name))
        # at least one step
        require_number("training_tokens", self.training_tokens, self.train_batch_size_tokens)
        require_number("sweep_rounds", self.sweep_rounds, 0)
        for name in ("lr", "tolerance"):
            require_number(name, getattr(self, name), above=0, whole=False)
        for lr in self.learning_rates:
            require_number("learning_rates", lr, above=0, whole=False)
        for k in self.sparsity:
            require_number("sparsity", k)
        for coefficient in self.coefficients:
            require_number("coefficients", coefficient, 0, whole=False)
        for seed in self.seeds:
            require_number("seeds", seed, 0)
        if self.d_sae is not None:
            require_number("d_sae", self.d_sae, max(self.sparsity, default=1))
        require_device("device", self.device)

    def _checked_sae_options(self) -> dict[str, dict[str, Any]]:
        """`sae_options`, checked, and as JSON reads them back."""
        options = self.sae_options
        if not isinstance(options, Mapping) or not all(
            isinstance(fields, Mapping) for fields in options.values()
        ):
            raise ValueError(
                f"sae_options={options!r}: fields of the training configs by architecture, such as "
                "{'topk': {'aux_loss_coefficient': 0}}"
            )
        for architecture, given in options.items():
            if architecture not in self.architectures:
                raise ValueError(
                    f"sae_options for {architecture}, which is not compared; the architectures are "
                    + ", ".join(self.architectures)
                )
            reserved = (*_OWN_FIELDS, describe(architecture).sparsity_field)
            _, config_class = get_sae_training_class(architecture)
            fields = [field.name for field in dataclasses.fields(config_class)]
            for name in given:
                if name not in fields:
                    problem = f"{architecture} has no field {name}"
                elif name in reserved:
                    problem = f"{name} is set by the comparison itself"
                else:
                    continue
                allowed = ", ".join(name for name in fields if name not in reserved)
                raise ValueError(f"sae_options for {architecture}: {problem}; there are {allowed}")
        return json.loads(json.dumps({name: dict(given) for name, given in options.items()}))

    def _check_arms(self) -> None:
        """Refuse a comparison in which nothing differs, and options that a config refuses."""
        for architecture in self.architectures:
            given = self.sae_options.get(architecture, {})
            for name in describe(architecture).required_options:
                if not given.get(name):
                    raise ValueError(f"{architecture} needs {name} in sae_options")
        left_out = self.left_out
        for architecture, reasons in left_out.items():
            if len(reasons) == len(self.conditions):
                raise ValueError(
                    f"{architecture} cannot be trained under any of the conditions "
                    f"{', '.join(self.conditions)}: {'; '.join(dict.fromkeys(reasons.values()))}"
                )
        planned = arms(self)
        # several architectures may be compared without whitening
        if len(self.architectures) == 1 and not any(arm.is_whitened for arm in planned):
            why = dict.fromkeys(r for reasons in left_out.values() for r in reasons.values())
            whitening = (name for name, c in CONDITIONS.items() if c.whitening is not None)
            remedy = "add another architecture" + (
                "" if why else f", or one of the conditions {', '.join(whitening)}"
            )
            raise ValueError(
                f"architectures={', '.join(self.architectures)}, "
                f"conditions={', '.join(self.conditions)}: nothing is whitened"
                + (f" ({'; '.join(why)})" if why else "")
                + f"; {remedy}"
            )
        for arm in planned:
            try:
                sae_config(self, arm)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{arm.name}: {error}") from error

    def _why_not(self, architecture: str, condition: str) -> str | None:
        whitening = CONDITIONS[condition].whitening
        if whitening is None:
            return None
        sae_class, _ = get_sae_training_class(architecture)
        reason = why_not_foldable(sae_class)
        if reason is None and whitening.sparsity_norms == "original":
            config = sae_config(self, _at_every_sparsity(self, architecture, condition)[0])
            reason = describe(architecture).why_not_original_norms(config)
        return reason


def arms(comparison: Comparison) -> list[Arm]:
    """The SAEs that are trained with every seed."""
    left_out = comparison.left_out
    return [
        arm
        for architecture in comparison.architectures
        for condition in comparison.conditions
        if condition not in left_out.get(architecture, {})
        for arm in _at_every_sparsity(comparison, architecture, condition)
    ]


def _at_every_sparsity(comparison: Comparison, architecture: str, condition: str) -> list[Arm]:
    described = describe(architecture)
    if described.sparsity_field is None:
        return [Arm(architecture, condition)]
    if described.sparsity_is_exact:
        return [Arm(architecture, condition, sparsity=k) for k in comparison.sparsity]
    return [Arm(architecture, condition, coefficient=c) for c in comparison.coefficients]


def sae_config(
    comparison: Comparison, arm: Arm, statistics: ActivationStatistics | None = None
) -> TrainingSAEConfig:
    """The training config of an SAE.

    Args:
        comparison: The comparison that it belongs to.
        arm: The SAE.
        statistics: Of the activations. None: width and variance 1, to check the options.
    """
    d_in = 1 if statistics is None else statistics.d_in
    seen, loss = (1.0, 1.0) if statistics is None else scales(arm.condition, statistics)
    described = describe(arm.architecture)
    _, config_class = get_sae_training_class(arm.architecture)
    options: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": comparison.d_sae or 8 * d_in,
        "normalize_activations": "covariance_whitening" if arm.is_whitened else arm.condition,
        "device": comparison.device,
        **described.compare_defaults(seen=seen, loss=loss, n_steps=comparison.n_steps),
        **copy.deepcopy(dict(comparison.sae_options.get(arm.architecture, {}))),
    }
    field = described.sparsity_field
    if field is not None:
        options[field] = arm.sparsity if described.sparsity_is_exact else arm.coefficient
    config = config_class(**options)
    # the reconstruction loss grows with loss^2, these terms with a power of what the SAE sees
    scaled = {
        name: getattr(config, name) * (loss**2 / seen**power)
        for name, power in described.scaled_fields.items()
        if hasattr(config, name) and not (name == field and described.sparsity_is_exact)
    }
    return dataclasses.replace(config, **scaled) if scaled else config


def scales(condition: str, statistics: ActivationStatistics) -> tuple[float, float]:
    """Root mean variance of the coordinates that an SAE sees, and of those in its loss."""
    eigenvalues = torch.linalg.eigvalsh(statistics.covariance).clamp(min=0)
    rms = float(eigenvalues.mean().sqrt())
    whitening = CONDITIONS[condition].whitening
    if condition == "expected_average_only_in":
        # scaled to a norm of sqrt(d) on average, the mean included
        norm = math.sqrt(float(statistics.mean.square().sum() + eigenvalues.sum()))
        seen = loss = rms * math.sqrt(statistics.d_in) / norm
    elif whitening is None:
        seen = loss = rms
    else:
        kept = float(eigenvalues.pow(1 - whitening.strength).mean().sqrt())
        seen = 1.0 if whitening.strength == 1 else kept
        # `ReconstructionMetric` is normalised: predicting the mean costs d in any space
        loss = 1.0
    return seen, loss
