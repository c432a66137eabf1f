"""Training steps in several processes of this machine: speed-up, share of communication.

    python benchmarks/processes.py
    python benchmarks/processes.py --shapes 512,8192,2048,32 --processes 1 2 4 --rounds 5
    python benchmarks/processes.py --paper       # only the computed table for GPUs

Every row is TopK under whitening with the loss in the original space: d_in, latents, batch of all
processes together, k. One process trains with the whole batch, n processes with an n-th each, one
thread per process. Times are medians over the steps of the slowest process. Communication is what a
process spends in exchanges, waiting for the others included: on a machine whose cores are busy most
of it is waiting.

The table on paper adds a ring all-reduce of both weight gradients in float32, 2 (n - 1) / n of
their bytes per process, to the floating-point operations of a step (six products of the encoder's
size, which is pessimistic for sparse steps) at an assumed rate. It is computed, not measured.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor

from sae_whiten import ActivationStatistics, Whitening, WhiteningConfig, WhiteningTrainer

SHAPES = ["512,8192,2048,32", "768,12288,4096,32", "2048,16384,1024,64"]

# GPUs on paper: dense TF32 operations per second that a step reaches, bytes per second and
# direction of one GPU to the others (NVLink 4 within a machine, InfiniBand NDR between machines)
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
    parser.add_argument("--paper", action="store_true", help="print only the computed table")
    parser.add_argument("--json", type=Path, help="keep every single measurement")
    args = parser.parse_args()
    if not args.paper:
        measured = measure(args)
        if args.json is not None:
            args.json.write_text(json.dumps(measured, indent=1))
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
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    workers = [
        context.Process(target=train, args=(rank, n, shape, n_steps, results)) for rank in range(n)
    ]
    for worker in workers:
        worker.start()
    rows = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    slowest = max(rows, key=lambda row: row["seconds"])
    return {"processes": n, **slowest}


def train(rank: int, n: int, shape: str, n_steps: int, results: Any) -> None:
    torch.set_num_threads(1)
    if n > 1:
        dist.init_process_group("gloo", rank=rank, world_size=n)
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

    # of this object only
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
        if step >= 2:  # the first ones allocate
            seconds.append(time.perf_counter() - start)
            communication.append(waited)
    results.put(
        {
            "seconds": statistics.median(seconds),
            "communication": statistics.median(communication),
        }
    )
    if n > 1:
        dist.destroy_process_group()


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
