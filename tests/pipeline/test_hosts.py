"""Workers elsewhere: over a real SSH server on loopback, by a stand-in for SLURM, and refused."""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import hosts
from pipeline.cluster import ClusterConfig, open_cluster
from pipeline.config import parse
from storage.errors import ConfigError

ROOT = Path(__file__).parents[2]
SSH: dict[str, Any] = {"kind": "ssh", "hosts": ["127.0.0.1"], "user": None, "port": 22,
    "key": None, "known_hosts": None, "python": None}  # fmt: skip
SLURM: dict[str, Any] = {"kind": "slurm", "partition": "gpu", "account": "me", "cores": 4,
    "memory": "64GB", "gpus": 1, "walltime": "1-00:00:00", "interface": None, "wait_s": 60,
    "prologue": ["module load cuda"], "directives": ["--nice=5"]}  # fmt: skip


@pytest.fixture(autouse=True)
def clients_end_here() -> Iterator[None]:
    """A client that found no scheduler is closed by `__del__`, which takes a lock of dask's.

    Collected while dask's next client is made under the same lock, it waits for itself.
    """
    yield
    gc.collect()


def where(unit: int) -> tuple[str, str, int]:
    return str(Path.cwd()), os.environ["OMP_NUM_THREADS"], unit


def config_of(address: Any, **changes: Any) -> ClusterConfig:
    section = {"workers": 1, "device": "cpu", "parallel": None, "writers": None, **changes}
    return parse("cluster", {**section, "address": address}, ClusterConfig)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is no import root, as a project of `lkcache init`; workers find the code."""
    for package in ("pipeline", "storage", "tests"):
        (tmp_path / package).symlink_to(ROOT / package)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SSHD = """
import asyncio, os, sys
import asyncssh

async def pump(source, sink):
    while data := await source.read(65536):
        sink.write(data)

async def run(process):
    child = await asyncio.create_subprocess_shell(
        process.command, cwd="/", stdin=-3, stdout=-1, stderr=-1, start_new_session=True
    )
    async def hang_up():
        try:
            await process.stdin.read()  # raises when the client signals or is gone
        except Exception:
            os.killpg(child.pid, 9)
    watch = asyncio.create_task(hang_up())
    try:
        await asyncio.gather(
            pump(child.stdout, process.stdout), pump(child.stderr, process.stderr)
        )
        process.exit(await child.wait())
    except Exception:
        os.killpg(child.pid, 9)
    watch.cancel()

async def serve(folder):
    keys = {name: asyncssh.generate_private_key("ssh-ed25519") for name in ("host", "user")}
    keys["user"].write_private_key(folder + "/key")
    keys["user"].write_public_key(folder + "/authorized")
    server = await asyncssh.listen(
        "127.0.0.1", 0, server_host_keys=[keys["host"]], process_factory=run, encoding=None,
        authorized_client_keys=folder + "/authorized",
    )
    public = keys["host"].export_public_key().decode()
    with open(folder + "/known", "w") as file:
        file.write(f"[127.0.0.1]:{server.get_port()} {public}")
    print(server.get_port(), flush=True)
    await asyncio.Event().wait()

asyncio.run(serve(sys.argv[1]))
"""


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """An SSH server on loopback that runs commands as this user; yields how to reach it."""
    command = [sys.executable, "-c", SSHD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        keys = {"key": str(tmp_path / "key"), "known_hosts": str(tmp_path / "known")}
        yield {**SSH, "port": port, **keys}
        server.kill()


def test_units_run_over_ssh_in_this_folder_and_nothing_stays(
    project: Path, sshd: dict[str, Any]
) -> None:
    before = set(psutil.pids())
    with open_cluster(config_of(sshd), threads=1) as opened:
        assert list(opened.map(where, range(3))) == [(str(project), "1", i) for i in range(3)]
    strangers = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before]
    left = [p for p in strangers if str(project) in " ".join(p.info["cmdline"] or [])]
    assert not psutil.wait_procs(left, timeout=10)[1]
    assert not list((project / ".scratch").glob("*.token"))


def test_a_host_that_cannot_be_used_is_named_in_time(
    project: Path, sshd: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"hosts": ["127.0.0.1", "no-such-host.invalid"]}, r"'no-such-host.invalid' cannot be"),
        ({"port": 9}, r"'127.0.0.1' cannot be used over SSH \(ConnectionRefused"),
        ({"known_hosts": str(project / "authorized")}, r"\(HostKeyNotVerifiable"),
        ({"python": "/no/python"}, r"/no/python: .*with this project's folder"),
    ]
    for change, sentence in cases:
        with (
            pytest.raises(ConfigError, match=rf"cluster\.address\.hosts: .*{sentence}"),
            open_cluster(config_of({**sshd, **change}), threads=1),
        ):
            pass
    assert time.monotonic() - started < 10 * len(cases)


def test_a_hosts_devices_go_to_workers_in_groups(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hosts.groups_of(4, 1) == ["0", "1", "2", "3"]
    assert hosts.groups_of(5, 2) == ["0,1", "2,3"]

    async def one(*_: Any) -> list[int]:
        return [1]

    monkeypatch.setattr(hosts, "_reach", one)
    spread = {"kind": "device_map", "devices": 2, "map": "auto"}
    with (
        pytest.raises(
            ConfigError, match=r"1 CUDA devices on 127\.0\.0\.1, and cluster\.parallel\.d"
        ),
        open_cluster(config_of(SSH, device="cuda", parallel=spread), threads=1),
    ):
        pass


SBATCH = """#!/bin/sh
case "$1" in
--test-only) grep -q "SBATCH -p closed" "$2" && { echo "invalid partition" >&2; exit 1; }; exit 0;;
esac
cp "$1" "$0.job"
setsid sh "$0.job" > "$0.log" 2>&1 &
echo $! > "$0.pid"
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
echo "$@" >> "$0.log"
for pid; do kill -9 -- "-$pid"; done
exit 0
"""


@contextmanager
def standing_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`sbatch` runs the job here, `scancel` kills it: the real job script, without a SLURM."""
    tools = folder / "tools"
    tools.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    try:
        yield tools
    finally:
        if (tools / "sbatch.pid").exists():
            group = (tools / "sbatch.pid").read_text().strip()
            subprocess.run(["kill", "-9", "--", f"-{group}"], check=False, capture_output=True)


def test_units_run_in_slurm_jobs_that_are_cancelled_after(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = {**SLURM, "gpus": 0, "prologue": []}
    with standing_in(project, monkeypatch) as tools:
        with open_cluster(config_of(slurm), threads=1) as opened:
            assert list(opened.map(where, range(3))) == [(str(project), "1", i) for i in range(3)]
            job = (tools / "sbatch.pid").read_text().strip()
        assert job in (tools / "scancel.log").read_text()
        refused = config_of({**slurm, "partition": "closed"})
        with (
            pytest.raises(ConfigError, match=r"sbatch refuses the workers' job \(invalid partit"),
            open_cluster(refused, threads=1),
        ):
            pass


def test_the_job_script_asks_for_what_the_parameters_say(project: Path) -> None:
    from dask_jobqueue import SLURMCluster

    options = hosts.slurm_options(hosts.SlurmConfig(**SLURM), threads=2)
    with SLURMCluster(**options) as cluster:
        script = cluster.job_script()
    for line in (
        "#SBATCH -p gpu", "#SBATCH -A me", "#SBATCH --cpus-per-task=4", "#SBATCH --mem=60G",
        "#SBATCH -t 1-00:00:00", "#SBATCH --gres=gpu:1", "#SBATCH --nice=5", "module load cuda",
        "export OMP_NUM_THREADS=2", f"export PYTHONPATH={project}", f"cd {project}",
    ):  # fmt: skip
        assert f"{line}\n" in script, (line, script)
    assert f"{sys.executable} -m distributed.cli.dask_worker" in script
    assert "--nthreads 1" in script
    assert script.rstrip().endswith("--memory-limit 0")


def test_slurm_without_its_commands_or_package_is_told(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(project))
    with (
        pytest.raises(ConfigError, match="this host has no sbatch; expected a host that submits"),
        open_cluster(config_of(SLURM), threads=1),
    ):
        pass
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with (
        pytest.raises(ConfigError, match=r"dask-jobqueue is not installed; .* lkcache\[slurm\]"),
        open_cluster(config_of(SLURM), threads=1),
    ):
        pass


class Strange:
    """A client whose one worker differs in something."""

    def __init__(self, **facts: str) -> None:
        self.facts = facts

    def run(self, function: Any, token: str) -> dict[str, Any]:
        return {"tcp://far": {**function(token), "host": "far", **self.facts}}


@pytest.mark.parametrize(
    ("facts", "device", "chosen", "sentence"),
    [
        ({"torch": "1.0"}, "cpu", True, r"worker on far has torch 1\.0; expected .*, as here"),
        ({"token": ""}, "cpu", True, r"worker on far does not see .*\.scratch; expected this proj"),
        ({}, "cuda", True, r"worker on far has 0 CUDA devices, and the units are to run on cuda"),
        ({"cuda": "8"}, "cpu", False, r"has 8 CUDA devices, and the units are to run on cpu; .*"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused_before_any_unit(
    facts: dict[str, str],
    device: str,
    chosen: bool,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        hosts.require_fit(Strange(**facts), device=device, chosen=chosen)
    hosts.require_fit(Strange(cuda="8"), device="cpu", chosen=True)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (3, r"cluster\.address is 3; expected input should be null, the address of a dask sch"),
        ({"kind": "pbs"}, r"cluster\.address is .*; expected input should be null"),
        ({**SSH, "hosts": []}, r"cluster\.address\.hosts is \[\]; expected .*at least 1 item"),
        ({**SSH, "prot": 1}, r"cluster\.address\.prot is unknown"),
        ({k: v for k, v in SSH.items() if k != "key"}, r"cluster\.address\.key is missing"),
        ({**SLURM, "memory": "much"}, r"cluster\.address\.memory is 'much'; expected .*pattern"),
        ({**SLURM, "walltime": "soon"}, r"cluster\.address\.walltime is 'soon'"),
    ],
)
def test_an_address_of_the_wrong_form_is_named_by_key(address: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config_of(address)
