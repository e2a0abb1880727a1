"""Reads a cache: refuses what is not whole, verifies what it reads, hands out `Record`s.

    cache = Cache.open(Path("cache/train.zarr"), expect={"target": fingerprint})
    for record in cache.epoch(seed=0, arrays={"tokens", "turn", "hidden"}):
        ...

Three checks, each where it is cheap: opening compares the manifest's digest and every file's size;
the first touch of an array compares its files' sha256 (a swapped file passes every checksum inside
it); decoding verifies crc32c. zarr itself reads a lost chunk as fill values, so no array is decoded
before its files were found.

Reads through `zarrs` where it is installed (2-15 times zarr's own speed), else through zarr's
default pipeline. Knows nothing of what the numbers mean to a draft.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from storage.layout import ARRAYS, Layout
from storage.manifest import Manifest, check_files, check_source, corrupt, read_manifest
from storage.record import Record, supervised

READ = (
    {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
    if find_spec("zarrs")
    else {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
)
# zarr's configuration is global and read when an array is opened
_CONFIG_LOCK = threading.Lock()

KEEP_BYTES = 512 << 20
"""Decoded arrays kept for the next request; the embedded cache fits whole."""

# a ragged array can be cut only with the array that counts its rows
COUNTED_BY = {
    "topk_ids": "kept",
    "topk_p": "kept",
    "tail_ids": "tail_kept",
    "tail_logp": "tail_kept",
    "logits": "turn",
}
RECORD_ARRAYS = frozenset(
    name for name, array in ARRAYS.items() if array.dims[0] in ("token", "entry", "sample", "row")
)


class _Index:
    """Where the sequences of one part lie in its token arrays."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.start: NDArray[np.int64] = arrays["row_start"]
        self.length: NDArray[np.int64] = arrays["length"]
        self.ids = _strings(arrays["id"], arrays["id_end"])
        self.domains = _strings(arrays["domain"], arrays["domain_end"])


class Cache:
    """An opened cache; `open` is its constructor."""

    def __init__(self, path: Path, manifest: Manifest, *, keep_bytes: int = KEEP_BYTES) -> None:
        """Use `Cache.open`, which checks first."""
        self.path = path
        self.manifest = manifest
        self._keep_bytes = keep_bytes
        self._decoded: OrderedDict[tuple[int, str], NDArray[Any]] = OrderedDict()
        self._hashed: set[tuple[int, str]] = set()
        self._indices: dict[int, _Index] = {}
        counts = [part.counts["sequence"] for part in manifest.parts]
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    @classmethod
    def open(
        cls, path: Path, *, expect: Mapping[str, str] | None = None, keep_bytes: int = KEEP_BYTES
    ) -> "Cache":
        """Open a whole cache whose `source` holds everything in `expect`.

        `MissingManifest`, `NewerFormat`, `FingerprintMismatch` (both sides named) or `CorruptPart`.
        """
        manifest = read_manifest(path)
        check_source(path, manifest.source, expect or {})
        check_files(path, manifest)
        return cls(path, manifest, keep_bytes=keep_bytes)

    @property
    def layout(self) -> Layout:
        """What is stored of every token."""
        return self.manifest.layout

    @property
    def source(self) -> dict[str, str]:
        """What the cache was made from."""
        return dict(self.manifest.source)

    @property
    def num_sequences(self) -> int:
        """Sequences of all parts."""
        return int(self._first[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of all parts, T summed over sequences."""
        return self.manifest.counts["token"]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[sequence] tokens of each sequence, in the order of capture."""
        parts = [self._index(part).length for part in range(self.num_parts)]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    @cached_property
    def ids(self) -> list[str]:
        """[sequence] ids, in the order of capture."""
        return [text for part in range(self.num_parts) for text in self._index(part).ids]

    @cached_property
    def domains(self) -> list[str]:
        """[sequence] domains, in the order of capture."""
        return [text for part in range(self.num_parts) for text in self._index(part).domains]

    def part_ids(self, part: int) -> list[str]:
        """Ids of one part's sequences."""
        return self._index(part).ids

    @property
    def num_parts(self) -> int:
        """Parts, the unit of shuffling."""
        return len(self.manifest.parts)

    def records(
        self, indices: Sequence[int], *, arrays: Collection[str] | None = None
    ) -> list[Record]:
        """The sequences at `indices`, in that order; read-only views into decoded parts.

        `arrays` names the arrays wanted (and brings those that count them); the others are empty,
        or None where a record may lack them. `CorruptPart` where the files are not as written.
        """
        wanted = self._wanted(arrays)
        index = np.asarray(indices, dtype=np.int64)
        if index.size and not (index.min() >= 0 and index.max() < self.num_sequences):
            raise IndexError(f"sequences {index.min()} to {index.max()} of {self.num_sequences}")
        part_of = np.searchsorted(self._first, index, side="right") - 1
        found: dict[int, Record] = {}
        for part in np.unique(part_of):
            places = np.flatnonzero(part_of == part)
            within = index[places] - self._first[part]
            records = self._part_records(int(part), within, wanted)
            found.update(zip(places.tolist(), records, strict=True))
        return [found[place] for place in range(len(index))]

    def epoch(self, seed: int, *, arrays: Collection[str] | None = None) -> Iterator[Record]:
        """Every sequence once: parts in seeded random order, then sequences within each.

        19 times faster than naive random reads (reference/ecosystem.md §3.2); one part is decoded
        at a time. The order depends on the seed and the cache alone.
        """
        wanted = self._wanted(arrays)
        rng = np.random.default_rng(seed)
        orders = {
            int(part): rng.permutation(self.manifest.parts[part].counts["sequence"])
            for part in rng.permutation(self.num_parts)
        }
        for part, order in orders.items():
            yield from self._part_records(part, order, wanted)

    def array(self, part: int, name: str) -> NDArray[Any]:
        """One whole array of one part, verified, decoded, read-only."""
        key = (part, name)
        if key in self._decoded:
            self._decoded.move_to_end(key)
            return self._decoded[key]
        value = self._read(part, name)
        self._decoded[key] = value
        held = sum(kept.nbytes for kept in self._decoded.values())
        while held > self._keep_bytes and len(self._decoded) > 1:
            held -= self._decoded.popitem(last=False)[1].nbytes
        return value

    def _read(self, part: int, name: str) -> NDArray[Any]:
        entry, array = self.manifest.parts[part], ARRAYS[name]
        folder = self.path / entry.name
        for file, stated in entry.array_files(name).items():
            if problem := stated.problem(folder / file, digest=(part, name) not in self._hashed):
                raise corrupt(self.path, f"{entry.name}/{file}", problem)
        self._hashed.add((part, name))
        try:
            with _CONFIG_LOCK, zarr.config.set(READ):
                stored = zarr.open_array(folder / name, mode="r", zarr_format=3)
            value: NDArray[Any] = np.asarray(stored[...])
        # crc32c, blosc and zarrs each raise kinds of their own; whatever it is, it is damage
        except Exception as error:
            problem = f"cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())})"
            raise corrupt(self.path, f"{entry.name}/{name}", problem) from error
        length = entry.counts.get(array.dims[0], len(value))  # strings' bytes are not counted
        shape = (length, *self.layout.width(array))
        if value.shape != shape or value.dtype != array.dtype:
            problem = f"is {value.shape} {value.dtype}, not {shape} {array.dtype}"
            raise corrupt(self.path, f"{entry.name}/{name}", problem)
        value.setflags(write=False)
        return value

    def _index(self, part: int) -> _Index:
        if part not in self._indices:
            names = [n for n, array in ARRAYS.items() if n not in RECORD_ARRAYS]
            # read past the kept arrays: the index must not push decoded tokens out
            arrays = {name: self._read(part, name) for name in names}
            try:
                self._indices[part] = _Index(arrays)
            except (UnicodeDecodeError, ValueError) as error:
                where = f"{self.manifest.parts[part].name}/id, domain"
                raise corrupt(self.path, where, f"cannot be cut ({error})") from None
        return self._indices[part]

    def _wanted(self, arrays: Collection[str] | None) -> list[str]:
        """Names in the table's order, with the arrays that count them."""
        stored = {array.name for array in self.layout.arrays()} & RECORD_ARRAYS
        if arrays is None:
            return [name for name in ARRAYS if name in stored]
        if unknown := sorted(set(arrays) - RECORD_ARRAYS):
            raise ValueError(f"unknown arrays {unknown}; expected of {sorted(RECORD_ARRAYS)}")
        needed = set(arrays) | {COUNTED_BY[name] for name in arrays if name in COUNTED_BY}
        return [name for name in ARRAYS if name in needed & stored]

    def _part_records(
        self, part: int, sequences: NDArray[np.int64], wanted: Sequence[str]
    ) -> Iterator[Record]:
        index = self._index(part)
        arrays = {name: self.array(part, name) for name in wanted}
        bounds = {dim: self._bounds(part, dim, arrays) for dim in _dims(wanted)}
        for sequence in sequences.tolist():
            cut = dict(_NOTHING)
            for name, value in arrays.items():
                start, stop = bounds[ARRAYS[name].dims[0]]
                cut[name] = value[start[sequence] : stop[sequence]]
            yield Record(id=index.ids[sequence], domain=index.domains[sequence], **cut)

    def _bounds(
        self, part: int, dim: str, arrays: Mapping[str, NDArray[Any]]
    ) -> tuple[list[int], list[int]]:
        """Start and stop of every sequence of a part along a ragged dim."""
        index = self._index(part)
        start, stop = index.start, index.start + index.length
        if dim == "token":
            return start.tolist(), stop.tolist()
        if dim == "row":
            counts = supervised(arrays["turn"]).astype(np.int64)
            counts[stop - 1] = 0  # the last token of a sequence has no next one
        else:
            counts = arrays["kept" if dim == "entry" else "tail_kept"].astype(np.int64)
        ends = np.concatenate([[0], counts.cumsum()])
        return ends[start].tolist(), ends[stop].tolist()


def _dims(names: Sequence[str]) -> set[str]:
    return {ARRAYS[name].dims[0] for name in names}


def _strings(joined: NDArray[np.uint8], ends: NDArray[np.int64]) -> list[str]:
    content = joined.tobytes()
    stops = ends.tolist()
    if stops != sorted(stops) or (stops and (stops[0] < 0 or stops[-1] != len(content))):
        raise ValueError("string ends do not ascend to the number of bytes")
    return [content[a:b].decode("utf-8") for a, b in zip([0, *stops[:-1]], stops, strict=True)]


def _nothing() -> dict[str, Any]:
    """A record's arrays where they were not asked for."""
    return {
        name: None if len(ARRAYS[name].dims) > 1 else np.zeros(0, dtype=ARRAYS[name].dtype)
        for name in RECORD_ARRAYS
    }


_NOTHING = _nothing()
