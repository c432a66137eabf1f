"""Show what statistics say: how anisotropic each hook is, and how well it was estimated.

n: activations; excess: too much variance that held-out activations have under the whitening (- in
files of sae-whiten merge, where it is not known);
|mean|/std: norm of the mean over the root of the total variance; condition: of the covariance
without its null directions, which null counts; directions: participation ratio; 90%, 99%: number
of directions that hold so much of the variance; top: share of the largest eigenvalue; outliers: the
dimensions of largest variance, in units of the median.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the inputs and the forms of output."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="STATISTICS",
        help="files, folders (sae-whiten fit), or repos on the Hugging Face hub (user/name)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    parser.add_argument(
        "--plot", type=Path, metavar="DIRECTORY", help="draw the spectra of all hooks there"
    )


def run(args: argparse.Namespace) -> int:
    """Read every file first, then print."""
    from sae_whiten.hub import find_all_statistics
    from sae_whiten.statistics import ActivationStatistics

    files = [file for source in args.sources for file in find_all_statistics(source)]
    statistics = {file: ActivationStatistics.load(file) for file in files}
    rows = {}
    for file, found in statistics.items():
        rows[found.provenance.get("hook_name") or file.stem] = _describe(found)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        _print_table(rows)
    if args.plot is not None:
        from sae_whiten.evaluation.figures import plot_spectra

        spectra = {name: row["eigenvalues"] for name, row in rows.items()}
        for path in plot_spectra(spectra, args.plot):
            print(f"drawn: {path}")
    return 0


def _describe(statistics: Any) -> dict[str, Any]:
    import torch

    from sae_whiten.evaluation.metrics import spectrum_summary

    covariance = statistics.covariance
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0).flip(0)
    summary = spectrum_summary(eigenvalues)
    cumulative = eigenvalues.cumsum(0) / eigenvalues.sum()
    variances = covariance.diagonal()
    order = variances.argsort(descending=True)[:3]
    median = float(variances.median())
    return {
        "n": statistics.n_samples,
        "d_in": statistics.d_in,
        "excess": statistics.provenance.get("inflation"),
        "mean_over_std": float(statistics.mean.norm() / eigenvalues.sum().sqrt()),
        "condition": summary.condition_number_nonnull,
        "null": summary.n_null,
        "participation_ratio": summary.participation_ratio,
        "directions_for_90": int((cumulative < 0.9).sum()) + 1,
        "directions_for_99": int((cumulative < 0.99).sum()) + 1,
        "top_share": summary.top_share,
        "outliers": {int(i): float(variances[i]) / median if median else None for i in order},
        "eigenvalues": eigenvalues.tolist(),
        "provenance": statistics.provenance,
    }


def _print_table(rows: dict[str, dict[str, Any]]) -> None:
    width = max(map(len, rows))
    print(
        f"{'':{width}}{'n':>10}{'d':>6}{'excess':>8}{'|mean|/std':>11}{'condition':>10}{'null':>5}"
        f"{'directions':>11}{'90%':>5}{'99%':>5}{'top':>7}  outliers"
    )
    for name, row in rows.items():
        excess = "-" if row["excess"] is None else f"{row['excess']:.1%}"
        outliers = ", ".join(
            f"{i} ({'-' if ratio is None else f'{ratio:.1f}'})"
            for i, ratio in row["outliers"].items()
        )
        print(
            f"{name:{width}}{row['n']:>10}{row['d_in']:>6}{excess:>8}{row['mean_over_std']:>11.2f}"
            f"{row['condition']:>10.3g}{row['null']:>5}{row['participation_ratio']:>11.1f}"
            f"{row['directions_for_90']:>5}{row['directions_for_99']:>5}{row['top_share']:>7.1%}"
            f"  {outliers}"
        )
