"""The latent-space view: the embedding, its figure, firing rates on a model, and the command."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray
from scipy.sparse import csr_array
from sklearn.neighbors import NearestNeighbors

from sae_whiten._files import CorruptFileError
from sae_whiten.cli import main
from sae_whiten.lenses.latents import figure as latent_space_figure
from sae_whiten.lenses.latents.embedding import (
    DECODER,
    LatentMap,
    LatentSpace,
    LatentVectors,
    _draw,
    embed_latents,
)
from sae_whiten.lenses.latents.figure import plot_latent_space
from sae_whiten.lenses.latents.measure import (
    FiringRates,
    latent_space,
    measure_firing,
)
from sae_whiten.lenses.options import LatentOptions
from tests.evaluation.test_evaluate import TOPK, activations, sae_of, text
from tests.support import BYTE_TRANSFORMER, tiny_dataset, tiny_model

__all__ = ["text"]  # a fixture

RATES = (0.0, 1e-4, 1e-2, 0.3)


def clusters(
    n: int = 120, n_clusters: int = 4, d: int = 24, seed: int = 0
) -> tuple[ndarray, ndarray]:
    """Directions around some centres, of lengths over six decades, and whose they are."""
    rng = np.random.default_rng(seed)
    # centres nearly at right angles; no dimension tells the clusters apart alone
    centres = np.linalg.qr(rng.standard_normal((d, d)))[0][:n_clusters]
    of = np.arange(n) % n_clusters
    x = centres[of] + 0.08 * rng.standard_normal((n, d))
    return x * 10 ** rng.uniform(-3, 3, (n, 1)), of


def latents(
    vectors: Any, rates: ndarray | None = None, name: str = "sae", space: str = "hook"
) -> LatentVectors:
    usual = np.resize(np.array(RATES), vectors.shape[0])
    return LatentVectors(name, space, vectors, usual if rates is None else rates)


def embed(*saes: LatentVectors, **options: Any) -> list[LatentMap]:
    return embed_latents(saes, LatentOptions(**{"perplexity": 8, **options}))


def separated(points: ndarray, of: ndarray) -> bool:
    """Whether the five nearest neighbours of every point are of its own cluster."""
    nearest = NearestNeighbors(n_neighbors=5).fit(points).kneighbors(return_distance=False)
    return bool((of[nearest] == of[:, None]).all())


# --- the embedding


def test_planted_clusters_come_out_whatever_the_lengths_of_the_rows():
    x, of = clusters()
    (found,) = embed(latents(x))
    assert separated(found.xy, of)
    # the lengths hide what the directions show
    assert not separated(x, of)


def test_opposite_directions_are_not_alike():
    x, _ = clusters(n=80, n_clusters=1)
    x[::2] *= -1
    (found,) = embed(latents(x))
    assert separated(found.xy, np.arange(80) % 2)


def test_the_scale_of_a_row_does_not_matter():
    x, _ = clusters()
    scale = 2.0 ** np.random.default_rng(1).integers(-300, 300, (len(x), 1))
    a, b = embed(latents(x))[0], embed(latents(x * scale))[0]
    assert np.array_equal(a.xy, b.xy)


def test_duplicates_lie_together():
    x, _ = clusters()
    x = np.random.default_rng(0).standard_normal(x.shape)
    x[10] = x[90] * 7
    (found,) = embed(latents(x))
    distances = np.linalg.norm(found.xy - found.xy[10], axis=1)
    assert distances.argsort()[:2].tolist() in ([10, 90], [90, 10])


def test_all_latents_of_one_direction_are_embedded():
    x = np.outer(np.arange(1.0, 21), np.ones(6))
    (found,) = embed(latents(x), perplexity=5)
    assert np.isfinite(found.xy).all()


def test_sparse_and_dense_vectors_give_the_same_clusters():
    x, of = clusters(d=300)
    x[abs(x) < 0.05 * abs(x).max(1, keepdims=True)] = 0
    assert 0.1 < (x == 0).mean() < 0.9
    for vectors in (x, csr_array(x)):
        assert separated(embed(latents(vectors))[0].xy, of)


@pytest.mark.parametrize("as_sparse", [False, True])
def test_zero_vectors_get_no_place_and_are_listed(as_sparse):
    x, _ = clusters(n=60)
    x[[3, 17]] = 0
    (found,) = embed(latents(csr_array(x) if as_sparse else x.astype(np.float32)))
    assert found.without_direction.tolist() == [3, 17]
    assert found.latents.tolist() == [i for i in range(60) if i not in (3, 17)]
    assert np.isfinite(found.xy).all()
    assert len(found.xy) == 58
    # those without a place are counted all the same
    assert (found.d_sae, found.n_dead) == (60, 15)


def test_dead_latents_are_marked():
    x, _ = clusters(n=40)
    rates = np.full(40, 0.2)
    rates[[5, 6, 31]] = 0
    (found,) = embed(latents(x, rates))
    assert found.latents[found.dead].tolist() == [5, 6, 31]
    assert found.n_dead == 3
    assert np.array_equal(found.firing_rates, rates)


def test_the_same_seed_gives_the_same_picture_and_another_seed_another():
    x, _ = clusters()
    a, b, c = (embed(latents(x), max_latents=60, seed=seed)[0] for seed in (3, 3, 4))
    assert np.array_equal(a.xy, b.xy)
    assert np.array_equal(a.latents, b.latents)
    assert not np.array_equal(a.latents, c.latents)


@given(
    dead=st.lists(st.booleans(), min_size=5, max_size=200),
    size=st.integers(2, 250),
    seed=st.integers(0, 5),
)
def test_a_draw_keeps_the_share_of_dead_latents(dead, size, seed):
    flags = np.array(dead)
    drawn = _draw(flags, size, seed)
    assert len(drawn) == min(size, len(flags))
    assert (np.diff(drawn) > 0).all()
    assert abs(flags[drawn].sum() - len(drawn) * flags.mean()) <= 1
    assert flags[drawn].any() == flags.any()
    assert flags[drawn].all() == flags.all()


def test_more_latents_than_wanted_are_drawn_and_the_others_counted():
    x, _ = clusters(n=200)
    rates = np.full(200, 0.2)
    rates[:50] = 0
    (found,) = embed(latents(x, rates), max_latents=40)
    assert len(found.latents) == len(found.xy) == 40
    assert found.dead.sum() == 10
    assert (found.d_sae, found.n_dead) == (200, 50)
    assert len(found.without_direction) == 0


def test_a_perplexity_too_large_for_the_points_is_lowered_and_said(caplog):
    x, of = clusters(n=22, n_clusters=2)
    (found,) = embed(latents(x), perplexity=30)
    assert found.perplexity == pytest.approx(7)
    assert "perplexity 30 lowered to 7 for 22 latents" in caplog.text
    assert separated(found.xy, of)
    (four,) = embed(latents(x[:4]), perplexity=30)
    assert four.perplexity == 1
    assert np.isfinite(four.xy).all()


def test_saes_of_one_space_share_their_axes():
    x, of = clusters()
    y, _ = clusters(seed=1)
    order = np.random.default_rng(0).permutation(len(x))
    # the same directions in another order, lengths and all
    same = latents(x[order] * 3, name="same")
    other = latents(y, name="b", space="else")
    first, alone, second = embed(latents(x, name="a"), other, same, perplexity=30)
    assert [first.name, alone.name, second.name] == ["a", "b", "same"]
    # each latent's nearest is its like in the other SAE
    of_other = NearestNeighbors(n_neighbors=1).fit(second.xy)
    nearest = of_other.kneighbors(first.xy, return_distance=False).ravel()
    assert np.array_equal(order[nearest], np.arange(len(x)))
    both = np.concatenate([first.xy, second.xy])
    assert separated(both, np.concatenate([of, of[order]]))
    # nothing of another space enters
    assert np.array_equal(alone.xy, embed(other, perplexity=30)[0].xy)


def test_what_cannot_be_embedded_is_refused():
    x, _ = clusters(n=20)
    with pytest.raises(ValueError, match="no SAEs"):
        embed()
    with pytest.raises(ValueError, match="same name: sae, sae"):
        embed(latents(x), latents(x))
    with pytest.raises(ValueError, match=r"width.* 24 \(sae\), 23 \(b\)"):
        embed(latents(x), latents(x[:, 1:], name="b"))
    with pytest.raises(ValueError, match="sae: only 3 latents to embed"):
        embed(latents(np.concatenate([x[:3], 0 * x])))
    with pytest.raises(ValueError, match="perplexity=0.5"):
        embed(latents(x), perplexity=0.5)
    with pytest.raises(ValueError, match="max_latents=0"):
        embed(latents(x), max_latents=0)
    with pytest.raises(ValueError, match="20 vectors, but 19 firing rates"):
        latents(x, np.zeros(19))
    with pytest.raises(ValueError, match="rate of latent 2 is 1.5"):
        latents(x, np.array([0, 1, 1.5, *[0.1] * 17]))
    x[7, 1] = np.nan
    with pytest.raises(ValueError, match="latent 7 .*not finite"):
        latents(x)


# --- the file of coordinates


def space_of(*saes: LatentVectors, **options: Any) -> LatentSpace:
    return LatentSpace(DECODER, 0, embed(*saes, **options), {"frequencies": "over 7 tokens"})


def test_coordinates_round_trip_exactly(tmp_path: Path):
    x, _ = clusters(n=40)
    x[4] = 0
    before = space_of(latents(x, name="a"), latents(-x, name="b", space="else"), max_latents=20)
    before.save(tmp_path / "map.json")
    after = LatentSpace.load(tmp_path / "map.json")
    assert (after.of, after.seed, after.source) == (before.of, before.seed, before.source)
    for m, n in zip(before.maps, after.maps, strict=True):
        for key, value in vars(m).items():
            assert np.array_equal(value, vars(n)[key]), key
            assert type(value) is type(vars(n)[key])
    sae = json.loads((tmp_path / "map.json").read_text())["saes"][0]
    columns = [sae[key] for key in ("latent", "x", "y", "firing_rate", "dead")]
    assert [len(column) for column in columns] == [20] * 5
    assert sae["dead"] == [rate == 0 for rate in sae["firing_rate"]]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', '"text"'])
def test_other_files_are_refused(tmp_path: Path, content: str):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(CorruptFileError, match="map.json"):
        LatentSpace.load(tmp_path / "map.json")


# --- the figure


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, instead of files."""
    figures: list[Any] = []
    monkeypatch.setattr(latent_space_figure, "save_figure", lambda f, path: figures.append(f))
    return figures


def made_up(name: str, space: str, n: int = 30, d_sae: int = 50, n_dead: int = 12) -> LatentMap:
    rng = np.random.default_rng(len(name))
    rates = np.resize(np.array(RATES), n)
    return LatentMap(
        name, space, d_sae, n_dead, 30.0, np.arange(n), 10 * rng.standard_normal((n, 2)),
        rates, np.arange(n, n + 2),
    )  # fmt: skip


def test_live_latents_are_coloured_by_frequency_and_dead_ones_hollow_crosses(drawn):
    latent_map = made_up("sae", "hook")
    plot_latent_space(LatentSpace(DECODER, 0, [latent_map]), "unused.png")
    axes, bar = drawn[0].axes
    dead, live = axes.collections
    assert np.array_equal(dead.get_offsets(), latent_map.xy[latent_map.dead])
    assert np.array_equal(live.get_offsets(), latent_map.xy[~latent_map.dead])
    assert np.array_equal(live.get_array(), latent_map.firing_rates[~latent_map.dead])
    assert len(dead.get_facecolors()) == 0
    assert len(set(dead.get_edgecolors()[0][:3])) == 1
    assert len(dead.get_paths()[0].vertices) != len(live.get_paths()[0].vertices)
    # decades around 1e-4 to 0.3, on a logarithmic scale
    assert (live.norm.vmin, live.norm.vmax) == (1e-4, 1)
    assert live.norm(1e-2) == pytest.approx(0.5)
    assert "frequency" in bar.get_ylabel()
    # whole SAE in the legend, what is shown below
    legend = [entry.get_text() for entry in axes.get_legend().get_texts()]
    assert legend == ["live: 38", "dead: 12"]
    assert "shown: 30 of 50 latents\n8 of them dead" in axes.get_xlabel()
    assert "without a direction: 2" in axes.get_xlabel()


def test_colours_grow_lighter_with_frequency():
    colours = latent_space_figure._colours()(np.linspace(0, 1, 50))[:, :3]
    lightness = colours @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > 0).all()
    assert lightness[-1] < 0.85


def test_panels_of_one_space_have_the_same_axes_and_other_spaces_their_own(drawn):
    maps = [
        made_up("a", "one"),
        made_up("bb", "one"),
        made_up("ccc", "two"),
        made_up("dddd", "one"),
    ]
    plot_latent_space(LatentSpace(DECODER, 0, maps), "unused.png")
    panels = {axes.get_title(): axes for axes in drawn[0].axes if axes.get_title()}
    limits = {name: (axes.get_xlim(), axes.get_ylim()) for name, axes in panels.items()}
    assert limits["a"] == limits["bb"] == limits["dddd"] != limits["ccc"]
    for latent_map in maps:
        (x, y) = limits[latent_map.name]
        assert x[0] < latent_map.xy[:, 0].min() <= latent_map.xy[:, 0].max() < x[1]
        assert y[0] < latent_map.xy[:, 1].min() <= latent_map.xy[:, 1].max() < y[1]
    norms = {axes.collections[1].norm.vmin for axes in panels.values()}
    assert len(norms) == 1
    said = drawn[0]._supxlabel.get_text().replace("\n", " ")
    assert "one (a, bb, dddd); two (ccc)" in said


def test_nothing_outside_the_figure_and_no_text_over_another(drawn):
    """Three panels, the narrowest there are, with long names."""
    names = [f"runs/{i}-with-a-name-as-long-as-they-get-in-a-sweep-of-many/final" for i in range(3)]
    maps = [made_up(name, "hook", d_sae=65536) for name in names]
    plot_latent_space(LatentSpace(DECODER, 0, maps), "unused.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.get_title()]
    # without the folder that all are in
    assert [axes.get_title().replace("\n", "")[:2] for axes in panels] == ["0-", "1-", "2-"]
    for text_of in (lambda a: a.title, lambda a: a.xaxis.label, lambda a: a.get_legend()):
        boxes = [text_of(axes).get_window_extent() for axes in panels]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
        assert all(figure.bbox.x0 <= b.x0 and b.y1 <= figure.bbox.y1 for b in boxes)
    assert figure._supxlabel.get_window_extent().y1 < min(
        axes.xaxis.label.get_window_extent().y0 for axes in panels
    )


def test_saes_without_live_or_without_dead_latents_are_drawn(tmp_path: Path):
    for name, rate in (("none.png", 0.0), ("all.png", 1.0)):
        latent_map = made_up(name, "hook")
        latent_map.firing_rates[:] = rate
        plot_latent_space(LatentSpace(DECODER, 0, [latent_map]), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no SAEs"):
        plot_latent_space(LatentSpace(DECODER, 0, []), tmp_path / "a.png")


# --- on a model


def test_firing_and_activations_are_those_of_a_plain_computation():
    model = tiny_model()
    hooks = {"a": "blocks.0.hook_resid_post", "b": "blocks.1.hook_resid_post"}
    saes = {
        name: sae_of(32, 64, hook, i, config={"architecture": "topk", "k": 3}, context_size=32)
        for i, (name, hook) in enumerate(hooks.items())
    }
    with torch.no_grad():
        saes["b"].W_enc[:, :5] = 0
    late = sae_of(
        32, 64, hooks["a"], config=TOPK, context_size=32, seqpos_slice=[8, None],
    )  # fmt: skip
    firing = measure_firing(
        {**saes, "late": late}, model, tiny_dataset(),
        LatentOptions(of="activations", n_tokens=320, batch_size_prompts=3),
    )  # fmt: skip
    tokens = torch.tensor(tiny_dataset()[:10]["input_ids"])[:, :32]
    for name, sae in {**saes, "late": late}.items():
        x = activations(model, tokens, sae.cfg.metadata.hook_name or "")
        rows = (x[:, 8:] if name == "late" else x).flatten(0, 1)
        expected = sae.encode(rows).detach()
        assert firing[name].n_tokens == len(rows)
        assert torch.equal(
            torch.tensor(firing[name].firing_rates), (expected != 0).double().mean(0)
        )
        found = firing[name].activations
        assert found is not None
        assert np.allclose(found.toarray().T, expected.numpy(), atol=1e-5)
    assert (firing["b"].firing_rates[:5] == 0).all()
    # by the same tokens, not by hook
    assert firing["a"].tokens == firing["b"].tokens != firing["late"].tokens

    options = LatentOptions(of="activations", perplexity=5)
    found = latent_space(saes, firing, options)
    assert len({m.space for m in found.maps}) == 1
    for m in found.maps:
        assert not m.dead.any()
        assert np.array_equal(m.without_direction, np.flatnonzero(firing[m.name].firing_rates == 0))
        assert len(m.without_direction) == m.n_dead
    apart = latent_space(
        {"a": saes["a"], "late": late}, firing, LatentOptions(of="activations", perplexity=5)
    )
    assert len({m.space for m in apart.maps}) == 2


def test_latents_that_fire_together_lie_together_in_the_view_of_activations():
    rng = np.random.default_rng(0)
    of = np.arange(60) % 3
    on = rng.random((3, 400)) < 0.05
    fired = on[of] * (rng.random((60, 400)) < 0.7) * rng.random((60, 400))
    (found,) = embed(latents(csr_array(fired), (fired != 0).mean(1)))
    assert separated(found.xy, of)


def test_decoders_share_a_space_if_hook_head_and_model_are_the_same():
    hook = "blocks.0.attn.hook_z"
    saes = {
        "a": sae_of(8, 16, hook, model_name="m"),
        "same": sae_of(8, 16, hook, model_name="m"),
        "head": sae_of(8, 16, hook, model_name="m", hook_head_index=1),
        "model": sae_of(8, 16, hook, model_name="n"),
        "width": sae_of(9, 16, hook, model_name="m"),
    }
    rates = torch.full((16,), 0.1).double()
    rates[3] = 0
    for sae in saes.values():
        sae.W_dec.data[2] = 0
    found = latent_space(saes, {name: FiringRates(rates.numpy()) for name in saes})
    spaces = [m.space for m in found.maps]
    assert spaces[0] == spaces[1]
    assert len(set(spaces)) == 4
    for m in found.maps:
        assert m.without_direction.tolist() == [2]
        assert m.latents[m.dead].tolist() == [3]
    with pytest.raises(ValueError, match="a: no activations"):
        firing = {name: FiringRates(rates.numpy()) for name in saes}
        latent_space(saes, firing, LatentOptions(of="activations"))


# --- the command


def test_the_command_draws_and_writes_coordinates(tmp_path, text, capsys):
    saes = {
        "first": sae_of(
            model_name=str(BYTE_TRANSFORMER), model_class_name="AutoModelForCausalLM",
            dataset_path="local",
        ),
        "second": sae_of(config=TOPK),
    }  # fmt: skip
    with torch.no_grad():
        saes["second"].W_enc[:, 7] = 0
    for name, sae in saes.items():
        sae.save_model(tmp_path / name)
    text.to_parquet(tmp_path / "tokens" / "part.parquet")
    paths = [str(tmp_path / name) for name in saes]
    out = tmp_path / "figures" / "latents.png"
    command = ["latents", *paths, "--out", str(out), "--n-tokens", "640", "--max-latents", "60"]
    assert main(command) == 2
    assert "--dataset-path" in capsys.readouterr().err
    command += ["--dataset-path", str(tmp_path / "tokens")]
    for of in ("decoder", "activations"):
        assert main([*command, "--of", of]) == 0
        printed = capsys.readouterr().out
        assert out.read_bytes().startswith(b"\x89PNG")
        found = LatentSpace.load(out.with_suffix(".json"))
        assert [m.name for m in found.maps] == paths
        second = found.maps[1]
        assert len(second.latents) == 60
        assert second.n_dead >= 1
        assert (7 in second.without_direction) == (of == "activations")
        cells = next(line for line in printed.splitlines() if line.startswith(paths[1])).split()
        assert cells[1:] == [
            "256", str(256 - second.n_dead), str(second.n_dead), "60",
            str(len(second.without_direction)),
        ]  # fmt: skip
        tokens = torch.tensor(text[:10]["input_ids"])
        assert found.source["n_tokens"][paths[0]] == int((tokens != 256).sum())
    assert main([*command[:-2], "--out", str(tmp_path / "a.json")]) == 2
    assert "a figure is one of .png, .pdf, .svg" in capsys.readouterr().err
    assert main(["latents", str(tmp_path), "--out", str(out)]) == 2
    assert "no cfg.json" in capsys.readouterr().err


def test_no_file_of_others_is_overwritten(tmp_path, capsys):
    sae_of(16, 40).save_model(tmp_path / "sae")
    before = (tmp_path / "sae" / "cfg.json").read_bytes()
    out = tmp_path / "sae" / "cfg.png"
    assert main(["latents", str(tmp_path / "sae"), "--out", str(out)]) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert (tmp_path / "sae" / "cfg.json").read_bytes() == before


def test_numbers_that_mean_nothing_are_refused_at_once(tmp_path, capsys):
    least = {
        "--n-tokens": 1, "--context-size": 2, "--max-latents": 1, "--batch-size-prompts": 1,
        "--seed": 0,
    }  # fmt: skip
    for flag, at_least in least.items():
        command = ["latents", "sae", "--out", str(tmp_path / "a.png"), f"{flag}={at_least - 1}"]
        assert main(command) == 2
        assert re.search(f"{flag}.* at least {at_least}", capsys.readouterr().err)
