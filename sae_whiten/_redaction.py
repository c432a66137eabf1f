"""Removal of access tokens and passwords from everything that is written to files.

Settings, provenance, configs and command lines are shared together with results. The arguments that
loaded a model or a dataset may hold credentials, which must not be shared.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, TypeVar

__all__ = ["MARK", "redact_attributes", "redacted"]

MARK = "REDACTED"
"""Replaces each secret in a text."""

T = TypeVar("T")

_SECRET = re.compile(
    r"(^|_)(api_?key|account_key|access_key(_id)?|secret(_?key)?|secret_.*|private_key|password|passwd"
    r"|passphrase|pwd|credentials?|(proxy_)?authorization|auth|cookie|bearer|signature|sig)$"
)
_TOKEN = re.compile(r"(^|_)token$")
# special tokens of a vocabulary, which are not secrets
_VOCABULARY = re.compile(
    r"(^|_)(bos|eos|pad|unk|sep|cls|mask|separator|special|start|end|stop|image|audio|video|prefix"
    r"|suffix|middle)_token$"
)

_NAME = (
    r"[\w.-]*(?:token|key|key_?id|secret|password|passwd|passphrase|pwd|credentials?|authorization"
    r"|auth|cookie|signature|sig)"
)
_VALUE = (
    r"(?:"
    r'\\+"[^"\\]*\\+"'  # in quotes that are escaped, as in JSON within JSON
    r'|"(?:[^"\\]|\\.)*"'
    r"|'[^']*'"
    r"|(?:(?:bearer|basic|token)\s+)?[^\s&'\"\\]+"
    r")"
)
# matches only from the beginning of a word: otherwise long texts would take long
_ASSIGNED = re.compile(
    rf"(?<![\w.-])({_NAME})(\\*[\"']?\s*[:=]\s*)({_VALUE})",
    re.IGNORECASE,
)
_FLAG = re.compile(rf"(?<![\w.-])(--{_NAME})(\s+)((?!-){_VALUE})", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}://)[^/\s?#]+@", re.IGNORECASE)
# tokens recognised by the prefixes that services give them
_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|gh[a-z]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,}|AKIA[A-Z0-9]{12,}"
    r"|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
)


def redacted(value: T) -> T:
    """A copy of a value without secrets, or the value itself if its type cannot hold any.

    Entries of dictionaries under the name of a secret (token, HF_TOKEN, api_key, password,
    Authorization...) are left out, so that the rest can be read back and passed on as arguments. In
    texts, such as command lines and URLs, `MARK` replaces secrets. None, True and False are not
    secrets. Redacting twice changes nothing.

    Args:
        value: Anything; dictionaries, lists, tuples and texts are searched.

    Examples:
        >>> redacted({"revision": "v1", "token": "hf_abc", "headers": {"Authorization": "abc"}})
        {'revision': 'v1', 'headers': {}}
        >>> redacted("HF_TOKEN=abc load https://me:abc@host/data --api-key abc --k 32")
        'HF_TOKEN=REDACTED load https://REDACTED@host/data --api-key REDACTED --k 32'
    """
    return _redacted(value)


def redact_attributes(config: Any) -> None:
    """Remove secrets from an object's attributes, in place; an attribute that is one becomes None.

    For our own configs and metadata, once everything that needed the secrets is loaded. Then
    nothing that writes them later, SAELens and Weights & Biases included, can write a secret.
    """
    kept = redacted(vars(config))
    for name in vars(config):
        setattr(config, name, kept.get(name))


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return {
            _redacted(name): _redacted(content)
            for name, content in value.items()
            if not _holds_secret(name, content)
        }
    if isinstance(value, (list, tuple)):
        items = [_word_of_command(item) for item in value]
        for i, (name, content) in enumerate(pairwise(value)):
            if isinstance(content, str) and _comes_before_secret(name, len(value)):
                items[i + 1] = MARK
        if isinstance(value, list):
            return items
        # the constructor of a named tuple takes one argument per field
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _word_of_command(item: Any) -> Any:
    """A redacted item of a list, which may be --name=value with any value."""
    if isinstance(item, str) and item.startswith("--"):
        name, is_assigned, _ = item.partition("=")
        if is_assigned and _is_secret_name(name):
            return f"{name}={MARK}"
    return _redacted(item)


def _comes_before_secret(name: Any, length: int) -> bool:
    """Whether the next item of a list is a secret: `name` is a flag, or the first of a pair."""
    if not isinstance(name, str):
        return False
    is_pair = length == 2 and _SECRET.search(_words(name)) is not None
    return is_pair or (name.startswith("--") and _is_secret_name(name))


def _holds_secret(name: Any, content: Any) -> bool:
    """Whether an entry of a dictionary is a secret."""
    if content is None or isinstance(content, bool) or not isinstance(name, str):
        return False
    if _SECRET.search(_words(name)):
        parts = content if isinstance(content, (list, tuple)) else [content]
        return all(isinstance(part, (str, bytes, int, float)) for part in parts)
    # numbers and lists under "token" belong to a vocabulary
    return isinstance(content, (str, bytes)) and _is_secret_name(name)


def _is_secret_name(name: str) -> bool:
    words = _words(name)
    is_token = _TOKEN.search(words) and not _VOCABULARY.search(words)
    return bool(is_token or _SECRET.search(words))


def _words(name: str) -> str:
    """A name in lower case, its words separated by underscores."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.lstrip("-"))
    return re.sub(r"[^a-z0-9]+", "_", parted.lower())


def _text(text: str) -> str:
    for pattern in (_ASSIGNED, _FLAG):
        text = pattern.sub(_without_value, text)
    text = _IN_URL.sub(rf"\g<1>{MARK}@", text)
    text = _BEARER.sub(rf"\g<1>{MARK}", text)
    return _KNOWN.sub(MARK, text)


def _without_value(match: re.Match[str]) -> str:
    name, between, value = match.groups()
    if not _is_secret_name(name):
        return match.group()
    quote = re.match(r"""\\*["']""", value)
    mark = MARK if quote is None else f"{quote.group()}{MARK}{quote.group()}"
    return f"{name}{between}{mark}"
