"""SAELens' language-model runner, for training under whitening."""

import copy
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner, LLMSaeEvaluator
from sae_lens.saes.sae import TrainingSAE

from sae_whiten.architectures.folding import FoldError
from sae_whiten.config import WhiteningConfig
from sae_whiten.estimation.distributed import Processes
from sae_whiten.estimation.sources import Model
from sae_whiten.training.activations_store import ResumableActivationsStore
from sae_whiten.training.checks import check_runner_config
from sae_whiten.training.pretrained import as_asked_for
from sae_whiten.training.runner_parts import (
    add_runner_files,
    check_is_foldable,
    check_loaded,
    logging_run,
    naming_model_and_hooks,
    opened_dataset,
    outcome_of,
    own_share,
    record_reading,
    save_finished,
    seed_generators,
    set_buffer_size,
    train,
    warn_of_replacement,
)
from sae_whiten.training.trainer import WhiteningTrainer
from sae_whiten.training.training_sae import enter_whitened_space, is_in_whitened_space

__all__ = ["WhiteningTrainingRunner"]


class WhiteningTrainingRunner(LanguageModelSAETrainingRunner):
    """A `LanguageModelSAETrainingRunner` that trains under whitening.

    `cfg.output_path` receives an ordinary SAELens SAE, and beside it the activation statistics and
    the whitening. Ctrl-C and SIGTERM end training after the current step, with a checkpoint in
    `cfg.checkpoint_path`; `cfg.resume_from_checkpoint` continues from any checkpoint as if there
    had been no interruption, bit for bit on the same machine.

    Examples:
        >>> from datasets import Dataset
        >>> from sae_lens import LoggingConfig, TopKTrainingSAEConfig
        >>> from transformer_lens import HookedTransformer, HookedTransformerConfig
        >>> size = {"n_layers": 1, "d_model": 8, "n_heads": 1, "d_head": 8, "n_ctx": 16}
        >>> model = HookedTransformer(HookedTransformerConfig(**size, d_vocab=50, act_fn="relu"))
        >>> dataset = Dataset.from_dict({"input_ids": torch.randint(0, 50, (100, 16)).tolist()})
        >>> cfg = LanguageModelSAERunnerConfig(
        ...     sae=TopKTrainingSAEConfig(
        ...         d_in=8, d_sae=32, k=4, normalize_activations="covariance_whitening"
        ...     ),
        ...     model_name="ours", hook_name="blocks.0.hook_resid_post", dataset_path="ours",
        ...     context_size=16, training_tokens=1024, train_batch_size_tokens=256,
        ...     checkpoint_path=None, output_path=None, logger=LoggingConfig(log_to_wandb=False),
        ... )
        >>> runner = WhiteningTrainingRunner(cfg, override_model=model, override_dataset=dataset)
        >>> sae = runner.run()
        >>> sae.cfg.normalize_activations, sae.cfg.metadata.whitening["fold"]["check"]["source"]
        ('none', 'held-out')

    Args:
        cfg: SAELens' runner config, with `sae.normalize_activations="covariance_whitening"`. It is
            copied, never changed. Its `seed` sets the initial weights and the order in which
            activations are mixed; the default, 42, has no effect in scripts that call
            `torch.manual_seed`. With `from_pretrained_path`, a plain SAE is converted exactly to
            whitened coordinates, and training continues with the config `cfg.sae`. (If that ranks
            latents by decoder norms, near ties may change: the norms are those under this
            whitening.)
        whitening: How to whiten. None: the configuration of the checkpoint that is resumed, or else
            the default.
        override_dataset: As for SAELens' runner.
        override_model: As for SAELens' runner; also a TransformerBridge.
        override_sae: As for SAELens' runner.

    Attributes:
        trainer: The trainer, once `run` has made it; it holds the whitening and the statistics.

    Raises:
        ValueError: The config does not ask for whitening, its buffer is smaller than a batch, the
            model has no such hook, the architecture does not support `whitening.sparsity_norms`, or
            the SAE at `from_pretrained_path` does not fit `cfg.sae`. A `FieldError` if the value of
            a field cannot work: a size below 1, k above d_sae, a missing device, a context too long
            for the model.
        FoldError: No whitening can be folded into this architecture.
    """

    trainer: WhiteningTrainer[TrainingSAE[Any], Any]

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        whitening: WhiteningConfig | None = None,
        override_dataset: HfDataset | None = None,
        override_model: Model | None = None,
        override_sae: TrainingSAE[Any] | None = None,
    ) -> None:
        sae_cfg = override_sae.cfg if override_sae is not None else cfg.sae
        check_is_foldable("the SAE", sae_cfg, override_sae)
        if sae_cfg.normalize_activations != "covariance_whitening":
            raise ValueError(
                f"the SAE's config has normalize_activations={sae_cfg.normalize_activations!r}: "
                "set it to 'covariance_whitening', or use SAELens' LanguageModelSAETrainingRunner"
            )
        # before the model is loaded
        check_runner_config(cfg, {"sae": sae_cfg})
        cfg = copy.deepcopy(cfg)
        set_buffer_size(cfg)
        self.whitening_config = whitening
        self.processes = Processes()
        seed_generators(cfg)
        with (
            naming_model_and_hooks(cfg, [cfg.hook_name]),
            opened_dataset(cfg, override_dataset) as dataset,
        ):
            super().__init__(
                cfg,
                override_dataset=dataset,
                override_model=cast(Any, override_model),  # a bridge will do, too
                override_sae=override_sae,
            )
        check_loaded(self.cfg, self.model, [self.cfg.hook_name])
        path = self.cfg.from_pretrained_path
        self._start_from_folded = override_sae is None and path is not None
        if self._start_from_folded:
            self.sae = as_asked_for(self.sae, self.cfg.sae, str(path))
        self.sae.cfg = copy.deepcopy(self.sae.cfg)
        # before SAELens compiles the training step together with its losses
        enter_whitened_space(self.sae, whitening)
        self.activations_store = own_share(
            self.activations_store, ResumableActivationsStore, self.processes
        )
        # SAELens gives every config a folder of its own
        self.cfg.checkpoint_path = self.processes.from_first(self.cfg.checkpoint_path)
        self.evaluator.activations_store = self.activations_store

    def run(self) -> TrainingSAE[Any]:
        """Train, fold, prove the fold and save.

        Returns:
            The folded SAE.

        Raises:
            OSError: What was trained could not be saved; the message says where it is instead.
            KeyboardInterrupt: After Ctrl-C, once the checkpoint is saved.
            SystemExit: After SIGTERM, once the checkpoint is saved; its code is 143.
        """
        # a user may have put in another store
        store = own_share(self.activations_store, ResumableActivationsStore, self.processes)
        self.activations_store = store
        self._set_sae_metadata()
        if self.cfg.output_path is not None and self.processes.rank == 0:
            warn_of_replacement([Path(self.cfg.output_path)])
        with logging_run(self.cfg, self.processes):
            self._compile_sae_if_needed()
            sae = self._train(store)
            if self.cfg.output_path is not None:
                self.save_final_sae(sae, self.cfg.output_path)
        return sae

    def _train(self, store: ResumableActivationsStore) -> TrainingSAE[Any]:
        self.trainer = WhiteningTrainer(
            cfg=self.cfg.to_sae_trainer_config(),
            sae=self.sae,
            data_provider=store,
            whitening=self.whitening_config,
            evaluator=self._evaluate,
            save_checkpoint_fn=self.save_checkpoint,
            start_from_folded=self._start_from_folded,
            train_as=self.cfg.sae if self._start_from_folded else None,
        )
        save = partial(self.save_final_sae, self.sae)
        return train(self.trainer, store, self.cfg, self.trainer.load_trainer_state, save)

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Add the runner's files to a checkpoint directory."""
        add_runner_files(self, checkpoint_path)

    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: torch.Tensor | None = None,
    ) -> None:
        """Write a folded SAE and, if it was trained here, its whitening and statistics, atomically.

        Raises:
            FoldError: The SAE is to be whitened, and was not trained yet.
            OSError: Saving failed; the message says where the SAE is instead.
        """
        if self.processes.rank > 0:
            return
        if not hasattr(self, "trainer") and is_in_whitened_space(sae):
            raise FoldError("this SAE was not trained yet: its whitening has not been estimated")
        trained_here = hasattr(self, "trainer") and self.trainer.sae is sae
        outcome = outcome_of(self.trainer) if trained_here else {}
        if log_feature_sparsity is not None:
            outcome["log_feature_sparsity"] = log_feature_sparsity
        outcome["runner_cfg"] = self.cfg.to_dict()
        save_finished(sae, output_path, self.cfg, logged_cfg=self.cfg, **outcome)

    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        record_reading(self.sae, self.cfg)

    def _evaluate(self, sae: Any, data_provider: Any, activation_scaler: Any) -> dict[str, Any]:
        if isinstance(self.evaluator, LLMSaeEvaluator):
            # it pauses a prefetching thread, and so must be able to recognise it
            data_provider = data_provider.source
        return self.evaluator(sae, data_provider, activation_scaler)
