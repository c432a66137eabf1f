"""Draw the latents of SAEs in the plane (t-SNE), and how often each of them fires.

Each SAE has a panel, each latent a disc, coloured by the logarithm of its firing frequency. Hollow
grey crosses are dead latents, which fired at no token. --of decoder places latents by the direction
of their decoder rows: what they write. SAEs of the same hook are embedded together, so their panels
can be compared; other hooks are embedded separately. --of activations places latents by their
activations on the same tokens: when they fire. It compares SAEs of any hooks, and leaves out dead
latents. These are counted, and listed in the coordinates.

Latents close to each other have a high cosine similarity. Distances between clusters, and their
sizes, mean nothing in t-SNE. If a few directions hold most of the variance of the activations, they
can dominate the cosines of decoder rows; --of activations is not affected.

Firing frequencies are counted on a run of the model.

The coordinates are saved beside the figure, with the suffix .json. To draw them again in Python,
use sae_whiten.lenses.latents.embedding.LatentSpace.load and
sae_whiten.lenses.latents.figure.plot_latent_space.
"""

import argparse
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
from sae_whiten.lenses.options import LatentOptions

if TYPE_CHECKING:
    from sae_lens import SAE

    from sae_whiten.lenses.latents.embedding import LatentSpace
    from sae_whiten.lenses.latents.measure import FiringRates

EPILOG = """\
examples:
  sae-whiten latents sae-topk sae-topk-vsae --out latents.pdf
  sae-whiten latents sae-topk sae-topk-vsae --dataset-split 'train[99%:]' --out latents.pdf
  sae-whiten latents gpt2-small-res-jb/blocks.6.hook_resid_pre --of activations \\
    --dataset-path Skylion007/openwebtext --out latents.png
"""

_FORMATS = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the SAEs, the figure, and the sources of model and tokens."""
    add_saes_arguments(parser)
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="FILE", help="figure: .png, .pdf or .svg")
    add_options(parser, LatentOptions, only=("of", "max_latents", "perplexity", "seed"))

    add_model_arguments(parser)

    group = parser.add_argument_group("tokens")
    add_dataset_arguments(group)
    add_options(
        group,
        LatentOptions,
        only=("n_tokens", "context_size", "prepend_bos", "batch_size_prompts"),
    )


def run(args: argparse.Namespace) -> int:
    """Load, measure, embed, draw, write the coordinates, and print counts."""
    if args.out.suffix not in _FORMATS:
        raise ValueError(f"--out {args.out}: a figure is one of {', '.join(_FORMATS)}")
    options = options_from(args, LatentOptions)
    coordinates = args.out.with_suffix(".json")
    _check_overwritable(coordinates)
    saes = load_saes(args.saes, args.device)

    from sae_whiten.lenses.latents.figure import plot_latent_space
    from sae_whiten.lenses.latents.measure import latent_space

    firing, source = _firing(args, saes, options)
    space = latent_space(saes, firing, options, source)
    space.save(coordinates)
    plot_latent_space(space, args.out)
    _print_counts(space)
    print(f"\ndrawn: {args.out}; coordinates: {coordinates}")
    return 0


def _check_overwritable(coordinates: Path) -> None:
    from sae_whiten._files import CorruptFileError
    from sae_whiten.lenses.latents.embedding import LatentSpace

    if coordinates.exists():
        try:
            LatentSpace.load(coordinates)
        except CorruptFileError as error:
            raise ValueError(
                f"the coordinates would overwrite {coordinates}, which this command did not write; "
                "give --out another name"
            ) from error


def _firing(
    args: argparse.Namespace, saes: "dict[str, SAE[Any]]", options: LatentOptions
) -> "tuple[dict[str, FiringRates], dict[str, Any]]":
    """The firing of the latents by SAE, and its provenance."""
    from sae_whiten.lenses.latents.measure import measure_firing

    model, dataset, source = model_and_dataset(args, saes, args.context_size)
    firing = measure_firing(saes, model, dataset, options)
    n_tokens = {name: of_sae.n_tokens for name, of_sae in firing.items()}
    counts = " or ".join(map(str, dict.fromkeys(n_tokens.values())))
    return firing, {
        "frequencies": f"over {counts} tokens of {source['dataset_path']}",
        **{name: source[name] for name in ("model_name", "dataset_path", "dataset_split")},
        "n_tokens": n_tokens,
    }


def _print_counts(space: "LatentSpace") -> None:
    columns = ("latents", "live", "dead", "shown", "no direction")
    width = max(3, *(len(m.name) for m in space.maps))
    print(f"{'SAE':{width}}  " + "  ".join(f"{column:>8}" for column in columns))
    for m in space.maps:
        counts = (m.d_sae, m.d_sae - m.n_dead, m.n_dead, len(m.latents), len(m.without_direction))
        cells = (f"{n:>{max(8, len(c))}}" for n, c in zip(counts, columns, strict=True))
        print(f"{m.name:{width}}  " + "  ".join(cells))
