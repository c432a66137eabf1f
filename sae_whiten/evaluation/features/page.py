"""One HTML page of features, with its style, script and figures inside.

It can be read without scripts, loads nothing, and is one file. The template escapes all data, and
the page's security policy allows no script but its own.
"""

import base64
import functools
import hashlib
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from markupsafe import Markup

from sae_whiten._atomic import atomic_path
from sae_whiten._html import template_environment
from sae_whiten._redaction import redacted
from sae_whiten.evaluation.features.result import Features, Latent, SAEFeatures, TextPiece

__all__ = ["to_html", "write_page"]

_LEVELS = 9  # of shading
_LABELS = ("A", "B")  # of two SAEs
_RATE_BINS = 24  # of firing rates, on a logarithmic scale
# characters that are invisible or break the line
_SHOWN_AS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
_JOINERS = "\u200c\u200d"


def write_page(
    features: Features, path: str | Path, source: Mapping[str, Any] | None = None
) -> None:
    """Write the page, atomically.

    Args:
        features: Result of `measure_features`.
        path: The file.
        source: "model" and "dataset", shown on the page without secrets.
    """
    with atomic_path(path) as partial:
        # a name that is not valid Unicode must not make writing fail
        partial.write_text(to_html(features, source), encoding="utf-8", errors="backslashreplace")


def to_html(features: Features, source: Mapping[str, Any] | None = None) -> str:
    """The page as text; arguments as for `write_page`."""
    templates = files("sae_whiten.evaluation.features") / "templates"
    style, script = (
        Markup((templates / name).read_text(encoding="utf-8"))
        for name in ("features.css", "features.js")
    )
    sections, saes = _sections(features), [_sae(features, i) for i in range(len(features.saes))]
    return (
        _environment()
        .get_template("features.html.j2")
        .render(
            title="Features of " + " and ".join(_brief(sae.name) for sae in features.saes),
            saes=saes,
            source=_public_facts(source or {}),
            features=features,
            sections=sections,
            asked=_asked(features),
            style=style,
            script=script,
            policy=(
                f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
                "base-uri 'none'; form-action 'none'"
            ),
        )
    )


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@functools.cache
def _environment() -> Environment:
    return template_environment(
        "sae_whiten.evaluation.features", share=_share, short=_short, visible=_visible
    )


# --- what the template shows


@dataclass(frozen=True)
class _Run:
    """Tokens with the same shade: one active token, or several inactive ones."""

    text: str
    level: int = 0
    value: str = ""
    peak: bool = False


@dataclass(frozen=True)
class _Card:
    """One latent, ready for the template."""

    latent: Latent
    label: str  # "A" or "B"; "" on a page of one SAE
    other: str
    anchor: str
    rate: float
    bars: str
    gist: str
    texts: Sequence[tuple[str, Sequence[_Run]]]
    random_texts: Sequence[tuple[str, Sequence[_Run]]]
    in_text: Sequence[_Run]
    links: Mapping[int, str]  # of latents of the same SAE that are on the page
    other_links: Mapping[int, str]


@dataclass(frozen=True)
class _Item:
    """An entry that can be searched, sorted and stepped through: a latent or a pair."""

    cards: Sequence[_Card]
    shown_before: str | None  # anchor of a latent of the pair that an earlier item shows
    at: str  # positions in the requested text at which it is active
    order: Mapping[str, float]


@dataclass(frozen=True)
class _Section:
    id: str
    title: str
    note: str
    items: Sequence[_Item]


def _sae(features: Features, i: int) -> dict[str, Any]:
    sae = features.saes[i]
    facts = {
        **sae.facts,
        "latents": f"{sae.d_sae:,}",
        "that fire": f"{sae.d_sae - sae.n_dead:,}",
        "L0": _short(sae.l0),
    }
    return {
        "name": _brief(sae.name),
        "label": _LABELS[i] if len(features.saes) == 2 else "",
        "facts": _public_facts(facts),
        "rates": _rates_figure(sae),
    }


def _sections(features: Features) -> list[_Section]:
    saes, matching = features.saes, features.matching
    if matching is None:
        items = [_item(features, [(0, i)]) for i in saes[0].latents]
        return [_Section("latents", "Latents", "", items)]
    first, second = (
        f"{label}: {_brief(sae.name)}" for label, sae in zip(_LABELS, saes, strict=True)
    )
    shown: set[tuple[int, int]] = set()
    pairs = []
    for i, j in matching.both:
        new = [one for one in ((0, i), (1, j)) if one not in shown]
        shown.update(new)
        pairs.append(_item(features, new, [(0, i), (1, j)]))
    alone = [
        [_item(features, [(side, i)]) for i in found if (side, i) not in shown]
        for side, found in enumerate((matching.only_first, matching.only_second))
    ]
    (live_a, live_b), (same_a, same_b) = matching.n_live, matching.n_matched
    return [
        _Section(
            "both",
            "Found by both",
            f"{same_a:,} of the {live_a:,} latents of A that fire have a counterpart in B, "
            f"{same_b:,} of the {live_b:,} of B one in A. {len(pairs)} pairs are shown.",
            pairs,
        ),
        _Section(
            "first",
            "Only in A",
            f"{live_a - same_a:,} of the {live_a:,} latents of {first} that fire; "
            f"{len(alone[0])} are shown.",
            alone[0],
        ),
        _Section(
            "second",
            "Only in B",
            f"{live_b - same_b:,} of the {live_b:,} latents of {second} that fire; "
            f"{len(alone[1])} are shown.",
            alone[1],
        ),
    ]


def _item(
    features: Features,
    cards: Sequence[tuple[int, int]],
    pair: Sequence[tuple[int, int]] | None = None,
) -> _Item:
    item_cards = [_card(features, *which) for which in cards]
    before = [which for which in pair or () if which not in cards]
    lead, latent = item_cards[0], item_cards[0].latent
    near = latent.by_direction
    order = {
        "number": latent.index,
        "rate": lead.rate,
        "largest": latent.largest,
        "cosine": near.whitened if near is not None and near.whitened is not None else -2.0,
        "overlap": 0.0 if latent.by_firing is None else latent.by_firing.overlap,
    }
    at = sorted(
        {
            position
            for card in item_cards
            if card.latent.in_text is not None
            for position, value in enumerate(card.latent.in_text.activations)
            if value != 0
        }
    )
    return _Item(
        item_cards,
        _anchor(features, *before[0]) if before else None,
        " ".join(map(str, at)),
        order,
    )


def _card(features: Features, side: int, i: int) -> _Card:
    """Latent `i` of the SAE of this side: 0 for the first SAE, 1 for the second."""
    ours, latent = features.saes[side], features.saes[side].latents[i]
    pair = len(features.saes) == 2
    other = features.saes[1 - side].latents if pair else {}
    return _Card(
        latent=latent,
        label=_LABELS[side] if pair else "",
        other=_LABELS[1 - side] if pair else "",
        anchor=_anchor(features, side, i),
        rate=latent.n_firing / ours.n_tokens,
        bars=_bars(latent.histogram, 40),
        gist=_gist(latent),
        texts=[_shaded(text, latent.largest) for text in latent.texts],
        random_texts=[_shaded(text, latent.largest) for text in latent.random_texts],
        in_text=() if latent.in_text is None else _shaded(latent.in_text, latent.largest)[1],
        links={j: _anchor(features, side, j) for j in ours.latents if j != i},
        other_links={j: _anchor(features, 1 - side, j) for j in other},
    )


def _anchor(features: Features, side: int, i: int) -> str:
    return f"latent-{i}" if len(features.saes) == 1 else f"latent-{_LABELS[side].lower()}-{i}"


def _gist(latent: Latent) -> str:
    """The token at which a latent is most active over all its texts, as its label."""
    peaks: dict[str, float] = {}
    for text in latent.texts:
        piece = text.pieces[text.peak].strip()
        peaks[piece] = peaks.get(piece, 0.0) + abs(text.activations[text.peak])
    peaks.pop("", None)
    return max(peaks, key=lambda piece: peaks[piece], default="")


def _asked(features: Features) -> list[str] | None:
    """The requested text, token by token."""
    texts = (latent.in_text for sae in features.saes for latent in sae.latents.values())
    text = next((text for text in texts if text is not None), None)
    return None if text is None else list(text.pieces)


def _shaded(text: TextPiece, largest: float) -> tuple[str, list[_Run]]:
    """The value at the peak, and runs of tokens."""
    runs: list[_Run] = []
    units: list[tuple[str, float, bool]] = []
    for position, (piece, value) in enumerate(zip(text.pieces, text.activations, strict=True)):
        peak = position == text.peak
        if not piece and units:  # the rest of a character of several tokens
            before, its_value, its_peak = units[-1]
            units[-1] = before, max(its_value, value, key=abs), its_peak or peak
        else:
            units.append((piece, value, peak))

    def add_plain(text: str) -> None:
        before = runs.pop().text if runs and not runs[-1].level else ""
        runs.append(_Run(before + text))

    for piece, value, peak in units:
        if value == 0:
            add_plain(_visible(piece))
            continue
        if piece[:1] == " " and piece.strip():  # a shaded space would look like a separate mark
            add_plain(" ")
            piece = piece[1:]
        level = min(_LEVELS, max(1, math.ceil(_LEVELS * abs(value) / max(largest, 1e-30))))
        runs.append(_Run(_visible(piece), level, _short(value), peak))
    return _short(text.activations[text.peak]), runs


# --- figures


def _bars(counts: Sequence[int], height: int) -> str:
    """Bars of width 1 as the path of an SVG. Every nonempty bar is visible, however small."""
    most = max(counts, default=0)
    path = []
    for x, count in enumerate(counts):
        if count:
            top = height - max(1.0, height * count / most)
            path.append(f"M{x} {height}V{top:.4g}h.85V{height}z")
    return "".join(path)


def _rates_figure(sae: SAEFeatures) -> dict[str, Any]:
    """Histogram of firing rates of an SAE's latents, on a logarithmic scale from once to always."""
    live = sae.firing_rates[sae.firing_rates > 0]
    lowest = math.log10(1 / max(sae.n_tokens, 10))
    parts = ((live.log10() - lowest) / -lowest * _RATE_BINS).floor().clamp(0, _RATE_BINS - 1)
    counts = torch.bincount(parts.long(), minlength=_RATE_BINS).tolist()
    decades = range(math.ceil(lowest), 1)
    return {
        "bars": _bars(counts, 40),
        "width": _RATE_BINS,
        "ticks": [(_RATE_BINS * (d - lowest) / -lowest, _power(d)) for d in decades],
    }


def _power(exponent: int) -> str:
    return f"{100 * 10.0**exponent:g}%" if exponent >= -5 else f"1e{exponent}"


# --- text and numbers


def _public_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """The known facts, without secrets and without paths on this machine."""
    known = {name: value for name, value in redacted(dict(facts)).items() if value is not None}
    return {name: _brief(str(value)) for name, value in known.items()}


def _brief(name: str) -> str:
    """A name. Of an absolute path, only the last two parts."""
    parts = name.replace("\\", "/").split("/")
    return "/".join(["…", *parts[-2:]]) if Path(name).is_absolute() and len(parts) > 3 else name


def _visible(text: str) -> str:
    """A text with marks for invisible characters: line breaks, controls, changes of direction."""
    return "".join(_SHOWN_AS.get(c) or _escaped(c) for c in text)


def _escaped(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    if not hidden or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode()


def _share(value: float) -> str:
    """A share of tokens as text, also if it is very small."""
    if value == 0:
        return "0%"
    if value < 1e-4:
        return f"1 in {1 / value:,.0f}"
    return f"{100 * value:.2g}%" if value < 0.995 else f"{100 * value:.3g}%"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
