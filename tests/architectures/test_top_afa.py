import copy
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    SAE,
    LanguageModelSAETrainingRunner,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_whiten import (
    FoldError,
    WhiteningTrainingRunner,
    fold_whitening_into_weights,
    unfold_whitening_from_weights,
)
from sae_whiten.architectures import (
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
    top_afa,
)
from sae_whiten.architectures.top_afa import keep_up_to_norm
from sae_whiten.cli import main
from tests.processes import run_code
from tests.support import (
    friendly,
    nasty,
    runner_config,
    tiny_dataset,
    tiny_model,
    whitening_of,
)

D, D_SAE, N = 24, 96, 64
REASON = "norm of its input, which whitening does not preserve"


def afa(seed: int = 0, **options: Any) -> TopAFATrainingSAE:
    torch.manual_seed(seed)
    sae = TopAFATrainingSAE(TopAFATrainingSAEConfig(**{"d_in": D, "d_sae": D_SAE, **options}))
    with torch.no_grad():
        sae.b_dec.add_(torch.randn_like(sae.b_dec))
        sae.W_enc.mul_(0.5 + torch.rand(sae.cfg.d_sae).to(sae.W_enc))
    return sae


def inference(dtype: str = "float64", **options: Any) -> TopAFASAE:
    """With decoder rows of any norm."""
    torch.manual_seed(0)
    sae = TopAFASAE(TopAFASAEConfig(d_in=D, d_sae=D_SAE, dtype=dtype, **options))
    with torch.no_grad():
        sae.b_dec.add_(torch.randn_like(sae.b_dec))
        sae.W_enc.mul_(0.1).add_(0.03 * torch.randn_like(sae.W_enc))
        sae.W_dec.mul_(0.5 + 2 * torch.rand(D_SAE, 1))
    return sae


def step(
    sae: TrainingSAE[Any], x: Tensor, dead: Tensor | None = None, logged: bool = False
) -> TrainStepOutput:
    return sae.training_forward_pass(TrainStepInput(x, {"afa": 0.3}, dead, 0, logged))


@torch.no_grad()
def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- the selection ---


def norms_by_number(contributions: Tensor) -> Tensor:
    """The norm of the k largest, for k = 1, 2, ..., shape (batch, d_sae), one by one."""
    largest = contributions.double().sort(dim=-1, descending=True).values
    ks = range(1, contributions.shape[1] + 1)
    return torch.stack([largest[:, :k].norm(dim=-1) for k in ks], dim=1)


def assert_nearest(contributions: Tensor, norm: Tensor) -> Tensor:
    """What is kept are the largest, as many as come nearest; returns how many."""
    kept = keep_up_to_norm(contributions, norm)
    assert kept.dtype == contributions.dtype
    assert ((kept == 0) | (kept == 1)).all()
    n_kept = kept.sum(dim=-1).long()
    assert (n_kept >= 1).all()
    smallest_kept = contributions.masked_fill(kept == 0, torch.inf).amin(dim=-1)
    largest_left = contributions.masked_fill(kept == 1, -torch.inf).amax(dim=-1)
    assert (smallest_kept >= largest_left).all()
    distances = (norms_by_number(contributions) - norm.double()[:, None]).abs()
    rounding = 8 * torch.finfo(torch.float32).eps
    rounding = rounding * (norm.double() + norms_by_number(contributions)[:, -1])
    found = distances.gather(1, n_kept[:, None] - 1)[:, 0]
    assert (found <= distances.amin(dim=1) + rounding).all()
    # the least of several
    fewer = torch.arange(contributions.shape[1]) < n_kept[:, None] - 1
    fewer_is_nearer = fewer & (distances < found[:, None] - rounding[:, None])
    assert not fewer_is_nearer.any()
    assert ((kept * contributions > 0).sum(dim=-1) >= n_kept - (n_kept == 1).long()).all()
    return n_kept


VALUES = st.one_of(st.just(0.0), st.integers(1, 4).map(float), st.floats(0, 100, width=32))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(VALUES, min_size=7, max_size=7), min_size=1, max_size=6),
    targets=st.lists(VALUES, min_size=6, max_size=6),
)
def test_the_largest_are_kept_up_to_the_norm_that_is_nearest(rows, targets):
    contributions = torch.tensor(rows)
    assert_nearest(contributions, torch.tensor(targets[: len(rows)]))


def test_the_selection_by_hand():
    row = torch.tensor([0.0, 3.0, 4.0, 0.0, 12.0])
    # norms of the 1, 2, 3 largest: 12, 12.65, 13
    cases = {0.0: [12], 12.2: [12], 12.7: [12, 4], 12.9: [12, 4, 3], 13.0: [12, 4, 3]}
    cases |= {1e6: [12, 4, 3]}  # a target out of reach: everything that is not zero
    for target, expected in cases.items():
        kept = keep_up_to_norm(row[None], torch.tensor([target]))[0]
        assert sorted((row * kept)[kept == 1].tolist()) == sorted(map(float, expected)), target
    # exactly in the middle of two numbers: the least
    assert keep_up_to_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([4.5])).sum() == 1
    # ties: as many of them as are needed
    assert keep_up_to_norm(torch.ones(1, 9), torch.tensor([2.0])).sum() == 4
    # nothing is active: one that is zero is kept, which is as none
    assert keep_up_to_norm(torch.zeros(1, 5), torch.tensor([1.0])).sum() == 1


def uneven(batch: int, d_sae: int = 200) -> tuple[Tensor, Tensor]:
    """Most rows need a few latents; some of those that are not looked at first need all."""
    g = torch.Generator().manual_seed(0)
    contributions = torch.randn(batch, d_sae, generator=g).relu() + 0.01
    norm = 3 + torch.rand(batch, generator=g)
    stride = batch // 64
    norm[1::stride] = 0.8 * contributions[1::stride].norm(dim=1)
    norm[2 :: 7 * stride] = 100.0
    contributions[3::stride, 40:] = 0
    norm[3::stride] = 50.0
    return contributions, norm


@pytest.mark.parametrize("block", [1 << 24, 5000, 7])
@pytest.mark.parametrize("batch", [512, 513, 1111])
def test_sorting_a_part_and_in_blocks_selects_the_same(batch, block, monkeypatch):
    sorted_at_once = []
    topk = Tensor.topk

    def watched(self: Tensor, k: int, **options: Any) -> Any:
        sorted_at_once.append((len(self) * k, len(self), k))
        return topk(self, k, **options)

    contributions, norm = uneven(batch)
    monkeypatch.setattr(top_afa, "_BLOCK", block)
    monkeypatch.setattr(Tensor, "topk", watched)
    n_kept = assert_nearest(contributions, norm)
    monkeypatch.undo()
    assert int(n_kept.min()) < 12
    assert int(n_kept.max()) == 200
    # of one row all are sorted, however small the block is
    assert all(n <= block or rows == 1 for n, rows, _ in sorted_at_once), sorted_at_once
    widths = {k for _, _, k in sorted_at_once}
    if batch > 512 and block > 1000:
        # it was tried with fewer, and with more
        assert len(widths) >= (3 if block > 1 << 20 else 2)


def test_the_order_of_latents_does_not_matter():
    contributions, norm = uneven(700)
    contributions += 1e-3 * torch.rand(contributions.shape)  # no ties
    order = torch.randperm(200)
    expected = keep_up_to_norm(contributions, norm)[:, order]
    assert torch.equal(keep_up_to_norm(contributions[:, order], norm), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_latents_are_chosen_by_their_contributions_to_the_norm_of_the_centred_input(dtype):
    sae = inference(dtype)
    x = friendly(N, D).to(sae.dtype)
    expected = torch.zeros(N, D_SAE, dtype=sae.dtype)
    acts = ((x - sae.b_dec) @ sae.W_enc).relu().detach()
    contributions = acts * sae.W_dec.norm(dim=1).detach()
    for i, row in enumerate(contributions):
        order = row.argsort(descending=True)
        norms = row[order].square().cumsum(0).sqrt()
        k = int((norms - (x[i] - sae.b_dec).norm()).abs().argmin()) + 1
        expected[i, order[:k]] = acts[i, order[:k]]
    found = sae.encode(x)
    assert torch.equal(found != 0, expected != 0)
    assert torch.allclose(found, expected)
    n_active = (found != 0).sum(dim=1)
    assert len(n_active.unique()) > 3  # as many as each input asks for
    assert torch.allclose(sae.decode(found), found @ sae.W_dec + sae.b_dec)
    # norms of decoder rows count, and only together with their latents
    unit = copy.deepcopy(sae)
    unit.fold_W_dec_norm()
    # what is too little to change the norm in float32 may be kept or not
    assert relative(unit(x), sae(x)) < (1e-3 if dtype == "float32" else 1e-7)


def test_inputs_of_any_shape():
    for sae in (inference("float32"), afa()):
        x = friendly(N, D)
        expected = sae.encode(x)
        shaped = sae.encode(x.reshape(4, 16, D))
        assert torch.allclose(shaped.flatten(0, 1), expected, atol=1e-5)
        assert sae(x.reshape(4, 16, D)).shape == (4, 16, D)
        assert torch.allclose(sae.encode(x[3]), expected[3], atol=1e-5)
    heads = inference("float32", reshape_activations="hook_z")
    flat = inference("float32")
    x = friendly(N, D)
    assert torch.allclose(heads(x.reshape(N, 4, 6)), flat(x).reshape(N, 4, 6), atol=1e-5)
    assert heads.encode(x.reshape(4, 16, 4, 6)).shape == (4, 16, D_SAE)


def test_low_precision_chooses_as_many_as_full_precision():
    x = 20 * friendly(600, D)
    wide = inference("bfloat16").to(torch.float32)
    low = inference("bfloat16")
    few, many = wide.encode(x.bfloat16().float()), low.encode(x.bfloat16())
    assert many.dtype == torch.bfloat16
    difference = (few != 0).sum(dim=1) - (many != 0).sum(dim=1)
    assert float(difference.abs().float().mean()) < 0.25
    training = afa(dtype="bfloat16")
    loss = step(training, x).losses["afa_loss"]
    assert loss.dtype == torch.float32
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        step(afa(), x, dead_latents()).loss.backward()


# --- losses ---


def dead_latents() -> Tensor:
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[::5] = True
    return dead


@pytest.mark.parametrize("form", ["consistent", "published"])
def test_loss_and_gradients_are_those_of_the_formulas(form):
    sae = afa(afa_form=form, aux_loss_coefficient=0.0, dtype="float64")
    x = friendly(N, D).double()
    found = step(sae, x, logged=True)
    kept = found.feature_acts != 0  # no gradient passes the choice
    W_enc, W_dec, b_dec = (
        p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.W_dec, sae.b_dec)
    )
    latents = (x - b_dec) @ W_enc * kept
    directions = W_dec / W_dec.norm(dim=1, keepdim=True)
    target = ((x - b_dec) if form == "consistent" else x).detach().norm(dim=1)
    afa_loss = (latents.norm(dim=1) - target).square().mean()
    # lambda is relative to the error per dimension, of which there are D
    loss = (latents @ directions + b_dec - x).square().sum(dim=1).mean() + 0.3 * D * afa_loss
    assert found.losses["afa_loss"].item() == pytest.approx((0.3 * D * afa_loss).item())
    assert found.loss.item() == pytest.approx(loss.item())
    ratio = (latents.norm(dim=1) / (x - b_dec).norm(dim=1)).mean()
    assert float(found.metrics["norm_ratio"]) == pytest.approx(float(ratio))  # pyright: ignore[reportArgumentType]
    assert step(sae, x).metrics == {}
    found.loss.backward()
    loss.backward()
    for ours, expected in ((sae.W_enc, W_enc), (sae.W_dec, W_dec), (sae.b_dec, b_dec)):
        assert ours.grad is not None
        assert expected.grad is not None
        assert relative(ours.grad, expected.grad) < 1e-12


def test_dead_latents_are_revived_as_in_topk():
    sae = afa(dtype="float64", aux_loss_coefficient=0.25)
    x = friendly(N, D).double()
    dead = dead_latents()
    found = step(sae, x, dead)
    stock = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=D,
            d_sae=D_SAE,
            k=4,
            dtype="float64",
            aux_loss_coefficient=0.25,
            rescale_acts_by_decoder_norm=False,
        )
    )
    own = {"b_enc": torch.zeros(D_SAE), **sae.state_dict()}
    stock.load_state_dict(own)
    expected = stock.calculate_topk_aux_loss(
        x, found.sae_out, (x - stock.b_dec) @ stock.W_enc, dead
    )
    assert float(expected) > 0
    revived = found.losses["auxiliary_reconstruction_loss"]
    assert float(revived) == pytest.approx(float(expected))
    revived.backward()
    expected.backward()
    assert sae.W_enc.grad is not None
    assert stock.W_enc.grad is not None
    assert relative(sae.W_enc.grad, stock.W_enc.grad) < 1e-10
    assert (
        "auxiliary_reconstruction_loss" not in step(afa(aux_loss_coefficient=0.0), x, dead).losses
    )
    nobody = torch.zeros(D_SAE, dtype=torch.bool)
    assert float(step(sae, x, nobody).losses["auxiliary_reconstruction_loss"]) == 0


def test_rows_of_the_decoder_stay_directions():
    sae = afa(dtype="float64")
    with torch.no_grad():
        sae.W_dec.mul_(0.2 + torch.rand(D_SAE, 1).double())
    x = friendly(N, D).double()
    latents, output = sae.encode(x), sae(x)
    found = step(sae, x, dead_latents())
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE).double())
    assert torch.allclose(sae(x), output)
    assert torch.equal(sae.encode(x), latents)
    found.loss.backward()
    gradient = sae.W_dec.grad
    assert gradient is not None
    along = (gradient * sae.W_dec).sum(dim=1)
    assert along.abs().max() < 1e-12 * gradient.norm()


# --- training, saving, loading ---


def batches(n: int) -> Iterator[Tensor]:
    x = friendly(2048, D)
    for i in range(n):
        g = torch.Generator().manual_seed(i)
        yield x[torch.randperm(2048, generator=g)[:N]]


def trainer(sae: TrainingSAE[Any], n_steps: int = 60, **options: Any) -> SAETrainer[Any, Any]:
    cfg = SAETrainerConfig(
        total_training_samples=N * n_steps,
        train_batch_size_samples=N,
        lr=3e-3,
        lr_end=3e-4,
        dead_feature_window=5,
        n_batches_for_norm_estimate=4,
        **options,
    )
    return SAETrainer(cfg, sae, batches(n_steps + 4))


@pytest.mark.parametrize("options", [{}, {"autocast": True}])
def test_it_trains(options):
    sae = afa()
    made = trainer(sae, **options)
    outputs = [made.step(batch) for batch in batches(60)]
    assert outputs[-1].losses["mse_loss"] < 0.5 * outputs[0].losses["mse_loss"]
    # between two steps rows are off by the second order of the last
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-2


def test_what_is_saved_computes_what_was_trained(tmp_path):
    sae = afa()
    made = trainer(sae)
    made.fit()
    made.save_checkpoint("checkpoint", base_path=tmp_path)
    sae.save_inference_model(tmp_path / "sae")
    x = friendly(N, D)
    loaded = SAE.load_from_disk(tmp_path / "sae")
    assert type(loaded) is TopAFASAE
    assert set(loaded.state_dict()) == {"W_enc", "W_dec", "b_dec"}
    assert torch.allclose(loaded.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(loaded.encode(x) != 0, sae.encode(x) != 0)
    assert torch.allclose(loaded.encode(x), sae.encode(x), atol=1e-5)
    assert torch.allclose(loaded(x), sae(x), atol=1e-5)
    details: Any = loaded.cfg.metadata.training_architecture_details
    assert details["afa_coefficient"] == 1 / 32
    again = TrainingSAE.load_from_disk(tmp_path / "checkpoint")
    assert isinstance(again, TopAFATrainingSAE)
    for other in (again, copy.deepcopy(sae)):
        assert torch.equal(other.encode(x), sae.encode(x))
        torch.testing.assert_close(step(other, x).loss, step(sae, x).loss)


@pytest.mark.parametrize("training", [True, False])
def test_a_scaling_factor_that_is_folded_in_keeps_the_selection(training):
    factor = 0.37
    options: Any = {"normalize_activations": "expected_average_only_in", "dtype": "float64"}
    sae = afa(**options) if training else inference(**options)
    x = friendly(N, D).double()
    latents, output = sae.encode(factor * x), sae(factor * x) / factor
    sae.fold_activation_norm_scaling_factor(factor)
    assert sae.cfg.normalize_activations == "none"
    assert torch.equal(sae.encode(x) != 0, latents != 0)
    assert relative(sae(x), output) < 1e-12
    if training:
        assert relative(sae.encode(x), latents / factor) < 1e-12  # rows keep their norm of 1


def test_training_on_scaled_activations_ends_in_an_sae_for_activations(tmp_path):
    sae = afa(normalize_activations="expected_average_only_in")
    made = trainer(sae)
    made.fit()
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    x = friendly(2048, D)
    explained = 1 - (loaded(x) - x).square().sum() / (x - x.mean(dim=0)).square().sum()
    assert explained > 0.5
    assert relative(loaded(x), sae(x)) < 1e-3


def test_it_trains_with_saelens_runner_and_l0_follows_the_input(tmp_path):
    torch.manual_seed(7)
    model = tiny_model()
    runner = LanguageModelSAETrainingRunner(
        runner_config(
            sae=TopAFATrainingSAEConfig(d_in=32, d_sae=128),
            training_tokens=128 * 40,
            lr=3e-3,
            output_path=str(tmp_path),
        ),
        override_dataset=tiny_dataset(),
        override_model=model,
    )
    sae = runner.run()
    assert isinstance(sae, TopAFATrainingSAE)
    assert sae.cfg.metadata.to_dict()["l0"] > 1
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, TopAFASAE)
    tokens = torch.arange(96).reshape(4, 24)
    _, cache = model.run_with_cache(tokens)
    x = cache["blocks.1.hook_resid_pre"].detach()
    latents = loaded.encode(x)
    l0 = (latents != 0).sum(dim=-1).float()
    assert l0.std() > 0.5
    norm, target = latents.norm(dim=-1), (x - loaded.b_dec).norm(dim=-1)
    assert ((norm - target).abs() / target).mean() < 0.2
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "top_afa"


# --- whitening and other settings that are refused ---


@pytest.mark.parametrize("cls", [TopAFASAEConfig, TopAFATrainingSAEConfig])
def test_whitening_is_refused_at_construction_with_the_reason(cls):
    with pytest.raises(ValueError, match=REASON):
        cls(d_in=D, d_sae=D_SAE, normalize_activations="covariance_whitening")
    with pytest.raises(ValueError, match="leave it at True"):
        cls(d_in=D, d_sae=D_SAE, apply_b_dec_to_input=False)


def test_whitening_is_refused_by_runner_and_command_line_with_the_reason(capsys):
    cfg = runner_config(sae=TopAFATrainingSAEConfig(d_in=32, d_sae=128))
    with pytest.raises(ValueError, match=REASON):
        WhiteningTrainingRunner(
            cfg, override_dataset=tiny_dataset(), override_model=tiny_model()
        ).run()
    code = main(["train", "--architecture", "top_afa", "--d_in", "32", "--d_sae", "128"])
    assert code != 0
    assert REASON in capsys.readouterr().err


@pytest.mark.parametrize("sae", [inference(), afa()])
def test_whitening_cannot_be_folded_in_or_taken_out(sae):
    whitening = whitening_of(nasty(300, D))
    before = copy.deepcopy(sae.state_dict())
    for change in (fold_whitening_into_weights, unfold_whitening_from_weights):
        for setting in ("none", "covariance_whitening"):
            changed = copy.deepcopy(sae)
            changed.cfg.normalize_activations = setting
            with pytest.raises(FoldError, match=REASON):
                change(changed, whitening)
            assert all(torch.equal(changed.state_dict()[n], before[n]) for n in before)
    with pytest.raises(NotImplementedError, match=REASON):
        sae.fold_activation_whitening(whitening.mean, whitening.W, whitening.W_inv)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"afa_form": "other"}, "one of consistent, published"),
        ({"afa_coefficient": -0.1}, "afa_coefficient=-0.1"),
        ({"afa_coefficient": float("nan")}, "afa_coefficient=nan"),
        ({"decoder_init_norm": 0.1}, "at norm 1"),
        ({"decoder_init_norm": None}, "at norm 1"),
        ({"normalize_activations": "layer_norm"}, "aux_loss_coefficient=0"),
        ({"normalize_activations": "constant_norm_rescale"}, "aux_loss_coefficient=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TopAFATrainingSAEConfig(d_in=D, d_sae=D_SAE, **options)


def test_layer_norm_without_reviving_is_a_training_like_any_other():
    sae = afa(normalize_activations="layer_norm", aux_loss_coefficient=0.0)
    x = 100 + 50 * friendly(N, D)
    found = step(sae, x, dead_latents(), logged=True)
    normal = (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True)
    target = (normal - sae.b_dec).norm(dim=1)
    expected = 0.3 * D * (found.feature_acts.norm(dim=1) - target).square().mean()
    assert float(found.losses["afa_loss"]) == pytest.approx(float(expected), rel=1e-3)
    found.loss.backward()


# --- registration ---


@pytest.fixture
def saved(tmp_path) -> str:
    sae = afa()
    sae.save_inference_model(tmp_path)
    x = friendly(N, D)
    torch.save((x, sae(x).detach()), tmp_path / "expected.pt")
    return str(tmp_path)


def test_it_loads_where_sae_whiten_is_imported_first(saved):
    code = """
        import sys
        import sae_whiten
        assert not {"torch", "sae_lens"} & sys.modules.keys()
        import sae_whiten.architectures.losses  # any module may be the first that needs sae_lens
        import torch
        from sae_lens import SAE, registry
        sae = SAE.load_from_disk(sys.argv[1])
        assert type(sae).__module__ == "sae_whiten.architectures.top_afa"
        assert sae.cfg.metadata.import_before_loading == "sae_whiten"
        assert {"top_afa", "topk_vsae"} <= registry.SAE_TRAINING_CLASS_REGISTRY.keys()
        x, output = torch.load(sys.argv[1] + "/expected.pt")
        assert torch.allclose(sae(x), output, atol=1e-5)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), saved], check=True)


def test_a_compiled_step_is_the_same_step(saved):
    # in another process, as run-time checks of types cannot be compiled
    code = """
        import sys, torch
        import sae_whiten.architectures
        from sae_lens.saes.sae import TrainingSAE, TrainStepInput
        x, _ = torch.load(sys.argv[1] + "/expected.pt")
        dead = torch.arange(96) % 5 == 0
        for name in ("top_afa", "topk_vsae"):
            config = {"architecture": name, "d_in": 24, "d_sae": 96}
            config |= {"k": 4} if name == "topk_vsae" else {}
            sae = TrainingSAE.from_dict(config)
            found = []
            for _ in range(2):
                if name == "topk_vsae":
                    sae.set_extra_state(torch.tensor([5, 0]))  # the same noise
                given = TrainStepInput(x, {"afa": 0.3, "kl": 0.7}, dead, 0, True)
                output = sae.training_forward_pass(given)
                sae.zero_grad()
                output.loss.backward()
                found.append({n: p.grad.clone() for n, p in sae.named_parameters()})
                found[-1] |= {**output.losses, **output.metrics}
                # inductor draws other noise, and takes half a minute
                sae.training_forward_pass = torch.compile(
                    sae.training_forward_pass, backend="aot_eager"
                )
            for key, value in found[0].items():
                assert torch.allclose(found[1][key], value, rtol=1e-4, atol=1e-4), (name, key)
            assert torch.equal(sae.encode(x), sae.encode(x))
    """
    process = run_code(code, saved)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("inference", [True, False])
def test_the_saved_config_says_what_to_import_to_load_it(inference, tmp_path):
    sae = afa()
    _, path = (sae.save_inference_model if inference else sae.save_model)(tmp_path)
    saved = json.loads(path.read_text())
    assert saved["metadata"]["import_before_loading"] == "sae_whiten"


def test_it_loads_where_sae_lens_is_imported_first(saved):
    process = run_code(
        """
        import sys
        from sae_lens import SAE
        try:
            SAE.load_from_disk(sys.argv[1])
        except KeyError as error:
            assert "top_afa" in str(error)
        else:
            raise AssertionError("registered by whom?")
        import sae_whiten
        sae = SAE.load_from_disk(sys.argv[1])
        import torch
        from sae_whiten.architectures import TopAFASAE
        assert type(sae) is TopAFASAE
        x, output = torch.load(sys.argv[1] + "/expected.pt")
        assert torch.allclose(sae(x), output, atol=1e-5)
        """,
        saved,
    )
    assert process.returncode == 0, process.stderr
