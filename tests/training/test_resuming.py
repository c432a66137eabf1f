"""A run is resumed where it was interrupted: on the same model, data and settings."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Array2D, Dataset, Features, load_from_disk
from sae_lens import TopKTrainingSAEConfig

from sae_whiten import WhiteningConfig, WhiteningTrainingRunner
from sae_whiten.training.activations_store import ResumableActivationsStore
from tests.support import runner_config, tiny_dataset, tiny_model

BATCH, STEPS = 64, 12
FEW = WhiteningConfig(n_samples=256)


def runner(dataset: Any = None, model: Any = None, **options: Any) -> WhiteningTrainingRunner:
    defaults: dict[str, Any] = {
        "sae": TopKTrainingSAEConfig(
            d_in=32, d_sae=64, k=8, normalize_activations="covariance_whitening"
        ),
        "train_batch_size_tokens": BATCH,
        "training_tokens": BATCH * STEPS,
        "n_batches_in_buffer": 8,
    }
    torch.manual_seed(7)
    return WhiteningTrainingRunner(
        runner_config(**{**defaults, **options}),
        FEW,
        override_dataset=dataset or tiny_dataset(60),
        override_model=model or tiny_model(),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of step 7, for which 20 of 60 sequences were read."""
    path = tmp_path_factory.mktemp("checkpoints")
    runner(n_checkpoints=1, checkpoint_path=str(path)).run()
    (found,) = path.glob("*/*")
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "other"}, r"model_name='tiny' \(now 'other'\)"),
        ({"dataset_path": "other"}, r"dataset_path='local' \(now 'other'\)"),
        ({"context_size": 16}, r"context_size=32 \(now 16\)"),
        ({"exclude_special_tokens": [3]}, r"exclude_special_tokens=False \(now \[3\]\)"),
        ({"seqpos_slice": (4, None)}, r"seqpos_slice=\[None\] \(now \[4, None\]\)"),
        ({"n_batches_in_buffer": 12}, r"n_batches_in_buffer=8 \(now 12\)"),
        ({"activations_mixing_fraction": 0.25}, r"activations_mixing_fraction=0\.5 \(now 0\.25\)"),
        ({"store_batch_size_prompts": 2}, r"store_batch_size_prompts=4 \(now 2\)"),
        ({"lr": 0.5}, r"lr=0\.001 \(now 0\.5\)"),
        ({"lr_decay_steps": 2}, r"lr_decay_steps=0 \(now 2\)"),
        ({"lr_warm_up_steps": 2}, r"lr_warm_up_steps=0 \(now 2\)"),
        ({"hook_name": "blocks.0.hook_resid_pre"}, r"hook_name='blocks\.1\.hook_resid_pre' \(now"),
    ],
)
def test_settings_that_decide_the_result_are_refused_if_they_changed(
    options: dict[str, Any], message: str, checkpoint: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        runner(resume_from_checkpoint=str(checkpoint), **options).run()


def test_another_config_of_the_sae_is_refused(checkpoint: Path) -> None:
    sae = TopKTrainingSAEConfig(
        d_in=32,
        d_sae=64,
        k=8,
        aux_loss_coefficient=0.5,
        normalize_activations="covariance_whitening",
    )
    with pytest.raises(ValueError, match=r"aux_loss_coefficient=1\.0 \(now 0\.5\)"):
        runner(resume_from_checkpoint=str(checkpoint), sae=sae).run()


def test_what_does_not_decide_the_result_may_change(checkpoint: Path, tmp_path: Path) -> None:
    expected = runner().run()
    found = runner(
        resume_from_checkpoint=str(checkpoint),
        prefetch_llm_batches=1,
        n_checkpoints=3,
        checkpoint_path=str(tmp_path / "checkpoints"),
        output_path=str(tmp_path / "output"),
        n_eval_batches=3,
        verbose=True,
    ).run()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


def test_fewer_tokens_than_were_trained_are_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path
) -> None:
    trained, output = int(checkpoint.name), tmp_path / "output"
    options = {"resume_from_checkpoint": str(checkpoint), "output_path": str(output)}
    message = f"has {trained:,} tokens already: training_tokens={trained - 1:,} has to be at least"
    with pytest.raises(ValueError, match=message):
        runner(training_tokens=trained - 1, **options).run()
    assert not output.exists()
    equal = runner(training_tokens=trained, **options)
    equal.run()
    assert equal.trainer.n_training_samples == trained


def other_tokens() -> Dataset:
    return tiny_dataset(60, seed=1)


def other_tokens_after_some() -> Dataset:
    rows = list(tiny_dataset(60)["input_ids"])
    rows[10] = rows[11]
    return Dataset.from_dict({"input_ids": rows})


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (other_tokens, "does not begin with the sequence"),
        (other_tokens_after_some, "first [0-9]+ sequences"),
        (lambda: tiny_dataset(59), "of 60 rows, and this one has 59"),
        (lambda: tiny_dataset(8).to_iterable_dataset(), "ends after 8"),
    ],
)
def test_other_data_are_refused(dataset: Callable[[], Any], message: str, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=message):
        runner(dataset(), resume_from_checkpoint=str(checkpoint)).run()


def test_the_same_data_streamed_are_resumed(checkpoint: Path) -> None:
    expected = runner().run()
    streamed = tiny_dataset(60).to_iterable_dataset()
    found = runner(streamed, resume_from_checkpoint=str(checkpoint)).run()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


def test_other_weights_of_the_model_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"another model.*hook_resid_pre.*differ by"):
        runner(model=tiny_model(1), resume_from_checkpoint=str(checkpoint)).run()
    nearly = tiny_model()
    with torch.no_grad():
        for parameter in nearly.parameters():  # a few steps of fine-tuning
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    with pytest.raises(ValueError, match="another model"):
        runner(model=nearly, resume_from_checkpoint=str(checkpoint)).run()


def test_rounding_of_another_machine_is_no_other_model(checkpoint: Path) -> None:
    made = runner(resume_from_checkpoint=str(checkpoint))
    store = made.activations_store
    get_activations = store.get_activations
    noise = 1 + 1e-5 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    store.get_activations = lambda batch_tokens: get_activations(batch_tokens) * noise
    made.run()


def test_other_cached_activations_are_refused(tmp_path: Path) -> None:
    hook = "blocks.1.hook_resid_pre"
    features = Features({hook: Array2D(shape=(32, 32), dtype="float32")})

    def cache(name: str, seed: int, n_rows: int) -> str:
        acts = torch.randn(n_rows, 32, 32, generator=torch.Generator().manual_seed(seed))
        path = str(tmp_path / name)
        Dataset.from_dict({hook: acts.numpy()}, features=features).save_to_disk(path)
        return path

    def store(path: str) -> ResumableActivationsStore:
        cfg = runner_config(use_cached_activations=True, cached_activations_path=path)
        made = ResumableActivationsStore.from_config(
            tiny_model(), cfg, override_dataset=tiny_dataset()
        )
        assert isinstance(made, ResumableActivationsStore)
        return made

    first = store(cache("first", 0, 40))
    for _ in range(5):
        first.next_batch()
    first.save_to_checkpoint(tmp_path)
    store(str(tmp_path / "first")).load_from_checkpoint(tmp_path)
    assert len(load_from_disk(str(tmp_path / "first"))) == 40
    with pytest.raises(ValueError, match="of 40 rows, and this one has 30"):
        store(cache("shorter", 0, 30)).load_from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="other cached activations"):
        store(cache("other", 1, 40)).load_from_checkpoint(tmp_path)


def test_a_damaged_config_of_the_runner_is_named(checkpoint: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(checkpoint, tmp_path / "copy")
    (copied / "runner_cfg.json").write_text("{")
    with pytest.raises(ValueError, match=r"runner_cfg\.json"):
        runner(resume_from_checkpoint=str(copied)).run()
    (copied / "runner_cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"runner_cfg\.json"):
        runner(resume_from_checkpoint=str(copied)).run()
    assert json.loads((checkpoint / "runner_cfg.json").read_text())["model_name"] == "tiny"
