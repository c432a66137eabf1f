"""What all figures share: type sizes for one column of a paper, no display, whole files."""

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_whiten._files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["new_figure", "paper_style", "save_figure"]

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def paper_style() -> AbstractContextManager[None]:
    """matplotlib's settings for a figure, to be left again afterwards.

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
            # text that stays text in a paper
            "pdf.fonttype": 42,
            "svg.fonttype": "none",
            # names of hooks, models and folders are drawn, and a $ in one is no mathematics; text
            # that is asks for it (parse_math=True)
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
    """An empty figure, in inches; a column of a paper is about 3.4 wide, a page 7."""
    # not pyplot, which would choose a display and keep the figure alive
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure, atomically, in the format of the suffix (.png, .pdf, .svg).

    Raises:
        ValueError: matplotlib does not know the format.
    """
    path = Path(path)
    _write_powers_plainly(figure)
    with atomic_path(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix(".") or "png")


def _write_powers_plainly(figure: "Figure") -> None:
    """Label logarithmic axes in Unicode, not in the mathtext that matplotlib takes by default."""
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
