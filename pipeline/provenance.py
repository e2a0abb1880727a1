"""The shell around a stage: errors become sentences, and who, when and where goes to `runs/`.

`runs/<stage>[-<cell>].json` lies outside every DVC out, because a clock, a host or a git revision
in an out would make equal work differ. Knows no stage's content.
"""

import errno
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from storage.errors import LkcacheError

RUNS = Path("runs")
PACKAGES = ("lkcache", "torch", "transformers", "numpy", "zarr", "pyarrow", "dask", "dvc")
EXIT_MENDABLE = 2


def run(stage: str, main: Callable[[], None]) -> None:
    """Run a stage's `main`; print what a user can mend in one sentence and exit with 2."""
    cell = "-".join([stage, *sys.argv[1:]])
    started = time.time()
    outcome = "failed"
    try:
        main()
        outcome = "done"
    except LkcacheError as error:
        _stop(stage, str(error))
    except KeyboardInterrupt:
        _stop(stage, "interrupted; nothing half-written was left; run dvc repro to go on.")
    except PermissionError as error:
        _stop(
            stage,
            f"no permission to write {error.filename}; expected a folder that this user can "
            "write to; change its owner or mode.",
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        _stop(
            stage,
            f"{os.strerror(error.errno or 0).lower()} while writing {error.filename or 'a file'}; "
            "expected room for this stage's outputs; free or mount some and run dvc repro, "
            "finished work is kept.",
        )
    finally:
        if os.environ.get("RANK", "0") == "0":  # of training processes, one records
            _record(cell, started, outcome)


def _stop(stage: str, sentence: str) -> None:
    print(f"{stage}: {sentence}", file=sys.stderr)
    sys.exit(EXIT_MENDABLE)


def _record(cell: str, started: float, outcome: str) -> None:
    """Write the run's record; a run never fails for want of it."""
    record = {
        "cell": cell,
        "outcome": outcome,
        "started_unix_s": round(started, 3),
        "duration_s": round(time.time() - started, 3),
        "host": platform.node(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "git": _git_revision(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    try:
        RUNS.mkdir(exist_ok=True)
        (RUNS / f"{cell}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"runs/{cell}.json was not written: {error}", file=sys.stderr)


def _git_revision() -> str | None:
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607  the user's own git
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return out.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
