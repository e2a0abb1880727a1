"""In which order a cache is read: seeded epochs, the share of a rank, packs, windows. Indices only.

Every order depends on its seed and on the cache's counts alone, so it can be replayed up to any
place without decoding a token: that is how reading resumes. Pure; knows no files.

Dims: T tokens of an epoch, n ranks, N tokens of a pack's budget.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")

OPEN_PACKS = 64
"""Packs filled at a time: first-fit over so many leaves under 2 % of the budget empty where
sequences are shorter than half of it, and what waits stays a small part of an epoch."""


def epoch_order(counts: Sequence[int], seed: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(part, its sequences in order): parts in seeded random order, sequences within each.

    counts: sequences of each part. 19 times faster to read than sequences drawn from the whole
    cache (reference/ecosystem.md §3.2).
    """
    rng = np.random.default_rng(seed)
    for part in rng.permutation(len(counts)).tolist():
        yield part, rng.permutation(counts[part])


def share(
    order: Iterable[tuple[int, NDArray[np.int64]]],
    *,
    rank: int,
    ranks: int,
    tokens: Sequence[int],
    lengths: Callable[[int], NDArray[np.int64]],
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """What rank `rank` of `ranks` reads of an epoch: the sequences that begin in its stretch of T.

    Shares are disjoint, cover the epoch and follow one another in its order; each is within one
    longest sequence of T / n tokens. A rank reads its own parts only, and `lengths` (of a part's
    sequences, tokens) of the two at its ends. tokens: of each part.
    """
    total = sum(tokens)
    low, high = total * rank, total * (rank + 1)  # times n, so that all is exact in integers
    before = 0
    for part, sequences in order:
        start, stop = before * ranks, (before + tokens[part]) * ranks
        if low <= start and stop <= high:
            yield part, sequences
        elif start < high and low < stop:
            sizes = lengths(part)[sequences]
            begins = (before + sizes.cumsum() - sizes) * ranks
            if len(mine := sequences[(begins >= low) & (begins < high)]):
                yield part, mine
        before += tokens[part]


def pack(
    items: Iterable[tuple[Item, int]], budget: int, *, open_packs: int = OPEN_PACKS
) -> Iterator[list[Item]]:
    """Packs of whole items of at most `budget` tokens together, first-fit in the order given.

    items: (item, tokens). An item goes to the oldest open pack with room for it; a full pack is
    handed out at once, the oldest one when `open_packs` are open, the rest at the end. Nothing is
    dropped: an item longer than the budget is a `ValueError`.
    """
    packs: list[tuple[list[Item], int]] = []
    for item, size in items:
        if size > budget:
            raise ValueError(f"{size} tokens, the budget of a pack is {budget}")
        at = next((i for i, (_, used) in enumerate(packs) if used + size <= budget), len(packs))
        if at == len(packs):
            if len(packs) == open_packs:
                yield packs.pop(0)[0]
                at -= 1
            packs.append(([], 0))
        content, used = packs[at]
        content.append(item)
        packs[at] = (content, used + size)
        if used + size == budget:
            yield packs.pop(at)[0]
    yield from (content for content, _ in packs)


def num_windows(num_tokens: int, window_tokens: int) -> int:
    """Windows of an epoch: as many as hold the cache's tokens once."""
    return -(-num_tokens // window_tokens)


def window(
    number: int, seed: int, *, ends: NDArray[np.int64], window_tokens: int
) -> tuple[int, int, int]:
    """(sequence, start, stop) of window `number` of an epoch, drawn with replacement.

    A sequence is drawn in proportion to its tokens, then the window's place in it evenly; a shorter
    sequence is a window as a whole. ends: [sequence] tokens up to the end of each. The draw depends
    on seed and number alone, so any rank, at any place, draws the same.
    """
    rng = np.random.default_rng((seed, number))
    sequence = int(np.searchsorted(ends, rng.integers(ends[-1]), side="right"))
    length = int(ends[sequence]) - (int(ends[sequence - 1]) if sequence else 0)
    start = int(rng.integers(max(0, length - window_tokens) + 1))
    return sequence, start, min(start + window_tokens, length)
