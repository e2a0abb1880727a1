"""What is kept of a law, against the slow obvious version."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import topk
from pipeline.topk import Rule, block_size, sample_count, truncate

RULE = Rule(min_prob=1e-2, max_kept=12, tail_samples=8, tail_full_mass=0.05, tail_min_mass=1e-4)


def logits_of(
    seed: int, *, rows: int = 40, vocab_size: int = 50, scale: float = 3.0
) -> torch.Tensor:
    return scale * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def uniforms(seed: int, rows: int, count: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, count, dtype=torch.float64, generator=generator)


def kept_of(logits: torch.Tensor, rule: Rule = RULE, seed: int = 0) -> topk.Kept:
    token = torch.arange(len(logits)) % logits.shape[1]
    return truncate(logits, token, rule=rule, uniform_NM=uniforms(seed, len(logits)))


def rows_of(kept: topk.Kept) -> list[dict[str, np.ndarray]]:
    entry = np.concatenate([[0], kept.kept.cumsum(0)])
    draw = np.concatenate([[0], kept.tail_kept.cumsum(0)])
    return [
        {
            "ids": kept.ids[entry[r] : entry[r + 1]].numpy(),
            "p": kept.p[entry[r] : entry[r + 1]].numpy(),
            "tail_ids": kept.tail_ids[draw[r] : draw[r + 1]].numpy(),
            "tail_logp": kept.tail_logp[draw[r] : draw[r + 1]].numpy(),
        }
        for r in range(len(kept.kept))
    ]


def slow(logits_V: torch.Tensor, rule: Rule) -> tuple[list[int], np.ndarray, float]:
    """Ids, exact law, tail mass."""
    p = torch.softmax(logits_V.double(), -1).numpy()
    order = sorted(range(len(p)), key=lambda v: (-p[v], v))
    ids = [v for v in order if p[v] >= rule.min_prob][: rule.max_kept]
    return ids, p, float(np.delete(p, ids).sum())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 8.0))
def test_kept_ids_and_masses_are_those_of_the_slow_version(seed: int, scale: float) -> None:
    logits = logits_of(seed, rows=6, scale=scale)
    kept = kept_of(logits)
    for r, row in enumerate(rows_of(kept)):
        ids, p, tail = slow(logits[r], RULE)
        assert row["ids"].tolist() == ids
        np.testing.assert_allclose(row["p"], p[ids], rtol=2e-5)
        np.testing.assert_allclose(kept.tail_logp_mass[r].exp(), tail, rtol=2e-5, atol=1e-12)
        np.testing.assert_allclose(kept.token_logp[r], np.log(p[r % 50]), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(kept.entropy[r], -(p * np.log(p)).sum(), rtol=1e-4, atol=1e-5)
        assert not set(row["tail_ids"]) & set(ids)
        np.testing.assert_allclose(row["tail_logp"], np.log(p[row["tail_ids"]]), atol=1e-4)


def test_ties_are_kept_by_id() -> None:
    logits = torch.zeros(1, 30)
    logits[0, [7, 3, 21]] = 2.0
    rule = Rule(min_prob=0.0, max_kept=5, tail_samples=0, tail_full_mass=0.1, tail_min_mass=0.0)
    assert kept_of(logits, rule).ids.tolist() == [3, 7, 21, 0, 1]


def test_all_kept_leaves_an_empty_tail() -> None:
    rule = Rule(min_prob=0.0, max_kept=99, tail_samples=8, tail_full_mass=0.1, tail_min_mass=0.0)
    kept = kept_of(logits_of(1), rule)
    assert kept.kept.tolist() == [50] * 40
    assert kept.tail_logp_mass.isneginf().all()
    assert kept.tail_kept.sum() == 0
    torch.testing.assert_close(kept.p.view(40, 50).sum(-1), torch.ones(40))


def test_nothing_likely_keeps_nothing_and_samples_everything() -> None:
    rule = Rule(min_prob=0.5, max_kept=9, tail_samples=8, tail_full_mass=0.1, tail_min_mass=0.0)
    kept = kept_of(torch.zeros(3, 50), rule)
    assert kept.kept.tolist() == [0, 0, 0]
    torch.testing.assert_close(kept.tail_logp_mass, torch.zeros(3), atol=1e-6, rtol=0)
    assert kept.tail_kept.tolist() == [8, 8, 8]


def test_a_tiny_tail_keeps_its_digits() -> None:
    """1 − Σ kept in float32 would say 0 or 6e-8 here."""
    logits = torch.tensor([[0.0, -40.0, -41.0, -42.0]])
    rule = Rule(min_prob=0.1, max_kept=4, tail_samples=8, tail_full_mass=1.0, tail_min_mass=0.0)
    mass = kept_of(logits, rule).tail_logp_mass.double()
    want = torch.logsumexp(torch.tensor([-40.0, -41.0, -42.0], dtype=torch.float64), -1)
    torch.testing.assert_close(mass[0], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("mass", "count"), [(0.5, 16), (0.05, 16), (0.049, 16), (0.025, 8), (1.01e-4, 1), (9e-5, 0)]
)
def test_samples_fall_in_proportion_to_the_tail(mass: float, count: int) -> None:
    rule = Rule(min_prob=0, max_kept=1, tail_samples=16, tail_full_mass=0.05, tail_min_mass=1e-4)
    found = sample_count(torch.tensor([mass], dtype=torch.float64).log(), rule)
    assert found.tolist() == [count]


def test_samples_are_drawn_from_the_law_of_the_tail() -> None:
    logits, rows = logits_of(3, rows=1, scale=1.5), 20_000
    kept = kept_of(logits.expand(rows, -1).contiguous())
    ids, p, tail = slow(logits[0], RULE)
    counts = np.bincount(kept.tail_ids.numpy(), minlength=50)
    expected = p / tail * counts.sum()
    expected[ids] = 0
    assert counts[ids].sum() == 0
    inside = expected > 5
    chi2 = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    freedom = int(inside.sum()) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # some 4 standard deviations


def test_the_estimate_from_samples_is_unbiased() -> None:
    """α̂ = Σ_A min(p, q) + r · mean min(1, q/p), DESIGN §5."""
    logits, rows = logits_of(5, rows=1, scale=1.5), 20_000
    kept = kept_of(logits.expand(rows, -1).contiguous())
    ids, p, tail = slow(logits[0], RULE)
    q = torch.softmax(logits_of(6, rows=1)[0].double(), -1).numpy()
    draws = kept.tail_ids.numpy().reshape(rows, 8)
    estimate = np.minimum(p, q)[ids].sum() + tail * np.minimum(1, q / p)[draws].mean(-1)
    error = estimate.std() / rows**0.5
    assert abs(estimate.mean() - np.minimum(p, q).sum()) < 4 * error


def test_rows_do_not_depend_on_their_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(7)
    whole = kept_of(logits)
    monkeypatch.setattr(topk, "CHUNK_ELEMENTS", 800)
    monkeypatch.setattr(topk, "TILE_ELEMENTS", 100)
    for name, value in vars(kept_of(logits)).items():
        assert torch.equal(value, getattr(whole, name)), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("vocab_size", [50, 64])
def test_the_entropy_of_a_row_that_is_not_finite_is_not(bad: float, vocab_size: int) -> None:
    logits = logits_of(8, vocab_size=vocab_size)
    logits[11, 3] = bad
    logits[30, vocab_size - 1] = bad
    logits[31] = bad
    for rule in (RULE, rule_of(), rule_of(top_p=0.9)):
        for dtype in (torch.float32, torch.bfloat16):
            found = kept_of(logits.to(dtype), rule).entropy.isfinite()
            assert (~found).nonzero()[:, 0].tolist() == [11, 30, 31]


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_end_of_a_block_is_lost(vocab_size: int, dtype: torch.dtype) -> None:
    """Vocabularies of whole blocks, and with a short one at the end."""
    logits = logits_of(12, vocab_size=vocab_size, scale=1.0).to(dtype)
    logits[:, vocab_size - 1] = 4.0
    logits[:, block_size(vocab_size) - 1 : block_size(vocab_size) + 1] = 3.5
    kept = kept_of(logits, rule_of(min_prob=2e-3))
    for r, row in enumerate(rows_of(kept)):
        order, p = likeliest(logits[r])
        assert row["ids"].tolist() == order[: len(row["ids"])]
        assert len(row["ids"]) == min(12, int((p >= 2e-3).sum()))
        rest = order[len(row["ids"]) :]
        np.testing.assert_allclose(kept.tail_logp_mass[r].exp(), p[rest].sum(), rtol=1e-6)
        assert set(row["tail_ids"]) <= set(rest)


def test_a_row_is_kept_more_exactly_than_by_float32_softmax() -> None:
    logits = logits_of(13, rows=4, vocab_size=40_000, scale=6.0)
    kept, truth = kept_of(logits, rule_of(min_prob=1e-4)), torch.log_softmax(logits.double(), -1)
    row = torch.repeat_interleave(kept.kept)
    plain = torch.log_softmax(logits, -1).exp()[row, kept.ids].double()
    exact = truth[row, kept.ids].exp()
    assert (kept.p / exact - 1).abs().max() < 3e-7 < (plain / exact - 1).abs().max()
    outside = truth.exp().index_put((row, kept.ids), torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(
        kept.tail_logp_mass.double(), outside.sum(-1).log(), rtol=0, atol=1e-6
    )
    entropy = -(truth.exp() * truth).sum(-1)
    torch.testing.assert_close(kept.entropy.double(), entropy, rtol=0, atol=1e-6)


def rule_of(**changes: float) -> Rule:
    tail: dict[str, float] = {"tail_full_mass": 0.05, "tail_min_mass": 1e-4}
    return Rule(**{"tail_samples": 8, "max_kept": 12, **tail, **changes})  # type: ignore[arg-type]


def likeliest(logits_V: torch.Tensor) -> tuple[list[int], np.ndarray]:
    p = torch.softmax(logits_V.double(), -1).numpy()
    return sorted(range(len(p)), key=lambda v: (-p[v], v)), p


def test_a_fixed_rule_keeps_as_many_ids_in_every_row() -> None:
    logits = logits_of(9)
    logits[3] = logits[3].round()  # many ties, at the cut too
    kept = kept_of(logits, rule_of())
    for r, row in enumerate(rows_of(kept)):
        order, p = likeliest(logits[r])
        assert row["ids"].tolist() == order[:12]
        np.testing.assert_allclose(row["p"], p[order[:12]], rtol=2e-5)
        rest = np.delete(p, order[:12]).sum()
        np.testing.assert_allclose(kept.tail_logp_mass[r].exp(), rest, rtol=2e-5)
    assert kept_of(logits, rule_of(max_kept=99)).kept.tolist() == [50] * 40


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 8.0), top_p=st.floats(0.05, 0.999))
def test_a_nucleus_is_the_shortest_run_that_holds_top_p(
    seed: int, scale: float, top_p: float
) -> None:
    logits = logits_of(seed, rows=6, scale=scale)
    for r, row in enumerate(rows_of(kept_of(logits, rule_of(top_p=top_p)))):
        order, p = likeliest(logits[r])
        count = len(row["ids"])
        assert row["ids"].tolist() == order[:count]
        assert 1 <= count <= 12
        assert p[order[: count - 1]].sum() < top_p + 1e-5
        assert count == 12 or p[order[:count]].sum() >= top_p - 1e-5


@pytest.mark.parametrize("rule", [rule_of(), rule_of(top_p=0.9), RULE])
def test_no_rule_looks_beyond_its_row(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(11)
    whole = vars(kept_of(logits, rule))
    monkeypatch.setattr(topk, "CHUNK_ELEMENTS", 800)
    monkeypatch.setattr(topk, "TILE_ELEMENTS", 100)
    for name, value in vars(kept_of(logits, rule)).items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("vocab_size", [151_936, 201_088])
@pytest.mark.parametrize("rule", [rule_of(min_prob=1e-3), rule_of(), rule_of(top_p=0.9)])
def test_ids_beyond_2_to_the_17_survive_every_rule(vocab_size: int, rule: Rule) -> None:
    """Megatron packs 17 bits and refuses both vocabularies (reference/offline_caches.md)."""
    logits = torch.full((2, vocab_size), -4.0)
    ids = [vocab_size - 1, 2**17, 2**17 + 3, 5]
    logits[0, ids] = torch.tensor([12.0, 11.5, 11.0, 10.5])
    logits[1, 140_000:140_040] = 9.0  # more than are kept: the tail holds large ids only
    kept = kept_of(logits, rule)
    first, second = rows_of(kept)
    assert first["ids"][:2].tolist() == ids[:2]
    assert set(first["ids"][:4].tolist()) <= set(ids)
    assert second["ids"].tolist() == list(range(140_000, 140_000 + len(second["ids"])))
    assert (second["tail_ids"] >= 0).all()
    assert (second["tail_ids"] < vocab_size).all()
    assert (second["tail_ids"] >= 2**17).any()


class Widest(TorchDispatchMode):
    """The largest float32 or float64 tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype in (torch.float32, torch.float64):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("rule", [rule_of(min_prob=1e-3), rule_of(), rule_of(top_p=0.9)])
def test_no_wide_tensor_grows_with_the_rows(rule: Rule) -> None:
    """V = 262,144, bf16 logits of 24 rows: float32 exists for 16 of them at the most."""
    logits = torch.zeros(24, 262_144, dtype=torch.bfloat16)
    logits[:, :3] = 12.0
    with Widest() as widest:
        kept_of(logits, rule)
    assert widest.elements <= topk.CHUNK_ELEMENTS < logits.numel()
