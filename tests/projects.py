"""Finished projects under real DVC on the smoke preset, and what end-to-end tests do with them.

A project is run from scratch once a session: whoever comes first makes it, other workers of xdist
wait. Each test file works on a project of its own, because its tests change it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from lkcache.presets import yaml

BIN = Path(sys.executable).parent


def run(*command: str, cwd: Path, ok: bool = True) -> str:
    """Run a command of the environment in a project; its output, both streams together."""
    env = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@example.org",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@example.org",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        command, cwd=cwd, env=env, text=True, check=False, stdout=-1, stderr=subprocess.STDOUT
    )
    assert (done.returncode == 0) == ok, f"{' '.join(command)}\n{done.stdout[-6000:]}"
    return done.stdout


def ran(output: str) -> set[str]:
    """The stages that a repro really ran."""
    return set(re.findall(r"Running stage '([^']+)'", output))


def changed(project: Path) -> set[str]:
    """The stages that DVC holds to be changed by themselves (not through another's outs)."""
    status: dict[str, Any] = json.loads(run("dvc", "status", "--json", cwd=project))
    direct = set()
    for stage, findings in status.items():
        for finding in findings:
            deps = finding.get("changed deps", {}) if isinstance(finding, dict) else {}
            if any(not name.startswith(OUTPUTS) for name in deps):
                direct.add(stage.removeprefix("dvc.yaml:"))
    return direct


OUTPUTS = (
    *("checked", "data", "target", "sequences", "cache", "warmup/", "drafts/", "results"),
    *("metrics/", "timings", "report/"),
)


@contextmanager
def edited(path: Path, old: str, new: str) -> Iterator[None]:
    """A file with one text replaced, for a while."""
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path} does not hold {old!r}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def lay_out(folder: Path, *, workers: int) -> Path:
    run("lkcache", "init", str(folder), "--preset", "smoke", cwd=folder.parent)
    params = yaml().load(folder / "params.yaml")
    params["cluster"]["workers"] = workers
    yaml().dump(params, folder / "params.yaml")
    return folder


def finished(tmp_path_factory: pytest.TempPathFactory, *, workers: int) -> Path:
    """A finished smoke run under git, made once for all xdist workers of this session."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = shared / f"e2e-{workers}", shared / f"e2e-{workers}.done"
    with FileLock(shared / f"e2e-{workers}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            lay_out(folder, workers=workers)
            run("git", "init", "-q", cwd=folder)
            run("dvc", "config", "core.no_scm", "false", cwd=folder)
            run("dvc", "repro", cwd=folder)
            run("git", "add", "-A", cwd=folder)
            run("git", "commit", "-qm", "smoke", cwd=folder)
            shutil.copyfile(folder / "dvc.lock", done)
    return folder


def digests(project: Path) -> dict[str, str]:
    """Every out of the first run's lock with its digest, times and what shows them left out."""
    lock = yaml().load(project.with_name(f"{project.name}.done"))
    return {
        out["path"]: out["md5"]
        for stage in lock["stages"].values()
        for out in stage["outs"]
        if not out["path"].startswith("timings/") and out["path"] != "report"
    }
