"""SAELens' activations store, able to continue exactly where a checkpoint left it."""

import hashlib
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from tqdm.auto import tqdm

from sae_whiten._checks import FieldError
from sae_whiten._files import load_tensors, save_tensors
from sae_whiten.estimation.dataset import check_length
from sae_whiten.estimation.sources import resolution_of, resolution_of_column, stopping_after
from sae_whiten.statistics import NonFiniteActivationsError, finite_rows

__all__ = ["PackedActivationsStore", "ResumableActivationsStore", "buffer_field", "check_buffer"]

logger = logging.getLogger(__name__)

T_Acts = TypeVar("T_Acts", Tensor, None)

_KIND = "activations_store_state"
_MAX_USELESS_PASSES = 100
_OURS = (
    "__iter__",
    "__next__",
    "get_data_loader",
    "get_multi_hook_data_loader",
    "save_to_checkpoint",
    "load_from_checkpoint",
)
_TRAIN_ON_ANY_ITERATOR = "WhiteningTrainer trains on any iterator of activations"
_N_FINGERPRINT = 16  # activations that identify a model
_SEQUENCES_IN_BUFFER = 20  # SAELens' default while it had one


def buffer_field(holder: Any) -> str:
    """The attribute of a config or store of SAELens that sets the size of the mixing buffer.

    Newer versions call it n_sequences_in_buffer, and have None for n_batches_in_buffer.
    """
    old, new = "n_batches_in_buffer", "n_sequences_in_buffer"
    return old if getattr(holder, old, None) is not None or not hasattr(holder, new) else new


def check_buffer(
    n_batches_in_buffer: int | None, n_positions: int, train_batch_size_tokens: int
) -> int:
    """The size of the mixing buffer, which has to hold a training batch.

    Args:
        n_batches_in_buffer: As in SAELens' `LanguageModelSAERunnerConfig`, in sequences. None (not
            set, in newer versions): 20, or as many as four training batches take.
        n_positions: Positions of a sequence that are trained on: its length, or those that
            `seqpos_slice` keeps.
        train_batch_size_tokens: As in that config.

    Returns:
        The number of sequences.

    Raises:
        ValueError: The batch is larger than the buffer; the message says what to set.
    """
    if n_batches_in_buffer is None:
        four = math.ceil(4 * train_batch_size_tokens / max(n_positions, 1))
        return max(_SEQUENCES_IN_BUFFER, four)
    size = n_batches_in_buffer * n_positions
    if size < train_batch_size_tokens:
        raise ValueError(
            f"the activation buffer holds n_batches_in_buffer={n_batches_in_buffer} sequences of "
            f"{n_positions} activations, {size} in all, fewer than a training batch "
            f"(train_batch_size_tokens={train_batch_size_tokens}): set n_batches_in_buffer to at "
            f"least {math.ceil(train_batch_size_tokens / max(n_positions, 1))}, or a smaller "
            "train_batch_size_tokens"
        )
    return n_batches_in_buffer


@dataclass
class _Anchor:
    """A point from which the mixing buffer can be filled again.

    Attributes:
        n_batches: Batches before it; negative if they were drawn before training.
        buffer: Activations left in the buffer, shape (n, d_in), or None if there were none.
        generator: State of the generator that mixes.
        position: Sequences read in this epoch; rows, with cached activations.
        sequences: Checksum of these sequences; None with cached activations.
        n_epochs: How often the dataset was started.
        n_dataset_processed: Rows of the dataset that SAELens has counted.
        n_skipped: Activations left out before it, because they were not finite.
    """

    n_batches: int
    buffer: Tensor | None
    generator: Tensor
    position: int
    sequences: str | None
    n_epochs: int
    n_dataset_processed: int
    n_skipped: int

    def fields(self) -> dict[str, Any]:
        """All but the tensors, as JSON values."""
        return {
            "n_batches": self.n_batches,
            "position": self.position,
            "sequences": self.sequences,
            "n_epochs": self.n_epochs,
            "n_dataset_processed": self.n_dataset_processed,
            "n_skipped": self.n_skipped,
        }


class ResumableActivationsStore(ActivationsStore):
    """An `ActivationsStore` whose stream of training batches can be resumed bit for bit.

    SAELens saves how many rows of the dataset were read, but neither the activations in the mixing
    buffer nor the state of its shuffling. Here the buffer is refilled from an *anchor*: its
    remaining activations, the generator's state and the position in the dataset, saved before a
    refill. Resuming restores the last anchor at or before the next batch, refills the buffer (one
    pass of the model over its tokens) and drops the batches that were already served.

    The order of batches is that of `sae_lens.training.mixing_buffer`, given the state of torch's
    global generator when the first batch was drawn.
    """

    n_sequences: int = 0
    """Sequences drawn from the dataset in this epoch, by training and by evaluators."""
    n_epochs: int = 0
    """How often the dataset was started, including before a resume; 0 with cached activations."""
    training_position: Callable[[], int] | None = None
    """Returns how many batches training has used; None: all that were drawn."""

    on_nonfinite: Literal["raise", "skip"] = "raise"
    """What to do with activations that hold a NaN or an infinity."""
    n_skipped: int = 0
    """Activations left out because they were not finite."""

    # what entered the mixing buffer, with None after all that entered it before a batch
    _unmixed: deque[Tensor | None] | None = None
    _known_fingerprint: tuple[str, Tensor] | None = None

    @classmethod
    def adopt(cls, store: Any) -> "ResumableActivationsStore":
        """A store of this class that reads the same data as SAELens' store, from the beginning.

        Args:
            store: An `ActivationsStore`, which must not be used afterwards. If it is of a subclass,
                its overrides are kept.

        Raises:
            TypeError: It is not an `ActivationsStore`, or its class overrides how batches are mixed
                or saved, which resuming depends on.
        """
        if isinstance(store, cls):
            return store
        if not isinstance(store, ActivationsStore):
            raise TypeError(
                f"activations_store is of {type(store).__name__}, not SAELens' ActivationsStore. "
                f"{_TRAIN_ON_ANY_ITERATOR}"
            )
        store_class = type(store)
        ignored = [n for n in _OURS if getattr(store_class, n) is not getattr(ActivationsStore, n)]
        if ignored and not issubclass(store_class, ResumableActivationsStore):
            raise TypeError(
                f"{store_class.__name__} overrides {', '.join(ignored)}, but the runner needs its "
                f"own to resume runs. {_TRAIN_ON_ANY_ITERATOR}"
            )
        kind: Any = cls
        if store_class is not ActivationsStore:
            # made at run time, to keep the overrides of a user's subclass
            kind = type(f"Resumable{store_class.__name__}", (cls, store_class), {})
        # not by its constructor, which would load the dataset again and read its first rows
        adopted = kind.__new__(kind)
        vars(adopted).update(vars(store))
        adopted._dataloader, adopted.n_dataset_processed, adopted.current_row_idx = None, 0, 0
        if adopted.dataset is not None:
            adopted.iterable_sequences = adopted._iterate_tokenized_sequences()
        return adopted

    @property
    def widths(self) -> dict[str, int]:
        """The width of every hook, in the order in which a batch holds them."""
        return {self.hook_name: self.d_in}

    @property
    def resolution(self) -> float:
        """Machine epsilon of the coarsest dtype that the activations were computed or kept in."""
        of_model = resolution_of(self.model, self.autocast_lm)
        cached = self.cached_activation_dataset
        if cached is None:
            return of_model
        return max(of_model, *(resolution_of_column(cached, name) for name in self.widths))

    def _finite(self, acts: Tensor, number: int) -> tuple[Tensor, int]:
        name = f"pass {number} of the model, at {self.hook_name},"
        return finite_rows(acts, self.on_nonfinite, name)

    def _iterate_filtered_activations(self) -> Any:
        # once per pass of the model, not per training step: each check makes a GPU wait
        n_useless = 0
        for number, acts in enumerate(super()._iterate_filtered_activations()):
            finite, n_bad = self._finite(acts, number)
            self.n_skipped += n_bad
            n_useless = 0 if len(finite) else n_useless + 1
            if n_useless == _MAX_USELESS_PASSES:
                raise ValueError(
                    f"{n_useless} passes of the model in a row gave no activation at "
                    f"{', '.join(self.widths)} that could be used ({self.n_skipped} were not "
                    "finite): the model is broken, or every token is excluded"
                )
            yield finite

    def _iterate_tokenized_sequences(self) -> Any:
        self._begin_epoch()
        self.n_epochs += 1
        training = self.training_position
        if self.n_epochs == 2 and training is not None and training() == 0:
            logger.warning(
                "the dataset was repeated while the whitening was being estimated: repeated "
                "samples add no information, and the excess variance measured from them is too "
                "small. Use a larger dataset, or shrinkage='oas'"
            )
        for sequence in super()._iterate_tokenized_sequences():
            check_length(len(sequence), self.context_size, self.n_sequences)
            self.n_sequences += 1
            self._drawn.append(sequence)
            yield sequence

    def get_activations(self, batch_tokens: Tensor) -> Tensor:
        """Activations of shape (batch, context, d_in).

        Raises:
            FieldError: The hook's activations are not of width d_in.
        """
        try:
            return super().get_activations(batch_tokens)
        except RuntimeError as error:
            if "expanded size" not in str(error) and "shape" not in str(error):
                raise
            shape = self._shape_at_hook(batch_tokens[:1])
            width = math.prod(shape[2:] if self.hook_head_index is None else shape[-1:])
            problem = f"the activations at {self.hook_name} are of width {width}"
            if width == self.d_in:  # but not a vector at every token
                problem = (
                    f"the activations at {self.hook_name} are of shape {tuple(shape)}: {error}"
                )
            raise FieldError("sae.d_in", self.d_in, problem) from error

    @torch.no_grad()
    def _shape_at_hook(self, tokens: Tensor) -> torch.Size:
        shapes: list[torch.Size] = []

        def note(acts: Tensor, hook: Any) -> None:
            shapes.append(acts.shape)

        only = stopping_after(self.model, [self.hook_name])
        self.model.run_with_hooks(tokens, fwd_hooks=[(self.hook_name, note)], **only)
        return shapes[0]

    @property
    def n_batches(self) -> int:
        """Training batches drawn, including before a resume."""
        self._prepare()
        return self._n_batches

    def get_batch_tokens(
        self,
        batch_size: int | None = None,
        raise_at_epoch_end: bool = False,
        move_to_model_device: bool = True,
    ) -> Tensor:
        """Tokens of shape (batch_size, context_size). Draws of evaluators are recorded."""
        self._prepare()
        if not self._refilling:
            draw = (self._n_batches, batch_size or self.store_batch_size_prompts)
            self._draws.insert(self._n_drawn, draw)
            self._n_drawn += 1
        return super().get_batch_tokens(batch_size, raise_at_epoch_end, move_to_model_device)

    def get_data_loader(self) -> Iterator[Tensor]:
        """Endless stream of filtered and mixed activations, (train_batch_size_tokens, d_in)."""
        self._prepare()
        return self._mix()

    def keep_unmixed(self) -> None:
        """From the next batch until training begins, keep what enters the mixing buffer."""
        self._unmixed = deque()

    def unmixed(self, batch: Tensor) -> list[Tensor]:
        """What entered the mixing buffer before a batch, by pass of the model, each (n, d_in).

        Tokens of one text are alike. In the passes they are together; mixing spreads them over many
        batches. Call it for each batch once, in their order.

        Args:
            batch: A batch of this store; returned if unmixed activations are not kept.
        """
        if self._unmixed is None:
            return [batch]
        parts: list[Tensor] = []
        while (part := self._unmixed.popleft()) is not None:
            parts.append(part)
        return parts

    def count_from_here(self) -> None:
        """Count batches from the next one on, as training does: some may have been drawn before."""
        self._prepare()
        for anchor in self._anchors:
            anchor.n_batches -= self._n_batches
        self._draws = [(n - self._n_batches, size) for n, size in self._draws]
        self._n_batches = 0

    def save_to_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Write the state for resuming after `training_position` into a checkpoint directory."""
        self._prepare()
        n_served = self._n_served()
        if not self._anchors:
            self._anchors.append(self._anchor())
        anchor = [a for a in self._anchors if a.n_batches <= n_served][-1]
        tensors = {"generator": anchor.generator}
        if anchor.buffer is not None:
            tensors["buffer"] = anchor.buffer
        fields = anchor.fields()
        # what evaluators have drawn since, or will have, if a thread reads ahead
        fields["draws"] = [draw for draw in self._draws if draw[0] > anchor.n_batches]
        fields["n_served"] = n_served
        fields["widths"] = list(self.widths.items())
        fields["n_rows"] = self._n_rows()
        fields["first_sequence"], tensors["fingerprint"] = self._fingerprint()
        path = Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME
        save_tensors(path, _KIND, tensors, fields)

    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Continue after the batch at which `save_to_checkpoint` wrote the directory.

        Raises:
            FileNotFoundError: The directory holds no such state.
            CorruptFileError: The file is truncated, was changed, or is of another kind.
            ValueError: The checkpoint is of other hooks, other data or another model.
        """
        path = Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME
        tensors, fields = load_tensors(path, _KIND)
        widths = list(self.widths.items())
        saved = [(str(name), int(width)) for name, width in fields.get("widths", widths)]
        if saved != widths:
            raise ValueError(
                f"{path}: the checkpoint was trained at {_listed(saved)}, and this run is at "
                f"{_listed(widths)}"
            )
        self._check_source(path, tensors, fields)
        self._prepare()
        self._anchors.clear()
        self._generator.set_state(tensors["generator"])
        buffer = tensors.get("buffer")
        self._buffer = None if buffer is None else buffer.to(self.device)
        self._n_batches = int(fields["n_batches"])
        self._seek(path, int(fields["position"]), fields.get("sequences"))
        self.n_dataset_processed = int(fields["n_dataset_processed"])
        self.n_epochs = int(fields["n_epochs"])
        self._draws = [(int(n), int(size)) for n, size in fields["draws"]]
        self._n_drawn = 0
        self.n_skipped = int(fields["n_skipped"])
        self._dataloader = self._mix()
        skip = int(fields["n_served"]) - self._n_batches
        for _ in tqdm(range(skip), desc="Refilling the activation buffer", leave=False):
            next(self._dataloader)

    def _prepare(self) -> None:
        if hasattr(self, "_generator"):
            return
        # a separate generator, so that other random draws do not change the order of the data
        self._generator = torch.Generator()
        self._generator.set_state(torch.get_rng_state())
        self._begin_epoch()
        self._buffer: Tensor | None = None
        self._n_batches = 0
        self._anchors: deque[_Anchor] = deque()
        self._refilling = False
        # draws by evaluators, each (batches before it, sequences), and how many of them are done:
        # those of a checkpoint have to be repeated
        self._draws: list[tuple[int, int]] = []
        self._n_drawn = 0

    def _n_served(self) -> int:
        return self._n_batches if self.training_position is None else self.training_position()

    def _position(self) -> int:
        return self.n_sequences if self.cached_activation_dataset is None else self.current_row_idx

    def _seek(self, path: Path, position: int, expected: str | None) -> None:
        """Move to a position in the epoch, by reading up to it; all epochs are the same."""
        if self.cached_activation_dataset is not None:
            self.current_row_idx = position
            return
        if position < self.n_sequences:
            self.iterable_sequences = self._iterate_tokenized_sequences()
            self._begin_epoch()
        skip = position - self.n_sequences
        for _ in tqdm(range(skip), desc="Skipping to the place in the dataset", leave=False):
            if next(self.iterable_sequences, None) is None:
                raise ValueError(
                    f"{path}: the checkpoint is {position} sequences into its dataset, and this "
                    f"one ends after {self.n_sequences}: resume on the same data"
                )
        if expected is not None and self._sequences() != expected:
            raise ValueError(
                f"{path}: the first {position} sequences of this dataset are not those that the "
                "checkpoint was trained on: resume on the same data"
            )

    def _begin_epoch(self) -> None:
        self.n_sequences = 0
        self._drawn: list[Tensor] = []
        self._digest = hashlib.sha256()

    def _sequences(self) -> str:
        """Checksum of all sequences drawn in this epoch."""
        if self._drawn:  # together: one transfer from a GPU
            self._digest.update(torch.cat(self._drawn).cpu().numpy().tobytes())
            self._drawn.clear()
        return self._digest.hexdigest()

    def _n_rows(self) -> int | None:
        """Rows of the dataset, if it knows them."""
        cached = self.cached_activation_dataset
        source = self.dataset if cached is None else cached
        return len(source) if isinstance(source, Sized) else None

    @torch.no_grad()
    def _fingerprint(self) -> tuple[str, Tensor]:
        """Checksum of the dataset's first sequence, and activations on it, shape (n, d_in)."""
        if self._known_fingerprint is not None:
            return self._known_fingerprint
        if self.cached_activation_dataset is not None:
            activations, content = self.cached_activation_dataset[:1][self.hook_name], b""
        else:
            # from the beginning of the data, even if some were drawn
            drawn, n_processed = self.iterable_sequences, self.n_dataset_processed
            self.iterable_sequences = super()._iterate_tokenized_sequences()
            try:
                tokens = super().get_batch_tokens(1)
            finally:
                self.iterable_sequences, self.n_dataset_processed = drawn, n_processed
            activations, content = self.get_activations(tokens), tokens.cpu().numpy().tobytes()
        rows = activations.reshape(-1, self.d_in)[:_N_FINGERPRINT].float().cpu()
        self._known_fingerprint = hashlib.sha256(content).hexdigest(), rows
        return self._known_fingerprint

    def _check_source(self, path: Path, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on other data or another model."""
        if "fingerprint" not in tensors:
            return  # of an earlier release
        n_rows = self._n_rows()
        if n_rows != fields["n_rows"] and None not in (n_rows, fields["n_rows"]):
            raise ValueError(
                f"{path}: the checkpoint was trained on a dataset of {fields['n_rows']} rows, and "
                f"this one has {n_rows}: resume on the same data"
            )
        first_sequence, fingerprint = self._fingerprint()
        if first_sequence != fields["first_sequence"]:
            raise ValueError(
                f"{path}: the dataset does not begin with the sequence of tokens that the "
                "checkpoint was trained on: resume on the same data, in sequences of the same "
                "length"
            )
        eps = max(resolution_of(self.model, self.autocast_lm), torch.finfo(self.dtype).eps)
        tolerance = max(1e-3, 8 * eps)
        cached = self.cached_activation_dataset is not None
        other = "other cached activations" if cached else "another model, or other weights of it"
        start = 0
        for name, width in self.widths.items():
            was, now = (t[:, start : start + width] for t in (tensors["fingerprint"], fingerprint))
            start += width
            difference = _typical_difference(was, now)
            if difference > tolerance:
                raise ValueError(
                    f"{path}: the checkpoint was trained on {other}: at {name}, activations on "
                    f"the first sequence differ by {difference:.2%}, and another machine explains "
                    f"at most {tolerance:.2%}"
                )

    def _anchor(self) -> _Anchor:
        return _Anchor(
            n_batches=self._n_batches,
            buffer=self._buffer,
            generator=self._generator.get_state(),
            position=self._position(),
            sequences=None if self.dataset is None else self._sequences(),
            n_epochs=self.n_epochs,
            n_dataset_processed=self.n_dataset_processed,
            n_skipped=self.n_skipped,
        )

    @torch.no_grad()
    def _mix(self) -> Iterator[Tensor]:
        """`sae_lens.training.mixing_buffer.mixing_buffer`, with anchors."""
        batch_size = self.train_batch_size_tokens
        mix_fraction = self.activations_mixing_fraction
        asked_for = getattr(self, buffer_field(self))
        n_sequences = check_buffer(asked_for, self.training_context_size, batch_size)
        buffer_size = n_sequences * self.training_context_size
        if not 0 <= mix_fraction <= 1:
            raise ValueError(f"activations_mixing_fraction={mix_fraction}: must be in [0, 1]")
        fresh = self._iterate_filtered_activations()
        while True:
            # in no variable, which would keep one buffer while the next is filled
            yield from self._serve(
                self._refilled(fresh, buffer_size, mix_fraction > 0),
                n_kept=int(buffer_size * mix_fraction),
            )

    def _serve(self, buffer: Tensor, n_kept: int) -> Iterator[Tensor]:
        """Batches from a buffer, of which about n_kept activations stay for the next one."""
        batch_size = self.train_batch_size_tokens
        n_served = max(1, (len(buffer) - n_kept) // batch_size) * batch_size
        # cloned: a view, here or in the hands of training, would keep all of it in memory
        self._buffer = buffer[n_served:].clone()
        for batch in buffer[:n_served].split(batch_size):
            self._n_batches += 1
            self._note_unmixed(None)
            yield batch.clone()

    def _refilled(self, fresh: Iterator[Tensor], n_rows: int, mix: bool) -> Tensor:
        """What is left in the buffer and fresh activations, n_rows or more, mixed or in order."""
        self._refilling = True
        try:
            self._draw_again()
            self._anchors.append(self._anchor())
            self._prune_anchors()
            parts = [] if self._buffer is None else [self._buffer]
            parts.append(self._note_unmixed(next(fresh)))
            while sum(map(len, parts)) < n_rows:
                parts.append(self._note_unmixed(next(fresh)))
        finally:
            self._refilling = False
        return self._shuffled(parts) if mix else torch.cat(parts)

    def _shuffled(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows of all parts, in random order. SAELens, whose order it is, copies the growing
        buffer for every part; here each row is copied once."""
        order = torch.randperm(sum(map(len, parts)), generator=self._generator)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        buffer = parts[0].new_empty((len(order), *parts[0].shape[1:]))
        places = place.to(buffer.device).split([len(part) for part in parts])
        for part, rows in zip(parts, places, strict=True):
            buffer.index_copy_(0, rows, part)
        return buffer

    def _note_unmixed(self, acts: T_Acts) -> T_Acts:
        if self._unmixed is not None and self._n_served() > 0:
            self._unmixed = None  # training has begun
        if self._unmixed is not None:
            self._unmixed.append(acts)
        return acts

    def _draw_again(self) -> None:
        """Repeat what evaluators drew before this refill in the run that is resumed."""
        for n_batches, size in self._draws[self._n_drawn :]:
            if n_batches > self._n_batches:
                break
            super().get_batch_tokens(size)
            self._n_drawn += 1

    def _prune_anchors(self) -> None:
        """Drop anchors that training has passed; of those ahead of it, keep a few."""
        n_served = self._n_served()
        while len(self._anchors) > 1 and self._anchors[1].n_batches <= n_served:
            self._anchors.popleft()
        while len(self._anchors) > 4:
            del self._anchors[1]
        n_old = sum(n <= self._anchors[0].n_batches for n, _ in self._draws[: self._n_drawn])
        del self._draws[:n_old]
        self._n_drawn -= n_old


class PackedActivationsStore(ResumableActivationsStore):
    """Activations of several hooks side by side, as in SAELens' mixing buffer for several hooks.

    Batches are of shape (n, d_in), where `d_in` is the sum of the widths. If activations that are
    not finite are skipped, a token that has one at any hook is left out at all hooks.
    """

    @classmethod
    def adopt(cls, store: Any) -> "PackedActivationsStore":
        """A store of this class from one made by `ActivationsStore.from_config_multi_hook`.

        Raises:
            TypeError: As for a store of one hook, or `store` is of one hook.
        """
        if isinstance(store, ActivationsStore) and store._hook_names is None:
            raise TypeError(
                "activations_store is of one hook: make it with "
                "ActivationsStore.from_config_multi_hook"
            )
        adopted = super().adopt(store)
        assert isinstance(adopted, PackedActivationsStore)
        adopted.d_in = sum(adopted.widths.values())
        return adopted

    @property
    def widths(self) -> dict[str, int]:
        """The width of every hook, in the order in which a batch holds them."""
        assert self._hook_names is not None
        assert self._hook_d_ins is not None
        return {name: self._hook_d_ins[name] for name in self._hook_names}

    def split(self, batch: Tensor) -> dict[str, Tensor]:
        """Views of a batch of shape (..., d_in), each (..., width of the hook), by hook."""
        return dict(zip(self.widths, batch.split(list(self.widths.values()), dim=-1), strict=True))

    def get_activations(self, batch_tokens: Tensor) -> Tensor:
        """Activations of shape (batch, context, d_in).

        Raises:
            ValueError: The activations of a hook are not of its width.
        """
        by_hook = self.get_multi_hook_activations(batch_tokens)
        for name, width in self.widths.items():
            shape = tuple(by_hook[name].shape)
            if len(shape) != 3 or shape[-1] != width:
                raise ValueError(
                    f"the activations at {name} are not of width d_in={width}: of {len(shape)} "
                    f"dimensions, {shape} for tokens of shape {tuple(batch_tokens.shape)}"
                )
        return torch.cat([by_hook[name].to(self.device) for name in self.widths], dim=-1)

    def get_multi_hook_data_loader(self) -> Iterator[dict[str, Tensor]]:
        """Endless stream of filtered and mixed activations by hook."""
        return map(self.split, self.get_data_loader())

    def _finite(self, acts: Tensor, number: int) -> tuple[Tensor, int]:
        try:
            return super()._finite(acts, number)
        except NonFiniteActivationsError:
            for name, part in self.split(acts).items():
                finite_rows(part, "raise", f"pass {number} of the model, at {name},")
            raise


def _typical_difference(a: Tensor, b: Tensor) -> float:
    """Median of |a - b| in units of |a| and of the deviation of its column; (n, d) each."""
    if a.shape != b.shape:
        return math.inf
    difference = (a - b).abs() / (a.abs() + a.std(dim=0, correction=0))
    median = float(difference.nanmedian())  # without values that are zero or not finite in both
    return 0.0 if math.isnan(median) else median


def _listed(widths: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} (width {width})" for name, width in widths)
