"""What is left under `.scratch` is told apart, and only what no run needs is removed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.scratch import find_work, remove_work
from storage.workspace import Workspace
from tests.storage.test_workspace import HOLD

ROOT = Path(__file__).parents[2]
OUT = Path("data")


def leave(root: Path, fingerprint: str, stage: str = "capture") -> Path:
    """Unpublished work of three bytes."""
    with Workspace(stage, fingerprint * 64, outs=[OUT], root=root) as workspace:
        path = workspace.path(OUT)
        path.mkdir(exist_ok=True)
        (path / "a").write_text("abc")
    return path.parent


def states(root: Path) -> dict[tuple[str, str], str]:
    return {(work.stage, work.fingerprint[0]): work.state for work in find_work(root)}


def test_the_latest_run_is_resumable_and_all_others_are_stale(tmp_path: Path) -> None:
    leave(tmp_path, "a")
    leave(tmp_path, "b")
    leave(tmp_path, "a")  # the parameters came back
    leave(tmp_path, "c", stage="train-lm-kl-0")
    with Workspace("prepare", "d" * 64, outs=[OUT], root=tmp_path):
        pass  # complete, or killed at once
    assert states(tmp_path) == {
        ("capture", "a"): "resumable",
        ("capture", "b"): "stale",
        ("train-lm-kl-0", "c"): "resumable",
        ("prepare", "d"): "empty",
    }
    (work,) = (w for w in find_work(tmp_path) if w.state == "stale")
    assert work.num_bytes == 3


def test_without_a_record_the_newest_work_is_the_latest(tmp_path: Path) -> None:
    old, new = leave(tmp_path, "a"), leave(tmp_path, "b")
    (tmp_path / ".scratch/capture.pid").write_text("123\n")  # of an older version
    os.utime(old / "data/a", (9, 9))
    assert states(tmp_path) == {("capture", "a"): "stale", ("capture", "b"): "resumable"}
    assert new.exists()


def test_work_of_a_living_process_is_never_touched(tmp_path: Path) -> None:
    leave(tmp_path, "a", stage="prepare")
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        works = find_work(tmp_path)
        assert {work.state for work in works} == {"in use"}
        assert not any(remove_work(tmp_path, work) for work in works)
    finally:
        child.kill()
        child.communicate()
    assert states(tmp_path)["prepare", "a"] == "stale"


def test_work_whose_publication_was_cut_off_is_kept(tmp_path: Path) -> None:
    path = leave(tmp_path, "a")
    (tmp_path / ".scratch/capture.journal.json").write_text("{}")
    (work,) = find_work(tmp_path)
    assert work.state == "half published"
    assert not remove_work(tmp_path, work)
    assert path.exists()


def test_work_on_another_root_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "fast"
    project.mkdir()
    monkeypatch.setenv("LKCACHE_SCRATCH", str(elsewhere))
    path = leave(project, "a")
    assert path.is_relative_to(elsewhere)
    assert states(project) == {("capture", "a"): "resumable"}


def test_a_stage_that_finds_stale_work_names_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, "a")
    leave(tmp_path, "b")
    assert "it is not used, and `lkcache clean` removes it" in capsys.readouterr().err


def test_outs_set_aside_go_only_with_all_wherever_they_lie(tmp_path: Path) -> None:
    for fingerprint, text in (("a", "first"), ("b", "second")):
        with Workspace(
            "capture", fingerprint * 64, outs=[OUT], root=tmp_path, keep_replaced=True
        ) as workspace:
            workspace.path(OUT).write_text(text)
            workspace.publish()
    stamp = tmp_path / f".scratch/capture.aside/{'a' * 16}/stamp.json"
    far = tmp_path / "another-disk"  # where a rename cannot leave the filesystem of the out
    far.write_text("first")
    stated = json.loads(stamp.read_text())
    stamp.write_text(json.dumps({**stated, "places": {**stated["places"], "b": str(far)}}))
    (work,) = find_work(tmp_path)
    assert (work.stage, work.state, work.elsewhere) == ("capture", "set aside", (far,))
    assert work.num_bytes == 2 * len("first") + stamp.stat().st_size
    assert remove_work(tmp_path, work)
    assert not far.exists()
    assert not stamp.parent.exists()
    assert (tmp_path / OUT).read_text() == "second"
    assert find_work(tmp_path) == []


def test_outs_set_aside_of_a_stage_at_work_stay(tmp_path: Path) -> None:
    for fingerprint in "ab":
        with Workspace(
            "capture", fingerprint * 64, outs=[OUT], root=tmp_path, keep_replaced=True
        ) as workspace:
            workspace.path(OUT).write_text(fingerprint)
            workspace.publish()
    with Workspace("capture", "b" * 64, outs=[OUT], root=tmp_path):
        (work,) = (w for w in find_work(tmp_path) if w.path.parent.suffix == ".aside")
        assert work.state == "in use"
        assert not remove_work(tmp_path, work)
