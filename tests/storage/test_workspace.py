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

from storage import workspace as module
from storage.errors import DataError, WorkspaceError
from storage.workspace import Workspace, digest, read_json, tree_digest, write_json

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
