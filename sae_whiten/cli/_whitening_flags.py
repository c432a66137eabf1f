"""The flags --whitening.* of commands that whiten, one for each field of `WhiteningConfig`."""

import argparse
import contextlib
import dataclasses
import types
from collections.abc import Callable, Collection
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sae_whiten.cli._options import help_of
from sae_whiten.config import WhiteningConfig

__all__ = ["PREFIX", "add_whitening_arguments", "given_fields"]

PREFIX = "--whitening."


def add_whitening_arguments(
    parser: argparse.ArgumentParser, names: Collection[str] | None = None
) -> None:
    """Add a flag for each of the named fields. None: all fields."""
    group = parser.add_argument_group("whitening")
    annotations = get_type_hints(WhiteningConfig)
    for field in dataclasses.fields(WhiteningConfig):
        if names is not None and field.name not in names:
            continue
        parse, expected = _value_parser(annotations[field.name])
        default = "none" if field.default is None else field.default
        told = help_of(WhiteningConfig, field.name, brief=True)
        group.add_argument(
            PREFIX + field.name,
            type=parse,
            # absent unless given, so that resuming knows which settings the user has asked for
            default=argparse.SUPPRESS,
            metavar=expected,
            help=f"{told} (default: {default})".replace("%", "%%"),
        )


def given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `WhiteningConfig` that the command line sets."""
    prefix = PREFIX.removeprefix("--")
    return {k.removeprefix(prefix): v for k, v in vars(args).items() if k.startswith(prefix)}


def _value_parser(annotation: Any) -> tuple[Callable[[str], Any], str]:
    """A parser of a flag's text to a value of the annotated type, and the values it accepts."""
    is_union = get_origin(annotation) in (Union, types.UnionType)
    members = get_args(annotation) if is_union else (annotation,)
    literals: dict[str, Any] = {}
    numbers: list[Callable[[str], Any]] = []
    for member in members:
        if member is type(None):
            literals["none"] = None
        elif member is bool:
            literals.update({"true": True, "false": False})
        elif get_origin(member) is Literal:
            literals.update({str(value): value for value in get_args(member)})
        else:
            numbers.append(member)
    expected = "|".join([*(number.__name__.upper() for number in numbers), *literals])

    def parse(text: str) -> Any:
        if text.lower() in literals:
            return literals[text.lower()]
        for number in numbers:
            with contextlib.suppress(ValueError):
                return number(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {expected}")

    return parse, expected
