"""Metrics logged during training are those of the original space."""

from typing import Any

import pytest
from sae_lens import (
    LoggingConfig,
)
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_whiten import (
    WhiteningTrainer,
)
from tests.reference import (
    D_IN,
    FEATURES,
    UNIT,
    activations,
    batches,
    run_by_hand,
    topk_sae,
    trainer_config,
)


def test_explained_variance_is_logged_in_the_space_of_the_activations() -> None:
    raw = activations(256)

    def logged(trainer: SAETrainer[Any, Any]) -> tuple[float, Any]:
        run_by_hand(trainer, 40)
        output = trainer.step(raw)
        metrics = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
        return metrics["metrics/explained_variance"], output

    def in_original_space(output: Any, whitening: Any) -> tuple[float, Tensor]:
        x, z = raw.double(), output.sae_out.detach().double()
        error = z @ whitening.inverse_matrix + whitening.mean - x
        variance = (x - x.mean(0)).square().sum()
        return 1 - float(error.square().sum() / variance), error

    trainer: SAETrainer[Any, Any] = SAETrainer(trainer_config(), topk_sae(), batches())
    value, output = logged(trainer)
    actual, _ = in_original_space(output, trainer.activation_scaler.whitening)
    assert abs(value - actual) > 0.01

    trainer = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    value, output = logged(trainer)
    w = trainer.whitening
    assert w is not None
    actual, error = in_original_space(output, w)
    # float32 rounding of scale, of both unscaled values and of their difference; then of sums
    x, z = raw.double(), output.sae_in.double()
    scaling = (D_IN + 4) * UNIT * ((x - w.mean).abs() @ w.W.abs()) @ w.W_inv.abs()
    unscaled = (z.abs() + output.sae_out.detach().double().abs()) @ w.W_inv.abs()
    off = scaling + (D_IN + 4) * UNIT * (unscaled + 2 * w.mean.abs())
    relative = 2 * float((error.abs() * off).sum() / error.square().sum())
    variance = (x - x.mean(0)).abs()
    relative += 2 * float((variance * off).sum() / variance.square().sum())
    relative += 2 * (D_IN + len(raw)) * UNIT
    assert abs(value - actual) <= (1 - actual) * relative
    assert relative < 0.01


def test_evaluators_see_the_decoder_in_the_space_of_the_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """sae-lens' own measure of recovery compares decoder rows with the true features."""
    from sae_lens.synthetic.evals import mean_correlation_coefficient

    def final_and_logged(trainer_class: Any) -> tuple[float, float]:
        logs: list[dict[str, Any]] = []
        monkeypatch.setattr("wandb.log", lambda values, step: logs.append(values))

        def evaluator(sae: Any, data_provider: Any, activation_scaler: Any) -> dict[str, float]:
            return {"mcc": mean_correlation_coefficient(sae.W_dec.detach(), FEATURES)}

        wandb = LoggingConfig(log_to_wandb=True, wandb_log_frequency=1, eval_every_n_wandb_logs=1)
        sae = topk_sae()
        trainer_class(trainer_config(logger=wandb), sae, batches(), evaluator=evaluator).fit()
        return mean_correlation_coefficient(sae.W_dec.detach(), FEATURES), [
            values["mcc"] for values in logs if "mcc" in values
        ][-1]

    final, logged = final_and_logged(SAETrainer)
    assert abs(final - logged) > 0.05

    final, logged = final_and_logged(WhiteningTrainer)
    # a cosine of float32 vectors: rounding of the entries, of the product and of two norms
    assert abs(final - logged) <= (2 * D_IN + 8) * 2 * UNIT
