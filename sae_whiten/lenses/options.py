"""The options of the lenses: each field is a flag of its command too, with its help."""

from dataclasses import dataclass
from typing import Literal

from sae_whiten._checks import require_number
from sae_whiten.evaluation.options import SequenceOptions

__all__ = ["AFAOptions", "LandscapeConfig", "LatentOptions"]


@dataclass(frozen=True)
class AFAOptions(SequenceOptions):
    """Which prompts are measured; the tokens per sequence are the most that a prompt has.

    Raises:
        FieldError: A value cannot work.
    """

    n_prompts: int = 1000
    """Rows of the dataset, from its beginning, each a prompt; fewer if it is shorter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("n_prompts", self.n_prompts)


@dataclass(frozen=True)
class LatentOptions(SequenceOptions):
    """Which tokens latents are measured on, and how they are embedded in the plane.

    Raises:
        FieldError: A value cannot work.
    """

    n_tokens: int = 65_536
    """Tokens to read, special ones included. A latent that fires at none of them counts as dead."""

    of: Literal["decoder", "activations"] = "decoder"
    """What is embedded: decoder rows or activations. Activations take 8 bytes for each active
    latent of each token: 34 MB for 65 536 tokens at an L0 of 64."""

    max_latents: int = 2000
    """Latents to show of each SAE at most, drawn at random; dead ones keep their share. 4000 in all
    take 20 s on one core."""

    perplexity: float = 30.0
    """Perplexity of t-SNE: roughly the number of neighbours that a latent stays close to. For n
    latents it is at most (n - 1) / 3; a larger value is lowered, with a warning."""

    seed: int = 0
    """Seed of the map: the same seed gives the same map on one machine. Which latents of an SAE are
    drawn does not depend on the other SAEs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("n_tokens", self.n_tokens)
        require_number("max_latents", self.max_latents)
        require_number("perplexity", self.perplexity, whole=False)
        require_number("seed", self.seed, 0)


@dataclass(frozen=True)
class LandscapeConfig:
    """The generative model of the simulation in two dimensions.

    Raises:
        FieldError: A value cannot work.
    """

    angle: float = 30.0
    """Angle between the two features, in degrees, in (0, 90]."""

    activity: float = 0.5
    """Probability that a source is active, in (0, 1]."""

    ratio: float = 2.0
    """Scale of the first source, in units of the second's."""

    seed: int = 0
    """Seed of the samples."""

    def __post_init__(self) -> None:
        require_number("angle", self.angle, above=0, at_most=90, whole=False)
        require_number("activity", self.activity, above=0, at_most=1, whole=False)
        require_number("ratio", self.ratio, above=0, whole=False)
        require_number("seed", self.seed, 0)
