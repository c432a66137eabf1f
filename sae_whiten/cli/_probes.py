"""The flags of sparse probing, shared by commands."""

import argparse
from typing import TYPE_CHECKING

from sae_whiten.cli._spelling import flag_of
from sae_whiten.cli._values import positive

if TYPE_CHECKING:
    from sae_whiten.evaluation.labels import LabelledTexts
    from sae_whiten.evaluation.sae_probes import ProbingTasks

__all__ = ["add_probe_arguments", "probed_texts"]

_OTHERS = ("labels_dataset", "text_column", "label_column", "probe_tokens", "n_texts")
"""Flags that need that something is probed."""


def add_probe_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add flags for the texts or tasks to probe with, and for their number."""
    add = parser.add_argument
    # without defaults, so that flags that would have no effect are refused
    add(
        "--probes",
        metavar="WHAT",
        help="sae-probes: 113 tasks of the package of this name; sae-probes:20: a fixed sample of "
        "them; libraries: docstrings and code of installed libraries; none (default: libraries)",
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
        help="with sae-probes: the latents of a text's last token, as in its protocol, or their "
        "mean over all tokens (default: last)",
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
        help="instead of --probes, a dataset of texts and labels, on the hub or a folder",
    )
    add(
        "--text-column",
        metavar="NAME",
        help="column of texts in --labels-dataset (default: text)",
    )
    add(
        "--label-column",
        nargs="+",
        metavar="NAME",
        help="columns of labels in --labels-dataset (default: label); SCR needs a second one, with "
        "two values",
    )


def probed_texts(args: argparse.Namespace, seed: int = 0) -> "LabelledTexts | ProbingTasks | None":
    """The texts or tasks that the flags select; None for `--probes none`.

    Raises:
        ModuleNotFoundError: --probes is sae-probes, and the package is not installed.
        ValueError: The name is unknown, flags contradict each other, or there are too few texts.
    """
    _refuse_without_effect(args)
    from sae_whiten.estimation.probing_texts import is_probing_texts
    from sae_whiten.evaluation.labels import dataset_texts, library_texts
    from sae_whiten.evaluation.sae_probes import ProbingTasks

    n_texts = args.n_texts or 100
    if args.probes == "none":
        return None
    if args.labels_dataset is not None:
        return dataset_texts(
            args.labels_dataset,
            args.label_column or ["label"],
            args.text_column or "text",
            n_texts,
            seed,
        )
    if args.probes in (None, "libraries"):
        return library_texts(n_texts, seed)
    if not is_probing_texts(args.probes):
        raise ValueError(
            f"--probes {args.probes}: give sae-probes, sae-probes:N, libraries or none"
        )
    return ProbingTasks.of(args.probes, tokens=args.probe_tokens or "last", n_texts=args.n_texts)


def _refuse_without_effect(args: argparse.Namespace) -> None:
    """Refuse flags that others leave without effect."""
    from sae_whiten.estimation.probing_texts import is_probing_texts

    given = [name for name in _OTHERS if getattr(args, name) is not None]
    if args.probes == "none" and given:
        raise ValueError(f"without probing, {flag_of(given[0])} has no effect: leave it out")
    if args.probes is not None and args.labels_dataset is not None:
        raise ValueError("--labels-dataset replaces --probes: give one of them")
    for name in given:
        if name in ("text_column", "label_column") and args.labels_dataset is None:
            raise ValueError(f"{flag_of(name)} needs --labels-dataset")
        if name == "probe_tokens" and not is_probing_texts(args.probes or ""):
            raise ValueError(f"{flag_of(name)} needs --probes sae-probes")
