"""Reconstruction losses of SAELens' training SAEs in the space of the original activations.

The SAE works in whitened coordinates. With e = z_hat - z the error there, the squared error in the
original space is |e @ W_inv|^2; for pca that is sum_i l~_i^a e_i^2, an elementwise weight. Every
reconstruction term takes it: the main loss, the inner losses of Matryoshka SAEs, and the auxiliary
ones. A residual is mapped without the mean. Saraswatula & Klindt, arXiv 2511.13981.

Sparsity is charged by the norms of decoder rows in whitened coordinates, as SAELens does it, or, if
`sparsity_norms` is "original", by |d_j @ W_inv|, their norms once the whitening is folded in.
"""

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from sae_lens import (
    GatedTrainingSAE,
    JumpReLUTrainingSAE,
    MatryoshkaBatchTopKTrainingSAE,
    StandardTrainingSAE,
    TopKTrainingSAE,
)
from sae_lens.saes.abstopk_sae import calculate_abstopk_aux_acts
from sae_lens.saes.jumprelu_sae import calculate_pre_act_loss
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import act_times_W_dec, calculate_topk_aux_acts
from torch import Tensor

from sae_whiten.architectures.dead_latents import dead_latents_loss
from sae_whiten.whitening import Whitening, full_precision

__all__ = ["ReconstructionMetric", "SparsityNorms", "losses_for", "why_not_original_norms"]


class ReconstructionMetric:
    """Squared error between whitened activations, measured in the configured space.

    Scaled such that predicting the mean costs d_in on average (less where directions have no
    variance, which count with the average gain that they are given): by d / sum(l~) in the original
    space, by d / sum(l~^(1-a)) in whitened space, which is 1 for full whitening. Learning rates,
    sparsity coefficients and gradient clipping then carry over between the two.

    Args:
        whitening: The transform; its `config.loss_space` chooses the space.
        device: Where the SAE is.
    """

    def __init__(self, whitening: Whitening, device: torch.device | str) -> None:
        values, a = whitening.eigenvalues, whitening.strength
        if whitening.config.loss_space == "whitened":
            scale = values.numel() / values.pow(1 - a).sum()
            # strength 1 needs no weights at all, so that the loss is SAELens' own to the bit
            self.weights = None if a == 1 else torch.full_like(values, float(scale))
            self.residual_map = None
        else:
            scale = values.numel() / values.sum()
            if whitening.kind == "pca":
                self.weights, self.residual_map = values.pow(a) * scale, None
            else:
                self.weights, self.residual_map = None, whitening.W_inv * scale.sqrt()
        self.weights = None if self.weights is None else self.weights.float().to(device)
        if self.residual_map is not None:
            self.residual_map = self.residual_map.float().to(device)

    def __call__(
        self, preds: Float[Tensor, "*batch d_in"], target: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_in"]:
        """Contributions to the squared error, to be summed over the last dimension.

        Args:
            preds: Shape (..., d_in), whitened.
            target: Shape (..., d_in), whitened.

        Returns:
            Shape (..., d_in), float32 at least where the metric is not the identity.
        """
        mse = torch.nn.functional.mse_loss
        if self.weights is not None:
            dtype = torch.promote_types(preds.dtype, torch.float32)
            return mse(preds.to(dtype), target.to(dtype), reduction="none") * self.weights
        if self.residual_map is None:
            return mse(preds, target, reduction="none")
        with full_precision(preds.device):
            residual_map = self.residual_map
            dtype = torch.promote_types(preds.dtype, residual_map.dtype)
            error = preds.to(dtype) - target.to(dtype)
            return (error @ residual_map.to(dtype)).square()


class SparsityNorms:
    """Norms of decoder rows in the space of the original activations, |d_j @ W_inv|.

    Scaled by the root of d / tr(W_inv W_inv^T), so that the mean square over all directions is the
    square of the norm in whitened space: penalties keep their order of magnitude.

    Args:
        whitening: The transform.
    """

    def __init__(self, whitening: Whitening) -> None:
        gains = whitening.eigenvalues.pow(whitening.strength / 2)
        scale = gains.square().mean().rsqrt()
        # the rotation of pca does not change lengths
        self._map = scale * (gains if whitening.kind == "pca" else whitening.W_inv)
        self._casts: dict[Any, Tensor] = {}

    def __call__(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae"]:
        """The norms, shape (d_sae,), in the dtype of `W_dec`, shape (d_sae, d_in), whitened."""
        dtype = torch.promote_types(W_dec.dtype, torch.float32)
        key = (W_dec.device, dtype)
        if key not in self._casts:
            self._casts[key] = self._map.to(dtype).to(W_dec.device)
        to_original = self._casts[key]
        with full_precision(W_dec.device):
            rows = W_dec.to(dtype)
            rows = rows * to_original if to_original.ndim == 1 else rows @ to_original
            return torch.linalg.vector_norm(rows, dim=-1).to(W_dec.dtype)


def why_not_original_norms(sae_class: type[Any], cfg: Any) -> str | None:
    """The reason why `sparsity_norms="original"` means nothing for SAEs of a training class with
    this config; None if it does."""
    name = cfg.architecture()
    if name == "topk_vsae":
        return "topk_vsae compares its latents with a prior, in whitened coordinates"
    if issubclass(sae_class, TopKTrainingSAE):
        if cfg.rescale_acts_by_decoder_norm:
            return None
        return f"{name} with rescale_acts_by_decoder_norm=False ranks latents without their norms"
    if issubclass(sae_class, (StandardTrainingSAE, GatedTrainingSAE)):
        return None
    if issubclass(sae_class, JumpReLUTrainingSAE) and cfg.jumprelu_sparsity_loss_mode == "tanh":
        return None
    return (
        f"{name} does not charge latents by the norms of their decoder rows (jumprelu does with "
        "jumprelu_sparsity_loss_mode='tanh')"
    )


class _SparsityByNorm:
    sparsity_norms: SparsityNorms | None


if TYPE_CHECKING:

    class _StandardBase(_SparsityByNorm, StandardTrainingSAE): ...

    class _JumpReLUBase(_SparsityByNorm, JumpReLUTrainingSAE): ...

    class _TopKBase(_SparsityByNorm, TopKTrainingSAE): ...

    class _MatryoshkaBase(_SparsityByNorm, MatryoshkaBatchTopKTrainingSAE): ...

    class _GatedBase(_SparsityByNorm, GatedTrainingSAE): ...

else:
    # mixed into the class of the SAE at hand, in front of it
    _StandardBase = _JumpReLUBase = _TopKBase = _MatryoshkaBase = _GatedBase = object


def losses_for(sae_class: type[Any]) -> tuple[type[Any], ...]:
    """The mixins that give the auxiliary losses of `sae_class` the metric `mse_loss_fn`."""
    if issubclass(sae_class, MatryoshkaBatchTopKTrainingSAE):
        return (_MatryoshkaLosses, _TopKLosses)
    if issubclass(sae_class, TopKTrainingSAE):
        return (_TopKLosses,)
    if issubclass(sae_class, GatedTrainingSAE):
        return (_GatedLosses,)
    if issubclass(sae_class, StandardTrainingSAE):
        return (_StandardLosses,)
    if issubclass(sae_class, JumpReLUTrainingSAE):
        return (_JumpReLULosses,)
    return ()


class _StandardLosses(_StandardBase):
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The sparsity penalty, as SAELens has it but for the norms."""
        if self.sparsity_norms is None:
            return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        charged = feature_acts * self.sparsity_norms(self.W_dec)
        sparsity = charged.norm(p=self.cfg.lp_norm, dim=-1)
        return {"l1_loss": (step_input.coefficients["l1"] * sparsity).mean()}


class _JumpReLULosses(_JumpReLUBase):
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The penalties of the tanh mode, as SAELens has them but for the norms."""
        if self.sparsity_norms is None:
            return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        norms = self.sparsity_norms(self.W_dec)
        charged = torch.tanh(self.cfg.jumprelu_tanh_scale * feature_acts * norms).sum(dim=-1)
        losses = {"l0_loss": (step_input.coefficients["l0"] * charged).mean()}
        if self.cfg.pre_act_loss_coefficient is not None:
            losses["pre_act_loss"] = calculate_pre_act_loss(
                self.cfg.pre_act_loss_coefficient,
                self.threshold.to(hidden_pre.dtype),
                hidden_pre,
                step_input.dead_neuron_mask,
                norms,
            )
        return losses


class _TopKLosses(_TopKBase):
    """topk, abstopk, batchtopk: dead latents reconstruct the residual of the living.

    Latents are in units of the norms that they are ranked by, and are brought to SAELens' units,
    those of the norms in whitened space, wherever SAELens decodes them.
    """

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """SAELens' own, but for the norms."""
        if self.sparsity_norms is None:
            return super().encode_with_hidden_pre(x)
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        hidden_pre = hidden_pre * self.sparsity_norms(self.W_dec)
        return self.hook_sae_acts_post(self.activation_fn(hidden_pre)), hidden_pre

    def decode(self, feature_acts: Tensor) -> Tensor:
        """SAELens' own, of latents in the units of this SAE."""
        return super().decode(_in_stock_units(self, feature_acts))

    def calculate_topk_aux_loss(
        self,
        sae_in: Tensor,
        sae_out: Tensor,
        hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
    ) -> Tensor:
        return _topk_dead_latents_loss(
            self, sae_in, sae_out, hidden_pre, dead_neuron_mask, calculate_topk_aux_acts
        )

    def calculate_abstopk_aux_loss(
        self,
        sae_in: Tensor,
        sae_out: Tensor,
        hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
    ) -> Tensor:
        return _topk_dead_latents_loss(
            self, sae_in, sae_out, hidden_pre, dead_neuron_mask, calculate_abstopk_aux_acts
        )


class _MatryoshkaLosses(_MatryoshkaBase):
    def _iterable_decode(
        self, feature_acts: Tensor, include_outer_loss: bool = False
    ) -> Generator[tuple[int, Tensor], None, None]:
        return super()._iterable_decode(_in_stock_units(self, feature_acts), include_outer_loss)

    def calculate_matryoshka_aux_loss(
        self,
        sae_in: Tensor,
        sae_out: Tensor,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
    ) -> Tensor:
        """The dead latents of each level reconstruct the residual of the levels up to it."""
        total = sae_out.new_tensor(0.0)
        if dead_neuron_mask is None or not dead_neuron_mask.any():
            return total
        W_dec = self.W_dec
        if self.cfg.rescale_acts_by_decoder_norm:
            norms = W_dec.norm(dim=-1)
            if self.sparsity_norms is not None:
                norms = self.sparsity_norms(W_dec)
            W_dec = W_dec / norms[:, None]
        start = 0
        for width, level_out in self._iterable_decode(feature_acts, include_outer_loss=True):
            level = slice(start, width)
            start = width
            total = total + dead_latents_loss(
                self.mse_loss_fn,
                (sae_in - level_out).detach(),
                hidden_pre[:, level],
                dead_neuron_mask[level],
                calculate_topk_aux_acts,
                lambda acts, level=level: acts @ W_dec[level],
            )
        return self.cfg.aux_loss_coefficient * total


class _GatedLosses(_GatedBase):
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The L1 penalty and the reconstruction through the gate alone."""
        sae_in = step_input.sae_in
        centred = sae_in.to(self.W_enc.dtype) - self.b_dec * self.cfg.apply_b_dec_to_input
        gate = centred @ self.W_enc + self.b_gate
        gate = torch.relu(gate)
        norms = self.W_dec.norm(dim=1)
        if self.sparsity_norms is not None:
            norms = self.sparsity_norms(self.W_dec)
        l1 = (gate * norms).sum(dim=-1).mean()
        reconstruction = self.mse_loss_fn(gate @ self.W_dec + self.b_dec, sae_in)
        return {
            "l1_loss": step_input.coefficients["l1"] * l1,
            "auxiliary_reconstruction_loss": reconstruction.sum(dim=-1).mean(),
        }


def _in_stock_units(sae: "_TopKBase | _MatryoshkaBase", acts: Tensor) -> Tensor:
    if sae.sparsity_norms is None:
        return acts
    return acts * (sae.W_dec.norm(dim=-1) / sae.sparsity_norms(sae.W_dec))


def _topk_dead_latents_loss(
    sae: _TopKBase,
    sae_in: Tensor,
    sae_out: Tensor,
    hidden_pre: Tensor,
    dead_neuron_mask: Tensor | None,
    select: Any,
) -> Tensor:
    if dead_neuron_mask is None:
        return sae_out.new_tensor(0.0)
    loss = dead_latents_loss(
        sae.mse_loss_fn,
        (sae_in - sae_out).detach(),
        hidden_pre,
        dead_neuron_mask,
        select,
        lambda acts: act_times_W_dec(
            _in_stock_units(sae, acts), sae.W_dec, sae.cfg.rescale_acts_by_decoder_norm
        ),
    )
    return sae.cfg.aux_loss_coefficient * loss
