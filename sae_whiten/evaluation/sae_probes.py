"""Probing with the tasks of `sae-probes` (Kantamneni et al. 2025, arXiv 2502.16681).

Texts, labels, splits, choice of latents and classifiers are those of `sae-probes`. Model and SAEs
are run here, because its own runner only loads TransformerLens models by name. On the same
activations the results are equal: the last token of a text, all rows and seed 42 give those of its
setting "normal".
"""

import importlib.metadata
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Integer
from numpy import ndarray
from sae_lens.saes.sae import SAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_whiten._checks import require_number
from sae_whiten.estimation.probing_texts import task_names, tasks_of
from sae_whiten.estimation.sources import Model
from sae_whiten.evaluation.catalogue import SAE_PROBES_K, Measured
from sae_whiten.evaluation.model_view import (
    View,
    activations_of_texts,
    encode_in_parts,
    mean_over_tokens,
)
from sae_whiten.evaluation.setup import Setup
from sae_whiten.evaluation.tokens import Reading

__all__ = ["ProbingTasks", "probe_tasks", "task_auc"]

_FIRST_SEED = 42  # the seed of sae-probes
_ENCODED_AT_ONCE = 128  # as in sae-probes: other numbers of rows change the last bits of products
_MOST_TRAINED_ON, _FEWEST_TESTED = 1024, 100  # as in the setting "normal" of sae-probes


@dataclass(frozen=True)
class ProbingTasks:
    """Which tasks of `sae-probes` are probed, and how.

    Attributes:
        names: Names of the tasks.
        tokens: "last": probe the latents of a text's last token, as `sae-probes` does. "mean": the
            mean of the latents over its tokens.
        penalty: Penalty of the logistic regression. `sae-probes` recommends "l1".
        n_texts: Texts of each task, half of them of each class. Three quarters are used for
            training. None: all texts, of which at most 1024 are used for training, as in
            `sae-probes`.

    Raises:
        ModuleNotFoundError: `sae-probes` is not installed.
        ValueError: A task does not exist, or `n_texts` is below 32.
    """

    names: Sequence[str]
    tokens: Literal["last", "mean"] = "last"
    penalty: Literal["l1", "l2"] = "l1"
    n_texts: int | None = None

    def __post_init__(self) -> None:
        known = task_names()
        unknown = [name for name in self.names if name not in known]
        if unknown or not self.names:
            raise ValueError(f"no task {', '.join(unknown)} in sae-probes: {', '.join(known)}")
        if self.n_texts is not None:
            require_number("n_texts", self.n_texts, 32)

    @classmethod
    def of(cls, source: str, **options: Any) -> "ProbingTasks":
        """Tasks by a name: "sae-probes" for all 113, "sae-probes:20" for a fixed sample of 20."""
        return cls(tasks_of(source), **options)

    def check(self, saes: Mapping[str, SAE[Any]]) -> None:
        """Refuse SAEs, by name, that cannot encode a text's last token alone.

        Raises:
            ValueError: `tokens` is "last", and an SAE is temporal.
        """
        for name, sae in saes.items():
            if self.tokens == "last" and sae.cfg.architecture() == "temporal":
                raise ValueError(
                    f"{name} is a temporal SAE, whose latents depend on earlier tokens too, and "
                    "the probes read the last token alone: probe the mean over all tokens instead "
                    "(tokens='mean', --probe-tokens mean)"
                )

    @property
    def source(self) -> dict[str, Any]:
        """The tasks, options and package version, for the record."""
        return {
            "sae-probes": importlib.metadata.version("sae-probes"),
            "tasks": list(self.names),
            "tokens": self.tokens,
            "penalty": self.penalty,
            "n_texts": self.n_texts,
        }


@dataclass(frozen=True, eq=False)
class _Task:
    """The texts of one task, for all seeds, and the splits of each seed.

    Attributes:
        texts: Texts that at least one seed uses.
        y: Shape (n,), 0 or 1.
        splits: Training rows and test rows, for each seed.
    """

    texts: list[str]
    y: Integer[ndarray, "n"]
    splits: list[tuple[ndarray, ndarray]]


def probe_tasks(
    setup: Setup, measured: Mapping[str, Measured], tasks: ProbingTasks, seeds: Sequence[int]
) -> None:
    """Test AUC of every task with the best latents of each SAE.

    Args:
        setup: The SAEs and the model. Texts are cut to its context size; with `tokens="last"`,
            their end is kept.
        measured: Receives the `tasks` of each SAE.
        tasks: The tasks and their options.
        seeds: Seeds for splits and classifiers, added to 42, the seed of `sae-probes`.

    Raises:
        ValueError: A task has fewer texts of a class than `tasks.n_texts` asks for. Or an SAE is
            evaluated on no token of a text.
    """
    saes, views = setup.saes, setup.views
    seeds = [_FIRST_SEED + seed for seed in seeds]
    last = tasks.tokens == "last"
    with tqdm(total=len(tasks.names) * len(saes), desc="Probing", unit="task") as bar:
        for task_name in tasks.names:
            task = _read(task_name, tasks.n_texts, seeds)
            tokens = setup.text_tokens(task.texts, f"the task {task_name}", keep_end=last)
            with tempfile.TemporaryDirectory(prefix="sae-whiten-") as directory:
                if last:
                    by_view = _last_tokens(views.values(), setup.model, tokens, setup.reading)
                    rows = {name: by_view[view] for name, view in views.items()}
                else:
                    rows = _mean_latents(setup, tokens, Path(directory))
                for name, sae in saes.items():
                    if last:
                        views[name].check_width(name, sae, rows[name])
                    aucs: dict[int, list[float]] = {}
                    for seed, split in zip(seeds, task.splits, strict=True):
                        f, f_test = (
                            _encoded(sae, rows[name][part]) if last else rows[name][part]
                            for part in split
                        )
                        y, y_test = (task.y[part] for part in split)
                        by_k = task_auc(f, y, f_test, y_test, seed, tasks.penalty)
                        for k, auc in by_k.items():
                            aucs.setdefault(k, []).append(auc)
                    measured[name].tasks[task_name] = aucs
                    bar.update()


def task_auc(
    train: Float[Tensor, "n d_sae"],
    y_train: Integer[ndarray, "n"],
    test: Float[Tensor, "n_test d_sae"],
    y_test: Integer[ndarray, "n_test"],
    seed: int,
    penalty: Literal["l1", "l2"] = "l1",
) -> dict[int, float]:
    """Test AUC (ROC) of the `sae-probes` classifier on the k latents that it ranks highest.

    Args:
        train: Latents, shape (n, d_sae), float32.
        y_train: Shape (n,), 0 or 1.
        test: Latents, shape (n_test, d_sae).
        y_test: Shape (n_test,).
        seed: Seed for the classifier's cross-validation and order.
        penalty: Penalty of its logistic regression.

    Returns:
        AUC by k, for each k up to d_sae; in [0, 1], 0.5 is chance.
    """
    from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization  # pyright: ignore[reportMissingImports]
    from sae_probes.utils_training import find_best_reg  # pyright: ignore[reportMissingImports]

    labels, labels_test = torch.from_numpy(y_train), torch.from_numpy(y_test)
    ranked = get_sorted_indices(train, labels, mean_act_normalization)
    aucs = {}
    with warnings.catch_warnings():
        # scikit-learn warns about its penalty option and the number of iterations
        warnings.simplefilter("ignore")
        for k in (k for k in SAE_PROBES_K if k <= train.shape[1]):
            chosen = ranked[:k]
            result = find_best_reg(
                train[:, chosen], labels, test[:, chosen], labels_test, penalty=penalty, seed=seed
            )
            aucs[k] = result.metrics.test_auc
    return aucs


def _read(name: str, n_texts: int | None, seeds: Sequence[int]) -> _Task:
    from sae_probes.utils_data import (  # pyright: ignore[reportMissingImports]
        get_train_test_indices,
        get_yvals,
        read_numbered_dataset_df,
    )

    texts, y = read_numbered_dataset_df(name)["prompt"].astype(str).tolist(), get_yvals(name)
    if n_texts is None:
        n_train = min(len(y) - _FEWEST_TESTED, _MOST_TRAINED_ON)
        n_test = len(y) - n_train - 1
    else:
        n_train = 3 * n_texts // 4
        n_test = n_texts - n_train
        fewest = int(np.bincount(y).min())
        if fewest < (n_texts + 3) // 2:
            raise ValueError(
                f"{name} has {fewest} texts of a class: with n_texts={n_texts} it needs "
                f"{(n_texts + 3) // 2}"
            )
    splits = [get_train_test_indices(y, n_train, n_test, seed=seed) for seed in seeds]
    used, inverse = np.unique(np.concatenate([*map(np.concatenate, splits)]), return_inverse=True)
    renumbered = inverse.reshape(len(seeds), n_train + n_test)
    return _Task(
        [texts[row] for row in used], y[used], [(r[:n_train], r[n_train:]) for r in renumbered]
    )


def _last_tokens(
    views: Iterable[View], model: Model, tokens: Sequence[Sequence[int]], reading: Reading
) -> dict[View, Float[Tensor, "n d"]]:
    """For each view, the activations of the last kept token of each text."""
    by_view: dict[View, Tensor] = {}
    hooks = {view.hook_name for view in views}
    for indices, ids, activations in activations_of_texts(model, tokens, hooks, reading.batch_size):
        for view in dict.fromkeys(views):
            x, kept = view.seen(activations[view.hook_name]), view.kept(ids)
            position = kept.shape[1] - 1 - kept.int().flip(1).argmax(1)
            values = x[torch.arange(len(x), device=x.device), position].cpu()
            if view not in by_view:
                by_view[view] = values.new_empty(len(tokens), values.shape[1])
            by_view[view][indices] = values
    return by_view


def _mean_latents(
    setup: Setup, tokens: Sequence[Sequence[int]], directory: Path
) -> dict[str, Float[Tensor, "n d_sae"]]:
    """For each SAE, the latents of each text, averaged over the kept tokens; on disk."""
    by_name = {}
    for i, (name, sae) in enumerate(setup.saes.items()):
        shape = len(tokens), sae.cfg.d_sae
        array = np.memmap(directory / str(i), np.float32, "w+", shape=shape)
        by_name[name] = torch.from_numpy(array)
    for indices, ids, activations in setup.activations_of_texts(tokens):
        for name, sae in setup.saes.items():
            x, kept = setup.seen(name, activations), setup.views[name].kept(ids)
            for rows, latents in encode_in_parts(sae, x):
                by_name[name][indices[rows]] = mean_over_tokens(latents, kept[rows])
    return by_name


def _encoded(sae: SAE[Any], x: Float[Tensor, "n d"]) -> Float[Tensor, "n d_sae"]:
    """Dense float32 latents, on the CPU."""
    parts = [
        sae.encode(part.to(sae.device, sae.dtype)).cpu().float()
        for part in x.split(_ENCODED_AT_ONCE)
    ]
    return torch.cat([part.to_dense() if part.is_sparse else part for part in parts])
