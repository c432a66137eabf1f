"""Reports of records whose means, interpolations and p-values are known by hand."""

import base64
import itertools
import json
import math
import random
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_whiten.comparison.paired import (
    bootstrap_difference,
    holm,
    measurement_noise,
    paired_difference,
)
from sae_whiten.comparison.report import document, figures
from sae_whiten.comparison.report.brief import terminal_text
from sae_whiten.comparison.report.comparison import comparison_blocks, introduction_blocks
from sae_whiten.comparison.report.document import Code, Details, Heading, Paragraph, Table, code
from sae_whiten.comparison.report.evaluation import evaluation_table
from sae_whiten.comparison.report.figures import (
    Point,
    plot_against_l0,
    plot_against_n_latents,
    plot_differences,
    plot_seeds,
)
from sae_whiten.comparison.report.page import write_report
from sae_whiten.comparison.report.panels import comparison_figures
from sae_whiten.comparison.report.sentences import describe_difference
from sae_whiten.comparison.summary import TESTED_METRICS, Group, Summary, summarise
from sae_whiten.evaluation import catalogue

NAN = math.nan


def record(condition: str, seed: int, k: float | None = 32, **metrics: Any) -> dict[str, Any]:
    """A run of a topk SAE."""
    return {
        "architecture": "topk",
        "condition": condition,
        "sparsity": k,
        "coefficient": None,
        "seed": seed,
        "hook_name": "blocks.0.hook_resid_pre",
        "metrics": metrics,
        "config": {"lr": 1e-4},
    }


def sweep_point(condition: str, seed: int, coefficient: float, **metrics: Any) -> dict[str, Any]:
    """A run of an L1 sweep."""
    run = record(condition, seed, None, **metrics)
    return {**run, "architecture": "standard", "coefficient": coefficient}


# explained variance differs by 0.010, 0.011, 0.012; dead latents by 1, -2, 4; KL by nothing
NONE = [
    {
        "explained_variance": 0.80,
        "l0": 32.0,
        "dead_latents": 10,
        "kl": 0.5,
        "sparse_probing_top_2": 0.7,
    },
    {
        "explained_variance": 0.82,
        "l0": 32.0,
        "dead_latents": 12,
        "kl": 0.6,
        "sparse_probing_top_2": 0.8,
    },
    {
        "explained_variance": 0.84,
        "l0": 32.0,
        "dead_latents": 14,
        "kl": 0.7,
        "sparse_probing_top_2": 0.9,
    },
]
ORIGINAL = [
    {"explained_variance": 0.790, "l0": 32.0, "dead_latents": 11, "kl": 0.5},
    {"explained_variance": 0.809, "l0": 32.0, "dead_latents": 10, "kl": 0.6},
    {"explained_variance": 0.828, "l0": 32.0, "dead_latents": 18, "kl": 0.7},
]
RECORDS = [record("original", i, **m) for i, m in enumerate(ORIGINAL)]
RECORDS += [record("none", i, **m) for i, m in enumerate(NONE)]


def t_p_value(mean: float, sd: float) -> float:
    """Of three differences: two degrees of freedom have a closed form."""
    t = abs(mean) / (sd / 3**0.5)
    return 1 - t / (2 + t**2) ** 0.5


def tables(markdown: str) -> list[list[dict[str, str]]]:
    """The tables of a Markdown document as rows of cells by header."""
    found = []
    for block in re.findall(r"(?:^\|.*\|$\n?)+", markdown, re.MULTILINE):
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().split("\n")]
        header, rule, *rows = ([cell.strip() for cell in line] for line in lines)
        assert all(re.fullmatch(":?-+:?", cell) for cell in rule)
        assert {len(line) for line in lines} == {len(header)}
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def of_conditions(markdown: str) -> list[list[dict[str, str]]]:
    """Those whose rows are conditions."""
    return [table for table in tables(markdown) if "condition" in table[0]]


def comparison_markdown(comparison: Summary, settings: Mapping[str, Any] | None = None) -> str:
    """A report without figures."""
    settings = settings or {}
    blocks = [*introduction_blocks(comparison, settings), *comparison_blocks(comparison, settings)]
    return document.to_markdown(blocks, ".")


class Page(HTMLParser):
    """Tags, their attributes, and the text of a page; every tag must be closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# --- numbers


def test_means_and_deviations_over_seeds() -> None:
    comparison = summarise(RECORDS)
    assert comparison.conditions == ["none", "original"]  # the baseline first
    (group,) = comparison.groups
    assert (group.architecture, group.sparsity, group.interpolated) == ("topk", 32, False)
    assert group.seeds == [0, 1, 2]
    found = group.spread("none", "explained_variance")
    assert found.n == 3
    assert found.mean == pytest.approx(0.82)
    assert found.sd == pytest.approx(0.02)
    assert group.spread("original", "sparse_probing_top_2").n == 0
    change = group.relative_change("original", "none", "explained_variance")
    assert change == pytest.approx(-0.011 / 0.82)


def test_stability_has_no_deviation() -> None:
    # two seeds share the value of their one pair, and all seeds that of random dictionaries
    records = [
        record("none", seed, explained_variance=0.8 + seed / 10, stability=0.4, stability_null=0.2)
        for seed in (0, 1)
    ]
    markdown = comparison_markdown(summarise(records))
    ((means,), *_) = of_conditions(markdown)
    assert means["explained variance"] == "0.850 ± 0.071"
    assert means["stability over seeds"] == "0.400"
    assert means["stability of random dictionaries"] == "0.200"
    assert "Stability has no deviation" in markdown


def test_differences_are_paired_and_corrected_over_the_tested_metrics() -> None:
    (group,) = summarise(RECORDS[::-1]).groups  # the order of the records does not matter
    found = group.differences["original", "none"]
    # not L0, which was made equal, nor what only one of the two has
    assert list(found) == ["explained_variance", "dead_latents", "kl"]
    variance = found["explained_variance"]
    assert variance.mean == pytest.approx(-0.011)
    p = t_p_value(0.011, 0.001)
    assert variance.p_value == pytest.approx(p)
    assert variance.p_adjusted == pytest.approx(3 * p)
    assert variance.significant
    dead = found["dead_latents"]
    p_dead = t_p_value(1, 3)
    assert dead.p_value == pytest.approx(p_dead)
    assert [d.p_adjusted for d in found.values()] == pytest.approx(holm([p, p_dead, 1.0]))
    assert found["kl"].p_value == 1


AUC = "sae_probes_auc_top_1"


def probed(condition: str, seed: int, by_task: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """A run that was probed on tasks, with several seeds of the probes."""
    mean = statistics.fmean(map(statistics.fmean, by_task.values()))
    return {**record(condition, seed, **{AUC: mean}), "repeats": {AUC: by_task}}


def test_what_was_probed_on_tasks_is_paired_over_them() -> None:
    rng = random.Random(0)
    runs, a, b = [], [], []
    for seed in range(3):
        hard = {f"task {i}": 0.6 + 0.03 * i for i in range(10)}
        none = {task: [x + rng.gauss(0, 0.001) for _ in range(2)] for task, x in hard.items()}
        half = {task: [x + rng.gauss(0.02, 0.001) for _ in range(2)] for task, x in hard.items()}
        runs += [probed("half", seed, half), probed("none", seed, none)]
        a.append([statistics.fmean(x) for x in half.values()])
        b.append([statistics.fmean(x) for x in none.values()])
    (group,) = summarise(runs).groups
    found = group.differences["half", "none"][AUC]
    expected = bootstrap_difference(np.array(a), np.array(b))
    assert (found.test, found.n_pairs) == ("bootstrap", 3)
    assert (found.mean, found.low) == pytest.approx((expected.mean, expected.low))
    again = [
        statistics.fmean(
            x[AUC][task][i] - y[AUC][task][i]
            for x, y in zip(
                (r["repeats"] for r in runs if r["condition"] == "half"),
                (r["repeats"] for r in runs if r["condition"] == "none"),
                strict=True,
            )
            for task in x[AUC]
        )
        for i in range(2)
    ]
    assert found.noise == pytest.approx(measurement_noise([again]))
    markdown = comparison_markdown(summarise(runs))
    assert "Test: hierarchical bootstrap over seeds and tasks." in markdown
    assert "1 of 1 better" in markdown
    # where the probes are as noisy as the difference is large, it is none
    for run in runs:
        if run["condition"] == "half":
            run["repeats"] = {
                AUC: {task: [x + 0.03, y - 0.03] for task, (x, y) in run["repeats"][AUC].items()}
            }
    (group,) = summarise(runs).groups
    noisy = group.differences["half", "none"][AUC]
    assert noisy.mean == pytest.approx(found.mean)
    assert noisy.p_adjusted < 0.05
    assert not noisy.significant
    # at an L0 between those of a sweep, tasks and repeats are interpolated like the mean of them
    swept = [
        {**run, "sparsity": None, "coefficient": c, "metrics": {**run["metrics"], "l0": l0}}
        for run in runs
        for c, l0 in ((1.0, 20.0), (2.0, 40.0))
    ]
    (at_30,) = summarise(swept, targets=[30]).groups
    assert at_30.differences["half", "none"][AUC].low == pytest.approx(noisy.low)


def test_learning_rates_that_were_tried_are_shown_with_the_best_in_bold() -> None:
    found = {
        "topk": {"none": {"0.0003": 0.71, "0.001": 0.7}, "half": {"0.0003": None, "0.001": 0.8}}
    }
    markdown = comparison_markdown(summarise(RECORDS), {"learning_rates_found": found})
    (table,) = (t for t in tables(markdown) if "0.0003" in t[0])
    assert [list(row.values()) for row in table] == [
        ["`topk`, `none`", "**0.7100**", "0.7000"],
        ["`topk`, `half`", "–", "**0.8000**"],
    ]


def test_an_evaluation_says_how_noisy_its_probes_are() -> None:
    run = {"name": "sae", "metrics": {AUC: 0.75}, "repeats": {AUC: {"a": [0.7, 0.8]}}}
    table = evaluation_table([run])
    assert f"with other rows: {0.05 * 2**0.5:.4f} in sae-probes AUC top 1." in table
    assert "Conclude nothing" not in table
    asked = evaluation_table([{"name": "sae", "metrics": {"tpp_top_20": 0.1}}])
    assert "Conclude nothing from TPP and SCR" in asked
    assert "arXiv 2605.18229" in asked


def test_equal_repetitions_are_not_called_free_of_noise() -> None:
    # of a label with two values, every seed of the probes draws the same rows
    run = {"name": "sae", "metrics": {AUC: 0.75}, "repeats": {AUC: {"": [0.75, 0.75]}}}
    assert "Standard deviation of probing" not in evaluation_table([run])


def test_another_metric_changes_no_p_value(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = catalogue.Metric("novelty", lambda measured: 0.5, "novelty of latents", better=1)
    monkeypatch.setattr(catalogue, "METRICS", (*catalogue.METRICS, extra))
    runs = [
        {**run, "metrics": {**run["metrics"], "novelty": 0.5 + 0.1 * i + 0.01 * run["seed"] ** i}}
        for i, run in enumerate(RECORDS)
    ]
    before, after = summarise(RECORDS), summarise(runs)
    # as text, for NaN differs from NaN
    assert str(after.groups[0].differences) == str(before.groups[0].differences)
    assert [m.key for m in TESTED_METRICS] == [
        "explained_variance", "dead_latents", "ce_loss_score", "kl", "sparse_probing_top_1",
        "sae_probes_auc_top_1", "sae_probes_auc_top_16", "scr_top_20", "tpp_top_20",
    ]  # fmt: skip
    # but it is reported
    (others,) = (t for t in tables(comparison_markdown(after)) if "metric" in t[0])
    assert {row["metric"] for row in others} == {"sparse probing top 2", "novelty of latents"}


def test_seeds_that_only_one_condition_has_are_not_compared() -> None:
    (group,) = summarise([*RECORDS, record("none", 7, explained_variance=0.1, l0=32)]).groups
    assert group.seeds == [0, 1, 2, 7]
    assert group.spread("none", "explained_variance").mean == pytest.approx((3 * 0.82 + 0.1) / 4)
    assert group.differences["original", "none"]["explained_variance"].n_pairs == 3


def test_every_condition_is_compared_with_both_baselines_once() -> None:
    names = ("half", "centred", "none", "zca")
    (group,) = summarise([record(n, s, l0=32, kl=0.1 * s) for n in names for s in (0, 1)]).groups
    assert group.conditions == ["none", "centred", "half", "zca"]
    assert set(group.differences) == {
        ("centred", "none"),
        ("half", "none"),
        ("zca", "none"),
        ("half", "centred"),
        ("zca", "centred"),
    }


def sweeps() -> list[dict[str, Any]]:
    """At L0 20, in a logarithm the middle of 10 and 40: .60, .61 against .50; one ends at 19."""
    runs = []
    for condition, seed, low, high, l0 in [
        ("none", 0, 0.5, 0.7, (10, 40)),
        ("none", 1, 0.51, 0.71, (10, 40)),
        ("whitened", 0, 0.4, 0.6, (10, 40)),
        ("whitened", 1, 0.42, 0.62, (10, 19)),
    ]:
        runs.append(sweep_point(condition, seed, 2, explained_variance=low, l0=l0[0]))
        runs.append(sweep_point(condition, seed, 1, explained_variance=high, l0=l0[1]))
    return runs


def test_sweeps_are_interpolated_for_every_seed() -> None:
    at_20, at_99 = summarise(sweeps(), targets=[20, 99]).groups
    assert at_20.interpolated
    variances = at_20.by_seed("explained_variance")
    assert variances["none"].to_dict() == pytest.approx({0: 0.6, 1: 0.61})
    # not extrapolated
    assert variances["whitened"].to_dict() == pytest.approx({0: 0.5, 1: NAN}, nan_ok=True)
    assert at_20.by_seed("l0")["none"].to_dict() == {0: 20, 1: 20}
    assert at_20.differences["whitened", "none"]["explained_variance"].n_pairs == 1
    assert at_99.conditions == ["none", "whitened"]
    assert at_99.values.isna().to_numpy().all()
    assert at_99.swept == {"none": (10, 40), "whitened": (10, 40)}
    assert at_99.differences["whitened", "none"] == {}


def test_sweeps_are_compared_at_the_k_of_the_others_by_default() -> None:
    comparison = summarise([*sweeps(), *RECORDS])
    assert [(g.architecture, g.sparsity) for g in comparison.groups] == [
        ("standard", 32),
        ("topk", 32),
    ]
    assert summarise(sweeps()).groups == []


def free(condition: str, seed: int, **metrics: Any) -> dict[str, Any]:
    """A run whose sparsity nothing sets."""
    return {**record(condition, seed, None, **metrics), "architecture": "top_afa"}


def runs_at_their_own_l0() -> list[dict[str, Any]]:
    """L0 is 20 and 30; topk is at 10 and 40, but with the second seed at 10 alone."""
    runs = [free("none", s, explained_variance=0.7 + 0.1 * s, l0=20 + 10 * s) for s in (0, 1)]
    runs += [free("scaled", s, explained_variance=0.6 + 0.1 * s, l0=25) for s in (0, 1)]
    runs += [record("none", s, 10, explained_variance=0.5, l0=10) for s in (0, 1)]
    return [*runs, record("none", 0, 40, explained_variance=0.7, l0=40)]


def test_what_has_no_sparsity_is_compared_as_it_is_and_others_at_its_l0() -> None:
    group = summarise(runs_at_their_own_l0()).groups[0]
    assert (group.architecture, group.sparsity, group.interpolated) == ("top_afa", None, False)
    assert group.by_seed("l0")["none"].to_dict() == {0: 20, 1: 30}
    assert group.by_seed("explained_variance")["none"].to_dict() == pytest.approx({0: 0.7, 1: 0.8})
    assert group.swept == {}
    found = group.differences["scaled", "none"]["explained_variance"]
    assert (found.n_pairs, found.mean) == (2, pytest.approx(-0.1))
    # 20 is, in a logarithm, the middle; 30 is beyond the only SAE of that seed; of "scaled" topk
    # has none at all
    assert list(group.matched.index) == [("none", "topk", 0), ("none", "topk", 1)]
    first, second = group.matched[["explained_variance", "l0"]].to_numpy().tolist()
    assert first == pytest.approx([0.6, 20])
    assert second == pytest.approx([NAN, NAN], nan_ok=True)
    assert all(len(other.matched) == 0 for other in summarise(RECORDS).groups)


def test_the_report_of_what_has_no_sparsity() -> None:
    comparison = summarise(runs_at_their_own_l0(), targets=[])
    markdown = comparison_markdown(comparison)
    assert "## `top_afa`, L0 not set" in markdown
    assert "`top_afa`: at the L0 that each SAE reached." in markdown
    _, means, matched, *_ = of_conditions(markdown)
    assert [row["L0"] for row in means] == ["25.0 ± 7.1", "25.0 ± 0.0"]
    assert [list(row.values())[:3] for row in matched] == [
        ["`none`", "`top_afa`", "0.750 ± 0.071"],
        ["`none`", "`topk`", "0.600 (1 of 2)"],
        ["`scaled`", "`top_afa`", "0.650 ± 0.071"],
    ]
    drawings = {name: panels for name, _, _, panels in comparison_figures(comparison)}
    lines = drawings["top_afa-l0"]["explained variance ↑"]
    points = {name: [(p.x, p.y) for p in points] for name, points in lines.items()}
    assert points["none"] == [(25, pytest.approx(0.75))]
    assert lines["none"][0].x_sd == pytest.approx(50**0.5)
    assert points["topk, none"] == [(10, 0.5), (40, 0.7)]
    assert set(drawings["topk-l0"]["explained variance ↑"]) == {"none", "scaled"}
    unequal = summarise([free("none", 0, l0=20), free("scaled", 0, l0=30)])
    assert "Nothing sets their sparsity, and these SAEs are not" in comparison_markdown(unequal)
    dead = summarise([free("none", 0, l0=0), record("none", 0, 10, l0=10, kl=1)])
    assert list(dead.groups[0].matched.index) == [("none", "topk", 0)]
    assert "outside the sweep" in comparison_markdown(dead)


def test_what_was_left_out_is_said_with_the_reason() -> None:
    settings = {"left_out": {"top_afa": {"half": "it cannot", "original": "it cannot"}}}
    markdown = comparison_markdown(summarise(RECORDS), settings)
    assert "Left out: `top_afa` under `half` and `original` (it cannot)." in markdown
    assert "Left out" not in comparison_markdown(summarise(RECORDS))


def test_hooks_are_not_mixed() -> None:
    other = [{**run, "hook_name": "elsewhere"} for run in RECORDS]
    comparison = summarise([*RECORDS, *other])
    assert [group.hook_name for group in comparison.groups] == [
        "blocks.0.hook_resid_pre",
        "elsewhere",
    ]
    assert "## `topk`, `elsewhere`, k = 32" in comparison_markdown(comparison)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([*RECORDS, RECORDS[0]], "record 6 repeats architecture topk, condition original"),
        ([{"architecture": "topk", "condition": "none", "metrics": {}}], "record 0 has no 'seed'"),
        ([{**RECORDS[0], "metrics": None}], "record 0 has no 'metrics'"),
        ([record("none", 0, kl="low")], "record 0: metric 'kl' is 'low', not a number"),
    ],
)
def test_records_that_cannot_be_right_are_refused(runs: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        summarise(runs)


# --- tables and sentences


def test_the_tables_have_the_numbers_in_the_right_cells() -> None:
    markdown = comparison_markdown(summarise(RECORDS))
    brief, detectable, means, differences, others, _paper = tables(markdown)
    assert brief == [
        {
            "condition": "`original`",
            "explained variance": "-0.0110 1 of 1 worse",
            "dead latents": "+1.0 not significant",
            "KL divergence": "+0.000 not significant",
        }
    ]
    # half of the intervals below; nothing was measured again. Of KL, equal in all seeds, nothing is
    # known
    assert [list(row.values()) for row in detectable] == [
        ["explained variance", "0.0025", "0.0025", "–"],
        ["dead latents", "7.5", "7.5", "–"],
    ]
    assert means == [
        {
            "condition": "`none`",
            "explained variance": "**0.820 ± 0.020**",
            "L0": "32.0 ± 0.0",
            "dead latents": "12.0 ± 2.0",
            "KL divergence": "0.600 ± 0.100",
        },
        {
            "condition": "`original`",
            "explained variance": "0.809 ± 0.019",
            "L0": "32.0 ± 0.0",
            "dead latents": "13.0 ± 4.4",
            "KL divergence": "0.600 ± 0.100",
        },
    ]
    (row,) = differences
    # 4.303 / sqrt 3 = 2.484 standard deviations on either side
    assert row["explained variance"] == "**-0.0110 [-0.0135, -0.0085] p = 0.008**"
    assert row["dead latents"] == "+1.0 [-6.5, +8.5] p = 1.000"
    assert row["KL divergence"] == "+0.000 [+0.000, +0.000] p = 1.000"
    assert others[0]["`none`"] == "0.800 ± 0.100"
    assert others[0]["`original`"] == "–"
    assert "Not measured: CE loss score, probing." in markdown


def test_sentences_say_what_is_significant_and_what_is_not() -> None:
    (group,) = summarise(RECORDS).groups
    assert describe_difference(group, "original", "none") == (
        "Over 3 seeds, `original` has, compared with `none`, lower explained variance by 0.0110 "
        "(worse; 95% CI 0.0085 to 0.0135, p = 0.008). No significant difference in dead latents "
        "and KL divergence."
    )


@pytest.mark.parametrize(
    ("metric", "sign", "words"),
    [
        ("explained_variance", 1, "higher explained variance by 0.110 (better"),
        ("kl", 1, "higher KL divergence by 0.110 (worse"),
        ("kl", -1, "lower KL divergence by 0.110 (better"),
        ("dead_latents", -1, "fewer dead latents by 0.110 (better"),
        ("dead_latents", 1, "more dead latents by 0.110 (worse"),
    ],
)
def test_more_is_not_always_better(metric: str, sign: int, words: str) -> None:
    runs = [record("none", i, **{metric: 1.0}) for i in range(3)]
    runs += [record("half", i, **{metric: 1.0 + sign * (0.1 + 0.01 * i)}) for i in range(3)]
    (group,) = summarise(runs).groups
    assert words in describe_difference(group, "half", "none")
    ends = group.differences["half", "none"][metric]
    low, high = sorted(abs(end) for end in (ends.low, ends.high))
    text = describe_difference(group, "half", "none")
    found = [float(x) for x in re.findall(r"CI ([\d.]+) to ([\d.]+)", text)[0]]
    assert found == pytest.approx([low, high], abs=0.01)


def test_a_terminal_shows_a_line_for_each_condition_and_what_differs() -> None:
    half = [{**m, "dead_latents": 7, "sae_probes_auc_top_16": 0.7} for m in NONE]
    runs = [*RECORDS, *(record("half", i, **m) for i, m in enumerate(half))]
    title, *header, a, b, c, _, tested, dash = terminal_text(summarise(runs)).splitlines()
    assert title == "topk, k = 32"
    assert [" ".join(line.split()) for line in header] == [
        "explained sae-probes",
        "variance dead latents L0 KL divergence AUC top 16",
    ]
    assert [line.split() for line in (a, b, c)] == [
        ["none", "0.820", "12.0", "32.0", "0.600", "–"],
        ["original", "0.809", "worse", "13.0", "32.0", "0.600", "–"],
        ["half", "0.820", "7.0", "32.0", "0.600", "0.700"],
    ]
    assert "than none" in tested
    assert "3 seeds" in tested
    assert "not measured" in dash
    killed = terminal_text(summarise([*RECORDS, record("half", 0, **half[0])])).splitlines()
    assert killed[5].split()[:5] == ["half", "0.800", "(1", "of", "3)"]
    two = terminal_text(summarise([run for run in RECORDS if run["seed"] < 2]))
    assert "worse" not in two
    assert two.endswith("2 seeds: nothing is tested, and any of these differences may be chance.")
    assert "no condition but none" in terminal_text(summarise(RECORDS[3:]))
    assert "Nothing is compared" in terminal_text(summarise([sweep_point("none", 0, 1, l0=9)]))


def test_significant_differences_that_a_terminal_has_no_room_for_are_listed_or_counted() -> None:
    def runs(names: Sequence[str]) -> list[dict[str, Any]]:
        changed = {"kl": 0.5, "ce_loss_score": -0.1}  # both are worse
        none = [{**m, "ce_loss_score": 0.9 + 0.01 * i} for i, m in enumerate(NONE)]
        return [
            record(name, i, **m | {key: m[key] + by + 0.001 * i for key, by in changed.items()})
            if name != "none"
            else record(name, i, **m)
            for name in ("none", *names)
            for i, m in enumerate(none)
        ]

    one = summarise(runs(["half"]))
    wide = terminal_text(one)
    assert max(map(len, wide.splitlines()[:5])) <= 80
    assert wide.splitlines()[4].split()[-4:] == ["0.811", "worse", "1.101", "worse"]
    assert wide.endswith("No other difference from none in the table is significant.")
    narrow = terminal_text(one, 64)
    assert "CE loss" in narrow
    *_, title, kl = narrow.splitlines()
    assert title == "Significant too, but not in the table:"
    assert re.fullmatch(r"  half: KL divergence \+0\.501\d* \(worse, p < 0\.001\)", kl)
    many = terminal_text(summarise(runs(["half", "quarter", "eighth"])), 40)
    assert "CE loss" not in many
    assert many.splitlines()[-1] == (
        "6 differences in metrics that are not in the table are significant too: "
        "the report has them."
    )


def test_the_best_is_bold_only_where_that_is_significant() -> None:
    def bold(values: Mapping[str, Sequence[float]]) -> list[str]:
        runs = [
            record(name, seed, kl=kl) for name, kls in values.items() for seed, kl in enumerate(kls)
        ]
        means = of_conditions(comparison_markdown(summarise(runs)))[1]
        return [row["condition"] for row in means if "**" in row["KL divergence"]]

    none, worse, better = [0.5, 0.6, 0.7], [0.6, 0.701, 0.799], [0.4, 0.501, 0.599]
    noisy = [0.3, 0.9, 0.8]
    assert bold({"none": none, "zca": better}) == ["`zca`"]
    assert bold({"none": none, "zca": better, "half": worse}) == ["`zca`"]
    assert bold({"none": none, "half": worse}) == ["`none`"]
    # best, but not surely so
    assert bold({"none": none, "half": worse, "original": noisy}) == []
    assert bold({"none": none, "original": [0.1, 0.7, 0.6]}) == []
    # without the baseline nothing is known
    assert bold({"centred": none, "half": worse}) == []


def test_what_was_not_tested_could_not_be_detected() -> None:
    deviations = {"none": 0.0, "whitened": 0.01, "original": 0.02}
    runs = [
        record(name, seed, explained_variance=0.8 + seed * sd, dead_latents=3.0)
        for name, sd in deviations.items()
        for seed in range(3)
    ]
    title = "| smallest detectable difference |"
    assert title not in comparison_markdown(summarise([r for r in runs if r["seed"] < 2]))
    _, table = comparison_markdown(summarise(runs)).split(title)
    # 0.01 and 0.02 times t with 2 degrees of freedom over sqrt(3); dead latents never differ
    assert "| explained variance | 0.037 | 0.050 | – |" in table
    assert "| dead latents |" not in table.split("What this comparison can detect")[0]


def test_what_was_not_tested_is_said() -> None:
    runs = [record("none", i, kl=math.inf, dead_latents=i, tpp_top_20=0.1) for i in range(3)]
    runs += [record("half", i, kl=0.1, dead_latents=i + 5, scr_top_20=NAN) for i in range(3)]
    (group,) = summarise(runs).groups
    assert describe_difference(group, "half", "none") == (
        "`half` and `none`: nothing could be tested. Not tested: dead latents (+5.0 in every seed, "
        "so chance cannot be judged), KL divergence (infinite in some runs) and TPP "
        "top 20 (no seed has it in both)."
    )
    means = of_conditions(comparison_markdown(summarise(runs)))[1]
    assert [row["KL divergence"] for row in means] == ["inf", "0.100 ± 0.000"]
    assert [row["TPP top 20"] for row in means] == ["0.100 ± 0.000", "–"]


def test_a_sweep_that_does_not_reach_the_sparsity_is_marked() -> None:
    runs = [run for run in sweeps() if (run["condition"], run["seed"]) != ("none", 1)]
    markdown = comparison_markdown(summarise(runs, targets=[20, 99]))
    assert "`whitened` reaches it in 1 of 2 seeds (its sweep covers 10 to 40)" in markdown
    # a fourth of the least coefficient, 1, of whichever has too few active latents
    assert "Raise sweep_rounds, or give coefficients such as" in markdown
    at_20, at_99 = (t for t in tables(markdown) if "L0" in t[0])
    assert at_20[1]["explained variance"] == "0.500 (1 of 2)"
    assert [row["explained variance"] for row in at_99] == ["outside the sweep"] * 2
    assert "no sweep of `whitened` reaches L0 = 99" in markdown


def test_unequal_sparsity_at_equal_k_is_said() -> None:
    equal = comparison_markdown(summarise(RECORDS))
    assert "not equally sparse" not in equal
    runs = [record("none", 0, l0=32.0), record("half", 0, l0=40.0)]
    assert "L0 is 32 for `none` and 40 for `half`" in comparison_markdown(summarise(runs))


def test_one_seed_one_condition_and_nothing_at_all() -> None:
    single = comparison_markdown(summarise([run for run in RECORDS if run["seed"] == 0]))
    assert "One seed: nothing can be tested." in single
    means, differences, *_ = tables(single)
    assert means[0]["explained variance"] == "0.800"
    assert differences[0]["explained variance"] == "-0.010"
    assert "**" not in single
    assert "p = " not in single
    alone = comparison_markdown(summarise(RECORDS[:3]))
    assert "No differences: none of the conditions is a baseline" in alone
    assert len(tables(alone)) == 1
    assert "there is no condition but `none`" in comparison_markdown(summarise(RECORDS[3:]))
    empty = comparison_markdown(summarise([record("none", 0, l0=None)]))
    assert tables(empty)[0] == [{"condition": "`none`"}]


def test_many_seeds_are_tested_by_ranks_and_the_table_says_so() -> None:
    runs = [record("none", i, kl=0.1 * i) for i in range(7)]
    runs += [record("half", i, kl=0.1 * i + 0.01 * (i + 1)) for i in range(7)]
    markdown = comparison_markdown(summarise(runs))
    assert "Wilcoxon's signed-rank test." in markdown
    assert "t-test" not in markdown
    assert "p = 0.016" in markdown  # 2^-6
    assert "assumes normal differences" not in markdown
    assert "assumes normal differences" in comparison_markdown(summarise(RECORDS))


def test_our_changes_stand_beside_those_of_the_paper() -> None:
    settings = {"model_name": "gpt2", "training_tokens": 2_000_000}
    markdown = comparison_markdown(summarise(RECORDS), settings)
    (row,) = (t for t in tables(markdown) if "paper: standard" in t[0])
    # explained variance only: of the rest the paper has no figures
    assert len(row) == 1
    assert row[0]["paper: standard"] == "0.837"
    assert row[0]["ours: `none`"] == "0.820 ± 0.020"
    # the last of the columns called "change" is ours: -0.011 / 0.82
    assert row[0]["change"] == "-1.3%"
    assert row[0]["adjusted p"] == "0.008"
    assert "Ours: `gpt2`, `blocks.0.hook_resid_pre`, 2,000,000 training tokens." in markdown
    assert "Pythia-160M" in markdown
    others = [{**run, "architecture": "jumprelu"} for run in RECORDS]
    assert "Pythia" not in comparison_markdown(summarise(others))


# --- documents


def test_texts_are_escaped() -> None:
    name = "<script>alert('`x`')</script> | **y** & z"
    blocks = [
        Heading(f"about {code(name)}", 2),
        Paragraph(f"**bold** <b> {code(name)}"),
        Table(["a", "b"], [[code(name), "1\n2"]], f"caption {code(name)}"),
        Details("more", [Code(name)]),
    ]
    page = Page(document.to_html(name, blocks))
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert "b" not in tags
    assert tags.count("strong") == 1
    assert page.text.count("<script>alert('") == 6
    ((cells,),) = tables(document.to_markdown(blocks, "."))
    assert list(cells) == ["a", "b"]
    assert cells["a"] == r"`<script>alert('x')</script> \| **y** & z`".replace("'x'", "''x''")
    assert cells["b"] == "1 2"


def test_code_is_fenced_by_more_backticks_than_it_holds() -> None:
    text = "a\n````\nb"
    assert document.to_markdown([Code(text)], ".") == f"`````\n{text}\n`````\n"


def test_a_report_is_one_self_contained_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    evil = '"><img src=http://example.com/x.png>'
    runs = [*RECORDS, *({**run, "condition": evil} for run in RECORDS[:3])]
    command = "sae-whiten compare \\\n  --out <there>"
    settings = {"model_name": "gpt2 & co", "steps": 100, "flags": {"eps": 1e-3}, "command": command}
    written = write_report(runs, tmp_path / "new", settings)
    assert sorted(p for p in (tmp_path / "new").rglob("*") if p.is_file()) == sorted(written)
    names = [path.name for path in written]
    assert names == [
        "table.md",
        "topk-seeds.png",
        "topk-seeds.pdf",
        "topk-differences-from-none.png",
        "topk-differences-from-none.pdf",
        "topk-latents.png",
        "topk-latents.pdf",
        "report.html",
    ]
    html = written[-1].read_text(encoding="utf-8")
    page = Page(html)
    # no scripts, style sheets, fonts or images from anywhere
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\(|@import", html)
    links = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "srcset")]
    prefix = "data:image/png;base64,"
    pictures = [base64.b64decode((link or "").removeprefix(prefix)) for link in links]
    assert all((link or "").startswith(prefix) for link in links)
    assert pictures == [path.read_bytes() for path in written if path.suffix == ".png"]
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    for text in ("gpt2 & co", command, '{"eps": 0.001}', evil, "has, compared with none, lower"):
        assert text in page.text
    # every run can be read back
    lines = page.text[page.text.index('{"architecture"') :].split("\n")
    assert [json.loads(line) for line in lines if line.startswith("{")] == runs
    # the Markdown shows the same figures
    markdown = written[0].read_text(encoding="utf-8")
    targets = re.findall(r"!\[.*?\]\((.*?)\)\n", markdown)
    assert [tmp_path / "new" / target for target in targets] == [
        path for path in written if path.suffix == ".png"
    ]


def test_without_matplotlib_the_table_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        write_report(RECORDS, tmp_path, {})
    assert tables((tmp_path / "table.md").read_text(encoding="utf-8"))


SAES = [
    {"name": "user/sae|1", "metrics": {"explained_variance": 0.9, "l0": 30.25, "kl": None}},
    {"name": "b", "metrics": {"explained_variance": NAN, "l0": 60, "sparse_probing_top_5": 0.5}},
]


def test_an_evaluation_has_a_row_for_every_sae(tmp_path: Path) -> None:
    first, others = tables(evaluation_table(SAES))
    assert first == [
        {"SAE": r"`user/sae\|1`", "explained variance": "0.900", "L0": "30.2"},
        {"SAE": "`b`", "explained variance": "–", "L0": "60.0"},
    ]
    assert others == [
        {"metric": "sparse probing top 5", r"`user/sae\|1`": "–", "`b`": "0.500"},
    ]
    counted = [{**SAES[0], "d_sae": 2048, "metrics": {"dead_latents": 23.0, "dense_latents": 4}}]
    first, others = tables(evaluation_table(counted))
    assert first[0]["dead latents"] == "23 of 2048"
    assert others == [{"metric": "dense latents", r"`user/sae\|1`": "4"}]
    pytest.importorskip("matplotlib")
    written = write_report(SAES, tmp_path, {})
    assert [path.name for path in written] == ["table.md", "l0.png", "l0.pdf", "report.html"]
    assert "user/sae|1" in Page(written[-1].read_text(encoding="utf-8")).text


def test_records_of_neither_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        write_report([], tmp_path, {})
    with pytest.raises(ValueError, match="2 of 8 records have a name and no condition"):
        write_report([*RECORDS, *SAES], tmp_path, {})
    with pytest.raises(ValueError, match="record 0 has no 'name'"):
        evaluation_table(RECORDS)
    assert list(tmp_path.iterdir()) == []


# --- figures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, instead of files."""
    pytest.importorskip("matplotlib")
    figures_drawn: list[Any] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: figures_drawn.append(figure))
    return figures_drawn


def assert_nothing_overlaps_or_is_clipped(figure: Any) -> None:
    figure.draw_without_rendering()
    extents = [axes.get_tightbbox() for axes in figure.axes]
    extents += [key.get_window_extent() for key in figure.legends]
    page = figure.bbox
    for i, extent in enumerate(extents):
        assert page.x0 - 1 <= extent.x0 < extent.x1 <= page.x1 + 1
        assert page.y0 - 1 <= extent.y0 < extent.y1 <= page.y1 + 1
        assert not any(extent.overlaps(other) for other in extents[:i])


CONDITIONS = ["none", "centred", "expected_average_only_in", *(f"c{i}" for i in range(6))]


@pytest.mark.parametrize("n_panels", [1, 2, 7])
def test_metrics_against_l0_are_drawn_with_error_bars(drawn: list[Any], n_panels: int) -> None:
    lines = {
        name: [Point(16, 0.5 + i, 1.0, 0.1), Point(64, 0.7 + i, NAN, NAN)]
        for i, name in enumerate(CONDITIONS)
    }
    plot_against_l0({f"metric {i} ↑": {**lines, "c2": []} for i in range(n_panels)}, "unused")
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == [f"metric {i} ↑" for i in range(n_panels)]
    (key,) = figure.legends
    shown = [name for name in CONDITIONS if name != "c2"]
    assert [text.get_text() for text in key.get_texts()] == shown
    axes = figure.axes[0]
    assert len(axes.containers) == len(shown)
    for container, name in zip(axes.containers, shown, strict=True):
        line, _, (across, upright) = container
        assert list(line.get_xdata()) == [16, 64]
        assert list(line.get_ydata()) == [point.y for point in lines[name]]
        first = lines[name][0]
        bars = [across.get_segments()[0][:, 0], upright.get_segments()[0][:, 1]]
        assert list(bars[0]) == [15, 17]
        assert list(bars[1]) == pytest.approx([first.y - 0.1, first.y + 0.1])
    assert axes.get_xscale() == "log"
    assert_nothing_overlaps_or_is_clipped(figure)


def test_conditions_of_a_single_k_are_drawn_by_seed_and_not_against_l0(drawn: list[Any]) -> None:
    first, *_ = comparison_figures(summarise([*RECORDS, record("failed", 0, l0=32)]))
    assert first.draw is plot_seeds
    values = {"none": [0.80, 0.82, 0.84], "original": [0.790, 0.809, 0.828]}
    assert first.panels["explained variance ↑"] == values
    first.draw(first.panels, Path("unused"))
    (figure,) = drawn
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(values)
    seeds, mean, *_ = axes.lines
    assert list(seeds.get_xdata()) == values["none"]
    assert mean.get_xdata()[0] == pytest.approx(0.82)
    assert_nothing_overlaps_or_is_clipped(figure)
    several = [*RECORDS, *({**run, "sparsity": 64} for run in RECORDS)]
    assert comparison_figures(summarise(several))[0].draw is plot_against_l0


def test_lines_differ_without_colour_and_keep_their_style(drawn: list[Any]) -> None:
    def styles(conditions: Sequence[str], empty: Sequence[str] = ()) -> dict[str, tuple[Any, ...]]:
        drawn.clear()
        points = [Point(16, 0.5), Point(32, 0.6)]
        plot_against_l0({"m": {n: [] if n in empty else points for n in conditions}}, "unused")
        shown = [n for n in conditions if n not in empty]
        found = {}
        for name, (line, *_) in zip(shown, drawn[0].axes[0].containers, strict=True):
            grey = line.get_color()
            assert re.fullmatch(r"0(\.\d+)?", grey)
            assert float(grey) < 0.7
            found[name] = (line.get_marker(), line.get_markerfacecolor())
        return found

    all_styles = styles(CONDITIONS)
    assert len({marker for marker, *_ in all_styles.values()}) == len(CONDITIONS)
    # neighbours are filled or not
    filled = [face == "white" for _, face in all_styles.values()]
    assert all(a != b for a, b in itertools.pairwise(filled))
    without = styles(CONDITIONS, empty=["centred"])
    assert without == {name: s for name, s in all_styles.items() if name != "centred"}


def test_differences_are_drawn_with_intervals_and_filled_if_significant(drawn: list[Any]) -> None:
    clear = paired_difference([1.0, 2.0, 3.0], [0.9, 1.91, 2.89])
    unclear = paired_difference([1.0, 2.0, 3.0], [0.0, 3.0, 1.0])
    single = paired_difference([1.0], [0.5])
    assert clear.significant
    assert not unclear.significant
    rows = {("k = 16", "half"): clear, ("k = 16", "zca"): unclear, ("k = 32", "half"): single}
    plot_differences({"metric ↑": rows, "other ↓": {("k = 32", "zca"): unclear}}, "unused")
    (figure,) = drawn
    axes, other = figure.axes
    labels = {label.get_position()[1]: label.get_text() for label in axes.get_yticklabels()}
    assert [text for _, text in sorted(labels.items())] == [
        "k = 16", "half", "zca", "k = 32", "half", "zca",
    ]  # fmt: skip
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row on top
    _zero, *lines = axes.lines
    markers = [line for line in lines if line.get_marker() == "o"]
    bars = [line for line in lines if line.get_marker() != "o"]
    assert [line.get_xdata()[0] for line in markers] == [clear.mean, unclear.mean, single.mean]
    assert [labels[line.get_ydata()[0]] for line in markers] == ["half", "zca", "half"]
    assert [line.get_markerfacecolor() for line in markers] == ["black", "white", "white"]
    assert [list(b.get_xdata()) for b in bars] == [[d.low, d.high] for d in (clear, unclear)]
    assert len(other.lines) == 3
    assert_nothing_overlaps_or_is_clipped(figure)


def test_probing_scr_and_tpp_are_drawn_against_the_number_of_latents(
    drawn: list[Any],
) -> None:
    numbers = {"sparse_probing": (1, 5), "residual_sparse_probing": (1, 5), "tpp": (2, 100)}
    metrics = {f"{name}_top_{n}": n / 100 for name, ns in numbers.items() for n in ns}
    plot_against_n_latents({"TPP": ("N", {"none": [Point(2, 0.1), Point(100, 0.2)]})}, "unused")
    assert drawn[0].axes[0].get_xlabel() == "N"
    drawn.clear()
    (_, _, draw, panels) = comparison_figures(
        summarise([record("none", s, l0=32, **metrics) for s in (0, 1)])
    )[-1]
    assert draw is plot_against_n_latents
    assert list(panels) == ["sparse probing, k = 32", "TPP, k = 32"]
    label, lines = panels["sparse probing, k = 32"]
    assert label == "latents used, K"
    assert {name: [(p.x, p.y) for p in points] for name, points in lines.items()} == {
        "none": [(1, 0.01), (5, 0.05)],
        "residual channels": [(1, 0.01), (5, 0.05)],
    }
    draw(panels, Path("unused"))
    assert_nothing_overlaps_or_is_clipped(drawn[0])


def test_a_figure_of_nothing_is_refused() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="at least one panel"):
        plot_against_l0({}, "unused.png")


def test_a_group_is_what_its_description_says() -> None:
    group: Group = summarise(RECORDS).groups[0]
    assert math.isnan(group.relative_change("original", "none", "scr_top_20"))
    assert math.isnan(group.relative_change("original", "absent", "kl"))


def test_ticks_stand_at_the_k_that_were_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    # a few tokens had fewer active latents than k
    points = [Point(15.98, 0.5), Point(31.7, 0.6), Point(64.0, 0.7)]
    plot_against_l0({"explained variance": {"none": points}}, "unused.png")
    plot_against_l0({"explained variance": {"none": [Point(2.6, 0.5), Point(13.4, 0.7)]}}, "u")
    trained, measured = (list(figure.axes[0].get_xticks()) for figure in drawn)
    assert trained == [16, 32, 64]
    assert 5 in measured
    assert 3 not in measured
