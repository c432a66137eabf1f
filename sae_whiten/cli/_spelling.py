"""Flags as they may be written: with hyphens or underscores, and what was meant by others."""

import difflib
import re
from collections.abc import Iterable

__all__ = ["did_you_mean", "known_spelling"]


def known_spelling(argument: str, flags: Iterable[str]) -> str:
    """An argument with hyphens or underscores as the flag that it names has them, if it is one."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    by_letters = {flag.replace("-", "_"): flag for flag in flags}
    return by_letters.get(name.replace("-", "_"), name) + equals + value


def did_you_mean(message: str, flags: Iterable[str]) -> str:
    """The flag nearest to the unknown one that an error of argparse is about, as its end."""
    unknown = re.search(r"unrecognized arguments:.*?(--[\w.-]+)", message)
    near = difflib.get_close_matches(unknown[1], list(flags), n=1) if unknown else []
    return f"; did you mean {near[0]}?" if near else ""
