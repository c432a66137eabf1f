"""standard: ReLU latents with an L1 penalty weighted by decoder norms."""

from sae_lens import StandardSAE, StandardTrainingSAE
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_whiten.architectures.description import Architecture, register
from sae_whiten.architectures.losses import SparsityNorms


class StandardLosses(StandardTrainingSAE):
    """The sparsity penalty can use decoder norms in the original space."""

    sparsity_norms: SparsityNorms | None

    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """SAELens' sparsity penalty, with other decoder norms."""
        if self.sparsity_norms is None:
            return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        charged = feature_acts * self.sparsity_norms(self.W_dec)
        sparsity = charged.norm(p=self.cfg.lp_norm, dim=-1)
        return {"l1_loss": (step_input.coefficients["l1"] * sparsity).mean()}


register(
    Architecture(
        sae_classes=(StandardSAE, StandardTrainingSAE),
        losses=StandardLosses,
        why_not_original_norms=lambda cfg: None,
        sparsity_field="l1_coefficient",
        scaled_fields={"l1_coefficient": 1},
    )
)
