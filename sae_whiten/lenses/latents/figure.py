"""The figure of a latent space: a panel for each SAE, readable in black and white."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_whiten._paper_style import (
    COLUMN_WIDTH,
    PAGE_WIDTH,
    new_figure,
    paper_style,
    save_figure,
    without_common_folders,
)
from sae_whiten.lenses.latents.embedding import ACTIVATIONS, LatentMap, LatentSpace

__all__ = ["plot_latent_space"]

_MOST_COLUMNS = 3
_DEAD = "0.55"  # grey


def plot_latent_space(latent_space: LatentSpace, path: str | Path) -> None:
    """Draw where latents lie: a panel for each SAE, those of one space with the same axes.

    Live latents are discs, darker the rarer they fire, on one logarithmic scale for all panels;
    dead ones are hollow grey crosses. A legend in each panel counts both in the whole SAE. Below
    the panel is the number of latents shown, and below the figure how they were embedded.

    Args:
        latent_space: What to draw, of at least one SAE.
        path: Where to write; its suffix is the format (.png, .pdf, .svg).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: There are no maps, or matplotlib does not know the format.
    """
    maps = latent_space.maps
    if not maps:
        raise ValueError("no SAEs to draw")
    with paper_style():
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm

        spaces = list(dict.fromkeys(m.space for m in maps))
        n_columns = min(_MOST_COLUMNS, max(sum(m.space == s for m in maps) for s in spaces))
        # every space begins a new row
        rows = [
            members[start : start + n_columns]
            for members in ([m for m in maps if m.space == space] for space in spaces)
            for start in range(0, len(members), n_columns)
        ]
        width = PAGE_WIDTH if n_columns > 1 else COLUMN_WIDTH
        side = (width - 0.6) / n_columns
        figure = new_figure(width, len(rows) * (side + 0.85) + 0.5)
        grid = figure.subplots(len(rows), n_columns, squeeze=False)
        limits = {space: _limits([m for m in maps if m.space == space]) for space in spaces}
        rates = np.concatenate([m.firing_rates[~m.dead] for m in maps])
        norm = LogNorm(*_decades(rates))
        colours = _colours()
        titles = _titles(maps)
        for row, members in zip(grid, rows, strict=True):
            for axes in row[len(members) :]:
                axes.remove()
            for axes, latent_map in zip(row, members, strict=False):
                title = textwrap.fill(titles[latent_map.name], int(13 * side))
                _draw(axes, title, latent_map, norm, colours)
                (x_low, x_high), (y_low, y_high) = limits[latent_map.space]
                axes.set_xlim(x_low, x_high)
                axes.set_ylim(y_low, y_high)
        shown = [axes for axes in grid.flatten() if axes.figure is not None]
        if rates.size:
            figure.colorbar(
                ScalarMappable(norm, colours),
                ax=shown,
                label="firing frequency (share of tokens)",
                aspect=30,
                pad=0.02,
            )
        caption = textwrap.wrap(_caption(latent_space), int(width * 18))
        figure.supxlabel("\n".join(caption), fontsize=7)
        save_figure(figure, path)


def _draw(axes: Any, title: str, latent_map: LatentMap, norm: Any, colours: Any) -> None:
    from matplotlib.lines import Line2D

    dead = latent_map.dead
    size = 9.0 if len(dead) <= 500 else 5.0  # square points
    # dead ones first, so that they hide no others
    axes.scatter(
        *latent_map.xy[dead].T, s=2.5 * size, marker="X", linewidths=0.5,
        facecolors="none", edgecolors=_DEAD,
    )  # fmt: skip
    axes.scatter(
        *latent_map.xy[~dead].T, s=size, linewidths=0,
        c=latent_map.firing_rates[~dead], norm=norm, cmap=colours,
    )  # fmt: skip
    live = Line2D([], [], marker="o", color="0.2", linestyle="none", markersize=4)
    cross = Line2D(
        [], [], marker="X", color=_DEAD, markerfacecolor="none", linestyle="none", markersize=5,
        markeredgewidth=0.7,
    )  # fmt: skip
    n_live = latent_map.d_sae - latent_map.n_dead
    axes.legend(
        [live, cross],
        [f"live: {n_live}", f"dead: {latent_map.n_dead}"],
        loc="lower center",
        bbox_to_anchor=(0.5, 0.99),
        ncols=2,
        frameon=False,
        fontsize=7,
        handletextpad=0.1,
        columnspacing=1,
    )
    axes.set_title(title, fontsize=8, pad=16)
    axes.set_xlabel(_shown(latent_map), fontsize=7)
    axes.set_xticks([])
    axes.set_yticks([])
    # lengths mean the same in both directions
    axes.set_aspect("equal")
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)


def _titles(maps: Sequence[LatentMap]) -> dict[str, str]:
    """Short titles by name of the SAE: paths lose the folders that all share."""
    names = [m.name for m in maps]
    return dict(zip(names, without_common_folders(names), strict=True))


def _shown(latent_map: LatentMap) -> str:
    n, n_dead = len(latent_map.latents), int(latent_map.dead.sum())
    text = f"shown: {n} of {latent_map.d_sae} latents"
    text += f"\n{n_dead} of them dead" if n_dead else ""
    if len(latent_map.without_direction):
        text += f"\nwithout a direction: {len(latent_map.without_direction)}"
    return text


def _caption(latent_space: LatentSpace) -> str:
    titles = _titles(latent_space.maps)
    perplexities = sorted({m.perplexity for m in latent_space.maps})
    text = (
        f"t-SNE of {latent_space.of} by cosine, perplexity "
        f"{' and '.join(f'{p:.3g}' for p in perplexities)}, seed {latent_space.seed}."
    )
    frequencies = latent_space.source.get("frequencies")
    if frequencies:
        text += f" Firing frequency {frequencies}."
    if latent_space.of == ACTIVATIONS:
        text += " Dead latents have no activations and so no direction."
    spaces = list(dict.fromkeys(m.space for m in latent_space.maps))
    if len(spaces) > 1:
        rows = "; ".join(
            f"{space} ({', '.join(titles[m.name] for m in latent_space.maps if m.space == space)})"
            for space in spaces
        )
        text += f" Embedded separately, not comparable with each other: {rows}."
    elif len(latent_space.maps) > 1:
        text += " Embedded together: the panels have the same axes."
    return text


def _limits(maps: Sequence[LatentMap]) -> tuple[tuple[float, float], tuple[float, float]]:
    """A square around all points."""
    xy = np.concatenate([m.xy for m in maps])
    low, high = xy.min(0), xy.max(0)
    half = 0.53 * float((high - low).max()) or 1.0
    (x, y) = (low + high) / 2
    return (x - half, x + half), (y - half, y + half)


def _decades(rates: Float[np.ndarray, "n"]) -> tuple[float, float]:
    """Powers of ten around the rates."""
    if not rates.size:
        return 1e-1, 1.0
    low = 10.0 ** math.floor(math.log10(rates.min()))
    high = 10.0 ** math.ceil(math.log10(rates.max()))
    return (low, high) if low < high else (low, 10 * low)


def _colours() -> Any:
    """viridis without its end, which is too light for white paper; lightness grows along it."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, 256)))
