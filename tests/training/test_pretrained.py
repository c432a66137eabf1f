"""Training on from a finished SAE: what is trained is what the config asks for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

from sae_whiten import WhiteningConfig, WhiteningTrainingRunner, fold_whitening_into_weights
from sae_whiten.architectures import TopKVSAETrainingConfig
from sae_whiten.training.checkpoint import inference_form
from sae_whiten.training.pretrained import unfold_for_training
from tests.support import runner_config, tiny_dataset, tiny_model, training_sae, whitening_of

FEW = WhiteningConfig(n_samples=512)
BATCH = 64


def config(cls: Any = TopKTrainingSAEConfig, **options: Any) -> TrainingSAEConfig:
    if issubclass(cls, TopKTrainingSAEConfig):
        options = {"k": 8, **options}
    return cls(d_in=32, d_sae=64, normalize_activations="covariance_whitening", **options)


def runner(
    sae: TrainingSAEConfig, steps: int = 8, whitening: WhiteningConfig = FEW, **options: Any
) -> WhiteningTrainingRunner:
    torch.manual_seed(7)
    cfg = runner_config(
        sae=sae,
        train_batch_size_tokens=BATCH,
        training_tokens=BATCH * steps,
        n_batches_in_buffer=8,
        **options,
    )
    return WhiteningTrainingRunner(
        cfg, whitening, override_dataset=tiny_dataset(60), override_model=tiny_model()
    )


def trained(sae: TrainingSAEConfig, path: Path) -> tuple[Path, Path]:
    """The checkpoint and the output of a short run."""
    runner(
        sae,
        output_path=str(path / "output"),
        checkpoint_path=str(path / "checkpoints"),
        save_final_checkpoint=True,
    ).run()
    (checkpoint,) = path.glob("checkpoints/*/final_*")
    return checkpoint, path / "output"


@pytest.fixture(scope="module")
def topk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return trained(config(), tmp_path_factory.mktemp("topk"))


def test_coefficients_are_those_of_the_config_whatever_the_folder_says(tmp_path: Path) -> None:
    for path in trained(config(StandardTrainingSAEConfig, l1_coefficient=0.002), tmp_path):
        made = runner(
            config(StandardTrainingSAEConfig, l1_coefficient=0.3, l1_warm_up_steps=2),
            from_pretrained_path=str(path),
        )
        made.run()
        assert made.sae.cfg.l1_coefficient == 0.3  # pyright: ignore[reportAttributeAccessIssue]
        assert made.trainer.coefficient_schedulers["l1"].value == 0.3


def test_a_checkpoint_of_batchtopk_is_trained_on_as_batchtopk(tmp_path: Path) -> None:
    asked = config(BatchTopKTrainingSAEConfig, aux_loss_coefficient=0.5, topk_threshold_lr=0.2)
    checkpoint, output = trained(asked, tmp_path)
    made = runner(asked, from_pretrained_path=str(checkpoint))
    threshold = TrainingSAE.load_from_disk(checkpoint).topk_threshold
    assert made.sae.topk_threshold.dtype == torch.float64
    assert made.sae.topk_threshold == threshold
    result = made.run()
    assert result.cfg.architecture() == "batchtopk"
    assert result.cfg.aux_loss_coefficient == 0.5
    with pytest.raises(ValueError, match="architecture='jumprelu'.*asks for 'batchtopk'"):
        runner(asked, from_pretrained_path=str(output))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (config(TopKVSAETrainingConfig), "architecture='topk'.*'topk_vsae'"),
        (config(BatchTopKTrainingSAEConfig), "architecture='topk'.*'batchtopk'"),
        (config(StandardTrainingSAEConfig), "architecture='topk'.*'standard'"),
        (config(apply_b_dec_to_input=False), "apply_b_dec_to_input=True.*asks for False"),
    ],
)
def test_what_the_weights_cannot_be_is_refused(
    asked: TrainingSAEConfig, message: str, topk: tuple[Path, Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        runner(asked, from_pretrained_path=str(topk[1]))


def test_another_size_is_refused(topk: tuple[Path, Path]) -> None:
    asked = TopKTrainingSAEConfig(
        d_in=32, d_sae=128, k=8, normalize_activations="covariance_whitening"
    )
    with pytest.raises(ValueError, match="d_sae=64.*asks for 128"):
        runner(asked, from_pretrained_path=str(topk[0]))


@pytest.mark.parametrize("ranks_by_norm", [True, False])
def test_training_starts_from_the_same_function(
    ranks_by_norm: bool, topk: tuple[Path, Path]
) -> None:
    asked = config(rescale_acts_by_decoder_norm=ranks_by_norm)
    made = runner(asked, steps=1, from_pretrained_path=str(topk[1]), lr=0.0)
    made.run()
    record = made.sae.cfg.metadata.whitening["fold"]
    assert record["decoder_norms_folded"] is ranks_by_norm
    before = SAE.load_from_disk(topk[1])
    x = runner(asked).activations_store.next_batch()
    with torch.no_grad():
        error = (made.sae(x) - before(x)).norm() / (x - x.mean(0)).norm()
    # the whitening is of other samples, so norms that were 1 differ a little: near ties change
    assert error < (1e-2 if ranks_by_norm else 1e-4)


def test_decoder_norms_that_mean_something_else_are_not_ranked_by(
    topk: tuple[Path, Path],
) -> None:
    """Under another whitening than that which the SAE was trained under."""
    other = WhiteningConfig(n_samples=512, strength=0.0, kind="zca", eps=0.5)
    asked = config(rescale_acts_by_decoder_norm=True)
    with pytest.raises(ValueError, match=r"rescale_acts_by_decoder_norm=True.*has False"):
        runner(asked, whitening=other, from_pretrained_path=str(topk[1])).run()


def unit_decoder(architecture: str) -> Any:
    """A plain SAE that ranks latents without decoder norms, which are all 1."""
    sae = training_sae(
        architecture, normalize_activations="none", rescale_acts_by_decoder_norm=False
    )
    sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    return sae


LARGE = 30 * torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
"""Activations under whose whitening decoder rows of norm 1 have norm 1/30."""


def test_the_threshold_follows_latents_that_are_ranked_by_norms_again() -> None:
    sae, whitening = unit_decoder("batchtopk"), whitening_of(LARGE)
    sae.topk_threshold.fill_(5.0)
    expected = inference_form(sae).encode(LARGE) != 0
    unfold_for_training(sae, whitening, training_sae("batchtopk").cfg)
    assert sae.cfg.rescale_acts_by_decoder_norm
    fold_whitening_into_weights(sae, whitening)
    found = inference_form(sae).encode(LARGE) != 0
    assert (found ^ expected).sum() < 0.05 * expected.sum()


def test_the_noise_follows_latents_that_are_ranked_by_norms_again() -> None:
    sae, whitening = unit_decoder("topk_vsae"), whitening_of(LARGE)
    x = LARGE[:100]
    _, mu, logvar = sae._posterior_of(x)
    expected = mu / (logvar / 2).exp()
    unfold_for_training(sae, whitening, training_sae("topk_vsae").cfg)
    _, mu, logvar = sae._posterior_of(whitening.whiten(x))
    torch.testing.assert_close(mu / (logvar / 2).exp(), expected, rtol=1e-4, atol=1e-3)


def test_the_dtype_is_that_of_the_config(topk: tuple[Path, Path]) -> None:
    made = runner(config(dtype="bfloat16"), steps=2, from_pretrained_path=str(topk[0]))
    assert made.sae.W_enc.dtype == torch.float32  # until it is unfolded, which would round badly
    made.run()
    assert made.sae.cfg.metadata.whitening["fold"]["dtype"] == "bfloat16"


def test_interrupted_fine_tuning_resumes_with_and_without_the_path(
    topk: tuple[Path, Path], tmp_path: Path
) -> None:
    def tuned(**options: Any) -> Any:
        return runner(config(), **options).run().state_dict()

    expected = tuned(
        from_pretrained_path=str(topk[1]), n_checkpoints=1, checkpoint_path=str(tmp_path)
    )
    (checkpoint,) = tmp_path.glob("*/*")
    for path in (str(topk[1]), None):
        found = tuned(from_pretrained_path=path, resume_from_checkpoint=str(checkpoint))
        for name, value in expected.items():
            assert torch.equal(found[name], value)


def test_the_random_state_is_not_changed(topk: tuple[Path, Path]) -> None:
    runner(config(), from_pretrained_path=str(topk[1]))
    found = torch.get_rng_state()
    torch.manual_seed(7)
    tiny_model()
    assert torch.equal(found, torch.get_rng_state())
