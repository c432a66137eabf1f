"""Probing, TPP and SCR on cases whose answer is known by hand, and against plain references."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from scipy.optimize import minimize

from sae_whiten.evaluation.probing import (
    MIN_CELL,
    SCR,
    TPP,
    LinearProbe,
    SCRDirection,
    _check_lengths,
    balanced_rows,
    full_probe_accuracy,
    linear_probe,
    probe_accuracy,
    sparse_probing,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from tests.evaluation.saebench import KS, NS, Case
from tests.support import nasty

LABELS = np.repeat([0, 1, 2, 3], 60)
ONE_HOT = np.eye(4)[LABELS]


# --- probes


def test_the_probe_minimises_the_penalised_loss() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)) * [1.0, 100.0, 0.01] + [5.0, 0.0, -3000.0]
    y = x[:, 0] + x[:, 1] / 100 + rng.normal(size=200) > 5
    columns = (x - x.mean(0)) / x.std(0)

    def loss(parameters: ndarray) -> float:
        logits = columns @ parameters[:3] + parameters[3]
        return float(
            np.logaddexp(0, np.where(y, -logits, logits)).sum() + (parameters[:3] ** 2).sum() / 2
        )

    best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
    probe = linear_probe(x, y)
    # a gradient of 1e-4 per sample, where scikit-learn stops, against a curvature of about 0.1
    np.testing.assert_allclose(probe.weight * x.std(0), best[:3], atol=1e-3)
    np.testing.assert_allclose(probe.logits(x), columns @ best[:3] + best[3], atol=5e-3)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_the_probe_does_not_depend_on_units(unit: float) -> None:
    x = nasty(400, 12).double().numpy()
    direction = np.linspace(-1, 1, 12)
    y = (x - x.mean(0)) @ direction > 0
    reference = linear_probe(x, y)
    scales = unit * np.logspace(-2, 2, 12)
    probe = linear_probe(x * scales, y)
    assert 0.9 < probe_accuracy(reference, x, y) <= 1
    np.testing.assert_allclose(probe.weight * scales, reference.weight, rtol=1e-6)
    np.testing.assert_allclose(probe.logits(x * scales), reference.logits(x), rtol=1e-6, atol=1e-6)


def test_a_constant_column_gets_no_weight_worth_mentioning() -> None:
    x = np.column_stack([np.full(60, 0.1), np.arange(60.0)]).astype(np.float32)
    probe = linear_probe(x, (np.arange(60) >= 30).astype(int))
    assert probe.weight[0] == 0
    assert probe_accuracy(probe, x, np.arange(60) >= 30) == 1


def test_accuracy_counts_rows() -> None:
    probe = LinearProbe(np.array([1.0, -1.0]), 0.5)
    x = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.4]])  # logits .5, -.5, 1.5, .1
    assert probe_accuracy(probe, x, np.array([1, 0, 1, 1])) == 1
    assert probe_accuracy(probe, x, np.array([1, 1, 1, 0])) == 0.5
    assert probe_accuracy(probe, x, np.array([False, True, False, False])) == 0


# --- drawing of rows


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_balanced_rows(sizes: list[int], seed: int, data: st.DataObject) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)) - 1, sizes))
    c = data.draw(st.sampled_from(range(len(sizes))))
    rows, y = balanced_rows(labels, c - 1, seed)
    m = min(sizes[c], sum(sizes) - sizes[c])
    assert len(set(rows.tolist())) == len(rows) == 2 * m
    assert (labels[rows[y]] == c - 1).all()
    assert (labels[rows[~y]] != c - 1).all()
    assert y.sum() == m
    taken = {k: int((labels[rows[~y]] == k - 1).sum()) for k in range(len(sizes)) if k != c}
    largest = max(taken.values())
    # a class gives less than the others only where it has no more
    assert all(n in (largest, largest - 1) or n == sizes[k] for k, n in taken.items())
    again = balanced_rows(labels, c - 1, seed)
    assert (again[0] == rows).all()


def test_seeds_draw_different_rows() -> None:
    first, second = (set(balanced_rows(LABELS, 0, seed)[0].tolist()) for seed in (0, 1))
    assert first != second


# --- sparse probing


def test_one_latent_per_class_is_enough() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(240, 30)) * 0.1
    latents = np.concatenate([noise, ONE_HOT], axis=1)
    assert sparse_probing(latents, LABELS, latents, LABELS) == {1: 1.0, 2: 1.0, 5: 1.0, 20: 1.0}
    assert full_probe_accuracy(latents, LABELS, latents, LABELS) == 1


def test_without_information_accuracy_is_chance() -> None:
    constant = np.ones((240, 20), np.float32)
    assert sparse_probing(constant, LABELS, constant, LABELS, ks=(1, 20)) == {1: 0.5, 20: 0.5}
    assert full_probe_accuracy(constant, LABELS, constant, LABELS) == 0.5
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 1000)
    train, test = rng.normal(size=(2, 2000, 50))
    # what was chosen on the training split says nothing about the test split: 2000 fair coins
    for accuracy in sparse_probing(train, labels, test, labels).values():
        assert abs(accuracy - 0.5) < 4 * 0.5 / 2000**0.5


def test_a_class_of_two_halves_needs_two_latents() -> None:
    # even rows of class c fire latent 2 c, odd rows latent 2 c + 1
    latents = np.eye(8, dtype=np.float32)[2 * LABELS + np.arange(240) % 2]
    # one latent finds half of the class and nothing else; two find all
    assert sparse_probing(latents, LABELS, latents, LABELS, ks=(1, 2)) == {1: 0.75, 2: 1.0}


def test_the_columns_chosen_differ_most_in_their_means_whatever_the_sign() -> None:
    labels = np.repeat([0, 1], 50)
    silent = np.where(labels == 1, 0.0, 1.0)  # fires where the class is not
    large = 1000 + 0.3 * labels * (np.arange(100) % 2)  # the largest mean, and variance
    latents = np.column_stack([large, silent])
    assert sparse_probing(latents, labels, latents, labels, ks=(1,)) == {1: 1.0}
    # in the test split the columns change places: the choice is that of the training split
    swapped = latents[:, ::-1].copy()
    assert sparse_probing(latents, labels, swapped, labels, ks=(1,)) == {1: 0.5}


def test_a_full_probe_sees_what_no_single_channel_shows() -> None:
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 500)
    common = 100 * rng.normal(size=1000)
    channels = np.column_stack([common, common + 0.2 * labels])
    # the class is the difference of two channels, and 1/1000 of the deviation of either
    assert sparse_probing(channels, labels, channels, labels, ks=(1,))[1] < 0.56
    weight = np.array([-1.0, 1.0])
    assert probe_accuracy(LinearProbe(weight, -0.1), channels, labels) == 1
    rotated = channels @ np.array([[1.0, -1.0], [1.0, 1.0]])
    assert full_probe_accuracy(rotated, labels, rotated, labels) == 1


def test_probing_in_blocks_of_columns_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    latents = (rng.normal(size=(240, 37)) + ONE_HOT @ rng.normal(size=(4, 37))).astype(np.float32)
    whole = sparse_probing(latents, LABELS, latents, LABELS)
    monkeypatch.setattr(
        "sae_whiten.evaluation.probing._blocks",
        lambda n, width: (slice(i, i + 5) for i in range(0, n, 5)),
    )
    assert sparse_probing(latents, LABELS, latents, LABELS) == whole


@pytest.mark.parametrize("seed", [0, 3])
def test_sparse_probing_equals_a_plain_implementation(seed: int) -> None:
    data = Tokens()
    # unequal classes: most of what is drawn depends on the seed
    keep = np.flatnonzero(data.labels != 2)[20:]
    train, labels = data.f[keep], data.labels[keep]
    test, test_labels = data.f_test[data.test_labels != 2], data.test_labels[data.test_labels != 2]
    expected: dict[int, list[float]] = {1: [], 7: [], 48: []}
    for (rows, y), (test_rows, test_y) in zip(
        draws(labels, seed), draws(test_labels, seed), strict=True
    ):
        difference = abs(train[rows][y].mean(0) - train[rows][~y].mean(0))
        columns = sorted(range(48), key=lambda j, d=difference: -d[j])
        for k, accuracies in expected.items():
            probe = linear_probe(train[rows][:, columns[:k]], y)
            accuracies.append(probe_accuracy(probe, test[test_rows][:, columns[:k]], test_y))
    means = {k: float(np.mean(accuracies)) for k, accuracies in expected.items()}
    assert sparse_probing(train, labels, test, test_labels, (1, 7, 48), seed) == means
    full = full_probe_accuracy(train, labels, test, test_labels, seed)
    # the same columns in another order, and scikit-learn stops short of the optimum
    assert full == pytest.approx(means[48], abs=2 / len(test))
    by_hand = [
        probe_accuracy(linear_probe(train[rows], y), test[test_rows], test_y)
        for (rows, y), (test_rows, test_y) in zip(
            draws(labels, seed), draws(test_labels, seed), strict=True
        )
    ]
    assert full == float(np.mean(by_hand))


# --- TPP


def test_tpp_of_a_latent_per_class_is_one_half() -> None:
    residuals = 3.0 * ONE_HOT[:, :3][LABELS < 3]
    labels = LABELS[LABELS < 3]
    latents, W_dec = ONE_HOT[:, :3][LABELS < 3], 3.0 * np.eye(3)
    tpp = tpp_of(residuals, latents, labels, W_dec, ns=(1,))
    assert tpp.base_accuracies.tolist() == [1, 1, 1]
    # without its latent a class looks like none: its probe calls all negative, others do not mind
    assert tpp.accuracies[1].tolist() == [[0.5, 1, 1], [1, 0.5, 1], [1, 1, 0.5]]
    assert tpp.scores == {1: 0.5}


def test_tpp_takes_as_many_latents_as_carry_the_class() -> None:
    labels = LABELS[LABELS < 3]
    residuals = ONE_HOT[LABELS < 3][:, :3]
    latents = np.repeat(residuals, 2, axis=1)  # two latents, each with half of the decoding
    W_dec = np.repeat(np.eye(3), 2, axis=0) / 2
    # half of the class' residual is still on its side of the threshold
    assert tpp_of(residuals, latents, labels, W_dec, ns=(1, 2)).scores == {1: 0.0, 2: 0.5}


def test_tpp_punishes_what_the_removal_does_to_other_classes() -> None:
    labels = LABELS[LABELS < 3]
    one_hot = ONE_HOT[LABELS < 3][:, :3]
    # without latent i a text of class i looks like one of class i + 1, and that class' probe takes
    # it for one: half of its negatives are lost, a quarter of its rows
    W_dec = np.eye(3) - np.roll(np.eye(3), 1, axis=1)
    tpp = tpp_of(one_hot, one_hot, labels, W_dec, ns=(1,))
    assert tpp.accuracies[1].tolist() == [[0.5, 0.75, 1], [1, 0.5, 0.75], [0.75, 1, 0.5]]
    assert tpp.scores == {1: 0.5 - (0.25 + 0) / 2}


def test_what_the_sae_does_not_decode_stays() -> None:
    tpp = tpp_of(ONE_HOT, ONE_HOT, LABELS, np.zeros((4, 4)), ns=(1, 4))
    assert tpp.scores == {1: 0.0, 4: 0.0}
    assert (tpp.accuracies[4] == 1).all()


def test_tpp_never_removes_latents_that_speak_against_the_class() -> None:
    # latent 4 + c fires for class c but its decoder points away from it, latent 8 + c fires for the
    # rest: removing either would make class c more certain, or change others
    latents = np.concatenate([ONE_HOT, ONE_HOT, 1 - ONE_HOT], axis=1)
    W_dec = np.concatenate([np.eye(4), -0.5 * np.eye(4), np.eye(4)])
    only = tpp_of(ONE_HOT, ONE_HOT, LABELS, np.eye(4), ns=(1,))
    all_ = tpp_of(ONE_HOT, latents, LABELS, W_dec, ns=(1, 5, 12))
    for n in (1, 5, 12):
        assert (all_.accuracies[n] == only.accuracies[1]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tpp_equals_a_plain_implementation_on_tokens(dtype: Any) -> None:
    data = Tokens(dtype=dtype)
    labels, test_labels = data.labels, data.test_labels
    ns = (1, 3, 10, 40)
    tpp = targeted_probe_perturbation(
        *(data.x, data.f, labels), *(data.x_test, data.f_test, test_labels), data.W_dec, ns, seed=3
    )
    probes = [linear_probe(data.x[rows], y) for rows, y in draws(labels, 3)]
    base = [
        probe_accuracy(p, data.x_test[rows], y)
        for p, (rows, y) in zip(probes, draws(test_labels, 3), strict=True)
    ]
    np.testing.assert_allclose(tpp.base_accuracies, base)
    for n in ns:
        scores = []
        for i, (rows, y) in enumerate(draws(labels, 3)):
            f = data.f[rows].astype(float)
            effect = (f[y].mean(0) - f[~y].mean(0)).clip(0) * (data.W_dec @ probes[i].weight)
            top = sorted(range(len(effect)), key=lambda j, e=effect: -e[j])[:n]
            x_ablated = data.ablated([j for j in top if effect[j] > 0])
            after = [
                probe_accuracy(p, x_ablated[rows], y)
                for p, (rows, y) in zip(probes, draws(test_labels, 3), strict=True)
            ]
            np.testing.assert_allclose(tpp.accuracies[n][i], after)
            others = [j for j in range(4) if j != i]
            scores.append(base[i] - after[i] - np.mean([base[j] - after[j] for j in others]))
        assert tpp.scores[n] == pytest.approx(np.mean(scores), abs=1e-12)
    # the case is one in which something happens
    assert max(tpp.scores.values()) > 0.05


# --- SCR

FIRST, SECOND = (np.repeat(values, 2 * MIN_CELL) for values in ([0, 0, 1, 1], [0, 1, 0, 1]))


def signed(values: ndarray) -> ndarray:
    """Two latents of a 0/1 attribute, one for either value."""
    return np.column_stack([values, 1 - values]).astype(float)


# residuals that are -1 or 1 in one direction per attribute, the second twice as long
ATTRIBUTES = np.column_stack([2.0 * FIRST - 1, 4.0 * SECOND - 2])
CODE = np.concatenate([signed(FIRST), signed(SECOND)], axis=1)
DECODER = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])


def test_scr_of_a_disentangled_code_is_one() -> None:
    rng = np.random.default_rng(0)
    # noise that makes the biased probe lean on the second attribute, of the larger margin
    x_train = ATTRIBUTES + 0.5 * rng.normal(size=(200, 2))
    scr = spurious_correlation_removal(
        *(x_train, CODE, FIRST, SECOND), *(ATTRIBUTES, CODE, FIRST, SECOND), DECODER, ns=(2, 4)
    )
    # wrong wherever the attributes differ, which is half of the balanced texts
    assert scr.first.base == 0.5
    assert scr.first.clean == 1
    assert scr.first.ablated == {2: 1.0, 4: 1.0}  # only two latents have any effect
    assert scr.first.denominator == 0.5
    assert scr.first.scores == scr.scores == {2: 1.0, 4: 1.0}
    # the biased probe already tells the second attribute: nothing to gain
    assert scr.second.base == scr.second.clean == 1
    assert scr.second.scores == {2: 0.0, 4: 0.0}
    assert scr.directions == (scr.first,)


def test_scr_is_zero_if_nothing_is_removed_and_negative_if_the_wrong_one_is() -> None:
    rng = np.random.default_rng(0)
    x_train = ATTRIBUTES + 0.5 * rng.normal(size=(200, 2))
    data = (x_train, CODE, FIRST, SECOND), (ATTRIBUTES, CODE, FIRST, SECOND)
    nothing = spurious_correlation_removal(*data[0], *data[1], 0 * DECODER, ns=(2,))
    assert nothing.first.ablated == {2: nothing.first.base}
    assert nothing.scores == {2: 0.0}
    # latents that fire for the second attribute in training and for the first in the test split,
    # where their removal turns the first attribute round: -8 of 1 is left, against 2 of the second
    misled = np.concatenate([signed(FIRST), signed(FIRST)], axis=1)
    wrong = np.array([[0.0, 0.0], [0.0, 0.0], [9.0, 0.5], [-9.0, -0.5]])
    scr = spurious_correlation_removal(
        *data[0], *(ATTRIBUTES, misled, FIRST, SECOND), wrong, ns=(2,)
    )
    assert scr.first.ablated == {2: 0.0}
    assert scr.scores == {2: (0 - 0.5) / 0.5}


def test_scr_reports_the_attribute_that_the_biased_probe_neglects() -> None:
    # as in SAEBench's get_scr_plotting_dict: direction 1 if accuracy on 1 < accuracy on 2
    weak = SCRDirection(base=0.6, clean=0.9, ablated={2: 0.75})
    strong = SCRDirection(base=0.8, clean=0.9, ablated={2: 0.85})
    assert SCR(weak, strong).directions == SCR(strong, weak).directions == (weak,)
    assert SCR(strong, weak).scores[2] == pytest.approx(0.15 / 0.3)
    other = SCRDirection(base=0.6, clean=0.9, ablated={2: 0.9})
    assert SCR(weak, other).directions == (weak, other)
    assert SCR(weak, other).scores[2] == pytest.approx((0.5 + 1) / 2)


@pytest.mark.parametrize(("clean", "score"), [(0.6, 0.0), (0.6005, 0.0), (0.5, 0.0), (0.62, 5.0)])
def test_scr_of_a_tiny_denominator_is_zero(clean: float, score: float) -> None:
    direction = SCRDirection(base=0.6, clean=clean, ablated={2: 0.7})
    assert direction.scores[2] == pytest.approx(score)


def test_scr_equals_a_plain_implementation_on_tokens() -> None:
    data = Tokens(n=400)
    # two attributes in the four classes of the tokens
    first, second = data.labels // 2, data.labels % 2
    first_test, second_test = data.test_labels // 2, data.test_labels % 2
    ns = (1, 5, 30)
    scr = spurious_correlation_removal(
        *(data.x, data.f, first, second),
        *(data.x_test, data.f_test, first_test, second_test),
        data.W_dec,
        ns,
    )
    # all cells are equally large: of the balanced training texts half of the coinciding cells is
    # drawn, in the order of the generator, and the test split is taken whole
    order = np.random.default_rng(0).permutation(400)
    cells = [order[data.labels[order] == c] for c in range(4)]
    q = 50
    balanced = np.concatenate([cell[:q] for cell in cells])
    biased = linear_probe(data.x[np.concatenate([cells[0], cells[3]])], np.repeat([0, 1], 2 * q))
    attributes = {"first": (first, first_test), "second": (second, second_test)}
    for scored, removed in (("first", "second"), ("second", "first")):
        y, y_test = attributes[scored]
        direction: SCRDirection = getattr(scr, scored)
        clean = linear_probe(data.x[balanced], y[balanced])
        assert direction.base == pytest.approx(probe_accuracy(biased, data.x_test, y_test))
        assert direction.clean == pytest.approx(probe_accuracy(clean, data.x_test, y_test))
        z = attributes[removed][0][balanced]
        f = data.f[balanced].astype(float)
        of_removed = linear_probe(data.x[balanced], z)
        effect = (f[z == 1].mean(0) - f[z == 0].mean(0)) * (data.W_dec @ of_removed.weight)
        for n in ns:
            top = sorted(range(len(effect)), key=lambda j, e=effect: -abs(e[j]))[:n]
            ablated = probe_accuracy(biased, data.ablated(top), y_test)
            assert direction.ablated[n] == pytest.approx(ablated)
    (direction,) = scr.directions
    assert direction.denominator > 0.05


def test_scr_says_which_combination_is_too_rare() -> None:
    keep = np.ones(200, bool)
    keep[2 * MIN_CELL : 4 * MIN_CELL - 3] = False  # three are left with (0, 1)
    few = ATTRIBUTES[keep], CODE[keep], FIRST[keep], SECOND[keep]
    all_ = ATTRIBUTES, CODE, FIRST, SECOND
    with pytest.raises(ValueError, match=r"training.* 50 of 50 with \(0, 0\), 3 of 25"):
        spurious_correlation_removal(*few, *all_, DECODER, ns=(2,))
    with pytest.raises(ValueError, match=r"test .*50 of 25 with \(0, 0\), 3 of 25 with"):
        spurious_correlation_removal(*all_, *few, DECODER, ns=(2,))
    # where the attributes coincide training takes twice as many
    keep = np.ones(200, bool)
    keep[0] = False
    few = ATTRIBUTES[keep], CODE[keep], FIRST[keep], SECOND[keep]
    with pytest.raises(ValueError, match=r"49 of 50 with \(0, 0\)"):
        spurious_correlation_removal(*few, *all_, DECODER, ns=(2,))
    spurious_correlation_removal(*all_, *few, DECODER, ns=(2,))


# --- sae-bench

# sae-bench 0.6.0 on `Case()`, printed by tests/evaluation/saebench.py: `get_top_k_mean_diff_mask`
# and `train_sklearn_probe` on standardised columns; `get_all_node_effects_for_one_sae`,
# `perform_feature_ablations`, `create_tpp_plotting_dict` and `get_scr_plotting_dict` on tokens,
# with probes that have our weights; all of them on our rows
SAEBENCH: dict[str, Any] = {
    "sparse probing, own rows, not standardised": {1: 0.78375, 2: 0.8125, 5: 0.85375, 20: 0.8925},
    "sparse probing, not standardised": {1: 0.77625, 2: 0.82125, 5: 0.85625, 20: 0.8975},
    "sparse probing": {1: 0.77625, 2: 0.82375, 5: 0.8575, 20: 0.895},
    "TPP base": [0.895, 0.915, 0.925, 0.855],
    "TPP accuracies": {
        2: [
            [0.735, 0.92, 0.885, 0.8],
            [0.915, 0.595, 0.9, 0.8],
            [0.87, 0.9, 0.675, 0.855],
            [0.88, 0.845, 0.915, 0.755],
        ],
        5: [
            [0.51, 0.85, 0.78, 0.67],
            [0.905, 0.5, 0.775, 0.825],
            [0.84, 0.85, 0.505, 0.855],
            [0.815, 0.83, 0.905, 0.575],
        ],
        10: [
            [0.5, 0.9, 0.805, 0.545],
            [0.875, 0.5, 0.75, 0.81],
            [0.685, 0.62, 0.5, 0.695],
            [0.62, 0.795, 0.895, 0.51],
        ],
        20: [
            [0.5, 0.74, 0.66, 0.535],
            [0.765, 0.5, 0.6, 0.755],
            [0.615, 0.57, 0.5, 0.66],
            [0.555, 0.7, 0.885, 0.5],
        ],
    },
    "TPP": {2: 0.18375, 5: 0.3025, 10: 0.247083, 20: 0.17},
    "SCR base 1": 0.535,
    "SCR clean 1": 0.845,
    "SCR base 2": 0.945,
    "SCR clean 2": 0.985,
    "SCR 1": {2: 0.467742, 5: 0.258064, 10: 0.274193, 20: 0.08871},
    "SCR 2": {2: -0.125, 5: -0.125, 10: -1.0, 20: -1.687499},
    "SCR": {2: 0.467742, 5: 0.258064, 10: 0.274193, 20: 0.08871},
}


def test_sparse_probing_equals_sae_bench() -> None:
    case = Case()
    accuracies = sparse_probing(case.f, case.labels, case.f_test, case.labels_test, KS)
    assert accuracies == pytest.approx(SAEBENCH["sparse probing"], abs=1e-6)
    # without standardising, as sae-bench has it, less than the standard error of the accuracy
    # over 800 test rows lies between
    standard_error = 0.5 / 800**0.5
    for name in ("sparse probing, not standardised", "sparse probing, own rows, not standardised"):
        assert accuracies == pytest.approx(SAEBENCH[name], abs=standard_error)


def test_tpp_equals_sae_bench() -> None:
    case = Case()
    tpp = targeted_probe_perturbation(
        *(case.x, case.f, case.labels),
        *(case.x_test, case.f_test, case.labels_test),
        case.W_dec,
        NS,
    )
    np.testing.assert_allclose(tpp.base_accuracies, SAEBENCH["TPP base"], atol=1e-6)
    for n in NS:
        np.testing.assert_allclose(tpp.accuracies[n], SAEBENCH["TPP accuracies"][n], atol=1e-6)
    assert tpp.scores == pytest.approx(SAEBENCH["TPP"], abs=1e-6)


def test_scr_equals_sae_bench() -> None:
    case = Case()
    scr = spurious_correlation_removal(
        *(case.x, case.f, case.labels // 2, case.labels % 2),
        *(case.x_test, case.f_test, case.labels_test // 2, case.labels_test % 2),
        case.W_dec,
        NS,
    )
    for name, direction in (("1", scr.first), ("2", scr.second)):
        assert direction.base == pytest.approx(SAEBENCH[f"SCR base {name}"], abs=1e-6)
        assert direction.clean == pytest.approx(SAEBENCH[f"SCR clean {name}"], abs=1e-6)
        # rounding of accuracies is divided by the denominator, 0.04 at least
        assert direction.scores == pytest.approx(SAEBENCH[f"SCR {name}"], abs=1e-4)
    assert scr.scores == pytest.approx(SAEBENCH["SCR"], abs=1e-4)


# --- what cannot be answered


def test_labels_have_to_fit() -> None:
    with pytest.raises(ValueError, match=r"training labels \[0, 1, 2, 3\] and test labels \[0, 1"):
        sparse_probing(ONE_HOT, LABELS, ONE_HOT[:120], LABELS[:120], ks=(1,))
    with pytest.raises(ValueError, match=r"labels of one class, \[0\]"):
        full_probe_accuracy(ONE_HOT[:60], LABELS[:60], ONE_HOT[:60], LABELS[:60])
    with pytest.raises(ValueError, match=r"\[0, 1, 2, 3\]"):
        linear_probe(ONE_HOT, LABELS)
    with pytest.raises(ValueError, match="one class"):
        linear_probe(ONE_HOT, 0 * LABELS)
    with pytest.raises(ValueError, match="rows.*240.* 3"):
        _check_lengths(x=ONE_HOT, labels=LABELS[:3])


@pytest.mark.parametrize("ks", [(), (0, 1), (5,)])
def test_numbers_of_columns_have_to_fit(ks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="columns, 4"):
        sparse_probing(ONE_HOT, LABELS, ONE_HOT, LABELS, ks=ks)
    with pytest.raises(ValueError, match="columns, 4"):
        tpp_of(ONE_HOT, ONE_HOT, LABELS, np.eye(4), ns=ks)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    broken = ONE_HOT.copy()
    broken[5, 2] = bad
    with pytest.raises(ValueError, match="training.*NaN"):
        sparse_probing(broken, LABELS, ONE_HOT, LABELS, ks=(1,))
    with pytest.raises(ValueError, match="test.*NaN"):
        sparse_probing(ONE_HOT, LABELS, broken, LABELS, ks=(4,))
    with pytest.raises(ValueError, match="NaN"):
        full_probe_accuracy(broken, LABELS, ONE_HOT, LABELS)
    with pytest.raises(ValueError, match="training.*NaN"):
        targeted_probe_perturbation(
            *(ONE_HOT, broken, LABELS), *(ONE_HOT, ONE_HOT, LABELS), np.eye(4), ns=(1,)
        )


# --- helpers


def tpp_of(x: ndarray, f: ndarray, labels: ndarray, W_dec: ndarray, ns: tuple[int, ...]) -> TPP:
    """TPP where the test split is the training split."""
    return targeted_probe_perturbation(x, f, labels, x, f, labels, W_dec, ns)


def draws(labels: ndarray, seed: int) -> list[tuple[ndarray, ndarray]]:
    return [balanced_rows(labels, int(c), seed) for c in np.unique(labels)]


class Tokens:
    """Four classes of texts of 5 tokens, and an SAE that sees tokens; the metrics see averages."""

    def __init__(self, n: int = 240, d: int = 16, d_sae: int = 48, dtype: Any = np.float64) -> None:
        rng = np.random.default_rng(7)
        self.labels = np.repeat(np.arange(4), n // 4)
        self.test_labels = rng.permutation(self.labels)
        topics = rng.normal(size=(4, d))
        self.W_enc = rng.normal(size=(d, d_sae)) / d**0.5
        W_dec = self.W_enc.T + 0.1 * rng.normal(size=(d_sae, d))
        self.W_dec = (W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)).astype(dtype)
        self.b_dec = rng.normal(size=d)
        mean = np.linspace(-3, 30, d)
        tokens = topics[self.labels][:, None] + 2 * rng.normal(size=(n, 5, d)) + mean
        self.tokens = topics[self.test_labels][:, None] + 2 * rng.normal(size=(n, 5, d)) + mean
        self.mean = mean
        self.x, self.f = tokens.mean(1).astype(dtype), self.encode(tokens).mean(1).astype(dtype)
        self.x_test = self.tokens.mean(1).astype(dtype)
        self.f_test = self.encode(self.tokens).mean(1).astype(dtype)

    def encode(self, tokens: ndarray) -> ndarray:
        return np.maximum((tokens - self.mean) @ self.W_enc - 0.5, 0)

    def ablated(self, latents: list[int]) -> ndarray:
        """Average over tokens of x + decode(f without latents) - decode(f)."""
        f = self.encode(self.tokens)
        without = f.copy()
        without[..., latents] = 0
        decoded, decoded_without = (g @ self.W_dec + self.b_dec for g in (f, without))
        return (self.tokens + decoded_without - decoded).mean(1)
