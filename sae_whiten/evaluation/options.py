"""Options that commands on finished SAEs share: each field is a flag, with its help."""

from dataclasses import dataclass

from sae_whiten._checks import require_number

__all__ = ["SequenceOptions"]


@dataclass(frozen=True)
class SequenceOptions:
    """How the dataset is cut into sequences and batches for the model.

    Raises:
        FieldError: A size is below 1.
    """

    context_size: int | None = None
    """Tokens per sequence (default: the smallest of the SAEs' metadata)."""

    prepend_bos: bool | None = None
    """Put the beginning-of-sequence token in front (default: as in training)."""

    batch_size_prompts: int = 16
    """Sequences per pass of the model."""

    def __post_init__(self) -> None:
        if self.context_size is not None:
            require_number("context_size", self.context_size)
        require_number("batch_size_prompts", self.batch_size_prompts)
