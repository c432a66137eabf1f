import copy
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import LanguageModelSAETrainingRunner, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from scipy.stats import hypergeom
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from sae_whiten import (
    WhiteningConfig,
    WhiteningMultiSAETrainingRunner,
    WhiteningTrainer,
    WhiteningTrainingRunner,
    fold_whitening_into_weights,
    unfold_whitening_from_weights,
)
from sae_whiten.architectures import (
    TopKVSAETrainingConfig,
    TopKVSAETrainingSAE,
    sparse_step,
    topk_vsae,
)
from sae_whiten.architectures import sparse as sparse_module
from sae_whiten.architectures.sparse_step import SparseStepOutput
from sae_whiten.architectures.topk_vsae import _affine, kl_to_standard_normal
from sae_whiten.training.checkpoint import loadable_folder
from sae_whiten.training.training_sae import enter_whitened_space, set_whitening
from tests.processes import run_code
from tests.support import (
    friendly,
    nasty,
    runner_config,
    tiny_dataset,
    tiny_model,
    training_sae,
    whitening_of,
)

D, D_SAE, N = 24, 96, 64
SPARSE, DENSE = 4, 32  # k for the one and the other way of decoding
EPS32 = torch.finfo(torch.float32).eps


def vsae(seed: int = 0, **options: Any) -> TopKVSAETrainingSAE:
    defaults: dict[str, Any] = {
        "d_in": D,
        "d_sae": D_SAE,
        "k": SPARSE,
        "normalize_activations": "none",
    }
    sae = training_sae("topk_vsae", seed=seed, **{**defaults, **options})
    assert isinstance(sae, TopKVSAETrainingSAE)
    if sae.cfg.variance == "learned":
        with torch.no_grad():
            sae.W_var.add_(0.3 * torch.randn_like(sae.W_var) / D**0.5)
    return sae


def step(
    sae: TrainingSAE[Any],
    x: Tensor,
    dead: Tensor | None = None,
    coefficient: float = 0.7,
    logged: bool = False,
    seed: int = 5,
) -> TrainStepOutput:
    if isinstance(sae, TopKVSAETrainingSAE):
        sae.set_extra_state(torch.tensor([seed, 0]))
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={"kl": coefficient},
            dead_neuron_mask=dead,
            n_training_steps=0,
            is_logging_step=logged,
        )
    )


def noise_of(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `step` samples with."""
    generator = topk_vsae._next_noise(torch.tensor([seed, 0]), torch.device("cpu"))
    return torch.randn(N, D_SAE, dtype=dtype, generator=generator)


def weights(sae: TrainingSAE[Any]) -> dict[str, Tensor]:
    """Without what stock TopK does not have."""
    own = ("W_var", "b_var", "_extra_state")
    return {name: value for name, value in sae.state_dict().items() if name not in own}


def metric(output: TrainStepOutput, name: str) -> float:
    value = output.metrics[name]
    assert isinstance(value, Tensor)
    return float(value)


def some_dead(sae: TrainingSAE[Any], x: Tensor) -> Tensor:
    dead = ~sae.encode(x).bool().any(dim=0)
    dead[::7] = True
    return dead


def gradients(sae: TrainingSAE[Any], loss: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named(sae).items()}


def named(sae: TrainingSAE[Any]) -> dict[str, Tensor]:
    return dict(sae.named_parameters())


@torch.no_grad()
def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- variance="none" is TopK and a quadratic penalty ---


class PenalisedTopK(TopKTrainingSAE):
    """SAELens' TopK with 0.5 * coefficient * the sum of squares of its pre-activations."""

    over, relu_mean = "all", False

    def get_coefficients(self) -> dict[str, Any]:
        return {"kl": 0.7}

    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        charged = hidden_pre if self.over == "all" else hidden_pre.topk(self.cfg.k).values
        charged = charged.relu() if self.relu_mean else charged
        penalty = 0.5 * charged.square().sum(dim=-1).mean()
        return {**losses, "penalty": step_input.coefficients["kl"] * penalty}


def penalised(like: TopKVSAETrainingSAE) -> PenalisedTopK:
    given = {n: getattr(like.cfg, n) for n in TopKTrainingSAEConfig.__dataclass_fields__}
    sae = PenalisedTopK(
        TopKTrainingSAEConfig(**{**given, "metadata": copy.deepcopy(like.cfg.metadata)})
    )
    sae.load_state_dict(weights(like))
    sae.over, sae.relu_mean = like.cfg.kl_over, like.cfg.relu_mean
    return sae


@pytest.mark.parametrize("k", [SPARSE, DENSE])
@pytest.mark.parametrize("kl_over", ["all", "selected"])
@pytest.mark.parametrize("relu_mean", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_without_variance_it_is_topk_with_a_quadratic_penalty(k, kl_over, relu_mean, rescale, flag):
    options = {
        "k": k,
        "kl_over": kl_over,
        "relu_mean": relu_mean,
        "rescale_acts_by_decoder_norm": rescale,
        "apply_b_dec_to_input": flag,
    }
    for data in (friendly, nasty):
        for dtype in (torch.float32, torch.float64):
            x = data(N, D).to(dtype)
            sae = vsae(variance="none", dtype=str(dtype).removeprefix("torch."), **options)
            if flag:
                sae.b_dec.data.add_(x.mean(dim=0))
            stock = penalised(sae)
            dead = some_dead(sae, x)
            found, expected = step(sae, x, dead), step(stock, x, dead)
            assert torch.equal(found.feature_acts != 0, expected.feature_acts != 0)
            assert expected.losses["auxiliary_reconstruction_loss"] > 0
            # sums of as many terms in another order
            eps = torch.finfo(dtype).eps * (N * D_SAE) ** 0.5
            assert relative(found.feature_acts, expected.feature_acts) < eps
            assert relative(found.loss, expected.loss) < eps
            ours, theirs = gradients(sae, found.loss), gradients(stock, expected.loss)
            assert ours.keys() == theirs.keys()
            for name in ours:
                # what is summed for b_dec is larger than the sum
                size = theirs[name].norm().clamp(min=float(theirs["b_enc"].norm()))
                assert (ours[name] - theirs[name]).norm() < eps * size, name


def batches(n: int, dtype: torch.dtype = torch.float32, data: Any = friendly) -> Iterator[Tensor]:
    for i in range(n):
        yield data(N, D, seed=1)[torch.randperm(N, generator=torch.Generator().manual_seed(i))].to(
            dtype
        ) * (1 + 0.1 * i / n)


def trainer_config(n_steps: int, **options: Any) -> SAETrainerConfig:
    defaults: dict[str, Any] = {
        "total_training_samples": N * n_steps,
        "train_batch_size_samples": N,
        "lr": 1e-3,
        "lr_end": 1e-4,
        "dead_feature_window": 3,
    }
    return SAETrainerConfig(**{**defaults, **options})


@pytest.mark.parametrize("kl_over", ["all", "selected"])
@pytest.mark.parametrize("relu_mean", [True, False])
def test_so_it_is_after_some_steps_of_saelens_trainer(kl_over, relu_mean):
    n_steps = 30
    for dtype in ("float64", "float32"):
        sae = vsae(
            variance="none", kl_over=kl_over, relu_mean=relu_mean, dtype=dtype, kl_coefficient=0.7
        )
        before = copy.deepcopy(sae.state_dict())
        stock = penalised(sae)
        trained = []
        for each in (sae, stock):
            trainer = SAETrainer(
                trainer_config(n_steps), each, batches(n_steps, getattr(torch, dtype))
            )
            trainer.fit()
            assert trainer.dead_neurons.any()
            trained.append(named(each))
        # Adam divides gradients by their size, rounding errors with them
        bound = torch.finfo(getattr(torch, dtype)).eps * n_steps * N
        for name, value in trained[0].items():
            assert relative(value, before[name]) > 1e-3, name
            assert relative(value, trained[1][name]) < bound, name


# --- sampling ---


def reference(
    sae: TopKVSAETrainingSAE, x: Tensor, noise: Tensor, dead: Tensor, coefficient: float
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, its parts and its gradients, by the formulas, in float64."""
    cfg = sae.cfg
    p = {n: v.detach().double().requires_grad_() for n, v in named(sae).items()}
    x, noise = x.double(), noise.double()
    centred = x - p["b_dec"] if cfg.apply_b_dec_to_input else x
    norms = (
        p["W_dec"].norm(dim=1) if cfg.rescale_acts_by_decoder_norm else torch.ones(D_SAE).double()
    )
    pre = (centred @ p["W_enc"] + p["b_enc"]) * norms
    mu = pre.relu() if cfg.relu_mean else pre
    logvar = torch.full_like(mu, cfg.initial_logvar)
    if cfg.variance == "learned":
        logvar = centred @ p["W_var"] + p["b_var"]
    z = mu + noise * (logvar / 2).exp()
    selected = torch.zeros_like(z).scatter(1, z.topk(cfg.k).indices, 1.0)
    out = (z * selected).relu() / norms @ p["W_dec"] + p["b_dec"]
    if cfg.variance == "learned":
        one = torch.ones_like(mu)
        kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0 * one, one))
    else:
        kl = mu.square() / 2
    kl = (kl * selected if cfg.kl_over == "selected" else kl).sum(dim=1).mean()
    k_aux = min(D // 2, int(dead.sum()))
    of_dead = pre[:, dead]
    top = torch.zeros_like(of_dead).scatter(1, of_dead.topk(k_aux).indices, 1.0)
    revived = of_dead * top / norms[dead] @ p["W_dec"][dead]
    aux = (revived - (x - out).detach()).square().sum(dim=1).mean()
    parts = {
        "mse_loss": (out - x).square().sum(dim=1).mean(),
        "kl_loss": coefficient * kl,
        "auxiliary_reconstruction_loss": cfg.aux_loss_coefficient
        * min(1, int(dead.sum()) / (D // 2))
        * aux,
    }
    loss = sum(parts.values(), torch.zeros(()).double())
    grads = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
    return (
        loss,
        parts,
        {n: torch.zeros_like(p[n]) if g is None else g for n, g in zip(p, grads, strict=True)},
    )


@pytest.mark.parametrize("k", [SPARSE, DENSE])
@pytest.mark.parametrize("variance", ["fixed", "learned"])
@pytest.mark.parametrize("kl_over", ["all", "selected"])
@pytest.mark.parametrize("relu_mean", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_loss_and_gradients_are_those_of_the_formulas(k, variance, kl_over, relu_mean, flag):
    for dtype, rescale in (("float32", True), ("float64", True), ("float64", False)):
        x = friendly(N, D).to(getattr(torch, dtype))
        sae = vsae(
            k=k,
            variance=variance,
            initial_logvar=-1.0,
            kl_over=kl_over,
            relu_mean=relu_mean,
            dtype=dtype,
            apply_b_dec_to_input=flag,
            rescale_acts_by_decoder_norm=rescale,
        )
        dead = some_dead(sae, x)
        noise = noise_of(5, x.dtype)
        loss, parts, expected = reference(sae, x, noise, dead, 0.7)
        found = step(sae, x, dead, seed=5)
        eps = torch.finfo(x.dtype).eps * (N * D_SAE) ** 0.5
        assert found.losses.keys() == parts.keys()
        for name, value in parts.items():
            assert relative(found.losses[name], value) < eps, name
        assert relative(found.loss, loss) < eps
        for name, value in gradients(sae, found.loss).items():
            assert value.norm() > 0, name
            size = expected[name].norm().clamp(min=float(expected["b_enc"].norm()))
            assert (value - expected[name]).norm() < eps * size, name


def test_the_divergence_is_that_of_torch_distributions():
    g = torch.Generator().manual_seed(0)
    mu = torch.randn(50, 300, generator=g, dtype=torch.float64)
    logvar = 4 * torch.randn(50, 300, generator=g, dtype=torch.float64)
    logvar[:, ::2] *= 1e-3  # where a variance is nearly that of the prior, terms cancel
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        a, b = mu.to(dtype), logvar.to(dtype)
        normal = Normal(a.double(), (b.double() / 2).exp())
        one = torch.ones_like(normal.mean)
        expected = kl_divergence(normal, Normal(0 * one, one)).sum(dim=1)
        found = kl_to_standard_normal(a, b)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.allclose(found.double(), expected, rtol=300 * torch.finfo(found.dtype).eps)
        fixed = kl_to_standard_normal(a).double()
        assert torch.allclose(fixed, a.double().square().sum(dim=1) / 2, rtol=1e-5)
    # of latents that are nearly at the prior, as most are at the end of training
    near = (0.01 * logvar[:, 1::2]).to(torch.bfloat16)
    exact = 0.5 * (near.double().expm1() - near.double()).sum(dim=1)
    found = kl_to_standard_normal(torch.zeros_like(near), near)
    assert (found > 0).all()
    assert torch.allclose(found.double(), exact, rtol=1e-3)


def test_the_custom_gradients_are_right():
    g = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    assert torch.autograd.gradcheck(kl_to_standard_normal, (some(3, 5), some(3, 5)))
    assert torch.autograd.gradcheck(kl_to_standard_normal, (some(3, 5),))
    for shape in ((6, 4), (2, 3, 4)):
        x = some(*shape).detach()
        assert torch.autograd.gradcheck(
            lambda W, b, b_dec, x=x: _affine(x - b_dec, W, b, b_dec), (some(4, 5), some(5), some(4))
        )


def test_an_input_that_asks_for_its_gradient_gets_it():
    sae = vsae(variance="learned", dtype="float64", k=DENSE)
    x = friendly(N, D).double()
    found = step(sae, x)
    of_b_dec = gradients(sae, found.loss)["b_dec"].clone()
    asked = x.clone().requires_grad_()
    loss = step(sae, asked).loss
    assert torch.allclose(gradients(sae, loss)["b_dec"], of_b_dec, rtol=1e-10)
    assert asked.grad is not None
    assert asked.grad.norm() > 0


def test_the_initial_log_variance_is_that_of_every_input():
    torch.manual_seed(0)
    sae = TopKVSAETrainingSAE(
        TopKVSAETrainingConfig(d_in=D, d_sae=D_SAE, k=SPARSE, initial_logvar=-2.5)
    )
    x = nasty(N, D)
    assert torch.equal(x @ sae.W_var + sae.b_var, torch.full((N, D_SAE), -2.5))
    fixed = TopKVSAETrainingSAE(
        TopKVSAETrainingConfig(d_in=D, d_sae=D_SAE, k=SPARSE, initial_logvar=-2.5, variance="fixed")
    )
    assert not hasattr(fixed, "W_var")
    fixed.load_state_dict(weights(sae))
    assert torch.equal(step(sae, x).feature_acts, step(fixed, x).feature_acts)
    # and these latents are sampled with it
    latents, pre = step(fixed, x).feature_acts.double(), step(fixed, x).hidden_pre.double()
    z = pre + noise_of(5).double() * math.exp(-1.25)
    active = latents != 0
    assert torch.allclose(latents[active], z[active], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("variance", ["none", "fixed", "learned"])
@pytest.mark.parametrize("relu_mean", [True, False])
def test_nothing_is_sampled_outside_of_a_training_step(variance, relu_mean):
    sae = vsae(variance=variance, relu_mean=relu_mean)
    stock = penalised(vsae(variance="none"))
    stock.load_state_dict(weights(sae))
    x = friendly(N, D)
    for training in (True, False):
        sae.train(training)
        state = torch.get_rng_state()
        assert torch.equal(sae.encode(x), stock.encode(x))
        assert torch.equal(sae(x), stock(x))
        assert torch.equal(torch.get_rng_state(), state)
        step(sae, x)
    assert torch.equal(sae.encode(x[0]), stock.encode(x[0]))
    shaped = x.reshape(4, 16, D)
    assert torch.equal(sae(shaped), stock(shaped))


@pytest.mark.parametrize("where", ["mse_loss_fn", "calculate_topk_aux_loss", "hook_sae_acts_post"])
def test_a_step_that_fails_leaves_no_sampling_behind(where, monkeypatch):
    sae = vsae()
    x = friendly(N, D)
    expected = sae.encode(x)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    if where == "hook_sae_acts_post":
        sae.hook_sae_acts_post.add_hook(fails)
    else:
        monkeypatch.setattr(sae, where, fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(sae, x)
    sae.reset_hooks()
    monkeypatch.undo()
    assert torch.equal(sae.encode(x), expected)
    assert torch.equal(sae(x), sae.decode(expected))
    copy.deepcopy(sae)  # which autograd's tensors of a step would forbid


@pytest.mark.parametrize("k", [SPARSE, DENSE])
def test_hooks_on_latents_act_in_training_as_in_saelens(k):
    sae = vsae(variance="none", k=k)
    stock = penalised(sae)
    x = friendly(N, D)
    untouched = step(sae, x).sae_out.detach()
    outputs = []
    for each in (sae, stock):
        each.hook_sae_acts_post.add_hook(lambda tensor, hook: tensor * 0.5)
        outputs.append(step(each, x).sae_out.detach())
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert not torch.allclose(outputs[0], untouched, atol=1e-2)


# --- sparse steps under whitening ---


def whitened(**options: Any) -> TopKVSAETrainingSAE:
    options = {"dtype": "float64", "kl_over": "selected", "initial_logvar": -1.0, **options}
    sae = vsae(normalize_activations="covariance_whitening", **options)
    enter_whitened_space(sae)
    set_whitening(sae, whitening_of(friendly(500, D)))
    return sae


@pytest.mark.parametrize("variance", ["none", "fixed", "learned"])
@pytest.mark.parametrize("relu_mean", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_sparse_steps_have_the_values_and_gradients_of_dense_ones(
    variance, relu_mean, flag, monkeypatch
):
    x = whitening_of(friendly(500, D)).whiten(friendly(N, D, seed=1).double())
    for rescale, n_dead in itertools.product((True, False), (0, 5, 60)):
        sae = whitened(
            variance=variance,
            relu_mean=relu_mean,
            apply_b_dec_to_input=flag,
            rescale_acts_by_decoder_norm=rescale,
        )
        dead = torch.arange(D_SAE) % 3 < 2 if n_dead == 60 else torch.arange(D_SAE) < n_dead
        steps = []
        for share in (1 / 16, 0.0):
            monkeypatch.setitem(sparse_step._SPARSE_UP_TO, "cpu", share)
            for logged in (False, True):
                found = step(sae, x, dead, logged=logged)
                assert isinstance(found, SparseStepOutput) == (share > 0)
                if share > 0:
                    assert found.feature_acts.is_sparse != logged
                seen = {**found.losses, **gradients(sae, found.loss), "sae_out": found.sae_out}
                seen |= {"latents": found.feature_acts.to_dense(), "hidden_pre": found.hidden_pre}
                steps.append((seen, found.metrics))
        for (sparse, metrics), (dense, dense_metrics) in zip(steps[:2], steps[2:], strict=True):
            # in float64, but the metric has float32 weights
            torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(metrics, dense_metrics, rtol=1e-6, atol=1e-9)
        for name in found.losses.keys() | named(sae).keys():  # logging changes no training
            assert torch.equal(steps[0][0][name], steps[1][0][name]), name


def test_noise_drawn_for_some_rows_at_a_time_is_that_drawn_at_once(monkeypatch):
    x = whitening_of(friendly(500, D)).whiten(friendly(N, D, seed=1)).float()
    found = []
    for n_rows in (N, 24):
        monkeypatch.setitem(sparse_module._ROWS, "cpu", n_rows)
        found.append(step(whitened(dtype="float32"), x).feature_acts.to_dense())
    torch.testing.assert_close(found[0], found[1])


def test_a_divergence_of_all_latents_takes_dense_steps():
    x = whitening_of(friendly(500, D)).whiten(friendly(N, D)).double()
    assert not isinstance(step(whitened(kl_over="all"), x), SparseStepOutput)


# --- the noise is the SAE's own ---


def sampled() -> TopKVSAETrainingSAE:
    torch.manual_seed(3)
    return vsae(initial_logvar=-4.0)


def same(a: TrainingSAE[Any], b: TrainingSAE[Any]) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_noise_depends_on_nothing_else_that_draws_random_numbers():
    trained = []
    for beside in (False, True):
        sae = sampled()
        trainer = SAETrainer(trainer_config(5), sae, iter(()))
        other = SAETrainer(trainer_config(5), vsae(seed=8), iter(()))
        before = torch.get_rng_state()
        for batch in batches(5):
            trainer.step(batch)
            if beside:
                torch.rand(7)
                other.step(batch)
        assert beside or torch.equal(torch.get_rng_state(), before)
        trained.append(sae)
    assert same(*trained)


def test_in_lockstep_it_becomes_what_it_becomes_alone():
    trained = []
    for names in ("a", "ab"):
        torch.manual_seed(1)
        saes: dict[str, Any] = {"a": TopKVSAETrainingSAE(config("none", initial_logvar=-4.0))}
        if "b" in names:
            saes["b"] = TopKVSAETrainingSAE(config(initial_logvar=-3.0))
        else:
            saes["c"] = training_sae("topk", k=SPARSE)
        runner = WhiteningMultiSAETrainingRunner(
            multi_config(training_tokens=128 * 8, saes={n: each.cfg for n, each in saes.items()}),
            whitening=FEW,
            override_dataset=tiny_dataset(),
            override_model=tiny_model(),
            override_saes=saes,
        )
        torch.manual_seed(2)
        trained.append(runner.run()["a"])
    assert same(*trained)


def test_noise_follows_from_the_seed_that_the_sae_was_made_with():
    first, again = sampled(), sampled()
    x = friendly(N, D)
    outputs = []
    for each in (first, again):
        torch.manual_seed(len(outputs))  # is not asked any more
        outputs.append(each.training_forward_pass(TrainStepInput(x, {"kl": 1.0}, None, 0, False)))
    assert torch.equal(outputs[0].feature_acts, outputs[1].feature_acts)
    # the next draw is another one, and so is that of another seed
    later = first.training_forward_pass(TrainStepInput(x, {"kl": 1.0}, None, 0, False))
    assert not torch.equal(later.feature_acts, outputs[0].feature_acts)
    torch.manual_seed(4)
    other = TopKVSAETrainingSAE(first.cfg)
    other.load_state_dict(weights(first), strict=False)
    assert not torch.equal(other.get_extra_state(), again.get_extra_state())


def test_parts_of_a_batch_in_several_processes_have_noise_of_their_own(monkeypatch):
    def drawn(rank: int) -> Tensor:
        monkeypatch.setattr(topk_vsae.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(topk_vsae.distributed, "get_rank", lambda: rank)
        return noise_of(5)

    assert torch.equal(drawn(0), noise_of(5))
    assert abs(float((drawn(0) * drawn(1)).mean())) < 0.1


def test_saelens_trainer_resumes_the_noise(tmp_path):
    x = list(batches(6))
    expected = SAETrainer(trainer_config(6), sampled(), iter(x)).fit()
    stopped = SAETrainer(trainer_config(6), sampled(), iter(x))
    for i in range(3):
        stopped.step(x[i])
        stopped.n_training_steps += 1
    stopped.save_checkpoint("there", base_path=tmp_path)
    torch.manual_seed(99)
    resumed = SAETrainer(trainer_config(6), vsae(seed=5), iter(x[3:]))
    resumed.load_trainer_state(tmp_path / "there")
    resumed.sae.load_weights_from_checkpoint(tmp_path / "there")
    assert same(resumed.fit(), expected)


def test_whitened_training_resumes_the_noise(tmp_path):
    def trainer(sae: TrainingSAE[Any], data: Any, **options: Any) -> WhiteningTrainer:
        return WhiteningTrainer(trainer_config(20, **options), sae, data, FEW)

    def white(seed: int) -> TrainingSAE[Any]:
        return vsae(seed=seed, normalize_activations="covariance_whitening", initial_logvar=-4.0)

    options = {"n_checkpoints": 1, "checkpoint_path": str(tmp_path)}
    expected = trainer(white(0), batches(30), **options).fit()
    torch.manual_seed(99)
    resumed = trainer(white(5), iter(()))
    (checkpoint,) = tmp_path.iterdir()
    resumed.load_trainer_state(checkpoint)
    resumed.stream.source = itertools.islice(batches(30), resumed.stream.n_served, None)
    assert same(resumed.fit(), expected)


def test_weights_without_a_place_in_the_noise_are_loaded():
    sae = sampled()
    saved = {n: v for n, v in sae.state_dict().items() if n != "_extra_state"}
    other = vsae(seed=5)
    place = other.get_extra_state().clone()
    other.load_state_dict(saved)
    assert torch.equal(other.W_enc, sae.W_enc)
    assert torch.equal(other.get_extra_state(), place)


# --- metrics ---


def test_selection_overlap_of_two_samples_by_hand(monkeypatch):
    sae = vsae(d_in=3, d_sae=4, k=2, variance="fixed", rescale_acts_by_decoder_norm=False)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.copy_(torch.ones(4))
    samples = [[3.0, 2, 1, 0], [0.0, 3, 2, 1]], [[0.0, 1, 5, 5], [0.0, 0, 9, 2]]
    alone = [[3.0, -9, -9, -9], [3.0, -9, -9, -9]]  # the second largest is negative: not active
    none = [[-9.0, -9, -9, -9], [-8.0, -9, -9, -9]]
    drawn = iter(torch.tensor([*samples, alone, none]).transpose(0, 1))
    monkeypatch.setattr(topk_vsae, "_normal", lambda like, generator: next(drawn))
    found = sae.selection_overlap(torch.randn(4, 3))
    assert torch.allclose(found, torch.tensor([1 / 3, 1.0, 1.0, 1.0]))


def test_selection_overlap_falls_as_the_variance_grows():
    x = friendly(400, D)
    found = [
        float(vsae(variance="fixed", k=8, initial_logvar=v).selection_overlap(x).mean())
        for v in (-16.0, -12.0, -9.0, -7.0, -5.0)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.95
    assert found[-1] < 0.3
    # 8 of 96, twice at random
    by_chance = vsae(variance="fixed", k=8, initial_logvar=20.0).selection_overlap(x).mean()
    common = hypergeom(D_SAE, 8, 8)
    expected = common.expect(lambda n: n / (16 - n))  # pyright: ignore[reportAttributeAccessIssue]
    assert float(by_chance) == pytest.approx(expected, rel=0.15)
    assert torch.equal(vsae(variance="none").selection_overlap(x), torch.ones(400))
    learned = vsae(variance="learned", k=8)
    with torch.no_grad():
        learned.W_var.zero_()
        learned.b_var.fill_(-9.0)
    torch.manual_seed(0)
    assert float(learned.selection_overlap(x).mean()) == pytest.approx(found[2], abs=0.05)


@pytest.mark.parametrize("variance", ["none", "fixed", "learned"])
def test_what_is_trained_does_not_depend_on_what_is_logged(variance):
    x = friendly(N, D)
    dead = some_dead(vsae(), x)
    found = []
    for logged in (True, False):
        sae = vsae(variance=variance)
        optimizer = torch.optim.Adam(sae.parameters())
        torch.manual_seed(1)
        for i in range(5):
            output = sae.training_forward_pass(
                TrainStepInput(x, {"kl": 1.0}, dead, i, is_logging_step=logged)
            )
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert set(output.metrics) == (
                {"kl", "selection_overlap", "live_fraction"} if logged else {"kl"}
            )
            if logged:
                assert output.metrics["live_fraction"] == 1 - dead.float().mean()
                assert (output.metrics["selection_overlap"] == 1) == (variance == "none")
            assert output.losses["kl_loss"].item() == pytest.approx(metric(output, "kl"))
        found.append(sae.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_coefficient_warms_up_from_nothing():
    sae = vsae(kl_coefficient=0.8, kl_warm_up_steps=4)
    trainer = SAETrainer(trainer_config(7), sae, batches(7))
    outputs = [trainer.step(batch) for batch in batches(7)]
    coefficients = [float(o.losses["kl_loss"]) / metric(o, "kl") for o in outputs]
    assert coefficients == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


# --- precision ---

# before, no SAE of sae-lens has a gradient with weights in bfloat16 and activations in float32
MSE_OF_MIXED_DTYPES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)


@pytest.mark.parametrize("k", [SPARSE, DENSE])
@pytest.mark.parametrize("variance", ["none", "learned"])
def test_bfloat16_weights_and_autocast_cost_their_rounding_and_no_more(variance, k):
    x = friendly(N, D)
    options: dict[str, Any] = {"variance": variance, "k": k}
    exact = step(vsae(**options), x, logged=True)
    sae = vsae(**options)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = step(sae, x, logged=True)
    gradients(sae, autocast.loss)
    low = vsae(dtype="bfloat16", **options)
    found = [autocast]
    # with noise, it is drawn in bfloat16, and is another then
    if variance == "none" and MSE_OF_MIXED_DTYPES:
        found.append(step(low, x, logged=True))
        gradients(low, found[-1].loss)
    for each in found:
        for name, value in exact.losses.items():
            assert float(each.losses[name]) == pytest.approx(float(value), rel=0.05), name


def test_it_trains_in_bfloat16_and_under_autocast():
    cases: Any = [({}, {"autocast": True})]
    if MSE_OF_MIXED_DTYPES:
        cases.append(({"dtype": "bfloat16"}, {}))
    for options, trainer_options in cases:
        sae = vsae(kl_coefficient=1e-3, initial_logvar=-6.0, **options)
        trainer = SAETrainer(
            trainer_config(60, lr=1e-2, lr_end=1e-3, **trainer_options), sae, batches(60)
        )
        losses = [float(trainer.step(b).losses["mse_loss"]) for b in batches(60)]
        assert losses[-1] < 0.7 * losses[0]
        assert all(p.isfinite().all() for p in sae.parameters())


# --- folding ---


def posterior(sae: TopKVSAETrainingSAE, x: Tensor) -> tuple[Tensor, Tensor]:
    centred = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
    norms = sae.W_dec.norm(dim=1) if sae.cfg.rescale_acts_by_decoder_norm else 1.0
    mu = (centred @ sae.W_enc + sae.b_enc) * norms
    return mu.detach(), (centred @ sae.W_var + sae.b_var).detach()


def under_whitening(seed: int = 0, **options: Any) -> TopKVSAETrainingSAE:
    return vsae(seed, normalize_activations="covariance_whitening", **options)


@pytest.mark.parametrize("built_in", [False, True])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("data", [friendly, nasty])
def test_the_posterior_of_the_folded_sae_is_that_of_the_trained_one(data, flag, rescale, built_in):
    x = data(300, D).double()
    whitening = whitening_of(x, WhiteningConfig(eps=1e-9))
    sae = under_whitening(
        dtype="float64", apply_b_dec_to_input=flag, rescale_acts_by_decoder_norm=rescale
    )
    z = whitening.whiten(x)
    expected, latents, output = posterior(sae, z), sae.encode(z), sae(z)
    torch.manual_seed(0)
    overlap = sae.selection_overlap(z)
    if built_in:
        sae.fold_activation_whitening(whitening.mean, whitening.W, whitening.W_inv)
    else:
        report = fold_whitening_into_weights(sae, whitening, activations=x)
        assert report.architecture == "topk_vsae"
        assert report.check is not None
        assert report.check.passed
    bound = 1e-13 if data is friendly else 1e-10
    for found, value in zip(posterior(sae, x), expected, strict=True):
        assert relative(found, value) < bound
    assert relative(sae.encode(x), latents) < bound
    assert relative(sae(x), whitening.dewhiten(output)) < bound
    torch.manual_seed(0)
    assert torch.equal(sae.selection_overlap(x), overlap)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_folded_to_float32_with_its_variance(dtype):
    x = nasty(300, D)
    whitening = whitening_of(x, WhiteningConfig(eps=1e-9))
    sae = under_whitening(dtype=dtype)
    wide = copy.deepcopy(sae).to(torch.float64)
    expected = posterior(wide, whitening.whiten(x.double()))
    report = fold_whitening_into_weights(sae, whitening, activations=x)
    assert report.check is not None
    assert {p.dtype for p in sae.parameters()} == {torch.float32}
    for found, value in zip(posterior(sae, x), expected, strict=True):
        assert relative(found, value) < 4 * EPS32 * whitening.condition_number


@settings(max_examples=20, deadline=None)
@given(
    variance=st.sampled_from(["none", "fixed", "learned"]),
    kind=st.sampled_from(["pca", "zca"]),
    strength=st.sampled_from([0.0, 0.5, 1.0]),
    rescale=st.booleans(),
    flag=st.booleans(),
    seed=st.integers(0, 100),
)
def test_fold_then_unfold_and_unfold_then_fold_are_the_identity(
    variance, kind, strength, rescale, flag, seed
):
    x = nasty(300, D, seed, torch.float64)
    whitening = whitening_of(x, WhiteningConfig(kind=kind, strength=strength))
    sae = under_whitening(
        seed,
        dtype="float64",
        variance=variance,
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=flag,
    )
    z = whitening.whiten(x)
    loss = float(step(sae, z).loss)
    fold_whitening_into_weights(sae, whitening)
    plain = {name: p.clone() for name, p in sae.named_parameters()}
    unfold_whitening_from_weights(sae, whitening)
    # the loss has everything in it: mu, log variance, noise and selection
    assert float(step(sae, z).loss) == pytest.approx(loss, rel=1e-9)
    fold_whitening_into_weights(sae, whitening)
    for name, parameter in sae.named_parameters():
        assert torch.allclose(parameter, plain[name], rtol=1e-9, atol=1e-8), name


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("variance", ["none", "fixed", "learned"])
def test_a_scaling_factor_that_is_folded_in_keeps_the_posterior_up_to_its_unit(variance, rescale):
    factor = 0.37
    x = friendly(300, D).double()
    sae = vsae(
        dtype="float64",
        variance=variance,
        initial_logvar=-1.0,
        rescale_acts_by_decoder_norm=rescale,
        normalize_activations="expected_average_only_in",
    )
    given = sae.cfg
    torch.manual_seed(0)
    overlap = sae.selection_overlap(factor * x)
    before = step(sae, factor * x)
    sae.fold_activation_norm_scaling_factor(factor)
    after = step(sae, x)
    unit = factor if rescale else 1.0
    assert relative(after.hidden_pre, before.hidden_pre / unit) < 1e-12
    assert relative(after.feature_acts, before.feature_acts / unit) < 1e-12
    assert relative(after.sae_out, before.sae_out / factor) < 1e-12
    torch.manual_seed(0)
    assert torch.equal(sae.selection_overlap(x), overlap)
    assert sae.cfg.normalize_activations == "none"
    assert given.initial_logvar == -1.0
    if variance != "fixed":
        assert sae.cfg.initial_logvar == -1.0


def test_an_extreme_variance_does_not_stop_the_fold_at_the_end_of_training():
    sae = vsae(
        variance="fixed", initial_logvar=-60.0, normalize_activations="expected_average_only_in"
    )
    sae.fold_activation_norm_scaling_factor(2.0)
    assert sae.cfg.initial_logvar == -60.0


def test_a_copy_and_a_checkpoint_of_saelens_trainer_are_the_same_sae(tmp_path):
    sae = vsae(kl_over="selected", initial_logvar=-2.0, kl_warm_up_steps=5)
    trainer = SAETrainer(trainer_config(5), sae, batches(5))
    trainer.fit()
    trainer.save_checkpoint("there", base_path=tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path / "there")
    assert isinstance(loaded, TopKVSAETrainingSAE)
    x = friendly(N, D)
    expected = step(sae, x)
    for other in (copy.deepcopy(sae), loaded):
        found = step(other, x)
        assert torch.equal(found.loss, expected.loss)
        assert other.cfg.to_dict() == sae.cfg.to_dict()
    for n, value in named(sae).items():
        assert torch.equal(value, named(loaded)[n]), n


# --- configuration ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": "some"}, "variance='some': one of none, fixed, learned"),
        ({"kl_over": "most"}, "kl_over='most': one of all, selected"),
        ({"kl_coefficient": -1.0}, "kl_coefficient=-1.0"),
        ({"kl_coefficient": float("nan")}, "kl_coefficient=nan"),
        ({"kl_coefficient": float("inf")}, "kl_coefficient=inf"),
        ({"kl_warm_up_steps": -3}, "kl_warm_up_steps=-3"),
        ({"kl_warm_up_steps": 0.1}, "kl_warm_up_steps=0.1: must be a whole number"),
        ({"aux_loss_coefficient": -1.0}, "aux_loss_coefficient=-1.0"),
        ({"relu_mean": "no"}, "relu_mean='no': True or False"),
        ({"k": 0}, "k=0"),
        ({"k": 10_000}, "k=10000: there are"),
        ({"initial_logvar": 100.0}, "between -60 and 60"),
        ({"initial_logvar": float("nan")}, "between -60 and 60"),
        ({"use_sparse_activations": True}, "leave it at False"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TopKVSAETrainingConfig(**{"d_in": D, "d_sae": D_SAE, "k": SPARSE, **options})


def test_sparsity_norms_of_the_original_space_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="compares its latents with a prior"):
        WhiteningTrainer(
            trainer_config(5),
            under_whitening(),
            batches(5),
            WhiteningConfig(sparsity_norms="original"),
        )


# --- runs ---

RUN: dict[str, Any] = {"training_tokens": 128 * 24, "dead_feature_window": 5, "lr": 3e-3}
FEW = WhiteningConfig(n_samples=1000)
WHITENED_LOSS = WhiteningConfig(n_samples=1000, loss_space="whitened")


def config(normalize: str = "covariance_whitening", **options: Any) -> TopKVSAETrainingConfig:
    return TopKVSAETrainingConfig(
        d_in=32,
        d_sae=128,
        k=SPARSE,
        kl_coefficient=1e-3,
        normalize_activations=normalize,  # pyright: ignore[reportArgumentType]
        **{"initial_logvar": -4.0, **options},
    )


def multi_config(saes: dict[str, Any], **options: Any) -> MultiSAETrainingRunnerConfig:
    defaults: dict[str, Any] = {
        "hook_names": dict.fromkeys(saes, "blocks.1.hook_resid_pre"),
        "model_name": "tiny",
        "dataset_path": "local",
        "streaming": False,
        "context_size": 32,
        "training_tokens": 128 * 24,
        "train_batch_size_tokens": 128,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 16,
        "lr": 3e-3,
        "logger": runner_config().logger,
        "checkpoint_path": None,
        "output_path": None,
    }
    return MultiSAETrainingRunnerConfig(saes=saes, **{**defaults, **options})


def run(path: Path, normalize: str, whitening: WhiteningConfig | None, **options: Any) -> Any:
    torch.manual_seed(7)
    overrides: Any = {"override_dataset": tiny_dataset(), "override_model": tiny_model()}
    cfg = runner_config(**{**RUN, "sae": config(normalize), "output_path": str(path), **options})
    if normalize == "covariance_whitening":
        return WhiteningTrainingRunner(cfg, whitening, **overrides).run()
    return LanguageModelSAETrainingRunner(cfg, **overrides).run()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("runs")
    trained = {
        "stock": run(root / "stock", "none", None),
        "scaled": run(
            root / "scaled", "expected_average_only_in", None, n_batches_for_norm_estimate=20
        ),
        "white": run(
            root / "white",
            "covariance_whitening",
            FEW,
            n_checkpoints=1,
            checkpoint_path=str(root / "checkpoints"),
        ),
        "white_loss": run(root / "white_loss", "covariance_whitening", WHITENED_LOSS),
    }
    torch.manual_seed(7)
    multi = WhiteningMultiSAETrainingRunner(
        multi_config(
            saes={"a": config(variance="fixed"), "b": config("none", variance="none")},
            output_path=str(root / "multi"),
        ),
        whitening=FEW,
        override_dataset=tiny_dataset(),
        override_model=tiny_model(),
    )
    saes = multi.run()
    return {"root": root, **trained, "multi/a": saes["a"], "multi/b": saes["b"]}


def test_what_is_saved_is_a_topk_sae_for_a_process_that_never_heard_of_us(runs):
    root = runs["root"]
    x = 3 * friendly(40, 32)
    names = [name for name in runs if name != "root"]
    for name in names:
        sae = runs[name]
        assert isinstance(sae, TopKVSAETrainingSAE), name
        latents = sae.encode(x).detach()
        torch.save((x, latents, sae.decode(latents).detach()), root / name / "expected.pt")
        saved = json.loads((root / name / "cfg.json").read_text())
        assert saved["metadata"]["training_architecture"] == "topk_vsae"
        details = saved["metadata"]["training_architecture_details"]
        assert details["variance"] == sae.cfg.variance
    code = """
        import os, sys, torch
        from sae_lens import SAE, TopKSAE
        for path in sys.argv[1:]:
            sae = SAE.load_from_disk(path)
            assert type(sae) is TopKSAE and sae.cfg.architecture() == "topk", path
            assert set(sae.state_dict()) == {"W_enc", "b_enc", "W_dec", "b_dec"}, path
            if not os.path.exists(path + "/expected.pt"):
                continue
            x, latents, output = torch.load(path + "/expected.pt")
            found = sae.encode(x).detach()
            assert torch.equal(found != 0, latents != 0), path
            assert torch.allclose(found, latents, rtol=1e-4, atol=1e-5), path
            assert torch.allclose(sae.decode(found), output, rtol=1e-4, atol=1e-4), path
        assert "sae_whiten" not in sys.modules
    """
    # a checkpoint keeps the training form, which is of a class that is ours, and this beside it
    checkpoints = list((root / "checkpoints").glob("*/*/inference"))
    assert checkpoints
    paths = [
        *(str(root / name) for name in names),
        *(str(loadable_folder(path)) for path in checkpoints),
    ]
    process = run_code(code, *paths)
    assert process.returncode == 0, process.stderr


def test_every_run_reconstructs_and_its_fold_is_proved(runs):
    for name in ("white", "white_loss", "multi/a"):
        fold = runs[name].cfg.metadata.whitening["fold"]
        assert fold["check"]["fold_error"] <= fold["check"]["tolerance"], name
    for name in runs.keys() - {"root"}:
        before = TopKVSAETrainingSAE(config(variance=runs[name].cfg.variance))
        assert relative(runs[name].W_enc, before.W_enc) > 1e-2, name
    assert relative(runs["white"].W_dec, runs["white_loss"].W_dec) > 1e-2
    assert relative(runs["white"].W_var, torch.ones(32, 128)) > 0


def test_a_checkpoint_is_resumed_to_the_same_weights_noise_included(runs, tmp_path):
    (checkpoint,) = (p for p in (runs["root"] / "checkpoints").glob("*/*") if p.name.isdigit())
    assert 0 < int(checkpoint.name) < 128 * 24
    resumed = run(
        tmp_path / "out", "covariance_whitening", None, resume_from_checkpoint=str(checkpoint)
    )
    expected = runs["white"].state_dict()
    assert expected.keys() == resumed.state_dict().keys() >= {"W_var", "b_var"}
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name
