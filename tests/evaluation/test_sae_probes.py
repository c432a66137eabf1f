"""Probing with `sae-probes`, against its own runner; only where it is installed."""

import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.load_model import load_model
from transformers import BatchEncoding

pytest.importorskip("sae_probes")

from sae_probes.generate_model_activations import _process_activations  # pyright: ignore[reportMissingImports]
from sae_probes.run_sae_evals import run_sae_eval  # pyright: ignore[reportMissingImports]
from sae_probes.utils_data import get_train_test_indices, get_yvals, read_numbered_dataset_df  # pyright: ignore[reportMissingImports]

from sae_whiten.estimation.dataset import open_dataset
from sae_whiten.estimation.probing_texts import task_names, tasks_of, unprobed_texts
from sae_whiten.evaluation import sae_probes
from sae_whiten.evaluation.evaluate import evaluate_saes
from sae_whiten.evaluation.model_view import View, text_tokens
from sae_whiten.evaluation.sae_probes import ProbingTasks, task_auc
from sae_whiten.evaluation.tokens import Reading
from tests.support import BYTE_TRANSFORMER

HOOK = "gpt_neox.layers.0"
TASK = "95_toxic_is"  # the smallest


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("AutoModelForCausalLM", str(BYTE_TRANSFORMER), device="cpu")


def random_sae() -> SAE[Any]:
    torch.manual_seed(0)
    metadata = {"hook_name": HOOK, "context_size": 48, "prepend_bos": True}
    sae = SAE.from_dict(
        {"architecture": "topk", "k": 24, "d_in": 128, "d_sae": 256, "metadata": metadata}
    )
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(128, 256) / 12)
        sae.W_dec.copy_(torch.randn(256, 128) / 16)
    return sae


def texts_of(task: str) -> list[str]:
    return read_numbered_dataset_df(task)["prompt"].astype(str).tolist()


def evaluated(model: Any, sae: SAE[Any], tasks: ProbingTasks, **options: Any) -> dict[str, Any]:
    rows = Dataset.from_dict({"input_ids": [[256, *range(97, 144)]] * 10})
    (record,) = evaluate_saes({"sae": sae}, model, rows, tasks, n_tokens=480, **options)
    return record


def test_figures_are_those_of_their_runner_to_the_digit(model, tmp_path, monkeypatch):
    sae, view = random_sae(), View(HOOK, special=(256,))
    monkeypatch.setattr(sae_probes, "SAE_PROBES_K", (1, 16))
    record = evaluated(model, sae, ProbingTasks([TASK]), probe_seeds=2)
    tokens = text_tokens(model.tokenizer, texts_of(TASK), 48, True, keep_end=True)
    acts = sae_probes._last_tokens([view], model, tokens, Reading(48, True, 16))[view]
    folder = tmp_path / "model_activations_ours"
    folder.mkdir()
    torch.save(acts, folder / f"{TASK}_{HOOK}.pt")
    for i, seed in enumerate((42, 43)):
        run_sae_eval(
            sae, TASK, HOOK, "l1", "normal", "ours", tmp_path,
            device="cpu", ks=[1, 16], results_path=tmp_path / str(seed), seed=seed,
        )  # fmt: skip
        (path,) = (tmp_path / str(seed)).rglob("*.json")
        for theirs in json.loads(path.read_text()):
            ours = record["repeats"][f"sae_probes_auc_top_{theirs['k']}"][TASK]
            assert ours[i] == theirs["test_auc"]
    for k in (1, 16):
        found = record["repeats"][f"sae_probes_auc_top_{k}"]
        assert record["metrics"][f"sae_probes_auc_top_{k}"] == np.mean(found[TASK])
    assert record["labels"]["tasks"] == [TASK]


def test_activations_are_those_of_their_runner(model):
    class Tokenizer:
        """As TransformerLens sets it up: BOS in front; theirs cuts texts on the left."""

        def __call__(self, text: Any, max_length: int | None = None, **options: Any) -> Any:
            if isinstance(text, str):
                return {"input_ids": [256, *model.tokenizer(text)["input_ids"]]}
            ids = [256, *model.tokenizer(text[0])["input_ids"]]
            return BatchEncoding({"input_ids": torch.tensor([ids])})

    texts = ["one", "a longer text", "the longest of all of them"]
    theirs = _process_activations(
        SimpleNamespace(tokenizer=Tokenizer(), run_with_cache=model.run_with_cache),  # pyright: ignore[reportArgumentType]
        texts, 1, 1024, [HOOK], None, "cpu",
    )[HOOK]  # fmt: skip
    tokens = text_tokens(model.tokenizer, texts, 48, True, keep_end=True)
    view = View(HOOK, special=(256,))
    ours = sae_probes._last_tokens([view], model, tokens, Reading(48, True, batch_size=2))[view]
    torch.testing.assert_close(ours, theirs)
    # of a text that is too long the end is read, as by theirs
    (cut,) = text_tokens(model.tokenizer, texts[2:], 10, True, keep_end=True)
    assert cut == [256, *tokens[2][-9:]]


def test_latents_can_be_averaged_over_the_tokens_of_a_text(model, monkeypatch):
    sae = random_sae()
    monkeypatch.setattr(sae_probes, "SAE_PROBES_K", (2,))
    tasks = ProbingTasks([TASK], tokens="mean", penalty="l2", n_texts=40)
    record = evaluated(model, sae, tasks, probe_seeds=1)
    y = get_yvals(TASK)
    train, test = get_train_test_indices(y, 30, 10, seed=42)
    pooled = []
    for row in [*train, *test]:
        ids = [256, *model.tokenizer(texts_of(TASK)[row])["input_ids"]][:48]
        x = model.run_with_cache(torch.tensor([ids]), names_filter=[HOOK])[1][HOOK][0, 1:]
        pooled.append(sae.encode(x).mean(0))
    f = torch.stack(pooled).detach()
    expected = task_auc(f[:30], y[train], f[30:], y[test], 42, "l2")[2]
    # of ten test texts a pair more or less is 0.04
    assert record["metrics"]["sae_probes_auc_top_2"] == pytest.approx(expected, abs=0.041)
    assert (y[train].mean(), y[test].mean()) == (0.5, 0.5)


def test_a_task_of_which_an_sae_reads_nothing_is_refused_with_both_names(model):
    sae = random_sae()
    sae.cfg.metadata.seqpos_slice = (47, None)
    short = sum(len(model.tokenizer(one)["input_ids"]) < 47 for one in texts_of(TASK))
    assert short
    message = f"have no token that sae is .*{HOOK}, positions 47 to 47.* the task {TASK}"
    with pytest.raises(ValueError, match=message):
        evaluated(model, sae, ProbingTasks([TASK]), probe_seeds=1)


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))


def test_samples_of_tasks_are_fixed_and_what_they_leave_can_be_trained_on():
    assert len(tasks_of("sae-probes")) == len(task_names()) == 113
    few = tasks_of("sae-probes:3")
    assert few == tasks_of("sae-probes:3")
    assert len(set(few)) == 3
    for wrong in ("sae-probes:0", "sae-probes:114", "sae_probes"):
        with pytest.raises(ValueError, match="sae-probes"):
            tasks_of(wrong)
    texts = open_dataset("sae-probes:3", "train[50%:]")["text"]
    assert len(texts) == len(set(texts)) > 100_000
    probed = {text for name in few for text in texts_of(name)}
    assert not probed & set(texts)
    # nor what differs from them in case or punctuation alone, as some reviews of films do
    reviews = "113_movie_sent"
    probed = {words(text) for text in texts_of(reviews)}
    assert probed.isdisjoint(map(words, unprobed_texts([reviews])["text"]))
    with pytest.raises(ValueError, match="no task nope"):
        unprobed_texts(["nope"])
    with pytest.raises(ValueError, match="no task nope"):
        ProbingTasks(["nope"])
