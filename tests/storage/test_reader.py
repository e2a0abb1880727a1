import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storage.reader
from storage.codecs import bf16_bits, from_bf16_bits
from storage.errors import CorruptPart, FingerprintMismatch, MissingManifest, NewerFormat
from storage.layout import Layout
from storage.reader import Cache
from storage.record import Record
from storage.verify import check_cache
from storage.workspace import file_digest
from tests.storage.samples import FULL, SOURCE, TOPK, make_records, write_cache

LENGTHS = [30, 1, 80, 25, 60, 7, 44, 90, 3, 12]


def assert_same(found: Sequence[Record], wanted: Sequence[Record]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        for field in fields(Record):
            left, right = getattr(one, field.name), getattr(other, field.name)
            if isinstance(right, np.ndarray):
                np.testing.assert_array_equal(left, right)
                assert left.dtype == right.dtype
            else:
                assert left == right


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "train.zarr"
    return write_cache(path, TOPK, make_records(TOPK, LENGTHS))


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    part_tokens=st.integers(10, 90),
    mode=st.sampled_from(["topk", "full", "rebuild"]),
    num_layers=st.integers(0, 2),
    last_hidden=st.booleans(),
    vocab_size=st.integers(2, 40),
    hidden_dtype=st.sampled_from(["bfloat16", "int8"]),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_was_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    part_tokens: int,
    mode: str,
    num_layers: int,
    last_hidden: bool,
    vocab_size: int,
    hidden_dtype: str,
) -> None:
    last_hidden = last_hidden or mode == "rebuild"
    layout = Layout(mode, vocab_size, 4, tuple(range(num_layers)), last_hidden, hidden_dtype)
    records = make_records(layout, lengths, seed=len(lengths))
    path = tmp_path_factory.mktemp("round") / "x.zarr"
    write_cache(path, layout, records, part_tokens=part_tokens)
    cache = Cache.open(path)
    assert_same(cache.records(range(len(lengths))), records)
    assert check_cache(path) == []
    assert cache.lengths.tolist() == lengths
    assert (cache.layout, cache.num_tokens) == (layout, sum(lengths))


@pytest.mark.parametrize("vocab_size", [151_936, 201_088, 2**32 - 1])
def test_any_vocabulary_below_2_to_the_32_is_kept_exactly(tmp_path: Path, vocab_size: int) -> None:
    layout = Layout("topk", vocab_size, 4, (), False)
    record = make_records(layout, [20])[0]
    record.tokens[0] = vocab_size - 1
    record.topk_ids[-1:] = vocab_size - 1
    path = write_cache(tmp_path / "c.zarr", layout, [record])
    assert_same(Cache.open(path).records([0]), [record])


def test_a_bfloat16_hidden_state_round_trips_exactly(tmp_path: Path) -> None:
    record = make_records(TOPK, [16])[0]
    assert record.hidden is not None
    value = from_bf16_bits(record.hidden)
    value[0, 0, :4] = [0.0, -0.0, 1e-40, 3.3895314e38]  # zeros, a subnormal, the largest bfloat16
    record.hidden[:] = bf16_bits(value)
    path = write_cache(tmp_path / "c.zarr", TOPK, [record])
    stored = Cache.open(path).records([0], arrays={"hidden"})[0].hidden
    assert stored is not None
    np.testing.assert_array_equal(stored, record.hidden)


def test_records_come_in_the_order_asked_for(cache_path: Path) -> None:
    cache, records = Cache.open(cache_path, keep_bytes=1), make_records(TOPK, LENGTHS)
    order = [9, 0, 4, 4, 7, 1]
    assert_same(cache.records(order), [records[index] for index in order])
    assert cache.records([]) == []
    with pytest.raises(IndexError, match="sequences 0 to 10 of 10"):
        cache.records([0, 10])


def test_a_cache_is_indexed_without_its_tokens(cache_path: Path) -> None:
    cache = Cache.open(cache_path)
    assert cache.ids == [record.id for record in make_records(TOPK, LENGTHS)]
    assert cache.domains[:4] == ["code", "prose", "maths", "code"]
    assert cache.num_sequences == len(LENGTHS)
    assert cache.source == SOURCE


def test_arrays_not_asked_for_are_empty_or_none(cache_path: Path) -> None:
    record = Cache.open(cache_path).records([2], arrays={"tokens", "topk_p"})[0]
    assert len(record.tokens) == 80
    assert len(record.kept) == 80  # it counts topk_p
    assert len(record.topk_p) == record.kept.sum()
    assert (len(record.topk_ids), len(record.turn), record.hidden) == (0, 0, None)
    with pytest.raises(ValueError, match=r"unknown arrays \['topk_logp'\]"):
        Cache.open(cache_path).records([0], arrays={"topk_logp"})


def test_records_cannot_be_written_to(cache_path: Path) -> None:
    record = Cache.open(cache_path).records([0])[0]
    with pytest.raises(ValueError, match="read-only"):
        record.tokens[0] = 1


def test_an_epoch_shuffles_parts_and_sequences_by_its_seed(cache_path: Path) -> None:
    cache, records = Cache.open(cache_path), make_records(TOPK, LENGTHS)
    orders = [[record.id for record in cache.epoch(seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    by_id = {record.id: record for record in records}
    assert sorted(orders[2]) == sorted(by_id)
    assert_same(list(cache.epoch(1)), [by_id[name] for name in orders[2]])


def test_decoded_parts_are_kept_within_the_bound(
    cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[int, str]] = []
    read = Cache._read

    def counted(self: Cache, part: int, name: str) -> Any:
        reads.append((part, name))
        return read(self, part, name)

    monkeypatch.setattr(Cache, "_read", counted)
    for keep_bytes, times in ((1 << 20, 1), (1, 2)):
        cache = Cache.open(cache_path, keep_bytes=keep_bytes)
        for _ in range(2):
            list(cache.epoch(0))
        assert reads.count((0, "hidden")) == times
        reads.clear()


def test_the_default_pipeline_reads_the_same(
    cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = Cache.open(cache_path).records(range(len(LENGTHS)))
    assert "zarrs" in str(storage.reader.READ)
    pipeline = {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
    monkeypatch.setattr(storage.reader, "READ", pipeline)
    assert_same(Cache.open(cache_path).records(range(len(LENGTHS))), fast)


def test_full_logits_are_cut_by_supervised_rows(tmp_path: Path) -> None:
    records = make_records(FULL, LENGTHS)
    path = write_cache(tmp_path / "c.zarr", FULL, records)
    found = Cache.open(path).records([7, 2], arrays={"logits"})
    for one, index in zip(found, (7, 2), strict=True):
        np.testing.assert_array_equal(one.logits, records[index].logits)


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingManifest, match=r"no folder .*; expected a finished cache"):
        Cache.open(tmp_path / "none.zarr")
    path = write_cache(tmp_path / "c.zarr", TOPK, make_records(TOPK, [5]))
    (path / "manifest.json").unlink()
    with pytest.raises(MissingManifest, match=r"manifest.json does not exist; .* run dvc repro"):
        Cache.open(path)


def edit_manifest(path: Path, **changes: object) -> None:
    """Change the manifest and restate its digest, as a newer writer would."""
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))
    (path / "manifest.sha256").write_text(f"{file_digest(manifest)}  manifest.json\n")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "c.zarr", TOPK, make_records(TOPK, [5]))
    edit_manifest(path, version=2, layout="of another shape")
    with pytest.raises(NewerFormat, match="version 2; expected version 1 or older; update"):
        Cache.open(path)


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "c.zarr", TOPK, make_records(TOPK, [5]))
    edit_manifest(path, layout={"mode": "topk"})
    with pytest.raises(CorruptPart, match=r"manifest.json cannot be read \(KeyError"):
        Cache.open(path)


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "c.zarr", TOPK, make_records(TOPK, [5]))
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("t" * 64, "u" * 64))
    with pytest.raises(CorruptPart, match=r"manifest.json has sha256 .* what manifest.sha256 says"):
        Cache.open(path, expect={"target": "u" * 64})


def test_another_source_is_refused_with_both_sides_named(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "c.zarr", TOPK, make_records(TOPK, [5]))
    assert Cache.open(path, expect={"target": "t" * 64}).num_sequences == 1
    with pytest.raises(FingerprintMismatch, match=r"target t{64}; expected target u{64}"):
        Cache.open(path, expect={"target": "u" * 64})
    with pytest.raises(FingerprintMismatch, match=r"tokenizer \(not stated\)"):
        Cache.open(path, expect={"tokenizer": "x"})
