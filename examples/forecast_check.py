"""Does the forecast of `sae-whiten inspect` hold at hooks from which it was not derived?

    pip install "sae-whiten[demo,probes]"
    python examples/forecast_check.py --out hooks --docs docs/dose

The forecast was derived from one hook of all-MiniLM-L6-v2, made more and more anisotropic
(`dose_response.py`). Here SAEs are trained on other hooks of this model, with unchanged
activations: residual stream, attention and MLP outputs. For each hook, the forecast is made first.
Then SAEs are trained with every setting that the forecast can recommend, and measured as in
`dose_response.py`. `--out` takes about 1 GB for each hook during its runs. The command can be
killed at any time: the same command continues after the last SAE.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dose_response import BASELINE, Dose, Mapped, aucs, measure, prepare, statistics_of, train

from sae_whiten.estimation.forecast import SETTINGS
from sae_whiten.estimation.inspection import describe_statistics

HOOKS = (
    "encoder.layer.5",
    "encoder.layer.3.attention.output.dense",
    "encoder.layer.4.output.dense",
)
TOKENS, LEARNING_RATE, SEED = 500_000, 3e-3, 0  # the best rate at every dose


def check(out: Path, hooks: list[str]) -> None:
    """Forecast, train and measure whatever is not in hooks.jsonl yet."""
    results = out / "hooks.jsonl"
    lines = results.read_text().splitlines() if results.is_file() else []
    done = {(r["hook"], r["condition"]) for r in map(json.loads, lines)}
    for hook in hooks:
        conditions = [c for c in SETTINGS if (hook, c) not in done]
        if not conditions:
            continue
        folder = out / hook
        if not (folder / "train.npy").is_file():
            prepare(folder, hook, TOKENS)
        held_out = torch.from_numpy(np.load(folder / "held-out.npy")).float()
        natural = Mapped(Dose(0, None), held_out)
        figures = describe_statistics(statistics_of(natural, held_out))
        x = natural.all(np.load(folder / "train.npy", mmap_mode="r"))
        tasks = json.loads((folder / "tasks.json").read_text())
        for condition in conditions:
            torch.manual_seed(SEED)
            sae = train(x, condition, TOKENS, LEARNING_RATE, SEED)
            record = {
                "hook": hook,
                "condition": condition,
                "n_tokens": TOKENS,
                "mean_over_std": figures["mean_over_std"],
                "participation_share": figures["participation_ratio"] / held_out.shape[1],
                "forecast": figures["forecast"],
                **measure(sae, natural, folder, tasks),
            }
            with results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(hook, condition, record["explained_variance"], record["dead_latents"], flush=True)
        shutil.rmtree(folder)


def report(out: Path, docs: Path) -> None:
    """Write hooks.md: for each hook the forecast and what happened."""
    import pandas as pd
    from dose_response import D_SAE, write_table

    found: dict[str, dict[str, Any]] = {}
    for line in (out / "hooks.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["hook"], {})[record["condition"]] = record
    rows = []
    for hook, records in found.items():
        if BASELINE not in records:
            continue
        of_settings = [records.get(c) for c in SETTINGS]
        base = records[BASELINE]
        row: dict[str, Any] = {
            "hook": hook,
            "mean/std": base["mean_over_std"],
            "participation ratio / width": base["participation_share"],
            "nearest dose": base["forecast"]["dose"],
            "distance": base["forecast"]["distance"],
            "forecast": base["forecast"]["advice"],
        }
        for key, name in (("dead_latents", f"dead of {D_SAE}"), ("explained_variance", "EV")):
            row[name] = " / ".join("–" if r is None else f"{r[key]:.3g}" for r in of_settings)
        row["AUC"] = " / ".join("–" if r is None else f"{aucs(r).mean():.3f}" for r in of_settings)
        rows.append(row)
    docs.mkdir(parents=True, exist_ok=True)
    write_table(docs / "hooks.md", pd.DataFrame(rows))
    shutil.copy(out / "hooks.jsonl", docs / "hooks.jsonl")
    print((docs / "hooks.md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="where the table goes (default: OUT)")
    parser.add_argument("--hooks", nargs="+", default=list(HOOKS), help="submodules of the model")
    args = parser.parse_args()
    check(args.out, args.hooks)
    report(args.out, args.docs or args.out)


if __name__ == "__main__":
    main()
