"""Tensors and JSON in files: written atomically, and checked when they are read."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sae_whiten._atomic import atomic_path
from sae_whiten._redaction import redacted

__all__ = [
    "CorruptFileError",
    "check_writable",
    "count_field",
    "load_fields",
    "load_tensors",
    "number_field",
    "read_json",
    "read_json_lines",
    "reading_content",
    "require_empty",
    "save_tensors",
    "tensor_of_shape",
    "write_json",
    "write_json_lines",
]

_METADATA_KEY = "sae_whiten"


class CorruptFileError(ValueError):
    """A file is truncated, of another kind, or was changed after it was written.

    Examples:
        >>> from sae_whiten import Whitening
        >>> Whitening.load(__file__)
        Traceback (most recent call last):
        ...
        sae_whiten._files.CorruptFileError: ...
    """


def check_writable(path: str | Path) -> None:
    """Refuse a path at which nothing can be written; creates nothing.

    Raises:
        OSError: A file is in the way, or the nearest existing folder refuses new files.
    """
    path = Path(path)
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file")
    with tempfile.TemporaryFile(dir=path):
        pass


def require_empty(path: str | Path) -> None:
    """Refuse a folder that is not empty; it need not exist.

    Raises:
        FileExistsError: It is not empty, or is a file.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder")


def _digest(tensors: Mapping[str, torch.Tensor], header: str) -> str:
    sha = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def save_tensors(
    path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any]
) -> None:
    """Write tensors and JSON fields as one safetensors file, atomically and with a checksum.

    Args:
        path: Where to write.
        kind: What the file holds, for example "activation_statistics".
        tensors: Named tensors, any shapes and dtypes.
        fields: Everything else; must be serialisable as JSON. Secrets are left out.
    """
    fields = redacted(dict(fields))
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = json.dumps({"kind": kind, "version": 1, "fields": fields}, sort_keys=True)
    metadata = {_METADATA_KEY: header, "sha256": _digest(contiguous, header)}
    with atomic_path(path) as partial:
        save_file(contiguous, partial, metadata=metadata)


def write_json(path: str | Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file, atomically and without secrets.

    Args:
        path: Where to write.
        content: Values that JSON can hold; others are written as their `str`.
        indent: As for `json.dumps`.
    """
    text = json.dumps(redacted(content), indent=indent, default=str)
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json_lines(path: str | Path, records: Iterable[Any]) -> None:
    """Write records as lines of JSON, as `write_json` does a single value."""
    lines = (json.dumps(redacted(record), default=str) + "\n" for record in records)
    with atomic_path(path) as partial:
        partial.write_text("".join(lines))


def read_json(path: str | Path, remedy: str = "restore it from a copy") -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        remedy: What can be done if it is damaged, for the message.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptFileError: It is not JSON. The message has the file, the line and the remedy.
    """
    return _parsed(Path(path).read_bytes(), path, 1, remedy)


def read_json_lines(
    path: str | Path, remedy: str = "restore the file from a copy"
) -> list[dict[str, Any]]:
    """Read records that `write_json_lines` wrote, a JSON object in every line.

    Args:
        path: The file.
        remedy: As for `read_json`.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptFileError: A line is not a JSON object, also if it was cut off. The message has the
            file, the line and the remedy.
    """
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        record = _parsed(line, path, number, remedy)
        if not isinstance(record, dict):
            raise CorruptFileError(f"{path}, line {number} is not a JSON object; {remedy}")
        records.append(record)
    return records


def _parsed(content: bytes, path: str | Path, number: int, remedy: str) -> Any:
    """The JSON value in a part of a file that begins at the line of this number."""
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        number, problem = number + content.count(b"\n", 0, error.start), "not UTF-8"
    except json.JSONDecodeError as error:
        number, problem = number + error.lineno - 1, f"{error.msg} at column {error.colno}"
    raise CorruptFileError(f"{path}, line {number} is damaged ({problem}); {remedy}")


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file written by `save_tensors`.

    Returns:
        The tensors, on the CPU, and the JSON fields.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptFileError: The file is truncated, not of this kind, or its checksum does not match.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (expected sae_whiten {kind})")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFileError(
            f"{path} is truncated or is not a safetensors file ({error})"
        ) from error
    fields = _fields(path, metadata, kind)
    if metadata.get("sha256") != _digest(tensors, metadata[_METADATA_KEY]):
        raise CorruptFileError(
            f"{path}: the checksum does not match its content; the file was changed or damaged"
        )
    return tensors, fields


def load_fields(path: str | Path, kind: str) -> dict[str, Any]:
    """The JSON fields of a file that `save_tensors` wrote; its tensors are not read or checked.

    Raises:
        CorruptFileError: The file is not a safetensors file, or not of this kind.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFileError(f"{path} is not a safetensors file ({error})") from error
    return _fields(Path(path), metadata, kind)


def _fields(path: Path, metadata: Mapping[str, str], kind: str) -> dict[str, Any]:
    """The JSON fields in the metadata of a safetensors file, which must be of this kind."""
    header = metadata.get(_METADATA_KEY)
    if header is None:
        raise CorruptFileError(f"{path} was not written by sae_whiten (expected {kind})")
    try:
        content = json.loads(header)
        found, version, fields = content["kind"], content["version"], content["fields"]
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(f"{path}: its header is damaged ({error!r})") from error
    if not isinstance(fields, dict):
        raise CorruptFileError(f"{path}: its header is damaged (no fields)")
    if found != kind:
        raise CorruptFileError(f"{path} holds {found}, expected {kind}")
    if version != 1:
        raise CorruptFileError(
            f"{path} has format version {version}; this sae_whiten reads version 1. Upgrade it."
        )
    return fields


@contextlib.contextmanager
def reading_content(path: str | Path) -> Iterator[None]:
    """Turn errors about the content of a file into a `CorruptFileError` that names it."""
    try:
        yield
    except CorruptFileError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CorruptFileError(f"{path}: incomplete or invalid content ({what})") from error


def count_field(fields: Mapping[str, Any], name: str, at_least: int = 0) -> int:
    """A field that is a whole number >= `at_least`.

    Raises:
        KeyError: There is no such field.
        ValueError: It is not such a number.
    """
    value = fields[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name}={value!r}: must be a whole number >= {at_least}")
    return value


def number_field(fields: Mapping[str, Any], name: str, low: float, high: float) -> float:
    """A field that is a number in [low, high].

    Raises:
        KeyError: There is no such field.
        ValueError: It is not a number, or not in the interval.
    """
    value = fields[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # `not (low <= value)` also refuses NaN
    if not is_number or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: must be a number in [{low:g}, {high:g}]")
    return float(value)


def tensor_of_shape(
    tensors: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]
) -> torch.Tensor:
    """A tensor of a file, which must be float64, of this shape and finite.

    Raises:
        KeyError: There is no such tensor.
        ValueError: It has another shape or dtype, or holds a NaN or an infinity.
    """
    tensor = tensors[name]
    if tensor.shape != shape or tensor.dtype != torch.float64:
        raise ValueError(
            f"{name} is of shape {tuple(tensor.shape)} and {tensor.dtype}: must be of shape "
            f"{shape} and torch.float64"
        )
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds a NaN or an infinity")
    return tensor
