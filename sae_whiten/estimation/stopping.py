"""Statistics from a stream of activations of one or several hooks, and the rule when to stop."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_whiten.config import WhiteningConfig
from sae_whiten.estimation.split_half import SplitHalfStatistics, samples_for_inflation
from sae_whiten.statistics import ActivationStatistics

__all__ = [
    "MAX_EMPTY_BATCHES",
    "Requirement",
    "StoppingRule",
    "estimate_statistics",
    "excess_so_far",
    "flatten_heads",
    "naming",
    "too_inaccurate",
]

logger = logging.getLogger(__name__)

# samples at which the inflation is first measured, and at which the estimation gives up
FIRST_LOOK_PER_DIMENSION, LIMIT_PER_DIMENSION = 20, 1000
MAX_EMPTY_BATCHES = 100  # in a row, before the estimation fails


@dataclass(frozen=True)
class Requirement:
    """When the statistics of a hook are good enough.

    Attributes:
        d_in: Width of the activations.
        n_samples: Activations needed, or None.
        tolerance: Relative excess variance of held-out activations to reach, or None.
        on_nonfinite: As for `ActivationStatistics`.
        max_batches: Most batches to read, without counting empty ones; a warning follows if they
            are too few. None: no limit.
        max_samples: Activations after which the estimation gives up on `tolerance`; None: 1000 per
            dimension.
    """

    d_in: int
    n_samples: int | None
    tolerance: float | None
    on_nonfinite: Literal["raise", "skip"]
    max_batches: int | None = None
    max_samples: int | None = None

    def __post_init__(self) -> None:
        if self.max_batches is not None and self.max_batches < 1:
            raise ValueError(f"n_batches_for_norm_estimate={self.max_batches}: must be at least 1")

    @property
    def limit(self) -> int:
        """Activations after which the estimation gives up on `tolerance`."""
        return self.max_samples or LIMIT_PER_DIMENSION * self.d_in

    @classmethod
    def of(
        cls, d_in: int, configs: Sequence[WhiteningConfig], max_batches: int | None = None
    ) -> "Requirement":
        """The requirement that satisfies every one of `configs`.

        Args:
            d_in: Width of the activations.
            configs: At least one.
            max_batches: Limits the batches for `tolerance`; does not limit `n_samples`.
        """
        fixed = [c.n_samples for c in configs if c.n_samples is not None]
        adaptive = [c.tolerance for c in configs if c.n_samples is None]
        skip = all(c.on_nonfinite == "skip" for c in configs)
        return cls(
            d_in,
            max(fixed, default=None),
            min(adaptive, default=None),
            "skip" if skip else "raise",
            None if fixed else max_batches,
        )


class StoppingRule:
    """Decides when the statistics of a hook are enough, in training and in `fit`.

    Measuring the inflation costs as much as many updates. So it is measured only once the number of
    samples has grown by a fifth.

    Args:
        required: What is needed.

    Attributes:
        next_look: Number of activations at which the inflation is measured next.
        is_enough: Whether the statistics are enough.
    """

    def __init__(self, required: Requirement) -> None:
        self.required = required
        self.next_look = FIRST_LOOK_PER_DIMENSION * required.d_in
        self.is_enough = False

    def must_look(self, n_samples: int) -> bool:
        """Whether the inflation has to be measured to decide."""
        required = self.required
        n_at_least = max(required.n_samples or 0, self.next_look)
        return required.tolerance is not None and n_at_least <= n_samples < required.limit

    def decide(self, n_samples: int, inflation: float | None = None) -> bool:
        """Decide after a batch.

        Args:
            n_samples: Activations so far.
            inflation: Relative excess variance of held-out activations, if `must_look` is true.
        """
        required = self.required
        if inflation is not None and required.tolerance is not None:
            self.next_look = math.ceil(1.2 * n_samples)
            self.is_enough = inflation <= required.tolerance
        elif n_samples >= (required.n_samples or 0):
            self.is_enough = required.tolerance is None or n_samples >= required.limit
        return self.is_enough


@torch.no_grad()
def estimate_statistics(
    batches: Iterator[Mapping[str, Float[Tensor, "..."]]],
    required: Mapping[str, Requirement],
    resolution: float = 0.0,
) -> dict[str, ActivationStatistics]:
    """Mean and covariance at every hook, from the first batches of a stream.

    Each hook uses only the batches that it requires, so its statistics do not depend on the other
    hooks. The stream is read until all have enough, or until it repeats its first batch:
    activations are counted once.

    Args:
        batches: Yields activations by hook, each of shape (n, d_in), (batch, seq, d_in) or
            (n, n_heads, d_head).
        required: What is needed, by hook. A single hook may have the name "", which messages leave
            out.
        resolution: Machine epsilon of what the activations were computed in, which may be coarser
            than the dtype they are given in.

    Returns:
        Statistics by hook, with `provenance["inflation"]`.

    Raises:
        ValueError: The stream ended too early, a shape does not fit, the activations do not vary,
            or one is not finite and `on_nonfinite` is "raise".
    """
    hooks = {name: _Hook(name, requirement) for name, requirement in required.items()}
    repeated = _Repeated(required)
    with tqdm(desc="Estimating whitening", unit=" tokens", leave=False) as bar:
        while waiting := [hook for hook in hooks.values() if not hook.done]:
            try:
                batch = next(batches)
            except StopIteration:
                for hook in waiting:
                    hook.end_of_data()
                break
            if repeated(batch):
                for hook in waiting:
                    hook.data_repeat()
                break
            for hook in waiting:
                with naming(hook.name):
                    hook.update(batch[hook.name])
            bar.update(max(hook.halves.n_samples for hook in waiting) - bar.n)
            looked_at = [hook for hook in waiting if hook.inflation is not None]
            if looked_at:
                bar.set_postfix_str(max(looked_at, key=_Hook.distance).progress())
    statistics = {}
    for name, hook in hooks.items():
        with naming(name):
            hook.warn_if_too_few()
            statistics[name] = hook.statistics()
            statistics[name].resolution = max(statistics[name].resolution, resolution)
    return statistics


class _Repeated:
    """Whether a batch is the first one again, as `itertools.cycle` gives it.

    Activations that are counted again make statistics no better, and split halves that hold the
    same ones agree.

    Args:
        hook_names: The hooks whose activations are compared.
    """

    def __init__(self, hook_names: Iterable[str]) -> None:
        self._hook_names = list(hook_names)
        self._first: list[Tensor] = []

    def __call__(self, batch: Mapping[str, Float[Tensor, "..."]]) -> bool:
        now = [batch[name] for name in self._hook_names]
        if not any(map(torch.numel, self._first)):
            # copies: a provider may write the next batch into the same memory
            self._first = [acts.clone() for acts in now]
            return False
        # a single activation can occur twice in a text
        return all(
            acts.numel() > acts.shape[-1] and torch.equal(acts, first)
            for acts, first in zip(now, self._first, strict=True)
        )


class _Hook:
    """The estimation of one hook."""

    def __init__(self, name: str, required: Requirement) -> None:
        self.name, self.required = name, required
        self.halves = SplitHalfStatistics(required.d_in, required.on_nonfinite)
        self.inflation: float | None = None  # last measured, at `_n_looked_at` samples
        self.done = False
        self._n_looked_at = 0
        self._rule = StoppingRule(required)
        self._n_batches = self._n_empty = self._n_filled = 0
        self._prefix = f"{name}: " if name else ""
        self._ended = ""

    def update(self, batch: Float[Tensor, "..."]) -> None:
        halves = self.halves
        before = halves.n_samples
        halves.update(flatten_heads(batch, self.required.d_in))
        self._n_batches += 1
        is_empty = halves.n_samples == before
        self._n_empty = self._n_empty + 1 if is_empty else 0
        self._n_filled += not is_empty
        if self._n_empty == MAX_EMPTY_BATCHES:
            raise ValueError(
                f"{self._n_empty} batches in a row held no activations to estimate the whitening "
                f"from ({halves.n_skipped} were skipped as not finite)"
            )
        n, rule = halves.n_samples, self._rule
        at_its_end = self._n_filled == self.required.max_batches
        self.done = at_its_end or rule.decide(n, self._look() if rule.must_look(n) else None)

    def _look(self) -> float:
        if self.inflation is None or self._n_looked_at != self.halves.n_samples:
            self.inflation = self.halves.inflation()
            self._n_looked_at = self.halves.n_samples
        return self.inflation

    def distance(self) -> float:
        """The last measured inflation over the tolerance."""
        assert self.inflation is not None
        assert self.required.tolerance is not None
        return self.inflation / self.required.tolerance

    def progress(self) -> str:
        assert self.inflation is not None
        assert self.required.tolerance is not None
        return self._prefix + excess_so_far(self.inflation, self.required.tolerance)

    def end_of_data(self) -> None:
        """Accept the samples so far when the stream ends, if they are enough.

        Raises:
            ValueError: They are not enough.
        """
        required, halves = self.required, self.halves
        n, about = halves.n_samples, required.n_samples or 0
        if required.tolerance is not None:
            with naming(self.name):
                inflation = self._look()
            if inflation <= required.tolerance and n >= about:
                self.done = True
                return
            adaptive = 100 * required.d_in
            if math.isfinite(inflation):
                adaptive = samples_for_inflation(inflation, n, required.tolerance)
            about = max(about, adaptive)
        needs = f"about {about}" if required.tolerance is not None else str(about)
        fewer = f", or set WhiteningConfig(n_samples=...) to at most {n}" if n > 1 else ""
        raise ValueError(
            f"{self._prefix}the data provider ended after {n} activations in {self._n_batches} "
            f"batches; estimating the whitening needs {needs}. Provide more data{fewer}."
        )

    def data_repeat(self) -> None:
        """Accept the samples so far, because those that follow are the same."""
        self._ended = f"the data provider repeats its first {self._n_batches} batches"
        self.done = True

    def warn_if_too_few(self) -> None:
        n, wanted = self.halves.n_samples, self.required.n_samples
        tolerance = self.required.tolerance
        if self._n_filled == self.required.max_batches:
            self._ended = "n_batches_for_norm_estimate was reached"
        if wanted is not None and n < wanted:
            logger.warning(
                "%swhitening estimated from %d activations instead of %d: %s",
                self._prefix,
                n,
                wanted,
                self._ended,
            )
        elif tolerance is not None and self._look() > tolerance:
            logger.warning(
                "%s%s%s",
                self._prefix,
                too_inaccurate(self._look(), n, tolerance),
                f"; {self._ended}" if self._ended else "",
            )
        if self.halves.n_skipped:
            logger.warning(
                "%s%d activations with a NaN or an infinity were left out",
                self._prefix,
                self.halves.n_skipped,
            )

    def statistics(self) -> ActivationStatistics:
        merged, excess = self.halves.merged(), self._look()
        merged.provenance["inflation"] = excess if math.isfinite(excess) else None
        logger.info(
            "%swhitening estimated from %d activations (%.0f per dimension)",
            self._prefix,
            merged.n_samples,
            merged.n_samples / merged.d_in,
        )
        return merged


def excess_so_far(inflation: float, tolerance: float) -> str:
    """What a progress bar says of the accuracy. It is infinite while samples are too few."""
    excess = f"{inflation:.1%}" if math.isfinite(inflation) else "not known yet"
    return f"held-out excess {excess}, target {tolerance:.1%}"


def too_inaccurate(inflation: float, n_samples: int, tolerance: float) -> str:
    """The warning that statistics did not reach the tolerance, with the samples needed."""
    about = "many more"
    if math.isfinite(inflation):
        about = f"about {samples_for_inflation(inflation, n_samples, tolerance)}"
    return (
        f"whitening estimated from {n_samples} activations: held-out activations have "
        f"{inflation:.1%} too much variance under it, more than the tolerance of {tolerance:.1%}; "
        f"{about} are needed"
    )


@contextmanager
def naming(hook_name: str) -> Iterator[None]:
    """Put the hook's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        if hook_name:
            # the same error, because a subclass may take other arguments than a message
            error.args = (f"{hook_name}: {error}",)
        raise


def flatten_heads(acts: Float[Tensor, "..."], d_in: int) -> Float[Tensor, "..."]:
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
