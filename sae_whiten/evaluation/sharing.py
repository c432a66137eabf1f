"""Finished SAEs on the Hugging Face hub: what is uploaded, and the model card."""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from sae_lens import SAE
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)

from sae_whiten._files import read_json, require_empty
from sae_whiten._hub import cell, make_repo, writing
from sae_whiten._redaction import redacted
from sae_whiten.estimation.figures import plot_eigenvalues
from sae_whiten.estimation.folders import OWN_DIR, WHITENING_FILENAME
from sae_whiten.estimation.spectrum import spectrum_summary
from sae_whiten.evaluation.saes import check_normalisation
from sae_whiten.training.checkpoint import INFERENCE_DIR, TRAINING_STATE_DIR
from sae_whiten.whitening import Whitening

__all__ = ["find_saes", "model_card", "push_saes", "write_upload"]

logger = logging.getLogger(__name__)

_CARD, _FIGURE = "README.md", "spectrum.png"
_TAGS = ["saelens", "sparse-autoencoder"]


def find_saes(path: str | Path, sae_id: str | None = None) -> dict[str, Path]:
    """The SAEs in a folder, by their names on the hub.

    Args:
        path: The folder of one SAE, or a folder with SAEs at any depth, as the runner of several
            SAEs writes it. Checkpoints beside finished SAEs are left out, with a warning.
        sae_id: The name of a single SAE. None: the name of its hook. Several SAEs are named after
            their folders, "early/k4" for one two folders down.

    Raises:
        FileNotFoundError: There is no SAE.
        CorruptFileError: The config of the SAE is damaged.
        ValueError: `sae_id` is given for several SAEs, or is not a relative path below the repo.
    """
    path = Path(path)
    if (path / SAE_CFG_FILENAME).is_file():
        metadata = read_json(path / SAE_CFG_FILENAME).get("metadata") or {}
        name = str(sae_id or metadata.get("hook_name") or path.resolve().name)
        inner = PurePosixPath(name)
        if inner.is_absolute() or ".." in inner.parts or "\\" in name:
            raise ValueError(f"sae_id={name!r}: must be a folder's name, such as 'layer_6/16k'")
        return {str(inner): path}
    folders = _folders_below(path)
    if not folders:
        raise FileNotFoundError(f"{path} holds no SAE: there is no {SAE_CFG_FILENAME}")
    if sae_id is not None:
        raise ValueError(f"sae_id={sae_id!r}: {path} holds several SAEs, {', '.join(folders)}")
    return folders


def _folders_below(path: Path) -> dict[str, Path]:
    # "**" alone would leave out folders that are links
    every = sorted(file.parent for file in path.glob(f"**/*/{SAE_CFG_FILENAME}"))
    # in a checkpoint, the same SAE in another form
    saes = [f for f in every if not (f.name == INFERENCE_DIR and f.parent in every)]
    finished = [folder for folder in saes if not _is_checkpoint(folder)]
    if 0 < len(finished) < len(saes):
        left_out = ", ".join(str(folder) for folder in saes if folder not in finished)
        logger.warning("checkpoints beside finished SAEs are left out: %s", left_out)
    return {folder.relative_to(path).as_posix(): folder for folder in finished or saes}


def _is_checkpoint(folder: Path) -> bool:
    states = (folder / TRAINING_STATE_DIR, folder / TRAINER_STATE_FILENAME)
    return any(state.exists() for state in states)


def write_upload(saes: Mapping[str, Path], target: str | Path, repo_id: str) -> None:
    """Write the files that `push_saes` uploads into a folder. Whitenings and access tokens are left
    out.

    Args:
        saes: Folders of SAEs, by their names on the hub.
        target: A folder that is empty or does not exist.
        repo_id: The repo that the card is for.

    Raises:
        ValueError: An SAE's weights are for normalised activations, or an SAE does not load.
        FileExistsError: `target` is not empty.
    """
    target = Path(target)
    require_empty(target)
    cards = {sae_id: model_card(folder, repo_id, sae_id) for sae_id, folder in saes.items()}
    whitenings = {sae_id: _whitening_of(folder) for sae_id, folder in saes.items()}
    for sae_id, folder in saes.items():
        (target / sae_id).mkdir(parents=True)
        if (whitening := whitenings[sae_id]) is not None:
            _draw(whitening, target / sae_id / _FIGURE)
        for name in (SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / sae_id / name)
        for name in (SAE_CFG_FILENAME, RUNNER_CFG_FILENAME):
            if (folder / name).is_file():
                content = redacted(read_json(folder / name))
                (target / sae_id / name).write_text(json.dumps(content))
        (target / sae_id / _CARD).write_text(cards[sae_id])
    header = "\n".join(["---", "library_name: saelens", "tags:", *(f"- {t}" for t in _TAGS), "---"])
    # the repo's card is one folder above the figures
    parts = [card.replace(f"({_FIGURE})", f"({quote(i)}/{_FIGURE})") for i, card in cards.items()]
    (target / _CARD).write_text(header + "\n\n" + "\n\n".join(parts))


def push_saes(saes: Mapping[str, Path], repo_id: str, private: bool | None = None) -> str:
    """Upload SAEs with SAELens' own uploader, and their cards.

    The repo is created if it does not exist, and gets a README.md if it has none. Each SAE also has
    a card in its own folder.

    Args:
        saes: Folders of SAEs, by their names on the hub.
        repo_id: "user/name".
        private: Whether a new repo is private; None: the default of the account.

    Returns:
        Address of the last commit.

    Raises:
        ValueError: As for `write_upload`, or `private` is set and the repo is public.
        OSError: The hub cannot be reached, or refuses access (no token, or no right to write).
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface

    api = HfApi()
    with tempfile.TemporaryDirectory() as name:
        staging = Path(name)
        write_upload(saes, staging, repo_id)
        with writing(repo_id, "the SAE"):
            repo_id = make_repo(repo_id, private)
            upload_saes_to_huggingface(
                {sae_id: staging / sae_id for sae_id in saes}, repo_id, add_default_readme=False
            )
            written = [f"{sae_id}/{name}" for sae_id in saes for name in (_CARD, _FIGURE)]
            cards = [name for name in written if (staging / name).is_file()]
            if not api.file_exists(repo_id, _CARD):
                cards.append(_CARD)
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(card, staging / card) for card in cards],
                commit_message=f"Model card of {', '.join(saes)}",
            )
    return commit.commit_url


def model_card(folder: str | Path, repo_id: str, sae_id: str) -> str:
    """The model card of an SAE, from its config, as Markdown.

    Args:
        folder: Folder of the SAE.
        repo_id: The repo to which it will be uploaded.
        sae_id: Its name in the repo.

    Raises:
        ValueError: The weights are for normalised activations, or the SAE does not load.
    """
    try:
        sae = SAE.load_from_disk(folder)
    except Exception as error:  # whatever the error, nobody could load this SAE
        inference = Path(folder) / INFERENCE_DIR
        other = f". The form for inference is in {inference}" if inference.is_dir() else ""
        message = f"{folder} is not an SAE that SAELens loads: {error!r}{other}"
        raise ValueError(message) from error
    cfg, metadata = sae.cfg, sae.cfg.metadata
    check_normalisation(str(folder), sae)
    ours = type(sae).__module__.startswith("sae_whiten.")
    facts = {
        "model": metadata.model_name,
        "hook": metadata.hook_name,
        "architecture": cfg.architecture(),
        "trained as": metadata.training_architecture,
        "width of the activations": cfg.d_in,
        "latents": cfg.d_sae,
        "dataset": metadata.dataset_path,
        "context size": metadata.context_size,
        "activations trained on": metadata.n_training_samples,
        **_training_facts(Path(folder)),
        "L0": _number(metadata.l0),
        "explained variance": _number(metadata.explained_variance),
        "dead latents": _dead_latents(metadata, _runner_settings(Path(folder))),
        "input normalisation": cfg.normalize_activations,
        "sae-lens": metadata.sae_lens_training_version or metadata.sae_lens_version,
    }
    return "\n".join(
        [
            f"# {sae_id}",
            "",
            "A sparse autoencoder for [SAELens](https://github.com/decoderesearch/SAELens).",
            "",
            *_table(facts),
            *_whitening_section(metadata.whitening, _whitening_of(Path(folder))),
            "## Use",
            "",
            "```python",
            *([f"import sae_whiten  # registers {cfg.architecture()}"] if ours else []),
            "from sae_lens import SAE",
            "",
            f'sae = SAE.from_pretrained("{repo_id}", "{sae_id}")',
            "```",
            "",
            *(
                [f"`pip install sae-whiten`: plain SAELens does not know {cfg.architecture()}.", ""]
                if ours
                else []
            ),
        ]
    )


def _training_facts(folder: Path) -> dict[str, Any]:
    """Facts from the training run's settings, if their file is found."""
    settings = _runner_settings(folder)
    return {
        "tokens in a batch": settings.get("train_batch_size_tokens"),
        "learning rate": settings.get("lr"),
        "seed": settings.get("seed"),
    }


def _runner_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run that trained an SAE; empty if their file is not found.

    The runner of several SAEs writes them beside the folders of its SAEs.
    """
    folder = folder.resolve()
    for parent in (folder, *folder.parents):
        file = parent / RUNNER_CFG_FILENAME
        if file.is_file():
            settings = read_json(file)
            name = folder.relative_to(parent).as_posix()
            is_of_this_sae = parent == folder or name in (settings.get("saes") or {})
            return settings if is_of_this_sae else {}
    return {}


def _dead_latents(metadata: Any, settings: Mapping[str, Any]) -> int | None:
    """The number of dead latents in an SAE's metadata. None: unknown.

    SAELens writes 0 also after runs that were too short for a latent to count as dead.
    """
    n_samples = metadata.n_training_samples or settings.get("training_tokens")
    window, batch = (settings.get(k) for k in ("dead_feature_window", "train_batch_size_tokens"))
    is_zero = metadata.num_dead_features == 0
    if is_zero and n_samples and window and batch and n_samples <= window * batch:
        return None
    return metadata.num_dead_features


def _whitening_of(folder: Path) -> Whitening | None:
    """The whitening that was folded into an SAE, if its file is in the SAE's folder.

    Raises:
        CorruptFileError: The file is damaged.
    """
    # earlier releases wrote it to the second path
    for file in (folder / OWN_DIR / WHITENING_FILENAME, folder / WHITENING_FILENAME):
        if file.is_file():
            return Whitening.load(file)
    return None


def _draw(whitening: Whitening, path: Path) -> None:
    covariance = whitening.covariance_eigenvalues
    spectra = {"covariance": covariance, "regularised": whitening.eigenvalues}
    plot_eigenvalues(spectra, path)


def _whitening_section(
    whitening: Mapping[str, Any] | None, transform: Whitening | None
) -> list[str]:
    """The whitening of an SAE, the error of the fold, and the spectrum if it is known."""
    if not whitening:
        return []
    spectrum = None if transform is None else spectrum_summary(transform.covariance_eigenvalues)
    # unknown if `fold` copied an SAE that SAELens had folded
    config = whitening.get("config")
    settings = (
        {}
        if config is None
        else {
            "kind": config["kind"],
            "loss in": f"{config['loss_space']} space",
            "eps": f"{config['eps']:g} ({config['eps_mode']})",
            "strength": config["strength"],
        }
    )
    check = whitening["fold"]["check"] or {}
    facts = {
        **settings,
        "activations that it was estimated from": whitening["n_samples"],
        "condition number of the covariance, without null directions": _number(
            None if spectrum is None else spectrum.condition_number_nonnull
        ),
        "participation ratio, the effective number of directions": _number(
            None if spectrum is None else spectrum.participation_ratio
        ),
        "fold error": _number(check.get("fold_error")),
        "active latents that folding changed": _percent(check.get("active_set_change")),
        "activations that the fold was proved on": check.get("n_activations"),
    }
    return [
        "## Whitening",
        "",
        "Trained on whitened activations ([arXiv 2511.13981](https://arxiv.org/abs/2511.13981)).",
        "The whitening is folded into the weights: the SAE takes raw activations.",
        "",
        *_table(facts),
        *([f"![Spectrum of the covariance]({_FIGURE})", ""] if transform is not None else []),
    ]


def _table(facts: Mapping[str, Any]) -> list[str]:
    known = {name: value for name, value in redacted(dict(facts)).items() if value is not None}
    if not known:
        return []
    rows = [f"| {name} | {cell(value)} |" for name, value in known.items()]
    return ["| | |", "|---|---|", *rows, ""]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.3%}"
