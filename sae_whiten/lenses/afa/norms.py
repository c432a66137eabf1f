"""Approximate feature activation: how the norm of an input bounds that of its sparse code.

After Lee et al., *Evaluating and Designing Sparse Autoencoders by Approximating
Quasi-Orthogonality* (arXiv 2503.24277). If z is a combination f of h unit vectors whose pairwise
inner products are at most eps in absolute value, then

    | |z|^2 - |f|^2 | <= eps (h - 1) |f|^2.

An SAE's code in those terms is f~ = [f_i |d_i|, ..., |b_dec|]: coefficients of unit decoder rows,
with the bias as a latent that is always active. eps-LBO is the smallest eps for which the
inequality holds for a given input: a lower bound of the quasi-orthogonality that the SAE assumes. h
is the number of latents and does not count the bias, as in the paper's figures; if it did, eps-LBO
would be smaller by the factor (h - 1) / h.

Everything is float64, on the CPU.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "BANDS",
    "AFASamples",
    "Correlations",
    "band_slopes",
    "code_norm",
    "correlations",
    "eps_lbo",
    "nmse",
    "summary",
]

BANDS = (0.25, 0.5, 1.0)
"""Values of e = eps (h - 1) whose bands the ZF plot shows."""


def code_norm(
    latents: Float[Tensor, "n d_sae"], scale: Float[Tensor, "d_sae"], bias_norm: float = 0.0
) -> Float[Tensor, "n"]:
    """Norm of sparse codes, |f~| = sqrt(sum_i (f_i scale_i)^2 + bias_norm^2).

    Args:
        latents: Shape (n, d_sae), any floating dtype.
        scale: Shape (d_sae,): norm of what the decoder adds for a latent of 1. That is the norm of
            its row, or 1 for SAEs that decode by unit rows.
        bias_norm: Norm of what the decoder adds to every reconstruction.
    """
    scaled = latents.cpu().double() * scale.cpu().double()
    return torch.hypot(
        torch.linalg.vector_norm(scaled, dim=1), torch.tensor(bias_norm, dtype=torch.float64)
    )


def eps_lbo(
    z_norm: Float[Tensor, "n"], code_norm: Float[Tensor, "n"], n_latents: int
) -> Float[Tensor, "n"]:
    """Smallest eps consistent with each sample, | |z|^2 - |f~|^2 | / ((h - 1) |f~|^2).

    Args:
        z_norm: Shape (n,): norms |z| of inputs as the encoder gets them.
        code_norm: Shape (n,): norms |f~| of their codes.
        n_latents: h, at least 2.

    Returns:
        Shape (n,), at least 0. Infinite where the code is zero and the input is not: no eps is
        consistent with that; 0 where both are zero.

    Raises:
        ValueError: There are fewer than two latents.
    """
    if n_latents < 2:
        raise ValueError(f"n_latents={n_latents}: eps-LBO needs at least two latents")
    return _excess(z_norm, code_norm) / (n_latents - 1)


def _excess(z_norm: Float[Tensor, "n"], code_norm: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """| |z|^2 / |f~|^2 - 1 |, which is eps-LBO times h - 1."""
    z_norm, code_norm = z_norm.cpu().double(), code_norm.cpu().double()
    # 0 / 0 counts as 1. The factors keep the digits of ratios close to 1
    ratio = torch.where(z_norm == code_norm, 1.0, z_norm / code_norm)
    return ((ratio - 1) * (ratio + 1)).abs()


def nmse(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:
    """Normalised squared error of each sample, |x - x_hat|^2 / |x|^2.

    The definition of the paper's figures. Unlike explained variance it is not centred: a mean far
    from the origin makes it small.

    Args:
        x: Activations, shape (n, d), any floating dtype.
        x_hat: Their reconstructions, of the same shape.

    Returns:
        Shape (n,), at least 0. For an x of zeros 0 if x_hat is zero too, else infinite.
    """
    x, x_hat = x.cpu().double(), x_hat.cpu().double()
    error = torch.linalg.vector_norm(x - x_hat, dim=1)
    ratio = error / torch.linalg.vector_norm(x, dim=1)
    return torch.where(error == 0, 0.0, ratio).square()


class Correlations(NamedTuple):
    """Correlation coefficients, in [-1, 1]; None if undefined.

    Attributes:
        pearson: Of the values.
        spearman: Of their ranks.
    """

    pearson: float | None
    spearman: float | None


def correlations(a: Float[Tensor, "n"], b: Float[Tensor, "n"]) -> Correlations:
    """Pearson's and Spearman's correlation over pairs of finite values.

    Returns:
        None for both if there are fewer than three such pairs, or one variable is constant.
    """
    from scipy.stats import pearsonr, spearmanr

    finite = a.isfinite() & b.isfinite()
    x, y = (values[finite].cpu().double().numpy() for values in (a, b))
    if len(x) < 3 or x.min() == x.max() or y.min() == y.max():
        return Correlations(None, None)
    coefficients: list[Any] = [pearsonr(x, y), spearmanr(x, y)]
    results = [float(coefficient.statistic) for coefficient in coefficients]
    # not finite if the values differ by less than their rounding
    return Correlations(*(value if math.isfinite(value) else None for value in results))


def band_slopes(e: float) -> tuple[float, float]:
    """Slopes between which |f~| / |z| lies for eps (h - 1) <= e: 1 / sqrt(1 + e), 1 / sqrt(1 - e).

    Args:
        e: At least 0. From 1 on the upper slope is infinite: no code is too large.

    Raises:
        ValueError: e is negative or not a number.
    """
    if not e >= 0:
        raise ValueError(f"e={e}: must be at least 0")
    return 1 / math.sqrt(1 + e), 1 / math.sqrt(1 - e) if e < 1 else math.inf


@dataclass(frozen=True, eq=False)
class AFASamples:
    """Norms and errors of one SAE on some inputs.

    Attributes:
        z_norm: Shape (n,): norms of the inputs as the encoder gets them, that is, after the SAE's
            own normalisation if it has one.
        code_norm: Shape (n,): norms of their codes, with the bias.
        nmse: Shape (n,): see `nmse`.
        l0: Shape (n,): number of active latents, without the bias.
        n_latents: h.
    """

    z_norm: Float[Tensor, "n"]
    code_norm: Float[Tensor, "n"]
    nmse: Float[Tensor, "n"]
    l0: Float[Tensor, "n"]
    n_latents: int

    @property
    def eps_lbo(self) -> Float[Tensor, "n"]:
        """eps-LBO of each input, shape (n,); see `eps_lbo`."""
        return eps_lbo(self.z_norm, self.code_norm, self.n_latents)


def summary(samples: AFASamples) -> dict[str, Any]:
    """Figures of an SAE over its samples, ready for JSON: None where one is not defined.

    - `n_samples`, and `n_undefined`: how many of them have an infinite eps-LBO or NMSE, and are in
      no mean, median or correlation.
    - `eps_lbo_mean`, `eps_lbo_median`, `nmse_mean`, `nmse_median`, `l0_mean`.
    - `over_activated`, `under_activated`: shares of samples with |f~| > |z| and |f~| < |z|.
    - `in_band`: by the values e of `BANDS`, shares of samples with eps-LBO (h - 1) <= e.
    - `pearson`, `spearman`: of NMSE and eps-LBO; `norms_pearson`: of |z| and |f~|.

    Args:
        samples: At least one.

    Raises:
        ValueError: There are no samples.
    """
    n = len(samples.z_norm)
    if n == 0:
        raise ValueError("no samples to summarise")
    eps = samples.eps_lbo
    defined = eps.isfinite() & samples.nmse.isfinite()
    excess = _excess(samples.z_norm, samples.code_norm)
    figures: dict[str, Any] = {"n_samples": n, "n_undefined": n - int(defined.sum())}
    for name, values in (("eps_lbo", eps), ("nmse", samples.nmse)):
        figures[f"{name}_mean"] = float(values[defined].mean()) if defined.any() else None
        # numpy's: torch's median of an even number is the lower of the two in the middle
        median = values[defined].quantile(0.5) if defined.any() else None
        figures[f"{name}_median"] = None if median is None else float(median)
    figures["l0_mean"] = float(samples.l0.mean())
    figures["over_activated"] = float((samples.code_norm > samples.z_norm).double().mean())
    figures["under_activated"] = float((samples.code_norm < samples.z_norm).double().mean())
    figures["in_band"] = {f"{e:g}": float((excess <= e).double().mean()) for e in BANDS}
    norms = correlations(samples.z_norm, samples.code_norm)
    figures["norms_pearson"] = norms.pearson
    return {**figures, **correlations(samples.nmse, eps)._asdict()}
