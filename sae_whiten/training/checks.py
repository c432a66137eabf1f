"""Refuse runner configs that cannot be trained, before a model or a dataset is loaded."""

import logging
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainingSAEConfig

from sae_whiten._checks import FieldError, require_device, require_number
from sae_whiten._files import check_writable

__all__ = ["POSITIVE_FIELDS", "RunnerConfig", "check_runner_config"]

logger = logging.getLogger(__name__)

RunnerConfig: TypeAlias = LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig

POSITIVE_FIELDS = (
    "context_size",
    "store_batch_size_prompts",
    "train_batch_size_tokens",
    "training_tokens",
    "feature_sampling_window",
    "dead_feature_window",
)
"""Fields of the runner's config that are whole numbers from 1 on."""


def check_runner_config(cfg: RunnerConfig, saes: Mapping[str, TrainingSAEConfig]) -> None:
    """Refuse sizes, learning rates, devices and paths that fail later, or train nothing. Warn of a
    schedule of the learning rate that is longer than training.

    Args:
        cfg: SAELens' runner config.
        saes: The configs of the SAEs to be trained, by the name of their field in Python: "sae",
            or "saes['a']".

    Raises:
        FieldError: A value cannot work; its `field` is the name of the field.
    """
    for name in POSITIVE_FIELDS:
        # 1e6 is accepted for 1000000
        require_number(name, getattr(cfg, name), whole=name != "training_tokens")
    if cfg.training_tokens < cfg.train_batch_size_tokens:
        raise FieldError(
            "training_tokens",
            cfg.training_tokens,
            f"less than one batch (train_batch_size_tokens={cfg.train_batch_size_tokens})",
        )
    require_number("lr", cfg.lr, least=0, whole=False)
    if cfg.lr_end is not None:
        require_number("lr_end", cfg.lr_end, least=0, whole=False)
    for name in ("lr_warm_up_steps", "lr_decay_steps"):
        require_number(name, getattr(cfg, name), least=0)
    _warn_of_the_schedule(cfg)
    for name in ("adam_beta1", "adam_beta2"):
        require_number(name, getattr(cfg, name), least=0, below=1, whole=False)
    for name, sae in saes.items():
        _check_sae(name, sae)
    for name in ("device", "llm_device", "act_store_device"):
        device = getattr(cfg, name)
        if device is not None:
            require_device(name, device)
    for name in ("checkpoint_path", "output_path"):
        path = getattr(cfg, name)
        if path is None:
            continue
        try:
            check_writable(path)
        except OSError as error:
            raise FieldError(name, path, f"cannot be written to ({error})") from error


def _warn_of_the_schedule(cfg: RunnerConfig) -> None:
    n_steps = int(cfg.training_tokens) // cfg.train_batch_size_tokens
    if cfg.lr_warm_up_steps + cfg.lr_decay_steps > n_steps:
        logger.warning(
            "lr_warm_up_steps=%d and lr_decay_steps=%d do not fit into the %d steps of this "
            "training: the learning rate does not follow them as set",
            cfg.lr_warm_up_steps,
            cfg.lr_decay_steps,
            n_steps,
        )


def _check_sae(name: str, sae: TrainingSAEConfig) -> None:
    for field, value in vars(sae).items():
        if isinstance(value, float) and math.isnan(value):
            raise FieldError(f"{name}.{field}", value, "is not a number")
    require_number(f"{name}.d_in", sae.d_in)
    require_number(f"{name}.d_sae", sae.d_sae)
    k = getattr(sae, "k", None)  # a float for BatchTopK: a mean over the batch
    if k is None:
        return
    if isinstance(k, bool) or not 0 < k <= sae.d_sae:
        raise FieldError(
            f"{name}.k",
            k,
            f"the number of active latents per token: above 0, at most d_sae={sae.d_sae}",
        )
