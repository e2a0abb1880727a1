"""A disk that fills up or becomes read-only: a tmpfs where this user may mount one, else a fake."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """A mounted tmpfs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def set(self, options: str) -> None:
        """Mount again with other options: `size=64m`, `ro`."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)


class FakeDisk(Disk):
    """Errors in place of a mount: nothing can be synced on it while it is full or read-only."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._patch = pytest.MonkeyPatch()
        self._left = 3  # syncs, until it is full

    def set(self, options: str) -> None:
        self._patch.undo()
        if options == "ro":
            self._patch.setattr(Path, "mkdir", _raise(errno.EROFS))

    def fill(self) -> None:
        """Full after a few syncs."""
        plain = os.fsync

        def sync(descriptor: int) -> None:
            self._left -= 1
            if self._left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            plain(descriptor)

        self._patch.setattr(os, "fsync", sync)


def _raise(number: int) -> Any:
    def fail(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(self))

    return fail


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Disk]:
    """A disk of `size` at `path`."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode == 0:
        try:
            yield Disk(path)
        finally:
            subprocess.run(["umount", "-l", path], check=True)
        return
    disk = FakeDisk(path)
    disk.fill()
    try:
        yield disk
    finally:
        disk.set("rw")
