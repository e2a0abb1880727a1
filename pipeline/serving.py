"""Serving laws: temperature, then top-k, then top-p, of a stored law of the target at T = 1.

From a truncated row the served law is exact up to rounding where its support and its normaliser are
known: top-k within the kept ids at any temperature, a nucleus that ends within them. Elsewhere it
is estimated from the tail samples, as if each were the ids that it stands for, and bounded: every
row says which, and `Ends` hold whichever is true (MATHS (39)-(41)). A dense law is served exactly.

Ties: of equally likely ids the lower one is the likelier; the stored order of kept ids is the
target's own, whatever their rounded values say. top-p keeps the fewest most likely ids whose mass
reaches it, counted after top-k, as engines do.

Knows no draft and no cache. Dims: R rows, V vocabulary, B rows of a block, E entries of a row
(padded).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pipeline.bounds import LEAST, ROUNDING, Ends, bounds, ends, overlap
from pipeline.law import DenseLaw, Law, SparseLaw
from pipeline.serve import Serving, plain, serve_logits

BLOCK = 1 << 18
"""Padded entries at once: two dozen float64 arrays of 2 MB."""
SPAN = 600.0
"""Largest logarithm of a scaled weight: e^600 beside 1 is all the mass, and is finite."""


@dataclass(frozen=True)
class Served:
    """R laws after temperature, top-k and top-p."""

    law: Law
    """To train and measure against, as `terms` reads it; where not exact, the estimate."""
    exact: Tensor
    """[R] bool: support and normaliser are known, so only rounding is left."""
    ends: Ends | None
    """What is certain of every row; None for a dense law, which is known."""

    @property
    def num_bounded(self) -> int:
        """Rows that are only bounded."""
        return int((~self.exact).sum())

    def alpha_bounds(
        self, logits_NV: Tensor, *, d2t: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(lo, hi) of Σ min(served p, q) for drafts of these logits, [R] each.

        A draft that is served like the target comes in as `serve_logits` of its own logits.
        """
        if self.ends is None:
            return bounds(logits_NV, self.law, d2t=d2t)
        return overlap(logits_NV, self.ends, d2t=d2t)


def serve(law: Law, serving: Serving, *, vocab_size: int) -> Served:
    """The served laws of R rows over `vocab_size` ids; a sparse one must carry `kept`, `tail`.

    The served law of a sparse one carries neither: its values are no middles of the cache's cells,
    so that what is proved of it stands in `ends` alone.
    """
    known = torch.ones(law.num_rows, dtype=torch.bool)
    if isinstance(law, DenseLaw):
        logp = serve_logits(law.logp, serving).to(law.logp.dtype)
        return Served(DenseLaw(logp), known.to(law.logp.device), None)
    serving = plain(serving, vocab_size)
    if serving == Serving(temperature=1.0, top_k=None, top_p=None):
        return Served(law, known.to(law.p.device), ends(law))
    blocks = [_serve(grid, serving, vocab_size) for grid in _grids(law)]
    return _joined(blocks)


@dataclass(frozen=True)
class _Grid:
    """Some rows of a sparse law, padded: kept ids in their order, then samples, likeliest first."""

    ids: Tensor
    """[B, E]"""
    p: Tensor
    """[B, E] float64, 0 in the padding"""
    lo: Tensor
    """[B, E] ends of kept p, 0 elsewhere"""
    hi: Tensor
    weight: Tensor
    """[B, E] how many ids an entry stands for"""
    kept: Tensor
    """[B]"""
    bucket: Tensor
    """[B] mass of a tail without samples"""
    rest_lo: Tensor
    """[B] mass of the tail"""
    rest_hi: Tensor
    cap: Tensor
    """[B] no tail id is likelier"""


def _grids(law: SparseLaw) -> Iterator[_Grid]:
    """Blocks of rows, in order."""
    known = ends(law)
    assert law.kept is not None, "ends() asked for it"
    row, device = law.rows(), law.p.device
    place = torch.arange(len(row), device=device) - law.entry_start[row]
    sample = place >= law.kept[row]
    # kept ids stay where they are; samples fall by p, and by id where equal
    order = torch.where(sample, law.ids, 0).argsort(stable=True)
    order = order[torch.where(sample, -law.p, -2.0)[order].argsort(stable=True)]
    order = order[(row * 2 + sample)[order].argsort(stable=True)]
    kept_lo, kept_hi = (torch.zeros(len(row), dtype=torch.float64, device=device) for _ in "lh")
    kept_lo[~sample], kept_hi[~sample] = known.lo, known.hi
    flat = {
        "ids": law.ids[order],
        "p": law.p[order].double(),
        "lo": kept_lo[order],
        "hi": kept_hi[order],
        "weight": law.weight[order].double(),
    }
    counts = law.entry_start.diff()
    step = max(1, BLOCK // max(1, int(counts.max()) if len(counts) else 1))
    for first in range(0, max(1, law.num_rows), step):
        rows = slice(first, first + step)
        width = int(counts[rows].max()) if len(counts[rows]) else 0
        at = law.entry_start[:-1][rows, None] + torch.arange(width, device=device)
        real = torch.arange(width, device=device) < counts[rows, None]
        at = torch.where(real, at, 0)
        padded = {
            name: torch.where(real, x[at] if len(x) else x.new_zeros(at.shape), 0)
            for name, x in flat.items()
        }
        yield _Grid(
            **padded,
            kept=law.kept[rows],
            bucket=law.bucket[rows].double(),
            rest_lo=known.rest_lo[rows],
            rest_hi=known.rest_hi[rows],
            cap=known.cap[rows],
        )


@dataclass(frozen=True)
class _Scaled:
    """Weights u = (p / p_1)^(1/T) of a grid after temperature and top-k, and the tail's share."""

    u: Tensor
    """[B, E]"""
    lo: Tensor
    """[B, E] of the kept ids that top-k leaves"""
    hi: Tensor
    ref: Tensor
    """[B, 1] log p_1"""
    kept: Tensor
    """[B] kept ids that top-k leaves"""
    tail_lo: Tensor
    """[B] Σ u of the tail ids that top-k leaves, at least …"""
    tail_hi: Tensor
    """… and at most"""
    cap: Tensor
    """[B] largest u of a tail id"""


def _scaled(g: _Grid, serving: Serving, vocab_size: int) -> _Scaled:
    beta = 1 / serving.temperature
    place = torch.arange(g.p.shape[1], device=g.p.device)
    first = g.p[:, :1] if g.p.shape[1] else g.cap[:, None]
    ref = torch.where(first > 0, first, 1.0).log()

    def weight(p: Tensor) -> Tensor:
        u = ((p.clamp(min=LEAST).log() - ref) * beta).clamp(max=SPAN).exp()
        return torch.where(p > 0, u, 0.0)

    num_tail = (vocab_size - g.kept).double()
    num_left = num_tail  # after top-k
    kept = g.kept
    if serving.top_k is not None:
        num_left = (serving.top_k - g.kept).clamp(min=0).minimum(vocab_size - g.kept).double()
        kept = g.kept.clamp(max=serving.top_k)
    inside = place < kept[:, None]
    cap = weight(g.cap[:, None])[:, 0]
    lo, hi = _tail_weight(g, ref[:, 0], beta, num_tail)
    # of a falling sequence the first n of N add up to n/N of the sum at the least
    lo = lo * num_left / num_tail.clamp(min=1)
    hi = torch.minimum(hi, num_left * cap)
    return _Scaled(
        u=weight(g.p),
        lo=torch.where(inside, weight(g.lo), 0.0),
        hi=torch.where(inside, weight(g.hi), 0.0),
        ref=ref,
        kept=kept,
        tail_lo=lo,
        tail_hi=hi,
        cap=cap,
    )


def _tail_weight(g: _Grid, ref: Tensor, beta: float, num_tail: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of Σ (p/p_1)^β over a tail of known mass whose ids are below the cap; MATHS (39)."""
    some = (g.rest_hi > 0) & (num_tail > 0)

    def peaked(r: Tensor) -> Tensor:  # the cap on r / cap ids, nothing on the others
        return r.clamp(min=LEAST).log() + (beta - 1) * g.cap.clamp(min=LEAST).log()

    def flat(r: Tensor) -> Tensor:  # all ids alike
        return (1 - beta) * num_tail.clamp(min=1).log() + beta * r.clamp(min=LEAST).log()

    least, most = (flat, peaked) if beta > 1 else (peaked, flat)
    lo = (least(g.rest_lo) - beta * ref).clamp(max=SPAN).exp() * (1 - ROUNDING)
    hi = (most(g.rest_hi) - beta * ref).clamp(max=SPAN).exp() * (1 + ROUNDING)
    return torch.where(some & (g.rest_lo > 0), lo, 0.0), torch.where(some, hi, 0.0)


@dataclass(frozen=True)
class _Nucleus:
    """How many kept ids a served row has, and whether ids of the tail are among them."""

    least: Tensor
    """[B]"""
    most: Tensor
    tail: Tensor
    """[B] bool: tail ids may be inside"""


def _nucleus(s: _Scaled, serving: Serving) -> _Nucleus:
    """The kept ids before top-p is reached, at least and at most; MATHS (40)."""
    if serving.top_p is None:
        return _Nucleus(s.kept, s.kept, s.tail_hi > 0)
    inside = torch.arange(s.lo.shape[1], device=s.lo.device) < s.kept[:, None]
    upto_lo, upto_hi = s.lo.cumsum(-1), s.hi.cumsum(-1)
    after_lo = s.lo.sum(-1, keepdim=True) - upto_lo + s.tail_lo[:, None]
    after_hi = s.hi.sum(-1, keepdim=True) - upto_hi + s.tail_hi[:, None]
    share_lo = upto_lo / (upto_lo + after_hi).clamp(min=LEAST)
    share_hi = upto_hi / (upto_hi + after_lo).clamp(min=LEAST)
    if serving.temperature == 1 and serving.top_k is None:  # p itself: the normaliser is 1
        one = s.ref.exp()
        share_lo = share_lo.maximum(upto_lo * one).maximum(1 - after_hi * one)
        share_hi = share_hi.minimum(upto_hi * one).minimum(1 - after_lo * one)
    missed = (inside & (share_hi < serving.top_p - ROUNDING)).sum(-1)
    late = (inside & (share_lo < serving.top_p + ROUNDING)).sum(-1)
    return _Nucleus(
        least=torch.minimum(missed + 1, s.kept),
        most=torch.minimum(late + 1, s.kept),
        tail=(late == s.kept) & (s.tail_hi > 0),
    )


@dataclass(frozen=True)
class _Block:
    """A block's served rows."""

    count: Tensor
    """[B] entries of the estimate"""
    ids: Tensor
    p: Tensor
    weight: Tensor
    bucket: Tensor
    exact: Tensor
    end_count: Tensor
    """[B] entries that may be inside"""
    end_ids: Tensor
    lo: Tensor
    hi: Tensor
    rest_lo: Tensor
    rest_hi: Tensor
    cap: Tensor


def _serve(g: _Grid, serving: Serving, vocab_size: int) -> _Block:
    s = _scaled(g, serving, vocab_size)
    n = _nucleus(s, serving)
    place = torch.arange(g.p.shape[1], device=g.p.device)
    must, may = place < n.least[:, None], place < n.most[:, None]
    # an entry is least where all others are most, and the support is the largest that there may be
    largest = torch.where(may, s.hi, 0.0).sum(-1) + torch.where(n.tail, s.tail_hi, 0.0)
    others_hi = (largest[:, None] - s.hi).clamp(min=0)
    lo = torch.where(must, s.lo / (s.lo + others_hi).clamp(min=LEAST), 0.0)
    sure = torch.where(must, s.lo, 0.0).sum(-1, keepdim=True)
    tail_in = s.tail_lo if serving.top_p is None else torch.zeros_like(s.tail_lo)
    others_lo = (torch.where(must, sure, s.lo.cumsum(-1)) - s.lo).clamp(min=0) + tail_in[:, None]
    hi = torch.where(may, s.hi / (s.hi + others_lo).clamp(min=LEAST), 0.0)
    whole_lo, whole_hi = s.lo.sum(-1), s.hi.sum(-1)
    rest_hi = s.tail_hi / (s.tail_hi + whole_lo).clamp(min=LEAST) * (1 + ROUNDING)
    rest_hi = torch.where(n.tail, rest_hi, 0.0)
    cap = s.cap / (s.cap + whole_lo).clamp(min=LEAST) * (1 + ROUNDING)
    weight, p, bucket = _estimated(g, s, n, serving)
    taken = weight > 0
    return _Block(
        count=taken.sum(-1),
        ids=g.ids[taken],
        p=p[taken],
        weight=weight[taken],
        bucket=bucket,
        exact=(n.least == n.most) & ~n.tail,
        end_count=may.sum(-1),
        end_ids=g.ids[may],
        lo=(lo * (1 - ROUNDING))[may],
        hi=(hi * (1 + ROUNDING)).clamp(max=1)[may],
        rest_lo=tail_in / (tail_in + whole_hi).clamp(min=LEAST) * (1 - ROUNDING),
        rest_hi=rest_hi,
        cap=torch.minimum(cap, rest_hi),
    )


def _estimated(
    g: _Grid, s: _Scaled, n: _Nucleus, serving: Serving
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and values of the entries and the bucket of the served rows; MATHS (41).

    A sample stands for as many ids as its weight says; of one on a boundary a fraction is kept. A
    tail without samples has the middle of its ends.
    """
    place = torch.arange(g.p.shape[1], device=g.p.device)
    kept = place < g.kept[:, None]
    weight = g.weight
    if serving.top_k is not None:
        before = weight.cumsum(-1) - weight
        weight = torch.minimum(weight, (serving.top_k - before).clamp(min=0))
    bucket = torch.where(g.bucket > 0, (s.tail_lo + s.tail_hi) / 2, 0.0)
    if serving.top_p is not None:
        mass = weight * s.u
        goal = serving.top_p * (mass.sum(-1) + bucket)
        before = mass.cumsum(-1) - mass
        short = (goal[:, None] - before).clamp(min=0)
        part = torch.minimum(weight, short / s.u.clamp(min=LEAST))
        inside = (place < n.most[:, None]) & ((place < n.least[:, None]) | (short > 0))
        weight = torch.where(kept, torch.where(inside, weight, 0.0), part)
        bucket = torch.minimum(bucket, (goal - mass.sum(-1)).clamp(min=0))
    weight = torch.where(kept | n.tail[:, None], weight, 0.0)
    bucket = torch.where(n.tail, bucket, 0.0)
    total = ((weight * s.u).sum(-1) + bucket).clamp(min=LEAST)
    return weight, s.u / total[:, None], bucket / total


def _joined(blocks: list[_Block]) -> Served:
    b = _Block(**{f.name: torch.cat([getattr(x, f.name) for x in blocks]) for f in fields(_Block)})
    num_rows = torch.arange(len(b.count), device=b.count.device)
    law = SparseLaw(
        entry_start=torch.nn.functional.pad(b.count.cumsum(0), (1, 0)),
        ids=b.ids,
        p=b.p.float(),
        weight=b.weight.float(),
        bucket=b.bucket.float(),
    )
    known = Ends(
        row=torch.repeat_interleave(num_rows, b.end_count),
        ids=b.end_ids,
        lo=b.lo,
        hi=b.hi,
        rest_lo=b.rest_lo,
        rest_hi=b.rest_hi,
        cap=b.cap,
    )
    return Served(law, b.exact, known)
