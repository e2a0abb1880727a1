"""Rows of one arm -> the nested numbers that `dvc metrics` shows, and speeds for `timings/`.

Sums over prompts, then ratios: every τ and α is micro-averaged. Knows outcomes, not how they came.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.evaluate import Outcome
from pipeline.setting import Setting

Row = Mapping[str, Any]
DIGITS = 6  # of a metric: beyond them two machines differ anyway


def summarise(rounds: Sequence[Row], depths: Sequence[Row]) -> dict[str, Any]:
    """Law -> τ by instrument and γ, acceptance and α by depth.

    What greedy drafts are kept with is p(argmax q), and named so: it is not α.
    """
    found: dict[str, Any] = {}
    for setting in _settings(rounds):
        mine = [row for row in rounds if row["law"] == setting.name]
        taus: dict[str, dict[str, float]] = {}
        for name, gamma in sorted({(row["instrument"], row["gamma"]) for row in mine}):
            chosen = [row for row in mine if (row["instrument"], row["gamma"]) == (name, gamma)]
            taus.setdefault(name, {})[str(gamma)] = ratio(chosen, "tokens", "rounds")
        by_depth = _by_depth([r for r in depths if r["law"] == setting.name])
        if setting.drafts == "greedy":
            by_depth = {k.replace("alpha", "p_argmax_q"): v for k, v in by_depth.items()}
        found[setting.name] = {"tau": taus} | by_depth
    return found


def _settings(rows: Iterable[Row]) -> list[Setting]:
    """The settings that rows name, in their order."""
    names = {row["law"] for row in rows}
    return sorted((Setting.parse(name) for name in names), key=lambda setting: setting.order)


def merge_strata(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Batches' sums of one stratum -> one row each of `storage.tables.STRATA`, arm apart."""
    names = ("temperature", "law", "by", "lo", "hi", "depth")
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        sums = merged.setdefault(key, dict(zip(names, key, strict=True)) | {"alpha": None})
        for name in ("anchors", "alpha", "accept", "survive"):
            if name in row:
                sums[name] = (sums.get(name) or 0.0) + row[name]
    return [
        sums | {"anchors": int(sums["anchors"])}
        for _, sums in sorted(merged.items(), key=lambda item: item[0])
    ]


def _by_depth(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name in ("alpha", "alpha_lo", "alpha_hi", "accept", "survive"):
        for depth in sorted({row["depth"] for row in rows if row[name] is not None}):
            mine = [row for row in rows if row["depth"] == depth]
            found.setdefault(name, {})[str(depth)] = ratio(mine, name, "anchors")
    return found


def ratio(rows: Iterable[Row], over: str, under: str) -> float:
    """Σ over / Σ under, rounded; 0 where there is nothing to divide by."""
    listed = list(rows)
    total = sum(row[under] for row in listed)
    return round(float(sum(row[over] for row in listed) / total), DIGITS) if total else 0.0


def identical(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Share of greedily decoded responses that equal the cached ones: 1 where nothing is lost.

    Not of sampled ones, which differ by chance.
    """
    greedy = [o for o in outcomes if o.speed and o.rounds[0]["temperature"] == 0]
    same, all_of_them = sum(o.identical for o in greedy), sum(len(o.rounds) for o in greedy)
    return {"greedy_identical": round(same / all_of_them, DIGITS)} if greedy else {}


def speeds(name: str, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Measured speeds of the decodings among the outcomes, keys such as `kl T=1 tokens_per_s`.

    `tokens_per_s` counts tokens after the first over all rounds, sampling and bookkeeping
    included; `target_step_s` is one pass of the target over γ + 1 tokens a row of a batch,
    `draft_step_s` one drafted token a row. Batches shrink as their rows finish.
    """
    found: dict[str, float] = {}
    decodings = [o for o in outcomes if o.speed]
    for setting in _settings(o.rounds[0] for o in decodings):
        mine = [o for o in decodings if o.rounds[0]["law"] == setting.name]
        total = {what: sum(o.speed[what] for o in mine) for what in mine[0].speed}
        steps, gamma = max(total["steps"], 1), mine[0].rounds[0]["gamma"]
        prefix = f"{name} {setting.name}"
        found[f"{prefix} tokens_per_s"] = total["tokens"] / max(total["rounds_s"], 1e-9)
        found[f"{prefix} target_step_s"] = total["target_s"] / steps
        if gamma:
            found[f"{prefix} draft_step_s"] = total["draft_s"] / (steps * gamma)
    return found
