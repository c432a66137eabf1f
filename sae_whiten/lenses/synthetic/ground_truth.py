"""Scores of a dictionary against the features that generated the data, as functions of tensors.

Cosines between raw vectors are useless on anisotropic activations: all vectors lie near the few
directions of large variance, and even untrained dictionaries score high. So decoders and features
are compared after both are whitened, that is, by the cosine in the metric of the inverse
covariance; and by when they fire, which needs no metric.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sae_whiten.evaluation.stability import mean_max_cosine

__all__ = ["GroundTruthScores", "best_firing_f1", "ground_truth_scores"]


@dataclass(frozen=True)
class GroundTruthScores:
    """How much of the true features a sparse autoencoder found.

    Attributes:
        mcc: Mean correlation coefficient of decoder rows and features, both whitened: see
            `mean_max_cosine`.
        f1: Mean over features of the F1 of the latent that best predicts when the feature fires.
        raw_mcc: As `mcc`, in the space of the activations. A warning, not a score: on anisotropic
            data it is high for random directions too.
    """

    mcc: float
    f1: float
    raw_mcc: float


def best_firing_f1(
    latents: Shaped[Tensor, "n d_sae"], features: Shaped[Tensor, "n_rows n_features"]
) -> Float[Tensor, "n_features"]:
    """For every feature, the F1 of the latent that best predicts when it fires.

    A latent predicts that a feature fires where the latent is not zero; one latent may be the best
    for several features. F1 = 2 TP / (2 TP + FP + FN).

    Args:
        latents: Shape (n, d_sae): activations of the latents, any dtype.
        features: Shape (n, n_features): activations of the features on the same samples.

    Returns:
        Shape (n_features,), float64, in [0, 1]; NaN for features that never fire here.

    Raises:
        ValueError: The numbers of samples differ.
    """
    if len(latents) != len(features):
        raise ValueError(f"{len(latents)} rows of latents against {len(features)} of features")
    active, fires = (latents != 0).float(), (features != 0).float()
    # counts below 2^24 are exact in float32
    both = torch.zeros(fires.shape[1], active.shape[1], dtype=torch.float64, device=latents.device)
    for rows in torch.arange(len(active), device=latents.device).split(1 << 16):
        both += (fires[rows].T @ active[rows]).double()
    n_fires = (features != 0).sum(0).double()
    n_either = n_fires[:, None] + (latents != 0).sum(0).double()
    best = (2 * both / n_either.clamp(min=1)).amax(dim=1)
    return torch.where(n_fires > 0, best, torch.nan)


def ground_truth_scores(
    W_dec: Float[Tensor, "d_sae d_in"],
    true_directions: Float[Tensor, "n_features d"],
    latents: Shaped[Tensor, "n d_sae"],
    true_activations: Shaped[Tensor, "n n_features"],
    W: Float[Tensor, "d d"],
) -> GroundTruthScores:
    """All scores of one sparse autoencoder, given in the space of the activations.

    Args:
        W_dec: Shape (d_sae, d), its decoder, folded.
        true_directions: Shape (n_features, d): what each feature adds to the activations.
        latents: Shape (n, d_sae): its latents on some activations.
        true_activations: Shape (n, n_features): the features on the same.
        W: Shape (d, d): whitening matrix of the activations.

    Raises:
        ValueError: Shapes do not fit, or no feature ever fires.
    """
    f1 = best_firing_f1(latents, true_activations)
    f1 = f1[~f1.isnan()]
    if len(f1) == 0:
        raise ValueError(f"no feature fires in {len(latents)} samples: there is nothing to score")
    return GroundTruthScores(
        mcc=mean_max_cosine(W_dec, true_directions, W),
        f1=float(f1.mean()),
        raw_mcc=mean_max_cosine(W_dec, true_directions),
    )
