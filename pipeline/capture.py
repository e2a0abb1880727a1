"""Sequences -> records of the cache: one teacher-forced pass of the target.

    law   = law_of(Sequences.open(path), spec)              # checks all, before a model loads
    parts = plan(lengths, ...)
    done  = cluster.map(partial(begin_part, job), parts)    # a worker owns and writes whole parts

A part is the unit of work: its batches are composed from its own sequences, so that neither workers
nor restarts change a bit; it is written, by several threads, while the next one's pass runs. The
pass itself is `pipeline.teacher`; knows no draft. Source: DESIGN §5.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from pipeline.cluster import Cluster, Later
from pipeline.config import BatchTokens, Strict, Threads
from pipeline.interface import Head
from pipeline.provenance import Progress
from pipeline.sharded import resident_target
from pipeline.target import DeviceMap, TargetSpec, check_layers, read_head
from pipeline.teacher import Pass, Stats
from pipeline.topk import Rule
from storage.errors import DataError
from storage.layout import VERSION, Layout
from storage.manifest import GROUP, PartEntry, read_manifest
from storage.record import Record
from storage.sequences import Sequences, Survey
from storage.workspace import digest, read_json, write_json
from storage.writer import done_part, plan_parts, seal, stats_path, write_part

MAX_KEPT = 2**16 - 1  # `kept` is a uint16
MAX_SAMPLES = 2**8 - 1  # `tail_kept` is a uint8

_TAIL = ("tail_samples", "tail_full_mass", "tail_min_mass")
_KNOBS = ("keep", "min_prob", "top_p", "max_kept", *_TAIL)
_READ: dict[str, tuple[str, ...]] = {
    "topk": ("keep", "max_kept", *_TAIL),
    "full": (),
    "rebuild": (),
    "threshold": ("min_prob",),
    "fixed": (),
    "nucleus": ("top_p",),
}


class CaptureConfig(Strict):
    """Section `capture`."""

    mode: Literal["topk", "full", "rebuild"]
    keep: Literal["threshold", "fixed", "nucleus"] | None
    """Which ids of a law mode `topk` keeps. What a mode or a rule does not read is null."""
    min_prob: Annotated[float, Field(ge=0, lt=1)] | None
    """`threshold`: every id with p ≥ min_prob."""
    top_p: Annotated[float, Field(gt=0, lt=1)] | None
    """`nucleus`: the likeliest ids until they hold top_p."""
    max_kept: Annotated[int, Field(ge=1, le=MAX_KEPT)] | None
    """No more than this many; `fixed`: just as many."""
    tail_samples: Annotated[int, Field(ge=0, le=MAX_SAMPLES)] | None
    tail_full_mass: Annotated[float, Field(gt=0, le=1)] | None
    tail_min_mass: Annotated[float, Field(ge=0, lt=1)] | None
    hidden_dtype: Literal["bfloat16", "int8"]
    """Of stored hidden states; mode `rebuild` keeps last_hidden in bfloat16."""
    hidden_layers: list[Annotated[int, Field(ge=0)]]
    last_hidden: bool
    part_tokens: BatchTokens
    batch_tokens: BatchTokens
    seed: Annotated[int, Field(ge=0)]
    threads: Threads

    @field_validator("hidden_layers")
    @classmethod
    def _once_each(cls, layers: list[int]) -> list[int]:
        if len(set(layers)) < len(layers):
            raise ValueError("layer ids must differ from each other")
        return layers

    @model_validator(mode="after")
    def _no_knob_without_a_reader(self) -> Self:
        rule = f" and keep {self.keep}" if self.mode == "topk" else ""
        read = {*_READ[self.mode], *(_READ[self.keep or "threshold"] if rule else ())}
        wanted = [name for name in _KNOBS if name in read and getattr(self, name) is None]
        surplus = [name for name in _KNOBS if name not in read and getattr(self, name) is not None]
        if wanted:
            raise ValueError(f"values for {', '.join(wanted)}, which mode {self.mode}{rule} reads")
        if surplus:
            raise ValueError(
                f"null for {', '.join(surplus)}, which mode {self.mode}{rule} does not read"
            )
        if self.mode == "rebuild" and not self.last_hidden:
            raise ValueError("last_hidden: true, from which mode rebuild makes the laws again")
        eight_bits = self.hidden_layers or (self.last_hidden and self.mode != "rebuild")
        if self.hidden_dtype == "int8" and not eight_bits:
            raise ValueError("hidden_dtype: bfloat16, since no hidden state is stored in 8 bits")
        return self

    def rule(self) -> Rule | None:
        """What `pipeline.topk` keeps of a row; None where laws are kept whole."""
        if self.mode != "topk":
            return None
        assert self.max_kept is not None, "validated"
        assert self.tail_samples is not None, "validated"
        assert self.tail_full_mass is not None, "validated"
        assert self.tail_min_mass is not None, "validated"
        return Rule(
            min_prob=self.min_prob or 0.0,
            top_p=self.top_p,
            max_kept=self.max_kept,
            tail_samples=self.tail_samples,
            tail_full_mass=self.tail_full_mass,
            tail_min_mass=self.tail_min_mass,
        )


@dataclass(frozen=True)
class Job:
    """What all parts of a run share; small and picklable."""

    folder: Path
    """Of the target."""
    fingerprint: str
    """Of the target."""
    device: str
    config: CaptureConfig
    layout: Layout
    device_map: DeviceMap | None = None


@dataclass(frozen=True)
class Part:
    """One part of one cache: a run of whole sequences."""

    sequences: Path
    sequences_digest: str
    cache: Path
    """The cache's folder in scratch."""
    stats: Path
    """Where the part's counts go, beside the cache in scratch."""
    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Done:
    """A part that lies verified in scratch."""

    entry: PartEntry
    stats: Stats


def fingerprint_of(spec: TargetSpec, config: CaptureConfig, sequences: Mapping[str, str]) -> str:
    """What names a cache: the target, the sequences, the section, the format's version."""
    return digest(
        {
            "target": spec.fingerprint,
            "sequences": dict(sequences),
            "params": config.model_dump(),
            "format": VERSION,
        }
    )


def layout_of(spec: TargetSpec, config: CaptureConfig) -> Layout:
    """The arrays to write; `TargetError` for a layer that is not the input of one of the target."""
    check_layers(config.hidden_layers, spec.num_layers)
    return Layout(
        mode=config.mode,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        hidden_layers=tuple(config.hidden_layers),
        last_hidden=config.last_hidden,
        hidden_dtype=config.hidden_dtype,
    )


def law_of(rows: Sequences, spec: TargetSpec) -> str:
    """The law that all sequences of a file are samples of.

    `DataError` where there is none, where they mix laws, and where one is longer than the target's
    context, holds an id outside its vocabulary, no token at all, or another one's name; and where
    no token of any of them is supervised.
    """
    rerun = "run dvc repro generate, or correct the sequences"
    found = rows.survey
    if len(found.laws) != 1:
        raise DataError(
            found=f"{rows.path} has sequences of "
            f"{' and '.join(found.laws) or 'no law: it is empty'}",
            expected="at least one sequence, all of one law",
            todo=rerun,
        )
    lengths, turns, largest = found.lengths, found.turns, found.largest
    bad = (lengths == 0) | (lengths != turns)
    bad |= (lengths > spec.context_tokens) | (largest >= spec.vocab_size)
    if bad.any():
        first = int(bad.argmax())
        if not 0 < lengths[first] == turns[first]:
            problem = f"has {lengths[first]} tokens and {turns[first]} turns"
        elif lengths[first] > spec.context_tokens:
            problem = f"has {lengths[first]} tokens"
        else:
            problem = f"holds the token id {largest[first]}"
        (row,) = rows.take([first])
        raise DataError(
            found=f"{rows.path}: sequence {row['id']!r} {problem}",
            expected=f"1 to {spec.context} with a turn each, ids below {spec.vocab_size}",
            todo=rerun,
        )
    if (doubled := _doubled(rows)) is not None:
        raise DataError(
            found=f"{rows.path}: two sequences {doubled!r}",
            expected="an id of its own for each, by which tail samples are drawn",
            todo=rerun,
        )
    if not found.written.any():
        raise DataError(
            found=f"{rows.path}: no token of its {len(rows)} sequences is in an assistant's turn",
            expected="turns (0 or more) at what a draft is to learn",
            todo=f"look at lkcache show --mask, and {rerun}",
        )
    return found.laws[0]


def _doubled(rows: Sequences) -> str | None:
    """An id that two sequences have."""
    _, place, count = np.unique(rows.survey.ids, return_inverse=True, return_counts=True)
    seen: set[str] = set()
    for row in rows.take(np.flatnonzero(count[place] > 1)):
        if row["id"] in seen:
            return str(row["id"])
        seen.add(row["id"])
    return None


def plan(
    lengths: Sequence[int],
    *,
    sequences: Path,
    sequences_digest: str,
    cache: Path,
    part_tokens: int,
) -> list[Part]:
    """The parts of a cache; their boundaries depend on lengths and parameters alone."""
    ranges = plan_parts(lengths, part_tokens=part_tokens)
    return [
        Part(
            sequences=sequences.absolute(),
            sequences_digest=sequences_digest,
            cache=cache.absolute(),
            stats=stats_path(cache, index).absolute(),
            index=index,
            start=start,
            stop=stop,
        )
        for index, (start, stop) in enumerate(ranges)
    ]


def capture_part(job: Job, part: Part) -> Done:
    """Capture and write one part, unless an earlier run left it whole."""
    begun = begin_part(job, part)
    return begun.finish(1) if isinstance(begun, Later) else begun


def begin_part(job: Job, part: Part) -> Done | Later[Done]:
    """The pass of one part; writing it is left for later, beside the next part's pass."""
    done = _done(job, part)
    if done is not None:
        return done
    target = resident_target(
        job.folder,
        device=job.device,
        fingerprint=job.fingerprint,
        device_map=job.device_map,
    )
    rows = _opened(part.sequences, part.sequences_digest).take(range(part.start, part.stop))
    teacher = Pass(
        target,
        job.layout,
        rule=job.config.rule(),
        batch_tokens=job.config.batch_tokens,
        seed=job.config.seed,
        head=_head(job.folder, job.fingerprint) if job.layout.mode == "rebuild" else None,
    )
    records = teacher.records(rows)
    return Later(partial(_write, job, part, records, teacher.stats()))


def _write(job: Job, part: Part, records: Sequence[Record], stats: Stats, writers: int) -> Done:
    # before the part, so that a part that is there has them
    write_json(part.stats, asdict(stats))
    return Done(write_part(part.cache, part.index, records, job.layout, writers), stats)


@lru_cache(maxsize=1)
def _head(folder: Path, _fingerprint: str) -> Head:
    """The head that laws will be made with again, kept between this process's parts."""
    return read_head(folder)


def _done(job: Job, part: Part) -> Done | None:
    """What an earlier run left of a part; None where that is missing or torn."""
    try:
        stats = Stats(**read_json(part.stats))
    except DataError:
        return None
    entry = done_part(part.cache, part.index, job.layout)
    return None if entry is None else Done(entry, stats)


@lru_cache(maxsize=1)
def _opened(path: Path, _digest: str) -> Sequences:
    """A split's sequences, of which this process reads the group that its next part lies in."""
    return Sequences.open(path)


def least_bytes(layout: Layout, surveys: Iterable[Survey]) -> float:
    """What a cache takes at the least: its wide arrays alone, at half their raw size.

    bfloat16 states shrink to 0.73 (reference/offline_caches.md §4.3) and less only where they hold
    little; what does not fit by this figure will not fit at all.
    """
    wide = [array for array in layout.arrays() if len(array.dims) > 1]
    counts = {"token": 0, "row": 0}
    for survey in surveys:
        counts["token"] += survey.num_tokens
        counts["row"] += int(survey.supervised.sum(dtype=np.int64))
    raw = [
        counts[a.dims[0]] * math.prod(layout.width(a)) * np.dtype(a.dtype).itemsize for a in wide
    ]
    return sum(raw) / 2


def capture_all(
    parts: Mapping[str, Sequence[Part]],
    job: Job,
    cluster: Cluster,
    *,
    num_tokens: int,
    require_room: Callable[..., None],
) -> dict[str, list[Done]]:
    """Capture every part of every split, in the order of the parts.

    After each, `require_room` (of the workspace) stops the run where the disk will not hold the
    rest: now, while all that is done is whole, rather than when the disk is full.
    """
    units = [(split, part) for split, some in parts.items() for part in some]
    results = cluster.map(partial(begin_part, job), [part for _, part in units])
    done: dict[str, list[Done]] = {split: [] for split in parts}
    tokens, num_bytes = 0, 0
    with Progress(num_tokens, "capture", unit="token") as line:
        for (split, _), result in zip(units, results, strict=True):
            done[split].append(result)
            line.add(result.stats.tokens)
            tokens += result.stats.tokens
            own = sum(file.num_bytes for file in result.entry.files.values())
            num_bytes += own
            # what is done foretells the rest; a part's own bytes more, for the seal
            left = (num_tokens - tokens) * num_bytes / tokens
            if left:
                require_room("the rest of the capture", left=left + own, total=left + num_bytes)
    return done


def seal_cache(
    cache: Path,
    done: Sequence[Done],
    *,
    job: Job,
    source: Mapping[str, str],
    tokenizer: Path,
) -> dict[str, Any]:
    """Make the parts a cache that carries its tokenizer; returns its metrics."""
    extra = {tokenizer.name: tokenizer.read_bytes()} if tokenizer.is_file() else {}
    seal(
        cache,
        layout=job.layout,
        parts=[part.entry for part in done],
        source=source,
        params=job.config.model_dump(),
        extra_files=extra,
    )
    manifest = read_manifest(cache)
    tokens, rows = manifest.counts["token"], manifest.counts["row"]
    coverage = manifest.coverage
    return {
        "sequences": manifest.counts["sequence"],
        "tokens": tokens,
        "rows": rows,
        "bytes": sum(manifest.array_bytes.values()),
        "bytes_per_token": {k: round(v / tokens, 4) for k, v in manifest.array_bytes.items()},
        "mean_kept": round(coverage["mean_kept"], 6),
        "coverage": round(1.0 - coverage["mean_tail_mass"], 9),
        "mean_tail_mass": round(coverage["mean_tail_mass"], 9),
        "mean_tail_samples": round(coverage["mean_tail_samples"], 6),
        "mean_entropy": round(sum(part.stats.entropy for part in done) / max(1, rows), 6),
        # batches that found no memory and were cut: their rounding may differ from another run's
        "memory_halvings": sum(part.stats.halvings for part in done),
    }


def times(done: Mapping[str, Sequence[Done]], *, wall_s: float) -> dict[str, Any]:
    """Seconds on the wall, of all workers together, and of the target alone; tokens/s a worker.

    `parts` keeps what `lkcache repair` needs: each part's counts beside the digest of its log, so
    that a sealed cache can go back to scratch and be refilled where it is damaged.
    """
    stats = [part.stats for some in done.values() for part in some]
    worked_s = sum(part.seconds for part in stats)
    return {
        "seconds": round(wall_s, 3),
        "worker_seconds": round(worked_s, 3),  # of earlier, interrupted runs too
        "target_seconds": round(sum(part.target_seconds for part in stats), 3),
        "tokens_per_s": round(sum(part.tokens for part in stats) / max(worked_s, 1e-9), 1),
        "parts": {
            split: [{"log": p.entry.files[GROUP].sha256, **asdict(p.stats)} for p in some]
            for split, some in done.items()
        },
    }
