"""AuxK: dead latents are revived by what the living leave over. Gao et al. 2024, appendix A.2."""

from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["dead_latents_loss"]


def dead_latents_loss(
    metric: Callable[[Tensor, Tensor], Tensor],
    residual: Float[Tensor, "batch d_in"],
    hidden_pre: Float[Tensor, "batch d_sae"],
    dead: Bool[Tensor, "d_sae"],
    select: Callable[..., Tensor],
    decode: Callable[[Tensor], Tensor],
) -> Float[Tensor, ""]:
    """Error of the dead latents' reconstruction of what the living leave over.

    Args:
        metric: From a reconstruction and its target, shape (batch, d_in) each, the contributions to
            the squared error, of that shape.
        residual: Shape (batch, d_in).
        hidden_pre: Shape (batch, d_sae), pre-activations of all latents.
        dead: Shape (d_sae,), whether a latent is dead.
        select: Latents to reconstruct with, called with the keyword arguments of SAELens'
            `calculate_topk_aux_acts`: k_aux, hidden_pre, dead_neuron_mask.
        decode: From latents, shape (batch, d_sae), to shape (batch, d_in), without a bias.

    Returns:
        Scalar: the squared error, summed over d_in and averaged over the batch; 0 without dead
        latents.
    """
    n_dead = int(dead.sum())
    if n_dead == 0:
        return residual.new_tensor(0.0)
    k_aux = residual.shape[-1] // 2
    acts = select(k_aux=min(k_aux, n_dead), hidden_pre=hidden_pre, dead_neuron_mask=dead)
    # fewer dead latents than k_aux: a loss in proportion
    share = min(n_dead / k_aux, 1.0)
    return share * metric(decode(acts), residual).sum(dim=-1).mean()
