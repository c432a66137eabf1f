"""Measurements of latents for a page of features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sae_whiten.evaluation.features.options import FeatureOptions

__all__ = [
    "Counterpart",
    "Features",
    "Latent",
    "Matching",
    "Neighbour",
    "SAEFeatures",
    "TextPiece",
]


@dataclass(frozen=True)
class TextPiece:
    """Consecutive tokens, and a latent's activations at them.

    Attributes:
        tokens: Token ids.
        pieces: Text of each token.
        activations: Activations of the latent, 0 at tokens that are left out.
        peak: Position of the largest |activation|.
    """

    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int


@dataclass(frozen=True)
class Neighbour:
    """Another latent of the same SAE.

    Attributes:
        index: Its number.
        cosine: Cosine of the two decoder directions.
        whitened: The same in whitened coordinates.
    """

    index: int
    cosine: float
    whitened: float


@dataclass(frozen=True)
class Counterpart:
    """A latent of the other SAE.

    Attributes:
        index: Its number.
        overlap: Tokens at which both fire over tokens at which either fires.
        cosine: Cosine of the decoder directions; None if the SAEs read different hooks.
        whitened: The same in whitened coordinates.
    """

    index: int
    overlap: float
    cosine: float | None = None
    whitened: float | None = None


@dataclass
class Latent:
    """Measurements of one latent.

    Attributes:
        index: Its number.
        n_firing: Number of tokens at which it is active.
        largest: Its largest |activation|.
        mean: Mean |activation| over the tokens at which it is active; 0 if there are none.
        histogram: Numbers of active tokens in equal bins of (0, largest].
        texts: Texts in which it is most active, one per sequence, without repetitions.
        random_texts: Texts drawn from all sequences in which it fires, without those in `texts`.
        in_text: Its activations in the requested text; None without such a text.
        raised, lowered: Tokens whose logits its decoder direction of norm 1 changes most, and the
            changes, up to a scale common to all tokens. Empty if logits are meaningless.
        neighbours: Latents with the nearest decoder directions in whitened coordinates.
        by_direction: The other SAE's latent of nearest decoder direction in whitened coordinates.
        by_firing: The other SAE's latent with the largest overlap of firing tokens.
        same_as: Number of the matching latent of the other SAE, if there is one.
    """

    index: int
    n_firing: int
    largest: float
    mean: float = 0.0
    histogram: Sequence[int] = ()
    texts: Sequence[TextPiece] = ()
    random_texts: Sequence[TextPiece] = ()
    in_text: TextPiece | None = None
    raised: Sequence[tuple[str, float]] = ()
    lowered: Sequence[tuple[str, float]] = ()
    neighbours: Sequence[Neighbour] = ()
    by_direction: Counterpart | None = None
    by_firing: Counterpart | None = None
    same_as: int | None = None


@dataclass
class SAEFeatures:
    """An SAE and its latents that are shown.

    Attributes:
        name: Name of the SAE.
        facts: Facts about it, by name, as shown.
        n_tokens: Number of kept tokens.
        firing_rates: Share of the kept tokens at which each latent is active; shape (d_sae,).
        latents: Latents by number, in the order in which they were chosen.
        whitening: Source of the whitened coordinates.
    """

    name: str
    facts: Mapping[str, Any]
    n_tokens: int
    firing_rates: Float[Tensor, "d_sae"]
    latents: dict[int, Latent] = field(default_factory=dict)
    whitening: str = ""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.firing_rates)

    @property
    def n_dead(self) -> int:
        """Latents that fire at none of the tokens."""
        return int((self.firing_rates == 0).sum())

    @property
    def l0(self) -> float:
        """Mean number of active latents."""
        return float(self.firing_rates.sum())


@dataclass(frozen=True)
class Matching:
    """The latents that two SAEs share, among all that fire.

    Attributes:
        n_live: Number of latents that fire, for each SAE.
        n_matched: Number of these that have a match in the other SAE.
        both: Shown pairs. A second latent that occurs in several pairs is shown once.
        only_first, only_second: Shown latents without a match.
        chance: Median, over random directions, of the largest cosine with the latents of each SAE,
            in whitened coordinates. None if the SAEs read different hooks.
        n_overlap_tokens: Number of tokens over which overlaps were counted.
    """

    n_live: tuple[int, int]
    n_matched: tuple[int, int]
    both: Sequence[tuple[int, int]]
    only_first: Sequence[int]
    only_second: Sequence[int]
    chance: tuple[float, float] | None
    n_overlap_tokens: int


@dataclass(frozen=True)
class Features:
    """The contents of a page of features. `page.write_page` writes the page.

    Attributes:
        saes: One or two SAEs.
        options: Options of the measurement.
        why_no_logits: Reason why there are no raised and lowered tokens, or None if there are.
        matching: The matching of two SAEs; None for one SAE.
        n_read: Number of tokens read, including special ones.
        context_size: Tokens per sequence.
    """

    saes: Sequence[SAEFeatures]
    options: FeatureOptions
    why_no_logits: str | None
    matching: Matching | None
    n_read: int
    context_size: int
