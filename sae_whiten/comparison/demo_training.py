"""Train one SAE of the demo, with little output."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_whiten import WhiteningTrainer
from sae_whiten.comparison.conditions import CONDITIONS
from sae_whiten.estimation.folders import OWN_DIR, WHITENING_FILENAME
from sae_whiten.evaluation.metrics import ExplainedVariance, LatentActivity, dead_latents

__all__ = ["quality", "train_sae"]

# of 1e-3, 2e-3, 3e-3 and 4e-3, the rate with the fewest dead latents without whitening
_LEARNING_RATE = 2e-3


class _ClearsBar:
    """A trainer whose progress bar is cleared at the end; the demo prints a line instead."""

    def _update_pbar(self, step_output: Any, pbar: Any, *args: Any, **options: Any) -> None:
        pbar.leave = False
        super()._update_pbar(step_output, pbar, *args, **options)  # pyright: ignore[reportAttributeAccessIssue]


class _PlainTrainer(_ClearsBar, SAETrainer[Any, Any]):
    pass


class _WhiteningTrainer(_ClearsBar, WhiteningTrainer):
    pass


def train_sae(
    x: Tensor,
    condition: str,
    path: Path,
    *,
    d_sae: int,
    k: int,
    n_steps: int,
    batch_size: int,
    seed: int,
) -> SAE[Any]:
    """Train a TopK SAE, save it with its whitening, and load it as a user would.

    Args:
        x: Activations, shape (n, d_in), float32.
        condition: A name in `CONDITIONS`.
        path: Folder of the SAE.
        d_sae: Number of latents.
        k: Latents that are active at once.
        n_steps: Training steps; activations are reused if there are too few.
        batch_size: Activations per step.
        seed: Of initial weights and order of the data.
    """
    whitening = CONDITIONS[condition].whitening
    if whitening is not None:
        # of all activations: in random order, halves share their texts and agree too soon
        whitening = replace(whitening, n_samples=len(x) // batch_size * batch_size)
    torch.manual_seed(seed)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=x.shape[1],
            d_sae=d_sae,
            k=k,
            normalize_activations="none" if whitening is None else "covariance_whitening",
        )
    )
    cfg = SAETrainerConfig(
        total_training_samples=n_steps * batch_size,
        train_batch_size_samples=batch_size,
        device="cpu",
        lr=_LEARNING_RATE,
        lr_end=_LEARNING_RATE / 10,
        lr_warm_up_steps=n_steps // 10,
        lr_decay_steps=n_steps // 5,
        # with SAELens' 1000 steps, more than there are here, no latent would count as dead
        dead_feature_window=max(n_steps // 3, 1),
        logger=LoggingConfig(log_to_wandb=False),
    )
    data = _batches(x, batch_size, seed)
    if whitening is None:
        _PlainTrainer(cfg, sae, data).fit().save_inference_model(path)
    else:
        trainer = _WhiteningTrainer(cfg, sae, data, whitening=whitening)
        with _without_info_messages("sae_whiten"):
            trainer.fit().save_inference_model(path)
        assert trainer.whitening is not None  # it was estimated
        trainer.whitening.save(path / OWN_DIR / WHITENING_FILENAME)
    return SAE.load_from_disk(path)


def _batches(x: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Full batches in random order, one pass after another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for rows in order.split(batch_size):
            if len(rows) == batch_size:
                yield x[rows]


@torch.no_grad()
def quality(sae: SAE[Any], x: Tensor) -> tuple[float, int]:
    """Explained variance of activations of shape (n, d_in), and the number of dead latents."""
    variance, activity = ExplainedVariance(), LatentActivity()
    for rows in x.split(2048):
        latents = sae.encode(rows)
        activity.update(latents)
        variance.update(rows, sae.decode(latents))
    return variance.compute(), dead_latents(activity.firing_rates)


@contextlib.contextmanager
def _without_info_messages(name: str) -> Iterator[None]:
    """Hide a logger's INFO messages, unless its level is DEBUG."""
    logger = logging.getLogger(name)
    level = logger.level
    if level == logging.INFO:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
