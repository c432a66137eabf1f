"""Every metric of an SAE that is reported: its key, computation, name and direction, in one object.

To add one is to add it to `METRICS`: `evaluate_saes` then computes it, and reports list it with all
other metrics. It changes no p-value. Which metrics are tested, and corrected together, is said by
`sae_whiten.comparison.summary.TESTED_METRICS`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from sae_whiten.evaluation.metrics import (
    ExplainedVariance,
    LatentActivity,
    dead_latents,
    dense_latents,
)
from sae_whiten.evaluation.model_loss import ModelLoss
from sae_whiten.evaluation.probing import SCR, TPP

__all__ = [
    "CE_LOSS_SCORE",
    "CURVES",
    "DEAD_LATENTS",
    "EXPLAINED_VARIANCE",
    "EXPLAINED_VARIANCE_OF_LOSS",
    "KL",
    "K_VALUES",
    "L0",
    "MEASUREMENTS",
    "METRICS",
    "N_VALUES",
    "SAE_PROBES_AUC_AT",
    "SAE_PROBES_K",
    "SCR_AT",
    "SCR_DENOMINATOR",
    "SPARSE_PROBING_AT",
    "STABILITY",
    "STABILITY_NULL",
    "STABILITY_RAW",
    "STABILITY_RAW_NULL",
    "TPP_AT",
    "Curve",
    "Measured",
    "Metric",
    "Probed",
    "ProbedColumns",
    "attribute_metrics",
    "name_of",
]

K_VALUES = (1, 2, 5, 20)
"""Columns of sparse probing."""

SAE_PROBES_K = (1, 2, 4, 8, 16)
"""Latents that the probes of `sae-probes` use: the first five of its own."""

N_VALUES = (2, 5, 10, 20, 50, 100)
"""Latents removed by TPP and SCR."""

MEASUREMENTS = {"ce_loss": "CE loss score and KL", "tpp": "TPP", "scr": "SCR"}
"""What a record may lack, with the reason under this key; and its name in reports."""


@dataclass(frozen=True)
class ProbedColumns:
    """Accuracies of probes on some columns: latents, or channels of the activations.

    Attributes:
        sparse: `sparse[attribute][K]`, without those K of which there are not as many columns.
        full: By attribute, with all columns.
    """

    sparse: Mapping[str, Mapping[int, float]]
    full: Mapping[str, float]

    def mean(self, k: int, attributes: Iterable[str] | None = None) -> float | None:
        """Accuracy with K columns, over these attributes or all; None if none has it."""
        names = self.sparse if attributes is None else attributes
        return _mean(self.sparse[name].get(k) for name in names)


@dataclass(frozen=True)
class Probed:
    """What probing with one seed found; None was not measured.

    Attributes:
        latents: Probes on latents, averaged over the tokens of labelled texts.
        residual: Probes on activations, averaged in the same way.
        tpp: On the same texts.
        scr: On the same texts, of each pair of classes.
    """

    latents: ProbedColumns
    residual: ProbedColumns
    tpp: TPP | None = None
    scr: Sequence[SCR] = ()


@dataclass
class Measured:
    """What was measured of one SAE, for metrics to be computed from.

    Attributes:
        variance: Over the tokens of a dataset.
        activity: Of the latents, over the same tokens.
        variance_of_loss: As `variance`, in the whitened space that the loss was taken in; None if
            it was taken in that of the activations, or nobody said.
        loss: Of the model, over the same tokens; None if it means nothing.
        probes: On labelled texts, one for each seed of the probes.
        tasks: `tasks[name][k]`: test AUC of a task of `sae-probes` with k latents, one for each
            seed of the probes.
        absent: Why something was not measured, by the keys of `MEASUREMENTS`.
    """

    variance: ExplainedVariance
    activity: LatentActivity
    variance_of_loss: ExplainedVariance | None = None
    loss: ModelLoss | None = None
    probes: list[Probed] = field(default_factory=list)
    tasks: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """One number about an SAE.

    Attributes:
        key: Its name in a record.
        compute: The number; None if what it is computed from was not measured.
        name: In words; if empty, those of the key.
        better: 1 if more is better, -1 if less is, 0 if neither.
        decimals: Fewest decimals that it is printed with.
        is_count: Whether SAEs have more or fewer of it, and not a higher or lower value.
        repeats: The same measured again with other seeds of the probes, by task (where there is but
            one, it has no name): what `compute` is the mean of. None: it has no seed.
    """

    key: str
    compute: Callable[[Measured], float | None]
    name: str = ""
    better: Literal[-1, 0, 1] = 0
    decimals: int = 3
    is_count: bool = False
    repeats: Callable[[Measured], Mapping[str, Sequence[float]]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.key.replace("_", " "))


@dataclass(frozen=True)
class Curve:
    """A metric at several numbers of latents.

    Attributes:
        name: In words.
        x_label: What the numbers count.
        metrics: By number of latents.
        baselines: The same of channels of the activations, by their number.
    """

    name: str
    x_label: str
    metrics: Mapping[int, Metric]
    baselines: Mapping[int, Metric]


# --- on tokens

EXPLAINED_VARIANCE = Metric("explained_variance", lambda m: m.variance.compute(), better=1)
EXPLAINED_VARIANCE_OF_LOSS = Metric(
    "explained_variance_of_loss",
    lambda m: m.variance_of_loss and m.variance_of_loss.compute(),
    "explained variance in the space of the loss",
    better=1,
)
L0 = Metric("l0", lambda m: m.activity.l0, "L0", decimals=1)
DEAD_LATENTS = Metric(
    "dead_latents",
    lambda m: dead_latents(m.activity.firing_rates),
    better=-1,
    decimals=1,
    is_count=True,
)
DENSE_LATENTS = Metric("dense_latents", lambda m: dense_latents(m.activity.firing_rates))
CE_LOSS = Metric("ce_loss", lambda m: m.loss and m.loss.clean)
CE_LOSS_WITH_SAE = Metric("ce_loss_with_sae", lambda m: m.loss and m.loss.with_sae)
CE_LOSS_ABLATED = Metric("ce_loss_ablated", lambda m: m.loss and m.loss.ablated)
CE_LOSS_SCORE = Metric("ce_loss_score", lambda m: m.loss and m.loss.score, "CE loss score", 1)
KL = Metric("kl", lambda m: m.loss and m.loss.kl, "KL divergence", -1)


# --- of several seeds: `comparison.stability` computes them, as no SAE alone has them


def _of_others(key: str, name: str, better: Literal[0, 1] = 0) -> Metric:
    return Metric(key, lambda m: None, name, better)


STABILITY = _of_others("stability", "stability over seeds", better=1)
STABILITY_NULL = _of_others("stability_null", "stability of random dictionaries")
STABILITY_RAW = _of_others("stability_raw", "stability over seeds, raw cosines")
STABILITY_RAW_NULL = _of_others(
    "stability_raw_null", "stability of random dictionaries, raw cosines"
)


# --- on labelled texts


def _probed(
    key: str, value: Callable[[Probed], float | None], name: str = "", better: Literal[0, 1] = 0
) -> Metric:
    """The mean over the seeds of the probes."""

    def repeats(m: Measured) -> dict[str, list[float]]:
        found = [v for probed in m.probes if (v := value(probed)) is not None]
        return {"": found} if found else {}

    return Metric(key, lambda m: _mean(map(value, m.probes)), name, better, repeats=repeats)


def _sparse_probing(k: int, attribute: str | None = None) -> tuple[Metric, Metric]:
    """On latents, and on channels of the activations; of one attribute, or the mean over all."""
    attributes = None if attribute is None else [attribute]
    key = f"sparse_probing_{f'{attribute}_' if attribute else ''}top_{k}"
    return (
        _probed(key, lambda probed: probed.latents.mean(k, attributes), better=1),
        _probed(f"residual_{key}", lambda probed: probed.residual.mean(k, attributes)),
    )


def attribute_metrics(attributes: Iterable[str]) -> list[Metric]:
    """Sparse probing of single attributes of the texts, which others may lack."""
    return [m for name in attributes for k in K_VALUES for m in _sparse_probing(k, name)]


def _tpp(n: int) -> Metric:
    return _probed(f"tpp_top_{n}", lambda p: p.tpp and p.tpp.scores.get(n), f"TPP top {n}", 1)


def _scr(
    key: str, of_pair: Callable[[SCR], float | None], name: str = "", better: Literal[0, 1] = 0
) -> Metric:
    """The mean over pairs of classes."""
    return _probed(key, lambda probed: _mean(map(of_pair, probed.scr)), name, better)


def _sae_probes_auc(k: int) -> Metric:
    """The mean over tasks and seeds of the probes."""

    def repeats(m: Measured) -> dict[str, Sequence[float]]:
        return {task: by_k[k] for task, by_k in m.tasks.items() if k in by_k}

    return Metric(
        f"sae_probes_auc_top_{k}",
        lambda m: _mean(_mean(found) for found in repeats(m).values()),
        f"sae-probes AUC top {k}",
        better=1,
        repeats=repeats,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


SPARSE_PROBING_AT, RESIDUAL_PROBING_AT = (
    {k: _sparse_probing(k)[i] for k in K_VALUES} for i in (0, 1)
)
FULL_PROBE_ACCURACY = _probed("full_probe_accuracy", lambda p: _mean(p.residual.full.values()))
SAE_PROBES_AUC_AT = {k: _sae_probes_auc(k) for k in SAE_PROBES_K}
TPP_AT = {n: _tpp(n) for n in N_VALUES}
TPP_PROBE_ACCURACY = _probed(
    "tpp_probe_accuracy", lambda probed: probed.tpp and float(probed.tpp.base_accuracies.mean())
)
SCR_AT = {
    n: _scr(f"scr_top_{n}", lambda scr, n=n: scr.scores.get(n), f"SCR top {n}", 1) for n in N_VALUES
}
SCR_DENOMINATOR = _scr("scr_denominator", lambda scr: scr.denominator, "SCR denominator")
SCR_BASE_ACCURACY = _scr("scr_base_accuracy", lambda scr: scr.base)
SCR_CLEAN_ACCURACY = _scr("scr_clean_accuracy", lambda scr: scr.clean)
SCR_MIN_DENOMINATOR = _probed(
    "scr_min_denominator", lambda p: min((scr.denominator for scr in p.scr), default=None)
)

METRICS = (
    EXPLAINED_VARIANCE,
    EXPLAINED_VARIANCE_OF_LOSS,
    L0,
    DEAD_LATENTS,
    DENSE_LATENTS,
    CE_LOSS,
    CE_LOSS_WITH_SAE,
    CE_LOSS_ABLATED,
    CE_LOSS_SCORE,
    KL,
    *SPARSE_PROBING_AT.values(),
    *RESIDUAL_PROBING_AT.values(),
    FULL_PROBE_ACCURACY,
    *SAE_PROBES_AUC_AT.values(),
    *TPP_AT.values(),
    TPP_PROBE_ACCURACY,
    *SCR_AT.values(),
    SCR_DENOMINATOR,
    SCR_BASE_ACCURACY,
    SCR_CLEAN_ACCURACY,
    SCR_MIN_DENOMINATOR,
    STABILITY,
    STABILITY_NULL,
    STABILITY_RAW,
    STABILITY_RAW_NULL,
)
"""In the order of the records; those of `attribute_metrics` follow."""

CURVES = (
    Curve("sparse probing", "latents used, K", SPARSE_PROBING_AT, RESIDUAL_PROBING_AT),
    Curve("sae-probes AUC", "latents used, k", SAE_PROBES_AUC_AT, {}),
    Curve("SCR", "latents removed, N", SCR_AT, {}),
    Curve("TPP", "latents removed, N", TPP_AT, {}),
)


def name_of(key: str) -> str:
    """What reports call the metric with this key, which may be one of `attribute_metrics`.

    >>> name_of("kl"), name_of("sparse_probing_language_top_5")
    ('KL divergence', 'sparse probing language top 5')
    """
    return next((m.name for m in METRICS if m.key == key), key.replace("_", " "))
