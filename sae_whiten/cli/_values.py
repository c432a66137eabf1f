"""Argument types for argparse, with errors that state the expected value."""

import argparse
import json
from typing import Any

__all__ = ["json_object", "positive"]


def positive(text: str) -> int:
    """A whole number, at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, at least 1")
    return number


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"{text}: not JSON ({error}); in a shell, such as '{{\"name\": 1}}'"
        ) from error
    if not isinstance(parsed, dict):
        raise argparse.ArgumentTypeError(f"{text}: not an object, such as '{{\"name\": 1}}'")
    return parsed
