"""The options of a comparison: each field is a flag of `sae-whiten compare` too, with its help."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ComparisonOptions"]


@dataclasses.dataclass(frozen=True)
class ComparisonOptions:
    """What is compared, and how the SAEs are trained. Checked by `Comparison`.

    The unit of the activations is not the same under all conditions: none and centred leave them in
    the model's own, and half does in part. One learning rate for all is not adapted to it: where
    their variance is far from 1, some of a difference to other conditions is one of scale, and
    `learning_rates` are to be tried.
    """

    hook_name: str
    """The hook whose activations the SAEs are trained on."""

    conditions: Sequence[str] = ("none", "centred", "whitened", "original", "half")
    """Names of conditions. Those that an architecture cannot be trained under are left out for it
    (`Comparison.left_out`)."""

    architectures: Sequence[str] = ("topk", "standard")
    """Names of SAELens' training architectures, this package's topk_vsae and top_afa among them."""

    sparsity: Sequence[int] = (16, 32, 64)
    """k of each SAE, where the architecture has one; where it has a sparsity coefficient, the L0 at
    which metrics are interpolated between SAEs of different coefficients. SAEs that have neither,
    such as top_afa, are compared at the L0 that they come to."""

    coefficients: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0)
    """Sparsity coefficients of architectures without k (l1_coefficient of standard and gated,
    l0_coefficient of jumprelu), as for activations of variance 1: they are multiplied by the root
    mean variance of what the SAE sees, and divided by that of its loss, so that one sweep covers
    similar L0 under all conditions."""

    sweep_rounds: int = 2
    """How often further coefficients are trained, where no two neighbours of a sweep have the
    wanted L0 between them and are within a factor of 2 of each other."""

    sae_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Further fields of the training configs by architecture, for all its SAEs, such as
    {"topk_vsae": {"variance": "fixed", "initial_logvar": -5}}. They replace what the comparison
    would choose, and are taken as they are: only kl_coefficient is adapted to the unit of the
    activations, like the sparsity coefficients."""

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
    """Learning rates to try: every architecture and condition is trained briefly at each, and then
    at that which explains most variance of held-out activations in the space of its loss. None:
    all take the learning rate above."""

    context_size: int = 128
    """Tokens per sequence."""

    prepend_bos: bool = True
    """Whether sequences begin with the beginning-of-sequence token."""

    exclude_special_tokens: bool | list[int] = True
    """Leave out the activations at special tokens, those that the tokenizer names or those with
    these ids; in many models they hold most of the variance."""

    store_batch_size_prompts: int = 16
    """Sequences per pass of the model."""

    held_out_sequences: int = 256
    """Rows, from the beginning of the dataset, that the SAEs are evaluated on instead of being
    trained on; as many sequences of the context size are read from them, and of a long text only
    the beginning."""

    probe_seeds: int = 3
    """How often probing is repeated, with other rows, to know the noise of the measurement."""

    tpp_and_scr: bool = False
    """Measure TPP and SCR too. Both have been shown to mislead (arXiv 2605.18229)."""

    tolerance: float = 0.02
    """Of the statistics: relative excess variance of held-out activations at which their estimation
    ends, as in WhiteningConfig."""

    device: str = "cpu"
    """Where everything runs."""
