"""Watch whitening at work: train one SAE under whitening and one without, and compare them.

Model: all-MiniLM-L6-v2, activations after the third of its six layers. Text: the docstrings of the
Python standard library on this machine. Nothing is downloaded. Both SAEs see the same activations
in the same order and start from the same random numbers. They are saved as ordinary SAELens SAEs
and evaluated, on text that neither was trained on, by a process that does not know sae-whiten.
"""

import argparse
import os
import time
from pathlib import Path

from sae_whiten.cli._values import positive
from sae_whiten.comparison.demo import DemoOptions, DemoResult, run_demo

EPILOG = """\
Whitening makes every direction of the activations' covariance equally large before the SAE sees
them, so that a few directions of large variance no longer take most of the loss. The SAE that is
saved takes raw activations all the same: the whitening is folded into its weights.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo."""
    parser.add_argument(
        "--out",
        type=Path,
        default=DemoOptions.out,
        metavar="DIRECTORY",
        help="where to write the SAEs and the figure (default: ./%(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        default=DemoOptions.tokens,
        metavar="N",
        help="tokens to train each SAE on; more explain more variance and take longer "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--d-sae",
        type=positive,
        default=DemoOptions.d_sae,
        metavar="N",
        help="latents in each SAE's dictionary; a multiple of the 384 dimensions of the "
        "activations, here 8-fold (default: %(default)s)",
    )
    parser.add_argument(
        "--k",
        type=positive,
        default=DemoOptions.k,
        metavar="N",
        help="latents that may be active for one token (its L0); fewer are easier to interpret "
        "and explain less variance (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=DemoOptions.seed,
        metavar="N",
        help="seed for initial weights, order of the data and choice of held-out modules; "
        "another one shows how far the figures vary by chance (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Train both SAEs, evaluate them in a fresh process, and print what came out."""
    started = time.monotonic()
    options = DemoOptions(args.out, args.tokens, args.d_sae, args.k, args.seed)
    found = run_demo(options, lambda message: print(message, flush=True))
    print(f"\nOn {found.n_held_out} tokens of text from other modules than those trained on:\n")
    _print_table(found, args.d_sae)
    print(f"\n{time.monotonic() - started:.0f} seconds. Files are in {args.out}{os.sep}")
    for path, content in (
        ("whitened", "the SAE trained under whitening, and the whitening"),
        ("plain", "the SAE trained without"),
        ("spectrum.png", "the covariance's spectrum before and after whitening"),
        ("evaluate_saes.py", "the evaluation above, with sae_lens alone"),
    ):
        print(f"  {path:17}  {content}")
    directory = (args.out / "whitened").as_posix()
    print(
        f"\nNext:\n"
        f"  python -c \"from sae_lens import SAE; print(SAE.load_from_disk('{directory}').cfg)\"\n"
        f"  sae-whiten train --help\n"
        f"  examples/train_gpt2.py in the source of sae-whiten: the same in a script, for GPT-2"
    )
    return 0


def _print_table(found: DemoResult, d_sae: int) -> None:
    plain, whitened = found.plain, found.whitened
    check = whitened["whitening"]["fold"]["check"]

    def row(name: str, left: str, right: str) -> None:
        print(f"{name:42}{left:>16}{right:>16}")

    row("trained SAE", "no whitening", "whitening")
    row("  explained variance", *(f"{s['explained_variance']:.3f}" for s in (plain, whitened)))
    row("  L0 (active latents per token)", *(f"{s['l0']:.1f}" for s in (plain, whitened)))
    row(f"  dead latents, of {d_sae}", *(str(s["dead_latents"]) for s in (plain, whitened)))
    row("  fold error", "-", f"{check['fold_error']:.1e}")
    row("covariance of the activations", "before", "after whitening")
    spectra = (found.before, found.after)
    row("  condition number", *(f"{s.condition_number:.2g}" for s in spectra))
    row("  ... without null directions", *(f"{s.condition_number_nonnull:.3g}" for s in spectra))
    row("  null directions", *(str(s.n_null) for s in spectra))
    row("  share of the top eigenvalue", *(f"{s.top_share:.2%}" for s in spectra))

    print(
        "\nFold error: relative difference between the saved SAE, which takes raw activations, and"
        f"\nthe one that was trained, which took whitened ones; up to {check['tolerance']:.1e} is "
        "rounding."
    )
    if whitened["explained_variance"] < plain["explained_variance"]:
        print(
            "Whitening costs some explained variance; that is expected, and was found in the paper "
            "too\n(arXiv 2511.13981), where latents trained under it were better to probe with."
        )
    print("One seed and a short training: an illustration, not a comparison.")
