"""The house rules that tools check, so that `make test` is the whole truth."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("lkcache", "stages", "pipeline", "storage")


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "format", "--check", "."],
        ["ruff", "check", "."],
        ["mypy"],
        ["lint-imports", "--no-cache"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_tool_has_no_complaint(command: list[str]) -> None:
    tool = Path(sys.executable).parent / command[0]
    done = subprocess.run([tool, *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_package_files_hold_a_docstring_only() -> None:
    for package in PACKAGES:
        for path in Path(package).rglob("__init__.py"):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert len(body) == 1, f"{path} holds more than its docstring"
            assert isinstance(body[0], ast.Expr), path


def test_no_catch_all_module() -> None:
    banned = {"utils", "util", "common", "helpers", "misc"}
    found = [p for package in PACKAGES for p in Path(package).rglob("*.py") if p.stem in banned]
    assert not found


def test_every_module_says_what_it_is() -> None:
    for package in PACKAGES:
        for path in Path(package).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_no_pickle_and_no_remote_code() -> None:
    """No pickle is ever read, and a hub's code runs only where a parameter allows it."""
    for package in PACKAGES:
        for path in Path(package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "import pickle" not in text, path
            assert "trust_remote_code=True" not in text, path
            assert "weights_only=False" not in text, path
