"""AuxK: dead latents learn to reconstruct the error of the other latents.

Gao et al. 2024, *Scaling and evaluating sparse autoencoders* (arXiv 2406.04093), appendix A.2.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["AuxKSelector", "auxk_loss"]


@runtime_checkable
class AuxKSelector(Protocol):
    """SAELens' `calculate_topk_aux_acts`, or another choice among dead latents."""

    def __call__(
        self,
        k_aux: int,
        hidden_pre: Float[Tensor, "batch d_sae"],
        dead_neuron_mask: Bool[Tensor, "d_sae"],
    ) -> Float[Tensor, "batch d_sae"]:
        """The pre-activations of the chosen latents, 0 elsewhere.

        Args:
            k_aux: Number of latents to choose for each input.
            hidden_pre: Pre-activations of all latents.
            dead_neuron_mask: Whether a latent is dead; only these are chosen.
        """
        ...


def auxk_loss(
    metric: Callable[[Tensor, Tensor], Tensor],
    residual: Float[Tensor, "batch d_in"],
    hidden_pre: Float[Tensor, "batch d_sae"],
    dead: Bool[Tensor, "d_sae"],
    select: AuxKSelector,
    decode: Callable[[Tensor], Tensor],
) -> Float[Tensor, ""]:
    """Error of reconstructing the residual from dead latents.

    Examples:
        >>> import torch
        >>> from sae_lens.saes.sae import mse_loss
        >>> from sae_lens.saes.topk_sae import calculate_topk_aux_acts
        >>> residual, hidden_pre = torch.ones(5, 4), torch.ones(5, 8)
        >>> dead = torch.arange(8) < 2  # as many as k_aux = d_in / 2
        >>> W_dec = torch.full((8, 4), 0.25)
        >>> auxk_loss(
        ...     mse_loss, residual, hidden_pre, dead, calculate_topk_aux_acts, lambda f: f @ W_dec
        ... )
        tensor(1.)

    Args:
        metric: Maps a reconstruction and its target to elementwise contributions to the squared
            error. All have shape (batch, d_in).
        residual: The activations minus the reconstruction.
        hidden_pre: Pre-activations of all latents.
        dead: Whether a latent is dead.
        select: Chooses the latents that reconstruct the residual.
        decode: Maps latents, shape (batch, d_sae), to shape (batch, d_in), without a bias.

    Returns:
        The squared error, summed over d_in and averaged over the batch; 0 without dead latents.
    """
    n_dead = int(dead.sum())
    if n_dead == 0:
        return residual.new_tensor(0.0)
    k_aux = residual.shape[-1] // 2
    acts = select(k_aux=min(k_aux, n_dead), hidden_pre=hidden_pre, dead_neuron_mask=dead)
    # with fewer dead latents than k_aux, the loss is smaller in proportion
    share = min(n_dead / k_aux, 1.0)
    return share * metric(decode(acts), residual).sum(dim=-1).mean()
