"""Prompts and documents from a JSON-lines file; every fault is named by file and line.

One object a line: `prompt` (used as it is) or `text` (a document that prompts are cut from), and
optionally `id`, `domain` and `response` (the data's own, for `generate.engine: none`). Further
fields are left alone. Unknown shapes are errors; nothing is skipped but empty lines.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import DataError


@dataclass(frozen=True)
class Row:
    """One line of the file."""

    id: str
    domain: str
    text: str
    is_prompt: bool
    response: str | None


def read_rows(path: Path) -> list[Row]:
    """All rows; `DataError` for no file, no row, not UTF-8, not JSON, no usable field."""
    if not path.is_file():
        raise DataError(
            found=f"no file {path}",
            expected="the JSON-lines file that prepare.source names",
            todo="correct prepare.source in params.yaml, relative to the project's root",
        )
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            row = _row(line, path, number)
            if row.id in rows:
                raise _fault(
                    path, number, found=f"repeats the id {row.id!r}", expected="ids of their own"
                )
            rows[row.id] = row
    if not rows:
        raise DataError(
            found=f"{path} is empty", expected="at least one row", todo="correct prepare.source"
        )
    return list(rows.values())


def _row(line: bytes, path: Path, number: int) -> Row:
    try:
        value: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _fault(
            path, number, found=f"is not UTF-8 at byte {error.start}", expected="UTF-8 text"
        ) from None
    except json.JSONDecodeError as error:
        raise _fault(
            path, number, found=f"is not JSON ({error.msg})", expected="one JSON object a line"
        ) from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise _fault(path, number, found=f"holds a {kind}", expected="one JSON object a line")
    fields = {}
    for name in ("prompt", "text", "id", "domain", "response"):
        field = value.get(name)
        if isinstance(field, int) and name == "id":
            field = str(field)
        if field is not None and (not isinstance(field, str) or not field.strip()):
            raise _fault(
                path, number, found=f"has {name} {field!r}", expected="text that is not blank"
            )
        fields[name] = field
    text = fields["prompt"] or fields["text"]
    if text is None or (fields["prompt"] and fields["text"]):
        found = "has both prompt and text" if text else "has neither prompt nor text"
        raise _fault(path, number, found=found, expected='{"prompt": …} or {"text": …}')
    return Row(
        id=fields["id"] or f"{path.stem}-{number}",
        domain=fields["domain"] or "all",
        text=text,
        is_prompt=fields["prompt"] is not None,
        response=fields["response"],
    )


def _fault(path: Path, number: int, *, found: str, expected: str) -> DataError:
    return DataError(
        found=f"{path}, line {number} {found}", expected=expected, todo="mend or remove the line"
    )
