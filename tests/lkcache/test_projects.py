"""`init`, `use`, `matrix`, `estimate`: parameter files and projects, without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from lkcache.init import init
from lkcache.matrix import matrix
from lkcache.presets import changes, compose, dump, write_cells, yaml
from lkcache.use import use
from pipeline.check import check_params
from pipeline.config import read_params
from storage.errors import ConfigError, WorkspaceError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    init(tmp_path / "project", "smoke")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def test_init_lays_out_what_dvc_needs(project: Path) -> None:
    for name in ("dvc.yaml", "params.yaml", "stages/check.py", "storage", "presets", ".dvc/config"):
        assert (project / name).exists(), name
    assert not list(project.rglob("__pycache__"))
    check_params(read_params(project / "params.yaml"))


def test_init_refuses_a_folder_with_files_in_it(project: Path) -> None:
    with pytest.raises(WorkspaceError, match="is not empty; expected a new or an empty folder"):
        init(project)


def test_use_says_what_changed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use("embedded")
    said = capsys.readouterr().out
    steps = read_params(project / "params.yaml")["train"]["steps"]
    assert f"train.steps: 20 -> {steps}" in said
    assert (project / "params.yaml").read_bytes() == Path("presets/embedded.yaml").read_bytes()


@pytest.mark.parametrize("preset", ["ablation", "smoke", "first-try"])
def test_one_blank_line_stands_before_a_section(project: Path, preset: str) -> None:
    use(preset)
    matrix(["lm:0:kl"] if preset != "first-try" else ["medusa:0:kl"])
    for written in (compose(project / "presets", preset), yaml().load(Path("params.yaml"))):
        dump(written, Path("params.yaml"))
        text = Path("params.yaml").read_text(encoding="utf-8")
        assert "\n\n\n" not in text
        assert all(f"\n\n{block}:" in text for block in ("starts", "arms", "exports"))


def test_a_blank_line_that_went_with_a_cell_is_written_again(project: Path) -> None:
    path = project / "params.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("\n\narms:", "\narms:").replace("\n\nexports:", "\nexports:"))
    matrix(["lm:0:kl"])
    text = path.read_text(encoding="utf-8")
    assert all(f"\n\n{block}:" in text for block in ("starts", "arms", "exports"))


def test_an_unknown_preset_lists_those_there_are(project: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"preset 'tiny'; expected one of .*embedded, .*full, .*smoke"
    ):
        compose(project / "presets", "tiny")


def test_matrix_writes_cells_that_check_accepts(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix(["lm:0,4:kl,tv", "medusa:1:kl"])
    params = read_params(project / "params.yaml")
    check_params(params)
    assert list(params["starts"]) == ["lm-0", "lm-4", "medusa-1"]
    assert params["arms"]["lm-tv-4"]["start"] == "lm-4"
    assert params["exports"] == {}
    assert "export of lm-lk_lambda-0 was dropped" in capsys.readouterr().out


def test_an_arm_keeps_its_several_formats(project: Path) -> None:
    params = yaml().load(Path("params.yaml"))
    lists = {"eagle3": {"seeds": [0], "objectives": ["kl"]}}
    write_cells(params, lists, {"eagle3-kl-0": ["speculators", "sglang"]})
    dump(params, Path("params.yaml"))
    keys = ["eagle3-kl-0", "eagle3-kl-0-sglang"]
    assert list(read_params()["exports"]) == keys
    matrix(["eagle3:0:kl,tv"])
    params = read_params()
    check_params(params)
    assert [cell["format"] for cell in params["exports"].values()] == ["speculators", "sglang"]
    assert list(params["exports"]) == keys


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("lm:0", "row 'lm:0'; expected DRAFT:SEEDS:OBJECTIVES"),
        ("lm:x:kl", "row 'lm:x:kl'; expected DRAFT:SEEDS:OBJECTIVES"),
        ("gru:0:kl", "'gru' is not in `drafts`"),
        ("lm:0:hinge", "'hinge' is not in `losses`"),
    ],
)
def test_a_bad_row_is_refused(project: Path, row: str, sentence: str) -> None:
    before = (project / "params.yaml").read_bytes()
    with pytest.raises(ConfigError, match=sentence):
        matrix([row])
    assert (project / "params.yaml").read_bytes() == before


def test_use_says_what_a_preset_leaves_to_its_user(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use("first-try")
    said = capsys.readouterr().out
    assert "set target.revision to the commit of Qwen/Qwen3-0.6B, 40 hex digits" in said
    assert "put your prompts into prompts.jsonl, which prepare.source names" in said
    assert sorted(read_params()["drafts"]) == ["eagle3", "medusa"]
    use("smoke")
    assert "before `dvc repro`" not in capsys.readouterr().out


def test_changes_tell_absent_from_null() -> None:
    assert changes({"a": None, "b": 1}, {"a": 2, "c": {"d": 3}}) == [
        "a: None -> 2",
        "b: 1 -> absent",
        "c: absent -> {'d': 3}",
    ]


def test_the_verbs_run_without_torch(project: Path) -> None:
    """A cache and a project open on a machine that has no torch."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None;"
        "from lkcache.estimate import estimate; from lkcache.use import use;"
        "use('full'); sys.exit(estimate())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "assumed" in done.stdout
