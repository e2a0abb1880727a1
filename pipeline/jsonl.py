"""Objects of a data file as it is distributed: JSON lines, one JSON array, gzip of both, parquet.

    for line in read_lines(path, parameter="prepare.source"):
        text = line.text("prompt")                  # or DataError "<file>, line 3 has prompt 7; …"

What a file is shows in its first bytes, not in its name. Every fault is named by file and line (a
row of parquet). Nothing is skipped but empty lines. Knows no layout: `pipeline.layouts` does.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import DataError

GZIP, PARQUET, ARRAY, BOM = b"\x1f\x8b", b"PAR1", b"[", b"\xef\xbb\xbf"
SHOWN_CHARACTERS = 80
PARQUET_ROWS = 1024  # decoded at a time


@dataclass(frozen=True)
class Line:
    """One object of the file and where it stands."""

    path: Path
    number: int
    value: dict[str, Any]
    unit: str = "line"
    ordinal: int | None = None
    """Of an array's rows, which may share a line: 1 for the first."""

    @property
    def key(self) -> int:
        """A number that no other row of the file has."""
        return self.number if self.ordinal is None else self.ordinal

    def fault(self, found: str, expected: str) -> DataError:
        """`<file>, line <n> <found>; expected <expected>; mend or remove the line.`"""
        return fault(self.path, self.number, found=found, expected=expected, unit=self.unit)

    def text(self, name: str, value: Any = None) -> str | None:
        """A field (or `value`, found under that name) that is text and not blank; None if absent.

        Half a surrogate pair is JSON, but no text: no tokenizer and no table takes it.
        """
        field = self.value.get(name) if value is None else value
        if field is None:
            return None
        if not isinstance(field, str) or not field.strip():
            raise self.fault(f"has {name} {shown(field)}", "text that is not blank")
        try:
            field.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.fault(
                f"has {name} with half a surrogate pair at character {error.start}", "Unicode text"
            ) from None
        return field

    def label(self, name: str) -> str | None:
        """As `text`; a whole number is a name too."""
        field = self.value.get(name)
        whole = isinstance(field, int) and not isinstance(field, bool)
        return str(field) if whole else self.text(name)


def read_lines(path: Path, *, parameter: str) -> Iterator[Line]:
    """All objects, one at a time; `DataError` for no file, no row, not UTF-8, not JSON, no object.

    `parameter` is what names the file in `params.yaml`.
    """
    if not path.is_file():
        raise DataError(
            found=f"no file {path}",
            expected=f"the JSON-lines file that {parameter} names",
            todo=f"correct {parameter} in params.yaml, relative to the project's root",
        )
    line = None
    for line in _lines(path):
        yield line
    if line is None:
        raise DataError(
            found=f"{path} is empty", expected="at least one row", todo=f"correct {parameter}"
        )


def fault(path: Path, number: int, *, found: str, expected: str, unit: str = "line") -> DataError:
    """A `DataError` that names the file and the line."""
    return DataError(
        found=f"{path}, {unit} {number} {found}",
        expected=expected,
        todo=f"mend or remove the {unit}",
    )


def shown(value: Any) -> str:
    """A value as a sentence can hold it."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _lines(path: Path) -> Iterator[Line]:
    with path.open("rb") as file:
        head = file.read(len(PARQUET))
    if head == PARQUET:
        yield from _parquet(path)
        return
    raw = enumerate(_raw(path, packed=head.startswith(GZIP)), start=1)
    begun = False
    for number, data in raw:
        text = data.removeprefix(BOM) if number == 1 else data
        if not text.strip():
            continue
        if not begun and text.lstrip().startswith(ARRAY):
            yield from _array(path, number, b"".join([text, *(more for _, more in raw)]))
            return
        begun = True
        yield _object(path, number, _parsed(path, number, _decoded(path, number, text)))


def _raw(path: Path, *, packed: bool) -> Iterator[bytes]:
    """The lines of a file or of what its gzip stream holds."""
    whole = 0
    with gzip.open(path, "rb") if packed else path.open("rb") as file:
        try:
            for data in file:
                yield data
                whole += 1
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            problem = "ends early" if isinstance(error, EOFError) else f"is damaged ({error})"
            raise fault(
                path,
                whole + 1,
                found=f"cannot be read: its gzip stream {problem}",
                expected="a whole gzip file",
            ) from None


def _decoded(path: Path, number: int, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        # of an array the number is that of its first line
        number += data.count(b"\n", 0, error.start)
        start = error.start - (data.rfind(b"\n", 0, error.start) + 1)
        raise fault(
            path, number, found=f"is not UTF-8 at byte {start}", expected="UTF-8 text"
        ) from None


def _parsed(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(path, number, error, "one JSON object a line") from None


def _not_json(path: Path, number: int, error: Exception, expected: str) -> DataError:
    problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return fault(path, number, found=f"is not JSON ({problem})", expected=expected)


def _object(path: Path, number: int, value: Any, unit: str = "line") -> Line:
    if not isinstance(value, dict):
        raise fault(
            path,
            number,
            found=f"holds a {type(value).__name__}",
            expected="one JSON object a line",
            unit=unit,
        )
    return Line(path, number, value, unit)


def _array(path: Path, first: int, data: bytes) -> Iterator[Line]:
    """The objects of one array, decoded one by one, each with the line on which it begins."""
    expected = "one array of JSON objects"
    text = _decoded(path, first, data)
    decoder, number, at = json.JSONDecoder(), first, text.index("[") + 1

    def skip(at: int) -> int:
        while at < len(text) and text[at].isspace():
            at += 1
        return at

    counted = ordinal = 0
    while True:
        at = skip(at)
        number, counted = number + text.count("\n", counted, at), at
        if text.startswith("]", at):
            break
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                number += text.count("\n", counted, error.pos)
            raise _not_json(path, number, error, expected) from None
        ordinal += 1
        yield replace(_object(path, number, value), ordinal=ordinal)
        at = skip(at)
        number, counted = number + text.count("\n", counted, at), at
        if not text.startswith((",", "]"), at):
            problem = "is not closed" if at == len(text) else f"has {shown(text[at])} after a row"
            raise fault(
                path, number, found=f"belongs to an array that {problem}", expected=expected
            )
        at += text.startswith(",", at)
    end = skip(at + 1)
    if end < len(text):
        number += text.count("\n", counted, end)
        raise fault(path, number, found="goes on after the array's end", expected=expected)


def _parquet(path: Path) -> Iterator[Line]:
    """The rows of a parquet file as objects; a null is an absent field."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    value = {name: field for name, field in row.items() if field is not None}
                    yield Line(path, number, value, unit="row")
    except (pa.ArrowException, OSError) as error:
        problem = " ".join(str(error).split())[:SHOWN_CHARACTERS]
        raise fault(
            path,
            number + 1,
            found=f"cannot be read as parquet ({problem})",
            expected="a whole parquet file",
            unit="row",
        ) from None
