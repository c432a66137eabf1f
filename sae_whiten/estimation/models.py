"""Short errors for models that cannot be loaded."""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_whiten._checks import FieldError
from sae_whiten.estimation.dataset import is_meant_as_path

__all__ = ["naming_model"]


@contextmanager
def naming_model(model_name: str, model_class_name: str) -> Iterator[None]:
    """Say in short why a model cannot be loaded. TransformerLens lists all models that it knows.

    Args:
        model_name: As SAELens' `load_model` takes it.
        model_class_name: As there.

    Raises:
        FieldError: There is no such folder, or TransformerLens knows no such model.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        text, path = str(error), Path(model_name)
        if model_name in text and is_meant_as_path(model_name) and not path.exists():
            raise FieldError("model_name", model_name, "there is no such folder") from None
        _, is_list, known = text.partition("Valid official model names")
        if not is_list:
            raise
        if path.is_dir():
            raise FieldError(
                "model_class_name",
                model_class_name,
                f"loads models that TransformerLens knows by name, and {model_name} is a folder. "
                "AutoModelForCausalLM loads it",
            ) from None
        near = difflib.get_close_matches(model_name, re.findall(r"'(.*?)'", known))
        raise FieldError(
            "model_name",
            model_name,
            "TransformerLens knows no such model"
            + (f"; nearest: {', '.join(near)}" if near else "")
            + ". For one of transformers, set model_class_name to AutoModelForCausalLM",
        ) from None
