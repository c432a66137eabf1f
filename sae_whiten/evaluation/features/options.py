"""What a page of features shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from sae_whiten._checks import FieldError, require_number
from sae_whiten.evaluation.options import SequenceOptions

__all__ = ["FeatureOptions"]


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(SequenceOptions):
    """Which latents a page shows, and how many tokens are read.

    Raises:
        FieldError: A number is out of range, or both `latents` and `text` are given.
    """

    n_latents: int = 200
    """Latents to show, of both SAEs together. Without --latents or --text they are drawn at random
    from those that fire"""

    latents: Sequence[int] | None = None
    """Numbers of the latents to show; of two SAEs, latents of the first, beside their counterparts
    in the second"""

    text: str | None = None
    """Show the latents that fire in this text, those that contribute most to its reconstruction
    first"""

    n_tokens: int = 65_536
    """Tokens to read, in two passes; rare latents need more tokens"""

    n_texts: int = 10
    """Texts per latent in which it is most active"""

    n_random_texts: int = 4
    """Texts per latent drawn at random from all in which it fires: those in which it is most active
    may make it look more specific than it is"""

    window: int = 40
    """Tokens shown of each text"""

    match_cosine: float = 0.7
    """Latents of two SAEs match if the cosine of their decoder directions, in whitened coordinates,
    is at least this"""

    match_overlap: float = 0.5
    """or if both fire at no less than this share of the tokens at which either fires"""

    seed: int = 0
    """Seed of all random choices"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_latents", "n_tokens", "n_texts", "window"):
            require_number(name, getattr(self, name))
        for name in ("n_random_texts", "seed"):
            require_number(name, getattr(self, name), 0)
        for name in ("match_cosine", "match_overlap"):
            require_number(name, getattr(self, name), 0, at_most=1, whole=False)
        if self.latents is not None and self.text is not None:
            raise FieldError("text", self.text, "choose latents by number or by a text, not both")
        if self.latents is not None and not self.latents:
            raise FieldError("latents", "", "name at least one latent")
        if self.text is not None and not self.text.strip():
            raise FieldError("text", repr(self.text), "the text is empty")

    def check_latents(self, d_sae: int) -> None:
        """Refuse latents that an SAE of this size does not have.

        Raises:
            FieldError: A number is too large or negative; names the first.
        """
        for i in self.latents or ():
            if not 0 <= i < d_sae:
                raise FieldError("latents", i, f"the SAE's latents are 0 to {d_sae - 1}")
