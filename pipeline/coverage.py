"""How much of the target's law a cache keeps: counts, masses and bytes, overall and by domain.

Reads counts only, a part at a time; knows no target and no torch.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.layout import Layout
from storage.reader import Cache
from storage.record import Record, supervised

COUNTS = ("turn", "kept", "tail_kept", "tail_logp_mass")
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}


class _Tally:
    """Sums over supervised rows."""

    def __init__(self) -> None:
        self.rows, self.samples, self.tail_mass = 0, 0, 0.0
        self.kept = np.zeros(0, np.int64)
        """How many rows keep each number of ids."""

    def add(self, record: Record, layout: Layout) -> None:
        rows = supervised(record.turn)
        num_rows = int(rows.sum())
        self.rows += num_rows
        if layout.dense:
            self._count(np.full(num_rows, layout.vocab_size))
            return
        self._count(record.kept[rows].astype(np.int64))
        self.samples += int(record.tail_kept.sum(dtype=np.int64))
        self.tail_mass += float(np.exp(record.tail_logp_mass[rows].astype(np.float64)).sum())

    def _count(self, kept: NDArray[np.int64]) -> None:
        self.kept = _add(self.kept, np.bincount(kept))

    def means(self) -> dict[str, float]:
        rows = max(1, self.rows)
        kept = float((self.kept * np.arange(len(self.kept))).sum()) / rows
        return {
            "mean_kept": round(kept, 6),
            "mean_kept_mass": round(1.0 - self.tail_mass / rows, 9),
            "mean_tail_mass": round(self.tail_mass / rows, 9),
            "mean_tail_samples": round(self.samples / rows, 6),
        }

    def kept_quantiles(self) -> dict[str, int]:
        """The smallest K that at least this share of the rows do not exceed."""
        cumulated = self.kept.cumsum()
        return {
            name: int(np.searchsorted(cumulated, q * self.rows)) for name, q in QUANTILES.items()
        }

    @staticmethod
    def sum(tallies: "Iterable[_Tally]") -> "_Tally":
        whole = _Tally()
        for tally in tallies:
            whole.rows += tally.rows
            whole.samples += tally.samples
            whole.tail_mass += tally.tail_mass
            whole.kept = _add(whole.kept, tally.kept)
        return whole


def _add(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    total = np.zeros(max(len(a), len(b)), np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def coverage(cache: Cache) -> dict[str, Any]:
    """What a cache keeps, overall and by domain; means over supervised rows, bytes a token."""
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    starts = np.cumsum([0, *(part.counts["sequence"] for part in cache.manifest.parts)])
    for first, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for record in cache.records(range(first, stop), arrays=COUNTS):
            tallies[record.domain].add(record, cache.layout)
    whole = _Tally.sum(tallies.values())
    tokens = max(1, cache.num_tokens)
    by_domain = {name: tallies[name].means() for name in sorted(tallies)}
    return {
        "sequences": cache.num_sequences,
        "tokens": cache.num_tokens,
        "rows": whole.rows,
        **whole.means(),
        "kept_quantiles": whole.kept_quantiles(),
        **{
            f"{key}_by_domain": {name: means[key] for name, means in by_domain.items()}
            for key in whole.means()
        },
        "bytes": sum(cache.manifest.array_bytes.values()),
        "bytes_per_token": {
            name: round(size / tokens, 4) for name, size in cache.manifest.array_bytes.items()
        },
    }
