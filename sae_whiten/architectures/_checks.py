"""Checks of fields that Python would take, and train something else with."""

from typing import Any

from sae_whiten import _checks

__all__ = ["require_number"]


def require_number(cfg: Any, *names: str, whole: bool = False, least: float = 0) -> None:
    """Require fields of a config to be finite numbers, at least `least`; `whole`: integers.

    Raises:
        FieldError: One is not.
    """
    for name in names:
        _checks.require_number(name, getattr(cfg, name), least, whole=whole)
