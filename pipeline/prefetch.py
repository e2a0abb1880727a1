"""`prefetched`: an iterator whose next items are made in a thread while this one works.

Order and values are those of the iterator itself. What it raises is raised here, at the item that
it would have been; closing ends the thread. Knows nothing of what the items are.
"""

import threading
from collections.abc import Generator, Iterable
from queue import Full, Queue
from typing import TypeVar

T = TypeVar("T")

DEPTH = 2
"""Items held: one would do for a reader that is never slower, the second evens out a slow one."""
POLL_S = 0.1  # how soon a closed iterator's thread notices


class _End:
    """The last thing in the queue: the error that ended the iterator, or None."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetched(items: Iterable[T], *, depth: int = DEPTH) -> Generator[T, None, None]:
    """Yield what `items` yields, up to `depth` of them made in advance; close it to end early."""
    queue: Queue[T | _End] = Queue(depth)
    closed = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, queue, closed), daemon=True)
    thread.start()
    try:
        while not isinstance(item := queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
        while thread.is_alive():
            while not queue.empty():
                queue.get()  # makes room for what is being put
            thread.join(POLL_S / 10)


def _fill(items: Iterable[T], queue: "Queue[T | _End]", closed: threading.Event) -> None:
    end = _End(None)
    try:
        for item in items:
            if not _put(queue, item, closed):
                return
    except BaseException as error:  # raised again in the consumer
        end = _End(error)
    _put(queue, end, closed)


def _put(queue: "Queue[T | _End]", item: "T | _End", closed: threading.Event) -> bool:
    """Wait for room; False once nobody wants the item."""
    while not closed.is_set():
        try:
            queue.put(item, timeout=POLL_S)
        except Full:
            continue
        return True
    return False
