"""What was made in advance is what would have been made: values, order, errors, and an end."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from pipeline.prefetch import prefetched


def fetchers() -> int:
    return sum("_fill" in thread.name for thread in threading.enumerate())


def test_items_come_in_order_and_the_thread_ends() -> None:
    assert list(prefetched(range(50))) == list(range(50))
    assert fetchers() == 0


def test_an_error_comes_at_the_item_that_it_would_have_been() -> None:
    def failing() -> Iterator[int]:
        yield 0
        yield 1
        raise LookupError("part-00003 is damaged")

    items = prefetched(failing())
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(LookupError, match="part-00003 is damaged"):
        next(items)
    assert fetchers() == 0


def test_no_more_than_two_items_wait() -> None:
    made: list[int] = []

    def counted() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with closing(prefetched(counted())) as items:
        next(items)
        time.sleep(0.3)
        assert len(made) <= 4  # handed out, two in the queue, one in hand


def test_closing_ends_the_thread_of_an_endless_iterator() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 0

    with closing(prefetched(endless())) as items:
        next(items)
        assert fetchers() == 1
    assert fetchers() == 0
