"""Where work runs changes neither results nor what the user reads."""

import errno
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from distributed.scheduler import KilledWorker

from pipeline import cluster, hosts
from pipeline.cluster import Cluster, ClusterConfig, Cores, Later, device, num_workers, open_cluster
from pipeline.config import parse
from storage.errors import ConfigError, TargetError, WorkspaceError
from storage.workspace import Workspace, read_json, write_json

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clients_end_here() -> Iterator[None]:
    """A client that found no scheduler is closed by `__del__`, which takes a lock of dask's.

    Collected while dask's next client is made under the same lock, it waits for itself.
    """
    yield
    gc.collect()


def square(unit: int) -> tuple[int, int]:
    """Later units are done earlier."""
    time.sleep(0.05 * (4 - unit % 4))
    return unit * unit, torch.get_num_threads()


def refuse(unit: int) -> int:
    if unit == 2:
        raise TargetError(found="NaN at unit 2", expected="numbers", todo="mend the target")
    return unit


def wait_to_be_killed(unit: tuple[int, str]) -> int:
    """Unit 1 says which process it is in, and waits once to be killed from outside."""
    number, folder = unit
    with (Path(folder) / "runs").open("a") as log:
        log.write(f"{number}\n")
    said = Path(folder) / "pid"
    if number == 1 and not said.exists():
        write_json(said, {"pid": os.getpid()})
        time.sleep(60)
    return number


def visible_device(unit: int) -> tuple[str, int]:
    time.sleep(0.2)
    return os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()


def fill(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "cache/part")


def starve(_: int) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def begin(unit: tuple[int, str, int]) -> int | Later[int]:
    """A unit that is finished when so many units have begun; number 2 has nothing left to do."""
    number, folder, awaited = unit
    path = Path(folder) / "log"

    def log(what: str) -> None:
        with path.open("a") as file:
            file.write(f"{what} {number} {threading.current_thread() is threading.main_thread()}\n")

    def finish(_: int) -> int:
        log("finish")
        deadline = time.monotonic() + 60  # a worker that died before may still be starting
        while path.read_text().count("begin") < awaited and time.monotonic() < deadline:
            time.sleep(0.01)
        if number == 7:
            raise TargetError(found="a full disk", expected="room", todo="make some")
        log("finished")
        return number

    log("begin")
    return number if number == 2 else Later(finish)


def config_of(**changes: Any) -> ClusterConfig:
    return ClusterConfig(
        **{
            "workers": 1,
            "device": "cpu",
            "address": None,
            "parallel": None,
            "writers": None,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cluster"))
    try:
        with open_cluster(config_of(workers=2), threads=1) as opened:
            yield opened
    finally:
        os.chdir(before)


def test_results_come_in_the_order_of_the_units(two: Cluster) -> None:
    wanted = [(unit * unit, 1) for unit in range(9)]
    assert list(two.map(square, range(9))) == wanted
    with open_cluster(config_of(), threads=1) as one:
        assert list(one.map(square, range(9))) == wanted


def test_an_error_for_the_user_arrives_as_it_was_raised(two: Cluster) -> None:
    with open_cluster(config_of(), threads=1) as one:
        for opened in (one, two):
            with pytest.raises(TargetError, match="NaN at unit 2; expected numbers; mend the tar"):
                list(opened.map(refuse, range(50)))


def test_a_worker_that_is_killed_costs_its_unit_only(two: Cluster, tmp_path: Path) -> None:
    units = [(number, str(tmp_path)) for number in range(12)]

    def kill() -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.02)
        os.kill(read_json(tmp_path / "pid")["pid"], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert list(two.map(wait_to_be_killed, units)) == list(range(12))
    runs = (tmp_path / "runs").read_text().split()
    # the other worker went on, and nothing that was done was done again
    assert runs.count("1") == 2
    assert len(runs) <= 12 + 2


def test_each_worker_gets_a_device_of_its_own(
    two: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    two._client.wait_for_workers(2, timeout=30)  # the killed one starts again
    pinned = Cluster(two._client, threads=1, visible=cluster._visible(config_of()))
    seen = set(pinned.map(visible_device, range(8)))
    assert {device for device, _ in seen} == {"5", "7"}
    assert len(seen) == 2  # a process keeps its device


def test_one_worker_a_device_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_workers(config_of(workers=3), threads=1) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [num_workers(config_of(workers=None), threads=t) for t in (1, 8, 16)] == [2, 1, 1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert num_workers(config_of(workers=None, device="cuda"), threads=1) == 4
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cluster._visible(config_of()) == ["0", "1", "2", "3"]


def test_a_full_disk_in_a_worker_is_told_at_once(two: Cluster) -> None:
    with pytest.raises(WorkspaceError, match=r"no space left on device while writing cache/part;"):
        list(two.map(fill, range(3)))


STAGE = """
import os, sys, time
from pathlib import Path
from pipeline.cluster import ClusterConfig, open_cluster
from storage.workspace import Workspace
from tests.pipeline.test_cluster import say_and_sleep
config = ClusterConfig(workers=2, device="cpu", address=None, parallel=None, writers=None)
with Workspace("capture", "f" * 64, outs=[Path("x")]), open_cluster(config, threads=1) as workers:
    list(workers.map(say_and_sleep, [sys.argv[1]] * 2))
"""


def test_memory_that_runs_out_in_a_worker_is_told_at_once(two: Cluster) -> None:
    with pytest.raises(MemoryError, match=r"in a worker: CUDA out of memory. Tried .* 2.00 GiB"):
        list(two.map(starve, range(2)))


def say_and_sleep(folder: str) -> None:
    write_json(Path(folder) / f"{os.getpid()}.json", {"pid": os.getpid()})
    time.sleep(60)


def test_workers_of_a_killed_stage_end_and_let_its_lock_go(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    stage = subprocess.Popen(
        [sys.executable, "-c", STAGE, str(tmp_path)], cwd=tmp_path, env=environment
    )
    with stage:
        wait_for(lambda: len(list(tmp_path.glob("*.json"))) == 2)
        children = psutil.Process(stage.pid).children(recursive=True)
        workers = {int(path.stem) for path in tmp_path.glob("*.json")}
        assert workers <= {child.pid for child in children}
        stage.kill()
        stage.wait()
    with Workspace("capture", "f" * 64, outs=[Path("x")], root=tmp_path):
        pass  # the lock is free at once
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def wait_for(done: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_unit_that_kills_every_worker_is_named() -> None:
    class Killed:
        def result(self) -> None:
            raise KilledWorker("key", last_worker=None, allowed_failures=2)

    with pytest.raises(WorkspaceError, match=r"died 3 times at unit 5 of 9; .* units are kept"):
        cluster._result(Killed(), index=4, count=9)


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with open_cluster(config_of(), threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("address", ["nonsense", "foo://127.0.0.1:1", "tcp://127.0.0.1:9"])
def test_an_address_without_a_scheduler_is_named_in_time(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 2 * hosts.CONNECT_S < 10
    monkeypatch.setattr(hosts, "CONNECT_S", 0.5)
    with (
        pytest.raises(ConfigError, match=f"no dask workers at cluster.address '{address}'"),
        open_cluster(config_of(address=address), threads=1),
    ):
        pass


def test_a_server_that_is_no_scheduler_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.0 501 Not Implemented\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with (
            pytest.raises(ConfigError, match=r"a dask scheduler with workers that answers within"),
            open_cluster(config_of(address=address), threads=1),
        ):
            pass


def test_devices_are_found_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device(config_of(device="auto")) == "cpu"
    with pytest.raises(ConfigError, match=r"device is cuda, and torch sees no CUDA device"):
        device(config_of(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device(config_of(device="auto")) == "cuda"
    assert device(config_of(device="cpu")) == "cpu"


SPREAD: dict[str, Any] = {"kind": "device_map", "devices": 2, "map": "auto"}


def test_a_worker_of_a_spread_target_has_a_group_of_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    spread = config_of(workers=None, device="cuda", parallel=SPREAD)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cluster._visible(spread) == ["0,1", "2,3"]
    assert cluster.num_workers(spread, threads=1) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,3,4")
    assert cluster._visible(spread) == ["7,3"]
    assert cluster._visible(config_of(workers=None, device="cuda")) == ["7", "3", "4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(
        ConfigError, match=r"1 CUDA devices here, and cluster.parallel.devices is 2"
    ):
        cluster.num_workers(spread, threads=1)


def test_a_worker_sees_its_own_group_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five devices, groups of two, one worker: it must be a process of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with open_cluster(config_of(device="cuda", parallel=SPREAD), threads=1) as opened:
        assert list(opened.map(seen, [0])) == ["0,1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # nothing to leave free
    with open_cluster(config_of(device="cuda", parallel=SPREAD), threads=1) as opened:
        assert opened._client is None


def seen(_: int) -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_a_target_is_spread_over_devices_that_are_there_and_by_accelerate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spread = config_of(device="auto", parallel=SPREAD)
    assert cluster.device_map(config_of()) is None
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"accelerate is not installed; .* install lkcache\[gpu\]"
    ):
        cluster.device_map(spread)
    monkeypatch.setattr(cluster, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"over CUDA devices, and the device is a CPU; .* to null"
    ):
        cluster.device_map(spread)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cluster.device_map(spread) == "auto"
    places = {"model": 0, "lm_head": "cpu"}
    spread = config_of(device="auto", parallel={**SPREAD, "map": places})
    assert cluster.device_map(spread) == (("model", 0), ("lm_head", "cpu"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"devices": 1}, r"cluster\.parallel\.devices is 1; expected .*greater than or equal to 2"),
        ({"kind": "tp_plan"}, r"cluster\.parallel\.kind is 'tp_plan'; expected .*'device_map'"),
        ({"map": {"lm_head": "disk"}}, r"cluster\.parallel\.map is .*'lm_head': 'disk'"),
        ({"map": {"lm_head": 2}}, r"cluster\.parallel.*devices 0 to 1 in map, those of a worker"),
        ({"map": "best"}, r"cluster\.parallel\.map.* is 'best'"),
    ],
)
def test_a_bad_spread_is_refused_by_key(change: dict[str, Any], sentence: str) -> None:
    section = {
        "workers": 1,
        "device": "cpu",
        "address": None,
        "parallel": {**SPREAD, **change},
        "writers": None,
    }
    with pytest.raises(ConfigError, match=sentence):
        parse("cluster", section, ClusterConfig)


@pytest.mark.parametrize(("key", "value"), [("workers", 0), ("device", "tpu"), ("address", 3)])
def test_bad_values_are_refused(key: str, value: Any) -> None:
    section = {
        "workers": 1,
        "device": "cpu",
        "address": None,
        "parallel": None,
        "writers": None,
        key: value,
    }
    with pytest.raises(ConfigError, match=f"cluster.{key} is"):
        parse("cluster", section, ClusterConfig)


def test_a_unit_is_finished_while_the_next_one_computes(tmp_path: Path) -> None:
    units = [(number, str(tmp_path), min(number + 2, 4)) for number in range(4)]
    assert list(Cluster(None, threads=1).map(begin, units)) == [0, 1, 2, 3]
    log = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[0] for line in log].count("finished") == 3
    # computing stays in the main thread, and the next unit begins before this one is finished
    assert all(line.endswith("True") == line.startswith("begin") for line in log)
    assert log.index("begin 1 True") < log.index("finished 0 False")
    # one at a time: nothing else is finishing when a unit starts to
    held = 0
    for line in log:
        held += line.startswith("finish ") - line.startswith("finished ")
        assert held <= 1


def test_what_fails_while_finishing_reaches_the_caller(two: Cluster, tmp_path: Path) -> None:
    for cluster_of in (Cluster(None, threads=1), two):
        with pytest.raises(TargetError, match="a full disk; expected room; make some"):
            list(cluster_of.map(begin, [(number, str(tmp_path), 0) for number in (6, 7, 8)]))


def test_workers_finish_aside_too(two: Cluster, tmp_path: Path) -> None:
    """Two workers of one thread each: no unit is finished before four have begun."""
    units = [(number, str(tmp_path), 4) for number in range(6)]
    assert list(two.map(begin, units)) == [0, 1, 2, 3, 4, 5]
    log = (tmp_path / "log").read_text().splitlines()
    begun = [number for number, line in enumerate(log) if line.startswith("begin")]
    ended = [number for number, line in enumerate(log) if line.startswith("finished")]
    assert begun[3] < ended[0]


def test_the_threads_that_finish_a_unit_are_the_cores_that_are_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    for cores, wanted in (
        (Cores(None, threads=1), 8),  # no more than one thread can write after
        (Cores(None, threads=1, share=2), 5),
        (Cores(None, threads=8, share=2), 1),
        (Cores(3, threads=8, share=2), 3),
    ):
        assert cores.spare() == wanted
    for quota, wanted in (("400000 100000\n", 4), ("50000 100000\n", 1), ("max 100000\n", 12)):
        (tmp_path / "cpu.max").write_text(quota)
        assert cluster.available_cores() == wanted


def told(unit: int) -> Later[int]:
    return Later(lambda threads: 100 * unit + threads)


def test_who_finishes_a_unit_is_told_how_many_threads_it_may_use(two: Cluster) -> None:
    assert list(Cluster(None, threads=1, writers=3).map(told, range(3))) == [3, 103, 203]
    asked = Cluster(two._client, threads=1, writers=5)
    assert list(asked.map(told, range(3))) == [5, 105, 205]
    assert cluster._most_on_a_host(two._client) == 2
    assert two._cores == Cores(None, threads=1, share=2)
