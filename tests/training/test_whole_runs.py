"""Runs of `WhiteningTrainingRunner` from the model to the saved SAE."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
)
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from transformer_lens import HookedTransformer

from sae_whiten import (
    ActivationStatistics,
    NonFiniteActivationsError,
    WhiteningConfig,
)
from tests.reference import (
    HOOK,
    batches,
    explained_variance,
    finite,
    model_activations,
    ours_runner,
    run_by_hand,
    same,
    state,
    stock_runner,
    topk_sae,
    trainer_config,
)
from tests.support import runner_config, tiny_model


def test_resume_from_the_final_checkpoint_recognises_that_it_is_folded(
    tmp_path: Path,
) -> None:
    x = model_activations(tiny_model())

    cfg = runner_config(checkpoint_path=f"{tmp_path}/stock", save_final_checkpoint=True)
    sae = stock_runner(cfg).run()
    (final,) = Path(str(cfg.checkpoint_path)).glob("final_*")
    again = stock_runner(runner_config(resume_from_checkpoint=str(final))).run()
    assert explained_variance(again, x) < explained_variance(sae, x) - 0.2

    cfg = runner_config(checkpoint_path=f"{tmp_path}/ours", save_final_checkpoint=True)
    sae = ours_runner(cfg).run()
    (final,) = Path(str(cfg.checkpoint_path)).glob("final_*")
    assert same(state(SAE.load_from_disk(final)), plain_state(sae, tmp_path / "plain"))
    again = ours_runner(runner_config(resume_from_checkpoint=str(final)), seed=6).run()
    assert same(state(sae), state(again))

    # and more training from there is what training longer at once would have been
    more = {"training_tokens": 100 * 128}
    longer = ours_runner(runner_config(**more)).run()
    cfg = runner_config(resume_from_checkpoint=str(final), **more)
    assert same(state(longer), state(ours_runner(cfg, seed=6).run()))
    assert not same(state(longer), state(sae))


def plain_state(sae: Any, folder: Path) -> dict[str, Tensor]:
    """Of the inference SAE that a folded training SAE is saved as."""
    sae.save_inference_model(folder)
    return state(SAE.load_from_disk(folder))


def test_a_runner_saves_its_progress_when_the_model_yields_nan(tmp_path: Path) -> None:
    model = tiny_model()
    n_calls = 0

    def poison(tensor: Tensor, *, hook: Any) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        return torch.full_like(tensor, float("nan")) if n_calls == 40 else tensor

    model.add_perma_hook("hook_embed", poison)
    cfg = runner_config(checkpoint_path=str(tmp_path))
    runner = ours_runner(cfg, model)
    with pytest.raises(NonFiniteActivationsError, match=r"at blocks\.1\.hook_resid_pre, of shape"):
        runner.run()
    (checkpoint,) = Path(str(cfg.checkpoint_path)).iterdir()
    assert 0 < int(checkpoint.name) < 80 * 128
    assert finite(SAE.load_from_disk(checkpoint))


def test_weights_of_an_unknown_basis_are_not_fine_tuned(tmp_path: Path) -> None:
    """A checkpoint of sae-lens' own trainer, given as the SAE to start from."""
    trainer = SAETrainer(trainer_config(checkpoint_path=str(tmp_path)), topk_sae(), batches())
    run_by_hand(trainer, 10)
    trainer.save_checkpoint("half_way")
    cfg = runner_config(from_pretrained_path=f"{tmp_path}/half_way")
    runner = stock_runner(cfg)  # accepted: it will be trained in a basis that is yet to come
    assert runner.sae.cfg.normalize_activations == "covariance_whitening"
    with pytest.raises(ValueError, match=r"half_way.*whitened coordinates"):
        ours_runner(cfg)


def interrupting_model(signum: int, at_call: int) -> HookedTransformer:
    """Sends a signal to this process while the model computes activations."""
    model = tiny_model()
    n_calls = 0

    def send(tensor: Tensor, *, hook: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == at_call:
            os.kill(os.getpid(), signum)

    model.add_perma_hook("hook_embed", send)
    return model


N_CALLS = 40
"""Calls of the model after which training has had some of its 80 steps, and not all of them."""


@pytest.mark.parametrize(
    ("signum", "prefetch"),
    [(signal.SIGINT, False), (signal.SIGTERM, True)],
    ids=["SIGINT", "SIGTERM, prefetching"],
)
def test_an_interrupted_run_is_saved_and_resumed_to_the_bit(
    signum: signal.Signals, prefetch: bool, tmp_path: Path
) -> None:
    if not prefetch:
        cfg = runner_config(checkpoint_path=f"{tmp_path}/stock")
        runner = stock_runner(cfg, interrupting_model(signum, N_CALLS))
        with pytest.raises(Exception, match="No such file or directory"):
            runner.run()
        assert not list(tmp_path.rglob("*.safetensors"))

    signal.signal(signum, signal.default_int_handler)
    cfg = runner_config(checkpoint_path=f"{tmp_path}/ours", prefetch_llm_batches=prefetch)
    runner = ours_runner(cfg, interrupting_model(signum, N_CALLS))
    with pytest.raises(KeyboardInterrupt if signum == signal.SIGINT else SystemExit) as raised:
        runner.run()
    if signum == signal.SIGTERM:
        assert raised.value.args == (128 + signal.SIGTERM,)
    assert signal.getsignal(signum) is signal.default_int_handler
    (checkpoint,) = Path(str(cfg.checkpoint_path)).iterdir()
    assert 0 < int(checkpoint.name) < 80 * 128
    assert SAE.load_from_disk(checkpoint).cfg.normalize_activations == "none"

    uninterrupted = ours_runner(runner_config()).run()
    resuming = runner_config(resume_from_checkpoint=str(checkpoint), prefetch_llm_batches=prefetch)
    resumed = ours_runner(resuming, seed=6).run()
    assert same(state(resumed), state(uninterrupted))
    assert resumed.cfg.metadata.l0 == uninterrupted.cfg.metadata.l0


def test_the_saved_config_says_how_it_was_whitened(tmp_path: Path) -> None:
    stock_runner(runner_config(training_tokens=1280, output_path=f"{tmp_path}/stock")).run()
    assert "whiten" not in (tmp_path / "stock" / "cfg.json").read_text()

    config = WhiteningConfig(kind="zca", eps=2e-3, shrinkage=0.1, n_samples=1900)
    cfg = runner_config(training_tokens=1280, output_path=f"{tmp_path}/ours")
    ours_runner(cfg, whitening=config).run()
    statistics = ActivationStatistics.load(
        tmp_path / "ours" / "sae_whiten" / "activation_statistics.safetensors"
    )
    assert 1900 <= statistics.n_samples < 1900 + 128
    assert statistics.provenance["hook_name"] == HOOK
    assert statistics.provenance["model_name"] == "tiny"

    # as anybody finds it who opens the result with sae-lens alone
    saved = SAE.load_from_disk(tmp_path / "ours").cfg.metadata.whitening
    assert (
        saved == json.loads((tmp_path / "ours" / "cfg.json").read_text())["metadata"]["whitening"]
    )
    assert "covariance_whitening" in saved["method"]
    assert saved["config"] == config.to_dict()
    assert saved["n_samples"] == statistics.n_samples
    assert saved["shrinkage"] == 0.1
    check = saved["fold"]["check"]
    assert check["source"] == "held-out"
    assert check["n_activations"] == 128
    assert 0 <= check["fold_error"] <= check["tolerance"] < 1e-3


def test_a_resumed_run_writes_what_an_uninterrupted_one_writes(tmp_path: Path) -> None:
    cfg = runner_config(
        training_tokens=2560,
        checkpoint_path=f"{tmp_path}/checkpoints",
        n_checkpoints=1,
        output_path=f"{tmp_path}/uninterrupted",
    )
    ours_runner(cfg).run()
    (checkpoint,) = Path(str(cfg.checkpoint_path)).iterdir()
    cfg = runner_config(
        training_tokens=2560,
        resume_from_checkpoint=str(checkpoint),
        output_path=f"{tmp_path}/resumed",
    )
    ours_runner(cfg).run()
    written = [
        {path.name for path in (tmp_path / name).iterdir()} for name in ("uninterrupted", "resumed")
    ]
    assert written[0] == written[1]
    saved = [
        json.loads((tmp_path / name / "cfg.json").read_text())["metadata"]["whitening"]
        for name in ("uninterrupted", "resumed")
    ]
    assert saved[0] == saved[1]
