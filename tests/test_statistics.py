import json
import re
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from sae_whiten import ActivationStatistics, CorruptFileError, NonFiniteActivationsError
from sae_whiten._files import save_tensors
from tests.reference import (
    D_IN,
)
from tests.support import friendly, nasty


def accumulate(x: Tensor, batch_size: int = 100) -> ActivationStatistics:
    statistics = ActivationStatistics(x.shape[-1])
    for batch in x.split(batch_size):
        statistics.update(batch)
    return statistics


def two_pass(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = x.double().numpy()
    mean = values.mean(0)
    return mean, (values - mean).T @ (values - mean) / (len(values) - 1)


def relative(a: Tensor, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.numpy() - b) / np.linalg.norm(b))


@pytest.mark.parametrize("offset", [0.0, 3e3, 1e5])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_equals_a_two_pass_float64_reference_on_ill_conditioned_data(offset, batch_size):
    x = nasty(1000, 24, dtype=torch.float64)
    x[:, :6] += offset
    statistics = accumulate(x, batch_size)
    mean, covariance = two_pass(x)
    assert relative(statistics.mean, mean) < 1e-14
    assert relative(statistics.covariance, covariance) < 1e-12
    assert torch.equal(statistics.covariance, statistics.covariance.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_precision_batches_are_accumulated_in_float64(dtype):
    x = friendly(500, 16).to(dtype)
    mean, covariance = two_pass(x)
    statistics = accumulate(x)
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64
    assert relative(statistics.mean, mean) < 1e-13
    assert relative(statistics.covariance, covariance) < 1e-13


def test_sequences_count_as_rows_and_strides_do_not_matter():
    x = friendly(60, 8)
    as_sequences, transposed = ActivationStatistics(8), ActivationStatistics(8)
    as_sequences.update(x.reshape(4, 15, 8))
    transposed.update(x.T.contiguous().T)
    assert as_sequences.n_samples == 60
    assert torch.equal(as_sequences.covariance, transposed.covariance)


def test_an_empty_batch_changes_nothing():
    statistics = accumulate(friendly(50, 4))
    before = statistics.covariance
    statistics.update(torch.empty(0, 4))
    assert statistics.n_samples == 50
    assert torch.equal(statistics.covariance, before)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=3, max_size=3).filter(lambda s: sum(s) > 2),
    offset=st.sampled_from([0.0, 3e3, 1e5]),
    seed=st.integers(0, 1000),
)
def test_merge_is_associative_and_commutative_and_equals_one_pass(sizes, offset, seed):
    x = nasty(sum(sizes), 6, seed, torch.float64) + offset
    a, b, c = (
        accumulate(part) if len(part) else ActivationStatistics(6) for part in x.split(sizes)
    )
    whole = accumulate(x)
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert merged.n_samples == whole.n_samples
        assert relative(merged.mean, whole.mean.numpy()) < 1e-13
        assert relative(merged.covariance, whole.covariance.numpy()) < 1e-12


def test_merging_leaves_both_as_they_were_and_keeps_common_provenance():
    a, b = accumulate(friendly(30, 4)), accumulate(friendly(30, 4, seed=1))
    a.provenance = {"hook_name": "x", "split": "one"}
    b.provenance = {"hook_name": "x", "split": "two"}
    before = a.covariance, b.covariance
    merged = a.merge(b)
    assert merged.provenance == {"hook_name": "x"}
    assert torch.equal(a.covariance, before[0])
    assert torch.equal(b.covariance, before[1])
    with pytest.raises(ValueError, match="widths 4 and 5"):
        a.merge(ActivationStatistics(5))


@pytest.mark.parametrize("shape", [(10, 9), (4, 5, 2), (8,), (2, 3, 4, 8), (16, 4)])
def test_a_shape_that_does_not_fit_is_refused_even_where_its_size_would(shape):
    statistics = ActivationStatistics(8)
    with pytest.raises(ValueError, match="d_in=8"):
        statistics.update(torch.zeros(shape))
    assert statistics.n_samples == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_activation_is_named_and_nothing_is_lost(value):
    x = friendly(90, 4)
    statistics = accumulate(x[:60], 30)
    before = statistics.covariance
    bad = x[60:].clone()
    bad[7, 2] = value
    with pytest.raises(NonFiniteActivationsError, match="batch 2 .* row 7"):
        statistics.update(bad)
    assert torch.equal(statistics.covariance, before)
    statistics.update(x[60:])
    assert relative(statistics.covariance, two_pass(x)[1]) < 1e-13


def test_non_finite_activations_are_left_out_and_counted_if_asked():
    x = friendly(60, 4)
    bad = x.clone()
    bad[5, 1], bad[50, 0] = float("nan"), float("inf")
    statistics = ActivationStatistics(4, on_nonfinite="skip")
    statistics.update(bad)
    keep = torch.ones(60, dtype=torch.bool)
    keep[[5, 50]] = False
    assert (statistics.n_samples, statistics.n_skipped) == (58, 2)
    assert relative(statistics.covariance, two_pass(x[keep])[1]) < 1e-13


def test_large_but_finite_values_are_not_mistaken_for_infinities():
    statistics = ActivationStatistics(2)
    statistics.update(torch.tensor([[6e4, 6e4], [6e4, 0.0]], dtype=torch.float16))
    assert statistics.n_samples == 2


def test_too_few_samples_are_an_error():
    with pytest.raises(ValueError, match="no activations"):
        _ = ActivationStatistics(4).mean
    statistics = accumulate(torch.ones(1, 4))
    with pytest.raises(ValueError, match="at least 2"):
        _ = statistics.covariance


def test_saving_and_loading_is_exact(tmp_path):
    statistics = accumulate(nasty(200, 8))
    statistics.provenance = {"model_name": "gpt2", "seqpos_slice": [None]}
    statistics.save(tmp_path / "s.safetensors")
    loaded = ActivationStatistics.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.covariance, statistics.covariance)
    assert torch.equal(loaded.mean, statistics.mean)
    assert (loaded.n_samples, loaded.provenance) == (200, statistics.provenance)
    loaded.update(nasty(50, 8, seed=1))
    statistics.update(nasty(50, 8, seed=1))
    assert torch.equal(loaded.covariance, statistics.covariance)


def test_a_truncated_foreign_or_changed_file_is_one_clear_error(tmp_path):
    path = tmp_path / "s.safetensors"
    accumulate(friendly(50, 8)).save(path)
    content = path.read_bytes()

    def loading(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(CorruptFileError) as caught:
            ActivationStatistics.load(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    for length in (0, 3, 100, len(content) // 2, len(content) - 1):
        loading(content[:length])
    loading(b"PK\x03\x04" + content[4:])
    assert "checksum" in loading(content[:-1] + bytes([content[-1] ^ 1]))
    assert "checksum" in loading(content.replace(b'n_samples\\": 50', b'n_samples\\": 51'))
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    foreign = struct.pack("<Q", len(header)) + header + b"\0" * 4
    assert "not written by sae_whiten" in loading(foreign)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ActivationStatistics.load(tmp_path / "nowhere")


BAD_FIELDS = [
    {"d_in": 10**9},
    {"d_in": 0},
    {"d_in": "8"},
    {"n_samples": None},
    {"n_samples": -1},
    {"n_samples": 50.5},
    {"n_samples": 1},
    {"n_skipped": -1},
    {"n_batches": True},
    {"resolution": float("nan")},
    {"resolution": -1e-7},
    {"resolution": "1e-7"},
    {"provenance": None},
    {"provenance": [["model_name", "gpt2"]]},
]


@pytest.mark.parametrize("changed", BAD_FIELDS, ids=str)
def test_fields_that_no_activations_give_are_refused_by_name(changed, tmp_path):
    tensors, fields = accumulate(friendly(50, 8)).to_tensors()
    path = tmp_path / "s.safetensors"
    save_tensors(path, "activation_statistics", tensors, {**fields, **changed})
    with pytest.raises(CorruptFileError, match=re.escape(str(path))):
        ActivationStatistics.load(path)
    (name,) = changed
    del fields[name]
    save_tensors(path, "activation_statistics", tensors, fields)
    with pytest.raises(CorruptFileError, match=f"'{name}' is missing"):
        ActivationStatistics.load(path)


def with_entry(tensor: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mean", lambda x: with_entry(x, (3,), float("nan"))),
        ("mean", lambda x: x[:7]),
        ("mean", lambda x: x.float()),
        ("scatter", lambda x: with_entry(x, (2, 5), float("inf"))),
        ("scatter", lambda x: with_entry(x, (2, 2), -1.0)),
        ("scatter", lambda x: with_entry(x, (2, 5), 1e6)),
        ("scatter", lambda x: x[:7, :7]),
        ("scatter", lambda x: x.flatten()),
    ],
)
def test_tensors_that_no_activations_give_are_refused(name, change, tmp_path):
    tensors, fields = accumulate(friendly(50, 8)).to_tensors()
    path = tmp_path / "s.safetensors"
    changed = {**tensors, name: change(tensors[name])}
    save_tensors(path, "activation_statistics", changed, fields)
    with pytest.raises(CorruptFileError, match=re.escape(str(path))):
        ActivationStatistics.load(path)
    save_tensors(path, "activation_statistics", {"other": tensors[name]}, fields)
    with pytest.raises(CorruptFileError, match="'mean' is missing"):
        ActivationStatistics.load(path)


@pytest.mark.parametrize("fields", [None, [], 3], ids=str)
def test_a_header_without_fields_is_a_corrupt_file(fields, tmp_path):
    path = tmp_path / "s.safetensors"
    header = {"kind": "activation_statistics", "version": 1, "fields": fields}
    save_file({"mean": torch.zeros(2)}, path, metadata={"sae_whiten": json.dumps(header)})
    with pytest.raises(CorruptFileError, match="header"):
        ActivationStatistics.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    statistics = accumulate(friendly(50, 8))
    statistics.save(path)
    before = path.read_bytes()

    def dies_half_way(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("sae_whiten._files.save_file", dies_half_way)
    statistics.update(friendly(50, 8))
    with pytest.raises(OSError, match="disk full"):
        statistics.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shape", [(16,), (2, 2, 4, 16), (256, 8)])
def test_statistics_take_two_or_three_dimensions(shape: tuple[int, ...]) -> None:
    statistics = ActivationStatistics(D_IN)
    with pytest.raises(ValueError, match="expected"):
        statistics.update(torch.zeros(shape))
    assert statistics.n_samples == 0
