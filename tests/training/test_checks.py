"""Values that cannot work are refused by name, before anything is loaded."""

from typing import Any

import pytest
import torch
from sae_lens import StandardTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig

from sae_whiten import WhiteningMultiSAETrainingRunner, WhiteningTrainingRunner
from sae_whiten._checks import FieldError, require_context, require_device
from sae_whiten.training.checks import check_runner_config

from ..support import runner_config, tiny_dataset, tiny_model

WHITENED: Any = {"normalize_activations": "covariance_whitening"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, value)
            for name in (
                "training_tokens",
                "train_batch_size_tokens",
                "store_batch_size_prompts",
                "context_size",
                "feature_sampling_window",
                "dead_feature_window",
            )
            for value in (0, -5)
        ],
        ("training_tokens", 127),  # a batch is 128
        ("context_size", 32.5),
        ("lr", -1e-3),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("lr_end", -1e-3),
        ("lr_warm_up_steps", -1),
        ("lr_decay_steps", -1),
        ("adam_beta1", 1.0),
        ("adam_beta2", -0.1),
        ("device", "cuda:99"),
        ("device", "no such device"),
        ("llm_device", "cuda:99"),
        ("act_store_device", "cuda:99"),
    ],
)
def test_fields_of_the_runner(field: str, value: Any) -> None:
    cfg = runner_config()
    setattr(cfg, field, value)
    with pytest.raises(FieldError, match=field) as error:
        check_runner_config(cfg, {"sae": cfg.sae})
    assert (error.value.field, repr(error.value.value)) == (field, repr(value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("d_in", 0), ("d_sae", 0), ("d_sae", -1), ("k", 0), ("k", -1), ("k", 129), ("k", True)],
        ("aux_loss_coefficient", float("nan")),
    ],
)
def test_fields_of_the_sae(field: str, value: Any) -> None:
    sae = TopKTrainingSAEConfig(**{**WHITENED, "d_in": 32, "d_sae": 128, "k": 8, field: value})
    with pytest.raises(FieldError) as error:
        check_runner_config(runner_config(), {"sae": sae})
    assert error.value.field == f"sae.{field}"


def test_what_can_be_trained_is_not_refused() -> None:
    every = TopKTrainingSAEConfig(d_in=32, d_sae=8, k=8)
    mean_of_a_batch = BatchTopKTrainingSAEConfig(d_in=32, d_sae=8, k=0.5)
    no_k = StandardTrainingSAEConfig(d_in=32, d_sae=8)
    cfg = runner_config(training_tokens=1e6, lr=0.0)
    check_runner_config(cfg, {"a": every, "b": mean_of_a_batch, "c": no_k})


def test_a_schedule_longer_than_training_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    # 80 steps
    fitting = runner_config(lr_warm_up_steps=60, lr_decay_steps=20)
    check_runner_config(fitting, {"sae": fitting.sae})
    assert not caplog.records
    longer = runner_config(lr_warm_up_steps=1000, lr_decay_steps=0)
    check_runner_config(longer, {"sae": longer.sae})
    (warning,) = caplog.messages
    assert "lr_warm_up_steps=1000" in warning
    assert "the 80 steps" in warning


def test_runners_refuse_before_they_load_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing is to be loaded first")

    monkeypatch.setattr("sae_lens.llm_sae_training_runner.load_model", load)
    monkeypatch.setattr("sae_lens.multi_sae_training_runner.load_model", load)
    with pytest.raises(FieldError, match="training_tokens=0"):
        WhiteningTrainingRunner(runner_config(training_tokens=0))
    good = TopKTrainingSAEConfig(d_in=32, d_sae=128, k=8, **WHITENED)
    bad = TopKTrainingSAEConfig(d_in=32, d_sae=128, k=200, **WHITENED)
    several = MultiSAETrainingRunnerConfig(
        saes={"good": good, "bad": bad}, hook_names="blocks.1.hook_resid_pre"
    )
    with pytest.raises(FieldError) as error:
        WhiteningMultiSAETrainingRunner(several)
    assert error.value.field == "saes['bad'].k"


def test_runners_refuse_a_context_longer_than_the_models() -> None:
    given: Any = {"override_model": tiny_model(), "override_dataset": tiny_dataset()}
    with pytest.raises(FieldError, match="context_size=33: the model reads at most 32"):
        WhiteningTrainingRunner(runner_config(context_size=33), **given)
    several = MultiSAETrainingRunnerConfig(
        saes={"a": TopKTrainingSAEConfig(d_in=32, d_sae=128, k=8, **WHITENED)},
        hook_names="blocks.1.hook_resid_pre",
        context_size=33,
        n_batches_in_buffer=128,
    )
    with pytest.raises(FieldError, match="context_size=33"):
        WhiteningMultiSAETrainingRunner(several, **given)


def test_contexts_of_models_that_do_not_tell_are_not_refused() -> None:
    require_context(10**6, object())
    require_context(32, tiny_model())
    model = tiny_model()
    model.cfg.positional_embedding_type = "alibi"  # grows with the sequence
    require_context(33, model)


def test_devices() -> None:
    require_device("device", "cpu")
    with pytest.raises(FieldError, match="it can use cpu") as error:
        require_device("device", "cuda:99")
    assert isinstance(error.value, ValueError)
    assert torch.__version__ in error.value.problem
