"""Figures for papers: one column wide, readable in black and white, drawn without a display."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_whiten._paper_style import (
    COLUMN_WIDTH,
    MARKERS,
    PAGE_WIDTH,
    n_legend_columns,
    new_figure,
    paper_style,
    save_figure,
)
from sae_whiten.comparison.paired import PairedDifference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Point",
    "plot_against_l0",
    "plot_against_n_latents",
    "plot_differences",
    "plot_seeds",
]

_MOST_TICKS = 7
_K_TOLERANCE = 0.02  # relative: an L0 this close to a whole number counts as k

# with 9 markers, cycles of lengths 9, 4 and 3 repeat together after 36 lines
_LINES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
_GREYS = ("0", "0.3", "0.5")


class Point(NamedTuple):
    """A mean and its standard deviations; one that is NaN draws no error bar."""

    x: float
    y: float
    x_sd: float = math.nan
    y_sd: float = math.nan


def plot_against_l0(panels: Mapping[str, Mapping[str, Sequence[Point]]], path: str | Path) -> None:
    """Draw metrics against L0: a panel for each metric, a line for each condition.

    Args:
        panels: `panels[metric][condition]`, points in ascending order of L0. The order of the
            conditions decides their styles, whether or not each has points.
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
        panels: `panels[metric]`: label of the x axis, and points in ascending order by condition.
        path: Where to write; its suffix is the format (.png, .pdf, .svg).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: There are no panels, or matplotlib does not know the format.
    """
    _plot_lines(panels, path, most_columns=3)


def plot_seeds(panels: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path) -> None:
    """Draw metrics of one sparsity: a panel for each metric, a row for each condition.

    A circle for each seed, and a bar at their mean.

    Args:
        panels: `panels[metric][condition]`: values, one per seed.
        path: Where to write; its suffix is the format (.png, .pdf, .svg).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: There are no panels, or matplotlib does not know the format.
    """
    names = list(dict.fromkeys(name for rows in panels.values() for name in rows))
    with paper_style():
        height = 0.5 + 0.2 * len(names)
        figure, all_axes = _panels(list(panels), most_columns=4, height=height, sharey=True)
        for axes, rows in zip(all_axes, panels.values(), strict=True):
            for name, values in rows.items():
                y = names.index(name)
                axes.plot(
                    values,
                    [y] * len(values),
                    linestyle="none",
                    marker="o",
                    markersize=4,
                    color="0.4",
                    markerfacecolor="none",
                )
                axes.plot([statistics.fmean(values)] * 2, [y - 0.3, y + 0.3], color="black")
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.locator_params(axis="x", nbins=4)
        all_axes[0].set_yticks(range(len(names)), names)
        save_figure(figure, path)


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
    with paper_style():
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
        save_figure(figure, path)


def _plot_lines(
    panels: Mapping[str, tuple[str, Mapping[str, Sequence[Point]]]],
    path: str | Path,
    most_columns: int,
) -> None:
    names = list(dict.fromkeys(name for _, lines in panels.values() for name in lines))
    with paper_style():
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
        save_figure(figure, path)


def _draw_points(axes: Any, points: Sequence[Point], i: int) -> Any:
    """Draw line `i` with its error bars, and return its handle for the legend."""
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
    # at the k that were trained: the L0 of a TopK SAE is k, or slightly less
    ticks = sorted({round(value) for value in x})
    are_k = all(abs(value - round(value)) <= _K_TOLERANCE * value for value in x)
    apart = all(b > 1.5 * a for a, b in itertools.pairwise(ticks))
    fixed = are_k and apart and len(ticks) <= _MOST_TICKS
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
    width = PAGE_WIDTH if n_columns > 2 else COLUMN_WIDTH * n_columns
    figure = new_figure(width, height * n_rows)
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharey=sharey).flatten().tolist()
    for axes in grid[len(titles) :]:
        axes.remove()
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(title, fontsize=8)
    return figure, grid[: len(titles)]
