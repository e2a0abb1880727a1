"""Work ahead in a thread: the same items in the same order, a few of them made in advance.

    for batch in prefetched(batches, depth=2): ...

Decoding, hashing and copying release the interpreter for most of their time, so a thread is enough
to hide them behind a training step. Knows nothing of what the items are.
"""

from collections.abc import Generator, Iterator
from queue import Full, Queue
from threading import Event, Thread
from typing import TypeVar

Item = TypeVar("Item")

POLL_S = 0.05
"""How long the thread waits for room before it looks whether anyone still listens."""


class _End:
    """After the last item: how the source ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetched(items: Iterator[Item], *, depth: int) -> Generator[Item, None, None]:
    """`items`, up to `depth` of them made in advance; one more is in the making.

    What the source raises is raised here, after the items before it. Closing this generator stops
    the thread and closes the source.
    """
    if depth < 1:
        raise ValueError(f"depth {depth}; expected at least 1")
    ready: Queue[Item | _End] = Queue(maxsize=depth)
    stop = Event()
    worker = Thread(target=_work, args=(items, ready, stop), name="prefetch", daemon=True)
    worker.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        worker.join()


def _work(items: Iterator[Item], ready: "Queue[Item | _End]", stop: Event) -> None:
    error: BaseException | None = None
    try:
        for item in items:
            if not _put(item, ready, stop):
                break
    # whatever it is, it belongs to whoever asked for the items
    except BaseException as raised:
        error = raised
    finally:
        if close := getattr(items, "close", None):
            close()
    _put(_End(error), ready, stop)


def _put(item: "Item | _End", ready: "Queue[Item | _End]", stop: Event) -> bool:
    """Wait for room; False where nobody wants it any more."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=POLL_S)
        except Full:
            continue
        return True
    return False
