"""Shared by all figures: font sizes for one column of a paper, atomic files, short names."""

import itertools
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_whiten._atomic import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLUMN_WIDTH",
    "MARKERS",
    "PAGE_WIDTH",
    "common_pattern",
    "n_legend_columns",
    "new_figure",
    "paper_style",
    "save_figure",
    "without_common_folders",
]

COLUMN_WIDTH, PAGE_WIDTH = 3.4, 7.0
"""Widths in inches of a column of a paper, and of both columns."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
"""Markers that can be distinguished in black and white."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def paper_style() -> AbstractContextManager[None]:
    """A context with matplotlib's settings for a figure.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    return matplotlib.rc_context(
        {
            "font.size": 8,
            "axes.labelsize": 8,
            "legend.fontsize": 8,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "axes.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 1.3,
            "savefig.dpi": 300,
            # keep text as text, not as curves
            "pdf.fonttype": 42,
            "svg.fonttype": "none",
            # names of hooks, models and folders are drawn, in which $ does not mean mathematics;
            # formulas set parse_math=True themselves
            "text.parse_math": False,
        }
    )


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install matplotlib") from error
    return matplotlib


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure; sizes in inches."""
    # pyplot would choose a display and keep the figure in memory
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure, atomically, in the format of the suffix (.png, .pdf, .svg).

    Raises:
        ValueError: matplotlib does not support the format.
    """
    path = Path(path)
    _write_powers_plainly(figure)
    with atomic_path(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix(".") or "png")


def _write_powers_plainly(figure: "Figure") -> None:
    """Label logarithmic axes in Unicode, not in mathtext, which is matplotlib's default."""
    from matplotlib.ticker import LogFormatterMathtext, LogFormatterSciNotation

    class PlainPowers(LogFormatterSciNotation):
        def __call__(self, x: float, pos: Any = None) -> str:
            text = super().__call__(x, pos).replace("\\times", "×")
            text = re.sub(r"\$\\mathdefault\{(.*)\}\$", r"\1", text)
            return re.sub(r"\^\{(.*?)\}", lambda power: power[1].translate(_SUPERSCRIPTS), text)

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            major, minor = axis.get_major_formatter(), axis.get_minor_formatter()
            if isinstance(major, LogFormatterMathtext):
                axis.set_major_formatter(PlainPowers(labelOnlyBase=major.labelOnlyBase))
            if isinstance(minor, LogFormatterMathtext):
                axis.set_minor_formatter(PlainPowers(labelOnlyBase=minor.labelOnlyBase))


def n_legend_columns(names: Sequence[str], width: float) -> int:
    """Number of columns that fit into `width` inches, for letters of average width."""
    column = 0.8 + 0.062 * max(map(len, names), default=0)  # inches
    return max(1, min(len(names), int(width / column)))


def common_pattern(names: Sequence[str]) -> tuple[str | None, list[str]]:
    """The common parts of dotted names as a pattern, and the remaining part of each name.

    >>> common_pattern(["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"])
    ('blocks.*.hook_mlp_out', ['0', '1'])
    >>> common_pattern(["embed", "blocks.0.hook_mlp_out"])
    (None, ['embed', 'blocks.0.hook_mlp_out'])
    """
    split = [name.split(".") for name in names]
    if len(split) < 2:
        return None, list(names)
    head = _n_equal(split)
    rest = [parts[head:] for parts in split]
    tail = _n_equal([parts[::-1] for parts in rest])
    short = [".".join(parts[: len(parts) - tail]) for parts in rest]
    if head + tail == 0 or not all(short):
        return None, list(names)
    return ".".join([*split[0][:head], "*", *rest[0][len(rest[0]) - tail :]]), short


def without_common_folders(paths: Sequence[str]) -> list[str]:
    """Paths without the leading folders that all of them share.

    >>> without_common_folders(["runs/topk/final", "runs/topk_vsae/final"])
    ['topk/final', 'topk_vsae/final']
    """
    if len(paths) < 2:
        return list(paths)
    split = [path.split("/") for path in paths]
    n = min(_n_equal(split), min(map(len, split)) - 1)
    return ["/".join(parts[n:]) for parts in split]


def _n_equal(lists: Sequence[Sequence[str]]) -> int:
    """Number of leading elements that all lists share."""
    columns = zip(*lists, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
