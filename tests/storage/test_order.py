from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.order import epoch_order, num_windows, pack, share, window

PARTS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=12), min_size=1, max_size=6)


def flat(order: object) -> list[tuple[int, int]]:
    return [(part, int(sequence)) for part, sequences in order for sequence in sequences]  # type: ignore[attr-defined]


@given(parts=PARTS, ranks=st.integers(1, 7), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_shares_join_to_the_epoch_and_differ_by_less_than_a_longest_sequence(
    parts: list[list[int]], ranks: int, seed: int
) -> None:
    lengths = [np.array(part) for part in parts]
    counts = [len(part) for part in parts]
    asked: list[list[int]] = []
    shares = []
    for rank in range(ranks):
        asked.append([])

        def known(part: int, into: list[int] = asked[-1]) -> np.ndarray:
            into.append(part)
            return lengths[part]

        mine = share(
            epoch_order(counts, seed),
            rank=rank,
            ranks=ranks,
            tokens=[int(part.sum()) for part in lengths],
            lengths=known,
        )
        shares.append(flat(mine))
    assert [pair for mine in shares for pair in mine] == flat(epoch_order(counts, seed))
    total, longest = sum(int(part.sum()) for part in lengths), max(max(part) for part in parts)
    for mine, parts_asked in zip(shares, asked, strict=True):
        tokens = sum(int(lengths[part][sequence]) for part, sequence in mine)
        assert abs(tokens - total / ranks) < longest
        assert len(parts_asked) <= 2  # a rank needs the lengths of the parts at its ends alone


def test_an_epoch_has_the_order_that_it_always_had() -> None:
    """The order that version 0.1 trained in, stated anew: seeds keep their meaning."""
    rng = np.random.default_rng(5)
    slow = [(int(p), rng.permutation([3, 1, 4][p]).tolist()) for p in rng.permutation(3)]
    assert [(part, order.tolist()) for part, order in epoch_order([3, 1, 4], 5)] == slow


def first_fit(sizes: list[int], budget: int) -> list[list[int]]:
    """The obvious version, all packs open."""
    packs: list[list[int]] = []
    for item, size in enumerate(sizes):
        for content in packs:
            if sum(sizes[i] for i in content) + size <= budget:
                content.append(item)
                break
        else:
            packs.append([item])
    return packs


@given(sizes=st.lists(st.integers(1, 20), max_size=60), open_packs=st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_packs_hold_every_item_once_within_the_budget(sizes: list[int], open_packs: int) -> None:
    packs = list(pack(enumerate(sizes), 20, open_packs=open_packs))
    assert sorted(i for content in packs for i in content) == list(range(len(sizes)))
    assert all(0 < sum(sizes[i] for i in content) <= 20 for content in packs)
    if open_packs >= len(sizes):
        assert sorted(packs) == sorted(first_fit(sizes, 20))
        used = [sum(sizes[i] for i in content) for content in packs]
        assert all(one + other > 20 for one, other in combinations(used, 2))


def test_packs_of_short_items_are_full() -> None:
    sizes = np.random.default_rng(0).integers(50, 500, 4000).tolist()
    used = [sum(sizes[i] for i in content) for content in pack(enumerate(sizes), 1024)]
    assert np.mean(used) / 1024 > 0.98


def test_an_item_beyond_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="21 tokens, the budget of a pack is 20"):
        list(pack([(0, 21)], 20))


def test_windows_lie_in_their_sequences_and_are_drawn_by_their_tokens() -> None:
    lengths = np.array([3, 40, 10, 100])
    ends = lengths.cumsum()
    drawn = [window(i, 7, ends=ends, window_tokens=16) for i in range(3000)]
    for sequence, start, stop in drawn:
        assert 0 <= start < stop <= lengths[sequence]
        assert stop - start == min(16, lengths[sequence])
    seen = Counter(sequence for sequence, _, _ in drawn)
    for sequence, length in enumerate(lengths):
        expected = 3000 * length / 153
        assert abs(seen[sequence] - expected) < 5 * expected**0.5
    starts = Counter(start for sequence, start, _ in drawn if sequence == 3)
    assert sorted(starts) == list(range(85))
    assert window(17, 7, ends=ends, window_tokens=16) == drawn[17]
    assert num_windows(153, 16) == 10
