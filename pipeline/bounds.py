"""Certified ends of α and KL from a truncated law: kept entries, exact tail mass, nothing sampled.

MATHS (20)-(22) and (31)-(37), DESIGN §5. The stored p of a kept id is the middle of a cell; every
end takes the end of the cell that moves it outwards. Tail samples prove nothing and are not read;
what rounding and merged tails can do to the estimates that do read them is `estimate_slack`.

The law that is bounded is the one that was captured: what the target's own arithmetic, or a hidden
state's rounding in mode `rebuild`, did to it lies before that. The cells of mode `full` are in.

Dims: N rows, E known entries of all rows, V vocabulary, Vd draft vocabulary, B rows of a block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.law import DenseLaw, Law, SparseLaw
from pipeline.terms import CHUNK
from storage.codecs import HALF_STEP

ROUNDING = 2e-6
"""Relative error granted to float32 sums over a vocabulary and to stored float32 numbers: 5 x what
262,144 random terms show against float64."""
DOUBLE = 1e-12
"""The same of float64 sums, 1,000 x what 100,000 terms show."""
LEAST = 1e-300
"""In place of 0 under a logarithm whose factor is 0."""
NEWTON_STEPS = 4
"""Of (34): each caps more ids; any t gives a valid end, and the third step moved it by < 1e-6."""


@dataclass(frozen=True)
class Ends:
    """N laws as far as they are known: the ends of some entries, and what is left for others."""

    row: Tensor
    """[E] int64"""
    ids: Tensor
    """[E] int64, distinct within a row"""
    lo: Tensor
    """[E] float64"""
    hi: Tensor
    """[E] float64"""
    rest_lo: Tensor
    """[N] float64: the mass of all other ids together is at least this …"""
    rest_hi: Tensor
    """[N] float64: … and at most this"""
    cap: Tensor
    """[N] float64: no other id is likelier"""

    def sum(self, x_E: Tensor) -> Tensor:
        """[N] sums over each row's entries."""
        return torch.zeros_like(self.cap).index_add(0, self.row, x_E)

    def columns(self, d2t: Tensor | None) -> "Ends":
        """The entries inside a pruned draft vocabulary, under the draft's ids."""
        if d2t is None:
            return self
        column = torch.searchsorted(d2t, self.ids).clamp_(max=len(d2t) - 1)
        own = d2t[column] == self.ids
        return replace(self, row=self.row[own], ids=column[own], lo=self.lo[own], hi=self.hi[own])


def ends(law: SparseLaw) -> Ends:
    """What the stored row proves of the law it stands for; MATHS (20).

    The law must carry `kept` and `tail`, and the kept ids of a row must be its most probable ones
    (storage/FORMAT.md): a tail id is then at most as probable as the least probable kept one.
    """
    assert law.kept is not None, "a law without counts of kept ids proves nothing"
    assert law.tail is not None, "a law without its tail mass proves nothing"
    row = law.rows()
    place = torch.arange(len(row), device=row.device) - law.entry_start[row]
    kept = place < law.kept[row]
    row, root = row[kept], law.p[kept].double().sqrt()
    hi = (root + law.p_step / 2).clamp(max=1).square() * (1 + ROUNDING)
    tail = law.tail.double()
    slack = ROUNDING * (1 - tail.clamp(min=LEAST).log())  # its logarithm was rounded, not itself
    rest_hi = tail * (1 + slack)
    return Ends(
        row=row,
        ids=law.ids[kept],
        lo=(root - law.p_step / 2).clamp(min=0).square() * (1 - ROUNDING),
        hi=hi,
        rest_lo=tail * (1 - slack).clamp(min=0),
        rest_hi=rest_hi,
        cap=rest_hi.scatter_reduce(0, row, hi, "amin"),
    )


def bounds(logits_NV: Tensor, law: Law, *, d2t: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(lo, hi), [N] float64 each: lo ≤ Σ_v min(p_v, q_v) ≤ hi; MATHS (21), (22).

    They hold for every law p that the stored row may stand for. Arguments as those of `terms`. A
    dense law is known: its two ends are α up to the rounding of what is stored.
    """
    if isinstance(law, SparseLaw):
        return overlap(logits_NV, ends(law), d2t=d2t)
    lo, hi = (torch.empty(law.num_rows, dtype=torch.float64) for _ in range(2))
    lo, hi = lo.to(law.logp.device), hi.to(law.logp.device)
    for rows, p_lo, p_hi, logq in _dense_blocks(logits_NV.detach(), law, d2t):
        q = logq.exp()
        lo[rows] = torch.minimum(p_lo, q).sum(-1) * (1 - DOUBLE)
        hi[rows] = torch.minimum(p_hi, q).sum(-1) * (1 + DOUBLE)
    return lo, hi.clamp(max=1)


def overlap(logits_NV: Tensor, e: Ends, *, d2t: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`bounds` of laws known by their ends; the upper one is attained, MATHS (22)."""
    e = e.columns(d2t)
    z = logits_NV.detach()
    peak, total, capped = _passes(z, e.cap)
    q = (_at(z, e).double() - peak[e.row]).exp() / total[e.row]
    lo = e.sum(torch.minimum(e.lo, q * (1 - ROUNDING)))
    hi = e.sum(torch.minimum(e.hi, q * (1 + ROUNDING)))
    # Σ of min(cap, q) over the ids that are not kept; the difference may cancel
    outside = capped - e.sum(torch.minimum(e.cap[e.row], q)) + ROUNDING
    return lo, (hi + torch.minimum(e.rest_hi, outside.clamp(min=0))).clamp(max=1)


def kl_bounds(logits_NV: Tensor, law: Law, *, d2t: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(lo, hi), [N] float64 nats: lo ≤ KL(p̃‖q) ≤ hi, MATHS (31)-(37); logits must be finite.

    On the full vocabulary p̃ = p. On a pruned one p̃ is p renormalised over it, and 0 for a law with
    no mass inside, as `terms` has it.
    """
    z = logits_NV.detach()
    if isinstance(law, DenseLaw):
        return _dense_kl(z, law, d2t)
    whole = ends(law)
    e = whole.columns(d2t)
    t = _tails(z, e, exact=d2t is None)
    logq = _at(z, e).double() - t.lse[e.row]
    # the mass of the kept ids inside the draft's vocabulary: their cells, and 1 less all the others
    out_lo, out_hi = whole.sum(whole.lo) - e.sum(e.lo), whole.sum(whole.hi) - e.sum(e.hi)
    a_lo = torch.maximum(e.sum(e.lo), 1 - whole.rest_hi - out_hi)
    a_hi = torch.minimum(e.sum(e.hi), 1 - whole.rest_lo - out_lo)
    a_hi = torch.maximum(a_hi, a_lo)  # apart by float64's rounding where all is known
    lam, s_lo, s_hi = _weighed(e.lo, e.hi, logq, e.sum, lambda x_N: x_N[e.row])
    slack = ROUNDING * a_hi  # of log Σ exp z
    s_lo, s_hi = s_lo - slack, s_hi + slack
    if d2t is None:
        lo = s_lo + torch.minimum(lam * a_lo, lam * a_hi) + t.lo
        hi = s_hi + torch.maximum(lam * a_lo, lam * a_hi) + t.hi
    else:
        lo, hi = _renormalised(e, t, a_lo=a_lo, a_hi=a_hi, lam=lam, s=(s_lo, s_hi))
    ceiling = -torch.minimum(t.least, t.least.scatter_reduce(0, e.row, logq, "amin")) + ROUNDING
    return lo.clamp(min=0), torch.minimum(hi, ceiling.clamp(min=0))


def estimate_slack(
    logits_NV: Tensor, law: Law, *, alpha_width_N: Tensor, kl_width_N: Tensor
) -> tuple[Tensor, Tensor]:
    """(alpha, kl), [N] float64: how far E[α̂] and E[KL̂] may lie from α and KL; MATHS (38).

    That is the rounding of kept values and of the samples' log p, and, in a row without samples,
    the whole width of its interval: its tail is merged. On the full vocabulary, for a draft that
    does not depend on the samples.
    """
    if isinstance(law, DenseLaw):
        return alpha_width_N, kl_width_N
    z, e = logits_NV.detach(), ends(law)
    logq = _at(z, e).double() - z.to(_wide(z)).logsumexp(-1).double()[e.row]
    q = logq.exp()
    alpha = e.sum(torch.minimum(e.hi, q) - torch.minimum(e.lo, q)) + ROUNDING
    s_lo, s_hi = _ranges(e.lo, e.hi, logq, torch.zeros_like(logq))
    kl = e.sum(s_hi - s_lo) + ROUNDING * (1 + e.sum(e.hi * logq.abs()))
    assert law.kept is not None, "ends() asked for it"
    row = law.rows()
    drawn = torch.arange(len(row), device=row.device) - law.entry_start[row] >= law.kept[row]
    p = law.p.double().clamp(min=LEAST)
    step = HALF_STEP if law.p_step else ROUNDING
    # a sample stands for weight · p of the tail, each part of which errs as its log p does
    each = torch.where(drawn, law.weight.double() * p * torch.expm1(-step * p.log()), 0.0)
    sampled = torch.zeros_like(alpha).index_add(0, row, each)
    merged = law.bucket > 0
    return (
        torch.where(merged, alpha_width_N, alpha + sampled),
        torch.where(merged, kl_width_N, kl + sampled),
    )


def distance(logp_NV: Tensor, law: Law) -> Tensor:
    """[N] float64: by how much mass a full law [N, V] is none that the stored rows may stand for.

    0 for the law that was captured. Another run of the target differs from it by its arithmetic;
    α by no more than this, then.
    """
    if isinstance(law, DenseLaw):
        off = torch.empty(law.num_rows, dtype=torch.float64, device=logp_NV.device)
        for rows, p_lo, p_hi, _ in _dense_blocks(logp_NV, law, None):
            p = logp_NV[rows].double().exp()
            off[rows] = ((p_lo - p).clamp(min=0) + (p - p_hi).clamp(min=0)).sum(-1)
        return off
    e, p_NV = ends(law), logp_NV.double().exp()
    p = _at(p_NV, e)
    off = e.sum((e.lo - p).clamp(min=0) + (p - e.hi).clamp(min=0))
    tail_NV = p_NV.view(-1).index_fill(0, e.row * p_NV.shape[1] + e.ids, 0.0).view(p_NV.shape)
    tail = tail_NV.sum(-1)
    off += (e.rest_lo - tail).clamp(min=0) + (tail - e.rest_hi).clamp(min=0)
    return off + (tail_NV - e.cap[:, None]).clamp(min=0).sum(-1)


def _at(logits_NV: Tensor, e: Ends) -> Tensor:
    """[E] logits of the entries."""
    return logits_NV.reshape(-1).index_select(0, e.row * logits_NV.shape[1] + e.ids)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _blocks(num_rows: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, width))
    return (slice(a, min(a + step, num_rows)) for a in range(0, num_rows, step))


def _passes(logits_NV: Tensor, cap_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per row, float64: the largest logit, Σ exp(z − largest) and Σ_v min(cap, q_v)."""
    peak, total, capped = (torch.empty_like(cap_N) for _ in range(3))
    for block in _blocks(*logits_NV.shape):
        x = logits_NV[block].to(_wide(logits_NV))
        top = x.amax(-1, keepdim=True)
        x = (x - top).exp_()
        norm = x.sum(-1).double()
        peak[block], total[block] = top.squeeze(-1).double(), norm
        limit = (cap_N[block] * norm).to(x.dtype)[:, None]
        capped[block] = torch.minimum(x, limit).sum(-1).double() / norm
    return peak, total, capped


def _phi(p: Tensor, logq: Tensor, lam: Tensor) -> Tensor:
    """`p (log p − log q − λ)`, convex in p."""
    return torch.xlogy(p, p) - p * (logq + lam)


def _ranges(lo: Tensor, hi: Tensor, logq: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value of `_phi` over each cell."""
    best = (logq + lam - 1).clamp(max=1).exp()  # where its slope is 0
    least = _phi(torch.minimum(torch.maximum(best, lo), hi), logq, lam)
    return least, torch.maximum(_phi(lo, logq, lam), _phi(hi, logq, lam))


def _weighed(
    lo: Tensor, hi: Tensor, logq: Tensor, add: Callable[[Tensor], Tensor], spread: Callable
) -> tuple[Tensor, Tensor, Tensor]:
    """λ of each row, and the ends of Σ p (log p − log q − λ) over its cells; MATHS (31).

    λ is the mean of log p/q, plus 1: a cell's p then moves the sum only as far as its own ratio is
    off the mean, because what all cells together hold is known.
    """
    mid = (lo + hi) / 2
    mass = add(mid)
    mean = add(torch.xlogy(mid, mid) - mid * logq) / mass.clamp(min=LEAST)
    lam = torch.where(mass > 0, mean, 0.0) + 1
    least, most = _ranges(lo, hi, logq, spread(lam))
    return lam, add(least), add(most)


@dataclass(frozen=True)
class _Tails:
    """Of the ids that are not kept, inside the draft's vocabulary; [N] float64 each."""

    lse: Tensor
    """log Σ exp z over the whole row"""
    logq: Tensor
    """log of the draft's mass on them; −inf where there are none"""
    least: Tensor
    """the smallest log q among them; +inf where there are none"""
    count: Tensor
    lo: Tensor
    """Σ p (log p − log q) over them, at least …"""
    hi: Tensor
    """… and at most; both 0 unless asked for"""


def _tails(logits_NV: Tensor, e: Ends, *, exact: bool) -> _Tails:
    num_rows, width = logits_NV.shape
    count = width - e.sum(torch.ones_like(e.lo))
    out = {n: torch.zeros_like(count) for n in ("lse", "logq", "least", "lo", "hi")}
    start = torch.searchsorted(e.row, torch.arange(num_rows + 1, device=e.row.device)).tolist()
    for block in _blocks(num_rows, width):
        own = slice(start[block.start], start[block.stop])
        z_BV = logits_NV[block].to(_wide(logits_NV), copy=True)
        lse_B = z_BV.logsumexp(-1)
        place = (e.row[own] - block.start) * width + e.ids[own]
        z_BV.view(-1).index_fill_(0, place, torch.inf)
        least_B = z_BV.amin(-1)
        out["least"][block] = (least_B - lse_B).double()
        rest = (e.rest_lo[block], e.rest_hi[block], e.cap[block].clamp(min=LEAST))
        if exact:
            out["hi"][block] = _tail_hi(z_BV, lse_B, *rest)
        z_BV.view(-1).index_fill_(0, place, -torch.inf)
        out["lse"][block] = lse_B.double()
        out["logq"][block] = (z_BV.logsumexp(-1) - lse_B).double()
        if exact:
            out["lo"][block] = _tail_lo(z_BV, lse_B, out["logq"][block], *rest)
    none = count == 0
    for name in ("lo", "hi"):
        out[name] = torch.where(none, 0.0, out[name])
    return _Tails(count=count, **out)


def _tail_lo(
    z_BV: Tensor, lse_B: Tensor, logq_B: Tensor, r_lo: Tensor, r_hi: Tensor, cap_B: Tensor
) -> Tensor:
    """Least Σ p log p/q of a tail of mass r, no id above the cap: p = min(cap, t q); MATHS (34)."""
    logq_BV = z_BV - lse_B[:, None]  # −inf at what is kept
    r = (r_lo + r_hi) / 2
    logt = r.clamp(min=LEAST).log() - logq_B
    if bool((logt + logq_BV.amax(-1) > cap_B.log()).any()):
        for _ in range(NEWTON_STEPS):
            free = logq_BV <= (cap_B.log() - logt)[:, None]
            left = r - cap_B * (~free).sum(-1)
            under = torch.where(free, logq_BV, -torch.inf).logsumexp(-1).double()
            better = left.clamp(min=LEAST).log() - under
            logt = torch.where((left > 0) & under.isfinite(), better, logt)
    tq_BV = (logq_BV + logt[:, None].to(z_BV.dtype)).exp()
    over = logq_BV + logt[:, None].to(z_BV.dtype) - cap_B.log()[:, None].to(z_BV.dtype)
    cap_BV = cap_B[:, None].to(z_BV.dtype)
    each = torch.where(over > 0, -cap_BV * (over + 1), -tq_BV)
    least = each.sum(-1).double()  # what (34) adds to r (1 + log t)
    value = torch.minimum(r_lo * (1 + logt), r_hi * (1 + logt)) + least
    return torch.where(r_hi > 0, value - _tail_slack(r_hi, logt, logq_B), 0.0)


def _tail_hi(z_BV: Tensor, lse_B: Tensor, r_lo: Tensor, r_hi: Tensor, cap_B: Tensor) -> Tensor:
    """Largest Σ p log p/q: the cap on the ids that the draft likes least; MATHS (35)."""
    most = min(z_BV.shape[1], int((r_hi / cap_B).ceil().clamp(max=2.0**40).max()) + 1)
    z_BK = z_BV.topk(most, largest=False).values
    logq_BK = (z_BK - lse_B[:, None]).double()
    room = torch.arange(most, device=z_BV.device)
    found = []
    for r in (r_lo, r_hi):
        p_BK = (r[:, None] - room * cap_B[:, None]).clamp(min=0).minimum(cap_B[:, None])
        p_BK = torch.where(z_BK.isinf(), 0.0, p_BK)  # no id left to carry it
        left = (r - p_BK.sum(-1)).clamp(min=0)  # none, but for the rounding of r
        value = torch.where(p_BK > 0, torch.xlogy(p_BK, p_BK) - p_BK * logq_BK, 0.0).sum(-1)
        found.append(value + left * (cap_B.log() - logq_BK[:, 0]).clamp(min=0))
    # between the ends of r the value is convex, but where one id more is opened
    off = (r_hi - r_lo).clamp(min=LEAST)
    slack = off * (1 + off.log().abs() + logq_BK[:, 0].abs())
    return torch.maximum(*found) + slack + _tail_slack(r_hi, cap_B.log(), logq_BK[:, 0])


def _tail_slack(r: Tensor, *logs: Tensor) -> Tensor:
    """Float32's share in a tail's sum: logarithms err relative to themselves."""
    size = sum((x.abs() for x in logs), start=torch.full_like(r, 4.0))
    return torch.where(r > 0, ROUNDING * r * size, 0.0).nan_to_num(posinf=0.0)


def _renormalised(
    e: Ends, t: _Tails, *, a_lo: Tensor, a_hi: Tensor, lam: Tensor, s: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """KL(p̃‖q) on a pruned vocabulary, where only the most of the tail inside is known; (36), (37).

    G = KL of the kept part alone, renormalised; π = the tail's share of p̃, anything in [0, Π].
    """
    a = a_lo.clamp(min=LEAST)
    s_lo, s_hi = s
    g_lo = torch.minimum(
        s_lo / a - a.log(), s_lo / a_hi.clamp(min=LEAST) - a_hi.clamp(min=LEAST).log()
    )
    g_lo = g_lo + lam
    at = torch.minimum(torch.maximum(-s_hi, a), a_hi.clamp(min=LEAST))
    g_hi = s_hi / at - at.log() + lam
    cap = e.cap.clamp(min=LEAST)
    most = torch.minimum(e.rest_hi, cap * t.count)
    share = most / (a + most)
    none = t.count == 0
    logq = torch.where(none, 0.0, t.logq + ROUNDING * (2 + t.logq.abs()))
    best = torch.sigmoid(logq + g_lo)
    lo = _mixed(g_lo, -logq, torch.where(none, 0.0, torch.minimum(best, share)))
    cost = torch.where(none, 0.0, -t.least + ROUNDING * (2 + t.least.abs()))
    first = torch.minimum(cap / (a + cap), share)  # up to here the cap does not bind
    steep = cap.log() - a.log() + cost
    inner = 1 - 1 / (steep - g_hi).clamp(min=1)
    second = torch.minimum(torch.maximum(inner, first), share)
    bound = torch.log1p(-second) + (1 - second) * g_hi + second * steep
    hi = torch.maximum(g_hi, _mixed(g_hi, cost, first))
    hi = torch.where(share > first, torch.maximum(hi, bound), hi)
    known = a_lo > 0
    return torch.where(known, lo - ROUNDING, 0.0), torch.where(known, hi + ROUNDING, torch.inf)


def _mixed(g: Tensor, cost: Tensor, share: Tensor) -> Tensor:
    """(1 − π)(G + log(1 − π)) + π (cost + log π)"""
    kept = 1 - share
    return kept * g + torch.xlogy(kept, kept) + share * cost + torch.xlogy(share, share)


def _dense_blocks(
    logits_NV: Tensor, law: DenseLaw, d2t: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Rows, the ends of p and log q of a block, [B, Vd] float64."""
    for rows in _blocks(*law.logp.shape):
        logp = law.logp[rows] if d2t is None else law.logp[rows][:, d2t]
        logp = logp.double().clamp(min=-1e30)
        # float32 arithmetic made it: two units of its last place, and the sum's
        off = ROUNDING + 2.0**-23 * logp.abs()
        if law.log_mass is not None:
            stored = logp + law.log_mass[rows, None].double()
            off = off + law.logp_step / (1 - law.logp_step) * stored.abs()
            logp = stored
        logq = logits_NV[rows].double().log_softmax(-1)
        yield rows, (logp - off).exp(), (logp + off).exp().clamp(max=1), logq


def _dense_kl(logits_NV: Tensor, law: DenseLaw, d2t: Tensor | None) -> tuple[Tensor, Tensor]:
    lo, hi = (torch.empty(law.num_rows, dtype=torch.float64) for _ in range(2))
    lo, hi = lo.to(law.logp.device), hi.to(law.logp.device)
    for rows, p_lo, p_hi, logq in _dense_blocks(logits_NV, law, d2t):
        lam, s_lo, s_hi = _weighed(p_lo, p_hi, logq, lambda x: x.sum(-1), lambda x: x[:, None])
        a_lo, a_hi = p_lo.sum(-1).clamp(min=LEAST), p_hi.sum(-1).clamp(min=LEAST, max=1)
        if d2t is None:
            a_lo = a_hi = torch.ones_like(a_hi)
        a_hi = torch.maximum(a_lo, a_hi)
        low = torch.minimum(s_lo / a_lo - a_lo.log(), s_lo / a_hi - a_hi.log())
        at = torch.minimum(torch.maximum(-s_hi, a_lo), a_hi)
        empty, slack = p_hi.sum(-1) <= 0, DOUBLE * (1 + lam.abs())
        lo[rows] = torch.where(empty, 0.0, low + lam - slack).clamp(min=0)
        hi[rows] = torch.where(empty, 0.0, s_hi / at - at.log() + lam + slack)
    return lo, hi
