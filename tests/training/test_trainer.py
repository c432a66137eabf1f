import copy
import inspect
import json
import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    LoggingConfig,
    MatchingPursuitTrainingSAE,
    MatchingPursuitTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_whiten import (
    CorruptFileError,
    CovarianceWhiteningScaler,
    FoldError,
    NonFiniteActivationsError,
    WhiteningConfig,
    WhiteningTrainer,
    fold_whitening_into_weights,
)
from sae_whiten.estimation.distributed import Processes
from sae_whiten.evaluation.sharing import model_card
from sae_whiten.training.checkpoint import TRAINING_STATE_DIR, loadable_folder
from sae_whiten.training.data_parallel import SharedBatchTopK, SharedStream
from sae_whiten.training.stream import ActivationStream, DataExhaustedError, StopRequested
from sae_whiten.training.training_sae import enter_whitened_space, plain_copy, set_whitening
from tests.support import ARCHITECTURES, friendly, nasty, training_sae, whitening_of

D, BATCH, STEPS = 16, 64, 30
BUILT_IN = WhiteningConfig(loss_space="whitened", eps_mode="absolute", eps=1e-3)


def batches(
    n: int | None = None, seed: int = 0, start: int = 0, data: Any = nasty
) -> Iterator[Tensor]:
    """`n` batches (None: without end) of one distribution."""
    x = data(BATCH, D)
    mean = x.mean(0)
    i = start
    while n is None or i < n:
        g = torch.Generator().manual_seed(1000 * seed + i)
        weights = torch.randn(BATCH, BATCH, generator=g) / BATCH**0.5
        yield weights @ (x - mean) + mean
        i += 1


def trainer_config(**options: Any) -> SAETrainerConfig:
    defaults: dict[str, Any] = {
        "total_training_samples": BATCH * STEPS,
        "train_batch_size_samples": BATCH,
        "lr": 1e-3,
        "lr_end": 1e-4,
        "dead_feature_window": 5,  # so that auxiliary losses take part
        "feature_sampling_window": 7,
    }
    return SAETrainerConfig(**{**defaults, **options})


def fit(
    sae=None, whitening: WhiteningConfig | None = None, data=None, **options: Any
) -> tuple[Any, WhiteningTrainer]:
    sae = training_sae("topk", D, 64) if sae is None else sae
    trainer = WhiteningTrainer(
        trainer_config(**options), sae, data or batches(), whitening or WhiteningConfig()
    )
    return trainer.fit(), trainer


def state(sae) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in sae.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def explained_variance(sae, x: Tensor) -> float:
    with torch.no_grad():
        return float(1 - (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())


def weights_before_fold(trainer: SAETrainer[Any, Any]) -> dict[str, Tensor]:
    """Train, and return the weights in whitened coordinates."""
    weights: dict[str, Tensor] = {}
    fold = trainer.sae.fold_activation_whitening

    def fold_activation_whitening(**kwargs: Any) -> None:
        weights.update(state(trainer.sae))
        fold(**kwargs)

    trainer.sae.fold_activation_whitening = fold_activation_whitening
    trainer.fit()
    return weights


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_built_ins_run_is_reproduced_step_for_step(architecture, autocast):
    """Own statistics on either side, same seed, same data: the same weights."""
    n_estimate = 10
    built_in = SAETrainer(
        trainer_config(n_batches_for_norm_estimate=n_estimate, autocast=autocast),
        training_sae(architecture, D, 64, seed=3),
        # it throws away what it estimates from
        iter([*batches(n_estimate, data=friendly), *batches(STEPS, data=friendly)]),
    )
    ours = WhiteningTrainer(
        trainer_config(autocast=autocast),
        training_sae(architecture, D, 64, seed=3),
        batches(data=friendly),
        replace(BUILT_IN, n_samples=n_estimate * BATCH),
    )
    expected, found = weights_before_fold(built_in), weights_before_fold(ours)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if autocast:
            # bfloat16 products: a difference in the last bit of float32 may round otherwise
            assert (found[name] - value).norm() / value.norm() < 1e-2, name
        else:
            assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_under_the_same_transform_the_run_is_the_built_ins(architecture):
    # sparse steps and a fused Adam round otherwise; in float64 no selection depends on that
    def sae():
        return training_sae(architecture, D, 128, dtype="float64")

    def doubles() -> Iterator[Tensor]:
        return (batch.double() for batch in batches())

    ours = WhiteningTrainer(trainer_config(), sae(), doubles(), BUILT_IN)
    found = weights_before_fold(ours)
    built_in = SAETrainer(trainer_config(), sae(), doubles())
    built_in.activation_scaler = CovarianceWhiteningScaler(BUILT_IN)
    built_in.activation_scaler.whitening = ours.whitening
    torch.testing.assert_close(found, weights_before_fold(built_in), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_result_is_a_plain_proved_sae(architecture):
    sae = training_sae(architecture, D, 64)
    stock = type(sae)
    result, trainer = fit(sae)
    assert result is sae
    assert type(sae) is stock
    assert sae.cfg.normalize_activations == "none"
    record = sae.cfg.metadata.whitening
    assert trainer.whitening is not None
    assert record["n_samples"] == trainer.whitening.n_samples
    # the provider could have repeated its batches
    assert record["fold"]["check"]["source"] == "next"
    assert record["fold"]["check"]["fold_error"] <= record["fold"]["check"]["tolerance"]
    assert explained_variance(sae, next(batches(seed=9))) > 0.1


def test_estimation_hands_its_activations_on_to_training():
    drawn: list[Tensor] = []

    def recorded() -> Iterator[Tensor]:
        for batch in batches():
            drawn.append(batch)
            yield batch

    trainer = WhiteningTrainer(trainer_config(), training_sae("topk", D, 64), recorded())
    trained_on: list[Tensor] = []
    step = trainer.step
    trainer.step = lambda batch: (trained_on.append(batch), step(batch))[1]
    trainer.fit()
    assert trainer.whitening is not None
    assert len(trained_on) == STEPS > trainer.whitening.n_samples / BATCH
    assert all(torch.equal(a, b) for a, b in zip(drawn, trained_on, strict=False))
    assert len(drawn) == STEPS + 1  # and one more to prove the fold on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_looked_at_beforehand_is_served_unchanged(dtype):
    source = [torch.randn(5, 4).to(dtype) for _ in range(7)]
    stream = ActivationStream(iter(source), 4, "raise")
    ahead = stream.lookahead()
    assert all(torch.equal(next(ahead), batch) for batch in source[:3])
    served = [next(stream) for _ in range(7)]
    assert all(torch.equal(a, b) for a, b in zip(served, source, strict=True))
    with pytest.raises(DataExhaustedError, match="after 7 batches"):
        next(stream)


def test_spilling_to_disk_changes_nothing(monkeypatch):
    monkeypatch.setattr("sae_whiten.training.spool._IN_MEMORY", 100)
    reference = state(fit()[0])
    monkeypatch.undo()
    assert equal(reference, state(fit()[0]))


def test_no_object_of_the_user_is_changed():
    config = trainer_config(lr_end=None)
    sae = training_sae("topk", D, 64)
    sae_config = sae.cfg
    before = copy.deepcopy(config), copy.deepcopy(sae_config.to_dict())
    whitening = WhiteningConfig()
    WhiteningTrainer(config, sae, batches(), whitening).fit()
    assert (config, sae_config.to_dict()) == before
    # and so the same config object serves a second SAE
    second = type(sae)(sae_config)
    WhiteningTrainer(config, second, batches(), whitening).fit()
    assert second.cfg.normalize_activations == "none"
    assert sae.cfg is not second.cfg


def test_logged_explained_variance_is_that_of_the_original_space():
    trainer = WhiteningTrainer(trainer_config(), training_sae("topk", D, 64), batches())
    trainer.estimate_whitening()
    x = next(trainer.stream)
    output: TrainStepOutput = trainer.step(x)
    log = trainer.build_train_step_log_dict(output, n_training_samples=BATCH)
    x_hat = trainer.scaler.unscale(output.sae_out)
    expected = 1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert log["metrics/explained_variance"] == pytest.approx(float(expected), abs=1e-3)
    z = output.sae_in
    whitened = 1 - (z - output.sae_out).square().sum() / (z - z.mean(0)).square().sum()
    assert abs(log["metrics/explained_variance"] - float(whitened)) > 0.01
    assert log["metrics/l0"] == pytest.approx(8, abs=0.5)


def test_the_original_space_objective_keeps_more_variance_than_the_whitened_one():
    options = {"total_training_samples": BATCH * 150, "lr": 3e-3}
    x = torch.cat(list(batches(5, seed=9)))
    original, _ = fit(whitening=WhiteningConfig(), **options)
    whitened, _ = fit(whitening=WhiteningConfig(loss_space="whitened"), **options)
    assert explained_variance(original, x) > explained_variance(whitened, x) + 0.02


@pytest.mark.parametrize(
    ("n_batches", "n_samples", "message"),
    [
        (0, None, "after 0 activations in 0 batches.*needs about 1600"),
        (3, 1000, "after 192 activations in 3 batches.*needs 1000"),
        (25, None, "after 25 batches, before training, which needs 30"),
    ],
)
def test_a_provider_that_ends_too_early_says_how_much_was_needed(n_batches, n_samples, message):
    with pytest.raises(ValueError, match=message):
        fit(data=batches(n_batches), whitening=WhiteningConfig(n_samples=n_samples))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are drawn one ahead, as where looking at one would make a GPU wait."""
    monkeypatch.setattr("sae_whiten.training.stream._waits_for", lambda batch: True)


def test_batches_drawn_ahead_are_served_as_they_were(as_on_a_gpu):
    source = [torch.randn(5, 4) for _ in range(7)]
    memory = torch.empty(5, 4)
    # a provider that writes every batch into the same memory, and fails at the end
    stream = ActivationStream(map(memory.copy_, source), 4, "raise")
    for batch in source:
        assert torch.equal(next(stream), batch)
    with pytest.raises(DataExhaustedError, match="after 7 batches"):
        next(stream)


def test_an_error_met_when_drawing_ahead_is_raised_in_its_place(as_on_a_gpu):
    def failing() -> Iterator[Tensor]:
        yield torch.randn(5, 4)
        raise OSError("disk")

    stream = ActivationStream(failing(), 4, "raise")
    assert next(stream).shape == (5, 4)
    with pytest.raises(OSError, match="disk"):
        next(stream)
    assert stream.n_served == 1


def test_no_more_is_drawn_ahead_than_training_wants(as_on_a_gpu):
    drawn = []
    source = (drawn.append(i) or torch.randn(5, 4) for i in range(9))
    stream = ActivationStream(source, 4, "raise", n_wanted=3)
    for _ in range(3):
        next(stream)
    assert len(drawn) == 3
    assert stream.held_out() is not None


@pytest.mark.parametrize("drawn_ahead", [False, True])
def test_a_nan_stops_training_before_it_reaches_the_weights(drawn_ahead, request):
    if drawn_ahead:
        request.getfixturevalue("as_on_a_gpu")

    def poisoned() -> Iterator[Tensor]:
        for i, batch in enumerate(batches()):
            if i == 27:
                batch[3, 2] = float("nan")
            yield batch

    trainer = WhiteningTrainer(trainer_config(), training_sae("topk", D, 64), poisoned())
    with pytest.raises(NonFiniteActivationsError, match=r"training batch 27 .* the first in row 3"):
        trainer.fit()
    assert trainer.n_training_steps == 27
    assert all(torch.isfinite(p).all() for p in trainer.sae.parameters())
    sae, trainer = fit(whitening=WhiteningConfig(on_nonfinite="skip"), data=poisoned())
    assert trainer.stream.n_skipped == 1
    assert all(torch.isfinite(p).all() for p in sae.parameters())


@pytest.mark.parametrize("shape", [(BATCH, D + 1), (BATCH, 3, D // 2), (BATCH // 2, 2 * D)])
def test_batches_of_another_width_are_refused(shape):
    data = iter([torch.randn(shape) for _ in range(100)])
    with pytest.raises(ValueError, match=f"d_in={D}"):
        fit(data=data)


def test_hook_z_batches_train_and_scale():
    data = (batch.reshape(BATCH, 4, D // 4) for batch in batches())
    from_heads, trainer = fit(data=data)
    flat, _ = fit()
    assert equal(state(from_heads), state(flat))
    scaler = CovarianceWhiteningScaler()
    scaler.whitening = trainer.whitening
    x = next(batches())
    heads = x.reshape(BATCH, 4, D // 4)
    assert torch.equal(scaler.scale(heads).reshape(BATCH, D), scaler.scale(x))
    assert scaler.unscale(scaler.scale(heads)).shape == heads.shape


def test_the_progress_bar_moves_in_runs_of_few_steps(monkeypatch):
    shown = []
    update = WhiteningTrainer._update_pbar

    def note(trainer, step_output, pbar):
        update(trainer, step_output, pbar)
        shown.append((pbar.n, str(pbar.desc)))

    monkeypatch.setattr(WhiteningTrainer, "_update_pbar", note)
    fit()
    assert [n for n, _ in shown] == [BATCH * (i + 1) for i in range(STEPS)]
    assert len({text for _, text in shown}) >= 10  # losses, and the step that they are of


@pytest.mark.parametrize("setting", ["none", "layer_norm", "expected_average_only_in"])
def test_an_sae_that_does_not_ask_for_whitening_is_refused(setting):
    sae = training_sae("standard", D, 64, normalize_activations=setting)
    with pytest.raises(ValueError, match="covariance_whitening"):
        WhiteningTrainer(trainer_config(), sae, batches())


def test_an_architecture_that_cannot_be_folded_is_refused_at_construction():
    sae = MatchingPursuitTrainingSAE(MatchingPursuitTrainingSAEConfig(d_in=D, d_sae=64))
    sae.cfg.normalize_activations = "covariance_whitening"
    with pytest.raises(FoldError, match="tied to the decoder"):
        WhiteningTrainer(trainer_config(), sae, batches())


def test_fitting_again_is_refused():
    sae, trainer = fit()
    before = state(sae)
    with pytest.raises(ValueError, match="folded already"):
        trainer.fit()
    assert equal(before, state(sae))


def test_fitting_again_is_refused_though_the_final_checkpoint_could_not_be_saved(
    tmp_path, monkeypatch
):
    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(WhiteningTrainer, "save_checkpoint", fail)
    cfg = trainer_config(
        total_training_samples=2 * BATCH, save_final_checkpoint=True, checkpoint_path=tmp_path
    )
    trainer = WhiteningTrainer(
        cfg, training_sae("topk", D, 64), batches(), WhiteningConfig(n_samples=4 * BATCH)
    )
    with pytest.raises(OSError, match="no room"):
        trainer.fit()
    with pytest.raises(ValueError, match="folded already"):
        trainer.fit()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_is_a_plain_sae_and_resumes_to_the_bit(architecture, tmp_path):
    sae = training_sae(architecture, D, 128)
    reference, _ = fit(sae, n_checkpoints=3, save_final_checkpoint=True, checkpoint_path=tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert len(names) == 4
    for name in names:
        plain = SAE.load_from_disk(loadable_folder(tmp_path / name))
        assert plain.cfg.normalize_activations == "none"
        resumed_sae = training_sae(architecture, D, 128, seed=5)
        trainer = WhiteningTrainer(trainer_config(), resumed_sae, iter(()))
        trainer.load_trainer_state(tmp_path / name)
        assert trainer.optimizer.param_groups[0]["fused"]
        trainer.stream.source = batches(start=trainer.stream.n_served)
        # the plain SAE computes what the one being trained does
        x = next(batches(seed=9))
        if architecture not in ("batchtopk", "matryoshka_batchtopk"):  # saved with a threshold
            whitening = trainer.whitening
            assert whitening is not None
            with torch.no_grad():
                expected = whitening.dewhiten(resumed_sae(whitening.whiten(x)))
                error = (plain(x) - expected).norm() / (x - x.mean(0)).norm()
            assert error < 1e-2 / D  # one near tie in the batch
        assert equal(state(trainer.fit()), state(reference))
        assert resumed_sae.cfg.metadata.l0 == reference.cfg.metadata.l0


def test_resuming_the_final_checkpoint_with_more_steps_equals_a_longer_run(tmp_path):
    longer, _ = fit(total_training_samples=BATCH * 2 * STEPS)
    fit(save_final_checkpoint=True, checkpoint_path=tmp_path)
    trainer = WhiteningTrainer(
        trainer_config(total_training_samples=BATCH * 2 * STEPS),
        training_sae("topk", D, 64, seed=5),
        batches(start=STEPS),
    )
    trainer.load_trainer_state(next(tmp_path.iterdir()))
    assert equal(state(trainer.fit()), state(longer))


def test_saving_in_the_middle_of_training_gives_a_plain_sae(tmp_path):
    sae = training_sae("topk", D, 64)
    trainer = WhiteningTrainer(trainer_config(), sae, batches())
    trainer.estimate_whitening()
    for _ in range(10):
        trainer.step(next(trainer.stream))
    before = state(sae)
    sae.save_inference_model(tmp_path)
    assert equal(before, state(sae))
    plain = SAE.load_from_disk(tmp_path)
    x = next(batches(seed=9))
    expected = trainer.scaler.unscale(sae(trainer.scaler.scale(x)))
    assert explained_variance(plain, x) == pytest.approx(
        float(1 - (x - expected).square().sum() / (x - x.mean(0)).square().sum()), abs=1e-3
    )


def checkpoint(tmp_path: Path) -> Path:
    fit(n_checkpoints=1, checkpoint_path=tmp_path)
    return next(tmp_path.iterdir())


@pytest.mark.parametrize(
    "file",
    [
        "activation_whitening.safetensors",
        "activation_scaler.json",
        "training_weights.safetensors",
        "progress.safetensors",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, file, damage):
    path = checkpoint(tmp_path) / TRAINING_STATE_DIR / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    trainer = WhiteningTrainer(trainer_config(), training_sae("topk", D, 64), batches())
    with pytest.raises((FileNotFoundError, CorruptFileError), match=file):
        trainer.load_trainer_state(path.parent.parent)


def test_resuming_under_another_configuration_or_sae_is_refused(tmp_path):
    path = checkpoint(tmp_path)
    zca = WhiteningConfig(kind="zca")
    trainer = WhiteningTrainer(trainer_config(), training_sae("topk", D, 64), batches(), zca)
    with pytest.raises(ValueError, match=r"kind='pca' \(now 'zca'\)"):
        trainer.load_trainer_state(path)
    trainer = WhiteningTrainer(trainer_config(), training_sae("topk", D, 32), batches())
    with pytest.raises(ValueError, match=r"d_sae=64 \(now 32\)"):
        trainer.load_trainer_state(path)


def test_a_checkpoint_of_saelens_own_trainer_is_refused(tmp_path):
    SAETrainer(
        trainer_config(n_checkpoints=1, checkpoint_path=tmp_path, n_batches_for_norm_estimate=30),
        training_sae("topk", D, 64),
        batches(),
    ).fit()
    trainer = WhiteningTrainer(trainer_config(), training_sae("topk", D, 64), batches())
    with pytest.raises(FileNotFoundError, match="not a checkpoint of WhiteningTrainer"):
        trainer.load_trainer_state(next(tmp_path.iterdir()))


def test_stock_saelens_does_not_resume_our_checkpoint_as_if_it_were_its_own(tmp_path):
    stock = SAETrainer(trainer_config(), training_sae("topk", D, 64), batches())
    with pytest.raises(FileNotFoundError):
        stock.load_trainer_state(checkpoint(tmp_path))


def test_a_fold_that_fails_its_proof_is_an_error_and_both_forms_are_kept(
    tmp_path, monkeypatch, caplog
):
    from sae_whiten.architectures import folding

    monkeypatch.setattr(folding.FoldCheck, "passed", False)
    sae = training_sae("topk", D, 64)
    with caplog.at_level(logging.INFO, "sae_whiten"), pytest.raises(FoldError) as caught:
        fit(sae, checkpoint_path=tmp_path)
    (path,) = tmp_path.iterdir()
    assert str(path) in str(caught.value)
    assert sae.cfg.normalize_activations == "covariance_whitening"
    assert SAE.load_from_disk(path).cfg.normalize_activations == "none"
    monkeypatch.undo()
    trainer = WhiteningTrainer(trainer_config(), training_sae("topk", D, 64, seed=5), batches())
    trainer.load_trainer_state(path)
    assert equal(state(trainer.sae), state(sae))


def test_fold_error_is_logged_and_recorded(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "sae_whiten"):
        sae, _ = fit(save_final_checkpoint=True, checkpoint_path=tmp_path)
    error = sae.cfg.metadata.whitening["fold"]["check"]["fold_error"]
    assert f"error {error:.1e}" in caplog.text
    explained = sae.cfg.metadata.explained_variance
    assert explained == pytest.approx(explained_variance(sae, next(batches(start=STEPS))), abs=0.1)
    assert f"explained variance {explained:.3f}, L0 {sae.cfg.metadata.l0:.1f}" in caplog.text
    saved = json.loads((next(tmp_path.iterdir()) / "cfg.json").read_text())
    assert saved["metadata"]["whitening"]["fold"]["check"]["fold_error"] == error
    assert saved["metadata"]["explained_variance"] == explained


def test_dead_latents_are_counted_only_if_a_latent_could_count_as_dead(tmp_path, caplog):
    caplog.set_level(logging.INFO, "sae_whiten")
    sae, _ = fit(dead_feature_window=STEPS - 1)
    assert f"{sae.cfg.metadata.num_dead_features} of 64 latents dead" in caplog.text
    caplog.clear()
    sae, _ = fit(dead_feature_window=STEPS)
    assert f"not known (no more steps than dead_feature_window={STEPS}; sae-whiten" in caplog.text
    assert "num_dead_features" not in sae.cfg.metadata
    sae.save_inference_model(tmp_path)
    assert "dead latents" not in model_card(tmp_path, "me/sae", "sae")


def test_a_kill_while_a_checkpoint_is_written_leaves_no_half_of_it(tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    def die(*args: Any, **kwargs: Any) -> None:
        raise KilledError

    monkeypatch.setattr("sae_whiten.training.checkpoint.save_tensors", die)
    with pytest.raises(KilledError):
        fit(n_checkpoints=1, checkpoint_path=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_scaler_alone_saves_and_loads(tmp_path):
    _, trainer = fit()
    scaler = CovarianceWhiteningScaler()
    scaler.whitening = trainer.whitening
    scaler.save(str(tmp_path / "scaler.json"))
    loaded = CovarianceWhiteningScaler()
    loaded.load(tmp_path / "scaler.json")
    x = next(batches())
    assert torch.equal(loaded.scale(x), scaler.scale(x))
    with pytest.raises(ValueError, match=r"\.json"):
        scaler.save(str(tmp_path / "scaler.txt"))
    (tmp_path / "activation_whitening.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="activation_whitening"):
        CovarianceWhiteningScaler().load(tmp_path / "scaler.json")


def test_a_stock_scaler_reads_our_file(tmp_path):
    _, trainer = fit()
    scaler = CovarianceWhiteningScaler()
    scaler.whitening = trainer.whitening
    scaler.save(str(tmp_path / "scaler.json"))
    stock = ActivationScaler()
    stock.load(tmp_path / "scaler.json")
    x = next(batches()).double()
    assert torch.allclose(stock.scale(x), scaler.scale(x))


def test_a_provider_that_fails_after_the_last_step_does_not_cost_the_sae(caplog):
    def breaks_off() -> Iterator[Tensor]:
        yield from batches(STEPS)
        raise ConnectionError("the hub is gone")

    sae, _ = fit(data=breaks_off())
    assert "data provider failed" in caplog.text
    assert sae.cfg.metadata.whitening["fold"]["check"]["source"] == "training"


def test_data_that_end_with_the_tolerance_reached_are_enough():
    config = WhiteningConfig(tolerance=0.05)
    scaler = CovarianceWhiteningScaler(config)
    # between two looks, at 20 and at 24 per dimension, of which the first sees more than 5%
    scaler.estimate_whitening(D, batches(n=6, data=nasty))
    assert scaler.whitening is not None
    assert scaler.whitening.n_samples == 6 * BATCH


def test_an_interrupted_sae_folded_by_hand_is_a_stock_sae(tmp_path):
    sae = training_sae("topk", D, 64)
    stock = type(sae)
    trainer = WhiteningTrainer(trainer_config(), sae, batches())
    trainer.estimate_whitening()
    trainer.step(next(trainer.stream))
    assert trainer.whitening is not None
    fold_whitening_into_weights(sae, trainer.whitening)
    assert type(sae) is stock
    sae.save_inference_model(tmp_path)
    assert SAE.load_from_disk(tmp_path).cfg.normalize_activations == "none"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_saes_train_on_float32_activations(architecture):
    sae, _ = fit(training_sae(architecture, D, 64, dtype="bfloat16"))
    assert sae.W_enc.dtype == torch.float32
    assert sae.cfg.metadata.whitening["fold"]["dtype"] == "bfloat16"


def test_activations_that_do_not_vary_are_one_clear_error():
    data = (torch.ones(BATCH, D) for _ in range(100))
    with pytest.raises(ValueError, match="activations are the same"):
        fit(data=data)


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        (torch.zeros(64, 32), r"got Tensor: pass iter\(x\.split\(batch_size\)\)"),
        ([torch.zeros(64, 32)], r"got list: pass iter\(\.\.\.\) of it"),
        (None, "got NoneType: pass one"),
    ],
)
def test_a_provider_that_is_no_iterator_is_refused_by_its_type(provider: Any, message: str) -> None:
    # without the check of annotations that tests run with, as users have it
    construct = inspect.unwrap(WhiteningTrainer.__init__)
    sae = training_sae("topk")
    before = type(sae)
    with pytest.raises(TypeError, match=message):
        construct(object.__new__(WhiteningTrainer), trainer_config(), sae, data_provider=provider)
    assert type(sae) is before


def test_a_trainer_can_be_annotated_with_its_sae_and_config():
    trainer: WhiteningTrainer[TopKTrainingSAE, TopKTrainingSAEConfig] = WhiteningTrainer[
        TopKTrainingSAE, TopKTrainingSAEConfig
    ](trainer_config(), training_sae("topk", D, 64), batches())  # pyright: ignore[reportArgumentType]
    assert isinstance(trainer.fit(), TopKTrainingSAE)


def test_state_saved_before_there_is_a_whitening_is_refused_and_nothing_written(tmp_path):
    trainer = WhiteningTrainer(trainer_config(), training_sae("topk", D, 64), batches())
    with pytest.raises(ValueError, match=r"estimate_whitening\(\)"):
        trainer.save_trainer_state(tmp_path / "state")
    with pytest.raises(FoldError, match="not been estimated"):
        trainer.save_checkpoint("early", base_path=tmp_path)
    assert not list(tmp_path.iterdir())


def test_state_is_saved_under_a_whitening_that_was_estimated_by_hand(tmp_path):
    """As a user does who calls SAELens' scaler, and then only folds."""
    trainer = WhiteningTrainer(trainer_config(), training_sae("topk", D, 64), batches())
    trainer.scaler.estimate_whitening(D, batches(seed=1))
    assert trainer.scaler.whitening is not None
    trainer.save_trainer_state(tmp_path)
    resumed = WhiteningTrainer(trainer_config(), training_sae("topk", D, 64), batches(seed=2))
    resumed.load_trainer_state(tmp_path)
    assert resumed.whitening is not None
    assert resumed.whitening.digest == trainer.scaler.whitening.digest


def test_a_checkpoint_saved_after_training_is_the_plain_sae_and_is_not_resumed(tmp_path, caplog):
    """The weights are folded by then: resumed as whitened ones they would be of another space."""
    sae, trainer = fit(checkpoint_path=str(tmp_path / "of_training"))
    trainer.save_checkpoint("late", base_path=tmp_path)
    assert equal(state(SAE.load_from_disk(tmp_path / "late")), state(sae))
    assert not (tmp_path / "late" / TRAINING_STATE_DIR).exists()
    assert "save_final_checkpoint=True" in caplog.text
    with pytest.raises(ValueError, match="folded already"):
        trainer.save_trainer_state(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_a_step_taken_by_hand_is_taken_in_whitened_space():
    def trainer() -> WhiteningTrainer[Any, Any]:
        return WhiteningTrainer(trainer_config(), training_sae("topk", D, 64), batches())

    expected, by_hand, batch = trainer(), trainer(), next(batches(seed=1))
    expected.estimate_whitening()
    for each in (expected, by_hand):
        each.step(batch)
    assert equal(state(expected.sae), state(by_hand.sae))


def test_a_checkpoint_has_no_sparsity_before_any_is_counted(tmp_path):
    cfg = trainer_config(checkpoint_path=str(tmp_path))
    trainer = WhiteningTrainer(cfg, training_sae("topk", D, 64), batches())
    trainer.estimate_whitening()
    trainer.save_checkpoint("before")
    trainer.step(next(trainer.stream))
    trainer.save_checkpoint("after")
    assert [path.parent.name for path in tmp_path.glob("*/sparsity.safetensors")] == ["after"]


def test_a_trainer_that_is_stopped_leaves_a_checkpoint_and_goes_on_to_the_bit(tmp_path, caplog):
    def stopping(data: Iterator[Tensor]) -> Iterator[Tensor]:
        for i, batch in enumerate(data):
            if i == 20:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    whitening = WhiteningConfig(n_samples=10 * BATCH)
    expected = state(fit(whitening=whitening)[0])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(whitening=whitening, data=stopping(batches()), checkpoint_path=str(tmp_path))
    assert signal.getsignal(signal.SIGINT) is handler
    (checkpoint,) = tmp_path.iterdir()
    assert f"load_trainer_state('{checkpoint}')" in caplog.text
    n_served = int(checkpoint.name) // BATCH
    resumed = WhiteningTrainer(
        trainer_config(), training_sae("topk", D, 64), batches(start=n_served), whitening
    )
    resumed.load_trainer_state(checkpoint)
    assert resumed.stream.n_served == n_served
    assert equal(state(resumed.fit()), expected)


def test_a_stopped_trainer_goes_on_when_fit_is_called_again(tmp_path):
    whitening = WhiteningConfig(n_samples=10 * BATCH)
    expected = state(fit(whitening=whitening)[0])

    def stopping() -> Iterator[Tensor]:
        for i, batch in enumerate(batches()):
            if i == 20:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    trainer = WhiteningTrainer(
        trainer_config(checkpoint_path=str(tmp_path)),
        training_sae("topk", D, 64),
        stopping(),
        whitening,
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert equal(state(trainer.fit()), expected)


def test_an_sae_of_an_unfinished_trainer_is_not_trained_on_in_another_basis(tmp_path):
    sae = training_sae("topk", D, 64)
    first = WhiteningTrainer(trainer_config(), sae, batches(n=20))
    with pytest.raises(DataExhaustedError):
        first.fit()
    first.save_checkpoint("unfinished", base_path=tmp_path)
    weights = state(sae)

    second = WhiteningTrainer(trainer_config(), sae, batches(seed=1))
    with pytest.raises(ValueError, match="trained under another whitening"):
        second.fit()
    second = WhiteningTrainer(trainer_config(), sae, batches(seed=1))
    second.scaler.whitening = whitening_of(next(batches(seed=1)))
    with pytest.raises(ValueError, match="trained under another whitening"):
        second.fit()
    assert equal(state(sae), weights)

    # under its own it goes on, and so it does with the weights of a checkpoint
    second = WhiteningTrainer(trainer_config(), sae, batches(seed=1))
    second.scaler.whitening = first.whitening
    second.fit()
    used = training_sae("topk", D, 64)
    other = WhiteningTrainer(trainer_config(), used, batches(n=20, seed=2))
    with pytest.raises(DataExhaustedError):
        other.fit()
    resumed = WhiteningTrainer(trainer_config(), used, batches(seed=1))
    resumed.load_trainer_state(tmp_path / "unfinished")
    resumed.fit()


def test_the_config_decides_the_loss_under_a_whitening_that_was_set_by_hand():
    x = torch.cat([batch for _, batch in zip(range(10), batches(seed=3), strict=False)])
    config = WhiteningConfig(loss_space="whitened")

    def trained(whitening: WhiteningConfig) -> dict[str, Tensor]:
        trainer = WhiteningTrainer(trainer_config(), training_sae("topk", D, 64), batches(), config)
        trainer.scaler.whitening = whitening_of(x, whitening)
        sae = trainer.fit()
        assert sae.cfg.metadata.whitening["config"]["loss_space"] == "whitened"
        return state(sae)

    assert equal(trained(WhiteningConfig(loss_space="original")), trained(config))
    with pytest.raises(ValueError, match="kind='zca', and kind='pca' is asked for"):
        trained(WhiteningConfig(kind="zca"))


def test_a_whitening_of_other_activations_is_warned_about(caplog):
    config = WhiteningConfig(n_samples=1000)
    right = WhiteningTrainer(trainer_config(), training_sae("topk", D, 64), batches(), config)
    right.fit()
    assert "other activations" not in caplog.text
    wrong = WhiteningTrainer(trainer_config(), training_sae("topk", D, 64), batches(), config)
    assert right.whitening is not None
    wrong.scaler.whitening = replace(right.whitening, mean=right.whitening.mean + 1000)
    wrong.fit()
    assert "its statistics seem to be of other activations" in caplog.text


def test_l0_is_counted_over_the_rows_that_batches_have(caplog):
    def of_half_the_size() -> Iterator[Tensor]:
        for batch in batches():
            yield from batch.split(BATCH // 2)

    sae, _ = fit(training_sae("topk", D, 64), data=of_half_the_size())
    assert sae.cfg.metadata.l0 == pytest.approx(fit()[0].cfg.metadata.l0, rel=0.05)
    assert "batches of 32 activations, and train_batch_size_samples is 64" in caplog.text


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk"])
def test_metadata_are_of_the_sae_that_is_saved(architecture, tmp_path, monkeypatch):
    held_out = []
    original = ActivationStream.held_out_or_last

    def seen(self: ActivationStream) -> tuple[Tensor | None, str]:
        held_out.append(original(self)[0])
        return held_out[-1], "held-out"

    monkeypatch.setattr(ActivationStream, "held_out_or_last", seen)
    sae, _ = fit(training_sae(architecture, D, 64))
    sae.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    (x,) = held_out
    latents = saved.encode(x)
    error = (saved.decode(latents) - x).double().square().sum()
    total = (x - x.mean(0)).double().square().sum()
    metadata = saved.cfg.metadata
    assert metadata.explained_variance == pytest.approx(float(1 - error / total), abs=1e-4)
    if architecture != "topk":
        assert metadata.l0 == float((latents != 0).sum() / len(x))


def test_a_copy_of_an_sae_of_several_processes_selects_alone():
    sae: Any = training_sae("batchtopk", D, 64)
    enter_whitened_space(sae)
    set_whitening(sae, whitening_of(next(batches())))
    sae.activation_fn = SharedBatchTopK(8.0, SharedStream(Processes(alone=True), batches(), d_in=D))
    assert sae.whitening is not None
    copied: Any = plain_copy(sae, sae.whitening)
    assert type(copied.activation_fn) is BatchTopK
    assert copied.activation_fn.k == 8
    assert isinstance(sae.activation_fn, SharedBatchTopK)


class WithAPenalty(GatedTrainingSAE):
    def calculate_aux_loss(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        losses = super().calculate_aux_loss(*args, **options)
        return {**losses, "penalty": self.W_dec.square().mean()}


class WithAnEncoder(GatedTrainingSAE):
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts, hidden = super().encode_with_hidden_pre(x)
        return 0.5 * acts, hidden


def test_a_subclass_whose_loss_would_be_replaced_is_refused():
    cfg = GatedTrainingSAEConfig(d_in=D, d_sae=64, normalize_activations="covariance_whitening")
    with pytest.raises(ValueError, match=r"WithAPenalty\.calculate_aux_loss would have no effect"):
        WhiteningTrainer(trainer_config(), WithAPenalty(cfg), batches())
    WhiteningTrainer(trainer_config(), WithAnEncoder(cfg), batches())  # has an effect


@pytest.mark.parametrize(
    ("architecture", "strength", "unit", "warned"),
    [
        ("standard", 0.5, 1e4, True),
        ("standard", 0.5, 1e-4, True),
        ("standard", 1.0, 1e4, False),
        ("topk", 0.5, 1e4, False),  # has no coefficient
    ],
)
def test_with_less_strength_a_coefficient_depends_on_the_unit(
    architecture, strength, unit, warned, caplog
):
    trainer = WhiteningTrainer(
        trainer_config(),
        training_sae(architecture, D, 64),
        (unit * batch for batch in batches(data=friendly)),
        WhiteningConfig(strength=strength, loss_space="whitened"),
    )
    trainer.estimate_whitening()
    assert ("it by a sweep at this hook" in caplog.text) == warned


def test_stopping_in_an_evaluation_waits_for_its_end(monkeypatch):
    """In the middle of a step there is nothing that could be resumed."""
    log = LoggingConfig(log_to_wandb=True, wandb_log_frequency=5, eval_every_n_wandb_logs=1)
    monkeypatch.setattr("wandb.log", lambda values, step: None)
    finished = []

    def evaluator(sae: Any, data_provider: Any, activation_scaler: Any) -> dict[str, Any]:
        trainer.stream.request_stop()
        next(data_provider)
        finished.append(trainer.n_training_steps)
        return {}

    trainer = WhiteningTrainer(
        trainer_config(logger=log), training_sae("topk", D, 64), batches(), evaluator=evaluator
    )
    with pytest.raises(StopRequested):
        trainer.fit()
    assert finished == [4]
    assert trainer.n_training_steps == 5
