"""What the figures of a comparison show: their panels and captions."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_whiten.comparison.paired import PairedDifference
from sae_whiten.comparison.report.document import code
from sae_whiten.comparison.report.figures import (
    Point,
    plot_against_l0,
    plot_against_n_latents,
    plot_differences,
    plot_seeds,
)
from sae_whiten.comparison.report.wording import file_name, sparsity_text
from sae_whiten.comparison.summary import BASELINES, TESTED_METRICS, Frame, Group, Summary
from sae_whiten.evaluation.catalogue import CURVES, Metric

__all__ = ["Drawing", "comparison_figures", "metric_title"]


class Drawing(NamedTuple):
    """A figure that is still to be drawn.

    Attributes:
        name: Of its files, without suffix.
        caption: Below it.
        draw: Draws the panels and writes them to a path.
        panels: What `draw` takes.
    """

    name: str
    caption: str
    draw: Callable[[Any, Path], None]
    panels: Any


def comparison_figures(summary: Summary) -> list[Drawing]:
    """Per hook and architecture: metrics, differences from the baselines, against latents."""
    figures: list[Drawing] = []
    several_hooks = summary.runs.hook_name.nunique() > 1
    for hook_name, architecture in summary.families:
        label = code(architecture) + (f", {code(hook_name)}" if several_hooks else "")
        stem = file_name(architecture + (f"-{hook_name}" if several_hooks else ""))
        groups = [
            group
            for group in summary.groups
            if (group.hook_name, group.architecture) == (hook_name, architecture)
        ]
        # the only k of TopK SAEs; L0 has nothing to show then
        one_k = len(groups) == 1 and groups[0].sparsity is not None and not groups[0].interpolated
        metrics = (
            _of_one_k(groups[0], label, stem)
            if one_k
            else _against_l0(summary, (hook_name, architecture), groups, label, stem)
        )
        figures += [metrics] if metrics.panels else []
        for baseline in BASELINES:
            panels = _difference_panels(groups, baseline)
            if panels:
                caption = (
                    f"{label}: differences from {code(baseline)}, with 95% confidence intervals. "
                    "Filled: significant after Holm's correction."
                )
                name = f"{stem}-differences-from-{file_name(baseline)}"
                figures.append(Drawing(name, caption, plot_differences, panels))
        panels = {}
        for group in groups:
            panels |= _n_latents_panels(group, summary.conditions)
        if panels:
            caption = (
                f"{label}: probing, SCR and TPP against the number of latents that they use or "
                "remove. Bars: standard deviations over seeds."
            )
            figures.append(Drawing(f"{stem}-latents", caption, plot_against_n_latents, panels))
    return figures


def _of_one_k(group: Group, label: str, stem: str) -> Drawing:
    """The metrics of every seed."""
    panels: dict[str, dict[str, list[float]]] = {}
    for metric in TESTED_METRICS:
        by_seed = group.by_seed(metric.key)
        for name in group.conditions:
            if name in by_seed and (known := by_seed[name].dropna().tolist()):
                panels.setdefault(metric_title(metric), {})[name] = known
    caption = (
        f"{label}, {sparsity_text(group)}: metrics, with arrows to what is better. Circles: seeds. "
        "Bars: their means."
    )
    return Drawing(f"{stem}-seeds", caption, plot_seeds, panels)


def _against_l0(
    summary: Summary, family: tuple[str, str], groups: Sequence[Group], label: str, stem: str
) -> Drawing:
    """Metrics against L0. `family`: hook and architecture; `groups`: those of the family."""
    sweeps = {name: summary.sweep(*family, name) for name in summary.conditions}
    # SAEs without a set sparsity are drawn beside the sweeps of other architectures
    beside = {
        f"{other}, {name}": summary.sweep(family[0], other, name)
        for group in groups
        for name, other in group.matched.index.droplevel("seed").unique()
    }
    panels = {}
    for metric in TESTED_METRICS:
        lines = {name: _points(sweep, metric.key) for name, sweep in sweeps.items()}
        if any(lines.values()):
            lines |= {name: _points(sweep, metric.key) for name, sweep in beside.items()}
            panels[metric_title(metric)] = lines
    caption = (
        f"{label}: metrics against L0, with arrows to what is better. Bars: standard deviations "
        "over seeds."
    )
    if beside:
        caption += " Other architectures under the same conditions are shown by name."
    return Drawing(f"{stem}-l0", caption, plot_against_l0, panels)


def _points(sweep: Frame, key: str) -> list[Point]:
    columns = [("l0", "mean"), (key, "mean"), ("l0", "std"), (key, "std")]
    points = [Point(*row) for row in sweep[columns].itertuples(index=False, name=None)]
    return [point for point in points if math.isfinite(point.y)]


def metric_title(metric: Metric) -> str:
    """The name of a metric, with an arrow in the better direction."""
    return f"{metric.name} {'↑' if metric.better > 0 else '↓'}"


def _difference_panels(
    groups: Sequence[Group], baseline: str
) -> dict[str, dict[tuple[str, str], PairedDifference]]:
    panels: dict[str, dict[tuple[str, str], PairedDifference]] = {}
    for metric in TESTED_METRICS:
        for group in groups:
            for (name, other), differences in group.differences.items():
                if other == baseline and metric.key in differences:
                    row = (sparsity_text(group), name)
                    panels.setdefault(metric_title(metric), {})[row] = differences[metric.key]
    return panels


def _n_latents_panels(
    group: Group, conditions: Sequence[str]
) -> dict[str, tuple[str, dict[str, list[Point]]]]:
    panels: dict[str, tuple[str, dict[str, list[Point]]]] = {}
    for curve in CURVES:
        lines = {name: _curve_points(group, [name], curve.metrics) for name in conditions}
        if any(lines.values()):
            # the same for all conditions
            baseline = _curve_points(group, conditions, curve.baselines)
            lines |= {"residual channels": baseline} if baseline else {}
            panels[f"{curve.name}, {sparsity_text(group)}"] = (curve.x_label, lines)
    return panels


def _curve_points(
    group: Group, conditions: Sequence[str], metrics: Mapping[int, Metric]
) -> list[Point]:
    """A point for each number of latents, of the first condition that has a value there."""
    points = []
    for n, metric in metrics.items():
        spreads = (group.spread(name, metric.key) for name in conditions)
        known = next((s for s in spreads if math.isfinite(s.mean)), None)
        if known is not None:
            points.append(Point(n, known.mean, y_sd=known.sd))
    return points
