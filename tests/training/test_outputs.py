"""What was trained is saved whole, beside what a user keeps there, or kept where there is room."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    TopKTrainingSAEConfig,
)
from safetensors.torch import load_file

from sae_whiten import (
    WhiteningConfig,
    WhiteningMultiSAETrainingRunner,
    WhiteningTrainingRunner,
)
from sae_whiten._checks import FieldError
from sae_whiten.training.checkpoint import is_complete_sae
from sae_whiten.training.stream import ActivationStream
from tests.support import runner_config, tiny_dataset, tiny_model

FEW = WhiteningConfig(n_samples=256)


def topk(k: int = 8) -> TopKTrainingSAEConfig:
    return TopKTrainingSAEConfig(
        d_in=32, d_sae=64, k=k, normalize_activations="covariance_whitening"
    )


def runner(k: int = 8, **options: Any) -> WhiteningTrainingRunner:
    torch.manual_seed(7)
    cfg = runner_config(sae=topk(k), training_tokens=128 * 3, **options)
    return WhiteningTrainingRunner(
        cfg, FEW, override_dataset=tiny_dataset(60), override_model=tiny_model()
    )


def multi_runner(**options: Any) -> WhiteningMultiSAETrainingRunner:
    single = runner_config(training_tokens=128 * 3).to_dict()
    names = MultiSAETrainingRunnerConfig.__dataclass_fields__.keys() & single.keys()
    kept = {name: single[name] for name in names - {"logger"}}
    cfg = MultiSAETrainingRunnerConfig(
        **{
            **kept,
            "saes": {"a": topk(), "b": topk(4)},
            "hook_names": "blocks.1.hook_resid_pre",
            "logger": runner_config().logger,
            **options,
        }
    )
    torch.manual_seed(7)
    return WhiteningMultiSAETrainingRunner(
        cfg, FEW, override_dataset=tiny_dataset(60), override_model=tiny_model()
    )


@pytest.mark.parametrize("make", [runner, multi_runner])
@pytest.mark.parametrize("field", ["output_path", "checkpoint_path"])
def test_a_path_that_cannot_be_written_is_refused_before_anything_is_loaded(
    make: Any, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for stock in (LanguageModelSAETrainingRunner, MultiSAETrainingRunner):
        monkeypatch.setattr(stock, "__init__", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(FieldError, match=rf"{field}=.*file is a file"):
        make(**{field: str(tmp_path / "file" / "below")})


def test_files_of_the_user_stay_and_those_of_an_earlier_run_do_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    runner(output_path=str(out)).run()
    (out / "notes.txt").write_text("mine")
    (out / "plots").mkdir()
    (out / "plots" / "figure.svg").write_text("<svg/>")
    first = load_file(out / "sae_weights.safetensors")
    runner(k=4, output_path=str(out)).run()
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "plots" / "figure.svg").exists()
    assert json.loads((out / "cfg.json").read_text())["k"] == 4
    assert not torch.equal(first["W_enc"], load_file(out / "sae_weights.safetensors")["W_enc"])
    assert is_complete_sae(out)


@pytest.mark.parametrize(("make", "saved"), [(runner, ""), (multi_runner, "b")])
def test_an_sae_that_will_be_replaced_is_warned_about_before_training(
    make: Any, saved: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    make(output_path=str(out)).run()
    assert "will replace it" not in caplog.text
    again = make(output_path=str(out))
    again._train = lambda store: pytest.fail("trained")
    with pytest.raises(pytest.fail.Exception):
        again.run()
    assert f"{out / saved}: this run will replace it" in caplog.text


def test_a_full_disk_leaves_the_earlier_sae_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    runner(output_path=str(out)).run()
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    made = runner(k=4, output_path=str(out), checkpoint_path=str(tmp_path / "checkpoints"))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    # after the config and the weights are written
    monkeypatch.setattr("sae_whiten.training.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        made.run()
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def blocked(path: Path) -> None:
    """Something comes in the way while the SAE is trained."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file")


@pytest.mark.parametrize("with_checkpoints", [True, False])
def test_a_trained_sae_that_cannot_be_saved_is_kept_and_the_error_says_where(
    with_checkpoints: bool, tmp_path: Path
) -> None:
    checkpoints = str(tmp_path / "checkpoints") if with_checkpoints else None
    made = runner(output_path=str(tmp_path / "out"), checkpoint_path=checkpoints)
    blocked(tmp_path / "out")
    with pytest.raises(OSError, match="could not be saved in") as caught:
        made.run()
    kept = Path(re.findall(r"it is in (\S+)", str(caught.value))[0])
    assert kept.is_relative_to(tmp_path) == with_checkpoints
    plain = SAE.load_from_disk(kept)
    for name, value in made.sae.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)


def test_one_sae_that_cannot_be_saved_does_not_cost_the_others(tmp_path: Path) -> None:
    made = multi_runner(
        output_path=str(tmp_path / "out"), checkpoint_path=str(tmp_path / "checkpoints")
    )
    blocked(tmp_path / "out" / "a")
    with pytest.raises(OSError, match=r"out/a .*it is in (\S+)/unsaved_a"):
        made.run()
    assert is_complete_sae(tmp_path / "out" / "b")
    (kept,) = (tmp_path / "checkpoints").glob("*/unsaved_a")
    assert is_complete_sae(kept)


@pytest.mark.parametrize("make", [runner, multi_runner])
def test_a_final_checkpoint_that_fails_does_not_cost_what_was_trained(
    make: Any, tmp_path: Path
) -> None:
    made = make(
        output_path=str(tmp_path / "out"),
        checkpoint_path=str(tmp_path / "checkpoints"),
        save_final_checkpoint=True,
    )
    blocked(tmp_path / "checkpoints")
    with pytest.raises(OSError, match="checkpoints"):
        made.run()
    for path in (tmp_path / "out",) if make is runner else (tmp_path / "out").glob("[ab]"):
        assert is_complete_sae(path)
    assert list((tmp_path / "out").rglob("cfg.json"))


@pytest.mark.parametrize("make", [runner, multi_runner])
def test_a_checkpoint_in_between_that_fails_does_not_end_training(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(checkpoint_path=str(tmp_path / "checkpoints"), n_checkpoints=2)
    blocked(tmp_path / "checkpoints")
    found, expected = made.run(), make().run()
    if make is multi_runner:
        found, expected = found["a"], expected["a"]
    assert torch.equal(found.W_enc, expected.W_enc)
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert errors
    assert all("could not be saved, training continues" in error for error in errors)
    assert len(errors) <= 2  # it is not tried again at every step


@pytest.mark.parametrize("make", [runner, multi_runner])
def test_what_a_stopped_run_cannot_save_in_its_place_is_kept_elsewhere(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(checkpoint_path=str(tmp_path / "checkpoints"))
    blocked(tmp_path / "checkpoints")
    served = ActivationStream.__next__

    def stopped(self: ActivationStream) -> torch.Tensor:
        if self.n_served == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return served(self)

    monkeypatch.setattr(ActivationStream, "__next__", stopped)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    monkeypatch.undo()
    (kept,) = re.findall(r"resume_from_checkpoint=(\S+)", caplog.text)
    resumed, expected = make(resume_from_checkpoint=kept).run(), make().run()
    if make is multi_runner:
        resumed, expected = resumed["a"], expected["a"]
    assert torch.equal(resumed.W_enc, expected.W_enc)
    shutil.rmtree(Path(kept).parent)
