"""Statistics on the Hugging Face hub: a repo with one file for each hook.

This module knows statistics only as `Described`, because `ActivationStatistics` imports it.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

__all__ = [
    "Described",
    "cell",
    "download",
    "download_all",
    "file_name",
    "file_names",
    "hook_names",
    "make_repo",
    "no_such_hook",
    "repo_and_revision",
    "statistics_card",
    "upload",
    "writing",
]

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_CARD = "README.md"
_LONGEST = 200  # bytes of a file name: file systems take 255, and temporary names are longer
# characters that would lead to another folder, or that some file systems do not accept
_UNSAFE = re.compile(r'^\.|[/\\:*?"<>|%\x00-\x1f\x7f]')


class Described(Protocol):
    """What the card of a repo needs of statistics."""

    d_in: int
    n_samples: int
    provenance: dict[str, Any]


def file_name(hook_name: str) -> str:
    """The file name for a hook's statistics, which never leads to another folder.

    A hook's name may hold any characters, because it comes from a model or from the columns of a
    dataset. Characters with a meaning for file systems are written as %XX.

    Raises:
        ValueError: The name is empty or too long for a file.

    Examples:
        >>> file_name("blocks.0.hook_resid_pre"), file_name("../model")
        ('blocks.0.hook_resid_pre.safetensors', '%2E.%2Fmodel.safetensors')
    """
    name = _UNSAFE.sub(lambda found: f"%{ord(found.group()):02X}", hook_name) + _SUFFIX
    if not hook_name or len(name.encode()) > _LONGEST:
        raise ValueError(
            f"hook name {hook_name!r}: a file is named after it, so it must not be empty or longer "
            f"than {_LONGEST - len(_SUFFIX)} bytes"
        )
    return name


def file_names(hook_name: str) -> list[str]:
    """File names under which to look for a hook's statistics; those of earlier versions last."""
    names = [file_name(hook_name)]
    plain = hook_name + _SUFFIX
    leads_out = "\0" in plain or any(
        path.anchor or ".." in path.parts for path in (PurePosixPath(plain), PureWindowsPath(plain))
    )
    return names if leads_out or plain in names else [*names, plain]


def hook_names(file_names: Iterable[str]) -> list[str]:
    """The hooks of files of statistics, by file name; other files are ignored."""
    found = (name for name in file_names if name.endswith(_SUFFIX) and "/" not in name)
    return sorted(
        re.sub("%([0-9A-F]{2})", lambda code: chr(int(code[1], 16)), name.removesuffix(_SUFFIX))
        for name in found
    )


def repo_and_revision(source: str | Path) -> tuple[str, str | None]:
    """The repo and the revision in "user/name" or "user/name@revision".

    Raises:
        FileNotFoundError: `source` is neither.
    """
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


def download(repo_id: str, hook_name: str | None = None, revision: str | None = None) -> Path:
    """Download a hook's statistics into the cache of huggingface_hub, unless they are there.

    Args:
        repo_id: "user/name".
        hook_name: Name of the hook; None if the repo holds only one.
        revision: Branch, tag or commit; None: the main branch.

    Raises:
        FileNotFoundError: There is no such repo or revision, or it does not hold the hook.
        ConnectionError: The hub cannot be reached, and the file was not downloaded before.
        ValueError: `hook_name` is None, and the repo does not hold exactly one hook.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _reading(repo_id, revision):
        if hook_name is None:
            files = HfApi().list_repo_files(repo_id, revision=revision)
            candidates = [name for name in files if hook_names([name])]
            if len(candidates) != 1:
                names = hook_names(files)
                there = f"those of {', '.join(names)}" if names else "none"
                raise ValueError(f"name the hook whose statistics to take: {repo_id} holds {there}")
        else:
            candidates = file_names(hook_name)
        for name in candidates:
            try:
                path = hf_hub_download(repo_id, name, revision=revision)
            except LocalEntryNotFoundError:  # a subclass of EntryNotFoundError
                raise
            except EntryNotFoundError:
                continue
            # the path contains the commit
            logger.info("statistics of %s from the hub: %s", hook_names([name])[0], path)
            return Path(path)
        files = HfApi().list_repo_files(repo_id, revision=revision)
    raise FileNotFoundError(no_such_hook(repo_id, hook_name, files))


def download_all(repo_id: str, revision: str | None = None) -> Path:
    """Download the statistics of all hooks, and return the folder that holds them.

    Raises:
        FileNotFoundError: There is no such repo or revision.
        ConnectionError: The hub cannot be reached, and nothing was downloaded before.
    """
    from huggingface_hub import snapshot_download

    with _reading(repo_id, revision):
        found = snapshot_download(
            repo_id, revision=revision, allow_patterns=f"*{_SUFFIX}", ignore_patterns="*/*"
        )
    return Path(found)


def upload(
    files: Mapping[str, tuple[Path, Described]],
    repo_id: str,
    private: bool | None = None,
    figure: Path | None = None,
) -> str:
    """Upload statistics in one commit.

    A missing repo is created, and a missing README.md is written. Other files in the repo stay.

    Args:
        files: By hook name, the file and the statistics in it.
        repo_id: "user/name".
        private: Whether a new repo is private; None: the default of the account.
        figure: Figure of the spectra, for the card; None leaves it out.

    Returns:
        Address of the commit.

    Raises:
        ValueError: `private` is True, and the repo exists and is public.
        OSError: The hub cannot be reached, or refuses: no token, or no write permission.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    operations = [CommitOperationAdd(file_name(hook), file) for hook, (file, _) in files.items()]
    with writing(repo_id, "the statistics"):
        repo_id = make_repo(repo_id, private)
        if not api.file_exists(repo_id, _CARD):
            described = {hook: content for hook, (_, content) in files.items()}
            card = statistics_card(repo_id, described, None if figure is None else figure.name)
            operations.append(CommitOperationAdd(_CARD, card.encode()))
            if figure is not None:
                operations.append(CommitOperationAdd(figure.name, figure))
        commit = api.create_commit(
            repo_id, operations, commit_message=f"Statistics of {', '.join(files)}"
        )
    return commit.commit_url


def make_repo(repo_id: str, private: bool | None = None) -> str:
    """Create a repo if it does not exist, and return its full name.

    Raises:
        ValueError: `private` is True, and the repo exists and is public.
    """
    from huggingface_hub import HfApi

    repo_id = HfApi().create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not HfApi().repo_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public: nothing was uploaded")
    return repo_id


@contextlib.contextmanager
def writing(repo_id: str, what: str) -> Iterator[None]:
    """Turn errors into one that names what the hub did not accept, and what to do.

    Raises:
        OSError: An exception other than a ValueError was raised in the block.
    """
    try:
        yield
    except ValueError:  # among them huggingface_hub's own error for a malformed name
        raise
    except Exception as error:
        raise OSError(
            f"{repo_id}: the Hugging Face hub did not take {what} ({_one_line(error)}). "
            "Log in with `hf auth login`, or set HF_TOKEN to a token with the right to write."
        ) from error


def no_such_hook(place: str | Path, hook_name: str | None, files: Iterable[str]) -> str:
    """Error message for a folder or a repo that does not hold the requested hook."""
    there = ", ".join(hook_names(files)) or "no hook"
    return f"{place} holds no statistics of {hook_name}; there are those of {there}"


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
    except Exception as error:  # its type depends on the HTTP client of huggingface_hub
        raise ConnectionError(f"{name} cannot be read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def statistics_card(
    repo_id: str, by_hook: Mapping[str, Described], figure: str | None = None
) -> str:
    """README of a repo: its contents and their use; `figure` is the name of the spectra's file."""
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
    facts = [f"| {key} | {cell(value)} |" for key, value in shared.items()]
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
            *([f"![Spectra of the covariance]({figure})", ""] if figure else []),
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


def cell(value: Any) -> str:
    """A value as a cell of a Markdown table."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`".replace("|", "\\|").replace("\n", " ")
