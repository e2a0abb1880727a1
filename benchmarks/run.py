"""How long a project's `dvc repro` takes, and its memory at the peak, all processes together.

`python benchmarks/run.py PROJECT`: a fresh clone after `make env`, else only what changed
is run. Memory is the sum of proportional set sizes (a page that n processes share counts 1/n in
each) of every process of the run's session, asked every SAMPLE_S seconds. Linux only.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

SAMPLE_S = 3.0


def pss_bytes(session: int) -> int:
    """Of the processes of one session that can be read now."""
    total = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                lines = (entry / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except OSError:  # it has ended
            continue
    return 1024 * total


def main() -> None:
    """Run it and print two figures."""
    started, peak = time.monotonic(), 0
    command = [sys.executable, "-m", "dvc", "repro"]
    running = subprocess.Popen(command, cwd=sys.argv[1], start_new_session=True)
    while running.poll() is None:
        peak = max(peak, pss_bytes(running.pid))
        time.sleep(SAMPLE_S)
    seconds = time.monotonic() - started
    print(f"{seconds // 60:.0f} min {seconds % 60:.0f} s, {peak / 1e9:.2f} GB at the peak")
    sys.exit(running.returncode)


if __name__ == "__main__":
    main()
