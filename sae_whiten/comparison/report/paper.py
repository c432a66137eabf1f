"""Results of the paper on whitening SAEs, beside those of a comparison."""

import math
from collections.abc import Mapping
from typing import Any

from sae_whiten.comparison.report.document import Table, code
from sae_whiten.comparison.report.wording import group_name, mean_and_sd, p_cell
from sae_whiten.comparison.summary import BASELINES, TESTED_METRICS, Summary
from sae_whiten.evaluation.catalogue import (
    CE_LOSS_SCORE,
    EXPLAINED_VARIANCE,
    SCR_AT,
    SPARSE_PROBING_AT,
    TPP_AT,
)

__all__ = ["WHITENED", "paper_table"]

# Saraswatula & Klindt 2025: standard, whitened, change, p
_PAPER = {
    ("standard", CE_LOSS_SCORE): (0.980, 0.954, "-2.6%", 3e-5),
    ("standard", EXPLAINED_VARIANCE): (0.813, 0.772, "-5.0%", 3e-6),
    ("standard", SPARSE_PROBING_AT[1]): (0.757, 0.812, "+7.2%", 1e-5),
    ("standard", SCR_AT[20]): (0.176, 0.271, "+54%", 3e-6),
    ("standard", TPP_AT[20]): (0.021, 0.098, "+372%", 6e-6),
    ("topk", CE_LOSS_SCORE): (0.990, 0.968, "-2.3%", 5e-4),
    ("topk", EXPLAINED_VARIANCE): (0.837, 0.794, "-5.2%", 1e-4),
    ("topk", SPARSE_PROBING_AT[1]): (0.754, 0.809, "+7.3%", 3e-5),
    ("topk", SCR_AT[20]): (0.311, 0.304, "-2.4%", 0.23),
    ("topk", TPP_AT[20]): (0.141, 0.152, "+8.0%", 0.24),
}
_PAPER_SETUP = (
    "Saraswatula & Klindt, arXiv 2511.13981: Pythia-160M layer 8 and Gemma-2-2B layer 12, "
    "500M training tokens, metrics of SAEBench; `standard` is its ReLU SAE"
)

WHITENED = ("original", "whitened")
"""Conditions that stand for the paper's whitening, its own loss first."""


def paper_table(summary: Summary, settings: Mapping[str, Any]) -> Table | None:
    """The paper's figures beside ours, where both have the architecture and the metric."""
    ours = [name for name in WHITENED if name in summary.conditions]
    rows = []
    for group in summary.groups:
        for metric in TESTED_METRICS:
            paper = _PAPER.get((group.architecture, metric))
            changes = [group.relative_change(name, BASELINES[0], metric.key) for name in ours]
            if paper is None or all(map(math.isnan, changes)):
                continue
            standard, whitened, change, p = paper
            row = [
                f"{group_name(summary, group)}, {metric.name}",
                f"{standard:.3f}",
                f"{whitened:.3f}",
                change,
                p_cell(p),
                mean_and_sd(group.spread(BASELINES[0], metric.key), 3, 0),
            ]
            for name, relative in zip(ours, changes, strict=True):
                difference = group.differences[name, BASELINES[0]].get(metric.key)
                row.append(mean_and_sd(group.spread(name, metric.key), 3, 0))
                row.append("–" if math.isnan(relative) else f"{100 * relative:+.1f}%")
                row.append("–" if difference is None else p_cell(difference.p_adjusted))
            rows.append(row)
    if not rows:
        return None
    header = ["", "paper: standard", "paper: whitened", "change", "p", f"ours: {code('none')}"]
    for name in ours:
        header += [f"ours: {code(name)}", "change", "adjusted p"]
    hooks = dict.fromkeys(g.hook_name for g in summary.groups if g.hook_name)
    setup = [code(settings["model_name"])] if settings.get("model_name") else []
    setup += [code(settings["hook_name"])] if settings.get("hook_name") else map(code, hooks)
    if settings.get("training_tokens"):
        setup.append(f"{settings['training_tokens']:,} training tokens")
    caption = (
        f"Paper: {_PAPER_SETUP}. Ours: {', '.join(setup) or 'see the settings'}. "
        f"Changes are relative to the unwhitened SAE; {code('original')} has the paper's loss, "
        f"{code('whitened')} that of SAELens. Other models, data, sizes and label sets: only signs "
        "and orders of magnitude can be compared."
    )
    return Table(header, rows, caption)
