"""Measure a training step of a TopK SAE: time, tokens per second and memory, beside other trainers.

Time. Trainers of the same width, number of latents and k are compared: SAELens' own without
normalisation, ours under whitening (original-space loss; pca, and zca, whose loss takes one more
product), and, if they are installed, sparsify and dictionary_learning. In each round every trainer
takes one turn, in random order, on the same activations: one step with forward, backward, clipping
and Adam, and for ours and SAELens' everything that `fit()` does in a step. Each time is divided by
that of SAELens in the same round. The result is the median of these ratios, with an interval that
holds the true median with 95% probability. The encoder's product alone, which no trainer avoids,
is timed in the same rounds.

Memory. Each trainer runs in a new process. The figure is the peak during its first steps, minus the
memory in use before it was made, minus the weights and Adam's two averages of them (12 bytes per
weight). What remains are gradients, latents and whatever else a step needs. On the CPU it is the
resident memory of the process as Linux counts it. There MALLOC_MMAP_THRESHOLD_ makes glibc return
freed blocks of 1 MiB or more; by default it keeps up to some 60 MiB, more or less by chance. On
CUDA it is PyTorch's allocations.

Border (--border). Time of our trainer with sparse steps divided by that with dense steps, by k.
Where the ratio exceeds 1, dense training is faster.

The other trainers are not dependencies, and are measured if they can be imported. Install them
without replacing ours, and set PYTHONPATH=DIR:
`pip install --target DIR --no-deps eai-sparsify dictionary-learning`.
"""

import argparse
import importlib
import itertools
import logging
import os
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from side_by_side import (
    alternate,
    batches_of_unit_scale,
    clock_of,
    make_parser,
    median_interval,
    parse,
    peak_memory,
    report,
    reset_peak_memory,
    span,
    stepper,
    synchronize,
)
from torch import Tensor

from sae_whiten import ActivationStatistics, Whitening, WhiteningConfig, WhiteningTrainer
from sae_whiten.architectures import sparse_step

SAELENS, PRODUCT = "SAELens", "encoder's product"
OURS = {
    "ours: pca": WhiteningConfig(kind="pca", loss_space="original"),
    "ours: zca": WhiteningConfig(kind="zca", loss_space="original"),
}
OTHERS = {"sparsify": "sparsify", "dictionary_learning": "dictionary_learning.trainers.top_k"}
AIM_MEMORY = 0.5


@dataclass(frozen=True)
class Size:
    """Sizes in one comparison; `aim` is a fraction of SAELens' time."""

    d_in: int
    d_sae: int
    batch: int
    k: int
    aim: float | None = None


SIZES = (
    Size(512, 8192, 2048, 32, aim=0.25),
    Size(768, 12288, 4096, 32, aim=0.3),
    Size(2048, 16384, 1024, 64, aim=0.3),
)
QUICK = (Size(64, 1024, 256, 8),)


def main() -> None:
    args = parse_arguments()
    prepare(args)
    name, benchmark = ("sizes", compare) if args.border is None else ("border", find_border)
    report(args, lambda: {name: [benchmark(args, size) for size in args.sizes]})


def prepare(args: argparse.Namespace) -> None:
    """Apply settings to this process; processes that measure memory call this too."""
    torch.set_num_threads(args.threads)
    if args.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def compare(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    data = Data.of(args, size)
    steps: dict[str, Callable[[], Any]] = {}
    for name in (SAELENS, *OURS, *OTHERS):
        step = make_step(name, args, size, data)
        if step is not None:
            steps[name] = step
    W = torch.randn(size.d_in, size.d_sae, device=args.device)
    steps[PRODUCT] = lambda: data.batches[0] @ W
    print(
        f"\n{args.architecture}, d_in={size.d_in}, d_sae={size.d_sae}, batch {size.batch}, "
        f"k={size.k}, {args.precision}: {args.rounds} rounds of {args.steps_per_turn} step(s) "
        f"each, {args.clock} time"
    )
    times = alternate(steps, args, args.rounds)
    del steps
    print(
        f"{'':20}{'ms per step':>12}{'min-max':>16}{'tokens/s':>11}{'over SAELens':>14}"
        f"{'95% interval':>15}{'MiB added':>11}{'ratio':>7}"
    )
    arms: dict[str, Any] = {}
    for name, seconds in times.items():
        ratios = [t / t0 for t, t0 in zip(seconds, times[SAELENS], strict=True)]
        low, high = median_interval(ratios)
        memory = None if name == PRODUCT else memory_in_process(name, args, size)
        median, ratio = statistics.median(seconds), statistics.median(ratios)
        arms[name] = {"ms": [1e3 * t for t in seconds], "ratio": ratio, "interval": [low, high]}
        line = f"{name:20}{1e3 * median:12.1f}{span([1e3 * t for t in seconds]):>16}"
        if name != PRODUCT:
            line += f"{size.batch / median:11.0f}"
        else:
            line += f"{'':11}"
        line += f"{ratio:14.3f}{f'{low:.3f} to {high:.3f}':>15}"
        if memory is not None:
            arms[name]["bytes_added"] = memory
            line += f"{memory / 2**20:11.0f}{memory / arms[SAELENS]['bytes_added']:7.2f}"
        print(line)
    for name in OURS if size.aim is not None and args.device == "cpu" else ():
        ratio = arms[name]["ratio"]
        print(f"  aim at most {size.aim} of SAELens' time, {name}: {ratio:.3f}, "
              f"{'within' if ratio <= size.aim else 'ABOVE'}")  # fmt: skip
        if "bytes_added" in arms[name]:
            memory = arms[name]["bytes_added"] / arms[SAELENS]["bytes_added"]
            print(f"  aim at most {AIM_MEMORY} of the memory that its step adds: {memory:.2f}, "
                  f"{'within' if memory <= AIM_MEMORY else 'ABOVE'}")  # fmt: skip
    return {**asdict(size), "arms": arms}


@dataclass(frozen=True)
class Data:
    """The activations that all trainers get, and their statistics."""

    batches: list[Tensor]
    statistics: ActivationStatistics

    @staticmethod
    def of(args: argparse.Namespace, size: Size) -> "Data":
        n_batches = max(4, -(-2 * size.d_in // size.batch))  # two activations per dimension
        batches = batches_of_unit_scale(size.d_in, size.batch, n_batches, args.device)
        found = ActivationStatistics(size.d_in)
        for batch in batches:
            found.update(batch)
        return Data(batches, found)


def make_step(
    name: str, args: argparse.Namespace, size: Size, data: Data
) -> Callable[[], Any] | None:
    """One training step, or None where the trainer is not installed or is no TopK trainer."""
    torch.manual_seed(0)
    batches = itertools.cycle(data.batches)
    if name in OTHERS:
        try:
            module = importlib.import_module(OTHERS[name])
        except ImportError:
            return None
        if args.architecture != "topk":
            return None
        make = sparsify_step if name == "sparsify" else dictionary_learning_step
        return make(module, args, size, batches)
    return stepper(sae_trainer(name, args, size, data))


def sae_trainer(
    name: str, args: argparse.Namespace, size: Size, data: Data
) -> SAETrainer[Any, Any]:
    sae_class, config_class = get_sae_training_class(args.architecture)
    options: dict[str, Any] = {"d_in": size.d_in, "d_sae": size.d_sae, "device": args.device}
    if "k" in {field.name for field in fields(config_class)}:
        options["k"] = size.k
    if args.architecture == "matryoshka_batchtopk":
        options["matryoshka_widths"] = [size.d_sae // 16, size.d_sae // 4, size.d_sae]
    options["normalize_activations"] = "none" if name == SAELENS else "covariance_whitening"
    cfg = SAETrainerConfig(
        total_training_samples=size.batch * 1_000_000,
        train_batch_size_samples=size.batch,
        lr=1e-4,
        lr_end=1e-5,
        device=args.device,
        autocast=args.precision == "bf16",
    )
    sae = sae_class(config_class(**options)).to(args.device)
    batches = itertools.cycle(data.batches)
    if name == SAELENS:
        return SAETrainer(cfg, sae, batches)
    trainer = WhiteningTrainer(cfg, sae, batches, whitening=OURS[name])
    trainer.scaler.whitening = Whitening.from_statistics(data.statistics, OURS[name])
    trainer.estimate_whitening()  # nothing left to estimate: only takes it into use
    return trainer


def sparsify_step(
    module: Any, args: argparse.Namespace, size: Size, batches: Any
) -> Callable[[], None]:
    """The step of sparsify's trainer, with Adam instead of its own optimizers, which do less."""
    config = module.SparseCoderConfig(num_latents=size.d_sae, k=size.k, normalize_decoder=True)
    sae = module.SparseCoder(size.d_in, config, device=args.device, dtype=torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        x = next(batches)
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=None)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def dictionary_learning_step(
    module: Any, args: argparse.Namespace, size: Size, batches: Any
) -> Callable[[], None]:
    trainer = module.TopKTrainer(
        steps=1_000_000,
        activation_dim=size.d_in,
        dict_size=size.d_sae,
        k=size.k,
        layer=0,
        lm_name="none",
        device=args.device,
    )
    autocast = torch.autocast(
        args.device.split(":")[0], dtype=torch.bfloat16, enabled=args.precision == "bf16"
    )

    def step() -> None:
        with autocast:
            trainer.update(1, next(batches))

    return step


# ----------------------------------------------------------------------------------------- memory


def memory_in_process(name: str, args: argparse.Namespace, size: Size) -> float:
    # glibc reads these when a process starts, so the current process is not affected
    os.environ.update(MALLOC_MMAP_THRESHOLD_=str(2**20), MALLOC_TRIM_THRESHOLD_=str(2**20))
    # one process for each, so that memory of one trainer does not affect the next
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure_memory, name, args, size).result()


def measure_memory(name: str, args: argparse.Namespace, size: Size) -> float:
    prepare(args)
    data = Data.of(args, size)
    # memory that libraries allocate on first use is not part of the step
    data.batches[0].T.matmul(data.batches[0])
    before = reset_peak_memory(args.device)
    step = make_step(name, args, size, data)
    assert step is not None
    # freed memory may stay with the process, so the peak is reset before anything is made
    reset_peak_memory(args.device)
    for _ in range(4):
        step()
    # weights, and Adam's averages of the same size
    kept = 3 * 4 * 2 * size.d_in * size.d_sae
    return peak_memory(args.device) - before - kept


# ----------------------------------------------------------------------------------------- border


def find_border(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    data = Data.of(args, size)
    print(
        f"\nSparse over dense steps by k, {args.architecture}, d_in={size.d_in}, "
        f"d_sae={size.d_sae}, batch {size.batch}, {args.precision}: {args.rounds} rounds"
    )
    print(f"{'k':>6}{'k / d_sae':>12}{'dense ms':>11}{'sparse ms':>11}{'ratio':>8}")
    found = {}
    for k in args.border:
        own = Size(size.d_in, size.d_sae, size.batch, k)
        trainers = {n: sae_trainer("ours: pca", args, own, data) for n in ("sparse", "dense")}
        times: dict[str, list[float]] = {n: [] for n in trainers}
        clock = clock_of(args)
        for i in range(-args.warmup, args.rounds):
            for name, trainer in trainers.items():
                for device in ("cpu", "cuda"):
                    sparse_step._SPARSE_UP_TO[device] = 1.0 if name == "sparse" else 0.0
                start = clock()
                trainer.step(next(trainer.data_provider))
                synchronize(args.device)
                if i >= 0:
                    times[name].append(clock() - start)
        ratio = statistics.median(
            s / d for s, d in zip(times["sparse"], times["dense"], strict=True)
        )
        ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
        print(
            f"{k:6}{f'1/{size.d_sae / k:.0f}':>12}{ms['dense']:11.0f}{ms['sparse']:11.0f}"
            f"{ratio:8.2f}"
        )
        found[k] = {**ms, "ratio": ratio}
    return {**asdict(size), "by_k": found}


def size_of(text: str) -> Size:
    return Size(*(int(part) for part in text.split(",")))


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        "  python benchmarks/training_step.py --quick     to see that it works\n"
        "  python benchmarks/training_step.py             half an hour on two idle cores\n"
        "  python benchmarks/training_step.py --threads 1 --clock cpu    on busy ones\n"
        "  python benchmarks/training_step.py --architecture jumprelu --sizes 512,8192,2048,32\n"
        "  python benchmarks/training_step.py --border 32 128 512 1024 2048\n"
        "  python benchmarks/training_step.py --device cuda --precision bf16",
    )
    add = parser.add_argument
    add("--sizes", type=size_of, nargs="+", default=None, metavar="D_IN,D_SAE,BATCH,K",
        help="(default: 512,8192,2048,32 768,12288,4096,32 2048,16384,1024,64)")  # fmt: skip
    add("--architecture", default="topk", help="of SAELens and ours (default: topk)")
    add("--precision", choices=("float32", "tf32", "bf16"), default="float32", help="of products: "
        "float32, TensorFloat-32 on CUDA, or bfloat16 autocast (default: float32)")  # fmt: skip
    add("--border", type=int, nargs="+", default=None, metavar="K", help="only compare our sparse "
        "and dense steps, at these k")  # fmt: skip
    return parse(parser, {"sizes": SIZES, "rounds": 12}, quick={"sizes": QUICK, "rounds": 3})


if __name__ == "__main__":
    main()
