"""The page of features: what is on it, hostile data, and what it does in a browser."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from sae_whiten.evaluation.features.options import FeatureOptions
from sae_whiten.evaluation.features.page import to_html, write_page
from sae_whiten.evaluation.features.result import (
    Counterpart,
    Features,
    Latent,
    Matching,
    Neighbour,
    SAEFeatures,
    TextPiece,
)
from tests.browser import CHROMIUM, Page, browser

HOSTILE = (
    "<script>window.hit = 1</script>",
    "</style></script><script>window.hit = 1</script>",
    '"><img src=x onerror="window.hit=1">',
    "' onmouseover='window.hit=1",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;&#60;",
    "javascript:window.hit=1",
    "\u202eevil\u2066\x00\x1b[31m\ud800",
    "`code` **bold**",
)


def text_of(pieces: tuple[str, ...], *values: float) -> TextPiece:
    values = (*values, *[0.0] * (len(pieces) - len(values)))
    peak = max(range(len(values)), key=lambda i: abs(values[i]))
    return TextPiece(tuple(range(len(pieces))), pieces, values, peak)


def latent(i: int, words: tuple[str, ...] = (" one", " two", " three")) -> Latent:
    return Latent(
        index=i,
        n_firing=10 * i + 1,
        largest=4.0,
        mean=1.5,
        histogram=[3, 0, 1, 100],
        texts=[text_of((*words, f" word{i}"), 0.0, 4.0, -0.5), text_of(words, 2.0)],
        random_texts=[text_of((" by", " chance"), 1.0)],
        raised=[(word, 0.5) for word in words],
        lowered=[(word, -0.5) for word in reversed(words)],
        neighbours=[Neighbour(1, 0.9, 0.25), Neighbour(77, 0.8, 0.125)],
    )


def single(words: tuple[str, ...] = (" one", " two", " three"), name: str = "an-sae") -> Features:
    rates = torch.tensor([0.0, 0.5, 0.01, 1e-5])
    sae = SAEFeatures(name, {"model": words[0], "hook": "h"}, 100_000, rates)
    sae.latents = {i: latent(i, words) for i in (1, 2, 30)}
    return Features([sae], FeatureOptions(), None, None, 102_400, 128)


def pair(words: tuple[str, ...] = (" one", " two", " three")) -> Features:
    saes = []
    for which, name in enumerate(("plain", words[0])):
        sae = SAEFeatures(name, {"hook": "h"}, 100_000, torch.tensor([0.5, 0.25, 0.1, 0.2]))
        sae.latents = {i + which: latent(i + which, words) for i in (1, 2, 3)}
        for one in sae.latents.values():
            one.by_direction = Counterpart(2, 0.75, 0.99, 0.875)
            one.by_firing = Counterpart(9, 0.8, 0.1, 0.05)
        saes.append(sae)
    # 2 of B is in two pairs
    matching = Matching((4, 4), (3, 2), [(1, 2), (2, 2)], [3], [3, 4], (0.2, 0.3), 5000)
    return Features(saes, FeatureOptions(), "it is an encoder", matching, 102_400, 128)


class Parsed(HTMLParser):
    """Tags with their attributes, the text of scripts, and all other text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._in: str = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts.append(data)
        elif self._in != "style":
            self.text += data


def ids(page: Parsed) -> list[str]:
    return [str(attrs["id"]) for _, attrs in page.tags if "id" in attrs]


def test_every_latent_has_its_link_its_texts_and_its_numbers():
    page = Parsed(to_html(single(), {"dataset": "some texts"}))
    assert [i for i in ids(page) if i.startswith("latent-")] == [f"latent-{i}" for i in (1, 2, 30)]
    targets = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert {"#latent-1", "#latent-2", "#latent-30"} <= targets
    assert "#latent-77" not in targets  # a neighbour that is not on the page
    for fact in (" one two three word30", " by chance", "an-sae", "some texts", "#77", "0.3%"):
        assert fact in page.text
    # the strongest shade at the peak, and the values
    shaded = [attrs for tag, attrs in page.tags if tag == "b" and "title" in attrs]
    assert {(attrs["class"], attrs["title"]) for attrs in shaded} >= {
        ("a9 peak", "4"),
        ("a2", "-0.5"),
        ("a5 peak", "2"),
    }


def test_a_latent_goes_by_the_token_at_which_it_is_most_active():
    features = single()
    one = features.saes[0].latents[1]
    one.texts = [text_of((" open",), 4.0), text_of((" by",), 1.0), text_of((" by",), 1.0)]
    page = to_html(features)
    assert '<code class="gist" data-search' in page
    gists = page.split('<code class="gist"')[1:]
    assert gists[0].partition(">")[2].startswith("open<")


def test_of_two_saes_there_are_three_lists_and_no_id_twice():
    page = Parsed(to_html(pair()))
    found = ids(page)
    assert len(found) == len(set(found))
    assert {"both", "first", "second"} <= set(found)
    assert [i for i in found if i.startswith("latent-")] == [
        "latent-a-1", "latent-b-2", "latent-a-2", "latent-a-3", "latent-b-3", "latent-b-4"
    ]  # fmt: skip
    for fact in ("3 of the 4 latents of A", "2 of the 4 of B", "0.88", "5,000 tokens", "0.20"):
        assert fact in page.text
    assert "No tokens that latents raise or lower: it is an encoder." in page.text


def test_every_link_leads_somewhere_on_the_page_and_nothing_is_loaded():
    for features in (single(), pair()):
        page = Parsed(to_html(features))
        known = set(ids(page))
        for tag, attrs in page.tags:
            assert tag not in ("img", "link", "iframe", "object", "embed", "base", "form")
            assert "src" not in attrs
            if "href" in attrs:
                assert str(attrs["href"]).startswith("#")
                assert str(attrs["href"])[1:] in known
        policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
        assert str(policy).startswith("default-src 'none'; ")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_whatever_the_data_hold_the_page_has_the_same_tags(hostile, tmp_path):
    words = (hostile, " two", " three")
    plain = Parsed(to_html(single(), {"dataset": "d"}))
    found = Parsed(to_html(single(words, name=hostile), {"dataset": hostile}))
    asked = single(words)
    asked.saes[0].latents[1].in_text = text_of(words, 1.0)

    def shape(page: Parsed) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(attrs)) for tag, attrs in page.tags]

    assert shape(found) == shape(plain)
    assert found.scripts == plain.scripts
    # of two SAEs, and with a text that was asked for
    for features in (pair(words), asked):
        page = Parsed(to_html(features))
        assert page.scripts == plain.scripts
        assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
        assert not any(tag == "img" for tag, _ in page.tags)
    write_page(asked, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().endswith("</html>\n")


def test_folders_of_this_machine_are_not_told():
    name = "/home/somebody/secret-project/runs/sae"
    page = to_html(single(name=name), {"dataset": f"{name} (train)"})
    assert "somebody" not in page
    assert "…/runs/sae" in page


def test_what_is_not_seen_is_shown_by_a_mark():
    page = Parsed(to_html(single((" a\nb\tc", "\u202ed", "\x00e"))))
    assert "a↵b⇥c" in page.text
    assert r"\u202ed" in page.text
    assert r"\x00e" in page.text


def test_secrets_in_the_facts_are_left_out():
    token = "hf_" + "a" * 34
    assert token not in to_html(single(), {"dataset": f"https://user:{token}@host/data"})


def test_a_page_of_200_latents_is_small_enough_to_send():
    features = single()
    words = tuple(f" word{i}" for i in range(40))
    one = replace(
        latent(1),
        texts=[text_of(words, *[1.0] * 20) for _ in range(10)],
        random_texts=[text_of(words, *[1.0] * 20) for _ in range(4)],
    )
    features.saes[0].latents.update({i: replace(one, index=i) for i in range(200)})
    assert len(to_html(features)) < 6e6


# --- in a browser


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with browser() as found:
        yield found


def written(features: Features, folder: Path) -> Path:
    write_page(features, folder / "page.html")
    return folder / "page.html"


VISIBLE = "[...document.querySelectorAll('.item')].filter(i => i.checkVisibility())"
SHOWN = f"{VISIBLE}.map(i => i.querySelector('.anchor').id).join(' ')"


def test_search_sort_and_keys(page: Page, tmp_path):
    page.shape(1200)
    page.open(written(single(), tmp_path))
    assert page.value(SHOWN) == "latent-1 latent-2 latent-30"
    page.press("/")
    page.type("WORD30")
    assert page.value(SHOWN) == "latent-30"
    assert page.value("document.querySelector('#count').textContent") == "1 of 3"
    page.press("Escape")
    assert page.value(SHOWN) == "latent-1 latent-2 latent-30"
    for key, expected in (("j", "1"), ("j", "2"), ("j", "30"), ("j", "30"), ("k", "2")):
        page.press(key)
        assert page.value("location.hash") == f"#latent-{expected}"
    page.press("/")
    page.type("#2")
    assert page.value(SHOWN) == "latent-2"
    page.press("Escape")
    page.value("sort.value = '-number'; sort.value = '-rate'")
    page.value("document.querySelector('#sort').dispatchEvent(new Event('change'))")
    assert page.value(SHOWN) == "latent-30 latent-2 latent-1"
    assert not page.complaints


def test_a_link_leads_to_its_latent_also_when_a_search_hides_it(page: Page, tmp_path):
    path = written(pair(), tmp_path)
    page.open(path, "#latent-b-4")
    assert page.value("document.querySelector('.item.here .anchor').id") == "latent-b-4"
    page.press("/")
    page.type("word3")
    page.value("location.hash = '#latent-a-1'; new Promise(r => setTimeout(r))")
    page.value("document.body.offsetHeight")
    assert "latent-a-1" in page.value(SHOWN)
    assert not page.complaints


def test_a_token_of_the_text_chooses_the_latents_that_fire_at_it(page: Page, tmp_path):
    features = single()
    for position, i in enumerate((1, 2, 30)):
        values = [0.0] * 3
        values[position] = 1.0
        features.saes[0].latents[i].in_text = text_of((" a", " b", " c"), *values)
    page.open(written(features, tmp_path))
    page.value("document.querySelectorAll('.t')[1].click()")
    assert page.value(SHOWN) == "latent-2"
    page.value("document.querySelectorAll('.t')[1].click()")
    assert page.value(SHOWN) == "latent-1 latent-2 latent-30"


def test_it_reads_without_scripts(page: Page, tmp_path):
    page.open(written(pair(), tmp_path), scripts=False)
    assert len(page.value(SHOWN).split()) == 5
    assert page.value("document.querySelector('.bar').checkVisibility()") is False
    assert page.value("document.querySelector('summary').checkVisibility()") is True


def test_nothing_moves_sideways_narrow_or_wide_and_nothing_is_asked_for(page: Page, tmp_path):
    long = ("x" * 300, " two", "/a/path/without/spaces" * 9)
    for n, features in enumerate((single(long, name=long[2]), pair(long))):
        path = written(features, tmp_path / str(n))
        for width, dark in itertools.product((400, 1400), (False, True)):
            page.shape(width, dark=dark)
            page.requests.clear()
            page.open(path)
            assert page.value("document.documentElement.scrollWidth") <= width
            assert [url for url in page.requests if url != path.as_uri()] in ([], ["about:blank"])
            lightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"
            assert (int(page.value(lightness)) < 128) is dark
    assert not page.complaints


def test_no_script_of_the_data_runs(page: Page, tmp_path):
    for n, hostile in enumerate(HOSTILE):
        words = (hostile, " two", " three")
        page.open(written(single(words, name=hostile), tmp_path / str(n)))
        assert page.value("window.hit") is None
    assert not page.complaints
