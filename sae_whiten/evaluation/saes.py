"""Checks and settings shared by all experiments on finished SAEs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sae_lens.saes.sae import SAE
from sae_lens.saes.transcoder import Transcoder

from sae_whiten.estimation.sources import Model, check_hook

__all__ = ["check_normalisation", "check_sae", "common_setting", "flat_heads"]

# in this field None means that there is no separator; in others, that the value is unknown
_NONE_IS_A_VALUE = ("sequence_separator_token",)


def check_sae(name: str, sae: SAE[Any], model: Model) -> None:
    """Raise ValueError if an SAE, called `name`, cannot be evaluated on the model."""
    hook_name = sae.cfg.metadata.hook_name
    if hook_name is None:
        raise ValueError(f"{name}: its metadata have no hook_name; set sae.cfg.metadata.hook_name")
    try:
        check_hook(model, hook_name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if isinstance(sae, Transcoder):
        raise ValueError(f"{name} is a transcoder, which reconstructs another hook than it reads")
    check_normalisation(name, sae)


def check_normalisation(name: str, sae: SAE[Any]) -> None:
    """Raise ValueError if the weights of an SAE, called `name`, are not for raw activations."""
    what_to_do = {
        "covariance_whitening": "fold the whitening first: sae-whiten fold",
        "expected_average_only_in": "take the SAE from the end of training, where SAELens folds "
        "the scale into the weights",
    }
    normalisation = sae.cfg.normalize_activations
    if normalisation in what_to_do:
        raise ValueError(
            f"{name} has normalize_activations={normalisation!r}, as checkpoints during training "
            "have: its weights are for normalised activations and mean nothing on raw ones; "
            + what_to_do[normalisation]
        )


def common_setting(saes: Mapping[str, SAE[Any]], field: str, default: Any) -> Any:
    """The value of a metadata field, or `default` if none of the SAEs has it.

    Raises:
        ValueError: The SAEs' values differ.
    """
    recorded = {n: sae.cfg.metadata for n, sae in saes.items() if field in sae.cfg.metadata}
    by_name = {name: metadata[field] for name, metadata in recorded.items()}
    if field not in _NONE_IS_A_VALUE:
        by_name = {name: value for name, value in by_name.items() if value is not None}
    values = list(dict.fromkeys(by_name.values()))
    if len(values) > 1:
        listed = ", ".join(f"{value!r} ({name})" for name, value in by_name.items())
        raise ValueError(
            f"the SAEs were trained with different {field}: {listed}; evaluate them separately"
            + (", or give prepend_bos" if field == "prepend_bos" else "")
        )
    return values[0] if values else default


@contextmanager
def flat_heads(saes: Iterable[SAE[Any]]) -> Iterator[None]:
    """Let SAEs of hook_z take activations with flattened heads, as `View.seen` returns them."""
    reshaping = [sae for sae in saes if sae.hook_z_reshaping_mode]
    for sae in reshaping:
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        for sae in reshaping:
            sae.turn_on_forward_pass_hook_z_reshaping()
