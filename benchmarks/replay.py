"""How many anchors × depths does replay walk a second, once log q/p are there?

One core, processor time, the best of five; random log-ratios of the spread that drafts show. Whole
is `token_survival` or `block_survival`, then `replay` for every γ up to the depth at once. Writes
`replay.md`.

    OMP_NUM_THREADS=1 python benchmarks/replay.py
"""

import os
import platform
from pathlib import Path
from time import process_time

import numpy as np

from pipeline.replay import block_survival, replay, token_survival

OUT = Path(__file__).with_suffix(".md")
SIZES = ((256, 7, 95), (64, 7, 95), (16, 7, 95), (256, 4, 95), (64, 7, 1023), (8, 12, 4095))
WANTED = 1e6
REPEATS = 5


def rate(num_rollouts: int, depths: int, tokens: int, *, block: bool) -> float:
    """Anchors × depths a second."""
    rng = np.random.default_rng(3)
    logr = rng.normal(-0.5, 1.0, (num_rollouts, depths, tokens))
    remaining = np.full(num_rollouts, tokens)
    survival = block_survival if block else token_survival
    took = []
    for _ in range(REPEATS):
        began = process_time()
        replay(survival(logr), remaining)
        took.append(process_time() - began)
    return float(logr.size / min(took))


def main() -> None:
    """Measure every size, write the table."""
    rows = []
    for size in SIZES:
        token, block = (rate(*size, block=block) / 1e6 for block in (False, True))
        rows.append("| {} | {} | {} | {:.1f} | {:.1f} |".format(*size, token, block))
    said = (
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, no GPU; one thread, processor "
        f"time, numpy {np.__version__}. Million anchors × depths a second; at least "
        f"{WANTED / 1e6:g} is asked for."
    )
    text = [
        said,
        "",
        "| rollouts at once | depths (every γ up to it) | tokens | token | block verification |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *rows,
    ]
    OUT.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(OUT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
