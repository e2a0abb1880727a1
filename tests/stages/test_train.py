"""The training stage: arms of one start differ by their loss alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint import load_draft
from pipeline.interface import Shape
from pipeline.target import read_interface
from stages import train, warmup
from storage.errors import ConfigError, DraftError
from storage.workspace import tree_digest
from tests.caches import D, V
from tests.stages.training import PARAMS, edit, project, stage


def out(key: str) -> Path:
    draft, objective, seed = key.split("-")
    return Path("drafts", f"{draft}-{seed}", objective)


@pytest.fixture
def warmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project(tmp_path, monkeypatch)
    stage(warmup, "lm-0", monkeypatch)
    return tmp_path


def test_an_arm_writes_its_draft_curve_metrics_and_time(
    warmed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(train, "lm-lk-0", monkeypatch)
    config = json.loads((out("lm-lk-0") / "model" / "config.json").read_text())
    assert (config["objective"], config["loss"], config["seed"]) == ("lk", "lk_lambda", 0)
    metrics = json.loads((out("lm-lk-0") / "metrics.json").read_text())
    assert metrics["steps"] == 4
    assert set(metrics) >= {
        "train_loss", "train_kl", "train_alpha", "heldout_kl", "heldout_alpha", "supervised",
        "uncovered", "tokens", "parameters",
    }  # fmt: skip
    lines = (out("lm-lk-0") / "curve.csv").read_text().splitlines()
    assert len(lines) > 2
    assert Path("timings", "train-lm-lk-0.json").is_file()


def test_arms_of_a_start_share_weights_and_data_and_differ_by_their_loss(
    warmed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("lm-kl-0", "lm-tv-0"):
        stage(train, key, monkeypatch)
    kl, tv = (
        (out(key) / "curve.csv").read_text().splitlines()[1].split(",")
        for key in ("lm-kl-0", "lm-tv-0")
    )
    assert kl[0] == tv[0]
    assert kl[4] == tv[4]  # rate
    assert kl[1] != tv[1]  # loss
    weights = [
        (out(k) / "model" / "model.safetensors").read_bytes() for k in ("lm-kl-0", "lm-tv-0")
    ]
    assert weights[0] != weights[1]


def test_no_steps_leave_the_starts_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path, monkeypatch, params=edit(PARAMS, train={"steps": 0}))
    stage(warmup, "lm-0", monkeypatch)
    stage(train, "lm-tv-0", monkeypatch)
    start = Path("warmup", "lm-0", "model", "model.safetensors").read_bytes()
    assert (out("lm-tv-0") / "model" / "model.safetensors").read_bytes() == start


@pytest.mark.parametrize("kind", ["lm", "medusa", "eagle3"])
def test_two_runs_give_the_same_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for name in ("one", "two"):
        project(tmp_path / name, monkeypatch)
        stage(warmup, f"{kind}-0", monkeypatch)
        stage(train, f"{kind}-lk-0", monkeypatch)
        digests.append(tree_digest(Path("drafts")))
    assert digests[0] == digests[1]
    loaded = load_draft(out(f"{kind}-lk-0") / "model", read_interface(Path("target")), Shape(V, D))
    assert type(loaded).__module__ == f"pipeline.drafts.{kind}"


# the stage itself, saving after every step, killed at its fourth
KILLED = """
import os, signal
from pipeline import resume, train
from stages import train as stage
resume.EVERY_S, resume.SHARE, rate = 0.0, 0, train.learning_rate

def dies(step, **course):
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(step, **course)

train.learning_rate = dies
stage.main()
"""


def test_a_killed_stage_goes_on_to_the_bytes_of_an_unbroken_one(
    warmed: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    stage(train, "lm-lk-0", monkeypatch)
    unbroken = tree_digest(Path("drafts"))
    Path("drafts").rename("elsewhere")  # as DVC does before it runs a stage again
    env = {**os.environ, "PYTHONPATH": str(request.config.rootpath)}
    code = [sys.executable, "-c", KILLED, "lm-lk-0"]
    died = subprocess.run(code, env=env, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    (state,) = Path(".scratch").glob("train-lm-lk-0/*/drafts/lm-0/lk/resume/resume.json")
    assert json.loads(state.read_text())["loop"]["step"] == 3
    assert not Path("drafts").exists()
    stage(train, "lm-lk-0", monkeypatch)
    assert tree_digest(Path("drafts")) == unbroken
    assert not state.exists()


def test_torchrun_trains_an_arm_on_two_ranks_and_one_writes(
    warmed: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    stage(train, "lm-lk-0", monkeypatch)
    alone = load_file(out("lm-lk-0") / "model" / "model.safetensors")
    project(warmed / "two", monkeypatch, params=edit(PARAMS, train={"ranks": 2}))
    Path("warmup").symlink_to(warmed / "warmup")
    env = {**os.environ, "PYTHONPATH": str(request.config.rootpath)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "stages.train", "lm-lk-0"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    both = load_file(out("lm-lk-0") / "model" / "model.safetensors")
    for name, weight in alone.items():
        # the order of float32 sums, four steps of AdamW later
        torch.testing.assert_close(both[name], weight, rtol=1e-4, atol=1e-5)
    record = json.loads(Path("runs", "train-lm-lk-0.json").read_text())
    assert record["outcome"] == "done"


def test_a_start_that_was_not_warmed_up_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(tmp_path, monkeypatch)
    with pytest.raises(DraftError, match=r"no draft in warmup/lm-0/model; .* run dvc repro"):
        stage(train, "lm-tv-0", monkeypatch)
    assert not Path("drafts").exists()


def test_a_start_of_other_parameters_is_refused(
    warmed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = {**PARAMS["drafts"]["lm"], "hidden_size": 16}
    project(warmed / "other", monkeypatch, params=edit(PARAMS, drafts={"lm": lm}))
    Path("warmup").symlink_to(warmed / "warmup")
    with pytest.raises(DraftError, match=r"the draft's section .*; expected .*'hidden_size': 16"):
        stage(train, "lm-tv-0", monkeypatch)


def test_a_loss_that_does_not_exist_is_refused(
    warmed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = {**PARAMS["arms"]["lm-tv-0"], "loss": "nll"}
    project(warmed / "other", monkeypatch, params=edit(PARAMS, arms={"lm-tv-0": arm}))
    with pytest.raises(ConfigError, match=r"loss 'nll'; expected one of e2e_tv, jsd, kl, "):
        stage(train, "lm-tv-0", monkeypatch)


def test_a_training_process_imports_nothing_slow() -> None:
    # each would cost every one of dozens of cells 0.5 to 3 s before its first step
    code = (
        "import sys, stages.train, stages.warmup, pipeline.drafts.lm, pipeline.drafts.eagle3;"
        "print([m for m in ('transformers', 'scipy', 'dask', 'distributed', 'torch._dynamo', "
        "'sympy', 'pandas', 'altair') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_loss_of_whole_laws_is_refused_on_a_truncated_cache_before_training(
    warmed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = {**PARAMS["arms"]["lm-tv-0"], "objective": "rkl", "loss": "reverse_kl"}
    params = edit(PARAMS, arms={"lm-rkl-0": arm}, losses={"rkl": {"kind": "reverse_kl"}})
    project(warmed / "other", monkeypatch, params=params)
    with pytest.raises(ConfigError, match=r"objective rkl \(loss reverse_kl\) on a cache of mode"):
        stage(train, "lm-rkl-0", monkeypatch)
