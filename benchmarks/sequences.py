"""What a long `sequences/` costs the stages that read it: memory and CPU of planning a capture.

    python -m benchmarks.sequences [TOKENS]      # writes benchmarks/sequences.md

A made-up file of sequences of SEQUENCE_TOKENS tokens is written as `generate` writes it. Each line
is a process of its own: the peak of its resident memory (VmHWM, Linux only) less what it held
before, after it has read a file of one sequence. *Lists* is the file as Python numbers, as every
stage held it before `storage.sequences`.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.duplicates import near_duplicates
from storage.sequences import Sequences
from storage.tables import SEQUENCES, read_table, write_table
from storage.writer import plan_parts

OUT = Path(__file__).with_suffix(".md")
TOKENS = 30_000_000
SEQUENCE_TOKENS, PROMPT_TOKENS, VOCAB = 1000, 200, 128_256
PART_TOKENS = 131_072
TEXTS, WORDS = 20_000, 120


def rows(num_tokens: int) -> Iterator[dict[str, Any]]:
    """Sequences of one length, ids drawn as 1 / rank, one turn after the prompt."""
    draw = np.random.default_rng(0)
    turn = np.where(np.arange(SEQUENCE_TOKENS) < PROMPT_TOKENS, -1, 0).astype(np.int32)
    for number in range(max(1, num_tokens // SEQUENCE_TOKENS)):
        tokens = (VOCAB ** draw.random(SEQUENCE_TOKENS) - 1).astype(np.uint32)
        names = {"id": f"prompt-{number}", "domain": "made up", "law": "T=1", "finished": True}
        yield {**names, "tokens": tokens, "turn": turn}


def write(path: Path, num_tokens: int) -> None:
    """The file, a row group at a time."""
    write_table(path, SEQUENCES, rows(num_tokens))


def planning(path: Path) -> None:
    """What `stages.capture` does with a file before a model loads: check, count, cut into parts."""
    survey = Sequences.open(path).survey
    plan_parts(survey.lengths.data, part_tokens=PART_TOKENS)


def parts(path: Path) -> None:
    """What workers read: every part of the file, in order."""
    file = Sequences.open(path)
    for start in range(0, len(file), PART_TOKENS // SEQUENCE_TOKENS):
        file.take(range(start, min(len(file), start + PART_TOKENS // SEQUENCE_TOKENS)))


def lists(path: Path) -> None:
    """The file as Python numbers."""
    read_table(path, SEQUENCES)


def repeats(_path: Path) -> None:
    """Texts of WORDS made-up words freed of near-duplicates, as `prepare` does."""
    draw = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in draw.integers(0, 30_000, WORDS)) for _ in range(TEXTS)]
    near_duplicates(texts, 0.5)


WORK = {work.__name__: work for work in (lists, planning, parts, repeats)}


def resident(what: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def work(what: str, long: Path, short: Path) -> None:
    """In a process of its own: do it and print peak and CPU."""
    for each in (lists, planning, parts):
        each(short)
    before, start = resident("VmRSS"), time.process_time()
    WORK[what](long)
    print(max(0, resident("VmHWM") - before), time.process_time() - start)


def measured(num_tokens: int) -> tuple[float, dict[str, tuple[float, float]]]:
    """Bytes a token on disk, and by piece of work its peak and CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        long, short = Path(folder, "long.parquet"), Path(folder, "short.parquet")
        write(long, num_tokens)
        write(short, 1)
        found = {}
        for what in WORK:
            command = [sys.executable, "-m", "benchmarks.sequences", "--work", what]
            command += [str(long), str(short)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peak, cpu = map(float, done.stdout.split())
            found[what] = peak, cpu
        return long.stat().st_size / num_tokens, found


def main(num_tokens: int) -> None:
    """Measure, and write the page."""
    third = num_tokens // 3
    (_, few), (stored, many) = measured(third), measured(num_tokens)
    peak, cpu = many.pop("repeats")
    said = {
        "lists": "lists of Python numbers (`read_table`)",
        "planning": "planning: `Sequences.survey`, `plan_parts`",
        "parts": "a worker: all parts, one after the other",
    }
    lines = [
        (
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}. Sequences of "
            f"{SEQUENCE_TOKENS:,} tokens, {stored:.2f} B a token on disk."
        ),
        "",
        (
            f"| what reads the file | peak, {third:,} tokens | peak, {num_tokens:,} tokens | "
            "a further token | CPU | tokens/s |"
        ),
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for what, (above, spent) in many.items():
        further = max(0.0, above - few[what][0]) / (num_tokens - third)
        lines.append(
            f"| {said[what]} | {few[what][0] / 1e6:,.0f} MB | {above / 1e6:,.0f} MB | "
            f"{further:.2f} B | {spent:.2f} s | {num_tokens / spent / 1e6:.1f} M |"
        )
    lines += [
        "",
        (
            f"`prepare`: {TEXTS:,} texts of {WORDS} words freed of near-duplicates in one process: "
            f"{peak / TEXTS:,.0f} B and {1e6 * cpu / TEXTS:.0f} µs of CPU a text at the peak, the "
            "text itself included."
        ),
    ]
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(OUT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], *map(Path, sys.argv[3:]))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else TOKENS)
