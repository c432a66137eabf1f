"""Compare the estimation of a whitening with that of the covariance_whitening built into sae-lens.

stream: both read the same activations: Gaussian times the root of an exponential variable, which
has heavier tails; condition 1e4, mean twice the deviation. The built-in is run with 1000 batches of
4096, its default, and with as many as ours needed. Ours is run until it stops by itself at 2%
excess variance, and with 1000 batches. Printed are the activations consumed, the seconds spent
without drawing activations (CPU time if there is no GPU), and the excess variance of the
distribution, whose covariance is known, under either whitening. To compare whiteness, compare rows
of equal n.

update: throughput of an update of the statistics, counted as the 2 n d^2 operations of a full
product, divided by that of x.T @ x of the same float64 matrix. Rounds alternate.

memory: peak memory of estimation for 4 SAEs at 4 hooks (SAELens' MultiSAETrainingRunner), above
that of the same run without whitening. Each run has its own process. The built-in holds every batch
of every hook. It is measured at two small numbers of batches, which gives its slope; the value for
its default of 1000 is computed from this.

end-to-end: seconds, measured in the same way, of a run with LanguageModelSAERunnerConfig's defaults
(2 million tokens in batches of 4096, 1000 batches for the estimation) at one hook of a transformer
with random weights. Each run has its own process. The seconds are divided into the model,
estimation (without the model), training steps, mixing and moving activations, and the rest.
"""

import argparse
import json
import logging
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PARTS = ("stream", "update", "memory", "end-to-end")
BATCH, BUILT_IN_BATCHES = 4096, 1000


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.child is not None:
        print(json.dumps(CHILDREN[args.child](args)))
        return
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    print(
        f"{device or platform.machine()}, {args.threads} threads, torch {torch.__version__}, "
        f"sae-lens {version('sae-lens')}, d_in={args.d_in}"
    )
    result: dict[str, Any] = {}
    for part in args.parts:
        print(f"\n{part}")
        result[part] = MEASUREMENTS[part](args)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1))


# ----------------------------------------------------------------------------------------- stream


class Stream(Iterator[Tensor]):
    """Batches of activations; also measures the time spent on drawing them."""

    def __init__(self, d_in: int, device: str, seed: int) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        # so large that the built-in's absolute eps does not matter
        self.scale = torch.logspace(1, 3, d_in, device=device)
        self.mean = 2 * self.scale
        self.device = device
        self.n, self.seconds = 0, 0.0

    def __next__(self) -> Tensor:
        begun = clock(self.device)
        shape = (BATCH, len(self.scale))
        x = torch.randn(shape, generator=self.generator, device=self.device)
        # heavier tails than a Gaussian, which make estimation harder, as in language models
        tail = torch.rand(BATCH, 1, generator=self.generator, device=self.device).log().neg().sqrt()
        x = x * tail * self.scale + self.mean
        self.n += BATCH
        self.seconds += clock(self.device) - begun
        return x


def measure_stream(args: argparse.Namespace) -> list[dict[str, Any]]:
    from sae_lens.training.activation_scaler import ActivationScaler

    from sae_whiten import CovarianceWhiteningScaler, WhiteningConfig

    covariance = Stream(args.d_in, args.device, 0).scale.double().square().diag()
    absolute: dict[str, Any] = {"eps": 0.0, "eps_mode": "absolute"}

    def ours(n_samples: int | None) -> tuple[Any, int | None]:
        config = WhiteningConfig(n_samples=n_samples, **absolute)
        return CovarianceWhiteningScaler(config), None

    rows: list[dict[str, Any]] = []

    def row(name: str, scaler: Any, n_batches: int | None) -> int:
        stream = Stream(args.d_in, args.device, 0)
        begun = clock(args.device)
        options = {} if n_batches is None else {"n_batches_for_norm_estimate": n_batches}
        scaler.estimate_whitening(d_in=args.d_in, data_provider=stream, **options)
        seconds = clock(args.device) - begun - stream.seconds
        found = scaler.whitening
        w = (found.W if hasattr(found, "W") else found.matrix).double().to(args.device)
        excess = float((w * (covariance @ w)).sum()) / args.d_in - 1
        rows.append({"name": name, "n": stream.n, "seconds": seconds, "excess": excess})
        print(f"  {name:32}{stream.n:>10} activations {seconds:8.2f} s  excess {excess:8.3%}")
        return stream.n

    n_ours = row("ours, to 2% excess", *ours(None))
    row("built-in, as many", ActivationScaler(), n_ours // BATCH)
    row("built-in, its default", ActivationScaler(), args.n_batches)
    row("ours, as many", *ours(args.n_batches * BATCH))
    by = {r["name"]: r for r in rows}
    for left, right in (
        ("ours, to 2% excess", "built-in, its default"),
        ("ours, to 2% excess", "built-in, as many"),
        ("ours, as many", "built-in, its default"),
    ):
        a, b = by[left], by[right]
        print(
            f"  {left} / {right}: activations {a['n'] / b['n']:.3f}, seconds "
            f"{a['seconds'] / b['seconds']:.3f}"
        )
    return rows


# ----------------------------------------------------------------------------------------- update


def measure_update(args: argparse.Namespace) -> list[dict[str, Any]]:
    from sae_whiten import ActivationStatistics

    rows = []
    for d in sorted({args.d_in, 2304}):
        x = torch.randn(BATCH, d, device=args.device)
        x64 = x.double()
        ours = ActivationStatistics(d)
        seconds: dict[str, list[float]] = {"update": [], "product": []}
        for _ in range(args.rounds + 1):
            seconds["update"].append(timed(lambda: ours.update(x), args.device))  # noqa: B023
            seconds["product"].append(timed(lambda: x64.T @ x64, args.device))  # noqa: B023
        flops = 2 * BATCH * d * d
        update, product = (flops / statistics.median(s[1:]) / 1e9 for s in seconds.values())
        ratios = [b / a for a, b in zip(seconds["update"][1:], seconds["product"][1:], strict=True)]
        ratio = statistics.median(ratios)
        print(
            f"  d={d}: update {update:.1f} GFLOP/s, float64 product {product:.1f} GFLOP/s, "
            f"ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {args.rounds} rounds)"
        )
        rows.append({"d": d, "update": update, "product": product, "ratios": ratios})
    return rows


# ----------------------------------------------------------------------------------------- memory


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    none = child(args, "memory-none")["peak"]
    few, more = (
        child(args, "memory-built-in", "--n-batches", str(n))["peak"] - none for n in (8, 24)
    )
    ours = child(args, "memory-ours")
    slope = (more - few) / 16
    expected = 4 * BATCH * args.d_in * 4
    built_in = few + slope * (BUILT_IN_BATCHES - 8)
    own = ours["peak"] - none
    print(
        f"  built-in: {slope / 1e6:.1f} MB per batch (4 hooks x 4096 x {args.d_in} float32 are "
        f"{expected / 1e6:.1f}), computed for {BUILT_IN_BATCHES} batches: {built_in / 1e9:.1f} GB\n"
        f"  ours: {own / 1e9:.3f} GB for {ours['n_samples']} activations per hook, of which it "
        f"hands on all\n  ours / built-in: 1/{built_in / own:.0f}, and "
        f"1/{BUILT_IN_BATCHES * expected / own:.0f} of the bytes of its batches alone"
    )
    return {"built-in": built_in, "slope": slope, "ours": own, "n_samples": ours["n_samples"]}


def run_memory(args: argparse.Namespace) -> dict[str, Any]:
    from sae_lens import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig, TopKTrainingSAEConfig

    from sae_whiten import WhiteningMultiSAETrainingRunner

    kind = args.child.removeprefix("memory-")
    normalize: Any = "none" if kind == "none" else "covariance_whitening"
    model, dataset = random_model(args.d_in, n_layers=4), random_tokens()
    names = [f"layer {i}" for i in range(4)]
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            name: TopKTrainingSAEConfig(
                d_in=args.d_in, d_sae=2 * args.d_in, k=16, normalize_activations=normalize
            )
            for name in names
        },
        hook_names={name: f"blocks.{i}.hook_resid_post" for i, name in enumerate(names)},
        training_tokens=2 * BATCH,
        n_batches_for_norm_estimate=args.n_batches,
        **common(args),
    )
    found: Any = {}
    if kind == "ours":
        runner = WhiteningMultiSAETrainingRunner(
            cfg, override_model=model, override_dataset=dataset
        )
        runner.run()
        found["n_samples"] = min(s.n_samples for s in runner.trainer.statistics.values())
    else:
        MultiSAETrainingRunner(cfg, override_model=model, override_dataset=dataset).run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, **found}


# ------------------------------------------------------------------------------------- end-to-end


def measure_end_to_end(args: argparse.Namespace) -> dict[str, Any]:
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "built-in": []}
    for _ in range(args.end_to_end_rounds):
        for kind, found in rounds.items():
            found.append(child(args, f"end-to-end-{kind}"))
    medians = {
        kind: {name: statistics.median(r[name] for r in found) for name in found[0]}
        for kind, found in rounds.items()
    }
    print(f"  {'seconds':10}{'ours':>10}{'built-in':>10}{'ratio':>8}")
    for name, ours in medians["ours"].items():
        theirs = medians["built-in"][name]
        print(f"  {name:10}{ours:10.1f}{theirs:10.1f}{ours / theirs:8.3f}")
    print(f"  ({args.end_to_end_rounds} rounds)")
    return rounds


class Parts:
    """Seconds spent in the watched methods, each without the watched methods that it calls."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self.device = device
        self._inner = [0.0]

    def watch(self, owner: type, method: str, name: str) -> None:
        """Add the time spent in a method to the entry `name`."""
        original = getattr(owner, method)
        self.seconds.setdefault(name, 0.0)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begun = clock(self.device)
            try:
                return original(*args, **kwargs)
            finally:
                taken = clock(self.device) - begun
                self.seconds[name] += taken - self._inner.pop()
                self._inner[-1] += taken

        setattr(owner, method, watched)


def run_end_to_end(args: argparse.Namespace) -> dict[str, float]:
    from sae_lens import LanguageModelSAETrainingRunner
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore
    from sae_lens.training.sae_trainer import SAETrainer

    from sae_whiten import WhiteningTrainer, WhiteningTrainingRunner

    parts = Parts(args.device)
    parts.watch(ActivationsStore, "get_activations", "model")
    parts.watch(ActivationScaler, "estimate_whitening", "estimation")
    parts.watch(WhiteningTrainer, "estimate_whitening", "estimation")
    parts.watch(SAETrainer, "step", "steps")

    cfg = whole_run(args, args.training_tokens, n_batches_for_norm_estimate=args.n_batches)
    model = random_model(args.d_in, args.n_layers).to(args.device)
    runner_class: Any = (
        WhiteningTrainingRunner if args.child.endswith("ours") else LanguageModelSAETrainingRunner
    )
    begun = clock(args.device)
    runner_class(cfg, override_model=model, override_dataset=random_tokens()).run()
    total = clock(args.device) - begun
    return {**parts.seconds, "rest": total - sum(parts.seconds.values()), "all": total}


def common(args: argparse.Namespace) -> dict[str, Any]:
    from sae_lens import LoggingConfig

    return {
        "model_name": "random",
        "dataset_path": "random tokens",
        "streaming": False,
        "context_size": 128,
        "train_batch_size_tokens": BATCH,
        # the default of 20 is less than one batch of 4096 at a context size of 128
        "n_batches_in_buffer": 64,
        "device": args.device,
        "checkpoint_path": None,
        "output_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }


def last_hook(args: argparse.Namespace) -> str:
    return f"blocks.{args.n_layers - 1}.hook_resid_post"


def whole_run(args: argparse.Namespace, n_tokens: int, **options: Any) -> Any:
    """The config of a whole run on the last layer of the random model."""
    from sae_lens import LanguageModelSAERunnerConfig, TopKTrainingSAEConfig

    return LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(
            d_in=args.d_in,
            d_sae=8 * args.d_in,
            k=32,
            normalize_activations="covariance_whitening",
        ),
        hook_name=last_hook(args),
        training_tokens=n_tokens,
        verbose=False,
        **common(args),
        **options,
    )


def random_model(d_in: int, n_layers: int) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=n_layers,
            d_model=d_in,
            n_ctx=128,
            d_head=64,
            n_heads=d_in // 64,
            d_vocab=5000,
            act_fn="gelu",
            device="cpu",
        )
    )


def random_tokens() -> Any:
    from datasets import Dataset

    g = torch.Generator().manual_seed(0)
    # enough tokens for both, so that neither reads any twice
    tokens = torch.randint(0, 5000, (50_000, 129), generator=g)
    return Dataset.from_dict({"input_ids": tokens.numpy()})


# ----------------------------------------------------------------------------------------- shared


def child(args: argparse.Namespace, name: str, *options: str) -> dict[str, Any]:
    """Run one part in a separate process, which prints its result as JSON."""
    command = [sys.executable, __file__, "--child", name, "--d-in", str(args.d_in)]
    command += ["--device", args.device, "--threads", str(args.threads)]
    command += ["--n-batches", str(args.n_batches), "--n-layers", str(args.n_layers)]
    command += ["--training-tokens", str(args.training_tokens), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def clock(device: str) -> float:
    """Seconds: CPU time on a CPU, because others may use it too; wall time on a GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(function: Callable[[], Any], device: str) -> float:
    begun = clock(device)
    function()
    return clock(device) - begun


MEASUREMENTS = {
    "stream": measure_stream,
    "update": measure_update,
    "memory": measure_memory,
    "end-to-end": measure_end_to_end,
}
CHILDREN = {
    "memory-none": run_memory,
    "memory-built-in": run_memory,
    "memory-ours": run_memory,
    "end-to-end-ours": run_end_to_end,
    "end-to-end-built-in": run_end_to_end,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", default=PARTS, metavar="PART", help=", ".join(PARTS))
    add("--d-in", type=int, default=768, help="width (default: %(default)s)")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, default=1, help="of torch on the CPU (default: %(default)s)")
    add("--rounds", type=int, default=10, help="of the update (default: %(default)s)")
    add("--end-to-end-rounds", type=int, default=1, help="(default: %(default)s)")
    add("--n-batches", type=int, default=BUILT_IN_BATCHES, help="that the built-in takes")
    add("--n-layers", type=int, default=4, help="of the transformer of end-to-end")
    add("--training-tokens", type=int, default=2_000_000, help="of end-to-end")
    add("--json", type=Path, help="write every figure there")
    add("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return args


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    main()
