"""The shell around a stage: errors become sentences, and who, when and where goes to `runs/`.

    run("capture", main)                          # in stages/capture.py
    with Progress(len(units), "capture", unit="part") as line:
        ...                                       # line.add() a unit

`runs/<stage>[-<cell>].json` is the last run of a cell: written when it starts, twice a minute while
it works, and when it ends; `runs/log.jsonl` keeps a line of every run that ended. They lie outside
every DVC out, because a clock, a host or a git revision in an out would make equal work differ.
SIGTERM (a pre-empted job) unwinds like Ctrl-C: the unit at work is rolled back, finished ones stay.
Knows no stage's content.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from pipeline.memory import memory_error
from storage.errors import LkcacheError
from storage.workspace import disk_error, file_digest, write_json

RUNS = Path("runs")
LOG = RUNS / "log.jsonl"
PARAMS = Path("params.yaml")
PACKAGES = ("lkcache", "torch", "transformers", "numpy", "zarr", "pyarrow", "dask", "dvc")
EXIT_MENDABLE = 2
EXIT_TERMINATED = 128 + signal.SIGTERM
HEARTBEAT_S = 30.0


class Terminated(BaseException):
    """SIGTERM: like `KeyboardInterrupt`, no error of the program."""


def run(stage: str, main: Callable[[], None]) -> None:
    """Run a stage's `main`; print what a user can mend in one sentence and exit with 2.

    After SIGTERM the exit code is 143, as the shell gives it to a process that a SIGTERM ended.
    """
    record = _Record("-".join([stage, *sys.argv[1:]]))
    code, outcome, sentence = 0, "done", ""
    with _terminations_raised(), record:
        try:
            main()
        except LkcacheError as error:
            code, outcome, sentence = EXIT_MENDABLE, "failed", str(error)
        except KeyboardInterrupt:
            code, outcome = EXIT_MENDABLE, "stopped"
            sentence = "interrupted; nothing half-written was left; run dvc repro to go on."
        except Terminated:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the rest takes a moment
            code, outcome = EXIT_TERMINATED, "stopped"
            sentence = "stopped by SIGTERM; finished work is kept; run dvc repro to go on."
        except (OSError, MemoryError, RuntimeError) as error:
            mendable = memory_error(error, stage, record.at())
            if mendable is None and isinstance(error, OSError):
                mendable = disk_error(error)
            if mendable is None:
                raise
            code, outcome, sentence = EXIT_MENDABLE, "failed", str(mendable)
        record.end(outcome, code, sentence)
    if code:
        print(f"{stage}: {sentence}", file=sys.stderr)
        sys.exit(code)


class Progress:
    """A line with rate and time left on a terminal only; its state goes to `runs/`."""

    def __init__(self, total: float, label: str, *, unit: str, done: float = 0) -> None:
        """`done` of the total was finished by an earlier run; the rate does not count it."""
        self._total, self._unit, self._done, self._before = total, unit, done, done
        self._started = self._told = time.monotonic()
        # disable=None: silent where stderr is no terminal, as under CI or a batch system
        self._line = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit=unit,
            unit_scale=total > 99_999,
            disable=None,
        )

    def __enter__(self) -> "Progress":
        """Show the line."""
        if _Record.current is not None:
            _Record.current.follow(self.state)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the line as it is, and the last state in the record."""
        self._line.close()
        if _Record.current is not None:
            _Record.current.follow(None)

    def add(self, amount: float = 1, **notes: str) -> None:
        """Count finished work; `notes` stand at the line's end."""
        self._done += amount
        if notes:
            self._line.set_postfix(notes, refresh=False)
        self._line.update(amount)
        now = time.monotonic()
        if _Record.current is not None and now - self._told >= HEARTBEAT_S:
            self._told = now
            _Record.current.tell()

    def state(self) -> dict[str, Any]:
        """What is done of how much, how fast, and the time left."""
        now = time.monotonic()
        rate = (self._done - self._before) / max(now - self._started, 1e-9)
        left_s = (self._total - self._done) / rate if rate else None
        return {
            "done": round(self._done, 3),
            "total": self._total,
            "unit": self._unit,
            "per_s": round(rate, 3),
            "left_s": None if left_s is None else round(left_s, 1),
        }


class _Record:
    """The file in `runs/` of this process's run; a run never fails for want of it."""

    current: "_Record | None" = None

    def __init__(self, cell: str) -> None:
        self._path = RUNS / f"{cell}.json"
        self._silent = os.environ.get("RANK", "0") != "0"  # of training processes, one records
        self._started = time.time()
        self._state: Callable[[], dict[str, Any]] | None = None
        self._value: dict[str, Any] = {
            "cell": cell,
            "outcome": "running",
            "exit_code": None,
            "error": None,
            "started": _utc(self._started),
            "ended": None,
            "duration_s": None,
            "params_sha256": file_digest(PARAMS) if PARAMS.is_file() else None,
            "pid": os.getpid(),
            "host": platform.node(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "device": None,
            "python": platform.python_version(),
            "git": _git_revision(),
            "packages": {name: _version(name) for name in PACKAGES},
            "progress": None,
        }

    def __enter__(self) -> "_Record":
        self._write()
        _Record.current = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """What is still under way here is a defect of ours, or a `sys.exit`."""
        _Record.current = None
        if error is not None:
            code = error.code if isinstance(error, SystemExit) else 1
            self.end("crashed", code, f"{type(error).__name__}: {error}")

    def follow(self, state: Callable[[], dict[str, Any]] | None) -> None:
        """Ask `state` from here on; with None, keep the last answer of the one before."""
        self._take()
        self._state = state

    def tell(self) -> None:
        """Write the state of the work."""
        self._take()
        self._write()

    def _take(self) -> None:
        if self._state is not None:
            self._value["progress"] = {**self._state(), "at": _utc(time.time())}

    def at(self) -> str:
        """The unit at work: `step 12 of 160`; nothing before the first and after the last."""
        self._take()
        last = self._value["progress"]
        if last is None or last["done"] >= last["total"]:
            return ""
        first = last["done"] if last["unit"] == "token" else last["done"] + 1
        return f"{last['unit']} {first:.0f} of {last['total']:.0f}"

    def end(self, outcome: str, code: Any, sentence: str) -> None:
        now = time.time()
        self._take()
        self._value |= {
            "outcome": outcome,
            "exit_code": code,
            "error": sentence or None,
            "ended": _utc(now),
            "duration_s": round(now - self._started, 3),
            "device": _device(),
        }
        self._write()
        if self._silent:
            return
        try:
            # one write of one line: cells that end together do not mix theirs
            with LOG.open("a", encoding="utf-8") as log:
                log.write(json.dumps(self._value, ensure_ascii=False) + "\n")
        except OSError as error:
            print(f"{LOG} was not written: {error}", file=sys.stderr)

    def _write(self) -> None:
        if self._silent:
            return
        try:
            write_json(self._path, self._value)
        except OSError as error:
            print(f"{self._path} was not written: {error}", file=sys.stderr)


@contextmanager
def _terminations_raised() -> Iterator[None]:
    """Turn SIGTERM into `Terminated` in the main thread, where alone Python allows it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _utc(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds")


def _device() -> str:
    """The CUDA devices that this process sees, or the CPU; torch is asked only where it is used."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return platform.processor() or platform.machine()
    try:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except RuntimeError as error:  # a device in exclusive use answers nobody else
        return f"CUDA ({error})"
    return ", ".join(names)


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
