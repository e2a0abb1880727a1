"""Intervals cover, families hold together, verdicts say what the interval says."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import ndtr

from pipeline.statistics import (
    Bootstrap,
    Difference,
    Interval,
    Pair,
    Panel,
    agree,
    compare,
    digits_for,
    log_tau,
    over_seeds,
    percent,
    tau,
    verdict,
)

RNG = np.random.default_rng(20240)


def panel(rounds: np.ndarray, *, strata: list[str] | None = None) -> Panel:
    """Every prompt 64 tokens."""
    tokens = np.full(rounds.shape, 64.0)
    return Panel(tokens, rounds, np.array(strata or ["a"] * rounds.shape[1]))


def experiment(
    rng: np.random.Generator, *, seeds: int, prompts: int, ratio: float, effect: float
) -> tuple[Panel, Pair]:
    """Paired log-rounds = effect + seed + prompt + interaction; `ratio` is var(seed)/var(prompt).

    var(prompt) here is that of a mean over prompts, so that ratio 1 makes both matter alike.
    """
    spread = 0.05
    ease = rng.normal(0, 0.2, prompts)
    paired = rng.normal(0, spread, prompts)
    rows = []
    for _ in range(seeds):
        seed = rng.normal(0, spread * np.sqrt(ratio / prompts))
        cross = rng.normal(0, spread, prompts) * 0.5
        rows.append(np.exp(2.5 + ease - effect - seed - paired - cross))
    rows += [np.exp(2.5 + ease)] * seeds
    pair = Pair(tuple(range(seeds)), tuple(range(seeds, 2 * seeds)))
    return panel(np.array(rows)), pair


def effect_of_population(effect: float) -> float:
    """The log ratio of expected rounds: E exp(−paired − cross) lifts the arm's rounds a little."""
    return effect - (0.05**2 + 0.025**2) / 2


@pytest.mark.parametrize(
    ("seeds", "ratio"), [(3, 0.0), (3, 1.0), (5, 0.1)], ids=["3/0", "3/1", "5/0.1"]
)
def test_intervals_cover(seeds: int, ratio: float) -> None:
    """300 experiments: over seeds never below nominal, these seeds near it where seeds agree."""
    rng = np.random.default_rng([seeds, int(10 * ratio)])
    truth = np.expm1(effect_of_population(0.03))
    these = over = 0
    for k in range(300):
        made, pair = experiment(rng, seeds=seeds, prompts=60, ratio=ratio, effect=0.03)
        found = compare(made, [pair], confidence=0.95, resamples=400, seed=k)[0]
        assert found.over_seeds is not None
        these += found.these_seeds.lo <= truth <= found.these_seeds.hi
        over += found.over_seeds.lo <= truth <= found.over_seeds.hi
    # four standard errors of a proportion of 300 at 95 % are 5 points
    assert over / 300 >= 0.93
    if ratio == 0:
        assert 0.90 <= these / 300 <= 0.99


def test_these_seeds_miss_what_seeds_vary() -> None:
    """With large seed effects the two intervals part: the second is the honest one."""
    rng = np.random.default_rng(5)
    made, pair = experiment(rng, seeds=3, prompts=60, ratio=30.0, effect=0.03)
    found = compare(made, [pair], confidence=0.95, resamples=400, seed=0)[0]
    assert found.over_seeds is not None
    width = found.these_seeds.hi - found.these_seeds.lo
    assert found.over_seeds.hi - found.over_seeds.lo > 2 * width


def test_over_seeds_is_withheld_below_three_seeds() -> None:
    made, pair = experiment(RNG, seeds=2, prompts=30, ratio=0.0, effect=0.03)
    found = compare(made, [pair], confidence=0.95, resamples=400, seed=0)[0]
    assert found.over_seeds is None
    assert found.verdict == found.these_seeds


def test_half_width_combines_both_variances_with_their_own_t() -> None:
    by_seed = np.array([0.01, 0.02, 0.03])
    half, error = over_seeds(by_seed, 0.004, prompts=100, confidence=0.95)
    # s²/S = 1e-4/3; t(2) = 4.3027, t(99) = 1.9842
    assert half == pytest.approx(np.sqrt(4.3027**2 * 1e-4 / 3 + 1.9842**2 * 1.6e-5), rel=1e-4)
    assert error == pytest.approx(np.sqrt(1e-4 / 3 + 1.6e-5))


def test_tau_is_the_ratio_of_sums_not_the_mean_of_ratios() -> None:
    made = Panel(np.array([[10.0, 90.0]]), np.array([[10.0, 30.0]]), np.array(["a", "a"]))
    assert np.exp(log_tau(made))[0] == pytest.approx(2.5)


def test_bootstrap_agrees_with_a_plain_loop() -> None:
    """Counts and matrix products are only a faster way to resample prompts."""
    rng = np.random.default_rng(1)
    rounds = rng.uniform(10, 30, (2, 40))
    boot = Bootstrap(panel(rounds), np.array([[1.0, -1.0]]), resamples=4000, seed=3)
    slow = []
    for _ in range(4000):
        index = rng.integers(0, 40, 40)
        slow.append(np.log(rounds[1, index].sum()) - np.log(rounds[0, index].sum()))
    assert boot.error[0] == pytest.approx(np.std(slow), rel=0.06)
    lo, hi = boot.interval(0.95)
    assert lo[0] == pytest.approx(np.quantile(slow, 0.025), abs=0.2 * boot.error[0])
    assert hi[0] == pytest.approx(np.quantile(slow, 0.975), abs=0.2 * boot.error[0])


def test_resampling_keeps_the_size_of_each_domain() -> None:
    """A difference between domains is no uncertainty of a mean over both."""
    rounds = np.array([[10.0] * 20 + [40.0] * 20])
    mixed = panel(rounds, strata=["code"] * 20 + ["prose"] * 20)
    assert Bootstrap(mixed, np.eye(1), resamples=300, seed=0).error[0] < 1e-9


def test_ends_are_raised_as_students_t_with_the_kurtosis_of_the_prompts() -> None:
    """Equal influences up to sign: V's own variance is nil but for centring; one heavy prompt: a
    degree of freedom or two."""
    even = panel(np.tile([[20.0, 21.0]], (2, 30)) * np.array([[1.0], [1.0]]))
    even.rounds[0] = np.tile([20.0, 21.0], 30)
    even.rounds[1] = np.tile([21.0, 20.0], 30)
    contrast = np.array([[1.0, -1.0]])
    calm = Bootstrap(even, contrast, resamples=4000, seed=0)
    # two values, half the prompts each: all that is left is the stretch by n / (n - 1)
    assert calm.students(0.95) == pytest.approx(2 * ndtr(1.95996 * np.sqrt(60 / 59)) - 1, abs=1e-5)
    rng = np.random.default_rng(3)
    normal = panel(np.exp(rng.normal(3, 0.1, (2, 60))))
    level = Bootstrap(normal, contrast, resamples=4000, seed=0).students(0.95)
    # kurtosis 3: 2 V² / Var V = n, so about t of 60 degrees
    assert level == pytest.approx(2 * ndtr(2.0003 * np.sqrt(60 / 59)) - 1, abs=0.004)
    normal.rounds[0, 0] *= 40
    assert Bootstrap(normal, contrast, resamples=4000, seed=0).students(0.95) > 0.99


def test_a_family_widens_its_intervals_and_copies_do_not() -> None:
    rng = np.random.default_rng(2)
    rounds = rng.uniform(10, 30, (13, 80))
    made = panel(rounds)
    pairs = [Pair((k,), (0,)) for k in range(1, 13)]
    alone = compare(made, pairs[:1], confidence=0.95, resamples=2000, seed=0)[0].these_seeds
    joint = compare(made, pairs, confidence=0.95, resamples=2000, seed=0)[0].these_seeds
    copies = compare(made, pairs[:1] * 12, confidence=0.95, resamples=2000, seed=0)[0].these_seeds
    assert joint.hi - joint.lo > 1.2 * (alone.hi - alone.lo)
    assert copies.hi - copies.lo < 1.05 * (alone.hi - alone.lo)


def test_an_arm_against_itself_differs_by_nothing() -> None:
    found = compare(
        panel(RNG.uniform(10, 30, (2, 20))[[0, 0]]),
        [Pair((0,), (1,))],
        confidence=0.95,
        resamples=300,
        seed=0,
    )[0]
    assert found.these_seeds == Interval(0.0, 0.0, 0.0)
    assert not found.these_seeds.decided


def test_a_difference_as_large_as_detectable_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(8)
    made, pair = experiment(rng, seeds=1, prompts=60, ratio=0.0, effect=0.0)
    size = compare(made, [pair], confidence=0.95, resamples=400, seed=0)[0].detectable
    found = 0
    for k in range(120):
        effect = float(np.log1p(size)) - effect_of_population(0.0)
        made, pair = experiment(rng, seeds=1, prompts=60, ratio=0.0, effect=effect)
        found += compare(made, [pair], confidence=0.95, resamples=300, seed=k)[0].verdict.decided
    assert 0.65 <= found / 120 <= 0.93


def test_tau_without_a_domain_s_prompts_has_no_interval() -> None:
    made = Panel(np.zeros((1, 4)), np.zeros((1, 4)), np.array(["a"] * 4))
    found = tau(made, confidence=0.95, resamples=300, seed=0)[0]
    assert np.isnan([found.estimate, found.lo, found.hi]).all()


def test_a_domain_of_one_prompt_decides_nothing() -> None:
    """Half the resamples lack it: no interval, and nothing breaks."""
    rounds = RNG.uniform(10, 30, (2, 6))
    inside = np.array([1.0, 0, 0, 0, 0, 0])
    made = Panel(64 * inside * np.ones((2, 6)), rounds * inside, np.array(["a"] + ["b"] * 5))
    found = compare(made, [Pair((0,), (1,))], confidence=0.95, resamples=300, seed=0)[0]
    assert not found.verdict.decided
    assert np.isnan([found.verdict.lo, found.verdict.hi]).all()


def test_predicted_and_measured_agree_up_to_luck_and_part_beyond() -> None:
    rng = np.random.default_rng(4)
    exact = rng.uniform(10, 30, (6, 100))
    luck = exact * np.exp(rng.normal(0, 0.1, exact.shape))
    fair, point = agree(panel(exact), panel(luck), resamples=1000, seed=0)
    assert max(abs(a.z) for a in fair) < point
    assert 3.0 < point < 3.5  # Student, 99 degrees of freedom, 1 % over six arms, two-sided
    wrong, _ = agree(panel(exact), panel(luck * 1.1), resamples=1000, seed=0)
    assert min(abs(a.z) for a in wrong) > point
    assert wrong[0].difference == pytest.approx(1 / 1.1 - 1, abs=0.03)


def test_unequal_rounds_are_counted() -> None:
    exact = np.array([[10.0, 11.0, 12.0]])
    other = np.array([[10.0, 12.0, 12.0 + 1e-9]])
    assert agree(panel(exact), panel(other), resamples=300, seed=0)[0][0].unequal == 1


def made_up(estimate: float, lo: float, hi: float, *, seeds: int = 3) -> Difference:
    interval = Interval(estimate, lo, hi)
    return Difference(seeds, 256, interval, interval if seeds >= 3 else None, 0.012)


@pytest.mark.parametrize(
    ("difference", "sentence"),
    [
        (
            made_up(0.038, 0.034, 0.042),
            "lk_lambda is 3.8 % [3.4, 4.2] longer than kl at T = 1 over 3 seeds",
        ),
        (
            made_up(-0.02, -0.03, -0.01),
            "lk_lambda is 2.0 % [1.0, 3.0] shorter than kl at T = 1 over 3 seeds",
        ),
        (
            made_up(0.002, -0.008, 0.012),
            (
                "no difference between lk_lambda and kl at T = 1 over 3 seeds that 256 prompts can "
                "show: +0.2 % [−0.8, +1.2]; one of 1.2 % would probably have shown"
            ),
        ),
        (
            replace(made_up(0.02, -0.01, 0.05), these_seeds=Interval(0.02, 0.01, 0.03)),
            (
                "no difference between lk_lambda and kl at T = 1 that 3 seeds can show: "
                "+2.0 % [−1.0, +5.0]; one of 1.2 % would probably have shown"
            ),
        ),
        (
            made_up(0.038, 0.034, 0.042, seeds=1),
            "lk_lambda is 3.8 % [3.4, 4.2] longer than kl at T = 1 for this one seed",
        ),
        (
            made_up(0.038, 0.034, 0.042, seeds=2),
            "lk_lambda is 3.8 % [3.4, 4.2] longer than kl at T = 1 for these 2 seeds alone",
        ),
    ],
)
def test_verdict_in_plain_words(difference: Difference, sentence: str) -> None:
    found = verdict(difference, objective="lk_lambda", baseline="kl", temperature=1.0)
    assert found == sentence


def test_an_end_beside_zero_is_not_printed_as_zero() -> None:
    assert digits_for(Interval(0.02, 0.0004, 0.04)) == 2
    assert digits_for(Interval(0.02, 0.01, 0.03)) == 1
    assert percent(-0.0001) == "0.0"
    assert percent(-0.0123) == "−1.2"
