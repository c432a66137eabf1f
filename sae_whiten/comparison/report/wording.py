"""How a report writes numbers, p-values and the names of groups."""

import math
import re
from collections.abc import Sequence

from sae_whiten.comparison.paired import PairedDifference
from sae_whiten.comparison.report.document import code
from sae_whiten.comparison.summary import Group, Spread, Summary
from sae_whiten.evaluation.catalogue import COUNTS, Metric

__all__ = [
    "cells_of",
    "decimals_of",
    "file_name",
    "group_name",
    "listed",
    "mean_and_sd",
    "number",
    "p_cell",
    "p_text",
    "single_value",
    "sparsity_text",
]


def group_name(summary: Summary, group: Group) -> str:
    """Architecture and sparsity, and the hook if there are several."""
    several = len({g.hook_name for g in summary.groups}) > 1
    hook = f", {code(group.hook_name)}" if several else ""
    return f"{code(group.architecture)}{hook}, {sparsity_text(group)}"


def sparsity_text(group: Group) -> str:
    """`k = 32`, `L0 = 32` or, if nothing sets the sparsity, `L0 not set`."""
    if group.sparsity is None:
        return "L0 not set"
    return f"{'L0' if group.interpolated else 'k'} = {group.sparsity:g}"


def number(value: float, decimals: int) -> str:
    """A number as text, a dash for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:.{decimals}f}" if math.isfinite(value) else str(value)


def single_value(key: str, value: float, decimals: int, d_sae: int | None = None) -> str:
    """A metric of one SAE. A number of latents is whole: `23`, or `23 of 2048` with `d_sae`."""
    if key not in COUNTS or math.isnan(value):
        return number(value, decimals)
    return f"{value:.0f}" + ("" if d_sae is None else f" of {d_sae}")


def mean_and_sd(values: Spread, decimals: int, n_expected: int) -> str:
    """`0.80 ± 0.02`, and how many values there are if fewer than `n_expected`."""
    cell = number(values.mean, decimals)
    if values.n and not math.isnan(values.sd):
        cell += f" ± {values.sd:.{decimals}f}"
    return cell + (f" ({values.n} of {n_expected})" if 0 < values.n < n_expected else "")


def cells_of(spreads: Sequence[Spread], metric: Metric | None, n_expected: int) -> list[str]:
    """Means and standard deviations of a column, with equally many decimals."""
    decimals = _column_decimals(3 if metric is None else metric.decimals, [s.sd for s in spreads])
    return [mean_and_sd(values, decimals, n_expected) for values in spreads]


def _column_decimals(fewest: int, sds: Sequence[float]) -> int:
    """Decimals that show two digits of the median deviation, at most two more than `fewest`."""
    known = sorted(sd for sd in sds if sd > 0)
    if not known:
        return fewest
    wanted = 1 - math.floor(math.log10(known[len(known) // 2]))
    return min(max(wanted, fewest), fewest + 2)


def decimals_of(difference: PairedDifference, metric: Metric) -> int:
    """Decimals that show two digits of half the confidence interval."""
    return _column_decimals(metric.decimals, [(difference.high - difference.low) / 2])


def p_text(p: float) -> str:
    """`p = 0.023`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def p_cell(p: float) -> str:
    """`0.023`, or a dash for NaN."""
    return "–" if math.isnan(p) else p_text(p).removeprefix("p ").removeprefix("= ")


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), *parts[-1:]] if len(parts) > 1 else parts)


def file_name(name: str) -> str:
    """The name without characters that a file name may not have."""
    return re.sub(r"[^\w.-]+", "_", name)
