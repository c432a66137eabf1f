"""Text without a download: the sources of installed Python packages, parsed and never imported."""

import ast
import importlib.util
import random
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = [
    "docstrings",
    "functions",
    "package_root",
    "parse",
    "shuffled",
    "source_files",
    "stdlib_root",
]

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def stdlib_root() -> Path:
    """Folder of the standard library."""
    return Path(sysconfig.get_path("stdlib"))


def package_root(name: str) -> Path:
    """Folder of an installed package.

    Raises:
        ValueError: It is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {name!r} is not installed, or without sources: install it")
    return Path(next(iter(spec.submodule_search_locations)))


def source_files(root: Path) -> list[Path]:
    """Modules under a folder, sorted by path, without tests and installed packages."""
    return sorted(p for p in root.rglob("*.py") if not _SKIPPED & set(p.relative_to(root).parts))


def shuffled(paths: Sequence[Path], seed: int) -> list[Path]:
    """The same paths in random order, which depends on the seed only."""
    order = list(paths)
    random.Random(seed).shuffle(order)
    return order


def parse(path: Path) -> ast.Module | None:
    """The syntax tree of a module; None for a file that is not valid Python, such as a template."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes in strings
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return None


def docstrings(tree: ast.Module) -> Iterator[str]:
    """The docstrings of a module, its classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text


def functions(tree: ast.Module) -> Iterator[str]:
    """The bodies of functions and methods of a module, without docstrings and comments."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body:
                yield "\n".join(ast.unparse(statement) for statement in body)
