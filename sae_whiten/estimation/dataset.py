"""Datasets of text or tokens: files and folders on this machine, or names on the hub.

SAELens looks up tokenised data on the hub, even if given a local path, and cannot open what
`save_to_disk` wrote. So local datasets are opened here, without a network.
"""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from sae_lens.config import HfDataset

from sae_whiten.estimation.probing_texts import is_probing_texts, tasks_of, unprobed_texts

__all__ = [
    "TEXT_COLUMNS",
    "TOKEN_COLUMNS",
    "canonical_source",
    "check_columns",
    "check_length",
    "is_meant_as_path",
    "is_on_this_machine",
    "local_dataset",
    "naming_columns",
    "open_dataset",
]

TOKEN_COLUMNS, TEXT_COLUMNS = ("tokens", "input_ids"), ("text", "problem")
"""Columns that SAELens reads, those of tokens before those of text."""

_CHAT_COLUMNS = ("conversation", "conversations", "messages", "text")  # with a chat template

_SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".txt", ".gz", ".zst", ".xz")


def open_dataset(source: str, split: str = "train", streaming: bool = False) -> Any:
    """Open a dataset.

    Args:
        source: A file (JSON lines, parquet...), a folder of such files, a folder that
            `save_to_disk` wrote, or a name on the hub; a path that exists is preferred to the hub.
            "sae-probes" and "sae-probes:N" are the texts of the package `sae-probes` that its
            tasks, or N of them, do not use (`unprobed_texts`).
        split: Name of a split, or a part of one, such as "train[90%:]"; for a part, all of the
            dataset is read or downloaded first.
        streaming: Read rows when they are used, without downloading or converting all first.

    Raises:
        FileNotFoundError: `source` is a path that does not exist, or a folder without data.
        ValueError: There is no such split, it is empty, or a file has the wrong format.
        ConnectionError: The hub cannot be reached.
    """
    path = Path(source)
    if not path.exists():
        if is_probing_texts(source):
            texts = unprobed_texts(tasks_of(source))
            return _part(source, datasets.DatasetDict({"train": texts}), split)
        if is_meant_as_path(source):
            raise FileNotFoundError(f"{source}: there is no such file or folder")
        return datasets.load_dataset(source, split=split, streaming=_can_stream(streaming, split))
    saved = _is_saved_to_disk(path)
    if saved:
        loaded = datasets.load_from_disk(str(path))
        dataset = _part(source, loaded, split)
    else:
        dataset = _from_files(path, split, streaming)
    if next(iter(dataset), None) is None:
        raise ValueError(f"{source}: the dataset is empty")
    return dataset


def is_on_this_machine(source: str) -> bool:
    """Whether a dataset is a file or folder, or meant as one, and not a name on the hub."""
    if not source:
        return False
    return Path(source).exists() or is_meant_as_path(source) or is_probing_texts(source)


def is_meant_as_path(source: str) -> bool:
    """Whether a source that does not exist looks like a path rather than a name on the hub."""
    if "://" in source:
        return False
    begins_as_path = Path(source).is_absolute() or source.startswith((".", "~"))
    return begins_as_path or source.count("/") > 1 or source.endswith(_SUFFIXES)


def canonical_source(source: str) -> str:
    """One spelling for all that name the same dataset: relative, absolute and linked paths."""
    return str(Path(source).resolve()) if is_on_this_machine(source) else source


def local_dataset(source: str, streaming: bool) -> HfDataset | None:
    """The dataset to train on, if it is on this machine; None if it is a name on the hub.

    Args:
        source: Path or name, as for `open_dataset`; "" for none.
        streaming: As there.

    Raises:
        FileNotFoundError, ValueError: As there.
    """
    return open_dataset(source, streaming=streaming) if is_on_this_machine(source) else None


def check_columns(dataset: Any, name: str = "the dataset", chat: bool = False) -> None:
    """Refuse a dataset without a column that SAELens reads. SAELens does so after loading a model.

    Args:
        dataset: A `datasets.Dataset` or `datasets.IterableDataset`; anything else is not checked.
        name: What the error calls it.
        chat: Whether conversations are read, for the chat template.

    Raises:
        ValueError: There is no such column.
    """
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return
    # a stream may not know its columns before it is read
    columns = dataset.column_names or list(next(iter(dataset), {}))
    known = _CHAT_COLUMNS if chat else (*TOKEN_COLUMNS, *TEXT_COLUMNS)
    if not columns or not set(columns).isdisjoint(known):
        return
    wanted = "text (texts), or input_ids or tokens (tokens)"
    if chat:
        wanted = "messages or conversations (for the chat template), or text"
    noun = "column" if len(columns) == 1 else "columns"
    raise ValueError(
        f"{name} has the {noun} {', '.join(columns)}; one has to be {wanted}. Rename it, for "
        "example with dataset.rename_column(...)"
    )


@contextmanager
def naming_columns(source: str, streaming: bool, chat: bool = False) -> Iterator[None]:
    """Name the dataset and its columns if SAELens, which loads it, finds none that it reads.

    Args:
        source: Its name on the hub.
        streaming: As for `open_dataset`.
        chat: As for `check_columns`.

    Raises:
        ValueError: As there.
    """
    try:
        yield
    except ValueError as error:
        if source and str(error).startswith("Dataset must have a"):
            check_columns(open_dataset(source, streaming=streaming), source, chat)
        raise


def check_length(n_tokens: int, context_size: int, number: int) -> None:
    """Refuse a tokenised sequence that is too short; SAELens checks only the first one.

    Args:
        n_tokens: Its length, at most `context_size`.
        context_size: The length needed.
        number: Its index in the dataset.

    Raises:
        ValueError: It is too short.
    """
    if n_tokens < context_size:
        raise ValueError(
            f"sequence {number} of the dataset has {n_tokens} tokens, fewer than "
            f"context_size={context_size}: all sequences must be that long, as SAELens' "
            "PretokenizeRunner makes them"
        )


def _is_saved_to_disk(path: Path) -> bool:
    one = all((path / name).is_file() for name in ("state.json", "dataset_info.json"))
    return one or (path / "dataset_dict.json").is_file()


def _part(
    name: str, saved: datasets.Dataset | datasets.DatasetDict, split: str
) -> datasets.Dataset:
    """A split, or a part of one, of a local dataset."""
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if split in splits:
        return splits[split]
    lengths = {str(part): len(rows) for part, rows in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        raise ValueError(
            f"{name} has no split {split!r}; it has {', '.join(lengths)} ({error})"
        ) from error
    return datasets.concatenate_datasets(
        [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


def _from_files(path: Path, split: str, streaming: bool) -> Any:
    # an absolute path, because a folder named "json" would be taken for the format
    absolute = path.resolve()
    folder, files = (
        (absolute.parent, glob.escape(absolute.name)) if absolute.is_file() else (absolute, None)
    )
    try:
        return datasets.load_dataset(
            str(folder), data_files=files, split=split, streaming=_can_stream(streaming, split)
        )
    except FileNotFoundError:
        raise
    except (ValueError, DatasetsError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise ValueError(f"{path}: {error}{cause}") from error


def _can_stream(streaming: bool, split: str) -> bool:
    return streaming and "[" not in split and "+" not in split
