"""AFA: formulas against numbers computed by hand, SAEs against plain algebra on their weights."""

import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from torch import Tensor

from sae_whiten.cli import main
from sae_whiten.lenses.afa import figure as afa_figures
from sae_whiten.lenses.afa.figure import plot_violins, plot_zf
from sae_whiten.lenses.afa.measure import evaluate_afa
from sae_whiten.lenses.afa.norms import (
    AFASamples,
    Correlations,
    band_slopes,
    code_norm,
    correlations,
    eps_lbo,
    nmse,
    summary,
)
from sae_whiten.lenses.options import AFAOptions
from tests.support import BYTE_TRANSFORMER, tiny_model

HOOK = "blocks.1.hook_resid_pre"


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def samples(z: Tensor, f: Tensor, error: Tensor | None = None, h: int = 101) -> AFASamples:
    return AFASamples(z, f, torch.rand(len(z)).double() if error is None else error, z * 0 + 5, h)


# --- formulas


def test_norm_of_a_code_by_hand():
    latents = torch.tensor([[3.0, 0.0, -2.0], [0.0, 0.0, 0.0]])
    scale = torch.tensor([2.0, 7.0, 4.0])
    # sqrt(6^2 + 8^2), with a bias of norm 24 sqrt(100 + 576)
    assert code_norm(latents, scale).tolist() == [10, 0]
    assert code_norm(latents, scale, 24.0).tolist() == pytest.approx([26, 24])
    assert code_norm(latents.half() * 100, scale.half() * 100).tolist() == pytest.approx([1e5, 0])


def test_eps_lbo_by_hand():
    found = eps_lbo(f64(2, 1, 3, 5, 0), f64(1, 2, 3, 0, 0), n_latents=4)
    # |4 - 1| / (3 * 1), |1 - 4| / (3 * 4), equal, no code, neither
    assert found.tolist() == [1, 0.25, 0, math.inf, 0]
    with pytest.raises(ValueError, match="n_latents=1"):
        eps_lbo(f64(1), f64(1), 1)


def test_eps_lbo_keeps_its_digits_where_norms_are_large_and_alike():
    z = f64(3000 * (1 + 1e-12), 1e200)
    assert eps_lbo(z, f64(3000, 1e199), 2).tolist() == pytest.approx([2e-12, 99], rel=1e-3)


def test_nmse_by_hand():
    x = torch.tensor([[3.0, 4.0], [3000.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    x_hat = torch.tensor([[3.0, 3.0], [3000.0, 3.0], [1.0, 0.0], [0.0, 0.0]])
    assert nmse(x, x_hat).tolist() == pytest.approx([1 / 25, 1e-6, math.inf, 0])
    # a square that float16 cannot hold
    assert nmse(x[:2].half(), x_hat[:2].half()).tolist() == pytest.approx([1 / 25, 1e-6])


def orthonormal(d: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]


def test_an_orthonormal_dictionary_needs_no_eps():
    D = orthonormal(20)
    f = torch.rand(50, 20, dtype=torch.float64) * 3000
    eps = eps_lbo((f @ D).norm(dim=1), code_norm(f, D.norm(dim=1)), 20)
    assert eps.max() < 1e-15


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    d=st.integers(2, 12),
    h=st.integers(2, 30),
    active=st.integers(1, 30),
    scale=st.sampled_from([1e-6, 1.0, 3000.0]),
)
def test_eps_lbo_is_at_most_the_coherence_of_the_dictionary(seed, d, h, active, scale):
    g = torch.Generator().manual_seed(seed)
    D = torch.randn(h, d, generator=g, dtype=torch.float64)
    D = D / D.norm(dim=1, keepdim=True)
    f = scale * torch.rand(10, h, generator=g, dtype=torch.float64)
    f[:, torch.randperm(h, generator=g)[min(active, h) :]] = 0
    coherence = float((D @ D.T - torch.eye(h)).abs().max())
    eps = eps_lbo((f @ D).norm(dim=1), code_norm(f, D.norm(dim=1)), h)
    assert eps.max() <= coherence + 1e-12


def test_the_bound_is_met_by_latents_that_are_all_equally_alike():
    # unit vectors with all inner products c, all active alike: the inequality is an equality
    c, h = 0.3, 6
    gram = torch.full((h, h), c, dtype=torch.float64).fill_diagonal_(1)
    D = torch.linalg.cholesky(gram)
    f = torch.full((1, h), 2.0, dtype=torch.float64)
    assert eps_lbo((f @ D).norm(dim=1), code_norm(f, D.norm(dim=1)), h).item() == pytest.approx(c)


@pytest.mark.parametrize("e", [0.0, 0.25, 0.5, 1.0, 3.0])
def test_slopes_of_bands_are_where_eps_lbo_is_e(e):
    lower, upper = band_slopes(e)
    assert lower == pytest.approx((1 + e) ** -0.5)
    h = 10
    for slope in (lower, upper):
        if math.isfinite(slope):
            assert eps_lbo(f64(7), f64(7 * slope), h).item() * (h - 1) == pytest.approx(e)
    if e >= 1:
        assert upper == math.inf
        assert eps_lbo(f64(7), f64(7e9), h).item() * (h - 1) <= e


def test_negative_bands_are_refused():
    for e in (-0.1, math.nan):
        with pytest.raises(ValueError, match="e="):
            band_slopes(e)


def test_correlations_are_those_of_values_and_ranks_where_both_are_finite():
    g = np.random.default_rng(0)
    a, b = g.random(30), g.random(30)
    b += a**3
    ranks = scipy.stats.rankdata(a), scipy.stats.rankdata(b)
    expected = np.corrcoef(a, b)[0, 1], np.corrcoef(*ranks)[0, 1]
    a, b = np.append(a, [math.inf, 0.5]), np.append(b, [0.1, math.nan])
    assert correlations(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)
    none = Correlations(None, None)
    assert correlations(f64(1, 2), f64(1, 3)) == none
    assert correlations(f64(1, 2, 3), f64(2, 2, 2)) == none
    assert correlations(f64(1, 2, math.inf), f64(2, 3, 4)) == none


def test_summary_by_hand():
    # excess |z^2 / f^2 - 1|: 0, 3, 0.75, 0.19, infinite
    found = summary(
        samples(f64(1, 2, 1, 0.9, 1), f64(1, 1, 2, 1, 0), f64(0.1, 0.2, 0.3, 0.4, 1), h=2)
    )
    assert found["n_samples"] == 5
    assert found["n_undefined"] == 1
    assert found["eps_lbo_mean"] == pytest.approx((0 + 3 + 0.75 + 0.19) / 4)
    assert found["eps_lbo_median"] == pytest.approx((0.19 + 0.75) / 2)
    assert found["nmse_mean"] == pytest.approx(0.25)
    assert found["nmse_median"] == pytest.approx(0.25)
    assert found["l0_mean"] == 5
    assert found["over_activated"] == pytest.approx(2 / 5)
    assert found["under_activated"] == pytest.approx(2 / 5)
    norms = np.corrcoef([1, 2, 1, 0.9, 1], [1, 1, 2, 1, 0])[0, 1]
    assert found["norms_pearson"] == pytest.approx(norms)
    assert found["in_band"] == {"0.25": 0.4, "0.5": 0.4, "1": pytest.approx(0.6)}
    nothing = summary(samples(f64(1, 2), f64(0, 0)))
    assert nothing["eps_lbo_mean"] is nothing["nmse_median"] is nothing["pearson"] is None
    assert nothing["n_undefined"] == 2
    json.dumps([found, nothing], allow_nan=False)
    with pytest.raises(ValueError, match="no samples"):
        summary(samples(f64(), f64()))


# --- SAEs on a model


def sae_of(
    d_in: int = 32, d_sae: int = 64, hook_name: str = HOOK, seed: int = 0, /,
    config: dict[str, Any] | None = None, **metadata: Any,
) -> SAE[Any]:  # fmt: skip
    """An SAE with random weights, decoder norms that differ and a bias."""
    torch.manual_seed(seed)
    about = {"hook_name": hook_name, "context_size": 16, "prepend_bos": False} | metadata
    options = {"architecture": "standard", "d_in": d_in, "d_sae": d_sae, **(config or {})}
    sae = SAE.from_dict({**options, "metadata": about})
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(d_in, d_sae) / d_in**0.5)
        sae.W_dec.copy_(torch.randn(d_sae, d_in) * (0.2 + torch.rand(d_sae, 1)))
        sae.b_dec.copy_(torch.randn(d_in))
    return sae


def prompts(n: int = 40, seed: int = 0) -> Dataset:
    """Token sequences of lengths 3 to 20."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 21, (n,), generator=g).tolist()
    rows = [torch.randint(1, 100, (m,), generator=g).tolist() for m in lengths]
    return Dataset.from_dict({"input_ids": rows})


def activations(model: Any, ids: list[int], hook_name: str = HOOK) -> Tensor:
    cache = model.run_with_cache(torch.tensor([ids]), names_filter=[hook_name])[1]
    return cache[hook_name][0].detach()


def last_inputs(model: Any, dataset: Dataset, hook_name: str = HOOK) -> Tensor:
    return torch.stack([activations(model, r[:16], hook_name)[-1] for r in dataset["input_ids"]])


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architecture": "gated"},
        {"architecture": "jumprelu"},
        {"architecture": "topk", "k": 7},
        {"architecture": "abstopk", "k": 7},
        {"dtype": "float64"},
    ],
    ids=lambda config: config.get("architecture", "") + config.get("dtype", ""),
)
def test_norms_and_errors_are_those_of_the_weights(config):
    model, dataset, sae = tiny_model(), prompts(), sae_of(config=config)
    (found,) = evaluate_afa(
        {"sae": sae}, model, dataset, AFAOptions(n_prompts=40, batch_size_prompts=3)
    )
    x = last_inputs(model, dataset)
    f = sae.encode(x.to(sae.dtype)).detach().double()
    W_dec, b_dec = sae.W_dec.detach().double(), sae.b_dec.detach().double()
    z_norm = x.double().norm(dim=1)
    f_tilde = torch.cat([f * W_dec.norm(dim=1), b_dec.norm().expand(len(f), 1)], dim=1)
    ftf, ztz = (f_tilde**2).sum(1), (x.double() ** 2).sum(1)
    error = ((x - (f @ W_dec + b_dec)) ** 2).sum(1)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(found.samples.z_norm, z_norm, **close)
    torch.testing.assert_close(found.samples.code_norm, ftf.sqrt(), **close)
    torch.testing.assert_close(found.samples.eps_lbo, (ztz - ftf).abs() / (63 * ftf), **close)
    torch.testing.assert_close(found.samples.nmse, error / ztz, rtol=1e-4, atol=1e-7)
    assert found.samples.l0.tolist() == (f != 0).sum(1).tolist()
    assert found.context["bias_norm"] == pytest.approx(float(b_dec.norm()))
    assert found.positions == [min(len(row), 16) - 1 for row in dataset["input_ids"]]
    assert found.tokens == [row[:16][-1] for row in dataset["input_ids"]]
    assert found.rows == list(range(40))


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_latents_in_units_of_decoder_norms_are_those_of_the_folded_copy(architecture):
    options = {"architecture": architecture, "k": 7, "rescale_acts_by_decoder_norm": True}
    rescaled, folded = sae_of(config=options), sae_of(config=options)
    assert rescaled.W_dec.norm(dim=1).std() > 0.5
    folded.fold_W_dec_norm()
    folded.cfg.rescale_acts_by_decoder_norm = False
    a, b = evaluate_afa({"a": rescaled, "b": folded}, tiny_model(), prompts())
    for name in ("z_norm", "code_norm", "nmse", "eps_lbo", "l0"):
        torch.testing.assert_close(
            getattr(a.samples, name), getattr(b.samples, name), rtol=1e-4, atol=1e-6
        )
    # where the latents are not yet scaled, the norms of the rows would count twice
    unscaled = sae_of(config={**options, "rescale_acts_by_decoder_norm": False})
    (other,) = evaluate_afa({"c": unscaled}, tiny_model(), prompts())
    assert not torch.allclose(other.samples.code_norm, a.samples.code_norm, rtol=0.05)


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_inputs_are_normalised_as_the_encoder_gets_them(normalize):
    sae = sae_of(config={"normalize_activations": normalize})
    model, dataset = tiny_model(), prompts()
    (found,) = evaluate_afa({"sae": sae}, model, dataset, AFAOptions(batch_size_prompts=4))
    x = last_inputs(model, dataset)
    if normalize == "layer_norm":
        z = x - x.mean(1, keepdim=True)
        z = z / (z.std(1, keepdim=True) + 1e-5)
    else:
        z = x * (32**0.5 / x.norm(dim=1, keepdim=True))
    weights: dict[str, Any] = {name: p.detach() for name, p in sae.named_parameters()}
    W_dec, b_dec = weights["W_dec"], weights["b_dec"]
    f = torch.relu((z - b_dec) @ weights["W_enc"] + weights["b_enc"])
    expected = torch.hypot((f * W_dec.norm(dim=1)).norm(dim=1), b_dec.norm())
    torch.testing.assert_close(found.samples.z_norm, z.norm(dim=1).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.samples.code_norm, expected.double(), rtol=1e-5, atol=0)
    x_hat = torch.cat([sae(row[None]) for row in x]).detach()
    torch.testing.assert_close(found.samples.nmse, nmse(x, x_hat), rtol=1e-4, atol=1e-7)
    assert found.context["normalize_activations"] == normalize
    # nothing is left behind in the SAE
    torch.testing.assert_close(sae(x), x_hat)


def test_a_matching_pursuit_sae_without_bias_is_measured_without_it():
    config = {"architecture": "matching_pursuit", "max_iterations": 5}
    for apply in (False, True):
        sae = sae_of(config={**config, "apply_b_dec_to_input": apply})
        with torch.no_grad():
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        (found,) = evaluate_afa({"sae": sae}, tiny_model(), prompts(5))
        bias = float(sae.b_dec.detach().norm()) if apply else 0.0
        assert found.context["bias_norm"] == pytest.approx(bias)


def perfect(scale: float = 1.0, **metadata: Any) -> SAE[Any]:
    """x = relu(x U) U^T - relu(-x U) U^T, in latents of other units; U orthonormal."""
    sae = sae_of(**metadata)
    U = orthonormal(32).float()
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([U, -U], dim=1) * scale)
        sae.W_dec.copy_(torch.cat([U.T, -U.T]) / scale)
        sae.b_dec.zero_()
    return sae


def test_codes_of_orthonormal_features_are_as_large_as_their_inputs_also_large_ones():
    model = tiny_model()
    with torch.no_grad():
        model.W_E[7] *= 3000 / model.W_E[7].norm()
    rows = [[3, 4, 5], [1, 2, 7]]
    saes = {"a": perfect(), "b": perfect(100.0)}
    for found in evaluate_afa(saes, model, Dataset.from_dict({"input_ids": rows})):
        assert found.samples.z_norm[1] > 2500
        assert found.samples.z_norm[0] < 100
        # up to the rounding of float32 weights
        torch.testing.assert_close(found.samples.code_norm, found.samples.z_norm, rtol=1e-6, atol=0)
        assert found.samples.eps_lbo.max() < 1e-7
        assert found.samples.nmse.max() < 1e-12


def test_a_zero_code_is_null_in_json_and_counted():
    sae = sae_of()
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.get_parameter("b_enc").fill_(-1)
        sae.b_dec.zero_()
    (found,) = evaluate_afa({"sae": sae}, tiny_model(), prompts(5))
    assert found.samples.eps_lbo.tolist() == [math.inf] * 5
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert report["prompts"]["eps_lbo"] == [None] * 5
    assert report["prompts"]["code_norm"] == [0] * 5
    assert report["prompts"]["nmse"] == [1] * 5
    assert report["prompts"]["l0"] == [0] * 5
    assert report["summary"]["n_undefined"] == 5
    assert report["summary"]["under_activated"] == 1


def test_saes_of_several_hooks_and_heads_see_the_same_prompts():
    model, dataset, z = tiny_model(), prompts(12), "blocks.1.attn.hook_z"
    saes = {
        "residual": sae_of(32, 64, "blocks.0.hook_resid_post"),
        "heads": sae_of(32, 64, z, config={"reshape_activations": "hook_z"}),
        "one head": sae_of(8, 16, z, hook_head_index=2),
    }
    reshaping = [sae.hook_z_reshaping_mode for sae in saes.values()]
    results = evaluate_afa(saes, model, dataset)
    assert [sae.hook_z_reshaping_mode for sae in saes.values()] == reshaping
    heads = last_inputs(model, dataset, z)
    inputs = [last_inputs(model, dataset, "blocks.0.hook_resid_post"), heads.flatten(1),
              heads[:, 2]]  # fmt: skip
    for found, x in zip(results, inputs, strict=True):
        torch.testing.assert_close(
            found.samples.z_norm, x.double().norm(dim=1), rtol=1e-5, atol=1e-7
        )
        assert found.rows == results[0].rows


def test_the_token_that_counts_is_within_the_saes_positions_and_no_excluded_one():
    rows = [[1, 2, 3, 4, 5, 6], [1, 2], [9, 1, 2, 9, 9], [9, 9, 9, 9]]
    saes = {
        "all": sae_of(exclude_special_tokens=False),
        "early": sae_of(seqpos_slice=[1, 4], exclude_special_tokens=[9]),
    }
    everything, early = evaluate_afa(
        saes, tiny_model(), Dataset.from_dict({"input_ids": rows}), AFAOptions(n_prompts=10)
    )
    assert everything.rows == early.rows == [0, 1, 2]
    assert everything.positions == [5, 1, 4]
    assert early.positions == [3, 1, 2]
    assert early.tokens == [4, 2, 2]


def test_rows_of_text_become_prompts_of_their_own():
    from sae_lens.load_model import load_model

    model: Any = load_model("AutoModelForCausalLM", str(BYTE_TRANSFORMER), device="cpu")
    hook = "gpt_neox.layers.0"
    texts = ["hello", "", "a longer text than the context", "x"]
    dataset = Dataset.from_dict({"text": texts, "other": [1, 2, 3, 4]}).with_format(
        "numpy", columns=["other"]
    )
    sae = sae_of(128, 256, hook, prepend_bos=True)
    (found,) = evaluate_afa({"sae": sae}, model, dataset, AFAOptions(context_size=8))
    assert found.rows == [0, 2, 3]
    assert found.positions == [5, 7, 1]
    bos = model.tokenizer.bos_token_id
    for i, text in enumerate(("hello", "a longer", "x")):
        ids = [bos, *model.tokenizer(text, add_special_tokens=False)["input_ids"]][:8]
        assert ids[-1] == found.tokens[i]
        x = activations(model, ids, hook)[-1]
        assert float(found.samples.z_norm[i]) == pytest.approx(float(x.norm()), rel=1e-4)


def test_special_tokens_at_the_end_do_not_count_even_if_the_sae_was_trained_on_them():
    from sae_lens.load_model import load_model

    model: Any = load_model("AutoModelForCausalLM", str(BYTE_TRANSFORMER), device="cpu")
    bos = model.tokenizer.bos_token_id
    rows = Dataset.from_dict({"tokens": [[bos, 65, 66, bos], [bos, bos], [67]]})
    sae = sae_of(128, 256, "gpt_neox.layers.0", exclude_special_tokens=False)
    (found,) = evaluate_afa({"sae": sae}, model, rows)
    assert (found.rows, found.positions, found.tokens) == ([0, 2], [2, 0], [66, 67])


# --- what is refused


def test_what_cannot_be_measured_is_refused_by_name():
    model, dataset = tiny_model(), prompts(3)
    broken = sae_of()
    decode = broken.decode
    broken.decode = lambda feature_acts: decode(feature_acts**2)  # type: ignore[method-assign]
    nan = tiny_model()
    with torch.no_grad():
        nan.W_E[dataset["input_ids"][1][0]] = math.nan
    temporal = sae_of()
    temporal.cfg.architecture = lambda: "temporal"  # type: ignore[method-assign]
    cases: list[tuple[Any, Any, Any, str]] = [
        ({}, model, dataset, "no SAEs"),
        ({"good": sae_of(), "bad": broken}, model, dataset, "bad: its reconstruction is not"),
        ({"time": temporal}, model, dataset, "time is a temporal SAE"),
        ({"one": sae_of(32, 1)}, model, dataset, "one has 1 latent"),
        ({"narrow": sae_of(16)}, model, dataset, "narrow takes activations of width 16"),
        ({"sae": sae_of()}, nan, dataset, "row 1 of the dataset"),
        ({"sae": sae_of()}, model, DatasetDict({"a": dataset, "b": dataset}), "splits, a, b"),
        ({"sae": sae_of()}, model, Dataset.from_dict({"words": ["a"]}), "the dataset has words"),
        ({"sae": sae_of()}, model, Dataset.from_dict({"text": ["a"]}), "has no tokenizer"),
        ({"sae": sae_of(exclude_special_tokens=[1])}, model,
         Dataset.from_dict({"tokens": [[1, 1], [1]]}), "of its 2 rows none"),
    ]  # fmt: skip
    for saes, used, data, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate_afa(saes, used, data)
    with pytest.raises(ValueError, match="n_prompts=0"):
        AFAOptions(n_prompts=0)


# --- figures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, instead of files."""
    figures: list[Any] = []
    monkeypatch.setattr(afa_figures, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def layers(n: int, n_samples: int = 50) -> dict[str, AFASamples]:
    g = torch.Generator().manual_seed(0)
    found = {}
    for i in range(n):
        z = 20 + 3 * i + torch.rand(n_samples, generator=g).double()
        f = z * (0.5 + torch.rand(n_samples, generator=g).double())
        found[f"blocks.{i}.hook_resid_pre"] = samples(z, f)
    return found


def test_the_zf_plot_has_every_point_the_line_and_the_bands(drawn):
    data = layers(3)
    plot_zf(data, "unused")
    (axes,) = drawn[0].axes
    points = [line for line in axes.lines if line.get_marker() != "None"]
    for line, found in zip(points, data.values(), strict=True):
        assert list(line.get_xdata()) == found.z_norm.tolist()
        assert list(line.get_ydata()) == found.code_norm.tolist()
    assert [line.get_label() for line in points] == ["0", "1", "2"]
    assert len({line.get_marker() for line in points}) == 3
    assert len({line.get_color() for line in points}) == 3
    slopes = sorted(
        float(line.get_ydata()[1] / line.get_xdata()[1])
        for line in axes.lines
        if line.get_marker() == "None"
    )
    expected = [0.5**0.5, (2 / 3) ** 0.5, 0.8**0.5, 1.0, (4 / 3) ** 0.5, 2**0.5]
    assert slopes == pytest.approx(expected)
    assert len(axes.collections) == 3
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_xscale() == axes.get_yscale() == "linear"
    assert axes.get_xlim()[1] > max(float(found.code_norm.max()) for found in data.values())
    assert {text.get_text() for text in axes.texts} == {"over-activated", "under-activated"}
    bands, saes = drawn[0].legends
    assert [text.get_text() for text in bands.get_texts()] == ["y = x", "0.25", "0.5", "1"]
    assert saes.get_title().get_text() == "blocks.*.hook_resid_pre"


@pytest.mark.parametrize("n", [1, 3, 26])
def test_keys_cover_nothing_and_stay_on_the_page(drawn, n):
    plot_zf(layers(n, 5), "unused")
    plot_zf({f"folder/of-some-length/sae-{i}": s for i, s in enumerate(layers(n, 5).values())}, "")
    for figure in drawn:
        figure.draw_without_rendering()
        (axes,) = figure.axes
        for key in figure.legends:
            extent = key.get_window_extent()
            assert not extent.overlaps(axes.get_tightbbox())
            assert figure.bbox.x0 <= extent.x0 < extent.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= extent.y0 < extent.y1 <= figure.bbox.y1
        assert axes.get_window_extent().width > 0.6 * figure.bbox.width


def test_norms_far_apart_take_logarithmic_axes_and_hidden_points_are_counted(drawn):
    data = layers(2)
    z = data["blocks.0.hook_resid_pre"].z_norm
    plot_zf({**data, "x": samples(z * 0 + 3000, torch.cat([f64(0, 0), z[2:] * 100]))}, "unused")
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlim()[1] > 3000
    assert "(not shown: 2 points)" in axes.get_xlabel()


def halves(axes: Any) -> list[tuple[float, float]]:
    """How far each half-violin reaches to the left and to the right."""
    boxes = [c.get_paths()[0].get_extents() for c in axes.collections]
    return [(float(box.x0), float(box.x1)) for box in boxes]


def test_violins_have_a_half_of_each_kind_for_each_sae(drawn):
    data = layers(6)
    plot_violins(data, "unused")
    left, right = drawn[0].axes
    for i, ((l0, l1), (r0, r1)) in enumerate(zip(halves(left), halves(right), strict=True)):
        assert (l0, l1) == pytest.approx((i - 0.42, i))
        assert (r0, r1) == pytest.approx((i, i + 0.42))
    assert [label.get_text() for label in left.get_xticklabels()] == list("012345")
    assert left.collections[0].get_hatch() is None
    assert right.collections[0].get_hatch()
    for axes, column in ((left, "nmse"), (right, "eps_lbo")):
        medians = [line.get_ydata() for line in axes.lines if line.get_marker() == "o"]
        expected = [float(np.median(getattr(s, column).numpy())) for s in data.values()]
        assert np.ravel(medians) == pytest.approx(expected)


def test_violins_of_scales_far_apart_constants_and_infinities(drawn):
    z = f64(*range(10, 20))
    data = {
        "small": samples(z, z * 0.9, f64(*range(1, 11)) * 1e-6),
        "large": samples(z, z * 0.9, f64(*range(1, 11))),
        "constant": samples(z, z * 0, z * 0 + 0.5),
    }
    plot_violins(data, "unused")
    drawn[0].draw_without_rendering()
    left, right = drawn[0].axes
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")
    assert len(left.collections) == 3
    assert "(not shown: 10)" in right.get_ylabel()
    assert "not shown" not in left.get_ylabel()


def test_long_names_lose_common_folders_and_leave_room_for_the_axes(drawn):
    (found,) = layers(1).values()
    names = [f"/a/folder/{sae}" for sae in ("x/plain", "x/white", f"{'long' * 30}/end")]
    data = dict.fromkeys(names, found)
    plot_zf(data, "unused")
    plot_violins(data, "unused")
    short = ["x/plain", "x/white", f"…{names[2][-31:]}"]
    assert [text.get_text() for text in drawn[0].legends[1].get_texts()] == short
    assert [text.get_text() for text in drawn[1].axes[0].get_xticklabels()] == short
    for figure in drawn:
        figure.draw_without_rendering()
        assert figure.axes[0].get_window_extent().height > 0.4 * figure.bbox.height


def test_figures_need_samples():
    for plot in (plot_zf, plot_violins):
        for data in ({}, {"a": samples(f64(), f64())}):
            with pytest.raises(ValueError, match="at least one sample"):
                plot(data, "unused.png")


# --- the command


def test_the_command_writes_everything_and_prints_a_table(tmp_path, capsys):
    hook = "gpt_neox.layers.0"
    saes = {
        "first": sae_of(128, 256, hook, model_name=str(BYTE_TRANSFORMER),
                        model_class_name="AutoModelForCausalLM", dataset_path="local"),
        "second": sae_of(128, 64, hook, config={"architecture": "topk", "k": 9}),
    }  # fmt: skip
    with torch.no_grad():  # no code at all
        saes["first"].W_enc.zero_()
        saes["first"].get_parameter("b_enc").fill_(-1)
        saes["first"].b_dec.zero_()
        saes["second"].b_dec.fill_(1e4)
        saes["second"].W_enc.mul_(1e-6)  # or the latents were as large
    for name, sae in saes.items():
        sae.save_model(tmp_path / name)
    texts = [f"prompt number {i} " + "x" * i for i in range(12)]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "texts" / "part.parquet")
    paths = [str(tmp_path / name) for name in saes]
    out = tmp_path / "out"
    command = ["afa", *paths, "--out", str(out), "--n-prompts", "10"]
    assert main(command) == 2
    assert "--dataset-path" in capsys.readouterr().err
    assert main([*command, "--dataset-path", str(tmp_path / "texts")]) == 0
    printed = capsys.readouterr().out

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report = json.loads((out / "afa.json").read_text(), parse_constant=refuse)
    assert report["n_prompts"] == 10
    assert report["model_name"] == str(BYTE_TRANSFORMER)
    assert report["dataset_split"] == "train"
    assert set(report["versions"]) == {"sae-whiten", "sae-lens", "transformer-lens", "torch"}
    for found, path in zip(report["saes"], paths, strict=True):
        assert (found["name"], found["hook_name"], found["context_size"]) == (path, hook, 16)
        assert {len(column) for column in found["prompts"].values()} == {10}
        assert path in printed
    first, second = report["saes"]
    assert first["prompts"]["eps_lbo"] == [None] * 10
    assert first["summary"]["eps_lbo_mean"] is None
    assert "10 prompts are left out of means" in printed
    assert second["prompts"]["l0"] == [9] * 10
    assert second["summary"]["eps_lbo_mean"] == pytest.approx(np.mean(second["prompts"]["eps_lbo"]))
    assert f"{second['summary']['eps_lbo_mean']:.2e}" in printed
    assert f"{paths[1]}: its codes" in printed
    assert f"{paths[0]}: its codes" not in printed
    for name, magic in (("zf.png", b"\x89PNG"), ("zf.pdf", b"%PDF"),
                        ("violins.png", b"\x89PNG"), ("violins.pdf", b"%PDF")):  # fmt: skip
        assert (out / name).read_bytes().startswith(magic)
    assert len(list(out.iterdir())) == 5
