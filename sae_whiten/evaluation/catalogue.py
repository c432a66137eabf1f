"""Every reported metric of an SAE as one object: its key, computation, name and direction.

To add a metric, add it to `METRICS`: `evaluate_saes` then computes it and reports list it. This
changes no p-value. `sae_whiten.comparison.summary.TESTED_METRICS` lists the metrics that are tested
and corrected together.
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
from sae_whiten.evaluation.probing import K_VALUES, N_VALUES, SCR, TPP

__all__ = [
    "CE_LOSS_SCORE",
    "COUNTS",
    "CURVES",
    "DEAD_LATENTS",
    "EXPLAINED_VARIANCE",
    "EXPLAINED_VARIANCE_OF_LOSS",
    "FIRING_AGREEMENT",
    "FIRING_AGREEMENT_NULL",
    "KL",
    "K_VALUES",
    "L0",
    "MEASUREMENTS",
    "METRICS",
    "N_VALUES",
    "OF_SEVERAL_SEEDS",
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

SAE_PROBES_K = (1, 2, 4, 8, 16)
"""Numbers of latents for the probes of `sae-probes`: the first five of the package's own."""

MEASUREMENTS = {"ce_loss": "CE loss score and KL", "tpp": "TPP", "scr": "SCR"}
"""Measurements that a record may lack: the key of the reason in `absent`, and the reports' name."""


@dataclass(frozen=True)
class ProbedColumns:
    """Accuracies of probes on columns: latents, or channels of the activations.

    Attributes:
        sparse: `sparse[attribute][K]`, for each K up to the number of columns.
        full: By attribute, with all columns.
    """

    sparse: Mapping[str, Mapping[int, float]]
    full: Mapping[str, float]

    def mean(self, k: int, attributes: Iterable[str] | None = None) -> float | None:
        """Mean accuracy with K columns over these attributes (None: all); None without any."""
        names = self.sparse if attributes is None else attributes
        return _mean(self.sparse[name].get(k) for name in names)


@dataclass(frozen=True)
class Probed:
    """The results of probing with one seed.

    Attributes:
        latents: Probes on latents, averaged over the tokens of labelled texts.
        residual: Probes on activations, averaged in the same way.
        tpp: TPP on the same texts; None if not measured.
        scr: SCR on the same texts, one per pair of classes; empty if not measured.
    """

    latents: ProbedColumns
    residual: ProbedColumns
    tpp: TPP | None = None
    scr: Sequence[SCR] = ()


@dataclass
class Measured:
    """Measurements of one SAE, from which metrics are computed.

    Attributes:
        variance: Explained variance over the tokens of a dataset.
        activity: Activity of the latents over the same tokens.
        variance_of_loss: Explained variance in the whitened space of the training loss. None if the
            loss was in the space of the activations, or is unknown.
        loss: Loss of the model over the same tokens; None if it is meaningless.
        probes: Probing on labelled texts, one entry per seed of the probes.
        tasks: `tasks[name][k]`: test AUCs of a task of `sae-probes` with k latents, one per seed of
            the probes.
        absent: Reasons why something was not measured, by the keys of `MEASUREMENTS`.
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
        compute: Returns the number, or None if its inputs were not measured.
        name: Its name in reports. Default: the key, with spaces.
        better: 1 if more is better, -1 if less is, 0 if neither.
        decimals: Smallest number of decimals to print.
        is_count: Whether it is a number of latents. Reports then show that of one SAE without
            decimals, and say "more" and "fewer" instead of "higher" and "lower".
        repeats: Returns the values whose mean is `compute`, one per seed of the probes, by task. A
            single task has an empty name. None: the metric does not depend on the seed.
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
        name: Name in reports.
        x_label: Label of the x axis.
        metrics: By number of latents.
        baselines: The same metrics of channels of the activations, by number of channels.
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
DENSE_LATENTS = Metric(
    "dense_latents", lambda m: dense_latents(m.activity.firing_rates), is_count=True
)
CE_LOSS = Metric("ce_loss", lambda m: m.loss and m.loss.clean)
CE_LOSS_WITH_SAE = Metric("ce_loss_with_sae", lambda m: m.loss and m.loss.with_sae)
CE_LOSS_ABLATED = Metric("ce_loss_ablated", lambda m: m.loss and m.loss.ablated)
CE_LOSS_SCORE = Metric("ce_loss_score", lambda m: m.loss and m.loss.score, "CE loss score", 1)
KL = Metric("kl", lambda m: m.loss and m.loss.kl, "KL divergence", -1)


# --- of several seeds: `comparison.stability` computes them, as they need more than one SAE


def _of_others(key: str, name: str, better: Literal[0, 1] = 0) -> Metric:
    return Metric(key, lambda m: None, name, better)


STABILITY = _of_others("stability", "stability over seeds", better=1)
STABILITY_NULL = _of_others("stability_null", "stability of random dictionaries")
STABILITY_RAW = _of_others("stability_raw", "stability over seeds, raw cosines")
STABILITY_RAW_NULL = _of_others(
    "stability_raw_null", "stability of random dictionaries, raw cosines"
)
FIRING_AGREEMENT = _of_others("firing_agreement", "agreement of firing over seeds", better=1)
FIRING_AGREEMENT_NULL = _of_others(
    "firing_agreement_null", "agreement of firing with permuted tokens"
)

_OVER_SEEDS = (
    STABILITY,
    STABILITY_NULL,
    STABILITY_RAW,
    STABILITY_RAW_NULL,
    FIRING_AGREEMENT,
    FIRING_AGREEMENT_NULL,
)
OF_SEVERAL_SEEDS = frozenset(metric.key for metric in _OVER_SEEDS)
"""Keys of metrics whose values for two seeds are of the same pair of SAEs, or all the same. So the
deviation of these values does not tell how much of them is chance: of two seeds it is always 0."""


# --- on labelled texts


def _probed(
    key: str, value: Callable[[Probed], float | None], name: str = "", better: Literal[0, 1] = 0
) -> Metric:
    """The mean over the seeds of the probes."""

    def repeats(m: Measured) -> dict[str, list[float]]:
        values = [v for probed in m.probes if (v := value(probed)) is not None]
        return {"": values} if values else {}

    return Metric(key, lambda m: _mean(map(value, m.probes)), name, better, repeats=repeats)


def _sparse_probing(k: int, attribute: str | None = None) -> tuple[Metric, Metric]:
    """Accuracies on latents and on channels: of one attribute, or the mean over all."""
    attributes = None if attribute is None else [attribute]
    key = f"sparse_probing_{f'{attribute}_' if attribute else ''}top_{k}"
    return (
        _probed(key, lambda probed: probed.latents.mean(k, attributes), better=1),
        _probed(f"residual_{key}", lambda probed: probed.residual.mean(k, attributes)),
    )


def attribute_metrics(attributes: Iterable[str]) -> list[Metric]:
    """Sparse probing of single attributes. Which attributes there are depends on the texts."""
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
        lambda m: _mean(_mean(aucs) for aucs in repeats(m).values()),
        f"sae-probes AUC top {k}",
        better=1,
        repeats=repeats,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


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
    *_OVER_SEEDS,
)
"""All metrics in the order of the records. Those of `attribute_metrics` follow in a record."""

COUNTS = frozenset(metric.key for metric in METRICS if metric.is_count)
"""Keys of the metrics that are numbers of latents."""

CURVES = (
    Curve("sparse probing", "latents used, K", SPARSE_PROBING_AT, RESIDUAL_PROBING_AT),
    Curve("sae-probes AUC", "latents used, k", SAE_PROBES_AUC_AT, {}),
    Curve("SCR", "latents removed, N", SCR_AT, {}),
    Curve("TPP", "latents removed, N", TPP_AT, {}),
)


def name_of(key: str) -> str:
    """The name, in reports, of the metric with this key, also for `attribute_metrics`.

    >>> name_of("kl"), name_of("sparse_probing_language_top_5")
    ('KL divergence', 'sparse probing language top 5')
    """
    return next((m.name for m in METRICS if m.key == key), key.replace("_", " "))
