"""Tables and sentences of a comparison, as `sae-whiten compare` reports them."""

from collections.abc import Mapping, Sequence
from typing import Any

from sae_whiten.comparison.conditions import CONDITIONS
from sae_whiten.comparison.report.brief import NOTHING_COMPARED, brief_blocks
from sae_whiten.comparison.report.document import Block, Details, Heading, Items, Paragraph, code
from sae_whiten.comparison.report.paper import paper_table
from sae_whiten.comparison.report.sentences import describe_difference, sparsity_warning
from sae_whiten.comparison.report.tables import (
    MISLEADING,
    PROBING,
    differences_table,
    learning_rate_table,
    matched_table,
    means_table,
    other_metrics_table,
)
from sae_whiten.comparison.report.wording import group_name, listed
from sae_whiten.comparison.summary import BASELINES, MAIN_METRICS, Group, Summary
from sae_whiten.evaluation.catalogue import STABILITY, STABILITY_NULL, Metric

__all__ = ["comparison_blocks", "introduction_blocks"]


def introduction_blocks(summary: Summary, settings: Mapping[str, Any]) -> list[Block]:
    """Conditions, what is missing, and the answer in brief; settings as for `write_report`."""
    blocks: list[Block] = [Heading("Conditions", 2)]
    blocks.append(
        Items(
            [
                f"{code(name)}: {CONDITIONS[name].description}"
                if name in CONDITIONS
                else code(name)
                for name in summary.conditions
            ]
        )
    )
    for architecture, reasons in (settings.get("left_out") or {}).items():
        for reason in dict.fromkeys(reasons.values()):
            under = listed([code(name) for name, other in reasons.items() if other == reason])
            blocks.append(Paragraph(f"Left out: {code(architecture)} under {under} ({reason})."))
    if settings.get("learning_rates_found"):
        table = learning_rate_table(settings["learning_rates_found"])
        blocks += [Heading("Learning rates", 2), table]
    absent = _not_measured(summary)
    if absent:
        blocks.append(Paragraph(f"Not measured: {', '.join(absent)}."))
    if summary.groups:
        blocks += [Heading("In brief", 2), *brief_blocks(summary)]
    else:
        blocks.append(Paragraph(NOTHING_COMPARED))
    return blocks


def _not_measured(summary: Summary) -> list[str]:
    """Names of main metrics that no run has a value of, those of probing and of seeds aside."""
    of_labels = {metric.key for metric in (*PROBING, *MISLEADING)}  # the user chose among them
    of_seeds = {STABILITY.key, STABILITY_NULL.key}
    known = {*summary.metrics, *of_labels, *of_seeds}
    absent = [metric.name for metric in MAIN_METRICS if metric.key not in known]
    return absent if of_labels & set(summary.metrics) else [*absent, "probing"]


def comparison_blocks(summary: Summary, settings: Mapping[str, Any]) -> list[Block]:
    """A section per architecture and sparsity, and the paper's results beside these."""
    shown = [metric for metric in MAIN_METRICS if metric.key in summary.metrics]
    blocks: list[Block] = []
    for group in summary.groups:
        blocks.append(Heading(group_name(summary, group), 2))
        blocks += _group_blocks(group, shown, summary)
    paper = paper_table(summary, settings)
    return blocks if paper is None else [*blocks, Heading("Beside the paper", 2), paper]


def _group_blocks(group: Group, shown: Sequence[Metric], summary: Summary) -> list[Block]:
    blocks: list[Block] = [means_table(group, shown)]
    warning = sparsity_warning(group, summary)
    if warning:
        blocks.append(Paragraph(warning))
    if len(group.matched):
        blocks += [Heading("Other architectures at the same L0", 3), matched_table(group, shown)]
    for baseline in BASELINES:
        pairs = [pair for pair in group.differences if pair[1] == baseline]
        if not pairs:
            continue
        blocks.append(Heading(f"Differences from {code(baseline)}", 3))
        blocks.append(differences_table(group, baseline))
        if len(group.seeds) > 1:
            blocks.append(Items([describe_difference(group, *pair) for pair in pairs]))
    others = [key for key in summary.metrics if key not in {m.key for m in shown}]
    if others:
        blocks.append(Details("All other metrics", [other_metrics_table(group, others)]))
    return blocks
