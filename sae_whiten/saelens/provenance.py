"""Whether statistics were estimated from what an SAE is trained on."""

import json
from pathlib import Path
from typing import Any

from sae_lens.saes.sae import SAEConfig

from sae_whiten.statistics import ActivationStatistics

__all__ = ["load_statistics", "provenance_of", "statistics_file"]

_FIELDS = (
    "model_name",
    "model_class_name",
    "hook_name",
    "hook_head_index",
    "dataset_path",
    "context_size",
    "prepend_bos",
    "seqpos_slice",
    "exclude_special_tokens",
    "sequence_separator_token",
    "disable_concat_sequences",
    "model_from_pretrained_kwargs",
)


def provenance_of(cfg: SAEConfig) -> dict[str, Any]:
    """What SAELens' runner wrote into an SAE's metadata about where its activations come from."""
    return {name: cfg.metadata[name] for name in _FIELDS if name in cfg.metadata}


def statistics_file(directory: str | Path, hook_name: str) -> Path:
    """The file of a hook's statistics in a folder of them."""
    return Path(directory) / f"{hook_name}.safetensors"


def load_statistics(
    path: str | Path, cfg: SAEConfig, allow_other: bool = False
) -> ActivationStatistics:
    """Read the statistics that an SAE is to be whitened with.

    Args:
        path: A file of statistics, or a folder with one for each hook.
        cfg: Config of the SAE.
        allow_other: Take them even where their provenance contradicts the SAE's metadata.

    Raises:
        FileNotFoundError: There are none, or none for this hook.
        CorruptFileError: The file is truncated, foreign or was changed.
        ValueError: They are of another width, or of another model, hook, dataset...
    """
    path = Path(path)
    if path.is_dir():
        hook_name = cfg.metadata.hook_name
        if hook_name is None:
            raise ValueError(
                f"{path} is a folder, and the SAE's metadata name no hook: give the file itself"
            )
        if not statistics_file(path, hook_name).is_file():
            there = sorted(p.name.removesuffix(".safetensors") for p in path.glob("*.safetensors"))
            raise FileNotFoundError(
                f"{path} holds no statistics of {hook_name}; there are those of "
                f"{', '.join(there) or 'no hook'}"
            )
        path = statistics_file(path, hook_name)
    statistics = ActivationStatistics.load(path)
    if statistics.d_in != cfg.d_in:
        raise ValueError(f"{path} is of width {statistics.d_in}, the SAE of width {cfg.d_in}")
    if not allow_other:
        wanted, found = provenance_of(cfg), statistics.provenance
        different = [
            f"{name}={found[name]!r} (training has {wanted[name]!r})"
            for name in wanted
            if name in found and _as_json(found[name]) != _as_json(wanted[name])
        ]
        if different:
            raise ValueError(
                f"{path} was estimated with {', '.join(different)}. Estimate others, or set "
                "WhiteningConfig(allow_other_statistics=True)."
            )
    return statistics


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
