"""lo ≤ exact α ≤ hi for any laws, truncations and encodings; equal where everything is kept."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.bounds import bounds
from pipeline.law import DenseLaw, SparseLaw
from storage.codecs import LEVELS, decode_p, encode_p

STEP = 1 / LEVELS


def truncated(
    p_NV: np.ndarray, num_kept: list[int], *, coded: bool, samples: int = 0, seed: int = 0
) -> SparseLaw:
    """The stored form of exact laws (float64): top ids, coded or not; tail mass; tail samples."""
    rng = np.random.default_rng(seed)
    start, ids, p, weight, tails = [0], [], [], [], []
    for p_V, num in zip(p_NV, num_kept, strict=True):
        order = np.argsort(-p_V, kind="stable")
        kept, rest = order[:num], order[num:]
        tail = p_V[rest].sum()
        values = p_V[kept]
        ids += [*kept]
        p += [*(decode_p(encode_p(values)) if coded else values)]
        weight += [1.0] * num
        if samples and tail > 0:
            draws = rng.choice(rest, samples, p=p_V[rest] / tail)
            ids += [*draws]
            p += [*p_V[draws]]
            weight += [*(tail / (samples * p_V[draws]))]
        start.append(len(ids))
        tails.append(tail)
    return SparseLaw(
        entry_start=torch.tensor(start),
        ids=torch.tensor(np.array(ids, dtype=np.int64)),
        p=torch.tensor(np.array(p, dtype=np.float32)),
        weight=torch.tensor(np.array(weight, dtype=np.float32)),
        bucket=torch.tensor(np.array([0.0 if samples else t for t in tails], dtype=np.float32)),
        kept=torch.tensor(num_kept),
        tail=torch.tensor(np.array(tails, dtype=np.float32)),
        p_step=STEP if coded else 0.0,
    )


def exact_alpha(logits_NV: Tensor, p_NV: np.ndarray, d2t: Tensor | None = None) -> Tensor:
    q = logits_NV.double().softmax(-1)
    p = torch.tensor(p_NV)
    # the sum of equal laws may exceed 1 by its own rounding
    return torch.minimum(p if d2t is None else p[:, d2t], q).sum(-1).clamp(max=1)


def random_laws(seed: int, num_rows: int, width: int, sharpness: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(num_rows, width)) * sharpness
    p = np.exp(z - z.max(-1, keepdims=True))
    normed: np.ndarray = p / p.sum(-1, keepdims=True)
    return normed


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(2, 60),
    sharpness=st.floats(0, 12),
    draft_sharpness=st.floats(0, 12),
    likeness=st.floats(0, 1),
    coded=st.booleans(),
    samples=st.sampled_from([0, 3]),
    pruned=st.booleans(),
    half=st.booleans(),
    data=st.data(),
)
def test_alpha_lies_within_its_bounds(
    seed: int,
    width: int,
    sharpness: float,
    draft_sharpness: float,
    likeness: float,
    coded: bool,
    samples: int,
    pruned: bool,
    half: bool,
    data: st.DataObject,
) -> None:
    p = random_laws(seed, 4, width, sharpness)
    num_kept = data.draw(st.lists(st.integers(0, width), min_size=4, max_size=4))
    law = truncated(p, num_kept, coded=coded, samples=samples, seed=seed)
    z = torch.tensor(np.log(random_laws(seed + 1, 4, width, draft_sharpness) + 1e-30))
    z = likeness * torch.tensor(np.log(p + 1e-30)) + (1 - likeness) * z
    z = z.to(torch.bfloat16 if half else torch.float32)
    d2t = torch.arange(seed % 2, width, 2) if pruned else None
    x = z if d2t is None else z[:, d2t]
    lo, hi = bounds(x, law, d2t=d2t)
    alpha = exact_alpha(x, p, d2t)
    assert (lo <= alpha).all(), (lo, alpha)
    assert (alpha <= hi).all(), (alpha, hi)
    assert (lo >= 0).all()
    assert (hi <= 1).all()


def test_bounds_meet_where_everything_is_kept() -> None:
    p = random_laws(0, 20, 50, 2.0)
    z = torch.tensor(random_laws(1, 20, 50, 2.0)).log()
    for law in (truncated(p, [50] * 20, coded=False), DenseLaw(torch.tensor(p).log())):
        lo, hi = bounds(z, law)
        torch.testing.assert_close(lo, exact_alpha(z, p), rtol=0, atol=5e-6)
        torch.testing.assert_close(hi, exact_alpha(z, p), rtol=0, atol=5e-6)


def test_coded_values_open_the_bounds_by_no_more_than_their_cells() -> None:
    # the cell of p is 2 · sqrt(p) / 1023 wide: Σ over 50 ids at most 2 · sqrt(50) / 1023
    p = random_laws(0, 20, 50, 2.0)
    lo, hi = bounds(torch.tensor(p).log(), truncated(p, [50] * 20, coded=True))
    assert ((hi - lo) < 2 * 50**0.5 * STEP).all()


@pytest.mark.parametrize("samples", [0, 5])
def test_a_truncated_row_is_between_its_overlap_and_the_merged_tail(samples: int) -> None:
    # DESIGN §5: α_lo ≤ α ≤ α_lo + min(r, q(tail)); ours may be tighter, never wider
    p = random_laws(3, 30, 200, 2.0)
    z = torch.tensor(random_laws(4, 30, 200, 2.0)).log()
    lo, hi = bounds(z, truncated(p, [8] * 30, coded=False, samples=samples))
    q = z.softmax(-1)
    kept = torch.tensor(p).topk(8).indices
    p_kept, q_kept = torch.tensor(p).gather(1, kept), q.gather(1, kept)
    overlap = torch.minimum(p_kept, q_kept).sum(-1)
    merged = torch.minimum(1 - p_kept.sum(-1), 1 - q_kept.sum(-1))
    torch.testing.assert_close(lo, overlap, rtol=1e-5, atol=1e-7)
    assert (hi <= overlap + merged + 1e-5).all()
    assert (hi < overlap + merged - 0.02).any()  # the cap on a tail id's p is worth something


def test_samples_prove_nothing() -> None:
    p = random_laws(5, 10, 40, 2.0)
    z = torch.tensor(random_laws(6, 10, 40, 2.0)).log()
    with_samples = bounds(z, truncated(p, [4] * 10, coded=True, samples=6))
    without = bounds(z, truncated(p, [4] * 10, coded=True))
    for a, b in zip(with_samples, without, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_law_that_cannot_tell_kept_from_drawn_is_not_bounded() -> None:
    p = random_laws(5, 2, 10, 2.0)
    law = truncated(p, [4, 4], coded=False)
    blind = SparseLaw(law.entry_start, law.ids, law.p, law.weight, law.bucket)
    with pytest.raises(AssertionError, match="proves nothing"):
        bounds(torch.zeros(2, 10), blind)


def test_a_wide_vocabulary_stays_bounded_in_float32() -> None:
    p = random_laws(7, 4, 100_000, 3.0)
    z = torch.tensor(random_laws(8, 4, 100_000, 3.0)).log().float() + 30
    lo, hi = bounds(z, truncated(p, [64] * 4, coded=True))
    alpha = exact_alpha(z, p)
    assert ((lo <= alpha) & (alpha <= hi)).all()
    full = truncated(p, [100_000] * 4, coded=False)
    lo, hi = bounds(z, full)
    assert ((lo <= alpha) & (alpha <= hi)).all()
    assert ((hi - lo) < 1e-5).all()
