"""`terms`: KL and acceptance of draft logits against the cached law, with closed-form gradients.

The readable definition is MATHS (1)-(9); a dense float64 version of it stands in the test. Here a
sparse law costs one pass over the logits forward and one backward, and nothing of size [N, V] is
kept but the logits themselves: both gradients are a multiple of q plus values at the entries.

Numbers of rows and entries are float64 and logarithms are taken at the entries, so that −log α and
its gradient stay exact down to α = e^−700; only the pass over the vocabulary is float32 (float64
for float64 logits), whatever the dtype of the logits.

Dims: N rows, E entries of all rows, Vd draft vocabulary. Knows no loss and no cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.law import DenseLaw, Law, SparseLaw

CHUNK = 1 << 17
"""Elements per pass: 512 KiB of float32 stay in a core's own cache, 1.5 x faster than 8 MiB."""

REST = 1e-3
"""Below it 1 − Σ_kept q, off by up to 1e-6, is replaced by a sum over the ids that are not kept."""


def terms(logits_NV: Tensor, law: Law, *, d2t: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """KL(p̃‖q) and the estimate α̂ of Σ_v min(p_v, q_v) of each row; MATHS (3)-(9), DESIGN §6.

    logits_NV: [N, Vd] of any float dtype; law: N rows aligned with them; d2t: [Vd] int64 target
    ids of a pruned draft vocabulary, ascending. Returns (kl, alpha), [N] float64 in nats and as a
    probability. On a pruned vocabulary KL takes p renormalised over the entries inside it and α the
    full p; a row with no entry inside it has kl = alpha = 0 and no gradient.
    """
    assert len(logits_NV) == law.num_rows, (logits_NV.shape, law.num_rows)
    assert d2t is None or len(d2t) == logits_NV.shape[1], (logits_NV.shape, d2t)
    kl_N: Tensor
    alpha_N: Tensor
    if isinstance(law, DenseLaw):
        kl_N, alpha_N = _Dense.apply(logits_NV, law.logp, d2t)
    else:
        kl_N, alpha_N = _Sparse.apply(logits_NV, draft_entries(law, logits_NV.shape[1], d2t))
    return kl_N, alpha_N


@dataclass(frozen=True)
class Entries:
    """A sparse law in the draft's columns: what lies outside its vocabulary is gone."""

    row: Tensor
    """[E] int64, ascending."""
    start: Tensor
    """[N + 1] int64: the first entry of each row."""
    index: Tensor
    """[E] int64: row · Vd + draft id, the entry's place in flattened logits."""
    p: Tensor
    """[E] float64."""
    weight: Tensor
    """[E] float64."""
    bucket: Tensor
    """[N] float64."""
    pruned: bool
    """Whether p is to be renormalised over the entries."""

    def sum(self, x_E: Tensor) -> Tensor:
        """[N] sums over each row's entries."""
        return torch.segment_reduce(x_E, "sum", offsets=self.start, initial=0.0)

    def spread(self, x_N: Tensor) -> Tensor:
        """[E] the value of each entry's row."""
        return x_N.index_select(0, self.row)  # x[row] takes four times as long


def draft_entries(law: SparseLaw, vocab_size: int, d2t: Tensor | None) -> Entries:
    """The entries of a law that lie in the draft's vocabulary of `vocab_size` ids."""
    row, column, p, weight, start = law.rows(), law.ids, law.p, law.weight, law.entry_start
    if d2t is not None:
        column = torch.searchsorted(d2t, law.ids).clamp_(max=vocab_size - 1)
        inside = d2t[column] == law.ids
        start = torch.nn.functional.pad(inside.cumsum(0), (1, 0))[start]
        row, column, p, weight = row[inside], column[inside], p[inside], weight[inside]
    return Entries(
        row=row,
        start=start,
        index=torch.add(column, row, alpha=vocab_size),
        p=p.double(),
        weight=weight.double(),
        bucket=law.bucket.double(),
        pruned=d2t is not None,
    )


def partition(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and Σ_v exp(z_v − largest): [N], [N] float64."""
    num_rows, wide = len(logits_NV), _wide(logits_NV)
    peak = torch.empty(num_rows, dtype=wide, device=logits_NV.device)
    total = torch.empty(num_rows, dtype=torch.float64, device=logits_NV.device)
    buffer: Tensor | None = None  # fresh memory for every block would cost more than its arithmetic
    for rows in _blocks(logits_NV):
        z = logits_NV[rows]
        buffer = torch.empty_like(z, dtype=wide) if buffer is None else buffer[: len(z)]
        peak[rows] = z.amax(-1)
        total[rows] = torch.sub(z, peak[rows, None], out=buffer).exp_().sum(-1)
    return peak, total


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _blocks(logits_NV: Tensor) -> Iterator[slice]:
    """Row ranges of about `CHUNK` elements."""
    num_rows, width = logits_NV.shape
    step = max(1, CHUNK // max(1, width))
    return (slice(a, min(a + step, num_rows)) for a in range(0, num_rows, step))


def _log_rest(logits_NV: Tensor, lse_N: Tensor, e: Entries, q_E: Tensor) -> Tensor:
    """[N] float64 log(1 − Σ_entries q) of the rows with a bucket; 0 elsewhere.

    −inf where the entries are the whole draft vocabulary, which leaves the bucket no symbol.
    """
    rest = torch.where(e.bucket > 0, 1 - e.sum(q_E), 1.0)
    small = (rest < REST).nonzero().squeeze(1)
    log_rest = rest.clamp(min=REST).log()
    width = logits_NV.shape[1]
    for rows in small.split(max(1, CHUNK // width)):
        local = torch.full_like(e.bucket, -1, dtype=torch.int64)
        local[rows] = torch.arange(len(rows), device=rows.device)
        place = e.index + e.spread(local - torch.arange(len(local), device=rows.device)) * width
        x = logits_NV[rows].to(_wide(logits_NV))
        x.view(-1)[place[e.spread(local) >= 0]] = -torch.inf
        log_rest[rows] = x.logsumexp(-1).double() - lse_N[rows]
    return log_rest


class _Sparse(torch.autograd.Function):
    """MATHS (5)-(9) for entries and buckets."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, e: Entries) -> tuple[Tensor, Tensor]:
        peak, total = partition(logits_NV)
        lse = peak.double() + total.log()
        logq = logits_NV.reshape(-1).index_select(0, e.index).double() - e.spread(lse)
        q, wp = logq.exp(), e.weight * e.p
        log_rest = _log_rest(logits_NV, lse, e, q) if bool(e.bucket.any()) else None
        # a bucket needs a symbol of the draft's outside the entries
        bucket = e.bucket if log_rest is None else torch.where(log_rest.isinf(), 0.0, e.bucket)
        # p = 0 adds nothing: its weight is 0 and its logarithm finite
        kl = e.sum(e.p.clamp(min=1e-300).log_().sub_(logq).mul_(wp))
        alpha = e.sum(e.weight * torch.minimum(e.p, q))
        if log_rest is not None:
            log_rest = torch.where(bucket > 0, log_rest, 0.0)
            kl += torch.xlogy(bucket, bucket) - bucket * log_rest
            alpha += torch.minimum(bucket, log_rest.exp())
        mass = e.sum(wp) + bucket
        if e.pruned:
            kl = torch.where(mass > 0, kl / mass - mass.log(), 0.0)
        ctx.save_for_backward(logits_NV, peak, total, q, mass, bucket, log_rest)
        ctx.entries = e
        return kl, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_kl: Tensor, g_alpha: Tensor) -> tuple[Tensor, None]:
        logits_NV, peak, total, q, mass, bucket, log_rest = ctx.saved_tensors
        e: Entries = ctx.entries
        g_kl, g_alpha = g_kl.double(), g_alpha.double()
        if e.pruned:  # of KL / mass − log mass
            g_kl = torch.where(mass > 0, g_kl / mass, 0.0)
        below = torch.where(q < e.p, e.weight * q, 0.0)
        factor = g_kl * mass - g_alpha * e.sum(below)
        value = e.spread(g_alpha) * below - e.spread(g_kl) * (e.weight * e.p)
        base, rest_factor = None, factor
        if log_rest is not None:
            rest = log_rest.exp()
            short = (rest < bucket).double()
            factor = factor - g_alpha * short * rest
            rest_factor = factor + g_alpha * short - g_kl * bucket / rest
            # at the entries q · factor is written afresh: the difference would cancel
            base = q * e.spread(factor)
        return _spread(logits_NV, peak, rest_factor / total, e, base, value), None


def _spread(
    logits_NV: Tensor,
    peak_N: Tensor,
    scale_N: Tensor,
    e: Entries,
    base_E: Tensor | None,
    value_E: Tensor,
) -> Tensor:
    """Fill with scale · exp(z − peak); at the entries `base` in its place; `value` added there."""
    out, wide = torch.empty_like(logits_NV), peak_N.dtype
    scale_N, value_E = scale_N.to(wide), value_E.to(wide)
    base_E = None if base_E is None else base_E.to(wide)
    width = logits_NV.shape[1]
    starts = torch.tensor([rows.start for rows in _blocks(logits_NV)], device=e.row.device)
    ends = [*torch.searchsorted(e.row, starts).tolist(), len(e.row)]
    for block, rows in enumerate(_blocks(logits_NV)):
        own = slice(ends[block], ends[block + 1])
        x = torch.sub(
            logits_NV[rows], peak_N[rows, None], out=out[rows] if out.dtype == wide else None
        )
        flat = x.exp_().mul_(scale_N[rows, None]).view(-1)
        index = e.index[own] - rows.start * width
        if base_E is not None:
            flat[index] = base_E[own]
        flat.index_add_(0, index, value_E[own])
        if out.dtype != wide:
            out[rows] = x
    return out


class _Dense(torch.autograd.Function):
    """MATHS (3), (4), (7), (8) for full rows, with the same care for tiny α."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, logp_NV: Tensor, d2t: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        peak, total = partition(logits_NV)
        lse = (peak.double() + total.log()).to(peak.dtype)
        kl, alpha, mass = (torch.empty_like(total) for _ in range(3))
        for rows in _blocks(logits_NV):
            logp, logq = _dense_rows(logits_NV, logp_NV, d2t, lse, rows)
            p = logp.exp()
            mass[rows] = p.sum(-1).double()
            kl[rows] = p.mul_(logp - logq).sum(-1).double()
            overlap = torch.minimum(logp, logq)
            top = overlap.amax(-1, keepdim=True)
            alpha[rows] = top.squeeze(-1).double().exp() * (overlap - top).exp_().sum(-1).double()
        if d2t is not None:
            kl = torch.where(mass > 0, kl / mass - mass.log(), 0.0)
        ctx.save_for_backward(logits_NV, logp_NV, d2t, lse, mass)
        return kl, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_kl: Tensor, g_alpha: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, logp_NV, d2t, lse, mass = ctx.saved_tensors
        g_kl, g_alpha = g_kl.double(), g_alpha.double()
        if d2t is not None:
            g_kl = torch.where(mass > 0, g_kl / mass, 0.0)
        out, wide = torch.empty_like(logits_NV), lse.dtype
        log_g, sign = g_alpha.abs().log().to(wide), g_alpha.sign().to(wide)
        for rows in _blocks(logits_NV):
            logp, logq = _dense_rows(logits_NV, logp_NV, d2t, lse, rows)
            # g_alpha may be as large as q is small: their product is formed in logarithms
            pull = torch.where(logq < logp, (logq + log_g[rows, None]).exp(), 0.0)
            pull.mul_(sign[rows, None])
            factor = (g_kl[rows] * mass[rows]).to(wide) - pull.sum(-1)
            x = logq.exp_().mul_(factor[:, None]).add_(pull)
            out[rows] = x.sub_(logp.exp_().mul_(g_kl[rows, None].to(wide)))
        return out, None, None


def _dense_rows(
    logits_NV: Tensor, logp_NV: Tensor, d2t: Tensor | None, lse_N: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:
    """Of some rows, log p and log q in the draft's columns; log 0 is a finite −1e30."""
    logp = logp_NV[rows] if d2t is None else logp_NV[rows][:, d2t]
    logq = logits_NV[rows].to(lse_N.dtype) - lse_N[rows, None]
    return logp.to(lse_N.dtype).clamp(min=-1e30), logq
