"""SAELens' language-model runner, training under whitening."""

import copy
import difflib
import json
import logging
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.constants import (
    ACTIVATION_WHITENING_FILENAME,
    RUNNER_CFG_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.training.types import DataProvider
from safetensors.torch import save_file
from transformer_lens import HookedRootModule

from sae_whiten._files import atomic_path
from sae_whiten.config import WhiteningConfig
from sae_whiten.saelens.activations_store import ResumableActivationsStore
from sae_whiten.saelens.stream import ActivationStream, StopRequested
from sae_whiten.saelens.trainer import STATISTICS_FILENAME, WhiteningTrainer
from sae_whiten.saelens.training_sae import enter_whitened_space
from sae_whiten.statistics import NonFiniteActivationsError

__all__ = ["WhiteningTrainingRunner"]

logger = logging.getLogger(__name__)

WHITENING_FILENAME = "whitening.safetensors"


class WhiteningTrainingRunner(LanguageModelSAETrainingRunner):
    """A `LanguageModelSAETrainingRunner` that trains under whitening.

    `cfg.output_path` receives an ordinary SAELens SAE, and beside it the activation statistics and
    the whitening. Ctrl-C and SIGTERM end training after the step at hand, with a checkpoint in
    `cfg.checkpoint_path`; `cfg.resume_from_checkpoint` continues from any checkpoint as if nothing
    had happened, bit for bit on the same machine.

    Args:
        cfg: SAELens' runner config, with `sae.normalize_activations="covariance_whitening"`. It is
            copied, never changed. With `from_pretrained_path`, a plain SAE is brought into whitened
            coordinates, exactly, and trained on.
        whitening: How to whiten; the default configuration, or that of the checkpoint which is
            resumed, if None.
        override_dataset: As for SAELens' runner.
        override_model: As for SAELens' runner.
        override_sae: As for SAELens' runner.

    Attributes:
        trainer: The trainer, once `run` has made it; it holds the whitening and the statistics.

    Raises:
        ValueError: The config does not ask for whitening.
        FoldError: No whitening can be folded into this architecture.
    """

    trainer: WhiteningTrainer

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        whitening: WhiteningConfig | None = None,
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: TrainingSAE[Any] | None = None,
    ) -> None:
        wanted = (override_sae.cfg if override_sae is not None else cfg.sae).normalize_activations
        if wanted != "covariance_whitening":
            raise ValueError(
                f"the SAE's config has normalize_activations={wanted!r}: set it to "
                "'covariance_whitening', or use SAELens' LanguageModelSAETrainingRunner"
            )
        self.whitening_config = whitening
        super().__init__(
            copy.deepcopy(cfg),
            override_dataset=override_dataset,
            override_model=override_model,
            override_sae=override_sae,
        )
        self._check_hook()
        self.sae.cfg = copy.deepcopy(self.sae.cfg)
        self._requested = self.cfg
        self._start_from_folded = override_sae is None and self._check_pretrained()
        # before SAELens compiles the training step, for it is compiled with its losses
        enter_whitened_space(self.sae)
        self.activations_store = self._resumable_store()
        self.evaluator.activations_store = self.activations_store

    def run(self) -> TrainingSAE[Any]:
        """Train, fold, prove the fold and save.

        Returns:
            The folded SAE.

        Raises:
            KeyboardInterrupt: After Ctrl-C, once the checkpoint is saved.
            SystemExit: After SIGTERM, once the checkpoint is saved; its code is 143.
        """
        cfg = self.cfg
        # resuming and prefetching are done in run_trainer_with_interruption_handling: here they
        # would load SAELens' files, and read ahead before the position is restored
        self.cfg = copy.copy(cfg)
        self.cfg.resume_from_checkpoint = None
        self.cfg.prefetch_llm_batches = False
        self._requested = cfg
        try:
            return super().run()
        finally:
            self.cfg = cfg

    def run_trainer_with_interruption_handling(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, trainer: SAETrainer[Any, Any]
    ) -> TrainingSAE[Any]:
        """Train with a `WhiteningTrainer` in place of the trainer given."""
        self.cfg = self._requested
        if self.cfg.logger.log_to_wandb:
            wandb.config.update(self.cfg.to_dict(), allow_val_change=True)
        provider: DataProvider = self.activations_store
        store = self.activations_store
        assert isinstance(store, ResumableActivationsStore)
        resume_from = self.cfg.resume_from_checkpoint
        self.trainer = WhiteningTrainer(
            cfg=trainer.cfg,
            sae=self.sae,
            data_provider=provider,
            whitening=self.whitening_config,
            evaluator=self._evaluate,
            save_checkpoint_fn=self.save_checkpoint,
            start_from_folded=self._start_from_folded,
        )
        stream = self.trainer.stream
        store.training_position = lambda: stream.n_served
        stream.source_is_finite = True
        stream.next_is = lambda: {0: "next cached", 1: "held-out"}.get(
            store.n_epochs, "next (of a dataset that was begun anew)"
        )
        store.on_nonfinite = self.trainer.scaler.config.on_nonfinite
        if resume_from is not None:
            logger.info("resuming from checkpoint %s", resume_from)
            self.trainer.load_trainer_state(resume_from)
            store.on_nonfinite = self.trainer.scaler.config.on_nonfinite
            store.load_from_checkpoint(resume_from)
        with self._prefetching(stream), _stop_on_signals(stream) as received:
            try:
                sae = self.trainer.fit()
                if store.n_skipped:
                    logger.warning(
                        "%d activations with a NaN or an infinity were left out", store.n_skipped
                    )
                return sae
            except (StopRequested, NonFiniteActivationsError) as error:
                self._save_progress()
                if isinstance(error, NonFiniteActivationsError):
                    raise
                signum = received[0] if received else signal.SIGINT
        if signum == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Add the runner's files to a checkpoint directory."""
        if checkpoint_path is None:
            return
        source = self.trainer.stream.source
        # a thread that draws batches meanwhile would change what is being saved
        with source.paused() if isinstance(source, PrefetchingIterator) else nullcontext():
            self.activations_store.save_to_checkpoint(checkpoint_path)
        _write_json(Path(checkpoint_path) / RUNNER_CFG_FILENAME, self.cfg.to_dict())

    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: torch.Tensor | None = None,
    ) -> None:
        """Write the folded SAE, its whitening and the statistics: each file whole or not at all."""
        target = Path(output_path)
        target.mkdir(parents=True, exist_ok=True)
        trainer = self.trainer
        with tempfile.TemporaryDirectory(dir=target, prefix=".partial-") as name:
            staging = Path(name)
            weights, cfg = sae.save_inference_model(staging)
            # SAELens passes the figure of the trainer that ours took the place of
            save_file({"sparsity": trainer.log_feature_sparsity}, staging / SPARSITY_FILENAME)
            _write_json(staging / RUNNER_CFG_FILENAME, self.cfg.to_dict())
            if trainer.whitening is not None:
                trainer.whitening.save(staging / WHITENING_FILENAME)
            statistics = trainer.scaler.statistics
            if statistics is not None:
                statistics.save(staging / STATISTICS_FILENAME)
            for file in sorted(staging.iterdir()):
                file.replace(target / file.name)
        logger.info("SAE saved: %s", target)
        if self.cfg.logger.log_to_wandb:
            self.cfg.logger.log(
                self,
                target / weights.name,
                target / cfg.name,
                sparsity_path=target / SPARSITY_FILENAME,
                wandb_aliases=["final_model"],
            )

    def _check_hook(self) -> None:
        hooks, name = list(self.model.hook_dict), self.cfg.hook_name
        if name not in hooks and not self.cfg.use_cached_activations:
            near = difflib.get_close_matches(name, hooks) or hooks[:3]
            raise ValueError(f"the model has no hook {name!r}; nearest: {', '.join(near)}")

    def _check_pretrained(self) -> bool:
        """Whether `self.sae` is plain and has to be brought into whitened coordinates."""
        path = self.cfg.from_pretrained_path
        if self.sae.cfg.normalize_activations == "covariance_whitening":
            if path is not None:
                raise ValueError(
                    f"{path} holds an SAE whose weights are in whitened coordinates "
                    f"(normalize_activations='covariance_whitening') and no {WHITENING_FILENAME} "
                    f"that says in which: a checkpoint of SAELens' own trainer? Its weights mean "
                    f"nothing under another whitening. Fold it first, with the "
                    f"{ACTIVATION_WHITENING_FILENAME} it was trained with."
                )
            return False
        if self.sae.cfg.normalize_activations != "none":
            raise ValueError(
                f"{path} holds an SAE with "
                f"normalize_activations={self.sae.cfg.normalize_activations!r}; only a plain one "
                "('none') can be brought into whitened coordinates"
            )
        return True

    def _resumable_store(self) -> ResumableActivationsStore:
        with warnings.catch_warnings():
            # SAELens has given its warnings about the dataset when it made its own store
            warnings.simplefilter("ignore")
            store = ResumableActivationsStore.from_config(
                self.model, self.cfg, override_dataset=self.activations_store.dataset
            )
        assert isinstance(store, ResumableActivationsStore)
        return store

    def _evaluate(self, sae: Any, data_provider: Any, activation_scaler: Any) -> dict[str, Any]:
        # SAELens' evaluator pauses a prefetching thread, which it must be able to recognise
        return self.evaluator(sae, data_provider.source, activation_scaler)

    @contextmanager
    def _prefetching(self, stream: ActivationStream) -> Iterator[None]:
        n_batches = int(self.cfg.prefetch_llm_batches)
        if n_batches == 0:
            yield
            return
        thread = PrefetchingIterator(iter(self.activations_store), prefetch=n_batches)
        stream.source = thread
        try:
            yield
        finally:
            # before 6.54.8 SAELens left the thread to end with the process
            if hasattr(thread, "close"):
                thread.close()

    def _save_progress(self) -> None:
        trainer = self.trainer
        if trainer.whitening is None:
            logger.warning("stopped while the whitening was being estimated: nothing to save yet")
        elif self.cfg.checkpoint_path is None:
            logger.warning("stopped; checkpoint_path is None, so the progress is not saved")
        else:
            trainer.save_checkpoint(str(trainer.n_training_samples))
            logger.warning(
                "stopped after %d samples; continue with resume_from_checkpoint=%s",
                trainer.n_training_samples,
                Path(self.cfg.checkpoint_path) / str(trainer.n_training_samples),
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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(content))
