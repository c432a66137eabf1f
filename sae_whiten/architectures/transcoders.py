"""Transcoders read one hook and write another, so folding takes one whitening per hook."""

from dataclasses import replace
from typing import Any

from sae_lens import JumpReLUSkipTranscoder, SkipTranscoder, Transcoder

from sae_whiten.architectures.description import Architecture, read_weights, register
from sae_whiten.folding import AffineWeights


def _affine_weights(sae: Any) -> AffineWeights:
    # b_dec belongs to the output hook
    return replace(read_weights(sae), subtracts_b_dec=False)


def _with_skip(sae: Any) -> AffineWeights:
    return replace(_affine_weights(sae), W_skip=sae.W_skip.data)


TRANSCODER = Architecture(
    sae_classes=(Transcoder,), affine_weights=_affine_weights, is_transcoder=True
)
register(TRANSCODER)
register(
    replace(
        TRANSCODER,
        sae_classes=(SkipTranscoder, JumpReLUSkipTranscoder),
        affine_weights=_with_skip,
    )
)
