"""`fit_statistics` in several processes; one start of them serves several cases."""

import contextlib
import io
import os
import signal
from typing import Any

import pytest
import torch
from datasets import Dataset

from sae_whiten import ActivationStatistics, fit_statistics
from sae_whiten.cli import main
from tests.ranks import run_ranks
from tests.support import tiny_dataset, tiny_model

HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z"]
ALL: dict[str, Any] = {"n_samples": 10**9, "context_size": 32}


def fit_shards(rank: int, cases: list[tuple[Dataset, str]], blocked: str) -> list[Any]:
    results: list[Any] = []
    for dataset, out in cases:
        found = fit_statistics(tiny_model(), dataset, HOOKS, out=out, **ALL)
        results.append({name: (s.n_samples, s.covariance) for name, s in found.items()})
    adaptive: dict[str, Any] = {"tolerance": 0.08, "context_size": 32, "batch_size_prompts": 8}
    found = fit_statistics(tiny_model(), tiny_dataset(400), HOOKS, **adaptive)
    results.append({n: (s.n_samples, s.provenance["inflation"]) for n, s in found.items()})
    model = tiny_model()
    passes = 0

    def poison(tensor: torch.Tensor, *, hook: object) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if rank == 1 and passes == 3:
            tensor[0, 1] = float("nan")
        return tensor

    model.hook_dict[HOOKS[0]].add_perma_hook(poison)
    try:
        fit_statistics(model, tiny_dataset(400), HOOKS, batch_size_prompts=8, **ALL)
    except Exception as error:
        results.append(f"{type(error).__name__}: {error}")
    try:
        fit_statistics(tiny_model(), tiny_dataset(40), HOOKS, out=blocked, **ALL)
    except Exception as error:
        results.append(f"{type(error).__name__}: {error}")
    return results


def test_two_processes_fit_what_one_does_with_unequal_and_empty_shards(tmp_path):
    sizes = (101, 1)
    cases = [(tiny_dataset(n), str(tmp_path / f"two-{n}")) for n in sizes]
    blocked = tmp_path / "blocked"
    (blocked / f"{HOOKS[0]}.safetensors").mkdir(parents=True)
    first, second = run_ranks(fit_shards, cases, str(blocked))
    for i, n in enumerate(sizes):
        alone = fit_statistics(tiny_model(), tiny_dataset(n), HOOKS, **ALL)
        for name in HOOKS:
            reference = alone[name].covariance
            assert first[i][name][0] == second[i][name][0] == alone[name].n_samples == 32 * n
            assert torch.equal(first[i][name][1], second[i][name][1])
            # float32 products of the model in batches of another size
            assert (first[i][name][1] - reference).norm() <= 1e-6 * reference.norm()
            saved = ActivationStatistics.load(tmp_path / f"two-{n}" / f"{name}.safetensors")
            assert torch.equal(saved.covariance, first[i][name][1])
        files = sorted(p.name for p in (tmp_path / f"two-{n}").iterdir())
        assert files == sorted(f"{name}.safetensors" for name in HOOKS)
    adaptive = first[len(sizes)]
    assert adaptive == second[len(sizes)]
    for n_samples, inflation in adaptive.values():
        assert n_samples < 400 * 32  # enough before the data ended, for
        assert inflation <= 0.08
    where = "hook blocks.0.hook_resid_pre, batch 2, sequence 16, position 1"
    assert second[-2].startswith(f"NonFiniteActivationsError: {where}")
    assert first[-2].startswith(f"DistributedError: process 1 failed: {where}")
    assert first[-1].startswith("IsADirectoryError")
    assert second[-1].startswith("DistributedError: process 0 failed: [Errno 21]")


def fit_until_one_is_killed(rank: int, out: str) -> Any:
    from sae_whiten.estimation import progress

    progress._SAVE_EVERY_SECONDS = 0.0
    passes = 0
    model = tiny_model()

    def die(tensor: torch.Tensor, *, hook: object) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if rank == 1 and passes == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return tensor

    model.hook_dict[HOOKS[0]].add_perma_hook(die)
    fit_statistics(model, tiny_dataset(80), HOOKS, out=out, batch_size_prompts=8, **ALL)


def fit_again(rank: int, out: str) -> Any:
    model = tiny_model()
    n_passes = 0

    def count(tensor: torch.Tensor, *, hook: object) -> torch.Tensor:
        nonlocal n_passes
        n_passes += 1
        return tensor

    model.hook_dict[HOOKS[0]].add_perma_hook(count)
    arguments: dict[str, Any] = {"batch_size_prompts": 8, **ALL}
    found = fit_statistics(model, tiny_dataset(80), HOOKS, out=out, **arguments)
    n_continued, n_passes = n_passes, 0
    whole = fit_statistics(model, tiny_dataset(80), HOOKS, **arguments)
    same = all(torch.equal(found[name].covariance, whole[name].covariance) for name in HOOKS)
    return n_continued, n_passes, same


def test_after_a_process_was_killed_all_go_on_from_the_round_they_have_in_common(tmp_path):
    survivor, killed = run_ranks(fit_until_one_is_killed, str(tmp_path))
    assert survivor.startswith("DistributedError")
    assert killed is None
    for n_continued, n_passes, same in run_ranks(fit_again, str(tmp_path)):
        assert 0 < n_continued < n_passes == 5
        assert same
    assert not (tmp_path / ".fit_progress").exists()


def fit_from_the_command_line(rank: int, *arguments: str) -> tuple[int, str]:
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("sae_lens.load_model.load_model", lambda *args, **options: tiny_model())
        return main(["fit", *arguments]), printed.getvalue()


def test_the_command_joins_the_processes_that_torchrun_starts(tmp_path):
    tiny_dataset(40).to_json(tmp_path / "data" / "data.jsonl")
    arguments = ["--model-name", "tiny", "--dataset-path", str(tmp_path / "data")]
    arguments += ["--hook-name", HOOKS[0], "--context-size", "32", "--n-samples", "100000"]
    arguments += ["--out", str(tmp_path / "out")]
    first, second = run_ranks(fit_from_the_command_line, *arguments, join=False)
    assert first[0] == second[0] == 0
    assert "activations of width 32" in first[1]  # said by one of them
    assert "activations of width 32" not in second[1]
    saved = ActivationStatistics.load(tmp_path / "out" / f"{HOOKS[0]}.safetensors")
    assert saved.n_samples == 40 * 32
