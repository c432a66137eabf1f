"""Measure what whitening costs: time per training step, and time and peak memory of a fold.

Step. Six trainers of the same SAE are compared: no normalisation (twice, which shows the noise of
the machine), the covariance_whitening built into sae-lens, and ours. In each round every trainer
takes one turn, in random order, on the same batches: one `trainer.step(next(batches))`, as in
`fit()`, whitening of the batch and optimizer included. Whitenings are estimated beforehand. "ours"
is as in WhiteningTrainingRunner, whose activations store checks for NaN once per pass of the
language model. "checked" checks every batch, as WhiteningTrainer does with a user's own data
provider. Each time is divided by the mean of the two unnormalised trainers in the same round. The
result is the median of these ratios, with an interval that holds the true median with 95%
probability. ("none, again" is divided by "none" alone.)

The noise of a busy machine can exceed one percent. So the work that whitening adds (checking and
whitening the batch, and the loss forward and backward) is also timed alone, in the same rounds,
minus the time of the same calls in the unnormalised trainer. On a CPU this figure is the more
exact. On CUDA it is mostly the time to launch small kernels, which a step may or may not overlap
with large ones: there, rely on the ratios.

Fold. Each fold runs in a new process. Three alternate: ours, ours with its check on up to 1024
activations as in training, and the built-in. Weights are float32; the whitening has condition 1e6
and means of up to 3000. Memory is the peak during the fold minus the memory before it (the SAE and
the whitening), divided by the bytes of the weights. On the CPU it is the resident memory of the
process as Linux counts it, on CUDA PyTorch's allocations. Errors compare the folded SAE in float32,
as a user runs it, with the unfolded one in float64: |difference| / |value| of the pre-activations,
and |difference| / |x - mean| of the decoder's output.
"""

import argparse
import gc
import itertools
import logging
import math
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from side_by_side import (
    alternate,
    clock_of,
    make_parser,
    median_interval,
    parse,
    peak_memory,
    report,
    reset_peak_memory,
    sample,
    span,
    stepper,
    synchronize,
    synthetic_distribution,
)
from torch import Tensor

from sae_whiten import (
    ActivationStatistics,
    Whitening,
    WhiteningConfig,
    WhiteningTrainer,
    fold_whitening_into_weights,
)

AIM_STEP = 0.02  # of a step without normalisation
AIM_FOLD = 1.5  # times the bytes of the weights

NONE, AGAIN, BUILT_IN = "none", "none, again", "built-in"
OURS = {
    "ours: pca, original": WhiteningConfig(kind="pca", loss_space="original"),
    "ours: pca, whitened": WhiteningConfig(kind="pca", loss_space="whitened"),
    "ours: zca, original": WhiteningConfig(kind="zca", loss_space="original"),
    "ours: pca, checked": WhiteningConfig(kind="pca", loss_space="original"),
}
FOLDS = ("ours", "ours + proof", BUILT_IN)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    report(args, lambda: measure(args))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if "step" in args.parts:
        result["step"] = [benchmark_steps(args, d_in) for d_in in args.d_in]
    if "fold" in args.parts:
        result["fold"] = benchmark_folds(args)
    return result


# ---------------------------------------------------------------------------------- training step


def benchmark_steps(args: argparse.Namespace, d_in: int) -> dict[str, Any]:
    torch.manual_seed(0)
    # at least ten samples per dimension, so that there is no shrinkage
    n_batches = max(4, math.ceil(10 * d_in / args.batch_size))
    mean, mixing = synthetic_distribution(d_in, condition=1e4)
    pool = [sample(args.batch_size, mean, mixing).float().to(args.device) for _ in range(n_batches)]
    trainers = build_trainers(args, d_in, pool)
    d_sae = args.expansion * d_in
    print(
        f"\nTime per training step, {args.architecture}, d_in={d_in}, d_sae={d_sae}, batch "
        f"{args.batch_size}{', autocast' if args.autocast else ''}: {args.rounds} rounds of "
        f"{args.steps_per_turn} step(s) each, {args.clock} time"
    )
    times = alternate(
        {name: stepper(trainer) for name, trainer in trainers.items()}, args, args.rounds
    )
    added = alternate(
        {name: part(trainer) for name, trainer in trainers.items()}, args, 10 * args.rounds
    )

    step = statistics.median(times[NONE] + times[AGAIN])
    print(
        f"{'':22}{'ms per step':>12}{'min-max':>18}{'over none':>11}{'95% interval':>19}"
        f"{'added, timed alone':>20}"
    )
    unnormalised = [(a + b) / 2 for a, b in zip(times[NONE], times[AGAIN], strict=True)]
    arms = {}
    for name in trainers:
        baseline = times[NONE] if name == AGAIN else unnormalised
        ratios = [t / t0 for t, t0 in zip(times[name], baseline, strict=True)]
        over = statistics.median(ratios) - 1
        low, high = (bound - 1 for bound in median_interval(ratios))
        alone = statistics.median(t - t0 for t, t0 in zip(added[name], added[NONE], strict=True))
        arms[name] = {
            "ms": [1e3 * t for t in times[name]],
            "over_none": over,
            "over_none_interval": [low, high],
            "added_ms": 1e3 * alone,
            "added_share": alone / step,
        }
        line = (
            f"{name:22}{1e3 * statistics.median(times[name]):12.2f}"
            f"{span([1e3 * t for t in times[name]]):>18}"
        )
        if name != NONE:
            line += f"{over:+11.1%}{f'{low:+.1%} to {high:+.1%}':>19}"
        if name not in (NONE, AGAIN):
            line += f"{1e3 * alone:10.2f} ms {alone / step:+6.1%}"
        print(line)
    for name in () if args.quick else OURS:
        low, high = arms[name]["over_none_interval"]
        if high <= AIM_STEP:
            verdict = "within the aim"
        elif low > AIM_STEP:
            verdict = "ABOVE the aim"
        else:
            verdict = "the interval holds the aim: not decided by these rounds"
        share = arms[name]["added_share"]
        print(
            f"  aim at most {AIM_STEP:.0%} over none, {name}: measured "
            f"{arms[name]['over_none']:+.1%}, {verdict}; added work alone {share:+.1%}, "
            f"{'within' if share <= AIM_STEP else 'ABOVE'}"
        )
    return {"d_in": d_in, "d_sae": d_sae, "arms": arms}


def build_trainers(
    args: argparse.Namespace, d_in: int, pool: list[Tensor]
) -> dict[str, SAETrainer[Any, Any]]:
    statistics_ = ActivationStatistics(d_in)
    for batch in pool:
        statistics_.update(batch)
    cfg = SAETrainerConfig(
        total_training_samples=args.batch_size * 1_000_000,
        train_batch_size_samples=args.batch_size,
        lr_end=3e-5,
        device=args.device,
        autocast=args.autocast,
    )

    def sae(normalize: str) -> TrainingSAE[Any]:
        return build_sae(args, d_in, args.expansion * d_in, normalize)

    trainers: dict[str, SAETrainer[Any, Any]] = {}
    for name in (NONE, AGAIN, BUILT_IN):
        normalize = "covariance_whitening" if name == BUILT_IN else "none"
        trainers[name] = SAETrainer(cfg, sae(normalize), itertools.cycle(pool))
    trainers[BUILT_IN].activation_scaler.estimate_whitening(
        d_in, iter(pool), n_batches_for_norm_estimate=len(pool)
    )
    for name, config in OURS.items():
        trainer = WhiteningTrainer(
            cfg, sae("covariance_whitening"), itertools.cycle(pool), whitening=config
        )
        trainer.scaler.whitening = Whitening.from_statistics(statistics_, config)
        trainer.estimate_whitening()  # nothing left to estimate: only takes it into use
        trainer.stream.source_is_finite = not name.endswith("checked")
        trainers[name] = trainer
    return trainers


def part(trainer: SAETrainer[Any, Any]) -> Callable[[], None]:
    """The calls of a step that whitening changes: fetch, whiten, loss and its gradient."""
    prediction = torch.zeros_like(next(trainer.data_provider), requires_grad=True)

    def run() -> None:
        scaled = trainer.activation_scaler(next(trainer.data_provider))
        loss = trainer.sae.mse_loss_fn(prediction, scaled).sum(dim=-1).mean()
        prediction.grad = None
        loss.backward()

    return run


# ------------------------------------------------------------------------------------------- fold


@dataclass
class Fold:
    """Measurements of one fold; memory in bytes, NaN if it cannot be read."""

    seconds: float
    weights: int
    before: float
    peak: float
    pre_activation_error: float
    decoder_error: float


def benchmark_folds(args: argparse.Namespace) -> dict[str, Any]:
    d_in, d_sae = args.fold_d_in, args.fold_d_sae
    folds: dict[str, list[Fold]] = {name: [] for name in FOLDS}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "whitening.safetensors"
        whitening = synthetic_whitening(d_in)
        whitening.save(path)
        for i in range(args.fold_rounds):
            for name in FOLDS if i % 2 == 0 else reversed(FOLDS):
                # one process for each, so that the peak of one fold does not affect the next
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    folds[name].append(process.submit(measure_fold, name, path, args).result())
    weights = folds["ours"][0].weights
    print(
        f"\nFold, {args.architecture}, d_in={d_in}, d_sae={d_sae}, float32 weights of "
        f"{weights / 2**20:.0f} MiB, condition number of the covariance "
        f"{whitening.condition_number**2:.1e}: {args.fold_rounds} rounds, {args.clock} time"
    )
    print(
        f"{'':22}{'seconds':>12}{'min-max':>18}{'peak added / weights':>22}{'min-max':>14}"
        f"{'total peak':>12}{'error pre':>11}{'decoder':>9}"
    )
    for name, runs in folds.items():
        seconds = [run.seconds for run in runs]
        added = [(run.peak - run.before) / run.weights for run in runs]
        print(
            f"{name:22}{statistics.median(seconds):12.2f}{span(seconds):>18}"
            f"{statistics.median(added):22.2f}{span(added):>14}"
            f"{statistics.median(run.peak for run in runs) / 2**20:8.0f} MiB"
            f"{runs[0].pre_activation_error:11.1e}{runs[0].decoder_error:9.1e}"
        )
    for name in () if args.quick else FOLDS[:2]:
        added = max((run.peak - run.before) / run.weights for run in folds[name])
        verdict = "within the aim" if added <= AIM_FOLD else "ABOVE the aim"
        print(
            f"  aim at most {AIM_FOLD} times the weights on top of them, {name}: {added:.2f}, "
            f"{verdict if math.isfinite(added) else 'not measured'}"
        )
    for name in FOLDS[:2]:
        ratios = [a.seconds / b.seconds for a, b in zip(folds[name], folds[BUILT_IN], strict=True)]
        print(
            f"  time of {name} over the built-in's, by round: {statistics.median(ratios):.2f} "
            f"({span(ratios)})"
        )
    return {
        "d_in": d_in,
        "d_sae": d_sae,
        "folds": {name: [vars(run) for run in runs] for name, runs in folds.items()},
    }


@torch.no_grad()
def measure_fold(name: str, whitening_path: Path, args: argparse.Namespace) -> Fold:
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = args.device
    whitening = Whitening.load(whitening_path)
    sae = build_sae(args, args.fold_d_in, args.fold_d_sae, "covariance_whitening")
    sae.W_dec.mul_(torch.rand(args.fold_d_sae, 1, device=device) + 0.5)
    for bias in (sae.b_dec, sae.b_enc):
        assert isinstance(bias, Tensor)
        bias.normal_(std=0.1)
    z = torch.randn(64, args.fold_d_in, dtype=torch.float64)
    x = whitening.dewhiten(z).float().to(device)
    latents = torch.rand(64, args.fold_d_sae, device=device)
    latents *= torch.rand_like(latents) < args.k / args.fold_d_sae
    reference_pre, reference_out = in_float64(sae, whitening, x, latents)
    proof = None
    if name == "ours + proof":
        z = torch.randn(1024, args.fold_d_in, dtype=torch.float64)
        proof = whitening.dewhiten(z).float().to(device)
    # one small product first: memory that libraries allocate on first use is not part of the fold
    torch.ones(64, 64, dtype=torch.float64, device=device).matmul(
        torch.ones(64, 64, dtype=torch.float64, device=device)
    )
    del z
    gc.collect()

    before = reset_peak_memory(device)
    synchronize(device)
    clock = clock_of(args)
    start = clock()
    if name == BUILT_IN:
        sae.fold_activation_whitening(whitening.mean, whitening.W, whitening.W_inv)
    else:
        fold_whitening_into_weights(sae, whitening, activations=proof)
    synchronize(device)
    seconds = clock() - start
    peak = peak_memory(device)

    _, pre = sae.encode_with_hidden_pre(x)
    centre = whitening.mean.to(device)
    out = sae.decode(latents).double()
    return Fold(
        seconds=seconds,
        weights=sum(p.numel() * p.element_size() for p in sae.parameters()),
        before=before,
        peak=peak,
        pre_activation_error=relative(pre.double() - reference_pre, reference_pre),
        decoder_error=relative(out - reference_out, reference_out - centre),
    )


def in_float64(
    sae: TrainingSAE[Any], whitening: Whitening, x: Tensor, latents: Tensor
) -> tuple[Tensor, Tensor]:
    """For raw activations: pre-activations of the unfolded SAE, and its output for `latents`."""
    W_enc, W_dec, b_dec = sae.W_enc.double(), sae.W_dec.double(), sae.b_dec.double()
    assert isinstance(sae.b_enc, Tensor)
    mean, W, W_inv = (t.to(x.device) for t in (whitening.mean, whitening.W, whitening.W_inv))
    z = (x.double() - mean) @ W
    pre = (z - b_dec * sae.cfg.apply_b_dec_to_input) @ W_enc + sae.b_enc.double()
    acts = latents.double()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        norms = W_dec.norm(dim=-1)
        pre, acts = pre * norms, acts / norms
    return pre, (acts @ W_dec + b_dec) @ W_inv + mean


# ----------------------------------------------------------------------------------- what is used


def build_sae(
    args: argparse.Namespace, d_in: int, d_sae: int, normalize: Any
) -> StandardTrainingSAE | TopKTrainingSAE:
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "normalize_activations": normalize,
        "device": args.device,
    }
    if args.architecture == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(k=args.k, **common))
    return StandardTrainingSAE(StandardTrainingSAEConfig(**common))


def synthetic_whitening(d: int) -> Whitening:
    torch.manual_seed(0)
    mean, mixing = synthetic_distribution(d, condition=1e6)
    mean[:4] = 3000.0
    statistics_ = ActivationStatistics(d)
    for _ in range(10):
        statistics_.update(sample(d, mean, mixing))
    return Whitening.from_statistics(statistics_, WhiteningConfig(eps=1e-6))


def relative(difference: Tensor, value: Tensor) -> float:
    return float(difference.norm() / value.norm())


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        "  python benchmarks/step_and_fold.py --quick     half a minute, to see that it works\n"
        "  python benchmarks/step_and_fold.py             all: half an hour on two idle cores\n"
        "  python benchmarks/step_and_fold.py --parts step --threads 1 --clock cpu   on busy ones\n"
        "  python benchmarks/step_and_fold.py --device cuda --autocast --json out.json",
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=("step", "fold"), default=("step", "fold"), help="what to "
        "measure (default: both)")  # fmt: skip
    add("--architecture", choices=("topk", "standard"), default="topk", help="topk, or standard "
        "(ReLU and L1); default: topk")  # fmt: skip
    add("--d-in", type=int, nargs="+", default=None, metavar="D", help="widths of the activations "
        "for the step (default: 384 768)")  # fmt: skip
    add("--expansion", type=int, default=16, help="d_sae / d_in for the step (default: 16)")
    add("--k", type=int, default=32, help="active latents of topk (default: 32)")
    add("--batch-size", type=int, default=None, help="activations per step (default: 4096)")
    add("--autocast", action="store_true", help="train in bfloat16 autocast, as one does on a GPU: "
        "steps get faster, whitening stays in float32")  # fmt: skip
    add("--fold-d-in", type=int, default=None, help="width for the fold (default: 2048)")
    add("--fold-d-sae", type=int, default=None, help="latents for the fold (default: 32768)")
    add("--fold-rounds", type=int, default=None, help="folds of each kind (default: 3)")
    full = {
        "d_in": [384, 768],
        "batch_size": 4096,
        "rounds": 20,
        "fold_d_in": 2048,
        "fold_d_sae": 32768,
        "fold_rounds": 3,
    }
    quick = {
        "d_in": [64],
        "batch_size": 1024,
        "rounds": 6,
        "fold_d_in": 256,
        "fold_d_sae": 4096,
        "fold_rounds": 1,
    }
    args = parse(parser, full, quick)
    if min(args.fold_rounds, args.batch_size) < 1:
        parser.error("rounds and batches must be at least 1")
    return args


if __name__ == "__main__":
    main()
