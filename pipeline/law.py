"""The target's law at R rows, as drafts are trained against it: sparse entries or a dense row.

Dims: R rows (tokens whose next token is supervised), E entries of all rows together, V vocabulary.

A sparse law is a sum of weighted entries (DESIGN §5, MATHS (5)): a kept id has weight 1; each of a
row's M tail samples v ~ p restricted to the tail has weight r / (M p_v), so that

    α̂  = Σ_e weight_e · min(p_e, q_e)          + min(bucket, q_rest)
    KL̂ = Σ_e weight_e · p_e · log(p_e / q_e)   + bucket · log(bucket / q_rest)

are unbiased where the tail is sampled. `bucket` is the tail mass of a row that has no sample (its
tail is one merged symbol, q_rest = 1 − Σ_kept q) and 0 in a row that has.

Knows nothing of the cache's codes or files (`pipeline.dataset` builds laws from records).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseLaw:
    """R ragged rows of weighted entries."""

    entry_start: Tensor
    """[R + 1] int64: row r owns entries entry_start[r] : entry_start[r + 1]."""
    ids: Tensor
    """[E] int64 token ids; a tail sample may repeat within its row."""
    p: Tensor
    """[E] float32 probability under the full law, never renormalised."""
    weight: Tensor
    """[E] float32: 1 for a kept id, r / (M p) for a tail sample."""
    bucket: Tensor
    """[R] float32 tail mass that no sample stands for."""
    kept: Tensor | None = None
    """[R] int64: how many of a row's entries, the first ones, are kept ids; the rest are samples.

    Only `pipeline.bounds` asks: a sample proves nothing.
    """
    tail: Tensor | None = None
    """[R] float32 exact mass of the ids that are not kept, whatever p's rounding."""
    p_step: float = 0.0
    """Width in sqrt(p) of the cells that kept p were rounded to the middle of; 0: not rounded."""

    @property
    def num_rows(self) -> int:
        """R."""
        return self.bucket.shape[0]

    @cached_property
    def _rows(self) -> Tensor:
        counts = self.entry_start.diff()
        return torch.repeat_interleave(torch.arange(self.num_rows, device=counts.device), counts)

    def rows(self) -> Tensor:
        """[E] int64: the row that owns each entry."""
        return self._rows

    def take(self, rows_N: Tensor) -> "SparseLaw":
        """The laws of the given rows, in that order; a row may be taken twice."""
        if torch.equal(rows_N, torch.arange(self.num_rows, device=rows_N.device)):
            return self  # depth 0 asks for every row in order
        counts = self.entry_start.diff()[rows_N]
        start = torch.zeros(len(rows_N) + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts, 0, out=start[1:])
        shift = torch.repeat_interleave(self.entry_start[:-1][rows_N] - start[:-1], counts)
        entry = shift.add_(torch.arange(len(shift), device=counts.device))
        return SparseLaw(
            entry_start=start,
            ids=self.ids.index_select(0, entry),  # x[entry] takes several times as long
            p=self.p.index_select(0, entry),
            weight=self.weight.index_select(0, entry),
            bucket=self.bucket[rows_N],
            kept=None if self.kept is None else self.kept[rows_N],
            tail=None if self.tail is None else self.tail[rows_N],
            p_step=self.p_step,
        )


@dataclass(frozen=True)
class DenseLaw:
    """R rows of full log-probabilities (`mode: full` and rebuilt caches)."""

    logp: Tensor
    """[R, V] float32 log-probabilities."""
    log_mass: Tensor | None = None
    """[R] float32: logp + log_mass is what was stored; only `pipeline.bounds` asks."""
    logp_step: float = 0.0
    """Largest error of a stored number as a share of itself; 0: not rounded."""

    @property
    def num_rows(self) -> int:
        """R."""
        return self.logp.shape[0]

    def take(self, rows_N: Tensor) -> "DenseLaw":
        """The laws of the given rows, in that order."""
        return DenseLaw(
            logp=self.logp[rows_N],
            log_mass=None if self.log_mass is None else self.log_mass[rows_N],
            logp_step=self.logp_step,
        )


Law = SparseLaw | DenseLaw
