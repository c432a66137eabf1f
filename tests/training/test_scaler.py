"""The scaler that SAELens' trainers and evaluators hold."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from torch import Tensor

from sae_whiten import (
    CorruptFileError,
    CovarianceWhiteningScaler,
    WhiteningConfig,
    WhiteningTrainer,
)
from tests.reference import (
    D_IN,
    UNIT,
    estimated_by_stock,
    large_means,
)
from tests.support import friendly, runner_config, training_sae, whitening_of


def saved(folder: Path) -> Path:
    scaler = CovarianceWhiteningScaler(WhiteningConfig(kind="zca"))
    scaler.whitening = whitening_of(friendly(500, 8), scaler.config)  # pyright: ignore[reportAttributeAccessIssue]
    path = folder / "activation_scaler.json"
    scaler.save(str(path))
    return path


def test_what_was_saved_whitens_alike(tmp_path):
    loaded = CovarianceWhiteningScaler()
    loaded.load(saved(tmp_path))
    x = friendly(20, 8)
    assert loaded.config.kind == "zca"
    assert torch.equal(loaded.scale(x), whitening_of(friendly(500, 8), loaded.config).whiten(x))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        "null",
        "{}",
        {"has_whitening": None},
        {"has_whitening": "yes"},
        {"scaling_factor": float("nan")},
        {"scaling_factor": 2.0},
        {"whitening_config": None},
        {"whitening_config": {"kind": "cholesky"}},
        {"whitening_config": {"bogus": 1}},
    ],
    ids=lambda content: str(content)[:40],
)
def test_a_file_that_is_not_of_this_class_is_refused_and_changes_nothing(
    content: str | dict[str, Any], tmp_path
):
    path = saved(tmp_path)
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(content)
    scaler = CovarianceWhiteningScaler()
    with pytest.raises(CorruptFileError, match=re.escape(str(path))):
        scaler.load(path)
    assert scaler.config == WhiteningConfig()
    assert scaler.whitening is None
    assert scaler.scaling_factor is None


def test_a_missing_whitening_is_never_estimated_anew(tmp_path):
    path = saved(tmp_path)
    (tmp_path / "activation_whitening.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="activation_whitening"):
        CovarianceWhiteningScaler().load(path)


def test_bfloat16_activations_are_whitened_in_float32() -> None:
    estimation, x = large_means(4096), large_means(256, start=4096).bfloat16()

    def error(z: Tensor, whitening: Any) -> float:
        expected = (x.double() - whitening.mean) @ whitening.matrix
        return float((z.double() - expected).norm() / expected.norm())

    scaler = ActivationScaler()
    scaler.whitening = estimated_by_stock(estimation)
    assert error(scaler.scale(x), scaler.whitening) > 0.02

    ours = CovarianceWhiteningScaler()
    ours.whitening = whitening = whitening_of(estimation)
    z = ours.scale(x)
    assert z.dtype == torch.bfloat16
    expected = (x.double() - whitening.mean) @ whitening.W
    # one rounding to bfloat16, after float32: centring, W, product and what is left of the mean
    to_bfloat16 = torch.finfo(torch.bfloat16).eps / 2
    in_float32 = (D_IN + 4) * UNIT * ((x.double() - whitening.mean).abs() @ whitening.W.abs())
    bound = to_bfloat16 * (expected.abs() + in_float32) + in_float32
    assert ((z.double() - expected).abs() <= bound).all()

    back = ours.unscale(z)
    expected = z.double() @ whitening.W_inv + whitening.mean
    total = z.double().abs() @ whitening.W_inv.abs() + whitening.mean.abs()
    in_float32 = (D_IN + 4) * UNIT * total
    bound = to_bfloat16 * (expected.abs() + in_float32) + in_float32
    assert back.dtype == torch.bfloat16
    assert ((back.double() - expected).abs() <= bound).all()

    # and inside autocast, which would turn the product into a bfloat16 one
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours.scale(x), z)
        assert torch.equal(ours.scale(x.float()).bfloat16(), z)


def batches(n: int, d_in: int = 8) -> Iterator[torch.Tensor]:
    return iter(friendly(50 * n, d_in).split(50))


def test_estimation_is_called_as_saelens_calls_it(caplog):
    config = WhiteningConfig(tolerance=1e-4)
    by_position, by_name = CovarianceWhiteningScaler(config), CovarianceWhiteningScaler(config)
    by_position.estimate_whitening(8, batches(20), 10)
    by_name.estimate_whitening(
        d_in=8, data_provider=batches(20), n_batches_for_norm_estimate=10, eps=1e-3
    )
    for scaler in (by_position, by_name):
        assert scaler.whitening is not None
        assert scaler.whitening.n_samples == 500
        assert scaler.whitening.matrix.shape == (8, 8)
    assert "n_batches_for_norm_estimate was reached" in caplog.text
    x = friendly(5, 8)
    assert torch.equal(by_name(x), by_name.scale(x))


def test_what_means_something_else_for_saelens_is_refused_before_a_batch_is_read():
    scaler, provider = CovarianceWhiteningScaler(), batches(3)
    with pytest.raises(ValueError, match="WhiteningConfig.eps"):
        scaler.estimate_whitening(8, provider, 10, 0.5)
    with pytest.raises(ValueError, match="estimate_whitening"):
        scaler.estimate_scaling_factor(
            d_in=8, data_provider=provider, n_batches_for_norm_estimate=1
        )
    with pytest.raises(ValueError, match="n_batches_for_norm_estimate=0"):
        scaler.estimate_whitening(8, provider, 0)
    with pytest.raises(ValueError, match="no scaling factor"):
        scaler.scaling_factor = 2.0
    with pytest.raises(TypeError, match="sae_whiten.Whitening, got ActivationWhitening"):
        scaler.whitening = ActivationWhitening(torch.zeros(8), torch.eye(8), torch.eye(8))  # pyright: ignore[reportAttributeAccessIssue]
    assert len(list(provider)) == 3
    assert (scaler.whitening, scaler.scaling_factor) == (None, None)


def test_a_config_that_limits_the_batches_is_obeyed_unless_samples_are_asked_for(caplog):
    def estimated(**options: Any) -> int:
        n_batches = options.pop("n_batches_for_norm_estimate", 1000)
        cfg = replace(
            runner_config().to_sae_trainer_config(), n_batches_for_norm_estimate=n_batches
        )
        provider = (friendly(128, 32, seed) for seed in range(1000))
        trainer = WhiteningTrainer(cfg, training_sae("topk"), provider, WhiteningConfig(**options))
        trainer.estimate_whitening()
        assert trainer.whitening is not None
        return trainer.whitening.n_samples

    assert estimated(tolerance=1e-4) == 32_000  # 1000 per dimension
    caplog.clear()
    assert estimated(tolerance=1e-4, n_batches_for_norm_estimate=20) == 20 * 128
    assert "n_batches_for_norm_estimate was reached" in caplog.text
    assert estimated(n_samples=5000, n_batches_for_norm_estimate=20) == 40 * 128
