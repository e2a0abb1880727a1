"""A file of sequences says of each row what its lists say, and holds one group at a time."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import sequences, tables
from storage.errors import DataError
from storage.record import supervised
from storage.sequences import Sequences
from storage.tables import PROMPTS, SEQUENCES, read_table, write_table

Rows = list[dict[str, Any]]


@pytest.fixture
def rows() -> Rows:
    """Forty sequences of 0 to 30 tokens."""
    draw = np.random.default_rng(0)
    lengths = [0, *draw.integers(1, 31, 38), 0]
    return [
        {
            "id": f"p{number}",
            "domain": "prose" if number % 5 else "code",
            "tokens": draw.integers(0, 300, length).tolist(),
            "turn": draw.integers(-1, 2, length).tolist(),
            "law": "T=1" if number % 2 else "data",
            "finished": bool(number % 3),
        }
        for number, length in enumerate(lengths)
    ]


@pytest.fixture
def path(tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Their file, in groups of at most 100 tokens."""
    monkeypatch.setattr(tables, "GROUP_VALUES", 100)
    monkeypatch.setattr(sequences, "BATCH_ROWS", 7)
    write_table(tmp_path / "a.parquet", SEQUENCES, rows)
    return tmp_path / "a.parquet"


def test_the_survey_says_what_the_rows_hold(path: Path, rows: Rows) -> None:
    found = Sequences.open(path).survey
    assert found.lengths.tolist() == found.turns.tolist() == [len(r["tokens"]) for r in rows]
    assert found.largest.tolist() == [max(r["tokens"], default=0) for r in rows]
    assert found.written.tolist() == [sum(t >= 0 for t in r["turn"]) for r in rows]
    assert found.supervised.tolist() == [
        int(supervised(np.array(r["turn"], np.int32)).sum()) for r in rows
    ]
    assert found.laws == ("T=1", "data")
    assert found.domains == ("code", "prose")
    assert [found.domains[code] for code in found.domain] == [r["domain"] for r in rows]
    assert found.finished.tolist() == [r["finished"] for r in rows]
    assert found.num_tokens == sum(len(r["tokens"]) for r in rows)


def test_rows_are_taken_by_number_in_any_order(path: Path, rows: Rows) -> None:
    file = Sequences.open(path)
    assert pq.ParquetFile(path).num_row_groups > 3
    order = [5, 39, 0, 5, *range(20, 30)]
    for row, index in zip(file.take(order), order, strict=True):
        assert row["tokens"].dtype == np.uint32 or not len(row["tokens"])
        assert row["tokens"].flags.writeable
        assert row["turn"].flags.writeable
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()}
        assert plain == rows[index]
    with pytest.raises(IndexError, match="row 40 of 40"):
        file.take([40])


def test_a_group_is_read_once_by_those_that_go_on_in_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, g: (read.append(g), plain(self, g))[1]
    )
    file = Sequences.open(path)
    for start in range(0, 40, 4):
        file.take(range(start, start + 4))
    assert read == list(range(pq.ParquetFile(path).num_row_groups))


def test_the_footer_counts_the_tokens(tmp_path: Path, rows: Rows) -> None:
    write_table(tmp_path / "a.parquet", SEQUENCES, rows[1:-1])
    assert Sequences.open(tmp_path / "a.parquet").num_tokens == sum(
        len(row["tokens"]) for row in rows
    )


def test_a_file_of_no_row_has_a_survey_of_none(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", SEQUENCES, [])
    file = Sequences.open(tmp_path / "a.parquet")
    assert (len(file), file.num_tokens, len(file.survey.lengths)) == (0, 0, 0)
    assert file.survey.laws == ()


def test_what_is_missing_or_another_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        Sequences.open(tmp_path / "a.parquet")
    write_table(tmp_path / "a.parquet", PROMPTS, [])
    with pytest.raises(DataError, match="has columns id, domain, split, text, response"):
        Sequences.open(tmp_path / "a.parquet")


def test_groups_end_before_their_tokens_or_rows_are_too_many(path: Path, rows: Rows) -> None:
    footer = pq.ParquetFile(path).metadata
    counts = [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
    starts = np.cumsum([0, *counts])
    lengths = [len(row["tokens"]) for row in rows]
    for start, stop in pairwise(starts):
        assert sum(lengths[start:stop]) <= 100
        assert stop == len(rows) or sum(lengths[start : stop + 1]) > 100
    assert read_table(path, SEQUENCES) == rows


def test_arrays_generators_and_one_group_write_the_bytes_of_lists(
    tmp_path: Path, rows: Rows
) -> None:
    """As `pyarrow.parquet.write_table` does, so that no small file changes."""
    table = pa.Table.from_pylist(rows, schema=SEQUENCES)
    pq.write_table(table, tmp_path / "whole", compression="zstd", row_group_size=65_536)
    write_table(tmp_path / "rows", SEQUENCES, iter(rows))
    arrays = {"tokens": np.uint32, "turn": np.int32}
    write_table(
        tmp_path / "arrays",
        SEQUENCES,
        ({**row, **{k: np.array(row[k], t) for k, t in arrays.items()}} for row in rows),
    )
    whole = (tmp_path / "whole").read_bytes()
    assert (tmp_path / "rows").read_bytes() == (tmp_path / "arrays").read_bytes() == whole
