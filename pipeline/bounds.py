"""Certified ends of α from a truncated law: kept entries and the exact tail mass, nothing sampled.

MATHS (20)-(22), DESIGN §5. The stored p of a kept id is the middle of a cell; α_lo takes the lower
end of each cell and α_hi the upper one. Tail samples prove nothing and are not read.

The law that is bounded is the one that was captured: what the target's own arithmetic or, in mode
`full`, the storage of its logits in bfloat16 did to it lies before that.

Dims: N rows, E kept entries in the draft's vocabulary, Vd draft vocabulary.
"""

import torch
from torch import Tensor

from pipeline.law import DenseLaw, Law, SparseLaw
from pipeline.terms import CHUNK, terms

ROUNDING = 2e-6
"""Relative error granted to float32 sums over a vocabulary and to stored float32 numbers: 5 x what
262,144 random terms show against float64."""


def bounds(logits_NV: Tensor, law: Law, *, d2t: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(lo, hi), [N] float64 each: lo ≤ Σ_v min(p_v, q_v) ≤ hi.

    They hold for every law p that the stored row may stand for. Arguments as those of `terms`; a
    sparse law must carry `kept` and `tail`, and the kept ids of a row must be its most probable
    ones (storage/FORMAT.md). A dense law is known: its two ends are α up to float32's rounding.
    """
    if isinstance(law, DenseLaw):
        alpha = terms(logits_NV.detach(), law, d2t=d2t)[1]
        return alpha * (1 - ROUNDING), (alpha * (1 + ROUNDING)).clamp(max=1)
    assert law.kept is not None, "a law without counts of kept ids proves nothing"
    assert law.tail is not None, "a law without its tail mass proves nothing"
    row, ids, p_lo, p_hi = _kept(law, law.kept)
    # a tail id is at most as probable as the least probable kept one, and as the whole tail
    tail = law.tail.double() * (1 + ROUNDING * (1 - law.tail.double().clamp(min=1e-300).log()))
    cap = tail.scatter_reduce(0, row, p_hi, "amin")
    if d2t is not None:
        column = torch.searchsorted(d2t, ids).clamp_(max=len(d2t) - 1)
        inside = d2t[column] == ids
        row, ids, p_lo, p_hi = row[inside], column[inside], p_lo[inside], p_hi[inside]
    peak, total, capped = _passes(logits_NV.detach(), cap)
    logit = logits_NV.detach().reshape(-1).index_select(0, row * logits_NV.shape[1] + ids)
    q = (logit.double() - peak[row]).exp() / total[row]
    zero = torch.zeros_like(total)
    lo = zero.index_add(0, row, torch.minimum(p_lo, q * (1 - ROUNDING)))
    hi = zero.index_add(0, row, torch.minimum(p_hi, q * (1 + ROUNDING)))
    # Σ of min(cap, q) over the ids that are not kept; the difference may cancel
    outside = capped - zero.index_add(0, row, torch.minimum(cap[row], q)) + ROUNDING
    return lo, (hi + torch.minimum(tail, outside.clamp(min=0))).clamp(max=1)


def _kept(law: SparseLaw, kept_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, ids and the ends of the cells of the kept entries, [E] each; MATHS (20)."""
    row = law.rows()
    place = torch.arange(len(row), device=row.device) - law.entry_start[row]
    kept = place < kept_N[row]
    row, ids, root = row[kept], law.ids[kept], law.p[kept].double().sqrt()
    lo = (root - law.p_step / 2).clamp(min=0).square() * (1 - ROUNDING)
    hi = (root + law.p_step / 2).clamp(max=1).square() * (1 + ROUNDING)
    return row, ids, lo, hi


def _passes(logits_NV: Tensor, cap_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per row, float64: the largest logit, Σ exp(z − largest) and Σ_v min(cap, q_v)."""
    wide = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    peak, total, capped = (torch.empty_like(cap_N) for _ in range(3))
    for rows in torch.arange(len(cap_N)).split(max(1, CHUNK // max(1, logits_NV.shape[1]))):
        block = slice(int(rows[0]), int(rows[-1]) + 1)
        x = logits_NV[block].to(wide)
        top = x.amax(-1, keepdim=True)
        x = (x - top).exp_()
        norm = x.sum(-1).double()
        peak[block], total[block] = top.squeeze(-1).double(), norm
        limit = (cap_N[block] * norm).to(wide)[:, None]
        capped[block] = torch.minimum(x, limit).sum(-1).double() / norm
    return peak, total, capped
