"""Separate processes that need not import SAELens again, which takes seconds.

A server imports SAELens once for all tests, and nothing of ours. Processes are forks of the server.
In them the run-time type checks, which pytest turns on, are off.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

# outside Linux, libraries that SAELens imports may not survive a fork
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    CONTEXT.set_forkserver_preload(["sae_lens"])


def run_code(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run code in a separate process, as `python -c` does.

    Args:
        code: Python code; may be indented.
        arguments: The contents of `sys.argv[1:]`.

    Returns:
        Exit status (negative for a signal), stdout and stderr.
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
