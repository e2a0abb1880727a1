"""Where units of work run: this process, worker processes of this machine, or a dask scheduler.

The only importer of dask. A unit is a small picklable value, the function a module-level one (or a
`functools.partial` of one) that returns something small; workers write large results themselves.
Results come in the order of the units, so no output can depend on the scheduler. Knows nothing of
targets or caches; no stage lists the section `cluster` under its params. A function may return
`Later`, what is left of its unit once the device is done with it (writing, say): that runs in a
thread while the next unit computes, one at a time.

One worker runs in-process with the same number of torch threads as a worker process would.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
from pydantic import Field

from pipeline.config import Strict
from storage.errors import ConfigError, LkcacheError, WorkspaceError

U = TypeVar("U")
R = TypeVar("R")

RETRIES = 2  # of a unit whose worker died or raised something that no user can mend
CONNECT_S = 4.5  # to the scheduler, then to a worker: an error comes within 10 s


class ClusterConfig(Strict):
    """Section `cluster`: where to run. No result depends on it."""

    workers: Annotated[int, Field(ge=1)]
    device: Literal["auto", "cpu", "cuda"]
    address: str | None


@dataclass(frozen=True)
class _Mendable:
    """An error for the user as a value: dask would retry what is raised, and wrap it."""

    error: LkcacheError


@dataclass(frozen=True)
class Later(Generic[R]):
    """The rest of a unit, which needs no device: `finish` returns the unit's result."""

    finish: Callable[[], R]


_FINISHING = threading.Semaphore()  # one unit of a process at a time, which bounds what it holds


def _call(function: Callable[[Any], Any], threads: int, unit: Any) -> Any:
    """Run one unit in a worker with a fixed number of threads."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    try:
        value = function(unit)
        return _finish_aside(value) if isinstance(value, Later) else value
    except LkcacheError as error:
        return _Mendable(error)


def _finish_aside(later: Later[R]) -> R:
    """Finish a unit while its worker starts on the next one."""
    from dask.distributed import secede

    with _FINISHING:
        secede()
        return later.finish()


def _here(function: Callable[[U], R | Later[R]], units: Iterable[U]) -> Iterator[R]:
    """Units in this process, each finished while the next one computes."""
    with ThreadPoolExecutor(1, "finish") as aside:
        finishing: list[Future[R]] = []
        for unit in units:
            value = function(unit)
            done = [future.result() for future in finishing]
            if isinstance(value, Later):
                finishing = [aside.submit(value.finish)]
            else:
                finishing = []
                done.append(value)
            yield from done
        yield from [future.result() for future in finishing]


class Cluster:
    """Maps functions over units; made by `open_cluster`."""

    def __init__(self, client: Any, *, threads: int) -> None:
        self._client, self._threads = client, threads

    def map(self, function: Callable[[U], R | Later[R]], units: Iterable[U]) -> Iterator[R]:
        """Yield function(unit) in the order of the units; an `LkcacheError` reaches the caller."""
        if self._client is None:
            return _here(function, units)
        return self._submit(function, list(units))

    def _submit(self, function: Callable[[U], R | Later[R]], units: list[U]) -> Iterator[R]:
        """Run all units, keep what came early, and release each future as it completes.

        A held future's result dies with its worker, and dask would then run the unit again.
        """
        from dask.distributed import as_completed

        index_of, early, wanted = {}, {}, 0
        for index, unit in enumerate(units):
            future = self._client.submit(
                _call, function, self._threads, unit, pure=False, retries=RETRIES, priority=-index
            )
            index_of[future] = index
        completed = as_completed(list(index_of))
        try:
            for future in completed:
                index = index_of.pop(future)
                early[index] = _result(future, index=index, count=len(units))
                future.release()
                while wanted in early:
                    yield early.pop(wanted)
                    wanted += 1
        finally:
            # after an error nobody wants the rest
            if index_of:
                self._client.cancel(list(index_of), force=True)


def _result(future: Any, *, index: int, count: int) -> Any:
    """A future's value; what its worker raised, as the user should read it."""
    from distributed.scheduler import KilledWorker

    try:
        value = future.result()
    except KilledWorker:
        raise WorkspaceError(
            found=f"a worker process died {RETRIES + 1} times at unit {index + 1} of {count}",
            expected="workers that live as long as their unit",
            todo="look for an out-of-memory kill, lower the stage's batch or cluster.workers, "
            "and run dvc repro: finished units are kept",
        ) from None
    if isinstance(value, _Mendable):
        raise value.error from None
    return value


@contextmanager
def open_cluster(config: ClusterConfig, *, threads: int) -> Iterator[Cluster]:
    """Start (or reach) the workers; each computes with `threads` torch threads."""
    with ExitStack() as stack:
        if config.address is not None:
            client: Any = stack.enter_context(_connected(config.address))
        elif config.workers > 1:
            client = stack.enter_context(_local(config.workers, threads))
        else:
            client = None
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            stack.callback(torch.set_num_threads, before)
        yield Cluster(client, threads=threads)


def device(config: ClusterConfig) -> str:
    """The torch device to compute on; `ConfigError` where CUDA is asked for and not there."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError(
            found="cluster.device is cuda, and torch sees no CUDA device",
            expected="a CUDA device and a torch built for it",
            todo="set cluster.device to auto or cpu, or mend the driver",
        )
    if config.device == "auto":
        return "cuda" if available else "cpu"
    return config.device


@contextmanager
def _local(workers: int, threads: int) -> Iterator[Any]:
    """Worker processes of this machine; they die with this process."""
    import dask
    import distributed

    for name in ("distributed", "tornado", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    scratch = Path(os.environ.get("LKCACHE_SCRATCH", ".scratch")) / "dask"
    threads_env = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads
    )
    settings = {
        # in place of dask's own: its MALLOC_TRIM_THRESHOLD_ returns every tensor to the system
        "distributed.nanny.pre-spawn-environ": threads_env,
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.scheduler.allowed-failures": RETRIES,
    }
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(settings))
        with _interrupts_blocked():
            local = distributed.LocalCluster(
                n_workers=workers,
                processes=True,
                threads_per_worker=1,
                dashboard_address="127.0.0.1:0",  # None would still claim port 8787
                memory_limit=0,  # a limit would pause or kill workers; stages bound their batches
                silence_logs=logging.CRITICAL,
                local_directory=str(scratch),
            )
            stack.enter_context(local)
        yield stack.enter_context(distributed.Client(local))


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Hold Ctrl-C back from this thread; threads and processes started within never see it.

    A terminal sends it to every process of the group, and each worker would print a traceback.
    This one gets it, here or when the block ends, and closes the workers.
    """
    resource_tracker.ensure_running()  # starting it later would undo the blocking (CPython does so)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """A client of a running scheduler with at least one worker; `ConfigError` where none is."""
    import distributed

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    client = None
    try:
        client = distributed.Client(address, timeout=CONNECT_S)
        client.wait_for_workers(1, timeout=CONNECT_S)
    except Exception as error:  # a server that is no scheduler answers with anything at all
        if client is not None:
            client.close()
        raise ConfigError(
            found=f"no dask workers at cluster.address {address!r} ({type(error).__name__})",
            expected=f"a dask scheduler with workers that answers within {CONNECT_S} s",
            todo="start it, correct cluster.address, or set it to null",
        ) from None
    with client:
        yield client
