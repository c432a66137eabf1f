"""Two processes with halves of every batch train what one process trains with the whole."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_whiten import WhiteningConfig, WhiteningTrainer
from tests.ranks import run_ranks
from tests.support import ARCHITECTURES, friendly, training_sae, whitening_of

D_IN, N_STEPS, BATCH = 16, 100, 64


def batches(rank: int, world_size: int) -> Iterator[Tensor]:
    x = friendly(BATCH * 40, D_IN)
    while True:
        for batch in x.split(BATCH):
            yield batch[rank::world_size]


def trained(architecture: str, rank: int, world_size: int) -> dict[str, Tensor]:
    from tests.training.test_trainer import trainer_config

    torch.manual_seed(rank)  # initial weights are those of process 0 all the same
    sae = training_sae(architecture, d_in=D_IN, d_sae=64, seed=rank)
    cfg = trainer_config(
        total_training_samples=N_STEPS * BATCH,
        train_batch_size_samples=BATCH,
        dead_feature_window=20,
    )
    trainer = WhiteningTrainer(cfg, sae, batches(rank, world_size))
    trainer.scaler.whitening = whitening_of(friendly(2000, D_IN), WhiteningConfig())
    folded = trainer.fit()
    return {
        **folded.state_dict(),
        "scores": trainer.act_freq_scores,
        "passes": trainer.n_forward_passes_since_fired,
        "n": torch.tensor(trainer.n_training_samples),
    }


def train_all(rank: int) -> dict[str, dict[str, Tensor]]:
    return {architecture: trained(architecture, rank, 2) for architecture in ARCHITECTURES}


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return run_ranks(train_all)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_processes_train_what_one_does(ranks: list[Any], architecture: str):
    alone = trained(architecture, 0, 1)
    first, second = (found[architecture] for found in ranks)
    # one rounding of float32 for every step, relative to the largest entry
    rounding = N_STEPS * torch.finfo(torch.float32).eps
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        difference = (first[name] - expected).abs().max()
        assert difference <= rounding * expected.abs().max(), name
