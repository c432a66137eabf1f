"""The texts of the package `sae-probes`: its tasks, and the texts left to train on.

The package includes its data, 113 tasks of binary classification (Kantamneni et al. 2025), so no
hub is needed. It is an optional dependency: `pip install "sae-whiten[probes]"`.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

import datasets

__all__ = ["is_probing_texts", "task_names", "tasks_of", "unprobed_texts"]

_NAME = re.compile(r"sae-probes(?::(\d+))?")


def is_probing_texts(source: str) -> bool:
    """Whether a name refers to these data: "sae-probes", or "sae-probes:N" for N of its tasks."""
    return _NAME.fullmatch(source) is not None


def tasks_of(source: str) -> list[str]:
    """The tasks of a name: all for "sae-probes", a fixed sample for "sae-probes:N".

    A sample is taken evenly from the tasks in the order of `sae-probes`, in which related ones
    follow each other. The same N always gives the same tasks.

    Raises:
        ModuleNotFoundError: `sae-probes` is not installed.
        ValueError: The name is neither, or there are fewer than N tasks.
    """
    match = _NAME.fullmatch(source)
    if match is None:
        raise ValueError(f"{source!r}: give sae-probes, or sae-probes:N for N of its tasks")
    names = task_names()
    n = len(names) if match[1] is None else int(match[1])
    if not 1 <= n <= len(names):
        raise ValueError(f"{source}: there are {len(names)} tasks, so 1 to {len(names)} of them")
    return [names[i * len(names) // n] for i in range(n)]


def task_names() -> list[str]:
    """The names of all tasks, in the order of `sae-probes`.

    Raises:
        ModuleNotFoundError: `sae-probes` is not installed.
    """
    try:
        from sae_probes.utils_data import get_numbered_binary_tags  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error}; probing with sae-probes needs: pip install "sae-whiten[probes]" '
            '(in a clone: pip install ".[probes]")'
        ) from error
    return get_numbered_binary_tags()


def unprobed_texts(tasks: Collection[str]) -> datasets.Dataset:
    """Texts of `sae-probes` that none of these tasks uses, to train on: a column "text".

    If all tasks are given, these are the texts of its other data sets, which have more than two
    classes or numeric targets; if some are given, also those of the other tasks. Texts that differ
    from a probed one only in case, spaces or punctuation are left out too. No text occurs twice.
    The order is random and always the same.

    Args:
        tasks: Names of the tasks that will be probed.

    Raises:
        ModuleNotFoundError: `sae-probes` is not installed.
        ValueError: There is no such task.
    """
    known = task_names()
    unknown = [name for name in tasks if name not in known]
    if unknown:
        raise ValueError(f"sae-probes has no task {', '.join(unknown)}; it has {', '.join(known)}")
    import pandas as pd
    from sae_probes.constants import DATA_PATH  # pyright: ignore[reportMissingImports]
    from sae_probes.utils_data import read_numbered_dataset_df  # pyright: ignore[reportMissingImports]

    probed = set(map(_words, _texts(read_numbered_dataset_df(name) for name in tasks)))
    files = sorted((DATA_PATH / "cleaned_data").glob("*.csv.zst"))
    every = dict.fromkeys(_texts(pd.read_csv(file, compression="zstd") for file in files))
    left = [text for text in every if _words(text) not in probed]
    return datasets.Dataset.from_dict({"text": left}).shuffle(seed=0)


def _texts(frames: Iterable[Any]) -> Iterable[str]:
    """The prompts of tables; tables without prompts are skipped."""
    for frame in frames:
        if "prompt" in frame:
            yield from frame["prompt"].dropna().astype(str)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
