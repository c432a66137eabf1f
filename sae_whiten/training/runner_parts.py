"""What both runners do around training: checks, seeds, logging, reading ahead."""

import difflib
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import wandb
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.load_model import load_model
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer

from sae_whiten._redaction import redacted
from sae_whiten.estimation.distributed import Processes
from sae_whiten.estimation.sources import Model, resolution_of
from sae_whiten.training.activations_store import ResumableActivationsStore
from sae_whiten.training.data_parallel import logging_once
from sae_whiten.training.interruption import InterruptibleTrainer, interruptible
from sae_whiten.training.stream import ActivationStream
from sae_whiten.training.trainer import WhiteningTrainer

__all__ = [
    "check_hook",
    "connect",
    "logging_run",
    "naming_nearest_hooks",
    "outcome_of",
    "paused",
    "record_reading",
    "seed_generators",
    "train_interruptibly",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")


def check_hook(model: Model, name: str) -> None:
    """Refuse a hook that the model does not have.

    Raises:
        ValueError: It does not; the message names the nearest.
    """
    hooks = list(model.hook_dict)
    if name not in hooks:
        ending_so = [hook for hook in hooks if hook.endswith(f".{name}")]
        near = ending_so or difflib.get_close_matches(name, hooks) or hooks
        raise ValueError(f"the model has no hook {name!r}; nearest: {', '.join(near[:3])}")


@contextmanager
def naming_nearest_hooks(
    cfg: LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig, names: Iterable[str]
) -> Iterator[None]:
    """Name the hooks nearest to one that SAELens' loader of Hugging Face models does not find."""
    try:
        yield
    except ValueError as error:
        if "hook_names not found" not in str(error):
            raise
        kwargs = cfg.model_from_pretrained_kwargs
        model = load_model(
            cfg.model_class_name, cfg.model_name, "cpu", model_from_pretrained_kwargs=kwargs
        )
        for name in names:
            check_hook(model, name)
        raise


def record_reading(
    sae: TrainingSAE[Any], cfg: LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig
) -> None:
    """Add to an SAE's metadata what SAELens leaves out of how its activations are made."""
    sae.cfg.metadata.autocast_lm = cfg.autocast_lm
    sae.cfg.metadata.use_chat_formatting = cfg.use_chat_formatting


def seed_generators(
    cfg: LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig,
) -> None:
    """Seed torch's generators with `cfg.seed`, which SAELens reads nowhere.

    Initial weights, the order in which activations are mixed and noise come from them. The default
    seed gives way to that of a script which seeded them itself; any other does not.
    """
    default = type(cfg).__dataclass_fields__["seed"].default
    seeded_by_script = torch.initial_seed() < 2**32  # torch begins with 64 random bits
    if cfg.seed != default or not seeded_by_script:
        torch.manual_seed(cfg.seed)


@contextmanager
def logging_run(
    cfg: LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig, processes: Processes
) -> Iterator[None]:
    """A run of Weights & Biases around training, if the config asks for one."""
    with logging_once(processes):
        if cfg.logger.log_to_wandb:
            wandb.init(
                project=cfg.logger.wandb_project,
                entity=cfg.logger.wandb_entity,
                config=redacted(cfg.to_dict()),
                name=cfg.logger.run_name,
                id=cfg.logger.wandb_id,
            )
        yield
        if cfg.logger.log_to_wandb:
            wandb.finish()


def connect(stream: ActivationStream, store: ResumableActivationsStore) -> None:
    """Let a stream and the store that it reads from know of each other."""
    store.count_from_here()
    store.training_position = lambda: stream.n_served
    stream.source_is_finite = True
    stream.resolution = resolution_of(store.model, store.autocast_lm)
    stream.next_is = lambda: {0: "next cached", 1: "held-out"}.get(
        store.n_epochs, "next (of a dataset that was begun anew)"
    )


def paused(stream: ActivationStream | None) -> AbstractContextManager[None]:
    """Keep a thread that reads ahead, if there is one, from drawing batches meanwhile."""
    source = None if stream is None else stream.source
    return source.paused() if isinstance(source, PrefetchingIterator) else nullcontext()


def train_interruptibly(
    trainer: InterruptibleTrainer[T],
    stream: ActivationStream,
    store: ResumableActivationsStore,
    cfg: LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig,
) -> T:
    """Let a trainer fit; save a checkpoint when it is stopped by a signal or an activation that is
    not finite.

    Args:
        trainer: Trains on `stream`.
        stream: Reads from `store`.
        store: Where the activations come from.
        cfg: Says how many batches a thread is to draw ahead, and where checkpoints go.

    Raises:
        KeyboardInterrupt: After SIGINT.
        SystemExit: After SIGTERM; its code is 143.
    """
    n_ahead = int(cfg.prefetch_llm_batches)
    with (
        _reading_ahead(stream, store, n_ahead),
        interruptible(trainer, stream, cfg.checkpoint_path, "resume_from_checkpoint={}"),
    ):
        result = trainer.fit()
    if store.n_skipped:
        logger.warning("%d activations with a NaN or an infinity were left out", store.n_skipped)
    return result


@contextmanager
def _reading_ahead(
    stream: ActivationStream, store: ResumableActivationsStore, n_batches: int
) -> Iterator[None]:
    if n_batches == 0:
        yield
        return
    thread = PrefetchingIterator(iter(store), prefetch=n_batches)
    stream.source = thread
    try:
        yield
    finally:
        # before 6.54.8 SAELens left the thread to end with the process
        if hasattr(thread, "close"):
            thread.close()


def outcome_of(trainer: SAETrainer[Any, Any]) -> dict[str, Any]:
    """What a trainer knows of its SAE that is written beside it; arguments of `write_sae`."""
    found: dict[str, Any] = {"log_feature_sparsity": trainer.log_feature_sparsity}
    if isinstance(trainer, WhiteningTrainer):
        found |= {"whitening": trainer.whitening, "statistics": trainer.scaler.statistics}
    return found
