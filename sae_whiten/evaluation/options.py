"""Options of evaluations. Other commands share some. Each field is a flag too, with its help."""

from dataclasses import dataclass

from sae_whiten._checks import require_number

__all__ = ["EvaluationOptions", "SequenceOptions"]


@dataclass(frozen=True, kw_only=True)
class SequenceOptions:
    """How the dataset is cut into sequences and batches for the model.

    Raises:
        FieldError: A size is out of range.
    """

    context_size: int | None = None
    """Tokens per sequence (default: the smallest of the SAEs' metadata)."""

    prepend_bos: bool | None = None
    """Begin sequences with the beginning-of-sequence token (default: as in training)."""

    batch_size_prompts: int = 16
    """Sequences per pass of the model."""

    def __post_init__(self) -> None:
        if self.context_size is not None:
            # the loss of a model is that of predicting a token from another
            require_number("context_size", self.context_size, 2)
        require_number("batch_size_prompts", self.batch_size_prompts)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(SequenceOptions):
    """What SAEs are evaluated on, and how they are probed.

    Raises:
        FieldError: A number is out of range.
    """

    n_tokens: int = 65_536
    """Tokens to read from the dataset, special ones included."""

    seed: int = 0
    """First of the seeds that draw texts and rows for probing."""

    probe_seeds: int = 3
    """How many times probing is done, each time with other rows, to know its noise. A label with
    two values has no other rows."""

    tpp_and_scr: bool = False
    """Measure TPP and SCR on labelled texts too. Both have failed tests of their validity
    (arXiv 2605.18229)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("n_tokens", self.n_tokens)
        require_number("probe_seeds", self.probe_seeds)
        require_number("seed", self.seed, 0)
