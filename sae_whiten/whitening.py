"""The whitening transform, derived from the mean and covariance of activations.

Let C = E diag(l) E^T be the covariance, l~ its regularised eigenvalues and a the strength. Then:

    kind   W (whiten: z = (x - mean) @ W)     W_inv (dewhiten: x = z @ W_inv + mean)
    pca    E diag(l~^(-a/2))                  diag(l~^(a/2)) E^T
    zca    E diag(l~^(-a/2)) E^T              E diag(l~^(a/2)) E^T

Row vectors throughout, as in SAELens. Source: Saraswatula & Klindt, arXiv 2511.13981; Kessy, Lewin
& Strimmer, *Optimal Whitening and Decorrelation* (2018).
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from sae_whiten._files import (
    count_field,
    load_tensors,
    number_field,
    reading_content,
    save_tensors,
    tensor_of_shape,
)
from sae_whiten.config import WhiteningConfig
from sae_whiten.statistics import ActivationStatistics

__all__ = ["TRANSFORM_FIELDS", "Whitening", "full_precision", "oas_shrinkage", "require_whitening"]

logger = logging.getLogger(__name__)

_KIND = "whitening"

TRANSFORM_FIELDS = ("kind", "eps", "eps_mode", "shrinkage", "strength")
"""Fields of `WhiteningConfig` that the transform depends on, given the statistics."""

_FEW_SAMPLES_PER_DIMENSION = 10


def oas_shrinkage(eigenvalues: Float[Tensor, "d"], n_samples: int) -> float:
    """Oracle approximating shrinkage: the intensity in [0, 1] for a covariance of n samples.

    Chen, Wiesel, Eldar & Hero, *Shrinkage Algorithms for MMSE Covariance Estimation* (2010),
    equation 23, without the terms in 1/d, which scikit-learn's `OAS` leaves out too. Only d, n,
    tr(C) and tr(C^2) are needed.

    Examples:
        >>> eigenvalues = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
        >>> round(oas_shrinkage(eigenvalues, n_samples=100), 3)
        0.248

    Args:
        eigenvalues: Eigenvalues of the covariance, with divisor n.
        n_samples: Number of samples from which the covariance was estimated.
    """
    d = eigenvalues.numel()
    mean_square = float(eigenvalues.square().sum()) / d**2
    square_mean = float(eigenvalues.mean()) ** 2
    denominator = (n_samples + 1) * (mean_square - square_mean / d)
    return 1.0 if denominator <= 0 else min((mean_square + square_mean) / denominator, 1.0)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 products in float32 on `device`, whatever the caller has set for speed.

    Autocast keeps 8 bits of each factor, TensorFloat-32 keeps 11. Activations have more bits than
    that, even after a large mean is subtracted.

    Examples:
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(x.device):
        ...     (x @ x).dtype
        torch.float32
    """
    with torch.autocast(device.type, enabled=False):
        backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
        matmul: Any = getattr(backend, "matmul", None)
        if hasattr(matmul, "fp32_precision"):  # PyTorch 2.9
            before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
            try:
                yield
            finally:
                matmul.fp32_precision = before
        else:
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(precision)


@dataclass(frozen=True, eq=False, repr=False)
class Whitening:
    """An invertible affine map between activations x and whitened activations z.

    Examples:
        >>> x = torch.randn(1000, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 100.0]) + 5
        >>> statistics = ActivationStatistics(3)
        >>> statistics.update(x)
        >>> whitening = Whitening.from_statistics(statistics, WhiteningConfig(eps=0.0))
        >>> z = whitening.whiten(x)
        >>> torch.allclose(torch.cov(z.T), torch.eye(3, dtype=torch.float64))
        True
        >>> torch.allclose(whitening.dewhiten(z), x)
        True

    Attributes:
        mean: Mean of the activations.
        W: Whitens: z = (x - mean) @ W.
        W_inv: Dewhitens: x = z @ W_inv + mean.
        eigenvalues: Regularised eigenvalues of the covariance, one per whitened direction, in the
            ascending order of `covariance_eigenvalues`.
        covariance_eigenvalues: The eigenvalues before regularisation, ascending.
        config: The configuration from which the transform was derived.
        shrinkage: The intensity of the shrinkage that was applied.
        n_samples: Number of activations in the statistics.
    """

    mean: Float64[Tensor, "d_in"]
    W: Float64[Tensor, "d_in d_in"]
    W_inv: Float64[Tensor, "d_in d_in"]
    eigenvalues: Float64[Tensor, "d_in"]
    covariance_eigenvalues: Float64[Tensor, "d_in"]
    config: WhiteningConfig
    shrinkage: float
    n_samples: int
    _casts: dict[Any, tuple[Tensor, ...]] = field(init=False, default_factory=dict, repr=False)

    @classmethod
    def from_statistics(
        cls, stats: ActivationStatistics, config: WhiteningConfig | None = None
    ) -> "Whitening":
        """Derive the transform.

        Logs a warning when the samples are too few for the number of dimensions.

        Args:
            stats: Mean and covariance; at least two samples.
            config: How to regularise; the default configuration if None.

        Raises:
            ValueError: There are fewer than two samples, all activations are the same, or a
                direction has no variance beyond rounding errors and eps is 0 ("absolute"): this
                would divide by zero.
        """
        config = config or WhiteningConfig()
        n, d = stats.n_samples, stats.d_in
        raw, basis = torch.linalg.eigh(stats.covariance)
        raw = raw.clamp(min=0)
        average = raw.mean()
        if not average > 0:
            raise ValueError(
                f"all {n} activations are the same: there is no variance to whiten. "
                "Check the hook name and that the model's weights are loaded."
            )
        shrinkage = _shrinkage(config, raw, n, d)
        eigenvalues = (1 - shrinkage) * raw + shrinkage * average
        if config.eps_mode == "absolute":
            # not "<= 0": the sign of an eigenvalue that should be 0 is one of rounding
            n_null = int((raw <= _eigenvalue_rounding(raw)).sum())
            if config.strength > 0 and config.eps == 0 and shrinkage == 0 and n_null:
                raise ValueError(
                    f"{n_null} directions have no variance beyond rounding errors, and eps=0: "
                    "whitening would divide by zero. Use eps > 0."
                )
            eigenvalues = eigenvalues + config.eps
        else:
            null = _without_information(stats, raw, basis)
            eigenvalues = eigenvalues + config.eps * average
            # n <= d samples leave null directions in any data, and shrinkage is the remedy
            if shrinkage == 0 or n > d:
                eigenvalues = torch.where(null, eigenvalues.maximum(average), eigenvalues)
            # eigenvectors are defined up to sign: fix the sign, so that two estimates agree
            largest = basis.abs().argmax(dim=0, keepdim=True)
            basis = basis * basis.gather(0, largest).sign()
        scale = eigenvalues ** (config.strength / 2)
        W, W_inv = basis / scale, scale[:, None] * basis.T
        if config.kind == "zca":
            W, W_inv = W @ basis.T, basis @ W_inv
        return cls(
            mean=stats.mean,
            W=W.contiguous(),
            W_inv=W_inv.contiguous(),
            eigenvalues=eigenvalues,
            covariance_eigenvalues=raw,
            config=config,
            shrinkage=shrinkage,
            n_samples=n,
        )

    def __repr__(self) -> str:
        return (
            f"Whitening(d_in={self.d_in}, kind={self.kind!r}, strength={self.strength:g}, "
            f"shrinkage={self.shrinkage:.3g}, n_samples={self.n_samples})"
        )

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.mean.numel()

    @property
    def kind(self) -> Literal["pca", "zca"]:
        """The kind of whitening, "pca" or "zca"."""
        return self.config.kind

    @property
    def strength(self) -> float:
        """The exponent of partial whitening, in [0, 1]."""
        return self.config.strength

    @property
    def matrix(self) -> Float64[Tensor, "d_in d_in"]:
        """`W`, under the name that SAELens' `ActivationWhitening` uses."""
        return self.W

    @property
    def inverse_matrix(self) -> Float64[Tensor, "d_in d_in"]:
        """`W_inv`, under the name that SAELens' `ActivationWhitening` uses."""
        return self.W_inv

    @property
    def root_mean_square(self) -> float:
        """Root mean square of whitened activations over dimensions: about 1 with strength 1."""
        variances = self.covariance_eigenvalues / self.eigenvalues**self.strength
        return float(variances.mean().sqrt())

    @property
    def condition_number(self) -> float:
        """Condition number of W: that of the regularised covariance to the power strength / 2."""
        ratio = self.eigenvalues.max() / self.eigenvalues.min()
        return float(ratio ** (self.strength / 2))

    def whiten(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """z = (x - mean) @ W.

        Computed in float32 or better for any dtype of `x`, even under autocast or if
        TensorFloat-32 is allowed.

        Args:
            x: Activations, of any floating dtype and on any device.

        Returns:
            Whitened activations, in the dtype of `x`.

        Raises:
            ValueError: The last dimension of `x` is not d_in, or its dtype is not floating.
        """
        self._check_input(x, "whiten")
        W, mean, mean_rest = self._cast("W", x)
        with full_precision(x.device):
            rows = x.reshape(-1, self.d_in).to(W.dtype) - mean
            # the mean was rounded to the dtype; mean_rest corrects z for this rounding
            return torch.addmm(mean_rest, rows, W).reshape(x.shape).to(x.dtype)

    def dewhiten(self, z: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """x = z @ W_inv + mean. Dtypes and errors as for `whiten`."""
        self._check_input(z, "dewhiten")
        W_inv, mean, _ = self._cast("W_inv", z)
        with full_precision(z.device):
            rows = z.reshape(-1, self.d_in).to(W_inv.dtype)
            return torch.addmm(mean, rows, W_inv).reshape(z.shape).to(z.dtype)

    def with_config(self, config: WhiteningConfig) -> "Whitening":
        """The same transform with another config, which may differ in fields without effect on it:
        all but kind, eps, eps_mode, shrinkage and strength.

        Raises:
            ValueError: It differs in another field.
        """
        if config == self.config:
            return self
        for name in TRANSFORM_FIELDS:
            own, other = getattr(self.config, name), getattr(config, name)
            if own != other:
                raise ValueError(
                    f"the whitening was derived with {name}={own!r}, and {name}={other!r} is asked "
                    "for: derive it again with Whitening.from_statistics"
                )
        whitening = replace(self, config=config)
        whitening._casts.update(self._casts)
        return whitening

    @property
    def digest(self) -> str:
        """Checksum of the transform. It is saved with weights in whitened coordinates."""
        sha = hashlib.sha256()
        for tensor in (self.mean, self.W, self.W_inv):
            sha.update(tensor.contiguous().numpy().data)
        return sha.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        tensors, fields = self._content()
        save_tensors(path, _KIND, tensors, fields)

    @classmethod
    def load(cls, path: str | Path) -> "Whitening":
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: There is no such file.
            CorruptFileError: The file is truncated, was changed, or is of another kind.
        """
        tensors, fields = load_tensors(path, _KIND)
        with reading_content(path):
            d_in = tensors["mean"].numel()
            whitening = cls(
                mean=tensor_of_shape(tensors, "mean", (d_in,)),
                W=tensor_of_shape(tensors, "matrix", (d_in, d_in)),
                W_inv=tensor_of_shape(tensors, "inverse_matrix", (d_in, d_in)),
                eigenvalues=tensor_of_shape(tensors, "eigenvalues", (d_in,)),
                covariance_eigenvalues=tensor_of_shape(tensors, "covariance_eigenvalues", (d_in,)),
                config=WhiteningConfig.from_dict(fields["config"]),
                shrinkage=number_field(fields, "shrinkage", 0.0, 1.0),
                n_samples=count_field(fields, "n_samples", at_least=2),
            )
            whitening._check_inverse()
        return whitening

    def summary(self) -> dict[str, Any]:
        """The entry on whitening in the metadata of an SAE; can be written as JSON."""
        return {
            "method": "covariance_whitening (arXiv 2511.13981)",
            "config": self.config.to_dict(),
            "n_samples": self.n_samples,
            "shrinkage": self.shrinkage,
            "condition_number_of_W": self.condition_number,
        }

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        # SAELens' own whitening files have mean, matrix and inverse_matrix under these names
        tensors = {
            "mean": self.mean,
            "matrix": self.W,
            "inverse_matrix": self.W_inv,
            "eigenvalues": self.eigenvalues,
            "covariance_eigenvalues": self.covariance_eigenvalues,
        }
        fields = {
            "config": self.config.to_dict(),
            "shrinkage": self.shrinkage,
            "n_samples": self.n_samples,
        }
        return tensors, fields

    def _check_inverse(self) -> None:
        """Check on one vector that the two matrices are inverse to each other; O(d_in^2)."""
        vector = torch.linspace(1, 2, self.d_in, dtype=torch.float64)
        whitened = vector @ self.W
        error = (whitened @ self.W_inv - vector).norm()
        # rounding errors are relative to the norms of the factors, not to the result
        if not error <= 1e-10 * whitened.norm() * self.W_inv.norm():
            raise ValueError("inverse_matrix is not the inverse of matrix")

    def _check_input(self, x: Tensor, method: str) -> None:
        if not x.is_floating_point():
            raise ValueError(f"Whitening.{method}: expected floating point, got {x.dtype}")
        if x.shape[-1:] != self.mean.shape:
            raise ValueError(
                f"Whitening.{method}: expected shape (..., {self.d_in}), got {tuple(x.shape)}"
            )

    def _cast(self, matrix: Literal["W", "W_inv"], x: Tensor) -> tuple[Tensor, ...]:
        """`matrix`, mean and -(mean - rounded mean) @ W, at least float32, on the device of `x`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        key = (matrix, x.device, dtype)
        if key not in self._casts:
            rounded = self.mean.to(dtype)
            rest = -(self.mean - rounded.double()) @ self.W
            self._casts[key] = tuple(
                t.to(dtype).to(x.device) for t in (getattr(self, matrix), rounded, rest)
            )
        return self._casts[key]


def require_whitening(value: object, name: str = "whitening") -> None:
    """Refuse anything but a `Whitening`, for example the statistics from which one is derived.

    Examples:
        >>> require_whitening(ActivationStatistics(2))
        Traceback (most recent call last):
        ...
        TypeError: whitening must be a sae_whiten.Whitening, got ActivationStatistics: derive one...

    Raises:
        TypeError: `value` is not a `Whitening`.
    """
    if not isinstance(value, Whitening):
        raise TypeError(
            f"{name} must be a sae_whiten.Whitening, got {type(value).__name__}: derive one with "
            "Whitening.from_statistics(statistics)"
        )


def _without_information(
    stats: ActivationStatistics, eigenvalues: Float64[Tensor, "d"], basis: Float64[Tensor, "d d"]
) -> Bool[Tensor, "d"]:
    """Directions whose variance is no larger than rounding errors can explain.

    Two kinds of rounding count. The first is that of the activations. Rounding x_i once adds a
    variance of at most (resolution x_i)^2 / 12. A model rounds several times, here assumed to be
    twelve. The second is that of the eigenvalues, as in the usual definition of numerical rank.
    """
    mean_square = stats.covariance.diagonal() + stats.mean.square()
    of_activations = stats.resolution**2 * (mean_square @ basis.square())
    return eigenvalues <= of_activations + _eigenvalue_rounding(eigenvalues)


def _eigenvalue_rounding(eigenvalues: Float64[Tensor, "d"]) -> Float64[Tensor, ""]:
    """Rounding error of eigenvalues in ascending order, as in the definition of numerical rank."""
    return len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues[-1]


def _shrinkage(config: WhiteningConfig, eigenvalues: Tensor, n: int, d: int) -> float:
    few = n < _FEW_SAMPLES_PER_DIMENSION * d
    automatic = few and config.shrinkage is None and config.eps_mode == "relative"
    if config.shrinkage == "oas" or automatic:
        # the formula takes the covariance with divisor n, but ours has divisor n - 1
        intensity = oas_shrinkage(eigenvalues * ((n - 1) / n), n)
    else:
        intensity = float(config.shrinkage or 0.0)
    if few:
        logger.warning(
            "whitening estimated from %d activations of %d dimensions: too few, the small "
            "eigenvalues of the covariance are unreliable%s. %d activations (100 per dimension) "
            "would bring the error on held-out variance to about 1%%: set n_samples.",
            n,
            d,
            f"; shrunk by {intensity:.3g} (OAS)" if automatic else "",
            100 * d,
        )
    return intensity
