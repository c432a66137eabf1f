"""Figures: that they are written whole, without a display, and show what they are given."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_whiten.evaluation import figures
from sae_whiten.evaluation.figures import plot_spectrum

BEFORE = torch.tensor([8.0, 1e-15, 0.5, 2.0], dtype=torch.float64)
AFTER = torch.tensor([1.1, 0.9, 1.0, 1e-14], dtype=torch.float64)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, instead of files."""
    pytest.importorskip("matplotlib")
    figures_drawn: list[Any] = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: figures_drawn.append(figure))
    return figures_drawn


@pytest.mark.parametrize(
    ("name", "magic"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")]
)
def test_the_suffix_chooses_the_format(tmp_path: Path, name: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    plot_spectrum(BEFORE, AFTER, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_unknown_format_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="xyz"):
        plot_spectrum(BEFORE, AFTER, tmp_path / "a.xyz")
    assert list(tmp_path.iterdir()) == []


def test_both_spectra_are_drawn_sorted_and_without_null_directions(drawn: list[Any]) -> None:
    plot_spectrum(BEFORE, AFTER, "unused.png")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line for line in axes.lines}
    before, after = lines["before whitening"], lines["after whitening"]
    assert list(before.get_xdata()) == [1, 2, 3]
    assert list(before.get_ydata()) == [8.0, 2.0, 0.5]
    assert list(after.get_ydata()) == [1.1, 1.0, 0.9]
    # told apart without colour
    assert before.get_linestyle() != after.get_linestyle()
    assert axes.get_yscale() == "log"
    assert "1 null direction)" in axes.get_xlabel()


def test_null_directions_are_counted_for_each_spectrum(drawn: list[Any]) -> None:
    full = torch.ones(4, dtype=torch.float64)
    plot_spectrum(BEFORE, full, "unused.png")
    plot_spectrum(full, full, "unused.png")
    labels = [figure.axes[0].get_xlabel() for figure in drawn]
    assert "1 before, 0 after" in labels[0]
    assert "null" not in labels[1]


def test_drawing_changes_no_settings_and_needs_no_display(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code = f"""
import os, sys
os.environ.pop("DISPLAY", None)
import torch
from sae_whiten.evaluation.figures import plot_spectrum
assert "matplotlib" not in sys.modules
import matplotlib
# the backend is chosen, by importing pyplot, as soon as somebody asks for it
names = [name for name in matplotlib.rcParams if name != "backend"]
before = [matplotlib.rcParams[name] for name in names]
plot_spectrum(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]), {str(tmp_path / "a.png")!r})
assert [matplotlib.rcParams[name] for name in names] == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sae-whiten\[demo\]"'):
        plot_spectrum(BEFORE, AFTER, "unused.png")
