"""How many activations a whitening needs: what two halves say, and what held-out text shows.

Activations of all-MiniLM-L6-v2 (hook bert.encoder.layer.2) on the docstrings of the Python standard
library, as in `sae-whiten demo`; a third of the sequences is held out. "split half" is the estimate
at which estimation ends (`WhiteningConfig.tolerance`), "held out" the excess variance of held-out
activations under the whitening estimated so far, "Gaussian" what d / (n - d) would be.

    python benchmarks/samples.py
"""

import argparse
import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import torch
from sae_lens.load_model import load_model

from sae_whiten import ActivationStatistics
from sae_whiten.comparison import demo
from sae_whiten.estimation.split_half import SplitHalfStatistics

HOOK, D = "bert.encoder.layer.2", 384


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="order of the text")
    args = parser.parse_args()
    path = demo._find_model()
    model = load_model("AutoModelForCausalLM", str(path), "cpu", hook_names=[HOOK])
    sequences = torch.tensor(demo._read_text(path, args.seed).train)
    n_held_out = len(sequences) // 3

    def activations(tokens: torch.Tensor) -> torch.Tensor:
        cache = model.run_with_cache(tokens, names_filter=[HOOK], stop_at_layer=3)[1]
        return cache[HOOK][:, 1:-1].reshape(-1, D)  # without [CLS] and [SEP]

    held_out = ActivationStatistics(D)
    halves = SplitHalfStatistics(D)
    print(f"{'n / d':>8}{'split half':>12}{'held out':>12}{'Gaussian':>12}")
    with torch.no_grad():
        for tokens in sequences[:n_held_out].split(16):
            held_out.update(activations(tokens))
        print_at = 10.0
        for tokens in sequences[n_held_out:].split(16):
            halves.update(activations(tokens))
            n = halves.n_samples
            if n < print_at * D:
                continue
            print_at *= 1.5
            own = halves.merged().covariance
            ridge = 1e-6 * own.diagonal().mean() * torch.eye(D, dtype=own.dtype)
            inverse = torch.linalg.inv(own + ridge)
            excess = (inverse * held_out.covariance).sum() / (inverse * own).sum() - 1
            print(f"{n / D:8.0f}{halves.inflation():12.2%}{excess:12.2%}{D / (n - D):12.2%}")


if __name__ == "__main__":
    main()
