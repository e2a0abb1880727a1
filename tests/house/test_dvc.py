"""dvc.yaml tells the truth: code is import closures, params whole sections, cells as in params."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.closure import BY_NAME, PLUMBING, closures, digests, stage_names
from pipeline.config import read_params
from tests.house.closure import body, expected, load_yaml

STAGES: dict[str, Any] = load_yaml(Path("dvc.yaml"))[0]["stages"]
BLOCK = {"warmup": "starts", "train": "arms", "evaluate": "starts", "export": "exports"}
CLOSURES = closures()


def test_check_depends_on_every_file_that_a_stage_imports() -> None:
    """So that `checked/code/` is never older than the code; `make deps` writes the list."""
    assert sorted(STAGES["check"]["deps"]) == expected(), "run `make deps`"


@pytest.mark.parametrize("name", sorted(set(STAGES) - {"check"}))
def test_a_stage_depends_on_its_own_code_and_on_good_parameters(name: str) -> None:
    deps = body(STAGES[name])["deps"]
    assert "checked/params.json" in deps
    assert [d for d in deps if d.startswith("checked/code/")] == [f"checked/code/{name}.json"]
    for folder in BY_NAME.get(name, ()):
        assert [d for d in deps if re.match(rf"pipeline/{folder}/.*\.py", d)], folder


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_closure_holds_all_that_its_files_import(name: str) -> None:
    """An edit that can change what a stage writes changes the digest file that it depends on."""
    held = set(CLOSURES[name])
    assert f"stages/{name}.py" in held
    for file in held:
        for module in imports(Path(file)):
            path = str(Path(*module.split(".")).with_suffix(".py"))
            assert path in held or module in PLUMBING or not Path(path).is_file(), (file, module)


def test_a_closure_holds_no_draft_or_loss_of_a_cell() -> None:
    """A new loss retrains nothing else."""
    for name in ("train", "evaluate", "export"):
        assert not [f for f in CLOSURES[name] if re.match(r"pipeline/(drafts|losses|exports)/", f)]


def test_an_edit_changes_the_digest_of_its_file_alone(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "b.py").write_text("x = 1")
    before = digests(["a.py", "b.py"], tmp_path)
    (tmp_path / "a.py").write_text("x = 1  # a comment")
    after = digests(["a.py", "b.py"], tmp_path)
    assert before["b.py"] == after["b.py"]
    assert before["a.py"] != after["a.py"]


def imports(path: Path) -> set[str]:
    """Our own modules that a file imports anywhere, inside functions too; not for types alone."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {m for m in found if m.split(".")[0] in ("stages", "pipeline", "storage")}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs_its_own_module(name: str) -> None:
    cell = " ${key}" if "foreach" in STAGES[name] else ""
    assert body(STAGES[name])["cmd"] == "${python} -m stages." + name + cell


@pytest.mark.parametrize("name", sorted(set(STAGES) - {"check"}))
def test_a_stage_lists_its_whole_section(name: str) -> None:
    params = body(STAGES[name])["params"]
    assert params[0] == name
    assert not any(str(p).split(".")[0] == "cluster" for p in params)


def test_check_lists_every_section_but_cluster() -> None:
    assert sorted(STAGES["check"]["params"]) == sorted(set(read_params()) - {"cluster"})


def test_every_stage_has_a_module_a_section_and_a_test() -> None:
    tests = {p.stem.removeprefix("test_") for p in Path("tests/stages").glob("test_*.py")}
    sections = set(read_params())
    assert set(STAGES) == set(stage_names())
    assert set(STAGES) <= tests
    assert set(STAGES) - {"check"} <= sections


def test_the_lock_records_exactly_the_cells_of_dvc_yaml() -> None:
    """`dvc.lock` is the record of the last default run; its digests are that machine's."""
    lock = load_yaml(Path("dvc.lock"))[0]
    params = read_params()
    cells = set()
    for name, stage in STAGES.items():
        keys = params[BLOCK[name]] if "foreach" in stage else [None]
        cells |= {name if key is None else f"{name}@{key}" for key in keys}
    assert set(lock["stages"]) == cells


def test_found_by_name_means_every_cell_names_its_own_file() -> None:
    """A new loss retrains nothing else: `train` names its loss by template, never a folder."""
    deps = STAGES["train"]["do"]["deps"]
    assert "pipeline/losses/${item.loss}.py" in deps
    assert "pipeline/drafts/${item.kind}.py" in deps
    assert not [d for d in deps if re.fullmatch(r"pipeline/(losses|drafts)(/\w+\.py)?", d)]
