"""The main job on a real pretrained model, in small: all-MiniLM-L6-v2 from its PyPI package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file

from sae_whiten import ActivationStatistics, Whitening


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the demo writes, and what it prints, without a network."""
    path = tmp_path_factory.mktemp("demo")
    options = ["--tokens", "10240", "--d-sae", "512", "--k", "16", "--out", str(path)]
    process = subprocess.run(
        [sys.executable, "-m", "sae_whiten", "demo", *options],
        capture_output=True,
        text=True,
        check=False,
        # a hub that cannot be reached: whatever is fetched fails
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "TQDM_DISABLE": "1"},
    )
    assert process.returncode == 0, process.stderr
    return path, process.stdout


def test_the_table_is_of_what_is_on_disk(demo):
    path, printed = demo
    x = load_file(path / "held_out_activations.safetensors")["activations"]
    for name, column in (("plain", 0), ("whitened", 1)):
        sae = SAE.load_from_disk(path / name)
        with torch.no_grad():
            error = (x - sae(x)).double().square().sum()
        explained = 1 - float(error / (x.double() - x.double().mean(0)).square().sum())
        (line,) = [line for line in printed.splitlines() if "explained variance " in line][:1]
        assert float(line.split()[-2 + column]) == pytest.approx(explained, abs=6e-4)
        assert explained > 0.2
    assert (path / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_on_a_real_singular_covariance_the_fold_is_exact_and_nothing_is_blown_up(demo):
    path, _ = demo
    metadata = json.loads((path / "whitened" / "cfg.json").read_text())["metadata"]
    check = metadata["whitening"]["fold"]["check"]
    assert check["source"] == "held-out"
    assert check["fold_error"] < 1e-5
    whitening = Whitening.load(path / "whitened" / "sae_whiten" / "whitening.safetensors")
    spectrum = whitening.covariance_eigenvalues
    assert spectrum[0] < 1e-10 * spectrum[-1]  # after a LayerNorm
    x = load_file(path / "held_out_activations.safetensors")["activations"]
    statistics = ActivationStatistics(384)
    statistics.update(whitening.whiten(x))
    whitened = torch.linalg.eigvalsh(statistics.covariance)
    assert whitened[-1] < 10
    assert (whitened[1:] > 0.1).all()


def test_no_figure_is_printed_that_means_nothing_on_this_model(demo):
    assert "loss" not in demo[1]
