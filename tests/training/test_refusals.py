"""SAEs that cannot be trained under whitening, or not once more."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    MatchingPursuitTrainingSAE,
    MatchingPursuitTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TemporalSAE,
    TemporalSAEConfig,
)
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_whiten import (
    FoldError,
    Whitening,
    WhiteningTrainer,
    WhiteningTrainingRunner,
    fold_whitening_into_weights,
)
from tests.reference import (
    D_IN,
    D_SAE,
    activations,
    batches,
    estimated_by_stock,
    explained_variance,
    ours_runner,
    refused,
    run_by_hand,
    same,
    state,
    stock_fold,
    topk_config,
    topk_sae,
    trainer_config,
)
from tests.support import runner_config, tiny_dataset, tiny_model, whitening_of


def test_a_whitening_of_another_width_is_an_error() -> None:
    narrow = whitening_of(activations(4096)[:, :8])
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    trainer.scaler.whitening = narrow
    with pytest.raises(ValueError, match="width 8.* 16"):
        trainer.fit()


def test_an_sae_in_training_is_not_folded_with_another_whitening_than_its_own(
    tmp_path: Path,
) -> None:
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    trainer.step(next(trainer.stream))
    own, sae = trainer.whitening, trainer.sae
    assert own is not None
    other = whitening_of(activations(4096))
    refused(lambda: fold_whitening_into_weights(sae, other), sae, "under another whitening")
    own.save(tmp_path / "whitening.safetensors")
    report = fold_whitening_into_weights(
        sae, Whitening.load(tmp_path / "whitening.safetensors"), activations=activations(256)
    )
    assert report.check is not None
    assert report.check.passed


def test_folding_twice_and_folding_what_was_not_whitened_are_refused(
    tmp_path: Path,
) -> None:
    x = activations(256)

    stock = SAETrainer(trainer_config(), topk_sae(), batches()).fit()
    assert explained_variance(stock, x) > 0.5
    stock_fold(stock, estimated_by_stock(activations(4096)))  # accepted
    assert explained_variance(stock, x) < 0

    trainer = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    sae = trainer.fit()
    assert explained_variance(sae, x) > 0.5
    whitening = trainer.whitening
    assert whitening is not None
    refused(lambda: fold_whitening_into_weights(sae, whitening), sae, "folded in already")

    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    refused(lambda: fold_whitening_into_weights(loaded, whitening), loaded, "folded in already")

    plain = topk_sae(topk_config(normalize_activations="none"))
    refused(lambda: fold_whitening_into_weights(plain, whitening), plain, "was not trained under")
    with pytest.raises(ValueError, match="normalize_activations='none'"):
        WhiteningTrainer(trainer_config(), plain, batches())
    with pytest.raises(ValueError, match="normalize_activations='none'"):
        ours_runner(runner_config(sae=topk_config(normalize_activations="none")))

    weights = state(sae)
    with pytest.raises(ValueError, match="folded already"):
        trainer.fit()
    assert same(weights, state(sae))


class TopKByNorm(StandardTrainingSAE):
    """An architecture of a user's own: keeps as many latents as the norm of the input says."""

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latents, pre = super().encode_with_hidden_pre(x)
        return latents * (pre > 0.05 * x.norm(dim=-1, keepdim=True)), pre


class DeclaredTopKByNorm(TopKByNorm):
    whitening_not_foldable_because = "its selection uses the norm of the input"


def by_norm(cls: Any) -> Any:
    torch.manual_seed(1)
    options: dict[str, Any] = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "normalize_activations": "covariance_whitening",
    }
    return cls(StandardTrainingSAEConfig(l1_coefficient=0.1, **options))


def test_an_architecture_that_cannot_be_folded_is_refused_at_construction() -> None:
    torch.manual_seed(1)
    options: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE}
    pursuit = MatchingPursuitTrainingSAE(MatchingPursuitTrainingSAEConfig(**options))
    temporal = TemporalSAE(TemporalSAEConfig(n_heads=1, **options))
    declared = by_norm(DeclaredTopKByNorm)

    # accepted, trained, and folded into another function
    x = activations(256)
    stock = SAETrainer(trainer_config(), by_norm(DeclaredTopKByNorm), batches())
    run_by_hand(stock, 40)
    z = stock.activation_scaler.scale(x)
    latents = stock.sae.encode(z)
    stock_fold(stock.sae, stock.activation_scaler.whitening)
    assert ((stock.sae.encode(x) != 0) != (latents != 0)).any(dim=1).float().mean() > 0.5

    # its own config refuses to be asked for whitening; an override does not come with one
    pursuit.cfg.normalize_activations = "covariance_whitening"
    with pytest.raises(FoldError, match="encoder is tied to the decoder"):
        WhiteningTrainer(trainer_config(), pursuit, batches())
    torch.manual_seed(5)
    with pytest.raises(FoldError, match="encoder is tied to the decoder"):
        WhiteningTrainingRunner(
            runner_config(),
            override_dataset=tiny_dataset(),
            override_model=tiny_model(),
            override_sae=pursuit,
        )
    with pytest.raises(FoldError, match="uses the norm of the input"):
        WhiteningTrainer(trainer_config(), declared, batches())
    assert type(declared) is DeclaredTopKByNorm

    # its own config cannot be asked for whitening either
    temporal.cfg.normalize_activations = "covariance_whitening"
    whitening = whitening_of(x)
    refused(lambda: fold_whitening_into_weights(temporal, whitening), temporal, "over positions")


def test_an_architecture_that_nobody_declared_is_never_folded_into_something_else(
    tmp_path: Path,
) -> None:
    sae = by_norm(TopKByNorm)
    with pytest.raises(FoldError) as raised:
        WhiteningTrainer(trainer_config(checkpoint_path=str(tmp_path)), sae, batches()).fit()
    assert sae.cfg.normalize_activations == "covariance_whitening"
    # of the class itself at once, or of the proof at the end with both forms kept
    if "Both forms are in" in str(raised.value):
        (kept,) = tmp_path.iterdir()
        assert str(kept) in str(raised.value)
        assert list(kept.rglob("training_weights.safetensors"))
        assert (kept / "cfg.json").exists()
