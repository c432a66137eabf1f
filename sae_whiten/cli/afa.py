"""Are codes of SAEs as large as their inputs? eps-LBO and the ZF plot, for any SAE of SAELens.

If features are nearly orthogonal, the norm of a sparse code is close to the norm of its input
(Lee et al., arXiv 2503.24277). This command compares the two norms at the last token of each
prompt. Every row of a dataset is a prompt. Columns of the table (h is the number of latents):

eps-LBO: smallest bound on inner products between features that fits both norms, mean and median;
NMSE: squared error over squared norm of the activation; L0: active latents; over, under: share of
prompts whose code is larger, smaller than the input; bands: share with eps-LBO (h - 1) at most
0.25, 0.5, 1; norms: Pearson correlation of the two norms; pearson, spearman: correlations of NMSE
and eps-LBO; bias: norm of the decoder bias over the mean norm of the codes. The bias is one entry
of every code. If this ratio is near 1, the other columns describe little but the bias. This happens
if the mean of the activations is large relative to their spread and is folded into the bias, as
after whitening.

Writes afa.json, with the values of every prompt; zf.png and .pdf, code against input; violins.png
and .pdf, the distributions of NMSE and eps-LBO.
"""

import argparse
from pathlib import Path

from sae_whiten.cli._options import add_options, options_from
from sae_whiten.cli._saes import (
    add_dataset_arguments,
    add_model_arguments,
    add_saes_arguments,
    load_saes,
    model_and_dataset,
)
from sae_whiten.lenses.options import AFAOptions

EPILOG = """\
examples:
  sae-whiten afa sae-whitened sae-plain --dataset-split 'train[99%:]' --out afa
  sae-whiten afa gpt2-small-res-jb/blocks.{4,6,8}.hook_resid_pre \\
    --dataset-path Skylion007/openwebtext --n-prompts 1000 --out afa
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the SAEs, the sources of model and prompts, and the output."""
    add_saes_arguments(parser)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIRECTORY", help="where to write"
    )
    add_model_arguments(parser)

    group = parser.add_argument_group("prompts")
    add_dataset_arguments(group)
    add_options(group, AFAOptions)


def run(args: argparse.Namespace) -> int:
    """Load, evaluate, write the JSON and the figures, and print the table."""
    from sae_whiten.lenses.afa.measure import evaluate_afa
    from sae_whiten.lenses.afa.report import table, write_report

    options = options_from(args, AFAOptions)
    saes = load_saes(args.saes, args.device)
    model, dataset, source = model_and_dataset(args, saes, args.context_size)
    results = evaluate_afa(saes, model, dataset, options)
    written = write_report(results, args.out, source)
    print(table(results))
    print(f"\nsaved in {args.out}: {', '.join(written)}")
    return 0
