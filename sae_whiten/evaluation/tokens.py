"""Batches of tokens for experiments on finished SAEs."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from jaxtyping import Integer
from sae_lens.config import HfDataset
from sae_lens.saes.sae import SAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_whiten.estimation.sources import Model, token_store
from sae_whiten.evaluation.saes import common_setting

__all__ = ["sequence_settings", "token_batches"]

logger = logging.getLogger(__name__)


def sequence_settings(
    saes: Mapping[str, SAE[Any]], context_size: int | None, prepend_bos: bool | None
) -> tuple[int, bool]:
    """Tokens per sequence, and whether it starts with BOS.

    For None, the SAEs' metadata are used: the smallest context_size, the common prepend_bos.

    Raises:
        ValueError: The SAEs were trained with different prepend_bos.
    """
    if context_size is None:
        sizes = (sae.cfg.metadata.context_size for sae in saes.values())
        context_size = min((int(size) for size in sizes if size is not None), default=128)
    if prepend_bos is None:
        prepend_bos = bool(common_setting(saes, "prepend_bos", True))
    return context_size, prepend_bos


def token_batches(
    saes: Mapping[str, SAE[Any]],
    model: Model,
    dataset: HfDataset | str,
    n_tokens: int,
    context_size: int,
    prepend_bos: bool,
    batch_size: int,
    task: str,
) -> Iterator[Integer[Tensor, "batch seq"]]:
    """Batches of tokens, cut from the dataset in the same way as SAELens does for training.

    `task` is the name of the progress bar.
    """
    options = {
        "streaming": True,
        "context_size": context_size,
        "prepend_bos": prepend_bos,
        "seqpos_slice": (None,),
        "disable_concat_sequences": bool(common_setting(saes, "disable_concat_sequences", False)),
        "sequence_separator_token": common_setting(saes, "sequence_separator_token", "bos"),
    }
    with warnings.catch_warnings():
        # warnings that the dataset is not tokenized, or has longer sequences
        warnings.simplefilter("ignore")
        store = token_store(
            model, dataset, next(iter(saes.values())).cfg.metadata.hook_name, options
        )
    n_sequences = -(-n_tokens // context_size)
    sequences = islice(store.iterable_sequences, n_sequences)
    device = next(model.parameters()).device
    n_wanted, n_read = n_sequences * context_size, 0
    with tqdm(desc=task, total=n_wanted, unit=" tokens") as bar:
        while rows := list(islice(sequences, batch_size)):
            yield torch.stack(rows).to(device)
            n_read += len(rows) * context_size
            bar.update(len(rows) * context_size)
    # counted here, because the bar counts nothing under TQDM_DISABLE
    if n_read == 0:
        raise ValueError(f"the dataset is shorter than one sequence, {context_size} tokens")
    if n_read < n_wanted:
        logger.warning("the dataset ended after %d of %d tokens", n_read, n_wanted)
