"""Do certified intervals hold, and are sampled estimates unbiased? Against full logits, at scale.

Real text: the T = 1 rollouts of a finished project, replayed through its target. Synthetic text:
laws over 128,256 ids whose entropies are drawn like those of reference/offline_caches.md §4.1 (low
rank scores, a Zipf-Mandelbrot unigram, a temperature a token). Every law is truncated under several
rules by capture's own code, read back by training's, and audited by verify's. Writes `truth.md`.

    MALLOC_MMAP_THRESHOLD_=1048576 python benchmarks/truth.py PROJECT [TOKENS] [SYNTHETIC_TOKENS]

Without the threshold the small results that are kept pin the large temporaries of glibc's heap.
"""

import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.certificate import Certificate, certify, covered, joined
from pipeline.dataset import collate
from pipeline.law import DenseLaw, Law
from pipeline.target import load_target
from pipeline.teacher import dense_law, encode
from pipeline.topk import Rule, truncate
from storage.layout import Layout
from storage.record import Record, supervised
from storage.sequences import Sequences

SAMPLES, FULL_MASS, MIN_MASS = 16, 0.05, 1e-4  # the defaults of params.yaml
RULES: Mapping[str, tuple[float, int] | None] = {
    "p ≥ 5e-4 (default)": (5e-4, 1024),
    "K = 64": (0.0, 64),
    "K = 16": (0.0, 16),
    "full logits": None,
}
WIDE, RANK, WIDE_ROWS = 128_256, 96, 16
# Mean entropy, nats; the share of near-deterministic tokens that puts the median where it was.
REGIMES = {"c06": (0.62, 0.65), "c14": (1.34, 0.45), "c20": (1.92, 0.3)}
BLOCK_ROWS = 1900


def real_logits(project: Path, num_tokens: int) -> Iterator[Tensor]:
    """Blocks of logits [N, V] of supervised tokens."""
    target = load_target(project / "target")
    rows = Sequences.open(project / "sequences/train.parquet")
    waiting: list[Tensor] = []
    for row in (row for index in range(len(rows)) for row in rows.take([index])):
        own = torch.from_numpy(supervised(row["turn"]))
        with torch.inference_mode():
            hidden = target.forward(
                torch.from_numpy(row["tokens"].astype(np.int64))[None]
            ).last_hidden[0, own]
            waiting.append(target.logits(hidden).float())
        if sum(map(len, waiting)) >= min(BLOCK_ROWS, num_tokens):
            block, waiting = torch.cat(waiting)[:num_tokens].clone(), []
            num_tokens -= len(block)
            yield block
        if num_tokens <= 0:
            return


def synthetic_logits(regime: str, num_tokens: int) -> Iterator[Tensor]:
    """The same of made-up laws over 128,256 ids."""
    mean, certain = REGIMES[regime]
    noise = torch.Generator().manual_seed(len(regime) + int(regime[1:]))
    rank = torch.randperm(WIDE, generator=noise)
    zipf = -1.05 * torch.log(rank.float() + 2.7)
    factor = torch.randn(WIDE, RANK, generator=noise) / RANK**0.5
    while num_tokens > 0:
        num = min(num_tokens, WIDE_ROWS)
        scores = 2.5 * torch.randn(num, RANK, generator=noise) @ factor.T + zipf
        sure = torch.rand(num, generator=noise) < certain
        u = torch.rand(num, 2, generator=noise)
        # exponential near 0, gamma of shape 2 elsewhere; their mixture has the regime's mean
        hard = -(mean - 0.08 * certain) / (1 - certain) / 2 * u.log().sum(-1)
        entropy = torch.where(sure, -0.08 * u[:, 0].log(), hard).clamp(max=8.0)
        yield sharpened(scores, entropy)
        num_tokens -= num


def sharpened(scores_NV: Tensor, entropy_N: Tensor) -> Tensor:
    """The scores at each token's own temperature, found by bisection on its entropy."""
    lo, hi = torch.full_like(entropy_N, -4.0), torch.full_like(entropy_N, 4.0)
    for _ in range(16):
        middle = (lo + hi) / 2
        logp_NV = (scores_NV * middle.exp()[:, None]).log_softmax(-1)
        flat = -(logp_NV.exp() * logp_NV).sum(-1) > entropy_N
        lo, hi = torch.where(flat, middle, lo), torch.where(flat, hi, middle)
    return scores_NV * lo.exp()[:, None]


def stored(logits_NV: Tensor, rule: tuple[float, int] | None, draw: torch.Generator) -> Law:
    """The laws as capture writes them and training reads them."""
    num, width = logits_NV.shape
    token = torch.zeros(num, dtype=torch.int64)
    if rule is None:
        law = dense_law(logits_NV, token, logits=True)
    else:
        uniform = torch.rand(num, SAMPLES, dtype=torch.float64, generator=draw)
        how = Rule(
            min_prob=rule[0],
            max_kept=rule[1],
            tail_samples=SAMPLES,
            tail_full_mass=FULL_MASS,
            tail_min_mass=MIN_MASS,
        )
        law = vars(truncate(logits_NV, token, rule=how, uniform_NM=uniform))
    columns = encode({name: value.numpy() for name, value in law.items()})
    columns.pop("entropy")
    for name in ("token_logp", "kept", "tail_logp_mass", "tail_kept"):
        columns[name] = np.append(columns[name], columns[name].dtype.type(0))
    record = Record(
        id="audit",
        domain="",
        tokens=np.zeros(num + 1, np.uint32),
        turn=np.zeros(num + 1, np.int32),
        **columns,
    )
    mode = "full" if rule is None else "topk"
    law = collate([record], Layout(mode, width, 8, (), False)).law
    assert law is not None, "the record holds a law"
    return law


def audit(blocks: Iterator[Tensor]) -> tuple[dict[str, Certificate], list[str]]:
    """Certificates by rule, and what each rule keeps."""
    draw = torch.Generator().manual_seed(1)
    parts: dict[str, list[Certificate]] = {name: [] for name in RULES}
    kept: dict[str, list[tuple[float, float, int]]] = {name: [] for name in RULES}
    for logits in blocks:
        logp = logits.double().log_softmax(-1)
        noisy = 0.85 * logp + 0.7 * torch.randn(logp.shape, generator=draw, dtype=torch.float64)
        drafts = {"noisy target": noisy.float()}
        for name, rule in RULES.items():
            law = stored(logits, rule, draw)
            parts[name].append(certify(logp, law, drafts))
            if isinstance(law, DenseLaw):
                kept[name].append((float(logits.shape[1]), 0.0, len(logits)))
            else:
                assert law.kept is not None
                assert law.tail is not None
                mean = float(law.kept.double().mean()), float(law.tail.double().mean())
                kept[name].append((*mean, len(logits)))
    words = []
    for found in kept.values():
        num = sum(n for *_, n in found)
        words.append(
            f"{sum(k * n for k, _, n in found) / num:.1f} | "
            f"{100 * sum(r * n for _, r, n in found) / num:.2f} %"
        )
    return {name: joined(found) for name, found in parts.items()}, words


def table(title: str, blocks: Iterator[Tensor]) -> list[str]:
    """One text's rows in Markdown."""
    started = time.process_time()
    certificates, kept = audit(blocks)
    minutes = (time.process_time() - started) / 60
    first = next(iter(next(iter(certificates.values())).values()))
    titles = "kept, mean K, lost mass, of, exact, hold, width mean, p99, error of estimate, "
    names = (titles + "its SE, error / SE, rounding allows, within").split(", ")
    lines = ["", f"## {title}: {len(first['alpha']):,} tokens, {minutes:.1f} CPU minutes", ""]
    lines += ["| " + " | ".join(names) + " |", "| --- " + "| ---: " * 11 + "| --- |"]
    for (rule, certificate), mass in zip(certificates.items(), kept, strict=True):
        for columns in certificate.values():
            for name, symbol in (("alpha", "α"), ("kl", "KL")):
                error, width = columns[f"{name}_error"], columns[f"{name}_width"]
                se = float(error.std()) / len(error) ** 0.5
                slack = float(columns[f"{name}_slack"].mean())
                within = abs(error.mean()) <= 3 * se + slack
                lines.append(
                    f"| {rule} | {mass} | {symbol} | {columns[name].mean():.4f} | "
                    f"{100 * covered(columns, name).mean():.6g} % | {width.mean():.5f} | "
                    f"{np.quantile(width, 0.99):.4f} | {error.mean():+.2e} | {se:.1e} | "
                    f"{error.mean() / se:+.1f} | {slack:.1e} | {'yes' if within else 'NO'} |"
                )
    return lines


def machine() -> str:
    """Cores and processor."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor()}"


def main() -> None:
    """Audit the project's text and the three regimes; write the table."""
    project = Path(sys.argv[1])
    num_real, num_wide = (int(n) for n in (*sys.argv[2:], "100000", "128")[:2])
    torch.set_num_threads(1)
    lines = [
        f"{machine()}, one thread. *hold*: intervals that contain the exact value. *within*: the",
        "estimate's mean error is at most 3 standard errors and what rounding allows. The draft is",
        "softmax(0.85 log p + N(0, 0.7²)), which does not depend on the samples.",
    ]
    path = Path(__file__).with_suffix(".md")
    real = real_logits(project, num_real)
    lines += table("Real text, the embedded target", real)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for regime, (mean, _) in REGIMES.items():
        title = f"Synthetic {regime}, V = {WIDE:,}, entropies drawn with mean {mean}"
        lines += table(title, synthetic_logits(regime, num_wide))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
