"""What a byte of cache buys: lost mass on made-up laws, and the α of drafts trained from the cache.

    python -m benchmarks.rate lost             # some four minutes
    python -m benchmarks.rate alpha PROJECT    # some fifteen
    python -m benchmarks.rate bytes PROJECT    # three: α's bytes alone, after a change of codecs

Each writes its half of the figures, then rate.md and the pictures from all of them. The figures lie
in pipeline/templates/rate.json, from where the report draws them too.

*lost*: laws of benchmarks/synthetic.py at V = 128,256, cut by every rule, written by the project's
own writer. Bytes are those of ids, values, counts and tail mass on disk, all metadata apart; tail
samples stand in a column of their own. One row is the threshold at which exactly as much is lost as
beyond the likeliest 128 ids. The error of values is the total variation between kept p and what
their codes say.

*alpha*: PROJECT is a finished project whose target is small enough for mode `full`. Its sequences
are captured again under each setting by `stages.capture`; an `lm` draft of each seed is trained
from every cache, from one shared KL start, same data, steps and rate; its α is exact, on the
held-out cache of mode `full`. `renormalised` is what peers store: the kept ids alone, scaled to sum
to 1, made here from the same records as they are read.
"""

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pipeline.train
from benchmarks.synthetic import DOCUMENT_TOKENS, documents, layout, records
from lkcache.presets import yaml
from pipeline.batch import Batch
from pipeline.charts import Series, lines
from pipeline.checkpoint import load_draft
from pipeline.config import load
from pipeline.law import SparseLaw
from pipeline.loss import find
from pipeline.rate import DATA, LAW, alpha_series, lost_series
from pipeline.topk import Kept, Rule, truncate
from pipeline.train import FitConfig, Inputs, fit_from_cache, open_inputs
from stages import capture
from storage.codecs import decode_p, encode_p
from storage.reader import Cache
from storage.workspace import write_json
from storage.writer import write_part

HERE = Path(__file__).parent
REGIMES = {"c14": 4, "c06": 4}
"""Documents of 1,024 tokens of each regime; each is written once, so that nothing repeats."""
SAMPLED = {"tail_samples": 16, "tail_full_mass": 0.05, "tail_min_mass": 1e-4}
RULES = {
    "p >= 1e-3": {"min_prob": 1e-3, "max_kept": 1024},
    "p >= 5e-4": {"min_prob": 5e-4, "max_kept": 1024},
    "p >= 2e-4": {"min_prob": 2e-4, "max_kept": 1024},
    "nucleus 0.99, at most 128": {"top_p": 0.99, "max_kept": 128},
    "nucleus 0.999, at most 128": {"top_p": 0.999, "max_kept": 128},
    "fixed K = 32": {"max_kept": 32},
    "fixed K = 64": {"max_kept": 64},
    "fixed K = 128": {"max_kept": 128},
}
SAMPLES = ("tail_kept", "tail_ids", "tail_logp")

WHOLE = dict.fromkeys(
    ("keep", "min_prob", "top_p", "max_kept", "tail_samples", "tail_full_mass", "tail_min_mass")
)
THRESHOLD = {"mode": "topk", "keep": "threshold", "top_p": None, "max_kept": 1024, **SAMPLED}
FIXED = {"mode": "topk", "keep": "fixed", "min_prob": None, "top_p": None, **SAMPLED}
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {**WHOLE, "mode": "full"},
    "rebuild": {**WHOLE, "mode": "rebuild"},
    "p >= 5e-4, 16 samples": {**THRESHOLD, "min_prob": 5e-4},
    "p >= 5e-4, none": {**THRESHOLD, "min_prob": 5e-4, "tail_samples": 0},
    "p >= 5e-3, 16 samples": {**THRESHOLD, "min_prob": 5e-3},
    "p >= 5e-3, none": {**THRESHOLD, "min_prob": 5e-3, "tail_samples": 0},
    "p >= 5e-2, 16 samples": {**THRESHOLD, "min_prob": 5e-2},
    "p >= 5e-2, 4 samples": {**THRESHOLD, "min_prob": 5e-2, "tail_samples": 4},
    "K = 16, none": {**FIXED, "max_kept": 16, "tail_samples": 0},
    "K = 64, none": {**FIXED, "max_kept": 64, "tail_samples": 0},
}
RENORMALISED = {"K = 16, renormalised": "K = 16, none", "K = 64, renormalised": "K = 64, none"}
SEEDS, OBJECTIVES = (0, 1), ("kl", "lk_lambda")
FORMER = "former_codecs"
"""Marks rows whose bytes were measured before a change of codecs: `bytes` takes them anew."""
Row = dict[str, Any]
"""One line of a table, as the data file holds it."""


def lost_mass() -> list[Row]:
    """By regime and rule: kept ids, lost mass, B/token of law and samples, TV of the values."""
    rows: list[Row] = []
    for regime, num in REGIMES.items():
        kept = cut(regime, num, RULES)
        fixed = float(torch.cat([k.tail_logp_mass for k in kept["fixed K = 128"]]).exp().mean())
        least = threshold(kept["p >= 2e-4"], fixed)
        name = f"p >= {least:.2e}, which loses what K = 128 does"
        kept |= cut(regime, num, {name: {"min_prob": least, "max_kept": 1024}})
        for rule in sorted(kept, key=[*RULES, name].index):
            rows.append({"regime": regime, "rule": rule, **measured(kept[rule])})
            print(rows[-1], flush=True)
    return rows


def cut(regime: str, num: int, rules: dict[str, dict[str, Any]]) -> dict[str, list[Kept]]:
    """What each rule keeps of a regime's documents."""
    kept: dict[str, list[Kept]] = {name: [] for name in rules}
    generator = torch.Generator().manual_seed(0)
    for law in documents(regime, num_documents=num, seed=0):
        logp = torch.from_numpy(law).log()
        shape = (len(law), SAMPLED["tail_samples"])
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        token = torch.zeros(len(law), dtype=torch.int64)
        for name, rule in rules.items():
            full = Rule(**{"min_prob": 0.0, "top_p": None, **SAMPLED, **rule})
            kept[name].append(truncate(logp, token, rule=full, uniform_NM=uniform))
    return kept


def threshold(kept: list[Kept], lost: float) -> float:
    """The p down to which as much is lost; `kept` reaches below it."""
    p = np.sort(torch.cat([k.p for k in kept]).numpy().astype(np.float64))[::-1]
    num_tokens = sum(len(k.kept) for k in kept)
    return float(p[np.searchsorted(p.cumsum(), (1 - lost) * num_tokens)])


def measured(kept: list[Kept]) -> Row:
    """What the writer makes of these laws, a token."""
    p = torch.cat([k.p for k in kept]).numpy()
    num_tokens = sum(len(k.kept) for k in kept)
    with tempfile.TemporaryDirectory() as folder:
        # the last token of a sequence has no law: a little less is written than was cut
        made = list(
            records(kept, lengths=[DOCUMENT_TOKENS] * (num_tokens // DOCUMENT_TOKENS), seed=0)
        )
        write_part(Path(folder), 0, made, layout())
        sizes = {
            name: sum(p.stat().st_size for p in (Path(folder) / "part-00000" / name).rglob("c/*"))
            for name in LAW
        }
    rows = num_tokens - len(made)
    return {
        "kept": float(torch.cat([k.kept for k in kept]).float().mean()),
        "lost": float(torch.cat([k.tail_logp_mass for k in kept]).exp().mean()),
        "bytes": sum(size for name, size in sizes.items() if name not in SAMPLES) / rows,
        "sample_bytes": sum(sizes[name] for name in SAMPLES) / rows,
        "tv": float(0.5 * np.abs(decode_p(encode_p(p)) - p).sum() / num_tokens),
    }


def captured(project: Path, folder: Path, setting: dict[str, Any]) -> Path:
    """A project like `project` whose caches are captured under one setting."""
    folder.mkdir(parents=True)
    for name in ("target", "sequences", "warmup", "checked"):
        (folder / name).symlink_to((project / name).resolve())
    params = yaml().load(project / "params.yaml")
    params["capture"] |= setting
    params["capture"] |= {"last_hidden": setting["mode"] == "rebuild", "hidden_layers": []}
    yaml().dump(params, folder / "params.yaml")
    before = Path.cwd()
    os.chdir(folder)
    try:
        capture.main()
    finally:
        os.chdir(before)
    return folder


def law_bytes(cache: Cache) -> float:
    """Bytes a token of what says the law, whatever the mode."""
    sizes = cache.manifest.array_bytes
    named = (*LAW, "logits", "last_hidden")
    return sum(sizes.get(name, 0) for name in named) / cache.num_tokens


def renormalised(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, their laws as peers read them: kept ids scaled to sum to 1, no tail."""
    for batch in batches:
        law = batch.law
        assert isinstance(law, SparseLaw)
        total = torch.zeros_like(law.bucket).index_add(0, law.rows(), law.p)
        yield replace(
            batch,
            law=replace(law, p=law.p / total[law.rows()], bucket=torch.zeros_like(law.bucket)),
        )


def trained(folder: Path, heldout: Cache, *, peers: bool = False) -> dict[str, list[float]]:
    """Exact held-out α by objective and seed, of drafts trained from one cache."""
    before = Path.cwd()
    os.chdir(folder)
    plain = pipeline.train.training_batches
    if peers:
        pipeline.train.training_batches = lambda *a, **k: renormalised(plain(*a, **k))
    try:
        found: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
        for seed in SEEDS:
            inputs = open_inputs("lm", "lm", cache=Path("cache"), target=Path("target"))
            for name in OBJECTIVES:
                found[name].append(_alpha(inputs, name, seed, heldout))
        return found
    finally:
        pipeline.train.training_batches = plain
        os.chdir(before)


def _alpha(inputs: Inputs, objective: str, seed: int, heldout: Cache) -> float:
    """One draft: from the shared start under one objective."""
    section = load(f"losses.{objective}", find(objective).Config)
    config: FitConfig = load("train", FitConfig)
    every = heldout.num_sequences
    config = config.model_copy(update={"heldout_sequences": every})
    expect = {"target": inputs.source["target"]}
    model = inputs.section.model_dump()
    begin = Path("warmup", f"lm-{seed}", "model")
    draft = load_draft(begin, inputs.interface, inputs.shape, expect=expect, config=model)
    fitted = fit_from_cache(
        draft,
        replace(inputs, heldout=heldout, head=inputs.head),
        loss=partial(find(objective).loss, config=section),
        config=config,
        seed=seed,
        stage="train",
        cell=f"{objective}-{seed}",
    )
    return float(fitted.metrics["heldout_alpha"])


def curve(project: Path, *, known: list[Row] | None = None) -> list[Row]:
    """By setting: B/token of the law, held-out α by objective and seed.

    known: rows of the same laws, whose α stand: bytes alone are measured.
    """
    rows: list[Row] = []
    stands = {row["cache"]: _without(row, FORMER) for row in known or []}
    with tempfile.TemporaryDirectory() as root:
        folders = {}
        heldout: Cache | None = None
        for number, (name, setting) in enumerate(SETTINGS.items()):
            folders[name] = captured(project, Path(root, str(number)), setting)
            heldout = heldout or Cache.open(folders[name] / "cache/heldout.zarr")  # of mode full
            size = law_bytes(Cache.open(folders[name] / "cache/train.zarr"))
            found = stands.get(name) or trained(folders[name], heldout)
            rows.append({**found, "cache": name, "bytes": size})
            print(rows[-1], flush=True)
            if name not in RENORMALISED.values() and name != "full":
                shutil.rmtree(folders[name] / "cache")
        assert heldout is not None
        for name, source in RENORMALISED.items():
            cache = Cache.open(folders[source] / "cache/train.zarr")
            # what peers store has no tail mass
            tail = cache.manifest.array_bytes["tail_logp_mass"] / cache.num_tokens
            found = stands.get(name) or trained(folders[source], heldout, peers=True)
            rows.append({**found, "cache": name, "bytes": law_bytes(cache) - tail})
            print(rows[-1], flush=True)
    return rows


def _without(row: Row, key: str) -> Row:
    return {name: value for name, value in row.items() if name != key}


def picture(title: str, series: list[Series], *, x: str, y: str) -> str:
    """A chart of the report's kind as a file of its own, on white."""
    drawn = lines(title, series, x=x, y=y)
    colours = ("#2b2d30", "#0072b2", "#c25200", "#008460", "#b25c92", "#9a6a00", "#2b86bd")
    style = "text{font:10px sans-serif;fill:#565b61;stroke:none!important}"
    style += ".title{font-weight:600}.grid{stroke:#e9e9e8}"
    style += ".line{fill:none;stroke-width:1.6}.thin{stroke-width:1.2}"
    style += "".join(f".s{k}{{fill:{c};stroke:{c}}}" for k, c in enumerate(colours))
    names = "".join(
        f'<g class="s{s.style}"><rect x="{46 + 118 * (k % 2)}" y="{214 + 14 * (k // 2)}" width="9" '
        f'height="9"/><text x="{59 + 118 * (k % 2)}" y="{222 + 14 * (k // 2)}">{s.name}</text></g>'
        for k, s in enumerate(series)
    )
    height = 220 + 14 * ((len(series) + 1) // 2)
    body = drawn[drawn.index(">") + 1 : drawn.rindex("</svg>")]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 290 {height}" width="580" '
        f'role="img" aria-label="{title}"><style>{style}</style>'
        f'<rect width="290" height="{height}" style="fill:#fff;stroke:none"/>{body}{names}</svg>\n'
    )


def pictures(lost: list[Row], alpha: list[Row]) -> dict[str, str]:
    """Both curves, on white."""
    first, second = lost_series(lost), alpha_series(alpha)
    return {
        "rate_lost.svg": picture("lost mass, c14", first, x="B a token", y="lost mass"),
        "rate_alpha.svg": picture(
            "held-out α of LK-λ drafts", second, x="B a token of the law", y="α"
        ),
    }


def table(lost: list[Row], alpha: list[Row]) -> str:
    """Both tables as Markdown."""
    out = [
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, no GPU.",
        "",
        "## Lost mass against bytes, V = 128,256",
        "",
        "Regimes fitted to what the reference states of its own: `python -m benchmarks.synthetic`.",
        "",
        "| regime | rule | mean K | lost mass | B/token | and of 16 tail samples | TV of values |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    out += [
        f"| {r['regime']} | {r['rule']} | {r['kept']:.1f} | {r['lost']:.4f} | {r['bytes']:.1f} | "
        f"{r['sample_bytes']:.1f} | {r['tv']:.1e} |"
        for r in lost
    ]
    out += ["", "![lost mass against bytes a token](rate_lost.svg)", ""]
    out += ["## Held-out α of drafts trained from the cache", ""]
    if any(row.get(FORMER) for row in alpha):
        out += [
            "Bytes are those of bitshuffle throughout, which the writer used before: now fewer.",
            "",
        ]
    out += ["| cache | B/token of the law | KL | LK-λ | by seed, KL | by seed, LK-λ |"]
    out += ["| --- | ---: | ---: | ---: | --- | --- |"]
    for row in alpha:
        means = [f"{np.mean(row[o]):.4f}" for o in OBJECTIVES]
        seeds = [", ".join(f"{v:.4f}" for v in row[o]) for o in OBJECTIVES]
        out.append(f"| {row['cache']} | {row['bytes']:.1f} | {' | '.join([*means, *seeds])} |")
    return "\n".join([*out, "", "![α against bytes a token](rate_alpha.svg)", ""])


def main() -> None:
    """Measure what was asked for, write the page and its pictures."""
    data = json.loads(DATA.read_bytes()) if DATA.is_file() else {"lost": [], "alpha": []}
    match sys.argv[1:]:
        case ["lost"]:
            data["lost"] = lost_mass()
        case ["alpha", project]:
            data["alpha"] = curve(Path(project).resolve())
        case ["bytes", project]:
            data["alpha"] = curve(Path(project).resolve(), known=data["alpha"])
        case _:
            sys.exit(__doc__)
    write_json(DATA, data)
    for name, text in pictures(data["lost"], data["alpha"]).items():
        (HERE / name).write_text(text, encoding="utf-8")
    (HERE / "rate.md").write_text(table(data["lost"], data["alpha"]), encoding="utf-8")


if __name__ == "__main__":
    main()
