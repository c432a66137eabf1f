"""What must never go silently wrong in training under whitening.

Each test is one way in which a user got wrong numbers, lost a run or was refused without being told
why by the `covariance_whitening` that sae-lens itself ships (>= 6.52), numbered as in the list that
this package was measured against. Where it is cheap, a test first shows that on the same data
("stock"), and then what a user needs ("ours").

Folded SAEs are compared with `Reference`, an independent statement in float64 of what an SAE in
whitened coordinates computes, in units of the rounding errors that float32 makes at most.
"""

import copy
import itertools
import json
import logging
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTrainingSAEConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MatchingPursuitTrainingSAE,
    MatchingPursuitTrainingSAEConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TemporalSAE,
    TemporalSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import HookedTransformer

from sae_whiten import (
    ActivationStatistics,
    CorruptFileError,
    CovarianceWhiteningScaler,
    FoldError,
    NonFiniteActivationsError,
    WhiteningConfig,
    WhiteningTrainer,
    WhiteningTrainingRunner,
    fold_whitening_into_weights,
)
from tests.support import nasty, runner_config, tiny_dataset, tiny_model, whitening_of

pytestmark = pytest.mark.filterwarnings(
    # small inputs, on purpose
    "ignore:The training dataset contains fewer samples:UserWarning",
    "ignore:pretokenized dataset has context_size 33:RuntimeWarning",
    "ignore:To copy construct from a tensor:UserWarning",
    "ignore:All samples in the training dataset have been exhausted:UserWarning",
    "ignore:decoder_init_norm must be set to 1.0:UserWarning",
    # of every SAE that the runner of sae-lens trained
    r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning",
)

D_IN, D_SAE, K, BATCH = 16, 64, 4, 64
UNIT = torch.finfo(torch.float32).eps / 2
"""Largest relative error of one rounding to float32."""

# --- data, SAEs, trainers


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


_FEATURES = torch.randn(32, D_IN, generator=_generator(0)) * torch.logspace(-1, 1, D_IN)


def batches(seed: int = 0, scale: float = 1.0, rows: int = BATCH) -> Iterator[Tensor]:
    """Endless activations, (rows, 16): three of 32 features at a time, anisotropic, mean 5."""
    generator = _generator(seed)
    while True:
        active = torch.rand(rows, 32, generator=generator) < 3 / 32
        codes = active * (1 + torch.rand(rows, 32, generator=generator))
        noise = 0.01 * torch.randn(rows, D_IN, generator=generator)
        yield (codes @ _FEATURES + noise + 5.0) * scale


def activations(n: int, seed: int = 1000, scale: float = 1.0) -> Tensor:
    return next(batches(seed, scale, rows=n))


def large_means(n: int, start: int = 0) -> Tensor:
    """As in language models: covariance of condition 1e6, and four dimensions with mean 3000."""
    return nasty(8192, D_IN)[start : start + n]


def topk_config(**changes: Any) -> TopKTrainingSAEConfig:
    options: dict[str, Any] = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "k": K,
        "normalize_activations": "covariance_whitening",
    }
    return TopKTrainingSAEConfig(**{**options, **changes})


def topk_sae(cfg: TopKTrainingSAEConfig | None = None, seed: int = 1) -> TopKTrainingSAE:
    torch.manual_seed(seed)
    return TopKTrainingSAE(topk_config() if cfg is None else cfg)


def randomised(sae: Any, seed: int = 3) -> Any:
    """With biases as large as pre-activations, for a zero hides every mistake made with it."""
    generator = _generator(seed)
    for name, parameter in sae.named_parameters():
        if name.startswith("b_") or name == "W_skip":
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (0.3 * noise).to(parameter.dtype)
        elif name == "W_dec":
            # trained decoder rows differ in their norms
            norms = 0.5 + torch.rand(len(parameter), 1, generator=generator)
            parameter.data = parameter.data * norms.to(parameter.dtype)
        elif name == "threshold":
            parameter.data = 0.1 + 0.1 * torch.rand(parameter.shape, generator=generator)
    return sae


def trainer_config(n_steps: int = 40, **changes: Any) -> SAETrainerConfig:
    options: dict[str, Any] = {
        "total_training_samples": n_steps * BATCH,
        "train_batch_size_samples": BATCH,
        "lr": 1e-2,
        "lr_end": 1e-2,
        # of sae-lens' own estimate only
        "n_batches_for_norm_estimate": 25,
    }
    return SAETrainerConfig(**{**options, **changes})


def run_by_hand(trainer: SAETrainer[Any, Any], n_steps: int) -> None:
    """The training loop of `fit()` without its end: the SAE stays in whitened coordinates."""
    if isinstance(trainer, WhiteningTrainer):
        trainer.estimate_whitening()
    elif trainer.activation_scaler.whitening is None:
        trainer.activation_scaler.estimate_whitening(
            D_IN, trainer.data_provider, trainer.cfg.n_batches_for_norm_estimate
        )
    for _ in range(n_steps):
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1


def estimated_by_stock(x: Tensor) -> Any:
    scaler = ActivationScaler()
    scaler.estimate_whitening(x.shape[1], iter([x]), n_batches_for_norm_estimate=1)
    return scaler.whitening


def stock_fold(sae: SAE[Any], whitening: Any) -> None:
    sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)


def state(sae: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in sae.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal to the bit."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@torch.no_grad()
def explained_variance(sae: Any, x: Tensor) -> float:
    """On raw activations, with no scaler between."""
    error, centred = (x - sae(x)).double(), x.double() - x.double().mean(0)
    return 1 - float(error.square().sum() / centred.square().sum())


# --- the reference


@dataclass
class Reference:
    """An SAE in whitened coordinates between whitening and dewhitening, in float64.

    Attributes:
        weights: Its state dict.
        input: Has `mean`, `matrix` and `inverse_matrix`: ours and those of sae-lens do.
        output: The same for what it writes.
        subtracts_b_dec: Whether b_dec is subtracted from its input.
        rescales: Whether its latents are ranked by pre-activation times decoder norm.
        k: Of the k largest pre-activations only the positive ones are active.
        threshold: Without k, pre-activations above it are active.
    """

    weights: dict[str, Tensor]
    input: Any
    output: Any
    subtracts_b_dec: bool
    rescales: bool
    k: int | None
    threshold: Tensor

    @classmethod
    def of(cls, sae: Any, whitening: Any, output_whitening: Any = None) -> "Reference":
        architecture = sae.cfg.architecture()
        threshold = torch.tensor(0.0)
        if architecture == "batchtopk":
            # saved as a JumpReLU SAE, in the precision of its weights
            threshold = sae.topk_threshold.to(torch.float32)
        elif "jumprelu" in architecture:
            threshold = sae.threshold
        return cls(
            weights={name: value.detach().double() for name, value in state(sae).items()},
            input=whitening,
            output=output_whitening or whitening,
            subtracts_b_dec=sae.cfg.apply_b_dec_to_input and not isinstance(sae, Transcoder),
            rescales=getattr(sae.cfg, "rescale_acts_by_decoder_norm", False),
            k=getattr(sae.cfg, "k", None) if architecture == "topk" else None,
            threshold=threshold.detach().double(),
        )

    @property
    def norms(self) -> Tensor:
        norms = self.weights["W_dec"].norm(dim=1)
        return norms if self.rescales else torch.ones_like(norms)

    def pre_activations(self, x: Tensor) -> Tensor:
        z = (x.double() - self.input.mean) @ self.input.matrix
        if self.subtracts_b_dec:
            z = z - self.weights["b_dec"]
        return (z @ self.weights["W_enc"] + self.weights["b_enc"]) * self.norms

    def level(self, pre: Tensor) -> Tensor:
        """The level above which a latent is active, (n, d_sae) or (n, 1)."""
        if self.k is None:
            return self.threshold.expand_as(pre)
        top = pre.topk(self.k + 1, dim=1).values
        return top[:, -2:].mean(dim=1, keepdim=True).clamp(min=0)

    def reconstruction(self, latents: Tensor, x: Tensor) -> Tensor:
        w = self.weights
        z = latents.double() / self.norms @ w["W_dec"] + w["b_dec"]
        if "W_skip" in w:
            z = z + (x.double() - self.input.mean) @ self.input.matrix @ w["W_skip"].T
        return z @ self.output.inverse_matrix + self.output.mean

    # Rounding errors of a plain SAE. A product of length n in float32 is off by at most n UNIT
    # times the product of the absolute values, in whatever order it is summed (Higham, Accuracy and
    # Stability of Numerical Algorithms, 3.5). Every weight is rounded once, so is the centred
    # input, and a bias is added: six roundings more, and one for their products.

    def pre_activation_rounding(self, x: Tensor) -> Tensor:
        """Bound for SAEs with the weights of smallest rounding error, which subtract b_dec."""
        w, whitening = self.weights, self.input
        W_enc = whitening.matrix @ w["W_enc"] * self.norms
        if "W_skip" in w or self.weights["b_dec"].shape != whitening.mean.shape:
            raise AssertionError("transcoders have a bound of their own")
        centred = x.double() - (w["b_dec"] @ whitening.inverse_matrix + whitening.mean)
        bias = w["b_enc"] * self.norms
        if not self.subtracts_b_dec:
            bias = bias + w["b_dec"] @ w["W_enc"] * self.norms
        return (x.shape[1] + 7) * UNIT * (centred.abs() @ W_enc.abs() + bias.abs())

    def transcoder_pre_activation_rounding(self, x: Tensor) -> Tensor:
        """Bound for transcoders: b_dec lives in another space, so the mean is in b_enc."""
        W_enc = self.input.matrix @ self.weights["W_enc"]
        bias = self.weights["b_enc"] - self.input.mean @ W_enc
        return (x.shape[1] + 7) * UNIT * (x.double().abs() @ W_enc.abs() + bias.abs())

    def reconstruction_rounding(self, latents: Tensor, x: Tensor) -> Tensor:
        w, f = self.weights, latents.double()
        W_dec = w["W_dec"] / self.norms[:, None] @ self.output.inverse_matrix
        bias = w["b_dec"] @ self.output.inverse_matrix + self.output.mean
        n = int((latents != 0).sum(dim=1).max())
        total = f.abs() @ W_dec.abs()
        if "W_skip" in w:
            skip = self.input.matrix @ w["W_skip"].T @ self.output.inverse_matrix
            bias = bias - self.input.mean @ skip
            total = total + x.double().abs() @ skip.abs()
            n += x.shape[1]
        return (n + 7) * UNIT * (total + bias.abs())


@torch.no_grad()
def rounding_units(plain: Any, reference: Reference, x: Tensor) -> float:
    """Largest deviation of a plain SAE from the reference, 1 being what rounding explains.

    Infinite if a latent is active in one of them only although its pre-activation lies farther from
    the level where that changes than rounding can carry it.
    """
    captured: list[Tensor] = []
    handle = plain.hook_sae_acts_pre.register_forward_hook(lambda *args: captured.append(args[-1]))
    latents = plain.encode(x)
    handle.remove()
    # forward() of a transcoder adds its skip connection, decode() does not
    output = plain(x) if "W_skip" in reference.weights else plain.decode(latents)

    pre = reference.pre_activations(x)
    if isinstance(plain, Transcoder):
        bound = reference.transcoder_pre_activation_rounding(x)
    else:
        bound = reference.pre_activation_rounding(x)
    off = captured[-1].double() - pre
    output_off = output.double() - reference.reconstruction(latents, x)
    units = max(
        float((off.abs() / bound).max()),
        float((output_off.abs() / reference.reconstruction_rounding(latents, x)).max()),
    )

    level = reference.level(pre)
    decided = (pre - level).abs() > bound
    if reference.k is not None:
        decided = decided.all(dim=1, keepdim=True).expand_as(pre)
    differs = ((pre > level) != (latents != 0)) & decided
    if decided.double().mean() < 0.9:
        raise AssertionError("too many latents are too near to their level: this shows nothing")
    return float("inf") if differs.any() else units


def active_set_change(plain: Any, reference: Reference, x: Tensor) -> float:
    """Share of rows with other active latents than the reference has."""
    pre = reference.pre_activations(x)
    active = pre > reference.level(pre)
    return float((active != (plain.encode(x) != 0)).any(dim=1).double().mean())


@torch.no_grad()
def relative_pre_activation_error(plain: Any, reference: Reference, x: Tensor) -> float:
    sae_in = x.to(plain.dtype) - plain.b_dec
    pre = (sae_in @ plain.W_enc + plain.b_enc).double()
    expected = reference.pre_activations(x)
    return float((pre - expected).norm() / expected.norm())


# --- a language model

HOOK = "blocks.1.hook_resid_pre"
FEW = WhiteningConfig(n_samples=1500)


def model_activations(model: HookedTransformer) -> Tensor:
    """Held-out raw activations at `HOOK`, (512, 32)."""
    tokens = torch.randint(0, 100, (16, 32), generator=_generator(1))
    _, cache = model.run_with_cache(tokens)
    return cache[HOOK].flatten(0, 1)


def ours_runner(
    cfg: Any, model: HookedTransformer | None = None, whitening: Any = FEW, seed: int = 5
) -> WhiteningTrainingRunner:
    model = model or tiny_model()
    torch.manual_seed(seed)
    return WhiteningTrainingRunner(
        cfg, whitening, override_dataset=tiny_dataset(), override_model=model
    )


def stock_runner(
    cfg: Any, model: HookedTransformer | None = None
) -> LanguageModelSAETrainingRunner:
    model = model or tiny_model()
    torch.manual_seed(5)
    cfg.n_batches_for_norm_estimate = 12
    return LanguageModelSAETrainingRunner(
        cfg, override_dataset=tiny_dataset(), override_model=model
    )


@pytest.fixture
def _restore_signal_handlers() -> Iterator[None]:
    """sae-lens' own runner replaces them and leaves it at that."""
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in previous.items():
        signal.signal(signum, handler)


# --- 1


@pytest.mark.usefixtures("_restore_signal_handlers")
def test_line_01_resume_from_the_final_checkpoint_recognises_that_it_is_folded(
    tmp_path: Path,
) -> None:
    x = model_activations(tiny_model())

    cfg = runner_config(checkpoint_path=f"{tmp_path}/stock", save_final_checkpoint=True)
    sae = stock_runner(cfg).run()
    (final,) = Path(str(cfg.checkpoint_path)).glob("final_*")
    again = stock_runner(runner_config(resume_from_checkpoint=str(final))).run()
    assert explained_variance(again, x) < explained_variance(sae, x) - 0.2

    cfg = runner_config(checkpoint_path=f"{tmp_path}/ours", save_final_checkpoint=True)
    sae = ours_runner(cfg).run()
    (final,) = Path(str(cfg.checkpoint_path)).glob("final_*")
    assert same(state(SAE.load_from_disk(final)), plain_state(sae, tmp_path / "plain"))
    again = ours_runner(runner_config(resume_from_checkpoint=str(final)), seed=6).run()
    assert same(state(sae), state(again))

    # and more training from there is what training longer at once would have been
    more = {"training_tokens": 100 * 128}
    longer = ours_runner(runner_config(**more)).run()
    cfg = runner_config(resume_from_checkpoint=str(final), **more)
    assert same(state(longer), state(ours_runner(cfg, seed=6).run()))
    assert not same(state(longer), state(sae))


def plain_state(sae: Any, folder: Path) -> dict[str, Tensor]:
    """Of the inference SAE that a folded training SAE is saved as."""
    sae.save_inference_model(folder)
    return state(SAE.load_from_disk(folder))


# --- 2

ARCHITECTURES = [
    topk_config(),
    BatchTopKTrainingSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        k=K,
        topk_threshold_lr=0.1,
        normalize_activations="covariance_whitening",
    ),
    JumpReLUTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, l0_coefficient=0.1, normalize_activations="covariance_whitening"
    ),
    StandardTrainingSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        l1_coefficient=0.1,
        apply_b_dec_to_input=False,
        normalize_activations="covariance_whitening",
    ),
]


@pytest.mark.parametrize("cfg", ARCHITECTURES, ids=lambda cfg: cfg.architecture())
def test_line_02_every_checkpoint_opens_in_saelens_as_a_plain_sae(cfg: Any, tmp_path: Path) -> None:
    x = activations(256)
    architecture = cfg.architecture()

    def new_sae() -> Any:
        torch.manual_seed(1)
        return TrainingSAE.from_dict(cfg.to_dict())

    def saved(folder: str) -> SAETrainerConfig:
        path = str(tmp_path / folder)
        return trainer_config(40, n_checkpoints=1, checkpoint_path=path, save_final_checkpoint=True)

    SAETrainer(saved("stock"), new_sae(), batches()).fit()
    (middle,) = (tmp_path / "stock").glob("[0-9]*")
    if architecture == "batchtopk":
        with pytest.raises(KeyError):
            SAE.load_from_disk(middle)
    else:
        trainer: Any = SAETrainer(trainer_config(40), new_sae(), batches())
        run_by_hand(trainer, int(middle.name) // BATCH)
        reference = Reference.of(trainer.sae, trainer.activation_scaler.whitening)
        assert rounding_units(SAE.load_from_disk(middle), reference, x) > 1000

    WhiteningTrainer(saved("ours"), new_sae(), batches()).fit()
    for directory in sorted((tmp_path / "ours").iterdir()):
        n_steps = int(directory.name.removeprefix("final_")) // BATCH
        trainer = WhiteningTrainer(trainer_config(40), new_sae(), batches())
        run_by_hand(trainer, n_steps)
        reference = Reference.of(trainer.sae, trainer.whitening)
        plain = SAE.load_from_disk(directory)
        assert plain.cfg.normalize_activations == "none"
        assert rounding_units(plain, reference, x) <= 1
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"1344", "final_2560"}


def test_line_02_the_state_for_resuming_does_not_open_as_an_sae(tmp_path: Path) -> None:
    cfg = trainer_config(5, checkpoint_path=str(tmp_path), save_final_checkpoint=True)
    WhiteningTrainer(cfg, topk_sae(), batches()).fit()
    in_whitened_coordinates = [
        path.parent
        for path in tmp_path.rglob("*.safetensors")
        if not (path.parent / "cfg.json").exists()
    ]
    assert in_whitened_coordinates
    for directory in in_whitened_coordinates:
        with pytest.raises(FileNotFoundError):
            SAE.load_from_disk(directory)


# --- 3


@pytest.mark.parametrize("method", ["save_inference_model", "save_model"])
def test_line_03_an_sae_saved_before_folding_is_plain_and_folded(
    method: str, tmp_path: Path
) -> None:
    x = activations(256)

    stock = SAETrainer(trainer_config(), topk_sae(), batches())
    run_by_hand(stock, 30)
    getattr(stock.sae, method)(tmp_path / "stock")
    assert explained_variance(SAE.load_from_disk(tmp_path / "stock"), x) < 0.2
    assert not any("scaler" in p.name or "whiten" in p.name for p in tmp_path.rglob("*"))

    ours = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    run_by_hand(ours, 30)
    before = state(ours.sae)
    getattr(ours.sae, method)(tmp_path / "ours")
    plain = SAE.load_from_disk(tmp_path / "ours")
    assert rounding_units(plain, Reference.of(ours.sae, ours.whitening), x) <= 1
    assert explained_variance(plain, x) > 0.5
    # the one in training was only looked at
    assert same(before, state(ours.sae))
    assert ours.sae.cfg.normalize_activations == "covariance_whitening"


def test_line_03_an_sae_saved_before_there_is_a_whitening_is_refused(tmp_path: Path) -> None:
    sae = topk_sae()
    trainer = WhiteningTrainer(trainer_config(), sae, batches())
    with pytest.raises(FoldError, match="has not been estimated yet"):
        trainer.sae.save_inference_model(tmp_path / "early")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_line_03_a_copy_of_an_sae_in_training_can_be_saved(tmp_path: Path) -> None:
    """For example the best one so far; its source is a generator, which cannot be copied."""
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    run_by_hand(trainer, 5)
    reference = Reference.of(trainer.sae, trainer.whitening)
    best = copy.deepcopy(trainer.sae)
    run_by_hand(trainer, 5)
    best.save_inference_model(tmp_path)
    plain = SAE.load_from_disk(tmp_path)
    assert rounding_units(plain, reference, activations(256)) <= 1


# --- 4


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_line_04_a_bfloat16_sae_is_folded_into_float32(apply_b_dec_to_input: bool) -> None:
    estimation, x = large_means(4096), large_means(256, start=4096)
    cfg = topk_config(dtype="bfloat16", apply_b_dec_to_input=apply_b_dec_to_input)
    sae = randomised(topk_sae(cfg))

    stock, whitening = copy.deepcopy(sae), estimated_by_stock(estimation)
    reference = Reference.of(sae, whitening)
    stock_fold(stock, whitening)
    assert stock.W_enc.dtype == torch.bfloat16
    if apply_b_dec_to_input:
        assert relative_pre_activation_error(stock, reference, x) > 1
    assert active_set_change(stock, reference, x) > 0.99

    ours = whitening_of(estimation)
    reference = Reference.of(sae, ours)
    report = fold_whitening_into_weights(sae, ours, activations=x)
    assert {parameter.dtype for parameter in sae.parameters()} == {torch.float32}
    assert rounding_units(sae, reference, x) <= 1
    assert (report.dtype, report.folded_dtype) == ("bfloat16", "float32")


def test_line_04_training_in_bfloat16_ends_in_a_float32_file(tmp_path: Path) -> None:
    path = str(tmp_path)
    cfg = trainer_config(20, checkpoint_path=path, save_final_checkpoint=True)
    sae = topk_sae(topk_config(dtype="bfloat16"))
    WhiteningTrainer(cfg, sae, batches()).fit()
    (final,) = tmp_path.glob("final_*")
    weights = load_file(final / "sae_weights.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}

    trainer = WhiteningTrainer(
        trainer_config(20), topk_sae(topk_config(dtype="bfloat16")), batches()
    )
    run_by_hand(trainer, 20)
    assert trainer.sae.W_enc.dtype == torch.bfloat16
    reference = Reference.of(trainer.sae, trainer.whitening)
    plain = SAE.load_from_disk(final)
    assert plain.dtype == torch.float32
    assert rounding_units(plain, reference, activations(256)) <= 1


# --- 5


def test_line_05_the_configs_of_the_user_are_not_changed() -> None:
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


def test_line_05_two_saes_with_one_config_are_both_folded_right() -> None:
    estimation, x = activations(4096, seed=2), activations(256)

    cfg = topk_config()
    pair, whitening = [randomised(topk_sae(cfg, seed=s)) for s in (1, 2)], estimated_by_stock(x)
    references = [Reference.of(sae, whitening) for sae in pair]
    for sae in pair:
        stock_fold(sae, whitening)
    assert rounding_units(pair[0], references[0], x) < float("inf")
    assert active_set_change(pair[1], references[1], x) > 0.1

    cfg = topk_config()
    pair, ours = [randomised(topk_sae(cfg, seed=s)) for s in (1, 2)], whitening_of(estimation)
    references = [Reference.of(sae, ours) for sae in pair]
    for sae in pair:
        fold_whitening_into_weights(sae, ours)
    assert all(rounding_units(s, r, x) <= 1 for s, r in zip(pair, references, strict=True))
    assert cfg.to_dict() == topk_sae(topk_config()).cfg.to_dict()


def test_line_05_a_runner_config_can_be_used_twice(tmp_path: Path) -> None:
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


# --- 6


def spoiled(index: int, value: float, seed: int = 0) -> Iterator[Tensor]:
    """`batches`, with one entry of one token of batch `index` not a number."""
    for i, batch in enumerate(batches(seed)):
        if i == index:
            batch[7, 3] = value
        yield batch


def finite(sae: Any) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in sae.state_dict().values())


def stock_estimates_nothing(source: Iterator[Tensor], n_batches: int) -> None:
    """NaN without a word, or where LAPACK notices: "ill-conditioned or too many repeated"."""
    scaler = ActivationScaler()
    try:
        scaler.estimate_whitening(D_IN, source, n_batches)
    except RuntimeError as error:
        assert "failed to converge" in str(error)  # noqa: PT017
    else:
        assert scaler.whitening is not None
        assert torch.isnan(scaler.whitening.matrix).all()


BAD = pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])


@BAD
def test_line_06_a_token_that_is_not_finite_in_the_estimation(bad: float) -> None:
    stock_estimates_nothing(spoiled(3, bad), 25)

    sae = topk_sae()
    before = state(sae)
    trainer = WhiteningTrainer(trainer_config(), sae, spoiled(3, bad))
    with pytest.raises(NonFiniteActivationsError, match=r"batch 3 of shape \(64, 16\).*row 7"):
        trainer.fit()
    assert same(before, state(sae))

    skipping = WhiteningConfig(on_nonfinite="skip", n_samples=1600)
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), spoiled(3, bad), skipping)
    assert finite(trainer.fit())
    statistics = trainer.scaler.statistics
    assert statistics is not None
    assert (statistics.n_skipped, trainer.stream.n_skipped) == (1, 1)
    clean = torch.cat(list(itertools.islice(spoiled(3, bad), 26)))[:1664]
    clean = clean[torch.isfinite(clean).all(dim=1)].double()
    # the sum of n float64 numbers and one division
    bound = len(clean) * torch.finfo(torch.float64).eps * clean.abs().mean(0)
    assert statistics.n_samples == len(clean)
    assert ((statistics.mean - clean.mean(0)).abs() <= bound).all()


@BAD
def test_line_06_a_token_that_is_not_finite_in_training(bad: float, tmp_path: Path) -> None:
    stock = SAETrainer(trainer_config(), topk_sae(), spoiled(50, bad)).fit()
    assert not finite(stock)

    sae = topk_sae()
    cfg = trainer_config(checkpoint_path=str(tmp_path))
    trainer = WhiteningTrainer(cfg, sae, spoiled(30, bad))
    with pytest.raises(NonFiniteActivationsError, match=r"batch 30 of shape \(64, 16\).*row 7"):
        trainer.fit()
    # nothing is lost: the SAE is that of 30 good steps, and can be saved
    expected = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    run_by_hand(expected, 30)
    assert same(state(sae), state(expected.sae))
    trainer.save_checkpoint("at_batch_30")
    assert finite(SAE.load_from_disk(tmp_path / "at_batch_30"))

    skipping = WhiteningConfig(on_nonfinite="skip")
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), spoiled(30, bad), skipping)
    assert finite(trainer.fit())
    assert trainer.stream.n_skipped == 1


def test_line_06_the_remedy_that_the_error_names_works_on_the_checkpoint(tmp_path: Path) -> None:
    """ "set WhiteningConfig(on_nonfinite='skip')": it changes nothing about the basis."""
    cfg = trainer_config(checkpoint_path=str(tmp_path))
    trainer = WhiteningTrainer(cfg, topk_sae(), spoiled(30, float("nan")))
    with pytest.raises(NonFiniteActivationsError, match="on_nonfinite='skip'"):
        trainer.fit()
    trainer.save_checkpoint("at_batch_30")

    rest = itertools.islice(spoiled(30, float("nan")), 30, None)
    skipping = WhiteningConfig(on_nonfinite="skip")
    resumed = WhiteningTrainer(trainer_config(), topk_sae(), rest, skipping)
    resumed.load_trainer_state(tmp_path / "at_batch_30")
    assert finite(resumed.fit())
    assert resumed.stream.n_skipped == 1


def test_line_06_a_runner_saves_its_progress_when_the_model_yields_nan(tmp_path: Path) -> None:
    model = tiny_model()
    n_calls = 0

    def poison(tensor: Tensor, *, hook: Any) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        return torch.full_like(tensor, float("nan")) if n_calls == 40 else tensor

    model.add_perma_hook("hook_embed", poison)
    cfg = runner_config(checkpoint_path=str(tmp_path))
    runner = ours_runner(cfg, model)
    with pytest.raises(NonFiniteActivationsError, match=r"at blocks\.1\.hook_resid_pre, of shape"):
        runner.run()
    (checkpoint,) = Path(str(cfg.checkpoint_path)).iterdir()
    assert 0 < int(checkpoint.name) < 80 * 128
    assert finite(SAE.load_from_disk(checkpoint))


def test_line_06_one_activation_no_activation_no_batch() -> None:
    one, none = activations(1), torch.zeros(0, D_IN)
    # how often, the source, what ours says
    cases: list[tuple[int, list[Tensor], str]] = [
        (1, [one], "1 activations in 1 batches.*needs about 1600"),
        (3, [none, none, none], "0 activations in 3 batches.*needs about 1600"),
        (0, [], "0 activations in 0 batches.*needs about 1600"),
    ]
    for n_batches, source, message in cases:
        stock_estimates_nothing(iter(source), n_batches)

        ours = CovarianceWhiteningScaler()
        with pytest.raises(ValueError, match=message):
            ours.estimate_whitening(D_IN, iter(source))
        with pytest.raises(ValueError, match="at least 2 activations"):
            ours.estimate_whitening(D_IN, iter(source), n_batches)
        assert ours.whitening is None

        sae = topk_sae()
        before = state(sae)
        with pytest.raises(ValueError, match=message):
            WhiteningTrainer(trainer_config(), sae, iter(source)).fit()
        assert same(before, state(sae))


def test_line_06_empty_batches_change_nothing() -> None:
    def with_empty_batches() -> Iterator[Tensor]:
        for batch in batches():
            yield batch[:0]
            yield batch

    reference = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    expected = reference.fit()
    whitening = WhiteningTrainer(trainer_config(), topk_sae(), with_empty_batches())
    sae = whitening.fit()
    statistics = whitening.scaler.statistics
    assert statistics is not None
    assert reference.whitening is not None
    assert statistics.n_samples == reference.whitening.n_samples
    assert same(state(sae), state(expected))


NOTHING = {
    "empty batches": torch.zeros(0, D_IN),
    "batches of NaN, to be skipped": torch.full((BATCH, D_IN), float("nan")),
}


@pytest.mark.parametrize("n_good", [0, 30], ids=["in the estimation", "in training"])
@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING.keys())
def test_line_06_a_source_that_yields_nothing_any_more_is_an_error(
    nothing: Tensor, n_good: int
) -> None:
    """For example a model whose float16 activations overflow on every token."""

    def source() -> Iterator[Tensor]:
        yield from itertools.islice(batches(), n_good)
        yield from itertools.repeat(nothing, 500)
        raise TimeoutError("500 batches with nothing in them, and still asking for more")

    trainer = WhiteningTrainer(
        trainer_config(), topk_sae(), source(), WhiteningConfig(on_nonfinite="skip")
    )
    with pytest.raises(ValueError, match=r"empty|no (finite )?activations|not finite|skipped"):
        trainer.fit()


# --- 7

WHITENING_FILE = "activation_whitening.safetensors"


def checkpoints(folder: Path, seed: int) -> Path:
    """A checkpoint of ours half-way through training, on data of its own."""
    cfg = trainer_config(n_checkpoints=1, checkpoint_path=str(folder))
    WhiteningTrainer(cfg, topk_sae(), batches(seed)).fit()
    (checkpoint,) = folder.iterdir()
    return checkpoint


def test_line_07_stock_continues_in_another_basis_without_a_word(tmp_path: Path) -> None:
    """What the tests below are about."""
    cfg = trainer_config(n_checkpoints=1, checkpoint_path=str(tmp_path))
    trainer = SAETrainer(cfg, topk_sae(), batches())
    run_by_hand(trainer, 40)
    trainer.save_checkpoint("half_way")

    def whitened_explained_variance(trainer: SAETrainer[Any, Any]) -> float:
        z = trainer.activation_scaler.scale(activations(256))
        return explained_variance(trainer.sae, z)

    before = whitened_explained_variance(trainer)
    (tmp_path / "half_way" / WHITENING_FILE).unlink()
    resumed = SAETrainer(cfg, topk_sae(), batches(9))
    resumed.sae.load_weights_from_checkpoint(tmp_path / "half_way")
    resumed.load_trainer_state(tmp_path / "half_way")
    run_by_hand(resumed, 0)
    assert whitened_explained_variance(resumed) < before - 0.1


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "tampered":
        path.write_bytes(content[:-8] + bytes(8))
    elif how == "foreign":
        ActivationStatistics(D_IN).save(path)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("missing", FileNotFoundError),
        ("truncated", CorruptFileError),
        ("tampered", CorruptFileError),
        ("foreign", CorruptFileError),
    ],
)
def test_line_07_a_whitening_that_is_missing_or_damaged_is_an_error(
    how: str, error: type[Exception], tmp_path: Path
) -> None:
    checkpoint = checkpoints(tmp_path, seed=0)
    (file,) = checkpoint.rglob(WHITENING_FILE)
    spoil(file, how)
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), batches(9))
    with pytest.raises(error) as raised:
        trainer.load_trainer_state(checkpoint)
    assert str(file) in str(raised.value)
    assert trainer.scaler.whitening is None


@pytest.mark.parametrize("how", ["missing", "truncated", "another configuration"])
def test_line_07_a_checkpoint_that_is_refused_is_not_half_loaded(how: str, tmp_path: Path) -> None:
    """Trained on from there, the weights would be in a basis that they were never trained in."""
    checkpoint = checkpoints(tmp_path, seed=0)
    (file,) = checkpoint.rglob(WHITENING_FILE)
    config = WhiteningConfig(kind="zca") if how == "another configuration" else None
    spoil(file, how)
    trainer = WhiteningTrainer(trainer_config(), topk_sae(seed=2), batches(9), config)
    before = state(trainer.sae)
    with pytest.raises((ValueError, FileNotFoundError)):
        trainer.load_trainer_state(checkpoint)
    assert same(before, state(trainer.sae))
    assert trainer.scaler.whitening is None
    assert (trainer.n_training_samples, trainer.stream.n_served) == (0, 0)
    assert not trainer.optimizer.state


def test_line_07_the_whitening_of_another_run_is_an_error(tmp_path: Path) -> None:
    checkpoint, other = (checkpoints(tmp_path / str(seed), seed) for seed in (0, 1))
    (file,), (other_file,) = checkpoint.rglob(WHITENING_FILE), other.rglob(WHITENING_FILE)
    shutil.copy(other_file, file)
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    with pytest.raises(ValueError, match="whitening"):
        trainer.load_trainer_state(checkpoint)


def test_line_07_another_configuration_is_an_error(tmp_path: Path) -> None:
    checkpoint = checkpoints(tmp_path, seed=0)
    zca = WhiteningConfig(kind="zca")
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), batches(), zca)
    with pytest.raises(ValueError, match=r"kind='pca' \(now 'zca'\)"):
        trainer.load_trainer_state(checkpoint)


def test_line_07_weights_that_mean_something_else_are_an_error(tmp_path: Path) -> None:
    """Without the rescaling, the same weights are another SAE."""
    checkpoint = checkpoints(tmp_path, seed=0)
    cfg = topk_config(rescale_acts_by_decoder_norm=False)
    trainer = WhiteningTrainer(trainer_config(), topk_sae(cfg), batches())
    with pytest.raises(ValueError, match="rescale_acts_by_decoder_norm"):
        trainer.load_trainer_state(checkpoint)


def test_line_07_a_whitening_of_another_width_is_an_error() -> None:
    narrow = whitening_of(activations(4096)[:, :8])
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    trainer.scaler.whitening = narrow
    with pytest.raises(ValueError, match="of width 8, the SAE of width 16"):
        trainer.fit()


@dataclass
class NoWhitening:
    mean: Tensor
    matrix: Tensor
    inverse_matrix: Tensor


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_line_07_fine_tuning_starts_with_an_exact_change_of_basis(architecture: str) -> None:
    x = activations(256)
    torch.manual_seed(1)
    options: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "normalize_activations": "none"}
    if architecture == "topk":
        options["k"] = K
    published = randomised(TrainingSAE.from_dict({"architecture": architecture, **options}))
    identity = torch.eye(D_IN, dtype=torch.float64)
    before = Reference.of(published, NoWhitening(torch.zeros(D_IN), identity, identity))

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


def test_line_07_weights_of_an_unknown_basis_are_not_fine_tuned(tmp_path: Path) -> None:
    """A checkpoint of sae-lens' own trainer, given as the SAE to start from."""
    trainer = SAETrainer(trainer_config(checkpoint_path=str(tmp_path)), topk_sae(), batches())
    run_by_hand(trainer, 10)
    trainer.save_checkpoint("half_way")
    cfg = runner_config(from_pretrained_path=f"{tmp_path}/half_way")
    runner = stock_runner(cfg)  # accepted: it will be trained in a basis that is yet to come
    assert runner.sae.cfg.normalize_activations == "covariance_whitening"
    with pytest.raises(ValueError, match=r"half_way.*whitened coordinates"):
        ours_runner(cfg)


# --- 8


def interrupting_model(signum: int, at_call: int) -> HookedTransformer:
    """Sends a signal to this process while the model computes activations."""
    model = tiny_model()
    n_calls = 0

    def send(tensor: Tensor, *, hook: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == at_call:
            os.kill(os.getpid(), signum)

    model.add_perma_hook("hook_embed", send)
    return model


N_CALLS = 40
"""Calls of the model after which training has had some of its 80 steps, and not all of them."""


@pytest.mark.usefixtures("_restore_signal_handlers")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("prefetch", [False, True], ids=["", "prefetching"])
def test_line_08_an_interrupted_run_is_saved_and_resumed_to_the_bit(
    signum: signal.Signals, prefetch: bool, tmp_path: Path
) -> None:
    if not prefetch:
        cfg = runner_config(checkpoint_path=f"{tmp_path}/stock")
        runner = stock_runner(cfg, interrupting_model(signum, N_CALLS))
        with pytest.raises(Exception, match="No such file or directory"):
            runner.run()
        assert not list(tmp_path.rglob("*.safetensors"))

    signal.signal(signum, signal.default_int_handler)
    cfg = runner_config(checkpoint_path=f"{tmp_path}/ours", prefetch_llm_batches=prefetch)
    runner = ours_runner(cfg, interrupting_model(signum, N_CALLS))
    with pytest.raises(KeyboardInterrupt if signum == signal.SIGINT else SystemExit) as raised:
        runner.run()
    if signum == signal.SIGTERM:
        assert raised.value.args == (128 + signal.SIGTERM,)
    assert signal.getsignal(signum) is signal.default_int_handler
    (checkpoint,) = Path(str(cfg.checkpoint_path)).iterdir()
    assert 0 < int(checkpoint.name) < 80 * 128
    assert SAE.load_from_disk(checkpoint).cfg.normalize_activations == "none"

    uninterrupted = ours_runner(runner_config()).run()
    resuming = runner_config(resume_from_checkpoint=str(checkpoint), prefetch_llm_batches=prefetch)
    resumed = ours_runner(resuming, seed=6).run()
    assert same(state(resumed), state(uninterrupted))
    assert resumed.cfg.metadata.l0 == uninterrupted.cfg.metadata.l0


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaling", "not rescaling"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False], ids=["b_dec", "no b_dec"])
def test_line_08_interrupted_fine_tuning_is_resumed_to_the_bit(
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


# --- 9


def off_identity(whitened: Tensor) -> float:
    covariance = torch.cov(whitened.double().T)
    return float((covariance - torch.eye(D_IN)).norm() / D_IN**0.5)


def test_line_09_whitening_does_not_depend_on_the_unit() -> None:
    x = activations(8192)
    for scale, worst in ((1.0, 0.1), (1e-3, 0.9)):
        stock = estimated_by_stock(x * scale)
        z = (x.double() * scale - stock.mean) @ stock.matrix
        assert (off_identity(z) > 0.9) == (worst == 0.9)

    z = whitening_of(x.double()).whiten(x.double())
    for scale in (1e-6, 1e-3, 1e3, 1e6):
        ours = whitening_of(x.double() * scale)
        # eigenvalues are exact to rounding of the largest, and the smallest is 1e-3 of the mean:
        # in float64, 1e-9 is far above rounding and far below any effect of the unit
        assert torch.allclose(ours.whiten(x.double() * scale), z, rtol=0, atol=1e-9)


def test_line_09_training_does_not_depend_on_the_unit() -> None:
    """At 1/1024 of the unit, where scaling is exact, every weight is that at 1, to the bit."""

    def trained(scale: float, trainer_class: Any) -> Any:
        return trainer_class(trainer_config(), topk_sae(), batches(scale=scale)).fit()

    x = activations(512)
    small = 2.0**-10
    stock = explained_variance(trained(1.0, SAETrainer), x)
    assert abs(explained_variance(trained(small, SAETrainer), x * small) - stock) > 0.1

    at_one, at_small = (state(trained(scale, WhiteningTrainer)) for scale in (1.0, small))
    units = {"W_enc": 1 / small, "b_enc": 1.0, "W_dec": small, "b_dec": small}
    assert same({name: at_one[name] * unit for name, unit in units.items()}, at_small)


# --- 10


def held_out_spectrum(whitening: Any, x: Tensor) -> Tensor:
    """Variances of held-out activations in whitened coordinates; all 1 if it were perfect."""
    z = (x.double() - whitening.mean) @ whitening.matrix
    return torch.linalg.eigvalsh(torch.cov(z.T))


@pytest.mark.parametrize("n", [12, 18])
def test_line_10_few_samples_are_shrunk_and_warned_about(
    n: int, caplog: pytest.LogCaptureFixture
) -> None:
    from sklearn.covariance import OAS

    few, held_out = activations(n, seed=3), activations(8192)
    stock = held_out_spectrum(estimated_by_stock(few), held_out)

    with caplog.at_level(logging.WARNING, logger="sae_whiten"):
        ours = whitening_of(few)
    assert f"{n} activations of 16 dimensions" in caplog.text
    assert "1600 activations" in caplog.text

    # the same from scikit-learn's estimate, whose divisor is n instead of n - 1
    covariance = torch.from_numpy(OAS().fit(few.double().numpy()).covariance_) * n / (n - 1)
    ridge = 1e-3 * covariance.trace() / D_IN * torch.eye(D_IN)
    values, basis = torch.linalg.eigh(covariance + ridge)
    expected = NoWhitening(few.double().mean(0), basis / values.sqrt(), basis)
    spectrum = held_out_spectrum(ours, held_out)
    # eigenvalues are backward stable: relative to the largest, times the condition of the estimate
    rounding = 100 * D_IN * torch.finfo(torch.float64).eps * float(values[-1] / values[0])
    assert torch.allclose(spectrum, held_out_spectrum(expected, held_out), rtol=rounding)
    assert spectrum[-1] < stock[-1] / 10

    caplog.clear()
    enough = activations(1600, seed=3)
    with caplog.at_level(logging.WARNING, logger="sae_whiten"):
        assert whitening_of(enough).shrinkage == 0
    assert not caplog.records


def test_line_10_the_number_that_the_warning_names_suffices() -> None:
    """Held-out variance of Gaussian activations is then inflated by d / (n - d), about 1%."""
    basis = torch.randn(D_IN, D_IN, dtype=torch.float64, generator=_generator(1))
    off = []
    for seed in range(20):
        x = torch.randn(1600, D_IN, dtype=torch.float64, generator=_generator(seed)) @ basis
        whitening = whitening_of(x, WhiteningConfig(eps=0.0))
        # exactly, for the covariance of the whole population is known
        off.append(float((whitening.W.T @ basis.T @ basis @ whitening.W).trace() / D_IN - 1))
    mean, spread = torch.tensor(off).mean(), torch.tensor(off).std() / 20**0.5
    assert abs(float(mean) - D_IN / (1600 - D_IN)) < 4 * float(spread)


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_line_10_constant_dimensions_are_not_blown_up(kind: Any) -> None:
    x = activations(4096)
    x[:, [1, 8]] = torch.tensor([7.3, -0.4])
    step = torch.zeros(D_IN, dtype=torch.float64)
    step[8] = 1.0

    stock = estimated_by_stock(x)
    assert (step @ stock.matrix).norm() > 31

    ours = whitening_of(x, WhiteningConfig(kind=kind))
    variances = x.double().var(dim=0)
    average = float(variances.mean()) ** -0.5
    # the gain of a direction of average variance
    assert float((step @ ours.W).norm()) == pytest.approx(average, rel=1e-9)
    assert torch.allclose(ours.W @ ours.W_inv, torch.eye(D_IN, dtype=torch.float64), atol=1e-12)


def test_line_10_directions_without_variance_are_not_blown_up() -> None:
    """Behind a LayerNorm every activation sums to 0, but for float32 rounding."""
    x = torch.randn(4096, D_IN, generator=_generator(4)) * torch.logspace(-1, 1, D_IN)
    x = torch.nn.functional.layer_norm(x, (D_IN,))
    step = torch.full((D_IN,), D_IN**-0.5, dtype=torch.float64)
    assert 0 < (x.double() @ step).std() < 1e-6

    variances = x.double().var(dim=0)
    assert (step @ estimated_by_stock(x).matrix).norm() > 31 / float(variances.mean()) ** 0.5
    gain = float((step @ whitening_of(x).W).norm())
    # of rounding, the other directions are 1e-6 into it at most
    assert gain == pytest.approx(float(variances.mean()) ** -0.5, rel=1e-4)


# --- 11


def test_line_11_bfloat16_activations_are_whitened_in_float32() -> None:
    estimation, x = large_means(4096), large_means(256, start=4096).bfloat16()

    def error(z: Tensor, whitening: Any) -> float:
        expected = (x.double() - whitening.mean) @ whitening.matrix
        return float((z.double() - expected).norm() / expected.norm())

    scaler = ActivationScaler()
    scaler.whitening = estimated_by_stock(estimation)
    assert error(scaler.scale(x), scaler.whitening) > 0.02

    ours = CovarianceWhiteningScaler()
    ours.whitening = whitening = whitening_of(estimation)
    z = ours.scale(x)
    assert z.dtype == torch.bfloat16
    expected = (x.double() - whitening.mean) @ whitening.W
    # one rounding to bfloat16, after float32: centring, W, product and what is left of the mean
    to_bfloat16 = torch.finfo(torch.bfloat16).eps / 2
    in_float32 = (D_IN + 4) * UNIT * ((x.double() - whitening.mean).abs() @ whitening.W.abs())
    bound = to_bfloat16 * (expected.abs() + in_float32) + in_float32
    assert ((z.double() - expected).abs() <= bound).all()

    back = ours.unscale(z)
    expected = z.double() @ whitening.W_inv + whitening.mean
    total = z.double().abs() @ whitening.W_inv.abs() + whitening.mean.abs()
    in_float32 = (D_IN + 4) * UNIT * total
    bound = to_bfloat16 * (expected.abs() + in_float32) + in_float32
    assert back.dtype == torch.bfloat16
    assert ((back.double() - expected).abs() <= bound).all()

    # and inside autocast, which would turn the product into a bfloat16 one
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours.scale(x), z)
        assert torch.equal(ours.scale(x.float()).bfloat16(), z)


# --- 12


def test_line_12_large_means_do_not_cancel_without_b_dec_at_the_input() -> None:
    estimation, x = large_means(4096), large_means(2048, start=4096)
    sae = randomised(topk_sae(topk_config(apply_b_dec_to_input=False)))

    stock, whitening = copy.deepcopy(sae), estimated_by_stock(estimation)
    reference = Reference.of(sae, whitening)
    stock_fold(stock, whitening)
    by_stock = active_set_change(stock, reference, x)
    assert rounding_units(stock, reference, x) > 10

    ours = whitening_of(estimation)
    reference = Reference.of(sae, ours)
    fold_whitening_into_weights(sae, ours)
    assert rounding_units(sae, reference, x) <= 1
    assert active_set_change(sae, reference, x) < by_stock / 4


# --- 13


def test_line_13_explained_variance_is_logged_in_the_space_of_the_activations() -> None:
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


def test_line_13_evaluators_see_the_decoder_in_the_space_of_the_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """sae-lens' own measure of recovery compares decoder rows with the true features."""
    from sae_lens.synthetic.evals import mean_correlation_coefficient

    def final_and_logged(trainer_class: Any) -> tuple[float, float]:
        logs: list[dict[str, Any]] = []
        monkeypatch.setattr("wandb.log", lambda values, step: logs.append(values))

        def evaluator(sae: Any, data_provider: Any, activation_scaler: Any) -> dict[str, float]:
            return {"mcc": mean_correlation_coefficient(sae.W_dec.detach(), _FEATURES)}

        wandb = LoggingConfig(log_to_wandb=True, wandb_log_frequency=1, eval_every_n_wandb_logs=1)
        sae = topk_sae()
        trainer_class(trainer_config(logger=wandb), sae, batches(), evaluator=evaluator).fit()
        return mean_correlation_coefficient(sae.W_dec.detach(), _FEATURES), [
            values["mcc"] for values in logs if "mcc" in values
        ][-1]

    final, logged = final_and_logged(SAETrainer)
    assert abs(final - logged) > 0.05

    final, logged = final_and_logged(WhiteningTrainer)
    # a cosine of float32 vectors: rounding of the entries, of the product and of two norms
    assert abs(final - logged) <= (2 * D_IN + 8) * 2 * UNIT


# --- 15


def test_line_15_what_the_estimation_read_is_trained_on() -> None:
    """Every batch, in order, and no other; one more is drawn to prove the fold on."""

    def read_and_trained_on(trainer_class: Any) -> tuple[list[Tensor], list[Tensor]]:
        read: list[Tensor] = []
        trained: list[Tensor] = []

        def source() -> Iterator[Tensor]:
            for batch in batches():
                read.append(batch)
                yield batch

        class Recording(trainer_class):
            def step(self, batch: Tensor) -> Any:
                trained.append(batch)
                return super().step(batch)

        Recording(trainer_config(40), topk_sae(), source()).fit()
        return read, trained

    read, trained = read_and_trained_on(SAETrainer)
    assert (len(read), len(trained)) == (65, 40)

    read, trained = read_and_trained_on(WhiteningTrainer)
    assert (len(read), len(trained)) == (41, 40)
    assert all(torch.equal(a, b) for a, b in zip(read, trained, strict=False))


# --- 16


def test_line_16_a_source_that_ends_too_early_is_told_how_much_was_needed() -> None:
    with pytest.raises(StopIteration):
        SAETrainer(trainer_config(), topk_sae(), itertools.islice(batches(), 3)).fit()
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), itertools.islice(batches(), 3))
    with pytest.raises(ValueError, match=r"192 activations in 3 batches") as caught:
        trainer.fit()
    needed = re.search(r"needs about (\d+)", str(caught.value))
    assert needed is not None
    assert 192 < int(needed.group(1)) < 4000


def test_line_16_a_source_that_ends_in_training_is_told_how_much_was_needed() -> None:
    with pytest.raises(StopIteration):
        SAETrainer(trainer_config(40), topk_sae(), itertools.islice(batches(), 55)).fit()
    sae = topk_sae()
    trainer = WhiteningTrainer(trainer_config(40), sae, itertools.islice(batches(), 30))
    with pytest.raises(ValueError, match="ended after") as raised:
        trainer.fit()
    # nothing is lost
    expected = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    run_by_hand(expected, 30)
    assert same(state(sae), state(expected.sae))
    # had, and needed: in batches or in activations
    message = str(raised.value)
    assert "30" in message or str(30 * BATCH) in message
    assert "40" in message or str(40 * BATCH) in message


# --- 17


def refused(fold: Callable[[], object], sae: Any, message: str) -> None:
    before, cfg = state(sae), copy.deepcopy(sae.cfg.to_dict())
    with pytest.raises(FoldError, match=message):
        fold()
    assert same(before, state(sae))
    assert sae.cfg.to_dict() == cfg


def test_line_17_folding_twice_and_folding_what_was_not_whitened_are_refused(
    tmp_path: Path,
) -> None:
    x = activations(256)

    stock = SAETrainer(trainer_config(), topk_sae(), batches()).fit()
    assert explained_variance(stock, x) > 0.5
    stock_fold(stock, estimated_by_stock(activations(4096)))  # accepted
    assert explained_variance(stock, x) < 0

    trainer = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    sae = trainer.fit()
    assert explained_variance(sae, x) > 0.5
    whitening = trainer.whitening
    assert whitening is not None
    refused(lambda: fold_whitening_into_weights(sae, whitening), sae, "folded in already")

    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    refused(lambda: fold_whitening_into_weights(loaded, whitening), loaded, "folded in already")

    plain = topk_sae(topk_config(normalize_activations="none"))
    refused(lambda: fold_whitening_into_weights(plain, whitening), plain, "was not trained under")
    with pytest.raises(ValueError, match="normalize_activations='none'"):
        WhiteningTrainer(trainer_config(), plain, batches())
    with pytest.raises(ValueError, match="normalize_activations='none'"):
        ours_runner(runner_config(sae=topk_config(normalize_activations="none")))

    weights = state(sae)
    with pytest.raises(ValueError, match="folded already"):
        trainer.fit()
    assert same(weights, state(sae))


# --- 18

TRANSCODERS: list[tuple[type[Any], type[Any]]] = [
    (Transcoder, TranscoderConfig),
    (SkipTranscoder, SkipTranscoderConfig),
    (JumpReLUTranscoder, JumpReLUTranscoderConfig),
    (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig),
]
D_OUT = 8


def transcoder(classes: tuple[type[Any], type[Any]], d_out: int = D_OUT) -> Any:
    cls, config_class = classes
    torch.manual_seed(1)
    options: dict[str, Any] = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "d_out": d_out,
        "apply_b_dec_to_input": False,
    }
    return randomised(cls(config_class(normalize_activations="covariance_whitening", **options)))


def written(x: Tensor, d_out: int = D_OUT) -> Tensor:
    """Activations at the other hook."""
    matrix = torch.randn(D_IN, d_out, generator=_generator(11))
    return torch.tanh(x @ matrix / 10) * torch.logspace(0, 2, d_out) - 20.0


@pytest.mark.parametrize("classes", TRANSCODERS, ids=lambda classes: classes[0].__name__)
def test_line_18_transcoders_are_folded_with_two_whitenings(classes: Any) -> None:
    estimation, x = activations(4096, seed=2), activations(256)

    stock = transcoder(classes)
    before = state(stock)
    with pytest.raises(RuntimeError):
        stock_fold(stock, estimated_by_stock(estimation))
    assert not same(before, state(stock))  # half of the weights were overwritten

    whitening, out = whitening_of(estimation), whitening_of(written(estimation))
    sae = transcoder(classes)
    reference = Reference.of(sae, whitening, out)
    fold_whitening_into_weights(sae, whitening, out)
    assert rounding_units(sae, reference, x) <= 1
    assert sae.cfg.normalize_activations == "none"


@pytest.mark.parametrize("classes", TRANSCODERS, ids=lambda classes: classes[0].__name__)
def test_line_18_the_output_side_of_a_square_transcoder_is_the_other_hook(classes: Any) -> None:
    estimation, x = activations(4096, seed=2), activations(256)
    other = written(estimation, D_IN)

    stock = transcoder(classes, D_IN)
    whitening, out = estimated_by_stock(estimation), estimated_by_stock(other)
    reference = Reference.of(stock, whitening, out)
    stock_fold(stock, whitening)
    assert rounding_units(stock, reference, x) > 1000

    whitening, out = whitening_of(estimation), whitening_of(other)
    sae = transcoder(classes, D_IN)
    reference = Reference.of(sae, whitening, out)
    fold_whitening_into_weights(sae, whitening, out)
    assert rounding_units(sae, reference, x) <= 1


@pytest.mark.parametrize("classes", TRANSCODERS, ids=lambda classes: classes[0].__name__)
def test_line_18_the_fold_of_a_transcoder_can_be_proved_on_activations(classes: Any) -> None:
    estimation, x = activations(4096, seed=2), activations(256)
    whitening, out = whitening_of(estimation), whitening_of(written(estimation))
    sae = transcoder(classes)
    reference = Reference.of(sae, whitening, out)
    report = fold_whitening_into_weights(sae, whitening, out, activations=x)
    assert rounding_units(sae, reference, x) <= 1
    assert report.check is not None
    assert report.check.passed


def test_line_18_a_transcoder_that_cannot_be_folded_is_left_as_it_was() -> None:
    estimation = activations(4096, seed=2)
    whitening, out = whitening_of(estimation), whitening_of(written(estimation))
    sae = transcoder(TRANSCODERS[1])
    refused(lambda: fold_whitening_into_weights(sae, whitening), sae, "output_whitening")
    refused(lambda: fold_whitening_into_weights(sae, out, whitening), sae, "16 to 8 dimensions")
    square = transcoder(TRANSCODERS[0], D_IN)
    refused(lambda: fold_whitening_into_weights(square, whitening), square, "output_whitening")
    with torch.no_grad():
        sae.W_skip[3, 2] = float("inf")
    refused(lambda: fold_whitening_into_weights(sae, whitening, out), sae, "not finite")


# --- 19


class TopKByNorm(StandardTrainingSAE):
    """An architecture of a user's own: keeps as many latents as the norm of the input says."""

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latents, pre = super().encode_with_hidden_pre(x)
        return latents * (pre > 0.05 * x.norm(dim=-1, keepdim=True)), pre


class DeclaredTopKByNorm(TopKByNorm):
    whitening_not_foldable_because = "its selection uses the norm of the input"


def by_norm(cls: Any) -> Any:
    torch.manual_seed(1)
    options: dict[str, Any] = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "normalize_activations": "covariance_whitening",
    }
    return cls(StandardTrainingSAEConfig(l1_coefficient=0.1, **options))


def test_line_19_an_architecture_that_cannot_be_folded_is_refused_at_construction() -> None:
    torch.manual_seed(1)
    options: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE}
    pursuit = MatchingPursuitTrainingSAE(MatchingPursuitTrainingSAEConfig(**options))
    temporal = TemporalSAE(TemporalSAEConfig(n_heads=1, **options))
    declared = by_norm(DeclaredTopKByNorm)

    # accepted, trained, and folded into another function
    x = activations(256)
    stock = SAETrainer(trainer_config(), by_norm(DeclaredTopKByNorm), batches())
    run_by_hand(stock, 40)
    z = stock.activation_scaler.scale(x)
    latents = stock.sae.encode(z)
    stock_fold(stock.sae, stock.activation_scaler.whitening)
    assert ((stock.sae.encode(x) != 0) != (latents != 0)).any(dim=1).float().mean() > 0.5

    # its own config refuses to be asked for whitening; an override does not come with one
    pursuit.cfg.normalize_activations = "covariance_whitening"
    with pytest.raises(FoldError, match="encoder is tied to the decoder"):
        WhiteningTrainer(trainer_config(), pursuit, batches())
    torch.manual_seed(5)
    with pytest.raises(FoldError, match="encoder is tied to the decoder"):
        WhiteningTrainingRunner(
            runner_config(),
            override_dataset=tiny_dataset(),
            override_model=tiny_model(),
            override_sae=pursuit,
        )
    with pytest.raises(FoldError, match="uses the norm of the input"):
        WhiteningTrainer(trainer_config(), declared, batches())
    assert type(declared) is DeclaredTopKByNorm

    # its own config cannot be asked for whitening either
    temporal.cfg.normalize_activations = "covariance_whitening"
    whitening = whitening_of(x)
    refused(lambda: fold_whitening_into_weights(temporal, whitening), temporal, "over positions")


def test_line_19_an_architecture_that_nobody_declared_is_never_folded_into_something_else(
    tmp_path: Path,
) -> None:
    sae = by_norm(TopKByNorm)
    with pytest.raises(FoldError) as raised:
        WhiteningTrainer(trainer_config(checkpoint_path=str(tmp_path)), sae, batches()).fit()
    assert sae.cfg.normalize_activations == "covariance_whitening"
    # of the class itself at once, or of the proof at the end with both forms kept
    if "Both forms are in" in str(raised.value):
        (kept,) = tmp_path.iterdir()
        assert str(kept) in str(raised.value)
        assert list(kept.rglob("training_weights.safetensors"))
        assert (kept / "cfg.json").exists()


# --- 20


@pytest.mark.usefixtures("_restore_signal_handlers")
def test_line_20_the_saved_config_says_how_it_was_whitened(tmp_path: Path) -> None:
    stock_runner(runner_config(training_tokens=1280, output_path=f"{tmp_path}/stock")).run()
    assert "whiten" not in (tmp_path / "stock" / "cfg.json").read_text()

    config = WhiteningConfig(kind="zca", eps=2e-3, shrinkage=0.1, n_samples=1900)
    cfg = runner_config(training_tokens=1280, output_path=f"{tmp_path}/ours")
    ours_runner(cfg, whitening=config).run()
    statistics = ActivationStatistics.load(tmp_path / "ours" / "activation_statistics.safetensors")
    assert 1900 <= statistics.n_samples < 1900 + 128
    assert statistics.provenance["hook_name"] == HOOK
    assert statistics.provenance["model_name"] == "tiny"

    # as anybody finds it who opens the result with sae-lens alone
    saved = SAE.load_from_disk(tmp_path / "ours").cfg.metadata.whitening
    assert (
        saved == json.loads((tmp_path / "ours" / "cfg.json").read_text())["metadata"]["whitening"]
    )
    assert "covariance_whitening" in saved["method"]
    assert saved["config"] == config.to_dict()
    assert saved["n_samples"] == statistics.n_samples
    assert saved["shrinkage"] == 0.1
    check = saved["fold"]["check"]
    assert check["source"] == "held-out"
    assert check["n_activations"] == 128
    assert 0 < check["fold_error"] <= check["tolerance"] < 1e-3


def test_line_20_a_resumed_run_writes_what_an_uninterrupted_one_writes(tmp_path: Path) -> None:
    cfg = runner_config(
        training_tokens=2560,
        checkpoint_path=f"{tmp_path}/checkpoints",
        n_checkpoints=1,
        output_path=f"{tmp_path}/uninterrupted",
    )
    ours_runner(cfg).run()
    (checkpoint,) = Path(str(cfg.checkpoint_path)).iterdir()
    cfg = runner_config(
        training_tokens=2560,
        resume_from_checkpoint=str(checkpoint),
        output_path=f"{tmp_path}/resumed",
    )
    ours_runner(cfg).run()
    written = [
        {path.name for path in (tmp_path / name).iterdir()} for name in ("uninterrupted", "resumed")
    ]
    assert written[0] == written[1]
    saved = [
        json.loads((tmp_path / name / "cfg.json").read_text())["metadata"]["whitening"]
        for name in ("uninterrupted", "resumed")
    ]
    assert saved[0] == saved[1]


# --- 21


def test_line_21_a_width_that_divides_the_size_is_an_error() -> None:
    x = activations(256)
    scaler = ActivationScaler()
    scaler.estimate_whitening(8, iter([x]), n_batches_for_norm_estimate=1)
    assert scaler.whitening is not None
    assert scaler.whitening.mean.shape == (8,)  # of (256, 16), as if it were (512, 8)

    message = r"\(256, 16\).*8"
    with pytest.raises(ValueError, match=message):
        ActivationStatistics(8).update(x)
    with pytest.raises(ValueError, match=message):
        CovarianceWhiteningScaler().estimate_whitening(8, iter([x]))
    narrow = topk_sae(topk_config(d_in=8))
    before = state(narrow)
    with pytest.raises(ValueError, match=r"\(64, 16\).*8"):
        WhiteningTrainer(trainer_config(), narrow, batches()).fit()
    assert same(before, state(narrow))

    ours = CovarianceWhiteningScaler()
    ours.whitening = whitening_of(x)
    wrong_shapes = [(256, 8), (256, 32), (512, 8), (8,), (1,), (), (2, 4), (256, 4, 2)]
    for shape in wrong_shapes:
        for method in (ours.scale, ours.unscale):
            with pytest.raises(ValueError, match="16"):
                method(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\(256, 8\)"):
        ours.whitening.whiten(torch.zeros(256, 8))
    with pytest.raises(ValueError, match=r"\(256, 32\)"):
        ours.whitening.dewhiten(torch.zeros(256, 32))


@pytest.mark.parametrize("shape", [(16,), (2, 2, 4, 16), (256, 8)])
def test_line_21_statistics_take_two_or_three_dimensions(shape: tuple[int, ...]) -> None:
    statistics = ActivationStatistics(D_IN)
    with pytest.raises(ValueError, match="expected"):
        statistics.update(torch.zeros(shape))
    assert statistics.n_samples == 0


def test_line_21_activations_of_the_wrong_shape_do_not_prove_a_fold() -> None:
    whitening = whitening_of(activations(4096))
    for shape in ((4, 16, 16), (16,), (256, 8), (0, 16)):
        sae = topk_sae()
        x = torch.zeros(shape)
        refused(
            lambda sae=sae, x=x: fold_whitening_into_weights(sae, whitening, activations=x),
            sae,
            r"expected shape \(n, 16\)",
        )


def test_line_21_hook_z_works_in_both_directions_and_in_training() -> None:
    x = activations(256)
    heads = x.reshape(256, 4, 4)

    scaler = ActivationScaler()
    scaler.estimate_whitening(D_IN, iter([heads]), n_batches_for_norm_estimate=1)
    with pytest.raises(RuntimeError):
        scaler.scale(heads)

    ours, flat = CovarianceWhiteningScaler(), CovarianceWhiteningScaler()
    ours.estimate_whitening(D_IN, itertools.repeat(heads))
    flat.estimate_whitening(D_IN, itertools.repeat(x))
    z = ours.scale(heads)
    assert z.shape == heads.shape
    assert torch.equal(z.reshape(256, D_IN), flat.scale(x))
    back = ours.unscale(z)
    assert back.shape == heads.shape
    assert torch.equal(back.reshape(256, D_IN), flat.unscale(flat.scale(x)))
    sequences = heads.reshape(8, 32, 4, 4)
    assert torch.equal(ours.scale(sequences).reshape(256, 4, 4), z)

    def by_heads() -> Iterator[Tensor]:
        return (batch.reshape(BATCH, 4, 4) for batch in batches())

    with pytest.raises(RuntimeError):
        SAETrainer(trainer_config(), topk_sae(), by_heads()).fit()
    sae = WhiteningTrainer(trainer_config(), topk_sae(), by_heads()).fit()
    expected = WhiteningTrainer(trainer_config(), topk_sae(), batches()).fit()
    assert same(state(sae), state(expected))
