"""The command `sae-whiten`.

Every command is a module of this package with `add_arguments(parser)` and `run(args) -> int`. Its
docstring opens the help of the command, and its EPILOG (if any) ends it. With
PASSES_ARGUMENTS_ON = True, arguments unknown to the parser are passed on in `args.arguments`.
A module is imported only when its command is called. Slow imports (torch, sae_lens) are in `run`.
"""

import argparse
import contextlib
import dis
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from inspect import getdoc
from typing import Any, NoReturn

from sae_whiten import __version__
from sae_whiten._checks import FieldError, require_device
from sae_whiten.cli._spelling import did_you_mean, known_spelling, naming_flags

__all__ = ["main"]

COMMANDS = {
    "afa": "are codes of SAEs as large as their inputs? eps-LBO and the ZF plot",
    "compare": "does whitening help? SAEs with and without it, all else equal, with statistics",
    "demo": "watch whitening at work on a small pretrained model, without a network",
    "evaluate": "measure any SAEs: reconstruction, loss of the model, probing",
    "features": "look at features: a page of what the latents of one or two SAEs fire at",
    "fit": "estimate the statistics of many hooks in one pass over a dataset",
    "fold": "make a correct SAE of a checkpoint that SAELens wrote under its own whitening",
    "inspect": "show statistics: anisotropy, outliers, how well they were estimated",
    "landscape": "draw where sparsity leads in two dimensions, before and after whitening",
    "latents": "draw a map of the latents of SAEs, and how often they fire",
    "merge": "combine statistics of several shards, exactly",
    "push": "upload a finished SAE, or statistics, to the Hugging Face hub",
    "synthetic": "compare ways of whitening where the features are known",
    "train": "train an SAE under whitening: SAELens' command line plus --whitening.*",
}

_DESCRIPTION = """\
Train SAELens sparse autoencoders (SAEs) on whitened activations. The mean and covariance of the
activations are estimated first, the SAE is trained in coordinates in which the covariance is the
identity, and at the end the whitening is folded into its weights: what is saved is an ordinary
SAELens SAE that takes raw activations and needs no sae-whiten."""

_EPILOG = """\
examples:
  sae-whiten demo
  sae-whiten train --architecture topk --model_name gpt2 --d_in 768 --d_sae 24576 --k 32 ...
  sae-whiten train --help      all flags of a command, with a complete example
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name. None: those of the process.

    Returns:
        Exit status: 0 success, 1 failure, 2 wrong usage or input, 130 interrupted by Ctrl-C.

    Raises:
        SystemExit: From argparse (help, wrong usage), or when a signal ended the run.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.version:
        print(f"sae-whiten {__version__}")
        return 0
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2

    command = importlib.import_module(f"sae_whiten.cli.{args.command}")
    command_parser = _Parser(
        prog=f"sae-whiten {args.command}",
        description=getdoc(command),
        epilog=getattr(command, "EPILOG", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        # lets a command define --help itself
        conflict_handler="resolve",
    )
    command.add_arguments(command_parser)
    if getattr(command, "PASSES_ARGUMENTS_ON", False):
        args, args.arguments = command_parser.parse_known_args(args.arguments, args)
    else:
        # these flags are also accepted after the command's name
        _add_logging_arguments(command_parser, default=argparse.SUPPRESS)
        args = command_parser.parse_args(args.arguments, args)

    is_first = os.environ.get("RANK", "0") == "0"  # the first of the processes of torchrun
    if not is_first:
        os.environ.setdefault("TQDM_DISABLE", "1")
    with _logging_to_stderr(args.verbose, args.quiet or not is_first):
        try:
            if getattr(args, "device", None) is not None:
                require_device("device", args.device)  # before anything is loaded
            return command.run(args)
        except KeyboardInterrupt as interruption:
            print(f"{command_parser.prog}: interrupted", file=sys.stderr)
            if how_to_continue := str(interruption):
                print(how_to_continue, file=sys.stderr)
            return 130
        except Exception as error:
            status, message = _outcome(error, command_parser)
            if args.verbose or message is None:
                traceback.print_exc()
            message = naming_flags(str(message or error), command_parser._option_string_actions)
            print(f"{command_parser.prog}: error: {message}", file=sys.stderr)
            return status


class _Parser(argparse.ArgumentParser):
    """Accepts hyphens and underscores in flags. Reports errors on one line, without the usage."""

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride] (it is overloaded)
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        if args is not None:
            args = [known_spelling(argument, self._option_string_actions) for argument in args]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        message += did_you_mean(message, self._option_string_actions)
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help shows all flags)\n")


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}   {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="sae-whiten",
        usage="%(prog)s [--version] [-v | -q] COMMAND ...",
        description=f"{_DESCRIPTION}\n\ncommands:\n{commands}",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    _add_logging_arguments(parser, default=False)
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _add_logging_arguments(parser: argparse.ArgumentParser, default: object) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=default,
        help="log details, including those of SAELens; show the traceback of errors",
    )
    group.add_argument(
        "-q", "--quiet", action="store_true", default=default, help="log only warnings and errors"
    )


def _outcome(error: Exception, parser: argparse.ArgumentParser) -> tuple[int, str | None]:
    """The exit status for an error, and its message; None if the traceback has to be shown."""
    if _is_full_disk(error):
        return 1, f"the disk or its quota is full; free some space ({error})"
    if isinstance(error, FieldError):
        name = error.field.rpartition(".")[2]
        flags = {action.dest: action.option_strings for action in parser._actions}
        # SAELens' flags are unknown to this parser; they are named like the fields
        flag = flags.get(name, [f"--{name}"])[-1]
        given = "" if error.value is None else f" {error.value}"
        return 2, f"{flag}{given}: {error.problem}"
    return (2, str(error)) if _is_user_error(error) else (1, None)


def _is_user_error(error: Exception) -> bool:
    """Whether the message alone tells the user what to do, so no traceback is needed."""
    if type(error).__module__.startswith("sae_whiten."):
        return True
    # raised for missing files, and for models and datasets that cannot be loaded
    if isinstance(error, (OSError, argparse.ArgumentError)):
        return True
    if isinstance(error, ModuleNotFoundError):
        # a message about what to install; an import that fails gives the error a name
        return error.name is None and "pip install" in str(error)
    return isinstance(error, ValueError) and _is_deliberate(error)


_NUMERICAL_LIBRARIES = ("torch", "numpy", "scipy", "sklearn", "pandas")


def _is_deliberate(error: Exception) -> bool:
    """Whether a `raise` statement outside the numerical libraries raised it.

    Errors of these libraries are about shapes and dtypes, which no user of a command controls.
    """
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    if tb is None:
        return True
    library = tb.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    # an error from a C extension has no `raise` statement: the frame is at the call
    instruction = dis.opname[tb.tb_frame.f_code.co_code[tb.tb_lasti]]
    return library not in _NUMERICAL_LIBRARIES and instruction == "RAISE_VARARGS"


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether this error, or one that caused it, is a write that failed for lack of disk space."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return True
        # safetensors and PyTorch raise their own errors, at best with the number in the text
        text = str(error)
        if type(error).__name__ == "SafetensorError" and any(
            f"(os error {number})" in text for number in numbers
        ):
            return True
        if isinstance(error, RuntimeError) and "inline_container" in text and "fail" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


class _ProgressBarHandler(logging.Handler):
    """Writes log lines above progress bars instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def _logging_to_stderr(verbose: bool, quiet: bool) -> Iterator[None]:
    """Show the log of this package and of SAELens on standard error."""
    ours = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    theirs = logging.INFO if verbose else logging.WARNING
    handler = _ProgressBarHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    before = []
    for name, level in (("sae_whiten", ours), ("sae_lens", theirs)):
        logger = logging.getLogger(name)
        before.append((logger, logger.level))
        logger.setLevel(level)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
