"""Training in several processes on this machine: speed-up and share of communication.

    python benchmarks/processes.py               # steps alone
    python benchmarks/processes.py --shapes 512,8192,2048,32 --processes 1 2 4 --rounds 5
    python benchmarks/processes.py --runs model cache      # whole runs
    python benchmarks/processes.py --runs model cache --d-in 64 --n-layers 1 --tokens 16384
    python benchmarks/processes.py --runs model --apart    # two seeds side by side
    python benchmarks/processes.py --paper       # only the computed table for GPUs

Steps. Every row is TopK under whitening with the loss in the original space: d_in, latents, batch
of all processes together, k. One process trains with the whole batch, n processes with 1/n of it
each, with one thread per process. Times are medians over the steps of the slowest process.
Communication is the time in exchanges, including the wait for other processes. On a machine with
busy cores, most of it is waiting.

Runs. A whole run of `WhiteningTrainingRunner`, estimation and fold included: TopK, 8 d_in latents,
k = 32, batches of 4096, with activations from a transformer with random weights or from a cache of
such activations on disk. The time runs from when all processes have loaded model and data until the
slowest is done. CPU seconds are summed over all processes. With --apart, two independent runs at
the same time, of one thread each, are compared with the same two runs in sequence, of two threads.

Paper. The table is computed, not measured. It adds the time of a ring all-reduce of both weight
gradients in float32 (2 (n - 1) / n of their bytes per process) to that of the floating-point
operations of a step at an assumed rate. These are taken as six products of the encoder's size,
which is pessimistic for sparse steps.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from datasets import Array2D, Dataset, Features
from estimation import last_hook, random_model, random_tokens, whole_run
from sae_lens import (
    LoggingConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from sae_whiten import (
    ActivationStatistics,
    Whitening,
    WhiteningConfig,
    WhiteningTrainer,
    WhiteningTrainingRunner,
)
from sae_whiten.estimation.distributed import Processes

SHAPES = ["512,8192,2048,32", "768,12288,4096,32", "2048,16384,1024,64"]

# assumed GPUs: dense TF32 operations per second that a step reaches; bytes per second, in each
# direction, from one GPU to others (NVLink 4 within a machine, InfiniBand NDR between machines)
ASSUMED_FLOPS = 2e14
LINKS = {8: ("NVLink 4, 450 GB/s", 450e9), 64: ("InfiniBand NDR, 50 GB/s per GPU", 50e9)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="d_in,d_sae,batch,k")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=8, help="counted steps of a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, in each of which all run")
    parser.add_argument("--runs", nargs="+", choices=("model", "cache"), help="time whole runs "
        "instead of steps, with activations from a model or from a cache on disk")  # fmt: skip
    parser.add_argument("--apart", action="store_true", help="time two separate runs side by side "
        "instead of one run of several processes")  # fmt: skip
    parser.add_argument("--d-in", type=int, default=768, help="width in a run (default: 768)")
    parser.add_argument("--n-layers", type=int, default=2, help="of the transformer (default: 2)")
    parser.add_argument("--tokens", type=int, default=200_000, help="of a run (default: 200000)")
    parser.add_argument("--paper", action="store_true", help="print only the computed table")
    parser.add_argument("--json", type=Path, help="keep every single measurement")
    args = parser.parse_args()
    if args.paper:
        on_paper(args.shapes)
        return
    measured = measure(args) if args.runs is None else measure_runs(args)
    if args.json is not None:
        args.json.write_text(json.dumps(measured, indent=1))
    if args.runs is None:
        on_paper(args.shapes)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for shape in args.shapes:
        for round_number in range(args.rounds):
            for n in args.processes:
                found.append({"shape": shape, "round": round_number, **one(shape, n, args.steps)})
    print(f"{'d_in,d_sae,batch,k':22} {'processes':>9} {'step ms':>9} {'speed-up':>9} {'comm.':>7}")
    for shape in args.shapes:
        for n in args.processes:
            rows = [r for r in found if r["shape"] == shape and r["processes"] == n]
            alone = [r for r in found if r["shape"] == shape and r["processes"] == 1]
            step = statistics.median(r["seconds"] for r in rows)
            ratios = [a["seconds"] / r["seconds"] for a, r in zip(alone, rows, strict=False)]
            share = statistics.median(r["communication"] / r["seconds"] for r in rows)
            speed_up = f"{statistics.median(ratios):9.2f}" if ratios else " " * 9
            print(f"{shape:22} {n:9} {1000 * step:9.0f} {speed_up} {share:7.0%}")
    return found


def one(shape: str, n: int, n_steps: int) -> dict[str, Any]:
    """Time a few steps in n processes."""
    return {"processes": n, **max(in_processes(n, train, shape, n_steps), key=seconds_of)}


def seconds_of(row: dict[str, Any]) -> float:
    return row["seconds"]


def in_processes(n: int, function: Callable[..., Any], *arguments: Any) -> list[dict[str, Any]]:
    """Results of n processes that train together; `function` puts them into its last argument."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    results = mp.get_context("spawn").SimpleQueue()
    spawn(joined, args=(n, function, *arguments, results), nprocs=n)
    return [results.get() for _ in range(n)]


def prepare(n_threads: int) -> None:
    torch.set_num_threads(n_threads)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def joined(rank: int, n: int, function: Callable[..., Any], *arguments: Any) -> None:
    prepare(1)
    if n > 1:
        dist.init_process_group("gloo", rank=rank, world_size=n)
    try:
        function(rank, n, *arguments)
    finally:
        if n > 1:
            dist.destroy_process_group()


def train(rank: int, n: int, shape: str, n_steps: int, results: Any) -> None:
    d_in, d_sae, batch, k = map(int, shape.split(","))
    x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(rank))
    part = x[rank::n]

    def data() -> Any:
        while True:
            yield part

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=d_in, d_sae=d_sae, k=k, normalize_activations="covariance_whitening"
        )
    )
    cfg = SAETrainerConfig(
        total_training_samples=batch * n_steps,
        train_batch_size_samples=batch,
        lr=3e-4,
        lr_end=3e-5,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = WhiteningTrainer(cfg, sae, data())
    moments = ActivationStatistics(d_in)
    moments.update(torch.randn(4 * d_in, d_in, generator=torch.Generator().manual_seed(0)))
    trainer.scaler.whitening = Whitening.from_statistics(moments, WhiteningConfig())
    processes = trainer.stream.processes
    waited = 0.0

    def timed(function: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal waited
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                waited += time.perf_counter() - start

        return call

    # on this object only
    processes.sum_ = timed(processes.sum_)  # pyright: ignore[reportAttributeAccessIssue]
    processes.total = timed(processes.total)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.estimate_whitening()
    seconds: list[float] = []
    communication: list[float] = []
    for step in range(n_steps + 2):
        waited = 0.0
        start = time.perf_counter()
        rows: Tensor = next(trainer.stream)
        trainer.step(rows)
        if step >= 2:  # the first steps allocate memory
            seconds.append(time.perf_counter() - start)
            communication.append(waited)
    results.put(
        {
            "seconds": statistics.median(seconds),
            "communication": statistics.median(communication),
        }
    )


# --------------------------------------------------------------------------------------- whole runs


def measure_runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if "cache" in args.runs:
            write_cache(args, folder)
        if args.apart:
            return [measure_apart(args, source, folder) for source in args.runs]
        for round_number in range(args.rounds):
            for source in args.runs:
                for n in args.processes:
                    rows = in_processes(n, run, source, args, folder)
                    row = {**max(rows, key=seconds_of), "cpu": sum(r["cpu"] for r in rows)}
                    found.append({"source": source, "processes": n, "round": round_number, **row})
                    print(json.dumps(found[-1]), flush=True)
    print(
        f"\nd_in={args.d_in}, {args.n_layers} layers, {args.tokens} tokens, rounds: {args.rounds}\n"
        f"{'activations from':17}{'processes':>10}{'seconds':>9}{'tokens/s':>10}"
        f"{'CPU s of all':>14}{'speed-up':>10}{'comm.':>7}"
    )
    for source in args.runs:
        for n in args.processes:
            rows = [r for r in found if r["source"] == source and r["processes"] == n]
            alone = [r for r in found if r["source"] == source and r["processes"] == 1]
            seconds, cpu = (statistics.median(r[name] for r in rows) for name in ("seconds", "cpu"))
            share = statistics.median(r["communication"] / r["seconds"] for r in rows)
            ratios = [a["seconds"] / r["seconds"] for a, r in zip(alone, rows, strict=False)]
            speed_up = f"{statistics.median(ratios):10.2f}" if ratios else " " * 10
            print(
                f"{source:17}{n:10}{seconds:9.1f}{args.tokens / seconds:10.0f}{cpu:14.1f}"
                f"{speed_up}{share:7.0%}"
            )
    return found


def measure_apart(args: argparse.Namespace, source: str, folder: str) -> dict[str, Any]:
    """Times of one run with two threads, and of two simultaneous runs with one thread each."""
    times: dict[str, list[float]] = {"two threads": [], "two runs": []}
    for _ in range(args.rounds):
        for name, n in (("two threads", 1), ("two runs", 2)):
            results = mp.get_context("spawn").SimpleQueue()
            spawn(alone, args=(3 - n, run, source, args, folder, results), nprocs=n)
            times[name].append(max(seconds_of(results.get()) for _ in range(n)))
    ratios = [2 * a / b for a, b in zip(times["two threads"], times["two runs"], strict=True)]
    one_run, two_runs = (statistics.median(found) for found in times.values())
    print(
        f"activations from {source}, d_in={args.d_in}, {args.tokens} tokens: one run of two "
        f"threads {one_run:.1f} s, two runs of one thread {two_runs:.1f} s; side by side "
        f"{statistics.median(ratios):.2f} times as fast as one after the other"
    )
    return {"source": source, **times}


def alone(_: int, n_threads: int, function: Callable[..., Any], *arguments: Any) -> None:
    prepare(n_threads)
    function(0, 1, *arguments)


@torch.no_grad()
def write_cache(args: argparse.Namespace, folder: str) -> None:
    """Activations of the model for a run, in the format of SAELens' `CacheActivationsRunner`."""
    model, hook = random_model(args.d_in, args.n_layers), last_hook(args)
    # the buffers that mix activations must be filled too, with 64 sequences in each process
    n_rows = args.tokens // 128 + 4 * 64 * max(args.processes)
    tokens = torch.randint(0, 5000, (n_rows, 128), generator=torch.Generator().manual_seed(0))

    def rows() -> Iterator[dict[str, Any]]:
        for batch in tokens.split(32):
            for activations in model.run_with_cache(batch, names_filter=hook)[1][hook]:
                yield {hook: activations.numpy()}

    features = Features({hook: Array2D(shape=(128, args.d_in), dtype="float32")})
    made = Dataset.from_generator(rows, features=features, cache_dir=f"{folder}/made")
    assert isinstance(made, Dataset)
    made.save_to_disk(f"{folder}/cache")


def run(
    rank: int, n: int, source: str, args: argparse.Namespace, folder: str, results: Any
) -> None:
    """One run of n processes; `rank` is that of this process."""
    cached: dict[str, Any] = {}
    if source == "cache":
        cached = {"use_cached_activations": True, "cached_activations_path": f"{folder}/cache"}
    cfg = whole_run(argparse.Namespace(**vars(args), device="cpu"), args.tokens, **cached)
    exchanges = Exchanges()
    runner = WhiteningTrainingRunner(
        cfg,
        override_model=random_model(args.d_in, args.n_layers),
        override_dataset=random_tokens(),
    )
    Processes().total(0.0)  # synchronises the processes before the clock starts
    exchanges.seconds = 0.0
    start, cpu_start = time.perf_counter(), time.process_time()
    runner.run()
    results.put(
        {
            "seconds": time.perf_counter() - start,
            "cpu": time.process_time() - cpu_start,
            "communication": exchanges.seconds,
        }
    )


class Exchanges:
    """Counts the seconds that this process spends in exchanges."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0  # so that an exchange within another one is not counted twice
        for name in (
            "total",
            "gather",
            "union",
            "sum_",
            "broadcast_",
            "concatenated",
            "from_first",
        ):
            setattr(Processes, name, self._timed(getattr(Processes, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - start

        return call


# -------------------------------------------------------------------------------------------- paper


def on_paper(shapes: list[str]) -> None:
    print(
        f"\nComputed, not measured: {ASSUMED_FLOPS / 1e12:.0f} TFLOP/s per GPU, gradients in "
        "float32,\nexchange not overlapped with anything. Speed-up over one GPU alone:"
    )
    print(
        f"{'d_in,d_sae,batch,k':22} {'GPUs':>5} {'exchange ms':>12} {'step ms':>9} {'speed-up':>9}"
    )
    for shape in [*shapes, "4096,65536,65536,64"]:
        d_in, d_sae, batch, _ = map(int, shape.split(","))
        alone = 6 * 2 * d_in * d_sae * batch / ASSUMED_FLOPS
        for n, (_, bandwidth) in LINKS.items():
            exchange = 2 * (n - 1) / n * 2 * d_in * d_sae * 4 / bandwidth
            step = alone / n + exchange
            print(
                f"{shape:22} {n:5} {1000 * exchange:12.2f} {1000 * step:9.2f} {alone / step:9.1f}"
            )
    for n, (name, _) in LINKS.items():
        print(f"{n} GPUs: {name}")


if __name__ == "__main__":
    main()
