"""Estimate the mean and covariance of the activations at many hooks, in one pass over a dataset.

The model runs once for all hooks and stops after the last; no activation is kept. Estimation ends
when held-out activations would have at most --tolerance too much variance under the whitening, as
two halves of the samples tell of each other. The result is a folder with one file per hook, for
sae-whiten train --whitening.statistics.

Killed, it goes on from where it was last saved when the same command is repeated. Started
by torchrun, every process takes its share of the dataset, and the result is that of all.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_whiten.cli._values import json_object

if TYPE_CHECKING:
    from sae_whiten.statistics import ActivationStatistics

EPILOG = """\
examples:
  sae-whiten fit --model-name gpt2 --dataset-path monology/pile-uncopyrighted \\
    --hook-name 'blocks.*.hook_resid_pre' --context-size 256 --out gpt2-stats
  torchrun --nproc-per-node 8 -m sae_whiten fit --device cuda ...
  sae-whiten fit --cached-activations activations --hook-name '*' --out stats
"""


# by the names that they have in Python; what is not given is left to the defaults there
_LOADING = ("model_class_name", "model_from_pretrained_kwargs", "device")
_READING = (
    "split",
    "context_size",
    "prepend_bos",
    "seqpos_slice",
    "hook_head_index",
    "disable_concat_sequences",
    "sequence_separator_token",
    "use_chat_formatting",
    "streaming",
    "autocast_lm",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the estimation, with SAELens' names and defaults."""
    add = parser.add_argument
    add("--model-name", help="model to load, as in SAELens")
    add("--dataset-path", help="dataset to load: a name on the hub, or a folder")
    add(
        "--cached-activations",
        metavar="DIRECTORY",
        help="read activations that SAELens' CacheActivationsRunner wrote, instead of --model-name "
        "and --dataset-path",
    )
    add(
        "--hook-name",
        required=True,
        nargs="+",
        metavar="PATTERN",
        help="hooks, or glob patterns in quotes such as 'blocks.*.hook_resid_pre'",
    )
    add("--out", required=True, type=Path, metavar="DIRECTORY", help="where to write")
    add(
        "--push-to-hub",
        metavar="USER/NAME",
        help="upload the result to this repo of the Hugging Face hub too, which is made if need be",
    )
    add(
        "--tolerance",
        type=float,
        default=0.02,
        help="excess variance of held-out activations to reach (default: %(default)s)",
    )
    add("--n-samples", type=_count, help="take so many activations per hook instead")
    add(
        "--max-samples",
        type=_count,
        help="with --tolerance, take at most so many per hook (default: 1000 per dimension)",
    )
    add("--batch-size-prompts", type=_count, default=32, help="sequences per pass of the model")
    add(
        "--exclude-special-tokens",
        nargs="*",
        type=int,
        metavar="ID",
        help="leave out the activations at special tokens, as training will: those with these ids, "
        "or, without any, those that the tokenizer names (BOS, EOS, PAD, SEP)",
    )
    add(
        "--on-nonfinite",
        choices=("raise", "skip"),
        default="raise",
        help="activations with NaN or infinity (default: %(default)s)",
    )
    model = parser.add_argument_group(
        "running the model",
        "As training will. These do not go with --cached-activations, which are taken as they are.",
    )
    add = partial(model.add_argument, default=argparse.SUPPRESS)
    add(
        "--model-class-name",
        help="HookedTransformer, or AutoModelForCausalLM for any model of transformers "
        "(default: HookedTransformer)",
    )
    add(
        "--model-from-pretrained-kwargs",
        type=json_object,
        metavar="JSON",
        help="further arguments for loading the model, as in SAELens, such as a revision",
    )
    add("--device", help="where the model runs (default: cpu)")
    add("--autocast-lm", action="store_true", help="run the model in bfloat16 autocast")
    add("--split", help="split of the dataset; training takes train (default: train)")
    add(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        help="do not download the dataset first (default: yes)",
    )
    add("--context-size", type=_count, help="tokens per sequence (default: 128)")
    add(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        help="put the beginning-of-sequence token in front (default: yes)",
    )
    add(
        "--disable-concat-sequences",
        action="store_true",
        help="one document per sequence, and shorter ones dropped",
    )
    add(
        "--sequence-separator-token",
        type=_separator,
        metavar="bos|eos|sep|none|ID",
        help="between documents (default: bos)",
    )
    add("--use-chat-formatting", action="store_true", help="tokenise with the chat template")
    add(
        "--seqpos-slice",
        type=_index,
        nargs="+",
        metavar="N",
        help="positions to take: stop, or start stop, or start stop step; none for an open end",
    )
    add("--hook-head-index", type=int, help="one head of hooks with a head dimension")


def run(args: argparse.Namespace) -> int:
    """Load the model, estimate, and write one file per hook."""
    given = [args.model_name, args.dataset_path]
    if args.cached_activations is None and None in given:
        raise ValueError("give --model-name and --dataset-path, or --cached-activations")
    if args.cached_activations is not None and given != [None, None]:
        raise ValueError("--cached-activations takes the place of --model-name and --dataset-path")
    if args.n_samples is not None and args.max_samples is not None:
        raise ValueError(
            "--max-samples limits what --tolerance takes: leave it out with --n-samples"
        )
    idle = [name for name in (*_LOADING, *_READING) if hasattr(args, name)]
    if args.cached_activations is not None and idle:
        listed = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise ValueError(f"cached activations are taken as they are: leave out {listed}")
    from sae_whiten.estimation.distributed import joined_processes

    with joined_processes() as rank:
        statistics = _fit(args)
    if rank > 0:
        return 0
    for hook_name, found in statistics.items():
        excess = found.provenance["inflation"]
        print(
            f"{hook_name}: {found.n_samples} activations of width {found.d_in}, held-out excess "
            f"variance {'unknown' if excess is None else f'{excess:.2%}'}"
        )
    print(f"\nsaved in {args.out}")
    source = str(args.out)
    if args.push_to_hub is not None:
        from sae_whiten.estimation.folders import push_folder

        source = args.push_to_hub
        print(f"uploaded: {push_folder(args.out, source)}")
    print(f"\nNext:\n  sae-whiten inspect {args.out}")
    print(f"  sae-whiten train --whitening.statistics {source} ...")
    return 0


def _fit(args: argparse.Namespace) -> "dict[str, ActivationStatistics]":
    from sae_whiten.estimation.fit import fit_statistics

    exclude = args.exclude_special_tokens
    options: dict[str, Any] = {
        "out": args.out,
        "tolerance": args.tolerance,
        "n_samples": args.n_samples,
        "max_samples": args.max_samples,
        "batch_size_prompts": args.batch_size_prompts,
        "exclude_special_tokens": False if exclude is None else (exclude or True),
        "on_nonfinite": args.on_nonfinite,
    }
    if args.cached_activations is not None:
        source = args.cached_activations
        return fit_statistics(None, None, args.hook_name, cached_activations=source, **options)

    from sae_lens.load_model import load_model

    class_name = getattr(args, "model_class_name", "HookedTransformer")
    kwargs = getattr(args, "model_from_pretrained_kwargs", None)
    if kwargs is None:  # as in SAELens' runner
        kwargs = {"center_writing_weights": False} if class_name == "HookedTransformer" else {}
    device = getattr(args, "device", "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # from torchrun: one GPU per process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    model = load_model(
        class_name, args.model_name, device=device, model_from_pretrained_kwargs=kwargs
    )
    provenance: dict[str, Any] = {
        "model_from_pretrained_kwargs": kwargs,
        "model_name": args.model_name,
        "model_class_name": class_name,
    }
    options |= {name: getattr(args, name) for name in _READING if hasattr(args, name)}
    if "seqpos_slice" in options:
        options["seqpos_slice"] = tuple(options["seqpos_slice"])
    return fit_statistics(
        model, args.dataset_path, args.hook_name, provenance=provenance, **options
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def _index(text: str) -> int | None:
    return None if text == "none" else int(text)


def _separator(text: str) -> Any:
    if text == "none":
        return None
    if text in ("bos", "eos", "sep"):
        return text
    return int(text)
