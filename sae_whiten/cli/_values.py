"""Argument types for argparse, with errors that state the expected value."""

import argparse
import json
from collections.abc import Callable
from typing import Any

__all__ = ["Flattened", "json_object", "positive", "several"]


def several(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of A,B,... as a list."""

    def parse_all(text: str) -> list[Any]:
        return [parse(part) for part in map(str.strip, text.split(",")) if part]

    parse_all.__name__ = f"list of {parse.__name__}"  # argparse prints it for a wrong value
    return parse_all


class Flattened(argparse.Action):
    """With `several` and nargs="+": one list of `A,B`, `A B` and `A, B`.

    Only for commands without positional arguments, which would be taken into the list.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, [value for part in values for value in part])


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
