"""The demo's activations: those of the model, tame, and the same under a map, anisotropic."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from tqdm import tqdm

from sae_whiten.comparison.demo_text import CONTEXT_SIZE, SEQUENCES_PER_BATCH, Text
from sae_whiten.evaluation.labels import LabelledTexts
from sae_whiten.evaluation.model_view import batches_of_equal_length, run, text_tokens

__all__ = ["Activations", "anisotropic_map", "read_activations"]

_HOOK_NAME = "bert.encoder.layer.2"
# The map x' = (x - mean) R diag(s) + m, R a random rotation: s falls by this many powers of ten,
# and |m| is this many times the root of the total variance. Residual streams have similar values.
_DECADES, _MEAN = 2.5, 3.0


@dataclass(frozen=True)
class Activations:
    """Activations at the hook, float32, special tokens left out.

    Attributes:
        train: In random order.
        held_out: Of other modules.
        of_texts: Of the labelled texts.
        text: Of each row of `of_texts`, the number of its text.
    """

    train: Float[Tensor, "n d"]
    held_out: Float[Tensor, "m d"]
    of_texts: Float[Tensor, "t d"]
    text: Integer[Tensor, "t"]

    def mapped(self, forward: Callable[[Tensor], Tensor]) -> "Activations":
        """The same activations, each mapped by `forward`."""
        return Activations(
            forward(self.train), forward(self.held_out), forward(self.of_texts), self.text
        )


def read_activations(
    model: Any, text: Text, labels: LabelledTexts, n_tokens: int, seed: int
) -> Activations:
    """Run the model.

    Args:
        model: As SAELens loads it, with its tokenizer.
        text: What is trained on, and what is held out.
        labels: The labelled texts.
        n_tokens: Activations to train on, at most.
        seed: Of their order.
    """

    def at_hook(sequences: Sequence[Sequence[int]]) -> Tensor:
        with torch.no_grad():
            _, activations = run(model, torch.tensor(sequences), [_HOOK_NAME], logits=False)
        return activations[_HOOK_NAME][:, 1:-1]  # without [CLS] and [SEP]

    train = text.train[: math.ceil(n_tokens / (CONTEXT_SIZE - 2))]
    texts = text_tokens(
        model.tokenizer, labels.train.texts + labels.test.texts, CONTEXT_SIZE, False
    )
    rows_of: dict[str, list[Tensor]] = {"train": [], "held_out": [], "of_texts": [], "text": []}
    n = len(train) + len(text.held_out) + len(texts)
    with tqdm(total=n, desc="Computing activations", unit=" sequences", leave=False) as bar:
        for name, sequences in (("train", train), ("held_out", text.held_out)):
            for start in range(0, len(sequences), SEQUENCES_PER_BATCH):
                rows = sequences[start : start + SEQUENCES_PER_BATCH]
                rows_of[name].append(at_hook(rows).flatten(0, 1))
                bar.update(len(rows))
        for batch in batches_of_equal_length(texts, SEQUENCES_PER_BATCH):
            x = at_hook([texts[i] for i in batch])
            rows_of["of_texts"].append(x.flatten(0, 1))
            rows_of["text"].append(torch.tensor(batch).repeat_interleave(x.shape[1]))
            bar.update(len(batch))
    parts = {name: torch.cat(rows) for name, rows in rows_of.items()}
    order = torch.randperm(len(parts["train"]), generator=torch.Generator().manual_seed(seed))
    parts["train"] = parts["train"][order][:n_tokens]
    return Activations(**parts)


def anisotropic_map(x: Float[Tensor, "n d"]) -> Callable[[Tensor], Tensor]:
    """The map of `_DECADES` and `_MEAN`. It keeps the total variance."""
    generator = torch.Generator().manual_seed(0)
    centre, d = x.double().mean(0), x.shape[1]
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    matrix = rotation * torch.logspace(0, -_DECADES, d, dtype=torch.float64)
    variance = (x.double() - centre).square().sum(1).mean()
    matrix *= (variance / ((x.double() - centre) @ matrix).square().sum(1).mean()).sqrt()
    direction = torch.randn(d, generator=generator, dtype=torch.float64)
    shift = _MEAN * variance.sqrt() * direction / direction.norm()
    return lambda rows: ((rows.double() - centre) @ matrix + shift).float()
