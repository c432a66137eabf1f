"""Processes on this machine connected through gloo, for tests of distributed code."""

import datetime
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.processes import CONTEXT


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    n: int = 2,
    timeout: float = 300,
    deadline: float = 600,
    join: bool = True,
) -> list[Any]:
    """Call `function(rank, *args)` in n processes of a gloo group.

    Args:
        function: Importable from a module; its result must be picklable.
        args: Further arguments.
        n: Number of processes.
        timeout: Seconds after which a collective fails if other processes do not join it.
        deadline: Seconds after which all processes are killed.
        join: Whether to form the group. Otherwise only the variables that torchrun sets are set.

    Returns:
        By rank: the result, the exception as text, or None if the process died.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        results = [Path(directory) / str(rank) for rank in range(n)]
        processes = [
            CONTEXT.Process(
                target=_main, args=(function, rank, n, port, timeout, join, result, args)
            )
            for rank, result in enumerate(results)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(deadline)
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung, f"{len(hung)} of {n} processes hung"
        return [pickle.loads(r.read_bytes()) if r.is_file() else None for r in results]


def _main(
    function: Callable[..., Any],
    rank: int,
    n: int,
    port: int,
    timeout: float,
    join: bool,
    result: Path,
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(n),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import sae_whiten.estimation.distributed

    sae_whiten.estimation.distributed.TIMEOUT = datetime.timedelta(seconds=timeout)
    if join:
        # longer than `timeout`, because processes do not start at the same time
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
    try:
        found = function(rank, *args)
    except Exception as error:
        traceback.print_exc()
        found = f"{type(error).__name__}: {error}"
    finally:
        if join:
            dist.destroy_process_group()
    result.write_bytes(pickle.dumps(found))
