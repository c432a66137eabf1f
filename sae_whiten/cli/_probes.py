"""The flags of sparse probing, shared by commands."""

import argparse
from typing import TYPE_CHECKING

from sae_whiten.cli._values import positive

if TYPE_CHECKING:
    from sae_whiten.evaluation.labels import LabelledTexts
    from sae_whiten.evaluation.sae_probes import ProbingTasks

__all__ = ["add_probe_arguments", "probed_texts"]


def add_probe_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add flags for the texts or tasks to probe with, and for their number."""
    add = parser.add_argument
    add(
        "--probes",
        default="libraries",
        metavar="WHAT",
        help="sae-probes: 113 tasks of the package of this name; sae-probes:20: a fixed sample of "
        "them; libraries: docstrings and code of installed libraries; none (default: %(default)s)",
    )
    add(
        "--no-probing",
        dest="probes",
        action="store_const",
        const="none",
        help="the same as --probes none",
    )
    add(
        "--probe-tokens",
        choices=("last", "mean"),
        default="last",
        help="with sae-probes: the latents of a text's last token, as in its protocol, or their "
        "mean over all tokens (default: %(default)s)",
    )
    add(
        "--n-texts",
        type=positive,
        metavar="N",
        help="texts per combination of labels to fit probes on, and the same number to score them "
        "(default: 100); with sae-probes, texts per task (default: all)",
    )
    add(
        "--labels-dataset",
        metavar="PATH",
        help="probe with a dataset of texts and labels instead, on the hub or a folder",
    )
    add(
        "--text-column",
        default="text",
        metavar="NAME",
        help="column of texts in --labels-dataset (default: %(default)s)",
    )
    add(
        "--label-column",
        nargs="+",
        default=["label"],
        metavar="NAME",
        help="columns of labels in --labels-dataset (default: label); SCR needs a second one, with "
        "two values",
    )


def probed_texts(args: argparse.Namespace, seed: int = 0) -> "LabelledTexts | ProbingTasks | None":
    """The texts or tasks that the flags select; None for `--probes none`.

    Raises:
        ModuleNotFoundError: --probes is sae-probes, and the package is not installed.
        ValueError: The name is unknown, or there are too few texts.
    """
    from sae_whiten.estimation.probing_texts import is_probing_texts
    from sae_whiten.evaluation.labels import dataset_texts, library_texts
    from sae_whiten.evaluation.sae_probes import ProbingTasks

    n_texts = args.n_texts or 100
    if args.probes == "none":
        return None
    if args.labels_dataset is not None:
        return dataset_texts(
            args.labels_dataset, args.label_column, args.text_column, n_texts, seed
        )
    if args.probes == "libraries":
        return library_texts(n_texts, seed)
    if not is_probing_texts(args.probes):
        raise ValueError(
            f"--probes {args.probes}: give sae-probes, sae-probes:N, libraries or none"
        )
    return ProbingTasks.of(args.probes, tokens=args.probe_tokens, n_texts=args.n_texts)
