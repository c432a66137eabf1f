"""Processes of their own, without the seconds that importing SAELens takes in every new one.

A server imports SAELens, and nothing of ours, once for all tests; processes are forks of it.
Run-time checks of types, which pytest turns on here, are off in them.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

# elsewhere than on Linux, what SAELens imports may not survive a fork
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    CONTEXT.set_forkserver_preload(["sae_lens"])


def run_code(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run code, as `python -c` does, in a process of its own.

    Args:
        code: May be indented.
        arguments: Are in `sys.argv[1:]`.

    Returns:
        Exit status, negative for a signal, and what was written to stdout and stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = CONTEXT.Process(target=_run, args=(textwrap.dedent(code), arguments, folder))
        process.start()
        process.join()
        assert process.exitcode is not None
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def _run(code: str, arguments: tuple[str, ...], folder: str) -> None:
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        with Path(folder, name).open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
