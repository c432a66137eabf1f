"""Streaming mean and covariance of activations, in float64.

Chan, Golub & LeVeque, *Updating Formulae and a Pairwise Algorithm for Computing Sample Variances*
(1979). For n samples, let m be the mean and S = sum (x - m)(x - m)^T the scatter. Two sets combine:

    m = m_a + (n_b / n) delta,   S = S_a + S_b + (n_a n_b / n) delta delta^T,   delta = m_b - m_a.

Every batch is centred by its own mean before the product is taken. So there is no cancellation,
however far the activations lie from the origin.
"""

import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from scipy.linalg.blas import dsyrk  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from sae_whiten import _hub
from sae_whiten._files import (
    count_field,
    load_fields,
    load_tensors,
    number_field,
    reading_content,
    save_tensors,
    tensor_of_shape,
)

__all__ = ["ActivationStatistics", "NonFiniteActivationsError", "finite_rows", "saved_fields"]

_KIND = "activation_statistics"
_CHUNK = 512  # rows; few enough to stay in a CPU's cache between centring and product


class NonFiniteActivationsError(ValueError):
    """A batch of activations holds a NaN or an infinity.

    Examples:
        >>> ActivationStatistics(2).update(torch.tensor([[1.0, float("nan")]]))
        Traceback (most recent call last):
        ...
        sae_whiten.statistics.NonFiniteActivationsError: ...
    """


class ActivationStatistics:
    """Mean and covariance of activations, accumulated batch by batch.

    Memory is O(d_in^2), independent of the number of batches. Batches may be float16, bfloat16,
    float32 or float64, on any device. The sums are float64. They are on the GPU if batches are on
    CUDA, otherwise on the CPU (MPS has no float64).

    Args:
        d_in: Width of the activations.
        on_nonfinite: "raise": a batch that holds a NaN or an infinity raises an error, and the
            statistics stay as they were. "skip": the activations concerned are left out, and
            counted in `n_skipped`.

    Attributes:
        d_in: Width of the activations.
        n_samples: Activations seen so far.
        n_skipped: Activations left out because they were not finite.
        n_batches: Batches seen so far.
        resolution: Machine epsilon of the coarsest dtype among the batches. Variance smaller than
            that of rounding errors is not information.
        provenance: Where the activations came from (model, hook, dataset...). It is saved in the
            file, without access tokens and passwords. Values must be serialisable as JSON.

    Examples:
        >>> statistics = ActivationStatistics(2)
        >>> statistics.update(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        >>> statistics.mean.tolist(), statistics.covariance.tolist()
        ([2.0, 2.0], [[2.0, 4.0], [4.0, 8.0]])
    """

    def __init__(self, d_in: int, on_nonfinite: Literal["raise", "skip"] = "raise") -> None:
        if d_in < 1:
            raise ValueError(f"d_in={d_in}: must be at least 1")
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite={on_nonfinite!r}: must be 'raise' or 'skip'")
        self.d_in = d_in
        self.on_nonfinite: Literal["raise", "skip"] = on_nonfinite
        self.n_samples = 0
        self.n_skipped = 0
        self.n_batches = 0
        self.resolution = 0.0
        self.provenance: dict[str, Any] = {}
        self._mean = torch.zeros(d_in, dtype=torch.float64)
        # only the upper triangle is updated, which halves the cost of a rank-n update
        self._scatter = torch.zeros(d_in, d_in, dtype=torch.float64)

    def __repr__(self) -> str:
        return f"ActivationStatistics(d_in={self.d_in}, n_samples={self.n_samples})"

    @torch.no_grad()
    def update(self, batch: Float[Tensor, "*samples d"], number: int | None = None) -> None:
        """Add a batch of activations.

        Args:
            batch: Shape (n, d_in) or (batch, seq, d_in), any floating dtype, any device.
            number: Number of the batch in error messages; by default, how many came before it.

        Raises:
            ValueError: The last dimension is not `d_in`, there are not two or three dimensions, or
                the dtype is not floating.
            NonFiniteActivationsError: A value is NaN or infinite and `on_nonfinite` is "raise".
        """
        if not batch.is_floating_point():
            raise ValueError(f"activations must be floating point, got {batch.dtype}")
        if batch.ndim not in (2, 3) or batch.shape[-1] != self.d_in:
            raise ValueError(
                f"activations of shape {tuple(batch.shape)} given to statistics of width "
                f"d_in={self.d_in}: expected (n, {self.d_in}) or (batch, seq, {self.d_in})"
            )
        device = batch.device if batch.device.type == "cuda" else torch.device("cpu")
        rows = batch.detach().reshape(-1, self.d_in).to(device)
        name = f"batch {self.n_batches if number is None else number}"
        rows, n_bad = finite_rows(rows, self.on_nonfinite, name)
        self.n_skipped += n_bad
        self.n_batches += 1
        if len(rows) == 0:
            return
        self.resolution = max(self.resolution, torch.finfo(batch.dtype).eps)
        self._to(device)
        size = min(len(rows), _CHUNK if device.type == "cpu" else len(rows))
        centred = torch.empty(size + 1, self.d_in, dtype=torch.float64, device=device)
        for chunk in rows.split(size):
            self._add(chunk, centred[: len(chunk) + 1])

    def _add(self, rows: Tensor, centred: Tensor) -> None:
        """Add rows. `centred` is float64 memory for these rows and one more."""
        n = len(rows)
        values = centred[:n].copy_(rows)
        mean = values.mean(0)
        # one more row of the product gives the term (n_a n_b / n) delta delta^T
        delta = mean - self._mean
        total = self.n_samples + n
        values -= mean
        torch.mul(delta, math.sqrt(self.n_samples * n / total), out=centred[n])
        _add_gram(self._scatter, centred)
        self._mean += delta * (n / total)
        self.n_samples = total

    def merge(self, other: "ActivationStatistics") -> "ActivationStatistics":
        """Exact statistics of the activations of both. Neither object is changed.

        Entries of `provenance` that are equal in both are kept.

        Raises:
            ValueError: The widths differ.
        """
        if other.d_in != self.d_in:
            raise ValueError(f"cannot merge statistics of widths {self.d_in} and {other.d_in}")
        merged = ActivationStatistics(self.d_in, self.on_nonfinite)
        merged.n_samples = self.n_samples + other.n_samples
        merged.n_skipped = self.n_skipped + other.n_skipped
        merged.n_batches = self.n_batches + other.n_batches
        merged.resolution = max(self.resolution, other.resolution)
        merged.provenance = {
            key: value
            for key, value in self.provenance.items()
            if key in other.provenance and other.provenance[key] == value
        }
        if merged.n_samples == 0:
            return merged
        share = other.n_samples / merged.n_samples
        delta = other._mean.to(self._mean.device) - self._mean
        merged._mean = self._mean + delta * share
        merged._scatter = (
            self._scatter
            + other._scatter.to(self._scatter.device)
            + torch.outer(delta, delta) * (self.n_samples * share)
        )
        return merged

    @property
    def mean(self) -> Float[Tensor, "d_in"]:
        """Mean, shape (d_in,), float64, on the CPU.

        Raises:
            ValueError: There is no sample.
        """
        if self.n_samples < 1:
            raise ValueError(f"the mean of no activations{self._skipped()}")
        return self._mean.to("cpu", copy=True)

    @property
    def covariance(self) -> Float[Tensor, "d_in d_in"]:
        """Unbiased covariance (divisor n - 1), (d_in, d_in), float64, symmetric, on the CPU.

        Raises:
            ValueError: There are fewer than two samples.
        """
        if self.n_samples < 2:
            raise ValueError(
                f"a covariance needs at least 2 activations, got {self.n_samples}{self._skipped()}"
            )
        # divided on the CPU, because a GPU rounds differently
        upper = self._scatter.cpu().triu() / (self.n_samples - 1)
        return upper + upper.triu(1).T

    @property
    def digest(self) -> str:
        """A checksum of the numbers: equal if two files hold the same statistics."""
        sha = hashlib.sha256(str(self.n_samples).encode())
        for tensor in (self._mean, self._scatter.triu()):
            sha.update(tensor.cpu().contiguous().numpy().data)
        return sha.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically, with `provenance` in its metadata."""
        tensors, fields = self.to_tensors()
        tensors["scatter"] = tensors["scatter"].triu()
        save_tensors(path, _KIND, tensors, fields)

    @classmethod
    def load(cls, path: str | Path) -> "ActivationStatistics":
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: There is no such file.
            CorruptFileError: The file is truncated, was changed, or is of another kind, or its
                content cannot be the mean and covariance of activations.
        """
        tensors, fields = load_tensors(path, _KIND)
        with reading_content(path):
            return cls.from_tensors(tensors, fields)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that is saved: float64 tensors on the CPU, and fields that JSON can hold.

        Tensors that are on the CPU already are not copied. Only the upper triangle of "scatter" is
        valid.
        """
        return (
            {"mean": self._mean.cpu(), "scatter": self._scatter.cpu()},
            {
                "d_in": self.d_in,
                "n_samples": self.n_samples,
                "n_skipped": self.n_skipped,
                "n_batches": self.n_batches,
                "resolution": self.resolution,
                "provenance": json.loads(json.dumps(self.provenance)),
            },
        )

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], fields: dict[str, Any]
    ) -> "ActivationStatistics":
        """Inverse of `to_tensors`. The tensors are used as they are, not copied.

        Raises:
            KeyError: A field or a tensor is missing.
            ValueError: A field or a tensor is impossible for statistics of activations: a wrong
                width, a NaN, a negative count or variance, a correlation beyond 1.
        """
        d_in = count_field(fields, "d_in", at_least=1)
        # checked before anything of that width is allocated
        mean = tensor_of_shape(tensors, "mean", (d_in,))
        scatter = tensor_of_shape(tensors, "scatter", (d_in, d_in))
        statistics = cls(d_in)
        statistics._mean, statistics._scatter = mean, scatter
        statistics.n_samples = count_field(fields, "n_samples")
        statistics.n_skipped = count_field(fields, "n_skipped")
        statistics.n_batches = count_field(fields, "n_batches")
        statistics.resolution = number_field(fields, "resolution", 0.0, 1.0)
        if not isinstance(fields["provenance"], dict):
            raise ValueError("provenance is not a dictionary")
        statistics.provenance = dict(fields["provenance"])
        _check_scatter(scatter, statistics.n_samples)
        return statistics

    @classmethod
    def from_hub(
        cls, repo_id: str, hook_name: str | None = None, revision: str | None = None
    ) -> "ActivationStatistics":
        """Read statistics from a repo of the Hugging Face hub. Downloaded files are cached.

        Args:
            repo_id: "user/name", a repo with one file for each hook.
            hook_name: Name of the hook; None if the repo holds only one.
            revision: Branch, tag or commit; None: the main branch.

        Raises:
            FileNotFoundError: There is no such repo or revision, or it does not hold the hook.
            ConnectionError: The hub cannot be reached, and the file is not in the cache.
            ValueError: `hook_name` is None, and the repo does not hold exactly one hook.
            CorruptFileError: The file is truncated, was changed, or is of another kind.
        """
        return cls.load(_hub.download(repo_id, hook_name, revision))

    def push_to_hub(self, repo_id: str, private: bool | None = None) -> str:
        """Upload to the Hugging Face hub, as the file of the hook that `provenance` names.

        A missing repo is created, and a missing README.md is written.

        Args:
            repo_id: "user/name".
            private: Whether a new repo is private; None: the default of the account.

        Returns:
            Address of the commit.

        Raises:
            ValueError: `provenance["hook_name"]` is missing, or `private` is True and the repo
                exists and is public.
            OSError: The hub cannot be reached, or refuses: there is no token, or it has no write
                permission.
        """
        hook_name = self.provenance.get("hook_name")
        if not isinstance(hook_name, str):
            raise ValueError("these statistics do not name their hook: set provenance['hook_name']")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "statistics.safetensors"
            self.save(file)
            return _hub.upload({hook_name: (file, type(self).load(file))}, repo_id, private)

    def _to(self, device: torch.device) -> None:
        if self._mean.device != device:
            self._mean, self._scatter = self._mean.to(device), self._scatter.to(device)

    def _skipped(self) -> str:
        return f" ({self.n_skipped} were skipped as not finite)" if self.n_skipped else ""


def saved_fields(path: str | Path) -> dict[str, Any]:
    """The fields of a file of statistics, such as n_samples and provenance; its sums are not read.

    Raises:
        CorruptFileError: It is not a file that `ActivationStatistics.save` wrote.
    """
    return load_fields(path, _KIND)


def finite_rows(
    acts: Float[Tensor, "*samples d"], on_nonfinite: Literal["raise", "skip"], name: str
) -> tuple[Tensor, int]:
    """The finite activations, and the number of those with a NaN or an infinity.

    Args:
        acts: Shape (..., d).
        on_nonfinite: What happens if there are any: "raise" an error, or "skip" them.
        name: Name of `acts` in the error.

    Raises:
        NonFiniteActivationsError: There is one and `on_nonfinite` is "raise".
    """
    # a finite sum means that all values are finite; an overflow is cleared by the full test below
    if torch.isfinite(acts.sum(dtype=torch.promote_types(acts.dtype, torch.float32))):
        return acts, 0
    finite = torch.isfinite(acts).all(dim=-1)
    n_bad = int((~finite).sum())
    if n_bad == 0:
        return acts, 0
    if on_nonfinite == "raise":
        first = (~finite).nonzero()[0].tolist()
        raise NonFiniteActivationsError(
            f"{name} of shape {tuple(acts.shape)} holds {n_bad} activations with a NaN or an "
            f"infinity, the first in row {', '.join(map(str, first))}; it was not used. Find out "
            "where they come from"
            + (", or set on_nonfinite='skip' to leave them out." if n_bad < finite.numel() else ".")
        )
    return acts[finite], n_bad


def _check_scatter(scatter: Tensor, n_samples: int) -> None:
    """Refuse a matrix that cannot be the scatter of `n_samples` activations; O(d_in^2)."""
    if n_samples < 2 and scatter.triu().any():
        raise ValueError(f"{n_samples} activations with a variance")
    deviations = scatter.diagonal().clamp(min=0).sqrt()
    if not (scatter.diagonal() >= 0).all():
        raise ValueError("a variance is negative")
    # Cauchy-Schwarz, with room for rounding
    largest = torch.outer(deviations, deviations)
    if not (scatter.triu().abs() <= (1 + 1e-6) * largest).all():
        raise ValueError("two dimensions have a correlation beyond 1")


def _add_gram(upper: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to the upper triangle of `upper`, in place; both float64, on one device."""
    if upper.device.type != "cpu":
        upper.addmm_(rows.T, rows)
        return
    # The transpose of a C-ordered matrix is Fortran-ordered, without a copy, and its lower triangle
    # is the upper one here. dsyrk does half the operations of a general product.
    result = dsyrk(1.0, rows.numpy().T, beta=1.0, c=upper.numpy().T, lower=1, overwrite_c=1)
    if result.ctypes.data != upper.data_ptr():
        # scipy made a copy instead of updating in place
        upper.copy_(torch.from_numpy(result.T))
