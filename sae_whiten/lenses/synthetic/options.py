"""The options of the synthetic comparison: fields are flags of `sae-whiten synthetic` too."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from sae_whiten._checks import FieldError, require_number
from sae_whiten.comparison.conditions import CONDITIONS, Condition
from sae_whiten.config import WhiteningConfig

__all__ = [
    "ARCHITECTURES",
    "CHANCE",
    "COEFFICIENTS",
    "ZIPF_RANGE",
    "SyntheticDataConfig",
    "SyntheticRun",
    "benchmark_run",
    "parse_condition",
]

ARCHITECTURES = ("topk", "batchtopk", "standard", "jumprelu")
CHANCE = "chance"
"""The condition of an SAE that is folded without having been trained."""

COEFFICIENTS = {"standard": ("l1_coefficient", 10.0), "jumprelu": ("l0_coefficient", 1.0)}
"""Architectures whose sparsity is set by a coefficient: its name, and the first value to try."""

ZIPF_RANGE = 8.0
"""Firing frequency of the most frequent feature over that of the rarest."""


@dataclass(frozen=True)
class SyntheticDataConfig:
    """How synthetic activations are made. Variances are in units of the average direction's.

    Raises:
        ValueError: A value cannot work.
    """

    d_signal: int = 64
    """Dimensions that the features span."""

    n_features: int = 256
    """Number of features."""

    l0: float = 6.0
    """Mean number of features that fire at once."""

    condition: float = 1e4
    """Condition number of the covariance of the features' part; 1 is isotropic."""

    mean_over_rms: float = 2.0
    """Norm of the mean over the root of the total variance."""

    n_junk: int = 0
    """Dimensions of Gaussian noise beside those of the features."""

    junk_variance: float = 1e-4
    """Variance of each dimension of noise, in units of the average direction's."""

    n_nuisance: int = 0
    """Rank of dense Gaussian activity within the features' dimensions. By default it has half of
    the variance there."""

    nuisance_share: float = 0.5
    """Share of the variance in the features' dimensions that is dense activity."""

    benchmark: Literal["synthsaebench", "synthsaebench-small"] | None = None
    """Features of SynthSAEBench-16k (arXiv 2602.14687) instead of those above: 16384 in 768
    dimensions; or a small version of it, 1024 in 128."""

    as_published: bool = False
    """For a benchmark: use its activations as published, nearly isotropic, without noise and dense
    activity; ignore the condition number and the mean."""

    seed: int = 0
    """Seed of features, rotations and samples."""

    def __post_init__(self) -> None:
        if not 0 < self.l0 < self.n_features / ZIPF_RANGE:
            raise ValueError(
                f"l0={self.l0}: between 0 and n_features / {ZIPF_RANGE:g} = "
                f"{self.n_features / ZIPF_RANGE:g}, because the most frequent feature cannot fire "
                "with a probability above 1"
            )
        if self.as_published and self.benchmark is None:
            raise ValueError("as_published needs a benchmark")
        require_number("condition", self.condition, whole=False)
        require_number("n_junk", self.n_junk, least=0)
        require_number("junk_variance", self.junk_variance, least=0, whole=False)
        require_number("n_nuisance", self.n_nuisance, least=0)
        for name in ("n_junk", "n_nuisance"):
            value = getattr(self, name)
            if self.as_published and value:
                raise FieldError(name, value, "a benchmark as published has none of them")
        if self.n_nuisance and not 0 < self.nuisance_share < 1:
            raise ValueError(f"nuisance_share={self.nuisance_share}: a share between 0 and 1")


@dataclass(frozen=True)
class SyntheticRun:
    """One training: an SAE of one architecture under one condition.

    Raises:
        ValueError: There is no such architecture or condition, or a number cannot work.
    """

    architecture: str = "topk"
    """One of `ARCHITECTURES`."""

    condition: str = "original"
    """Name of a condition of `sae-whiten compare`, optionally followed by settings of
    `WhiteningConfig` (`parse_condition`), or "chance" for an SAE folded without training."""

    data: SyntheticDataConfig = field(default_factory=SyntheticDataConfig)
    """The activations to train on; their seed is also that of the initial weights."""

    d_sae: int = 256
    """Number of latents."""

    k: int = 6
    """Latents active at once: exactly, on average (batchtopk), or the target of coefficients."""

    steps: int = 5000
    """Training steps."""

    batch_size: int = 512
    """Activations per step."""

    lr: float = 3e-4
    """Learning rate: constant, and falling to a tenth in the last fifth of the steps."""

    coefficient: float | None = None
    """Coefficient of the sparsity penalty, for architectures that have one."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"no architecture {self.architecture!r}; there are {', '.join(ARCHITECTURES)}"
            )
        parse_condition(self.condition)
        require_number("steps", self.steps, least=0 if self.condition == CHANCE else 1)
        require_number("lr", self.lr, least=0, whole=False)

    @property
    def has_coefficient(self) -> bool:
        """Whether sparsity is set by a coefficient instead of k."""
        return self.architecture in COEFFICIENTS and self.condition != CHANCE

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SyntheticRun":
        """Inverse of `to_dict`.

        Raises:
            ValueError: A key is not a field.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        unknown |= set(values["data"]) - {f.name for f in fields(SyntheticDataConfig)}
        if unknown:
            raise ValueError(f"SyntheticRun has no field {', '.join(sorted(unknown))}")
        return cls(**{**values, "data": SyntheticDataConfig(**values["data"])})


def benchmark_run(*, small: bool = False, anisotropic: bool = False) -> SyntheticRun:
    """A training on SynthSAEBench as published: 4096 latents, k = 25, 200 million activations.

    Unlike there, learning rates decay in the last fifth of the steps.

    Args:
        small: 256 latents and 5000 steps on a version with 1024 features in 128 dimensions, for
            minutes on a CPU.
        anisotropic: On the same features mixed into anisotropic activations with a large mean.
    """
    data = SyntheticDataConfig(
        benchmark="synthsaebench-small" if small else "synthsaebench",
        as_published=not anisotropic,
    )
    if small:
        return SyntheticRun(data=data, d_sae=256, k=6, batch_size=1024)
    steps = 200_000_000 // 1024
    return SyntheticRun(data=data, d_sae=4096, k=25, batch_size=1024, steps=steps)


def parse_condition(text: str) -> Condition:
    """A condition from its name, optionally followed by settings of `WhiteningConfig`.

    >>> parse_condition("whitened:shrinkage=0.1,eps=0.01").whitening.shrinkage
    0.1

    Raises:
        ValueError: There is no such condition or setting, or its value is not valid.
    """
    name, _, settings = text.partition(":")
    if name == CHANCE:
        return Condition("folded without training", WhiteningConfig())
    if name not in CONDITIONS:
        raise ValueError(f"no condition {name!r}; there are {', '.join(CONDITIONS)}")
    condition = CONDITIONS[name]
    if not settings:
        return condition
    if condition.whitening is None:
        raise ValueError(f"{text!r}: {name} does not whiten, and has no settings")
    values = condition.whitening.to_dict()
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: expected {name}:setting=value, got {setting!r}")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return replace(condition, whitening=WhiteningConfig.from_dict(values))
