"""TopK vSAE: a TopK SAE whose latents are sampled from a Gaussian posterior during training.

Baker & Li, Analysis of Variational Sparse Autoencoders, arXiv 2509.22994. Let x~ be the encoder's
input and mu = x~ @ W_enc + b_enc. logvar is fixed or x~ @ W_var + b_var. Training selects the k
largest of z = mu + exp(logvar / 2) * noise and decodes them. The loss includes the KL divergence of
the posterior from a standard normal distribution, averaged over inputs:

    0.5 * sum(mu^2 + exp(logvar) - 1 - logvar)

Each SAE has its own random stream for the noise. Its seed is derived from `torch.initial_seed()`
when the SAE is created. The seed and the number of draws are in the state dict, so resumed training
continues with the same noise. Other random draws do not affect the noise.

Outside training, nothing is sampled: `encode` selects the k largest of mu. The trained SAE is
therefore a TopK SAE and is saved as one.

Latents have the same units as in SAELens' TopK SAE. With `rescale_acts_by_decoder_norm`, mu
includes the norm of the decoder row. A latent therefore cannot evade the prior with a small mu and
a large decoder row. The authors' code instead multiplies the mean KL by the mean norm.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Integer
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEConfig, TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, distributed, nn
from typing_extensions import override

from sae_whiten._checks import FieldError, require_number
from sae_whiten._dtypes import float32_at_least
from sae_whiten.architectures import sparse
from sae_whiten.architectures.description import register
from sae_whiten.architectures.losses import ranking_norms
from sae_whiten.architectures.sparse_step import (
    can_be_sparse,
    finish_step,
    is_hooked,
    select_latents,
    sparse_pays,
)
from sae_whiten.architectures.topk import TOPK
from sae_whiten.folding import AffineWeights

__all__ = ["TopKVSAETrainingConfig", "TopKVSAETrainingSAE", "kl_to_standard_normal"]

_MAX_LOGVAR = 60.0
_NOISE = "_extra_state"  # PyTorch's key in the state dict for the value of `get_extra_state`


@dataclass
class TopKVSAETrainingConfig(TopKTrainingSAEConfig):
    """
    Configuration class for training a TopKVSAETrainingSAE.

    According to the authors' later account, the models of the preprint (arXiv 2509.22994) used
    variance="none", relu_mean=True and aux_loss_coefficient=0: TopK with a quadratic penalty and no
    sampling. With sampling, noise changes which latents are selected. A larger variance makes
    reconstruction worse. The metric selection_overlap shows how much of the selection is chance.

    Examples:
        >>> config = TopKVSAETrainingConfig(d_in=16, d_sae=64, k=4, kl_coefficient=1e-3)
        >>> config.get_inference_config_class().architecture()
        'topk'

    Args:
        variance (Literal["none", "fixed", "learned"]): "none": nothing is sampled, and the KL
            divergence is 0.5 * mu^2. "fixed": the same divergence, but latents are sampled with
            log variance initial_logvar. "learned": the log variance is an affine function of the
            input.
        kl_coefficient (float): beta, the coefficient of the KL divergence. The divergence is summed
            over latents, as the squared error is summed over d_in.
        kl_warm_up_steps (int): Steps over which the coefficient rises linearly from 0. The paper
            uses a tenth of all steps.
        kl_over (Literal["all", "selected"]): Latents in the KL divergence. "all": all latents, as
            in the paper. "selected": only the selected ones.
        initial_logvar (float): Log variance of the posterior, in units of the latents: at the
            start ("learned") or throughout ("fixed"). The authors' code uses 0. For inputs of unit
            norm, noise at 0 is much larger than the latents. On two small models with inputs of
            unit norm and beta 1e-4, a learned variance cost 5 to 13 percent of the explained
            variance at values up to -8, 22 to 64 at -4 and 51 to 91 at -2 (docs/architectures.md).
            For inputs of norm sqrt(d_in), add log(d_in) to get the same relative noise.
        relu_mean (bool): Whether a ReLU is applied to mu before sampling and before the KL
            divergence, as in the authors' code but not in their paper. The saved SAE is a TopK SAE
            either way.
        k (int): Number of latents selected. Inherited from TopKTrainingSAEConfig.
        aux_loss_coefficient (float): Coefficient of the loss that revives dead latents (AuxK).
            Inherited from TopKTrainingSAEConfig. The default is from the paper.
        use_sparse_activations (bool): Must stay False. Decoding is sparse anyway if k is small.
        rescale_acts_by_decoder_norm (bool): Whether mu is in units of the decoder norms. Inherited
            from TopKTrainingSAEConfig.
        decoder_init_norm (float | None): Norm to initialize decoder weights to. Inherited from
            TrainingSAEConfig.
        d_in (int): Input dimension. Inherited from SAEConfig.
        d_sae (int): Number of latents. Inherited from SAEConfig.
        dtype (str): Data type for the SAE parameters. Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Whether b_dec is subtracted from the input. Inherited from
            SAEConfig.
        normalize_activations (str): Normalization of the input. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations. Inherited from
            SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE. Inherited from SAEConfig.
    """

    variance: Literal["none", "fixed", "learned"] = "learned"
    kl_coefficient: float = 1.0
    kl_warm_up_steps: int = 0
    kl_over: Literal["all", "selected"] = "all"
    initial_logvar: float = 0.0
    relu_mean: bool = False
    aux_loss_coefficient: float = 1 / 32

    @override
    @classmethod
    def architecture(cls) -> str:
        return "topk_vsae"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("variance", ("none", "fixed", "learned")),
            ("kl_over", ("all", "selected")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: one of {', '.join(known)}")
        for name in ("kl_coefficient", "aux_loss_coefficient"):
            require_number(name, getattr(self, name), 0, whole=False)
        require_number("kl_warm_up_steps", self.kl_warm_up_steps, 0)
        require_number("k", self.k)
        if self.k > self.d_sae:
            raise FieldError("k", self.k, f"there are {self.d_sae} latents (d_sae)")
        if not isinstance(self.relu_mean, bool):
            raise ValueError(f"relu_mean={self.relu_mean!r}: True or False")
        number = isinstance(self.initial_logvar, (int, float))
        if not number or not -_MAX_LOGVAR <= self.initial_logvar <= _MAX_LOGVAR:
            raise ValueError(
                f"initial_logvar={self.initial_logvar!r}: between {-_MAX_LOGVAR:g} and "
                f"{_MAX_LOGVAR:g}, beyond which float32 has no such variance"
            )
        if self.use_sparse_activations:
            raise ValueError(
                "use_sparse_activations=True: topk_vsae decodes the selected latents alone where "
                "that is faster, without sparse tensors; leave it at False"
            )

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        """The config class of SAELens' TopK: without noise, this SAE is a TopK SAE."""
        return get_sae_class("topk")[1]


@dataclass
class _Posterior:
    """The latents of one training step, and the posterior they were sampled from.

    Attributes:
        mu: Means of all latents.
        logvar: Their log variances; a number if all are the same, None if nothing is sampled.
        kl: The KL divergence, averaged over inputs.
        indices: The latents selected for each input.
        values: The values of the selected latents.
        latents: All latents, 0 where they are not selected. `decode` recognises this tensor.
    """

    mu: Float[Tensor, "*batch d_sae"]
    logvar: Float[Tensor, "*batch d_sae"] | float | None
    kl: Float[Tensor, ""]
    indices: Integer[Tensor, "*batch k"]
    values: Float[Tensor, "*batch k"]
    latents: Float[Tensor, "*batch d_sae"]


class TopKVSAETrainingSAE(TopKTrainingSAE):
    """
    TopK SAE with a Gaussian posterior over its latents, which is sampled only in training.

    A training step adds `kl_loss` (with its coefficient) to SAELens' losses, and these metrics:

    - `kl`: the divergence in nats per input. With a fixed variance, its constant part is left out.
    - `selection_overlap` (logging steps only): the mean of `selection_overlap` over the batch.
    - `live_fraction` (logging steps only): share of latents that are not dead.

    Examples:
        >>> sae = TopKVSAETrainingSAE(TopKVSAETrainingConfig(d_in=16, d_sae=64, k=4))
        >>> int(sae.encode(torch.randn(16)).count_nonzero()) <= 4
        True
    """

    cfg: TopKVSAETrainingConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    W_var: nn.Parameter
    b_var: nn.Parameter

    def __init__(self, cfg: TopKVSAETrainingConfig, use_error_term: bool = False):
        # seed, and number of draws so far; on the CPU, because every step reads both
        self._noise = torch.tensor([_noise_seed(), 0], device="cpu")
        self._step: _Posterior | None = None
        self._in_training_step = False
        super().__init__(cfg, use_error_term)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        if self.cfg.variance == "learned":
            # every input starts at `initial_logvar`
            self.W_var = nn.Parameter(torch.zeros_like(self.W_enc.data))
            self.b_var = nn.Parameter(torch.full_like(self.b_enc.data, self.cfg.initial_logvar))

    @override
    def get_coefficients(self) -> dict[str, TrainCoefficientConfig | float]:
        return {
            "kl": TrainCoefficientConfig(
                value=self.cfg.kl_coefficient, warm_up_steps=self.cfg.kl_warm_up_steps
            )
        }

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self._in_training_step = True
        try:
            output = super().training_forward_pass(step_input)
            posterior = self._step
            assert posterior is not None
            output.metrics["kl"] = posterior.kl.detach()
            if step_input.is_logging_step:
                output.metrics.update(
                    self.logged_metrics(posterior.mu, posterior.logvar, step_input.dead_neuron_mask)
                )
            return output
        finally:
            self._in_training_step, self._step = False, None

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """In a training step, sampled latents. Otherwise, the latents of SAELens' TopK."""
        if not self._in_training_step:
            return super().encode_with_hidden_pre(x)
        hidden_pre, mu, logvar = self._posterior_of(x)
        generator = None if logvar is None else _next_noise(self._noise, mu.device)
        indices, noise = _select(mu, logvar, self.cfg.k, generator)
        mean, logvars = mu.gather(-1, indices), _gathered(logvar, indices)
        charged = (mu, logvar) if self.cfg.kl_over == "all" else (mean, logvars)
        kl = kl_to_standard_normal(charged[0], _if_learned(charged[1]))
        values = _with_noise(mean, logvars, noise).relu()
        latents = torch.zeros_like(mu).scatter(-1, indices, values.to(mu.dtype))
        self._step = _Posterior(mu, logvar, kl.mean(), indices, values, latents)
        return self.hook_sae_acts_post(latents), hidden_pre

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        """SAELens' decoder. In a training step with small k, it sums over active latents only."""
        step = self._step
        if (
            step is None
            or feature_acts is not step.latents  # a hook has changed them
            or feature_acts.ndim != 2
            or not sparse_pays(self.cfg.k, self.cfg.d_sae, feature_acts.device)
        ):
            return super().decode(feature_acts)
        n_rows, k = step.indices.shape
        rows = torch.arange(n_rows, device=step.indices.device).repeat_interleave(k)
        latents, values = step.indices.flatten(), step.values.flatten()
        if self.cfg.rescale_acts_by_decoder_norm:
            values = values / ranking_norms(self)[latents]
        pairs = sparse.ActivePairs.of(rows, latents, self.cfg.d_sae, rows, n_rows)
        decoded, _ = sparse.decode(values, self.W_dec, pairs, dead=latents[:0])
        decoded = self.hook_sae_recons((decoded + self.b_dec).to(self.W_dec.dtype))
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(decoded), self.d_head)

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        assert self._step is not None
        return {**losses, "kl_loss": step_input.coefficients["kl"] * self._step.kl}

    @torch.no_grad()
    def selection_overlap(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch"]:
        """How much the active latents of two samples of the same input overlap.

        The overlap is the Jaccard index (intersection over union). It is 1 without sampling, and
        if the selection does not depend on the noise.

        Examples:
            >>> config = TopKVSAETrainingConfig(d_in=16, d_sae=64, k=4, variance="none")
            >>> TopKVSAETrainingSAE(config).selection_overlap(torch.randn(2, 16))
            tensor([1., 1.])

        Args:
            x: Inputs as in training: whitened if the SAE is trained under whitening.

        Returns:
            The Jaccard index of each input, in [0, 1].
        """
        _, mu, logvar = self._posterior_of(x)
        return _overlap(mu, logvar, self.cfg.k)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        # mu is in units of the decoder norms, which the fold has made smaller
        shift = -2 * math.log(scaling_factor) if self.cfg.rescale_acts_by_decoder_norm else 0.0
        if self.cfg.variance == "learned":
            self.W_var.data *= scaling_factor
            self.b_var.data += shift
        elif self.cfg.variance == "fixed":
            logvar = min(max(self.cfg.initial_logvar + shift, -_MAX_LOGVAR), _MAX_LOGVAR)
            self.cfg = replace(self.cfg, initial_logvar=logvar)  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    @torch.no_grad()
    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        if self.cfg.variance == "learned":
            dtype = torch.promote_types(self.W_var.dtype, whitening_matrix.dtype)
            folded = whitening_matrix.to(self.device, dtype) @ self.W_var.data.to(dtype)
            self.W_var.data.copy_(folded)
            if not self.cfg.apply_b_dec_to_input:
                self.b_var.data.sub_((mean.to(self.device, dtype) @ folded).to(self.b_var.dtype))

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        for name in ("W_var", "b_var", _NOISE):
            state_dict.pop(name, None)

    @override
    def get_extra_state(self) -> Integer[Tensor, "2"]:
        """Seed of the noise and number of draws, int64. PyTorch adds it to the state dict."""
        return self._noise

    @override
    def set_extra_state(self, state: Integer[Tensor, "2"]) -> None:
        """Continue the noise from a seed and a number of draws."""
        self._noise.copy_(state)

    @override
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """PyTorch's method, except that `state_dict` may lack the state of the noise."""
        return super().load_state_dict({_NOISE: self._noise, **state_dict}, strict, assign)

    def _posterior_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float | None]:
        """Pre-activations, mean and log variance of the latents, shape (batch, d_sae)."""
        sae_in = self.process_sae_in(x)
        # whether b_dec is the only tensor that needs a gradient through the input
        only_b_dec = not (x.requires_grad or is_hooked(self.hook_sae_input))
        b_dec = self.b_dec if self.cfg.apply_b_dec_to_input and only_b_dec else None
        norms = ranking_norms(self) if self.cfg.rescale_acts_by_decoder_norm else None
        W_enc, b_enc = self.W_enc, self.b_enc
        if norms is not None and not is_hooked(self.hook_sae_acts_pre):
            # cheaper than scaling a batch of latents, but a hook would see scaled values
            W_enc, b_enc, norms = W_enc * norms, b_enc * norms, None
        hidden_pre = self.hook_sae_acts_pre(_affine(sae_in, W_enc, b_enc, b_dec))
        if norms is not None:
            hidden_pre = hidden_pre * norms
        mu = hidden_pre.relu() if self.cfg.relu_mean else hidden_pre
        if self.cfg.variance == "learned":
            return hidden_pre, mu, _affine(sae_in, self.W_var, self.b_var, b_dec)
        return hidden_pre, mu, self.cfg.initial_logvar if self.cfg.variance == "fixed" else None

    @torch.no_grad()
    def logged_metrics(
        self, mu: Tensor, logvar: Tensor | float | None, dead: Tensor | None
    ) -> dict[str, Tensor]:
        """The metrics of logging steps, from the posterior of the batch."""
        # a separate generator, so that logging does not change the training
        generator = torch.Generator(mu.device).manual_seed(0)
        overlap = _overlap(mu, logvar, self.cfg.k, generator)
        found = {"selection_overlap": overlap.mean()}
        if dead is not None:
            found["live_fraction"] = 1 - dead.float().mean()
        return found


def _noise_seed() -> int:
    """A seed derived from PyTorch's. Reusing PyTorch's would repeat the draws of the weights."""
    return _mixed(torch.initial_seed()) >> 1  # fits int64


def _next_noise(position: Integer[Tensor, "2"], device: torch.device) -> torch.Generator:
    """A generator for the next draw. Increments the number of draws in `position`."""
    seed, n_draws = position.tolist()
    position[1] += 1
    # processes that share a batch need different noise
    shared = distributed.is_available() and distributed.is_initialized()
    rank = distributed.get_rank() if shared else 0
    return torch.Generator(device).manual_seed(_mixed(seed, n_draws, rank))


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def kl_to_standard_normal(
    mu: Float[Tensor, "batch latents"], logvar: Float[Tensor, "batch latents"] | None = None
) -> Float[Tensor, "batch"]:
    """KL divergence of normal distributions from the standard normal, summed over latents.

    Examples:
        >>> kl_to_standard_normal(torch.tensor([[0.0, 2.0]]))
        tensor([2.])

    Args:
        mu: Means.
        logvar: Log variances. None leaves out the terms in logvar, which are 0 for a variance of 1.

    Returns:
        0.5 * sum(mu^2 + exp(logvar) - 1 - logvar) in nats, in float32 or better.
    """
    if logvar is None:
        return 0.5 * _sum_of_squares(mu)
    return _KL.apply(mu, logvar)


class _KL(torch.autograd.Function):
    """The KL divergence in few passes over tensors of shape (batch, d_sae), to save time."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor) -> Tensor:
        ctx.dtype = logvar.dtype
        logvar = float32_at_least(logvar)
        # expm1 for precision: training brings the log variance of most latents close to 0
        excess = logvar.expm1()
        ctx.save_for_backward(mu, excess)
        terms = excess.sum(dim=-1) - logvar.sum(dim=-1)
        return 0.5 * (_sum_of_squares(mu) + terms)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        mu, excess = ctx.saved_tensors
        grad = grads[0][..., None]
        of_logvar = excess * (0.5 * grad).to(excess.dtype)
        return mu * grad.to(mu.dtype), of_logvar.to(ctx.dtype)


def _sum_of_squares(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype).square()


def _affine(x: Tensor, W: Tensor, b: Tensor, b_dec: Tensor | None) -> Tensor:
    """x @ W + b. With b_dec, x must be data - b_dec, and the data must not need a gradient."""
    if b_dec is None or torch.is_autocast_enabled(x.device.type):
        return x @ W + b
    return _CentredAffine.apply(x.detach(), W, b, b_dec)


class _CentredAffine(torch.autograd.Function):
    """x @ W + b for x = data - b_dec. To save time, the gradient of b_dec is summed over the batch
    before the product with W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, b_dec: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        return x @ W + b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        x, W = ctx.saved_tensors
        (grad,) = grads
        of_b = grad.flatten(0, -2).sum(dim=0)
        of_W = x.flatten(0, -2).T @ grad.flatten(0, -2)
        return None, of_W, of_b, -(W @ of_b)


def _if_learned(logvar: Tensor | float | None) -> Tensor | None:
    return logvar if isinstance(logvar, Tensor) else None


def _deviation(logvar: Tensor | float) -> Any:
    return (logvar / 2).exp_() if isinstance(logvar, Tensor) else math.exp(logvar / 2)


@torch.no_grad()
def _select(
    mu: Tensor, logvar: Tensor | float | None, k: int, generator: torch.Generator | None = None
) -> tuple[Integer[Tensor, "batch k"], Tensor | None]:
    """Indices of the k largest sampled latents, and their standard normal noise. No gradients."""
    z, noise = _sample(mu, logvar, generator)
    indices = z.topk(k, dim=-1, sorted=False).indices
    return indices, None if noise is None else noise.gather(-1, indices)


def _sample(
    mu: Tensor, logvar: Tensor | float | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """Sampled latents, and their standard normal noise."""
    if logvar is None:
        return mu, None
    noise = _normal(mu, generator)
    if isinstance(logvar, Tensor):
        return torch.addcmul(mu, noise, _deviation(logvar).to(mu.dtype)), noise
    return torch.add(mu, noise, alpha=_deviation(logvar)), noise


def _gathered(logvar: Tensor | float | None, indices: Tensor) -> Tensor | float | None:
    """Log variances of the latents at `indices`."""
    return logvar.gather(-1, indices) if isinstance(logvar, Tensor) else logvar


def _with_noise(mean: Tensor, logvar: Tensor | float | None, noise: Tensor | None) -> Tensor:
    """Latents sampled with noise that is already drawn."""
    if noise is None or logvar is None:
        return mean
    return mean + noise * _deviation(logvar)


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like).normal_(generator=generator)


def _overlap(
    mu: Tensor, logvar: Tensor | float | None, k: int, generator: torch.Generator | None = None
) -> Tensor:
    active = []
    for _ in range(2):
        indices, noise = _select(mu, logvar, k, generator)
        values = _with_noise(mu.gather(-1, indices), _gathered(logvar, indices), noise)
        active.append(torch.zeros_like(mu, dtype=torch.bool).scatter_(-1, indices, values > 0))
    union = (active[0] | active[1]).sum(dim=-1)
    both = (active[0] & active[1]).sum(dim=-1)
    # without active latents, the two samples agree
    return torch.where(union > 0, both / union.clamp(min=1), torch.ones_like(both / union))


def _sparse_step(sae: Any, step_input: TrainStepInput) -> TrainStepOutput | None:
    """A training step under whitening with sums over the selected latents.

    Up to rounding, values and gradients are those of `training_forward_pass`. Returns None if the
    dense step has to run: with kl_over="all", where all pre-activations have a gradient, and for
    the reasons listed in `sparse_step.sparse_step`.
    """
    cfg: TopKVSAETrainingConfig = sae.cfg
    if cfg.kl_over != "selected" or not can_be_sparse(sae, step_input.sae_in):
        return None
    norms = ranking_norms(sae, torch.promote_types(sae.W_dec.dtype, torch.float32))
    with torch.no_grad():
        x = sae.process_sae_in(step_input.sae_in)
        selector = _SamplingSelector(sae, x, keep_logvar=step_input.is_logging_step)
    selected = select_latents(sae, step_input, x, norms.detach(), selector)
    pairs, norms_of_pairs = selected.pairs, norms[selected.pairs.latents]
    mu = selected.pre * norms_of_pairs
    if cfg.relu_mean:
        mu = mu.relu()
    logvar = selector.logvar
    if isinstance(logvar, Tensor):
        b_dec = sae.b_dec if cfg.apply_b_dec_to_input else None
        none, of_none = selected.dead[:0], x.new_empty(len(x), 0)
        logvar, _ = sparse.encode(x, sae.W_var, sae.b_var, b_dec, logvar, of_none, pairs, none)
    by_input = (len(x), cfg.k)
    of_learned = logvar.view(by_input) if isinstance(logvar, Tensor) else None
    kl = kl_to_standard_normal(mu.view(by_input), of_learned).mean()
    latents = _with_noise(mu, logvar, selector.noise).relu()
    kl_loss = {"kl_loss": step_input.coefficients["kl"] * kl}
    output = finish_step(sae, step_input, selected, latents / norms_of_pairs, latents, kl_loss)
    output.metrics["kl"] = kl.detach()
    hidden_pre = selected.hidden_pre
    if hidden_pre is not None:
        all_mu = hidden_pre.relu() if cfg.relu_mean else hidden_pre
        output.metrics.update(
            sae.logged_metrics(all_mu, selector.all_logvar, step_input.dead_neuron_mask)
        )
    return output


class _SamplingSelector:
    """Selects the k largest sampled latents of every input.

    After the selection, `noise` and `logvar` hold the values of the selected latents, flattened.
    With `keep_logvar`, `all_logvar` holds the log variances of all latents.
    """

    def __init__(self, sae: TopKVSAETrainingSAE, x: Tensor, keep_logvar: bool) -> None:
        cfg = sae.cfg
        self._k, self._relu, self._keep = cfg.k, cfg.relu_mean, keep_logvar
        self._generator = None if cfg.variance == "none" else _next_noise(sae._noise, x.device)
        self._logvars: Iterator[Tensor] | None = None
        if cfg.variance == "learned":
            ones = torch.ones_like(sae.b_var)
            self._logvars = sparse.pre_activations(x, sae.W_var, sae.b_var, ones)
        self.noise: Tensor | None = None
        self.logvar: Tensor | float | None = None
        if cfg.variance == "fixed":
            self.logvar = cfg.initial_logvar
        self.all_logvar = self.logvar

    def __call__(self, chunks: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        values, latents, noises, logvars, kept = [], [], [], [], []
        for pre in chunks:
            mu = pre.relu() if self._relu else pre
            logvar = self.logvar if self._logvars is None else next(self._logvars)
            z, noise = _sample(mu, logvar, self._generator)
            _, indices = sparse.largest(z, self._k)
            latents.append(indices)
            values.append(pre.gather(1, indices))
            if noise is not None:
                noises.append(noise.gather(1, indices))
            if isinstance(logvar, Tensor):
                logvars.append(logvar.gather(1, indices))
                if self._keep:
                    kept.append(logvar)
        if noises:
            self.noise = torch.cat(noises).flatten()
        if logvars:
            self.logvar = torch.cat(logvars).flatten()
        if kept:
            self.all_logvar = torch.cat(kept)
        flat = torch.cat(latents)
        rows = torch.arange(len(flat), device=flat.device).repeat_interleave(self._k)
        return torch.cat(values).flatten(), rows, flat.flatten()


def _affine_weights(sae: TopKVSAETrainingSAE) -> AffineWeights:
    weights = TOPK.affine_weights(sae)
    if sae.cfg.variance != "learned":
        return weights
    log_variance = {("W_var", "b_var"): (sae.W_var.data, sae.b_var.data)}
    return replace(weights, further_encoders=log_variance)


def _why_not_original_norms(cfg: Any) -> str:
    return "topk_vsae compares its latents with a prior, in whitened coordinates"


def _compare_defaults(*, seen: float, loss: float, n_steps: int) -> dict[str, Any]:
    return {
        "kl_warm_up_steps": n_steps // 10,  # as in the paper
        # latents scale with the activations
        "initial_logvar": TopKVSAETrainingConfig.initial_logvar + 2 * math.log(seen),
    }


register(
    replace(
        TOPK,
        sae_classes=(TopKVSAETrainingSAE,),
        affine_weights=_affine_weights,
        fast_step=_sparse_step,
        why_not_original_norms=_why_not_original_norms,
        scaled_fields={"kl_coefficient": 2},
        compare_defaults=_compare_defaults,
    )
)
