"""Compare the buffer that mixes activations before training with that of sae-lens.

Both serve the same activations in the same order, drawn from memory: no model is run. Printed are
CPU seconds to fill the buffer and to serve it, and the memory that this adds to the process at
most. Rounds alternate, and each has its own process.
"""

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch
from torch import Tensor

CONTEXT, PASS, BATCH, MIX = 128, 8192, 4096, 0.5
KINDS = ("sae-lens", "sae-whiten")


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    if args.child is not None:
        print(json.dumps(measure(args)))
        return
    size = args.sequences * CONTEXT * args.d_in * 4 / 1e6
    print(
        f"torch {torch.__version__}, sae-lens {version('sae-lens')}, 1 thread; buffer of "
        f"{size:.0f} MB, {args.batches} batches, medians of {args.rounds} rounds"
    )
    rounds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds):
        for kind, found in rounds.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--child", kind]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    sums = {of_round["sum"] for found in rounds.values() for of_round in found}
    assert len(sums) == 1, "they served other activations, or in another order"
    for name in ("seconds", "MB"):
        sae_lens, ours = (statistics.median(r[name] for r in rounds[kind]) for kind in KINDS)
        print(f"  {name:8} sae-lens {sae_lens:8.1f}  sae-whiten {ours:8.1f}  {ours / sae_lens:.2f}")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    batches = served_by_sae_lens(args) if args.child == "sae-lens" else served_by_us(args)
    before, begun = peak(), time.process_time()
    found = 0.0
    for number, batch in enumerate(islice(batches, args.batches)):
        found += (number + 1) * batch[0, 0].item()
    seconds = time.process_time() - begun
    return {"seconds": seconds, "MB": peak() - before, "sum": found}


def fresh(d_in: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.rand(PASS, d_in, generator=generator)


def served_by_sae_lens(args: argparse.Namespace) -> Iterator[Tensor]:
    from sae_lens.training.mixing_buffer import mixing_buffer

    torch.manual_seed(0)
    return mixing_buffer(
        buffer_size=args.sequences * CONTEXT,
        batch_size=BATCH,
        activations_loader=fresh(args.d_in),
        mix_fraction=MIX,
    )


def served_by_us(args: argparse.Namespace) -> Iterator[Tensor]:
    from datasets import Dataset
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TopKTrainingSAEConfig
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from sae_whiten import WhiteningTrainingRunner

    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=args.d_in, n_ctx=CONTEXT, d_head=64, d_vocab=10, act_fn="gelu"
        )
    )
    cfg = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(
            d_in=args.d_in, d_sae=16, k=1, normalize_activations="covariance_whitening"
        ),
        hook_name="blocks.0.hook_resid_post",
        dataset_path="",
        streaming=False,
        context_size=CONTEXT,
        n_batches_in_buffer=args.sequences,
        activations_mixing_fraction=MIX,
        train_batch_size_tokens=BATCH,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    tokens = Dataset.from_dict({"input_ids": [[1] * CONTEXT] * 100})
    runner = WhiteningTrainingRunner(cfg, override_model=model, override_dataset=tokens)
    store: Any = runner.activations_store
    store._iterate_filtered_activations = lambda: fresh(args.d_in)
    torch.manual_seed(0)
    return store.get_data_loader()


def peak() -> float:
    """The most memory that the process has had so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--d-in", type=int, default=768, help="width (default: %(default)s)")
    add("--sequences", type=int, default=1280, help="in the buffer, of 128 tokens (default: 1280)")
    add("--batches", type=int, default=60, help="to serve (default: %(default)s)")
    add("--rounds", type=int, default=3, help="(default: %(default)s)")
    add("--child", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
