"""No file that is written holds an access token or a password."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import SAE

from sae_whiten import (
    ActivationStatistics,
    WhiteningConfig,
    WhiteningMultiSAETrainingRunner,
    WhiteningTrainer,
    WhiteningTrainingRunner,
    fit_statistics,
)
from sae_whiten._files import load_tensors, save_tensors, write_json
from sae_whiten._redaction import redacted
from sae_whiten.cli import main
from sae_whiten.comparison.report.page import write_report
from sae_whiten.estimation.folders import push_folder, statistics_file
from sae_whiten.estimation.provenance import provenance_of
from tests.support import friendly, runner_config, tiny_dataset, tiny_model, training_sae
from tests.training.test_runner import FEW, runner

HOOK = "blocks.1.hook_resid_pre"
SECRET = "s3cr3t/Value99"
KWARGS: dict[str, Any] = {
    "token": SECRET,
    "revision": "v1",
    "headers": {"Authorization": f"Bearer {SECRET}", "accept": "json"},
    "nested": [{"HF_TOKEN": SECRET, "api_key": SECRET, "n": 1}],
    "proxies": {"https": f"https://me:{SECRET.replace('/', '')}@proxy:80"},
}
SHARED = {
    "revision": "v1",
    "headers": {"accept": "json"},
    "nested": [{"n": 1}],
    "proxies": {"https": "https://REDACTED@proxy:80"},
}


def files_with_secrets(folder: Path) -> list[str]:
    parts = [part.encode() for part in (SECRET, SECRET.replace("/", ""), SECRET.split("/")[1])]
    found = [file for file in folder.rglob("*") if file.is_file()]
    assert found
    return [file.name for file in found if any(part in file.read_bytes() for part in parts)]


@pytest.mark.parametrize(
    "value",
    [
        KWARGS,
        {"apiKey": SECRET, "accessToken": SECRET, "hub-token": SECRET, "X-Api-Key": SECRET},
        {"aws_secret_access_key": SECRET, "password": 7777777, "auth": ["me", SECRET]},
        {"headers": [("Authorization", f"Basic {SECRET}")]},
        ["fit", "--token", SECRET, f"--api-key={SECRET} {SECRET}"],
        shlex.join(["fit", "--kwargs", json.dumps({"token": SECRET, "revision": "v1"})]),
        json.dumps({"command": json.dumps({"token": SECRET}), "password": f'{SECRET}, "{SECRET}'}),
        f"HF_TOKEN={SECRET} fit --wandb_api_key {SECRET}",
        f"https://host/data?revision=v1&access_token={SECRET}&k=1",
        f"https://host/data?sv=1&sig={SECRET}",
        {"connection_string": f"AccountName=me;AccountKey={SECRET}=="},
        f"git+https://me:{SECRET.replace('/', '@')}@host/repo",
        f"curl -H 'authorization: Bearer {SECRET}' and bearer {SECRET}",
    ],
    ids=lambda value: str(value)[:30],
)
def test_secrets_are_found_by_their_names_and_redacting_twice_changes_nothing(value):
    found = redacted(value)
    for part in (SECRET, "7777777", *SECRET.split("/")):
        assert part not in str(found)
    assert redacted(found) == found


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "aB3" * 12,
        "ghp_" + "aB3" * 12,
        "github_pat_" + "aB3" * 12,
        "sk-proj-" + "aB3" * 12,
        "AKIA" + "AB3D" * 4,
        "eyJ" + "aB3" * 5 + "." + "aB3" * 5 + "." + "aB3",
    ],
)
def test_tokens_of_well_known_services_are_found_wherever_they_are(token):
    assert redacted({"note": f"with {token}", "list": [token]}) == {
        "note": "with REDACTED",
        "list": ["REDACTED"],
    }


@pytest.mark.parametrize(
    "value",
    [
        {"sequence_separator_token": "bos", "exclude_special_tokens": [1], "pad_token": "<pad>"},
        {"token": ["a", "b"], "tokens": 5, "training_tokens": 10, "token_id": 3, "key": "l0"},
        {"token": None, "use_auth_token": True, "password": None},
        {"statistics": {"hook.token": [{"d_in": 3}], "auth": [{"d_in": 3}]}},
        ["token", "text"],
        "fit --sequence-separator-token bos --hook-name 'blocks.*' --out a/b",
        "user/name@main",
        "hf://datasets/user/name@main/data.json",
        "https://host:8080/a?b=c",
        (1, None, 2.5, torch.float32, Path("a")),
    ],
    ids=str,
)
def test_what_is_no_secret_stays(value):
    assert redacted(value) == value


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["token", "auth", "k", "password"]), inner, max_size=3
            )
        ),
        max_leaves=8,
    )
)
def test_redacting_never_fails_changes_its_argument_or_depends_on_how_often(value):
    before = json.dumps(value)
    once = redacted(value)
    assert redacted(once) == once
    assert json.dumps(value) == before


def test_files_are_written_without_secrets(tmp_path):
    write_json(tmp_path / "a.json", {"kwargs": KWARGS})
    save_tensors(tmp_path / "b.safetensors", "kind", {"x": torch.zeros(2)}, {"kwargs": KWARGS})
    assert not files_with_secrets(tmp_path)
    assert json.loads((tmp_path / "a.json").read_text()) == {"kwargs": SHARED}
    assert load_tensors(tmp_path / "b.safetensors", "kind")[1] == {"kwargs": SHARED}


def test_estimation_writes_none_and_continues_with_another_token(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def fit(model, token):
        return fit_statistics(
            model,
            tiny_dataset(400),
            HOOK,
            context_size=32,
            batch_size_prompts=4,
            n_samples=2000,
            out=tmp_path,
            provenance={"model_from_pretrained_kwargs": {**KWARGS, "token": token}},
        )

    model, n_passes = tiny_model(), 0

    def die(tensor: torch.Tensor, *, hook: object) -> None:
        nonlocal n_passes
        n_passes += 1
        if n_passes == 4:
            raise Killed

    model.hook_dict[HOOK].add_perma_hook(die)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr("sae_whiten.estimation.progress._SAVE_EVERY_SECONDS", 0.0)
    with pytest.raises(Killed):
        fit(model, SECRET)
    assert list((tmp_path / ".fit_progress").iterdir())
    assert not files_with_secrets(tmp_path)
    found = fit(tiny_model(), f"another {SECRET}")
    assert found[HOOK].provenance["model_from_pretrained_kwargs"] == SHARED
    assert KWARGS["token"] == SECRET
    assert not files_with_secrets(tmp_path)


def test_a_file_from_elsewhere_with_a_token_is_not_pushed(tmp_path, monkeypatch):
    statistics = ActivationStatistics(4)
    statistics.update(friendly(10, 4))
    statistics.provenance = {"hook_name": HOOK, "kwargs": KWARGS}
    with monkeypatch.context() as patch:
        patch.setattr("sae_whiten._files.redacted", lambda value: value)
        statistics.save(statistics_file(tmp_path, HOOK))
    with pytest.raises(ValueError, match="token"):
        push_folder(tmp_path, "user/name")
    ActivationStatistics.load(statistics_file(tmp_path, HOOK)).save(statistics_file(tmp_path, HOOK))
    assert not files_with_secrets(tmp_path)


def test_a_run_writes_none_into_sae_config_checkpoints_and_statistics_and_resumes(tmp_path):
    options: dict[str, Any] = {
        "model_from_pretrained_kwargs": KWARGS,
        "checkpoint_path": str(tmp_path / "checkpoints"),
        "output_path": str(tmp_path / "sae"),
        "training_tokens": 128 * 10,
        "n_checkpoints": 1,
        "save_final_checkpoint": True,
    }
    config = runner_config(**options)
    made = WhiteningTrainingRunner(
        config, FEW, override_dataset=tiny_dataset(), override_model=tiny_model()
    )
    made.run()
    assert config.model_from_pretrained_kwargs == KWARGS  # the user's own is left alone
    assert not files_with_secrets(tmp_path)
    saved = SAE.load_from_disk(tmp_path / "sae")
    assert saved.cfg.metadata.model_from_pretrained_kwargs == SHARED
    first = min((tmp_path / "checkpoints").rglob("whitened_training_state")).parent
    again = runner(
        WhiteningConfig(statistics=str(tmp_path / "sae")),
        **{**options, "output_path": str(tmp_path / "again")},
    )
    again.run()
    resumed = runner(**{**options, "resume_from_checkpoint": str(first)}).run()
    assert torch.equal(resumed.W_enc, made.sae.W_enc)


def test_several_saes_have_none_in_their_files_either(tmp_path):
    config = MultiSAETrainingRunnerConfig(
        saes={
            "white": training_sae("topk").cfg,
            "plain": training_sae("topk", normalize_activations="none").cfg,
        },
        model_name="tiny",
        hook_names=HOOK,
        dataset_path=f"https://me:{SECRET.replace('/', '')}@host/data",
        model_from_pretrained_kwargs=KWARGS,
        streaming=False,
        context_size=32,
        training_tokens=128 * 6,
        train_batch_size_tokens=128,
        store_batch_size_prompts=4,
        n_batches_in_buffer=16,
        logger=runner_config().logger,
        checkpoint_path=str(tmp_path / "checkpoints"),
        n_checkpoints=1,
        output_path=str(tmp_path / "saes"),
    )
    WhiteningMultiSAETrainingRunner(
        config, override_model=tiny_model(), override_dataset=tiny_dataset()
    ).run()
    assert not files_with_secrets(tmp_path)


def test_a_trainer_without_a_runner_keeps_none_in_the_metadata():
    sae = training_sae("topk")
    sae.cfg.metadata.model_from_pretrained_kwargs = KWARGS
    given = sae.cfg
    trainer = WhiteningTrainer(
        cfg=runner_config().to_sae_trainer_config(),
        sae=sae,
        data_provider=iter([friendly(128, 32)]),
    )
    assert trainer.sae.cfg.metadata.model_from_pretrained_kwargs == SHARED
    assert provenance_of(given)["model_from_pretrained_kwargs"] == SHARED
    assert given.metadata.model_from_pretrained_kwargs == KWARGS


def test_the_commands_train_without_whitening_and_compare_write_none(tmp_path, monkeypatch):
    given = {**KWARGS, "center_writing_weights": False}
    monkeypatch.setattr("sae_lens.load_model.load_model", lambda *args, **options: tiny_model())
    monkeypatch.setattr(
        "sae_lens.llm_sae_training_runner.load_model", lambda *args, **options: tiny_model()
    )
    tiny_dataset(120).save_to_disk(str(tmp_path / "data"))
    arguments = [
        *("compare", "--model-name", "tiny", "--hook-name", HOOK, "--out", str(tmp_path / "out")),
        *("--dataset-path", str(tmp_path / "data"), "--no-streaming", "--context-size", "32"),
        *("--model-from-pretrained-kwargs", json.dumps(given), "--no-probing", "--seeds", "1"),
        *("--conditions", "none,original", "--architectures", "topk", "--sparsity", "4"),
        *("--training-tokens", "256", "--train-batch-size-tokens", "64", "--d-sae", "64"),
        *("--held-out-sequences", "16", "--include-special-tokens"),
    ]
    monkeypatch.setattr(sys, "argv", ["sae-whiten", *arguments])
    reported: list[dict[str, Any]] = []

    def report(records, directory, settings, **options):
        reported.append(dict(settings))
        (Path(directory) / "table.md").write_text("")

    monkeypatch.setattr("sae_whiten.comparison.report.page.write_report", report)
    assert main(arguments) == 0
    other = {**given, "token": f"other {SECRET}"}
    assert main([json.dumps(other) if a == json.dumps(given) else a for a in arguments]) == 0
    assert not files_with_secrets(tmp_path)
    assert SECRET not in str(reported)
    assert "REDACTED" in reported[0]["command"]

    trained = [
        *("train", "--architecture", "topk_vsae", "--k", "4", "--d_in", "32", "--d_sae", "64"),
        *("--normalize_activations", "none", "--model_name", "tiny", "--hook_name", HOOK),
        *("--dataset_path", str(tmp_path / "data"), "--streaming", "False"),
        *("--context_size", "32", "--training_tokens", "256", "--log_to_wandb", "False"),
        *("--train_batch_size_tokens", "64", "--store_batch_size_prompts", "4"),
        *("--model_from_pretrained_kwargs", json.dumps(given), "--checkpoint_path"),
        *("--output_path", str(tmp_path / "plain")),
    ]
    assert main(trained) == 0
    assert not files_with_secrets(tmp_path)


def test_a_report_shows_none(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_whiten.comparison.report.page.evaluation_figures", lambda records: [])
    record = {"name": "sae", "metrics": {"l0": 3.0}, "absent": {}, "kwargs": KWARGS}
    settings = {"model_name": "tiny", "kwargs": KWARGS, "command": f"evaluate --token {SECRET}"}
    write_report([record], tmp_path, settings)
    assert "--token REDACTED" in (tmp_path / "report.html").read_text()
    assert not files_with_secrets(tmp_path)
