import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import storage.writer
from storage.errors import CacheError
from storage.layout import Layout
from storage.record import Record, supervised
from storage.verify import check_cache
from tests.storage.samples import EIGHT, FULL, REBUILD, TOPK, make_records, write_cache


def changed(array: Any, value: object, at: int = 0) -> Any:
    copy = array.copy()
    copy[at] = value
    return copy


def doubled(record: Record) -> dict[str, Any]:
    """The first id of the first token that keeps two, twice."""
    token = int(np.flatnonzero(record.kept >= 2)[0])
    first = int(record.kept[:token].sum())
    return {"topk_ids": changed(record.topk_ids, record.topk_ids[first], first + 1)}


def sampled_kept(record: Record) -> dict[str, Any]:
    token = int(np.flatnonzero((record.kept > 0) & (record.tail_kept > 0))[0])
    kept = record.topk_ids[int(record.kept[:token].sum())]
    return {"tail_ids": changed(record.tail_ids, kept, int(record.tail_kept[:token].sum()))}


def without_data(record: Record) -> dict[str, Any]:
    """As a capture that forgot to fill its rows."""
    zeros = {name: np.zeros_like(getattr(record, name)) for name in (
        "kept", "tail_kept", "token_logp", "tail_logp_mass")}  # fmt: skip
    entries = {name: getattr(record, name)[:0] for name in (
        "topk_ids", "topk_p", "tail_ids", "tail_logp")}  # fmt: skip
    return zeros | entries


def shifted(record: Record) -> dict[str, Any]:
    """Laws one position late, the classic off-by-one of teacher forcing."""
    rows = np.flatnonzero(supervised(record.turn))
    logp = record.token_logp.copy()
    logp[rows] = np.roll(logp[rows], 1)
    return {"token_logp": logp}


@pytest.mark.parametrize(
    ("damage", "array", "sentence"),
    [
        (lambda r: {"tokens": changed(r.tokens, 64)}, "tokens", "the id 64, vocabulary 64"),
        (lambda r: {"topk_ids": changed(r.topk_ids, 70)}, "topk_ids", "the id 70"),
        (lambda r: {"topk_p": changed(r.topk_p, 1023)}, "topk_p", "do not sum to 1"),
        (doubled, "topk_ids", "an id twice in one token"),
        (sampled_kept, "tail_ids", "must come from the tail"),
        (shifted, "token_logp", "contradicts topk_p at"),
        (without_data, "kept", "supervised tokens hold no data"),
        (lambda r: {"token_logp": changed(r.token_logp, -1, -1)}, "token_logp", "at 1 unsu"),
        (lambda r: {"token_logp": changed(r.token_logp, 0.5, -2)}, "token_logp", "at most 0"),
        (lambda r: {"token_logp": changed(r.token_logp, np.nan, -2)}, "token_logp", "NaN"),
        (lambda r: {"hidden": changed(r.hidden, 0x7FC0)}, "hidden", "NaN or an infinity"),
        (lambda r: {"topk_p": r.topk_p[:-1]}, "", r"part-00001/topk_p is \(\d+,\) uint16, not"),
        (lambda r: {"kept": changed(r.kept, 1)}, "topk_ids", r"holds \d+ values, kept counts \d+"),
        (lambda r: {"tail_kept": changed(r.tail_kept, 1)}, "tail_ids", "tail_kept counts"),
        (lambda r: {"id": "sequence-0-é"}, "id", "1 ids occur twice, among them 'sequence-0-é'"),
    ],
)
def test_unsound_content_is_found_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, array: str, sentence: str
) -> None:
    records = make_records(TOPK, [9, 20, 30])
    assert len(records[2].tail_ids)
    monkeypatch.setattr(Record, "check", lambda *_: None)  # a writer with a bug
    records[2] = replace(records[2], **damage(records[2]))
    path = write_cache(tmp_path / "c.zarr", TOPK, records, part_tokens=30)
    findings = check_cache(path)
    assert findings[0].array == array
    assert re.search(sentence, str(findings[0]))
    assert findings[0].part == ("" if array == "id" else "part-00001")


def risen(record: Record) -> dict[str, Any]:
    """A token's first two entries, ids and codes, in the wrong order."""
    code, ends = record.topk_p.astype(int), record.kept.cumsum()
    falls = [int(e - k) for k, e in zip(record.kept, ends, strict=True) if k >= 2]
    first = next(at for at in falls if code[at] > code[at + 1])
    swapped = [first + 1, first]
    both = {}
    for name in ("topk_ids", "topk_p"):
        array = getattr(record, name).copy()
        array[[first, first + 1]] = array[swapped]
        both[name] = array
    return both


@pytest.mark.parametrize(
    ("damage", "array", "sentence"),
    [
        (risen, "topk_p", "rises within a token 1 times"),
        (
            lambda r: {"tail_logp": changed(r.tail_logp, np.float16(-0.01))},
            "tail_logp",
            "1 samples that are likelier than an id that is kept",
        ),
        (lambda r: {"topk_p": changed(r.topk_p, 1024)}, "topk_p", "the code 1024, largest 1023"),
    ],
)
def test_kept_ids_are_the_likeliest_in_falling_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, array: str, sentence: str
) -> None:
    record = make_records(TOPK, [30], seed=3)[0]
    token = int(np.flatnonzero(record.tail_kept)[0])
    assert record.kept[token] > 1
    monkeypatch.setattr(Record, "check", lambda *_: None)
    path = write_cache(tmp_path / "c.zarr", TOPK, [replace(record, **damage(record))])
    (finding,) = check_cache(path)
    assert finding.array == array
    assert sentence in str(finding)


@pytest.mark.parametrize(
    ("layout", "damage", "array", "sentence"),
    [
        (EIGHT, lambda r: {"hidden_scale": changed(r.hidden_scale, 0)}, "hidden_scale", "scale"),
        (
            EIGHT,
            lambda r: {"last_hidden_scale": changed(r.last_hidden_scale, np.nan)},
            "last_hidden_scale",
            "holds a scale that is not positive and finite",
        ),
        (
            REBUILD,
            lambda r: {
                "kept": changed(r.kept, 1, -2),
                "topk_ids": np.zeros(1, np.uint32),
                "topk_p": np.zeros(1, np.uint16),
            },
            "kept",
            "counts entries in a cache of whole laws (mode rebuild)",
        ),
    ],
)
def test_each_mode_has_its_own_unsoundness(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: Layout,
    damage: Any,
    array: str,
    sentence: str,
) -> None:
    record = make_records(layout, [20], seed=4)[0]
    assert check_cache(write_cache(tmp_path / "a.zarr", layout, [record])) == []
    broken = replace(record, **damage(record))
    if array != "kept":
        with pytest.raises(CacheError, match=f"{array} is not positive and finite"):
            broken.check(layout)
    monkeypatch.setattr(Record, "check", lambda *_: None)
    findings = check_cache(write_cache(tmp_path / "b.zarr", layout, [broken]))
    assert findings[0].array == array
    assert sentence in str(findings[0])


def test_full_logits_need_a_row_for_every_supervised_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_records(FULL, [20], seed=4)[0]
    assert record.logits is not None
    monkeypatch.setattr(Record, "check", lambda *_: None)
    short = replace(record, logits=record.logits[:-1])
    path = write_cache(tmp_path / "a.zarr", FULL, [short])
    assert "part-00000/logits is (" in str(check_cache(path)[0])
    counts = storage.writer._counts
    stated = {"row": len(record.logits) - 1}
    monkeypatch.setattr(storage.writer, "_counts", lambda *of: counts(*of) | stated)
    path = write_cache(tmp_path / "b.zarr", FULL, [short])
    assert "supervised tokens, the manifest counts" in str(check_cache(path)[0])


def test_a_strange_file_is_found(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "c.zarr", TOPK, make_records(TOPK, [9]))
    assert check_cache(path) == []
    (path / "notes.txt").write_text("mine")
    assert [str(f) for f in check_cache(path)] == ["notes.txt: is not in the manifest"]


def test_no_cache_is_a_finding(tmp_path: Path) -> None:
    assert "expected a finished cache" in str(check_cache(tmp_path / "none")[0])
