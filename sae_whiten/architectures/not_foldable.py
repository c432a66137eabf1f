"""SAELens' architectures into which whitening cannot be folded, and why."""

from sae_lens import MatchingPursuitSAE, MatchingPursuitTrainingSAE, TemporalSAE

from sae_whiten.architectures.description import Architecture, register

register(
    Architecture(
        sae_classes=(MatchingPursuitSAE, MatchingPursuitTrainingSAE),
        not_foldable_because="its encoder is tied to the decoder, and folding multiplies one by W "
        "and the other by its inverse",
    )
)
register(
    Architecture(
        sae_classes=(TemporalSAE,),
        not_foldable_because="it attends over positions, which is not an affine map of one "
        "activation",
    )
)
