"""The options of an estimation: each field is a flag of `sae-whiten fit` too, with its help."""

import dataclasses
from typing import Any, Literal

from sae_whiten._checks import FieldError, require_number
from sae_whiten.config import TOLERANCE_RANGE

__all__ = ["FitConfig", "ReadingConfig", "decisive_fields"]


@dataclasses.dataclass(frozen=True)
class ReadingConfig:
    """How a dataset becomes activations: fields and defaults of SAELens' runner config.

    Training refuses statistics that were made with other values than its own.
    """

    autocast_lm: bool = False
    """Run the model in bfloat16 autocast."""

    split: str = "train"
    """Split of the dataset, if it is given by its path. Training uses "train"; it refuses
    statistics of another split, but accepts a part of it such as "train[:50%]"."""

    streaming: bool = True
    """Stream the dataset instead of downloading it first."""

    context_size: int = 128
    """Tokens per sequence."""

    prepend_bos: bool = True
    """Begin each sequence with the beginning-of-sequence token."""

    disable_concat_sequences: bool = False
    """One document per sequence; documents shorter than the context are dropped."""

    sequence_separator_token: int | Literal["bos", "eos", "sep"] | None = "bos"
    """Token between documents."""

    use_chat_formatting: bool = False
    """Tokenise with the chat template."""

    seqpos_slice: tuple[int | None, ...] = (None,)
    """Positions to use: stop, or start stop, or start stop step; none for an open end."""

    hook_head_index: int | None = None
    """Index of the head to use, for hooks with a head dimension."""

    def __post_init__(self) -> None:
        require_number("context_size", self.context_size)
        object.__setattr__(self, "seqpos_slice", tuple(self.seqpos_slice))
        if not 1 <= len(self.seqpos_slice) <= 3:
            raise FieldError("seqpos_slice", self.seqpos_slice, "must be one to three numbers")

    def reading(self) -> dict[str, Any]:
        """The fields of this class, by name."""
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(ReadingConfig)
        }


@dataclasses.dataclass(frozen=True)
class FitConfig(ReadingConfig):
    """How much is read, and how.

    Raises:
        FieldError: A value cannot work, or two contradict each other.
    """

    tolerance: float = 0.02
    """Stop when the relative excess variance of held-out activations under the whitening is at most
    this at every hook."""

    n_samples: int | None = None
    """Use this many activations per hook instead, rounded up to whole batches."""

    max_samples: int | None = None
    """With tolerance, use at most this many activations per hook; none: 1000 per dimension."""

    batch_size_prompts: int = 32
    """Sequences per pass of the model."""

    exclude_special_tokens: bool | list[int] = False
    """Leave out the activations at special tokens, as training will: those that the tokenizer names
    (BOS, EOS, PAD, SEP), or those with these ids."""

    on_nonfinite: Literal["raise", "skip"] = "raise"
    """What to do with activations that have a NaN or an infinity: raise an error that names the
    position, or skip and count them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least, at_most = TOLERANCE_RANGE
        require_number("tolerance", self.tolerance, least, at_most=at_most, whole=False)
        require_number("batch_size_prompts", self.batch_size_prompts)
        for name in ("n_samples", "max_samples"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name))
        if self.n_samples is not None and self.max_samples is not None:
            problem = "limits the samples that tolerance needs; leave it out with n_samples"
            raise FieldError("max_samples", self.max_samples, problem)
        if self.on_nonfinite not in ("raise", "skip"):
            raise FieldError("on_nonfinite", self.on_nonfinite, "must be 'raise' or 'skip'")


def decisive_fields() -> tuple[str, ...]:
    """The provenance fields that determine the activations of a given text.

    They are the same for shards of one dataset, and for statistics and the SAE trained under them.
    """
    # all but where texts come from and whether they are streamed
    reading = (f.name for f in dataclasses.fields(ReadingConfig))
    return (
        "model_name",
        "model_class_name",
        "model_from_pretrained_kwargs",
        "model_commit",
        "dtype",
        "hook_name",
        "exclude_special_tokens",
        *(name for name in reading if name not in ("split", "streaming")),
    )
