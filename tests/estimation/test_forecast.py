"""The forecast of `sae-whiten inspect`: which evidence it chooses, and what it makes of it."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_whiten import ActivationStatistics
from sae_whiten.cli import main
from sae_whiten.estimation import forecast as module
from sae_whiten.estimation.forecast import BASELINE, Difference, Dose, Outcome, forecast

ROOT = Path(__file__).parents[2]


def outcome(dead: float, **over: tuple[float, float, float]) -> Outcome:
    """Of 3 seeds; differences as (mean, low, high), with a noise of 0.01."""
    differences = {name: Difference(*values, 0.01) for name, values in over.items()}
    return Outcome(3, 0.8, 0.5, dead, 0.7, differences)


def dose(mean: float, share: float, centred: Outcome, original: Outcome, dead=0.5) -> Dose:
    outcomes = {BASELINE: outcome(dead), "centred": centred, "original": original}
    return Dose(f"{mean}/{share}", mean, share, outcomes)


UNTOLD = (0.02, -0.01, 0.05)


@pytest.mark.parametrize(
    ("centred", "original", "best"),
    [
        # nothing told, as many dead
        (outcome(0.5, **{BASELINE: UNTOLD}), outcome(0.48, **{BASELINE: UNTOLD}), BASELINE),
        # fewer dead: the plainest that does it
        (
            outcome(0.1, **{BASELINE: UNTOLD}),
            outcome(0.09, **{BASELINE: UNTOLD, "centred": UNTOLD}),
            "centred",
        ),
        # and the next only if it is better than that
        (
            outcome(0.1, **{BASELINE: UNTOLD}),
            outcome(0.1, **{BASELINE: UNTOLD, "centred": (0.03, 0.01, 0.05)}),
            "original",
        ),
        # an interval without 0, but less than the noise of measuring
        (
            outcome(0.5, **{BASELINE: (0.008, 0.001, 0.015)}),
            outcome(0.5, **{BASELINE: UNTOLD}),
            BASELINE,
        ),
        # fewer dead, but told to be worse
        (
            outcome(0.1, **{BASELINE: (-0.03, -0.05, -0.01)}),
            outcome(0.5, **{BASELINE: UNTOLD}),
            BASELINE,
        ),
        # two seeds tell no difference
        (
            replace(outcome(0.5, **{BASELINE: (0.2, 0.1, 0.3)}), seeds=2),
            outcome(0.5, **{BASELINE: UNTOLD, "centred": UNTOLD}),
            BASELINE,
        ),
        # one seed has no interval, and tells no difference
        (
            outcome(0.5, **{BASELINE: (0.2, math.nan, math.nan)}),
            outcome(0.5, **{BASELINE: UNTOLD}),
            BASELINE,
        ),
    ],
)
def test_the_plainest_setting_that_no_other_was_better_than(centred, original, best):
    assert dose(3, 0.1, centred, original).best == best


def test_the_nearest_dose_is_taken_and_what_is_far_from_all_is_called_so(monkeypatch):
    plain = outcome(0.5, **{BASELINE: UNTOLD})
    doses = (dose(0.36, 0.3, plain, plain), dose(3, 0.1, plain, plain))
    monkeypatch.setattr(module, "evidence", lambda: doses)
    assert forecast(2.5, 0.12).dose is doses[1]
    assert forecast(2.5, 0.12).known
    # milder than the mildest is as mild as that
    assert (found := forecast(0.0, 1.0)).dose is doses[0]
    assert found.distance == pytest.approx(math.log10(0.36 / 0.3))
    far = forecast(100.0, 0.1)
    assert far.dose is doses[1]
    assert not far.known
    assert far.distance == pytest.approx(math.log10(100 / 3))
    assert "not measured" in far.advice
    assert far.to_dict()["condition"] is None


def test_the_evidence_in_the_package_is_what_the_published_runs_give(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import dose_response  # pyright: ignore[reportMissingImports]

    folder = ROOT / "docs" / "dose"
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    described = json.loads((folder / "doses.json").read_text())
    packaged = json.loads(
        (ROOT / "sae_whiten" / "estimation" / "dose_response.json").read_text("utf-8")
    )
    computed = json.loads(json.dumps(dose_response.curve(records, described)))
    assert [entry["name"] for entry in packaged] == [entry["name"] for entry in computed]
    for found, wanted in zip(packaged, computed, strict=True):
        assert found["outcomes"].keys() == wanted["outcomes"].keys()
        for name, of in found["outcomes"].items():
            for figure in ("seeds", "auc", "dead", "explained_variance"):
                assert of[figure] == pytest.approx(wanted["outcomes"][name][figure], abs=1e-4)
            undone = wanted["outcomes"][name]["explained_variance_undone"]
            assert of["explained_variance_undone"] == pytest.approx(undone, rel=1e-4)
            for other, difference in of["over"].items():
                assert difference == pytest.approx(
                    wanted["outcomes"][name]["over"][other], abs=1e-4
                )
    sys.modules.pop("dose_response")


def test_inspect_prints_the_forecast_and_gives_it_as_json(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    statistics = ActivationStatistics(32)
    statistics.update(torch.randn(500, 32, generator=generator))
    statistics.provenance = {"hook_name": "a hook"}
    statistics.save(tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["a hook"]["forecast"]
    assert found["dose"] == "natural"
    assert found["known"]
    natural = next(dose for dose in module.evidence() if dose.name == "natural")
    assert list(found["outcomes"]) == list(module.SETTINGS)  # a row for each
    of_half = natural.outcomes["strength-0.5"]
    assert found["outcomes"]["strength-0.5"] == {
        "seeds": of_half.seeds,
        "explained_variance": of_half.explained_variance,
        "explained_variance_undone": of_half.explained_variance_undone,
        "dead": of_half.dead,
        "auc": of_half.auc,
    }
    assert main(["inspect", str(tmp_path)]) == 0
    nearest, table = capsys.readouterr().out.split("forecast")[1].split("SAEs at natural")
    assert "natural" in nearest
    assert found["advice"] in nearest
    row = next(line for line in table.splitlines() if "strength=0.5" in line)
    assert row.split()[-5:] == [
        str(of_half.seeds), f"{of_half.dead:.1%}", f"{of_half.explained_variance:.3f}",
        f"{of_half.explained_variance_undone:.3f}", f"{of_half.auc:.3f}",
    ]  # fmt: skip


def test_what_is_far_from_all_doses_is_shown_without_outcomes(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    statistics = ActivationStatistics(8)
    statistics.update(torch.randn(500, 8, generator=generator) + 1000)
    statistics.save(tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.split("forecast")[1]
    assert "not measured; at the nearest dose:" in printed
    assert "SAEs at" not in printed


def test_explained_variance_below_zero_has_no_digits(tmp_path, capsys, monkeypatch):
    far_below = Outcome(3, 0.8, -132.0, 0.1, 0.7, {})
    monkeypatch.setattr(
        module, "evidence", lambda: (Dose("2-decades-gamma-3", 0.3, 0.3, {BASELINE: far_below}),)
    )
    statistics = ActivationStatistics(8)
    statistics.update(torch.randn(500, 8, generator=torch.Generator().manual_seed(0)))
    statistics.save(tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path)]) == 0
    table = capsys.readouterr().out.split("SAEs at 2 decades, mean 3 sd")[1]
    assert "below 0" in table
    assert "132" not in table
