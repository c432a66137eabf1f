"""Compare ways of whitening on synthetic activations, whose features are known.

Sparse features, correlated and hierarchical, are mixed into activations. These are as anisotropic
as those of language models and have a large mean. All conditions train on the same activations from
the same initial weights. The score is how many of the features an SAE recovers. Written to --out:
results.jsonl (one line per training; finished trainings are skipped), results.md, results.png.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from sae_whiten.cli._options import add_options, given_options
from sae_whiten.cli._spelling import flag_of
from sae_whiten.cli._values import Flattened, several
from sae_whiten.comparison.conditions import CONDITIONS
from sae_whiten.lenses.synthetic.options import (
    ARCHITECTURES,
    CHANCE,
    SyntheticDataConfig,
    SyntheticRun,
    benchmark_run,
)

_LISTED = "\n".join(f"  {name:24} {c.description}" for name, c in CONDITIONS.items())

EPILOG = f"""\
conditions; settings of the whitening may follow the name (whitened:shrinkage=0.1,eps=0.01):
{_LISTED}

examples:
  sae-whiten synthetic --out synthetic
  sae-whiten synthetic --out synthetic --architectures topk batchtopk standard jumprelu \\
    --seeds 3 --jobs 12 --device cuda
  sae-whiten synthetic --out bench --benchmark synthsaebench --small --anisotropic
  sae-whiten synthetic --out junk --junk 16 \\
    --conditions whitened whitened:shrinkage=oas whitened:shrinkage=0.1 whitened:eps=0.01
"""

_OF_DATA = {
    "condition": "condition_number",
    "n_junk": "junk",
    "junk_variance": "junk_variance",
    "n_nuisance": "nuisance",
}
"""Names of the flags that set fields of `SyntheticDataConfig`, by field."""

_OF_TRAINING = ("steps", "lr")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add flags for the SAEs, the activations, the output and the device."""
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIRECTORY", help="where to write")
    add(
        "--architectures",
        type=several(str),
        nargs="+",
        action=Flattened,
        default=["topk"],
        metavar="ARCHITECTURE",
        help=f"{', '.join(ARCHITECTURES)} (default: topk)",
    )
    add(
        "--conditions",
        type=several(str),
        nargs="+",
        action=Flattened,
        default=list(CONDITIONS),
        metavar="CONDITION",
        help="see below (default: all of them)",
    )
    add("--seeds", type=int, default=2, metavar="N", help="how many (default: %(default)s)")
    # absent by default: a benchmark has other defaults
    add_options(parser, SyntheticRun, only=_OF_TRAINING, absent_by_default=True)
    add(
        "--benchmark",
        choices=("synthsaebench",),
        help="train on SynthSAEBench-16k as published (arXiv 2602.14687): 16384 features in 768 "
        "dimensions, 4096 latents, k = 25, 200 million activations unless --steps says otherwise",
    )
    add("--small", action="store_true", help="use a small benchmark, for minutes on a CPU")
    add(
        "--anisotropic",
        action="store_true",
        help="mix the benchmark's features into activations with --condition-number and a mean "
        "twice their deviation; noise and dense activity (the flags below) need this too",
    )
    add_options(
        parser, SyntheticDataConfig, only=_OF_DATA, renamed=_OF_DATA, absent_by_default=True
    )
    add("--device", default="cpu", help="where to train (default: %(default)s)")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="trainings at once; they are small, so many fit on a GPU (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Train what is missing, and print the table."""
    from tqdm import tqdm

    from sae_whiten._atomic import atomic_path
    from sae_whiten._checks import require_number
    from sae_whiten.lenses.synthetic.experiment import grid, markdown_table, run_all, summarise_runs
    from sae_whiten.lenses.synthetic.figure import plot_recovery

    for name in ("seeds", "jobs"):
        require_number(name, getattr(args, name))
    runs = grid(args.architectures, args.conditions, range(args.seeds), _template(args))
    with tqdm(total=len(runs), desc="Comparing", unit="run") as bar:
        rows = run_all(runs, args.out / "results.jsonl", args.device, args.jobs, bar.update)
    summaries = summarise_runs(rows)
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


def _template(args: argparse.Namespace) -> SyntheticRun:
    """The training that the flags describe.

    Raises:
        ValueError: Flags contradict each other, or a number cannot work.
    """
    of_data, of_training = given_options(args, _OF_DATA), given_options(args, _OF_TRAINING)
    if args.benchmark is None and (args.small or args.anisotropic):
        raise ValueError("--small and --anisotropic need --benchmark")
    if args.benchmark is not None and of_data and not args.anisotropic:
        flags = ", ".join(flag_of(_OF_DATA[name]) for name in of_data)
        raise ValueError(
            f"--benchmark has activations as published: leave out {flags}, or add --anisotropic"
        )
    if "junk_variance" in of_data and not of_data.get("n_junk"):
        raise ValueError("--junk-variance: there is no junk; add --junk N for N dimensions of it")
    template = (
        SyntheticRun()
        if args.benchmark is None
        else benchmark_run(small=args.small, anisotropic=args.anisotropic)
    )
    return replace(template, data=replace(template.data, **of_data), **of_training)
