import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from storage import workspace as module
from storage.errors import DataError, WorkspaceError
from storage.workspace import (
    Workspace,
    digest,
    disk_error,
    read_json,
    tree_digest,
    write_json,
)
from tests.disks import small_disk

DATA, METRICS = Path("data"), Path("metrics/prepare.json")
ROOT = Path(__file__).parents[2]


def work(root: Path, text: str, *, fingerprint: str = "f" * 64) -> None:
    """A stage with a folder and a file as its outs."""
    with Workspace("prepare", fingerprint, outs=[DATA, METRICS], root=root) as workspace:
        workspace.path(DATA).mkdir(exist_ok=True)
        (workspace.path(DATA) / "a.txt").write_text(text)
        write_json(workspace.path(METRICS), {"text": text})
        workspace.publish()


def state(root: Path) -> tuple[str, str]:
    return (root / DATA / "a.txt").read_text(), read_json(root / METRICS)["text"]


def is_complete(root: Path, fingerprint: str = "f" * 64) -> bool:
    with Workspace("prepare", fingerprint, outs=[DATA, METRICS], root=root) as workspace:
        return workspace.complete()


def python(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_digest_knows_values_not_their_order() -> None:
    assert digest({"b": 1, "a": [1, 2.5]}) == digest({"a": [1, 2.5], "b": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    with pytest.raises(TypeError):
        digest({"path": Path("x")})
    with pytest.raises(ValueError, match="JSON compliant"):
        digest(float("nan"))


def test_tree_digest_depends_on_names_and_contents_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "x").write_text("1")
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")
    (tmp_path / "two" / "sub" / "x").rename(tmp_path / "two" / "sub" / "y")
    assert tree_digest(tmp_path / "one") != tree_digest(tmp_path / "two")


def test_json_is_written_sorted_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_json(path, {"b": 1, "a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n "a": "é",\n "b": 1\n}\n'
    assert read_json(path) == {"a": "é", "b": 1}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "no file .*x.json; expected a JSON object; run dvc repro"), (b"{", "is not JSON"),
     (b"\xff", "is not JSON"), (b"[1]", "holds a list")],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(
    tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_json(tmp_path / "x.json")


def test_published_outs_are_complete_until_they_change(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    work(tmp_path, "old")
    assert state(tmp_path) == ("old", "old")
    assert is_complete(tmp_path)
    assert not is_complete(tmp_path, "e" * 64)
    (tmp_path / DATA / "a.txt").write_text("new")  # of the same size
    assert not is_complete(tmp_path)
    work(tmp_path, "old")
    shutil.rmtree(tmp_path / DATA)
    assert not is_complete(tmp_path)


def keep(root: Path, text: str, fingerprint: str) -> None:
    """A stage that keeps what it replaces."""
    with Workspace(
        "prepare", fingerprint, outs=[DATA, METRICS], root=root, keep_replaced=True
    ) as workspace:
        if workspace.complete():
            return
        workspace.path(DATA).mkdir(exist_ok=True)
        (workspace.path(DATA) / "a.txt").write_text(text)
        write_json(workspace.path(METRICS), {"text": text})
        workspace.publish()


def test_outs_of_another_fingerprint_are_moved_aside_and_come_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(tmp_path, "old", "a" * 64)
    assert capsys.readouterr().err == ""
    keep(tmp_path, "new", "b" * 64)
    aside = tmp_path / ".scratch" / "prepare.aside"
    said = capsys.readouterr().err
    assert f"({'a' * 16}) were moved to {aside / ('a' * 16)}; lkcache clean lists" in said
    assert (aside / ("a" * 16) / DATA / "a.txt").read_text() == "old"
    assert state(tmp_path) == ("new", "new")
    keep(tmp_path, "never written", "a" * 64)
    assert f"took the outs of these parameters and inputs back from {aside}" in (
        capsys.readouterr().err
    )
    assert state(tmp_path) == ("old", "old")
    assert [p.name for p in aside.iterdir()] == ["b" * 16]
    (aside / ("b" * 16) / DATA / "a.txt").write_text("torn")
    keep(tmp_path, "anew", "b" * 64)
    assert state(tmp_path) == ("anew", "anew")  # what is torn is not taken back


def test_outs_that_nobody_stamped_are_never_lost(tmp_path: Path) -> None:
    for text in ("first", "second"):
        (tmp_path / DATA).mkdir(exist_ok=True)
        (tmp_path / DATA / "a.txt").write_text(text)  # as dvc checkout writes it
        (tmp_path / ".scratch" / "prepare.stamp.json").unlink(missing_ok=True)
        keep(tmp_path, "new", "b" * 64)
    found = sorted((tmp_path / ".scratch" / "prepare.aside").glob("00*/data/a.txt"))
    assert [path.read_text() for path in found] == ["first", "second"]
    (tmp_path / DATA / "a.txt").write_text("broken")  # of the same fingerprint: not kept
    keep(tmp_path, "new", "b" * 64)
    assert state(tmp_path) == ("new", "new")
    assert len(list((tmp_path / ".scratch" / "prepare.aside").iterdir())) == 2


@pytest.mark.parametrize("killed_at", [1, 2, 3, 4])
def test_a_kill_while_outs_move_aside_loses_neither(tmp_path: Path, killed_at: int) -> None:
    keep(tmp_path, "old", "a" * 64)
    code = KILLED.replace("fail_at, work", "fail_at, keep").replace(
        'work(Path(sys.argv[1]), "new", fingerprint="e" * 64)',
        'keep(Path(sys.argv[1]), "new", "e" * 64)',
    )
    with python(code, tmp_path, killed_at) as child:
        assert child.wait() == 9
    keep(tmp_path, "never written", "e" * 64)
    assert state(tmp_path) == ("new", "new")
    keep(tmp_path, "never written", "a" * 64)
    assert state(tmp_path) == ("old", "old")


def test_work_that_was_published_is_not_called_unfinished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work(tmp_path, "old")
    left = tmp_path / ".scratch" / "prepare" / ("f" * 16)  # of a kill right after publication
    (left / "batches").mkdir(parents=True)
    assert is_complete(tmp_path)
    assert not left.exists()
    is_complete(tmp_path, "e" * 64)
    assert capsys.readouterr().err == ""


def test_a_disk_without_room_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_500_000))
    with Workspace("prepare", "f" * 64, outs=[DATA], root=tmp_path) as workspace:
        workspace.require_room("the cache", left=2e6, total=9e9)  # one disk: `left` counts
        with pytest.raises(
            WorkspaceError, match=r"the cache needs 3 GB and the disk of .* has 2\.5 MB free"
        ):
            workspace.require_room("the cache", left=3e9, total=9e9)


def test_a_real_disk_that_fills_up_or_is_read_only_loses_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "400k") as disk:
        root = disk.path
        work(root, "old")
        with pytest.raises(OSError, match="No space left") as caught:
            work(root, "new" * 300_000, fingerprint="e" * 64)
        told = disk_error(caught.value)
        assert told is not None
        assert str(told).startswith(f"no space left on device while writing {root}")
        assert state(root) == ("old", "old")
        disk.set("size=64m")
        work(root, "new" * 300_000, fingerprint="e" * 64)
        disk.set("ro")
        with pytest.raises(OSError, match="Read-only") as caught:
            work(root, "newer", fingerprint="d" * 64)
        assert str(disk_error(caught.value)).startswith("read-only file system while writing")
        assert is_complete_read(root)
        disk.set("rw")
        work(root, "newer", fingerprint="d" * 64)
        assert state(root) == ("newer", "newer")


def is_complete_read(root: Path) -> bool:
    """Read what stands there: no lock can be taken on a read-only disk."""
    return state(root) == ("new" * 300_000, "new" * 300_000)


def test_nothing_but_the_stamp_and_lock_stays_in_scratch(tmp_path: Path) -> None:
    work(tmp_path, "old")
    work(tmp_path, "new", fingerprint="e" * 64)
    assert state(tmp_path) == ("new", "new")
    left = sorted(p.name for p in (tmp_path / ".scratch").rglob("*") if p.is_file())
    assert left == ["prepare.lock", "prepare.pid", "prepare.stamp.json"]


def test_unfinished_work_is_there_again_and_other_fingerprints_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Workspace("capture", "a" * 64, outs=[DATA], cell="x", root=tmp_path) as workspace:
        workspace.path(DATA).mkdir()  # and no publish, as after Ctrl-C
    with Workspace("capture", "a" * 64, outs=[DATA], cell="x", root=tmp_path) as workspace:
        assert workspace.path(DATA).is_dir()
    assert capsys.readouterr().err == ""
    with Workspace("capture", "b" * 64, outs=[DATA], cell="x", root=tmp_path) as workspace:
        assert not workspace.path(DATA).exists()
    assert f"unfinished work of other parameters or inputs ({'a' * 16})" in capsys.readouterr().err


HOLD = """
import sys, time
from pathlib import Path
from storage.workspace import Workspace
with Workspace("prepare", "f" * 64, outs=[Path("data")], root=Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    with python(HOLD, tmp_path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(WorkspaceError, match=rf"pid {child.pid}\) is at work on prepare"):
            is_complete(tmp_path)
        child.kill()
        child.wait()
    assert not is_complete(tmp_path)


ORPHANS = """
import os, subprocess, sys, time
from pathlib import Path
from storage.workspace import Workspace
with Workspace("prepare", "f" * 64, outs=[Path("data")], root=Path(sys.argv[1])):
    executed = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    born, birth = os.pipe()
    forked = os.fork()
    if forked == 0:
        os.close(1)
        os.write(birth, b"x")
        time.sleep(60)
    os.read(born, 1)
    print(executed.pid, forked, flush=True)
    os._exit(1)  # dies as by a kill: nothing is released by hand
"""


def test_children_that_outlive_their_parent_do_not_hold_its_lock(tmp_path: Path) -> None:
    with python(ORPHANS, tmp_path) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        parent.wait()
    try:
        assert not is_complete(tmp_path)
    finally:
        for pid in children:
            os.kill(pid, 9)


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def test_a_full_disk_leaves_the_existing_out_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(tmp_path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left") as caught:
            work(tmp_path, "new", fingerprint="e" * 64)
    assert caught.value.errno == errno.ENOSPC
    assert state(tmp_path) == ("old", "old")
    assert is_complete(tmp_path)


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_an_error_between_two_renames_is_rolled_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    work(tmp_path, "old")
    with monkeypatch.context() as patch:
        fail_at(patch, failing, full_disk)
        with pytest.raises(OSError, match="No space left"):
            work(tmp_path, "new", fingerprint="e" * 64)
    assert state(tmp_path) == ("old", "old")
    assert is_complete(tmp_path)
    work(tmp_path, "new", fingerprint="e" * 64)
    assert state(tmp_path) == ("new", "new")


def fail_at(patch: Any, number: int, fail: Callable[[], None]) -> None:
    """Fail instead of the n-th rename."""
    rename, calls = Path.rename, []

    def counted(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == number:
            fail()
        return rename(self, target)

    patch.setattr(Path, "rename", counted)


KILLED = """
import os, sys
from pathlib import Path
import pytest
from tests.storage.test_workspace import fail_at, work
fail_at(pytest.MonkeyPatch(), int(sys.argv[2]), lambda: os._exit(9))
work(Path(sys.argv[1]), "new", fingerprint="e" * 64)
"""


@pytest.mark.parametrize("killed_at", [1, 2, 3, 4])
def test_a_kill_between_two_renames_is_rolled_forward(tmp_path: Path, killed_at: int) -> None:
    work(tmp_path, "old")
    with python(KILLED, tmp_path, killed_at) as child:
        assert child.wait() == 9
    assert is_complete(tmp_path, "e" * 64)
    assert state(tmp_path) == ("new", "new")


def test_a_kill_whose_pieces_dvc_removed_starts_over(tmp_path: Path) -> None:
    work(tmp_path, "old")
    with python(KILLED, tmp_path, 3) as child:  # data was moved, metrics not yet
        assert child.wait() == 9
    shutil.rmtree(tmp_path / DATA)
    (tmp_path / METRICS).unlink()
    assert not is_complete(tmp_path, "e" * 64)
    work(tmp_path, "new", fingerprint="e" * 64)
    assert state(tmp_path) == ("new", "new")


@pytest.fixture
def two_filesystems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Scratch on a filesystem of its own, from which nothing can be renamed."""
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setenv("LKCACHE_SCRATCH", str(elsewhere))
    rename = Path.rename

    def crossing(self: Path, target: Path) -> Path:
        if (elsewhere in self.parents) != (elsewhere in Path(target).absolute().parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", crossing)
    monkeypatch.setattr(module, "_device", lambda path: int(elsewhere in path.absolute().parents))
    return elsewhere


def test_scratch_on_another_filesystem_is_copied(two_filesystems: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    root.mkdir()
    work(root, "old")
    work(root, "new", fingerprint="e" * 64)
    assert state(root) == ("new", "new")
    assert is_complete(root, "e" * 64)
    assert not [p for p in two_filesystems.rglob("*") if p.is_file()]
    assert not list(root.rglob(".*.incoming"))


def test_a_copy_that_differs_is_not_published(
    two_filesystems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "project"
    root.mkdir()
    work(root, "old")
    monkeypatch.setattr(shutil, "copyfile", lambda _, target: Path(target).write_text("torn"))
    with pytest.raises(OSError, match="copy differs"):
        work(root, "new", fingerprint="e" * 64)
    assert state(root) == ("old", "old")
    assert not list(root.rglob(".*.incoming"))


def test_a_folder_without_write_permission_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    started = time.monotonic()
    with pytest.raises(PermissionError) as caught:
        work(tmp_path, "new")
    assert caught.value.filename == str(tmp_path)
    assert time.monotonic() - started < 5


def test_a_full_disk_under_safetensors_is_told_as_one(tmp_path: Path) -> None:
    """Its error is no OSError; the one that leaves the workspace is, and names the work."""
    told = "Error while serializing: I/O error: No space left on device (os error 28)"
    with (
        pytest.raises(OSError, match=r"No space left") as raised,
        Workspace("train", "f" * 64, outs=[DATA], root=tmp_path),
    ):
        raise SafetensorError(told)
    assert raised.value.errno == errno.ENOSPC
    assert str(disk_error(raised.value)).startswith("no space left on device while writing ")
    assert raised.value.filename.endswith(".scratch/train/ffffffffffffffff")
    with (
        pytest.raises(SafetensorError, match="another"),
        Workspace("train", "f" * 64, outs=[DATA], root=tmp_path),
    ):
        raise SafetensorError("another")
