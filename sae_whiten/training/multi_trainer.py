"""SAELens' trainer of several SAEs, some or all of them under whitening."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.training.types import MultiHookDataProvider
from sae_lens.util import path_or_tmp_dir
from torch import Tensor
from tqdm.auto import tqdm

from sae_whiten._files import read_json
from sae_whiten.config import WhiteningConfig
from sae_whiten.estimation.provenance import load_statistics, provenance_of
from sae_whiten.estimation.stopping import Requirement, estimate_statistics, naming
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.training.checkpoint import (
    TRAINING_STATE_DIR,
    check_checkpoint,
    check_settings,
    check_trainer_state,
    writing_checkpoint,
)
from sae_whiten.training.data_parallel import (
    SharedStream,
    figures_of_all,
    output_of_all,
    share_training,
    shared_step,
)
from sae_whiten.training.interruption import going_on_without_checkpoint
from sae_whiten.training.scaler import CovarianceWhiteningScaler, max_batches
from sae_whiten.training.stream import ActivationStream
from sae_whiten.training.trainer import (
    WhiteningTrainer,
    after_step,
    forget_unknown_dead,
    losses_are_due,
)
from sae_whiten.training.training_sae import is_in_whitened_space, plain_copy, require_basis
from sae_whiten.whitening import TRANSFORM_FIELDS, Whitening

__all__ = ["WhiteningMultiSAETrainer"]

logger = logging.getLogger(__name__)


class WhiteningMultiSAETrainer(MultiSAETrainer):
    """A `MultiSAETrainer` in which some SAEs, or all, are trained by a `WhiteningTrainer`.

    Statistics are estimated in one pass for all hooks, from the first batches of the stream, which
    are then trained on. SAEs at one hook share them, and those that are whitened in the same way
    share the whitening.

    Args:
        cfg: SAELens' trainer config.
        saes: Training SAEs by name. Those in `whitening` have
            `normalize_activations="covariance_whitening"`, the others are trained as in SAELens.
        hook_names: The hook of every SAE.
        stream: Yields activations of shape (n, sum of the widths of all hooks).
        split: Takes such a batch apart into activations by hook.
        whitening: How to whiten, by name of the whitened SAEs. None: the configuration of the
            checkpoint that is resumed, or else the default.
        evaluator: As for `MultiSAETrainer`; sees plain SAEs.
        save_checkpoint_fn: As for `MultiSAETrainer`; called while the directory is being written.

    Attributes:
        failures: Why folding failed, by the names of the SAEs concerned.
    """

    def __init__(
        self,
        cfg: SAETrainerConfig,
        saes: Mapping[str, TrainingSAE[Any]],
        hook_names: Mapping[str, str],
        stream: ActivationStream,
        split: Callable[[Tensor], dict[str, Tensor]],
        whitening: Mapping[str, WhiteningConfig | None],
        evaluator: Callable[..., dict[str, Any]] | None = None,
        save_checkpoint_fn: Callable[..., None] | None = None,
    ) -> None:
        super().__init__(
            cfg=cfg,
            saes=dict(saes),
            hook_names=dict(hook_names),
            data_provider=map(split, stream),
            evaluator=None if evaluator is None else self._evaluate,
            save_checkpoint_fn=save_checkpoint_fn,
        )
        self.stream, self.split = stream, split
        self.whitened: dict[str, WhiteningTrainer[Any, Any]] = {
            name: _OneOfSeveral(self, name, config) for name, config in whitening.items()
        }
        self.trainers.update(self.whitened)
        if isinstance(stream, SharedStream):
            plain = [name for name in self.saes if name not in self.whitened]
            self.trainers.update({name: _PlainOfSeveral(self, name, stream) for name in plain})
        self.failures: dict[str, Exception] = {}
        self.is_prepared = False
        self._given_evaluator = evaluator
        self._held_out: tuple[dict[str, Tensor] | None, str] | None = None
        self._agree_on_nonfinite()

    @property
    def whitenings(self) -> dict[str, Whitening]:
        """Whitenings by the name of the SAE, once they are estimated or loaded."""
        return {
            name: trainer.whitening
            for name, trainer in self.whitened.items()
            if trainer.whitening is not None
        }

    @property
    def statistics(self) -> dict[str, ActivationStatistics]:
        """What the whitenings were derived from, by the name of the SAE."""
        return {
            name: trainer.scaler.statistics
            for name, trainer in self.whitened.items()
            if trainer.scaler.statistics is not None
        }

    @property
    def is_trained(self) -> bool:
        """Whether training is done and all SAEs are folded, except those whose fold failed."""
        is_done = self.n_training_samples >= self.cfg.total_training_samples
        waiting = (name for name in self.whitened if is_in_whitened_space(self.saes[name]))
        return is_done and set(waiting) <= self.failures.keys()

    def fit(self) -> dict[str, TrainingSAE[Any]]:
        """Estimate missing whitenings, train, fold, prove the folds.

        Returns:
            The given SAEs, those trained under whitening folded. If folding one failed, the others
            are returned too; `failures` says which failed and where it is kept.

        Raises:
            ValueError: The data ended too early, or an activation is not finite.
        """
        self.estimate_whitenings()
        plain = [sae for name, sae in self.saes.items() if name not in self.whitened]
        shared = []
        if isinstance(self.stream, SharedStream):
            shared = [share_training(sae, self.stream) for sae in plain]
        try:
            saes = super().fit()
        finally:
            for end_sharing in shared:
                end_sharing()
        self._held_out = None
        for trainer in self.whitened.values():
            trainer.forget_weights_before_fold()
        for trainer in self.trainers.values():  # also of those without whitening
            trainer.sae.cfg.metadata.n_training_samples = trainer.n_training_samples
            forget_unknown_dead(trainer)
        return saes

    def estimate_whitenings(self) -> None:
        """Estimate all missing statistics in one pass, and derive the whitenings.

        Raises:
            ValueError: The given statistics are not of this model, hook, dataset..., the data ended
                too early, or an activation is not finite.
        """
        waiting = {n: t for n, t in self.whitened.items() if t.scaler.whitening is None}
        given = {n: t for n, t in waiting.items() if t.scaler.config.statistics is not None}
        for name in waiting.keys() - given.keys():
            require_basis(self.saes[name], None)
        for name, statistics in self._load_statistics(given).items():
            waiting[name].scaler.statistics = statistics
        estimated = self._estimate_statistics([n for n in waiting if n not in given])
        known: dict[Any, Whitening] = {}
        for name, trainer in waiting.items():
            scaler, hook_name = trainer.scaler, self.hook_names[name]
            if name not in given:
                scaler.statistics = estimated[hook_name]
            assert scaler.statistics is not None
            key = (
                hook_name,
                id(scaler.statistics),
                *(getattr(scaler.config, field) for field in TRANSFORM_FIELDS),
            )
            if key not in known:
                with naming(hook_name):
                    known[key] = Whitening.from_statistics(scaler.statistics, scaler.config)
            scaler.whitening = known[key].with_config(scaler.config)
        for trainer in self.whitened.values():
            trainer.estimate_whitening()  # the whitening exists: this only sets it up

    def _load_statistics(
        self, trainers: Mapping[str, WhiteningTrainer[Any, Any]]
    ) -> dict[str, ActivationStatistics]:
        known: dict[Any, ActivationStatistics] = {}
        loaded = {}
        for name, trainer in trainers.items():
            config = trainer.scaler.config
            assert config.statistics is not None
            key = (self.hook_names[name], config.statistics, config.allow_other_statistics)
            if key not in known:
                known[key] = load_statistics(
                    config.statistics, trainer.sae.cfg, config.allow_other_statistics
                )
            loaded[name] = known[key]
        return loaded

    def _estimate_statistics(self, names: list[str]) -> dict[str, ActivationStatistics]:
        """Statistics by hook, for these SAEs."""
        if not names:
            return {}
        at: dict[str, list[WhiteningTrainer[Any, Any]]] = {}
        for name in names:
            at.setdefault(self.hook_names[name], []).append(self.whitened[name])
        required = {
            hook_name: Requirement.of(
                trainers[0].sae.cfg.d_in,
                [trainer.scaler.config for trainer in trainers],
                self.stream.n_lookahead(max_batches(self.cfg)),
            )
            for hook_name, trainers in at.items()
        }
        statistics = estimate_statistics(
            map(self.split, self.stream.lookahead()), required, resolution=self.stream.resolution
        )
        for hook_name, trainers in at.items():
            statistics[hook_name].provenance.update(provenance_of(trainers[0].sae.cfg))
        return statistics

    @torch.no_grad()
    def _estimate_scaling_factors(self) -> None:
        """SAELens' scaling factors, from the batches that it would use; none is trained on."""
        missing = [
            name
            for name, sae in self.saes.items()
            if sae.cfg.normalize_activations == "expected_average_only_in"
            and self.trainers[name].activation_scaler.scaling_factor is None
        ]
        mean_norms = self._mean_norms({self.hook_names[name] for name in missing})
        for name in missing:
            factor = self.saes[name].cfg.d_in ** 0.5 / mean_norms[self.hook_names[name]]
            self.trainers[name].activation_scaler.scaling_factor = factor
        self.is_prepared = True

    def _mean_norms(self, hook_names: set[str]) -> dict[str, float]:
        if not hook_names:
            return {}
        total, count = dict.fromkeys(hook_names, 0.0), dict.fromkeys(hook_names, 0)
        n_batches = self.cfg.n_batches_for_norm_estimate
        for _ in tqdm(range(n_batches), desc="Estimating norm scaling factors", leave=False):
            batch = next(self.data_provider)
            for name in hook_names:
                norms = batch[name].norm(dim=-1)
                total[name] += norms.float().sum().item()
                count[name] += norms.numel()
        processes = self.stream.processes
        means = {}
        for name in sorted(hook_names):  # the same order in every process
            norm, n = processes.total(total[name], count[name])
            means[name] = norm / n
        return means

    def activations_to_prove_on(self, hook_name: str) -> tuple[Tensor | None, str]:
        """Activations of a hook, the same at every call, and their description."""
        if self._held_out is None:
            activations, source = self.stream.held_out_or_last()
            self._held_out = None if activations is None else self.split(activations), source
        by_hook, source = self._held_out
        return None if by_hook is None else by_hook[hook_name], source

    def _evaluate(
        self,
        saes: dict[str, TrainingSAE[Any]],
        data_provider: MultiHookDataProvider,
        activation_scalers: dict[str, Any],
        hook_names: dict[str, str],
    ) -> dict[str, Any]:
        """Evaluate folded copies: evaluators expect decoders in the space of the activations."""
        assert self._given_evaluator is not None
        plain, scalers = dict(saes), dict(activation_scalers)
        for name, whitening in self.whitenings.items():
            plain[name] = plain_copy(saes[name], whitening)
            scalers[name] = CovarianceWhiteningScaler()
        with self.stream.uninterrupted():
            return self._given_evaluator(plain, data_provider, scalers, hook_names)

    def save_checkpoint(
        self,
        checkpoint_name: str,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """Save a checkpoint, whole or not at all, with a folder for every SAE.

        An SAE whose fold failed is not in it.
        """
        base = self.cfg.checkpoint_path
        if base is None and not self.cfg.logger.log_to_wandb:
            if self.save_checkpoint_fn is not None:
                self.save_checkpoint_fn(checkpoint_path=None)
            return
        with path_or_tmp_dir(base) as root:
            path = root / checkpoint_name
            with writing_checkpoint(path, self.stream.processes) as partial:
                for name, trainer in self.trainers.items():
                    if name not in self.failures:
                        trainer.save_checkpoint(name, partial, wandb_aliases)
                if self.save_checkpoint_fn is not None:
                    self.save_checkpoint_fn(checkpoint_path=partial)
            logger.info("checkpoint saved: %s", path)

    def load_checkpoint(self, path: str | Path) -> None:
        """Continue from a checkpoint: trainers, SAEs and whitenings. The stream has to start at the
        batch with index `stream.n_served`.

        Raises:
            FileNotFoundError: There is no such directory, an SAE is not in it, or a file is
                missing.
            CorruptFileError: A file is truncated, was changed, or is of another kind.
            ValueError: An SAE was trained at another hook, with another normalisation, other
                settings, or under another whitening configuration.
        """
        path = Path(path)
        check_checkpoint(path)
        self._check_belongs(path)
        super().load_checkpoint(path)
        self._share_what_was_loaded()
        self._agree_on_nonfinite()
        self.checkpoint_thresholds = [
            t for t in self.checkpoint_thresholds if t >= self.n_training_samples
        ]

    def _check_belongs(self, path: Path) -> None:
        missing = [name for name in self.saes if not (path / name / SAE_CFG_FILENAME).is_file()]
        if missing:
            present = sorted(p.parent.name for p in path.glob(f"*/{SAE_CFG_FILENAME}"))
            raise FileNotFoundError(
                f"{path} is not a checkpoint of these SAEs: it holds no {', '.join(missing)}; "
                f"it has {', '.join(present) or 'none'}"
            )
        for name, sae in self.saes.items():
            saved = read_json(path / name / SAE_CFG_FILENAME, "resume from another checkpoint")
            for field in ("hook_name", "hook_head_index"):
                was, now = saved["metadata"].get(field), getattr(sae.cfg.metadata, field)
                if was != now:
                    raise ValueError(
                        f"{path}: {name} was trained with {field}={was!r}, not {now!r}"
                    )
            was_whitened = (path / name / TRAINING_STATE_DIR).is_dir()
            was = "covariance_whitening" if was_whitened else saved["normalize_activations"]
            now = "covariance_whitening" if name in self.whitened else sae.cfg.normalize_activations
            if was != now:
                raise ValueError(
                    f"{path}: {name} has normalize_activations={was!r}, and this run asks for "
                    f"{now!r}"
                    + (
                        ". In a final checkpoint the scaling is already folded in: resume an "
                        "earlier one, or set 'none'"
                        if now == "expected_average_only_in" and was == "none"
                        else ""
                    )
                )
            if name not in self.whitened:  # a WhiteningTrainer checks these itself
                check_settings(path / name, saved, sae.cfg.to_dict())
                check_trainer_state(path / name)

    def _share_what_was_loaded(self) -> None:
        """Keep one copy of whitenings and statistics that several SAEs' folders hold."""
        whitenings: dict[Any, Whitening] = {}
        statistics: dict[Any, ActivationStatistics] = {}
        for name, trainer in self.whitened.items():
            assert trainer.whitening is not None
            hook_name, loaded = self.hook_names[name], trainer.scaler.statistics
            own = trainer.whitening
            derived_by = [getattr(own.config, field) for field in TRANSFORM_FIELDS]
            shared = whitenings.setdefault((own.digest, *derived_by), own)
            trainer.scaler.whitening = shared.with_config(own.config)
            trainer.whitening = trainer.scaler.whitening
            if loaded is not None:
                # of one file, or of the first n samples at one hook
                key = (hook_name, trainer.whitening.config.statistics, loaded.n_samples)
                trainer.scaler.statistics = statistics.setdefault(key, loaded)

    def _agree_on_nonfinite(self) -> None:
        """Set `on_nonfinite` of the stream: SAEs share activations, so all need the same value.

        Raises:
            ValueError: They disagree.
        """
        configs = {name: trainer.scaler.config for name, trainer in self.whitened.items()}
        if len({config.on_nonfinite for config in configs.values()}) > 1:
            listed = ", ".join(f"{name}: {c.on_nonfinite!r}" for name, c in configs.items())
            raise ValueError(
                f"SAEs that share their data need the same on_nonfinite, and have {listed}"
            )
        if configs:
            self.stream.on_nonfinite = next(iter(configs.values())).on_nonfinite

    def _checkpoint_if_needed(self) -> None:
        with after_step(self, *self.trainers.values()), going_on_without_checkpoint(self):
            super()._checkpoint_if_needed()

    def _maybe_log_sparsity(self, *args: Any, **kwargs: Any) -> None:
        # (sae-lens 6.53 has no parameter `final`)
        # a window that was reset before a checkpoint is not reported again
        if next(iter(self.trainers.values())).n_frac_active_samples > 0:
            super()._maybe_log_sparsity(*args, **kwargs)

    def _update_pbar(
        self, step_outputs: dict[str, TrainStepOutput], pbar: Any, update_interval: int = 100
    ) -> None:
        if losses_are_due(self, pbar, update_interval):
            super()._update_pbar(step_outputs, pbar, update_interval=1)


class _OneOfSeveral(WhiteningTrainer[TrainingSAE[Any], Any]):
    """The trainer of one SAE, which gets its activations from `owner`."""

    def __init__(
        self, owner: WhiteningMultiSAETrainer, name: str, whitening: WhiteningConfig | None
    ) -> None:
        super().__init__(
            # the owner decides when to save
            cfg=replace(owner.cfg, n_checkpoints=0),
            sae=owner.saes[name],
            data_provider=owner.stream,
            whitening=whitening,
        )
        self._owner, self._name = owner, name
        self._prefix = f"{name}: "

    def fold(self) -> None:
        """Fold and prove the fold; a failure must not cost the other SAEs."""
        try:
            super().fold()
        except Exception as error:
            logger.error("folding %s failed; the others are finished first", self._name)
            self._owner.failures[self._name] = error

    def _activations_to_prove_on(self) -> tuple[Tensor | None, str]:
        return self._owner.activations_to_prove_on(self._owner.hook_names[self._name])

    def _failed_fold_path(self) -> Path:
        return super()._failed_fold_path() / self._name

    def _report_checkpoint(self, path: Path) -> None:
        """Nothing: the path is that of an unfinished checkpoint, which the owner reports."""


class _PlainOfSeveral(SAETrainer[Any, Any]):
    """The trainer of an SAE without whitening, if several processes train together."""

    def __init__(self, owner: WhiteningMultiSAETrainer, name: str, stream: SharedStream) -> None:
        super().__init__(
            # as SAELens' trainer of several SAEs has it for each of them
            cfg=replace(
                owner.cfg, n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False
            ),
            sae=owner.saes[name],
            data_provider=iter(()),
        )
        self._stream = stream

    def step(self, batch: Tensor) -> TrainStepOutput:
        return shared_step(self, self._stream, super().step, batch)

    def build_train_step_log_dict(
        self, output: TrainStepOutput, n_training_samples: int
    ) -> dict[str, Any]:
        figures = super().build_train_step_log_dict(
            output_of_all(output, self._stream.processes), n_training_samples
        )
        return figures_of_all(figures, self._stream)

    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        if self._stream.processes.rank == 0:
            super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)
