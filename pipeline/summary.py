"""Rows of one arm -> the nested numbers that `dvc metrics` shows, and speeds for `timings/`.

Sums over prompts, then ratios: every τ and α is micro-averaged. Knows outcomes, not how they came.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.evaluate import Outcome
from pipeline.setting import Setting

Row = Mapping[str, Any]
DECODED = ("decode", "replay_decode")
DIGITS = 6  # of a metric: beyond them two machines differ anyway


def summarise(rounds: Sequence[Row], depths: Sequence[Row]) -> dict[str, Any]:
    """Law -> τ by instrument and γ, acceptance and α by depth.

    `kept` is of the rounds themselves, as decoded and as replay predicts them: the share whose
    drafts up to depth k were all kept (joint), and of those kept up to k − 1 (conditional). What
    greedy drafts are kept with is p(argmax q), and named so: it is not α.
    """
    found: dict[str, Any] = {}
    for setting in _settings(rounds):
        mine = [row for row in rounds if row["law"] == setting.name]
        taus: dict[str, dict[str, float]] = {}
        joint: dict[str, dict[str, dict[str, float]]] = {}
        for name, gamma in sorted({(row["instrument"], row["gamma"]) for row in mine}):
            chosen = [row for row in mine if (row["instrument"], row["gamma"]) == (name, gamma)]
            taus.setdefault(name, {})[str(gamma)] = ratio(chosen, "tokens", "rounds")
            if name.startswith(DECODED):
                joint[name] = _kept(chosen)
        by_depth = _by_depth([r for r in depths if r["law"] == setting.name])
        if setting.drafts == "greedy":
            by_depth = {k.replace("alpha", "p_argmax_q"): v for k, v in by_depth.items()}
        found[setting.name] = {"tau": taus} | ({"kept": joint} if joint else {}) | by_depth
    return found


def _kept(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Joint and conditional acceptance by depth of the rounds of some prompts."""
    rounds = sum(row["rounds"] for row in rows)
    kept = [sum(column) for column in zip(*(row["kept"] for row in rows), strict=True)]
    found: dict[str, dict[str, float]] = {"joint": {}, "conditional": {}}
    for k, (now, before) in enumerate(zip(kept, [rounds, *kept], strict=False)):
        found["joint"][str(k)] = round(float(now / rounds), DIGITS) if rounds else 0.0
        found["conditional"][str(k)] = round(float(now / before), DIGITS) if before else 0.0
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


def identical(outcomes: Sequence[Outcome], plain: Sequence[Outcome]) -> dict[str, float]:
    """Share of greedily decoded responses that are the target's own: 1 where nothing is lost.

    The target's own are the cached ones, and of a prompt set those of plain decoding. Not of
    sampled responses, which differ by chance.
    """
    own = {name: text for o in plain for name, text in o.texts.items()}
    shares: dict[str, list[int]] = {}
    for o in outcomes:
        if o.speed and o.rounds[0]["temperature"] == 0:
            name = "greedy_identical" + (f" {o.prompt_set}" if o.prompt_set else "")
            same = sum(own[prompt] == text for prompt, text in o.texts.items())
            total = shares.setdefault(name, [0, 0])
            total[0] += same if o.prompt_set else o.identical
            total[1] += len(o.rounds)
    return {name: round(same / total, DIGITS) for name, (same, total) in shares.items()}


def unasked(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Later turns of a set's prompts that were not asked, by set; nothing where all were."""
    found: dict[str, int] = {}
    for o in outcomes:
        if o.unasked:
            name = f"unasked_turns {o.prompt_set}"
            found[name] = found.get(name, 0) + o.unasked
    return found


def speeds(name: str, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Measured speeds of the decodings among the outcomes, keys such as `kl T=1 tokens_per_s`.

    `tokens_per_s` counts tokens after the first over all rounds, sampling and bookkeeping
    included; `target_step_s` is one pass of the target over γ + 1 tokens a row of a batch,
    `draft_step_s` one drafted token a row. Batches shrink as their rows finish. Of a prompt set the
    key says so: `kl T=1 on mt_bench tokens_per_s`.
    """
    found: dict[str, float] = {}
    decodings = [o for o in outcomes if o.speed]
    groups = {(o.prompt_set, o.rounds[0]["law"]) for o in decodings}
    for prompt_set, law in sorted(groups, key=lambda g: (g[0], Setting.parse(g[1]).order)):
        mine = [o for o in decodings if (o.prompt_set, o.rounds[0]["law"]) == (prompt_set, law)]
        total = {what: sum(o.speed[what] for o in mine) for what in mine[0].speed}
        steps, gamma = max(total["steps"], 1), mine[0].rounds[0]["gamma"]
        prefix = f"{name} {law}" + (f" on {prompt_set}" if prompt_set else "")
        found[f"{prefix} tokens_per_s"] = total["tokens"] / max(total["rounds_s"], 1e-9)
        found[f"{prefix} target_step_s"] = total["target_s"] / steps
        if gamma:
            found[f"{prefix} draft_step_s"] = total["draft_s"] / (steps * gamma)
    return found
