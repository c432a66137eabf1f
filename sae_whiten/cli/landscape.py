"""Draw a 2-D simulation: the sparsest dictionary before and after whitening (arXiv 2511.13981).

Two sparse sources are mixed along two features at an angle. For all dictionaries of two unit
vectors, the figure shows the recovery of the sources, the sparsity of the codes, and the optimum of
each. Whitening makes the two optima coincide. The numbers are printed.
"""

import argparse
from pathlib import Path

from sae_whiten.cli._options import add_options, options_from
from sae_whiten.lenses.options import LandscapeConfig

EPILOG = """\
example:
  sae-whiten landscape --out landscape.pdf --angle 25
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the figure and the generative model."""
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="FILE", help="figure: .png, .pdf or .svg")
    add_options(parser, LandscapeConfig)


def run(args: argparse.Namespace) -> int:
    """Compute, print, draw."""
    from sae_whiten.lenses.landscape.figure import plot_landscapes
    from sae_whiten.lenses.landscape.simulation import landscapes

    before, after = landscapes(options_from(args, LandscapeConfig))
    print(
        f"{'whitening':9}  {'condition':>9}  {'misalignment':>12}  {'recovery at the sparsest':>24}"
    )
    for name, landscape in (("before", before), ("after", after)):
        print(
            f"{name:9}  {landscape.condition:9.1f}  {landscape.misalignment:11.1f}°  "
            f"{landscape.recovery_at_optimum:24.3f}"
        )
    plot_landscapes(before, after, args.out)
    print(f"\ndrawn: {args.out}")
    return 0
