"""How many activations a whitening needs: the estimate from two halves against held-out text.

Activations of all-MiniLM-L6-v2 (hook bert.encoder.layer.2) on the docstrings of the Python standard
library, as in `sae-whiten demo`; a third of the sequences is held out. "split half" is the estimate
that decides when estimation ends (`WhiteningConfig.tolerance`). "held out" is the excess variance
of held-out activations under the whitening estimated so far. "Gaussian" is d / (n - d).

    python benchmarks/samples.py --plot docs/concepts/samples.png
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import torch
from sae_lens.load_model import load_model

from sae_whiten import ActivationStatistics
from sae_whiten._paper_style import new_figure, paper_style, save_figure
from sae_whiten.comparison import demo_text
from sae_whiten.estimation.split_half import SplitHalfStatistics

HOOK, D = "bert.encoder.layer.2", 384


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="order of the text")
    parser.add_argument("--plot", type=Path, help="draw the table, too")
    args = parser.parse_args()
    print(f"{'n / d':>8}{'split half':>12}{'held out':>12}{'Gaussian':>12}")
    rows = []
    for row in measure(args.seed):
        rows.append(row)
        print(f"{row[0]:8.0f}" + "".join(f"{excess:12.2%}" for excess in row[1:]), flush=True)
    if args.plot is not None:
        plot(rows, args.plot)


@torch.no_grad()
def measure(seed: int) -> Iterator[tuple[float, float, float, float]]:
    """Activations per dimension, and excess variance: split half, held out, Gaussian."""
    path = demo_text.find_model()
    model = load_model("AutoModelForCausalLM", str(path), "cpu", hook_names=[HOOK])
    sequences = torch.tensor(demo_text.read_text(path, seed).train)
    n_held_out = len(sequences) // 3

    def activations(tokens: torch.Tensor) -> torch.Tensor:
        cache = model.run_with_cache(tokens, names_filter=[HOOK], stop_at_layer=3)[1]
        return cache[HOOK][:, 1:-1].reshape(-1, D)  # without [CLS] and [SEP]

    held_out = ActivationStatistics(D)
    halves = SplitHalfStatistics(D)
    for tokens in sequences[:n_held_out].split(16):
        held_out.update(activations(tokens))
    look_at = 10.0
    for tokens in sequences[n_held_out:].split(16):
        halves.update(activations(tokens))
        n = halves.n_samples
        if n < look_at * D:
            continue
        look_at *= 1.5
        own = halves.merged().covariance
        ridge = 1e-6 * own.diagonal().mean() * torch.eye(D, dtype=own.dtype)
        inverse = torch.linalg.inv(own + ridge)
        excess = float((inverse * held_out.covariance).sum() / (inverse * own).sum() - 1)
        yield n / D, halves.inflation(), excess, D / (n - D)


def plot(rows: list[tuple[float, float, float, float]], path: Path) -> None:
    per_dimension, split_half, held_out, gaussian = zip(*rows, strict=True)
    with paper_style():
        figure = new_figure(width=4.5, height=2.6)
        axes = figure.add_subplot()
        axes.plot(per_dimension, gaussian, color="0.6", linestyle=":", label="Gaussian data")
        axes.plot(per_dimension, held_out, color="#e65100", marker="o", label="held-out text")
        axes.plot(per_dimension, split_half, color="#3f51b5", marker="s", label="two halves")
        axes.axhline(0.02, color="black", linewidth=0.6)
        axes.set(xscale="log", yscale="log", xlabel="activations per dimension")
        axes.set_ylabel("excess variance")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
        axes.legend(frameon=False)
        save_figure(figure, path)


if __name__ == "__main__":
    main()
