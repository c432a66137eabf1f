"""What all figures share."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from sae_whiten import ActivationStatistics
from sae_whiten._paper_style import (
    common_pattern,
    new_figure,
    paper_style,
    save_figure,
    without_common_folders,
)
from sae_whiten.cli import main
from tests.support import friendly


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


def test_names_are_shortened_by_what_they_have_in_common() -> None:
    shorten = common_pattern
    assert shorten(["a.1.x", "a.11.x", "a.1.y.x"]) == ("a.*.x", ["1", "11", "1.y"])
    assert shorten(["h.0", "h.1"]) == ("h.*", ["0", "1"])
    # nothing in common, or nothing left
    assert shorten(["a.x", "b.y"]) == (None, ["a.x", "b.y"])
    assert shorten(["a.x", "a.x.y"]) == (None, ["a.x", "a.x.y"])
    assert shorten(["a.x"]) == (None, ["a.x"])


def test_paths_are_shown_without_the_folders_that_all_are_in() -> None:
    assert without_common_folders(["a/b/c", "a/b/d"]) == ["c", "d"]
    assert without_common_folders(["a/b", "a/b/c"]) == ["b", "b/c"]  # nothing is left empty
    assert without_common_folders(["a/b"]) == ["a/b"]
