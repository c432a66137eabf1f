import copy
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Array2D, Dataset, Features
from sae_lens import (
    SAE,
    LoggingConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.constants import (
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file
from torch import Tensor

from sae_whiten import (
    ActivationStatistics,
    FoldError,
    NonFiniteActivationsError,
    Whitening,
    WhiteningConfig,
    WhiteningTrainer,
    WhiteningTrainingRunner,
)
from sae_whiten._checks import FieldError
from sae_whiten.training.activations_store import (
    ResumableActivationsStore,
    buffer_field,
    check_buffer,
)
from sae_whiten.training.stream import ActivationStream
from tests.processes import run_code
from tests.reference import seeded
from tests.support import runner_config, tiny_dataset, tiny_model

POISON = 77
FEW = WhiteningConfig(n_samples=1500)  # of 10240 tokens that training sees


def runner(whitening: WhiteningConfig | None = FEW, **options: Any) -> WhiteningTrainingRunner:
    torch.manual_seed(7)
    return WhiteningTrainingRunner(
        runner_config(**options),
        whitening,
        override_dataset=tiny_dataset(),
        override_model=tiny_model(),
    )


def state(sae: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in sae.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(monkeypatch: pytest.MonkeyPatch, n_served: int, signum: int) -> None:
    """Send a signal to this process when batch `n_served` is asked for."""
    serve = ActivationStream.__next__

    def serve_and_stop(stream: ActivationStream) -> Tensor:
        if stream.n_served == n_served:
            os.kill(os.getpid(), signum)
        return serve(stream)

    monkeypatch.setattr(ActivationStream, "__next__", serve_and_stop)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    path = tmp_path_factory.mktemp("uninterrupted")
    return state(runner(output_path=str(path)).run()), path


def test_the_output_is_a_stock_sae_for_a_process_that_never_heard_of_us(uninterrupted, tmp_path):
    _, path = uninterrupted
    x = runner().activations_store.next_batch()
    torch.save(x, tmp_path / "x.pt")
    code = """
        import sys, torch
        from sae_lens import SAE
        sae = SAE.load_from_disk(sys.argv[1])
        x = torch.load(sys.argv[2])
        with torch.no_grad():
            error = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
        assert "sae_whiten" not in sys.modules
        assert type(sae).__module__.startswith("sae_lens"), type(sae)
        assert not list(sae.named_buffers())
        print(float(error))
    """
    process = run_code(code, str(path), str(tmp_path / "x.pt"))
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < 0.7


def test_the_output_folder_holds_everything_and_says_how_it_was_made(uninterrupted):
    _, path = uninterrupted
    assert {p.name for p in path.iterdir()} == {
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
        "runner_cfg.json",
        "sae_whiten",
    }
    own = path / "sae_whiten"
    assert {p.name for p in own.iterdir()} == {
        "activation_statistics.safetensors",
        "whitening.safetensors",
    }
    metadata = json.loads((path / "cfg.json").read_text())["metadata"]
    assert metadata["whitening"]["n_samples"] >= 1500
    # 300 sequences of 32 tokens are fewer than the 80 batches of 128
    source = metadata["whitening"]["fold"]["check"]["source"]
    assert source == "next (of a dataset that was begun anew)"
    assert metadata["hook_name"] == "blocks.1.hook_resid_pre"
    assert 0 < metadata["l0"] < 8.01
    statistics = ActivationStatistics.load(own / "activation_statistics.safetensors")
    assert statistics.provenance["hook_name"] == "blocks.1.hook_resid_pre"
    assert statistics.n_samples == metadata["whitening"]["n_samples"]
    whitening = Whitening.load(own / "whitening.safetensors")
    assert torch.equal(whitening.W, Whitening.from_statistics(statistics, FEW).W)


def test_the_configs_given_are_not_changed_and_serve_a_second_run(uninterrupted):
    config = runner_config()
    before = copy.deepcopy(config)
    for _ in range(2):
        torch.manual_seed(7)
        sae = WhiteningTrainingRunner(
            config, FEW, override_dataset=tiny_dataset(), override_model=tiny_model()
        ).run()
        assert config == before
        assert equal(state(sae), uninterrupted[0])


@pytest.mark.parametrize(
    ("signum", "n_served", "prefetch"),
    [
        *((signal.SIGINT, n_served, False) for n_served in (0, 12, 13, 79)),
        *((signal.SIGINT, n_served, 2) for n_served in (1, 50)),
        (signal.SIGTERM, 50, False),
    ],
)
def test_interrupted_training_resumes_to_the_bit(
    signum, n_served, prefetch, uninterrupted, tmp_path, monkeypatch
):
    """Before, in and after the batches that statistics were estimated from, over an epoch's end."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    options = {"checkpoint_path": str(tmp_path), "prefetch_llm_batches": prefetch}
    interrupted = runner(**options)
    with monkeypatch.context() as patch:
        stop_at(patch, n_served, signum)
        with pytest.raises(KeyboardInterrupt if signum == signal.SIGINT else SystemExit) as caught:
            interrupted.run()
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    # else the interpreter would have to close the loop's progress bar at its end
    assert caught.value.__context__ is not None
    assert caught.value.__context__.__traceback__ is None
    (checkpoint,) = tmp_path.glob("*/*")  # SAELens puts a folder of the run's id in between
    assert checkpoint.name == str(128 * n_served)
    assert SAE.load_from_disk(checkpoint).cfg.normalize_activations == "none"
    resumed = runner(None, resume_from_checkpoint=str(checkpoint), prefetch_llm_batches=prefetch)
    torch.manual_seed(123)  # resuming must not depend on the state of the generator
    sae = resumed.run()
    assert equal(state(sae), uninterrupted[0])
    # of which the data were seen before, also where that was before the interruption
    assert sae.cfg.metadata.whitening["fold"]["check"]["source"].startswith("next (of a dataset")


KILLED = """
    import os, signal, sys, torch
    from sae_whiten import WhiteningConfig, WhiteningTrainingRunner
    from tests.support import runner_config, tiny_dataset, tiny_model
    path, n_writes = sys.argv[1], 0

    # by the process itself, so that the moment does not depend on the load
    def file_event(event, args):
        global n_writes
        if event in ("open", "os.mkdir", "os.rename") and str(args[0]).startswith(path):
            n_writes += 1
            if n_writes == 200:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(file_event)
    torch.manual_seed(7)
    WhiteningTrainingRunner(
        runner_config(checkpoint_path=path, n_checkpoints=79),
        WhiteningConfig(n_samples=1500),
        override_dataset=tiny_dataset(),
        override_model=tiny_model(),
    ).run()
"""


def test_a_process_that_is_killed_resumes_to_the_bit(uninterrupted, tmp_path):
    process = run_code(KILLED, str(tmp_path))
    assert process.returncode == -signal.SIGKILL, process.stderr
    latest = max(checkpoints(tmp_path), key=lambda p: int(p.name))
    # every checkpoint that is there is whole
    for path in checkpoints(tmp_path):
        SAE.load_from_disk(path)
    resumed = runner(None, resume_from_checkpoint=str(latest))
    assert equal(state(resumed.run()), uninterrupted[0])


def checkpoints(path: Path) -> list[Path]:
    return [p for p in path.glob("*/*") if p.name.isdigit()]


def test_stopped_while_estimating_nothing_is_left_behind(tmp_path, monkeypatch):
    interrupted = runner(checkpoint_path=str(tmp_path))
    update = ActivationStatistics.update

    def update_and_stop(statistics: ActivationStatistics, *args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        update(statistics, *args, **options)

    monkeypatch.setattr(ActivationStatistics, "update", update_and_stop)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_order_of_batches_is_that_of_saelens():
    config = runner_config(training_tokens=128 * 300)
    model, dataset = tiny_model(), tiny_dataset()
    torch.manual_seed(3)
    stock = ActivationsStore.from_config(model, config, override_dataset=dataset)
    expected = [stock.next_batch().clone() for _ in range(90)]  # 1.2 epochs
    torch.manual_seed(3)
    ours = ResumableActivationsStore.from_config(model, config, override_dataset=dataset)
    assert all(torch.equal(ours.next_batch(), batch) for batch in expected)


def stock_store(cls: type[ActivationsStore] = ActivationsStore, **options: Any) -> ActivationsStore:
    return cls.from_config(tiny_model(), runner_config(**options), override_dataset=tiny_dataset())


class DoublingStore(ActivationsStore):
    """A user's store, which changes the activations."""

    def get_activations(self, batch_tokens: Tensor) -> Tensor:
        return 2 * super().get_activations(batch_tokens)


class OwnOrder(ActivationsStore):
    """A user's store that does not mix."""

    def get_data_loader(self) -> Any:
        return self._iterate_filtered_activations()


def short_run(**options: Any) -> WhiteningTrainingRunner:
    return runner(WhiteningConfig(n_samples=500), training_tokens=128 * 20, **options)


def test_the_seed_decides_weights_and_order_unless_the_script_has_seeded_torch():
    data: dict[str, Any] = {"override_dataset": tiny_dataset(), "override_model": tiny_model()}

    def weights(script: int, seed: int) -> Tensor:
        torch.manual_seed(script)
        made = WhiteningTrainingRunner(runner_config(seed=seed), FEW, **data)
        return torch.cat([made.sae.W_enc.flatten(), next(made.activations_store).flatten()])

    first = weights(script=0, seed=5)
    assert torch.equal(weights(script=1, seed=5), first)
    assert not torch.equal(weights(script=0, seed=6), first)
    by_script = weights(script=0, seed=42)
    assert torch.equal(weights(script=0, seed=42), by_script)
    assert not torch.equal(weights(script=1, seed=42), by_script)
    # as in a process that has seeded nothing
    assert torch.equal(weights(script=2**60, seed=42), weights(script=2**60 + 1, seed=42))


@pytest.mark.parametrize("drawn", [0, 3])
def test_a_store_put_in_before_training_is_trained_on_from_its_beginning(drawn):
    expected = state(short_run().run())
    store = stock_store()
    for _ in range(drawn):
        store.next_batch()
    made = short_run()
    made.activations_store = store
    assert equal(state(made.run()), expected)


def test_what_a_users_store_overrides_is_kept(tmp_path, monkeypatch):
    def made(**options: Any) -> WhiteningTrainingRunner:
        store = stock_store(DoublingStore)
        one = short_run(**options)
        one.activations_store = store
        return one

    doubled = made()
    expected = state(doubled.run())
    plain = short_run()
    plain.run()
    assert doubled.trainer.whitening is not None
    assert plain.trainer.whitening is not None
    torch.testing.assert_close(doubled.trainer.whitening.mean, 2 * plain.trainer.whitening.mean)
    with monkeypatch.context() as patch:
        stop_at(patch, 10, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            made(checkpoint_path=str(tmp_path)).run()
    (checkpoint,) = tmp_path.glob("*/*")
    assert equal(state(made(resume_from_checkpoint=str(checkpoint)).run()), expected)


@pytest.mark.parametrize(
    ("store", "facts"),
    [
        (lambda: iter([torch.zeros(128, 32)]), ["list_iterator", "WhiteningTrainer"]),
        (lambda: stock_store(OwnOrder), ["OwnOrder overrides get_data_loader", "WhiteningTrainer"]),
    ],
)
def test_a_store_that_could_not_be_resumed_is_refused_by_its_class(store, facts):
    made = runner()
    made.activations_store = store()
    with pytest.raises(TypeError) as raised:
        made.run()
    assert all(fact in str(raised.value) for fact in facts)


def test_batches_drawn_before_training_do_not_disturb_resuming(tmp_path, monkeypatch):
    def made(**options: Any) -> WhiteningTrainingRunner:
        one = short_run(**options)
        for _ in range(3):
            next(one.activations_store)
        return one

    def stopped(run: WhiteningTrainingRunner, n_served: int) -> str:
        with monkeypatch.context() as patch:
            stop_at(patch, n_served, signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                run.run()
        (checkpoint,) = Path(run.cfg.checkpoint_path or "").iterdir()
        return str(checkpoint)

    expected = state(made().run())
    first = stopped(made(checkpoint_path=str(tmp_path / "first")), 6)
    again = short_run(checkpoint_path=str(tmp_path / "second"), resume_from_checkpoint=first)
    second = stopped(again, 12)
    assert equal(state(short_run(resume_from_checkpoint=second).run()), expected)


def test_a_trainer_of_the_users_own_saves_with_the_runners_method(tmp_path):
    made = short_run()
    made.activations_store = stock_store()
    cfg = replace(made.cfg.to_sae_trainer_config(), n_checkpoints=1, checkpoint_path=str(tmp_path))
    trainer = WhiteningTrainer(
        cfg,
        made.sae,
        made.activations_store,
        WhiteningConfig(n_samples=500),
        save_checkpoint_fn=made.save_checkpoint,
    )
    trainer.fit()
    (checkpoint,) = tmp_path.iterdir()
    for name in (RUNNER_CFG_FILENAME, ACTIVATIONS_STORE_STATE_FILENAME):
        assert (checkpoint / name).is_file()


def test_a_finished_sae_is_saved_before_training_and_one_to_be_whitened_is_not(tmp_path):
    made = runner()
    with pytest.raises(FoldError, match="not been estimated"):
        made.save_final_sae(made.sae, str(tmp_path / "own"))
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=32, d_sae=64))
    sparsity = torch.arange(64.0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "whitening.safetensors").write_text("of another SAE, saved here before")
    made.save_final_sae(sae, str(tmp_path / "other"), log_feature_sparsity=sparsity)
    assert torch.equal(SAE.load_from_disk(tmp_path / "other").W_enc, sae.W_enc)
    saved = load_file(tmp_path / "other" / SPARSITY_FILENAME)["sparsity"]
    assert torch.equal(saved, sparsity)
    assert not (tmp_path / "other" / "whitening.safetensors").exists()


@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
def test_evaluations_in_between_do_not_disturb_resuming(mixing, tmp_path):
    """An evaluator draws sequences from the same dataset."""
    config = runner_config(activations_mixing_fraction=mixing)
    model, dataset = tiny_model(), tiny_dataset()

    def store() -> ResumableActivationsStore:
        made = ResumableActivationsStore.from_config(model, config, override_dataset=dataset)
        assert isinstance(made, ResumableActivationsStore)
        return made

    torch.manual_seed(3)
    reference = store()
    expected = []
    for i in range(40):
        expected.append(reference.next_batch().clone())
        if i % 7 == 6:
            reference.get_batch_tokens(5)
        if i == 20:
            reference.save_to_checkpoint(tmp_path)
    resumed = store()
    resumed.load_from_checkpoint(tmp_path)
    for i in range(21, 40):
        assert torch.equal(resumed.next_batch(), expected[i]), i
        if i % 7 == 6:
            resumed.get_batch_tokens(5)


def test_cached_activations_are_resumed_too(tmp_path):
    g = torch.Generator().manual_seed(0)
    acts = torch.randn(60, 32, 32, generator=g)
    hook = "blocks.1.hook_resid_pre"
    features = Features({hook: Array2D(shape=(32, 32), dtype="float32")})
    Dataset.from_dict({hook: acts.numpy()}, features=features).save_to_disk(tmp_path / "cache")
    config = runner_config(
        use_cached_activations=True,
        cached_activations_path=str(tmp_path / "cache"),
        training_tokens=128 * 30,
    )

    def store() -> ResumableActivationsStore:
        made = ResumableActivationsStore.from_config(
            tiny_model(), config, override_dataset=tiny_dataset()
        )
        assert isinstance(made, ResumableActivationsStore)
        return made

    torch.manual_seed(3)
    reference = store()
    expected = [reference.next_batch().clone() for _ in range(10)]
    reference.save_to_checkpoint(tmp_path)
    expected += [reference.next_batch().clone() for _ in range(10)]
    resumed = store()
    resumed.load_from_checkpoint(tmp_path)
    assert all(torch.equal(resumed.next_batch(), batch) for batch in expected[10:])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_training_on_cached_activations_knows_their_rounding(dtype, tmp_path):
    acts = torch.randn(60, 32, 32, generator=torch.Generator().manual_seed(0))
    features = Features({"blocks.1.hook_resid_pre": Array2D(shape=(32, 32), dtype=dtype)})
    content = {"blocks.1.hook_resid_pre": acts.numpy()}
    Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "cache")
    made = runner(
        use_cached_activations=True,
        cached_activations_path=str(tmp_path / "cache"),
        training_tokens=128 * 10,
    )
    made.run()
    assert made.trainer.scaler.statistics is not None
    assert made.trainer.scaler.statistics.resolution == torch.finfo(getattr(torch, dtype)).eps


def test_a_published_sae_is_fine_tuned_under_whitening(uninterrupted, tmp_path):
    _, path = uninterrupted
    before = SAE.load_from_disk(path)
    sae = TopKTrainingSAEConfig(
        d_in=32,
        d_sae=128,
        k=8,
        rescale_acts_by_decoder_norm=False,  # which another whitening would change a little
        normalize_activations="covariance_whitening",
    )
    tuned = runner(sae=sae, from_pretrained_path=str(path), training_tokens=128, lr=0.0).run()
    # one step with learning rate 0: unfolded and folded again, the same function
    x = runner().activations_store.next_batch()
    with torch.no_grad():
        assert (tuned(x) - before(x)).norm() / (x - x.mean(0)).norm() < 1e-4
    assert tuned.cfg.metadata.whitening["fold"]["check"]["fold_error"] < 1e-4


def test_fine_tuning_weights_of_an_unknown_basis_is_refused(tmp_path):
    sae = TopKTrainingSAEConfig(
        d_in=32, d_sae=128, k=8, normalize_activations="covariance_whitening"
    )
    TrainingSAE.from_dict(sae.to_dict()).save_model(tmp_path)
    with pytest.raises(ValueError, match="whitened coordinates"):
        runner(from_pretrained_path=str(tmp_path))


def test_a_config_that_does_not_ask_for_whitening_is_refused():
    with pytest.raises(ValueError, match="covariance_whitening"):
        runner(sae=TopKTrainingSAEConfig(d_in=32, d_sae=128, k=8))


def test_an_sae_of_a_class_that_saelens_does_not_know_is_trained():
    class OwnConfig(TopKTrainingSAEConfig):
        @classmethod
        def architecture(cls) -> str:
            return "own"

        def get_inference_config_class(self) -> type[TopKSAEConfig]:
            return TopKSAEConfig

    sae = TopKTrainingSAE(
        OwnConfig(d_in=32, d_sae=128, k=8, normalize_activations="covariance_whitening")
    )
    trained = WhiteningTrainingRunner(
        runner_config(),
        FEW,
        override_dataset=tiny_dataset(),
        override_model=tiny_model(),
        override_sae=sae,
    ).run()
    assert trained is sae
    assert trained.cfg.metadata.whitening["fold"]["check"]["fold_error"] < 1e-5


COMPILED = """
    import sys, torch
    from sae_whiten import WhiteningConfig, WhiteningTrainingRunner
    from tests.support import runner_config, tiny_dataset, tiny_model
    compile = torch.compile
    # traced as for any backend, but without needing a C++ compiler
    torch.compile = lambda function, **options: compile(function, backend="eager")
    torch.manual_seed(7)
    WhiteningTrainingRunner(
        runner_config(output_path=sys.argv[1], compile_sae=True),
        WhiteningConfig(n_samples=1500),
        override_dataset=tiny_dataset(),
        override_model=tiny_model(),
    ).run()
"""


def test_compiled_saes_train_in_the_original_space_too(uninterrupted, tmp_path):
    # in a process of its own: run-time type checks cannot be compiled
    process = run_code(COMPILED, str(tmp_path))
    assert process.returncode == 0, process.stderr
    compiled, eager = SAE.load_from_disk(tmp_path), SAE.load_from_disk(uninterrupted[1])
    for name, value in state(eager).items():
        assert torch.allclose(state(compiled)[name], value, rtol=1e-3, atol=1e-4), name


def test_a_wrong_width_is_one_clear_error():
    sae = TopKTrainingSAEConfig(
        d_in=16, d_sae=128, k=8, normalize_activations="covariance_whitening"
    )
    with pytest.raises(FieldError, match="d_in=16.* blocks.1.hook_resid_pre are of width 32"):
        runner(sae=sae).run()


@pytest.mark.parametrize("prefetch", [False, 2])
def test_a_nan_in_the_middle_of_a_refill_is_met_again_after_resuming(prefetch, tmp_path):
    """Nothing that was drawn for the refill may be passed over."""

    # a sequence of its own for the model to fail on, well behind what statistics need
    sequences = list(tiny_dataset()["input_ids"])
    sequences[190] = [POISON] * 33
    spoiled_dataset = Dataset.from_dict({"input_ids": sequences})

    def run(**options: Any) -> None:
        torch.manual_seed(7)
        made = WhiteningTrainingRunner(
            runner_config(prefetch_llm_batches=prefetch, **options),
            FEW,
            override_dataset=spoiled_dataset,
            override_model=tiny_model(),
        )
        store = made.activations_store
        get_activations = store.get_activations

        def fails(batch_tokens: Tensor) -> Tensor:
            acts = get_activations(batch_tokens)
            acts[(batch_tokens == POISON).all(dim=1)] = float("nan")
            return acts

        store.get_activations = fails
        made.run()

    with pytest.raises(NonFiniteActivationsError, match="pass 47 of the model") as first:
        run(checkpoint_path=str(tmp_path))
    (checkpoint,) = tmp_path.glob("*/*")
    with pytest.raises(NonFiniteActivationsError, match="row 64") as second:
        run(resume_from_checkpoint=str(checkpoint))
    assert "row 64" in str(first.value)
    assert "row 64" in str(second.value)


@pytest.mark.parametrize("n_draws", [1, 3])
def test_evaluations_while_batches_are_queued_ahead_are_drawn_again(n_draws, tmp_path):
    config = runner_config()

    def store() -> ResumableActivationsStore:
        torch.manual_seed(3)
        made = ResumableActivationsStore.from_config(
            tiny_model(), config, override_dataset=tiny_dataset()
        )
        assert isinstance(made, ResumableActivationsStore)
        return made

    reference = store()
    served, ahead = 3, 9
    reference.training_position = lambda: served
    for _ in range(ahead):  # looked at, not trained on
        reference.next_batch()
    for _ in range(n_draws):
        reference.get_batch_tokens(5)
    reference.save_to_checkpoint(tmp_path)
    expected = [reference.next_batch().clone() for _ in range(20)]
    resumed = store()
    resumed.load_from_checkpoint(tmp_path)
    found = [resumed.next_batch() for _ in range(ahead - served + 20)][ahead - served :]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_evaluations_of_batches_read_for_the_estimation_do_not_disturb_resuming(
    tmp_path, monkeypatch
):
    """They draw from the dataset behind these batches, 47 here."""
    for name in ("init", "log", "finish"):
        monkeypatch.setattr(f"wandb.{name}", lambda *args, **options: None)
    monkeypatch.setattr(LoggingConfig, "log", lambda *args, **options: None)
    many = WhiteningConfig(n_samples=6000)

    def made(**options: Any) -> WhiteningTrainingRunner:
        evaluating = LoggingConfig(
            log_to_wandb=True, wandb_log_frequency=10, eval_every_n_wandb_logs=1
        )
        return runner(many, logger=evaluating, n_eval_batches=1, **options)

    expected = state(made().run())
    with monkeypatch.context() as patch:
        stop_at(patch, 13, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            made(checkpoint_path=str(tmp_path)).run()
    (checkpoint,) = tmp_path.glob("*/*")
    assert equal(state(made(resume_from_checkpoint=str(checkpoint)).run()), expected)


@pytest.mark.parametrize("n_served", [5, 30])
def test_a_run_that_skips_resumes(n_served, tmp_path, monkeypatch):
    """Batch 5 was read ahead for the estimation, as were some after it."""
    model = tiny_model()

    def spoil(tensor: Tensor, *, hook: object) -> Tensor:
        tensor[0, 0] = float("nan")
        return tensor

    model.hook_dict["blocks.0.hook_resid_pre"].add_perma_hook(spoil)
    skip = WhiteningConfig(n_samples=1500, on_nonfinite="skip")

    def made(**options: Any) -> WhiteningTrainingRunner:
        torch.manual_seed(7)
        return WhiteningTrainingRunner(
            runner_config(**options),
            skip,
            override_dataset=tiny_dataset(),
            override_model=model,
        )

    reference = made()
    expected = state(reference.run())
    with monkeypatch.context() as patch:
        stop_at(patch, n_served, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            made(checkpoint_path=str(tmp_path)).run()
    (checkpoint,) = tmp_path.glob("*/*")
    resumed = made(resume_from_checkpoint=str(checkpoint))
    assert equal(state(resumed.run()), expected)
    skipped = [each.activations_store.n_skipped for each in (reference, resumed)]  # pyright: ignore[reportAttributeAccessIssue]
    assert skipped[0] == skipped[1] > 0


def test_an_unknown_hook_is_refused_at_construction_with_the_nearest():
    with pytest.raises(ValueError, match=r"no hook 'blocks\.7\.hook_resid_pre'; nearest: blocks"):
        runner(hook_name="blocks.7.hook_resid_pre")


def test_a_model_that_gives_nothing_finite_is_an_error_not_an_endless_wait(monkeypatch):
    monkeypatch.setattr("sae_whiten.training.activations_store._MAX_USELESS_PASSES", 7)
    model = tiny_model()
    model.state_dict()["blocks.0.mlp.b_out"][3] = float("nan")
    made = WhiteningTrainingRunner(
        runner_config(),
        WhiteningConfig(on_nonfinite="skip"),
        override_dataset=tiny_dataset(),
        override_model=model,
    )
    with pytest.raises(ValueError, match="7 passes of the model in a row"):
        made.run()


def test_a_dataset_that_repeats_while_estimating_is_warned_about(caplog):
    torch.manual_seed(7)
    WhiteningTrainingRunner(
        runner_config(training_tokens=128 * 5),
        override_dataset=tiny_dataset(8),
        override_model=tiny_model(),
    ).run()
    assert "the dataset was repeated" in caplog.text


@pytest.mark.parametrize("prefetched", [0, 2])
def test_tokens_of_one_text_are_in_one_half_of_the_estimation(prefetched):
    """Halves of the same texts would agree with each other, however few texts they are of."""

    def runner(n_samples: int) -> WhiteningTrainingRunner:
        # texts of one token each: so few differ that the mixing buffer spreads all of them
        tokens = torch.randperm(100, generator=seeded(3)).tolist()
        return WhiteningTrainingRunner(
            runner_config(training_tokens=128, prefetch_llm_batches=prefetched),
            WhiteningConfig(n_samples=n_samples),
            override_dataset=Dataset.from_dict({"input_ids": [[token] * 33 for token in tokens]}),
            override_model=tiny_model(),
        )

    def estimated(n_samples: int) -> ActivationStatistics:
        made = runner(n_samples)
        made.run()
        assert made.trainer.scaler.statistics is not None
        return made.trainer.scaler.statistics

    some, every = estimated(60 * 32), estimated(100 * 32)
    inflation = some.provenance["inflation"]
    inverse = torch.linalg.pinv(some.covariance, rtol=1e-9, hermitian=True)
    excess = float((inverse * every.covariance).sum() / (inverse * some.covariance).sum()) - 1
    assert inflation > excess / 2


@pytest.mark.parametrize("n_prompts", [4, 8])
def test_the_limit_of_an_estimation_counts_training_batches(n_prompts, caplog):
    made = WhiteningTrainingRunner(
        runner_config(
            training_tokens=1280,
            store_batch_size_prompts=n_prompts,
            n_batches_for_norm_estimate=6,
        ),
        WhiteningConfig(tolerance=1e-6),
        override_dataset=tiny_dataset(),
        override_model=tiny_model(),
    )
    sae = made.run()
    assert "n_batches_for_norm_estimate was reached" in caplog.text
    assert sae.cfg.metadata.whitening["n_samples"] == 6 * 128


@pytest.mark.parametrize(
    ("options", "enough"),
    [
        ({"n_batches_in_buffer": 3}, 4),
        ({"n_batches_in_buffer": 12, "seqpos_slice": (2, 12)}, 13),
        ({"n_batches_in_buffer": 2, "train_batch_size_tokens": 65}, 3),
    ],
)
def test_a_buffer_smaller_than_a_batch_is_refused_before_the_model_is_loaded(
    options: dict[str, Any], enough: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("sae_lens.llm_sae_training_runner.load_model", refuse)
    with pytest.raises(ValueError, match=f"set n_batches_in_buffer to at least {enough},"):
        WhiteningTrainingRunner(runner_config(**options))
    with pytest.raises(AssertionError, match="loaded"):
        WhiteningTrainingRunner(runner_config(**{**options, "n_batches_in_buffer": enough}))


def test_a_buffer_that_saelens_leaves_open_holds_four_batches_and_is_recorded(tmp_path):
    config = runner_config(training_tokens=128 * 4, output_path=str(tmp_path))
    config.n_batches_in_buffer = None  # pyright: ignore[reportAttributeAccessIssue]
    made = WhiteningTrainingRunner(
        config, FEW, override_dataset=tiny_dataset(), override_model=tiny_model()
    )
    made.run()
    assert json.loads((tmp_path / "runner_cfg.json").read_text())["n_batches_in_buffer"] == 20
    assert check_buffer(None, 128, 4096) == 128
    assert config.n_batches_in_buffer is None


def test_the_buffer_goes_by_the_name_that_saelens_has_for_it():
    old, new = SimpleNamespace(n_batches_in_buffer=5), SimpleNamespace(n_sequences_in_buffer=5)
    renamed = SimpleNamespace(n_batches_in_buffer=None, n_sequences_in_buffer=5)
    both = SimpleNamespace(n_batches_in_buffer=7, n_sequences_in_buffer=5)
    assert [buffer_field(holder) for holder in (old, new, renamed, both)] == [
        "n_batches_in_buffer",
        "n_sequences_in_buffer",
        "n_sequences_in_buffer",
        "n_batches_in_buffer",
    ]
