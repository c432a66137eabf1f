"""topk (Gao et al. 2024, arXiv 2406.04093), abstopk and batchtopk: the largest latents are kept.

With `rescale_acts_by_decoder_norm`, latents are pre-activations times decoder norms, and are ranked
by this product. Whitening changes the norms, so the fold moves them into the encoder first.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import (
    AbsTopKSAE,
    AbsTopKTrainingSAE,
    BatchTopKTrainingSAE,
    TopKSAE,
    TopKTrainingSAE,
)
from sae_lens.saes.abstopk_sae import calculate_abstopk_aux_acts
from sae_lens.saes.topk_sae import act_times_W_dec, calculate_topk_aux_acts
from torch import Tensor

from sae_whiten.architectures.auxk import AuxKSelector, auxk_loss
from sae_whiten.architectures.description import Architecture, read_weights, register
from sae_whiten.architectures.losses import SparsityNorms, ranking_norms
from sae_whiten.architectures.sparse_step import sparse_step
from sae_whiten.folding import AffineWeights

__all__ = ["TOPK", "TopKLosses"]


class TopKLosses(TopKTrainingSAE):
    """Ranking can use original-space norms. The AuxK error is measured like the main error.

    Latents are in units of the norms used for ranking. SAELens' decoder expects units of the norms
    in whitened space, so latents are converted before each decoding.
    """

    sparsity_norms: SparsityNorms | None

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """SAELens' encoder, with other decoder norms."""
        if self.sparsity_norms is None:
            return super().encode_with_hidden_pre(x)
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        hidden_pre = hidden_pre * ranking_norms(self)
        return self.hook_sae_acts_post(self.activation_fn(hidden_pre)), hidden_pre

    def decode(self, feature_acts: Tensor) -> Tensor:
        """SAELens' decoder, for latents in the units of this SAE."""
        return super().decode(self.in_stock_units(feature_acts))

    def in_stock_units(self, acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """Latents in units of the decoder norms in whitened space."""
        if self.sparsity_norms is None:
            return acts
        return acts * (self.W_dec.norm(dim=-1) / ranking_norms(self))

    def calculate_topk_aux_loss(
        self,
        sae_in: Tensor,
        sae_out: Tensor,
        hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
    ) -> Tensor:
        """AuxK, see `auxk_loss`."""
        return self._weighted_auxk_loss(
            sae_in, sae_out, hidden_pre, dead_neuron_mask, calculate_topk_aux_acts
        )

    def _weighted_auxk_loss(
        self,
        sae_in: Tensor,
        sae_out: Tensor,
        hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
        select: AuxKSelector,
    ) -> Tensor:
        """AuxK, where `select` chooses among the dead latents. See `auxk_loss`."""
        if dead_neuron_mask is None:
            return sae_out.new_tensor(0.0)
        loss = auxk_loss(
            self.mse_loss_fn,
            (sae_in - sae_out).detach(),
            hidden_pre,
            dead_neuron_mask,
            select,
            lambda acts: act_times_W_dec(
                self.in_stock_units(acts), self.W_dec, self.cfg.rescale_acts_by_decoder_norm
            ),
        )
        return self.cfg.aux_loss_coefficient * loss


class AbsTopKLosses(TopKLosses, AbsTopKTrainingSAE):
    """`TopKLosses` for latents of either sign."""

    def calculate_abstopk_aux_loss(
        self,
        sae_in: Tensor,
        sae_out: Tensor,
        hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
    ) -> Tensor:
        """AuxK, see `auxk_loss`."""
        return self._weighted_auxk_loss(
            sae_in, sae_out, hidden_pre, dead_neuron_mask, calculate_abstopk_aux_acts
        )


@torch.no_grad()
def _affine_weights(sae: Any) -> AffineWeights:
    weights = read_weights(sae)
    if not sae.cfg.rescale_acts_by_decoder_norm:
        return weights
    return replace(weights, decoder_norms=ranking_norms(sae, torch.float64))


def _why_not_original_norms(cfg: Any) -> str | None:
    if cfg.rescale_acts_by_decoder_norm:
        return None
    name = cfg.architecture()
    return f"{name} with rescale_acts_by_decoder_norm=False ranks latents without their norms"


def _batchtopk_defaults(*, seen: float, loss: float, n_steps: int) -> dict[str, Any]:
    # with SAELens' default of 0.01, the threshold has not converged after a few hundred steps
    return {"topk_threshold_lr": max(0.01, min(0.05, 20 / max(n_steps, 1)))}


TOPK = Architecture(
    sae_classes=(TopKSAE, TopKTrainingSAE),
    affine_weights=_affine_weights,
    set_by_fold={"rescale_acts_by_decoder_norm": False},
    losses=TopKLosses,
    why_not_original_norms=_why_not_original_norms,
    fast_step=sparse_step,
    sparsity_field="k",
    sparsity_is_exact=True,
)
ABSTOPK = replace(TOPK, sae_classes=(AbsTopKSAE, AbsTopKTrainingSAE), losses=AbsTopKLosses)
# batchtopk's threshold is in units of the latents, so the fold does not change it
BATCHTOPK = replace(TOPK, sae_classes=(BatchTopKTrainingSAE,), compare_defaults=_batchtopk_defaults)
for _each in (TOPK, ABSTOPK, BATCHTOPK):
    register(_each)
