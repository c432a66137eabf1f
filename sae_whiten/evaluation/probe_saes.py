"""Probing of SAEs on labelled texts: one pass of the model, then the metrics of each SAE."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from sae_lens.saes.sae import SAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_whiten.evaluation.catalogue import (
    Measured,
    Probed,
    ProbedColumns,
)
from sae_whiten.evaluation.labels import LabelledTexts
from sae_whiten.evaluation.model_view import (
    View,
    decoder_norms,
    encode_decode,
    latent_scale,
    mean_over_tokens,
)
from sae_whiten.evaluation.probing import (
    K_VALUES,
    MIN_CELL,
    N_VALUES,
    SCR,
    TPP,
    full_probe_accuracy,
    sparse_probing,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from sae_whiten.evaluation.setup import Setup

__all__ = ["probe_saes"]


def probe_saes(
    setup: Setup,
    measured: Mapping[str, Measured],
    labels: LabelledTexts,
    seeds: Sequence[int],
    tpp_and_scr: bool,
) -> None:
    """Sparse probing of each SAE, and optionally TPP and SCR, in one pass over the texts.

    Args:
        setup: The SAEs and the model. Texts are cut to its context size.
        measured: Receives the results of each SAE, or the reasons why there are none.
        labels: The texts.
        seeds: Seeds for drawing rows. Probing is repeated with each.
        tpp_and_scr: Whether to measure TPP and SCR too.

    Raises:
        ValueError: An SAE is evaluated on no token of a text.
    """
    tokens = setup.text_tokens(labels.train.texts + labels.test.texts, "such texts")
    with tempfile.TemporaryDirectory(prefix="sae-whiten-") as directory:
        residuals, pooled = _pooled(setup, tokens, Path(directory))
        baselines = {
            view: [_probe_columns(x, labels, seed) for seed in seeds]
            for view, x in residuals.items()
        }
        for name, sae in tqdm(setup.saes.items(), desc="Probing", unit="SAE"):
            view, latents, results = setup.views[name], pooled[name], measured[name]
            if tpp_and_scr:
                results.absent |= _why_absent(latents, labels)
            arrays = residuals[view], latents.values, _decoder(sae)
            for seed, baseline in zip(seeds, baselines[view], strict=True):
                probed = Probed(
                    _probe_columns(latents.values, labels, seed),
                    baseline,
                    _tpp(*arrays, labels, seed)
                    if tpp_and_scr and "tpp" not in results.absent
                    else None,
                    _scr(*arrays, labels, seed)
                    if tpp_and_scr and "scr" not in results.absent
                    else (),
                )
                results.probes.append(probed)


@dataclass
class _Latents:
    """Latents averaged over the tokens of each text, in units of unit-norm decoder rows.

    Attributes:
        values: Shape (n, d_sae), float32, on disk.
        not_linear: The reason why reconstructions are not linear in the latents; None if they are.
    """

    values: Float[ndarray, "n d_sae"]
    not_linear: str | None = None


def _pooled(
    setup: Setup, tokens: Sequence[Sequence[int]], directory: Path
) -> tuple[dict[View, Float[ndarray, "n d"]], dict[str, _Latents]]:
    """Residuals of each view and latents of each SAE, as means over each text's kept tokens."""
    saes, views = setup.saes, setup.views
    residuals: dict[View, ndarray] = {}
    pooled = {}
    for i, (name, sae) in enumerate(saes.items()):
        shape = len(tokens), sae.cfg.d_sae
        pooled[name] = _Latents(np.memmap(directory / str(i), np.float32, "w+", shape=shape))
    scales = {name: latent_scale(sae).float().cpu().numpy() for name, sae in saes.items()}
    with tqdm(desc="Reading labelled texts", total=len(tokens), unit=" texts") as bar:
        batches = setup.activations_of_texts(tokens)
        for batch, (indices, ids, activations) in enumerate(batches):
            means = {}
            for view in dict.fromkeys(views.values()):
                x, kept = view.seen(activations[view.hook_name]), view.kept(ids)
                if view not in residuals:
                    residuals[view] = np.empty((len(tokens), x.shape[-1]), np.float32)
                residuals[view][indices] = mean_over_tokens(x, kept)
                means[view] = x, kept
            for name, sae in saes.items():
                x, kept = means[views[name]]
                views[name].check_width(name, sae, x)
                for rows, latents, x_hat in encode_decode(sae, x):
                    if batch == 0 and rows.start == 0:
                        pooled[name].not_linear = _why_not_linear(sae, latents, x_hat)
                    mean = mean_over_tokens(latents, kept[rows]).numpy() * scales[name]
                    pooled[name].values[indices[rows]] = mean
            bar.update(len(indices))
    return residuals, pooled


def _decoder(sae: SAE[Any]) -> Float[ndarray, "d_sae d"]:
    """Decoder rows of unit norm."""
    norms = decoder_norms(sae).clamp(min=1e-8)
    return (sae.W_dec.to(norms) / norms[:, None]).float().cpu().numpy()


def _why_not_linear(
    sae: SAE[Any], latents: Float[Tensor, "batch seq d_sae"], x_hat: Float[Tensor, "batch seq d"]
) -> str | None:
    normalize = sae.cfg.normalize_activations
    if normalize in ("layer_norm", "constant_norm_rescale"):
        return (
            f"the SAE scales every activation by its own norm (normalize_activations="
            f"{normalize!r}), so averaged latents do not show what removing them does"
        )
    scale = latent_scale(sae).to(latents)
    linear = (latents * scale) @ torch.from_numpy(_decoder(sae)).to(latents)
    offset = sae.decode(torch.zeros_like(latents[:1, :1]))
    error = torch.linalg.vector_norm(linear + offset - x_hat)
    if error > 0.02 * torch.linalg.vector_norm(x_hat):  # bfloat16 rounds by 0.004
        return "the SAE's reconstruction is not its latents times its decoder"
    return None


def _probe_columns(
    values: Float[ndarray, "n columns"], labels: LabelledTexts, seed: int
) -> ProbedColumns:
    sparse, full = {}, {}
    ks = [k for k in K_VALUES if k <= values.shape[1]]
    for attribute in labels.train.labels:
        _, train, test = labels.encoded(attribute)
        split = values[: len(train)], train, values[len(train) :], test
        sparse[attribute] = sparse_probing(*split, ks, seed)
        full[attribute] = full_probe_accuracy(*split, seed)
    return ProbedColumns(sparse, full)


def _why_absent(latents: _Latents, labels: LabelledTexts) -> dict[str, str]:
    """Reasons why TPP and SCR would be meaningless, by their keys in `MEASUREMENTS`."""
    reasons = {
        "tpp": latents.not_linear or _why_no_tpp(labels),
        "scr": latents.not_linear or _why_no_scr(labels),
    }
    return {key: why for key, why in reasons.items() if why}


def _why_no_tpp(labels: LabelledTexts) -> str | None:
    attribute = next(iter(labels.train.labels))
    if len(labels.encoded(attribute)[0]) < 3:
        return (
            f"{attribute} has two values, whose probes separate the same texts and so fall "
            "together; TPP needs three"
        )
    return None


def _tpp(
    x: Float[ndarray, "n d"],
    f: Float[ndarray, "n d_sae"],
    decoder: Float[ndarray, "d_sae d"],
    labels: LabelledTexts,
    seed: int,
) -> TPP:
    _, train, test = labels.encoded(next(iter(labels.train.labels)))
    m = len(train)
    ns = [n for n in N_VALUES if n <= f.shape[1]]
    return targeted_probe_perturbation(x[:m], f[:m], train, x[m:], f[m:], test, decoder, ns, seed)


def _why_no_scr(labels: LabelledTexts) -> str | None:
    attributes = list(labels.train.labels)
    if len(attributes) < 2:
        return "the texts have labels of one attribute, and SCR needs two"
    values, first, first_test = labels.encoded(attributes[0])
    other_values, second, second_test = labels.encoded(attributes[1])
    if len(other_values) != 2:
        return (
            f"{attributes[1]} has {len(other_values)} values, and SCR needs two of the second "
            "attribute"
        )
    n_train, n_test = (
        min(int(((y == a) & (z == b)).sum()) for a in range(len(values)) for b in (0, 1))
        for y, z in ((first, second), (first_test, second_test))
    )
    # the biased probe needs twice as many texts in which both attributes coincide
    if n_train < 2 * MIN_CELL or n_test < MIN_CELL:
        return (
            f"it needs {2 * MIN_CELL} training and {MIN_CELL} test texts with each combination of "
            f"{attributes[0]} and {attributes[1]}, and there are as few as {n_train} and {n_test}"
        )
    return None


def _scr(
    x: Float[ndarray, "n d"],
    f: Float[ndarray, "n d_sae"],
    decoder: Float[ndarray, "d_sae d"],
    labels: LabelledTexts,
    seed: int,
) -> list[SCR]:
    """SCR of disjoint pairs of the first attribute's values."""
    (values, first, first_test), (_, second, second_test) = (
        labels.encoded(attribute) for attribute in list(labels.train.labels)[:2]
    )
    ns = [n for n in N_VALUES if n <= f.shape[1]]
    m = len(first)
    scores = []
    for a in range(0, len(values) - 1, 2):
        rows, test_rows = (np.flatnonzero((y == a) | (y == a + 1)) for y in (first, first_test))
        scr = spurious_correlation_removal(
            x[rows],
            f[rows],
            first[rows] - a,
            second[rows],
            x[m + test_rows],
            f[m + test_rows],
            first_test[test_rows] - a,
            second_test[test_rows],
            decoder,
            ns,
            seed,
        )
        scores.append(scr)
    return scores
