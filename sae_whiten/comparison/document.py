"""A document of a few kinds of blocks, as Markdown and as one self-contained HTML page.

Texts may contain `code` and **bold**; everything else in them is text. `code` makes a code span of
a name that somebody else chose.
"""

import base64
import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

__all__ = [
    "Block",
    "Code",
    "Details",
    "Figure",
    "Heading",
    "Items",
    "Paragraph",
    "Table",
    "code",
    "to_html",
    "to_markdown",
]


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 to 6."""

    text: str
    level: int


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of short texts."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Text as it is, in a fixed width."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table, its first column naming the rows, with a caption below it.

    A newline within a cell is a line break in HTML and a space in Markdown.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A PNG file and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away until the reader asks for them, and not printed."""

    title: str
    blocks: "Sequence[Block]"


Block: TypeAlias = Heading | Paragraph | Items | Code | Table | Figure | Details

_SPAN = re.compile(r"(`[^`]*`)")
_BOLD = re.compile(r"\*\*(.+?)\*\*", re.DOTALL)

_STYLE = """
:root { color-scheme: light dark; --rule: #bbb; --soft: #8881; --dim: #666; }
@media (prefers-color-scheme: dark) { :root { --rule: #555; --dim: #aaa; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin-top: 1.8rem; }
p, li { max-width: 50rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: var(--dim); padding-top: 0.4rem; }
thead { border-top: 1.5px solid; border-bottom: 1px solid; }
tbody { border-bottom: 1.5px solid; }
th, td { padding: 0.25rem 0.7rem; text-align: right; vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: normal; vertical-align: top; }
tr > :first-child { text-align: left; padding-left: 0; white-space: nowrap; }
tbody tr:nth-child(even) { background: var(--soft); }
td { white-space: nowrap; }
code, pre { font: 0.9em ui-monospace, monospace; }
pre { overflow-x: auto; padding: 0.7rem; background: var(--soft); white-space: pre-wrap;
  overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; }
figure img { max-width: 100%; width: 56rem; background: #fff; }
figcaption { color: var(--dim); max-width: 50rem; font-size: 0.87rem; }
summary { cursor: pointer; margin: 1rem 0; }
@page { size: A4 landscape; margin: 12mm; }
@media print {
  body { font-size: 9.5pt; max-width: none; margin: 0; padding: 0; }
  h1, h2, h3 { break-after: avoid; }
  table { font-size: 7.5pt; }
  th, td { padding: 0.15rem 0.35rem; }
  .table { overflow: visible; }
  tr, figure, pre { break-inside: avoid; }
  figure img { width: auto; max-height: 165mm; }
  details:not([open]) { display: none; }
}
"""


def code(name: object) -> str:
    """A code span that shows `name` on one line, whatever it contains."""
    return "`" + " ".join(str(name).replace("`", "'").split()) + "`"


def to_markdown(blocks: Sequence[Block], directory: str | Path) -> str:
    """GitHub-flavoured Markdown of a file in `directory`, which figures are linked from."""
    return "\n\n".join(_markdown(block, Path(directory)) for block in blocks) + "\n"


def _markdown(block: Block, directory: Path) -> str:
    match block:
        case Heading(text, level):
            return "#" * level + " " + text
        case Paragraph(text):
            return text
        case Items(texts):
            return "\n".join(f"- {text}" for text in texts)
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
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(_plain(title))}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(map(_html, blocks))
        + "\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Items(texts):
            return "<ul>\n" + "\n".join(f"<li>{_inline(text)}</li>" for text in texts) + "\n</ul>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Table(header, rows, caption):
            below = f"<caption>{_inline(caption)}</caption>\n" if caption else ""
            head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in header)
            body = "\n".join(_html_row(row) for row in rows)
            return (
                f'<div class="table"><table>\n{below}<thead><tr>{head}</tr></thead>\n'
                f"<tbody>\n{body}\n</tbody>\n</table></div>"
            )
        case Figure(path, caption):
            data = base64.b64encode(path.read_bytes()).decode()
            alt = html.escape(_plain(caption))
            return (
                f'<figure><img src="data:image/png;base64,{data}" alt="{alt}">\n'
                f"<figcaption>{_inline(caption)}</figcaption></figure>"
            )
        case Details(title, inner):
            body = "\n".join(map(_html, inner))
            return f"<details>\n<summary>{_inline(title)}</summary>\n{body}\n</details>"


def _html_row(cells: Sequence[str]) -> str:
    first, *others = (_inline(cell) for cell in cells)
    return f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{c}</td>" for c in others) + "</tr>"


def _inline(text: str) -> str:
    """Escape a text and mark up its code spans and bold parts."""
    parts = []
    for part in _SPAN.split(text):
        escaped = html.escape(part)
        if _SPAN.fullmatch(part):
            parts.append(f"<code>{escaped[1:-1]}</code>")
        else:
            parts.append(_BOLD.sub(r"<strong>\1</strong>", escaped).replace("\n", "<br>"))
    return "".join(parts)


def _plain(text: str) -> str:
    return text.replace("`", "").replace("**", "").replace("[", "(").replace("]", ")")
