"""What DVC takes to keep, push and pull a cache: a GB and 1,000 files, by link, remote and command.

    python -m benchmarks.remotes --gib 4 --sshd /usr/sbin/sshd    # writes benchmarks/remotes.md

Caches of the real format, written by `storage.writer` as an out of a DVC project under git:
`large` is of incompressible hidden states, `many` of parts of PART_TOKENS tokens of law alone (so
nearly all of its cost is files), `one` is a single such part. Remotes: a folder of this disk, S3
and SSH (`benchmarks.stores`), all on loopback: **that costs CPU and measures no network**. S3 takes
`medium`, as `large` but smaller: the store puts a large upload together in memory. Every
command is a process; its CPU time and its server's come from the kernel. Needs room for some five
copies of `large` below --folder; needs `pip install "lkcache[remotes]"`.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stores import BUCKET, CREDENTIALS, Server, s3_store, ssh_host
from storage.codecs import decode_p
from storage.layout import Layout
from storage.record import Record
from storage.writer import plan_parts, seal, write_part

OUT = Path(__file__).with_suffix(".md")
VOCAB, WIDTH, LAYERS, KEPT = 128_256, 4096, (2, 16, 29), 8
LARGE = Layout("topk", VOCAB, WIDTH, LAYERS, last_hidden=False, hidden_dtype="int8")
LAW = Layout("topk", VOCAB, WIDTH, (), last_hidden=False)
LARGE_TOKEN_BYTES = len(LAYERS) * WIDTH * (1 + 4 / 128) + KEPT * 6
LARGE_PART_TOKENS, PART_TOKENS = 32_768, 2048
COPIES = 5
POLL_S = 0.05
GIT = ("git", "-c", "user.name=benchmark", "-c", "user.email=benchmark@example.org")
DVC = (sys.executable, "-m", "dvc")
CACHE = "cache/train.zarr"
STAGE = f"""stages:
  capture:
    cmd: echo a benchmark never captures again; exit 1
    outs:
      - {CACHE}
"""
PUT = f"""
import sys
from s3fs import S3FileSystem
store = S3FileSystem(config_kwargs={{"read_timeout": 600}})
store.put(sys.argv[1], "{BUCKET}/plain/train.zarr", recursive=True)
"""
READ = f"""
from storage.reader import Cache
cache = Cache.open("s3://{BUCKET}/plain/train.zarr")
for array in cache.layout.arrays():
    cache.array(0, array.name)
"""


@dataclass(frozen=True)
class Spent:
    """What one command took."""

    clock_s: float
    cpu_s: float
    """Of the command and its children."""
    server_s: float
    """Of the server's process meanwhile; 0 without one."""
    said: str = ""


class Bench:
    """Runs commands in folders below one, keeps what they took, and tells of it as it goes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spent: dict[str, Spent] = {}
        self.env = os.environ | CREDENTIALS | {"DVC_SITE_CACHE_DIR": str(folder / "site")}
        self.env |= {"DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}

    def run(
        self,
        what: str,
        *command: str | Path,
        cwd: Path,
        server: Server | None = None,
        fails: bool = False,
        says: str = "",
    ) -> Spent:
        """Run it; unless `what` is empty its cost is kept. `fails` lets it end with an error."""
        before, start = server.cpu_s() if server else 0.0, time.perf_counter()
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                command, cwd=cwd, env=self.env, stdout=log, stderr=subprocess.STDOUT
            )
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                if server:
                    server.cpu_s()
                time.sleep(POLL_S)
            clock = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
            log.seek(0)
            said = log.read().decode()
        if (process.returncode and not fails) or says not in said:
            raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{said[-4000:]}")
        served = server.cpu_s() - before if server else 0.0
        cpu = usage.ru_utime + usage.ru_stime
        spent = Spent(clock, cpu, served, said)
        if what:
            self.spent[what] = spent
            print(
                f"{what}: {clock:.1f} s clock, {cpu:.1f} s CPU, {served:.1f} s server", flush=True
            )
        return spent

    def word(self, *command: str, cwd: Path) -> str:
        """What a command says in a line: its last error, or else its last line."""
        lines = self.run("", *command, cwd=cwd, fails=True).said.strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR")]
        return (errors or lines)[-1]

    def forget(self) -> None:
        """Lose DVC's state database, as another machine has none."""
        shutil.rmtree(self.folder / "site", ignore_errors=True)


def record(rng: np.random.Generator, layout: Layout, number: int) -> Record:
    """A sequence of 512 to 1,535 tokens of random law and random 8-bit hidden states."""
    length = int(rng.integers(512, 1536))
    kept = np.full(length, KEPT, dtype=np.uint16)
    kept[-1] = 0  # the last token predicts nothing
    logp = -rng.exponential(1.0, length).astype(np.float32)
    code = -np.sort(-rng.integers(1, 300, (length - 1, KEPT), dtype=np.uint16).astype(int))
    tail = np.log1p(-decode_p(code.astype(np.uint16)).sum(-1, dtype=np.float64))
    # kept ids are even and tokens odd, so that no token contradicts the law of its row
    ids = 2 * (rng.integers(0, VOCAB // 2 - KEPT, (length - 1, 1)) + np.arange(KEPT))
    logp[-1] = 0
    hidden = {}
    if layout.hidden_layers:
        shape = (length, len(layout.hidden_layers), layout.hidden_size)
        codes = np.frombuffer(rng.bytes(int(np.prod(shape))), dtype=np.int8).reshape(shape)
        scale = rng.random((*shape[:2], shape[2] // 128), dtype=np.float32) + 0.01
        hidden = {"hidden_int8": np.maximum(codes, -127), "hidden_scale": scale}
    return Record(
        id=f"sequence-{number:07d}",
        domain="random",
        tokens=2 * rng.integers(0, VOCAB // 2, length, dtype=np.uint32) + 1,
        turn=np.zeros(length, dtype=np.int32),
        token_logp=logp,
        kept=kept,
        topk_ids=ids.astype(np.uint32).ravel(),
        topk_p=code.astype(np.uint16).ravel(),
        tail_logp_mass=np.append(tail, 0).astype(np.float32),
        tail_kept=np.zeros(length, dtype=np.uint8),
        tail_ids=np.zeros(0, dtype=np.uint32),
        tail_logp=np.zeros(0, dtype=np.float16),
        **hidden,
    )


def write_cache(path: Path, layout: Layout, *, num_tokens: int, part_tokens: int) -> None:
    """About `num_tokens` tokens, a part in memory at a time; the same bytes every time."""
    lengths: list[int] = []
    while sum(lengths) + 1536 <= num_tokens:
        number = len(lengths)
        lengths.append(int(np.random.default_rng(number).integers(512, 1536)))
    parts = [
        write_part(
            path,
            index,
            [record(np.random.default_rng(n), layout, n) for n in range(start, stop)],
            layout,
        )
        for index, (start, stop) in enumerate(plan_parts(lengths, part_tokens=part_tokens))
    ]
    seal(path, layout=layout, parts=parts, source={"target": "random"}, params={})


def lay_out(bench: Bench, name: str) -> Path:
    """A DVC project under git with the stage `capture`, and nothing captured."""
    project = bench.folder / name
    project.mkdir(parents=True)
    (project / "dvc.yaml").write_text(STAGE, encoding="utf-8")
    bench.run("", "git", "init", "-q", cwd=project)
    bench.run("", *DVC, "init", "-q", cwd=project)
    bench.run("", *DVC, "config", "cache.type", "hardlink", cwd=project)
    return project


def committed(bench: Bench, project: Path, what: str, link: str) -> Spent:
    """`dvc commit` of the cache with links of a kind, from no state and an empty DVC cache."""
    bench.forget()
    bench.run("", *DVC, "config", "cache.type", link, cwd=project)
    return bench.run(what, *DVC, "commit", "-f", "capture", cwd=project)


def links(bench: Bench, project: Path, name: str) -> None:
    """What each kind of link takes to commit; ends with hard links."""
    objects = project / ".dvc" / "cache"
    for link in ("copy", "hardlink"):
        committed(bench, project, f"{name} commit {link}", link)
        if link == "copy":
            bench.run("", "rm", "-rf", objects, cwd=project)
    bench.run(f"{name} status", *DVC, "status", "capture", cwd=project)
    for jobs in ("1", "4"):
        bench.forget()
        bench.run("", *DVC, "config", "core.checksum_jobs", jobs, cwd=project)
        bench.run(f"{name} status, no state, {jobs}", *DVC, "status", "capture", cwd=project)
    bench.run("", *DVC, "config", "--unset", "core.checksum_jobs", cwd=project)


@contextmanager
def clone(bench: Bench, project: Path, name: str) -> Iterator[Path]:
    """A fresh clone of the project, removed again."""
    folder = bench.folder / name
    bench.run("", "git", "clone", "-q", project, folder, cwd=bench.folder)
    try:
        yield folder
    finally:
        # DVC's objects are write-protected
        bench.run("", "rm", "-rf", folder, cwd=bench.folder)


def exchange(
    bench: Bench, project: Path, name: str, remote: str, url: str, server: Server | None
) -> None:
    """Push to a remote, pull into fresh clones whole and in part, and look again."""
    bench.run("", *DVC, "remote", "add", "-f", "-d", remote, url, cwd=project)
    options = {"keyfile": str(server.keyfile)} if server and server.keyfile else {}
    if server and url.startswith("s3:"):
        # moto answers the end of a large upload late, and a request tried again breaks it
        options = {"endpointurl": server.url, "read_timeout": "600"}
    for option, value in options.items():
        bench.run("", *DVC, "remote", "modify", remote, option, value, cwd=project)
    bench.run("", "git", "add", "-A", cwd=project)
    bench.run("", *GIT, "commit", "-qm", remote, cwd=project)
    at = f"{name} {remote}"
    bench.run(f"{at} push", *DVC, "push", "-q", "capture", cwd=project, server=server)
    bench.run(f"{at} push again", *DVC, "push", "-q", "capture", cwd=project, server=server)
    with clone(bench, project, "clone") as there:
        bench.run(f"{at} pull", *DVC, "pull", "-q", "capture", cwd=there, server=server)
        look = (*DVC, "status", "capture")
        bench.run(f"{at} status after", *look, cwd=there, server=server, says="up to date")
        bench.run(f"{at} repro after", *DVC, "repro", "capture", cwd=there, server=server)
    if name == "many":
        with clone(bench, project, "clone") as there:
            pull = (*DVC, "pull", "-q", "-j", "1", "capture")
            bench.run(f"{at} pull, 1 job", *pull, cwd=there, server=server)
    else:
        with clone(bench, project, "clone") as there:
            part = f"{CACHE}/part-00000"
            bench.run(f"{at} pull a part", *DVC, "pull", "-q", part, cwd=there, server=server)


def without_dvc_copy(bench: Bench, project: Path, name: str) -> None:
    """`cache: false`: commit, then a copy made by other means in a clone, looked at twice."""
    bench.run("", "rm", "-rf", project / ".dvc" / "cache", cwd=project)
    stage = STAGE.replace(CACHE, f"{CACHE}: {{cache: false}}")
    (project / "dvc.yaml").write_text(stage, encoding="utf-8")
    bench.forget()
    bench.run(f"{name} commit cache: false", *DVC, "commit", "-f", "capture", cwd=project)
    bench.run("", "git", "add", "-A", cwd=project)
    bench.run("", *GIT, "commit", "-qm", "outside", cwd=project)
    with clone(bench, project, "clone") as there:
        (there / CACHE).parent.mkdir(exist_ok=True)
        bench.run(f"{name} cp -r", "cp", "-r", project / CACHE, there / CACHE, cwd=there)
        look = (*DVC, "status", "capture")
        bench.run(f"{name} status of the copy", *look, cwd=there, says="up to date")
        bench.run(f"{name} status again", *look, cwd=there, says="up to date")
        verify = (sys.executable, "-m", "lkcache.main", "verify", CACHE)
        bench.run(f"{name} lkcache verify", *verify, cwd=there)


def plain_store(bench: Bench, project: Path, name: str, store: Server) -> None:
    """The cache put into S3 as it is, and one part of it read there."""
    bench.env["AWS_ENDPOINT_URL"] = store.url
    put = (sys.executable, "-c", PUT, str(project / CACHE))
    bench.run(f"{name} plain put", *put, cwd=bench.folder, server=store)
    bench.run(f"{name} plain read", sys.executable, "-c", READ, cwd=bench.folder, server=store)


def damage(bench: Bench, project: Path, remote: Path) -> dict[str, str]:
    """The remote's largest file with one bit flipped, then gone: which command says what."""
    objects = [path for path in remote.rglob("*") if path.is_file() and path.suffix != ".dir"]
    victim = max(objects, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.chmod(0o644)
    victim.write_bytes(content)
    pull = (*DVC, "pull", "-r", "folder", "capture")
    look = (sys.executable, "-m", "lkcache.main", "verify", CACHE)
    found = {}
    with clone(bench, project, "clone") as there:
        found["bit flipped: `dvc pull` in a fresh clone"] = bench.word(*pull, cwd=there)
        found["… `dvc status` then"] = bench.word(*DVC, "status", "capture", cwd=there)
        found["… `lkcache verify` then"] = bench.word(*look, cwd=there)
    with clone(bench, project, "clone") as there:
        bench.run("", *DVC, "remote", "modify", "folder", "verify", "true", cwd=there)
        found["… `dvc pull` in another, remote `verify` true"] = bench.word(*pull, cwd=there)
    push = (*DVC, "push", "-r", "folder", "capture")
    victim.unlink()
    found["file gone: `dvc push` where the cache is"] = bench.word(*push, cwd=project)
    status = (*DVC, "status", "-c", "-r", "folder", "capture")
    found["… `dvc status -c`"] = bench.word(*status, cwd=project)
    with clone(bench, project, "clone") as there:
        found["… `dvc pull` in a fresh clone"] = bench.word(*pull, cwd=there)
    for listing in remote.rglob("*.dir"):
        listing.unlink()
    found["… `dvc push` once the listing (`.dir`) is gone too"] = bench.word(*push, cwd=project)
    return found


def counts(path: Path) -> dict[str, int]:
    """Files, distinct contents (DVC's objects) and bytes of a cache."""
    files = [file for file in path.rglob("*") if file.is_file()]
    objects = set()
    for file in files:
        with file.open("rb") as content:
            objects.add(hashlib.file_digest(content, "md5").hexdigest())
    return {
        "files": len(files),
        "objects": len(objects),
        "bytes": sum(file.stat().st_size for file in files),
        "parts": len(list(path.glob("part-*"))),
    }


def measure(folder: Path, found: dict[str, Any], given: argparse.Namespace) -> None:
    """All of it but the caches that `found` has, into `found`; what the page is written from."""
    caches = {
        "one": (LAW, PART_TOKENS, PART_TOKENS),
        "many": (LAW, given.parts * PART_TOKENS, PART_TOKENS),
        "medium": (LARGE, int(given.s3_gib * 2**30 / LARGE_TOKEN_BYTES), LARGE_PART_TOKENS),
        "large": (LARGE, int(given.gib * 2**30 / LARGE_TOKEN_BYTES), LARGE_PART_TOKENS),
    }
    for name, (layout, num_tokens, part_tokens) in caches.items():
        if name in found["sizes"]:
            continue
        bench = Bench(folder)
        project = lay_out(bench, name)
        start = time.process_time()
        write_cache(project / CACHE, layout, num_tokens=num_tokens, part_tokens=part_tokens)
        written = time.process_time() - start
        size = counts(project / CACHE) | {"written_s": round(written, 1)}
        print(name, size, flush=True)
        links(bench, project, name)
        local = folder / "remote"
        if name != "medium":
            exchange(bench, project, name, "folder", str(local / name), None)
        if name == "one":
            found["damage"] = damage(bench, project, local / name)
        bench.run("", "rm", "-rf", local, cwd=folder)
        if name != "large":
            with s3_store(folder / "store") as store:
                exchange(bench, project, name, "s3", f"s3://{BUCKET}/dvc", store)
            bench.run("", "rm", "-rf", folder / "store", cwd=folder)
            with s3_store(folder / "store") as store:
                plain_store(bench, project, name, store)
            bench.run("", "rm", "-rf", folder / "store", cwd=folder)
        if name != "medium":
            with ssh_host(folder / "host", given.sshd) as host:
                exchange(bench, project, name, "ssh", f"{host.url}{folder}/host/dvc", host)
            bench.run("", "rm", "-rf", folder / "host", cwd=folder)
            without_dvc_copy(bench, project, name)
        bench.run("", "rm", "-rf", project, cwd=folder)
        found["spent"] |= {what: asdict(each) | {"said": ""} for what, each in bench.spent.items()}
        found["sizes"][name] = size
        found["load"].append(os.getloadavg()[0])


ROWS = {
    "commit copy": "`dvc commit`, `cache.type` copy",
    "commit hardlink": "`dvc commit`, hardlink",
    "commit cache: false": "`dvc commit`, `cache: false`",
    "status": "`dvc status`, state database there",
    "status, no state, 1": "`dvc status`, state lost, `core.checksum_jobs` 1",
    "status, no state, 4": "… `core.checksum_jobs` 4",
    "status of the copy": "`dvc status` of a copy that came by `cp -r`",
    "status again": "… again",
    "lkcache verify": "`lkcache verify`",
    "plain put": "fsspec's `put` to S3, without DVC",
}
EXCHANGE = {
    "push": "`dvc push`",
    "push again": "… again, nothing to do",
    "pull": "`dvc pull`, fresh clone, hardlink",
    "status after": "`dvc status` then",
    "repro after": "`dvc repro` then (runs nothing)",
}
REMOTES = {"folder": "a folder", "s3": "S3", "ssh": "SSH"}
HEAD = (
    "| command | fixed | 1,000 files | a GB | server, a GB | clock, all of it |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: |"
)

INTRODUCTION = """{cores} cores, one disk, Linux. Load {low:.0f} to {high:.0f}, nearly all of it
other work on the machine: trust the CPU seconds, not the clock. **Remotes are on
loopback: this is the CPU that a transfer takes, and no network is measured.** S3 is moto's server,
in Python; SSH is {host}. What a server took has a column of its own; it shared the cores with the
command.
"""
SPLIT = (
    "CPU seconds of each command with its children follow, split by the three caches into a fixed "
    "part, a part by files (different ones where DVC moves them) and a part by bytes."
)


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a command: its start, 1,000 files, a GB; the server's of a GB."""

    fixed: float
    files: float
    gigabyte: float
    server: float

    def row(self, name: str, large: Spent) -> str:
        """One line of the page's table."""
        cells = f"{self.fixed:.1f} s | {self.files:.1f} s | {self.gigabyte:.2f} s"
        server = f"{self.server:.2f} s" if large.server_s >= 0.1 else "–"
        return f"| {name} | {cells} | {server} | {large.clock_s:.0f} s |"


def largest(what: str) -> str:
    """The largest cache that a command was measured on: what S3's store can hold is smaller."""
    return "medium" if what.startswith(("s3", "plain")) else "large"


class Found:
    """What `measure` returned, and the rates that follow from its three caches."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.sizes: dict[str, dict[str, float]] = found["sizes"]
        self.spent = {what: Spent(**each) for what, each in found["spent"].items()}
        self.damage: dict[str, str] = found["damage"]
        self.host: str = found["host"]
        self.load: list[float] = found["load"]

    def cost(self, what: str, unit: str) -> Cost:
        """Solved from the command on `one`, `many` and `largest`; files counted as `unit` says."""
        name = largest(what)
        one, many, large = (self.spent[f"{each} {what}"] for each in ("one", "many", name))
        counted = {each: size[unit] for each, size in self.sizes.items()}
        a_file = max(0.0, (many.cpu_s - one.cpu_s) / (counted["many"] - counted["one"]))
        fixed = max(0.0, one.cpu_s - a_file * counted["one"])
        gigabytes = self.sizes[name]["bytes"] / 1e9
        rest = large.cpu_s - fixed - a_file * counted[name]
        return Cost(fixed, 1000 * a_file, max(0.0, rest / gigabytes), large.server_s / gigabytes)

    def rows(self, commands: dict[str, str], unit: str) -> list[str]:
        """Lines of the page's table, of the commands that were measured."""
        measured = [what for what in commands if f"{largest(what)} {what}" in self.spent]
        return [
            self.cost(what, unit).row(commands[what], self.spent[f"{largest(what)} {what}"])
            for what in measured
        ]

    def page(self) -> str:
        """The whole page."""
        large = self.sizes["large"]
        lines = [
            INTRODUCTION.format(
                cores=os.cpu_count(), host=self.host, low=min(self.load), high=max(self.load)
            ),
            "| cache | parts | files | different files | bytes |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| `{name}` | {s['parts']} | {s['files']:,} | {s['objects']:,} | {s['bytes']:,} |"
            for name, s in self.sizes.items()
        ]
        written = large["written_s"] * 1e9 / large["bytes"]
        lines += [
            f"\nWriting `large` took {written:.1f} s of CPU a GB. {SPLIT}\n",
            f"## On this disk\n\n{HEAD}",
        ]
        lines += self.rows(ROWS, "files")
        for remote, called in REMOTES.items():
            lines += [f"\n## To {called} and back\n\n{HEAD}"]
            lines += self.rows({f"{remote} {what}": n for what, n in EXCHANGE.items()}, "objects")
        return "\n".join([*lines, *self._parts(), *self._jobs(), *self._damage()]) + "\n"

    def _parts(self) -> list[str]:
        part = self.sizes["large"]["bytes"] / self.sizes["large"]["parts"]
        read = self.spent["medium plain read"]
        rows = {
            called: self.spent[f"{largest(at)} {at} pull a part"] for at, called in REMOTES.items()
        }
        rows["S3 by `Cache.open`, every array read and hashed, without DVC"] = read
        return [
            (
                f"\n## One part\n\nA part is {part / 1e6:.0f} MB on average. "
                f"`dvc pull {CACHE}/part-00000` in a fresh clone:\n"
            ),
            "| from | CPU | clock |\n| --- | ---: | ---: |",
            *(f"| {name} | {s.cpu_s:.1f} s | {s.clock_s:.0f} s |" for name, s in rows.items()),
        ]

    def _jobs(self) -> list[str]:
        default, objects = 4 * (os.cpu_count() or 1), self.sizes["many"]["objects"]
        lines = [
            f"\n## Jobs\n\n`dvc pull` of `many`, {objects:,} different files, without a network:\n",
            f"| from | `-j 1`, CPU and clock | `-j {default}`, the default |",
            "| --- | ---: | ---: |",
        ]
        for remote, called in REMOTES.items():
            pulls = [self.spent[f"many {remote} {what}"] for what in ("pull, 1 job", "pull")]
            cells = [f"{pull.cpu_s:.1f} s, {pull.clock_s:.0f} s" for pull in pulls]
            lines.append(f"| {called} | {' | '.join(cells)} |")
        return lines

    def _damage(self) -> list[str]:
        return [
            "\n## A pushed file damaged in the remote, or gone from it\n",
            "| command | says |",
            "| --- | --- |",
            *(f"| {what} | {said} |" for what, said in self.damage.items()),
        ]


def room(folder: Path, gib: float) -> None:
    """Refuse a size that the disk will not hold."""
    needed, free = COPIES * gib * 2**30, shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        sys.exit(
            f"{folder} has {free / 2**30:.1f} GiB free; expected {1.1 * needed / 2**30:.1f} for "
            f"{COPIES} copies of {gib:g} GiB; free some, or give a smaller --gib"
        )


def main() -> None:
    """Measure and write the page."""
    options = argparse.ArgumentParser(description="DVC's cost of keeping, pushing, pulling a cache")
    options.add_argument("--gib", type=float, default=4.0, help="size of the large cache")
    options.add_argument("--s3-gib", type=float, default=1.0, help="size of S3's large cache")
    options.add_argument("--parts", type=int, default=60, help="parts of the cache of many files")
    options.add_argument("--folder", type=Path, default=None, help="where; a temporary folder")
    options.add_argument("--sshd", type=Path, default=None, help="an OpenSSH daemon to serve with")
    options.add_argument(
        "--results", type=Path, default=None, help="raw figures; a cache they have is skipped"
    )
    given = options.parse_args()
    found: dict[str, Any] = {"sizes": {}, "spent": {}, "load": [os.getloadavg()[0]]}
    if given.results and given.results.exists():
        found = json.loads(given.results.read_text(encoding="utf-8"))
    found["host"] = "OpenSSH's daemon" if given.sshd else "asyncssh's server, in Python"
    with tempfile.TemporaryDirectory(dir=given.folder, ignore_cleanup_errors=True) as name:
        room(Path(name), given.gib)
        try:
            measure(Path(name), found, given)
        finally:
            if given.results:
                given.results.write_text(json.dumps(found, indent=1), encoding="utf-8")
    OUT.write_text(Found(found).page(), encoding="utf-8")
    print(OUT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
