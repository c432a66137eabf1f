"""The main job on a real pretrained model, in small: all-MiniLM-L6-v2 from its PyPI package."""

import contextlib
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file

from sae_whiten import ActivationStatistics, Whitening
from sae_whiten._checks import FieldError
from sae_whiten.cli import main
from sae_whiten.comparison import demo as job
from sae_whiten.comparison import demo_text
from sae_whiten.evaluation import labels
from tests.processes import run_code

# what `python evaluate_saes.py` does, which knows SAELens and nothing of ours, without a network
EVALUATE = """
    import runpy, socket, sys
    socket.getaddrinfo = None
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the demo writes, and what it prints, without a network."""
    path = tmp_path_factory.mktemp("demo")
    options = ["--tokens", "10240", "--d-sae", "512", "--k", "16", "--out", str(path)]
    docstrings, texts = demo_text._docstrings, labels.library_texts

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("there is no network")

    def evaluate(command: list[str], **options: Any) -> Any:
        return run_code(EVALUATE, *command[1:])

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("socket.getaddrinfo", refuse)
        patch.setattr(job.subprocess, "run", evaluate)
        patch.setattr(demo_text, "_N_HELD_OUT", 5 * demo_text.SEQUENCES_PER_BATCH)
        patch.setattr(demo_text, "_docstrings", lambda s: itertools.islice(docstrings(s), 150))
        few = ("numpy", "pandas")
        patch.setattr(labels, "library_texts", lambda n, seed: texts(8, seed, few))
        assert main(["demo", *options]) == 0
    return path, printed.getvalue()


VERSIONS, CONDITIONS = ("tame", "anisotropic"), ("none", "centred", "original")


def cells(printed: str, name: str) -> list[float]:
    (line,) = [line for line in printed.splitlines() if line.strip().startswith(name)]
    return [float(cell) for cell in line.split()[-6:]]


def test_the_table_is_of_what_is_on_disk(demo):
    path, printed = demo
    explained, dead = [], []
    for version in VERSIONS:
        x = load_file(path / version / "activations.safetensors")["activations"]
        for condition in CONDITIONS:
            sae = SAE.load_from_disk(path / version / condition)
            with torch.no_grad():
                error = (x - sae(x)).double().square().sum()
                dead.append(int((sae.encode(x) != 0).any(0).logical_not().sum()))
            explained.append(1 - float(error / (x.double() - x.double().mean(0)).square().sum()))
    assert cells(printed, "explained variance") == pytest.approx(explained, abs=6e-4)
    assert cells(printed, "dead latents, of") == dead
    assert min(cells(printed, "accuracy of a probe on 20 latents")) > 0.5
    assert (path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_for_each_training_says_what_the_table_says(demo):
    _, printed = demo
    lines = [line.split() for line in printed.splitlines() if line.endswith(" s")]
    assert [line[:2] for line in lines] == [[f"{v},", c] for v in VERSIONS for c in CONDITIONS]
    explained = [float(line[4].strip(",")) for line in lines]
    assert explained == pytest.approx(cells(printed, "explained variance"), abs=2e-3)
    assert [int(line[5]) for line in lines] == cells(printed, "dead latents, of")
    assert "sae-whiten features SAE" in printed
    assert "--context-size 256 --out gpt2-stats\n" in printed  # as in the guides


def test_the_map_keeps_what_a_linear_probe_can_find(demo):
    path, _ = demo
    tame, mapped = (
        load_file(path / version / "activations.safetensors")["activations"].double()
        for version in VERSIONS
    )
    ones = torch.ones(len(tame), 1, dtype=torch.float64)
    found = torch.linalg.lstsq(torch.cat([mapped, ones], 1), tame, driver="gelsd").solution
    error = torch.cat([mapped, ones], 1) @ found - tame
    assert error.square().sum() < 1e-4 * (tame - tame.mean(0)).square().sum()
    assert mapped.mean(0).norm() / mapped.var(0).sum().sqrt() == pytest.approx(3, rel=0.05)


def test_on_a_real_singular_covariance_the_fold_is_exact_and_nothing_is_blown_up(demo):
    path, _ = demo
    sae = path / "tame" / "original"
    metadata = json.loads((sae / "cfg.json").read_text())["metadata"]
    check = metadata["whitening"]["fold"]["check"]
    assert check["source"] == "next"
    assert check["fold_error"] < 1e-5
    whitening = Whitening.load(sae / "sae_whiten" / "whitening.safetensors")
    spectrum = whitening.covariance_eigenvalues
    assert spectrum[0] < 1e-10 * spectrum[-1]  # after a LayerNorm
    x = load_file(path / "tame" / "activations.safetensors")["activations"]
    statistics = ActivationStatistics(384)
    statistics.update(whitening.whiten(x))
    whitened = torch.linalg.eigvalsh(statistics.covariance)
    assert whitened[-1] < 10
    assert (whitened[1:] > 0.1).all()


def test_options_that_cannot_work_are_refused_with_the_reason() -> None:
    with pytest.raises(FieldError, match=r"not more latents can be active than .* \(d_sae=16\)"):
        job.DemoOptions(d_sae=16)
    with pytest.raises(FieldError, match="tokens=100: must be at least one batch, 512"):
        job.DemoOptions(tokens=100)
