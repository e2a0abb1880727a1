"""What a finished project's rates come to at 10⁶, 10⁸ and 10¹⁰ tokens: time, bytes, memory, files.

    python -m benchmarks.scale PROJECT        # writes benchmarks/scale.md

Measured on this machine: the rates of `PROJECT/timings`, the bytes of its cache, what `verify` and
DVC take a byte, what freeing prompts of repeats takes. Memory stands in `benchmarks/sequences.md`.
Assumed, because no GPU is here: that a forward pass runs at `TFLOPS`. Everything else follows by
the formula that stands in the table.
"""

import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.duplicates import near_duplicates
from storage.verify import check_cache
from storage.workspace import read_json

OUT = Path(__file__).with_suffix(".md")
TOKENS = (10**6, 10**8, 10**10)
TFLOPS = 400.0
"""Of one GPU in bfloat16, assumed."""
TARGET = 8.0e9
"""Parameters of the target that the table is of."""
CACHE_BYTES = {"law only": 141.0, "and 3 layers of 4,096 in 8 bits": 141.0 + 3 * 4096 * 1.016}
"""Bytes a token as `lkcache estimate` assumes them."""
SEQUENCE_TOKENS = 1000
PART_TOKENS = 131_072
DVC_BYTES = 1 << 30
TEXTS, WORDS = 4000, 120


def cpu_s(work: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def child_s(*command: str, cwd: Path) -> tuple[float, float]:
    """(CPU, clock) seconds of a command."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, cwd=cwd, check=True, capture_output=True)
    after = os.times()
    spent = after.children_user + after.children_system
    return (
        spent - before.children_user - before.children_system,
        time.perf_counter() - start,
    )


def dvc_rates() -> dict[str, tuple[float, float]]:
    """(CPU, clock) seconds a GB of `dvc add`, `push` to a folder, `pull`; 8 files, copies."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        child_s("dvc", "init", "-q", "--no-scm", cwd=folder)
        child_s("dvc", "config", "cache.type", "copy", cwd=folder)
        child_s("dvc", "remote", "add", "-q", "-d", "r", str(folder / "remote"), cwd=folder)
        for index in range(8):
            (folder / "data" / str(index)).write_bytes(os.urandom(DVC_BYTES // 8))
        found = {"add": child_s("dvc", "add", "-q", "data", cwd=folder)}
        found["push"] = child_s("dvc", "push", "-q", cwd=folder)
        shutil.rmtree(folder / "data")
        shutil.rmtree(folder / ".dvc" / "cache")
        found["pull"] = child_s("dvc", "pull", "-q", cwd=folder)
        gigabytes = DVC_BYTES / 1e9
        return {k: (cpu / gigabytes, clock / gigabytes) for k, (cpu, clock) in found.items()}


def texts(count: int) -> list[str]:
    """Made-up texts without repeats."""
    draw = random.Random(0)  # noqa: S311  of words, not of keys
    return [" ".join(f"w{draw.randrange(30_000)}" for _ in range(WORDS)) for _ in range(count)]


def size(number: float, unit: str, step: float = 1000.0) -> str:
    """A number with the prefix that keeps it short."""
    power = min(4, max(0, int(math.log(max(number, 1), step))))
    return f"{number / step**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}{unit}"


def span(seconds: float) -> str:
    """A time in the unit that keeps it short."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def main(project: Path) -> None:
    """Measure, and write the page."""
    timing, metrics = (
        read_json(project / name / "capture.json") for name in ("timings", "metrics")
    )
    tokens = sum(split["tokens"] for split in metrics.values())
    stored = sum(split["bytes"] for split in metrics.values())
    beside_s = (timing["worker_seconds"] - timing["target_seconds"]) / tokens
    cache = project / "cache" / "train.zarr"
    part = sum(1 for path in (cache / "part-00000").rglob("*") if path.is_file())
    train_bytes = metrics["train"]["bytes"]
    verify_s = cpu_s(lambda: check_cache(cache, progress=lambda _: None)) / train_bytes
    made = texts(2 * TEXTS)
    repeats = [cpu_s(lambda n=n: near_duplicates(made[:n], 0.5)) / n for n in (TEXTS, 2 * TEXTS)]
    dvc = dvc_rates()
    write_s = beside_s * tokens / stored
    measured = {
        f"a worker beside the target's pass, a token of {stored / tokens:,.0f} B": (
            f"{1e6 * beside_s:.1f} µs"
        ),
        "… that is, bytes of cache a second and worker": size(1 / write_s, "B/s"),
        "`verify`, digests and structure, CPU": size(1 / verify_s, "B/s"),
        f"near-duplicates, {TEXTS:,} and {2 * TEXTS:,} texts of {WORDS} words, CPU a text": (
            " and ".join(f"{1e6 * each:.0f}" for each in repeats) + " µs"
        ),
        "files a part": str(part),
    }
    for name, (cpu, clock) in dvc.items():
        what = f"`dvc {name}`, {size(DVC_BYTES, 'B')} in 8 files, a GB"
        measured[what] = f"{cpu:.2f} s CPU, {clock:.2f} s clock"
    load = os.getloadavg()[0]
    lines = [
        f"{os.cpu_count()} cores without a GPU, load {load:.1f}. No GPU rate is measured.",
        "",
        "| rate | value |",
        "| --- | ---: |",
        *(f"| {what} | {value} |" for what, value in measured.items()),
        "",
        (
            f"For a target of {TARGET:.0e} parameters, one GPU at an assumed {TFLOPS:g} TFLOP/s, "
            f"sequences of {SEQUENCE_TOKENS:,} tokens and parts of {PART_TOKENS:,}:"
        ),
        "",
        "| what | formula | " + " | ".join(f"{n:.0e} tokens" for n in TOKENS) + " |",
        "| --- | --- |" + " ---: |" * len(TOKENS),
    ]
    rows: list[tuple[str, str, Callable[[float], str]]] = [
        (
            "near-duplicates, one core",
            "N / 1,000 · CPU a text, if it stays linear",
            lambda n: span(n / SEQUENCE_TOKENS * repeats[1]),
        ),
        (
            "capture, the target's pass",
            "2 · parameters · N / TFLOP/s",
            lambda n: span(2 * TARGET * n / (TFLOPS * 1e12)),
        ),
    ]
    for what, width in CACHE_BYTES.items():
        rows += [
            (f"cache, {what}", "N · bytes", lambda n, width=width: size(n * width, "B")),
            (
                "… writing it, one worker",
                "bytes / rate beside the pass",
                lambda n, width=width: span(n * width * write_s),
            ),
            ("… `verify`, one core", "bytes / rate", lambda n, w=width: span(n * w * verify_s)),
            (
                "… `dvc push`, its CPU alone",
                "bytes · CPU a GB",
                lambda n, w=width: span(n * w / 1e9 * dvc["push"][0]),
            ),
        ]
    rows.append(("files", "N / part · files", lambda n: f"{max(1, n / PART_TOKENS) * part:,.0f}"))
    lines += [f"| {what} | {how} | " + " | ".join(map(f, TOKENS)) + " |" for what, how, f in rows]
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(OUT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
