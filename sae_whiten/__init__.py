"""Covariance whitening for sparse autoencoders trained with SAELens (arXiv 2511.13981).

Names are imported on first use. Importing sae_lens takes seconds, and statistics and transforms do
not need it. Importing sae_lens also registers the architectures of `sae_whiten.architectures`.
"""

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sae_whiten._files import CorruptFileError
    from sae_whiten.architectures.folding import (
        FoldCheck,
        FoldError,
        FoldReport,
        fold_whitening_into_weights,
        unfold_whitening_from_weights,
    )
    from sae_whiten.config import WhiteningConfig
    from sae_whiten.estimation.fit import fit_statistics
    from sae_whiten.statistics import ActivationStatistics, NonFiniteActivationsError
    from sae_whiten.training.multi_runner import WhiteningMultiSAETrainingRunner
    from sae_whiten.training.runner import WhiteningTrainingRunner
    from sae_whiten.training.scaler import CovarianceWhiteningScaler
    from sae_whiten.training.trainer import WhiteningTrainer
    from sae_whiten.whitening import Whitening

_MODULES = {
    "ActivationStatistics": "sae_whiten.statistics",
    "CorruptFileError": "sae_whiten._files",
    "CovarianceWhiteningScaler": "sae_whiten.training.scaler",
    "FoldCheck": "sae_whiten.architectures.folding",
    "FoldError": "sae_whiten.architectures.folding",
    "FoldReport": "sae_whiten.architectures.folding",
    "NonFiniteActivationsError": "sae_whiten.statistics",
    "Whitening": "sae_whiten.whitening",
    "WhiteningConfig": "sae_whiten.config",
    "WhiteningMultiSAETrainingRunner": "sae_whiten.training.multi_runner",
    "WhiteningTrainer": "sae_whiten.training.trainer",
    "WhiteningTrainingRunner": "sae_whiten.training.runner",
    "fit_statistics": "sae_whiten.estimation.fit",
    "fold_whitening_into_weights": "sae_whiten.architectures.folding",
    "unfold_whitening_from_weights": "sae_whiten.architectures.folding",
}

__all__ = [
    "ActivationStatistics",
    "CorruptFileError",
    "CovarianceWhiteningScaler",
    "FoldCheck",
    "FoldError",
    "FoldReport",
    "NonFiniteActivationsError",
    "Whitening",
    "WhiteningConfig",
    "WhiteningMultiSAETrainingRunner",
    "WhiteningTrainer",
    "WhiteningTrainingRunner",
    "fit_statistics",
    "fold_whitening_into_weights",
    "unfold_whitening_from_weights",
]


def _register_architectures(sae_lens: Any) -> None:
    importlib.import_module("sae_whiten.architectures")


# After `import sae_whiten`, before or after `import sae_lens`, SAE.load_from_disk must find our
# architectures. SAELens has no entry points for plugins, and importing it here would take seconds.
wrapt.register_post_import_hook(_register_architectures, "sae_lens")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sae_whiten' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
