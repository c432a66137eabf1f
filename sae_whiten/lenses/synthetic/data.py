"""Activations with known features that are as anisotropic as those of language models.

`sae_lens.synthetic` makes sparse features, correlated and hierarchical in their firing, and sums
their directions; its activations are nearly isotropic and centred. Those of language models are
neither. With f the activations of the features and F their directions, the activations here are

    x = ((f F - mean) A + nuisance + junk) Q + offset

A gives the features' part a covariance whose eigenvalues fall as a power of their rank, as those of
language models do; Q is a random rotation. A is invertible, so the features are still features: the
rows of F A Q.
"""

import itertools
import math
from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Float
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from sae_lens.util import temporary_seed
from torch import Tensor

from sae_whiten.config import WhiteningConfig
from sae_whiten.lenses.synthetic.options import ZIPF_RANGE, SyntheticDataConfig
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.whitening import Whitening

__all__ = ["SyntheticActivations"]

_CHUNK = 1 << 14  # samples drawn at once
_N_CHUNKS_STATISTICS = 1 << 3
_N_CHUNKS_TRAINING = 1 << 6  # distinct ones; then they are repeated, in another order
_ZIPF_EXPONENT = 0.5


class SyntheticActivations:
    """Activations, the features behind them, and their statistics.

    Everything follows from the config: two objects of one config give the same numbers.

    Args:
        config: How the activations are made.
        model: Source of the features, instead of the one that the config describes: a
            `SyntheticModel` of SAELens, or anything with its `sample`, `sample_with_features` and
            `feature_dict`.

    Attributes:
        config: How the activations are made.
        features: Shape (n_features, d_in), float32: what each feature adds to an activation.
        offset: Shape (d_in,), float32: the mean.

    Raises:
        ValueError: The features do not span their dimensions, so that no map gives them the
            covariance that the config asks for.
    """

    def __init__(self, config: SyntheticDataConfig, model: SyntheticModel | None = None) -> None:
        self.config = config
        self._model = _feature_model(config) if model is None else model
        directions = self._model.feature_dict.feature_vectors.detach()
        d, n_junk = directions.shape[1], config.n_junk
        self._pool = torch.empty(_N_CHUNKS_TRAINING * _CHUNK, d + n_junk)
        self._n_drawn = 0
        if config.as_published:
            self.features = directions
            self._signal_map, self._noise_map = torch.eye(d), torch.empty(0, d)
            self._shift = torch.zeros(d)
            with temporary_seed(self._seed(0)):
                self.offset = self._model.sample(_CHUNK).mean(0)
            return
        with temporary_seed(self._seed(0)):
            raw = torch.cat(
                [self._model.sample(_CHUNK) for _ in range(_N_CHUNKS_STATISTICS)]
            ).double()
            values, basis = torch.linalg.eigh(torch.cov(raw.T))
            # A divides by their roots; samples are float32
            n_null = int((values <= d * torch.finfo(torch.float32).eps ** 2 * values[-1]).sum())
            if n_null:
                raise ValueError(
                    f"the {len(directions)} features leave {n_null} of their {d} dimensions "
                    "without variance: at least as many features are needed, spanning all of them"
                )
            rank = torch.arange(1, d + 1, dtype=torch.float64)
            spectrum = rank ** -(math.log(config.condition) / math.log(max(d, 2)))
            share = config.nuisance_share if config.n_nuisance else 0.0
            spectrum = spectrum / spectrum.mean() * (1 - share)
            colour = basis / values.sqrt() @ _rotation(d) * spectrum.sqrt() @ _rotation(d)
            nuisance = torch.randn(config.n_nuisance, d, dtype=torch.float64)
            if config.n_nuisance:
                nuisance *= (share * d / nuisance.square().sum()).sqrt()
            turn = _rotation(d + n_junk)
            self._signal_map = (colour @ turn[:d]).float()
            self._noise_map = torch.cat([nuisance @ turn[:d], turn[d:] * config.junk_variance**0.5])
            self._noise_map = self._noise_map.float()
            total = d + n_junk * config.junk_variance
            offset = torch.randn(d + n_junk)
            self.offset = offset / offset.norm() * config.mean_over_rms * total**0.5
            self._shift = self.offset - (raw.mean(0) @ (colour @ turn[:d])).float()
        self.features = directions @ self._signal_map

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self._shift.numel()

    def held_out(self, n: int) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n n_features"]]:
        """Activations that are not trained on, and the features behind them.

        Returns:
            Both on the CPU, float32; the features are 0 where they do not fire.
        """
        parts = [
            self._sample(min(_CHUNK, n - start), self._seed(2, start))
            for start in range(0, n, _CHUNK)
        ]
        return torch.cat([x for x, _ in parts]), torch.cat([fires for _, fires in parts])

    @cached_property
    def statistics(self) -> ActivationStatistics:
        """Statistics of the first 131072 training activations."""
        statistics = ActivationStatistics(self.d_in)
        for i in range(_N_CHUNKS_STATISTICS):
            statistics.update(self._training_chunk(i))
        return statistics

    @cached_property
    def whitening_matrix(self) -> Float[Tensor, "d_in d_in"]:
        """Matrix of full whitening, in which directions are compared; (d_in, d_in), float64."""
        return Whitening.from_statistics(self.statistics, WhiteningConfig(eps=1e-9)).W

    def batches(self, batch_size: int) -> Iterator[Float[Tensor, "n d_in"]]:
        """An endless stream of training activations, n = batch_size at a time, the same every call.

        2^20 of them are distinct, drawn when needed and kept (256 MiB for 64 dimensions); then they
        are repeated in another order. Those of SynthSAEBench-16k are all distinct.

        Raises:
            ValueError: A batch is larger than 2^14.
        """
        if not 1 <= batch_size <= _CHUNK:
            raise ValueError(f"batch_size={batch_size}: between 1 and {_CHUNK}")
        for i in range(_N_CHUNKS_TRAINING):
            chunk = self._training_chunk(i)
            yield from chunk[: _CHUNK - _CHUNK % batch_size].split(batch_size)
        endless = self.config.benchmark == "synthsaebench"
        for i in itertools.count(_N_CHUNKS_TRAINING) if endless else ():
            chunk, _ = self._sample(_CHUNK, self._seed(1, i))
            yield from chunk[: _CHUNK - _CHUNK % batch_size].split(batch_size)
        generator = torch.Generator().manual_seed(self.config.seed)
        n = len(self._pool) - len(self._pool) % batch_size
        while True:
            for rows in torch.randperm(len(self._pool), generator=generator)[:n].split(batch_size):
                yield self._pool[rows]

    def _training_chunk(self, i: int) -> Float[Tensor, "n d_in"]:
        while self._n_drawn <= i:
            block = slice(self._n_drawn * _CHUNK, (self._n_drawn + 1) * _CHUNK)
            self._pool[block], _ = self._sample(_CHUNK, self._seed(1, self._n_drawn))
            self._n_drawn += 1
        return self._pool[i * _CHUNK : (i + 1) * _CHUNK]

    @torch.no_grad()
    def _sample(
        self, n: int, seed: int
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n n_features"]]:
        with temporary_seed(seed):
            signal, fires = self._model.sample_with_features(n)
            noise = torch.randn(n, len(self._noise_map))
            return signal @ self._signal_map + noise @ self._noise_map + self._shift, fires

    def _seed(self, purpose: int, number: int = 0) -> int:
        # distinct for every config seed, purpose and number
        return (self.config.seed * 3 + purpose << 32) + number


def _benchmark_model(config: SyntheticDataConfig) -> SyntheticModel:
    """SynthSAEBench-16k, as the documentation of SAELens has it, the same for all seeds.

    The small version has a sixteenth of its features and trees of features, and a sixth of its
    dimensions.
    """
    small = config.benchmark == "synthsaebench-small"
    return SyntheticModel(
        SyntheticModelConfig(
            num_features=1024 if small else 16_384,
            hidden_dim=128 if small else 768,
            firing_probability=ZipfianFiringProbabilityConfig(
                exponent=0.5, max_prob=0.4, min_prob=5e-4
            ),
            hierarchy=HierarchyConfig(
                total_root_nodes=8 if small else 128,
                branching_factor=4,
                max_depth=3,
                mutually_exclusive_portion=1.0,
                mutually_exclusive_min_depth=0,
                compensate_probabilities=True,
                scale_children_by_parent=True,
            ),
            orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
            correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
            mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
            std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
            bias=0.5,
            seed=42,
        )
    )


def _feature_model(config: SyntheticDataConfig) -> SyntheticModel:
    if config.benchmark is not None:
        return _benchmark_model(config)
    ranks = torch.arange(1, config.n_features + 1).double() ** -_ZIPF_EXPONENT
    shape = (ranks - ranks.min()) / (ranks.max() - ranks.min())
    rarest = config.l0 / config.n_features / (1 + (ZIPF_RANGE - 1) * float(shape.mean()))
    n_roots = max(config.n_features // 16, 1)
    return SyntheticModel(
        SyntheticModelConfig(
            num_features=config.n_features,
            hidden_dim=config.d_signal,
            firing_probability=ZipfianFiringProbabilityConfig(
                exponent=_ZIPF_EXPONENT, max_prob=ZIPF_RANGE * rarest, min_prob=rarest
            ),
            # a quarter of the features in families of four, in which children need their parent
            hierarchy=HierarchyConfig(
                total_root_nodes=n_roots,
                branching_factor=3,
                max_depth=1,
                compensate_probabilities=True,
            ),
            correlation=LowRankCorrelationConfig(rank=8, correlation_scale=0.1),
            std_firing_magnitudes=0.3,
            bias=False,
            seed=config.seed,
        )
    )


def _rotation(d: int) -> Float[Tensor, "d d"]:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
