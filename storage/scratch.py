"""Partial work under `.scratch`: what each stage left there, and which of it may go.

    for work in find_work(root):
        if work.state in REMOVABLE:
            remove_work(root, work)

What a stage's latest run left is *resumable*: the next run of the same parameters and inputs goes
on from it. Work of other fingerprints is *stale*: no run uses it until its parameters come back.
Whole outs that a run of other parameters replaced are *set aside*: a run of theirs takes them back,
and they are the only copy. A stage whose lock is held, or whose publication was cut off (its
journal stands, and the next run rolls it forward), is never touched. Reads names, sizes and locks;
knows no stage.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from storage.errors import DataError
from storage.workspace import SCRATCH, STAMP, read_json, remove, scratch_root

FINGERPRINT = re.compile(r"[0-9a-f]{16}")
STALE, RESUMABLE, ASIDE, IN_USE, UNPUBLISHED, EMPTY = (
    "stale",
    "resumable",
    "set aside",
    "in use",
    "half published",
    "empty",
)
REMOVABLE = (STALE, EMPTY)
ASIDE_SUFFIX = ".aside"


@dataclass(frozen=True)
class Work:
    """One folder of partial work."""

    stage: str
    """Stage, or stage and cell."""
    fingerprint: str
    path: Path
    num_bytes: int
    modified_s: float
    """Unix time of the latest change in it."""
    state: str
    elsewhere: tuple[Path, ...] = ()
    """What of it lies on the filesystem of its outs."""


def find_work(root: Path) -> list[Work]:
    """All partial work of a project, by stage and age, newest first."""
    folder = scratch_root(root)
    found = []
    for stage in sorted(p for p in folder.glob("*") if p.is_dir() and p.suffix != ASIDE_SUFFIX):
        measured = [(path, *_measure([path])) for path in _fingerprints(stage)]
        measured.sort(key=lambda one: (-one[3], one[0].name))
        latest = _latest(root, stage.name) or next((p.name for p, *_ in measured), "")
        for path, files, num_bytes, modified in measured:
            state = RESUMABLE if path.name == latest else STALE
            state = _held(root, stage.name) or (state if files else EMPTY)
            found.append(Work(stage.name, path.name, path, num_bytes, modified, state))
    return found + list(_set_aside(root))


def _set_aside(root: Path) -> Iterator[Work]:
    """Outs that were moved aside; always beside the project's own stamps."""
    for folder in sorted((root / SCRATCH).glob(f"*{ASIDE_SUFFIX}")):
        stage = folder.name.removesuffix(ASIDE_SUFFIX)
        for path in sorted(_fingerprints(folder)):
            try:
                places = [Path(p) for p in read_json(path / STAMP).get("places", {}).values()]
            except DataError:
                places = []
            elsewhere = tuple(p for p in places if path.resolve() not in p.resolve().parents)
            _, num_bytes, modified = _measure([path, *elsewhere])
            state = _held(root, stage) or ASIDE
            yield Work(stage, path.name, path, num_bytes, modified, state, elsewhere)


def _fingerprints(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.is_dir() and FINGERPRINT.fullmatch(p.name)]


def _held(root: Path, stage: str) -> str:
    """Why nothing of a stage may go now; empty where it may."""
    if _is_locked(root, stage):
        return IN_USE
    return UNPUBLISHED if _journal(root, stage).exists() else ""


def remove_work(root: Path, work: Work) -> bool:
    """Remove one folder under its stage's lock; False where a process has taken that since."""
    with _locked(root, work.stage) as free:
        if not free or _journal(root, work.stage).exists():
            return False
        for path in (*work.elsewhere, work.path):
            remove(path)
    return True


def _measure(paths: Sequence[Path]) -> tuple[int, int, float]:
    """Number of files, their bytes, and the latest change."""
    items = [item for path in paths for item in (path, *path.rglob("*"))]
    stats = [item.lstat() for item in items if item.is_file()]
    times = [stat.st_mtime for stat in stats] or [paths[0].stat().st_mtime]
    return len(stats), sum(stat.st_size for stat in stats), max(times)


def _latest(root: Path, stage: str) -> str:
    """Fingerprint of a stage's latest run, as it wrote beside its process id."""
    path = root / SCRATCH / f"{stage}.pid"
    lines = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return lines[1] if len(lines) > 1 else ""


def _journal(root: Path, stage: str) -> Path:
    return root / SCRATCH / f"{stage}.journal.json"


def _is_locked(root: Path, stage: str) -> bool:
    if not (root / SCRATCH / f"{stage}.lock").exists():
        return False
    with _locked(root, stage) as free:
        return not free


@contextmanager
def _locked(root: Path, stage: str) -> Iterator[bool]:
    """Hold a stage's lock; yields False where another process holds it."""
    path = root / SCRATCH / f"{stage}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
