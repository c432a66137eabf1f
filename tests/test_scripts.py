"""Scripts of `examples/` and `benchmarks/` still work with the package, at the smallest sizes."""

import importlib.util
import logging
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sae_whiten.evaluation.metrics import explained_variance
from tests.support import ROOT, nasty


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """The module at the path that a test is parametrized with."""
    path = ROOT / request.param
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", ["examples/dose_response.py"], indirect=True)
def test_conditions_of_dose_and_response_train(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    d_in, batch = 16, 64
    for name, value in {"D_IN": d_in, "D_SAE": 64, "K": 4, "BATCH": batch}.items():
        monkeypatch.setattr(script, name, value)
    x = nasty(20 * batch, d_in)
    with caplog.at_level(logging.WARNING):
        for condition in script.CONDITIONS:
            sae = script.train(x, condition, 10 * batch, 1e-2, seed=0)
            assert sae.cfg.normalize_activations == "none"
            assert math.isfinite(explained_variance(x, sae(x))), condition
    # the first batch is as large as every whitening says
    assert not [r.message for r in caplog.records if "first batch" in r.message]


@pytest.mark.parametrize("script", ["examples/dose_response.py"], indirect=True)
def test_standard_saes_of_further_seeds_begin_where_l0_encloses_k(script: ModuleType) -> None:
    dose = script.MAIN[-1]
    l0_of = {3.0: 112.0, 12.0: 23.0, 9.0: 33.0}  # K is 32
    done = {
        f"{c}": {"dose": dose.name, "condition": "original", "seed": 0, "coefficient": c, "l0": l0}
        for c, l0 in l0_of.items()
    }
    wanted = []
    for l0 in (31.0, 34.0):
        coefficient = script.next_coefficient(done, dose, "original", 1)
        wanted.append(coefficient)
        record = {"dose": dose.name, "condition": "original", "seed": 1}
        done[f"1/{coefficient}"] = {**record, "coefficient": coefficient, "l0": l0}
    assert wanted == [12.0, 9.0]
    assert script.next_coefficient(done, dose, "original", 1) is None
    assert script.next_coefficient({}, dose, "original", 0) == script.FIRST_COEFFICIENT


@pytest.mark.parametrize("script", ["examples/compromise.py"], indirect=True)
def test_compromises_train(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"D_SAE": 32, "K": 4, "BATCH": 64, "STEPS": 10}.items():
        monkeypatch.setattr(script, name, value)
    data = script.SyntheticActivations(
        script.SyntheticDataConfig(d_signal=8, n_features=32, l0=2.0)
    )
    for name in script.COMPROMISES:
        sae, loss = script.train(name, data, 1e-2)
        assert sae.cfg.normalize_activations == "none"
        assert math.isfinite(loss), name


@pytest.mark.parametrize("script", ["benchmarks/correctness.py"], indirect=True)
def test_benchmark_of_checkpoints(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "STEPS", 20)
    (_, before), (_, after) = script.resume_the_final_checkpoint(tmp_path)
    assert before == pytest.approx(after, rel=1e-3)
    _, middle = script.checkpoint_in_the_middle(tmp_path / "middle")
    assert -1 < middle < 1
