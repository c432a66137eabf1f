import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    SAE,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
    TemporalSAE,
    Transcoder,
    TranscoderConfig,
)
from torch import Tensor

from sae_whiten import (
    ActivationStatistics,
    FoldError,
    Whitening,
    WhiteningConfig,
    fold_whitening_into_weights,
    unfold_whitening_from_weights,
)
from sae_whiten.architectures import folding
from sae_whiten.architectures.description import describe
from sae_whiten.folding import fold, unfold
from tests.support import (
    ARCHITECTURES,
    friendly,
    nasty,
    training_sae,
    whitening_of,
    without_type_checks,
)

D, N = 32, 600
EPS32 = torch.finfo(torch.float32).eps


def whitened_reference(sae, whitening: Whitening, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of unscale(sae(scale(x))) in float64, from the formulas."""
    wide = copy.deepcopy(sae).to(torch.float64)
    if hasattr(wide, "threshold"):
        wide.threshold.data = wide.threshold.data.double()
    z = (x.double() - whitening.mean) @ whitening.W
    latents = wide.encode(z)
    return latents, wide.decode(latents) @ whitening.W_inv + whitening.mean


@torch.no_grad()
def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def changed(a: Tensor, b: Tensor) -> float:
    """Share of active latents that only one of the two has."""
    return float(((a != 0) ^ (b != 0)).sum() / ((a != 0) | (b != 0)).sum())


@pytest.mark.parametrize("data", ["friendly", "nasty"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_float64_the_fold_is_exact(architecture, apply_b_dec_to_input, data):
    x = friendly(N, D).double() if data == "friendly" else nasty(N, D, dtype=torch.float64)
    whitening = whitening_of(x, WhiteningConfig(eps=1e-9))
    sae = training_sae(architecture, D, dtype="float64", apply_b_dec_to_input=apply_b_dec_to_input)
    latents, output = whitened_reference(sae, whitening, x)
    fold_whitening_into_weights(sae, whitening)
    # rounding of x - mean, where the mean is 3000 and the smallest deviation 0.03, times d
    bound = 1e-14 if data == "friendly" else 1e-10
    found = sae.encode(x)
    assert changed(found, latents) == 0
    assert relative(found, latents) < bound
    assert relative(sae.decode(found), output) < bound


@pytest.mark.parametrize("data", ["friendly", "nasty"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folded_weights_are_float32_and_as_exact_as_that_allows(
    architecture, apply_b_dec_to_input, dtype, data
):
    x = (friendly if data == "friendly" else nasty)(N, D)
    whitening = whitening_of(x, WhiteningConfig(eps=1e-9))
    sae = training_sae(architecture, D, dtype=dtype, apply_b_dec_to_input=apply_b_dec_to_input)
    latents, output = whitened_reference(sae, whitening, x)
    report = fold_whitening_into_weights(sae, whitening, activations=x)
    assert sae.W_enc.dtype == sae.W_dec.dtype == sae.dtype == torch.float32
    assert sae.cfg.dtype == "float32"
    assert all(p.dtype == torch.float32 for p in sae.parameters())
    found = sae.encode(x)
    # products with W lose a factor of its condition number; one near tie in a thousand may tip
    bound = 4 * EPS32 * whitening.condition_number
    assert changed(found, latents) < 1e-3
    same = ((found != 0) == (latents != 0)).all(dim=1)
    assert relative(found[same], latents[same]) < bound
    spread = (x.double() - whitening.mean).norm()
    error = (sae.decode(found)[same].double() - output[same]).norm() / spread
    rounding_of_the_mean = EPS32 * float(whitening.mean.norm() * N**0.5 / spread)
    assert error < bound + rounding_of_the_mean
    assert report.check is not None
    assert report.check.passed


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_without_rescaling_by_decoder_norm_too(architecture):
    x = nasty(N, D, dtype=torch.float64)
    whitening = whitening_of(x, WhiteningConfig(kind="zca"))
    sae = training_sae(architecture, D, dtype="float64", rescale_acts_by_decoder_norm=False)
    latents, output = whitened_reference(sae, whitening, x)
    report = fold_whitening_into_weights(sae, whitening)
    assert not report.decoder_norms_folded
    assert changed(sae.encode(x), latents) == 0
    assert relative(sae(x), output) < 1e-10


@pytest.mark.parametrize("rescale", [True, False])
def test_the_proof_allows_for_a_mean_that_the_statistics_did_not_see(rescale):
    """Training moved b_dec to it, and what float32 makes of x - b_dec is no fault of the fold."""
    x = friendly(N, D)
    whitening = whitening_of(x - x.mean(0))
    sae = training_sae("topk", D, rescale_acts_by_decoder_norm=rescale)
    far = x + 3000
    with torch.no_grad():
        sae.b_dec.data = whitening.whiten(far).mean(0)
    latents, _ = whitened_reference(sae, whitening, far)
    report = fold_whitening_into_weights(sae, whitening, activations=far)
    assert changed(sae.encode(far), latents) < 1e-2
    assert report.check is not None
    # of the mean over the spread, and no more
    assert report.check.tolerance < 1e-4 * float(far.norm() / (x - x.mean(0)).norm())


def test_the_proof_fails_where_the_selection_depends_on_whitened_norms():
    """The trap that folding the decoder norms first is there for."""
    x = nasty(N, D)
    whitening = whitening_of(x)
    sae = training_sae("topk", D)
    latents, _ = whitened_reference(sae, whitening, x)
    naive = copy.deepcopy(sae)
    with torch.no_grad():
        naive.W_enc.data = (whitening.W @ naive.W_enc.double()).float()
        naive.W_dec.data = (naive.W_dec.double() @ whitening.W_inv).float()
        naive.b_dec.data = (naive.b_dec.double() @ whitening.W_inv + whitening.mean).float()
    # far above what FoldCheck.active_set_tolerance puts down to near ties
    assert changed(naive.encode(x), latents) > 0.1


@settings(max_examples=25, deadline=None)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    kind=st.sampled_from(["pca", "zca"]),
    strength=st.sampled_from([0.0, 0.5, 1.0]),
    rescale=st.booleans(),
    flag=st.booleans(),
    seed=st.integers(0, 100),
)
def test_fold_then_unfold_and_unfold_then_fold_are_the_identity(
    architecture, kind, strength, rescale, flag, seed
):
    x = nasty(300, 12, seed, torch.float64)
    whitening = whitening_of(x, WhiteningConfig(kind=kind, strength=strength))
    options = {"rescale_acts_by_decoder_norm": rescale} if "topk" in architecture else {}
    sae = training_sae(
        architecture, 12, 32, seed, dtype="float64", apply_b_dec_to_input=flag, **options
    )
    z = whitening.whiten(x)
    latents, output = sae.encode(z), sae(z)
    fold_whitening_into_weights(sae, whitening)
    plain = {name: p.clone() for name, p in sae.named_parameters()}
    unfold_whitening_from_weights(sae, whitening)
    assert sae.cfg.normalize_activations == "covariance_whitening"
    # as functions: the flags that the fold changed stay changed
    assert relative(sae.encode(z), latents) < 1e-9
    assert relative(sae(z), output) < 1e-9
    fold_whitening_into_weights(sae, whitening)
    for name, parameter in sae.named_parameters():
        assert torch.allclose(parameter, plain[name], rtol=1e-9, atol=1e-8), name


def test_a_published_sae_can_be_unfolded_under_any_whitening():
    x = nasty(N, D, dtype=torch.float64)
    sae = training_sae("standard", D, dtype="float64", normalize_activations="none")
    expected = sae(x)
    whitening = whitening_of(x)
    unfold_whitening_from_weights(sae, whitening)
    assert relative(whitening.dewhiten(sae(whitening.whiten(x))), expected) < 1e-9
    with pytest.raises(FoldError, match="must be plain"):
        unfold_whitening_from_weights(sae, whitening)


@pytest.mark.parametrize("cls", [Transcoder, SkipTranscoder])
def test_transcoders_of_inputs_with_large_means_are_folded_and_saved(cls, tmp_path, monkeypatch):
    x, y = nasty(N, 16), friendly(N, 12, seed=1)
    w_in, w_out = whitening_of(x), whitening_of(y)
    config = TranscoderConfig if cls is Transcoder else SkipTranscoderConfig
    size: dict[str, Any] = {"d_in": 16, "d_sae": 64, "d_out": 12}
    sae = cls(
        config(**size, apply_b_dec_to_input=False, normalize_activations="covariance_whitening")
    )
    wrong = copy.deepcopy(sae)
    fold_whitening_into_weights(sae, w_in, w_out, activations=x)
    sae.save_model(tmp_path)
    loaded = cls.load_from_disk(tmp_path)
    assert torch.equal(loaded(x), sae(x))
    # the proof still refuses a fold with a mean that is one standard deviation away
    other = whitening_of(x + x.std(0))
    monkeypatch.setattr(
        folding, "fold", lambda weights, _, out, **options: fold(weights, other, out, **options)
    )
    with pytest.raises(FoldError, match="failed its proof"):
        fold_whitening_into_weights(wrong, w_in, w_out, activations=x)


@pytest.mark.parametrize("cls", [Transcoder, SkipTranscoder])
def test_a_transcoder_that_cannot_be_folded_stays_as_it_was(cls):
    x = friendly(N, 16).double()
    y = nasty(N, 24, dtype=torch.float64)
    w_in, w_out = whitening_of(x), whitening_of(y)
    config = TranscoderConfig if cls is Transcoder else SkipTranscoderConfig
    sae = cls(
        config(
            d_in=16,
            d_sae=64,
            d_out=24,
            dtype="float64",
            apply_b_dec_to_input=False,
            normalize_activations="covariance_whitening",
        )
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(FoldError, match="output_whitening"):
        fold_whitening_into_weights(sae, w_in)
    with pytest.raises(FoldError, match="width"):
        fold_whitening_into_weights(sae, w_out, w_in)
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())


@pytest.mark.parametrize("change", [fold, unfold])
def test_weights_of_other_widths_than_the_whitenings_are_refused(change):
    weights = describe("standard").affine_weights(training_sae("standard", 16))
    narrow, wide = whitening_of(friendly(N, 16)), whitening_of(friendly(N, 24))
    for whitenings in ((wide, None), (narrow, wide), (wide, narrow)):
        with pytest.raises(ValueError, match="map 16 to 16 dimensions.* 24"):
            change(weights, *whitenings)


def test_the_decoder_bias_is_stored_in_float32_and_the_encoder_makes_up_for_its_rounding():
    x = nasty(N, D)
    whitening = whitening_of(x, WhiteningConfig(eps=1e-9))
    sae = training_sae("standard", D)
    latents, _ = whitened_reference(sae, whitening, x)
    b_enc = sae.state_dict()["b_enc"].clone()
    fold_whitening_into_weights(sae, whitening)
    with_compensation = relative(sae.encode(x), latents)
    sae.b_enc.data = b_enc
    assert relative(sae.encode(x), latents) > 3 * with_compensation


def test_a_shared_config_is_replaced_not_changed():
    config = training_sae("topk", D).cfg
    a, b = training_sae("topk", D, seed=1), training_sae("topk", D, seed=2)
    a.cfg = b.cfg = config
    whitening = whitening_of(nasty(N, D))
    for sae in (a, b):
        x = nasty(N, D, seed=3)
        latents, _ = whitened_reference(sae, whitening, x)
        fold_whitening_into_weights(sae, whitening)
        assert changed(sae.encode(x), latents) < 1e-3
    assert config.normalize_activations == "covariance_whitening"
    assert config.rescale_acts_by_decoder_norm
    assert "whitening" not in config.metadata


def test_folding_twice_or_an_sae_trained_without_whitening_is_refused():
    whitening = whitening_of(friendly(N, D))
    sae = training_sae("standard", D)
    fold_whitening_into_weights(sae, whitening)
    before = sae.W_enc.detach().clone()
    with pytest.raises(FoldError, match="already"):
        fold_whitening_into_weights(sae, whitening)
    assert torch.equal(sae.W_enc, before)
    for setting in ("none", "layer_norm", "expected_average_only_in"):
        with pytest.raises(FoldError, match="not trained"):
            fold_whitening_into_weights(
                training_sae("standard", D, normalize_activations=setting), whitening
            )


def test_statistics_in_the_place_of_a_whitening_are_refused_with_what_to_do():
    statistics: Any = ActivationStatistics(D)
    statistics.update(friendly(N, D))
    sae, plain = training_sae("standard", D), training_sae("topk", D, normalize_activations="none")
    with without_type_checks():
        for change in (
            lambda: fold_whitening_into_weights(sae, statistics),
            lambda: fold_whitening_into_weights(sae, whitening_of(friendly(N, D)), statistics),
            lambda: unfold_whitening_from_weights(plain, statistics),
        ):
            with pytest.raises(TypeError, match=r"Whitening.from_statistics\(statistics\)"):
                change()


def test_architectures_that_cannot_be_folded_are_refused_with_the_reason():
    whitening = whitening_of(friendly(N, D))
    config = MatchingPursuitSAEConfig(d_in=D, d_sae=64, normalize_activations="none")
    sae = MatchingPursuitSAE(config)
    sae.cfg.normalize_activations = "covariance_whitening"
    with pytest.raises(FoldError, match="tied to the decoder"):
        fold_whitening_into_weights(sae, whitening)
    temporal = TemporalSAE.__new__(TemporalSAE)
    torch.nn.Module.__init__(temporal)
    temporal.cfg = config  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(FoldError, match="attends over positions"):
        fold_whitening_into_weights(temporal, whitening)


@pytest.mark.parametrize("broken", ["W_enc", "b_dec", "overflow", "width", "proof"])
def test_a_failed_fold_leaves_the_sae_as_it_was(broken, monkeypatch):
    whitening = whitening_of(nasty(N, D))
    x = nasty(N, D)
    sae = training_sae("topk", D)
    if broken in ("W_enc", "b_dec"):
        with torch.no_grad():
            getattr(sae, broken).view(-1)[3] = float("nan")
    elif broken == "overflow":
        with torch.no_grad():
            sae.W_dec[0] = 1e38
    elif broken == "width":
        whitening = whitening_of(friendly(N, D + 1))
    else:
        from sae_whiten import folding
        from sae_whiten.architectures import folding as adapter

        def off_by_the_mean(weights, *args, **options):
            new = folding.fold(weights, *args, **options)
            new.b_dec = new.b_dec - whitening.mean.float()
            return new

        monkeypatch.setattr(adapter, "fold", off_by_the_mean)
    before = copy.deepcopy(sae.state_dict())
    config = sae.cfg.to_dict()
    with pytest.raises(FoldError):
        fold_whitening_into_weights(sae, whitening, activations=x)
    assert sae.cfg.to_dict() == config
    for name, value in sae.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("data", [friendly, nasty])
def test_the_proof_sees_the_decoder_rows_of_latents_that_fire_nowhere(
    architecture, data, monkeypatch
):
    from sae_whiten.architectures import folding as adapter

    x = data(N, D)
    sae = training_sae(architecture, D, 64)
    sae.W_enc.data[:, 5] = 0  # biases are 0 too
    right = copy.deepcopy(sae)
    check = fold_whitening_into_weights(right, whitening_of(x), activations=x).check
    assert check is not None
    assert check.wrong_decoder_rows == 0

    def without_a_row(weights, *args, **options):
        new = fold(weights, *args, **options)
        new.W_dec[5] = 0
        return new

    fold = adapter.fold
    monkeypatch.setattr(adapter, "fold", without_a_row)
    with pytest.raises(FoldError, match="decoder rows that differ 1"):
        fold_whitening_into_weights(sae, whitening_of(x), activations=x)


def test_a_clear_proof_ends_early_and_no_fold_is_refused_without_all_activations(monkeypatch):
    from sae_whiten.architectures import folding as adapter

    x = friendly(N, D)
    sae = training_sae("standard", D, 256)  # about half of the latents are active
    broken = copy.deepcopy(sae)
    check = fold_whitening_into_weights(sae, whitening_of(x), activations=x).check
    assert check is not None
    assert check.passed
    assert 0 < check.n_activations < N / 2

    def a_bit_off(weights, *args, **options):
        new = fold(weights, *args, **options)
        new.W_dec *= 1.001
        return new

    fold = adapter.fold
    monkeypatch.setattr(adapter, "fold", a_bit_off)
    with pytest.raises(FoldError, match=f"on {N} "):
        fold_whitening_into_weights(broken, whitening_of(x), activations=x)


def test_the_report_and_the_metadata_say_what_was_done():
    x = nasty(N, D)
    config = WhiteningConfig(kind="zca", eps=1e-2)
    sae = training_sae("topk", D, apply_b_dec_to_input=False, dtype="bfloat16")
    report = fold_whitening_into_weights(
        sae, whitening_of(x, config), activations=x, source="held-out"
    )
    assert (report.dtype, report.folded_dtype) == ("bfloat16", "float32")
    assert report.decoder_norms_folded
    assert not report.apply_b_dec_to_input
    assert report.check is not None
    recorded = sae.cfg.metadata.whitening
    assert recorded == report.to_dict()
    assert recorded["config"] == config.to_dict()
    assert recorded["n_samples"] == N
    assert recorded["fold"]["check"]["source"] == "held-out"
    assert 0 <= recorded["fold"]["check"]["fold_error"] <= recorded["fold"]["check"]["tolerance"]


def test_an_inference_sae_folds_as_well():
    x = friendly(N, D).double()
    sae = StandardSAE(
        StandardSAEConfig(
            d_in=D, d_sae=64, dtype="float64", normalize_activations="covariance_whitening"
        )
    )
    whitening = whitening_of(x)
    latents, output = whitened_reference(sae, whitening, x)
    fold_whitening_into_weights(sae, whitening)
    assert relative(sae.encode(x), latents) < 1e-12
    assert relative(sae(x), output) < 1e-12


def test_the_optimizer_keeps_its_parameters():
    sae = training_sae("standard", D)
    identities = [id(p) for p in sae.parameters()]
    fold_whitening_into_weights(sae, whitening_of(friendly(N, D)))
    assert [id(p) for p in sae.parameters()] == identities


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("architecture", ["top_afa", "topk_vsae"])
def test_a_scaling_factor_is_folded_exactly_into_our_architectures(architecture, factor, tmp_path):
    x = friendly(N, D)
    options = {"k": 8} if architecture == "topk_vsae" else {}
    normalize = "expected_average_only_in"
    sae = training_sae(architecture, D, normalize_activations=normalize, **options)
    with torch.no_grad():
        latents = sae.encode(x * factor)
        output = sae.decode(latents) / factor
        sae.fold_activation_norm_scaling_factor(factor)
        sae.save_inference_model(tmp_path)
        saved = SAE.load_from_disk(tmp_path)
        for plain in (sae, saved):
            assert changed(plain.encode(x), latents) < 1e-3
            assert relative(plain(x), output) < 100 * EPS32
