"""Upload a finished SAE, or statistics, to the Hugging Face hub, with a model or dataset card.

An SAE is uploaded by SAELens' own uploader: weights, config and sparsity. The whitening is folded
into the weights and needs no file. Anyone can load the SAE with SAE.from_pretrained. Access tokens
in a config are left out.
"""

import argparse
from pathlib import Path

EPILOG = """\
examples:
  sae-whiten push sae-gpt2-6 user/sae-gpt2 --dry-run upload    to check it before the upload
  sae-whiten push sae-gpt2-6 user/sae-gpt2
  sae-whiten push saes user/saes --private                     a folder with several SAEs
  sae-whiten push gpt2-stats user/gpt2-stats                   what fit wrote

Log in with `hf auth login`, or set HF_TOKEN.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to upload, and its destination."""
    parser.add_argument("path", help="folder of an SAE, of several, or of statistics")
    parser.add_argument("repo", metavar="USER/NAME", help="repo on the hub, created if needed")
    parser.add_argument(
        "--sae-id",
        metavar="NAME",
        help="name of the SAE in the repo (default: that of its hook)",
    )
    parser.add_argument("--private", action="store_true", help="make a new repo private")
    parser.add_argument(
        "--dry-run", metavar="FOLDER", help="write what would be uploaded to a new folder instead"
    )


def run(args: argparse.Namespace) -> int:
    """Upload, or write what would be uploaded. Print how to load it."""
    path = Path(args.path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    if args.dry_run is not None and Path(args.dry_run).resolve().is_relative_to(path.resolve()):
        raise ValueError(
            f"--dry-run {args.dry_run}: it is inside {path}, so the next push would upload it too; "
            "choose a folder elsewhere"
        )
    holds_saes = any(path.glob("cfg.json")) or any(path.glob("*/cfg.json"))
    # a folder with statistics in it is one of statistics, even if there are SAEs deep below
    holds_saes |= not any(path.glob("*.safetensors")) and any(path.glob("**/cfg.json"))
    return _push_saes(args) if holds_saes else _push_statistics(args)


def _push_saes(args: argparse.Namespace) -> int:
    from sae_whiten.evaluation.sharing import find_saes, push_saes, write_upload

    saes = find_saes(args.path, args.sae_id)
    if args.dry_run is not None:
        write_upload(saes, args.dry_run, args.repo)
        print(f"not uploaded; what would be: {args.dry_run}")
        return 0
    print(f"uploaded: {push_saes(saes, args.repo, args.private or None)}")
    for sae_id in saes:
        print(f'load it:  SAE.from_pretrained("{args.repo}", "{sae_id}")')
    return 0


def _push_statistics(args: argparse.Namespace) -> int:
    from sae_whiten.estimation.folders import push_folder, write_upload

    if args.sae_id is not None:
        raise ValueError(f"--sae-id: {args.path} holds no SAE")
    if args.dry_run is not None:
        write_upload(args.path, args.dry_run, args.repo)
        print(f"not uploaded; what would be: {args.dry_run}")
        return 0
    print(f"uploaded: {push_folder(args.path, args.repo, args.private or None)}")
    return 0
