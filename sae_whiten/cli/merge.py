"""Combine statistics of several shards of a dataset. The result equals one pass over all of it.

Takes files, or folders with one file per hook. From folders, the hooks that all of them have are
merged. Provenance entries are kept if they are equal in all shards. Shards that differ in model,
hook or context are an error. So are duplicates of the same statistics, which would count twice, and
an --out that would overwrite a shard. Shards of one dataset and split, which sae-whiten fit reads
from its beginning, are warned about.
"""

import argparse
import logging
from pathlib import Path

logger = logging.getLogger("sae_whiten")

_SUFFIX = ".safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the inputs and the output."""
    parser.add_argument("shards", nargs="+", type=Path, help="files, or folders of files")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help=f"folder to write, or file, which gets the suffix {_SUFFIX} if it has none",
    )


def run(args: argparse.Namespace) -> int:
    """Merge file by file. Nothing is written unless everything could be read."""
    folders = [shard.is_dir() for shard in args.shards]
    if any(folders) and not all(folders):
        raise ValueError("give either files or folders, not both")
    groups = _by_hook(args.shards, args.out) if all(folders) else {_file(args.out): args.shards}
    _refuse_to_overwrite(groups)
    from sae_whiten.estimation.merging import from_one_beginning, merge_files

    merged = {path: merge_files(shards) for path, shards in groups.items()}
    # once, because folders hold the hooks of one estimation
    twice = from_one_beginning(next(iter(groups.values())))
    if twice is not None:
        logger.warning(
            "%s and %s are both of %s: unless these are different texts of the same name, "
            "activations at its beginning count twice",
            *twice,
        )
    for path, statistics in merged.items():
        statistics.save(path)
        print(f"{path}: {statistics.n_samples} activations of width {statistics.d_in}")
    return 0


def _by_hook(folders: list[Path], out: Path) -> dict[Path, list[Path]]:
    """The files to merge, by the file to write: one entry per hook that all folders have."""
    names = [{path.name for path in folder.glob(f"*{_SUFFIX}")} for folder in folders]
    common = set.intersection(*names)
    if not common:
        raise ValueError(f"there is no hook whose statistics are in all of {_listed(folders)}")
    for folder, in_folder in zip(folders, names, strict=True):
        if in_folder - common:
            left_out = _listed(in_folder - common)
            logger.warning("left out, not in every folder: %s in %s", left_out, folder)
    return {out / name: [folder / name for folder in folders] for name in sorted(common)}


def _file(out: Path) -> Path:
    if out.is_dir():
        raise ValueError(f"{out} is a folder: give a file to write, because the shards are files")
    return out if out.name.endswith(_SUFFIX) else out.with_name(out.name + _SUFFIX)


def _refuse_to_overwrite(groups: dict[Path, list[Path]]) -> None:
    """Refuse to write over a shard: repeated, the command would count the others twice."""
    shards = {shard.resolve() for group in groups.values() for shard in group}
    for target in groups:
        if target.resolve() in shards:
            raise ValueError(f"--out would overwrite the shard {target}: write elsewhere")


def _listed(names: "set[str] | list[Path]") -> str:
    return ", ".join(sorted(map(str, names)))
