"""The user's choice of how to whiten. The first sentence below a field is the help of its flag."""

import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

__all__ = ["TOLERANCE_RANGE", "WhiteningConfig"]

TOLERANCE_RANGE = (1e-6, 1.0)
"""The excess variance at which an estimation may end."""


@dataclass(frozen=True)
class WhiteningConfig:
    """How activations are whitened and in which space the reconstruction loss is taken.

    The defaults follow Saraswatula & Klindt, arXiv 2511.13981: PCA whitening, squared error in the
    space of the original activations. `loss_space="whitened", eps_mode="absolute"` is what
    sae-lens >= 6.52 does under the name `covariance_whitening`.

    No setting was best in every comparison (docs/compromise.md, docs/comparisons.md). Nearest to it
    comes `strength=0.5, loss_space="whitened"`: on synthetic activations of condition number 1e2,
    1e4 and 1e6 its F1 of known features was .73, .71 and .55 (default: .69, .25 and .09), and it
    explained as much variance as the default or more. In two of three hooks of a small causal
    transformer it was as good as the default too; in its last layer it kept cross-entropy less
    well, and so did the default against no whitening. ZCA found fewer features than PCA. eps up to
    1e-2 and shrinkage up to 0.01 changed little; larger values did harm. Whether eps below 1e-3 is
    better is open (one seed).

    Examples:
        >>> config = WhiteningConfig(kind="zca", loss_space="whitened")
        >>> config.strength
        1.0
        >>> WhiteningConfig(strength=2)
        Traceback (most recent call last):
        ...
        ValueError: WhiteningConfig.strength=2: must be a number in [0, 1]
    """

    kind: Literal["pca", "zca"] = "pca"
    """pca or zca. pca rotates into the eigenbasis of the covariance and rescales; zca rotates back,
    so that whitened activations stay as close as possible to the original ones."""

    eps: float = 1e-3
    """Added to the eigenvalues of the covariance before they are inverted, see eps_mode."""

    eps_mode: Literal["relative", "absolute"] = "relative"
    """Unit of eps: the mean eigenvalue, or none (the sae-lens built-in). With "relative" the result
    does not depend on the unit of the activations (with strength 1; see there). Directions in which
    there is only rounding error get the gain of an average direction, not the largest of all.
    "absolute" adds eps itself and leaves the signs of the eigenvectors as the eigensolver returns
    them, like the built-in."""

    shrinkage: float | Literal["oas"] | None = None
    """Intensity in [0, 1], or oas; none: oas below 10 samples per dimension, else none. The
    covariance is shrunk toward its mean eigenvalue. "oas" is of Chen et al. 2010, Shrinkage
    Algorithms for MMSE Covariance Estimation. None uses it only with eps_mode="relative", and
    warns."""

    strength: float = 1.0
    """1 whitens, 0 only centres, between: partial whitening. The exponent a: eigenvalues l of the
    covariance become l^(1 - a). 0 rotates too, for pca. Below 1, whitened activations keep a part
    of the unit: sparsity coefficients have to be found at each hook anew."""

    loss_space: Literal["original", "whitened"] = "original"
    """Where reconstruction errors are taken: original (the paper) or whitened (the built-in). This
    holds for every term of the loss. Both are scaled such that predicting the mean costs d_in."""

    sparsity_norms: Literal["whitened", "original"] = "whitened"
    """Where decoder norms are taken that topk ranks and l1 charges by. Those are the ranking of the
    topk family (rescale_acts_by_decoder_norm) and the penalty of standard, gated and jumprelu (tanh
    mode). Other architectures refuse "original". "whitened" charges directions of large and of
    small variance alike; "original" in proportion to what a latent adds to the original
    activations, scaled such that an average direction weighs the same. With loss_space and
    sparsity_norms both "original", the objective is that of training without whitening. Whitening
    then changes only the mean, the initial weights and the coordinates of the optimizer's steps."""

    n_samples: int | None = None
    """Activations to estimate the statistics from, rounded up to whole batches; none: as many as
    tolerance needs."""

    tolerance: float = 0.02
    """Excess variance of held-out activations at which the estimation ends. It is the relative
    excess under the estimated whitening, measured between two halves of the samples. 2% takes 51
    activations per dimension of Gaussian data (d / (n - d)). Tokens of one text resemble each
    other: on all-MiniLM-L6-v2 with prose it took about 125, and held-out text then showed 2%
    too."""

    statistics: str | None = None
    """File, folder (sae-whiten fit) or hub repo (user/name, user/name@revision) of statistics to
    take instead of estimating any. A file is of `ActivationStatistics`, and in a folder or a repo
    files are named after their hooks. A path that exists is taken before the hub. n_samples is
    refused beside it, and tolerance has no effect."""

    allow_other_statistics: bool = False
    """Take statistics of another model, hook, dataset... without complaint."""

    on_nonfinite: Literal["raise", "skip"] = "raise"
    """Activations with NaN or infinity: raise an error, or skip and count them. The error names the
    batch."""

    temporary_folder: str | None = field(default=None, compare=False)
    """Where activations wait that the statistics are estimated from, until they are trained on. 256
    MiB stay in memory, the rest is in a file of several GB where activations are wide. None: the
    folder of the system for such files (TMPDIR). It is not saved with the config, and two configs
    may differ in it."""

    def __post_init__(self) -> None:
        _choice("kind", self.kind, ("pca", "zca"))
        _choice("eps_mode", self.eps_mode, ("relative", "absolute"))
        _choice("loss_space", self.loss_space, ("original", "whitened"))
        _choice("sparsity_norms", self.sparsity_norms, ("whitened", "original"))
        _choice("on_nonfinite", self.on_nonfinite, ("raise", "skip"))
        _number("eps", self.eps, 0.0, float("inf"))
        _number("strength", self.strength, 0.0, 1.0)
        _number("tolerance", self.tolerance, *TOLERANCE_RANGE)
        for name in ("statistics", "temporary_folder"):
            path = getattr(self, name)
            if path is not None and not isinstance(path, (str, os.PathLike)):
                or_repo = " or the name of a repo on the Hugging Face hub" * (name == "statistics")
                raise ValueError(f"WhiteningConfig.{name}={path!r}: must be a path{or_repo}")
            if path is not None:
                # a path object is not JSON; frozen dataclasses are set through object
                object.__setattr__(self, name, os.fspath(path))
        if not isinstance(self.allow_other_statistics, bool):
            raise ValueError(
                f"WhiteningConfig.allow_other_statistics={self.allow_other_statistics!r}: "
                "must be True or False"
            )
        if isinstance(self.shrinkage, str):
            _choice("shrinkage", self.shrinkage, ("oas",))
        elif self.shrinkage is not None:
            _number("shrinkage", self.shrinkage, 0.0, 1.0)
        if self.n_samples is not None and (
            not isinstance(self.n_samples, int)
            or isinstance(self.n_samples, bool)
            or self.n_samples < 2
        ):
            raise ValueError(
                f"WhiteningConfig.n_samples={self.n_samples!r}: an integer of at least 2, or None"
            )
        if self.statistics is not None and self.n_samples is not None:
            raise ValueError(
                f"WhiteningConfig.n_samples={self.n_samples}: the statistics in {self.statistics} "
                "are taken with all their samples; leave out n_samples or statistics"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields, as values that JSON can hold."""
        values = asdict(self)
        del values["temporary_folder"]  # only meaningful on this machine
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "WhiteningConfig":
        """Inverse of `to_dict`.

        Raises:
            ValueError: A key is not a field, or a value is not valid.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"WhiteningConfig has no field {', '.join(sorted(unknown))}")
        if values.get("statistics") is not None:
            # in files of earlier versions, where it had no effect
            values = {**values, "n_samples": None}
        return cls(**values)


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        options = " or ".join(repr(option) for option in allowed)
        raise ValueError(f"WhiteningConfig.{name}={value!r}: must be {options}")


def _number(name: str, value: Any, low: float, high: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # `not (low <= value)` also refuses NaN
    if not is_number or not (low <= value <= high) or value == float("inf"):
        interval = f"in [{low:g}, {high:g}]" if high < float("inf") else f"finite and >= {low:g}"
        raise ValueError(f"WhiteningConfig.{name}={value!r}: must be a number {interval}")
