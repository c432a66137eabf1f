"""Where the activations of several hooks come from, batch by batch: a model, or a cache on disk."""

import difflib
import hashlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from jaxtyping import Bool, Float, Integer, Shaped
from sae_lens.config import HfDataset
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name, get_special_token_ids
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedRootModule
from transformer_lens.model_bridge import TransformerBridge

from sae_whiten._checks import require_context
from sae_whiten.estimation.dataset import (
    check_columns,
    check_length,
    is_on_this_machine,
    naming_columns,
    open_dataset,
)

__all__ = [
    "ActivationSource",
    "CachedActivations",
    "Model",
    "ModelActivations",
    "check_hook",
    "match_hooks",
    "part_of",
    "resolution_of",
    "resolution_of_column",
    "stopping_after",
    "token_store",
]

Model: TypeAlias = HookedRootModule | TransformerBridge
"""Models that SAELens accepts; its own wrapper of Hugging Face models is a HookedRootModule."""

Receiver = Callable[[str, Float[Tensor, "batch seq d_in"], Bool[Tensor, "batch seq"] | None], None]
"""Receives a hook's name, its activations, and a mask of those that count; None: all count."""


@runtime_checkable
class ActivationSource(Protocol):
    """Sequences of activations in a fixed order.

    Attributes:
        hook_names: The hooks.
        n_sequences: How many sequences were read.
        beginning: Checksum of the first sequence, to identify the source; None if it is empty.
        resolution: By hook, machine epsilon of the dtype that the activations were computed or kept
            in; the tensors that are read may be of a finer one.
    """

    hook_names: list[str]
    n_sequences: int
    beginning: str | None
    resolution: dict[str, float]

    def read(self, receive: Receiver) -> bool:
        """Pass the next batch of every hook to `receive`; False if there is none left."""
        ...

    def skip(self, n_sequences: int) -> None:
        """Skip sequences, to continue where another reader stopped."""
        ...


class ModelActivations:
    """Activations of a language model, from one forward pass for all hooks, up to the last hook.

    The tokens are those of SAELens' `ActivationsStore`, which are those of training.

    Args:
        model: As SAELens loads it.
        dataset: A dataset, or a path or name as for `open_dataset`, with tokens or with text.
        hook_names: Hook names or glob patterns.
        context_size: Tokens per sequence.
        seqpos_slice: Positions of a sequence to take, as in SAELens; all by default.
        streaming: As for `open_dataset`.
        hook_head_index: As in SAELens.
        exclude_special_tokens: As in SAELens.
        batch_size_prompts: Sequences per pass.
        autocast_lm: As in SAELens.
        split: Which split of the dataset, if it is a path.
        shard: Number of this shard of the dataset, and the number of shards.
        options: Further arguments of `ActivationsStore`: prepend_bos, use_chat_formatting...

    Raises:
        ValueError: A pattern matches no hook, the context is too long for the model, or the dataset
            has no tokens.
    """

    def __init__(
        self,
        model: Model,
        dataset: HfDataset | str,
        hook_names: str | Sequence[str],
        *,
        context_size: int,
        seqpos_slice: tuple[int | None, ...] = (None,),
        streaming: bool = True,
        hook_head_index: int | None = None,
        exclude_special_tokens: bool | list[int] = False,
        batch_size_prompts: int = 32,
        autocast_lm: bool = False,
        split: str = "train",
        shard: tuple[int, int] = (0, 1),
        **options: Any,
    ) -> None:
        self.hook_names = match_hooks(model.hook_dict, hook_names)
        self.resolution = dict.fromkeys(self.hook_names, resolution_of(model, autocast_lm))
        require_context(context_size, model)
        self.n_sequences = 0
        self._model = model
        self._head = hook_head_index
        self._batch_size = batch_size_prompts
        self._autocast = autocast_lm
        self._context_size = context_size
        self._slice = slice(*seqpos_slice)
        self._special = _special_tokens(model, exclude_special_tokens)
        self._run_options = stopping_after(model, self.hook_names)
        if isinstance(dataset, str) and split != "train":
            dataset = open_dataset(dataset, split, streaming)
        store = token_store(
            model,
            dataset,
            self.hook_names[0],
            context_size=context_size,
            seqpos_slice=seqpos_slice,
            streaming=streaming,
            **options,
        )
        store.dataset = part_of(store.dataset, *shard)
        sequences: Iterator[Tensor] = iter(store.iterable_sequences)
        first = list(itertools.islice(sequences, 1))
        self.beginning = _checksum(first[0]) if first else None
        self._sequences = itertools.chain(first, sequences)

    def read(self, receive: Receiver) -> bool:
        """Run the model on the next sequences."""
        sequences = list(itertools.islice(self._sequences, self._batch_size))
        if not sequences:
            return False
        for i, sequence in enumerate(sequences):
            check_length(len(sequence), self._context_size, self.n_sequences + i)
        self.n_sequences += len(sequences)
        tokens = torch.stack(sequences).to(next(self._model.parameters()).device)
        mask = None
        if self._special is not None:
            mask = ~torch.isin(tokens[:, self._slice], self._special.to(tokens.device))

        def hand_over(name: str, acts: Tensor, hook: Any) -> None:
            if acts.ndim < 3 or acts.shape[:2] != tokens.shape:
                raise ValueError(
                    f"{name} has activations of shape {tuple(acts.shape)} for tokens of shape "
                    f"{tuple(tokens.shape)}: statistics need a hook with a vector at every token"
                )
            acts = acts[:, self._slice]
            if self._head is not None:
                if acts.ndim != 4 or self._head >= acts.shape[2]:
                    raise ValueError(
                        f"hook_head_index={self._head}, but {name} has activations of shape "
                        f"{tuple(acts.shape)}, not (batch, seq, n_heads > {self._head}, d_head)"
                    )
                acts = acts[:, :, self._head]
            receive(name, acts.flatten(2), None if mask is None else mask.to(acts.device))

        # under the requested name: a TransformerBridge has other names for its hooks
        hooks: list[Any] = [(name, partial(hand_over, name)) for name in self.hook_names]
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self._autocast):
            self._model.run_with_hooks(tokens, fwd_hooks=hooks, **self._run_options)
        return True

    def skip(self, n_sequences: int) -> None:
        """Skip sequences; text is tokenised again, because they may span several documents."""
        for _ in tqdm(range(n_sequences), desc="Skipping to the place in the dataset", leave=False):
            if next(self._sequences, None) is None:
                raise ValueError("the dataset is shorter than when this estimation began")
        self.n_sequences += n_sequences


class CachedActivations:
    """Activations that SAELens' `CacheActivationsRunner` wrote to disk.

    Args:
        path: The directory.
        hook_names: Hook names or glob patterns.
        exclude_special_tokens: Ids of tokens whose activations are left out.
        batch_size_prompts: Sequences to read at a time.
        shard: Number of this shard, and the number of shards.

    Raises:
        FileNotFoundError: There is no such dataset.
        ValueError: None of its hooks matches, it has several splits, or it lacks the token ids
            needed to exclude tokens.
    """

    def __init__(
        self,
        path: str | Path,
        hook_names: str | Sequence[str],
        *,
        exclude_special_tokens: bool | list[int] = False,
        batch_size_prompts: int = 32,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            raise ValueError(f"{path} holds several splits: give the folder of one of them")
        columns = [name for name in dataset.column_names if name != "token_ids"]
        self.hook_names = match_hooks(columns, hook_names)
        self.resolution = {name: resolution_of_column(dataset, name) for name in self.hook_names}
        self.n_sequences = 0
        self._batch_size = batch_size_prompts
        self._special: Tensor | None = None
        if exclude_special_tokens is True:
            raise ValueError(
                "cached activations have no tokenizer that knows the special tokens: give "
                "exclude_special_tokens as a list of ids"
            )
        if exclude_special_tokens:
            if "token_ids" not in dataset.column_names:
                raise ValueError(f"{path} holds no token_ids, so no tokens can be excluded")
            self._special = torch.tensor(exclude_special_tokens, dtype=torch.long)
        dataset = part_of(dataset, *shard)
        needed = [*self.hook_names, *(["token_ids"] if self._special is not None else [])]
        self._dataset = dataset.with_format("torch", columns=needed)
        first = self._dataset[:1][self.hook_names[0]]
        self.beginning = _checksum(first) if len(first) else None

    def read(self, receive: Receiver) -> bool:
        """Read the next sequences."""
        rows = self._dataset[self.n_sequences : self.n_sequences + self._batch_size]
        n = len(rows[self.hook_names[0]])
        if n == 0:
            return False
        self.n_sequences += n
        mask = None if self._special is None else ~torch.isin(rows["token_ids"], self._special)
        for name in self.hook_names:
            receive(name, rows[name], mask)
        return True

    def skip(self, n_sequences: int) -> None:
        """Skip sequences."""
        self.n_sequences += n_sequences


def _checksum(values: Shaped[Tensor, "..."]) -> str:
    return hashlib.sha256(values.cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def match_hooks(names: Iterable[str], patterns: str | Sequence[str]) -> list[str]:
    """The names that match a glob pattern, in their order.

    `*` and `?` match anything but a dot, so that "layers.*" matches layers but not their parts;
    `**` matches anything; [abc] and [!abc] match one character.

    >>> match_hooks(["layers.0", "layers.0.mlp", "layers.1"], "layers.*")
    ['layers.0', 'layers.1']

    Raises:
        ValueError: A pattern matches nothing; the message names the nearest hooks.
    """
    names = list(names)
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        regex = _regex(pattern)
        matches = [name for name in names if regex.fullmatch(name)]
        if not matches:
            wider = _regex(re.sub(r"\*+", "**", pattern))
            across_dots = [name for name in names if wider.fullmatch(name)][:3]
            hint = " (* stops at a dot, ** does not)" if across_dots else ""
            near = across_dots or _nearest(pattern, names)
            raise ValueError(f"no hook matches {pattern!r}{hint}; nearest: {', '.join(near)}")
        matched.update(matches)
    return [name for name in names if name in matched]


def check_hook(model: Model, name: str) -> None:
    """Refuse a hook that the model does not have.

    Raises:
        ValueError: The hook does not exist; the message names the nearest.
    """
    hooks = list(model.hook_dict)
    if name not in hooks:
        near = ", ".join(_nearest(name, hooks))
        raise ValueError(f"the model has no hook {name!r}; nearest: {near}")


def _nearest(name: str, hooks: Sequence[str]) -> list[str]:
    """Up to three hooks: those that lack only a prefix, or else those spelled most like it."""
    ending_so = [hook for hook in hooks if hook.endswith(f".{name}")]
    return (ending_so or difflib.get_close_matches(name, hooks) or list(hooks))[:3]


def _regex(pattern: str) -> re.Pattern[str]:
    """A pattern of `match_hooks` as a regular expression."""
    wildcards = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    parts = re.split(r"(\*\*|\*|\?|\[!?[^\]]+\])", pattern)
    return re.compile(
        "".join(
            wildcards.get(part)
            or ("[^" + part[2:] if part.startswith("[!") else part if i % 2 else re.escape(part))
            for i, part in enumerate(parts)
        )
    )


def part_of(dataset: Any, rank: int, world_size: int) -> Any:
    """One of `world_size` parts of a dataset, each row in exactly one of them."""
    if world_size == 1:
        return dataset
    if isinstance(dataset, datasets.IterableDataset):
        return split_dataset_by_node(dataset, rank, world_size)
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"a {type(dataset).__name__} cannot be split into shards")
    if rank >= len(dataset):
        return dataset.select([])  # split_dataset_by_node refuses this
    return split_dataset_by_node(dataset, rank, world_size)


def token_store(
    model: Model, dataset: HfDataset | str, hook_name: str, *, streaming: bool, **options: Any
) -> ActivationsStore:
    """SAELens' activations store, of which only the tokens are used.

    Args:
        model: As SAELens loads it.
        dataset: A dataset, or a path or name as for `open_dataset`.
        hook_name: A hook of the model.
        streaming: As for `open_dataset`.
        options: Further arguments of the store: context_size, prepend_bos...

    Raises:
        ValueError: The dataset is empty, or has no column of tokens or text.
    """
    name, chat = dataset if isinstance(dataset, str) else "", options.get("use_chat_formatting")
    if name and is_on_this_machine(name):
        dataset = open_dataset(name, streaming=streaming)
    check_columns(dataset, name or "the dataset", bool(chat))
    if isinstance(dataset, datasets.Dataset):
        # a copy: the store changes the format of its dataset
        dataset = dataset.with_format(dataset.format["type"])
    parameters = inspect.signature(ActivationsStore.__init__).parameters
    # newer versions call it n_sequences_in_buffer
    buffer = next(name for name in parameters if name.endswith("_in_buffer"))
    try:
        with naming_columns(name, streaming, bool(chat)):
            return ActivationsStore(
                model=cast(HookedRootModule, model),
                dataset=dataset,
                hook_name=hook_name,
                hook_head_index=None,
                d_in=1,
                **{buffer: 1},
                total_training_tokens=0,
                store_batch_size_prompts=1,
                train_batch_size_tokens=1,
                normalize_activations="none",
                device=torch.device("cpu"),
                dtype="float32",
                streaming=streaming,
                **options,
            )
    except StopIteration:
        raise ValueError("the dataset is empty") from None


def _special_tokens(model: Model, exclude: bool | list[int]) -> Integer[Tensor, "n"] | None:
    if exclude is False:
        return None
    ids = get_special_token_ids(model.tokenizer) if exclude is True else exclude  # pyright: ignore[reportArgumentType]
    return torch.tensor(ids, dtype=torch.long)


def resolution_of(model: Model, autocast_lm: bool) -> float:
    """Machine epsilon of the dtype a model computes in; its activations may be cast later."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.finfo(torch.bfloat16 if autocast_lm else next(dtypes, torch.float64)).eps


def resolution_of_column(dataset: datasets.Dataset, name: str) -> float:
    """Machine epsilon of the dtype in which a column is kept; `datasets` reads it as float32.

    0 if the values are not floating point.
    """
    feature = dataset.features[name]
    while hasattr(feature, "feature"):  # lists of lists
        feature = feature.feature
    dtype = getattr(torch, str(getattr(feature, "dtype", None)), None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return torch.finfo(dtype).eps
    return 0.0


def stopping_after(model: Model, names: Sequence[str]) -> dict[str, Any]:
    """Arguments that end the forward pass after the last hook, as SAELens' store does."""
    layers = [extract_stop_at_layer_from_tlens_hook_name(name) for name in names]
    known = [layer for layer in layers if layer is not None]
    stop = max(known) if len(known) == len(layers) else None
    options: dict[str, Any] = {"stop_at_layer": stop}
    if isinstance(model, HookedProxyLM):
        options["_names_filter"] = list(names)
    return options
