"""What the report says, as numbers: τ, differences, acceptance by depth, predicted and measured.

Takes checked results, gives rows; knows no table, chart or file. Families of comparisons (the sets
over which intervals are simultaneous): all comparisons with the baseline at one γ on one domain.
The first γ of the parameters on all domains is the *primary* family, whose verdicts open the page;
it is named before any result is seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from pipeline.config import Gamma, Strict
from pipeline.matrix import Arm
from pipeline.results import (
    ALL,
    BLOCK,
    DECODE,
    REPLAY,
    REPLAY_DECODE,
    STRATUM_SUMS,
    SUMS,
    Key,
    Results,
    Stratum,
)
from pipeline.statistics import (
    Agreement,
    Difference,
    Interval,
    Pair,
    agree,
    compare,
    tau,
)


class ReportConfig(Strict):
    """Section `report` of `params.yaml`."""

    baseline: Annotated[str, Field(min_length=1)]
    """Objective that the others are compared with."""
    gammas: Annotated[list[Gamma], Field(min_length=1)]
    """γ of the tables; the first is the primary one, whose verdicts open the page."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    resamples: Annotated[int, Field(ge=200)]
    """Of the bootstrap: simultaneous BCa ends lie far out in the tails, so thousands."""
    seed: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Tau:
    """τ by replay of an objective, its seeds pooled (micro-average)."""

    draft: str
    objective: str
    temperature: float
    gamma: int
    domain: str
    seeds: int
    tau: Interval


@dataclass(frozen=True)
class Comparison:
    """An objective against the baseline on the same draft."""

    draft: str
    objective: str
    temperature: float
    gamma: int
    domain: str
    difference: Difference


@dataclass(frozen=True)
class Prediction:
    """One decoded arm: replay on the same prompts and limits against decoding."""

    arm: Arm
    temperature: float
    gamma: int
    agreement: Agreement


@dataclass(frozen=True)
class Depth:
    """Acceptance of an objective at one depth, seeds pooled."""

    draft: str
    objective: str
    temperature: float
    depth: int
    anchors: int
    alpha: float | None
    """Unbiased estimate of Σ min(p, q); None at T = 0, where it is not defined."""
    bounds: tuple[float, float] | None
    """Certified ends of α given the truncated cache."""
    accept: float
    """Mean of min(1, q/p) of the cached token; at T = 0 the greedy match."""
    survive: float
    """Mean of its product over depths 0 … k: joint acceptance, not the product of means."""
    conditional: float
    """Joint acceptance here over joint acceptance one depth before."""


@dataclass(frozen=True)
class Where:
    """Acceptance of an objective at one depth, over anchors of one kind, seeds pooled."""

    draft: str
    objective: str
    temperature: float
    stratum: Stratum
    depth: int
    anchors: int
    alpha: float | None
    """None at T = 0."""
    accept: float
    survive: float
    """Joint acceptance of depths 0 … k of rounds that start there."""


@dataclass(frozen=True)
class Findings:
    """Everything that the report prints of the arms."""

    gammas: list[int]
    """Those of the parameters that a draft reaches; the first is the primary one."""
    tau: list[Tau]
    comparisons: list[Comparison]
    predictions: list[Prediction]
    z_points: dict[float, float]
    """By temperature: the familywise 99 % point for the largest |z|."""
    depths: list[Depth]
    strata: list[Where]
    blocks: list[Comparison]
    """Block verification against token verification of the same arms, T > 0."""
    prompts: int
    domains: list[str]

    def overall(self, gamma: int) -> list[Comparison]:
        """The comparisons of one γ on all domains: a family; that of the first γ is primary."""
        return [c for c in self.comparisons if c.gamma == gamma and c.domain == ALL]


def find(results: Results, config: ReportConfig) -> Findings:
    """All numbers of a report."""
    domains = results.domains()
    replayed = {key.gamma for key in results.rounds if key.instrument == REPLAY}
    # a γ that no draft reaches (MEDUSA stops at its heads) has nothing to show
    gammas = [gamma for gamma in config.gammas if gamma in replayed] or [max(replayed)]
    config = config.model_copy(update={"gammas": gammas})
    predictions, points = _predictions(results, config)
    return Findings(
        gammas=gammas,
        tau=_taus(results, config, domains),
        comparisons=[
            comparison
            for gamma in config.gammas
            for domain in [ALL, *_several(domains)]
            for comparison in _comparisons(results, config, gamma, domain)
        ],
        predictions=predictions,
        z_points=points,
        depths=_depths(results),
        strata=_strata(results),
        blocks=_blocks(results, config, config.gammas[0]),
        prompts=len(results.prompts[REPLAY]),
        domains=domains,
    )


def _several(domains: list[str]) -> list[str]:
    """Domains worth a column of their own: none where there is but one."""
    return domains if len(domains) > 1 else []


def _cells(results: Results) -> list[tuple[str, str, float]]:
    return [
        (draft, objective, temperature)
        for draft in results.drafts
        for objective in results.objectives(draft)
        for temperature in results.temperatures()
    ]


def _keys(results: Results, cell: tuple[str, str, float], gamma: int) -> dict[int, Key]:
    """By seed, the replayed column of a draft, objective, temperature and γ, where there is one."""
    draft, objective, temperature = cell
    keys = {a.seed: Key(a.key, REPLAY, temperature, gamma) for a in results.of(draft, objective)}
    return {seed: key for seed, key in keys.items() if key in results.rounds}


def _taus(results: Results, config: ReportConfig, domains: list[str]) -> list[Tau]:
    gammas = sorted({key.gamma for key in results.rounds if key.instrument == REPLAY})
    rows = []
    for domain in [ALL, *_several(domains)]:
        cells = [
            (cell, gamma, keys)
            for cell in _cells(results)
            for gamma in (gammas if domain == ALL else config.gammas)
            if (keys := _keys(results, cell, gamma))
        ]
        panel = results.panel([list(keys.values()) for _, _, keys in cells], domain=domain)
        found = tau(
            panel, confidence=config.confidence, resamples=config.resamples, seed=config.seed
        )
        rows += [
            Tau(*cell, gamma, domain, len(keys), interval)
            for (cell, gamma, keys), interval in zip(cells, found, strict=True)
        ]
    return rows


def _comparisons(
    results: Results, config: ReportConfig, gamma: int, domain: str
) -> list[Comparison]:
    columns: list[Key] = []
    pairs, cells = [], []
    for cell in _cells(results):
        draft, objective, temperature = cell
        arm = _keys(results, cell, gamma)
        base = _keys(results, (draft, config.baseline, temperature), gamma)
        seeds = sorted(arm.keys() & base.keys())
        if objective == config.baseline or not seeds:
            continue
        start = len(columns)
        columns += [*(arm[s] for s in seeds), *(base[s] for s in seeds)]
        middle = start + len(seeds)
        pairs.append(Pair(tuple(range(start, middle)), tuple(range(middle, len(columns)))))
        cells.append(cell)
    if not pairs:
        return []
    return _compared(results, config, columns, pairs, cells, gamma=gamma, domain=domain)


def _compared(
    results: Results,
    config: ReportConfig,
    columns: list[Key],
    pairs: list[Pair],
    cells: list[tuple[str, str, float]],
    *,
    gamma: int,
    domain: str = ALL,
) -> list[Comparison]:
    """One family: a panel of the columns, all pairs compared together."""
    differences = compare(
        results.panel([[key] for key in columns], domain=domain),
        pairs,
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.seed,
    )
    return [
        Comparison(*cell, gamma, domain, difference)
        for cell, difference in zip(cells, differences, strict=True)
    ]


def _blocks(results: Results, config: ReportConfig, gamma: int) -> list[Comparison]:
    columns: list[Key] = []
    pairs, cells = [], []
    for cell in _cells(results):
        token = list(_keys(results, cell, gamma).values())
        block = [Key(key.arm, BLOCK, key.temperature, gamma) for key in token]
        if not token or any(key not in results.rounds for key in block):
            continue
        middle, end = len(columns) + len(block), len(columns) + 2 * len(block)
        pairs.append(Pair(tuple(range(len(columns), middle)), tuple(range(middle, end))))
        columns += [*block, *token]
        cells.append(cell)
    return _compared(results, config, columns, pairs, cells, gamma=gamma) if pairs else []


def _predictions(
    results: Results, config: ReportConfig
) -> tuple[list[Prediction], dict[float, float]]:
    rows: list[Prediction] = []
    points = {}
    decoded = [key for key in results.rounds if key.instrument == DECODE and key.law is None]
    names = {arm.key: arm for arm in results.arms}
    for temperature in sorted({key.temperature for key in decoded}):
        pairs = [
            (key, twin)
            for key in decoded
            if key.temperature == temperature
            and (twin := Key(key.arm, REPLAY_DECODE, temperature, key.gamma)) in results.rounds
        ]
        if not pairs:
            continue
        found, points[temperature] = agree(
            results.panel([[twin] for _, twin in pairs]),
            results.panel([[key] for key, _ in pairs]),
            resamples=config.resamples,
            seed=config.seed,
        )
        rows += [
            Prediction(names[key.arm], temperature, key.gamma, agreement)
            for (key, _), agreement in zip(pairs, found, strict=True)
        ]
    return rows, points


def _depths(results: Results) -> list[Depth]:
    rows = []
    depths = sorted({depth for _, _, depth in results.depths})
    for draft, objective, temperature in _cells(results):
        arms = results.of(draft, objective)
        before = 1.0
        for depth in depths:
            found = [
                results.depths[key]
                for arm in arms
                if (key := (arm.key, temperature, depth)) in results.depths
            ]
            if not found:
                continue
            sums = {name: sum(sum_[name] for sum_ in found) for name in SUMS}
            if not sums["anchors"]:
                continue
            row = _depth(sums, before, cell=(draft, objective, temperature), depth=depth)
            before = row.survive
            rows.append(row)
    return rows


def _depth(
    sums: Mapping[str, float], before: float, *, cell: tuple[str, str, float], depth: int
) -> Depth:
    anchors = sums["anchors"]
    sampled = cell[2] > 0
    survive = sums["survive"] / anchors
    return Depth(
        *cell,
        depth=depth,
        anchors=int(anchors),
        alpha=sums["alpha"] / anchors if sampled else None,
        bounds=(sums["alpha_lo"] / anchors, sums["alpha_hi"] / anchors) if sampled else None,
        accept=sums["accept"] / anchors,
        survive=survive,
        conditional=survive / before if before else 0.0,
    )


def _strata(results: Results) -> list[Where]:
    """Acceptance by place in the response and by the target's entropy, every depth."""
    rows = []
    places = sorted({(stratum, depth) for _, _, stratum, depth in results.where})
    for draft, objective, temperature in _cells(results):
        arms = results.of(draft, objective)
        for stratum, depth in places:
            keys = [(arm.key, temperature, stratum, depth) for arm in arms]
            found = [results.where[key] for key in keys if key in results.where]
            sums = {name: sum(sum_[name] for sum_ in found) for name in STRATUM_SUMS}
            if not sums["anchors"]:
                continue
            rows.append(
                Where(
                    draft,
                    objective,
                    temperature,
                    stratum,
                    depth,
                    anchors=int(sums["anchors"]),
                    alpha=sums["alpha"] / sums["anchors"] if temperature > 0 else None,
                    accept=sums["accept"] / sums["anchors"],
                    survive=sums["survive"] / sums["anchors"],
                )
            )
    return rows
