"""lo ≤ exact α, KL ≤ hi for any laws, truncations and encodings; equal where everything is kept."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.bounds import bounds, distance, estimate_slack, kl_bounds
from pipeline.dataset import collate
from pipeline.law import DenseLaw, SparseLaw
from pipeline.teacher import encode
from pipeline.terms import terms
from pipeline.topk import Rule, truncate
from storage.codecs import BFLOAT_STEP, LEVELS, bf16_bits, decode_p, encode_p, from_bf16_bits
from storage.layout import Layout
from storage.record import Record

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


def exact_kl(logits_NV: Tensor, p_NV: np.ndarray, d2t: Tensor | None = None) -> Tensor:
    logq = logits_NV.double().log_softmax(-1)
    p = torch.tensor(p_NV) if d2t is None else torch.tensor(p_NV)[:, d2t]
    mass = p.sum(-1, keepdim=True)
    p = torch.where(mass > 0, p / mass, 0.0)
    # of equal laws it may fall below 0 by its own rounding
    return (torch.xlogy(p, p) - p * logq).sum(-1).clamp(min=0)


def shaped_laws(seed: int, width: int, shape: str) -> np.ndarray:
    """[4, width] of one kind: what a sharpness alone does not reach."""
    rng = np.random.default_rng(seed)
    p = np.full((4, width), 1e-9) + random_laws(seed, 4, width, 1.0) * 1e-9
    if shape == "uniform":
        p[:] = 1.0
    elif shape == "one-hot":
        p[:] = 0.0
        p[np.arange(4), rng.integers(0, width, 4)] = 1.0
    elif shape == "two ids":
        p[:, rng.integers(0, width)] = 0.5
        p[:, rng.integers(0, width)] = 0.5
    elif shape == "near-deterministic":
        p[np.arange(4), rng.integers(0, width, 4)] = 1.0
    elif shape == "half of the ids impossible":
        p = random_laws(seed, 4, width, 2.0) * (rng.random((4, width)) < 0.5)
        p[:, 0] += 0.1
    normed: np.ndarray = p / p.sum(-1, keepdims=True)
    return normed


SHAPES = ["uniform", "one-hot", "two ids", "near-deterministic", "half of the ids impossible"]


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


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(2, 60),
    sharpness=st.floats(0, 12),
    draft_sharpness=st.floats(0, 12),
    likeness=st.floats(0, 1),
    coded=st.booleans(),
    pruned=st.booleans(),
    half=st.booleans(),
    data=st.data(),
)
def test_kl_lies_within_its_bounds(
    seed: int,
    width: int,
    sharpness: float,
    draft_sharpness: float,
    likeness: float,
    coded: bool,
    pruned: bool,
    half: bool,
    data: st.DataObject,
) -> None:
    p = random_laws(seed, 4, width, sharpness)
    num_kept = data.draw(st.lists(st.integers(0, width), min_size=4, max_size=4))
    law = truncated(p, num_kept, coded=coded)
    z = torch.tensor(np.log(random_laws(seed + 1, 4, width, draft_sharpness) + 1e-30))
    z = likeness * torch.tensor(np.log(p + 1e-30)) + (1 - likeness) * z
    z = z.to(torch.bfloat16 if half else torch.float32)
    d2t = torch.arange(seed % 2, width, 2) if pruned else None
    x = z if d2t is None else z[:, d2t]
    lo, hi = kl_bounds(x, law, d2t=d2t)
    kl = exact_kl(x, p, d2t)
    assert (lo <= kl).all(), (lo, kl)
    assert (kl <= hi).all(), (kl, hi)
    assert (lo >= 0).all()
    assert hi.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(2, 60),
    shape=st.sampled_from(SHAPES),
    draft=st.sampled_from([*SHAPES, "random"]),
    coded=st.booleans(),
    pruned=st.booleans(),
    data=st.data(),
)
def test_laws_of_many_shapes_lie_within_their_bounds(
    seed: int,
    width: int,
    shape: str,
    draft: str,
    coded: bool,
    pruned: bool,
    data: st.DataObject,
) -> None:
    p = shaped_laws(seed, width, shape)
    num_kept = data.draw(st.lists(st.integers(0, width), min_size=4, max_size=4))
    q = (
        random_laws(seed + 1, 4, width, 3.0)
        if draft == "random"
        else shaped_laws(seed, width, draft)
    )
    z = torch.tensor(np.log(q + 1e-12), dtype=torch.float32)
    d2t = torch.arange(seed % 2, width, 2) if pruned else None
    x = z if d2t is None else z[:, d2t]
    with np.errstate(divide="ignore"):
        dense = DenseLaw(torch.tensor(np.log(p), dtype=torch.float32))
    for law in (truncated(p, num_kept, coded=coded), dense):
        for found, exact in (
            (bounds(x, law, d2t=d2t), exact_alpha(x, p, d2t)),
            (kl_bounds(x, law, d2t=d2t), exact_kl(x, p, d2t)),
        ):
            assert (found[0] <= exact).all(), (found[0], exact)
            assert (exact <= found[1]).all(), (exact, found[1])


@pytest.mark.parametrize("pruned", [False, True])
def test_kl_bounds_meet_where_everything_is_kept(pruned: bool) -> None:
    p = random_laws(0, 20, 50, 2.0)
    z = torch.tensor(random_laws(1, 20, 50, 2.0)).log()
    d2t = torch.arange(0, 50, 3) if pruned else None
    x = z if d2t is None else z[:, d2t]
    exact = exact_kl(x, p, d2t)
    for law in (truncated(p, [50] * 20, coded=False), DenseLaw(torch.tensor(p).log())):
        for end in kl_bounds(x, law, d2t=d2t):
            torch.testing.assert_close(end, exact, rtol=0, atol=5e-5)


def test_a_close_draft_is_told_from_the_target_through_the_codes() -> None:
    # the known sum of all cells leaves only Σ e_v |log(p/q) − mean|: second order where q ≈ p
    p = random_laws(2, 20, 50, 1.5)
    z = torch.tensor(p).log() + 0.02 * torch.tensor(random_laws(3, 20, 50, 1.0)).log()
    lo, hi = kl_bounds(z, truncated(p, [50] * 20, coded=True))
    cells = torch.tensor(2 * np.sqrt(p).sum(-1) * STEP)
    assert ((hi - lo) < 0.1 * cells).all()


def attained(p_V: np.ndarray, q_V: np.ndarray, num_kept: int) -> dict[str, np.ndarray]:
    """Laws that the stored row may stand for as well, at which an end is reached; slowly."""
    order = np.argsort(-p_V, kind="stable")
    kept, rest = order[:num_kept], order[num_kept:]
    cap, tail = float(p_V[kept].min()), float(p_V[rest].sum())
    worst, left = p_V.copy(), tail
    for v in sorted(rest, key=lambda v: q_V[v]):  # the cap on what the draft likes least
        worst[v] = min(cap, left)
        left -= worst[v]
    best, t = p_V.copy(), np.linspace(0, 60, 600_001)
    scales = tail / q_V[rest].sum() * np.exp(t)
    lo, hi = 0, len(t) - 1
    while hi - lo > 1:  # the cap on what it likes most, in proportion below
        middle = (lo + hi) // 2
        below = np.minimum(cap, scales[middle] * q_V[rest]).sum() < tail
        lo, hi = (middle, hi) if below else (lo, middle)
    best[rest] = np.minimum(cap, scales[lo] * q_V[rest])
    like = p_V.copy()
    share = np.minimum(cap, q_V[rest])
    like[rest] = share * min(1.0, tail / share.sum())
    spare = tail - like[rest].sum()
    for v in rest:
        add = min(cap - like[v], spare)
        like[v] += add
        spare -= add
    return {"worst": worst, "best": best, "like": like}


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 4.0])
def test_the_ends_are_attained_by_laws_that_the_row_may_stand_for(sharpness: float) -> None:
    p = random_laws(9, 12, 40, 2.0)
    z = torch.tensor(random_laws(10, 12, 40, sharpness)).log()
    q = z.softmax(-1).numpy()
    law = truncated(p, [8] * 12, coded=False)
    lo, hi = kl_bounds(z, law)
    most = bounds(z, law)[1]
    found = [attained(p_V, q_V, 8) for p_V, q_V in zip(p, q, strict=True)]
    stack = {name: np.stack([f[name] for f in found]) for name in found[0]}
    np.testing.assert_allclose(stack["worst"].sum(-1), 1, rtol=1e-9)
    torch.testing.assert_close(hi, exact_kl(z, stack["worst"]), rtol=0, atol=2e-4)
    torch.testing.assert_close(lo, exact_kl(z, stack["best"]), rtol=0, atol=2e-4)
    torch.testing.assert_close(most, exact_alpha(z, stack["like"]), rtol=0, atol=1e-5)


def test_the_tails_ends_are_within_the_plain_ones() -> None:
    # DESIGN §5: r log(r/q(tail)) ≤ KL_tail ≤ r (log min(r, c) − min log q)
    p = random_laws(11, 30, 200, 2.0)
    z = torch.tensor(random_laws(12, 30, 200, 2.0)).log()
    lo, hi = kl_bounds(z, truncated(p, [8] * 30, coded=False))
    logq = z.log_softmax(-1)
    top = torch.tensor(p).topk(8)
    p_kept, logq_kept = top.values, logq.gather(1, top.indices)
    head = (p_kept * (p_kept.log() - logq_kept)).sum(-1)
    r = 1 - p_kept.sum(-1)
    logq_tail = logq.scatter(1, top.indices, -torch.inf)
    least = logq.scatter(1, top.indices, torch.inf).amin(-1)
    plain_lo = head + r * (r.log() - logq_tail.logsumexp(-1))
    plain_hi = head + r * (torch.minimum(r, p_kept[:, -1]).log() - least)
    assert (lo >= plain_lo - 1e-4).all()
    assert (lo > plain_lo + 0.01).any()
    assert (hi <= plain_hi + 1e-4).all()
    assert (hi < plain_hi - 0.1).any()


@pytest.mark.parametrize("pruned", [False, True])
def test_rounded_full_rows_are_bounded_by_their_cells(pruned: bool) -> None:
    p = random_laws(13, 50, 80, 3.0)
    stored = torch.tensor(from_bf16_bits(bf16_bits(np.log(p).astype(np.float32))))
    law = DenseLaw(
        stored.log_softmax(-1), log_mass=stored.logsumexp(-1), logp_step=BFLOAT_STEP
    ).take(torch.arange(50))
    z = torch.tensor(random_laws(14, 50, 80, 3.0)).log()
    d2t = torch.arange(0, 80, 2) if pruned else None
    x = z if d2t is None else z[:, d2t]
    for found, exact in (
        (bounds(x, law, d2t=d2t), exact_alpha(x, p, d2t)),
        (kl_bounds(x, law, d2t=d2t), exact_kl(x, p, d2t)),
    ):
        assert (found[0] <= exact).all()
        assert (exact <= found[1]).all()
        assert (found[1] - found[0] < 0.2).all()
        assert (found[1] - found[0] > 1e-4).any()


def test_kl_of_a_wide_vocabulary_stays_bounded_in_float32() -> None:
    p = random_laws(7, 3, 100_000, 3.0)
    z = torch.tensor(random_laws(8, 3, 100_000, 3.0)).log().float() + 30
    for num in (64, 100_000):
        lo, hi = kl_bounds(z, truncated(p, [num] * 3, coded=False))
        kl = exact_kl(z, p)
        assert ((lo <= kl) & (kl <= hi)).all(), (lo, kl, hi)
    assert ((hi - lo) < 1e-4).all()


ROWS, WIDTH = 100_000, 64
RULE = Rule(min_prob=0.02, max_kept=12, tail_samples=8, tail_full_mass=0.05, tail_min_mass=1e-4)


@pytest.fixture(scope="module")
def audit() -> tuple[Tensor, Tensor, SparseLaw]:
    """100,000 rows as capture stores them and training reads them; target and draft logits."""
    noise = torch.Generator().manual_seed(1)
    sharp = torch.rand(ROWS, 1, generator=noise) * 4 + 0.5
    z = torch.randn(ROWS, WIDTH, generator=noise) * sharp
    draft = 0.85 * z + 0.7 * torch.randn(ROWS, WIDTH, generator=noise)
    uniform = torch.rand(ROWS, RULE.tail_samples, dtype=torch.float64, generator=noise)
    kept = truncate(z, torch.zeros(ROWS, dtype=torch.int64), rule=RULE, uniform_NM=uniform)
    columns = encode({name: value.numpy() for name, value in vars(kept).items()})
    columns.pop("entropy")
    for name in ("token_logp", "kept", "tail_logp_mass", "tail_kept"):
        columns[name] = np.append(columns[name], columns[name].dtype.type(0))
    record = Record(
        id="audit",
        domain="",
        tokens=np.zeros(ROWS + 1, np.uint32),
        turn=np.zeros(ROWS + 1, np.int32),
        **columns,
    )
    law = collate([record], Layout("topk", WIDTH, 8, (), False)).law
    assert isinstance(law, SparseLaw)
    return z, draft, law


def test_sampled_estimates_are_unbiased_over_a_hundred_thousand_tokens(
    audit: tuple[Tensor, Tensor, SparseLaw],
) -> None:
    z, draft, law = audit
    exact = terms(draft.double(), DenseLaw(z.double().log_softmax(-1)))
    (lo, hi), (kl_lo, kl_hi) = bounds(draft, law), kl_bounds(draft, law)
    slack = estimate_slack(draft, law, alpha_width_N=hi - lo, kl_width_N=kl_hi - kl_lo)
    slacks = reversed(slack)  # (alpha, kl), where terms has (kl, alpha)
    for estimate, truth, stated in zip(terms(draft, law), exact, slacks, strict=True):
        error = estimate - truth
        se = float(error.std()) / ROWS**0.5
        assert abs(float(error.mean())) <= 3 * se + float(stated.mean())
        assert abs(float(error.mean())) <= 5 * se + 1e-4  # far within the stated slack
        assert se < 1e-3


def test_every_one_of_a_hundred_thousand_intervals_covers_the_truth(
    audit: tuple[Tensor, Tensor, SparseLaw],
) -> None:
    z, draft, law = audit
    kl, alpha = terms(draft.double(), DenseLaw(z.double().log_softmax(-1)))
    for (lo, hi), truth in ((bounds(draft, law), alpha), (kl_bounds(draft, law), kl)):
        assert ((lo <= truth) & (truth <= hi)).all()


def test_a_captured_law_is_at_no_distance_from_its_row(
    audit: tuple[Tensor, Tensor, SparseLaw],
) -> None:
    z, _, law = audit
    logp = z[:2000].double().log_softmax(-1)
    assert float(distance(logp, law.take(torch.arange(2000))).max()) < 1e-6
    # half a percent of the mass moved from the likeliest id to the least likely one
    moved = logp.exp()
    moved.scatter_add_(1, logp.argmax(-1, keepdim=True), torch.full((2000, 1), -0.005).double())
    moved.scatter_add_(1, logp.argmin(-1, keepdim=True), torch.full((2000, 1), 0.005).double())
    off = distance(moved.log(), law.take(torch.arange(2000)))
    assert 0.005 < float(off.median()) < 0.02
    # a cell of mode `full` holds what was rounded to it, and no law of another row
    bits = torch.tensor(from_bf16_bits(bf16_bits(logp.float().numpy())))
    full = DenseLaw(bits.log_softmax(-1), log_mass=bits.logsumexp(-1), logp_step=BFLOAT_STEP)
    assert float(distance(logp, full).max()) < 1e-9
    assert float(distance(logp.roll(1, 0), full).median()) > 0.1


def test_a_biased_sampler_shows_in_the_audit(audit: tuple[Tensor, Tensor, SparseLaw]) -> None:
    # the merged tail, as if no row had samples: what the 3 standard errors are there to find
    z, draft, law = audit
    place = torch.arange(len(law.ids)) - law.entry_start[law.rows()]
    assert law.kept is not None
    assert law.tail is not None
    kept = place < law.kept[law.rows()]
    merged = SparseLaw(
        entry_start=torch.nn.functional.pad(law.kept.cumsum(0), (1, 0)),
        ids=law.ids[kept],
        p=law.p[kept],
        weight=law.weight[kept],
        bucket=law.tail,
    )
    alpha = terms(draft.double(), DenseLaw(z.double().log_softmax(-1)))[1]
    error = terms(draft, merged)[1] - alpha
    assert float(error.mean()) > 3 * float(error.std()) / ROWS**0.5 + 0.01
