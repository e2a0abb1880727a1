import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import storage.writer
from storage.codecs import decode_int8, from_bf16_bits
from storage.errors import CacheError
from storage.layout import BITSHUFFLED
from storage.reader import Cache
from storage.verify import check_cache
from storage.workspace import tree_digest
from storage.writer import done_part, plan_parts, seal, write_part
from tests.storage.samples import EIGHT, FULL, SOURCE, TOPK, make_records, write_cache
from tests.storage.test_reader import assert_same

LENGTHS = [30, 1, 80, 25, 60, 7, 44, 90, 3, 12]
ROOT = Path(__file__).parents[2]


@given(st.lists(st.integers(1, 50)), st.integers(1, 120))
def test_parts_tile_the_sequences_whole_and_bounded(lengths: list[int], part_tokens: int) -> None:
    plan = plan_parts(lengths, part_tokens=part_tokens)
    assert [i for start, stop in plan for i in range(start, stop)] == list(range(len(lengths)))
    for start, stop in plan:
        assert stop > start
        assert sum(lengths[start:stop]) <= part_tokens or stop == start + 1
    for start, stop in plan[:-1]:
        assert sum(lengths[start : stop + 1]) > part_tokens  # the next one did not fit


def test_a_part_of_no_tokens_is_not_planned() -> None:
    with pytest.raises(ValueError, match="part_tokens 0"):
        plan_parts([1], part_tokens=0)


@pytest.mark.parametrize("layout", [TOPK, FULL])
def test_the_same_records_give_the_same_bytes(tmp_path: Path, layout: Any) -> None:
    records = make_records(layout, LENGTHS)
    caches = [write_cache(tmp_path / name, layout, records) for name in ("a", "b")]
    assert tree_digest(caches[0]) == tree_digest(caches[1])


def test_the_callers_zarr_configuration_does_not_reach_the_bytes(tmp_path: Path) -> None:
    records = make_records(TOPK, LENGTHS)
    plain = write_cache(tmp_path / "a", TOPK, records)
    fast = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "array.write_empty_chunks": False}
    with zarr.config.set(fast):
        configured = write_cache(tmp_path / "b", TOPK, records)
    assert tree_digest(plain) == tree_digest(configured)


def test_stock_zarr_reads_a_cache_without_this_code(tmp_path: Path) -> None:
    records = make_records(TOPK, LENGTHS)
    root = zarr.open_group(write_cache(tmp_path / "c.zarr", TOPK, records), mode="r")
    parts = [root[name] for name in root.attrs["lkcache"]["parts"]]
    tokens = np.concatenate([part["tokens"][:] for part in parts])
    np.testing.assert_array_equal(tokens, np.concatenate([r.tokens for r in records]))
    hidden = parts[0]["hidden"]
    assert hidden.attrs["encoding"] == "bfloat16 bits"
    assert hidden.metadata.dimension_names == ("token", "L", "D")
    np.testing.assert_array_equal(
        from_bf16_bits(hidden[:30]), from_bf16_bits(np.asarray(records[0].hidden))
    )
    assert [name for name, _ in parts[0].members()] != []  # and no foreign file to warn about
    stored = parts[0]["topk_p"].metadata.to_dict()["codecs"][0]["configuration"]
    assert [codec["name"] for codec in stored["codecs"]] == ["bytes", "blosc", "crc32c"]


def test_each_array_is_shuffled_as_the_specification_says(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "c.zarr", EIGHT, make_records(EIGHT, [12]))
    for array in EIGHT.arrays():
        metadata = json.loads((path / "part-00000" / array.name / "zarr.json").read_bytes())
        blosc = metadata["codecs"][0]["configuration"]["codecs"][1]["configuration"]
        wanted = "bitshuffle" if array.name in BITSHUFFLED else "shuffle"
        assert (blosc["cname"], blosc["shuffle"]) == ("zstd", wanted)
        narrow = 6 if array.name == "topk_p" else 3
        assert blosc["clevel"] == (1 if len(array.dims) > 1 else narrow)


def test_a_cache_that_was_bitshuffled_throughout_is_read_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = make_records(TOPK, LENGTHS)
    plain = write_cache(tmp_path / "a", TOPK, records)
    monkeypatch.setattr(storage.writer, "BITSHUFFLED", frozenset(a.name for a in TOPK.arrays()))
    former = write_cache(tmp_path / "b", TOPK, records)
    assert tree_digest(plain) != tree_digest(former)
    assert_same(list(Cache.open(former).epoch(1)), list(Cache.open(plain).epoch(1)))
    assert check_cache(former) == []


def test_stock_zarr_reads_eight_bit_states_without_this_code(tmp_path: Path) -> None:
    record = make_records(EIGHT, [12])[0]
    assert record.hidden_int8 is not None
    assert record.hidden_scale is not None
    part = zarr.open_group(write_cache(tmp_path / "c.zarr", EIGHT, [record]), mode="r")[
        "part-00000"
    ]
    assert part["hidden_int8"].attrs["encoding"] == "value = code * scale of its group"
    assert part["hidden_int8"].fill_value == -128
    value = part["hidden_int8"][:] * np.repeat(part["hidden_scale"][:], 128, -1)[..., :200]
    np.testing.assert_array_equal(value, decode_int8(record.hidden_int8, record.hidden_scale))


def test_one_chunk_file_an_array(tmp_path: Path) -> None:
    path = write_cache(
        tmp_path / "c.zarr", TOPK, make_records(TOPK, [3000, 3000]), part_tokens=9000
    )
    files = [p for p in (path / "part-00000" / "tokens").rglob("*") if p.is_file()]
    assert sorted(p.name for p in files) == ["0", "zarr.json"]


def test_a_record_that_does_not_fit_leaves_no_part(tmp_path: Path) -> None:
    record = make_records(TOPK, [10])[0]
    with pytest.raises(CacheError, match="tokens hold 99, vocabulary 64"):
        write_part(tmp_path, 0, [replace(record, tokens=np.full(10, 99, dtype=np.uint32))], TOPK)
    with pytest.raises(ValueError, match="part 0 without sequences"):
        write_part(tmp_path, 0, [], TOPK)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr(storage.writer, "sync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_part(tmp_path, 0, make_records(TOPK, [10]), TOPK)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_only_a_part_whose_log_verifies_is_done(tmp_path: Path) -> None:
    records = make_records(TOPK, [40])
    assert done_part(tmp_path, 0, TOPK) is None
    entry = write_part(tmp_path, 0, records, TOPK)
    assert done_part(tmp_path, 0, TOPK) == entry
    assert done_part(tmp_path, 0, replace(TOPK, vocab_size=65)) is None
    log = tmp_path / "part-00000" / "zarr.json"
    sound = log.read_text()
    for edited in (sound.replace('"token": 40', '"token": 41'), sound[:-9], "{}"):
        assert edited != sound
        log.write_text(edited)
        assert done_part(tmp_path, 0, TOPK) is None
    log.write_text(sound)
    (tmp_path / "part-00000").rename(tmp_path / "part-00001")
    assert done_part(tmp_path, 1, TOPK) is None
    shutil.copytree(tmp_path / "part-00001", tmp_path / "part-00000")
    chunk = tmp_path / "part-00000" / "tokens" / "c" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert done_part(tmp_path, 0, TOPK) is None


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_only_the_planned_parts_are_sealed(tmp_path: Path, change: str) -> None:
    records = make_records(TOPK, [5, 5])
    parts = [write_part(tmp_path, number, [records[number]], TOPK) for number in range(2)]
    if change == "missing":
        shutil.rmtree(tmp_path / "part-00001")
    else:
        parts = parts[:1]
    with pytest.raises(CacheError, match=r"expected the . parts that were planned"):
        seal(tmp_path, layout=TOPK, parts=parts, source=SOURCE, params={})
    assert not (tmp_path / "manifest.json").exists()


WRITER = """
import sys
from pathlib import Path
from tests.storage.samples import TOPK, make_records, write_cache
records = make_records(TOPK, eval(sys.argv[2]))
print("ready", flush=True)
write_cache(Path(sys.argv[1]), TOPK, records)
"""


def test_a_killed_writer_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    unbroken = write_cache(tmp_path / "a", TOPK, make_records(TOPK, LENGTHS))
    delays = np.random.default_rng(0).uniform(0, 0.3, size=4)
    for delay in delays:
        command = [sys.executable, "-c", WRITER, str(tmp_path / "b"), repr(LENGTHS)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(delay)
            child.send_signal(signal.SIGKILL)
    assert not (tmp_path / "b" / "manifest.json").exists() or tree_digest(
        tmp_path / "b"
    ) == tree_digest(unbroken)
    write_cache(tmp_path / "b", TOPK, make_records(TOPK, LENGTHS))
    assert tree_digest(tmp_path / "b") == tree_digest(unbroken)
