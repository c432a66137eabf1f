"""Show statistics: how anisotropic the activations of each hook are, and how well estimated.

n: activations; excess: excess variance of held-out activations under the whitening (-: unknown, as
in files of sae-whiten merge); |mean|/std: norm of the mean over the root of the total variance;
condition: condition number of the covariance without null directions; null: number of null
directions; directions: participation ratio; 90%, 99%: number of directions that hold this share of
the variance; top: share of the largest eigenvalue; outliers: dimensions of largest variance, in
units of the median.

The second table describes the whitening that training would derive with the given --whitening.*.
condition: condition number of the regularised covariance; gain: gain of the most amplified
direction, relative to a direction of average variance; damped: directions with less than half of
unit variance after whitening; shrinkage: its intensity; oas: the intensity that
--whitening.shrinkage oas would choose. With --held-out, the covariance C of the whitened held-out
activations, without null directions: mean, min and max of its eigenvalues (1 at best), and its
distance |C - I|/sqrt(d) from the identity.

The third table is a forecast: the activations nearest to yours in |mean|/std and participation
ratio, among those of one experiment (TopK, k=32, 2048 latents, 2 million tokens of MiniLM). There
an invertible map made activations more and more anisotropic; they are named by the decades that
their spectrum spans and the size of their mean in standard deviations. distance: to them, in powers
of ten; above 0.5, nothing similar was measured. recommended: the simplest setting that no other
improves on, by AUC of probes or else by dead latents.

The last table is what became of the SAEs there, under each setting. no whitening: SAELens'
expected_average_only_in. map undone: explained variance of MiniLM's own activations, in which
directions that the map made small count as before. The recommendation does not look at it: if
features of small variance matter to you, do. To measure on your own model, use sae-whiten compare.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_whiten.cli._whitening_flags import add_whitening_arguments, given_fields

if TYPE_CHECKING:
    from sae_whiten.config import WhiteningConfig
    from sae_whiten.statistics import ActivationStatistics

EPILOG = """\
example:
  sae-whiten inspect gpt2-stats --held-out gpt2-stats-of-other-text --plot figures
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the inputs, the output formats, and the flags that change the spectrum."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="STATISTICS",
        help="files, folders (sae-whiten fit), or repos on the Hugging Face hub (user/name)",
    )
    parser.add_argument(
        "--held-out",
        metavar="STATISTICS",
        help="statistics of the same hooks from other data, to test the whitening on",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    parser.add_argument(
        "--plot", type=Path, metavar="DIRECTORY", help="draw the spectra of all hooks there"
    )
    add_whitening_arguments(parser, ("eps", "eps_mode", "shrinkage"))


def run(args: argparse.Namespace) -> int:
    """Read every file first, then print."""
    from tqdm import tqdm

    from sae_whiten.config import WhiteningConfig
    from sae_whiten.estimation.inspection import describe_statistics

    config = WhiteningConfig(**given_fields(args))
    statistics = _read(args.sources)
    held_out = {} if args.held_out is None else _read([args.held_out])
    if args.held_out is not None and not set(held_out) & set(statistics):
        raise ValueError(
            f"{args.held_out} holds none of these hooks, only {', '.join(sorted(held_out))}"
        )
    rows = {
        name: describe_statistics(hook_statistics, config, held_out.get(name))
        for name, hook_statistics in tqdm(
            statistics.items(), desc="Inspecting", unit="hook", leave=False
        )
    }
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        _print_statistics(rows)
        _print_whitening(rows, config)
        _print_forecast(rows)
    if args.plot is not None:
        from sae_whiten.estimation.figures import plot_spectra

        for path in plot_spectra(
            {name: row["eigenvalues"] for name, row in rows.items()},
            args.plot,
            regularised={name: row["regularised"]["eigenvalues"] for name, row in rows.items()},
            held_out={
                name: (row["held_out"]["eigenvalues"], row["held_out"]["whitened_eigenvalues"])
                for name, row in rows.items()
                if row["held_out"] is not None
            },
        ):
            print(f"drawn: {path}")
    return 0


def _read(sources: Iterable[str]) -> "dict[str, ActivationStatistics]":
    from sae_whiten.estimation.folders import find_all_statistics
    from sae_whiten.statistics import ActivationStatistics

    by_name = {}
    for source in sources:
        for file in find_all_statistics(source):
            statistics = ActivationStatistics.load(file)
            name = statistics.provenance.get("hook_name") or file.stem
            if statistics.n_samples < 2:
                raise ValueError(
                    f"{file} holds no covariance: it is of {statistics.n_samples} activations"
                )
            # if two sources have the same hook, the second is named by its file
            by_name[name if name not in by_name else str(file)] = statistics
    return by_name


def _print_statistics(rows: dict[str, dict[str, Any]]) -> None:
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


def _print_whitening(rows: dict[str, dict[str, Any]], config: "WhiteningConfig") -> None:
    width = max(map(len, rows))
    shrinkage = "none" if config.shrinkage is None else config.shrinkage
    print(f"\nwhitened with eps {config.eps:g} ({config.eps_mode}), shrinkage {shrinkage}")
    held_out = any(row["held_out"] is not None for row in rows.values())
    print(
        f"{'':{width}}{'condition':>10}{'gain':>8}{'damped':>8}{'shrinkage':>10}{'oas':>9}"
        + f"{'held-out n':>12}{'mean':>8}{'min':>8}{'max':>8}{'distance':>10}" * held_out
    )
    for name, row in rows.items():
        regularised, held = row["regularised"], row["held_out"]
        print(
            f"{name:{width}}{regularised['condition_number']:>10.3g}{regularised['largest_gain']:>8.3g}"
            f"{regularised['n_damped']:>8}{regularised['shrinkage']:>10.3g}{regularised['oas']:>9.2g}",
            end="",
        )
        if held is not None:
            print(
                f"{held['n']:>12}{held['mean']:>8.3f}{held['smallest']:>8.3f}"
                f"{held['largest']:>8.3f}{held['distance']:>10.3f}",
                end="",
            )
        print()


def _print_forecast(rows: dict[str, dict[str, Any]]) -> None:
    from sae_whiten.estimation.forecast import LIMITS, SETTINGS, dose_in_words

    width = max(map(len, rows))
    print("\nforecast: the nearest activations on which SAEs were measured")
    print(f"{'':{width}}  {'nearest':<24}{'distance':>8}  recommended")
    forecasts = {name: row["forecast"] for name, row in rows.items()}
    for name, forecast in forecasts.items():
        print(
            f"{name:{width}}  {dose_in_words(forecast['dose']):<24}{forecast['distance']:>8.2f}"
            f"  {forecast['advice']}"
        )
    outcomes = {f["dose"]: f["outcomes"] for f in forecasts.values() if f["known"]}
    width = max(map(len, SETTINGS.values()))
    for dose, settings in outcomes.items():
        print(
            f"\n{f'SAEs at {dose_in_words(dose)}':{width}}{'seeds':>7}{'dead latents':>14}"
            f"{'expl. variance':>16}{'map undone':>12}{'AUC of probes':>15}"
        )
        for name, found in settings.items():
            undone = found["explained_variance_undone"]
            print(
                f"{SETTINGS[name]:{width}}{found['seeds']:>7}{found['dead']:>14.1%}"
                f"{found['explained_variance']:>16.3f}"
                f"{'below 0' if undone < 0 else f'{undone:.3f}':>12}{found['auc']:>15.3f}"
            )
    print(f"\n{LIMITS}")
