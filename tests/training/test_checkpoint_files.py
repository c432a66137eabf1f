"""What checkpoints and finished SAEs have to hold, and what is refused."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from sae_whiten import CorruptFileError, WhiteningTrainer
from sae_whiten.training.checkpoint import (
    check_checkpoint,
    check_settings,
    is_complete_sae,
    loadable_folder,
)
from tests.support import ARCHITECTURES, friendly, training_sae

D, D_SAE, BATCH, STEPS = 8, 16, 32, 6
OPTIONS: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.002, "l1_warm_up_steps": 3},
    "gated": {"l1_coefficient": 0.03},
    "jumprelu": {"l0_coefficient": 0.4, "jumprelu_bandwidth": 0.7},
    "topk": {"aux_loss_coefficient": 0.5},
    "abstopk": {"aux_loss_coefficient": 0.25},
    "batchtopk": {"aux_loss_coefficient": 0.5, "topk_threshold_lr": 0.2},
    "matryoshka_batchtopk": {"aux_loss_coefficient": 0.75},
    "topk_vsae": {"aux_loss_coefficient": 0.5, "kl_coefficient": 0.3},
}


def batches() -> Iterator[Tensor]:
    x = friendly(4096, D)
    return itertools.cycle(x.split(BATCH))


def config(**options: Any) -> SAETrainerConfig:
    defaults: dict[str, Any] = {
        "total_training_samples": BATCH * STEPS,
        "train_batch_size_samples": BATCH,
        "lr_end": 3e-5,
    }
    return SAETrainerConfig(**{**defaults, **options})


def trainer(architecture: str = "topk", seed: int = 0, **options: Any) -> WhiteningTrainer:
    sae = training_sae(architecture, D, D_SAE, seed, **OPTIONS.get(architecture, {}))
    return WhiteningTrainer(config(**options), sae, batches())


def checkpoint(path: Path, architecture: str = "topk", **options: Any) -> Path:
    """Of the end of a short training."""
    trainer(architecture, checkpoint_path=str(path), save_final_checkpoint=True, **options).fit()
    return path / f"final_{BATCH * STEPS}"


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "topk_vsae"])
def test_a_checkpoint_keeps_the_training_config_and_is_right_on_raw_activations(
    architecture: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, architecture, n_checkpoints=1)
    (middle,) = (p for p in tmp_path.iterdir() if p != path)
    trained = training_sae(architecture, D, D_SAE, **OPTIONS[architecture])
    x = friendly(64, D)
    for directory in (middle, path):
        loaded = TrainingSAE.load_from_disk(directory)
        assert type(loaded) is type(trained)
        expected = {
            **trained.cfg.to_dict(),
            "normalize_activations": "none",
            "apply_b_dec_to_input": True,
        }
        if "rescale_acts_by_decoder_norm" in expected:  # the norms are in the encoder now
            expected["rescale_acts_by_decoder_norm"] = False
        assert {**loaded.cfg.to_dict(), "metadata": None} == {**expected, "metadata": None}
        plain = SAE.load_from_disk(loadable_folder(directory))
        with torch.no_grad():
            if architecture == "abstopk" or "batch" not in architecture:
                assert torch.allclose(plain(x), loaded(x), atol=1e-5)
    # SAELens has no class for inference of the others
    opens_itself = architecture not in ("batchtopk", "matryoshka_batchtopk", "topk_vsae")
    assert (loadable_folder(path) == path) == opens_itself


def every_file(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def flip_a_bit(file: Path, position: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(position * (len(content) - 1))] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("position", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_flipped_bit_anywhere_is_noticed(position: float, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "batchtopk")
    assert len(every_file(path)) > 10
    check_checkpoint(path)
    for file in every_file(path):
        content = file.read_bytes()
        flip_a_bit(file, position)
        with pytest.raises((CorruptFileError, FileNotFoundError)):
            trainer("batchtopk").load_trainer_state(path)
        file.write_bytes(content)
    check_checkpoint(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    file = path / "whitened_training_state" / "trainer_state.pt"
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"trainer_state\.pt"):
        trainer().load_trainer_state(path)


class Opened:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_trainer_state_that_runs_code_is_refused_before_it_does(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoints")
    (path / "checksums.json").unlink()  # as if whoever wrote it had written those as well
    torch.save(
        {"optimizer": Opened(tmp_path / "opened")},
        path / "whitened_training_state" / "trainer_state.pt",
    )
    with pytest.raises(CorruptFileError, match=r"trainer_state\.pt"):
        trainer().load_trainer_state(path)
    assert not (tmp_path / "opened").exists()


def test_checkpoints_of_before_there_were_checksums_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoint(tmp_path)
    (path / "checksums.json").unlink()
    trainer().load_trainer_state(path)
    assert "without checksums" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-2}, r"lr=0\.0003 \(now 0\.01\)"),
        ({"lr_decay_steps": 3}, r"lr_decay_steps=0 \(now 3\)"),
        ({"adam_beta2": 0.99}, r"adam_beta2=0\.999 \(now 0\.99\)"),
        ({"train_batch_size_samples": 16}, r"train_batch_size_samples=32 \(now 16\)"),
        ({"autocast": True}, r"autocast=False \(now True\)"),
    ],
)
def test_settings_that_decide_the_result_are_those_of_the_checkpoint(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer(**changes).load_trainer_state(path)


def test_coefficients_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "standard")
    sae = training_sae("standard", D, D_SAE, l1_coefficient=1.0, l1_warm_up_steps=3)
    other = WhiteningTrainer(config(), sae, batches())
    with pytest.raises(ValueError, match=r"l1_coefficient=0\.002 \(now 1\.0\)"):
        other.load_trainer_state(path)


def test_the_length_may_change_unless_the_learning_rate_depends_on_it() -> None:
    constant = {"lr_scheduler_name": "constant", "lr_decay_steps": 0, "training_tokens": 100}
    check_settings("path", constant, {**constant, "training_tokens": 200})
    for options in ({"lr_decay_steps": 5}, {"lr_scheduler_name": "cosineannealing"}):
        saved = {**constant, **options}
        with pytest.raises(ValueError, match=r"training_tokens=100 \(now 200\)"):
            check_settings("path", saved, {**saved, "training_tokens": 200})


def test_where_it_runs_and_what_it_reports_may_change() -> None:
    saved = {"device": "cpu", "n_checkpoints": 1, "logger": {"log_to_wandb": True}, "lr": 1.0}
    check_settings("path", saved, {**saved, "device": "cuda", "n_checkpoints": 0, "logger": {}})
    check_settings("path", saved, {"lr": 1.0, "known_to_a_later_release": 2})
    # a tuple is a list in JSON
    check_settings("path", json.loads('{"seqpos_slice": [null]}'), {"seqpos_slice": (None,)})


def test_an_sae_is_complete_if_it_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not is_complete_sae(tmp_path)
    weights, _ = training_sae("topk", normalize_activations="none").save_inference_model(tmp_path)
    assert is_complete_sae(tmp_path)
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert not is_complete_sae(tmp_path)
    assert str(tmp_path) in caplog.text
    weights.unlink()
    assert not is_complete_sae(tmp_path)
