"""Evaluate any SAEs that SAELens loads, on the model they were trained on.

Metrics: explained variance, L0, dead and dense latents on tokens of a dataset; the loss of the
model with activations replaced by reconstructions, if the model predicts next tokens; sparse
probing on labelled texts. All SAEs see the same tokens and texts. By default the texts are code and
docstrings of installed libraries. They need no download, but depend on the versions of these
libraries. --probes sae-probes selects the field's standard tasks. Their data come with an extra:
pip install "sae-whiten[probes]"
"""

import argparse
import json
from pathlib import Path

from sae_whiten.cli._probes import add_probe_arguments, probed_texts
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

EPILOG = """\
examples:
  sae-whiten evaluate sae-whitened sae-plain --dataset-split 'train[99%:]' --out report
  sae-whiten evaluate gpt2-small-res-jb/blocks.6.hook_resid_pre \\
    --dataset-path Skylion007/openwebtext --probes sae-probes --out report
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the SAEs, the sources of model, tokens and texts, and the output."""
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

    group = parser.add_argument_group("probing")
    add_probe_arguments(group)
    add = group.add_argument
    add(
        "--probe-seeds",
        type=positive,
        default=3,
        metavar="N",
        help="how many times it is done, each time with other rows, to know its noise (default: "
        "%(default)s)",
    )
    add(
        "--tpp-and-scr",
        action="store_true",
        help="measure TPP and SCR too; both have been shown to mislead (arXiv 2605.18229)",
    )


def run(args: argparse.Namespace) -> int:
    """Load, evaluate, write results.jsonl and table.md, and print the table."""
    from sae_whiten._files import atomic_path, check_writable
    from sae_whiten._redaction import redacted
    from sae_whiten.comparison.report.evaluation import evaluation_table
    from sae_whiten.comparison.report.page import write_report
    from sae_whiten.evaluation.evaluate import evaluate_saes

    check_writable(args.out)
    saes = load_saes(args.saes, args.device)
    source = model_source(args, saes)
    model_name = source["model_name"]
    dataset_path = dataset_path_of(args, saes)
    labels = probed_texts(args, args.seed)
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
        probe_seeds=args.probe_seeds,
        tpp_and_scr=args.tpp_and_scr,
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
    print(evaluation_table(records, others=False))
    print(f"saved in {args.out}: report.html is the whole report in one file")
    return 0
