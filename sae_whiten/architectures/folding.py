"""Fold a whitening into a SAELens SAE, prove that nothing changed, and unfold it again.

The algebra is in `sae_whiten.folding`. The description of an architecture says which of its weights
it applies to.
"""

import copy
import logging
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.util import dtype_to_str
from torch import Tensor

from sae_whiten.architectures.description import describe
from sae_whiten.folding import AffineWeights, fold, unfold
from sae_whiten.whitening import Whitening, full_precision, require_whitening

__all__ = [
    "FoldCheck",
    "FoldError",
    "FoldReport",
    "fold_whitening_into_weights",
    "folded_copy",
    "unfold_whitening_from_weights",
    "why_not_foldable",
]

logger = logging.getLogger(__name__)


class FoldError(ValueError):
    """A whitening cannot be folded into an SAE, or the folded SAE computes something else.

    Examples:
        >>> from sae_lens import StandardSAE, StandardSAEConfig
        >>> from sae_whiten import ActivationStatistics
        >>> statistics = ActivationStatistics(4)
        >>> statistics.update(torch.randn(100, 4))
        >>> sae = StandardSAE(StandardSAEConfig(d_in=4, d_sae=8))
        >>> fold_whitening_into_weights(sae, Whitening.from_statistics(statistics))
        Traceback (most recent call last):
        ...
        sae_whiten.architectures.folding.FoldError: this SAE has normalize_activations='none': ...
    """


@dataclass(frozen=True)
class FoldCheck:
    """How far a folded SAE is from the SAE before the fold, between whitening and dewhitening.

    All norms are Frobenius norms over the activations that were compared.

    Examples:
        >>> check = FoldCheck(512, "held-out", 2e-6, 1e-6, 0.0, 2e-6, 1e-5, 0.01)
        >>> check.fold_error, check.passed
        (2e-06, True)

    Attributes:
        n_activations: Number of activations that were compared.
        source: Where they came from, for example "held-out".
        pre_activation_error: |difference| / |value| of the pre-activations.
        decoder_error: |difference| / |x - mean| of what the two decoders make of the same latents.
        active_set_change: Share of the active latents that are active in one of the two SAEs only.
        reconstruction_error: |difference| / |x - mean| of the two reconstructions, end to end. It
            includes what comes of near ties between latents, where rounding decides.
        tolerance: Largest `pre_activation_error` and `decoder_error` that rounding explains.
        active_set_tolerance: Largest `active_set_change` that near ties explain.
    """

    n_activations: int
    source: str
    pre_activation_error: float
    decoder_error: float
    active_set_change: float
    reconstruction_error: float
    tolerance: float
    active_set_tolerance: float

    @property
    def fold_error(self) -> float:
        """The larger of the two errors of the affine maps."""
        return max(self.pre_activation_error, self.decoder_error)

    @property
    def passed(self) -> bool:
        """Whether all errors are within their tolerances. NaN is not."""
        return (
            self.fold_error <= self.tolerance
            and self.active_set_change <= self.active_set_tolerance
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields and `fold_error`, as JSON can hold them."""
        return {**asdict(self), "fold_error": self.fold_error}


@dataclass(frozen=True)
class FoldReport:
    """What a fold did. `fold_whitening_into_weights` returns one.

    Examples:
        >>> report = FoldReport("topk", "bfloat16", "float32", False, True, {"n_samples": 1000})
        >>> sorted(report.to_dict())
        ['fold', 'n_samples']

    Attributes:
        architecture: SAELens' name of the architecture.
        dtype: Dtype of the weights before.
        folded_dtype: Dtype of the weights after.
        apply_b_dec_to_input: The setting before; afterwards it is True, except for transcoders.
        decoder_norms_folded: Whether decoder norms that latents were ranked by were folded too, and
            `rescale_acts_by_decoder_norm` switched off.
        whitening: `Whitening.summary()` of the whitening.
        check: The comparison on activations, if any were given.
    """

    architecture: str
    dtype: str
    folded_dtype: str
    apply_b_dec_to_input: bool
    decoder_norms_folded: bool
    whitening: dict[str, Any]
    check: FoldCheck | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report, as JSON can hold it. Saved SAEs have it in `cfg.metadata.whitening`."""
        details = {
            "dtype": self.dtype,
            "folded_dtype": self.folded_dtype,
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "decoder_norms_folded": self.decoder_norms_folded,
            "check": None if self.check is None else self.check.to_dict(),
        }
        return {**self.whitening, "fold": details}


def why_not_foldable(sae: SAE[Any] | type[SAE[Any]]) -> str | None:
    """The reason why no whitening can be folded into an SAE of this class; None if one can.

    A class of your own can give one, in its attribute `whitening_not_foldable_because`.

    Examples:
        >>> from sae_lens import MatchingPursuitSAE, TopKSAE
        >>> why_not_foldable(TopKSAE) is None
        True
        >>> why_not_foldable(MatchingPursuitSAE)[:53]
        'MatchingPursuitSAE: its encoder is tied to the decode'
    """
    cls = sae if isinstance(sae, type) else type(sae)
    name = cls.__name__
    declared = getattr(sae, "whitening_not_foldable_because", None)
    if declared is not None:
        return f"{name}: {declared}"
    reason = describe(cls).not_foldable_because
    return None if reason is None else f"{name}: {reason}"


@torch.no_grad()
def fold_whitening_into_weights(
    sae: SAE[Any],
    whitening: Whitening,
    output_whitening: Whitening | None = None,
    activations: Float[Tensor, "..."] | None = None,
    source: str = "given",
) -> FoldReport:
    """Turn an SAE that was trained on whitened activations into a plain one for raw activations.

    Afterwards `sae(x)` is what `whitening.dewhiten(sae(whitening.whiten(x)))` was, with the same
    latents; `sae.cfg.normalize_activations` is "none", and `sae.cfg.metadata.whitening` tells what
    was done. Computed in float64, stored in float32 or better. The SAE is changed in place, or not
    at all if anything fails. `sae.cfg` is replaced and not changed, for another SAE may share it.

    Examples:
        >>> from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        >>> from sae_whiten import ActivationStatistics
        >>> x = torch.randn(1000, 8) * torch.arange(1.0, 9.0) + 5
        >>> statistics = ActivationStatistics(8)
        >>> statistics.update(x)
        >>> whitening = Whitening.from_statistics(statistics)
        >>> sae = TopKTrainingSAE(
        ...     TopKTrainingSAEConfig(
        ...         d_in=8, d_sae=32, k=4, normalize_activations="covariance_whitening"
        ...     )
        ... )
        >>> report = fold_whitening_into_weights(sae, whitening, activations=x)
        >>> report.check.passed, sae.cfg.normalize_activations
        (True, 'none')

    Args:
        sae: An SAE with `normalize_activations="covariance_whitening"`.
        whitening: The whitening that it was trained under.
        output_whitening: The whitening of the output of a transcoder, which may be the same one.
        activations: Raw activations to prove the fold on, shape (n, d_in).
        source: What the report calls them.

    Returns:
        What was done, and how exact it is if `activations` were given.

    Raises:
        FoldError: The architecture cannot be folded, the SAE is folded already or was not trained
            under whitening, the widths differ, the weights are not finite, or the folded SAE
            differs by more than rounding explains.
        TypeError: `whitening` is none: statistics, say.
    """
    folded, report = folded_copy(sae, whitening, output_whitening)
    if activations is not None:
        check = _compare(sae, folded, whitening, output_whitening, activations, source)
        report = replace(report, check=check)
        folded.cfg.metadata.whitening = report.to_dict()
        if not check.passed:
            raise FoldError(
                f"folding failed its proof on {check.n_activations} {source} activations: error of "
                f"the pre-activations {check.pre_activation_error:.2e} and of the decoder "
                f"{check.decoder_error:.2e} (tolerance {check.tolerance:.2e}), active latents that "
                f"changed {check.active_set_change:.2%} (tolerance "
                f"{check.active_set_tolerance:.0%}). The SAE was left as it was."
            )
    _take_over(sae, folded)
    _leave_whitened_space(sae)
    return report


@torch.no_grad()
def unfold_whitening_from_weights(
    sae: SAE[Any], whitening: Whitening, output_whitening: Whitening | None = None
) -> None:
    """Inverse of `fold_whitening_into_weights`: bring a plain SAE into whitened coordinates.

    For fine-tuning a published SAE under whitening. Any whitening will do; the SAE need not have
    been trained under it. The SAE is changed in place, or not at all if anything fails.

    Examples:
        >>> from sae_lens import StandardSAE, StandardSAEConfig
        >>> from sae_whiten import ActivationStatistics
        >>> x = torch.randn(1000, 8) * torch.arange(1.0, 9.0) + 5
        >>> statistics = ActivationStatistics(8)
        >>> statistics.update(x)
        >>> whitening = Whitening.from_statistics(statistics)
        >>> sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=32))
        >>> before = sae(x)
        >>> unfold_whitening_from_weights(sae, whitening)
        >>> torch.allclose(whitening.dewhiten(sae(whitening.whiten(x))), before, atol=1e-3)
        True

    Args:
        sae: An SAE with `normalize_activations="none"`.
        whitening: The whitening of its input.
        output_whitening: The whitening of the output of a transcoder, which may be the same one.

    Raises:
        FoldError: The architecture cannot be folded, the SAE normalises its activations, the widths
            differ or the weights are not finite.
        TypeError: `whitening` is none: statistics, say.
    """
    _require_foldable(sae)
    if sae.cfg.normalize_activations != "none":
        raise FoldError(
            f"cannot unfold an SAE with normalize_activations={sae.cfg.normalize_activations!r}: "
            "it must be plain ('none')"
        )
    unfolded = _transformed(sae, whitening, output_whitening, unfold)
    unfolded.cfg.normalize_activations = "covariance_whitening"
    if "whitening" in unfolded.cfg.metadata:
        del unfolded.cfg.metadata.whitening
    _take_over(sae, unfolded)


@torch.no_grad()
def folded_copy(
    sae: SAE[Any], whitening: Whitening, output_whitening: Whitening | None = None
) -> tuple[SAE[Any], FoldReport]:
    """A folded copy of an SAE, which is not changed itself, and the report.

    Arguments and errors are those of `fold_whitening_into_weights`, which has an example.
    """
    _require_foldable(sae)
    if sae.cfg.normalize_activations != "covariance_whitening":
        done = sae.cfg.metadata.whitening is not None
        raise FoldError(
            "this SAE has its whitening folded in already (cfg.metadata.whitening)"
            if done
            else f"this SAE has normalize_activations={sae.cfg.normalize_activations!r}: it was "
            "not trained under 'covariance_whitening', and folding would change what it computes"
        )
    folded = _transformed(sae, whitening, output_whitening, fold)
    folded.cfg.normalize_activations = "none"
    report = FoldReport(
        architecture=sae.cfg.architecture(),
        dtype=dtype_to_str(sae.W_enc.dtype),
        folded_dtype=dtype_to_str(folded.W_enc.dtype),
        apply_b_dec_to_input=sae.cfg.apply_b_dec_to_input,
        decoder_norms_folded=describe(sae).affine_weights(sae).decoder_norms is not None,
        whitening=whitening.summary(),
    )
    folded.cfg.metadata.whitening = report.to_dict()
    return folded, report


def _require_foldable(sae: SAE[Any]) -> None:
    reason = why_not_foldable(sae)
    if reason is not None:
        raise FoldError(f"whitening cannot be folded into {reason}")


def _transformed(
    sae: SAE[Any], whitening: Whitening, output_whitening: Whitening | None, change: Any
) -> SAE[Any]:
    """A copy of `sae` with `change` (fold or unfold) applied to its weights."""
    require_whitening(whitening)
    if output_whitening is not None:
        require_whitening(output_whitening, "output_whitening")
    architecture = describe(sae)
    d_out = sae.W_dec.shape[1]
    out = output_whitening or whitening
    if architecture.is_transcoder and output_whitening is None:
        raise FoldError(
            "a transcoder writes to another hook than it reads: pass output_whitening, the "
            "whitening of what it writes (the same object if both are really the same)"
        )
    if whitening.d_in != sae.cfg.d_in or out.d_in != d_out:
        raise FoldError(
            f"the SAE maps {sae.cfg.d_in} to {d_out} dimensions, the whitenings given are of width "
            f"{whitening.d_in} (input) and {out.d_in} (output)"
        )
    parameters = change(
        architecture.affine_weights(sae),
        whitening,
        output_whitening,
        subtract_b_dec=not architecture.is_transcoder,
    ).parameters()
    # aminmax, because isfinite allocates a tensor of the same size
    if not all(bool(torch.stack(t.aminmax()).isfinite().all()) for t in parameters.values()):
        raise FoldError(
            "the weights are not finite, or overflow when the whitening is applied to them"
        )
    new = _copy_with(sae, parameters)
    if not architecture.is_transcoder:
        new.cfg.apply_b_dec_to_input = True
    for name, value in architecture.set_by_fold.items():
        setattr(new.cfg, name, value)
    _leave_whitened_space(new)
    return new


def _copy_with(sae: SAE[Any], parameters: dict[str, Tensor]) -> SAE[Any]:
    """A copy of `sae` with other values for some parameters and a config of its own.

    The other parameters, such as thresholds, are kept in the precision of these. Modules are
    shared.
    """
    copied = copy.copy(sae)
    dtype = parameters["W_enc"].dtype
    copied._buffers = dict(sae._buffers)
    copied._parameters = {
        name: None
        if value is None
        else torch.nn.Parameter(
            parameters[name]
            if name in parameters
            else value.data.to(torch.promote_types(value.dtype, dtype)),
            requires_grad=value.requires_grad,
        )
        for name, value in sae._parameters.items()
    }
    copied.cfg, copied.dtype = copy.deepcopy(sae.cfg), dtype
    copied.cfg.dtype = dtype_to_str(dtype)
    # a compiled step is bound to the SAE that it was compiled for
    vars(copied).pop("training_forward_pass", None)
    return copied


def _leave_whitened_space(sae: SAE[Any]) -> None:
    """Make an SAE that this package was training a stock SAE. Its weights must be plain."""
    leave = getattr(sae, "leave_whitened_space", None)
    if leave is not None:
        leave()


def _take_over(sae: SAE[Any], new: SAE[Any]) -> None:
    """Give `sae` the values and the config of `new`. Nothing here can fail half-way."""
    for name, parameter in new._parameters.items():
        own = sae._parameters[name]
        if own is not None and parameter is not None:
            own.data, own.grad = parameter.data, None
    sae.cfg, sae.dtype = new.cfg, new.dtype


@torch.no_grad()
def _compare(
    sae: SAE[Any],
    folded: SAE[Any],
    whitening: Whitening,
    output_whitening: Whitening | None,
    activations: Tensor,
    source: str,
) -> FoldCheck:
    """Compare `folded` with `sae` between whitening and dewhitening, on raw activations."""
    if activations.ndim != 2 or activations.shape[1] != whitening.d_in or len(activations) == 0:
        raise FoldError(
            f"activations to prove the fold on: expected shape (n, {whitening.d_in}) with n > 0, "
            f"got {tuple(activations.shape)}"
        )
    out = output_whitening or whitening
    # both in the precision of the folded weights, which holds bfloat16 weights exactly: bfloat16
    # rounding in the forward pass is not an error of the fold
    dtype = folded.W_enc.dtype
    x = activations.to(folded.W_enc.device, dtype)
    reference = _copy_with(
        sae, {n: p.data.to(dtype) for n, p in sae._parameters.items() if p is not None}
    )
    # heads are flat already, and the closures that flatten them would act on `sae`
    for copied in (reference, folded):
        copied.turn_off_forward_pass_hook_z_reshaping()
    architecture = describe(sae)
    weights, folded_weights = map(architecture.affine_weights, (reference, folded))

    eps = torch.finfo(dtype).eps
    offset = float(out.mean.norm() / out.covariance_eigenvalues.sum().sqrt())
    # each map is a product with W or W_inv, which amplifies rounding by the condition number; the
    # mean is part of the decoder bias, whose rounding counts in units of the spread
    tolerance = 8 * eps * (max(whitening.condition_number, out.condition_number) + offset)

    # a few activations at a time, because latents take memory: sums of squares, and counts
    sums: dict[str, float] = defaultdict(float)
    norms = None if weights.decoder_norms is None else weights.decoder_norms.to(dtype)
    with full_precision(x.device):
        for rows in x.split(128):
            whitened = whitening.whiten(rows)
            pre, latents = _encode(reference, whitened)
            pre = pre if norms is None else pre * norms
            new_pre, new_latents = _encode(folded, rows)
            skip, new_skip = _skipped(weights, whitened), _skipped(folded_weights, rows)
            to_decode, new_to_decode = _sparse_if_few(latents), _sparse_if_few(new_latents)
            output = out.dewhiten(reference.decode(to_decode) + skip)
            active, new_active = latents != 0, new_latents != 0
            for name, value in (
                ("pre", pre),
                ("pre_error", new_pre - pre),
                ("decoder_error", folded.decode(to_decode) + new_skip - output),
                ("reconstruction_error", folded.decode(new_to_decode) + new_skip - output),
            ):
                sums[name] += float(torch.linalg.vector_norm(value)) ** 2
            # of the activations: the output of an SAE without active latents has none
            sums["spread"] += len(rows) * float(out.covariance_eigenvalues.sum())
            sums["changed"] += int((active ^ new_active).sum())
            sums["active"] += int((active | new_active).sum())
    return FoldCheck(
        n_activations=len(x),
        source=source,
        pre_activation_error=_ratio(sums["pre_error"], sums["pre"]) ** 0.5,
        decoder_error=_ratio(sums["decoder_error"], sums["spread"]) ** 0.5,
        active_set_change=_ratio(sums["changed"], sums["active"]),
        reconstruction_error=_ratio(sums["reconstruction_error"], sums["spread"]) ** 0.5,
        tolerance=tolerance,
        active_set_tolerance=0.01,
    )


def _encode(sae: SAE[Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations and latents, dense."""
    captured: list[Tensor] = []

    def capture(module: torch.nn.Module, args: Any, output: Any) -> None:
        captured.append(output)

    handle = sae.hook_sae_acts_pre.register_forward_hook(capture)
    try:
        latents = sae.encode(x)
    finally:
        handle.remove()
    return captured[-1], latents.to_dense() if latents.is_sparse else latents


def _sparse_if_few(latents: Tensor) -> Tensor:
    """The latents as a sparse tensor, if few are active: most of the proof's time is decoding."""
    few = latents.device.type == "cpu" and latents.count_nonzero() < latents.numel() / 16
    return latents.to_sparse() if few else latents


def _skipped(weights: AffineWeights, x: Tensor) -> Tensor | float:
    """What a skip transcoder adds to its decoder's output."""
    return 0.0 if weights.W_skip is None else x @ weights.W_skip.T


def _ratio(numerator: float, denominator: float) -> float:
    if denominator == 0:
        return 0.0 if numerator == 0 else math.inf
    return numerator / denominator
