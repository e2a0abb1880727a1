"""Two caches: equal where they hold the same, and every difference told and measured."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from storage.codecs import bf16_bits, decode_p, encode_p, from_bf16_bits
from storage.diff import Diff, diff
from storage.layout import Layout
from storage.reader import Cache
from storage.record import Record, supervised
from tests.storage.samples import FULL, SOURCE, TOPK, make_records, write_cache

LENGTHS = [30, 12, 40, 25]


def compared(
    folder: Path,
    left: list[Record],
    right: list[Record],
    layouts: tuple[Layout, Layout] = (TOPK, TOPK),
) -> Diff:
    a = write_cache(folder / "a.zarr", layouts[0], left)
    b = write_cache(folder / "b.zarr", layouts[1], right)
    return diff(Cache.open(a), Cache.open(b))


def test_a_cache_equals_itself_whatever_its_parts(tmp_path: Path) -> None:
    records = make_records(TOPK, LENGTHS)
    a = Cache.open(write_cache(tmp_path / "a.zarr", TOPK, records))
    again = Cache.open(write_cache(tmp_path / "c.zarr", TOPK, records))
    found = diff(a, again)
    assert found.equal
    assert found.same_bytes
    b = Cache.open(write_cache(tmp_path / "b.zarr", TOPK, records[::-1], part_tokens=30))
    found = diff(a, b)
    assert not found.same_bytes
    assert not found.equal  # other parts are other coverage and bytes …
    assert {row.what for row in found.identity if not row.equal} == set()
    assert "parts" in {row.what for row in found.coverage if not row.equal}
    assert found.values.compared == len(LENGTHS)
    assert found.values.unequal == found.values.other_tokens == []  # … of the same numbers
    assert all(gap.largest == 0 and gap.count > 0 for gap in found.values.gaps.values())
    assert set(found.values.gaps) == {"token_logp", "law", "hidden", "last_hidden"}


def test_identity_names_source_and_layout(tmp_path: Path) -> None:
    records = make_records(TOPK, LENGTHS)
    a = Cache.open(write_cache(tmp_path / "a.zarr", TOPK, records))
    other = {**SOURCE, "target": "u" * 64, "law": "T=1"}
    b = Cache.open(write_cache(tmp_path / "b.zarr", TOPK, records, source=other))
    rows = {row.what: (row.a, row.b) for row in diff(a, b).identity if not row.equal}
    assert rows == {"source target": ("t" * 64, "u" * 64), "source law": ("absent", "T=1")}


def test_values_are_measured_where_texts_agree(tmp_path: Path) -> None:
    left = make_records(TOPK, LENGTHS)
    right = list(left)
    rows = supervised(left[0].turn)
    at = int(np.flatnonzero(rows)[0])
    logp = left[0].token_logp.copy()
    logp[at] -= 0.25
    hidden = from_bf16_bits(left[0].hidden)
    hidden[3, 1, 2] += 2.0
    right[0] = replace(left[0], token_logp=logp, hidden=bf16_bits(hidden))
    tokens = left[1].tokens.copy()
    tokens[0] ^= 1
    right[1] = replace(left[1], tokens=tokens)
    right[3] = replace(left[3], id="another")
    values = compared(tmp_path, left, right).values
    assert (values.only_a, values.only_b, values.shared) == (1, 1, 3)
    assert values.unequal == [left[0].id]
    assert values.other_tokens == [left[1].id]
    assert values.gaps["token_logp"].largest == pytest.approx(0.25)
    assert values.gaps["hidden"].largest == pytest.approx(2.0, rel=0.01)
    count = int(rows.sum() + supervised(left[2].turn).sum())
    assert values.gaps["token_logp"].count == count
    assert values.gaps["token_logp"].mean == pytest.approx(0.25 / count)


def slow_tv(a: Record, b: Record) -> list[float]:
    """Merged to the ids that both keep, in dictionaries."""
    found = []
    for t in np.flatnonzero(supervised(a.turn)):
        laws = []
        for record in (a, b):
            start, stop = (int(record.kept[:k].sum()) for k in (t, t + 1))
            p = decode_p(record.topk_p[start:stop]).astype(float)
            laws.append(dict(zip(record.topk_ids[start:stop].tolist(), p, strict=True)))
        shared = laws[0].keys() & laws[1].keys()
        rest = abs(sum(laws[0][i] for i in shared) - sum(laws[1][i] for i in shared))
        found.append(0.5 * (sum(abs(laws[0][i] - laws[1][i]) for i in shared) + rest))
    return found


def test_truncated_laws_are_compared_on_the_ids_that_both_keep(tmp_path: Path) -> None:
    left = make_records(TOPK, LENGTHS)
    right = []
    for record in left:
        p = decode_p(record.topk_p)
        flat = encode_p(p * 0.9)
        right.append(replace(record, topk_p=flat))
    expected = [tv for a, b in zip(left, right, strict=True) for tv in slow_tv(a, b)]
    gap = compared(tmp_path, left, right).values.gaps["law"]
    assert gap.count == len(expected)
    assert gap.largest == pytest.approx(max(expected))
    assert gap.mean == pytest.approx(np.mean(expected))


def test_a_full_law_stands_for_a_truncated_one(tmp_path: Path) -> None:
    """Full logits of the very laws that the other cache truncates: TV is the codes' rounding."""
    full_layout, sparse_layout = (
        Layout(mode, FULL.vocab_size, FULL.hidden_size, (), False) for mode in ("full", "topk")
    )
    rng = np.random.default_rng(0)
    sparse, full = [], []
    for base in make_records(full_layout, LENGTHS):
        rows = supervised(base.turn)
        law = rng.dirichlet(np.full(64, 0.2), int(rows.sum())).clip(1e-9)
        law /= law.sum(axis=1, keepdims=True)
        order = np.argsort(-law, axis=1)[:, :5]
        p = np.take_along_axis(law, order, axis=1)
        kept, tail = np.zeros(len(rows), np.uint16), np.zeros(len(rows), np.float32)
        kept[rows], tail[rows] = 5, np.log(1 - p.sum(axis=1))
        full.append(replace(base, logits=bf16_bits(np.log(law))))
        fields = {"topk_ids": order.ravel().astype(np.uint32), "topk_p": encode_p(p.ravel())}
        sparse.append(replace(base, logits=None, kept=kept, tail_logp_mass=tail, **fields))
    found = compared(tmp_path, full, sparse, (full_layout, sparse_layout))
    assert 0 < found.values.gaps["law"].largest < 0.02
    assert len(found.values.unequal) == len([r for r in full if supervised(r.turn).any()])
    again = compared(tmp_path / "f", full, full, (full_layout, full_layout))
    assert again.values.gaps["law"].largest == 0


def test_a_sample_is_spread_over_the_shared_sequences(tmp_path: Path) -> None:
    records = make_records(TOPK, [8] * 20)
    a = Cache.open(write_cache(tmp_path / "a.zarr", TOPK, records))
    b = Cache.open(write_cache(tmp_path / "b.zarr", TOPK, records[:-1]))
    values = diff(a, b, sequences=5).values
    assert (values.shared, values.compared) == (19, 5)
