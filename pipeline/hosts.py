"""Workers on other hosts: at a dask scheduler, started over SSH, or jobs of SLURM.

With `pipeline.cluster`, which maps units over them, the only importer of dask. Workers elsewhere
must see this folder under the same path and have the same packages: checked before any unit runs.
Nothing here knows what a unit is.
"""

import asyncio
import logging
import os
import platform
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag

from pipeline.config import Strict
from storage.errors import ConfigError
from storage.workspace import SCRATCH, SCRATCH_VARIABLE

RETRIES = 2  # of a unit whose worker died or raised something that no user can mend
CONNECT_S = 4.5  # to the scheduler, then to a worker: an error comes within 10 s
START_S = 120  # of a worker process on another host, whose disk may be slow and cold
# a scheduler on another host ends itself and its workers this long after its driver was killed
IDLE_S = 300
# what moves a stored byte or the law of a batch, and so may not differ between hosts
PACKAGES = ("torch", "transformers", "numpy", "zarr", "numcodecs")
# settings of this process that its workers elsewhere need too (dvc.yaml says why)
PASSED_ON = (
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
    SCRATCH_VARIABLE,
)


class SshConfig(Strict):
    """`cluster.address` of kind ssh: workers on hosts, the scheduler on the first of them."""

    kind: Literal["ssh"]
    hosts: Annotated[list[str], Field(min_length=1)]
    user: str | None
    port: Annotated[int, Field(ge=1, le=65_535)]
    key: str | None
    """A private key's file; null for ssh's own."""
    known_hosts: str | None
    """A file of host keys; null for ssh's own."""
    python: str | None
    """The interpreter on the hosts; null for the path of this one."""


class SlurmConfig(Strict):
    """`cluster.address` of kind slurm: each worker is a job, resubmitted when it ends early."""

    kind: Literal["slurm"]
    partition: str | None
    account: str | None
    cores: Annotated[int, Field(ge=1)]
    memory: Annotated[str, Field(pattern=r"^\d+(\.\d+)?\s*[KMGT]?i?B$")]
    gpus: Annotated[int, Field(ge=0)]
    walltime: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d\d:\d\d$")]
    interface: str | None
    """The network interface that jobs reach this host by; null for the default one."""
    wait_s: Annotated[int, Field(ge=1)]
    """How long to wait in the queue for the first job."""
    prologue: list[str]
    """Shell lines before a worker starts: module load …"""
    directives: list[str]
    """Further #SBATCH options."""


def _kind(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return "none" if value is None else "url"
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if kind in ("ssh", "slurm") else None


Address = Annotated[
    Annotated[None, Tag("none")]
    | Annotated[str, Tag("url")]
    | Annotated[SshConfig, Tag("ssh")]
    | Annotated[SlurmConfig, Tag("slurm")],
    Discriminator(
        _kind,
        custom_error_type="cluster_address",
        custom_error_message="Input should be null, the address of a dask scheduler, or a mapping "
        "of kind ssh or slurm",
    ),
]


def quiet() -> None:
    """What dask logs of dying workers and lost connections, an error here says in a sentence."""
    for name in ("distributed", "tornado", "asyncio", "asyncssh"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def settings(threads: int) -> dict[str, Any]:
    """Dask's own, for the scheduler and the nannies of this run."""
    threads_env = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads
    )
    return {
        # in place of dask's own: its MALLOC_TRIM_THRESHOLD_ returns every tensor to the system
        "distributed.nanny.pre-spawn-environ": threads_env,
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.scheduler.allowed-failures": RETRIES,
    }


def scratch() -> Path:
    """The folder of all scratch, for the workers' own files."""
    return Path(os.environ.get(SCRATCH_VARIABLE, SCRATCH)).absolute()


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back from this thread; what is started within never sees them.

    A terminal or a batch system sends them to every process of the group, and each worker would
    print a traceback or die under its unit. This one gets them, here or when the block ends, and
    closes the workers; those of a process that was killed end with its end of a pipe.
    """
    resource_tracker.ensure_running()  # starting it later would undo the blocking (CPython does so)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """A client of a running scheduler with at least one worker; `ConfigError` where none is."""
    import distributed

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


def _environment(threads: int) -> dict[str, str]:
    """Variables of a worker on another host: this project's code, this run's threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {"PYTHONPATH": str(Path.cwd()), **dict.fromkeys(names, str(threads)), **passed}


@contextmanager
def over_ssh(
    ssh: SshConfig,
    *,
    workers: int | None,
    threads: int,
    device: str,
    group: int = 1,
    group_name: str = "",
) -> Iterator[Any]:
    """Start a scheduler on the first host and workers on all, over SSH.

    On CUDA a worker has one device of its host, or a `group` of them, named by its parameter.
    """
    import distributed
    from distributed.deploy.ssh import Scheduler, Worker

    login: dict[str, Any] = {"port": ssh.port, "connect_timeout": CONNECT_S}
    login |= {"username": ssh.user} if ssh.user else {}
    login |= {"client_keys": [ssh.key]} if ssh.key else {}
    login |= {"known_hosts": ssh.known_hosts} if ssh.known_hosts else {}
    python = shlex.quote(ssh.python or sys.executable)
    counts = asyncio.run(_reach(ssh.hosts, login, python))
    variables = [shlex.quote(f"{k}={v}") for k, v in _environment(threads).items()]
    remote_python = " ".join(["env", *variables, python])
    specs = {}
    for host, num_devices in zip(ssh.hosts, counts, strict=True):
        cuda = device == "cuda"
        groups = groups_of(num_devices, group) if cuda else []
        if cuda and num_devices and not groups:
            raise ConfigError(
                found=f"{num_devices} CUDA devices on {host}, and {group_name} is {group}",
                expected="at least as many devices as a worker is to have",
                todo=f"lower {group_name}, or take another host",
            )
        for number in range(workers or len(groups) or 1):
            options: dict[str, Any] = {
                "nthreads": 1,
                "memory_limit": 0,
                "local_directory": str(scratch() / "dask"),
                "death_timeout": START_S,
            }
            if groups:
                options["env"] = {"CUDA_VISIBLE_DEVICES": groups[number % len(groups)]}
            specs[f"{host}-{number}"] = {
                "cls": Worker,
                "options": {
                    "address": host,
                    "connect_options": login,
                    "kwargs": options,
                    "remote_python": remote_python,
                },
            }
    scheduler = {
        "cls": Scheduler,
        "options": {
            "address": ssh.hosts[0],
            "connect_options": login,
            "kwargs": {"idle_timeout": f"{IDLE_S} s", "dashboard_address": ":0"},
            "remote_python": remote_python,
        },
    }
    with ExitStack() as stack:
        try:
            with signals_blocked():
                cluster = distributed.SpecCluster(specs, scheduler, name="lkcache-ssh")
                stack.enter_context(cluster)
            client = stack.enter_context(distributed.Client(cluster, timeout=START_S))
            client.wait_for_workers(len(specs), timeout=START_S)
        except Exception as error:
            raise ConfigError(
                found=f"no dask workers over SSH ({' '.join(str(error).split())[:200]})",
                expected=f"{len(specs)} of them on {', '.join(ssh.hosts)} within {START_S} s",
                todo="look whether the hosts reach each other's ports, or set cluster.address to "
                "null",
            ) from None
        yield client


def groups_of(num_devices: int, size: int) -> list[str]:
    """Groups of a host's devices, as CUDA_VISIBLE_DEVICES names them; what is left over is idle."""
    starts = range(0, num_devices - size + 1, size)
    return [",".join(map(str, range(start, start + size))) for start in starts]


async def _reach(hosts: list[str], login: Mapping[str, Any], python: str) -> list[int]:
    """How many NVIDIA devices each host has; `ConfigError` names the first host that fails."""
    import asyncssh

    project = shlex.quote(str(Path.cwd()))
    # a login shell's greeting may stand before the last line
    command = (
        f"cd {project} && {python} -c 'import distributed' && "
        "{ nvidia-smi -L 2>/dev/null | grep -c ^GPU || true; }"
    )

    async def count(host: str) -> int:
        async with asyncssh.connect(host, **login) as connection:
            done = await connection.run(command, check=True, timeout=START_S)
            return int(str(done.stdout).split()[-1])

    found = await asyncio.gather(*(count(host) for host in hosts), return_exceptions=True)
    for host, result in zip(hosts, found, strict=True):
        if isinstance(result, BaseException):
            said = getattr(result, "stderr", "") or str(result)
            said = " ".join(str(said).split())[-200:]
            raise ConfigError(
                found=f"cluster.address.hosts: {host!r} cannot be used over SSH "
                f"({type(result).__name__}: {said})",
                expected="a host that a key opens without a question, with this project's folder "
                "and Python under the same paths",
                todo=f"make `ssh {host} true` work, correct cluster.address, or set it to null",
            )
    return [int(result) for result in found if not isinstance(result, BaseException)]


def slurm_options(slurm: SlurmConfig, *, threads: int) -> dict[str, Any]:
    """What dask-jobqueue makes the job script of a worker from."""
    exports = [f"export {k}={shlex.quote(v)}" for k, v in _environment(threads).items()]
    gpus = [f"--gres=gpu:{slurm.gpus}"] if slurm.gpus else []
    return {
        "queue": slurm.partition,
        "account": slurm.account,
        "cores": 1,  # units at a time
        "processes": 1,
        "job_cpu": slurm.cores,
        "memory": slurm.memory,
        "walltime": slurm.walltime,
        "interface": slurm.interface,
        "job_name": "lkcache",
        "log_directory": str(scratch() / "slurm"),
        "local_directory": str(scratch() / "dask"),
        "death_timeout": START_S,
        "python": sys.executable,
        "job_script_prologue": [*slurm.prologue, *exports, f"cd {shlex.quote(str(Path.cwd()))}"],
        "job_extra_directives": [*gpus, *slurm.directives],
        "worker_extra_args": ["--memory-limit", "0"],  # SLURM keeps the job's own
        "scheduler_options": {"dashboard_address": ":0"},
    }


@contextmanager
def in_slurm(slurm: SlurmConfig, *, workers: int | None, threads: int) -> Iterator[Any]:
    """Submit jobs, one a worker; they end with this process, the scheduler within it."""
    import distributed

    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise ConfigError(
            found="cluster.address is of kind slurm, and dask-jobqueue is not installed",
            expected="the optional package",
            todo="install lkcache[slurm], or set cluster.address to null",
        ) from None
    if shutil.which("sbatch") is None:
        raise ConfigError(
            found="cluster.address is of kind slurm, and this host has no sbatch",
            expected="a host that submits SLURM jobs",
            todo="run dvc repro on a login node, or set cluster.address to null",
        )
    count = workers or 1
    with ExitStack() as stack:
        with signals_blocked():
            cluster = stack.enter_context(SLURMCluster(**slurm_options(slurm, threads=threads)))
        _require_accepted(cluster.job_script())
        client = stack.enter_context(distributed.Client(cluster))
        cluster.adapt(minimum_jobs=count, maximum_jobs=count, interval="1 s")
        print(f"cluster: {count} SLURM jobs submitted; waiting for the first.", file=sys.stderr)
        try:
            client.wait_for_workers(1, timeout=slurm.wait_s)
        except TimeoutError:
            raise ConfigError(
                found=f"no SLURM job started a worker within {slurm.wait_s} s",
                expected="one of them to leave the queue and reach this host",
                todo=f"look at squeue and {scratch() / 'slurm'}, raise cluster.address.wait_s, or "
                "name the interface that nodes reach this host by in cluster.address.interface",
            ) from None
        yield client


def _require_accepted(script: str) -> None:
    """`ConfigError` with SLURM's own words where it would not take the job."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        done = subprocess.run(  # noqa: S603  a file of our own
            ["sbatch", "--test-only", file.name],  # noqa: S607  the user's own SLURM
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise ConfigError(
            found=f"sbatch refuses the workers' job ({' '.join(done.stderr.split())})",
            expected="a job that this SLURM takes",
            todo="correct partition, account, cores, memory, gpus or walltime in cluster.address",
        )


def _facts(token: str | None = None) -> dict[str, str]:
    """What a worker must share with this process, by name; runs there and here."""
    facts = {name: version(name) for name in PACKAGES}
    facts |= {"python": platform.python_version(), "host": platform.node()}
    facts["cuda"] = str(torch.cuda.device_count())
    if token is not None:
        path = Path(token)
        facts["token"] = path.read_text(encoding="utf-8") if path.is_file() else ""
        os.chdir(path.parents[1]) if facts["token"] else None
    return facts


def require_fit(client: Any, *, device: str, chosen: bool) -> None:
    """Every worker has this project's packages, folder and device; `ConfigError` names the host.

    A CPU that was `chosen` by parameter is used where there are CUDA devices too.
    """
    own, secret = _facts(), secrets.token_hex()
    token = Path(SCRATCH, f"cluster-{os.getpid()}.token").absolute()
    token.parent.mkdir(exist_ok=True)
    token.write_text(secret, encoding="utf-8")
    try:
        workers = client.run(_facts, str(token))
    except Exception as error:  # whatever keeps a worker from importing or answering
        raise ConfigError(
            found=f"a dask worker cannot run this project's code ({type(error).__name__}: {error})",
            expected="workers started in this project's folder, with its packages",
            todo="start them there, or correct cluster.address",
        ) from None
    finally:
        token.unlink()
    for facts in workers.values():
        host = facts["host"]
        for name in ("python", *PACKAGES):
            if facts[name] != own[name]:
                raise ConfigError(
                    found=f"the worker on {host} has {name} {facts[name]}",
                    expected=f"{own[name]}, as here: stored bytes depend on it",
                    todo="install the same packages there",
                )
        if facts["token"] != secret:
            raise ConfigError(
                found=f"the worker on {host} does not see {token.parent}",
                expected="this project's folder on a filesystem that all workers share",
                todo="mount it there under the same path, or take another host",
            )
        cuda = device == "cuda"
        if cuda != (facts["cuda"] != "0") and (cuda or not chosen):
            raise ConfigError(
                found=f"the worker on {host} has {facts['cuda']} CUDA devices, and the units are "
                f"to run on {device}",
                expected="the same kind of device on all workers",
                todo="set cluster.device to cuda or cpu",
            )
