"""A training SAE while its weights are in whitened coordinates.

`enter_whitened_space` gives an SAE object a subclass of its class, and `leave_whitened_space` gives
its own class back. In between, no holder of the object (SAELens' trainers, evaluators, the user)
can save or fold it in a way that is wrong on raw activations. SAELens and other SAEs are not
changed.
"""

import functools
import weakref
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from numpy.typing import NDArray
from sae_lens import TrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import T_TRAINING_SAE, TrainStepInput, TrainStepOutput, mse_loss
from torch import Tensor

from sae_whiten.architectures.description import Architecture, describe
from sae_whiten.architectures.folding import (
    FoldError,
    fold_whitening_into_weights,
    folded_copy,
    why_not_foldable,
)
from sae_whiten.architectures.losses import ReconstructionMetric, SparsityNorms
from sae_whiten.config import WhiteningConfig
from sae_whiten.training.checkpoint import (
    read_training_weights,
    save_training_form,
    save_training_weights,
)
from sae_whiten.training.data_parallel import SharedBatchTopK
from sae_whiten.whitening import Whitening

__all__ = [
    "enter_whitened_space",
    "forget_basis",
    "is_in_whitened_space",
    "leave_whitened_space",
    "plain_copy",
    "require_basis",
    "set_whitening",
]


@runtime_checkable
class FoldingTrainer(Protocol):
    """A trainer that folds its SAE itself."""

    sae: Any

    def fold(self) -> None:
        """Fold `sae` and prove the fold."""
        ...


class _WhitenedTrainingSAE(TrainingSAE[Any]):
    """What a training SAE does differently while its weights are in whitened coordinates."""

    stock_class: type[TrainingSAE[Any]]
    whitening: Whitening | None
    trainer: "weakref.ref[FoldingTrainer] | None"
    sparsity_norms: SparsityNorms | None

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The architecture's fast step if it has one for this input, else SAELens' step."""
        architecture = describe(self.stock_class)
        output = None
        if architecture.fast_step is not None and self.stock_class in architecture.sae_classes:
            output = architecture.fast_step(self, step_input)
        return super().training_forward_pass(step_input) if output is None else output

    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save a folded copy: a plain SAE for raw activations.

        Raises:
            FoldError: The whitening has not been estimated yet.
        """
        return plain_copy(self, self._required_whitening("save")).save_inference_model(path)

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save a folded copy and, in a folder beside it, the weights in whitened coordinates."""
        whitening = self._required_whitening("save")
        written = save_training_form(plain_copy(self, whitening), Path(path))
        save_training_weights(path, dict(self.state_dict()), self.cfg.to_dict(), whitening)
        return written

    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Load the weights in whitened coordinates from a checkpoint directory."""
        self.load_state_dict(read_training_weights(checkpoint_path, self.cfg, self.whitening))

    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        """Our fold instead of SAELens'. SAELens' trainers call this when training is done.

        Raises:
            FoldError: The matrices are not those that the SAE was trained under, or folding fails.
        """
        own = self._required_whitening("fold")
        given = ((mean, own.mean), (whitening_matrix, own.W), (unwhitening_matrix, own.W_inv))
        if not all(torch.equal(a.to(b), b) for a, b in given):
            raise FoldError("this SAE was trained under another whitening than the one given")
        trainer = None if self.trainer is None else self.trainer()
        if trainer is not None and trainer.sae is self:  # and not a copy of its SAE
            trainer.fold()
        else:
            fold_whitening_into_weights(self, own)

    def log_histograms(self) -> dict[str, NDArray[Any]]:
        """SAELens' histograms, of the weights in the space of the activations."""
        return plain_copy(self, self._required_whitening("describe")).log_histograms()

    def leave_whitened_space(self) -> None:
        """Become a stock SAE again; the weights must be folded."""
        # a compiled training step would still be that of this class
        for name in ("whitening", "trainer", "sparsity_norms", "training_forward_pass"):
            vars(self).pop(name, None)
        self.mse_loss_fn = mse_loss
        self.__class__ = self.stock_class  # pyright: ignore[reportAttributeAccessIssue]

    def _required_whitening(self, action: str) -> Whitening:
        if self.whitening is None:
            raise FoldError(f"cannot {action} this SAE: its whitening has not been estimated yet")
        return self.whitening


def plain_copy(sae: T_TRAINING_SAE, whitening: Whitening) -> T_TRAINING_SAE:
    """A folded copy of an SAE in whitened space: a stock SAE for raw activations."""
    folded: Any  # of the stock class, of which the SAE's own is a subclass
    folded, _ = folded_copy(sae, whitening)
    if isinstance(folded.activation_fn, SharedBatchTopK):
        folded.activation_fn = BatchTopK(folded.activation_fn.k)  # whoever holds it may be alone
    return folded


@functools.cache
def _whitened_class(stock_class: type[TrainingSAE[Any]]) -> type[_WhitenedTrainingSAE]:
    architecture = describe(stock_class)
    losses = architecture.losses or TrainingSAE
    bases = (_WhitenedTrainingSAE, stock_class)
    if not issubclass(stock_class, losses):
        _check_overrides(stock_class, architecture)
        bases = (_WhitenedTrainingSAE, losses, stock_class)
    # A class made at run time, because its base may be a user's own subclass of a stock class. Its
    # overrides have to take effect, and isinstance has to hold.
    return type(f"Whitened{stock_class.__name__}", bases, {"stock_class": stock_class})


def _check_overrides(own_class: type[TrainingSAE[Any]], architecture: Architecture) -> None:
    """Refuse a subclass of a described class with a method that the losses would replace.

    Raises:
        ValueError: There is one.
    """
    described = next(c for c in own_class.__mro__ if c in architecture.sae_classes)
    below = own_class.__mro__[: own_class.__mro__.index(described)]
    overrides = {name for c in below for name in vars(c)}
    losses = architecture.losses
    for name, method in vars(losses).items():
        # a method that calls super() has a cell "__class__", and calls the subclass's
        code = getattr(method, "__code__", None)
        if name in overrides and code is not None and "__class__" not in code.co_freevars:
            raise ValueError(
                f"{own_class.__name__}.{name} would have no effect: under whitening it is replaced "
                "by one that measures errors in the space of the loss. Register "
                f"{own_class.__name__} as an architecture of its own, with losses that do both "
                "(sae_whiten.architectures.register)"
            )


def enter_whitened_space(sae: TrainingSAE[Any], config: WhiteningConfig | None = None) -> None:
    """Guard an SAE whose weights are in whitened coordinates from now on.

    >>> from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    >>> sae = StandardTrainingSAE(
    ...     StandardTrainingSAEConfig(
    ...         d_in=4, d_sae=8, normalize_activations="covariance_whitening"
    ...     )
    ... )
    >>> enter_whitened_space(sae)
    >>> sae.save_inference_model("sae")
    Traceback (most recent call last):
    ...
    sae_whiten.architectures.folding.FoldError: cannot save this SAE: its whitening has not been...
    >>> leave_whitened_space(sae)
    >>> type(sae).__name__
    'StandardTrainingSAE'

    Args:
        sae: The SAE.
        config: How it will be whitened, if known.

    Raises:
        FoldError: No whitening can be folded into it.
        ValueError: Its training step was compiled already, with losses that would not be replaced;
            or its architecture cannot do what `config` asks for.
    """
    if config is not None:
        _check_sparsity_norms(sae, config)
    if isinstance(sae, _WhitenedTrainingSAE):
        return
    reason = why_not_foldable(sae)
    if reason is not None:
        raise FoldError(f"cannot train under whitening, which cannot be folded into {reason}")
    if "training_forward_pass" in vars(sae):
        raise ValueError(
            "this SAE's training_forward_pass was replaced (torch.compile?) before its trainer was "
            "made. Compile it afterwards, or set compile_sae=True in the runner's config."
        )
    # Training a copy instead would leave the caller with an object that saves and folds initial
    # weights as if they were trained. It would also double the memory and lose hooks.
    sae.__class__ = _whitened_class(type(sae))
    assert isinstance(sae, _WhitenedTrainingSAE)
    sae.whitening = sae.trainer = sae.sparsity_norms = None


def is_in_whitened_space(sae: TrainingSAE[Any]) -> bool:
    """Whether an SAE's weights are in whitened coordinates: whether it is not folded yet."""
    return isinstance(sae, _WhitenedTrainingSAE)


def set_whitening(
    sae: TrainingSAE[Any], whitening: Whitening, trainer: FoldingTrainer | None = None
) -> None:
    """Set the whitening of an SAE in whitened space, which is the metric of its losses.

    Args:
        sae: An SAE after `enter_whitened_space`.
        whitening: The whitening of the activations that it is trained on.
        trainer: Folds it at the end of training, and proves the fold. None: a fold without proof.

    Raises:
        ValueError: The architecture cannot do what the whitening's config asks for.
    """
    assert isinstance(sae, _WhitenedTrainingSAE)
    _check_sparsity_norms(sae, whitening.config)
    require_basis(sae, whitening)
    sae.whitening = whitening
    # weak, because SAEs are copied, and their trainers hold what cannot be copied
    sae.trainer = None if trainer is None else weakref.ref(trainer)
    sae.mse_loss_fn = ReconstructionMetric(whitening, sae.device)
    by_original = whitening.config.sparsity_norms == "original"
    sae.sparsity_norms = SparsityNorms(whitening) if by_original else None


def require_basis(sae: TrainingSAE[Any], whitening: Whitening | None) -> None:
    """Check that an SAE's weights are not in the coordinates of another whitening.

    Args:
        sae: An SAE after `enter_whitened_space`.
        whitening: What it is going to be trained under; None if that is yet to be estimated.

    Raises:
        ValueError: It was trained under another whitening, and is not folded yet.
    """
    own = sae.whitening if isinstance(sae, _WhitenedTrainingSAE) else None
    if own is None or own is whitening:
        return
    if whitening is None or whitening.digest != own.digest:
        raise ValueError(
            "this SAE has been trained under another whitening, which is not folded into it: its "
            "weights belong to that basis. Resume its training from a checkpoint; or fold it with "
            "fold_whitening_into_weights(sae, sae.whitening) and train on with "
            "start_from_folded=True; or begin with a new SAE"
        )


def forget_basis(sae: TrainingSAE[Any]) -> None:
    """For an SAE that was given other weights: its next whitening is their basis."""
    assert isinstance(sae, _WhitenedTrainingSAE)
    sae.whitening = None


def _check_sparsity_norms(sae: TrainingSAE[Any], config: WhiteningConfig) -> None:
    if config.sparsity_norms == "whitened":
        return
    reason = describe(sae).why_not_original_norms(sae.cfg)
    if reason is not None:
        raise ValueError(
            f"WhiteningConfig.sparsity_norms={config.sparsity_norms!r}: {reason}; leave it at "
            "'whitened'"
        )


def leave_whitened_space(sae: TrainingSAE[Any]) -> None:
    """Give a folded SAE its stock class back."""
    if isinstance(sae, _WhitenedTrainingSAE):
        sae.leave_whitened_space()
