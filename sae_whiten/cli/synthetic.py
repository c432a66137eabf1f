"""Compare ways of whitening where the answer is known: on synthetic activations.

Sparse features, correlated and hierarchical, are mixed into activations that are as anisotropic as
those of language models and far from the origin. Every condition trains on the same activations
from the same initial weights, and is scored by the features that it recovers. Written to --out:
results.jsonl (a line for each training; those it has are not done again), results.md, results.png.

conditions: none, expected_average_only_in (SAELens' own); centred (mean subtracted only); whitened,
original (whitening with the loss in that space); original_norms (and sparsity charged by decoder
norms of that space); original_zca; half (strength 0.5, loss in its own space).
Settings of the whitening may follow a name: whitened:shrinkage=0.1,eps=0.01
"""

import argparse
from pathlib import Path

EPILOG = """\
examples:
  sae-whiten synthetic --out synthetic
  sae-whiten synthetic --out synthetic --architectures topk batchtopk standard jumprelu \\
    --seeds 3 --jobs 12 --device cuda
  sae-whiten synthetic --out junk --junk 16 \\
    --conditions whitened whitened:shrinkage=oas whitened:shrinkage=0.1 whitened:eps=0.01
"""

_CONDITIONS = (
    "none",
    "centred",
    "expected_average_only_in",
    "whitened",
    "original",
    "original_norms",
    "original_zca",
    "half",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to train, on what, and where."""
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIRECTORY", help="where to write")
    add(
        "--architectures",
        nargs="+",
        default=["topk"],
        metavar="ARCHITECTURE",
        help="topk, batchtopk, standard, jumprelu (default: topk)",
    )
    add(
        "--conditions",
        nargs="+",
        default=list(_CONDITIONS),
        metavar="CONDITION",
        help=f"see above (default: {' '.join(_CONDITIONS)})",
    )
    add("--seeds", type=int, default=2, help="how many (default: %(default)s)")
    add("--steps", type=int, default=5000, help="training steps (default: %(default)s)")
    add("--lr", type=float, default=3e-4, help="learning rate (default: %(default)s)")
    add(
        "--condition-number",
        dest="condition",
        type=float,
        default=1e4,
        metavar="NUMBER",
        help="of the covariance of the features' part; 1 is isotropic (default: 10000)",
    )
    add(
        "--junk",
        dest="n_junk",
        type=int,
        default=0,
        metavar="N",
        help="dimensions of noise beside the 64 of the features (default: none)",
    )
    add(
        "--junk-variance",
        type=float,
        default=1e-4,
        metavar="V",
        help="their variance, in units of the average (default: %(default)s)",
    )
    add(
        "--nuisance",
        dest="n_nuisance",
        type=int,
        default=0,
        metavar="RANK",
        help="dense activity of this rank, with half the variance (default: none)",
    )
    add("--device", default="cpu", help="where to train (default: %(default)s)")
    add(
        "--jobs",
        type=int,
        default=1,
        help="trainings at once; they are small, and a GPU takes many (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Train what has not been trained yet, print the table."""
    from tqdm import tqdm

    from sae_whiten._checks import require_number
    from sae_whiten._files import atomic_path
    from sae_whiten.lenses.synthetic.data import SyntheticDataConfig
    from sae_whiten.lenses.synthetic.experiment import (
        CHANCE,
        SyntheticRun,
        grid,
        markdown_table,
        run_all,
        summarise,
    )
    from sae_whiten.lenses.synthetic.figure import plot_recovery

    for name in ("seeds", "steps", "jobs"):
        require_number(name, getattr(args, name))
    require_number("lr", args.lr, least=0, whole=False)
    template = SyntheticRun(
        data=SyntheticDataConfig(
            condition=args.condition,
            n_junk=args.n_junk,
            junk_variance=args.junk_variance,
            n_nuisance=args.n_nuisance,
        ),
        steps=args.steps,
        lr=args.lr,
    )
    runs = grid(args.architectures, args.conditions, range(args.seeds), template)
    with tqdm(total=len(runs), desc="Comparing", unit="run") as bar:
        rows = run_all(runs, args.out / "results.jsonl", args.device, args.jobs, bar.update)
    summaries = summarise(rows)
    table = markdown_table(summaries)
    with atomic_path(args.out / "results.md") as partial:
        partial.write_text(table)
    print(f"\n{table}\nmean ± standard deviation over {args.seeds} seeds")
    print(f"written: {args.out / 'results.jsonl'}, {args.out / 'results.md'}")
    trained = [s for s in summaries if s.condition != CHANCE]
    chance = next((s for s in summaries if s.condition == CHANCE), None)
    plot_recovery(trained, chance, args.out / "results.png")
    print(f"drawn: {args.out / 'results.png'}")
    return 0
