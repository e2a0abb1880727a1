"""Strata of anchors against a slow count, and the entropy of a stored law against the full one."""

import numpy as np
import pytest
import torch

from pipeline.batch import Batch
from pipeline.law import DenseLaw, SparseLaw
from pipeline.score import NATS, POSITIONS, Scores, entropy, strata


def test_entropy_of_kept_ids_and_a_merged_tail_is_that_of_the_law() -> None:
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    whole = SparseLaw(
        entry_start=torch.tensor([0, 4]),
        ids=torch.arange(4),
        p=p,
        weight=torch.ones(4),
        bucket=torch.zeros(1),
    )
    merged = SparseLaw(
        entry_start=torch.tensor([0, 3]),
        ids=torch.arange(3),
        p=p[:3],
        weight=torch.ones(3),
        bucket=p[3:],
    )
    exact = float(-(p * p.log()).sum())
    assert float(entropy(whole)) == pytest.approx(exact, rel=1e-6)
    assert float(entropy(merged)) == pytest.approx(exact, rel=1e-6)
    assert float(entropy(DenseLaw(p.log()[None]))) == pytest.approx(exact, rel=1e-6)


def test_entropy_is_unbiased_where_the_tail_is_sampled() -> None:
    """Of 4,000 draws of two tail samples each, within 4 standard errors."""
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(40, generator=generator) * 1.5, 0).sort(descending=True).values
    tail, draws, m = p[5:], 4000, 2
    r = tail.sum()
    picked = torch.multinomial(tail, draws * m, replacement=True, generator=generator)
    ids = torch.cat([torch.arange(5).expand(draws, 5), 5 + picked.view(draws, m)], 1)
    law = SparseLaw(
        entry_start=torch.arange(draws + 1) * (5 + m),
        ids=ids.flatten(),
        p=p[ids].flatten(),
        weight=torch.where(ids < 5, 1.0, r / (m * p[ids])).flatten(),
        bucket=torch.zeros(draws),
    )
    found = entropy(law)
    error = float(found.std()) / draws**0.5
    assert abs(float(found.mean()) - float(-(p * p.log()).sum())) < 4 * error


def test_strata_count_each_anchor_where_its_round_starts() -> None:
    """Two turns in one sequence, one in another; the slow count walks anchors one by one."""
    rng = np.random.default_rng(1)
    turn = torch.tensor([[-1, 0, 0, 0, 0, -1, 1, 1, 1, 1], [-1, -1, 0, 0, 0, 0, 0, 0, -1, -1]])
    follows = (turn[:, 1:] == turn[:, :-1]) & (turn[:, 1:] >= 0)
    rows = torch.nn.functional.pad(follows, (0, 1))
    law_row = torch.where(rows, rows.flatten().cumsum(0).view(turn.shape) - 1, -1)
    logp = torch.randn(int(rows.sum()), 8).mul(3).log_softmax(-1)
    batch = Batch(
        ids=("a", "b"),
        domains=("x", "x"),
        tokens=torch.zeros(turn.shape, dtype=torch.int64),
        length=torch.tensor([10, 8]),
        turn=turn,
        token_logp=torch.zeros(turn.shape),
        law_row=law_row,
        law=DenseLaw(logp),
        hidden=None,
        last_hidden=None,
    )
    depth = 3
    pair = np.zeros((depth, *turn.shape), dtype=bool)
    for k in range(depth):
        pair[k].reshape(-1)[batch.pairs(k).anchor.numpy()] = True
    logr = np.where(pair, rng.normal(-0.5, 1, pair.shape), -np.inf)
    scores = Scores(pair=pair, logr=logr, alpha={"alpha": np.where(pair, 0.5, 0.0)})
    nats = -(logp.exp() * logp).sum(-1)
    slow: dict[tuple[str, float, int], list[float]] = {}
    for k, b, j in np.argwhere(pair).tolist():
        first = next(i for i in range(j + 1, -1, -1) if i == 0 or turn[b, i - 1] != turn[b, j + 1])
        for kind, value, edges in (
            ("position", j + 2 - first, POSITIONS),
            ("entropy", float(nats[law_row[b, j + 1]]), NATS),
        ):
            lo = max(edge for edge in edges if edge <= value)
            sums = slow.setdefault((kind, lo, k), [0.0, 0.0])
            sums[0] += 1
            sums[1] += float(np.exp(np.minimum(logr[: k + 1, b, j], 0).sum()))
    found = {(r["by"], r["lo"], r["depth"]): r for r in strata(scores, batch)}
    assert found.keys() == slow.keys()
    for key, (anchors, survive) in slow.items():
        assert found[key]["anchors"] == anchors
        assert found[key]["survive"] == pytest.approx(survive)
        assert found[key]["alpha"] == pytest.approx(anchors / 2)
