"""Measure what topk_vsae and top_afa cost: time per training step, over that of SAELens' topk.

Trainers of all variants are kept in memory, topk twice, which shows the noise of the machine. In
each round every trainer takes one turn, in random order, on the same batches: one
`trainer.step(next(batches))`, as in `fit()`, optimizer included. Each time is divided by the mean
of the two topk trainers in the same round. The result is the median of these ratios, with an
interval that holds the true median with 95% probability. The learning rate is small and the KL
coefficient smaller, so that the SAEs stay as they are after the warm-up while they are timed.

top_afa is timed at the number of active latents that it reaches by itself, which is printed.
"""

import argparse
import itertools
import statistics
from typing import Any

import torch
from sae_lens import TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from side_by_side import (
    alternate,
    batches_of_unit_scale,
    make_parser,
    median_interval,
    parse,
    report,
    span,
    stepper,
)

from sae_whiten.architectures import TopAFATrainingSAEConfig, TopKVSAETrainingConfig

TOPK, AGAIN = "topk", "topk, again"
AIMS = {"topk_vsae": 1.15, "top_afa": 1.5}


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    report(args, lambda: {"steps": [benchmark(args, k) for k in args.k]})


def benchmark(args: argparse.Namespace, k: int) -> dict[str, Any]:
    batches = batches_of_unit_scale(args.d_in, args.batch_size, 4, args.device)
    common: dict[str, Any] = {"d_in": args.d_in, "d_sae": args.d_sae, "device": args.device}
    vsae: dict[str, Any] = {**common, "k": k, "kl_coefficient": 1e-4, "initial_logvar": -6.0}
    configs = {
        TOPK: TopKTrainingSAEConfig(**common, k=k),
        AGAIN: TopKTrainingSAEConfig(**common, k=k),
        **{
            f"topk_vsae, {variance}": TopKVSAETrainingConfig(**vsae, variance=variance)
            for variance in ("none", "fixed", "learned")
        },
        "topk_vsae, learned, KL of selected": TopKVSAETrainingConfig(**vsae, kl_over="selected"),
        "top_afa": TopAFATrainingSAEConfig(**common),
    }
    trainers: dict[str, SAETrainer[Any, Any]] = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        sae = get_sae_training_class(config.architecture())[0](config)
        cfg = SAETrainerConfig(
            total_training_samples=args.batch_size * 1_000_000,
            train_batch_size_samples=args.batch_size,
            lr=1e-4,
            lr_end=1e-5,
            device=args.device,
            autocast=args.autocast,
        )
        trainers[name] = SAETrainer(cfg, sae.to(args.device), itertools.cycle(batches))
    print(
        f"\nTime per training step, d_in={args.d_in}, d_sae={args.d_sae}, k={k}, batch "
        f"{args.batch_size}{', autocast' if args.autocast else ''}: {args.rounds} rounds of "
        f"{args.steps_per_turn} step(s) each, {args.clock} time"
    )
    times = alternate({n: stepper(t) for n, t in trainers.items()}, args, args.rounds)
    with torch.no_grad():
        l0 = float((trainers["top_afa"].sae.encode(batches[0]) != 0).sum(dim=-1).double().mean())
    print(f"top_afa has {l0:.0f} latents active on average")
    print(f"{'':36}{'ms per step':>12}{'min-max':>18}{'over topk':>11}{'95% interval':>16}")
    both = [(a + b) / 2 for a, b in zip(times[TOPK], times[AGAIN], strict=True)]
    arms: dict[str, Any] = {"k": k, "l0 of top_afa": l0}
    for name in trainers:
        base = times[TOPK] if name == AGAIN else both
        ratios = [t / t0 for t, t0 in zip(times[name], base, strict=True)]
        ratio, (low, high) = statistics.median(ratios), median_interval(ratios)
        arms[name] = {"ms": [1e3 * t for t in times[name]], "ratio": ratio, "interval": (low, high)}
        line = (
            f"{name:36}{1e3 * statistics.median(times[name]):12.1f}"
            f"{span([1e3 * t for t in times[name]]):>18}"
        )
        if name != TOPK:
            line += f"{ratio:11.2f}{f'{low:.2f} to {high:.2f}':>16}"
        aim = AIMS.get(name.split(",")[0])
        if aim is not None and not args.quick:
            verdict = "within" if high <= aim else "ABOVE" if low > aim else "not decided by this"
            line += f"  aim at most {aim}: {verdict}"
        print(line)
    return arms


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        "  python benchmarks/architectures.py --quick     to see that it works\n"
        "  python benchmarks/architectures.py             a quarter of an hour on two idle cores\n"
        "  python benchmarks/architectures.py --device cuda --d-in 768 --d-sae 24576",
    )
    add = parser.add_argument
    add("--d-in", type=int, default=512, help="width of the activations (default: 512)")
    add("--d-sae", type=int, default=None, help="latents (default: 8192)")
    add("--k", type=int, nargs="+", default=[32, 256], help="active latents (default: 32 256)")
    add("--batch-size", type=int, default=None, help="activations per step (default: 4096)")
    add("--autocast", action="store_true", help="train in bfloat16 autocast")
    full = {"d_sae": 8192, "batch_size": 4096, "rounds": 12}
    return parse(parser, full, quick={"d_sae": 1024, "batch_size": 256, "rounds": 3})


if __name__ == "__main__":
    main()
