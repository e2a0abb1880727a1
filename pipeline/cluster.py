"""Where units of work run: in this process, in others of this machine, or on other hosts.

With `pipeline.hosts` the only importer of dask. A unit is a small picklable value, the function a
module-level one (or a `functools.partial` of one) that returns something small; workers write large
results themselves. Results come in the order of the units, so no output can depend on the
scheduler. Knows nothing of targets or caches; no stage lists the section `cluster` under params. A
function may return `Later`, what is left of its unit once the device is done with it (writing,
say): that runs in a thread while the next unit computes, one at a time, and is told how many
threads it may use itself: the cores that computing leaves free.

One worker runs in-process with the same number of torch threads as a worker process would.
"""

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator

from pipeline.config import Processes, Strict, Threads
from pipeline.hosts import (
    RETRIES,
    Address,
    SlurmConfig,
    SshConfig,
    connected,
    in_slurm,
    over_ssh,
    quiet,
    require_fit,
    scratch,
    settings,
    signals_blocked,
)
from pipeline.memory import is_memory_error, told
from storage.errors import ConfigError, LkcacheError, WorkspaceError
from storage.workspace import disk_error

DeviceMap = str | tuple[tuple[str, int | str], ...]
"""As `pipeline.target` has it, which this module does not know."""
# One thread digests and writes a file while others encode it; it keeps up with about so many.
MOST_WRITERS = 8
QUOTA = Path("/sys/fs/cgroup/cpu.max")
U = TypeVar("U")
R = TypeVar("R")


class DeviceMapConfig(Strict):
    """`cluster.parallel` of kind device_map: a worker's target lies on several CUDA devices.

    Layers are split, not matrices: each is computed whole, as on one device of the same kind, so
    that no result depends on it. Tensor parallelism adds in another order and changes bits: it is
    the target's own parameter.
    """

    kind: Literal["device_map"]
    devices: Annotated[int, Field(ge=2)]
    """Of each worker."""
    map: (
        Literal["auto", "balanced", "balanced_low_0", "sequential"]
        | dict[str, int | Literal["cpu"]]
    )
    """A rule of transformers, or where each module lies; devices are numbered within a worker."""

    @model_validator(mode="after")
    def _no_device_beyond(self) -> Self:
        places = [] if isinstance(self.map, str) else self.map.values()
        if not all(place == "cpu" or 0 <= int(place) < self.devices for place in places):
            raise ValueError(f"devices 0 to {self.devices - 1} in map, those of a worker, or cpu")
        return self


class ClusterConfig(Strict):
    """Section `cluster`: where to run. No result depends on it."""

    workers: Processes | None
    """On this machine, on each host of ssh, or jobs of slurm; null: one a device."""
    device: Literal["auto", "cpu", "cuda"]
    address: Address
    parallel: DeviceMapConfig | None
    """Of a target that one device does not hold; null: a device holds it."""
    writers: Threads | None
    """Threads of each worker that encode and write; null: the cores that computing leaves free."""


@dataclass(frozen=True)
class _Mendable:
    """An error for the user as a value: dask would retry what is raised, and wrap it."""

    error: LkcacheError | MemoryError


@dataclass(frozen=True)
class Later(Generic[R]):
    """The rest of a unit, which needs no device."""

    finish: Callable[[int], R]
    """Threads that it may use -> the unit's result."""


@dataclass(frozen=True)
class Cores:
    """How many threads finish a unit, found out where it runs."""

    writers: int | None
    """As `ClusterConfig` has it."""
    threads: int
    """That compute, a worker."""
    share: int = 1
    """Workers that have the cores of their host together."""

    def spare(self) -> int:
        """Threads beside those that compute, at least one."""
        if self.writers is not None:
            return self.writers
        return max(1, min(MOST_WRITERS, available_cores() // self.share - self.threads))


def available_cores() -> int:
    """Cores that this process may use: its affinity, or the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text(encoding="utf-8").split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such control group, or one without a quota: `max`
        return cores


_FINISHING = threading.Semaphore()  # one unit of a process at a time, which bounds what it holds


def _call(function: Callable[[Any], Any], cores: Cores, visible: list[str], unit: Any) -> Any:
    """Run one unit in a worker with a fixed number of threads and, of those visible, its device.

    Or its devices: an item of `visible` is what CUDA_VISIBLE_DEVICES is to say.
    """
    if torch.get_num_threads() != cores.threads:
        torch.set_num_threads(cores.threads)
    if visible:  # by the worker's number, which it keeps when it is started again
        from distributed import get_worker

        own = visible[int(get_worker().name) % len(visible)]
        os.environ["CUDA_VISIBLE_DEVICES"] = own  # read when the first unit starts CUDA
    try:
        value = function(unit)
        return _finish_aside(value, cores) if isinstance(value, Later) else value
    except LkcacheError as error:
        return _Mendable(error)
    except (OSError, MemoryError, RuntimeError) as error:
        if is_memory_error(error):  # another worker would find no more; the stage knows the advice
            return _Mendable(MemoryError(f"in a worker: {told(error)}"))
        mendable = disk_error(error) if isinstance(error, OSError) else None
        if mendable is None:
            raise
        return _Mendable(mendable)


def _finish_aside(later: Later[R], cores: Cores) -> R:
    """Finish a unit while its worker starts on the next one."""
    from dask.distributed import secede

    with _FINISHING:
        secede()
        return later.finish(cores.spare())


def _here(function: Callable[[U], R | Later[R]], units: Iterable[U], cores: Cores) -> Iterator[R]:
    """Units in this process, each finished while the next one computes."""
    with ThreadPoolExecutor(1, "finish") as aside:
        finishing: list[Future[R]] = []
        for unit in units:
            value = function(unit)
            done = [future.result() for future in finishing]
            if isinstance(value, Later):
                finishing = [aside.submit(value.finish, cores.spare())]
            else:
                finishing = []
                done.append(value)
            yield from done
        yield from [future.result() for future in finishing]


class Cluster:
    """Maps functions over units; made by `open_cluster`."""

    def __init__(
        self,
        client: Any,
        *,
        threads: int,
        visible: list[str] | None = None,
        writers: int | None = None,
        share: int = 1,
    ) -> None:
        self._client, self._visible = client, visible or []
        self._cores = Cores(writers, threads, share)

    def map(self, function: Callable[[U], R | Later[R]], units: Iterable[U]) -> Iterator[R]:
        """Yield function(unit) in the order of the units; an `LkcacheError` reaches the caller."""
        if self._client is None:
            return _here(function, units, self._cores)
        return self._submit(function, list(units))

    def _submit(self, function: Callable[[U], R | Later[R]], units: list[U]) -> Iterator[R]:
        """Run all units, keep what came early, and release each future as it completes.

        A held future's result dies with its worker, and dask would then run the unit again.
        """
        from dask.distributed import as_completed

        index_of, early, wanted = {}, {}, 0
        for index, unit in enumerate(units):
            future = self._client.submit(
                _call,
                function,
                self._cores,
                self._visible,
                unit,
                pure=False,
                retries=RETRIES,
                priority=-index,
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
def open_cluster(
    config: ClusterConfig, *, threads: int, units: int | None = None, shards: int = 1
) -> Iterator[Cluster]:
    """Start (or reach) the workers; each computes with `threads` torch threads.

    On this machine no more are started than there are `units`: they cost seconds each. A worker
    whose target is in `shards` gets a device for each.
    """
    with ExitStack() as stack:
        client: Any = None
        visible: list[str] = []
        share = 1
        if config.address is not None:
            client = stack.enter_context(_elsewhere(config, threads, shards))
            # a job of SLURM has cores of its own
            share = 1 if isinstance(config.address, SlurmConfig) else _most_on_a_host(client)
        else:
            workers = num_workers(config, threads=threads, shards=shards)
            workers = workers if units is None else min(workers, units)
            groups = _visible(config, shards) if device(config) == "cuda" else []
            # a worker that is to leave devices free must not see them
            if workers > 1 or (_size(config, shards) > 1 and len(groups) > 1):
                client = stack.enter_context(_local(workers, threads))
                visible, share = groups, workers
            else:
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                stack.callback(torch.set_num_threads, before)
        yield Cluster(client, threads=threads, visible=visible, writers=config.writers, share=share)


def _most_on_a_host(client: Any) -> int:
    """Workers that share a host, where most do."""
    hosts = Counter(address.rpartition(":")[0] for address in client.nthreads())
    return max(hosts.values(), default=1)


def device(config: ClusterConfig) -> str:
    """The torch device to compute on; `ConfigError` where CUDA is asked for and not there.

    Workers elsewhere are asked when they are reached: this host may have none and need none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available and config.address is None:
        raise ConfigError(
            found="cluster.device is cuda, and torch sees no CUDA device",
            expected="a CUDA device and a torch built for it",
            todo="set cluster.device to auto or cpu, or mend the driver",
        )
    if config.device == "auto":
        return "cuda" if available else "cpu"
    return config.device


def device_map(config: ClusterConfig, *, shards: int = 1) -> DeviceMap | None:
    """How a worker's target is spread; `ConfigError` where it cannot be, before a model loads."""
    require_one_way(config, shards=shards)
    if config.parallel is None:
        return None
    if find_spec("accelerate") is None:
        raise ConfigError(
            found="cluster.parallel is of kind device_map, and accelerate is not installed",
            expected="the optional package, with which transformers spreads layers",
            todo="install lkcache[gpu], or set cluster.parallel to null",
        )
    if device(config) != "cuda":
        raise ConfigError(
            found="cluster.parallel spreads a target over CUDA devices, and the device is a CPU",
            expected="CUDA devices",
            todo="set cluster.device to cuda, or cluster.parallel to null",
        )
    places = config.parallel.map
    return places if isinstance(places, str) else tuple(places.items())


def require_one_way(config: ClusterConfig, *, shards: int) -> None:
    """`ConfigError` where a target is to be cut by matrices and spread by layers."""
    if config.parallel is not None and shards > 1:
        raise ConfigError(
            found=f"target.tensor_parallel is {shards}, and cluster.parallel is of kind "
            f"{config.parallel.kind}",
            expected="one way to share a target among the devices of a worker",
            todo="set cluster.parallel to null, or target.tensor_parallel to 1",
        )


def _size(config: ClusterConfig, shards: int) -> int:
    """CUDA devices of each worker."""
    return config.parallel.devices if config.parallel else shards


def _size_name(config: ClusterConfig) -> str:
    return "cluster.parallel.devices" if config.parallel else "target.tensor_parallel"


def num_workers(config: ClusterConfig, *, threads: int, shards: int = 1) -> int:
    """Workers on this machine: as many as the parameter says, else one a device, or a group."""
    if config.workers is not None:
        return config.workers
    if device(config) == "cuda":
        return len(_visible(config, shards))
    # each holds a target of its own: on a CPU, memory bounds them before cores do
    return max(1, min(2, (os.cpu_count() or 1) // (threads * shards)))


def _visible(config: ClusterConfig, shards: int = 1) -> list[str]:
    """The CUDA devices of each worker, as CUDA_VISIBLE_DEVICES names them; one, or a group."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    size = _size(config, shards)
    if len(own) < size:
        raise ConfigError(
            found=f"{len(own)} CUDA devices here, and {_size_name(config)} is {size}",
            expected="at least as many devices as a worker is to have",
            todo=f"lower {_size_name(config)}, or run where there are more",
        )
    return [",".join(own[a : a + size]) for a in range(0, len(own) - size + 1, size)]


@contextmanager
def _local(workers: int, threads: int) -> Iterator[Any]:
    """Worker processes of this machine; they die with this process."""
    import dask
    import distributed

    quiet()
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(settings(threads)))
        with signals_blocked():
            local = distributed.LocalCluster(
                n_workers=workers,
                processes=True,
                threads_per_worker=1,
                dashboard_address="127.0.0.1:0",  # None would still claim port 8787
                memory_limit=0,  # a limit would pause or kill workers; stages bound their batches
                silence_logs=logging.CRITICAL,
                local_directory=str(scratch() / "dask"),
            )
            stack.enter_context(local)
        yield stack.enter_context(distributed.Client(local))


@contextmanager
def _elsewhere(config: ClusterConfig, threads: int, shards: int) -> Iterator[Any]:
    """A client of workers that are not this process's own, checked before they get a unit."""
    import dask
    import distributed  # noqa: F401  its own settings first, or they would go with these

    quiet()
    where = device(config)
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(settings(threads)))
        if isinstance(config.address, SshConfig):
            ssh = over_ssh(
                config.address,
                workers=config.workers,
                threads=threads,
                device=where,
                group=_size(config, shards),
                group_name=_size_name(config),
            )
            client = stack.enter_context(ssh)
        elif isinstance(config.address, SlurmConfig):
            slurm = in_slurm(config.address, workers=config.workers, threads=threads)
            client = stack.enter_context(slurm)
        else:
            client = stack.enter_context(connected(str(config.address)))
        require_fit(client, device=where, chosen=config.device != "auto")
        yield client
