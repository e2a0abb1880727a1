"""Two sets of results -> differences of the arms that both have, paired by prompt and seed.

    found = between(results_a, results_b, config, names=("before", "after"))

The same statistics as the report's, across instead of within: τ of an arm in B against τ of the arm
of the same draft, objective and seed in A, all of one γ as one family. Refused where the two did
not replay the same rollouts. Knows results, not folders, targets or caches.

Dims: N prompts, C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.findings import Comparison, ReportConfig
from pipeline.matrix import Arm
from pipeline.results import ALL, REPLAY, Key, Results
from pipeline.statistics import Pair, Panel, compare, log_tau
from storage.errors import ResultError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Across:
    """One draft and objective at one temperature: B against A."""

    comparison: Comparison
    tau_a: float
    tau_b: float
    same: bool
    """Equal rounds on every prompt, of every seed: the drafts act alike."""


@dataclass(frozen=True)
class Between:
    """All that two sets of results say of each other at one γ."""

    gamma: int
    rows: list[Across]
    prompts: int
    only_a: list[str]
    """Arms that B lacks."""
    only_b: list[str]


def between(a: Results, b: Results, config: ReportConfig, *, names: tuple[str, str]) -> Between:
    """Compare at the first γ of `config` that both replayed; `ResultError` names both sides."""
    cells = [(arm.draft, arm.objective) for arm in a.arms]
    shared = list(dict.fromkeys(cell for cell in cells if b.of(*cell) and _seeds(a, b, cell)))
    if not shared:
        raise ResultError(
            found=f"{names[0]} has the arms {_keys_of(a)}, {names[1]} {_keys_of(b)}",
            expected="an arm of the same draft, objective and seed in both",
            todo="compare results that share an arm, or name the arms alike",
        )
    _same_rollouts(a, b, names)
    gamma = _gamma(a, b, config, names)
    names_a, order_b = a.prompts[REPLAY], {p: n for n, p in enumerate(b.prompts[REPLAY])}
    tokens: list[Floats] = []
    rounds: list[Floats] = []
    pairs, found = [], []
    for draft, objective in shared:
        for temperature in a.temperatures():
            keys = [
                (Key(x.key, REPLAY, temperature, gamma), Key(y.key, REPLAY, temperature, gamma))
                for x, y in _seeds(a, b, (draft, objective))
            ]
            keys = [(x, y) for x, y in keys if x in a.rounds and y in b.rounds]
            if not keys:
                continue
            start, middle = len(tokens), len(tokens) + len(keys)
            for array, into in (("tokens", tokens), ("rounds", rounds)):
                into += [_ordered(b.rounds[y][array], order_b, names_a) for _, y in keys]
                into += [a.rounds[x][array] for x, _ in keys]
            pairs.append(Pair(tuple(range(start, middle)), tuple(range(middle, len(tokens)))))
            found.append((draft, objective, temperature))
    panel = a.by_talk(REPLAY, np.stack(tokens), np.stack(rounds))
    differences = compare(
        panel,
        pairs,
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.seed,
    )
    rows = [
        Across(Comparison(*cell, gamma, ALL, difference), *_taus(panel, pair), _same(panel, pair))
        for cell, pair, difference in zip(found, pairs, differences, strict=True)
    ]
    keys_a, keys_b = ({arm.key for arm in results.arms} for results in (a, b))
    return Between(
        gamma=gamma,
        rows=rows,
        prompts=len(a.prompts[REPLAY]),
        only_a=sorted(keys_a - keys_b),
        only_b=sorted(keys_b - keys_a),
    )


def _ordered(values_N: Floats, order: dict[str, int], prompts: Sequence[str]) -> Floats:
    """[N] in the order of `prompts`; 0 where a prompt has no row (one of no token, then)."""
    return np.array([values_N[order[p]] if p in order else 0.0 for p in prompts])


def _seeds(a: Results, b: Results, cell: tuple[str, str]) -> list[tuple[Arm, Arm]]:
    """Arms of a draft and objective in both, by seed."""
    left, right = ({arm.seed: arm for arm in results.of(*cell)} for results in (a, b))
    return [(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]


def _keys_of(results: Results) -> str:
    keys = [arm.key for arm in results.arms]
    return ", ".join(keys[:4]) + (", …" if len(keys) > 4 else "")


def _gamma(a: Results, b: Results, config: ReportConfig, names: tuple[str, str]) -> int:
    """The first γ of the parameters that both replayed, else the largest of both."""
    both = {key.gamma for key in a.rounds if key.instrument == REPLAY} & {
        key.gamma for key in b.rounds if key.instrument == REPLAY
    }
    if not both:
        raise ResultError(
            found=f"{names[0]} and {names[1]} were replayed at different γ",
            expected="a γ that both have",
            todo="set evaluate.depth alike and run dvc repro evaluate",
        )
    return next((gamma for gamma in config.gammas if gamma in both), max(both))


def _same_rollouts(a: Results, b: Results, names: tuple[str, str]) -> None:
    """Both replayed the same prompts and, prompt by prompt, responses of the same length."""
    if a.temperatures() != b.temperatures():
        told = [", ".join(f"T = {t:g}" for t in results.temperatures()) for results in (a, b)]
        raise ResultError(
            found=f"{names[0]} was replayed at {told[0]}, {names[1]} at {told[1]}",
            expected="the same temperatures",
            todo="set evaluate.laws alike and run dvc repro evaluate",
        )
    for temperature in a.temperatures():
        left, right = _lengths(a, temperature), _lengths(b, temperature)
        odd = sorted(left.keys() ^ right.keys())
        what = f"at T = {temperature:g} {names[0]} replayed {len(left)} prompts and {names[1]} "
        if odd:
            raise ResultError(
                found=f"{what}{len(right)}, which differ in {odd[0]}",
                expected="the same prompts, because differences are paired by prompt",
                todo="compare results of one set of held-out prompts",
            )
        odd = sorted(prompt for prompt in left if left[prompt] != right[prompt])
        if odd:
            raise ResultError(
                found=f"{what}the same, but other responses: {odd[0]} has "
                f"{left[odd[0]]:.0f} and {right[odd[0]]:.0f} tokens",
                expected="rollouts of one target under one law, the same in both",
                todo="compare results of one cache and one target",
            )


def _lengths(results: Results, temperature: float) -> dict[str, float]:
    """Tokens of every prompt that was replayed at a temperature."""
    key = next(
        k
        for k in results.rounds
        if (k.instrument, k.temperature, k.law) == (REPLAY, temperature, None)
    )
    tokens = results.rounds[key]["tokens"]
    return {
        prompt: float(tokens[n]) for n, prompt in enumerate(results.prompts[REPLAY]) if tokens[n]
    }


def _same(panel: Panel, pair: Pair) -> bool:
    return np.array_equal(panel.rounds[list(pair.arm)], panel.rounds[list(pair.baseline)])


def _taus(panel: Panel, pair: Pair) -> tuple[float, float]:
    """τ of A and of B, their seeds pooled (micro-average)."""

    def pooled(columns: Sequence[int]) -> float:
        index = list(columns)
        whole = Panel(
            panel.tokens[index].sum(axis=0, keepdims=True),
            panel.rounds[index].sum(axis=0, keepdims=True),
            panel.strata,
        )
        return float(np.exp(log_tau(whole)[0]))

    return pooled(pair.baseline), pooled(pair.arm)
