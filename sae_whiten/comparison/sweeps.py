"""Sparsity coefficients to add to a sweep, so that it covers the L0 at which SAEs are compared."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sae_whiten.comparison.plan import Arm, Comparison, arms

__all__ = ["adapted_arms", "lacking_coefficient"]

# coarser than lenses/synthetic/experiment.py: here a coefficient costs an SAE of every seed, and
# there are only a few rounds
_CLOSE = 2.0  # interpolation is between neighbours whose L0 differ by at most this factor
_STEP = 4.0  # factor by which a sweep is extended beyond its ends


def lacking_coefficient(
    coefficients: Sequence[float], l0s: Sequence[Sequence[float]], target: float
) -> float | None:
    """The coefficient to add to a sweep so that it has an L0 close to the target on both sides.

    This has to hold for every seed, because each is interpolated on its own. Neighbours are close
    enough if their L0 differ by at most a factor of 2. L0 is assumed to fall with the coefficient.

    Args:
        coefficients: Of the sweep, in any order; not 0.
        l0s: For each coefficient, the L0 of every seed.
        target: The wanted L0.

    Returns:
        Between two neighbours, a coefficient by linear interpolation of log L0 in the log of the
        coefficient. Beyond the sweep, a quarter of its lowest or four times its highest
        coefficient. None if nothing is lacking.
    """
    for of_seed in zip(*l0s, strict=False):
        sweep = sorted((c, l0) for c, l0 in zip(coefficients, of_seed, strict=True) if c > 0)
        lacking = _lacking(sweep, target)
        if lacking is not None:
            return lacking
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
    # not too close to a neighbour
    share = min(max(share, 0.1), 0.9)
    coefficient = _rounded(left ** (1 - share) * right**share)
    return None if coefficient in (left, right) else coefficient


def adapted_arms(comparison: Comparison, records: Sequence[Mapping[str, Any]]) -> list[Arm]:
    """SAEs to train beside those of the records, so that every sweep encloses the wanted L0.

    Args:
        comparison: The comparison that they belong to.
        records: Records of the SAEs trained so far; all seeds have the same SAEs.
    """
    added: dict[Arm, None] = {}
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
                added[Arm(architecture, condition, coefficient=coefficient)] = None
    return list(added)


def _rounded(coefficient: float) -> float:
    """To three significant digits, as in the name of its folder."""
    return float(f"{coefficient:.3g}")
