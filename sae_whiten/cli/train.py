"""Train an SAE under whitening, fold the whitening into its weights and save it.

Takes every flag of SAELens' own command line (python -m sae_lens.llm_sae_training_runner) and the
--whitening.* flags below. The saved SAE is an ordinary SAELens SAE for raw activations. Two
architectures are added to those of SAELens. topk_vsae is saved as an ordinary topk SAE. top_afa
cannot be whitened; train it with --normalize_activations none.
"""

import argparse
import contextlib
import dataclasses
import io
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_whiten.cli._spelling import did_you_mean
from sae_whiten.cli._values import positive
from sae_whiten.cli._whitening_flags import PREFIX, add_whitening_arguments, given_fields
from sae_whiten.config import WhiteningConfig

if TYPE_CHECKING:
    from sae_lens import LanguageModelSAERunnerConfig
    from sae_lens.saes.sae import TrainingSAE

    from sae_whiten import WhiteningTrainingRunner

PASSES_ARGUMENTS_ON = True

EXAMPLE = """\
  sae-whiten train --architecture topk --d_in 768 --d_sae 24576 --k 32 \\
    --model_name gpt2 --hook_name blocks.6.hook_resid_pre --context_size 256 \\
    --dataset_path monology/pile-uncopyrighted --is_dataset_tokenized False \\
    --training_tokens 100000000 --train_batch_size_tokens 4096 --lr 3e-4 \\
    --device cuda --log_to_wandb False --output_path sae-gpt2-6 \\
    --whitening.kind pca --whitening.shrinkage oas
"""

EPILOG = f"""\
example (logging to Weights & Biases is on unless it is switched off, as in SAELens):
{EXAMPLE}
--architecture NAME --help shows the flags of that architecture. Nested flags may be written with
their prefix (--sae.k, --logger.log_to_wandb) or as SAELens shows them. A flag shown as [str] is
None when its value is left out: --checkpoint_path alone turns checkpoints off.
--resume_from_checkpoint CHECKPOINT continues with all settings of the checkpoint; further flags
replace settings that do not change what is trained.
In two places SAELens' texts below do not hold here. The default of --normalize_activations is
covariance_whitening; other values are for topk_vsae and for architectures into which no whitening
can be folded, which SAELens' own runner trains. --model_class_name AutoModelForCausalLM takes any
Hugging Face model; --hook_name is then the name of one of its modules.
--dataset_path may also be a local file or folder (JSON lines, parquet, save_to_disk), which needs
no network. --seed sets initial weights, noise and the order in which activations are mixed. For
more output: sae-whiten --verbose train ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of `WhiteningConfig`."""
    parser.usage = "%(prog)s [--whitening.* VALUE ...] [SAELens' flags]"
    parser.set_defaults(print_help=parser.print_help)
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this and SAELens' flags, and exit"
    )
    add_whitening_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train, save, and print where the SAE is and how exact the fold was."""
    if args.help:
        args.print_help()
        print(f"\nSAELens' flags, texts and defaults:\n\n{_saelens_help(args.arguments)}")
        return 0
    if not args.arguments:
        args.print_help(sys.stderr)
        return 2

    import torch

    given = given_fields(args)
    if given.get("statistics") is not None and "tolerance" in given:
        raise ValueError(
            f"{PREFIX}tolerance is given, but with {PREFIX}statistics nothing is estimated; leave "
            "it out"
        )
    whitening = WhiteningConfig(**given)
    cfg = _saelens_config(args.arguments)
    torch.manual_seed(cfg.seed)  # SAELens ignores this field
    if cfg.sae.normalize_activations != "covariance_whitening":
        if given:
            raise ValueError(
                f"{PREFIX}{next(iter(given))} is given, but with --normalize_activations "
                f"{cfg.sae.normalize_activations} nothing is whitened; leave it out"
            )
        return _train_without(cfg)
    # a checkpoint resumes with the whitening that it was trained under, unless flags say otherwise
    unchanged = not given.keys() - {"temporary_folder"}
    keeps_whitening = cfg.resume_from_checkpoint is not None and unchanged

    from sae_whiten import WhiteningTrainingRunner
    from sae_whiten.estimation.distributed import joined_processes

    whitening = None if keeps_whitening else whitening
    with joined_processes() as rank:
        sae = _run(WhiteningTrainingRunner(cfg, whitening))
    if rank > 0:
        return 0
    check = sae.cfg.metadata.whitening["fold"]["check"]
    print(
        f"fold error: {check['fold_error']:.2g} on {check['source']} activations "
        f"(tolerance {check['tolerance']:.2g})"
    )
    _print_where_saved(cfg)
    return 0


def _run(runner: "WhiteningTrainingRunner") -> "TrainingSAE[Any]":
    """Run; when stopped by a signal, say how to continue.

    Raises:
        KeyboardInterrupt: After SIGINT; its message is the command that continues the run.
        SystemExit: After SIGTERM; the command is printed.
    """
    try:
        return runner.run()
    except (KeyboardInterrupt, SystemExit) as error:
        # its frames hold the progress bar, which is to be closed before a line is printed
        stopped = error.with_traceback(None)
        stopped.__context__ = None
    how = _how_to_continue(runner)
    if isinstance(stopped, KeyboardInterrupt):
        raise KeyboardInterrupt(how)
    if how:
        print(how, file=sys.stderr)
    raise stopped


def _how_to_continue(runner: "WhiteningTrainingRunner") -> str:
    """The command that continues a run from the checkpoint that it was stopped with. Empty if there
    is none, or if the command has to start several processes."""
    trainer = getattr(runner, "trainer", None)
    folder = None if trainer is None else trainer.cfg.checkpoint_path
    if trainer is None or folder is None or runner.processes.world_size > 1:
        return ""
    path = Path(folder) / str(trainer.n_training_samples)
    if not path.is_dir():
        return ""
    return f"sae-whiten train --resume_from_checkpoint {shlex.quote(str(path))}"


def _train_without(cfg: "LanguageModelSAERunnerConfig[Any]") -> int:
    """Train with SAELens' own runner, and print that nothing was whitened."""
    from sae_lens import LanguageModelSAETrainingRunner
    from sae_lens.llm_sae_training_runner import InterruptedException
    from sae_lens.registry import get_sae_training_class

    from sae_whiten.architectures.folding import why_not_foldable
    from sae_whiten.training.checks import check_runner_config
    from sae_whiten.training.runner_parts import (
        check_loaded,
        naming_model_and_hooks,
        opened_dataset,
    )

    check_runner_config(cfg, {"sae": cfg.sae})
    try:
        with naming_model_and_hooks(cfg, [cfg.hook_name]), opened_dataset(cfg, None) as dataset:
            runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset)
        check_loaded(cfg, runner.model, [cfg.hook_name])
        runner.run()
    except InterruptedException as interruption:
        raise KeyboardInterrupt from interruption
    sae_class, _ = get_sae_training_class(cfg.sae.architecture())
    reason = why_not_foldable(sae_class)
    cannot = "" if reason is None else f", because whitening cannot be folded into {reason}"
    print(f"not whitened{cannot}")
    known = cfg.sae.get_inference_config_class().__module__.startswith("sae_lens.")
    _print_where_saved(cfg, ours=not known)
    return 0


def _print_where_saved(cfg: "LanguageModelSAERunnerConfig[Any]", ours: bool = False) -> None:
    if cfg.output_path is None:
        print("not saved: --output_path was given without a path")
        return
    lines = ["from sae_lens import SAE", f"sae = SAE.load_from_disk({str(cfg.output_path)!r})"]
    if ours:
        lines.insert(0, f"import sae_whiten  # registers {cfg.sae.architecture()} with SAELens")
    print(f"saved in:   {cfg.output_path}")
    print("load it:    " + "\n            ".join(lines))


def _saelens_help(arguments: Sequence[str]) -> str:
    """SAELens' help. Left out are its usage and the signatures of its configs, which say once more
    in thousands of characters what the flags say."""
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured), contextlib.suppress(SystemExit):
        _saelens_config([*arguments, "--help"])
    text = captured.getvalue()
    start = re.search(r"^options:\n.*\n+", text, re.MULTILINE)
    text = text if start is None else text[start.end() :]
    return re.sub(r"^(\w+) \['cfg.*'\]:\n(  \1\(.*\)\n)?", r"\1:\n", text, flags=re.MULTILINE)


def _saelens_config(arguments: Sequence[str]) -> "LanguageModelSAERunnerConfig[Any]":
    """Parse SAELens' flags with SAELens' own parser, with whitening as the default.

    Raises:
        ValueError: SAELens refuses the arguments; or the requested normalisation does not fit the
            architecture: whitening if it cannot be whitened, another one if it can.
        SystemExit: With status 0, after --help.
        RuntimeError: This version of SAELens has no such parser.
    """
    if unknown := [argument for argument in arguments if argument.startswith(PREFIX)]:
        known = " ".join(PREFIX + field.name for field in dataclasses.fields(WhiteningConfig))
        raise ValueError(f"unknown flag {unknown[0]}; there are {known}")

    from sae_lens import LanguageModelSAERunnerConfig

    runner_flags = {field.name for field in dataclasses.fields(LanguageModelSAERunnerConfig)}
    arguments = [_as_saelens_spells(argument, runner_flags) for argument in arguments]
    _refuse_abbreviations(arguments)
    _require_positive(arguments)
    given, saved = arguments, _settings_of_checkpoint(arguments)
    if saved is not None:
        names = ("architecture", "normalize_activations")
        arguments = [*(f"--{name}={saved['sae'][name]}" for name in names), *arguments]
    reason = _why_not_whitened(arguments)
    if reason is None:
        # first, so that a value from the user takes precedence and can be refused below
        arguments.insert(0, "--normalize_activations=covariance_whitening")
    cfg = _parsed_by_saelens(arguments, {f"--{name}" for name in runner_flags})
    if saved is not None:
        cfg = _resumed(saved, cfg, given)

    ours = type(cfg.sae).__module__.startswith("sae_whiten.")
    if reason is None and not ours and cfg.sae.normalize_activations != "covariance_whitening":
        raise ValueError(
            f"--normalize_activations {cfg.sae.normalize_activations} contradicts this command, "
            "which trains under covariance_whitening. Leave the flag out, or train with SAELens."
        )
    return cfg


def _parsed_by_saelens(
    arguments: Sequence[str], flags: set[str]
) -> "LanguageModelSAERunnerConfig[Any]":
    """What SAELens' own parser makes of arguments in its spelling.

    Args:
        arguments: The arguments.
        flags: Flags to suggest for an unknown one, beside those that SAELens prints.

    Raises:
        ValueError: SAELens refuses the arguments.
        SystemExit: With status 0, after --help.
        RuntimeError: This version of SAELens has no such parser.
    """
    import sae_lens

    try:
        # private, but the only way to get SAELens' flags without keeping a copy of them
        from sae_lens.llm_sae_training_runner import _parse_cfg_args
    except ImportError as error:
        raise RuntimeError(
            f"sae-lens {sae_lens.__version__} has moved the parser of its command line "
            "(llm_sae_training_runner._parse_cfg_args). Use WhiteningTrainingRunner from Python."
        ) from error

    # SAELens prints a hundred lines of usage before its error
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            cfg = _parse_cfg_args(list(arguments))
    except SystemExit as exit_:
        if not exit_.code:
            raise
        usage, _, message = captured.getvalue().rpartition("error: ")
        known = flags | set(re.findall(r"--[\w.]+", usage))
        raise ValueError((message.strip() or usage) + did_you_mean(message, known)) from None
    except argparse.ArgumentError as error:  # raised in Python 3.13
        raise ValueError(f"{error}{did_you_mean(str(error), flags)}") from None
    sys.stderr.write(captured.getvalue())
    return cfg


def _refuse_abbreviations(arguments: Sequence[str]) -> None:
    """Refuse abbreviations of the flags that are read before SAELens parses them.

    SAELens' parser takes an abbreviated `--architecture` and then trains its default architecture.

    Raises:
        ValueError: A flag is abbreviated.
    """
    for argument in arguments:
        flag = argument.split("=")[0]
        for name in ("--architecture", "--normalize_activations", "--resume_from_checkpoint"):
            if len(flag) > 2 and name.startswith(flag) and flag != name:
                raise ValueError(f"{flag}: unknown flag. If {name} is meant, write it in full.")


def _settings_of_checkpoint(arguments: Sequence[str]) -> dict[str, Any] | None:
    """The runner's config in the checkpoint to resume from. None without such a checkpoint.

    Raises:
        FileNotFoundError, CorruptFileError: The checkpoint does not contain the config.
    """
    path = _given(arguments, "resume_from_checkpoint")[0]
    if path is None:
        return None
    from sae_whiten.training.checkpoint import runner_settings

    return runner_settings(path)


def _given(arguments: Sequence[str], *names: str) -> list[str | None]:
    """The values of some of SAELens' flags. None: not given, or in a way that SAELens refuses."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}")
    try:
        found, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return [None] * len(names)
    return [getattr(found, name) for name in names]


def _resumed(
    saved: dict[str, Any], cfg: "LanguageModelSAERunnerConfig[Any]", given: Sequence[str]
) -> "LanguageModelSAERunnerConfig[Any]":
    """The config that a checkpoint was trained with, changed by the given flags.

    Args:
        saved: The config in the checkpoint, from `to_dict`.
        cfg: The config that SAELens parsed from the flags.
        given: The arguments, in SAELens' spelling.

    Raises:
        ValueError: The flags name another architecture, a flag is not named like a field, or the
            settings held a secret, which a checkpoint does not save.
    """
    from sae_lens import LanguageModelSAERunnerConfig

    from sae_whiten._redaction import MARK

    parsed = cfg.to_dict()
    architecture = saved["sae"]["architecture"]
    if parsed["sae"]["architecture"] != architecture:
        raise ValueError(f"--architecture: the checkpoint is of {architecture}; leave the flag out")
    # drop fields that this version of SAELens does not have, and its version numbers
    settings = {k: v for k, v in saved.items() if k in parsed and not k.startswith("sae_lens_")}
    settings["seqpos_slice"] = tuple(settings["seqpos_slice"])
    # "with_model" and None were saved as the device, which may have changed
    for name in ("llm_device", "act_store_device"):
        if settings[name] == settings["device"]:
            del settings[name]
    for argument in given:
        if not argument.startswith("--"):
            continue
        group, _, name = argument[2:].partition("=")[0].rpartition(".")
        if group == "" and name in parsed:
            settings[name] = parsed[name]
            continue
        groups = [g for g in ("sae", "logger") if name in parsed[g] and group in ("", g)]
        if not groups:
            raise ValueError(f"--{name}: write it as --field value to resume training")
        for g in groups:
            settings[g] = {**settings[g], name: parsed[g][name]}
    if missing := [name for name, value in settings.items() if MARK in str(value)]:
        raise ValueError(f"the checkpoint was saved without secrets: give --{missing[0]} again")
    return LanguageModelSAERunnerConfig.from_dict(settings)


def _require_positive(arguments: Sequence[str]) -> None:
    """Refuse sizes below 1. SAELens divides by some of them as soon as they are parsed.

    Raises:
        argparse.ArgumentError: A size is below 1. The error names the flag.
    """
    from sae_whiten.training.checks import POSITIVE_FIELDS

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    for name in (*POSITIVE_FIELDS, "wandb_log_frequency"):
        parser.add_argument(f"--{name}", type=positive)
    parser.parse_known_args(arguments)


def _why_not_whitened(arguments: Sequence[str]) -> str | None:
    """The reason why the named architecture cannot be whitened, or None if it can.

    Raises:
        ValueError: It cannot be whitened, and the arguments name no other normalisation.
    """
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class

    from sae_whiten.architectures.folding import why_not_foldable

    architecture, normalisation = _given(arguments, "architecture", "normalize_activations")
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        return None
    reason = why_not_foldable(get_sae_training_class(architecture)[0])
    asks_for_it = normalisation in (None, "covariance_whitening")
    wants_help = not {"--help", "-h"}.isdisjoint(arguments)
    if reason is not None and asks_for_it and not wants_help:
        raise ValueError(
            f"--architecture {architecture}: whitening cannot be folded into {reason}. To "
            "train it without, add --normalize_activations none (or expected_average_only_in)."
        )
    return reason


def _as_saelens_spells(argument: str, runner_flags: set[str]) -> str:
    """The argument with underscores for hyphens, and without the prefix of a nested flag. SAELens
    keeps the prefix only if two flags would clash."""
    if argument.startswith("--"):
        flag, equals, value = argument.partition("=")
        argument = f"--{flag[2:].replace('-', '_')}{equals}{value}"
    for prefix in ("--sae.", "--logger."):
        name = argument.removeprefix(prefix)
        if name != argument and name.partition("=")[0] not in runner_flags:
            return f"--{name}"
    return argument
