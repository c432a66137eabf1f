"""The directories that training writes: checkpoints, and finished SAEs.

A checkpoint of one SAE holds

- `cfg.json` and `sae_weights.safetensors`: a plain, folded SAE with its training config, as SAELens
  writes checkpoints. `TrainingSAE.load_from_disk` opens it. `SAE.load_from_disk` does too, except
  for batchtopk, matryoshka_batchtopk and topk_vsae, which are for training only: they raise a
  KeyError, as SAELens' own checkpoints do;
- `inference/`: for these architectures, the SAE in the form saved at the end of training (jumprelu,
  topk), which `SAE.load_from_disk` opens. `loadable_folder` finds it;
- `sparsity.safetensors`, except between two windows of `feature_sampling_window` steps;
- `whitened_training_state/`: the state that training continues from, in whitened coordinates;
- with a runner, `runner_cfg.json` and the position in the data,
  `activations_store_state.safetensors`;
- with several processes, `process-1/` and so on: the position in the data and the random state of
  each process except the first;
- `checksums.json`: the SHA-256 of every other file.

A checkpoint of several SAEs holds such a folder for each, and the runner's files beside them.
"""

import hashlib
import json
import logging
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from sae_lens import SAE
from sae_lens.constants import (
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import save_file
from torch import Tensor

from sae_whiten._atomic import atomic_directory, atomic_files, recover
from sae_whiten._files import CorruptFileError, load_tensors, save_tensors, write_json
from sae_whiten.estimation.distributed import Processes
from sae_whiten.estimation.folders import OWN_DIR, STATISTICS_FILENAME, WHITENING_FILENAME
from sae_whiten.statistics import ActivationStatistics
from sae_whiten.whitening import Whitening

__all__ = [
    "INFERENCE_DIR",
    "TRAINING_STATE_DIR",
    "check_checkpoint",
    "check_runner_settings",
    "check_settings",
    "check_trainer_state",
    "folder_of_its_own",
    "inference_form",
    "is_complete_sae",
    "loadable_folder",
    "own_part",
    "read_progress",
    "read_training_weights",
    "replacing_sae",
    "runner_settings",
    "save_or_keep",
    "save_progress",
    "save_runner_files",
    "save_training_form",
    "save_training_weights",
    "settings_of",
    "write_sae",
    "writing_checkpoint",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

INFERENCE_DIR = "inference"
# what resuming needs, under names that SAELens does not open
TRAINING_STATE_DIR = "whitened_training_state"
_WEIGHTS_FILENAME = "training_weights.safetensors"
_WEIGHTS_KIND = "training_weights"
_PROGRESS_FILENAME = "progress.safetensors"
_PROGRESS_KIND = "training_progress"
_CHECKSUMS_FILENAME = "checksums.json"
_BLOCK = 1 << 20
_MOST_LISTED = 6  # checkpoints in an error

# settings that do not affect what is trained
_MAY_CHANGE = {
    "act_store_device",
    "checkpoint_path",
    "compile_llm",
    "compile_sae",
    "dataset_trust_remote_code",
    "device",
    "eval_batch_size_prompts",
    "from_pretrained_path",  # the weights are those of the checkpoint
    "hook_eval",
    "llm_compilation_mode",
    "llm_device",
    "logger",
    "metadata",
    "n_checkpoints",
    "n_eval_batches",
    "output_path",
    "prefetch_llm_batches",
    "resume_from_checkpoint",
    "sae_compilation_mode",
    "sae_lens_training_version",
    "sae_lens_version",
    "save_final_checkpoint",
    "streaming",
    "verbose",
}
_LENGTHS = {"total_training_samples", "training_tokens"}
# checked by the trainer of each SAE
_OF_THE_SAES = {"hook_head_indices", "hook_names", "sae", "saes"}


@contextmanager
def writing_checkpoint(path: str | Path, processes: Processes) -> Iterator[Path]:
    """Yield a directory that appears at `path`, with checksums, when the block succeeds.

    Several processes write it together, on a file system that all of them see. Process 0 is given
    the directory, every other process a folder inside it for its own part. The directory appears
    once the blocks of all processes have succeeded.
    """
    with ExitStack() as stack:
        first = processes.rank == 0
        new = processes.from_first(
            processes.together(
                lambda: stack.enter_context(atomic_directory(path)) if first else Path(path)
            )
        )
        part = own_part(new, processes)
        part.mkdir(exist_ok=True)
        failures: list[Exception] = []
        try:
            yield part
        except Exception as error:  # reported to the other processes
            failures.append(error)

        def finish() -> None:
            if failures:
                raise failures[0]

        processes.together(finish)
        if first:
            listing = json.dumps(dict(_checksums(new)), indent=0)
            (new / _CHECKSUMS_FILENAME).write_text(listing)
        processes.together(stack.close)


def own_part(path: str | Path, processes: Processes) -> Path:
    """The folder of a checkpoint for the state of this process, such as its place in the data."""
    return Path(path) / f"process-{processes.rank}" if processes.rank else Path(path)


def check_checkpoint(path: str | Path) -> None:
    """Refuse a checkpoint that was changed or damaged.

    Raises:
        FileNotFoundError: There is none, or one of its files is missing.
        CorruptFileError: A file was changed or damaged.
    """
    path = Path(path)
    recover(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    listing = path / _CHECKSUMS_FILENAME
    if not listing.is_file():
        logger.warning("%s was written without checksums: damage may go unnoticed", path)
        return
    try:
        expected = json.loads(listing.read_text())
        files = {path / name: str(checksum) for name, checksum in expected.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{listing} is damaged ({error})") from error
    for file, checksum in files.items():
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing from the checkpoint")
        if _checksum(file) != checksum:
            raise CorruptFileError(
                f"{file}: its checksum is not that in {listing.name}; it was changed or damaged"
            )
        if file.name == _CHECKSUMS_FILENAME:
            check_checkpoint(file.parent)


def _checksums(directory: Path, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Checksums of all files below a directory; a folder with its own list counts as one file."""
    for entry in sorted(directory.iterdir()):
        name = prefix + entry.name
        if not entry.is_dir():
            yield name, _checksum(entry)
        elif (entry / _CHECKSUMS_FILENAME).is_file():
            yield f"{name}/{_CHECKSUMS_FILENAME}", _checksum(entry / _CHECKSUMS_FILENAME)
        else:
            yield from _checksums(entry, f"{name}/")


def _checksum(file: Path) -> str:
    sha = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            sha.update(block)
    return sha.hexdigest()


def settings_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config that affect what is trained, as JSON values.

    The length of training is left out if the learning rate does not depend on it, so that training
    from a checkpoint can be extended.
    """
    left_out = set(_MAY_CHANGE)
    if cfg.get("lr_scheduler_name") == "constant" and not cfg.get("lr_decay_steps"):
        left_out |= _LENGTHS
    kept = {name: value for name, value in cfg.items() if name not in left_out}
    return json.loads(json.dumps(kept, default=str))


def check_settings(path: str | Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse to continue from a checkpoint with settings other than those that it was trained with.

    Args:
        path: The checkpoint.
        saved: Its settings, a config as a dictionary. Settings that only one of the two has are not
            compared, because versions of SAELens differ.
        own: Settings of this run.

    Raises:
        ValueError: Settings differ; names all that do, with both values.
    """
    was, now = settings_of(saved), settings_of(own)
    different = [
        f"{setting}={was[setting]!r} (now {now[setting]!r})"
        for setting in now
        if setting in was and was[setting] != now[setting]
    ]
    if different:
        raise ValueError(
            f"{path}: the checkpoint was trained with {', '.join(different)}. Resume with the "
            "same settings; to continue with others, start from its SAE: from_pretrained_path"
        )


def runner_settings(path: str | Path) -> dict[str, Any]:
    """The runner's config that a checkpoint was trained with, as `to_dict` gives it, without
    secrets.

    Raises:
        FileNotFoundError: There is no checkpoint of a runner; names those in folders below, if any.
        CorruptFileError: The file is damaged.
    """
    file = Path(path) / RUNNER_CFG_FILENAME
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is not a checkpoint of a runner: it has no {file.name}"
            + _checkpoints_below(Path(path))
        )
    try:
        return dict(json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise CorruptFileError(f"{file} is damaged ({error})") from error


def _checkpoints_below(path: Path) -> str:
    """The end of an error about a folder: the checkpoints below it, the newest first."""
    # SAELens writes CHECKPOINT_PATH/ID_OF_THE_RUN/NUMBER_OF_TOKENS
    states = [*path.glob(f"*/{ACTIVATIONS_STORE_STATE_FILENAME}")]
    states += path.glob(f"*/*/{ACTIVATIONS_STORE_STATE_FILENAME}")
    newest_first = sorted(states, key=lambda state: state.stat().st_mtime, reverse=True)
    # hidden folders are of checkpoints that are not finished
    found = [str(s.parent) for s in newest_first if not s.parent.name.startswith(".")]
    if not found:
        return ""
    others = f". Also there: {', '.join(found[1:_MOST_LISTED])}" if found[1:] else ""
    more = f" and {len(found) - _MOST_LISTED} more" if len(found) > _MOST_LISTED else ""
    return f"; give the newest checkpoint below it, {found[0]}{others}{more}"


def check_runner_settings(path: str | Path, cfg: Mapping[str, Any]) -> None:
    """`check_settings` of a runner's config, except for its SAEs and hooks; and refuse to end
    before the checkpoint does.

    Raises:
        FileNotFoundError: There is no checkpoint of a runner.
        CorruptFileError: The file with its settings is damaged.
        ValueError: They differ, or the checkpoint was trained on more tokens than `cfg` asks for.
    """
    both = saved, _ = runner_settings(path), cfg
    check_settings(path, *({k: v for k, v in c.items() if k not in _OF_THE_SAES} for c in both))
    # the last batch of a finished run may exceed its length
    wanted = int(cfg["training_tokens"])
    if wanted < int(saved.get("training_tokens", wanted)) and wanted < (done := _n_trained(path)):
        raise ValueError(
            f"{path}: the checkpoint has {done:,} tokens already: training_tokens={wanted:,} has "
            "to be at least as many"
        )


def _n_trained(path: str | Path) -> int:
    """Activations that the SAEs of a checkpoint were trained on, in all processes; 0 if no trainer
    has saved its state there."""
    states = sorted(Path(path).rglob(TRAINER_STATE_FILENAME))
    # mapped, because only one number is read
    return max(
        (_trainer_state(state, mmap=True)["n_training_samples"] for state in states), default=0
    )


def inference_form(sae: TrainingSAE[Any]) -> SAE[Any]:
    """The SAE that SAELens saves for inference: the same object, or one of another architecture.

    A BatchTopK SAE becomes a JumpReLU SAE with the threshold that was found in training.
    """
    if sae.cfg.get_inference_config_class().architecture() == sae.cfg.architecture():
        return sae
    saved = SAE.from_dict(sae.cfg.get_inference_sae_cfg_dict())
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(weights)
    saved.load_state_dict(weights)
    return saved.to(sae.device)


def save_training_form(sae: TrainingSAE[Any], path: Path) -> tuple[Path, Path]:
    """Write a plain SAE as SAELens writes checkpoints: with its training config.

    Args:
        sae: The SAE, folded.
        path: The checkpoint. Gets a folder for inference if SAELens cannot load the training form
            of this architecture with `SAE.load_from_disk`.

    Returns:
        Paths of the weights and of the config.
    """
    written = sae.save_model(path)
    if sae.cfg.get_inference_config_class().architecture() != sae.cfg.architecture():
        sae.save_inference_model(path / INFERENCE_DIR)
    return written


def loadable_folder(path: str | Path) -> Path:
    """The folder in a checkpoint or a finished SAE that `SAE.load_from_disk` loads."""
    inference = Path(path) / INFERENCE_DIR
    return inference if (inference / SAE_CFG_FILENAME).is_file() else Path(path)


def save_training_weights(
    checkpoint_path: str | Path,
    state_dict: dict[str, Tensor],
    cfg: dict[str, Any],
    whitening: Whitening,
) -> None:
    """Write weights in whitened coordinates into a checkpoint directory."""
    path = Path(checkpoint_path) / TRAINING_STATE_DIR / _WEIGHTS_FILENAME
    save_tensors(path, _WEIGHTS_KIND, state_dict, {"cfg": cfg, "whitening": whitening.digest})


def read_training_weights(
    checkpoint_path: str | Path, cfg: TrainingSAEConfig, whitening: Whitening | None
) -> dict[str, Tensor]:
    """Read what `save_training_weights` wrote.

    Args:
        checkpoint_path: The checkpoint directory.
        cfg: Config of the SAE that the weights are for.
        whitening: The whitening in the checkpoint.

    Raises:
        FileNotFoundError: The directory is not a checkpoint of this package.
        CorruptFileError: The file is truncated, was changed, or is of another kind.
        ValueError: The weights are of an SAE with another config, or were trained under another
            whitening.
    """
    path = Path(checkpoint_path) / TRAINING_STATE_DIR / _WEIGHTS_FILENAME
    state_dict, fields = load_tensors(path, _WEIGHTS_KIND)
    check_settings(path, fields["cfg"], cfg.to_dict())
    if whitening is not None and fields["whitening"] != whitening.digest:
        raise ValueError(
            f"{path}: these weights were trained under another whitening than the one beside them"
        )
    return state_dict


def save_progress(part: str | Path, fields: Mapping[str, Any]) -> None:
    """Write the random state, and other state that differs between processes.

    Args:
        part: The part of the checkpoint that belongs to this process.
        fields: The other state, as JSON values, including "n_processes".
    """
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.stack(torch.cuda.get_rng_state_all())
    path = Path(part) / TRAINING_STATE_DIR / _PROGRESS_FILENAME
    save_tensors(path, _PROGRESS_KIND, generators, dict(fields))


def read_progress(
    checkpoint_path: str | Path, processes: Processes
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_progress` wrote in this process.

    Returns:
        The states of the random generators, by device, and the other fields.

    Raises:
        FileNotFoundError: The directory is not a checkpoint of this package.
        CorruptFileError: The file is truncated, was changed, or is of another kind.
        ValueError: Another number of processes trained it.
    """
    file = Path(TRAINING_STATE_DIR) / _PROGRESS_FILENAME
    file_of_process = own_part(checkpoint_path, processes) / file
    is_there = file_of_process.is_file()
    generators, fields = load_tensors(
        file_of_process if is_there else Path(checkpoint_path) / file, _PROGRESS_KIND
    )
    n_processes = int(fields.get("n_processes", 1))
    if n_processes != processes.world_size or not is_there:
        raise ValueError(
            f"{checkpoint_path} was trained by {n_processes} processes, each with its own position "
            f"in the data, and this run has {processes.world_size}: resume with {n_processes}"
        )
    return generators, fields


def check_trainer_state(directory: Path) -> None:
    """Refuse a trainer's state that holds more than tensors and numbers, or cannot be read.

    Raises:
        FileNotFoundError: There is none.
        CorruptFileError: It is damaged, or of another kind.
    """
    path = directory / TRAINER_STATE_FILENAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the checkpoint")
    _trainer_state(path)


def _trainer_state(path: Path, mmap: bool = False) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CorruptFileError(f"{path} is damaged or foreign ({error})") from error


def save_runner_files(
    checkpoint_path: str | Path, store: ActivationsStore, cfg: Mapping[str, Any]
) -> None:
    """Add the position in the data and the runner's config to a checkpoint directory.

    Nobody may draw from the store meanwhile.
    """
    store.save_to_checkpoint(checkpoint_path)
    write_json(Path(checkpoint_path) / RUNNER_CFG_FILENAME, dict(cfg))


def replacing_sae(target: Path) -> AbstractContextManager[Path]:
    """A directory whose files replace those of the SAE in `target`, if there is one.

    Other files in `target` are left alone.
    """
    optional = (SPARSITY_FILENAME, RUNNER_CFG_FILENAME, OWN_DIR)
    # (which earlier releases wrote beside the SAE)
    formerly = (WHITENING_FILENAME, STATISTICS_FILENAME)
    return atomic_files(target, SAE_CFG_FILENAME, also_replaced=(*optional, *formerly))


def write_sae(
    target: Path,
    sae: TrainingSAE[Any],
    log_feature_sparsity: Tensor | None = None,
    whitening: Whitening | None = None,
    statistics: ActivationStatistics | None = None,
    runner_cfg: Mapping[str, Any] | None = None,
) -> tuple[Path, Path, Path | None]:
    """Write a finished SAE: all of it or nothing. Other files in the directory are left alone.

    Args:
        target: The directory.
        sae: The SAE, folded.
        log_feature_sparsity: Shape (d_sae,).
        whitening: The whitening it was trained under. Written to a folder inside, like the
            statistics: both are large, 2 d_in^2 numbers each, and not needed to use the SAE.
        statistics: The statistics that `whitening` was derived from.
        runner_cfg: The runner's config, if it is to be written too.

    Returns:
        Paths of the weights, the SAE's config and the sparsity, if that is known.
    """
    with replacing_sae(target) as new:
        weights, sae_cfg = sae.save_inference_model(new)
        if log_feature_sparsity is not None:
            save_file({"sparsity": log_feature_sparsity}, new / SPARSITY_FILENAME)
        if runner_cfg is not None:
            write_json(new / RUNNER_CFG_FILENAME, dict(runner_cfg))
        if whitening is not None:
            whitening.save(new / OWN_DIR / WHITENING_FILENAME)
        if statistics is not None:
            statistics.save(new / OWN_DIR / STATISTICS_FILENAME)
    logger.info("SAE saved: %s", target)
    sparsity = None if log_feature_sparsity is None else target / SPARSITY_FILENAME
    return target / weights.name, target / sae_cfg.name, sparsity


def save_or_keep(
    save: Callable[[Path], T], path: str | Path, checkpoint_path: str | Path | None
) -> T:
    """Save what was trained; if that fails, save it somewhere else.

    Args:
        save: Writes to a given path.
        path: Where the result belongs.
        checkpoint_path: Where it is kept if that fails. If this fails too or is None, it is kept in
            a temporary folder.

    Returns:
        What `save` returns.

    Raises:
        OSError: It could not be saved in `path`. The message says why, and where it is instead.
    """
    try:
        return save(Path(path))
    except Exception as error:
        kept = _keep(save, Path(path).name, checkpoint_path)
        raise OSError(f"the trained SAE could not be saved in {path} ({error}); {kept}") from error


def folder_of_its_own() -> str:
    """A new temporary folder, named in the log, for what cannot be saved in its place."""
    path = tempfile.mkdtemp(prefix="sae_whiten_")
    logger.error("what was trained is kept in %s", path)
    return path


def _keep(save: Callable[[Path], Any], name: str, checkpoint_path: str | Path | None) -> str:
    for folder in (checkpoint_path, None):
        try:
            base = Path(folder or folder_of_its_own())
            save(base / f"unsaved_{name}")
            return f"it is in {base / f'unsaved_{name}'}"
        except Exception as error:
            logger.error(
                "it could not be kept in %s either: %s", folder or "the temp folder", error
            )
    return "nor anywhere else, so this process has the only copy"


def is_complete_sae(path: str | Path) -> bool:
    """Whether a folder holds a complete SAE: one that SAELens loads."""
    recover(path)
    if not (Path(path) / SAE_CFG_FILENAME).is_file():
        return False
    try:
        SAE.load_from_disk(path)
    except Exception as error:  # SAELens raises many kinds
        logger.warning("%s does not hold a whole SAE: %r", path, error)
        return False
    return True
