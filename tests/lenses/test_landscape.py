"""The 2-D simulation: against plain linear algebra, and that it says what it is there to say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sae_whiten.cli import main
from sae_whiten.lenses.landscape.simulation import landscape, landscapes
from sae_whiten.lenses.options import LandscapeConfig


def model(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sources = rng.laplace(size=(3000, 2)) * (rng.random((3000, 2)) < 0.5) * (2, 1)
    # correlated sources too: nothing in the formulas takes them to be independent
    sources[:, 1] += 0.3 * sources[:, 0]
    return sources, np.array([[3.0, 1.0], [0.5, 0.7]])


@pytest.mark.parametrize(("i", "j"), [(0, 180), (17, 300), (300, 17), (120, 122)])
def test_cost_and_recovery_are_those_of_the_code_itself(i, j):
    sources, features = model()
    found = landscape(sources, features)
    angles = np.deg2rad(found.angles[[i, j]])
    dictionary = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    code = np.linalg.solve(dictionary.T, (sources @ features).T).T
    assert found.cost[i, j] == pytest.approx(np.abs(code).sum(1).mean())
    correlations = np.abs(np.corrcoef(code.T, sources.T)[:2, 2:])
    pairs = (np.trace(correlations), np.trace(correlations[::-1]))
    assert found.recovery[i, j] == pytest.approx(max(pairs) / 2)


def test_recovery_is_best_at_the_features_whatever_the_coordinates():
    sources, features = model()
    for mapped in (features, features @ np.array([[0.2, 1.0], [-3.0, 0.4]])):
        found = landscape(sources, mapped)
        nearest = [int(np.abs(found.angles - a).argmin()) for a in found.features]
        best = np.unravel_index(np.nanargmax(found.recovery), found.recovery.shape)
        assert sorted(map(int, best)) == nearest
        assert 0.999 < found.recovery[best] <= 1 + 1e-12


@pytest.mark.parametrize(
    "config",
    [
        LandscapeConfig(),
        LandscapeConfig(angle=20),
        LandscapeConfig(activity=1.0, ratio=1.0, seed=1),
        LandscapeConfig(angle=60, activity=1.0, ratio=3.0, seed=2),
    ],
)
def test_whitening_brings_the_sparsest_dictionary_to_the_features(config):
    before, after = landscapes(config)
    # as far as 20000 samples and steps of half a degree tell
    assert after.misalignment < 1 < 5 < before.misalignment
    assert after.recovery_at_optimum > 0.999 > before.recovery_at_optimum
    assert before.condition > 2
    assert after.condition == pytest.approx(1, abs=1e-9)


def test_features_at_right_angles_need_no_whitening():
    before, _ = landscapes(LandscapeConfig(angle=90))
    assert before.misalignment < 1


def test_the_seed_decides_the_numbers():
    one, again, other = (landscapes(LandscapeConfig(seed=seed))[0] for seed in (3, 3, 4))
    assert np.array_equal(one.cost, again.cost)
    assert not np.array_equal(one.cost, other.cost)


@pytest.mark.parametrize(
    "wrong",
    [
        {"angle": 0},
        {"angle": 91},
        {"angle": "30"},
        {"activity": 0},
        {"activity": 1.1},
        {"activity": None},
        {"ratio": -1},
        {"ratio": float("inf")},
    ],
)
def test_impossible_models_are_refused(wrong):
    with pytest.raises(
        ValueError, match=f"{next(iter(wrong))}=.*: must be a finite number, above 0"
    ):
        replace(LandscapeConfig(), **wrong)


def test_the_command_prints_both_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    assert main(["landscape", "--out", str(tmp_path / "a.pdf")]) == 0
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    before, after = capsys.readouterr().out.splitlines()[1:3]
    assert before.startswith("before")
    assert float(before.split()[2].rstrip("°")) > float(after.split()[2].rstrip("°"))
