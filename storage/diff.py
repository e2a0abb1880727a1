"""Two caches -> what differs: identity, coverage, and the values of the sequences they share.

    found = diff(Cache.open(a), Cache.open(b), sequences=64)
    found.equal

Identity and coverage come from the manifests. Values are compared by sequence id, whatever part a
sequence lies in: of sequences whose tokens and turns are equal, the largest and mean difference of
`token_logp`, of the stored laws (total variation) and of hidden states. Knows no target.

Two truncated laws are compared on the ids that both keep, everything else merged into one id: a
lower bound of the true TV, and 0 for equal laws whatever each keeps. Two full ones exactly.

Dims: T tokens, R supervised rows, E entries, V vocabulary, L layers, D target width.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.codecs import decode_p, from_bf16_bits
from storage.manifest import MANIFEST
from storage.reader import Cache
from storage.record import Record, supervised

BATCH = 32  # sequences of each cache in memory at a time
ABSENT = "absent"
LAW = {
    "turn",
    "token_logp",
    "kept",
    "topk_ids",
    "topk_p",
    "tail_kept",
    "tail_ids",
    "tail_logp",
    "tail_logp_mass",
}


@dataclass(frozen=True)
class Row:
    """One property of both caches."""

    what: str
    a: Any
    b: Any

    @property
    def equal(self) -> bool:
        """Both have it, and the same."""
        return bool(self.a == self.b)


@dataclass(frozen=True)
class Gap:
    """|a − b| over all compared numbers of one kind; zeros where none was compared."""

    count: int
    largest: float
    mean: float

    @classmethod
    def of(cls, differences: Sequence[NDArray[np.floating]]) -> "Gap":
        """Of the absolute differences of some sequences."""
        flat = np.concatenate([np.zeros(0), *(d.ravel().astype(np.float64) for d in differences)])
        if not flat.size:
            return cls(0, 0.0, 0.0)
        return cls(flat.size, float(flat.max()), float(flat.mean()))


@dataclass(frozen=True)
class Values:
    """Sequences that both caches hold, compared number by number."""

    only_a: int
    """Ids that the other cache lacks."""
    only_b: int
    shared: int
    compared: int
    """Of the shared ones: all, or a sample."""
    other_tokens: list[str]
    """Ids of compared sequences whose tokens, turns or domain differ; not compared further."""
    unequal: list[str]
    """Ids of compared sequences of equal tokens of which any stored number differs."""
    gaps: dict[str, Gap]
    """`token_logp` in nats, `law` as total variation, `hidden`, `last_hidden`: what both store."""


@dataclass(frozen=True)
class Diff:
    """All that was compared."""

    identity: list[Row]
    coverage: list[Row]
    values: Values
    same_bytes: bool
    """The manifests are equal byte for byte, and so are all files that they list."""

    @property
    def equal(self) -> bool:
        """Nothing that was compared differs."""
        v = self.values
        rows = all(row.equal for row in [*self.identity, *self.coverage])
        return rows and not (v.only_a or v.only_b or v.other_tokens or v.unequal)


def diff(a: Cache, b: Cache, *, sequences: int | None = None) -> Diff:
    """Compare two opened caches; `sequences` of the shared ones, evenly spread, or all."""
    same = (a.path / MANIFEST).read_bytes() == (b.path / MANIFEST).read_bytes()
    return Diff(
        identity=list(_identity(a, b)),
        coverage=list(_coverage(a, b)),
        values=_values(a, b, sequences),
        same_bytes=same,
    )


def _identity(a: Cache, b: Cache) -> Iterator[Row]:
    version_a, version_b = (json.loads((c.path / MANIFEST).read_bytes())["version"] for c in (a, b))
    yield Row("format version", version_a, version_b)
    layouts = a.layout.as_dict(), b.layout.as_dict()
    yield from _rows("layout", *layouts)
    yield from _rows("source", a.source, b.source)
    yield from _rows("param", dict(a.manifest.params), dict(b.manifest.params))


def _rows(kind: str, a: dict[str, Any], b: dict[str, Any]) -> Iterator[Row]:
    for key in dict.fromkeys([*a, *b]):
        yield Row(f"{kind} {key}", a.get(key, ABSENT), b.get(key, ABSENT))


def _coverage(a: Cache, b: Cache) -> Iterator[Row]:
    for what, key in (("sequences", "sequence"), ("tokens", "token"), ("supervised tokens", "row")):
        yield Row(what, a.manifest.counts[key], b.manifest.counts[key])
    yield Row("parts", a.num_parts, b.num_parts)
    means = a.manifest.coverage, b.manifest.coverage
    for key in sorted({*means[0], *means[1]} - {"domains"}):
        yield Row(key.replace("_", " "), means[0].get(key, ABSENT), means[1].get(key, ABSENT))
    tokens = [
        {name: counts["tokens"] for name, counts in mean["domains"].items()} for mean in means
    ]
    yield from _rows("tokens of domain", *tokens)
    yield from _rows("bytes of", a.manifest.array_bytes, b.manifest.array_bytes)


def _values(a: Cache, b: Cache, sequences: int | None) -> Values:
    place_a, place_b = ({name: n for n, name in enumerate(cache.ids)} for cache in (a, b))
    shared = [name for name in a.ids if name in place_b]
    chosen = shared
    if sequences is not None and sequences < len(shared):
        chosen = [shared[n] for n in np.linspace(0, len(shared) - 1, sequences).astype(int)]
        chosen = list(dict.fromkeys(chosen))
    other: list[str] = []
    unequal: list[str] = []
    found: dict[str, list[NDArray[np.floating]]] = {}
    for start in range(0, len(chosen), BATCH):
        names = chosen[start : start + BATCH]
        records_a = a.records([place_a[name] for name in names])
        records_b = b.records([place_b[name] for name in names])
        for left, right in zip(records_a, records_b, strict=True):
            if not _same_text(left, right):
                other.append(left.id)
                continue
            if not _same_numbers(left, right):
                unequal.append(left.id)
            for name, gap in _gaps(left, right, a.layout.hidden_layers, b.layout.hidden_layers):
                found.setdefault(name, []).append(gap)
    return Values(
        only_a=len(place_a) - len(shared),
        only_b=len(place_b) - len(shared),
        shared=len(shared),
        compared=len(chosen),
        other_tokens=other,
        unequal=unequal,
        gaps={name: Gap.of(gaps) for name, gaps in found.items()},
    )


def _same_text(a: Record, b: Record) -> bool:
    return (
        np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.turn, b.turn)
        and a.domain == b.domain
    )


def _same_numbers(a: Record, b: Record) -> bool:
    """Every array that both hold is equal, bit for bit."""
    for name in (*LAW, "logits", "hidden", "last_hidden"):
        left, right = getattr(a, name), getattr(b, name)
        if (left is None) != (right is None):
            return False
        if left is not None and not (
            left.dtype == right.dtype and left.shape == right.shape and _bits(left) == _bits(right)
        ):
            return False
    return True


def _bits(value: NDArray[Any]) -> bytes:
    return value.tobytes()


def _gaps(
    a: Record, b: Record, layers_a: Sequence[int], layers_b: Sequence[int]
) -> Iterator[tuple[str, NDArray[np.floating]]]:
    """(name, absolute differences) of what both records store."""
    rows = supervised(a.turn)
    yield "token_logp", np.abs(a.token_logp[rows] - b.token_logp[rows])
    tv = _law_tv(a, b, rows)
    if tv is not None:
        yield "law", tv
    layers = [layer for layer in layers_a if layer in layers_b]
    if layers and _is_bf16(a.hidden) and _is_bf16(b.hidden):
        assert a.hidden is not None
        assert b.hidden is not None
        left = a.hidden[:, [layers_a.index(layer) for layer in layers]]
        right = b.hidden[:, [layers_b.index(layer) for layer in layers]]
        if left.shape == right.shape:
            yield "hidden", np.abs(from_bf16_bits(left) - from_bf16_bits(right))
    if _is_bf16(a.last_hidden) and _is_bf16(b.last_hidden):
        assert a.last_hidden is not None
        assert b.last_hidden is not None
        if a.last_hidden.shape == b.last_hidden.shape:
            yield (
                "last_hidden",
                np.abs(from_bf16_bits(a.last_hidden) - from_bf16_bits(b.last_hidden)),
            )


def _is_bf16(value: NDArray[Any] | None) -> bool:
    return value is not None and value.dtype == np.uint16


def _law_tv(a: Record, b: Record, rows: NDArray[np.bool_]) -> NDArray[np.float64] | None:
    """[R] total variation of the stored laws; None where one of the records stores none."""
    if a.logits is not None and b.logits is not None:
        if a.logits.shape != b.logits.shape:
            return None
        return np.array(
            [0.5 * np.abs(_law(x) - _law(y)).sum() for x, y in zip(a.logits, b.logits, strict=True)]
        )
    if a.logits is None and b.logits is None:
        if not (a.kept.any() and b.kept.any()):
            return None
        return _sparse_tv(a, b)[rows]
    full, sparse = (a, b) if a.logits is not None else (b, a)
    assert full.logits is not None
    if not sparse.kept.any():
        return None
    ends = np.concatenate([[0], sparse.kept.cumsum(dtype=np.int64)])
    found = []
    for row, t in enumerate(np.flatnonzero(rows).tolist()):
        ids, p = (
            sparse.topk_ids[ends[t] : ends[t + 1]],
            decode_p(sparse.topk_p[ends[t] : ends[t + 1]]),
        )
        other = _law(full.logits[row])[ids]
        rest = float(p.sum(dtype=np.float64) - other.sum())
        found.append(0.5 * (float(np.abs(p - other).sum()) + abs(rest)))
    return np.array(found)


def _law(bits_V: NDArray[np.uint16]) -> NDArray[np.float64]:
    value = from_bf16_bits(bits_V).astype(np.float64)
    p = np.exp(value - value.max())
    law: NDArray[np.float64] = p / p.sum()
    return law


def _sparse_tv(a: Record, b: Record) -> NDArray[np.float64]:
    """[T] TV on the ids that both keep, all others merged."""
    num_tokens = len(a.tokens)
    key_a, key_b = (
        (np.repeat(np.arange(num_tokens, dtype=np.uint64), r.kept) << np.uint64(32)) | r.topk_ids
        for r in (a, b)
    )
    both, at_a, at_b = np.intersect1d(key_a, key_b, assume_unique=True, return_indices=True)
    owner_E = (both >> np.uint64(32)).astype(np.int64)
    p_a, p_b = (
        decode_p(record.topk_p)[at].astype(np.float64) for record, at in ((a, at_a), (b, at_b))
    )
    inside = np.bincount(owner_E, np.abs(p_a - p_b), minlength=num_tokens)
    rest = np.bincount(owner_E, p_a - p_b, minlength=num_tokens)
    return (0.5 * (inside + np.abs(rest))).astype(np.float64)
