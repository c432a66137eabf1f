"""Sparse training steps of the TopK family, against the dense ones that they stand in for."""

import copy
import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK
from torch import Tensor

from sae_whiten import WhiteningConfig, WhiteningTrainer
from sae_whiten.architectures import sparse_step as module
from sae_whiten.architectures.sparse_step import SparseStepOutput
from sae_whiten.training.training_sae import enter_whitened_space, set_whitening
from tests.support import friendly, training_sae, whitening_of

D_IN, D_SAE, K, BATCH = 16, 128, 4, 64
FAMILY = ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")


def whitened_sae(
    architecture: str, whitening: WhiteningConfig | None = None, **options: Any
) -> TrainingSAE[Any]:
    """An SAE in training, whose latents differ enough that rounding decides no selection."""
    if architecture == "matryoshka_batchtopk":
        options = {"matryoshka_widths": [16, 48, D_SAE], **options}
    sae = training_sae(architecture, D_IN, D_SAE, k=K, **{"dtype": "float64", **options})
    enter_whitened_space(sae)
    set_whitening(sae, whitening_of(friendly(500, D_IN), whitening))
    return sae


def step_input(dead: Tensor | None = None, logged: bool = False) -> TrainStepInput:
    x = friendly(BATCH, D_IN, seed=1)
    z = whitening_of(friendly(500, D_IN)).whiten(x)
    return TrainStepInput(z, {}, dead, n_training_steps=0, is_logging_step=logged)


def dead_mask(n_dead: int) -> Tensor:
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    mask[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(3))[:n_dead]] = True
    return mask


@dataclass
class Step:
    output: TrainStepOutput
    grads: dict[str, Tensor]


def take(sae: TrainingSAE[Any], given: TrainStepInput, autocast: bool = False) -> Step:
    sae = copy.deepcopy(sae)
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        output = sae.training_forward_pass(given)
    output.loss.backward()
    return Step(output, {n: p.grad for n, p in sae.named_parameters() if p.grad is not None})


def take_dense(sae: TrainingSAE[Any], given: TrainStepInput, autocast: bool = False) -> Step:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module._SPARSE_UP_TO, "cpu", 0)
        step = take(sae, given, autocast)
    assert not isinstance(step.output, SparseStepOutput)
    return step


def assert_equal_steps(sparse: Step, dense: Step) -> None:
    assert isinstance(sparse.output, SparseStepOutput)
    # in float64, but the metric has float32 weights
    torch.testing.assert_close(seen(sparse), seen(dense), rtol=1e-6, atol=1e-9)


def seen(step: Step) -> dict[str, Any]:
    output = step.output
    return {
        "sae_out": output.sae_out,
        "feature_acts": output.feature_acts.to_dense(),
        "loss": output.loss,
        "losses": output.losses,
        "metrics": output.metrics,
        "grads": step.grads,
    }


@pytest.mark.parametrize("n_dead", [None, 0, 5, 90])  # 5 and 90: fewer and more than AuxK selects
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", FAMILY)
def test_values_and_gradients_are_the_dense_ones(
    architecture: str, rescale: bool, apply_b_dec_to_input: bool, n_dead: int | None
) -> None:
    sae = whitened_sae(
        architecture,
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec_to_input,
    )
    given = step_input(None if n_dead is None else dead_mask(n_dead))
    assert_equal_steps(take(sae, given), take_dense(sae, given))


@pytest.mark.parametrize(
    "whitening",
    [
        WhiteningConfig(kind="pca", loss_space="original"),
        WhiteningConfig(kind="pca", loss_space="whitened"),
        WhiteningConfig(kind="zca", loss_space="original"),
        WhiteningConfig(kind="zca", loss_space="whitened", strength=0.5),
        WhiteningConfig(kind="pca", sparsity_norms="original"),
        WhiteningConfig(kind="zca", sparsity_norms="original"),
    ],
    ids=lambda w: f"{w.kind}-{w.loss_space}-{w.sparsity_norms}",
)
@pytest.mark.parametrize("architecture", FAMILY)
def test_losses_of_either_space_and_norms_of_either_space(
    architecture: str, whitening: WhiteningConfig
) -> None:
    sae = whitened_sae(architecture, whitening)
    given = step_input(dead_mask(12))
    assert_equal_steps(take(sae, given), take_dense(sae, given))


def test_matryoshka_with_one_auxk_for_all_levels() -> None:
    sae = whitened_sae("matryoshka_batchtopk", use_matryoshka_aux_loss=False)
    given = step_input(dead_mask(12))
    assert_equal_steps(take(sae, given), take_dense(sae, given))


@pytest.mark.parametrize("architecture", FAMILY)
@pytest.mark.parametrize("n_dead", [0, 12])
def test_float32_gradients_are_exact_to_its_rounding(architecture: str, n_dead: int) -> None:
    given = step_input(dead_mask(n_dead))
    sae, exact_sae = whitened_sae(architecture, dtype="float32"), whitened_sae(architecture)
    exact_sae.load_state_dict(sae.state_dict())
    sparse, exact = take(sae, given), take_dense(exact_sae, given)
    for name, grad in exact.grads.items():
        assert relative(sparse.grads[name], grad) < 1e-5
    assert relative(sparse.output.sae_out, exact.output.sae_out) < 1e-5


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16 weights"])
@pytest.mark.parametrize("architecture", FAMILY)
def test_bfloat16_gives_the_dense_step_to_its_rounding(architecture: str, autocast: bool) -> None:
    sae = whitened_sae(architecture, dtype="float32" if autocast else "bfloat16")
    given = step_input(dead_mask(12))
    sparse, dense = take(sae, given, autocast), take_dense(sae, given, autocast)
    for name, grad in dense.grads.items():
        assert sparse.grads[name].dtype == grad.dtype
        assert relative(sparse.grads[name], grad) < 0.2  # a near tie may be decided otherwise
    assert sparse.output.sae_out.dtype == dense.output.sae_out.dtype
    assert relative(sparse.output.sae_out, dense.output.sae_out) < 0.1
    assert relative(sparse.output.loss, dense.output.loss) < 0.02


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("architecture", ["topk", "matryoshka_batchtopk"])
def test_training_is_that_with_dense_steps(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = train(architecture)
    monkeypatch.setitem(module._SPARSE_UP_TO, "cpu", 0)
    dense = train(architecture)
    torch.testing.assert_close(
        dict(sparse.sae.state_dict()), dict(dense.sae.state_dict()), rtol=1e-4, atol=1e-6
    )
    assert torch.equal(sparse.n_forward_passes_since_fired, dense.n_forward_passes_since_fired)
    assert (dense.n_forward_passes_since_fired > 5).any()  # AuxK took part
    assert torch.equal(sparse.act_freq_scores, dense.act_freq_scores)


def train(architecture: str, n_steps: int = 60) -> WhiteningTrainer:
    options: dict[str, Any] = {}
    if architecture == "matryoshka_batchtopk":
        options["matryoshka_widths"] = [16, 48, D_SAE]
    cfg = SAETrainerConfig(
        total_training_samples=n_steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-4,
        dead_feature_window=5,  # so that AuxK takes part
    )
    sae = training_sae(architecture, D_IN, D_SAE, k=K, dtype="float64", **options)
    data = itertools.cycle(friendly(20 * BATCH, D_IN).split(BATCH))
    trainer = WhiteningTrainer(cfg, sae, data)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("architecture", FAMILY)
def test_nothing_dense_survives_the_forward_pass(architecture: str) -> None:
    sae, saved = whitened_sae(architecture), []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor._nnz() if tensor.is_sparse else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = sae.training_forward_pass(step_input(dead_mask(3)))
    assert saved
    assert max(saved) < BATCH * D_SAE
    assert output.feature_acts.is_sparse
    assert output.feature_acts._nnz() == BATCH * K


@pytest.mark.parametrize("name", ["hook_sae_acts_pre", "hook_sae_acts_post"])
@pytest.mark.parametrize("architecture", FAMILY)
def test_hooks_see_and_change_dense_latents(architecture: str, name: str) -> None:
    sae = whitened_sae(architecture)
    seen = []

    def change(acts: Tensor, hook: Any) -> Tensor:
        seen.append(acts)
        return acts * 0

    before = sae.training_forward_pass(step_input())
    with sae.hooks(fwd_hooks=[(name, change)]):
        after = sae.training_forward_pass(step_input())
    assert seen[0].shape == (BATCH, D_SAE)
    assert not seen[0].is_sparse
    assert isinstance(before, SparseStepOutput)
    torch.testing.assert_close(after.sae_out, sae.b_dec.expand_as(after.sae_out))


def test_hook_on_the_input_keeps_its_gradient() -> None:
    sae = whitened_sae("topk")
    offset = torch.zeros(D_IN, dtype=torch.float64, requires_grad=True)
    with sae.hooks(fwd_hooks=[("hook_sae_input", lambda x, hook: x + offset)]):
        sae.training_forward_pass(step_input()).loss.backward()
    assert offset.grad is not None
    assert offset.grad.abs().max() > 0


def test_hook_on_the_reconstruction_acts_on_the_sparse_step() -> None:
    sae = whitened_sae("topk")
    with sae.hooks(fwd_hooks=[("hook_sae_recons", lambda x, hook: x * 0)]):
        output = sae.training_forward_pass(step_input())
    assert isinstance(output, SparseStepOutput)
    assert output.sae_out.abs().max() == 0


@pytest.mark.parametrize("architecture", FAMILY)
def test_logged_steps_show_dense_latents_and_train_the_same(architecture: str) -> None:
    sae = whitened_sae(architecture)
    logged, quiet = take(sae, step_input(logged=True)), take(sae, step_input())
    dense = take_dense(sae, step_input())
    assert torch.equal(logged.output.feature_acts, quiet.output.feature_acts.to_dense())
    torch.testing.assert_close(logged.output.hidden_pre, dense.output.hidden_pre)
    for name, grad in quiet.grads.items():
        assert torch.equal(logged.grads[name], grad)


def test_hidden_pre_of_a_step_until_the_weights_change() -> None:
    sae = whitened_sae("topk")
    first, second = (sae.training_forward_pass(step_input()) for _ in range(2))
    dense = take_dense(sae, step_input()).output
    torch.testing.assert_close(first.hidden_pre, dense.hidden_pre)
    with torch.no_grad():
        sae.W_enc.add_(1)
    torch.testing.assert_close(first.hidden_pre, dense.hidden_pre)
    with pytest.raises(RuntimeError, match="is_logging_step"):
        _ = second.hidden_pre


def test_many_active_latents_are_trained_densely() -> None:
    sae = training_sae("topk", D_IN, D_SAE, k=D_SAE // 2)
    enter_whitened_space(sae)
    set_whitening(sae, whitening_of(friendly(500, D_IN)))
    output = sae.training_forward_pass(step_input())
    assert not isinstance(output, SparseStepOutput)
    assert output.hidden_pre.shape == (BATCH, D_SAE)


def test_another_selection_is_followed() -> None:
    class Signed(TopK):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    sae = whitened_sae("topk")
    sae.activation_fn = Signed(K)
    assert sae.training_forward_pass(step_input()).feature_acts.max() <= 0
    sae.activation_fn = TopK(2)
    feature_acts = sae.training_forward_pass(step_input()).feature_acts
    assert feature_acts.is_sparse
    assert feature_acts._nnz() == 2 * BATCH
