"""What is known of latents once they have been looked at: what a page shows."""

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
        tokens: Their ids.
        pieces: Their texts.
        activations: Of the latent, 0 at tokens that do not count.
        peak: Position of the largest in size.
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
        cosine: Of the two decoder directions.
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
        overlap: Of the tokens at which either fires, the share at which both do.
        cosine: Of the decoder directions; None where the SAEs are of different hooks.
        whitened: The same in whitened coordinates.
    """

    index: int
    overlap: float
    cosine: float | None = None
    whitened: float | None = None


@dataclass
class Latent:
    """What was seen of a latent.

    Attributes:
        index: Its number.
        n_firing: Tokens at which it is active.
        largest: Size of its largest activation.
        mean: Mean size of its activations where it is active; 0 if it never is.
        histogram: Tokens at which it is active, in equal parts of (0, largest].
        texts: Where it is most active, one for each sequence; the same text is there once.
        random_texts: Drawn from all sequences in which it fires, without those of `texts`.
        in_text: The text that was asked for; None if none was.
        raised, lowered: Tokens whose logits its decoder direction changes most, and by how much
            for a direction of norm 1, up to a scale that all tokens share; empty where the model
            has no logits to change.
        neighbours: Of nearest decoder direction in whitened coordinates.
        by_direction: The other SAE's latent of nearest decoder direction in whitened coordinates.
        by_firing: The other SAE's latent that fires most at the same tokens.
        same_as: The number of the one of these that counts as the same, if one does.
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
    """An SAE and those of its latents that are shown.

    Attributes:
        name: Of the SAE.
        facts: About it, by name, ready to be shown.
        n_tokens: Tokens that count, of those read.
        firing_rates: Share of these at which each latent is active; shape (d_sae,).
        latents: By number, in the order in which they were chosen.
        whitening: Where the whitened coordinates come from.
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
    """Which latents two SAEs share, over all that fire.

    Attributes:
        n_live: Latents that fire, of each SAE.
        n_matched: Those of them that the other SAE has too.
        both: Pairs that are shown; where the second was shown before, it is not again.
        only_first, only_second: Latents that are shown, without a counterpart.
        chance: Median of the largest cosine, in whitened coordinates, of random directions with the
            latents of each SAE; None where the SAEs are of different hooks.
        n_overlap_tokens: Tokens over which overlaps were counted.
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
    """What a page of features shows; `page.write_page` writes it.

    Attributes:
        saes: One or two.
        options: With which they were measured.
        why_no_logits: Why there are no tokens raised and lowered, or None if there are.
        matching: Of two SAEs.
        n_read: Tokens read, special ones included.
        context_size: Tokens in a sequence.
    """

    saes: Sequence[SAEFeatures]
    options: FeatureOptions
    why_no_logits: str | None
    matching: Matching | None
    n_read: int
    context_size: int
