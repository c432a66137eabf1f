"""Texts with labels, for probing.

The texts come from installed libraries, which need no download, or from any dataset with a text and
a label column. Texts of libraries are labelled by library, and as code or prose.
"""

import importlib.metadata
import logging
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer
from numpy import ndarray

from sae_whiten.estimation.dataset import open_dataset
from sae_whiten.evaluation.source_code import (
    docstrings,
    functions,
    package_root,
    parse,
    shuffled,
    source_files,
)

__all__ = ["LIBRARIES", "LabelledTexts", "Split", "dataset_texts", "library_texts"]

logger = logging.getLogger(__name__)

LIBRARIES = ("numpy", "pandas", "scipy", "sklearn", "torch", "transformers")
"""Sources of the offline texts. This package depends on all of them."""

_KINDS = ("code", "prose")
_LENGTH = (100, 600)  # characters
_MAX_PER_MODULE = 4  # texts of one kind, so that no single module dominates its library
_SHINGLE = 5  # words
_MIN_PER_CELL = 10


@dataclass(frozen=True)
class Split:
    """Texts and their labels, one label per attribute.

    Attributes:
        texts: The texts.
        labels: Labels by the name of the attribute, in the order of the texts.
    """

    texts: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with labels: equally many of each combination of labels, without near-duplicates.

    Attributes:
        train: Texts to choose latents and to fit probes.
        test: Texts to score the probes.
        source: The origin of the texts, for the record.
    """

    train: Split
    test: Split
    source: Mapping[str, Any]

    def encoded(
        self, attribute: str
    ) -> tuple[list[str], Integer[ndarray, "n"], Integer[ndarray, "n_test"]]:
        """The values of an attribute in alphabetical order, and the index of each text's value."""
        values = sorted(set(self.train.labels[attribute]))
        number = {value: i for i, value in enumerate(values)}
        train, test = (
            np.array([number[value] for value in split.labels[attribute]])
            for split in (self.train, self.test)
        )
        return values, train, test


def library_texts(
    n_texts: int = 100, seed: int = 0, libraries: Sequence[str] = LIBRARIES
) -> LabelledTexts:
    """Docstrings ("prose") and bodies of functions ("code") of installed libraries.

    The attributes are "library" and "kind". No module has texts in both splits. The texts depend on
    the versions of the libraries, which are in `source`.

    Args:
        n_texts: Texts of each kind from each library, in each split.
        seed: Seed for the choice of modules.
        libraries: Names of installed packages.

    Raises:
        ValueError: A library is not installed, or has too few texts.
    """
    is_new = _NearDuplicates()
    cells: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
    for library in libraries:
        texts_of = {kind: ([], []) for kind in _KINDS}
        for i, path in enumerate(shuffled(source_files(package_root(library)), seed)):
            # all texts of a module go to the same split
            texts = {kind: splits[i % 2] for kind, splits in texts_of.items()}
            wanted = {kind: min(_MAX_PER_MODULE, n_texts - len(texts[kind])) for kind in _KINDS}
            tree = parse(path) if any(wanted.values()) else None
            if tree is None:
                continue
            for kind, candidates in (
                ("code", functions(tree)),
                ("prose", map(_prose, docstrings(tree))),
            ):
                cut = (text[: _LENGTH[1]] for text in candidates if len(text) >= _LENGTH[0])
                texts[kind].extend(islice(filter(is_new, cut), wanted[kind]))
        for kind, (train, test) in texts_of.items():
            if min(len(train), len(test)) < n_texts:
                raise ValueError(
                    f"{library} has {len(train)} and {len(test)} texts of {kind} that differ "
                    f"enough, fewer than {n_texts} for each split: lower n_texts"
                )
        cells.update({(library, kind): splits for kind, splits in texts_of.items()})
    source = {"libraries": _versions(libraries), "n_texts": n_texts, "seed": seed}
    return _assembled(("library", "kind"), cells, source, seed)


def dataset_texts(
    dataset: Any,
    label_columns: Sequence[str] = ("label",),
    text_column: str = "text",
    n_texts: int = 100,
    seed: int = 0,
) -> LabelledTexts:
    """Texts and labels of a Hugging Face dataset.

    Args:
        dataset: A `datasets.Dataset`, or an argument of `open_dataset`.
        label_columns: One attribute each. Sparse probing uses all of them, TPP the first. SCR needs
            two, of which the second has two values.
        text_column: The column with the texts.
        n_texts: Texts of each combination of labels, in each split. If a combination has fewer, all
            combinations get that many.
        seed: Seed for the choice of texts.

    Raises:
        ValueError: A column is missing, or a combination of labels has too few texts.
    """
    source: dict[str, Any] = {"dataset": dataset if isinstance(dataset, (str, Path)) else "object"}
    if isinstance(dataset, (str, Path)):
        source["dataset"] = str(dataset)
        dataset = open_dataset(str(dataset))
    for column in (text_column, *label_columns):
        if column not in dataset.column_names:
            raise ValueError(
                f"the dataset has no column {column!r}; it has {', '.join(dataset.column_names)}"
            )
    attributes = [_label_names(dataset, column) for column in label_columns]
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    is_new = _NearDuplicates()
    by_labels: dict[tuple[str, ...], list[str]] = {
        cell: [] for cell in product(*(sorted(set(labels)) for labels in attributes))
    }
    if len(by_labels) * 2 * _MIN_PER_CELL > len(dataset):
        raise ValueError(
            f"{len(dataset)} rows for {len(by_labels)} (combinations of) labels in "
            f"{', '.join(label_columns)}: probing needs {2 * _MIN_PER_CELL} of each at least"
        )
    n_missing = 2 * n_texts * len(by_labels)
    for row in order:
        texts = by_labels[tuple(labels[row] for labels in attributes)]
        if len(texts) < 2 * n_texts:
            text = dataset[row][text_column]
            if text and is_new(text):
                texts.append(text)
                n_missing -= 1
        if n_missing == 0:
            break
    cell, smallest = min(by_labels.items(), key=lambda item: len(item[1]))
    n = len(smallest) // 2
    if n < _MIN_PER_CELL:
        raise ValueError(
            f"{len(smallest)} different texts with {', '.join(label_columns)} = {', '.join(cell)}: "
            f"probing needs {2 * _MIN_PER_CELL} at least"
        )
    if n < n_texts:
        logger.warning(
            "%d instead of %d texts of each label in each split, as many as there are of %s",
            n,
            n_texts,
            ", ".join(cell),
        )
    cells = {cell: (texts[:n], texts[n : 2 * n]) for cell, texts in by_labels.items()}
    source.update(text_column=text_column, n_texts=n, seed=seed)
    return _assembled(label_columns, cells, source, seed)


def _assembled(
    attributes: Sequence[str],
    cells: Mapping[tuple[str, ...], tuple[list[str], list[str]]],
    source: Mapping[str, Any],
    seed: int,
) -> LabelledTexts:
    splits = []
    for i in range(2):
        rows = [(text, cell) for cell, texts in cells.items() for text in texts[i]]
        random.Random(seed).shuffle(rows)
        labels = {name: tuple(cell[j] for _, cell in rows) for j, name in enumerate(attributes)}
        splits.append(Split(tuple(text for text, _ in rows), labels))
    return LabelledTexts(splits[0], splits[1], source)


class _NearDuplicates:
    """Recognises texts that largely repeat earlier ones.

    Documentation and code are copied within and between libraries. A text is new if earlier new
    texts contain fewer than half of its sequences of five words. Numbers are ignored.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[str, ...]] = set()

    def __call__(self, text: str) -> bool:
        words = re.findall(r"[^\W\d_]+", text.lower())
        starts = range(max(1, len(words) - _SHINGLE + 1))
        shingles = {tuple(words[i : i + _SHINGLE]) for i in starts}
        if 2 * len(shingles & self._seen) >= len(shingles):
            return False
        self._seen |= shingles
        return True


def _prose(docstring: str) -> str:
    """A docstring without its examples and its sections, such as parameters."""
    paragraphs = re.split(r"\n\s*\n", docstring)
    prose = []
    for paragraph in paragraphs:
        if re.search(r"^\s*-{3,}\s*$|^\s*[A-Z]\w*:\s*$", paragraph, re.MULTILINE):
            break  # the first section, of numpy's or of Google's style
        if not re.search(r"^\s*(>>>|\.\. |:|```)", paragraph, re.MULTILINE):
            prose.append(paragraph)
    return "\n\n".join(prose)


def _label_names(dataset: Any, column: str) -> list[str]:
    feature = dataset.features[column]
    names: Iterable[Any] = dataset[column]
    if hasattr(feature, "int2str"):
        return [feature.int2str(value) for value in names]
    return [str(value) for value in names]


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions by package; "" for one of no distribution, as those of the standard library."""
    distributions = importlib.metadata.packages_distributions()
    versions = {}
    for package in packages:
        # Python 3.10 does not see distributions that do not list their packages: try the same name
        (name, *_) = distributions.get(package, [package])
        try:
            versions[package] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    return versions
