"""The report of a comparison or an evaluation: tables, sentences, figures and one HTML page."""

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from sae_whiten._files import atomic_path
from sae_whiten._redaction import redacted
from sae_whiten.comparison import document
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
from sae_whiten.comparison.figures import (
    Point,
    plot_against_l0,
    plot_against_n_latents,
    plot_differences,
)
from sae_whiten.comparison.paired import FEWEST_SEEDS, PairedDifference
from sae_whiten.comparison.summary import (
    BASELINES,
    MAIN_METRICS,
    TESTED_METRICS,
    Frame,
    Group,
    Spread,
    Summary,
    read_metrics,
    spread,
    summarise,
)
from sae_whiten.comparison.sweeps import lacking_coefficient
from sae_whiten.evaluation.catalogue import (
    CE_LOSS_SCORE,
    CURVES,
    EXPLAINED_VARIANCE,
    MEASUREMENTS,
    SAE_PROBES_AUC_AT,
    SCR_AT,
    SCR_DENOMINATOR,
    SPARSE_PROBING_AT,
    STABILITY,
    STABILITY_NULL,
    TPP_AT,
    Metric,
    name_of,
)

__all__ = [
    "FEATURE_PAGE",
    "WHITENED",
    "comparison_markdown",
    "describe_difference",
    "evaluation_table",
    "write_report",
]

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
# conditions that stand for the paper's whitening, its own loss first
WHITENED = ("original", "whitened")

# which of them are measured is chosen
_PROBING = (SPARSE_PROBING_AT[1], *SAE_PROBES_AUC_AT.values(), SCR_AT[20], TPP_AT[20])
_MISLEADING = (SCR_AT[20], SCR_DENOMINATOR, TPP_AT[20])
_WHY_MISLEADING = (
    "Conclude nothing from TPP and SCR: both fail tests of what they are for, TPP falling the "
    "longer an SAE trains and SCR being negatively correlated with known features found (Chanin, "
    "arXiv 2605.18229). They are here because they were asked for."
)

_TESTS = {
    "t": ("paired t-test", ""),
    "wilcoxon": ("Wilcoxon's signed-rank test", " (W)"),
    "bootstrap": ("hierarchical bootstrap over seeds and tasks", " (B)"),
}
"""Name and mark in tables."""

FEATURE_PAGE = "features.html"  # in the folder of the report, which links it if it is there

_L0_TOLERANCE = 0.05  # relative; beyond it, SAEs are said not to be equally sparse
_MOST_NAMES_IN_A_FIGURE = 12
_SHOWN_ELSEWHERE = ("command", "left_out", "learning_rates_found")  # of the settings

# name of the file, caption, the function that draws it, and what that draws
_Drawing: TypeAlias = tuple[str, str, Callable[[Any, Path], None], Any]


# --- comparison


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
        intro, body = _evaluation_blocks(records), []
        figures = _evaluation_figures(records)
    elif not any(named):
        title = "Comparison of whitening"
        comparison = summarise(records, targets)
        intro = _introduction_blocks(comparison, settings)
        body = _comparison_blocks(comparison, settings)
        figures = _comparison_figures(comparison)
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
            under = _and([code(name) for name, other in reasons.items() if other == reason])
            blocks.append(Paragraph(f"Left out: {code(architecture)} under {under} ({reason})."))
    chosen = {metric.key for metric in (*_PROBING, *_MISLEADING)}
    # those of several seeds need several
    expected = [m for m in MAIN_METRICS if m not in (STABILITY, STABILITY_NULL)]
    missing = [m for m in expected if m.key not in comparison.metrics]
    if settings.get("learning_rates_found"):
        blocks += _learning_rate_blocks(settings["learning_rates_found"])
    absent = [m.name for m in missing if m.key not in chosen]
    if not chosen & set(comparison.metrics):
        absent.append("probing")
    if absent:
        blocks.append(Paragraph(f"Not measured: {', '.join(absent)}."))
    if comparison.groups:
        blocks += [Heading("In brief", 2), *_brief_blocks(comparison)]
    else:
        blocks.append(
            Paragraph(
                "Nothing is compared: no run has a k, and no L0 was named to compare sweeps at."
            )
        )
    return blocks


def _learning_rate_blocks(
    found: Mapping[str, Mapping[str, Mapping[str, float | None]]],
) -> list[Block]:
    """The scores of all learning rates that were tried, the best in bold."""
    rows = []
    rates: list[str] = []
    for architecture, by_condition in found.items():
        for condition, scores in by_condition.items():
            rates = list(scores)
            known = [score for score in scores.values() if score is not None]
            cells = [
                f"**{cell}**" if score is not None and score == max(known) else cell
                for score in scores.values()
                for cell in [_number(math.nan if score is None else score, 4)]
            ]
            rows.append([f"{code(architecture)}, {code(condition)}", *cells])
    caption = (
        "Explained variance of held-out activations, in the space that the loss is taken in, after "
        "an eighth of the training with the first seed (–: no SAE near the wanted L0). Every "
        "condition is trained at its best, in bold."
    )
    return [Heading("Learning rates", 2), Table(["", *rates], rows, caption)]


def _comparison_blocks(comparison: Summary, settings: Mapping[str, Any]) -> list[Block]:
    shown = [metric for metric in MAIN_METRICS if metric.key in comparison.metrics]
    blocks: list[Block] = []
    for group in comparison.groups:
        blocks.append(Heading(_group_name(comparison, group), 2))
        blocks += _group_blocks(group, shown, comparison)
    return blocks + _paper_blocks(comparison, settings)


def _group_name(comparison: Summary, group: Group) -> str:
    several = len({g.hook_name for g in comparison.groups}) > 1
    hook = f", {code(group.hook_name)}" if several else ""
    return f"{code(group.architecture)}{hook}, {_sparsity(group)}"


def _sparsity(group: Group) -> str:
    if group.sparsity is None:
        return "L0 as it comes"
    return f"{'L0' if group.interpolated else 'k'} = {group.sparsity:g}"


def _brief_blocks(comparison: Summary) -> list[Block]:
    """How often each condition was significantly better or worse than the first baseline."""
    baseline = next((name for name in BASELINES if name in comparison.conditions), None)
    tested = [metric for metric in TESTED_METRICS if metric.key in comparison.metrics]
    others = [name for name in comparison.conditions if name != baseline]
    if baseline is None or not others:
        return [
            Paragraph(
                "No differences: "
                + (
                    f"none of the conditions is a baseline ({' or '.join(map(code, BASELINES))})."
                    if baseline is None
                    else f"there is no condition but {code(baseline)}."
                )
            )
        ]
    n_seeds = max(len(group.seeds) for group in comparison.groups)
    if n_seeds == 1:
        return [
            Paragraph(
                "One seed: nothing can be tested. Differences below are of single runs, and how "
                "much of them is chance is not known."
            )
        ]
    rows = []
    for name in others:
        cells = [code(name)]
        for metric in tested:
            results = [
                group.differences.get((name, baseline), {}).get(metric.key)
                for group in comparison.groups
            ]
            cells.append(_brief_cell([d for d in results if d is not None], metric))
        rows.append(cells)
    caption = (
        f"Mean difference from {code(baseline)}, its range where several architectures or "
        "sparsities are compared, and in how many of these it is told from chance."
    )
    free = dict.fromkeys(code(g.architecture) for g in comparison.groups if g.sparsity is None)
    if free:
        caption += f" {_and(list(free))}: at the L0 that each SAE came to."
    n_families = sum(len(group.differences) for group in comparison.groups)
    notes = (
        f"Differences are paired over seeds, which share data, order and initialisation. A family "
        f"of tests is one condition against one baseline in one group, over the metrics of this "
        f"table; within it p-values are corrected by Holm's method, so that each of the "
        f"{n_families} families has a chance of at most 5% of any false positive. They are not "
        f"corrected across families. Confidence intervals are not corrected. Significant, or told "
        f"from chance, means an adjusted p below 0.05 and more than the noise of the measurement; "
        f"no significant difference does not mean no difference."
    )
    tests = {
        d.test
        for g in comparison.groups
        for by_key in g.differences.values()
        for d in by_key.values()
    }
    if n_seeds < FEWEST_SEEDS:
        notes += " Two seeds are too few for any test."
    if "t" in tests:
        notes += (
            " Where ranks of so few seeds could not be significant, the test is a t-test, which "
            "takes the differences to be normal and finds those that are large beside their spread."
        )
    if "bootstrap" in tests:
        notes += (
            " Metrics of many tasks are paired over tasks too: seeds and tasks are both drawn "
            "again (hierarchical bootstrap), so that a difference holds for others of both."
        )
    return [
        Table(["condition", *(metric.name for metric in tested)], rows, caption),
        Paragraph(notes),
        *_resolution_blocks(comparison, tested),
    ]


def _brief_cell(found: Sequence[PairedDifference], metric: Metric) -> str:
    """The range of mean differences, and how many of them are told from chance."""
    if not found:
        return "–"
    low, high = min(d.mean for d in found), max(d.mean for d in found)
    decimals = max(_decimals(d, metric) for d in found)
    ends = dict.fromkeys(f"{end:+.{decimals}f}" for end in (low, high))
    told = [d for d in found if d.significant]
    better = sum(d.mean * metric.better > 0 for d in told)
    said = [
        f"{n} of {len(found)} {word}"
        for n, word in ((better, "better"), (len(told) - better, "worse"))
        if n
    ]
    return f"{' to '.join(ends)}\n{', '.join(said) or 'not told from chance'}"


def _resolution_blocks(comparison: Summary, tested: Sequence[Metric]) -> list[Block]:
    """The smallest differences that can be told, and what measuring again changes."""
    rows = []
    for metric in tested:
        found = [
            by_key[metric.key]
            for group in comparison.groups
            for by_key in group.differences.values()
            if metric.key in by_key and not math.isnan(by_key[metric.key].smallest)
        ]
        if found:
            widths = sorted(d.smallest for d in found)
            decimals = max(_decimals(d, metric) for d in found)
            shown = [widths[len(widths) // 2], widths[-1], found[0].noise]
            rows.append([metric.name, *(_number(value, decimals) for value in shown)])
    if not rows:
        return []
    caption = (
        "What this comparison can tell: half the width of the 95% confidence intervals, over all "
        "conditions, and no less than the noise of the probes, which is how far probing the same "
        "SAEs again with other splits moves a difference (–: there is none, or it was not measured "
        "again). Nothing smaller is called a difference."
    )
    return [Table(["smallest difference told", "median", "largest", "noise"], rows, caption)]


def _group_blocks(group: Group, shown: Sequence[Metric], comparison: Summary) -> list[Block]:
    blocks: list[Block] = [_means_table(group, shown)]
    warning = _sparsity_warning(group, comparison)
    if warning:
        blocks.append(Paragraph(warning))
    if len(group.matched):
        blocks += [Heading("Other architectures at the same L0", 3), _matched_table(group, shown)]
    for baseline in BASELINES:
        pairs = [pair for pair in group.differences if pair[1] == baseline]
        if not pairs:
            continue
        blocks.append(Heading(f"Differences from {code(baseline)}", 3))
        blocks.append(_differences_table(group, baseline))
        if len(group.seeds) > 1:
            blocks.append(Items([describe_difference(group, *pair) for pair in pairs]))
    others = [key for key in comparison.metrics if key not in {m.key for m in shown}]
    if others:
        blocks.append(Details("All other metrics", [_other_metrics_table(group, others)]))
    return blocks


def _table(columns: Mapping[str, Sequence[str]], caption: str = "") -> Table:
    return Table(list(columns), list(zip(*columns.values(), strict=True)), caption)


def _means_table(group: Group, shown: Sequence[Metric]) -> Table:
    columns = {"condition": [code(name) for name in group.conditions]}
    n, any_bold = len(group.seeds), False
    for metric in shown:
        best = _significantly_best(group, metric)
        any_bold |= best is not None
        cells = _cells([group.spread(name, metric.key) for name in group.conditions], metric, n)
        columns[metric.name] = [
            "outside the sweep"
            if group.is_outside(name)
            else f"**{cell}**"
            if name == best
            else cell
            for name, cell in zip(group.conditions, cells, strict=True)
        ]
    caption = "One seed." if n == 1 else f"Mean ± standard deviation over {n} seeds."
    if group.interpolated:
        caption += f" Every seed's sweep was interpolated at {_sparsity(group)}, linear in log L0."
    if any(metric in _MISLEADING for metric in shown):
        caption += f" {_WHY_MISLEADING}"
    if any_bold:
        caption += (
            f" Bold: the best of its column, where its difference from {code(BASELINES[0])} is "
            "significant (where it is the baseline itself: from all others)."
        )
    return _table(columns, caption)


def _matched_table(group: Group, shown: Sequence[Metric]) -> Table:
    """The architecture itself and, condition by condition, the others."""
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
        spreads = [spread(values[metric.key]) for values in rows.values()]
        cells = _cells(spreads, metric, len(group.seeds))
        columns[metric.name] = [
            "outside the sweep" if values.isna().to_numpy().all() else cell
            for values, cell in zip(rows.values(), cells, strict=True)
        ]
    caption = (
        f"SAEs of the others, every seed's interpolated, linear in log L0, at the L0 that "
        f"{code(group.architecture)} came to under the same condition; none is extrapolated. "
        "Differences between architectures are not tested."
    )
    return _table(columns, caption)


def _significantly_best(group: Group, metric: Metric) -> str | None:
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


def _sparsity_warning(group: Group, comparison: Summary) -> str | None:
    """What keeps the conditions of a group from being equally sparse, in words."""
    if group.interpolated:
        assert group.sparsity is not None
        gaps, missing = [], []
        for name in group.conditions:
            n_inside = group.spread(name, "l0").n
            if n_inside < len(group.seeds) and name in group.swept:
                low, high = group.swept[name]
                gaps.append(
                    f"{code(name)} reaches it in {n_inside} of {len(group.seeds)} seeds "
                    f"(its sweep covers {low:.3g} to {high:.3g})"
                )
                l0s = comparison.l0_by_coefficient(group, name)
                missing.append(lacking_coefficient(list(l0s), list(l0s.values()), group.sparsity))
        said = (
            "Read off each seed's sweep, linear in log L0 between the two nearest SAEs: coarse "
            "where these are far apart in the figure against L0."
        )
        if gaps:
            said += f" Not all sweeps reach {_sparsity(group)}: {'; '.join(gaps)}."
            tries = sorted({f"{c:g}" for c in missing if c is not None}, key=float)
            if tries:
                said += (
                    f" Raise sweep_rounds, or give coefficients such as {', '.join(tries)} in "
                    "another folder."
                )
        return said
    l0s = {name: group.spread(name, "l0").mean for name in group.conditions}
    l0s = {name: mean for name, mean in l0s.items() if not math.isnan(mean)}
    if not l0s or max(l0s.values()) <= (1 + _L0_TOLERANCE) * min(l0s.values()):
        return None
    low, high = min(l0s, key=l0s.__getitem__), max(l0s, key=l0s.__getitem__)
    why = "At equal k" if group.sparsity is not None else "Nothing sets their sparsity, and"
    return (
        f"{why} these SAEs are not equally sparse: L0 is {l0s[low]:.3g} for {code(low)} and "
        f"{l0s[high]:.3g} for {code(high)}, which by itself moves the other metrics."
    )


def _differences_table(group: Group, baseline: str) -> Table:
    found = {pair[0]: d for pair, d in group.differences.items() if pair[1] == baseline}
    shown = [m for m in TESTED_METRICS if any(m.key in d for d in found.values())]
    tests = {d.test for by_metric in found.values() for d in by_metric.values()} - {"none"}
    rows = []
    for name, by_metric in found.items():
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
    decimals = _decimals(difference, metric)
    cell = f"{difference.mean:+.{decimals}f}"
    if not math.isnan(difference.low):
        cell += f"\n[{difference.low:+.{decimals}f}, {difference.high:+.{decimals}f}]"
    if not math.isnan(difference.p_adjusted):
        cell += f"\n{_p(difference.p_adjusted)}"
    return f"**{cell}**" if difference.significant else cell


def describe_difference(group: Group, condition: str, baseline: str) -> str:
    """What the tests say about two conditions of a group, in one or a few sentences.

    Args:
        group: Of `Comparison.groups`.
        condition: The one that is compared.
        baseline: What it is compared with; `group.differences` has the pair.
    """
    found = group.differences[condition, baseline]
    pair = f"{code(condition)} and {code(baseline)}"
    for name in (condition, baseline):
        if group.is_outside(name):
            return f"{pair} are not compared: no sweep of {code(name)} reaches {_sparsity(group)}."
    significant, not_significant, untested = [], [], []
    for metric in TESTED_METRICS:
        if metric.key not in found:
            reason = _why_not_compared(group, condition, baseline, metric.key)
            if reason:
                untested.append(f"{metric.name} ({reason})")
            continue
        difference = found[metric.key]
        if difference.significant:
            significant.append(_describe_significant(difference, metric))
        elif math.isnan(difference.p_adjusted):
            reason = (
                f"{'a single seed' if difference.n_pairs == 1 else 'two seeds'}"
                if difference.n_pairs < FEWEST_SEEDS
                else f"{difference.mean:+.{metric.decimals}f} in every seed, which leaves nothing "
                "to judge chance by"
            )
            untested.append(f"{metric.name} ({reason})")
        else:
            not_significant.append(metric.name)
    n = max((d.n_pairs for d in found.values()), default=0)
    sentences = []
    if significant:
        sentences.append(
            f"Over {n} seeds, {code(condition)} has, compared with {code(baseline)}, "
            f"{_and(significant)}."
        )
        if not_significant:
            sentences.append(f"No significant difference in {_and(not_significant)}.")
    elif not_significant:
        seeds = "1 seed" if n == 1 else f"{n} seeds"
        sentences.append(
            f"Over {seeds}, {pair} do not differ significantly in {_and(not_significant)}."
        )
    else:
        sentences.append(f"{pair}: nothing could be tested.")
    if untested:
        sentences.append(f"Not tested: {_and(untested)}.")
    return " ".join(sentences)


def _describe_significant(difference: PairedDifference, metric: Metric) -> str:
    sign = 1 if difference.mean > 0 else -1
    more = (("fewer", "more") if metric.is_count else ("lower", "higher"))[sign > 0]
    better = "better" if sign * metric.better > 0 else "worse"
    decimals = _decimals(difference, metric)
    low, high = sorted((sign * difference.low, sign * difference.high))
    return (
        f"{more} {metric.name} by {abs(difference.mean):.{decimals}f} "
        f"({better}; 95% CI {low:.{decimals}f} to {high:.{decimals}f}, "
        f"{_p(difference.p_adjusted)})"
    )


def _why_not_compared(group: Group, condition: str, baseline: str, metric: str) -> str | None:
    """Why a metric that one of the two has was not compared; None if neither has it."""
    by_seed = group.by_seed(metric).reindex(columns=[condition, baseline])
    if by_seed.isna().to_numpy().all():
        return None
    return "infinite in some runs" if len(by_seed.dropna()) else "no seed has it in both"


def _other_metrics_table(group: Group, keys: Sequence[str]) -> Table:
    rows = []
    for key in keys:
        spreads = [group.spread(name, key) for name in group.conditions]
        if any(found.n for found in spreads):
            rows.append([name_of(key), *_cells(spreads, None, len(group.seeds))])
    return Table(["metric", *map(code, group.conditions)], rows, "Not tested.")


def _paper_blocks(comparison: Summary, settings: Mapping[str, Any]) -> list[Block]:
    """The paper's figures beside ours, where both have the architecture and the metric."""
    ours = [name for name in WHITENED if name in comparison.conditions]
    rows = []
    for group in comparison.groups:
        for metric in TESTED_METRICS:
            paper = _PAPER.get((group.architecture, metric))
            changes = [group.relative_change(name, BASELINES[0], metric.key) for name in ours]
            if paper is None or all(map(math.isnan, changes)):
                continue
            standard, whitened, change, p = paper
            row = [
                f"{_group_name(comparison, group)}, {metric.name}",
                f"{standard:.3f}",
                f"{whitened:.3f}",
                change,
                _p_cell(p),
                _mean_and_sd(group.spread(BASELINES[0], metric.key), 3, 0),
            ]
            for name, relative in zip(ours, changes, strict=True):
                difference = group.differences[name, BASELINES[0]].get(metric.key)
                row.append(_mean_and_sd(group.spread(name, metric.key), 3, 0))
                row.append("–" if math.isnan(relative) else f"{100 * relative:+.1f}%")
                row.append("–" if difference is None else _p_cell(difference.p_adjusted))
            rows.append(row)
    if not rows:
        return []
    header = ["", "paper: standard", "paper: whitened", "change", "p", f"ours: {code('none')}"]
    for name in ours:
        header += [f"ours: {code(name)}", "change", "adjusted p"]
    hooks = dict.fromkeys(g.hook_name for g in comparison.groups if g.hook_name)
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
    return [Heading("Beside the paper", 2), Table(header, rows, caption)]


# --- evaluation


def evaluation_table(records: Sequence[Mapping[str, Any]], *, others: bool = True) -> str:
    """A Markdown table of SAEs, one per row, and one of all other metrics.

    Args:
        records: One per SAE, with "name" and "metrics" (numbers by name; None is not measured).
        others: Whether the second table follows.

    Raises:
        ValueError: A record has no name or a metric that is not a number.
    """
    blocks = _evaluation_blocks(records)
    kept = [b for b in blocks if others or not isinstance(b, Details)]
    return document.to_markdown(kept, ".")


def _evaluation_blocks(records: Sequence[Mapping[str, Any]]) -> list[Block]:
    saes = _named_metrics(records)
    keys = list(dict.fromkeys(key for _, metrics in saes for key in metrics))
    shown = [metric for metric in MAIN_METRICS if metric.key in keys]
    rows = [
        [code(name), *(_number(metrics.get(m.key, math.nan), m.decimals) for m in shown)]
        for name, metrics in saes
    ]
    blocks: list[Block] = [
        Table(
            ["SAE", *(metric.name for metric in shown)],
            rows,
            "Single SAEs: differences between them include those of sparsity and of chance."
            + _noise_of_probes(records)
            + (f" {_WHY_MISLEADING}" if any(m in _MISLEADING for m in shown) else ""),
        )
    ]
    blocks += _why_absent(records)
    others = [key for key in keys if key not in {metric.key for metric in shown}]
    if others:
        table = [
            [name_of(key), *(_number(metrics.get(key, math.nan), 3) for _, metrics in saes)]
            for key in others
        ]
        header = ["metric", *(code(name) for name, _ in saes)]
        blocks.append(Details("All other metrics", [Table(header, table)]))
    return blocks


def _noise_of_probes(records: Sequence[Mapping[str, Any]]) -> str:
    """How far probing again moves the figures of an SAE, in words; nothing if it was done once."""
    noise = []
    for metric in (m for m in MAIN_METRICS if m in _PROBING):
        sds = [
            statistics.stdev(map(statistics.fmean, zip(*tasks.values(), strict=True)))
            for record in records
            if (tasks := (record.get("repeats") or {}).get(metric.key))
            and min(map(len, tasks.values())) > 1
        ]
        if sds:
            noise.append(f"{statistics.median(sds):.{metric.decimals + 1}f} in {metric.name}")
    if not noise:
        return ""
    return f" Standard deviation of probing an SAE again, with other splits: {_and(noise)}."


def _why_absent(records: Sequence[Mapping[str, Any]]) -> list[Block]:
    """What was not measured because it would mean nothing, with the SAEs concerned."""
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


# --- figures


def _comparison_figures(comparison: Summary) -> list[_Drawing]:
    figures: list[_Drawing] = []
    several_hooks = comparison.runs.hook_name.nunique() > 1
    for hook_name, architecture in comparison.families:
        label = code(architecture) + (f", {code(hook_name)}" if several_hooks else "")
        stem = _file_name(architecture + (f"-{hook_name}" if several_hooks else ""))
        groups = [
            group
            for group in comparison.groups
            if (group.hook_name, group.architecture) == (hook_name, architecture)
        ]
        sweeps = {n: comparison.sweep(hook_name, architecture, n) for n in comparison.conditions}
        # what is at no sparsity of its own can be judged beside what is at several
        beside = {
            f"{other}, {name}": comparison.sweep(hook_name, other, name)
            for group in groups
            for name, other in group.matched.index.droplevel("seed").unique()
        }
        panels = {}
        for metric in TESTED_METRICS:
            lines = {name: _points(sweep, metric.key) for name, sweep in sweeps.items()}
            if any(lines.values()):
                lines |= {name: _points(sweep, metric.key) for name, sweep in beside.items()}
                panels[_title(metric)] = lines
        if panels:
            caption = (
                f"{label}: metrics against L0, with arrows to what is better. Bars: standard "
                "deviations over seeds."
            )
            if beside:
                caption += " Beside it, by name, other architectures under the same conditions."
            figures.append((f"{stem}-l0", caption, plot_against_l0, panels))
        for baseline in BASELINES:
            panels = _difference_panels(groups, baseline)
            if panels:
                caption = (
                    f"{label}: differences from {code(baseline)}, with 95% confidence intervals. "
                    "Filled: significant after Holm's correction."
                )
                name = f"{stem}-differences-from-{_file_name(baseline)}"
                figures.append((name, caption, plot_differences, panels))
        panels = {}
        for group in groups:
            panels |= _n_latents_panels(group, comparison.conditions)
        if panels:
            caption = (
                f"{label}: probing, SCR and TPP against the number of latents that they use or "
                "remove. Bars: standard deviations over seeds."
            )
            figures.append((f"{stem}-latents", caption, plot_against_n_latents, panels))
    return figures


def _points(sweep: Frame, key: str) -> list[Point]:
    columns = [("l0", "mean"), (key, "mean"), ("l0", "std"), (key, "std")]
    points = [Point(*row) for row in sweep[columns].itertuples(index=False, name=None)]
    return [point for point in points if math.isfinite(point.y)]


def _title(metric: Metric) -> str:
    return f"{metric.name} {'↑' if metric.better > 0 else '↓'}"


def _difference_panels(
    groups: Sequence[Group], baseline: str
) -> dict[str, dict[tuple[str, str], PairedDifference]]:
    panels: dict[str, dict[tuple[str, str], PairedDifference]] = {}
    for metric in TESTED_METRICS:
        for group in groups:
            for (name, other), found in group.differences.items():
                if other == baseline and metric.key in found:
                    row = (_sparsity(group), name)
                    panels.setdefault(_title(metric), {})[row] = found[metric.key]
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
            panels[f"{curve.name}, {_sparsity(group)}"] = (curve.x_label, lines)
    return panels


def _curve_points(
    group: Group, conditions: Sequence[str], metrics: Mapping[int, Metric]
) -> list[Point]:
    """Of the first of these conditions that has a value at each number of latents."""
    points = []
    for n, metric in metrics.items():
        found = (group.spread(name, metric.key) for name in conditions)
        known = next((s for s in found if math.isfinite(s.mean)), None)
        if known is not None:
            points.append(Point(n, known.mean, y_sd=known.sd))
    return points


def _evaluation_figures(
    records: Sequence[Mapping[str, Any]],
) -> list[_Drawing]:
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
            panels[_title(metric)] = lines
    caption = "Metrics against L0, with arrows to what is better."
    return [("l0", caption, plot_against_l0, panels)] if panels else []


# --- what every report ends with


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
        rows.append(row + [_number(metrics.get(key, math.nan), 4) for key in keys])
    header = [field.replace("_", " ") for field in fields] + [name_of(key) for key in keys]
    # every figure again by task and seed: of them results.jsonl has all
    shown = [{k: v for k, v in record.items() if k != "repeats"} for record in records]
    lines = "\n".join(map(_json, shown))
    return [
        Heading("Runs", 2),
        Details(f"Metrics of all {len(runs)} runs", [Table(header, rows)]),
        Details("Records of all runs, with their configs, as JSON lines", [Code(lines)]),
    ]


# --- numbers in words


def _number(value: float, decimals: int) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.{decimals}f}" if math.isfinite(value) else str(value)


def _mean_and_sd(found: Spread, decimals: int, n_expected: int) -> str:
    """`n_expected` values are usual: if there are fewer, the cell says so."""
    cell = _number(found.mean, decimals)
    if found.n and not math.isnan(found.sd):
        cell += f" ± {found.sd:.{decimals}f}"
    return cell + (f" ({found.n} of {n_expected})" if 0 < found.n < n_expected else "")


def _cells(spreads: Sequence[Spread], metric: Metric | None, n_expected: int) -> list[str]:
    """Means and deviations, with as many decimals as the deviations ask for."""
    decimals = _column_decimals(3 if metric is None else metric.decimals, [s.sd for s in spreads])
    return [_mean_and_sd(found, decimals, n_expected) for found in spreads]


def _column_decimals(fewest: int, sds: Sequence[float]) -> int:
    """Decimals that show two digits of the median deviation, and two more than `fewest` at most."""
    known = sorted(sd for sd in sds if sd > 0)
    if not known:
        return fewest
    wanted = 1 - math.floor(math.log10(known[len(known) // 2]))
    return min(max(wanted, fewest), fewest + 2)


def _decimals(difference: PairedDifference, metric: Metric) -> int:
    return _column_decimals(metric.decimals, [(difference.high - difference.low) / 2])


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _p_cell(p: float) -> str:
    return "–" if math.isnan(p) else _p(p).removeprefix("p ").removeprefix("= ")


def _and(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), *parts[-1:]] if len(parts) > 1 else parts)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
