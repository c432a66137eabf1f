"""Figures: that they are written whole, without a display, and show what they are given."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_whiten.estimation import figures
from sae_whiten.estimation.figures import plot_eigenvalues, plot_spectra

SPECTRA = {"hook": torch.tensor([8.0, 1e-15, 0.5, 2.0], dtype=torch.float64)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, instead of files."""
    pytest.importorskip("matplotlib")
    figures_drawn: list[Any] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: figures_drawn.append(figure))
    return figures_drawn


@pytest.mark.parametrize(
    ("name", "magic"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")]
)
def test_the_suffix_chooses_the_format(tmp_path: Path, name: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    plot_eigenvalues(SPECTRA, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_unknown_format_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="xyz"):
        plot_eigenvalues(SPECTRA, tmp_path / "a.xyz")
    assert list(tmp_path.iterdir()) == []


def test_drawing_changes_no_settings_and_needs_no_display(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code = f"""
import os, sys
os.environ.pop("DISPLAY", None)
import torch
from sae_whiten.estimation.figures import plot_eigenvalues
assert "matplotlib" not in sys.modules
import matplotlib
# the backend is chosen, by importing pyplot, as soon as somebody asks for it
names = [name for name in matplotlib.rcParams if name != "backend"]
before = [matplotlib.rcParams[name] for name in names]
plot_eigenvalues({{"hook": torch.tensor([2.0, 1.0])}}, {str(tmp_path / "a.png")!r})
assert [matplotlib.rcParams[name] for name in names] == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        plot_eigenvalues(SPECTRA, "unused.png")


HOOKS = {
    f"blocks.{i}.hook_resid_pre": [(i + 1) * 100.0 / rank for rank in range(1, 20)] + [1e-20]
    for i in range(26)
}


def test_spectra_of_hooks_leave_null_directions_out(drawn: list[Any]) -> None:
    held_out = {name: (values, [2.0, 1.0, 0.5]) for name, values in list(HOOKS.items())[:2]}
    written = plot_spectra(HOOKS, "unused", regularised=HOOKS, held_out=held_out)
    names = ["spectra", "cumulative_variance", "held_out"]
    assert [path.name for path in written] == [
        f"{name}{suffix}" for name in names for suffix in (".png", ".pdf")
    ]
    (spectra,), cumulative, after = (figure.axes for figure in drawn[::2])
    expected = [v[:-1] for v in HOOKS.values()]
    assert spectra.get_yscale() == "log"
    # the regularised spectrum of each hook is a thin line of the same colour
    raw, thin = spectra.lines[: len(HOOKS)], spectra.lines[len(HOOKS) :]
    for lines in (raw, thin):
        assert [list(line.get_ydata()) for line in lines] == expected
    assert [line.get_color() for line in thin] == [line.get_color() for line in raw]
    assert max(line.get_linewidth() for line in thin) < raw[0].get_linewidth()
    (key,) = drawn[0].legends
    assert len(key.get_texts()) == len(HOOKS)
    for line in cumulative[0].lines:
        shares = list(line.get_ydata())
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1)
    before, white = after
    for axes, expected in ((before, 19), (white, 3)):
        lines = [line for line in axes.lines if line.get_label() in HOOKS]
        assert [len(line.get_ydata()) for line in lines] == [expected, expected]
    assert list(before.get_ylim()) == list(white.get_ylim())


@pytest.mark.parametrize("n_hooks", [2, 6, 26, 60])
def test_the_key_covers_no_line_and_tells_the_lines_apart_without_colour(
    drawn: list[Any], n_hooks: int
) -> None:
    plot_spectra({f"blocks.{i}.hook_mlp_out": [3.0, 2.0, 1.0] for i in range(n_hooks)}, "unused")
    figure = drawn[0]
    figure.draw_without_rendering()
    (key,) = figure.legends
    extent, (axes,) = key.get_window_extent(), figure.axes
    assert not extent.overlaps(axes.get_tightbbox())
    page = figure.bbox
    assert page.x0 <= extent.x0 < extent.x1 <= page.x1
    assert page.y0 <= extent.y0 < extent.y1 <= page.y1
    assert axes.get_window_extent().width > 0.3 * page.width
    assert key.get_title().get_text() == "blocks.*.hook_mlp_out"
    assert [text.get_text() for text in key.get_texts()] == [str(i) for i in range(n_hooks)]
    # luminance as a grey printer has it grows from line to line; neighbours differ in dashes too
    from matplotlib.colors import to_rgb

    lines = axes.lines
    grey = [sum(map(float.__mul__, (0.299, 0.587, 0.114), to_rgb(i.get_color()))) for i in lines]
    assert grey == sorted(grey)
    assert grey[-1] - grey[0] > 0.4
    assert grey[-1] < 0.8
    for a, b in itertools.pairwise(lines):
        assert a.get_linestyle() != b.get_linestyle()
