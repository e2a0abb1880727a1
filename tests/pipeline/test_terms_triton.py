"""The Triton kernels: under the interpreter against float64, and compiled for a GPU without one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import terms as module
from pipeline.law import DenseLaw, SparseLaw
from pipeline.terms import terms
from tests.pipeline.test_terms import (
    CASES,
    D2T,
    V,
    all_entries,
    dense_law,
    gradients,
    logits,
    sparse_law,
)

triton = pytest.importorskip("triton")

# the interpreter is numpy, which warns where IEEE arithmetic says inf or NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Dispatch as on a GPU; the names of the kernels' functions that were called."""
    from pipeline import terms_triton

    called: list[str] = []
    monkeypatch.setattr(module, "has_kernel", lambda z: z.dtype != torch.float64)
    for name in ("sparse_forward", "sparse_backward", "dense_forward", "dense_backward"):
        own = getattr(terms_triton, name)

        def spy(*args: Any, own: Any = own, name: str = name, **kwargs: Any) -> Any:
            called.append(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(terms_triton, name, spy)
    yield called
    assert called, "the test ran no kernel"


def compare(
    z: Tensor, law: SparseLaw | DenseLaw, d2t: Tensor | None = None, *, rtol: float = 2e-6
) -> None:
    """Values and gradients within plain torch's own error at the same dtype, against float64."""
    own = z.detach().requires_grad_()
    exact = z.detach().double().requires_grad_()
    plain = z.detach().requires_grad_()
    found, truth = terms(own, law, d2t=d2t), terms(exact, law, d2t=d2t)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "has_kernel", lambda z: False)
        torch_path = terms(plain, law, d2t=d2t)
        torch_gradients = gradients(plain, *torch_path)
    for a, b, c in zip(found, truth, torch_path, strict=True):
        allowed = 2 * (c - b).abs().max().item()
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol + allowed)
    for a, b, c in zip(
        gradients(own, *found), gradients(exact, *truth), torch_gradients, strict=True
    ):
        assert a.dtype == z.dtype
        if z.dtype == torch.bfloat16:  # the interpreter cuts it off where a GPU rounds: one ulp
            torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=1e-6)
            continue
        error, plain_error = ((x.double() - b).abs().max().item() for x in (a, c))
        assert error <= 1.5 * plain_error + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("law", "d2t"), CASES)
def test_kernels_err_no_more_than_plain_torch(
    law: SparseLaw | DenseLaw, d2t: Tensor | None, dtype: torch.dtype
) -> None:
    compare(logits(width=V if d2t is None else len(d2t)).to(dtype), law, d2t)


@pytest.mark.parametrize("width", [1, 127, 5000, 262_144])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_no_width_is_special(width: int, kind: str) -> None:
    rows = 1 if width > 10_000 else 3
    law = dense_law(rows, width) if kind == "dense" else None
    if law is None and width < 20:
        law = all_entries(torch.ones(rows, width))
    compare(logits(rows, width).float(), law or sparse_law(rows, width))


def test_rows_of_many_entries_take_several_steps() -> None:
    law = all_entries(torch.softmax(logits(2, 80), -1).float())
    compare(logits(2, 80, seed=5).float(), law)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_nothing_pulls_where_q_is_p_and_a_point_mass_is_likelihood(kind: str) -> None:
    logp = dense_law().logp
    z = (logp + 3).requires_grad_()
    kl, alpha = terms(z, all_entries(logp.exp()) if kind == "sparse" else DenseLaw(logp))
    (of_kl,) = torch.autograd.grad(kl.sum(), z)
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-6)
    torch.testing.assert_close(alpha, torch.ones_like(alpha), rtol=0, atol=1e-6)
    torch.testing.assert_close(of_kl, torch.zeros_like(of_kl), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gap", [1.0, 60.0, 150.0, 600.0])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_likelihood_and_its_gradient_are_exact_however_small_alpha_is(
    kind: str, gap: float
) -> None:
    p = torch.zeros(1, V)
    p[0, 4] = 1
    z = torch.zeros(1, V)
    z[0, 4] = -gap
    z.requires_grad_()
    _, alpha = terms(z, all_entries(p) if kind == "sparse" else DenseLaw(p.log()))
    (gradient,) = torch.autograd.grad(-alpha.log().sum(), z)
    exact = z.detach().double().log_softmax(-1)
    torch.testing.assert_close(-alpha.log(), -exact[:, 4], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact.exp() - p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gap", [3.0, 20.0, 60.0, 150.0])
def test_a_bucket_that_the_draft_hardly_reaches_is_exact(gap: float) -> None:
    law = SparseLaw(
        torch.tensor([0, 2]),
        torch.tensor([0, 1]),
        torch.tensor([0.6, 0.3]),
        torch.ones(2),
        torch.tensor([0.1]),
    )
    z = torch.full((1, V), -gap)
    z[0, :2] = torch.tensor([1.0, 0.5])
    compare(z, law, rtol=1e-5)


def test_empty_batches_empty_rows_and_foreign_laws_are_defined() -> None:
    kl, alpha = terms(torch.zeros(0, V), all_entries(torch.zeros(0, V)))
    assert kl.shape == alpha.shape == (0,)
    empty = SparseLaw(
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0),
        torch.zeros(0),
        torch.tensor([0.0, 1.0, 0.0]),
    )
    z = logits(3).float().requires_grad_()
    kl, alpha = terms(z, empty)
    (gradient,) = torch.autograd.grad((kl + alpha).sum(), z)
    assert kl.tolist() == [0, 0, 0]
    assert alpha.tolist() == [0, 1, 0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)
    p = torch.zeros(2, V)
    p[:, 1] = 1  # not in D2T
    for law in (all_entries(p), DenseLaw(p.log())):
        z = logits(2, len(D2T)).float().requires_grad_()
        kl, alpha = terms(z, law, d2t=D2T)
        (gradient,) = torch.autograd.grad((kl + alpha).sum(), z)
        assert kl.tolist() == alpha.tolist() == [0, 0]
        assert not gradient.any()


def test_a_bucket_without_a_symbol_left_for_it_is_ignored() -> None:
    law = SparseLaw(
        torch.tensor([0, 2]),
        torch.tensor([0, 2]),
        torch.tensor([0.6, 0.3]),
        torch.ones(2),
        torch.tensor([0.1]),
    )
    compare(torch.tensor([[1.0, 0.0]]), law, torch.tensor([0, 2]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_logit_that_is_no_number_shows_in_its_own_row_alone(bad: float, kind: str) -> None:
    law = sparse_law() if kind == "sparse" else dense_law()
    z = logits().float()
    clean = terms(z, law)
    z[4, 7] = bad
    for a, b in zip(terms(z, law), clean, strict=True):
        assert a[4].isnan()
        keep = torch.arange(9) != 4
        assert torch.equal(a[keep], b[keep])


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("law", "d2t"), [CASES[1], CASES[4]])
def test_a_gradient_in_place_is_the_same_bits(
    law: SparseLaw | DenseLaw, d2t: Tensor | None, dtype: torch.dtype
) -> None:
    z = logits(width=V if d2t is None else len(d2t)).to(dtype).requires_grad_()
    (beside,) = torch.autograd.grad(sum(x.sum() for x in terms(z, law, d2t=d2t)), z)
    made = z * 1
    (over,) = torch.autograd.grad(
        sum(x.sum() for x in terms(made, law, d2t=d2t, in_place=True)), made
    )
    assert torch.equal(beside, over)
    assert over.data_ptr() == made.data_ptr()


def test_what_is_kept_for_backward_is_a_few_numbers_a_row_and_an_entry() -> None:
    from pipeline import terms_triton

    z, law = logits(3, 3000).float(), sparse_law(3, 3000)
    entries = module.draft_entries(law, 3000, None)
    _, _, saved = terms_triton.sparse_forward(
        z,
        entries.start,
        entries.index,
        p=entries.p,
        weight=entries.weight,
        bucket=entries.bucket,
        pruned=False,
    )
    kept = [x.numel() for x in vars(saved).values() if isinstance(x, Tensor)]
    assert sum(kept) < 8 * (3 + 1) + 4 * len(law.ids)
    _, _, dense = terms_triton.dense_forward(z, dense_law(3, 3000).logp, None)
    own = [dense.peak, dense.total, dense.mass, dense.log_below]
    assert all(x.numel() == 3 for x in own)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipeline import terms_triton as kernels

dtype = sys.argv[1]
wide = {n: "*fp64" for n in (
    "p_ptr weight_ptr bucket_ptr logq_ptr mass_ptr used_ptr covered_ptr log_rest_ptr kl_ptr "
    "alpha_ptr log_below_ptr g_kl_ptr g_alpha_ptr").split()}
types = wide | {n: "*i64" for n in ("start_ptr", "index_ptr", "d2t_ptr")}
types |= {n: "*fp32" for n in ("peak_ptr", "total_ptr", "logp_ptr")}
types |= {"logits_ptr": "*" + dtype, "out_ptr": "*" + dtype, "width": "i32", "logp_width": "i32"}
block, warps = kernels._block(128256)
constants = {"PRUNED": True, "BLOCK": block, "SCAN": kernels.SCAN, "E": kernels.ENTRIES}
for name in ("_sparse_forward", "_sparse_bucket", "_sparse_backward", "_dense_forward",
             "_dense_backward"):
    kernel = getattr(kernels, name)
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(i,): constants[n] for i, n in enumerate(names) if n in constants},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert ".target sm_90" in made.asm["ptx"], name
    print(name, len(made.asm["cubin"]))
"""


def test_kernels_compile_for_a_gpu_that_is_not_here(kernels: list[str]) -> None:
    import os
    import subprocess
    import sys

    kernels.append("compiled")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, "bf16"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = dict(line.split() for line in done.stdout.splitlines())
    assert len(sizes) == 5
    assert all(int(size) > 0 for size in sizes.values())
