"""Beside the primary numbers: τ under served laws that are not plain, and on prompt sets.

Results to tables (`pipeline.page`). A family of simultaneous intervals is all comparisons with the
baseline under one law, by one instrument, on one set of prompts. What was only decoded carries the
luck of sampling, and says so by its width; a law is replayed where `generate.laws` names it.
"""

from collections.abc import Mapping, Sequence

from pipeline.findings import ReportConfig
from pipeline.page import Cell, Column, Table
from pipeline.results import ALL, DECODE, MIN_PROMPTS, REPLAY, Key, Results
from pipeline.statistics import Interval, Pair, compare, tau

SET = f"{DECODE}:"
"""Before the name of a prompt set: the instrument of its results."""
_NAMES = ("these_seeds_percent", "over_seeds_percent")

Cells = Mapping[tuple[str, str], Sequence[Key]]
"""By draft and objective, the columns of its seeds."""


def served_tables(results: Results, config: ReportConfig) -> list[Table]:
    """τ of every arm under each law that is not plain, with its difference to the baseline."""
    rows: list[dict[str, Cell]] = []
    for law in reversed(results.laws()):
        for instrument, how in ((REPLAY, "replayed"), (DECODE, "decoded")):
            cells = _cells(results, instrument, law, config.gammas[0])
            for row in _rows(results, config, cells, domain=ALL):
                draft, objective = str(row["draft"]), str(row["objective"])
                words = next(iter(cells.values()))[0].setting.words
                kept, name = _acceptance(results, draft, objective, law)
                rows.append({"law": words, "how": how, **row, "kept": kept, "kept_name": name})
    columns = [
        Column("law", "law", merge=True),
        Column("how", "measured", merge=True),
        Column("draft", "draft", merge=True),
        Column("objective", "objective"),
        Column("gamma", "γ"),
        Column("tau", "τ"),
        *_difference_columns(config),
        Column("kept", "first draft kept", digits=4),
        Column("kept_name", "which is"),
    ]
    caption = "τ under served laws: temperature, top-k, top-p, greedy drafts"
    return [Table(caption, columns, rows)] if rows else []


def set_tables(results: Results, config: ReportConfig) -> list[Table]:
    """τ of every decoded arm on each prompt set, by category and turn, with its difference."""
    rows: list[dict[str, Cell]] = []
    for instrument in (name for name in results.prompts if name.startswith(SET)):
        categories = results.domains(instrument)
        turns = int(results.turns(instrument).max()) + 1
        settings = {key.setting for key in results.rounds if key.instrument == instrument}
        for setting in sorted(settings, key=lambda s: s.order, reverse=True):
            law = None if setting.plain else setting.name
            cells = _cells(results, instrument, law, config.gammas[0], setting.temperature)
            parts: list[tuple[str, str, int | None]] = [(ALL, ALL, None)]
            parts += [(name, name, None) for name in categories if len(categories) > 1]
            parts += [(f"turn {n + 1}", ALL, n) for n in range(turns) if turns > 1]
            for category, domain, turn in parts:
                for row in _rows(results, config, cells, domain=domain, turn=turn):
                    named: dict[str, Cell] = {
                        "set": instrument.removeprefix(SET),
                        "law": setting.words,
                        "category": category,
                    }
                    rows.append(named | row)
    columns = [
        Column("set", "prompts", merge=True),
        Column("law", "law", merge=True),
        Column("category", "category", merge=True),
        Column("draft", "draft", merge=True),
        Column("objective", "objective"),
        Column("gamma", "γ"),
        Column("prompts", "of"),
        Column("tau", "τ"),
        *_difference_columns(config),
    ]
    return [Table("τ on prompt sets, decoded", columns, rows)] if rows else []


def _difference_columns(config: ReportConfig) -> list[Column]:
    return [
        Column("difference_percent", f"τ against {config.baseline}, %", signed=True),
        Column("these_seeds_percent", "these seeds, %", signed=True, ends_only=True),
        Column("over_seeds_percent", "over seeds, %", signed=True, ends_only=True),
    ]


def _cells(
    results: Results, instrument: str, law: str | None, gamma: int, temperature: float | None = None
) -> Cells:
    """The columns of a law by draft and objective: at the primary γ, or what was decoded."""
    found: dict[tuple[str, str], list[Key]] = {}
    for arm in results.arms:
        mine = [
            key
            for key in results.rounds
            if (key.arm, key.instrument, key.law) == (arm.key, instrument, law)
            and temperature in (None, key.temperature)
        ]
        # a draft that stops short of the primary γ (MEDUSA) is shown as deep as it goes
        wanted = [key for key in mine if key.gamma == gamma] or mine[-1:]
        if wanted:
            found.setdefault((arm.draft, arm.objective), []).extend(wanted)
    return found


def _rows(
    results: Results, config: ReportConfig, cells: Cells, *, domain: str, turn: int | None = None
) -> list[dict[str, Cell]]:
    """One row a draft and objective: τ, and the difference to the baseline of its draft."""
    if not cells:
        return []
    seed, resamples, confidence = config.seed, config.resamples, config.confidence
    pooled = results.panel(list(cells.values()), domain=domain, turn=turn)
    num_prompts = int((pooled.rounds.sum(axis=0) > 0).sum())
    several = num_prompts >= MIN_PROMPTS
    taus: Sequence[Cell]
    if several:
        taus = tau(pooled, confidence=confidence, resamples=resamples, seed=seed)
    else:
        taus = [
            float(t / r) for t, r in zip(pooled.tokens.sum(1), pooled.rounds.sum(1), strict=True)
        ]
    rows: list[dict[str, Cell]] = [
        {
            "draft": draft,
            "objective": objective,
            "gamma": keys[0].gamma,
            "prompts": num_prompts,
            "tau": value,
        }
        for ((draft, objective), keys), value in zip(cells.items(), taus, strict=True)
    ]
    seed_of = {arm.key: arm.seed for arm in results.arms}
    columns: list[Key] = []
    pairs, of = [], []
    for place, ((draft, objective), keys) in enumerate(cells.items()):
        base = {seed_of[key.arm]: key for key in cells.get((draft, config.baseline), ())}
        mine = [key for key in keys if seed_of[key.arm] in base]
        if objective == config.baseline or not mine or not several:
            continue
        start = len(columns)
        columns += [*mine, *(base[seed_of[key.arm]] for key in mine)]
        middle = start + len(mine)
        pairs.append(Pair(tuple(range(start, middle)), tuple(range(middle, len(columns)))))
        of.append(place)
    if pairs:
        panel = results.panel([[key] for key in columns], domain=domain, turn=turn)
        differences = compare(panel, pairs, confidence=confidence, resamples=resamples, seed=seed)
        for place, found in zip(of, differences, strict=True):
            rows[place]["difference_percent"] = 100 * found.these_seeds.estimate
            for name, interval in zip(_NAMES, (found.these_seeds, found.over_seeds), strict=True):
                rows[place][name] = None if interval is None else _percent(interval)
    return rows


def _percent(interval: Interval) -> Interval:
    return Interval(100 * interval.estimate, 100 * interval.lo, 100 * interval.hi)


def _acceptance(
    results: Results, draft: str, objective: str, law: str
) -> tuple[Interval | None, str | None]:
    """The mean chance to keep the first draft, in its certified ends, and its name."""
    keys = [(arm.key, law, 0) for arm in results.of(draft, objective)]
    found = [results.served_depths[key] for key in keys if key in results.served_depths]
    anchors = sum(sums["anchors"] for sums in found)
    if not anchors:
        return None, None
    value, lo, hi = (
        sum(sums[name] for sums in found) / anchors for name in ("alpha", "alpha_lo", "alpha_hi")
    )
    return Interval(value, lo, hi), "p(argmax q)" if law.endswith("drafts=greedy") else "α"
