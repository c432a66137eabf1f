"""Estimate the mean and covariance of the activations at many hooks, in one pass over a dataset.

The model runs once for all hooks and stops after the last; no activation is kept. Estimation ends
when held-out activations would have at most --tolerance too much variance under the whitening, as
two halves of the samples tell of each other. The result is a folder with one file per hook, for
sae-whiten train --whitening.statistics.
"""

import argparse
import json
from pathlib import Path
from typing import Any

EPILOG = """\
example:
  sae-whiten fit --model-name gpt2 --dataset-path monology/pile-uncopyrighted \\
    --hook-name 'blocks.*.hook_resid_pre' --context-size 256 --out gpt2-stats
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the estimation, with SAELens' names and defaults."""
    add = parser.add_argument
    add("--model-name", required=True, help="model to load, as in SAELens")
    add(
        "--model-class-name",
        default="HookedTransformer",
        help="HookedTransformer, or AutoModelForCausalLM for any model of transformers "
        "(default: %(default)s)",
    )
    add(
        "--model-from-pretrained-kwargs",
        type=json.loads,
        metavar="JSON",
        help="further arguments for loading the model, as in SAELens, such as a revision",
    )
    add("--dataset-path", required=True, help="dataset to load: a name on the hub, or a folder")
    add(
        "--hook-name",
        required=True,
        nargs="+",
        metavar="PATTERN",
        help="hooks, or glob patterns in quotes such as 'blocks.*.hook_resid_pre'",
    )
    add("--hook-head-index", type=int, help="one head of hooks with a head dimension")
    add("--out", required=True, type=Path, metavar="DIRECTORY", help="where to write")
    add(
        "--tolerance",
        type=float,
        default=0.02,
        help="excess variance of held-out activations to reach (default: %(default)s)",
    )
    add("--n-samples", type=int, help="take so many activations per hook instead")
    add("--max-samples", type=int, help="take at most so many (default: 2000 per dimension)")
    add("--context-size", type=int, default=128, help="tokens per sequence (default: %(default)s)")
    add("--batch-size-prompts", type=int, default=32, help="sequences per pass of the model")
    add(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put the beginning-of-sequence token in front, as training will",
    )
    add(
        "--exclude-special-tokens",
        action="store_true",
        help="leave out the activations at special tokens, as training will",
    )
    add("--no-streaming", action="store_true", help="download the dataset first")
    add("--device", default="cpu", help="where the model runs (default: %(default)s)")
    add(
        "--on-nonfinite",
        choices=("raise", "skip"),
        default="raise",
        help="activations with NaN or infinity (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Load the model, estimate, and write one file per hook."""
    from sae_lens.load_model import load_model

    from sae_whiten.saelens.collect import fit_statistics
    from sae_whiten.saelens.provenance import statistics_file

    kwargs = args.model_from_pretrained_kwargs
    if kwargs is None:  # as in SAELens' runner
        hooked = args.model_class_name == "HookedTransformer"
        kwargs = {"center_writing_weights": False} if hooked else {}
    model = load_model(
        args.model_class_name,
        args.model_name,
        device=args.device,
        model_from_pretrained_kwargs=kwargs,
    )
    provenance: dict[str, Any] = {
        "model_from_pretrained_kwargs": kwargs,
        "model_name": args.model_name,
        "model_class_name": args.model_class_name,
        "dataset_path": args.dataset_path,
    }
    statistics = fit_statistics(
        model,
        args.dataset_path,
        args.hook_name,
        tolerance=args.tolerance,
        n_samples=args.n_samples,
        max_samples=args.max_samples,
        context_size=args.context_size,
        batch_size_prompts=args.batch_size_prompts,
        prepend_bos=args.prepend_bos,
        exclude_special_tokens=args.exclude_special_tokens,
        hook_head_index=args.hook_head_index,
        streaming=not args.no_streaming,
        on_nonfinite=args.on_nonfinite,
        provenance=provenance,
    )
    for hook_name, found in statistics.items():
        found.save(statistics_file(args.out, hook_name))
        print(
            f"{hook_name}: {found.n_samples} activations of width {found.d_in}, held-out excess "
            f"variance {found.provenance['inflation']:.2%}"
        )
    print(f"\nsaved in {args.out}. Next:\n  sae-whiten inspect {args.out}")
    print(f"  sae-whiten train --whitening.statistics {args.out} ...")
    return 0
