"""README and the pages of the site: code runs, and what commands, files and links name is there.

What is written for GPT-2 runs on the byte transformer: `_STAND_INS` says what is replaced.
"""

import importlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from matplotlib import pyplot

from sae_whiten import __version__
from sae_whiten.cli import COMMANDS, main
from sae_whiten.evaluation import source_code
from tests.support import BYTE_TRANSFORMER, ROOT

_PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_CLASS = "AutoModelForCausalLM"
_STAND_INS = (
    (r"tests/assets/byte-transformer", str(BYTE_TRANSFORMER)),
    (r'model_name="gpt2"', f'model_name="{BYTE_TRANSFORMER}", model_class_name="{_CLASS}"'),
    (
        r"--model([-_])name gpt2",
        rf"--model\1name {BYTE_TRANSFORMER} --model\1class\1name {_CLASS}",
    ),
    (r"monology/pile-uncopyrighted", "texts.jsonl"),
    (r"blocks\.\*\.hook_resid_pre", "gpt_neox.layers.?"),
    (r"blocks\.[0-6]\.hook_resid_pre", "gpt_neox.layers.0"),
    (r"blocks\.[7-9]\.hook_resid_pre", "gpt_neox.layers.1"),
    (r"\b768\b", "128"),
    (r"\b24576\b", "256"),
    (r"(training_tokens[= ])[\d_]+", r"\g<1>4096"),
    (r"(total_training_samples=)[\d_]+", r"\g<1>8192"),
    (r"\bcuda\b", "cpu"),
)

_QUICK = {"fit", "train"}
"""Commands that are run. Of the others the flags are looked at; tests of their own run them."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1], found[2], text[: found.start()].count("\n") + 1)
        for found in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def _adapted(code: str) -> str:
    for pattern, replacement in _STAND_INS:
        code = re.sub(pattern, replacement, code)
    return code


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what pages take as made before: texts, an SAE, statistics."""
    folder = tmp_path_factory.mktemp("documentation")
    files = source_code.source_files(source_code.stdlib_root() / "json")
    texts = [path.read_text(encoding="utf-8") for path in files]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        for page in ("guides/statistics.md", "index.md"):
            made = next(b for b in blocks(ROOT / "docs" / page) if "--hook" in b.code)
            _run_shell(made.code, patch)
        yield folder


def _run_shell(code: str, patch: pytest.MonkeyPatch) -> None:
    for line in _adapted(code).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["sae-whiten"]:
            if words[1] not in _QUICK:
                command = importlib.import_module(f"sae_whiten.cli.{words[1]}")
                patch.setattr(command, "run", lambda args: 0)
            assert main(words[1:]) == 0, line


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if {b.language for b in blocks(page)} & {"python", "bash"}],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_code_runs(
    page: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            code = "\n" * block.line + _adapted(block.code)  # errors name the line of the page
            exec(compile(code, page, "exec"), namespace)
        elif block.language == "bash":
            _run_shell(block.code, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_named_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    commands = re.findall(r"(?:`|^|-m )sae[-_]whiten ([a-z]+)", text, re.MULTILINE)
    assert set(commands) <= set(COMMANDS)
    for path in re.findall(r"\b(?:examples|benchmarks)/\w+\.py", text):
        assert (ROOT / path).is_file(), path
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE)) <= targets
    for link in re.findall(r"\]\((?!\w+:)([^)#]+)", text):
        assert (page.parent / link).exists(), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
_SHORTER = (
    (r"(training_tokens=)[\d_]+", r"\g<1>2048"),
    (r"range\(500\)", "range(20)"),
    (r"seeds=range\(3\)", "seeds=range(2)"),
    (r"held_out_sequences=\d+", "held_out_sequences=8"),
    (r"d_sae=(512|1024)", "d_sae=128"),
    (r"activations\(50_000\)", "activations(2_000)"),
    (r"write_report\(.*", ""),  # draws figures; has tests of its own
    (r'out="byte-stats"', 'out="byte-stats", n_samples=4_000'),
)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_run(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # they look for the model upwards from here
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            for pattern, replacement in _SHORTER:
                code = re.sub(pattern, replacement, code)
            exec(compile(code, f"{notebook.name}, cell {number}", "exec"), namespace)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_are_stored_as_they_ran(notebook: Path) -> None:
    text = notebook.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    # the first is a comment, what to do elsewhere than in a clone
    assert [cell["execution_count"] for cell in cells[1:]] == list(range(2, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert str(ROOT) not in text
    link = f"https://colab.research.google.com/github/{_repository()}/blob/main/docs/notebooks/"
    assert f"]({link}{notebook.name})" in text


def test_the_citation_is_of_this_version_and_repository() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in text
    assert f"\nrepository-code: https://github.com/{_repository()}\n" in text


def _repository() -> str:
    """Owner and name, of the repository that pyproject.toml names."""
    found = re.search(r'^Repository = "https://github\.com/([\w./-]+)"', _PYPROJECT, re.MULTILINE)
    assert found is not None
    return found[1]
