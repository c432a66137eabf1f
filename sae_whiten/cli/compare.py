"""Find out whether whitening helps: train SAEs with and without it, all else being equal.

For every seed, SAEs of all architectures, conditions and sparsities are trained in lockstep on one
stream of activations. Initial weights are equal per architecture. The SAEs are evaluated as stock
SAELens SAEs on held-out sequences. The report has a table, paired differences over the seeds with
confidence intervals and corrected tests, and figures.

After an interruption, repeat the command: it continues from its last checkpoint. After it has
finished, repeat it with more --seeds or another --sparsity: it trains only what is missing.
"""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from sae_whiten.cli._model import ModelOptions
from sae_whiten.cli._options import add_options, help_of, options_from
from sae_whiten.cli._probes import add_probe_arguments, probed_texts
from sae_whiten.cli._values import positive
from sae_whiten.comparison.conditions import CONDITIONS
from sae_whiten.comparison.options import ComparisonOptions

_LISTED = "\n".join(f"  {name:24} {c.description}" for name, c in CONDITIONS.items())

EPILOG = f"""\
conditions (an architecture that cannot be trained under one is left out there):
{_LISTED}

example:
  sae-whiten compare --model-name gpt2 --hook-name blocks.6.hook_resid_pre \\
    --dataset-path monology/pile-uncopyrighted --context-size 256 --device cuda \\
    --conditions none,centred,whitened,original,half --architectures standard,topk \\
    --sparsity 16,32,64 --seeds 5 --out comparison
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add flags for the comparison, the model and the data, with SAELens' names."""
    add = parser.add_argument
    add_options(parser, ModelOptions)
    add("--dataset-path", required=True, help="dataset to load: a name on the hub, or a folder")
    add("--no-streaming", action="store_true", help="download the dataset first")
    add("--out", required=True, type=Path, metavar="DIRECTORY", help="where to write")
    add_options(
        parser,
        ComparisonOptions,
        without=("seeds", "exclude_special_tokens"),
        renamed={"store_batch_size_prompts": "batch_size_prompts"},
    )
    add(
        "--seeds",
        type=positive,
        default=len(ComparisonOptions.seeds),
        metavar="N",
        help=f"{help_of(ComparisonOptions, 'seeds')}: how many, from 0 (default: %(default)s)",
    )
    special = parser.add_mutually_exclusive_group()
    special.add_argument(
        "--exclude-special-tokens",
        nargs="+",
        type=int,
        default=ComparisonOptions.exclude_special_tokens,
        metavar="ID",
        help=f"{help_of(ComparisonOptions, 'exclude_special_tokens')} (default: the tokenizer's)",
    )
    special.add_argument(
        "--include-special-tokens",
        dest="exclude_special_tokens",
        action="store_false",
        help="keep special tokens, as SAELens does",
    )
    add_probe_arguments(parser.add_argument_group("probing"))


def run(args: argparse.Namespace) -> int:
    """Load model and data, compare, print the main metrics and write the report."""
    from sae_lens.load_model import load_model

    from sae_whiten._files import check_writable, read_json
    from sae_whiten._redaction import redacted
    from sae_whiten.comparison.compare import Comparison, compare
    from sae_whiten.comparison.data import describe_rows
    from sae_whiten.comparison.feature_page import write_feature_page
    from sae_whiten.comparison.files import SCORES_FILE, SETTINGS_FILE, saes_folder
    from sae_whiten.comparison.report.brief import terminal_text
    from sae_whiten.comparison.report.page import write_report
    from sae_whiten.comparison.summary import summarise
    from sae_whiten.estimation.dataset import check_columns, open_dataset
    from sae_whiten.estimation.models import naming_model

    n_seeds, args.seeds = args.seeds, range(args.seeds)
    comparison = options_from(args, Comparison)
    check_writable(args.out)
    dataset = open_dataset(args.dataset_path, streaming=not args.no_streaming)
    check_columns(dataset, args.dataset_path)
    # refuses too few rows before a model is loaded
    describe_rows(dataset, comparison.held_out_sequences)
    labels = probed_texts(args)
    names = options_from(args, ModelOptions).names()
    with naming_model(names["model_name"], names["model_class_name"]):
        model = load_model(**names, device=args.device)
    records = compare(
        comparison,
        model,
        dataset,
        args.out,
        **names,
        dataset_path=args.dataset_path,
        labels=labels,
    )
    page = write_feature_page(comparison, records, model, dataset, args.out, args.dataset_path)
    settings = read_json(args.out / SETTINGS_FILE)
    if (args.out / SCORES_FILE).is_file():
        settings["learning_rates_found"] = read_json(args.out / SCORES_FILE)
    settings["command"] = shlex.join(redacted(["sae-whiten", *sys.argv[1:]]))
    width = shutil.get_terminal_size().columns
    print(terminal_text(summarise(records, settings["sparsity"]), width))
    write_report(records, args.out, settings, targets=settings["sparsity"])
    print(f"\n{args.out / 'report.html'}: the whole report in one file")
    if page is not None:
        print(f"{page}: features of two of the SAEs side by side")
    print(
        "\nNext:\n"
        f"  this command with --seeds {n_seeds + 2}: detects smaller differences, and trains only "
        "what is missing\n"
        f"  sae-whiten features SAE SAE --out pair.html: any two of {saes_folder(args.out)}\n"
        "  sae-whiten train --help: an SAE of full length, under the condition of your choice"
    )
    return 0
