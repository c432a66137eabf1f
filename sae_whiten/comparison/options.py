"""The options of a comparison: each field is a flag of `sae-whiten compare` too, with its help."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ComparisonOptions"]


@dataclasses.dataclass(frozen=True)
class ComparisonOptions:
    """What is compared, and how the SAEs are trained. Checked by `Comparison`.

    Conditions differ in the unit of the activations: none and centred keep that of the model, half
    keeps it in part. One learning rate does not suit all units. Where the variance is far from 1,
    part of a difference between conditions is one of scale: then give `learning_rates`.
    """

    hook_name: str
    """The hook whose activations the SAEs are trained on."""

    conditions: Sequence[str] = ("none", "centred", "whitened", "original", "half")
    """Names of conditions. If an architecture cannot be trained under one, it is left out there
    (`Comparison.left_out`)."""

    architectures: Sequence[str] = ("topk", "standard")
    """Names of SAELens' training architectures, this package's topk_vsae and top_afa among them."""

    sparsity: Sequence[int] = (16, 32, 64)
    """k of each SAE, if the architecture has one. If it has a sparsity coefficient: the L0 at which
    metrics are interpolated between SAEs of different coefficients. If it has neither, such as
    top_afa, SAEs are compared at the L0 that they reach."""

    coefficients: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0)
    """Sparsity coefficients of architectures without k (l1_coefficient of standard and gated,
    l0_coefficient of jumprelu), for activations of variance 1. They are rescaled to the variance of
    the activations and of the loss, so that one sweep covers similar L0 under all conditions."""

    sweep_rounds: int = 2
    """How many times at most coefficients are added to a sweep. They are added if no two neighbours
    with L0 within a factor of 2 enclose the wanted L0."""

    sae_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Further fields of the training configs, by architecture, such as
    {"topk_vsae": {"variance": "fixed", "initial_logvar": -5}}. They replace what the comparison
    would choose. Only kl_coefficient is rescaled, like the sparsity coefficients."""

    seeds: Sequence[int] = (0, 1, 2)
    """Seeds of the order of the data and of the initial weights."""

    d_sae: int | None = None
    """Latents of each SAE; None: 8 times the width of the activations."""

    training_tokens: int = 2_000_000
    """Activations that every SAE is trained on."""

    train_batch_size_tokens: int = 4096
    """Activations per training step."""

    lr: float = 3e-4
    """Learning rate."""

    learning_rates: Sequence[float] = ()
    """Learning rates to try. Every architecture and condition is trained briefly at each, and then
    in full at the best: the one that explains most variance of held-out activations in the space
    of the loss. If empty, all are trained at lr."""

    context_size: int = 128
    """Tokens per sequence."""

    prepend_bos: bool = True
    """Whether sequences begin with the beginning-of-sequence token."""

    exclude_special_tokens: bool | list[int] = True
    """Leave out activations at special tokens: those that the tokenizer names, or those with these
    ids. In many models they hold most of the variance."""

    store_batch_size_prompts: int = 16
    """Sequences per pass of the model."""

    held_out_sequences: int = 256
    """Rows at the beginning of the dataset that are kept for evaluation. As many sequences of the
    context size are read from them; of a long text, only the beginning."""

    probe_seeds: int = 3
    """How many times probing is done, each time with other rows, to know its noise. A label with
    two values has no other rows."""

    tpp_and_scr: bool = False
    """Measure TPP and SCR too. Both have been shown to mislead (arXiv 2605.18229)."""

    tolerance: float = 0.02
    """The estimation of the statistics ends at this relative excess variance of held-out
    activations, as in WhiteningConfig."""

    device: str = "cpu"
    """Where everything runs."""
