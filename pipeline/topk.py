"""Logits of the target -> what the cache keeps of its law: ids by a rule, tail mass, samples.

Pure torch: randomness comes in as uniforms, rows do not know their sequences, and nothing is
rounded to the cache's codes here (`pipeline.teacher` does that). Each row's numbers depend on the
row alone, so neither batches nor workers change them.

Three rules, one form: the likeliest ids, as long as p >= min_prob (absolute threshold), as long as
those before an id hold less than top_p (nucleus), and no more than max_kept (with neither of the
two: fixed K). Equal logits go by id.

The vocabulary is passed over once, which leaves three numbers for every block of some hundred ids.
All that follows asks the blocks, and looks only into those that it needs: the ones whose largest
logit may be kept, and the ones that a sample falls into, by an inverse CDF of two levels. Sums
within a block are float32; all others, and every logarithm, are float64.

Memory: whatever N is, nothing in float32 or wider has more than `chunk_elements` numbers, or V
where that is more.

Dims: N rows, V vocabulary, E kept entries and M tail samples of all rows together, C rows of a
chunk, B blocks of a row, S ids of a block, Q blocks looked into. Source: DESIGN §5; the tail's
estimator is MATHS' and Anshumann et al. 2025's (sampled KD).
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad

# What a chunk of rows may hold (16 MB in float32): fewer rows would pay for their calls.
CHUNK_ELEMENTS = 1 << 22
# The pass over the vocabulary takes so many at a time (2 MB, four rows of V = 128,256): fewer would
# pay for their calls, more would leave the caches.
TILE_ELEMENTS = 1 << 19
# An accelerator starts some 80 kernels a chunk: 512 rows of V = 131,072 (256 MB of float32) keep it
# longer than its launches do, for a few such copies of memory. Chosen by that count, not measured.
DEVICE_CHUNK_ELEMENTS = 1 << 26
# Shorter runs are reduced by torch one number at a time on a CPU, seven times slower.
LEAST_BLOCK = 32
# A tail lighter than this is not sampled even if the rule would: nobody could use it.
LEAST_MASS = 1e-30


@dataclass(frozen=True)
class Rule:
    """What is kept of a row."""

    max_kept: int
    """The likeliest ids, no more than this many …"""
    tail_samples: int
    """Samples of a tail of at least `tail_full_mass`; fewer in proportion below …"""
    tail_full_mass: float
    tail_min_mass: float
    """… and none where the tail's mass is less than this."""
    min_prob: float = 0.0
    """… with p ≥ min_prob; 0 for a rule without a threshold …"""
    top_p: float | None = None
    """… whose likelier ones hold less than top_p together; None for a rule without a nucleus."""


@dataclass(frozen=True)
class Kept:
    """N rows, ragged; float32 but for counts and ids (int64)."""

    kept: Tensor
    """[N] entries of each row."""
    ids: Tensor
    """[E] by row, then likeliest first, ties by id."""
    p: Tensor
    """[E] under the full law, never renormalised."""
    token_logp: Tensor
    """[N] log p of the token that follows."""
    tail_logp_mass: Tensor
    """[N] log of the mass outside the kept set; −inf where nothing is outside."""
    tail_kept: Tensor
    """[N] tail samples of each row."""
    tail_ids: Tensor
    """[M] by row, in the order drawn; an id may repeat."""
    tail_logp: Tensor
    """[M] log p of the samples under the full law."""
    entropy: Tensor
    """[N] nats; not finite where one of the row's logits is not, and nothing else of it counts."""


@dataclass(frozen=True)
class _Blocks:
    """C rows of logits cut into B blocks of S ids; float32 [C, B] where not said otherwise."""

    logits: Tensor
    """[C, V], of any dtype and contiguous."""
    peak: Tensor
    """The largest logit of a block; −inf where it has no id."""
    total: Tensor
    """Σ exp(z − peak); 0 where it has no id."""

    def masses(self) -> tuple[Tensor, Tensor]:
        """The largest logit of each row, [C, 1], and each block's Σ exp(z − it), both float64."""
        top_C1 = self.peak.amax(-1, keepdim=True).double()
        base_C1 = torch.where(top_C1.isneginf(), 0.0, top_C1)
        return top_C1, (self.peak.double() - base_C1).exp_().mul_(self.total)

    def look(self, row_Q: Tensor, block_Q: Tensor) -> Tensor:
        """Float32 logits of some blocks, [Q, S]; −inf for what lies beyond the vocabulary."""
        num_ids = self.logits.shape[1]
        size = block_size(num_ids)
        if num_ids % size == 0:
            at_Q = row_Q * (num_ids // size) + block_Q
            return self.logits.view(-1, size).index_select(0, at_Q).float()
        id_QS = _ids(block_Q, size)
        at_QS = (row_Q * num_ids)[:, None] + id_QS.clamp(max=num_ids - 1)
        z_QS = self.logits.view(-1).index_select(0, at_QS.view(-1)).view(at_QS.shape).float()
        return z_QS.masked_fill_(id_QS >= num_ids, -torch.inf)


@dataclass(frozen=True)
class _Order:
    """The kept ids of C rows: row after row, likeliest first, ties by id."""

    count: Tensor
    """[C]"""
    row: Tensor
    """[E]"""
    ids: Tensor
    """[E]"""
    logit: Tensor
    """[E]"""
    at: Tensor
    """[E] where they lie in the blocks that were looked into."""

    def take(self, count_C: Tensor, own_E: Tensor) -> "_Order":
        """Some of them, by index or mask."""
        x = (x[own_E] for x in (self.row, self.ids, self.logit, self.at))
        return _Order(count_C, *x)

    def left_out(self, z_QS: Tensor, id_QS: Tensor, row_Q: Tensor) -> Tensor:
        """Logits of any blocks, −inf where an id is kept: up to the last kept one of its row."""
        end_C = torch.where(self.count > 0, self.count.cumsum(0) - 1, len(self.row))
        logit_Q1 = pad(self.logit, (0, 1), value=torch.inf)[end_C][row_Q, None]
        id_Q1 = pad(self.ids, (0, 1))[end_C][row_Q, None]
        kept_QS = (z_QS == logit_Q1).logical_and_(id_QS <= id_Q1).logical_or_(z_QS > logit_Q1)
        return z_QS.masked_fill(kept_QS, -torch.inf)


def chunk_elements(device: torch.device) -> int:
    """Logits worked on at once on a device."""
    return CHUNK_ELEMENTS if device.type == "cpu" else DEVICE_CHUNK_ELEMENTS


def tile_elements(device: torch.device) -> int:
    """Logits that a pass over the vocabulary takes at once."""
    return TILE_ELEMENTS if device.type == "cpu" else DEVICE_CHUNK_ELEMENTS


def block_size(vocab_size: int) -> int:
    """S: about half the root of V, so that blocks are few and looking into one costs little."""
    return max(LEAST_BLOCK, 1 << max(0, (vocab_size.bit_length() - 1) // 2 - 1))


def _ids(block_Q: Tensor, size: int) -> Tensor:
    """[Q, S] the ids of some blocks."""
    return (block_Q * size)[:, None] + torch.arange(size, device=block_Q.device)


def truncate(logits_NV: Tensor, token_N: Tensor, *, rule: Rule, uniform_NM: Tensor) -> Kept:
    """Keep of every row what the rule says; `uniform_NM` [N, ≥ tail_samples] float64 in [0, 1)."""
    num_ids = logits_NV.shape[1]
    size = block_size(num_ids)
    widest = max(-(-num_ids // size), rule.tail_samples) * size
    rows = max(1, chunk_elements(logits_NV.device) // widest)
    chunks = [
        _truncate(logits, token, rule, uniform)
        for logits, token, uniform in zip(
            logits_NV.split(rows), token_N.split(rows), uniform_NM.split(rows), strict=True
        )
    ]
    names = [field.name for field in fields(Kept)]
    return Kept(**{name: torch.cat([getattr(chunk, name) for chunk in chunks]) for name in names})


def sample_count(tail_logp_mass_N: Tensor, rule: Rule) -> Tensor:
    """[N] int64: ceil(tail_samples · min(1, r / tail_full_mass)); 0 where r < tail_min_mass."""
    mass_N = tail_logp_mass_N.double().exp()
    share_N = (mass_N / rule.tail_full_mass).clamp(max=1.0)
    count_N = (rule.tail_samples * share_N).ceil().long()
    return torch.where(mass_N >= max(rule.tail_min_mass, LEAST_MASS), count_N, 0)


def _truncate(logits_CV: Tensor, token_C: Tensor, rule: Rule, uniform_CM: Tensor) -> Kept:
    blocks, lse_C, entropy_C = _summarise(logits_CV.contiguous())
    kept, tail = _select(blocks, lse_C, rule)
    top_C1, mass_CB = tail.masses()
    # over the tail's own terms: 1 − Σ kept would keep only the rounding of a small tail
    tail_logp_mass_C = top_C1[:, 0] + mass_CB.sum(-1).log() - lse_C
    count_C = sample_count(tail_logp_mass_C, rule)
    row_M, tail_ids, z_M = _draw(tail, mass_CB, kept, count_C, uniform_CM)
    return Kept(
        kept=kept.count,
        ids=kept.ids,
        p=(kept.logit - lse_C[kept.row]).exp_().float(),
        token_logp=(logits_CV.gather(1, token_C[:, None])[:, 0] - lse_C).float(),
        tail_logp_mass=tail_logp_mass_C.float(),
        tail_kept=count_C,
        tail_ids=tail_ids,
        tail_logp=(z_M - lse_C[row_M]).float(),
        entropy=entropy_C.float(),
    )


def normaliser(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """[N] float64: log Σ exp z, and the entropy, which is finite only where all logits are."""
    _, lse_N, entropy_N = _summarise(logits_NV.contiguous())
    return lse_N, entropy_N


def _summarise(logits_CV: Tensor) -> tuple[_Blocks, Tensor, Tensor]:
    """The pass over the vocabulary: blocks, log Σ exp z and entropy of each row."""
    num_rows, num_ids = logits_CV.shape
    size = block_size(num_ids)
    shape = (num_rows, -(-num_ids // size))
    peak, total, moment = (logits_CV.new_empty(shape, dtype=torch.float32) for _ in range(3))
    rows = min(num_rows, max(1, tile_elements(logits_CV.device) // num_ids))
    # fresh memory for every tile would cost more than its arithmetic
    off, power = (logits_CV.new_empty((rows, num_ids), dtype=torch.float32) for _ in range(2))
    for first in range(0, num_rows, max(1, rows)):
        z_TV = logits_CV[first : first + rows]
        off_TV, power_TV = off[: len(z_TV)], power[: len(z_TV)]
        if z_TV.dtype != torch.float32:
            z_TV = off_TV.copy_(z_TV)
        views = zip(*(_cut(x, size) for x in (z_TV, off_TV, power_TV)), strict=True)
        done = 0
        for z_TBS, off_TBS, power_TBS in views:
            at = (slice(first, first + rows), slice(done, done + z_TBS.shape[1]))
            done += z_TBS.shape[1]
            peak_TB = z_TBS.amax(-1)
            torch.sub(z_TBS, peak_TB[..., None], out=off_TBS).mul_(1 / math.log(2))
            peak[at] = peak_TB
            total[at] = torch.exp2(off_TBS, out=power_TBS).sum(-1)  # twice as fast as exp
            moment[at] = off_TBS.mul_(power_TBS).sum(-1)
    blocks = _Blocks(logits_CV, peak, total)
    top_C1, mass_CB = blocks.masses()
    total_C = mass_CB.sum(-1)
    off_CB = peak.double() - top_C1
    # Σ (z − top) exp(z − top); 0 · −inf is no number, so that no logit of −inf goes unseen
    mean_C = (off_CB.exp().mul_(moment).mul_(math.log(2)) + off_CB * mass_CB).sum(-1) / total_C
    return blocks, top_C1[:, 0] + total_C.log(), total_C.log() - mean_C


def _cut(x_TV: Tensor, size: int) -> list[Tensor]:
    """[T, B, S] the whole blocks of some rows, and [T, 1, …] the last one where it is short."""
    num_rows, num_ids = x_TV.shape
    even = num_ids // size * size
    parts = [x_TV[:, :even].view(num_rows, -1, size)] if even else []
    return parts + ([x_TV[:, None, even:]] if even < num_ids else [])


def _select(blocks: _Blocks, lse_C: Tensor, rule: Rule) -> tuple[_Order, _Blocks]:
    """What is kept, and the blocks without it."""
    bar_C1 = _bar(blocks, lse_C, rule)
    row_Q, block_Q = (blocks.peak >= bar_C1).nonzero().unbind(-1)
    z_QS = blocks.look(row_Q, block_Q)
    at_E = (z_QS >= bar_C1[row_Q]).view(-1).nonzero()[:, 0]
    q_E, size = at_E // z_QS.shape[1], z_QS.shape[1]
    row_E, z_E = row_Q[q_E], z_QS.view(-1)[at_E]
    # bincount would ask a device for the largest row, and wait for the answer
    count_C = row_E.new_zeros(len(lse_C)).scatter_add_(0, row_E, torch.ones_like(row_E))
    found = _Order(count_C, row_E, block_Q[q_E] * size + at_E % size, z_E, at_E)
    # nonzero ascends and the sort is stable, so equal logits stay in the order of their ids
    order_E = ((row_E << 32) - _ascending(z_E)).argsort(stable=True)
    rank_E = torch.arange(len(row_E), device=row_E.device) - (count_C.cumsum(0) - count_C)[row_E]
    kept = found.take(count_C.clamp(max=rule.max_kept), order_E[rank_E < rule.max_kept])
    if rule.top_p is not None:
        kept = _nucleus(kept, lse_C, rule.top_p)
    z_QS.view(-1).index_fill_(0, kept.at, -torch.inf)
    peak_Q = z_QS.amax(-1)
    total_Q = z_QS.sub_(torch.where(peak_Q.isneginf(), 0.0, peak_Q)[:, None]).exp_().sum(-1)
    at_Q = row_Q * blocks.peak.shape[1] + block_Q
    peak = blocks.peak.view(-1).index_copy(0, at_Q, peak_Q).view(blocks.peak.shape)
    total = blocks.total.view(-1).index_copy(0, at_Q, total_Q).view(blocks.total.shape)
    return kept, _Blocks(blocks.logits, peak, total)


def _bar(blocks: _Blocks, lse_C: Tensor, rule: Rule) -> Tensor:
    """[C, 1] float32: what a logit must reach to be kept; more than max_kept may reach it.

    A threshold alone cuts most ids away; without one the max_kept-th largest logit does, or the
    max_kept-th largest of the peaks, which is no larger. The rest is cut by rank.
    """
    if rule.min_prob > 0:
        exact_C1 = (lse_C + math.log(rule.min_prob))[:, None]
        bar_C1 = exact_C1.float()  # and up to the next one where that is below
        above_C1 = torch.nextafter(bar_C1, torch.full_like(bar_C1, torch.inf))
        return torch.where(bar_C1 < exact_C1, above_C1, bar_C1)
    num = min(rule.max_kept, blocks.logits.shape[1])
    among = blocks.peak if num <= blocks.peak.shape[1] else blocks.logits.float()
    return among.topk(num, sorted=False).values.amin(-1, keepdim=True)


def _ascending(z: Tensor) -> Tensor:
    """Integers of 32 bits, as int64, in the order of the float32 numbers."""
    bits = (z + 0.0).view(torch.int32).long()  # −0 becomes 0, which it equals
    return bits ^ ((bits >> 63) & 0x7FFFFFFF)


def _nucleus(kept: _Order, lse_C: Tensor, top_p: float) -> _Order:
    """Of rows cut to their likeliest ids: those before which less than top_p was counted."""
    most = int(kept.count.max()) if len(kept.count) else 0
    inside_CK = torch.arange(most, device=lse_C.device) < kept.count[:, None]
    p_CK = lse_C.new_zeros(inside_CK.shape)
    p_CK[inside_CK] = (kept.logit - lse_C[kept.row]).exp_()
    # row by row, so that no sum depends on what else is in the chunk; what is masked adds 0
    within_CK = inside_CK & (p_CK.cumsum(-1) - p_CK < top_p)
    return kept.take(within_CK.sum(-1), within_CK[inside_CK])


def _draw(
    tail: _Blocks, mass_CB: Tensor, kept: _Order, count_C: Tensor, uniform_CM: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, ids and logits [M] drawn by inverse CDF; row c draws count_C[c] from what is left.

    One uniform finds the block, and what is left of it, rescaled, the id within.
    """
    asked_CM = torch.arange(uniform_CM.shape[1], device=count_C.device) < count_C[:, None]
    row_M, draw_M = asked_CM.nonzero().unbind(-1)
    cdf_CB = mass_CB.cumsum(-1)
    total_C1 = cdf_CB[:, -1:].contiguous()
    wanted_CM = uniform_CM.to(cdf_CB) * total_C1
    # the first block whose cdf exceeds what is wanted: one with mass
    block_CM = torch.searchsorted(cdf_CB, wanted_CM, right=True)
    last_C1 = torch.searchsorted(cdf_CB, total_C1)
    block_M = torch.minimum(block_CM, last_C1)[row_M, draw_M]  # u · total may round up to total
    mass_M = mass_CB[row_M, block_M]
    share_M = (wanted_CM[row_M, draw_M] - (cdf_CB[row_M, block_M] - mass_M)) / mass_M
    share_M = share_M.clamp(min=0)  # the difference may cancel
    z_MS = tail.look(row_M, block_M)
    id_MS = _ids(block_M, z_MS.shape[1])
    z_MS = kept.left_out(z_MS, id_MS, row_M)
    cdf_MS = (z_MS - tail.peak[row_M, block_M, None]).exp_().cumsum(-1, dtype=torch.float64)
    # likewise within the block: the counts are those of ids before the wanted and the last one
    wanted_M1, total_M1 = share_M[:, None] * cdf_MS[:, -1:], cdf_MS[:, -1:]
    place_M = torch.minimum((cdf_MS <= wanted_M1).sum(-1), (cdf_MS < total_M1).sum(-1))[:, None]
    return row_M, id_MS.gather(1, place_M)[:, 0], z_MS.gather(1, place_M)[:, 0]
