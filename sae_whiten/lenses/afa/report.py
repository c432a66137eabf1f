"""What `sae-whiten afa` writes and prints of its results."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from sae_whiten import __version__
from sae_whiten._atomic import atomic_path
from sae_whiten._redaction import redacted
from sae_whiten.lenses.afa.figure import plot_violins, plot_zf
from sae_whiten.lenses.afa.measure import AFAResult

__all__ = ["table", "write_report"]


def write_report(
    results: Sequence[AFAResult], directory: Path, source: Mapping[str, Any]
) -> list[str]:
    """Write afa.json, with the values of every prompt, and the figures.

    Args:
        results: Of the SAEs.
        directory: Where to write.
        source: Which model and dataset; written to afa.json.

    Returns:
        The names of the files.
    """
    others = ("sae-lens", "transformer-lens", "torch")
    report = {
        **source,
        "n_prompts": len(results[0].rows),
        "versions": {"sae-whiten": __version__, **{name: version(name) for name in others}},
        "saes": [result.to_dict() for result in results],
    }
    with atomic_path(directory / "afa.json") as partial:
        partial.write_text(json.dumps(redacted(report), allow_nan=False) + "\n")
    hooks = [result.context["hook_name"] for result in results]
    # hooks name the layers; SAEs that share a hook need their own names
    labels = hooks if len(set(hooks)) == len(hooks) else [result.name for result in results]
    samples = {label: result.samples for label, result in zip(labels, results, strict=True)}
    names = ["afa.json"]
    for name, plot in (("zf", plot_zf), ("violins", plot_violins)):
        for suffix in (".png", ".pdf"):
            plot(samples, directory / f"{name}{suffix}")
            names.append(f"{name}{suffix}")
    return names


def table(results: Sequence[AFAResult]) -> str:
    """The summary of every SAE, a row each, with notes on values that may mislead."""
    rows, notes = {}, []
    for result in results:
        figures = result.to_dict()["summary"]
        codes = result.samples.code_norm
        bias_share = result.context["bias_norm"] / max(float(codes.mean()), 1e-30)
        rows[result.name] = {
            "prompts": figures["n_samples"],
            "h": result.context["d_sae"],
            "eps-LBO": _number(figures["eps_lbo_mean"], ".2e"),
            "median": _number(figures["eps_lbo_median"], ".2e"),
            "NMSE": _number(figures["nmse_mean"], ".3g"),
            "L0": f"{figures['l0_mean']:.1f}",
            "over": f"{figures['over_activated']:.1%}",
            "under": f"{figures['under_activated']:.1%}",
            **{f"<={band}": f"{share:.1%}" for band, share in figures["in_band"].items()},
            "norms": _number(figures["norms_pearson"], ".3f"),
            "pearson": _number(figures["pearson"], ".3f"),
            "spearman": _number(figures["spearman"], ".3f"),
            "bias": f"{bias_share:.2f}",
        }
        if bias_share > 0.9:
            notes.append(
                f"{result.name}: its codes are little more than the decoder bias, so eps-LBO says "
                "little about its latents"
            )
        if n := figures["n_undefined"]:
            notes.append(
                f"{result.name}: {n} prompts are left out of means and correlations, because their "
                "code is zero and their eps-LBO infinite, or their activation is zero and their "
                "NMSE infinite"
            )
    return "\n".join([pd.DataFrame.from_dict(rows, orient="index").to_string(), *notes])


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
