"""Evaluate SAEs on the model they were trained on: any that SAELens loads, trained with us or not.

Explained variance, L0, dead and dense latents on tokens of a dataset; the loss of the model with
reconstructions in the place of activations, if its predictions mean something; sparse probing,
TPP and SCR on labelled texts. All SAEs see the same tokens and texts. The texts are by default code
and docstrings of libraries installed here, so that they need no download; but they change with the
versions of these libraries.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sae_whiten.cli._saes import (
    add_dataset_arguments,
    add_model_arguments,
    add_saes_argument,
    add_sequence_arguments,
    dataset_path_of,
    load_model_of,
    load_saes,
    model_source,
    open_dataset_of,
)
from sae_whiten.cli._values import positive

if TYPE_CHECKING:
    from sae_whiten.evaluation.labels import LabelledTexts

EPILOG = """\
examples:
  sae-whiten evaluate sae-whitened sae-plain --dataset-split 'train[99%:]' --out report
  sae-whiten evaluate gpt2-small-res-jb/blocks.6.hook_resid_pre \\
    --dataset-path Skylion007/openwebtext --labels-dataset fancyzhx/ag_news --out report
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the SAEs, where the model, the tokens and the texts come from, and the output."""
    add_saes_argument(parser)
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIRECTORY", help="where to write")
    add("--device", default="cpu", help="of the model and the SAEs (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the choice of texts (default: %(default)s)")

    add_model_arguments(parser)

    group = parser.add_argument_group("tokens")
    add_dataset_arguments(group)
    add = group.add_argument
    add("--n-tokens", type=positive, default=65_536, help="tokens to read (default: %(default)s)")
    add_sequence_arguments(group)

    add = parser.add_argument_group("probing").add_argument
    add("--no-probing", action="store_true", help="leave it out")
    add(
        "--labels-dataset",
        metavar="PATH",
        help="dataset with texts and labels, on the hub or a folder",
    )
    add("--text-column", default="text", metavar="NAME", help="of it (default: %(default)s)")
    add(
        "--label-column",
        nargs="+",
        default=["label"],
        metavar="NAME",
        help="of it (default: label); a second one, with two values, is what SCR needs",
    )
    add(
        "--n-texts",
        type=positive,
        default=100,
        metavar="N",
        help="texts with each (combination of) label(s), to fit probes and as many to score them "
        "(default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Load, evaluate, write results.jsonl and table.md, and print the table."""
    from sae_whiten._files import atomic_path, check_writable
    from sae_whiten._redaction import redacted
    from sae_whiten.comparison.report import write_report
    from sae_whiten.evaluation.evaluate import evaluate_saes

    check_writable(args.out)
    saes = load_saes(args.saes, args.device)
    source = model_source(args, saes)
    model_name = source["model_name"]
    dataset_path = dataset_path_of(args, saes)
    labels = None if args.no_probing else _labels(args)
    dataset = open_dataset_of(args, dataset_path)
    model = load_model_of(source, args.device, args.context_size)
    records = evaluate_saes(
        saes,
        model,
        dataset,
        labels,
        n_tokens=args.n_tokens,
        context_size=args.context_size,
        prepend_bos=args.prepend_bos,
        batch_size_prompts=args.batch_size_prompts,
        seed=args.seed,
    )
    for record in records:
        record.update(
            model_name=model_name, dataset_path=dataset_path, dataset_split=args.dataset_split
        )
    with atomic_path(args.out / "results.jsonl") as partial:
        partial.write_text("".join(json.dumps(redacted(r), default=str) + "\n" for r in records))
    settings = {
        "model_name": model_name,
        "dataset_path": dataset_path,
        "dataset_split": args.dataset_split,
        "labels": None if labels is None else dict(labels.source),
    }
    write_report(records, args.out, settings)
    print((args.out / "table.md").read_text())
    for why in dict.fromkeys(why for record in records for why in record["absent"].values()):
        print(f"Not measured: {why}")
    print(f"saved in {args.out}: report.html is the whole report in one file")
    return 0


def _labels(args: argparse.Namespace) -> "LabelledTexts":
    from sae_whiten.evaluation.labels import dataset_texts, library_texts

    if args.labels_dataset is None:
        return library_texts(args.n_texts, args.seed)
    return dataset_texts(
        args.labels_dataset, args.label_column, args.text_column, args.n_texts, args.seed
    )
