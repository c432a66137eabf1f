import logging
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.training.activation_scaler import ActivationScaler
from sklearn.covariance import OAS
from torch import Tensor

from sae_whiten import CorruptFileError, Whitening, WhiteningConfig
from sae_whiten._files import save_tensors
from sae_whiten.estimation.spectrum import null_tolerance
from sae_whiten.whitening import full_precision, oas_shrinkage
from tests.reference import (
    D_IN,
    Basis,
    activations,
    estimated_by_stock,
    seeded,
)
from tests.support import (
    friendly,
    nasty,
    whitening_of,
    without_type_checks,
)

EXACT = WhiteningConfig(eps=0.0)


def covariance_error(z: Tensor) -> float:
    """Largest eigenvalue of |cov(z) - I|."""
    difference = torch.cov(z.double().T) - torch.eye(z.shape[1], dtype=torch.float64)
    return float(torch.linalg.matrix_norm(difference, 2))


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["pca", "zca"]),
    d=st.integers(2, 40),
    condition=st.sampled_from(["friendly", "nasty"]),
    seed=st.integers(0, 1000),
)
def test_whitened_covariance_is_the_identity(kind, d, condition, seed):
    x = (nasty if condition == "nasty" else friendly)(20 * d, d, seed).double()
    whitening = whitening_of(x, WhiteningConfig(kind=kind, eps=0.0))
    # rounding of the eigendecomposition: d * eps, times the condition number of the covariance
    spread = whitening.covariance_eigenvalues
    bound = 10 * d * torch.finfo(torch.float64).eps * float(spread[-1] / spread[0])
    assert covariance_error(whitening.whiten(x)) < bound
    identity = torch.eye(d, dtype=torch.float64)
    assert torch.allclose(whitening.W @ whitening.W_inv, identity, atol=1e-10)


@pytest.mark.parametrize("kind", ["pca", "zca"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_partial_whitening_takes_powers_of_the_eigenvalues(kind, strength):
    x = nasty(2000, 16, dtype=torch.float64)
    whitening = whitening_of(x, WhiteningConfig(kind=kind, strength=strength, eps=0.0))
    expected = whitening.covariance_eigenvalues ** (1 - strength)
    found = torch.linalg.eigvalsh(torch.cov(whitening.whiten(x).T))
    assert torch.allclose(found, expected, rtol=1e-7)
    if strength == 0 and kind == "zca":
        assert torch.allclose(whitening.W, torch.eye(16, dtype=torch.float64), atol=1e-12)


def test_zca_is_symmetric_and_pca_has_fixed_signs():
    x = nasty(2000, 16)
    W = whitening_of(x, WhiteningConfig(kind="zca")).W
    assert torch.allclose(W, W.T, rtol=1e-9, atol=1e-9)
    W = whitening_of(x, WhiteningConfig(kind="pca")).W
    assert (W.gather(0, W.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_two_estimates_of_well_separated_directions_agree_in_sign():
    a = whitening_of(nasty(20000, 8)[:10000]).W
    b = whitening_of(nasty(20000, 8)[10000:]).W
    cosines = torch.nn.functional.cosine_similarity(a, b, dim=0)
    assert (cosines > 0.9).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_result_does_not_depend_on_the_unit(scale):
    x = friendly(5000, 16).double()
    reference, scaled = whitening_of(x), whitening_of(x * scale)
    assert torch.allclose(reference.whiten(x), scaled.whiten(x * scale), rtol=1e-9, atol=1e-9)
    # the built-in's absolute eps does depend on it
    absolute = WhiteningConfig(eps_mode="absolute")
    error = covariance_error(whitening_of(x * scale, absolute).whiten(x * scale))
    assert (error > 0.9) == (scale == 1e-3)


def test_absolute_eps_is_the_transform_of_the_built_in():
    x = friendly(4096, 16)
    built_in = ActivationScaler()
    built_in.estimate_whitening(16, iter(x.split(512)), n_batches_for_norm_estimate=8)
    assert built_in.whitening is not None
    ours = whitening_of(x, WhiteningConfig(eps_mode="absolute"))
    assert torch.allclose(ours.W, built_in.whitening.matrix, rtol=1e-9, atol=1e-9)
    assert torch.allclose(ours.W_inv, built_in.whitening.inverse_matrix, rtol=1e-9, atol=1e-9)
    assert torch.allclose(ours.mean, built_in.whitening.mean, rtol=1e-12)


@pytest.mark.parametrize("n", [20, 100, 3000])
def test_oas_is_that_of_scikit_learn(n):
    x = friendly(n, 16).double()
    reference = OAS().fit(x.numpy())
    whitening = whitening_of(x, WhiteningConfig(shrinkage="oas", eps=0.0))
    assert whitening.shrinkage == pytest.approx(reference.shrinkage_, rel=1e-9)
    # scikit-learn's covariance has the divisor n, ours n - 1
    covariance = torch.from_numpy(reference.covariance_) * n / (n - 1)
    assert torch.allclose(
        whitening.W.T @ covariance @ whitening.W, torch.eye(16).double(), atol=1e-9
    )


def test_oas_of_a_multiple_of_the_identity_shrinks_fully():
    assert oas_shrinkage(torch.ones(8, dtype=torch.float64), 100) == 1.0


def test_fixed_shrinkage_moves_eigenvalues_toward_their_mean():
    x = nasty(1000, 8, dtype=torch.float64)
    plain = whitening_of(x, EXACT)
    shrunk = whitening_of(x, WhiteningConfig(shrinkage=0.25, eps=0.0))
    raw = plain.covariance_eigenvalues
    assert torch.allclose(shrunk.eigenvalues, 0.75 * raw + 0.25 * raw.mean())


@pytest.mark.parametrize("layer_norm", [True, False])
def test_directions_without_variance_are_normal_input_and_not_blown_up(layer_norm):
    # after a LayerNorm one direction has no variance but that of rounding
    x = torch.nn.functional.layer_norm(friendly(3000, 16), (16,))
    x = torch.cat([x[:, :14], torch.full((3000, 1), 7.0), x[:, :1]], dim=1)  # constant, copied
    x = torch.nn.functional.layer_norm(x, (16,)) if layer_norm else x
    whitening = whitening_of(x)
    gains = torch.linalg.svdvals(whitening.W)
    typical = whitening.covariance_eigenvalues.mean().rsqrt()
    assert torch.isfinite(whitening.W).all()
    live = whitening.covariance_eigenvalues > 1e-9
    assert 1 <= (~live).sum() <= 2
    assert gains.max() <= 1.001 * max(typical, whitening.covariance_eigenvalues[live].min().rsqrt())
    assert torch.allclose(whitening.dewhiten(whitening.whiten(x)), x, atol=1e-4)
    built_in = ActivationScaler()
    built_in.estimate_whitening(16, iter([x]), n_batches_for_norm_estimate=1)
    assert built_in.whitening is not None
    assert torch.linalg.svdvals(built_in.whitening.matrix).max() > 30


@pytest.mark.parametrize("n", [5, 17, 100])
def test_too_few_samples_are_shrunk_and_warned_about(n, caplog):
    x = friendly(20000, 16)
    with caplog.at_level(logging.WARNING, "sae_whiten"):
        whitening = whitening_of(x[:n])
    assert "1600 activations" in caplog.text
    assert whitening.shrinkage > 0
    held_out = torch.linalg.eigvalsh(torch.cov(whitening.whiten(x[1000:]).T))
    assert held_out.max() < 10
    if n == 17:  # the built-in, from as many
        built_in = ActivationScaler()
        built_in.estimate_whitening(16, iter([x[:n]]), n_batches_for_norm_estimate=1)
        assert torch.linalg.eigvalsh(torch.cov(built_in.scale(x[1000:]).T)).max() > 30


def test_enough_samples_are_not_warned_about(caplog):
    with caplog.at_level(logging.WARNING, "sae_whiten"):
        assert whitening_of(friendly(160, 16)).shrinkage == 0
    assert not caplog.text


def test_shrinkage_zero_means_none_even_with_few_samples():
    assert whitening_of(friendly(20, 16), WhiteningConfig(shrinkage=0.0)).shrinkage == 0


def test_constant_activations_are_an_error():
    with pytest.raises(ValueError, match="no variance"):
        whitening_of(torch.full((50, 4), 2.0))


def test_singular_covariance_with_eps_zero_absolute_is_an_error():
    x = friendly(500, 4)
    x[:, 0] = 0
    config = WhiteningConfig(eps=0.0, eps_mode="absolute")
    with pytest.raises(
        ValueError, match="1 directions have no variance beyond rounding errors, and eps=0"
    ):
        whitening_of(x, config)
    for seed in range(10):  # the sign of an eigenvalue that should be 0 is one of rounding
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(500, 8, generator=g, dtype=torch.float64)
        x[:, 4:] = x[:, :4]
        with pytest.raises(
            ValueError, match="4 directions have no variance beyond rounding errors, and eps=0"
        ):
            whitening_of(x, config)
    assert whitening_of(x, WhiteningConfig(strength=0.0, eps=0.0, eps_mode="absolute"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_whitening_and_dewhitening_keep_shape_and_dtype(dtype):
    x = friendly(60, 8)
    whitening = whitening_of(friendly(1000, 8))
    z = whitening.whiten(x.to(dtype).reshape(4, 15, 8))
    assert z.shape == (4, 15, 8)
    assert z.dtype == whitening.dewhiten(z).dtype == dtype


def test_bfloat16_activations_are_whitened_in_float32():
    x = nasty(2000, 32).bfloat16()
    whitening = whitening_of(x)
    exact = (x.double() - whitening.mean) @ whitening.W
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = whitening.whiten(x)
    # one rounding to 8 bits at the end is all there may be
    assert ((z.double() - exact).norm() / exact.norm()) < torch.finfo(torch.bfloat16).eps
    naive = (x - whitening.mean.bfloat16()) @ whitening.W.bfloat16()
    assert ((naive.double() - exact).norm() / exact.norm()) > 0.02


def test_float32_loses_nothing_to_a_large_mean():
    x = nasty(2000, 64)
    whitening = whitening_of(x, EXACT)
    exact = (x.double() - whitening.mean) @ whitening.W
    error = (whitening.whiten(x).double() - exact).norm() / exact.norm()
    # rounding of x - mean and of W, amplified by the condition number of W; not by |mean|
    assert error < torch.finfo(torch.float32).eps * whitening.condition_number
    rounded_mean = (x - whitening.mean.float()) @ whitening.W.float()
    assert (rounded_mean.double() - exact).norm() / exact.norm() > 5 * error


def test_shapes_that_do_not_fit_are_refused():
    whitening = whitening_of(friendly(500, 8))
    for method in (whitening.whiten, whitening.dewhiten):
        with pytest.raises(ValueError, match=r"\(\.\.\., 8\), got \(5, 9\)"):
            method(torch.zeros(5, 9))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_are_refused_instead_of_truncated(dtype):
    whitening = whitening_of(friendly(500, 8))
    with without_type_checks():
        for method in (whitening.whiten, whitening.dewhiten):
            with pytest.raises(ValueError, match=f"floating point, got {dtype}"):
                method(torch.ones(5, 8, dtype=dtype))


@pytest.mark.parametrize(
    "changed",
    [
        {"n_samples": None},
        {"n_samples": -5},
        {"shrinkage": float("nan")},
        {"shrinkage": 2.0},
        {"config": None},
        {"config": {"eps": -1}},
        {"mean": torch.full((8,), float("nan"), dtype=torch.float64)},
        {"mean": torch.zeros(9, dtype=torch.float64)},
        {"matrix": torch.zeros(8, 8, dtype=torch.float64)},
        {"matrix": torch.eye(8)},
        {"inverse_matrix": 2 * torch.eye(8, dtype=torch.float64)},
        {"inverse_matrix": torch.ones(8, dtype=torch.float64)},
        {"eigenvalues": torch.full((8,), float("inf"), dtype=torch.float64)},
        {"covariance_eigenvalues": None},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_file_that_holds_no_whitening_is_refused_by_its_path(changed, tmp_path):
    path = tmp_path / "w.safetensors"
    tensors, fields = whitening_of(friendly(500, 8))._content()
    for name, value in changed.items():
        if name in fields:
            fields[name] = value
        elif value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_tensors(path, "whitening", tensors, fields)
    with pytest.raises(CorruptFileError, match=re.escape(str(path))):
        Whitening.load(path)


@pytest.mark.parametrize("eps", [1e-18, 1e-14])
def test_an_ill_conditioned_whitening_is_taken_for_what_it_is(eps, tmp_path):
    x = nasty(3000, 24, dtype=torch.float64) * torch.logspace(-6, 0, 24, dtype=torch.float64)
    for kind in ("pca", "zca"):
        config = WhiteningConfig(kind=kind, eps=eps, shrinkage=0.0, eps_mode="absolute")
        whitening = whitening_of(x, config)
        assert whitening.condition_number > 1e6
        whitening.save(tmp_path / "w.safetensors")
        assert torch.equal(Whitening.load(tmp_path / "w.safetensors").W, whitening.W)


def test_saving_and_loading_is_exact(tmp_path):
    config = WhiteningConfig(kind="zca", shrinkage=0.1, strength=0.7)
    whitening = whitening_of(nasty(500, 8), config)
    whitening.save(tmp_path / "w.safetensors")
    loaded = Whitening.load(tmp_path / "w.safetensors")
    for name in ("mean", "W", "W_inv", "eigenvalues", "covariance_eigenvalues"):
        assert torch.equal(getattr(loaded, name), getattr(whitening, name))
    assert loaded.config == config
    assert (loaded.n_samples, loaded.shrinkage) == (500, 0.1)
    with pytest.raises(CorruptFileError, match="holds whitening, expected activation_statistics"):
        from sae_whiten import ActivationStatistics

        ActivationStatistics.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "cholesky"},
        {"eps": -1.0},
        {"eps": float("nan")},
        {"eps": float("inf")},
        {"eps": "small"},
        {"eps_mode": "percent"},
        {"shrinkage": 1.5},
        {"shrinkage": "lw"},
        {"strength": -0.1},
        {"strength": 1.1},
        {"loss_space": "both"},
        {"n_samples": 1},
        {"n_samples": 10.5},
        {"on_nonfinite": "ignore"},
    ],
)
def test_invalid_configurations_are_refused_at_construction(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"WhiteningConfig\.{name}="):
        WhiteningConfig(**options)


def test_a_number_of_samples_beside_given_statistics_is_refused():
    with pytest.raises(ValueError, match=r"n_samples=2000: the statistics in stats are taken"):
        WhiteningConfig(statistics="stats", n_samples=2000)


def test_config_survives_a_round_trip():
    config = WhiteningConfig(kind="zca", shrinkage="oas", n_samples=10)
    assert WhiteningConfig.from_dict(config.to_dict()) == config
    # earlier versions accepted both, and took the statistics
    given = WhiteningConfig(statistics="stats")
    assert WhiteningConfig.from_dict({**given.to_dict(), "n_samples": 10}) == given
    with pytest.raises(ValueError, match="no field bogus"):
        WhiteningConfig.from_dict({"bogus": 1})


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_full_float32_whatever_is_allowed_elsewhere(precision):
    x = nasty(500, 64)
    whitening = whitening_of(x)
    expected = whitening.whiten(x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(whitening.whiten(x), expected)
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(RuntimeError), full_precision(x.device):
            raise RuntimeError
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_mean_in_low_precision_does_not_blow_up_a_direction_of_large_variance(dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 64, generator=g)
    x[:, :2] = 12 * x[:, :2] + torch.tensor([3000.0, -3000.0])
    x = x.to(dtype)
    whitening = whitening_of(x)
    z = (x.double() - whitening.mean) @ whitening.W
    # bfloat16 steps are 16 wide at 3000; more than unit variance would be amplification
    assert torch.linalg.eigvalsh(torch.cov(z.T))[-1] < 1.01


def off_identity(whitened: Tensor) -> float:
    covariance = torch.cov(whitened.double().T)
    return float((covariance - torch.eye(D_IN)).norm() / D_IN**0.5)


def test_whitening_does_not_depend_on_the_unit() -> None:
    x = activations(8192)
    for scale, worst in ((1.0, 0.1), (1e-3, 0.9)):
        stock = estimated_by_stock(x * scale)
        z = (x.double() * scale - stock.mean) @ stock.matrix
        assert (off_identity(z) > 0.9) == (worst == 0.9)

    z = whitening_of(x.double()).whiten(x.double())
    for scale in (1e-6, 1e-3, 1e3, 1e6):
        ours = whitening_of(x.double() * scale)
        # eigenvalues are exact to rounding of the largest, and the smallest is 1e-3 of the mean:
        # in float64, 1e-9 is far above rounding and far below any effect of the unit
        assert torch.allclose(ours.whiten(x.double() * scale), z, rtol=0, atol=1e-9)


def held_out_spectrum(whitening: Any, x: Tensor) -> Tensor:
    """Variances of held-out activations in whitened coordinates; all 1 if it were perfect."""
    z = (x.double() - whitening.mean) @ whitening.matrix
    return torch.linalg.eigvalsh(torch.cov(z.T))


@pytest.mark.parametrize("n", [12, 18])
def test_few_samples_are_shrunk_and_warned_about(n: int, caplog: pytest.LogCaptureFixture) -> None:
    from sklearn.covariance import OAS

    few, held_out = activations(n, seed=3), activations(8192)
    stock = held_out_spectrum(estimated_by_stock(few), held_out)

    with caplog.at_level(logging.WARNING, logger="sae_whiten"):
        ours = whitening_of(few)
    assert f"{n} activations of 16 dimensions" in caplog.text
    assert "1600 activations" in caplog.text

    # the same from scikit-learn's estimate, whose divisor is n instead of n - 1
    covariance = torch.from_numpy(OAS().fit(few.double().numpy()).covariance_) * n / (n - 1)
    ridge = 1e-3 * covariance.trace() / D_IN * torch.eye(D_IN)
    values, basis = torch.linalg.eigh(covariance + ridge)
    expected = Basis(few.double().mean(0), basis / values.sqrt(), basis)
    spectrum = held_out_spectrum(ours, held_out)
    # eigenvalues are backward stable: relative to the largest, times the condition of the estimate
    rounding = 100 * D_IN * torch.finfo(torch.float64).eps * float(values[-1] / values[0])
    assert torch.allclose(spectrum, held_out_spectrum(expected, held_out), rtol=rounding)
    assert spectrum[-1] < stock[-1] / 10

    caplog.clear()
    enough = activations(1600, seed=3)
    with caplog.at_level(logging.WARNING, logger="sae_whiten"):
        assert whitening_of(enough).shrinkage == 0
    assert not caplog.records


def test_the_number_that_the_warning_names_suffices() -> None:
    """Held-out variance of Gaussian activations is then inflated by d / (n - d), about 1%."""
    basis = torch.randn(D_IN, D_IN, dtype=torch.float64, generator=seeded(1))
    off = []
    for seed in range(20):
        x = torch.randn(1600, D_IN, dtype=torch.float64, generator=seeded(seed)) @ basis
        whitening = whitening_of(x, WhiteningConfig(eps=0.0))
        # exactly, for the covariance of the whole population is known
        off.append(float((whitening.W.T @ basis.T @ basis @ whitening.W).trace() / D_IN - 1))
    mean, spread = torch.tensor(off).mean(), torch.tensor(off).std() / 20**0.5
    assert abs(float(mean) - D_IN / (1600 - D_IN)) < 4 * float(spread)


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_constant_dimensions_are_not_blown_up(kind: Any) -> None:
    x = activations(4096)
    x[:, [1, 8]] = torch.tensor([7.3, -0.4])
    step = torch.zeros(D_IN, dtype=torch.float64)
    step[8] = 1.0

    stock = estimated_by_stock(x)
    assert (step @ stock.matrix).norm() > 31

    ours = whitening_of(x, WhiteningConfig(kind=kind))
    variances = x.double().var(dim=0)
    average = float(variances.mean()) ** -0.5
    # the gain of a direction of average variance
    assert float((step @ ours.W).norm()) == pytest.approx(average, rel=1e-9)
    assert torch.allclose(ours.W @ ours.W_inv, torch.eye(D_IN, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("shrinkage", [None, 1e-6, "oas"])
def test_directions_without_variance_are_not_blown_up(shrinkage: Any) -> None:
    """Behind a LayerNorm every activation sums to 0, but for float32 rounding."""
    x = torch.randn(4096, D_IN, generator=seeded(4)) * torch.logspace(-1, 1, D_IN)
    x = torch.nn.functional.layer_norm(x, (D_IN,))
    step = torch.full((D_IN,), D_IN**-0.5, dtype=torch.float64)
    variances = x.double().var(dim=0)
    assert (x.double() @ step).var() < null_tolerance(D_IN) * variances.max()
    assert (step @ estimated_by_stock(x).matrix).norm() > 31 / float(variances.mean()) ** 0.5
    gain = float((step @ whitening_of(x, WhiteningConfig(shrinkage=shrinkage)).W).norm())
    # of rounding, the other directions are 1e-6 into it at most
    assert gain == pytest.approx(float(variances.mean()) ** -0.5, rel=1e-4)


def test_a_whitening_with_another_mean_uses_it() -> None:
    x = activations(200)
    whitening = whitening_of(x)
    whitening.whiten(x)
    moved = replace(whitening, mean=whitening.mean + 1)
    assert torch.allclose(moved.whiten(x + 1), whitening.whiten(x), atol=1e-3)


def test_another_config_is_taken_where_it_changes_nothing() -> None:
    whitening = whitening_of(activations(200))
    other = whitening.with_config(WhiteningConfig(loss_space="whitened"))
    assert other.config.loss_space == "whitened"
    assert other.digest == whitening.digest
    with pytest.raises(ValueError, match="derived with kind='pca', and kind='zca' is asked for"):
        whitening.with_config(WhiteningConfig(kind="zca"))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("unit", [0.01, 100.0])
def test_root_mean_square_is_that_of_whitened_activations(strength: float, unit: float) -> None:
    x = unit * activations(500).double()
    whitening = whitening_of(x, WhiteningConfig(strength=strength))
    measured = float(whitening.whiten(x).var(dim=0).mean().sqrt())
    assert whitening.root_mean_square == pytest.approx(measured, rel=1e-9)
