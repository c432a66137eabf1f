"""Datasets on this machine, without a network."""

import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sae_lens import MultiSAETrainingRunnerConfig

from sae_whiten import (
    WhiteningConfig,
    WhiteningMultiSAETrainingRunner,
    WhiteningTrainingRunner,
    fit_statistics,
)
from sae_whiten.cli import main
from sae_whiten.estimation.dataset import (
    check_columns,
    is_on_this_machine,
    local_dataset,
    open_dataset,
)
from tests.support import runner_config, tiny_dataset, tiny_model, training_sae

HOOK = "blocks.1.hook_resid_pre"
FORMS = ["saved", "splits", "jsonl/a.jsonl", "jsonl", "parquet/a.parquet", "parquet"]


@pytest.fixture
def tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same tokens in all forms, and a machine that cannot reach the hub."""
    rows = tiny_dataset(200)
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "splits"))
    for form in ("jsonl", "parquet"):
        (tmp_path / form).mkdir()
    rows.to_json(tmp_path / "jsonl" / "a.jsonl")
    rows.to_parquet(tmp_path / "parquet" / "a.parquet")

    def no_network(*args: Any, **options: Any) -> None:
        raise ConnectionError(f"looked up on the hub: {args}")

    monkeypatch.setattr("sae_lens.training.activations_store.hf_hub_download", no_network)
    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Tokenizer:
    """All that SAELens asks of a tokenizer before it compares it with that of the dataset."""

    bos_token_id = eos_token_id = 0
    padding_side = "right"

    def get_vocab(self) -> dict[str, int]:
        return {}


def model_with_tokenizer() -> Any:
    model = tiny_model()
    model.tokenizer = Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    return model


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("absolute", [True, False])
def test_fit_takes_tokens_from_files_and_folders(tokenised, form, absolute, streaming):
    def fit(dataset):
        return fit_statistics(
            model_with_tokenizer(),
            dataset,
            HOOK,
            n_samples=300,
            context_size=32,
            batch_size_prompts=4,
            streaming=streaming,
        )[HOOK]

    path = str(tokenised / form) if absolute else form
    found = fit(path)
    assert torch.equal(found.covariance, fit(tiny_dataset(200)).covariance)
    assert found.provenance["dataset_path"] == path


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_training_takes_tokens_from_files_and_folders(tokenised, form, streaming):
    def train(path, dataset=None):
        torch.manual_seed(0)
        config = runner_config(dataset_path=path, streaming=streaming, training_tokens=128 * 4)
        made = WhiteningTrainingRunner(
            config,
            WhiteningConfig(n_samples=300),
            override_model=model_with_tokenizer(),
            override_dataset=dataset,
        )
        return made.run().W_enc

    assert torch.equal(train(form), train("local", tiny_dataset(200)))


def test_several_saes_train_on_a_folder_too(tokenised):
    config = MultiSAETrainingRunnerConfig(
        saes={"white": training_sae("topk").cfg},
        model_name="tiny",
        hook_names=HOOK,
        dataset_path=str(tokenised / "saved"),
        streaming=True,
        context_size=32,
        training_tokens=128 * 2,
        train_batch_size_tokens=128,
        store_batch_size_prompts=4,
        n_batches_in_buffer=16,
        logger=runner_config().logger,
        checkpoint_path=None,
        output_path=None,
    )
    saes = WhiteningMultiSAETrainingRunner(
        config, WhiteningConfig(n_samples=300), override_model=model_with_tokenizer()
    ).run()
    assert saes["white"].cfg.metadata.dataset_path == str(tokenised / "saved")


def test_the_commands_take_them(tokenised, monkeypatch, capsys):
    for where in ("sae_lens.load_model", "sae_lens.llm_sae_training_runner"):
        monkeypatch.setattr(f"{where}.load_model", lambda *args, **options: model_with_tokenizer())
    fit = ["fit", "--model-name", "tiny", "--dataset-path", "jsonl/a.jsonl", "--hook-name", HOOK]
    assert main([*fit, "--context-size", "32", "--n-samples", "300", "--out", "stats"]) == 0
    train = [
        *("train", "--d_in", "32", "--d_sae", "64", "--model_name", "tiny", "--hook_name", HOOK),
        *("--context_size", "32", "--training_tokens", "256", "--log_to_wandb", "False"),
        *("--train_batch_size_tokens", "64", "--store_batch_size_prompts", "4"),
        *("--checkpoint_path", "--output_path", "sae"),
    ]
    topk = ["--architecture", "topk", "--k", "4", "--whitening.statistics", "stats"]
    assert main([*train, *topk, "--dataset_path", "jsonl/a.jsonl"]) == 0
    vsae = ["--architecture", "topk_vsae", "--k", "4", "--normalize_activations", "none"]
    assert main([*train, *vsae, "--dataset_path", "parquet"]) == 0
    capsys.readouterr()
    assert main([*train, *topk, "--dataset_path", str(tokenised / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_a_dataset_of_the_configs_own_path_is_not_said_to_override_it(tokenised, caplog):
    config = runner_config(dataset_path="jsonl", training_tokens=128)
    caplog.set_level("WARNING", "sae_lens")
    WhiteningTrainingRunner(config, override_model=tiny_model())
    assert "a model which will override" in caplog.text
    assert "a dataset which will override" not in caplog.text
    WhiteningTrainingRunner(config, override_model=tiny_model(), override_dataset=tiny_dataset())
    assert "a dataset which will override" in caplog.text


def test_statistics_of_a_folder_are_taken_however_its_path_is_written(tokenised):
    options: dict[str, Any] = {"n_samples": 300, "context_size": 32, "out": "stats"}
    fit_statistics(tiny_model(), str(tokenised / "jsonl"), HOOK, **options)
    given = WhiteningConfig(statistics="stats")
    for path, accepted in (("jsonl", True), ("./jsonl/", True), ("parquet", False)):
        config = runner_config(dataset_path=path, training_tokens=128)
        runner = WhiteningTrainingRunner(config, given, override_model=tiny_model())
        if accepted:
            runner.run()
        else:
            with pytest.raises(ValueError, match="dataset_path="):
                runner.run()


def test_parts_of_splits(tokenised):
    rows = tiny_dataset(200)["input_ids"][:]
    for form in FORMS:
        assert open_dataset(form, "train[90%:]", streaming=True)["input_ids"][:] == rows[180:]
    half = datasets.Dataset.from_dict({"input_ids": rows[:100]})
    datasets.DatasetDict({"train": half, "test": half.select(range(5))}).save_to_disk("two")
    assert len(open_dataset("two", "test")) == 5
    assert len(open_dataset("two", "train[:10]+test[2:]")) == 13
    with pytest.raises(ValueError, match="'validation'.* train, test"):
        open_dataset("two", "validation")
    assert len(list(open_dataset("jsonl", streaming=True))) == 200


def test_names_with_another_meaning_for_datasets_are_those_of_files(tokenised):
    Path("json").mkdir()  # a format
    tiny_dataset(7).to_json(Path("json") / "b[1].jsonl")  # a pattern
    assert len(open_dataset("json/b[1].jsonl")) == 7
    assert len(open_dataset("json")) == 7


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere/of/this", True),
        ("./nowhere", True),
        ("/nowhere", True),
        ("missing.jsonl", True),
        ("monology/pile-uncopyrighted", False),
        ("imdb", False),
        ("local", False),
        ("", False),
    ],
)
def test_what_is_no_name_on_the_hub_is_not_looked_up_there(tokenised, source, expected):
    assert is_on_this_machine(source) == expected
    if expected:
        with pytest.raises(FileNotFoundError, match=f"{source}: there is no such file or folder"):
            local_dataset(source, streaming=True)
    else:
        assert local_dataset(source, streaming=True) is None


def test_a_dataset_without_rows_or_not_of_its_format_is_named(tokenised):
    tiny_dataset(1).select([]).to_parquet("empty.parquet")
    for streaming in (True, False):
        with pytest.raises(ValueError, match="^empty.parquet: "):
            open_dataset("empty.parquet", streaming=streaming)
    Path("broken.jsonl").write_text('{"input_ids": [1, 2')
    with pytest.raises(ValueError, match="^broken.jsonl: "):
        open_dataset("broken.jsonl")
    os.makedirs("nothing")  # noqa: PTH103
    with pytest.raises(FileNotFoundError, match="nothing"):
        open_dataset("nothing")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_without_tokens_or_text_is_refused_before_the_model_is_loaded(
    tokenised, streaming, monkeypatch, capsys
):
    def load_model(*args: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    for where in ("sae_lens.load_model", "sae_lens.llm_sae_training_runner"):
        monkeypatch.setattr(f"{where}.load_model", load_model)
    other = datasets.Dataset.from_dict({"content": ["a", "b"], "id": [1, 2]})
    other.to_json("other.jsonl")
    problem = "has the columns content, id; one has to be text (texts), or input_ids or tokens"
    names = ["--model-name", "tiny", "--dataset-path", "other.jsonl", "--hook-name", HOOK]
    fit_streams = [] if streaming else ["--no-streaming"]
    train = [
        *("train", "--architecture", "topk", "--k", "4", "--d_in", "32", "--d_sae", "64"),
        *("--training_tokens", "256", "--train_batch_size_tokens", "64", "--context_size", "32"),
        *("--store_batch_size_prompts", "4", "--log_to_wandb", "False"),
        *("--streaming", str(streaming)),
    ]
    for command in (["fit", *names, *fit_streams, "--out", "stats"], [*train, *names]):
        assert main(command) == 2
        assert f"error: other.jsonl {problem}" in capsys.readouterr().err
    given = other.to_iterable_dataset() if streaming else other
    with pytest.raises(ValueError, match="^the dataset has the columns content, id; "):
        WhiteningTrainingRunner(runner_config(), override_dataset=given)
    with pytest.raises(ValueError, match="^the dataset has the columns content, id; "):
        fit_statistics(model_with_tokenizer(), given, HOOK, context_size=32)
    chat = datasets.Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}]]})
    check_columns(chat, chat=True)
    with pytest.raises(ValueError, match="has the column messages; "):
        check_columns(chat)


def test_what_a_dataset_on_the_hub_lacks_is_named(tokenised, monkeypatch):
    other = datasets.Dataset.from_dict({"content": ["a", "b"]})
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: other)
    monkeypatch.setattr(
        "sae_lens.training.activations_store.load_dataset", lambda *args, **options: other
    )
    with pytest.raises(ValueError, match="^user/name has the column content; "):
        fit_statistics(model_with_tokenizer(), "user/name", HOOK, context_size=32)
    config = runner_config()
    config.dataset_path = "user/name"
    with pytest.raises(ValueError, match="^user/name has the column content; "):
        WhiteningTrainingRunner(config, override_model=model_with_tokenizer())


def test_a_sequence_that_is_too_short_is_named(tokenised):
    rows = [list(range(33)), list(range(33)), list(range(5)), list(range(33))]
    short = datasets.Dataset.from_dict({"input_ids": rows})
    with pytest.raises(ValueError, match="sequence 2 of the dataset has 5 tokens"):
        fit_statistics(tiny_model(), short, HOOK, n_samples=300, context_size=32)
    config = runner_config(training_tokens=128 * 4)
    with pytest.raises(ValueError, match="sequence 2 of the dataset has 5 tokens"):
        WhiteningTrainingRunner(config, override_model=tiny_model(), override_dataset=short).run()
