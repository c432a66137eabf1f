"""What checkpoints and finished SAEs have to hold, and what is refused."""

from pathlib import Path

import pytest

from sae_whiten.training.checkpoint import is_complete_sae
from tests.support import training_sae


def test_an_sae_is_complete_if_it_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not is_complete_sae(tmp_path)
    weights, _ = training_sae("topk", normalize_activations="none").save_inference_model(tmp_path)
    assert is_complete_sae(tmp_path)
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert not is_complete_sae(tmp_path)
    assert str(tmp_path) in caplog.text
    weights.unlink()
    assert not is_complete_sae(tmp_path)
