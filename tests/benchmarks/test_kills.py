"""The kill campaign, small; in a process of its own, which forks."""

import subprocess
import sys


def test_a_capture_killed_anywhere_resumes_to_the_same_bytes() -> None:
    command = [sys.executable, "-m", "benchmarks.kills", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 SIGKILLs of a tiny" in done.stdout
    assert "written again: 0" in done.stdout
