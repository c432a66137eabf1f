"""The rows and the model of a comparison: held-out rows, and checks that a repeated comparison uses
the same rows and model."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import torch
from jaxtyping import Float
from torch import Tensor

from sae_whiten._checks import FieldError
from sae_whiten.estimation.dataset import TEXT_COLUMNS, TOKEN_COLUMNS
from sae_whiten.estimation.sources import Model, ModelActivations

__all__ = ["describe_activations", "describe_rows", "divide_rows", "same_activations", "shuffled"]

_MOST_ROWS = 4096  # of a dataset, in its fingerprint
_N_SEQUENCES, _N_DIMENSIONS = 4, 8  # in the fingerprint of a model
_TOLERANCE = 0.01  # relative; more than the rounding of another device or dtype changes


def describe_rows(dataset: Any, n_held_out: int) -> str:
    """A fingerprint of a dataset: its number of rows, and a checksum of some of them.

    The checksum covers up to 4096 rows spread over the dataset, or the first rows of a stream.

    Args:
        dataset: A `datasets.Dataset` or `datasets.IterableDataset`.
        n_held_out: Rows that are to be held out.

    Raises:
        ValueError: The dataset has another type.
        FieldError: Fewer rows are left to train on than held out.
    """
    if isinstance(dataset, datasets.IterableDataset):
        rows: Any = list(dataset.with_format(None).take(2 * n_held_out))
        n_rows, described = len(rows), f"a stream that begins with {len(rows)} rows"
    elif isinstance(dataset, datasets.Dataset):
        n_rows, described = len(dataset), f"{len(dataset)} rows"
        step = math.ceil(n_rows / _MOST_ROWS) or 1
        rows = dataset.with_format(None).select(range(0, n_rows, step))
    else:
        raise ValueError(f"a {type(dataset).__name__} is not a dataset: give one of its splits")
    if n_rows < 2 * n_held_out:
        raise FieldError(
            "held_out_sequences",
            n_held_out,
            f"the dataset has {n_rows} rows, of which {max(0, n_rows - n_held_out)} are left to "
            f"train on; lower it to {n_rows // 2} or less, or give more rows",
        )
    checksum = hashlib.sha256()
    for row in rows:
        column = next((name for name in (*TOKEN_COLUMNS, *TEXT_COLUMNS) if name in row), None)
        checksum.update(json.dumps(row if column is None else row[column], default=str).encode())
    return f"{described} of checksum {checksum.hexdigest()[:16]}"


def divide_rows(dataset: Any, n_held_out: int, context_size: int) -> tuple[Any, Any]:
    """The first rows, to evaluate on, and the rest, to train on."""
    if isinstance(dataset, datasets.IterableDataset):
        held_out, training_rows = dataset.take(n_held_out), dataset.skip(n_held_out)
    else:
        held_out = dataset.select(range(n_held_out))
        training_rows = dataset.select(range(n_held_out, len(dataset)))
    return held_out.map(partial(_beginning, 8 * context_size)), training_rows


def _beginning(n_characters: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """The beginning of a document. Evaluation then covers many documents, not the first few."""
    return {
        name: value[:n_characters] if isinstance(value, str) else value
        for name, value in row.items()
    }


def shuffled(dataset: Any, seed: int) -> Any:
    """The rows in random order. A stream is shuffled with a buffer of 10 000 rows."""
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.shuffle(seed=seed, buffer_size=10_000)
    return dataset.shuffle(seed=seed)


@torch.no_grad()
def describe_activations(
    model: Model, dataset: Any, hook_name: str, *, context_size: int, prepend_bos: bool
) -> list[float]:
    """A fingerprint of a model and its weights, from activations at the hook.

    Returns:
        Root mean squares of the activations in eight dimensions, spread evenly, over the tokens of
        the first sequences of the dataset; with four significant digits.

    Raises:
        ValueError: The dataset is shorter than one sequence.
    """
    batches: list[Float[Tensor, "batch seq d"]] = []
    source = ModelActivations(
        model,
        dataset,
        hook_name,
        batch_size_prompts=_N_SEQUENCES,
        context_size=context_size,
        prepend_bos=prepend_bos,
        seqpos_slice=(None,),
        streaming=True,
    )
    if not source.read(lambda _, activations, mask: batches.append(activations)):
        raise ValueError(
            f"the rows that are held out are shorter than one sequence, {context_size} tokens: "
            "hold out more, or lower the context size"
        )
    # the first token of a sequence often has activations far larger than all others
    activations = batches[0][:, min(1, context_size - 1) :].flatten(0, 1).double().cpu()
    sizes = activations.square().mean(0).sqrt()
    chosen = sizes[:: math.ceil(len(sizes) / _N_DIMENSIONS)]
    return [float(f"{size:.4g}") for size in chosen.tolist()]


def same_activations(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether results of `describe_activations` are equal up to rounding, which devices change."""
    return len(first) == len(second) and all(
        map(partial(math.isclose, rel_tol=_TOLERANCE), first, second)
    )
