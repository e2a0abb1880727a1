"""Samples of a law pass whoever the target; those of another target, or of another law, do not."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.sampled import ARITHMETIC, Surprise, require_samples, sum_up, surprise
from storage.errors import CacheError

ROWS, VOCABULARY = 800, 50


def laws(seed: int, *, sharp: float = 1.0) -> NDArray[np.float64]:
    """[C, V] log p of rows of random laws; a seed is a target."""
    logits = np.random.default_rng(seed).normal(size=(ROWS, VOCABULARY)) * 3 * sharp
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def samples(logp_CV: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    drawn = np.random.default_rng(seed).gumbel(size=logp_CV.shape)
    return (logp_CV + drawn).argmax(-1)


@pytest.mark.parametrize("sharp", [0.1, 1.0, 4.0])
def test_own_samples_pass(sharp: float) -> None:
    logp = laws(0, sharp=sharp)
    for seed in range(20):
        found = surprise(logp, samples(logp, seed), "T=1")
        assert found.rows == ROWS
        assert abs(found.mean) < 5 * found.standard_error
        require_samples(found, "T=1", "train cache")


def test_mean_and_variance_are_those_of_the_law() -> None:
    """Against the slow version: every token of a small law, weighed by its probability."""
    logp = np.log(np.array([[0.5, 0.3, 0.2]]))
    each = [surprise(logp, np.array([token]), "T=1") for token in range(3)]
    p = np.exp(logp[0])
    assert sum(w * one.excess for w, one in zip(p, each, strict=True)) == pytest.approx(0)
    second = sum(w * one.squares for w, one in zip(p, each, strict=True))
    assert each[0].variance == pytest.approx(second)


def test_samples_of_another_target_are_refused_and_more_peaked_ones_too() -> None:
    logp = laws(0)
    with pytest.raises(CacheError, match=r"train cache: what .* nats a token less likely .* T=1"):
        require_samples(surprise(logp, samples(laws(1), 0), "T=1"), "T=1", "train cache")
    with pytest.raises(
        CacheError, match=r"more likely than the target's own .*train_responses: data"
    ):
        require_samples(surprise(logp, logp.argmax(-1), "T=1"), "T=1", "train cache")


def test_the_likeliest_tokens_pass_at_zero_and_a_sibling_s_do_not() -> None:
    logp = laws(0)
    greedy = logp.argmax(-1)
    found = surprise(logp, greedy, "T=0")
    assert (found.excess, found.standard_error) == (0, 0)
    require_samples(found, "T=0", "greedy cache")
    sibling = (logp + np.random.default_rng(3).normal(size=logp.shape)).argmax(-1)
    assert 0 < (sibling != greedy).mean() < 0.5
    with pytest.raises(
        CacheError, match=r"greedy cache: .* T=0 \(800 replayed.*at most 0\.03 nats, for"
    ):
        require_samples(surprise(logp, sibling, "T=0"), "T=0", "greedy cache")
    near = surprise(logp, greedy, "T=0")
    rounded = Surprise(near.rows, near.rows * ARITHMETIC / 2, 0.0, 1.0)
    require_samples(rounded, "T=0", "greedy cache")


@pytest.mark.parametrize("law", ["data", "T=0.7", "T=1,top_p=0.9", ""])
def test_other_texts_are_not_asked(law: str) -> None:
    found = surprise(laws(0), samples(laws(1), 0), law)
    assert found == Surprise()
    require_samples(found, law, "train cache")


def test_rows_add_up_and_an_impossible_id_counts_nothing() -> None:
    logp = laws(0)
    token = samples(logp, 0)
    parts = sum_up([surprise(logp[a:b], token[a:b], "T=1") for a, b in ((0, 300), (300, ROWS))])
    whole = surprise(logp, token, "T=1")
    assert parts.rows == whole.rows
    assert parts.mean == pytest.approx(whole.mean)
    assert parts.standard_error == pytest.approx(whole.standard_error)
    ruled_out = np.hstack([logp, np.full((ROWS, 1), -np.inf)])
    assert surprise(ruled_out, token, "T=1").variance == pytest.approx(whole.variance)
