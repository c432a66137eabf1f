"""Several processes that estimate together, through torch.distributed.

Every process takes part in every collective and gets the same result. A process that fails or dies
must not leave the others waiting: collectives end with an error as soon as a connection breaks, and
after `TIMEOUT` if a process hangs.
"""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from sae_whiten.statistics import ActivationStatistics

__all__ = ["DistributedError", "Processes", "joined_processes"]

# torch's default; a process that skips to its place in a streamed dataset may take minutes
TIMEOUT = datetime.timedelta(minutes=30)

T = TypeVar("T")


class DistributedError(RuntimeError):
    """Another process of the group failed, died or does not respond."""


@contextmanager
def joined_processes() -> Iterator[int]:
    """Join the process group of torchrun inside this block, if torchrun started this process.

    Yields:
        Number of this process, 0 for the first or only one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
        # "cuda" means the GPU of this process from here on
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


class Processes:
    """The processes of the default group, or only this one if there is no group.

    All methods are collective: every process has to call them, in the same order. They communicate
    through the CPU (gloo), whatever the backend of the default group.

    Args:
        alone: Only this process, even if it is in a group.

    Attributes:
        rank: Number of this process, 0 for the first or only one.
        world_size: Number of processes.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self.rank, self.world_size = 0, 1
        self._group: Any = None
        self._device_backends: set[str] = set()
        if not alone and dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if self.world_size > 1:
            with _clear_errors():
                self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            if "nccl" in str(dist.get_backend()):
                self._device_backends = {"cuda"}

    def together(self, function: Callable[[], T]) -> T:
        """Call a function that every process calls, and fail if it fails in one of them.

        Raises:
            Exception: Whatever the function raises here.
            DistributedError: It failed in another process; the message has that of its error.
        """
        if self.world_size == 1:
            return function()
        result, failure = None, None
        try:
            result = function()
        except Exception as error:  # reported to the other processes, whatever it is
            failure = error
        if self.total(failure is not None)[0]:
            messages = self.gather(None if failure is None else str(failure))
            if failure is not None:
                raise failure
            rank, message = next((i, text) for i, text in enumerate(messages) if text is not None)
            raise DistributedError(f"process {rank} failed: {message}")
        return result  # pyright: ignore[reportReturnType]

    def total(self, *values: float) -> list[float]:
        """Each value, summed over all processes."""
        if self.world_size == 1:
            return list(values)
        return self._sum(torch.tensor(values, dtype=torch.float64)).tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks; must be picklable."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with _clear_errors():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def union(self, statistics: ActivationStatistics) -> ActivationStatistics:
        """Statistics of the activations of all processes; `statistics` is not changed.

        With n_i samples of mean m_i and scatter S_i: n = sum n_i, m = sum n_i m_i / n, and
        S = sum (S_i + n_i (m_i - m)(m_i - m)^T). Means are summed as differences from one of them,
        so that no digits cancel if they are large.

        Raises:
            DistributedError: A process is gone.
        """
        if self.world_size == 1:
            return statistics
        tensors, fields = statistics.to_tensors()
        all_fields = self.gather(fields)
        counts = [int(other["n_samples"]) for other in all_fields]
        n, n_own = sum(counts), counts[self.rank]
        for name in ("n_samples", "n_skipped", "n_batches"):
            fields[name] = sum(other[name] for other in all_fields)
        fields["resolution"] = max(other["resolution"] for other in all_fields)
        mean, scatter = tensors["mean"], tensors["scatter"].clone()
        if n > 0:
            reference = mean.clone()
            source = next(rank for rank, count in enumerate(counts) if count > 0)
            with _clear_errors():
                dist.broadcast(reference, src=source, group=self._group)
            mean = reference + self._sum((mean - reference) * (n_own / n))
            if n_own > 0:
                delta = tensors["mean"] - mean
                scatter.addr_(delta, delta, alpha=n_own)
            scatter = self._sum(scatter)
        return ActivationStatistics.from_tensors({"mean": mean, "scatter": scatter}, fields)

    def sum_(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Replace a tensor by its sum over all processes; every process gets the same bits.

        Uses the default group if it supports the tensor's device (NCCL), else the CPU.
        """
        if self.world_size == 1:
            return tensor
        if tensor.device.type in self._device_backends:
            with _clear_errors():
                dist.all_reduce(tensor)
            return tensor
        return tensor.copy_(self._sum(tensor.cpu().contiguous()))

    def broadcast_(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Replace a tensor in place by that of process 0."""
        if self.world_size == 1:
            return tensor
        on_cpu = tensor.cpu().contiguous()
        with _clear_errors():
            dist.broadcast(on_cpu, src=0, group=self._group)
        return tensor.copy_(on_cpu)

    def concatenated(self, tensor: Shaped[Tensor, "n *row"]) -> Shaped[Tensor, "n_all *row"]:
        """The rows of all processes in the order of their ranks; n may differ between them."""
        if self.world_size == 1:
            return tensor
        sizes = [int(size) for size in self.gather(len(tensor))]
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:], device="cpu")
        padded[: len(tensor)] = tensor.cpu()
        gathered = [torch.empty_like(padded) for _ in sizes]
        with _clear_errors():
            # as bytes, because gloo does not support every dtype
            dist.all_gather(
                [part.view(torch.uint8) for part in gathered],
                padded.view(torch.uint8),
                group=self._group,
            )
        parts = [part[:size] for part, size in zip(gathered, sizes, strict=True)]
        return torch.cat(parts).to(tensor.device)

    def from_first(self, value: T) -> T:
        """The value of process 0; must be picklable."""
        if self.world_size == 1:
            return value
        values = [value]
        with _clear_errors():
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def _sum(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        with _clear_errors():
            dist.all_reduce(tensor, group=self._group)
        return tensor


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DistributedError(
            "another process of the group failed, was killed, or did not answer for "
            f"{TIMEOUT.total_seconds() / 60:g} minutes: look at its output ({first_line})"
        ) from error
