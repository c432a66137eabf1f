"""The command line: parsing, help, exit codes, and one real run of `sae-whiten train`."""

import ast
import dataclasses
import errno
import importlib
import importlib.util
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError

import sae_whiten
import sae_whiten.training.runner_parts  # before a test replaces what it takes from SAELens
from sae_whiten import ActivationStatistics, WhiteningConfig
from sae_whiten.cli import COMMANDS, main, train
from sae_whiten.cli._options import help_of
from tests.processes import run_code
from tests.support import ROOT, tiny_model

OF_TINY_MODEL = ["--context_size", "32", "--n_batches_in_buffer", "128"]

TOPK = ["--architecture", "topk", "--d_in", "16", "--d_sae", "32"]


class FakeRunner:
    """Records what it is called with and returns an SAE with the metadata of a real run."""

    model = None
    cfg: Any
    whitening: Any
    options: dict[str, Any]

    def __init__(self, cfg: Any, whitening: WhiteningConfig | None = None, **options: Any) -> None:
        FakeRunner.cfg, FakeRunner.whitening, FakeRunner.options = cfg, whitening, options

    def run(self) -> Namespace:
        check = {"fold_error": 2.5e-7, "tolerance": 1e-5, "source": "held-out"}
        metadata = Namespace(whitening={"fold": {"check": check}})
        return Namespace(cfg=Namespace(metadata=metadata))


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> type[FakeRunner]:
    # not setattr, which would first import the real one
    monkeypatch.setitem(vars(sae_whiten), "WhiteningTrainingRunner", FakeRunner)
    return FakeRunner


# --- sae-whiten


def test_help_and_version_import_neither_torch_nor_sae_lens() -> None:
    code = """
import sys
from sae_whiten.cli import main
for arguments in (["--help"], ["--version"], ["train"], ["demo", "--help"]):
    try:
        main(arguments)
    except SystemExit:
        pass
print([name for name in ("torch", "sae_lens", "scipy", "numpy") if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("[]\n")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sae-whiten {sae_whiten.__version__}\n"


def test_python_dash_m_runs_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sae_whiten", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"sae-whiten {sae_whiten.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["train"]])
def test_without_arguments_help_goes_to_stderr(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: sae-whiten")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tarin"], "invalid choice: 'tarin'"),
        (["--verbose", "--quiet", "train"], "not allowed with argument"),
        (["demo", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["demo", "--dsae", "8"], "did you mean --d-sae?"),
        (["demo", "--d_sae", "many"], "--d-sae"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


class OurError(Exception):
    pass


OurError.__module__ = "sae_whiten.somewhere"


def raising(error: BaseException) -> Callable[[Namespace], int]:
    def run(args: Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize("error", [ValueError, OSError, OurError])
def test_user_errors_are_one_line(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "run", raising(error("stats.safetensors: no such file")))
    assert main(["train"]) == 2
    line = "sae-whiten train: error: stats.safetensors: no such file\n"
    assert capsys.readouterr().err == line

    assert main(["--verbose", "train"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert text.endswith(line)


def test_a_field_to_set_is_named_by_its_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ValueError("set WhiteningConfig(allow_other_statistics=True). WhiteningConfig(x=1)")
    monkeypatch.setattr(train, "run", raising(error))
    assert main(["train"]) == 2
    end = "set --whitening.allow_other_statistics true. WhiteningConfig(x=1)\n"
    assert capsys.readouterr().err.endswith(end)


def test_bugs_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "run", raising(RuntimeError("a bug")))
    assert main(["train"]) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_missing_optional_package_is_one_line_but_a_broken_import_is_a_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_optional(args: Namespace) -> int:
        try:
            return broken(args)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("figures need: pip install matplotlib") from error

    def broken(args: Namespace) -> int:
        return importlib.import_module("sae_whiten.pip install").VALUE

    monkeypatch.setattr(train, "run", without_optional)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == (
        "sae-whiten train: error: figures need: pip install matplotlib\n"
    )
    for error in (broken, raising(ModuleNotFoundError("No module named 'a'", name="a"))):
        monkeypatch.setattr(train, "run", error)
        assert main(["train"]) == 1
        assert capsys.readouterr().err.startswith("Traceback")


def inside_torch(args: Namespace) -> int:
    torch.distributions.Normal(torch.zeros(2), torch.zeros(3))
    return 0


def inside_a_library_in_c(args: Namespace) -> int:
    np.dot(np.zeros(2), np.zeros(3))
    return 0


@pytest.mark.parametrize("run", [inside_torch, inside_a_library_in_c])
def test_value_errors_of_numerical_libraries_keep_their_traceback(
    run: Callable[[Namespace], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train, "run", run)
    assert main(["train"]) == 1
    assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    ],
    ids=["file", "safetensors", "torch.save"],
)
def test_a_full_disk_is_one_line_and_a_failure_that_is_not_the_users(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: Namespace) -> int:
        try:
            raise error
        except Exception as cause:
            raise ValueError("the SAE was not saved") from cause

    for failing in (raising(error), run):
        monkeypatch.setattr(train, "run", failing)
        assert main(["train"]) == 1
        err = capsys.readouterr().err
        assert "the disk or its quota is full" in err
        assert err.count("\n") == 1


# all fields: tests/test_checks.py
@pytest.mark.parametrize(
    ("flags", "whitened"),
    [
        (["--training_tokens", "0"], True),
        (["--train_batch_size_tokens", "0"], True),
        (["--k", "33"], True),
        (["--k", "33"], False),
        (["--k", "0"], False),
        (["--device", "cuda:99"], True),
    ],
)
def test_train_refuses_what_cannot_be_trained_and_names_the_flag(
    flags: list[str],
    whitened: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing is to be loaded first")

    for module in ("sae_lens.llm_sae_training_runner", "sae_lens.load_model"):
        monkeypatch.setattr(f"{module}.load_model", load)
    plain = ["--architecture=topk_vsae", "--normalize_activations=none"]
    chosen = [] if whitened else plain
    assert main(["-q", "train", *TOPK, "--k", "8", *chosen, *flags]) == 2
    err = capsys.readouterr().err
    assert f"{flags[0]}" in err
    assert flags[1] in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        ("synthetic", "--device", "cuda:99"),
        ("synthetic", "--steps", "0"),
        ("synthetic", "--lr", "inf"),
        ("synthetic", "--junk", "-1"),
        ("synthetic", "--condition-number", "0.5"),
        ("landscape", "--angle", "0"),
        ("landscape", "--ratio", "-1"),
        ("demo", "--k", "0"),
        ("afa", "--n-prompts", "few"),
        ("afa", "--device", "cuda:99"),
        ("evaluate", "--batch-size-prompts", "0"),
        ("latents", "--device", "cuda:99"),
        ("compare", "--device", "cuda:99"),
        ("fit", "--device", "cuda:99"),
    ],
)
def test_commands_refuse_what_cannot_work_in_one_line_that_names_the_flag(
    command: str, flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saes = ["sae"] if command in ("afa", "evaluate", "latents") else []
    if command in ("compare", "fit"):
        saes = ["--model-name", "m", "--dataset-path", "d", "--hook-name", "h"]
    try:
        status: Any = main([command, *saes, "--out", str(tmp_path / "out.png"), flag, value])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    err = capsys.readouterr().err
    assert flag in err
    assert value in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_130_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "run", raising(KeyboardInterrupt()))
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "sae-whiten train: interrupted\n"


def test_exit_status_of_a_signal_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "run", raising(SystemExit(143)))
    with pytest.raises(SystemExit) as exit_:
        main(["train"])
    assert exit_.value.code == 143


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ([], ["ours info", "ours warning", "theirs warning"]),
        (["--quiet"], ["ours warning", "theirs warning"]),
        (["-v"], ["ours debug", "ours info", "ours warning", "theirs info", "theirs warning"]),
    ],
)
def test_log_levels(
    flags: list[str],
    shown: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(args: Namespace) -> int:
        for name, logger in (("ours", "sae_whiten.x"), ("theirs", "sae_lens.x")):
            for level in (logging.DEBUG, logging.INFO, logging.WARNING):
                logging.getLogger(logger).log(level, f"{name} {logging.getLevelName(level)}")
        return 0

    loggers = [logging.getLogger(name) for name in ("sae_whiten", "sae_lens")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    monkeypatch.setattr(train, "run", run)
    assert main([*flags, "train"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(maxsplit=2)[2].lower() for line in lines] == shown
    assert [(logger.level, logger.handlers) for logger in loggers] == before


# --- sae-whiten train: parsing


def test_whitening_flags_default_to_the_config(runner: type[FakeRunner]) -> None:
    assert main(["train", *TOPK]) == 0
    assert runner.whitening == WhiteningConfig()
    assert runner.cfg.sae.normalize_activations == "covariance_whitening"


def test_every_whitening_flag(runner: type[FakeRunner]) -> None:
    values = {
        "kind": "zca",
        "eps": 1e-4,
        "eps_mode": "absolute",
        "shrinkage": 0.25,
        "strength": 0.5,
        "loss_space": "whitened",
        "sparsity_norms": "original",
        "n_samples": 5000,
        "tolerance": 0.01,
        "statistics": "gpt2-stats",
        "allow_other_statistics": True,
        "on_nonfinite": "skip",
        "temporary_folder": "scratch",
    }
    assert set(values) == {field.name for field in dataclasses.fields(WhiteningConfig)}
    # given statistics leave nothing to estimate, so there are two calls
    for left_out in (("statistics",), ("n_samples", "tolerance")):
        given = {name: value for name, value in values.items() if name not in left_out}
        flags = [text for name in given for text in (f"--whitening.{name}", str(given[name]))]
        assert main(["train", *flags[:6], *TOPK, *flags[6:]]) == 0
        found = dataclasses.asdict(runner.whitening)
        assert {name: found[name] for name in given} == given
        assert type(runner.whitening.n_samples) in (int, type(None))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--whitening.shrinkage", "oas"], {"shrinkage": "oas"}),
        (["--whitening.shrinkage=none"], {"shrinkage": None}),
        (["--whitening.shrinkage=0"], {"shrinkage": 0.0}),
        (["--whitening.n_samples", "None"], {"n_samples": None}),
        (["--whitening.strength=0"], {"strength": 0.0}),
    ],
)
def test_whitening_values(
    flags: list[str], expected: dict[str, Any], runner: type[FakeRunner]
) -> None:
    assert main(["train", *TOPK, *flags]) == 0
    assert runner.whitening == WhiteningConfig(**expected)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("kind", "ica", "'ica' is not one of pca|zca"),
        ("shrinkage", "ledoit", "'ledoit' is not one of FLOAT|oas|none"),
        ("n_samples", "many", "'many' is not one of INT|none"),
        ("n_samples", "1.5", "'1.5' is not one of INT|none"),
        ("strength", "full", "'full' is not one of FLOAT"),
    ],
)
def test_values_of_another_type(
    flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", *TOPK, f"--whitening.{flag}", value])
    assert exit_.value.code == 2
    assert f"argument --whitening.{flag}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--whitening.strength", "1.5"], "error: --whitening.strength=1.5: must"),
        (["--whitening.eps", "-1"], "eps=-1.0"),
        (["--whitening.eps", "nan"], "eps=nan"),
        (["--whitening.statistics", "s", "--whitening.n_samples", "9"], "n_samples=9: the stat"),
        (["--whitening.statistics", "s", "--whitening.tolerance", "0.1"], "nothing is estimated"),
        # abbreviations would change their meaning when a flag is added
        (["--whitening.kin", "zca"], "unknown flag --whitening.kin"),
        (["--whitening.epsilon=1"], "unknown flag --whitening.epsilon=1; there are"),
        (["--normalize_activations", "none"], "--normalize_activations none contradicts"),
        (["--sae.normalize_activations=layer_norm"], "layer_norm contradicts"),
        (["--normalize_act", "none"], "If --normalize_activations is meant, write it in full"),
        # SAELens would take it, and train its default architecture
        (["--arch", "gated"], "--arch: unknown flag. If --architecture is meant"),
        (["--resume=checkpoint"], "--resume: unknown flag"),
        (["--no_such_flag", "3"], "unrecognized arguments: --no_such_flag 3"),
        (["--trainig-tokens", "3"], "did you mean --training_tokens?"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--k", "few"], "invalid int value: 'few'"),
        (["--architecture", "nope"], "invalid choice: 'nope'"),
    ],
)
def test_refused_with_one_line(
    flags: list[str], message: str, runner: type[FakeRunner], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *TOPK, *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sae-whiten train: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--sae.normalize_activations=covariance_whitening"]])
@pytest.mark.parametrize("architecture", ["matching_pursuit", "top_afa"])
def test_architecture_that_cannot_be_folded_is_refused_unless_it_is_not_to_be_whitened(
    architecture: str,
    flags: list[str],
    runner: type[FakeRunner],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", f"--architecture={architecture}", *flags]) == 2
    err = capsys.readouterr().err
    assert f"--architecture {architecture}" in err
    assert "--normalize_activations none" in err
    assert err.count("\n") == 1

    none = ["--normalize_activations", "none", "--whitening.eps", "0.1"]
    assert main(["train", "--architecture", architecture, *none]) == 2
    err = capsys.readouterr().err
    assert "--whitening.eps" in err


def test_flags_of_our_architectures(
    runner: type[FakeRunner],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--kl_coefficient", "0.1", "--sae.variance", "fixed", "--relu_mean", "True"]
    assert main(["train", "--architecture", "topk_vsae", *flags]) == 0
    sae = runner.cfg.sae
    assert (sae.architecture(), sae.kl_coefficient) == ("topk_vsae", 0.1)
    assert (sae.variance, sae.relu_mean) == ("fixed", True)
    assert sae.normalize_activations == "covariance_whitening"
    capsys.readouterr()
    # SAELens' own command line does not know it, so without whitening it is trained here too
    monkeypatch.setattr("sae_lens.LanguageModelSAETrainingRunner", FakeRunner)
    monkeypatch.setattr(FakeRunner, "model", tiny_model())
    none = ["--architecture", "topk_vsae", "--normalize_activations", "none", *OF_TINY_MODEL]
    assert main(["train", *none]) == 0
    assert runner.cfg.sae.normalize_activations == "none"
    printed = capsys.readouterr().out
    assert "not whitened\n" in printed
    assert "import sae_whiten" not in printed
    for architecture, said in (
        ("topk_vsae", "Steps over which the coefficient rises linearly from"),
    ):
        assert main(["train", "--architecture", architecture, "--help"]) == 0
        assert said in capsys.readouterr().out


def test_saelens_flags_pass_through(runner: type[FakeRunner]) -> None:
    flags = "-k 7 --hook_name blocks.1.hook_resid_pre --seqpos_slice 2 -1 --verbose False"
    nested = "--sae.dtype bfloat16 --dtype float32 --nolog_to_wandb"
    other = ["--model_kwargs", json.dumps({"a": 1}), "--checkpoint_path"]
    assert main(["train", *TOPK, *flags.split(), *nested.split(), *other]) == 0
    cfg = runner.cfg
    assert (cfg.sae.k, cfg.sae.d_in, cfg.sae.d_sae) == (7, 16, 32)
    assert (cfg.sae.dtype, cfg.dtype) == ("bfloat16", "float32")
    assert cfg.hook_name == "blocks.1.hook_resid_pre"
    assert tuple(cfg.seqpos_slice) == (2, -1)
    assert (cfg.verbose, cfg.logger.log_to_wandb) == (False, False)
    assert cfg.model_kwargs == {"a": 1}
    assert cfg.checkpoint_path is None


def test_nested_flags_with_their_prefix(runner: type[FakeRunner]) -> None:
    flags = ["--sae.k", "9", "--sae.d_in=64", "--sae.dtype=bfloat16", "--logger.log_to_wandb=False"]
    assert main(["train", *TOPK, *flags]) == 0
    cfg = runner.cfg
    assert (cfg.sae.k, cfg.sae.d_in, cfg.sae.dtype, cfg.dtype) == (9, 64, "bfloat16", "float32")
    assert not cfg.logger.log_to_wandb


def test_flags_may_be_written_with_hyphens(runner: type[FakeRunner]) -> None:
    flags = ["--training-tokens", "5000", "--sae.d-sae=64", "--whitening.n-samples", "999"]
    assert main(["train", *TOPK, *flags]) == 0
    assert (runner.cfg.training_tokens, runner.cfg.sae.d_sae) == (5000, 64)
    assert runner.whitening.n_samples == 999


def test_the_seed_reaches_torch_whichever_it_is(runner: type[FakeRunner]) -> None:
    drawn = []
    for seed in ("42", "42", "7"):
        torch.seed()
        assert main(["train", *TOPK, "--seed", seed]) == 0
        drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_example_in_the_help_is_complete(runner: type[FakeRunner]) -> None:
    program, *arguments = shlex.split(train.EXAMPLE.replace("\\\n", " "))
    assert program == "sae-whiten"
    assert main(arguments) == 0
    cfg = runner.cfg
    assert (cfg.model_name, cfg.sae.k, cfg.logger.log_to_wandb) == ("gpt2", 32, False)
    assert runner.whitening == WhiteningConfig(kind="pca", shrinkage="oas")


def test_help_shows_our_flags_then_those_of_saelens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--architecture", "topk", "--help"]) == 0
    text = capsys.readouterr().out
    ours = [text.index(f"--whitening.{f.name} ") for f in dataclasses.fields(WhiteningConfig)]
    assert ours == sorted(ours)
    assert ours[-1] < text.index("--training_tokens int") < text.index("Number of top features")
    for field in dataclasses.fields(WhiteningConfig):
        told = help_of(WhiteningConfig, field.name, brief=True)
        assert told in " ".join(text.split()).replace("- ", "-")
    # neither SAELens' usage nor the signatures of its configs, which are thousands of characters
    assert text.count("usage:") == 1
    assert "\nCommandLineRunnerConfig:\n" in text
    assert "\nTopKTrainingSAEConfig:\n" in text
    assert max(map(len, text.splitlines())) < 300


def test_a_parser_that_saelens_moved_is_a_clear_error(
    runner: type[FakeRunner], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sae_lens.llm_sae_training_runner

    monkeypatch.delattr(sae_lens.llm_sae_training_runner, "_parse_cfg_args")
    assert main(["train", *TOPK]) != 0
    err = capsys.readouterr().err
    assert f"sae-lens {sae_lens.__version__}" in err


# --- sae-whiten train: running


def test_report(runner: type[FakeRunner], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TOPK, "--output_path", "my sae"]) == 0
    out = capsys.readouterr().out
    assert "2.5e-07" in out
    assert "tolerance 1e-05" in out
    assert "SAE.load_from_disk('my sae')" in out

    assert main(["train", *TOPK, "--output_path"]) == 0
    assert "not saved" in capsys.readouterr().out


WORDS = [f"w{i}" for i in range(60)]


def random_texts(n_texts: int, n_words: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(len(WORDS), (n_texts, n_words), generator=generator)
    return [" ".join(WORDS[i] for i in row) for row in indices.tolist()]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<bos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A complete command that trains on a small GPT-2 and texts in files, for 20 steps."""
    from transformers import GPT2Config, GPT2LMHeadModel

    save_tokenizer(tmp_path / "model")
    torch.manual_seed(0)
    size = GPT2Config(vocab_size=62, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(size).save_pretrained(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    lines = [json.dumps({"text": text}) for text in random_texts(400, 64)]
    (tmp_path / "texts" / "train.jsonl").write_text("\n".join(lines))
    return [
        *["train", "--architecture", "topk", "--d_in", "16", "--d_sae", "64", "--sae.k", "4"],
        *["--model_class_name", "AutoModelForCausalLM", "--model_name", f"{tmp_path}/model"],
        *["--hook_name", "transformer.h.0", "--dataset_path", f"{tmp_path}/texts"],
        *["--is_dataset_tokenized", "False", "--context_size", "16", "--verbose", "False"],
        *["--store_batch_size_prompts", "8", "--n_batches_in_buffer", "16"],
        *["--train_batch_size_tokens", "128", "--training_tokens", "2560"],
        *["--log_to_wandb", "False", "--checkpoint_path", f"{tmp_path}/checkpoints"],
        *["--output_path", f"{tmp_path}/sae", "--whitening.n_samples", "2000"],
    ]


def test_train_from_files_to_a_plain_saelens_sae(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sae_lens import SAE

    assert main(["--quiet", *arguments]) == 0
    out = capsys.readouterr().out
    assert f"SAE.load_from_disk('{tmp_path}/sae')" in out

    sae = SAE.load_from_disk(str(tmp_path / "sae"))
    assert (sae.cfg.architecture(), sae.cfg.d_in, sae.cfg.d_sae) == ("topk", 16, 64)
    assert sae.cfg.normalize_activations == "none"
    saved = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]["whitening"]
    assert saved["config"]["n_samples"] == 2000
    assert f"fold error: {saved['fold']['check']['fold_error']:.2g}" in out


def test_topk_vsae_is_trained_under_whitening_and_saved_as_topk(
    arguments: list[str], tmp_path: Path
) -> None:
    from sae_lens import SAE

    arguments[arguments.index("topk")] = "topk_vsae"
    flags = ["--variance", "learned", "--kl_coefficient", "0.01", "--kl_warm_up_steps", "2"]
    assert main(["--quiet", *arguments, *flags]) == 0
    sae = SAE.load_from_disk(str(tmp_path / "sae"))
    assert sae.cfg.architecture() == "topk"
    metadata = sae.cfg.metadata
    assert metadata.whitening["fold"]["check"]["fold_error"] < 1e-5
    assert metadata.training_architecture == "topk_vsae"
    assert metadata.training_architecture_details["kl_warm_up_steps"] == 2


def test_top_afa_is_trained_without_whitening_and_the_report_says_so(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--sae.k", "--whitening.n_samples"):
        i = arguments.index(flag)
        del arguments[i : i + 2]
    arguments[arguments.index("topk")] = "top_afa"
    assert main(["--quiet", *arguments, "--normalize_activations", "none"]) == 0
    out = capsys.readouterr().out
    assert "not whitened" in out
    program = out[out.index("load it:") :].replace("load it:", "        ")
    names: dict[str, Any] = {}
    exec(textwrap.dedent(program), names)
    assert names["sae"].cfg.architecture() == "top_afa"
    assert "import sae_whiten" in program
    assert not list(tmp_path.glob("sae/whitening*"))


def test_ctrl_c_in_saelens_own_runner_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sae_lens
    from sae_lens.llm_sae_training_runner import InterruptedException

    class Interrupted:
        model = tiny_model()

        def __init__(self, cfg: Any, **options: Any) -> None:
            assert cfg.sae.normalize_activations == "expected_average_only_in"

        def run(self) -> None:
            raise InterruptedException

    monkeypatch.setattr(sae_lens, "LanguageModelSAETrainingRunner", Interrupted)
    scaled = ["--normalize_activations", "expected_average_only_in"]
    assert main(["train", "--architecture", "top_afa", *scaled, *OF_TINY_MODEL]) == 130
    assert capsys.readouterr().err.endswith("sae-whiten train: interrupted\n")


def test_train_takes_what_fit_wrote_unless_it_was_fitted_otherwise(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError("the hub does not answer")

    monkeypatch.setattr("sae_whiten.estimation.folders.push_folder", refuse)
    stats = str(tmp_path / "stats")
    fit = [
        *["fit", "--model-class-name", "AutoModelForCausalLM", "--model-name", f"{tmp_path}/model"],
        *["--dataset-path", f"{tmp_path}/texts", "--hook-name", "transformer.h.?"],
        *["--context-size", "16", "--seqpos-slice", "1", "none", "--exclude-special-tokens"],
        *["--n-samples", "2000", "--batch-size-prompts", "8", "--out", stats],
    ]
    assert main(["--quiet", *fit, "--push-to-hub", "user/name"]) == 2
    assert f"saved in {stats}" in capsys.readouterr().out  # before it was to be uploaded
    whitening = ["--whitening.statistics", stats, "--whitening.n_samples", "none"]
    train = ["--quiet", *arguments, *whitening]
    same = ["--seqpos_slice", "1", "16", "--exclude_special_tokens", "True"]
    assert main([*train, *same]) == 0
    fitted = ActivationStatistics.load(Path(stats) / "transformer.h.0.safetensors")
    trained = ActivationStatistics.load(
        tmp_path / "sae" / "sae_whiten" / "activation_statistics.safetensors"
    )
    assert trained.digest == fitted.digest
    capsys.readouterr()
    assert main([*train, *same, "--autocast_lm", "True"]) == 2
    assert "autocast_lm=False (training has True)" in capsys.readouterr().err
    assert main(train) == 2
    assert "seqpos_slice=[1, None] (training has" in capsys.readouterr().err


def test_a_hook_that_is_not_there_is_refused_with_the_nearest_and_a_wrong_width_with_the_right(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--quiet", *arguments, "--hook_name", "h.0"]) == 2
    assert "no hook 'h.0'; nearest: transformer.h.0" in capsys.readouterr().err
    assert main(["--quiet", *arguments, "--d_in", "32"]) == 2
    assert (
        "--d_in 32: the activations at transformer.h.0 are of width 16" in capsys.readouterr().err
    )


def test_a_model_that_cannot_be_loaded_is_one_short_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*command: str) -> str:
        assert main(["--quiet", *command]) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert len(err) < 300
        return err

    folder = f"{tmp_path}/model is a folder. AutoModelForCausalLM loads it"
    i = arguments.index("--model_class_name")
    assert folder in error(*arguments[:i], *arguments[i + 2 :])
    fit = ["fit", "--dataset-path", f"{tmp_path}/texts", "--hook-name", "h.0"]
    fit += ["--out", f"{tmp_path}/stats", "--model-name"]
    said = error(*fit, f"{tmp_path}/model")
    assert "--model-class-name HookedTransformer" in said
    assert folder in said
    said = error(*fit, "gpt3")
    assert "--model-name gpt3: TransformerLens knows no such model; nearest: gpt2" in said
    for name in ("HookedTransformer", "AutoModelForCausalLM"):
        missing = [f"{tmp_path}/missing", "--model-class-name", name]
        assert f"{tmp_path}/missing: there is no such folder" in error(*fit, *missing)


@pytest.mark.parametrize("whitened", [True, False])
def test_a_context_longer_than_the_models_is_refused_before_training(
    whitened: bool, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["--architecture=topk_vsae", "--normalize_activations=none"]
    if not whitened:
        i = arguments.index("--whitening.n_samples")
        arguments = [*arguments[:i], *arguments[i + 2 :], *plain]
    assert main(["--quiet", *arguments, "--context_size", "33"]) == 2
    err = capsys.readouterr().err
    assert "--context_size 33: the model reads at most 32 tokens" in err
    assert "Traceback" not in err
    fit = ["fit", "--model-class-name", "AutoModelForCausalLM", "--model-name", f"{tmp_path}/model"]
    fit += ["--dataset-path", f"{tmp_path}/texts", "--hook-name", "transformer.h.0"]
    if whitened:
        assert main(["-q", *fit, "--out", f"{tmp_path}/stats", "--context-size", "33"]) == 2
        assert "--context-size 33: the model reads at most 32 tokens" in capsys.readouterr().err


INTERRUPTED = """
    import os, runpy, sys, torch
    signum, sys.argv = int(sys.argv[1]), ["sae-whiten", *sys.argv[2:]]
    step, n_steps = torch.optim.Adam.step, 0

    def step_and_interrupt(*args, **options):
        global n_steps
        n_steps += 1
        if n_steps == 3:
            os.kill(os.getpid(), signum)
        return step(*args, **options)

    torch.optim.Adam.step = step_and_interrupt
    runpy.run_module("sae_whiten", run_name="__main__", alter_sys=True)
"""


def run_in_new_interpreter(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize(
    ("signum", "status", "run"),
    # what an interpreter does at its end is seen in one of them
    [(signal.SIGINT, 130, run_in_new_interpreter), (signal.SIGTERM, 143, run_code)],
)
def test_exit_status_of_an_interrupted_run(
    signum: signal.Signals,
    status: int,
    run: "Callable[..., subprocess.CompletedProcess[str]]",
    arguments: list[str],
    tmp_path: Path,
) -> None:
    checkpoints = tmp_path / "checkpoints"
    arguments = [str(int(signum)), *arguments, "--checkpoint_path", str(checkpoints)]
    process = run(INTERRUPTED, *arguments)
    assert process.returncode == status, process.stderr
    assert "Traceback" not in process.stderr
    (checkpoint,) = checkpoints.glob("*/*")
    assert f"resume_from_checkpoint={checkpoint}" in process.stderr
    assert f"stopped after {int(checkpoint.name):,} tokens; continue with" in process.stderr
    last = process.stderr.splitlines()[-1]
    assert last == f"sae-whiten train --resume_from_checkpoint {checkpoint}"


# --- examples/train_gpt2.py

EXAMPLE = ROOT / "examples" / "train_gpt2.py"


def import_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_gpt2", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_is_short_and_uses_public_names_only() -> None:
    source = EXAMPLE.read_text()
    assert len(source.splitlines()) < 60
    ours = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sae_whiten")
    ]
    assert [node.module for node in ours] == ["sae_whiten"]
    assert {alias.name for alias in ours[0].names} <= set(sae_whiten.__all__)


def test_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path / "tokenizer")
    size = HookedTransformerConfig(
        n_layers=7, d_model=16, n_ctx=256, d_head=8, d_vocab=62, act_fn="gelu", seed=0
    )
    model = HookedTransformer(size, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    dataset = Dataset.from_dict({"text": random_texts(600, 200)})

    monkeypatch.chdir(tmp_path)
    arguments = ["--d_in", "16", "--training_tokens", str(20 * 4096), "--output", "sae"]
    explained_variance = import_example().main(
        arguments, override_model=model, override_dataset=dataset
    )
    # few steps; an SAE that is not right on raw activations does worse than their mean
    assert 0.1 < explained_variance < 1
    assert f"explained variance {explained_variance:.3f}" in capsys.readouterr().out


@pytest.fixture
def checkpoint(tmp_path: Path, runner: type[FakeRunner]) -> Path:
    """What a runner's checkpoint says of its settings."""
    flags = [*TOPK, "--k", "4", "--lr", "1e-3", "--seqpos_slice", "1", "9", "--log_to_wandb=False"]
    assert main(["train", *flags, "--dtype=bfloat16", "--checkpoint_path", "checkpoints"]) == 0
    folder = tmp_path / "checkpoints" / "x" / "100"
    folder.mkdir(parents=True)
    (folder / "runner_cfg.json").write_text(json.dumps(runner.cfg.to_dict()))
    (folder / "activations_store_state.safetensors").touch()
    return folder


def test_a_checkpoint_alone_is_resumed_with_its_settings(
    checkpoint: Path, runner: type[FakeRunner]
) -> None:
    saved = runner.cfg.to_dict()
    resume = ["train", "--resume_from_checkpoint", str(checkpoint)]
    assert main(resume) == 0
    assert runner.cfg.to_dict() == {**saved, "resume_from_checkpoint": str(checkpoint)}
    more = ["--training-tokens", "9000", "--sae.dtype", "float32", "--logger.run_name", "again"]
    assert main([*resume, *more, "--device=meta", "--checkpoint_path", "others"]) == 0
    cfg = runner.cfg
    assert (cfg.training_tokens, cfg.sae.dtype, cfg.logger.run_name) == (9000, "float32", "again")
    assert (cfg.device, cfg.llm_device, cfg.act_store_device) == ("meta",) * 3
    assert cfg.checkpoint_path.startswith("others/")
    assert (cfg.sae.k, cfg.lr, cfg.dtype, cfg.logger.log_to_wandb) == (4, 1e-3, "bfloat16", False)


def test_what_cannot_be_taken_from_a_checkpoint_is_said(
    checkpoint: Path, runner: type[FakeRunner], capsys: pytest.CaptureFixture[str]
) -> None:
    resume = ["train", "--resume_from_checkpoint"]
    assert main([*resume, str(checkpoint), "--architecture", "gated"]) == 2
    assert "the checkpoint is of topk" in capsys.readouterr().err
    assert main([*resume, str(checkpoint / "missing")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
    for name in ("20", ".200.whiten-new"):  # an earlier one, and one that is being written
        state = checkpoint.parent / name / "activations_store_state.safetensors"
        state.parent.mkdir()
        state.touch()
        os.utime(state, (0, 0))
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        assert main([*resume, str(folder)]) == 2
        err = capsys.readouterr().err
        assert "not a checkpoint of a runner" in err
        assert f"the newest checkpoint below it, {checkpoint}. Also there: " in err
        assert err.endswith(f"{checkpoint.parent / '20'}\n")
    file = checkpoint / "runner_cfg.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "dataset_path": "https://REDACTED@host/data"}))
    assert main([*resume, str(checkpoint)]) == 2
    assert "give --dataset_path again" in capsys.readouterr().err
    assert main([*resume, str(checkpoint), "--dataset_path", "https://me@host/data"]) == 0


def test_resuming_takes_the_whitening_of_the_checkpoint_unless_told_otherwise(
    checkpoint: Path, runner: type[FakeRunner]
) -> None:
    resume = [*TOPK, "--resume_from_checkpoint", str(checkpoint)]
    assert main(["train", *resume]) == 0
    assert runner.whitening is None
    assert main(["train", *resume, "--whitening.kind", "zca"]) == 0
    assert runner.whitening == WhiteningConfig(kind="zca")
    assert main(["train", *TOPK]) == 0
    assert runner.whitening == WhiteningConfig()
