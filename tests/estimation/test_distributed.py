import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from sae_whiten.estimation.distributed import Processes, joined_processes
from sae_whiten.statistics import ActivationStatistics
from tests.ranks import run_ranks


def statistics_of(x: torch.Tensor) -> ActivationStatistics:
    statistics = ActivationStatistics(x.shape[-1])
    for batch in x.split(100):
        statistics.update(batch)
    return statistics


def unions_of_shards(
    rank: int, cases: list[list[torch.Tensor]]
) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    found = []
    for shards in cases:
        own = statistics_of(shards[rank])
        before = own.to_tensors()[0]["scatter"].clone()
        union = Processes().union(own)
        assert torch.equal(own.to_tensors()[0]["scatter"], before)
        found.append((union.n_samples, union.mean, union.covariance))
    return found


def test_the_union_of_shards_is_that_of_a_two_pass_reference():
    g = torch.Generator().manual_seed(0)
    scale = torch.logspace(-1.5, 1.5, 12, dtype=torch.float64)  # condition 1e6
    data, cases = [], []
    for sizes in [(700, 300), (1000, 0), (0, 500)]:
        for offset in (0.0, 3e3, 1e5):
            x = torch.randn(sum(sizes), 12, generator=g, dtype=torch.float64) * scale + offset
            data.append(x)
            cases.append(list(x.split(sizes)))
    first, second = run_ranks(unions_of_shards, cases)
    for x, (n, mean, covariance), (_, _, same) in zip(data, first, second, strict=True):
        centred = x - x.mean(0)
        reference = centred.T @ centred / (len(x) - 1)
        assert n == len(x)
        assert (mean - x.mean(0)).norm() <= 1e-12 * x.mean(0).norm()
        assert (covariance - reference).norm() <= 1e-12 * reference.norm()
        assert torch.equal(covariance, same)


def test_a_process_alone_needs_no_group():
    with joined_processes() as rank:
        assert rank == 0
        processes = Processes()
        assert (processes.rank, processes.world_size) == (0, 1)
        assert processes.total(3, True) == [3, True]
        assert processes.gather("x") == ["x"]


def exchange_until_one_is_gone(rank: int, how: str) -> None:
    dist.barrier()  # from here on they have only the timeout, and one may have started later
    processes = Processes()
    pids = processes.gather(os.getpid())
    if rank == 1:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)  # until the other has done with it
    try:
        processes.total(1)
    finally:
        if how == "hangs":
            os.kill(pids[1], signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "timeout", "said"),
    [
        ("dies", 300, "failed, was killed, or did not answer"),
        ("hangs", 3, "did not answer for 0.05 minutes"),
    ],
)
def test_when_a_process_is_gone_the_other_says_so_and_does_not_hang(how, timeout, said):
    survivor, gone = run_ranks(exchange_until_one_is_gone, how, timeout=timeout)
    assert survivor.startswith("DistributedError")
    assert said in survivor
    assert gone is None
