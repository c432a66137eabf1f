import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_whiten import FoldError, Whitening, WhiteningConfig
from sae_whiten.architectures.losses import ReconstructionMetric
from sae_whiten.training.training_sae import (
    enter_whitened_space,
    leave_whitened_space,
    set_whitening,
)
from tests.support import ARCHITECTURES, nasty, training_sae, whitening_of

D, D_SAE, N = 16, 64, 128


def step_input(sae, z: Tensor, n_dead: int) -> TrainStepInput:
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:: D_SAE // max(n_dead, 1)][:n_dead] = n_dead > 0
    return TrainStepInput(
        sae_in=z,
        coefficients={
            name: getattr(value, "value", value) for name, value in sae.get_coefficients().items()
        },
        dead_neuron_mask=dead,
        n_training_steps=3,
        is_logging_step=False,
    )


def losses_and_gradients(sae, z: Tensor, n_dead: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    sae.zero_grad()
    output = sae.training_forward_pass(step_input(sae, z, n_dead))
    output.loss.backward()
    gradients = [p.grad.clone() for p in sae.parameters() if p.grad is not None]
    return {**output.losses, "total": output.loss}, gradients


def original_space(whitening: Whitening) -> Tensor:
    """M such that |e @ M|^2 is the error in the original space, d for the mean prediction."""
    return whitening.W_inv * (D / whitening.eigenvalues.sum()).sqrt()


@pytest.mark.parametrize("kind", ["pca", "zca"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("loss_space", ["original", "whitened"])
def test_predicting_the_mean_costs_d_in_either_space(kind, strength, loss_space):
    x = nasty(5000, D)
    # eps is added to the eigenvalues, so the exact statement is for eps = 0
    config = WhiteningConfig(kind=kind, strength=strength, loss_space=loss_space, eps=0.0)
    whitening = whitening_of(x, config)
    z = whitening.whiten(x.double())
    loss = ReconstructionMetric(whitening, "cpu")(torch.zeros_like(z), z).sum(-1).mean()
    # weights are float32; the sample's covariance has the divisor n, the whitening's n - 1
    assert float(loss) == pytest.approx(D * (1 - 1 / 5000), rel=1e-6)


@pytest.mark.parametrize("kind", ["pca", "zca"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_metric_is_the_squared_error_between_dewhitened_activations(kind, strength):
    x = nasty(1000, D, dtype=torch.float64)
    whitening = whitening_of(x, WhiteningConfig(kind=kind, strength=strength))
    z, z_hat = whitening.whiten(x), torch.randn(1000, D, dtype=torch.float64)
    error = (whitening.dewhiten(z_hat) - x).square().sum(-1)
    expected = error * D / whitening.eigenvalues.sum()
    found = ReconstructionMetric(whitening, "cpu")(z_hat, z).sum(-1)
    assert torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("n_dead", [0, 3, 20])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *((architecture, {}) for architecture in ARCHITECTURES),
        ("matryoshka_batchtopk", {"use_matryoshka_aux_loss": True}),
    ],
)
def test_in_whitened_space_every_loss_and_gradient_is_saelens_own(architecture, options, n_dead):
    """Guards the auxiliary losses, which SAELens has no seam for, against drifting apart."""
    x = nasty(N, D)
    whitening = whitening_of(x, WhiteningConfig(loss_space="whitened"))
    z = whitening.whiten(x)
    sae = training_sae(architecture, D, D_SAE, **options)
    expected, expected_gradients = losses_and_gradients(sae, z, n_dead)
    enter_whitened_space(sae)
    set_whitening(sae, whitening)
    found, gradients = losses_and_gradients(sae, z, n_dead)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-6), name
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["pca", "zca"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_main_loss_is_taken_in_the_original_space(architecture, kind):
    x = nasty(N, D)
    whitening = whitening_of(x, WhiteningConfig(kind=kind))
    z = whitening.whiten(x)
    sae = training_sae(architecture, D, D_SAE)
    enter_whitened_space(sae)
    set_whitening(sae, whitening)
    output = sae.training_forward_pass(step_input(sae, z, 0))
    M = original_space(whitening)
    expected = ((output.sae_out - z).double() @ M).square().sum(-1).mean()
    assert torch.allclose(output.losses["mse_loss"].double(), expected, rtol=1e-5)
    assert not torch.allclose(
        output.losses["mse_loss"], (output.sae_out - z).square().sum(-1).mean(), rtol=0.1
    )
    if architecture == "matryoshka_batchtopk":
        acts = output.feature_acts / sae.W_dec.norm(dim=-1)
        inner = acts[:, : D_SAE // 4] @ sae.W_dec[: D_SAE // 4] + sae.b_dec
        expected = ((inner - z).double() @ M).square().sum(-1).mean()
        found = output.losses[f"inner_mse_loss_{D_SAE // 4}"]
        assert torch.allclose(found.double(), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["pca", "zca"])
@pytest.mark.parametrize("architecture", ["topk", "abstopk", "batchtopk", "matryoshka_batchtopk"])
def test_auxk_maps_the_residual_without_the_mean(architecture, kind):
    x = nasty(N, D)
    whitening = whitening_of(x, WhiteningConfig(kind=kind))
    z = whitening.whiten(x)
    sae = training_sae(architecture, D, D_SAE)
    enter_whitened_space(sae)
    set_whitening(sae, whitening)
    n_dead = 3  # fewer than k_aux = d / 2: all of them take part, with weight 3 / 8
    batch = step_input(sae, z, n_dead)
    output = sae.training_forward_pass(batch)
    dead = batch.dead_neuron_mask
    assert dead is not None
    acts = output.hidden_pre * dead / sae.W_dec.norm(dim=-1)
    error = (acts @ sae.W_dec - (z - output.sae_out)).double() @ original_space(whitening)
    expected = n_dead / (D // 2) * error.square().sum(-1).mean()
    found = output.losses["auxiliary_reconstruction_loss"]
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_the_matryoshka_auxiliary_loss_of_every_level_is_taken_there_too():
    x = nasty(N, D)
    whitening = whitening_of(x)
    z = whitening.whiten(x)
    sae = training_sae("matryoshka_batchtopk", D, D_SAE, use_matryoshka_aux_loss=True)
    enter_whitened_space(sae)
    set_whitening(sae, whitening)
    batch = step_input(sae, z, 4)
    output = sae.training_forward_pass(batch)
    unit = sae.W_dec / sae.W_dec.norm(dim=-1, keepdim=True)
    M, expected, start = original_space(whitening), 0.0, 0
    assert batch.dead_neuron_mask is not None
    for width in (D_SAE // 4, D_SAE):
        level_out = output.feature_acts[:, :width] @ unit[:width] + sae.b_dec
        dead = batch.dead_neuron_mask.clone()
        dead[:start], dead[width:], start = False, False, width
        error = (output.hidden_pre * dead) @ unit - (z - level_out)
        expected += int(dead.sum()) / (D // 2) * (error.double() @ M).square().sum(-1).mean()
    found = output.losses["auxiliary_reconstruction_loss"]
    assert torch.allclose(found.double(), expected, rtol=1e-5)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_the_reconstruction_through_the_gate_is_taken_in_the_original_space(apply_b_dec_to_input):
    x = nasty(N, D)
    whitening = whitening_of(x)
    z = whitening.whiten(x)
    sae = training_sae("gated", D, D_SAE, apply_b_dec_to_input=apply_b_dec_to_input)
    enter_whitened_space(sae)
    set_whitening(sae, whitening)
    output = sae.training_forward_pass(step_input(sae, z, 0))
    gate = (z - apply_b_dec_to_input * sae.b_dec) @ sae.W_enc + sae.b_gate
    error = gate.relu() @ sae.W_dec + sae.b_dec - z
    expected = (error.double() @ original_space(whitening)).square().sum(-1).mean()
    found = output.losses["auxiliary_reconstruction_loss"]
    assert torch.allclose(found.double(), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_under_autocast_the_metric_stays_in_float32(kind):
    x = nasty(N, D)
    whitening = whitening_of(x, WhiteningConfig(kind=kind))
    z = whitening.whiten(x)
    metric = ReconstructionMetric(whitening, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = metric(torch.zeros_like(z), z)
    assert found.dtype == torch.float32
    assert torch.equal(found, metric(torch.zeros_like(z), z))


def test_entering_and_leaving_whitened_space_gives_the_stock_class_back():
    sae = training_sae("topk", D, D_SAE)
    stock, attributes = type(sae), set(vars(sae))
    enter_whitened_space(sae)
    assert isinstance(sae, stock)
    assert type(sae) is not stock
    with pytest.raises(FoldError, match="not been estimated"):
        sae.save_inference_model("unused")
    set_whitening(sae, whitening_of(nasty(N, D)))
    leave_whitened_space(sae)
    assert type(sae) is stock
    assert set(vars(sae)) == attributes


def test_an_sae_compiled_beforehand_is_refused():
    sae = training_sae("topk", D, D_SAE)
    sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="eager")
    with pytest.raises(ValueError, match="compile"):
        enter_whitened_space(sae)
