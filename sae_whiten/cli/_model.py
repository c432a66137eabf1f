"""The flags of commands that load a model by its name."""

from dataclasses import dataclass
from typing import Any

__all__ = ["ModelOptions"]


@dataclass(frozen=True)
class ModelOptions:
    """What SAELens' `load_model` is told, with its names and defaults."""

    model_name: str
    """Model to load, as in SAELens."""

    model_class_name: str = "HookedTransformer"
    """Its class: HookedTransformer, or AutoModelForCausalLM for any model of transformers."""

    model_from_pretrained_kwargs: dict[str, Any] | None = None
    """Further arguments for loading the model, as in SAELens, such as a revision."""

    def names(self) -> dict[str, Any]:
        """The fields, with the arguments for loading that SAELens' runner has by default."""
        kwargs = self.model_from_pretrained_kwargs
        if kwargs is None:
            hooked = self.model_class_name == "HookedTransformer"
            kwargs = {"center_writing_weights": False} if hooked else {}
        return {
            "model_name": self.model_name,
            "model_class_name": self.model_class_name,
            "model_from_pretrained_kwargs": kwargs,
        }
