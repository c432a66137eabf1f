"""What all figures share."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from sae_whiten import ActivationStatistics
from sae_whiten.cli import main
from sae_whiten.evaluation.paper_style import new_figure, paper_style, save_figure

from ..support import friendly


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)}


@pytest.mark.parametrize("name", ["cost in $", "a$b_{x}", r"$\nonsense$", "$x$"])
def test_names_with_dollars_are_drawn_as_they_are(name: str, tmp_path: Path) -> None:
    with paper_style():
        figure = new_figure(3, 3)
        axes = figure.subplots()
        axes.plot([1, 1000], [2, 5], label=name)
        axes.set_yticks([1, 2], [name, "b"])
        axes.set_title(name)
        axes.legend(title=name)
        save_figure(figure, tmp_path / "figure.svg")
    # the title, the legend's title and entry, and the tick
    assert (tmp_path / "figure.svg").read_text().count(f">{name}</text>") == 4


def test_logarithmic_axes_are_labelled_without_mathtext(tmp_path: Path) -> None:
    with paper_style():
        figure = new_figure(3, 3)
        axes = figure.subplots()
        axes.plot([1e-3, 1e3], [2, 5])
        axes.set_xscale("log")
        axes.set_yscale("log")
        save_figure(figure, tmp_path / "figure.png")
    found = texts(figure)
    assert {"10⁻¹", "10¹", "2×10⁰"} <= found
    assert not any("$" in text for text in found)


def test_inspect_draws_hooks_with_a_dollar_in_their_names(tmp_path: Path) -> None:
    for name in ("layer$1", "layer$2$"):
        statistics = ActivationStatistics(8)
        statistics.update(friendly(200, 8))
        statistics.save(tmp_path / f"{name}.safetensors")
    files = [str(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert main(["inspect", *files, "--plot", str(tmp_path / "figures")]) == 0
    assert len(list((tmp_path / "figures").iterdir())) >= 2
