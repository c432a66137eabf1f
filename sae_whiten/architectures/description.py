"""One description per architecture, for folding, training under whitening and comparing.

Each file named after an architecture registers its description at the end. For an architecture of
your own, call `register` wherever you define it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

from sae_lens.registry import (
    SAE_TRAINING_CLASS_REGISTRY,
    get_sae_class,
    get_sae_training_class,
)
from sae_lens.saes.sae import (
    SAE,
    SAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)

from sae_whiten.folding import AffineWeights

__all__ = ["Architecture", "CompareDefaults", "FastStep", "describe", "read_weights", "register"]


@runtime_checkable
class FastStep(Protocol):
    """A faster `training_forward_pass`, with the same values and gradients."""

    def __call__(self, sae: Any, step_input: TrainStepInput) -> TrainStepOutput | None:
        """The output of the step, or None if `training_forward_pass` has to run instead."""
        ...


@runtime_checkable
class CompareDefaults(Protocol):
    """Fields of the training config that `compare` sets because SAELens' defaults do not fit."""

    def __call__(self, *, seen: float, loss: float, n_steps: int) -> dict[str, Any]:
        """The fields and their values.

        Args:
            seen: Root mean variance of the SAE's input coordinates; 1 if they are whitened.
            loss: Root mean variance of the coordinates in which the loss is measured.
            n_steps: Number of training steps.
        """
        ...


def read_weights(sae: SAE[Any], *biases: str) -> AffineWeights:
    """The weights of an SAE whose encoder is `x @ W_enc` plus the named biases (default: b_enc).

    Examples:
        >>> from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
        >>> sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=4, d_sae=16))
        >>> sorted(read_weights(sae).parameters())
        ['W_dec', 'W_enc', 'b_dec', 'b_enc']
    """
    return AffineWeights(
        W_enc=sae.W_enc.data,
        W_dec=sae.W_dec.data,
        b_dec=sae.b_dec.data,
        encoder_biases={name: getattr(sae, name).data for name in biases or ("b_enc",)},
        subtracts_b_dec=sae.cfg.apply_b_dec_to_input,
    )


def _charges_no_norms(cfg: SAEConfig) -> str:
    return (
        f"the sparsity of {cfg.architecture()} does not depend on decoder norms (that of jumprelu "
        "does with jumprelu_sparsity_loss_mode='tanh')"
    )


def _no_defaults(*, seen: float, loss: float, n_steps: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Facts about an architecture that its SAELens classes do not state.

    Attributes:
        sae_classes: The training and inference classes that this describes. Subclasses share the
            description unless they have their own.
        not_foldable_because: Why whitening cannot be folded into the architecture, or None. With a
            reason, the other fields on folding and training are not needed.
        affine_weights: Returns the weights of an SAE that whitening changes. The fold sets each of
            `AffineWeights.parameters()`, by name.
        set_by_fold: Config fields that the fold sets, with their values. The folded weights already
            contain what these fields switched on.
        is_transcoder: Whether it reads one hook and writes another. If so, it takes two whitenings,
            and b_dec is never subtracted from its input.
        losses: A subclass of the training class. It measures every reconstruction error by
            `mse_loss_fn`, and weights sparsity by `sparsity_norms` unless these are None. Use None
            if the training class measures every error by `mse_loss_fn` and uses no norms.
        why_not_original_norms: Returns the reason why `sparsity_norms="original"` has no effect
            with a training config, or None if it has an effect.
        fast_step: Replaces the training step under whitening. Used for the training class itself,
            not for subclasses, since these may override anything.
        sparsity_field: The field of the training config that sets the sparsity, if there is one.
        sparsity_is_exact: Whether `sparsity_field` is the number of active latents. If not,
            `compare` trains SAEs with several values and interpolates metrics at the target L0.
        scaled_fields: Loss coefficients in the training config, each with an exponent. The loss
            grows like the scale of the latents to this power (1 for L1). `compare` takes the
            coefficients as meant for activations of variance 1, and rescales them.
        compare_defaults: Returns further fields that `compare` sets.
        required_options: Fields that the user of `compare` has to set.
    """

    sae_classes: tuple[type[SAE[Any]], ...]
    not_foldable_because: str | None = None
    affine_weights: Callable[[Any], AffineWeights] = read_weights
    set_by_fold: Mapping[str, Any] = field(default_factory=dict)
    is_transcoder: bool = False
    losses: type[TrainingSAE[Any]] | None = None
    why_not_original_norms: Callable[[Any], str | None] = _charges_no_norms
    fast_step: FastStep | None = None
    sparsity_field: str | None = None
    sparsity_is_exact: bool = False
    scaled_fields: Mapping[str, int] = field(default_factory=dict)
    compare_defaults: CompareDefaults = _no_defaults
    required_options: tuple[str, ...] = ()


_DESCRIPTIONS: dict[type[Any], Architecture] = {}

# sparsity fields of architectures without a description; exponents as in `scaled_fields`
_USUAL_FIELDS = {"k": 0, "l1_coefficient": 1, "l0_coefficient": 0}


def register(architecture: Architecture) -> None:
    """Register an architecture for folding, training and comparing.

    The classes themselves must be registered with SAELens, by `sae_lens.register_sae_class` and
    `sae_lens.register_sae_training_class`.

    Examples:
        >>> from sae_lens import StandardTrainingSAE
        >>> class MyTrainingSAE(StandardTrainingSAE):
        ...     "Like standard, but for something that whitening leaves alone."
        >>> register(Architecture(sae_classes=(MyTrainingSAE,), sparsity_field="l1_coefficient"))
        >>> describe(MyTrainingSAE).sparsity_field
        'l1_coefficient'

    Raises:
        ValueError: One of its classes already has a description.
    """
    for cls in architecture.sae_classes:
        if cls in _DESCRIPTIONS:
            raise ValueError(f"{cls.__name__} is described already")
    _DESCRIPTIONS.update(dict.fromkeys(architecture.sae_classes, architecture))


def describe(of: SAE[Any] | type[SAE[Any]] | SAEConfig | str) -> Architecture:
    """The description of an architecture. Without a registered one, it is not foldable.

    Examples:
        >>> describe("topk").sparsity_field
        'k'

    Args:
        of: An SAE, its class, its config, or SAELens' name of the architecture. A name with both
            a training and an inference class means the training class.

    Raises:
        KeyError: SAELens has no architecture of this name.
    """
    cls = _sae_class(of)
    for base in cls.__mro__:
        if base in _DESCRIPTIONS:
            return _DESCRIPTIONS[base]
    return Architecture(
        sae_classes=(cls,),
        not_foldable_because="not an architecture whose fold is known to be exact",
        sparsity_field=next((name for name in _USUAL_FIELDS if name in _config_fields(cls)), None),
        sparsity_is_exact="k" in _config_fields(cls),
        scaled_fields=_USUAL_FIELDS,
    )


def _config_fields(cls: type[Any]) -> list[str]:
    """Field names of the training config of a class; empty if SAELens has no such class."""
    for sae_class, config_class in SAE_TRAINING_CLASS_REGISTRY.values():
        if sae_class is cls:
            return [each.name for each in fields(config_class)]
    return []


def _sae_class(of: SAE[Any] | type[SAE[Any]] | SAEConfig | str) -> type[Any]:
    if isinstance(of, type):
        return of
    if isinstance(of, SAE):
        return type(of)
    name = of if isinstance(of, str) else of.architecture()
    if isinstance(of, (str, TrainingSAEConfig)):
        try:
            return get_sae_training_class(name)[0]
        except KeyError:
            if not isinstance(of, str):
                raise
    return get_sae_class(name)[0]
