"""The shell of a stage: a sentence and exit code 2 for what users can mend, a record in runs/."""

import errno
import hashlib
import io
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline import provenance
from pipeline.memory import memory_error, told
from pipeline.provenance import Progress, run
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


@pytest.mark.parametrize(
    ("stage", "error", "parameter"),
    [
        ("generate", torch.OutOfMemoryError("CUDA out of memory"), "generate.batch_sequences"),
        ("train", RuntimeError("[x] DefaultCPUAllocator: can't allocate"), "micro_batch_sequences"),
        ("evaluate", MemoryError(), "evaluate.decode_batch"),
        ("verify", OSError(errno.ENOMEM, "Cannot allocate memory"), "cluster.workers"),
        ("target", RuntimeError("not enough memory: you tried"), "target.batch_sequences"),
        ("export", MemoryError(), "a machine with more memory"),
    ],
)
def test_memory_that_runs_out_names_the_unit_and_what_to_lower(
    stage: str,
    error: Exception,
    parameter: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stage"])

    def main() -> None:
        with Progress(4, stage, unit="batch") as line:
            line.add(2)
            raise error

    with pytest.raises(SystemExit) as stop:
        run(stage, main)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith(f"{stage}: memory ran out at batch 3 of 4 ({told(error)}); expected")
    assert parameter in said
    assert "run dvc repro" in said
    assert "Traceback" not in said
    assert json.loads(Path(f"runs/{stage}.json").read_text())["outcome"] == "failed"


def test_another_runtime_error_is_not_memory() -> None:
    assert memory_error(RuntimeError("shapes differ"), "train") is None
    assert told(RuntimeError("a\n b " + "x" * 200)).endswith(" …")


def test_what_the_cpu_allocator_raises_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert memory_error(caught.value, "train") is not None


def test_the_record_ends_with_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stage"])

    def main() -> None:
        with Progress(224, "evaluate", unit="batch") as line:
            for _ in range(224):
                line.add()

    run("evaluate", main)
    record = json.loads(Path("runs/evaluate.json").read_text())
    assert (record["outcome"], record["progress"]["done"]) == ("done", 224)
    assert record["progress"]["left_s"] == 0


def test_a_defect_of_ours_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stage"])
    with pytest.raises(OSError, match="odd"):
        run("capture", failing(OSError(errno.EIO, "odd")))


def test_sigterm_is_a_sentence_and_exit_code_143(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stage"])
    before, unwound = signal.getsignal(signal.SIGTERM), []

    def main() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        finally:
            unwound.append(True)

    with pytest.raises(SystemExit) as stop:
        run("capture", main)
    assert stop.value.code == 143
    assert capsys.readouterr().err == (
        "capture: stopped by SIGTERM; finished work is kept; run dvc repro to go on.\n"
    )
    assert unwound
    assert signal.getsignal(signal.SIGTERM) is before
    record = json.loads(Path("runs/capture.json").read_text())
    assert (record["outcome"], record["exit_code"]) == ("stopped", 143)


def test_every_run_leaves_a_line_and_a_running_one_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stage"])
    monkeypatch.setattr(provenance, "HEARTBEAT_S", 0.0)
    Path("params.yaml").write_text("a: 1")
    seen = []

    def main() -> None:
        seen.append(json.loads(Path("runs/verify.json").read_text()))
        with Progress(4, "verify", unit="sequence") as line:
            line.add(3, loss="1.0")
            seen.append(json.loads(Path("runs/verify.json").read_text()))

    run("verify", main)
    with pytest.raises(ValueError, match="defect"):
        run("verify", failing(ValueError("defect")))
    assert capsys.readouterr().err == ""  # no terminal, no line
    assert [record["outcome"] for record in seen] == ["running", "running"]
    assert seen[0]["params_sha256"] == hashlib.sha256(b"a: 1").hexdigest()
    progress = seen[1]["progress"]
    assert (progress["done"], progress["total"], progress["unit"]) == (3, 4, "sequence")
    assert progress["left_s"] == pytest.approx(1 / progress["per_s"], rel=0.1, abs=0.1)
    lines = [json.loads(line) for line in Path("runs/log.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["done", "crashed"]
    assert [line["error"] for line in lines] == [None, "ValueError: defect"]
    for key in ("started", "ended", "duration_s", "host", "device", "python", "pid"):
        assert lines[0][key] is not None


def test_a_terminal_sees_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", screen)
    with Progress(4, "capture", unit="part") as line:
        line.add(2)
        time.sleep(0.12)
        line.add(1)
    assert re.search(r"capture: +75%.*3/4 \[00:00<00:00, +[\d.]+part/s", screen.getvalue())


def test_a_run_is_recorded_with_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stage", "lm-kl-0"])
    run("train", lambda: None)
    record = json.loads(Path("runs/train-lm-kl-0.json").read_text())
    assert record["outcome"] == "done"
    assert record["packages"]["numpy"]
