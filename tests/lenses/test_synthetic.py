"""The synthetic experiment: its activations, its bookkeeping, and three arms with a sign."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sae_whiten.cli import main
from sae_whiten.lenses.synthetic import data as synthetic_data
from sae_whiten.lenses.synthetic import experiment as synthetic
from sae_whiten.lenses.synthetic.data import SyntheticActivations
from sae_whiten.lenses.synthetic.experiment import (
    at_l0,
    grid,
    markdown_table,
    next_coefficient,
    read_rows,
    run_all,
    run_one,
    summarise_runs,
)
from sae_whiten.lenses.synthetic.options import (
    CHANCE,
    SyntheticDataConfig,
    SyntheticRun,
    benchmark_run,
    parse_condition,
)

SMALL = SyntheticDataConfig(d_signal=16, n_features=48, l0=3.0)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(synthetic_data, "_N_CHUNKS_TRAINING", 2)
    monkeypatch.setattr(synthetic_data, "_N_CHUNKS_STATISTICS", 2)
    synthetic._data.cache_clear()  # of other tests, with all chunks
    yield
    synthetic._data.cache_clear()  # other tests need all chunks


def spectrum(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigvalsh(torch.cov(x.double().T))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("n_features", [15, 12])
def test_features_that_do_not_span_their_dimensions_are_refused(n_features):
    # otherwise the rounding errors of float32 would be amplified to unit variance
    config = SyntheticDataConfig(d_signal=16, n_features=n_features, l0=1.0)
    with pytest.raises(ValueError, match=f"leave {16 - n_features} of their 16 dimensions"):
        SyntheticActivations(config)


@pytest.mark.usefixtures("small_chunks")
def test_activations_are_what_the_config_says():
    data = SyntheticActivations(SMALL)
    x, fires = data.held_out(30_000)
    eigenvalues = spectrum(x)
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(1e4, rel=0.1)
    assert float(eigenvalues.sum()) == pytest.approx(16, rel=0.1)
    assert float(x.mean(0).norm() / eigenvalues.sum().sqrt()) == pytest.approx(2, rel=0.05)
    assert float((fires > 0).sum(1).float().mean()) == pytest.approx(3, rel=0.05)
    # the features and a constant explain everything
    rest = x.double() - fires.double() @ data.features.double()
    assert float(rest.std(0).max()) < 1e-4
    W = data.whitening_matrix
    assert torch.allclose(spectrum(x.double() @ W), torch.ones(16).double(), atol=0.1)


@pytest.mark.usefixtures("small_chunks")
def test_junk_and_nuisance_are_beside_and_among_the_features():
    config = replace(SMALL, n_junk=3, junk_variance=1e-6, condition=10.0)
    data = SyntheticActivations(config)
    x, fires = data.held_out(20_000)
    assert data.d_in == x.shape[1] == 19
    junk = spectrum(x)[:3]
    assert torch.allclose(junk, torch.full((3,), 1e-6).double(), rtol=0.1)
    assert torch.linalg.matrix_rank(data.features.double(), rtol=1e-5) == 16

    data = SyntheticActivations(replace(SMALL, n_nuisance=2, nuisance_share=0.75))
    x, fires = data.held_out(20_000)
    rest = spectrum(x.double() - fires.double() @ data.features.double()).flip(0)
    assert float(rest.sum() / spectrum(x).sum()) == pytest.approx(0.75, abs=0.05)
    assert float(rest[2] / rest[1]) < 1e-4


@pytest.mark.usefixtures("small_chunks")
def test_batches_are_the_same_each_time_and_come_again_in_another_order():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, two = (SyntheticActivations(SMALL).batches(4096) for _ in range(2))
    first = [next(one) for _ in range(8)]  # all there are
    torch.randn(10)
    assert all(torch.equal(a, next(two)) for a in first)
    again = torch.cat([next(one) for _ in range(8)])
    assert not torch.equal(again, torch.cat(first))
    assert torch.equal(again[:, 0].sort().values, torch.cat(first)[:, 0].sort().values)
    other = next(SyntheticActivations(replace(SMALL, seed=1)).batches(4096))
    assert not torch.equal(other, first[0])
    torch.set_rng_state(state)


def test_conditions_are_names_with_settings():
    condition = parse_condition("whitened:shrinkage=oas,eps=0.01")
    assert condition.whitening is not None
    assert condition.whitening.loss_space == "whitened"
    assert (condition.whitening.shrinkage, condition.whitening.eps) == ("oas", 0.01)
    assert parse_condition("none").whitening is None
    for wrong, match in (
        ("black", "no condition 'black'"),
        ("none:eps=1", "does not whiten"),
        ("whitened:epsilon=1", "no field epsilon"),
        ("whitened:eps", "setting=value"),
        ("whitened:eps=-1", "eps"),
    ):
        with pytest.raises(ValueError, match=match):
            parse_condition(wrong)


@settings(deadline=None)
@example(scale=680.0, slope=1.5, start=0.09765625)  # hits it, with the other side far away
@given(scale=st.floats(0.1, 1000), slope=st.floats(0.3, 2), start=st.floats(0.01, 100))
def test_a_few_coefficients_come_to_the_l0_wanted(scale, slope, start):
    tried: dict[float, float] = {}
    while (coefficient := next_coefficient(tried, 6.0, start)) is not None:
        assert coefficient not in tried
        tried[coefficient] = scale * coefficient**-slope
    assert len(tried) <= 8
    rows = [{"l0": l0, "score": 1 + l0} for l0 in tried.values()]
    scores, matched = at_l0(rows, 6.0)
    reached = min(tried.values()) <= 6 <= max(tried.values())
    assert matched == (reached or any(abs(l0 / 6 - 1) < 0.02 for l0 in tried.values()))
    if any(abs(l0 / 6 - 1) < 0.02 for l0 in tried.values()):
        assert scores in rows
    if matched:
        assert scores["l0"] == pytest.approx(6, rel=0.02)
    if matched and len(tried) < 8:
        # linear in log L0 between two L0 that are near: not far off
        assert scores["score"] == pytest.approx(7, rel=0.05)


def test_scores_between_two_runs_are_interpolated_in_log_l0():
    rows = [{"l0": 3.0, "f1": 0.2}, {"l0": 12.0, "f1": 0.6}, {"l0": 100.0, "f1": 0.0}]
    scores, matched = at_l0(rows, 6.0)
    assert matched
    assert scores == pytest.approx({"l0": 6.0, "f1": 0.4})
    scores, matched = at_l0(rows[1:], 6.0)
    assert (scores["f1"], matched) == (0.6, False)


def fake(run: SyntheticRun, device: str) -> dict[str, Any]:
    l0 = 6.0 if run.coefficient is None else 20 / run.coefficient
    value = 0.1 * run.data.seed
    names = ("f1", "mcc", "raw_mcc", "explained_variance", "dead")
    return {"run": run.to_dict(), "scores": {"l0": l0, **dict.fromkeys(names, value)}}


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[SyntheticRun]:
    """Trainings done, by a stand-in and in threads."""
    runs: list[SyntheticRun] = []

    def run_one(run: SyntheticRun, device: str) -> dict[str, Any]:
        runs.append(run)
        return fake(run, device)

    monkeypatch.setattr(synthetic, "run_one", run_one)
    monkeypatch.setattr(
        synthetic,
        "ProcessPoolExecutor",
        lambda jobs, context, initializer: ThreadPoolExecutor(jobs),
    )
    return runs


def test_trainings_that_were_done_are_not_done_again(tmp_path: Path, done: list[SyntheticRun]):
    results = tmp_path / "out" / "results.jsonl"
    runs = grid(["topk", "standard"], ["none", "whitened"], [0, 1], SyntheticRun())
    first = run_all(runs, results, jobs=2)
    n = len(done)
    # chance and two topk for each seed; several coefficients for each standard
    assert sum(run.architecture == "topk" for run in done) == 2 * 3
    assert len({run.coefficient for run in done if run.architecture == "standard"}) >= 2
    assert len(read_rows(results)) == n == len(first)

    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:-2]) + lines[-2][:40])  # killed while writing
    assert run_all(runs, results, jobs=1) == first
    assert len(done) == n + 2
    assert len(read_rows(results)) == n
    run_all(runs, results)
    assert len(done) == n + 2

    # another grid in the same file is not in this one's table
    rows = run_all(grid(["topk"], ["half"], [0], SyntheticRun()), results)
    assert {row["run"]["condition"] for row in rows} == {"half", CHANCE}


def test_a_training_that_fails_ends_the_comparison_and_keeps_the_others(
    tmp_path: Path, done: list[SyntheticRun], monkeypatch: pytest.MonkeyPatch
):
    def breaks(run: SyntheticRun, device: str) -> dict[str, Any]:
        if run.condition == "original":
            raise RuntimeError("no memory")
        return fake(run, device)

    monkeypatch.setattr(synthetic, "run_one", breaks)
    runs = grid(["topk"], ["none", "original"], [0], SyntheticRun())
    with pytest.raises(RuntimeError, match="no memory"):
        run_all(runs, tmp_path / "results.jsonl")
    assert len(read_rows(tmp_path / "results.jsonl")) == 2


def test_the_table_holds_mean_and_deviation_over_seeds(tmp_path: Path, done: list[SyntheticRun]):
    runs = grid(["topk", "jumprelu"], ["none"], [0, 1, 2], SyntheticRun())
    table = markdown_table(summarise_runs(run_all(runs, tmp_path / "results.jsonl")))
    topk, jumprelu = table.strip().split("\n\n")
    assert topk.splitlines()[2].startswith("| none | 0.100 ± 0.100 |")
    assert topk.splitlines()[-1].startswith("| chance |")
    assert "| 6.0 ± 0.0 |" in jumprelu.splitlines()[2]


def test_whitening_recovers_features_that_are_lost_without():
    run = SyntheticRun(data=SMALL, d_sae=48, k=3, steps=250, batch_size=256, lr=5e-3)
    scores = {
        condition: run_one(replace(run, condition=condition))["scores"]
        for condition in ("none", "centred", "whitened")
    }
    chance = run_one(replace(run, condition=CHANCE, steps=0))["scores"]
    for score in ("f1", "mcc"):
        found = {condition: row[score] for condition, row in scores.items()}
        assert found["whitened"] > max(found["none"], found["centred"], chance[score]) + 0.1
    # which raw cosines do not show
    assert chance["raw_mcc"] > 0.7
    assert all(row["l0"] == pytest.approx(3, abs=0.05) for row in scores.values())
    assert all(row["explained_variance"] > 0.5 for row in scores.values())


@pytest.mark.parametrize("architecture", ["batchtopk", "standard", "jumprelu"])
def test_every_architecture_trains_in_every_condition(architecture):
    coefficient = None if architecture == "batchtopk" else 1.0
    run = SyntheticRun(architecture, data=SMALL, d_sae=48, k=3, steps=30, coefficient=coefficient)
    for condition in ("none", "expected_average_only_in", "half"):
        row = run_one(replace(run, condition=condition))
        assert SyntheticRun.from_dict(json.loads(json.dumps(row["run"]))).condition == condition
        assert all(torch.isfinite(torch.tensor(v)) for v in row["scores"].values())


def test_equal_runs_give_equal_scores():
    run = SyntheticRun(data=SMALL, d_sae=48, k=3, steps=20, condition="whitened")
    torch.manual_seed(1)
    first = run_one(run)
    torch.manual_seed(2)
    synthetic._data.cache_clear()
    assert run_one(run) == first
    assert run_one(replace(run, data=replace(SMALL, seed=1))) != first


def test_the_command_writes_results_table_and_figure(
    tmp_path: Path, done: list[SyntheticRun], capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("matplotlib")
    command = ["synthetic", "--out", str(tmp_path), "--conditions", "none", "whitened:eps=0.1"]
    assert main([*command, "--architectures", "topk,standard", "--junk", "4"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.jsonl",
        "results.md",
        "results.png",
    }
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out
    assert all(run.data.n_junk == 4 for run in done)
    assert main([*command, "--conditions", "nothing"]) == 2
    assert main([*command, "--architectures", "gated"]) == 2
    assert main([*command, "--seeds", "0"]) == 2


# --- SynthSAEBench


def test_the_benchmark_is_the_published_configuration(monkeypatch):
    made = []

    class NotMade(synthetic_data.SyntheticModel):
        """Of 16 384 features: too large to be made here."""

        def __init__(self, config):
            made.append(config)

    monkeypatch.setattr(synthetic_data, "SyntheticModel", NotMade)
    synthetic_data._feature_model(benchmark_run().data)
    # as in SAELens' documentation of SynthSAEBench-16k
    (config,) = made
    found = config.to_dict()
    assert (found["num_features"], found["hidden_dim"], found["seed"]) == (16_384, 768, 42)
    assert found["bias"] == 0.5
    firing = found["firing_probability"]
    assert (firing["exponent"], firing["max_prob"], firing["min_prob"]) == (0.5, 0.4, 5e-4)
    tree = found["hierarchy"]
    assert (tree["total_root_nodes"], tree["branching_factor"], tree["max_depth"]) == (128, 4, 3)
    assert (tree["mutually_exclusive_portion"], tree["scale_children_by_parent"]) == (1.0, True)
    assert found["orthogonalization"]["num_steps"] == 100
    assert (found["correlation"]["rank"], found["correlation"]["correlation_scale"]) == (25, 0.1)
    run = benchmark_run()
    assert (run.d_sae, run.k, run.batch_size, run.lr) == (4096, 25, 1024, 3e-4)
    assert run.steps * run.batch_size == pytest.approx(200e6, rel=1e-5)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[SyntheticRun]:
    """What the command would train, instead of the training."""
    templates = []

    def no_runs(architectures, conditions, seeds, template):
        templates.append(template)
        raise ValueError("planned")

    monkeypatch.setattr(synthetic, "grid", no_runs)
    return templates


def test_the_command_has_the_benchmarks_defaults_unless_told_otherwise(planned, tmp_path):
    command = ["synthetic", "--out", str(tmp_path), "--benchmark", "synthsaebench"]
    # 5000 is the default without a benchmark
    for flags in ([], ["--steps", "5000"], ["--steps", "5001"]):
        main([*command, *flags])
    assert [run.steps for run in planned] == [benchmark_run().steps, 5000, 5001]
    main([*command, "--small", "--anisotropic", "--condition-number", "1e6", "--junk", "5"])
    main(["synthetic", "--out", str(tmp_path), "--nuisance", "2"])
    assert (planned[3].data.condition, planned[3].data.n_junk) == (1e6, 5)
    assert planned[4] == SyntheticRun(data=SyntheticDataConfig(n_nuisance=2))


@pytest.mark.parametrize("flag", ["condition-number", "junk", "junk-variance", "nuisance"])
def test_the_command_refuses_what_published_activations_do_not_have(
    flag, planned, tmp_path, capsys
):
    command = ["synthetic", "--out", str(tmp_path), "--benchmark", "synthsaebench", "--small"]
    assert main([*command, f"--{flag}", "5"]) == 2
    assert f"leave out --{flag}, or add --anisotropic" in capsys.readouterr().err
    assert not planned


@pytest.mark.parametrize("name", ["n_junk", "n_nuisance"])
def test_published_activations_have_neither_noise_nor_dense_activity(name):
    with pytest.raises(ValueError, match=f"{name}=5: a benchmark as published has none"):
        SyntheticDataConfig(benchmark="synthsaebench-small", as_published=True, **{name: 5})


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "flags", [[], ["--junk", "0"], ["--benchmark", "synthsaebench", "--anisotropic"]]
)
def test_the_command_refuses_the_variance_of_junk_that_is_not_there(
    flags, planned, tmp_path, capsys
):
    command = ["synthetic", "--out", str(tmp_path), "--junk-variance", "0.1", *flags]
    assert main(command) == 2
    assert "add --junk N" in capsys.readouterr().err
    assert not planned


def test_the_small_benchmark_has_its_features_in_tame_or_anisotropic_activations(monkeypatch):
    monkeypatch.setattr(synthetic_data, "_CHUNK", 2048)
    # ten seconds of it, which change nothing here
    monkeypatch.setattr(synthetic_data, "OrthogonalizationConfig", lambda **_: None)
    tame = SyntheticActivations(benchmark_run(small=True).data)
    x, fires = tame.held_out(2000)
    assert tame.features.shape == (1024, 128)
    bias = tame._model.feature_dict.bias
    torch.testing.assert_close(fires @ tame.features + bias, x, rtol=1e-4, atol=1e-4)
    batches = tame.batches(1024)
    assert not torch.equal(next(batches), next(batches))
    run = benchmark_run(small=True, anisotropic=True)
    hard = SyntheticActivations(run.data, model=tame._model)
    y, fires = hard.held_out(2000)
    rest = y - fires @ hard.features
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=0, atol=1e-3)

    def condition(values):
        eigenvalues = torch.linalg.eigvalsh(torch.cov(values.double().T))
        return float(eigenvalues[-1] / eigenvalues[0])

    assert condition(y) > 30 * condition(x)


@pytest.mark.usefixtures("small_chunks")
def test_activations_may_come_from_any_generator():
    model = synthetic_data._feature_model(SMALL)
    given = SyntheticActivations(replace(SMALL, n_features=96), model=model)
    assert torch.equal(given.features, SyntheticActivations(SMALL).features)
    run = SyntheticRun(data=SMALL, d_sae=32, k=3, steps=2, batch_size=64)
    assert run_one(run, data=SyntheticActivations(SMALL)) == run_one(run)
