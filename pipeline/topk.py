"""Logits of the target -> what the cache keeps of its law: ids by threshold, tail mass, samples.

Pure torch: randomness comes in as uniforms, rows do not know their sequences, and nothing is
rounded to the cache's codes here (`pipeline.capture` does that). Each row's numbers depend on the
row alone, so neither batches nor workers change them.

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
# A tail lighter than this is not sampled even if the rule would: its float32 terms may all be 0.
LEAST_MASS = 1e-30


@dataclass(frozen=True)
class Rule:
    """What is kept of a row."""

    min_prob: float
    """Every id with p ≥ min_prob is kept …"""
    max_kept: int
    """… but no more than this many, the likeliest ones."""
    tail_samples: int
    """Samples of a tail of at least `tail_full_mass`; fewer in proportion below …"""
    tail_full_mass: float
    tail_min_mass: float
    """… and none where the tail's mass is less than this."""


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


def truncate(logits_NV: Tensor, token_N: Tensor, *, rule: Rule, uniform_NM: Tensor) -> Kept:
    """Keep of every row what the rule says; `uniform_NM` [N, ≥ tail_samples] float64 in [0, 1)."""
    rows = max(1, CHUNK_ELEMENTS // logits_NV.shape[1])
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
    threshold = torch.tensor(rule.min_prob, dtype=torch.float64).log()
    at_E = (logp_CV.view(-1) >= threshold.to(logp_CV)).nonzero()[:, 0]
    row_E = at_E // logp_CV.shape[1]
    cost_E = (0.0 - logp_CV.view(-1).index_select(0, at_E)).clamp(min=0.0)
    # the bits of a float32 that is not negative ascend with it, so one sort orders rows and values;
    # it is stable and nonzero ascends, so equal values stay in the order of their ids
    order_E = ((row_E << 32) | cost_E.view(torch.int32)).argsort(stable=True)
    count_C = torch.bincount(row_E, minlength=len(logp_CV))
    rank_E = torch.arange(len(row_E), device=row_E.device) - (count_C.cumsum(0) - count_C)[row_E]
    kept_C = count_C.clamp(max=rule.max_kept)
    return kept_C, at_E[order_E[rank_E < rule.max_kept]]


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
