"""Small SAEs, their training, and an independent reference for their output.

`Reference` computes an SAE in whitened coordinates in float64. Folded SAEs are compared with it;
the difference is measured in units of the largest rounding error of float32. "Stock" is the
`covariance_whitening` of sae-lens (>= 6.52).
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    LanguageModelSAETrainingRunner,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    Transcoder,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from transformer_lens import HookedTransformer

from sae_whiten import (
    FoldError,
    WhiteningConfig,
    WhiteningTrainer,
    WhiteningTrainingRunner,
)
from tests.support import nasty, tiny_dataset, tiny_model

D_IN, D_SAE, K, BATCH = 16, 64, 4, 64


UNIT = torch.finfo(torch.float32).eps / 2
"""Largest relative error of one rounding to float32."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


FEATURES = torch.randn(32, D_IN, generator=seeded(0)) * torch.logspace(-1, 1, D_IN)


def batches(seed: int = 0, scale: float = 1.0, rows: int = BATCH) -> Iterator[Tensor]:
    """Endless batches, (rows, 16): 3 of 32 features active on average, anisotropic, offset 5."""
    generator = seeded(seed)
    while True:
        active = torch.rand(rows, 32, generator=generator) < 3 / 32
        codes = active * (1 + torch.rand(rows, 32, generator=generator))
        noise = 0.01 * torch.randn(rows, D_IN, generator=generator)
        yield (codes @ FEATURES + noise + 5.0) * scale


def activations(n: int, seed: int = 1000, scale: float = 1.0) -> Tensor:
    return next(batches(seed, scale, rows=n))


def large_means(n: int, start: int = 0) -> Tensor:
    """Like language models: covariance of condition 1e6, and four dimensions with mean 3000."""
    return nasty(8192, D_IN)[start : start + n]


def topk_config(**changes: Any) -> TopKTrainingSAEConfig:
    options: dict[str, Any] = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "k": K,
        "normalize_activations": "covariance_whitening",
    }
    return TopKTrainingSAEConfig(**{**options, **changes})


def topk_sae(cfg: TopKTrainingSAEConfig | None = None, seed: int = 1) -> TopKTrainingSAE:
    torch.manual_seed(seed)
    return TopKTrainingSAE(topk_config() if cfg is None else cfg)


def randomised(sae: Any, seed: int = 3) -> Any:
    """`sae` with biases as large as pre-activations, because a zero would hide any mistake."""
    generator = seeded(seed)
    for name, parameter in sae.named_parameters():
        if name.startswith("b_") or name == "W_skip":
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (0.3 * noise).to(parameter.dtype)
        elif name == "W_dec":
            # trained decoder rows differ in their norms
            norms = 0.5 + torch.rand(len(parameter), 1, generator=generator)
            parameter.data = parameter.data * norms.to(parameter.dtype)
        elif name == "threshold":
            parameter.data = 0.1 + 0.1 * torch.rand(parameter.shape, generator=generator)
    return sae


def trainer_config(n_steps: int = 40, **changes: Any) -> SAETrainerConfig:
    options: dict[str, Any] = {
        "total_training_samples": n_steps * BATCH,
        "train_batch_size_samples": BATCH,
        "lr": 1e-2,
        "lr_end": 1e-2,
        # only for sae-lens' own estimate
        "n_batches_for_norm_estimate": 25,
    }
    return SAETrainerConfig(**{**options, **changes})


def run_by_hand(trainer: SAETrainer[Any, Any], n_steps: int) -> None:
    """The training loop of `fit()` without the final fold: weights stay in whitened coordinates."""
    if isinstance(trainer, WhiteningTrainer):
        trainer.estimate_whitening()
    elif trainer.activation_scaler.whitening is None:
        trainer.activation_scaler.estimate_whitening(
            D_IN, trainer.data_provider, trainer.cfg.n_batches_for_norm_estimate
        )
    for _ in range(n_steps):
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1


def estimated_by_stock(x: Tensor) -> Any:
    scaler = ActivationScaler()
    scaler.estimate_whitening(x.shape[1], iter([x]), n_batches_for_norm_estimate=1)
    return scaler.whitening


def stock_fold(sae: SAE[Any], whitening: Any) -> None:
    sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)


def state(sae: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in sae.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether both are equal to the bit."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@torch.no_grad()
def explained_variance(sae: Any, x: Tensor) -> float:
    """Explained variance on raw activations, without a scaler."""
    error, centred = (x - sae(x)).double(), x.double() - x.double().mean(0)
    return 1 - float(error.square().sum() / centred.square().sum())


@dataclass
class Reference:
    """An SAE in whitened coordinates between whitening and dewhitening, in float64.

    Attributes:
        weights: State dict of the SAE.
        input: Whitening of the input, ours or that of sae-lens: both have `mean`, `matrix` and
            `inverse_matrix`.
        output: Whitening of the output.
        subtracts_b_dec: Whether b_dec is subtracted from the input.
        rescales: Whether latents are ranked by pre-activation times decoder norm.
        k: With k, those of the k largest pre-activations that are positive are active.
        threshold: Without k, pre-activations above the threshold are active.
    """

    weights: dict[str, Tensor]
    input: Any
    output: Any
    subtracts_b_dec: bool
    rescales: bool
    k: int | None
    threshold: Tensor

    @classmethod
    def of(cls, sae: Any, whitening: Any, output_whitening: Any = None) -> "Reference":
        architecture = sae.cfg.architecture()
        threshold = torch.tensor(0.0)
        if architecture == "batchtopk":
            # saved as a JumpReLU SAE, whose threshold has the dtype of the weights
            threshold = sae.topk_threshold.to(torch.float32)
        elif "jumprelu" in architecture:
            threshold = sae.threshold
        return cls(
            weights={name: value.detach().double() for name, value in state(sae).items()},
            input=whitening,
            output=output_whitening or whitening,
            subtracts_b_dec=sae.cfg.apply_b_dec_to_input and not isinstance(sae, Transcoder),
            rescales=getattr(sae.cfg, "rescale_acts_by_decoder_norm", False),
            k=getattr(sae.cfg, "k", None) if architecture == "topk" else None,
            threshold=threshold.detach().double(),
        )

    @property
    def norms(self) -> Tensor:
        norms = self.weights["W_dec"].norm(dim=1)
        return norms if self.rescales else torch.ones_like(norms)

    def pre_activations(self, x: Tensor) -> Tensor:
        z = (x.double() - self.input.mean) @ self.input.matrix
        if self.subtracts_b_dec:
            z = z - self.weights["b_dec"]
        return (z @ self.weights["W_enc"] + self.weights["b_enc"]) * self.norms

    def level(self, pre: Tensor) -> Tensor:
        """The level above which a latent is active, (n, d_sae) or (n, 1)."""
        if self.k is None:
            return self.threshold.expand_as(pre)
        top = pre.topk(self.k + 1, dim=1).values
        return top[:, -2:].mean(dim=1, keepdim=True).clamp(min=0)

    def reconstruction(self, latents: Tensor, x: Tensor) -> Tensor:
        w = self.weights
        z = latents.double() / self.norms @ w["W_dec"] + w["b_dec"]
        if "W_skip" in w:
            z = z + (x.double() - self.input.mean) @ self.input.matrix @ w["W_skip"].T
        return z @ self.output.inverse_matrix + self.output.mean

    # Rounding errors of a plain SAE. The error of a product of length n in float32 is at most
    # n UNIT times the product of the absolute values, for any order of summation (Higham, Accuracy
    # and Stability of Numerical Algorithms, 3.5). Every weight is rounded once, so is the centred
    # input, and a bias is added: six more roundings, and one for their products.

    def pre_activation_rounding(self, x: Tensor) -> Tensor:
        """Bound for SAEs that subtract b_dec, the form with the smallest rounding error."""
        w, whitening = self.weights, self.input
        W_enc = whitening.matrix @ w["W_enc"] * self.norms
        if "W_skip" in w or self.weights["b_dec"].shape != whitening.mean.shape:
            raise AssertionError("transcoders have a bound of their own")
        centred = x.double() - (w["b_dec"] @ whitening.inverse_matrix + whitening.mean)
        bias = w["b_enc"] * self.norms
        if not self.subtracts_b_dec:
            bias = bias + w["b_dec"] @ w["W_enc"] * self.norms
        return (x.shape[1] + 7) * UNIT * (centred.abs() @ W_enc.abs() + bias.abs())

    def transcoder_pre_activation_rounding(self, x: Tensor) -> Tensor:
        """Bound for transcoders: their b_dec is in the output space, so b_enc holds the mean."""
        W_enc = self.input.matrix @ self.weights["W_enc"]
        bias = self.weights["b_enc"] - self.input.mean @ W_enc
        return (x.shape[1] + 7) * UNIT * (x.double().abs() @ W_enc.abs() + bias.abs())

    def reconstruction_rounding(self, latents: Tensor, x: Tensor) -> Tensor:
        w, f = self.weights, latents.double()
        W_dec = w["W_dec"] / self.norms[:, None] @ self.output.inverse_matrix
        bias = w["b_dec"] @ self.output.inverse_matrix + self.output.mean
        n = int((latents != 0).sum(dim=1).max())
        total = f.abs() @ W_dec.abs()
        if "W_skip" in w:
            skip = self.input.matrix @ w["W_skip"].T @ self.output.inverse_matrix
            bias = bias - self.input.mean @ skip
            total = total + x.double().abs() @ skip.abs()
            n += x.shape[1]
        return (n + 7) * UNIT * (total + bias.abs())


@torch.no_grad()
def rounding_units(plain: Any, reference: Reference, x: Tensor) -> float:
    """Largest deviation of a plain SAE from the reference; rounding explains up to 1.

    Infinite if a latent is active in only one of them, although its pre-activation is farther from
    the activation level than rounding explains.
    """
    captured: list[Tensor] = []
    handle = plain.hook_sae_acts_pre.register_forward_hook(lambda *args: captured.append(args[-1]))
    latents = plain.encode(x)
    handle.remove()
    # forward() of a transcoder adds its skip connection, decode() does not
    output = plain(x) if "W_skip" in reference.weights else plain.decode(latents)

    pre = reference.pre_activations(x)
    if isinstance(plain, Transcoder):
        bound = reference.transcoder_pre_activation_rounding(x)
    else:
        bound = reference.pre_activation_rounding(x)
    off = captured[-1].double() - pre
    output_off = output.double() - reference.reconstruction(latents, x)
    units = max(
        float((off.abs() / bound).max()),
        float((output_off.abs() / reference.reconstruction_rounding(latents, x)).max()),
    )

    level = reference.level(pre)
    decided = (pre - level).abs() > bound
    if reference.k is not None:
        decided = decided.all(dim=1, keepdim=True).expand_as(pre)
    differs = ((pre > level) != (latents != 0)) & decided
    if decided.double().mean() < 0.9:
        raise AssertionError("too many latents are too near to their level: this shows nothing")
    return float("inf") if differs.any() else units


def active_set_change(plain: Any, reference: Reference, x: Tensor) -> float:
    """Share of rows in which the active latents differ from those of the reference."""
    pre = reference.pre_activations(x)
    active = pre > reference.level(pre)
    return float((active != (plain.encode(x) != 0)).any(dim=1).double().mean())


@torch.no_grad()
def relative_pre_activation_error(plain: Any, reference: Reference, x: Tensor) -> float:
    sae_in = x.to(plain.dtype) - plain.b_dec
    pre = (sae_in @ plain.W_enc + plain.b_enc).double()
    expected = reference.pre_activations(x)
    return float((pre - expected).norm() / expected.norm())


@dataclass
class Basis:
    mean: Tensor
    matrix: Tensor
    inverse_matrix: Tensor


HOOK = "blocks.1.hook_resid_pre"


FEW = WhiteningConfig(n_samples=1500)


def model_activations(model: HookedTransformer) -> Tensor:
    """Held-out raw activations at `HOOK`, (512, 32)."""
    tokens = torch.randint(0, 100, (16, 32), generator=seeded(1))
    _, cache = model.run_with_cache(tokens)
    return cache[HOOK].flatten(0, 1)


def ours_runner(
    cfg: Any, model: HookedTransformer | None = None, whitening: Any = FEW, seed: int = 5
) -> WhiteningTrainingRunner:
    model = model or tiny_model()
    torch.manual_seed(seed)
    return WhiteningTrainingRunner(
        cfg, whitening, override_dataset=tiny_dataset(), override_model=model
    )


def stock_runner(
    cfg: Any, model: HookedTransformer | None = None
) -> LanguageModelSAETrainingRunner:
    model = model or tiny_model()
    torch.manual_seed(5)
    cfg.n_batches_for_norm_estimate = 12
    return LanguageModelSAETrainingRunner(
        cfg, override_dataset=tiny_dataset(), override_model=model
    )


def finite(sae: Any) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in sae.state_dict().values())


def refused(fold: Callable[[], object], sae: Any, message: str) -> None:
    """Check that folding raises a FoldError and leaves the SAE unchanged."""
    before, cfg = state(sae), copy.deepcopy(sae.cfg.to_dict())
    with pytest.raises(FoldError, match=message):
        fold()
    assert same(before, state(sae))
    assert sae.cfg.to_dict() == cfg
