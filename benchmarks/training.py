"""Does the reader hold training up? Steps from the cache against the same steps from memory.

Part of an epoch of each draft of `params.yaml`, in turn over some rounds: batches collated
beforehand and held in memory; read in the loop, as training on a CPU reads them; and made ahead in
a thread, as it does beside a GPU. The reader keeps as many bytes as two parts' arrays have, which
is what its 512 MB are to parts of 256 MB, and starts with none of them and no digest checked: the
first epoch of a process, the dearest. CPU time of the process, threads included, stands beside the
clock: on a shared machine the clock measures the neighbours. All ways must end at the same weights.
Writes `training.md`.

    python benchmarks/training.py PROJECT
"""

import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Generator, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pipeline.batch import Batch
from pipeline.config import load
from pipeline.dataset import arrays, heldout_batches, training_batches
from pipeline.losses import lk_lambda
from pipeline.train import FitConfig, Inputs, fit, open_inputs
from storage.layout import ARRAYS
from storage.prefetch import prefetched
from storage.reader import Cache

ROUNDS = {"lm": 3, "medusa": 1, "eagle3": 1}  # the shorter a step, the more of them
PARTS = {"lm": 1, "medusa": 2, "eagle3": 8}  # of which one is measured
WAYS = ("memory", "cache, in the loop", "cache, ahead in a thread")

NOTE = """\
`lm` is d = 32, the shortest step there is. Of the others a part of an epoch is read, so that
opening a part weighs more here than in a whole one. Where the load exceeds the cores the clock says
little, and CPU time is good to a few per cent."""


class Taken(NamedTuple):
    """One measurement."""

    clock: float
    cpu: float
    weights: bytes


def num_steps(inputs: Inputs, config: FitConfig) -> int:
    """Steps of a measurement."""
    return inputs.train.num_sequences // config.batch_sequences // PARTS[inputs.section.kind]


def read(inputs: Inputs, config: FitConfig) -> Generator[Batch, None, None]:
    """Batches from a freshly opened cache: no digest is checked yet, nothing decoded."""
    size = max(part_bytes(inputs, part) for part in range(inputs.train.num_parts))
    batches = partial(
        training_batches,
        seed=0,
        stage="warmup",
        batch_sequences=config.batch_sequences,
        steps=num_steps(inputs, config),
        needs=inputs.needs,
    )
    return batches(Cache.open(inputs.train.path, keep_bytes=2 * size))


def part_bytes(inputs: Inputs, part: int) -> int:
    """Decoded bytes of the arrays of a part that training reads."""
    layout, counts = inputs.train.layout, inputs.train.manifest.parts[part].counts
    total = 0
    for name in arrays(layout, inputs.needs):
        array = ARRAYS[name]
        numbers = counts[array.dims[0]] * math.prod(layout.width(array))
        total += numbers * np.dtype(array.dtype).itemsize
    return total


def run(inputs: Inputs, config: FitConfig, way: str) -> Taken:
    """Train a fresh draft."""
    draft = inputs.fresh(0)
    held = heldout_batches(inputs.heldout, batch_sequences=1, sequences=1, needs=inputs.needs)
    batches: Iterable[Batch] = read(inputs, config)
    if way == "memory":
        batches = list(batches)
    clock, cpu = time.perf_counter(), time.process_time()
    fit(
        draft,
        prefetched(batches, depth=2) if way == "cache, ahead in a thread" else batches,
        heldout=held,
        loss=partial(lk_lambda.loss, config=lk_lambda.Config(kind="lk_lambda", eta=3.0)),
        config=config,
        depth=inputs.depth,
        steps=num_steps(inputs, config),
    )
    taken = time.perf_counter() - clock, time.process_time() - cpu
    weights = b"".join(t.numpy().tobytes() for _, t in sorted(draft.trainable().items()))
    return Taken(*taken, weights)


def rows(kind: str, rounds: int) -> list[str]:
    """A table's rows for the draft named as its kind: medians over rounds."""
    inputs = open_inputs(kind, kind, cache=Path("cache"), target=Path("target"))
    config: FitConfig = load("train", FitConfig)
    found: dict[str, list[Taken]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            found[way].append(run(inputs, config, way))
    assert len({taken.weights for row in found.values() for taken in row}) == 1, kind
    steps, made = num_steps(inputs, config), []
    for way in WAYS:
        # of the same round: what the neighbours did meanwhile cancels in part
        pairs = list(zip(found["memory"], found[way], strict=True))
        clock, cpu = (
            statistics.median(getattr(t, x) for t in found[way]) for x in ("clock", "cpu")
        )
        ratio = {
            x: statistics.median(getattr(a, x) / getattr(b, x) for a, b in pairs)
            for x in ("clock", "cpu")
        }
        made.append(
            f"| {kind} | {way} | {1e3 * cpu / steps:.1f} | {ratio['cpu']:.2f} "
            f"| {inputs.train.num_tokens / PARTS[kind] / clock:,.0f} | {ratio['clock']:.2f} |"
        )
    return made


def main() -> None:
    """Measure every draft; write the table."""
    here = Path(__file__).with_suffix(".md")
    os.chdir(sys.argv[1])
    threads = load("train", FitConfig).threads
    torch.set_num_threads(threads)
    lines = [
        "Training under lk_lambda, medians of rounds in which the three ways took turns",
        f"({', '.join(f'{kind} {number}' for kind, number in ROUNDS.items())});",
        f"{os.cpu_count()} cores ({platform.machine()}, no GPU), {threads} thread(s); load average",
        f"{os.getloadavg()[0]:.1f} at the start, other jobs included. Equal weights from all: yes.",
        "",
        "| draft | batches from | CPU ms a step | speed, CPU time | tokens/s | speed, clock |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for kind, rounds in ROUNDS.items():
        lines += rows(kind, rounds)
        print(*lines[-len(WAYS) :], sep="\n", flush=True)
    text = "\n".join([*lines, "", NOTE]) + "\n"
    here.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
