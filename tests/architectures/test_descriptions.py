"""Descriptions of architectures, and an architecture that is defined outside of the package."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from sae_lens import (
    SAE,
    MatryoshkaBatchTopKTrainingSAE,
    SAEConfig,
    TopKSAE,
    TopKTrainingSAE,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from sae_whiten import (
    FoldError,
    WhiteningConfig,
    WhiteningTrainer,
    fold_whitening_into_weights,
)
from sae_whiten.architectures import Architecture, describe, description, register
from sae_whiten.architectures.description import read_weights
from sae_whiten.architectures.folding import why_not_foldable
from sae_whiten.comparison.plan import Comparison, arms, sae_config
from tests.support import ARCHITECTURES, nasty, training_sae, whitening_of
from tests.training.test_trainer import BATCH, D, batches, trainer_config

# --- an eighth architecture, in one file ---


@dataclass
class GainConfig(SAEConfig):
    @classmethod
    def architecture(cls) -> str:
        return "gain"


@dataclass
class GainTrainingConfig(TrainingSAEConfig):
    l1_coefficient: float = 0.1

    @classmethod
    def architecture(cls) -> str:
        return "gain"


class _Gain:
    """ReLU latents, whose pre-activations have a learned gain: (x - b_dec) @ W_enc * gain + b."""

    def initialize_weights(self: Any) -> None:
        super().initialize_weights()  # pyright: ignore[reportAttributeAccessIssue]
        self.gain = nn.Parameter(torch.ones(self.cfg.d_sae))
        self.b = nn.Parameter(torch.zeros(self.cfg.d_sae))

    def encode(self: Any, x: Tensor) -> Tensor:
        pre = self.process_sae_in(x) @ self.W_enc * self.gain + self.b
        return self.hook_sae_acts_post(self.hook_sae_acts_pre(pre).relu())

    def decode(self: Any, feature_acts: Tensor) -> Tensor:
        return self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)


class GainSAE(_Gain, SAE[GainConfig]): ...


class GainTrainingSAE(_Gain, TrainingSAE[GainTrainingConfig]):
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.encode(x)
        return latents, latents

    def get_coefficients(self) -> dict[str, Any]:
        return {"l1": self.cfg.l1_coefficient}

    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        return {"l1_loss": step_input.coefficients["l1"] * feature_acts.sum(-1).mean()}


GAIN = Architecture(
    sae_classes=(GainSAE, GainTrainingSAE),
    affine_weights=lambda sae: replace(read_weights(sae, "b"), gains={"b": sae.gain.data}),
    sparsity_field="l1_coefficient",
    scaled_fields={"l1_coefficient": 1},
)


@pytest.fixture
def registries() -> Iterator[None]:
    with (
        patch.dict(SAE_CLASS_REGISTRY),
        patch.dict(SAE_TRAINING_CLASS_REGISTRY),
        patch.dict(description._DESCRIPTIONS),
    ):
        yield


@pytest.fixture
def gain(registries: None) -> None:
    register_sae_class("gain", GainSAE, GainConfig)
    register_sae_training_class("gain", GainTrainingSAE, GainTrainingConfig)
    register(GAIN)


def gain_sae(**options: Any) -> GainTrainingSAE:
    torch.manual_seed(0)
    options = {"d_in": D, "d_sae": 64, "normalize_activations": "covariance_whitening", **options}
    sae = GainTrainingSAE(GainTrainingConfig(**options))
    with torch.no_grad():
        sae.gain.copy_(0.5 + torch.rand(64))
        sae.b.copy_(0.1 * torch.randn(64))
    return sae


@pytest.mark.usefixtures("gain")
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_an_architecture_from_outside_is_folded_exactly(apply_b_dec_to_input):
    x = nasty(500, D, dtype=torch.float64)
    whitening = whitening_of(x)
    sae = gain_sae(dtype="float64", apply_b_dec_to_input=apply_b_dec_to_input)
    with torch.no_grad():
        latents = sae.encode(whitening.whiten(x))
        output = whitening.dewhiten(sae.decode(latents))
        report = fold_whitening_into_weights(sae, whitening, activations=x)
        assert (sae.encode(x) - latents).norm() < 1e-9 * latents.norm()
        assert (sae(x) - output).norm() < 1e-9 * output.norm()
    assert report.check is not None
    assert report.check.fold_error < 1e-9


@pytest.mark.usefixtures("gain")
@pytest.mark.parametrize("loss_space", ["original", "whitened"])
def test_an_architecture_from_outside_trains_and_opens_in_saelens(loss_space, tmp_path):
    sae = gain_sae()
    config = WhiteningConfig(loss_space=loss_space)
    assert WhiteningTrainer(trainer_config(), sae, batches(), config).fit() is sae
    sae.save_inference_model(tmp_path)
    plain = SAE.load_from_disk(tmp_path)
    assert type(plain) is GainSAE
    assert plain.cfg.metadata.whitening is not None
    assert plain.cfg.metadata.whitening["fold"]["check"]["fold_error"] < 1e-4
    x = nasty(200, D)
    with torch.no_grad():
        assert torch.equal(plain(x), sae(x))


@pytest.mark.usefixtures("gain")
def test_compare_sweeps_it_as_its_description_says():
    comparison = Comparison("hook", architectures=("gain",), coefficients=(0.5, 1.0))
    planned = arms(comparison)
    assert comparison.left_out == {}
    assert {arm.coefficient for arm in planned} == {0.5, 1.0}
    assert {arm.sparsity for arm in planned} == {None}
    found = sae_config(comparison, planned[0])
    assert isinstance(found, GainTrainingConfig)
    assert found.l1_coefficient == planned[0].coefficient


@pytest.mark.usefixtures("registries")
def test_without_a_description_it_is_refused():
    register_sae_class("gain", GainSAE, GainConfig)
    register_sae_training_class("gain", GainTrainingSAE, GainTrainingConfig)
    sae = gain_sae()
    with pytest.raises(FoldError, match="GainTrainingSAE: not an architecture whose fold is known"):
        WhiteningTrainer(trainer_config(), sae, batches())
    assert describe("gain").sparsity_field == "l1_coefficient"
    assert not describe("gain").sparsity_is_exact


# --- descriptions ---


def test_one_description_for_an_sae_its_class_its_config_and_its_name():
    for architecture in ARCHITECTURES:
        sae = training_sae(architecture)
        found = describe(architecture)
        assert describe(sae) is describe(type(sae)) is describe(sae.cfg) is found
        assert found.not_foldable_because is None
        assert found.sparsity_field is not None
    # of what is saved too
    assert describe(TopKSAE) is describe("topk")
    assert describe(
        training_sae("batchtopk").cfg.get_inference_config_class()(d_in=4, d_sae=4)
    ) is (describe("jumprelu"))


def test_every_architecture_of_saelens_has_a_description():
    classes = [*SAE_CLASS_REGISTRY.values(), *SAE_TRAINING_CLASS_REGISTRY.values()]
    for sae_class, _ in classes:
        known = any(base in description._DESCRIPTIONS for base in sae_class.__mro__)
        assert known, f"{sae_class.__name__} is new: describe it, or say why it cannot be folded"


def test_subclasses_follow_the_nearest_description_and_may_refuse():
    class Own(MatryoshkaBatchTopKTrainingSAE): ...

    class Declared(Own):
        whitening_not_foldable_because = "its selection uses the norm of the input"

    assert describe(Own) is describe("matryoshka_batchtopk") is not describe("batchtopk")
    assert why_not_foldable(Own) is None
    assert why_not_foldable(Declared) == "Declared: its selection uses the norm of the input"


@pytest.mark.usefixtures("gain")
def test_a_class_is_described_once():
    with pytest.raises(ValueError, match="GainSAE is described already"):
        register(GAIN)


# --- fast steps ---


class Mine(TopKTrainingSAE): ...


@pytest.mark.usefixtures("registries")
def test_a_fast_step_replaces_the_training_step_under_whitening_where_it_takes_it():
    taken: list[int] = []

    def fast(sae: Any, step_input: TrainStepInput) -> TrainStepOutput | None:
        taken.append(step_input.n_training_steps)
        return None if step_input.n_training_steps % 2 else slow(sae, step_input)

    topk = describe("topk")
    slow = TopKTrainingSAE.training_forward_pass
    description._DESCRIPTIONS[TopKTrainingSAE] = replace(topk, fast_step=fast)

    def trained(sae: TrainingSAE[Any]) -> Tensor:
        n_steps = 6
        cfg = trainer_config(total_training_samples=BATCH * n_steps)
        return WhiteningTrainer(cfg, sae, batches()).fit().W_dec

    by_fast_steps = trained(training_sae("topk", D, 64))
    assert taken == list(range(6))
    # a subclass may override anything
    sae = Mine(training_sae("topk", D, 64).cfg)
    sae.load_state_dict(training_sae("topk", D, 64).state_dict())
    assert torch.equal(trained(sae), by_fast_steps)
    assert len(taken) == 6
