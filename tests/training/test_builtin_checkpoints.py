"""Checkpoints that SAELens writes under its own covariance_whitening, made plain."""

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner, LoggingConfig, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_whiten import CorruptFileError, FoldError
from sae_whiten._checks import FieldError
from sae_whiten.cli import main
from sae_whiten.training.builtin_checkpoints import (
    STATES,
    UnclearStateError,
    cached_activations,
    diagnose,
    fold_builtin_checkpoint,
    load_builtin_checkpoint,
    load_builtin_whitening,
    model_activations,
)

from ..support import ARCHITECTURES, runner_config, tiny_dataset, tiny_model

D, BATCH, STEPS = 16, 128, 60


def activations(seed: int = 0) -> Iterator[Tensor]:
    """Batches of sparse combinations of 64 features; condition 1e4, a mean of three deviations."""
    fixed = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(64, D, generator=fixed), dim=1)
    basis = torch.linalg.qr(torch.randn(D, D, generator=fixed))[0]
    features = features @ (basis * torch.logspace(0.5, -1.5, D)) @ basis.T
    mean = 3 * features.std() * torch.randn(D, generator=fixed)
    drawn = torch.Generator().manual_seed(seed)
    while True:
        active = torch.rand(BATCH, 64, generator=drawn) < 5 / 64
        yield (active * torch.rand(BATCH, 64, generator=drawn)) @ features + mean


def trainer(architecture: str, path: Path, n_steps: int, **options: Any) -> SAETrainer[Any, Any]:
    """SAELens' own, which saves a checkpoint half-way and one at the end."""
    config: dict[str, Any] = {"architecture": architecture, "d_in": D, "d_sae": 64}
    if "topk" in architecture:
        config["k"] = 8
    if architecture == "matryoshka_batchtopk":
        config["matryoshka_widths"] = [16, 64]
    torch.manual_seed(0)
    config |= {"normalize_activations": "covariance_whitening", **options}
    cfg = SAETrainerConfig(
        n_checkpoints=1,
        checkpoint_path=str(path),
        save_final_checkpoint=True,
        total_training_samples=BATCH * n_steps,
        device="cpu",
        autocast=False,
        lr=2e-3,
        lr_end=2e-4,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=BATCH,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=10,
    )
    return SAETrainer(cfg, TrainingSAE.from_dict(config), activations())


class Run:
    """What SAELens writes half-way and finally, and what a run does that is resumed from there."""

    def __init__(self, architecture: str, folder: Path, **options: Any) -> None:
        trainer(architecture, folder / "first", STEPS, **options).fit()
        self.middle, self.final = self._checkpoints(folder / "first")
        resumed = trainer(architecture, folder / "second", STEPS + 2, **options)
        resumed.load_trainer_state(self.final)
        resumed.sae.load_weights_from_checkpoint(self.final)
        resumed.data_provider = activations(seed=1)
        for group in resumed.optimizer.param_groups:  # two steps, which change next to nothing
            group["initial_lr"] = group["lr"] = 1e-7
        resumed.lr_scheduler.base_lrs = [1e-7]
        resumed.fit()
        self.resumed, self.twice = self._checkpoints(folder / "second")

    @staticmethod
    def _checkpoints(folder: Path) -> tuple[Path, Path]:
        middle, final = sorted(folder.iterdir(), key=lambda path: path.name.startswith("final"))
        return middle, final


@functools.cache
def checkpoints(architecture: str, **options: Any) -> Run:
    folder = tempfile.TemporaryDirectory()
    run = Run(architecture, Path(folder.name), **options)
    run.folder = folder  # type: ignore[attr-defined]  # removed with the run
    return run


def explained_variance(sae: Any, scaler: ActivationScaler | None = None) -> float:
    x = next(activations(seed=2))
    scaler = scaler or ActivationScaler()
    with torch.no_grad():
        x_hat = scaler.unscale(sae.decode(sae.encode(scaler.scale(x))))
    return float(1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def test_the_checkpoints_are_what_this_is_about() -> None:
    run = checkpoints("topk")
    assert explained_variance(TrainingSAE.load_from_disk(run.middle)) < 0
    assert explained_variance(TrainingSAE.load_from_disk(run.final)) > 0
    assert explained_variance(TrainingSAE.load_from_disk(run.twice)) < 0
    assert not (run.twice / "activation_whitening.safetensors").exists()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_in_whitened_coordinates_are_folded(architecture: str, tmp_path: Path) -> None:
    run = checkpoints(architecture)
    done = fold_builtin_checkpoint(run.middle, tmp_path / "sae")
    assert (done.state, done.given) == ("whitened", False)

    sae = SAE.load_from_disk(tmp_path / "sae")
    assert sae.cfg.normalize_activations == "none"
    # as SAELens' own fold of these weights, stored for inference
    stock = TrainingSAE.load_from_disk(run.middle)
    scaler = ActivationScaler()
    scaler.load(run.middle / "activation_scaler.json")
    assert scaler.whitening is not None
    w = scaler.whitening
    stock.fold_activation_whitening(w.mean, w.matrix, w.inverse_matrix)
    stock.save_inference_model(str(tmp_path / "stock"))
    x = next(activations(seed=2))
    with torch.no_grad():
        expected = SAE.load_from_disk(tmp_path / "stock")(x)
        torch.testing.assert_close(sae(x), expected, rtol=1e-3, atol=1e-3)
    assert explained_variance(sae) > 0.1

    metadata = sae.cfg.metadata.whitening
    assert metadata["config"]["eps_mode"] == "absolute"
    assert metadata["n_samples"] is None  # SAELens does not say
    check = metadata["fold"]["check"]
    assert check["fold_error"] <= check["tolerance"]
    assert metadata["saelens_checkpoint"]["state"] == "whitened"
    assert (tmp_path / "sae" / "sparsity.safetensors").is_file()


@pytest.mark.parametrize("architecture", ["gated", "jumprelu", "batchtopk"])
def test_a_plain_sae_with_a_whitening_beside_it_is_told_from_one_that_is_not(
    architecture: str, tmp_path: Path
) -> None:
    run = checkpoints(architecture)
    done = fold_builtin_checkpoint(run.final, tmp_path / "sae", whitening=run.middle)
    assert (done.state, done.given) == ("folded", False)
    TrainingSAE.load_from_disk(run.final).save_inference_model(str(tmp_path / "stock"))
    copied, stock = (load_file(tmp_path / n / "sae_weights.safetensors") for n in ("sae", "stock"))
    assert copied.keys() == stock.keys()
    assert all(torch.equal(copied[name], stock[name]) for name in stock)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_second_fold_of_a_resumed_run_is_undone(architecture: str, tmp_path: Path) -> None:
    run = checkpoints(architecture)
    x = next(activations(seed=3)) if "batchtopk" in architecture else None  # for the threshold
    done = fold_builtin_checkpoint(
        run.twice, tmp_path / "sae", whitening=run.resumed, activations=x
    )
    assert (done.state, done.given) == ("folded-twice", False)
    # the forms of training: BatchTopK takes k latents there, and needs no threshold
    once = explained_variance(TrainingSAE.load_from_disk(run.final))
    # SAELens moved decoder norms to the encoder again, which are known as well as the covariance
    assert explained_variance(done.sae) == pytest.approx(once, abs=0.02)
    saved = explained_variance(SAE.load_from_disk(tmp_path / "sae"))
    assert saved == pytest.approx(once, abs=0.02)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_the_threshold_of_a_resumed_run_is_found_again(architecture: str, tmp_path: Path) -> None:
    run = checkpoints(architecture)
    sae: Any = TrainingSAE.load_from_disk(run.twice)
    sae.topk_threshold.mul_(20)  # the resumed run finds it on whitened inputs of a plain encoder
    sae.save_model(tmp_path / "twice")
    with pytest.raises(FoldError, match="to find it again, give activations"):
        fold_builtin_checkpoint(tmp_path / "twice", tmp_path / "sae", whitening=run.resumed)
    assert not (tmp_path / "sae").exists()
    fold_builtin_checkpoint(
        tmp_path / "twice",
        tmp_path / "sae",
        whitening=run.resumed,
        activations=next(activations(seed=3)),
    )
    l0 = (SAE.load_from_disk(tmp_path / "sae").encode(next(activations(seed=2))) > 0).sum(1)
    assert float(l0.float().mean()) == pytest.approx(8, rel=0.25)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_a_second_fold_of_the_same_whitening_is_undone_exactly(
    architecture: str, flag: bool, tmp_path: Path
) -> None:
    run = checkpoints(architecture, apply_b_dec_to_input=flag)
    sae: Any = TrainingSAE.load_from_disk(run.final)
    w = load_builtin_whitening(run.middle / "activation_whitening.safetensors")
    x = next(activations(seed=2))
    expected = sae(x)
    sae.fold_activation_whitening(w.mean, w.W, w.W_inv)
    sae.save_model(tmp_path / "twice")
    done = fold_builtin_checkpoint(tmp_path / "twice", tmp_path / "sae", whitening=run.middle)
    assert done.state == "folded-twice"
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "sae")(x), expected, rtol=0, atol=2e-2)


def test_a_checkpoint_of_a_resumed_run_whose_config_is_wrong_is_refused_until_told(
    tmp_path: Path,
) -> None:
    run = checkpoints("standard")
    with pytest.raises(UnclearStateError, match="look folded.*resumed a run"):
        fold_builtin_checkpoint(run.resumed, tmp_path / "sae")
    assert not (tmp_path / "sae").exists()
    done = fold_builtin_checkpoint(run.resumed, tmp_path / "sae", state="folded")
    assert done.given
    assert explained_variance(SAE.load_from_disk(tmp_path / "sae")) > 0.1


def test_a_whitening_in_another_basis_does_not_undo_a_fold(tmp_path: Path) -> None:
    run = checkpoints("topk")
    tensors = load_file(run.resumed / "activation_whitening.safetensors")
    signs = torch.tensor([1.0, -1.0]).repeat(D // 2)  # what eigenvectors are defined up to
    tensors["matrix"] *= signs
    tensors["inverse_matrix"] *= signs[:, None]
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UnclearStateError):
        fold_builtin_checkpoint(
            run.twice, tmp_path / "sae", whitening=tmp_path / "other.safetensors"
        )
    assert not (tmp_path / "sae").exists()


def test_without_a_whitening_activations_tell_a_plain_sae(tmp_path: Path) -> None:
    run = checkpoints("batchtopk")
    x = torch.cat([next(activations(seed=seed)) for seed in range(3, 11)])
    with pytest.raises(UnclearStateError, match="whitening or activations"):
        fold_builtin_checkpoint(run.final, tmp_path / "sae")
    assert fold_builtin_checkpoint(run.final, tmp_path / "sae", activations=x).state == "folded"
    with pytest.raises(UnclearStateError):
        fold_builtin_checkpoint(run.twice, tmp_path / "other", activations=x)
    TrainingSAE.load_from_disk(run.middle).save_model(tmp_path / "lost")
    for given in (None, x):
        with pytest.raises(FieldError, match="needs the whitening") as error:
            fold_builtin_checkpoint(tmp_path / "lost", tmp_path / "other", activations=given)
        assert error.value.field == "whitening"
    assert not (tmp_path / "other").exists()


def test_activations_prove_the_fold_where_there_are_some(tmp_path: Path) -> None:
    x = torch.cat([next(activations(seed=seed)) for seed in range(3, 6)])
    done = fold_builtin_checkpoint(checkpoints("jumprelu").middle, tmp_path / "sae", activations=x)
    check = done.sae.cfg.metadata.whitening["fold"]["check"]
    assert check["source"] == "given"
    assert 0 < check["n_activations"] <= 3 * BATCH  # clear before the last of them
    with pytest.raises(FieldError, match=r"shape \(n, 16\)"):
        fold_builtin_checkpoint(
            checkpoints("jumprelu").middle, tmp_path / "sae", activations=x[:, :-1]
        )


def test_a_whitening_that_changes_nothing_leaves_the_state_unclear(tmp_path: Path) -> None:
    run = checkpoints("standard")
    whitening = {"mean": torch.zeros(D), "matrix": torch.eye(D), "inverse_matrix": torch.eye(D)}
    save_file(whitening, tmp_path / "identity.safetensors")
    sae = load_builtin_checkpoint(run.final)
    assert diagnose(sae, load_builtin_whitening(tmp_path / "identity.safetensors")).state is None


def test_what_is_no_checkpoint_of_saelens_is_refused(tmp_path: Path) -> None:
    run = checkpoints("standard")
    with pytest.raises(FileNotFoundError, match=run.middle.name):  # names what is below
        fold_builtin_checkpoint(run.middle.parent, tmp_path / "sae")
    with pytest.raises(ValueError, match="the checkpoint itself"):
        fold_builtin_checkpoint(run.middle, run.middle)
    fold_builtin_checkpoint(run.middle, tmp_path / "sae")
    with pytest.raises(FoldError, match="folded by sae-whiten already"):
        fold_builtin_checkpoint(tmp_path / "sae", tmp_path / "again", whitening=run.middle)
    scaled: Any = TrainingSAE.load_from_disk(run.final)
    scaled.cfg.normalize_activations = "expected_average_only_in"
    scaled.save_model(tmp_path / "scaled")
    with pytest.raises(FoldError, match="no whitening to fold"):
        fold_builtin_checkpoint(tmp_path / "scaled", tmp_path / "again")
    (tmp_path / "scaled" / "sae_weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(CorruptFileError):
        fold_builtin_checkpoint(tmp_path / "scaled", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("damage", ["cut", "foreign", "shape", "inverse", "nan"])
def test_a_damaged_whitening_is_refused(damage: str, tmp_path: Path) -> None:
    source = checkpoints("standard").middle / "activation_whitening.safetensors"
    tensors = load_file(source)
    path = tmp_path / "activation_whitening.safetensors"
    if damage == "cut":
        path.write_bytes(source.read_bytes()[:-100])
    else:
        if damage == "foreign":
            tensors = {"W_enc": tensors["matrix"]}
        if damage == "shape":
            tensors["mean"] = tensors["mean"][:-1].clone()
        if damage == "inverse":
            tensors["matrix"][0, 0] += 1
        if damage == "nan":
            tensors["mean"][0] = float("nan")
        save_file(tensors, path)
    with pytest.raises(CorruptFileError, match=r"activation_whitening\.safetensors"):
        load_builtin_whitening(path)


def test_runners_of_one_and_of_several_saes(tmp_path: Path) -> None:
    given: Any = {"override_model": tiny_model(), "override_dataset": tiny_dataset()}
    common: dict[str, Any] = {
        "n_checkpoints": 1,
        "checkpoint_path": str(tmp_path / "checkpoints"),
        "output_path": str(tmp_path / "output"),
        "training_tokens": 128 * 16,
        "n_batches_for_norm_estimate": 8,
        "lr": 1e-2,
    }
    LanguageModelSAETrainingRunner(runner_config(**common), **given).run()
    (single,) = (tmp_path / "checkpoints").glob("*/*")
    assert fold_builtin_checkpoint(single, tmp_path / "single").state == "whitened"
    final = fold_builtin_checkpoint(tmp_path / "output", tmp_path / "final", whitening=single)
    assert final.state == "folded"
    sae = load_builtin_checkpoint(single)
    x = model_activations(sae, given["override_model"], given["override_dataset"], 500)
    assert x.shape == (500, 32)
    assert fold_builtin_checkpoint(single, tmp_path / "single", activations=x).state == "whitened"

    white: Any = {"normalize_activations": "covariance_whitening"}
    common["checkpoint_path"] = str(tmp_path / "several")
    config = MultiSAETrainingRunnerConfig(
        saes={
            name: TopKTrainingSAEConfig(d_in=32, d_sae=128, k=k, **white)
            for name, k in (("a", 4), ("b", 8))
        },
        hook_names="blocks.1.hook_resid_pre",
        **{**common, "context_size": 32, "train_batch_size_tokens": 128},
        store_batch_size_prompts=4,
        n_batches_in_buffer=16,
        logger=LoggingConfig(log_to_wandb=False),
    )
    MultiSAETrainingRunner(config, **given).run()
    (several,) = (tmp_path / "several").glob("*/*")
    with pytest.raises(FileNotFoundError, match=r"give one of .*/a, .*/b"):
        fold_builtin_checkpoint(several, tmp_path / "b")
    assert fold_builtin_checkpoint(several / "b", tmp_path / "b").state == "whitened"
    assert SAE.load_from_disk(tmp_path / "b").cfg.normalize_activations == "none"


def test_nothing_of_an_earlier_sae_stays_beside_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "sae_whiten").mkdir()
    earlier = ("cfg.json", "runner_cfg.json", "sae_whiten/whitening.safetensors", "notes.txt")
    for name in earlier:
        (tmp_path / name).write_text("{}")
    fold_builtin_checkpoint(checkpoints("topk").middle, tmp_path)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "notes.txt"}
    assert SAE.load_from_disk(tmp_path).cfg.architecture() == "topk"


# --- sae-whiten fold


def test_the_command_offers_all_states() -> None:
    from sae_whiten.cli import fold  # it lists them itself, so that --help need not import torch

    assert fold._STATES == STATES


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = checkpoints("topk")
    out = str(tmp_path / "sae")
    assert main(["-q", "fold", str(run.middle), "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "in whitened coordinates" in printed
    assert "folded-twice" in printed  # in the table
    assert "fold error" in printed
    assert explained_variance(SAE.load_from_disk(out)) > 0.1

    assert main(["-q", "fold", str(run.resumed), "--out", str(tmp_path / "no")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sae-whiten fold: error: --state: its config has")
    assert "Give the state: whitened, folded, folded-twice" in err
    assert not (tmp_path / "no").exists()

    whitening = ["--whitening", str(run.resumed)]
    assert main(["-q", "fold", str(run.twice), "--out", out, *whitening]) == 0
    assert "folded twice; the second fold is undone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n-activations", "9"], "--n-activations needs --cached-activations or --dataset-path"),
        (["--model-name", "m"], "--model-name needs --dataset-path"),
        (["--dataset-split", "validation"], "--dataset-split needs --dataset-path"),
        (["--cached-activations", "c", "--no-streaming"], "--no-streaming needs --dataset-path"),
    ],
)
def test_command_refuses_flags_of_activations_that_are_not_given(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-q", "fold", "checkpoint", "--out", str(tmp_path / "sae"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_command_with_cached_activations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    middle = checkpoints("topk").middle
    rows = torch.stack([next(activations(seed=seed)) for seed in range(3, 7)])
    cache = datasets.Dataset.from_dict({"a.hook": rows.tolist()})
    cache.save_to_disk(str(tmp_path / "cache"))
    sae = load_builtin_checkpoint(middle)
    assert torch.equal(cached_activations(sae, tmp_path / "cache", 200), rows.flatten(0, 1)[:200])
    command = ["-q", "fold", str(middle), "--out", str(tmp_path / "sae")]
    flags = ["--cached-activations", str(tmp_path / "cache"), "--n-activations", "200"]
    assert main([*command, *flags]) == 0
    assert "(of given activations)" in capsys.readouterr().out
    saved = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]["whitening"]
    assert saved["fold"]["check"]["n_activations"] == 200
    assert main([*command, *flags, "--dataset-path", "texts"]) == 2
    assert "give one of them" in capsys.readouterr().err
