"""The whole pipeline under real DVC, on the smoke preset, in projects of its own.

One project is run from scratch with two workers, a second with one, side by side: the tests of an
xdist group share a project, and one test compares the two. Whoever comes first makes a project, the
other waits for it.
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
from pipeline.config import read_params

BIN = Path(sys.executable).parent
MENDABLE = 2


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


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made with two workers."""
    return finished(tmp_path_factory, workers=2)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made with one worker."""
    return finished(tmp_path_factory, workers=1)


of_project = pytest.mark.xdist_group("end-to-end, two workers")
of_other = pytest.mark.xdist_group("end-to-end, one worker")


def digests(project: Path) -> dict[str, str]:
    """Every out of the first run's lock with its digest, times and what shows them left out."""
    lock = yaml().load(project.with_name(f"{project.name}.done"))
    return {
        out["path"]: out["md5"]
        for stage in lock["stages"].values()
        for out in stage["outs"]
        if not out["path"].startswith("timings/") and out["path"] != "report"
    }


@of_project
def test_every_stage_left_its_outs(project: Path) -> None:
    assert (project / "report" / "index.html").is_file()
    assert (project / "target" / "target.json").is_file()
    assert (project / "export" / "lm-lk_lambda-0" / "transformers" / "model.safetensors").is_file()
    for split in ("train", "heldout", "greedy"):
        assert (project / "cache" / f"{split}.zarr").is_dir()
    assert 'class="interval"' in (project / "report" / "index.html").read_text(encoding="utf-8")


@of_project
def test_a_second_repro_runs_nothing(project: Path) -> None:
    assert ran(run("dvc", "repro", cwd=project)) == set()


@of_other
def test_one_worker_and_two_give_the_same_bytes(project: Path, other: Path) -> None:
    """Two runs from scratch: every out of every stage is equal byte for byte."""
    first, second = digests(project), digests(other)
    assert first == second
    assert len(first) > 20


@of_project
def test_a_comment_in_a_loss_reruns_its_arms_and_what_follows(project: Path) -> None:
    params = read_params(project / "params.yaml")
    arms = {f"train@{a}" for a, arm in params["arms"].items() if arm["loss"] == "lk_lambda"}
    loss = project / "pipeline" / "losses" / "lk_lambda.py"
    with edited(loss, '"""', '# a comment\n"""'):
        output = run("dvc", "repro", cwd=project)
    # equal weights: evaluation does not follow; the report shows the new times
    assert ran(output) == arms | {"report"}
    run("dvc", "repro", cwd=project)


@of_project
@pytest.mark.parametrize(
    ("old", "new", "stages"),
    [
        ("min_prob: 5.0e-4", "min_prob: 1.0e-3", {"check", "capture"}),
        ("workers: 2", "workers: 1", set()),
        ("confidence: 0.95", "confidence: 0.9", {"check", "report"}),
        ("eta: 10.0", "eta: 9.0", {"check", "train@medusa-lk_lambda_eta10-0"}),
    ],
)
def test_a_parameter_concerns_the_stages_that_read_it(
    project: Path, old: str, new: str, stages: set[str]
) -> None:
    with edited(project / "params.yaml", old, new):
        assert changed(project) == stages


@of_project
def test_the_learning_rate_concerns_training_alone(project: Path) -> None:
    text = (project / "params.yaml").read_text(encoding="utf-8")
    train = text[text.index("\ntrain:") :]
    with edited(project / "params.yaml", train, train.replace("lr: 3.0e-3", "lr: 2.0e-3", 1)):
        found = changed(project)
    arms = read_params(project / "params.yaml")["arms"]
    assert found == {"check"} | {f"train@{arm}" for arm in arms}


BREAKS = [
    ("prepare", "heldout_fraction: 0.1", "heldout_fraction: 1.5"),
    ("target", "steps: 80", "steps: eighty"),
    ("generate", "max_new_tokens: 32", "max_new_token: 32"),
    ("capture", "mode: topk", "mode: top"),
    ("verify", "max_tv: 2.0e-3", "max_tv: -1"),
    ("warmup", "loss: kl", "loss: tv"),
    ("train", "steps: 20", "steps: -20"),
    ("evaluate", "temperatures: [0, 1]", "temperatures: [0, -1]"),
    ("report", "baseline: kl", "baseline: ce"),
    ("export", "dtype: float32", "dtype: float7"),
    ("cluster", "workers: 1", "workers: 0"),
    ("drafts", "kind: eagle3", "kind: eagle9"),
    ("losses", "kind: lk_lambda, eta: 10.0", "kind: lk_gamma, eta: 10.0"),
    ("starts", "lm-0: {draft: lm,", "lm-0: {draft: ml,"),
    ("arms", "objective: lk_lambda, loss: lk_lambda", "objective: lk_delta, loss: lk_lambda"),
    ("exports", "format: transformers", "format: onnx"),
]


@of_other
@pytest.mark.parametrize(("section", "old", "new"), BREAKS, ids=[row[0] for row in BREAKS])
def test_a_bad_parameter_costs_no_out(other: Path, section: str, old: str, new: str) -> None:
    """`check` refuses it in one sentence before any stage loses its outs."""
    before = {p: p.stat().st_mtime_ns for p in other.glob("[!.]*/**/*") if p.is_file()}
    before = {p: t for p, t in before.items() if "runs" not in p.parts}
    assert section in read_params(other / "params.yaml")
    with edited(other / "params.yaml", old, new):
        # DVC itself resolves ${...} of cells; a change under `cluster` alone runs nothing
        if section == "cluster":
            command = [sys.executable, "-m", "stages.check"]
        else:
            command = ["dvc", "repro"]
        output = run(*command, cwd=other, ok=False)
    assert "expected" in output
    assert "Traceback" not in output
    for path, changed_ns in before.items():
        assert path.exists(), f"{path} was lost"
        assert path.stat().st_mtime_ns == changed_ns, f"{path} was rewritten"


@of_other
def test_a_broken_cluster_section_is_found_with_any_other_change(other: Path) -> None:
    """`cluster` is no parameter of DVC, yet a run that something else starts refuses it first."""
    with (
        edited(other / "params.yaml", "workers: 1", "workers: 0"),
        edited(other / "params.yaml", "min_prob: 5.0e-4", "min_prob: 1.0e-3"),
    ):
        output = run("dvc", "repro", cwd=other, ok=False)
    assert "cluster.workers" in output
    assert (other / "cache" / "train.zarr").is_dir()


@of_project
def test_dvc_commands_work_on_the_project(project: Path) -> None:
    run("dvc", "repro", "-s", "train@lm-kl-0", cwd=project)
    assert "train@lm-kl-0" in run("dvc", "dag", cwd=project)
    assert "report" in run("dvc", "metrics", "show", cwd=project)
    run("dvc", "exp", "run", "-S", "train.lr=2e-3", "-s", "train@lm-kl-0", cwd=project)
    assert "train.lr" in run("dvc", "params", "diff", cwd=project)
    assert "heldout_alpha" in run("dvc", "metrics", "diff", cwd=project)
    assert "index.html" in run("dvc", "plots", "show", cwd=project)
    assert "index.html" in run("dvc", "plots", "diff", cwd=project)
    run("git", "checkout", "-q", "--", ".", cwd=project)
    run("dvc", "checkout", "-q", cwd=project)
    assert ran(run("dvc", "repro", cwd=project)) == set()


@of_project
def test_a_second_clone_pulls_from_a_local_remote(project: Path, tmp_path: Path) -> None:
    run("dvc", "remote", "add", "-d", "-f", "local", str(tmp_path / "remote"), cwd=project)
    run("git", "commit", "-qam", "remote", cwd=project)
    run("dvc", "push", "-q", cwd=project)
    clone = tmp_path / "clone"
    run("git", "clone", "-q", str(project), str(clone), cwd=tmp_path)
    run("dvc", "pull", "-q", cwd=clone)
    run("dvc", "checkout", "-q", cwd=clone)
    assert ran(run("dvc", "repro", cwd=clone)) == set()
    shutil.rmtree(clone)


@of_project
def test_inspect_shows_the_text_and_the_alternatives(project: Path) -> None:
    shown = run("lkcache", "inspect", "cache/train.zarr", "--sequence", "0", cwd=project)
    assert "source target" in shown
    assert "the target's alternatives" in shown


@of_project
def test_estimate_counts_and_measures(project: Path) -> None:
    shown = run("lkcache", "estimate", cwd=project)
    assert "counted" in shown
    assert "measured" in shown
