"""The conditions of a comparison: how activations are normalised before an SAE sees them."""

from dataclasses import dataclass

from sae_whiten.config import WhiteningConfig

__all__ = ["CONDITIONS", "Condition"]


@dataclass(frozen=True)
class Condition:
    """How activations are normalised before an SAE sees them.

    Attributes:
        description: One line, for help and reports.
        whitening: None: SAELens' `normalize_activations` of the condition's name.
    """

    description: str
    whitening: WhiteningConfig | None = None


CONDITIONS = {
    "none": Condition("raw activations"),
    "centred": Condition(
        "the mean subtracted, nothing else",
        # with strength 0 the matrix is the identity
        WhiteningConfig(kind="zca", strength=0.0),
    ),
    "expected_average_only_in": Condition(
        "SAELens' scaling of the inputs to a norm of sqrt(d) on average"
    ),
    "whitened": Condition(
        "whitened, reconstruction loss in whitened space (SAELens' built-in)",
        WhiteningConfig(loss_space="whitened"),
    ),
    "original": Condition(
        "whitened, reconstruction loss in the space of the activations (the paper)",
        WhiteningConfig(loss_space="original"),
    ),
    "original_norms": Condition(
        "as `original`, sparsity weighted by decoder norms in the space of the activations",
        WhiteningConfig(loss_space="original", sparsity_norms="original"),
    ),
    "half": Condition(
        "whitened with strength 0.5, reconstruction loss in that space",
        WhiteningConfig(strength=0.5, loss_space="whitened"),
    ),
    "original_zca": Condition(
        "as `original`, whitened by ZCA instead of PCA",
        WhiteningConfig(kind="zca", loss_space="original"),
    ),
}
"""By name."""
