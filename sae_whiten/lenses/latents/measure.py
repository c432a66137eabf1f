"""Where the latents of SAEs lie and how often they fire: decoder directions, or activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from numpy import ndarray
from sae_lens.config import HfDataset
from sae_lens.saes.sae import SAE
from scipy.sparse import csr_array, vstack

from sae_whiten.estimation.sources import Model
from sae_whiten.evaluation.metrics import LatentActivity
from sae_whiten.evaluation.model_view import encode_in_parts, run
from sae_whiten.evaluation.saes import flat_heads
from sae_whiten.evaluation.setup import Setup
from sae_whiten.evaluation.tokens import token_batches
from sae_whiten.lenses.latents.embedding import (
    ACTIVATIONS,
    DECODER,
    LatentSpace,
    LatentVectors,
    embed_latents,
)
from sae_whiten.lenses.options import LatentOptions

__all__ = ["FiringRates", "latent_space", "measure_firing"]


@dataclass(frozen=True, eq=False)
class FiringRates:
    """When the latents of an SAE are active.

    Attributes:
        firing_rates: Share of tokens in which each latent is active, shape (d_sae,), float64.
        n_tokens: Number of tokens measured, without special tokens and positions that do not count;
            None if unknown.
        tokens: Name of this selection of tokens: SAEs with the same were measured at the same
            positions.
        activations: Activation of each latent at each token, shape (d_sae, n_tokens), float32; None
            if they were not kept.
    """

    firing_rates: Float[ndarray, "d_sae"]
    n_tokens: int | None = None
    tokens: str = ""
    activations: csr_array | None = None


@torch.no_grad()
def measure_firing(
    saes: Mapping[str, SAE[Any]],
    model: Model,
    dataset: HfDataset | str,
    options: LatentOptions | None = None,
) -> dict[str, FiringRates]:
    """When the latents of SAEs are active on a model, in one pass over the tokens for all of them.

    Args:
        saes: SAEs for raw activations, by name.
        model: As SAELens loads it.
        dataset: Tokens or text, as for SAELens.
        options: Which tokens, and whether activations are wanted too; the defaults if None.

    Raises:
        ValueError: An SAE is of another model or hook, is not for raw activations, or the SAEs'
            metadata contradict each other; the dataset is shorter than one sequence, or no token
            of it counts.
    """
    if not saes:
        raise ValueError("no SAEs to measure")
    options = options or LatentOptions()
    activations = options.of == "activations"
    setup = Setup.of(saes, model, options)
    views = setup.views
    activity = {name: LatentActivity() for name in saes}
    kept_activations: dict[str, list[csr_array]] = {name: [] for name in saes}
    with flat_heads(saes.values()):
        for tokens in token_batches(
            saes, model, dataset, options.n_tokens, setup.reading, "Activations of latents"
        ):
            _, at_hooks = run(model, tokens, setup.hook_names, logits=False)
            for name, sae in saes.items():
                kept, x = views[name].kept(tokens), setup.seen(name, at_hooks)
                for rows, latents in encode_in_parts(sae, x):
                    counted = latents[kept[rows].to(latents.device)]
                    activity[name].update(counted)
                    if activations:
                        kept_activations[name].append(csr_array(counted.float().cpu().numpy()))
    # the selection of tokens depends on special tokens and positions, not on the hook
    selections = list(dict.fromkeys((v.seqpos_slice, v.special) for v in views.values()))
    firing = {}
    for name, view in views.items():
        n = activity[name].n_samples
        if n == 0:
            raise ValueError(f"{name}: no token counts; all are special or outside seqpos_slice")
        i = selections.index((view.seqpos_slice, view.special))
        firing[name] = FiringRates(
            activity[name].firing_rates.numpy(),
            n,
            f"{n} tokens" + (f", selection {i + 1}" if len(selections) > 1 else ""),
            vstack(kept_activations[name]).T.tocsr() if activations else None,  # pyright: ignore[reportOptionalMemberAccess]
        )
    return firing


def latent_space(
    saes: Mapping[str, SAE[Any]],
    firing: Mapping[str, FiringRates],
    options: LatentOptions | None = None,
    source: Mapping[str, Any] | None = None,
) -> LatentSpace:
    """Embed the latents of SAEs in the plane.

    Decoder directions are embedded together for SAEs of one hook, because these lie in one space.
    Activations are embedded together for all SAEs that were measured on the same tokens, of any
    hook; dead latents have none and are left out.

    Args:
        saes: By name.
        firing: When the latents are active, by name of the SAE; with activations, if these are to
            be embedded.
        options: What is embedded, and how; the defaults if None.
        source: Where the firing rates come from, see `LatentSpace`.

    Raises:
        ValueError: What is to be embedded is missing, or as in `embed_latents`.
    """
    options = options or LatentOptions()
    by_decoder, vectors = options.of == "decoder", []
    for name, sae in saes.items():
        rates = firing[name].firing_rates
        if by_decoder:
            rows = sae.W_dec.detach().float().cpu().numpy()
            vectors.append(LatentVectors(name, _decoder_space(name, sae), rows, rates))
            continue
        activations = firing[name].activations
        if activations is None:
            raise ValueError(f"{name}: no activations; measure_firing with of='activations'")
        vectors.append(LatentVectors(name, firing[name].tokens, activations, rates))
    maps = embed_latents(vectors, options)
    kind = DECODER if by_decoder else ACTIVATIONS
    return LatentSpace(kind, options.seed, maps, source or {})


def _decoder_space(name: str, sae: SAE[Any]) -> str:
    """A name for the space of an SAE's decoder rows: the same for SAEs that share it."""
    metadata = sae.cfg.metadata
    # transcoders write to another hook than they read
    hook = metadata.hook_name_out or metadata.hook_name or f"the unknown hook of {name}"
    head = "" if metadata.hook_head_index is None else f" head {metadata.hook_head_index}"
    model = f" of {metadata.model_name}" if metadata.model_name else ""
    return f"{hook}{head}{model}, width {sae.W_dec.shape[1]}"
