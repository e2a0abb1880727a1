"""Reads a cache: refuses what is not whole, verifies what it reads, hands out `Record`s.

    cache = Cache.open(Path("cache/train.zarr"), expect={"target": fingerprint})
    for record in cache.epoch(seed=0, arrays={"tokens", "turn", "hidden"}):
        ...
    cache.window(17, 512, 1536)               # tokens 512 to 1535 of a sequence, and their law
    Cache.open("s3://bucket/key/train.zarr")  # the same from a store (storage/remote)

Shares of ranks, packs, prefetching and positions to resume at are `storage.stream`'s.

Three checks, each where it is cheap: opening compares the manifest's digest and every file's size;
the first touch of an array compares its files' sha256 (a swapped file passes every checksum inside
it); decoding verifies crc32c. zarr itself reads a lost chunk as fill values, so no array is decoded
before its files were found.

Decoded arrays and chunks are kept up to `keep_bytes`, the least recently used given up first. Where
a part's narrow arrays fit in half of that and a good part of them is wanted, they are decoded
whole; hidden states, logits and windows are decoded by the chunk. So memory depends on `keep_bytes`
and on what the caller holds, not on the cache's size.

Arrays as FORMAT.md fixes them are decoded by `storage.shard`; others are read whole through `zarrs`
where it is installed, else through zarr's default pipeline. Knows nothing of what the numbers mean
to a draft.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from storage.errors import LkcacheError
from storage.layout import ARRAYS, Layout
from storage.manifest import (
    FileEntry,
    Manifest,
    PartEntry,
    check_files,
    check_source,
    corrupt,
    read_manifest,
)
from storage.order import epoch_order
from storage.record import Record, supervised
from storage.remote import MIRROR_BYTES, Mirror, is_url, open_mirror
from storage.shard import METADATA, Shard, open_shard
from storage.workspace import file_names

READ = (
    {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
    if find_spec("zarrs")
    else {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
)
# zarr's configuration is global and read when an array is opened
_CONFIG_LOCK = threading.Lock()

KEEP_BYTES = 512 << 20
"""Decoded arrays kept for the next request; the embedded cache fits whole."""
KEEP_INDICES = 1024
"""Parts whose index (ids, offsets: some 50 kB a part) is kept."""
WHOLE = -1
"""In place of a chunk's number: the whole array."""
# Decoding a part whole pays where a quarter of it is wanted: below, its chunks are read one by one.
WHOLE_SHARE = 4
RANGE_BYTES = 1 << 20
"""In a store, files up to this size are fetched whole: a request takes as long as a megabyte."""
# zeroed at the last token of a window: it has no next one there, so no law
LAW_OF_TOKEN = ("token_logp", "kept", "tail_logp_mass", "tail_kept")

# a ragged array can be cut only with the array that counts its rows
COUNTED_BY = {
    "topk_ids": "kept",
    "topk_p": "kept",
    "tail_ids": "tail_kept",
    "tail_logp": "tail_kept",
    "logits": "turn",
}
COUNTS = {"entry": "kept", "sample": "tail_kept", "row": "turn"}
"""The array whose numbers, of tokens, tell the lengths along a ragged dim."""
RECORD_ARRAYS = frozenset(
    name for name, array in ARRAYS.items() if array.dims[0] in ("token", "entry", "sample", "row")
)


_Opened = tuple[Shard | None, dict[str, FileEntry]]
"""A shard (None: zarr must read it), and the files that it takes."""
Span = tuple[NDArray[np.int64], NDArray[np.int64]]
"""[sequence] start and stop along a dim."""


class _Index:
    """Where the sequences of one part lie in its arrays."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.start: NDArray[np.int64] = arrays["row_start"]
        self.length: NDArray[np.int64] = arrays["length"]
        self.ids = _strings(arrays["id"], arrays["id_end"])
        self.domains = _strings(arrays["domain"], arrays["domain_end"])
        self.spans: dict[str, Span] = {"token": (self.start, self.start + self.length)}
        """By ragged dim; those that need counts are added when first asked for."""


class Cache:
    """An opened cache; `open` is its constructor. Threads may share one."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        keep_bytes: int = KEEP_BYTES,
        mirror: Mirror | None = None,
    ) -> None:
        """Use `Cache.open`, which checks first."""
        self.path = path
        """Its folder; of a remote cache a local one, with the root's files in it."""
        self.manifest = manifest
        self._mirror = mirror
        self._keep_bytes = keep_bytes
        self._held_bytes = 0
        self._decoded: OrderedDict[tuple[int, str, int], NDArray[Any]] = OrderedDict()
        self._hashed: set[tuple[int, str]] = set()
        self._shards: OrderedDict[tuple[int, str], _Opened] = OrderedDict()
        self._indices: OrderedDict[int, _Index] = OrderedDict()
        self._lock = threading.RLock()
        counts = [part.counts["sequence"] for part in manifest.parts]
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        expect: Mapping[str, str] | None = None,
        keep_bytes: int = KEEP_BYTES,
        mirror_bytes: int = MIRROR_BYTES,
    ) -> "Cache":
        """Open a whole cache whose `source` holds everything in `expect`; path: folder or URL.

        `MissingManifest`, `NewerFormat`, `FingerprintMismatch` (both sides named) or `CorruptPart`;
        `CacheError` where a store cannot be reached. mirror_bytes: disk for what comes from one.
        """
        if is_url(path):
            mirror = open_mirror(str(path), expect=expect or {}, limit_bytes=mirror_bytes)
            return cls(mirror.folder, mirror.manifest, keep_bytes=keep_bytes, mirror=mirror)
        path = Path(path)
        manifest = read_manifest(path)
        check_source(path, manifest.source, expect or {})
        check_files(path, manifest)
        return cls(path, manifest, keep_bytes=keep_bytes)

    @property
    def name(self) -> str:
        """The path or URL that it was opened from."""
        return self._mirror.url if self._mirror else str(self.path)

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
        if self._mirror:
            named = (_named(part, "length") for part in self.manifest.parts)
            self._mirror.bring({file: stated for files in named for file, stated in files.items()})
        parts = [self.part_lengths(part) for part in range(self.num_parts)]
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

    def part_lengths(self, part: int) -> NDArray[np.int64]:
        """[sequence] tokens of one part's sequences."""
        with self._lock:
            known = self._indices.get(part)
        return known.length if known else self._read(part, "length")

    @property
    def num_parts(self) -> int:
        """Parts, the unit of shuffling."""
        return len(self.manifest.parts)

    def records(
        self,
        indices: Sequence[int],
        *,
        arrays: Collection[str] | None = None,
        more: bool = False,
    ) -> list[Record]:
        """The sequences at `indices`, in that order; read-only views into decoded parts.

        `arrays` names the arrays wanted (and brings those that count them); the others are empty,
        or None where a record may lack them. more: the rest of their parts will be asked for soon,
        so that decoding these whole pays. `CorruptPart` where the files are not as written.
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
            records = self._part_records(int(part), within, wanted, more=more)
            found.update(zip(places.tolist(), records, strict=True))
        return [found[place] for place in range(len(index))]

    def epoch(self, seed: int, *, arrays: Collection[str] | None = None) -> Iterator[Record]:
        """Every sequence once: parts in seeded random order, then sequences within each.

        19 times faster than naive random reads (reference/ecosystem.md §3.2); one part is decoded
        at a time. The order depends on the seed and the cache alone.
        """
        wanted = self._wanted(arrays)
        for part, order in epoch_order(self.part_counts, seed):
            yield from self._part_records(part, order, wanted)

    def file_names(self) -> list[str]:
        """Sorted relative names of all that lies in its folder or store, listed or not."""
        return sorted(self._mirror.sizes()) if self._mirror else file_names(self.path)

    @property
    def part_counts(self) -> list[int]:
        """Sequences of each part."""
        return [part.counts["sequence"] for part in self.manifest.parts]

    def window(
        self, sequence: int, start: int, stop: int, *, arrays: Collection[str] | None = None
    ) -> Record:
        """Tokens start to stop − 1 of a sequence with their laws, decoding their chunks alone.

        The last token has no next one in the window, so its law is left out: the result is a sound
        record by itself, whose entries, samples and rows are those that its counts say.
        """
        if not 0 <= sequence < self.num_sequences:
            raise IndexError(f"sequence {sequence} of {self.num_sequences}")
        wanted = self._wanted(arrays)
        part = int(np.searchsorted(self._first, sequence, side="right")) - 1
        index, within = self._index(part), sequence - int(self._first[part])
        length = int(index.length[within])
        if not 0 <= start < stop <= length:
            raise IndexError(f"tokens {start} to {stop} of {length}, sequence {sequence}")
        spans = {d: self._window_span(part, d, within, start, stop) for d in _dims(wanted)}
        cut = dict(_NOTHING)
        for name in wanted:
            cut[name] = self._rows(part, name, *spans[ARRAYS[name].dims[0]])
            if name in LAW_OF_TOKEN and stop < length:
                cut[name] = cut[name].copy()
                cut[name][-1] = 0
                cut[name].setflags(write=False)
        return Record(id=index.ids[within], domain=index.domains[within], **cut)

    def array(self, part: int, name: str) -> NDArray[Any]:
        """One whole array of one part, verified, decoded, read-only."""
        with self._lock:
            value = self._kept(part, name, WHOLE)
            if value is None:
                value = self._keep(part, name, WHOLE, self._read(part, name))
            return value

    def _kept(self, part: int, name: str, chunk: int) -> NDArray[Any] | None:
        key = (part, name, chunk)
        if key in self._decoded:
            self._decoded.move_to_end(key)
        return self._decoded.get(key)

    def _keep(self, part: int, name: str, chunk: int, value: NDArray[Any]) -> NDArray[Any]:
        value.setflags(write=False)
        self._decoded[part, name, chunk] = value
        self._held_bytes += value.nbytes
        while self._held_bytes > self._keep_bytes and len(self._decoded) > 1:
            self._held_bytes -= self._decoded.popitem(last=False)[1].nbytes
        return value

    def _rows(
        self, part: int, name: str, start: int, stop: int, *, all_soon: bool = False
    ) -> NDArray[Any]:
        """Rows start to stop − 1 of an array; a view where they lie in one decoded piece.

        all_soon: the rest of it will be wanted, so a store's file is fetched whole.
        """
        with self._lock:
            value = self._kept(part, name, WHOLE)
            if value is None and start < stop:
                shard = self._shard(part, name, whole=all_soon)
                if shard is not None:
                    return self._chunks(part, name, shard, start, stop)
                value = self.array(part, name)  # of codecs that zarr alone knows
            if value is None:
                width = self.layout.width(ARRAYS[name])
                value = np.zeros((0, *width), dtype=ARRAYS[name].dtype)
            return value[start:stop]

    def _chunks(self, part: int, name: str, shard: Shard, start: int, stop: int) -> NDArray[Any]:
        """The same from its chunks; those that it takes whole are decoded into place, not kept."""
        first, last = start // shard.chunk, (stop - 1) // shard.chunk
        if first == last:
            offset = first * shard.chunk
            return self._chunk(part, name, shard, first)[start - offset : stop - offset]
        out = np.empty((stop - start, *shard.shape[1:]), dtype=shard.dtype)
        for number in range(first, last + 1):
            offset = number * shard.chunk
            place = out[max(0, offset - start) : offset + shard.chunk - start]
            if len(place) == shard.chunk and self._kept(part, name, number) is None:
                self._decode(part, name, partial(shard.read_chunk, number, out=place))
            else:
                chunk = self._chunk(part, name, shard, number)
                place[...] = chunk[max(0, start - offset) : stop - offset]
        out.setflags(write=False)
        return out

    def _chunk(self, part: int, name: str, shard: Shard, number: int) -> NDArray[Any]:
        value = self._kept(part, name, number)
        if value is None:
            value = self._decode(part, name, partial(shard.read_chunk, number))
            self._keep(part, name, number, value)
        return value

    def _shard(self, part: int, name: str, *, whole: bool) -> Shard | None:
        """An array's shard, its files found and, the first time, their digests compared.

        Of a store's large files only the metadata are here unless it is wanted whole.
        """
        entry, key = self.manifest.parts[part], (part, name)
        known = self._shards.get(key)
        files = known[1] if known else _named(entry, name)
        if self._mirror:  # which verifies what arrives
            self._mirror.bring(files if whole else self._near(files))
        else:
            for file, stated in files.items():
                if problem := stated.problem(self.path / file, digest=key not in self._hashed):
                    raise corrupt(self.name, file, problem)
        self._hashed.add(key)
        if known is None:
            folder = self.path / entry.name / name
            shard = self._decode(part, name, partial(open_shard, folder, fetch=self._far(files)))
            if shard is not None:
                self._check_shape(part, name, shard.shape, shard.dtype)
            known = self._shards[key] = (shard, files)
            if len(self._shards) > KEEP_INDICES * len(ARRAYS):
                self._shards.popitem(last=False)
        return known[0]

    def _near(self, files: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
        """Files of a store that are metadata, small, or here already."""
        assert self._mirror
        return {
            name: entry
            for name, entry in files.items()
            if entry.num_bytes <= RANGE_BYTES or name.endswith(METADATA) or self._mirror.holds(name)
        }

    def _far(self, files: Mapping[str, FileEntry]) -> Callable[[int, int], bytes] | None:
        """What reads stretches of an array's chunk file in a store."""
        chunks = [(name, entry) for name, entry in files.items() if not name.endswith(METADATA)]
        if not self._mirror or not chunks:
            return None
        ((name, entry),) = chunks
        return partial(self._mirror.range, name, entry.num_bytes)

    def _read(self, part: int, name: str) -> NDArray[Any]:
        with self._lock:
            shard = self._shard(part, name, whole=True)
            folder = self.path / self.manifest.parts[part].name / name
            read = shard.read_all if shard is not None else partial(_read_by_zarr, folder)
            value: NDArray[Any] = self._decode(part, name, read)
        self._check_shape(part, name, value.shape, value.dtype)
        value.setflags(write=False)
        return value

    def _decode(self, part: int, name: str, read: Callable[[], Any]) -> Any:
        """What `read` returns; whatever it raises is damage: each codec has kinds of its own."""
        try:
            return read()
        except LkcacheError:  # a store's, which says more
            raise
        except Exception as error:
            problem = f"cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())})"
            where = f"{self.manifest.parts[part].name}/{name}"
            raise corrupt(self.name, where, problem) from error

    def _check_shape(self, part: int, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        entry, array = self.manifest.parts[part], ARRAYS[name]
        length = entry.counts.get(array.dims[0], shape[0])  # strings' bytes are not counted
        wanted = (length, *self.layout.width(array))
        if shape != wanted or dtype != array.dtype:
            problem = f"is {shape} {dtype}, not {wanted} {array.dtype}"
            raise corrupt(self.name, f"{entry.name}/{name}", problem)

    def _index(self, part: int) -> _Index:
        with self._lock:
            if part in self._indices:
                self._indices.move_to_end(part)
                return self._indices[part]
            names = [n for n, array in ARRAYS.items() if n not in RECORD_ARRAYS]
            # read past the kept arrays: the index must not push decoded tokens out
            arrays = {name: self._read(part, name) for name in names}
            try:
                index = _Index(arrays)
            except (UnicodeDecodeError, ValueError) as error:
                where = f"{self.manifest.parts[part].name}/id, domain"
                raise corrupt(self.name, where, f"cannot be cut ({error})") from None
            self._indices[part] = index
            if len(self._indices) > KEEP_INDICES:
                self._indices.popitem(last=False)
            return index

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
        self, part: int, sequences: NDArray[np.int64], wanted: Sequence[str], *, more: bool = False
    ) -> Iterator[Record]:
        index = self._index(part)
        many = bool(more or index.length[sequences].sum() * WHOLE_SHARE >= index.length.sum())
        whole = self._whole(part, wanted) if many else {}
        bounds = {dim: self._bounds(part, dim) for dim in _dims(wanted)}
        lists = {dim: (start.tolist(), stop.tolist()) for dim, (start, stop) in bounds.items()}
        for sequence in sequences.tolist():
            cut = dict(_NOTHING)
            for name in wanted:
                starts, stops = lists[ARRAYS[name].dims[0]]
                start, stop = starts[sequence], stops[sequence]
                cut[name] = (
                    whole[name][start:stop]
                    if name in whole
                    else self._rows(part, name, start, stop, all_soon=many)
                )
            yield Record(id=index.ids[sequence], domain=index.domains[sequence], **cut)

    def _whole(self, part: int, wanted: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The narrow arrays of a part, decoded, where they leave room for as much again."""
        counts = self.manifest.parts[part].counts
        narrow = {n: ARRAYS[n] for n in wanted if len(ARRAYS[n].dims) == 1}
        size = sum(counts[a.dims[0]] * np.dtype(a.dtype).itemsize for a in narrow.values())
        return {n: self.array(part, n) for n in narrow} if 2 * size <= self._keep_bytes else {}

    def _bounds(self, part: int, dim: str) -> Span:
        """Start and stop of every sequence of a part along a ragged dim."""
        index = self._index(part)
        if dim in index.spans:
            return index.spans[dim]
        start, stop = index.spans["token"]
        counter = COUNTS[dim]
        with self._lock:
            counts = self._kept(part, counter, WHOLE)
        # past the kept arrays, as the index itself
        counts = self._read(part, counter) if counts is None else counts
        if dim == "row":
            counts = supervised(counts)
            counts[stop - 1] = False  # the last token of a sequence has no next one
        ends = np.concatenate([[0], counts.cumsum(dtype=np.int64)])
        if ends[-1] != (stated := self.manifest.parts[part].counts[dim]):
            where = f"{self.manifest.parts[part].name}/{counter}"
            raise corrupt(self.name, where, f"adds up to {ends[-1]}, the manifest says {stated}")
        index.spans[dim] = (ends[start], ends[stop])
        return index.spans[dim]

    def _window_span(
        self, part: int, dim: str, within: int, start: int, stop: int
    ) -> tuple[int, int]:
        """Where a window of a sequence lies along a dim; its last token owns no law."""
        first = int(self._bounds(part, dim)[0][within])
        if dim == "token":
            return first + start, first + stop
        token = int(self._bounds(part, "token")[0][within])
        counts = self._rows(part, COUNTS[dim], token, token + stop)
        if dim == "row":
            counts = supervised(counts)
        before = int(counts[:start].sum(dtype=np.int64))
        return first + before, first + before + int(counts[start : stop - 1].sum(dtype=np.int64))


def _read_by_zarr(folder: Path) -> NDArray[Any]:
    """Any array that zarr can read, whole."""
    with _CONFIG_LOCK, zarr.config.set(READ):
        stored = zarr.open_array(folder, mode="r", zarr_format=3)
    return np.asarray(stored[...])


def _named(part: PartEntry, array: str) -> dict[str, FileEntry]:
    """The files of an array by their names in the cache."""
    return {f"{part.name}/{file}": entry for file, entry in part.array_files(array).items()}


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
