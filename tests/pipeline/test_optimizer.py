"""The update against torch's own, and the learning rate's course."""

import pytest
import torch

from pipeline.optimizer import AdamW, learning_rate


def parameters() -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, 3, generator=g)) for n in (4, 1, 7)]


def test_the_update_and_the_clipping_are_torchs_own() -> None:
    mine, theirs = parameters(), parameters()
    ours = AdamW(mine, (0.9, 0.95), weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=g)
            b.grad = a.grad.clone()
        norm = ours.clip(2.0)
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, 2.0).item())
        ours.step(1e-2)
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_small_gradients_are_not_scaled_up() -> None:
    (p,) = parameters()[:1]
    p.grad = torch.full_like(p, 1e-3)
    AdamW([p], (0.9, 0.95), weight_decay=0.0).clip(1.0)
    assert (p.grad == 1e-3).all()


def test_a_parameter_without_a_gradient_stays() -> None:
    first, second = parameters()[:2]
    before = second.detach().clone()
    optimizer = AdamW([first, second], (0.9, 0.95), weight_decay=0.5)
    optimizer.zero_grad()
    first.grad = torch.ones_like(first)
    optimizer.step(0.1)
    assert torch.equal(second, before)


def test_the_rate_rises_linearly_then_falls_on_a_cosine() -> None:
    rates = [learning_rate(s, steps=101, peak=2.0, warmup=1, final=0.1) for s in range(101)]
    assert rates[0] == rates[1] == 2.0
    assert rates[51] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5), rel=0.05)
    assert rates[100] == pytest.approx(0.2)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    rising = [learning_rate(s, steps=100, peak=2.0, warmup=4, final=0.1) for s in range(5)]
    assert rising == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_more_warm_up_than_steps_never_exceeds_the_peak() -> None:
    rates = [learning_rate(s, steps=5, peak=1.0, warmup=20, final=0.1) for s in range(5)]
    assert max(rates) <= 0.25
