"""Training steps a second of one warm-up cell under four settings of OpenMP and glibc.

Runs `stages.warmup lm-0` in a copy of a finished project, 150 steps a setting, the settings in turn
over three rounds, and writes the medians to `openmp.md`. The outputs are compared: no setting but
the number of threads may change a byte.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lkcache.presets import yaml

STEPS, ROUNDS, CELL = 150, 3, "lm-0"
KEEP = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "268435456",
}
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
SPIN = PASSIVE | {"GOMP_SPINCOUNT": "20000"}
SETTINGS: dict[str, tuple[int, dict[str, str]]] = {
    "1 thread": (1, PASSIVE),
    "1 thread, memory kept": (1, PASSIVE | KEEP),
    "2 threads, passive": (2, PASSIVE),
    "2 threads, passive, memory kept": (2, PASSIVE | KEEP),
    "2 threads, brief spin": (2, SPIN),
    "2 threads, brief spin, memory kept (dvc.yaml)": (2, SPIN | KEEP),
}


def measure(project: Path, threads: int, env: dict[str, str]) -> tuple[float, bytes]:
    """Steps a second of the cell, and the weights that it wrote."""
    params = yaml().load(project / "params.yaml")
    params["warmup"] |= {"threads": threads, "steps": STEPS}
    yaml().dump(params, project / "params.yaml")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MALLOC_"))}
    subprocess.run(
        [sys.executable, "-m", "stages.warmup", CELL],
        cwd=project,
        env=clean | env,
        check=True,
        capture_output=True,
    )
    timing = json.loads((project / f"timings/warmup-{CELL}.json").read_text(encoding="utf-8"))
    weights = (project / f"warmup/{CELL}/model/model.safetensors").read_bytes()
    return timing["steps_per_s"], weights


def main() -> None:
    """Measure every setting in turn, thrice; write the table."""
    source = Path(sys.argv[1])
    rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
    weights: dict[int, set[bytes]] = {1: set(), 2: set()}
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        skip = shutil.ignore_patterns(".venv", ".git", ".dvc", ".scratch", "quick", "report")
        shutil.copytree(source, project, ignore=skip)
        for _ in range(ROUNDS):
            for name, (threads, env) in SETTINGS.items():
                rate, written = measure(project, threads, env)
                rates[name].append(rate)
                weights[threads].add(written)
    best = max(statistics.median(row) for row in rates.values())
    equal = "yes" if all(len(kinds) == 1 for kinds in weights.values()) else "NO"
    lines = [
        f"Training steps a second of `{CELL}` ({STEPS} steps, median of {ROUNDS}, settings in",
        f"turn; {os.cpu_count()} cores, no GPU). Equal bytes for equal thread counts: {equal}.",
        "",
        "| setting | steps/s | of the best |",
        "| --- | ---: | ---: |",
    ]
    for name, row in rates.items():
        rate = statistics.median(row)
        lines.append(f"| {name} | {rate:.1f} | {rate / best:.2f} |")
    text = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
