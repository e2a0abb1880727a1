"""Arrays of a part, encoded straight into their files: chunks by several threads, bytes in order.

    for packed in pack([Source(path, pieces, chunk=4096, ...), ...], threads=4):
        packed.num_bytes, packed.sha256

The counterpart of `storage.shard`, and byte for byte what zarr-python writes for the same array:
inner chunks of bytes, blosc and crc32c, then their index. zarr makes three copies of a whole shard
on the way and its file is read again for the digest; here a chunk is gathered from the sequences
and encoded by one of `threads` threads, written by the caller's in order, and digested by one more.
So neither the number of threads nor their timing reaches a byte, and no more than `AHEAD` chunks a
thread are in memory beside the sequences, and the one that is being digested.

numcodecs, google_crc32c and hashlib work without Python's lock, so that threads are enough. They
are always threads of a pool: in a program's main thread blosc would start threads of its own, whose
blocks come in any order.

Dims: N rows of an array, C rows of an inner chunk. Knows files and bytes, not layouts or manifests.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from google_crc32c import value as crc32c
from numcodecs.blosc import Blosc
from numpy.typing import NDArray

AHEAD = 2
"""Chunks a thread: one that is encoded, and one that waits to be written or encoded."""
R = TypeVar("R")


@dataclass(frozen=True)
class Source:
    """An array and the file that it is to be in."""

    path: Path
    """Of the only chunk file; its folder is made."""
    pieces: Sequence[NDArray[Any]]
    """[N_i, …] of one type, the array when joined along the first dim; N ≥ 1 in all."""
    chunk: int
    """C"""
    level: int
    """Of zstd."""
    bitshuffle: bool
    fill: float | int
    """What the last chunk is filled up with."""


@dataclass(frozen=True)
class Packed:
    """A file that was written, not yet synced."""

    path: Path
    num_bytes: int
    sha256: str


def pack(sources: Iterable[Source], *, threads: int) -> Iterator[Packed]:
    """Write one file a source, in their order.

    `OSError` names the file that could not be written; whatever else ends the encoding of a chunk
    carries a note that does. What was begun is the caller's to remove.
    """
    chunks = ((source, number) for source in sources for number in range(_num_chunks(source)))
    tasks = (partial(_encoded, source, number) for source, number in chunks)
    file: _File | None = None
    with ThreadPoolExecutor(1, "pack-digest") as digesting:
        try:
            for source, number, body, checksum in in_order(tasks, threads=threads):
                if number == 0:
                    file = _File(source, digesting)
                assert file is not None, "chunks are numbered from 0"
                file.append(body, checksum)
                if number == _num_chunks(source) - 1:
                    yield file.finish()
                    file = None
        finally:
            if file is not None:
                file.close()


def in_order(tasks: Iterable[Callable[[], R]], *, threads: int) -> Iterator[R]:
    """Results of tasks that run in a pool of threads, in the tasks' order.

    No task is started before the consumer is within `AHEAD · threads` of it. The first error, in
    the same order, is raised here, and what has not been started then never is.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, "pack") as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) >= AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _File:
    """A chunk file as it grows: what is written is digested on the way."""

    def __init__(self, source: Source, digesting: ThreadPoolExecutor) -> None:
        self._path, self._lengths, self._sha256 = source.path, [0], hashlib.sha256()
        self._digesting = digesting
        self._digested: Future[None] | None = None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = self._path.open("wb")

    def append(self, body: bytes, checksum: bytes) -> None:
        """One chunk, followed by its checksum."""
        self._write(body, checksum)
        self._lengths.append(len(body) + len(checksum))

    def finish(self) -> Packed:
        """The index: offset and length of every chunk, and its own checksum."""
        ends = list(accumulate(self._lengths))
        index = np.array(list(zip(ends, self._lengths[1:], strict=False)), dtype="<u8").tobytes()
        checksum = _checksum(index)
        self._write(index, checksum)
        self.close()
        self._wait()
        return Packed(self._path, ends[-1] + len(index) + len(checksum), self._sha256.hexdigest())

    def close(self) -> None:
        """Whatever is in it."""
        self._named(self._file.close)

    def _write(self, *contents: bytes) -> None:
        """To the file, while the same is digested: both take long, and neither takes the lock."""
        self._wait()
        self._digested = self._digesting.submit(self._digest, contents)
        for content in contents:
            self._named(partial(self._file.write, content))

    def _digest(self, contents: Iterable[bytes]) -> None:
        for content in contents:
            self._sha256.update(content)

    def _wait(self) -> None:
        if self._digested is not None:
            self._digested.result()

    def _named(self, call: Callable[[], Any]) -> None:
        """`write` and `close` do not say which file the disk had no room for."""
        try:
            call()
        except OSError as error:
            error.filename = error.filename or str(self._path)
            raise


def _num_chunks(source: Source) -> int:
    return -(-sum(map(len, source.pieces)) // source.chunk)


def _encoded(source: Source, number: int) -> tuple[Source, int, bytes, bytes]:
    """Which chunk it is, the chunk as blosc stores it, and its checksum."""
    try:
        rows = _rows(source.pieces, number * source.chunk, (number + 1) * source.chunk)
        if len(rows) < source.chunk:  # the last one is stored at its full length
            full = np.full((source.chunk, *rows.shape[1:]), source.fill, dtype=rows.dtype)
            full[: len(rows)] = rows
            rows = full
        rows = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<"))
        shuffle = Blosc.BITSHUFFLE if source.bitshuffle else Blosc.SHUFFLE
        blosc = Blosc("zstd", source.level, shuffle, typesize=rows.dtype.itemsize)
        body = blosc.encode(rows)
        return source, number, body, _checksum(body)
    except Exception as error:
        error.add_note(f"while encoding chunk {number} of {source.path}")
        raise


def _rows(pieces: Sequence[NDArray[Any]], start: int, stop: int) -> NDArray[Any]:
    """Rows start … stop−1 of the joined pieces, as far as there are; a view if one has them."""
    found, first = [], 0
    for piece in pieces:
        if first >= stop:
            break
        own = piece[max(0, start - first) : stop - first]
        first += len(piece)
        if first > start and len(own):
            found.append(own)
    return found[0] if len(found) == 1 else np.concatenate(found)


def _checksum(content: bytes) -> bytes:
    return int(crc32c(content)).to_bytes(4, "little")
