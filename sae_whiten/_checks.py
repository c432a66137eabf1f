"""Refuse impossible settings before anything is loaded, with the name of the field."""

import math
from typing import Any

__all__ = ["FieldError", "require_context", "require_device", "require_number"]


class FieldError(ValueError):
    """A field of a config, or a flag of a command, has a value that cannot work.

    Attributes:
        field: Its name in Python, such as "context_size" or "sae.k".
        value: The value.
        problem: Why this value cannot work, and which would.
    """

    def __init__(self, field: str, value: object, problem: str) -> None:
        super().__init__(f"{field}={value!r}: {problem}")
        self.field, self.value, self.problem = field, value, problem


def require_number(
    field: str,
    value: object,
    least: float = 1,
    *,
    above: float | None = None,
    below: float = math.inf,
    at_most: float = math.inf,
    whole: bool = True,
) -> None:
    """Refuse anything but a finite number in bounds; by default, a positive integer.

    Args:
        field: Name of the field.
        value: The value.
        least: Smallest value.
        above: Smaller than any value; replaces `least`.
        below: Larger than any value.
        at_most: Largest value.
        whole: Whether it must be an integer.

    Raises:
        FieldError: `value` is not such a number.
    """
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    number: Any = value if right else math.nan  # which no comparison passes
    large_enough = number >= least if above is None else number > above
    if not (large_enough and number < below and number <= at_most):
        kind = "a whole number" if whole else "a finite number"
        bounds = f"at least {least:g}" if above is None else f"above {above:g}"
        bounds += f" and below {below:g}" if below < math.inf else ""
        bounds += f" and at most {at_most:g}" if at_most < math.inf else ""
        raise FieldError(field, value, f"must be {kind}, {bounds}")


def require_device(field: str, device: str) -> None:
    """Refuse a device that PyTorch cannot use on this machine.

    Raises:
        FieldError: PyTorch cannot put a tensor there. The message names the usable devices.
    """
    import torch

    try:
        torch.empty(0, device=device)
    # AssertionError: PyTorch was built without CUDA; NotImplementedError: without MPS
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        usable = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            usable.append("mps")
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise FieldError(
            field,
            device,
            f"PyTorch {torch.__version__} cannot use it on this machine ({reason}); "
            f"it can use {', '.join(usable)}",
        ) from error


def require_context(context_size: int, model: Any) -> None:
    """Refuse sequences longer than the model can read; none if its limit is not known.

    Args:
        context_size: Tokens per sequence, the beginning-of-sequence token included.
        model: As SAELens loads it: a `HookedTransformer`, or a wrapped model of transformers.

    Raises:
        FieldError: `context_size` is above the limit.
    """
    longest = _longest_context(model)
    if longest is not None and context_size > longest:
        problem = f"the model reads at most {longest} tokens: set at most {longest}"
        raise FieldError("context_size", context_size, problem)


def _longest_context(model: Any) -> int | None:
    cfg = getattr(model, "cfg", None)
    if getattr(cfg, "positional_embedding_type", None) == "alibi":
        return None
    of_transformers = getattr(getattr(model, "model", None), "config", None)
    for place, name in ((cfg, "n_ctx"), (of_transformers, "max_position_embeddings")):
        found = getattr(place, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return None
