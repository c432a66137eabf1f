"""The figure of the synthetic comparison: what each condition recovers, by architecture."""

from collections.abc import Sequence
from pathlib import Path

from sae_whiten._paper_style import PAGE_WIDTH, new_figure, paper_style, save_figure
from sae_whiten.lenses.synthetic.experiment import SyntheticSummary

__all__ = ["plot_recovery"]

_MARKERS = {"topk": "o", "batchtopk": "s", "standard": "^", "jumprelu": "D"}
_PANELS = {"f1": "F1 of features", "mcc": "MCC, whitened", "explained_variance": "expl. variance"}


def plot_recovery(
    summaries: Sequence[SyntheticSummary], chance: SyntheticSummary | None, path: str | Path
) -> None:
    """Draw scores by condition: a row for each, a marker for each architecture, bars of one
    standard deviation over seeds, dotted lines at chance.

    Args:
        summaries: Scores of the conditions, without chance.
        chance: The scores of an SAE that was not trained.
        path: Where to write; its suffix is the format (.png, .pdf, .svg).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: matplotlib does not know the format.
    """
    conditions = list(dict.fromkeys(s.condition for s in summaries))
    architectures = list(dict.fromkeys(s.architecture for s in summaries))
    with paper_style():
        figure = new_figure(width=PAGE_WIDTH, height=0.9 + 0.3 * len(conditions))
        panels = figure.subplots(1, len(_PANELS), sharey=True, squeeze=False)[0]
        for axes, (score, title) in zip(panels, _PANELS.items(), strict=True):
            for i, architecture in enumerate(architectures):
                of_architecture = [s for s in summaries if s.architecture == architecture]
                # side by side, so that none hides another
                shift = 0.5 * ((i + 0.5) / len(architectures) - 0.5)
                axes.errorbar(
                    [s.mean(score) for s in of_architecture],
                    [conditions.index(s.condition) + shift for s in of_architecture],
                    xerr=[s.sd(score) or 0.0 for s in of_architecture],
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
