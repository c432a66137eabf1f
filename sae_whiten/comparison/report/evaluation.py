"""Tables and figures of single SAEs, as `sae-whiten evaluate` reports them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sae_whiten.comparison.report import document
from sae_whiten.comparison.report.document import Block, Details, Paragraph, Table, code
from sae_whiten.comparison.report.figures import Point, plot_against_l0
from sae_whiten.comparison.report.panels import Drawing, metric_title
from sae_whiten.comparison.report.tables import MISLEADING, PROBING, WHY_MISLEADING
from sae_whiten.comparison.report.wording import listed, single_value
from sae_whiten.comparison.summary import MAIN_METRICS, TESTED_METRICS, read_metrics
from sae_whiten.evaluation.catalogue import MEASUREMENTS, name_of

__all__ = ["evaluation_blocks", "evaluation_figures", "evaluation_table"]

_MOST_NAMES_IN_A_FIGURE = 12


def evaluation_table(records: Sequence[Mapping[str, Any]], *, others: bool = True) -> str:
    """A Markdown table of SAEs, one per row, and one of all other metrics.

    Args:
        records: One per SAE, with "name" and "metrics" (numbers by name; None is not measured).
        others: Whether to add the second table.

    Raises:
        ValueError: A record has no name or a metric that is not a number.
    """
    blocks = evaluation_blocks(records)
    kept = [b for b in blocks if others or not isinstance(b, Details)]
    return document.to_markdown(kept, ".")


def evaluation_blocks(records: Sequence[Mapping[str, Any]]) -> list[Block]:
    """The tables of an evaluation, without figures; records and errors as above."""
    saes = _named_metrics(records)
    keys = list(dict.fromkeys(key for _, metrics in saes for key in metrics))
    shown = [metric for metric in MAIN_METRICS if metric.key in keys]
    rows = [
        [
            code(name),
            *(
                single_value(m.key, metrics.get(m.key, math.nan), m.decimals, record.get("d_sae"))
                for m in shown
            ),
        ]
        for record, (name, metrics) in zip(records, saes, strict=True)
    ]
    blocks: list[Block] = [
        Table(
            ["SAE", *(metric.name for metric in shown)],
            rows,
            "Single SAEs: differences between them include those of sparsity and of chance."
            + _noise_of_probes(records)
            + (f" {WHY_MISLEADING}" if any(m in MISLEADING for m in shown) else ""),
        )
    ]
    blocks += [*_different_tokens(records), *_why_absent(records)]
    others = [key for key in keys if key not in {metric.key for metric in shown}]
    if others:
        table = [
            [
                name_of(key),
                *(single_value(key, metrics.get(key, math.nan), 3) for _, metrics in saes),
            ]
            for key in others
        ]
        header = ["metric", *(code(name) for name, _ in saes)]
        blocks.append(Details("All other metrics", [Table(header, table)]))
    return blocks


def _noise_of_probes(records: Sequence[Mapping[str, Any]]) -> str:
    """The noise of the probes, in a sentence; empty if it is not known."""
    noise = []
    for metric in (m for m in MAIN_METRICS if m in PROBING):
        sds = [
            statistics.stdev(map(statistics.fmean, zip(*tasks.values(), strict=True)))
            for record in records
            if (tasks := (record.get("repeats") or {}).get(metric.key))
            and min(map(len, tasks.values())) > 1
        ]
        # 0 if every seed of the probes draws the same rows
        if sds and (sd := statistics.median(sds)) > 0:
            noise.append(f"{sd:.{metric.decimals + 1}f} in {metric.name}")
    if not noise:
        return ""
    return f" Standard deviation of probing an SAE again, with other rows: {listed(noise)}."


def _different_tokens(records: Sequence[Mapping[str, Any]]) -> list[Block]:
    """On which tokens each SAE was evaluated, if not all on the same."""
    names: dict[str, list[str]] = {}
    for record in records:
        if "evaluated_on" in record:
            tokens = f"{record['evaluated_on']} ({record['n_tokens']} tokens)"
            names.setdefault(tokens, []).append(code(record["name"]))
    if len(names) < 2:
        return []
    each = "; ".join(f"{listed(some)}: {tokens}" for tokens, some in names.items())
    return [Paragraph(f"**Evaluated on different tokens, not to be compared.** {each}.")]


def _why_absent(records: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Why something was not measured, with the SAEs concerned."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        for key, why in (record.get("absent") or {}).items():
            reasons.setdefault(f"No {MEASUREMENTS.get(key, key)}: {why}", []).append(
                str(record["name"])
            )
    return [
        Paragraph(why + ("." if len(set(names)) == len(records) else f" ({', '.join(names)})."))
        for why, names in reasons.items()
    ]


def _named_metrics(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, float]]]:
    saes = []
    for i, record in enumerate(records):
        if record.get("name") is None:
            raise ValueError(f"record {i} has no 'name'; it has {', '.join(record)}")
        saes.append((str(record["name"]), read_metrics(record, f"record {i}")))
    return saes


def evaluation_figures(records: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """Metrics of every SAE against L0; no figure if there are too many SAEs to name."""
    saes = _named_metrics(records)
    if len(saes) > _MOST_NAMES_IN_A_FIGURE:
        return []
    panels = {}
    for metric in TESTED_METRICS:
        lines = {
            name: [Point(metrics["l0"], metrics[metric.key])]
            for name, metrics in saes
            if math.isfinite(metrics.get("l0", math.nan))
            and math.isfinite(metrics.get(metric.key, math.nan))
        }
        if lines:
            panels[metric_title(metric)] = lines
    caption = "Metrics against L0, with arrows to what is better."
    return [Drawing("l0", caption, plot_against_l0, panels)] if panels else []
