import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.dataset import training_batches
from pipeline.draft import Needs
from pipeline.seeds import rng
from storage.errors import DataError, FingerprintMismatch
from storage.reader import Cache
from storage.record import Record
from storage.stream import Stream
from tests.storage.samples import TOPK, make_records, write_cache
from tests.storage.test_reader import LENGTHS, assert_same

KINDS: list[dict[str, Any]] = [{"batch_sequences": 3}, {"pack_tokens": 100}, {"window_tokens": 16}]


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "train.zarr"
    return write_cache(path, TOPK, make_records(TOPK, LENGTHS), part_tokens=120)


def flat(batches: list[list[Record]]) -> list[Record]:
    return [record for batch in batches for record in batch]


def test_a_stream_is_the_order_that_training_reads(cache_path: Path) -> None:
    """What `training_batches` needs of it, so that wiring it in changes no byte."""
    cache = Cache.open(cache_path)
    batches = training_batches(
        cache, seed=3, batch_sequences=4, steps=7, needs=Needs(num_layers=2, last_hidden=False)
    )
    stream = Stream(
        cache,
        seed=lambda epoch: int(rng(3, "train", "epoch", epoch).integers(2**31)),
        batch_sequences=4,
        prefetch=1,
    )
    for batch, records in zip(batches, iter(stream), strict=False):
        assert list(batch.ids) == [record.id for record in records]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_read_disjoint_shares_that_cover_the_epoch(cache_path: Path, ranks: int) -> None:
    cache = Cache.open(cache_path)
    whole = [record.id for record in flat(list(islice(Stream(cache, seed=1), len(LENGTHS))))]
    shares = []
    for rank in range(ranks):
        mine = []
        stream = Stream(cache, seed=1, rank=rank, ranks=ranks)
        for batch in stream:
            if stream.state()["epoch"]:
                break
            mine += [record.id for record in batch]
        shares.append(mine)
    assert [name for mine in shares for name in mine] == whole
    assert sorted(whole) == sorted(cache.ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_resumed_stream_yields_exactly_the_rest(
    cache_path: Path, kind: dict[str, Any], prefetch: int
) -> None:
    cache = Cache.open(cache_path)
    options = {"seed": 5, "rank": 1, "ranks": 2, **kind}
    unbroken = list(islice(Stream(cache, **options), 12))
    for stop in (1, 4, 7):
        stream = Stream(cache, **options, prefetch=prefetch)
        first = list(islice(stream, stop))
        saved = json.loads(json.dumps(stream.state()))
        again = Stream(Cache.open(cache_path), **options, prefetch=prefetch).resume(saved)
        assert again.state() == saved
        rest = list(islice(again, 12 - stop))
        assert_same(flat(first + rest), flat(unbroken))


@pytest.mark.parametrize("kind", KINDS)
def test_neither_prefetching_nor_memory_moves_the_order(
    cache_path: Path, kind: dict[str, Any]
) -> None:
    plain = list(islice(Stream(Cache.open(cache_path), seed=2, **kind), 9))
    for keep_bytes, prefetch in ((1, 0), (1, 4), (1 << 20, 1)):
        cache = Cache.open(cache_path, keep_bytes=keep_bytes)
        found = list(islice(Stream(cache, seed=2, prefetch=prefetch, **kind), 9))
        assert_same(flat(found), flat(plain))


def test_packs_hold_whole_sequences_within_the_budget(cache_path: Path) -> None:
    cache = Cache.open(cache_path)
    stream, seen = Stream(cache, seed=4, pack_tokens=100), []
    for records in stream:
        if stream.state()["epoch"]:
            break
        assert sum(len(record.tokens) for record in records) <= 100
        seen += records
    by_id = {record.id: record for record in make_records(TOPK, LENGTHS)}
    assert sorted(record.id for record in seen) == sorted(by_id)
    assert_same(seen, [by_id[record.id] for record in seen])


def test_windows_of_ranks_together_are_those_of_one(cache_path: Path) -> None:
    cache = Cache.open(cache_path)
    count = -(-sum(LENGTHS) // 32)
    one = flat(list(islice(Stream(cache, seed=8, window_tokens=32), count)))
    for rank in range(3):
        own = Stream(cache, seed=8, rank=rank, ranks=3, window_tokens=32)
        mine = flat(list(islice(own, len(range(rank, count, 3)))))
        assert own.state()["epoch"] == 0
        assert_same(mine, one[rank::3])
    assert {len(record.tokens) for record in one} > {32}


def test_epochs_differ_and_streams_do_not_end(cache_path: Path) -> None:
    names = [r.id for r in flat(list(islice(Stream(Cache.open(cache_path), seed=0), 30)))]
    assert sorted(names[:10]) == sorted(names[10:20]) == sorted(names[20:])
    assert names[:10] != names[10:20]


def test_a_position_of_another_stream_is_refused(cache_path: Path, tmp_path: Path) -> None:
    cache = Cache.open(cache_path)
    saved = Stream(cache, seed=1).state()
    for name, options in (
        ("seed", {"seed": 2}),
        ("ranks", {"seed": 1, "ranks": 2}),
        ("window_tokens", {"seed": 1, "window_tokens": 8}),
    ):
        with pytest.raises(FingerprintMismatch, match=rf"a position in a stream of {name} .*; ex"):
            Stream(cache, **options).resume(saved)  # type: ignore[arg-type]
    other = Cache.open(write_cache(tmp_path / "o.zarr", TOPK, make_records(TOPK, [9])))
    with pytest.raises(
        FingerprintMismatch, match=r"of cache .* resume with the parameters and the"
    ):
        Stream(other, seed=1).resume(saved)


def test_a_sequence_longer_than_a_pack_is_refused_before_reading(cache_path: Path) -> None:
    with pytest.raises(DataError, match=r"sequence 7 \('sequence-7-é'\) has 90 tokens; expected"):
        Stream(Cache.open(cache_path), seed=0, pack_tokens=80)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 2, "ranks": 2}, "rank 2 of 2"),
        ({"window_tokens": 1}, "window_tokens 1; expected at least 2"),
        ({"batch_sequences": 0}, "batch_sequences 0; expected at least 1"),
        ({"pack_tokens": 99, "window_tokens": 9}, "neither windows nor batch_sequences"),
    ],
)
def test_senseless_options_are_refused(
    cache_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        Stream(Cache.open(cache_path), seed=0, **options)


def test_an_empty_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.zarr").mkdir()
    path = write_cache(tmp_path / "c.zarr", TOPK, [])
    with pytest.raises(DataError, match=r"c.zarr without sequences; expected at least one"):
        Stream(Cache.open(path), seed=0)


def test_decoded_bytes_stay_within_the_bound(tmp_path: Path) -> None:
    """Of a cache many times larger than what may be kept, however it is read."""
    path = write_cache(tmp_path / "c.zarr", TOPK, make_records(TOPK, [200] * 16), part_tokens=800)
    largest = 25_600  # a part's hidden states, one chunk here
    for kind in KINDS:
        options = {**kind, **({"pack_tokens": 400} if "pack_tokens" in kind else {})}
        cache = Cache.open(path, keep_bytes=40_000)
        held = []
        for _ in islice(Stream(cache, seed=0, **options), 15):
            kept = sum(value.nbytes for value in cache._decoded.values())
            assert kept == cache._held_bytes
            held.append(kept)
        assert max(held) <= 40_000 + largest
        assert np.ptp(held[-5:]) < 40_000
