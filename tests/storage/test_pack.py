"""Files of arrays: zarr's own bytes, whatever the threads."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from storage import pack as packing
from storage.layout import Layout
from storage.pack import AHEAD, Source, in_order, pack
from storage.workspace import file_digest, tree_digest
from storage.writer import write_part
from tests.storage.samples import EIGHT, FULL, REBUILD, TOPK, make_records

RNG = np.random.default_rng(0)
VALUES = {
    "whole chunks": (RNG.integers(0, 99, 64).astype(np.uint32), 16, 2**32 - 1),
    "a short last one": (RNG.normal(size=50).astype(np.float32), 16, np.nan),
    "a single short one": (RNG.normal(size=5).astype(np.float16), 16, np.nan),
    "nothing but fill": (np.full(40, 255, np.uint8), 16, 255),
    "wide": (RNG.integers(-9, 9, (37, 3, 20)).astype(np.int8), 4, -128),
    "a row a chunk": (RNG.integers(0, 9, (5, 300)).astype(np.uint16), 1, 65535),
    "noise": (RNG.integers(0, 2**63, 40_000), 8192, 2**63 - 1),
}


def source_of(path: Path, name: str, *, pieces: int = 1) -> Source:
    value, chunk, fill = VALUES[name]
    return Source(path, np.array_split(value, pieces), chunk, 3, name == "wide", fill)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", VALUES)
def test_the_bytes_are_those_of_zarr(tmp_path: Path, name: str, threads: int) -> None:
    value, chunk, fill = VALUES[name]
    shuffle = "bitshuffle" if name == "wide" else "shuffle"
    array = zarr.create_array(
        tmp_path / "zarr",
        shape=value.shape,
        dtype=value.dtype,
        chunks=(chunk, *value.shape[1:]),
        shards=(-(-len(value) // chunk) * chunk, *value.shape[1:]),
        fill_value=fill,
        compressors=[
            BloscCodec(typesize=value.itemsize, cname="zstd", clevel=3, shuffle=shuffle),
            Crc32cCodec(),
        ],
        config={"write_empty_chunks": True},
    )
    array[...] = value
    wanted = tmp_path.joinpath("zarr", "c", *("0" for _ in value.shape))
    for pieces in (1, min(7, len(value))):
        source = source_of(tmp_path / "ours" / str(pieces), name, pieces=pieces)
        (packed,) = pack([source], threads=threads)
        assert packed.path.read_bytes() == wanted.read_bytes()
        assert packed.num_bytes == wanted.stat().st_size
        assert packed.sha256 == file_digest(wanted)


def test_files_follow_each_other(tmp_path: Path) -> None:
    names = list(VALUES)
    together = list(pack((source_of(tmp_path / "a" / n, n) for n in names), threads=3))
    assert [packed.path.name for packed in together] == names
    for name, packed in zip(names, together, strict=True):
        (alone,) = pack([source_of(tmp_path / "b" / name, name)], threads=1)
        assert (alone.num_bytes, alone.sha256) == (packed.num_bytes, packed.sha256)


@pytest.mark.parametrize("layout", [TOPK, FULL, EIGHT, REBUILD], ids=lambda x: f"{x.mode}")
def test_one_writer_and_three_write_the_same_part(tmp_path: Path, layout: Layout) -> None:
    records = make_records(layout, [30, 1, 80, 25, 60, 7])
    entries = [write_part(tmp_path / str(n), 0, records, layout, n) for n in (1, 3)]
    assert entries[0] == entries[1]
    assert tree_digest(tmp_path / "1") == tree_digest(tmp_path / "3")


def test_no_more_chunks_are_at_work_than_a_few_a_thread() -> None:
    started: list[int] = []

    def task(number: int) -> int:
        started.append(number)
        return number

    for threads in (1, 3):
        started.clear()
        for result in in_order((partial(task, n) for n in range(40)), threads=threads):
            time.sleep(0.002)  # a slow disk
            assert len(started) <= result + AHEAD * threads
        assert sorted(started) == list(range(40))


def test_as_many_threads_work_as_are_asked_for() -> None:
    """Three tasks that wait for each other; none of them in the caller's thread."""
    meeting = threading.Barrier(3, timeout=60)

    def task() -> str:
        meeting.wait()
        return threading.current_thread().name

    names = list(in_order([task] * 3, threads=3))
    assert len(set(names)) == 3
    assert threading.main_thread().name not in names


def test_an_error_comes_in_the_order_of_the_tasks_and_ends_them() -> None:
    done: list[int] = []

    def task(number: int) -> int:
        if number == 2:
            time.sleep(0.05)  # later than the next one's
        if number in (2, 3):
            raise ValueError(f"task {number}")
        done.append(number)
        return number

    results = in_order((partial(task, n) for n in range(1000)), threads=2)
    with pytest.raises(ValueError, match="task 2"):
        list(results)
    assert max(done) < 10


def failing(name: str, error: BaseException) -> Callable[..., Any]:
    plain = packing._rows

    def rows(pieces: Any, start: int, stop: int) -> Any:
        if pieces[0].shape[1:] == (2, 8) and name == "hidden":
            raise error
        return plain(pieces, start, stop)

    return rows


@pytest.mark.parametrize("writers", [1, 3])
def test_what_fails_in_a_writer_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writers: int
) -> None:
    records = make_records(TOPK, [30, 12, 40])
    monkeypatch.setattr(packing, "_rows", failing("hidden", MemoryError("of the codec")))
    with pytest.raises(MemoryError, match="of the codec") as caught:
        write_part(tmp_path, 0, records, TOPK, writers)
    assert "while encoding chunk 0 of" in caught.value.__notes__[0]
    assert "hidden/c/0/0/0" in caught.value.__notes__[0]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert write_part(tmp_path, 0, records, TOPK, writers).name == "part-00000"


@pytest.mark.parametrize("writers", [1, 3])
def test_a_file_that_finds_no_room_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writers: int
) -> None:
    """`write` itself does not say which file it was."""
    plain = packing._File._named

    def named(file: Any, call: Callable[[], Any]) -> None:
        def full() -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        writes = isinstance(call, partial)  # and does not close
        plain(file, full if writes and "topk_p" in str(file._path) else call)

    monkeypatch.setattr(packing._File, "_named", named)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_part(tmp_path, 0, make_records(TOPK, [30]), TOPK, writers)
    assert caught.value.filename.endswith("topk_p/c/0")
    assert list(tmp_path.iterdir()) == []


def test_a_consumer_that_stops_leaves_no_thread_and_no_open_file(tmp_path: Path) -> None:
    def sources() -> Iterator[Source]:
        for number in range(50):
            yield source_of(tmp_path / str(number), "noise")

    files = pack(sources(), threads=3)
    next(files)
    files.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("pack")]
    assert len(list(tmp_path.iterdir())) < 10
