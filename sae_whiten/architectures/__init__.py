"""Architectures: how each is folded, trained under whitening and compared. One file each.

`describe` returns the description of an architecture. `register` adds one of your own. topk_vsae
and top_afa are not part of SAELens. They are added to SAELens' registries once both sae_whiten and
sae_lens are imported, in either order.
"""

from sae_lens.registry import register_sae_class, register_sae_training_class

from sae_whiten.architectures import (  # noqa: F401, each registers its description
    gated,
    jumprelu,
    matryoshka_batchtopk,
    not_foldable,
    standard,
    topk,
    transcoders,
)
from sae_whiten.architectures.description import Architecture, describe, register
from sae_whiten.architectures.top_afa import (
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
)
from sae_whiten.architectures.topk_vsae import TopKVSAETrainingConfig, TopKVSAETrainingSAE

__all__ = [
    "Architecture",
    "TopAFASAE",
    "TopAFASAEConfig",
    "TopAFATrainingSAE",
    "TopAFATrainingSAEConfig",
    "TopKVSAETrainingConfig",
    "TopKVSAETrainingSAE",
    "describe",
    "register",
]

register_sae_training_class("topk_vsae", TopKVSAETrainingSAE, TopKVSAETrainingConfig)
register_sae_class("top_afa", TopAFASAE, TopAFASAEConfig)
register_sae_training_class("top_afa", TopAFATrainingSAE, TopAFATrainingSAEConfig)
