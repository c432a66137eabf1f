"""Flags from the fields of a dataclass: type, default, and the string under the field as help."""

import argparse
import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from simple_parsing.docstring import get_attribute_docstring

from sae_whiten.cli._spelling import flag_of
from sae_whiten.cli._values import Flattened, json_object, several

__all__ = ["add_options", "given_options", "help_of", "options_from"]

T = TypeVar("T")


def add_options(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    options: type,
    *,
    only: Collection[str] | None = None,
    without: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
    absent_by_default: bool = False,
) -> None:
    """Add a flag for every field of a dataclass. The parsed value has the name of the field.

    Args:
        parser: Receives the flags.
        options: The dataclass. Fields without a default become required flags.
        only: Fields that get a flag. None: all.
        without: Fields that get no flag.
        renamed: Flag names that differ from the field name, by field.
        absent_by_default: Whether flags that are not given are missing from the parsed values. The
            command can then tell them from flags set to their default.
    """
    annotations = get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name in without or (only is not None and field.name not in only):
            continue
        name = (renamed or {}).get(field.name, field.name)
        text, kwargs = help_of(options, field.name), _parser_of(annotations[field.name])
        if field.default_factory is not dataclasses.MISSING:
            kwargs["default"] = field.default_factory()
        elif field.default is dataclasses.MISSING:
            kwargs["required"] = True
        else:
            kwargs["default"] = field.default
            if field.default not in (None, (None,)):
                values = field.default if isinstance(field.default, tuple) else [field.default]
                text += f" (default: {','.join(map(str, values))})"
        if absent_by_default:
            kwargs["default"] = argparse.SUPPRESS
        help = text.replace("%", "%%")
        parser.add_argument(flag_of(name), dest=field.name, help=help, **kwargs)


def options_from(args: argparse.Namespace, options: type[T]) -> T:
    """The dataclass, with the parsed values of its flags; defaults where there are none."""
    names = [field.name for field in dataclasses.fields(cast(Any, options))]
    return options(**given_options(args, names))


def given_options(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The parsed values, by name, of those flags that were given and are absent by default."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def help_of(options: type, field: str, *, brief: bool = False) -> str:
    """The help of a flag, from the string under its field: one line, lower case, no full stop.

    Args:
        options: The dataclass.
        field: Name of the field.
        brief: Whether the first sentence is enough.
    """
    text = " ".join(get_attribute_docstring(options, field).docstring_below.split())
    if brief:
        text = re.split(r"(?<!\.)\. ", text)[0]
    is_name = text[1:2].isupper()  # keeps the capitals of SAELens, for example
    return (text if is_name else text[:1].lower() + text[1:]).removesuffix(".")


def _parser_of(annotation: Any) -> dict[str, Any]:
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    return dict(_PARSERS[annotation])


def _index(text: str) -> int | None:
    return None if text == "none" else int(text)


def _separator(text: str) -> int | str | None:
    return text if text in ("bos", "eos", "sep") else _index(text)


def _list_of(parse: Callable[[str], Any], *shown: str) -> dict[str, Any]:
    """A list, with commas or spaces between its parts. `shown`: its first and next part in help."""
    return {"type": several(parse), "nargs": "+", "action": Flattened, "metavar": shown}


_PARSERS: dict[Any, dict[str, Any]] = {
    str: {},
    str | None: {},
    bool: {"action": argparse.BooleanOptionalAction},
    bool | None: {"action": argparse.BooleanOptionalAction},
    int: {"type": int, "metavar": "N"},
    int | None: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    Path: {"type": Path, "metavar": "PATH"},
    Sequence[str]: _list_of(str, "A", "B"),
    Sequence[int]: _list_of(int, "N", "N"),
    # of a command with positional arguments
    Sequence[int] | None: {"type": several(int), "metavar": "N,N,..."},
    Sequence[float]: _list_of(float, "X", "X"),
    dict[str, Any] | None: {"type": json_object, "metavar": "JSON"},
    Mapping[str, Mapping[str, Any]]: {"type": json_object, "metavar": "JSON"},
    tuple[int | None, ...]: {"type": _index, "nargs": "+", "metavar": "N"},
    int | Literal["bos", "eos", "sep"] | None: {
        "type": _separator,
        "metavar": "bos|eos|sep|none|ID",
    },
}
"""Arguments of `add_argument`, by the annotation of the field."""
