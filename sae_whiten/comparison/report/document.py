"""Documents made of blocks, as Markdown or as one self-contained HTML page.

In texts, `code` and **bold** are marked up, and everything else is literal. The function `code`
makes a code span of any name.
"""

import base64
import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias
from urllib.parse import quote

from jinja2 import Environment
from markupsafe import Markup, escape

from sae_whiten._html import template_environment

__all__ = [
    "Block",
    "Code",
    "Details",
    "Figure",
    "Heading",
    "Items",
    "Link",
    "Paragraph",
    "Table",
    "code",
    "to_html",
    "to_markdown",
]


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 to 6."""

    kind: ClassVar = "heading"
    text: str
    level: int


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    kind: ClassVar = "paragraph"
    text: str


@dataclass(frozen=True)
class Items:
    """A list of short texts."""

    kind: ClassVar = "items"
    texts: Sequence[str]


@dataclass(frozen=True)
class Link:
    """A link to a file beside the document, on a line of its own."""

    kind: ClassVar = "link"
    text: str
    target: str


@dataclass(frozen=True)
class Code:
    """Preformatted text."""

    kind: ClassVar = "code"
    text: str


@dataclass(frozen=True)
class Table:
    """A table, its first column naming the rows, with a caption below it.

    A newline within a cell is a line break in HTML and a space in Markdown.
    """

    kind: ClassVar = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A PNG file with a caption."""

    kind: ClassVar = "figure"
    path: Path
    caption: str


@dataclass(frozen=True)
class Details:
    """Blocks that are collapsed until the reader opens them. Collapsed, they are not printed."""

    kind: ClassVar = "details"
    title: str
    blocks: "Sequence[Block]"


Block: TypeAlias = Heading | Paragraph | Items | Link | Code | Table | Figure | Details

_SPAN = re.compile(r"(`[^`]*`)")
_BOLD = re.compile(r"\*\*(.+?)\*\*", re.DOTALL)


def code(name: object) -> str:
    """A code span that shows `name` on one line, whatever it contains."""
    return "`" + " ".join(str(name).replace("`", "'").split()) + "`"


def to_markdown(blocks: Sequence[Block], directory: str | Path) -> str:
    """GitHub-flavoured Markdown. Links to figures are relative to `directory`."""
    return "\n\n".join(_markdown(block, Path(directory)) for block in blocks) + "\n"


def _markdown(block: Block, directory: Path) -> str:
    match block:
        case Heading(text, level):
            return "#" * level + " " + text
        case Paragraph(text):
            return text
        case Items(texts):
            return "\n".join(f"- {text}" for text in texts)
        case Link(text, target):
            return f"[{_plain(text)}]({quote(target)})"
        case Code(text):
            # longer than any run of backticks in the text
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{fence}\n{text}\n{fence}"
        case Table(header, rows, caption):
            rule = [":--"] + ["--:"] * (len(header) - 1)
            lines = [_markdown_row(row) for row in (header, rule, *rows)]
            return "\n".join(lines) + (f"\n\n{caption}" if caption else "")
        case Figure(path, caption):
            link = Path(os.path.relpath(path, directory)).as_posix().replace(" ", "%20")
            return f"![{_plain(caption)}]({link})\n\n{caption}"
        case Details(title, inner):
            body = to_markdown(inner, directory)
            return f"<details>\n<summary>{_inline(title)}</summary>\n\n{body}\n</details>"


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("\n", " ").replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(escaped) + " |"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One HTML page with style and figures inside, and no scripts.

    Raises:
        FileNotFoundError: A figure has not been drawn.
    """
    return _environment().get_template("report.html.j2").render(title=title, blocks=blocks)


@functools.cache
def _environment() -> Environment:
    return template_environment(
        "sae_whiten.comparison.report", inline=_inline, plain=_plain, png_url=_png_url
    )


def _inline(text: str) -> Markup:
    """Escape a text and mark up its code spans and bold parts."""
    parts = []
    for part in _SPAN.split(text):
        escaped = str(escape(part))
        if _SPAN.fullmatch(part):
            parts.append(f"<code>{escaped[1:-1]}</code>")
        else:
            parts.append(_BOLD.sub(r"<strong>\1</strong>", escaped).replace("\n", "<br>"))
    return Markup("".join(parts))


def _plain(text: str) -> str:
    return text.replace("`", "").replace("**", "").replace("[", "(").replace("]", ")")


def _png_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
