"""Estimate the mean and covariance of the activations at many hooks, in one pass over a dataset.

The model runs once for all hooks and stops after the last; no activation is kept. Estimation stops
when held-out activations would have an excess variance of at most --tolerance under the whitening.
The excess is estimated by comparing two halves of the samples. The result is a folder with one file
per hook, for sae-whiten train --whitening.statistics.

After an interruption, repeat the command: it continues from the last save. Finished statistics in
--out are replaced, with a warning if they were estimated under other settings. Under torchrun,
every process reads its share of the dataset, and the result covers all shares.
"""

import argparse
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_whiten.cli._model import ModelOptions
from sae_whiten.cli._options import add_options, help_of, options_from
from sae_whiten.cli._spelling import flag_of
from sae_whiten.estimation.options import FitConfig, ReadingConfig

if TYPE_CHECKING:
    from sae_whiten.statistics import ActivationStatistics

EPILOG = """\
examples:
  sae-whiten fit --model-name gpt2 --dataset-path monology/pile-uncopyrighted \\
    --hook-name 'blocks.*.hook_resid_pre' --context-size 256 --out gpt2-stats
  torchrun --nproc-per-node 8 -m sae_whiten fit --device cuda ...
  sae-whiten fit --cached-activations activations --hook-name '**' --out stats
"""


_LOADING = ("model_class_name", "model_from_pretrained_kwargs", "device")
_READING = tuple(field.name for field in fields(ReadingConfig))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the estimation, with SAELens' names and defaults."""
    add = parser.add_argument
    add("--model-name", help=help_of(ModelOptions, "model_name"))
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
        help="hooks, or glob patterns in quotes such as 'blocks.*.hook_resid_pre'; * stops at a "
        "dot, ** does not",
    )
    add("--out", required=True, type=Path, metavar="DIRECTORY", help="where to write")
    add(
        "--push-to-hub",
        metavar="USER/NAME",
        help="also upload the result to this repo of the Hugging Face hub, which is created if "
        "needed",
    )
    add_options(
        parser,
        FitConfig,
        without=(*_READING, "exclude_special_tokens"),
        absent_by_default=True,
    )
    add(
        "--exclude-special-tokens",
        nargs="*",
        type=int,
        metavar="ID",
        help=f"{help_of(FitConfig, 'exclude_special_tokens')}. Without ids: the tokenizer's",
    )
    model = parser.add_argument_group(
        "running the model",
        "Give the same values as in training. Not with --cached-activations, which are used as "
        "they are.",
    )
    add_options(model, ModelOptions, without=("model_name",), absent_by_default=True)
    model.add_argument(
        "--device", default=argparse.SUPPRESS, help="where the model runs (default: cpu)"
    )
    add_options(model, FitConfig, only=_READING, absent_by_default=True)


def run(args: argparse.Namespace) -> int:
    """Load the model, estimate, and write one file per hook."""
    given = [args.model_name, args.dataset_path]
    if args.cached_activations is None and None in given:
        raise ValueError("give --model-name and --dataset-path, or --cached-activations")
    if args.cached_activations is not None and given != [None, None]:
        raise ValueError("--cached-activations replaces --model-name and --dataset-path")
    unusable = [name for name in (*_LOADING, *_READING) if hasattr(args, name)]
    if args.cached_activations is not None and unusable:
        listed = ", ".join(map(flag_of, unusable))
        raise ValueError(f"cached activations are used as they are: leave out {listed}")
    from sae_whiten.estimation.distributed import joined_processes

    with joined_processes() as rank:
        statistics = _fit(args)
    if rank > 0:
        return 0
    for hook_name, hook_statistics in statistics.items():
        excess = hook_statistics.provenance["inflation"]
        print(
            f"{hook_name}: {hook_statistics.n_samples} activations of width "
            f"{hook_statistics.d_in}, held-out excess variance "
            f"{'unknown' if excess is None else f'{excess:.2%}'}"
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

    # without any id, the list is empty
    excluded = args.exclude_special_tokens is not None and (args.exclude_special_tokens or True)
    config = replace(options_from(args, FitConfig), exclude_special_tokens=excluded)
    options: dict[str, Any] = {"config": config, "out": args.out}
    if args.cached_activations is not None:
        source = args.cached_activations
        return fit_statistics(None, None, args.hook_name, cached_activations=source, **options)

    from sae_lens.load_model import load_model

    from sae_whiten.estimation.dataset import check_columns, is_on_this_machine, open_dataset
    from sae_whiten.estimation.models import naming_model

    if is_on_this_machine(args.dataset_path):
        # before the model is loaded
        dataset = open_dataset(args.dataset_path, config.split, streaming=True)
        check_columns(dataset, args.dataset_path, config.use_chat_formatting)
    names = options_from(args, ModelOptions).names()
    device = getattr(args, "device", "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # from torchrun: one GPU per process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    with naming_model(names["model_name"], names["model_class_name"]):
        model = load_model(**names, device=device)
    return fit_statistics(model, args.dataset_path, args.hook_name, provenance=names, **options)
