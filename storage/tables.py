"""The parquet tables that cross a stage: their schemas, one writer, one checked reader.

Knows columns, not meaning. The same rows give the same bytes: no clock, no host, one row group
size, one codec.

| table | one row is |
| --- | --- |
| `DOCUMENTS` | a document of the source, with the split it belongs to |
| `PROMPTS` | a prompt cut from a document of the same split, or given by the user |
| `CONVERSATIONS` | the messages of a prompt that is a conversation |
| `SEQUENCES` | a prompt with a response, as tokens |
| `ROUNDS` | one prompt decoded (or replayed) by one arm under one law and γ |
| `DEPTHS` | sums over one prompt's supervised anchors at one depth, by one arm and law |
| `STRATA` | the same over all prompts' anchors of one kind: by place in the response, by entropy |
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import DataError

GROUP_ROWS = 65_536
GROUP_VALUES = 1 << 22
"""16 MB of token ids, and as much of their turns."""
DOCUMENTS = pa.schema(
    [("id", pa.string()), ("domain", pa.string()), ("split", pa.string()), ("text", pa.string())]
)
PROMPTS = pa.schema(
    [
        ("id", pa.string()),
        ("domain", pa.string()),
        ("split", pa.string()),
        ("text", pa.string()),
        ("response", pa.string()),  # the data's own, where it has one (generate.train_responses)
    ]
)
CONVERSATIONS = pa.schema(
    [
        ("split", pa.string()),
        ("id", pa.string()),  # of the prompt
        ("messages", pa.string()),  # JSON: chat templates read fields that no two families share
        ("tools", pa.string()),  # JSON: schemas of the functions that the assistant may call
    ]
)
SEQUENCES = pa.schema(
    [
        ("id", pa.string()),  # of the prompt
        ("domain", pa.string()),
        ("tokens", pa.list_(pa.uint32())),
        ("turn", pa.list_(pa.int32())),  # assistant turn of each token, -1 outside
        ("law", pa.string()),  # "T=1", "T=0.7,top_p=0.9": the target's own sample; "data": not
        ("finished", pa.bool_()),  # ended by an end-of-sequence token
    ]
)
ARM = [
    ("arm", pa.string()),
    ("draft", pa.string()),
    ("kind", pa.string()),
    ("objective", pa.string()),
    ("loss", pa.string()),
    ("seed", pa.int64()),
]
ROUNDS = pa.schema(
    [
        *ARM,
        ("instrument", pa.string()),  # "replay", … (exact expectations), "decode", "decode:<set>"
        ("temperature", pa.float64()),
        (
            "law",
            pa.string(),
        ),  # as served, and how drafts were drawn: "T=0.7,top_p=0.9,drafts=greedy"
        ("gamma", pa.int64()),
        ("prompt", pa.string()),
        ("domain", pa.string()),
        ("tokens", pa.int64()),  # response tokens after the first, end-of-sequence included
        ("rounds", pa.float64()),  # target passes after the prefill; an expectation in replay
        ("drafted", pa.float64()),
        ("accepted", pa.float64()),
        ("kept", pa.list_(pa.float64())),  # [gamma] rounds whose draft of depth k was emitted
    ]
)
DEPTHS = pa.schema(
    [
        *ARM,
        ("temperature", pa.float64()),
        ("law", pa.string()),
        ("prompt", pa.string()),
        ("domain", pa.string()),
        ("depth", pa.int64()),  # k, 0 for the first drafted token
        ("anchors", pa.int64()),
        ("alpha", pa.float64()),  # sum of the unbiased estimate of alpha; T = 1 rows only
        ("alpha_lo", pa.float64()),  # sums of the certified bounds
        ("alpha_hi", pa.float64()),
        ("accept", pa.float64()),  # sum of min(1, q(x) / p(x)); at T = 0 of [argmax q = x]
        ("survive", pa.float64()),  # sum of the product of accept over depths 0 ... k
    ]
)
STRATA = pa.schema(
    [
        *ARM,
        ("temperature", pa.float64()),
        ("law", pa.string()),
        ("by", pa.string()),  # "position" of the drafted token at k = 0 | "entropy" of its law
        ("lo", pa.float64()),  # lo <= position or nats < hi
        ("hi", pa.float64()),
        ("depth", pa.int64()),
        ("anchors", pa.int64()),
        ("alpha", pa.float64()),
        ("accept", pa.float64()),
        ("survive", pa.float64()),
    ]
)


def write_table(path: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to `path`; every row must hold exactly the schema's columns.

    Rows are taken a row group at a time, so that a generator's are never in memory together. A
    group ends with `GROUP_ROWS` rows or, where it holds lists, before `GROUP_VALUES` values of one
    of them: what a reader holds at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = [field.name for field in schema if pa.types.is_list(field.type)]
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in _groups(rows, lists):
            table = pa.Table.from_pylist(group, schema=schema)
            writer.write_table(table, row_group_size=GROUP_ROWS)


def _groups(
    rows: Iterable[Mapping[str, Any]], lists: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    """Runs of rows; one of no row where there is none."""
    group: list[dict[str, Any]] = []
    values, any_yet = 0, False
    for row in rows:
        given = [row[name] for name in lists if row.get(name) is not None]
        own = max(map(len, given), default=0)
        if group and (len(group) == GROUP_ROWS or values + own > GROUP_VALUES):
            yield group
            group, values, any_yet = [], 0, True
        group.append(dict(row))
        values += own
    if group or not any_yet:
        yield group


def open_parquet(
    path: Path, schema: pa.Schema, *, buffer_bytes: int | None = None
) -> pq.ParquetFile:
    """A table's file, of which the footer is read; `DataError` as `open_table`.

    buffer_bytes: what a column is read by at a time; None: a row group's column at once.
    """
    if not path.is_file():
        raise DataError(
            found=f"no file {path}",
            expected="the table that an earlier stage writes",
            todo="run dvc repro",
        )
    with whole(path):
        file = pq.ParquetFile(path, buffer_size=buffer_bytes or 0, pre_buffer=False)
    if not file.schema_arrow.equals(schema):
        raise DataError(
            found=f"{path} has columns {', '.join(file.schema_arrow.names)}",
            expected=f"{', '.join(schema.names)} with this version's types",
            todo="run dvc repro, so that the stage writes it anew",
        )
    return file


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Reads of `path` within: `DataError` where they find the file torn."""
    try:
        yield
    except pa.ArrowInvalid as error:
        raise DataError(
            found=f"{path} cannot be read ({' '.join(str(error).split())})",
            expected="a whole parquet file",
            todo="run dvc repro, so that the stage writes it anew, or fetch it again",
        ) from None


def open_table(path: Path, schema: pa.Schema) -> pa.Table:
    """The columns of a table; `DataError` where the file is missing, torn or of other columns."""
    with open_parquet(path, schema) as file, whole(path):
        return file.read()


def read_table(path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    """Read all rows; `DataError` where the file is missing, torn or of other columns."""
    rows: list[dict[str, Any]] = open_table(path, schema).to_pylist()
    return rows
