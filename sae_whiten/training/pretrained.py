"""Continue training from a finished SAE, with the config of the run."""

from typing import Any

import torch
from jaxtyping import Float
from sae_lens import BatchTopKTrainingSAE
from sae_lens.constants import ACTIVATION_WHITENING_FILENAME
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.util import dtype_to_str, str_to_dtype
from torch import Tensor

from sae_whiten.architectures.folding import unfold_whitening_from_weights
from sae_whiten.architectures.topk_vsae import TopKVSAETrainingSAE
from sae_whiten.whitening import Whitening

__all__ = ["as_asked_for", "unfold_for_training"]

# fields that the weights of a finished SAE decide
_OF_THE_WEIGHTS = ("architecture", "d_in", "d_sae", "variance")
# fields that a fold resets; after unfolding they are set as the config asks
_ONCE_UNFOLDED = ("dtype", "rescale_acts_by_decoder_norm")
# largest ratio of decoder norms that still count as equal, so that ranking by them changes nothing;
# not 1, because this whitening was estimated from other samples than the one of the first training
_SAME_NORMS = 1.25


def as_asked_for(loaded: TrainingSAE[Any], asked: TrainingSAEConfig, path: str) -> TrainingSAE[Any]:
    """An SAE with the weights of a finished one and the config of the run.

    Args:
        loaded: The SAE as SAELens loads the folder. Coefficients that the folder lacks are SAELens'
            defaults.
        asked: The config of the run.
        path: The folder, for error messages.

    Returns:
        An SAE with the config of the run, except for the fields that `unfold_for_training` sets.

    Raises:
        ValueError: The weights are for normalised activations, or do not fit the config.
    """
    normalised = loaded.cfg.normalize_activations
    if normalised == "covariance_whitening":
        raise ValueError(
            f"{path} holds an SAE whose weights are in whitened coordinates "
            "(normalize_activations='covariance_whitening'), without the whitening: is it a "
            "checkpoint of SAELens' own trainer? Its weights are useless under another whitening. "
            f"Fold it first, with the {ACTIVATION_WHITENING_FILENAME} it was trained with."
        )
    if normalised != "none":
        raise ValueError(
            f"{path} holds an SAE with normalize_activations={normalised!r}; only a plain one "
            "('none') can be brought into whitened coordinates"
        )
    was, requested = loaded.cfg.to_dict(), asked.to_dict()
    different = [
        f"{name}={was.get(name)!r}, and the config asks for {requested.get(name)!r}"
        for name in _OF_THE_WEIGHTS
        if was.get(name) != requested.get(name)
    ]
    if not asked.apply_b_dec_to_input:
        different.append(
            "apply_b_dec_to_input=True once it is unfolded, and the config asks for False"
        )
    if different:
        raise ValueError(
            f"{path} holds an SAE with {'; '.join(different)}. (A finished SAE is saved for "
            "inference: batchtopk as jumprelu, topk_vsae as topk. Checkpoints keep the training "
            "form: save_final_checkpoint=True.)"
        )
    kept = {name: was[name] for name in _ONCE_UNFOLDED if name in was}
    kept |= {name: was[name] for name in ("normalize_activations", "apply_b_dec_to_input")}
    with torch.random.fork_rng():  # its initial weights are replaced
        sae = TrainingSAE.from_dict({**requested, **kept, "metadata": was["metadata"]})
    sae.load_state_dict(loaded.state_dict())
    return sae.to(device=loaded.device)


def unfold_for_training(
    sae: TrainingSAE[Any], whitening: Whitening, asked: TrainingSAEConfig | None
) -> None:
    """Bring a plain SAE into whitened coordinates, exactly, to be trained there.

    If `asked` ranks latents by decoder norms, these norms are nearly equal, so the ranking can
    change only between near ties.

    Args:
        sae: The SAE, changed in place.
        whitening: The whitening of its input.
        asked: A config with the dtype, and with ranking by decoder norms, that folding took away;
            None leaves them.

    Raises:
        ValueError: Ranking by decoder norms would change which latents are active.
        FoldError: As for `unfold_whitening_from_weights`.
    """
    unfold_whitening_from_weights(sae, whitening)
    if asked is None:
        return
    if getattr(asked, "rescale_acts_by_decoder_norm", False):
        norms = torch.linalg.vector_norm(sae.W_dec.data, dim=1)
        ratio = float(norms.max() / norms.min())
        if not ratio <= _SAME_NORMS:
            raise ValueError(
                "the config asks for rescale_acts_by_decoder_norm=True, and the SAE to start from "
                f"has False: its decoder norms differ by a factor of {ratio:.3g} under this "
                "whitening, so ranking by them would change which latents are active. Set it to "
                "False; or, if the SAE was trained under whitening, give the statistics of its "
                "folder as WhiteningConfig.statistics"
            )
        sae.cfg.rescale_acts_by_decoder_norm = True  # pyright: ignore[reportAttributeAccessIssue]
        _multiply_latents(sae, norms)
    sae.dtype = str_to_dtype(asked.dtype)
    sae.cfg.dtype = dtype_to_str(sae.dtype)
    for parameter in sae.parameters():  # not buffers: BatchTopK's threshold is float64
        parameter.data = parameter.data.to(sae.dtype)


def _multiply_latents(sae: TrainingSAE[Any], norms: Float[Tensor, "d_sae"]) -> None:
    """Multiply by decoder norms what is in units of the latents, as ranking does with latents."""
    if isinstance(sae, BatchTopKTrainingSAE):
        sae.topk_threshold = sae.topk_threshold * norms.mean()
    if isinstance(sae, TopKVSAETrainingSAE) and sae.cfg.variance == "learned":
        sae.b_var.data += 2 * norms.log()
