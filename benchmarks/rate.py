"""What a byte of cache buys: lost mass on made-up laws, and the α of drafts trained from the cache.

    python -m benchmarks.rate PROJECT     # some fifteen minutes; writes rate.md and two pictures

PROJECT is a finished project whose target is small enough for mode `full`. Two tables:

*Lost mass.* Laws of benchmarks/synthetic.py at V = 128,256, cut by every rule, written by the
project's own writer. Bytes are those of ids, values, counts and tail mass on disk, all metadata
apart; tail samples stand in a column of their own. The error of values is the total variation
between kept p and what their codes say.

*Trained α.* The project's sequences are captured again under each setting by `stages.capture`; an
`lm` draft of each seed is trained from every cache, from one shared KL start, same data, steps and
rate; its α is exact, on the held-out cache of mode `full`. `renormalised` is what peers store: the
kept ids alone, scaled to sum to 1, made here from the same records as they are read.
"""

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
from benchmarks.synthetic import documents, layout, records
from lkcache.presets import yaml
from pipeline.batch import Batch
from pipeline.charts import Series, lines
from pipeline.checkpoint import load_draft
from pipeline.config import load
from pipeline.law import SparseLaw
from pipeline.loss import find
from pipeline.topk import Kept, Rule, truncate
from pipeline.train import FitConfig, Inputs, fit_from_cache, open_inputs
from stages import capture
from storage.codecs import decode_p, encode_p
from storage.reader import Cache
from storage.writer import write_part

HERE = Path(__file__).parent
REGIMES = {"c14": 2, "c06": 1}
"""Documents of 1,024 tokens of each regime."""
WRITTEN = [1024] * 32
"""Lengths of the sequences that are written: the documents in a circle, ids renamed each time."""
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
LAW = ("kept", "topk_ids", "topk_p", "tail_logp_mass")
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


def lost_mass() -> list[tuple[str, str, float, float, float, float, float]]:
    """Regime, rule, kept ids, lost mass, B/token of the law, of the samples, TV of the values."""
    rows = []
    for regime, num in REGIMES.items():
        kept: dict[str, list[Kept]] = {name: [] for name in RULES}
        generator = torch.Generator().manual_seed(0)
        for law in documents(regime, num_documents=num, seed=0):
            logp = torch.from_numpy(law).log()
            shape = (len(law), SAMPLED["tail_samples"])
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
            token = torch.zeros(len(law), dtype=torch.int64)
            for name, rule in RULES.items():
                full = Rule(**{**SAMPLED, **rule})  # type: ignore[arg-type]
                kept[name].append(truncate(logp, token, rule=full, uniform_NM=uniform))
        for name, laws in kept.items():
            counts = torch.cat([k.kept for k in laws]).float()
            lost = torch.cat([k.tail_logp_mass for k in laws]).exp()
            p = torch.cat([k.p for k in laws]).numpy()
            off = 0.5 * np.abs(decode_p(encode_p(p)) - p).sum() / len(counts)
            law_bytes, sample_bytes = bytes_per_token(laws)
            mean = (float(counts.mean()), float(lost.mean()))
            rows.append((regime, name, *mean, law_bytes, sample_bytes, float(off)))
            print(rows[-1], flush=True)
    return rows


def bytes_per_token(kept: list[Kept]) -> tuple[float, float]:
    """What the writer makes of these laws: bytes a token of the law and of its tail samples."""
    with tempfile.TemporaryDirectory() as folder:
        made = list(records(kept, lengths=WRITTEN, seed=0))
        write_part(Path(folder), 0, made, layout())
        sizes = {
            name: sum(p.stat().st_size for p in (Path(folder) / "part-00000" / name).rglob("c/*"))
            for name in (*LAW, *SAMPLES)
        }
    totals = [sum(sizes[name] for name in group) / sum(WRITTEN) for group in (LAW, SAMPLES)]
    return totals[0], totals[1]


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
    named = (*LAW, *SAMPLES, "logits", "last_hidden")
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


def curve(project: Path) -> list[tuple[str, float, dict[str, list[float]]]]:
    """Setting, B/token of the law, held-out α by objective and seed."""
    rows = []
    with tempfile.TemporaryDirectory() as root:
        folders = {}
        heldout: Cache | None = None
        for number, (name, setting) in enumerate(SETTINGS.items()):
            folders[name] = captured(project, Path(root, str(number)), setting)
            heldout = heldout or Cache.open(folders[name] / "cache/heldout.zarr")  # of mode full
            size = law_bytes(Cache.open(folders[name] / "cache/train.zarr"))
            rows.append((name, size, trained(folders[name], heldout)))
            print(rows[-1], flush=True)
            if name not in RENORMALISED.values() and name != "full":
                shutil.rmtree(folders[name] / "cache")
        assert heldout is not None
        for name, source in RENORMALISED.items():
            cache = Cache.open(folders[source] / "cache/train.zarr")
            # what peers store has no tail mass
            size = (
                law_bytes(cache) - cache.manifest.array_bytes["tail_logp_mass"] / cache.num_tokens
            )
            rows.append((name, size, trained(folders[source], heldout, peers=True)))
            print(rows[-1], flush=True)
    return rows


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


def pictures(lost: list[Any], alpha: list[Any]) -> dict[str, str]:
    """Both curves."""
    families = {"threshold": "p >=", "nucleus": "nucleus", "fixed K": "fixed"}
    c14 = [row for row in lost if row[0] == "c14"]
    first = [
        Series(name, style, sorted((r[4], r[3]) for r in c14 if r[1].startswith(start)))
        for style, (name, start) in enumerate(families.items())
    ]
    groups = {
        "threshold, samples": [r for r in alpha if "samples" in r[0]],
        "threshold, none": [r for r in alpha if r[0].startswith("p") and "none" in r[0]],
        "fixed K, none": [r for r in alpha if r[0].startswith("K") and "none" in r[0]],
        "fixed K, renormalised": [r for r in alpha if "renormalised" in r[0]],
    }
    second = [
        Series(name, style, sorted((r[1], float(np.mean(r[2]["lk_lambda"]))) for r in rows))
        for style, (name, rows) in enumerate(groups.items())
    ]
    return {
        "rate_lost.svg": picture("lost mass, c14", first, x="B a token", y="lost mass"),
        "rate_alpha.svg": picture(
            "held-out α of LK-λ drafts", second, x="B a token of the law", y="α"
        ),
    }


def table(lost: list[Any], alpha: list[Any]) -> str:
    """Both tables as Markdown."""
    out = [
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, no GPU.",
        "",
        "## Lost mass against bytes, V = 128,256",
        "",
        "| regime | rule | mean K | lost mass | B/token | and of 16 tail samples | TV of values |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    out += [
        f"| {a} | {b} | {k:.1f} | {m:.4f} | {n:.1f} | {s:.1f} | {tv:.1e} |"
        for a, b, k, m, n, s, tv in lost
    ]
    out += ["", "![lost mass against bytes a token](rate_lost.svg)", ""]
    out += ["## Held-out α of drafts trained from the cache", ""]
    out += ["| cache | B/token of the law | KL | LK-λ | by seed, KL | by seed, LK-λ |"]
    out += ["| --- | ---: | ---: | ---: | --- | --- |"]
    for name, size, found in alpha:
        means = [f"{np.mean(found[o]):.4f}" for o in OBJECTIVES]
        seeds = [", ".join(f"{v:.4f}" for v in found[o]) for o in OBJECTIVES]
        out.append(f"| {name} | {size:.1f} | {' | '.join([*means, *seeds])} |")
    return "\n".join([*out, "", "![α against bytes a token](rate_alpha.svg)", ""])


def main() -> None:
    """Measure both, write the page and its pictures."""
    project = Path(sys.argv[1]).resolve()
    alpha = curve(project)
    lost = lost_mass()
    for name, text in pictures(lost, alpha).items():
        (HERE / name).write_text(text, encoding="utf-8")
    (HERE / "rate.md").write_text(table(lost, alpha), encoding="utf-8")


if __name__ == "__main__":
    main()
