"""No bad parameter costs an output, and no number of workers changes one: whole runs under DVC."""

import sys
from pathlib import Path

import pytest

from pipeline.config import read_params
from tests.projects import digests, edited, finished, run


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made with one worker."""
    return finished(tmp_path_factory, workers=1)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made with two workers; read only."""
    return finished(tmp_path_factory, workers=2)


BREAKS = [
    ("prepare", "heldout_fraction: 0.1", "heldout_fraction: 1.5"),
    ("target", "steps: 80", "steps: eighty"),
    ("generate", "max_new_tokens: 32", "max_new_token: 32"),
    ("capture", "mode: topk", "mode: top"),
    ("verify", "max_tv: 2.0e-3", "max_tv: -1"),
    ("warmup", "loss: kl", "loss: tv"),
    ("train", "steps: 20", "steps: -20"),
    ("evaluate", "laws: [T=0, T=1]", "laws: [T=0, T=-1]"),
    ("report", "baseline: kl", "baseline: ce"),
    ("export", "dtype: float32", "dtype: float7"),
    ("cluster", "workers: 1", "workers: 0"),
    ("drafts", "kind: eagle3", "kind: eagle9"),
    ("losses", "kind: lk_lambda, eta: 10.0", "kind: lk_gamma, eta: 10.0"),
    ("starts", "lm-0: {draft: lm,", "lm-0: {draft: ml,"),
    ("arms", "objective: lk_lambda, loss: lk_lambda", "objective: lk_delta, loss: lk_lambda"),
    ("exports", "format: transformers", "format: onnx"),
]


def test_one_worker_and_two_give_the_same_bytes(other: Path, project: Path) -> None:
    """Two runs from scratch: every out of every stage is equal byte for byte."""
    first, second = digests(project), digests(other)
    assert first == second
    assert len(first) > 20


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


def test_a_broken_cluster_section_is_found_with_any_other_change(other: Path) -> None:
    """`cluster` is no parameter of DVC, yet a run that something else starts refuses it first."""
    with (
        edited(other / "params.yaml", "workers: 1", "workers: 0"),
        edited(other / "params.yaml", "min_prob: 5.0e-4", "min_prob: 1.0e-3"),
    ):
        output = run("dvc", "repro", cwd=other, ok=False)
    assert "cluster.workers" in output
    assert (other / "cache" / "train.zarr").is_dir()
