"""`pipeline.terms` on a GPU: Triton kernels, one pass over the logits forward and one backward.

MATHS (3)-(9), the same arithmetic as the torch code that dispatches here: the pass over the
vocabulary is float32 whatever the logits' dtype, numbers of rows and entries are float64, log q is
taken at the entries. What forward saves is a few numbers a row and log q of each entry; backward
may overwrite the logits.

One program owns one row. Dims: N rows, E entries, V draft vocabulary. Knows no autograd and no law:
plain tensors in and out. `TRITON_INTERPRET=1`, set before the first import of triton, runs the
kernels on a CPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

REST = tl.constexpr(1e-3)
"""As in `pipeline.terms`: below it q_rest is summed, not subtracted."""

ENTRIES = 32
"""Entries a step: rows of a cache keep some 40, and duplicates are found by comparing 32 x 32."""

SCAN = 512
"""Columns a step of the rare pass that leaves out the entries; 1,024 x 32 comparisons spill."""


def _block(width: int) -> tuple[int, int]:
    """Columns a step and warps of a program; 4,096 columns in 8 warps hold 16 floats a thread."""
    block = min(4096, max(128, triton.next_power_of_2(width)))
    return block, min(8, max(1, block // 512))


@triton.jit
def _online(z_ptr, width, BLOCK: tl.constexpr):
    """The largest logit of a row and Σ exp(z − largest), in one pass."""
    lane = tl.arange(0, BLOCK)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for v in range(0, width, BLOCK):
        x = tl.load(z_ptr + v + lane, mask=v + lane < width, other=float("-inf")).to(tl.float32)
        top = tl.maximum(peak, tl.max(x, 0))
        base = tl.where(top == float("-inf"), 0.0, top)  # nothing but −inf so far
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(x - base), 0)
        peak = top
    return peak, total


@triton.jit
def _sparse_forward(
    logits_ptr,
    start_ptr,
    index_ptr,
    p_ptr,
    weight_ptr,
    logq_ptr,
    peak_ptr,
    total_ptr,
    mass_ptr,
    covered_ptr,
    kl_ptr,
    alpha_ptr,
    width,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
):
    """The pass over the vocabulary, then the sums over a row's entries; no bucket yet."""
    row = tl.program_id(0).to(tl.int64)
    row_start = row * width
    peak, total = _online(logits_ptr + row_start, width, BLOCK)
    lse = peak.to(tl.float64) + tl.log(total.to(tl.float64))
    first, last = tl.load(start_ptr + row), tl.load(start_ptr + row + 1)
    entry = tl.arange(0, E)
    kl = tl.full((), 0.0, tl.float64)
    alpha = tl.full((), 0.0, tl.float64)
    mass = tl.full((), 0.0, tl.float64)
    covered = tl.full((), 0.0, tl.float64)
    for e in range(first, last, E):
        own = e + entry < last
        index = tl.load(index_ptr + e + entry, mask=own, other=row_start)
        logq = tl.load(logits_ptr + index, mask=own, other=0.0).to(tl.float64) - lse
        tl.store(logq_ptr + e + entry, logq, mask=own)
        p = tl.load(p_ptr + e + entry, mask=own, other=0.0)
        weight = tl.load(weight_ptr + e + entry, mask=own, other=0.0)
        q, wp = tl.where(own, tl.exp(logq), 0.0), weight * p
        log_ratio = tl.log(tl.where(p > 0, p, 1.0)) - logq
        kl += tl.sum(tl.where(wp > 0, wp * log_ratio, 0.0), 0)
        # `minimum` would drop a NaN; this keeps q's
        alpha += tl.sum(weight * tl.where(p < q, p, q), 0)
        mass += tl.sum(wp, 0)
        covered += tl.sum(q, 0)
    tl.store(peak_ptr + row, peak)
    tl.store(total_ptr + row, total)
    tl.store(mass_ptr + row, mass)
    tl.store(covered_ptr + row, covered)
    tl.store(kl_ptr + row, kl)
    tl.store(alpha_ptr + row, alpha)


@triton.jit
def _sparse_bucket(
    logits_ptr,
    start_ptr,
    index_ptr,
    bucket_ptr,
    peak_ptr,
    total_ptr,
    mass_ptr,
    used_ptr,
    log_rest_ptr,
    kl_ptr,
    alpha_ptr,
    width,
    PRUNED: tl.constexpr,
    SCAN: tl.constexpr,
    E: tl.constexpr,
):
    """Add the bucket of the rows that have one, and renormalise.

    `log_rest_ptr` holds Σ_entries q and gets log q_rest. Apart from the pass over the vocabulary,
    whose programs would pay for this one's registers; a row without a bucket costs nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    row_start = row * width
    bucket, mass = tl.load(bucket_ptr + row), tl.load(mass_ptr + row)
    kl = tl.load(kl_ptr + row)
    log_rest = tl.full((), 0.0, tl.float64)
    if bucket > 0:
        peak = tl.load(peak_ptr + row)
        rest = 1.0 - tl.load(log_rest_ptr + row)
        if rest < REST:  # sum q over the columns that are no entry: the difference cancels
            first, last = tl.load(start_ptr + row), tl.load(start_ptr + row + 1)
            lane, entry = tl.arange(0, SCAN), tl.arange(0, E)
            top = tl.full((), float("-inf"), tl.float32)
            tail = tl.full((), 0.0, tl.float32)
            for v in range(0, width, SCAN):
                column = v + lane
                x = tl.load(
                    logits_ptr + row_start + column, mask=column < width, other=float("-inf")
                ).to(tl.float32)
                for e in range(first, last, E):
                    own = e + entry < last
                    taken = tl.load(index_ptr + e + entry, mask=own, other=-1) - row_start
                    hit = tl.where(column[:, None] == taken[None, :], 1, 0)
                    x = tl.where(tl.max(hit, 1) > 0, float("-inf"), x)
                new = tl.maximum(top, tl.max(x, 0))
                base = tl.where(new == float("-inf"), 0.0, new)
                tail = tail * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
                top = new
            total = tl.load(total_ptr + row).to(tl.float64)
            some = tl.log(tl.where(tail > 0, tail, 1.0).to(tl.float64)) - tl.log(total)
            log_rest = tl.where(tail > 0, (top - peak).to(tl.float64) + some, float("-inf"))
        else:
            log_rest = tl.log(rest)
        if log_rest == float("-inf"):  # the draft has no symbol left for the bucket
            bucket = tl.full((), 0.0, tl.float64)
            log_rest = tl.full((), 0.0, tl.float64)
        else:
            rest = tl.exp(log_rest)
            kl += bucket * (tl.log(bucket) - log_rest)
            alpha = tl.load(alpha_ptr + row) + tl.where(bucket < rest, bucket, rest)
            tl.store(alpha_ptr + row, alpha)
            mass += bucket
            tl.store(mass_ptr + row, mass)
    if PRUNED:
        safe = tl.where(mass > 0, mass, 1.0)
        kl = tl.where(mass > 0, kl / safe - tl.log(safe), 0.0)
    tl.store(kl_ptr + row, kl)
    tl.store(used_ptr + row, bucket)
    tl.store(log_rest_ptr + row, log_rest)


@triton.jit
def _sparse_backward(
    logits_ptr,
    out_ptr,
    start_ptr,
    index_ptr,
    p_ptr,
    weight_ptr,
    logq_ptr,
    peak_ptr,
    total_ptr,
    mass_ptr,
    used_ptr,
    log_rest_ptr,
    g_kl_ptr,
    g_alpha_ptr,
    width,
    PRUNED: tl.constexpr,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_start = row * width
    first, last = tl.load(start_ptr + row), tl.load(start_ptr + row + 1)
    entry, other = tl.arange(0, E), tl.arange(0, E)
    mass, bucket = tl.load(mass_ptr + row), tl.load(used_ptr + row)
    g_kl, g_alpha = tl.load(g_kl_ptr + row), tl.load(g_alpha_ptr + row)
    if PRUNED:  # of KL / mass − log mass
        g_kl = tl.where(mass > 0, g_kl / tl.where(mass > 0, mass, 1.0), 0.0)
    below = tl.full((), 0.0, tl.float64)
    for e in range(first, last, E):
        own = e + entry < last
        p = tl.load(p_ptr + e + entry, mask=own, other=0.0)
        weight = tl.load(weight_ptr + e + entry, mask=own, other=0.0)
        q = tl.exp(tl.load(logq_ptr + e + entry, mask=own, other=0.0))
        below += tl.sum(tl.where(q < p, weight * q, 0.0), 0)
    factor = g_kl * mass - g_alpha * below
    rest_factor = factor
    if bucket > 0:
        rest = tl.exp(tl.load(log_rest_ptr + row))
        short = tl.where(rest < bucket, g_alpha, 0.0)
        factor = factor - short * rest
        rest_factor = factor + short - g_kl * bucket / rest
    # the factor may be as large as q is small: their product is formed in logarithms
    peak = tl.load(peak_ptr + row)
    size = tl.where(rest_factor == 0, 1.0, tl.abs(rest_factor))
    log_scale = tl.log(size) - tl.log(tl.load(total_ptr + row).to(tl.float64))
    log_scale = tl.where(rest_factor == 0, float("-inf"), log_scale).to(tl.float32)
    sign = tl.where(rest_factor < 0, -1.0, 1.0).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    for v in range(0, width, BLOCK):
        inside = v + lane < width
        x = tl.load(logits_ptr + row_start + v + lane, mask=inside, other=0.0).to(tl.float32)
        x = sign * tl.exp((x - peak) + log_scale)
        tl.store(out_ptr + row_start + v + lane, x.to(out_ptr.dtype.element_ty), mask=inside)
    # entries are written afresh, over what other threads of this program wrote
    tl.debug_barrier()
    for e in range(first, last, E):
        own = e + entry < last
        index = tl.load(index_ptr + e + entry, mask=own, other=-1)
        x = tl.exp(tl.load(logq_ptr + e + entry, mask=own, other=0.0)) * factor
        for f in range(first, last, E):  # a tail sample may repeat: all its copies write the sum
            also = f + other < last
            twin = tl.load(index_ptr + f + other, mask=also, other=-2)
            p = tl.load(p_ptr + f + other, mask=also, other=0.0)
            weight = tl.load(weight_ptr + f + other, mask=also, other=0.0)
            q = tl.exp(tl.load(logq_ptr + f + other, mask=also, other=0.0))
            value = g_alpha * tl.where(q < p, weight * q, 0.0) - g_kl * (weight * p)
            x += tl.sum(tl.where(index[:, None] == twin[None, :], value[None, :], 0.0), 1)
        tl.store(out_ptr + index, x.to(tl.float32).to(out_ptr.dtype.element_ty), mask=own)


@triton.jit
def _dense_load(z_ptr, logp_ptr, d2t_ptr, column, inside, PRUNED: tl.constexpr):
    """Logits and log p of some columns; log 0 is a finite −1e30."""
    target = column
    if PRUNED:
        target = tl.load(d2t_ptr + column, mask=inside, other=0)
    logp = tl.load(logp_ptr + target, mask=inside, other=-1e30).to(tl.float32)
    logp = tl.where(logp < -1e30, -1e30, logp)
    x = tl.load(z_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
    return x, logp


@triton.jit
def _dense_forward(
    logits_ptr,
    logp_ptr,
    d2t_ptr,
    peak_ptr,
    total_ptr,
    mass_ptr,
    log_below_ptr,
    kl_ptr,
    alpha_ptr,
    width,
    logp_width,
    PRUNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr = logits_ptr + row * width
    peak, total = _online(z_ptr, width, BLOCK)
    log_total = tl.log(total)
    lane = tl.arange(0, BLOCK)
    kl = tl.full((), 0.0, tl.float64)
    mass = tl.full((), 0.0, tl.float64)
    top = tl.full((), float("-inf"), tl.float32)
    overlap = tl.full((), 0.0, tl.float64)
    below = tl.full((), 0.0, tl.float64)
    for v in range(0, width, BLOCK):
        inside = v + lane < width
        x, logp = _dense_load(z_ptr, logp_ptr + row * logp_width, d2t_ptr, v + lane, inside, PRUNED)
        logq = (x - peak) - log_total
        p = tl.where(inside, tl.exp(logp), 0.0)
        mass += tl.sum(p, 0).to(tl.float64)
        kl += tl.sum(p * tl.where(p > 0, logp - logq, 0.0), 0).to(tl.float64)
        # Σ min(p, q) and Σ q 1[q < p] online, in logarithms: both may lie under float32's range
        low = tl.where(logp < logq, logp, logq)
        new = tl.maximum(top, tl.max(tl.where(inside, low, float("-inf")), 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp(top - base).to(tl.float64)
        part = tl.where(inside, tl.exp(low - base), 0.0)
        overlap = overlap * shrink + tl.sum(part, 0).to(tl.float64)
        below = below * shrink + tl.sum(tl.where(logq < logp, part, 0.0), 0).to(tl.float64)
        top = new
    if PRUNED:
        safe = tl.where(mass > 0, mass, 1.0)
        kl = tl.where(mass > 0, kl / safe - tl.log(safe), 0.0)
    tl.store(peak_ptr + row, peak)
    tl.store(total_ptr + row, total)
    tl.store(mass_ptr + row, mass)
    some = tl.log(tl.where(below > 0, below, 1.0))
    tl.store(log_below_ptr + row, tl.where(below > 0, top.to(tl.float64) + some, float("-inf")))
    tl.store(kl_ptr + row, kl)
    tl.store(alpha_ptr + row, tl.exp(top.to(tl.float64)) * overlap)


@triton.jit
def _dense_backward(
    logits_ptr,
    out_ptr,
    logp_ptr,
    d2t_ptr,
    peak_ptr,
    total_ptr,
    mass_ptr,
    log_below_ptr,
    g_kl_ptr,
    g_alpha_ptr,
    width,
    logp_width,
    PRUNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mass = tl.load(mass_ptr + row)
    g_kl, g_alpha = tl.load(g_kl_ptr + row), tl.load(g_alpha_ptr + row)
    if PRUNED:
        g_kl = tl.where(mass > 0, g_kl / tl.where(mass > 0, mass, 1.0), 0.0)
    # g_alpha may be as large as q is small: their products are formed in logarithms
    size = tl.where(g_alpha == 0, 1.0, tl.abs(g_alpha))
    log_g = tl.where(g_alpha == 0, float("-inf"), tl.log(size))
    sign = tl.where(g_alpha < 0, -1.0, 1.0)
    pulled = tl.exp(tl.load(log_below_ptr + row) + log_g)
    factor = (g_kl * mass - sign * tl.where(g_alpha == 0, 0.0, pulled)).to(tl.float32)
    log_g, sign, g_kl = log_g.to(tl.float32), sign.to(tl.float32), g_kl.to(tl.float32)
    peak, log_total = tl.load(peak_ptr + row), tl.log(tl.load(total_ptr + row))
    lane = tl.arange(0, BLOCK)
    for v in range(0, width, BLOCK):
        inside = v + lane < width
        x, logp = _dense_load(
            logits_ptr + row * width,
            logp_ptr + row * logp_width,
            d2t_ptr,
            v + lane,
            inside,
            PRUNED,
        )
        logq = (x - peak) - log_total
        pull = tl.where(logq < logp, sign * tl.exp(logq + log_g), 0.0)
        x = tl.exp(logq) * factor + pull - tl.exp(logp) * g_kl
        tl.store(out_ptr + row * width + v + lane, x.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class SparseSaved:
    """What the backward of sparse laws reads beside the logits."""

    start: Tensor
    index: Tensor
    p: Tensor
    weight: Tensor
    logq: Tensor
    """[E] float64, as p and weight."""
    peak: Tensor
    total: Tensor
    mass: Tensor
    bucket: Tensor
    log_rest: Tensor
    """[N]: peak and total float32, the others float64."""
    pruned: bool


def _numbers(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.float64, device=like.device)


def sparse_forward(
    logits_NV: Tensor,
    start: Tensor,
    index: Tensor,
    *,
    p: Tensor,
    weight: Tensor,
    bucket: Tensor,
    pruned: bool,
) -> tuple[Tensor, Tensor, SparseSaved]:
    """The terms (kl, alpha), [N] float64, and what `sparse_backward` needs.

    logits_NV: contiguous; start [N + 1] and index [E] int64: entry e of row n is flattened logit
    index[e], start[n] ≤ e < start[n + 1]; p, weight [E] and bucket [N] float64.
    """
    num_rows, width = logits_NV.shape
    assert logits_NV.is_contiguous(), "rows of a kernel's logits lie one after the other"
    kl, alpha, mass, used, log_rest = (_numbers(num_rows, logits_NV) for _ in range(5))
    peak, total = (torch.empty(num_rows, device=logits_NV.device) for _ in range(2))
    logq = _numbers(len(index), logits_NV)
    if num_rows:
        block, warps = _block(width)
        _sparse_forward[(num_rows,)](
            logits_NV,
            start,
            index,
            p,
            weight,
            logq,
            peak,
            total,
            mass,
            log_rest,
            kl,
            alpha,
            width,
            BLOCK=block,
            E=ENTRIES,
            num_warps=warps,
        )
        _sparse_bucket[(num_rows,)](
            logits_NV,
            start,
            index,
            bucket,
            peak,
            total,
            mass,
            used,
            log_rest,
            kl,
            alpha,
            width,
            PRUNED=pruned,
            SCAN=SCAN,
            E=ENTRIES,
            num_warps=8,
        )
    saved = SparseSaved(start, index, p, weight, logq, peak, total, mass, used, log_rest, pruned)
    return kl, alpha, saved


def sparse_backward(
    logits_NV: Tensor, saved: SparseSaved, g_kl: Tensor, g_alpha: Tensor, *, out: Tensor
) -> Tensor:
    """The gradient with respect to the logits, into `out`, which may be `logits_NV` itself."""
    num_rows, width = logits_NV.shape
    if num_rows:
        block, warps = _block(width)
        _sparse_backward[(num_rows,)](
            logits_NV,
            out,
            saved.start,
            saved.index,
            saved.p,
            saved.weight,
            saved.logq,
            saved.peak,
            saved.total,
            saved.mass,
            saved.bucket,
            saved.log_rest,
            g_kl.contiguous(),
            g_alpha.contiguous(),
            width,
            PRUNED=saved.pruned,
            BLOCK=block,
            E=ENTRIES,
            num_warps=warps,
        )
    return out


@dataclass(frozen=True)
class DenseSaved:
    """What the backward of dense laws reads beside the logits."""

    logp: Tensor
    d2t: Tensor | None
    peak: Tensor
    total: Tensor
    mass: Tensor
    log_below: Tensor
    """[N]: log Σ q 1[q < p]."""


def dense_forward(
    logits_NV: Tensor, logp_NV: Tensor, d2t: Tensor | None
) -> tuple[Tensor, Tensor, DenseSaved]:
    """The terms (kl, alpha), [N] float64, against full rows of log p; two reads of the logits."""
    num_rows, width = logits_NV.shape
    assert logits_NV.is_contiguous(), "rows of a kernel's logits lie one after the other"
    logp_NV = logp_NV.contiguous()
    kl, alpha, mass, log_below = (_numbers(num_rows, logits_NV) for _ in range(4))
    peak, total = (torch.empty(num_rows, device=logits_NV.device) for _ in range(2))
    if num_rows:
        block, warps = _block(width)
        _dense_forward[(num_rows,)](
            logits_NV,
            logp_NV,
            logp_NV if d2t is None else d2t,
            peak,
            total,
            mass,
            log_below,
            kl,
            alpha,
            width,
            logp_NV.shape[1],
            PRUNED=d2t is not None,
            BLOCK=block,
            num_warps=warps,
        )
    return kl, alpha, DenseSaved(logp_NV, d2t, peak, total, mass, log_below)


def dense_backward(
    logits_NV: Tensor, saved: DenseSaved, g_kl: Tensor, g_alpha: Tensor, *, out: Tensor
) -> Tensor:
    """The gradient with respect to the logits, into `out`, which may be `logits_NV` itself."""
    num_rows, width = logits_NV.shape
    if num_rows:
        block, warps = _block(width)
        _dense_backward[(num_rows,)](
            logits_NV,
            out,
            saved.logp,
            saved.logp if saved.d2t is None else saved.d2t,
            saved.peak,
            saved.total,
            saved.mass,
            saved.log_below,
            g_kl.contiguous(),
            g_alpha.contiguous(),
            width,
            saved.logp.shape[1],
            PRUNED=saved.d2t is not None,
            BLOCK=block,
            num_warps=warps,
        )
    return out
