"""top_afa: the norm of the input decides how many latents are active.

Lee et al., *Evaluating and Designing Sparse Autoencoders by Approximating Quasi-Orthogonality*,
arXiv 2503.24277. If decoder rows are nearly orthogonal, the norm of a sparse code approximates the
norm of the vector that it encodes. Let a = ReLU((x - b_dec) @ W_enc). The latents with the largest
contributions a_j |d_j| are kept. Their number is chosen to bring the norm of the contributions
closest to |x - b_dec|. The AFA loss reduces the remaining difference between the two norms.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens.saes.sae import (
    SAE,
    SAEConfig,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.saes.topk_sae import calculate_topk_aux_acts
from torch import Tensor
from typing_extensions import override

from sae_whiten._checks import require_number
from sae_whiten._dtypes import float32_at_least
from sae_whiten.architectures.auxk import auxk_loss
from sae_whiten.architectures.description import Architecture, register

__all__ = [
    "TopAFASAE",
    "TopAFASAEConfig",
    "TopAFATrainingSAE",
    "TopAFATrainingSAEConfig",
    "keep_up_to_norm",
]

_WHY_NOT_FOLDABLE = (
    "it selects latents by the norm of its input, which whitening does not preserve: no weights do "
    "to raw activations what these do to whitened ones"
)
_BLOCK = 1 << 24  # latents per block: 64 MiB of float32


# --- inference ---


@dataclass
class TopAFASAEConfig(SAEConfig):
    """
    Configuration class for TopAFASAE inference.

    Examples:
        >>> TopAFASAEConfig(d_in=16, d_sae=64).architecture()
        'top_afa'

    Args:
        d_in (int): Input dimension. Inherited from SAEConfig.
        d_sae (int): Number of latents. Inherited from SAEConfig.
        dtype (str): Data type for the SAE parameters. Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Must be True: the target is the norm of x - b_dec.
        normalize_activations (str): Normalization of the input. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations. Inherited from
            SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE. Inherited from SAEConfig.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "top_afa"

    def __post_init__(self) -> None:
        _check(self)
        super().__post_init__()


class TopAFASAE(SAE[TopAFASAEConfig]):
    """
    An inference-only SAE. The norm of the input decides how many latents are active.

    Examples:
        >>> sae = TopAFASAE(TopAFASAEConfig(d_in=16, d_sae=64))
        >>> sae(torch.randn(3, 16)).shape
        torch.Size([3, 16])
    """

    @override
    def encode(self, x: Tensor) -> Tensor:
        latents, _ = _encode(self, x, self.W_dec.norm(dim=-1))
        return latents

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        return _decode(self, feature_acts, self.W_dec)

    @override
    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        raise NotImplementedError(f"whitening cannot be folded into top_afa: {_WHY_NOT_FOLDABLE}")


# --- training ---


@dataclass
class TopAFATrainingSAEConfig(TrainingSAEConfig):
    """
    Configuration class for training a TopAFATrainingSAE.

    Examples:
        >>> config = TopAFATrainingSAEConfig(d_in=16, d_sae=64)
        >>> config.metadata.import_before_loading
        'sae_whiten'

    Args:
        afa_coefficient (float): lambda, the coefficient of the AFA loss, relative to the mean
            squared error per dimension as in the paper. The paper tries 1/128 to 1/16; 1/128 does
            poorly. The loss is multiplied by d_in, because SAELens sums the squared error over
            dimensions.
        afa_form (Literal["consistent", "published"]): The norm that the loss compares with the
            norm of the contributions. "consistent": the norm of x - b_dec, as in the selection.
            "published": the norm of x, as in the authors' code. Neither passes a gradient to b_dec.
        aux_loss_coefficient (float): Coefficient of the loss that revives dead latents (AuxK).
        decoder_init_norm (float | None): Must be 1: decoder rows are kept at norm 1.
        d_in (int): Input dimension. Inherited from SAEConfig.
        d_sae (int): Number of latents. Inherited from SAEConfig.
        dtype (str): Data type for the SAE parameters. Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Must be True: the target is the norm of x - b_dec.
        normalize_activations (str): Normalization of the input. "covariance_whitening" is
            refused. "layer_norm" and "constant_norm_rescale" need aux_loss_coefficient=0, as in
            SAELens' TopK. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations. Inherited from
            SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE. Inherited from SAEConfig.
    """

    afa_coefficient: float = 1 / 32
    afa_form: Literal["consistent", "published"] = "consistent"
    aux_loss_coefficient: float = 1 / 32
    decoder_init_norm: float | None = 1.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "top_afa"

    def __post_init__(self) -> None:
        _check(self)
        if self.afa_form not in ("consistent", "published"):
            raise ValueError(f"afa_form={self.afa_form!r}: one of consistent, published")
        for name in ("afa_coefficient", "aux_loss_coefficient"):
            require_number(name, getattr(self, name), 0, whole=False)
        if self.decoder_init_norm != 1.0:
            raise ValueError(
                f"decoder_init_norm={self.decoder_init_norm}: top_afa keeps the rows of its "
                "decoder at norm 1; leave it at 1.0"
            )
        in_other_units = self.normalize_activations in ("constant_norm_rescale", "layer_norm")
        if in_other_units and self.aux_loss_coefficient != 0:
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r}: the loss that revives dead "
                "latents would compare reconstructions in normalized units with a residual in the "
                "model's; set aux_loss_coefficient=0, or normalize with expected_average_only_in"
            )
        # saved in cfg.json, to explain SAELens' KeyError: 'top_afa' on loading without sae_whiten
        self.metadata.import_before_loading = "sae_whiten"
        super().__post_init__()


class TopAFATrainingSAE(TrainingSAE[TopAFATrainingSAEConfig]):
    """
    top_afa in training: decoder rows are directions, kept at norm 1.

    A training step adds `afa_loss` (with its coefficient) and the AuxK loss to SAELens' losses.
    Logging steps add the metric `norm_ratio`, the mean of |contributions| / |x - b_dec|.

    Examples:
        >>> sae = TopAFATrainingSAE(TopAFATrainingSAEConfig(d_in=16, d_sae=64))
        >>> sae.encode(torch.randn(3, 16)).shape
        torch.Size([3, 64])
    """

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _encode(self, x, None)

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        return _decode(self, feature_acts, self._directions())

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        with torch.no_grad():
            # the gradient is orthogonal to the rows, so an optimizer step lengthens them slightly
            self.W_dec.data.div_(self.get_W_dec_norm()[:, None])
        output = super().training_forward_pass(step_input)
        if step_input.is_logging_step:
            with torch.no_grad():
                norm = _norm(output.feature_acts)
                target = _norm(self.process_sae_in(step_input.sae_in))
                output.metrics["norm_ratio"] = (norm / target).mean()
        return output

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The AFA loss and AuxK."""
        with torch.no_grad():
            target = self.process_sae_in(step_input.sae_in)
            if self.cfg.afa_form == "published":
                target = target + self.b_dec
        # the rows have norm 1, so latents are contributions
        afa_loss = (_norm(feature_acts) - _norm(target)).square().mean()
        losses = {"afa_loss": step_input.coefficients["afa"] * self.cfg.d_in * afa_loss}
        if self.cfg.aux_loss_coefficient != 0 and step_input.dead_neuron_mask is not None:
            losses["auxiliary_reconstruction_loss"] = self.cfg.aux_loss_coefficient * auxk_loss(
                self.mse_loss_fn,
                (step_input.sae_in - sae_out).detach(),
                hidden_pre,
                step_input.dead_neuron_mask,
                calculate_topk_aux_acts,
                lambda latents: latents @ self._directions(),
            )
        return losses

    @override
    def get_coefficients(self) -> dict[str, TrainCoefficientConfig | float]:
        return {"afa": self.cfg.afa_coefficient}

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Set rows to norm 1 again: the last optimizer step may have changed them slightly."""
        self.W_dec.data.copy_(self._directions())

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Rescale b_dec only. Decoder rows keep norm 1, so the latents change units."""
        self.b_dec.data /= scaling_factor
        self.cfg.normalize_activations = "none"

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict["W_dec"] = self._directions().detach()

    @override
    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        raise NotImplementedError(f"whitening cannot be folded into top_afa: {_WHY_NOT_FOLDABLE}")

    def _directions(self) -> Tensor:
        return self.W_dec / self.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8)


# --- shared ---


def _check(cfg: SAEConfig) -> None:
    if cfg.normalize_activations == "covariance_whitening":
        raise ValueError(
            "normalize_activations='covariance_whitening' is not possible with top_afa: "
            f"{_WHY_NOT_FOLDABLE}. Train it with 'none' or 'expected_average_only_in'."
        )
    if not cfg.apply_b_dec_to_input:
        raise ValueError(
            "apply_b_dec_to_input=False: top_afa compares norms with that of x - b_dec; leave it "
            "at True"
        )


def _encode(sae: SAE[Any], x: Tensor, norms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Latents and pre-activations. `norms` are those of the decoder rows; None if all are 1."""
    sae_in = sae.process_sae_in(x)
    hidden_pre = sae.hook_sae_acts_pre(sae_in @ sae.W_enc)
    latents = hidden_pre.relu()
    with torch.no_grad():
        contributions = latents if norms is None else latents * norms
        kept = keep_up_to_norm(
            contributions.reshape(-1, contributions.shape[-1]),
            _norm(sae_in).reshape(-1),
        )
    return sae.hook_sae_acts_post(latents * kept.view_as(latents)), hidden_pre


def _norm(x: Tensor) -> Tensor:
    """Norms in float32 or better. bfloat16 is too coarse to show the effect of one more latent."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype)


def _decode(sae: SAE[Any], latents: Tensor, rows: Tensor) -> Tensor:
    decoded = sae.hook_sae_recons(latents @ rows + sae.b_dec)
    return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(decoded), sae.d_head)


@torch.no_grad()
def keep_up_to_norm(
    contributions: Float[Tensor, "batch d_sae"], norm: Float[Tensor, "batch"]
) -> Float[Tensor, "batch d_sae"]:
    """Keep the largest contributions, as many as bring their l2 norm closest to `norm`.

    At least one is kept. If several numbers of contributions are equally close, the smallest number
    is taken. A zero is therefore kept only if all contributions are zero. (Norms are rounded to
    float32, where the smallest contributions may make no difference.) Only the largest
    contributions are sorted, in blocks of bounded memory.

    Examples:
        >>> keep_up_to_norm(torch.tensor([[3.0, 0.1, 4.0]]), torch.tensor([5.0]))
        tensor([[1., 0., 1.]])

    Args:
        contributions: Latents times norms of decoder rows, not negative.
        norm: The norm to come close to.

    Returns:
        1 where a contribution is kept, 0 elsewhere, in the dtype of `contributions`.
    """
    batch, d_sae = contributions.shape
    kept = torch.zeros_like(contributions)
    n_sorted = d_sae
    if batch > 512:
        # sort as many contributions as a sample of the rows needs, and a few more
        few = slice(None, None, max(batch // 64, -(-batch * d_sae // _BLOCK)))
        some = _sorted(contributions[few], norm[few], d_sae)[1]
        n_sorted = min(d_sae, int(1.2 * int(some.max())) + 8)
    todo = torch.arange(batch, device=contributions.device)
    while len(todo):
        undecided = []
        for rows in todo.split(max(1, _BLOCK // d_sae)):
            indices, number, decided = _sorted(contributions[rows], norm[rows], n_sorted)
            rank = torch.arange(n_sorted, device=rows.device)
            chosen = (rank < number[:, None]).to(kept.dtype)
            # the next round overwrites undecided rows
            kept[rows] = torch.zeros_like(kept[rows]).scatter_(-1, indices, chosen)
            undecided.append(rows[~decided])
        todo = torch.cat(undecided)
        n_sorted = min(d_sae, 4 * n_sorted)
    return kept


def _sorted(contributions: Tensor, norm: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the n largest, how many to keep, and whether a larger n keeps the same number."""
    largest, indices = contributions.topk(n, dim=-1)
    norms = float32_at_least(largest).square_()
    norms = norms.cumsum_(dim=-1).sqrt_()
    decided = (norms[:, -1] >= norm) | (largest[:, -1] <= 0)
    if n == contributions.shape[-1]:
        decided = torch.ones_like(decided)
    # argmin returns the first of equal values
    return indices, (norms - norm[:, None]).abs_().argmin(dim=-1) + 1, decided


register(
    Architecture(sae_classes=(TopAFASAE, TopAFATrainingSAE), not_foldable_because=_WHY_NOT_FOLDABLE)
)
