"""Compare the correctness of the sae-lens built-in and of this package on the same data.

Every row takes seconds to measure. Activations are synthetic: either like those of language models,
with a covariance of condition 1e6 in a random basis and a mean of 3000 in a few dimensions ("ill"),
or correlated Gaussian activations of condition about 10 ("friendly").

    python benchmarks/correctness.py
"""

import argparse
import copy
import importlib.metadata
import itertools
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_whiten import (
    ActivationStatistics,
    Whitening,
    WhiteningConfig,
    WhiteningTrainer,
    fold_whitening_into_weights,
)

D, D_SAE, K = 64, 256, 8
BATCH, STEPS = 128, 400
# as in the built-in: both whiten in the same way, so only the folds are compared
SAME_TRANSFORM = WhiteningConfig(eps_mode="absolute", loss_space="whitened")


def ill(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0]
    g.manual_seed(1000 + seed)
    x = torch.randn(n, D, generator=g, dtype=torch.float64)
    x = x * torch.logspace(-1.5, 1.5, D, dtype=torch.float64) @ basis
    x[:, :4] += 3000
    return x.float()


def friendly(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(0)
    mix = torch.eye(D) + 0.3 * torch.randn(D, D, generator=g) / D**0.5
    g.manual_seed(1000 + seed)
    return torch.randn(n, D, generator=g) @ mix


def batches(data: Any) -> Iterator[Tensor]:
    return (data(BATCH, seed) for seed in itertools.count())


def new_sae(**options: Any) -> TrainingSAE[Any]:
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(
        {
            "architecture": "topk",
            "d_in": D,
            "d_sae": D_SAE,
            "k": K,
            "normalize_activations": "covariance_whitening",
            **options,
        }
    )
    with torch.no_grad():
        sae.b_dec.add_(0.1 * torch.randn_like(sae.b_dec))
    return sae


def whiteners(
    x: Tensor, config: WhiteningConfig | None = None
) -> tuple[ActivationScaler, Whitening]:
    built_in = ActivationScaler()
    built_in.estimate_whitening(x.shape[1], iter([x]), n_batches_for_norm_estimate=1)
    statistics = ActivationStatistics(x.shape[1])
    statistics.update(x)
    return built_in, Whitening.from_statistics(statistics, config)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def explained_variance(sae: Any, x: Tensor) -> float:
    with torch.no_grad():
        error = (x - sae(x)).double().square().sum()
    return float(1 - error / (x - x.mean(0)).double().square().sum())


def fold(dtype: str, apply_b_dec_to_input: bool) -> tuple[tuple[float, float], tuple[float, float]]:
    """After folding: relative error of latents, and rows whose active set has changed."""
    x = ill(2000)
    built_in, ours = whiteners(ill(20000, 1), SAME_TRANSFORM)
    assert built_in.whitening is not None
    results = []
    for which in ("built-in", "ours"):
        sae = new_sae(dtype=dtype, apply_b_dec_to_input=apply_b_dec_to_input)
        exact = copy.deepcopy(sae).to(torch.float64)
        w = ours if which == "ours" else built_in.whitening
        with torch.no_grad():
            expected = exact.encode((x.double() - w.mean) @ w.matrix)
            if which == "ours":
                fold_whitening_into_weights(sae, ours)
            else:
                sae.fold_activation_whitening(w.mean, w.matrix, w.inverse_matrix)
            found = sae.encode(x)
        other_set = ((found != 0) != (expected != 0)).any(dim=1).float().mean()
        results.append((relative(found, expected), float(other_set)))
    return results[0], results[1]


def bfloat16_activations() -> tuple[float, float]:
    x = ill(2000).bfloat16()
    built_in, ours = whiteners(ill(20000, 1), SAME_TRANSFORM)
    exact = (x.double() - ours.mean) @ ours.W
    return relative(built_in.scale(x), exact), relative(ours.whiten(x), exact)


def unit(scale: float) -> tuple[float, float]:
    """|C_z - I|_F / sqrt(d) after the unit of the activations changes."""
    x = friendly(20000) * scale
    built_in, ours = whiteners(x)

    def error(z: Tensor) -> float:
        difference = torch.cov(z.double().T) - torch.eye(D, dtype=torch.float64)
        return float(difference.norm() / D**0.5)

    return error(built_in.scale(x)), error(ours.whiten(x))


def few_samples() -> tuple[float, float]:
    """Largest eigenvalue of the covariance of held-out data, whitened from d + 1 samples."""
    x = friendly(20000, 1)
    built_in, ours = whiteners(friendly(D + 1))
    largest = [
        float(torch.linalg.eigvalsh(torch.cov(z.T))[-1])
        for z in (built_in.scale(x), ours.whiten(x))
    ]
    return largest[0], largest[1]


def constant_dimension() -> tuple[float, float]:
    """Largest gain of the whitener over that of an average direction."""
    x = friendly(20000)
    x[:, 5] = 1.0
    built_in, ours = whiteners(x)
    assert built_in.whitening is not None
    gains = [
        float(torch.linalg.svdvals(w)[0] * ours.covariance_eigenvalues.mean().sqrt())
        for w in (built_in.whitening.matrix, ours.W)
    ]
    return gains[0], gains[1]


def new_trainer(which: str, **options: Any) -> Any:
    config = SAETrainerConfig(
        total_training_samples=BATCH * STEPS,
        train_batch_size_samples=BATCH,
        lr=3e-3,
        lr_end=3e-3,
        n_batches_for_norm_estimate=50,
        **options,
    )
    make = WhiteningTrainer if which == "ours" else SAETrainer
    return make(config, new_sae(), batches(ill))


def checkpoint_in_the_middle(directory: Path) -> tuple[float, float]:
    """Explained variance of a mid-training checkpoint opened with SAE.load_from_disk."""
    values = []
    for which in ("built-in", "ours"):
        new_trainer(which, checkpoint_path=str(directory / which), n_checkpoints=1).fit()
        (path,) = (directory / which).iterdir()
        values.append(explained_variance(SAE.load_from_disk(path), ill(5000, -1)))
    return values[0], values[1]


def resume_the_final_checkpoint(
    directory: Path,
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Explained variance before and after resuming the final checkpoint, without further steps."""
    values = []
    for which in ("built-in", "ours"):
        folder = str(directory / which)
        trainer = new_trainer(which, checkpoint_path=folder, save_final_checkpoint=True)
        values.append(explained_variance(trainer.fit(), ill(5000, -1)))
        (path,) = (directory / which).iterdir()
        trainer = new_trainer(which)
        trainer.load_trainer_state(path)
        if which == "built-in":
            trainer.sae.load_weights_from_checkpoint(path)
        values.append(explained_variance(trainer.fit(), ill(5000, -1)))
    return (values[0], values[2]), (values[1], values[3])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    print(f"sae-lens {importlib.metadata.version('sae-lens')}, torch {torch.__version__}\n")
    print(f"{'':74}{'built-in':>12}{'sae_whiten':>12}")

    def row(text: str, values: tuple[float, float], form: str = ".1e") -> None:
        print(f"{text:74}{values[0]:>12{form}}{values[1]:>12{form}}")

    for dtype in ("float32", "bfloat16"):
        for flag in (True, False):
            built_in, ours = fold(dtype, flag)
            name = f"fold, {dtype} SAE, ill data, apply_b_dec_to_input={flag}"
            row(f"{name}: error of latents", (built_in[0], ours[0]))
            row("  rows with another active set", (built_in[1], ours[1]), ".2%")
    row("whitening bfloat16 activations, ill data: error", bfloat16_activations())
    for scale in (1.0, 1e-3):
        row(f"|C_z - I|_F / sqrt(d), friendly data times {scale:g}", unit(scale), ".3f")
    row(
        f"largest held-out eigenvalue, from {D + 1} samples of {D} dimensions", few_samples(), ".1f"
    )
    row("gain on a constant dimension, in units of the average", constant_dimension(), ".1f")
    with tempfile.TemporaryDirectory() as name:
        row(
            "explained variance of a mid-training checkpoint in stock SAELens",
            checkpoint_in_the_middle(Path(name)),
            ".3f",
        )
    with tempfile.TemporaryDirectory() as name:
        before, after = resume_the_final_checkpoint(Path(name))
        row("explained variance at the end of training", before, ".3f")
        row("  after resuming the final checkpoint", after, ".3f")


if __name__ == "__main__":
    main()
