"""jumprelu: latents are active above a learned threshold, with an L0 penalty (Rajamanoharan et al.
2024, arXiv 2407.14435).

The threshold applies to pre-activations. The fold does not change these, so the threshold stays.
BatchTopK SAEs are saved as JumpReLU SAEs.
"""

from typing import Any

import torch
from sae_lens import JumpReLUSAE, JumpReLUTrainingSAE
from sae_lens.saes.jumprelu_sae import calculate_pre_act_loss
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_whiten.architectures.description import Architecture, register
from sae_whiten.architectures.losses import SparsityNorms


class JumpReLULosses(JumpReLUTrainingSAE):
    """The penalties of the tanh mode can use decoder norms in the original space."""

    sparsity_norms: SparsityNorms | None

    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """SAELens' penalties, with other decoder norms."""
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


def _why_not_original_norms(cfg: Any) -> str | None:
    if cfg.jumprelu_sparsity_loss_mode == "tanh":
        return None
    return (
        "the sparsity of jumprelu does not depend on decoder norms unless "
        "jumprelu_sparsity_loss_mode='tanh'"
    )


def _compare_defaults(*, seen: float, loss: float, n_steps: int) -> dict[str, Any]:
    # SAELens' defaults suit latents of about 1. The default penalty trains only the threshold,
    # which hardly moves in a short training.
    return {
        "jumprelu_sparsity_loss_mode": "tanh",
        "jumprelu_ste_to_input": True,
        "jumprelu_bandwidth": 2.0 * seen,
        "jumprelu_init_threshold": 0.1 * seen,
        "jumprelu_tanh_scale": 4.0 / seen,
        "pre_act_loss_coefficient": 3e-6 * loss**2 / seen,
    }


register(
    Architecture(
        sae_classes=(JumpReLUSAE, JumpReLUTrainingSAE),
        losses=JumpReLULosses,
        why_not_original_norms=_why_not_original_norms,
        sparsity_field="l0_coefficient",
        scaled_fields={"l0_coefficient": 0},
        compare_defaults=_compare_defaults,
    )
)
