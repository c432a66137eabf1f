"""SAELens' runner of several SAEs, some or all of them trained under whitening."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from sae_lens.config import HfDataset
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.multi_sae_training_runner import (
    MultiSAEEvaluator,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training.types import MultiHookDataProvider

from sae_whiten._files import write_json
from sae_whiten._redaction import redact_attributes
from sae_whiten.architectures.folding import FoldError
from sae_whiten.config import WhiteningConfig
from sae_whiten.estimation.distributed import Processes
from sae_whiten.estimation.sources import Model
from sae_whiten.training.activations_store import PackedActivationsStore
from sae_whiten.training.checks import check_runner_config
from sae_whiten.training.data_parallel import open_stream
from sae_whiten.training.multi_trainer import WhiteningMultiSAETrainer
from sae_whiten.training.runner_parts import (
    add_runner_files,
    check_is_foldable,
    check_loaded,
    logging_run,
    naming_model_and_hooks,
    opened_dataset,
    outcome_of,
    own_share,
    paused,
    record_reading,
    save_finished,
    seed_generators,
    set_buffer_size,
    train,
    warn_of_replacement,
)
from sae_whiten.training.training_sae import enter_whitened_space

__all__ = ["WhiteningMultiSAETrainingRunner"]


class WhiteningMultiSAETrainingRunner(MultiSAETrainingRunner):
    """A `MultiSAETrainingRunner` that trains SAEs under whitening.

    SAEs whose config has `normalize_activations="covariance_whitening"` are whitened; the others
    are trained beside them on the same activations, bit for bit as by SAELens' runner. The
    statistics of all hooks are estimated in one pass over the first activations, which are then
    trained on. The result for an SAE does not depend on the SAEs at other hooks. (But
    `"expected_average_only_in"` uses, as in SAELens, `n_batches_for_norm_estimate` batches that no
    SAE is trained on.)

    `cfg.output_path` receives a folder for every SAE as `WhiteningTrainingRunner` writes it.
    Stopping and resuming are as there, too.

    Examples:
        >>> from datasets import Dataset
        >>> from sae_lens import LoggingConfig, TopKTrainingSAEConfig
        >>> from transformer_lens import HookedTransformer, HookedTransformerConfig
        >>> size = {"n_layers": 1, "d_model": 8, "n_heads": 1, "d_head": 8, "n_ctx": 16}
        >>> model = HookedTransformer(HookedTransformerConfig(**size, d_vocab=50, act_fn="relu"))
        >>> tokens = [[i * j % 50 for j in range(16)] for i in range(100)]
        >>> dataset = Dataset.from_dict({"input_ids": tokens})
        >>> whitened = {"normalize_activations": "covariance_whitening"}
        >>> cfg = MultiSAETrainingRunnerConfig(
        ...     saes={
        ...         "whitened": TopKTrainingSAEConfig(d_in=8, d_sae=32, k=4, **whitened),
        ...         "plain": TopKTrainingSAEConfig(d_in=8, d_sae=32, k=4),
        ...     },
        ...     hook_names={
        ...         "whitened": "blocks.0.hook_resid_mid",
        ...         "plain": "blocks.0.hook_resid_post",
        ...     },
        ...     model_name="ours", dataset_path="ours", context_size=16,
        ...     training_tokens=1024, train_batch_size_tokens=256,
        ...     checkpoint_path=None, output_path=None, logger=LoggingConfig(log_to_wandb=False),
        ... )
        >>> runner = WhiteningMultiSAETrainingRunner(
        ...     cfg, override_model=model, override_dataset=dataset
        ... )
        >>> {name: "whitening" in sae.cfg.metadata for name, sae in runner.run().items()}
        {'whitened': True, 'plain': False}

    Args:
        cfg: SAELens' runner config. It is copied, never changed; its `seed` as for
            `WhiteningTrainingRunner`.
        whitening: How to whiten all SAEs, or each by its name. SAEs without one use the
            configuration of the checkpoint that is resumed, or else the default. SAEs at one hook
            share statistics, which satisfy all of them.
        override_dataset: As for SAELens' runner.
        override_model: As for SAELens' runner; also a TransformerBridge.
        override_saes: As for SAELens' runner.

    Attributes:
        trainer: The trainer, once `run` has made it; it has `whitenings` and `statistics` by name
            of the SAE.

    Raises:
        ValueError: No SAE asks for whitening, a configuration is given for one that does not, the
            buffer is smaller than a batch, or the model has no such hook. A `FieldError` if the
            value of a field cannot work, as for `WhiteningTrainingRunner`.
        FoldError: No whitening can be folded into an architecture.
    """

    trainer: WhiteningMultiSAETrainer

    _needs_whitening = True
    """Whether a set of SAEs without any whitened one is refused. A comparison sets it to False: it
    trains the remaining SAEs on the same data, whitened or not."""

    def __init__(
        self,
        cfg: MultiSAETrainingRunnerConfig,
        whitening: WhiteningConfig | Mapping[str, WhiteningConfig] | None = None,
        override_dataset: HfDataset | None = None,
        override_model: Model | None = None,
        override_saes: dict[str, TrainingSAE[Any]] | None = None,
    ) -> None:
        given = override_saes or {}
        trained = {name: sae.cfg for name, sae in given.items()} or cfg.saes
        self.whitening_configs = _whitening_by_name(
            trained, given, whitening, self._needs_whitening
        )
        _check_overrides(cfg, given)
        check_runner_config(cfg, {f"saes[{name!r}]": sae for name, sae in trained.items()})
        cfg = _copied(cfg)
        set_buffer_size(cfg)
        seed_generators(cfg)
        hook_names = dict.fromkeys(cfg.hook_names_per_sae.values())
        with (
            naming_model_and_hooks(cfg, hook_names),
            opened_dataset(cfg, override_dataset) as dataset,
        ):
            super().__init__(
                cfg,
                override_dataset=dataset,
                override_model=cast(Any, override_model),  # a bridge will do, too
                override_saes=override_saes,
            )
        check_loaded(self.cfg, self.model, hook_names)
        self.saes = dict(self.saes)
        for name, sae in self.saes.items():
            sae.cfg = copy.deepcopy(sae.cfg)
            redact_attributes(sae.cfg.metadata)
            if name in self.whitening_configs:
                enter_whitened_space(sae, self.whitening_configs[name])
        self.processes = Processes()
        self.activations_store = own_share(
            self.activations_store, PackedActivationsStore, self.processes
        )
        # SAELens gives every config a folder of its own
        self.cfg.checkpoint_path = self.processes.from_first(self.cfg.checkpoint_path)
        self.evaluator.activations_store = self.activations_store

    def run(self) -> dict[str, TrainingSAE[Any]]:
        """Train, fold, prove the folds and save.

        Returns:
            The SAEs, those trained under whitening folded.

        Raises:
            FoldError: Folding an SAE failed. The message says where both its forms are; the other
                SAEs are finished and saved.
            OSError: An SAE could not be saved; the message says where it is instead.
            KeyboardInterrupt: After Ctrl-C, once the checkpoint is saved.
            SystemExit: After SIGTERM, once the checkpoint is saved; its code is 143.
        """
        # a user may have put in another store
        store = own_share(self.activations_store, PackedActivationsStore, self.processes)
        self.activations_store = store
        self._set_sae_metadata()
        if self.cfg.output_path is not None and self.processes.rank == 0:
            warn_of_replacement(Path(self.cfg.output_path) / name for name in self.saes)
        with logging_run(self.cfg, self.processes):
            saes = self._train(store)
            if self.cfg.output_path is not None:
                self._write_outputs(self.cfg.output_path)
        failures = self.trainer.failures
        if failures:
            message = "; ".join(f"{name}: {error}" for name, error in failures.items())
            others = ", ".join(name for name in saes if name not in failures)
            if others:
                message += f". The other SAEs ({others}) are in "
                message += self.cfg.output_path or "the runner's `saes`"
            raise FoldError(message) from next(iter(failures.values()))
        return saes

    def _train(self, store: PackedActivationsStore) -> dict[str, TrainingSAE[Any]]:
        cfg = self.cfg.to_sae_trainer_config()
        self.trainer = WhiteningMultiSAETrainer(
            cfg=cfg,
            saes=self.saes,
            hook_names=self.cfg.hook_names_per_sae,
            stream=open_stream(store, store.d_in, n_wanted=cfg.total_training_steps),
            split=store.split,
            whitening=self.whitening_configs,
            evaluator=self._evaluate,
            save_checkpoint_fn=self._save_runner_checkpoint_files,
        )
        load, save = self.trainer.load_checkpoint, self._write_outputs
        return train(self.trainer, store, self.cfg, load, save)

    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        for sae in self.saes.values():
            record_reading(sae, self.cfg)

    def _save_runner_checkpoint_files(self, checkpoint_path: Path | None) -> None:
        add_runner_files(self, checkpoint_path)

    def _write_outputs(self, output_path: str) -> None:
        if self.processes.rank > 0:
            return
        base, problems = Path(output_path), []
        for name, sae in self.saes.items():
            if name in self.trainer.failures:
                continue
            outcome = outcome_of(self.trainer.trainers[name])
            try:
                save_finished(sae, base / name, self.cfg, logged_cfg=self.trainer.cfg, **outcome)
            except OSError as error:
                problems.append(str(error))
        if problems:
            raise OSError("; ".join(problems))
        write_json(base / RUNNER_CFG_FILENAME, self.cfg.to_dict())

    def _evaluate(
        self,
        saes: dict[str, TrainingSAE[Any]],
        data_provider: MultiHookDataProvider,
        activation_scalers: dict[str, Any],
        hook_names: dict[str, str],
    ) -> dict[str, Any]:
        if not isinstance(self.evaluator, MultiSAEEvaluator):  # but one of the user's
            return self.evaluator(saes, data_provider, activation_scalers, hook_names)
        # the user's evaluator draws batches, which it must not do while reading ahead is paused
        user_evaluator = self.evaluator.user_evaluator
        with paused(self.trainer.stream):
            built_in = replace(self.evaluator, user_evaluator=None)
            metrics = built_in(saes, data_provider, activation_scalers, hook_names)
        if user_evaluator is not None:
            for name, sae in saes.items():
                view = (batch[hook_names[name]] for batch in data_provider)
                figures = user_evaluator(sae, view, activation_scalers[name])
                metrics.update({f"{name}/{key}": value for key, value in figures.items()})
        return metrics


def _whitening_by_name(
    configs: Mapping[str, TrainingSAEConfig],
    given: Mapping[str, TrainingSAE[Any]],
    whitening: WhiteningConfig | Mapping[str, WhiteningConfig] | None,
    needs_whitening: bool,
) -> dict[str, WhiteningConfig | None]:
    """The SAEs that ask for whitening, and the configuration given for each.

    Raises:
        ValueError, FoldError: As the runner does; before a model is loaded.
    """
    names = [n for n, c in configs.items() if c.normalize_activations == "covariance_whitening"]
    if needs_whitening and not names:
        raise ValueError(
            "no SAE's config has normalize_activations='covariance_whitening': set it for those "
            "that are to be whitened, or use SAELens' MultiSAETrainingRunner"
        )
    if isinstance(whitening, Mapping):
        unknown = [name for name in whitening if name not in names]
        if unknown:
            raise ValueError(
                f"a WhiteningConfig is given for {', '.join(unknown)}, but the SAEs with "
                f"normalize_activations='covariance_whitening' are {', '.join(names)}"
            )
        by_name = {name: whitening.get(name) for name in names}
    else:
        by_name = dict.fromkeys(names, whitening)
    for name in names:
        check_is_foldable(name, configs[name], given.get(name))
    return by_name


def _check_overrides(
    cfg: MultiSAETrainingRunnerConfig, saes: Mapping[str, TrainingSAE[Any]]
) -> None:
    seen: dict[int, str] = {}
    for name, sae in saes.items():
        other = seen.setdefault(id(sae), name)
        if other != name:
            raise ValueError(f"override_saes: {other} and {name} are the same object")
        in_config = cfg.saes.get(name, sae.cfg)
        if sae.cfg.d_in != in_config.d_in:
            raise ValueError(
                f"override_saes: {name} is of width {sae.cfg.d_in}, and of {in_config.d_in} "
                "in the config"
            )
        if sae.cfg.normalize_activations != in_config.normalize_activations:
            raise ValueError(
                f"override_saes: {name} has "
                f"normalize_activations={sae.cfg.normalize_activations!r}, and "
                f"{in_config.normalize_activations!r} in the config: set both alike. A finished "
                "SAE is continued under whitening by WhiteningTrainingRunner, with "
                "from_pretrained_path"
            )


def _copied(cfg: MultiSAETrainingRunnerConfig) -> MultiSAETrainingRunnerConfig:
    """A copy, with a config of its own for every SAE, and with the evaluator that was given."""
    copied = copy.deepcopy(cfg, {id(cfg.evaluator): cfg.evaluator})
    # otherwise one object might still be shared by several names
    copied.saes = {name: copy.deepcopy(sae) for name, sae in cfg.saes.items()}
    return copied
