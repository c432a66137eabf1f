"""Figures of the experiments, for papers, readable in black and white."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sae_whiten.evaluation.paper_style import new_figure, paper_style, save_figure

if TYPE_CHECKING:
    from sae_whiten.lenses.landscape.simulation import Landscape
    from sae_whiten.lenses.synthetic.experiment import Summary

__all__ = ["plot_landscapes", "plot_recovery"]

_MARKERS = {"topk": "o", "batchtopk": "s", "standard": "^", "jumprelu": "D"}
_PANELS = {"f1": "F1 of features", "mcc": "MCC, whitened", "explained_variance": "expl. variance"}


def plot_recovery(
    summaries: Sequence["Summary"], chance: "Summary | None", path: str | Path
) -> None:
    """Draw scores by condition: a row for each, a marker for each architecture, bars of one
    standard deviation over seeds, dotted lines at chance.

    Args:
        summaries: Of the conditions, without chance.
        chance: The scores of an SAE that was not trained.
        path: Where to write; its suffix is the format (.png, .pdf, .svg).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: matplotlib does not know the format.
    """
    conditions = list(dict.fromkeys(s.condition for s in summaries))
    architectures = list(dict.fromkeys(s.architecture for s in summaries))
    with paper_style():
        figure = new_figure(width=7.0, height=0.9 + 0.3 * len(conditions))
        panels = figure.subplots(1, len(_PANELS), sharey=True, squeeze=False)[0]
        for axes, (score, title) in zip(panels, _PANELS.items(), strict=True):
            for i, architecture in enumerate(architectures):
                own = [s for s in summaries if s.architecture == architecture]
                # side by side, so that none hides another
                shift = 0.5 * ((i + 0.5) / len(architectures) - 0.5)
                axes.errorbar(
                    [s.mean(score) for s in own],
                    [conditions.index(s.condition) + shift for s in own],
                    xerr=[s.sd(score) or 0.0 for s in own],
                    fmt=_MARKERS.get(architecture, "x"),
                    color="black",
                    markerfacecolor=f"{0.9 * i / max(len(architectures) - 1, 1):.2f}",
                    markersize=4,
                    markeredgewidth=0.7,
                    elinewidth=0.8,
                    label=architecture,
                )
            if chance is not None and score != "explained_variance":
                axes.axvline(chance.mean(score), color="0.4", linewidth=0.8, linestyle=":")
            axes.set_xlabel(title if score == "explained_variance" else f"{title} (dotted: chance)")
            axes.grid(axis="y", color="0.9", linewidth=0.5)
            axes.set_axisbelow(True)
        panels[0].set_yticks(range(len(conditions)), conditions)
        panels[0].invert_yaxis()
        if len(architectures) > 1:
            figure.legend(
                *panels[0].get_legend_handles_labels(),
                loc="outside upper center",
                ncols=len(architectures),
                frameon=False,
            )
        save_figure(figure, path)


def plot_landscapes(before: "Landscape", after: "Landscape", path: str | Path) -> None:
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
        figure = new_figure(width=7.0, height=3.7)
        panels = figure.subplots(1, 2, sharey=True)
        greys = None
        for axes, (title, found) in zip(
            panels, {"before whitening": before, "after whitening": after}.items(), strict=True
        ):
            # rows of the arrays are the first angle, which is drawn from left to right
            greys = axes.contourf(
                found.angles,
                found.angles,
                found.recovery.T,
                levels=np.linspace(0.4, 1, 25),
                cmap="Greys_r",
                extend="min",
            )
            lowest = found.cost.min()
            axes.contour(
                found.angles,
                found.angles,
                found.cost.T / lowest,
                levels=[1.02, 1.05, 1.1, 1.2, 1.4, 1.8],
                colors="black",
                linewidths=0.6,
            )
            for swap in (1, -1):
                axes.plot(
                    *found.features[::swap],
                    "o",
                    markersize=9,
                    markerfacecolor="none",
                    color="black",
                    linestyle="none",
                    label="features: best recovery" if swap == 1 else None,
                )
                axes.plot(
                    *found.optimum[::swap],
                    "x",
                    markersize=6,
                    markeredgewidth=1.5,
                    color="black",
                    linestyle="none",
                    label="sparsest dictionary" if swap == 1 else None,
                )
            axes.set_title(
                f"{title}: {found.misalignment:.1f}° apart, recovery "
                f"{found.recovery_at_optimum:.3f}",
                fontsize=8,
            )
            axes.set_xlabel("angle of the first vector (degrees)")
            axes.set_xticks([0, 45, 90, 135, 180])
            axes.set_yticks([0, 45, 90, 135, 180])
            axes.set_aspect("equal")
        panels[0].set_ylabel("angle of the second vector (degrees)")
        assert greys is not None
        figure.colorbar(
            greys, ax=list(panels), label="recovery of the sources", ticks=[0.4, 0.6, 0.8, 1]
        )
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=2,
            frameon=False,
        )
        save_figure(figure, path)
