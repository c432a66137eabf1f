"""The demo: when whitening pays, shown on tame and on anisotropic activations.

Activations of all-MiniLM-L6-v2 on docstrings of the Python standard library are tame: a small mean
and no outlier dimensions. An invertible map makes them as anisotropic as a residual stream of a
language model, and keeps what a probe can find. On each version three SAEs are trained: on raw, on
centred and on whitened activations. All see the same data in the same order and start from the same
random numbers. A process that does not import sae_whiten evaluates them. Nothing is downloaded.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_whiten._checks import FieldError, require_number
from sae_whiten._contexts import environment, without_messages
from sae_whiten.comparison.demo_text import DemoError, find_model, read_text

if TYPE_CHECKING:
    from torch import Tensor

    from sae_whiten.comparison.demo_activations import Activations
    from sae_whiten.estimation.spectrum import SpectrumSummary
    from sae_whiten.evaluation.labels import LabelledTexts

__all__ = ["CONDITIONS_SHOWN", "DemoError", "DemoOptions", "DemoResult", "run_demo"]

CONDITIONS_SHOWN = ("none", "centred", "original")
"""Of `sae_whiten.comparison.conditions`."""

_N_TEXTS = 40  # to probe with, of each combination of labels
_BATCH_SIZE = 512  # tokens; smaller than usual, for more steps in so short a training
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_NOISE = "To copy construct from a tensor"  # a warning that means nothing here: they are copied


@dataclass(frozen=True)
class DemoOptions:
    """What the demo trains.

    Raises:
        FieldError: There are fewer tokens than one batch has, or more active latents than latents.
    """

    out: Path = Path("sae_whiten_demo")
    """Where to write the SAEs and the figure."""

    tokens: int = 130_000
    """Training tokens of each SAE. More tokens explain more variance and take longer."""

    d_sae: int = 2048
    """Latents in each SAE's dictionary; the activations have 384 dimensions."""

    k: int = 32
    """Active latents per token (L0). Fewer are easier to interpret and explain less variance."""

    seed: int = 0
    """Seed of initial weights, order of the data and choice of held-out modules. Other seeds show
    how much of the results is chance."""

    def __post_init__(self) -> None:
        require_number("tokens", self.tokens)
        require_number("d_sae", self.d_sae)
        require_number("k", self.k)
        if self.tokens < _BATCH_SIZE:
            raise FieldError("tokens", self.tokens, f"must be at least one batch, {_BATCH_SIZE}")
        if self.k > self.d_sae:
            problem = f"not more latents can be active than there are (d_sae={self.d_sae})"
            raise FieldError("k", self.k, problem)


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


def run_demo(options: DemoOptions, tell: Callable[[str], None]) -> DemoResult:
    """Train the SAEs, evaluate them, and write everything to `options.out`.

    Args:
        options: What to train.
        tell: Called with each line of progress.

    Raises:
        DemoError: The demo cannot run here.
        KeyboardInterrupt: After Ctrl-C.
    """
    with environment(**_OFFLINE):  # keeps Hugging Face's libraries off their hub
        return _run(options, tell)


def _run(options: DemoOptions, tell: Callable[[str], None]) -> DemoResult:
    path = find_model()
    tell("Loading PyTorch and SAELens")
    from sae_lens.load_model import load_model
    from transformers import AutoTokenizer

    from sae_whiten.comparison.demo_activations import anisotropic_map, read_activations
    from sae_whiten.comparison.demo_training import quality, train_sae
    from sae_whiten.evaluation.labels import library_texts

    text = read_text(path, options.seed)
    labels = library_texts(_N_TEXTS, options.seed)
    with _without_known_noise():
        model: Any = load_model("AutoModelForCausalLM", str(path), "cpu")
        model.tokenizer = AutoTokenizer.from_pretrained(str(path))
    tell("Computing activations")
    tame = read_activations(model, text, labels, options.tokens, options.seed)
    versions = {"tame": tame, "anisotropic": tame.mapped(anisotropic_map(tame.train))}

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

    eigenvalues = {version: _eigenvalues(values.held_out) for version, values in versions.items()}
    result = DemoResult(
        n_held_out=len(tame.held_out),
        saes=saes,
        spectra={version: spectrum_summary(values) for version, values in eigenvalues.items()},
        mean_over_std={
            version: float(x.held_out.mean(0).norm() / x.held_out.var(0).sum().sqrt())
            for version, x in versions.items()
        },
    )
    _draw(result, eigenvalues, options)
    return result


def _evaluate(
    options: DemoOptions, version: str, activations: "Activations", labels: "LabelledTexts"
) -> dict[str, dict[str, Any]]:
    """Results of each SAE by condition. A separate process computes all but probing."""
    import numpy as np
    from safetensors.torch import load_file, save_file

    from sae_whiten.evaluation.probing import K_VALUES, sparse_probing

    folder = options.out / version
    script, x, latents = (
        options.out / "evaluate_saes.py",
        folder / "activations.safetensors",
        folder / "latents_of_texts.safetensors",
    )
    shutil.copyfile(Path(__file__).with_name("demo_evaluation.py"), script)
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
    by_condition = {}
    for condition, path in paths.items():
        values, n_train = pooled[path].numpy(), len(labels.train.texts)
        by_attribute = []
        for attribute in labels.train.labels:
            _, y, y_test = labels.encoded(attribute)
            by_attribute.append(sparse_probing(values[:n_train], y, values[n_train:], y_test))
        by_condition[condition] = {
            **results[path],
            "probing": {k: float(np.mean([by_k[k] for by_k in by_attribute])) for k in K_VALUES},
        }
    return by_condition


def _eigenvalues(x: "Tensor") -> "Tensor":
    import torch

    from sae_whiten import ActivationStatistics

    statistics = ActivationStatistics(x.shape[1])
    statistics.update(x)
    return torch.linalg.eigvalsh(statistics.covariance)


def _draw(result: DemoResult, eigenvalues: "dict[str, Tensor]", options: DemoOptions) -> None:
    from sae_whiten._paper_style import MARKERS, PAGE_WIDTH, new_figure, paper_style, save_figure
    from sae_whiten.estimation.spectrum import null_directions
    from sae_whiten.evaluation.probing import K_VALUES

    with paper_style():
        figure = new_figure(width=PAGE_WIDTH, height=2.4)
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
            for j, (condition, measured) in enumerate(saes.items()):
                label = condition if i == 0 else None
                dead.bar(4 * i + j, measured["dead_latents"], color=f"C{j}", label=label)
                probing.plot(
                    list(measured["probing"]),
                    list(measured["probing"].values()),
                    ("-", "--")[i],
                    color=f"C{j}",
                    marker=MARKERS[j],
                    markersize=3,
                )
        dead.set_xticks([1, 5], list(result.saes))
        dead.set_ylabel(f"dead latents, of {options.d_sae}")
        dead.legend(frameon=False, loc="upper left")
        probing.set(xscale="log", xlabel="latents that a probe uses", ylabel="probe accuracy")
        probing.set_xticks(K_VALUES, [str(k) for k in K_VALUES])
        probing.minorticks_off()
        save_figure(figure, options.out / "demo.png")


@contextlib.contextmanager
def _without_known_noise() -> Iterator[None]:
    """Hide _NOISE, and the progress bar of loading the model."""
    from transformers.utils import logging as transformers_logging

    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with without_messages("sae_lens", _NOISE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", _NOISE, UserWarning)
            yield
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()
