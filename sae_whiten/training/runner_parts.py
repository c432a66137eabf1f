"""Shared by both runners: checks, seeds, logging, resuming, reading ahead, saving."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import wandb
from sae_lens.config import HfDataset
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.load_model import load_model
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer

from sae_whiten._checks import require_context
from sae_whiten._contexts import without_messages
from sae_whiten._redaction import redact_attributes, redacted
from sae_whiten.architectures.folding import FoldError, why_not_foldable
from sae_whiten.estimation.dataset import check_columns, local_dataset, naming_columns
from sae_whiten.estimation.distributed import Processes
from sae_whiten.estimation.models import naming_model
from sae_whiten.estimation.sources import Model, check_hook
from sae_whiten.training.activations_store import (
    ResumableActivationsStore,
    buffer_field,
    check_buffer,
)
from sae_whiten.training.checkpoint import (
    check_runner_settings,
    folder_of_its_own,
    own_part,
    save_or_keep,
    save_runner_files,
    write_sae,
)
from sae_whiten.training.checks import RunnerConfig
from sae_whiten.training.data_parallel import logging_once, take_share
from sae_whiten.training.interruption import InterruptibleTrainer, interruptible
from sae_whiten.training.stream import ActivationStream
from sae_whiten.training.trainer import WhiteningTrainer

__all__ = [
    "add_runner_files",
    "check_is_foldable",
    "check_loaded",
    "logging_run",
    "naming_model_and_hooks",
    "opened_dataset",
    "outcome_of",
    "own_share",
    "paused",
    "record_reading",
    "save_finished",
    "seed_generators",
    "set_buffer_size",
    "train",
    "warn_of_replacement",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
T_Store = TypeVar("T_Store", bound=ResumableActivationsStore)


def check_is_foldable(name: str, cfg: TrainingSAEConfig, given: TrainingSAE[Any] | None) -> None:
    """Refuse an SAE that cannot be folded, before a model is loaded.

    Args:
        name: Name of the SAE in the message.
        cfg: Config of the SAE.
        given: The SAE itself, if it exists: its class may not be registered.

    Raises:
        FoldError: It cannot be folded; the message says why.
    """
    sae_class = get_sae_training_class(cfg.architecture())[0] if given is None else given
    reason = why_not_foldable(sae_class)
    if reason is not None:
        raise FoldError(
            f"{name} cannot be trained under whitening, which cannot be folded into {reason}"
        )


def set_buffer_size(cfg: RunnerConfig) -> None:
    """Set the size of the mixing buffer if the config does not.

    Raises:
        ValueError: The buffer is smaller than a training batch.
    """
    field = buffer_field(cfg)
    n_positions = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    n_sequences = check_buffer(getattr(cfg, field), n_positions, cfg.train_batch_size_tokens)
    setattr(cfg, field, n_sequences)


@contextmanager
def naming_model_and_hooks(cfg: RunnerConfig, names: Iterable[str]) -> Iterator[None]:
    """Short errors of SAELens' runners about the model: `naming_model`, and, for a hook that its
    Hugging Face loader does not find, the nearest hooks."""
    try:
        with naming_model(cfg.model_name, cfg.model_class_name):
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


def check_loaded(cfg: RunnerConfig, model: Model, hook_names: Iterable[str]) -> None:
    """Refuse what a model does not have, and forget secrets, which only loading needs.

    Raises:
        ValueError: It has no such hook.
        FieldError: It cannot read so long a context.
    """
    redact_attributes(cfg)
    if not getattr(cfg, "use_cached_activations", False):
        for hook_name in hook_names:
            check_hook(model, hook_name)
        require_context(cfg.context_size, model)


@contextmanager
def opened_dataset(cfg: RunnerConfig, given: HfDataset | None) -> Iterator[HfDataset | None]:
    """The dataset to pass to SAELens' runner: the one given, a local one, or None for it to load.

    For a local dataset, SAELens' warning that it overrides the config is hidden: it is the one
    named in the config.

    Raises:
        ValueError: It has no column of tokens or text; before the model is loaded if it is given
            or local.
    """
    source, chat = cfg.dataset_path, cfg.use_chat_formatting
    is_read = not getattr(cfg, "use_cached_activations", False)
    if given is not None:
        if is_read:
            check_columns(given, chat=chat)
        yield given
        return
    warnings = "passed in a dataset which will override", "override_dataset overrides"
    with without_messages("sae_lens", *warnings):
        dataset = local_dataset(source, cfg.streaming)
        if is_read:
            check_columns(dataset, source, chat)
        with naming_columns(source, cfg.streaming, chat):
            yield dataset


def record_reading(sae: TrainingSAE[Any], cfg: RunnerConfig) -> None:
    """Add to an SAE's metadata the settings of its activations that SAELens leaves out."""
    sae.cfg.metadata.autocast_lm = cfg.autocast_lm
    sae.cfg.metadata.use_chat_formatting = cfg.use_chat_formatting


def seed_generators(cfg: RunnerConfig) -> None:
    """Seed torch's generators with `cfg.seed`, which SAELens reads nowhere.

    Initial weights, the order in which activations are mixed and noise come from them. If a script
    has seeded torch itself, the default seed changes nothing; any other replaces the script's.
    """
    default = type(cfg).__dataclass_fields__["seed"].default
    seeded_by_script = torch.initial_seed() < 2**32  # torch begins with 64 random bits
    if cfg.seed != default or not seeded_by_script:
        torch.manual_seed(cfg.seed)


def own_share(store: Any, kind: type[T_Store], processes: Processes) -> T_Store:
    """A store as one of `kind` that reads this process's share of the data.

    Raises:
        TypeError: As `ResumableActivationsStore.adopt` does.
        ValueError: The batch cannot be divided by the number of processes.
    """
    adopted: Any = kind.adopt(store)  # pyright sees the base class
    if adopted is not store:
        take_share(adopted, processes)
    return adopted


@contextmanager
def logging_run(cfg: RunnerConfig, processes: Processes) -> Iterator[None]:
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


def warn_of_replacement(folders: Iterable[Path]) -> None:
    """Say before the training, and not after it, which finished SAEs it will replace."""
    if found := [str(folder) for folder in folders if (folder / SAE_WEIGHTS_FILENAME).is_file()]:
        logger.warning(
            f"an SAE is already in {', '.join(found)}: this run will replace it when it ends. To "
            "keep it, stop now and give another output_path."
        )


def _connect(stream: ActivationStream, store: ResumableActivationsStore) -> None:
    """Connect a stream with the store that it reads from."""
    store.count_from_here()
    store.training_position = lambda: stream.n_served
    stream.source_is_finite = True
    stream.resolution = store.resolution
    stream.unmixed = store.unmixed
    n_of_pass = store.store_batch_size_prompts * store.training_context_size
    stream.unmixed_per_batch = store.train_batch_size_tokens / n_of_pass
    stream.next_is = lambda: {0: "next cached", 1: "held-out"}.get(
        store.n_epochs, "next (of a dataset that was begun anew)"
    )


def paused(stream: ActivationStream | None) -> AbstractContextManager[None]:
    """Pause the thread that reads ahead, if there is one, inside the block."""
    source = None if stream is None else stream.source
    return source.paused() if isinstance(source, PrefetchingIterator) else nullcontext()


def train(
    trainer: InterruptibleTrainer[T],
    store: ResumableActivationsStore,
    cfg: RunnerConfig,
    load: Callable[[str], None],
    save: Callable[[str], None],
) -> T:
    """Run a trainer, from the checkpoint if one is resumed.

    A checkpoint is saved when a signal, or an activation that is not finite, stops it.

    Args:
        trainer: Its stream reads from `store`.
        store: Where the activations come from.
        cfg: Sets the checkpoint to resume, how many batches a thread draws ahead, and where results
            go.
        load: Reads the trainer's part of a checkpoint.
        save: Writes what was trained to a folder; used if an error follows the training.

    Raises:
        KeyboardInterrupt: After SIGINT.
        SystemExit: After SIGTERM; its code is 143.
    """
    stream, resume_from = trainer.stream, cfg.resume_from_checkpoint
    _connect(stream, store)
    if resume_from is not None:
        logger.info("resuming from checkpoint %s", resume_from)
        check_runner_settings(resume_from, cfg.to_dict())
        load(resume_from)
    store.on_nonfinite = stream.on_nonfinite
    if resume_from is None:
        store.keep_unmixed()
    else:
        store.load_from_checkpoint(own_part(resume_from, stream.processes))
        # trainers of SAEs without whitening do not save it
        stream.n_served = store.n_batches
        if cfg.logger.log_to_wandb:
            # evaluators draw what follows in the dataset
            stream.read_ahead()
    try:
        with (
            _reading_ahead(stream, store, int(cfg.prefetch_llm_batches)),
            interruptible(trainer, "resume_from_checkpoint={}"),
        ):
            result = trainer.fit()
    except Exception:
        if trainer.is_trained:
            # the final checkpoint failed; the trained SAE must not be lost
            save(cfg.output_path or folder_of_its_own())
        raise
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


def add_runner_files(runner: Any, checkpoint_path: Path | None) -> None:
    """Add a runner's files to a checkpoint directory, if there is one."""
    if checkpoint_path is None:
        return
    # there is no trainer if the user trains with one of their own
    stream = runner.trainer.stream if hasattr(runner, "trainer") else None
    with paused(stream):
        save_runner_files(checkpoint_path, runner.activations_store, runner.cfg.to_dict())


def outcome_of(trainer: SAETrainer[Any, Any]) -> dict[str, Any]:
    """A trainer's results that are written beside its SAE, as arguments of `write_sae`."""
    contents: dict[str, Any] = {"log_feature_sparsity": trainer.log_feature_sparsity}
    if isinstance(trainer, WhiteningTrainer):
        contents |= {"whitening": trainer.whitening, "statistics": trainer.scaler.statistics}
    return contents


def save_finished(
    sae: TrainingSAE[Any], path: str | Path, cfg: RunnerConfig, logged_cfg: Any, **contents: Any
) -> None:
    """Write a finished SAE, whole or not at all, and log it to Weights & Biases if asked to.

    Args:
        sae: The SAE, folded.
        path: Where to write it.
        cfg: Sets where it is kept if that fails, and what is logged.
        logged_cfg: The config that is logged with it.
        contents: Further arguments of `write_sae`.

    Raises:
        OSError: Saving failed; the message says where the SAE is instead.
    """
    save = partial(write_sae, sae=sae, **contents)
    weights, sae_cfg, sparsity = save_or_keep(save, path, cfg.checkpoint_path)
    if cfg.logger.log_to_wandb:
        cfg.logger.log(
            SimpleNamespace(sae=sae, cfg=logged_cfg),
            weights,
            sae_cfg,
            sparsity_path=sparsity,
            wandb_aliases=["final_model"],
        )
