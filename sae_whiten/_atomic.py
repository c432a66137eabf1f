"""Files and directories that are either whole or absent, even if a process is killed."""

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed processes are not removed
    fcntl = None

__all__ = ["atomic_directory", "atomic_files", "atomic_path", "recover"]

# Hidden entries are called ".NAME.RANDOM" plus one of these suffixes. New: still being written.
# Ready: complete, being moved to its place. Old: being replaced, kept until its successor is there.
# The writer holds a lock on the first two, which ends with its process.
_NEW, _READY, _OLD = ".whiten-new", ".whiten-ready", ".whiten-old"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `path` when the block succeeds.

    A process killed at any moment leaves the old file or the new one, never a part of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _tidy(path.parent)
    # In its own folder, which is locked. A lock on the file itself would be lost if a writer
    # replaces the file, as safetensors does, and another process would take it for a leftover.
    with _new_directory(path) as folder:
        new = folder / path.name
        new.touch()
        mode = stat.S_IMODE(new.stat().st_mode)
        yield new
        new.chmod(mode)  # a writer may have replaced it by a file for its owner only
        with new.open("rb") as written:
            os.fsync(written.fileno())
        new.replace(path)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty directory beside `path` that takes its place when the block succeeds.

    For directories that hold nothing else. `path` is never half-written. An existing directory is
    moved away first, and moved back if the new one cannot take its place. If the process is killed
    between the two renames, `path` is missing until `recover` does the second.
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

    For directories in which a user may keep other files, which are not touched. Readers must treat
    the new entries as absent without the file `last`. It is removed before the first entry is
    replaced, and moved to its place after all others. If the process is killed in between, `last`
    is missing until `recover` moves the rest.

    Args:
        path: The directory.
        last: Name of the file without which the others are useless, such as the config of an SAE.
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
        new.rename(ready)  # if killed from here on, the next process finishes the change
        _move_in(ready)


def recover(path: str | Path) -> None:
    """Finish the change that a killed process began at `path`, and remove its leftovers.

    Entries that running processes are writing are not touched.
    """
    path = Path(path)
    _tidy(path.parent)
    _tidy(path)


@contextlib.contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    """Create and lock a hidden directory beside `path`; remove it afterwards if it is still there.

    Its mode follows from the umask. The umask itself cannot be read without setting it for all
    threads.
    """
    while True:
        new = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_NEW}")
        new.mkdir()
        try:
            lock = _lock(new)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process took it for a leftover before it was locked
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

    safetensors makes its files readable by their owner only, so a group could not share an SAE.
    """
    probe = folder / f".{secrets.token_hex(4)}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _lock(path: Path) -> int | None:
    """A descriptor that holds an exclusive lock on `path`; None if locks are not supported.

    Raises:
        BlockingIOError: Another process holds the lock.
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
    except OSError:  # this file system has no locks
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
            except OSError:  # another process writes it or has removed it, or it may not be opened
                continue
            try:
                if lock is not None:
                    finish(entry)
            finally:
                _release(lock)


def _place(entry: Path) -> Path:
    """The path that a hidden entry is meant for, or had before."""
    name, _, _ = entry.stem.rpartition(".")
    return entry.with_name(name.removeprefix("."))


def _move_in(ready: Path) -> None:
    """Move the entries of `ready` into the folder that `ready` is in."""
    last = _place(ready)
    if (ready / last.name).exists():  # otherwise all entries are in place
        last.unlink(missing_ok=True)
    for entry in sorted(ready.iterdir(), key=lambda entry: (entry.name == last.name, entry.name)):
        target = ready.with_name(entry.name)
        if entry.is_dir():
            _remove(target)
        entry.replace(target)
    ready.rmdir()


def _finish_or_remove(new: Path) -> None:
    """Remove an incomplete entry; move it to its place if the old one was already moved away."""
    if new.with_suffix(_OLD).exists() and not _place(new).exists():
        new.rename(_place(new))
    else:
        _remove(new)


def _restore(old: Path) -> None:
    if old.with_suffix(_NEW).exists():
        return  # a process that is still running is replacing it
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
