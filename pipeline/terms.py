"""`terms`: KL and acceptance of draft logits against the cached law, with closed-form gradients.

The readable definition is MATHS (1)-(9), (50)-(53); a dense float64 version of it stands in the
test. Here a sparse law costs one pass over the logits forward and one backward, and nothing of size
[N, V] is kept but the logits themselves: both gradients are a multiple of q plus values at the
entries.

Numbers of rows and entries are float64 and logarithms are taken at the entries, so that −log α and
its gradient stay exact down to α = e^−700; only the pass over the vocabulary is float32 (float64
for float64 logits), whatever the dtype of the logits. On a GPU the same arithmetic runs as Triton
kernels (`pipeline.terms_triton`) where triton is installed.

What is not a number stays visible: a row with a logit of NaN or +inf has terms NaN, unless its law
is empty; a logit of −inf is q = 0, and KL = +inf where its p > 0.

Dims: N rows, E entries of all rows, Vd draft vocabulary. Knows no loss and no cache.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.law import DenseLaw, Law, SparseLaw

CHUNK = 1 << 17
"""Elements per pass: 512 KiB of float32 stay in a core's own cache, 1.5 x faster than 8 MiB."""

GPU_CHUNK = 1 << 25
"""The same on a GPU, which wants few launches."""

REST = 1e-3
"""Below it 1 − Σ_kept q, off by up to 1e-6, is replaced by a sum over the ids that are not kept."""

EXTRA = ("jsd", "reverse_kl")
"""Terms that a loss may ask for beside KL and α; reverse KL is defined on dense laws alone."""

LOG2 = math.log(2)


def terms(
    logits_NV: Tensor,
    law: Law,
    *,
    d2t: Tensor | None = None,
    extra: Sequence[str] = (),
    in_place: bool = False,
) -> tuple[Tensor, ...]:
    """KL(p̃‖q) and the estimate α̂ of Σ_v min(p_v, q_v) of each row; MATHS (3)-(9), DESIGN §6.

    logits_NV: [N, Vd] of any float dtype; law: N rows aligned with them; d2t: [Vd] int64 target
    ids of a pruned draft vocabulary, ascending. Returns (kl, alpha, *extra), [N] float64 in nats
    and as a probability; `extra` names more terms, of `EXTRA`. On a pruned vocabulary KL takes p
    renormalised over the entries inside it and α the full p; a row with no entry inside it has
    kl = alpha = 0 and no gradient. `in_place` lets backward write the gradient over the logits,
    which halves the peak; nothing else may need them then (a second backward is an error).
    """
    assert len(logits_NV) == law.num_rows, (logits_NV.shape, law.num_rows)
    assert d2t is None or len(d2t) == logits_NV.shape[1], (logits_NV.shape, d2t)
    assert set(extra) <= set(EXTRA), extra
    out: tuple[Tensor, ...]
    if isinstance(law, DenseLaw):
        out = _Dense.apply(logits_NV, law.logp, d2t, tuple(extra), in_place)
    else:
        assert "reverse_kl" not in extra, "no estimate from samples has a finite variance"
        entries = draft_entries(law, logits_NV.shape[1], d2t)
        out = _Sparse.apply(logits_NV, entries, bool(extra), in_place)
    return out


def has_kernel(logits: Tensor) -> bool:
    """Whether the Triton kernels take these logits: on a GPU, no wider than float32."""
    return logits.is_cuda and logits.dtype != torch.float64 and find_spec("triton") is not None


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


def _chunk(logits: Tensor) -> int:
    return GPU_CHUNK if logits.is_cuda else CHUNK


def _blocks(logits_NV: Tensor) -> Iterator[slice]:
    """Row ranges of about `CHUNK` elements."""
    num_rows, width = logits_NV.shape
    step = max(1, _chunk(logits_NV) // max(1, width))
    return (slice(a, min(a + step, num_rows)) for a in range(0, num_rows, step))


def _log_rest(logits_NV: Tensor, lse_N: Tensor, e: Entries, q_E: Tensor) -> Tensor:
    """[N] float64 log(1 − Σ_entries q) of the rows with a bucket; 0 elsewhere.

    −inf where the entries are the whole draft vocabulary, which leaves the bucket no symbol.
    """
    rest = torch.where(e.bucket > 0, 1 - e.sum(q_E), 1.0)
    small = (rest < REST).nonzero().squeeze(1)
    log_rest = rest.clamp(min=REST).log()
    width = logits_NV.shape[1]
    for rows in small.split(max(1, _chunk(logits_NV) // width)):
        local = torch.full_like(e.bucket, -1, dtype=torch.int64)
        local[rows] = torch.arange(len(rows), device=rows.device)
        place = e.index + e.spread(local - torch.arange(len(local), device=rows.device)) * width
        x = logits_NV[rows].to(_wide(logits_NV))
        x.view(-1)[place[e.spread(local) >= 0]] = -torch.inf
        log_rest[rows] = x.logsumexp(-1).double() - lse_N[rows]
    return log_rest


@dataclass(frozen=True)
class Seen:
    """What the forward of a sparse law keeps of rows and entries, for its gradient."""

    logq: Tensor
    """[E] float64."""
    mass: Tensor
    """[N] float64: Σ w p + b, the mass of the law that the draft's vocabulary holds."""
    bucket: Tensor
    """[N] float64: b, 0 where the draft has no symbol left for it."""
    log_rest: Tensor | None
    """[N] float64: log q_rest, 0 where there is no bucket; None where no row has one."""


def entry_terms(
    e: Entries, logq: Tensor, log_rest: Tensor | None, *, jsd: bool = False
) -> tuple[tuple[Tensor, ...], Seen]:
    """(kl, alpha) or (kl, alpha, jsd) of each row from log q at its entries; MATHS (5), (6), (52).

    log_rest: [N] log of q outside the entries, −inf where nothing is; None where no row has a
    bucket.
    """
    q, wp = logq.exp(), e.weight * e.p
    # a bucket needs a symbol of the draft's outside the entries
    bucket = e.bucket if log_rest is None else torch.where(log_rest.isinf(), 0.0, e.bucket)
    logp = e.p.clamp(min=1e-300).log_()  # p = 0 adds nothing: its weight is 0
    kl = e.sum(torch.where(wp > 0, wp * (logp - logq), 0.0))
    alpha = e.sum(e.weight * torch.minimum(e.p, q))
    overlap = e.sum(e.weight * _shared(logp, logq)) if jsd else None
    if log_rest is not None:
        log_rest = torch.where(bucket > 0, log_rest, 0.0)
        kl += torch.xlogy(bucket, bucket) - bucket * log_rest
        alpha += torch.minimum(bucket, log_rest.exp())
        if overlap is not None:
            both = _shared(bucket.clamp(min=1e-300).log(), log_rest)
            overlap += torch.where(bucket > 0, both, 0.0)
    mass = e.sum(wp) + bucket
    if e.pruned:
        kl = torch.where(mass > 0, kl / mass - mass.log(), 0.0)
    values = (kl, alpha) if overlap is None else (kl, alpha, LOG2 - overlap / 2)
    return values, Seen(logq, mass, bucket, log_rest)


def entry_pulls(
    e: Entries, seen: Seen, g_kl: Tensor, g_alpha: Tensor, g_jsd: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradient in the form of MATHS (9): (scale_N, base_E, value_E).

    It is scale · q_j at every id j, `base` in place of that at the entries (None where it is the
    same), and each entry's `value` added to its id. A pull is h w q ∂min/∂q of an entry, and for
    the Jensen-Shannon overlap likewise (51).
    """
    q, bucket, log_rest = seen.logq.exp(), seen.bucket, seen.log_rest
    g_kl, g_alpha = g_kl.double(), g_alpha.double()
    if e.pruned:  # of KL / mass − log mass
        g_kl = torch.where(seen.mass > 0, g_kl / seen.mass, 0.0)
    pull = e.spread(g_alpha) * torch.where(q < e.p, e.weight * q, 0.0)
    if g_jsd is not None:
        logp = e.p.clamp(min=1e-300).log_()
        ratio = torch.logaddexp(logp, seen.logq) - seen.logq
        pull -= e.spread(g_jsd.double() / 2) * (e.weight * q * ratio)
    factor = g_kl * seen.mass - e.sum(pull)
    value = pull - e.spread(g_kl) * (e.weight * e.p)
    if log_rest is None:
        return factor, None, value
    rest = log_rest.exp()
    rest_pull = g_alpha * (rest < bucket).double()
    if g_jsd is not None:
        ratio = torch.logaddexp(bucket.clamp(min=1e-300).log(), log_rest) - log_rest
        rest_pull = rest_pull - torch.where(bucket > 0, g_jsd.double() / 2 * ratio, 0.0)
    factor = factor - rest_pull * rest
    # at the entries q · factor is written afresh: the difference would cancel
    return factor + rest_pull - g_kl * bucket / rest, q * e.spread(factor), value


def _shared(logp: Tensor, logq: Tensor) -> Tensor:
    """The overlap p log(1 + q/p) + q log(1 + p/q) of MATHS (50)."""
    both = torch.logaddexp(logp, logq)
    return logp.exp() * (both - logp) + logq.exp() * (both - logq)


class _Sparse(torch.autograd.Function):
    """MATHS (5)-(9) for entries and buckets."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, e: Entries, jsd: bool, in_place: bool
    ) -> tuple[Tensor, ...]:
        ctx.entries, ctx.in_place = e, in_place
        ctx.fused = has_kernel(logits_NV) and not jsd
        if ctx.fused:
            from pipeline import terms_triton

            logits_NV = logits_NV.contiguous()
            kl, alpha, ctx.saved = terms_triton.sparse_forward(
                logits_NV,
                e.start,
                e.index,
                p=e.p,
                weight=e.weight,
                bucket=e.bucket,
                pruned=e.pruned,
            )
            ctx.save_for_backward(logits_NV)
            return kl, alpha
        peak, total = partition(logits_NV)
        lse = peak.double() + total.log()
        logq = logits_NV.reshape(-1).index_select(0, e.index).double() - e.spread(lse)
        log_rest = _log_rest(logits_NV, lse, e, logq.exp()) if bool(e.bucket.any()) else None
        values, seen = entry_terms(e, logq, log_rest, jsd=jsd)
        ctx.save_for_backward(
            logits_NV, peak, total, seen.logq, seen.mass, seen.bucket, seen.log_rest
        )
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, *kept = ctx.saved_tensors
        out = _own(logits_NV, in_place=ctx.in_place)
        if ctx.fused:
            from pipeline import terms_triton

            terms_triton.sparse_backward(logits_NV, ctx.saved, g[0], g[1], out=out)
        else:
            peak, total, *seen = kept
            scale, base, value = entry_pulls(ctx.entries, Seen(*seen), *g)
            _spread(logits_NV, peak, scale / total, ctx.entries, base, value, out=out)
        return out, None, None, None


def _own(logits_NV: Tensor, *, in_place: bool) -> Tensor:
    """Where a gradient is written: over the logits if they may go, else beside them."""
    if not (in_place and logits_NV.is_contiguous()):
        return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    # whoever else saved the logits is told by autograd, instead of reading a gradient
    torch.autograd.graph.increment_version(logits_NV)
    return logits_NV.detach()


def fold(peak_N: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """(peak, scale) of the same scale · exp(z − peak), in peak's dtype, whose range it may leave.

    The scale is as large as q_rest is small, and the exponential then as small at all ids but the
    entries, which are written afresh: the two are joined in the exponent.
    """
    size = scale_N.abs()
    shift = torch.where(size > 1e30, size.log(), 0.0)
    return (peak_N - shift).to(peak_N.dtype), (scale_N * (-shift).exp()).to(peak_N.dtype)


def _spread(
    logits_NV: Tensor,
    peak_N: Tensor,
    scale_N: Tensor,
    e: Entries,
    base_E: Tensor | None,
    value_E: Tensor,
    *,
    out: Tensor,
) -> None:
    """Fill with scale · exp(z − peak); at the entries `base` in its place; `value` added there."""
    wide = peak_N.dtype
    peak_N, scale_N = fold(peak_N, scale_N)
    value_E = value_E.to(wide)
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


class _Dense(torch.autograd.Function):
    """MATHS (3), (4), (7), (8), (50)-(53) for full rows, with the same care for tiny α."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        logp_NV: Tensor,
        d2t: Tensor | None,
        extra: tuple[str, ...],
        in_place: bool,
    ) -> tuple[Tensor, ...]:
        ctx.extra, ctx.in_place = extra, in_place
        ctx.fused = has_kernel(logits_NV) and not extra
        if ctx.fused:
            from pipeline import terms_triton

            logits_NV = logits_NV.contiguous()
            kl, alpha, ctx.saved = terms_triton.dense_forward(logits_NV, logp_NV, d2t)
            ctx.save_for_backward(logits_NV)
            return kl, alpha
        peak, total = partition(logits_NV)
        lse = (peak.double() + total.log()).to(peak.dtype)
        kl, alpha, mass = (torch.empty_like(total) for _ in range(3))
        more = {name: torch.empty_like(total) for name in extra}
        for rows in _blocks(logits_NV):
            logp, logq = _dense_rows(logits_NV, logp_NV, d2t, lse, rows)
            p = logp.exp()
            mass[rows] = p.sum(-1).double()
            if "jsd" in more:
                more["jsd"][rows] = LOG2 - _shared(logp, logq).sum(-1).double() / 2
            if "reverse_kl" in more:
                more["reverse_kl"][rows] = (logq.exp() * (logq - logp)).sum(-1).double()
            kl[rows] = torch.where(p > 0, p * (logp - logq), 0.0).sum(-1).double()
            overlap = torch.minimum(logp, logq)
            top = overlap.amax(-1, keepdim=True)
            alpha[rows] = top.squeeze(-1).double().exp() * (overlap - top).exp_().sum(-1).double()
        if d2t is not None:
            kl = torch.where(mass > 0, kl / mass - mass.log(), 0.0)
            if "reverse_kl" in more:
                shifted = more["reverse_kl"] + mass.log()
                more["reverse_kl"] = torch.where(mass > 0, shifted, 0.0)
        ctx.save_for_backward(logits_NV, logp_NV, d2t, lse, mass, more.get("reverse_kl"))
        return kl, alpha, *more.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_NV, *kept = ctx.saved_tensors
        out = _own(logits_NV, in_place=ctx.in_place)
        if ctx.fused:
            from pipeline import terms_triton

            terms_triton.dense_backward(logits_NV, ctx.saved, g[0], g[1], out=out)
            return out, None, None, None, None
        logp_NV, d2t, lse, mass, reverse = kept
        g_kl, g_alpha, *g_more = (x.double() for x in g)
        if d2t is not None:
            g_kl = torch.where(mass > 0, g_kl / mass, 0.0)
        more = {k: x.to(lse.dtype)[:, None] for k, x in zip(ctx.extra, g_more, strict=True)}
        log_g, sign = g_alpha.abs().log().to(lse.dtype), g_alpha.sign().to(lse.dtype)
        for rows in _blocks(logits_NV):
            logp, logq = _dense_rows(logits_NV, logp_NV, d2t, lse, rows)
            # g_alpha may be as large as q is small: their product is formed in logarithms
            pull = torch.where(logq < logp, (logq + log_g[rows, None]).exp(), 0.0)
            pull.mul_(sign[rows, None])
            if "jsd" in more:
                ratio = torch.logaddexp(logp, logq) - logq
                pull -= more["jsd"][rows] / 2 * logq.exp() * ratio
            if "reverse_kl" in more:
                constant = torch.where(mass > 0, mass.log() if d2t is not None else 0.0, 0.0)
                ratio = logq - logp + (constant - reverse)[rows, None].to(lse.dtype)
                ratio *= (mass > 0)[rows, None]
                pull += more["reverse_kl"][rows] * logq.exp() * ratio
            factor = (g_kl[rows] * mass[rows]).to(lse.dtype) - pull.sum(-1)
            x = logq.exp_().mul_(factor[:, None]).add_(pull)
            out[rows] = x.sub_(logp.exp_().mul_(g_kl[rows, None].to(lse.dtype)))
        return out, None, None, None, None


def _dense_rows(
    logits_NV: Tensor, logp_NV: Tensor, d2t: Tensor | None, lse_N: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:
    """Of some rows, log p and log q in the draft's columns; log 0 is a finite −1e30."""
    logp = logp_NV[rows] if d2t is None else logp_NV[rows][:, d2t]
    logq = logits_NV[rows].to(lse_N.dtype) - lse_N[rows, None]
    return logp.to(lse_N.dtype).clamp(min=-1e30), logq
