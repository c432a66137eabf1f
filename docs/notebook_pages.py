"""A hook of MkDocs: notebooks become pages, with the outputs that they were saved with."""

import re
from pathlib import Path
from typing import Any

import nbconvert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every notebook, and its figures beside it."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text, resources = nbconvert.MarkdownExporter().from_filename(str(notebook.abs_src_path))
        name = Path(notebook.src_uri).stem
        figures = resources["outputs"]  # bytes by name, such as output_4_0.png
        for figure in figures:
            text = text.replace(f"]({figure})", f"]({name}-{figure})")
            target = f"{Path(notebook.src_uri).parent.as_posix()}/{name}-{figure}"
            files.append(File.generated(config, target, content=figures[figure]))
        page = notebook.src_uri.replace(".ipynb", ".md")
        text += f'\n\n<a href="../{name}.ipynb" download>Download this notebook</a>\n'
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links between pages, which on GitHub lead to notebooks, lead to their pages."""
    return re.sub(r"\]\((?!\w+:)([^)]*)\.ipynb\)", r"](\1.md)", markdown)
