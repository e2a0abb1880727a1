"""The page of a cache: whole, safe, reachable, bounded, and the same every time."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lkcache.cache_page import ALTERNATIVES, PAGE_TOKENS, build, choose
from lkcache.inspect import inspect
from storage.codecs import decode_p
from storage.errors import ConfigError
from storage.reader import Cache
from storage.record import supervised
from tests.storage.samples import FULL, TOPK, make_records, write_cache

EVIL = "</script><script>alert(1)</script><!-- & \u2028"
LENGTHS = [30, 12, 60, 41]


def word(number: int) -> str:
    return EVIL if number == 7 else f"w{number}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("page") / "train.zarr"
    source = {"target": "t" * 64, "law": EVIL}
    return Cache.open(write_cache(path, TOPK, make_records(TOPK, LENGTHS), source=source))


@pytest.fixture(scope="module")
def page(cache: Cache) -> str:
    return build(cache, word=word)


def data_of(page: str) -> dict[str, Any]:
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    found: dict[str, Any] = json.loads(block)
    return found


class Outline(HTMLParser):
    """Checks that tags close in order; keeps headings, ids and what asks for something else."""

    VOID = ("meta", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.scripts = 0
        self.labelled: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.ids += [given["id"]] if given.get("id") else []
        self.scripts += tag == "script"
        if tag == "svg" or given.get("role") in ("region", "group"):
            assert given.get("aria-label"), f"{tag} without a label"
        if tag == "label":
            self.labelled.append(str(given["for"]))
        assert not any(name.startswith("on") for name in given), f"{tag} runs a script"
        address = given.get("src") or given.get("href") or "#"
        assert address.startswith(("#", "data:")), f"{tag} asks for {address}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_sound_document_that_asks_for_nothing(page: str) -> None:
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(set(outline.ids)) == len(outline.ids)
    assert outline.labelled == ["sequence"]
    assert "default-src 'none'" in page
    assert "http:" not in page
    assert "https:" not in page
    assert "prefers-color-scheme: dark" in page


def test_texts_of_a_cache_are_never_markup(page: str) -> None:
    outline = Outline()
    outline.feed(page)
    assert outline.scripts == 2  # the data and the one script, whose digest the policy names
    assert EVIL not in page
    assert "&lt;/script&gt;" in page  # the source, in the document
    assert data_of(page)["words"]["7"] == EVIL  # the token, as data
    script = (Path("lkcache/templates/cache.js")).read_text(encoding="utf-8")
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
        assert unsafe not in script


def test_every_token_shows_what_the_cache_stores(cache: Cache, page: str) -> None:
    shown = {s["id"]: s for s in data_of(page)["sequences"]}
    assert set(shown) == set(cache.ids)
    for record in cache.records(range(len(LENGTHS))):
        sequence = shown[record.id]
        assert sequence["tokens"] == record.tokens.tolist()
        rows = supervised(record.turn)
        assert [row is not None for row in sequence["rows"]] == rows[:-1].tolist()
        for t in np.flatnonzero(rows):
            logp, kept, tail, ids, p, sample_ids, sample_p, rank = sequence["rows"][t]
            start, stop = (int(record.kept[:k].sum()) for k in (t, t + 1))
            all_ids, said = record.topk_ids[start:stop].tolist(), int(record.tokens[t + 1])
            assert logp == pytest.approx(float(record.token_logp[t]), abs=1e-4)
            assert kept == stop - start
            assert tail == pytest.approx(np.exp(float(record.tail_logp_mass[t])), rel=1e-3)
            assert rank == (1 + all_ids.index(said) if said in all_ids else 0)
            assert ids[:ALTERNATIVES] == all_ids[:ALTERNATIVES]
            assert (said in ids) == (said in all_ids)
            stored = decode_p(record.topk_p[start:stop])
            assert p == pytest.approx([float(stored[all_ids.index(i)]) for i in ids], rel=1e-3)
            first, last = (int(record.tail_kept[:k].sum()) for k in (t, t + 1))
            assert sample_ids == record.tail_ids[first:last].tolist()
            logs = record.tail_logp[first:last].astype(float)
            assert sample_p == pytest.approx(np.exp(logs).tolist(), rel=1e-3)


def test_the_page_depends_on_the_cache_alone(cache: Cache, page: str) -> None:
    assert build(Cache.open(cache.path), word=word) == page


def test_full_logits_show_their_largest(tmp_path: Path) -> None:
    records = make_records(FULL, [20, 9])
    cache = Cache.open(write_cache(tmp_path / "c.zarr", FULL, records))
    page = build(cache, word=word)
    row = next(row for s in data_of(page)["sequences"] for row in s["rows"] if row)
    assert row[1] is None
    assert row[4][:ALTERNATIVES] == sorted(row[4][:ALTERNATIVES], reverse=True)
    assert "Every logit is stored" in page


def test_a_mode_without_a_law_shows_what_was_said(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("storage.survey", "lkcache.cache_page"):
        monkeypatch.setattr(f"{module}.measures_of", lambda _: ())
    page = build(cache, word=word)
    rows = [row for s in data_of(page)["sequences"] for row in s["rows"] if row]
    assert all(row[1:] == [None, 0, [], [], [], [], None] for row in rows)
    assert "stores no law of its own" in page


def test_sequences_are_spread_over_domains_and_within_them() -> None:
    domains = ["a"] * 80 + ["b"] * 15 + ["c"]
    assert choose(domains, 5) == [20, 60, 83, 91, 95]
    assert choose(domains, 96) == list(range(96))
    assert choose(domains, 1000) == list(range(96))
    assert len(choose(domains, 40)) == 40


def test_long_sequences_are_cut_where_their_law_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lkcache.cache_page.PAGE_TOKENS", 60)
    monkeypatch.setattr("lkcache.cache_page.CONTEXT_TOKENS", 4)
    records = make_records(TOPK, [300, 200])
    cache = Cache.open(write_cache(tmp_path / "c.zarr", TOPK, records))
    for sequence in data_of(build(cache, word=word))["sequences"]:
        assert len(sequence["tokens"]) == 30
        record = next(r for r in records if r.id == sequence["id"])
        first = sequence["first"]
        assert sequence["tokens"] == record.tokens[first : first + 30].tolist()
        assert sequence["cut"] == len(record.tokens) - first - 30
        start = int(np.flatnonzero(supervised(record.turn))[0])
        assert first == min(max(0, start - 4), len(record.tokens) - 30)
    assert PAGE_TOKENS > 60


def test_inspect_writes_the_page(
    cache: Cache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    inspect(cache.path, html=True, sequences=3)
    assert "train.html: 3 sequences" in capsys.readouterr().out
    inspect(cache.path, Path("named.html"), html=True, sequences=3)
    assert Path("named.html").read_bytes() == Path("train.html").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["named.html", "train.html"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"file": Path("x.html")}, r"the file x.html without --html; .* --html x.html"),
        ({"html": True, "sequences": 0}, "--sequences 0; expected 1 to 200"),
        ({"html": True, "sequences": 201}, "--sequences 201; expected 1 to 200"),
        ({"html": True, "file": Path("none/x.html")}, "none/x.html lies in no folder"),
        ({"html": True, "file": Path()}, "is a folder; expected a file"),
    ],
)
def test_what_cannot_be_written_is_refused(
    cache: Cache, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        inspect(cache.path, **options)
