"""Batches of tokens for experiments on finished SAEs."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Integer
from sae_lens.config import HfDataset
from sae_lens.saes.sae import SAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_whiten.estimation.sources import Model, token_store
from sae_whiten.evaluation.options import SequenceOptions
from sae_whiten.evaluation.saes import check_sae, common_setting

__all__ = ["Reading", "token_batches"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """How the model reads, for all SAEs alike.

    Attributes:
        context_size: Tokens per sequence.
        prepend_bos: Whether sequences start with BOS.
        batch_size: Sequences per pass of the model.
    """

    context_size: int
    prepend_bos: bool
    batch_size: int

    @classmethod
    def of(cls, saes: Mapping[str, SAE[Any]], model: Model, options: SequenceOptions) -> "Reading":
        """The options. Where they are None: the smallest context_size in the SAEs' metadata
        (128 if none has it), and the prepend_bos of all.

        Raises:
            ValueError: An SAE cannot be evaluated on the model, or they were trained with different
                prepend_bos.
        """
        for name, sae in saes.items():
            check_sae(name, sae, model)
        context_size, prepend_bos = options.context_size, options.prepend_bos
        if context_size is None:
            sizes = (sae.cfg.metadata.context_size for sae in saes.values())
            context_size = min((int(size) for size in sizes if size is not None), default=128)
        if prepend_bos is None:
            prepend_bos = bool(common_setting(saes, "prepend_bos", True))
        return cls(context_size, prepend_bos, options.batch_size_prompts)


def token_batches(
    saes: Mapping[str, SAE[Any]],
    model: Model,
    dataset: HfDataset | str,
    n_tokens: int,
    reading: Reading,
    task: str,
) -> Iterator[Integer[Tensor, "batch seq"]]:
    """Batches of tokens, cut from the dataset in the same way as SAELens does for training.

    `task` is the name of the progress bar.
    """
    context_size = reading.context_size
    with warnings.catch_warnings():
        # warnings that the dataset is not tokenized, or has longer sequences
        warnings.simplefilter("ignore")
        store = token_store(
            model,
            dataset,
            next(iter(saes.values())).cfg.metadata.hook_name,
            streaming=True,
            context_size=context_size,
            prepend_bos=reading.prepend_bos,
            seqpos_slice=(None,),
            disable_concat_sequences=bool(common_setting(saes, "disable_concat_sequences", False)),
            sequence_separator_token=common_setting(saes, "sequence_separator_token", "bos"),
            use_chat_formatting=bool(common_setting(saes, "use_chat_formatting", False)),
        )
    n_sequences = -(-n_tokens // context_size)
    sequences = islice(store.iterable_sequences, n_sequences)
    device = next(model.parameters()).device
    n_wanted, n_read = n_sequences * context_size, 0
    with tqdm(desc=task, total=n_wanted, unit=" tokens") as bar:
        while rows := list(islice(sequences, reading.batch_size)):
            yield torch.stack(rows).to(device)
            n_read += len(rows) * context_size
            bar.update(len(rows) * context_size)
    # counted here, because the bar counts nothing under TQDM_DISABLE
    if n_read == 0:
        raise ValueError(f"the dataset is shorter than one sequence, {context_size} tokens")
    if n_read < n_wanted:
        logger.warning("the dataset ended after %d of %d tokens", n_read, n_wanted)
