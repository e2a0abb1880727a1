"""Findings to files: the page, the same tables as Markdown and CSV, and the DVC metric.

Torch-free; draws what was computed and stored before (`pipeline.findings`). Reads no parquet and
writes nothing itself: texts in, texts out; `stages.report` opens and publishes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.beside import served_tables, set_tables
from pipeline.charts import swatch
from pipeline.exhibits import (
    Curves,
    alpha_table,
    curve_charts,
    depth_charts,
    difference_table,
    forest_charts,
    gamma_charts,
    law,
    paper_table,
    predicted_chart,
    predicted_table,
    strata_charts,
    strata_table,
    styles,
    tau_long,
    tau_table,
)
from pipeline.findings import Comparison, Findings, ReportConfig
from pipeline.page import Table, render, to_csv, to_markdown
from pipeline.rate import rate_exhibit
from pipeline.record_tables import (
    cost_tables,
    coverage_tables,
    facts,
    rate_tables,
    speed_tables,
    speedup_tables,
)
from pipeline.results import ALL, Results
from pipeline.setting import Setting
from pipeline.statistics import MIN_SEEDS, verdict

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Records:
    """What earlier stages wrote of themselves, as read from their JSON and CSV."""

    target: Json
    cache: Json
    metrics: Mapping[str, Json] = field(default_factory=dict)
    """By stage."""
    timings: Mapping[str, Json] = field(default_factory=dict)
    """By stage and cell, as the file is named: `train-lm-kl-0`."""
    curves: Curves = field(default_factory=dict)
    traces: Mapping[str, Sequence[Json]] = field(default_factory=dict)
    """By arm: decoded prompts round by round (`pipeline.trace`)."""
    params: Json = field(default_factory=dict)
    losses: Mapping[str, Json] = field(default_factory=dict)
    """Section `losses` of the parameters: what an objective's name stands for."""


@dataclass(frozen=True)
class Verdict:
    """One comparison in words, with what the page does to show it."""

    draft: str
    text: str
    direction: str
    """longer, shorter or open."""


@dataclass(frozen=True)
class Report:
    """Every file of `report/`, by name, and the DVC metric."""

    files: Mapping[str, str]
    metrics: Json


def build(results: Results, found: Findings, config: ReportConfig, *, records: Records) -> Report:
    """All texts of a report; the same input gives the same bytes."""
    tables = _tables(results, found, config, records=records)
    files = {
        f"{name}.md": "\n".join(map(to_markdown, several))
        for name, several in tables.items()
        if several
    }
    # a CSV is one table, and the whole of it: every γ and domain, one a row
    whole = {name: several[0] for name, several in tables.items() if several}
    whole["tau"] = tau_long(found)
    whole["differences"] = difference_table(
        found.comparisons, baseline=config.baseline, caption="Differences, one a row"
    )
    files |= {f"{name}.csv": to_csv(table) for name, table in whole.items()}
    content = _content(results, found, config, records=records)
    files["index.html"] = render({**content, "tables": tables})
    return Report(files, metrics(found))


def _tables(
    results: Results, found: Findings, config: ReportConfig, *, records: Records
) -> dict[str, list[Table]]:
    """Tables by the name of their files; one that has nothing to say is not there."""
    return {
        "tau": [tau_table(found, gamma) for gamma in found.gammas],
        "differences": _difference_tables(found, config),
        "paper": paper_table(results, found, records.losses, baseline=config.baseline),
        "blocks": _block_tables(found),
        "alpha": [alpha_table(found)],
        "predicted": [predicted_table(found)],
        "served": served_tables(results, config),
        "prompt_sets": set_tables(results, config),
        "cache": rate_tables(records.cache),
        "coverage": coverage_tables(records.cache),
        "position": [strata_table(found, "position")],
        "entropy": [strata_table(found, "entropy")],
        "cost": cost_tables(results, records.timings),
        "speed": speed_tables(results, records.timings),
        "speedup": speedup_tables(results, found, records.timings),
    }


def _content(
    results: Results, found: Findings, config: ReportConfig, *, records: Records
) -> dict[str, Any]:
    """What the page says beside its tables."""
    gamma = found.gammas[0]
    primary = found.overall(gamma)
    style = styles(results.objectives(), config.baseline)
    return {
        "headline": headline(primary, config.baseline, gamma),
        "summary": _summary(results, found),
        "verdicts": verdicts(primary, config.baseline),
        "baseline": config.baseline,
        "gamma": gamma,
        "confidence": f"{100 * config.confidence:g}",
        "resamples": f"{config.resamples:,}",
        "min_seeds": MIN_SEEDS,
        "withheld": sorted({c.draft for c in primary if c.difference.over_seeds is None}),
        "legend": [(name, swatch(k)) for name, k in style.items() if name in results.objectives()],
        "charts": {
            "forest": forest_charts(primary, style),
            "gamma": gamma_charts(found, style),
            "depth": depth_charts(found, style),
            "position": strata_charts(found, style, "position"),
            "entropy": strata_charts(found, style, "entropy"),
            "curves": curve_charts(records.curves, style),
            "predicted": predicted_chart(found, style),
        },
        "traces": trace_view(records.traces),
        "rate": rate_exhibit(records.cache),
        "agreement": agreement_words(found),
        "sharpen": records.target.get("sharpen"),
        "facts": facts(records.target, records.cache, records.metrics, records.params),
        "objectives": objective_words(results, records.losses),
    }


def objective_words(results: Results, losses: Mapping[str, Json]) -> list[tuple[str, str]]:
    """What each objective's name stands for: its kind and its settings."""
    words = []
    for name in results.objectives():
        section = losses.get(name, {})
        settings = [f"{key} {value}" for key, value in section.items() if key != "kind"]
        if section:
            words.append((name, ", ".join([str(section["kind"]), *settings])))
    return words


def _difference_tables(found: Findings, config: ReportConfig) -> list[Table]:
    """Primary table, the other γ, then by domain at the primary γ."""
    tables = []
    for gamma in found.gammas:
        rows = found.overall(gamma)
        caption = f"Differences of τ to {config.baseline} at γ = {gamma}, all domains"
        if rows:
            tables.append(difference_table(rows, baseline=config.baseline, caption=caption))
    by_domain = [c for c in found.comparisons if c.domain != ALL and c.gamma == found.gammas[0]]
    if by_domain:
        caption = f"Differences of τ to {config.baseline} at γ = {found.gammas[0]}, by domain"
        tables.append(difference_table(by_domain, baseline=config.baseline, caption=caption))
    return tables or [
        difference_table([], baseline=config.baseline, caption=f"No arm beside {config.baseline}")
    ]


def _block_tables(found: Findings) -> list[Table]:
    gamma = found.gammas[0]
    if not found.blocks:
        return []
    caption = f"Block verification against token verification of the same arms at γ = {gamma}"
    return [difference_table(found.blocks, baseline="token verification", caption=caption)]


def verdicts(primary: Sequence[Comparison], baseline: str) -> list[Verdict]:
    """One sentence a comparison, sampled decoding first."""
    ordered = sorted(primary, key=lambda c: -c.temperature)
    return [
        Verdict(
            c.draft,
            verdict(
                c.difference, objective=c.objective, baseline=baseline, temperature=c.temperature
            ),
            direction(c),
        )
        for c in ordered
    ]


def direction(comparison: Comparison) -> str:
    """longer, shorter, or open where the deciding interval holds zero."""
    interval = comparison.difference.verdict
    if not interval.decided:
        return "open"
    return "longer" if interval.estimate > 0 else "shorter"


def headline(primary: Sequence[Comparison], baseline: str, gamma: int) -> str:
    """Whether the other losses beat the baseline: counts of decided comparisons, no more.

    What holds over seeds comes first and apart from what holds for the trained drafts alone.
    """
    if not primary:
        return f"No arm beside {baseline} was compared at γ = {gamma}."
    solid = [c for c in primary if c.difference.over_seeds is not None]
    own = [c for c in primary if c.difference.over_seeds is None]
    parts = [
        f"{lead} ({', '.join(dict.fromkeys(c.draft for c in rows))}), {_counts(rows, baseline)}."
        for lead, rows in (("Over seeds", solid), ("For the trained drafts alone", own))
        if rows
    ]
    return " ".join(parts)


def _counts(rows: Sequence[Comparison], baseline: str) -> str:
    """`3 of 3 comparisons come out longer than kl at T = 1, 1 of 3 at T = 0 (2 undecided)`."""
    parts: list[str] = []
    for temperature in sorted({c.temperature for c in rows}, reverse=True):
        here = [direction(c) for c in rows if c.temperature == temperature]
        text = f"{here.count('longer')} of {len(here)}"
        if not parts:
            come = "comparisons come" if len(here) > 1 else "comparison comes"
            text += f" {come} out longer than {baseline}"
        text += f" at {law(temperature)}"
        rest = [
            f"{here.count(kind)} {word}"
            for kind, word in (("shorter", "shorter"), ("open", "undecided"))
            if kind in here
        ]
        parts.append(text + (f" ({', '.join(rest)})" if rest else ""))
    return ", ".join(parts)


def _summary(results: Results, found: Findings) -> str:
    seeds, drafts = len({arm.seed for arm in results.arms}), len(results.drafts)
    laws = " and ".join(law(t) for t in results.temperatures())
    return (
        f"{_counted(len(results.arms), 'arm')}: {_counted(drafts, 'draft')}, "
        f"{_counted(len(results.objectives()), 'objective')}, up to {_counted(seeds, 'seed')}. "
        f"{_counted(found.prompts, 'held-out prompt')} in "
        f"{_counted(len(found.domains), 'domain')}, {laws}."
    )


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def agreement_words(found: Findings) -> list[str]:
    """Whether predicted and measured τ agree, one sentence a temperature."""
    sentences = []
    for temperature in sorted(found.z_points, reverse=True):
        rows = [p.agreement for p in found.predictions if p.temperature == temperature]
        if temperature > 0:
            largest, point = max(abs(a.z) for a in rows), found.z_points[temperature]
            word = "agree" if largest < point else "do not agree"
            sentences.append(
                f"At {law(temperature)} predicted and measured τ {word}: the largest |z| of "
                f"{_counted(len(rows), 'arm')} is {largest:.2f}, the familywise 99 % point "
                f"{point:.2f}."
            )
        else:
            wrong, total = sum(a.unequal for a in rows), sum(a.prompts for a in rows)
            all_of = f"all {total:,} texts" if total != 1 else "the one text"
            text = f"At {law(temperature)} the numbers of rounds are equal on {all_of}"
            if wrong:
                text = (
                    f"At {law(temperature)} the numbers of rounds differ on {wrong:,} of "
                    f"{_counted(total, 'text')}"
                )
            sentences.append(f"{text} ({_counted(len(rows), 'arm')}).")
    return sentences


def metrics(found: Findings) -> dict[str, Any]:
    """The primary numbers, nested by draft, objective and temperature, for `dvc metrics diff`."""
    nested: dict[str, Any] = {}
    gamma = found.gammas[0]
    for t in found.tau:
        if t.gamma == gamma and t.domain == ALL:
            leaf = {"tau": round(t.tau.estimate, 6)}
            nested.setdefault(t.draft, {}).setdefault(t.objective, {})[f"T{t.temperature:g}"] = leaf
    for c in found.overall(gamma):
        leaf = nested[c.draft][c.objective][f"T{c.temperature:g}"]
        shown = c.difference.verdict
        leaf["difference_percent"] = round(100 * shown.estimate, 4)
        leaf["difference_percent_lo"] = round(100 * shown.lo, 4)
        leaf["difference_percent_hi"] = round(100 * shown.hi, 4)
        leaf["seeds"] = c.difference.seeds
    return nested


def trace_view(traces: Mapping[str, Sequence[Json]]) -> list[dict[str, Any]]:
    """Traced prompts, each with its decodings by every arm: what the page steps through.

    [{domain, prompt_text, decodings: [{arm, law, gamma, tokens, passes, tau, first, rounds}]}].
    """
    prompts: dict[str, dict[str, Any]] = {}
    for arm, rows in traces.items():
        for row in rows:
            entry = prompts.setdefault(
                row["prompt"],
                {"domain": row["domain"], "prompt_text": row["prompt_text"], "decodings": []},
            )
            tokens, passes = sum(r["emitted"] for r in row["rounds"]), len(row["rounds"])
            entry["decodings"].append(
                {
                    "arm": arm,
                    "temperature": row["temperature"],
                    "law": Setting.parse(row["law"]).words,
                    "gamma": row["gamma"],
                    "tokens": tokens,
                    "passes": passes,
                    "tau": f"{tokens / passes:.2f}" if passes else "–",
                    "first": "".join(map(visible, row["first"])),
                    "rounds": [_shown_round(r) for r in row["rounds"]],
                }
            )
    for entry in prompts.values():
        entry["decodings"].sort(key=lambda d: -d["temperature"])
    return sorted(prompts.values(), key=lambda entry: entry["domain"])


def visible(token: str) -> str:
    """A token with its line ends, tabs and blanks to be seen."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥")
    return shown if shown.strip(" ") else shown.replace(" ", "␣") or "∅"


def _shown_round(r: Json) -> dict[str, Any]:
    """Chips of one round: drafts up to the first refusal with their numbers, then the target's."""
    drafts: list[dict[str, Any]] = []
    refused = False
    for draft in r["drafts"]:
        kept = bool(draft["kept"])
        state = "kept" if kept else "unseen" if refused else "refused"
        refused = refused or not kept
        drafts.append({"token": visible(draft["token"]), "state": state, "why": _why(draft, state)})
    own = "bonus" if not refused else "in its place"
    return {
        "place": r["start"],
        "drafts": drafts,
        "own": {"token": visible(r["token"]), "why": f"target’s own, {own}; p {_prob(r['p'])}"},
        "cut": r["emitted"] < 1 + sum(d["state"] == "kept" for d in drafts),
    }


def _why(draft: Json, state: str) -> str:
    """`kept: p 0.32, q 0.41, u 0.12 < p/q 0.78; α 0.77`."""
    p = _prob(draft["p"])
    if draft["q"] is None:
        word = {"kept": "kept: the target’s argmax", "refused": "refused: not the argmax"}
        return f"{word.get(state, 'after a refusal')}; p {p}"
    q = _prob(draft["q"])
    if state == "unseen":
        return f"after a refusal; p {p}, q {q}"
    ratio = draft["p"] / draft["q"] if draft["q"] else math.inf
    sign = "<" if state == "kept" else "≥"
    return (
        f"{state}: p {p}, q {q}, u {draft['u']:.3f} {sign} p/q {ratio:.3f}; α {draft['alpha']:.3f}"
    )


def _prob(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 or p == 0 else "< 0.001"
