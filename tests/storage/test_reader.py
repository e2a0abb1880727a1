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
import storage.writer
from storage.codecs import bf16_bits, from_bf16_bits
from storage.errors import CorruptPart, FingerprintMismatch, MissingManifest, NewerFormat
from storage.layout import Layout
from storage.reader import Cache
from storage.record import Record, supervised
from storage.shard import Shard
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
    decode = Cache._decode

    def counted(self: Cache, part: int, name: str, read: Any) -> Any:
        if getattr(read, "func", read).__name__ in ("read_chunk", "read_all"):
            reads.append((part, name))
        return decode(self, part, name, read)

    monkeypatch.setattr(Cache, "_decode", counted)
    for keep_bytes, times in ((1 << 20, 1), (1, 2)):
        cache = Cache.open(cache_path, keep_bytes=keep_bytes)
        for _ in range(2):
            list(cache.epoch(0))
        assert reads.count((0, "tokens")) >= times
        assert (reads.count((0, "hidden")) == 1) == (times == 1)
        assert len(cache._decoded) == 1 or cache._held_bytes <= keep_bytes
        reads.clear()


@pytest.mark.parametrize(
    "pipeline", ["zarrs.ZarrsCodecPipeline", "zarr.core.codec_pipeline.BatchedCodecPipeline"]
)
def test_zarr_reads_the_same(
    cache_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: str
) -> None:
    cache = Cache.open(cache_path)
    fast, window = cache.records(range(len(LENGTHS))), cache.window(7, 20, 70)
    assert "zarrs" in str(storage.reader.READ)
    monkeypatch.setattr(storage.reader, "READ", {"codec_pipeline.path": pipeline})
    monkeypatch.setattr(storage.reader, "open_shard", lambda _, **__: None)
    other = Cache.open(cache_path)
    assert_same(other.records(range(len(LENGTHS))), fast)
    assert_same([other.window(7, 20, 70)], [window])


def sliced(record: Record, start: int, stop: int) -> Record:
    """The obvious window: token by token, without the law of the last."""
    columns: dict[str, list[Any]] = {name: [] for name in ("ids", "p", "drawn", "logp", "rows")}
    entry, sample, row = 0, 0, 0
    rows = supervised(record.turn)
    for t in range(stop):
        kept, drawn = int(record.kept[t]), int(record.tail_kept[t])
        if start <= t < stop - 1:
            columns["ids"] += record.topk_ids[entry : entry + kept].tolist()
            columns["p"] += record.topk_p[entry : entry + kept].tolist()
            columns["drawn"] += record.tail_ids[sample : sample + drawn].tolist()
            columns["logp"] += record.tail_logp[sample : sample + drawn].tolist()
            if record.logits is not None and rows[t]:
                columns["rows"].append(record.logits[row])
        entry, sample, row = entry + kept, sample + drawn, row + int(rows[t])

    def cut(value: Any) -> Any:
        return None if value is None else value[start:stop]

    def law(value: Any) -> Any:
        out = value[start:stop].copy()
        out[-1] = 0
        return out

    width = record.logits.shape[1] if record.logits is not None else 0
    return Record(
        id=record.id,
        domain=record.domain,
        tokens=cut(record.tokens),
        turn=cut(record.turn),
        token_logp=law(record.token_logp),
        kept=law(record.kept),
        topk_ids=np.array(columns["ids"], dtype=np.uint32),
        topk_p=np.array(columns["p"], dtype=np.uint16),
        tail_logp_mass=law(record.tail_logp_mass),
        tail_kept=law(record.tail_kept),
        tail_ids=np.array(columns["drawn"], dtype=np.uint32),
        tail_logp=np.array(columns["logp"], dtype=np.float16),
        logits=None
        if record.logits is None
        else np.array(columns["rows"], dtype=np.uint16).reshape(-1, width),
        hidden=cut(record.hidden),
        last_hidden=cut(record.last_hidden),
    )


@pytest.mark.parametrize("layout", [TOPK, FULL], ids=["topk", "full"])
def test_a_window_is_a_sound_record_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    monkeypatch.setattr(storage.writer, "chunk_length", lambda *_, **__: 16)
    records = make_records(layout, LENGTHS)
    path = write_cache(tmp_path / "c.zarr", layout, records)
    spans = [(0, 0, 30), (7, 0, 1), (7, 3, 4), (7, 15, 33), (7, 40, 90), (2, 0, 79), (4, 31, 60)]
    for keep_bytes in (1, 1 << 20):
        cache = Cache.open(path, keep_bytes=keep_bytes)
        for sequence, start, stop in spans:
            found = cache.window(sequence, start, stop)
            found.check(layout)
            assert_same([found], [sliced(records[sequence], start, stop)])
            assert not found.tokens.flags.writeable
            assert not found.kept.flags.writeable
        with pytest.raises(IndexError, match="tokens 3 to 91 of 90, sequence 7"):
            cache.window(7, 3, 91)
        with pytest.raises(IndexError, match="sequence 10 of 10"):
            cache.window(10, 0, 1)


def test_a_window_decodes_its_chunks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.writer, "chunk_length", lambda *_, **__: 16)
    path = write_cache(tmp_path / "c.zarr", TOPK, make_records(TOPK, [800]), part_tokens=900)
    cache = Cache.open(path)
    read: list[int] = []
    chunk = Shard.read_chunk

    def counted(self: Shard, number: int, **options: Any) -> Any:
        read.append(number)
        return chunk(self, number, **options)

    monkeypatch.setattr(Shard, "read_chunk", counted)
    window = cache.window(0, 400, 440, arrays={"hidden"})
    assert window.hidden is not None
    assert sorted(read) == [25, 26, 27]


def test_counts_that_do_not_add_up_are_refused(
    cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never cut by offsets that the manifest contradicts, even where every digest matches."""
    read = Cache._read

    def altered(self: Cache, part: int, name: str) -> Any:
        return read(self, part, name) + (name == "kept")

    monkeypatch.setattr(Cache, "_read", altered)
    with pytest.raises(CorruptPart, match=r"part-00000/kept adds up to \d+, the manifest says"):
        Cache.open(cache_path).records([0])


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
    for values in ({"format": "zarr"}, {"format": "lkcache", "version": "1"}, {"version": 0}):
        edit_manifest(path, **values)
        with pytest.raises(
            CorruptPart, match=r"cannot be read \(ValueError: format '\w+', version"
        ):
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
