"""Sparsity coefficients that bring a sweep to the L0 that SAEs are to be compared at."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sae_whiten.comparison.plan import Arm, Comparison, arms

__all__ = ["adapted_arms", "lacking_coefficient"]

_CLOSE = 2.0  # neighbours whose L0 differ by no more than this factor are interpolated between
_STEP = 4.0  # beyond the ends of a sweep


def lacking_coefficient(
    coefficients: Sequence[float], l0s: Sequence[Sequence[float]], target: float
) -> float | None:
    """The coefficient to add to a sweep so that it has an L0 close to the target on both sides.

    This has to hold for every seed, because each is interpolated on its own. Neighbours are close
    enough if their L0 differ by at most a factor of 2. L0 is assumed to fall with the coefficient.

    Args:
        coefficients: Of the sweep, in any order; not 0.
        l0s: For each the L0 of every seed.
        target: The wanted L0.

    Returns:
        Between two neighbours, a coefficient by linear interpolation of log L0 in the log of the
        coefficient. Beyond the sweep, a fourth or four times its end. None if nothing is lacking.
    """
    for of_seed in zip(*l0s, strict=False):
        sweep = sorted((c, l0) for c, l0 in zip(coefficients, of_seed, strict=True) if c > 0)
        found = _lacking(sweep, target)
        if found is not None:
            return found
    return None


def _lacking(sweep: Sequence[tuple[float, float]], target: float) -> float | None:
    """`lacking_coefficient` of one seed, whose sweep is in ascending order of coefficients."""
    above = [(c, l0) for c, l0 in sweep if l0 >= target]
    below = [(c, l0) for c, l0 in sweep if l0 <= target]
    if not above:
        return _rounded(sweep[0][0] / _STEP) if sweep else None
    if not below:
        return _rounded(sweep[-1][0] * _STEP)
    (left, l0_left), (right, l0_right) = above[-1], below[0]
    if left >= right or (l0_right > 0 and l0_left / l0_right <= _CLOSE):
        return None
    share = 0.5
    if l0_right > 0:
        share = math.log(l0_left / target) / math.log(l0_left / l0_right)
    # not where one is already
    share = min(max(share, 0.1), 0.9)
    found = _rounded(left ** (1 - share) * right**share)
    return None if found in (left, right) else found


def adapted_arms(comparison: Comparison, records: Sequence[Mapping[str, Any]]) -> list[Arm]:
    """SAEs to train beside those of the records, so that every sweep has the wanted L0 inside.

    Args:
        comparison: That they are of.
        records: Of what has been trained; all seeds have the same SAEs.
    """
    found: dict[Arm, None] = {}
    for architecture, condition in dict.fromkeys(
        (arm.architecture, arm.condition) for arm in arms(comparison) if arm.coefficient is not None
    ):
        sweep: dict[float, list[float]] = {}
        for record in records:
            if (record["architecture"], record["condition"]) == (architecture, condition):
                sweep.setdefault(record["coefficient"], []).append(record["metrics"]["l0"])
        for target in comparison.sparsity:
            coefficient = lacking_coefficient(list(sweep), list(sweep.values()), target)
            if coefficient is not None:
                found[Arm(architecture, condition, coefficient=coefficient)] = None
    return list(found)


def _rounded(coefficient: float) -> float:
    """To three digits, which its folder is named by."""
    return float(f"{coefficient:.3g}")
