"""The ZF plot, and half-violins of NMSE and eps-LBO: see `norms`.

After the figures of Lee et al. (arXiv 2503.24277), in a form that can be read without colour.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from sae_whiten._paper_style import (
    COLUMN_WIDTH,
    MARKERS,
    PAGE_WIDTH,
    common_pattern,
    n_legend_columns,
    new_figure,
    paper_style,
    save_figure,
    without_common_folders,
)
from sae_whiten.lenses.afa.norms import BANDS, AFASamples, band_slopes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_violins", "plot_zf"]

_WIDE_FROM = 5  # SAEs; as many do not fit into a column of a paper
_LOGARITHMIC_FROM = 10  # ratio of large values to typical ones
_CUT = 0.01  # share of the samples that may lie beyond an axis
_BAND_GREYS = ("0.80", "0.88", "0.95")
_MOST_LETTERS = 32  # in a label
_HALF_WIDTH = 0.42  # of a violin; SAEs are 1 apart


def plot_zf(samples: Mapping[str, AFASamples], path: str | Path) -> None:
    """Draw norms of codes against norms of inputs, a point for each sample.

    On the line y = x both are equal; above it codes are over-activated, below under-activated. The
    bands are of `BANDS`; the largest has no upper edge. Axes are logarithmic if the largest norm is
    more than 10 times a typical one. The smallest norms may then lie outside; the label of the axis
    counts these points.

    Args:
        samples: By the names of the SAEs, or of the hooks or layers they are on.
        path: Where to write; its suffix is the format (.png, .pdf, .svg).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: There are no samples, or matplotlib does not know the format.
    """
    points = {
        name: (sample.z_norm.numpy(), sample.code_norm.numpy()) for name, sample in samples.items()
    }
    columns = [norms for pair in points.values() for norms in pair]
    _check_not_empty(columns)
    values = np.concatenate(columns)
    logarithmic = _is_logarithmic(columns, upper=1.0)
    low, high = 0.0, float(values.max()) * 1.05 or 1.0
    if logarithmic:
        low, high = float(np.quantile(values[values > 0], _CUT)) / 1.2, high * 1.2
    n_hidden = sum(int(((z < low) | (f < low)).sum()) for z, f in points.values())
    pattern, labels = _short_names(list(points))
    with paper_style():
        figure = new_figure(width=COLUMN_WIDTH, height=COLUMN_WIDTH)
        axes = figure.add_subplot()
        bands = _draw_bands(axes, low, high)
        for i, (label, (z, f)) in enumerate(zip(labels, points.values(), strict=True)):
            _draw_samples(axes, z, f, i, len(points), label)
        if logarithmic:
            _set_logarithmic(axes, low, high)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        # the space below the axes is for the names of the SAEs
        axes.set_aspect("equal", anchor="N")
        axes.set_xlabel(
            "norm of the input, $\\|z\\|$" + f" (not shown: {n_hidden} points)" * (n_hidden > 0),
            parse_math=True,
        )
        axes.set_ylabel("norm of the sparse code, $\\|\\tilde{f}\\|$", parse_math=True)
        corner = {"transform": axes.transAxes, "fontsize": 7, "style": "italic"}
        axes.text(0.03, 0.97, "over-activated", va="top", **corner)
        axes.text(0.97, 0.03, "under-activated", ha="right", **corner)
        _add_keys(figure, axes, bands, pattern)
        save_figure(figure, path)


def _set_logarithmic(axes: Any, low: float, high: float) -> None:
    """Logarithmic axes with plain numbers, more of them on short ones."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    subs = (1, 2, 5) if high < 100 * low else (1,)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")


def _draw_bands(axes: Any, low: float, high: float) -> list[Any]:
    """The bands, the narrowest on top, and the line between over- and under-activated.

    Returns:
        Their handles for a legend, the line first.
    """
    drawn = []
    edge = np.array([low, high])
    for e, grey in reversed(list(zip(BANDS, _BAND_GREYS, strict=True))):
        lower, upper = band_slopes(e)
        # from one corner of the axes to the other, where a band has no upper edge
        top = upper * edge if math.isfinite(upper) else [high, high]
        band = axes.fill_between(
            edge, lower * edge, top, color=grey, linewidth=0, zorder=0, label=f"{e:g}"
        )
        drawn.append(band)
        for slope in (lower, upper):
            if math.isfinite(slope):
                axes.plot(edge, slope * edge, color="0.5", linewidth=0.5, linestyle="--", zorder=1)
    drawn += axes.plot(edge, edge, color="black", linewidth=0.8, zorder=1, label="y = x")
    return drawn[::-1]


def _draw_samples(
    axes: Any, z: Float[ndarray, "n"], f: Float[ndarray, "n"], i: int, n: int, label: str
) -> None:
    """Points of SAE number `i` of `n`: each SAE has a marker and a shade of its own."""
    from matplotlib import colormaps

    axes.plot(
        z,
        f,
        linestyle="none",
        marker=MARKERS[i % len(MARKERS)],
        markersize=2.5,
        markeredgewidth=0.4,
        color=colormaps["viridis"](0.85 * i / max(n - 1, 1)),
        markerfacecolor="none" if i % 2 else None,
        alpha=0.8,
        # thousands of points make a vector graphic slow
        rasterized=True,
        label=label,
        zorder=2,
    )


def _add_keys(figure: "Figure", axes: Any, bands: list[Any], pattern: str | None) -> None:
    """The bands above the axes, the SAEs below."""
    options: dict[str, Any] = {
        "title_fontsize": 8,
        "frameon": False,
        "markerscale": 1.6,
        "handlelength": 1.5,
        "columnspacing": 1,
        "borderpad": 0,
    }
    figure.legend(
        handles=bands,
        loc="outside upper center",
        title="bands: ε(h−1) at most",
        ncols=len(bands),
        **options,
    )
    saes = [handle for handle in axes.lines if handle.get_marker() != "None"]
    labels = [handle.get_label() for handle in saes]
    width, height = figure.get_size_inches()
    n_columns = n_legend_columns(labels, width)
    n_rows = math.ceil(len(labels) / n_columns) + (pattern is not None)
    figure.set_size_inches(width, height + 0.16 * n_rows + 0.5)
    figure.legend(
        handles=saes, loc="outside lower center", title=pattern, ncols=n_columns, **options
    )


def plot_violins(samples: Mapping[str, AFASamples], path: str | Path) -> None:
    """Draw how NMSE and eps-LBO are distributed: a half-violin of each for every SAE.

    Left halves are NMSE, on the left axis, right halves eps-LBO, on the right axis. A bar reaches
    from the lower to the upper quartile, its marker is at the median. An axis is logarithmic if
    large values are more than 10 times typical ones, or those of one SAE so much larger than
    another's. Up to 1% of the samples, and all infinite values, lie beyond the axes; the label
    counts them.

    Args:
        samples: By the names of the SAEs, or of the hooks or layers they are on.
        path: Where to write; its suffix is the format (.png, .pdf, .svg).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: There are no samples, or matplotlib does not know the format.
    """
    pattern, labels = _short_names(list(samples))
    with paper_style():
        width = COLUMN_WIDTH if len(samples) < _WIDE_FROM else PAGE_WIDTH
        letters = max(map(len, labels), default=0)
        # names at an angle, which needs height, if they do not fit side by side
        long = 0.07 * letters * len(labels) > width - 1.2
        figure = new_figure(width, height=2.4 + 0.03 * letters * long)
        left = figure.add_subplot()
        right = left.twinx()
        right.spines["right"].set_visible(True)
        for axes, side, title, columns in (
            (left, -1, "NMSE (left halves)", [sample.nmse for sample in samples.values()]),
            (right, 1, "ε-LBO (right halves)", [sample.eps_lbo for sample in samples.values()]),
        ):
            _draw_halves(axes, columns, side, title)
        left.set_xlim(-0.6, len(samples) - 0.4)
        left.set_xticks(
            range(len(labels)),
            labels,
            rotation=30 * long,
            ha="right" if long else "center",
        )
        left.tick_params(axis="x", length=0)
        if pattern is not None:
            left.set_xlabel(pattern)
        save_figure(figure, path)


def _draw_halves(axes: Any, columns: Sequence[Float[Tensor, "_"]], side: int, title: str) -> None:
    """Halves of violins at 0, 1, ... on the left (`side` -1) or on the right (1)."""
    values = [column.numpy() for column in columns]
    _check_not_empty(values)
    finite = [column[np.isfinite(column)] for column in values]
    logarithmic = _is_logarithmic(finite, upper=0.9)
    if logarithmic:
        finite = [column[column > 0] for column in finite]
    pooled = np.concatenate(finite)
    low, high = 0.0, 1.0
    if logarithmic:
        low, high = float(np.quantile(pooled, _CUT)) / 1.3, float(pooled.max()) * 1.3
        axes.set_yscale("log")
    elif len(pooled):
        high = float(np.quantile(pooled, 1 - _CUT)) * 1.1 or 1.0
    axes.set_ylim(low, high)
    n_shown = int(((pooled >= low) & (pooled <= high)).sum())
    n_hidden = sum(map(len, values)) - n_shown
    axes.set_ylabel(title + f"\n(not shown: {n_hidden})" * (n_hidden > 0))
    # solid grey on one side, hatched on the other
    style = {"facecolor": "0.75"} if side < 0 else {"facecolor": "white", "hatch": "/////"}
    for i, column in enumerate(finite):
        if len(column) == 0:
            continue
        heights, density = _density(column, low, high, logarithmic)
        edge = i + side * _HALF_WIDTH * density
        axes.fill_betweenx(heights, i, edge, edgecolor="0.3", linewidth=0.5, **style)
        quartiles = np.quantile(column, [0.25, 0.5, 0.75])
        at = i + side * 0.06
        axes.plot([at, at], quartiles[::2], color="black", linewidth=2, solid_capstyle="butt")
        axes.plot(
            at, quartiles[1], "o", color="black", markersize=3.5, markerfacecolor="white", zorder=3
        )


def _density(
    values: Float[ndarray, "n"], low: float, high: float, logarithmic: bool
) -> tuple[Float[ndarray, "m"], Float[ndarray, "m"]]:
    """Heights within [low, high] that cover the values, and the density there, at most 1.

    On a logarithmic axis it is the density of the logarithms.
    """
    from scipy.stats import gaussian_kde

    x = np.log(values) if logarithmic else values
    first, spread = x.min(), x.max() - x.min()
    if len(x) < 2 or spread <= 1e-9 * np.abs(x).max():
        # nothing to estimate a density from: a line
        return np.array([values.min(), values.max()]), np.ones(2)
    within = np.clip(values, low, high)
    heights = np.linspace(within.min(), within.max(), 200)
    if logarithmic:
        heights = np.geomspace(within.min(), within.max(), 200)
    # scaled to about 1, so that the covariance inside the estimate does not underflow
    at = (np.log(heights) if logarithmic else heights) - first
    density = gaussian_kde((x - first) / spread)(at / spread)
    return heights, density / density.max()


def _short_names(names: Sequence[str]) -> tuple[str | None, list[str]]:
    """The common pattern of hook names, if they have one, and short labels.

    Paths lose the folders that all share. Labels longer than 32 characters are cut.
    """
    pattern, short = common_pattern(names)
    if pattern is None:
        short = without_common_folders(names)
    most = _MOST_LETTERS
    return pattern, [name if len(name) <= most else f"…{name[1 - most :]}" for name in short]


def _is_logarithmic(columns: Sequence[Float[ndarray, "_"]], upper: float) -> bool:
    """Whether the `upper` quantile of a column is far above the median of a column."""
    positive = [column[column > 0] for column in columns if (column > 0).any()]
    if not positive:
        return False
    largest = max(np.quantile(column, upper) for column in positive)
    return bool(largest > _LOGARITHMIC_FROM * min(np.median(column) for column in positive))


def _check_not_empty(columns: Sequence[Float[ndarray, "_"]]) -> None:
    if not columns or not all(len(column) for column in columns):
        raise ValueError("a figure needs at least one sample of every SAE")
