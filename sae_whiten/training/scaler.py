"""The activation scaler that SAELens' trainers and evaluators hold."""

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import ACTIVATION_WHITENING_FILENAME
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from sae_whiten._files import reading_content, write_json
from sae_whiten.config import WhiteningConfig
from sae_whiten.estimation.stopping import Requirement, estimate_statistics, flatten_heads
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.whitening import Whitening, require_whitening

__all__ = ["CovarianceWhiteningScaler", "max_batches"]

_CONFIG_KEY = "whitening_config"
_SCALES_NOTHING = (
    "a CovarianceWhiteningScaler has no scaling factor, because whitening sets the scale: call "
    "estimate_whitening, or use SAELens' ActivationScaler"
)


class CovarianceWhiteningScaler(ActivationScaler):
    """Whitens the inputs of an SAE and dewhitens its outputs.

    Examples:
        >>> x = torch.randn(1000, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 5
        >>> scaler = CovarianceWhiteningScaler()
        >>> scaler.estimate_whitening(4, iter(x.split(100)))
        >>> torch.allclose(scaler.unscale(scaler.scale(x)), x, atol=1e-4)
        True

    Args:
        config: How to whiten.

    Attributes:
        config: How to whiten.
        whitening: The transform, once it is estimated or loaded. Setting it first skips the
            estimation; a trainer refuses one that was not derived as `config` says.
        statistics: The statistics that `whitening` was derived from, if this scaler estimated them.
    """

    whitening: Whitening | None

    def __init__(self, config: WhiteningConfig | None = None) -> None:
        super().__init__()
        self.config = config or WhiteningConfig()
        self.statistics: ActivationStatistics | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scaling_factor" and value is not None:
            raise ValueError(_SCALES_NOTHING)
        if name == "whitening" and value is not None:
            require_whitening(value)
        super().__setattr__(name, value)

    def scale(self, acts: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Whiten. The identity while `whitening` is None.

        Args:
            acts: Shape (..., d_in), or (..., n_heads, d_head) with n_heads * d_head = d_in.

        Returns:
            The shape and dtype of `acts`.

        Raises:
            ValueError: The shape does not fit d_in.
        """
        if self.whitening is None:
            return acts
        flat = flatten_heads(acts, self.whitening.d_in)
        return self.whitening.whiten(flat).reshape(acts.shape)

    def unscale(self, acts: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Dewhiten; shapes and errors as for `scale`."""
        if self.whitening is None:
            return acts
        flat = flatten_heads(acts, self.whitening.d_in)
        return self.whitening.dewhiten(flat).reshape(acts.shape)

    @torch.no_grad()
    def estimate_whitening(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        d_in: int,
        data_provider: Iterator[Tensor],
        n_batches_for_norm_estimate: int | None = None,
        eps: float | None = None,
        *,
        resolution: float = 0.0,
    ) -> None:
        """Estimate the statistics from the first batches of `data_provider` and set `whitening`.

        Does nothing if `whitening` is set: weights that were trained in one basis must not get
        inputs in another.

        Args:
            d_in: Width of the activations.
            data_provider: Yields activations, shape (n, d_in), (batch, seq, d_in) or
                (n, n_heads, d_head); read until there are `config.n_samples` of them, or enough
                for `config.tolerance`.
            n_batches_for_norm_estimate: Read at most this many batches.
            eps: As SAELens' scaler has it; must be that of `config`, if it is given.
            resolution: Machine epsilon of the dtype that the activations were computed in, if that
                is coarser than theirs.

        Raises:
            ValueError: The provider ended too early, a shape does not fit, an activation is not
                finite and `config.on_nonfinite` is "raise", or `eps` is not that of `config`.
                Nothing is changed then.
        """
        if self.whitening is not None:
            return
        if eps is not None and eps != self.config.eps:
            raise ValueError(
                f"eps={eps}: this scaler whitens as its config says, eps={self.config.eps:g} "
                f"({self.config.eps_mode}). Set WhiteningConfig(eps=...); SAELens' eps is that of "
                "eps_mode='absolute'."
            )
        required = replace(
            Requirement.of(d_in, [self.config]), max_batches=n_batches_for_norm_estimate
        )
        (statistics,) = estimate_statistics(
            ({"": batch} for batch in data_provider), {"": required}, resolution
        ).values()
        self.whitening = Whitening.from_statistics(statistics, self.config)
        self.statistics = statistics

    def estimate_scaling_factor(
        self, d_in: int, data_provider: Iterator[Tensor], n_batches_for_norm_estimate: int = 1000
    ) -> None:
        """What SAELens' scaler does for `normalize_activations="expected_average_only_in"`.

        Raises:
            ValueError: Always: this scaler whitens.
        """
        raise ValueError(_SCALES_NOTHING)

    def save(self, file_path: str) -> None:
        """Write the scaler: a json file and, beside it, the whitening as safetensors.

        The tensors carry the names of SAELens' own file, so that a stock `ActivationScaler` loads
        the same transform.

        Raises:
            ValueError: `file_path` does not end with .json.
        """
        if not file_path.endswith(".json"):
            raise ValueError(f"{file_path}: file_path must end with .json")
        if self.whitening is not None:
            self.whitening.save(_tensors_path(file_path))
        content: dict[str, Any] = {
            "scaling_factor": self.scaling_factor,
            "has_whitening": self.whitening is not None,
            _CONFIG_KEY: self.config.to_dict(),
        }
        write_json(file_path, content)

    def load(self, file_path: str | Path) -> None:
        """Read what `save` wrote; nothing is changed if that fails.

        Raises:
            FileNotFoundError: The json file, or the whitening that it refers to, is missing.
            CorruptFileError: One of them is damaged, or the json file is not of this class.
        """
        path = Path(file_path)
        with reading_content(path):
            content = json.loads(path.read_text())
            config = WhiteningConfig.from_dict(content[_CONFIG_KEY])
            has_whitening = content["has_whitening"]
            if not isinstance(has_whitening, bool):
                raise ValueError(f"has_whitening={has_whitening!r}: must be true or false")
            if content["scaling_factor"] is not None:
                raise ValueError(_SCALES_NOTHING)
        # not estimated again if missing: the weights beside it belong to exactly that basis
        whitening = Whitening.load(_tensors_path(path)) if has_whitening else None
        self.config, self.statistics = config, None
        self.whitening = whitening  # pyright: ignore[reportIncompatibleVariableOverride]


def max_batches(cfg: SAETrainerConfig) -> int | None:
    """The limit of batches for an estimation in SAELens' config; None if it is the default.

    The default is for scaling factors, and is not meant to limit statistics.
    """
    (default,) = (f.default for f in fields(cfg) if f.name == "n_batches_for_norm_estimate")
    asked = cfg.n_batches_for_norm_estimate
    return None if asked == default else asked


def _tensors_path(file_path: str | Path) -> Path:
    return Path(file_path).with_name(ACTIVATION_WHITENING_FILENAME)
