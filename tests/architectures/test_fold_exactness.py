"""Folded SAEs against `Reference`, in units of the rounding errors that float32 makes at most."""

import copy
from typing import Any

import pytest
import torch
from sae_lens import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from torch import Tensor

from sae_whiten import fold_whitening_into_weights, unfold_whitening_from_weights
from tests.reference import (
    D_IN,
    D_SAE,
    Reference,
    activations,
    active_set_change,
    estimated_by_stock,
    large_means,
    randomised,
    refused,
    relative_pre_activation_error,
    rounding_units,
    same,
    seeded,
    state,
    stock_fold,
    topk_config,
    topk_sae,
)
from tests.support import whitening_of


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_a_bfloat16_sae_is_folded_into_float32(apply_b_dec_to_input: bool) -> None:
    estimation, x = large_means(4096), large_means(256, start=4096)
    cfg = topk_config(dtype="bfloat16", apply_b_dec_to_input=apply_b_dec_to_input)
    sae = randomised(topk_sae(cfg))

    stock, whitening = copy.deepcopy(sae), estimated_by_stock(estimation)
    reference = Reference.of(sae, whitening)
    stock_fold(stock, whitening)
    assert stock.W_enc.dtype == torch.bfloat16
    if apply_b_dec_to_input:
        assert relative_pre_activation_error(stock, reference, x) > 1
    assert active_set_change(stock, reference, x) > 0.99

    ours = whitening_of(estimation)
    reference = Reference.of(sae, ours)
    report = fold_whitening_into_weights(sae, ours, activations=x)
    assert {parameter.dtype for parameter in sae.parameters()} == {torch.float32}
    assert rounding_units(sae, reference, x) <= 1
    assert (report.dtype, report.folded_dtype) == ("bfloat16", "float32")


def test_two_saes_with_one_config_are_both_folded_right() -> None:
    estimation, x = activations(4096, seed=2), activations(256)

    cfg = topk_config()
    pair, whitening = [randomised(topk_sae(cfg, seed=s)) for s in (1, 2)], estimated_by_stock(x)
    references = [Reference.of(sae, whitening) for sae in pair]
    for sae in pair:
        stock_fold(sae, whitening)
    assert rounding_units(pair[0], references[0], x) < float("inf")
    assert active_set_change(pair[1], references[1], x) > 0.1

    cfg = topk_config()
    pair, ours = [randomised(topk_sae(cfg, seed=s)) for s in (1, 2)], whitening_of(estimation)
    references = [Reference.of(sae, ours) for sae in pair]
    for sae in pair:
        fold_whitening_into_weights(sae, ours)
    assert all(rounding_units(s, r, x) <= 1 for s, r in zip(pair, references, strict=True))
    assert cfg.to_dict() == topk_sae(topk_config()).cfg.to_dict()


def test_large_means_do_not_cancel_without_b_dec_at_the_input() -> None:
    estimation, x = large_means(4096), large_means(2048, start=4096)
    sae = randomised(topk_sae(topk_config(apply_b_dec_to_input=False)))

    stock, whitening = copy.deepcopy(sae), estimated_by_stock(estimation)
    reference = Reference.of(sae, whitening)
    stock_fold(stock, whitening)
    by_stock = active_set_change(stock, reference, x)
    assert rounding_units(stock, reference, x) > 10

    ours = whitening_of(estimation)
    reference = Reference.of(sae, ours)
    fold_whitening_into_weights(sae, ours)
    assert rounding_units(sae, reference, x) <= 1
    assert active_set_change(sae, reference, x) < by_stock / 4


TRANSCODERS: list[tuple[type[Any], type[Any]]] = [
    (Transcoder, TranscoderConfig),
    (SkipTranscoder, SkipTranscoderConfig),
    (JumpReLUTranscoder, JumpReLUTranscoderConfig),
    (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig),
]


D_OUT = 8


def transcoder(classes: tuple[type[Any], type[Any]], d_out: int = D_OUT) -> Any:
    cls, config_class = classes
    torch.manual_seed(1)
    options: dict[str, Any] = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "d_out": d_out,
        "apply_b_dec_to_input": False,
    }
    return randomised(cls(config_class(normalize_activations="covariance_whitening", **options)))


def written(x: Tensor, d_out: int = D_OUT) -> Tensor:
    """Activations at the other hook."""
    matrix = torch.randn(D_IN, d_out, generator=seeded(11))
    return torch.tanh(x @ matrix / 10) * torch.logspace(0, 2, d_out) - 20.0


@pytest.mark.parametrize("classes", TRANSCODERS, ids=lambda classes: classes[0].__name__)
def test_transcoders_are_folded_with_two_whitenings(classes: Any) -> None:
    estimation, x = activations(4096, seed=2), activations(256)

    stock = transcoder(classes)
    before = state(stock)
    with pytest.raises(RuntimeError):
        stock_fold(stock, estimated_by_stock(estimation))
    assert not same(before, state(stock))  # half of the weights were overwritten

    whitening, out = whitening_of(estimation), whitening_of(written(estimation))
    sae = transcoder(classes)
    reference = Reference.of(sae, whitening, out)
    fold_whitening_into_weights(sae, whitening, out)
    assert rounding_units(sae, reference, x) <= 1
    assert sae.cfg.normalize_activations == "none"
    assert sae.cfg.apply_b_dec_to_input is False


@pytest.mark.parametrize("classes", TRANSCODERS, ids=lambda classes: classes[0].__name__)
def test_the_output_side_of_a_square_transcoder_is_the_other_hook(classes: Any) -> None:
    estimation, x = activations(4096, seed=2), activations(256)
    other = written(estimation, D_IN)

    stock = transcoder(classes, D_IN)
    whitening, out = estimated_by_stock(estimation), estimated_by_stock(other)
    reference = Reference.of(stock, whitening, out)
    stock_fold(stock, whitening)
    assert rounding_units(stock, reference, x) > 1000

    whitening, out = whitening_of(estimation), whitening_of(other)
    sae = transcoder(classes, D_IN)
    reference = Reference.of(sae, whitening, out)
    fold_whitening_into_weights(sae, whitening, out)
    assert rounding_units(sae, reference, x) <= 1


@pytest.mark.parametrize("classes", TRANSCODERS, ids=lambda classes: classes[0].__name__)
def test_the_fold_of_a_transcoder_can_be_proved_on_activations(classes: Any) -> None:
    estimation, x = activations(4096, seed=2), activations(256)
    whitening, out = whitening_of(estimation), whitening_of(written(estimation))
    sae = transcoder(classes)
    reference = Reference.of(sae, whitening, out)
    report = fold_whitening_into_weights(sae, whitening, out, activations=x)
    assert rounding_units(sae, reference, x) <= 1
    assert report.check is not None
    assert report.check.passed


@pytest.mark.parametrize("classes", TRANSCODERS, ids=lambda classes: classes[0].__name__)
def test_a_transcoder_is_unfolded_with_the_whitenings_of_both_hooks(classes: Any) -> None:
    estimation, x = activations(4096, seed=2), activations(256).double()
    whitening, out = whitening_of(estimation), whitening_of(written(estimation))
    sae = transcoder(classes).double()
    sae.dtype, sae.cfg.dtype, sae.cfg.normalize_activations = torch.float64, "float64", "none"
    latents, output = sae.encode(x), sae(x)
    refused(lambda: unfold_whitening_from_weights(sae, whitening), sae, "output_whitening")
    unfold_whitening_from_weights(sae, whitening, out)
    z = whitening.whiten(x)
    assert sae.cfg.normalize_activations == "covariance_whitening"
    assert torch.allclose(sae.encode(z), latents, rtol=1e-9, atol=1e-9)
    assert torch.allclose(out.dewhiten(sae(z)), output, rtol=1e-9, atol=1e-9)


def test_a_transcoder_that_cannot_be_folded_is_left_as_it_was() -> None:
    estimation = activations(4096, seed=2)
    whitening, out = whitening_of(estimation), whitening_of(written(estimation))
    sae = transcoder(TRANSCODERS[1])
    refused(lambda: fold_whitening_into_weights(sae, whitening), sae, "output_whitening")
    refused(lambda: fold_whitening_into_weights(sae, out, whitening), sae, "16 to 8 dimensions")
    square = transcoder(TRANSCODERS[0], D_IN)
    refused(lambda: fold_whitening_into_weights(square, whitening), square, "output_whitening")
    with torch.no_grad():
        sae.W_skip[3, 2] = float("inf")
    refused(lambda: fold_whitening_into_weights(sae, whitening, out), sae, "not finite")


def test_activations_of_the_wrong_shape_do_not_prove_a_fold() -> None:
    whitening = whitening_of(activations(4096))
    for shape in ((4, 16, 16), (16,), (256, 8), (0, 16)):
        sae = topk_sae()
        x = torch.zeros(shape)
        refused(
            lambda sae=sae, x=x: fold_whitening_into_weights(sae, whitening, activations=x),
            sae,
            r"expected shape \(n, 16\)",
        )
