"""Two processes with halves of every batch train what one process trains with the whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    LoggingConfig,
    MultiSAETrainingRunnerConfig,
    TopKTrainingSAEConfig,
)
from torch import Tensor

from sae_whiten import (
    WhiteningConfig,
    WhiteningMultiSAETrainingRunner,
    WhiteningTrainer,
    WhiteningTrainingRunner,
)
from tests.ranks import run_ranks
from tests.support import (
    ARCHITECTURES,
    friendly,
    runner_config,
    tiny_dataset,
    tiny_model,
    training_sae,
    whitening_of,
)

D_IN, N_STEPS, BATCH = 16, 40, 64


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
    found = dict(folded.state_dict())
    if "batchtopk" in architecture:
        # computed by each process alone
        found["active"] = (folded.encode(friendly(96, D_IN)) != 0).sum()
    hooks = [p._post_accumulate_grad_hooks for p in folded.parameters()]
    return {
        **found,
        "hooks": torch.tensor(sum(len(some or {}) for some in hooks)),
        "scores": trainer.act_freq_scores,
        "passes": trainer.n_forward_passes_since_fired,
        "n": torch.tensor(trainer.n_training_samples),
    }


def train_all(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: trained(name, rank, 2) for name in ARCHITECTURES}
    found["runner"] = run_and_resume(Path(folder))
    found["several"] = run_several()
    found["refused"] = refused()
    found["nan"] = train_with_nan(rank)
    found["empty"] = train_without_data(rank)
    return found


def run_and_resume(folder: Path) -> dict[str, Any]:
    """An uninterrupted run, and one that continues from its checkpoint."""
    options: dict[str, Any] = {
        "training_tokens": 32 * 40,
        "train_batch_size_tokens": 32,
        "n_checkpoints": 1,
        "checkpoint_path": str(folder / "checkpoints"),
        "output_path": str(folder / "out"),
    }
    runner = WhiteningTrainingRunner(
        runner_config(**options), override_model=tiny_model(), override_dataset=tiny_dataset()
    )
    whole = runner.run().state_dict()
    checkpoint = next(folder.rglob("process-1")).parent
    resumed = WhiteningTrainingRunner(
        runner_config(**options, resume_from_checkpoint=str(checkpoint)),
        override_model=tiny_model(),
        override_dataset=tiny_dataset(),
    ).run()
    statistics = runner.trainer.scaler.statistics
    assert statistics is not None
    return {
        "whole": whole,
        "resumed": resumed.state_dict(),
        "checkpoint": str(checkpoint),
        "out": options["output_path"],
        "statistics": statistics.n_samples,
    }


def run_several() -> dict[str, Any]:
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            "whitened": training_sae("batchtopk").cfg,
            "plain": TopKTrainingSAEConfig(d_in=32, d_sae=64, k=4),
        },
        hook_names=dict.fromkeys(("whitened", "plain"), "blocks.1.hook_resid_pre"),
        model_name="tiny",
        dataset_path="local",
        streaming=False,
        context_size=32,
        n_batches_in_buffer=8,
        store_batch_size_prompts=4,
        training_tokens=32 * 30,
        train_batch_size_tokens=32,
        device="cpu",
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    runner = WhiteningMultiSAETrainingRunner(
        cfg, override_model=tiny_model(), override_dataset=tiny_dataset()
    )
    return {name: sae.state_dict() for name, sae in runner.run().items()}


def refused() -> str:
    try:
        WhiteningTrainingRunner(
            runner_config(train_batch_size_tokens=33),
            override_model=tiny_model(),
            override_dataset=tiny_dataset(),
        )
    except ValueError as error:
        return str(error)
    return ""


def failure(rank: int, data: Iterator[Tensor]) -> str:
    from tests.training.test_trainer import trainer_config

    cfg = trainer_config(total_training_samples=N_STEPS * BATCH, train_batch_size_samples=BATCH)
    trainer = WhiteningTrainer(cfg, training_sae("topk", D_IN, 64), data)
    trainer.scaler.whitening = whitening_of(friendly(2000, D_IN), WhiteningConfig())
    try:
        trainer.fit()
    except ValueError as error:
        return f"{type(error).__name__} after {trainer.n_training_steps} steps: {error}"
    return ""


def train_with_nan(rank: int) -> str:
    def data() -> Iterator[Tensor]:
        for i, batch in enumerate(batches(rank, 2)):
            yield batch * float("nan") if (rank, i) == (1, 3) else batch

    return failure(rank, data())


def train_without_data(rank: int) -> str:
    return failure(rank, batches(rank, 2) if rank == 0 else iter(()))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(train_all, str(tmp_path_factory.mktemp("ranks")), deadline=500)


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
    assert alone["hooks"] == 0
    if "batchtopk" in architecture:
        assert alone["active"] == 8 * 96


def test_a_runner_in_two_processes_resumes_to_the_bit(ranks: list[Any], tmp_path: Path):
    first, second = (found["runner"] for found in ranks)
    for name, expected in first["whole"].items():
        assert torch.equal(expected, second["whole"][name])
        assert torch.equal(expected, first["resumed"][name])
        assert torch.equal(expected, second["resumed"][name])
    assert first["statistics"] == second["statistics"]
    # process 0 has written it, and plain SAELens reads it
    saved = SAE.load_from_disk(first["out"]).state_dict()
    assert torch.equal(saved["W_enc"], first["whole"]["W_enc"])


def test_a_checkpoint_of_two_processes_is_refused_by_one(ranks: list[Any], tmp_path: Path):
    options: dict[str, Any] = {
        "training_tokens": 32 * 40,
        "train_batch_size_tokens": 32,
        "n_checkpoints": 1,
        "checkpoint_path": str(tmp_path),
        "resume_from_checkpoint": ranks[0]["runner"]["checkpoint"],
    }
    runner = WhiteningTrainingRunner(
        runner_config(**options), override_model=tiny_model(), override_dataset=tiny_dataset()
    )
    with pytest.raises(ValueError, match="2 processes.* has 1"):
        runner.run()


def test_several_saes_are_the_same_in_both_processes(ranks: list[Any]):
    first, second = (found["several"] for found in ranks)
    for name, weights in first.items():
        for key, value in weights.items():
            assert torch.equal(value, second[name][key])


def test_a_batch_that_cannot_be_divided_is_refused(ranks: list[Any]):
    for found in ranks:
        assert "train_batch_size_tokens=33" in found["refused"]


def test_a_nan_in_one_process_ends_all_before_the_step(ranks: list[Any]):
    first, second = (found["nan"] for found in ranks)
    for message in (first, second):
        assert message.startswith("NonFiniteActivationsError after 3 steps")
    assert "process 1" in first


def test_a_process_without_data_ends_all(ranks: list[Any]):
    first, second = (found["empty"] for found in ranks)
    for message in (first, second):
        assert message.startswith("DataExhaustedError after 0 steps")
