"""Do the report's intervals hold what they claim? Simulated experiments whose truth is known.

    python -m benchmarks.coverage               # a quarter of an hour; writes coverage.md

An experiment is S seeds of a baseline and of an arm (or of a family of arms) over N prompts in
three domains, made so that the population's difference is known in closed form, and handed to
`pipeline.statistics.compare`, the report's own function. With n a prompt of domain d,

    rounds_base[s,n] = L_n · exp(−(E_n + B_sn))
    rounds_arm[s,n]  = rounds_base[s,n] · exp(−(μ_d + A_s + P_n + I_sn)),   tokens = L_n

L response lengths (log-normal: the ratio of sums must bear long answers), E how easy a prompt is,
B what a seed does to both, A the seed's effect, P the prompt's (it grows with E) and I their
interaction's. Every moment is the order of the default run's (γ = 4, `lm` under the LK losses
against KL): `sampled` those at T = 1, `greedy` those at T = 0, where the interaction is large and
heavy-tailed (kurtosis 13) because one token more or less accepted is a whole round.

The estimand of *over seeds* is E over A and prompts; of *these seeds*, E over prompts given the A.
The ratio of seeds to prompts is that of their shares in the variance of one seed's difference
(σ_A² : σ_P²/N, so that 1 makes both matter alike) and, in a table of its own, that of the variance
components (σ_A² : σ_P²), where from 0.1 on the seeds are all that matters.

Dims: S seeds, N prompts, Q comparisons.
"""

import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.statistics import Pair, Panel, compare

Floats = NDArray[np.float64]

HERE = Path(__file__).parent
EXPERIMENTS, CONFIDENCE = 2000, 0.95
SEEDS = (3, 5, 10)
RATIOS = (0.0, 0.1, 1.0)
FAMILY = 7  # arms beside the baseline in presets/ablation.yaml
SHARED = 0.5  # of every variance of a family's arms is common to them
DOMAINS = ("code", "maths", "prose")
SIZES = (86, 85, 85)
EASE = ((0.93, 0.08), (1.16, 0.15), (0.90, 0.10))
"""Mean and deviation of log τ of the baseline, by domain."""
GAIN = (0.028, 0.055, 0.028)
"""μ_d: the arm's gain in log τ, by domain."""
WITH_EASE = 0.5  # correlation of P with E inside a domain
BASE = 0.03  # deviation of B
LENGTH = (4.2, 0.6)  # of log L: answers of 66 tokens, one in forty beyond 210


@dataclass(frozen=True)
class Regime:
    """Deviations of the paired difference by prompt and of its interaction with the seed."""

    prompt: float
    interaction: float
    tails: tuple[float, float]
    """Share of prompts whose interaction is so many times as wide."""


REGIMES = {
    "sampled": Regime(prompt=0.02, interaction=0.018, tails=(0.0, 1.0)),
    "greedy": Regime(prompt=0.015, interaction=0.06, tails=(0.06, 4.0)),
}


@dataclass(frozen=True)
class Setting:
    """One row of a table."""

    regime: str
    seeds: int
    seed_deviation: float
    """σ_A."""
    arms: int = 1


@dataclass
class Found:
    """Counts over experiments; a family counts where all of its intervals hold."""

    over: int = 0
    these: int = 0
    """Of what these very seeds would say of all prompts."""
    these_of_all: int = 0
    """Of what all seeds would say: fair to ask where seeds do not differ."""
    over_width: float = 0.0
    these_width: float = 0.0
    experiments: int = 0


def seed_deviation(regime: Regime, ratio: float, *, components: bool) -> float:
    """σ_A for a ratio of seeds to prompts (module docstring)."""
    share = regime.prompt**2 if components else regime.prompt**2 / sum(SIZES)
    return float(np.sqrt(ratio * share))


def truth(regime: Regime) -> float:
    """Difference of log τ in the population of prompts and seeds, A = 0: closed form."""
    share, times = regime.tails
    narrow = regime.interaction / np.sqrt(1 - share + share * times**2)
    lifted = (1 - share) * np.exp(narrow**2 / 2) + share * np.exp((times * narrow) ** 2 / 2)
    base = arm = 0.0
    for size, (mean, spread), gain in zip(SIZES, EASE, GAIN, strict=True):
        together = spread**2 + regime.prompt**2 + 2 * WITH_EASE * spread * regime.prompt
        base += size * np.exp(-mean + spread**2 / 2)
        arm += size * np.exp(-mean - gain + together / 2) * lifted
    return float(np.log(base) - np.log(arm))


def experiment(rng: np.random.Generator, setting: Setting) -> tuple[Panel, list[Pair], Floats]:
    """A panel of baseline and arms, their pairs, and A [Q, S]."""
    regime, num_seeds, num_arms = REGIMES[setting.regime], setting.seeds, setting.arms
    domain_N = np.repeat(np.arange(len(DOMAINS)), SIZES)
    num_prompts = len(domain_N)
    mean, spread = np.array(EASE).T
    easy_N = rng.normal(size=num_prompts)
    length_N = np.exp(rng.normal(*LENGTH, num_prompts))

    def draw(*shape: int) -> Floats:
        """Unit normals [Q, *shape] of which arms share a part."""
        common, own = rng.normal(size=shape), rng.normal(size=(num_arms, *shape))
        return common if num_arms == 1 else np.sqrt(SHARED) * common + np.sqrt(1 - SHARED) * own

    own_QN = np.broadcast_to(draw(num_prompts), (num_arms, num_prompts))
    prompt_QN = regime.prompt * (WITH_EASE * easy_N + np.sqrt(1 - WITH_EASE**2) * own_QN)
    seed_QS = setting.seed_deviation * np.broadcast_to(draw(num_seeds), (num_arms, num_seeds))
    share, times = regime.tails
    wide_SN = np.where(rng.random((num_seeds, num_prompts)) < share, times, 1.0)
    wide_SN *= regime.interaction / np.sqrt(1 - share + share * times**2)
    cross_QSN = wide_SN * draw(num_seeds, num_prompts)
    log_SN = mean[domain_N] + spread[domain_N] * easy_N
    log_SN = log_SN + BASE * rng.normal(size=(num_seeds, num_prompts))
    base_SN = length_N * np.exp(-log_SN)
    gain_QSN = np.array(GAIN)[domain_N] + prompt_QN[:, None] + seed_QS[:, :, None] + cross_QSN
    rounds = np.concatenate([base_SN[None], base_SN * np.exp(-gain_QSN)]).reshape(-1, num_prompts)
    panel = Panel(np.tile(length_N, (len(rounds), 1)), rounds, np.array(DOMAINS)[domain_N])
    baseline = tuple(range(num_seeds))
    arms = [tuple(num_seeds * (q + 1) + s for s in range(num_seeds)) for q in range(num_arms)]
    return panel, [Pair(arm, baseline) for arm in arms], seed_QS


def coverage(setting: Setting, *, experiments: int, resamples: int, seed: int = 0) -> Found:
    """How often the intervals of `compare` hold the truth of the experiments they were made of."""
    found = Found(experiments=experiments)
    of_all = truth(REGIMES[setting.regime])
    name = [seed, setting.seeds, setting.arms, round(1e9 * setting.seed_deviation)]
    rng = np.random.default_rng([*name, *setting.regime.encode()])
    for k in range(experiments):
        panel, pairs, seed_QS = experiment(rng, setting)
        rows = compare(panel, pairs, confidence=CONFIDENCE, resamples=resamples, seed=k)
        over, these, these_of_all = True, True, True
        for row, own in zip(rows, seed_QS.mean(axis=1), strict=True):
            assert row.over_seeds is not None
            here, anywhere = np.expm1(of_all + own), np.expm1(of_all)
            over &= row.over_seeds.lo <= anywhere <= row.over_seeds.hi
            these &= row.these_seeds.lo <= here <= row.these_seeds.hi
            these_of_all &= row.these_seeds.lo <= anywhere <= row.these_seeds.hi
            found.over_width += (row.over_seeds.hi - row.over_seeds.lo) / len(rows) / experiments
            found.these_width += (row.these_seeds.hi - row.these_seeds.lo) / len(rows) / experiments
        found.over += over
        found.these += these
        found.these_of_all += these_of_all
    return found


@dataclass(frozen=True)
class Grid:
    """One table: every number of seeds at every ratio."""

    title: str
    regime: str
    ratios: tuple[float, ...] = RATIOS
    components: bool = False
    """The ratio is that of variance components."""
    arms: int = 1
    resamples: int = 400
    experiments: int = EXPERIMENTS


TABLES = (
    Grid("One comparison at T = 1", "sampled"),
    Grid("One comparison at T = 0", "greedy"),
    Grid("One comparison, ratio of variance components", "sampled", RATIOS[1:], components=True),
    # the ends of a family lie farther out, and each experiment costs as much as seven
    Grid(
        f"A family of {FAMILY}, all of which must hold",
        "sampled",
        (0.0, 1.0),
        arms=FAMILY,
        resamples=1000,
        experiments=500,
    ),
)
HEAD = (
    "| seeds | seed/prompt | over seeds | these seeds, of these seeds | these seeds, of all seeds "
    "| width over seeds | width these seeds |\n| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def main(at_most: int = EXPERIMENTS) -> str:
    """Run every setting; returns the text of coverage.md."""
    lowest, near, sections = 1.0, [], []
    for grid in TABLES:
        rows, experiments = [], min(at_most, grid.experiments)
        for seeds in SEEDS:
            for ratio in grid.ratios:
                spread = seed_deviation(REGIMES[grid.regime], ratio, components=grid.components)
                setting = Setting(grid.regime, seeds, spread, grid.arms)
                found = coverage(setting, experiments=experiments, resamples=grid.resamples)
                over, these, of_all = (
                    100 * count / experiments
                    for count in (found.over, found.these, found.these_of_all)
                )
                lowest = min(lowest, over / 100)
                near += [of_all] if ratio == 0 else []
                rows.append(
                    f"| {seeds} | {ratio:g} | {over:.1f} % | {these:.1f} % | {of_all:.1f} % | "
                    f"{100 * found.over_width:.2f} % | {100 * found.these_width:.2f} % |"
                )
                print(grid.title, rows[-1], flush=True)
        error = 100 * np.sqrt((1 - CONFIDENCE) * CONFIDENCE / experiments)
        what = (
            f"{experiments:,} experiments a row, {grid.resamples:,} resamples; the standard error "
            f"of a percentage is {error:.1f} points."
        )
        sections.append(f"## {grid.title}\n\n{what}\n\n{HEAD}\n" + "\n".join(rows) + "\n")
    summary = f"""Intervals of {100 * CONFIDENCE:g} %, {sum(SIZES)} prompts in {len(SIZES)} domains.
A report's default is 5,000 resamples: fewer make an end coarser. numpy {np.__version__}, Python
{platform.python_version()}.

Lowest coverage of *over seeds*: {100 * lowest:.1f} %. *These seeds*
where seeds do not differ (ratio 0): {min(near):.1f} to {max(near):.1f} %.
"""
    return "\n".join([INTRODUCTION, summary, *sections])


INTRODUCTION = """# Coverage of the report's intervals

`python -m benchmarks.coverage`; what is simulated, and why it is like the default run, is in the
script's docstring. A row counts how often the interval of `pipeline.statistics.compare` held the
difference that is true of the simulated population. *Over seeds* must hold it at every ratio.
*These seeds* speaks of the trained drafts alone: its own question is the column *of these seeds*,
and that it misses what all seeds would say, once they differ, is why verdicts use the other.
"""


if __name__ == "__main__":
    text = main(*map(int, sys.argv[1:]))
    (HERE / "coverage.md").write_text(text, encoding="utf-8")
