"""One array of a part, decoded straight from its file: the chunks that are wanted, and no others.

    shard = open_shard(Path("train.zarr/part-00000/topk_ids"))   # None: zarr must read it
    shard.read_chunk(3), shard.read_all()

A call into zarr costs about a millisecond whatever it reads, which random windows pay ten times
over. The codecs that FORMAT.md fixes are three steps, so they are undone here: crc32c, blosc, and
bytes that numpy takes as they are. An array of any other codec is zarr's to read: the reader falls
back and nothing else changes. Every checksum that zarr verifies is verified here.

Dims: N rows of an array, C rows of an inner chunk. Knows files and bytes, not manifests.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from google_crc32c import value as crc32c
from numcodecs.blosc import Blosc
from numpy.typing import NDArray

METADATA = "zarr.json"
CRC_BYTES = 4
ENTRY_BYTES = 16  # of the shard's index: offset and length, uint64 each
ABSENT = 2**64 - 1
# where blosc's header keeps the decoded length; a chunk of another length must not be believed
BLOSC_LENGTH = slice(4, 8)
_BLOSC = Blosc()
Bytes = NDArray[np.uint8]
"""A stretch of a file; google_crc32c takes numpy's buffers and refuses memoryviews."""


@dataclass(frozen=True)
class Shard:
    """The only chunk file of an array, and how to cut it."""

    path: Path
    shape: tuple[int, ...]
    """[N, …]"""
    dtype: np.dtype[Any]
    chunk: int
    """C: rows of an inner chunk."""
    fetch: Callable[[int, int], bytes] | None = None
    """(start, length) -> bytes of a file that lies elsewhere; a negative start from its end."""

    @property
    def num_chunks(self) -> int:
        """Inner chunks of the array."""
        return math.ceil(self.shape[0] / self.chunk)

    def read_chunk(self, number: int, *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows number · C up to the next chunk; out: [C, …] to decode into.

        `OSError` where the file cannot be read, `ValueError` or `RuntimeError` where it is damaged.
        """
        start, length = self._extents[number].tolist()
        body = self._bytes(start, length)
        if out is None:
            out = np.empty((self.chunk, *self.shape[1:]), dtype=self.dtype)
        self._decode(number, np.frombuffer(body, dtype=np.uint8), out)
        return out[: self.shape[0] - number * self.chunk]

    def read_all(self) -> NDArray[Any]:
        """[N, …] the whole array; errors as of `read_chunk`."""
        out = np.empty(self.shape, dtype=self.dtype)
        if not self.num_chunks:
            return out
        content = np.fromfile(self.path, dtype=np.uint8)
        for number, (start, length) in enumerate(self._index(content).tolist()):
            place = out[number * self.chunk : (number + 1) * self.chunk]
            body = content[start : start + length]
            if len(place) == self.chunk:
                self._decode(number, body, place)
            else:  # the last chunk is stored at its full length
                full = np.empty((self.chunk, *self.shape[1:]), dtype=self.dtype)
                self._decode(number, body, full)
                place[...] = full[: len(place)]
        return out

    @cached_property
    def _extents(self) -> NDArray[np.uint64]:
        """[chunks, 2] offset and length of every chunk; read once, its own crc32c verified."""
        size = self.num_chunks * ENTRY_BYTES + CRC_BYTES
        return self._index(np.frombuffer(self._bytes(-size, size), dtype=np.uint8))

    def _bytes(self, start: int, length: int) -> bytes:
        """A stretch of the file; a negative start counts from its end."""
        if self.fetch is not None and not self.path.exists():
            return self.fetch(start, length)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            end = os.fstat(descriptor).st_size if start < 0 else 0
            return os.pread(descriptor, length, max(0, end + start))
        finally:
            os.close(descriptor)

    def _index(self, content: Bytes) -> NDArray[np.uint64]:
        size = self.num_chunks * ENTRY_BYTES + CRC_BYTES
        if len(content) < size:
            raise ValueError(f"{len(content)} bytes, the index of the chunks alone takes {size}")
        extents = _checked(content[-size:], "the index of the chunks").view("<u8")
        if (extents == ABSENT).any():
            raise ValueError("a chunk was never written")
        return extents.reshape(-1, 2)

    def _decode(self, number: int, body: Bytes, out: NDArray[Any]) -> None:
        content = _checked(body, f"chunk {number}")
        length = int.from_bytes(content[BLOSC_LENGTH].tobytes(), "little")
        if length != out.nbytes:
            raise ValueError(f"chunk {number} holds {length} bytes, not {out.nbytes}")
        _BLOSC.decode(content, out=out)


def open_shard(folder: Path, *, fetch: Callable[[int, int], bytes] | None = None) -> Shard | None:
    """The shard of the array in `folder`, or None where its metadata is not what FORMAT.md fixes.

    fetch: reads stretches of its chunk file where that lies elsewhere. Reads `zarr.json` alone;
    `ValueError` or `KeyError` where that is no array's metadata.
    """
    metadata = json.loads((folder / METADATA).read_bytes())
    shape = tuple(metadata["shape"])
    codecs = metadata["codecs"]
    if [codec["name"] for codec in codecs] != ["sharding_indexed"]:
        return None
    sharding = codecs[0]["configuration"]
    inner = tuple(sharding["chunk_shape"])
    outer = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    one_shard = outer[0] >= shape[0] and inner[1:] == outer[1:] == shape[1:]
    known = (
        _names(sharding["codecs"]) == ["bytes", "blosc", "crc32c"]
        and _names(sharding["index_codecs"]) == ["bytes", "crc32c"]
        and sharding.get("index_location", "end") == "end"
        and metadata["chunk_key_encoding"]["name"] == "default"
        and not metadata.get("storage_transformers")
    )
    # the index has an entry for every chunk of the shard, so the shard may not be longer than N
    if not (one_shard and known and outer[0] == max(1, math.ceil(shape[0] / inner[0])) * inner[0]):
        return None
    dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
    chunk_file = folder.joinpath("c", *("0" for _ in shape))
    return Shard(path=chunk_file, shape=shape, dtype=dtype, chunk=inner[0], fetch=fetch)


def _names(codecs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of codecs, or nothing known where numbers are not little-endian."""
    for codec in codecs:
        if codec.get("configuration", {}).get("endian", "little") != "little":
            return []
    return [codec["name"] for codec in codecs]


def _checked(body: Bytes, what: str) -> Bytes:
    """The content before a crc32c that it answers to."""
    content, stated = body[:-CRC_BYTES], int.from_bytes(body[-CRC_BYTES:].tobytes(), "little")
    if len(body) < CRC_BYTES or crc32c(cast("bytes", content)) != stated:
        raise ValueError(f"{what} contradicts its crc32c")
    return content
