"""The simulated experiments have the truth that they are said to have; the intervals hold it."""

import numpy as np
import pytest

from benchmarks.coverage import (
    REGIMES,
    Setting,
    coverage,
    experiment,
    seed_deviation,
    truth,
)


@pytest.mark.parametrize("regime", sorted(REGIMES))
def test_the_closed_form_is_what_many_prompts_and_seeds_say(regime: str) -> None:
    """By brute force: the ratio of all rounds of 400 experiments, 300,000 pairs."""
    rng = np.random.default_rng(0)
    base = arm = 0.0
    for _ in range(400):
        panel, _, _ = experiment(rng, Setting(regime, 3, 0.0))
        base += panel.rounds[:3].sum()
        arm += panel.rounds[3:].sum()
    assert np.log(base / arm) == pytest.approx(truth(REGIMES[regime]), abs=4e-4)


def test_intervals_hold_what_is_true() -> None:
    """100 experiments a cell, four standard errors wide; coverage.md has thousands."""
    alike = coverage(Setting("sampled", 3, 0.0), experiments=100, resamples=400)
    assert alike.over / 100 >= 0.92
    assert 0.86 <= alike.these / 100 <= 1
    assert alike.these == alike.these_of_all
    apart = seed_deviation(REGIMES["sampled"], 0.1, components=True)
    split = coverage(Setting("sampled", 3, apart), experiments=100, resamples=400)
    assert split.over / 100 >= 0.86
    # what the trained drafts alone say is not what all seeds say
    assert split.these_of_all / 100 < 0.8
    assert split.these / 100 >= 0.86


def test_a_family_holds_together() -> None:
    found = coverage(Setting("sampled", 3, 0.0, arms=7), experiments=40, resamples=1000)
    assert found.over / 40 >= 0.85
    assert found.these / 40 >= 0.8
