"""Checkpoints: what opens in SAELens, what is resumed, and what is refused."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

from sae_whiten import (
    ActivationStatistics,
    CorruptFileError,
    FoldError,
    WhiteningConfig,
    WhiteningTrainer,
)
from tests.reference import (
    BATCH,
    D_IN,
    D_SAE,
    K,
    Reference,
    activations,
    batches,
    explained_variance,
    rounding_units,
    run_by_hand,
    same,
    state,
    topk_config,
    topk_sae,
    trainer_config,
)

ARCHITECTURES = [
    topk_config(),
    BatchTopKTrainingSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        k=K,
        topk_threshold_lr=0.1,
        normalize_activations="covariance_whitening",
    ),
    JumpReLUTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, l0_coefficient=0.1, normalize_activations="covariance_whitening"
    ),
    StandardTrainingSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        l1_coefficient=0.1,
        apply_b_dec_to_input=False,
        normalize_activations="covariance_whitening",
    ),
]


@pytest.mark.parametrize("cfg", ARCHITECTURES, ids=lambda cfg: cfg.architecture())
def test_every_checkpoint_opens_in_saelens_as_a_plain_sae(cfg: Any, tmp_path: Path) -> None:
    x = activations(256)
    architecture = cfg.architecture()

    def new_sae() -> Any:
        torch.manual_seed(1)
        return TrainingSAE.from_dict(cfg.to_dict())

    def saved(folder: str) -> SAETrainerConfig:
        path = str(tmp_path / folder)
        return trainer_config(40, n_checkpoints=1, checkpoint_path=path, save_final_checkpoint=True)

    SAETrainer(saved("stock"), new_sae(), batches()).fit()
    (middle,) = (tmp_path / "stock").glob("[0-9]*")
    if architecture == "batchtopk":
        with pytest.raises(KeyError):
            SAE.load_from_disk(middle)
    else:
        trainer: Any = SAETrainer(trainer_config(40), new_sae(), batches())
        run_by_hand(trainer, int(middle.name) // BATCH)
        reference = Reference.of(trainer.sae, trainer.activation_scaler.whitening)
        assert rounding_units(SAE.load_from_disk(middle), reference, x) > 1000

    WhiteningTrainer(saved("ours"), new_sae(), batches()).fit()
    for directory in sorted((tmp_path / "ours").iterdir()):
        n_steps = int(directory.name.removeprefix("final_")) // BATCH
        trainer = WhiteningTrainer(trainer_config(40), new_sae(), batches())
        run_by_hand(trainer, n_steps)
        reference = Reference.of(trainer.sae, trainer.whitening)
        if architecture == "batchtopk":  # for which SAELens has no class for inference
            with pytest.raises(KeyError):
                SAE.load_from_disk(directory)
            plain = SAE.load_from_disk(directory / "inference")
        else:
            plain = SAE.load_from_disk(directory)
        assert plain.cfg.normalize_activations == "none"
        assert rounding_units(plain, reference, x) <= 1
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"1344", "final_2560"}


def test_the_state_for_resuming_does_not_open_as_an_sae(tmp_path: Path) -> None:
    cfg = trainer_config(5, checkpoint_path=str(tmp_path), save_final_checkpoint=True)
    WhiteningTrainer(cfg, topk_sae(), batches()).fit()
    in_whitened_coordinates = [
        path.parent
        for path in tmp_path.rglob("*.safetensors")
        if not (path.parent / "cfg.json").exists()
    ]
    assert in_whitened_coordinates
    for directory in in_whitened_coordinates:
        with pytest.raises(FileNotFoundError):
            SAE.load_from_disk(directory)


@pytest.mark.parametrize("method", ["save_inference_model", "save_model"])
def test_an_sae_saved_before_folding_is_plain_and_folded(method: str, tmp_path: Path) -> None:
    x = activations(256)

    stock = SAETrainer(trainer_config(), topk_sae(), batches())
    run_by_hand(stock, 30)
    getattr(stock.sae, method)(tmp_path / "stock")
    assert explained_variance(SAE.load_from_disk(tmp_path / "stock"), x) < 0.2
    assert not any("scaler" in p.name or "whiten" in p.name for p in tmp_path.rglob("*"))

    ours = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    run_by_hand(ours, 30)
    before = state(ours.sae)
    getattr(ours.sae, method)(tmp_path / "ours")
    plain = SAE.load_from_disk(tmp_path / "ours")
    assert rounding_units(plain, Reference.of(ours.sae, ours.whitening), x) <= 1
    assert explained_variance(plain, x) > 0.5
    # the one in training was only looked at
    assert same(before, state(ours.sae))
    assert ours.sae.cfg.normalize_activations == "covariance_whitening"


def test_an_sae_saved_before_there_is_a_whitening_is_refused(tmp_path: Path) -> None:
    sae = topk_sae()
    trainer = WhiteningTrainer(trainer_config(), sae, batches())
    with pytest.raises(FoldError, match="has not been estimated yet"):
        trainer.sae.save_inference_model(tmp_path / "early")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_copy_of_an_sae_in_training_can_be_saved(tmp_path: Path) -> None:
    """For example the best one so far; its source is a generator, which cannot be copied."""
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    run_by_hand(trainer, 5)
    reference = Reference.of(trainer.sae, trainer.whitening)
    best = copy.deepcopy(trainer.sae)
    run_by_hand(trainer, 5)
    best.save_inference_model(tmp_path)
    plain = SAE.load_from_disk(tmp_path)
    assert rounding_units(plain, reference, activations(256)) <= 1


def test_training_in_bfloat16_ends_in_a_float32_file(tmp_path: Path) -> None:
    path = str(tmp_path)
    cfg = trainer_config(20, checkpoint_path=path, save_final_checkpoint=True)
    sae = topk_sae(topk_config(dtype="bfloat16"))
    WhiteningTrainer(cfg, sae, batches()).fit()
    (final,) = tmp_path.glob("final_*")
    weights = load_file(final / "sae_weights.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}

    trainer = WhiteningTrainer(
        trainer_config(20), topk_sae(topk_config(dtype="bfloat16")), batches()
    )
    run_by_hand(trainer, 20)
    assert trainer.sae.W_enc.dtype == torch.bfloat16
    reference = Reference.of(trainer.sae, trainer.whitening)
    plain = SAE.load_from_disk(final)
    assert plain.dtype == torch.float32
    assert rounding_units(plain, reference, activations(256)) <= 1


WHITENING_FILE = "activation_whitening.safetensors"


def checkpoints(folder: Path, seed: int) -> Path:
    """A checkpoint of ours half-way through training, on data of its own."""
    cfg = trainer_config(n_checkpoints=1, checkpoint_path=str(folder))
    WhiteningTrainer(cfg, topk_sae(), batches(seed)).fit()
    (checkpoint,) = folder.iterdir()
    return checkpoint


def test_stock_continues_in_another_basis_without_a_word(tmp_path: Path) -> None:
    """What the tests below are about."""
    cfg = trainer_config(n_checkpoints=1, checkpoint_path=str(tmp_path))
    trainer = SAETrainer(cfg, topk_sae(), batches())
    run_by_hand(trainer, 40)
    trainer.save_checkpoint("half_way")

    def whitened_explained_variance(trainer: SAETrainer[Any, Any]) -> float:
        z = trainer.activation_scaler.scale(activations(256))
        return explained_variance(trainer.sae, z)

    before = whitened_explained_variance(trainer)
    (tmp_path / "half_way" / WHITENING_FILE).unlink()
    resumed = SAETrainer(cfg, topk_sae(), batches(9))
    resumed.sae.load_weights_from_checkpoint(tmp_path / "half_way")
    resumed.load_trainer_state(tmp_path / "half_way")
    run_by_hand(resumed, 0)
    assert whitened_explained_variance(resumed) < before - 0.1


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "tampered":
        path.write_bytes(content[:-8] + bytes(8))
    elif how == "foreign":
        ActivationStatistics(D_IN).save(path)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("missing", FileNotFoundError),
        ("truncated", CorruptFileError),
        ("tampered", CorruptFileError),
        ("foreign", CorruptFileError),
    ],
)
def test_a_whitening_that_is_missing_or_damaged_is_an_error(
    how: str, error: type[Exception], tmp_path: Path
) -> None:
    checkpoint = checkpoints(tmp_path, seed=0)
    (file,) = checkpoint.rglob(WHITENING_FILE)
    spoil(file, how)
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), batches(9))
    with pytest.raises(error) as raised:
        trainer.load_trainer_state(checkpoint)
    assert str(file) in str(raised.value)
    assert trainer.scaler.whitening is None


@pytest.mark.parametrize("how", ["missing", "truncated", "another configuration"])
def test_a_checkpoint_that_is_refused_is_not_half_loaded(how: str, tmp_path: Path) -> None:
    """Trained on from there, the weights would be in a basis that they were never trained in."""
    checkpoint = checkpoints(tmp_path, seed=0)
    (file,) = checkpoint.rglob(WHITENING_FILE)
    config = WhiteningConfig(kind="zca") if how == "another configuration" else None
    spoil(file, how)
    trainer = WhiteningTrainer(trainer_config(), topk_sae(seed=2), batches(9), config)
    before = state(trainer.sae)
    with pytest.raises((ValueError, FileNotFoundError)):
        trainer.load_trainer_state(checkpoint)
    assert same(before, state(trainer.sae))
    assert trainer.scaler.whitening is None
    assert (trainer.n_training_samples, trainer.stream.n_served) == (0, 0)
    assert not trainer.optimizer.state


def test_the_whitening_of_another_run_is_an_error(tmp_path: Path) -> None:
    checkpoint, other = (checkpoints(tmp_path / str(seed), seed) for seed in (0, 1))
    (file,), (other_file,) = checkpoint.rglob(WHITENING_FILE), other.rglob(WHITENING_FILE)
    shutil.copy(other_file, file)
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    with pytest.raises(ValueError, match="whitening"):
        trainer.load_trainer_state(checkpoint)


def test_another_configuration_is_an_error(tmp_path: Path) -> None:
    checkpoint = checkpoints(tmp_path, seed=0)
    zca = WhiteningConfig(kind="zca")
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), batches(), zca)
    with pytest.raises(ValueError, match=r"kind='pca' \(now 'zca'\)"):
        trainer.load_trainer_state(checkpoint)


def test_weights_that_mean_something_else_are_an_error(tmp_path: Path) -> None:
    """Without the rescaling, the same weights are another SAE."""
    checkpoint = checkpoints(tmp_path, seed=0)
    cfg = topk_config(rescale_acts_by_decoder_norm=False)
    trainer = WhiteningTrainer(trainer_config(), topk_sae(cfg), batches())
    with pytest.raises(ValueError, match="rescale_acts_by_decoder_norm"):
        trainer.load_trainer_state(checkpoint)
