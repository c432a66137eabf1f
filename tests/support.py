"""Data, SAEs and models that tests share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import config as jaxtyping_config
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_whiten import ActivationStatistics, Whitening, WhiteningConfig

ROOT = Path(__file__).parents[1]
BYTE_TRANSFORMER = ROOT / "tests" / "assets" / "byte-transformer"


@contextmanager
def without_type_checks() -> Iterator[None]:
    """Turn off jaxtyping's checks, so that wrong shapes and dtypes reach our own errors."""
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)


ARCHITECTURES = (
    "standard",
    "gated",
    "jumprelu",
    "topk",
    "abstopk",
    "batchtopk",
    "matryoshka_batchtopk",
)


def friendly(n: int, d: int, seed: int = 0) -> Tensor:
    """Correlated Gaussian activations, condition about 10, mean about as large as the deviation."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(d) + 0.3 * torch.randn(d, d, generator=g) / d**0.5
    return torch.randn(n, d, generator=g) @ mix + torch.randn(d, generator=g)


def nasty(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Covariance of condition 1e6 in a random basis, and up to four dimensions with mean 3000."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    x = x * torch.logspace(-1.5, 1.5, d, dtype=torch.float64) @ basis
    x[:, : min(4, d)] += 3000
    return x.to(dtype)


def whitening_of(x: Tensor, config: WhiteningConfig | None = None) -> Whitening:
    """The whitening of all of `x`."""
    statistics = ActivationStatistics(x.shape[-1])
    statistics.update(x)
    return Whitening.from_statistics(statistics, config)


def training_sae(
    architecture: str, d_in: int = 32, d_sae: int = 128, seed: int = 0, **options: Any
) -> TrainingSAE[Any]:
    """A training SAE with random weights and biases, none of them zero."""
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "normalize_activations": "covariance_whitening",
    }
    if "topk" in architecture:
        config["k"] = 8
    if architecture == "matryoshka_batchtopk":
        config["matryoshka_widths"] = [d_sae // 4, d_sae]
    torch.manual_seed(seed)
    sae = TrainingSAE.from_dict({**config, **options})
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.startswith("b_") or name == "r_mag":
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name == "threshold":
                parameter.fill_(0.05)
            elif name == "W_dec":  # different norms, because TopK may rank by them
                parameter.mul_(0.5 + 2 * torch.rand_like(parameter[:, :1]))
    return sae


def tiny_model(seed: int = 0) -> HookedTransformer:
    """A transformer with two layers, width 32 and random weights."""
    torch.manual_seed(seed)
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=32,
            n_ctx=32,
            d_head=8,
            n_heads=4,
            d_vocab=100,
            act_fn="relu",
            device="cpu",
        )
    )


def tiny_dataset(n_sequences: int = 300, seed: int = 0) -> Dataset:
    """Random token sequences of length 33."""
    g = torch.Generator().manual_seed(seed)
    return Dataset.from_dict(
        {"input_ids": torch.randint(0, 100, (n_sequences, 33), generator=g).tolist()}
    )


def runner_config(**options: Any) -> LanguageModelSAERunnerConfig[Any]:
    """A run of 80 steps on the tiny model that writes nothing."""
    defaults: dict[str, Any] = {
        "sae": TopKTrainingSAEConfig(
            d_in=32, d_sae=128, k=8, normalize_activations="covariance_whitening"
        ),
        "model_name": "tiny",
        "hook_name": "blocks.1.hook_resid_pre",
        "dataset_path": "local",
        "streaming": False,
        "context_size": 32,
        "training_tokens": 128 * 80,
        "train_batch_size_tokens": 128,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 16,
        "lr": 1e-3,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": None,
        "verbose": False,
    }
    return LanguageModelSAERunnerConfig(**{**defaults, **options})
