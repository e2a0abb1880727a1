"""The terms against their definition, written out densely in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.law import DenseLaw, SparseLaw
from pipeline.terms import EXTRA, terms

V = 12


def reference(
    logits_NV: Tensor, law: SparseLaw | DenseLaw, d2t: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """MATHS (1)-(6), row by row and id by id; differentiable by autograd."""
    kls, alphas = [], []
    for n, z in enumerate(logits_NV.double()):
        logq = torch.full((1_000_000,), -torch.inf, dtype=torch.float64)
        logq = logq.index_put((torch.arange(len(z)) if d2t is None else d2t,), z.log_softmax(-1))
        if isinstance(law, DenseLaw):
            ids, p = torch.arange(law.logp.shape[1]), law.logp[n].double().exp()
            weight, bucket = torch.ones_like(p), torch.zeros((), dtype=torch.float64)
        else:
            own = slice(int(law.entry_start[n]), int(law.entry_start[n + 1]))
            ids, p = law.ids[own], law.p[own].double()
            weight, bucket = law.weight[own].double(), law.bucket[n].double()
        inside = logq[ids].isfinite() & (p > 0)
        ids, p, weight = ids[inside], p[inside], weight[inside]
        q = logq[ids].exp()
        q_rest = 1 - q.sum()
        kl = (weight * p * (p.log() - logq[ids])).sum()
        alpha = (weight * torch.minimum(p, q)).sum()
        if bucket > 0:
            kl = kl + bucket * (bucket / q_rest).log()
            alpha = alpha + torch.minimum(bucket, q_rest)
        mass = (weight * p).sum() + bucket
        if d2t is not None:
            kl = kl / mass - mass.log() if mass > 0 else 0 * z.sum()
        kls.append(kl)
        alphas.append(alpha)
    return torch.stack(kls), torch.stack(alphas)


def sparse_law(num_rows: int = 9, vocab_size: int = V, *, seed: int = 0) -> SparseLaw:
    """Random rows in turn: kept with samples, kept with a bucket, samples alone, all kept."""
    rng = np.random.default_rng(seed)
    start, ids, p, weight, bucket = [0], [], [], [], []
    for n in range(num_rows):
        law = rng.dirichlet(np.full(vocab_size, 0.3))
        order = np.argsort(-law)
        kept = [order[:3], order[:4], order[:0], order][n % 4]
        tail = np.setdiff1d(order, kept)
        mass = law[tail].sum() if len(tail) else 0.0
        samples = rng.choice(tail, 5, p=law[tail] / mass) if n % 4 in (0, 2) else order[:0]
        ids += [*kept, *samples]
        p += [*law[kept], *law[samples]]
        weight += [*np.ones(len(kept)), *(mass / (5 * law[samples]))]
        bucket.append(mass if n % 4 == 1 else 0.0)
        start.append(len(ids))
    return SparseLaw(
        entry_start=torch.tensor(start),
        ids=torch.tensor(np.array(ids, dtype=np.int64)),
        p=torch.tensor(p, dtype=torch.float32),
        weight=torch.tensor(weight, dtype=torch.float32),
        bucket=torch.tensor(bucket, dtype=torch.float32),
    )


def dense_law(num_rows: int = 9, vocab_size: int = V, *, seed: int = 0) -> DenseLaw:
    z = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
    return DenseLaw(z.log_softmax(-1))


def logits(num_rows: int = 9, width: int = V, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, width, generator=generator, dtype=torch.float64) * 2


def gradients(z: Tensor, kl: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Of two arbitrary mixtures of rows, so that a mix-up of rows shows."""
    mix = torch.linspace(0.5, 2, len(kl), dtype=kl.dtype)
    (of_kl,) = torch.autograd.grad(kl, z, mix, retain_graph=True)
    (of_alpha,) = torch.autograd.grad(alpha, z, mix)
    return of_kl, of_alpha


D2T = torch.tensor([0, 2, 3, 5, 6, 9, 11])
CASES = [
    pytest.param(sparse_law(), None, id="sparse"),
    pytest.param(sparse_law(), D2T, id="sparse, pruned vocabulary"),
    pytest.param(sparse_law(), torch.arange(V), id="sparse, all of a pruned vocabulary"),
    pytest.param(dense_law(), None, id="dense"),
    pytest.param(dense_law(), D2T, id="dense, pruned vocabulary"),
]


@pytest.mark.parametrize(("law", "d2t"), CASES)
def test_values_and_gradients_are_those_of_the_definition(
    law: SparseLaw | DenseLaw, d2t: Tensor | None
) -> None:
    z = logits(width=V if d2t is None else len(d2t)).requires_grad_()
    found, expected = terms(z, law, d2t=d2t), reference(z, law, d2t)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(z, *found), gradients(z, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("law", "d2t"), CASES)
def test_gradcheck_holds(law: SparseLaw | DenseLaw, d2t: Tensor | None) -> None:
    z = logits(width=V if d2t is None else len(d2t)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: terms(x, law, d2t=d2t), (z,))


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_nothing_pulls_where_q_is_p(kind: str) -> None:
    logp = dense_law().logp.double().log_softmax(-1)
    law: SparseLaw | DenseLaw = DenseLaw(logp)
    if kind == "sparse":
        law = all_entries(logp.exp())
    z = (logp + 3).requires_grad_()  # logits know no constant
    kl, alpha = terms(z, law)
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-12)
    torch.testing.assert_close(alpha, torch.ones_like(alpha), rtol=0, atol=1e-12)
    (of_kl,) = torch.autograd.grad(kl.sum(), z)
    torch.testing.assert_close(of_kl, torch.zeros_like(of_kl), rtol=0, atol=1e-12)


def all_entries(p_NV: Tensor) -> SparseLaw:
    """Every id kept."""
    num_rows, width = p_NV.shape
    return SparseLaw(
        entry_start=torch.arange(num_rows + 1) * width,
        ids=torch.arange(width).repeat(num_rows),
        p=p_NV.flatten(),
        weight=torch.ones(p_NV.numel()),
        bucket=torch.zeros(num_rows),
    )


@pytest.mark.parametrize("gap", [1.0, 60.0, 150.0, 600.0])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_likelihood_and_its_gradient_are_exact_however_small_alpha_is(
    kind: str, gap: float
) -> None:
    # at a point mass −log α is −log q(x*), whose gradient is q − 1[x*] (MATHS (12))
    p = torch.zeros(1, V)
    p[0, 4] = 1
    law = all_entries(p) if kind == "sparse" else DenseLaw(p.log())
    z = torch.zeros(1, V, dtype=torch.float32)
    z[0, 4] = -gap
    z.requires_grad_()
    _, alpha = terms(z, law)
    (gradient,) = torch.autograd.grad(-alpha.log().sum(), z)
    exact = z.detach().double().log_softmax(-1)
    torch.testing.assert_close(-alpha.log(), -exact[:, 4], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact.exp() - p, rtol=1e-5, atol=1e-6)


def test_disjoint_laws_have_no_overlap_and_a_kl_of_the_gap() -> None:
    p = torch.zeros(1, V)
    p[0, 0] = 1
    z = torch.full((1, V), -80.0)
    z[0, 1] = 0.0
    kl, alpha = terms(z, all_entries(p))
    assert kl.item() == pytest.approx(80.0)
    assert 0 < alpha.item() < 1e-34


def test_rows_outside_the_draft_vocabulary_give_zero_and_pull_nowhere() -> None:
    p = torch.zeros(2, V)
    p[:, 1] = 1  # not in D2T
    for law in (all_entries(p), DenseLaw(p.log())):
        z = logits(2, len(D2T)).requires_grad_()
        kl, alpha = terms(z, law, d2t=D2T)
        (gradient,) = torch.autograd.grad((kl + alpha).sum(), z)
        assert kl.tolist() == alpha.tolist() == [0, 0]
        assert not gradient.any()


def test_no_row_and_a_row_without_entries_are_defined() -> None:
    kl, alpha = terms(torch.zeros(0, V), all_entries(torch.zeros(0, V)))
    assert kl.shape == alpha.shape == (0,)
    empty = SparseLaw(
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0),
        torch.zeros(0),
        torch.tensor([0.0, 1.0]),
    )
    z = logits(2).requires_grad_()
    kl, alpha = terms(z, empty)
    (gradient,) = torch.autograd.grad((kl + alpha).sum(), z)
    assert kl.tolist() == [0, 0]
    assert alpha.tolist() == [0, 1]  # a bucket that is the whole law overlaps wholly
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gap", [3.0, 20.0, 60.0])
def test_a_bucket_that_the_draft_hardly_reaches_keeps_its_exact_gradient(gap: float) -> None:
    # 1 − Σ q over the kept ids would cancel: q_rest is e^−gap
    law = SparseLaw(
        torch.tensor([0, 2]),
        torch.tensor([0, 1]),
        torch.tensor([0.6, 0.3]),
        torch.ones(2),
        torch.tensor([0.1]),
    )
    z = torch.full((1, V), -gap, dtype=torch.float32)
    z[0, :2] = torch.tensor([1.0, 0.5])
    z.requires_grad_()
    kl, _ = terms(z, law)
    (gradient,) = torch.autograd.grad(kl.sum(), z)
    logq = z.detach().double().log_softmax(-1)
    rest = logq[0, 2:].logsumexp(0)
    p = torch.tensor([0.6, 0.3], dtype=torch.float64)
    exact = (p * (p.log() - logq[0, :2])).sum() + 0.1 * (np.log(0.1) - rest)
    pull = logq.exp()
    pull[0, :2] -= p
    pull[0, 2:] -= 0.1 * (logq[0, 2:] - rest).exp()
    assert kl.item() == pytest.approx(exact.item(), rel=1e-6, abs=1e-7)
    torch.testing.assert_close(gradient.double(), pull, rtol=1e-4, atol=1e-7)


def test_a_bucket_without_a_symbol_left_for_it_is_ignored() -> None:
    # every id of the draft is kept: the tail lies outside its vocabulary
    law = SparseLaw(
        torch.tensor([0, 2]),
        torch.tensor([0, 2]),
        torch.tensor([0.6, 0.3]),
        torch.ones(2),
        torch.tensor([0.1]),
    )
    z = torch.tensor([[1.0, 0.0]], requires_grad=True)
    kl, alpha = terms(z, law, d2t=torch.tensor([0, 2]))
    q = z.detach().double().softmax(-1)
    p = torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64)
    assert kl.item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)
    assert alpha.item() == pytest.approx(torch.minimum(q, 0.9 * p).sum().item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(kl.sum(), z)
    torch.testing.assert_close(gradient.double(), q - p, rtol=1e-5, atol=1e-6)


def test_the_estimates_are_unbiased_over_tail_samples() -> None:
    rng = np.random.default_rng(0)
    p = np.sort(rng.dirichlet(np.ones(V)))[::-1].copy()
    z, mass, draws = logits(1), p[3:].sum(), 4000
    samples = rng.choice(np.arange(3, V), (draws, 2), p=p[3:] / mass)
    ids = np.concatenate([np.tile(np.arange(3), (draws, 1)), samples], 1)
    weight = np.where(np.arange(5) < 3, 1.0, mass / (2 * p[ids]))
    law = SparseLaw(
        torch.arange(draws + 1) * 5,
        torch.tensor(ids.ravel()),
        torch.tensor(p[ids].ravel()),
        torch.tensor(weight.ravel()),
        torch.zeros(draws),
    )
    estimates = terms(z.expand(draws, V), law)
    exact = terms(z, all_entries(torch.tensor(p)[None]))
    for found, truth in zip(estimates, exact, strict=True):
        error = found.mean() - truth
        assert abs(error.item()) < 4 * found.std().item() / draws**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_err_no_more_than_their_own_rounding(dtype: torch.dtype) -> None:
    law = sparse_law(40, 500)
    z = logits(40, 500).to(dtype).requires_grad_()
    wide = z.detach().double().requires_grad_()
    found, exact = terms(z, law), terms(wide, law)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)  # of float32 sums, not of bf16
    for a, b in zip(gradients(z, *found), gradients(wide, *exact), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize(("rows", "width"), [(70, 2048), (70, 50_000), (3, 262_144)])
def test_wide_vocabularies_agree_with_float64(rows: int, width: int) -> None:
    law = sparse_law(rows, width)
    z = logits(rows, width)
    z32 = z.float().requires_grad_()
    z64 = z32.detach().double().requires_grad_()
    found, exact = terms(z32, law), terms(z64, law)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-6, atol=5e-6)
    for a, b in zip(gradients(z32, *found), gradients(z64, *exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-8)


def test_the_sparse_law_of_all_ids_is_the_dense_law() -> None:
    dense = dense_law(20, 64)
    z = logits(20, 64).float().requires_grad_()
    sparse = all_entries(dense.logp.exp())
    for d2t in (None, torch.arange(0, 64, 3)):
        x = z if d2t is None else z[:, : len(d2t)]
        for a, b in zip(terms(x, sparse, d2t=d2t), terms(x, dense, d2t=d2t), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_forward_and_backward_build_no_dense_target() -> None:
    # what autograd keeps is the logits and a few numbers a row and an entry
    law = sparse_law(64, 128)
    z = torch.randn(64, 128_256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    saved: list[int] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        kl, alpha = terms(z, law)
    (kl + alpha).sum().backward()
    assert sorted(saved)[-1] == z.numel()
    assert sum(saved) - z.numel() < 0.01 * z.numel()


def shared(p: Tensor, q: Tensor) -> Tensor:
    """2 log 2 − 2 JSD, id by id, MATHS (50)."""
    middle = (p + q) / 2
    return p * (2 * middle / p).log() + q * (2 * middle / q).log()


def jsd_reference(z_NV: Tensor, law: SparseLaw | DenseLaw, d2t: Tensor | None) -> Tensor:
    """log 2 − ½ Σ over the law of p log(1 + q/p) + q log(1 + p/q), one id at a time."""
    out = []
    for n, z in enumerate(z_NV.double()):
        columns = range(len(z)) if d2t is None else d2t.tolist()
        q_of = dict(zip(columns, z.softmax(-1), strict=True))
        if isinstance(law, DenseLaw):
            p = law.logp[n].double().exp()
            out.append(sum(shared(p[v], q) for v, q in q_of.items()))
            continue
        own = range(int(law.entry_start[n]), int(law.entry_start[n + 1]))
        ids, total = [int(law.ids[e]) for e in own], 0 * z.sum()
        for e, v in zip(own, ids, strict=True):
            if v in q_of:
                total = total + law.weight[e].double() * shared(law.p[e].double(), q_of[v])
        if law.bucket[n] > 0:
            rest = 1 - sum((q_of[v] for v in set(ids) & set(q_of)), torch.zeros(()))
            total = total + shared(law.bucket[n].double(), rest)
        out.append(total)
    return torch.log(torch.tensor(2.0, dtype=torch.float64)) - torch.stack(out) / 2


@pytest.mark.parametrize(("law", "d2t"), CASES)
def test_jsd_is_that_of_the_definition_beside_unchanged_terms(
    law: SparseLaw | DenseLaw, d2t: Tensor | None
) -> None:
    z = logits(width=V if d2t is None else len(d2t)).requires_grad_()
    kl, alpha, jsd = terms(z, law, d2t=d2t, extra=("jsd",))
    for a, b in zip(terms(z, law, d2t=d2t), (kl, alpha), strict=True):
        assert torch.equal(a, b)
    exact = jsd_reference(z, law, d2t)
    torch.testing.assert_close(jsd, exact, rtol=1e-7, atol=1e-9)
    mix = torch.linspace(0.5, 2, len(jsd), dtype=jsd.dtype)
    (of_jsd,), (pull,) = (torch.autograd.grad(x, z, mix, retain_graph=True) for x in (jsd, exact))
    torch.testing.assert_close(of_jsd, pull, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("law", "d2t"), CASES)
def test_gradcheck_holds_for_all_terms_together(
    law: SparseLaw | DenseLaw, d2t: Tensor | None
) -> None:
    z = logits(width=V if d2t is None else len(d2t)).requires_grad_()
    extra = EXTRA if isinstance(law, DenseLaw) else ("jsd",)
    assert torch.autograd.gradcheck(lambda x: terms(x, law, d2t=d2t, extra=extra), (z,))


def test_reverse_kl_renormalises_p_on_a_pruned_vocabulary() -> None:
    z, law = logits(width=len(D2T)), dense_law()
    logq, logp = z.log_softmax(-1), law.logp.double()[:, D2T].log_softmax(-1)
    _, _, reverse = terms(z, law, d2t=D2T, extra=("reverse_kl",))
    torch.testing.assert_close(reverse, (logq.exp() * (logq - logp)).sum(-1))
    with pytest.raises(AssertionError, match="finite variance"):
        terms(z, sparse_law(), d2t=D2T, extra=("reverse_kl",))


def test_rows_outside_the_draft_vocabulary_have_the_largest_jsd_and_no_pull() -> None:
    p = torch.zeros(2, V)
    p[:, 1] = 1  # not in D2T
    for law in (all_entries(p), DenseLaw(p.log())):
        z = logits(2, len(D2T)).requires_grad_()
        extra = EXTRA if isinstance(law, DenseLaw) else ("jsd",)
        _, _, jsd, *reverse = terms(z, law, d2t=D2T, extra=extra)
        (gradient,) = torch.autograd.grad(jsd.sum() + sum(x.sum() for x in reverse), z)
        assert jsd.tolist() == pytest.approx([np.log(2)] * 2)
        assert all(x.tolist() == [0, 0] for x in reverse)
        assert not gradient.any()


def test_the_estimate_of_jsd_is_unbiased_over_tail_samples() -> None:
    rng = np.random.default_rng(1)
    p = np.sort(rng.dirichlet(np.ones(V)))[::-1].copy()
    mass, draws = p[3:].sum(), 4000
    samples = rng.choice(np.arange(3, V), (draws, 2), p=p[3:] / mass)
    ids = np.concatenate([np.tile(np.arange(3), (draws, 1)), samples], 1)
    weight = np.where(np.arange(5) < 3, 1.0, mass / (2 * p[ids]))
    law = SparseLaw(
        torch.arange(draws + 1) * 5,
        torch.tensor(ids.ravel()),
        torch.tensor(p[ids].ravel()),
        torch.tensor(weight.ravel()),
        torch.zeros(draws),
    )
    z = logits(1)
    found = terms(z.expand(draws, V), law, extra=("jsd",))[2]
    exact = terms(z, DenseLaw(torch.tensor(p).log()[None]), extra=("jsd",))[2]
    assert abs((found.mean() - exact).item()) < 4 * found.std().item() / draws**0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("law", "d2t"), CASES)
def test_a_gradient_in_place_is_the_same_bits_in_the_logits_memory(
    law: SparseLaw | DenseLaw, d2t: Tensor | None, dtype: torch.dtype
) -> None:
    z = logits(width=V if d2t is None else len(d2t)).to(dtype).requires_grad_()
    (beside,) = torch.autograd.grad(sum(x.sum() for x in terms(z, law, d2t=d2t)), z)
    made = z * 1
    kl, alpha = terms(made, law, d2t=d2t, in_place=True)
    (over,) = torch.autograd.grad((kl + alpha).sum(), made, retain_graph=True)
    assert torch.equal(beside, over)
    assert over.data_ptr() == made.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(kl.sum(), made)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_logit_that_is_no_number_shows_in_its_own_row_alone(bad: float, kind: str) -> None:
    law = sparse_law() if kind == "sparse" else dense_law()
    z = logits().float()
    clean = terms(z, law, extra=("jsd",))
    z[4, 7] = bad
    for a, b in zip(terms(z, law, extra=("jsd",)), clean, strict=True):
        assert a[4].isnan()
        keep = torch.arange(9) != 4
        assert torch.equal(a[keep], b[keep])


def test_a_logit_of_minus_infinity_is_a_probability_of_zero() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    z = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    for law in (all_entries(p[:, :2].contiguous()), DenseLaw(p.log())):
        kl, alpha = terms(z, law)
        assert kl.item() == np.inf
        assert alpha.item() == pytest.approx(0.5)


@pytest.mark.parametrize("gap", [60.0, 150.0, 600.0])
def test_a_bucket_out_of_float32s_range_keeps_its_gradient(gap: float) -> None:
    # ∂KL/∂z over the bucket's symbols sums to q_rest − b however small q_rest is
    law = SparseLaw(
        torch.tensor([0, 1]),
        torch.tensor([0]),
        torch.tensor([0.9]),
        torch.ones(1),
        torch.tensor([0.1]),
    )
    z = torch.zeros(1, 4)
    z[0, 1:] = -gap
    z.requires_grad_()
    kl, _ = terms(z, law)
    (gradient,) = torch.autograd.grad(kl.sum(), z)
    torch.testing.assert_close(gradient[0, 1:].sum(), torch.tensor(-0.1), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient[0, 0], torch.tensor(0.1), rtol=1e-4, atol=0)
