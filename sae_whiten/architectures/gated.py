"""gated: gate and magnitudes share one encoder product, rescaled for the magnitudes
(Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from dataclasses import replace
from typing import Any

import torch
from sae_lens import GatedSAE, GatedTrainingSAE
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_whiten.architectures.description import Architecture, read_weights, register
from sae_whiten.architectures.losses import SparsityNorms
from sae_whiten.folding import AffineWeights


class GatedLosses(GatedTrainingSAE):
    """The penalty can use original-space norms. The auxiliary error uses the main metric."""

    sparsity_norms: SparsityNorms | None

    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The L1 penalty, and the error of the reconstruction from the gate alone."""
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


def _affine_weights(sae: Any) -> AffineWeights:
    weights = read_weights(sae, "b_gate", "b_mag")
    return replace(weights, gains={"b_mag": sae.r_mag.data.double().exp()})


register(
    Architecture(
        sae_classes=(GatedSAE, GatedTrainingSAE),
        affine_weights=_affine_weights,
        losses=GatedLosses,
        why_not_original_norms=lambda cfg: None,
        sparsity_field="l1_coefficient",
        scaled_fields={"l1_coefficient": 1},
    )
)
