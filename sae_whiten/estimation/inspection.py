"""Figures that describe activation statistics and the whitening derived from them."""

from dataclasses import asdict, replace
from typing import Any

import torch

from sae_whiten.config import WhiteningConfig
from sae_whiten.estimation.forecast import forecast
from sae_whiten.estimation.spectrum import (
    directions_for_share,
    null_directions,
    regularisation_summary,
    spectrum_summary,
    whitened_spectrum,
    whiteness_summary,
)
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.whitening import Whitening, oas_shrinkage

__all__ = ["describe_statistics"]

_N_OUTLIERS = 3


def describe_statistics(
    statistics: ActivationStatistics,
    config: WhiteningConfig | None = None,
    held_out: ActivationStatistics | None = None,
) -> dict[str, Any]:
    """Figures of one hook, as values that JSON can hold.

    Args:
        statistics: Of the activations.
        config: How they would be whitened; the default configuration if None. Only eps, eps_mode
            and shrinkage matter, which change the spectrum.
        held_out: Statistics of other activations of the same hook, to test the whitening on.

    Returns:
        Figures of the covariance (`SpectrumSummary`; directions_for_90 and _99; outliers: the
        dimensions of largest variance, in units of the median), and under

        - "regularised": `RegularisationSummary`, the intensity of shrinkage, the intensity that OAS
          would choose, and the regularised eigenvalues;
        - "forecast": results of SAEs on activations that are about as anisotropic,
          `Forecast.to_dict()`;
        - "held_out": None, or the number of held-out activations, `WhitenessSummary` over the
          directions that are not null, and eigenvalues before and after whitening.

        All eigenvalues are in descending order, except the regularised ones, which are in the order
        of the eigenvalues that they replace.

    Raises:
        ValueError: There are fewer than two samples or no variance, or the held-out statistics are
            of another width, or are the same.
    """
    # with pca the columns of W are directions; the spectrum is that of zca too
    config = replace(config or WhiteningConfig(), kind="pca", strength=1.0)
    whitening = Whitening.from_statistics(statistics, config)
    eigenvalues = whitening.covariance_eigenvalues.flip(0)
    regularised = whitening.eigenvalues.flip(0)
    summary = spectrum_summary(eigenvalues)
    mean_over_std = float(statistics.mean.norm() / eigenvalues.sum().sqrt())
    n, variances = statistics.n_samples, statistics.covariance.diagonal()
    largest = variances.argsort(descending=True)[:_N_OUTLIERS]
    # torch's median of an even number is the lower of the two in the middle
    median = float(variances.quantile(0.5))
    return {
        "n": n,
        "d_in": statistics.d_in,
        "excess": statistics.provenance.get("inflation"),
        "mean_over_std": mean_over_std,
        "condition": summary.condition_number_nonnull,
        "null": summary.n_null,
        "participation_ratio": summary.participation_ratio,
        "directions_for_90": directions_for_share(eigenvalues, 0.9),
        "directions_for_99": directions_for_share(eigenvalues, 0.99),
        "top_share": summary.top_share,
        "outliers": {int(i): float(variances[i]) / median if median else None for i in largest},
        "eigenvalues": eigenvalues.tolist(),
        "regularised": {
            **asdict(regularisation_summary(eigenvalues, regularised)),
            "shrinkage": whitening.shrinkage,
            "oas": oas_shrinkage(eigenvalues * ((n - 1) / n), n),
            "eigenvalues": regularised.tolist(),
        },
        "forecast": forecast(
            mean_over_std, summary.participation_ratio / statistics.d_in
        ).to_dict(),
        "held_out": None if held_out is None else _held_out(statistics, held_out, whitening),
        "provenance": statistics.provenance,
    }


def _held_out(
    statistics: ActivationStatistics, held_out: ActivationStatistics, whitening: Whitening
) -> dict[str, Any]:
    if held_out.d_in != statistics.d_in:
        raise ValueError(
            f"the held-out statistics are of width {held_out.d_in}, the others of width "
            f"{statistics.d_in}"
        )
    if held_out.digest == statistics.digest:
        raise ValueError("the held-out statistics are the same as those to be tested")
    kept = ~null_directions(whitening.covariance_eigenvalues)
    covariance = held_out.covariance
    after = whitened_spectrum(whitening.W[:, kept], covariance)
    return {
        "n": held_out.n_samples,
        **asdict(whiteness_summary(after)),
        "eigenvalues": torch.linalg.eigvalsh(covariance).clamp(min=0).flip(0).tolist(),
        "whitened_eigenvalues": after.flip(0).tolist(),
    }
