"""Are codes of SAEs as large as their inputs? eps-LBO and the ZF plot, for any that SAELens loads.

If the features were nearly orthogonal, the norm of a sparse code would be about that of its input
(Lee et al., arXiv 2503.24277). At the last token of each prompt, one prompt for each row of a
dataset, the norm of the code is set beside the norm of the input. In the table, h is the number of
latents, and means are over the prompts:

eps-LBO: the smallest largest inner product between features that fits both norms, mean and median;
NMSE: squared error over squared norm of the activation; L0: active latents; over, under: share of
prompts whose code is larger, smaller than the input; the bands: share with eps-LBO (h - 1) at most
0.25, 0.5, 1; norms: Pearson's correlation of the two norms; pearson, spearman: correlations of NMSE
and eps-LBO; bias: norm of the decoder bias, which is one entry of every code, over the mean norm of
the codes. Near 1 the bias is all that these figures are of: so it is where the mean of the
activations is large beside their spread, and was subtracted from them (whitening does so) and
folded into the bias.

Writes afa.json, with the values of every prompt; zf.png and .pdf, code against input; violins.png
and .pdf, how NMSE and eps-LBO are distributed.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from sae_whiten.lenses.afa.measure import AFAResult

EPILOG = """\
examples:
  sae-whiten afa sae-whitened sae-plain --dataset-split 'train[99%:]' --out afa
  sae-whiten afa gpt2-small-res-jb/blocks.{4,6,8}.hook_resid_pre \\
    --dataset-path Skylion007/openwebtext --n-prompts 1000 --out afa
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the SAEs, where the model and the prompts come from, and the output."""
    add_saes_argument(parser)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIRECTORY", help="where to write"
    )
    parser.add_argument(
        "--device", default="cpu", help="of the model and the SAEs (default: %(default)s)"
    )
    add_model_arguments(parser)

    group = parser.add_argument_group("prompts")
    add_dataset_arguments(group)
    group.add_argument(
        "--n-prompts",
        type=positive,
        default=1000,
        metavar="N",
        help="rows of the dataset, from its beginning (default: %(default)s)",
    )
    add_sequence_arguments(group, "prompt")


def run(args: argparse.Namespace) -> int:
    """Load, evaluate, write the JSON and the figures, and print the table."""
    from sae_whiten._files import atomic_path
    from sae_whiten._redaction import redacted
    from sae_whiten.lenses.afa.figure import plot_violins, plot_zf
    from sae_whiten.lenses.afa.measure import evaluate_afa

    saes = load_saes(args.saes, args.device)
    source = model_source(args, saes)
    dataset_path = dataset_path_of(args, saes)
    dataset = open_dataset_of(args, dataset_path)
    model = load_model_of(source, args.device, args.context_size)
    results = evaluate_afa(
        saes,
        model,
        dataset,
        n_prompts=args.n_prompts,
        context_size=args.context_size,
        prepend_bos=args.prepend_bos,
        batch_size_prompts=args.batch_size_prompts,
    )
    report = {
        **source,
        "dataset_path": dataset_path,
        "dataset_split": args.dataset_split,
        "n_prompts": len(results[0].rows),
        "versions": _versions(),
        "saes": [result.to_dict() for result in results],
    }
    with atomic_path(args.out / "afa.json") as partial:
        partial.write_text(json.dumps(redacted(report), allow_nan=False) + "\n")
    samples = {label: result.samples for label, result in _labelled(results).items()}
    for name, plot in (("zf", plot_zf), ("violins", plot_violins)):
        for suffix in (".png", ".pdf"):
            plot(samples, args.out / f"{name}{suffix}")
    _print_table(report["saes"])
    print(f"\nsaved in {args.out}: afa.json, zf.png, zf.pdf, violins.png, violins.pdf")
    return 0


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from sae_whiten import __version__

    others = ("sae-lens", "transformer-lens", "torch")
    return {"sae-whiten": __version__, **{name: version(name) for name in others}}


def _labelled(results: "Sequence[AFAResult]") -> "dict[str, AFAResult]":
    """By the hook, which tells the layer, or by the name where SAEs share a hook."""
    hooks = [result.context["hook_name"] for result in results]
    if len(set(hooks)) == len(hooks):
        return dict(zip(hooks, results, strict=True))
    return {result.name: result for result in results}


def _print_table(saes: Sequence[dict[str, Any]]) -> None:
    width = max(len(sae["name"]) for sae in saes)
    bands = list(saes[0]["summary"]["in_band"])
    print(
        f"{'':{width}}{'prompts':>9}{'h':>8}{'eps-LBO':>10}{'median':>10}{'NMSE':>9}{'L0':>8}"
        f"{'over':>7}{'under':>7}"
        + "".join(f"{f'<={e}':>8}" for e in bands)
        + f"{'norms':>8}{'pearson':>9}{'spearman':>9}{'bias':>7}"
    )
    for sae in saes:
        found = sae["summary"]
        print(
            f"{sae['name']:{width}}{found['n_samples']:>9}{sae['d_sae']:>8}"
            f"{_number(found['eps_lbo_mean'], '.2e'):>10}"
            f"{_number(found['eps_lbo_median'], '.2e'):>10}"
            f"{_number(found['nmse_mean'], '.3g'):>9}{found['l0_mean']:>8.1f}"
            f"{found['over_activated']:>7.1%}{found['under_activated']:>7.1%}"
            + "".join(f"{share:>8.1%}" for share in found["in_band"].values())
            + f"{_number(found['norms_pearson'], '.3f'):>8}"
            f"{_number(found['pearson'], '.3f'):>9}{_number(found['spearman'], '.3f'):>9}"
            f"{_bias_share(sae):>7.2f}"
        )
    for sae in saes:
        if _bias_share(sae) > 0.9:
            print(
                f"{sae['name']}: its codes are little more than the decoder bias, and so eps-LBO "
                "says little of its latents"
            )
    for sae in saes:
        if n := sae["summary"]["n_undefined"]:
            print(
                f"{sae['name']}: {n} prompts are in no mean and no correlation, for their code is "
                "zero and their eps-LBO infinite, or their activation is zero and their NMSE "
                "infinite"
            )


def _bias_share(sae: dict[str, Any]) -> float:
    codes = sae["prompts"]["code_norm"]
    return sae["bias_norm"] * len(codes) / max(sum(codes), 1e-30)


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
