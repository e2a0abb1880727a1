"""Logits of the target -> what the cache keeps of its law: ids by a rule, tail mass, samples.

Pure torch: randomness comes in as uniforms, rows do not know their sequences, and nothing is
rounded to the cache's codes here (`pipeline.teacher` does that). Each row's numbers depend on the
row alone, so neither batches nor workers change them.

Three rules, one form: the likeliest ids, as long as p >= min_prob (absolute threshold), as long as
those before an id hold less than top_p (nucleus), and no more than max_kept (with neither of the
two: fixed K). Equal logits go by id. Memory: whatever N is, nothing in float32 or wider has more
than `chunk_elements` numbers, or V where that is more.

Dims: N rows, V vocabulary, E kept entries and M tail samples of all rows together, C rows of a
chunk. Source: DESIGN §5; the tail's estimator is MATHS' and Anshumann et al. 2025's (sampled KD).
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

# Rows are worked on in chunks of this many logits (4 MB in float32): the dozen passes over a chunk
# then stay near the core (1.5-2 times faster than in chunks of 16 MB), and a chunk's float64 copy
# stays small whatever V is.
CHUNK_ELEMENTS = 1 << 20
# An accelerator starts some 40 kernels a chunk: 256 MB of float32 (512 rows of V = 131,072) keep it
# longer than its launches do, for a few such copies of memory. Chosen by that count, not measured.
DEVICE_CHUNK_ELEMENTS = 1 << 26
# A tail lighter than this is not sampled even if the rule would: its float32 terms may all be 0.
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
    """[N] nats."""


def first_bad_row(logits_NV: Tensor) -> int | None:
    """The first row that holds NaN or an infinity, or None."""
    # a sum is finite only if all its terms are: one pass and no [N, V] mask
    bad_N = ~logits_NV.sum(-1, dtype=torch.float32).isfinite()
    return int(bad_N.nonzero()[0]) if bool(bad_N.any()) else None


def chunk_elements(device: torch.device) -> int:
    """Logits worked on at once on a device."""
    return CHUNK_ELEMENTS if device.type == "cpu" else DEVICE_CHUNK_ELEMENTS


def truncate(logits_NV: Tensor, token_N: Tensor, *, rule: Rule, uniform_NM: Tensor) -> Kept:
    """Keep of every row what the rule says; `uniform_NM` [N, ≥ tail_samples] float64 in [0, 1)."""
    rows = max(1, chunk_elements(logits_NV.device) // logits_NV.shape[1])
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
    logp_CV = torch.log_softmax(logits_CV.float(), -1)
    kept_C, at_E = _select(logp_CV, rule)
    tail_CV = logp_CV.clone()
    tail_CV.view(-1).index_fill_(0, at_E, -torch.inf)
    # over the tail's own terms: 1 − Σ kept would keep only the rounding of a small tail
    tail_logp_mass_C = torch.logsumexp(tail_CV, -1)
    count_C = sample_count(tail_logp_mass_C, rule)
    p_CV = logp_CV.exp()
    entropy_C = -(p_CV * logp_CV).sum(-1)
    p_E = p_CV.view(-1).index_select(0, at_E)
    p_CV.view(-1).index_fill_(0, at_E, 0.0)
    tail_ids = _draw(p_CV, count_C, uniform_CM)
    owner_M = torch.repeat_interleave(count_C)
    num_ids = logp_CV.shape[1]
    return Kept(
        kept=kept_C,
        ids=at_E % num_ids,
        p=p_E,
        token_logp=logp_CV.gather(1, token_C[:, None])[:, 0],
        tail_logp_mass=tail_logp_mass_C,
        tail_kept=count_C,
        tail_ids=tail_ids,
        tail_logp=logp_CV.view(-1).index_select(0, owner_M * num_ids + tail_ids),
        entropy=entropy_C,
    )


def _select(logp_CV: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Counts [C], and what is kept as row · V + id [E]: by row, likeliest first, ties by id."""
    at_E = (logp_CV >= _least(logp_CV, rule)).view(-1).nonzero()[:, 0]
    row_E = at_E // logp_CV.shape[1]
    cost_E = (0.0 - logp_CV.view(-1).index_select(0, at_E)).clamp(min=0.0)
    # the bits of a float32 that is not negative ascend with it, so one sort orders rows and values;
    # it is stable and nonzero ascends, so equal values stay in the order of their ids
    order_E = ((row_E << 32) | cost_E.view(torch.int32)).argsort(stable=True)
    count_C = torch.bincount(row_E, minlength=len(logp_CV))
    rank_E = torch.arange(len(row_E), device=row_E.device) - (count_C.cumsum(0) - count_C)[row_E]
    kept_C = count_C.clamp(max=rule.max_kept)
    at_E = at_E[order_E[rank_E < rule.max_kept]]
    return (kept_C, at_E) if rule.top_p is None else _nucleus(logp_CV, kept_C, at_E, rule.top_p)


def _least(logp_CV: Tensor, rule: Rule) -> Tensor:
    """[C or 1, 1] the smallest log p that may be kept: of the threshold, or of the max_kept-th id.

    A threshold alone cuts most ids away; without one the max_kept-th likeliest of a row does. What
    ties with it is cut by rank, later, where ties go by id.
    """
    if rule.min_prob > 0:
        threshold = torch.tensor([[rule.min_prob]], dtype=torch.float64).log()
        return threshold.to(logp_CV)
    num = min(rule.max_kept, logp_CV.shape[1])
    return logp_CV.topk(num, sorted=False).values.amin(-1, keepdim=True)


def _nucleus(logp_CV: Tensor, kept_C: Tensor, at_E: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Of rows cut to their likeliest ids: those before which less than top_p was counted."""
    most = int(kept_C.max()) if len(kept_C) else 0
    p_CK = logp_CV.new_zeros(len(kept_C), most, dtype=torch.float64)
    inside_CK = torch.arange(most, device=kept_C.device) < kept_C[:, None]
    p_CK[inside_CK] = logp_CV.view(-1).index_select(0, at_E).double().exp()
    # row by row, so that no sum depends on what else is in the chunk; what is masked adds 0
    before_CK = p_CK.cumsum(-1) - p_CK
    within_CK = inside_CK & (before_CK < top_p)
    return within_CK.sum(-1), at_E[within_CK[inside_CK]]


def _draw(tail_CV: Tensor, count_C: Tensor, uniform_CM: Tensor) -> Tensor:
    """[M] ids drawn by inverse CDF, in float64; row c draws count_C[c] from p, 0 where kept."""
    some = count_C.nonzero()[:, 0]
    if not len(some):
        return count_C.new_zeros(0)
    if len(some) < len(count_C):
        tail_CV, count_C, uniform_CM = tail_CV[some], count_C[some], uniform_CM[some]
    most = int(count_C.max())
    cdf_CV = tail_CV.cumsum(-1, dtype=torch.float64)
    total_C1 = cdf_CV[:, -1:].contiguous()
    wanted_CM = uniform_CM[:, :most].to(cdf_CV) * total_C1
    # the first id whose cdf exceeds what is wanted: one with a positive term, never a kept one
    id_CM = torch.searchsorted(cdf_CV, wanted_CM, right=True)
    last_C1 = torch.searchsorted(cdf_CV, total_C1)
    id_CM = torch.minimum(id_CM, last_C1)  # u · total may round up to total
    asked_CM = torch.arange(most, device=count_C.device) < count_C[:, None]
    return id_CM[asked_CM]
