"""Two nodes on loopback, one of which is killed: the run ends with the bytes of an unbroken one.

A node is a host address of its own (127.0.0.2, 127.0.0.3) and a tree of processes that dies as a
whole, as a machine does.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages import capture, generate, train, warmup
from storage.workspace import tree_digest
from tests.stages.training import PARAMS, edit, project, stage
from tests.targets import copy_project, write_params, write_project

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120.0


class Node:
    """Processes of one host."""

    def __init__(self, *command: str, log: Path) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=out,
                stderr=out,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )

    def kill(self) -> None:
        """End the whole tree at once, as a power cut does."""
        try:
            tree = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            tree = []
        self.process.kill()
        for one in tree:
            if one.is_running():
                one.kill()
        self.process.wait()


def until(happened: Callable[[], object], *nodes: Node) -> None:
    """Wait for something; the logs of the nodes are the message where it does not happen."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "\n".join(node.log.read_text() for node in nodes)
        time.sleep(0.02)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def start(name: str, *command: str) -> Node:
        nodes.append(Node(*command, log=tmp_path / f"{name}.log"))
        return nodes[-1]

    yield start
    for node in nodes:
        node.kill()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_capture_survives_the_death_of_a_node(
    tmp_path: Path,
    tiny_model: Any,
    started: Callable[..., Node],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = tmp_path / "whole"
    write_project(whole, tiny_model(vocab_size=300))
    write_params(whole, capture={"part_tokens": 80})
    monkeypatch.chdir(whole)
    generate.main()
    two = copy_project(whole, tmp_path / "two")
    capture.main()
    monkeypatch.chdir(two)
    port = free_port()
    scheduler = started(
        "scheduler", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", f"{port}",
        "--no-dashboard",
    )  # fmt: skip
    until(lambda: "Scheduler at" in scheduler.log.read_text(), scheduler)
    first, second = (
        started(
            name, "distributed.cli.dask_worker", f"tcp://127.0.0.1:{port}", "--host", host,
            "--nworkers", "1", "--nthreads", "1", "--no-dashboard", *more,
        )
        for name, host, more in (
            ("first", "127.0.0.2", ()),
            ("second", "127.0.0.3", ("--preload", "tests.dying_node")),
        )
    )  # fmt: skip
    until(lambda: all("Registered to" in n.log.read_text() for n in (first, second)), first, second)
    params = {"capture": {"part_tokens": 80}}
    write_params(two, **params, cluster={"address": f"tcp://127.0.0.1:{port}"})
    with ThreadPoolExecutor(1) as aside:
        done = aside.submit(_kill_once_it_waits, second, two / "waits-to-be-killed")
        capture.main()
        done.result()
    for split in ("train", "heldout", "greedy"):
        parts = list((two / f"cache/{split}.zarr").glob("part-*"))
        assert len(parts) > 1
        found = tree_digest(two / f"cache/{split}.zarr")
        assert found == tree_digest(whole / f"cache/{split}.zarr")
    log = scheduler.log.read_text()
    assert "127.0.0.3" in log[log.index("Remove worker") :]


def _kill_once_it_waits(node: Node, waiting: Path) -> None:
    until(waiting.exists, node)
    node.kill()


def test_training_whose_node_died_goes_on_when_the_job_is_requeued(
    tmp_path: Path, started: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    project(tmp_path / "work", monkeypatch, params=edit(PARAMS, train={"ranks": 2, "steps": 6}))
    stage(warmup, "lm-0", monkeypatch)
    stage(train, "lm-lk-0", monkeypatch)
    unbroken = tree_digest(Path("drafts"))
    Path("drafts").rename("elsewhere")  # as DVC does before it runs a stage again

    def join(rank: int, port: int) -> Node:
        return started(
            f"node-{rank}-{port}",
            "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.2:{port}", "--rdzv-id", "t",
            "--rdzv-conf", f"is_host={int(rank == 0)}",
            "--local-addr", f"127.0.0.{2 + rank}", "--max-restarts", "0",
            "--monitor-interval", "0.2",
            "-m", "tests.dying_rank", "lm-lk-0",
        )  # fmt: skip

    port = free_port()
    nodes = [join(0, port), join(1, port)]
    waiting = Path("waits-to-be-killed")
    until(waiting.exists, *nodes)
    nodes[1].kill()
    (state,) = Path(".scratch").glob("train-lm-lk-0/*/drafts/lm-0/lk/resume/resume.json")
    assert state.exists()
    until(lambda: nodes[0].process.poll() is not None, *nodes)
    assert nodes[0].process.returncode
    port = free_port()
    nodes = [join(0, port), join(1, port)]  # as a scheduler does that requeues the job
    until(lambda: nodes[0].process.poll() is not None, *nodes)
    assert nodes[0].process.returncode == 0, nodes[0].log.read_text()
    assert tree_digest(Path("drafts")) == unbroken
    assert Path("went-on").read_text() == "3"
