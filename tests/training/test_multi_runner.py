import copy
import json
import logging
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    MatchingPursuitTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from sae_whiten import (
    ActivationStatistics,
    FoldError,
    NonFiniteActivationsError,
    Whitening,
    WhiteningConfig,
    WhiteningMultiSAETrainingRunner,
    WhiteningTrainingRunner,
    fit_statistics,
)
from sae_whiten.architectures.folding import fold_whitening_into_weights
from sae_whiten.estimation.stopping import Requirement, estimate_statistics
from sae_whiten.evaluation.sharing import model_card
from sae_whiten.training import multi_trainer
from sae_whiten.training.checkpoint import TRAINING_STATE_DIR, loadable_folder
from sae_whiten.training.stream import ActivationStream
from tests.support import nasty, runner_config, tiny_dataset, tiny_model, training_sae

BATCH, STEPS = 128, 24
RESID, HEADS, MLP = "blocks.1.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.0.mlp.hook_post"
FEW = WhiteningConfig(n_samples=1000)
POISON = 77


def topk(normalize: str = "covariance_whitening", **options: Any) -> TopKTrainingSAEConfig:
    defaults: dict[str, Any] = {"d_in": 32, "d_sae": 64, "k": 8}
    return TopKTrainingSAEConfig(normalize_activations=normalize, **{**defaults, **options})  # pyright: ignore[reportArgumentType]


def standard(normalize: str = "covariance_whitening") -> StandardTrainingSAEConfig:
    return StandardTrainingSAEConfig(
        d_in=32,
        d_sae=64,
        l1_coefficient=0.1,
        normalize_activations=normalize,  # pyright: ignore[reportArgumentType]
    )


def batchtopk() -> BatchTopKTrainingSAEConfig:
    return BatchTopKTrainingSAEConfig(
        d_in=32, d_sae=64, k=8, normalize_activations="covariance_whitening"
    )


SAES: dict[str, TrainingSAEConfig] = {
    "plain": topk("none"),
    "scaled": standard("expected_average_only_in"),
    "white": topk(),
    "batch": batchtopk(),
    "heads": standard(),
    "wide": topk(d_in=128),
}
HOOKS = {
    "plain": RESID,
    "scaled": HEADS,
    "white": RESID,
    "batch": RESID,
    "heads": HEADS,
    "wide": MLP,
}


# SAELens' default, which does not limit the estimation of a whitening
UNLIMITED = {"n_batches_for_norm_estimate": 1000}


def config(*names: str, **options: Any) -> MultiSAETrainingRunnerConfig:
    names = names or tuple(SAES)
    defaults: dict[str, Any] = {
        "saes": {name: copy.deepcopy(SAES[name]) for name in names},
        "hook_names": {name: HOOKS[name] for name in names},
        "model_name": "tiny",
        "dataset_path": "local",
        "streaming": False,
        "context_size": 32,
        "training_tokens": BATCH * STEPS,
        "train_batch_size_tokens": BATCH,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 16,
        "n_batches_for_norm_estimate": 5,
        "lr": 3e-3,
        "dead_feature_window": 5,
        "feature_sampling_window": 7,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": None,
    }
    return MultiSAETrainingRunnerConfig(**{**defaults, **options})


def runner(
    *names: str, whitening: Any = FEW, cls: Any = WhiteningMultiSAETrainingRunner, **options: Any
) -> Any:
    overrides = {
        "override_dataset": options.pop("override_dataset", None) or tiny_dataset(),
        "override_model": options.pop("override_model", None) or tiny_model(),
        "override_saes": options.pop("override_saes", None),
    }
    if cls is WhiteningMultiSAETrainingRunner:
        overrides["whitening"] = whitening
    cfg = options.pop("cfg", None) or config(*names, **options)
    torch.manual_seed(7)
    return cls(cfg, **overrides)


def state(sae: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in sae.state_dict().items()}


def states(saes: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    return {name: state(sae) for name, sae in saes.items()}


def assert_equal(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]):
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        assert found[name].keys() == weights.keys()
        for parameter, value in weights.items():
            assert torch.equal(found[name][parameter], value), (name, parameter)


def weights_in(path: Path) -> dict[str, Tensor]:
    """Of an SAE on disk, as SAELens opens it."""
    return state(SAE.load_from_disk(path))


def fresh_saes(*names: str) -> dict[str, TrainingSAE[Any]]:
    made = {}
    for name in names:
        torch.manual_seed(sum(map(ord, name)))
        made[name] = TrainingSAE.from_dict(SAES[name].to_dict())
    return made


def stop_at(monkeypatch: pytest.MonkeyPatch, n_served: int, signum: int) -> None:
    """Send a signal to this process when batch `n_served` is asked for."""
    serve = ActivationStream.__next__

    def serve_and_stop(stream: ActivationStream) -> Tensor:
        if stream.n_served == n_served:
            os.kill(os.getpid(), signum)
        return serve(stream)

    monkeypatch.setattr(ActivationStream, "__next__", serve_and_stop)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    path = tmp_path_factory.mktemp("uninterrupted")
    made = runner(output_path=str(path))
    return states(made.run()), made, path


# --- what is trained


@pytest.mark.parametrize("whitening", [FEW, WhiteningConfig(tolerance=0.3)])
def test_baselines_are_those_of_saelens_to_the_bit(whitening):
    names = ("plain", "scaled")
    expected = runner(*names, cls=MultiSAETrainingRunner, override_saes=fresh_saes(*names)).run()
    found = runner(whitening=whitening, override_saes=fresh_saes(*SAES)).run()
    assert_equal(states({name: found[name] for name in names}), states(expected))
    # after training their cfg is SAELens' too, with what its metadata leave out
    for name in names:
        own, stock = found[name].cfg.to_dict(), expected[name].cfg.to_dict()
        read = {"autocast_lm": False, "use_chat_formatting": False}
        more = read | {"n_training_samples": BATCH * STEPS}
        assert own == stock | {"metadata": stock["metadata"] | more}


@pytest.mark.parametrize("whitening", [FEW, WhiteningConfig(tolerance=0.3)])
def test_one_sae_alone_is_what_the_single_runner_trains(whitening):
    single = WhiteningTrainingRunner(
        runner_config(
            sae=SAES["white"],
            training_tokens=BATCH * STEPS,
            lr=3e-3,
            dead_feature_window=5,
            feature_sampling_window=7,
        ),
        whitening,
        override_dataset=tiny_dataset(),
        override_model=tiny_model(),
        override_sae=fresh_saes("white")["white"],
    )
    torch.manual_seed(7)
    expected = single.run()
    made = runner("white", whitening=whitening, override_saes=fresh_saes("white"))
    torch.manual_seed(7)
    found = made.run()["white"]
    assert_equal({"white": state(found)}, {"white": state(expected)})
    assert type(found) is type(expected)
    assert found.cfg.to_dict() == expected.cfg.to_dict()
    ours, theirs = made.trainer.statistics["white"], single.trainer.scaler.statistics
    assert theirs is not None
    assert ours.provenance == theirs.provenance
    assert torch.equal(ours.covariance, theirs.covariance)


def test_an_sae_does_not_depend_on_which_others_are_trained_beside_it():
    names = ("plain", "white", "batch", "heads", "wide")
    together = runner(*names, override_saes=fresh_saes(*names))
    found = together.run()
    for name in ("white", "heads", "wide"):
        alone = runner(name, override_saes=fresh_saes(name))
        expected = alone.run()[name]
        assert_equal({name: state(found[name])}, {name: state(expected)})
        own, other = (t.trainer.statistics[name] for t in (together, alone))
        assert own.n_samples == other.n_samples
        assert torch.equal(own.covariance, other.covariance)


def test_saes_are_plain_and_proved_on_activations_of_their_own_hook(uninterrupted):
    _, made, _ = uninterrupted
    for name in ("white", "batch", "heads", "wide"):
        sae = made.saes[name]
        assert type(sae).__module__.startswith("sae_lens")
        assert sae.cfg.normalize_activations == "none"
        check = sae.cfg.metadata.whitening["fold"]["check"]
        assert 0 < check["n_activations"] <= BATCH
        assert check["fold_error"] <= check["tolerance"]
        assert sae.cfg.metadata.hook_name == HOOKS[name]
        # a proof on another hook's activations would pass too, but its spread would be another's
        whitening = made.trainer.whitenings[name]
        acts = made.activations_store.split(made.activations_store.next_batch())[HOOKS[name]]
        with torch.no_grad():
            z = whitening.whiten(acts)
            assert 0.5 < float(z.square().mean()) < 2
            error = (acts - sae(acts)).square().sum() / (acts - acts.mean(0)).square().sum()
        assert error < 0.95


# --- statistics


def test_saes_at_one_hook_share_statistics_and_equal_whitenings(uninterrupted):
    _, made, _ = uninterrupted
    statistics, whitenings = made.trainer.statistics, made.trainer.whitenings
    assert set(statistics) == set(whitenings) == {"white", "batch", "heads", "wide"}
    assert statistics["white"] is statistics["batch"]
    assert whitenings["white"] is whitenings["batch"]
    assert statistics["heads"] is not statistics["white"]
    assert statistics["wide"].d_in == 128
    assert statistics["heads"].provenance["hook_name"] == HEADS


def test_another_transform_is_another_whitening_of_the_same_statistics():
    configs = {
        "white": FEW,
        "batch": replace(FEW, kind="zca"),
        "more": replace(FEW, loss_space="whitened"),
    }
    saes = {"white": topk(), "batch": batchtopk(), "more": topk()}
    made = runner(cfg=config(saes=saes, hook_names=RESID), whitening=configs)
    made.run()
    statistics, whitenings = made.trainer.statistics, made.trainer.whitenings
    assert statistics["white"] is statistics["batch"] is statistics["more"]
    assert whitenings["batch"].kind == "zca"
    assert torch.equal(
        whitenings["batch"].W,
        Whitening.from_statistics(statistics["white"], configs["batch"]).W,
    )
    # the space of the loss does not decide the transform
    assert whitenings["more"].W is whitenings["white"].W
    assert whitenings["more"].config == configs["more"]
    assert made.saes["more"].cfg.metadata.whitening["config"]["loss_space"] == "whitened"


def test_equal_transforms_of_different_configs_are_resumed(tmp_path):
    """With enough samples, no shrinkage asked for and a shrinkage of 0 come to the same."""
    many = replace(FEW, n_samples=700)
    configs = {"white": many, "batch": replace(many, shrinkage=0.0)}
    options = {"checkpoint_path": str(tmp_path), "n_checkpoints": 1}
    made = runner("white", "batch", whitening=configs, **options)
    made.run()
    whitenings = made.trainer.whitenings
    assert whitenings["white"].digest == whitenings["batch"].digest
    checkpoint = next(path for path in tmp_path.rglob("*") if (path / "white").is_dir())
    resumed = runner(
        "white", "batch", whitening=configs, resume_from_checkpoint=str(checkpoint), **options
    )
    assert_equal(states(resumed.run()), states(made.saes))
    assert {n: w.config for n, w in resumed.trainer.whitenings.items()} == configs


def test_each_hook_takes_the_samples_that_the_most_demanding_config_there_needs():
    configs = {
        "white": WhiteningConfig(n_samples=700),
        "batch": WhiteningConfig(n_samples=1000),
        "heads": WhiteningConfig(tolerance=0.5),  # reached at the first look
    }
    names = ("white", "batch", "heads", "wide")
    made = runner(*names, whitening=configs, **UNLIMITED)
    made.run()
    n = {name: s.n_samples for name, s in made.trainer.statistics.items()}
    assert n["white"] == n["batch"] == 1024  # whole batches of 128
    assert n["heads"] == 640
    assert n["wide"] > 20 * 128  # the default: 2%
    assert made.trainer.statistics["wide"].provenance["inflation"] <= 0.02


def test_estimated_statistics_are_those_of_the_first_batches():
    d = 16
    x = {"a": nasty(4000, d, seed=1), "b": nasty(4000, 2 * d, seed=2)}
    batches = [
        dict(zip(x, parts, strict=True))
        for parts in zip(*(acts.split(100) for acts in x.values()), strict=True)
    ]
    stream = iter(batches)
    found = estimate_statistics(
        stream,
        {
            "a": Requirement(d, 1000, None, "raise"),
            "b": Requirement(2 * d, 500, 0.05, "raise"),  # reached before
        },
    )
    for name, statistics in found.items():
        n = statistics.n_samples
        reference = torch.cov(x[name][:n].double().T)
        error = (statistics.covariance - reference).norm() / reference.norm()
        assert error < 1e-12
    assert found["a"].n_samples == 1000
    inflation = found["b"].provenance["inflation"]
    assert 0.02 < inflation <= 0.05
    assert 640 <= found["b"].n_samples < 1000
    # no more was read than the hook that needed most took
    assert len(list(stream)) == 40 - 10


def test_a_stream_that_ends_says_for_which_hook_and_how_much_was_missing():
    batches = ({"a": x, "b": x} for x in nasty(1000, 16).split(100))
    required = {
        "a": Requirement(16, 500, None, "raise"),
        "b": Requirement(16, None, 1e-4, "raise"),
    }
    with pytest.raises(ValueError, match=r"b: .* ended after 1000 activations .* needs about \d+"):
        estimate_statistics(batches, required)


def test_a_hook_without_variance_is_named():
    batches = ({"a": torch.ones(100, 4), "b": torch.randn(100, 4)} for _ in range(10))
    required = {name: Requirement(4, None, 0.02, "raise") for name in ("a", "b")}
    with pytest.raises(ValueError, match="a: all activations are the same"):
        estimate_statistics(batches, required)


def test_the_bar_names_the_worst_hook(monkeypatch):
    shown = []
    monkeypatch.setattr(
        "sae_whiten.estimation.stopping.tqdm.set_postfix_str",
        lambda bar, text, refresh=True: shown.append(text),
    )
    x = {"slow": nasty(20000, 16), "fast": torch.randn(20000, 16)}
    x["slow"][::50] *= 20  # heavy tails take more samples
    batches = ({name: acts[i : i + 40] for name, acts in x.items()} for i in range(0, 20000, 40))
    required = {name: Requirement(16, None, 0.03, "raise") for name in x}
    estimate_statistics(batches, required)
    assert shown[-1].startswith("slow: held-out excess ")
    assert shown[-1].endswith("target 3.0%")
    assert not any("inf" in text for text in shown)


@pytest.mark.parametrize(
    ("dtype", "autocast_lm"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
)
def test_the_resolution_is_that_of_the_model_whichever_way_statistics_are_estimated(
    dtype, autocast_lm
):
    model = tiny_model().to(dtype)
    options: dict[str, Any] = {"override_model": model, "autocast_lm": autocast_lm}
    several = runner("white", training_tokens=BATCH, **options)
    several.run()
    cfg = runner_config(
        hook_name=HOOKS["white"],
        sae=copy.deepcopy(SAES["white"]),
        training_tokens=128,
        autocast_lm=autocast_lm,
    )
    one = WhiteningTrainingRunner(cfg, FEW, override_dataset=tiny_dataset(), override_model=model)
    one.run()
    fitted = fit_statistics(
        model,
        tiny_dataset(),
        HOOKS["white"],
        n_samples=100,
        context_size=32,
        autocast_lm=autocast_lm,
    )
    expected = torch.finfo(torch.bfloat16 if autocast_lm else dtype).eps
    assert several.trainer.statistics["white"].resolution == expected
    assert one.trainer.scaler.statistics is not None
    assert one.trainer.scaler.statistics.resolution == expected
    assert fitted[HOOKS["white"]].resolution == expected


def test_given_statistics_are_taken_and_nothing_is_estimated(uninterrupted, tmp_path, monkeypatch):
    expected, _, path = uninterrupted
    folder = tmp_path / "statistics"
    for name, hook in (("white", RESID), ("heads", HEADS), ("wide", MLP)):
        statistics = path / name / "sae_whiten" / "activation_statistics.safetensors"
        ActivationStatistics.load(statistics).save(folder / f"{hook}.safetensors")
    given = WhiteningConfig(statistics=str(folder))
    made = runner(whitening=given)
    with monkeypatch.context() as patch:
        patch.delattr(ActivationStatistics, "update")
        found = states(made.run())
    assert_equal(found, expected)
    assert made.trainer.statistics["white"] is made.trainer.statistics["batch"]

    # at one hook some given, some not; the file has more samples than are estimated
    mixed = {"white": given, "batch": WhiteningConfig(n_samples=300), "heads": given}
    made = runner("white", "batch", "heads", whitening=mixed)
    made.run()
    n = {name: s.n_samples for name, s in made.trainer.statistics.items()}
    assert n == {"white": 1024, "batch": 384, "heads": 1024}
    with pytest.raises(FileNotFoundError, match=r"holds no statistics of blocks\.0\.hook_resid_p"):
        runner("white", whitening=given, hook_names="blocks.0.hook_resid_post").run()


# --- what is written


def test_every_sae_has_a_folder_as_the_single_runner_writes_it(uninterrupted, tmp_path):
    _, made, path = uninterrupted
    assert {p.name for p in path.iterdir()} == {*SAES, "runner_cfg.json"}
    stock = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
    for name in SAES:
        whitened = name in made.trainer.whitenings
        found = {p.name for p in (path / name).iterdir()}
        assert found == (stock | {"sae_whiten"} if whitened else stock)
        made.saes[name].save_inference_model(tmp_path)
        assert_equal({name: weights_in(path / name)}, {name: weights_in(tmp_path)})
        metadata = json.loads((path / name / "cfg.json").read_text())["metadata"]
        assert metadata["hook_name"] == HOOKS[name]
        card = model_card(path / name, "me/saes", name)
        assert f"| activations trained on | `{BATCH * STEPS}` |" in card
        assert f"| tokens in a batch | `{BATCH}` |" in card  # from the file beside all folders
        assert ("whitening" in metadata) == whitened
        if whitened:
            statistics = ActivationStatistics.load(
                path / name / "sae_whiten" / "activation_statistics.safetensors"
            )
            whitening = Whitening.load(path / name / "sae_whiten" / "whitening.safetensors")
            assert torch.equal(whitening.W, Whitening.from_statistics(statistics, FEW).W)
            assert metadata["whitening"]["n_samples"] == statistics.n_samples == 1024
            # which SAELens does not write
            assert statistics.provenance["autocast_lm"] is False
            assert statistics.provenance["use_chat_formatting"] is False


def test_what_was_given_is_not_changed_and_serves_a_second_run(uninterrupted):
    cfg = config()
    before = copy.deepcopy(cfg)
    for _ in range(2):
        assert_equal(states(runner(cfg=cfg).run()), uninterrupted[0])
        assert cfg == before
        assert cfg.saes["white"].normalize_activations == "covariance_whitening"
    saes = fresh_saes("white", "batch", "plain")
    configs = {name: sae.cfg for name, sae in saes.items()}
    copies = copy.deepcopy(configs)
    runner("white", "batch", "plain", override_saes=saes).run()
    assert configs == copies
    assert saes["white"].cfg is not configs["white"]


def test_one_config_object_serves_two_hooks():
    shared = topk()
    made = runner(cfg=config(saes={"a": shared, "b": shared}, hook_names={"a": RESID, "b": HEADS}))
    found = made.run()
    assert found["a"].cfg.metadata.hook_name == RESID
    assert found["b"].cfg.metadata.hook_name == HEADS
    separate = runner(
        cfg=config(saes={"a": topk(), "b": topk()}, hook_names={"a": RESID, "b": HEADS})
    ).run()
    assert_equal(states(found), states(separate))


def test_a_runner_that_is_done_refuses_to_run_again(uninterrupted):
    with pytest.raises(ValueError, match="normalize_activations='none'"):
        uninterrupted[1].run()


# --- stopping and resuming


@pytest.mark.parametrize(
    ("signum", "n_served", "prefetch"),
    [
        *((signal.SIGINT, n_served, False) for n_served in (5, 7, 12, 28)),
        (signal.SIGINT, 8, 2),
        (signal.SIGTERM, 20, 2),
    ],
)
def test_interrupted_training_resumes_to_the_bit(
    signum, n_served, prefetch, uninterrupted, tmp_path, monkeypatch
):
    """Five batches go into SAELens' scaling factor, eight into the whitenings; 12 is where a window
    of seven steps has just been reset."""
    expected, reference, _ = uninterrupted
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupted = runner(checkpoint_path=str(tmp_path), prefetch_llm_batches=prefetch)
    with monkeypatch.context() as patch:
        stop_at(patch, n_served, signum)
        with pytest.raises(KeyboardInterrupt if signum == signal.SIGINT else SystemExit) as caught:
            interrupted.run()
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    (checkpoint,) = tmp_path.glob("*/*")
    assert checkpoint.name == str(BATCH * (n_served - 5))
    resumed = runner(
        whitening=None, resume_from_checkpoint=str(checkpoint), prefetch_llm_batches=prefetch
    )
    torch.manual_seed(123)  # resuming must not depend on the state of the generator
    found = resumed.run()
    assert_equal(states(found), expected)
    for name, whitening in reference.trainer.whitenings.items():
        assert resumed.trainer.whitenings[name].digest == whitening.digest
        assert found[name].cfg.metadata == reference.saes[name].cfg.metadata
        own = resumed.trainer.statistics[name]
        assert torch.equal(own.covariance, reference.trainer.statistics[name].covariance)
    assert resumed.trainer.statistics["white"] is resumed.trainer.statistics["batch"]
    assert resumed.trainer.whitenings["white"] is resumed.trainer.whitenings["batch"]


def test_dead_latents_are_not_counted_where_none_could_be_dead_yet():
    saes = runner("plain", "white", dead_feature_window=STEPS).run()
    assert ["num_dead_features" in sae.cfg.metadata for sae in saes.values()] == [False, False]


def test_saes_without_whitening_are_stopped_twice_and_resume_to_the_bit(tmp_path, monkeypatch):
    """As in a comparison of conditions without whitening."""
    monkeypatch.setattr(WhiteningMultiSAETrainingRunner, "_needs_whitening", False)
    expected = states(runner("plain", whitening=None).run())
    checkpoint = None
    for n_served in (9, 18):
        folder = tmp_path / str(n_served)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, n_served, signal.SIGINT)
            runner(
                "plain",
                whitening=None,
                checkpoint_path=str(folder),
                resume_from_checkpoint=checkpoint,
            ).run()
        (checkpoint,) = map(str, folder.glob("*/*"))
        assert Path(checkpoint).name == str(BATCH * n_served)
    found = runner("plain", whitening=None, resume_from_checkpoint=checkpoint).run()
    assert_equal(states(found), expected)


@pytest.mark.parametrize("n_served", [0, 3])
def test_stopped_before_the_first_step_nothing_is_left_behind(n_served, tmp_path, monkeypatch):
    """In the middle of the estimation of SAELens' scaling factor, for example."""
    with monkeypatch.context() as patch:
        stop_at(patch, n_served, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            runner(checkpoint_path=str(tmp_path)).run()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_checkpoints_are_plain_saes_and_can_be_resumed(uninterrupted, tmp_path):
    names = ("plain", "white", "batch", "heads")
    options: dict[str, Any] = {"n_checkpoints": 2, "checkpoint_path": str(tmp_path)}
    whole = runner(*names, save_final_checkpoint=True, **options)
    expected = states(whole.run())
    root = next(tmp_path.iterdir())
    assert {p.name for p in root.iterdir()} == {"1152", "2176", "final_3072"}
    for path in root.iterdir():
        for name in names:
            plain = SAE.load_from_disk(loadable_folder(path / name))
            assert plain.cfg.normalize_activations == "none"
    resumed = runner(*names, resume_from_checkpoint=str(root / "1152"), **options)
    assert_equal(states(resumed.run()), expected)
    for name in names:  # with the figures of the last window of steps
        assert resumed.saes[name].cfg.to_dict() == whole.saes[name].cfg.to_dict()
    final = root / "final_3072"
    again = runner(*names, resume_from_checkpoint=str(final)).run()
    assert_equal(states(again), expected)
    longer = {"training_tokens": BATCH * (STEPS + 6)}
    more = runner(*names, resume_from_checkpoint=str(final), **longer).run()
    assert_equal(states(more), states(runner(*names, **longer).run()))


def test_what_does_not_belong_is_not_resumed(tmp_path):
    names = ("plain", "white", "heads")
    saved = runner(*names, checkpoint_path=str(tmp_path), n_checkpoints=1)
    saved.run()
    (checkpoint,) = tmp_path.glob("*/*")
    resume: dict[str, Any] = {"whitening": None, "resume_from_checkpoint": str(checkpoint)}

    with pytest.raises(FileNotFoundError, match="holds no batch; it has heads, plain, white"):
        runner(*names, "batch", **resume).run()
    with pytest.raises(ValueError, match=r"eps=0\.001 \(now 0\.1\)"):
        other = {"heads": replace(FEW, eps=0.1)}
        runner(*names, **{**resume, "whitening": other}).run()
    with pytest.raises(ValueError, match=f"has {int(checkpoint.name):,} tokens already: training"):
        runner(*names, training_tokens=BATCH, **resume).run()
    swapped = {"plain": RESID, "white": HEADS, "heads": RESID}
    with pytest.raises(ValueError, match="white was trained with hook_name='blocks.1"):
        runner(*names, hook_names=swapped, **resume).run()
    with pytest.raises(ValueError, match=r"hook_z \(width 32\)"):
        runner("white", "plain", **resume).run()
    changed = {**config(*names).saes, "white": topk("none")}
    with pytest.raises(ValueError, match="white has normalize_activations='covariance_whitening'"):
        runner(*names, saes=changed, **resume).run()
    changed = {**config(*names).saes, "plain": topk("expected_average_only_in")}
    with pytest.raises(ValueError, match="plain has normalize_activations='none'"):
        runner(*names, saes=changed, **resume).run()
    changed = {**config(*names).saes, "heads": topk()}
    with pytest.raises(ValueError, match="architecture='standard'"):
        runner(*names, saes=changed, **resume).run()


# --- what goes wrong


def test_a_failed_fold_does_not_cost_the_others(uninterrupted, tmp_path, monkeypatch):
    path = uninterrupted[2]

    def fold(sae: Any, whitening: Any, **options: Any) -> Any:
        if sae.cfg.metadata.hook_name == HEADS:
            raise FoldError("it is not the same function.")
        return fold_whitening_into_weights(sae, whitening, **options)

    monkeypatch.setattr("sae_whiten.training.trainer.fold_whitening_into_weights", fold)
    made = runner(
        output_path=str(tmp_path / "out"),
        checkpoint_path=str(tmp_path / "checkpoints"),
        save_final_checkpoint=True,
    )
    with pytest.raises(FoldError, match="heads: it is not the same function") as caught:
        made.run()
    others = set(SAES) - {"heads"}
    for name in others:
        assert_equal({name: weights_in(tmp_path / "out" / name)}, {name: weights_in(path / name)})
    assert not (tmp_path / "out" / "heads").exists()
    (kept,) = (tmp_path / "checkpoints").glob("*/failed_fold_3072/heads")
    assert str(kept) in str(caught.value)
    assert (kept / TRAINING_STATE_DIR / "training_weights.safetensors").is_file()
    assert SAE.load_from_disk(kept).cfg.normalize_activations == "none"
    (final,) = (tmp_path / "checkpoints").glob("*/final_3072")
    assert {p.name for p in final.iterdir() if p.is_dir()} == others


@pytest.mark.parametrize("prefetch", [False, 2])
def test_a_nan_names_its_hook_and_what_was_trained_is_saved(prefetch, tmp_path):
    sequences = list(tiny_dataset()["input_ids"])
    sequences[88] = [POISON] * 33
    spoiled = Dataset.from_dict({"input_ids": sequences})

    def run(whitening: WhiteningConfig, **options: Any) -> Any:
        made = runner(
            "white",
            "heads",
            "wide",
            whitening=whitening,
            override_dataset=spoiled,
            prefetch_llm_batches=prefetch,
            **options,
        )
        store = made.activations_store
        get_activations = store.get_activations

        def fails(batch_tokens: Tensor) -> Tensor:
            acts = get_activations(batch_tokens)
            store.split(acts)[HEADS][(batch_tokens == POISON).all(dim=1)] = float("nan")
            return acts

        store.get_activations = fails
        made.run()
        return made

    with pytest.raises(NonFiniteActivationsError, match=f"pass 22 of the model, at {HEADS}"):
        run(FEW, checkpoint_path=str(tmp_path))
    (checkpoint,) = tmp_path.glob("*/*")
    assert int(checkpoint.name) > 0
    made = run(replace(FEW, on_nonfinite="skip"))
    assert made.activations_store.n_skipped == 32
    for sae in made.saes.values():
        assert all(value.isfinite().all() for value in sae.state_dict().values())


def test_a_wrong_width_names_the_hook():
    saes = {"white": topk(), "heads": topk(d_in=16)}
    with pytest.raises(ValueError, match="hook_z are not of width d_in=16"):
        runner(cfg=config(saes=saes, hook_names={"white": RESID, "heads": HEADS})).run()
    # one index too many: SAELens would take positions for dimensions, for there are 32 of both
    with pytest.raises(ValueError, match="hook_resid_pre are not of width d_in=32: of 2 dimen"):
        runner(cfg=config("white", hook_head_indices=1)).run()


def test_one_head_of_a_hook():
    saes = {"head": topk(d_in=8), "plain": topk("none")}
    cfg = config(
        saes=saes,
        hook_names={"head": HEADS, "plain": RESID},
        hook_head_indices={"head": 2},
    )
    made, whole = runner(cfg=cfg), runner("heads")
    for each in (made, whole):
        torch.manual_seed(7)
        each.run()
    head = whole.trainer.statistics["heads"].covariance[16:24, 16:24]
    assert torch.allclose(made.trainer.statistics["head"].covariance, head, rtol=1e-9, atol=0)
    assert made.trainer.statistics["head"].provenance["hook_head_index"] == 2


def test_what_cannot_work_is_refused_before_a_model_is_loaded():
    def refused(match: str, error: type[Exception] = ValueError, **options: Any) -> None:
        whitening = options.pop("whitening", None)
        saes = options.pop("override_saes", None)
        names = options.pop("names", ())
        with pytest.raises(error, match=match):
            # "tiny" is no model that could be loaded
            WhiteningMultiSAETrainingRunner(
                config(*names, **options), whitening, tiny_dataset(), override_saes=saes
            )

    refused("no SAE's config has normalize_activations='cov", names=("plain", "scaled"))
    refused("set n_batches_in_buffer to at least 16,", n_batches_in_buffer=15, seqpos_slice=(8,))
    refused("given for typo, but the SAEs .* are white, batch", whitening={"typo": FEW})
    refused("given for plain, but", whitening={"plain": FEW})
    pursuit = MatchingPursuitTrainingSAEConfig(d_in=32, d_sae=64)
    pursuit.normalize_activations = "covariance_whitening"
    refused(
        "tied cannot be trained under whitening.*tied to the decoder",
        FoldError,
        saes={"tied": pursuit},
        hook_names=RESID,
    )
    same = training_sae("topk", 32, 64)
    refused(
        "white and batch are the same object",
        names=("white", "batch"),
        override_saes={"white": same, "batch": same},
    )
    refused(
        "white is of width 16, and of 32 in the config",
        names=("white",),
        override_saes={"white": training_sae("topk", 16, 64)},
    )
    refused(
        "white has normalize_activations='none', and 'covariance_whitening' in the config",
        names=("white", "batch"),
        override_saes={
            "white": training_sae("topk", 32, 64, normalize_activations="none"),
            "batch": training_sae("batchtopk", 32, 64),
        },
    )


def test_an_unknown_hook_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"no hook 'blocks\.7\.hook_resid_pre'; nearest: blocks"):
        runner("white", hook_names="blocks.7.hook_resid_pre")


def test_saes_that_disagree_on_what_to_leave_out_are_refused():
    whitening = {"white": replace(FEW, on_nonfinite="skip")}
    with pytest.raises(ValueError, match="same on_nonfinite, and have white: 'skip', batch: 'ra"):
        runner("white", "batch", whitening=whitening).run()


# --- evaluations


@pytest.fixture
def wandb_log(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    logs: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.init", lambda **options: None)
    monkeypatch.setattr("wandb.finish", lambda: None)
    monkeypatch.setattr("wandb.config", SimpleNamespace(update=lambda *args, **options: None))
    monkeypatch.setattr("wandb.log", lambda values, step: logs.append({**values, "step": step}))
    monkeypatch.setattr(LoggingConfig, "log", lambda *args, **options: None)
    return logs


@pytest.mark.parametrize("prefetch", [False, 2])
def test_evaluators_see_plain_saes_and_their_own_hook(prefetch, wandb_log):
    seen: list[tuple[type, str, float]] = []

    def evaluator(sae: Any, data_provider: Any, activation_scaler: Any) -> dict[str, Any]:
        # more than a thread that is paused would have in its queue
        acts = torch.cat([next(data_provider) for _ in range(4)])
        scaled = activation_scaler.scale(acts)
        out = activation_scaler.unscale(sae(scaled))
        explained = 1 - (acts - out).square().sum() / (acts - acts.mean(0)).square().sum()
        seen.append((type(sae), sae.cfg.metadata.hook_name, float(explained)))
        return {"explained": float(explained)}

    names = ("plain", "scaled", "white", "heads")
    made = runner(
        *names,
        evaluator=evaluator,
        n_eval_batches=1,
        prefetch_llm_batches=prefetch,
        logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=6, eval_every_n_wandb_logs=2),
    )
    made.run()
    assert [hook for _, hook, _ in seen] == [HOOKS[name] for name in names] * 2
    assert all(cls.__module__.startswith("sae_lens") for cls, _, _ in seen)
    assert all(explained > 0 for _, _, explained in (*seen[2:4], *seen[6:]))
    evaluations = [log for log in wandb_log if "white/explained" in log]
    assert [log["step"] for log in evaluations] == [11, 23]
    for log, values in zip(evaluations, (seen[:4], seen[4:]), strict=True):
        for name, (_, _, explained) in zip(names, values, strict=True):
            assert log[f"{name}/explained"] == explained
            # the built-in evaluations too, of the same SAE: SAELens reports percentages of its own
            assert "ce_loss_score" in log[f"{name}/model_performance_preservation"]
    steps = [log for log in wandb_log if "white/metrics/explained_variance" in log]
    # in the space of the activations, as the evaluator measures it
    for log, values in zip(steps[1::2], (seen[:4], seen[4:]), strict=True):
        assert log["white/metrics/explained_variance"] == pytest.approx(values[2][2], abs=0.1)


def test_the_users_evaluator_is_called_by_the_runners_too():
    def evaluator(sae: Any, data_provider: Any, activation_scaler: Any) -> dict[str, Any]:
        return {"width": next(data_provider).shape[1]}

    made = runner("white", "wide", evaluator=evaluator, n_eval_batches=1)
    made.run()
    metrics = made.evaluator(
        saes=made.saes,
        data_provider=made.activations_store.get_multi_hook_data_loader(),
        activation_scalers={name: ActivationScaler() for name in made.saes},
        hook_names=made.cfg.hook_names_per_sae,
    )
    assert (metrics["white/width"], metrics["wide/width"]) == (32, 128)
    assert "white/model_performance_preservation" in metrics


def test_an_evaluator_of_the_users_takes_the_place_of_saelens(wandb_log):
    def evaluator(saes: Any, data_provider: Any, activation_scalers: Any, hook_names: Any) -> Any:
        return {f"{name}/rows": len(next(data_provider)[hook_names[name]]) for name in saes}

    log = LoggingConfig(log_to_wandb=True, wandb_log_frequency=12, eval_every_n_wandb_logs=1)
    made = runner("white", "wide", logger=log)
    made.evaluator = evaluator
    made.run()
    assert [entry["wide/rows"] for entry in wandb_log if "wide/rows" in entry] == [BATCH] * 2


def test_a_store_put_in_before_training_is_trained_on():
    expected = states(runner("white", "wide").run())
    other = runner("white", "wide").activations_store
    store = ActivationsStore.from_config_multi_hook(
        other.model,
        dataset=tiny_dataset(),
        hook_names=[RESID, MLP],
        hook_d_ins={RESID: 32, MLP: 128},
        context_size=32,
        n_batches_in_buffer=16,
        store_batch_size_prompts=4,
        train_batch_size_tokens=BATCH,
    )
    made = runner("white", "wide")
    made.activations_store = store
    assert_equal(states(made.run()), expected)


def test_a_store_of_one_hook_is_refused():
    made = runner("white", "wide")
    made.activations_store = ActivationsStore.from_config(
        made.model, runner_config(), override_dataset=tiny_dataset()
    )
    with pytest.raises(TypeError, match="from_config_multi_hook"):
        made.run()


def test_stopping_in_an_evaluation_waits_for_its_end(tmp_path, wandb_log, monkeypatch):
    def evaluator(sae: Any, data_provider: Any, activation_scaler: Any) -> dict[str, Any]:
        return {"mean": float(next(data_provider).mean())}

    def made(**options: Any) -> Any:
        log = LoggingConfig(log_to_wandb=True, wandb_log_frequency=5, eval_every_n_wandb_logs=1)
        return runner(
            "white", "heads", evaluator=evaluator, n_eval_batches=1, logger=log, **options
        )

    expected = states(made().run())
    with monkeypatch.context() as patch:
        stop_at(patch, 12, signal.SIGINT)  # in the second evaluation, at its first draw
        with pytest.raises(KeyboardInterrupt):
            made(checkpoint_path=str(tmp_path)).run()
    (checkpoint,) = tmp_path.glob("*/*")
    resumed = made(resume_from_checkpoint=str(checkpoint), whitening=None)
    assert_equal(states(resumed.run()), expected)


def test_messages_name_the_hooks(caplog, monkeypatch):
    monkeypatch.setattr("sae_whiten.estimation.stopping.LIMIT_PER_DIMENSION", 25)
    with caplog.at_level(logging.WARNING):
        runner("white", "heads", whitening=WhiteningConfig(tolerance=1e-4), **UNLIMITED).run()
    for hook in (RESID, HEADS):
        assert re.search(f"{re.escape(hook)}.* 896 activations", caplog.text)


def test_lines_about_one_sae_begin_with_its_name(caplog, tmp_path):
    options: dict[str, Any] = {"n_checkpoints": 1, "checkpoint_path": str(tmp_path)}
    with caplog.at_level(logging.INFO, "sae_whiten"):
        runner("plain", "white", "batch", "heads", **options).run()
    lines = [record.getMessage() for record in caplog.records]
    for said in ("whitening folded into", "trained: explained variance"):
        about = [line.partition(": ")[0] for line in lines if said in line]
        assert about == ["white", "batch", "heads"]
    (saved,) = [line for line in lines if "checkpoint saved" in line]
    assert Path(saved.rpartition(" ")[2]).is_dir()


def test_the_package_exports_it():
    import sae_whiten

    assert "WhiteningMultiSAETrainingRunner" in dir(sae_whiten)
    assert multi_trainer.__all__ == ["WhiteningMultiSAETrainer"]
