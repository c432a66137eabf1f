"""Look at features: one HTML page of the latents of an SAE, or of two SAEs side by side.

Each latent has: the texts in which it is most active and some random ones, every token shaded by
its activation; a histogram of its activations and how often it fires; the tokens whose logits its
decoder direction raises and lowers, if the model predicts next tokens; its nearest neighbours. The
page is one file for any browser, and needs neither network nor server. Latents can be searched and
sorted, and each has a link: page.html#latent-123.

For two SAEs, the page has three lists: latents found by both (side by side), only by the first, and
only by the second. Two latents match if their decoder directions nearly agree, or if they fire at
nearly the same tokens. Directions are compared in whitened coordinates, because in raw ones a few
dimensions of large variance make all directions look alike. The statistics for this are those of
--statistics, else those in the folder of an SAE, else estimated from the tokens read.
"""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_whiten.cli._options import add_options, options_from
from sae_whiten.cli._saes import (
    add_dataset_arguments,
    add_model_arguments,
    add_saes_arguments,
    load_saes,
    model_and_dataset,
)
from sae_whiten.evaluation.features.options import FeatureOptions

if TYPE_CHECKING:
    from sae_lens import SAE

    from sae_whiten.evaluation.features.result import Features
    from sae_whiten.statistics import ActivationStatistics

EPILOG = """\
examples:
  sae-whiten features sae --dataset-split 'train[99%:]' --out page.html
  sae-whiten features sae --latents 12,345,6789 --out page.html
  sae-whiten features sae --text 'The cat sat on the mat.' --out page.html    which latents fire?
  sae-whiten features sae-plain sae-whitened --out both.html                  what do they share?
  sae-whiten features gpt2-small-res-jb/blocks.6.hook_resid_pre \\
    --dataset-path Skylion007/openwebtext --out page.html
"""

logger = logging.getLogger("sae_whiten")

# activations that differ in these cannot be whitened by the same statistics
_OF_ACTIVATIONS = ("model_name", "hook_name", "hook_head_index")
_OF_TOKENS = ("n_tokens", "context_size", "prepend_bos", "batch_size_prompts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the SAEs, the contents of the page, and the sources of model and tokens."""
    add_saes_arguments(parser)
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help="the page, such as page.html",
    )
    add_options(parser, FeatureOptions, without=_OF_TOKENS)
    parser.add_argument(
        "--statistics",
        metavar="STATISTICS",
        help="of the activations, from sae-whiten fit or train: file, folder, or repo on the hub "
        "(default: those in the folder of an SAE, else estimated from the tokens read)",
    )
    add_model_arguments(parser)

    group = parser.add_argument_group("tokens")
    add_dataset_arguments(group)
    add_options(group, FeatureOptions, only=_OF_TOKENS)


def run(args: argparse.Namespace) -> int:
    """Load, measure, write the page, and print a summary."""
    from sae_whiten._files import check_writable
    from sae_whiten.evaluation.features.measure import measure_features
    from sae_whiten.evaluation.features.page import write_page

    options = options_from(args, FeatureOptions)
    if args.out.is_dir():
        raise IsADirectoryError(f"--out {args.out}: a folder; name a file, such as page.html")
    check_writable(args.out.parent)
    if len(args.saes) > 2:
        raise ValueError(f"{len(args.saes)} SAEs: a page shows one or two")
    saes = load_saes(args.saes, args.device)
    if len(saes) < len(args.saes):
        raise ValueError(f"{args.saes[0]} is given twice")
    options.check_latents(saes[args.saes[0].rstrip("/")].cfg.d_sae)
    statistics = _statistics(args, saes)
    model, dataset, source = model_and_dataset(args, saes, args.context_size)
    features = measure_features(saes, model, dataset, options, statistics=statistics)
    dataset_name = f"{source['dataset_path']} ({args.dataset_split})"
    write_page(features, args.out, {"dataset": dataset_name})
    _print_summary(features)
    print(f"\nsaved: {args.out} ({args.out.stat().st_size / 1e6:.1f} MB); open it in a browser")
    return 0


def _statistics(
    args: argparse.Namespace, saes: "dict[str, SAE[Any]]"
) -> "dict[str, ActivationStatistics]":
    """Statistics by hook, from --statistics or else from the folder of an SAE.

    Raises:
        ValueError: Those of --statistics are of another model or hook.
    """
    from sae_whiten.estimation.folders import find_statistics
    from sae_whiten.statistics import ActivationStatistics

    by_hook = {}
    for path, sae in saes.items():
        hook_name = sae.cfg.metadata.hook_name
        if hook_name is None or hook_name in by_hook:
            continue
        if args.statistics is not None:
            by_hook[hook_name] = ActivationStatistics.load(
                find_statistics(args.statistics, hook_name)
            )
            _check_provenance(args.statistics, by_hook[hook_name], path, sae)
        elif Path(path).is_dir():
            try:
                file = find_statistics(path, hook_name)
            except FileNotFoundError:
                continue
            by_hook[hook_name] = ActivationStatistics.load(file)
    return by_hook


def _check_provenance(
    source: str, statistics: "ActivationStatistics", path: str, sae: "SAE[Any]"
) -> None:
    from sae_whiten.estimation.provenance import contradictions

    different = contradictions(statistics, sae.cfg)
    listed = ", ".join(
        f"{name}={recorded!r} ({path} has {expected!r})"
        for name, (recorded, expected) in different.items()
    )
    if not different.keys().isdisjoint(_OF_ACTIVATIONS):
        raise ValueError(
            f"--statistics {source}: they were estimated with {listed}. Give those of the same "
            "model and hook, or none: they are then estimated from the tokens read"
        )
    if different:
        logger.warning(
            "--statistics %s: estimated with %s; directions are whitened by these all the same",
            source,
            listed,
        )


def _print_summary(features: "Features") -> None:
    width = max(len(sae.name) for sae in features.saes)
    print(f"{'':{width}}  {'latents':>8}  {'that fire':>9}  {'L0':>7}  {'shown':>6}")
    for sae in features.saes:
        print(
            f"{sae.name:{width}}  {sae.d_sae:>8}  {sae.d_sae - sae.n_dead:>9}  {sae.l0:>7.1f}"
            f"  {len(sae.latents):>6}"
        )
    if features.matching is not None:
        counts = zip(
            features.matching.n_matched, features.matching.n_live, features.saes, strict=True
        )
        for same, live, sae in counts:
            print(
                f"{same} of the {live} latents of {sae.name} that fire "
                f"({same / max(live, 1):.0%}) are also found by the other SAE"
            )
    if features.why_no_logits is not None:
        print(f"No tokens that latents raise or lower: {features.why_no_logits}")
