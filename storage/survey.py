"""Histograms of what a cache stores of its target's laws, by domain: kept ids, tail mass, entropy.

    found = survey(Cache.open(path))
    found.domains["code"].counts["kept"]     # rows by bin of `BINS["kept"]`

Reads a part at a time and knows no target. Dims: T tokens of a part, R supervised rows, E entries,
M tail samples, V vocabulary.

The entropy of a row in mode `topk` is that of its kept ids plus the tail's: r times the mean of
−log p over the row's tail samples, which is unbiased, or −r log r (the tail as one id, a lower
bound) where it has none. In mode `full` it is exact but for the rounding of the logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.codecs import decode_p, from_bf16_bits
from storage.reader import Cache
from storage.record import supervised

Floats = NDArray[np.float64]

# a cache of many parts is sampled, evenly: histograms of some millions of rows do not move
SAMPLED_PARTS = 64
BLOCK_BYTES = 32 << 20  # of full logits in float32 at a time


@dataclass(frozen=True)
class Bins:
    """Rows fall into bin k when edges[k] <= value < edges[k + 1]; the last bin is open."""

    title: str
    edges: tuple[float, ...]
    labels: tuple[str, ...]
    ticks: tuple[str, ...]
    """Short labels, for an axis."""


def _kept_bins() -> Bins:
    powers = [2**k for k in range(17)]
    spans = [f"{a + 1:,}-{b:,}" if b > a + 1 else f"{b:,}" for a, b in pairwise(powers)]
    edges = (0, 1, *(power + 1 for power in powers))
    labels = ("0", "1", *spans, f"over {powers[-1]:,}")
    ticks = ("0", "1", "2", *(f"≤{b:,}" for b in powers[2:]), labels[-1])
    return Bins("kept ids, K", edges, labels, ticks)


def _tail_bins() -> Bins:
    exponents = range(-6, 0)
    spans = [f"1e{a} to 1e{a + 1}" for a in exponents]
    edges = (0.0, 1e-12, *(10.0**a for a in exponents))
    labels = ("none", "under 1e-6", *spans)
    ticks = ("0", "<1e-6", *(f"1e{a}" for a in exponents))
    return Bins("tail mass, 1 − Σ kept p", edges, labels, ticks)


def _entropy_bins() -> Bins:
    starts = [k / 4 for k in range(33)]
    labels = [f"{a:g} to {a + 0.25:g}" for a in starts[:-1]]
    ends = (*labels, f"{starts[-1]:g} or more")
    ticks = tuple(f"{a:g}" for a in starts)
    return Bins("entropy of the stored law, nats", tuple(starts), ends, ticks)


BINS: Mapping[str, Bins] = {
    "kept": _kept_bins(),
    "tail": _tail_bins(),
    "entropy": _entropy_bins(),
}


@dataclass
class Tally:
    """Supervised rows of one domain: sums of each measure, and counts by bin."""

    rows: int = 0
    logp: float = 0.0
    """Sum of `token_logp`, nats."""
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BINS, 0.0))
    counts: dict[str, NDArray[np.int64]] = field(
        default_factory=lambda: {k: np.zeros(len(b.labels), np.int64) for k, b in BINS.items()}
    )

    def add(self, logp: Floats, values: Mapping[str, Floats]) -> None:
        """Count rows; `values` holds some measures, each for every row."""
        self.rows += len(logp)
        self.logp += float(logp.sum())
        for name, value in values.items():
            self.sums[name] += float(value.sum())
            bins = np.digitize(value, BINS[name].edges) - 1
            self.counts[name] += np.bincount(bins.clip(0), minlength=len(BINS[name].labels))

    def mean(self, name: str) -> float:
        """Mean of a measure over the rows; nan where there are none."""
        return self.sums[name] / self.rows if self.rows else float("nan")

    @property
    def mean_logp(self) -> float:
        """Mean log p of the tokens that were said."""
        return self.logp / self.rows if self.rows else float("nan")


@dataclass(frozen=True)
class Survey:
    """What was counted."""

    domains: dict[str, Tally]
    """By name, sorted."""
    measures: tuple[str, ...]
    """Keys of `BINS` that this cache's mode has."""
    parts: int
    """Parts read, of all the cache's parts."""

    @property
    def whole(self) -> Tally:
        """All domains together."""
        total = Tally()
        for tally in self.domains.values():
            total.rows += tally.rows
            total.logp += tally.logp
            for name in BINS:
                total.sums[name] += tally.sums[name]
                total.counts[name] += tally.counts[name]
        return total


def measures_of(mode: str) -> tuple[str, ...]:
    """What a mode stores of a row's law; the others store nothing to count."""
    return {"topk": ("kept", "tail", "entropy"), "full": ("entropy",)}.get(mode, ())


def survey(cache: Cache, *, max_parts: int = SAMPLED_PARTS) -> Survey:
    """Count the supervised rows of all parts, or of so many, evenly spread."""
    measures = measures_of(cache.layout.mode)
    parts = np.unique(np.linspace(0, cache.num_parts - 1, max_parts).astype(int))
    domains: dict[str, Tally] = {}
    for part in parts.tolist():
        rows, domain_R, names = _rows(cache, part)
        logp_R = cache.array(part, "token_logp")[rows].astype(np.float64)
        values = _values(cache, part, rows) if measures else {}
        for code, name in enumerate(names):
            own = domain_R == code
            tally = domains.setdefault(name, Tally())
            tally.add(logp_R[own], {key: value[own] for key, value in values.items()})
    return Survey(dict(sorted(domains.items())), measures, len(parts))


def _rows(cache: Cache, part: int) -> tuple[NDArray[np.bool_], NDArray[np.int64], list[str]]:
    """[T] supervised, [R] number of the row's domain, and the domains' names."""
    length = cache.array(part, "length")
    rows = supervised(cache.array(part, "turn"))
    rows[cache.array(part, "row_start") + length - 1] = False
    ends = [0, *cache.array(part, "domain_end").tolist()]
    content = cache.array(part, "domain").tobytes()
    texts = [content[a:b].decode("utf-8") for a, b in pairwise(ends)]
    names = list(dict.fromkeys(texts))
    code = np.array([names.index(text) for text in texts], dtype=np.int64)
    return rows, np.repeat(code, length)[rows], names


def _values(cache: Cache, part: int, rows: NDArray[np.bool_]) -> dict[str, Floats]:
    """[R] each measure."""
    if cache.layout.mode == "full":
        return {"entropy": _full_entropy(cache.array(part, "logits"))}
    arrays = {name: cache.array(part, name) for name in _LAW}
    kept = arrays["kept"][rows].astype(np.float64)
    tail = np.exp(arrays["tail_logp_mass"][rows].astype(np.float64))
    return {"kept": kept, "tail": tail, "entropy": _entropy(arrays)[rows]}


_LAW = ("kept", "topk_p", "tail_kept", "tail_logp", "tail_logp_mass")


def _entropy(arrays: Mapping[str, NDArray[Any]]) -> Floats:
    """[T] entropy of the stored law (module docstring); of no meaning at unsupervised tokens."""
    num_tokens = len(arrays["kept"])
    p = decode_p(arrays["topk_p"]).astype(np.float64)
    owner_E = np.repeat(np.arange(num_tokens), arrays["kept"])
    inside = np.bincount(owner_E, _surprise(p), minlength=num_tokens)
    owner_M = np.repeat(np.arange(num_tokens), arrays["tail_kept"])
    drawn = np.bincount(owner_M, -arrays["tail_logp"].astype(np.float64), minlength=num_tokens)
    r = np.exp(arrays["tail_logp_mass"].astype(np.float64))
    count = arrays["tail_kept"].astype(np.float64)
    sampled = r * drawn / np.maximum(count, 1)
    return (inside + np.where(count > 0, sampled, _surprise(r))).astype(np.float64)


def _surprise(p: Floats) -> Floats:
    """−p log p, 0 at 0."""
    return -p * np.log(np.maximum(p, np.finfo(np.float64).tiny))


def _full_entropy(logits: NDArray[np.uint16]) -> Floats:
    """[R] entropy of rows of bfloat16 log-probabilities."""
    step = max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    found = [np.zeros(0)]
    for start in range(0, len(logits), step):
        block_RV = from_bf16_bits(logits[start : start + step])
        block_RV -= block_RV.max(axis=1, keepdims=True)
        p_RV = np.exp(block_RV)
        total_R = p_RV.sum(axis=1, dtype=np.float64)
        inner_R = (p_RV * block_RV).sum(axis=1, dtype=np.float64)
        found.append(np.log(total_R) - inner_R / total_R)
    return np.concatenate(found)
