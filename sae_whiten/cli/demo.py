"""Watch whitening at work: three SAEs each on tame activations and on anisotropic ones.

Model: all-MiniLM-L6-v2, activations after the third of its six layers. Text: the docstrings of the
Python standard library on this machine. Nothing is downloaded. These activations are tame. An
invertible map makes them anisotropic: a large mean and a few directions with most of the variance,
like residual streams of language models. Probes can still find the same information. On each
version, one SAE is trained on raw activations, one on centred and one on whitened activations. All
see the same data in the same order and start from the same random numbers. They are saved as
ordinary SAELens SAEs. A process without sae-whiten evaluates them on held-out text.
"""

import argparse
import os
import time

from sae_whiten.cli._options import add_options, options_from
from sae_whiten.comparison.demo import DemoOptions, DemoResult, run_demo

EPILOG = """\
Whitening makes every direction of the activations' covariance equally large before the SAE sees
them, so that a few directions of large variance no longer dominate the loss. The saved SAE still
takes raw activations: the whitening is folded into its weights.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo."""
    add_options(parser, DemoOptions)


def run(args: argparse.Namespace) -> int:
    """Train the SAEs, evaluate them in a fresh process, and print the results."""
    started = time.monotonic()
    result = run_demo(options_from(args, DemoOptions), lambda message: print(message, flush=True))
    print(f"\nOn {result.n_held_out} tokens of text from modules that were not trained on:\n")
    _print_table(result, args.d_sae)
    print(f"\n{time.monotonic() - started:.0f} seconds. Files are in {args.out}{os.sep}")
    for path, content in (
        ("demo.png", "the figure: spectra, dead latents, probing"),
        ("tame, anisotropic", "the SAEs, by condition; a whitening is in its SAE's sae_whiten/"),
        ("evaluate_saes.py", "the evaluation above, with sae_lens alone"),
    ):
        print(f"  {path:17}  {content}")
    print(
        "\nNext, on a model of your own: how anisotropic are its activations, does whitening help\n"
        "there, and what do the latents fire at?\n"
        "  sae-whiten fit --model-name gpt2 --hook-name 'blocks.*.hook_resid_pre' \\\n"
        "    --dataset-path monology/pile-uncopyrighted --context-size 256 --out gpt2-stats\n"
        "  sae-whiten inspect gpt2-stats\n"
        "  sae-whiten compare --help\n"
        "  sae-whiten train --help\n"
        "  sae-whiten features SAE [SAE] --out features.html"
    )
    return 0


def _print_table(result: DemoResult, d_sae: int) -> None:
    print(f"{'':36}" + "".join(f"{version:^33}" for version in result.saes))
    width = 11
    saes = [sae for by_condition in result.saes.values() for sae in by_condition.values()]

    def row(name: str, *cells: str) -> None:
        wide = 3 * width if len(cells) == len(result.saes) else width
        print(f"{name:36}" + "".join(f"{cell:^{wide}}" for cell in cells))

    spectra = result.spectra.values()
    row("activations: |mean|/std", *(f"{gamma:.2g}" for gamma in result.mean_over_std.values()))
    row("  condition of the covariance", *(f"{s.condition_number_nonnull:.2g}" for s in spectra))
    row("  share of the top eigenvalue", *(f"{s.top_share:.0%}" for s in spectra))
    row("trained on activations that are", *(c for by in result.saes.values() for c in by))
    row("  explained variance", *(f"{sae['explained_variance']:.3f}" for sae in saes))
    row(f"  dead latents, of {d_sae}", *(str(sae["dead_latents"]) for sae in saes))
    for k in saes[0]["probing"]:
        name = f"  accuracy of a probe on {k} latent" + "s" * (k > 1)
        row(name, *(f"{sae['probing'][k]:.3f}" for sae in saes))
    checks = [sae["whitening"] and sae["whitening"]["fold"]["check"] for sae in saes]
    row("  fold error", *(f"{check['fold_error']:.0e}" if check else "-" for check in checks))
    print(
        "\nnone: raw. centred: the mean subtracted. original: whitened, with the loss in the space"
        "\nof the activations (the default). Fold error: relative difference between the saved SAE,"
        "\nwhich takes raw activations, and the one that was trained. It is rounding error."
        "\nThe map between tame and anisotropic is invertible: they hold the same information."
        "\nOne seed and a short training: an illustration, not a comparison. Longer training"
        "\nrevives most of the latents that are dead here: docs/dose-response.md."
    )
