"""Fold a whitening into the weights of an SAE, and unfold it again. Only algebra, no data.

Let the input and the output each have a whitening (mean, W, W_inv). An SAE in whitened coordinates
has pre-activations and reconstructions

    pre_i  = g_i * (((x - mean_in) @ W_in - s b_dec) @ W_enc)_i + b_i
    x_hat  = (f @ W_dec + b_dec) @ W_inv_out + mean_out

where s is 1 if the SAE subtracts b_dec from its input and 0 otherwise, and g is a gain: exp(r_mag)
on the magnitude path of a gated SAE, 1 elsewhere. It equals the plain SAE with s' = 1 and

    W_enc' = W_in @ W_enc      W_dec' = W_dec @ W_inv_out      b_dec' = b_dec @ W_inv_out + mean_out
    b'     = b + g * ((b_dec' - mean_in) @ W_enc' - s b_dec @ W_enc)

If input and output share one whitening, b' = b for s = 1, and b' = b + g * (b_dec @ W_enc) for
s = 0. s' = 0 would be possible too, with b' = b - g * (mean @ W_enc'). That is equal in exact
arithmetic, but in float32 most digits are lost when the mean is large.

b' is computed from b_dec' as it is stored, that is, rounded, and so compensates for this rounding.
It then differs from b by rounding errors of the mean even where the formula gives b' = b.

Everything is computed in float64, one block of latents at a time, and stored in float32 or better.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sae_whiten.whitening import Whitening

__all__ = ["AffineWeights", "fold", "unfold"]

_BLOCK = 1024  # latents per block: two float64 temporaries of d_in x 1024


@dataclass
class AffineWeights:
    """The weights of an SAE that depend on the coordinates of its activations.

    Attributes:
        W_enc: The encoder.
        W_dec: The decoder.
        b_dec: The bias of the decoder.
        encoder_biases: The biases of the encoder, by name.
        subtracts_b_dec: Whether b_dec is subtracted from the input.
        gains: By name of bias: the gain that multiplies W_enc on the path of this bias, if any.
        decoder_norms: Norms of the decoder rows, float64, if latents are ranked by pre-activation
            times norm. Whitening would change these norms, and so the ranking. They are therefore
            multiplied into the encoder and divided out of the decoder first.
        W_skip: The skip connection of a transcoder, which adds x @ W_skip^T to its output.
        further_encoders: Other affine maps of the same input, by the names of matrix and bias.
            They play no part in the ranking of latents.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, "d_out"]
    encoder_biases: dict[str, Float[Tensor, "d_sae"]]
    subtracts_b_dec: bool
    gains: dict[str, Float[Tensor, "d_sae"]] = field(default_factory=dict)
    decoder_norms: Float[Tensor, "d_sae"] | None = None
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    further_encoders: dict[
        tuple[str, str], tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, "d_sae"]]
    ] = field(default_factory=dict)

    def parameters(self) -> dict[str, Tensor]:
        """All weights and biases, by name.

        >>> weights = AffineWeights(
        ...     torch.eye(2), torch.eye(2), torch.zeros(2), {"b_enc": torch.ones(2)}, True
        ... )
        >>> sorted(weights.parameters())
        ['W_dec', 'W_enc', 'b_dec', 'b_enc']
        """
        found = {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        found |= self.encoder_biases
        if self.W_skip is not None:
            found["W_skip"] = self.W_skip
        for names, tensors in self.further_encoders.items():
            found |= zip(names, tensors, strict=True)
        return found


@torch.no_grad()
def fold(
    weights: AffineWeights,
    whitening: Whitening,
    output_whitening: Whitening | None = None,
    *,
    subtract_b_dec: bool = True,
) -> AffineWeights:
    """Weights that act on activations as `weights` act on whitened activations.

    `weights` are not changed.

    >>> from sae_whiten import ActivationStatistics
    >>> x = torch.randn(1000, 4, dtype=torch.float64)
    >>> statistics = ActivationStatistics(4)
    >>> statistics.update(x)
    >>> whitening = Whitening.from_statistics(statistics)
    >>> W_enc, W_dec, b = torch.randn(3, 4, 4, dtype=torch.float64)
    >>> plain = fold(AffineWeights(W_enc, W_dec, b[0], {"b_enc": b[1]}, True), whitening)
    >>> pre = (whitening.whiten(x) - b[0]) @ W_enc + b[1]
    >>> torch.allclose((x - plain.b_dec) @ plain.W_enc + plain.encoder_biases["b_enc"], pre)
    True

    Args:
        weights: Weights in whitened coordinates.
        whitening: The whitening of the input.
        output_whitening: The whitening of the output, if it differs from that of the input.
        subtract_b_dec: Whether the plain SAE subtracts b_dec from its input. A transcoder cannot,
            because its b_dec belongs to the output.

    Raises:
        ValueError: The weights do not map the width of `whitening` to that of the output.
    """
    _check_widths(weights, whitening, output_whitening)
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
    """The inverse of `fold`: from the weights of a plain SAE to those in whitened coordinates.

    The arguments and errors are those of `fold`.
    """
    _check_widths(weights, whitening, output_whitening)
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
    """Weights in new coordinates y of the input, whose old coordinates are (y - origin) @ encoder.

    Multiplication by `decoder` takes the output from old to new coordinates, except for its origin.
    `b_dec` is already in the new coordinates.
    """
    home, dtype = weights.W_enc.device, torch.promote_types(weights.W_enc.dtype, torch.float32)
    device = torch.device("cpu") if home.type == "mps" else home  # MPS has no float64
    encoder, origin, decoder, b_dec = (t.to(device) for t in (encoder, origin, decoder, b_dec))
    W_skip, b_dec = _skip_connection(weights, encoder, origin, decoder, b_dec)
    stored_b_dec = b_dec.to(dtype)
    # b_dec has the width of the output, which equals that of the input where it is subtracted
    offset = stored_b_dec.double() - origin if subtract_b_dec else -origin
    old_offset = (
        _f64(weights.b_dec, device) if weights.subtracts_b_dec else torch.zeros_like(origin)
    )

    def read(W: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """An encoder in the new coordinates, and the shift of its biases."""
        d_in = encoder.shape[0]
        new = torch.empty(d_in, W.shape[1], dtype=dtype, device=home)
        shift = torch.empty_like(norms)
        for block, old, moved in _blocks(W.shape[1], d_in, device):
            old, moved = old.view(d_in, -1), moved.view(d_in, -1)
            old.copy_(W[:, block].to(device)).mul_(norms[block])
            torch.mm(encoder, old, out=moved)
            new[:, block] = moved
            shift[block] = offset @ moved - old_offset @ old
        return new, shift

    ones = torch.ones(weights.W_enc.shape[1], dtype=torch.float64, device=device)
    norms = ones if weights.decoder_norms is None else weights.decoder_norms.to(device)
    W_enc, shift = read(weights.W_enc, norms)
    W_dec = torch.empty(len(norms), decoder.shape[1], dtype=dtype, device=home)
    d_out = decoder.shape[1]
    for block, old, moved in _blocks(len(norms), d_out, device):
        old, moved = old.view(-1, d_out), moved.view(-1, d_out)
        old.copy_(weights.W_dec[block].to(device)).div_(norms[block, None])
        W_dec[block] = torch.mm(old, decoder, out=moved)
    biases = {}
    for name, b in weights.encoder_biases.items():
        gain = _f64(weights.gains[name], device) if name in weights.gains else 1.0
        biases[name] = (_f64(b, device) * norms + shift * gain).to(home, dtype)
    further = {}
    for names, (W, b) in weights.further_encoders.items():
        new, its_shift = read(W, ones)
        further[names] = new, (_f64(b, device) + its_shift).to(home, dtype)
    return replace(
        weights,
        W_enc=W_enc,
        W_dec=W_dec,
        b_dec=stored_b_dec.to(home),
        encoder_biases=biases,
        subtracts_b_dec=subtract_b_dec,
        decoder_norms=None,
        W_skip=None if W_skip is None else W_skip.to(home, dtype),
        further_encoders=further,
    )


def _check_widths(weights: AffineWeights, whitening: Whitening, out: Whitening | None) -> None:
    d_in, d_out = weights.W_enc.shape[0], weights.W_dec.shape[1]
    of_out = (out or whitening).d_in
    if (d_in, d_out) != (whitening.d_in, of_out):
        raise ValueError(
            f"the weights map {d_in} to {d_out} dimensions, the whitenings given are of width "
            f"{whitening.d_in} (input) and {of_out} (output)"
        )


def _skip_connection(
    weights: AffineWeights, encoder: Tensor, origin: Tensor, decoder: Tensor, b_dec: Tensor
) -> tuple[Tensor | None, Tensor]:
    """W_skip in the new coordinates, and b_dec minus the image of the origin under W_skip."""
    if weights.W_skip is None:
        return None, b_dec
    skip = encoder @ _f64(weights.W_skip, encoder.device).T @ decoder
    # contiguous, because SAELens saves no other tensors
    return skip.T.contiguous(), b_dec - origin @ skip


def _blocks(n: int, width: int, device: torch.device) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of n latents, each with two temporaries for its weights, flat and not initialised.

    All blocks share the memory: on a CPU, allocating it again takes longer than filling it.
    """
    memory = torch.empty(2, min(n, _BLOCK) * width, dtype=torch.float64, device=device)
    for start in range(0, n, _BLOCK):
        block = slice(start, min(start + _BLOCK, n))
        size = (block.stop - block.start) * width
        yield block, memory[0, :size], memory[1, :size]


def _f64(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    return tensor.detach().to(device or "cpu").to(torch.float64)
