"""What all parts of an evaluation share: the SAEs, their views of a model, and how it reads."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Integer
from sae_lens.saes.sae import SAE
from torch import Tensor

from sae_whiten.estimation.sources import Model
from sae_whiten.evaluation.model_view import (
    View,
    activations_of_texts,
    require_kept_tokens,
    text_tokens,
)
from sae_whiten.evaluation.options import SequenceOptions
from sae_whiten.evaluation.tokens import Reading

__all__ = ["Setup"]


@dataclass(frozen=True)
class Setup:
    """SAEs on a model.

    Attributes:
        saes: SAEs by name.
        views: The view of each SAE, by its name.
        model: As SAELens loads it.
        reading: How the model reads, for all SAEs alike.
    """

    saes: Mapping[str, SAE[Any]]
    views: Mapping[str, View]
    model: Model
    reading: Reading

    @classmethod
    def of(cls, saes: Mapping[str, SAE[Any]], model: Model, options: SequenceOptions) -> "Setup":
        """The setup that the options and the metadata of the SAEs describe; errors of `Reading`."""
        reading = Reading.of(saes, model, options)
        views = {name: View.of(sae, model.tokenizer) for name, sae in saes.items()}
        return cls(saes, views, model, reading)

    @property
    def hook_names(self) -> set[str]:
        """The hooks that the SAEs read."""
        return {view.hook_name for view in self.views.values()}

    def seen(self, name: str, activations: Mapping[str, Tensor]) -> Float[Tensor, "batch seq d"]:
        """What one SAE reads of the activations, which are given by the name of the hook.

        Raises:
            ValueError: The SAE has another input width.
        """
        view = self.views[name]
        x = view.seen(activations[view.hook_name])
        view.check_width(name, self.saes[name], x)
        return x

    def text_tokens(
        self, texts: Sequence[str], unit: str, *, keep_end: bool = False
    ) -> list[list[int]]:
        """Token ids of each text, cut to the context: its beginning, or its end if `keep_end`.

        Raises:
            ValueError: The model has no tokenizer, or an SAE keeps no token of a text. The message
                says to leave out `unit` (see `require_kept_tokens`).
        """
        size, prepend_bos = self.reading.context_size, self.reading.prepend_bos
        tokens = text_tokens(self.model.tokenizer, texts, size, prepend_bos, keep_end=keep_end)
        require_kept_tokens(self.views, texts, tokens, size, unit)
        return tokens

    def activations_of_texts(
        self, tokens: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], Integer[Tensor, "batch seq"], dict[str, Tensor]]]:
        """Indices of texts, their tokens, and activations by the name of the hook, in batches."""
        return activations_of_texts(self.model, tokens, self.hook_names, self.reading.batch_size)
