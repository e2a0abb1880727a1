"""How fast one core reads a cache: in order, shuffled, in random windows; beside a peer's format.

    python -m benchmarks.reader           # some five minutes; writes reader.md beside this file

A synthetic cache in the regime c14 at V = 128,256 (benchmarks/synthetic.py), p ≥ 5e-4, is read by
`storage.reader` as it is, and by zarr with and without `zarrs`; the peer is Megatron-LM v2's
storage re-implemented from its description (reference/offline_caches.md §2-3): the likeliest 128
ids in 17 bits, float16 log-probabilities, torch.save, zstd 3, members of 4,096 tokens in one file,
in order. It reads no checksum and no tail; it is timed as its loader works (int64 ids by torch) and
as its format could be read. All end with ids as integers and p, or log p, as floats.

Rates are tokens a second of CPU time of one core (and of wall time), page cache warm, the median of
ROUNDS rounds taken in turn. A round opens the cache anew, so sha256 of every file is part of it.
"""

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import zarr
from numcodecs import Zstd

import storage.reader
from benchmarks.synthetic import documents, kept_laws, layout, records
from pipeline.topk import Rule
from storage.codecs import decode_p
from storage.reader import Cache
from storage.stream import Stream
from storage.writer import plan_parts, seal, write_part

ROUNDS, DOCUMENTS, NUM_TOKENS, PART_TOKENS = 5, 8, 1 << 18, 65_536
WINDOW, WINDOWS = 1024, 200
# what a window reads must not lie decoded from an earlier one, as in a cache larger than memory
COLD_BYTES = 1 << 20
PEER_K, PEER_TOKENS = 128, 4096
PEER = "sequential | Megatron v2's loader, re-implementation"
BASE = ("tokens", "turn", "token_logp", "kept", "topk_ids", "topk_p", "tail_logp_mass")
SAMPLES = ("tail_kept", "tail_ids", "tail_logp")
PIPELINES = {
    "zarr with zarrs": {
        "codec_pipeline.path": "zarrs.ZarrsCodecPipeline",
        "codec_pipeline.strict": True,
    },
    "zarr alone": {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"},
}
RULE = Rule(min_prob=5e-4, max_kept=1024, tail_samples=16, tail_full_mass=0.05, tail_min_mass=1e-4)


def write_cache(path: Path) -> None:
    """Sequences of 512 to 4,095 tokens, NUM_TOKENS of them in all."""
    rng, lengths = np.random.default_rng(0), []
    while sum(lengths) < NUM_TOKENS:
        lengths.append(int(rng.integers(512, 4096)))
    kept = kept_laws("c14", num_documents=DOCUMENTS, seed=0, rule=RULE)
    made = list(records(kept, lengths=lengths, seed=0))
    parts = [
        write_part(path, number, made[a:b], layout())
        for number, (a, b) in enumerate(plan_parts(lengths, part_tokens=PART_TOKENS))
    ]
    seal(path, layout=layout(), parts=parts, source={}, params={})


def sequential(path: Path, names: tuple[str, ...]) -> int:
    """Every part in order, whole arrays."""
    cache = Cache.open(path)
    for part in range(cache.num_parts):
        arrays = {name: cache.array(part, name) for name in names}
        decode_p(arrays["topk_p"])
    return cache.num_tokens


def epoch(path: Path, names: tuple[str, ...]) -> int:
    """Parts in random order, sequences in random order within."""
    return sum(_used(record) for record in Cache.open(path).epoch(0, arrays=names))


def windows(path: Path, names: tuple[str, ...]) -> int:
    """Random windows of all parts, none of them decoded before."""
    cache = Cache.open(path, keep_bytes=COLD_BYTES)
    stream = iter(Stream(cache, seed=0, window_tokens=WINDOW, arrays=names))
    return sum(_used(next(stream)[0]) for _ in range(WINDOWS))


def _used(record: Any) -> int:
    decode_p(record.topk_p)
    return len(record.tokens)


def zarr_windows(path: Path, names: tuple[str, ...], pipeline: dict[str, Any]) -> int:
    """The same windows cut with zarr's own slices from arrays opened once; no sha256."""
    cache = Cache.open(path)
    with zarr.config.set(pipeline):
        parts = [
            {n: zarr.open_array(path / part.name / n, mode="r") for n in names}
            for part in cache.manifest.parts
        ]
        counted = [("kept", ("topk_ids", "topk_p")), ("tail_kept", ("tail_ids", "tail_logp"))]
        ends = [
            {c: np.append(0, p[c][...].cumsum(dtype=np.int64)) for c, _ in counted if c in p}
            for p in parts
        ]
        rng, read = np.random.default_rng(0), 0
        for _ in range(WINDOWS):
            at = int(rng.integers(len(parts)))
            arrays = parts[at]
            start = int(rng.integers(arrays["tokens"].shape[0] - WINDOW))
            spans = dict.fromkeys(names, (start, start + WINDOW))
            for counter, ragged in counted:
                for name in ragged if counter in arrays else ():
                    spans[name] = tuple(ends[at][counter][[start, start + WINDOW]].tolist())
            cut = {name: arrays[name][a:b] for name, (a, b) in spans.items()}
            decode_p(cut["topk_p"])
            read += len(cut["tokens"])
    return read


def write_peer(path: Path) -> int:
    """The peer's file from the same documents, repeated; returns its bytes."""
    members, pending = [], []
    for law in documents("c14", num_documents=DOCUMENTS, seed=0):
        ids = np.argpartition(law, -PEER_K, -1)[:, -PEER_K:]
        order = np.argsort(-np.take_along_axis(law, ids, -1), -1)
        ids = np.take_along_axis(ids, order, -1).astype(np.uint32)
        pending.append((ids, np.log(np.take_along_axis(law, ids, -1)).astype(np.float16)))
        if sum(len(one) for one, _ in pending) == PEER_TOKENS:
            ids, logp = (np.concatenate(column) for column in zip(*pending, strict=True))
            payload = io.BytesIO()
            torch.save(
                {
                    "low": torch.from_numpy((ids & 0xFFFF).astype(np.uint16)),
                    "high": torch.from_numpy(np.packbits((ids >> 16).astype(np.uint8))),
                    "logp": torch.from_numpy(logp),
                },
                payload,
            )
            members.append(bytes(Zstd(level=3).encode(payload.getvalue())))
            pending = []
    with path.open("wb") as file:
        for number in range(NUM_TOKENS // PEER_TOKENS):
            member = members[number % len(members)]
            file.write(len(member).to_bytes(8, "little") + member)
    return path.stat().st_size


def _peer_members(path: Path) -> Iterator[dict[str, torch.Tensor]]:
    codec = Zstd(level=3)
    with path.open("rb") as file:
        while header := file.read(8):
            payload = codec.decode(file.read(int.from_bytes(header, "little")))
            yield torch.load(io.BytesIO(payload), weights_only=True)


def peer_loader(path: Path) -> int:
    """Member after member, ids in int64 as its loader returns them."""
    read = 0
    for member in _peer_members(path):
        bits = torch.from_numpy(np.unpackbits(member["high"].numpy()))
        ids = (bits.long() << 16).view(-1, PEER_K) | member["low"].long()
        assert ids.shape == member["logp"].shape
        read += len(ids)
    return read


def peer_format(path: Path) -> int:
    """The same bytes read with fewer passes than its loader makes: ids in uint32, by numpy."""
    read = 0
    for member in _peer_members(path):
        ids = member["low"].numpy().astype(np.uint32)
        ids |= np.unpackbits(member["high"].numpy()).view(bool).astype(np.uint32).reshape(
            ids.shape
        ) << np.uint32(16)
        read += len(ids)
    return read


Readings = dict[str, tuple[list[float], list[float]]]


def measure(tasks: dict[str, Callable[[], int]]) -> Readings:
    """{task: (CPU, wall) rates of all rounds}; tasks in turn, so that load meets all alike."""
    rates: Readings = {name: ([], []) for name in tasks}
    for round_number in range(ROUNDS + 1):  # the first warms the page cache
        for name, task in tasks.items():
            cpu, wall = time.process_time(), time.perf_counter()
            tokens = task()
            if round_number:
                rates[name][0].append(tokens / (time.process_time() - cpu))
                rates[name][1].append(tokens / (time.perf_counter() - wall))
    return rates


def by_zarr(pipeline: dict[str, Any], task: Callable[[Path, tuple[str, ...]], int]) -> Any:
    """The reader without its own decoding."""

    def run(path: Path, names: tuple[str, ...]) -> int:
        none = patch.object(storage.reader, "open_shard", return_value=None)
        with none, patch.object(storage.reader, "READ", pipeline):
            return task(path, names)

    return run


def tasks(cache: Path, peer_file: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """Rows of the table by name `what | how | samples`."""
    for label, names in (("without", BASE), ("with", BASE + SAMPLES)):
        for what, task in (("sequential", sequential), ("shuffled epoch", epoch)):
            yield f"{what} | lkcache | {label}", lambda t=task, n=names: t(cache, n)
            for how, pipeline in PIPELINES.items():
                slow = by_zarr(pipeline, task)
                yield f"{what} | {how} | {label}", lambda t=slow, n=names: t(cache, n)
        yield f"windows | lkcache | {label}", lambda n=names: windows(cache, n)
        for how, pipeline in PIPELINES.items():
            yield (
                f"windows | {how} | {label}",
                lambda p=pipeline, n=names: zarr_windows(cache, n, p),
            )
    yield f"{PEER} | none", lambda: peer_loader(peer_file)
    yield "sequential | its format, read in numpy | none", lambda: peer_format(peer_file)


def report(rates: Readings, cache: Cache, peer_bytes: int) -> str:
    """The table as Markdown."""
    counts, stored = cache.manifest.counts, cache.manifest.array_bytes
    sampled = sum(stored[name] for name in SAMPLES)
    ours = (sum(stored.values()) - sampled) / counts["token"]
    middle = {name: [statistics.median(row) for row in rows] for name, rows in rates.items()}
    base = middle[f"{PEER} | none"]
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    tail = cache.manifest.coverage["mean_tail_mass"]
    entries, samples = (counts[name] / counts["row"] for name in ("entry", "sample"))
    about = (
        f"Cache: {counts['token']:,} tokens, {len(cache.manifest.parts)} parts, K = {entries:.1f}, "
        f"tail mass {tail:.4f}; {ours:.1f} B/token, and {sampled / counts['token']:.1f} B/token of "
        f"{samples:.1f} tail samples. Peer: K = {PEER_K}, {peer_bytes / NUM_TOKENS:.1f} B/token."
    )
    machine = f"{os.cpu_count()} cores, {model}; one core used"
    lines = [
        f"Machine: {machine}; load {os.getloadavg()[0]:.1f} at the end.",
        "",
        about,
        "",
        f"Tokens a second, median of {ROUNDS} rounds in turn; windows of {WINDOW:,} tokens.",
        "Wall time is what the load left of the machine; CPU time is what compares.",
        "",
        "| read | by | tail samples | of CPU time | of wall time | × the peer in order, CPU |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for name, (cpu, wall) in middle.items():
        lines.append(f"| {name} | {cpu:,.0f} | {wall:,.0f} | {cpu / base[0]:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the cache and the peer's file, read both, write the table."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        cache, peer_file = Path(folder) / "train.zarr", Path(folder) / "peer.bin"
        write_cache(cache)
        peer_bytes = write_peer(peer_file)
        text = report(measure(dict(tasks(cache, peer_file))), Cache.open(cache), peer_bytes)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
