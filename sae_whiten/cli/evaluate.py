"""Evaluate SAEs on the model they were trained on: any that SAELens loads, trained with us or not.

Explained variance, L0, dead and dense latents on tokens of a dataset; the loss of the model with
reconstructions in the place of activations, if its predictions mean something; sparse probing,
TPP and SCR on labelled texts. All SAEs see the same tokens and texts. The texts are by default code
and docstrings of libraries installed here, so that they need no download; but they change with the
versions of these libraries.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lens import SAE

    from sae_whiten.experiments.labels import LabelledTexts

EPILOG = """\
examples:
  sae-whiten evaluate sae-whitened sae-plain --dataset-split 'train[99%:]' --out report
  sae-whiten evaluate gpt2-small-res-jb/blocks.6.hook_resid_pre \\
    --dataset-path Skylion007/openwebtext --labels-dataset fancyzhx/ag_news --out report
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the SAEs, where the model, the tokens and the texts come from, and the output."""
    add = parser.add_argument
    add(
        "saes",
        nargs="+",
        metavar="SAE",
        help="folder of an SAE, or release/sae_id as in SAE.from_pretrained",
    )
    add("--out", required=True, type=Path, metavar="DIRECTORY", help="where to write")
    add("--device", default="cpu", help="of the model and the SAEs (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the choice of texts (default: %(default)s)")

    add = parser.add_argument_group("model (default: what the SAEs were trained on)").add_argument
    add("--model-name", help="model to load, as in SAELens")
    add("--model-class-name", help="as in SAELens: HookedTransformer or AutoModelForCausalLM")
    add(
        "--model-from-pretrained-kwargs",
        type=json.loads,
        metavar="JSON",
        help="further arguments for loading the model, as in SAELens",
    )

    add = parser.add_argument_group("tokens").add_argument
    add("--dataset-path", help="name on the hub or a folder (default: the SAEs' training data)")
    add(
        "--dataset-split",
        default="train",
        metavar="SPLIT",
        help="best one that the SAEs were not trained on: validation, or such as train[90%%:], for "
        "which the dataset is downloaded (default: %(default)s)",
    )
    add("--no-streaming", action="store_true", help="download the dataset first")
    add("--n-tokens", type=int, default=65_536, help="tokens to read (default: %(default)s)")
    add("--context-size", type=int, help="tokens per sequence (default: as in training)")
    add(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        help="put the beginning-of-sequence token in front (default: as in training)",
    )
    add("--batch-size-prompts", type=int, default=16, help="sequences per pass of the model")

    add = parser.add_argument_group("probing").add_argument
    add("--no-probing", action="store_true", help="leave it out")
    add(
        "--labels-dataset",
        metavar="PATH",
        help="dataset with texts and labels, on the hub or a folder",
    )
    add("--text-column", default="text", metavar="NAME", help="of it (default: %(default)s)")
    add(
        "--label-column",
        nargs="+",
        default=["label"],
        metavar="NAME",
        help="of it (default: label); a second one, with two values, is what SCR needs",
    )
    add(
        "--n-texts",
        type=int,
        default=100,
        metavar="N",
        help="texts with each (combination of) label(s), to fit probes and as many to score them "
        "(default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Load, evaluate, write results.jsonl and table.md, and print the table."""
    import logging

    from sae_lens.load_model import load_model

    from sae_whiten._files import atomic_path
    from sae_whiten.evaluation.report import write_report
    from sae_whiten.experiments.evaluate import evaluate_saes
    from sae_whiten.experiments.labels import open_dataset

    saes = {path.rstrip("/"): _load_sae(path, args.device) for path in args.saes}
    model_name = args.model_name or _shared(saes, "model_name", "--model-name")
    class_name = args.model_class_name or _shared(
        saes, "model_class_name", "--model-class-name", "HookedTransformer"
    )
    kwargs = args.model_from_pretrained_kwargs
    if kwargs is None:
        kwargs = _shared(saes, "model_from_pretrained_kwargs", "--model-from-pretrained-kwargs", {})
    trained_on = {sae.cfg.metadata.dataset_path for sae in saes.values()}
    dataset_path = args.dataset_path or _shared(saes, "dataset_path", "--dataset-path")
    if dataset_path in trained_on and args.dataset_split == "train":
        logging.getLogger("sae_whiten").warning(
            "%s is what SAEs were trained on: the figures may be of tokens that they have seen. "
            "--dataset-split or --dataset-path give others",
            dataset_path,
        )
    labels = None if args.no_probing else _labels(args)
    streaming = not args.no_streaming and "[" not in args.dataset_split
    dataset = open_dataset(dataset_path, args.dataset_split, streaming)
    model = load_model(
        class_name, model_name, device=args.device, model_from_pretrained_kwargs=kwargs
    )
    records = evaluate_saes(
        saes,
        model,
        dataset,
        labels,
        n_tokens=args.n_tokens,
        context_size=args.context_size,
        prepend_bos=args.prepend_bos,
        batch_size_prompts=args.batch_size_prompts,
        seed=args.seed,
    )
    for record in records:
        record.update(
            model_name=model_name, dataset_path=dataset_path, dataset_split=args.dataset_split
        )
    with atomic_path(args.out / "results.jsonl") as partial:
        partial.write_text("".join(json.dumps(r, default=str) + "\n" for r in records))
    settings = {
        "model_name": model_name,
        "dataset_path": dataset_path,
        "dataset_split": args.dataset_split,
        "labels": None if labels is None else dict(labels.source),
    }
    write_report(records, args.out, settings)
    print((args.out / "table.md").read_text())
    for why in dict.fromkeys(why for record in records for why in record["absent"].values()):
        print(f"Not measured: {why}")
    print(f"saved in {args.out}: report.html is the whole report in one file")
    return 0


def _load_sae(path: str, device: str) -> "SAE[Any]":
    """An SAE from a folder, or by release and id."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    if (Path(path) / "cfg.json").is_file():
        return SAE.load_from_disk(path, device=device)
    release, _, sae_id = path.partition("/")
    if release not in get_pretrained_saes_directory():
        # a repository on the hub, whose name has a slash of its own
        owner, _, rest = path.partition("/")
        repository, _, sae_id = rest.partition("/")
        release = f"{owner}/{repository}"
    if Path(path).exists() or not sae_id:
        raise ValueError(
            f"{path} is neither a folder with an SAE (there is no cfg.json) nor release/sae_id"
        )
    return SAE.from_pretrained(release, sae_id, device=device)


def _shared(saes: Mapping[str, "SAE[Any]"], field: str, flag: str, default: Any = None) -> Any:
    """What the metadata of all SAEs agree on."""
    found = {name: sae.cfg.metadata[field] for name, sae in saes.items()}
    values = [value for value in found.values() if value is not None]
    if any(value != values[0] for value in values):
        listed = ", ".join(f"{value!r} ({name})" for name, value in found.items())
        raise ValueError(f"the SAEs do not agree in {field}: {listed}; give {flag}")
    # "local": the usual name where a dataset is given as an object
    if values and not (field == "dataset_path" and values[0] in ("", "local")):
        return values[0]
    if default is None:
        raise ValueError(f"the SAEs' metadata do not tell {field}; give {flag}")
    return default


def _labels(args: argparse.Namespace) -> "LabelledTexts":
    from sae_whiten.experiments.labels import dataset_texts, library_texts

    if args.labels_dataset is None:
        return library_texts(args.n_texts, args.seed)
    return dataset_texts(
        args.labels_dataset, args.label_column, args.text_column, args.n_texts, args.seed
    )
