"""Summarise runs: means, spreads and paired differences at equal sparsity."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from sae_whiten.comparison.paired import (
    PairedDifference,
    compare_metrics,
    interpolate_at,
    measurement_noise,
)
from sae_whiten.evaluation.catalogue import (
    CE_LOSS_SCORE,
    DEAD_LATENTS,
    EXPLAINED_VARIANCE,
    KL,
    L0,
    OF_SEVERAL_SEEDS,
    SAE_PROBES_AUC_AT,
    SCR_AT,
    SCR_DENOMINATOR,
    SPARSE_PROBING_AT,
    STABILITY,
    STABILITY_NULL,
    TPP_AT,
)

__all__ = [
    "BASELINES",
    "MAIN_METRICS",
    "TESTED_METRICS",
    "Group",
    "Spread",
    "Summary",
    "read_metrics",
    "spread",
    "summarise",
]

BASELINES = ("none", "centred")
"""Conditions that all others are compared with; the second shows what centring alone gives."""

MAIN_METRICS = (
    EXPLAINED_VARIANCE,
    L0,
    DEAD_LATENTS,
    STABILITY,
    STABILITY_NULL,
    CE_LOSS_SCORE,
    KL,
    SPARSE_PROBING_AT[1],
    SAE_PROBES_AUC_AT[1],
    SAE_PROBES_AUC_AT[16],
    SCR_AT[20],
    SCR_DENOMINATOR,
    TPP_AT[20],
)
"""The columns of the main tables."""

TESTED_METRICS = (
    EXPLAINED_VARIANCE,
    DEAD_LATENTS,
    CE_LOSS_SCORE,
    KL,
    SPARSE_PROBING_AT[1],
    SAE_PROBES_AUC_AT[1],
    SAE_PROBES_AUC_AT[16],
    SCR_AT[20],
    TPP_AT[20],
)
"""Holm's method corrects the p-values of these metrics together, if measured: one family of tests
for each condition, baseline and group."""

Frame: TypeAlias = Any
"""A `pandas.DataFrame`. Any, because its annotations are too vague for a type checker."""

_SETTING = ["sparsity", "coefficient"]
_RUN = ["hook_name", "architecture", "condition", *_SETTING, "seed"]


class Spread(NamedTuple):
    """Mean and standard deviation (n - 1) of n values; NaN where there are too few."""

    n: int
    mean: float
    sd: float


def spread(values: Iterable[float], metric: str = "") -> Spread:
    """Mean and standard deviation of the values of a metric that are not NaN.

    Those of `OF_SEVERAL_SEEDS` have no deviation.

    >>> spread([1.0, float("nan"), 3.0])
    Spread(n=2, mean=2.0, sd=1.4142135623730951)
    """
    kept = [value for value in values if not math.isnan(value)]
    if not kept:
        return Spread(0, math.nan, math.nan)
    finite = all(map(math.isfinite, kept))
    # the module's sums are exact: equal values have no deviation
    has_sd = finite and len(kept) > 1 and metric not in OF_SEVERAL_SEEDS
    sd = statistics.stdev(kept) if has_sd else math.nan
    return Spread(len(kept), statistics.fmean(kept), sd)


@dataclass(frozen=True)
class Group:
    """Runs of one architecture that are compared at one sparsity.

    Attributes:
        hook_name: The activations; empty if the records do not say.
        architecture: Name of the architecture.
        sparsity: k, or the L0 at which sweeps were interpolated; None if nothing sets it: SAEs are
            then compared at the L0 that they reached.
        interpolated: Whether `sparsity` is the L0 of an interpolation.
        values: A column per metric, and a row per run or interpolated sweep, indexed by condition
            (in the order of the comparison) and seed. NaN: not measured, or outside the sweep.
        repeats: Rows as in `values`; columns (metric, task, seed of the probes) of those tested
            metrics whose measurement was repeated.
        swept: For interpolated groups the lowest and highest measured L0 of each condition, over
            all seeds.
        matched: If `sparsity` is None, the values of other architectures at the L0 of this one,
            interpolated for each condition and seed. Like `values`, with the architecture in the
            index between condition and seed.
        differences: `differences[condition, baseline][metric]`, `condition - baseline` over the
            seeds that both have, Holm's correction over the tested metrics.
    """

    hook_name: str
    architecture: str
    sparsity: float | None
    interpolated: bool
    values: Frame
    repeats: Frame
    swept: dict[str, tuple[float, float]]
    matched: Frame
    differences: dict[tuple[str, str], dict[str, PairedDifference]]

    @property
    def conditions(self) -> list[str]:
        """In the order of the comparison."""
        return list(self.values.index.unique("condition"))

    @property
    def seeds(self) -> list[int]:
        """All seeds of the group, in ascending order."""
        return sorted(self.values.index.unique("seed"))

    def by_seed(self, metric: str) -> Frame:
        """A row per seed, a column per condition; empty if the metric was not measured."""
        if metric not in self.values:
            return pd.DataFrame()
        return self.values[metric].unstack("condition")

    def spread(self, condition: str, metric: str) -> Spread:
        """Over seeds; n is 0 if there is no value."""
        return spread(self.by_seed(metric).get(condition, ()), metric)

    def is_outside(self, condition: str) -> bool:
        """Whether no sweep of the condition reaches the L0 of the group."""
        return self.interpolated and bool(self.values.loc[condition].isna().to_numpy().all())

    def relative_change(self, condition: str, baseline: str, metric: str) -> float:
        """`mean(condition) / mean(baseline) - 1` over the seeds that have both.

        NaN if there is none, or if the baseline's mean is not positive.
        """
        a, b = _pairs(self.by_seed(metric), condition, baseline).mean()
        return float(a / b - 1) if b > 0 else math.nan


@dataclass(frozen=True)
class Summary:
    """Result of `summarise`.

    Attributes:
        conditions: Baselines first, then in the order of the records.
        families: Hook and architecture, in the order of the records.
        metrics: Keys of all metrics that any run has a value of.
        groups: In the order of the families, then by sparsity.
        runs: A row per record: hook_name, architecture, condition, sparsity, coefficient, seed, and
            a column per metric.
    """

    conditions: list[str]
    families: list[tuple[str, str]]
    metrics: list[str]
    groups: list[Group]
    runs: Frame

    def sweep(self, hook_name: str, architecture: str, condition: str) -> Frame:
        """What was measured at every k or coefficient, by ascending L0.

        Returns:
            A row per setting, and columns (metric, "mean") and (metric, "std"), over seeds.
        """
        runs = self._runs_of(hook_name, architecture, condition)
        settings = runs.drop(columns=[*_RUN[:3], "seed"]).groupby(_SETTING, dropna=False)
        points = settings.agg(["mean", "std"])
        return points[points["l0", "mean"].notna()].sort_values(("l0", "mean"))

    def l0_by_coefficient(self, group: Group, condition: str) -> dict[float, list[float]]:
        """L0 of every seed by coefficient, of the sweep of a group's architecture."""
        runs = self._runs_of(group.hook_name, group.architecture, condition)
        return {c: list(at.l0) for c, at in runs.groupby("coefficient")}

    def _runs_of(self, *wanted: str) -> Frame:
        return self.runs[(self.runs[_RUN[:3]] == list(wanted)).all(axis=1)]


def summarise(
    records: Sequence[Mapping[str, Any]], targets: Sequence[float | int] | None = None
) -> Summary:
    """Summarise the runs of a comparison over seeds, at equal sparsity.

    Runs with a k are compared at equal k. Those with a coefficient are sweeps: for every seed each
    metric is interpolated at the target L0 first (`interpolate_at`), then compared. Those with
    neither are compared as they are.

    Args:
        records: One per run, with "architecture", "condition", "seed" and "metrics" (numbers by
            name; None is not measured), "sparsity" (k) or None, "coefficient" or None, and
            "hook_name" if there are several. All else is ignored.
        targets: L0 at which sweeps are compared; the values of k in the records if None. A target
            outside a seed's sweep leaves that seed without a value.

    Raises:
        ValueError: A record lacks a field, has a metric that is not a number, or occurs twice.
    """
    runs, repeats = _runs(records), _repeats(records)
    present = list(dict.fromkeys(runs.condition))
    conditions = [name for name in BASELINES if name in present]
    conditions += [name for name in present if name not in BASELINES]
    if targets is None:
        targets = sorted(runs.sparsity.dropna().unique())
    families = list(dict.fromkeys(zip(runs.hook_name, runs.architecture, strict=True)))
    # everything below keeps this order
    runs = runs.sort_values("seed", kind="stable")
    runs = runs.sort_values("condition", key=lambda c: c.map(conditions.index), kind="stable")
    is_exact, is_swept = runs.sparsity.notna(), runs.sparsity.isna() & runs.coefficient.notna()
    groups: list[Group] = []
    for hook_name, architecture in families:
        at_hook = runs.hook_name == hook_name
        family = at_hook & (runs.architecture == architecture)
        for k, at_k in runs[family & is_exact].groupby("sparsity"):
            groups.append(_group(at_k, _values(at_k), _indexed(at_k, repeats), k))
        swept = runs[family & is_swept]
        for target in targets if len(swept) else []:
            values = _interpolated(swept, _values(swept), target)
            interpolated_repeats = _interpolated(swept, _indexed(swept, repeats), target)
            groups.append(_group(swept, values, interpolated_repeats, float(target)))
        free = runs[family & ~is_exact & ~is_swept]
        if len(free):
            matched = _matched(free, runs[at_hook & (is_exact | is_swept)])
            groups.append(_group(free, _values(free), _indexed(free, repeats), None, matched))
    measured = [key for key in _values(runs) if runs[key].notna().any()]
    return Summary(conditions, families, measured, _with_noise(groups), runs)


def read_metrics(record: Mapping[str, Any], where: str) -> dict[str, float]:
    """The metrics of a record that have a value, `across_seeds` included.

    Raises:
        ValueError: There is no mapping of metrics, or one is not a number; names `where`.
    """
    metrics = record.get("metrics")
    if not isinstance(metrics, Mapping):
        raise ValueError(f"{where} has no 'metrics', a mapping of numbers")
    values = {}
    for name, value in {**metrics, **(record.get("across_seeds") or {})}.items():
        if value is None:
            continue
        if not isinstance(value, int | float):
            raise ValueError(f"{where}: metric {name!r} is {value!r}, not a number")
        if not math.isnan(value):
            values[name] = float(value)
    return values


def _runs(records: Sequence[Mapping[str, Any]]) -> Frame:
    """`Summary.runs` in the order of the records; main and tested metrics always have a column."""
    rows = []
    for i, record in enumerate(records):
        for field in ("architecture", "condition", "seed"):
            if record.get(field) is None:
                raise ValueError(f"record {i} has no {field!r}; it has {', '.join(record)}")
        run = {field: record.get(field) for field in _RUN}
        rows.append({**run, **read_metrics(record, f"record {i}")})
    usual = [metric.key for metric in (*MAIN_METRICS, *TESTED_METRICS)]
    columns = dict.fromkeys([*_RUN, *(key for row in rows for key in row), *usual])
    runs: Frame = pd.DataFrame(rows, columns=list(columns))
    runs["hook_name"] = runs.hook_name.fillna("")
    numbers = [name for name in columns if name in _SETTING or name not in _RUN]
    runs[numbers] = runs[numbers].astype(float)
    for i in runs.index[runs.duplicated(_RUN)]:
        run = ", ".join(f"{field} {records[i].get(field)}" for field in _RUN[1:])
        raise ValueError(f"record {i} repeats {run}: one run cannot count twice")
    return runs


def _repeats(records: Sequence[Mapping[str, Any]]) -> Frame:
    """`Group.repeats` of all records, in their order."""
    rows = [
        {
            (metric.key, task, i): value
            for metric in TESTED_METRICS
            for task, values in (record.get("repeats") or {}).get(metric.key, {}).items()
            for i, value in enumerate(values)
        }
        for record in records
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    repeats = pd.DataFrame(
        [[row.get(key, math.nan) for key in columns] for row in rows], dtype=float
    )
    levels = zip(*columns, strict=True) if columns else [[], [], []]
    repeats.columns = pd.MultiIndex.from_arrays(list(levels), names=["metric", "task", "repeat"])
    return repeats


def _indexed(runs: Frame, repeats: Frame) -> Frame:
    """The rows of `repeats` that belong to `runs`, indexed by condition and seed."""
    index = pd.MultiIndex.from_frame(runs[["condition", "seed"]])
    return repeats.loc[runs.index].set_axis(index, axis=0)


def _values(runs: Frame) -> Frame:
    """`Group.values` of runs that are compared as they are."""
    return runs.set_index(["condition", "seed"]).drop(columns=[*_RUN[:2], *_SETTING])


def _group(
    runs: Frame,
    values: Frame,
    repeats: Frame,
    sparsity: float | None,
    matched: Frame | None = None,
) -> Group:
    """The group of these runs, which are of one architecture; `values` are at this sparsity."""
    interpolated = sparsity is not None and bool(runs.sparsity.isna().all())
    swept: dict[str, tuple[float, float]] = {}
    if interpolated:
        ranges = runs.groupby("condition", sort=False).l0.agg(["min", "max"]).dropna()
        swept = {name: (low, high) for name, low, high in ranges.itertuples()}
    present = list(values.index.unique("condition"))
    return Group(
        hook_name=runs.hook_name.iloc[0],
        architecture=runs.architecture.iloc[0],
        sparsity=sparsity,
        interpolated=interpolated,
        values=values,
        repeats=repeats,
        swept=swept,
        matched=_matched(runs.iloc[:0], runs) if matched is None else matched,
        differences={
            (name, baseline): _differences(values, repeats, name, baseline)
            for i, baseline in enumerate(BASELINES)
            for name in present
            # the baselines themselves are compared once
            if baseline in present and name not in BASELINES[: i + 1]
        },
    )


def _interpolated(sweeps: Frame, values: Frame, l0: float | int) -> Frame:
    """Values interpolated at an L0: a row for every condition and seed, ordered as the runs."""
    by_run = {
        run: _at_l0(values.iloc[rows], sweeps.l0.iloc[rows], l0)
        for run, rows in sweeps.groupby(["condition", "seed"], sort=False).indices.items()
    }
    return _stacked(by_run, ["condition", "seed"], values.columns)


def _matched(runs: Frame, others: Frame) -> Frame:
    """`Group.matched`: the sweeps of `others`, interpolated at the L0 of each of `runs`."""
    by_run = {
        (run.condition, architecture, run.seed): _at_l0(_values(sweep), sweep.l0, run.l0)
        for run in runs.itertuples()
        for architecture, sweep in others[
            (others.condition == run.condition) & (others.seed == run.seed)
        ].groupby("architecture", sort=False)
    }
    return _stacked(by_run, ["condition", "architecture", "seed"], _values(others).columns)


def _stacked(rows: Mapping[Any, Mapping[Any, float]], index: list[str], columns: Any) -> Frame:
    frame = pd.DataFrame(list(rows.values()), columns=columns, dtype=float)
    return frame.set_index(pd.MultiIndex.from_tuples(list(rows), names=index))


def _at_l0(values: Frame, l0s: Frame, l0: float | int) -> dict[Any, float]:
    """Every column of one seed's sweep, at an L0; NaN if the sweep does not reach it."""
    if not 0 < l0 < math.inf:
        return {}
    interpolated = {
        key: interpolate_at(l0s.to_numpy(), values[key].to_numpy(), l0) for key in values
    }
    # L0 itself, interpolated linearly in log L0, would be wrong
    if not math.isnan(interpolated.get("l0", math.nan)):
        interpolated["l0"] = float(l0)
    return interpolated


def _differences(
    values: Frame, repeats: Frame, condition: str, baseline: str
) -> dict[str, PairedDifference]:
    pairs: dict[str, Any] = {}
    for metric in TESTED_METRICS:
        by_seed = values[metric.key].unstack("condition")
        both = _pairs(by_seed, condition, baseline)
        by_task = _by_task(repeats, metric.key, condition, baseline)
        if by_task is not None and by_task[0].shape[1] > 1:
            pairs[metric.key] = tuple(means.mean(2) for means in by_task)
        # an infinite KL divergence can be reported, but has no difference
        elif len(both) and np.isfinite(both.to_numpy()).all():
            pairs[metric.key] = (both[condition].to_numpy(), both[baseline].to_numpy())
    return compare_metrics(pairs)


def _by_task(
    repeats: Frame, key: str, condition: str, baseline: str
) -> tuple[Float[ndarray, "s t r"], Float[ndarray, "s t r"]] | None:
    """Values of both conditions by seed, task and seed of the probes.

    Only seeds, tasks and repeats that both have; None if there are none.
    """
    if key not in repeats.columns.unique("metric"):
        return None
    present = repeats.index.unique("condition")
    if condition not in present or baseline not in present:
        return None
    a, b = (repeats[key].loc[name].dropna(how="all") for name in (condition, baseline))
    seeds = a.index.intersection(b.index)
    a, b = a.loc[seeds], b.loc[seeds]
    both = (a.notna() & b.notna()).all(axis=0)
    n_tasks, n_repeats = (len(both.index[both].unique(level)) for level in ("task", "repeat"))
    if not len(seeds) or not both.any() or both.sum() != n_tasks * n_repeats:
        return None
    shape = len(seeds), n_tasks, n_repeats
    return tuple(x.loc[:, both].sort_index(axis=1).to_numpy().reshape(shape) for x in (a, b))


def _with_noise(groups: Sequence[Group]) -> list[Group]:
    """Add each metric's noise of measurement, pooled over all pairs, to all differences."""
    repeated: dict[str, list[Any]] = {}
    for group in groups:
        for pair, by_metric in group.differences.items():
            for key in by_metric:
                by_task = _by_task(group.repeats, key, *pair)
                if by_task is not None:
                    repeated.setdefault(key, []).append((by_task[0] - by_task[1]).mean((0, 1)))
    noise = {key: measurement_noise(rows) for key, rows in repeated.items()}
    return [
        replace(
            group,
            differences={
                pair: {
                    key: replace(difference, noise=noise.get(key, math.nan))
                    for key, difference in by_metric.items()
                }
                for pair, by_metric in group.differences.items()
            },
        )
        for group in groups
    ]


def _pairs(by_seed: Frame, condition: str, baseline: str) -> Frame:
    """Values of two conditions, for the seeds that have both."""
    return by_seed.reindex(columns=[condition, baseline]).dropna()
