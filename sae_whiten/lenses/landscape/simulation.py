"""The sparsest dictionary in two dimensions, before and after whitening.

After the simulation of Saraswatula & Klindt (arXiv 2511.13981). They give no code; the model here
is the simplest that has all its parts. Two independent, sparse sources: each is active with
probability p and has a Laplacian amplitude, and one is stronger than the other. They are mixed into
two dimensions along unit vectors a_1, a_2 (the features) at an acute angle,

    x = s_1 a_1 + s_2 a_2.

A dictionary of two unit vectors d_1, d_2 at the angles t_1, t_2 represents x exactly, by the code
c = x D^-1, so dictionaries differ only in sparsity. An L1 penalty costs

    cost(t_1, t_2) = E|c_1| + E|c_2| = (g(t_1) + g(t_2)) / |sin(t_2 - t_1)|,   g(t) = E|x x d(t)|,

where x x d is the cross product. The aim is recovery: the mean |correlation| between codes and
sources, matched one to one. It is 1 at the features, in any coordinates. Whitening makes the
features orthogonal, and then the two optima coincide. Without it they differ, the more the smaller
the angle between the features and the less sparse the sources: at a probability of 0.2 and an angle
of 40 degrees they coincide without whitening too.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from sae_whiten.config import WhiteningConfig
from sae_whiten.lenses.options import LandscapeConfig
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.whitening import Whitening

__all__ = ["Landscape", "landscape", "landscapes"]

_N_SAMPLES = 20_000
_N_ANGLES = 360  # of 180 degrees


@dataclass(frozen=True, eq=False)
class Landscape:
    """Sparsity and recovery over the dictionaries of one space; angles are in degrees, in [0, 180).

    Attributes:
        angles: Of either dictionary vector.
        cost: Mean L1 norm of the code, by both angles; infinite where they are equal.
        recovery: Mean |correlation| of codes and sources, in [0, 1], by both angles.
        features: The angles of the two features.
        optimum: The angles of the dictionary of lowest cost.
        misalignment: Mean angle between the dictionary of lowest cost and the features.
        recovery_at_optimum: Recovery by the dictionary of lowest cost.
        condition: Condition number of the covariance.
    """

    angles: Float[np.ndarray, "m"]
    cost: Float[np.ndarray, "m m"]
    recovery: Float[np.ndarray, "m m"]
    features: tuple[float, float]
    optimum: tuple[float, float]
    misalignment: float
    recovery_at_optimum: float
    condition: float


def landscapes(config: LandscapeConfig | None = None) -> tuple[Landscape, Landscape]:
    """The landscapes before and after (ZCA) whitening."""
    config = config or LandscapeConfig()
    rng = np.random.default_rng(config.seed)
    size = (_N_SAMPLES, 2)
    sources = rng.laplace(size=size) * (rng.random(size) < config.activity)
    sources *= (config.ratio, 1.0)
    # such that both optima lie inside the figure, and no feature on an axis
    at = np.deg2rad(70.0 + np.array([-0.5, 0.5]) * config.angle)
    features = np.stack([np.cos(at), np.sin(at)], axis=1)

    statistics = ActivationStatistics(2)
    statistics.update(torch.from_numpy(sources @ features))
    W = Whitening.from_statistics(statistics, WhiteningConfig(kind="zca", eps=0.0)).W.numpy()
    return landscape(sources, features), landscape(sources, features @ W)


def landscape(sources: Float[np.ndarray, "n 2"], features: Float[np.ndarray, "2 2"]) -> Landscape:
    """The landscape of activations `sources @ features`.

    Args:
        sources: Shape (n, 2).
        features: Shape (2, 2), one in each row, of any length.
    """
    angles = np.linspace(0.0, 180.0, _N_ANGLES, endpoint=False)
    directions = _unit(angles)
    x = sources @ features
    g = np.abs(_cross(x[:, None], directions)).mean(axis=0)
    sine = _cross(directions[:, None], directions)  # of t_2 - t_1
    with np.errstate(divide="ignore"):
        cost = (g[:, None] + g) / np.abs(sine)
    cost[np.arange(_N_ANGLES), np.arange(_N_ANGLES)] = np.inf

    # c_1 = (x x d_2) / (d_1 x d_2): up to a factor, which correlations ignore, the first code
    # depends on the second vector alone
    covariance = np.cov(sources.T)
    loadings = _cross(features[:, None], directions)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = np.abs(covariance @ loadings) / np.sqrt(
            covariance.diagonal()[:, None]
            * np.einsum("im,ij,jm->m", loadings, covariance, loadings)
        )
    first, second = correlations
    recovery = np.maximum(first[None] + second[:, None], second[None] + first[:, None]) / 2

    i, j = np.unravel_index(cost.argmin(), cost.shape)
    if i > j:  # the landscape is symmetric
        i, j = j, i
    optimum = (float(angles[i]), float(angles[j]))
    true = np.rad2deg(np.arctan2(features[:, 1], features[:, 0])) % 180
    spectrum = np.linalg.eigvalsh(np.cov(x.T))
    return Landscape(
        angles=angles,
        cost=cost,
        recovery=recovery,
        features=(float(true.min()), float(true.max())),
        optimum=optimum,
        misalignment=min(
            (_between(optimum[0], a) + _between(optimum[1], b)) / 2 for a, b in (true, true[::-1])
        ),
        recovery_at_optimum=float(recovery[i, j]),
        condition=float(spectrum[1] / spectrum[0]),
    )


def _unit(angles: Float[np.ndarray, "m"]) -> Float[np.ndarray, "m 2"]:
    return np.stack([np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))], axis=-1)


def _cross(
    a: Float[np.ndarray, "... 2"], b: Float[np.ndarray, "... 2"]
) -> Float[np.ndarray, "..."]:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _between(a: float, b: float) -> float:
    """Angle between two lines, in degrees."""
    difference = abs(a - b) % 180
    return min(difference, 180 - difference)
