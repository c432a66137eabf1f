"""Figures of covariance spectra, of one hook or of many."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_whiten._paper_style import (
    COLUMN_WIDTH,
    common_pattern,
    new_figure,
    paper_style,
    save_figure,
)
from sae_whiten.estimation.spectrum import null_directions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_eigenvalues", "plot_spectra"]

_NAMES_IN_A_COLUMN = 26


def plot_eigenvalues(spectra: Mapping[str, Float[Tensor, "d"]], path: str | Path) -> None:
    """Draw eigenvalues against their rank, a line for each name, in one figure.

    Args:
        spectra: Eigenvalues by name, in any order. They are drawn divided by their mean, without
            null directions.
        path: Where to write; its suffix is the format (.png, .pdf, .svg).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    lines = {
        name: (values[~null_directions(values)] / values.mean()).sort(descending=True).values
        for name, values in spectra.items()
    }
    with paper_style():
        figure = new_figure(width=COLUMN_WIDTH if len(lines) == 1 else 4.6, height=2.4)
        axes = figure.add_subplot()
        _draw_hooks(axes, lines, list(lines))
        axes.set_yscale("log")
        axes.set_ylabel("eigenvalue (mean: 1)")
        _add_key(figure, axes)
        save_figure(figure, path)


def plot_spectra(
    spectra: Mapping[str, Sequence[float]],
    directory: str | Path,
    *,
    regularised: Mapping[str, Sequence[float]] | None = None,
    held_out: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> list[Path]:
    """Draw the covariance spectra of several hooks, a line for each; null directions are left out.

    Args:
        spectra: Eigenvalues by hook name, in descending order.
        directory: Where to write spectra and cumulative_variance, each as .png and .pdf, and
            held_out where it is given.
        regularised: Regularised eigenvalues, in the order of those that they replace: thin lines
            beside the spectra.
        held_out: Eigenvalues of held-out activations before and after whitening, in descending
            order.

    Returns:
        The files written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    before = {name: _float64(values) for name, values in spectra.items()}
    shown = {name: ~null_directions(values) for name, values in before.items()}
    lines = {name: values[shown[name]] for name, values in before.items()}
    cumulative = {name: values.cumsum(0) / values.sum() for name, values in lines.items()}
    thin = {n: _float64(values)[shown[n]] for n, values in (regularised or {}).items()}
    y_label = "eigenvalue" + (" (thin: regularised)" if thin else " of the covariance")
    figures: dict[str, list[tuple[str, dict[str, Tensor]]]] = {
        "spectra": [(y_label, lines)],
        "cumulative_variance": [("share of the variance", cumulative)],
    }
    if held_out:
        raw = {name: _float64(pair[0]) for name, pair in held_out.items()}
        raw = {name: v[~null_directions(v)] / v.mean() for name, v in raw.items()}
        white = {name: _float64(pair[1]) for name, pair in held_out.items()}
        figures["held_out"] = [
            ("held-out eigenvalue (mean: 1)", raw),
            ("whitened held-out eigenvalue", white),
        ]
    written = []
    for name, panels in figures.items():
        with paper_style():
            figure = new_figure(width=COLUMN_WIDTH * len(panels), height=2.4)
            all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
            for axes, (label, values) in zip(all_axes, panels, strict=True):
                _draw_hooks(axes, values, list(spectra))
                axes.set_ylabel(label)
                if name != "cumulative_variance":
                    axes.set_yscale("log")
                if name == "spectra":
                    _draw_hooks(axes, thin, list(spectra), linewidth=0.5, named=False)
                if name == "held_out":
                    axes.axhline(1, color="0.6", linewidth=0.6, linestyle=":", zorder=1)
            _add_key(figure, all_axes[0])
            for suffix in (".png", ".pdf"):
                path = Path(directory) / f"{name}{suffix}"
                save_figure(figure, path)
                written.append(path)
    return written


def _float64(values: Sequence[float]) -> Float[Tensor, "d"]:
    return torch.tensor(list(values), dtype=torch.float64)


def _draw_hooks(
    axes: Any,
    spectra: Mapping[str, Float[Tensor, "d"]],
    names: Sequence[str],
    *,
    linewidth: float = 1.0,
    named: bool = True,
) -> None:
    """A line for each hook, from dark to light in the order of `names`, in three line styles."""
    from matplotlib import colormaps

    # lightness grows along this map, so that the order can be seen in black and white; its end is
    # too light for white paper
    shades = colormaps["viridis"]
    for i, hook in enumerate(names):
        if hook not in spectra:
            continue
        values = spectra[hook].tolist()
        axes.plot(
            range(1, len(values) + 1),
            values,
            color=shades(0.85 * i / max(len(names) - 1, 1)),
            linestyle=("-", "--", ":")[i % 3],
            linewidth=linewidth,
            label=hook if named else None,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("rank of the direction")


def _add_key(figure: "Figure", axes: Any) -> None:
    """A legend outside the axes, where it covers no lines."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) == 1:
        figure.suptitle(names[0], fontsize=7)
        return
    pattern, short = common_pattern(names)
    figure.legend(
        handles,
        short,
        loc="outside right center",
        title=pattern,
        ncols=math.ceil(len(names) / _NAMES_IN_A_COLUMN),
        frameon=False,
        fontsize=5,
        title_fontsize=5,
        labelspacing=0.1,
        handlelength=2,
        handletextpad=0.5,
        columnspacing=1,
    )
