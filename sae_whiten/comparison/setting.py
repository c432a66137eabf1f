"""What all parts of a comparison share: the model, the rows, the names and the folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_whiten.comparison.files import saes_folder
from sae_whiten.comparison.plan import Comparison
from sae_whiten.estimation.sources import Model
from sae_whiten.evaluation.labels import LabelledTexts
from sae_whiten.evaluation.sae_probes import ProbingTasks

__all__ = ["Setting"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A comparison with what it is made on and where it is written.

    Attributes:
        comparison: What is compared.
        model: As SAELens loads it.
        training_rows: Rows to train on.
        held_out: Rows to evaluate on.
        labels: Texts or tasks to probe with. None: no probing.
        model_names: model_name, model_class_name and model_from_pretrained_kwargs, for metadata.
        dataset_path: Name of the dataset, for metadata.
        out: Folder that receives the SAEs, and meanwhile their checkpoints.
        statistics: File of the statistics of the activations.
    """

    comparison: Comparison
    model: Model
    training_rows: Any
    held_out: Any
    labels: LabelledTexts | ProbingTasks | None
    model_names: Mapping[str, Any]
    dataset_path: str
    out: Path
    statistics: Path

    def saes(self, seed: int) -> Path:
        """Folder of the SAEs of one seed, each in a folder of its name."""
        return saes_folder(self.out, seed)
