"""Figures for papers: one column wide, readable in black and white, drawn without a display."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_whiten._files import atomic_path
from sae_whiten.evaluation.metrics import null_directions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_spectra", "plot_spectrum"]


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


def plot_spectra(spectra: Mapping[str, Sequence[float]], directory: str | Path) -> list[Path]:
    """Draw the covariance spectra of several hooks in one plot, and their cumulative variance.

    Args:
        spectra: Eigenvalues by hook name, in descending order.
        directory: Where to write spectra.png and cumulative_variance.png.

    Returns:
        The files written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figures = {
        "spectra": ("eigenvalue of the covariance", lambda values: values),
        "cumulative_variance": ("share of the variance", lambda v: v.cumsum(0) / v.sum()),
    }
    written = []
    for name, (label, transform) in figures.items():
        with _paper_style():
            figure = _new_figure(width=3.4, height=2.4)
            axes = figure.add_subplot()
            for i, (hook, eigenvalues) in enumerate(spectra.items()):
                values = torch.tensor(list(eigenvalues), dtype=torch.float64)
                values = transform(values[~null_directions(values)])
                # from light to dark in the order given, dashes for every other
                shade = f"{0.7 * (1 - (i + 1) / len(spectra)):.2f}"
                axes.plot(
                    range(1, len(values) + 1),
                    values.tolist(),
                    color=shade,
                    linestyle="--" if i % 2 else "-",
                    linewidth=1.0,
                    label=hook,
                )
            axes.set_xscale("log")
            if name == "spectra":
                axes.set_yscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel("rank of the direction")
            axes.set_ylabel(label)
            axes.legend(frameon=False, fontsize=5 if len(spectra) > 6 else 6)
            path = Path(directory) / f"{name}.png"
            _save(figure, path)
            written.append(path)
    return written


def _not_shown(null: dict[str, Tensor]) -> str:
    counts = {name: int(directions.sum()) for name, directions in null.items()}
    if not any(counts.values()):
        return ""
    if len(set(counts.values())) == 1:
        n = counts["before"]
        return f" (not shown: {n} null direction{'s' if n > 1 else ''})"
    listed = ", ".join(f"{n} {name}" for name, n in counts.items())
    return f" (null, not shown: {listed})"


def _paper_style() -> AbstractContextManager[None]:
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
        }
    )


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'figures need matplotlib: pip install "sae-whiten[demo]"'
        ) from error
    return matplotlib


def _new_figure(width: float, height: float) -> "Figure":
    # not pyplot, which would choose a display and keep the figure alive
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: str | Path) -> None:
    path = Path(path)
    with atomic_path(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix(".") or "png")
