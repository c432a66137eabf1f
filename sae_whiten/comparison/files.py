"""Where a comparison keeps what it writes: names in its folder `out`."""

from pathlib import Path

__all__ = [
    "RESULTS_FILE",
    "SCORES_FILE",
    "SETTINGS_FILE",
    "brief_trainings",
    "checkpoints_folder",
    "saes_folder",
    "statistics_folder",
]

RESULTS_FILE = "results.jsonl"
"""Records, one per SAE."""

SETTINGS_FILE = "settings.json"
"""The options, which a repeated comparison must not change."""

SCORES_FILE = "learning_rates.json"
"""Scores by architecture, condition and learning rate, if several rates were tried."""


def saes_folder(out: str | Path, seed: int | None = None) -> Path:
    """Folder of the SAEs of one seed, each in a folder of its name; None: of all seeds."""
    return _of_seed(Path(out) / "saes", seed)


def checkpoints_folder(out: str | Path, seed: int | None = None) -> Path:
    """Folder of the checkpoints of one seed, while its SAEs are trained; None: of all seeds."""
    return _of_seed(Path(out) / "checkpoints", seed)


def statistics_folder(out: str | Path) -> Path:
    """Folder of the statistics of the activations."""
    return Path(out) / "statistics"


def brief_trainings(out: str | Path) -> Path:
    """Folder of the brief trainings at each learning rate, until the best is known."""
    return Path(out) / "learning-rates"


def _of_seed(folder: Path, seed: int | None) -> Path:
    return folder if seed is None else folder / f"seed-{seed}"
