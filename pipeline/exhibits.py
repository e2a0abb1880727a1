"""Findings -> the report's tables and charts, in the layout that a reader of papers expects.

Knows how a finding is shown, not how it was made nor where it stands on the page. A series has one
style (colour, marker, dash) on the whole page: its objective's place in the parameters, the
baseline first.
"""

import math
from collections.abc import Mapping, Sequence

from pipeline.charts import Bar, Series, forest, lines
from pipeline.findings import Comparison, Findings, Prediction, Tau, Where
from pipeline.literature import BY_KIND, loss_of
from pipeline.page import Cell, Column, Table
from pipeline.results import ALL, Results, Stratum
from pipeline.statistics import MIN_SEEDS, Interval

MEAN = "mean"
Curves = Mapping[tuple[str, str], Sequence[Mapping[str, float | None]]]
"""By draft and objective: rows of step, alpha, heldout_alpha, seeds averaged."""


def styles(objectives: Sequence[str], baseline: str) -> dict[str, int]:
    """The style of each objective; the baseline is 0."""
    return {name: k for k, name in enumerate([baseline, *(o for o in objectives if o != baseline)])}


def law(temperature: float) -> str:
    """`T = 1`."""
    return f"T = {temperature:g}"


def in_percent(interval: Interval) -> Interval:
    """A fraction's interval in percent."""
    return Interval(100 * interval.estimate, 100 * interval.lo, 100 * interval.hi)


def tau_table(found: Findings, gamma: int) -> Table:
    """τ of draft × objective (rows) by temperature × domain (columns), one γ.

    The layout of the paper's Table 4, its unweighted mean over the sets included.
    """
    rows = [t for t in found.tau if t.gamma == gamma]
    domains = [*found.domains, MEAN, ALL] if len(found.domains) > 1 else [ALL]
    columns = [Column("draft", "draft", merge=True), Column("objective", "objective")]
    temperatures = sorted({t.temperature for t in rows})
    columns += [Column(f"T{t:g} {d}", d, group=law(t)) for t in temperatures for d in domains]
    lines_: dict[tuple[str, str], dict[str, Cell]] = {}
    for t in rows:
        row = lines_.setdefault(
            (t.draft, t.objective), {"draft": t.draft, "objective": t.objective}
        )
        row[f"T{t.temperature:g} {t.domain}"] = t.tau
    ordered = list(lines_.values())
    for row in ordered if MEAN in domains else []:
        for t0 in temperatures:
            sets = [row.get(f"T{t0:g} {domain}") for domain in found.domains]
            taus = [cell.estimate for cell in sets if isinstance(cell, Interval)]
            if len(taus) == len(sets):
                row[f"T{t0:g} {MEAN}"] = sum(taus) / len(taus)
    return Table(
        f"τ at γ = {gamma}, by replay: draft and objective by temperature and domain",
        columns,
        ordered,
        strong=_largest(ordered, [c.name for c in columns[2:]]),
    )


def _largest(
    rows: Sequence[Mapping[str, Cell]], names: Sequence[str]
) -> frozenset[tuple[int, str]]:
    """The largest τ of each draft in each column; nothing is claimed by it."""
    strong = set()
    for draft in {row["draft"] for row in rows}:
        for name in names:
            places = {
                k: cell.estimate if isinstance(cell, Interval) else float(cell)
                for k, row in enumerate(rows)
                if row["draft"] == draft and isinstance(cell := row.get(name), Interval | float)
            }
            if len(places) > 1:
                strong.add((max(places, key=lambda k: places[k]), name))
    return frozenset(strong)


def tau_long(found: Findings) -> Table:
    """τ of every draft, objective, temperature, γ and domain, one a row: for CSV."""
    columns = [Column(n, n) for n in ("draft", "objective", "temperature", "gamma", "domain")]
    columns += [Column("seeds", "seeds"), Column("tau", "τ")]
    rows: list[dict[str, Cell]] = [
        {
            "draft": t.draft,
            "objective": t.objective,
            "temperature": t.temperature,
            "gamma": t.gamma,
            "domain": t.domain,
            "seeds": t.seeds,
            "tau": t.tau,
        }
        for t in found.tau
    ]
    return Table("τ, one a row", columns, rows)


def difference_table(comparisons: Sequence[Comparison], *, baseline: str, caption: str) -> Table:
    """Relative differences of τ to the baseline, in percent, with both named intervals."""
    columns = [
        Column("draft", "draft", merge=True),
        Column("temperature", "T", merge=True, digits=0),
        Column("objective", "objective"),
        Column("domain", "domain"),
        Column("gamma", "γ"),
        Column("difference_percent", f"τ against {baseline}, %", signed=True),
        Column("these_seeds_percent", "these seeds, %", signed=True, ends_only=True),
        Column("over_seeds_percent", "over seeds, %", signed=True, ends_only=True),
        Column("detectable_percent", "detectable, %"),
        Column("seeds", "seeds"),
        Column("prompts", "prompts"),
    ]
    if len({c.domain for c in comparisons}) == 1:
        columns = [c for c in columns if c.name != "domain"]
    if len({c.gamma for c in comparisons}) == 1:
        columns = [c for c in columns if c.name != "gamma"]
    ordered = sorted(comparisons, key=lambda c: _place(c, comparisons))
    rows = [_difference_row(c) for c in ordered]
    return Table(caption, columns, rows)


def _place(comparison: Comparison, among: Sequence[Comparison]) -> tuple[int, float]:
    """Drafts in the order of the parameters, then temperature; sorting is stable within."""
    drafts = list(dict.fromkeys(c.draft for c in among))
    return drafts.index(comparison.draft), -comparison.temperature


def _difference_row(c: Comparison) -> dict[str, Cell]:
    d = c.difference
    over: Cell = f"withheld, {d.seeds} of {MIN_SEEDS} seeds"
    return {
        "draft": c.draft,
        "temperature": f"{c.temperature:g}",
        "objective": c.objective,
        "domain": c.domain,
        "gamma": c.gamma,
        "seeds": d.seeds,
        "prompts": d.prompts,
        "difference_percent": 100 * d.these_seeds.estimate,
        "these_seeds_percent": in_percent(d.these_seeds),
        "over_seeds_percent": in_percent(d.over_seeds) if d.over_seeds else over,
        "detectable_percent": 100 * d.detectable,
    }


def paper_table(
    results: Results,
    found: Findings,
    losses: Mapping[str, Mapping[str, object]],
    *,
    baseline: str,
) -> list[Table]:
    """Architecture × loss at the primary γ: τ, its difference to KL, and the paper's.

    Nothing where the baseline is not KL, against which the paper's gains are.
    """
    if losses.get(baseline, {}).get("kind") != "kl":
        return []
    gamma, temperatures = found.gammas[0], sorted({t.temperature for t in found.tau})
    kinds = {arm.draft: arm.kind for arm in results.arms}
    differences = {
        (c.draft, c.objective, c.temperature): c.difference for c in found.overall(gamma)
    }
    rows: dict[tuple[str, str], dict[str, Cell]] = {}
    for t in found.tau:
        if t.gamma != gamma or t.domain != ALL:
            continue
        published = BY_KIND.get(kinds[t.draft])
        row = rows.setdefault(
            (t.draft, t.objective),
            {
                "draft": t.draft,
                "objective": t.objective,
                "speaks": "baseline" if t.objective == baseline else None,
                "published": published.name if published else None,
            },
        )
        name, loss = f"T{t.temperature:g}", loss_of(losses.get(t.objective, {}))
        row[f"{name} tau"] = t.tau
        if t.objective == baseline:
            continue
        difference = differences.get((t.draft, t.objective, t.temperature))
        if difference is not None:
            row[f"{name} percent"] = in_percent(difference.verdict)
            row["speaks"] = "seeds" if difference.over_seeds else "these drafts"
        gain = published.gain(loss, t.temperature) if published else None
        row[f"{name} paper_percent"] = None if gain is None else 100 * gain
    columns = [Column("draft", "draft", merge=True), Column("objective", "objective")]
    for temperature in temperatures:
        name, group = f"T{temperature:g}", law(temperature)
        columns += [
            Column(f"{name} tau", "τ", group=group),
            Column(f"{name} percent", f"against {baseline}, %", group=group, signed=True),
            Column(f"{name} paper_percent", "paper, %", digits=1, group=group, signed=True),
        ]
    columns += [Column("speaks", "interval of"), Column("published", "the paper’s draft")]
    caption = f"Architecture and loss at γ = {gamma}, all domains, beside the gains of the paper"
    return [Table(caption, columns, list(rows.values()))]


def alpha_table(found: Findings) -> Table:
    """Acceptance by depth: α with its certified bounds, joint and conditional acceptance."""
    columns = [
        Column("draft", "draft", merge=True),
        Column("temperature", "T", merge=True),
        Column("objective", "objective", merge=True),
        Column("depth", "depth k"),
        Column("anchors", "anchors"),
        Column("alpha", "α, certified bounds", digits=4),
        Column("accept", "accepted, cached token", digits=4),
        Column("conditional", "conditional", digits=4),
        Column("survive", "joint", digits=4),
    ]
    ordered = sorted(found.depths, key=lambda d: (-d.temperature,))
    drafts = list(dict.fromkeys(d.draft for d in found.depths))
    ordered.sort(key=lambda d: drafts.index(d.draft))
    rows: list[dict[str, Cell]] = [
        {
            "draft": d.draft,
            "temperature": f"{d.temperature:g}",
            "objective": d.objective,
            "depth": d.depth,
            "anchors": d.anchors,
            "alpha": None if d.alpha is None or d.bounds is None else Interval(d.alpha, *d.bounds),
            "accept": d.accept,
            "conditional": d.conditional,
            "survive": d.survive,
        }
        for d in ordered
    ]
    return Table("Acceptance by depth, sums over anchors, seeds pooled", columns, rows)


def predicted_table(found: Findings) -> Table:
    """Replay against decoding, arm by arm."""
    columns = [
        Column("temperature", "T", merge=True),
        Column("arm", "arm"),
        Column("gamma", "γ"),
        Column("prompts", "prompts"),
        Column("predicted", "predicted τ", digits=3),
        Column("measured", "measured τ", digits=3),
        Column("difference_percent", "difference, %", signed=True),
        Column("z", "z", signed=True),
        Column("unequal", "prompts with other rounds"),
    ]
    return Table(
        "Predicted τ (replay of the same prompts to the same length) and measured τ (decoding)",
        columns,
        [_predicted_row(p) for p in sorted(found.predictions, key=lambda p: -p.temperature)],
    )


def _predicted_row(p: Prediction) -> dict[str, Cell]:
    a = p.agreement
    sampled = p.temperature > 0
    return {
        "temperature": f"{p.temperature:g}",
        "arm": p.arm.key,
        "gamma": p.gamma,
        "prompts": a.prompts,
        "predicted": a.predicted,
        "measured": a.measured,
        "difference_percent": 100 * a.difference,
        # at T = 0 nothing is random: the counts are equal or they are not
        "z": a.z if sampled else None,
        "unequal": None if sampled else a.unequal,
    }


def between(stratum: Stratum) -> str:
    """`8 to 31` tokens, `0.5 to 1` nats, `4 and more`."""
    if stratum.hi == math.inf:
        return f"{stratum.lo:g} and more"
    return f"{stratum.lo:g} to {stratum.hi - (stratum.kind == 'position'):g}"


def strata_table(found: Findings, kind: str) -> Table:
    """Acceptance of the first and all drafted tokens by where a round starts."""
    what = {"position": "place in the response", "entropy": "entropy of the target's law, nats"}
    columns = [
        Column("draft", "draft", merge=True),
        Column("temperature", "T", merge=True),
        Column("objective", "objective", merge=True),
        Column("where", what[kind]),
        Column("depth", "depth k"),
        Column("anchors", "anchors"),
        Column("alpha", "α", digits=4),
        Column("accept", "accepted, cached token", digits=4),
        Column("survive", "joint", digits=4),
    ]
    rows: list[dict[str, Cell]] = [
        {
            "draft": w.draft,
            "temperature": f"{w.temperature:g}",
            "objective": w.objective,
            "where": between(w.stratum),
            "depth": w.depth,
            "anchors": w.anchors,
            "alpha": w.alpha,
            "accept": w.accept,
            "survive": w.survive,
        }
        for w in sorted(found.strata, key=lambda w: _strata_place(w, found))
        if w.stratum.kind == kind
    ]
    return Table(f"Acceptance by {what[kind]}, of rounds that start there", columns, rows)


def _strata_place(w: Where, found: Findings) -> tuple[int, float, int]:
    """By draft, temperature falling, objective; sorting is stable within."""
    drafts = list(dict.fromkeys(x.draft for x in found.strata))
    objectives = list(dict.fromkeys(x.objective for x in found.strata))
    return drafts.index(w.draft), -w.temperature, objectives.index(w.objective)


def strata_charts(found: Findings, style: Mapping[str, int], kind: str) -> list[str]:
    """α of the first drafted token by where it stands, at the sampled law; one chart a draft."""
    rows = [w for w in found.strata if w.stratum.kind == kind and w.depth == 0 and w.alpha]
    strata = sorted({w.stratum for w in rows})
    names = {"position": "place in the response", "entropy": "entropy of p, nats"}
    ticks = [f"{s.lo:g}–" if s.hi != math.inf else f"{s.lo:g}+" for s in strata]
    charts = []
    for draft in dict.fromkeys(w.draft for w in rows):
        series = [
            Series(
                name,
                style[name],
                [
                    (float(strata.index(w.stratum)), w.alpha or 0.0)
                    for w in rows
                    if (w.draft, w.objective) == (draft, name)
                ],
            )
            for name in dict.fromkeys(w.objective for w in rows if w.draft == draft)
        ]
        charts.append(lines(draft, series, x=names[kind], y="α", x_names=ticks))
    return charts


def forest_charts(primary: Sequence[Comparison], style: Mapping[str, int]) -> list[str]:
    """One forest plot a temperature: thick these seeds, thin over seeds."""
    charts = []
    for temperature in sorted({c.temperature for c in primary}, reverse=True):
        bars = [
            Bar(
                f"{c.draft} · {c.objective}",
                style[c.objective],
                100 * c.difference.these_seeds.estimate,
                _ends(c.difference.these_seeds),
                _ends(c.difference.over_seeds),
            )
            for c in primary
            if c.temperature == temperature
        ]
        charts.append(forest(law(temperature), bars, x="difference of τ to the baseline, %"))
    return charts


def _ends(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (100 * interval.lo, 100 * interval.hi)


def gamma_charts(found: Findings, style: Mapping[str, int]) -> list[str]:
    """τ against γ, a chart for each draft and temperature."""
    rows = [t for t in found.tau if t.domain == ALL]
    return [
        lines(
            f"{draft}, {law(temperature)}",
            _series([t for t in rows if (t.draft, t.temperature) == (draft, temperature)], style),
            x="γ, drafted tokens",
            y="τ",
            whole_x=True,
        )
        for draft in dict.fromkeys(t.draft for t in rows)
        for temperature in sorted({t.temperature for t in rows}, reverse=True)
    ]


def _series(rows: Sequence[Tau], style: Mapping[str, int]) -> list[Series]:
    by_objective: dict[str, list[Tau]] = {}
    for t in rows:
        by_objective.setdefault(t.objective, []).append(t)
    return [
        Series(
            name,
            style[name],
            [(float(t.gamma), t.tau.estimate) for t in found],
            [(t.tau.lo, t.tau.hi) for t in found],
        )
        for name, found in by_objective.items()
    ]


def depth_charts(found: Findings, style: Mapping[str, int]) -> list[str]:
    """α by depth at the sampled law, whiskers the certified bounds; one chart a draft."""
    sampled = [d for d in found.depths if d.alpha is not None and d.bounds is not None]
    charts = []
    for draft in dict.fromkeys(d.draft for d in sampled):
        rows = [d for d in sampled if d.draft == draft]
        series = [
            Series(
                name,
                style[name],
                [(float(d.depth), d.alpha or 0.0) for d in rows if d.objective == name],
                [d.bounds or (0.0, 0.0) for d in rows if d.objective == name],
            )
            for name in dict.fromkeys(d.objective for d in rows)
        ]
        charts.append(lines(draft, series, x="depth k", y="α", whole_x=True))
    return charts


def curve_charts(curves: Curves, style: Mapping[str, int]) -> list[str]:
    """α while training: faint on training rows, marked on held-out rows; one chart a draft."""
    charts = []
    for draft in dict.fromkeys(draft for draft, _ in curves):
        series = []
        for (name, objective), rows in curves.items():
            if name != draft:
                continue
            for column, faint in (("alpha", True), ("heldout_alpha", False)):
                points = [
                    (float(row["step"] or 0), float(value))
                    for row in rows
                    if (value := row.get(column)) is not None
                ]
                if points:
                    series.append(Series(objective, style[objective], points, faint=faint))
        charts.append(lines(draft, series, x="step", y="α"))
    return [chart for chart in charts if chart]


def predicted_chart(found: Findings, style: Mapping[str, int]) -> list[str]:
    """Measured against predicted τ, one chart a temperature, with the line of equality."""
    charts = []
    for temperature in sorted({p.temperature for p in found.predictions}, reverse=True):
        series = [
            Series(
                p.arm.key,
                style[p.arm.objective],
                [(p.agreement.predicted, p.agreement.measured)],
            )
            for p in found.predictions
            if p.temperature == temperature
        ]
        charts.append(
            lines(law(temperature), series, x="predicted τ", y="measured τ", diagonal=True)
        )
    return charts
