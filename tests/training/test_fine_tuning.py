"""Training that starts from a plain SAE."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    TrainingSAE,
)
from torch import Tensor

from sae_whiten import (
    WhiteningTrainer,
)
from tests.reference import (
    BATCH,
    D_IN,
    D_SAE,
    UNIT,
    Basis,
    K,
    Reference,
    activations,
    batches,
    randomised,
    same,
    state,
    topk_config,
    topk_sae,
    trainer_config,
)


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_fine_tuning_starts_with_an_exact_change_of_basis(architecture: str) -> None:
    x = activations(256)
    torch.manual_seed(1)
    options: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "normalize_activations": "none"}
    if architecture == "topk":
        options["k"] = K
    published = randomised(TrainingSAE.from_dict({"architecture": architecture, **options}))
    identity = torch.eye(D_IN, dtype=torch.float64)
    before = Reference.of(published, Basis(torch.zeros(D_IN), identity, identity))

    trainer = WhiteningTrainer(trainer_config(), published, batches(), start_from_folded=True)
    trainer.estimate_whitening()
    whitening = trainer.whitening
    assert whitening is not None
    after = Reference.of(trainer.sae, whitening)
    assert not torch.allclose(after.weights["W_enc"], before.weights["W_enc"])

    # weights in whitened coordinates were rounded to float32 once each, all else is float64
    w = after.weights
    pre = before.pre_activations(x)
    z = (x.double() - whitening.mean) @ whitening.W - w["b_dec"]
    bound = 1.01 * UNIT * (z.abs() @ w["W_enc"].abs() + w["b_enc"].abs())
    assert ((after.pre_activations(x) - pre).abs() <= bound).all()

    latents = pre * (pre > before.level(pre))
    bound = 1.01 * UNIT * (latents @ w["W_dec"].abs() + w["b_dec"].abs()) @ whitening.W_inv.abs()
    off = after.reconstruction(latents, x) - before.reconstruction(latents, x)
    assert (off.abs() <= bound).all()


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaling", "not rescaling"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False], ids=["b_dec", "no b_dec"])
def test_interrupted_fine_tuning_is_resumed_to_the_bit(
    apply_b_dec_to_input: bool, rescale: bool, tmp_path: Path
) -> None:
    def fine_tuning(source: Iterator[Tensor], **changes: Any) -> WhiteningTrainer:
        published = topk_config(
            normalize_activations="none",
            apply_b_dec_to_input=apply_b_dec_to_input,
            rescale_acts_by_decoder_norm=rescale,
        )
        cfg = trainer_config(**changes)
        sae = randomised(topk_sae(published))
        return WhiteningTrainer(cfg, sae, source, start_from_folded=True)

    saving = {"n_checkpoints": 1, "checkpoint_path": str(tmp_path)}
    uninterrupted = fine_tuning(batches(), **saving).fit()
    (checkpoint,) = tmp_path.iterdir()
    rest = itertools.islice(batches(), int(checkpoint.name) // BATCH, None)
    resumed = fine_tuning(rest)
    resumed.load_trainer_state(checkpoint)
    assert same(state(resumed.fit()), state(uninterrupted))
