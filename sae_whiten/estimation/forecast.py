"""Will whitening help at a hook? A forecast from activations that were about as anisotropic.

The evidence is one experiment (docs/dose-response.md): the same activations, made more and more
anisotropic by invertible maps ("doses"), and SAEs trained on each. A hook is compared with the
nearest dose. There is no interpolation, because nothing was measured between two doses.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = [
    "BASELINE",
    "FAR",
    "LIMITS",
    "SETTINGS",
    "Difference",
    "Dose",
    "Forecast",
    "Outcome",
    "dose_in_words",
    "evidence",
    "forecast",
]

BASELINE = "expected_average_only_in"
"""SAELens' scaling, which every condition is compared with."""

SETTINGS = {
    BASELINE: "no whitening",
    "centred": 'subtract the mean: kind="zca", strength=0',
    "original": 'whiten: loss_space="original"',
    "strength-0.5": 'whiten by half: strength=0.5, loss_space="whitened"',
    "whitened": 'whiten: loss_space="whitened"',
}
"""Recommendations by condition, the simplest first."""

LIMITS = (
    "(TopK SAEs of one hook of all-MiniLM-L6-v2, made more and more anisotropic, after 2 million\n"
    "tokens. On a causal transformer of bytes the forecast was wrong about dead latents, and\n"
    "after fewer tokens about explained variance: docs/dose-response.md. sae-whiten compare\n"
    "measures it on your hook.)"
)
"""Where the forecast comes from, and that it has failed."""

FAR = 0.5
"""Distance in powers of ten above which the nearest dose is no evidence for a hook."""

_FEW_DEAD = 0.05
"""Share of the latents: smaller differences in dead latents are ignored."""

_SMALL_MEAN, _LARGE_SHARE = 0.3, 0.3
"""|mean|/std and participation share of the mildest activations measured. Milder activations count
as equal to these."""


@dataclass(frozen=True)
class Difference:
    """A difference between two conditions over seeds and tasks, with its 95% interval.

    Attributes:
        mean: The difference.
        low: Lower end of the interval; NaN with one seed.
        high: Upper end.
        noise: How much measuring again could change it.
    """

    mean: float
    low: float
    high: float
    noise: float

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0 and the mean is above the noise of measuring."""
        return (self.low > 0 or self.high < 0) and abs(self.mean) > self.noise


@dataclass(frozen=True)
class Outcome:
    """Results of the SAEs of one condition at one dose, means over seeds.

    Attributes:
        seeds: Number of SAEs.
        explained_variance: Of held-out activations.
        explained_variance_undone: The same after undoing the map that made the activations
            anisotropic: directions that it made small count as they did before.
        dead: Share of latents that fire at no held-out activation.
        auc: Test AUC of probes on 1 to 16 latents, mean over their numbers and all tasks.
        over: Difference in `auc` from other conditions, by their names.
    """

    seeds: int
    explained_variance: float
    explained_variance_undone: float
    dead: float
    auc: float
    over: dict[str, Difference]


@dataclass(frozen=True)
class Dose:
    """Activations that SAEs were trained on, and the results of these SAEs.

    Attributes:
        name: As in docs/dose-response.md.
        mean_over_std: Norm of the mean over the root of the total variance.
        participation_share: Participation ratio over the width.
        outcomes: By condition.
    """

    name: str
    mean_over_std: float
    participation_share: float
    outcomes: dict[str, Outcome]

    def distance(self, mean_over_std: float, participation_share: float) -> float:
        """Distance of activations from this dose: both figures in log10, Euclidean."""
        here = _mildest(self.mean_over_std, self.participation_share)
        there = _mildest(mean_over_std, participation_share)
        return math.hypot(*(math.log10(a / b) for a, b in zip(here, there, strict=True)))

    @property
    def best(self) -> str:
        """The simplest setting that no other improves on: a key of `SETTINGS`.

        A setting is better if its AUC is significantly higher, or, if AUC does not differ, if it
        leaves fewer latents dead, by more than 5% of all. With two seeds no AUC differs
        significantly: bootstrap intervals over so few are too narrow.
        """
        best = BASELINE
        for name in SETTINGS:
            if name in self.outcomes and name != best and self._better(name, best):
                best = name
        return best

    def _better(self, name: str, other: str) -> bool:
        own, theirs = self.outcomes[name], self.outcomes[other]
        difference = own.over[other]
        if difference.significant and min(own.seeds, theirs.seeds) > 2:
            return difference.mean > 0
        return theirs.dead - own.dead > _FEW_DEAD


def _mildest(mean_over_std: float, participation_share: float) -> tuple[float, float]:
    return max(mean_over_std, _SMALL_MEAN), min(participation_share, _LARGE_SHARE)


@dataclass(frozen=True)
class Forecast:
    """What to expect of whitening at a hook.

    Attributes:
        dose: The nearest dose.
        distance: Distance to it, in powers of ten.
    """

    dose: Dose
    distance: float

    @property
    def known(self) -> bool:
        """Whether similar activations were measured."""
        return self.distance <= FAR

    @property
    def advice(self) -> str:
        """What to do, in a few words."""
        setting = SETTINGS[self.dose.best]
        return setting if self.known else f"not measured; at the nearest dose: {setting}"

    def to_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        return {
            "dose": self.dose.name,
            "distance": self.distance,
            "known": self.known,
            "advice": self.advice,
            "condition": self.dose.best if self.known else None,
            "outcomes": {
                name: {k: v for k, v in vars(outcome).items() if k != "over"}
                for name in SETTINGS
                if (outcome := self.dose.outcomes.get(name)) is not None
            },
        }


def dose_in_words(name: str) -> str:
    """The name of a dose as tables show it.

    >>> dose_in_words("1-decades-gamma-3")
    '1 decade, mean 3 sd'
    """
    if name == "natural":
        return name
    decades, gamma = name.split("-decades-gamma-")
    return f"{decades} decade{'s' if decades != '1' else ''}, mean {gamma} sd"


@cache
def evidence() -> tuple[Dose, ...]:
    """The doses that were measured, as `examples/dose_response.py report` wrote them."""
    text = files("sae_whiten.estimation").joinpath("dose_response.json").read_text("utf-8")
    return tuple(_dose(entry) for entry in json.loads(text))


def _dose(entry: dict[str, Any]) -> Dose:
    outcomes = {
        name: Outcome(
            **{
                **outcome,
                "over": {
                    other: Difference(**{k: math.nan if v is None else v for k, v in d.items()})
                    for other, d in outcome["over"].items()
                },
            }
        )
        for name, outcome in entry["outcomes"].items()
    }
    return Dose(**{**entry, "outcomes": outcomes})


def forecast(mean_over_std: float, participation_share: float) -> Forecast:
    """What to expect of whitening at a hook: the results at the nearest dose.

    Args:
        mean_over_std: Norm of the mean over the root of the total variance.
        participation_share: Participation ratio of the covariance over the width, in (0, 1].
    """
    nearest = min(evidence(), key=lambda dose: dose.distance(mean_over_std, participation_share))
    return Forecast(nearest, nearest.distance(mean_over_std, participation_share))
