"""A cache as an endless stream of batches: shuffled, shared among ranks, packed, resumable.

    stream = Stream(cache, seed=0, rank=rank, ranks=world, pack_tokens=8192, prefetch=2)
    stream.resume(saved)                        # where an earlier one was left, if any
    for records in stream:                      # list[Record], epoch after epoch
        train_on(collate(records, cache.layout))
        saved = stream.state()                  # plain values for JSON: the rest from here on

What a batch is:
- `batch_sequences`: that many whole sequences (one by default); what an epoch leaves opens the
  first batch of the next one;
- `pack_tokens`: whole sequences of at most so many tokens together (`storage.order.pack`); packs
  do not cross epochs or ranks;
- `window_tokens`: `batch_sequences` random windows of so many tokens, each a record of its own
  (`Cache.window`); an epoch has as many as hold the cache's tokens once.

The order depends on seed, ranks and the cache alone: not on `prefetch`, which makes batches in a
thread ahead of their use, not on `keep_bytes`. Ranks read disjoint shares that cover each epoch,
in whole sequences equal up to the longest one (`storage.order.share`), in windows up to one; they
need no agreement but their number. Knows numpy and the cache, neither tensors nor drafts.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from storage.errors import DataError, FingerprintMismatch
from storage.manifest import MANIFEST
from storage.order import epoch_order, num_windows, pack, share, window
from storage.prefetch import prefetched
from storage.reader import Cache
from storage.record import Record
from storage.workspace import file_digest

Piece = tuple[int, int, int]
"""Sequence, first token, end; an end of −1 takes the sequence whole."""
Place = tuple[int, int]
"""Epoch, and how many of this rank's units (sequences, packs, windows) of it were handed out."""


class Stream:
    """Batches of one rank, from a place on; iterating again goes on where the last stopped."""

    def __init__(
        self,
        cache: Cache,
        *,
        seed: int | Callable[[int], int],
        rank: int = 0,
        ranks: int = 1,
        batch_sequences: int = 1,
        pack_tokens: int | None = None,
        window_tokens: int | None = None,
        arrays: Collection[str] | None = None,
        prefetch: int = 0,
    ) -> None:
        """seed: or a function from the number of an epoch to its seed; arrays: as of `records`.

        `DataError` where a sequence is longer than `pack_tokens`, or where there is none.
        """
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks}")
        for name, least in (("batch_sequences", 1), ("pack_tokens", 1), ("window_tokens", 2)):
            value = locals()[name]
            if value is not None and value < least:
                raise ValueError(f"{name} {value}; expected at least {least}")
        if pack_tokens is not None and (window_tokens is not None or batch_sequences != 1):
            raise ValueError("pack_tokens makes the batches: neither windows nor batch_sequences")
        self.cache = cache
        self._seed = seed if callable(seed) else _epoch_seeds(seed)
        self._rank, self._ranks = rank, ranks
        self._batch = batch_sequences
        self._pack_tokens, self._window_tokens = pack_tokens, window_tokens
        self._arrays = arrays
        self._prefetch = prefetch
        self._place: Place = (0, 0)
        self._check()

    def __iter__(self) -> Generator[list[Record], None, None]:
        """Endless; closing the generator ends the thread that prefetches."""
        batches = self._batches(*self._place)
        if self._prefetch:
            batches = prefetched(batches, depth=self._prefetch)
        try:
            for records, place in batches:
                self._place = place
                yield records
        finally:
            batches.close()

    def state(self) -> dict[str, Any]:
        """Where the next batch begins, in plain values; of what was handed out, not prefetched."""
        epoch, index = self._place
        return {**self._identity(epoch), "epoch": epoch, "index": index}

    def resume(self, position: Mapping[str, Any]) -> "Stream":
        """Go on where `state` was taken: exactly the rest follows, in the same order.

        `FingerprintMismatch` where it belongs to another cache, seed, rank or kind of batch.
        """
        epoch, index = int(position["epoch"]), int(position["index"])
        for name, mine in self._identity(epoch).items():
            if position.get(name) != mine:
                raise FingerprintMismatch(
                    found=f"a position in a stream of {name} {position.get(name)}",
                    expected=f"{name} {mine}, as this stream has",
                    todo="resume with the parameters and the cache that the run began with, or "
                    "start anew",
                )
        self._place = (epoch, index)
        return self

    def _identity(self, epoch: int) -> dict[str, Any]:
        """What the order depends on; two streams that agree in it continue each other."""
        return {
            "cache": file_digest(self.cache.path / MANIFEST),
            "seed": self._seed(epoch),
            "rank": self._rank,
            "ranks": self._ranks,
            "pack_tokens": self._pack_tokens,
            "window_tokens": self._window_tokens,
        }

    def _check(self) -> None:
        if not self.cache.num_sequences:
            raise DataError(
                found=f"{self.cache.name} without sequences",
                expected="at least one to read",
                todo="check prepare and generate, then run dvc repro",
            )
        if (
            self._pack_tokens is not None
            and (longest := self.cache.lengths.max()) > self._pack_tokens
        ):
            at = int(self.cache.lengths.argmax())
            raise DataError(
                found=f"sequence {at} ({self.cache.ids[at]!r}) has {longest} tokens",
                expected=f"at most pack_tokens, {self._pack_tokens}: packs hold whole sequences",
                todo=f"set pack_tokens to {longest} or more, or read windows",
            )

    def _batches(self, epoch: int, index: int) -> Generator[tuple[list[Record], Place], None, None]:
        """(records, the place after them) from a place on."""
        units = self._units(epoch, index)
        while batch := list(islice(units, self._batch)):
            pieces = [piece for unit, _ in batch for piece in unit]
            yield self._read(pieces), batch[-1][1]

    def _units(self, epoch: int, index: int) -> Iterator[tuple[list[Piece], Place]]:
        """(pieces of one unit, the place after it), epoch after epoch."""
        while True:
            plan = islice(self._epoch(epoch), index, None)
            for number, unit in enumerate(plan, start=index + 1):
                yield unit, (epoch, number)
            epoch, index = epoch + 1, 0

    def _epoch(self, epoch: int) -> Iterator[list[Piece]]:
        """This rank's units of an epoch; nothing is decoded to make them."""
        seed = self._seed(epoch)
        if self._window_tokens is not None:
            ends = self.cache.lengths.cumsum()
            count = num_windows(int(ends[-1]), self._window_tokens)
            for number in range(self._rank, count, self._ranks):
                yield [window(number, seed, ends=ends, window_tokens=self._window_tokens)]
        elif self._pack_tokens is not None:
            lengths = self.cache.lengths
            sized = ((sequence, int(lengths[sequence])) for sequence in self._sequences(seed))
            for content in pack(sized, self._pack_tokens):
                yield [(sequence, 0, -1) for sequence in content]
        else:
            for sequence in self._sequences(seed):
                yield [(sequence, 0, -1)]

    def _sequences(self, seed: int) -> Iterator[int]:
        """This rank's sequences of an epoch, in order."""
        counts = self.cache.part_counts
        first = np.concatenate([[0], np.cumsum(counts)]).tolist()
        order = share(
            epoch_order(counts, seed),
            rank=self._rank,
            ranks=self._ranks,
            tokens=[part.counts["token"] for part in self.cache.manifest.parts],
            lengths=self.cache.part_lengths,
        )
        for part, sequences in order:
            yield from (sequences + first[part]).tolist()

    def _read(self, pieces: list[Piece]) -> list[Record]:
        if self._window_tokens is None:
            sequences = [sequence for sequence, _, _ in pieces]
            return self.cache.records(sequences, arrays=self._arrays, more=True)
        return [self.cache.window(*piece, arrays=self._arrays) for piece in pieces]


def _epoch_seeds(seed: int) -> Callable[[int], int]:
    """An independent seed for every epoch."""
    return lambda epoch: int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
