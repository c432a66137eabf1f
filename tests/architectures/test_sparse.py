"""Kernels of sparse training steps, against the same done densely in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_whiten.architectures import sparse
from sae_whiten.architectures.sparse import (
    ActivePairs,
    batch_top_k,
    decode,
    encode,
    largest,
    largest_of_all,
    select,
    to_coo,
    top_k,
)

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 40))


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_pairs(n_rows: int, d_sae: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows, ascending, and latents of pairs: some rows and latents have many, some none."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(n_rows, d_sae, generator=generator) < torch.rand(1, generator=generator)
    rows, latents = found.nonzero().unbind(1)
    return rows, latents


@given(shape=SHAPES, k=st.integers(1, 5), wide=st.sampled_from([1, 16, 64]))
@settings(max_examples=30)
def test_largest_are_those_of_topk(shape: tuple[int, int, int], k: int, wide: int) -> None:
    n_rows, _, width = shape
    x = random(n_rows, width * wide)
    k = min(k, x.shape[1])
    values, indices = largest(x, k)
    assert torch.equal(values, x.gather(1, indices))
    assert torch.equal(values.sort().values, x.topk(k).values.sort().values)


@given(shape=SHAPES, n=st.integers(0, 300), rows_at_a_time=st.integers(1, 9))
@settings(max_examples=30)
def test_largest_of_all_chunks_are_those_of_the_whole(
    shape: tuple[int, int, int], n: int, rows_at_a_time: int
) -> None:
    n_rows, _, width = shape
    x = random(n_rows, 16 * width)
    values, positions, found_width = largest_of_all(iter(x.split(rows_at_a_time)), n)
    expected = x.flatten().topk(min(n, x.numel())).values
    assert found_width == 16 * width
    assert torch.equal(positions, positions.unique())
    assert torch.equal(values, x.flatten()[positions])
    assert torch.equal(values.sort(descending=True).values, expected[expected > 0])


def test_equal_values_are_not_lost_among_the_largest_of_all() -> None:
    x = torch.ones(4, 32)
    values, positions, _ = largest_of_all(iter(x.split(1)), 40)
    assert values.tolist() == [1.0] * 40
    assert len(positions.unique()) == 40


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["top_k", "abs_top_k", "batch_top_k"])
def test_selection_is_that_of_dense_pre_activations(
    name: str, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sparse._ROWS, "cpu", 5)  # not a divisor of the number of rows
    x, W, b = random(12, 6), random(6, 64), random(64)
    scale = random(64).abs() + 0.1 if scaled else torch.ones(64).double()
    dense = (x @ W + b) * scale
    dead = torch.tensor([3, 60])
    selector = {"top_k": top_k(4), "abs_top_k": top_k(4, True), "batch_top_k": batch_top_k(48)}
    found = select(x, W, b, scale, selector[name], dead, keep_hidden_pre=True)

    assert found.hidden_pre is not None
    torch.testing.assert_close(found.hidden_pre, dense)
    torch.testing.assert_close(found.pre_of_dead, dense[:, dead])
    torch.testing.assert_close(found.values, dense[found.rows, found.latents])
    assert torch.equal(found.rows, found.rows.sort().values)
    rank = dense.abs() if name == "abs_top_k" else dense
    mask = torch.zeros_like(dense, dtype=torch.bool)
    if name == "batch_top_k":
        mask.view(-1)[rank.flatten().topk(48).indices] = True
    else:
        mask.scatter_(1, rank.topk(4).indices, True)
    selected = torch.zeros_like(mask).index_put_((found.rows, found.latents), torch.tensor(True))
    assert torch.equal(selected, mask)
    assert len(found.values) == 48


def test_nothing_dense_is_kept_unless_asked_for() -> None:
    found = select(
        random(4, 6), random(6, 64), random(64), torch.ones(64), top_k(4), torch.tensor([]).long()
    )
    assert found.hidden_pre is None
    assert found.pre_of_dead.shape == (4, 0)


def test_nan_is_selected_and_does_not_pass_unseen() -> None:
    x = random(2, 128)
    x[1, 77] = torch.nan
    values, _ = largest(x, 2)
    assert values[1].isnan().any()


@given(shape=SHAPES, seed=st.integers(0, 99), n_dead=st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_encoder_gradients_are_the_dense_ones(
    shape: tuple[int, int, int], seed: int, n_dead: int
) -> None:
    n_rows, d_in, d_sae = shape
    rows, latents = random_pairs(n_rows, d_sae, seed)
    dead = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))[:n_dead]
    data, of_values = random(n_rows, d_in), random(len(rows), seed=seed)
    of_dead = random(n_rows, len(dead), seed=seed)
    leaves = [random(d_in, d_sae), random(d_sae), random(d_in)]

    W, b, b_dec = (leaf.clone().requires_grad_() for leaf in leaves)
    dense = (data - b_dec) @ W + b
    loss = (dense[rows, latents] * of_values).sum() + (dense[:, dead] * of_dead).sum()
    loss.backward()

    W2, b2, b_dec2 = (leaf.clone().requires_grad_() for leaf in leaves)
    pairs = ActivePairs.of(rows, latents, d_sae, rows, n_rows)
    known = dense.detach()
    values, pre_of_dead = encode(
        data - b_dec2, W2, b2, b_dec2, known[rows, latents], known[:, dead], pairs, dead
    )
    assert torch.equal(values, known[rows, latents])
    ((values * of_values).sum() + (pre_of_dead * of_dead).sum()).backward()
    for own, expected in ((W2, W), (b2, b), (b_dec2, b_dec)):
        torch.testing.assert_close(own.grad, expected.grad)
    assert W2.grad is not None
    assert W2.grad.is_contiguous()


@given(shape=SHAPES, seed=st.integers(0, 99), n_dead=st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_decoder_and_its_gradients_are_the_dense_ones(
    shape: tuple[int, int, int], seed: int, n_dead: int
) -> None:
    n_rows, d_in, d_sae = shape
    rows, latents = random_pairs(n_rows, d_sae, seed)
    dead = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))[:n_dead]
    of_out, of_rows = random(n_rows, d_in, seed=seed), random(len(dead), d_in, seed=seed)

    v, W = random(len(rows)).requires_grad_(), random(d_sae, d_in).requires_grad_()
    acts = torch.zeros(n_rows, d_sae, dtype=v.dtype).index_put((rows, latents), v)
    (((acts @ W) * of_out).sum() + (W[dead] * of_rows).sum()).backward()

    v2, W2 = v.detach().clone().requires_grad_(), W.detach().clone().requires_grad_()
    pairs = ActivePairs.of(rows, latents, d_sae, rows, n_rows)
    out, rows_of_dead = decode(v2, W2, pairs, dead)
    torch.testing.assert_close(out, (acts @ W).detach())
    ((out * of_out).sum() + (rows_of_dead * of_rows).sum()).backward()
    torch.testing.assert_close(v2.grad, v.grad)
    torch.testing.assert_close(W2.grad, W.grad)


def test_parts_of_the_latents_are_decoded_by_themselves() -> None:
    rows, latents = random_pairs(5, 20)
    values, W = random(len(rows)), random(20, 3)
    bags = 2 * rows + (latents >= 12)
    pairs = ActivePairs.of(rows, latents, 20, bags, 10)
    out, _ = decode(values, W, pairs, torch.tensor([], dtype=torch.long))
    acts = to_coo(values, pairs, 5, 20).to_dense()
    torch.testing.assert_close(out.view(5, 2, 3)[:, 0], acts[:, :12] @ W[:12])
    torch.testing.assert_close(out.view(5, 2, 3)[:, 1], acts[:, 12:] @ W[12:])


def test_bfloat16_weights_are_summed_in_float32() -> None:
    rows, latents = random_pairs(16, 50)
    W = random(50, 8).bfloat16().requires_grad_()
    values, of_out = random(len(rows)).float(), random(16, 8).float()
    pairs = ActivePairs.of(rows, latents, 50, rows, 16)
    out, _ = decode(values, W, pairs, torch.tensor([], dtype=torch.long))
    (out * of_out).sum().backward()
    acts = to_coo(values, pairs, 16, 50).to_dense().double()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), acts @ W.detach().double(), rtol=1e-5, atol=1e-5)
    assert W.grad is not None
    assert W.grad.dtype == torch.bfloat16
    torch.testing.assert_close(W.grad, (acts.T @ of_out.double()).bfloat16())


def test_product_is_taken_in_the_dtype_of_autocast() -> None:
    x, W, b = random(8, 16).float(), random(16, 64).float(), random(64).float()
    none = torch.tensor([], dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = select(x, W, b, torch.ones(64), top_k(4), none, keep_hidden_pre=True)
        expected = x @ W + b
    assert found.hidden_pre is not None
    assert found.hidden_pre.dtype == torch.float32
    torch.testing.assert_close(found.hidden_pre, expected)
