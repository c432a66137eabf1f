"""SAELens' trainer, for training under whitening; it returns a folded SAE."""

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.saes.sae import (
    T_TRAINING_SAE,
    T_TRAINING_SAE_CONFIG,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepOutput,
)
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import Evaluator, SAETrainer
from sae_lens.training.types import DataProvider
from sae_lens.util import path_or_tmp_dir
from safetensors.torch import save_file
from torch import Tensor

from sae_whiten._dtypes import float32_at_least
from sae_whiten._redaction import redact_attributes
from sae_whiten.architectures.description import describe
from sae_whiten.architectures.folding import FoldError, fold_whitening_into_weights
from sae_whiten.config import WhiteningConfig
from sae_whiten.estimation.folders import STATISTICS_FILENAME
from sae_whiten.estimation.provenance import load_statistics, provenance_of
from sae_whiten.estimation.stopping import flatten_heads
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.training.checkpoint import (
    TRAINING_STATE_DIR,
    check_checkpoint,
    check_settings,
    check_trainer_state,
    inference_form,
    read_progress,
    read_training_weights,
    save_progress,
    save_training_form,
    save_training_weights,
    settings_of,
    writing_checkpoint,
)
from sae_whiten.training.data_parallel import (
    SharedStream,
    figures_of_all,
    open_stream,
    output_of_all,
    share_training,
    shared_step,
)
from sae_whiten.training.interruption import going_on_without_checkpoint, interruptible
from sae_whiten.training.pretrained import unfold_for_training
from sae_whiten.training.scaler import CovarianceWhiteningScaler, max_batches
from sae_whiten.training.stream import ActivationStream
from sae_whiten.training.training_sae import (
    enter_whitened_space,
    forget_basis,
    is_in_whitened_space,
    leave_whitened_space,
    plain_copy,
    require_basis,
    set_whitening,
)
from sae_whiten.whitening import TRANSFORM_FIELDS, Whitening

__all__ = ["WhiteningTrainer", "after_step", "forget_unknown_dead", "losses_are_due"]

logger = logging.getLogger(__name__)

_FOLDED = "the SAE is trained and folded already"
_KEEP_RESUMABLE = "save_final_checkpoint=True writes a checkpoint that can be"
_N_CHECK = 512  # activations to prove the fold on
_OF_THE_TRAINING = (*TRANSFORM_FIELDS, "loss_space", "sparsity_norms")
_FAR_FROM_ONE = 4.0  # heavy tails explain less


class WhiteningTrainer(SAETrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """An `SAETrainer` that whitens activations, trains, and returns a plain, folded SAE.

    The whitening is estimated from the first batches of the data provider, which are then trained
    on like all others. During training the SAE object has a subclass of its class, which saves
    folded copies and computes reconstruction losses in the configured space. Afterwards it has its
    own class again and is folded; the fold is proved on the next activations, which are held out
    unless the data provider repeats its batches.

    Examples:
        >>> import itertools
        >>> from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        >>> x = torch.randn(4000, 8) * torch.arange(1.0, 9.0) + 5
        >>> sae = TopKTrainingSAE(
        ...     TopKTrainingSAEConfig(
        ...         d_in=8, d_sae=32, k=4, normalize_activations="covariance_whitening"
        ...     )
        ... )
        >>> cfg = SAETrainerConfig(total_training_samples=2000, train_batch_size_samples=500)
        >>> trainer = WhiteningTrainer(cfg, sae, itertools.cycle(x.split(500)))
        >>> sae = trainer.fit()
        >>> sae.cfg.normalize_activations, trainer.whitening.d_in
        ('none', 8)

    Args:
        cfg: SAELens' trainer config.
        sae: Any stock training SAE with `normalize_activations="covariance_whitening"` in its
            config, which is copied, never changed.
        data_provider: An iterator of activations, shape (n, d_in) or (n, n_heads, d_head), such as
            a generator; or a stream. If it mixes tokens of the same texts into many batches, set
            `WhiteningConfig.n_samples` or `statistics`: two halves of the batches then agree before
            the whitening is accurate. (The runners estimate from what enters their buffer.)
        whitening: How to whiten; the default configuration if None.
        evaluator: As for `SAETrainer`.
        save_checkpoint_fn: As for `SAETrainer`; called while the directory is being written.
        start_from_folded: Continue training an SAE with `normalize_activations="none"` under
            whitening: it is converted to whitened coordinates before the first step.
        train_as: With `start_from_folded`: a config with the dtype and the ranking by decoder norms
            to train with, which folding removed from the SAE.

    Attributes:
        whitening: The whitening, once it is estimated or loaded. (`scaler.whitening` is None again
            after `fit()`, as in SAELens: the SAE does the whitening then.)
        scaler: What evaluators need; its `statistics`, if this trainer estimated them.
        stream: The data provider, as training sees it.

    Raises:
        TypeError: `data_provider` is not an iterator.
        ValueError: The SAE's config does not ask for whitening, or its architecture does not
            support `whitening.sparsity_norms`.
        FoldError: No whitening can be folded into this architecture.
    """

    _prefix = ""
    """Before every line in the log. One of several SAEs has its name there."""

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: T_TRAINING_SAE,
        data_provider: DataProvider,
        whitening: WhiteningConfig | None = None,
        evaluator: Evaluator[T_TRAINING_SAE] | None = None,
        save_checkpoint_fn: Callable[..., None] | None = None,
        start_from_folded: bool = False,
        train_as: TrainingSAEConfig | None = None,
    ) -> None:
        _require_iterator(data_provider)
        expected = "none" if start_from_folded else "covariance_whitening"
        if sae.cfg.normalize_activations != expected:
            raise ValueError(
                f"the SAE's config has normalize_activations={sae.cfg.normalize_activations!r}; "
                f"WhiteningTrainer needs {expected!r}. To train without whitening, use SAELens' "
                "own trainer."
            )
        if cfg.lr_end is None:
            # as SAELens' runner has it; its trainer asserts that somebody has set it
            cfg = replace(cfg, lr_end=cfg.lr / 10)
        if start_from_folded and whitening is not None:
            _require_norms_to_rank_by(train_as or sae.cfg, whitening)
        enter_whitened_space(sae, whitening)
        sae.cfg = copy.deepcopy(sae.cfg)
        redact_attributes(sae.cfg.metadata)  # which every file of the SAE holds
        super().__init__(cfg, sae, data_provider, self._evaluate, save_checkpoint_fn)
        _fuse(self.optimizer, cfg.device)
        self._given_evaluator = evaluator
        self.whitening: Whitening | None = None
        self._given_config = whitening
        self._start_from_folded, self._train_as = start_from_folded, train_as
        self._before_fold: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._explained_variance: float | None = None
        self._l0: float | None = None
        self._end_sharing: Callable[[], None] | None = None
        # the same objects under SAELens' names
        self.activation_scaler = self.scaler = CovarianceWhiteningScaler(whitening)
        if not isinstance(data_provider, ActivationStream):
            data_provider = open_stream(
                data_provider,
                sae.cfg.d_in,
                self.scaler.config.on_nonfinite,
                n_wanted=cfg.total_training_steps,
            )
        self.data_provider = self.stream = data_provider
        self.stream.spool.use_folder(self.scaler.config.temporary_folder)

    @property
    def is_prepared(self) -> bool:
        """Whether there is a whitening, so that a checkpoint can be saved."""
        return self.whitening is not None

    @property
    def is_trained(self) -> bool:
        """Whether training is done and the SAE is folded."""
        return not is_in_whitened_space(self.sae)

    def fit(self) -> T_TRAINING_SAE:
        """Estimate the whitening if there is none, train, fold, prove the fold.

        If `cfg.checkpoint_path` is set, Ctrl-C and SIGTERM end training after the current step,
        with a checkpoint that `load_trainer_state` continues from.

        Returns:
            The given SAE, folded: `normalize_activations="none"`, at least float32.
            `cfg.metadata.whitening` records how it was whitened and how exact the fold is.

        Raises:
            ValueError: The SAE is trained and folded already, the data ended too early, or an
                activation is not finite.
            FoldError: The folded SAE differs from the one that was trained by more than rounding
                explains. Both are then on disk, at the path that the message names.
            KeyboardInterrupt: After Ctrl-C, once the checkpoint is saved.
            SystemExit: After SIGTERM, once the checkpoint is saved; its code is 143.
        """
        if self.is_trained:
            raise ValueError(
                "this SAE is trained and folded already; unfold it with "
                "unfold_whitening_from_weights and make a new trainer to go on"
            )
        if self.cfg.checkpoint_path is None or self.stream.stop_is_handled:
            return self._fit()
        with interruptible(self, "load_trainer_state('{}')"):
            return self._fit()

    def _fit(self) -> T_TRAINING_SAE:
        self.sae.to(self.cfg.device)
        self.estimate_whitening()
        sae = super().fit()
        self.forget_weights_before_fold()
        return sae

    def forget_weights_before_fold(self) -> None:
        """Free what only the final checkpoint needs."""
        self._before_fold = None

    def estimate_whitening(self) -> None:
        """Estimate the whitening from the next batches, unless it is known or the config names
        statistics to derive it from.

        Raises:
            ValueError: The statistics given are of another model, hook, dataset...
        """
        config = self.scaler.config
        if self.scaler.whitening is None and config.statistics is not None:
            statistics = load_statistics(
                config.statistics, self.sae.cfg, config.allow_other_statistics
            )
            self.scaler.whitening = Whitening.from_statistics(statistics, config)
            self.scaler.statistics = statistics
        if self.scaler.whitening is None:
            require_basis(self.sae, None)
            self.scaler.estimate_whitening(
                d_in=self.sae.cfg.d_in,
                data_provider=self.stream.lookahead(),
                n_batches_for_norm_estimate=(
                    self.stream.n_lookahead(max_batches(self.cfg))
                    if config.n_samples is None
                    else None
                ),
                resolution=self.stream.resolution,
            )
            assert self.scaler.statistics is not None
            self.scaler.statistics.provenance.update(provenance_of(self.sae.cfg))
        self._use_whitening()

    def _use_whitening(self) -> None:
        self.whitening = whitening = self.scaler.whitening
        assert whitening is not None
        if whitening.d_in != self.sae.cfg.d_in:
            raise ValueError(
                f"the whitening is of width {whitening.d_in}, the SAE of width {self.sae.cfg.d_in}"
            )
        if self._given_config is not None:
            # the scaler's whitening may have been set by the caller
            whitening = whitening.with_config(
                replace(
                    whitening.config,
                    **{name: getattr(self._given_config, name) for name in _OF_THE_TRAINING},
                )
            )
            self.whitening = self.scaler.whitening = whitening
        if self._start_from_folded and self.n_training_steps == 0:
            unfold_for_training(self.sae, whitening, self._train_as)
        self._start_from_folded = False
        set_whitening(self.sae, whitening, trainer=self)
        self._warn_of_the_unit(whitening)
        if isinstance(self.stream, SharedStream):
            self._share_no_more()
            self._end_sharing = share_training(self.sae, self.stream)

    def _share_no_more(self) -> None:
        if self._end_sharing is not None:
            self._end_sharing()
            self._end_sharing = None

    def _warn_of_the_unit(self, whitening: Whitening) -> None:
        """With strength below 1, whitened activations keep a part of the activations' unit."""
        size, cfg = whitening.root_mean_square, self.sae.cfg
        coefficients = [name for name in describe(self.sae).scaled_fields if hasattr(cfg, name)]
        if coefficients and not 1 / _FAR_FROM_ONE < size < _FAR_FROM_ONE:
            logger.warning(
                "%swith strength=%g whitened activations have a root mean square of %.2g, not 1, "
                "and %s acts on latents of that size. sae-whiten compare rescales it; elsewhere, "
                "find it by a sweep at this hook",
                self._prefix,
                whitening.strength,
                size,
                " and ".join(coefficients),
            )

    def step(self, batch: Tensor) -> TrainStepOutput:
        """SAELens' training step; with several processes, on all parts of the batch.

        Estimates the whitening first if there is none: an SAE trained on raw activations until then
        would have learned in another space.
        """
        if self.whitening is None:
            self.estimate_whitening()
        if self.n_training_steps == 0:
            self._check_first_batch(batch)
        if isinstance(self.stream, SharedStream):
            output = shared_step(self, self.stream, super().step, batch)
        else:
            output = super().step(batch)
        # SAELens counts train_batch_size_samples, whatever the batch has
        self.n_frac_active_samples += self._n_rows(batch) - self.cfg.train_batch_size_samples
        return output

    def _n_rows(self, batch: Tensor) -> int:
        """Rows of a batch, of all processes."""
        return self.stream.n_rows if isinstance(self.stream, SharedStream) else len(batch)

    def _check_first_batch(self, batch: Tensor) -> None:
        """Warn of batches of another size than planned, and of a whitening of other activations."""
        planned, n_rows = self.cfg.train_batch_size_samples, self._n_rows(batch)
        if n_rows != planned and self.stream.n_skipped == 0:
            logger.warning(
                "%sthe data provider yields batches of %d activations, and "
                "train_batch_size_samples is %d: there will be more or fewer steps than schedules "
                "and checkpoints count on",
                self._prefix,
                n_rows,
                planned,
            )
        whitening = self.whitening
        assert whitening is not None
        rows = whitening.whiten(float32_at_least(flatten_heads(batch, whitening.d_in)))
        size = rows.square().mean().sqrt().item() / whitening.root_mean_square
        if not 1 / _FAR_FROM_ONE < size < _FAR_FROM_ONE:
            logger.warning(
                "%sthe first batch has %.2g times the size that the whitening expects of whitened "
                "activations: its statistics seem to be of other activations (another model, "
                "checkpoint or hook?)",
                self._prefix,
                size,
            )

    def fold(self) -> None:
        """Fold and prove the fold; called by SAELens' `fit` once the training loop is done."""
        whitening = self.whitening
        assert whitening is not None
        self._share_no_more()
        if self.cfg.save_final_checkpoint:
            # the final checkpoint can be resumed too, and that needs the unfolded weights
            weights = {name: value.clone() for name, value in self.sae.state_dict().items()}
            self._before_fold = weights, self.sae.cfg.to_dict()
        activations, source = self._activations_to_prove_on()
        # every process must come to the same result for the fold
        activations, source = self.stream.processes.from_first(
            (None if activations is None else activations[:_N_CHECK], source)
        )
        try:
            report = fold_whitening_into_weights(
                self.sae, whitening, activations=activations, source=source
            )
        except FoldError as error:
            problem, kept = str(error).rstrip("."), self._keep_both_forms()
            raise FoldError(f"{problem}. Both forms are in {kept}") from error
        except Exception:
            kept = self._keep_both_forms()
            logger.error("%sfolding failed; what was trained is in %s", self._prefix, kept)
            raise
        leave_whitened_space(self.sae)
        if activations is not None:
            self._explained_variance, self._l0 = _quality(self.sae, activations)
        if report.check is None:
            logger.warning(
                "%sthe fold could not be checked: there are no activations", self._prefix
            )
        else:
            logger.info(
                "%swhitening folded into the weights: error %.1e (tolerance %.1e), %.3f%% of "
                "active latents changed, on %d %s activations",
                self._prefix,
                report.check.fold_error,
                report.check.tolerance,
                100 * report.check.active_set_change,
                report.check.n_activations,
                source,
            )

    @torch.no_grad()
    def set_final_sae_metadata(self) -> None:
        """Record what SAELens records if it is known, the number of activations trained on and the
        explained variance; log them."""
        super().set_final_sae_metadata()
        metadata = self.sae.cfg.metadata
        forget_unknown_dead(self)
        metadata.n_training_samples = self.n_training_samples
        metadata.explained_variance = self._explained_variance
        if self._l0 is not None and metadata.l0 is not None:
            logger.info(
                "%sL0 %.1f in training; as saved, with a threshold, %.1f",
                self._prefix,
                metadata.l0,
                self._l0,
            )
            metadata.l0 = self._l0
        if self._explained_variance is not None and metadata.l0 is not None:
            n_dead = metadata.num_dead_features
            dead = (
                f"dead latents not known (no more steps than dead_feature_window="
                f"{self.cfg.dead_feature_window}; sae-whiten evaluate counts them)"
                if n_dead is None
                else f"{n_dead} of {self.sae.cfg.d_sae} latents dead"
            )
            logger.info(
                "%strained: explained variance %.3f, L0 %.1f, %s",
                self._prefix,
                self._explained_variance,
                metadata.l0,
                dead,
            )

    def _activations_to_prove_on(self) -> tuple[Tensor | None, str]:
        """Activations to prove the fold on, if there are any, and where they come from."""
        return self.stream.held_out_or_last()

    def _failed_fold_path(self) -> Path:
        base = self.cfg.checkpoint_path or tempfile.mkdtemp(prefix="sae_whiten_")
        return Path(base) / f"failed_fold_{self.n_training_samples}"

    def _keep_both_forms(self) -> Path:
        path = self._failed_fold_path()
        try:
            self.save_checkpoint(path.name, base_path=path.parent)
        except Exception:  # for example, weights that are not finite have no folded form
            self.save_trainer_state(path)
        return path

    def _evaluate(
        self, sae: T_TRAINING_SAE, data_provider: DataProvider, activation_scaler: Any
    ) -> dict[str, Any]:
        """Evaluate a folded copy: evaluators expect a decoder in the space of the activations."""
        if self._given_evaluator is None or self.whitening is None:
            return {}
        plain = plain_copy(sae, self.whitening)
        # a stop in the middle of a step could not be resumed
        with self.stream.uninterrupted():
            return self._given_evaluator(plain, data_provider, CovarianceWhiteningScaler())

    def build_train_step_log_dict(
        self, output: TrainStepOutput, n_training_samples: int
    ) -> dict[str, Any]:
        """SAELens' figures, with explained variance in the space of the activations; with several
        processes, over all parts of the batch."""
        output = copy.copy(output)
        output.sae_in = self.scaler.unscale(float32_at_least(output.sae_in))
        output.sae_out = self.scaler.unscale(float32_at_least(output.sae_out))
        if not isinstance(self.stream, SharedStream):
            return super().build_train_step_log_dict(output, n_training_samples)
        figures = super().build_train_step_log_dict(
            output_of_all(output, self.stream.processes), n_training_samples
        )
        return figures_of_all(figures, self.stream)

    def _update_pbar(
        self, step_output: TrainStepOutput, pbar: Any, update_interval: int = 100
    ) -> None:
        if losses_are_due(self, pbar, update_interval):
            super()._update_pbar(step_output, pbar, update_interval=1)

    def maybe_reset_sparsity(self) -> dict[str, Any]:
        """As in SAELens; a window that was reset before a checkpoint is not reported again."""
        return super().maybe_reset_sparsity() if self.n_frac_active_samples > 0 else {}

    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """Save a checkpoint, whole or not at all. `sae_whiten.training.checkpoint` lists its files.

        The directory is a plain SAE with its training config, like SAELens' checkpoints; the state
        for resuming, in whitened coordinates, is in a folder inside it. After `fit` it is only the
        plain SAE.

        Raises:
            FoldError: There is no whitening yet.
        """
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        if base is None and not self.cfg.logger.log_to_wandb:
            if self.save_checkpoint_fn is not None:
                self.save_checkpoint_fn(checkpoint_path=None)
            return
        with path_or_tmp_dir(base) as root:
            path = root / checkpoint_name
            processes = self.stream.processes
            is_folded = self._before_fold is None and self.is_trained
            # there is none where a window of feature_sampling_window steps has just begun
            has_sparsity = self.n_frac_active_samples > 0
            if is_folded:
                logger.warning("%s: %s cannot be resumed. %s", _FOLDED, path, _KEEP_RESUMABLE)
            with writing_checkpoint(path, processes) as partial:
                if processes.rank == 0:
                    save_training_form(self._plain_sae(), partial)
                    if has_sparsity:
                        sparsity = partial / SPARSITY_FILENAME
                        save_file({"sparsity": self.log_feature_sparsity}, sparsity)
                    if not is_folded:
                        self.save_trainer_state(partial)
                elif not is_folded:
                    self._save_progress(partial)
                if self.save_checkpoint_fn is not None:
                    self.save_checkpoint_fn(checkpoint_path=partial if base is not None else None)
            if processes.rank > 0:
                return
            self._report_checkpoint(path)
            if self.cfg.logger.log_to_wandb:
                self.cfg.logger.log(
                    self,
                    path / SAE_WEIGHTS_FILENAME,
                    path / SAE_CFG_FILENAME,
                    sparsity_path=path / SPARSITY_FILENAME if has_sparsity else None,
                    wandb_aliases=wandb_aliases,
                )

    def _report_checkpoint(self, path: Path) -> None:
        logger.info("checkpoint saved: %s", path)

    def _plain_sae(self) -> TrainingSAE[Any]:
        """The SAE as it is for raw activations."""
        if self.sae.cfg.normalize_activations == "none":
            return self.sae
        if self.whitening is None:
            raise FoldError("cannot save this SAE: its whitening has not been estimated yet")
        return plain_copy(self.sae, self.whitening)

    def save_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Write the state for resuming into a folder of `checkpoint_path`: weights and whitening,
        optimizer, schedules, counters and random generators.

        Raises:
            ValueError: There is no whitening yet, or the SAE is folded already.
        """
        directory = Path(checkpoint_path) / TRAINING_STATE_DIR
        scaler = self.scaler
        whitening = scaler.whitening if self.whitening is None else self.whitening
        if whitening is None:
            raise ValueError(
                "there is no whitening yet, so there is no training to resume: call "
                "estimate_whitening() first"
            )
        if self._before_fold is None and self.is_trained:
            raise ValueError(f"{_FOLDED}: its training cannot be resumed. {_KEEP_RESUMABLE}")
        in_use, scaler.whitening = scaler.whitening, whitening
        try:
            super().save_trainer_state(directory)
        finally:
            scaler.whitening = in_use
        weights, cfg = self._before_fold or (self.sae.state_dict(), self.sae.cfg.to_dict())
        save_training_weights(checkpoint_path, weights, cfg, whitening)
        if scaler.statistics is not None:
            scaler.statistics.save(directory / STATISTICS_FILENAME)
        self._save_progress(checkpoint_path)

    def _save_progress(self, checkpoint_path: Path | str) -> None:
        fields = {
            "n_processes": self.stream.processes.world_size,
            "n_served": self.stream.n_served,
            "n_ahead": self.stream.n_ahead,
            "n_skipped": self.stream.n_skipped,
            "settings": settings_of(asdict(self.cfg)),
        }
        save_progress(checkpoint_path, fields)

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Continue from a checkpoint: trainer, SAE and whitening. The data provider has to start at
        the batch with index `stream.n_served`.

        Raises:
            FileNotFoundError: The directory is not a checkpoint of this package, or a file of it,
                such as the whitening, is missing.
            CorruptFileError: A file is truncated, was changed, or is of another kind.
            ValueError: The checkpoint was trained under another whitening configuration, with
                other settings of the trainer, or is of another SAE.
        """
        check_checkpoint(checkpoint_path)
        directory = Path(checkpoint_path) / TRAINING_STATE_DIR
        if not directory.is_dir():
            raise FileNotFoundError(
                f"{checkpoint_path} holds no {TRAINING_STATE_DIR}/: it is not a checkpoint of "
                "WhiteningTrainer. (To continue training a folded SAE: from_pretrained_path. "
                "Checkpoints of SAELens' own trainer cannot be resumed here.)"
            )
        # everything is read and checked before anything is changed
        generators, fields = read_progress(checkpoint_path, self.stream.processes)
        # earlier releases saved no settings
        check_settings(checkpoint_path, fields.get("settings", {}), asdict(self.cfg))
        saved = CovarianceWhiteningScaler()
        saved.load(directory / ACTIVATION_SCALER_CFG_FILENAME)
        if saved.whitening is None:
            raise FileNotFoundError(f"{directory} holds no whitening to continue under")
        config = self._config_to_resume_with(saved.config, checkpoint_path)
        statistics = directory / STATISTICS_FILENAME
        if statistics.is_file():
            saved.statistics = ActivationStatistics.load(statistics)
        cfg, unfolded = self.sae.cfg, None
        if self._start_from_folded:
            # the weights in the checkpoint are those of an unfolded SAE
            unfolded = copy.deepcopy(self.sae)
            unfold_for_training(unfolded, saved.whitening, self._train_as)
            cfg = unfolded.cfg
        weights = read_training_weights(checkpoint_path, cfg, saved.whitening)
        check_trainer_state(directory)

        if unfolded is not None:
            unfold_for_training(self.sae, saved.whitening, self._train_as)
        # the optimizer's state goes to where the parameters are
        self.sae.to(self.cfg.device)
        super().load_trainer_state(directory)
        self.sae.load_state_dict(weights)
        forget_basis(self.sae)
        self.scaler.config, self.scaler.statistics = config, saved.statistics
        self.whitening = self.scaler.whitening
        self._start_from_folded = False
        self.stream.n_served = int(fields["n_served"])
        self.stream.n_skipped = int(fields["n_skipped"])
        self.stream.n_to_read_ahead = int(fields.get("n_ahead", 0))
        self.stream.on_nonfinite = config.on_nonfinite
        self.checkpoint_thresholds = [
            t for t in self.checkpoint_thresholds if t >= self.n_training_samples
        ]
        torch.set_rng_state(generators["cpu"])
        if "cuda" in generators and torch.cuda.is_available():
            states = list(generators["cuda"])  # of as many devices as there were
            torch.cuda.set_rng_state_all(states[: torch.cuda.device_count()])

    def _config_to_resume_with(
        self, saved: WhiteningConfig, checkpoint_path: Path | str
    ) -> WhiteningConfig:
        given = self._given_config
        if given is None:
            return saved
        # the weights depend on every other field
        saved = replace(saved, on_nonfinite=given.on_nonfinite)
        if given != saved:
            old, new = saved.to_dict(), given.to_dict()
            names = [f"{k}={old[k]!r} (now {new[k]!r})" for k in new if old[k] != new[k]]
            raise ValueError(
                f"{checkpoint_path} was trained with {', '.join(names)}: resume with the same "
                "WhiteningConfig, or with none"
            )
        return given

    def _checkpoint_if_needed(self) -> None:
        with after_step(self), going_on_without_checkpoint(self):
            super()._checkpoint_if_needed()


def _require_iterator(data_provider: object) -> None:
    """Refuse what yields no batches, such as all activations in one tensor.

    Raises:
        TypeError: It is not an iterator. The message says how to make one of it.
    """
    if hasattr(data_provider, "__next__"):
        return
    remedy = "iter(...) of it" if hasattr(data_provider, "__iter__") else "one"
    if isinstance(data_provider, Tensor):
        remedy = "iter(x.split(batch_size)), or a generator if training needs more"
    raise TypeError(
        "data_provider must be an iterator that yields batches of activations, shape "
        f"(n, d_in); got {type(data_provider).__name__}: pass {remedy}"
    )


def _require_norms_to_rank_by(cfg: TrainingSAEConfig, whitening: WhiteningConfig) -> None:
    """Refuse to rank latents of an SAE that is unfolded first by norms in the original space.

    Raises:
        ValueError: The SAE ranks latents by decoder norms, and `whitening` asks for these norms.
    """
    ranks_by_norm = getattr(cfg, "rescale_acts_by_decoder_norm", False)
    if ranks_by_norm and whitening.sparsity_norms == "original":
        raise ValueError(
            "WhiteningConfig.sparsity_norms='original' cannot be used with start_from_folded "
            f"for {cfg.architecture()}: unfolding moves its decoder norms into the "
            "encoder, and none are left to rank by"
        )


@contextmanager
def after_step(*trainers: SAETrainer[Any, Any] | MultiSAETrainer) -> Iterator[None]:
    """Count the step just done. SAELens' `fit` counts it after it saves the checkpoint."""
    for trainer in trainers:
        trainer.n_training_steps += 1
    try:
        yield
    finally:
        for trainer in trainers:
            trainer.n_training_steps -= 1


def forget_unknown_dead(trainer: SAETrainer[Any, Any]) -> None:
    """Leave the number of dead latents out of an SAE's metadata if none could count as dead yet.

    SAELens counts 0 of them then.
    """
    if trainer.n_training_steps <= trainer.cfg.dead_feature_window:
        vars(trainer.sae.cfg.metadata).pop("num_dead_features", None)


def losses_are_due(trainer: Any, pbar: Any, update_interval: int) -> bool:
    """Whether SAELens is to show the losses and to count this step; if not, count it here.

    SAELens counts a hundred steps at a time: its bar stays at 0 in shorter runs, and counts from 0
    in resumed ones. Losses are shown that often too, but at least ten times in a run.
    """
    batch_size = trainer.cfg.train_batch_size_samples
    pbar.update(trainer.n_training_samples - batch_size - pbar.n)
    interval = max(min(update_interval, trainer.cfg.total_training_steps // 10), 1)
    due = trainer.n_training_steps % interval == 0
    if not due:
        pbar.update(batch_size)
    return due


def _fuse(optimizer: torch.optim.Adam, device: str) -> None:
    """Let Adam take its step in one pass over the parameters, if torch can do that."""
    if torch.device(device).type in ("cpu", "cuda"):
        for group in optimizer.param_groups:
            group["fused"] = True


@torch.no_grad()
def _quality(
    sae: TrainingSAE[Any], activations: Float[Tensor, "n d_in"]
) -> tuple[float | None, float | None]:
    """Share of the variance of activations that a plain SAE explains in the form that is saved for
    inference; and its L0 there, if that form is of another architecture."""
    activations = float32_at_least(activations.to(sae.device))
    saved, l0 = inference_form(sae), None
    saved.turn_off_forward_pass_hook_z_reshaping()  # the activations are flat already
    latents = saved.encode(activations)
    if saved is not sae:
        l0 = (latents != 0).sum(dim=-1).float().mean().item()
    error = (saved.decode(latents) - activations).square().sum().item()
    total = (activations - activations.mean(dim=0)).square().sum().item()
    return (None if total == 0 else 1 - error / total), l0
