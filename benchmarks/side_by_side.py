"""Shared by benchmarks that alternate between trainers: clocks, memory, data, options."""

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

# -------------------------------------------------------------------------------- options, results


def make_parser(description: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, or cuda for an NVIDIA or AMD GPU (default: cpu)")
    add("--rounds", type=int, default=None, help="turns of every trainer. Four times the rounds "
        "halve the interval")  # fmt: skip
    add("--steps-per-turn", type=int, default=None, help="steps that a trainer does at its turn, "
        "timed as one (default: 1; on CUDA 10, so that waiting for the GPU between turns does not "
        "hide what runs ahead)")  # fmt: skip
    add("--warmup", type=int, default=3, help="rounds before those that count (default: 3)")
    add("--threads", type=int, default=2, help="CPU threads of PyTorch (default: 2)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="wall time, or "
        "CPU time of this process, which other processes on a busy CPU disturb less; use it with "
        "--threads 1, for waiting threads burn CPU time too (default: wall)")  # fmt: skip
    add("--quick", action="store_true", help="small sizes and few rounds for whatever is not "
        "given: shows that the script runs, measures nothing")  # fmt: skip
    add("--json", type=Path, default=None, metavar="PATH", help="write all single measurements "
        "and the arguments to this file")  # fmt: skip
    return parser


def parse(
    parser: argparse.ArgumentParser, full: Mapping[str, Any], quick: Mapping[str, Any]
) -> argparse.Namespace:
    """The arguments, with defaults from `quick` if --quick is given, otherwise from `full`."""
    args = parser.parse_args()
    on_cuda = args.device.startswith("cuda")
    if on_cuda and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU on this machine")
    if on_cuda and args.clock == "cpu":
        parser.error("--clock cpu: CPU time says nothing about a GPU")
    defaults = {**(quick if args.quick else full), "steps_per_turn": 10 if on_cuda else 1}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(args.rounds, args.steps_per_turn) < 1:
        parser.error("rounds and steps must be at least 1")
    return args


def report(args: argparse.Namespace, measure: Callable[[], Mapping[str, Any]]) -> None:
    """Print the machine, measure, and write the measurements if --json is given."""
    environment = describe_environment(args)
    print("\n".join(f"{name}: {value}" for name, value in environment.items()))
    arguments = vars(args).copy()
    measured = measure()
    environment["load at the end"] = load()
    print(f"\nload of the machine at the end: {load():.1f}")
    if args.json is not None:
        result = {"environment": environment, "arguments": arguments, **measured}
        args.json.write_text(json.dumps(result, indent=1, default=str))
        print(f"written: {args.json}")


def describe_environment(args: argparse.Namespace) -> dict[str, Any]:
    def lines(path: str) -> Iterator[str]:
        return iter(Path(path).read_text().splitlines() if Path(path).exists() else [])

    named = (line.split(":")[1].strip() for line in lines("/proc/cpuinfo") if "model name" in line)
    cpu = next(named, platform.processor() or platform.machine())
    environment = {
        "CPU": f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, "
        f"load before {load():.1f}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"sae-lens {version('sae-lens')}",
    }
    if args.device.startswith("cuda"):
        environment["GPU"] = torch.cuda.get_device_name(args.device)
        environment["float32 matmul precision"] = torch.get_float32_matmul_precision()
    return environment


def load() -> float:
    """Average number of runnable processes over the last minute; NaN if it is not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


# ------------------------------------------------------------------------------------------- time


def stepper(trainer: SAETrainer[Any, Any]) -> Callable[[], None]:
    def run() -> None:
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1

    return run


def alternate(
    calls: dict[str, Callable[[], None]], args: argparse.Namespace, rounds: int
) -> dict[str, list[float]]:
    """Seconds per call, by name and round; every round calls all of them, in a random order."""
    order = list(calls)
    clock = clock_of(args)
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-args.warmup, rounds):
        shuffle(order)
        for name in order:
            synchronize(args.device)
            start = clock()
            for _ in range(args.steps_per_turn):
                calls[name]()
            synchronize(args.device)
            if i >= 0:
                times[name].append((clock() - start) / args.steps_per_turn)
    return times


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """The clock that --clock selects, in seconds."""
    return time.process_time if args.clock == "cpu" else time.perf_counter


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def median_interval(values: list[float]) -> tuple[float, float]:
    """95% interval of the median, between two order statistics; needs at least six values."""
    ordered, n = sorted(values), len(values)
    below, cut = 0.0, 0
    while (below := below + math.comb(n, cut) / 2**n) <= 0.025:
        cut += 1
    cut = max(cut, 1)
    return ordered[cut - 1], ordered[n - cut]


def span(values: Iterable[float]) -> str:
    ordered = sorted(values)
    digits = 2 if ordered[-1] < 100 else 0
    return f"{ordered[0]:.{digits}f}-{ordered[-1]:.{digits}f}"


# ----------------------------------------------------------------------------------------- memory


def reset_peak_memory(device: str) -> float:
    """Reset the peak, and return the bytes in use now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    try:
        # 5 resets VmHWM, the peak of the resident set (Linux, proc_pid_clear_refs(5))
        Path("/proc/self/clear_refs").write_text("5")
        return memory_status("VmRSS")
    except OSError:
        return math.nan


def peak_memory(device: str) -> float:
    """Largest number of bytes in use since `reset_peak_memory`."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated(device))
    try:
        return memory_status("VmHWM")
    except OSError:
        return math.nan


def memory_status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024.0 * int(line.split()[1])
    return math.nan


# ------------------------------------------------------------------------------------------- data


def synthetic_distribution(d: int, condition: float) -> tuple[Tensor, Tensor]:
    """Mean, and a matrix that gives standard normal rows a covariance of that condition number."""
    scale = torch.logspace(0, -math.log10(condition) / 2, d, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
    return 2 * torch.randn(d, dtype=torch.float64), 10 * scale[:, None] * basis


def sample(n: int, mean: Tensor, mixing: Tensor) -> Tensor:
    return torch.randn(n, len(mean), dtype=torch.float64) @ mixing + mean


def batches_of_unit_scale(d_in: int, batch_size: int, n: int, device: str) -> list[Tensor]:
    """Batches of anisotropic activations, condition 1e4, of mean square 1; always the same."""
    torch.manual_seed(0)
    mean, mixing = synthetic_distribution(d_in, condition=1e4)
    scale = (mixing.square().sum() + mean.square().sum()).div(d_in).sqrt()
    return [(sample(batch_size, mean, mixing) / scale).float().to(device) for _ in range(n)]
