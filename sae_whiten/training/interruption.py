"""Stopping training by a signal: between two steps, with a checkpoint."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from sae_lens.config import SAETrainerConfig
from safetensors import SafetensorError

from sae_whiten.statistics import NonFiniteActivationsError
from sae_whiten.training.checkpoint import folder_of_its_own
from sae_whiten.training.stream import ActivationStream, StopRequested

__all__ = ["InterruptibleTrainer", "going_on_without_checkpoint", "interruptible"]

logger = logging.getLogger(__name__)

T_co = TypeVar("T_co", covariant=True)

# RuntimeError: torch.save on a full disk, or another process could not write its part
_WRITING_FAILED = (OSError, SafetensorError, RuntimeError)


@runtime_checkable
class InterruptibleTrainer(Protocol[T_co]):
    """A trainer that can be saved between two steps."""

    cfg: SAETrainerConfig
    stream: ActivationStream
    n_training_samples: int
    checkpoint_thresholds: list[int]

    @property
    def is_prepared(self) -> bool:
        """Whether the estimates that the first step needs exist."""
        ...

    @property
    def is_trained(self) -> bool:
        """Whether training is done, folding included."""
        ...

    def fit(self) -> T_co:
        """Train."""
        ...

    def save_checkpoint(self, checkpoint_name: str) -> None:
        """Save the state for resuming."""
        ...


@contextmanager
def interruptible(trainer: InterruptibleTrainer[Any], continue_with: str) -> Iterator[None]:
    """Save a checkpoint when training is stopped by a signal or an activation that is not finite.

    Args:
        trainer: The trainer that runs in the block.
        continue_with: How to continue, for the log; {} is the checkpoint.

    Raises:
        KeyboardInterrupt: After SIGINT.
        SystemExit: After SIGTERM; its code is 143.
        NonFiniteActivationsError: An activation was not finite.
    """
    stream = trainer.stream
    stream.stop_is_handled = True
    with _stop_on_signals(stream) as received:
        try:
            yield
            return
        except (StopRequested, NonFiniteActivationsError) as error:
            _save(trainer, continue_with)
            if isinstance(error, NonFiniteActivationsError):
                raise
            signum = received[0] if received else signal.SIGINT
            # Its frames hold the progress bar of the loop, which is to be closed here and not by an
            # interpreter that is ending: Python 3.13 can crash there.
            error.__traceback__ = None
        finally:
            stream.stop_is_handled = False
            stream.forget_stop()
    if signum == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM) from None
    raise KeyboardInterrupt from None


@contextmanager
def going_on_without_checkpoint(trainer: InterruptibleTrainer[Any]) -> Iterator[None]:
    """Log that a checkpoint could not be written, instead of ending training.

    The next one is tried when it is due.
    """
    try:
        yield
    except _WRITING_FAILED as error:
        trainer.checkpoint_thresholds.pop(0)
        logger.error(
            "the checkpoint after %s tokens could not be saved, training continues without it: %s",
            f"{trainer.n_training_samples:,}",
            error,
        )


def _save(trainer: InterruptibleTrainer[Any], continue_with: str) -> None:
    checkpoint_path = trainer.cfg.checkpoint_path
    if not trainer.is_prepared:
        logger.warning("stopped while the whitening was being estimated: nothing to save yet")
    elif checkpoint_path is None:
        logger.warning("stopped; checkpoint_path is None, so the progress is not saved")
    else:
        name = str(trainer.n_training_samples)
        try:
            trainer.save_checkpoint(name)
        except _WRITING_FAILED as error:
            logger.error("the checkpoint could not be saved in %s (%s)", checkpoint_path, error)
            processes = trainer.stream.processes
            folder = folder_of_its_own() if processes.rank == 0 else ""
            checkpoint_path = processes.from_first(folder)
            trainer.cfg = replace(trainer.cfg, checkpoint_path=checkpoint_path)
            trainer.save_checkpoint(name)
        logger.warning(
            "stopped after %s tokens; continue with %s",
            f"{trainer.n_training_samples:,}",
            continue_with.format(Path(checkpoint_path) / name),
        )


@contextmanager
def _stop_on_signals(stream: ActivationStream) -> Iterator[list[int]]:
    """Let SIGINT and SIGTERM end training between two steps; a second one interrupts at once.

    Yields:
        The signals received. Outside the main thread, where Python allows no handlers, none are.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(signum: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)
        logger.warning("stopping after this step (again to stop at once)")
        stream.request_stop()

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
