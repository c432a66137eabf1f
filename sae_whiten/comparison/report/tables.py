"""The tables of a comparison."""

import math
import statistics
from collections.abc import Mapping, Sequence

from sae_whiten.comparison.paired import PairedDifference
from sae_whiten.comparison.report.document import Table, code
from sae_whiten.comparison.report.wording import (
    cells_of,
    decimals_of,
    number,
    p_text,
    sparsity_text,
)
from sae_whiten.comparison.summary import (
    BASELINES,
    TESTED_METRICS,
    Frame,
    Group,
    Summary,
    spread,
)
from sae_whiten.evaluation.catalogue import (
    OF_SEVERAL_SEEDS,
    SAE_PROBES_AUC_AT,
    SCR_AT,
    SCR_DENOMINATOR,
    SPARSE_PROBING_AT,
    TPP_AT,
    Metric,
    name_of,
)

__all__ = [
    "MISLEADING",
    "PROBING",
    "WHY_MISLEADING",
    "differences_table",
    "learning_rate_table",
    "matched_table",
    "means_table",
    "other_metrics_table",
    "smallest_differences",
]

PROBING = (SPARSE_PROBING_AT[1], *SAE_PROBES_AUC_AT.values(), SCR_AT[20], TPP_AT[20])
"""Metrics of labelled texts. Which of them are measured is an option."""

MISLEADING = (SCR_AT[20], SCR_DENOMINATOR, TPP_AT[20])
"""Metrics that fail tests of what they are for; measured only on request."""
WHY_MISLEADING = (
    "Conclude nothing from TPP and SCR. Both fail tests of what they are for: TPP falls the longer "
    "an SAE trains, and SCR is negatively correlated with the recovery of known features (Chanin, "
    "arXiv 2605.18229). They are shown because they were requested."
)

_TESTS = {
    "t": ("paired t-test", ""),
    "wilcoxon": ("Wilcoxon's signed-rank test", " (W)"),
    "bootstrap": ("hierarchical bootstrap over seeds and tasks", " (B)"),
}
"""Name and mark in tables."""


def learning_rate_table(
    scores_of: Mapping[str, Mapping[str, Mapping[str, float | None]]],
) -> Table:
    """Scores by architecture, condition and learning rate."""
    rows = []
    rates: list[str] = []
    for architecture, by_condition in scores_of.items():
        for condition, scores in by_condition.items():
            rates = list(scores)
            known = [score for score in scores.values() if score is not None]
            cells = [
                f"**{cell}**" if score is not None and score == max(known) else cell
                for score in scores.values()
                for cell in [number(math.nan if score is None else score, 4)]
            ]
            rows.append([f"{code(architecture)}, {code(condition)}", *cells])
    caption = (
        "Explained variance of held-out activations in the space of the loss, after an eighth of "
        "the training with the first seed (–: no SAE near the wanted L0). Bold: the best rate, at "
        "which all SAEs of the condition are trained."
    )
    return Table(["", *rates], rows, caption)


def means_table(group: Group, shown: Sequence[Metric]) -> Table:
    """Means over seeds: a row per condition, a column per metric."""
    columns = {"condition": [code(name) for name in group.conditions]}
    n, any_bold = len(group.seeds), False
    for metric in shown:
        best = _significantly_best(group, metric)
        any_bold |= best is not None
        cells = cells_of([group.spread(name, metric.key) for name in group.conditions], metric, n)
        columns[metric.name] = [
            "outside the sweep"
            if group.is_outside(name)
            else f"**{cell}**"
            if name == best
            else cell
            for name, cell in zip(group.conditions, cells, strict=True)
        ]
    caption = "One seed." if n == 1 else f"Mean ± standard deviation over {n} seeds."
    if any(metric.key in OF_SEVERAL_SEEDS for metric in shown):
        caption += " Stability has no deviation: its values for two seeds are of the same pair."
    if group.interpolated:
        caption += (
            f" Every seed's sweep was interpolated at {sparsity_text(group)}, linear in log L0."
        )
    if any(metric in MISLEADING for metric in shown):
        caption += f" {WHY_MISLEADING}"
    if any_bold:
        caption += (
            f" Bold: the best of its column, if it differs significantly from {code(BASELINES[0])} "
            "(the baseline itself: from all others)."
        )
    return _table(columns, caption)


def matched_table(group: Group, shown: Sequence[Metric]) -> Table:
    """The architecture of the group beside the others at its L0, condition by condition."""
    rows: dict[tuple[str, str], Frame] = {}
    for condition in group.conditions:
        rows[condition, group.architecture] = group.values.loc[condition]
        if condition in group.matched.index.unique("condition"):
            others = group.matched.loc[condition].groupby("architecture", sort=False)
            rows |= {(condition, name): values for name, values in others}
    columns = {
        "condition": [code(condition) for condition, _ in rows],
        "architecture": [code(architecture) for _, architecture in rows],
    }
    for metric in shown:
        spreads = [spread(values[metric.key], metric.key) for values in rows.values()]
        cells = cells_of(spreads, metric, len(group.seeds))
        columns[metric.name] = [
            "outside the sweep" if values.isna().to_numpy().all() else cell
            for values, cell in zip(rows.values(), cells, strict=True)
        ]
    caption = (
        f"Other architectures are interpolated for every seed, linear in log L0, at the L0 that "
        f"{code(group.architecture)} reached under the same condition. Nothing is extrapolated. "
        "Differences between architectures are not tested."
    )
    return _table(columns, caption)


def _significantly_best(group: Group, metric: Metric) -> str | None:
    """The best condition, if it differs significantly from the baseline.

    If the baseline itself is best: if all others differ significantly from it.
    """
    means = {name: group.spread(name, metric.key).mean for name in group.conditions}
    means = {name: mean for name, mean in means.items() if not math.isnan(mean)}
    if not metric.better or not means:
        return None
    best = max(means, key=lambda name: means[name] * metric.better)
    baseline = BASELINES[0]
    rivals = [name for name in means if name != baseline] if best == baseline else [best]
    against = [group.differences.get((name, baseline), {}).get(metric.key) for name in rivals]
    if not against or not all(d is not None and d.significant for d in against):
        return None
    return best


def differences_table(group: Group, baseline: str) -> Table:
    """Differences of all conditions from a baseline, with intervals and p-values."""
    by_condition = {pair[0]: d for pair, d in group.differences.items() if pair[1] == baseline}
    shown = [m for m in TESTED_METRICS if any(m.key in d for d in by_condition.values())]
    tests = {d.test for by_metric in by_condition.values() for d in by_metric.values()} - {"none"}
    rows = []
    for name, by_metric in by_condition.items():
        cells = [code(name)]
        for metric in shown:
            difference = by_metric.get(metric.key)
            if difference is None:
                cells.append("–")
                continue
            mark = _TESTS[difference.test][1] if len(tests) > 1 and difference.test in tests else ""
            cells.append(_difference_cell(difference, metric) + mark)
        rows.append(cells)
    caption = f"Condition minus {code(baseline)}"
    if tests:
        caption += ", 95% confidence interval, p adjusted by Holm's method; significant in bold"
        names = [
            f"{mark.strip()} {name}".strip() for t, (name, mark) in _TESTS.items() if t in tests
        ]
        caption += (
            ". Test: " + "; ".join(names if len(tests) > 1 else [_TESTS[min(tests)][0]]) + "."
        )
    elif len(group.seeds) == 1:
        caption += ", of single runs: not tested."
    else:
        caption += ": no test was possible."
    return Table(["condition", *(metric.name for metric in shown)], rows, caption)


def _difference_cell(difference: PairedDifference, metric: Metric) -> str:
    decimals = decimals_of(difference, metric)
    cell = f"{difference.mean:+.{decimals}f}"
    if not math.isnan(difference.low):
        cell += f"\n[{difference.low:+.{decimals}f}, {difference.high:+.{decimals}f}]"
    if not math.isnan(difference.p_adjusted):
        cell += f"\n{p_text(difference.p_adjusted)}"
    return f"**{cell}**" if difference.significant else cell


def other_metrics_table(group: Group, keys: Sequence[str]) -> Table:
    """Means over seeds: a row per metric, a column per condition."""
    rows = []
    for key in keys:
        spreads = [group.spread(name, key) for name in group.conditions]
        if any(found.n for found in spreads):
            rows.append([name_of(key), *cells_of(spreads, None, len(group.seeds))])
    return Table(["metric", *map(code, group.conditions)], rows, "Not tested.")


def _table(columns: Mapping[str, Sequence[str]], caption: str = "") -> Table:
    return Table(list(columns), list(zip(*columns.values(), strict=True)), caption)


def smallest_differences(summary: Summary, tested: Sequence[Metric]) -> Table | None:
    """The smallest detectable difference of each metric, and the noise of the probes."""
    rows = []
    for metric in tested:
        differences = [
            by_key[metric.key]
            for group in summary.groups
            for by_key in group.differences.values()
            # what was not tested could not be detected, however large
            if metric.key in by_key and by_key[metric.key].test != "none"
        ]
        if differences:
            widths = [d.smallest for d in differences]
            decimals = max(decimals_of(d, metric) for d in differences)
            shown = [statistics.median(widths), max(widths), differences[0].noise]
            rows.append([metric.name, *(number(value, decimals) for value in shown)])
    if not rows:
        return None
    caption = (
        "What this comparison can detect at best, over all conditions that were tested: half the "
        "width of the 95% confidence intervals, or the noise of the probes where that is larger. "
        "Holm's correction, which these leave out, asks for more. Noise: how far "
        "probing the same SAEs again, with other rows, moves a difference (–: not known, because "
        "probing was not repeated, or of the same rows every time). No difference below the noise "
        "is called significant."
    )
    return Table(["smallest detectable difference", "median", "largest", "noise"], rows, caption)
