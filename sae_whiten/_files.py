"""Files that are either whole or absent: atomic writing and checked reading of safetensors."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sae_whiten._redaction import redacted

try:
    import fcntl
except ImportError:  # Windows: what killed processes left behind stays there
    fcntl = None

__all__ = [
    "CorruptFileError",
    "atomic_directory",
    "atomic_files",
    "atomic_path",
    "check_writable",
    "count_field",
    "load_tensors",
    "number_field",
    "reading_content",
    "recover",
    "require_empty",
    "save_tensors",
    "tensor_of_shape",
    "write_json",
]

_METADATA_KEY = "sae_whiten"
# Hidden entries, ".NAME.RANDOM" and one of these: what is being written; what is complete and being
# moved to its place; what is replaced, until its successor is there. Their writer holds a lock on
# the first two, which ends with its process.
_NEW, _READY, _OLD = ".whiten-new", ".whiten-ready", ".whiten-old"


class CorruptFileError(ValueError):
    """A file is truncated, foreign or was changed after it was written.

    Examples:
        >>> from sae_whiten import Whitening
        >>> Whitening.load(__file__)
        Traceback (most recent call last):
        ...
        sae_whiten._files.CorruptFileError: ...
    """


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, renamed onto `path` when the block succeeds.

    A process killed at any moment leaves the old file or the new one, never a part of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _tidy(path.parent)
    # in a folder of its own: a lock on the file itself would be lost where a writer replaces it, as
    # safetensors does, and another process would take it for a leftover
    with _new_directory(path) as folder:
        new = folder / path.name
        new.touch()
        mode = stat.S_IMODE(new.stat().st_mode)
        yield new
        new.chmod(mode)  # what a writer replaces it with may be for its owner only
        with new.open("rb") as written:
            os.fsync(written.fileno())
        new.replace(path)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty directory beside `path` that takes its place when the block succeeds.

    For directories that hold nothing else. At no moment is there a half-written one at `path`. One
    that was there is moved away first, and back if the new one cannot take its place. If the
    process is killed between the two renames, there is none until `recover` does the second.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _tidy(path.parent)
    with _new_directory(path) as new:
        yield new
        _give_usual_modes(new)
        if not path.is_dir():
            new.rename(path)
            return
        old = new.with_suffix(_OLD)
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def atomic_files(path: str | Path, last: str, also_replaced: Iterable[str] = ()) -> Iterator[Path]:
    """Yield an empty directory whose entries are moved into `path` when the block succeeds.

    For directories in which a user may keep other files, which are left alone. The others must mean
    nothing without the file `last`: it is removed before the first of them is replaced, and moved
    to its place after them. If the process is killed in between, there is none until `recover`
    moves the rest.

    Args:
        path: The directory.
        last: Name of the file that makes the others complete, as a config does an SAE's weights.
        also_replaced: Names of entries that are removed if the block does not write them again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    if not path.exists():
        with _new_directory(path) as new:
            yield new
            _give_usual_modes(new)
            new.rename(path)
        return
    with _new_directory(path / last) as new:
        yield new
        _give_usual_modes(new)
        written = {entry.name for entry in new.iterdir()}
        for name in written:
            if (path / name).is_dir() and not (new / name).is_dir():
                raise IsADirectoryError(f"{path / name} is a directory: a file cannot replace it")
        for name in set(also_replaced) - written:
            _remove(path / name)
        ready = new.with_suffix(_READY)
        new.rename(ready)  # from here on a killed process has its change finished by the next one
        _move_in(ready)


def recover(path: str | Path) -> None:
    """Finish what a killed process began to change at `path`, and remove what it left behind.

    What processes that are still running are writing is left alone.
    """
    path = Path(path)
    _tidy(path.parent)
    _tidy(path)


def check_writable(path: str | Path) -> None:
    """Refuse a path at which nothing can be written; creates nothing.

    Raises:
        OSError: A file is in the way, or the folder that it would be in refuses new files.
    """
    path = Path(path)
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file")
    with tempfile.TemporaryFile(dir=path):
        pass


def require_empty(path: str | Path) -> None:
    """Refuse a folder that holds something; it need not exist.

    Raises:
        FileExistsError: It does, or is a file.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder")


@contextlib.contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    """Create and lock a hidden directory beside `path`; remove what is left of it afterwards.

    It has the mode that the umask gives it, which cannot be asked for without changing it for all
    threads.
    """
    while True:
        new = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_NEW}")
        new.mkdir()
        try:
            lock = _lock(new)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process took it for a leftover, before it was locked
        if new.exists():
            break
        _release(lock)
    try:
        yield new
    finally:
        _remove(new)
        _release(lock)


def _give_usual_modes(folder: Path) -> None:
    """Give the files below `folder` the mode that any new file has.

    safetensors makes its files readable by their owner only: a group could not share an SAE.
    """
    probe = folder / f".{secrets.token_hex(4)}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _lock(path: Path) -> int | None:
    """A descriptor that holds an exclusive lock on `path`; None where there are no locks.

    Raises:
        BlockingIOError: Somebody else holds it.
        FileNotFoundError: There is no such entry.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # this file system has none
        os.close(descriptor)
        return None
    return descriptor


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _tidy(folder: Path) -> None:
    """Finish or remove what killed processes were writing in `folder`."""
    for suffix, finish in ((_READY, _move_in), (_NEW, _finish_or_remove), (_OLD, _restore)):
        for entry in folder.glob(f".*{suffix}"):
            try:
                lock = _lock(entry)
            except OSError:  # somebody writes it, has removed it, or does not let us
                continue
            try:
                if lock is not None:
                    finish(entry)
            finally:
                _release(lock)


def _place(entry: Path) -> Path:
    """What a hidden entry is to become or was."""
    name, _, _ = entry.stem.rpartition(".")
    return entry.with_name(name.removeprefix("."))


def _move_in(ready: Path) -> None:
    """Move the entries of `ready` beside it."""
    last = _place(ready)
    if (ready / last.name).exists():  # otherwise all of them are there
        last.unlink(missing_ok=True)
    for entry in sorted(ready.iterdir(), key=lambda entry: (entry.name == last.name, entry.name)):
        target = ready.with_name(entry.name)
        if entry.is_dir():
            _remove(target)
        entry.replace(target)
    ready.rmdir()


def _finish_or_remove(new: Path) -> None:
    """What was being written is incomplete, unless it was about to replace something."""
    if new.with_suffix(_OLD).exists() and not _place(new).exists():
        new.rename(_place(new))
    else:
        _remove(new)


def _restore(old: Path) -> None:
    if old.with_suffix(_NEW).exists():
        return  # by a process that is still running
    if _place(old).exists():
        _remove(old)
    else:
        old.rename(_place(old))


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.unlink()


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
        fields: Everything else; must be serialisable as JSON. What of it is secret is left out.
    """
    fields = redacted(dict(fields))
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = json.dumps({"kind": kind, "version": 1, "fields": fields}, sort_keys=True)
    metadata = {_METADATA_KEY: header, "sha256": _digest(contiguous, header)}
    with atomic_path(path) as partial:
        save_file(contiguous, partial, metadata=metadata)


def write_json(path: str | Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file, atomically and without what of it is secret.

    Args:
        path: Where to write.
        content: What JSON can hold; other values become their `str`.
        indent: As for `json.dumps`.
    """
    text = json.dumps(redacted(content), indent=indent, default=str)
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


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
