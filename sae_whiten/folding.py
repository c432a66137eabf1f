"""Absorb a whitening into the weights of an SAE, and take it out again: pure algebra.

An SAE in whitened coordinates, with s = 1 if it subtracts b_dec from its input and 0 otherwise,
gains g (1, but exp(r_mag) for the magnitude path of a gated SAE) and whitenings of input and output

    pre_i  = g_i * (((x - mean_in) @ W_in - s b_dec) @ W_enc)_i + b_i
    x_hat  = (f @ W_dec + b_dec) @ W_inv_out + mean_out

is the plain SAE, with s' = 1,

    W_enc' = W_in @ W_enc      W_dec' = W_dec @ W_inv_out      b_dec' = b_dec @ W_inv_out + mean_out
    b'     = b + g * ((b_dec' - mean_in) @ W_enc' - s b_dec @ W_enc)

When input and output share one whitening and s = 1 the encoder bias does not change; when s = 0 it
becomes b + g * (b_dec @ W_enc). Setting s' = 1 keeps the mean out of it: s' = 0 would need
b - g * (mean @ W_enc'), equal in exact arithmetic, of which float32 loses most when the mean is
large. `b_dec'` stands for its value as stored: the encoder bias makes up for what its rounding
moved, which is why it does change, by rounding errors of the mean.

Everything is computed in float64, a block of latents at a time, and stored in float32 at least.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae_whiten.whitening import Whitening

__all__ = ["AffineWeights", "fold", "unfold"]

_BLOCK = 1024  # latents per block: float64 temporaries of d_in x 1024


@dataclass
class AffineWeights:
    """The weights of an SAE that a change of coordinates touches.

    Attributes:
        W_enc: Shape (d_in, d_sae).
        W_dec: Shape (d_sae, d_out).
        b_dec: Shape (d_out,).
        encoder_biases: Shape (d_sae,) each, by name.
        gains: For the biases whose path multiplies W_enc by a gain, that gain, shape (d_sae,).
        subtracts_b_dec: Whether b_dec is subtracted from the input.
        decoder_norms: Shape (d_sae,), float64, where the SAE ranks its latents by pre-activation
            times decoder norm. They are multiplied into the encoder and divided out of the decoder
            first, so that the ranking does not change with the norms, which whitening does.
        W_skip: Shape (d_out, d_in), for transcoders that add x @ W_skip^T to their output.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    encoder_biases: dict[str, Tensor]
    subtracts_b_dec: bool
    gains: dict[str, Tensor] = field(default_factory=dict)
    decoder_norms: Tensor | None = None
    W_skip: Tensor | None = None


@torch.no_grad()
def fold(
    weights: AffineWeights,
    whitening: Whitening,
    output_whitening: Whitening | None = None,
    *,
    subtract_b_dec: bool = True,
) -> AffineWeights:
    """The plain weights that do to x what `weights` do to whitened x. The input is not changed.

    Args:
        weights: Weights in whitened coordinates.
        whitening: The whitening of the input.
        output_whitening: The whitening of the output, if it is not that of the input.
        subtract_b_dec: Whether the plain SAE subtracts its b_dec from its input; impossible for
            transcoders, whose b_dec lives elsewhere.
    """
    out = output_whitening or whitening
    return _change_coordinates(
        weights,
        encoder=whitening.W,
        origin=whitening.mean,
        decoder=out.W_inv,
        b_dec=_f64(weights.b_dec) @ out.W_inv + out.mean,
        subtract_b_dec=subtract_b_dec,
    )


@torch.no_grad()
def unfold(
    weights: AffineWeights,
    whitening: Whitening,
    output_whitening: Whitening | None = None,
    *,
    subtract_b_dec: bool = True,
) -> AffineWeights:
    """Inverse of `fold`: the weights in whitened coordinates of a plain SAE."""
    out = output_whitening or whitening
    return _change_coordinates(
        weights,
        encoder=whitening.W_inv,
        # x = (z - origin) @ W_inv
        origin=-whitening.mean @ whitening.W,
        decoder=out.W,
        b_dec=(_f64(weights.b_dec) - out.mean) @ out.W,
        subtract_b_dec=subtract_b_dec,
    )


def _change_coordinates(
    weights: AffineWeights,
    *,
    encoder: Tensor,
    origin: Tensor,
    decoder: Tensor,
    b_dec: Tensor,
    subtract_b_dec: bool,
) -> AffineWeights:
    """Weights for inputs y where the old input is (y - origin) @ encoder."""
    device = weights.W_enc.device
    if device.type == "mps":
        device = torch.device("cpu")  # MPS has no float64
    encoder, origin, decoder, b_dec = (t.to(device) for t in (encoder, origin, decoder, b_dec))
    dtype = torch.promote_types(weights.W_enc.dtype, torch.float32)
    home = weights.W_enc.device
    d_sae = weights.W_enc.shape[1]

    W_skip = None
    if weights.W_skip is not None:
        skip = encoder @ _f64(weights.W_skip, device).T @ decoder
        b_dec = b_dec - origin @ skip
        W_skip = skip.T.to(dtype)

    stored_b_dec = b_dec.to(dtype)
    offset = -origin
    if subtract_b_dec:
        offset = offset + stored_b_dec.double()
    old_b_dec = _f64(weights.b_dec, device)

    W_enc = torch.empty(encoder.shape[0], d_sae, dtype=dtype, device=home)
    W_dec = torch.empty(d_sae, decoder.shape[1], dtype=dtype, device=home)
    shift = torch.empty(d_sae, dtype=torch.float64, device=device)
    norms = torch.ones_like(shift)
    if weights.decoder_norms is not None:
        norms = weights.decoder_norms.to(device)
    for start in range(0, d_sae, _BLOCK):
        block = slice(start, start + _BLOCK)
        old = _f64(weights.W_enc[:, block], device) * norms[block]
        new = encoder @ old
        W_enc[:, block] = new
        W_dec[block] = _f64(weights.W_dec[block], device) / norms[block, None] @ decoder
        shift[block] = offset @ new
        if weights.subtracts_b_dec:
            shift[block] -= old_b_dec @ old
    biases = {}
    for name, b in weights.encoder_biases.items():
        gain = _f64(weights.gains[name], device) if name in weights.gains else 1.0
        biases[name] = (_f64(b, device) * norms + shift * gain).to(home, dtype)
    return AffineWeights(
        W_enc=W_enc,
        W_dec=W_dec,
        b_dec=stored_b_dec.to(home),
        encoder_biases=biases,
        subtracts_b_dec=subtract_b_dec,
        gains=weights.gains,
        W_skip=None if W_skip is None else W_skip.to(home),
    )


def _f64(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    return tensor.detach().to(device or "cpu").to(torch.float64)
