"""The answer of a comparison in short: the first table of its report, and lines for a terminal."""

import textwrap
from collections.abc import Sequence

import pandas as pd

from sae_whiten.comparison.paired import FEWEST_SEEDS, PairedDifference
from sae_whiten.comparison.report.document import Block, Paragraph, Table, code
from sae_whiten.comparison.report.tables import smallest_differences
from sae_whiten.comparison.report.wording import decimals_of, group_name, listed, number, p_text
from sae_whiten.comparison.summary import BASELINES, TESTED_METRICS, Group, Summary
from sae_whiten.evaluation.catalogue import (
    CE_LOSS_SCORE,
    DEAD_LATENTS,
    EXPLAINED_VARIANCE,
    KL,
    L0,
    SAE_PROBES_AUC_AT,
    SPARSE_PROBING_AT,
    Metric,
)

__all__ = ["NOTHING_COMPARED", "brief_blocks", "terminal_text"]

NOTHING_COMPARED = "Nothing is compared: no SAE has a k, and no L0 was given to compare sweeps at."

_PROBES = (SAE_PROBES_AUC_AT[16], SPARSE_PROBING_AT[1])  # the terminal shows the first measured
_OPTIONAL = (CE_LOSS_SCORE, KL)  # the terminal shows those that fit
_HEADER_WIDTH = 13
_MOST_OTHERS = 5


def terminal_text(summary: Summary, width: int = 80) -> str:
    """The main metrics in plain text: a block per architecture and sparsity, a line per condition.

    Means that differ significantly from that of the first baseline are marked better or worse.
    Significant differences in metrics that are not shown are listed, or counted if they are many.

    Args:
        summary: The comparison.
        width: Columns of the terminal. CE loss score and KL divergence are shown if they fit.
    """
    optional = [metric for metric in _OPTIONAL if metric.key in summary.metrics]
    probe = [metric for metric in _PROBES if metric.key in summary.metrics][:1]
    while True:
        shown = [EXPLAINED_VARIANCE, DEAD_LATENTS, L0, *optional, *probe]
        tables = [_terminal_table(summary, group, shown) for group in summary.groups]
        if not optional or all(len(line) <= width for t in tables for line in t.splitlines()):
            break
        optional.pop()
    text = "\n\n".join([*tables, _what_was_tested(summary, shown)])
    return text + ("\n–: not measured, or the L0 is outside the sweep." if "–" in text else "")


def _terminal_table(summary: Summary, group: Group, shown: Sequence[Metric]) -> str:
    baseline = _baseline(summary)
    rows = [[_terminal_cell(group, n, baseline, m) for m in shown] for n in group.conditions]
    headers = [textwrap.wrap(metric.name, _HEADER_WIDTH) for metric in shown]
    n_lines = max(map(len, headers))
    lines = [[""] * (n_lines - len(header)) + header for header in headers]
    frame = pd.DataFrame(rows, group.conditions, pd.MultiIndex.from_tuples(map(tuple, lines)))
    title = group_name(summary, group).replace("`", "")
    return f"{title}\n{frame.to_string(sparsify=False)}"


def _terminal_cell(group: Group, condition: str, baseline: str, metric: Metric) -> str:
    difference = group.differences.get((condition, baseline), {}).get(metric.key)
    verdict = ""
    if difference is not None and difference.significant:
        verdict = "better" if difference.mean * metric.better > 0 else "worse"
    # equally wide, so that the numbers stand below each other
    spread, n_seeds = group.spread(condition, metric.key), len(group.seeds)
    known = f" ({spread.n} of {n_seeds})" if 0 < spread.n < n_seeds else ""
    cell = f"{number(spread.mean, metric.decimals)}{known}"
    return f"{cell} {verdict:6}" if metric in TESTED_METRICS else cell


def _what_was_tested(summary: Summary, shown: Sequence[Metric]) -> str:
    """What better and worse mean, or why nothing was tested."""
    if not summary.groups:
        return NOTHING_COMPARED
    if (why := _why_no_differences(summary)) is not None:
        return f"No differences: {why}".replace("`", "")
    n_seeds = _n_seeds(summary)
    if n_seeds < FEWEST_SEEDS:
        seeds = "1 seed" if n_seeds == 1 else f"{n_seeds} seeds"
        return f"{seeds}: nothing is tested, and any of these differences may be chance."
    baseline, tables = _baseline(summary), "table" if len(summary.groups) == 1 else "tables"
    text = (
        f"better, worse: significantly better or worse than {baseline} over {n_seeds} seeds "
        f"(p < 0.05 after Holm's correction). No other difference from {baseline} in the {tables} "
        "is significant."
    )
    others = _significant_others(summary, shown)
    if len(others) > _MOST_OTHERS:
        return (
            f"{text}\n{len(others)} differences in metrics that are not in the {tables} are "
            "significant too: the report has them."
        )
    if others:
        text += f"\nSignificant too, but not in the {tables}:"
    return "\n  ".join([text, *others])


def _significant_others(summary: Summary, shown: Sequence[Metric]) -> list[str]:
    """A line for each significant difference from the baseline in a metric that is not shown."""
    baseline, lines = _baseline(summary), []
    for group in summary.groups:
        where = group_name(summary, group).replace("`", "") if len(summary.groups) > 1 else ""
        for name in group.conditions:
            differences = group.differences.get((name, baseline), {})
            for metric in TESTED_METRICS:
                difference = differences.get(metric.key)
                if metric in shown or difference is None or not difference.significant:
                    continue
                verdict = "better" if difference.mean * metric.better > 0 else "worse"
                lines.append(
                    f"{where and where + ', '}{name}: {metric.name} "
                    f"{difference.mean:+.{decimals_of(difference, metric)}f} "
                    f"({verdict}, {p_text(difference.p_adjusted)})"
                )
    return lines


def brief_blocks(summary: Summary) -> list[Block]:
    """How often each condition was significantly better or worse than the first baseline."""
    if (why := _why_no_differences(summary)) is not None:
        return [Paragraph(f"No differences: {why}")]
    if _n_seeds(summary) == 1:
        return [
            Paragraph(
                "One seed: nothing can be tested. The differences below are of single runs. How "
                "much of them is chance is not known."
            )
        ]
    baseline = _baseline(summary)
    tested = [metric for metric in TESTED_METRICS if metric.key in summary.metrics]
    rows = []
    for name in summary.conditions:
        if name == baseline:
            continue
        cells = [code(name)]
        for metric in tested:
            results = [
                group.differences.get((name, baseline), {}).get(metric.key)
                for group in summary.groups
            ]
            cells.append(_brief_cell([d for d in results if d is not None], metric))
        rows.append(cells)
    caption = (
        f"Mean difference from {code(baseline)}, lowest to highest over architectures and "
        "sparsities, and in how many of these it is significant."
    )
    free = dict.fromkeys(code(g.architecture) for g in summary.groups if g.sparsity is None)
    if free:
        caption += f" {listed(list(free))}: at the L0 that each SAE reached."
    blocks = [
        Table(["condition", *(m.name for m in tested)], rows, caption),
        Paragraph(_notes(summary)),
    ]
    smallest = smallest_differences(summary, tested)
    return blocks if smallest is None else [*blocks, smallest]


def _notes(summary: Summary) -> str:
    """How the differences of the table were tested."""
    n_families = sum(len(group.differences) for group in summary.groups)
    notes = (
        "Differences are paired over seeds: with the same seed, all conditions share data, order "
        "and initial weights. Significant means an adjusted p below 0.05 and a difference larger "
        "than the noise of the measurement. For each condition, baseline and "
        "group, p-values are adjusted by Holm's method over the metrics of this table. So each of "
        f"these {n_families} families of tests has a chance of at most 5% of any false positive. "
        "p-values are not corrected across families, and confidence intervals are not corrected. "
        "No significant difference does not mean no difference."
    )
    tests = {
        d.test for g in summary.groups for by_key in g.differences.values() for d in by_key.values()
    }
    if _n_seeds(summary) < FEWEST_SEEDS:
        notes += " With two seeds nothing is tested."
    if "t" in tests:
        notes += (
            " With few seeds a test of ranks could not be significant. The test is then a t-test, "
            "which assumes normal differences."
        )
    if "bootstrap" in tests:
        notes += (
            " Metrics of many tasks are paired over tasks too: seeds and tasks are both resampled "
            "(hierarchical bootstrap), so the result holds for other seeds and other tasks."
        )
    return notes


def _baseline(summary: Summary) -> str:
    """The first baseline that was trained; empty if there is none."""
    return next((name for name in BASELINES if name in summary.conditions), "")


def _n_seeds(summary: Summary) -> int:
    return max(len(group.seeds) for group in summary.groups)


def _why_no_differences(summary: Summary) -> str | None:
    baseline = _baseline(summary)
    if not baseline:
        return f"none of the conditions is a baseline ({' or '.join(map(code, BASELINES))})."
    if len(summary.conditions) == 1:
        return f"there is no condition but {code(baseline)}."
    return None


def _brief_cell(differences: Sequence[PairedDifference], metric: Metric) -> str:
    """The range of mean differences, and how many of them are significant."""
    if not differences:
        return "–"
    low, high = min(d.mean for d in differences), max(d.mean for d in differences)
    decimals = max(decimals_of(d, metric) for d in differences)
    ends = dict.fromkeys(f"{end:+.{decimals}f}" for end in (low, high))
    significant = [d for d in differences if d.significant]
    better = sum(d.mean * metric.better > 0 for d in significant)
    counts = [
        f"{n} of {len(differences)} {word}"
        for n, word in ((better, "better"), (len(significant) - better, "worse"))
        if n
    ]
    return f"{' to '.join(ends)}\n{', '.join(counts) or 'not significant'}"
