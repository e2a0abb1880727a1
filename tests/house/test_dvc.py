"""dvc.yaml tells the truth: deps are import closures, params whole sections, cells as in params."""

import re
from pathlib import Path
from typing import Any

import grimp
import pytest

from pipeline.config import read_params
from tests.house.closure import BLOCK, body, expected, load_yaml

GRAPH = grimp.build_graph("lkcache", "stages", "pipeline", "storage", cache_dir=None)
STAGES: dict[str, Any] = load_yaml(Path("dvc.yaml"))[0]["stages"]


@pytest.mark.parametrize("name", STAGES)
def test_deps_are_the_import_closure(name: str) -> None:
    """An edit that can change what a stage writes makes DVC run that stage again, no other does."""
    stage = body(STAGES[name])
    code = sorted(d for d in stage["deps"] if d.endswith(".py") and "${" not in d)
    assert code == expected(GRAPH, name, stage), "run `make deps`"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs_its_own_module_and_depends_on_check(name: str) -> None:
    stage = body(STAGES[name])
    cell = " ${key}" if "foreach" in STAGES[name] else ""
    assert stage["cmd"] == "${python} -m stages." + name + cell
    assert name == "check" or "checked" in stage["deps"]


@pytest.mark.parametrize("name", sorted(set(STAGES) - {"check"}))
def test_a_stage_lists_its_whole_section(name: str) -> None:
    params = body(STAGES[name])["params"]
    assert params[0] == name
    assert not any(str(p).split(".")[0] == "cluster" for p in params)


def test_check_lists_every_section_but_cluster() -> None:
    assert sorted(STAGES["check"]["params"]) == sorted(set(read_params()) - {"cluster"})


def test_every_stage_has_a_module_a_section_and_a_test() -> None:
    modules = {p.stem for p in Path("stages").glob("[a-z]*.py")}
    tests = {p.stem.removeprefix("test_") for p in Path("tests/stages").glob("test_*.py")}
    sections = set(read_params())
    assert set(STAGES) == modules
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
