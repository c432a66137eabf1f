"""Encoding and decoding over active latents only. This is faster if few latents are active.

Only the encoder needs a dense product, to find the active latents. It runs over a block of rows at
a time and keeps only the selected pre-activations. Decoding and both weight gradients are then sums
over pairs of an input and a latent that is active in it. For pair i, let v_i be the latent's value,
x_i the input, g_i the gradient of the pre-activation and G_i the gradient of the reconstruction:

    decode                sum_i v_i W_dec[latent_i]        over the pairs of an input
    gradient of W_dec     sum_i v_i G_i                    over the pairs of a latent
    gradient of W_enc^T   sum_i g_i x_i                    over the pairs of a latent
    gradient of v_i       W_dec[latent_i] . G_i

The sums are weighted sums of rows. `torch.nn.functional.embedding_bag` adds in a fixed order, so
results are reproducible, also on CUDA.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn.functional import embedding_bag

__all__ = [
    "ActivePairs",
    "Selection",
    "Selector",
    "batch_top_k",
    "decode",
    "encode",
    "largest",
    "largest_of_all",
    "pre_activations",
    "select",
    "to_coo",
    "top_k",
]

# Rows of pre-activations per block: enough for a matrix product at full speed
_ROWS = {"cpu": 512, "cuda": 4096}
# Latents per block when the gradient of W_enc is transposed: about a megabyte of sums
_LATENTS = 256


@dataclass(frozen=True)
class ActivePairs:
    """Which latents are active in which input.

    Attributes:
        rows: Shape (n,), the input of each pair.
        latents: Shape (n,), the latent of each pair.
        bags: Shape (n,), ascending: the row of the decoder's output to which each pair is added. An
            input has several bags if groups of latents are decoded separately.
        bag_offsets: Shape (n_bags + 1,), where the pairs of each bag begin.
        order: Shape (n,), permutation that sorts the pairs by latent.
        latent_offsets: Shape (d_sae + 1,), where the pairs of each latent begin after sorting.
    """

    rows: Integer[Tensor, "n"]
    latents: Integer[Tensor, "n"]
    bags: Integer[Tensor, "n"]
    bag_offsets: Integer[Tensor, "bag_bounds"]
    order: Integer[Tensor, "n"]
    latent_offsets: Integer[Tensor, "latent_bounds"]

    @staticmethod
    def of(
        rows: Integer[Tensor, "n"],
        latents: Integer[Tensor, "n"],
        d_sae: int,
        bags: Integer[Tensor, "n"],
        n_bags: int,
    ) -> "ActivePairs":
        """Build the pairs and both of their orders, by bag and by latent.

        Args:
            rows: Shape (n,), the input of each pair.
            latents: Shape (n,), the latent of each pair.
            d_sae: Number of latents.
            bags: Shape (n,), ascending.
            n_bags: Number of rows of the decoder's output.
        """
        by_latent, order = latents.sort(stable=True)
        return ActivePairs(
            rows, latents, bags, _offsets(bags, n_bags), order, _offsets(by_latent, d_sae)
        )


def _offsets(ascending: Tensor, n: int) -> Tensor:
    return torch.searchsorted(ascending, torch.arange(n + 1, device=ascending.device))


@dataclass(frozen=True)
class Selection:
    """The result of `select`. All pre-activations are multiplied by `scale`.

    Attributes:
        values: Shape (n,), the selected pre-activations.
        rows: Shape (n,), ascending: the input of each.
        latents: Shape (n,), the latent of each.
        pre_of_dead: Shape (batch, n_dead), pre-activations of the dead latents.
        hidden_pre: Shape (batch, d_sae), all pre-activations, if requested.
    """

    values: Float[Tensor, "n"]
    rows: Integer[Tensor, "n"]
    latents: Integer[Tensor, "n"]
    pre_of_dead: Float[Tensor, "batch n_dead"]
    hidden_pre: Float[Tensor, "batch d_sae"] | None


# Takes pre-activations in blocks of rows. Returns values, rows (ascending) and latents.
Selector = Callable[[Iterator[Tensor]], tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def select(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    scale: Float[Tensor, "d_sae"],
    selector: Selector,
    dead: Integer[Tensor, "n_dead"],
    keep_hidden_pre: bool = False,
) -> Selection:
    """Select among the pre-activations (x @ W_enc + b_enc) * scale.

    Under autocast, the product is computed in the autocast dtype. Everything else is
    in float32 or better.

    Args:
        x: Shape (batch, d_in), the encoder's input.
        W_enc: Shape (d_in, d_sae).
        b_enc: Shape (d_sae,).
        scale: Shape (d_sae,), such as the norms of the decoder.
        selector: `top_k` or `batch_top_k`.
        dead: Shape (n_dead,), dead latents to revive. Their pre-activations are returned for every
            input, active or not.
        keep_hidden_pre: Whether to return all pre-activations.
    """
    pre_of_dead: list[Tensor] = []
    kept: list[Tensor] = []

    def watched() -> Iterator[Tensor]:
        for pre in pre_activations(x, W_enc, b_enc, scale):
            pre_of_dead.append(pre.index_select(1, dead))
            if keep_hidden_pre:
                kept.append(pre)
            yield pre

    values, rows, latents = selector(watched())
    return Selection(
        values, rows, latents, torch.cat(pre_of_dead), torch.cat(kept) if keep_hidden_pre else None
    )


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """(x @ W_enc + b_enc) * scale, one block of rows at a time. See `select`."""
    kind = x.device.type
    dtype = torch.promote_types(W_enc.dtype, torch.float32)
    scale = scale.to(dtype)
    b_enc = b_enc.to(dtype) * scale
    if torch.is_autocast_enabled(kind):
        reduced = torch.get_autocast_dtype(kind)
        x, W_enc = x.to(reduced), W_enc.to(reduced)
    for rows in x.split(_ROWS.get(kind, len(x))):
        pre = (rows @ W_enc).to(dtype)
        yield torch.addcmul(b_enc, pre, scale, out=pre)


def top_k(k: int, by_magnitude: bool = False) -> Selector:
    """Select the k largest pre-activations of every input, or the k of largest magnitude."""

    def selector(chunks: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        values, latents = [], []
        for pre in chunks:
            largest_values, indices = largest(pre.abs() if by_magnitude else pre, k)
            values.append(pre.gather(1, indices) if by_magnitude else largest_values)
            latents.append(indices)
        flat = torch.cat(latents)
        rows = torch.arange(len(flat), device=flat.device).repeat_interleave(k)
        return torch.cat(values).flatten(), rows, flat.flatten()

    return selector


def batch_top_k(n: int, least: Callable[[Tensor], Tensor] | None = None) -> Selector:
    """Select the n largest positive pre-activations of the batch.

    Args:
        n: Number to select.
        least: Maps the selected values, shape (m,), to the smallest value to keep, shape (1,).
            A result of shape (0,) keeps all.
    """

    def selector(chunks: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        values, positions, width = largest_of_all(chunks, n)
        bound = values[:0] if least is None else least(values)
        if len(bound) > 0:
            kept = values >= bound
            values, positions = values[kept], positions[kept]
        return values, positions // width, positions % width

    return selector


def largest(
    x: Float[Tensor, "rows width"], k: int
) -> tuple[Float[Tensor, "rows k"], Integer[Tensor, "rows k"]]:
    """`torch.topk(x, k, sorted=False)`, but faster on a CPU if k is much less than the width.

    Columns are split into groups. The k largest values are in the k groups with the largest maxima.
    Computing the maxima is limited only by memory bandwidth. With 8192 columns and k=32, 2048 rows
    take 37 ms of CPU time instead of 68.

    Args:
        x: Shape (rows, width).
        k: At most the width.

    Returns:
        Values and indices, shape (rows, k), in no particular order. Ties are broken arbitrarily.
    """
    per_group = gcd(x.shape[1], 16)
    n_groups = x.shape[1] // per_group
    if x.device.type != "cpu" or per_group < 4 or n_groups < 4 * k:
        found = x.topk(k, sorted=False)
        return found.values, found.indices
    grouped = x.view(len(x), per_group, n_groups)
    groups = grouped.amax(dim=1).topk(k, sorted=False).indices
    candidates = grouped.gather(2, groups[:, None].expand(-1, per_group, -1)).flatten(1)
    values, found = candidates.topk(k, sorted=False)
    return values, groups.gather(1, found % k) + (found // k) * n_groups


def largest_of_all(
    chunks: Iterator[Float[Tensor, "rows width"]], n: int
) -> tuple[Float[Tensor, "m"], Integer[Tensor, "m"], int]:
    """The n largest positive values of all chunks, in one pass.

    Values below the n-th largest so far are dropped.

    Args:
        chunks: Consecutive rows of one matrix; at least one chunk, each of any number of rows.
        n: Number of values.

    Returns:
        Values, their positions in the flattened matrix, and the width of the matrix. Values and
        positions have shape (m,), ascending by position. m = n unless fewer values are positive.
        Ties are broken arbitrarily.
    """
    values = positions = torch.empty(0)  # those of the first chunk replace them
    n_seen = width = 0
    for chunk in chunks:
        flat, width = chunk.flatten(), chunk.shape[1]
        if n_seen == 0:
            bound = _lower_bound(chunk, n)
            candidates = flat >= bound if bound > 0 else flat > 0
            positions = candidates.nonzero().squeeze(1)
            values = flat[positions]
        else:
            # once there are n values, others must exceed the least of them
            bound = values.min() if n > 0 and len(values) == n else 0.0
            found = (flat > bound).nonzero().squeeze(1)
            values = torch.cat([values, flat[found]])
            positions = torch.cat([positions, found + n_seen])
        n_seen += len(flat)
        if len(values) > n:
            values, kept = values.topk(n, sorted=False)
            positions = positions[kept]
    positions, order = positions.sort()
    return values[order], positions, width


def _lower_bound(x: Tensor, n: int) -> Tensor | float:
    """A lower bound on the n-th largest value of x: the n-th largest of the maxima of groups."""
    per_group = gcd(x.shape[1], 16)
    if n == 0 or x.numel() // per_group < n:
        return 0.0
    maxima = x.view(len(x), per_group, -1).amax(dim=1).flatten()
    return maxima.topk(n, sorted=False).values.min()


def encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    b_dec: Float[Tensor, "d_in"] | None,
    values: Float[Tensor, "n"],
    pre_of_dead: Float[Tensor, "batch n_dead"],
    pairs: ActivePairs,
    dead: Integer[Tensor, "n_dead"],
) -> tuple[Float[Tensor, "n"], Float[Tensor, "batch n_dead"]]:
    """Attach gradients to pre-activations x @ W_enc + b_enc that are already computed.

    Args:
        x: Shape (batch, d_in), the encoder's input. It gets no gradient.
        W_enc: Shape (d_in, d_sae).
        b_enc: Shape (d_sae,).
        b_dec: Shape (d_in,), if `x` is the data minus b_dec; else None.
        values: Shape (n,), pre-activations of `pairs`.
        pre_of_dead: Shape (batch, n_dead), pre-activations of `dead`.
        pairs: The active pairs.
        dead: Shape (n_dead,), dead latents to revive, without repetition.

    Returns:
        `values` and `pre_of_dead`, with gradients to W_enc, b_enc and b_dec.
    """
    return _Encoder.apply(x.detach(), W_enc, b_enc, b_dec, values, pre_of_dead, pairs, dead)


class _Encoder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
        values: Tensor,
        pre_of_dead: Tensor,
        pairs: ActivePairs,
        dead: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, W_enc, dead)
        ctx.pairs, ctx.b_enc_dtype = pairs, b_enc.dtype
        ctx.b_dec_dtype = None if b_dec is None else b_dec.dtype
        return values.clone(), pre_of_dead.view_as(pre_of_dead)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, dead = ctx.saved_tensors
        of_values, of_dead = grads
        pairs: ActivePairs = ctx.pairs
        dtype = of_values.dtype
        x = x.to(dtype)
        of_W = _sum_by_latent_transposed(x, pairs.rows, of_values, pairs)
        one = torch.ones(1, 1, dtype=dtype, device=x.device)
        of_b = _sum_by_latent(one, torch.zeros_like(pairs.rows), of_values, pairs)[:, 0]
        if len(dead) > 0:
            of_W[:, dead] += x.T @ of_dead
            of_b[dead] += of_dead.sum(dim=0)
        of_b_dec = None
        if ctx.b_dec_dtype is not None:
            # summing over the batch before the product with W_enc is cheaper
            of_b_dec = -(W_enc @ of_b.to(W_enc.dtype)).to(ctx.b_dec_dtype)
        return (
            None,
            of_W.to(W_enc.dtype),
            of_b.to(ctx.b_enc_dtype),
            of_b_dec,
            *[None] * 4,
        )


def decode(
    values: Float[Tensor, "n"],
    W_dec: Float[Tensor, "d_sae d_in"],
    pairs: ActivePairs,
    dead: Integer[Tensor, "n_dead"],
) -> tuple[Float[Tensor, "n_bags d_in"], Float[Tensor, "n_dead d_in"]]:
    """Sums of decoder rows weighted by their latents, without a bias.

    Args:
        values: Shape (n,), the values of the latents of `pairs`.
        W_dec: Shape (d_sae, d_in).
        pairs: The active pairs, with the output row (bag) of each.
        dead: Shape (n_dead,), dead latents to revive, without repetition.

    Returns:
        The sums, shape (n_bags, d_in), float32 or better, and the decoder rows of `dead`. The
        gradient of these rows is added to the gradient of W_dec.
    """
    dtype = torch.promote_types(W_dec.dtype, torch.float32)
    values = values.to(dtype)
    # this gives the latents their gradient; _Decoder gives W_dec its gradient
    out = embedding_bag(
        pairs.latents,
        W_dec.detach().to(dtype),
        pairs.bag_offsets,
        mode="sum",
        per_sample_weights=values,
        include_last_offset=True,
    )
    return _Decoder.apply(out, W_dec, values.detach(), pairs, dead)


class _Decoder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, W_dec: Tensor, values: Tensor, pairs: ActivePairs, dead: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(values, dead)
        ctx.pairs, ctx.dtype = pairs, W_dec.dtype
        return out.view_as(out), W_dec.index_select(0, dead)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, dead = ctx.saved_tensors
        of_out, of_rows = grads
        of_W = _sum_by_latent(of_out, ctx.pairs.bags, values, ctx.pairs)
        if len(dead) > 0:
            of_W[dead] += of_rows
        return of_out, of_W.to(ctx.dtype), None, None, None


def _sum_by_latent(table: Tensor, rows: Tensor, weights: Tensor, pairs: ActivePairs) -> Tensor:
    """For each latent, the weighted sum of table rows over the pairs of the latent."""
    return embedding_bag(
        rows[pairs.order],
        table,
        pairs.latent_offsets,
        mode="sum",
        per_sample_weights=weights[pairs.order],
        include_last_offset=True,
    )


def _sum_by_latent_transposed(
    table: Tensor, rows: Tensor, weights: Tensor, pairs: ActivePairs
) -> Tensor:
    """`_sum_by_latent`, transposed. Works on blocks of latents, to stay in the CPU's cache."""
    if table.device.type != "cpu":
        return _sum_by_latent(table, rows, weights, pairs).T.contiguous()
    rows, weights = rows[pairs.order], weights[pairs.order]
    offsets = pairs.latent_offsets
    n_latents = len(offsets) - 1
    out = table.new_empty(table.shape[1], n_latents)
    for first in range(0, n_latents, _LATENTS):
        own = offsets[first : first + _LATENTS + 1]
        start, end = int(own[0]), int(own[-1])
        sums = embedding_bag(
            rows[start:end],
            table,
            own - start,
            mode="sum",
            per_sample_weights=weights[start:end],
            include_last_offset=True,
        )
        out[:, first : first + _LATENTS] = sums.T
    return out


def to_coo(
    values: Float[Tensor, "n"], pairs: ActivePairs, n_rows: int, d_sae: int
) -> Float[Tensor, "n_rows d_sae"]:
    """Latents as a sparse COO tensor, shape (n_rows, d_sae)."""
    return torch.sparse_coo_tensor(
        torch.stack([pairs.rows, pairs.latents]), values, (n_rows, d_sae), check_invariants=False
    )
