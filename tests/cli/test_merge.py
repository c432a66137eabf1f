"""`sae-whiten merge`: what must not be merged."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_whiten import ActivationStatistics
from sae_whiten.cli import main
from tests.support import friendly


def save(path: Path, x: torch.Tensor, **provenance: Any) -> str:
    statistics = ActivationStatistics(x.shape[-1])
    if len(x):
        statistics.update(x)
    statistics.provenance = dict(provenance)
    statistics.save(path)
    return str(path)


@pytest.mark.parametrize("how", ["same path", "other spelling", "link", "copy", "other provenance"])
def test_the_same_statistics_are_never_counted_twice(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = friendly(200, 4)
    first, second = save(tmp_path / "a", x[:100], date="1"), save(tmp_path / "b", x[100:])
    twin = tmp_path / "twin"
    if how == "link":
        twin.symlink_to(first)
    elif how == "copy":
        shutil.copy(first, twin)
    elif how == "other provenance":
        save(twin, x[:100], date="2")
    elif how == "other spelling":
        twin = tmp_path / "." / ".." / tmp_path.name / "a"
    else:
        twin = Path(first)
    out = tmp_path / "whole.safetensors"
    assert main(["merge", first, second, str(twin), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert f"{first} and {twin} hold the same statistics" in message
    assert not out.exists()


def test_a_folder_given_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a" / "hook.safetensors", friendly(50, 4))
    folder = str(tmp_path / "a")
    assert main(["merge", folder, folder, "--out", str(tmp_path / "whole")]) == 2
    assert "count twice" in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("out", ["a", "./b/../a", "link", "a/hook", "a/hook.safetensors"])
def test_no_shard_is_overwritten(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [
        Path(save(tmp_path / name / "hook.safetensors", friendly(50, 4, seed)))
        for seed, name in enumerate("ab")
    ]
    (tmp_path / "link").symlink_to(tmp_path / "a")
    if "hook" not in out:
        shards = [shard.parent for shard in shards]
    assert main(["merge", *map(str, shards), "--out", f"{tmp_path}/{out}"]) == 2
    message = capsys.readouterr().err
    assert "overwrite the shard" in message
    assert "hook.safetensors" in message
    assert ActivationStatistics.load(tmp_path / "a" / "hook.safetensors").n_samples == 50


def test_shards_that_are_alike_but_not_the_same_are_merged(tmp_path: Path) -> None:
    x = friendly(300, 4)
    # equal mean and covariance of another number of activations, and two shards without any
    parts = [x[:100], torch.cat([x[:100], x[:100]]), x[100:], x[:0], x[:0]]
    shards = [save(tmp_path / str(i), part) for i, part in enumerate(parts)]
    assert main(["merge", *shards, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "whole.safetensors"  # a file of statistics has this suffix
    merged, rows = ActivationStatistics.load(out), torch.cat(parts).double()
    assert merged.n_samples == len(rows)
    torch.testing.assert_close(merged.covariance, torch.cov(rows.T), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("hook_name", ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre")),
        ("model_name", ("gpt2", "pythia-70m")),
        ("seqpos_slice", ([None], [1, None])),
        ("exclude_special_tokens", (False, [0])),
    ],
)
def test_shards_of_different_things_are_refused_even_with_one_between_that_says_nothing(
    name: str, values: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, out = friendly(300, 4), tmp_path / "whole.safetensors"
    first = save(tmp_path / "a", x[:100], **{name: values[0]})
    silent = save(tmp_path / "b", x[100:200])
    other = save(tmp_path / "c", x[200:], **{name: values[1]})
    assert main(["merge", first, silent, other, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert f"{first} and {other}" in message
    assert f"{name} is {values[0]!r}" in message
    assert not out.exists()
    texts = [save(tmp_path / text, x[i::2], dataset_path=text) for i, text in enumerate("de")]
    assert main(["merge", *texts, "--out", str(out)]) == 0


def test_hooks_that_not_every_folder_has_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    x, out = friendly(200, 4), tmp_path / "whole"
    save(tmp_path / "a" / "hook.safetensors", x[:100])
    save(tmp_path / "a" / "stale.safetensors", x[:100])
    save(tmp_path / "b" / "hook.safetensors", x[100:])
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["merge", *folders, "--out", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["hook.safetensors"]
    assert "stale.safetensors in" in caplog.text
    (tmp_path / "b" / "hook.safetensors").rename(tmp_path / "b" / "other.safetensors")
    assert main(["merge", *folders, "--out", str(out)]) == 2
    assert "no hook" in capsys.readouterr().err


def test_files_are_not_merged_into_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [save(tmp_path / name, friendly(50, 4, seed)) for seed, name in enumerate("ab")]
    assert main(["merge", *shards, "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder" in capsys.readouterr().err


def test_the_digest_is_of_the_numbers_alone(tmp_path: Path) -> None:
    x = friendly(100, 4)
    a, b = ActivationStatistics(4), ActivationStatistics(4)
    a.update(x)
    b.update(x)
    b.provenance["date"] = "today"
    assert a.digest == b.digest
    a.save(tmp_path / "a")
    assert ActivationStatistics.load(tmp_path / "a").digest == a.digest
    for change in (x[:1], x[:1] * float("inf")):
        c = ActivationStatistics(4, on_nonfinite="skip")
        c.update(x)
        c.update(change)
        # a skipped activation changes nothing in the numbers
        assert (c.digest == a.digest) == (not change.isfinite().all())


@pytest.mark.parametrize(
    ("first", "second", "warned"),
    [
        ({"dataset_path": "texts", "split": "train"}, {"dataset_path": "texts"}, True),
        ({"cached_activations": "/cache"}, {"cached_activations": "/a/../cache"}, True),
        ({"dataset_path": "d", "split": "train[:9%]"}, {"dataset_path": "d"}, False),
        ({"dataset_path": "local"}, {"dataset_path": "local"}, False),
        ({}, {}, False),
    ],
)
def test_shards_that_begin_with_the_same_texts_are_warned_about(
    first: dict[str, str],
    second: dict[str, str],
    warned: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = friendly(100, 4)
    shards = [save(tmp_path / "a", x[:50], **first), save(tmp_path / "b", x, **second)]
    assert main(["merge", *shards, "--out", str(tmp_path / "whole")]) == 0
    assert ("count twice" in caplog.text) == warned
