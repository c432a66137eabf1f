import dataclasses
import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_whiten import ActivationStatistics, CorruptFileError, Whitening, WhiteningConfig
from sae_whiten.architectures.losses import ReconstructionMetric
from sae_whiten.comparison.compare import compare
from sae_whiten.comparison.conditions import CONDITIONS
from sae_whiten.comparison.data import describe_rows
from sae_whiten.comparison.feature_page import choose_pair, write_feature_page
from sae_whiten.comparison.plan import Arm, Comparison, arms, sae_config
from sae_whiten.comparison.report.page import write_report
from sae_whiten.comparison.summary import summarise
from sae_whiten.comparison.sweeps import lacking_coefficient
from sae_whiten.estimation.folders import statistics_file
from sae_whiten.evaluation.metrics import explained_variance
from sae_whiten.evaluation.stability import mean_max_cosine, stability
from sae_whiten.training import runner_parts
from tests.support import BYTE_TRANSFORMER, tiny_dataset, tiny_model

SMALL = Comparison(
    hook_name="blocks.1.hook_resid_pre",
    conditions=("none", "original", "half"),
    architectures=("topk", "standard", "topk_vsae", "top_afa"),
    sparsity=(8,),
    coefficients=(0.5, 2.0),
    sweep_rounds=0,
    seeds=(0, 1),
    d_sae=64,
    training_tokens=128 * 20,
    train_batch_size_tokens=128,
    lr=1e-3,
    context_size=32,
    exclude_special_tokens=False,  # the tiny model has no tokenizer to name them
    store_batch_size_prompts=8,
    held_out_sequences=16,
    tolerance=0.1,
)


def run(out, comparison=SMALL, **options):
    return compare(comparison, tiny_model(), tiny_dataset(600), out, model_name="tiny", **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    return out, run(out)


def test_every_arm_of_every_seed_is_trained_and_evaluated(finished):
    out, records = finished
    assert len(records) == 2 * (3 + 3 * 2 + 3 + 1)
    assert len({(record["name"], record["seed"]) for record in records}) == len(records)
    for record in records:
        assert record["metrics"]["explained_variance"] <= 1
        if record["architecture"] == "topk":
            assert record["metrics"]["l0"] == pytest.approx(8, abs=0.5)
    lines = (out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == [r["name"] for r in records]
    assert not (out / "checkpoints" / "seed-0").exists()
    (afa,) = [r for r in records if r["architecture"] == "top_afa" and r["seed"] == 0]
    assert (afa["name"], afa["condition"]) == ("top_afa-none", "none")
    assert afa["sparsity"] is afa["coefficient"] is None
    stock = SAE.load_from_disk(out / "saes" / "seed-0" / "topk_vsae-half-k8")
    assert stock.cfg.architecture() == "topk"


def test_dictionaries_of_several_seeds_are_compared_in_whitened_coordinates(finished):
    out, records = finished
    name = "topk-original-k8"
    decoders = [SAE.load_from_disk(out / "saes" / f"seed-{s}" / name).W_dec for s in (0, 1)]
    statistics = ActivationStatistics.load(statistics_file(out / "statistics", SMALL.hook_name))
    whitening = Whitening.from_statistics(statistics, WhiteningConfig())
    expected = mean_max_cosine(decoders[0], decoders[1], whitening.W)
    for record in (r for r in records if r["name"] == name):
        assert record["compared_seeds"] == [0, 1]
        assert record["across_seeds"]["stability"] == pytest.approx(expected)
    assert all("stability_null" in record["across_seeds"] for record in records)
    (shown, *_) = (g for g in summarise(records).groups if g.architecture == "topk")
    assert shown.spread("original", "stability").mean == pytest.approx(expected)


def test_firing_of_several_seeds_is_compared_also_after_an_earlier_version(finished):
    out, records = finished
    agreements = {r["name"]: r["across_seeds"]["firing_agreement"] for r in records}
    assert all(0 < agreement < 1 for agreement in agreements.values())
    assert all(0 < r["across_seeds"]["firing_agreement_null"] < 1 for r in records)
    earlier = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for record in earlier:
        del record["across_seeds"]["firing_agreement"]
    (out / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in earlier))
    again = {r["name"]: r["across_seeds"]["firing_agreement"] for r in run(out)}
    assert again == agreements


def test_agreement_over_seeds_is_saved_after_each_name(finished, tmp_path, monkeypatch):
    folder, records = finished
    out = shutil.copytree(folder, tmp_path / "out")
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for record in lines:
        del record["compared_seeds"], record["across_seeds"]
    (out / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    compared = []

    def die_at_the_third(*arguments):
        compared.append(arguments)
        if len(compared) == 3:
            raise Killed
        return stability(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("sae_whiten.comparison.stability.stability", die_at_the_third)
        run(out)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len({r["name"] for r in lines if "across_seeds" in r}) == 2
    assert [r["across_seeds"] for r in run(out)] == [r["across_seeds"] for r in records]


def test_a_bridge_of_transformer_lens_serves_as_the_model(tmp_path, caplog):
    model = TransformerBridge.boot_transformers(
        "EleutherAI/pythia-14m",
        hf_model=AutoModelForCausalLM.from_pretrained(BYTE_TRANSFORMER),
        tokenizer=AutoTokenizer.from_pretrained(BYTE_TRANSFORMER),
        device="cpu",
    )
    comparison = dataclasses.replace(
        SMALL,
        hook_name="blocks.0.hook_resid_post",
        conditions=("none", "half"),
        architectures=("topk",),
        training_tokens=128 * 4,
        prepend_bos=False,
    )
    records = compare(comparison, model, tiny_dataset(600), tmp_path, model_name="tiny")
    assert "overrides" not in caplog.text  # dataset and model are those that the settings name
    assert len(records) == 2 * 2
    assert all("firing_agreement" in record["across_seeds"] for record in records)
    page = write_feature_page(comparison, records, model, tiny_dataset(600), tmp_path, "tokens")
    assert page is not None


def test_what_does_not_go_together_is_left_out_and_said(finished, caplog):
    out, _ = finished
    with caplog.at_level(logging.WARNING, "sae_whiten"):
        run(out)  # done: only says it again
    (said,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert said.startswith("top_afa is left out under original, half: TopAFATrainingSAE")
    left_out = json.loads((out / "settings.json").read_text())["left_out"]
    assert list(left_out) == ["top_afa"]
    assert "norm of its input" in left_out["top_afa"]["half"]
    # what an option makes impossible
    norms = dataclasses.replace(
        SMALL,
        conditions=("none", "original", "original_norms"),
        architectures=("topk", "standard", "topk_vsae", "matching_pursuit"),
        sae_options={"topk": {"rescale_acts_by_decoder_norm": False}},
    )
    assert {name: list(reasons) for name, reasons in norms.left_out.items()} == {
        "topk": ["original_norms"],
        "topk_vsae": ["original_norms"],
        "matching_pursuit": ["original", "original_norms"],
    }
    names = [arm.name for arm in arms(norms)]
    assert "matching_pursuit-none" in names
    assert "standard-original_norms-2" in names
    assert "topk-original_norms-k8" not in names


def test_options_go_into_the_configs_and_belong_to_the_comparison(finished):
    out, _ = finished
    given = {"topk_vsae": {"variance": "fixed", "initial_logvar": -5.0}, "top_afa": {}}
    comparison = dataclasses.replace(SMALL, sae_options=given)
    planned = {arm.name: arm for arm in arms(comparison)}
    cfg: Any = sae_config(comparison, planned["topk_vsae-half-k8"])
    assert (cfg.variance, cfg.initial_logvar, cfg.k) == ("fixed", -5, 8)
    assert cfg.kl_warm_up_steps == 2  # a tenth of 20
    with pytest.raises(ValueError, match=r"holds a comparison with sae_options=\{\} \(now"):
        run(out, comparison)
    settings = json.loads((out / "settings.json").read_text())
    assert settings["sae_options"] == {}
    # a folder of an earlier version
    del settings["sae_options"], settings["left_out"]
    (out / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"holds a comparison with sae_options=\{\} \(now"):
        run(out, comparison)
    run(out)
    assert json.loads((out / "settings.json").read_text())["sae_options"] == {}


def test_noise_and_prior_keep_their_proportion_to_the_latents():
    statistics = ActivationStatistics(16)
    statistics.update(100 * torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)))
    comparison = dataclasses.replace(SMALL, conditions=("none", "centred", "original", "half"))
    found: dict[str, Any] = {
        arm.condition: sae_config(comparison, arm, statistics)
        for arm in arms(comparison)
        if arm.architecture == "topk_vsae"
    }
    assert found["original"].initial_logvar == 0
    # activations 100 times as large, and 10 times for strength 0.5
    deviation = {name: math.exp(cfg.initial_logvar / 2) for name, cfg in found.items()}
    assert deviation["none"] == pytest.approx(100, rel=0.02)
    assert deviation["centred"] == pytest.approx(100, rel=0.02)
    assert deviation["half"] == pytest.approx(10, rel=0.02)
    # the loss of none is as large as the squares of its latents, that of the others is not
    beta = {name: cfg.kl_coefficient for name, cfg in found.items()}
    assert (beta["none"], beta["original"]) == (1, 1)
    assert beta["centred"] == pytest.approx(1e-4, rel=0.04)
    assert beta["half"] == pytest.approx(1e-2, rel=0.04)


def test_saes_differ_in_their_condition_only(finished):
    out, _ = finished
    saes = {
        name: SAE.load_from_disk(out / "saes" / "seed-0" / f"topk-{name}-k8")
        for name in SMALL.conditions
    }
    for sae in saes.values():
        assert sae.cfg.normalize_activations == "none"  # folded: right on raw activations
    described = {name: sae.cfg.metadata.get("whitening") for name, sae in saes.items()}
    assert described["none"] is None
    samples = {d["n_samples"] for d in described.values() if d is not None}
    assert len(samples) == 1  # one set of statistics


def test_conditions_share_initial_weights_and_data_and_seeds_do_not(tmp_path, monkeypatch):
    weights: dict[tuple[int, str], torch.Tensor] = {}
    batches: dict[int, list[torch.Tensor]] = {}
    step = SAETrainer.step
    seed = -1

    def spy(self, batch):
        if len(batches.setdefault(seed, [])) < len(SMALL.conditions):
            batches[seed].append(batch.clone())
            weights[seed, str(len(batches[seed]))] = self.sae.W_enc.detach().clone()
        return step(self, batch)

    monkeypatch.setattr(SAETrainer, "step", spy)
    comparison = dataclasses.replace(SMALL, architectures=("topk_vsae",), training_tokens=256)
    for seed in (0, 1):
        run(tmp_path / str(seed), dataclasses.replace(comparison, seeds=(seed,)))
    for seed in (0, 1):
        first, *others = batches[seed]
        assert len(others) == len(SMALL.conditions) - 1
        assert all(torch.equal(first, other) for other in others)
        found = [value for (s, _), value in weights.items() if s == seed]
        assert all(torch.equal(found[0], other) for other in found)
    assert not torch.equal(batches[0][0], batches[1][0])
    assert not torch.equal(weights[0, "1"], weights[1, "1"])


def test_a_sweep_is_trained_on_until_the_wanted_l0_lies_between_neighbours(tmp_path, monkeypatch):
    trained: list[tuple[int, list[str]]] = []

    def train(setting, untrained, seed):
        trained.append((seed, [arm.name for arm in untrained]))

    def evaluate(saes, *rest, **options):
        # L0 falls as 20 / coefficient, with the second seed a little more
        return [
            {"name": name, "metrics": {"l0": (20 + trained[-1][0]) / float(name.split("-")[-1])}}
            for name in saes
        ]

    for name, stand_in in (
        ("train_arms", train),
        ("evaluate_saes", evaluate),
        ("add_stability", lambda *_: None),
        ("_estimate_statistics", lambda *_: None),
        ("SAE.load_from_disk", lambda *_, **__: None),
    ):
        monkeypatch.setattr(f"sae_whiten.comparison.compare.{name}", stand_in)
    comparison = dataclasses.replace(
        SMALL, conditions=("centred",), architectures=("standard",), sparsity=(60, 16)
    )
    assert len(run(tmp_path, comparison)) == 2 * 2
    # nothing reaches 60 in the first round; 16 is ln(40 / 16) / ln(40 / 10) of the way from 0.5 to
    # 2, in logarithms
    trained.clear()
    run(tmp_path, dataclasses.replace(comparison, sweep_rounds=1))
    assert trained == [(s, ["standard-centred-0.125", "standard-centred-1.25"]) for s in (0, 1)]
    trained.clear()
    records = run(tmp_path, dataclasses.replace(comparison, sweep_rounds=5))
    assert trained
    for target in comparison.sparsity:
        for seed in (0, 1):
            l0s = [r["metrics"]["l0"] for r in records if r["seed"] == seed]
            above = min(l0 for l0 in l0s if l0 >= target)
            below = max(l0 for l0 in l0s if l0 <= target)
            assert above <= 2 * below
    # a seed that comes later has them all
    trained.clear()
    more = run(tmp_path, dataclasses.replace(comparison, seeds=(0, 1, 2)))
    assert len(more) == 3 * len(records) // 2


def test_every_condition_is_trained_at_the_learning_rate_that_is_best_for_it(tmp_path, caplog):
    comparison = dataclasses.replace(
        SMALL,
        conditions=("none", "half"),
        architectures=("topk",),
        seeds=(0,),
        training_tokens=128 * 8,
        learning_rates=(1e-9, 3e-3),  # the first leaves the initial weights as they are
    )
    records = run(tmp_path, comparison)
    assert [r["lr"] for r in records] == [3e-3, 3e-3]
    assert "is best at the largest learning rate that was tried, 0.003" in caplog.text
    found = json.loads((tmp_path / "learning_rates.json").read_text())["topk"]
    for name in ("none", "half"):
        assert found[name]["0.003"] > found[name]["1e-09"]
    none, half = (r["metrics"] for r in records)
    # what the loss of half is taken of; that of none is of the activations themselves
    assert "explained_variance_of_loss" not in none
    folder = tmp_path / "saes" / "seed-0" / "topk-half-k8"
    sae = SAE.load_from_disk(folder)
    whitening = Whitening.load(folder / "sae_whiten" / "whitening.safetensors")
    rows = torch.tensor(tiny_dataset(600)[:16]["input_ids"])[:, :32]
    x = tiny_model().run_with_cache(rows)[1][SMALL.hook_name].flatten(0, 1)
    expected = explained_variance(whitening.whiten(x), whitening.whiten(sae(x)))
    assert half["explained_variance_of_loss"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="cannot be trained at a learning rate of its own"):
        dataclasses.replace(comparison, conditions=("none", "expected_average_only_in", "half"))


def test_the_lacking_coefficient_of_a_sweep():
    # neighbours within a factor of 2 on both sides
    assert lacking_coefficient([1.0, 2.0], [[20.0, 21.0], [11.0, 12.0]], 15) is None
    # beyond the ends
    assert lacking_coefficient([1.0, 2.0], [[20.0], [10.0]], 50) == 0.25
    assert lacking_coefficient([2.0, 1.0], [[10.0], [20.0]], 5) == 8
    # one seed does not reach it
    assert lacking_coefficient([1.0, 2.0], [[20.0, 14.0], [10.0, 9.0]], 15) == 0.25
    # halfway in the logarithms, also where L0 is 0 on one side
    assert lacking_coefficient([1.0, 4.0], [[40.0], [10.0]], 20) == 2
    assert lacking_coefficient([1.0, 4.0], [[40.0], [0.0]], 20) == 2


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", [n for n in CONDITIONS if n != "expected_average_only_in"])
def test_coefficients_weigh_the_same_in_every_space_and_unit(name, scale):
    g = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -1, 16, dtype=torch.float64)  # eps is 2.5% of the smallest variance
    x = scale * (spread * torch.randn(5000, 16, generator=g, dtype=torch.float64) + 3)
    statistics = ActivationStatistics(16)
    statistics.update(x)
    config = CONDITIONS[name].whitening
    if config is None:
        z, loss = x, float((x - x.mean(0)).square().sum(-1).mean())
    else:
        whitening = Whitening.from_statistics(statistics, config)
        z = whitening.whiten(x)
        metric = ReconstructionMetric(whitening, torch.device("cpu"))
        # of predicting the mean
        loss = float(metric(torch.zeros_like(z), z).sum(-1).mean())
    rms = float((z - z.mean(0)).square().mean().sqrt())

    def coefficient(architecture, field):
        arm = Arm(architecture, name, sparsity=8, coefficient=1.0)
        return getattr(sae_config(SMALL, arm, statistics), field)

    l1, l0 = coefficient("standard", "l1_coefficient"), coefficient("jumprelu", "l0_coefficient")
    kl = coefficient("topk_vsae", "kl_coefficient")
    assert l1 * rms / (loss / 16) == pytest.approx(1, abs=0.025)
    assert l0 / (loss / 16) == pytest.approx(1, abs=0.025)
    assert kl * rms**2 / (loss / 16) == pytest.approx(1, abs=0.05)


def test_what_is_done_is_not_done_again_and_seeds_can_be_added(finished, tmp_path, monkeypatch):
    whole, records = finished
    out = tmp_path / "more"
    shutil.copytree(whole, out)
    with monkeypatch.context() as patch:
        patch.setattr("sae_whiten.comparison.compare.train_arms", None)
        assert run(out) == records
        (out / "results.jsonl").unlink()  # as if killed before the evaluation
        again = run(out)
    assert [r["metrics"] for r in again] == [r["metrics"] for r in records]
    more = run(out, dataclasses.replace(SMALL, seeds=(0, 1, 2)))
    assert len(more) == len(records) * 3 // 2
    assert [r["metrics"] for r in more[: len(records)]] == [r["metrics"] for r in again]
    # what seeds agree in is of all of them
    assert {tuple(r["compared_seeds"]) for r in more} == {(0, 1, 2)}


def test_architectures_are_compared_without_whitening_and_k_can_be_added(
    tmp_path, caplog, monkeypatch
):
    one = dataclasses.replace(
        SMALL,
        conditions=("none",),
        architectures=("topk", "top_afa"),
        sparsity=(2,),
        seeds=(0,),
        training_tokens=512,
    )
    both = dataclasses.replace(one, sparsity=(2, 16))
    with monkeypatch.context() as patch:
        patch.setattr("sae_whiten.comparison.compare.train_arms", None)
        with pytest.raises(TypeError):
            run(tmp_path / "a", dataclasses.replace(one, lr=5.0, context_size=16))
    # nothing was trained, so other settings may come, but not take the place of the statistics
    # where these are the same
    statistics = tmp_path / "a" / "statistics"
    with monkeypatch.context() as patch:
        patch.setattr("sae_whiten.comparison.compare.train_arms", None)
        before = [path.stat().st_mtime_ns for path in statistics.iterdir()]
        with pytest.raises(TypeError):
            run(tmp_path / "a", dataclasses.replace(one, lr=5.0, context_size=16, seeds=(0, 1)))
        assert [path.stat().st_mtime_ns for path in statistics.iterdir()] == before
    with caplog.at_level(logging.WARNING, "sae_whiten"):
        first = run(tmp_path / "a", one)
    assert [r["name"] for r in first] == ["topk-none-k2", "top_afa-none"]
    (warning,) = [r.getMessage() for r in caplog.records if "reached L0" in r.getMessage()]
    assert "the SAEs with a k have L0 of 2 to 2" in warning
    assert "repeat this in the same folder with k of" in warning
    more = run(tmp_path / "a", both)
    assert more[:2] == first
    shutil.rmtree(tmp_path / "a" / "saes")  # they are large, and evaluated
    with pytest.raises(ValueError, match="holds a comparison with lr"):
        run(tmp_path / "a", dataclasses.replace(both, lr=5.0))
    assert [r["name"] for r in more[2:]] == ["topk-none-k16"]
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["sparsity"] == [2, 16]
    together = {r["name"]: r["metrics"] for r in run(tmp_path / "b", both)}
    assert together == {r["name"]: r["metrics"] for r in more}


def test_other_settings_in_the_same_folder_are_refused(finished):
    out, _ = finished
    with pytest.raises(ValueError, match=r"holds a comparison with lr=0.001 \(now 0.01\)"):
        run(out, dataclasses.replace(SMALL, lr=0.01))


@pytest.mark.parametrize("tried", ["learning_rates.json", "learning-rates/0.001/results.json"])
def test_rates_tried_under_other_settings_are_not_taken_over(tmp_path, monkeypatch, tried):
    few = dataclasses.replace(SMALL, architectures=("topk",), learning_rates=(1e-3, 3e-3))

    def stopped(setting: Any) -> None:
        (setting.out / tried).parent.mkdir(parents=True, exist_ok=True)
        (setting.out / tried).write_text("{}")
        raise TimeoutError

    monkeypatch.setattr("sae_whiten.comparison.compare.best_learning_rates", stopped)
    with pytest.raises(TimeoutError):
        run(tmp_path, few)
    with pytest.raises(ValueError, match=r"holds a comparison with learning_rates=\[0.001, 0.003"):
        run(tmp_path, dataclasses.replace(few, learning_rates=(1e-2,)))
    # which k is the middle one matters only while rates are being tried
    more = dataclasses.replace(few, sparsity=(2, 4))
    with pytest.raises(TimeoutError if tried.endswith("rates.json") else ValueError):
        run(tmp_path, more)


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("results.jsonl", "line 3 is damaged .* delete the line: its SAE is then evaluated again"),
        ("settings.json", "line 3 is damaged .* delete it if the options are"),
        ("learning_rates.json", "line 3 is damaged .* the rates are then tried again"),
        ("learning-rates/0.001/results.json", "line 3 is damaged .* are then evaluated again"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(finished, tmp_path, file, remedy):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("saes"))
    comparison = SMALL
    if file.startswith("learning"):
        (out / "results.jsonl").unlink()
        (out / "settings.json").unlink()
        comparison = dataclasses.replace(SMALL, learning_rates=(1e-3,))
    (out / file).parent.mkdir(parents=True, exist_ok=True)
    (out / file).write_text("{}\n" * 2 + '{"name": ' if file == "results.jsonl" else '{\n\n"a')
    with pytest.raises(CorruptFileError, match=f"{file}, {remedy}"):
        run(out, comparison)


def test_an_sae_whose_damaged_record_was_deleted_is_evaluated_again(finished, tmp_path):
    folder, records = finished
    out = shutil.copytree(folder, tmp_path / "out")
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[:3] + lines[4:]))
    again = {(r["name"], r["seed"]): r["metrics"] for r in run(out)}
    assert again == {(r["name"], r["seed"]): r["metrics"] for r in records}


def test_seeds_are_not_added_on_another_dataset_or_model(finished):
    out, records = finished
    more = dataclasses.replace(SMALL, seeds=(0, 1, 2))
    settings = json.loads((out / "settings.json").read_text())

    def refused(said, model=None, dataset=None):
        model, dataset = model or tiny_model(), dataset or tiny_dataset(600)
        with pytest.raises(ValueError, match=said):
            compare(more, model, dataset, out, model_name="tiny")
        assert json.loads((out / "settings.json").read_text()) == settings

    rows = re.escape(settings["rows"])
    refused(rf"rows='{rows}' \(now '600 rows", dataset=tiny_dataset(600, seed=1))
    refused(rf"rows='{rows}' \(now '599 rows", dataset=tiny_dataset(600).select(range(599)))
    refused(rf"rows='{rows}' \(now 'a stream", dataset=tiny_dataset(600).to_iterable_dataset())
    activations = re.escape(str(settings["activations"]))
    refused(rf"activations={activations} \(now \[", model=tiny_model(seed=1))
    # rounding is not another model
    rounded = tiny_model()
    rounded.load_state_dict({k: (1 + 1e-4) * v for k, v in rounded.state_dict().items()})
    again = compare(SMALL, rounded, tiny_dataset(600), out, model_name="tiny")
    assert [r["name"] for r in again] == [r["name"] for r in records]
    # of an earlier version, which did not look
    known = {k: v for k, v in settings.items() if k not in ("rows", "activations")}
    (out / "settings.json").write_text(json.dumps(known))
    run(out)
    assert json.loads((out / "settings.json").read_text()) == settings


def test_a_dataset_is_recognised_by_its_rows_whatever_holds_them():
    rows = tiny_dataset(600)
    named = rows.add_column("source", [str(i) for i in range(600)])  # pyright: ignore[reportCallIssue]
    assert describe_rows(rows, 16) == describe_rows(named.with_format("torch"), 16)
    changed = [*rows["input_ids"][:300], rows["input_ids"][0], *rows["input_ids"][301:]]
    assert describe_rows(Dataset.from_dict({"input_ids": changed}), 16) != describe_rows(rows, 16)
    stream = rows.to_iterable_dataset()
    assert describe_rows(stream, 16) == describe_rows(
        rows.select(range(32)).to_iterable_dataset(), 16
    )


def test_a_hook_that_is_not_there_is_refused_with_the_nearest(tmp_path):
    comparison = dataclasses.replace(SMALL, hook_name="block.1.hook_resid_pre")
    with pytest.raises(ValueError, match=r"no hook 'block.1.*nearest: blocks.1.hook_resid_pre"):
        run(tmp_path, comparison)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stream", [False, True])
def test_too_few_rows_are_refused_with_their_number(tmp_path, stream):
    rows = tiny_dataset(15)
    dataset = rows.to_iterable_dataset() if stream else rows
    with pytest.raises(ValueError, match=r"held_out_sequences=16.*15 rows.*7 or less"):
        compare(SMALL, tiny_model(), dataset, tmp_path / "out", model_name="tiny")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"conditions": ("none", "white")}, "no condition white; there are none, centred"),
        (
            {"architectures": ("topk",), "conditions": ("none",)},
            "nothing is whitened; add another architecture, or one of the conditions centred, wh",
        ),
        ({"seeds": (0, 0)}, "none twice"),
        ({"training_tokens": 10}, "training_tokens=10: .* at least 128"),
        ({"sparsity": (0,)}, "sparsity=0: must be"),
        ({"held_out_sequences": 0}, "held_out_sequences=0: must be"),
        ({"lr": 0.0}, "lr=0.0: must be"),
        ({"device": "nowhere"}, "device='nowhere': PyTorch"),
        ({"sparsity": ()}, "at least one"),
        ({"architectures": ("topk", "nope")}, "no architecture nope; there are standard"),
        ({"architectures": ("top_afa",)}, "nothing is whitened .TopAFA.*; add another arch"),
        ({"sparsity": (8, 300), "d_sae": 256}, "d_sae=256: must be .* at least 300"),
        ({"sae_options": {"topk_vsae": {"relu_mean": "no"}}}, "relu_mean='no': True or False"),
        ({"sae_options": {"topk_vsae": {"kl_coefficient": None}}}, "kl_coefficient=None: must be"),
        (
            {"conditions": ("original", "half")},
            "top_afa cannot be trained under any of the conditions original",
        ),
        ({"architectures": ("matryoshka_batchtopk",)}, "needs matryoshka_widths in sae_options"),
        ({"sae_options": {"gated": {}}}, "gated, which is not compared; the architectures are top"),
        ({"sae_options": {"topk": {"aux": 1}}}, "topk has no field aux; there are .*aux_loss_coef"),
        ({"sae_options": {"topk": {"k": 1}}}, "k is set by the comparison itself; there are"),
        ({"sae_options": {"top_afa": {"metadata": {}}}}, "metadata is set by the comparison"),
        ({"sae_options": {"top_afa": {"afa_coefficient": -1}}}, "top_afa-none: afa_coefficient=-1"),
        ({"sae_options": {"topk": 1}}, "fields of the training configs by architecture"),
    ],
)
def test_comparisons_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(SMALL, **options)


def test_a_killed_comparison_ends_with_the_same_saes(finished, tmp_path, monkeypatch):
    out, _ = finished
    step, n_steps = SAETrainer.step, 0

    def die(self, *args, **options):
        nonlocal n_steps
        n_steps += 1
        if n_steps == 13 * 17:  # of 20 steps of 13 SAEs
            raise Killed
        return step(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SAETrainer, "step", die)
        with pytest.raises(Killed):
            run(tmp_path, dataclasses.replace(SMALL, seeds=(0,)))
    assert any((tmp_path / "checkpoints" / "seed-0").iterdir())
    run(tmp_path, dataclasses.replace(SMALL, seeds=(0,)))
    assert_same_saes(tmp_path / "saes" / "seed-0", out / "saes" / "seed-0")


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def assert_same_saes(found, expected):
    names = sorted(path.name for path in expected.iterdir() if path.is_dir())
    assert names == sorted(path.name for path in found.iterdir() if path.is_dir())
    for name in names:
        whole = SAE.load_from_disk(expected / name).state_dict()
        again = SAE.load_from_disk(found / name).state_dict()
        assert all(torch.equal(whole[key], again[key]) for key in whole), name


def test_what_is_left_after_a_kill_while_saving_is_trained_on_the_same_data(tmp_path, monkeypatch):
    comparison = dataclasses.replace(
        SMALL,
        conditions=("original", "expected_average_only_in", "none"),
        architectures=("topk",),
        seeds=(0,),
        training_tokens=128 * 12,
    )
    records = run(tmp_path / "whole", comparison)
    write = runner_parts.write_sae

    def die_after(n_saes):
        def killed(target, *args, **options):
            nonlocal n_saes
            if n_saes == 0:
                raise Killed
            n_saes -= 1
            return write(target, *args, **options)

        return killed

    # first the whitened SAE is saved, then the one that takes a scaling factor from the data
    for n_saes in (1, 1):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(runner_parts, "write_sae", die_after(n_saes))
            run(tmp_path / "killed", comparison)
    seed = Path("saes", "seed-0")
    assert {path.name for path in (tmp_path / "killed" / seed).iterdir() if path.is_dir()} == {
        "topk-original-k8",
        "topk-expected_average_only_in-k8",
    }
    shutil.copytree(tmp_path / "killed", tmp_path / "without checkpoints")
    shutil.rmtree(tmp_path / "without checkpoints" / "checkpoints")
    for name in ("killed", "without checkpoints"):
        again = run(tmp_path / name, comparison)
        assert [r["metrics"] for r in again] == [r["metrics"] for r in records]
        assert_same_saes(tmp_path / name / seed, tmp_path / "whole" / seed)


def test_checkpoints_of_finished_saes_do_not_stop_a_comparison(tmp_path):
    # left by a kill after the SAEs of another learning rate or coefficient were saved
    left = tmp_path / "checkpoints" / "seed-0" / "512" / "topk-original-k8"
    left.mkdir(parents=True)
    comparison = dataclasses.replace(
        SMALL, conditions=("centred",), architectures=("topk",), seeds=(0,), training_tokens=768
    )
    (record,) = run(tmp_path, comparison)
    assert record["name"] == "topk-centred-k8"
    assert not left.exists()


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors"])
def test_an_sae_that_is_not_whole_is_trained_again(finished, tmp_path, file):
    out, records = finished
    comparison = dataclasses.replace(SMALL, seeds=(0,))
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "results.jsonl").unlink()
    shutil.rmtree(tmp_path / "out" / "saes" / "seed-1")
    broken = tmp_path / "out" / "saes" / "seed-0" / "topk-none-k8"
    (broken / file).write_bytes(b"{}" if file == "cfg.json" else b"")
    (tmp_path / "out" / "saes" / "seed-0" / "topk-half-k8" / file).unlink()
    again = run(tmp_path / "out", comparison)
    assert [r["metrics"] for r in again] == [r["metrics"] for r in records if r["seed"] == 0]
    assert_same_saes(tmp_path / "out" / "saes" / "seed-0", out / "saes" / "seed-0")


def test_every_condition_can_be_trained_by_every_kind_of_architecture(tmp_path):
    comparison = dataclasses.replace(
        SMALL,
        conditions=tuple(CONDITIONS),
        architectures=("batchtopk", "gated", "jumprelu"),
        # such as leaves no latent active: their fold has to be provable too
        coefficients=(1000.0,),
        seeds=(0,),
        training_tokens=128 * 4,
    )
    assert len(run(tmp_path, comparison)) == len(CONDITIONS) * 3


def test_a_page_shows_features_with_and_without_whitening_and_the_report_links_it(
    finished, tmp_path, monkeypatch
):
    folder, records = finished
    out = shutil.copytree(folder, tmp_path / "comparison")
    monkeypatch.setattr("sae_whiten.comparison.report.page.comparison_figures", lambda *_: [])
    write_report(records, out, {})
    assert "features.html" not in (out / "report.html").read_text()
    page = write_feature_page(SMALL, records, tiny_model(), tiny_dataset(600), out, "tokens")
    assert page is not None
    assert page == out / "features.html"
    text = page.read_text()
    assert all(name in text for name in ("topk-none-k8", "topk-original-k8", "Found by both"))
    assert "whitened coordinates (from statistics of" in text
    write_report(records, out, {})
    assert '<a href="features.html">' in (out / "report.html").read_text()
    assert "](features.html)" in (out / "table.md").read_text()
    # a page that is there is left alone
    page.write_text("mine")
    write_feature_page(SMALL, records, tiny_model(), tiny_dataset(600), out, "tokens")
    assert page.read_text() == "mine"


def test_the_page_is_of_two_saes_as_alike_as_there_are():
    def record(condition: str, l0: float, architecture: str = "topk", seed: int = 0):
        metrics = {"l0": l0}
        return {
            "architecture": architecture,
            "condition": condition,
            "seed": seed,
            "metrics": metrics,
        }

    plain = [record("none", 16), record("none", 32)]
    others = [record("centred", 30), record("whitened", 10), record("whitened", 31)]
    assert choose_pair([*others, *plain]) == (plain[1], others[2])
    assert choose_pair([record("whitened", 8), record("half", 8)]) is not None
    assert choose_pair([record("none", 8), record("original", 8, "standard")]) is None
    assert choose_pair([record("none", 8), record("original", 8, seed=1)]) is None
    assert choose_pair([record("none", 8), record("none", 16)]) is None
