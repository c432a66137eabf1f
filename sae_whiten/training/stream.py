"""The stream of activations that the training loop reads."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from sae_whiten.estimation.distributed import Processes
from sae_whiten.estimation.stopping import MAX_EMPTY_BATCHES, flatten_heads
from sae_whiten.statistics import finite_rows
from sae_whiten.training.spool import Spool

__all__ = ["ActivationStream", "DataExhaustedError", "StopRequested"]

logger = logging.getLogger(__name__)


class DataExhaustedError(ValueError):
    """The data provider ended before training did."""


class StopRequested(Exception):
    """Training was asked to stop; raised between two steps, when everything can be saved."""


class ActivationStream(Iterator[Tensor]):
    """Serves a data provider's batches in order, including those read ahead by `lookahead`.

    `lookahead` gives the first activations for estimating statistics. Their batches are kept in
    `spool`, and training then gets the same batches.

    Batches are served in the order of the provider; empty ones are skipped, but counted. So a
    resumed run needs a provider that starts at batch `n_served`.

    Args:
        source: Yields activations, shape (n, d_in) or (n, n_heads, d_head).
        d_in: Width of the activations.
        on_nonfinite: "raise" or "skip" activations that hold a NaN or an infinity.
        n_wanted: Batches that training needs, for the message if there are fewer.

    Attributes:
        n_served: Batches served or skipped.
        n_skipped: Activations left out because they were not finite.
        source_is_finite: Whether the source has checked that activations are finite, so that the
            stream need not. Otherwise batches on a GPU are drawn one ahead, so that the check
            delays no step.
        resolution: Machine epsilon of the dtype that the activations were computed in, if that is
            coarser than theirs; 0 if unknown.
        unmixed: Returns what the source read for a batch, before it was mixed, in parts that share
            no text; by default the batch itself. Called for each batch of `lookahead` once.
        unmixed_per_batch: How many such parts hold as many activations as a batch.
        n_to_read_ahead: How many batches were read ahead when the checkpoint was saved that is
            resumed.
        stop_is_handled: Whether `StopRequested` is caught, to save a checkpoint.
        spool: Keeps the batches read by `lookahead`.
        last: The batch served last.
        processes: The processes that train together, each on its own part of every batch.
        next_is: Description of the next batch in reports: "held-out" if it is known that it was not
            trained on. A data provider may repeat its batches.
    """

    def __init__(
        self,
        source: Iterator[Tensor],
        d_in: int,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        n_wanted: int | None = None,
    ) -> None:
        self.source = source
        self.d_in = d_in
        self.on_nonfinite: Literal["raise", "skip"] = on_nonfinite
        self.n_wanted = n_wanted
        self.n_served = 0
        self.n_skipped = 0
        self.source_is_finite = False
        self.resolution = 0.0
        self.last: Tensor | None = None
        self.next_is: Callable[[], str] = lambda: "next"
        self.unmixed: Callable[[Tensor], list[Tensor]] = lambda batch: [batch]
        self.unmixed_per_batch = 1.0
        self.processes = Processes(alone=True)
        self.n_to_read_ahead = 0
        self.stop_is_handled = False
        self._stop = self._stop_put_off = False
        self.spool = Spool()
        self._ahead: tuple[Tensor, Callable[[], bool]] | Exception | None = None

    def request_stop(self) -> None:
        """Make the next call for a batch raise `StopRequested` instead; safe in signal handlers."""
        self._stop = True

    def forget_stop(self) -> None:
        """Serve batches again after a stop."""
        self._stop = False

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Delay requests to stop until the end of the block."""
        self._stop_put_off = True
        try:
            yield
        finally:
            self._stop_put_off = False

    def lookahead(self) -> Iterator[Tensor]:
        """The activations of the next batches, unmixed; training gets the batches later."""
        self.spool.resolution = self.resolution
        while True:
            if self._stop:
                raise StopRequested
            try:
                batch = next(self.source)
            except StopIteration:
                return
            self.spool.put(batch)
            yield from self.unmixed(batch)

    @property
    def n_ahead(self) -> int:
        """Batches that were read ahead and not served yet."""
        return len(self.spool)

    def read_ahead(self) -> None:
        """Read `n_to_read_ahead` batches, which are served later."""
        self.spool.resolution = self.resolution
        for _ in range(self.n_to_read_ahead):
            self.spool.put(next(self.source))

    def n_lookahead(self, n_batches: int | None) -> int | None:
        """How many parts of `lookahead` hold as many activations as `n_batches` batches."""
        return None if n_batches is None else math.ceil(n_batches * self.unmixed_per_batch)

    def __next__(self) -> Tensor:
        for _ in range(MAX_EMPTY_BATCHES):
            if self._stop and not self._stop_put_off:
                raise StopRequested
            try:
                batch, is_finite = self._next_looked_at()
            except StopIteration:
                needed = "" if self.n_wanted is None else f", which needs {self.n_wanted}"
                raise DataExhaustedError(
                    f"the data provider ended after {self.n_served} batches, before "
                    f"training{needed}: provide more data or lower total_training_samples"
                ) from None
            batch = flatten_heads(batch, self.d_in)
            if not (self.source_is_finite or is_finite()):
                name = f"training batch {self.n_served}"
                batch, n_bad = finite_rows(batch, self.on_nonfinite, name)
                self.n_skipped += n_bad
            self.n_served += 1
            if batch.numel() > 0:
                if self._looks_ahead(batch):
                    batch = batch.clone()  # a provider may write the next one into the same memory
                    self._look_ahead()
                self.last = batch
                return batch
        raise DataExhaustedError(
            f"the last {MAX_EMPTY_BATCHES} batches of the data provider, up to number "
            f"{self.n_served}, held no activations ({self.n_skipped} were skipped as not finite)"
        )

    def held_out(self) -> Tensor | None:
        """A batch that was not served, or None if the provider has no more."""
        try:
            batch = flatten_heads(self._next_looked_at()[0], self.d_in)
        except StopIteration:
            return None
        rows = batch.reshape(-1, self.d_in)
        rows = rows[torch.isfinite(rows).all(dim=1)]
        return rows if len(rows) else None

    def held_out_or_last(self) -> tuple[Tensor | None, str]:
        """A batch that was not served, or else the last served one, and its description."""
        try:
            activations = self.held_out()
            if activations is not None:
                return activations, self.next_is()
        except Exception:  # no error of the data provider may lose a trained SAE
            logger.warning("no held-out activations: the data provider failed", exc_info=True)
        return self.last, "training"

    def _looks_ahead(self, batch: Tensor) -> bool:
        enough = self.n_wanted is not None and self.n_served >= self.n_wanted
        return not self.source_is_finite and not enough and _waits_for(batch)

    def _look_ahead(self) -> None:
        """Draw the next batch, and queue its check on the GPU before the step on the current one.

        The result is ready when the batch is requested, a whole step later, so the GPU does not
        wait. Errors of the provider are also kept until then.
        """
        try:
            batch = self._next_raw()
            self._ahead = batch, _finite_soon(batch)
        except Exception as error:
            self._ahead = error

    def _next_looked_at(self) -> tuple[Tensor, Callable[[], bool]]:
        """The next batch, and whether it is known to be finite."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._next_raw(), lambda: False
        if isinstance(ahead, Exception):
            raise ahead
        return ahead

    def _next_raw(self) -> Tensor:
        return self.spool.take() if len(self.spool) else next(self.source)


def _waits_for(batch: Tensor) -> bool:
    """Whether reading a value of the batch waits for queued work of its device."""
    return batch.is_cuda


def _finite_soon(batch: Tensor) -> Callable[[], bool]:
    """Check whether a batch is finite, without waiting for the result.

    Returns:
        Returns the result when called. False is not certain, because the sum may overflow.
    """
    dtype = torch.promote_types(batch.dtype, torch.float32)
    is_finite = torch.isfinite(batch.sum(dtype=dtype))
    if not batch.is_cuda:
        return lambda: bool(is_finite)
    on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
    on_host.copy_(is_finite, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def answer() -> bool:
        copied.synchronize()
        return bool(on_host)

    return answer
