"""Architectures beside the stock ones, in SAELens' registries under their names.

`import sae_whiten` has them registered as soon as sae_lens is imported, in whichever order.
"""

from sae_lens.registry import register_sae_class, register_sae_training_class

from sae_whiten.architectures.top_afa import (
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
)
from sae_whiten.architectures.topk_vsae import TopKVSAETrainingConfig, TopKVSAETrainingSAE

__all__ = [
    "TopAFASAE",
    "TopAFASAEConfig",
    "TopAFATrainingSAE",
    "TopAFATrainingSAEConfig",
    "TopKVSAETrainingConfig",
    "TopKVSAETrainingSAE",
]

register_sae_training_class("topk_vsae", TopKVSAETrainingSAE, TopKVSAETrainingConfig)
register_sae_class("top_afa", TopAFASAE, TopAFASAEConfig)
register_sae_training_class("top_afa", TopAFATrainingSAE, TopAFATrainingSAEConfig)
