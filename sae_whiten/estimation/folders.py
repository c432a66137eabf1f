"""Folders of statistics, one file per hook: finding a hook's file, and sharing a folder."""

import contextlib
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

from sae_whiten import _hub
from sae_whiten._files import require_empty
from sae_whiten._redaction import redacted
from sae_whiten.estimation.figures import plot_eigenvalues
from sae_whiten.statistics import ActivationStatistics

__all__ = [
    "OWN_DIR",
    "STATISTICS_FILENAME",
    "WHITENING_FILENAME",
    "find_all_statistics",
    "find_statistics",
    "hooks_beside",
    "push_folder",
    "statistics_file",
    "write_upload",
]

OWN_DIR = "sae_whiten"
"""The folder beside an SAE in which a training run writes what readers of the SAE do not need."""

STATISTICS_FILENAME = "activation_statistics.safetensors"
WHITENING_FILENAME = "whitening.safetensors"

# where a training run writes its statistics, and where earlier releases wrote them
_OF_A_RUN = (f"{OWN_DIR}/{STATISTICS_FILENAME}", STATISTICS_FILENAME)


def statistics_file(directory: str | Path, hook_name: str) -> Path:
    """The file to write a hook's statistics to; always directly in the folder.

    Raises:
        ValueError: The name is empty or too long.
    """
    return Path(directory) / _hub.file_name(hook_name)


def hooks_beside(directory: str | Path, names: Collection[str]) -> list[str]:
    """The other hooks, not in `names`, whose statistics are in a folder."""
    files = (path.name for path in Path(directory).glob("*.safetensors"))
    return [name for name in _hub.hook_names(files) if name not in names]


def find_statistics(source: str | Path, hook_name: str | None) -> Path:
    """The file of a hook's statistics, downloaded if need be.

    Args:
        source: A file, a folder with one file for each hook, the folder that a training run wrote,
            or a repo of the Hugging Face hub, "user/name" or "user/name@revision". A path that
            exists is preferred to the hub.
        hook_name: Name of the hook. None if it is not known; `source` must be a file then.

    Raises:
        FileNotFoundError: `source` is none of these, or has no statistics of this hook.
        ConnectionError: The hub cannot be reached, and the file was not downloaded before.
        ValueError: `hook_name` is None, and `source` does not hold a single file.
    """
    path = Path(source)
    if not path.exists():
        with _errors_mention_path(source):
            repo_id, revision = _hub.repo_and_revision(source)
            return _hub.download(repo_id, hook_name, revision)
    if not path.is_dir():
        return path
    of_a_run = _of_a_run(path)
    if of_a_run is not None:
        return of_a_run
    if hook_name is None:
        raise ValueError(f"{path} is a folder, and the hook is not known: give the file itself")
    for name in _hub.file_names(hook_name):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(_hub.no_such_hook(path, hook_name, [p.name for p in path.iterdir()]))


def find_all_statistics(source: str | Path) -> list[Path]:
    """The files of all hooks' statistics in a source, as for `find_statistics`.

    In the folder of a training run, only its statistics are returned, not its weights.

    Raises:
        FileNotFoundError: `source` is neither a path nor a repo, or holds no statistics.
        ConnectionError: The hub cannot be reached, and nothing was downloaded before.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.exists():
        with _errors_mention_path(source):
            path = _hub.download_all(*_hub.repo_and_revision(source))
    of_a_run = _of_a_run(path)
    if of_a_run is not None:
        return [of_a_run]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{source} holds no statistics")
    return files


def push_folder(folder: str | Path, repo_id: str, private: bool | None = None) -> str:
    """Upload a folder of statistics to the Hugging Face hub, in one commit.

    The repo is made if there is none, and gets a README.md if it has none; other files in it stay.

    Args:
        folder: Where the statistics are, as `sae-whiten fit` writes them.
        repo_id: "user/name".
        private: Whether a new repo is private; None: the default of the account.

    Returns:
        Address of the commit.

    Raises:
        FileNotFoundError: The folder holds no statistics.
        CorruptFileError: A file is truncated, was changed, or is of another kind.
        ValueError: A file does not name its hook or holds a secret, or the repo is public although
            `private` is set.
        OSError: The hub cannot be reached, or refuses: no token, or one without write access.
    """
    files = _shareable_files(folder)
    with tempfile.TemporaryDirectory() as name:
        figure = _draw(files, Path(name))
        return _hub.upload(files, repo_id, private, figure)


def write_upload(folder: str | Path, target: str | Path, repo_id: str) -> None:
    """Write what `push_folder` uploads to a repo that has no README.md yet.

    Args:
        folder: Where the statistics are.
        target: A folder that is empty or does not exist.
        repo_id: The repo that the card is for.

    Raises:
        FileExistsError: `target` is not empty. Also the errors of `push_folder`, except the hub's.
    """
    by_hook, target = _shareable_files(folder), Path(target)
    require_empty(target)
    target.mkdir(parents=True, exist_ok=True)
    for hook_name, (file, _) in by_hook.items():
        shutil.copyfile(file, statistics_file(target, hook_name))
    described = {hook_name: statistics for hook_name, (_, statistics) in by_hook.items()}
    figure = _draw(by_hook, target)
    card = _hub.statistics_card(repo_id, described, None if figure is None else figure.name)
    (target / "README.md").write_text(card)


def _draw(files: Mapping[str, tuple[Path, ActivationStatistics]], folder: Path) -> Path | None:
    """Draw the spectra of the hooks that have one."""
    spectra = {
        hook_name: torch.linalg.eigvalsh(statistics.covariance).clamp(min=0)
        for hook_name, (_, statistics) in files.items()
        if statistics.n_samples > 1
    }
    spectra = {hook_name: values for hook_name, values in spectra.items() if values.max() > 0}
    if not spectra:
        return None
    plot_eigenvalues(spectra, folder / "spectra.png")
    return folder / "spectra.png"


def _shareable_files(folder: str | Path) -> dict[str, tuple[Path, ActivationStatistics]]:
    by_hook: dict[str, tuple[Path, ActivationStatistics]] = {}
    for file in find_all_statistics(Path(folder).resolve(strict=True)):
        statistics = ActivationStatistics.load(file)
        hook_name = statistics.provenance.get("hook_name")
        if not isinstance(hook_name, str):
            raise ValueError(f"{file} does not name its hook: set provenance['hook_name']")
        if hook_name in by_hook:
            raise ValueError(f"{file} and another file are both of {hook_name}")
        if redacted(statistics.provenance) != statistics.provenance:
            raise ValueError(
                f"{file} holds an access token or a password in its provenance: load it and save "
                "it again to remove that"
            )
        by_hook[hook_name] = file, statistics
    return by_hook


def _of_a_run(folder: Path) -> Path | None:
    return next((folder / name for name in _OF_A_RUN if (folder / name).is_file()), None)


@contextlib.contextmanager
def _errors_mention_path(source: str | Path) -> Iterator[None]:
    """Add to errors about a repo that there is no such path: the user may have meant a path."""
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise type(error)(f"there is no file or folder {source}, and {error}") from error
