"""Where a long stage works until its outputs are whole (DESIGN §3), and the digests that name them.

    with Workspace("capture", fingerprint, outs=[Path("cache/train.zarr")]) as workspace:
        if workspace.complete():
            return
        ...  # write to workspace.path(Path("cache/train.zarr")); what is already there is resumed
        workspace.publish()

DVC removes a stage's outs before it runs, so partial work lies in `.scratch/<stage>[-<cell>]/
<fingerprint>/` and moves into place by rename when it is whole. `publish` keeps a journal: a kill
between two renames is rolled forward by the next run, an error is rolled back, and an existing out
stays as it was until its successor is on the disk. With `keep_replaced` it is then not removed but
lies in `.scratch/<stage>.aside/<its fingerprint>/`, from where the next run of that fingerprint
takes it back. Knows nothing of what the outs hold.

Environment: `LKCACHE_SCRATCH` moves the work (not the lock, stamp and journal) to another root,
from where outs are copied, synced and verified before the rename.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from storage.errors import DataError, WorkspaceError

SCRATCH = ".scratch"
SCRATCH_VARIABLE = "LKCACHE_SCRATCH"
# A stamp holds the digest of every file up to this size and the size alone of larger ones, so that
# asking a 100 GB cache whether it is complete stays instant; its own manifest digests the rest.
HASHED_BYTES = 64 << 20
STAMP = "stamp.json"  # of outs that were moved aside, beside them
INCOMING = ".incoming"  # copied to the filesystem of its out, not yet renamed

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")

Inventory = dict[str, list[int | str]]


def digest(value: object) -> str:
    """Sha256 (hex) of the canonical JSON of plain values; `TypeError` for paths and arrays."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_digest(path: Path) -> str:
    """Sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digest(path: Path) -> str:
    """Sha256 (hex) of a folder: the sorted relative names of its files with their digests."""
    return digest({name: file_digest(path / name) for name in file_names(path)})


def file_names(path: Path) -> list[str]:
    """Sorted relative names (POSIX) of all files below a folder."""
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write sorted keys, indent 1 and a trailing newline, atomically; NaN is a `ValueError`."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `DataError` where the file is missing or holds something else."""
    todo = "run dvc repro, so that the stage that owns it writes it anew"
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(found=f"no file {path}", expected="a JSON object", todo=todo) from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(
            found=f"{path} is not JSON ({error})", expected="a JSON object", todo=todo
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            found=f"{path} holds a {type(value).__name__}", expected="a JSON object", todo=todo
        )
    return value


def disk_error(error: OSError) -> WorkspaceError | None:
    """What a user can mend about a disk, as a sentence; None for any other error."""
    where = error.filename or "a file"
    if isinstance(error, PermissionError):
        return WorkspaceError(
            found=f"no permission to write {where}",
            expected="a folder that this user can write to",
            todo="change its owner or mode and run dvc repro, finished work is kept",
        )
    if error.errno == errno.EROFS:
        return WorkspaceError(
            found=f"read-only file system while writing {where}",
            expected="a disk that can be written to",
            todo="mount it writable and run dvc repro, finished work is kept",
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return WorkspaceError(
            found=f"{os.strerror(error.errno).lower()} while writing {where}",
            expected="room for this stage's outputs",
            todo="free or mount some and run dvc repro, finished work is kept",
        )
    return None


def require_room(folder: Path, num_bytes: float, what: str) -> None:
    """`WorkspaceError` where the disk of `folder` has less than `num_bytes` free."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise WorkspaceError(
            found=f"{what} needs {_size(num_bytes)} and the disk of {folder} has {_size(free)} "
            "free",
            expected="room for it before the work goes on",
            todo=f"free some, store less (lkcache estimate says what takes how much) or name a "
            f"folder of another disk in {SCRATCH_VARIABLE}, and run dvc repro, finished work is "
            "kept",
        )


def _size(num_bytes: float) -> str:
    power = 0
    while num_bytes >= 1000 and power < len(UNITS) - 1:
        num_bytes, power = num_bytes / 1000, power + 1
    return f"{num_bytes:.3g} {UNITS[power]}"


def sync(path: Path) -> None:
    """Flush a file, or a folder with all that it holds, to the disk."""
    for item in [*_below(path), path]:
        descriptor = os.open(item, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Workspace:
    """The long-stage contract: lock, scratch keyed by fingerprint, publication by rename."""

    def __init__(
        self,
        stage: str,
        fingerprint: str,
        *,
        outs: Sequence[Path],
        cell: str = "",
        root: Path = Path(),
        keep_replaced: bool = False,
    ) -> None:
        """`outs` are relative to `root`; `fingerprint` names parameters, inputs and format.

        `keep_replaced`: outs of another fingerprint are moved aside, not removed.
        """
        self.name = f"{stage}-{cell}" if cell else stage
        self.fingerprint = fingerprint
        self.outs = list(outs)
        self._root = root
        self._keep_replaced = keep_replaced
        self._state = root / SCRATCH
        self._work = scratch_root(root) / self.name / fingerprint[:16]
        self._lock = FileLock(self._state / f"{self.name}.lock", timeout=0)

    def __enter__(self) -> "Workspace":
        """Take the lock, finish an interrupted publication, make the scratch folder."""
        self._state.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._recover()
            self._report_stale()
            for out in self.outs:
                _require_writable(self._root / out)
            self._work.mkdir(parents=True, exist_ok=True)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock; unpublished work stays for the next run of the same fingerprint."""
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(self._work)  # a full disk names no file: say whose work it was
        self._lock.release()
        # safetensors tells the system's error as a text of its own kind
        if told := re.search(r"\(os error (\d+)\)", str(error)) if error else None:
            number = int(told[1])
            raise OSError(number, os.strerror(number), str(self._work)) from error

    def path(self, out: Path) -> Path:
        """Where to write `out` while working; its parent exists, earlier work may lie there."""
        assert out in self.outs, f"{out} is not an out of {self.name}"
        place = self._work / out
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def complete(self) -> bool:
        """Whether all outs stand in place as this fingerprint published them.

        They are taken back where a run of another fingerprint had moved them aside.
        """
        places = {str(out): self._root / out for out in self.outs}
        whole = self._holds(_read_if_json(self._stamp), places) or self._take_back()
        if whole:
            # a kill right after publication leaves it; unfinished work of done outs misleads
            shutil.rmtree(self._work, ignore_errors=True)
        return whole

    def require_room(self, what: str, *, left: float, total: float) -> None:
        """`WorkspaceError` where the disks will not hold `left` more bytes of scratch.

        Nor, where the outs lie on another disk than the scratch, `total` bytes of them.
        """
        require_room(self._work, left, what)
        homes = [(self._root / out).absolute() for out in self.outs]
        folders = {next(p for p in home.parents if p.exists()) for home in homes}
        for folder in sorted(folders):
            if _device(folder) != _device(self._work):
                require_room(folder, total, what)

    def forget(self) -> None:
        """Take the published outs for incomplete: the next run works, on what lies in scratch."""
        self._stamp.unlink(missing_ok=True)

    def publish(self) -> None:
        """Sync every out and move it into place; on an error all stays as it was."""
        for out in self.outs:
            assert self.path(out).exists(), f"{self.name} did not write {out}"
        self._move_in({str(out): self.path(out) for out in self.outs})
        shutil.rmtree(self._work, ignore_errors=True)

    def _move_in(self, sources: Mapping[str, Path]) -> None:
        """Put new outs into their places, old ones aside."""
        moves: list[list[str]] = []
        old = self._replaced()
        try:
            for number, out in enumerate(self.outs):
                moves.append(self._stage(out, sources[str(out)], number, old))
            inventories = {out: _inventory(Path(staged)) for out, staged, _ in moves}
            stamp = {"fingerprint": self.fingerprint, "outs": inventories}
            write_json(self._journal, {"moves": moves, "stamp": stamp, "old": old})
            sync(self._journal)
            _forward(self._root, moves)
        except BaseException:
            # a kill leaves the journal to the next run; whoever lives to see the error undoes it
            _backward(self._root, moves, _read_if_json(self._journal).get("stamp", {}))
            self._journal.unlink(missing_ok=True)
            _drop_copies(moves)
            raise
        self._finish({"moves": moves, "stamp": stamp, "old": old})

    def _holds(self, stamp: Mapping[str, Any], places: Mapping[str, Path]) -> bool:
        """Whether a stamp is of this fingerprint and all outs lie at `places` as it says."""
        inventories = stamp.get("outs", {})
        return (
            stamp.get("fingerprint") == self.fingerprint
            and sorted(inventories) == sorted(places)
            and all(_holds(place, inventories[out]) for out, place in places.items())
        )

    def _replaced(self) -> dict[str, Any]:
        """The stamp of outs that are to be kept aside; empty where there are none."""
        stamp = _read_if_json(self._stamp)
        there = any((self._root / out).exists() for out in self.outs)
        if not self._keep_replaced or not there or stamp.get("fingerprint") == self.fingerprint:
            return {}
        # outs without a stamp came from elsewhere (dvc checkout): each lot of them gets a number
        lots = (f"{number:016x}" for number in count(1))
        free = next(lot for lot in lots if not self._aside(lot).exists())
        return stamp or {"fingerprint": free, "outs": {}}

    def _aside(self, fingerprint: str) -> Path:
        return self._state / f"{self.name}.aside" / fingerprint[:16]

    def _take_back(self) -> bool:
        """Move outs of this fingerprint back into place where they lie whole aside."""
        folder = self._aside(self.fingerprint)
        stamp = _read_if_json(folder / STAMP)
        places = {out: Path(place) for out, place in stamp.get("places", {}).items()}
        if not places or not self._holds(stamp, places):
            return False
        self._move_in(places)
        remove(folder)
        print(
            f"{self.name}: took the outs of these parameters and inputs back from {folder}.",
            file=sys.stderr,
        )
        return True

    @property
    def _stamp(self) -> Path:
        return self._state / f"{self.name}.stamp.json"

    @property
    def _journal(self) -> Path:
        return self._state / f"{self.name}.journal.json"

    def _take_lock(self) -> None:
        owner = self._state / f"{self.name}.pid"
        try:
            self._lock.acquire()
        except Timeout:
            told = owner.read_text(encoding="utf-8").split() if owner.exists() else []
            pid = told[0] if told else "unknown"
            raise WorkspaceError(
                found=f"another process (pid {pid}) is at work on {self.name}",
                expected="one process at a time",
                todo="wait for it, or end it if it outlived a killed dvc, and run again",
            ) from None
        # the second line is for `lkcache clean`: the next run resumes what the latest one left
        owner.write_text(f"{os.getpid()}\n{self.fingerprint[:16]}\n", encoding="utf-8")

    def _stage(self, out: Path, source: Path, number: int, old: Mapping[str, Any]) -> list[str]:
        """[out, where its new content lies on the out's filesystem, where the old one goes]."""
        home = self._root / out
        home.parent.mkdir(parents=True, exist_ok=True)
        sync(source)
        same = _device(source) == _device(home.parent)
        staged = source if same else home.parent / f".{home.name}{INCOMING}"
        if not same:
            _copy_verified(source, staged)
        # a rename cannot cross filesystems: what lies on another one goes aside within it
        near = _device(self._state) == _device(home.parent)
        if old:
            label = old["fingerprint"][:16]
            kept = self._aside(label) / out if near else home.parent / f".{self.name}.{label}.aside"
            aside = kept if near else kept / home.name
        elif near:
            aside = self._state / f"{self.name}.replaced" / str(number)
        else:
            aside = home.parent / f".{home.name}.replaced"
        return [str(out), str(staged.absolute()), str(aside.absolute())]

    def _recover(self) -> None:
        """Roll an interrupted publication forward, or back where its pieces are gone."""
        journal = _read_if_json(self._journal)
        if not journal:
            return
        moves, stamp = journal["moves"], journal["stamp"]
        if all(
            Path(staged).exists() or _holds(self._root / out, stamp["outs"][out])
            for out, staged, _ in moves
        ):
            _forward(self._root, moves)
            self._finish(journal)
            return
        _backward(self._root, moves, stamp)
        self._journal.unlink()
        _drop_copies(moves)

    def _finish(self, journal: Mapping[str, Any]) -> None:
        """All outs are in place: stamp them, then forget the journal, and predecessors or not."""
        moves, old = journal["moves"], journal.get("old", {})
        if old:
            folder = self._aside(old["fingerprint"])
            places = {out: aside for out, _, aside in moves if Path(aside).exists()}
            write_json(folder / STAMP, {**old, "places": places})
            print(
                f"{self.name}: the outs of other parameters or inputs "
                f"({old['fingerprint'][:16]}) were moved to {folder}; "
                "lkcache clean lists them, and --all removes them.",
                file=sys.stderr,
            )
        write_json(self._stamp, journal["stamp"])
        sync(self._stamp)  # hours of work would be done again for want of it
        sync_folder(self._state)
        self._journal.unlink()
        for _, _, aside in [] if old else moves:
            remove(Path(aside))
        shutil.rmtree(self._state / f"{self.name}.replaced", ignore_errors=True)

    def _report_stale(self) -> None:
        """Name partial work of other fingerprints; it is never mixed in and never removed here."""
        folder = self._work.parent
        stale = sorted(p.name for p in folder.glob("*") if p.name != self._work.name)
        if stale:
            print(
                f"{self.name}: {folder} keeps unfinished work of other parameters or inputs "
                f"({', '.join(stale)}); it is not used, and `lkcache clean` removes it.",
                file=sys.stderr,
            )


def _drop_copies(moves: Sequence[Sequence[str]]) -> None:
    """Remove what was copied to an out's filesystem; the source is still in scratch."""
    for _, staged, _ in moves:
        if staged.endswith(INCOMING):
            remove(Path(staged))


def scratch_root(root: Path) -> Path:
    """The folder of all stages' work; on a shared root each project has its own."""
    elsewhere = os.environ.get(SCRATCH_VARIABLE)
    if not elsewhere:
        return root / SCRATCH
    project = root.resolve()
    return Path(elsewhere) / f"{project.name}-{digest(str(project))[:12]}"


def _require_writable(home: Path) -> None:
    """`PermissionError` now rather than after hours of work."""
    folder = next(p for p in home.absolute().parents if p.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _below(path: Path) -> Iterator[Path]:
    return path.rglob("*") if path.is_dir() else iter(())


def _device(path: Path) -> int:
    return path.stat().st_dev


def _inventory(path: Path) -> Inventory:
    """Size and digest (size alone beyond `HASHED_BYTES`) of every file of an out."""
    names = file_names(path) if path.is_dir() else [""]
    found: Inventory = {}
    for name in names:
        file = path / name if name else path
        size = file.stat().st_size
        found[name] = [size, file_digest(file) if size <= HASHED_BYTES else ""]
    return found


def _holds(path: Path, inventory: Inventory) -> bool:
    """Whether an out exists with exactly this inventory; sizes are compared before digests."""
    if not path.exists():
        return False
    names = file_names(path) if path.is_dir() else [""]
    if names != sorted(inventory):
        return False
    sizes = [(path / name if name else path).stat().st_size for name in names]
    return sizes == [inventory[name][0] for name in names] and _inventory(path) == inventory


def _read_if_json(path: Path) -> dict[str, Any]:
    """A stamp or journal, or nothing where it is missing or torn."""
    try:
        return read_json(path)
    except DataError:
        return {}


def _copy_verified(source: Path, target: Path) -> None:
    """Copy an out to another filesystem, sync it and compare every byte's digest."""
    remove(target)
    names = file_names(source) if source.is_dir() else [""]
    size = sum((source / name if name else source).stat().st_size for name in names)
    require_room(target.parent, size, f"the copy of {source}")
    try:
        for name in names:
            file = target / name if name else target
            file.parent.mkdir(parents=True, exist_ok=True)
            origin = source / name if name else source
            shutil.copyfile(origin, file)
            if file_digest(file) != file_digest(origin):
                raise OSError(errno.EIO, "copy differs from its source", str(file))
        sync(target)
    except BaseException:
        remove(target)
        raise


def _forward(root: Path, moves: Sequence[Sequence[str]]) -> None:
    """Move old outs aside and new ones in; safe to repeat after a kill at any point."""
    for out, staged, aside in moves:
        home = root / out
        if not Path(staged).exists():
            continue  # moved before the kill
        home.parent.mkdir(parents=True, exist_ok=True)
        if home.exists() or home.is_symlink():
            remove(Path(aside))
            Path(aside).parent.mkdir(parents=True, exist_ok=True)
            home.rename(aside)
        Path(staged).rename(home)
        sync_folder(home.parent)


def _backward(root: Path, moves: Sequence[Sequence[str]], stamp: Mapping[str, Any]) -> None:
    """Undo `_forward`: new outs back to where they were staged, old ones into their places."""
    for out, staged, aside in moves:
        home = root / out
        if not Path(staged).exists() and _holds(home, stamp.get("outs", {}).get(out, {})):
            home.rename(staged)
        if Path(aside).exists() and not home.exists():
            Path(aside).rename(home)


def sync_folder(path: Path) -> None:
    """Flush a folder's own entries (a rename within it) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
