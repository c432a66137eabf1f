"""Folders of statistics, one file per hook, on disk and on the Hugging Face hub."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sae_whiten._redaction import redacted
from sae_whiten.statistics import ActivationStatistics

__all__ = [
    "download_statistics",
    "find_all_statistics",
    "find_statistics",
    "push_folder",
    "statistics_file",
]

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_CARD = "README.md"


def statistics_file(directory: str | Path, hook_name: str) -> Path:
    """The file of a hook's statistics in a folder of them."""
    return Path(directory) / f"{hook_name}{_SUFFIX}"


def find_statistics(source: str | Path, hook_name: str | None) -> Path:
    """The file of a hook's statistics, downloaded if need be.

    Args:
        source: A file, a folder with one file for each hook, the folder that a training run wrote,
            or a repo of the Hugging Face hub, "user/name" or "user/name@revision". What exists on
            disk goes before the hub.
        hook_name: Name of the hook; None if it is not known, which a file does not mind.

    Raises:
        FileNotFoundError: `source` is none of these, or holds nothing of this hook.
        ConnectionError: The hub cannot be reached, and the file was not downloaded before.
        ValueError: `hook_name` is None, and `source` does not hold a single file.
    """
    path = Path(source)
    if not path.exists():
        with _not_a_path_either(source):
            repo_id, revision = _repo_and_revision(source)
            return download_statistics(repo_id, hook_name, revision)
    if not path.is_dir():
        return path
    of_a_run = statistics_file(path, "activation_statistics")
    if of_a_run.is_file():
        return of_a_run
    if hook_name is None:
        raise ValueError(f"{path} is a folder, and the hook is not known: give the file itself")
    file = statistics_file(path, hook_name)
    if not file.is_file():
        raise FileNotFoundError(_no_such_hook(path, hook_name, [p.name for p in path.iterdir()]))
    return file


def find_all_statistics(source: str | Path) -> list[Path]:
    """The files of all hooks' statistics in a file, folder or repo; as for `find_statistics`.

    In the folder that a training run wrote, that is its statistics alone, not its weights.

    Raises:
        FileNotFoundError: `source` is neither a path nor a repo, or holds no statistics.
        ConnectionError: The hub cannot be reached, and nothing was downloaded before.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.exists():
        from huggingface_hub import snapshot_download

        with _not_a_path_either(source):
            repo_id, revision = _repo_and_revision(source)
            with _reading(repo_id, revision):
                path = Path(
                    snapshot_download(
                        repo_id,
                        revision=revision,
                        allow_patterns=f"*{_SUFFIX}",
                        ignore_patterns="*/*",
                    )
                )
    of_a_run = statistics_file(path, "activation_statistics")
    files = [of_a_run] if of_a_run.is_file() else sorted(path.glob(f"*{_SUFFIX}"))
    if not files:
        raise FileNotFoundError(f"{source} holds no statistics")
    return files


def download_statistics(
    repo_id: str, hook_name: str | None = None, revision: str | None = None
) -> Path:
    """Download a hook's statistics into the cache of huggingface_hub, unless they are there.

    Args:
        repo_id: "user/name".
        hook_name: Name of the hook; None if the repo holds but one.
        revision: Branch, tag or commit; None: the main branch.

    Raises:
        FileNotFoundError: There is no such repo, revision, or hook in it.
        ConnectionError: The hub cannot be reached, and the file was not downloaded before.
        ValueError: `hook_name` is None, and the repo holds several.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _reading(repo_id, revision):
        if hook_name is None:
            names = _hooks(HfApi().list_repo_files(repo_id, revision=revision))
            if len(names) != 1:
                there = f"those of {', '.join(names)}" if names else "none"
                raise ValueError(f"name the hook whose statistics to take: {repo_id} holds {there}")
            hook_name = names[0]
        try:
            path = hf_hub_download(repo_id, f"{hook_name}{_SUFFIX}", revision=revision)
        except LocalEntryNotFoundError:  # an EntryNotFoundError too
            raise
        except EntryNotFoundError as error:
            files = HfApi().list_repo_files(repo_id, revision=revision)
            raise FileNotFoundError(_no_such_hook(repo_id, hook_name, files)) from error
    logger.info("statistics of %s from the hub: %s", hook_name, path)  # the path has the commit
    return Path(path)


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
        CorruptFileError: A file is truncated, foreign or was changed.
        ValueError: A file does not name its hook or holds a secret, or the repo is public and was
            to be private.
        OSError: The hub cannot be reached, or refuses: no token, or none with the right to write.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = find_all_statistics(Path(folder).resolve(strict=True))
    statistics = {file: ActivationStatistics.load(file) for file in files}
    by_hook: dict[str, ActivationStatistics] = {}
    operations = []
    for file, found in statistics.items():
        hook_name = found.provenance.get("hook_name")
        if not isinstance(hook_name, str):
            raise ValueError(
                f"{file} does not say of which hook it is: set provenance['hook_name']"
            )
        if hook_name in by_hook:
            raise ValueError(f"{file} is of {hook_name}, like another file beside it")
        if redacted(found.provenance) != found.provenance:
            raise ValueError(
                f"{file} holds an access token or a password in its provenance: load it and save "
                "it again, which leaves that out"
            )
        by_hook[hook_name] = found
        operations.append(CommitOperationAdd(f"{hook_name}{_SUFFIX}", file))
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public: nothing was uploaded")
        if not api.file_exists(repo_id, _CARD):
            operations.append(CommitOperationAdd(_CARD, _card(repo_id, by_hook).encode()))
        commit = api.create_commit(
            repo_id, operations, commit_message=f"Statistics of {', '.join(by_hook)}"
        )
    except ValueError:  # among them the hub's own about a malformed name
        raise
    except Exception as error:
        raise OSError(
            f"{repo_id}: the Hugging Face hub did not take the statistics ({_one_line(error)}). "
            "Log in with `hf auth login`, or set HF_TOKEN to a token with the right to write."
        ) from error
    return commit.commit_url


def _repo_and_revision(source: str | Path) -> tuple[str, str | None]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo_id, _, revision = str(source).partition("@")
    with contextlib.suppress(HFValidationError):
        validate_repo_id(repo_id)
        if "/" in repo_id:
            return repo_id, revision or None
    raise FileNotFoundError(
        "it is not the name of a repo of the Hugging Face hub, user/name or user/name@revision"
    )


@contextlib.contextmanager
def _not_a_path_either(source: str | Path) -> Iterator[None]:
    """Say in errors about a repo that there is no such path, for it may have been meant."""
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise type(error)(f"there is no file or folder {source}, and {error}") from error


@contextlib.contextmanager
def _reading(repo_id: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"the repo {repo_id} on the Hugging Face hub"
    try:
        yield
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{name} is gated: ask for access on its page, and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} does not exist, or is private and you are not logged in (`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(f"{name} cannot be reached, and is not in the cache") from error
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:  # of whichever HTTP client huggingface_hub has
        raise ConnectionError(f"{name} cannot be read: {_one_line(error)}") from error


def _hooks(files: list[str]) -> list[str]:
    found = (name for name in files if name.endswith(_SUFFIX) and "/" not in name)
    return sorted(name.removesuffix(_SUFFIX) for name in found)


def _no_such_hook(place: str | Path, hook_name: str, files: list[str]) -> str:
    there = ", ".join(_hooks(files)) or "no hook"
    return f"{place} holds no statistics of {hook_name}; there are those of {there}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _card(repo_id: str, by_hook: Mapping[str, ActivationStatistics]) -> str:
    """README of a repo: what it holds, and how to use it."""
    from huggingface_hub import ModelCardData

    header = ModelCardData(library_name="sae-whiten", tags=["sae-whiten"]).to_yaml()
    first, *others = (found.provenance for found in by_hook.values())
    shared: dict[str, Any] = {
        key: value
        for key, value in first.items()
        if key not in ("hook_name", "inflation")
        and all(key in other and other[key] == value for other in others)
    }
    hooks = [
        f"| `{hook_name}` | {found.d_in} | {found.n_samples} | {_percent(found.provenance)} |"
        for hook_name, found in by_hook.items()
    ]
    facts = [f"| {key} | {_cell(value)} |" for key, value in shared.items()]
    return "\n".join(
        [
            "---",
            header.strip(),
            "---",
            "",
            f"# Activation statistics of {shared.get('model_name', 'a language model')}",
            "",
            "Mean and covariance of a language model's activations, in float64, to train sparse",
            "autoencoders under whitening with the Python package sae-whiten. One file per hook;",
            "when this was written:",
            "",
            "| hook | width | activations | excess variance of held-out activations |",
            "|---|---|---|---|",
            *hooks,
            "",
            *(["How they were estimated:", "", "| | |", "|---|---|", *facts, ""] if facts else []),
            "## Use",
            "",
            "```python",
            "from sae_whiten import ActivationStatistics",
            "",
            f'statistics = ActivationStatistics.from_hub("{repo_id}", "{next(iter(by_hook))}")',
            "```",
            "",
            "```",
            f"sae-whiten inspect {repo_id}",
            f"sae-whiten train --whitening.statistics {repo_id} ...",
            "```",
            "",
        ]
    )


def _percent(provenance: Mapping[str, Any]) -> str:
    inflation = provenance.get("inflation")
    return "-" if inflation is None else f"{inflation:.2%}"


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`".replace("|", "\\|").replace("\n", " ")
