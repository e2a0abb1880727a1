"""Histograms of stored laws, against the slow obvious count."""

from pathlib import Path

import numpy as np
import pytest

from storage.codecs import decode_p, from_bf16_bits
from storage.layout import Layout
from storage.reader import Cache
from storage.record import Record, supervised
from storage.survey import BINS, survey
from tests.storage.samples import FULL, TOPK, make_records, write_cache


def entropies(record: Record) -> list[float]:
    """Row by row, id by id."""
    found = []
    entry = sample = row = 0
    for t in range(len(record.tokens)):
        if not supervised(record.turn)[t]:
            continue
        if record.logits is not None:
            value = from_bf16_bits(record.logits[row]).astype(np.float64)
            p = np.exp(value) / np.exp(value).sum()
            found.append(-sum(x * np.log(x) for x in p))
            row += 1
            continue
        kept, drawn = int(record.kept[t]), int(record.tail_kept[t])
        p = decode_p(record.topk_p[entry : entry + kept]).astype(np.float64)
        r = np.exp(float(record.tail_logp_mass[t]))
        h = -sum(x * np.log(x) for x in p if x > 0)
        if drawn:
            h += r * -record.tail_logp[sample : sample + drawn].astype(np.float64).mean()
        elif r > 0:
            h -= r * np.log(r)
        found.append(h)
        entry, sample = entry + kept, sample + drawn
    return found


@pytest.mark.parametrize("layout", [TOPK, FULL], ids=["topk", "full"])
def test_every_supervised_row_is_counted_once_in_its_domain(tmp_path: Path, layout: Layout) -> None:
    records = make_records(layout, [30, 12, 60, 25, 1, 40])
    cache = Cache.open(write_cache(tmp_path / "c.zarr", layout, records, part_tokens=70))
    found = survey(cache)
    assert found.parts == cache.num_parts > 1
    for name in ("code", "prose", "maths"):
        own = [r for r in records if r.domain == name]
        values = [h for record in own for h in entropies(record)]
        tally = found.domains[name]
        assert tally.rows == len(values)
        assert tally.sums["entropy"] == pytest.approx(sum(values), rel=1e-5)
        rows = [supervised(r.turn) for r in own]
        logp = sum(r.token_logp[m].sum(dtype=np.float64) for r, m in zip(own, rows, strict=True))
        assert tally.logp == pytest.approx(logp, rel=1e-6)
        if layout is TOPK:
            kept = np.concatenate([r.kept[m] for r, m in zip(own, rows, strict=True)])
            assert tally.sums["kept"] == kept.sum()
            labels = dict(zip(BINS["kept"].labels, tally.counts["kept"].tolist(), strict=True))
            assert labels["0"] == (kept == 0).sum()
            assert labels["1"] == (kept == 1).sum()
            assert labels["5-8"] == ((kept >= 5) & (kept <= 8)).sum()
    whole = found.whole
    assert whole.rows == cache.manifest.counts["row"]
    for measure in found.measures:
        assert whole.counts[measure].sum() == whole.rows


def test_a_long_cache_is_sampled(tmp_path: Path) -> None:
    cache = Cache.open(
        write_cache(tmp_path / "c.zarr", TOPK, make_records(TOPK, [9] * 12), part_tokens=9)
    )
    found = survey(cache, max_parts=4)
    assert (found.parts, cache.num_parts) == (4, 12)
    assert 0 < found.whole.rows < cache.manifest.counts["row"]


def test_bins_are_labelled_one_by_one() -> None:
    for bins in BINS.values():
        assert len(bins.edges) == len(bins.labels) == len(bins.ticks)
        assert list(bins.edges) == sorted(bins.edges)
