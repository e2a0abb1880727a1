"""A project folder with made-up results: effects, seeds, domains and noise are known.

The default matrix's shape: `lm` with three seeds and four objectives, `lm_wide`, `medusa` (which
stops at four heads) and `eagle3` with one seed and two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.matrix import Arm
from storage.tables import DEPTHS, ROUNDS, STRATA, write_table
from storage.workspace import write_json

DRAFTS: Mapping[str, tuple[str, int, Sequence[str]]] = {
    "lm": ("lm", 3, ("kl", "tv", "lk_alpha", "lk_lambda")),
    "lm_wide": ("lm", 1, ("kl", "lk_lambda")),
    "medusa": ("medusa", 1, ("kl", "lk_lambda_eta10")),
    "eagle3": ("eagle3", 1, ("kl", "lk_lambda")),
}
ALPHA = {"lm": 0.655, "lm_wide": 0.745, "medusa": 0.40, "eagle3": 0.71}
GAIN = {"kl": 0.0, "tv": 0.043, "lk_alpha": 0.036, "lk_lambda": 0.038, "lk_lambda_eta10": 0.025}
CERTIFIED = {
    "exact": 0.8123,
    "width": 0.0211,
    "width_p99": 0.0834,
    "error": -1.2e-4,
    "error_se": 2.3e-4,
    "error_slack": 0.0061,
    "covered": 1.0,
}
LOSSES: Mapping[str, Mapping[str, Any]] = {
    "kl": {"kind": "kl"},
    "tv": {"kind": "tv"},
    "lk_alpha": {"kind": "lk_alpha"},
    "lk_lambda": {"kind": "lk_lambda", "eta": 3.0},
    "lk_lambda_eta10": {"kind": "lk_lambda", "eta": 10.0},
}
DOMAINS = ("code", "maths", "prose")


@dataclass
class World:
    """What a made-up project holds."""

    prompts: int = 256
    decoded: int = 128
    depth: int = 7
    temperatures: tuple[float, ...] = (0.0, 1.0)
    seed_noise: float = 0.002
    prompt_noise: float = 0.02
    drafts: Mapping[str, tuple[str, int, Sequence[str]]] = field(default_factory=lambda: DRAFTS)

    def arms(self) -> list[Arm]:
        return [
            Arm(
                draft=draft,
                kind=kind,
                objective=objective,
                loss=objective.removesuffix("_eta10"),
                seed=seed,
                start=f"{draft}-{seed}",
            )
            for draft, (kind, seeds, objectives) in self.drafts.items()
            for seed in range(seeds)
            for objective in objectives
        ]


def write_results(root: Path, world: World) -> list[Arm]:
    """Write `results/` under `root`; the same world gives the same rows."""
    rng = np.random.default_rng(7)
    names = [f"heldout-{n:04d}" for n in range(world.prompts)]
    domains = [DOMAINS[n % 3] for n in range(world.prompts)]
    tokens = {t: rng.integers(40, 96, world.prompts) for t in world.temperatures}
    ease = (
        rng.normal(0, 0.15, world.prompts)
        + np.array([0.05, 0.12, -0.1])[np.arange(world.prompts) % 3]
    )
    for arm in world.arms():
        noise = np.random.default_rng([arm.seed, len(arm.key), *arm.key.encode()])
        shift = GAIN[arm.objective] + (noise.normal(0, world.seed_noise) if arm.seed else 0)
        rounds: list[dict[str, Any]] = []
        depths: list[dict[str, Any]] = []
        own = {**arm.model_dump(exclude={"start"}), "arm": arm.key}
        personal = noise.normal(0, world.prompt_noise, world.prompts)
        for t in world.temperatures:
            alpha = np.clip(ALPHA[arm.draft] + (0.05 if t == 0 else 0) + 0.3 * ease, 0.05, 0.97)
            gain = shift * (1 if t else 0.3) + personal * (1 if t else 4)
            for gamma in range(1, (4 if arm.kind == "medusa" else world.depth) + 1):
                tau = (1 - alpha ** (gamma + 1)) / (1 - alpha) * np.exp(gain * gamma / 4)
                exact = tokens[t] / tau
                if t == 0:
                    exact = np.maximum(1, np.round(exact))
                for n, name in enumerate(names):
                    base = own | {
                        "temperature": t,
                        "law": f"T={t:g}",
                        "gamma": gamma,
                        "prompt": name,
                        "domain": domains[n],
                        "tokens": int(tokens[t][n]),
                        "rounds": float(exact[n]),
                        "drafted": float(exact[n] * gamma),
                        "accepted": float(tokens[t][n] - exact[n]),
                    }
                    rounds.append(base | {"instrument": "replay"})
                    if t:
                        better = {"rounds": float(exact[n] * 0.985)}
                        rounds.append(base | {"instrument": "replay_block"} | better)
                    if gamma == 4 and arm.seed == 0 and n < world.decoded:
                        rounds.append(base | {"instrument": "replay_decode"})
                        luck = float(noise.normal(0, 0.12)) if t else 0.0
                        measured = {"rounds": float(np.round(exact[n] * (1 + luck)))}
                        rounds.append(base | {"instrument": "decode"} | measured)
            depths += _depths(own, names, domains, t=t, alpha=alpha + shift / 2, kind=arm.kind)
        stem = root / "results" / arm.start / "arms"
        write_table(stem / f"{arm.objective}.rounds.parquet", ROUNDS, rounds)
        write_table(stem / f"{arm.objective}.depths.parquet", DEPTHS, depths)
        strata = _strata(own, world.temperatures, alpha=ALPHA[arm.draft] + shift / 2)
        write_table(stem / f"{arm.objective}.strata.parquet", STRATA, strata)
        if arm.seed == 0:
            write_json(stem / f"{arm.objective}.traces.json", _traces(arm.key, names[0]))
    return world.arms()


def _strata(own: Mapping[str, Any], laws: Sequence[float], *, alpha: float) -> list[dict[str, Any]]:
    """Acceptance falls with entropy and with the place; entropy is known at T = 1 alone."""
    kinds = {"position": [(1.0, 8.0), (8.0, 32.0)], "entropy": [(0.0, 0.5), (0.5, np.inf)]}
    return [
        {
            **own,
            "temperature": t,
            "law": f"T={t:g}",
            "by": kind,
            "lo": lo,
            "hi": hi,
            "depth": k,
            "anchors": 100,
            "alpha": 100 * alpha * (0.9 if lo > 1 or hi == np.inf else 1.0) if t else None,
            "accept": 95 * alpha,
            "survive": 95 * alpha ** (k + 1),
        }
        for t in laws
        for kind, edges in kinds.items()
        if t or kind == "position"
        for lo, hi in edges
        for k in range(2)
    ]


def _traces(arm: str, prompt: str) -> dict[str, Any]:
    """One prompt decoded in two passes: a refusal, then all kept."""
    numbers = {"p": 0.25, "q": 0.5, "alpha": 0.6, "u": 0.75}
    refused = {"token": "<b>", "kept": False, **numbers}
    kept = {"token": "a\n", "kept": True, **numbers, "u": 0.125}
    unseen = {"token": "z", "kept": False, **numbers}
    first = {"start": 1, "drafts": [refused, unseen], "token": "c", "p": 0.4, "emitted": 1}
    second = {"start": 2, "drafts": [kept, kept], "token": "d", "p": 0.0001, "emitted": 3}
    row = {"prompt": prompt, "domain": "code", "temperature": 1.0, "law": "T=1", "gamma": 2}
    texts = {"prompt_text": "if x <", "text": "0 c a a d", "first": ["0"]}
    return {"arm": arm, "traces": [row | texts | {"rounds": [first, second]}]}


def _depths(
    own: Mapping[str, Any],
    names: Sequence[str],
    domains: Sequence[str],
    *,
    t: float,
    alpha: np.ndarray,
    kind: str,
) -> list[dict[str, Any]]:
    rows = []
    for n, name in enumerate(names):
        survive = 1.0
        for k in range(4 if kind == "medusa" else 6):
            a = float(alpha[n]) * (0.62**k if kind == "medusa" else 0.98**k)
            survive *= a
            anchors = 70 - k
            sums = {"alpha": a, "alpha_lo": a - 0.004, "alpha_hi": a + 0.002}
            rows.append(
                {
                    **own,
                    "temperature": t,
                    "law": f"T={t:g}",
                    "prompt": name,
                    "domain": domains[n],
                    "depth": k,
                    "anchors": anchors,
                    **{key: value * anchors if t else None for key, value in sums.items()},
                    "accept": a * anchors,
                    "survive": survive * anchors,
                }
            )
    return rows


def write_records(root: Path, world: World) -> None:
    """What target, verify, the timed stages and training leave behind."""
    write_json(
        root / "target/target.json",
        {
            "kind": "embedded",
            "model": "embedded",
            "fingerprint": "3f2a" * 16,
            "vocab_size": 2048,
            "sharpen": 0.6,
            "dtype": "float32",
        },
    )
    split = {
        "sequences": 2560,
        "tokens": 245760,
        "rows": 230000,
        "mean_kept": 38.2,
        "mean_tail_mass": 0.0312,
        "kept_quantiles": {"p10": 4, "p50": 31, "p90": 88, "p99": 160},
        "mean_tail_mass_by_domain": {"code": 0.02, "maths": 0.01, "prose": 0.06},
        "bytes_per_token": {"hidden": 560.1, "topk_ids": 61.25, "topk_p": 20.5, "tail_ids": 33.0},
        "replay_max_error": {"token_logp": 2.1e-6, "tv": 3.2e-4},
        "certified": {
            "target at T=1.5": {
                "rows": 1520,
                **{f"alpha_{key}": value for key, value in CERTIFIED.items()},
                **{f"kl_{key}": value for key, value in CERTIFIED.items()},
            }
        },
    }
    splits = ("train", "heldout", "greedy")
    write_json(
        root / "cache-report/report.json",
        {
            "splits": dict.fromkeys(splits, split),
            "source": {name: {"target": "3f2a" * 16, "sequences": "77" * 32} for name in splits},
            "findings": [],
        },
    )
    write_json(root / "metrics/capture.json", {"tokens": 301056, "mean_kept": 38.2})
    write_json(root / "timings/generate.json", {"seconds": 76.25})
    write_json(root / "timings/capture.json", {"seconds": 26.5, "tokens_per_s": 11342.0})
    for arm in world.arms():
        write_json(root / f"timings/warmup-{arm.start}.json", {"seconds": 24.0})
        write_json(root / f"timings/train-{arm.key}.json", {"seconds": 12.5 + arm.seed})
        _write_curve(root / "drafts" / arm.start / arm.objective / "curve.csv", arm)
        speeds = {"seconds": 31.0, "plain T=1 tokens_per_s": 2210.0}
        speeds |= {f"{a.objective} T=1 tokens_per_s": 3400.0 for a in world.arms()}
        speeds |= {"plain T=1 target_step_s": 0.020}
        speeds |= {f"{a.objective} T=1 target_step_s": 0.024 for a in world.arms()}
        speeds |= {f"{a.objective} T=1 draft_step_s": 0.001 for a in world.arms()}
        write_json(
            root / f"timings/evaluate-{arm.start}.json",
            speeds if not arm.seed else {"seconds": 9.0},
        )


def _write_curve(path: Path, arm: Arm) -> None:
    rng = np.random.default_rng([arm.seed, *arm.objective.encode()])
    lines = ["step,loss,kl,alpha,lr,heldout_alpha"]
    for step in range(10, 301, 10):
        a = ALPHA[arm.draft] * (1 - 0.05 * np.exp(-step / 90)) + GAIN[arm.objective] * step / 600
        held = f"{a:.5f}" if step % 50 == 0 else ""
        lines.append(f"{step},1.2,1.1,{a + rng.normal(0, 0.004):.5f},0.003,{held}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_params(root: Path, world: World, **over: Any) -> None:
    """Sections `report`, `arms` and `losses` of params.yaml."""
    from ruamel.yaml import YAML

    report = {"baseline": "kl", "gammas": [4, 7], "confidence": 0.95, "resamples": 2000, "seed": 0}
    params = {
        "report": report | over,
        "arms": {a.key: a.model_dump() for a in world.arms()},
        "losses": LOSSES,
    }
    with (root / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(params, file)


def write_project(root: Path, world: World, **over: Any) -> None:
    """A whole made-up project, ready for `stages.report`."""
    write_results(root, world)
    write_records(root, world)
    write_params(root, world, **over)
