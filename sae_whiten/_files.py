"""Files that are either whole or absent: atomic writing and checked reading of safetensors."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = [
    "CorruptFileError",
    "atomic_directory",
    "atomic_path",
    "count_field",
    "load_tensors",
    "number_field",
    "reading_content",
    "save_tensors",
    "tensor_of_shape",
]

_METADATA_KEY = "sae_whiten"


class CorruptFileError(ValueError):
    """A file is truncated, foreign or was changed after it was written."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed onto it when the block succeeds.

    A process killed at any moment leaves the old file or the new one, never a part of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        # mkstemp creates files that only their owner can read
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty directory beside `path` that takes its place when the block succeeds.

    A directory cannot be replaced by one rename, so an earlier one is first moved to a hidden
    name beside it and deleted last: at no moment is there a half-written directory at `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    umask = os.umask(0)
    os.umask(umask)
    staging.chmod(0o777 & ~umask)
    old: Path | None = None
    try:
        yield staging
        if path.exists():
            old = staging.with_suffix(".old")
            path.rename(old)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


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
        fields: Everything else; must be serialisable as JSON.
    """
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = json.dumps({"kind": kind, "version": 1, "fields": dict(fields)}, sort_keys=True)
    metadata = {_METADATA_KEY: header, "sha256": _digest(contiguous, header)}
    with atomic_path(path) as partial:
        save_file(contiguous, partial, metadata=metadata)


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
    if metadata.get("sha256") != _digest(tensors, header):
        raise CorruptFileError(
            f"{path}: the checksum does not match its content; the file was changed or damaged"
        )
    return tensors, fields


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
    """A field that is a whole number.

    Raises:
        KeyError: There is no such field.
        ValueError: It is not a whole number, or a smaller one.
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
    """A tensor of a file, if it is float64, of this shape and finite.

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
