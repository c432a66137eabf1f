"""Figures of sae-bench on the arrays that `test_probing.py` compares with.

Where sae-bench is installed (it needs numpy < 2, therefore an environment of its own):

    python tests/evaluation/saebench.py

prints what `SAEBENCH` there holds, and, marked "own", what sae-bench says if it also draws its own
rows and trains its own probes.
"""

import contextlib
import io
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy import ndarray

N_CLASSES, N_TOKENS, D, D_SAE = 4, 3, 12, 160
KS = (1, 2, 5, 20)
NS = (2, 5, 10, 20)


class Case:
    """Texts of four classes, which are also the combinations of two attributes, and a ReLU SAE.

    Attributes:
        tokens, tokens_test: Residuals, shape (n, N_TOKENS, D), float32, class after class.
        labels, labels_test: Classes in ascending order, shape (n,).
        W_dec: Shape (D_SAE, D), rows of unit norm.
        x, f, x_test, f_test: Averages of residuals and latents over tokens.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(20250)
        # one direction per attribute, the second of twice the size, and one per class
        first, second, *topics = rng.normal(size=(2 + N_CLASSES, D)) / D**0.5
        corners = [(2 * (c // 2) - 1, 2 * (c % 2) - 1) for c in range(N_CLASSES)]
        means = np.array([a * first + 2 * b * second for a, b in corners]) + np.array(topics)
        directions = rng.normal(size=(D_SAE, D))
        directions[:4] = [first, -first, second, -second]
        self.W_dec = _float32(directions / np.linalg.norm(directions, axis=1, keepdims=True))
        self.labels = np.repeat(np.arange(N_CLASSES), 200)
        self.labels_test = np.repeat(np.arange(N_CLASSES), 100)
        offset = np.linspace(-2, 5, D)
        self.tokens, self.tokens_test = (
            _float32(
                means[labels][:, None]
                + rng.normal(size=(len(labels), N_TOKENS, D))
                + 0.7 * rng.normal(size=(len(labels), 1, D))
                + offset
            )
            for labels in (self.labels, self.labels_test)
        )
        self.b_enc = _float32(-(offset @ self.W_dec.T) - 0.8)
        self.b_dec = _float32(offset)
        self.x, self.x_test = self.tokens.mean(1), self.tokens_test.mean(1)
        self.f, self.f_test = self.encode(self.tokens), self.encode(self.tokens_test)

    def encode(self, tokens: ndarray) -> ndarray:
        return np.maximum(tokens @ self.W_dec.T + self.b_enc, 0).mean(1)


def _float32(values: ndarray) -> ndarray:
    return values.astype(np.float32)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(float(value), 6)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    with contextlib.redirect_stdout(io.StringIO()):  # sae-bench prints all the way
        figures = _figures(Case())
    sys.stdout.write(f"sae-bench {version('sae-bench')}\n")
    for name, value in figures.items():
        # accuracies are float32
        sys.stdout.write(f"{name}: {json.dumps(_rounded(value))}\n")


def _figures(case: Case) -> dict[str, Any]:
    import jaxtyping

    # its check of train_sklearn_probe takes the sizes of the caller's arguments for that function's
    jaxtyping.config.update("jaxtyping_disable", True)
    import sae_bench.evals.scr_and_tpp.main as scr_and_tpp  # pyright: ignore[reportMissingImports]
    import sae_bench.evals.sparse_probing.probe_training as training  # pyright: ignore[reportMissingImports]
    import torch

    from sae_whiten.evaluation.probing import _cells, balanced_rows, linear_probe

    own_draws = training.prepare_probe_data
    W_dec, b_enc, b_dec = (torch.from_numpy(a) for a in (case.W_dec, case.b_enc, case.b_dec))
    sae: Any = SimpleNamespace(
        W_dec=W_dec,
        encode=lambda x: torch.relu(x @ W_dec.T + b_enc),
        decode=lambda f: f @ W_dec + b_dec,
    )

    def by_class(values: ndarray, labels: ndarray) -> dict[str, Any]:
        return {str(c): torch.from_numpy(values[labels == c]) for c in np.unique(labels)}

    def our_rows(activations: dict[str, Any], name: str, perform_scr: bool = False) -> Any:
        if perform_scr:
            return own_draws(activations, name, perform_scr)
        labels = np.repeat([int(c) for c in activations], [len(a) for a in activations.values()])
        rows, y = balanced_rows(labels, int(name))
        return torch.cat(list(activations.values()))[rows], torch.from_numpy(y.astype(np.int32))

    def as_torch(x: ndarray, y: ndarray) -> Any:
        # a Probe of sae-bench with our weights
        ours = linear_probe(x, y)
        probe = training.Probe(D, torch.float32)
        with torch.no_grad():
            probe.net.weight[:] = torch.from_numpy(ours.weight)
            probe.net.bias[:] = ours.bias
        return probe

    def ablate(probes: Any, train: Any, test: Any, names: list[str], scr: bool) -> Any:
        torch.set_grad_enabled(False)
        means = {name: tokens.mean(1) for name, tokens in test.items()}
        base = scr_and_tpp.get_probe_test_accuracy(probes, names, means, 500, scr)
        effects = scr_and_tpp.get_all_node_effects_for_one_sae(sae, probes, names, scr, train, 125)
        ablated = scr_and_tpp.perform_feature_ablations(
            probes, sae, 125, test, effects, list(NS), names, 500, scr
        )
        torch.set_grad_enabled(True)
        return base, ablated

    def own_probes(train: Any, test: Any, scr: bool) -> Any:
        # the settings of ScrAndTppEvalConfig
        probes, _ = training.train_probe_on_activations(
            {name: tokens.mean(1) for name, tokens in train.items()},
            {name: tokens.mean(1) for name, tokens in test.items()},
            use_sklearn=False,
            batch_size=16,
            epochs=20,
            lr=1e-3,
            perform_scr=scr,
            early_stopping_patience=20,
            l1_penalty=1e-3,
        )
        return probes

    figures: dict[str, Any] = {}
    train, test = by_class(case.f, case.labels), by_class(case.f_test, case.labels_test)

    # --- sparse probing
    def probing() -> dict[int, float]:
        return {
            k: float(np.mean(list(training.train_probe_on_activations(train, test, k)[1].values())))
            for k in KS
        }

    torch.manual_seed(0)
    figures["sparse probing, own rows, not standardised"] = probing()
    training.prepare_probe_data = our_rows
    figures["sparse probing, not standardised"] = probing()
    accuracies: dict[int, list[float]] = {k: [] for k in KS}
    for name in train:
        (acts, y), (acts_test, y_test) = our_rows(train, name), our_rows(test, name)
        mean, std = acts.double().mean(0), acts.double().std(0, correction=0)
        for k in KS:
            mask = training.get_top_k_mean_diff_mask(acts, y, k)
            columns, columns_test = (
                training.apply_topk_mask_reduce_dim(((a - mean) / std).float(), mask)
                for a in (acts, acts_test)
            )
            _, accuracy = training.train_sklearn_probe(columns, y, columns_test, y_test)
            accuracies[k].append(float(accuracy))
    figures["sparse probing"] = {k: np.mean(a) for k, a in accuracies.items()}

    # --- TPP
    names = [str(c) for c in range(N_CLASSES)]
    tokens = by_class(case.tokens, case.labels)
    tokens_test = by_class(case.tokens_test, case.labels_test)
    draws = {c: balanced_rows(case.labels, int(c)) for c in names}
    probes = {c: as_torch(case.x[rows], y) for c, (rows, y) in draws.items()}
    base, ablated = ablate(probes, tokens, tokens_test, names, scr=False)
    overall, _ = scr_and_tpp.create_tpp_plotting_dict(ablated, base)
    figures["TPP base"] = [base[c] for c in names]
    figures["TPP accuracies"] = {n: [[ablated[i][n][j] for j in names] for i in names] for n in NS}
    figures["TPP"] = {n: overall[f"tpp_threshold_{n}_total_metric"] for n in NS}

    training.prepare_probe_data = own_draws
    scores = []
    for seed in range(5):
        torch.manual_seed(seed)
        probes = own_probes(tokens, tokens_test, scr=False)
        base, ablated = ablate(probes, tokens, tokens_test, names, scr=False)
        overall, _ = scr_and_tpp.create_tpp_plotting_dict(ablated, base)
        scores.append([overall[f"tpp_threshold_{n}_total_metric"] for n in NS])
    figures["TPP, own rows and probes, mean"] = dict(zip(NS, np.mean(scores, 0), strict=True))
    figures["TPP, own rows and probes, sd"] = dict(zip(NS, np.std(scores, 0, ddof=1), strict=True))

    # --- SCR: professor is the first attribute, male the second
    first, second = case.labels // 2 == 1, case.labels % 2 == 1
    first_test, second_test = case.labels_test // 2 == 1, case.labels_test % 2 == 1
    corners = {(0, 0): 2, (0, 1): 1, (1, 0): 1, (1, 1): 2}
    cells = _cells(first, second, corners, 0, "training")
    balanced = np.concatenate([rows[: len(cells[0, 1])] for rows in cells.values()])
    everything = np.arange(len(case.labels_test))

    def pairs(tokens: ndarray, a: ndarray, b: ndarray, rows: ndarray, both: ndarray) -> Any:
        return {
            name: torch.from_numpy(tokens[chosen])
            for name, chosen in {
                "male / female": rows[b[rows]],
                "female_data_only": rows[~b[rows]],
                "professor / nurse": rows[a[rows]],
                "nurse_data_only": rows[~a[rows]],
                "male_professor / female_nurse": both[a[both]],
                "female_nurse_data_only": both[~a[both]],
            }.items()
        }

    both = np.concatenate([cells[0, 0], cells[1, 1]])
    both_test = np.flatnonzero(first_test == second_test)
    scr_train = pairs(case.tokens, first, second, balanced, both)
    scr_test = pairs(case.tokens_test, first_test, second_test, everything, both_test)
    names = ["male / female", "professor / nurse", "male_professor / female_nurse"]

    def scr(probes: Any) -> dict[str, float]:
        base, ablated = ablate(probes, scr_train, scr_test, names, scr=True)
        biased = "male_professor / female_nurse probe on {} data"
        for i, name in enumerate(("professor / nurse", "male / female"), 1):
            figures[f"SCR base {i}"] = base[biased.format(name)]
            figures[f"SCR clean {i}"] = base[name]
        return scr_and_tpp.get_scr_plotting_dict(ablated, base)

    torch.manual_seed(0)
    own = scr(own_probes(scr_train, scr_test, scr=True))
    figures["SCR, own probes, base 1"] = figures["SCR base 1"]
    figures["SCR, own probes, clean 1"] = figures["SCR clean 1"]
    ours = scr(
        {
            "male / female": as_torch(case.x[balanced], second[balanced]),
            "professor / nurse": as_torch(case.x[balanced], first[balanced]),
            "male_professor / female_nurse": as_torch(case.x[both], first[both]),
        }
    )
    for key, name in {"dir1": "SCR 1", "dir2": "SCR 2", "metric": "SCR"}.items():
        figures[name] = {n: ours[f"scr_{key}_threshold_{n}"] for n in NS}
        figures[f"{name}, own probes"] = {n: own[f"scr_{key}_threshold_{n}"] for n in NS}
    return figures


if __name__ == "__main__":
    main()
