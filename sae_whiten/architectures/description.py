"""One description per architecture: what folding, training under whitening and comparing need.

Every file of this folder that is named after an architecture ends by registering its description.
One of your own needs no more than that, wherever it is defined: see `register`.
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

__all__ = ["Architecture", "ComparisonOptions", "FastStep", "describe", "read_weights", "register"]


@runtime_checkable
class FastStep(Protocol):
    """A faster `training_forward_pass`, with the same values and gradients."""

    def __call__(self, sae: Any, step_input: TrainStepInput) -> TrainStepOutput | None:
        """The whole step; None where `training_forward_pass` has to be taken."""
        ...


@runtime_checkable
class ComparisonOptions(Protocol):
    """Fields of the training config that `compare` sets because SAELens' defaults do not fit."""

    def __call__(self, *, seen: float, loss: float, n_steps: int) -> dict[str, Any]:
        """The fields.

        Args:
            seen: Root mean variance of the coordinates that the SAE sees; 1 if they are whitened.
            loss: Root mean variance of those that its loss is taken of.
            n_steps: Number of training steps.
        """
        ...


def read_weights(sae: SAE[Any], *biases: str) -> AffineWeights:
    """The weights of an SAE whose encoder is `x @ W_enc` plus the biases named; b_enc if none is.

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
        f"{cfg.architecture()} does not charge latents by the norms of their decoder rows "
        "(jumprelu does with jumprelu_sparsity_loss_mode='tanh')"
    )


def _no_options(*, seen: float, loss: float, n_steps: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What has to be known of an architecture beyond its SAELens classes.

    Attributes:
        sae_classes: The classes that this describes, for training and for inference. Subclasses
            follow, unless they have a description of their own.
        not_foldable_because: Why no whitening can be folded into it, if so. Nothing else about
            folding and training is needed then.
        affine_weights: The weights of an SAE that whitening changes. The fold gives every one of
            `AffineWeights.parameters()` its new value, by name.
        set_by_fold: Fields of the config that have these values after a fold, because the folded
            weights contain what they stood for.
        is_transcoder: Whether it writes to another hook than it reads: it takes two whitenings, and
            b_dec is never subtracted from its input.
        losses: A subclass of the training class whose reconstruction errors are all measured by
            `mse_loss_fn`, and whose sparsity is charged by `sparsity_norms` where that is not None.
            None: the errors of the training class are, and it charges no norms.
        why_not_original_norms: The reason why `sparsity_norms="original"` means nothing for a
            training config; None if `losses` follows it.
        fast_step: Replaces the training step under whitening, for the training class itself but not
            for subclasses, which may override anything.
        sparsity_field: The field of the training config that sets the sparsity, if one does.
        sparsity_is_exact: Whether that field is the number of active latents. If not, `compare`
            trains SAEs with several values of it and interpolates their metrics at the L0 wanted.
        scaled_fields: Fields of the training config that are coefficients of a loss which grows
            like this power of the scale of the latents, such as 1 for L1. `compare` takes them as
            for activations of variance 1, and rescales them.
        comparison_options: Further fields that `compare` sets.
        required_options: Fields without which `compare` cannot train it.
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
    comparison_options: ComparisonOptions = _no_options
    required_options: tuple[str, ...] = ()


_DESCRIPTIONS: dict[type[Any], Architecture] = {}

# what sets the sparsity of an architecture without a description, and the power of its scale
_USUAL_FIELDS = {"k": 0, "l1_coefficient": 1, "l0_coefficient": 0}


def register(architecture: Architecture) -> None:
    """Make an architecture known to folding, training and comparing.

    The classes themselves are registered with SAELens, by `sae_lens.register_sae_class` and
    `register_sae_training_class`.

    Examples:
        >>> from sae_lens import StandardTrainingSAE
        >>> class MyTrainingSAE(StandardTrainingSAE):
        ...     "Like standard, but for something that whitening leaves alone."
        >>> register(Architecture(sae_classes=(MyTrainingSAE,), sparsity_field="l1_coefficient"))
        >>> describe(MyTrainingSAE).sparsity_field
        'l1_coefficient'

    Raises:
        ValueError: One of its classes is described already.
    """
    for cls in architecture.sae_classes:
        if cls in _DESCRIPTIONS:
            raise ValueError(f"{cls.__name__} is described already")
    _DESCRIPTIONS.update(dict.fromkeys(architecture.sae_classes, architecture))


def describe(of: SAE[Any] | type[SAE[Any]] | SAEConfig | str) -> Architecture:
    """The description of an architecture; one that cannot be folded, if none is registered.

    Examples:
        >>> describe("topk").sparsity_field
        'k'

    Args:
        of: An SAE, its class, its config, or SAELens' name of the architecture (for training, if
            SAELens has two of that name).

    Raises:
        KeyError: SAELens knows no architecture of that name.
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
    """Of the training config of a class that SAELens knows."""
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
