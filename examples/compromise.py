"""Can one setting find the features that whitening finds without losing explained variance?

    python examples/compromise.py run --out compromise
    python examples/compromise.py report --out compromise

TopK SAEs are trained on synthetic activations with known features, at three condition numbers, with
several compromises between the loss in whitened space and the loss in the original space:

    strength a, own space    whitening of strength a, loss in the partially whitened space
    strength a, original     whitening of strength a, loss in the space of the activations
    mixed m                  full whitening; m of its loss in whitened space, the rest in the
                             original space
    power b                  full whitening; errors weighted by eigenvalue^b (0: whitened space,
                             1: original space)
    whitened, then original  the loss changes after 70% of the steps
    original, then whitened
    ..., original norms      latents are ranked by decoder norms in the space of the activations

All have the same number of active latents (k), and each its better learning rate of two, by its own
loss. `run` can be killed at any time: the same command continues after the last SAE.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.util import temporary_seed
from torch import Tensor
from tqdm.auto import tqdm

from sae_whiten import Whitening, WhiteningConfig, WhiteningTrainer
from sae_whiten.evaluation.metrics import dead_latents, explained_variance, firing_rates
from sae_whiten.lenses.synthetic.data import SyntheticActivations
from sae_whiten.lenses.synthetic.ground_truth import ground_truth_scores
from sae_whiten.lenses.synthetic.options import SyntheticDataConfig

DOSES = (1e2, 1e4, 1e6)
LEARNING_RATES = (1e-3, 3e-3)
SEEDS = (0, 1, 2)
D_SAE, K, BATCH, STEPS = 256, 6, 512, 3000
N_HELD_OUT = 20_000
CHANGE_AT = 0.7  # share of the steps


@dataclass(frozen=True)
class Compromise:
    """How one SAE is trained.

    Attributes:
        strength: Of the whitening. 0 centres.
        first: Weights of squared errors in whitened coordinates as a function of the eigenvalues,
            up to a factor.
        then: The same for the rest of training, from CHANGE_AT on. None: no change.
        sparsity_norms: As in `WhiteningConfig`.
    """

    strength: float
    first: Callable[[Tensor], Tensor]
    then: Callable[[Tensor], Tensor] | None = None
    sparsity_norms: Any = "whitened"


def power(exponent: float) -> Callable[[Tensor], Tensor]:
    """Weights of 1 on average over the variance of the whitened activations."""
    return lambda values: values**exponent


def mixed(share: float) -> Callable[[Tensor], Tensor]:
    """`share` of the loss in fully whitened space, the rest in the space of the activations."""
    return lambda values: share + (1 - share) * values / values.mean()


WHITENED = Compromise(1.0, power(0))
ORIGINAL = Compromise(1.0, power(1))
HALF = Compromise(0.5, power(0))
COMPROMISES: dict[str, Compromise] = {
    "centred": Compromise(0.0, power(0)),
    "strength 0.5, own space": HALF,
    "strength 0.75, own space": Compromise(0.75, power(0)),
    "whitened": WHITENED,
    "original": ORIGINAL,
    "strength 0.5, original": Compromise(0.5, power(0.5)),
    "mixed 0.03": Compromise(1.0, mixed(0.03)),
    "mixed 0.1": Compromise(1.0, mixed(0.1)),
    "power 0.5": Compromise(1.0, power(0.5)),
    "whitened, then original": replace(WHITENED, then=power(1)),
    "original, then whitened": replace(ORIGINAL, then=power(0)),
    "whitened, original norms": replace(WHITENED, sparsity_norms="original"),
    "strength 0.5, own space, original norms": replace(HALF, sparsity_norms="original"),
    "original, original norms": replace(ORIGINAL, sparsity_norms="original"),
}


class CompromiseTrainer(WhiteningTrainer[Any, Any]):
    """A trainer that weights squared errors as a `Compromise` has it."""

    compromise: Compromise
    losses: list[Tensor]

    def step(self, batch: Tensor) -> TrainStepOutput:
        if self.whitening is None:
            self.estimate_whitening()
        changes_at = int(CHANGE_AT * self.cfg.total_training_steps)
        if self.n_training_steps in (0, changes_at):
            self._set_weights(changed=self.n_training_steps > 0)
        output = super().step(batch)
        self.losses.append(output.losses["mse_loss"].detach())
        return output

    def _set_weights(self, *, changed: bool) -> None:
        compromise = self.compromise
        weigh = compromise.then if changed and compromise.then else compromise.first
        assert self.whitening is not None
        values = self.whitening.eigenvalues
        weights = weigh(values)
        # predicting the mean costs d_in, as in every loss of this package
        variances = values ** (1 - compromise.strength)
        weights = weights * len(values) / (weights * variances).sum()
        self.sae.mse_loss_fn.weights = weights.float()
        self.sae.mse_loss_fn.residual_map = None


def train(name: str, data: SyntheticActivations, lr: float) -> tuple[Any, float]:
    """A folded SAE and the mean of its loss over the last 200 steps."""
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=data.d_in, d_sae=D_SAE, k=K, normalize_activations="covariance_whitening"
        )
    )
    cfg = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr=lr,
        lr_end=lr / 10,
        lr_decay_steps=STEPS // 5,
        device="cpu",
        dead_feature_window=STEPS // 5,
    )
    compromise = COMPROMISES[name]
    config = WhiteningConfig(
        strength=compromise.strength,
        loss_space="whitened",
        sparsity_norms=compromise.sparsity_norms,
    )
    trainer = CompromiseTrainer(cfg, sae, data.batches(BATCH), config)
    trainer.compromise, trainer.losses = compromise, []
    trainer.scaler.whitening = Whitening.from_statistics(data.statistics, config)
    sae = trainer.fit()
    return sae, float(torch.stack(trainer.losses[-200:]).mean())


@torch.no_grad()
def measure(sae: Any, data: SyntheticActivations) -> dict[str, float]:
    """Scores of a folded SAE on held-out activations."""
    x, features = data.held_out(N_HELD_OUT)
    latents = sae.encode(x)
    rates = firing_rates(latents)
    truth = ground_truth_scores(sae.W_dec, data.features, latents, features, data.whitening_matrix)
    return {
        **asdict(truth),
        "explained_variance": explained_variance(x, sae.decode(latents)),
        "dead_latents": dead_latents(rates),
        "l0": float(rates.sum()),
    }


def run(out: Path, names: list[str]) -> None:
    """Train and measure whatever is not in results.jsonl yet."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    done = read(results)
    plan = [(dose, seed, name) for seed in SEEDS for dose in DOSES for name in names]
    data: SyntheticActivations | None = None
    bar = tqdm(plan, desc="SAEs")
    for dose, seed, name in bar:
        rates = LEARNING_RATES if seed == SEEDS[0] else (best_lr(done, dose, name),)
        for lr in rates:
            key = f"{dose:g}/{name}/{seed}/{lr:g}"
            if key in done:
                continue
            config = SyntheticDataConfig(condition=dose, seed=seed)
            if data is None or data.config != config:
                data = SyntheticActivations(config)
            with temporary_seed(seed):
                sae, loss = train(name, data, lr)
            record = {
                "key": key,
                "dose": dose,
                "compromise": name,
                "seed": seed,
                "lr": lr,
                "loss": loss,
                **measure(sae, data),
            }
            done[key] = record
            with results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            bar.set_postfix_str(f"{key}: F1 {record['f1']:.2f}")


def read(results: Path) -> dict[str, dict[str, Any]]:
    """Records by their key."""
    if not results.is_file():
        return {}
    records = [json.loads(line) for line in results.read_text().splitlines()]
    return {record["key"]: record for record in records}


def best_lr(done: dict[str, dict[str, Any]], dose: float, name: str) -> float:
    """The rate with the least training loss at the end, of the first seed."""
    loss = {lr: done[f"{dose:g}/{name}/{SEEDS[0]}/{lr:g}"]["loss"] for lr in LEARNING_RATES}
    return min(loss, key=lambda lr: loss[lr])


def report(out: Path, docs: Path) -> None:
    """Write table.md, learning-rates.md and compromise.png, of all runs so far."""
    import pandas as pd

    done = read(out / "results.jsonl")
    rows = []
    for dose in DOSES:
        for name in COMPROMISES:
            keys = [f"{dose:g}/{name}/{SEEDS[0]}/{lr:g}" for lr in LEARNING_RATES]
            if any(key not in done for key in keys):
                continue
            lr = best_lr(done, dose, name)
            rows += [r for s in SEEDS if (r := done.get(f"{dose:g}/{name}/{s}/{lr:g}"))]
    frame: Any = pd.DataFrame(rows)
    docs.mkdir(parents=True, exist_ok=True)
    write_table(frame, docs / "table.md")
    write_rates(pd.DataFrame(done.values()), docs / "learning-rates.md")
    draw(frame, docs / "compromise.png")
    shutil.copy(out / "results.jsonl", docs / "results.jsonl")
    print((docs / "table.md").read_text())


def write_table(frame: Any, path: Path) -> None:
    """For each dose and compromise: means over seeds, and the difference from `original`."""
    lines = [
        "| condition number | compromise | seeds | lr | F1 | over `original` | explained variance "
        "| over `original` | MCC | dead |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for dose, own in frame.groupby("dose", sort=False):
        by_seed = own.set_index(["compromise", "seed"])
        for name in own["compromise"].unique():
            values, base = by_seed.loc[name], by_seed.loc["original"]
            compared = ["f1", "explained_variance"]
            difference = (values[compared] - base[compared]).dropna()
            lines.append(
                f"| {dose:g} | {name} | {len(values)} | {values['lr'].iloc[0]:g} "
                + "".join(
                    f"| {values[key].mean():.3f} | {_spread(difference[key])} "
                    for key in ("f1", "explained_variance")
                )
                + f"| {values['mcc'].mean():.3f} | {values['dead_latents'].mean():.0f} |"
            )
    path.write_text("\n".join(lines) + "\n")


def _spread(values: Any) -> str:
    least, most = f"{values.min():+.3f}", f"{values.max():+.3f}"
    return least if least == most else f"{least} to {most}"


def write_rates(frame: Any, path: Path) -> None:
    """F1 and explained variance of the first seed at every learning rate."""
    first = frame[frame["seed"] == SEEDS[0]]
    table = first.pivot_table(
        index=["dose", "compromise"],
        columns="lr",
        values=["loss", "f1", "explained_variance"],
        sort=False,
    )
    columns = [f"{value.replace('_', ' ')} at {lr:g}" for value, lr in table.columns]
    lines = [f"| condition number | compromise | {' | '.join(columns)} |"]
    lines.append("|---|---|" + "---|" * len(columns))
    for (dose, name), values in table.iterrows():
        lines.append(f"| {dose:g} | {name} | {' | '.join(f'{v:.3f}' for v in values)} |")
    path.write_text("\n".join(lines) + "\n")


def draw(frame: Any, path: Path) -> None:
    """Features found against explained variance, a panel for each dose."""
    from matplotlib import pyplot as plt

    doses = list(frame["dose"].unique())
    figure, axes = plt.subplots(
        1, len(doses), figsize=(5.2 * len(doses), 4.6), layout="constrained", squeeze=False
    )
    names = [name for name in COMPROMISES if name in set(frame["compromise"])]
    colours = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))  # pyright: ignore[reportAttributeAccessIssue]
    for axis, dose in zip(axes[0], doses, strict=True):
        means = (
            frame[frame["dose"] == dose].groupby("compromise")[["explained_variance", "f1"]].mean()
        )
        strengths = ["centred", "strength 0.5, own space", "strength 0.75, own space", "whitened"]
        line = means.loc[[name for name in strengths if name in means.index]]
        axis.plot(line["explained_variance"], line["f1"], color="0.75", zorder=0)
        for name in names:
            if name in means.index:
                axis.scatter(*means.loc[name], color=colours[name], label=name, s=45)
        axis.set_title(f"condition number {dose:g}")
        axis.set_xlabel("explained variance")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("F1 of the features")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("run", "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--docs", type=Path, help="report: where tables and figure go (default: OUT/report)"
    )
    args = parser.parse_args()
    if args.step == "run":
        run(args.out, list(COMPROMISES))
    else:
        report(args.out, args.docs or args.out / "report")


if __name__ == "__main__":
    main()
