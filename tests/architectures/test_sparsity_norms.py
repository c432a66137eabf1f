"""Sparsity by decoder norms of the original space, against stock SAEs that live there."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from torch import Tensor

from sae_whiten import FoldError, Whitening, WhiteningConfig, WhiteningTrainer
from sae_whiten.architectures import describe, description
from sae_whiten.architectures.folding import fold_whitening_into_weights, folded_copy
from sae_whiten.architectures.losses import SparsityNorms
from sae_whiten.training.training_sae import enter_whitened_space, set_whitening
from tests.support import friendly, nasty, training_sae, whitening_of
from tests.training.test_trainer import batches, equal, state, trainer_config

D, D_SAE, N = 16, 64, 128
CHARGED = ("standard", "gated", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk")

TANH = {"jumprelu_sparsity_loss_mode": "tanh", "pre_act_loss_coefficient": 1e-2}


def scale_of(whitening: Whitening) -> float:
    return float((D / whitening.W_inv.square().sum()).sqrt())


def in_whitened_space(
    architecture: str, whitening: Whitening, **options: Any
) -> tuple[TrainingSAE[Any], TrainingSAE[Any]]:
    """An SAE in whitened coordinates and the stock SAE in the original ones that it stands for."""
    options = {"dtype": "float64", "apply_b_dec_to_input": True, **options}
    sae = training_sae(architecture, D, D_SAE, **options)
    plain = training_sae(architecture, D, D_SAE, normalize_activations="none", **options)
    plain.load_state_dict(sae.state_dict())
    with torch.no_grad():
        plain.W_enc.copy_(whitening.W @ sae.W_enc)
        plain.W_dec.copy_(sae.W_dec @ whitening.W_inv)
        plain.b_dec.copy_(sae.b_dec @ whitening.W_inv + whitening.mean)
    enter_whitened_space(sae, whitening.config)
    set_whitening(sae, whitening)
    return sae, plain


def step(sae: TrainingSAE[Any], x: Tensor, n_dead: int) -> Any:
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[: 3 * n_dead : 3] = True
    coefficients: dict[str, Any] = {
        name: getattr(value, "value", value) for name, value in sae.get_coefficients().items()
    }
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients=coefficients,
            dead_neuron_mask=dead,
            n_training_steps=3,
            is_logging_step=False,
        )
    )


@pytest.mark.parametrize("kind", ["pca", "zca"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_norms_are_those_of_the_folded_decoder_up_to_one_factor(kind, strength):
    whitening = whitening_of(
        nasty(2000, D), WhiteningConfig(kind=kind, strength=strength, sparsity_norms="original")
    )
    norms = SparsityNorms(whitening)
    W_dec = torch.randn(500, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (W_dec @ whitening.W_inv).norm(dim=1) * scale_of(whitening)
    assert torch.allclose(norms(W_dec), expected, rtol=1e-9)
    # an average direction weighs 1
    rotation = torch.linalg.qr(W_dec[:D])[0]
    assert float(norms(rotation).square().mean()) == pytest.approx(1, rel=1e-9)
    assert norms(W_dec.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("n_dead", [0, 3, 15])
@pytest.mark.parametrize("kind", ["pca", "zca"])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *((architecture, {}) for architecture in CHARGED),
        ("matryoshka_batchtopk", {"use_matryoshka_aux_loss": True}),
        ("standard", {"lp_norm": 0.5}),
        ("jumprelu", TANH),
    ],
)
def test_training_is_that_of_a_stock_sae_in_the_original_space(architecture, options, kind, n_dead):
    config = WhiteningConfig(kind=kind, sparsity_norms="original")
    x = friendly(N, D).double()
    whitening = whitening_of(x, config)
    sae, plain = in_whitened_space(architecture, whitening, **options)
    scale, metric = scale_of(whitening), D / float(whitening.eigenvalues.sum())
    if architecture == "jumprelu":
        plain.cfg.jumprelu_tanh_scale *= scale  # pyright: ignore[reportAttributeAccessIssue]
    ours, stock = step(sae, whitening.whiten(x), n_dead), step(plain, x, n_dead)

    in_units_of_norms = "topk" in architecture
    acts = stock.feature_acts * (scale if in_units_of_norms else 1)
    assert torch.equal(ours.feature_acts != 0, acts != 0)
    assert torch.allclose(ours.feature_acts, acts, atol=1e-9)
    assert torch.allclose(whitening.dewhiten(ours.sae_out), stock.sae_out, atol=1e-9)
    assert ours.losses.keys() == stock.losses.keys()
    for name, loss in stock.losses.items():
        factor = {"l0_loss": 1.0, "l1_loss": scale, "pre_act_loss": scale}.get(name, metric)
        # the metric's weights are float32
        assert torch.allclose(ours.losses[name], loss * factor, rtol=1e-6), name

    # and this is another SAE than the default makes of the same weights
    set_whitening(sae, whitening_of(x, WhiteningConfig(kind=kind)))
    default = step(sae, whitening.whiten(x), n_dead)
    if in_units_of_norms:
        assert not torch.equal(default.feature_acts != 0, acts != 0)
    else:
        name = "l0_loss" if architecture == "jumprelu" else "l1_loss"
        assert not torch.allclose(default.losses[name], ours.losses[name], rtol=1e-3)


@pytest.mark.parametrize("architecture", CHARGED)
def test_gradients_go_through_the_norms(architecture):
    config = WhiteningConfig(sparsity_norms="original")
    x = friendly(N, D).double()
    whitening = whitening_of(x, config)
    sae, plain = in_whitened_space(architecture, whitening)
    z = whitening.whiten(x)
    metric, scale = D / whitening.eigenvalues.sum(), scale_of(whitening)
    for trained, inputs in ((sae, z), (plain, x)):
        losses = dict(step(trained, inputs, 3).losses)
        l1 = losses.pop("l1_loss", torch.zeros(()))
        total = sum(losses.values(), torch.zeros(()))
        (total + l1 if trained is sae else total * metric + l1 * scale).backward()
    assert sae.W_dec.grad is not None
    assert plain.W_dec.grad is not None
    # chain rule: the plain decoder is W_dec @ W_inv
    expected = plain.W_dec.grad @ whitening.W_inv.T
    assert torch.allclose(
        sae.W_dec.grad, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
    )


@pytest.mark.parametrize("data", [friendly, nasty])
@pytest.mark.parametrize("kind", ["pca", "zca"])
@pytest.mark.parametrize("architecture", CHARGED)
def test_the_fold_is_exact(architecture, kind, data, tmp_path):
    x = data(2000, D)
    whitening = whitening_of(x, WhiteningConfig(kind=kind, sparsity_norms="original"))
    sae, plain = in_whitened_space(architecture, whitening)
    report = fold_whitening_into_weights(sae, whitening, activations=x[:200].double())
    assert report.check is not None
    assert report.check.passed
    assert report.check.active_set_change == 0
    assert report.check.pre_activation_error < 1e-9
    assert type(sae).__module__.startswith("sae_lens.")
    with torch.no_grad():
        assert torch.equal(sae.encode(x.double()) != 0, plain.encode(x.double()) != 0)
        error = (sae(x.double()) - plain(x.double())).norm() / (x - x.mean(0)).norm()
    assert float(error) < 1e-9
    if "topk" in architecture:
        norms = sae.W_dec.norm(dim=1) * scale_of(whitening)
        assert torch.allclose(norms, torch.ones(D_SAE, dtype=torch.float64))
    sae.save_inference_model(tmp_path)
    assert SAE.load_from_disk(tmp_path).cfg.metadata.whitening["config"]["sparsity_norms"] == (
        "original"
    )


def test_the_proof_sees_a_fold_of_the_wrong_norms(monkeypatch):
    x = nasty(2000, D)
    whitening = whitening_of(x, WhiteningConfig(sparsity_norms="original"))
    sae, _ = in_whitened_space("topk", whitening)
    right = describe("topk")

    def wrong(sae: Any) -> Any:
        norms = sae.W_dec.data.norm(dim=1).double()
        return replace(right.affine_weights(sae), decoder_norms=norms)

    monkeypatch.setitem(
        description._DESCRIPTIONS, TopKTrainingSAE, replace(right, affine_weights=wrong)
    )
    with pytest.raises(FoldError, match="failed its proof"):
        fold_whitening_into_weights(sae, whitening, activations=x[:200].double())


@pytest.mark.parametrize("architecture", CHARGED)
def test_training_folds_and_resumes_to_the_bit(architecture, tmp_path):
    config = WhiteningConfig(sparsity_norms="original")
    options = {"checkpoint_path": str(tmp_path), "n_checkpoints": 1}
    sae = training_sae(architecture, D, D_SAE)
    trainer = WhiteningTrainer(trainer_config(**options), sae, batches(), config)
    reference = state(trainer.fit())
    resumed = WhiteningTrainer(
        trainer_config(), training_sae(architecture, D, D_SAE, seed=5), iter(()), config
    )
    resumed.load_trainer_state(next(tmp_path.iterdir()))
    resumed.stream.source = batches(start=resumed.stream.n_served)
    assert equal(state(resumed.fit()), reference)


def test_copies_are_folded_with_the_norms_of_the_sae():
    x = friendly(500, D)
    whitening = whitening_of(x, WhiteningConfig(sparsity_norms="original"))
    sae, plain = in_whitened_space("topk", whitening)
    copied, _ = folded_copy(sae, whitening)
    with torch.no_grad():
        assert torch.equal(copied.encode(x.double()) != 0, plain.encode(x.double()) != 0)
    assert "sparsity_norms" not in vars(copied)
    assert "sparsity_norms" in vars(sae)


@pytest.mark.parametrize(
    ("architecture", "options", "match"),
    [
        ("jumprelu", {}, "the sparsity of jumprelu does not depend on decoder norms"),
        ("topk", {"rescale_acts_by_decoder_norm": False}, "rescale_acts_by_decoder_norm=False"),
    ],
)
def test_architectures_without_such_a_charge_refuse_it_at_construction(
    architecture, options, match
):
    sae = training_sae(architecture, D, D_SAE, **options)
    config = WhiteningConfig(sparsity_norms="original")
    with pytest.raises(ValueError, match=match):
        WhiteningTrainer(trainer_config(), sae, batches(), config)
    assert type(sae).__module__.startswith("sae_lens.")
    enter_whitened_space(sae)
    with pytest.raises(ValueError, match=match):
        set_whitening(sae, whitening_of(friendly(500, D), config))


def test_a_folded_topk_has_no_norms_left_to_go_on_with():
    sae = training_sae("topk", D, D_SAE, normalize_activations="none")
    config = WhiteningConfig(sparsity_norms="original")
    with pytest.raises(ValueError, match="start_from_folded"):
        WhiteningTrainer(trainer_config(), sae, batches(), config, start_from_folded=True)
