"""Parameters are read strictly, as DVC reads them, and every refusal says what to do."""

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from pipeline.config import Strict, load, parse, read_params
from storage.errors import ConfigError


class Section(Strict):
    steps: Annotated[int, Field(ge=1, le=9)]
    lr: float


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_number_in_short_scientific_form_is_a_number(tmp_path: Path) -> None:
    """YAML 1.2, as DVC: PyYAML would read a string."""
    path = file(tmp_path, "a: {steps: 1, lr: 1e-4}")
    assert load("a", Section, path=path).lr == 1e-4


@pytest.mark.parametrize("steps", [1, 9])
def test_bounds_are_inclusive(steps: int) -> None:
    assert parse("a", {"steps": steps, "lr": 1.0}, Section).steps == steps


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"steps": 0, "lr": 1.0}, r"a\.steps is 0; expected .*greater than or equal to 1"),
        ({"steps": 10, "lr": 1.0}, r"a\.steps is 10; expected .*less than or equal to 9"),
        ({"steps": True, "lr": 1.0}, r"a\.steps is True; expected .*integer"),
        ({"steps": "3", "lr": 1.0}, r"a\.steps is '3'; expected .*integer"),
        ({"steps": 3}, r"a\.lr is missing; expected a value.*; add a\.lr"),
        ({"steps": 3, "lr": 1.0, "x": 1}, r"a\.x is unknown; .*; remove a\.x"),
        ({"steps": 3, "x": 1, "y": 2}, r"and 2 more"),
        ({"step": 3, "lr": 1.0}, r"a\.step is unknown .*its spelling \(is it steps\?\)"),
        ({"steps": 3, "lr": float("inf")}, r"a\.lr is inf; expected .*finite"),
        ({"steps": 3, "lr": float("nan")}, r"a\.lr is nan; expected .*finite"),
        ({"steps": 10**30, "lr": 1.0}, r"a\.steps is 1e\+30; expected a whole number between"),
        ({"steps": 3, "lr": [1, {"b": -(2**64)}]}, r"a\.lr\.1\.b is -1\.84e\+19; expected"),
        (3, r"a is 3; expected"),
    ],
)
def test_refusals_name_key_finding_and_remedy(value: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse("a", value, Section)


def test_a_missing_section_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no a\.z; expected one of the keys of a: b, c"):
        load("a.z", Section, path=file(tmp_path, "a: {b: 1, c: 2}"))


def test_a_missing_file_and_a_broken_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no .*absent\.yaml .*run from the project's root"):
        read_params(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_params(file(tmp_path, "a: [1,"))
    with pytest.raises(ConfigError, match="holds list; expected a mapping"):
        read_params(file(tmp_path, "[1]"))
    with pytest.raises(ConfigError, match=r"is empty; expected a mapping.*lkcache use PRESET"):
        read_params(file(tmp_path, "# nothing\n"))
    path = tmp_path / "params.yaml"
    path.write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"is not UTF-8 \(byte 3\); .*; save .* as UTF-8"):
        read_params(path)


def test_what_editors_leave_in_a_file_is_read_or_named(tmp_path: Path) -> None:
    """A byte-order mark and CRLF are nobody's fault; tabs and doubled keys are named by line."""
    path = tmp_path / "params.yaml"
    path.write_bytes(b"\xef\xbb\xbfa:\r\n  b: 1\r\n")
    assert read_params(path) == {"a": {"b": 1}}
    with pytest.raises(ConfigError, match=r"'\\t' that cannot start any token at line 2"):
        read_params(file(tmp_path, "a:\n\tb: 1"))
    with pytest.raises(
        ConfigError, match=r'duplicate key "b" .* at line 3, [^;]*; expected'
    ) as told:
        read_params(file(tmp_path, "a:\n  b: 1\n  b: 2\n"))
    assert "suppress" not in str(told.value)


def test_values_are_the_callers_own_and_follow_the_file(tmp_path: Path) -> None:
    """A parsed file is kept, by its content: what a caller does to its copy reaches no other."""
    path = file(tmp_path, "a: {steps: 1, lr: [1.0]}")
    first = read_params(path)
    first["a"]["lr"].append(2.0)
    first["b"] = 3
    assert read_params(path) == {"a": {"steps": 1, "lr": [1.0]}}
    path.write_text("a: {steps: 2, lr: [1.0]}", encoding="utf-8")  # of the same length
    assert read_params(path)["a"]["steps"] == 2
