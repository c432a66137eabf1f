import json
import logging
from typing import Any

import datasets
import pytest
import torch
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer

from sae_whiten import (
    ActivationStatistics,
    NonFiniteActivationsError,
    Whitening,
    WhiteningConfig,
)
from sae_whiten._checks import FieldError
from sae_whiten._files import load_tensors, save_tensors
from sae_whiten.cli import main
from sae_whiten.estimation.fit import fit_statistics
from sae_whiten.estimation.folders import statistics_file
from sae_whiten.estimation.options import FitConfig
from sae_whiten.estimation.sources import match_hooks
from sae_whiten.estimation.split_half import SplitHalfStatistics
from sae_whiten.estimation.stopping import Requirement, estimate_statistics
from tests.support import runner_config, tiny_dataset, tiny_model

HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"]


def seen_by_training(hook_name: str, n_batches: int, **options) -> torch.Tensor:
    """The activations that SAELens' store takes from the first sequences of the dataset."""
    config = runner_config(hook_name=hook_name, **options)
    store = ActivationsStore.from_config(tiny_model(), config, override_dataset=tiny_dataset())
    return torch.cat([store.get_filtered_llm_batch() for _ in range(n_batches)])


@pytest.mark.parametrize(
    "options", [{}, {"seqpos_slice": (3, 20)}, {"exclude_special_tokens": [1, 2, 3, 4, 5]}]
)
def test_statistics_are_of_exactly_what_training_sees_at_every_hook(options):
    found = fit_statistics(
        tiny_model(),
        tiny_dataset(),
        HOOKS,
        n_samples=600,
        context_size=32,
        batch_size_prompts=4,
        **options,
    )
    assert set(found) == set(HOOKS)
    for hook_name, statistics in found.items():
        x = seen_by_training(hook_name, 20, **options)[: statistics.n_samples].double()
        assert 600 <= statistics.n_samples < 600 + 4 * 32
        error = (statistics.covariance - torch.cov(x.T)).norm() / torch.cov(x.T).norm()
        assert error < 1e-6  # float32 products in batches of another size
        assert statistics.provenance["hook_name"] == hook_name


def test_a_limit_for_a_fixed_number_is_refused(tmp_path, capsys):
    arguments = ["fit", "--cached-activations", "a", "--hook-name", "**", "--out", str(tmp_path)]
    assert main([*arguments, "--n-samples", "10", "--max-samples", "20"]) == 2
    assert "--max-samples 20: limits the samples that tolerance needs" in capsys.readouterr().err


def test_globs_match_hooks_in_order_and_an_unknown_one_is_told_the_nearest():
    names = list(tiny_model().hook_dict)
    assert match_hooks(names, "blocks.*.hook_resid_pre") == HOOKS[:2]
    # one star stops at a dot, so that submodules are not taken too
    inside = [name for name in names if name.startswith("blocks.0.")]
    assert any(name.count(".") > 2 for name in inside)
    assert match_hooks(names, "blocks.0.*") == [name for name in inside if name.count(".") == 2]
    assert match_hooks(names, "blocks.0.**") == inside
    assert match_hooks(names, ["blocks.[!0].hook_resid_pr?", HOOKS[0]]) == HOOKS[:2]
    with pytest.raises(ValueError, match=r"\*\* does not.*blocks.0.attn.hook"):
        match_hooks(names, "*.hook_q")
    for wrong in ("block.1.hook_resid_pre", "blocks.*.hook_residpre", "1.hook_resid_pre"):
        with pytest.raises(ValueError, match=r"no hook matches .*; nearest: .*1.hook_resid_pre"):
            match_hooks(names, wrong)


def test_the_model_stops_after_the_last_hook():
    ran: list[str] = []
    model = tiny_model()
    for name in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"):
        model.hook_dict[name].add_perma_hook(lambda tensor, *, hook: ran.append(str(hook.name)))
    fit_statistics(model, tiny_dataset(), HOOKS[0], n_samples=10, context_size=32)
    assert "blocks.1.hook_resid_post" not in ran


def test_estimation_stops_by_itself_or_says_how_much_is_missing(caplog):
    found = fit_statistics(
        tiny_model(), tiny_dataset(3000), HOOKS[0], tolerance=0.05, context_size=32
    )
    (statistics,) = found.values()
    assert statistics.provenance["inflation"] <= 0.05
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    fit_statistics(tiny_model(), tiny_dataset(128), HOOKS[0], tolerance=0.001, context_size=32)
    assert "the dataset ended after 4096 activations" in caplog.text
    assert "are needed" in caplog.text


@pytest.mark.parametrize(
    "options",
    [{"exclude_special_tokens": list(range(100))}, {"seqpos_slice": (40, None)}],
    ids=["all tokens excluded", "no position"],
)
@pytest.mark.parametrize("n_sequences", [40, 3000])
def test_without_one_activation_there_are_no_statistics(n_sequences, options, tmp_path):
    model, passes = tiny_model(), []
    model.hook_dict[HOOKS[0]].add_perma_hook(lambda tensor, *, hook: passes.append(1))
    with pytest.raises(ValueError, match="a hook has no activations"):
        fit_statistics(
            model,
            tiny_dataset(n_sequences),
            HOOKS,
            n_samples=10**6,
            context_size=32,
            batch_size_prompts=4,
            out=tmp_path,
            **options,
        )
    assert len(passes) == min(n_sequences // 4, 100)  # of an endless dataset, no more are tried
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("tolerance", [0.0, -0.1, float("nan"), float("inf"), "0.02", True, 1.1])
def test_a_tolerance_that_cannot_be_reached_is_refused_before_a_token_is_read(tolerance):
    with pytest.raises(ValueError, match="tolerance="):
        WhiteningConfig(tolerance=tolerance)  # the same range
    with pytest.raises(ValueError, match="tolerance=.*: must be a finite number, at least 1e-06"):
        fit_statistics(tiny_model(), "nowhere", HOOKS, tolerance=tolerance)


def test_an_empty_dataset_and_a_hook_that_does_not_vary_are_named():
    empty = datasets.Dataset.from_dict({"input_ids": []})
    for dataset in (empty, tiny_dataset(4).to_iterable_dataset().take(0)):
        with pytest.raises(ValueError, match="the dataset is empty"):
            fit_statistics(tiny_model(), dataset, HOOKS, context_size=32)
    model = tiny_model()
    model.hook_dict[HOOKS[1]].add_perma_hook(lambda tensor, *, hook: torch.ones_like(tensor))
    with pytest.raises(ValueError, match=rf"^{HOOKS[1]}: all activations are the same"):
        fit_statistics(model, tiny_dataset(), HOOKS[:2], n_samples=3000, context_size=32)


def test_provenance_is_returned_as_files_have_it_and_what_they_cannot_hold_is_refused_at_once(
    tmp_path, monkeypatch
):
    given = {"layers": (1, 2)}
    fit_killed_at(6, tmp_path, monkeypatch, provenance=given)
    options = {**ADAPTIVE, "out": tmp_path}
    found = fit_statistics(tiny_model(), tiny_dataset(3000), HOOKS, provenance=given, **options)
    saved = ActivationStatistics.load(statistics_file(tmp_path, HOOKS[0]))
    assert found[HOOKS[0]].provenance == saved.provenance
    passes = []
    model = tiny_model()
    model.hook_dict[HOOKS[0]].add_perma_hook(lambda tensor, *, hook: passes.append(1))
    with pytest.raises(TypeError, match="dtype is not JSON serializable"):
        fit_statistics(
            model, tiny_dataset(), HOOKS, context_size=32, provenance={"dtype": torch.float16}
        )
    assert not passes


@pytest.mark.parametrize("seqpos_slice", [(None,), (1, None), (-30, None), (1, None, 2)], ids=str)
def test_a_nan_names_the_hook_and_the_position_in_the_sequence(seqpos_slice):
    model: HookedTransformer = tiny_model()

    def poison(tensor: torch.Tensor, *, hook: object) -> torch.Tensor:
        tensor[2, 3] = float("nan")
        return tensor

    model.hook_dict[HOOKS[1]].add_perma_hook(poison)
    with pytest.raises(
        NonFiniteActivationsError, match=r"hook blocks\.1\.\S+, batch 0, sequence 2, position 3"
    ):
        fit_statistics(
            model,
            tiny_dataset(),
            HOOKS[1],
            n_samples=100,
            context_size=32,
            seqpos_slice=seqpos_slice,
        )


def test_fit_merge_and_inspect_from_the_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sae_lens.load_model.load_model", lambda *args, **options: tiny_model())
    for name, seed in (("a", 0), ("b", 1)):
        tiny_dataset(100, seed).to_json(tmp_path / name / "data.jsonl")
        arguments = ["--model-name", "tiny", "--dataset-path", str(tmp_path / name)]
        arguments += ["--hook-name", "blocks.*.hook_resid_pre", "--context-size", "32"]
        assert (
            main(["fit", *arguments, "--n-samples", "2000", "--out", str(tmp_path / f"s{name}")])
            == 0
        )
    shards, whole = [str(tmp_path / "sa"), str(tmp_path / "sb")], tmp_path / "whole"
    assert main(["merge", *shards, "--out", str(whole)]) == 0
    merged = ActivationStatistics.load(statistics_file(whole, HOOKS[0]))
    parts = [ActivationStatistics.load(statistics_file(s, HOOKS[0])) for s in shards]
    assert merged.n_samples == sum(part.n_samples for part in parts)
    assert torch.equal(merged.covariance, parts[0].merge(parts[1]).covariance)
    assert merged.provenance["model_name"] == "tiny"
    assert "dataset_path" not in merged.provenance  # on which they differ
    capsys.readouterr()
    assert main(["inspect", str(whole), "--plot", str(tmp_path / "figures")]) == 0
    assert HOOKS[1] in capsys.readouterr().out
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == {
        "spectra",
        "cumulative_variance",
    }
    assert main(["inspect", str(whole), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[HOOKS[0]]["n"] == merged.n_samples
    assert rows[HOOKS[0]]["directions_for_90"] <= rows[HOOKS[0]]["directions_for_99"] <= 32


def test_merging_what_does_not_belong_together_writes_nothing(tmp_path, capsys):
    for name, d in (("a", 4), ("b", 5)):
        statistics = ActivationStatistics(d)
        statistics.update(torch.randn(10, d))
        statistics.save(tmp_path / name)
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["merge", *paths, "--out", str(tmp_path / "c")]) == 2
    assert "widths 4 and 5" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def fit_killed_at(n_passes: int, out, monkeypatch, dataset=None, **options) -> None:
    model = tiny_model()
    passes = 0

    def die(tensor: torch.Tensor, *, hook: object) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes == n_passes:
            raise Killed
        return tensor

    model.hook_dict[HOOKS[0]].add_perma_hook(die)
    monkeypatch.setattr("sae_whiten.estimation.progress._SAVE_EVERY_SECONDS", 0.0)
    with pytest.raises(Killed):
        fit_statistics(model, dataset or tiny_dataset(3000), HOOKS, out=out, **ADAPTIVE, **options)


ADAPTIVE = {"tolerance": 0.03, "context_size": 32, "batch_size_prompts": 4}


def test_a_killed_fit_goes_on_and_ends_with_the_same_statistics(tmp_path, monkeypatch):
    whole = fit_statistics(tiny_model(), tiny_dataset(3000), HOOKS, **ADAPTIVE)
    for n_passes in (1, 6, 9):
        fit_killed_at(n_passes, tmp_path, monkeypatch)
    monkeypatch.undo()
    model = tiny_model()
    passes = []
    model.hook_dict[HOOKS[0]].add_perma_hook(lambda tensor, *, hook: passes.append(1))
    found = fit_statistics(model, tiny_dataset(3000), HOOKS, out=tmp_path, **ADAPTIVE)
    assert 0 < len(passes) <= whole[HOOKS[0]].n_batches - 2  # both that got on had saved some
    for name in HOOKS:
        saved = ActivationStatistics.load(statistics_file(tmp_path, name))
        assert torch.equal(found[name].covariance, whole[name].covariance)
        assert torch.equal(saved.mean, whole[name].mean)
        assert saved.provenance["inflation"] == whole[name].provenance["inflation"]
    assert not (tmp_path / ".fit_progress").exists()


def test_the_progress_of_another_fit_is_refused_and_left_alone(tmp_path, monkeypatch):
    fit_killed_at(4, tmp_path, monkeypatch)
    (file,) = (tmp_path / ".fit_progress").iterdir()
    content = file.read_bytes()
    other = {**ADAPTIVE, "context_size": 16}
    with pytest.raises(ValueError, match=r"context_size=32 \(now 16\)"):
        fit_statistics(tiny_model(), tiny_dataset(3000), HOOKS, out=tmp_path, **other)
    with pytest.raises(ValueError, match="dataset="):
        fit_statistics(tiny_model(), tiny_dataset(3000, 1), HOOKS, out=tmp_path, **ADAPTIVE)
    with pytest.raises(ValueError, match=r"weights=.*\(now"):
        fit_statistics(tiny_model(1), tiny_dataset(3000), HOOKS, out=tmp_path, **ADAPTIVE)
    assert file.read_bytes() == content
    file.rename(file.with_name(file.name.replace("of-1", "of-4")))
    with pytest.raises(ValueError, match="4 processes.* 1"):
        fit_statistics(tiny_model(), tiny_dataset(3000), HOOKS, out=tmp_path, **ADAPTIVE)


def test_the_progress_of_another_stream_or_of_a_folder_that_changed_is_refused(
    tmp_path, monkeypatch
):
    def dataset(seed: int, n: int = 3000):
        if kind == "stream":
            return tiny_dataset(n, seed).to_iterable_dataset()
        tiny_dataset(n, seed).to_json(tmp_path / "data" / "data.jsonl")
        return str(tmp_path / "data")

    for kind in ("stream", "folder"):
        out = tmp_path / kind
        fit_killed_at(6, out, monkeypatch, dataset(0))
        with pytest.raises(ValueError, match=r"beginning=.*\(now"):
            fit_statistics(tiny_model(), dataset(1), HOOKS, out=out, **ADAPTIVE)
        with pytest.raises(ValueError, match="shorter"):
            fit_statistics(tiny_model(), dataset(0, n=2), HOOKS, out=out, **ADAPTIVE)


def test_finished_statistics_of_other_settings_are_replaced_with_a_warning(tmp_path, caplog):
    options: dict[str, Any] = {"out": tmp_path, "n_samples": 900, "provenance": {"note": "x"}}
    first = fit_statistics(tiny_model(), tiny_dataset(60), HOOKS, context_size=32, **options)
    fit_statistics(tiny_model(), tiny_dataset(60), HOOKS[0], context_size=32, **options)
    assert "will be replaced" not in caplog.text  # the same again
    (tmp_path / f"{HOOKS[1]}.safetensors").write_bytes(b"damaged")
    fit_statistics(tiny_model(), tiny_dataset(60), HOOKS, context_size=16, **options)
    (warning,) = [r.getMessage() for r in caplog.records if "will be replaced" in r.getMessage()]
    n = first[HOOKS[0]].n_samples
    assert f"statistics of {n} activations with context_size=32 (now 16), which" in warning
    assert warning.endswith(f": {HOOKS[0]}, {HOOKS[2]}")
    assert ActivationStatistics.load(statistics_file(tmp_path, HOOKS[1])).n_samples > 0


def test_cached_activations_are_a_source_too(tmp_path):
    model, dataset = tiny_model(), tiny_dataset(40)
    tokens = torch.tensor(dataset["input_ids"])[:, :32]
    _, cache = model.run_with_cache(tokens)
    acts = cache[HOOKS[0]]
    features = datasets.Features(
        {
            HOOKS[0]: datasets.Array2D((32, 32), "float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), 32),
        }
    )
    content = {HOOKS[0]: acts.numpy(), "token_ids": tokens.numpy()}
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "cache")
    found = fit_statistics(
        None,
        None,
        "blocks.**",
        cached_activations=tmp_path / "cache",
        n_samples=10**9,
        exclude_special_tokens=[1, 2, 3],
    )
    (statistics,) = found.values()
    x = acts[~torch.isin(tokens, torch.tensor([1, 2, 3]))].double()
    assert statistics.n_samples == len(x)
    torch.testing.assert_close(statistics.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="no hook matches"):
        fit_statistics(None, None, "ln", cached_activations=tmp_path / "cache")
    refused: list[dict[str, Any]] = [{"hook_head_index": 0}, {"seqpos_slice": (1, None)}]
    for option in refused:
        with pytest.raises(ValueError, match="cached_activations"):
            fit_statistics(None, None, "**", cached_activations=tmp_path / "cache", **option)
    with pytest.raises(ValueError, match="not both"):
        fit_statistics(model, dataset, HOOKS[0], cached_activations=tmp_path / "cache")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("array", [True, False])
def test_rounding_of_a_cache_is_not_taken_for_variance(dtype, array, tmp_path):
    # the first coordinate has a mean, and only rounding errors around it
    x = torch.randn(40, 16, 4, dtype=torch.float64)
    x[..., 0] = 10 * (1 + 1e-5 * x[..., 0])
    nested = datasets.Sequence(datasets.Sequence(datasets.Value(dtype)))
    feature = datasets.Array2D((16, 4), dtype) if array else nested
    content, features = {"h": x.numpy()}, datasets.Features({"h": feature})
    if not array:
        content = {"h": x.tolist()}
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path)
    found = fit_statistics(None, None, "h", cached_activations=tmp_path, n_samples=640)["h"]
    # datasets reads all of them as float32
    expected = "float32" if dtype == "float64" else dtype
    assert found.resolution == torch.finfo(getattr(torch, expected)).eps
    gain = Whitening.from_statistics(found, WhiteningConfig(eps=0.0)).W[:, 0].norm()
    assert (gain < 10) == (dtype == "float16")


def test_options_that_mean_nothing_for_cached_activations_are_refused_in_the_shell(
    tmp_path, capsys
):
    arguments = [
        "fit",
        "--cached-activations",
        "cache",
        "--hook-name",
        "**",
        "--out",
        str(tmp_path),
    ]
    idle = ["--context-size", "128", "--no-prepend-bos", "--seqpos-slice", "1", "none"]
    assert main([*arguments, *idle, "--no-streaming", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    for flag in ("--device", "--context-size", "--prepend-bos", "--seqpos-slice", "--streaming"):
        assert flag in error
    assert main([*arguments, "--batch-size-prompts", "8"]) == 2
    assert "cache" in capsys.readouterr().err  # there is no such directory


def test_the_users_dataset_and_model_are_left_as_they_were():
    model, dataset = tiny_model().eval(), tiny_dataset(40)
    fit_statistics(model, dataset, HOOKS, n_samples=100, context_size=32)
    assert dataset.format["type"] is None
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert not model.training


def test_options_are_given_one_by_one_or_as_a_config():
    config = FitConfig(n_samples=300, context_size=32, seqpos_slice=(1, None))
    given = fit_statistics(tiny_model(), tiny_dataset(40), HOOKS[0], config)
    named = fit_statistics(
        tiny_model(),
        tiny_dataset(40),
        HOOKS[0],
        FitConfig(context_size=16),
        n_samples=300,
        context_size=32,
        seqpos_slice=[1, None],
    )
    assert given[HOOKS[0]].digest == named[HOOKS[0]].digest
    assert given[HOOKS[0]].provenance["seqpos_slice"] == [1, None]
    with pytest.raises(TypeError, match="n_sample"):
        fit_statistics(tiny_model(), tiny_dataset(40), HOOKS[0], n_sample=300)


@pytest.mark.parametrize(
    "options",
    [
        {"context_size": 0},
        {"batch_size_prompts": -1},
        {"n_samples": 0},
        {"max_samples": 1.5},
        {"on_nonfinite": "ignore"},
        {"seqpos_slice": (1, 2, 3, 4)},
        {"n_samples": 10, "max_samples": 20},
    ],
    ids=str,
)
def test_options_that_cannot_work_are_named(options):
    with pytest.raises(FieldError, match=list(options)[-1]):
        fit_statistics(None, None, "**", **options)


def test_training_and_fit_stop_by_the_same_rule():
    model, dataset = tiny_model(), tiny_dataset(3000)
    options = {**ADAPTIVE, "tolerance": 0.1}
    fitted = fit_statistics(model, dataset, HOOKS[1], **options)[HOOKS[1]]
    tokens = torch.tensor(dataset["input_ids"][:])[:, :32]

    def batches():
        for rows in tokens.split(4):
            _, cache = model.run_with_cache(rows, names_filter=HOOKS[1], stop_at_layer=2)
            yield {"": cache[HOOKS[1]]}

    required = {"": Requirement(32, None, 0.1, "raise")}
    assert estimate_statistics(batches(), required)[""].n_samples == fitted.n_samples


def test_a_hook_that_has_enough_is_not_looked_at_again_until_the_end(monkeypatch):
    looks: list[str] = []
    inflation = SplitHalfStatistics.inflation

    def look(halves):
        looks.append(str(halves.n_samples))
        return 0.5 if len(looks) == 2 else inflation(halves)

    monkeypatch.setattr(SplitHalfStatistics, "inflation", look)
    found = fit_statistics(
        tiny_model(),
        tiny_dataset(3000),
        HOOKS[:2],
        tolerance=0.2,
        context_size=32,
        batch_size_prompts=4,
    )
    # both at first, then the second alone, and the first for the record
    assert [looks[0], looks[2]] == [looks[1], looks[3]]
    assert len(looks) == 4
    assert {s.n_samples for s in found.values()} == {int(looks[-1])}


def test_progress_of_the_version_before_is_continued(tmp_path, monkeypatch):
    fit_killed_at(6, tmp_path, monkeypatch)
    (file,) = (tmp_path / ".fit_progress").iterdir()
    tensors, fields = load_tensors(file, "fit_progress")
    rules = fields.pop("rules")
    fields["next_look"] = max(rule["next_look"] for rule in rules.values())
    save_tensors(file, "fit_progress", tensors, fields)
    monkeypatch.undo()
    found = fit_statistics(tiny_model(), tiny_dataset(3000), HOOKS, out=tmp_path, **ADAPTIVE)
    whole = fit_statistics(tiny_model(), tiny_dataset(3000), HOOKS, **ADAPTIVE)
    assert all(found[name].digest == whole[name].digest for name in HOOKS)
