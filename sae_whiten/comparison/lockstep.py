"""Train SAEs of a comparison together, on one stream of activations."""

import dataclasses
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from sae_lens import LoggingConfig, MultiSAETrainingRunnerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE

from sae_whiten._contexts import without_messages
from sae_whiten.comparison.conditions import CONDITIONS
from sae_whiten.comparison.data import shuffled
from sae_whiten.comparison.files import checkpoints_folder
from sae_whiten.comparison.plan import Arm, Comparison, arms, sae_config
from sae_whiten.comparison.setting import Setting
from sae_whiten.config import WhiteningConfig
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.training.multi_runner import WhiteningMultiSAETrainingRunner

__all__ = ["train_arms"]

_ESTIMATION_BATCHES = 25  # for the scaling of expected_average_only_in; not trained on


class _LockstepRunner(WhiteningMultiSAETrainingRunner):
    """A runner that needs no whitened SAE: those of the comparison may be trained already."""

    _needs_whitening = False


def train_arms(setting: Setting, untrained: Sequence[Arm], seed: int) -> None:
    """Train SAEs of one seed, or continue from their last checkpoint.

    The result of each does not depend on which others are trained with it.

    Args:
        setting: The comparison that they belong to, its model and its folder.
        untrained: The SAEs to train.
        seed: Seed of the weights, of the order of the rows and of that in which activations are
            mixed.
    """
    comparison, dataset = setting.comparison, shuffled(setting.training_rows, seed)
    activation_statistics = ActivationStatistics.load(setting.statistics)
    saes: dict[str, TrainingSAE[Any]] = {}
    whitening: dict[str, WhiteningConfig] = {}
    for arm in _with_the_same_data(comparison, untrained):
        sae_class, _ = get_sae_training_class(arm.architecture)
        # equal for all conditions of an architecture
        torch.manual_seed(seed)
        saes[arm.name] = sae_class(sae_config(comparison, arm, activation_statistics))
        config = CONDITIONS[arm.condition].whitening
        if config is not None:
            whitening[arm.name] = dataclasses.replace(config, statistics=str(setting.statistics))
    checkpoints = checkpoints_folder(setting.out, seed)
    cfg = _runner_config(setting, saes, dataset, seed)
    cfg.resume_from_checkpoint = _checkpoint_to_resume(checkpoints, saes)
    # the order in which SAELens mixes activations comes from torch's generator
    torch.manual_seed(seed)
    # SAELens warns that the config does not describe them; the comparison's settings do
    with without_messages("sae_lens", "override_dataset overrides", "override_model overrides"):
        runner = _LockstepRunner(
            cfg,
            whitening,
            override_dataset=dataset,
            override_model=setting.model,
            override_saes=saes,
        )
    runner.run()
    shutil.rmtree(checkpoints, ignore_errors=True)  # the SAEs are saved, and checkpoints are large


def _runner_config(
    setting: Setting, saes: Mapping[str, TrainingSAE[Any]], dataset: Any, seed: int
) -> MultiSAETrainingRunnerConfig:
    """SAELens' config of the training of these SAEs on a dataset that is shuffled with the seed."""
    comparison = setting.comparison
    return MultiSAETrainingRunnerConfig(
        saes={name: sae.cfg for name, sae in saes.items()},
        hook_names=comparison.hook_name,
        **setting.model_names,
        dataset_path=setting.dataset_path,
        streaming=isinstance(dataset, datasets.IterableDataset),
        context_size=comparison.context_size,
        prepend_bos=comparison.prepend_bos,
        exclude_special_tokens=comparison.exclude_special_tokens,
        store_batch_size_prompts=comparison.store_batch_size_prompts,
        # four batches to mix
        n_batches_in_buffer=math.ceil(
            4 * comparison.train_batch_size_tokens / comparison.context_size
        ),
        training_tokens=comparison.training_tokens,
        train_batch_size_tokens=comparison.train_batch_size_tokens,
        lr=comparison.lr,
        lr_warm_up_steps=comparison.n_steps // 20,
        lr_decay_steps=comparison.n_steps // 5,
        # SAELens' 1000 steps are more than a short run has, and no latent would count as dead
        dead_feature_window=min(1000, max(1, comparison.n_steps // 3)),
        n_batches_for_norm_estimate=_ESTIMATION_BATCHES,
        device=comparison.device,
        seed=seed,
        logger=LoggingConfig(log_to_wandb=False, wandb_id=f"seed-{seed}"),
        n_checkpoints=2,
        checkpoint_path=str(checkpoints_folder(setting.out)),
        output_path=str(setting.saes(seed)),
    )


def _checkpoint_to_resume(checkpoints: Path, names: Collection[str]) -> str | None:
    """The last checkpoint, if it has all these SAEs; otherwise all checkpoints are removed.

    They are then of other SAEs, which were finished when the comparison was killed.
    """
    steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    if not steps:
        return None
    last = checkpoints / str(max(steps))
    if all((last / name).is_dir() for name in names):
        return str(last)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return None


def _with_the_same_data(comparison: Comparison, untrained: Sequence[Arm]) -> list[Arm]:
    """These SAEs, and one of expected_average_only_in if the comparison has that condition.

    SAELens estimates the scaling factor of this condition from batches that no SAE is then trained
    on. So one such SAE shifts the data of all, and has to be present in every training.
    """
    shifting = [arm for arm in arms(comparison) if arm.condition == "expected_average_only_in"]
    return [*untrained, *(shifting[:1] if not set(shifting) & set(untrained) else [])]
