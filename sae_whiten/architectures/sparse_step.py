"""Training steps of topk, abstopk, batchtopk and matryoshka_batchtopk with sparse latents.

Up to rounding, values and gradients are those of SAELens' `training_forward_pass` under this
package's losses. `sparse` computes the sums. A latent is relu(pre) * norm and is decoded by
W_dec / norm. The norms cancel, so they are used for the selection only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any

import torch
from jaxtyping import Float, Integer
from sae_lens import (
    AbsTopKTrainingSAE,
    BatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAE,
)
from sae_lens.saes.abstopk_sae import AbsTopK, calculate_abstopk_aux_acts
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK, calculate_topk_aux_acts
from torch import Tensor, nn

from sae_whiten.architectures.auxk import auxk_loss
from sae_whiten.architectures.losses import ranking_norms
from sae_whiten.architectures.sparse import (
    ActivePairs,
    Selection,
    Selector,
    batch_top_k,
    decode,
    encode,
    select,
    to_coo,
    top_k,
)

__all__ = [
    "SelectedLatents",
    "SparseStepOutput",
    "can_be_sparse",
    "finish_step",
    "is_hooked",
    "select_latents",
    "sparse_pays",
    "sparse_step",
]

# Largest share of active latents at which sparse sums cost less than dense products.
# CPU: measured on one core by benchmarks/training_step.py --border. A sparse step took 0.67 to 0.78
# of the time of a dense one at 1/16, and 1.04 to 1.49 at 1/8 (d_in 512 and 2048, topk and
# batchtopk). CUDA: estimated from five passes over the active rows at memory bandwidth. It is lower
# because dense products gain more from CUDA than memory access does.
_SPARSE_UP_TO = {"cpu": 1 / 16, "cuda": 1 / 256}


class SparseStepOutput(TrainStepOutput):
    """The output of a sparse step.

    On logging steps, `feature_acts` is dense and pre-activations are kept. On other steps,
    `feature_acts` is a sparse COO tensor, as in SAELens with `use_sparse_activations`, and
    pre-activations are computed only when they are read.
    """

    def __init__(self, hidden_pre: Tensor | Callable[[], Tensor], **fields: Any) -> None:
        super().__init__(hidden_pre=torch.empty(0), **fields)
        self._hidden_pre = hidden_pre

    @property
    def hidden_pre(self) -> Tensor:
        """Pre-activations, shape (batch, d_sae), without a gradient.

        Raises:
            RuntimeError: The weights have changed since the step.
        """
        if not isinstance(self._hidden_pre, Tensor):
            self._hidden_pre = self._hidden_pre()
        return self._hidden_pre

    @hidden_pre.setter
    def hidden_pre(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, value: Tensor
    ) -> None:
        self._hidden_pre = value


def sparse_pays(k: int | float, d_sae: int, device: torch.device) -> bool:
    """Whether sums over k of the d_sae latents cost less than dense products."""
    return k <= _SPARSE_UP_TO.get(device.type, 0) * d_sae


def is_hooked(hook: nn.Module) -> bool:
    """Whether any hook is registered on a hook point."""
    return bool(
        hook._forward_hooks
        or hook._forward_pre_hooks
        or hook._backward_hooks
        or hook._backward_pre_hooks
    )


def sparse_step(sae: Any, step_input: TrainStepInput) -> TrainStepOutput | None:
    """The training step of an SAE of the TopK family, under whitening.

    Args:
        sae: One of the four architectures.
        step_input: The input of the step.

    Returns:
        A `SparseStepOutput`, or None if the dense step has to run instead: the input,
        pre-activations or latents are hooked, sparse sums are not faster at this k, the activation
        function is unknown, the input needs a gradient or is not 2-dimensional, or the step is
        being compiled.
    """
    selector = _selector(sae, len(step_input.sae_in))
    if selector is None or not can_be_sparse(sae, step_input.sae_in):
        return None
    with torch.no_grad():
        x = sae.process_sae_in(step_input.sae_in)
        norms = ranking_norms(sae, torch.promote_types(sae.W_dec.dtype, torch.float32))
    selected = select_latents(sae, step_input, x, norms, selector)
    weights = selected.pre
    if not isinstance(sae, AbsTopKTrainingSAE):
        weights = weights.relu()
    latents = weights * norms[selected.pairs.latents]
    output = finish_step(sae, step_input, selected, weights, latents)
    if isinstance(sae, BatchTopKTrainingSAE):
        sae.update_topk_threshold(latents.detach())
        output.metrics["topk_threshold"] = sae.topk_threshold
    return output


def _selector(sae: Any, n_rows: int) -> Selector | None:
    activation_fn = sae.activation_fn
    if type(activation_fn) in (TopK, AbsTopK):
        return top_k(activation_fn.k, by_magnitude=type(activation_fn) is AbsTopK)
    if type(activation_fn) is BatchTopK:
        return batch_top_k(int(activation_fn.k * n_rows))
    if hasattr(activation_fn, "sparse_selector"):
        return activation_fn.sparse_selector()
    return None


def can_be_sparse(sae: Any, sae_in: Tensor) -> bool:
    """Whether a sparse step of an SAE with a k is possible and faster. See `sparse_step`."""
    hooks = (sae.hook_sae_input, sae.hook_sae_acts_pre, sae.hook_sae_acts_post)
    return (
        sparse_pays(sae.activation_fn.k, sae.cfg.d_sae, sae_in.device)
        and not any(map(is_hooked, hooks))
        and not sae_in.requires_grad
        and sae_in.ndim == 2
        and not torch.compiler.is_compiling()
    )


@dataclass(frozen=True)
class SelectedLatents:
    """The latents selected in a step. Pre-activations have gradients and are not scaled by norms.

    Attributes:
        pairs: The inputs and the latents selected for them.
        pre: Shape (n,), the pre-activations of the pairs.
        norms: Shape (d_sae,), the norms that latents were ranked by, without a gradient.
        dead: Shape (n_dead,), the dead latents to revive, ascending.
        pre_of_dead: Shape (batch, n_dead), the pre-activations of the dead latents.
        hidden_pre: Shape (batch, d_sae), all pre-activations times norms, without a gradient; None
            except on logging steps.
    """

    pairs: ActivePairs
    pre: Float[Tensor, "n"]
    norms: Float[Tensor, "d_sae"]
    dead: Integer[Tensor, "n_dead"]
    pre_of_dead: Float[Tensor, "batch n_dead"]
    hidden_pre: Float[Tensor, "batch d_sae"] | None


def select_latents(
    sae: Any,
    step_input: TrainStepInput,
    x: Float[Tensor, "batch d_in"],
    norms: Float[Tensor, "d_sae"],
    selector: Selector,
) -> SelectedLatents:
    """The beginning of a sparse step: select latents by pre-activation times norm.

    Args:
        sae: The SAE.
        step_input: The input of the step.
        x: The encoder's input, without a gradient.
        norms: The norms that latents are ranked by, without a gradient.
        selector: Selects the latents.
    """
    dead = _latents_to_revive(sae, step_input)
    logged = step_input.is_logging_step
    found = select(x, sae.W_enc, sae.b_enc, norms, selector, dead, keep_hidden_pre=logged)
    pairs = _pairs(found, _widths(sae), len(x))
    pre, pre_of_dead = encode(
        x,
        sae.W_enc,
        sae.b_enc,
        sae.b_dec if sae.cfg.apply_b_dec_to_input else None,
        found.values / norms[found.latents],
        found.pre_of_dead / norms[dead],
        pairs,
        dead,
    )
    return SelectedLatents(pairs, pre, norms, dead, pre_of_dead, found.hidden_pre)


def finish_step(
    sae: Any,
    step_input: TrainStepInput,
    selected: SelectedLatents,
    weights: Float[Tensor, "n"],
    latents: Float[Tensor, "n"],
    further_losses: Mapping[str, Tensor] | None = None,
) -> SparseStepOutput:
    """The end of a sparse step: decode, and compute the losses.

    Args:
        sae: The SAE.
        step_input: The input of the step.
        selected: The selected latents.
        weights: Shape (n,), the latents divided by the norms: the weights of the decoder rows.
        latents: Shape (n,), the values of the selected latents.
        further_losses: Losses besides the errors of reconstruction and AuxK, by name.
    """
    sae_in, dead, pairs = step_input.sae_in, selected.dead, selected.pairs
    widths = _widths(sae)
    levels, rows_of_dead = _decode_levels(sae, weights, pairs, dead, len(widths))
    sae_out = sae.hook_sae_recons(levels[-1])

    losses = {
        "mse_loss": _mean_error(sae, sae_out, sae_in),
        "auxiliary_reconstruction_loss": sae_out.new_tensor(0.0),
    }
    if len(dead) > 0:
        outputs = levels if _has_auxk_by_level(sae) else (sae_out,)
        residuals = [(sae_in - out).detach() for out in outputs]
        losses["auxiliary_reconstruction_loss"] = _sparse_auxk_loss(
            sae, residuals, selected, rows_of_dead
        )
    for width, level in zip(widths[:-1], levels[:-1], strict=True):
        losses[f"inner_mse_loss_{width}"] = _mean_error(sae, level, sae_in)
    losses.update(further_losses or {})

    dtype, hidden_pre = sae.W_enc.dtype, selected.hidden_pre
    feature_acts = to_coo(latents.to(dtype), pairs, len(sae_in), sae.cfg.d_sae)
    return SparseStepOutput(
        sae_in=sae_in,
        sae_out=sae_out,
        feature_acts=feature_acts.to_dense() if step_input.is_logging_step else feature_acts,
        hidden_pre=_computed_later(sae, sae_in) if hidden_pre is None else hidden_pre.to(dtype),
        loss=reduce(add, losses.values()),
        losses=losses,
    )


def _latents_to_revive(sae: Any, step_input: TrainStepInput) -> Integer[Tensor, "n_dead"]:
    """Indices of the dead latents that AuxK revives, ascending."""
    dead = step_input.dead_neuron_mask
    if dead is None or sae.cfg.aux_loss_coefficient == 0:
        return torch.empty(0, dtype=torch.long, device=sae.W_dec.device)
    return dead.nonzero().squeeze(1)


def _widths(sae: Any) -> list[int]:
    """Number of latents up to each level. Only Matryoshka SAEs have more than one level."""
    if isinstance(sae, MatryoshkaBatchTopKTrainingSAE):
        return sae.cfg.matryoshka_widths
    return [sae.cfg.d_sae]


def _pairs(found: Selection, widths: list[int], n_rows: int) -> ActivePairs:
    """The active pairs, with one bag per level of each input."""
    levels = torch.searchsorted(found.latents.new_tensor(widths), found.latents, right=True)
    bags = found.rows * len(widths) + levels
    return ActivePairs.of(found.rows, found.latents, widths[-1], bags, n_rows * len(widths))


def _decode_levels(
    sae: Any, weights: Tensor, pairs: ActivePairs, dead: Tensor, n_levels: int
) -> tuple[tuple[Float[Tensor, "batch d_in"], ...], Float[Tensor, "n_dead d_in"]]:
    """The reconstruction by the latents up to each level, and the decoder rows of dead latents."""
    decoded, rows_of_dead = decode(weights, sae.W_dec, pairs, dead)
    levels = decoded.unflatten(0, (-1, n_levels))
    if n_levels > 1:
        levels = levels.cumsum(dim=1)
    return (levels + sae.b_dec).to(sae.W_dec.dtype).unbind(dim=1), rows_of_dead


def _mean_error(sae: Any, reconstruction: Tensor, sae_in: Tensor) -> Tensor:
    """The squared error, summed over d_in and averaged over the batch."""
    return sae.mse_loss_fn(reconstruction, sae_in).sum(dim=-1).mean()


def _has_auxk_by_level(sae: Any) -> bool:
    return isinstance(sae, MatryoshkaBatchTopKTrainingSAE) and sae.cfg.use_matryoshka_aux_loss


def _sparse_auxk_loss(
    sae: Any,
    residuals: list[Tensor],
    selected: SelectedLatents,
    rows_of_dead: Float[Tensor, "n_dead d_in"],
) -> Float[Tensor, ""]:
    """AuxK, computed from the pre-activations and decoder rows of the dead latents only.

    Args:
        sae: The SAE.
        residuals: Shape (batch, d_in) each: one per level, or one for all latents.
        selected: The selected latents and the dead ones.
        rows_of_dead: Shape (n_dead, d_in), decoder rows of the dead latents.
    """
    dead, pre, norms = selected.dead, selected.pre_of_dead, selected.norms
    by_magnitude = isinstance(sae, AbsTopKTrainingSAE)
    ends = _widths(sae) if len(residuals) > 1 else [sae.cfg.d_sae]
    n_dead_up_to = torch.searchsorted(dead, dead.new_tensor([0, *ends])).tolist()
    total = pre.new_tensor(0.0)
    for residual, (start, end) in zip(residuals, pairwise(n_dead_up_to), strict=True):
        own_norms, own_W_dec = norms[dead[start:end]], rows_of_dead[start:end]
        total = total + auxk_loss(
            sae.mse_loss_fn,
            residual,
            pre[:, start:end] * own_norms,
            torch.ones_like(own_norms, dtype=torch.bool),
            calculate_abstopk_aux_acts if by_magnitude else calculate_topk_aux_acts,
            lambda acts, own_norms=own_norms, own_W_dec=own_W_dec: (
                (acts / own_norms).to(own_W_dec.dtype) @ own_W_dec
            ),
        )
    return sae.cfg.aux_loss_coefficient * total


def _computed_later(sae: Any, sae_in: Tensor) -> Callable[[], Tensor]:
    """A function that computes this step's pre-activations if the weights are unchanged."""
    weights = list(sae.parameters())
    versions = [weight._version for weight in weights]

    def compute() -> Tensor:
        if versions != [weight._version for weight in weights]:
            raise RuntimeError(
                "hidden_pre of this step was not kept, and the weights have changed since: read it "
                "before the optimizer's step, or set is_logging_step=True in the TrainStepInput"
            )
        with torch.no_grad():
            return sae.encode_with_hidden_pre(sae_in)[1]

    return compute
