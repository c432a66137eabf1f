"""Spelling of flags: hyphens or underscores, and suggestions for unknown flags."""

import difflib
import re
from collections.abc import Iterable

__all__ = ["did_you_mean", "flag_of", "known_spelling", "naming_flags"]


def flag_of(name: str) -> str:
    """The flag of a field or of a parsed value.

    >>> flag_of("context_size")
    '--context-size'
    """
    return "--" + name.replace("_", "-")


def known_spelling(argument: str, flags: Iterable[str]) -> str:
    """The argument, with hyphens and underscores as in the flag that it names (if any)."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    by_letters = {flag.replace("-", "_"): flag for flag in flags}
    return by_letters.get(name.replace("-", "_"), name) + equals + value


def did_you_mean(message: str, flags: Iterable[str]) -> str:
    """An ending for an argparse error about an unknown flag: the flag nearest to it, if any."""
    unknown = re.search(r"unrecognized arguments:.*?(--[\w.-]+)", message)
    near = difflib.get_close_matches(unknown[1], list(flags), n=1) if unknown else []
    return f"; did you mean {near[0]}?" if near else ""


def naming_flags(message: str, flags: Iterable[str]) -> str:
    """A message with flags in place of the fields of `WhiteningConfig` that have one.

    >>> naming_flags("set WhiteningConfig(kind='zca')", ["--whitening.kind"])
    'set --whitening.kind zca'
    >>> naming_flags("WhiteningConfig.eps=-1: must be...", ["--whitening.eps"])
    '--whitening.eps=-1: must be...'
    """
    known = set(flags)

    def flag(match: re.Match[str]) -> str:
        name = f"--whitening.{match['field']}"
        if name not in known:
            return match[0]
        value = (match.groupdict().get("value") or "").strip("'\"")
        value = {"True": "true", "False": "false", "None": "none", "...": ""}.get(value, value)
        return f"{name} {value}".rstrip()

    message = re.sub(r"WhiteningConfig\((?P<field>\w+)=(?P<value>[^(),]*)\)", flag, message)
    return re.sub(r"WhiteningConfig\.(?P<field>\w+)", flag, message)
