"""What `sae-whiten inspect` says, against figures computed directly from the activations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from torch import Tensor

from sae_whiten import ActivationStatistics, Whitening, WhiteningConfig
from sae_whiten.cli import main
from sae_whiten.estimation.inspection import describe_statistics
from tests.support import friendly, nasty

HOOK = "blocks.0.hook_resid_pre"


def statistics_of(x: Tensor, hook_name: str = HOOK) -> ActivationStatistics:
    statistics = ActivationStatistics(x.shape[-1])
    statistics.update(x)
    statistics.provenance = {"hook_name": hook_name, "inflation": 0.01}
    return statistics


@pytest.mark.parametrize("make", [friendly, nasty])
def test_every_figure_is_that_of_the_activations(make) -> None:
    x = make(3000, 16)
    fit, test = x[:2000].double(), x[2000:].double()
    config = WhiteningConfig(eps=0.01, shrinkage=0.05, kind="zca", strength=0.5)
    found = describe_statistics(statistics_of(x[:2000]), config, statistics_of(x[2000:]))
    assert json.loads(json.dumps(found)).keys() == found.keys()

    eigenvalues = torch.linalg.eigvalsh(torch.cov(fit.T)).flip(0)
    assert found["eigenvalues"] == pytest.approx(eigenvalues.tolist(), rel=1e-6)
    assert (found["n"], found["d_in"], found["excess"], found["null"]) == (2000, 16, 0.01, 0)
    assert found["condition"] == pytest.approx(float(eigenvalues[0] / eigenvalues[-1]), rel=1e-6)
    norm = float(fit.mean(0).norm() / fit.var(0).sum().sqrt())
    assert found["mean_over_std"] == pytest.approx(norm)
    variances = fit.var(0)
    assert list(found["outliers"]) == variances.argsort(descending=True)[:3].tolist()
    ratio = float(variances.max() / np.median(variances.numpy()))  # not torch's lower median
    assert found["outliers"][int(variances.argmax())] == pytest.approx(ratio, rel=1e-9)

    # what stays of a direction's weight is what counts, whatever the kind and the strength
    regularised = 0.95 * eigenvalues + (0.05 + 0.01) * eigenvalues.mean()
    made = found["regularised"]
    assert made["eigenvalues"] == pytest.approx(regularised.tolist(), rel=1e-9)
    assert made["condition_number"] == pytest.approx(float(regularised[0] / regularised[-1]))
    assert made["n_damped"] == int((eigenvalues / regularised < 0.5).sum())
    assert made["shrinkage"] == 0.05
    assert made["oas"] == pytest.approx(float(OAS().fit(fit.numpy()).shrinkage_), rel=1e-6)

    white = Whitening.from_statistics(
        statistics_of(x[:2000]), WhiteningConfig(eps=0.01, shrinkage=0.05)
    )
    z = torch.linalg.eigvalsh(torch.cov(white.whiten(test).T))
    held_out = found["held_out"]
    assert held_out["n"] == 1000
    assert held_out["mean"] == pytest.approx(float(z.mean()), rel=1e-9)
    assert held_out["largest"] == pytest.approx(float(z[-1]), rel=1e-9)
    assert held_out["smallest"] == pytest.approx(float(z[0]), rel=1e-6)
    assert held_out["distance"] == pytest.approx(float((z - 1).norm()) / 4, rel=1e-9)


def test_null_directions_do_not_count_as_far_from_white() -> None:
    x = friendly(40_000, 8).double()
    x = torch.cat([x, x[:, :1]], dim=1)  # of rank 8 in 9 dimensions
    found = describe_statistics(
        statistics_of(x[:20_000]), WhiteningConfig(eps=0), statistics_of(x[20_000:])
    )
    assert found["null"] == 1
    assert found["regularised"]["n_damped"] == 0
    assert len(found["held_out"]["whitened_eigenvalues"]) == 8
    # 3 times the expected sqrt((1 / 20000 + 1 / 20000) * 8)
    assert found["held_out"]["distance"] < 0.09
    assert abs(found["held_out"]["mean"] - 1) < 0.03


def test_what_is_not_held_out_is_refused() -> None:
    x = friendly(200, 8)
    with pytest.raises(ValueError, match="the same as those"):
        other = statistics_of(x)
        other.provenance["date"] = "another"
        describe_statistics(statistics_of(x), held_out=other)
    with pytest.raises(ValueError, match="width 7.* 8"):
        describe_statistics(statistics_of(x), held_out=statistics_of(x[:, :7]))


def save(folder: Path, x: Tensor, *hooks: str) -> str:
    for i, hook_name in enumerate(hooks):
        statistics_of(x * (i + 1), hook_name).save(folder / f"{hook_name}.safetensors")
    return str(folder)


def test_the_command_shows_it_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = friendly(3000, 8)
    fit = save(tmp_path / "fit", x[:2000], HOOK, "blocks.1.mlp")
    test = save(tmp_path / "test", x[2000:], HOOK)
    flags = ["--whitening.eps", "0.5", "--whitening.shrinkage", "oas"]
    assert main(["inspect", fit, "--held-out", test, *flags, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    config = WhiteningConfig(eps=0.5, shrinkage="oas")
    expected = describe_statistics(statistics_of(x[:2000]), config, statistics_of(x[2000:]))
    assert rows[HOOK] == json.loads(json.dumps(expected))
    assert rows["blocks.1.mlp"]["held_out"] is None

    figures = str(tmp_path / "figures")
    assert main(["inspect", fit, "--held-out", test, *flags, "--plot", figures]) == 0
    out = capsys.readouterr().out
    assert "eps 0.5 (relative), shrinkage oas" in out
    assert f"{rows[HOOK]['held_out']['distance']:.3f}" in out
    assert f"{rows[HOOK]['regularised']['condition_number']:.3g}" in out
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "spectra",
        "cumulative_variance",
        "held_out",
    }


def test_held_out_statistics_of_other_hooks_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = friendly(300, 8)
    fit, test = save(tmp_path / "fit", x, HOOK), save(tmp_path / "test", x, "blocks.5.mlp")
    assert main(["inspect", fit, "--held-out", test]) == 2
    assert "none of these hooks, only blocks.5.mlp" in capsys.readouterr().err


@pytest.mark.parametrize("n", [0, 1])
def test_a_file_without_a_covariance_is_named(
    n: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, empty = tmp_path / "good", tmp_path / "empty"
    statistics_of(friendly(100, 8)).save(good)
    statistics_of(friendly(n, 8)).save(empty)
    assert main(["inspect", str(good), str(empty)]) == 2
    assert f"{empty} holds no covariance" in capsys.readouterr().err


def test_one_hook_from_two_sources_is_shown_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = friendly(600, 8)
    paths = [save(tmp_path / "a", x[:300], HOOK), save(tmp_path / "b", x[300:500], HOOK)]
    assert main(["inspect", *paths, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["n"] for row in rows.values()] == [300, 200]
