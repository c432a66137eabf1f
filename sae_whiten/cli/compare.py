"""Find out whether whitening helps: train SAEs with and without it, all else being equal.

For every seed, SAEs of all architectures, conditions and sparsities are trained in lockstep on one
stream of activations, with equal initial weights per architecture, and evaluated as stock SAELens
SAEs on sequences that none was trained on. The report has a table, paired differences over the
seeds with confidence intervals and corrected tests, and figures.

conditions: none (SAELens without normalisation), centred (only the mean removed),
expected_average_only_in (SAELens), whitened (loss in whitened space, as the SAELens built-in),
original (loss in the original space, the paper's), original_norms (the same, and sparsity charged
by decoder norms of the original space), original_zca (as original, by ZCA), half (strength 0.5,
loss in its own space). Where an architecture cannot be trained under a condition it is left out.

Killed, it goes on from its last checkpoint when the same command is repeated; with more --seeds or
another --sparsity, once it is done, it adds those that are missing.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from sae_whiten.cli._values import json_object

EPILOG = """\
example:
  sae-whiten compare --model-name gpt2 --hook-name blocks.6.hook_resid_pre \\
    --dataset-path monology/pile-uncopyrighted --context-size 256 --device cuda \\
    --conditions none,centred,whitened,original,half --architectures standard,topk \\
    --sparsity 16,32,64 --seeds 5 --out comparison
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is compared and what it is trained on, with SAELens' names."""
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
        type=json_object,
        metavar="JSON",
        help="further arguments for loading the model, as in SAELens",
    )
    add("--hook-name", required=True, help="the hook")
    add("--dataset-path", required=True, help="dataset to load: a name on the hub, or a folder")
    add("--no-streaming", action="store_true", help="download the dataset first")
    add("--out", required=True, type=Path, metavar="DIRECTORY", help="where to write")
    add(
        "--conditions",
        type=_names,
        default=["none", "centred", "whitened", "original", "half"],
        metavar="A,B,...",
        help="see above (default: none,centred,whitened,original,half)",
    )
    add(
        "--architectures",
        type=_names,
        default=["topk", "standard"],
        metavar="A,B,...",
        help="SAELens' training architectures, topk_vsae and top_afa (default: topk,standard)",
    )
    add(
        "--sparsity",
        type=_integers,
        default=[16, 32, 64],
        metavar="N,N,...",
        help="k, or the L0 at which sweeps of --coefficients are read off; top_afa has neither "
        "and is compared at the L0 that it comes to (default: 16,32,64)",
    )
    add(
        "--coefficients",
        type=_floats,
        default=[0.5, 1.0, 2.0, 4.0, 8.0],
        metavar="X,X,...",
        help="sparsity coefficients of architectures without k, as for activations of variance 1 "
        "(default: 0.5,1,2,4,8)",
    )
    add(
        "--sae-options",
        type=json_object,
        default={},
        metavar="JSON",
        help="further fields of the training configs by architecture, such as "
        """'{"topk_vsae": {"variance": "fixed", "initial_logvar": -5}}'; kl_coefficient is as """
        "for activations of variance 1, all others are taken as they are",
    )
    add("--seeds", type=int, default=3, help="how many, from 0 (default: %(default)s)")
    add("--d-sae", type=int, help="latents (default: 8 times the width)")
    add("--training-tokens", type=int, default=2_000_000, help="(default: %(default)s)")
    add("--train-batch-size-tokens", type=int, default=4096, help="(default: %(default)s)")
    add("--lr", type=float, default=3e-4, help="learning rate (default: %(default)s)")
    add("--context-size", type=int, default=128, help="(default: %(default)s)")
    add("--prepend-bos", action=argparse.BooleanOptionalAction, default=True)
    special = parser.add_mutually_exclusive_group()
    special.add_argument(
        "--exclude-special-tokens",
        nargs="+",
        type=int,
        metavar="ID",
        help="leave out the activations at tokens with these ids (default: those that the "
        "tokenizer names; in many models they hold most of the variance)",
    )
    special.add_argument(
        "--include-special-tokens", action="store_true", help="leave out none, as SAELens does"
    )
    add("--batch-size-prompts", type=int, default=16, help="sequences per pass of the model")
    add(
        "--held-out-sequences",
        type=int,
        default=256,
        help="rows of the dataset to evaluate on instead of training; of long texts only the "
        "beginning (default: %(default)s)",
    )
    add("--device", default="cpu", help="(default: %(default)s)")
    add("--no-probing", action="store_true", help="leave out sparse probing, TPP and SCR")
    add(
        "--labels-dataset",
        metavar="PATH",
        help="texts to probe with: a dataset with the columns below (default: docstrings and code "
        "of installed libraries)",
    )
    add("--text-column", default="text", help="(default: %(default)s)")
    add(
        "--label-column",
        nargs="+",
        default=["label"],
        help="one, or two for SCR (default: label)",
    )


def run(args: argparse.Namespace) -> int:
    """Load model and data, compare, write the report and print its table."""
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds}: at least one")
    from sae_lens.load_model import load_model

    from sae_whiten._redaction import redacted
    from sae_whiten.comparison.compare import Comparison, compare
    from sae_whiten.comparison.data import describe_rows
    from sae_whiten.comparison.report import write_report
    from sae_whiten.estimation.dataset import open_dataset
    from sae_whiten.evaluation.labels import dataset_texts, library_texts

    exclude = args.exclude_special_tokens
    comparison = Comparison(
        hook_name=args.hook_name,
        conditions=args.conditions,
        architectures=args.architectures,
        sparsity=args.sparsity,
        coefficients=args.coefficients,
        sae_options=args.sae_options,
        seeds=range(args.seeds),
        d_sae=args.d_sae,
        training_tokens=args.training_tokens,
        train_batch_size_tokens=args.train_batch_size_tokens,
        lr=args.lr,
        context_size=args.context_size,
        prepend_bos=args.prepend_bos,
        exclude_special_tokens=not args.include_special_tokens if exclude is None else exclude,
        store_batch_size_prompts=args.batch_size_prompts,
        held_out_sequences=args.held_out_sequences,
        device=args.device,
    )
    dataset = open_dataset(args.dataset_path, streaming=not args.no_streaming)
    # too few rows are refused before a model is loaded
    describe_rows(dataset, comparison.held_out_sequences)
    labels: Any
    if args.no_probing:
        labels = None
    elif args.labels_dataset is not None:
        texts = open_dataset(args.labels_dataset)
        labels = dataset_texts(texts, args.label_column, args.text_column)
    else:
        labels = library_texts()
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
    records = compare(
        comparison,
        model,
        dataset,
        args.out,
        model_name=args.model_name,
        model_class_name=args.model_class_name,
        model_from_pretrained_kwargs=kwargs,
        dataset_path=args.dataset_path,
        labels=labels,
    )
    settings = json.loads((args.out / "settings.json").read_text())
    settings["command"] = shlex.join(redacted(["sae-whiten", *sys.argv[1:]]))
    write_report(records, args.out, settings, targets=settings["sparsity"])
    print((args.out / "table.md").read_text())
    print(f"\nsaved in {args.out}: report.html is the whole report in one file")
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _integers(text: str) -> list[int]:
    return [int(part) for part in _names(text)]


def _floats(text: str) -> list[float]:
    return [float(part) for part in _names(text)]
