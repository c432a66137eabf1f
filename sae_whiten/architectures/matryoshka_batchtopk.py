"""matryoshka_batchtopk: BatchTopK with nested dictionaries, each trained to reconstruct the input
(Bussmann et al. 2025, arXiv 2503.17547)."""

from collections.abc import Generator
from dataclasses import replace

from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import calculate_topk_aux_acts
from torch import Tensor

from sae_whiten.architectures.auxk import auxk_loss
from sae_whiten.architectures.description import register
from sae_whiten.architectures.losses import ranking_norms
from sae_whiten.architectures.topk import BATCHTOPK, TopKLosses


class MatryoshkaLosses(TopKLosses, MatryoshkaBatchTopKTrainingSAE):
    """The changes of `TopKLosses`, at every level."""

    cfg: MatryoshkaBatchTopKTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def _iterable_decode(
        self, feature_acts: Tensor, include_outer_loss: bool = False
    ) -> Generator[tuple[int, Tensor], None, None]:
        return super()._iterable_decode(self.in_stock_units(feature_acts), include_outer_loss)

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
            W_dec = W_dec / ranking_norms(self)[:, None]
        start = 0
        for width, level_out in self._iterable_decode(feature_acts, include_outer_loss=True):
            level = slice(start, width)
            start = width
            total = total + auxk_loss(
                self.mse_loss_fn,
                (sae_in - level_out).detach(),
                hidden_pre[:, level],
                dead_neuron_mask[level],
                calculate_topk_aux_acts,
                lambda acts, level=level: acts @ W_dec[level],
            )
        return self.cfg.aux_loss_coefficient * total


register(
    replace(
        BATCHTOPK,
        sae_classes=(MatryoshkaBatchTopKTrainingSAE,),
        losses=MatryoshkaLosses,
        required_options=("matryoshka_widths",),
    )
)
