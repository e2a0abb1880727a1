"""The fused LM head against the unfused path, in blocks that do not divide anything."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.head import head_terms
from pipeline.law import DenseLaw, SparseLaw
from pipeline.terms import terms
from tests.pipeline.test_terms import D2T, V, all_entries, gradients, sparse_law

N, D = 9, 6


def inputs(vocab: int = V, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, D, generator=g, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


def pulled(hidden: Tensor, weight: Tensor, kl: Tensor, alpha: Tensor) -> list[Tensor]:
    """Gradients of an arbitrary mixture of all terms."""
    mix = torch.linspace(0.5, 2, len(kl), dtype=kl.dtype)
    return list(torch.autograd.grad((mix * kl - mix.flip(0) * alpha).sum(), (hidden, weight)))


@pytest.mark.parametrize("columns", [1, 64, 77, None])
@pytest.mark.parametrize("pruned", [False, True])
def test_terms_and_gradients_are_those_of_whole_logits(columns: int | None, pruned: bool) -> None:
    vocab, d2t = (130, torch.arange(0, 260, 2)) if pruned else (260, None)
    law = sparse_law(N, 260)
    hidden, weight = inputs(vocab)
    whole = terms(hidden @ weight.T, law, d2t=d2t)
    fused = head_terms(hidden, weight, law, d2t=d2t, columns=columns)
    for a, b in zip(fused, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for a, b in zip(pulled(hidden, weight, *fused), pulled(hidden, weight, *whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_gradcheck_holds() -> None:
    hidden, weight = inputs()
    assert torch.autograd.gradcheck(
        lambda h, w: head_terms(h, w, sparse_law(), columns=64), (hidden, weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_err_no_more_than_whole_logits_do(dtype: torch.dtype) -> None:
    law = sparse_law(N, 500)
    hidden, weight = inputs(500, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = pulled(*exact, *terms(exact[0] @ exact[1].T, law))
    whole = pulled(hidden, weight, *terms(hidden @ weight.T, law))
    fused = pulled(hidden, weight, *head_terms(hidden, weight, law, columns=64))
    for a, b, c in zip(fused, whole, truth, strict=True):
        assert a.dtype == dtype
        error, plain = ((x.double() - c).norm() / c.norm() for x in (a, b))
        assert error < 1.2 * plain + torch.finfo(dtype).eps


def test_a_frozen_head_or_hidden_state_gets_no_gradient() -> None:
    hidden, weight = inputs()
    kl, alpha = head_terms(hidden, weight.detach(), sparse_law())
    assert torch.autograd.grad((kl + alpha).sum(), hidden)[0].shape == hidden.shape
    kl, alpha = head_terms(hidden.detach(), weight, sparse_law())
    assert torch.autograd.grad((kl + alpha).sum(), weight)[0].shape == weight.shape


def test_rows_outside_the_draft_vocabulary_and_no_row_are_defined() -> None:
    p = torch.zeros(N, V)
    p[:, 1] = 1  # not in D2T
    hidden, weight = inputs(len(D2T))
    kl, alpha = head_terms(hidden, weight, all_entries(p), d2t=D2T)
    assert not any(x.any() for x in (kl, alpha, *pulled(hidden, weight, kl, alpha)))
    kl, alpha = head_terms(hidden[:0], weight, all_entries(p[:0]), d2t=D2T)
    assert kl.shape == alpha.shape == (0,)


@pytest.mark.parametrize("gap", [3.0, 60.0, 150.0])
def test_a_bucket_that_the_draft_hardly_reaches_is_exact(gap: float) -> None:
    law = SparseLaw(
        torch.tensor([0, 2]),
        torch.tensor([0, 1]),
        torch.tensor([0.6, 0.3]),
        torch.ones(2),
        torch.tensor([0.1]),
    )
    z = torch.full((1, V), -gap, dtype=torch.float64)
    z[0, :2] = torch.tensor([1.0, 0.5])
    hidden = torch.ones(1, 1, requires_grad=True)
    kl, _ = head_terms(hidden, z.T.float(), law, columns=64)
    logq = z.log_softmax(-1)
    p = torch.tensor([0.6, 0.3], dtype=torch.float64)
    tail = 0.1 * (math.log(0.1) - logq[0, 2:].logsumexp(0))
    exact = ((p * (p.log() - logq[0, :2])).sum() + tail).item()
    assert kl.item() == pytest.approx(exact, rel=1e-6, abs=1e-6)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made under it has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_logits_are_never_stored_whole() -> None:
    rows, vocab, columns = 64, 5000, 100
    law = sparse_law(rows, 200)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 4, generator=g).requires_grad_()
    weight = torch.randn(vocab, 4, generator=g).requires_grad_()
    with Largest() as largest:
        kl, alpha = head_terms(hidden, weight, law, columns=columns)
        (kl - alpha).sum().backward()
    assert largest.numel == max(weight.numel(), rows * columns)  # the head's own gradient
    assert largest.numel < rows * vocab / 10


def test_autocast_makes_the_same_logits_forward_and_backward() -> None:
    layer, law = nn.Linear(D, 64, bias=False), sparse_law(N, 64)
    hidden = torch.randn(N, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = head_terms(hidden, layer.weight, law)
        whole = terms(layer(hidden), law)
    for a, b in zip(fused, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(
        pulled(hidden, layer.weight, *fused), pulled(hidden, layer.weight, *whole), strict=True
    ):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_a_dense_law_is_refused_by_an_assertion() -> None:
    hidden, weight = inputs()
    with pytest.raises(AssertionError, match="as large as the logits"):
        head_terms(hidden, weight, DenseLaw(torch.zeros(N, V)))  # type: ignore[arg-type]


def test_two_uses_of_a_row_mix_up_nothing() -> None:
    # `gradients` weighs every row differently
    hidden, weight = inputs()
    kl, alpha = head_terms(hidden, weight, sparse_law(), columns=64)
    z = hidden @ weight.T
    for a, b in zip(
        gradients(hidden, kl, alpha), gradients(z, *terms(z, sparse_law())), strict=True
    ):
        torch.testing.assert_close(a, b @ weight, rtol=1e-10, atol=1e-12)


def test_nothing_pulls_where_q_is_p() -> None:
    hidden, weight = inputs()
    with torch.no_grad():
        p_NV = (hidden @ weight.T).softmax(-1)
    kl, alpha = head_terms(hidden, weight, all_entries(p_NV), columns=64)
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-12)
    torch.testing.assert_close(alpha, torch.ones_like(alpha), rtol=0, atol=1e-12)
    for x in torch.autograd.grad(kl.sum(), (hidden, weight)):
        torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("gap", [1.0, 60.0, 600.0])
def test_the_likelihood_of_a_point_mass_is_exact_however_small_alpha_is(gap: float) -> None:
    p = torch.zeros(1, V)
    p[0, 4] = 1
    # logits are the weights themselves, one of them far below the others
    weight = torch.zeros(V, 1)
    weight[4] = -gap
    hidden, weight = torch.ones(1, 1, requires_grad=True), weight.requires_grad_()
    _, alpha = head_terms(hidden, weight, all_entries(p), columns=64)
    exact = weight.detach().double().T.log_softmax(-1)
    torch.testing.assert_close(-alpha.log(), -exact[:, 4], rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(-alpha.log().sum(), weight)
    torch.testing.assert_close(gradient.double().T, exact.exp() - p, rtol=1e-5, atol=1e-6)


def test_the_widest_vocabulary_agrees_with_float64() -> None:
    vocab = 262_144
    law = sparse_law(N, vocab)
    hidden, weight = inputs(vocab, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    whole = terms(exact[0] @ exact[1].T, law)
    fused = head_terms(hidden, weight, law)
    for a, b in zip(fused, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-6, atol=5e-6)
    for a, b in zip(pulled(hidden, weight, *fused), pulled(*exact, *whole), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)
