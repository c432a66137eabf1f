"""What training does with the activations it is given: order, ends, shapes, units, NaN."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_whiten import (
    ActivationStatistics,
    CovarianceWhiteningScaler,
    NonFiniteActivationsError,
    WhiteningConfig,
    WhiteningTrainer,
)
from tests.reference import (
    BATCH,
    D_IN,
    activations,
    batches,
    explained_variance,
    finite,
    run_by_hand,
    same,
    state,
    topk_config,
    topk_sae,
    trainer_config,
)
from tests.support import training_sae, whitening_of


def spoiled(index: int, value: float, seed: int = 0) -> Iterator[Tensor]:
    """`batches`, with one entry of one token of batch `index` not a number."""
    for i, batch in enumerate(batches(seed)):
        if i == index:
            batch[7, 3] = value
        yield batch


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
def test_a_token_that_is_not_finite_in_the_estimation(bad: float) -> None:
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
def test_a_token_that_is_not_finite_in_training(bad: float, tmp_path: Path) -> None:
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


def test_the_remedy_that_the_error_names_works_on_the_checkpoint(tmp_path: Path) -> None:
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


def test_one_activation_no_activation_no_batch() -> None:
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
        with pytest.raises(ValueError, match=f"at least [12]|{message}"):
            ours.estimate_whitening(D_IN, iter(source), n_batches)
        assert ours.whitening is None

        sae = topk_sae()
        before = state(sae)
        with pytest.raises(ValueError, match=message):
            WhiteningTrainer(trainer_config(), sae, iter(source)).fit()
        assert same(before, state(sae))


def test_empty_batches_change_nothing() -> None:
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
def test_a_source_that_yields_nothing_any_more_is_an_error(nothing: Tensor, n_good: int) -> None:
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


@pytest.mark.parametrize("n_samples", [None, 1000])
def test_activations_that_are_repeated_are_counted_once(n_samples: int | None, caplog: Any) -> None:
    """An odd number of batches: of the second round, the halves get each other's batches."""
    x = activations(5 * BATCH)
    scaler = CovarianceWhiteningScaler(WhiteningConfig(n_samples=n_samples))
    scaler.estimate_whitening(D_IN, itertools.cycle(x.split(BATCH)))
    assert scaler.statistics is not None
    assert scaler.statistics.n_samples == len(x)
    assert scaler.whitening is not None
    assert torch.allclose(scaler.whitening.W, whitening_of(x).W, rtol=1e-6)
    assert "the data provider repeats its first 5 batches" in caplog.text


def test_batches_read_while_looking_for_repeats_are_trained_on() -> None:
    x = activations(5 * BATCH)
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), itertools.cycle(x.split(BATCH)))
    trainer.estimate_whitening()
    served = [next(trainer.stream) for _ in range(12)]
    for batch, expected in zip(served, itertools.cycle(x.split(BATCH)), strict=False):
        assert torch.equal(batch, expected)


def test_the_same_token_twice_is_no_repeat() -> None:
    x = activations(2000)
    tokens = [x[0], *x]
    scaler = CovarianceWhiteningScaler(WhiteningConfig(n_samples=2000))
    scaler.estimate_whitening(D_IN, (token[None] for token in tokens))
    assert scaler.statistics is not None
    assert scaler.statistics.n_samples == 2000


def test_training_does_not_depend_on_the_unit() -> None:
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


def test_what_the_estimation_read_is_trained_on() -> None:
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


def test_a_source_that_ends_too_early_is_told_how_much_was_needed() -> None:
    with pytest.raises(StopIteration):
        SAETrainer(trainer_config(), topk_sae(), itertools.islice(batches(), 3)).fit()
    trainer = WhiteningTrainer(trainer_config(), topk_sae(), itertools.islice(batches(), 3))
    with pytest.raises(ValueError, match=r"192 activations in 3 batches") as caught:
        trainer.fit()
    needed = re.search(r"needs about (\d+)", str(caught.value))
    assert needed is not None
    assert 192 < int(needed.group(1)) < 4000
    assert "n_samples=...) to at most 192" in str(caught.value)
    # no number of samples would do
    with pytest.raises(ValueError, match=r"0 activations .* Provide more data\.$"):
        WhiteningTrainer(trainer_config(), topk_sae(), iter(())).fit()


def test_a_source_that_ends_in_training_is_told_how_much_was_needed() -> None:
    with pytest.raises(StopIteration):
        SAETrainer(trainer_config(40), topk_sae(), itertools.islice(batches(), 55)).fit()
    sae = topk_sae()
    trainer = WhiteningTrainer(trainer_config(40), sae, itertools.islice(batches(), 30))
    with pytest.raises(
        ValueError, match=r"ended after 30 batches, before training, which needs 40:"
    ):
        trainer.fit()
    # nothing is lost
    expected = WhiteningTrainer(trainer_config(), topk_sae(), batches())
    run_by_hand(expected, 30)
    assert same(state(sae), state(expected.sae))


def test_a_width_that_divides_the_size_is_an_error() -> None:
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


def test_hook_z_works_in_both_directions_and_in_training() -> None:
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


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk", "topk_vsae"])
def test_saes_of_hook_z_are_trained_to_the_end_whatever_they_are_saved_as(architecture) -> None:
    def trained(**options: Any) -> TrainingSAE[Any]:
        sae = training_sae(architecture, D_IN, 4 * D_IN, **options)
        return WhiteningTrainer(trainer_config(), sae, batches()).fit()

    sae, flat = trained(reshape_activations="hook_z"), trained()
    assert same(state(sae), state(flat))
    assert sae.cfg.metadata.explained_variance == flat.cfg.metadata.explained_variance
