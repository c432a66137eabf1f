"""Several processes train one SAE, or one set of SAEs, as a single process would.

Every process runs the language model on its own share of the dataset and contributes its part of
each batch. Training is equal to that on the whole batch, because

- all processes take a step together, or none does: before each step `SharedStream` asks all of them
  whether they have a batch, were asked to stop, or failed;
- gradients are averaged over all rows before they are clipped, by a hook on each parameter. (DDP
  wraps `forward`, and SAELens' training step is not a `forward`);
- a latent has fired if it fired anywhere, and firing counts are summed;
- operations over the whole batch (BatchTopK's k and its threshold) see all parts of it.

Weights start equal, because they are sent from process 0, and stay equal, because all-reduce gives
every process the same bits.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from sae_whiten._contexts import environment
from sae_whiten.architectures.sparse import Selector, batch_top_k
from sae_whiten.estimation.distributed import DistributedError, Processes
from sae_whiten.estimation.sources import part_of
from sae_whiten.statistics import NonFiniteActivationsError
from sae_whiten.training.activations_store import buffer_field
from sae_whiten.training.stream import ActivationStream, DataExhaustedError, StopRequested

__all__ = [
    "SharedBatchTopK",
    "SharedStream",
    "figures_of_all",
    "logging_once",
    "open_stream",
    "output_of_all",
    "share_training",
    "shared_step",
    "take_share",
]

# every process raises these with their own type: training so far can be saved after them, or the
# remedy is the same for all
_RAISED_BY_ALL: dict[str, type[Exception]] = {
    error.__name__: error for error in (NonFiniteActivationsError, DataExhaustedError)
}


class SharedStream(ActivationStream):
    """An `ActivationStream` that serves a batch only if every process has one.

    Args:
        processes: The processes that train together. Further arguments: as `ActivationStream`.

    Attributes:
        n_rows: Rows of the batch served last, of all processes.
        share: Part of them that this process has.
    """

    def __init__(
        self,
        processes: Processes,
        source: Iterator[Tensor],
        d_in: int,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        n_wanted: int | None = None,
    ) -> None:
        super().__init__(source, d_in, on_nonfinite, n_wanted)
        self.processes = processes
        self.n_rows, self.share = 0, 1.0
        self._returned: Tensor | None = None

    def lookahead(self) -> Iterator[Tensor]:
        """The next activations of all processes, as long as every process has some."""
        own_batches = super().lookahead()
        while True:
            batch, n_without = self._with_the_others(lambda: next(own_batches, None))
            if n_without:
                return
            assert batch is not None
            yield self.processes.concatenated(batch)

    def __next__(self) -> Tensor:
        batch, _ = self._with_the_others(super().__next__)
        assert batch is not None
        self.share = len(batch) / self.n_rows
        return batch

    def _with_the_others(self, take: Callable[[], Tensor | None]) -> tuple[Tensor | None, int]:
        """What `take` returns, and in how many processes it is None.

        Raises:
            StopRequested: In all processes, if one was asked to stop; the taken batch is kept.
            Exception: The error of `take` here, or else one that reports its error elsewhere.
        """
        batch: Tensor | None = None
        error: Exception | None = None
        n_served = self.n_served
        try:
            batch = take()
        except Exception as raised:  # reported to the other processes before it is raised
            error = raised
        stopping = isinstance(error, StopRequested)
        failed = error is not None and not stopping
        n_own = 0 if batch is None else len(batch)
        n_rows, n_without, n_stopping, n_failed = self.processes.total(
            n_own, batch is None and error is None, stopping, failed
        )
        self.n_rows = int(n_rows)
        if n_failed:
            self._raise_together(error if failed else None)
        if n_stopping:
            if self.n_served > n_served:
                self._returned, self.n_served = batch, n_served
            raise StopRequested
        return batch, int(n_without)

    def _raise_together(self, error: Exception | None) -> None:
        errors = self.processes.gather(
            None if error is None else (type(error).__name__, str(error))
        )
        if error is not None:
            raise error
        rank, (kind, message) = next((i, e) for i, e in enumerate(errors) if e is not None)
        raise _RAISED_BY_ALL.get(kind, DistributedError)(f"process {rank}: {message}")

    @property
    def n_ahead(self) -> int:
        """Batches that were read ahead and not served yet."""
        return super().n_ahead + (self._returned is not None)

    def _next_looked_at(self) -> tuple[Tensor, Callable[[], bool]]:
        if self._returned is None:
            return super()._next_looked_at()
        batch, self._returned = self._returned, None
        return batch, lambda: False


def open_stream(
    source: Iterator[Tensor],
    d_in: int,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    n_wanted: int | None = None,
) -> ActivationStream:
    """An `ActivationStream` for a process that trains alone, a `SharedStream` for one of several.

    Arguments are those of `ActivationStream`.
    """
    processes = Processes()
    if processes.world_size == 1:
        return ActivationStream(source, d_in, on_nonfinite, n_wanted)
    return SharedStream(processes, source, d_in, on_nonfinite, n_wanted)


def take_share(store: ActivationsStore, processes: Processes) -> None:
    """Let a store read this process's part of the dataset and serve its part of every batch.

    Nothing may have been drawn from it yet. The buffer is divided too, so that all buffers together
    have the size that the config asks for.

    Raises:
        ValueError: The batch cannot be divided by the number of processes.
    """
    rank, n = processes.rank, processes.world_size
    if n == 1:
        return
    if store.train_batch_size_tokens % n:
        raise ValueError(
            f"train_batch_size_tokens={store.train_batch_size_tokens} is the batch of all {n} "
            f"processes together, and cannot be divided by {n}"
        )
    store.train_batch_size_tokens //= n
    field = buffer_field(store)
    setattr(store, field, math.ceil(getattr(store, field) / n))
    if store.cached_activation_dataset is not None:
        store.cached_activation_dataset = part_of(store.cached_activation_dataset, rank, n)
    else:
        store.dataset = part_of(store.dataset, rank, n)


@contextmanager
def logging_once(processes: Processes) -> Iterator[None]:
    """Let only process 0 log to Weights & Biases, at the same steps as the others reach."""
    if processes.rank == 0:
        yield
        return
    with environment(WANDB_MODE="disabled"):
        yield


def output_of_all(output: TrainStepOutput, processes: Processes) -> TrainStepOutput:
    """A step's output in which inputs and reconstructions are those of all processes."""
    output = copy.copy(output)
    output.sae_in = processes.concatenated(output.sae_in)
    output.sae_out = processes.concatenated(output.sae_out)
    return output


def figures_of_all(own: Mapping[str, Any], stream: SharedStream) -> dict[str, Any]:
    """Figures of a step: the mean over the rows of all processes."""
    values = torch.tensor([float(value) for value in own.values()], dtype=torch.float64)
    return dict(zip(own, stream.processes.sum_(values * stream.share).tolist(), strict=True))


def share_training(sae: TrainingSAE[Any], stream: SharedStream) -> Callable[[], None]:
    """Give all processes the weights of process 0, and from now on the gradients of all rows.

    Args:
        sae: The SAE, with the same shapes in every process.
        stream: Knows which part of a batch this process has.

    Returns:
        Ends the sharing: the SAE computes on its own rows alone again.
    """
    processes = stream.processes
    with torch.no_grad():
        for tensor in sae.state_dict().values():
            processes.broadcast_(tensor)

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        processes.sum_(parameter.grad.mul_(stream.share))

    own = sae.activation_fn
    if isinstance(own, BatchTopK):
        sae.activation_fn = SharedBatchTopK(own.k, stream)
    hooks = [p.register_post_accumulate_grad_hook(average) for p in sae.parameters()]

    def end() -> None:
        sae.activation_fn = own
        for hook in hooks:
            hook.remove()

    return end


def shared_step(
    trainer: SAETrainer[Any, Any],
    stream: SharedStream,
    step: Callable[[Tensor], TrainStepOutput],
    batch: Tensor,
) -> TrainStepOutput:
    """A training step on this process's part of a batch that counts all of it.

    Args:
        trainer: Its config is that of the whole batch.
        stream: Where `batch` came from.
        step: SAELens' own `step` of this trainer.
        batch: Shape (n, d_in).
    """
    counts, passes = trainer.act_freq_scores, trainer.n_forward_passes_since_fired.clone()
    trainer.act_freq_scores = torch.zeros_like(counts)
    sae = trainer.sae
    selection = sae.activation_fn
    threshold = sae.topk_threshold if isinstance(selection, SharedBatchTopK) else None
    output = step(batch)
    if threshold is not None:
        # the step moved it toward the smallest activation of this part
        sae.topk_threshold = threshold
        sae.update_topk_threshold(selection.least)
    fired = stream.processes.sum_(trainer.act_freq_scores)
    trainer.act_freq_scores = counts + fired
    trainer.n_forward_passes_since_fired = torch.where(fired > 0, 0.0, passes + 1)
    trainer.n_training_samples += stream.n_rows - len(batch)
    return output


class SharedBatchTopK(nn.Module):
    """SAELens' `BatchTopK` over the parts of a batch that all processes have.

    Keeps the k * n largest activations of all n rows. Of ties at the border it keeps all; SAELens
    keeps those that its sort puts first.

    Args:
        k: Active latents per row, on average.
        stream: Knows how many rows there are.

    Attributes:
        least: The smallest activation kept in the last batch, shape (1,), or (0,) if none was.
    """

    def __init__(self, k: float, stream: SharedStream) -> None:
        super().__init__()
        self.k = k
        self.least = torch.empty(0)
        self._stream = stream

    def forward(self, x: Tensor) -> Tensor:
        """The activations kept, of the shape of `x`, (n, d_sae)."""
        acts = x.relu()
        flat = acts.detach().flatten()
        largest = torch.topk(flat, min(self._n_kept(), flat.numel())).values
        if len(self._find_least(largest)) == 0:
            return acts
        return torch.where(acts >= self.least, acts, 0.0)

    def sparse_selector(self) -> Selector:
        """The same selection for `sparse_step`."""
        return batch_top_k(self._n_kept(), self._find_least)

    def _n_kept(self) -> int:
        return int(self.k * self._stream.n_rows)

    def _find_least(self, largest: Tensor) -> Tensor:
        """`least`, from the largest of this part."""
        everybodys = self._stream.processes.concatenated(largest)
        kept = torch.topk(everybodys, min(self._n_kept(), everybodys.numel())).values
        self.least = kept[kept > 0][-1:]
        return self.least
