"""Sparse probing, TPP and SCR of SAEBench (Karvonen et al. 2025), as functions of arrays.

Inputs have one row per text: `x`, shape (n, d), are residuals averaged over the tokens of the text,
and `f`, shape (n, d_sae), latents averaged over the same tokens. These averages suffice because the
decoder is affine. Zeroing the latents S in every token, with the reconstruction error kept,
subtracts `f[:, S] @ W_dec[S]` from the averaged residuals.

Probes are logistic regressions on standardised columns. Drawn rows depend on labels and seed only,
so all SAEs are evaluated on the same rows of the same texts. Sums are float64.

Differences from SAEBench 0.6: its probes for TPP, SCR and all columns are trained by AdamW for some
epochs, and the best epoch on the test split is used. Its columns are not standardised, so units
matter. If fewer than N latents have a positive effect, its TPP removes latents without effect too;
here only latents with a positive effect are removed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Integer
from numpy import ndarray

__all__ = [
    "K_VALUES",
    "MIN_CELL",
    "N_VALUES",
    "SCR",
    "TPP",
    "LinearProbe",
    "SCRDirection",
    "balanced_rows",
    "full_probe_accuracy",
    "linear_probe",
    "probe_accuracy",
    "sparse_probing",
    "spurious_correlation_removal",
    "targeted_probe_perturbation",
]

K_VALUES = (1, 2, 5, 20)
"""Columns of sparse probing."""

N_VALUES = (2, 5, 10, 20, 50, 100)
"""Latents removed by TPP and SCR."""

MIN_CELL = 25
"""Fewest texts per combination of two attributes: the standard error of accuracies is then 0.05."""

_MIN_DENOMINATOR = 0.001  # SAEBench's

# rows and targets of a balanced problem; sizes differ between problems
_Draw: TypeAlias = tuple[Integer[ndarray, "_"], Bool[ndarray, "_"]]


# --- probes


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of two classes: 1 where `x @ weight + bias > 0`, else 0.

    Attributes:
        weight: Shape (d,), float64, in the space of the data, not of the standardised columns.
        bias: The logit at the origin.
    """

    weight: Float[ndarray, "d"]
    bias: float

    def logits(self, x: Float[ndarray, "n d"]) -> Float[ndarray, "n"]:
        """Logit of class 1 in each row, float64."""
        return np.asarray(x, np.float64) @ self.weight + self.bias


def linear_probe(
    x_train: Float[ndarray, "n d"], y_train: Integer[ndarray, "n"] | Bool[ndarray, "n"]
) -> LinearProbe:
    """Logistic regression on standardised columns, with scikit-learn's default penalty C = 1.

    SAEBench does not standardise. The penalty then weighs more for smaller activations, so
    comparisons of SAEs whose latents differ in scale depend on units. On the latents of
    `tests/saebench.py`, divided by 1000, SAEBench's accuracy at K = 20 falls from 0.90 to 0.81;
    with standardised columns it stays the same. The optimum is unique, so there is no seed.

    Args:
        x_train: Shape (n, d), any floating dtype; computed in float64.
        y_train: Shape (n,), 0 or 1.

    Raises:
        ValueError: `y_train` has values other than 0 and 1, or only one of these, or `x_train` has
            a NaN or an infinity.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    y = _targets(y_train)
    x = np.asarray(x_train, np.float64)
    if not np.isfinite(x).all():
        raise ValueError("the rows that a probe is to be fitted to hold a NaN or an infinity")
    scaler = StandardScaler()
    columns = scaler.fit_transform(x)
    # the default of 100 iterations is not always enough for hundreds of columns
    model = LogisticRegression(max_iter=1000).fit(columns, y)
    weight = model.coef_[0] / scaler.scale_
    return LinearProbe(weight, float(model.intercept_[0] - weight @ scaler.mean_))


def probe_accuracy(
    probe: LinearProbe,
    x: Float[ndarray, "n d"],
    y: Integer[ndarray, "n"] | Bool[ndarray, "n"],
) -> float:
    """Share of rows that the probe classifies correctly, in [0, 1].

    Args:
        probe: From `linear_probe`.
        x: Shape (n, d).
        y: Shape (n,), 0 or 1.

    Raises:
        ValueError: `y` has values other than 0 and 1, or `x` has a NaN or an infinity.
    """
    return _accuracy(probe.logits(x), _targets(y))


# --- sparse probing


def sparse_probing(
    train: Float[ndarray, "n d"],
    train_labels: Integer[ndarray, "n"],
    test: Float[ndarray, "n_test d"],
    test_labels: Integer[ndarray, "n_test"],
    ks: Sequence[int] = K_VALUES,
    seed: int = 0,
) -> dict[int, float]:
    """Accuracy of probes that separate a class from the rest by the class's K best columns.

    For every class, a balanced problem is drawn (`balanced_rows`). The K columns with the largest
    |mean over the class - mean over the rest| in the training split are chosen, and a probe is
    fitted to them. Gurnee et al. (2023); SAEBench section 4.

    Args:
        train: Shape (n, d): latents, or residual channels as a baseline. Latents have to be those
            of unit-norm decoder rows, because the choice of columns compares their sizes.
        train_labels: Shape (n,), any integers.
        test: Shape (n_test, d), the columns of `train` for other texts.
        test_labels: Shape (n_test,).
        ks: Numbers of columns K.
        seed: Seed for drawing rows.

    Returns:
        For every K, the accuracy on the test split, in [0, 1], averaged over classes. 0.5 is
        chance.

    Raises:
        ValueError: The labels have fewer than two classes or differ between the splits, K exceeds
            the number of columns, or a value is not finite.
    """
    _check_lengths(train=train, train_labels=train_labels)
    _check_lengths(test=test, test_labels=test_labels)
    _check_counts("k", ks, train.shape[1])
    classes = _classes(train_labels, test_labels)
    train_draws = _draws(train_labels, classes, seed)
    test_draws = _draws(test_labels, classes, seed)
    differences = np.abs(_mean_differences(train, train_draws))
    accuracies: dict[int, list[float]] = {k: [] for k in ks}
    for difference, (rows, y), (test_rows, test_y) in zip(
        differences, train_draws, test_draws, strict=True
    ):
        columns = _largest(difference, max(ks))
        chosen, chosen_test = train[np.ix_(rows, columns)], test[np.ix_(test_rows, columns)]
        for k in ks:
            probe = linear_probe(chosen[:, :k], y)
            accuracies[k].append(probe_accuracy(probe, chosen_test[:, :k], test_y))
    return {k: float(np.mean(values)) for k, values in accuracies.items()}


def full_probe_accuracy(
    train: Float[ndarray, "n d"],
    train_labels: Integer[ndarray, "n"],
    test: Float[ndarray, "n_test d"],
    test_labels: Integer[ndarray, "n_test"],
    seed: int = 0,
) -> float:
    """The accuracy of `sparse_probing` with all columns, a reference for its values.

    Arguments and errors are those of `sparse_probing`.
    """
    _check_lengths(train=train, train_labels=train_labels)
    _check_lengths(test=test, test_labels=test_labels)
    classes = _classes(train_labels, test_labels)
    accuracies = [
        probe_accuracy(linear_probe(train[rows], y), test[test_rows], test_y)
        for (rows, y), (test_rows, test_y) in zip(
            _draws(train_labels, classes, seed), _draws(test_labels, classes, seed), strict=True
        )
    ]
    return float(np.mean(accuracies))


# --- targeted probe perturbation


@dataclass(frozen=True, eq=False)
class TPP:
    """Result of `targeted_probe_perturbation`; C classes in ascending order of their labels.

    Attributes:
        classes: Labels of the classes, shape (C,).
        base_accuracies: Accuracy of each class's probe on unchanged residuals, shape (C,).
        accuracies: For every N a matrix, shape (C, C). Row i has the accuracies of all probes after
            removing the N latents of class i.
        scores: For every N, the mean over i of (drop of probe i) - (mean drop of the others). 0.5
            means that every class depends on its own latents: only its own probe falls to chance.
    """

    classes: Integer[ndarray, "c"]
    base_accuracies: Float[ndarray, "c"]
    accuracies: dict[int, Float[ndarray, "c c"]]

    @property
    def scores(self) -> dict[int, float]:
        n_others = len(self.classes) - 1
        scores = {}
        for n, accuracies in self.accuracies.items():
            drops = self.base_accuracies - accuracies
            intended = np.diagonal(drops)
            unintended = (drops.sum(1) - intended) / n_others
            scores[n] = float(np.mean(intended - unintended))
        return scores


def targeted_probe_perturbation(
    x_train: Float[ndarray, "n d"],
    f_train: Float[ndarray, "n d_sae"],
    labels_train: Integer[ndarray, "n"],
    x_test: Float[ndarray, "n_test d"],
    f_test: Float[ndarray, "n_test d_sae"],
    labels_test: Integer[ndarray, "n_test"],
    W_dec: Float[ndarray, "d_sae d"],
    ns: Sequence[int] = N_VALUES,
    seed: int = 0,
) -> TPP:
    """TPP: whether removing the latents of one class affects the probe of that class only.

    For every class, a probe w_c is fitted to balanced residuals. On the training split, the effect
    of latent j on class c is `max(0, mean of f_j over c - mean of f_j over the rest) *
    (w_c . W_dec[j])`. In the test split, the N latents with the largest effects are zeroed (fewer
    if fewer are positive), and the reconstruction error is kept. SAEBench section 4 and appendix D.

    Args:
        x_train: Residuals, shape (n, d), averaged over tokens.
        f_train: Latents, shape (n, d_sae), averaged over the same tokens.
        labels_train: Shape (n,), any integers.
        x_test: Shape (n_test, d).
        f_test: Shape (n_test, d_sae).
        labels_test: Shape (n_test,).
        W_dec: Decoder, shape (d_sae, d), in the space of the residuals. Not valid for SAEs that
            scale every activation by its own norm, because their decoding is not affine.
        ns: Numbers of latents N.
        seed: Seed for drawing rows.

    Raises:
        ValueError: The labels have fewer than two classes or differ between the splits, N exceeds
            d_sae, or a value is not finite.
    """
    _check_lengths(x_train=x_train, f_train=f_train, labels_train=labels_train)
    _check_lengths(x_test=x_test, f_test=f_test, labels_test=labels_test)
    _check_counts("n", ns, len(W_dec))
    classes = _classes(labels_train, labels_test)
    draws = _draws(labels_train, classes, seed)
    test_draws = _draws(labels_test, classes, seed)
    probes = [linear_probe(x_train[rows], y) for rows, y in draws]
    logits = np.stack([probe.logits(x_test) for probe in probes], axis=1)
    directions = _decoder_logits(W_dec, probes)
    effects = _mean_differences(f_train, draws).clip(min=0) * directions.T

    def accuracies(logits: Float[ndarray, "n c"]) -> list[float]:
        return [_accuracy(logits[rows, c], y) for c, (rows, y) in enumerate(test_draws)]

    ablated = {n: np.empty((len(classes), len(classes))) for n in ns}
    for c, effect in enumerate(effects):
        latents = _effective(effect, max(ns))
        acts = np.asarray(f_test[:, latents], np.float64)
        for n in ns:
            removed = acts[:, :n] @ directions[latents[:n]]
            ablated[n][c] = accuracies(logits - removed)
    return TPP(classes, np.array(accuracies(logits)), ablated)


# --- spurious correlation removal


@dataclass(frozen=True, eq=False)
class SCRDirection:
    """The score of one attribute after removing the latents of the other.

    Attributes:
        base: Accuracy of the biased probe on balanced data. It was trained on texts in which both
            attributes coincide.
        clean: Accuracy of a probe that was trained on balanced data.
        ablated: For every N, the accuracy of the biased probe with N latents of the other attribute
            removed.
    """

    base: float
    clean: float
    ablated: dict[int, float]

    @property
    def denominator(self) -> float:
        """`clean - base`, the accuracy to gain. Small values make the score noisy."""
        return self.clean - self.base

    @property
    def scores(self) -> dict[int, float]:
        """For every N, `(ablated - base) / denominator`; 0 if the denominator is below 0.001."""
        if self.denominator < _MIN_DENOMINATOR:
            return dict.fromkeys(self.ablated, 0.0)
        return {n: (a - self.base) / self.denominator for n, a in self.ablated.items()}


@dataclass(frozen=True, eq=False)
class SCR:
    """Result of `spurious_correlation_removal`.

    Attributes:
        first: Scores of the first attribute, with latents of the second removed.
        second: Scores of the second attribute, with latents of the first removed.
    """

    first: SCRDirection
    second: SCRDirection

    @property
    def directions(self) -> tuple[SCRDirection, ...]:
        """The direction that SAEBench reports: the attribute with the lower biased accuracy.

        It depends on the residuals only, so it is the same for all SAEs. In a tie, both.
        """
        if self.first.base == self.second.base:
            return self.first, self.second
        return (min(self.first, self.second, key=lambda direction: direction.base),)

    @property
    def base(self) -> float:
        """Mean of `directions`."""
        return float(np.mean([direction.base for direction in self.directions]))

    @property
    def clean(self) -> float:
        """Mean of `directions`."""
        return float(np.mean([direction.clean for direction in self.directions]))

    @property
    def denominator(self) -> float:
        """Mean of `directions`."""
        return float(np.mean([direction.denominator for direction in self.directions]))

    @property
    def scores(self) -> dict[int, float]:
        """For every N, the mean of `directions`."""
        scores = [direction.scores for direction in self.directions]
        return {n: float(np.mean([score[n] for score in scores])) for n in scores[0]}


def spurious_correlation_removal(
    x_train: Float[ndarray, "n d"],
    f_train: Float[ndarray, "n d_sae"],
    first_train: Integer[ndarray, "n"] | Bool[ndarray, "n"],
    second_train: Integer[ndarray, "n"] | Bool[ndarray, "n"],
    x_test: Float[ndarray, "n_test d"],
    f_test: Float[ndarray, "n_test d_sae"],
    first_test: Integer[ndarray, "n_test"] | Bool[ndarray, "n_test"],
    second_test: Integer[ndarray, "n_test"] | Bool[ndarray, "n_test"],
    W_dec: Float[ndarray, "d_sae d"],
    ns: Sequence[int] = N_VALUES,
    seed: int = 0,
) -> SCR:
    """SCR: whether removing the latents of one attribute makes a biased probe ignore it.

    q texts are drawn from each combination of the two attributes. On these balanced 4 q texts, one
    probe per attribute is fitted. A biased probe is fitted to 2 q texts with both attributes and
    2 q with neither. Effects of latents on the probe of one attribute are those of
    `targeted_probe_perturbation` on the balanced texts, without the `max`. The N latents with the
    largest |effect| are zeroed in balanced test texts, and the biased probe is scored on the other
    attribute. Shift (Marks et al. 2024); SAEBench section 4 and appendix D.

    Args:
        x_train: Residuals, shape (n, d), averaged over tokens.
        f_train: Latents, shape (n, d_sae), averaged over the same tokens.
        first_train: One attribute, shape (n,), 0 or 1.
        second_train: The other, shape (n,), 0 or 1.
        x_test: Shape (n_test, d).
        f_test: Shape (n_test, d_sae).
        first_test: Shape (n_test,), 0 or 1.
        second_test: Shape (n_test,), 0 or 1.
        W_dec: Decoder, shape (d_sae, d), in the space of the residuals.
        ns: Numbers of latents N.
        seed: Seed for drawing texts.

    Raises:
        ValueError: A combination of the attributes has too few texts (fewer than `MIN_CELL` in a
            split, or twice that in the training split if both attributes coincide), an attribute
            has values other than 0 and 1, N exceeds d_sae, or a value is not finite.
    """
    _check_lengths(x_train=x_train, f_train=f_train, first=first_train, second=second_train)
    _check_lengths(x_test=x_test, f_test=f_test, first=first_test, second=second_test)
    _check_counts("n", ns, len(W_dec))
    attributes = _targets(first_train), _targets(second_train)
    test_attributes = _targets(first_test), _targets(second_test)
    # the biased probe draws its 4 q texts from two combinations, the others from four
    cells = _cells(*attributes, {(0, 0): 2, (0, 1): 1, (1, 0): 1, (1, 1): 2}, seed, "training")
    test_cells = _cells(
        *test_attributes, dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], 1), seed, "test"
    )
    n_balanced = len(cells[0, 1])
    biased_rows = np.concatenate([cells[0, 0], cells[1, 1]])
    rows = np.concatenate([cell[:n_balanced] for cell in cells.values()])
    test_rows = np.concatenate(list(test_cells.values()))

    biased = linear_probe(x_train[biased_rows], attributes[0][biased_rows])
    draws = [(rows, attribute[rows]) for attribute in attributes]
    probes = [linear_probe(x_train[rows], y) for rows, y in draws]
    directions = _decoder_logits(W_dec, [*probes, biased])
    effects = np.abs(_mean_differences(f_train, draws) * directions[:, :2].T)
    x_test = x_test[test_rows]
    logits = biased.logits(x_test)

    def direction(scored: int, removed: int) -> SCRDirection:
        y = test_attributes[scored][test_rows]
        latents = _effective(effects[removed], max(ns))
        acts = f_test[np.ix_(test_rows, latents)] * directions[latents, 2]
        return SCRDirection(
            base=_accuracy(logits, y),
            clean=probe_accuracy(probes[scored], x_test, y),
            ablated={n: _accuracy(logits - acts[:, :n].sum(1), y) for n in ns},
        )

    return SCR(first=direction(0, 1), second=direction(1, 0))


# --- rows


def balanced_rows(
    labels: Integer[ndarray, "n"], positive: int, seed: int = 0
) -> tuple[Integer[ndarray, "m"], Bool[ndarray, "m"]]:
    """Draw equally many rows of one class and of all others together.

    The others contribute equal shares. If one of them has too few rows for its share, the rest
    contribute more. If all others together have fewer rows than the class, rows of the class are
    left out.

    Args:
        labels: Shape (n,).
        positive: The class.
        seed: Seed for drawing.

    Returns:
        Indices of the rows, and whether each row belongs to the class.
    """
    rng = np.random.default_rng([seed, positive & 0xFFFFFFFF])
    order = rng.permutation(len(labels))
    rows = order[labels[order] == positive]
    others = order[labels[order] != positive]
    # order: the first rows of all classes, then the second rows, and so on
    rank = np.empty(len(others), np.int64)
    for label in np.unique(labels[others]):
        of_class = labels[others] == label
        rank[of_class] = np.arange(of_class.sum())
    others = others[np.argsort(rank, kind="stable")]
    m = min(len(rows), len(others))
    return np.concatenate([rows[:m], others[:m]]), np.repeat([True, False], m)


def _draws(labels: ndarray, classes: ndarray, seed: int) -> list[_Draw]:
    return [balanced_rows(labels, int(c), seed) for c in classes]


def _classes(train_labels: ndarray, test_labels: ndarray) -> ndarray:
    classes, test_classes = np.unique(train_labels), np.unique(test_labels)
    if not np.array_equal(classes, test_classes):
        raise ValueError(
            f"training labels {classes.tolist()} and test labels {test_classes.tolist()}: every "
            "class has to be in both splits"
        )
    if len(classes) < 2:
        raise ValueError(f"labels of one class, {classes.tolist()}: probing needs at least two")
    return classes


def _cells(
    first: ndarray,
    second: ndarray,
    multiples: dict[tuple[int, int], int],
    seed: int,
    split: str,
) -> dict[tuple[int, int], ndarray]:
    """`multiples` times q rows of each combination, with the largest possible q."""
    order = np.random.default_rng(seed).permutation(len(first))
    cells = {
        (a, b): order[(first[order] == a) & (second[order] == b)] for a, b in sorted(multiples)
    }
    if any(len(rows) < multiples[cell] * MIN_CELL for cell, rows in cells.items()):
        table = ", ".join(
            f"{len(rows)} of {multiples[cell] * MIN_CELL} with {cell}"
            for cell, rows in cells.items()
        )
        raise ValueError(
            f"too few {split} texts with some combination of the two attributes: there are "
            f"{table}; use more texts, or attributes that occur separately more often"
        )
    q = min(len(rows) // multiples[cell] for cell, rows in cells.items())
    return {cell: rows[: q * multiples[cell]] for cell, rows in cells.items()}


# --- arithmetic


def _accuracy(logits: Float[ndarray, "n"], y: Bool[ndarray, "n"]) -> float:
    if not np.isfinite(logits).all():
        raise ValueError("the activations or latents of the test split hold a NaN or an infinity")
    return float(np.mean((logits > 0) == y))


def _mean_differences(
    f: Float[ndarray, "n d"], draws: Sequence[_Draw]
) -> Float[ndarray, "n_draws d"]:
    """Per draw and column: mean over the positive rows minus mean over the negative rows."""
    # weights of 0 and 1, so that equal means of few distinct values differ by exactly 0
    members = np.zeros((2, len(draws), len(f)))
    for i, (rows, y) in enumerate(draws):
        members[0, i, rows[y]] = members[1, i, rows[~y]] = 1
    counts = members.sum(2)[..., None]
    differences = np.empty((len(draws), f.shape[1]))
    with np.errstate(invalid="ignore"):  # reported below
        for block in _blocks(f.shape[1], len(f)):
            positive, negative = members @ np.asarray(f[:, block], np.float64) / counts
            differences[:, block] = positive - negative
    if not np.isfinite(differences).all():
        raise ValueError("the latents of the training split hold a NaN or an infinity")
    return differences


def _decoder_logits(
    W_dec: Float[ndarray, "d_sae d"], probes: Sequence[LinearProbe]
) -> Float[ndarray, "d_sae n_probes"]:
    """The change in each probe's logit per unit of each latent."""
    weights = np.stack([probe.weight for probe in probes], axis=1)
    blocks = _blocks(len(W_dec), W_dec.shape[1])
    return np.concatenate([np.asarray(W_dec[block], np.float64) @ weights for block in blocks])


def _blocks(n: int, width: int) -> Iterator[slice]:
    """Slices of 0...n such that a float64 block of this width takes about 64 MB."""
    step = max(1, 2**23 // max(width, 1))
    return (slice(start, start + step) for start in range(0, n, step))


def _largest(values: Float[ndarray, "n"], n: int) -> Integer[ndarray, "m"]:
    """Indices of the n largest values, largest first, ties in order of their indices."""
    return np.argsort(-values, kind="stable")[:n]


def _effective(effects: Float[ndarray, "d_sae"], n: int) -> Integer[ndarray, "m"]:
    """Indices of the n largest effects, of which only positive ones are kept."""
    latents = _largest(effects, n)
    return latents[effects[latents] > 0]


# --- checks


def _targets(y: ndarray) -> Bool[ndarray, "n"]:
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"a probe needs labels 0 and 1, not {np.unique(y)[:5].tolist()}")
    return y.astype(bool)


def _check_lengths(**arrays: ndarray) -> None:
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(array)}" for name, array in arrays.items())
        raise ValueError(f"numbers of rows differ: {lengths}")


def _check_counts(name: str, counts: Sequence[int], width: int) -> None:
    if not counts or min(counts) < 1 or max(counts) > width:
        raise ValueError(
            f"{name}s={list(counts)}: each has to be at least 1 and at most the number of columns, "
            f"{width}"
        )
