"""Processes that compute one thing together: a leader that says what, followers that do the same.

    group = Group(2, module="pipeline.sharded", device="cpu", setup={...})    # leader: starts them
    value = group.call("forward", {...}, tensors, own)                        # all ranks compute
    follow(build)                                                             # what a follower runs

The leader is rank 0 and whoever opened the group; followers are its children on the same host. What
to do next travels as a line of JSON over a pipe, so that followers wait for hours without a pending
collective; tensors follow by broadcast (NCCL on CUDA, gloo on CPUs). A follower answers each call
over a pipe of its own. It ends when the leader's end of its pipe closes, however the leader ended.

No rank is left in a collective by another's failure: a follower that fails says why and ends, the
leader's watcher then ends the others and aborts the communicators, and the leader's own call raises
what happened. A failed group is not mended: `Group` is opened anew. One group a process at a time.
Knows no model.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from storage.errors import LkcacheError, WorkspaceError

R = TypeVar("R")
Tensors = Mapping[str, Tensor]
Follow = Callable[[str, dict[str, Any], dict[str, Tensor]], None]
"""A follower's part of a call: its name, what the leader said of it, and the leader's tensors."""

ANSWER_S = 600.0
"""For all ranks to have done their part of a call."""
COLLECTIVE_S = 600.0  # of one exchange on gloo
START_S = 1800.0  # for followers to import, join and load: a large target from a cold disk
TICK_S = 1.0  # between looks at the clock
GRACE_S = 5.0  # a broken collective is noticed before the follower that broke it is reaped
OK, MEMORY = "ok", "memory"
_SETUP, _STATUS = "LKCACHE_GROUP_SETUP", "LKCACHE_GROUP_STATUS_FD"


class Group:
    """A leader's side of N processes; all of them end with `close`, or with this process."""

    _open: "Group | None" = None

    def __init__(self, size: int, *, module: str, device: str, setup: Mapping[str, Any]) -> None:
        """Start N − 1 followers with `python -m module` and join them.

        `setup` is what the followers' `build` gets. `WorkspaceError` where one ends early.
        """
        assert size > 1, "one process needs no group"
        if Group._open is not None:
            Group._open.close()  # the process group of torch is one a process
        self.size, self.device = size, device
        self._changed = threading.Condition()
        self._failure: tuple[int, str] | None = None
        self._answers, self._asked, self._closed = [0] * (size - 1), 0, False
        self._until: float | None = None
        """When the running call is late, on the clock of `time.monotonic`."""
        if device.startswith("cuda"):
            # a lost peer is `_watch`'s to tell: NCCL's own watchdog would end this process
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        untyped: Any = torch.distributed
        store = untyped.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        told = {"port": store.port, "size": size, "device": device, "own": dict(setup)}
        told["threads"] = torch.get_num_threads()
        self._children, self._watchers = [], []
        Group._open = self
        try:
            for index in range(1, size):
                child, status = _start(module, told | {"index": index})
                self._children.append(child)
                watcher = threading.Thread(target=self._watch, args=(index, status), daemon=True)
                watcher.start()
                self._watchers.append(watcher)
            threading.Thread(target=self._keep_time, daemon=True).start()
            with self._timed(START_S):
                self._await()  # all have found the store: joining would wait for a dead one
                _join(0, size, device, store)
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether it has ended, by `close` or by a failure that was told."""
        return self._closed

    def together(self, own: Callable[[], R]) -> R:
        """The leader's part of what followers do unasked when they have joined (loading)."""
        return self._guarded(own, START_S)

    def call(
        self,
        name: str,
        said: Mapping[str, Any],
        tensors: Tensors,
        own: Callable[[], R],
    ) -> R:
        """Have every follower do its part of a call beside the leader's own; its value.

        `torch.OutOfMemoryError` where any rank found no memory, `WorkspaceError` where a follower
        ended or failed. After either the group is closed.
        """
        self.require_sound()
        placed = {key: x.to(self.device).contiguous() for key, x in tensors.items()}
        shapes = {k: [str(x.dtype).removeprefix("torch."), *x.shape] for k, x in placed.items()}
        line = json.dumps({"name": name, "said": dict(said), "tensors": shapes}) + "\n"

        def part() -> R:
            for child in self._children:
                assert child.stdin is not None
                # one that is gone is told of by its watcher
                with contextlib.suppress(OSError):
                    child.stdin.write(line.encode())
                    child.stdin.flush()
            for x in placed.values():
                _broadcast(x)
            return own()

        return self._guarded(part, ANSWER_S)

    def require_sound(self) -> None:
        """Raise what a follower failed of since the last call: the device's numbers are void."""
        if self._failure is not None:
            failure = self._failure
            self.close()
            self._raise(*failure)
        assert not self._closed, "the group is closed"

    def _guarded(self, part: Callable[[], R], answer_s: float) -> R:
        try:
            with self._timed(answer_s):
                value = part()
                self._await()
        except LkcacheError:
            self.close()
            raise
        except Exception as error:
            with self._changed:  # who broke a collective says so a moment after
                own = isinstance(error, torch.OutOfMemoryError)
                if not own:
                    self._changed.wait_for(lambda: self._failure is not None, GRACE_S)
                failure = self._failure
            self.close()
            if own or failure is None:
                raise
            self._raise(*failure, error)
        except BaseException:
            self.close()
            raise
        return value

    def _await(self) -> None:
        """Until every follower has answered once more; raises what one of them failed of."""
        self._asked += 1

        def settled() -> bool:
            return self._failure is not None or min(self._answers) >= self._asked

        with self._changed:
            self._changed.wait_for(settled)
            failure = self._failure
        if failure is not None:
            self.close()
            self._raise(*failure)

    @contextlib.contextmanager
    def _timed(self, limit_s: float) -> Iterator[None]:
        """Fail the group where what is within takes longer, wherever this thread then waits."""
        self._until = time.monotonic() + limit_s
        try:
            yield
        finally:
            self._until = None

    def _keep_time(self) -> None:
        while not self._closed:
            time.sleep(TICK_S)
            until = self._until
            if until is not None and time.monotonic() > until:
                late = [i for i, n in enumerate(self._answers, 1) if n < self._asked]
                self._fail(late[0] if late else 1, "did not answer in time")

    def _raise(self, index: int, what: str, cause: BaseException | None = None) -> NoReturn:
        if what == MEMORY:
            raise torch.OutOfMemoryError(f"rank {index} of {self.size}: no memory") from cause
        raise WorkspaceError(
            found=f"rank {index} of the {self.size} that share the target {what}",
            expected="processes that live as long as the unit that they compute",
            todo="look above for what it said, and for an out-of-memory kill; run dvc repro: "
            "finished units are kept",
        ) from cause

    def _watch(self, index: int, status: int) -> None:
        """Count a follower's answers; its end, or what it failed of, ends the group."""
        what = ""
        with os.fdopen(status, encoding="utf-8") as lines:
            for line in lines:
                said: str = json.loads(line)
                if said != OK:
                    what = said
                    break
                with self._changed:
                    self._answers[index - 1] += 1
                    self._changed.notify_all()
        child = self._children[index - 1]
        if not what:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)
            code = child.returncode
            named = signal.Signals(-code).name if code is not None and code < 0 else code
            what = f"ended early ({named})"
        self._fail(index, what)

    def _fail(self, index: int, what: str) -> None:
        with self._changed:
            if self._closed or self._failure is not None:
                return
            self._failure = (index, what)
            self._changed.notify_all()
        # only now may a collective end with void numbers
        self._end_children()
        _abort(self.device)

    def _end_children(self) -> None:
        for child in self._children:
            child.kill()

    def close(self) -> None:
        """End the followers and leave torch's process group; nothing where that has happened."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
        self._end_children()
        for child in self._children:
            child.wait()
            if child.stdin is not None:
                with contextlib.suppress(OSError):
                    child.stdin.close()
        for watcher in self._watchers:
            if watcher is not threading.current_thread():
                watcher.join(GRACE_S)
        _abort(self.device)
        with contextlib.suppress(Exception):  # its peers are gone
            torch.distributed.destroy_process_group()
        if Group._open is self:
            Group._open = None


def _abort(device: str) -> None:
    """Free this process of NCCL's kernels that wait for a peer; gloo notices a closed socket."""
    if device.startswith("cuda") and torch.distributed.is_initialized():
        with contextlib.suppress(Exception):  # somebody else did it first
            # torch has no public name for it
            torch.distributed.distributed_c10d._abort_process_group()  # noqa: SLF001


def _start(module: str, setup: Mapping[str, Any]) -> tuple["subprocess.Popen[bytes]", int]:
    """A follower in a session of its own (the leader alone hears Ctrl-C), and its answers."""
    read, write = os.pipe()
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {
        "PYTHONPATH": path,
        "LOCAL_RANK": str(setup["index"]),  # transformers places a rank's shard by it
        _SETUP: json.dumps(setup),
        _STATUS: str(write),
    }
    try:
        child = subprocess.Popen(  # noqa: S603  this program itself
            [sys.executable, "-m", module],
            env={**os.environ, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[write],
            start_new_session=True,
        )
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    return child, read


def _join(index: int, size: int, device: str, store: Any) -> None:
    torch.distributed.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        rank=index,
        world_size=size,
        store=store,
        timeout=timedelta(seconds=COLLECTIVE_S),
    )


def _broadcast(x: Tensor) -> None:
    """Rank 0's numbers to all; what is empty travels nowhere."""
    if x.numel():
        torch.distributed.broadcast(x.view(torch.uint8) if x.dtype == torch.bool else x, src=0)


def follow(build: Callable[[dict[str, Any]], Follow]) -> NoReturn:
    """Be a follower until the leader is gone: join, build, then do each call's part."""
    told, status = json.loads(os.environ[_SETUP]), int(os.environ[_STATUS])
    os.set_inheritable(status, False)
    lines: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        for line in sys.stdin.buffer:
            lines.put(line)
        os._exit(0)  # the leader is gone, and this process may be in a collective with it

    def answer(what: str) -> None:
        os.write(status, (json.dumps(what) + "\n").encode())

    threading.Thread(target=read, daemon=True).start()
    index, size, device = int(told["index"]), int(told["size"]), str(told["device"])
    torch.set_num_threads(int(told["threads"]))
    try:
        place = device
        if device.startswith("cuda"):
            torch.cuda.set_device(index)
            place = f"cuda:{index}"
        untyped: Any = torch.distributed
        store = untyped.TCPStore("127.0.0.1", int(told["port"]), size)
        answer(OK)
        _join(index, size, device, store)
        part = build(told["own"])
        answer(OK)
        while True:
            call = json.loads(lines.get())
            part(call["name"], call["said"], _received(call["tensors"], place))
            answer(OK)
    except torch.OutOfMemoryError:
        answer(MEMORY)
    except BaseException as error:
        answer(f"failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
        raise
    finally:
        sys.stderr.flush()
    os._exit(1)


def _received(shapes: Mapping[str, Sequence[Any]], place: str) -> dict[str, Tensor]:
    found = {}
    for name, (dtype, *shape) in shapes.items():
        found[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=place)
        _broadcast(found[name])
    return found
