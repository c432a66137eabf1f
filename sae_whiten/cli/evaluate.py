"""Evaluate any SAEs that SAELens loads, on the model they were trained on.

Metrics: explained variance, L0, dead and dense latents on tokens of a dataset; the loss of the
model with activations replaced by reconstructions, if the model predicts next tokens; sparse
probing on labelled texts. The model reads the same tokens and texts for all SAEs. An SAE is not
evaluated at special tokens and positions that it was not trained on; where SAEs differ in this, a
warning and the report say so. By default the texts are code and docstrings of installed libraries.
They need no download, but depend on the versions of these libraries. --probes sae-probes selects
the field's standard tasks. Their data come with an extra: pip install "sae-whiten[probes]".
"""

import argparse
import json
from pathlib import Path

from sae_whiten.cli._options import add_options, options_from
from sae_whiten.cli._probes import add_probe_arguments, probed_texts
from sae_whiten.cli._saes import (
    add_dataset_arguments,
    add_model_arguments,
    add_saes_arguments,
    load_saes,
    model_and_dataset,
    require_source,
)
from sae_whiten.comparison.files import RESULTS_FILE, SETTINGS_FILE
from sae_whiten.evaluation.options import EvaluationOptions

EPILOG = """\
examples:
  sae-whiten evaluate sae-whitened sae-plain --dataset-split 'train[99%:]' --out report
  sae-whiten evaluate gpt2-small-res-jb/blocks.6.hook_resid_pre \\
    --dataset-path Skylion007/openwebtext --probes sae-probes --out report
"""

_OF_PROBING = ("seed", "probe_seeds", "tpp_and_scr")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the SAEs, the sources of model, tokens and texts, and the output."""
    add_saes_arguments(parser)
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIRECTORY",
        help="where to write; an earlier evaluation there is replaced, a comparison is refused",
    )
    add_model_arguments(parser)

    group = parser.add_argument_group("tokens")
    add_dataset_arguments(group)
    add_options(group, EvaluationOptions, without=_OF_PROBING)

    group = parser.add_argument_group("probing")
    add_probe_arguments(group)
    add_options(group, EvaluationOptions, only=_OF_PROBING)


def run(args: argparse.Namespace) -> int:
    """Load, evaluate, write results.jsonl and table.md, and print the table."""
    from sae_whiten._files import check_writable, write_json_lines
    from sae_whiten.comparison.report.evaluation import evaluation_table
    from sae_whiten.comparison.report.page import write_report
    from sae_whiten.evaluation.evaluate import evaluate_saes

    options = options_from(args, EvaluationOptions)
    check_writable(args.out)
    _refuse_other_results(args.out)
    saes = load_saes(args.saes, args.device)
    require_source(args, saes)
    labels = probed_texts(args, args.seed)
    model, dataset, source = model_and_dataset(args, saes, args.context_size)
    names = {name: source[name] for name in ("model_name", "dataset_path", "dataset_split")}
    records = evaluate_saes(saes, model, dataset, labels, options)
    for record in records:
        record.update(names)
    write_json_lines(args.out / RESULTS_FILE, records)
    settings = {
        **names,
        "labels": None if labels is None else dict(labels.source),
    }
    write_report(records, args.out, settings)
    print(evaluation_table(records, others=False))
    print(f"saved in {args.out}: report.html is the whole report in one file")
    return 0


def _refuse_other_results(out: Path) -> None:
    """Refuse a folder with records of trainings, which this command would replace."""
    results = out / RESULTS_FILE
    lines = results.read_text().splitlines() if results.is_file() else []
    if (out / SETTINGS_FILE).is_file() or not all(map(_is_evaluation, lines)):
        raise ValueError(
            f"--out {out}: holds the results of a comparison, which would be replaced; choose "
            "another folder"
        )


def _is_evaluation(line: str) -> bool:
    """Whether a line of results.jsonl is a record of this command."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:  # cut off while a training was written
        return False
    # records of compare have metrics and a condition, those of synthetic have no metrics
    return "metrics" in record and "condition" not in record
