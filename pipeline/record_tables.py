"""What earlier stages recorded of themselves -> tables of cost and cache, and lines of provenance.

Knows the JSON that `verify`, `target` and the timed stages write; prints what is there and leaves
out what is not, because a report must open on results of any preset.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.findings import Findings
from pipeline.page import SIGNIFICANT, Cell, Column, Table
from pipeline.results import ALL, Results

Json = Mapping[str, Any]


def cost_tables(results: Results, timings: Mapping[str, Json]) -> list[Table]:
    """Seconds of the target, once, and of each draft; what arms without a cache would pay."""
    seconds = {name: float(t["seconds"]) for name, t in timings.items() if "seconds" in t}
    rows: list[dict[str, Cell]] = []
    for stage, what in (
        ("generate", "target writes the responses, once"),
        ("capture", "target's teacher-forced pass into the cache, once"),
    ):
        if stage in seconds:
            rows.append(_cost(what, 1, seconds[stage]))
    for draft in results.drafts:
        arms = [arm for arm in results.arms if arm.draft == draft]
        starts = list(dict.fromkeys(arm.start for arm in arms))
        for stage, cells, what in (
            ("warmup", starts, "warm-up, shared by its objectives"),
            ("train", [arm.key for arm in arms], "training, one run an arm"),
            ("evaluate", starts, "evaluation, replay and decode"),
        ):
            known = [seconds[f"{stage}-{c}"] for c in cells if f"{stage}-{c}" in seconds]
            if known:
                rows.append(_cost(f"{draft}: {what}", len(known), sum(known)))
    if "capture" in seconds and len(results.arms) > 1:
        rows.append(
            _cost(
                "for comparison: one target pass an arm, as training without a cache needs at "
                "the least",
                len(results.arms),
                len(results.arms) * seconds["capture"],
            )
        )
    columns = [
        Column("what", "what"),
        Column("runs", "runs"),
        Column("seconds", "seconds in all", digits=1),
        Column("seconds_each", "seconds each", digits=1),
    ]
    table = Table("Cost, seconds of wall clock on the machine of the run", columns, rows)
    return [table] if rows else []


def speed_tables(results: Results, timings: Mapping[str, Json]) -> list[Table]:
    """Decoded tokens per second beside plain decoding through the same loop, where measured."""
    rows: list[dict[str, Cell]] = []
    for arm in results.arms:
        times = timings.get(f"evaluate-{arm.start}", {})
        for temperature in sorted(results.temperatures(), reverse=True):
            law = f"T={temperature:g}"
            rate = times.get(f"{arm.objective} {law} tokens_per_s")
            plain = times.get(f"plain {law} tokens_per_s")
            if rate is None:
                continue
            step: dict[str, Cell] = {
                f"{who}_step_ms": 1000 * float(seconds)
                for who in ("draft", "target")
                if (seconds := times.get(f"{arm.objective} {law} {who}_step_s")) is not None
            }
            row: dict[str, Cell] = {"arm": arm.key, "temperature": f"{temperature:g}"}
            row |= {"tokens_per_s": float(rate), "over_plain": rate / plain if plain else None}
            rows.append(row | step)
    columns = [
        Column("arm", "arm"),
        Column("temperature", "T"),
        Column("tokens_per_s", "tokens/s", digits=0),
        Column("over_plain", "over plain decoding", digits=2),
        Column("draft_step_ms", "draft step, ms", digits=2),
        Column("target_step_ms", "target pass, ms", digits=2),
    ]
    caption = (
        "Measured decoding speed, in batches; short runs on one machine, no result. A batch ends "
        "with its slowest row and shrinks until then, whereas the expected speed-up takes full "
        "batches throughout: what is measured may lie well below it"
    )
    return [Table(caption, columns, rows)] if rows else []


@dataclass(frozen=True)
class Steps:
    """Measured seconds of one draft at one temperature, means over its decoded arms."""

    plain: float
    """c: a pass of the target over one token a row."""
    draft: float
    """One drafted token."""
    verify: float
    """A pass of the target over γ + 1 tokens a row, at the decoded γ."""
    gamma: int

    def speedup(self, tau: float, gamma: int) -> float:
        """τ·c / (γ·c_draft + c_verify(γ)), tokens/s over plain decoding's.

        c_verify is measured at one γ; between and beyond it is taken as linear in the tokens fed.
        """
        verify = self.plain + max(self.verify - self.plain, 0.0) * gamma / self.gamma
        return tau * self.plain / (gamma * self.draft + verify)


def step_times(
    results: Results, found: Findings, timings: Mapping[str, Json]
) -> dict[tuple[str, float], Steps]:
    """By draft and temperature, where an arm of it was decoded beside plain decoding."""
    steps = {}
    for draft in results.drafts:
        for temperature in results.temperatures():
            rows = []
            for p in found.predictions:
                times = timings.get(f"evaluate-{p.arm.start}", {})
                law = f"T={p.temperature:g}"
                names = [f"plain {law} target_step_s"]
                names += [f"{p.arm.objective} {law} {w}_step_s" for w in ("draft", "target")]
                if (p.arm.draft, p.temperature) == (draft, temperature) and all(
                    name in times for name in names
                ):
                    rows.append([float(times[name]) for name in names] + [float(p.gamma)])
            if rows:
                plain, drafted, verify, gamma = (
                    sum(c) / len(rows) for c in zip(*rows, strict=True)
                )
                steps[draft, temperature] = Steps(plain, drafted, verify, round(gamma))
    return steps


def speedup_tables(results: Results, found: Findings, timings: Mapping[str, Json]) -> list[Table]:
    """Each arm's best γ under the cost model of `Steps`, and what it would gain."""
    rows: list[dict[str, Cell]] = []
    for (draft, temperature), steps in step_times(results, found, timings).items():
        for objective in results.objectives(draft):
            taus = {
                t.gamma: t.tau.estimate
                for t in found.tau
                if (t.draft, t.objective, t.temperature, t.domain)
                == (draft, objective, temperature, ALL)
            }
            if not taus:
                continue
            gains = {gamma: steps.speedup(tau, gamma) for gamma, tau in taus.items()}
            best = max(gains, key=lambda gamma: gains[gamma])
            rows.append(
                {
                    "draft": draft,
                    "temperature": f"{temperature:g}",
                    "objective": objective,
                    "best_gamma": best,
                    "tau": taus[best],
                    "speedup": gains[best],
                    "speedup_decoded": gains.get(steps.gamma),
                    "draft_cost": steps.draft / steps.plain,
                    "verify_cost": steps.verify / steps.plain,
                }
            )
    columns = [
        Column("draft", "draft", merge=True),
        Column("temperature", "T", merge=True),
        Column("objective", "objective"),
        Column("best_gamma", "best γ"),
        Column("tau", "τ there"),
        Column("speedup", "expected speed-up"),
        Column("speedup_decoded", "at the decoded γ"),
        Column("draft_cost", "c_draft / c", digits=3),
        Column("verify_cost", "c_verify / c", digits=3),
    ]
    caption = (
        "Best γ and expected speed-up τ·c / (γ·c_draft + c_verify), from replay's τ and the step "
        "times measured in this run's batches; an expectation for this machine, no result. It "
        "takes full batches throughout, whereas the measured decoding speed is of batches that end "
        "with their slowest row"
    )
    return [Table(caption, columns, rows)] if rows else []


def _cost(what: str, runs: int, seconds: float) -> dict[str, Cell]:
    return {"what": what, "runs": runs, "seconds": seconds, "seconds_each": seconds / runs}


def rate_tables(report: Json) -> list[Table]:
    """Bytes a token by array, one column a split."""
    splits: Mapping[str, Json] = report.get("splits", {})
    rates = {name: split.get("bytes_per_token", {}) for name, split in splits.items()}
    arrays = dict.fromkeys(array for rate in rates.values() for array in rate)
    largest = sorted(arrays, key=lambda a: -max(float(r.get(a, 0)) for r in rates.values()))
    rows: list[dict[str, Cell]] = [
        {"what": array, **{name: _at(rate, array) for name, rate in rates.items()}}
        for array in largest
    ]
    if rows:
        rows.append({"what": "all arrays", **{n: float(sum(r.values())) for n, r in rates.items()}})
    total = frozenset((len(rows) - 1, name) for name in splits)
    what, numbers = Column("what", "array"), [Column(s, s) for s in splits]
    table = Table("Bytes a token on disk, by array and split", [what, *numbers], rows, total)
    return [table] if rows else []


def coverage_tables(report: Json) -> list[Table]:
    """What the truncation is proved to cost, then every other number of the cache report."""
    splits: Mapping[str, Json] = report.get("splits", {})
    names: dict[str, str] = {}
    for split in splits.values():
        for group, value in split.items():
            if group in ("bytes_per_token", "certified"):
                continue
            if isinstance(value, Mapping):
                names |= {f"{group}.{key}": f"{_words(group)}: {_words(key)}" for key in value}
            else:
                names[group] = _words(group)
    rows: list[dict[str, Cell]] = [
        {"what": words, **{name: _at(split, path) for name, split in splits.items()}}
        for path, words in names.items()
    ]
    columns = [Column("what", "what"), *(Column(s, s, digits=SIGNIFICANT) for s in splits)]
    caption = "Coverage of the target's law by what is kept, by split; means over supervised rows"
    return [*_certified(splits), *([Table(caption, columns, rows)] if rows else [])]


CERTIFIED = {
    "exact": "exact",
    "width": "width of bounds, mean",
    "width_p99": "p99",
    "error": "error of estimate, mean",
    "error_se": "its standard error",
    "error_slack": "rounding allows",
    "covered": "intervals that hold",
}


def _certified(splits: Mapping[str, Json]) -> list[Table]:
    """Of the replayed tokens: bounds and estimates of two reference drafts against full laws."""
    rows: list[dict[str, Cell]] = []
    for split, record in splits.items():
        for draft, found in record.get("certified", {}).items():
            for name, symbol in (("alpha", "α"), ("kl", "KL, nats")):
                cells: dict[str, Cell] = {
                    key: _at(found, f"{name}_{key}") for key in CERTIFIED if key != "covered"
                }
                cells["covered"] = f"{100 * float(found[f'{name}_covered']):.6g} %"
                own: dict[str, Cell] = {"split": split, "draft": draft, "of": symbol}
                rows.append({**own, "rows": _at(found, "rows"), **cells})
    columns = [
        Column("split", "split", merge=True),
        Column("draft", "reference draft"),
        Column("of", "of"),
        Column("rows", "tokens"),
        *(Column(key, title, digits=SIGNIFICANT) for key, title in CERTIFIED.items()),
    ]
    caption = (
        "Certified truncation on the replayed tokens: what the cache proves and estimates of two "
        "stated drafts, against the target's full laws"
    )
    return [Table(caption, columns, rows)] if rows else []


def _at(split: Json, path: str) -> Cell:
    value: Any = split
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    return value


def _words(key: str) -> str:
    return key.replace("_", " ")


def facts(
    target: Json, cache: Json, metrics: Mapping[str, Json], params: Json
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Provenance as groups of name and value, nested keys joined by dots."""
    groups: Sequence[tuple[str, Json]] = (
        ("Target", target),
        ("Cache", {k: v for k, v in cache.items() if k not in ("splits", "findings")}),
        *((f"Metrics of {stage}", metrics[stage]) for stage in sorted(metrics)),
        ("Parameters of this report", params),
    )
    return [(title, found) for title, value in groups if (found := list(_flat(value)))]


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [
            pair
            for key in value
            for pair in _flat(value[key], f"{path}.{key}" if path else str(key))
        ]
    if isinstance(value, list) and any(isinstance(v, Mapping | list) for v in value):
        return []  # a table of its own elsewhere
    if isinstance(value, list):
        return [(path, ", ".join(map(str, value)))]
    return [(path, f"{value:.6g}" if isinstance(value, float) else str(value))]
