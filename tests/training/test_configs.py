"""The configs of the user are read, never changed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from sae_lens.training.sae_trainer import SAETrainer

from sae_whiten import (
    WhiteningConfig,
    WhiteningTrainer,
)
from tests.reference import (
    batches,
    ours_runner,
    same,
    state,
    topk_config,
    topk_sae,
    trainer_config,
)
from tests.support import runner_config


def test_the_configs_of_the_user_are_not_changed() -> None:
    shared = topk_config()
    SAETrainer(trainer_config(5), topk_sae(shared), batches()).fit()
    assert shared.normalize_activations == "none"  # silently off the second time

    shared = topk_config()
    first = topk_sae(shared)  # sae-lens notes in its config which architecture was made from it
    training, whitening = trainer_config(5), WhiteningConfig()

    def content() -> list[Any]:
        # names of attributes too: sae-lens adds some that are not fields
        configs = [shared.to_dict(), vars(training), vars(whitening), list(vars(shared))]
        return copy.deepcopy(configs)

    before = content()
    first = WhiteningTrainer(training, first, batches(), whitening).fit()
    assert content() == before

    second = WhiteningTrainer(training, topk_sae(shared), batches(), whitening).fit()
    assert same(state(first), state(second))
    assert first.cfg.normalize_activations == second.cfg.normalize_activations == "none"
    assert first.cfg is not second.cfg


def test_a_runner_config_can_be_used_twice(tmp_path: Path) -> None:
    cfg = runner_config(training_tokens=640, output_path=f"{tmp_path}/sae")
    before = copy.deepcopy(cfg.to_dict())
    saes = [ours_runner(cfg).run() for _ in range(2)]
    assert cfg.to_dict() == before
    assert same(state(saes[0]), state(saes[1]))
    assert "whiten" in json.dumps(saes[1].cfg.metadata.whitening)

    # one runner, twice: sae-lens would go on training the folded SAE, without whitening
    runner = ours_runner(cfg)
    weights = state(runner.run())
    with pytest.raises(ValueError, match="normalize_activations='none'"):
        runner.run()
    assert same(weights, state(runner.sae))
