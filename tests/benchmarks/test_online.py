"""The comparison with online training, tiny: its parts run, and its ratios are what they say."""

import pytest
import torch

from benchmarks.online import DRAFTS, PLANS, Found, Setting, Times, chart, measure, page
from pipeline.law import DenseLaw


def test_it_measures_drafts_both_ways_from_one_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DRAFTS, "lm, d = 32", {**DRAFTS["lm, d = 32"], "hidden_size": 16})
    tiny = Setting(
        vocab_size=48,
        hidden_size=16,
        num_layers=3,
        intermediate_size=24,
        num_heads=2,
        sequences=4,
        tokens=20,
        batch_sequences=2,
        rounds=1,
        drafts=("lm, d = 32", "medusa, 4 heads"),
    )
    seen: list[bool] = []
    inner = DenseLaw.take

    def take(law: DenseLaw, rows: torch.Tensor) -> DenseLaw:
        seen.append(True)
        return inner(law, rows)

    monkeypatch.setattr(DenseLaw, "take", take)
    found = measure(tiny)
    assert seen  # online laws are whole
    assert len(found.c_t) == len(found.capture) == 1
    assert all(len(t.online) == len(t.first) == 1 for t in found.drafts.values())
    text = page(tiny, found)
    assert text.count("\n| ") == 2 + len(tiny.drafts)
    assert all(f"{a} × {e}" in text for a, e in PLANS)
    assert chart(found).count("<title>") >= len(PLANS) * len(tiny.drafts)


def test_ratios_are_those_of_the_formulas() -> None:
    times = Times(c_d=[1.0], online=[11.0], first=[1.5], later=[1.25])
    found = Found(c_t=[10.0], capture=[12.0], drafts={"x": times})
    assert found.ratio("x", 1, 1) == pytest.approx((11 / 13.5, 1.0))
    measured, bound = found.ratio("x", 12, 10)
    assert bound == pytest.approx(120 * 11 / (10 + 120))
    assert measured == pytest.approx(120 * 11 / (12 + 12 * (1.5 + 9 * 1.25)))
