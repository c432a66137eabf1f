"""From the records of single runs to means, spreads and paired differences at equal sparsity."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from sae_whiten.comparison.paired import PairedDifference, compare_metrics, interpolate_at

__all__ = [
    "BASELINES",
    "MAIN_METRICS",
    "TESTED_METRICS",
    "Comparison",
    "Group",
    "Metric",
    "Spread",
    "SweepPoint",
    "read_metrics",
    "spread",
    "summarise",
]

BASELINES = ("none", "centred")
"""Conditions that all others are compared with; the second shows what centring alone gives."""


class Metric(NamedTuple):
    """How a metric is called and read.

    Attributes:
        key: Its name in a record.
        name: In words.
        better: 1 if more is better, -1 if less is, 0 if neither.
        decimals: Fewest decimals that it is printed with.
    """

    key: str
    name: str
    better: int
    decimals: int


MAIN_METRICS = (
    Metric("explained_variance", "explained variance", 1, 3),
    Metric("l0", "L0", 0, 1),
    Metric("dead_latents", "dead latents", -1, 1),
    Metric("ce_loss_score", "CE loss score", 1, 3),
    Metric("kl", "KL divergence", -1, 3),
    Metric("sparse_probing_top_1", "sparse probing top 1", 1, 3),
    Metric("scr_top_20", "SCR top 20", 1, 3),
    Metric("scr_denominator", "SCR denominator", 0, 3),
    Metric("tpp_top_20", "TPP top 20", 1, 3),
)

TESTED_METRICS = tuple(metric for metric in MAIN_METRICS if metric.better)
"""One family of tests: these metrics, for one condition against one baseline, in one group."""


class Spread(NamedTuple):
    """Mean and standard deviation (n - 1) of n values; NaN where there are too few."""

    n: int
    mean: float
    sd: float


class SweepPoint(NamedTuple):
    """One setting of sparsity: spread over seeds of L0 and of the metrics, by key."""

    l0: Spread
    metrics: dict[str, Spread]


def spread(values: Iterable[float]) -> Spread:
    """Mean and standard deviation of the values that are not NaN."""
    kept = [value for value in values if not math.isnan(value)]
    if not kept:
        return Spread(0, math.nan, math.nan)
    finite = all(map(math.isfinite, kept))
    sd = stdev(kept) if finite and len(kept) > 1 else math.nan
    return Spread(len(kept), fmean(kept), sd)


@dataclass(frozen=True)
class Group:
    """Runs of one architecture that are compared at one sparsity.

    Attributes:
        hook_name: The activations, if the records say so.
        architecture: Name of the architecture.
        sparsity: k, or the L0 at which sweeps were interpolated; None where nothing sets it, and
            SAEs are compared at the L0 that they came to.
        interpolated: Whether it is an L0.
        seeds: All seeds of the group, in ascending order.
        values: `values[condition][metric][seed]`; metrics and seeds without a value are absent.
            Conditions are in the order of the comparison.
        swept: For interpolated groups the lowest and highest L0 that any seed of a condition had.
        differences: `differences[condition, baseline][metric]`, `condition - baseline` over the
            seeds that both have, Holm's correction over the tested metrics.
        matched: Where `sparsity` is None, `matched[condition, architecture][metric][seed]`: other
            architectures under the same conditions, every seed's SAEs interpolated at the L0 that
            this one's SAE of that seed and condition came to.
    """

    hook_name: str | None
    architecture: str
    sparsity: float | None
    interpolated: bool
    seeds: tuple[int, ...]
    values: dict[str, dict[str, dict[int, float]]]
    swept: dict[str, tuple[float, float]]
    differences: dict[tuple[str, str], dict[str, PairedDifference]]
    matched: dict[tuple[str, str], dict[str, dict[int, float]]]

    def spread(self, condition: str, metric: str) -> Spread:
        """Over seeds; n is 0 if there is no value."""
        return spread(self.values[condition].get(metric, {}).values())

    def relative_change(self, condition: str, baseline: str, metric: str) -> float:
        """`mean(condition) / mean(baseline) - 1` over the seeds that have both.

        NaN if there is none, or if the baseline's mean is not positive.
        """
        a, b = (self.values.get(name, {}).get(metric, {}) for name in (condition, baseline))
        seeds = a.keys() & b.keys()
        if not seeds or not fmean(b[seed] for seed in seeds) > 0:
            return math.nan
        return fmean(a[seed] for seed in seeds) / fmean(b[seed] for seed in seeds) - 1


@dataclass(frozen=True)
class Comparison:
    """Result of `summarise`.

    Attributes:
        conditions: Baselines first, then in the order of the records.
        metrics: Keys of all metrics that any run has a value of.
        groups: By hook and architecture in the order of the records, then by sparsity.
        sweeps: `sweeps[hook_name, architecture][condition]`: what was measured at every k or
            coefficient, by ascending L0.
    """

    conditions: tuple[str, ...]
    metrics: tuple[str, ...]
    groups: tuple[Group, ...]
    sweeps: dict[tuple[str | None, str], dict[str, list[SweepPoint]]]


class _Run(NamedTuple):
    hook_name: str | None
    architecture: str
    condition: str
    sparsity: float | None
    coefficient: float | None
    seed: int
    metrics: dict[str, float]

    @property
    def is_as_it_comes(self) -> bool:
        """Whether nothing sets its sparsity."""
        return self.sparsity is None and self.coefficient is None


def summarise(
    records: Sequence[Mapping[str, Any]], targets: Sequence[float | int] | None = None
) -> Comparison:
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
    runs = [_read_run(record, i) for i, record in enumerate(records)]
    seen: set[tuple[object, ...]] = set()
    for i, run in enumerate(runs):
        if run[:-1] in seen:
            raise ValueError(
                f"record {i} repeats {run.architecture}, {run.condition}, sparsity {run.sparsity}, "
                f"coefficient {run.coefficient}, seed {run.seed}: one run cannot count twice"
            )
        seen.add(run[:-1])
    if targets is None:
        targets = sorted({run.sparsity for run in runs if run.sparsity is not None})
    found = list(dict.fromkeys(run.condition for run in runs))
    conditions = [name for name in BASELINES if name in found]
    conditions += [name for name in found if name not in BASELINES]
    groups: list[Group] = []
    sweeps = {}
    for hook_name, architecture in dict.fromkeys(run[:2] for run in runs):
        family = [run for run in runs if run[:2] == (hook_name, architecture)]
        for k in sorted({run.sparsity for run in family if run.sparsity is not None}):
            groups.append(_group([run for run in family if run.sparsity == k], conditions, k))
        swept = [run for run in family if run.sparsity is None and run.coefficient is not None]
        if swept:
            groups += [_group(swept, conditions, target) for target in targets]
        as_they_are = [run for run in family if run.is_as_it_comes]
        if as_they_are:
            others = [run for run in runs if run.hook_name == hook_name and not run.is_as_it_comes]
            groups.append(_group(as_they_are, conditions, None, others))
        sweeps[hook_name, architecture] = _sweep_points(family, conditions)
    metrics = dict.fromkeys(metric for run in runs for metric in run.metrics)
    return Comparison(tuple(conditions), tuple(metrics), tuple(groups), sweeps)


def read_metrics(record: Mapping[str, Any], where: str) -> dict[str, float]:
    """The metrics of a record that have a value.

    Raises:
        ValueError: There is no mapping of metrics, or one is not a number; names `where`.
    """
    metrics = record.get("metrics")
    if not isinstance(metrics, Mapping):
        raise ValueError(f"{where} has no 'metrics', a mapping of numbers")
    values = {}
    for name, value in metrics.items():
        if value is None:
            continue
        if not isinstance(value, int | float):
            raise ValueError(f"{where}: metric {name!r} is {value!r}, not a number")
        if not math.isnan(value):
            values[name] = float(value)
    return values


def _read_run(record: Mapping[str, Any], i: int) -> _Run:
    for field in ("architecture", "condition", "seed"):
        if record.get(field) is None:
            raise ValueError(f"record {i} has no {field!r}; it has {', '.join(record)}")
    sparsity, coefficient = record.get("sparsity"), record.get("coefficient")
    return _Run(
        hook_name=record.get("hook_name"),
        architecture=record["architecture"],
        condition=record["condition"],
        sparsity=None if sparsity is None else float(sparsity),
        coefficient=None if coefficient is None else float(coefficient),
        seed=record["seed"],
        metrics=read_metrics(record, f"record {i}"),
    )


def _group(
    runs: Sequence[_Run],
    conditions: Sequence[str],
    sparsity: float | int | None,
    others: Sequence[_Run] = (),
) -> Group:
    """Of runs that have a k, `sparsity`, or are interpolated at it, or, if it is None, neither."""
    target = sparsity if runs[0].sparsity is None else None
    present = [name for name in conditions if any(run.condition == name for run in runs)]
    by_condition = {name: [run for run in runs if run.condition == name] for name in present}
    values: dict[str, dict[str, dict[int, float]]] = {}
    swept = {}
    for name, members in by_condition.items():
        values[name] = {}
        for seed in sorted({run.seed for run in members}):
            of_seed = [run for run in members if run.seed == seed]
            found = of_seed[0].metrics if target is None else _at_l0(of_seed, target)
            for metric, value in found.items():
                values[name].setdefault(metric, {})[seed] = value
        l0s = [run.metrics["l0"] for run in members if "l0" in run.metrics]
        if target is not None and l0s:
            swept[name] = (min(l0s), max(l0s))
    return Group(
        hook_name=runs[0].hook_name,
        architecture=runs[0].architecture,
        sparsity=None if sparsity is None else float(sparsity),
        interpolated=target is not None,
        seeds=tuple(sorted({run.seed for run in runs})),
        values=values,
        swept=swept,
        differences={
            (name, baseline): _differences(values[name], values[baseline])
            for baseline in BASELINES
            for name in present
            # the baselines themselves are compared once
            if baseline in present and name not in BASELINES[: BASELINES.index(baseline) + 1]
        },
        matched=_matched(runs, others),
    )


def _at_l0(runs: Sequence[_Run], target: float | int) -> dict[str, float]:
    """Metrics of one seed's sweep at an L0; empty if the sweep does not reach it."""
    l0s = [run.metrics.get("l0", math.nan) for run in runs]
    at_target = {}
    for metric in dict.fromkeys(metric for run in runs for metric in run.metrics):
        points = [run.metrics.get(metric, math.nan) for run in runs]
        value = interpolate_at(l0s, points, target)
        if not math.isnan(value):
            # a straight line in log L0 does not give back L0 itself
            at_target[metric] = float(target) if metric == "l0" else value
    return at_target


def _matched(
    runs: Sequence[_Run], others: Sequence[_Run]
) -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    """`Group.matched` of these runs; without values where no other run is on either side."""
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for run in runs:
        alike = [o for o in others if (o.condition, o.seed) == (run.condition, run.seed)]
        for architecture in dict.fromkeys(other.architecture for other in alike):
            values = found.setdefault((run.condition, architecture), {})
            l0 = run.metrics.get("l0", math.nan)
            if not 0 < l0 < math.inf:
                continue
            at_l0 = _at_l0([other for other in alike if other.architecture == architecture], l0)
            for metric, value in at_l0.items():
                values.setdefault(metric, {})[run.seed] = value
    return found


def _differences(
    values: Mapping[str, Mapping[int, float]], baseline: Mapping[str, Mapping[int, float]]
) -> dict[str, PairedDifference]:
    pairs = {}
    for key, *_ in TESTED_METRICS:
        a, b = values.get(key, {}), baseline.get(key, {})
        seeds = sorted(a.keys() & b.keys())
        first, second = [a[seed] for seed in seeds], [b[seed] for seed in seeds]
        # an infinite KL divergence can be reported, but has no difference
        if seeds and all(map(math.isfinite, first + second)):
            pairs[key] = (first, second)
    return compare_metrics(pairs)


def _sweep_points(runs: Sequence[_Run], conditions: Sequence[str]) -> dict[str, list[SweepPoint]]:
    points: dict[str, list[SweepPoint]] = {}
    for name in conditions:
        members = [run for run in runs if run.condition == name]
        for setting in dict.fromkeys((run.sparsity, run.coefficient) for run in members):
            at_setting = [r for r in members if (r.sparsity, r.coefficient) == setting]
            keys = dict.fromkeys(metric for run in at_setting for metric in run.metrics)
            spreads = {
                key: spread(run.metrics.get(key, math.nan) for run in at_setting) for key in keys
            }
            if "l0" in spreads:
                points.setdefault(name, []).append(SweepPoint(spreads["l0"], spreads))
    return {name: sorted(found, key=lambda p: p.l0.mean) for name, found in points.items()}
