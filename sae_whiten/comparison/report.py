"""The report of a comparison or an evaluation: a Markdown file, figures and one HTML page."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_whiten._files import atomic_path
from sae_whiten._redaction import redacted
from sae_whiten.comparison import document
from sae_whiten.comparison.brief import NOTHING_COMPARED, brief_blocks
from sae_whiten.comparison.conditions import CONDITIONS
from sae_whiten.comparison.document import (
    Block,
    Code,
    Details,
    Figure,
    Heading,
    Items,
    Link,
    Paragraph,
    Table,
    code,
)
from sae_whiten.comparison.evaluation_report import (
    evaluation_blocks,
    evaluation_figures,
    evaluation_table,
)
from sae_whiten.comparison.panels import comparison_figures
from sae_whiten.comparison.paper import paper_table
from sae_whiten.comparison.sentences import describe_difference, sparsity_warning
from sae_whiten.comparison.summary import (
    BASELINES,
    MAIN_METRICS,
    Group,
    Summary,
    read_metrics,
    summarise,
)
from sae_whiten.comparison.tables import (
    MISLEADING,
    PROBING,
    differences_table,
    learning_rate_table,
    matched_table,
    means_table,
    other_metrics_table,
)
from sae_whiten.comparison.wording import group_name, listed, number
from sae_whiten.evaluation.catalogue import STABILITY, STABILITY_NULL, Metric, name_of

__all__ = [
    "FEATURE_PAGE",
    "comparison_markdown",
    "describe_difference",
    "evaluation_table",
    "write_report",
]

FEATURE_PAGE = "features.html"
"""Name of the page of features. A report links it if it lies in the same folder."""

_SHOWN_ELSEWHERE = ("command", "left_out", "learning_rates_found")  # of the settings


def write_report(
    records: Sequence[Mapping[str, Any]],
    directory: str | Path,
    settings: Mapping[str, Any],
    *,
    targets: Sequence[float | int] | None = None,
) -> list[Path]:
    """Write table.md, figures/*.png and *.pdf, and report.html, each of them atomically.

    Args:
        records: One per run. Of a comparison: as `summarise` takes them. Of an evaluation: with
            "name" instead of "condition" and the rest, one per SAE.
        directory: Where to write; made if it does not exist.
        settings: What was run, shown as it is. "command" is shown as a command, "model_name",
            "hook_name" and "training_tokens" also beside the paper's; "left_out", reasons by
            architecture and condition, below the conditions.
        targets: L0 at which sweeps are compared; the values of k in the records if None.

    Returns:
        The files written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; table.md is written nevertheless.
        ValueError: There are no records, or they are not as described.
    """
    if not records:
        raise ValueError("no records: nothing to report")
    directory = Path(directory)
    records, settings = redacted(list(records)), redacted(dict(settings))
    named = [record.get("condition") is None and "name" in record for record in records]
    if all(named):
        title = "Evaluation of sparse autoencoders"
        intro, body = evaluation_blocks(records), []
        figures = evaluation_figures(records)
    elif not any(named):
        title = "Comparison of whitening"
        comparison = summarise(records, targets)
        intro = _introduction_blocks(comparison, settings)
        body = _comparison_blocks(comparison, settings)
        figures = comparison_figures(comparison)
    else:
        raise ValueError(
            f"{sum(named)} of {len(named)} records have a name and no condition: the records of "
            "an evaluation and of a comparison do not go into one report"
        )
    what = [str(settings[key]) for key in ("model_name", "hook_name") if settings.get(key)]
    title += f": {', '.join(what)}" if what else ""
    title = title.replace("`", "'").replace("*", "'")
    page_of_features = Link("Look at features of two of the SAEs", FEATURE_PAGE)
    linked = [page_of_features] if (directory / FEATURE_PAGE).is_file() else []
    intro = [Heading(title, 1), *linked, *intro]
    body = [*body, *_settings_blocks(settings)]

    table = directory / "table.md"
    _write_text(table, document.to_markdown([*intro, *body], directory))
    drawn: list[Block] = []
    written = []
    for name, caption, draw, panels in tqdm(figures, "Drawing", leave=False, disable=None):
        paths = [directory / "figures" / f"{name}{suffix}" for suffix in (".png", ".pdf")]
        for path in paths:
            draw(panels, path)
        written += paths
        drawn.append(Figure(paths[0], caption))
    if drawn:
        drawn.insert(0, Heading("Figures", 2))
        _write_text(table, document.to_markdown([*intro, *drawn, *body], directory))
    page = directory / "report.html"
    blocks = [*intro, *drawn, *body, *_run_blocks(records)]
    _write_text(page, document.to_html(title, blocks))
    return [table, *written, page]


def comparison_markdown(comparison: Summary, settings: Mapping[str, Any] | None = None) -> str:
    """Tables and sentences of a comparison, without figures; settings as for `write_report`."""
    settings = settings or {}
    blocks = _introduction_blocks(comparison, settings) + _comparison_blocks(comparison, settings)
    return document.to_markdown(blocks, ".")


def _introduction_blocks(comparison: Summary, settings: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = [Heading("Conditions", 2)]
    blocks.append(
        Items(
            [
                f"{code(name)}: {CONDITIONS[name].description}"
                if name in CONDITIONS
                else code(name)
                for name in comparison.conditions
            ]
        )
    )
    for architecture, reasons in (settings.get("left_out") or {}).items():
        for reason in dict.fromkeys(reasons.values()):
            under = listed([code(name) for name, other in reasons.items() if other == reason])
            blocks.append(Paragraph(f"Left out: {code(architecture)} under {under} ({reason})."))
    chosen = {metric.key for metric in (*PROBING, *MISLEADING)}
    # those of several seeds need several
    expected = [m for m in MAIN_METRICS if m not in (STABILITY, STABILITY_NULL)]
    missing = [m for m in expected if m.key not in comparison.metrics]
    if settings.get("learning_rates_found"):
        table = learning_rate_table(settings["learning_rates_found"])
        blocks += [Heading("Learning rates", 2), table]
    absent = [m.name for m in missing if m.key not in chosen]
    if not chosen & set(comparison.metrics):
        absent.append("probing")
    if absent:
        blocks.append(Paragraph(f"Not measured: {', '.join(absent)}."))
    if comparison.groups:
        blocks += [Heading("In brief", 2), *brief_blocks(comparison)]
    else:
        blocks.append(Paragraph(NOTHING_COMPARED))
    return blocks


def _comparison_blocks(comparison: Summary, settings: Mapping[str, Any]) -> list[Block]:
    shown = [metric for metric in MAIN_METRICS if metric.key in comparison.metrics]
    blocks: list[Block] = []
    for group in comparison.groups:
        blocks.append(Heading(group_name(comparison, group), 2))
        blocks += _group_blocks(group, shown, comparison)
    paper = paper_table(comparison, settings)
    return blocks if paper is None else [*blocks, Heading("Beside the paper", 2), paper]


def _group_blocks(group: Group, shown: Sequence[Metric], comparison: Summary) -> list[Block]:
    blocks: list[Block] = [means_table(group, shown)]
    warning = sparsity_warning(group, comparison)
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
    others = [key for key in comparison.metrics if key not in {m.key for m in shown}]
    if others:
        blocks.append(Details("All other metrics", [other_metrics_table(group, others)]))
    return blocks


def _settings_blocks(settings: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    shown = {key: value for key, value in settings.items() if key not in _SHOWN_ELSEWHERE}
    if shown:
        rows = [
            [str(key).replace("_", " "), code(v if isinstance(v, str) else _json(v))]
            for key, v in shown.items()
        ]
        blocks += [Heading("Settings", 2), Table(["setting", "value"], rows)]
    if settings.get("command"):
        blocks += [Heading("Command", 2), Code(str(settings["command"]))]
    return blocks


def _run_blocks(records: Sequence[Mapping[str, Any]]) -> list[Block]:
    runs = [(record, read_metrics(record, f"record {i}")) for i, record in enumerate(records)]
    fields = ("name", "hook_name", "architecture", "condition", "sparsity", "coefficient", "seed")
    fields = [f for f in fields if any(record.get(f) is not None for record in records)]
    keys = list(dict.fromkeys(key for _, metrics in runs for key in metrics))
    rows = []
    for record, metrics in runs:
        row = ["–" if record.get(field) is None else code(record[field]) for field in fields]
        rows.append(row + [number(metrics.get(key, math.nan), 4) for key in keys])
    header = [field.replace("_", " ") for field in fields] + [name_of(key) for key in keys]
    # every figure again by task and seed: of them results.jsonl has all
    shown = [{k: v for k, v in record.items() if k != "repeats"} for record in records]
    lines = "\n".join(map(_json, shown))
    return [
        Heading("Runs", 2),
        Details(f"Metrics of all {len(runs)} runs", [Table(header, rows)]),
        Details("Records of all runs, with their configs, as JSON lines", [Code(lines)]),
    ]


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
