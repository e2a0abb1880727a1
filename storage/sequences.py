"""A file of sequences, read where it is asked for: no token stays in memory but those of one group.

    rows = Sequences.open(Path("sequences/train.parquet"))
    rows.survey.lengths                  # of every sequence, after one pass over the file
    for row in rows.take(range(10, 20)):
        row["tokens"], row["turn"]       # [T] uint32 and [T] int32

A group is a row group of the parquet file (`storage.tables.write_table`). The survey takes 33 bytes
a sequence, and `take` keeps the group that it read last, for the caller that goes on from there.

Dims: S sequences of a file, T tokens of one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage.tables import SEQUENCES, open_parquet, whole

Row = dict[str, Any]
"""A row of `SEQUENCES`; `tokens` is [T] uint32, `turn` [T] int32, both the caller's own."""
BATCH_ROWS = 1024  # of the survey
BUFFER_BYTES = 1 << 20
"""Read at once of a column: without it a whole column of a group lies in memory, compressed."""


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pass over a file of S sequences finds of each."""

    ids: NDArray[np.uint64]
    """[S] digests of their ids: equal ids have equal ones, other ids almost surely not."""
    lengths: NDArray[np.int32]
    """[S] tokens."""
    turns: NDArray[np.int32]
    """[S] entries of `turn`: as many as tokens in a sound file."""
    largest: NDArray[np.uint32]
    """[S] the largest token id; 0 where there is no token."""
    written: NDArray[np.int32]
    """[S] tokens of assistant turns."""
    supervised: NDArray[np.int32]
    """[S] tokens whose successor lies in the same assistant turn (`storage.record.supervised`)."""
    finished: NDArray[np.bool_]
    """[S] ended by an end-of-sequence token."""
    domain: NDArray[np.int32]
    """[S] its place in `domains`."""
    domains: tuple[str, ...]
    """Sorted."""
    laws: tuple[str, ...]
    """That the sequences are said to be samples of, sorted."""

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))


class Sequences:
    """The rows of a file of `SEQUENCES`, by number; made by `open`."""

    def __init__(self, path: Path, file: pq.ParquetFile) -> None:
        self.path, self._file = path, file
        footer = file.metadata
        counts = [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._held: tuple[int, pa.Table] | None = None

    @classmethod
    def open(cls, path: Path) -> "Sequences":
        """Read the footer; `DataError` where the file is missing or its columns differ."""
        return cls(path, open_parquet(path, SEQUENCES, buffer_bytes=BUFFER_BYTES))

    def __len__(self) -> int:
        """S."""
        return int(self._file.metadata.num_rows)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences as the footer has them; one without tokens counts as one."""
        footer, column = self._file.metadata, SEQUENCES.names.index("tokens")
        groups = range(footer.num_row_groups)
        return sum(footer.row_group(g).column(column).num_values for g in groups)

    @cached_property
    def survey(self) -> Survey:
        """Lengths, ids and turns of every sequence, from one pass in bounded memory."""
        found: list[tuple[NDArray[Any], ...]] = []
        laws: set[str] = set()
        codes: dict[str, int] = {}
        for batch in self._batches():
            ids = _digests(batch["id"])
            lengths, largest = _of_tokens(batch["tokens"])
            turns, written, supervised = _of_turns(batch["turn"])
            ended = batch["finished"].to_numpy(zero_copy_only=False)
            coded = _coded(batch["domain"], codes)
            found.append((ids, lengths, turns, largest, written, supervised, ended, coded))
            laws.update(batch["law"].unique().to_pylist())
        columns = [np.concatenate(some) for some in zip(*found, strict=True)] or [_EMPTY] * 8
        ids, lengths, turns, largest, written, supervised, ended, coded = columns
        domains = tuple(sorted(codes))
        place = np.array([domains.index(name) for name in codes], np.int32)
        return Survey(
            ids=ids,
            lengths=lengths,
            turns=turns,
            largest=largest,
            written=written,
            supervised=supervised,
            finished=ended,
            domain=place[coded],
            domains=domains,
            laws=tuple(sorted(laws)),
        )

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with whole(self.path):
            yield from self._file.iter_batches(BATCH_ROWS)

    def take(self, rows: Iterable[int]) -> list[Row]:
        """The rows of these numbers, in their order; quick where neighbours stand together."""
        return [self._row(int(row)) for row in rows]

    def _row(self, row: int) -> Row:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        number = int(np.searchsorted(self._first, row, side="right")) - 1
        if self._held is None or self._held[0] != number:
            self._held = None  # before the next is read
            with whole(self.path):
                self._held = number, self._file.read_row_group(number).combine_chunks()
        table, place = self._held[1], row - int(self._first[number])
        return {
            name: _numbers(table[name][place].values)
            if name in ("tokens", "turn")
            else table[name][place].as_py()
            for name in SEQUENCES.names
        }


_EMPTY: NDArray[np.int32] = np.zeros(0, np.int32)


def _numbers(values: pa.Array | None) -> NDArray[Any]:
    """A copy, since torch refuses what it may not write to and a view would hold the group."""
    return _EMPTY if values is None else values.to_numpy(zero_copy_only=False).copy()


def _digests(column: pa.StringArray) -> NDArray[np.uint64]:
    """[S] of names."""
    made = (blake2b(name.encode(), digest_size=8).digest() for name in column.to_pylist())
    return np.frombuffer(b"".join(made), np.uint64)


def _coded(column: pa.StringArray, codes: dict[str, int]) -> NDArray[np.int32]:
    """[S] codes of names; `codes` gets those that are new."""
    found = column.dictionary_encode()
    own = [codes.setdefault(name, len(codes)) for name in found.dictionary.to_pylist()]
    return np.array(own, np.int32)[found.indices.to_numpy()]


def _of_tokens(column: pa.ListArray) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lengths and largest ids of a batch."""
    ends, values = _ragged(column)
    lengths = np.diff(ends)
    largest = np.zeros(len(lengths), np.uint32)
    some = lengths > 0
    if some.any():
        largest[some] = np.maximum.reduceat(values, ends[:-1][some])
    return lengths, largest


def _of_turns(column: pa.ListArray) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Lengths, tokens of assistant turns and supervised tokens of a batch."""
    ends, turn = _ragged(column)
    mine = turn >= 0
    taught = np.zeros(len(turn), np.bool_)
    taught[:-1] = mine[:-1] & (turn[1:] == turn[:-1])
    last = ends[1:][np.diff(ends) > 0] - 1
    taught[last] = False  # the next token is another sequence's
    return np.diff(ends), _count(mine, ends), _count(taught, ends)


def _count(flags: NDArray[np.bool_], ends: NDArray[np.int32]) -> NDArray[np.int32]:
    """[S] true flags of each sequence."""
    total = np.concatenate([[0], np.cumsum(flags, dtype=np.int32)])
    found: NDArray[np.int32] = np.diff(total[ends]).astype(np.int32)
    return found


def _ragged(column: pa.ListArray) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """[S + 1] where each row ends in the values, from 0, and the values."""
    ends = column.offsets.to_numpy()
    return ends - ends[0], column.values.to_numpy()[ends[0] : ends[-1]]
