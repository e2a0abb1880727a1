import threading
from collections.abc import Iterator

import pytest

from storage.prefetch import prefetched


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "prefetch"]


def test_items_come_in_order_and_no_more_of_them_ahead_than_asked() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for i in range(50):
            made.append(i)
            yield i

    for taken, item in enumerate(prefetched(source(), depth=3)):
        assert item == taken
        assert len(made) <= taken + 1 + 3 + 1  # handed out, ready, and one in the making
    assert made == list(range(50))
    assert threads() == []


def test_an_error_of_the_source_comes_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield from range(4)
        raise RuntimeError("the disk is gone")

    seen = []
    with pytest.raises(RuntimeError, match="the disk is gone"):  # noqa: PT012
        for item in prefetched(source(), depth=2):
            seen.append(item)  # noqa: PERF402
    assert seen == [0, 1, 2, 3]
    assert threads() == []


def test_closing_ends_the_thread_and_the_source() -> None:
    ended = threading.Event()

    def source() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            ended.set()

    items = prefetched(source(), depth=2)
    assert next(items) == 0
    assert threads() == ["prefetch"]
    items.close()
    assert threads() == []
    assert ended.is_set()


def test_a_depth_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="depth 0; expected at least 1"):
        next(prefetched(iter([1]), depth=0))
