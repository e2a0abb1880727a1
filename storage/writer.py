"""Writes a cache part by part; what is there is whole (DESIGN §5).

    for index, (start, stop) in enumerate(plan_parts(lengths, part_tokens=32768)):
        entry = done_part(folder, index, layout) or write_part(folder, index, records, layout)
    seal(folder, layout=layout, parts=entries, source=..., params=...)

One worker owns whole parts. A part is written in a hidden folder, synced, and renamed; its commit
log is the last thing written into it. The manifest is written last of all. zarr-python writes the
metadata, `storage.pack` the chunks, byte for byte as zarr-python's default codec pipeline does;
`zarrs` is neither atomic nor deterministic as a writer (reference/ecosystem.md §3.4).
"""

import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from storage.errors import CacheError
from storage.layout import (
    BITSHUFFLED,
    CODE_LEVEL,
    NARROW_LEVEL,
    PROBABILITY,
    VERSION,
    WIDE_LEVEL,
    Array,
    Layout,
    chunk_length,
)
from storage.manifest import (
    ATTRIBUTE,
    FORMAT,
    GROUP,
    MANIFEST,
    MANIFEST_DIGEST,
    FileEntry,
    Manifest,
    PartEntry,
    digest_line,
    file_entries,
)
from storage.pack import Source, in_order, pack
from storage.record import Record, supervised
from storage.workspace import digest, remove, sync, sync_folder

HOST = re.sub(r"[^\w-]", "-", socket.gethostname())
"""In the names of unfinished folders alone, which no cache keeps."""


def plan_parts(lengths: Sequence[int], *, part_tokens: int) -> list[tuple[int, int]]:
    """Contiguous [start, stop) ranges of whole sequences of at most `part_tokens` tokens.

    A sequence longer than `part_tokens` gets a part of its own. Fixed by lengths alone, before any
    capture, so that neither workers nor restarts move a boundary.
    """
    if part_tokens < 1:
        raise ValueError(f"part_tokens {part_tokens}; expected at least 1")
    ranges: list[tuple[int, int]] = []
    start, tokens = 0, 0
    for index, length in enumerate(lengths):
        if index > start and tokens + length > part_tokens:
            ranges.append((start, index))
            start, tokens = index, 0
        tokens += length
    if len(lengths) > start:
        ranges.append((start, len(lengths)))
    return ranges


def part_name(index: int) -> str:
    """Folder of a part."""
    return f"part-{index:05d}"


def stats_path(folder: Path, index: int) -> Path:
    """What capture knows of a part beside its arrays, as JSON next to the cache in scratch."""
    return folder.with_name(f"{folder.name}.stats") / f"{index:05d}.json"


def write_part(
    folder: Path, index: int, records: Sequence[Record], layout: Layout, writers: int = 1
) -> PartEntry:
    """Write one part and commit it by rename; `CacheError` names a record that does not fit.

    `writers` threads check and encode, which changes no byte. `OSError` (disk full, no permission)
    names the file and leaves nothing under the part's name.
    """
    if not records:
        raise ValueError(f"part {index} without sequences")
    for _ in in_order((partial(record.check, layout) for record in records), threads=writers):
        pass
    name = part_name(index)
    # a retried task may race its zombie, here or on another host of a shared disk, hence process
    # and host; `seal` sweeps what a kill leaves
    unfinished = folder / f".{name}.{HOST}.{os.getpid()}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        entry = _write_arrays(unfinished, name, records, layout, writers)
        sync(unfinished)
        shutil.rmtree(folder / name, ignore_errors=True)
        unfinished.rename(folder / name)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_folder(folder)
    return entry


def done_part(folder: Path, index: int, layout: Layout) -> PartEntry | None:
    """The part's entry where its commit log verifies byte for byte, else None: write it again."""
    part = folder / part_name(index)
    try:
        content = (part / GROUP).read_bytes()
        log = json.loads(content)["attributes"][ATTRIBUTE]
        entry = PartEntry.from_dict(log)
        if content != _group_bytes(_commit_log(entry, layout)) or entry.name != part.name:
            return None  # of another layout, torn or edited
        if file_entries(part, without=[GROUP]) != entry.files:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return PartEntry(
        name=entry.name,
        counts=entry.counts,
        coverage=entry.coverage,
        files={**entry.files, GROUP: FileEntry.of(part / GROUP)},
    )


def seal(
    folder: Path,
    *,
    layout: Layout,
    parts: Sequence[PartEntry],
    source: Mapping[str, str],
    params: Mapping[str, Any],
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Make the parts a cache: root group, extra files, then the manifest, last.

    `CacheError` where a part is missing, out of order or not among `parts`.
    """
    for stale in (MANIFEST, MANIFEST_DIGEST):
        (folder / stale).unlink(missing_ok=True)
    for unfinished in folder.glob(".*.partial"):
        remove(unfinished)
    found = sorted(p.name for p in folder.glob("part-*"))
    names = [part.name for part in parts]
    if found != names or names != [part_name(index) for index in range(len(parts))]:
        raise CacheError(
            found=f"{folder} holds {len(found)} parts ({', '.join(found[:3])}, …)",
            expected=f"the {len(parts)} parts that were planned, numbered from 0",
            todo="remove the folder and run capture again",
        )
    root = {"format": FORMAT, "version": VERSION, "parts": names, "manifest": MANIFEST}
    files = {GROUP: _group_bytes({ATTRIBUTE: root}), **(extra_files or {})}
    for name, content in files.items():
        _write_synced(folder / name, content)
    manifest = Manifest(
        layout=layout,
        source=source,
        params=params,
        parts=tuple(parts),
        files={name: FileEntry.of(folder / name) for name in sorted(files)},
    )
    content = manifest.encode()
    sync_folder(folder)
    _write_synced(folder / MANIFEST_DIGEST, digest_line(content))
    _write_synced(folder / f".{MANIFEST}.partial", content)
    (folder / f".{MANIFEST}.partial").rename(folder / MANIFEST)
    sync_folder(folder)


def _write_arrays(
    folder: Path, name: str, records: Sequence[Record], layout: Layout, writers: int
) -> PartEntry:
    """All arrays, then the group's metadata with the commit log in it."""
    columns = _columns(records, layout)
    group = zarr.create_group(folder, zarr_format=3)
    files = {}
    for packed in pack(_sources(folder, group, records, columns, layout), threads=writers):
        entry = FileEntry(packed.num_bytes, packed.sha256)
        files[packed.path.relative_to(folder).as_posix()] = entry
    for path in folder.glob(f"*/{GROUP}"):
        files[path.relative_to(folder).as_posix()] = FileEntry.of(path)
    log = PartEntry(
        name=name,
        counts=_counts(columns, records),
        coverage=_coverage(columns, records, layout),
        files=dict(sorted(files.items())),
    )
    (folder / GROUP).write_bytes(_group_bytes(_commit_log(log, layout)))
    return PartEntry(
        name, log.counts, log.coverage, {**log.files, GROUP: FileEntry.of(folder / GROUP)}
    )


def _level(array: Array, *, wide: bool) -> int:
    if array.encoding == PROBABILITY:
        return CODE_LEVEL
    return WIDE_LEVEL if wide else NARROW_LEVEL


def _sources(
    folder: Path,
    group: Any,
    records: Sequence[Record],
    columns: Mapping[str, NDArray[Any]],
    layout: Layout,
) -> Iterator[Source]:
    """Every array that has rows, its metadata written. Wide ones are never joined in memory."""
    for array in layout.arrays():
        if array.name in columns:
            pieces = [columns[array.name]]
        else:
            pieces = [getattr(record, array.name) for record in records]
        length, width = sum(map(len, pieces)), layout.width(array)
        dtype = pieces[0].dtype
        chunk = chunk_length(array, length, row_bytes=dtype.itemsize * math.prod(width))
        _create_array(group, array, (length, *width), chunk=chunk, wide=bool(width))
        if length and math.prod(width):
            yield Source(
                path=folder.joinpath(array.name, "c", *("0" for _ in array.dims)),
                pieces=pieces,
                chunk=chunk,
                level=_level(array, wide=bool(width)),
                bitshuffle=array.name in BITSHUFFLED,
                fill=_fill(dtype),
            )


def _create_array(
    group: Any, array: Array, shape: tuple[int, ...], *, chunk: int, wide: bool
) -> None:
    """The metadata of one array as one shard: the whole array, rounded up to whole inner chunks."""
    dtype = np.dtype(array.dtype)
    shard = max(1, math.ceil(shape[0] / chunk)) * chunk
    group.create_array(
        array.name,
        shape=shape,
        dtype=dtype,
        chunks=(chunk, *shape[1:]),
        shards=(shard, *shape[1:]),
        fill_value=_fill(dtype),
        compressors=[
            BloscCodec(
                typesize=dtype.itemsize,
                cname="zstd",
                clevel=_level(array, wide=wide),
                shuffle="bitshuffle" if array.name in BITSHUFFLED else "shuffle",
            ),
            Crc32cCodec(),
        ],
        dimension_names=array.dims,
        attributes={"encoding": array.encoding} if array.encoding else {},
        config={"write_empty_chunks": True},
    )


def _fill(dtype: np.dtype[Any]) -> float | int:
    """A value that no sound array holds, so that a client that ignores absence shows it."""
    if dtype == np.int8:
        return -128  # codes reach from -127 to 127
    return math.nan if dtype.kind == "f" else int(np.iinfo(dtype).max)


def _columns(records: Sequence[Record], layout: Layout) -> dict[str, NDArray[Any]]:
    """Every array of one dim, sequences one after another."""
    lengths = np.array([len(record.tokens) for record in records], dtype=np.int64)
    columns: dict[str, NDArray[Any]] = {"row_start": lengths.cumsum() - lengths, "length": lengths}
    for key in ("id", "domain"):
        texts = [getattr(record, key).encode("utf-8") for record in records]
        columns[key] = np.frombuffer(b"".join(texts), dtype=np.uint8)
        columns[f"{key}_end"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
    for array in layout.arrays():
        if len(array.dims) == 1 and array.name not in columns:
            columns[array.name] = np.concatenate([getattr(r, array.name) for r in records])
    return columns


def _counts(columns: Mapping[str, NDArray[Any]], records: Sequence[Record]) -> dict[str, int]:
    return {
        "sequence": len(records),
        "token": len(columns["tokens"]),
        "row": sum(int(supervised(record.turn).sum()) for record in records),
        "entry": len(columns["topk_ids"]),
        "sample": len(columns["tail_ids"]),
    }


def _coverage(
    columns: Mapping[str, NDArray[Any]], records: Sequence[Record], layout: Layout
) -> dict[str, Any]:
    """Sums over supervised rows; a cache of whole laws keeps all V and leaves no tail."""
    rows = [supervised(record.turn) for record in records]
    row = np.concatenate(rows)
    tail_mass = np.exp(columns["tail_logp_mass"][row].astype(np.float64)) * (not layout.dense)
    tail_kept = columns["tail_kept"][row]
    domains: dict[str, dict[str, int]] = {}
    for record, own in zip(records, rows, strict=True):
        counts = domains.setdefault(record.domain, {"sequences": 0, "tokens": 0, "rows": 0})
        counts["sequences"] += 1
        counts["tokens"] += len(record.tokens)
        counts["rows"] += int(own.sum())
    return {
        "kept": int(row.sum()) * layout.vocab_size if layout.dense else len(columns["topk_ids"]),
        "tail_kept": len(columns["tail_ids"]),
        "tail_mass": math.fsum(tail_mass),  # exactly rounded: no order of summation in the bytes
        "bucket_mass": math.fsum(tail_mass[tail_kept == 0]),
        "domains": domains,
    }


def _commit_log(entry: PartEntry, layout: Layout) -> dict[str, Any]:
    """The attributes of a part's group; their own digest shows an edit that is still JSON."""
    log = {"version": VERSION, "layout": layout.as_dict(), **entry.as_dict()}
    return {ATTRIBUTE: {**log, "sha256": digest(log)}}


def _group_bytes(attributes: Mapping[str, Any]) -> bytes:
    """A zarr v3 group's metadata; ours to write, so that a part's log is its very last write."""
    value = {"attributes": attributes, "node_type": "group", "zarr_format": 3}
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    return (text + "\n").encode("utf-8")


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
