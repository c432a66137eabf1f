"""Imports between the rooms of the package go one way, and the mathematics imports no SAELens."""

import ast
import graphlib
import subprocess
import sys

import sae_whiten
from tests.support import ROOT

MATHEMATICS = ("config", "statistics", "whitening", "folding")
ROOMS = (
    "architectures",
    "estimation",
    "training",
    "evaluation",
    "comparison",
    "lenses",
    "cli",
)
PACKAGE = ROOT / "sae_whiten"


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports() -> dict[str, set[str]]:
    """By module of the package: the modules of the package that it imports, also in functions."""
    sources = {
        module_name(path.relative_to(ROOT).as_posix()): path
        for path in PACKAGE.rglob("*.py")
        # the package itself looks names up in all rooms, when they are asked for
        if path != PACKAGE / "__init__.py"
    }
    found: dict[str, set[str]] = {}
    for module, path in sources.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} has a relative import"
                own = node.module or ""
                for alias in node.names:
                    # a public name stands for the module that it is looked up in
                    public = sae_whiten._MODULES.get(alias.name) if own == "sae_whiten" else None
                    submodule = f"{own}.{alias.name}"
                    names.add(public or (submodule if submodule in sources else own))
        found[module] = names & sources.keys() - {module}
    return found


def floor(module: str) -> int:
    """0 for private helpers, 1 for the mathematics, then the rooms in their order."""
    part = module.split(".")[1]
    if part in MATHEMATICS:
        return 1
    if part == "__main__":
        return len(ROOMS) + 2
    if part in ROOMS:
        return ROOMS.index(part) + 2
    assert part.startswith("_"), f"{module} belongs to no room"
    return 0


def test_imports_between_rooms_go_one_way() -> None:
    upwards = [
        f"{module} imports {name}"
        for module, names in sorted(imports().items())
        for name in sorted(names)
        if floor(name) > floor(module)
    ]
    assert not upwards, "\n".join(upwards)


def test_imports_go_in_no_circle() -> None:
    # raises CycleError, which names the modules
    graphlib.TopologicalSorter(imports()).prepare()


def test_the_mathematics_imports_neither_sae_lens_nor_what_draws_and_tabulates() -> None:
    modules = ["sae_whiten", *(f"sae_whiten.{name}" for name in MATHEMATICS)]
    public = "from sae_whiten import ActivationStatistics, Whitening, WhiteningConfig"
    code = f"import sys, {', '.join(modules)}; {public}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(modules) <= set(loaded)
    assert not {"sae_lens", "transformer_lens", "pandas", "matplotlib"} & set(loaded)
