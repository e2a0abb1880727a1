"""The shell of a stage: a sentence and exit code 2 for what users can mend, a record in runs/."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.provenance import run
from storage.errors import DataError


def failing(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (DataError(found="no prompt", expected="one", todo="add it"), "no prompt; expected one"),
        (KeyboardInterrupt(), "interrupted; nothing half-written was left"),
        (OSError(errno.ENOSPC, "x", "cache/a"), "no space left on device while writing cache/a"),
        (OSError(errno.EROFS, "x", "cache/a"), "read-only file system while writing cache/a"),
        (PermissionError(errno.EACCES, "x", "data"), "no permission to write data"),
    ],
)
def test_what_users_can_mend_is_a_sentence_and_exit_code_2(
    error: BaseException,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stage"])
    with pytest.raises(SystemExit) as stop:
        run("capture", failing(error))
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith(f"capture: {sentence}")
    assert "Traceback" not in said
    record = json.loads(Path("runs/capture.json").read_text())
    assert record["outcome"] == "stopped" if error.args == () else "failed"
    assert record["error"].startswith(sentence)
    assert record["exit_code"] == 2


def test_a_defect_of_ours_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stage"])
    with pytest.raises(OSError, match="odd"):
        run("capture", failing(OSError(errno.EIO, "odd")))


def test_a_run_is_recorded_with_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stage", "lm-kl-0"])
    run("train", lambda: None)
    record = json.loads(Path("runs/train-lm-kl-0.json").read_text())
    assert record["outcome"] == "done"
    assert record["packages"]["numpy"]
