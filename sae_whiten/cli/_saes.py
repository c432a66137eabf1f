"""Flags that commands on finished SAEs share: the SAEs, their model and the dataset."""

import argparse
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_whiten._checks import require_context
from sae_whiten.cli._values import json_object

if TYPE_CHECKING:
    from sae_lens import SAE

__all__ = [
    "add_dataset_arguments",
    "add_model_arguments",
    "add_saes_arguments",
    "load_saes",
    "model_and_dataset",
    "require_source",
]

logger = logging.getLogger("sae_whiten")


def add_saes_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the SAEs, and the flag for where they run."""
    parser.add_argument(
        "saes",
        nargs="+",
        metavar="SAE",
        help="folder of an SAE, or release/sae_id as in SAE.from_pretrained",
    )
    parser.add_argument(
        "--device", default="cpu", help="of the model and the SAEs (default: %(default)s)"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add flags for the model, as their own group in the help."""
    group = parser.add_argument_group("model (default: what the SAEs were trained on)")
    group.add_argument("--model-name", help="model to load, as in SAELens")
    group.add_argument(
        "--model-class-name", help="as in SAELens: HookedTransformer or AutoModelForCausalLM"
    )
    group.add_argument(
        "--model-from-pretrained-kwargs",
        type=json_object,
        metavar="JSON",
        help="further arguments for loading the model, as in SAELens",
    )


def add_dataset_arguments(
    group: argparse._ArgumentGroup, default: str = "the SAEs' training data"
) -> None:
    """Add flags for the dataset. `default` is the help's name for what is read without them."""
    group.add_argument("--dataset-path", help=f"name on the hub or a folder (default: {default})")
    group.add_argument(
        "--dataset-split",
        default="train",
        metavar="SPLIT",
        help="preferably one that the SAEs were not trained on: validation, or a part such as "
        "train[90%%:], which downloads the dataset (default: %(default)s)",
    )
    group.add_argument("--no-streaming", action="store_true", help="download the dataset first")


def load_saes(paths: Iterable[str], device: str) -> "dict[str, SAE[Any]]":
    """SAEs by path. A path is a folder or release/sae_id.

    Raises:
        ValueError: A path is neither.
    """
    return {path.rstrip("/"): _load_sae(path, device) for path in paths}


def _load_sae(path: str, device: str) -> "SAE[Any]":
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    from sae_whiten.training.checkpoint import loadable_folder

    if (Path(path) / "cfg.json").is_file():
        return SAE.load_from_disk(loadable_folder(path), device=device)
    release, _, sae_id = path.partition("/")
    if release not in get_pretrained_saes_directory():
        # a repository on the hub, whose name contains a slash
        owner, _, tail = path.partition("/")
        repository, _, sae_id = tail.partition("/")
        release = f"{owner}/{repository}"
    if Path(path).exists() or not sae_id:
        raise ValueError(
            f"{path} is neither a folder with an SAE (there is no cfg.json) nor release/sae_id"
        )
    return SAE.from_pretrained(release, sae_id, device=device)


def require_source(args: argparse.Namespace, saes: "Mapping[str, SAE[Any]]") -> None:
    """Refuse, before anything is loaded, SAEs and flags that do not name model and dataset.

    Raises:
        ValueError: The metadata of the SAEs differ, or lack an entry.
    """
    _model_source(args, saes)
    _dataset_path(args, saes)


def model_and_dataset(
    args: argparse.Namespace, saes: "Mapping[str, SAE[Any]]", context_size: int | None
) -> tuple[Any, Any, dict[str, Any]]:
    """What SAEs are run on, from the flags or else from the SAEs' metadata.

    Args:
        args: With the flags of `add_model_arguments` and `add_dataset_arguments`.
        saes: The SAEs.
        context_size: Tokens per sequence; None is not checked.

    Returns:
        The model; the dataset, streamed if possible unless --no-streaming is given; and the names
        of both, with what the model was loaded with.

    Raises:
        ValueError: The metadata of the SAEs differ, or lack an entry; the dataset has no column of
            tokens or text; or the model cannot read sequences of `context_size`.
    """
    from sae_lens.load_model import load_model

    from sae_whiten.estimation.dataset import check_columns, open_dataset
    from sae_whiten.estimation.models import naming_model
    from sae_whiten.evaluation.saes import common_setting

    source, path = _model_source(args, saes), _dataset_path(args, saes)
    _warn_if_trained_on(args, saes, path)
    dataset = open_dataset(path, args.dataset_split, streaming=not args.no_streaming)
    check_columns(dataset, path, common_setting(saes, "use_chat_formatting", False))
    with naming_model(source["model_name"], source["model_class_name"]):
        model = load_model(**source, device=args.device)
    if context_size is not None:
        require_context(context_size, model)
    return model, dataset, {**source, "dataset_path": path, "dataset_split": args.dataset_split}


def _model_source(args: argparse.Namespace, saes: "Mapping[str, SAE[Any]]") -> dict[str, Any]:
    """Arguments of SAELens' `load_model`, from the flags or else from the SAEs' metadata.

    Raises:
        ValueError: The metadata of the SAEs differ, or lack an entry.
    """
    kwargs = args.model_from_pretrained_kwargs
    if kwargs is None:
        kwargs = _shared(saes, "model_from_pretrained_kwargs", "--model-from-pretrained-kwargs", {})
    return {
        "model_name": args.model_name or _shared(saes, "model_name", "--model-name"),
        "model_class_name": args.model_class_name
        or _shared(saes, "model_class_name", "--model-class-name", "HookedTransformer"),
        "model_from_pretrained_kwargs": kwargs,
    }


def _dataset_path(args: argparse.Namespace, saes: "Mapping[str, SAE[Any]]") -> str:
    """The dataset's path, from the flag or the SAEs' metadata.

    Raises:
        ValueError: The metadata of the SAEs differ, or lack an entry.
    """
    return args.dataset_path or _shared(saes, "dataset_path", "--dataset-path")


def _warn_if_trained_on(
    args: argparse.Namespace, saes: "Mapping[str, SAE[Any]]", path: str
) -> None:
    from sae_whiten.estimation.dataset import canonical_source

    recorded = (sae.cfg.metadata.dataset_path for sae in saes.values())
    trained_on = {canonical_source(source) for source in recorded if source}
    if canonical_source(path) in trained_on and args.dataset_split == "train":
        logger.warning(
            "SAEs were trained on %s: the results may be for tokens that they have seen. Choose "
            "others by --dataset-split or --dataset-path",
            path,
        )


def _shared(saes: "Mapping[str, SAE[Any]]", field: str, flag: str, default: Any = None) -> Any:
    """The value of a metadata field, which has to be the same for all SAEs."""
    by_name = {name: sae.cfg.metadata[field] for name, sae in saes.items()}
    values = [value for value in by_name.values() if value is not None]
    if any(value != values[0] for value in values):
        listed = ", ".join(f"{value!r} ({name})" for name, value in by_name.items())
        raise ValueError(f"the SAEs differ in {field}: {listed}; give {flag}")
    # "local" is the usual name of a dataset that was given as an object
    if values and not (field == "dataset_path" and values[0] in ("", "local")):
        return values[0]
    if default is None:
        raise ValueError(f"the SAEs' metadata do not contain {field}; give {flag}")
    return default
