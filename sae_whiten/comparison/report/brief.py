"""The answer of a comparison in short: the first table of its report, and lines for a terminal."""

from collections.abc import Sequence

import pandas as pd

from sae_whiten.comparison.paired import FEWEST_SEEDS, PairedDifference
from sae_whiten.comparison.report.document import Block, Paragraph, Table, code
from sae_whiten.comparison.report.tables import smallest_differences
from sae_whiten.comparison.report.wording import decimals_of, group_name, listed, number
from sae_whiten.comparison.summary import BASELINES, TESTED_METRICS, Group, Summary
from sae_whiten.evaluation.catalogue import (
    DEAD_LATENTS,
    EXPLAINED_VARIANCE,
    L0,
    SAE_PROBES_AUC_AT,
    SPARSE_PROBING_AT,
    Metric,
)

__all__ = ["NOTHING_COMPARED", "brief_blocks", "terminal_text"]

NOTHING_COMPARED = "Nothing is compared: no SAE has a k, and no L0 was given to compare sweeps at."

_PROBES = (SAE_PROBES_AUC_AT[16], SPARSE_PROBING_AT[1])  # the terminal shows the first measured


def terminal_text(summary: Summary) -> str:
    """The main metrics in plain text: a block per architecture and sparsity, a line per condition.

    Means that differ significantly from that of the first baseline are marked better or worse.
    """
    probe = [metric for metric in _PROBES if metric.key in summary.metrics]
    shown = [EXPLAINED_VARIANCE, DEAD_LATENTS, L0, *probe[:1]]
    baseline = _baseline(summary)
    blocks = []
    for group in summary.groups:
        rows = [[_terminal_cell(group, n, baseline, m) for m in shown] for n in group.conditions]
        frame = pd.DataFrame(rows, group.conditions, [metric.name for metric in shown])
        title = group_name(summary, group).replace("`", "")
        blocks.append(f"{title}\n{frame.to_string()}")
    tables = "\n\n".join([*blocks, _what_was_tested(summary)])
    return tables + ("\n–: not measured, or the L0 is outside the sweep." if "–" in tables else "")


def _terminal_cell(group: Group, condition: str, baseline: str, metric: Metric) -> str:
    difference = group.differences.get((condition, baseline), {}).get(metric.key)
    verdict = ""
    if difference is not None and difference.significant:
        verdict = "better" if difference.mean * metric.better > 0 else "worse"
    # equally wide, so that the numbers stand below each other
    spread, n_seeds = group.spread(condition, metric.key), len(group.seeds)
    known = f" ({spread.n} of {n_seeds})" if 0 < spread.n < n_seeds else ""
    return f"{number(spread.mean, metric.decimals)}{known} {verdict:6}"


def _what_was_tested(summary: Summary) -> str:
    """What better and worse mean, or why nothing was tested."""
    if not summary.groups:
        return NOTHING_COMPARED
    if (why := _why_no_differences(summary)) is not None:
        return f"No differences: {why}".replace("`", "")
    n_seeds = _n_seeds(summary)
    if n_seeds < FEWEST_SEEDS:
        seeds = "1 seed" if n_seeds == 1 else f"{n_seeds} seeds"
        return f"{seeds}: nothing is tested, and any of these differences may be chance."
    return (
        f"better, worse: significantly better or worse than {_baseline(summary)} over {n_seeds} "
        "seeds (p < 0.05 after Holm's correction). No other difference is significant."
    )


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
