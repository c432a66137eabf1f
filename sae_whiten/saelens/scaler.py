"""The activation scaler that SAELens' trainers and evaluators hold."""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.constants import ACTIVATION_WHITENING_FILENAME
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor
from tqdm.auto import tqdm

from sae_whiten._files import CorruptFileError, atomic_path
from sae_whiten.config import WhiteningConfig
from sae_whiten.split_half import SplitHalfStatistics, samples_for_inflation
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.whitening import Whitening

__all__ = ["CovarianceWhiteningScaler"]

logger = logging.getLogger(__name__)

# of samples at which the inflation is looked at first, and at which the estimation gives up
_FIRST_LOOK_PER_DIMENSION, _LIMIT_PER_DIMENSION = 20, 1000
MAX_EMPTY_BATCHES = 100  # in a row; more is a source that has nothing to give
_CONFIG_KEY = "whitening_config"


class CovarianceWhiteningScaler(ActivationScaler):
    """Whitens activations on their way into an SAE and dewhitens what comes out.

    Args:
        config: How to whiten.

    Attributes:
        config: How to whiten.
        whitening: The transform, once it is estimated or loaded. Setting it beforehand skips the
            estimation.
        statistics: The statistics that `whitening` was derived from, if this scaler estimated them.
    """

    whitening: Whitening | None

    def __init__(self, config: WhiteningConfig | None = None) -> None:
        super().__init__()
        self.config = config or WhiteningConfig()
        self.statistics: ActivationStatistics | None = None

    def scale(self, acts: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Whiten; the identity before there is a whitening.

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
    ) -> None:
        """Estimate the statistics from the first batches of `data_provider` and set `whitening`.

        Does nothing if there is a whitening already: weights that were trained in one basis must
        not see another.

        Args:
            d_in: Width of the activations.
            data_provider: Yields activations, shape (n, d_in), (batch, seq, d_in) or
                (n, n_heads, d_head); read until there are `config.n_samples` of them, or enough
                for `config.tolerance`.
            n_batches_for_norm_estimate: Read at most this many batches.

        Raises:
            ValueError: The provider ended too early, a shape does not fit, or an activation is not
                finite and `config.on_nonfinite` is "raise". Nothing is set then.
        """
        if self.whitening is not None:
            return
        halves = SplitHalfStatistics(d_in, on_nonfinite=self.config.on_nonfinite)
        limit = _LIMIT_PER_DIMENSION * d_in
        wanted = limit if self.config.n_samples is None else self.config.n_samples
        n_batches = n_empty = 0
        next_look = _FIRST_LOOK_PER_DIMENSION * d_in
        inflation: float | None = None
        with tqdm(desc="Estimating whitening", unit=" tokens", leave=False) as bar:
            while halves.n_samples < wanted and n_batches != n_batches_for_norm_estimate:
                try:
                    batch = next(data_provider)
                except StopIteration:
                    inflation = halves.inflation()
                    if self.config.n_samples is None and inflation <= self.config.tolerance:
                        break
                    raise ValueError(self._too_few(halves, n_batches)) from None
                before = halves.n_samples
                halves.update(flatten_heads(batch, d_in))
                n_batches += 1
                n_empty = n_empty + 1 if halves.n_samples == before else 0
                if n_empty == MAX_EMPTY_BATCHES:
                    raise ValueError(
                        f"{n_empty} batches in a row held no activations to estimate the whitening "
                        f"from ({halves.n_skipped} were skipped as not finite)"
                    )
                bar.update(halves.n_samples - bar.n)
                if self.config.n_samples is None and halves.n_samples >= next_look:
                    inflation = halves.inflation()
                    bar.set_postfix_str(
                        f"held-out excess {inflation:.1%}, wanted {self.config.tolerance:.1%}"
                    )
                    if inflation <= self.config.tolerance:
                        break
                    next_look = 1.2 * halves.n_samples
        self._warn_if_too_few(halves, inflation, n_batches)
        statistics = halves.merged()
        excess = halves.inflation() if inflation is None else inflation
        self.whitening = Whitening.from_statistics(statistics, self.config)
        self.statistics = statistics
        statistics.provenance["inflation"] = excess if math.isfinite(excess) else None
        logger.info(
            "whitening estimated from %d activations (%.0f per dimension)",
            statistics.n_samples,
            statistics.n_samples / d_in,
        )

    def _too_few(self, halves: SplitHalfStatistics, n_batches: int) -> str:
        needs = str(self.config.n_samples)
        if self.config.n_samples is None:
            inflation, about = halves.inflation(), 100 * halves.d_in
            if math.isfinite(inflation):
                about = samples_for_inflation(inflation, halves.n_samples, self.config.tolerance)
            needs = f"about {about}"
        return (
            f"the data provider ended after {halves.n_samples} activations in {n_batches} batches; "
            f"estimating the whitening needs {needs}. Provide more data, or set "
            "WhiteningConfig(n_samples=...) to what there is."
        )

    def _warn_if_too_few(
        self, halves: SplitHalfStatistics, inflation: float | None, n_batches: int
    ) -> None:
        n, wanted, tolerance = halves.n_samples, self.config.n_samples, self.config.tolerance
        if wanted is not None and n < wanted:
            logger.warning(
                "whitening estimated from %d activations instead of %d: "
                "n_batches_for_norm_estimate=%d ended it",
                n,
                wanted,
                n_batches,
            )
        elif wanted is None and (inflation is None or inflation > tolerance):
            inflation = halves.inflation()
            if inflation > tolerance:
                about = "many more"
                if math.isfinite(inflation):
                    about = f"about {samples_for_inflation(inflation, n, tolerance)}"
                logger.warning(
                    "whitening estimated from %d activations: held-out activations have %.1f%% too "
                    "much variance under it, more than the tolerance of %.1f%%; %s would do",
                    n,
                    100 * inflation,
                    100 * tolerance,
                    about,
                )
        if halves.n_skipped:
            logger.warning(
                "%d activations with a NaN or an infinity were left out", halves.n_skipped
            )

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
        with atomic_path(file_path) as partial:
            partial.write_text(json.dumps(content))

    def load(self, file_path: str | Path) -> None:
        """Read what `save` wrote; nothing is changed if that fails.

        Raises:
            FileNotFoundError: The json file, or the whitening that it speaks of, is missing.
            CorruptFileError: One of them is damaged, or the json file is not of this class.
        """
        path = Path(file_path)
        try:
            content = json.loads(path.read_text())
            config = WhiteningConfig.from_dict(content[_CONFIG_KEY])
            has_whitening = bool(content["has_whitening"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(
                f"{path} is not the file of a CovarianceWhiteningScaler ({error!r})"
            ) from error
        # never estimated anew when missing: the weights beside it belong to that very basis
        whitening = Whitening.load(_tensors_path(path)) if has_whitening else None
        self.config, self.statistics = config, None
        self.whitening = whitening  # pyright: ignore[reportIncompatibleVariableOverride]
        self.scaling_factor = content.get("scaling_factor")


def flatten_heads(acts: Tensor, d_in: int) -> Tensor:
    """(..., n_heads, d_head) as (..., d_in); (..., d_in) as it is.

    Raises:
        ValueError: The shape is neither.
    """
    if acts.ndim >= 1 and acts.shape[-1] == d_in:
        return acts
    if acts.ndim >= 3 and acts.shape[-1] * acts.shape[-2] == d_in:
        return acts.flatten(-2, -1)
    raise ValueError(
        f"activations of shape {tuple(acts.shape)} do not fit d_in={d_in}: expected (..., {d_in}), "
        f"or (..., n_heads, d_head) with n_heads * d_head = {d_in}"
    )


def _tensors_path(file_path: str | Path) -> Path:
    return Path(file_path).with_name(ACTIVATION_WHITENING_FILENAME)
