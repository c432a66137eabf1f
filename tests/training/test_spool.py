"""Batches that were looked at beforehand come back to the bit, from memory and from a file."""

import logging
import shutil
import tempfile
from collections import namedtuple

import pytest
import torch

from sae_whiten import WhiteningConfig, WhiteningTrainer
from sae_whiten.training.spool import Spool
from tests.support import friendly, runner_config, training_sae

BATCHES = [
    torch.randn(5, 4),
    torch.randn(7, 2, 2).bfloat16(),
    torch.empty(0, 4),
    torch.tensor([[float("nan"), -0.0, 1e-40, 3.0]]),
    torch.randn(3, 4, dtype=torch.float64),
    torch.randn(2, 4).half(),
]


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


@pytest.mark.parametrize("n_bytes", [0, 150, 10**6], ids=["file", "both", "memory"])
@pytest.mark.parametrize("eps", [0.0, torch.finfo(torch.bfloat16).eps, torch.finfo(torch.half).eps])
def test_what_comes_out_is_what_went_in(n_bytes, eps, monkeypatch):
    monkeypatch.setattr("sae_whiten.training.spool._IN_MEMORY", n_bytes)
    spool = Spool()
    spool.resolution = eps
    for _ in range(2):  # the second time through a file that was closed
        for batch in BATCHES[:4]:
            given = batch.clone()
            spool.put(given)
            given.zero_()  # a provider may write its next batch into the same memory
        taken = [spool.take() for _ in range(2)]
        for batch in BATCHES[4:]:
            spool.put(batch)
        taken += [spool.take() for _ in range(len(spool))]
        assert [(x.shape, x.dtype) for x in taken] == [(x.shape, x.dtype) for x in BATCHES]
        assert [bits(x) for x in taken] == [bits(x) for x in BATCHES]


def test_activations_of_a_model_in_bfloat16_take_half_of_the_room(monkeypatch):
    written: list[int] = []
    monkeypatch.setattr("sae_whiten.training.spool._IN_MEMORY", 0)
    monkeypatch.setattr(Spool, "_write", lambda spool, values: written.append(values.nbytes))
    spool = Spool()
    spool.resolution = torch.finfo(torch.bfloat16).eps
    spool.put(torch.randn(8, 4).bfloat16().float())
    spool.put(torch.randn(8, 4))
    assert written == [64, 128]


def test_the_user_chooses_the_folder_and_is_told_where_it_is(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("sae_whiten.training.spool._IN_MEMORY", 0)
    files: list[str] = []
    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: files.append(dir) or make(dir=dir))
    config = WhiteningConfig(n_samples=500, temporary_folder=str(tmp_path))
    provider = (friendly(128, 32, seed) for seed in range(100))
    cfg = runner_config(training_tokens=128 * 6).to_sae_trainer_config()
    with caplog.at_level(logging.INFO, logger="sae_whiten"):
        WhiteningTrainer(cfg, training_sae("topk"), provider, config).fit()
    assert files == [str(tmp_path)]
    assert f"temporary file in {tmp_path}" in caplog.text
    assert not list(tmp_path.iterdir())
    assert "temporary_folder" not in config.to_dict()
    assert config == WhiteningConfig(n_samples=500)


def test_a_folder_that_is_not_there_is_refused_before_anything_is_read():
    config = WhiteningConfig(temporary_folder="nowhere")
    with pytest.raises(NotADirectoryError, match="temporary_folder='nowhere'"):
        WhiteningTrainer(
            runner_config().to_sae_trainer_config(), training_sae("topk"), iter([]), config
        )


def test_a_disk_without_room_is_named_before_it_is_full(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("sae_whiten.training.spool._IN_MEMORY", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**27))
    spool = Spool()
    spool.use_folder(str(tmp_path))
    with pytest.raises(OSError, match=f"{tmp_path} has only 0.1 GiB left.*temporary_folder"):
        spool.put(torch.zeros(4, 4))
