"""Norms of inputs and of their sparse codes, at the last token of prompts: see `norms`.

Any SAE for raw activations that SAELens loads can be measured, however it was trained.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.config import HfDataset
from sae_lens.saes.sae import SAE
from sae_lens.util import get_special_token_ids
from torch import Tensor
from tqdm.auto import tqdm

from sae_whiten.estimation.dataset import TEXT_COLUMNS, TOKEN_COLUMNS, open_dataset
from sae_whiten.estimation.sources import Model
from sae_whiten.evaluation.model_view import (
    View,
    decoder_norms,
    encode_decode,
    latent_scale,
    text_tokens,
)
from sae_whiten.evaluation.saes import flat_heads
from sae_whiten.evaluation.setup import Setup
from sae_whiten.evaluation.tokens import Reading
from sae_whiten.lenses.afa.norms import AFASamples, code_norm, nmse, summary
from sae_whiten.lenses.options import AFAOptions

__all__ = ["AFAResult", "evaluate_afa"]

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class AFAResult:
    """Norms and errors of one SAE on the prompts.

    Attributes:
        name: Name of the SAE.
        context: The SAE and its inputs: `architecture`, `d_in`, `d_sae`, `model_name` (of its
            metadata), `hook_name`, `normalize_activations`, `bias_norm`, `context_size`,
            `prepend_bos`.
        samples: Norms and errors, one for each prompt.
        rows: The dataset row of each prompt.
        positions: Position of the measured token in each prompt.
        tokens: Id of the measured token in each prompt.
    """

    name: str
    context: Mapping[str, Any]
    samples: AFASamples
    rows: Sequence[int]
    positions: Sequence[int]
    tokens: Sequence[int]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: None for values that are not finite."""
        samples = self.samples
        columns = {
            "z_norm": samples.z_norm,
            "code_norm": samples.code_norm,
            "eps_lbo": samples.eps_lbo,
            "nmse": samples.nmse,
        }
        return {
            "name": self.name,
            **self.context,
            "summary": summary(samples),
            "prompts": {
                "row": list(self.rows),
                "position": list(self.positions),
                "token": list(self.tokens),
                **{
                    name: [
                        value if finite else None
                        for value, finite in zip(
                            values.tolist(), values.isfinite().tolist(), strict=True
                        )
                    ]
                    for name, values in columns.items()
                },
                "l0": samples.l0.long().tolist(),
            },
        }


@dataclass(frozen=True)
class _Prompt:
    """A row of the dataset, its tokens, and the last token that counts in each view."""

    row: int
    ids: list[int]
    last: Mapping[View, int]


@torch.no_grad()
def evaluate_afa(
    saes: Mapping[str, SAE[Any]],
    model: Model,
    dataset: HfDataset | str,
    options: AFAOptions | None = None,
) -> list[AFAResult]:
    """Norms of inputs and codes, and reconstruction errors, of SAEs on the same prompts.

    Each row of the dataset is one prompt, cut to the context; texts are not joined. Each prompt
    gives one sample: its last token that is not special, at a position the SAE was trained on.
    Norms are of the inputs as the SAE's encoder gets them, normalised if the SAE normalises;
    errors are of activations in their own space.

    Args:
        saes: SAEs for raw activations, each at the hook of its metadata, by the names they get.
        model: As SAELens loads it: a HookedTransformer, a TransformerBridge, or its wrapper of
            Hugging Face models.
        dataset: Rows with tokens ("tokens", "input_ids") or with text ("text", "problem"), as for
            SAELens; or a path of such a dataset. Rows without any token that counts are skipped.
            Rows with tokens are used as they are, whatever `prepend_bos` says.
        options: Which prompts; the defaults if None.

    Returns:
        A result for each SAE, in their order.

    Raises:
        ValueError: An SAE is of another model or hook, is not for raw activations, has only one
            latent, or its reconstruction is not its latents times its decoder plus a bias; the
            SAEs' metadata contradict each other; the dataset has no prompts; or an activation is
            not finite.
    """
    if not saes:
        raise ValueError("no SAEs to evaluate")
    options = options or AFAOptions()
    setup = Setup.of(saes, model, options)
    for name, sae in saes.items():
        _check_architecture(name, sae)
    # special tokens never count here, even if an SAE was trained on them: most prompts end with one
    special = get_special_token_ids(model.tokenizer)  # pyright: ignore[reportArgumentType]
    views = {
        name: replace(view, special=tuple(sorted({*view.special, *special})))
        for name, view in setup.views.items()
    }
    setup, reading = replace(setup, views=views), setup.reading
    prompts = _read_prompts(model, dataset, set(views.values()), options.n_prompts, reading)
    measured = {name: _Measured(name, sae, len(prompts)) for name, sae in saes.items()}
    with (
        flat_heads(saes.values()),
        tqdm(desc="Running prompts", total=len(prompts), unit=" prompts") as bar,
    ):
        for indices, _, activations in setup.activations_of_texts([p.ids for p in prompts]):
            for name, view in views.items():
                x = setup.seen(name, activations)
                last = [prompts[i].last[view] for i in indices]
                measured[name].update(
                    indices, x[range(len(indices)), last], [prompts[i].row for i in indices]
                )
            bar.update(len(indices))
    return [
        AFAResult(
            name=name,
            context={
                "architecture": sae.cfg.architecture(),
                "d_in": sae.cfg.d_in,
                "d_sae": sae.cfg.d_sae,
                "model_name": sae.cfg.metadata.model_name,
                "hook_name": views[name].hook_name,
                "normalize_activations": sae.cfg.normalize_activations,
                "bias_norm": measured[name].bias_norm,
                "context_size": reading.context_size,
                "prepend_bos": reading.prepend_bos,
            },
            samples=measured[name].samples(),
            rows=[prompt.row for prompt in prompts],
            positions=[prompt.last[views[name]] for prompt in prompts],
            tokens=[prompt.ids[prompt.last[views[name]]] for prompt in prompts],
        )
        for name, sae in saes.items()
    ]


class _Measured:
    """Norms and errors of one SAE, prompt by prompt."""

    def __init__(self, name: str, sae: SAE[Any], n: int) -> None:
        self.bias_norm = 0.0
        self._name, self._sae = name, sae
        self._scale = latent_scale(sae).cpu()
        self._columns = torch.full((4, n), torch.nan, dtype=torch.float64)
        self._checked = False

    def update(self, indices: Sequence[int], x: Float[Tensor, "n d"], rows: Sequence[int]) -> None:
        """Add activations, one for each prompt; `rows` are for messages."""
        finite = x.isfinite().all(1).tolist()
        if not all(finite):
            raise ValueError(
                f"the model's activations at {self._sae.cfg.metadata.hook_name} hold a NaN or an "
                f"infinity: row {rows[finite.index(False)]} of the dataset"
            )
        # normalised as the SAE does it; encoding, below, repeats this and sets the state that the
        # decoder needs
        z_norm = torch.linalg.vector_norm(
            self._sae.run_time_activation_norm_fn_in(x.cpu().double()), dim=1
        )
        for part, latents, x_hat in encode_decode(self._sae, x[:, None]):
            latents, x_hat = latents[:, 0], x_hat[:, 0]
            if not self._checked:
                self._check(x[:1], latents[:1], x_hat[:1])
                self._checked = True
            self._columns[:, indices[part]] = torch.stack(
                [
                    z_norm[part],
                    code_norm(latents, self._scale, self.bias_norm),
                    nmse(x[part], x_hat),
                    (latents != 0).sum(1).double().cpu(),
                ]
            )
        if not self._columns[:2, indices].isfinite().all():
            raise ValueError(f"{self._name}: an input or a code has a norm that is not finite")

    def samples(self) -> AFASamples:
        return AFASamples(*self._columns, n_latents=self._sae.cfg.d_sae)

    def _check(
        self,
        x: Float[Tensor, "1 d"],
        latents: Float[Tensor, "1 d_sae"],
        x_hat: Float[Tensor, "1 d"],
    ) -> None:
        """Set `bias_norm`; check that the reconstruction is latents times decoder plus bias."""
        bias = _bias(self._sae, x)
        self.bias_norm = float(torch.linalg.vector_norm(bias))
        active = latents[0].nonzero()[:, 0].cpu()
        norms = decoder_norms(self._sae).clamp(min=1e-8).cpu()[active]
        coefficients = (latents[0].cpu().double() * self._scale)[active] / norms
        z_hat = coefficients @ self._sae.W_dec.cpu().double()[active] + bias
        self._sae.run_time_activation_norm_fn_in(x.cpu().double())
        linear = self._sae.run_time_activation_norm_fn_out(z_hat[None])
        expected = x_hat.cpu().double()
        error = torch.linalg.vector_norm(linear - expected)
        # bfloat16 rounds by 0.004
        scale = torch.linalg.vector_norm(expected) + torch.linalg.vector_norm(coefficients * norms)
        if not error <= 0.02 * (scale + self.bias_norm):
            raise ValueError(
                f"{self._name}: its reconstruction is not its latents times its decoder plus a "
                "bias, and only such codes have a norm that can be compared with the input's"
            )


def _bias(sae: SAE[Any], x: Float[Tensor, "1 d"]) -> Float[Tensor, "d"]:
    """What the decoder adds to every reconstruction, before it undoes a normalisation; float64.

    Not always b_dec: matching pursuit may leave it out.
    """
    outputs: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> None:
        outputs.append(value)

    x = x.to(sae.device, sae.dtype)
    sae.run_time_activation_norm_fn_in(x)
    with sae.hooks(fwd_hooks=[("hook_sae_recons", keep)]):
        sae.decode(torch.zeros(1, sae.cfg.d_sae, device=sae.device, dtype=sae.dtype))
    return outputs[0][0].cpu().double()


def _check_architecture(name: str, sae: SAE[Any]) -> None:
    if sae.cfg.architecture() == "temporal":
        raise ValueError(
            f"{name} is a temporal SAE: it also uses earlier tokens for its reconstruction, so the "
            "norm of one token's code cannot be compared with the input's"
        )
    if sae.cfg.d_sae < 2:
        raise ValueError(f"{name} has {sae.cfg.d_sae} latent: at least two are needed")


# --- prompts


def _read_prompts(
    model: Model,
    dataset: HfDataset | str,
    views: Iterable[View],
    n_prompts: int,
    reading: Reading,
) -> list[_Prompt]:
    """The first prompts in which every view has a token that counts."""
    if isinstance(dataset, str):
        dataset = open_dataset(dataset)
    prompts: list[_Prompt] = []
    n_skipped = 0
    with tqdm(desc="Reading prompts", total=n_prompts, unit=" prompts", leave=False) as bar:
        for row, ids in _tokenised(model, dataset, reading):
            tokens = torch.tensor([ids], dtype=torch.long)
            kept = {view: view.kept(tokens)[0].nonzero() for view in views}
            if not all(len(positions) for positions in kept.values()):
                n_skipped += 1
                continue
            last = {view: int(positions[-1]) for view, positions in kept.items()}
            prompts.append(_Prompt(row, ids, last))
            bar.update()
            if len(prompts) == n_prompts:
                break
    if not prompts:
        raise ValueError(
            f"the dataset has no prompts: of its {n_skipped} rows none has a token that counts"
        )
    if n_skipped:
        logger.info("skipped %d rows without a token that counts", n_skipped)
    if len(prompts) < n_prompts:
        logger.warning("the dataset ended after %d of %d prompts", len(prompts), n_prompts)
    return prompts


def _tokenised(model: Model, dataset: Any, reading: Reading) -> Iterator[tuple[int, list[int]]]:
    """Number and token ids of each row, cut to the context."""
    if isinstance(dataset, dict):
        raise ValueError(f"the dataset has several splits, {', '.join(dataset)}: give one of them")
    # rows in the format that the user has set may lack columns
    rows = enumerate(iter(dataset.with_format(None)))
    column = None
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        column = column or _column(chunk[0][1])
        if column in TOKEN_COLUMNS:
            pad = getattr(model.tokenizer, "pad_token_id", None)
            ids = [_without_padding(row[column], pad)[: reading.context_size] for _, row in chunk]
        else:
            texts = [row[column] or "" for _, row in chunk]
            ids = text_tokens(model.tokenizer, texts, reading.context_size, reading.prepend_bos)
        yield from ((i, row_ids) for (i, _), row_ids in zip(chunk, ids, strict=True))


def _column(row: Mapping[str, Any]) -> str:
    for name in (*TOKEN_COLUMNS, *TEXT_COLUMNS):
        if name in row:
            return name
    raise ValueError(
        f"prompts are rows with a column {', '.join(TOKEN_COLUMNS)} (token ids) or "
        f"{', '.join(TEXT_COLUMNS)}; the dataset has {', '.join(row)}"
    )


def _without_padding(ids: Sequence[int], pad: int | None) -> list[int]:
    """Token ids without the padding at the end, which an encoder without a mask would read."""
    end = len(ids)
    while pad is not None and end and ids[end - 1] == pad:
        end -= 1
    return list(ids[:end])
