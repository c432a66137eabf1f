"""Figures for papers: one column wide, readable in black and white, drawn without a display."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_whiten.comparison.paired import PairedDifference
from sae_whiten.evaluation.metrics import null_directions
from sae_whiten.evaluation.paper_style import MARKERS, common_pattern, n_legend_columns
from sae_whiten.evaluation.paper_style import new_figure as _new_figure
from sae_whiten.evaluation.paper_style import paper_style as _paper_style
from sae_whiten.evaluation.paper_style import save_figure as _save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Point",
    "plot_against_l0",
    "plot_against_n_latents",
    "plot_differences",
    "plot_spectra",
    "plot_spectrum",
]

_NAMES_IN_A_COLUMN = 26

_PAGE_WIDTH = 7.0  # inches, both columns of a paper
_MOST_TICKS = 7

# with 9 markers, cycles of lengths 9, 4 and 3 repeat together after 36 lines
_LINES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
_GREYS = ("0", "0.45", "0.65")


class Point(NamedTuple):
    """A mean and its standard deviations; NaN, where one is not known, draws no bar."""

    x: float
    y: float
    x_sd: float = math.nan
    y_sd: float = math.nan


def plot_spectrum(
    eigenvalues_before: Float[Tensor, "d"],
    eigenvalues_after: Float[Tensor, "d"],
    path: str | Path,
) -> None:
    """Draw the spectrum of the activations' covariance before and after whitening.

    Numerically null directions have no place on a logarithmic axis; the legend counts them.

    Args:
        eigenvalues_before: Shape (d,), any order: eigenvalues of the covariance of activations that
            the whitening was not estimated from. (On those it was estimated from, the spectrum
            after whitening is flat by construction, however few they are.)
        eigenvalues_after: Shape (d,), any order: the same of the same activations, whitened.
        path: Where to write; its suffix is the format (.png, .pdf, .svg).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: matplotlib does not know the format.
    """
    spectra = {"before": eigenvalues_before, "after": eigenvalues_after}
    null = {name: null_directions(eigenvalues) for name, eigenvalues in spectra.items()}
    style: dict[str, dict[str, Any]] = {
        "before": {"color": "black", "linestyle": "-"},
        # told apart by its dashes too, where a printer has one black
        "after": {"color": "0.45", "linestyle": (0, (4, 1.5))},
    }
    with _paper_style():
        figure = _new_figure(width=3.4, height=2.4)
        axes = figure.add_subplot()
        axes.axhline(1, color="0.6", linewidth=0.6, linestyle=":", zorder=1)
        for name, eigenvalues in spectra.items():
            values = eigenvalues[~null[name]].sort(descending=True).values.tolist()
            axes.plot(range(1, len(values) + 1), values, label=f"{name} whitening", **style[name])
        # the few directions of large variance would vanish in the left edge of a linear axis
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(0.9, 1.1 * len(eigenvalues_before))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("rank of the direction" + _not_shown(null))
        axes.set_ylabel("eigenvalue of the covariance")
        axes.legend(loc="lower left", frameon=False)
        _save(figure, path)


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
            regularised and held_out where they are given.
        regularised: What whitening divides by, in the order of the eigenvalues they replace.
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
    figures: dict[str, list[tuple[str, dict[str, Tensor]]]] = {
        "spectra": [("eigenvalue of the covariance", lines)],
        "cumulative_variance": [("share of the variance", cumulative)],
    }
    if regularised is not None:
        made = {name: _float64(values)[shown[name]] for name, values in regularised.items()}
        figures["regularised"] = [("regularised eigenvalue", made)]
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
        with _paper_style():
            figure = _new_figure(width=3.4 * len(panels), height=2.4)
            all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
            for axes, (label, values) in zip(all_axes, panels, strict=True):
                _draw_hooks(axes, values, list(spectra))
                axes.set_ylabel(label)
                if name != "cumulative_variance":
                    axes.set_yscale("log")
                if name == "held_out":
                    axes.axhline(1, color="0.6", linewidth=0.6, linestyle=":", zorder=1)
            _add_key(figure, all_axes[0])
            for suffix in (".png", ".pdf"):
                path = Path(directory) / f"{name}{suffix}"
                _save(figure, path)
                written.append(path)
    return written


def plot_against_l0(panels: Mapping[str, Mapping[str, Sequence[Point]]], path: str | Path) -> None:
    """Draw metrics against L0: a panel for each metric, a line for each condition.

    Args:
        panels: `panels[metric][condition]`, points in ascending order of L0. The order of the
            conditions chooses their styles; one without points keeps its place in that.
        path: Where to write; its suffix is the format (.png, .pdf, .svg).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: There are no panels, or matplotlib does not know the format.
    """
    _plot_lines({title: ("L0", lines) for title, lines in panels.items()}, path, most_columns=4)


def plot_against_n_latents(
    panels: Mapping[str, tuple[str, Mapping[str, Sequence[Point]]]], path: str | Path
) -> None:
    """Draw metrics against the number of latents that they use or remove, K or N.

    Args:
        panels: By metric the name of the x axis, and by condition the points in ascending order.
        path: Where to write; its suffix is the format (.png, .pdf, .svg).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: There are no panels, or matplotlib does not know the format.
    """
    _plot_lines(panels, path, most_columns=3)


def plot_differences(
    panels: Mapping[str, Mapping[tuple[str, str], PairedDifference]], path: str | Path
) -> None:
    """Draw differences from a baseline with their confidence intervals: a panel for each metric.

    Markers are filled where the difference is significant.

    Args:
        panels: `panels[metric][group, condition]`. Rows are in the order in which they first occur,
            and each group has a heading.
        path: Where to write; its suffix is the format (.png, .pdf, .svg).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: There are no panels, or matplotlib does not know the format.
    """
    rows = list(dict.fromkeys(row for panel in panels.values() for row in panel))
    heights: dict[tuple[str, str], float] = {}
    headings: dict[str, float] = {}
    y = 0.0
    for group, condition in rows:
        if group not in headings:
            headings[group] = y + 0.3 * bool(headings)
            y = headings[group] + 1
        heights[group, condition] = y
        y += 1
    with _paper_style():
        figure, all_axes = _panels(list(panels), most_columns=4, height=0.7 + 0.16 * y, sharey=True)
        for axes, panel in zip(all_axes, panels.values(), strict=True):
            axes.axvline(0, color="0.6", linewidth=0.6, zorder=1)
            for row, difference in panel.items():
                low, high = difference.low, difference.high
                if math.isfinite(low) and math.isfinite(high):
                    axes.plot([low, high], [heights[row]] * 2, color="black", linewidth=0.9)
                axes.plot(
                    difference.mean,
                    heights[row],
                    marker="o",
                    markersize=4,
                    color="black",
                    markerfacecolor="black" if difference.significant else "white",
                )
            axes.set_ylim(y - 0.3, -0.7)
            axes.tick_params(axis="y", length=0)
            axes.locator_params(axis="x", nbins=3)
        labels = {y: group for group, y in headings.items()}
        labels |= {y: condition for (_, condition), y in heights.items()}
        all_axes[0].set_yticks(list(labels), list(labels.values()))
        for axes in all_axes:
            for label in axes.get_yticklabels():
                if label.get_text() in headings:
                    label.set_fontweight("bold")
        figure.supxlabel(
            "difference with its 95% confidence interval; filled: significant", fontsize=8
        )
        _save(figure, path)


def _plot_lines(
    panels: Mapping[str, tuple[str, Mapping[str, Sequence[Point]]]],
    path: str | Path,
    most_columns: int,
) -> None:
    names = list(dict.fromkeys(name for _, lines in panels.values() for name in lines))
    with _paper_style():
        figure, all_axes = _panels(list(panels), most_columns, height=1.75, sharey=False)
        handles: dict[str, Any] = {}
        for axes, (x_label, lines) in zip(all_axes, panels.values(), strict=True):
            for name, points in lines.items():
                if points:
                    handles[name] = _draw_points(axes, points, names.index(name))
            x = [point.x for points in lines.values() for point in points if point.x > 0]
            _logarithmic_x(axes, x)
            axes.set_xlabel(x_label)
        shown = [name for name in names if name in handles]
        width, height = figure.get_size_inches()
        n_columns = n_legend_columns(shown, width)
        figure.set_size_inches(width, height + 0.18 * math.ceil(len(shown) / n_columns))
        figure.legend(
            [handles[name] for name in shown],
            shown,
            loc="outside lower center",
            ncols=n_columns,
            frameon=False,
            handlelength=3.5,
        )
        _save(figure, path)


def _draw_points(axes: Any, points: Sequence[Point], i: int) -> Any:
    """Points of line number `i` with their bars; returns what stands for them in a legend."""
    grey = _GREYS[i % len(_GREYS)]
    return axes.errorbar(
        [point.x for point in points],
        [point.y for point in points],
        xerr=[0 if math.isnan(point.x_sd) else point.x_sd for point in points],
        yerr=[0 if math.isnan(point.y_sd) else point.y_sd for point in points],
        color=grey,
        marker=MARKERS[i % len(MARKERS)],
        markersize=4,
        markerfacecolor=("white", grey)[i % 2],
        markeredgewidth=0.9,
        linestyle=_LINES[i % len(_LINES)],
        linewidth=1.0,
        elinewidth=0.7,
        capsize=1.5,
    )


def _logarithmic_x(axes: Any, x: Sequence[float | int]) -> None:
    """A logarithmic axis with plain numbers, if the values span more than a factor of 3."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    if not x or max(x) <= 3 * min(x):
        return
    axes.set_xscale("log")
    ticks = sorted(set(x))
    # chosen numbers, such as k, not measured ones
    chosen = all(value == round(value) for value in ticks)
    apart = all(b > 1.5 * a for a, b in itertools.pairwise(ticks))
    fixed = chosen and apart and len(ticks) <= _MOST_TICKS
    subs = (1, 2, 5) if ticks[-1] < 100 * ticks[0] else (1,)
    axes.xaxis.set_major_locator(FixedLocator(ticks) if fixed else LogLocator(subs=subs))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _panels(
    titles: Sequence[str], most_columns: int, *, height: float, sharey: bool
) -> "tuple[Figure, list[Any]]":
    """A figure with a panel for each title, `height` inches each."""
    if not titles:
        raise ValueError("a figure needs at least one panel")
    n_rows = math.ceil(len(titles) / most_columns)
    n_columns = math.ceil(len(titles) / n_rows)
    width = _PAGE_WIDTH if n_columns > 2 else 3.4 * n_columns
    figure = _new_figure(width, height * n_rows)
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharey=sharey).flatten().tolist()
    for axes in grid[len(titles) :]:
        axes.remove()
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(title, fontsize=8)
    return figure, grid[: len(titles)]


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def _draw_hooks(axes: Any, spectra: Mapping[str, Tensor], names: Sequence[str]) -> None:
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
            linewidth=1.0,
            label=hook,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("rank of the direction")


def _add_key(figure: "Figure", axes: Any) -> None:
    """Name the lines outside the axes, where the names cover none of them."""
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


def _not_shown(null: dict[str, Tensor]) -> str:
    counts = {name: int(directions.sum()) for name, directions in null.items()}
    if not any(counts.values()):
        return ""
    if len(set(counts.values())) == 1:
        n = counts["before"]
        return f" (not shown: {n} null direction{'s' if n > 1 else ''})"
    listed = ", ".join(f"{n} {name}" for name, n in counts.items())
    return f" (null, not shown: {listed})"
