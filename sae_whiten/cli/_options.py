"""Flags from the fields of a dataclass: type, default, and the string under the field as help."""

import argparse
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, get_type_hints

from simple_parsing.docstring import get_attribute_docstring

from sae_whiten.cli._values import json_object

__all__ = ["add_options", "help_of"]


def add_options(
    parser: argparse.ArgumentParser,
    options: type,
    *,
    without: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Add a flag for every field of a dataclass; the parsed value has the name of the field.

    Args:
        parser: Receives the flags.
        options: The dataclass. Fields without a default are required.
        without: Fields that get none.
        renamed: Names of flags that differ from those of their fields, by field.
    """
    annotations = get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name in without:
            continue
        name = (renamed or {}).get(field.name, field.name)
        told, kwargs = help_of(options, field.name), dict(_PARSERS[annotations[field.name]])
        if field.default_factory is not dataclasses.MISSING:
            kwargs["default"] = field.default_factory()
        elif field.default is dataclasses.MISSING:
            kwargs["required"] = True
        else:
            kwargs["default"] = field.default
            if field.default is not None:
                values = field.default if isinstance(field.default, tuple) else [field.default]
                told += f" (default: {','.join(map(str, values))})"
        help = told.replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", dest=field.name, help=help, **kwargs)


def help_of(options: type, field: str) -> str:
    """The string under a field of a dataclass, on one line and without its full stop."""
    told = get_attribute_docstring(options, field).docstring_below
    return " ".join(told.split()).removesuffix(".")


def _several(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A,B,... as a list."""

    def parse_all(text: str) -> list[Any]:
        return [parse(part) for part in map(str.strip, text.split(",")) if part]

    parse_all.__name__ = f"list of {parse.__name__}"  # argparse names it where a value is wrong
    return parse_all


_PARSERS: dict[Any, dict[str, Any]] = {
    str: {},
    bool: {"action": argparse.BooleanOptionalAction},
    int: {"type": int, "metavar": "N"},
    int | None: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    Sequence[str]: {"type": _several(str), "metavar": "A,B,..."},
    Sequence[int]: {"type": _several(int), "metavar": "N,N,..."},
    Sequence[float]: {"type": _several(float), "metavar": "X,X,..."},
    Mapping[str, Mapping[str, Any]]: {"type": json_object, "metavar": "JSON"},
}
"""How a flag is parsed, by the annotation of its field."""
