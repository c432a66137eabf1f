"""The report of a comparison or an evaluation: a Markdown file, figures and one HTML page."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_whiten._atomic import atomic_path
from sae_whiten._redaction import redacted
from sae_whiten.comparison.report import document
from sae_whiten.comparison.report.comparison import comparison_blocks, introduction_blocks
from sae_whiten.comparison.report.document import (
    Block,
    Code,
    Details,
    Figure,
    Heading,
    Link,
    Table,
    code,
)
from sae_whiten.comparison.report.evaluation import evaluation_blocks, evaluation_figures
from sae_whiten.comparison.report.panels import comparison_figures
from sae_whiten.comparison.report.wording import single_value
from sae_whiten.comparison.summary import read_metrics, summarise
from sae_whiten.evaluation.catalogue import name_of

__all__ = ["FEATURE_PAGE", "write_report"]

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
        records: One per SAE. Those of a comparison are as for `summarise`. Those of an evaluation
            have a "name" instead of a "condition".
        directory: Where to write; made if it does not exist.
        settings: What was run, shown as it is. Some have places of their own: "command";
            "left_out", reasons by architecture and condition; "learning_rates_found", scores by
            architecture, condition and rate.
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
        summary = summarise(records, targets)
        intro = introduction_blocks(summary, settings)
        body = comparison_blocks(summary, settings)
        figures = comparison_figures(summary)
    else:
        raise ValueError(
            f"{sum(named)} of {len(named)} records have a name and no condition: the records of "
            "an evaluation and of a comparison do not go into one report"
        )
    subject = [str(settings[key]) for key in ("model_name", "hook_name") if settings.get(key)]
    title += f": {', '.join(subject)}" if subject else ""
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
        rows.append(row + [single_value(key, metrics.get(key, math.nan), 4) for key in keys])
    header = [field.replace("_", " ") for field in fields] + [name_of(key) for key in keys]
    # repeats are many, and results.jsonl has them
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
