"""Fold a whitening into a SAELens SAE, check that nothing changed, and unfold it again.

The algebra is in `sae_whiten.folding`. The description of an architecture names the weights that
change.
"""

import copy
import logging
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

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

# Activations per part of the check, because dense latents need memory
_ROWS = 64
# The check ends after this many active latents if errors are within half of the tolerances
_ENOUGH_ACTIVE = 2048


class FoldError(ValueError):
    """A whitening cannot be folded into an SAE, or the folded SAE computes different outputs.

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
    """Differences between a folded SAE and the sequence whiten, original SAE, dewhiten.

    All norms are Frobenius norms over the compared activations.

    Examples:
        >>> check = FoldCheck(512, "held-out", 2e-6, 1e-6, 0.0, 2e-6, 1e-5, 0.01)
        >>> check.fold_error, check.passed
        (2e-06, True)

    Attributes:
        n_activations: Number of compared activations. May be fewer than were given.
        source: Where the activations came from, for example "held-out".
        pre_activation_error: |difference| / |value| of the pre-activations.
        decoder_error: |difference| / |x - mean| of the two decoders' outputs for the same latents.
        active_set_change: Share of the active latents that are active in only one of the two SAEs.
        reconstruction_error: |difference| / |x - mean| of the two reconstructions, end to end.
            Includes latents with nearly equal pre-activations, where rounding decides which is
            active.
        tolerance: Largest `pre_activation_error` and `decoder_error` that rounding explains.
        active_set_tolerance: Largest `active_set_change` that near ties explain.
        wrong_decoder_rows: Number of decoder rows, of all latents, that differ by more than
            rounding explains. It alone covers latents that no compared activation activates.
    """

    n_activations: int
    source: str
    pre_activation_error: float
    decoder_error: float
    active_set_change: float
    reconstruction_error: float
    tolerance: float
    active_set_tolerance: float
    wrong_decoder_rows: int = 0

    @property
    def fold_error(self) -> float:
        """The larger of `pre_activation_error` and `decoder_error`."""
        return max(self.pre_activation_error, self.decoder_error)

    @property
    def passed(self) -> bool:
        """Whether all errors except `reconstruction_error` are within tolerance. NaN fails."""
        return self.is_within(1.0)

    def is_within(self, share: float) -> bool:
        """Whether all errors except `reconstruction_error` are within this share of the tolerances.

        NaN fails.
        """
        return (
            self.fold_error <= share * self.tolerance
            and self.active_set_change <= share * self.active_set_tolerance
            and self.wrong_decoder_rows == 0
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields and `fold_error`, ready for JSON."""
        return {**asdict(self), "fold_error": self.fold_error}


@dataclass(frozen=True)
class FoldReport:
    """What a fold did, as returned by `fold_whitening_into_weights`.

    Examples:
        >>> report = FoldReport("topk", "bfloat16", "float32", False, True, {"n_samples": 1000})
        >>> sorted(report.to_dict())
        ['fold', 'n_samples']

    Attributes:
        architecture: SAELens' name of the architecture.
        dtype: Dtype of the weights before the fold.
        folded_dtype: Dtype of the weights after the fold.
        apply_b_dec_to_input: The setting before. Afterwards it is True, except for transcoders.
        decoder_norms_folded: Whether the SAE ranked latents by decoder norms. If so, the norms are
            folded too and `rescale_acts_by_decoder_norm` is switched off.
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
        """The report, ready for JSON. Saved SAEs contain it in `cfg.metadata.whitening`."""
        details = {
            "dtype": self.dtype,
            "folded_dtype": self.folded_dtype,
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "decoder_norms_folded": self.decoder_norms_folded,
            "check": None if self.check is None else self.check.to_dict(),
        }
        return {**self.whitening, "fold": details}


def why_not_foldable(sae: SAE[Any] | type[SAE[Any]]) -> str | None:
    """Why whitening cannot be folded into an SAE of this class, or None if it can.

    A class of your own can state a reason in its attribute `whitening_not_foldable_because`.

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
    """Turn an SAE trained on whitened activations into a plain one for raw activations.

    Afterwards, `sae(x)` has the value that `whitening.dewhiten(sae(whitening.whiten(x)))` had
    before, with the same latents. `sae.cfg.normalize_activations` is "none", and
    `sae.cfg.metadata.whitening` holds the report. The fold is computed in float64 and stored in
    float32 or better. The SAE is changed in place. If anything fails, it stays as it was. `sae.cfg`
    is replaced by a changed copy, because another SAE may share the config.

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
        whitening: The whitening that the SAE was trained under.
        output_whitening: The whitening of a transcoder's output; may be the same object.
        activations: Raw activations to check the fold on, shape (n, d_in). If the check passes
            clearly on some of them, the others are not used.
        source: Name of the activations in the report.

    Returns:
        A report of the fold. With `activations`, it includes the check.

    Raises:
        FoldError: The architecture cannot be folded, the SAE is folded already or was not trained
            under whitening, its trainer has another whitening, the widths differ, the weights are
            not finite, or the folded SAE differs by more than rounding explains.
        TypeError: `whitening` is not a `Whitening` (statistics, for example).
    """
    folded, report, weights = _folded(sae, whitening, output_whitening)
    if activations is not None:
        check = _compare(sae, weights, folded, whitening, output_whitening, activations, source)
        report = replace(report, check=check)
        folded.cfg.metadata.whitening = report.to_dict()
        if not check.passed:
            raise FoldError(
                f"folding failed its proof on {check.n_activations} {source} activations: error of "
                f"the pre-activations {check.pre_activation_error:.2e} and of the decoder "
                f"{check.decoder_error:.2e} (tolerance {check.tolerance:.2e}), active latents that "
                f"changed {check.active_set_change:.2%} (tolerance "
                f"{check.active_set_tolerance:.0%}), decoder rows that differ "
                f"{check.wrong_decoder_rows}. The SAE was left as it was."
            )
    _take_over(sae, folded)
    _leave_whitened_space(sae)
    return report


@torch.no_grad()
def unfold_whitening_from_weights(
    sae: SAE[Any], whitening: Whitening, output_whitening: Whitening | None = None
) -> None:
    """Inverse of `fold_whitening_into_weights`: bring a plain SAE into whitened coordinates.

    Use this to fine-tune a published SAE under whitening. The SAE may have been trained under
    another whitening or under none. It is changed in place. If anything fails, it stays as it was.

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
        output_whitening: The whitening of a transcoder's output; may be the same object.

    Raises:
        FoldError: The architecture cannot be folded, the SAE normalises its activations, the widths
            differ or the weights are not finite.
        TypeError: `whitening` is not a `Whitening` (statistics, for example).
    """
    _require_foldable(sae)
    if sae.cfg.normalize_activations != "none":
        raise FoldError(
            f"cannot unfold an SAE with normalize_activations={sae.cfg.normalize_activations!r}: "
            "it must be plain ('none')"
        )
    unfolded, _ = _transformed(sae, whitening, output_whitening, unfold)
    unfolded.cfg.normalize_activations = "covariance_whitening"
    if "whitening" in unfolded.cfg.metadata:
        del unfolded.cfg.metadata.whitening
    _take_over(sae, unfolded)


@torch.no_grad()
def folded_copy(
    sae: SAE[Any], whitening: Whitening, output_whitening: Whitening | None = None
) -> tuple[SAE[Any], FoldReport]:
    """A folded copy of an SAE, and the report. The SAE itself is not changed.

    See `fold_whitening_into_weights` for arguments, errors and an example.
    """
    folded, report, _ = _folded(sae, whitening, output_whitening)
    return folded, report


def _folded(
    sae: SAE[Any], whitening: Whitening, output_whitening: Whitening | None
) -> tuple[SAE[Any], FoldReport, AffineWeights]:
    """A folded copy, the report, and the original weights."""
    _require_foldable(sae)
    if sae.cfg.normalize_activations != "covariance_whitening":
        done = sae.cfg.metadata.whitening is not None
        raise FoldError(
            "this SAE has its whitening folded in already (cfg.metadata.whitening)"
            if done
            else f"this SAE has normalize_activations={sae.cfg.normalize_activations!r}: it was "
            "not trained under 'covariance_whitening', and folding would change what it computes"
        )
    folded, weights = _transformed(sae, whitening, output_whitening, fold)
    own = getattr(sae, "whitening", None)  # set while an SAE is trained under whitening
    if isinstance(own, Whitening) and own is not whitening and own.digest != whitening.digest:
        raise FoldError("this SAE was trained under another whitening than the one given")
    folded.cfg.normalize_activations = "none"
    report = FoldReport(
        architecture=sae.cfg.architecture(),
        dtype=dtype_to_str(sae.W_enc.dtype),
        folded_dtype=dtype_to_str(folded.W_enc.dtype),
        apply_b_dec_to_input=sae.cfg.apply_b_dec_to_input,
        decoder_norms_folded=weights.decoder_norms is not None,
        whitening=whitening.summary(),
    )
    folded.cfg.metadata.whitening = report.to_dict()
    return folded, report, weights


def _require_foldable(sae: SAE[Any]) -> None:
    reason = why_not_foldable(sae)
    if reason is not None:
        raise FoldError(f"whitening cannot be folded into {reason}")


@runtime_checkable
class _ChangeOfCoordinates(Protocol):
    """`fold` or `unfold`: the weights of the same SAE in other coordinates."""

    def __call__(
        self,
        weights: AffineWeights,
        whitening: Whitening,
        output_whitening: Whitening | None = None,
        *,
        subtract_b_dec: bool = True,
    ) -> AffineWeights: ...


def _transformed(
    sae: SAE[Any],
    whitening: Whitening,
    output_whitening: Whitening | None,
    change: _ChangeOfCoordinates,
) -> tuple[SAE[Any], AffineWeights]:
    """A copy of `sae` with `change` applied, and the original weights."""
    require_whitening(whitening)
    if output_whitening is not None:
        require_whitening(output_whitening, "output_whitening")
    architecture = describe(sae)
    if architecture.is_transcoder and output_whitening is None:
        raise FoldError(
            "a transcoder writes to another hook than it reads: pass output_whitening, the "
            "whitening of what it writes (the same object if both are really the same)"
        )
    weights = architecture.affine_weights(sae)
    try:
        changed = change(
            weights,
            whitening,
            output_whitening,
            subtract_b_dec=not architecture.is_transcoder,
        )
    except ValueError as error:  # other widths
        raise FoldError(str(error)) from None
    parameters = changed.parameters()
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
    return new, weights


def _copy_with(sae: SAE[Any], parameters: dict[str, Tensor]) -> SAE[Any]:
    """A copy of `sae` with new values for the given parameters and its own config.

    Other parameters, such as thresholds, get at least the precision of the given ones. Modules are
    shared with `sae`.
    """
    copied = copy.copy(sae)
    dtype = parameters["W_enc"].dtype
    copied._buffers, copied._modules = dict(sae._buffers), dict(sae._modules)
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
    # a compiled step is bound to the SAE it was compiled for
    vars(copied).pop("training_forward_pass", None)
    return copied


def _leave_whitened_space(sae: SAE[Any]) -> None:
    """Remove what training under whitening attached to an SAE. Its weights must be folded."""
    leave = getattr(sae, "leave_whitened_space", None)
    if leave is not None:
        leave()


def _take_over(sae: SAE[Any], new: SAE[Any]) -> None:
    """Copy the values and the config of `new` to `sae`. Nothing here can fail half-way."""
    for name, parameter in new._parameters.items():
        own = sae._parameters[name]
        if own is not None and parameter is not None:
            own.data, own.grad = parameter.data, None
    sae.cfg, sae.dtype = new.cfg, new.dtype


@torch.no_grad()
def _compare(
    sae: SAE[Any],
    weights: AffineWeights,
    folded: SAE[Any],
    whitening: Whitening,
    output_whitening: Whitening | None,
    activations: Tensor,
    source: str,
) -> FoldCheck:
    """Compare `folded` on raw activations with the sequence whiten, `sae`, dewhiten.

    `weights` are those of `sae`.
    """
    if activations.ndim != 2 or activations.shape[1] != whitening.d_in or len(activations) == 0:
        raise FoldError(
            f"activations to prove the fold on: expected shape (n, {whitening.d_in}) with n > 0, "
            f"got {tuple(activations.shape)}"
        )
    out = output_whitening or whitening
    # both SAEs run in the dtype of the folded weights, which represents bfloat16 weights exactly:
    # bfloat16 rounding in the forward pass is not an error of the fold
    dtype = folded.W_enc.dtype
    x = activations.to(folded.W_enc.device, dtype)
    reference = _copy_with(
        sae, {n: p.data.to(dtype) for n, p in sae._parameters.items() if p is not None}
    )
    # the activations are flat already, and the copied reshaping closures would act on `sae`
    for copied in (reference, folded):
        copied.turn_off_forward_pass_hook_z_reshaping()
    folded_weights = describe(sae).affine_weights(folded)
    tolerance = _tolerance(folded_weights, whitening, out, describe(sae).is_transcoder)
    norms = None if weights.decoder_norms is None else weights.decoder_norms.to(dtype)
    sums: dict[str, float] = defaultdict(float)  # sums of squares, and counts
    n_parts = -(-len(x) // _ROWS)
    # each part takes every n-th activation, because neighbours may come from the same text
    parts = (x[i::n_parts] for i in range(n_parts))
    with full_precision(x.device):
        sums["wrong_rows"] += _wrong_decoder_rows(weights, folded_weights, out)
        for rows in parts:
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
            # spread of the activations, because that of the output is 0 without active latents
            sums["spread"] += len(rows) * float(out.covariance_eigenvalues.sum())
            sums["changed"] += int((active ^ new_active).sum())
            sums["active"] += int((active | new_active).sum())
            sums["rows"] += len(rows)
            check = _check_of(sums, source, tolerance)
            if sums["active"] >= _ENOUGH_ACTIVE and check.is_within(0.5):
                break
    return _check_of(sums, source, tolerance)


def _tolerance(
    folded: AffineWeights, whitening: Whitening, out: Whitening, is_transcoder: bool
) -> float:
    """The largest relative error of pre-activations and decoder that rounding explains.

    A product with W or W_inv amplifies rounding by the condition number. b_dec contains the mean of
    the activations, which may differ from the mean in the statistics. Its rounding error is taken
    relative to the spread of the activations.
    """
    mean = max(float(out.mean.norm()), float(folded.b_dec.double().norm()))
    offset = mean / float(out.covariance_eigenvalues.sum().sqrt())
    if is_transcoder:
        # It subtracts no b_dec, so the product with W amplifies rounding of the input's mean, too:
        # each coordinate by its own row of W, in units of whitened activations, whose variance is 1
        amplified = whitening.mean[:, None] * whitening.W
        offset += float(amplified.norm()) / whitening.d_in**0.5
    eps = torch.finfo(folded.W_enc.dtype).eps
    return 8 * eps * (max(whitening.condition_number, out.condition_number) + offset)


def _wrong_decoder_rows(weights: AffineWeights, folded: AffineWeights, out: Whitening) -> int:
    """Number of rows of the folded decoder that are not W_dec @ W_inv, up to rounding.

    Both sides are multiplied by one random vector, which shows any row that differs.

    Args:
        weights: Weights in whitened coordinates, W_dec of shape (d_sae, d_out).
        folded: The folded weights.
        out: The whitening of the output.
    """
    home, dtype = folded.W_dec.device, folded.W_dec.dtype
    v = torch.randn(out.d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = out.W_inv.cpu() @ v
    v, moved = v.to(dtype).to(home), moved.to(dtype).to(home)
    old = weights.W_dec.to(dtype)
    expected, size = old @ moved, torch.linalg.vector_norm(old, dim=1) * moved.norm()
    if weights.decoder_norms is not None:
        norms = weights.decoder_norms.to(dtype).to(home)
        expected, size = expected / norms, size / norms
    size += torch.linalg.vector_norm(folded.W_dec, dim=1) * v.norm()
    # the terms of a product have random signs, so their errors add up to about eps |row| |v|
    tolerance = 8 * torch.finfo(dtype).eps * size
    # not "error > tolerance", which a NaN passes
    return int((~((folded.W_dec @ v - expected).abs() <= tolerance)).sum())


def _check_of(sums: dict[str, float], source: str, tolerance: float) -> FoldCheck:
    return FoldCheck(
        n_activations=int(sums["rows"]),
        source=source,
        pre_activation_error=_ratio(sums["pre_error"], sums["pre"]) ** 0.5,
        decoder_error=_ratio(sums["decoder_error"], sums["spread"]) ** 0.5,
        active_set_change=_ratio(sums["changed"], sums["active"]),
        reconstruction_error=_ratio(sums["reconstruction_error"], sums["spread"]) ** 0.5,
        tolerance=tolerance,
        active_set_tolerance=0.01,
        wrong_decoder_rows=int(sums["wrong_rows"]),
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
    """The latents, sparse if few are active: most of the check's time is spent decoding."""
    few = latents.device.type == "cpu" and latents.count_nonzero() < latents.numel() / 16
    return latents.to_sparse() if few else latents


def _skipped(weights: AffineWeights, x: Tensor) -> Tensor | float:
    """The skip connection's share of a transcoder's output; 0 without a skip connection."""
    return 0.0 if weights.W_skip is None else x @ weights.W_skip.to(x.dtype).T


def _ratio(numerator: float, denominator: float) -> float:
    if denominator == 0:
        return 0.0 if numerator == 0 else math.inf
    return numerator / denominator
