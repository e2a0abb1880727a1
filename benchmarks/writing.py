"""What writing a part takes, by one writer and by several: CPU a token, and the same bytes.

    python -m benchmarks.writing              # some two minutes; writes writing.md beside this

Made-up sequences: laws of a few dozen entries, hidden states of normal numbers, which compress like
real ones (0.77 of their bytes; real ones 0.73 to 0.78). Parts go to memory (`/dev/shm`) where there
is such a folder, so that no disk is measured.

All but the last column is CPU time: what the threads took together that encode, and the one that
digests; and what the thread took that hands them chunks, writes the files and syncs them. That one
is alone, so a token takes at least its time. `zarr` writes the
same arrays joined, through zarr-python's own pipeline, and digests the files: what this project did
before. The clock depends on who else uses the cores: where the load is above their number, it says
nothing of scaling. Ways take turns; of each, the round of the least CPU stands here, and the
shortest clock.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from storage.codecs import bf16_bits, encode_int8, encode_p
from storage.layout import BITSHUFFLED, PROBABILITY, Layout, chunk_length
from storage.manifest import file_entries
from storage.record import Record
from storage.workspace import tree_digest
from storage.writer import write_part

OUT = Path(__file__).with_suffix(".md")
VOCAB, ROUNDS, SEQUENCE, NUM_SEQUENCES = 128_256, 4, 512, 16
WRITERS = (1, 2, 4)
MEMORY = Path("/dev/shm")  # noqa: S108  a folder in memory is what is wanted
LAYOUTS = {
    "law only": Layout("topk", VOCAB, 1024, (), False),
    "law, 3 layers and the last of 1,024, bfloat16": Layout("topk", VOCAB, 1024, (2, 8, 13), True),
    "law, 3 layers of 4,096, int8": Layout("topk", VOCAB, 4096, (2, 16, 29), False, "int8"),
    "law, 3 layers and the last of 4,096, bfloat16": Layout("topk", VOCAB, 4096, (2, 16, 29), True),
}
TARGET_US = 40.0
"""A token of an 8 B target at the 400 TFLOP/s that benchmarks/scale.py assumes."""


def record(layout: Layout, number: int) -> Record:
    """One sequence, all of it the assistant's."""
    rng = np.random.default_rng(number)
    rows = np.arange(SEQUENCE) < SEQUENCE - 1
    kept = np.where(rows, rng.integers(5, 65, SEQUENCE), 0).astype(np.uint16)
    drawn = np.where(rows, rng.integers(0, 10, SEQUENCE), 0).astype(np.uint8)
    states = {}
    if layout.hidden_layers:
        shape = (SEQUENCE, len(layout.hidden_layers), layout.hidden_size)
        value = rng.standard_normal(shape).astype(np.float32)
        if layout.hidden_dtype == "int8":
            states["hidden_int8"], states["hidden_scale"] = encode_int8(value)
        else:
            states["hidden"] = bf16_bits(value)
    if layout.last_hidden:
        value = rng.standard_normal((SEQUENCE, layout.hidden_size)).astype(np.float32)
        states["last_hidden"] = bf16_bits(value)
    return Record(
        id=f"s{number}",
        domain="made up",
        tokens=rng.integers(0, VOCAB, SEQUENCE).astype(np.uint32),
        turn=np.zeros(SEQUENCE, np.int32),
        token_logp=np.where(rows, -rng.random(SEQUENCE), 0).astype(np.float32),
        kept=kept,
        topk_ids=rng.integers(0, VOCAB, int(kept.sum())).astype(np.uint32),
        topk_p=encode_p(np.sort(rng.random(int(kept.sum())) ** 6)[::-1]),
        tail_logp_mass=np.where(rows, -5 * rng.random(SEQUENCE), 0).astype(np.float32),
        tail_kept=drawn,
        tail_ids=rng.integers(0, VOCAB, int(drawn.sum())).astype(np.uint32),
        tail_logp=(-10 * rng.random(int(drawn.sum()))).astype(np.float16),
        **states,
    )


def by_zarr(folder: Path, records: Sequence[Record], layout: Layout) -> None:
    """The arrays of one or more numbers a token or entry, as zarr itself writes them."""
    with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}):
        group = zarr.create_group(folder, zarr_format=3)
        for array in layout.arrays():
            if array.dims[0] not in ("token", "entry", "sample"):
                continue  # of sequences: their names and ends, a few hundred bytes
            value = np.concatenate([getattr(each, array.name) for each in records])
            rest = value.shape[1:]
            row_bytes = value.itemsize * int(np.prod(rest))
            chunk = chunk_length(array, len(value), row_bytes=row_bytes)
            level = 1 if rest else 6 if array.encoding == PROBABILITY else 3
            shuffle = "bitshuffle" if array.name in BITSHUFFLED else "shuffle"
            created = group.create_array(
                array.name,
                shape=value.shape,
                dtype=value.dtype,
                chunks=(chunk, *rest),
                shards=(-(-len(value) // chunk) * chunk, *rest),
                compressors=[
                    BloscCodec(
                        typesize=value.itemsize, cname="zstd", clevel=level, shuffle=shuffle
                    ),
                    Crc32cCodec(),
                ],
                config={"write_empty_chunks": True},
            )
            created[...] = value
    file_entries(folder)


def seconds_of(task: Callable[[Path], object], where: Path | None) -> tuple[float, float, float]:
    """(CPU of all threads, CPU of this one, clock) seconds of writing into a new folder."""
    with tempfile.TemporaryDirectory(dir=where) as folder:
        starts = time.process_time(), time.thread_time(), time.perf_counter()
        task(Path(folder) / "part")
        ends = time.process_time(), time.thread_time(), time.perf_counter()
    whole, own, clock = (end - start for start, end in zip(starts, ends, strict=True))
    return whole, own, clock


def measure(layout: Layout, where: Path | None) -> dict[str, tuple[float, float, float]]:
    """Microseconds a token by way; asserts that all writers write the same bytes."""
    records = [record(layout, number) for number in range(NUM_SEQUENCES)]

    def ours(writers: int, folder: Path) -> None:
        write_part(folder, 0, records, layout, writers)

    digests = set()
    for writers in WRITERS:
        with tempfile.TemporaryDirectory(dir=where) as folder:
            ours(writers, Path(folder))
            digests.add(tree_digest(Path(folder)))
    assert len(digests) == 1, "writers differ in what they write"
    ways: dict[str, Callable[[Path], object]] = {f"{n}": partial(ours, n) for n in WRITERS}
    ways["zarr"] = partial(by_zarr, records=records, layout=layout)
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, task in ways.items():
            found[way].append(seconds_of(task, where))
    scale = 1e6 / (SEQUENCE * NUM_SEQUENCES)
    best = {way: (*min(rows)[:2], min(row[2] for row in rows)) for way, rows in found.items()}
    return {way: (a * scale, b * scale, c * scale) for way, (a, b, c) in best.items()}


def main() -> None:
    """Measure, and write the page."""
    where = MEMORY if MEMORY.is_dir() else None
    head = "a token of | writers | encoding and digests, µs | the thread that writes, µs"
    lines = [f"| {head} | tokens/s of a core | clock, µs |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    needed = []
    for name, layout in LAYOUTS.items():
        found = measure(layout, where)
        for way, (whole, own, clock) in found.items():
            parts = ("", "") if way == "zarr" else (f"{whole - own:.1f}", f"{own:.1f}")
            shown = " | ".join([name, way, *parts, f"{1e6 / whole:,.0f}", f"{clock:.1f}"])
            lines.append(f"| {shown} |")
        whole, own, _ = found["1"]
        threads = max(1, int(np.ceil((whole - own) / TARGET_US)))
        needed.append(
            f"- {name}: {whole / TARGET_US:.2f} cores, so {threads} "
            f"writer{'s' if threads > 1 else ''}, and the thread that writes is busy for "
            f"{own / TARGET_US:.0%} of the time"
        )
        print("\n".join(lines), flush=True)
    said = (
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {ROUNDS} rounds in turn, parts of "
        f"{SEQUENCE * NUM_SEQUENCES:,} tokens. The bytes are the same for "
        f"{', '.join(map(str, WRITERS))} writers."
    )
    aim = f"To write as fast as an 8 B target passes, an assumed {TARGET_US:.0f} µs a token:"
    text = "\n".join([said, "", *lines, "", aim, "", *needed])
    OUT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
