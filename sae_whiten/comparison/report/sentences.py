"""What the tests of a comparison say about two conditions, in sentences."""

import math

from sae_whiten.comparison.paired import FEWEST_SEEDS, PairedDifference
from sae_whiten.comparison.report.document import code
from sae_whiten.comparison.report.wording import decimals_of, listed, p_text, sparsity_text
from sae_whiten.comparison.summary import TESTED_METRICS, Group, Summary
from sae_whiten.comparison.sweeps import lacking_coefficient
from sae_whiten.evaluation.catalogue import Metric

__all__ = ["describe_difference", "sparsity_warning"]

_L0_TOLERANCE = 0.05  # relative; beyond it, the report says that sparsities differ


def describe_difference(group: Group, condition: str, baseline: str) -> str:
    """What the tests say about two conditions of a group, in one or a few sentences.

    Args:
        group: Of `Summary.groups`.
        condition: The condition.
        baseline: The baseline that it is compared with. `group.differences` has the pair.
    """
    found = group.differences[condition, baseline]
    pair = f"{code(condition)} and {code(baseline)}"
    for name in (condition, baseline):
        if group.is_outside(name):
            return (
                f"{pair} are not compared: no sweep of {code(name)} reaches {sparsity_text(group)}."
            )
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
                else f"{difference.mean:+.{metric.decimals}f} in every seed, so chance cannot be "
                "judged"
            )
            untested.append(f"{metric.name} ({reason})")
        else:
            not_significant.append(metric.name)
    n = max((d.n_pairs for d in found.values()), default=0)
    sentences = []
    if significant:
        sentences.append(
            f"Over {n} seeds, {code(condition)} has, compared with {code(baseline)}, "
            f"{listed(significant)}."
        )
        if not_significant:
            sentences.append(f"No significant difference in {listed(not_significant)}.")
    elif not_significant:
        seeds = "1 seed" if n == 1 else f"{n} seeds"
        sentences.append(
            f"Over {seeds}, {pair} do not differ significantly in {listed(not_significant)}."
        )
    else:
        sentences.append(f"{pair}: nothing could be tested.")
    if untested:
        sentences.append(f"Not tested: {listed(untested)}.")
    return " ".join(sentences)


def _describe_significant(difference: PairedDifference, metric: Metric) -> str:
    sign = 1 if difference.mean > 0 else -1
    more = (("fewer", "more") if metric.is_count else ("lower", "higher"))[sign > 0]
    better = "better" if sign * metric.better > 0 else "worse"
    decimals = decimals_of(difference, metric)
    low, high = sorted((sign * difference.low, sign * difference.high))
    return (
        f"{more} {metric.name} by {abs(difference.mean):.{decimals}f} "
        f"({better}; 95% CI {low:.{decimals}f} to {high:.{decimals}f}, "
        f"{p_text(difference.p_adjusted)})"
    )


def _why_not_compared(group: Group, condition: str, baseline: str, metric: str) -> str | None:
    """Why a metric that one of the two has was not compared; None if neither has it."""
    by_seed = group.by_seed(metric).reindex(columns=[condition, baseline])
    if by_seed.isna().to_numpy().all():
        return None
    return "infinite in some runs" if len(by_seed.dropna()) else "no seed has it in both"


def sparsity_warning(group: Group, summary: Summary) -> str | None:
    """How L0 was made equal, or a warning that it differs; None if there is nothing to say."""
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
                l0s = summary.l0_by_coefficient(group, name)
                missing.append(lacking_coefficient(list(l0s), list(l0s.values()), group.sparsity))
        text = (
            "Interpolated in each seed's sweep, linear in log L0 between the two nearest SAEs. "
            "This is coarse where they are far apart in the figure against L0."
        )
        if gaps:
            text += f" Not all sweeps reach {sparsity_text(group)}: {'; '.join(gaps)}."
            tries = sorted({f"{c:g}" for c in missing if c is not None}, key=float)
            if tries:
                text += (
                    f" Raise sweep_rounds, or give coefficients such as {', '.join(tries)} in "
                    "another folder."
                )
        return text
    l0s = {name: group.spread(name, "l0").mean for name in group.conditions}
    l0s = {name: mean for name, mean in l0s.items() if not math.isnan(mean)}
    if not l0s or max(l0s.values()) <= (1 + _L0_TOLERANCE) * min(l0s.values()):
        return None
    low, high = min(l0s, key=l0s.__getitem__), max(l0s, key=l0s.__getitem__)
    why = "At equal k" if group.sparsity is not None else "Nothing sets their sparsity, and"
    return (
        f"{why} these SAEs are not equally sparse: L0 is {l0s[low]:.3g} for {code(low)} and "
        f"{l0s[high]:.3g} for {code(high)}. This alone moves the other metrics."
    )
