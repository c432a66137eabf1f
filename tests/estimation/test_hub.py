"""Statistics on the Hugging Face hub: huggingface_hub itself, against a server on this machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

from sae_whiten import ActivationStatistics, CorruptFileError, WhiteningConfig
from sae_whiten.cli import main
from sae_whiten.estimation.folders import (
    find_all_statistics,
    find_statistics,
    push_folder,
    statistics_file,
)
from sae_whiten.estimation.provenance import load_statistics
from tests.hub import FakeHub, serving
from tests.support import friendly

FIRST, SECOND = "blocks.0.hook_resid_pre", "blocks.1.attn.hook_z"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with serving(fake) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield fake


def statistics_of(hook_name: str | None, d: int = 8, seed: int = 0) -> ActivationStatistics:
    statistics = ActivationStatistics(d)
    statistics.update(friendly(500, d, seed))
    if hook_name is not None:
        statistics.provenance = {"model_name": "gpt2", "hook_name": hook_name, "inflation": 0.0123}
    return statistics


def same(a: ActivationStatistics, b: ActivationStatistics) -> bool:
    equal = torch.equal(a.mean, b.mean) and torch.equal(a.covariance, b.covariance)
    return equal and a.n_samples == b.n_samples and a.provenance == b.provenance


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1 has it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_what_is_pushed_comes_back_and_the_card_states_it(hub: FakeHub) -> None:
    pushed = statistics_of(FIRST)
    url = pushed.push_to_hub("me/stats")
    assert url.startswith("https://huggingface.co/me/stats/commit/")
    assert same(ActivationStatistics.from_hub("me/stats", FIRST), pushed)
    assert same(ActivationStatistics.from_hub("me/stats"), pushed)  # the only one there
    card = ModelCard.load(hub.folder("me/stats") / "README.md")
    assert card.data.to_dict()["tags"] == ["sae-whiten"]
    assert "# Activation statistics of gpt2" in card.text
    assert f"| `{FIRST}` | 8 | 500 | 1.23% |" in card.text
    assert f'ActivationStatistics.from_hub("me/stats", "{FIRST}")' in card.text
    assert not hub.private["me/stats"]
    assert len(hub.commits) == 1


def test_a_second_hook_joins_the_first_and_leaves_what_was_written_there(hub: FakeHub) -> None:
    statistics_of(FIRST).push_to_hub("me/stats")
    (hub.folder("me/stats") / "README.md").write_text("mine")
    second = statistics_of(SECOND, d=5)
    second.push_to_hub("me/stats")
    assert (hub.folder("me/stats") / "README.md").read_text() == "mine"
    assert same(ActivationStatistics.from_hub("me/stats", SECOND), second)
    with pytest.raises(ValueError, match=f"me/stats holds those of {FIRST}, {SECOND}"):
        ActivationStatistics.from_hub("me/stats")


def test_a_folder_is_one_commit_and_the_card_lists_its_hooks(hub: FakeHub, tmp_path: Path) -> None:
    for hook_name, d in ((FIRST, 8), (SECOND, 5)):
        statistics_of(hook_name, d).save(statistics_file(tmp_path / "stats", hook_name))
    push_folder(tmp_path / "stats", "me/stats")
    assert len(hub.commits) == 1
    assert {file.name for file in hub.folder("me/stats").iterdir()} == {
        "README.md",
        f"{FIRST}.safetensors",
        f"{SECOND}.safetensors",
        "spectra.png",
    }
    text = (hub.folder("me/stats") / "README.md").read_text()
    assert f"| `{SECOND}` | 5 | 500 |" in text
    assert "| model_name | `gpt2` |" in text


def test_what_was_to_be_private_is_never_uploaded_to_a_public_repo(hub: FakeHub) -> None:
    statistics_of(FIRST).push_to_hub("me/secret", private=True)
    assert hub.private["me/secret"]
    statistics_of(FIRST).push_to_hub("me/open")
    with pytest.raises(ValueError, match="me/open exists and is public"):
        statistics_of(SECOND).push_to_hub("me/open", private=True)
    assert not statistics_file(hub.folder("me/open"), SECOND).exists()


def test_pushing_what_cannot_be_found_again_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hook_name"):
        statistics_of(None).push_to_hub("me/stats")
    for name in ("a", "b"):
        statistics_of(FIRST).save(tmp_path / "twice" / f"{name}.safetensors")
    with pytest.raises(ValueError, match=f"are both of {FIRST}"):
        push_folder(tmp_path / "twice", "me/stats")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        push_folder(tmp_path / "nowhere", "me/stats")
    with pytest.raises(ValueError, match="me/stats@v1"):
        statistics_of(FIRST).push_to_hub("me/stats@v1")
    assert not hub.folder("me/stats").exists()


def test_a_refusal_of_the_hub_names_the_remedy(hub: FakeHub, monkeypatch: Any) -> None:
    monkeypatch.setattr(hub, "answer", lambda *args: (403, {}, {"error": "no right to write"}))
    with pytest.raises(OSError, match="no right to write.*hf auth login"):
        statistics_of(FIRST).push_to_hub("me/stats")


def test_what_is_not_on_the_hub_is_told_from_what_is(hub: FakeHub) -> None:
    statistics_of(FIRST).push_to_hub("me/stats")
    with pytest.raises(FileNotFoundError, match=f"no statistics of {SECOND}.*those of {FIRST}"):
        ActivationStatistics.from_hub("me/stats", SECOND)
    with pytest.raises(FileNotFoundError, match="me/other .*does not exist"):
        ActivationStatistics.from_hub("me/other", FIRST)
    with pytest.raises(FileNotFoundError, match="me/stats .* no revision v2"):
        ActivationStatistics.from_hub("me/stats", FIRST, revision="v2")
    statistics_file(hub.folder("me/stats"), FIRST).write_bytes(b"something else")
    with pytest.raises(CorruptFileError):
        ActivationStatistics.from_hub("me/stats", FIRST)


def test_without_the_hub_the_cache_serves_what_it_has(hub: FakeHub, monkeypatch: Any) -> None:
    pushed = statistics_of(FIRST)
    pushed.push_to_hub("me/stats")
    ActivationStatistics.from_hub("me/stats", FIRST)
    offline(monkeypatch)
    n_requests = len(hub.requests)
    assert same(ActivationStatistics.from_hub("me/stats", FIRST), pushed)
    assert find_all_statistics("me/stats")[0].name == f"{FIRST}.safetensors"
    for ask in (
        lambda: ActivationStatistics.from_hub("me/stats", SECOND),
        lambda: ActivationStatistics.from_hub("me/other"),
        lambda: find_all_statistics("me/other"),
    ):
        with pytest.raises(ConnectionError, match="me/.* cannot be re"):
            ask()
    assert len(hub.requests) == n_requests


def test_a_hub_that_does_not_answer_is_a_connection_error(hub: FakeHub, monkeypatch: Any) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its attempts
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for hook_name in (FIRST, None):
        with pytest.raises(ConnectionError, match="me/stats on the Hugging Face hub cannot be re"):
            ActivationStatistics.from_hub("me/stats", hook_name)


def test_a_path_goes_before_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    statistics_of(FIRST, seed=1).push_to_hub("me/stats")
    n_requests = len(hub.requests)
    local = statistics_file(tmp_path / "me" / "stats", FIRST)
    statistics_of(FIRST, seed=2).save(local)
    assert find_statistics("me/stats", FIRST).resolve() == local
    assert len(hub.requests) == n_requests
    local.unlink()
    local.parent.rmdir()
    found = ActivationStatistics.load(find_statistics("me/stats", FIRST))
    assert same(found, statistics_of(FIRST, seed=1))


@pytest.mark.parametrize(
    "source", ["nowhere", "a/b/c.safetensors", "../me/stats", "./me", "me/@v1"]
)
def test_what_is_neither_path_nor_repo_says_so_without_asking(hub: FakeHub, source: str) -> None:
    with pytest.raises(FileNotFoundError, match="not the name of a repo"):
        find_statistics(source, FIRST)
    assert not hub.requests


def test_a_missing_path_that_may_be_a_repo_names_both(hub: FakeHub) -> None:
    with pytest.raises(FileNotFoundError, match="repo me/none .*does not exist"):
        find_statistics("me/none", FIRST)


def test_training_takes_a_repo_and_a_revision_of_it(hub: FakeHub) -> None:
    old, new = statistics_of(FIRST, seed=1), statistics_of(FIRST, seed=2)
    new.push_to_hub("me/stats")
    hub.folder("me/stats", "v1").mkdir()
    old.save(statistics_file(hub.folder("me/stats", "v1"), FIRST))
    cfg = TopKTrainingSAEConfig(d_in=8, d_sae=16, k=2)
    cfg.metadata.hook_name = FIRST
    for source, expected in (("me/stats", new), ("me/stats@v1", old)):
        source = WhiteningConfig(statistics=source).statistics
        assert source is not None
        assert same(load_statistics(source, cfg), expected)
    cfg.metadata.hook_name = SECOND
    with pytest.raises(FileNotFoundError, match=f"no statistics of {SECOND}.*{FIRST}"):
        load_statistics("me/stats", cfg)


def test_inspect_reads_a_repo(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    statistics_of(FIRST).push_to_hub("me/stats")
    statistics_of(SECOND).push_to_hub("me/stats")
    assert main(["inspect", "me/stats", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {FIRST, SECOND}
    assert main(["inspect", "me/none"]) == 2
    assert "does not exist" in capsys.readouterr().err
