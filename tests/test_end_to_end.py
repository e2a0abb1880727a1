"""The whole pipeline under real DVC: what reruns, and the commands that people use on a project."""

import shutil
from pathlib import Path

import pytest

from pipeline.config import read_params
from tests.projects import changed, edited, finished, ran, run


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made with two workers."""
    return finished(tmp_path_factory, workers=2)


def test_every_stage_left_its_outs(project: Path) -> None:
    assert (project / "report" / "index.html").is_file()
    assert (project / "target" / "target.json").is_file()
    assert (project / "export" / "lm-lk_lambda-0" / "transformers" / "model.safetensors").is_file()
    for split in ("train", "heldout", "greedy"):
        assert (project / "cache" / f"{split}.zarr").is_dir()
    assert 'class="interval"' in (project / "report" / "index.html").read_text(encoding="utf-8")


def test_a_second_repro_runs_nothing(project: Path) -> None:
    assert ran(run("dvc", "repro", cwd=project)) == set()


def test_a_comment_in_a_loss_reruns_its_arms_and_what_follows(project: Path) -> None:
    params = read_params(project / "params.yaml")
    arms = {f"train@{a}" for a, arm in params["arms"].items() if arm["loss"] == "lk_lambda"}
    loss = project / "pipeline" / "losses" / "lk_lambda.py"
    with edited(loss, '"""', '# a comment\n"""'):
        output = run("dvc", "repro", cwd=project)
    # equal weights: evaluation does not follow; the report shows the new times
    assert ran(output) == arms | {"report"}
    run("dvc", "repro", cwd=project)


@pytest.mark.parametrize(
    ("old", "new", "stages"),
    [
        ("min_prob: 5.0e-4", "min_prob: 1.0e-3", {"check", "capture"}),
        ("workers: 2", "workers: 1", set()),
        ("confidence: 0.95", "confidence: 0.9", {"check", "report"}),
        ("eta: 10.0", "eta: 9.0", {"check", "train@medusa-lk_lambda_eta10-0", "report"}),
    ],
)
def test_a_parameter_concerns_the_stages_that_read_it(
    project: Path, old: str, new: str, stages: set[str]
) -> None:
    with edited(project / "params.yaml", old, new):
        assert changed(project) == stages


def test_the_learning_rate_concerns_training_alone(project: Path) -> None:
    text = (project / "params.yaml").read_text(encoding="utf-8")
    train = text[text.index("\ntrain:") :]
    with edited(project / "params.yaml", train, train.replace("lr: 3.0e-3", "lr: 2.0e-3", 1)):
        found = changed(project)
    arms = read_params(project / "params.yaml")["arms"]
    assert found == {"check"} | {f"train@{arm}" for arm in arms}


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


def test_inspect_shows_the_text_and_the_alternatives(project: Path) -> None:
    shown = run("lkcache", "inspect", "cache/train.zarr", "--sequence", "0", cwd=project)
    assert "source target" in shown
    assert "the target's alternatives" in shown


def test_estimate_counts_and_measures(project: Path) -> None:
    shown = run("lkcache", "estimate", cwd=project)
    assert "counted" in shown
    assert "measured" in shown
