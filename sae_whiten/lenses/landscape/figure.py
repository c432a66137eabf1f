"""The figure of the simulation in two dimensions."""

from pathlib import Path
from typing import Any

import numpy as np

from sae_whiten._paper_style import PAGE_WIDTH, new_figure, paper_style, save_figure
from sae_whiten.lenses.landscape.simulation import Landscape

__all__ = ["plot_landscapes"]


def plot_landscapes(before: Landscape, after: Landscape, path: str | Path) -> None:
    """Draw both landscapes: recovery in greys, lines of equal sparsity, and the two optima.

    Args:
        before: Of the activations.
        after: Of the whitened activations.
        path: Where to write; its suffix is the format (.png, .pdf, .svg).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: matplotlib does not know the format.
    """
    with paper_style():
        figure = new_figure(width=PAGE_WIDTH, height=3.7)
        left, right = figure.subplots(1, 2, sharey=True)
        greys = _draw(left, "before whitening", before)
        _draw(right, "after whitening", after)
        left.set_ylabel("angle of the second vector (degrees)")
        figure.colorbar(
            greys, ax=[left, right], label="recovery of the sources", ticks=[0.4, 0.6, 0.8, 1]
        )
        figure.legend(
            *left.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=2,
            frameon=False,
        )
        save_figure(figure, path)


def _draw(axes: Any, title: str, landscape: Landscape) -> Any:
    """Draw one landscape, and return the greys, for the colour bar."""
    # rows of the arrays are the first angle, which is drawn from left to right
    greys = axes.contourf(
        landscape.angles,
        landscape.angles,
        landscape.recovery.T,
        levels=np.linspace(0.4, 1, 25),
        cmap="Greys_r",
        extend="min",
    )
    lowest = landscape.cost.min()
    axes.contour(
        landscape.angles,
        landscape.angles,
        landscape.cost.T / lowest,
        levels=[1.02, 1.05, 1.1, 1.2, 1.4, 1.8],
        colors="black",
        linewidths=0.6,
    )
    for swap in (1, -1):
        axes.plot(
            *landscape.features[::swap],
            "o",
            markersize=9,
            markerfacecolor="none",
            color="black",
            linestyle="none",
            label="features: best recovery" if swap == 1 else None,
        )
        axes.plot(
            *landscape.optimum[::swap],
            "x",
            markersize=6,
            markeredgewidth=1.5,
            color="black",
            linestyle="none",
            label="sparsest dictionary" if swap == 1 else None,
        )
    axes.set_title(
        f"{title}: {landscape.misalignment:.1f}° apart, recovery "
        f"{landscape.recovery_at_optimum:.3f}",
        fontsize=8,
    )
    axes.set_xlabel("angle of the first vector (degrees)")
    axes.set_xticks([0, 45, 90, 135, 180])
    axes.set_yticks([0, 45, 90, 135, 180])
    axes.set_aspect("equal")
    return greys
