"""Terms of all depths: the fused head against whole logits, packed rows against rows apart."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import depths
from pipeline.batch import Batch
from pipeline.dataset import collate
from pipeline.depths import depth_terms
from pipeline.draft import Draft
from pipeline.head import head_terms
from pipeline.interface import Interface, Shape
from tests.caches import FULL, LAYOUT, D, V, record
from tests.golden.curves import inputs_of, loss_of

KINDS = ("lm", "medusa", "eagle3", "mlp", "mtp")
RECORDS = [
    record(f"r{i}", num_tokens=n, num_prompt=2 + i) for i, n in enumerate((26, 9, 17, 12, 7))
]
BATCH = collate(RECORDS, LAYOUT)


def wide(batch: Batch) -> Batch:
    """With features in float64, as a float64 draft reads them."""
    assert batch.hidden is not None
    assert batch.last_hidden is not None
    return replace(batch, hidden=batch.hidden.double(), last_hidden=batch.last_hidden.double())


def pulled(draft: Draft, batch: Batch, depth: int, **how: Any) -> tuple[float, list[Tensor]]:
    """lk_lambda of a pass, and its gradients."""
    draft.zero_grad()
    kl_SN, alpha_SN, mask_SN = depth_terms(draft, batch, depth, **how)
    loss_SN = loss_of("lk_lambda", eta=3.0)(kl_SN, alpha_SN, mask_SN)
    (total := loss_SN[mask_SN].sum()).backward()
    return total.item(), [p.grad for p in draft.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_head_gives_the_terms_and_gradients_of_whole_logits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(kind, None)
    draft, depth, calls = inputs.fresh(0).double(), inputs.depth, []

    def watched(*args: Any, **named: Any) -> tuple[Tensor, ...]:
        calls.append(args)
        return head_terms(*args, **named)

    monkeypatch.setattr(depths, "head_terms", watched)
    whole, expected = pulled(draft, wide(BATCH), depth)
    assert not calls  # so little is whole by default
    fused, found = pulled(draft, wide(BATCH), depth, whole_bytes=0)
    assert len(calls) == depth
    assert fused == pytest.approx(whole, rel=1e-11)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_fused_head_reads_a_pruned_vocabulary_and_bfloat16() -> None:
    inputs = inputs_of("eagle3", None)
    g = torch.Generator().manual_seed(3)
    embed, head = (torch.randn(V, D, generator=g) for _ in range(2))
    section = inputs.section.model_copy(update={"draft_vocab_size": 20})
    target = Interface(embed, head, torch.ones(D), 1e-6)
    d2t = torch.arange(0, V, 2)
    draft = inputs.model.build(section, Shape(V, D), target, 0, d2t=d2t)
    for how, close in (({}, 1e-5), ({"dtype": torch.bfloat16}, 0.02)):
        whole, expected = pulled(draft, BATCH, 2, **how)
        fused, found = pulled(draft, BATCH, 2, **how, whole_bytes=0)
        assert fused == pytest.approx(whole, rel=close)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 10 * close * b.norm()


def test_dense_laws_and_more_terms_ask_for_whole_logits() -> None:
    draft = inputs_of("lm", None).fresh(0)
    dense = collate([record("d", layout=FULL)], FULL)
    assert torch.equal(
        depth_terms(draft, dense, 1, whole_bytes=0)[0], depth_terms(draft, dense, 1)[0]
    )
    assert len(depth_terms(draft, BATCH, 1, ["jsd"], whole_bytes=0)) == 4


@pytest.mark.parametrize("pack_tokens", [1, 40, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_lose_what_rows_of_their_own_lose(kind: str, pack_tokens: int) -> None:
    inputs = inputs_of(kind, None)
    draft, packed = inputs.fresh(0).double(), collate(RECORDS, LAYOUT, pack_tokens=pack_tokens)
    assert len(packed.tokens) == {1: 3, 40: 2, 1000: 1}[pack_tokens]
    apart, expected = pulled(draft, wide(BATCH), inputs.depth)
    together, found = pulled(draft, wide(packed), inputs.depth)
    assert together == pytest.approx(apart, rel=1e-9)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_supervises_nothing_has_terms_of_no_anchor(kind: str) -> None:
    inputs = inputs_of(kind, None)
    empty = collate([record("x", num_tokens=6, num_prompt=6)], LAYOUT)
    for how in ({}, {"whole_bytes": -1}):
        kl_SN, alpha_SN, mask_SN = depth_terms(inputs.fresh(0), empty, inputs.depth, **how)
        assert kl_SN.shape == alpha_SN.shape == mask_SN.shape == (inputs.depth, 0)


def test_a_law_wholly_outside_the_draft_vocabulary_pulls_nowhere() -> None:
    inputs = inputs_of("medusa", None)
    g = torch.Generator().manual_seed(3)
    embed, head = (torch.randn(V, D, generator=g) for _ in range(2))
    section = inputs.section.model_copy(update={"draft_vocab_size": 2, "train_heads": True})
    made = collate(RECORDS, LAYOUT)
    assert made.law is not None
    assert not isinstance(made.law, type(collate([record("d", layout=FULL)], FULL).law))
    away = replace(
        made, law=replace(made.law, ids=made.law.ids.clamp(min=2), bucket=made.law.bucket * 0)
    )
    for how in ({}, {"whole_bytes": 0}):
        draft = inputs.model.build(
            section,
            Shape(V, D),
            Interface(embed, head, torch.ones(D), 1e-6),
            0,
            d2t=torch.arange(2),
        )
        total, gradients = pulled(draft, away, 2, **how)
        kl_SN, alpha_SN, _ = depth_terms(draft, away, 2, **how)
        assert not kl_SN.any()
        assert not alpha_SN.any()
        assert all(not x.any() for x in gradients)
        # λ of α = 0 is 1, and KL is 0 there
        assert total == 0


def test_a_weight_that_is_no_number_shows_in_the_terms_fused_or_not() -> None:
    draft = inputs_of("lm", None).fresh(0)
    with torch.no_grad():
        next(draft.parameters())[3] = float("nan")
    for how in ({}, {"whole_bytes": 0}):
        kl_SN, alpha_SN, mask_SN = depth_terms(draft, BATCH, 1, **how)
        assert kl_SN[mask_SN].isnan().all()
        assert alpha_SN[mask_SN].isnan().all()
