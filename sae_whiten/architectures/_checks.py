"""Checks of fields that Python would take, and train something else with."""

import math
from typing import Any

__all__ = ["require_number"]


def require_number(cfg: Any, *names: str, whole: bool = False, least: float = 0) -> None:
    """Require fields of a config to be finite numbers, at least `least`; `whole`: integers.

    Raises:
        ValueError: One is not.
    """
    for name in names:
        value = getattr(cfg, name)
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not right or not math.isfinite(value) or value < least:
            kind = "a whole number" if whole else "a finite number"
            raise ValueError(f"{name}={value!r}: must be {kind}, at least {least:g}")
