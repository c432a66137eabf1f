"""Combine statistics of several shards of a dataset: the result is that of one pass over all.

Takes files, or folders with one file per hook. What the provenance of all agrees on is kept. Shards
of another model, hook or context are an error, and so are the same statistics given twice: their
activations would count double.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_whiten.statistics import ActivationStatistics

# shards may differ in the texts that they are of, and in nothing that decides the activations
_MUST_AGREE = (
    "hook_name",
    "hook_head_index",
    "model_name",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "model_commit",
    "dtype",
    "autocast_lm",
    "context_size",
    "prepend_bos",
    "seqpos_slice",
    "exclude_special_tokens",
    "sequence_separator_token",
    "disable_concat_sequences",
    "use_chat_formatting",
)


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
    merged = {path: _merge(shards) for path, shards in groups.items()}
    for path, statistics in merged.items():
        statistics.save(path)
        print(f"{path}: {statistics.n_samples} activations of width {statistics.d_in}")
    return 0


def _merge(shards: Sequence[Path]) -> "ActivationStatistics":
    from sae_whiten.statistics import ActivationStatistics

    whole: ActivationStatistics | None = None
    paths: dict[str, Path] = {}
    known: dict[str, tuple[Path, Any]] = {}
    for shard in shards:
        found = ActivationStatistics.load(shard)
        # by content, whatever the name; empty shards are alike and do no harm
        twin = paths.setdefault(found.digest, shard) if found.n_samples else shard
        if twin is not shard:
            raise ValueError(
                f"{twin} and {shard} hold the same statistics, whose activations would count "
                "twice: leave one out"
            )
        for name in _MUST_AGREE:
            if name not in found.provenance:
                continue
            value = found.provenance[name]
            first, wanted = known.setdefault(name, (shard, value))
            if value != wanted:
                raise ValueError(
                    f"{first} and {shard} do not belong together: {name} is {wanted!r} in one and "
                    f"{value!r} in the other"
                )
        whole = found if whole is None else whole.merge(found)
    assert whole is not None
    return whole
