"""Checkpoints that SAELens wrote under its own `normalize_activations="covariance_whitening"`.

SAELens saves checkpoints during training with weights in whitened coordinates, and the whitening
beside them, in `activation_whitening.safetensors`. Opened as they are, they run on raw activations
and are wrong. At the end it folds the whitening in and drops it. A run that is resumed from its
final checkpoint estimates another whitening and folds that in as well.

So the weights are in one of three states: *whitened*, *folded* (a plain SAE) and *folded-twice*.
The config claims one of the first two, and is wrong about SAEs of resumed runs. Two tests show the
state:

- In the coordinates that an SAE was trained in, the encoder and decoder directions of a latent are
  similar, because they start as the same vector. A fold multiplies one by W and the other by its
  inverse, which turns them apart. So the cosine between them is largest in whitened coordinates.
- For only one of the states, the resulting SAE explains any variance of raw activations. Without
  raw activations, Gaussian ones with the whitening's mean and covariance are used.

If the two disagree, or contradict the config, nothing is guessed: the caller has to give the state.
"""

import copy
import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.config import HfDataset
from sae_lens.constants import (
    ACTIVATION_WHITENING_FILENAME,
    SAE_CFG_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAE
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_whiten._checks import FieldError
from sae_whiten._files import CorruptFileError, check_writable
from sae_whiten.architectures.description import describe
from sae_whiten.architectures.folding import (
    FoldError,
    fold_whitening_into_weights,
    unfold_whitening_from_weights,
    why_not_foldable,
)
from sae_whiten.config import WhiteningConfig
from sae_whiten.estimation.sources import (
    ActivationSource,
    CachedActivations,
    Model,
    ModelActivations,
)
from sae_whiten.estimation.stopping import flatten_heads
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.training.checkpoint import TRAINING_STATE_DIR, replacing_sae
from sae_whiten.whitening import Whitening

__all__ = [
    "STATES",
    "Diagnosis",
    "FoldedCheckpoint",
    "State",
    "UnclearStateError",
    "cached_activations",
    "diagnose",
    "fold_builtin_checkpoint",
    "load_builtin_checkpoint",
    "load_builtin_whitening",
    "model_activations",
]

State = Literal["whitened", "folded", "folded-twice"]
STATES: tuple[State, ...] = get_args(State)

# as SAELens has it
_CONFIG = WhiteningConfig(kind="pca", eps=1e-3, eps_mode="absolute", shrinkage=0.0)
_N_ACTIVATIONS = 1024
_LEAST_ALIGNMENT_MARGIN = 0.05


class UnclearStateError(FieldError):
    """The state of the weights is unclear, or contradicts the config; it has to be given."""

    def __init__(self, problem: str) -> None:
        super().__init__("state", None, f"{problem}. Give the state: {', '.join(STATES)}")


@dataclass(frozen=True)
class Diagnosis:
    """Evidence of the state that weights are in.

    Attributes:
        alignment: By assumed state: the median over latents of the cosine between encoder and
            decoder direction, in the whitened coordinates of that state.
        explained_variance: By assumed state: explained variance of the resulting plain SAE. Only
            for states that can be converted to one.
        source: Where the activations for `explained_variance` came from.
    """

    alignment: Mapping[State, float]
    explained_variance: Mapping[State, float]
    source: str

    @property
    def state(self) -> State | None:
        """The state if both figures single out the same one, else None."""
        first, second = sorted(self.alignment.values(), reverse=True)[:2]
        by_alignment = max(self.alignment, key=self.alignment.__getitem__)
        by_variance = max(self.explained_variance, key=self.explained_variance.__getitem__)
        if first - second < _LEAST_ALIGNMENT_MARGIN:
            return None
        if by_alignment not in self.explained_variance:
            # there is no SAE of this state to test, so the others must be worthless
            worthless = all(explained < 0 for explained in self.explained_variance.values())
            return by_alignment if worthless else None
        agree = by_alignment == by_variance and self.explained_variance[by_variance] > 0
        return by_alignment if agree else None

    def __str__(self) -> str:
        aligned = ", ".join(f"{state} {value:.2f}" for state, value in self.alignment.items())
        explained = ", ".join(
            f"{state} {value:.3g}" for state, value in self.explained_variance.items()
        )
        return (
            f"alignment of encoder and decoder if the weights are {aligned}; explained variance "
            f"of {self.source} activations if they are {explained}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class FoldedCheckpoint:
    """A plain SAE, and how it was made from a checkpoint.

    Attributes:
        sae: For raw activations; `cfg.metadata.whitening` records what was done.
        state: The state that the weights were in.
        given: Whether that state was given by the caller.
        diagnosis: Evidence from the weights; None without a whitening and activations.
    """

    sae: SAE[Any]
    state: State
    given: bool
    diagnosis: Diagnosis | None


def fold_builtin_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    whitening: str | Path | None = None,
    state: State | None = None,
    activations: Float[Tensor, "n d_in"] | None = None,
    device: str = "cpu",
) -> FoldedCheckpoint:
    """Make a plain SAE of a checkpoint of SAELens' own whitening, and save it.

    Weights in whitened coordinates are folded, in float64, and the fold is proved. One of two folds
    is undone, which needs the whitening of the second. A plain SAE is only copied.

    Args:
        path: The folder of the checkpoint, or of an SAE that SAELens saved at the end of training.
        out: Where to write: an SAE for inference that plain SAELens opens.
        whitening: The file `activation_whitening.safetensors` or the folder that it is in; None
            takes the one beside the weights.
        state: State of the weights; None: recognise it.
        activations: Raw activations to recognise the state and to prove the fold on; None: Gaussian
            ones with the whitening's mean and covariance.
        device: Where to compute.

    Raises:
        FileNotFoundError: There is no SAE.
        CorruptFileError: A file is damaged, or is not what its name says.
        UnclearStateError: The state is unclear, or contradicts the config.
        FieldError: A whitening is needed and there is none, or a width does not fit.
        FoldError: No whitening can be folded into this architecture, sae-whiten folded it already,
            the fold failed its proof, or a BatchTopK SAE was folded twice and there are no
            `activations` to find its threshold on.
        OSError: Nothing can be written to `out`.
    """
    path, out = Path(path), Path(out)
    if out.exists() and path.exists() and out.samefile(path):
        raise ValueError(f"{out} is the checkpoint itself: choose another folder to write to")
    check_writable(out)
    sae = load_builtin_checkpoint(path, device)
    file = _whitening_file(path, whitening)
    loaded_whitening = None if file is None else load_builtin_whitening(file)
    plain = _plain_sae(sae, loaded_whitening, state, activations)
    with replacing_sae(out) as new:
        if isinstance(plain.sae, TrainingSAE):
            plain.sae.save_inference_model(new)
        else:
            plain.sae.save_model(new)
        if (path / SPARSITY_FILENAME).is_file():
            shutil.copyfile(path / SPARSITY_FILENAME, new / SPARSITY_FILENAME)
    return plain


def load_builtin_checkpoint(path: str | Path, device: str = "cpu") -> SAE[Any]:
    """The SAE in a folder that SAELens wrote, with its training config if it has one.

    Raises:
        FileNotFoundError: There is none; names the folders below that hold one.
        CorruptFileError: SAELens cannot load it.
        FoldError: sae-whiten wrote it, or no whitening can be folded into it.
    """
    path = Path(path)
    if not (path / SAE_CFG_FILENAME).is_file():
        below = sorted(str(file.parent) for file in path.glob(f"**/{SAE_CFG_FILENAME}"))
        listed = f"; give one of {', '.join(below)}" if below else ""
        raise FileNotFoundError(f"{path} holds no SAE (there is no {SAE_CFG_FILENAME}){listed}")
    if (path / TRAINING_STATE_DIR).is_dir():
        raise FoldError(f"{path} is a checkpoint of sae-whiten: the SAE in it is a plain one")
    try:
        cfg = json.loads((path / SAE_CFG_FILENAME).read_text())
        cls = TrainingSAE if _has_training_config(cfg) else SAE
        sae = cls.load_from_disk(path, device=device)
    except (
        AttributeError,
        KeyError,
        RuntimeError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:
        raise CorruptFileError(f"{path} is not an SAE that SAELens can load ({error})") from error
    if sae.cfg.metadata.whitening is not None:
        raise FoldError(f"{path} was folded by sae-whiten already (cfg.metadata.whitening)")
    reason = why_not_foldable(sae)
    if reason is not None:
        raise FoldError(f"{path}: whitening cannot be folded into {reason}")
    if sae.cfg.normalize_activations not in ("covariance_whitening", "none"):
        raise FoldError(
            f"{path} was trained with normalize_activations={sae.cfg.normalize_activations!r}, not "
            "under SAELens' covariance_whitening: there is no whitening to fold"
        )
    return sae


def _has_training_config(cfg: Mapping[str, Any]) -> bool:
    name = cfg["architecture"]
    if name not in SAE_TRAINING_CLASS_REGISTRY or name not in SAE_CLASS_REGISTRY:
        return name in SAE_TRAINING_CLASS_REGISTRY
    training, inference = (
        {field.name for field in dataclasses.fields(registry[name][1])}
        for registry in (SAE_TRAINING_CLASS_REGISTRY, SAE_CLASS_REGISTRY)
    )
    return not (training - inference).isdisjoint(cfg)


def load_builtin_whitening(path: str | Path) -> Whitening:
    """Read the file `activation_whitening.safetensors` of SAELens.

    It does not say how many activations it was estimated from: `n_samples` is 0.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptFileError: It is damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        tensors = load_file(path)
        mean, W, W_inv = (tensors[n].double() for n in ("mean", "matrix", "inverse_matrix"))
    except (KeyError, SafetensorError) as error:
        raise CorruptFileError(f"{path} is not a whitening of SAELens ({error})") from error
    shape = (*mean.shape, *mean.shape)
    if mean.ndim != 1 or W.shape != shape or W_inv.shape != shape:
        raise CorruptFileError(f"{path} is not a whitening of SAELens: its shapes do not fit")
    inverse_error = (W @ W_inv - torch.eye(len(mean), dtype=torch.float64)).abs().max()
    if not inverse_error < 1e-3 or not mean.isfinite().all():
        raise CorruptFileError(f"{path} is damaged: its two matrices are no inverses")
    # W_inv = diag(eigenvalues)^(1/2) E^T
    eigenvalues = W_inv.square().sum(1)
    return Whitening(
        mean=mean,
        W=W,
        W_inv=W_inv,
        eigenvalues=eigenvalues,
        covariance_eigenvalues=(eigenvalues - _CONFIG.eps).clamp(min=0),
        config=_CONFIG,
        shrinkage=0.0,
        n_samples=0,
    )


def diagnose(
    sae: SAE[Any],
    whitening: Whitening | None,
    activations: Float[Tensor, "n d_in"] | None = None,
) -> Diagnosis:
    """Recognise the state of an SAE's weights.

    Args:
        sae: Not changed.
        whitening: Of the last fold, or of the fold that is missing. None: one is estimated from the
            activations, which is enough to recognise states, not to convert between them.
        activations: Raw activations; None takes Gaussian ones with the whitening's mean and
            covariance.

    Raises:
        ValueError: There is neither a whitening nor activations.
    """
    source = "given"
    if activations is None:
        if whitening is None:
            raise ValueError("recognising the state needs a whitening or activations")
        activations, source = _gaussian(whitening), "Gaussian"
    reference = whitening or _estimated(activations)
    W, W_inv = (each.to(sae.W_enc.device) for each in (reference.W, reference.W_inv))
    encoder, decoder = sae.W_enc.detach().double(), sae.W_dec.detach().double()
    alignment: dict[State, float] = {}
    for state in STATES:
        cosines = torch.nn.functional.cosine_similarity(encoder.T, decoder, dim=1)
        alignment[state] = float(cosines.median())
        encoder, decoder = W_inv @ encoder, decoder @ W
    can_be_made: tuple[State, ...] = STATES if whitening is not None else ("folded",)
    explained: dict[State, float] = {
        state: _explained_variance(_made_plain(sae, whitening, state), activations)
        for state in can_be_made
    }
    return Diagnosis(alignment, explained, source)


def cached_activations(sae: SAE[Any], path: str | Path, n: int) -> Float[Tensor, "n d_in"]:
    """The first `n` activations at an SAE's hook that SAELens' `CacheActivationsRunner` wrote.

    Raises:
        FileNotFoundError: There is no such cache.
        ValueError: It has no such hook, or no activations.
    """
    source = CachedActivations(path, sae.cfg.metadata.hook_name or "**")
    return _first_activations(source, sae.cfg.d_in, n)


def model_activations(
    sae: SAE[Any], model: Model, dataset: HfDataset | str, n: int
) -> Float[Tensor, "n d_in"]:
    """The first `n` activations of a dataset at an SAE's hook, read as the SAE was trained.

    Args:
        sae: Its metadata say which hook, and how sequences are made.
        model: As SAELens loads it.
        dataset: Tokens or text, as for SAELens.
        n: Number of activations, fewer if the dataset is shorter.

    Raises:
        ValueError: The metadata name no hook, the model has no such hook, or the dataset is empty.
    """
    metadata = sae.cfg.metadata
    if metadata.hook_name is None:
        raise ValueError("the SAE's metadata have no hook_name")
    source = ModelActivations(
        model,
        dataset,
        metadata.hook_name,
        hook_head_index=metadata.hook_head_index,
        exclude_special_tokens=metadata.exclude_special_tokens or False,
        batch_size_prompts=16,
        streaming=True,
        context_size=metadata.context_size or 128,
        prepend_bos=metadata.prepend_bos is not False,
        seqpos_slice=tuple(metadata.seqpos_slice or (None,)),
        disable_concat_sequences=bool(metadata.disable_concat_sequences),
        # None is "no separator"; older versions of SAELens record nothing, and had "bos"
        sequence_separator_token=(
            metadata.sequence_separator_token if "sequence_separator_token" in metadata else "bos"
        ),
        use_chat_formatting=bool(metadata.use_chat_formatting),
    )
    return _first_activations(source, sae.cfg.d_in, n)


@torch.no_grad()
def _first_activations(source: ActivationSource, d_in: int, n: int) -> Float[Tensor, "n d_in"]:
    parts: list[Tensor] = []

    def receive(name: str, acts: Tensor, kept: Tensor | None) -> None:
        parts.append(flatten_heads(acts if kept is None else acts[kept], d_in).reshape(-1, d_in))

    while sum(map(len, parts)) < n and source.read(receive):
        pass
    activations = torch.cat(parts)[:n] if parts else torch.empty(0, d_in)
    if len(activations) < 2:
        raise ValueError("there are no activations: the dataset is empty")
    return activations.float()


def _plain_sae(
    sae: SAE[Any],
    whitening: Whitening | None,
    state: State | None,
    activations: Tensor | None,
) -> FoldedCheckpoint:
    """Recognise the state of `sae` and make it plain; errors as in `fold_builtin_checkpoint`."""
    if whitening is not None and whitening.d_in != sae.cfg.d_in:
        problem = f"it is of width {whitening.d_in}, the SAE of width {sae.cfg.d_in}"
        raise FieldError("whitening", None, problem)
    if activations is not None and activations.shape[1:] != (sae.cfg.d_in,):
        problem = f"must be of shape (n, {sae.cfg.d_in}), as the SAE is"
        raise FieldError("activations", tuple(activations.shape), problem)
    diagnosis = None
    if whitening is not None or activations is not None:
        diagnosis = diagnose(sae, whitening, activations)
    recognised = state or _recognised_state(sae, diagnosis)
    if recognised != "folded" and whitening is None:
        raise FieldError(
            "whitening",
            None,
            f"the weights are {recognised}, and making them plain needs the whitening, which is "
            f"not beside them: give the {ACTIVATION_WHITENING_FILENAME} of "
            + (
                "a checkpoint of the same run"
                if recognised == "whitened"
                else "the run that folded them the second time (SAELens saves it with checkpoints "
                "during training, not with the last), or take the SAE from before that run"
            ),
        )
    plain = copy.deepcopy(sae)
    details: dict[str, Any] = {"state": recognised, "state_was_given": state is not None}
    if recognised == "whitened":
        assert whitening is not None
        plain.cfg.normalize_activations = "covariance_whitening"
        proof = _gaussian(whitening) if activations is None else activations
        source = "Gaussian" if activations is None else "given"
        report = fold_whitening_into_weights(plain, whitening, activations=proof, source=source)
        summary = report.to_dict()
    else:
        plain = _made_plain(sae, whitening, recognised)
        if recognised == "folded-twice" and hasattr(plain, "topk_threshold"):
            if activations is None:
                raise FoldError(
                    "the weights are folded-twice, and their threshold was found on activations "
                    "of another scale; to find it again, give activations (the command takes "
                    "--cached-activations or --dataset-path)"
                )
            _find_threshold(plain, activations)
        summary = {"fold": {"check": None}}
        summary |= {} if whitening is None else whitening.summary()
    if diagnosis is not None:
        details |= diagnosis.to_dict()
    # the file does not contain the number of activations
    plain.cfg.metadata.whitening = {**summary, "n_samples": None, "saelens_checkpoint": details}
    return FoldedCheckpoint(plain, recognised, state is not None, diagnosis)


def _recognised_state(sae: SAE[Any], diagnosis: Diagnosis | None) -> State:
    """The state, if weights and config agree on it.

    Raises:
        UnclearStateError: They do not.
    """
    claims_whitened = sae.cfg.normalize_activations == "covariance_whitening"
    claim = f"its config has normalize_activations={sae.cfg.normalize_activations!r}"
    if diagnosis is None:
        if claims_whitened:
            return "whitened"  # the caller reports that the whitening is missing
        raise UnclearStateError(
            f"{claim}, so it is folded, once or twice, or was never whitened; to recognise which, "
            "give a whitening or activations"
        )
    recognised = diagnosis.state
    if recognised is None:
        raise UnclearStateError(f"the state of the weights is unclear: {diagnosis}")
    if claims_whitened != (recognised == "whitened"):
        resumed = (
            ". This happens if SAELens resumed a run from its final checkpoint: it trains plain "
            "weights as if they were whitened"
            if claims_whitened
            else ""
        )
        raise UnclearStateError(f"{claim}, but the weights look {recognised}: {diagnosis}{resumed}")
    return recognised


def _made_plain(sae: SAE[Any], whitening: Whitening | None, state: State) -> SAE[Any]:
    """A plain copy of an SAE whose weights are in `state`; only "folded" needs no whitening."""
    plain = copy.deepcopy(sae)
    if state == "whitened":
        assert whitening is not None
        plain.cfg.normalize_activations = "covariance_whitening"
        fold_whitening_into_weights(plain, whitening)
        return plain
    plain.cfg.normalize_activations = "none"
    for name, value in describe(sae).set_by_fold.items():
        setattr(plain.cfg, name, value)
    if state == "folded-twice":
        assert whitening is not None
        unfold_whitening_from_weights(plain, whitening)
        plain.cfg.normalize_activations = "none"
        _restore_norms(plain, whitening)
    return plain


@torch.no_grad()
def _restore_norms(sae: Any, whitening: Whitening) -> None:
    """Restore the decoder's norms if the fold that was undone had moved them to the encoder.

    SAELens does that before it folds, if latents are ranked by these norms. So the second fold of a
    resumed run has normalised the rows of a plain decoder. The first fold normalised them in
    whitened coordinates: the norms there are the factors that the second fold removed.
    """
    W_dec = sae.W_dec.data
    if not describe(sae).set_by_fold or (W_dec.norm(dim=1) - 1).abs().max() > 1e-3:
        return
    whitened = W_dec.double() @ whitening.W.to(W_dec.device)
    lost = (1 / whitened.norm(dim=1).clamp(min=1e-8)).to(W_dec.dtype)
    W_dec.mul_(lost[:, None])
    sae.W_enc.data.div_(lost)
    sae.b_enc.data.div_(lost)


def _gaussian(whitening: Whitening) -> Float[Tensor, "n d_in"]:
    """Activations with the whitening's mean and covariance, float64; always the same."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(_N_ACTIVATIONS, whitening.d_in, dtype=torch.float64, generator=generator)
    return whitening.dewhiten(z)


def _estimated(activations: Float[Tensor, "n d_in"]) -> Whitening:
    statistics = ActivationStatistics(activations.shape[1])
    statistics.update(activations)
    return Whitening.from_statistics(statistics, _CONFIG)


@torch.no_grad()
def _find_threshold(sae: Any, activations: Float[Tensor, "n d_in"]) -> None:
    """Set the threshold of a BatchTopK SAE as training does: the mean over batches of the least
    active value."""
    copied = _for_flat_activations(sae)
    latents = (copied.encode(rows) for rows in _batches(activations, copied))
    least = [acts[acts > 0].min().double() for acts in latents if (acts > 0).any()]
    if least:
        sae.topk_threshold.copy_(torch.stack(least).mean())


def _for_flat_activations(sae: SAE[Any]) -> SAE[Any]:
    """A copy in float32 or better that takes activations of shape (n, d_in) at any hook."""
    copied = copy.deepcopy(sae)
    copied.to(dtype=torch.promote_types(sae.dtype, torch.float32))
    copied.turn_off_forward_pass_hook_z_reshaping()
    return copied


def _batches(
    activations: Float[Tensor, "n d_in"], sae: SAE[Any]
) -> tuple[Float[Tensor, "_ d_in"], ...]:
    return activations.to(sae.device, sae.dtype).split(256)


@torch.no_grad()
def _explained_variance(sae: SAE[Any], activations: Float[Tensor, "n d_in"]) -> float:
    """1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2."""
    sae = _for_flat_activations(sae)
    residual = 0.0
    for rows in _batches(activations, sae):
        residual += float((rows - sae.decode(sae.encode(rows))).double().square().sum())
    spread = activations.double() - activations.double().mean(0)
    return 1 - residual / float(spread.square().sum())


def _whitening_file(path: Path, given: str | Path | None) -> Path | None:
    beside = path / ACTIVATION_WHITENING_FILENAME
    if given is None:
        return beside if beside.is_file() else None
    given = Path(given)
    return given / ACTIVATION_WHITENING_FILENAME if given.is_dir() else given
