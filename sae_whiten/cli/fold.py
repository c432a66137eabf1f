"""Turn a checkpoint that SAELens wrote under its own whitening into a correct, plain SAE.

With normalize_activations="covariance_whitening", SAELens saves checkpoints during training with
weights in whitened coordinates and the whitening beside them. Loaded as they are, they are wrong.
This command folds the whitening into the weights, checks the fold, and writes a stock SAELens SAE.

A final checkpoint is folded already and is copied as it is. A final checkpoint of a run that was
resumed from a final checkpoint is folded twice. Its second fold is undone; --whitening has to name
the whitening of the second run. The command recognises the state from the weights. If the state is
unclear, it refuses the checkpoint; then give --state. Activations make the result more certain:
cached ones, or those of a model on a dataset.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sae_whiten.cli._saes import (
    add_dataset_arguments,
    add_model_arguments,
    model_and_dataset,
)
from sae_whiten.cli._spelling import flag_of
from sae_whiten.cli._values import positive

if TYPE_CHECKING:
    from torch import Tensor

EPILOG = """\
examples:
  sae-whiten fold checkpoints/x7k2p9qa/500000 --out sae
  sae-whiten fold checkpoints/x7k2p9qa/500000 --out sae \\
    --dataset-path monology/pile-uncopyrighted
  sae-whiten fold checkpoints/r5c1m8zd/final_2000000 --out sae \\
    --whitening checkpoints/r5c1m8zd/1500000
"""

_STATES = ("whitened", "folded", "folded-twice")

_N_ACTIVATIONS = 4096

_OF_DATASET = {
    "dataset_split": "train",
    "no_streaming": False,
    "model_name": None,
    "model_class_name": None,
    "model_from_pretrained_kwargs": None,
}
"""Flags that have an effect only with --dataset-path, and their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, the output, and flags that help to recognise the state of the weights."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of one SAE")
    add("--out", required=True, type=Path, metavar="DIRECTORY", help="where to write")
    add(
        "--whitening",
        type=Path,
        metavar="PATH",
        help="activation_whitening.safetensors, or the folder that it is in (default: CHECKPOINT)",
    )
    add(
        "--state",
        choices=_STATES,
        help="state of the weights (default: recognise it, and refuse if it is unclear)",
    )
    add("--device", default="cpu", help="where to compute (default: %(default)s)")
    group = parser.add_argument_group("activations (default: none)")
    group.add_argument(
        "--cached-activations",
        type=Path,
        metavar="DIRECTORY",
        help="written by SAELens' CacheActivationsRunner, of the SAE's hook",
    )
    group.add_argument(
        "--n-activations",
        type=positive,
        metavar="N",
        help=f"activations to use at most (default: {_N_ACTIVATIONS})",
    )
    add_dataset_arguments(group, default="none")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Fold, save, and print the state that the checkpoint was in."""
    from sae_whiten.training.builtin_checkpoints import fold_builtin_checkpoint

    done = fold_builtin_checkpoint(
        args.checkpoint,
        args.out,
        whitening=args.whitening,
        state=args.state,
        activations=_activations(args),
        device=args.device,
    )
    print(
        f"{args.checkpoint}: "
        + {
            "whitened": "was in whitened coordinates; the whitening is now folded in",
            "folded": "already folded, a plain SAE; copied",
            "folded-twice": "was folded twice; the second fold is undone",
        }[done.state]
        + (" (the state was given)" if done.given else "")
    )
    if done.diagnosis is not None:
        print(f"{'weights taken as':18}{'alignment':>12}{'explained variance':>22}")
        for state, alignment in done.diagnosis.alignment.items():
            explained = done.diagnosis.explained_variance.get(state)
            print(
                f"{state:18}{alignment:12.3f}"
                f"{'-' if explained is None else format(explained, '.4g'):>22}"
            )
        print(f"(of {done.diagnosis.source} activations)")
    check = done.sae.cfg.metadata.whitening["fold"]["check"]
    if check is not None:
        print(f"fold error: {check['fold_error']:.2g} (tolerance {check['tolerance']:.2g})")
    print(f"\nsaved in {args.out}; load it: SAE.load_from_disk({str(args.out)!r})")
    return 0


def _activations(args: argparse.Namespace) -> "Tensor | None":
    """Raw activations from the cache, or from the model on the dataset. None without either.

    Raises:
        ValueError: Both are given, or flags of one that is not.
    """
    if args.dataset_path is None:
        for name, default in _OF_DATASET.items():
            if getattr(args, name) != default:
                raise ValueError(f"{flag_of(name)} needs --dataset-path")
    if args.cached_activations is None and args.dataset_path is None:
        if args.n_activations is not None:
            raise ValueError("--n-activations needs --cached-activations or --dataset-path")
        return None
    if args.cached_activations is not None and args.dataset_path is not None:
        raise ValueError("--cached-activations replaces --dataset-path: give one of them")
    from sae_whiten.training.builtin_checkpoints import (
        cached_activations,
        load_builtin_checkpoint,
        model_activations,
    )

    n = args.n_activations or _N_ACTIVATIONS
    sae = load_builtin_checkpoint(args.checkpoint)
    if args.cached_activations is not None:
        return cached_activations(sae, args.cached_activations, n)
    saes = {str(args.checkpoint): sae}
    model, dataset, _ = model_and_dataset(args, saes, sae.cfg.metadata.context_size)
    return model_activations(sae, model, dataset, n)
