"""Files and directories are whole or absent, whenever the process that writes them is killed."""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sae_whiten import _atomic
from sae_whiten._atomic import atomic_directory, atomic_files, atomic_path, recover
from sae_whiten._files import (
    CorruptFileError,
    check_writable,
    read_json,
    read_json_lines,
    write_json,
    write_json_lines,
)

_CHANGES = ("mkdir", "rename", "replace", "rmdir", "touch", "unlink", "write_text")


def killed_at(n: int, write: Callable[[], None]) -> bool:
    """Run `write` in a process that is killed before its n-th change of the file system; False if
    it makes fewer."""
    pid = os.fork()
    if pid == 0:
        left = n

        def dying(change: Callable[..., object]) -> Callable[..., object]:
            def change_or_die(*args: object, **kwargs: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)
                return change(*args, **kwargs)

            return change_or_die

        for name in _CHANGES:
            setattr(Path, name, dying(getattr(Path, name)))
        try:
            write()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def content(path: Path) -> dict[str, str]:
    """Files below a directory, hidden ones too."""
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_text() for file in sorted(files)}


def write_sae(path: Path, run: str, extra: str = "") -> None:
    with atomic_files(path, "cfg.json", ["whitening"]) as new:
        for name in filter(None, ("cfg.json", "weights", extra)):
            (new / name).write_text(run)


def write_checkpoint(path: Path, run: str) -> None:
    with atomic_directory(path) as new:
        (new / "cfg.json").write_text(run)
        (new / "state").mkdir()
        (new / "state" / "weights").write_text(run)


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with atomic_path(path) as new:
            new.write_text("new")

    n = 1
    while killed_at(n, write):
        assert path.read_text() in ("old", "new")
        n += 1
    assert n > 3
    assert content(tmp_path) == {"file": "new"}


def test_a_directory_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    seen = set()
    n, killed = 1, True
    while killed:
        write_checkpoint(path, "old")
        killed = killed_at(n, lambda: write_checkpoint(path, "new"))
        # between two renames there is none, until somebody looks
        assert not path.exists() or len(set(content(path).values())) == 1
        recover(path)
        found = content(tmp_path)
        assert found.keys() == {"checkpoint/cfg.json", "checkpoint/state/weights"}
        assert len(set(found.values())) == 1
        seen |= set(found.values())
        n += 1
    assert seen == {"old", "new"}


def test_files_beside_those_of_a_user_are_all_old_or_all_new(tmp_path: Path) -> None:
    path = tmp_path / "sae"
    seen = set()
    n, killed = 1, True
    while killed:
        write_sae(path, "old", extra="whitening")
        (path / "notes.txt").write_text("mine")
        killed = killed_at(n, lambda: write_sae(path, "new"))
        if (path / "cfg.json").exists():
            assert (path / "cfg.json").read_text() == (path / "weights").read_text()
        recover(path)
        found = content(tmp_path)
        assert found.pop("sae/notes.txt") == "mine"
        assert found["sae/cfg.json"] == found["sae/weights"]
        assert found.get("sae/whitening", "old") == "old"
        assert found.keys() <= {"sae/cfg.json", "sae/weights", "sae/whitening"}
        seen.add(tuple(sorted(found.values())))
        n += 1
    # the whitening of the old SAE may be gone before the new one is there, never the reverse
    assert seen == {("old",) * 3, ("old",) * 2, ("new",) * 2}


def test_a_directory_that_was_not_there_appears_whole(tmp_path: Path) -> None:
    whole = {"cfg.json": "new", "weights": "new"}
    for n in itertools.count(1):
        path = tmp_path / str(n) / "sae"
        killed = killed_at(n, lambda path=path: write_sae(path, "new"))
        assert content(path) in ({}, whole)
        if not killed:
            assert n > 5
            assert content(path) == whole
            break


@pytest.mark.parametrize("write", [write_sae, write_checkpoint])
def test_what_fails_while_it_is_written_changes_nothing(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sae"
    write(path, "old")
    before = content(tmp_path)

    def full_disk(self: Path, text: str) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(path, "new")
    assert content(tmp_path) == before


def test_the_old_directory_is_put_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint"
    write_checkpoint(path, "old")
    rename, n = Path.rename, iter(range(3))

    def fails_once(self: Path, target: Path) -> Path:
        if next(n) == 1:
            raise OSError("input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="input/output"):
        write_checkpoint(path, "new")
    assert content(tmp_path) == {"checkpoint/cfg.json": "old", "checkpoint/state/weights": "old"}


def test_a_directory_in_the_place_of_a_file_is_not_removed(tmp_path: Path) -> None:
    write_sae(tmp_path / "sae", "old")
    (tmp_path / "sae" / "extra").mkdir()
    (tmp_path / "sae" / "extra" / "notes.txt").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(IsADirectoryError, match="extra"):
        write_sae(tmp_path / "sae", "new", extra="extra")
    assert content(tmp_path) == before


def test_what_others_are_writing_and_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / ".download.partial"
    foreign.write_text("of another program")
    with atomic_directory(tmp_path / "a") as first:
        (first / "file").write_text("1")
        with atomic_path(tmp_path / "b") as second:
            second.write_text("2")
            recover(tmp_path / "a")
            with atomic_files(tmp_path / "a", "file") as third:
                (third / "file").write_text("3")
            assert first.exists()
            assert second.exists()
    assert content(tmp_path) == {".download.partial": "of another program", "a/file": "1", "b": "2"}


def test_modes_follow_the_umask_without_touching_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("changed for all threads"))
    try:
        with atomic_path(tmp_path / "file") as new:
            new.write_text("")
        write_checkpoint(tmp_path / "directory", "new")
        write_sae(tmp_path / "sae", "new")
    finally:
        monkeypatch.undo()
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert modes == {"file": 0o640, "directory": 0o750, "sae": 0o750}


@pytest.mark.parametrize("writer", [atomic_directory, partial(atomic_files, last="cfg.json")])
@pytest.mark.parametrize("again", [False, True])
def test_files_in_a_folder_can_be_read_by_those_who_may_read_new_files(
    writer: Any, again: bool, tmp_path: Path
) -> None:
    for _ in range(1 + again):
        with writer(tmp_path / "sae") as new:
            (new / "inference").mkdir()
            for path in (new / "cfg.json", new / "inference" / "weights"):
                path.write_text("")
                path.chmod(0o600)  # as safetensors leaves them
    (tmp_path / "plain").touch()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert len({path.stat().st_mode for path in files}) == 1


def test_threads_that_write_into_one_folder_do_not_take_each_other_for_dead(
    tmp_path: Path,
) -> None:
    errors = []

    def write(name: str) -> None:
        try:
            for i in range(20):
                with atomic_path(tmp_path / name) as new:
                    new.write_text(str(i))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(f"file{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert content(tmp_path) == {f"file{i}": "19" for i in range(4)}


def test_where_there_are_no_locks_leftovers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_atomic, "fcntl", None)
    leftover = tmp_path / ".file.0123abcd.whiten-new"
    leftover.write_text("")
    with atomic_path(tmp_path / "file") as new:
        new.write_text("")
    assert leftover.exists()
    monkeypatch.undo()
    recover(tmp_path / "file")
    assert not leftover.exists()


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    path.chmod(0o500)
    try:
        yield
    finally:
        path.chmod(0o700)


def test_a_path_that_cannot_be_written_is_found_out_without_creating_it(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        check_writable(tmp_path / "file" / "sae")
    (tmp_path / "folder").mkdir()
    with read_only(tmp_path / "folder"):
        if not os.access(tmp_path / "folder", os.W_OK):  # root may write everywhere
            with pytest.raises(PermissionError):
                check_writable(tmp_path / "folder" / "sae")


def test_a_writer_that_replaces_the_file_keeps_its_place_and_its_mode(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "first") as new:
        other = new.with_name("other")
        other.write_text("whole")
        other.chmod(0o600)
        other.replace(new)  # as safetensors does
        with atomic_path(tmp_path / "second") as second:  # tidies the folder
            second.write_text("second")
    (tmp_path / "plain").touch()
    assert (tmp_path / "first").read_text() == "whole"
    assert (tmp_path / "first").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "plain", "second"]


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    records = [{"name": "ü\u2028"}, {"l0": 2.5, "sparsity": None}]  # U+2028 ends a line, too
    write_json(tmp_path / "file.json", records, indent=1)
    write_json_lines(tmp_path / "file.jsonl", records)
    assert read_json(tmp_path / "file.json") == read_json_lines(tmp_path / "file.jsonl") == records


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"l0": 1}\n{"l0": 2', 2),  # cut off
        (b'{"l0": 1}\n\n{"l0": 2}\n', 2),
        (b"\0\0\0\0", 1),
        (b'{"l0": 1}\n{"l0": "\xff"}\n', 2),
        (b'{"l0": 1}\n{"l0": 2}\n[3]\n', 3),
    ],
)
def test_a_damaged_line_is_named_with_its_file_and_a_remedy(
    tmp_path: Path, content: bytes, line: int
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=rf"results.jsonl, line {line} .*; delete the line"):
        read_json_lines(path, "delete the line")


def test_damaged_json_is_named_with_its_line_and_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    for content, where in (
        (b"", "line 1 is damaged (Expecting value at column 1)"),
        (b'{\n "lr": 1,\n "se', "line 3 is damaged (Unterminated string starting at at column 2)"),
        (b'{\n "lr": "\xff"}', "line 2 is damaged (not UTF-8)"),
    ):
        path.write_bytes(content)
        with pytest.raises(CorruptFileError) as caught:
            read_json(path)
        assert str(caught.value) == f"{path}, {where}; restore it from a copy"
