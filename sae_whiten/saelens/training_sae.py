"""A training SAE while it lives in whitened coordinates.

`enter_whitened_space` gives an SAE object a subclass of its class, `leave_whitened_space` its own
class back. In between, whatever holds the object, SAELens' trainers, evaluators or the user, can
neither save nor fold it in a way that would be wrong on raw activations. SAELens itself is not
touched, nor is any other SAE.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens import TrainingSAE
from sae_lens.saes.sae import mse_loss
from torch import Tensor

from sae_whiten._files import load_tensors, save_tensors
from sae_whiten.saelens.folding import (
    FoldError,
    fold_whitening_into_weights,
    folded_copy,
    why_not_foldable,
)
from sae_whiten.saelens.losses import ReconstructionMetric, losses_for
from sae_whiten.whitening import Whitening

__all__ = [
    "TRAINING_STATE_DIR",
    "enter_whitened_space",
    "leave_whitened_space",
    "load_training_weights",
    "save_training_weights",
    "set_whitening",
]

# beside the plain SAE of a checkpoint: what resuming needs, under names that SAELens does not open
TRAINING_STATE_DIR = "whitened_training_state"
_WEIGHTS_FILENAME = "training_weights.safetensors"
_KIND = "training_weights"

_Base = TrainingSAE[Any] if TYPE_CHECKING else object


class _WhitenedTrainingSAE(_Base):
    """What every training SAE does otherwise while its weights are in whitened coordinates."""

    stock_class: type[TrainingSAE[Any]]
    whitening: Whitening | None
    fold_whitening: Callable[[], None]

    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save a folded copy: a plain SAE for raw activations.

        Raises:
            FoldError: The whitening has not been estimated yet.
        """
        folded, _ = folded_copy(self, self._required_whitening("save"))
        assert isinstance(folded, TrainingSAE)
        return folded.save_inference_model(path)

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save a folded copy and, in a folder beside it, the weights in whitened coordinates."""
        written = self.save_inference_model(path)
        save_training_weights(self, path)
        return written

    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Load the weights in whitened coordinates from a checkpoint directory."""
        load_training_weights(self, checkpoint_path)

    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        """What SAELens' trainers call when training is done: our fold instead of theirs.

        Raises:
            FoldError: The matrices are not those that the SAE was trained under, or folding fails.
        """
        own = self._required_whitening("fold")
        given = ((mean, own.mean), (whitening_matrix, own.W), (unwhitening_matrix, own.W_inv))
        if not all(torch.equal(a.to(b), b) for a, b in given):
            raise FoldError("this SAE was trained under another whitening than the one given")
        self.fold_whitening()

    def _fold(self) -> None:
        fold_whitening_into_weights(self, self._required_whitening("fold"))
        leave_whitened_space(self)

    def _required_whitening(self, action: str) -> Whitening:
        if self.whitening is None:
            raise FoldError(f"cannot {action} this SAE: its whitening has not been estimated yet")
        return self.whitening


@functools.cache
def _whitened_class(stock_class: type[TrainingSAE[Any]]) -> type[Any]:
    bases = (_WhitenedTrainingSAE, *losses_for(stock_class), stock_class)
    return type(f"Whitened{stock_class.__name__}", bases, {"stock_class": stock_class})


def enter_whitened_space(sae: TrainingSAE[Any]) -> None:
    """Guard an SAE whose weights are, from now on, in whitened coordinates.

    Raises:
        FoldError: No whitening can be folded into it.
        ValueError: Its training step was compiled before, and would keep its losses.
    """
    if isinstance(sae, _WhitenedTrainingSAE):
        return
    reason = why_not_foldable(sae)
    if reason is not None:
        raise FoldError(f"cannot train under whitening, for it could not be folded into {reason}")
    if "training_forward_pass" in sae.__dict__:
        raise ValueError(
            "this SAE's training_forward_pass was replaced (torch.compile?) before its trainer was "
            "made. Compile it afterwards, or set compile_sae=True in the runner's config."
        )
    sae.__class__ = _whitened_class(type(sae))
    assert isinstance(sae, _WhitenedTrainingSAE)
    sae.whitening = None


def set_whitening(
    sae: TrainingSAE[Any], whitening: Whitening, fold: Callable[[], None] | None = None
) -> None:
    """Tell an SAE in whitened space its whitening, and with it the metric of its losses.

    Args:
        sae: An SAE after `enter_whitened_space`.
        whitening: The whitening of the activations that it is trained on.
        fold: Called to fold it at the end of training, in place of a fold without proof.
    """
    assert isinstance(sae, _WhitenedTrainingSAE)
    sae.whitening = whitening
    sae.fold_whitening = fold or sae._fold
    sae.mse_loss_fn = ReconstructionMetric(whitening, sae.device)


def leave_whitened_space(sae: TrainingSAE[Any]) -> None:
    """Give an SAE its stock class back, once it is folded."""
    if isinstance(sae, _WhitenedTrainingSAE):
        # a training step that was compiled belongs to the subclass too
        for name in ("whitening", "fold_whitening", "training_forward_pass"):
            vars(sae).pop(name, None)
        sae.mse_loss_fn = mse_loss
        sae.__class__ = sae.stock_class  # pyright: ignore[reportAttributeAccessIssue]


def save_training_weights(sae: TrainingSAE[Any], checkpoint_path: str | Path) -> None:
    """Write the state dict, in whitened coordinates, into a checkpoint directory."""
    save_state(checkpoint_path, dict(sae.state_dict()), sae.cfg.to_dict())


def save_state(
    checkpoint_path: str | Path, state_dict: dict[str, Tensor], cfg: dict[str, Any]
) -> None:
    """Write training weights, in whitened coordinates, into a checkpoint directory."""
    path = Path(checkpoint_path) / TRAINING_STATE_DIR / _WEIGHTS_FILENAME
    save_tensors(path, _KIND, state_dict, {"cfg": cfg})


def load_training_weights(sae: TrainingSAE[Any], checkpoint_path: str | Path) -> None:
    """Load what `save_training_weights` wrote.

    Raises:
        FileNotFoundError: The directory is not a checkpoint of this package.
        CorruptFileError: The file is truncated, foreign or was changed.
        ValueError: The checkpoint is of another architecture, size or dtype.
    """
    path = Path(checkpoint_path) / TRAINING_STATE_DIR / _WEIGHTS_FILENAME
    state_dict, fields = load_tensors(path, _KIND)
    saved, own = fields["cfg"], sae.cfg.to_dict()
    names = ("architecture", "d_in", "d_sae", "dtype", "apply_b_dec_to_input", "k")
    different = [
        f"{name}={saved.get(name)!r} (now {own.get(name)!r})"
        for name in names
        if saved.get(name) != own.get(name)
    ]
    if different:
        raise ValueError(f"{path}: the checkpoint was trained with {', '.join(different)}")
    sae.load_state_dict(state_dict)
