"""Folders of statistics: a hook's name names a file in them, and never leads out of them."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_whiten import ActivationStatistics, fit_statistics
from sae_whiten._hub import file_name, hook_names
from sae_whiten.cli import main
from sae_whiten.estimation.folders import (
    find_all_statistics,
    find_statistics,
    push_folder,
    statistics_file,
    write_upload,
)
from tests.support import friendly

HOSTILE = ["../../victim/model", "..", "a/../../b", "/absolute", "C:\\model", "..\\b", ".hidden"]


def cached(path: Path, *columns: str) -> Path:
    """A dataset as `CacheActivationsRunner` writes it, from somebody who chose its columns."""
    features = {name: datasets.Array2D((4, 8), "float32") for name in columns}
    values = friendly(80, 8).reshape(20, 4, 8).numpy()
    datasets.Dataset.from_dict(
        dict.fromkeys(columns, np.asarray(values)), features=datasets.Features(features)
    ).save_to_disk(str(path))
    return path


def statistics_of(hook_name: str) -> ActivationStatistics:
    statistics = ActivationStatistics(8)
    statistics.update(friendly(100, 8))
    statistics.provenance["hook_name"] = hook_name
    return statistics


def everything_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", [*HOSTILE, "../victim/model"])
def test_the_columns_of_a_foreign_cache_write_nothing_outside_the_folder(name, tmp_path):
    cache = cached(tmp_path / "cache", name if name != "/absolute" else f"{tmp_path}/absolute")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "model.safetensors").write_text("precious")
    before = everything_in(tmp_path)
    out = tmp_path / "deep" / "out"
    arguments = ["fit", "--cached-activations", str(cache), "--hook-name", "**", "--out", str(out)]
    assert main([*arguments, "--n-samples", "50"]) == 0
    new = everything_in(tmp_path) - before
    assert len(new) == 1
    assert all(path.startswith("deep/out/") and path.count("/") == 2 for path in new)
    assert (tmp_path / "victim" / "model.safetensors").read_text() == "precious"
    (file,) = find_all_statistics(out)
    hook_name = ActivationStatistics.load(file).provenance["hook_name"]
    assert find_statistics(out, hook_name) == file


@pytest.mark.parametrize("name", HOSTILE)
def test_no_statistics_are_read_from_outside_the_folder(name, tmp_path):
    folder = tmp_path / "a" / "stats"
    folder.mkdir(parents=True)
    for target in (folder / f"{name}.safetensors", tmp_path / "victim" / "model.safetensors"):
        if target.resolve().parent != folder:
            statistics_of(name).save(target.resolve())
    with pytest.raises(FileNotFoundError, match="no statistics of"):
        find_statistics(folder, name)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_every_name_is_one_file_and_comes_back_from_it(name):
    file = file_name(name)
    assert Path(file).name == file
    assert file not in (".", "..")
    assert hook_names([file]) == [name]


@pytest.mark.parametrize("name", ["blocks.0.hook_resid_pre", "bert.encoder.layer.2", "a b[1]"])
def test_names_of_hooks_as_models_have_them_are_those_of_their_files(name):
    assert file_name(name) == f"{name}.safetensors"


@pytest.mark.parametrize("name", ["with/slash", "100%", "what?", "%41"])
def test_folders_of_earlier_versions_are_read(name, tmp_path):
    file = tmp_path / f"{name}.safetensors"
    statistics_of(name).save(file)
    assert find_statistics(tmp_path, name) == file
    statistics_of(name).save(statistics_file(tmp_path, name))
    assert find_statistics(tmp_path, name) == statistics_file(tmp_path, name)


@pytest.mark.parametrize("name", ["", "a" * 201])
def test_a_name_that_no_file_can_have_is_refused_before_anything_is_read(name, tmp_path):
    cache = cached(tmp_path / "cache", name or "other")
    with pytest.raises(ValueError, match="hook name"):
        if name:
            fit_statistics(None, None, "**", cached_activations=cache, out=tmp_path / "out")
        statistics_file(tmp_path, name)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        fit_statistics(
            None, None, "**", cached_activations=cached(tmp_path / "c", "h"), out=tmp_path / "file"
        )


def test_a_pushed_name_stays_inside_the_repo(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("sae_whiten._hub.upload", lambda files, *rest: sent.append(files) or "url")
    statistics_of("../../model").save(tmp_path / "x.safetensors")
    push_folder(tmp_path, "user/name")
    assert [file_name(name) for name in sent[0]] == ["%2E.%2F..%2Fmodel.safetensors"]


def test_statistics_without_a_spectrum_have_a_card_without_the_figure(tmp_path: Path) -> None:
    statistics = ActivationStatistics(4)
    statistics.update(torch.ones(3, 4))  # no variance
    statistics.provenance = {"hook_name": "h"}
    statistics.save(tmp_path / "stats" / "h.safetensors")
    write_upload(tmp_path / "stats", tmp_path / "upload", "me/stats")
    assert "spectra.png" not in (tmp_path / "upload" / "README.md").read_text()
    assert not (tmp_path / "upload" / "spectra.png").exists()
