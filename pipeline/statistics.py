"""Paired comparisons of arms: two named intervals, verdicts in words, predicted against measured.

Knows tokens and rounds by prompt, not arms, drafts or files. numpy and scipy only.

Dims: C columns (an arm at one temperature and γ), N prompts, S seeds, R resamples, Q contrasts.

The quantity is log τ, τ = Σ tokens / Σ rounds over prompts (micro-average); a comparison is the
mean over seeds of log τ_arm − log τ_baseline, same seed, same prompts, printed as a relative
difference exp(·) − 1. Turns of one conversation come in as one prompt, their sums added. Two
intervals, never mixed:

*these seeds*
    What would other prompts of the same domains say of these very drafts? BCa bootstrap by prompt
    (`scipy.stats.bootstrap`), stratified by domain, all comparisons on the same resamples. Made
    simultaneous by max-T: the pointwise level is raised until the largest standardised deviation
    of the family lies inside at the stated confidence. A bootstrap takes its own spread for the
    truth, so that a few long answers which carry most of it make the ends too near; the level is
    raised as Student's t is wider than the normal law, with as many degrees of freedom as the
    kurtosis of the prompts' influence leaves (Satterthwaite's; `_freedom`). benchmarks/coverage.md
    counts what the intervals hold.

*over seeds*
    What would other seeds and other prompts say of the objective? With seed s and prompts crossed,

        D_s = μ + A_s + P + E_s,   A_s the seed's, P the prompts', E_s their interaction's share,

    the mean over seeds has variance σ_A²/S + σ_P²/N + σ_I²/(N S). The spread of the D_s gives
    V_seed = s²(D)/S, unbiased for σ_A²/S + σ_I²/(N S); the prompt bootstrap of the mean gives
    V_prompt, which estimates σ_P²/N + σ_I²/(N S): their sum counts the interaction twice and so is
    never too small. The half-width is

        h = sqrt( t²_{S-1} V_seed + t²_{N-1} V_prompt ),

    whose coverage is at least nominal whatever the two shares (Banerjee 1960): with w the share of
    the seeds in the variance and F the χ²₁ distribution function, which is concave, coverage is
    E F(w t²_{S-1} U_1 + (1-w) t²_{N-1} U_2) ≥ w·E F(t²_{S-1} U_1) + (1-w)·E F(t²_{N-1} U_2), and
    both expectations are the nominal level. A Satterthwaite t has no such floor at S = 3.
    Simultaneous by Bonferroni, because three seeds cannot tell how comparisons correlate.
    Withheld with fewer than three seeds.

Verdicts are those of the interval over seeds, or, where it is withheld, of these seeds and say so.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MIN_SEEDS = 3
POWER = 0.8  # of the minimum detectable difference; the convention of trial design
FAMILYWISE = 0.99  # of predicted against measured (DESIGN §7)
ROUND_TOLERANCE = 1e-6  # an expectation of whole rounds is whole but for float64 rounding


@dataclass(frozen=True)
class Panel:
    """C columns over the same N prompts; a prompt that a column lacks has 0 tokens, 0 rounds."""

    tokens: Floats
    """[C, N]."""
    rounds: Floats
    """[C, N]."""
    strata: NDArray[Any]
    """[N] domain of each prompt: resampling keeps every domain's number of prompts."""


@dataclass(frozen=True)
class Pair:
    """Columns of an arm and of its baseline, one per seed, in the same order of seeds."""

    arm: tuple[int, ...]
    baseline: tuple[int, ...]


@dataclass(frozen=True)
class Interval:
    """An estimate between its ends."""

    estimate: float
    lo: float
    hi: float

    @property
    def decided(self) -> bool:
        """The interval excludes zero."""
        return self.lo > 0 or self.hi < 0


@dataclass(frozen=True)
class Difference:
    """A relative difference of τ to the baseline, as a fraction."""

    seeds: int
    prompts: int
    these_seeds: Interval
    over_seeds: Interval | None
    detectable: float
    """Smallest true difference that the verdict's interval would show four times in five."""

    @property
    def verdict(self) -> Interval:
        """The interval that decides."""
        return self.over_seeds or self.these_seeds


@dataclass(frozen=True)
class Agreement:
    """Predicted (replay) against measured (decode) τ of one arm, same prompts and limits."""

    predicted: float
    measured: float
    difference: float
    """Relative, measured over predicted, as a fraction."""
    z: float
    unequal: int
    """Prompts whose numbers of rounds differ; meaningful at T = 0, where both are whole."""
    prompts: int


def log_tau(panel: Panel) -> Floats:
    """[C] log of Σ tokens / Σ rounds."""
    return _log_ratio(panel.tokens.sum(axis=1), panel.rounds.sum(axis=1))


def _log_ratio(tokens: Floats, rounds: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):  # a column without prompts is nan
        return np.log(tokens) - np.log(rounds)


class Bootstrap:
    """A joint bootstrap by prompt of Q contrasts of log τ.

    One resampling serves all contrasts: a resample is a vector of counts by prompt, so that the
    sums of all columns are one matrix product.
    """

    def __init__(self, panel: Panel, contrasts_QC: Floats, *, resamples: int, seed: int) -> None:
        self._panel, self._contrasts_QC = panel, contrasts_QC
        self._resamples, self._seed = resamples, seed
        self.estimate = contrasts_QC @ log_tau(panel)
        self._result = self._run(0.95, None)  # the draws; their ends come when asked for
        self.draws_QR: Floats = np.asarray(self._result.bootstrap_distribution)
        self.error: Floats = self.draws_QR.std(axis=1, ddof=1)

    def interval(self, confidence: float) -> tuple[Floats, Floats]:
        """BCa ends of every contrast, not simultaneous: lo [Q], hi [Q]."""
        ends = self._run(self.students(confidence), self._result).confidence_interval
        still = self.error <= 1e-12 * np.maximum(1.0, np.abs(self.estimate))  # BCa is nan there
        lo = np.where(still, self.estimate, np.asarray(ends.low))
        return lo, np.where(still, self.estimate, np.asarray(ends.high))

    def pointwise(self, confidence: float) -> float:
        """The pointwise level at which all Q contrasts hold together (max-T)."""
        from scipy.special import ndtr

        moving = self.error > 1e-12
        if not moving.any():
            return confidence
        deviation_QR = np.abs(self.draws_QR[moving] - self.estimate[moving, None])
        largest_R = (deviation_QR / self.error[moving, None]).max(axis=0)
        point = np.quantile(largest_R, confidence)
        return max(confidence, float(2 * ndtr(point) - 1))

    def students(self, confidence: float) -> float:
        """The level at which normal ends lie where Student's would (module docstring)."""
        from scipy.special import ndtr, stdtrit

        influence_QN = self._contrasts_QC @ _influence(self._panel)
        freedom, stretch = _freedom(influence_QN, _strata(self._panel.strata))
        point = stretch * stdtrit(freedom, (1 + confidence) / 2)
        return float(min(2 * ndtr(point) - 1, 1 - 2 / self._resamples))

    def _run(self, confidence: float, before: Any) -> Any:
        from scipy.stats import bootstrap

        strata = _strata(self._panel.strata)
        with warnings.catch_warnings():
            # a contrast that no resample moves is degenerate to BCa; `interval` gives it width 0
            warnings.simplefilter("ignore")
            return bootstrap(
                strata,
                self._statistic,
                vectorized=True,
                n_resamples=0 if before is not None else self._resamples,
                confidence_level=confidence,
                method="percentile" if before is None else "BCa",
                bootstrap_result=before,
                rng=np.random.default_rng(self._seed),
            )

    def _statistic(self, *samples: NDArray[Any], axis: int = -1) -> Floats:
        """Contrasts of resampled prompts: indices [..., n] by stratum -> [Q, ...]."""
        index = np.concatenate(samples, axis=axis).astype(np.int64)
        flat = index.reshape(-1, index.shape[-1])
        num_rows, num_prompts = len(flat), self._panel.tokens.shape[1]
        shifted = flat + num_prompts * np.arange(num_rows)[:, None]
        counts = np.bincount(shifted.ravel(), minlength=num_rows * num_prompts)
        counts_NR = counts.reshape(num_rows, num_prompts).T.astype(np.float64)
        logs = _log_ratio(self._panel.tokens @ counts_NR, self._panel.rounds @ counts_NR)
        values: Floats = (self._contrasts_QC @ logs).reshape(-1, *index.shape[:-1])
        return values


def _influence(panel: Panel) -> Floats:
    """[C, N]: what each prompt adds to log τ, to first order."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a column without prompts is nan
        share_of_tokens = panel.tokens / panel.tokens.sum(axis=1, keepdims=True)
        share_of_rounds = panel.rounds / panel.rounds.sum(axis=1, keepdims=True)
    influence: Floats = share_of_tokens - share_of_rounds
    return influence


def _freedom(influence_QN: Floats, strata: Sequence[NDArray[np.int64]]) -> tuple[float, float]:
    """Degrees of freedom of the bootstrap's variance, the fewest of Q, and by what it falls short.

    V = Σ_d Σ_n u² of influences centred in their domain d has the variance Σ_d n_d (m4 − m2²);
    freedom is 2 V² / Var V. Each domain's part is short of unbiased by (n_d − 1) / n_d.
    """
    total, unbiased, spread = (np.zeros(len(influence_QN)) for _ in range(3))
    for index in strata:
        u_QN = influence_QN[:, index] - influence_QN[:, index].mean(axis=1, keepdims=True)
        squares, size = (u_QN**2).sum(axis=1), len(index)
        total += squares
        unbiased += squares * size / max(1, size - 1)
        spread += (u_QN**4).sum(axis=1) - squares**2 / size
    moving = (total > 1e-24) & (spread > 0)  # an arm against itself, or a domain that is not there
    if not moving.any():
        return np.inf, 1.0
    freedom = (2 * total[moving] ** 2 / spread[moving]).min()
    return max(1.0, float(freedom)), float(np.sqrt((unbiased[moving] / total[moving]).max()))


def _strata(strata_N: NDArray[Any]) -> tuple[NDArray[np.int64], ...]:
    """Indices of the prompts of each domain; one stratum where a domain has a single prompt."""
    names, sizes = np.unique(strata_N, return_counts=True)
    if sizes.min() < 2:
        return (np.arange(len(strata_N)),)
    return tuple(np.flatnonzero(strata_N == name) for name in names)


def tau(panel: Panel, *, confidence: float, resamples: int, seed: int) -> list[Interval]:
    """τ of every column with its BCa interval by prompt; each on its own, not simultaneous."""
    num_prompts = panel.tokens.shape[1]
    estimate = np.exp(log_tau(panel))
    if num_prompts < 2:
        return [Interval(float(e), float("nan"), float("nan")) for e in estimate]
    boot = Bootstrap(panel, np.eye(len(estimate)), resamples=resamples, seed=seed)
    lo, hi = boot.interval(confidence)
    return [
        Interval(float(e), float(a), float(b))
        for e, a, b in zip(estimate, np.exp(lo), np.exp(hi), strict=True)
    ]


def compare(
    panel: Panel, pairs: Sequence[Pair], *, confidence: float, resamples: int, seed: int
) -> list[Difference]:
    """Differences of all pairs as one family: each named interval is simultaneous over it."""
    if not pairs:
        return []
    logs = log_tau(panel)
    contrasts_QC = np.zeros((len(pairs), len(logs)))
    for row, pair in zip(contrasts_QC, pairs, strict=True):
        row[list(pair.arm)] += 1 / len(pair.arm)
        row[list(pair.baseline)] -= 1 / len(pair.baseline)
    boot = Bootstrap(panel, contrasts_QC, resamples=resamples, seed=seed)
    level = boot.pointwise(confidence)
    lo, hi = boot.interval(level)
    family = sum(len(pair.arm) >= MIN_SEEDS for pair in pairs)
    differences = []
    for k, pair in enumerate(pairs):
        used = panel.tokens[list(pair.arm)].any(axis=0)
        differences.append(
            _difference(
                logs[list(pair.arm)] - logs[list(pair.baseline)],
                (float(lo[k]), float(hi[k])),
                error=float(boot.error[k]),
                prompts=int(used.sum()),
                level=boot.students(level),
                seeds_level=1 - (1 - confidence) / max(1, family),
            )
        )
    return differences


def _difference(
    by_seed_S: Floats,
    ends: tuple[float, float],
    *,
    error: float,
    prompts: int,
    level: float,
    seeds_level: float,
) -> Difference:
    from scipy.special import ndtri

    mean = float(by_seed_S.mean())
    over, half, spread = None, float(ndtri((1 + level) / 2)) * error, error
    if len(by_seed_S) >= MIN_SEEDS:
        half, spread = over_seeds(by_seed_S, error, prompts=prompts, confidence=seeds_level)
        over = _relative(mean, mean - half, mean + half)
    return Difference(
        seeds=len(by_seed_S),
        prompts=prompts,
        these_seeds=_relative(mean, *ends),
        over_seeds=over,
        detectable=float(np.expm1(half + ndtri(POWER) * spread)),
    )


def over_seeds(
    by_seed_S: Floats, prompt_error: float, *, prompts: int, confidence: float
) -> tuple[float, float]:
    """Half-width and standard error of the mean over seeds and prompts (module docstring)."""
    from scipy.special import stdtrit

    num_seeds = len(by_seed_S)
    seed_variance = float(by_seed_S.var(ddof=1)) / num_seeds
    upper = (1 + confidence) / 2
    t_seed, t_prompt = stdtrit(num_seeds - 1, upper), stdtrit(max(1, prompts - 1), upper)
    half = np.sqrt(t_seed**2 * seed_variance + t_prompt**2 * prompt_error**2)
    return float(half), float(np.sqrt(seed_variance + prompt_error**2))


def _relative(mean: float, lo: float, hi: float) -> Interval:
    return Interval(float(np.expm1(mean)), float(np.expm1(lo)), float(np.expm1(hi)))


def agree(
    predicted: Panel, measured: Panel, *, resamples: int, seed: int
) -> tuple[list[Agreement], float]:
    """Predicted against measured τ, column by column, and the familywise point for |z|.

    T > 0: the standard error of the paired difference is the prompt bootstrap's; the point is
    Student's with N − 1 degrees of freedom at 99 % familywise (Bonferroni over the columns).
    """
    from scipy.special import stdtrit

    num_columns, num_prompts = measured.tokens.shape
    both = Panel(
        tokens=np.vstack([predicted.tokens, measured.tokens]),
        rounds=np.vstack([predicted.rounds, measured.rounds]),
        strata=measured.strata,
    )
    contrasts_QC = np.hstack([-np.eye(num_columns), np.eye(num_columns)])
    boot = Bootstrap(both, contrasts_QC, resamples=resamples, seed=seed)
    unequal_C = (np.abs(predicted.rounds - measured.rounds) > ROUND_TOLERANCE).sum(axis=1)
    taus = np.exp(log_tau(both))
    rows = [
        Agreement(
            predicted=float(taus[c]),
            measured=float(taus[num_columns + c]),
            difference=float(np.expm1(boot.estimate[c])),
            z=float(boot.estimate[c] / boot.error[c]) if boot.error[c] > 1e-12 else 0.0,
            unequal=int(unequal_C[c]),
            prompts=num_prompts,
        )
        for c in range(num_columns)
    ]
    tail = (1 - FAMILYWISE) / (2 * num_columns)
    return rows, float(stdtrit(num_prompts - 1, 1 - tail))


def percent(value: float, *, digits: int = 1) -> str:
    """A fraction as a signed number of percent without the sign of percent: `+3.8`, `−0.4`."""
    text = f"{100 * value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def digits_for(interval: Interval) -> int:
    """Digits of percent that keep the ends apart, and off zero where the interval excludes it."""
    nearest = 100 * min(abs(interval.lo), abs(interval.hi))
    return 2 if 100 * (interval.hi - interval.lo) < 0.3 or nearest < 0.05 else 1


def verdict(difference: Difference, *, objective: str, baseline: str, temperature: float) -> str:
    """One comparison in plain words, in the manner of a results section."""
    shown = difference.verdict
    digits = digits_for(shown)
    where = f"at T = {temperature:g} {_scope(difference)}"
    if shown.decided:
        low, high = sorted((abs(shown.lo), abs(shown.hi)))
        return (
            f"{objective} is {abs(100 * shown.estimate):.{digits}f} % "
            f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}] "
            f"{'longer' if shown.estimate > 0 else 'shorter'} than {baseline} {where}"
        )
    where, limit = f"{where} that", f"{difference.prompts} prompts"
    if difference.over_seeds is not None and difference.these_seeds.decided:
        # more prompts would not help: the trained drafts do differ, but so do their seeds
        where, limit = f"at T = {temperature:g} that", f"{difference.seeds} seeds"
    return (
        f"no difference between {objective} and {baseline} {where} "
        f"{limit} can show: {percent(shown.estimate, digits=digits)} % "
        f"[{percent(shown.lo, digits=digits)}, {percent(shown.hi, digits=digits)}]; "
        f"one of {100 * difference.detectable:.1f} % would probably have shown"
    )


def _scope(difference: Difference) -> str:
    if difference.over_seeds is not None:
        return f"over {difference.seeds} seeds"
    one = difference.seeds == 1
    return "for this one seed" if one else f"for these {difference.seeds} seeds alone"
