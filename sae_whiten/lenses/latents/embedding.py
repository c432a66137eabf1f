"""Where the latents of SAEs lie: an embedding in the plane by t-SNE (van der Maaten & Hinton 2008).

A latent is a vector of which only the direction counts: its decoder row, or its activations over
tokens. t-SNE gets vectors of unit length, whose squared Euclidean distance is 2 (1 - cos): cosine
determines the neighbours. (scikit-learn's own metric="cosine" would be squared once more.)

Only positions of one embedding can be compared: SAEs whose vectors lie in one space are embedded
together, those of different spaces separately. t-SNE shows which latents are near each other. The
distance between clusters, their size and their density mean nothing. Cosines of decoder rows are
measured in the space of the activations: if that is anisotropic, a few directions of large variance
can dominate them.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from jaxtyping import Bool, Float, Integer
from numpy import ndarray
from scipy.sparse import csr_array, issparse, vstack

from sae_whiten._files import CorruptFileError, write_json
from sae_whiten.lenses.options import LatentOptions

__all__ = [
    "ACTIVATIONS",
    "DECODER",
    "LatentMap",
    "LatentSpace",
    "LatentVectors",
    "embed_latents",
]

logger = logging.getLogger(__name__)

DECODER = "decoder directions"
ACTIVATIONS = "latent activations"

_FORMAT = "sae_whiten latent space 1"
_FEWEST = 4  # points: with three neighbours each, the perplexity can be 1

Vectors: TypeAlias = Float[ndarray, "d_sae d"] | csr_array


@dataclass(frozen=True, eq=False)
class LatentVectors:
    """The latents of one SAE as vectors of some space.

    Attributes:
        name: Name of the SAE.
        space: Name of the space. Vectors of SAEs that share it are comparable coordinate by
            coordinate: decoder rows of one hook, or activations over the same tokens.
        vectors: A row for each latent, shape (d_sae, d), dense or sparse, any floating dtype.
        firing_rates: Share of tokens in which each latent is active, shape (d_sae,), in [0, 1].

    Raises:
        ValueError: The shapes do not fit, a vector is not finite, or a rate is not in [0, 1].
    """

    name: str
    space: str
    vectors: Vectors
    firing_rates: Float[ndarray, "_"]

    def __post_init__(self) -> None:
        rates, norms = self.firing_rates, _norms(self.vectors)
        if len(rates) != len(norms):
            raise ValueError(f"{self.name}: {len(norms)} vectors, but {len(rates)} firing rates")
        if not ((rates >= 0) & (rates <= 1)).all():
            wrong = int(np.flatnonzero(~((rates >= 0) & (rates <= 1)))[0])
            raise ValueError(
                f"{self.name}: the firing rate of latent {wrong} is {rates[wrong]}, not in [0, 1]"
            )
        if not np.isfinite(norms).all():
            wrong = int(np.flatnonzero(~np.isfinite(norms))[0])
            raise ValueError(f"{self.name}: the vector of latent {wrong} is not finite")


@dataclass(frozen=True, eq=False)
class LatentMap:
    """The latents of one SAE in the plane.

    Attributes:
        name: Name of the SAE.
        space: Positions are comparable with those of other SAEs of this space.
        d_sae: Number of its latents.
        n_dead: Number of latents that were never active, embedded or not.
        perplexity: Perplexity of t-SNE.
        latents: Indices of the embedded latents, ascending, shape (n,).
        xy: Their positions, shape (n, 2), float64, without a unit.
        firing_rates: Their firing rates, shape (n,), float64.
        without_direction: Latents whose vector is zero, shape (m,): they are not embedded. With
            activations these are all dead latents; with decoders, rows of norm zero.
    """

    name: str
    space: str
    d_sae: int
    n_dead: int
    perplexity: float
    latents: Integer[ndarray, "n"]
    xy: Float[ndarray, "n 2"]
    firing_rates: Float[ndarray, "n"]
    without_direction: Integer[ndarray, "m"]

    @property
    def dead(self) -> Bool[ndarray, "n"]:
        """Which of the embedded latents were never active."""
        return self.firing_rates == 0


@dataclass(frozen=True, eq=False)
class LatentSpace:
    """Maps of the latents of one or several SAEs, and how they were made.

    Attributes:
        of: What the vectors are, in words: DECODER or ACTIVATIONS.
        seed: Seed of the choice of latents and of t-SNE.
        maps: One for each SAE.
        source: Where the firing rates come from, as JSON values; "frequencies" describes it in
            words.
    """

    of: str
    seed: int
    maps: Sequence[LatentMap]
    source: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically: for each SAE its fields, and `latent`, `x`, `y`,
        `firing_rate` and `dead` of the embedded latents, as columns of equal length."""
        content = {
            "format": _FORMAT,
            "of": self.of,
            "seed": self.seed,
            "source": dict(self.source),
            "saes": [
                {
                    "name": m.name,
                    "space": m.space,
                    "d_sae": m.d_sae,
                    "n_dead": m.n_dead,
                    "perplexity": m.perplexity,
                    "latent": m.latents.tolist(),
                    "x": m.xy[:, 0].tolist(),
                    "y": m.xy[:, 1].tolist(),
                    "firing_rate": m.firing_rates.tolist(),
                    "dead": m.dead.tolist(),
                    "without_direction": m.without_direction.tolist(),
                }
                for m in self.maps
            ],
        }
        write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> "LatentSpace":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            CorruptFileError: It is not such a file.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["format"] != _FORMAT:
                raise CorruptFileError(f"{path} has the format {content['format']!r}")
            maps = [_map_from(sae) for sae in content["saes"]]
            return cls(content["of"], content["seed"], maps, content["source"])
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise CorruptFileError(
                f"{path} is not a latent space written by sae_whiten ({error!r})"
            ) from error


def _map_from(sae: Mapping[str, Any]) -> LatentMap:
    return LatentMap(
        name=sae["name"],
        space=sae["space"],
        d_sae=sae["d_sae"],
        n_dead=sae["n_dead"],
        perplexity=sae["perplexity"],
        latents=np.array(sae["latent"], np.int64),
        xy=np.array([sae["x"], sae["y"]], np.float64).T,
        firing_rates=np.array(sae["firing_rate"], np.float64),
        without_direction=np.array(sae["without_direction"], np.int64),
    )


def embed_latents(
    saes: Sequence[LatentVectors], options: LatentOptions | None = None
) -> list[LatentMap]:
    """Embed the latents of SAEs in the plane, by one t-SNE for each space.

    Latents with a zero vector have no direction and are left out. If an SAE has more than
    `max_latents` others, that many are drawn; dead ones keep their share (but at least one of
    either kind is drawn). t-SNE starts from the first two principal components and uses the
    Barnes-Hut approximation: about 10 s for 2000 latents on one core, growing slightly faster than
    their number.

    Args:
        saes: The latents of each SAE.
        options: How many, the perplexity and the seed; the defaults if None.

    Returns:
        A map for each SAE, in their order.

    Raises:
        ValueError: There are no SAEs, two have the same name, SAEs of one space have vectors of
            different widths, or a space has fewer than 4 latents with a direction.
    """
    if not saes:
        raise ValueError("no SAEs to embed")
    options = options or LatentOptions()
    names = [sae.name for sae in saes]
    if len(set(names)) < len(names):
        raise ValueError(f"two SAEs have the same name: {', '.join(names)}")
    maps: dict[str, LatentMap] = {}
    for space in dict.fromkeys(sae.space for sae in saes):
        members = [sae for sae in saes if sae.space == space]
        maps |= {m.name: m for m in _embed_together(members, options)}
    return [maps[name] for name in names]


def _embed_together(saes: Sequence[LatentVectors], options: LatentOptions) -> list[LatentMap]:
    perplexity, seed = options.perplexity, options.seed
    widths = {sae.name: cast(Any, sae.vectors).shape[1] for sae in saes}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{width} ({name})" for name, width in widths.items())
        raise ValueError(f"the vectors in {saes[0].space} differ in width: {listed}")
    shown: list[ndarray] = []
    undirected_of: list[ndarray] = []
    directions: list[Any] = []
    for sae in saes:
        norms = _norms(sae.vectors)
        directed = np.flatnonzero(norms)
        latents = directed[_draw(sae.firing_rates[directed] == 0, options.max_latents, seed)]
        shown.append(latents)
        undirected_of.append(np.flatnonzero(norms == 0))
        vectors: Any = sae.vectors[latents]
        scale = 1 / norms[latents, None]
        directions.append(vectors.multiply(scale).tocsr() if issparse(vectors) else vectors * scale)
    sizes = [len(latents) for latents in shown]
    if sum(sizes) < _FEWEST:
        raise ValueError(
            f"{', '.join(widths)}: only {sum(sizes)} latents to embed (vectors of zero length have "
            f"no direction); t-SNE needs {_FEWEST}"
        )
    largest = (sum(sizes) - 1) / 3
    if perplexity > largest:
        logger.warning(
            "perplexity %g lowered to %g for %d latents", perplexity, largest, sum(sizes)
        )
    used = float(min(perplexity, largest))
    points = vstack(directions, "csr") if issparse(directions[0]) else np.concatenate(directions)
    logger.info("t-SNE of %d latents in %s", sum(sizes), saes[0].space)
    xy = np.split(_tsne(points, used, seed), np.cumsum(sizes)[:-1])
    return [
        LatentMap(
            name=sae.name,
            space=sae.space,
            d_sae=len(sae.firing_rates),
            n_dead=int((sae.firing_rates == 0).sum()),
            perplexity=used,
            latents=latents,
            xy=positions,
            firing_rates=sae.firing_rates[latents].astype(np.float64),
            without_direction=undirected,
        )
        for sae, latents, positions, undirected in zip(saes, shown, xy, undirected_of, strict=True)
    ]


def _norms(vectors: Vectors) -> Float[ndarray, "d_sae"]:
    """Lengths of the rows, summed in float64 without a float64 copy of dense vectors."""
    if isinstance(vectors, csr_array):
        return np.sqrt(np.asarray(vectors.astype(np.float64).power(2).sum(axis=1)).ravel())
    return np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))


def _draw(dead: Bool[ndarray, "n"], size: int, seed: int) -> Integer[ndarray, "_"]:
    """Indices of at most `size` latents, ascending, with the same share of dead ones as in all."""
    if len(dead) <= size:
        return np.arange(len(dead))
    n_dead = round(size * float(dead.mean()))
    if size > 1:
        n_dead = min(max(n_dead, int(dead.any())), size - int(not dead.all()))
    rng = np.random.default_rng(seed)
    drawn = [
        rng.choice(np.flatnonzero(kind), n, replace=False)
        for kind, n in ((dead, n_dead), (~dead, size - n_dead))
    ]
    return np.sort(np.concatenate(drawn))


def _tsne(points: Any, perplexity: float, seed: int) -> Float[ndarray, "n 2"]:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rng = np.random.default_rng(seed)
    start = 1e-4 * rng.standard_normal((points.shape[0], 2))
    if min(points.shape) > 2:
        # not TSNE(init="pca"), which takes no sparse matrix
        pca = PCA(2, svd_solver="arpack", random_state=seed).fit_transform(points)
        scale = pca[:, 0].std()
        if scale > 1e-6:  # otherwise all have one direction
            start = 1e-4 * pca / scale
    init: Any = start.astype(np.float32)
    tsne = TSNE(perplexity=perplexity, init=init, random_state=seed)
    return tsne.fit_transform(points).astype(np.float64)
