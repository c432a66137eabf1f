"""Combine statistics of several shards of a dataset: the result is that of one pass over all.

Takes files, or folders with one file per hook. What the provenance of all agrees on is kept. Shards
of another model, hook or context are an error, and so are the same statistics given twice: their
activations would count double.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the inputs and the output."""
    parser.add_argument("shards", nargs="+", type=Path, help="files, or folders of files")
    parser.add_argument("--out", required=True, type=Path, help="file or folder to write")


def run(args: argparse.Namespace) -> int:
    """Merge file by file; nothing is written unless everything could be read."""
    folders = [shard.is_dir() for shard in args.shards]
    if any(folders) and not all(folders):
        raise ValueError("give either files or folders, not both")
    if all(folders):
        names = [{p.name for p in shard.glob("*.safetensors")} for shard in args.shards]
        if different := set.union(*names) - set.intersection(*names):
            raise ValueError(f"not in every folder: {', '.join(sorted(different))}")
        groups = {args.out / n: [shard / n for shard in args.shards] for n in sorted(names[0])}
        if not groups:
            raise ValueError(f"{args.shards[0]} holds no statistics")
    else:
        if args.out.is_dir():
            raise ValueError(f"{args.out} is a folder: give the file to write, as shards are files")
        groups = {args.out: args.shards}
    from sae_whiten.estimation.merging import merge_files

    merged = {path: merge_files(shards) for path, shards in groups.items()}
    for path, statistics in merged.items():
        statistics.save(path)
        print(f"{path}: {statistics.n_samples} activations of width {statistics.d_in}")
    return 0
