"""Served laws against a slow version on full ones: equal where exact, else within their ends."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.law import DenseLaw, SparseLaw
from pipeline.serve import Serving, serve_logits
from pipeline.serving import Served, serve
from pipeline.terms import terms
from tests.pipeline.test_bounds import exact_alpha, random_laws, truncated


def serving(t: float = 1.0, k: int | None = None, p: float | None = None) -> Serving:
    return Serving(temperature=t, top_k=k, top_p=p)


def slowly(p_V: np.ndarray, how: Serving) -> np.ndarray:
    """One law served, step by step: temperature, top-k, top-p; ties go to the lower id."""
    ranked = sorted(range(len(p_V)), key=lambda v: (-p_V[v], v))
    if how.temperature == 0:
        return np.eye(len(p_V))[ranked[0]]
    with np.errstate(divide="ignore"):
        scaled = np.log(p_V) / how.temperature
    w = np.exp(scaled - scaled.max())
    if how.top_k is not None:
        for v in ranked[how.top_k :]:
            w[v] = 0.0
    w /= w.sum()
    if how.top_p is not None and how.top_p < 1:
        mass, nucleus = 0.0, []
        for v in ranked:
            nucleus.append(v)
            mass += w[v]
            if mass >= how.top_p:
                break
        w = np.where(np.isin(np.arange(len(w)), nucleus), w, 0.0)
    out: np.ndarray = w / w.sum()
    return out


def dense_of(law: SparseLaw, width: int) -> np.ndarray:
    """[R, V] the sum of weight · p at each id."""
    out = np.zeros((law.num_rows, width))
    value = (law.weight.double() * law.p.double()).numpy()
    np.add.at(out, (law.rows().numpy(), law.ids.numpy()), value)
    return out


HOW = st.builds(
    serving,
    st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.0, 1.4, 3.0]),
    st.none() | st.integers(1, 30),
    st.none() | st.floats(0.05, 1.0),
)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(2, 30),
    sharpness=st.floats(0, 8),
    how=HOW,
    drafted=HOW,
    coded=st.booleans(),
    samples=st.sampled_from([0, 3]),
    pruned=st.booleans(),
    data=st.data(),
)
def test_a_served_row_is_what_its_flag_says(
    seed: int,
    width: int,
    sharpness: float,
    how: Serving,
    drafted: Serving,
    coded: bool,
    samples: int,
    pruned: bool,
    data: st.DataObject,
) -> None:
    p = random_laws(seed, 4, width, sharpness)
    num_kept = data.draw(st.lists(st.integers(0, width), min_size=4, max_size=4))
    law = truncated(p, num_kept, coded=coded, samples=samples, seed=seed)
    found = serve(law, how, vocab_size=width)
    truth = np.stack([slowly(row, how) for row in p])
    assert found.ends is not None
    for r in range(4):
        own = found.ends.row == r
        ids, lo, hi = (x[own].numpy() for x in (found.ends.ids, found.ends.lo, found.ends.hi))
        assert (lo <= truth[r, ids] + 1e-12).all(), (lo, truth[r, ids])
        assert (truth[r, ids] <= hi + 1e-12).all(), (truth[r, ids], hi)
        others = np.delete(truth[r], ids)
        assert float(found.ends.rest_lo[r]) <= others.sum() + 1e-12
        assert others.sum() <= float(found.ends.rest_hi[r]) + 1e-12
        assert (others <= float(found.ends.cap[r]) + 1e-12).all()
        if found.exact[r] and found.law is not law:
            support = found.law.ids[found.law.rows() == r].numpy()  # type: ignore[union-attr]
            assert set(support) == set(np.flatnonzero(truth[r] > 0))
    # a draft served in its own way
    z = torch.tensor(random_laws(seed + 1, 4, width, sharpness)).log()
    d2t = torch.arange(seed % 2, width, 2) if pruned else None
    x = serve_logits(z if d2t is None else z[:, d2t], drafted)
    lo, hi = found.alpha_bounds(x, d2t=d2t)
    alpha = exact_alpha(x, truth, d2t)
    assert (lo <= alpha + 1e-12).all(), (lo, alpha)
    assert (alpha <= hi + 1e-12).all(), (alpha, hi)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(2, 30),
    levels=st.integers(1, 6),
    how=HOW,
)
def test_a_dense_law_is_served_as_the_slow_version_ties_included(
    seed: int, width: int, levels: int, how: Serving
) -> None:
    rng = np.random.default_rng(seed)
    # quarters of nats: many ties, and no nucleus that ends within rounding of top_p
    logits = rng.integers(0, levels + 1, (3, width)) / 4
    if how.top_p is not None:
        how = how.model_copy(update={"top_p": min(1.0, how.top_p + 1e-9 * np.pi)})
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    truth = np.stack([slowly(row, how) for row in p])
    found = serve_logits(torch.tensor(logits), how).exp().numpy()
    np.testing.assert_allclose(found, truth, atol=1e-9)


def test_top_k_within_the_kept_ids_is_exact_at_any_temperature() -> None:
    p = random_laws(0, 20, 50, 2.0)
    for t, k in ((0.0, None), (0.5, 5), (1.0, 8), (2.0, 8)):
        found = serve(truncated(p, [8] * 20, coded=False), serving(t, k), vocab_size=50)
        truth = np.stack([slowly(row, serving(t, k)) for row in p])
        assert found.num_bounded == 0
        assert isinstance(found.law, SparseLaw)
        np.testing.assert_allclose(dense_of(found.law, 50), truth, atol=1e-6)
    beyond = serve(truncated(p, [8] * 20, coded=False), serving(1.0, 9), vocab_size=50)
    assert beyond.num_bounded == 20


def test_a_nucleus_within_the_kept_mass_is_exact_at_temperature_one() -> None:
    p = random_laws(1, 200, 50, 2.0)
    law = truncated(p, [12] * 200, coded=False)
    assert law.tail is not None
    found = serve(law, serving(p=0.8), vocab_size=50)
    covered = law.tail < 0.2 - 1e-5
    assert 20 < int(covered.sum()) < 200
    assert torch.equal(found.exact, covered)  # and no row falls within rounding of a boundary
    assert found.num_bounded == 200 - int(covered.sum())
    truth = np.stack([slowly(row, serving(p=0.8)) for row in p])
    assert isinstance(found.law, SparseLaw)
    exact = covered.numpy()
    np.testing.assert_allclose(dense_of(found.law, 50)[exact], truth[exact], atol=1e-6)


def test_a_nucleus_after_temperature_is_exact_where_the_bounds_leave_one() -> None:
    p = random_laws(2, 200, 50, 3.0)
    how = serving(0.7, None, 0.9)
    found = serve(truncated(p, [10] * 200, coded=True, samples=4), how, vocab_size=50)
    assert 20 < found.num_bounded < 180
    truth = np.stack([slowly(row, how) for row in p])
    assert isinstance(found.law, SparseLaw)
    off = np.abs(dense_of(found.law, 50) - truth).sum(-1) / 2
    assert off[found.exact.numpy()].max() < 0.02  # the codes' rounding, sharpened
    # a sharper law keeps its tail outside any nucleus: fewer rows are left open
    cold = serve(truncated(p, [10] * 200, coded=True), serving(0.3, None, 0.9), vocab_size=50)
    assert cold.num_bounded < found.num_bounded


def test_the_bounds_of_a_tempered_row_are_worth_having() -> None:
    p = random_laws(3, 50, 200, 2.5)
    z = torch.tensor(random_laws(4, 50, 200, 2.5)).log()
    found = serve(truncated(p, [40] * 50, coded=True), serving(0.7), vocab_size=200)
    assert found.num_bounded == 50
    lo, hi = found.alpha_bounds(serve_logits(z, serving(0.7)))
    assert float((hi - lo).mean()) < 0.05


@pytest.mark.parametrize("how", [serving(0.7), serving(1.5), serving(1.5, 20), serving(1.3, p=0.9)])
def test_the_estimate_of_a_bounded_law_closes_in_with_samples(how: Serving) -> None:
    p = random_laws(5, 40, 60, 1.5)
    truth = np.stack([slowly(row, how) for row in p])
    z = torch.tensor(random_laws(6, 40, 60, 1.5)).log()
    alpha = exact_alpha(z, truth)
    errors = []
    for samples in (4, 4000):
        law = truncated(p, [6] * 40, coded=False, samples=samples)
        found = serve(law, how, vocab_size=60)
        assert found.num_bounded == 40
        assert isinstance(found.law, SparseLaw)
        assert found.law.kept is None  # its values are no cells: `bounds` would prove nothing
        mass = (found.law.weight * found.law.p).double()
        whole = torch.zeros(40, dtype=torch.float64).index_add(0, found.law.rows(), mass)
        torch.testing.assert_close(whole, torch.ones_like(whole), rtol=0, atol=1e-5)
        errors.append(float((terms(z, found.law)[1] - alpha).abs().mean()))
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 4


def test_a_row_without_samples_has_the_middle_of_its_ends_as_a_bucket() -> None:
    p = random_laws(7, 10, 60, 1.0)
    found = serve(truncated(p, [10] * 10, coded=False), serving(0.8), vocab_size=60)
    assert isinstance(found.law, SparseLaw)
    assert found.ends is not None
    truth = np.stack([slowly(row, serving(0.8)) for row in p])
    kept = dense_of(found.law, 60)
    np.testing.assert_allclose(kept.sum(-1) + found.law.bucket.numpy(), 1, atol=1e-6)
    inside = (found.law.bucket >= found.ends.rest_lo - 1e-6) & (
        found.law.bucket <= found.ends.rest_hi + 1e-6
    )
    assert inside.all()
    assert np.abs(kept - truth)[kept > 0].max() < 0.05


def test_a_law_at_temperature_one_without_cuts_is_itself() -> None:
    law = truncated(random_laws(8, 5, 20, 2.0), [4] * 5, coded=True, samples=2)
    for how in (serving(), serving(1.0, 20, 1.0)):
        found = serve(law, how, vocab_size=20)
        assert found.law is law
        assert found.num_bounded == 0


def test_of_equal_codes_the_stored_order_decides() -> None:
    # 0.3001 and 0.3 share a code; the likelier of them is stored first, though its id is higher
    p = np.array([[0.3, 0.2, 0.3001, 0.1999]])
    found = serve(truncated(p, [4], coded=True), serving(1.0, 1), vocab_size=4)
    assert isinstance(found.law, SparseLaw)
    assert found.law.ids.tolist() == [2]
    tied = serve(truncated(np.full((1, 4), 0.25), [4], coded=False), serving(1.0, 2), vocab_size=4)
    assert isinstance(tied.law, SparseLaw)
    assert tied.law.ids.tolist() == [0, 1]


def test_a_nucleus_that_ends_within_rounding_is_not_called_exact() -> None:
    law = truncated(np.array([[0.5, 0.3, 0.2]]), [3], coded=False)
    assert serve(law, serving(p=0.8), vocab_size=3).num_bounded == 1
    assert serve(law, serving(p=0.75), vocab_size=3).num_bounded == 0


def test_dense_laws_are_exact_and_bounded_as_such() -> None:
    p = random_laws(9, 6, 20, 2.0)
    how = serving(0.8, 10, 0.9)
    found: Served = serve(DenseLaw(torch.tensor(p).log()), how, vocab_size=20)
    assert found.num_bounded == 0
    z = serve_logits(torch.tensor(random_laws(10, 6, 20, 2.0)).log(), how)
    lo, hi = found.alpha_bounds(z)
    alpha = exact_alpha(z, np.stack([slowly(row, how) for row in p]))
    torch.testing.assert_close(lo, alpha, rtol=0, atol=1e-5)
    torch.testing.assert_close(hi, alpha, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", -0.1), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 0.1)],
)
def test_a_serving_law_is_strict(key: str, value: float) -> None:
    with pytest.raises(ValidationError, match=key):
        Serving(**{"temperature": 1.0, "top_k": None, "top_p": None, key: value})
