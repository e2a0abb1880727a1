"""An S3-compatible store and an SSH host on loopback, each a process, for `remotes.py` and tests.

    with s3_store(folder) as store, ssh_host(folder) as host: ...

The store is moto's server: objects above 16 MB lie in files of `folder`, and a multipart upload is
put together in memory. The host is asyncssh's SFTP server, unless `sshd` names an OpenSSH daemon.
Both end with the `with`, or when their parent dies. Linux.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

BUCKET = "caches"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
START_S = 60.0


@dataclass(frozen=True)
class Server:
    """Where it listens, and its process."""

    url: str
    """`http://127.0.0.1:port`, or `ssh://user@127.0.0.1:port` without a path."""
    pid: int
    keyfile: Path | None = None
    """The private key that the host lets in."""
    _seen: dict[int, int] = field(default_factory=dict)

    def cpu_s(self) -> float:
        """CPU seconds of it and its children so far; call it often, for those that end."""
        for pid in (self.pid, *_below(self.pid)):
            self._seen[pid] = max(_ticks(pid), self._seen.get(pid, 0))
        return sum(self._seen.values()) / os.sysconf("SC_CLK_TCK")


@contextmanager
def s3_store(folder: Path) -> Iterator[Server]:
    """An S3-compatible store with the bucket BUCKET; any key and secret are let in."""
    with _child("s3", folder) as (process, port):
        yield Server(f"http://127.0.0.1:{port}", process.pid)


@contextmanager
def ssh_host(folder: Path, sshd: Path | None = None) -> Iterator[Server]:
    """An SSH host of this user with this disk; its key is new, so in nobody's known_hosts."""
    key = folder / "client_key"
    if sshd is not None:
        with _openssh(folder, sshd, key) as (process, port, user):
            yield Server(f"ssh://{user}@127.0.0.1:{port}", process.pid, key)
        return
    with _child("ssh", folder) as (process, port):
        yield Server(f"ssh://tester@127.0.0.1:{port}", process.pid, key)


@contextmanager
def _child(kind: str, folder: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """This module as a process, which says its port and ends when its standard input does."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.stores", kind, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(folder)} | CREDENTIALS,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdin
    assert process.stdout
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {kind} server ended before it listened")
        yield process, int(line)
    finally:
        process.stdin.close()
        process.stdout.close()
        process.terminate()
        process.wait(START_S)


@contextmanager
def _openssh(
    folder: Path, sshd: Path, key: Path
) -> Iterator[tuple["subprocess.Popen[bytes]", int, str]]:
    """An OpenSSH daemon of this user, with a host key and a client key of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    host_key = folder / "host_key"
    for path in (key, host_key):
        _new_key(path)
    shutil.copyfile(f"{key}.pub", folder / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": host_key,
        "AuthorizedKeysFile": folder / "authorized",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "Subsystem": "sftp internal-sftp",
    }
    flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen([sshd, "-D", "-e", "-f", "/dev/null", *flags], stderr=log)
    try:
        _await_port(port)
        yield process, port, os.environ.get("USER", "root")
    finally:
        process.terminate()
        process.wait(START_S)


def _await_port(port: int) -> None:
    """Return once something listens."""
    end = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return


def _new_key(path: Path) -> None:
    import asyncssh

    key = asyncssh.generate_private_key("ssh-ed25519")
    path.write_bytes(key.export_private_key())
    path.chmod(0o600)
    Path(f"{path}.pub").write_bytes(key.export_public_key())


def _ticks(pid: int) -> int:
    """User and system ticks of a process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return 0
    return sum(int(field) for field in stat.rsplit(")", 1)[1].split()[11:13])


def _below(pid: int) -> list[int]:
    """Its living children and theirs."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    children = [int(child) for child in text.split()]
    return children + [below for child in children for below in _below(child)]


def _serve_s3() -> None:
    import logging

    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket=BUCKET)
    print(port, flush=True)
    sys.stdin.read()


def _serve_ssh(folder: Path) -> None:
    import asyncio

    import asyncssh

    key = folder / "client_key"
    _new_key(key)

    async def serve() -> None:
        listening = await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            authorized_client_keys=f"{key}.pub",
            sftp_factory=True,
        )
        print(listening.get_port(), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

    asyncio.run(serve())


if __name__ == "__main__":
    if sys.argv[1] == "s3":
        _serve_s3()
    else:
        _serve_ssh(Path(sys.argv[2]))
