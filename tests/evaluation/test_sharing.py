"""What is uploaded of a finished SAE, and what its card says."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE

from sae_whiten import ActivationStatistics
from sae_whiten.architectures.folding import fold_whitening_into_weights
from sae_whiten.cli import main
from sae_whiten.evaluation.sharing import find_saes, model_card, push_saes, write_upload
from sae_whiten.training.builtin_checkpoints import fold_builtin_checkpoint
from tests.hub import FakeHub, serving
from tests.support import friendly, training_sae, whitening_of

HOOK = "blocks.1.hook_resid_pre"
D, D_SAE = 8, 16


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with serving(fake) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folded SAE as the runner saves it, with a token in its config."""
    return saved(tmp_path / "sae")


def saved(path: Path) -> Path:
    x = friendly(200, D)
    sae, whitening = training_sae("topk", D, D_SAE), whitening_of(x)
    fold_whitening_into_weights(sae, whitening, activations=x)
    for name, value in {
        "model_name": "gpt2",
        "hook_name": HOOK,
        "l0": 7.5,
        "explained_variance": 0.8125,
        "num_dead_features": 3,
        "model_from_pretrained_kwargs": {"token": "hf_" + "a" * 30},
    }.items():
        setattr(sae.cfg.metadata, name, value)
    sae.save_inference_model(path)
    (path / "runner_cfg.json").write_text(json.dumps({"api_key": "secret-of-the-run", "lr": 1e-3}))
    whitening.save(path / "sae_whiten" / "whitening.safetensors")
    return path


def files(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


def test_the_sae_alone_is_uploaded_and_comes_back(folder: Path, hub: FakeHub) -> None:
    url = push_saes(find_saes(folder), "me/sae")
    assert url.startswith("https://huggingface.co/me/sae/commit/")
    assert files(hub.folder("me/sae")) == {
        "README.md",
        f"{HOOK}/README.md",
        f"{HOOK}/spectrum.png",
        f"{HOOK}/cfg.json",
        f"{HOOK}/runner_cfg.json",
        f"{HOOK}/sae_weights.safetensors",
    }
    back, original = SAE.from_pretrained("me/sae", HOOK), SAE.load_from_disk(folder)
    assert torch.equal(back.W_enc, original.W_enc)
    assert torch.equal(back.W_dec, original.W_dec)


def test_the_card_has_saelens_tag_and_says_how_the_sae_was_trained(
    folder: Path, tmp_path: Path
) -> None:
    write_upload(find_saes(folder), tmp_path / "upload", "me/sae")
    card = ModelCard.load(tmp_path / "upload" / "README.md")
    assert card.data.to_dict()["library_name"] == "saelens"
    assert "saelens" in card.data.to_dict()["tags"]
    for fact in (
        "| model | `gpt2` |",
        f"| hook | `{HOOK}` |",
        "| L0 | `7.5` |",
        "| explained variance | `0.812` |",
        "| dead latents | `3` |",
        "| loss in | `original space` |",
        "fold error",
        "| condition number of the covariance, without null directions |",
        # they may hold less than half of the variance
        "| participation ratio, the effective number of directions |",
        "| learning rate | `0.001` |",
        f"![Spectrum of the covariance]({HOOK}/spectrum.png)",
        f'SAE.from_pretrained("me/sae", "{HOOK}")',
    ):
        assert fact in card.text
    assert "import sae_whiten" not in card.text
    # the card of the SAE lies beside the figure
    assert "](spectrum.png)" in (tmp_path / "upload" / HOOK / "README.md").read_text()
    assert (tmp_path / "upload" / HOOK / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_settings_beside_the_folder_are_taken_only_from_a_run_that_names_the_sae(
    folder: Path,
) -> None:
    (folder / "runner_cfg.json").unlink()
    beside = folder.parent / "runner_cfg.json"
    for saes, is_of_it in ({"sae": {}}, True), ({"other": {}}, False), (None, False):
        beside.write_text(json.dumps({"saes": saes, "seed": 7}))
        assert ("| seed | `7` |" in model_card(folder, "me/sae", "sae")) == is_of_it


def test_no_dead_latents_after_too_few_steps_are_not_reported_as_0(folder: Path) -> None:
    settings = {"training_tokens": 640, "train_batch_size_tokens": 64}
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["num_dead_features"] = 0
    (folder / "cfg.json").write_text(json.dumps(config))
    for window, known in ((9, True), (10, False)):
        written = json.dumps({**settings, "dead_feature_window": window})
        (folder / "runner_cfg.json").write_text(written)
        assert ("dead latents" in model_card(folder, "me/sae", "sae")) == known


def test_an_sae_without_its_whitening_beside_it_has_a_card_without_the_figure(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "sae_whiten" / "whitening.safetensors").unlink()
    write_upload(find_saes(folder), tmp_path / "upload", "me/sae")
    assert "spectrum.png" not in (tmp_path / "upload" / "README.md").read_text()
    assert not list((tmp_path / "upload").rglob("*.png"))


def test_an_sae_that_saelens_folded_has_a_card_without_the_settings_of_its_whitening(
    tmp_path: Path,
) -> None:
    sae = training_sae("topk", D, D_SAE)
    sae.cfg.normalize_activations = "none"
    sae.save_model(tmp_path / "final_1000")
    fold_builtin_checkpoint(tmp_path / "final_1000", tmp_path / "sae", state="folded")
    card = model_card(tmp_path / "sae", "me/sae", "sae")
    section = card.partition("## Whitening")[2].partition("## Use")[0]
    assert "is folded into the weights" in section
    assert "|" not in section


def test_nothing_that_is_secret_is_uploaded(folder: Path, tmp_path: Path) -> None:
    write_upload(find_saes(folder), tmp_path / "upload", "me/sae")
    for name in files(tmp_path / "upload"):
        content = (tmp_path / "upload" / name).read_bytes()
        assert b"hf_aaa" not in content
        assert b"secret-of-the-run" not in content
    assert json.loads((tmp_path / "upload" / HOOK / "runner_cfg.json").read_text())["lr"] == 1e-3


def test_a_card_of_an_architecture_of_ours_says_what_to_import(tmp_path: Path) -> None:
    config = {"architecture": "top_afa", "d_in": D, "d_sae": D_SAE, "afa_coefficient": 0.1}
    TrainingSAE.from_dict(config).save_inference_model(tmp_path / "sae")
    saes = find_saes(tmp_path / "sae", "layer_1/afa")
    write_upload(saes, tmp_path / "upload", "me/sae")
    card = (tmp_path / "upload" / "layer_1" / "afa" / "README.md").read_text()
    assert "import sae_whiten" in card
    assert "pip install sae-whiten" in card


def test_several_saes_go_by_their_folders_and_a_readme_that_is_there_stays(
    tmp_path: Path, hub: FakeHub
) -> None:
    for name in ("early", "late"):
        saved(tmp_path / "saes" / name)
    push_saes(find_saes(tmp_path / "saes"), "me/saes", private=True)
    assert hub.private["me/saes"]
    readme = hub.folder("me/saes") / "README.md"
    assert all(f'"me/saes", "{name}"' in readme.read_text() for name in ("early", "late"))
    readme.write_text("mine")
    push_saes(find_saes(tmp_path / "saes" / "late", "later"), "me/saes")
    assert readme.read_text() == "mine"
    assert "later/README.md" in files(hub.folder("me/saes"))


def test_saes_in_folders_of_folders_are_all_uploaded(
    tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    # the runner of several SAEs writes those named "early/k4" there
    names = ["early/k4", "early/k8", "later/still/k4"]
    for name in names:
        saved(tmp_path / "saes" / name)
    assert main(["--quiet", "push", str(tmp_path / "saes"), "me/saes"]) == 0
    printed = capsys.readouterr().out
    assert all(f'SAE.from_pretrained("me/saes", "{name}")' in printed for name in names)
    original = SAE.load_from_disk(tmp_path / "saes/early/k4")
    assert torch.equal(SAE.from_pretrained("me/saes", "early/k4").W_enc, original.W_enc)
    readme = (hub.folder("me/saes") / "README.md").read_text()
    for name in names:
        assert f"({name}/spectrum.png)" in readme
        assert f"{name}/spectrum.png" in files(hub.folder("me/saes"))


def test_saes_are_found_at_any_depth_without_what_belongs_to_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "a/b", "c", "c/inference", "d/e", "inference"):
        (tmp_path / "saes" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "saes" / name / "cfg.json").write_text("{}")
    (tmp_path / "saes" / "link").symlink_to(tmp_path / "saes" / "d" / "e")
    found = find_saes(tmp_path / "saes")
    assert list(found) == ["a", "a/b", "c", "d/e", "inference", "link"]
    assert found["d/e"] == tmp_path / "saes" / "d" / "e"
    for name in ("a/b", "c"):
        (tmp_path / "saes" / name / "trainer_state.pt").write_text("")
    (tmp_path / "saes" / "d" / "e" / "whitened_training_state").mkdir()
    assert not caplog.records
    assert list(find_saes(tmp_path / "saes")) == ["a", "inference"]
    (warning,) = caplog.messages
    assert "checkpoints" in warning
    assert str(tmp_path / "saes" / "a" / "b") in warning
    # checkpoints alone are what is meant
    assert list(find_saes(tmp_path / "saes" / "d")) == ["e"]


def test_what_cannot_be_shared_is_refused_before_anything_is_sent(
    folder: Path, tmp_path: Path, hub: FakeHub
) -> None:
    training_sae("topk", D, D_SAE).save_inference_model(tmp_path / "whitened")
    with pytest.raises(ValueError, match="normalised activations.*sae-whiten fold"):
        push_saes(find_saes(tmp_path / "whitened"), "me/sae")
    # a checkpoint of SAELens from before the scale is folded into the weights
    scaled = training_sae("topk", D, D_SAE)
    scaled.cfg.normalize_activations = "expected_average_only_in"
    scaled.save_inference_model(tmp_path / "scaled")
    with pytest.raises(ValueError, match="normalised activations.*the end of training"):
        push_saes(find_saes(tmp_path / "scaled"), "me/sae")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cfg.json").write_text("{}")
    with pytest.raises(ValueError, match="not an SAE that SAELens loads"):
        push_saes(find_saes(tmp_path / "broken"), "me/sae")
    for sae_id in ("../other", "/etc"):
        with pytest.raises(ValueError, match="a folder's name"):
            find_saes(folder, sae_id)
    with pytest.raises(FileNotFoundError, match=r"no cfg\.json"):
        find_saes(tmp_path / "whitened" / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(FileExistsError):
        write_upload(find_saes(folder), tmp_path / "full", "me/sae")
    assert not hub.requests


def test_a_dry_run_does_not_write_where_the_next_push_would_find_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "dry"
    assert main(["push", str(folder), "me/sae", "--dry-run", str(out)]) == 2
    assert "choose a folder elsewhere" in capsys.readouterr().err
    assert not out.exists()


def test_a_checkpoint_that_does_not_load_names_the_form_that_does(
    tmp_path: Path, hub: FakeHub
) -> None:
    sae = training_sae("batchtopk", D, D_SAE)
    sae.cfg.normalize_activations = "none"
    sae.save_model(tmp_path)
    sae.save_inference_model(tmp_path / "inference")
    with pytest.raises(ValueError, match="not an SAE that SAELens loads.*for inference is in"):
        push_saes(find_saes(tmp_path), "me/sae")
    push_saes(find_saes(tmp_path / "inference"), "me/sae")


def test_the_command_dry_or_not(
    folder: Path, tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "upload"
    assert main(["--quiet", "push", str(folder), "me/sae", "--dry-run", str(out)]) == 0
    assert not hub.requests
    assert main(["--quiet", "push", str(folder), "me/sae"]) == 0
    assert f'SAE.from_pretrained("me/sae", "{HOOK}")' in capsys.readouterr().out
    assert files(hub.folder("me/sae")) == files(out)


def test_the_command_with_statistics(
    tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics = ActivationStatistics(D)
    statistics.update(friendly(100, D))
    statistics.provenance = {"model_name": "gpt2", "hook_name": HOOK}
    statistics.save(tmp_path / "stats" / f"{HOOK}.safetensors")
    command = ["--quiet", "push", str(tmp_path / "stats"), "me/stats"]
    assert main([*command, "--dry-run", str(tmp_path / "upload")]) == 0
    assert not hub.requests
    assert main(command) == 0
    assert files(hub.folder("me/stats")) == files(tmp_path / "upload")
    assert "](spectra.png)" in (tmp_path / "upload" / "README.md").read_text()
    assert (hub.folder("me/stats") / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--sae-id", "x"]) == 2
    assert "--sae-id" in capsys.readouterr().err
