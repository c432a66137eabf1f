"""Texts with labels: balanced, deterministic, and no text in both splits."""

import random
import re
from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from sae_whiten.evaluation import labels as labels_module
from sae_whiten.evaluation.labels import dataset_texts, library_texts


def shared(a: str, b: str) -> float:
    """Share of the sequences of five words of `b` that are in `a`."""
    first, second = (re.findall(r"[a-z]+", text.lower()) for text in (a, b))
    of_a, of_b = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (first, second))
    return len(of_a & of_b) / max(1, len(of_b))


@pytest.fixture
def two_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two packages of 40 modules, every second of which is a copy of the one before."""
    for library in ("alpha", "beta"):
        (tmp_path / library / "tests").mkdir(parents=True)
        (tmp_path / library / "__init__.py").write_text("")
        for i in range(40):
            random_ = random.Random(f"{library} {i // 2}")
            names = ["".join(random_.choices("abcdef", k=6)) for _ in range(20)]
            source = [
                f'"""{" ".join(names)} number {i}."""',
                "def function(x):",
                f'    """{" ".join(reversed(names))}\n\n    Args:\n        x: hidden words"""',
                *(f"    {name} = x + {i}" for name in names),
            ]
            (tmp_path / library / f"module_{i}.py").write_text("\n".join(source))
        (tmp_path / library / "tests" / "test_x.py").write_text(f'"""{"never " * 50}"""')
        (tmp_path / library / "template.py").write_text("{% not python %}")
    monkeypatch.syspath_prepend(tmp_path)
    return "alpha", "beta"


def test_offline_texts_are_balanced_and_nothing_is_in_both_splits(two_libraries):
    texts = library_texts(5, seed=3, libraries=two_libraries)
    for split in (texts.train, texts.test):
        table = Counter(zip(split.labels["library"], split.labels["kind"], strict=True))
        assert table == {(lib, kind): 5 for lib in two_libraries for kind in ("code", "prose")}
    assert max(shared(a, b) for a in texts.train.texts for b in texts.test.texts) < 0.5
    everything = "\n".join(texts.train.texts + texts.test.texts)
    assert "never" not in everything
    assert "hidden" not in everything
    for text, kind in zip(texts.train.texts, texts.train.labels["kind"], strict=True):
        assert ("=" in text) == (kind == "code")


def test_offline_texts_depend_on_the_seed_alone(two_libraries):
    assert library_texts(4, 0, two_libraries) == library_texts(4, 0, two_libraries)
    assert library_texts(4, 0, two_libraries) != library_texts(4, 1, two_libraries)


def test_too_few_texts_are_an_error_that_says_how_many(two_libraries):
    with pytest.raises(ValueError, match=r"alpha has \d+ and \d+ texts of code.*fewer than 60"):
        library_texts(60, 0, two_libraries)
    with pytest.raises(ValueError, match="package 'no_such_library' is not installed"):
        library_texts(1, 0, ["no_such_library"])


def test_the_default_libraries_are_there_and_come_with_their_versions(monkeypatch):
    texts = library_texts(4)
    assert set(texts.train.labels["library"]) == set(labels_module.LIBRARIES)
    assert texts.source["libraries"]["torch"].startswith("2.")
    monkeypatch.setattr("importlib.metadata.packages_distributions", dict)
    found = library_texts(4).source["libraries"]
    assert found["torch"] == texts.source["libraries"]["torch"]
    assert all(100 <= len(text) <= 600 for text in texts.train.texts)


def labelled_rows(n: int = 400) -> Dataset:
    """Every text twice; labels 0, 1, 2 in the ratio 1 to 1 to 2, and whether the row is even."""
    names = ["sport", "world", "money", "money"]
    rows = {
        "body": [" ".join(f"{c}{chr(97 + i // 2 % 26)}{i // 52}word" for c in "abcdefgh")
                 .translate(str.maketrans("0123456789", "qwertyuiop")) for i in range(n)],
        "topic": [names[i // 2 % 4] for i in range(n)],
        "side": [str(i // 8 % 2) for i in range(n)],
    }  # fmt: skip
    topics = ClassLabel(names=["sport", "world", "money"])
    features = Features({"body": Value("string"), "topic": topics, "side": Value("string")})
    return Dataset.from_dict(rows, features)


def test_a_dataset_gives_as_many_different_texts_of_each_label():
    texts = dataset_texts(labelled_rows(), ["topic"], "body", n_texts=20)
    for split in (texts.train, texts.test):
        assert Counter(split.labels["topic"]) == {"sport": 20, "world": 20, "money": 20}
    assert len({*texts.train.texts, *texts.test.texts}) == 120
    again = dataset_texts(labelled_rows(), ["topic"], "body", n_texts=20)
    assert again == texts
    assert dataset_texts(labelled_rows(), ["topic"], "body", 20, seed=1) != texts


def test_two_label_columns_are_balanced_in_their_combinations(caplog):
    texts = dataset_texts(labelled_rows(), ["topic", "side"], "body", n_texts=50)
    table = Counter(zip(texts.test.labels["topic"], texts.test.labels["side"], strict=True))
    assert len(table) == 6
    assert len(set(table.values())) == 1
    assert "instead of 50" in caplog.text
    # texts keep their labels
    rows = {row["body"]: row["side"] for row in labelled_rows()}  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert all(
        rows[text] == side
        for text, side in zip(texts.test.texts, texts.test.labels["side"], strict=True)
    )


def test_datasets_that_cannot_serve_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="'label'.*body, topic, side"):
        dataset_texts(labelled_rows(), text_column="body")
    with pytest.raises(ValueError, match="different texts with topic = "):
        dataset_texts(labelled_rows(120), ["topic"], "body")
    with pytest.raises(ValueError, match="400 rows for 200"):
        dataset_texts(labelled_rows(), ["body"], "body")
